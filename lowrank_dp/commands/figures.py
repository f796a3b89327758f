"""``python -m lowrank_dp.figures``: draw the papers' figures."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
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

    from lowrank_dp.figures.places import Place, Request

app = _console.new_app("Draw the figures: PNG and PDF in figures/, arrays in paper_artifacts/.")


@dataclass(frozen=True)
class Options:
    """Options of the command: the figures to make, and the experiments behind them."""

    only: tuple[str, ...] = option(
        (),
        "Names of the figures to make, separated by commas; may be repeated. Default: all figures.",
        choices=NAMES,
    )
    scale: str = option("small", "Scale of the experiments: small (minutes on 2 cores) or full.")
    model: str = option(
        "", "Model: hub id, folder or packaged name. Default: minilm if installed, else tiny."
    )
    task: str = option("", "Task name. Default: sst2 if LOWRANK_DP_DATA holds it, else generated.")
    device: str = option("cpu", "Device of the experiments: cpu or cuda.")
    seed: int = option(0, "Seed of every random choice.")
    panels: bool = option(
        False, "Also save every panel as a separate file, in the folder panels inside --output."
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
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for PNG and PDF files. Default: figures, or for a result that is written "
            "under trials/, the folder of this result."
        ),
    ] = None,
    artifacts: Annotated[
        Path | None,
        typer.Option(help="Folder for saved results and tables. Default: paper_artifacts."),
    ] = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw the figures from saved results; compute nothing.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Replace saved results of another configuration. Without this option, a result of "
            "a new configuration is written to a separate folder under trials/.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Compute or load the results of the figures, draw the figures, and print a summary."""
    if "only" in given:
        words = (name.strip() for names in given["only"] for name in names.split(","))
        given["only"] = tuple(dict.fromkeys(words))
    asked = Options(**given)
    if redraw:
        _require_only_drawing(given, update)
    from rich.console import Console

    from lowrank_dp.figures.places import Place, Request

    folder = artifacts or Path("paper_artifacts")
    if redraw and not folder.is_dir():
        raise ValueError(
            f"--artifacts must be a folder of saved results for --redraw, got {str(folder)!r}: the "
            "folder paper_artifacts of a clone of the repository, or one that this command wrote"
        )
    _console.check_output(folder, "--artifacts")
    _console.check_output(output or Path("figures"))
    console = Console(stderr=True)
    request = Request(
        scale=asked.scale,
        changes=asked.changes,
        given=frozenset(given) - {"panels"},
        only=asked.only,
        folder=folder,
        own_folder=artifacts is not None,
        update=update,
        panels=asked.panels,
    )
    left_out = _without_result(folder) if redraw or asked.scale == "small" else []
    names = asked.only or [name for name in NAMES if name not in left_out]
    with contextlib.ExitStack() as stack:
        if redraw:
            places = {name: Place(None, folder) for name in names}
        else:
            places = _held_places(names, request, stack)
        summary = _make_all(places, request, output, console)
    for name in left_out if not asked.only else ():
        say(console, f"{name}: left out, since no result is saved; --scale full computes it")
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        _print(summary)


def _held_places(
    names: Sequence[str], request: Request, stack: contextlib.ExitStack
) -> dict[str, Place]:
    """Return the place of each figure; hold the results that will be computed until ``stack`` ends.

    Results are held one by one, so that other figures can be made in the same folder meanwhile.
    """
    from lowrank_dp.figures.places import place_of

    for name in names:
        place = place_of(name, request)
        if place.config is not None:
            held = _console.hold_output(place.folder, "--artifacts", f"{name}.json")
            stack.enter_context(held)
    return {name: place_of(name, request) for name in names}  # what another command may have saved


def _make_all(
    places: Mapping[str, Place], request: Request, output: Path | None, console: Console
) -> list[dict[str, Any]]:
    """Make the figures, and return their summary."""
    request.folder.mkdir(parents=True, exist_ok=True)
    (output or Path("figures")).mkdir(parents=True, exist_ok=True)
    for place in places.values():
        if place.note:
            say(console, place.note)
    summary: list[dict[str, Any]] = []
    sources: dict[Any, Any] = {}
    for name, place in places.items():
        if console.is_terminal:
            say(console, f"{name}: {'redrawing' if place.config is None else 'computing'} ...")
        started = time.perf_counter()
        entry = _make(name, place, request, output, sources, console)
        summary.append(entry | {"seconds": round(time.perf_counter() - started, 1)})
    return summary


def _require_only_drawing(given: dict[str, Any], update: bool) -> None:
    """Raise ValueError for options of a computation, which --redraw would ignore."""
    ignored = ["update"] * update + [n for n in given if n not in ("only", "panels")]
    if ignored:
        raise ValueError(
            f"--redraw and --{ignored[0]} must not both be given: --redraw draws saved results, "
            "and computes nothing"
        )


def _without_result(folder: Path) -> list[str]:
    """Return the figures with lengthy computations that have no result in ``folder``."""
    from lowrank_dp.figures import find

    return [name for name in NAMES if find(name).lengthy and not (folder / f"{name}.json").exists()]


def _make(
    name: str,
    place: Place,
    request: Request,
    output: Path | None,
    sources: dict[Any, Any],
    console: Console,
) -> dict[str, Any]:
    """Compute a figure's result if ``place`` has a config; draw and summarise the result."""
    from lowrank_dp import artifacts
    from lowrank_dp.figures import compute, find, show

    spec = find(name)
    if place.config is not None:
        if spec.plan is not None:
            say(console, f"plan: {spec.plan(place.config)}")
        computed = compute(name, place.config, sources)
        place = _checked(name, place, computed, request, console)
        place.folder.mkdir(parents=True, exist_ok=True)
        followed = {key: request.changes[key] for key in ("seed", "device") if key in spec.options}
        artifacts.save_result(computed, place.folder, name, **followed)
    result, figure = show(name, artifact_folder=place.folder)  # drawn from the saved files alone
    drawn = output or (place.folder if place.is_trial else Path("figures"))
    artifacts.save_figure(figure, drawn, name, privacy=result.privacy)
    if request.panels:
        _save_panels(name, result, drawn / "panels")
    columns, rows = spec.rows(result)
    artifacts.save_table(columns, rows, place.folder, name, caption=spec.caption)
    paths = (drawn / f"{name}.png", drawn / f"{name}.pdf", place.folder / f"{name}.json")
    return {
        "figure": name,
        "seconds": 0.0,
        "headline": spec.headline(result),
        "privacy": result.privacy,
        "ran on": getattr(result, "description", ""),
        "files": [str(path) for path in paths],
    }


def _checked(name: str, place: Place, result: Any, request: Request, console: Console) -> Place:
    """Return ``place``, or a place under trials/ if the saved result has other models or data."""
    from lowrank_dp.figures.places import replaces_other_data, trial_of

    if place.is_trial or request.update:
        return place
    other = replaces_other_data(name, result, place.folder)
    if not other:
        return place
    trial = trial_of(name, place.config, request, f"{place.folder / name}.json holds {other}")
    say(console, trial.note)
    return trial


def _save_panels(name: str, result: Any, folder: Path) -> None:
    """Save each panel of a figure as a separate file ``NAME_LETTER``."""
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
