"""``python -m lowrank_dp.lora``: measure LoRA's projection noise on real layers' gradients."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import print_table, say
from lowrank_dp.train.config_checks import MOST_RANK

if TYPE_CHECKING:
    from lowrank_dp.experiments import lora_noise

MOST_DRAWS = 10**7  # the moments of every draw are kept
ANGLE, EPSILON = 0.1, 1.0  # angle (radians) and epsilon of the query whose delta is printed
app = _console.new_app(
    "Compare LoRA's projection noise, measured on real layers' gradients, with the theory."
)


@dataclass(frozen=True)
class Options:
    """Options of the command: the gradients that are projected, the ranks and the draws."""

    model: str = option(
        "",
        "Model: hub id, folder, GGUF file or packaged name. Default: minilm if installed, else "
        "tiny.",
    )
    task: str = option(
        "sst2",
        "Task whose gradients are projected: a task name, or own data as train reads them, whose "
        "columns have the names that train finds without an option.",
    )
    rank: tuple[int, ...] = option(
        (1, 4, 16, 64), "Rank of LoRA's A; may be repeated. Default: 1, 4, 16 and 64."
    )
    batch_size: int = option(32, "Number of examples whose clipped gradients are summed.")
    max_grad_norm: float = option(1.0, "Clipping norm of one example's gradient, absolute.")
    max_length: int = option(64, "Number of tokens that a text is cut to.")
    micro_batch_size: int = option(64, "Number of examples in memory at a time.")
    draws: int = option(200, "Number of random draws of A per layer and rank.")
    seed: int = option(0, "Random seed for the head, the batch and A.")
    device: str = option("cpu", "Device of the model: cpu or cuda.")

    def __post_init__(self) -> None:
        for value in self.rank:
            _validate.integer("rank", value, high=MOST_RANK)
        _validate.integer("batch_size", self.batch_size)
        _validate.integer("micro_batch_size", self.micro_batch_size)
        _validate.integer("draws", self.draws, low=2, high=MOST_DRAWS)
        _validate.integer("seed", self.seed, low=0)


@app.command()
@_console.options_of(Options)
@_console.holding_output
def main(
    given: dict[str, Any],
    output: Annotated[Path | None, typer.Option(help="Folder for lora.json and lora.npz.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare LoRA's projection noise, measured on real layers' gradients, with the theory."""
    asked = Options(**given)
    _console.check_new(output, "lora.json")
    from rich.console import Console

    from lowrank_dp import artifacts
    from lowrank_dp.experiments import lora_noise
    from lowrank_dp.experiments.gradients import GradientConfig, load_source, warm_up

    config = lora_noise.Config(
        gradients=GradientConfig(
            model=asked.model,
            task=asked.task,
            max_grad_norm=asked.max_grad_norm,
            warm_loss=None,
            max_length=asked.max_length,
            micro_batch_size=asked.micro_batch_size,
            seed=asked.seed,
            device=asked.device,
        ),
        more_models=(),
        batch_size=asked.batch_size,
        ranks=asked.rank,
        num_draws=asked.draws,
        vector_draws=asked.draws,
    )
    source = load_source(config.gradients, asked.batch_size)
    tell = functools.partial(say, Console(stderr=True))
    tell(f"measures: {source.description}")
    source.loss, source.warm_steps = warm_up(source, tell)
    result = lora_noise.run(config, source)
    if as_json:
        document = {
            "privacy": result.privacy,
            "description": result.description,
            "provenance": artifacts.provenance(seed=asked.seed, device=asked.device),
            "rows": measured_rows(result),
            "laws": exact_laws(result),
        }
        print(json.dumps(document, allow_nan=False))
    else:
        _print(result)
    if output is not None:  # after the printing, so that a failed write loses no result
        artifacts.save_result(result, output, "lora", seed=asked.seed, device=asked.device)


def _print(result: lora_noise.Result) -> None:
    from rich.console import Console

    console = Console()
    say(console, result.privacy)
    say(console, result.description)
    print_table(
        console,
        ("source", "rank", "variance / |q|^2", "exact", "kurtosis", "exact"),
        [
            (
                row["source"],
                str(row["rank"]),
                f"{row['variance']:.4g} ± {row['variance_ci']:.2g}",
                f"{row['variance_exact']:.4g}",
                f"{row['kurtosis']:.3g} ± {row['kurtosis_ci']:.2g}",
                f"{row['kurtosis_exact']:.3g}",
            )
            for row in measured_rows(result)
        ],
        title="Noise of G A^T A: measured over draws of A (95% interval), and exact",
    )
    keys = ("tv_exact", "tv_bound", "joint_tv", "delta", "delta_gaussian")
    print_table(
        console,
        ("n", "rank", "TV exact", "TV bound", "joint TV", "delta exact", "Gaussian reading"),
        [
            (str(law["n"]), str(law["rank"]), *(f"{law[key]:.4g}" for key in keys))
            for law in exact_laws(result)
        ],
        title="Exact laws: TV of one coordinate to a Gaussian, and delta of one vector query at "
        f"epsilon {EPSILON:g}, angle {ANGLE:g}",
    )


def measured_rows(result: lora_noise.Result) -> list[dict[str, Any]]:
    """Return one dict per source and rank: variance and kurtosis, measured and exact."""
    keys = (
        "variance",
        "variance_ci",
        "variance_exact",
        "kurtosis",
        "kurtosis_ci",
        "kurtosis_exact",
    )
    return [
        {"source": source, "rank": rank, **{key: float(getattr(result, key)[i, r]) for key in keys}}
        for i, source in enumerate(result.sources)
        for r, rank in enumerate(result.config.ranks)
    ]


def exact_laws(result: lora_noise.Result) -> list[dict[str, Any]]:
    """Return one dict per width of the layers and rank: distances, and delta of one query."""
    from lowrank_dp import theory

    widths = sorted({int(name.rsplit("x", 1)[1]) for name in result.sources[1:]})
    return [
        {
            "n": n,
            "rank": rank,
            "tv_exact": theory.tv_exact(rank, n),
            "tv_bound": theory.tv_bound(rank, n),
            "joint_tv": theory.joint_tv(rank, n),
            "delta": theory.privacy_profile(EPSILON, rank, n, angle=ANGLE),
            "delta_gaussian": theory.gaussian_privacy_profile(EPSILON, rank, angle=ANGLE),
        }
        for n in widths
        for rank in result.config.ranks
    ]
