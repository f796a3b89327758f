r"""Membership scores: arrays in, one float64 value a record out, higher = more likely a member.

Notation: ``loss`` is the cross-entropy of the true class, or the mean token negative
log-likelihood; ``phi`` is the logit confidence ln(p / (1 - p)) of p = exp(-loss). Shapes:
``loss`` and ``phi`` are (N,), ``shadow_*`` are (num_shadows, N), ``shadow_is_member[s, i]`` says
whether shadow s was trained on record i, ``population_*`` are over Z records that are in no model.
Functions of one value a record (`loss_score`, `logit_confidence`,
`logit_confidence_from_logits`, `calibrated_score`, `quantile_score`) work entry by entry: they also
take arrays with more axes, such as the (num_shadows, N) losses of shadows, and return that shape.
For one record: ``token_logits`` (T, V) with row t scoring ``token_ids[t]``, so already shifted.

Everything is computed in logs. Standard deviations divide by the count (ddof 0). Input that is
not finite, empty, or of the wrong shape raises ``ValueError`` with the argument's name and the
records at fault; nothing is dropped.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_dp._validate import choice, fail, positive, real
from lowrank_dp.mia._arrays import Array, Mask, membership, real_array

# A spread below this is rounding, not information: one shadow a group, or all of them equal.
_MIN_STD = 1e-12
# Where the square of Min-K%++'s sigma underflows.
MIN_SIGMA = float(np.sqrt(np.finfo(np.float64).tiny))
# Numbers handled at a time: 256 KiB in float64, which stays in the cache.
_CHUNK = 2**15


# --- one model -------------------------------------------------------------------------------


def loss_score(loss: ArrayLike) -> Array:
    """-loss, of the shape of ``loss``, (N,) or more axes (Yeom et al. 2018, arXiv 1709.01604).

    >>> loss_score([0.5, 2.0])
    array([-0.5, -2. ])
    """
    return -real_array("loss", loss, or_more=True)


def logit_confidence(loss: ArrayLike) -> Array:
    """The logit ln(p / (1 - p)) of p = exp(-loss) (Carlini et al. 2022, arXiv 2112.03570).

    ``loss`` >= 0 is (N,) or has more axes; the result has its shape. A loss
    rounded to exactly 0 no longer tells its confidence: it gets the largest phi of all, 708.4.
    `logit_confidence_from_logits` keeps what rounding lost.

    >>> logit_confidence([1e4])
    array([-10000.])
    """
    loss = np.maximum(real_array("loss", loss, low=0, or_more=True), np.finfo(np.float64).tiny)
    return -loss - np.log(-np.expm1(-loss))


def logit_confidence_from_logits(logits: ArrayLike, labels: ArrayLike) -> Array:
    """The same from logits, z_y - ln sum_{j != y} exp z_j: exact however large they are.

    ``logits`` is (N, C) with C >= 2, ``labels`` (N,) integers in [0, C); the result is (N,). With
    more axes, the classes are on the last axis of ``logits``, and ``labels`` has the others.

    >>> logit_confidence_from_logits([[1e4, -1e4], [1e4, 0.0]], [0, 1])
    array([ 20000., -10000.])
    """
    z = real_array("logits", logits, ndim=2, or_more=True)
    if z.shape[-1] < 2:
        fail("logits", "an array of shape (N, C) with at least 2 classes", z.shape)
    own = _indices("labels", labels, z.shape)[..., None]
    true = np.take_along_axis(z, own, axis=-1)
    others = z.copy()
    np.put_along_axis(others, own, -np.inf, axis=-1)
    top = others.max(axis=-1, keepdims=True)
    return ((true - top) - np.log(np.exp(others - top).sum(axis=-1, keepdims=True)))[..., 0]


def calibrated_score(loss: ArrayLike, reference_loss: ArrayLike) -> Array:
    """reference_loss - loss, of their shape (Watson et al. 2022, arXiv 2111.08440).

    Both are (N,), or of one shape with more axes. ``reference_loss`` is the
    loss of the base model, or the mean over shadows without the record.
    """
    loss = real_array("loss", loss, or_more=True)
    return real_array("reference_loss", reference_loss, shape=loss.shape) - loss


def quantile_score(phi: ArrayLike, predicted_quantile: ArrayLike) -> Array:
    """The excess phi - q(x), of their shape (Bertran et al. 2023, arXiv 2307.03694).

    Both are (N,), or of one shape with more axes. ``predicted_quantile`` is
    the non-members' quantile of phi that a regression on public records predicts from each
    record's features.
    """
    phi = real_array("phi", phi, or_more=True)
    return phi - real_array("predicted_quantile", predicted_quantile, shape=phi.shape)


def zlib_score(loss: ArrayLike, text: str | Sequence[str]) -> float | Array:
    """-loss / (length of the compressed text in bytes) (Carlini et al. 2021, arXiv 2012.07805).

    One loss and one text give a float, N of each give (N,). ``text`` is what was scored, in
    UTF-8: without a tail that the model never saw.

    >>> zlib_score(2.0, "aaaaaaaa")
    -0.18181818181818182
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(entry, str) and entry for entry in texts):
        fail("text", "a non-empty string or a sequence of them", text)
    losses = real_array("loss", loss, shape=() if isinstance(text, str) else (len(texts),))
    score = -losses / [len(zlib.compress(entry.encode())) for entry in texts]
    return float(score[0]) if isinstance(text, str) else score


