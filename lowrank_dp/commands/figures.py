"""``python -m lowrank_dp.figures``: draw the papers' figures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import print_table, say
from lowrank_dp.figures.catalog import NAMES

if TYPE_CHECKING:
    from rich.console import Console

app = _console.new_app("Draw the figures: PNG and PDF in figures/, arrays in paper_artifacts/.")


@dataclass(frozen=True)
class Options:
    """Options of the command: the figures to make, and the experiments behind them."""

    only: tuple[str, ...] = option(
        (), "Figure to make; may be repeated. Default: all.", choices=NAMES
    )
    scale: str = option("small", "Scale of the experiments: small (minutes on 2 cores) or full.")
    model: str = option(
        "", "Hub id, folder or packaged name. Default: minilm if installed, else tiny."
    )
    task: str = option("", "Task name. Default: sst2 if LOWRANK_DP_DATA holds it, else generated.")
    device: str = option("cpu", "Device of the experiments: cpu or cuda.")
    seed: int = option(0, "Seed of every random choice.")
    panels: bool = option(
        False, "Also save every panel as a page of its own, in the folder panels of --output."
    )

    def __post_init__(self) -> None:
        _validate.choice("scale", self.scale, ["small", "full"])
        for name in self.only:
            _validate.choice("--only", name, NAMES)

    @property
    def changes(self) -> dict[str, Any]:
        """Values that replace fields of the experiments' own configuration."""
        named = {"task": self.task, "model": self.model}
        return {"device": self.device, "seed": self.seed} | {k: v for k, v in named.items() if v}


