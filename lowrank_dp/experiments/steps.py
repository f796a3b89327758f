"""Claim: restored singular values save steps (arXiv 2510.01137); each arm against its ceiling.

Every arm has its own grid of learning rates, and is compared, seed by seed, with tuned DP-Adam and
with tuned DP-SGD. Training without noise bounds the steps that removing noise can save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate
from lowrank_dp._rounding import rounded_up
from lowrank_dp.engines import workers_of
from lowrank_dp.evaluation import HIGHER_IS_BETTER
from lowrank_dp.experiments import protocol, tuning
from lowrank_dp.experiments.arms import (
    ARMS,
    BASELINES,
    CEILING_OF,
    CEILINGS,
    FOLDER,
    PLAIN,
    arm_config,
    check_runs,
    check_texts,
    scored_on,
    wanted_runs,
)
from lowrank_dp.experiments.cost import measure_cost
from lowrank_dp.experiments.gap import ratio
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.experiments.steps_configs import Config
from lowrank_dp.experiments.steps_measures import (
    SHARES,
    bound,
    bound_of_share,
    faster_arms,
    gap_share,
    mean_above,
    mean_over_steps,
    seconds_to,
    steps_saved,
    steps_to,
)
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.sweep import Outcome

CAPTION = (
    "DP training by arm, each at its own learning rate, which lies inside its grid (tuning seeds "
    "and held-out training examples that are not reported). A score is that of held-out "
    "evaluation examples, the same for every seed, after every step; intervals do not cover the "
    f"choice of these examples. {protocol.GAIN} A target is a share of the gain of the weaker of "
    "tuned DP-Adam and tuned DP-SGD, and is reached at the first step whose running median reaches "
    "it; differences of few steps depend on this definition. Differences are paired by seed, with "
    "95% t-intervals; a run that does not reach the target counts as one step more than it has, "
    "which makes a difference a bound, with an open marker: ≥ if only runs of the baseline miss "
    "the target, ≤ if only runs of the arm do, and ? if both. "
    "Each interval is for one comparison, and is not widened for the number of arms; ± 0.0 means "
    "that the difference is the same in every seed. Share of the gap closed: (steps of DP - steps "
    "of the arm) / (steps of DP - steps of the faster noise-free optimizer), with a 95% interval "
    "by the jackknife, which does not exist if the gap is below one step without some seed; ≤ if "
    "only runs of the arm miss the target, and ? if runs of the other two do. Curves and grids "
    "are those of plain training and of the arms that save most. NON-PRIVATE: the noise-free arms "
    "are computed from clean gradients."
)


@dataclass(frozen=True)
class Result:
    """Curves of every arm; NaN for a run that stopped, and for an arm without a learning rate.

    ``score``, ``loss`` and ``seconds`` are (arms, seeds, steps + 1). ``restore_share``
    (arms, seeds) is the share of the steps' time that restoration takes. ``final`` holds one value
    per arm, metric and finished seed, at the last step. ``failures`` lists the reasons why runs
    stopped, and the arms without a learning rate.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    epsilon: float
    delta: float
    description: str
    criterion: str
    arms: tuple[str, ...]
    failures: tuple[str, ...]
    tuned: tuple[tuning.Tuned, ...]
    final: dict[str, dict[str, list[float]]]
    score: np.ndarray
    loss: np.ndarray
    seconds: np.ndarray
    restore_share: np.ndarray

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher ``score`` is better than a lower score."""
        return HIGHER_IS_BETTER[self.config.score]

    @property
    def budget(self) -> int:
        """Number of steps of every run."""
        return self.score.shape[-1] - 1

    def of(self, arm: str, values: np.ndarray | None = None) -> np.ndarray:
        """Return the entry of an arm in ``values`` (arms, ...); default: its scores."""
        return (self.score if values is None else values)[self.arms.index(arm)]

    def target(self, share: float = SHARES[0]) -> float:
        """Return the score at a share of the gain of the weaker baseline."""
        baselines = np.stack([self.of(arm) for arm in BASELINES])
        return protocol.target_score(baselines, share, higher_is_better=self.higher_is_better)

    def band(self, arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean curve of an arm over seeds, and the half-width of its 95% t-interval."""
        return mean_and_interval(self.of(arm))

    def saved(self, arm: str, baseline: str) -> tuple[float, float]:
        """Return :func:`steps_saved` at the first of ``SHARES``."""
        return steps_saved(self, arm, baseline, SHARES[0])

    def bound(self, arm: str, baseline: str) -> str:
        """Return :func:`bound` at the first of ``SHARES``."""
        return bound(self, arm, baseline, SHARES[0])