# --- one model, token by token ---------------------------------------------------------------


def min_k(token_log_probs: ArrayLike, *, fraction: float = 0.2) -> float:
    """Min-K%: the mean of the lowest log-probabilities of a text (Shi et al. 2024, 2310.16789).

    ``token_log_probs`` (T,) with T >= 1; ``fraction`` in (0, 1] of its tokens count, at least one.

    >>> min_k([-1.0, -4.0, -2.0], fraction=0.7)
    -3.0
    """
    return _mean_of_lowest(real_array("token_log_probs", token_log_probs), fraction)


def min_k_plus_plus(
    token_logits: ArrayLike, token_ids: ArrayLike, *, fraction: float = 0.2
) -> float:
    """Min-K%++: Min-K% of (ln p - mu) / sigma (Zhang et al. 2025, arXiv 2404.02936).

    mu and sigma are the mean and standard deviation of ln p over the vocabulary, weighted by p.
    ``token_logits`` (T, V), ``token_ids`` (T,); a logit of -inf bars a token, and counts nothing.
    """
    # moments of the logits, which are ln p but for the origin
    logits, own = _below_top("token_logits", token_logits, token_ids)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    logits = np.where(p > 0, logits, 0.0)  # 0 ln 0 = 0
    mean = (p * logits).sum(axis=1)
    variance = (p * (logits - mean[:, None]) ** 2).sum(axis=1)
    sigma = np.maximum(np.sqrt(variance), MIN_SIGMA)
    return _mean_of_lowest((own - mean) / sigma, fraction)


def error_zone(
    token_logits: ArrayLike, reference_token_logits: ArrayLike, token_ids: ArrayLike
) -> float:
    """EZ: of the change where the model still errs, the share that is upward (arXiv 2601.12104).

    With d = ln p - ln p_reference of the true tokens that are not the model's most likely ones:
    up / (up + down) in [0, 1], up = sum max(d, 0), down = sum max(-d, 0). It orders texts as
    up / down does, and has a value where no token got worse. Without an error, or a change,
    nothing is known: 0.5. Both logits are (T, V), ``token_ids`` is (T,).
    """
    logits, own = _below_top("token_logits", token_logits, token_ids)
    reference, own_reference = _below_top(
        "reference_token_logits", reference_token_logits, token_ids
    )
    if reference.shape != logits.shape:
        fail(
            "reference_token_logits",
            f"of the shape of token_logits, {logits.shape}",
            f"shape {reference.shape}",
        )
    log_p, log_reference = (
        true - np.log(np.exp(row).sum(axis=1))
        for true, row in ((own, logits), (own_reference, reference))
    )
    return upward_share((log_p - log_reference)[own < 0])  # where another token is likelier


