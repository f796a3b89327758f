"""``python -m lowrank_dp.train``: differentially private fine-tuning from the command line."""

from __future__ import annotations

import json
import typing
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp import _validate
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import print_table, say
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.config_checks import PRIVACY, RESUMABLE, given_privacy

if TYPE_CHECKING:
    from rich.console import Console

    from lowrank_dp.train import Setup, TrainResult

app = _console.new_app("Differentially private fine-tuning, with restored gradients.")


@app.command()
@_console.options_of(TrainConfig)
def main(
    given: dict[str, Any],
    output: Annotated[
        Path,
        typer.Option(
            help="New or empty folder for the checkpoint, or the folder of a run to resume."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with fields of TrainConfig. Options take precedence over the file. "
            "Each of --epsilon, --noise-multiplier, --non-private and --noise-free replaces what "
            "the file says of all four."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the killed run in --output with its saved configuration. Options given "
            "with --resume must agree with the saved configuration, except for --micro-batch-size "
            "and the options of the prefix cache.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tune a classifier or a causal language model, and save a Hugging Face checkpoint."""
    from rich.console import Console

    from lowrank_dp.artifacts.jsonable import to_jsonable
    from lowrank_dp.train import processes
    from lowrank_dp.train.loop import train

    asked = _merged(_read_config(config), given) if config else given
    saved = _saved_configuration(output) if resume else None
    if resume and not saved and not asked:
        raise ValueError(f"--resume found no run in {output}: give the options of a new run")
    device = asked.get("device") or (saved or {}).get("device") or TrainConfig.device
    with processes.processes(str(device)):
        if processes.rank() > 0:
            warnings.showwarning = lambda *warning, **options: None
        console = Console(stderr=as_json)

        def on_start(setup: Setup, releases: int) -> None:
            say(console, f"trains: {setup.description}")
            say(console, f"privacy: {setup.statement(releases)}")

        begun = _configuration(asked, saved, config)
        result = train(begun, output, resume=resume, on_start=on_start)
        if processes.rank() > 0:
            return
        if as_json:
            print(json.dumps(to_jsonable(result), indent=1, allow_nan=False))
        else:
            _print(console, result, output)


def _merged(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a file, replaced by the options that were given."""
    replaced = PRIVACY if given_privacy(given) else ()
    return {name: value for name, value in file.items() if name not in replaced} | given


def _configuration(
    asked: dict[str, Any], saved: dict[str, Any] | None, file: Path | None
) -> TrainConfig:
    """Return the configuration of the run: from options and a file, or from a begun run.

    Raises ValueError if ``asked`` differs from the configuration in ``saved``.
    """
    if saved is None:
        try:
            return TrainConfig(**asked)
        except ValueError as error:
            if file is None:
                raise
            raise ValueError(f"--config {file}, with the options: {error}") from None
    begun = TrainConfig.from_json(saved)
    differing = [
        f"{name}: {value!r} / {getattr(begun, name)!r}"
        for name, value in asked.items()
        if value != getattr(begun, name) and name not in RESUMABLE
    ]
    if differing:
        raise ValueError(
            "resume must be given the configuration that the run began with, or none; asked and "
            f"begun differ in {'; '.join(differing)}"
        )
    return replace(begun, **{name: v for name, v in asked.items() if name in RESUMABLE})


def _read_config(path: Path) -> dict[str, Any]:
    """Read the fields that a configuration file sets, and convert each to its type.

    The file need not be a complete configuration. Raises ValueError for content that is not one
    JSON object, an unknown field, or a value of the wrong type.
    """
    from lowrank_dp._json import parse_json
    from lowrank_dp.artifacts.jsonable import from_jsonable

    try:
        document = parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"--config {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--config {path} must be JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"--config {path} must hold one JSON object")
    hints = typing.get_type_hints(TrainConfig)
    for name in document:
        _validate.choice(f"--config {path}: field", name, hints)
    return {
        name: from_jsonable(f"--config {path}: {name}", value, hints[name])
        for name, value in document.items()
    }


def _saved_configuration(output: Path) -> dict[str, Any] | None:
    """Read the configuration that the run in ``output`` began with, as JSON; None without a run."""
    from lowrank_dp.artifacts.runs import RunFolder

    saved = RunFolder(_validate.expanded("output", output)).configuration()
    return saved if isinstance(saved, dict) else None


def _print(console: Console, result: TrainResult, output: Path) -> None:
    columns = [name for name in result.curve[-1] if name not in ("seconds", "restore_seconds")]
    rows = [
        [
            *(f"{entry[name]:.4g}" if name in entry else "" for name in columns),
            f"{entry['seconds']:.0f}",
        ]
        for entry in result.curve
    ]
    print_table(console, [*columns, "seconds"], rows)
    if result.majority is not None:
        say(console, f"majority class: {result.majority:.4g}")
    if result.config.scheme != "none" or result.config.low_pass is not None:
        share = result.restore_seconds / result.seconds
        say(console, f"restoring: {share:.1%} of the time of the steps")
    say(console, f"loss on members: {result.train_loss:.4g} (NON-PRIVATE)")
    say(console, f"privacy spent: {result.privacy}")
    say(console, f"checkpoint: {output}")