def plan(config: Config) -> str:
    """Describe the work of :func:`run`, with the hours on this machine, from one measured step.

    Raises ValueError for a config that cannot be run.
    """
    check(config)
    cost = measure_cost(arm_config(config.base, BASELINES[0], 1e-6, 0), FOLDER, config.num_workers)
    rates = sum(
        tuning.TYPICAL_RATES_IF_KNOWN if arm in config.starts else tuning.TYPICAL_RATES
        for arm in config.arms
    )
    tuning_runs = rates * len(config.tuning_seeds)
    reported = len(config.arms) * config.num_seeds
    workers = workers_of(config.num_workers, config.base.device)
    hours = cost.hours(tuning_runs + reported, config.base.steps, reported) / workers
    texts = f", and the texts of a reported run {cost.generation:.0f} s" if cost.generation else ""
    return (
        f"{len(config.arms)} arms, about {tuning_runs} tuning runs and "
        f"{reported} reported runs of {config.base.steps} steps; here a DP-Adam step is "
        f"{cost.step:.2f} s and an evaluation {cost.evaluation:.2f} s{texts}: about {hours:.1f} "
        f"hours with {workers} runs at a time; finished runs are not repeated"
    )


def check(config: Config) -> None:
    """Raise ValueError for a config that cannot be run."""
    for arm in config.arms:
        _validate.choice("arm", arm, ARMS)
    if missing := [arm for arm in PLAIN if arm not in config.arms]:
        raise ValueError(f"arms must include the baselines and the ceilings, got no {missing[0]!r}")
    if unknown := [arm for arm in config.starts if arm not in config.arms]:
        raise ValueError(f"starts must name arms of the experiment, got {unknown[0]!r}")
    check_runs(config.base, config)
    check_texts(config.base)


def run(config: Config, folder: str | Path = FOLDER) -> Result:
    """Tune and train every arm; a run that is finished in ``folder`` is not repeated.

    Raises ValueError for a config that cannot be run, or if a baseline or a ceiling has no learning
    rate.
    """
    check(config)
    config_of = partial(arm_config, config.base)
    tuned, stopped = tuning.tune_by_sweep(
        {arm: config.start(arm) for arm in config.arms},
        partial(config_of, holdout=config.tuning_holdout),
        config.tuning_seeds,
        config.score,
        folder,
        config.num_workers,
        known=config.starts,
    )
    failures = [*stopped, *(found.failure for found in tuned.values() if found.failure)]
    for arm in PLAIN:
        if tuned[arm].failure:
            raise ValueError(tuned[arm].failure)
    wanted = wanted_runs(tuned, config.num_seeds, config_of)
    outcomes = tuning.train_all(wanted, folder, config.num_workers)
    return _collect(config, tuned, failures, outcomes)