@app.command()
@_console.options_of(Options)
def main(
    given: dict[str, Any],
    output: Annotated[Path, typer.Option(help="Folder for PNG and PDF.")] = Path("figures"),
    artifact_folder: Annotated[
        Path, typer.Option("--artifacts", help="Folder for results and tables.")
    ] = Path("paper_artifacts"),
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw from saved results, compute nothing.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace saved results of another configuration."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Make the figures, one after the other, and print a summary."""
    asked = Options(**given)
    from rich.console import Console

    for folder in (output, artifact_folder):
        folder.mkdir(parents=True, exist_ok=True)  # an unwritable folder fails at once
    console = Console(stderr=True)
    explicit = bool(given.keys() - {"only", "panels"})
    left_out = _without_result(artifact_folder) if redraw or asked.scale == "small" else []
    names = asked.only or [name for name in NAMES if name not in left_out]
    configs = {
        name: None
        if redraw
        else _to_compute(name, asked, explicit, artifact_folder, force, console)
        for name in names
    }
    summary: list[dict[str, Any]] = []
    sources: dict[Any, Any] = {}
    for name, config in configs.items():
        if console.is_terminal:
            say(console, f"{name}: {'redrawing' if config is None else 'computing'} ...")
        started = time.perf_counter()
        entry = _make(name, config, asked, output, artifact_folder, sources, console)
        summary.append(entry | {"seconds": round(time.perf_counter() - started, 1)})
    for name in left_out if not asked.only else ():
        say(console, f"{name}: left out, since no result is saved; --scale full computes it")
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        _print(summary)


def _without_result(folder: Path) -> list[str]:
    """Return the lengthy figures that have no result in ``folder``."""
    from lowrank_dp.figures import find

    return [name for name in NAMES if find(name).lengthy and not (folder / f"{name}.json").exists()]


def _to_compute(
    name: str, asked: Options, explicit: bool, folder: Path, force: bool, console: Console
) -> Any:
    """Return the configuration to compute a figure's result by; None draws the saved result.

    Raises ValueError if the saved result is of another configuration than the one asked for, unless
    ``force``. If no option asked for a configuration, the saved result is drawn whatever its
    configuration.
    """
    from lowrank_dp.figures import config_of, find

    spec = find(name)
    if spec.lengthy and asked.scale == "small":
        say(
            console,
            f"{name}: drawn from the saved result; --scale full computes it, which takes minutes "
            "to hours",
        )
        return None
    config = config_of(name, asked.scale, **asked.changes)
    other = "" if force else _other_result(folder, name, spec.result, config)
    if not other:
        return config
    if explicit:
        raise ValueError(
            f"{folder / name}.json holds {other}: choose another folder by --artifacts, or replace "
            "the result with --force"
        )
    say(
        console,
        f"{name}: not computed but drawn, from {other}; --force computes and replaces it",
    )
    return None


def _other_result(folder: Path, name: str, kind: type, config: Any) -> str:
    """Describe a saved result whose configuration is not ``config``; "" if none differs."""
    from lowrank_dp import artifacts

    if not (folder / f"{name}.json").exists():
        return ""
    try:
        saved: Any = artifacts.load_result(folder, name, kind)
    except (ValueError, OSError):
        return "a result of another command or version"
    if saved.config == config:
        return ""
    return f"a result of another configuration ({_first_difference(saved.config, config)})"


def _first_difference(saved: Any, asked: Any) -> str:
    from lowrank_dp.artifacts.jsonable import to_jsonable

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {path: value}
        inner = (flat(item, f"{path}.{key}" if path else key) for key, item in value.items())
        return {key: item for part in inner for key, item in part.items()}

    before, now = flat(to_jsonable(saved)), flat(to_jsonable(asked))
    name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
    return f"{name} {before.get(name)!r}, asked {now.get(name)!r}"


def _make(
    name: str,
    config: Any,
    asked: Options,
    output: Path,
    artifact_folder: Path,
    sources: dict[Any, Any],
    console: Console,
) -> dict[str, Any]:
    """Compute a figure's result if there is a ``config``; draw and summarise the result."""
    from lowrank_dp import artifacts
    from lowrank_dp.figures import compute, find, show

    spec = find(name)
    if config is not None:
        if spec.plan is not None:
            say(console, f"plan: {spec.plan(config)}")
        artifacts.save_result(
            compute(name, config, sources),
            artifact_folder,
            name,
            seed=asked.seed,
            device=asked.device,
        )
    result, figure = show(name, artifact_folder=artifact_folder)  # drawn from the saved files alone
    artifacts.save_figure(figure, output, name, privacy=result.privacy)
    if asked.panels:
        _save_panels(name, result, output / "panels")
    columns, rows = spec.rows(result)
    artifacts.save_table(columns, rows, artifact_folder, name, caption=spec.caption)
    return {
        "figure": name,
        "seconds": 0.0,
        "headline": spec.headline(result),
        "privacy": result.privacy,
        "ran on": getattr(result, "description", ""),
        "files": [
            str(output / f"{name}.png"),
            str(output / f"{name}.pdf"),
            str(artifact_folder / f"{name}.json"),
        ],
    }


def _save_panels(name: str, result: Any, folder: Path) -> None:
    """Save each panel of a figure as a page of its own, ``NAME_LETTER``."""
    from lowrank_dp import artifacts
    from lowrank_dp.figures import find
    from lowrank_dp.plots import style

    spec = find(name)
    for panel in style.panels(spec.plot(result)):
        page = spec.plot(result)
        style.keep_panel(page, panel)
        artifacts.save_figure(page, folder, f"{name}_{panel}", privacy=result.privacy)


def _print(summary: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console()
    rows = [
        [
            entry["figure"] if i == 0 else "",
            what,
            value,
            f"{entry['seconds']:.0f}" if i == 0 else "",
        ]
        for entry in summary
        for i, (what, value) in enumerate(entry["headline"].items())
    ]
    print_table(console, ["figure", "what it shows", "value", "s"], rows)
    for line in sorted({f"{entry['figure']}: {entry['privacy']}" for entry in summary}):
        say(console, line)
    for line in dict.fromkeys(entry["ran on"] for entry in summary if entry["ran on"]):
        say(console, f"ran on: {line}")
    say(console, "files: " + ", ".join(path for entry in summary for path in entry["files"]))
