"""``python -m lowrank_dp.train``: differentially private fine-tuning from the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lowrank_dp import _terminal, artifacts
from lowrank_dp._json import without_repeats
from lowrank_dp.membership.units import MEMBERSHIPS
from lowrank_dp.models import METHODS
from lowrank_dp.restore import SCHEMES
from lowrank_dp.train import Setup, TrainConfig, TrainResult, processes
from lowrank_dp.train.config import OPTIMIZERS, PADDINGS, PRECISIONS, SCHEDULES
from lowrank_dp.train.loop import train

app = _terminal.new_app("Differentially private fine-tuning, with restored gradients.")
DEFAULT = TrainConfig(non_private=True)


def one_of(names: Any) -> str:
    """A list of names for a help text."""
    return f"{', '.join(names)}."


def _read_config(context: typer.Context, path: Path | None) -> None:
    """Make the values in a configuration file the defaults of the other options."""
    if path is None:
        return
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=without_repeats)
    except OSError as error:
        raise ValueError(f"--config {path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} must be JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"--config {path} must hold one JSON object")
    try:
        TrainConfig.from_json(document)  # names and values, before any option is read
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    options = document.pop("scheme_options", {})
    context.default_map = document | {
        "option": [f"{name}={json.dumps(value)}" for name, value in options.items()]
    }


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="New or empty folder for the checkpoint.")],
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            callback=_read_config,
            is_eager=True,
            expose_value=False,
            help="JSON file of a TrainConfig's fields; options given beside it win.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Hub id, folder, or minilm, smollm2, tiny, tiny-llama.")
    ] = DEFAULT.model,
    task: Annotated[
        str,
        typer.Option(
            help="Task name, or own data: a file (CSV, TSV, JSON Lines, JSON, Parquet), a folder with "
            "a train and a validation file, or a folder saved by datasets."
        ),
    ] = DEFAULT.task,
    text_column: Annotated[
        str | None, typer.Option(help="Column of own data with the text of a labelled record.")
    ] = None,
    pair_column: Annotated[
        str | None,
        typer.Option(help="Column of own data with the second text of a labelled record."),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of own data with classes (strings, integers) or scores (floats)."
        ),
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Column of own data with the source that a text is generated from."),
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(help="Column of own data with the text to generate.")
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column of own data that rows of one person share: the groups of --unit group."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"What is trained: {one_of(METHODS)}")
    ] = DEFAULT.method,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy budget; the noise is calibrated to it.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Delta of the guarantee. Default: N^-1.1 for N units.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise relative to --max-grad-norm, in place of --epsilon.")
    ] = None,
    non_private: Annotated[
        bool, typer.Option("--non-private", help="No clipping, no noise, no guarantee.")
    ] = False,
    max_grad_norm: Annotated[
        float, typer.Option(help="Clipping norm of one unit of privacy.")
    ] = DEFAULT.max_grad_norm,
    unit: Annotated[
        str,
        typer.Option(
            help="Unit of privacy: example, or group (all rows of a --group-column's value, or of a "
            "source record)."
        ),
    ] = DEFAULT.unit,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULT.steps,
    batch_size: Annotated[
        int, typer.Option(help="Expected units in a step (Poisson sampling).")
    ] = DEFAULT.batch_size,
    optimizer: Annotated[
        str, typer.Option(help=f"Optimizer: {one_of(OPTIMIZERS)}")
    ] = DEFAULT.optimizer,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the optimizer.")
    ] = DEFAULT.learning_rate,
    beta1: Annotated[
        float | None,
        typer.Option(
            help="Adam's beta1 or SGD's momentum. Default: 0.9 (Adam); 0 with SGD or a running mean."
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of the optimizer.")
    ] = DEFAULT.weight_decay,
    schedule: Annotated[
        str, typer.Option(help=f"Schedule of the learning rate: {one_of(SCHEDULES)}")
    ] = DEFAULT.schedule,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps in which the learning rate rises to its full value.")
    ] = DEFAULT.warmup_steps,
    scheme: Annotated[
        str, typer.Option(help=f"How gradients are restored: {one_of(SCHEMES)}")
    ] = DEFAULT.scheme,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the scheme as NAME=VALUE, such as k=8; may be repeated."),
    ] = None,
    below: Annotated[
        str, typer.Option(help="Matrices with nothing above the noise: keep or zero.")
    ] = DEFAULT.below,
    restore_method: Annotated[
        str, typer.Option(help="How singular values are restored: fast or exact.")
    ] = DEFAULT.restore_method,
    momentum_beta: Annotated[
        float | None,
        typer.Option(help="Restore the running mean of noisy gradients instead, such as 0.9."),
    ] = None,
    filter_b: Annotated[
        list[float] | None,
        typer.Option(help="Low-pass filter, coefficients on gradients; may be repeated."),
    ] = None,
    filter_a: Annotated[
        list[float] | None,
        typer.Option(help="Low-pass filter, coefficients on past outputs; may be repeated."),
    ] = None,
    diagnostic: Annotated[
        bool,
        typer.Option("--diagnostic", help="Allow the oracle scheme; marks the run NON-PRIVATE."),
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of LoRA's update.")] = DEFAULT.rank,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            help="Alpha of LoRA: the update is scaled by alpha / rank. Default: the rank."
        ),
    ] = None,
    lora_init: Annotated[
        str, typer.Option(help="How LoRA's A is drawn: peft or gaussian.")
    ] = DEFAULT.lora_init,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Layer that LoRA adapts; may be repeated. Default: all linear ones."),
    ] = None,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="Train the embeddings too, not with LoRA.")
    ] = False,
    train_layers: Annotated[
        str | None,
        typer.Option(help="Train the last k blocks, or parameters that match this expression."),
    ] = None,
    dropout: Annotated[bool, typer.Option("--dropout", help="Train with dropout.")] = False,
    max_examples: Annotated[
        int | None,
        typer.Option(help="Use a random subset of each split; its size is an expectation."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens a text is cut to. Default: 128 with labels, uncut for generation."
        ),
    ] = None,
    padding: Annotated[
        str,
        typer.Option(
            help="What a row is padded to: the longest row beside it, or --max-length, for models "
            f"to which padding is not nothing: {one_of(PADDINGS)}"
        ),
    ] = DEFAULT.padding,
    data_seed: Annotated[
        int, typer.Option(help="Seed of --max-examples' subset and of a generated task.")
    ] = DEFAULT.data_seed,
    holdout: Annotated[
        int,
        typer.Option(
            help="Expected number of units that are taken out of the train split and evaluated on, for "
            "tuning."
        ),
    ] = 0,
    membership: Annotated[
        str, typer.Option(help=f"Who is trained on: {one_of(MEMBERSHIPS)}")
    ] = DEFAULT.membership,
    micro_batch_size: Annotated[
        int, typer.Option(help="Rows in memory at a time.")
    ] = DEFAULT.micro_batch_size,
    precision: Annotated[
        str, typer.Option(help=f"Precision of forward and backward: {one_of(PRECISIONS)}")
    ] = DEFAULT.precision,
    eval_every: Annotated[
        int, typer.Option(help="Steps between evaluations on the validation split.")
    ] = DEFAULT.eval_every,
    eval_examples: Annotated[
        int, typer.Option(help="Most validation examples to evaluate on.")
    ] = DEFAULT.eval_examples,
    generate: Annotated[
        bool,
        typer.Option("--generate/--no-generate", help="Write text at the end (BLEU, ROUGE-L)."),
    ] = True,
    num_beams: Annotated[
        int, typer.Option(help="Beams of the text generation; 1 is greedy.")
    ] = DEFAULT.num_beams,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens that are generated for one prompt.")
    ] = DEFAULT.max_new_tokens,
    snapshot_every: Annotated[
        int, typer.Option(help="Steps between snapshots, from which a killed run resumes.")
    ] = DEFAULT.snapshot_every,
    seed: Annotated[
        int | None,
        typer.Option(help="Reproduces everything, the noise included: then it is not secret."),
    ] = None,
    secure_rng: Annotated[
        bool,
        typer.Option(
            "--secure-rng",
            help="Noise from a cryptographic generator on CUDA too; slower there. "
            "On the CPU it is the default.",
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile each step by torch: slow to start, then faster."),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Under torchrun: split the model over the processes (FSDP2)."),
    ] = False,
    device: Annotated[
        str, typer.Option(help="Device of the trained parameters: cpu or cuda.")
    ] = DEFAULT.device,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the killed run in --output.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune a classifier or a causal language model; leave a Hugging Face checkpoint."""
    with processes.processes(device):
        if processes.rank() > 0:
            warnings.showwarning = lambda *warning, **options: None
        config = TrainConfig(
            model=model,
            task=task,
            method=method,
            epsilon=epsilon,
            delta=delta,
            noise_multiplier=noise_multiplier,
            non_private=non_private,
            max_grad_norm=max_grad_norm,
            unit=unit,
            text_column=text_column,
            pair_column=pair_column,
            label_column=label_column,
            prompt_column=prompt_column,
            target_column=target_column,
            group_column=group_column,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            learning_rate=learning_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            scheme=scheme,
            scheme_options=_terminal.options(option or []),
            below=below,
            restore_method=restore_method,
            momentum_beta=momentum_beta,
            filter_b=tuple(filter_b or ()),
            filter_a=tuple(filter_a or ()),
            diagnostic=diagnostic,
            rank=rank,
            lora_alpha=lora_alpha,
            lora_init=lora_init,
            target_modules=tuple(target_modules or ()),
            train_embeddings=train_embeddings,
            train_layers=_layers(train_layers),
            dropout=dropout,
            max_examples=max_examples,
            data_seed=data_seed,
            max_length=max_length,
            padding=padding,
            holdout=holdout,
            membership=membership,
            micro_batch_size=micro_batch_size,
            precision=precision,
            eval_every=eval_every,
            eval_examples=eval_examples,
            generate=generate,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            snapshot_every=snapshot_every,
            seed=seed,
            secure_rng=secure_rng,
            compile=compile,
            shard=shard,
            device=device,
        )
        console = Console(stderr=as_json)

        def announce(setup: Setup, releases: int) -> None:
            _say(console, f"trains: {setup.description}")
            _say(console, f"privacy: {setup.statement(releases)}")

        result = train(config, output, resume=resume, announce=announce)
        if processes.rank() > 0:
            return
        if as_json:
            print(json.dumps(artifacts.plain(result), indent=1, allow_nan=False))
        else:
            _print(console, result, output)


def _print(console: Console, result: TrainResult, output: Path) -> None:
    columns = [name for name in result.curve[-1] if name not in ("seconds", "restore_seconds")]
    table = Table(*columns, "seconds")
    for entry in result.curve:
        table.add_row(
            *(f"{entry[name]:.4g}" if name in entry else "" for name in columns),
            f"{entry['seconds']:.0f}",
        )
    console.print(table)
    share = result.restore_seconds / result.seconds
    lines = [
        f"restoring: {share:.1%} of the time of the steps",
        f"loss on members: {result.train_loss:.4g} (NON-PRIVATE)",
        f"privacy spent: {result.privacy}",
        f"checkpoint: {output}",
    ]
    if result.majority is not None:
        lines.insert(0, f"majority class: {result.majority:.4g}")
    for line in lines:
        _say(console, line)


def _say(console: Console, line: str) -> None:
    """Print a line to the letter: rich would read a folder called [red] as a colour."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _layers(value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdigit() else value