def upward_share(change: Array) -> float:
    """Share of the changes (T,) that is upward, as in `error_zone`; 0.5 if nothing changes."""
    up, total = np.maximum(change, 0).sum(), np.abs(change).sum()
    return float(up / total) if total > 0 else 0.5


# --- shadow models: LiRA ---------------------------------------------------------------------


def lira_online(
    phi: ArrayLike,
    shadow_phi: ArrayLike,
    shadow_is_member: ArrayLike,
    *,
    location: str = "mean",
    fixed_variance: bool = True,
) -> Array:
    """LiRA: ln N(phi; mu_in, s_in) - ln N(phi; mu_out, s_out), shape (N,) (arXiv 2112.03570).

    Each record needs a shadow with it and one without it. ``location``, "mean" or "median", is
    mu of the record's group. With ``fixed_variance`` s_in is the standard deviation of all the IN
    residuals phi - mu_in pooled over records, and s_out of all the OUT ones (better below some 64
    shadows); without it each group has its own, about its mean, and needs 2 shadows. A standard
    deviation below 1e-12 counts as 1e-12.
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
    """LiRA's z = (phi - mu_out) / s_out, shape (N,), from the shadows without the record.

    The one-sided test of the paper, ranked by z itself, for its p-value underflows. The arguments
    are those of `lira_online`; only OUT shadows are needed.
    """
    phi, values, member = _shadows("phi", phi, shadow_phi, shadow_is_member)
    mu_out, s_out = _group_moments(values, ~member, "OUT", location, fixed_variance)
    return (phi - mu_out) / s_out


def _group_moments(
    values: Array, group: Mask, name: str, location: str, fixed_variance: bool
) -> tuple[Array, Array]:
    """Location and standard deviation, (N,) each, of the ``values`` (S, N) inside the group."""
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
        # about the residuals' mean, which is 0 unless the location is the median
        total = count.sum()
        variance = squares.sum() / total - ((count * (mean - centre)).sum() / total) ** 2
    else:
        variance = squares / count
    return centre, np.maximum(np.sqrt(np.maximum(variance, 0)), _MIN_STD)


def _median(x: Array, group: Mask, count: NDArray[np.int64]) -> Array:
    """Median down each column of ``x`` (S, n) over the rows in the group."""
    ordered = np.ascontiguousarray(np.where(group, x, np.inf).T)
    ordered.sort(axis=1)
    rows = np.arange(len(ordered))
    return (ordered[rows, (count - 1) // 2] + ordered[rows, count // 2]) / 2


# --- shadow models: RMIA ---------------------------------------------------------------------


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
    """Share, in [0, 1], of population records z with r(x) / r(z) >= gamma (arXiv 2312.03262).

    r = p_target / p with p = ((1 + a) p_out + 1 - a) / 2, where p_out is the mean of exp(-loss)
    over the shadows without the record, for z over all of them; so p_in = a p_out + 1 - a, with
    ``a`` in [0, 1]. ``population_loss`` is (Z,), ``population_shadow_loss`` (num_shadows, Z).
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
    """As `rmia_offline` with p(x) = (p_in + p_out) / 2 and p(z) the mean over all shadows.

    Each record needs a shadow with it and one without it.
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
    """The ln r(x) of `rmia_offline`, shape (N,): its order without ties, and no population."""
    loss, values, member = _shadows("loss", loss, shadow_loss, shadow_is_member)
    log_mean = _log_mean_probability(values, ~member, "OUT")
    return -loss - _offline_log_probability(log_mean, a)


def _log_mean_probability(loss: Array, group: Mask, name: str) -> Array:
    """Log of the mean of exp(-loss) down each column of ``loss`` (S, N) over the group."""
    count, result = _counts(group, name), np.empty(loss.shape[1])
    for columns in _chunks(loss):
        x = np.where(group[:, columns], -loss[:, columns], -np.inf)
        top = x.max(axis=0)
        x -= top
        result[columns] = top + np.log(np.exp(x, out=x).sum(axis=0) / count[columns])
    return result


def _offline_log_probability(log_mean: Array, a: float) -> Array:
    """Log of ((1 + a) p_out + 1 - a) / 2."""
    a = real("a", a, low=0, high=1)
    with np.errstate(divide="ignore"):  # a = 1 leaves p_out alone
        return np.logaddexp(np.log1p(a) + log_mean, np.log1p(-a)) - np.log(2)


def _population(loss: ArrayLike, shadow_loss: ArrayLike, records: ArrayLike) -> tuple[Array, Array]:
    """The target's loss on the population, and ln of the shadows' mean probability, (Z,) each."""
    loss = real_array("population_loss", loss)
    values = real_array(
        "population_shadow_loss", shadow_loss, shape=(np.shape(records)[0], len(loss))
    )
    everyone = np.broadcast_to(np.True_, values.shape)
    return loss, _log_mean_probability(values, everyone, "population")


def _share_beaten(ratio_x: Array, ratio_z: Array, gamma: float) -> Array:
    """Share of z with ln r(x) - ln r(z) >= ln gamma, by a search in the sorted population."""
    bar = ratio_x - np.log(positive("gamma", gamma))
    return np.searchsorted(np.sort(ratio_z), bar, side="right") / len(ratio_z)


# --- arguments -------------------------------------------------------------------------------


def _shadows(
    name: str, target: ArrayLike, shadow: ArrayLike, is_member: ArrayLike
) -> tuple[Array, Array, Mask]:
    """The target's values (N,), the shadows' (S, N) and who was trained on what (S, N)."""
    values = real_array(name, target)
    shadows = real_array(f"shadow_{name}", shadow, ndim=2)
    if shadows.shape[1] != len(values):
        fail(f"shadow_{name}", f"of shape (num_shadows, {len(values)})", f"shape {shadows.shape}")
    return values, shadows, membership("shadow_is_member", is_member, shadows.shape)


def _counts(group: Mask, name: str, *, at_least: int = 1) -> NDArray[np.int64]:
    """Number of shadows in the group, record by record."""
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
    """Slices over the columns of ``values`` (S, N) that keep the working set small."""
    step = max(1, _CHUNK // len(values))
    return (slice(start, start + step) for start in range(0, values.shape[1], step))


def _indices(name: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.intp]:
    """``value`` as integers in [0, shape[-1]), of shape ``shape[:-1]``."""
    array, (*entries, top) = np.asarray(value), shape
    if array.dtype.kind not in "iu" or array.shape != tuple(entries):
        fail(name, f"integers of shape {tuple(entries)}", f"{array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() >= top:
        fail(name, f"integers in [0, {top})", f"some from {array.min()} to {array.max()}")
    return array.astype(np.intp)


def _below_top(name: str, token_logits: ArrayLike, token_ids: ArrayLike) -> tuple[Array, Array]:
    """Logits less the largest of their row (T, V), and those of the true tokens (T,)."""
    logits = real_array(name, token_logits, ndim=2, finite=False)
    true = np.arange(len(logits)), _indices("token_ids", token_ids, logits.shape)
    top = logits.max(axis=1, keepdims=True)
    if not (np.isfinite(top).all() and np.isfinite(logits[true]).all()):
        fail(name, "below infinity, and finite at token_ids", "infinity")
    return logits - top, logits[true] - top[:, 0]


def _mean_of_lowest(values: Array, fraction: float) -> float:
    fraction = real("fraction", fraction, low=0, high=1, low_open=True)
    k = max(1, int(fraction * len(values)))
    return float(np.partition(values, k - 1)[:k].mean())