def _collect(
    config: Config,
    tuned: dict[str, tuning.Tuned],
    failures: list[str],
    outcomes: dict[tuple[str, int], Outcome],
) -> Result:
    private = [outcomes[BASELINES[0], seed] for seed in range(config.num_seeds)]
    done = [outcome.result for outcome in private if outcome.result is not None]
    if not done:
        raise ValueError(f"every run of {BASELINES[0]} stopped: {private[0].error}")
    failures += [tuning.describe_failure(arm, o) for (arm, _), o in outcomes.items() if o.error]
    statements: dict[str, str] = {}
    for (arm, _), outcome in outcomes.items():
        if outcome.result is not None:
            statements.setdefault(arm, outcome.result.privacy)
    final: dict[str, dict[str, list[float]]] = {}
    for arm in config.arms:
        results = [o.result for (name, _), o in outcomes.items() if name == arm]
        last = [result.curve[-1] for result in results if result is not None]
        names = [name for name in (last[0] if last else ()) if name in HIGHER_IS_BETTER]
        final[arm] = {name: [entry[name] for entry in last] for name in names}
    stack = partial(tuning.stack, outcomes, config.arms, config.num_seeds, config.base.steps)
    seconds = stack("seconds")
    return Result(
        config=config,
        privacy=privacy_of_arms(statements),
        epsilon=float(done[0].epsilon or np.inf),
        delta=done[0].delta,
        description=f"{done[0].description}; {scored_on(config.base)}",
        criterion=tuning.criterion(config.score),
        arms=config.arms,
        failures=tuple(failures),
        tuned=tuple(tuned[arm] for arm in config.arms),
        final=final,
        score=stack(config.score),
        loss=stack("loss"),
        seconds=seconds,
        restore_share=stack("restore_seconds")[..., -1] / seconds[..., -1],
    )


