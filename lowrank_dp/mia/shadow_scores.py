"""Membership scores from shadow models: LiRA and RMIA.

``phi`` and ``loss`` (N,) are of the target; ``shadow_phi`` and ``shadow_loss`` are (num_shadows,
N). ``shadow_is_member[s, i]`` states whether shadow s was trained on record i: if so, s is an IN
shadow of the record, else an OUT shadow. Each function returns (N,), higher for a member, and
raises ValueError for a bad argument.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_dp._validate import choice, fail, positive, real
from lowrank_dp.mia._arrays import Array, Mask, boolean_array, real_array

# a smaller standard deviation is rounding: one shadow per group, or shadows that are all equal
_MIN_STD = 1e-12
# number of values handled at a time: 256 KiB in float64, which fits in the CPU's cache
_CHUNK = 2**15


# --- LiRA ------------------------------------------------------------------------------------


def lira_online(
    phi: ArrayLike,
    shadow_phi: ArrayLike,
    shadow_is_member: ArrayLike,
    *,
    location: str = "mean",
    fixed_variance: bool = True,
) -> Array:
    """Compute LiRA's score ln N(phi; mu_in, s_in) - ln N(phi; mu_out, s_out), shape (N,).

    Source: Carlini et al. 2022, arXiv 2112.03570. N is the normal density with mean and standard
    deviation.

    Args:
        phi, shadow_phi, shadow_is_member: as in the module's docstring; each record needs an IN and
            an OUT shadow.
        location: mu of a record's shadows is their "mean" or their "median".
        fixed_variance: if True, s_in is the standard deviation of the residuals phi - mu_in pooled
            over all records, and s_out likewise (better below about 64 shadows). If False, each
            record has its own s_in and s_out, about the mean, and needs 2 IN and 2 OUT shadows.

    A standard deviation below 1e-12 counts as 1e-12.
    """
    phi, values, member = _shadows("phi", phi, shadow_phi, shadow_is_member)
    mu_in, s_in = _group_moments(values, member, "IN", location, fixed_variance)
    mu_out, s_out = _group_moments(values, ~member, "OUT", location, fixed_variance)
    z_in, z_out = (phi - mu_in) / s_in, (phi - mu_out) / s_out
    return (z_out**2 - z_in**2) / 2 + np.log(s_out / s_in)


def lira_offline(
    phi: ArrayLike,
    shadow_phi: ArrayLike,
    shadow_is_member: ArrayLike,
    *,
    location: str = "mean",
    fixed_variance: bool = True,
) -> Array:
    """Compute LiRA's z = (phi - mu_out) / s_out, shape (N,), from OUT shadows alone.

    This is the paper's one-sided test, ranked by z because the p-value underflows. The arguments
    are those of `lira_online`; no IN shadow is needed.
    """
    phi, values, member = _shadows("phi", phi, shadow_phi, shadow_is_member)
    mu_out, s_out = _group_moments(values, ~member, "OUT", location, fixed_variance)
    return (phi - mu_out) / s_out


def _group_moments(
    values: Array, group: Mask, name: str, location: str, fixed_variance: bool
) -> tuple[Array, Array]:
    """Compute location and standard deviation, (N,) each, of the ``values`` (S, N) in a group."""
    choice("location", location, ("mean", "median"))
    count = _counts(group, name, at_least=1 if fixed_variance else 2)
    mean, centre, squares = np.empty((3, len(count)))
    for columns in _chunks(values):
        x, weight = values[:, columns], group[:, columns].astype(np.float64)
        mean[columns] = np.einsum("sn,sn->n", x, weight) / count[columns]
        centre[columns] = (
            mean[columns] if location == "mean" else _median(x, group[:, columns], count[columns])
        )
        residual = (x - (centre if fixed_variance else mean)[columns]) * weight
        squares[columns] = np.einsum("sn,sn->n", residual, residual)
    if fixed_variance:
        # the variance is about the residuals' mean, which is 0 unless the location is the median
        total = count.sum()
        variance = squares.sum() / total - ((count * (mean - centre)).sum() / total) ** 2
    else:
        variance = squares / count
    return centre, np.maximum(np.sqrt(np.maximum(variance, 0)), _MIN_STD)


def _median(x: Array, group: Mask, count: NDArray[np.int64]) -> Array:
    """Compute the median of each column of ``x`` (S, n) over the rows in the group."""
    ordered = np.ascontiguousarray(np.where(group, x, np.inf).T)
    ordered.sort(axis=1)
    rows = np.arange(len(ordered))
    return (ordered[rows, (count - 1) // 2] + ordered[rows, count // 2]) / 2


# --- RMIA ------------------------------------------------------------------------------------


def rmia_offline(
    loss: ArrayLike,
    shadow_loss: ArrayLike,
    shadow_is_member: ArrayLike,
    population_loss: ArrayLike,
    population_shadow_loss: ArrayLike,
    *,
    a: float = 0.3,
    gamma: float = 1.0,
) -> Array:
    """Compute RMIA's share of population records z with r(x) / r(z) >= gamma (arXiv 2312.03262).

    The likelihood ratio is r = exp(-loss) / p with p = ((1 + a) p_out + 1 - a) / 2, which assumes
    p_in = a p_out + 1 - a. p_out(x) is the mean of exp(-shadow_loss) over the OUT shadows of x, and
    p_out(z) the mean over all shadows.

    Args:
        loss, shadow_loss, shadow_is_member: as in the module's docstring; each record needs an OUT
            shadow.
        population_loss, population_shadow_loss: losses (Z,) and (num_shadows, Z) of records in no
            model.
        a: slope of the assumed p_in, in [0, 1].
        gamma: threshold of r(x) / r(z), above 0.

    Returns shares in [0, 1], shape (N,).
    """
    ratio_x = rmia_log_ratio(loss, shadow_loss, shadow_is_member, a=a)
    loss_z, log_mean_z = _population(population_loss, population_shadow_loss, shadow_loss)
    return _share_beaten(ratio_x, -loss_z - _offline_log_probability(log_mean_z, a), gamma)


def rmia_online(
    loss: ArrayLike,
    shadow_loss: ArrayLike,
    shadow_is_member: ArrayLike,
    population_loss: ArrayLike,
    population_shadow_loss: ArrayLike,
    *,
    gamma: float = 1.0,
) -> Array:
    """Compute RMIA with IN shadows: `rmia_offline` with p(x) = (p_in + p_out) / 2.

    p(z) is the mean of exp(-population_shadow_loss) over all shadows. Each record needs an IN and
    an OUT shadow.
    """
    loss, values, member = _shadows("loss", loss, shadow_loss, shadow_is_member)
    log_p = np.logaddexp(
        _log_mean_probability(values, member, "IN"), _log_mean_probability(values, ~member, "OUT")
    ) - np.log(2)
    loss_z, log_mean_z = _population(population_loss, population_shadow_loss, shadow_loss)
    return _share_beaten(-loss - log_p, -loss_z - log_mean_z, gamma)


def rmia_log_ratio(
    loss: ArrayLike, shadow_loss: ArrayLike, shadow_is_member: ArrayLike, *, a: float = 0.3
) -> Array:
    """Compute ln r(x) of `rmia_offline`, shape (N,): its order without ties or a population."""
    loss, values, member = _shadows("loss", loss, shadow_loss, shadow_is_member)
    log_mean = _log_mean_probability(values, ~member, "OUT")
    return -loss - _offline_log_probability(log_mean, a)


def _log_mean_probability(loss: Array, group: Mask, name: str) -> Array:
    """Compute ln of the mean of exp(-loss) over the group, per column of ``loss`` (S, N)."""
    count, result = _counts(group, name), np.empty(loss.shape[1])
    for columns in _chunks(loss):
        x = np.where(group[:, columns], -loss[:, columns], -np.inf)
        top = x.max(axis=0)
        x -= top
        result[columns] = top + np.log(np.exp(x, out=x).sum(axis=0) / count[columns])
    return result


def _offline_log_probability(log_mean: Array, a: float) -> Array:
    """Compute ln of ((1 + a) p_out + 1 - a) / 2."""
    a = real("a", a, low=0, high=1)
    with np.errstate(divide="ignore"):  # at a = 1 the constant term is ln 0
        return np.logaddexp(np.log1p(a) + log_mean, np.log1p(-a)) - np.log(2)


def _population(loss: ArrayLike, shadow_loss: ArrayLike, records: ArrayLike) -> tuple[Array, Array]:
    """Return the target's population loss and ln of the shadows' mean probability, (Z,) each."""
    loss = real_array("population_loss", loss)
    values = real_array(
        "population_shadow_loss", shadow_loss, shape=(np.shape(records)[0], len(loss))
    )
    everyone = np.broadcast_to(np.True_, values.shape)
    return loss, _log_mean_probability(values, everyone, "population")


def _share_beaten(ratio_x: Array, ratio_z: Array, gamma: float) -> Array:
    """Compute the share of z with ln r(x) - ln r(z) >= ln gamma, by binary search."""
    bar = ratio_x - np.log(positive("gamma", gamma))
    return np.searchsorted(np.sort(ratio_z), bar, side="right") / len(ratio_z)


# --- arguments -------------------------------------------------------------------------------


def _shadows(
    name: str, target: ArrayLike, shadow: ArrayLike, is_member: ArrayLike
) -> tuple[Array, Array, Mask]:
    """Check the target's values (N,), the shadows' (S, N), and the shadows' membership (S, N)."""
    values = real_array(name, target)
    shadows = real_array(f"shadow_{name}", shadow, ndim=2)
    if shadows.shape[1] != len(values):
        fail(f"shadow_{name}", f"of shape (num_shadows, {len(values)})", f"shape {shadows.shape}")
    return values, shadows, boolean_array("shadow_is_member", is_member, shadows.shape)


def _counts(group: Mask, name: str, *, at_least: int = 1) -> NDArray[np.int64]:
    """Count the shadows in the group per record; ValueError for fewer than ``at_least``."""
    count = np.count_nonzero(group, axis=0)
    if (short := count < at_least).any():
        fix = "" if at_least == 1 else " for a variance of its own (or fixed_variance=True)"
        raise ValueError(
            f"shadow_is_member must give every record at least {at_least} {name} "
            f"shadow{fix}, got fewer for {short.sum()} of {count.size} records, "
            f"first record {np.argmax(short)}"
        )
    return count


def _chunks(values: Array) -> Iterator[slice]:
    """Yield slices over the columns of ``values`` (S, N) that keep the working set small."""
    step = max(1, _CHUNK // len(values))
    return (slice(start, start + step) for start in range(0, values.shape[1], step))
