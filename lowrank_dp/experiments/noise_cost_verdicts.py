"""Verdicts on the cost of noise in one step, computed from the arrays of ``noise_cost``.

A prediction states a quantity and a range. The quantity is averaged over noise draws, and the 95%
t-interval is taken over warm-ups. The means of different warm-ups also differ by their draws, so
the interval covers both sources of variation. A prediction is supported if the whole interval is
inside the range, contradicted if the whole interval is outside, and undecided otherwise.
NON-PRIVATE throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.experiments.noise_cost import Result, predicted_gain
from lowrank_dp.experiments.noise_cost_directions import DIRECTIONS, LAYER_DIRECTIONS
from lowrank_dp.experiments.scheme_scores import Array

LIMIT = 100.0  # factors are clipped to [1 / LIMIT, LIMIT], because a gain of 0 has no logarithm
MAX_RATIO = 4.0  # largest ratio of a usable gain to the predicted gain
MARGIN = 1.1  # a factor below MARGIN counts as no gain


def log_factor(numerator: Array, denominator: Array) -> Array:
    """Return the log of the ratio of two mean gains (...), clipped to +-log ``LIMIT``.

    Both arguments are gains (..., N) over noise draws. Draws that are NaN are left out of the
    means. The result is NaN if no draw is left, or if the mean of the denominator is not above 0.
    """
    over, under = _mean(numerator), _mean(denominator)
    factor = np.clip(over / np.where(under > 0, under, np.nan), 1 / LIMIT, LIMIT)
    return np.log(factor)


def _mean(values: Array) -> Array:
    """Return the mean over the last axis without NaN; NaN if all values are NaN."""
    count = np.isfinite(values).sum(-1)
    return np.nansum(values, axis=-1) / np.where(count > 0, count, np.nan)


def _over_settings(values: Array) -> Array:
    """Return the means over stages of each case and warm-up (K * W,), from values (K, 3, W).

    A stage of a case with NaN in some warm-up is left out in every warm-up, so that the means of a
    case cover the same stages. If no stage of a case is left, its means are NaN.
    """
    whole = np.where(np.isnan(values).any(-1, keepdims=True), np.nan, values)
    return _mean(whole.swapaxes(1, 2)).ravel()


def usable_gain(gain: Array, slope: Array, curvature: Array) -> Array:
    """Return the gains (...), with NaN where the quadratic model does not hold.

    If the curvature is below 0, the model has no best step, and the line search has no scale. A
    gain of more than ``MAX_RATIO`` times the predicted gain was found far from the predicted step,
    where the control variate of the line search does not hold. A direction of zeros has gain 0.
    """
    far = gain > MAX_RATIO * np.nan_to_num(predicted_gain(slope, curvature))
    return np.where((curvature < 0) | far, np.nan, gain)


def _gains(result: Result) -> Array:
    return usable_gain(result.gain, result.slope, result.curvature)


def gain_factors(result: Result) -> Array:
    """Return logs (K, 3, W, D) of the gain along each direction / gain along the noisy sum."""
    gains = _gains(result)
    noisy = result.along("noisy", gains)
    return np.stack([log_factor(result.along(name, gains), noisy) for name in DIRECTIONS], axis=-1)


def layer_factors(result: Result) -> Array:
    """Return log factors (K, 3, W, D') of gains along single matrices, all matrices together.

    The gains of the matrices are added, and divided by the added gains along the noisy sum. A
    matrix is left out if one of its two gains is not usable.
    """
    gains = usable_gain(result.layer_gain, result.layer_slope, result.layer_curvature)
    noisy = gains[..., LAYER_DIRECTIONS.index("noisy")]  # (K, 3, W, N', L)
    factors = []
    for j in range(gains.shape[-1]):
        both = np.isfinite(noisy) & np.isfinite(gains[..., j])
        over, under = (np.where(both, one, 0.0).sum(-1) for one in (gains[..., j], noisy))
        factors.append(log_factor(over, under))
    return np.stack(factors, axis=-1)


def curvature_ratios(result: Result) -> Array:
    """Return ratios (K, 3, W, D) of the mean curvature along each direction to the clean sum's."""
    curvature = result.curvature.mean(-2)
    return curvature / curvature[..., [DIRECTIONS.index("clean")]]


@dataclass(frozen=True)
class Prediction:
    """Prediction that ``quantity`` of a result lies between ``low`` and ``high``.

    ``quantity`` returns an array (K, 3, W). If ``is_log``, the array holds logarithms of a factor,
    and ``low`` and ``high`` are limits of the factor itself.
    """

    text: str
    quantity: Callable[[Result], Array]
    low: float
    high: float
    is_log: bool = True


@dataclass(frozen=True)
class Judgement:
    """Mean of a prediction's quantity, its 95% interval, and the verdict.

    ``verdict`` is "supported", "contradicted" or "undecided".
    """

    mean: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        return f"{_with_ends(self.mean, self.low, self.high)}: {self.verdict}"


def _factor(one: str, other: str) -> Callable[[Result], Array]:
    def quantity(result: Result) -> Array:
        gains = _gains(result)
        return log_factor(result.along(one, gains), result.along(other, gains))

    return quantity


def _norm_effect(result: Result) -> Array:
    """Return the log of the gain by noisy layer norms, mean over restored and noisy directions."""
    restored = _factor("denoise", "optimal")(result)
    noisy = _factor("noisy", "noisy, optimal's norms")(result)
    return (restored + noisy) / 2


def _denoising_effect(result: Result) -> Array:
    """Return the log of the gain by restored layer directions, mean over both kinds of norms."""
    at_noisy = _factor("denoise", "noisy")(result)
    at_restored = _factor("optimal", "noisy, optimal's norms")(result)
    return (at_noisy + at_restored) / 2


def _prediction_error(result: Result) -> Array:
    """Return the mean absolute log of measured gain / predicted gain.

    The mean is over all draws and directions with a predicted gain. Gains that are too large and
    gains that are too small do not cancel.
    """
    predicted = result.predicted
    exists = np.isfinite(predicted)
    factor = np.where(exists, result.gain, 1.0) / np.where(exists, predicted, 1.0)
    logs = np.abs(np.log(np.clip(factor, 1 / LIMIT, LIMIT)))
    count = exists.sum(axis=(-2, -1))
    return logs.sum(axis=(-2, -1)) / np.where(count > 0, count, np.nan)


PREDICTIONS = (
    Prediction(
        "(i) restoring (optimal, zeroed) gains nothing over the noisy sum at the best step",
        _factor("optimal, zeroed", "noisy"),
        0.0,
        MARGIN,
    ),
    Prediction(
        "(ii) norm correction gains: noisy against restored norms of the layers",
        _norm_effect,
        1.0,
        np.inf,
    ),
    Prediction(
        "(ii) denoising gains nothing: restored against noisy layers of equal norms",
        _denoising_effect,
        0.0,
        MARGIN,
    ),
    Prediction(
        "(ii) the clean sum gains by the noisy norms of the layers, too",
        _factor("clean, noisy norms", "clean"),
        1.0,
        np.inf,
    ),
    Prediction(
        "(iii) flattening the noisy sum's spectrum gains while noise is small",
        _factor("noisy, flattened", "noisy"),
        1.0,
        np.inf,
    ),
    Prediction(
        "(iii) and gains nothing where noise is large",
        _factor("loud, flattened", "loud"),
        0.0,
        MARGIN,
    ),
    Prediction(
        "curvature along the noise is less than 1/1000 of that along the clean sum",
        lambda result: curvature_ratios(result)[..., DIRECTIONS.index("noise")],
        -1e-3,
        1e-3,
        is_log=False,
    ),
    Prediction(
        "the removed part holds more descent than the clean sum",
        _factor("removed", "clean"),
        1.0,
        np.inf,
    ),
    Prediction(
        "the noisy sum loses less than a tenth against the clean sum: noise costs a step nothing",
        _factor("clean", "noisy"),
        0.0,
        MARGIN,
    ),
    Prediction(
        "the quadratic model predicts the fall that the line search finds, on average within a "
        "factor 1.5",
        _prediction_error,
        0.0,
        1.5,
    ),
)


def judge(values: Array, prediction: Prediction) -> Judgement:
    """Judge a prediction by independent values of its quantity (W,), 2 or more."""
    mean, half = mean_and_interval(values)
    ends = np.array([mean, mean - half, mean + half])
    middle, low, high = np.exp(ends) if prediction.is_log else ends
    if prediction.low <= low and high <= prediction.high:
        verdict = "supported"
    elif high < prediction.low or low > prediction.high:
        verdict = "contradicted"
    else:
        verdict = "undecided"
    return Judgement(float(middle), float(low), float(high), verdict)


def verdicts(result: Result, prediction: Prediction) -> tuple[list[list[Judgement]], Judgement]:
    """Judge a prediction for each case and stage (K, 3), and for all cases and stages together.

    The joint judgement takes the mean over stages of each case and warm-up as one value, because
    the stages of a warm-up are not independent. A stage of a case with NaN in some warm-up is left
    out.
    """
    values = prediction.quantity(result)
    each = [[judge(stage, prediction) for stage in case] for case in values]
    return each, judge(_over_settings(values), prediction)


def headline(result: Result) -> Mapping[str, str]:
    """Summarise each prediction: the joint verdict, and the number of each verdict."""
    lines = {}
    for prediction in PREDICTIONS:
        each, together = verdicts(result, prediction)
        found = [one.verdict for case in each for one in case]
        counts = ", ".join(
            f"{found.count(word)} {word}" for word in ("supported", "contradicted", "undecided")
        )
        lines[prediction.text] = f"{together}; by setting and stage: {counts}"
    return lines


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate verdicts, losses, gains, curvatures and cosines for each case and stage.

    Gains are relative to the gain along the noisy sum, and curvatures are relative to the curvature
    along the clean sum.
    """
    columns = ["quantity"]
    columns += [f"{case.label}, {stage}" for case in result.config.cases for stage in result.stages]
    columns.append("over all settings")
    rows = []
    for prediction in PREDICTIONS:
        each, together = verdicts(result, prediction)
        rows.append([prediction.text, *(str(one) for case in each for one in case), str(together)])
    rows += [
        _row("held-out loss, nats", result.loss, "{:.3f}"),
        _row("matrices with a value above the edge", result.above.mean(-1), "{:.1f}"),
        _row("gain along the noisy sum, nats", result.along("noisy").mean(-1), "{:.2g}"),
    ]
    gains, curvatures = gain_factors(result), curvature_ratios(result)
    cosines = result.cosine.mean(-2)
    for j, name in enumerate(DIRECTIONS):
        if name != "noisy":
            rows.append(_interval_row(f"gain / noisy sum's: {name}", gains[..., j]))
    for j, name in enumerate(DIRECTIONS):
        rows.append(_row(f"curvature / clean sum's: {name}", curvatures[..., j], "{:.2g}"))
    for j, name in enumerate(DIRECTIONS):
        rows.append(_row(f"cosine with the clean sum: {name}", cosines[..., j], "{:.3f}"))
    single = layer_factors(result)
    for j, name in enumerate(LAYER_DIRECTIONS):
        if name != "noisy":
            rows.append(_interval_row(f"one matrix, gain / noisy sum's: {name}", single[..., j]))
    return columns, rows


def _row(name: str, values: Array, form: str) -> list[str]:
    """Format means over warm-ups of values (K, 3, W)."""
    cells = [form.format(stage.mean()) for case in values for stage in case]
    return [name, *cells, form.format(values.mean())]


def _interval_row(name: str, logs: Array) -> list[str]:
    """Format factors with intervals, from logs (K, 3, W)."""
    cells = [_interval_cell(stage) for case in logs for stage in case]
    return [name, *cells, _interval_cell(_over_settings(logs))]


def _interval_cell(logs: Array) -> str:
    mean, half = mean_and_interval(logs)
    if np.isnan(mean):
        return "no quadratic model in some warm-up"
    return _with_ends(*np.exp([mean, mean - half, mean + half]))


def _with_ends(mean: float, low: float, high: float) -> str:
    """Format a mean and its interval; a factor that every warm-up clips is a bound."""
    for sign, bound in (("≤", 1 / LIMIT), ("≥", LIMIT)):
        if np.allclose([low, high], bound, rtol=1e-9, atol=0):
            return f"{sign} {bound:g}"
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"