def privacy_of_arms(statements: Mapping[str, str]) -> str:
    """State the privacy of all arms, from the statement of one run of each arm.

    An arm whose statement differs from DP-Adam's, for example by what must be public, is named with
    its own statement.
    """
    common, others = statements[BASELINES[0]], dict[str, list[str]]()
    for arm, statement in statements.items():
        if arm not in CEILINGS and statement != common:
            others.setdefault(statement, []).append(arm)
    parts = [f"{NON_PRIVATE}: {', '.join(CEILINGS)}"]
    parts += [f"{' and '.join(arms)}: {statement}" for statement, arms in others.items()]
    return "; ".join([*parts, f"every other arm: {common}"])


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each arm: score, steps, differences from both baselines, and time."""
    metric, share, others = result.config.score, SHARES[0], _other_metrics(result)
    columns = [
        "arm",
        "learning rate (grid)",
        f"final {metric}",
        *(f"final {name}" for name in others),
        f"mean {metric} over the run",
        *(f"steps to {s:.0%}, by seed" for s in SHARES),
        *(
            f"{what} {name}"
            for name in BASELINES
            for what in (
                f"steps to {share:.0%} fewer than",
                "share of the gap closed of",
                f"mean {metric} above",
                f"final {metric} above",
            )
        ),
        f"seconds to {share:.0%}, by seed",
        "restoring, share of step time",
    ]
    reached = {s: steps_to(result, s) for s in SHARES}
    seconds, rows = seconds_to(result, share), []
    for i, (arm, found) in enumerate(zip(result.arms, result.tuned, strict=True)):
        cells = [arm, _rate(found)]
        if found.chosen is None:
            rows.append(cells + [""] * (len(columns) - len(cells)))
            continue
        cells += [protocol.unless_stopped(_last(result.score[i]))]
        cells += [_final(result, arm, name) for name in others]
        cells += [protocol.unless_stopped(mean_over_steps(result.score[i]))]
        cells += [protocol.by_seed(reached[s][i], result.target(s)) for s in SHARES]
        for name in BASELINES:
            cells += (
                [""] * 4
                if name == arm
                else [
                    _saved(result, arm, name, share),
                    _share(result, arm, name, share),
                    _interval(*mean_above(result, arm, name), "+.3f"),
                    _interval(
                        *protocol.paired(_last(result.score[i]), _last(result.of(name))), "+.3f"
                    ),
                ]
            )
        cells += [
            protocol.by_seed(seconds[i], result.target(share)),
            protocol.unless_stopped(result.restore_share[i], lambda shares: f"{shares.mean():.1%}"),
        ]
        rows.append(cells)
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """Summarise the figure in a few lines."""
    share, metric = SHARES[0], result.config.score
    steps = steps_to(result, share)
    lines = {
        "epsilon of every arm with noise": f"{rounded_up(result.epsilon, 3)} at delta "
        f"{rounded_up(result.delta, 3)}",
        "learning rates chosen by": result.criterion,
        f"{metric} at {share:.0%} of the weaker baseline's gain": f"{result.target(share):.4g}",
    }
    for arm in PLAIN:
        lines[f"{arm}: steps to {share:.0%}"] = protocol.by_seed(
            result.of(arm, steps), result.target(share)
        )
    for name in _other_metrics(result):
        for arm in PLAIN:
            lines[f"{arm}: {name} after the last step"] = _final(result, arm, name)
    for baseline, ceiling in CEILING_OF.items():
        cost = ratio(result.of(baseline, steps), result.of(ceiling, steps), result.budget)
        lines[f"steps of {baseline} over those without noise (NON-PRIVATE)"] = cost.text(())
    for arm, found in zip(result.arms, result.tuned, strict=True):
        if arm not in PLAIN and found.chosen is not None:
            lines[f"{arm}: steps fewer than {' and than '.join(BASELINES)}"] = " and ".join(
                _saved(result, arm, name, share) for name in BASELINES
            )
            lines[f"{arm}: mean {metric} over the run above {' and '.join(BASELINES)}"] = (
                " and ".join(
                    _interval(*mean_above(result, arm, name), "+.3f") for name in BASELINES
                )
            )
    lines["arms faster than both, at 95% over all arms together (Bonferroni)"] = (
        "; ".join(faster_arms(result)) or "none"
    )
    return lines


def _other_metrics(result: Result) -> list[str]:
    """Return the metrics after the last step, apart from the losses and the metric of the curves.

    These are BLEU and ROUGE-L of generated texts, and a classifier's metrics beside its loss.
    """
    known = {name for values in result.final.values() for name in values} - {result.config.score}
    return [name for name, is_score in HIGHER_IS_BETTER.items() if is_score and name in known]


def _final(result: Result, arm: str, name: str) -> str:
    """Format a metric after the last step, with the number of runs that stopped."""
    values = result.final[arm].get(name, [])
    missing = [float("nan")] * (result.config.num_seeds - len(values))
    return protocol.unless_stopped(np.array([*values, *missing]))


def _last(scores: np.ndarray) -> np.ndarray:
    """Return the score after the last step: (seeds,) of (seeds, steps + 1)."""
    return scores[:, -1]


def _rate(found: tuning.Tuned) -> str:
    grid = f"{found.rates[0]:g} to {found.rates[-1]:g}"
    return f"none inside ({grid})" if found.chosen is None else f"{found.chosen:g} ({grid})"


def _interval(mean: float, half: float, form: str) -> str:
    return "a run stopped" if np.isnan(mean) else f"{mean:{form}} ± {half:{form.lstrip('+')}}"


def _saved(result: Result, arm: str, baseline: str, share: float) -> str:
    """Format :func:`steps_saved`, with a sign if runs that miss the target make it a bound."""
    if np.isnan(result.target(share)):
        return "no target"
    sign = bound(result, arm, baseline, share)
    return f"{sign} {_interval(*steps_saved(result, arm, baseline, share), '+.1f')}".lstrip()


def _share(result: Result, arm: str, baseline: str, share: float) -> str:
    if np.isnan(result.target(share)):
        return "no target"
    if any(np.isnan(result.of(name)).any() for name in (arm, baseline, *CEILINGS)):
        return "a run stopped"
    closed, half = gap_share(result, arm, baseline, share)
    if np.isnan(closed):
        return "no gap"
    sign = bound_of_share(result, arm, baseline, share)
    interval = f"± {half:.2f}" if np.isfinite(half) else "(no interval)"
    return f"{sign} {closed:.2f} {interval}".lstrip()
