"""``python -m lowrank_dp.plan``: predict the effect of noise on a private run, before the run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp._rounding import rounded_down, rounded_up
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import in_sections, print_table, say, without_common_parts
from lowrank_dp.plan.request import Request

if TYPE_CHECKING:
    from rich.console import Console

    from lowrank_dp.plan import Gap, Plan
    from lowrank_dp.plan.making import Point

app = _console.new_app("Noise, visible rank, alignment and step costs of a private run, predicted.")


@app.command()
@_console.options_of(Request)
def main(
    given: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan a private run from public text, without spending privacy.

    The command takes the options of the run, and the options of the plan's own measurements.
    """
    request = Request(**given)
    from rich.console import Console

    from lowrank_dp.artifacts.jsonable import to_jsonable
    from lowrank_dp.plan import make_plan

    plan = make_plan(request.run, request.measurement)
    if as_json:
        print(json.dumps(to_jsonable(plan) | _derived(plan), indent=1, allow_nan=False))
    else:
        _print(Console(), plan)


def _derived(plan: Plan) -> dict[str, Any]:
    """Return derived numbers of a plan as JSON types; an infinite number becomes None."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "steps": [
            {
                "when": point.when,
                "clean_gain": finite(point.gain.clean_gain),
                "noisy_gain": finite(point.gain.noisy_gain),
                "noise_cost": finite(point.gain.noise_cost),
            }
            for point in plan.points
        ],
        "saved": plan.gap.saved if plan.gap else None,
        "rate_is_inside": {trial.name: trial.is_inside for trial in plan.gap.trials}
        if plan.gap
        else None,
    }


def _print(console: Console, plan: Plan) -> None:
    from lowrank_dp.mechanism import NO_RECORDS

    for line in (
        f"plan: {plan.description}",
        f"privacy of the run: {plan.statement}",
        f"noise: multiplier sigma {rounded_down(plan.noise_multiplier)} for {plan.num_units:,} "
        f"units at rate {rounded_up(plan.sample_rate)}; standard deviation "
        f"{rounded_down(plan.noise_std)} on an entry of the gradient sum, "
        f"{rounded_down(plan.noise_std_of_mean, 3)} on an entry of the mean gradient",
        "",
    ):
        say(console, line)
    _print_layers(console, plan.points)
    _print_schemes(console, plan.points)
    _print_steps(console, plan.points)
    if plan.gap is not None:
        is_public = plan.privacy == NO_RECORDS
        _print_gap(console, plan.gap, "public text" if is_public else "the task's own records")
        if is_public and plan.gap.ratio is not None:
            say(
                console,
                "This ratio holds for tasks that are learned as fast as the public text. The "
                "figure plan_gap compares predictions from generated text, and from a task's own "
                "records, with measured ratios.",
            )
    say(console, plan.privacy)


def _print_layers(console: Console, points: Sequence[Point]) -> None:
    """Print the visible rank of every matrix at every point."""
    names, pattern = without_common_parts([layer.name for layer in points[0].layers])
    rows = []
    for i, layer in enumerate(points[0].layers):
        cells = ["×".join(map(str, layer.shape)), f"{layer.edge:.1f}"]
        for point in points:
            here = point.layers[i]
            cells += [f"{here.top_clean:.1f}", str(here.visible_rank)]
        rows.append(cells)
    columns = ["matrix", "shape", "edge"]
    for i, _ in enumerate(points):
        columns += [f"top {'abc'[i]}", f"rank {'abc'[i]}"]
    say(
        console,
        "Columns rank: visible rank, the number of singular values of the gradient sum above the "
        "edge of the noise. Columns top: largest singular value without noise. "
        f"{_letters(points)}.",
    )
    if pattern:
        say(console, f"matrices: {pattern}")
    print_table(console, columns, in_sections(names, rows))


def _print_schemes(console: Console, points: Sequence[Point]) -> None:
    """Print the predicted alignment of every scheme at every point."""
    say(console, "")
    say(
        console,
        "Predicted cosine with the clean gradient: with all matrices as one vector, and as a mean "
        f"over matrices. {_letters(points)}.",
    )
    columns = ["scheme"]
    for i, _ in enumerate(points):
        columns += [f"one vector {'abc'[i]}", f"mean {'abc'[i]}"]
    rows = []
    for same in zip(*(point.schemes for point in points), strict=True):
        cells = [f"{value:.3f}" for one in same for value in (one.one_vector, one.mean)]
        rows.append([same[0].scheme, *cells])
    print_table(console, columns, rows)


def _print_steps(console: Console, points: Sequence[Point]) -> None:
    """Print the loss decrease of the best step along the clean gradient, with and without noise."""
    say(console, "")
    say(
        console,
        "Cost of noise in one step along the mean clipped gradient d, by the quadratic model. Best "
        "decrease of the loss (gain): (g.d)^2 / (2 d'Hd) without noise, "
        "(g.d)^2 / (2 (d'Hd + s^2 tr H)) with noise. Cost: the ratio 1 + s^2 tr H / d'Hd. "
        "H: Gauss-Newton matrix; s: standard deviation of the noise on an entry of the mean.",
    )
    print_table(
        console,
        ["point", "loss", "gain clean", "gain noisy", "d'Hd", "s^2 tr H", "cost"],
        [
            [
                point.when,
                f"{point.loss:.3f}",
                f"{point.gain.clean_gain:.3g}",
                f"{point.gain.noisy_gain:.3g}",
                f"{point.gain.curvature:.2g}",
                f"{point.gain.noise_std**2 * point.gain.trace:.2g}",
                f"{point.gain.noise_cost:.3f}",
            ]
            for point in points
        ],
    )


def _print_gap(console: Console, gap: Gap, text: str) -> None:
    """Print the predicted gap in steps, and the share of steps that a perfect denoiser saves."""
    say(console, "")
    steps = len(gap.trials[0].scores) - 1
    say(
        console,
        f"Gap in steps, predicted by trainings of {steps} steps on {text} with the noise of "
        "the run. Ratio: number of steps with noise / number of steps without noise to the same "
        "held-out score. Score: mean of 1 - p(label) for classes, else the loss.",
    )
    print_table(
        console,
        ["training", "best rate", f"score at {steps // 2}", f"at {steps}", "lowest"],
        [
            [
                trial.name,
                f"{trial.rate:.3g}",
                f"{trial.scores[steps // 2]:.3f}",
                f"{trial.scores[-1]:.3f}",
                f"{min(trial.scores):.3f}",
            ]
            for trial in gap.trials
        ],
    )
    for trial in gap.trials:
        if not trial.is_inside:
            say(
                console,
                f"{trial.name}: best rate at the end of its grid {min(trial.rates):.3g} to "
                f"{max(trial.rates):.3g}: the ratio may be off",
            )
    if gap.adaptivity is not None:
        say(
            console,
            f"adaptivity: without noise, SGD takes {gap.adaptivity:.2f} times the steps of Adam",
        )
    if gap.ratio is None:
        from lowrank_dp.plan.trials import MIN_GAIN

        noisy, clean = gap.trials[-2:]
        say(
            console,
            f"no ratio: the score fell by {noisy.gain:.3f} with noise and by {clean.gain:.3f} "
            f"without noise; both must fall by at least {MIN_GAIN:g}: increase --trial-steps",
        )
        return
    say(
        console,
        f"ratio: {gap.ratio:.2f}; a perfect denoiser could save {gap.saved:.0%} of the steps "
        "(1 - 1 / ratio)",
    )


def _letters(points: Sequence[Point]) -> str:
    return "; ".join(f"{'abc'[i]}: {point.when}" for i, point in enumerate(points))
