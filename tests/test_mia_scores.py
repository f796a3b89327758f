"""Membership scores against loops and 50-digit arithmetic: values, orientation, tails, speed."""

import subprocess
import sys
import tracemalloc
import zlib

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dp.mia import scores, shadow_scores
from tests.oracles import naive_auc
from tests.tasks import case

TEXTS = ["the cat sat on the mat", "aaaaaaaaaaaaaaaaaaaaaaaa", "naïve café, 東京"]


def shadow_world(num_shadows, num_records, seed, effect=2.0):
    """Confidences of a target and its shadows, ``effect`` higher on what a model has seen."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(0, 3, num_records)
    # every record has two shadows with it and two without it
    member = rng.permuted(np.arange(num_shadows)[:, None] % 2 == np.zeros(num_records), axis=0)
    shadow_phi = hardness + effect * member + rng.standard_normal((num_shadows, num_records))
    truth = rng.random(num_records) < 0.5
    phi = hardness + effect * truth + rng.standard_normal(num_records)
    return phi, shadow_phi, member, truth


def loss_of(phi):
    """-ln p of a confidence phi = ln(p / (1 - p))."""
    return np.logaddexp(0, -phi)


# --- one model -------------------------------------------------------------------------------


def test_simple_scores():
    loss, reference = np.array([0.0, 1.5, 1e4]), np.array([2.0, 1.0, 1.0])
    np.testing.assert_array_equal(scores.loss_score(loss), [0.0, -1.5, -1e4])
    np.testing.assert_array_equal(scores.calibrated_score(loss, reference), [2.0, -0.5, -9999.0])
    np.testing.assert_array_equal(scores.quantile_score(loss, reference), [-2.0, 0.5, 9999.0])


def test_logit_confidence_against_mpmath():
    for loss in [1e-300, 1e-40, 1e-17, 1e-8, 0.1, np.log(2), 3.0, 40.0, 1e4]:
        with case(loss):
            with mp.workdps(50):
                p = mp.exp(-mp.mpf(float(loss)))
                if loss < 1e-30:  # 1 - p needs more digits than 50
                    want = -mp.log(mp.mpf(float(loss)))
                else:
                    want = mp.log(p) - mp.log1p(-p)
            got = scores.logit_confidence([loss])[0]
            assert got == pytest.approx(float(want), rel=1e-14, abs=1e-15)


def test_logit_confidence_at_zero_loss_is_finite_and_highest():
    values = scores.logit_confidence([0.0, -0.0, 1e-307, 1e-9])
    assert np.isfinite(values).all() and values[0] == values[1] > values[2] > values[3]
    assert values[0] == pytest.approx(708.4, abs=0.01)


def test_logit_confidence_from_logits_against_mpmath():
    rng = np.random.default_rng(0)
    for size in (1e-3, 1.0, 30.0, 1e4):
        for classes in (2, 3, 50):
            logits = size * rng.standard_normal((4, classes))
            labels = rng.integers(classes, size=4)
            with mp.workdps(50):
                want = [
                    float(
                        mp.mpf(row[y])
                        - mp.log(mp.fsum(mp.exp(mp.mpf(z)) for j, z in enumerate(row) if j != y))
                    )
                    for row, y in zip(logits, labels, strict=True)
                ]
            got = scores.logit_confidence_from_logits(logits, labels)
            np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-13 * size)
            assert got.dtype == np.float64
    # beyond +-103.6, where probabilities clipped at 1e-45 all look alike
    got = scores.logit_confidence_from_logits([[200.0, 0.0], [300.0, 0.0], [0.0, 300.0]], [0, 0, 0])
    np.testing.assert_array_equal(got, [200.0, 300.0, -300.0])


def test_logit_confidence_two_ways():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 3, (100, 5)), rng.integers(5, size=100)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        scores.logit_confidence_from_logits(logits, labels),
        scores.logit_confidence(-log_p[np.arange(100), labels]),
        atol=1e-9,
    )


def test_zlib():
    losses = np.array([1.0, 2.0, 3.0])
    want = [
        -x / len(zlib.compress(text.encode("utf-8"))) for x, text in zip(losses, TEXTS, strict=True)
    ]
    np.testing.assert_allclose(scores.zlib_score(losses, TEXTS), want, rtol=1e-15)
    one = scores.zlib_score(2.0, TEXTS[1])
    assert type(one) is float and one == pytest.approx(want[1], rel=1e-15)
    # the same loss on an easier text gives a lower score
    assert scores.zlib_score(1.0, TEXTS[0]) > scores.zlib_score(1.0, TEXTS[1])


# --- token by token --------------------------------------------------------------------------


def mp_log_softmax(row):
    top = mp.log(mp.fsum(mp.exp(mp.mpf(float(z))) for z in row))
    return [mp.mpf(float(z)) - top for z in row]


def naive_min_k(values, fraction):
    k = max(1, int(fraction * len(values)))
    return float(mp.fsum(sorted(values)[:k]) / k)


def test_min_k():
    for length, fraction, k in [
        (1, 0.2, 1),
        (4, 0.2, 1),
        (5, 0.2, 1),
        (9, 0.2, 1),
        (10, 0.2, 2),
        (10, 1.0, 10),
        (7, 0.5, 3),
    ]:
        with case(length, fraction, k):
            values = -np.random.default_rng(length).exponential(size=length)
            got = scores.min_k(values, fraction=fraction)
            assert type(got) is float
            assert got == pytest.approx(np.sort(values)[:k].mean(), rel=1e-14)
            assert got == pytest.approx(naive_min_k(values, fraction), rel=1e-14)


def test_min_k_plus_plus_against_mpmath():
    for size in [0.1, 3.0, 30.0, 300.0]:
        with case(size):
            rng = np.random.default_rng(3)
            logits, ids = size * rng.standard_normal((12, 20)), rng.integers(20, size=12)
            with mp.workdps(1000):
                standard = []
                for row, y in zip(logits, ids, strict=True):
                    log_p = mp_log_softmax(row)
                    p = [mp.exp(x) for x in log_p]
                    mean = mp.fsum(a * b for a, b in zip(p, log_p, strict=True))
                    variance = mp.fsum(a * (b - mean) ** 2 for a, b in zip(p, log_p, strict=True))
                    standard.append((log_p[y] - mean) / mp.sqrt(variance))
                for fraction in (0.2, 0.6, 1.0):
                    want = naive_min_k(standard, fraction)
                    got = scores.min_k_plus_plus(logits, ids, fraction=fraction)
                    assert got == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_min_k_plus_plus_weights_by_probability():
    """Moments without the weights, over the whole vocabulary, would give 1.32 here."""
    p = np.array([0.7, 0.2, 0.1])
    mean = p @ np.log(p)
    want = (np.log(0.7) - mean) / np.sqrt(p @ (np.log(p) - mean) ** 2)
    assert scores.min_k_plus_plus(np.log(p)[None], [0]) == pytest.approx(want, rel=1e-13)
    assert want == pytest.approx(0.6331, abs=1e-4)


def test_min_k_plus_plus_tails():
    for width in (1, 5, 7):  # sigma = 0 and ln p = mu
        assert scores.min_k_plus_plus(np.full((3, width), 0.3), [0, 0, width - 1]) == 0
    peaked = np.array([[1e4, -1e4, 0.0]])
    assert scores.min_k_plus_plus(peaked, [0]) == 0
    assert np.isfinite(scores.min_k_plus_plus(peaked, [1]))
    assert scores.min_k_plus_plus(peaked, [1]) < scores.min_k_plus_plus(peaked, [2]) < 0
    # a barred token changes nothing
    rng = np.random.default_rng(4)
    logits, ids = rng.standard_normal((6, 8)), rng.integers(8, size=6)
    barred = np.concatenate([logits, np.full((6, 2), -np.inf)], axis=1)
    assert scores.min_k_plus_plus(barred, ids) == pytest.approx(
        scores.min_k_plus_plus(logits, ids), rel=1e-13
    )


def naive_error_zone(logits, reference, ids):
    up = down = mp.mpf(0)
    for row, ref, y in zip(logits, reference, ids, strict=True):
        if any(z > row[y] for z in row):
            change = mp_log_softmax(row)[y] - mp_log_softmax(ref)[y]
            up, down = up + max(change, 0), down + max(-change, 0)
    return float(up / (up + down)) if up + down > 0 else 0.5


def test_error_zone_against_mpmath():
    for size in [0.5, 5.0, 300.0]:
        with case(size):
            rng = np.random.default_rng(5)
            for _ in range(5):
                logits, reference = size * rng.standard_normal((2, 15, 9))
                ids = rng.integers(9, size=15)
                with mp.workdps(300):
                    want = naive_error_zone(logits, reference, ids)
                assert scores.error_zone(logits, reference, ids) == pytest.approx(want, rel=1e-12)


def test_error_zone_corners():
    reference, ids = np.array([[0.0, 0, 0], [0, 0, 0]]), [0, 0]
    worse = np.array([[-2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]])
    # every wrong token got likelier, which is the strongest evidence
    up = np.array([[1.0, 1.1, -9.0], [1.0, 1.1, -9.0]])
    assert scores.error_zone(up, reference, ids) == 1.0
    assert scores.error_zone(worse, reference, ids) == 0.0
    right = np.array([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    assert scores.error_zone(right, reference, ids) == 0.5  # no error
    assert scores.error_zone(worse, worse, ids) == 0.5  # no change
    # a tie for the largest probability is no error, at any index
    assert scores.error_zone([[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]], [0]) == 0.5
    assert scores.error_zone([[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]], [1]) == 0.5


# --- LiRA ------------------------------------------------------------------------------------


def naive_lira(phi, shadow_phi, member, location, fixed_variance, online):
    """Compute LiRA record by record, with the standard library."""
    centre = {"mean": np.mean, "median": np.median}[location]
    n = len(phi)
    groups = {
        True: [shadow_phi[member[:, i], i] for i in range(n)],
        False: [shadow_phi[~member[:, i], i] for i in range(n)],
    }
    out = np.empty(n)
    for i in range(n):
        log_density = {}
        for inside in (True, False) if online else (False,):
            group = groups[inside][i]
            if fixed_variance:
                residuals = [x - centre(g) for g in groups[inside] for x in g]
                std = np.std(residuals)
            else:
                std = np.std(group)
            z = (phi[i] - centre(group)) / std
            log_density[inside] = -(z**2) / 2 - np.log(std)
        out[i] = log_density[True] - log_density[False] if online else z
    return out


def test_lira_against_loop():
    for location in ["mean", "median"]:
        for fixed_variance in [True, False]:
            for num_shadows in [4, 7, 16]:
                with case(location, fixed_variance, num_shadows):
                    phi, shadow_phi, member, _ = shadow_world(num_shadows, 30, seed=num_shadows)
                    options = dict(location=location, fixed_variance=fixed_variance)
                    for online, score in ((True, scores.lira_online), (False, scores.lira_offline)):
                        want = naive_lira(phi, shadow_phi, member, online=online, **options)
                        np.testing.assert_allclose(
                            score(phi, shadow_phi, member, **options), want, rtol=1e-11, atol=1e-11
                        )
                        # in Fortran order, and with 0 and 1 for the membership
                        np.testing.assert_allclose(
                            score(
                                phi, np.asfortranarray(shadow_phi), member.astype(int), **options
                            ),
                            want,
                            rtol=1e-11,
                            atol=1e-11,
                        )


def test_chunks_do_not_show(monkeypatch):
    phi, shadow_phi, member, _ = shadow_world(6, 101, seed=0)
    loss, shadow_loss = loss_of(phi), loss_of(shadow_phi)

    def everything():
        return np.array(
            [
                *(
                    scores.lira_online(
                        phi, shadow_phi, member, location=where, fixed_variance=fixed
                    )
                    for where in ("mean", "median")
                    for fixed in (True, False)
                ),
                scores.rmia_offline(loss, shadow_loss, member, loss[:50], shadow_loss[:, :50]),
                scores.rmia_online(loss, shadow_loss, member, loss[:50], shadow_loss[:, :50]),
            ]
        )

    whole = everything()
    for size in (1, 7, 60):
        monkeypatch.setattr(shadow_scores, "_CHUNK", size)
        np.testing.assert_allclose(everything(), whole, rtol=1e-12)


def test_lira_in_single_precision_input():
    phi, shadow_phi, member, _ = shadow_world(8, 20, seed=9)
    phi, shadow_phi = phi.astype(np.float32), shadow_phi.astype(np.float32)
    got = scores.lira_online(phi, shadow_phi, member)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(
        got, scores.lira_online(phi.astype(float), shadow_phi.astype(float), member)
    )


def test_lira_tails():
    # one shadow without each record gives no variance; the ranking is still by phi - phi_out
    phi, out = np.array([1.0, 3.0, -1e4, 1e4]), np.zeros((1, 4))
    z = scores.lira_offline(phi, out, np.zeros((1, 4), bool))
    assert np.isfinite(z).all() and (np.argsort(z) == np.argsort(phi)).all()
    # all equal
    flat = np.full((6, 4), 2.0)
    member = np.tile([[True], [False]], (3, 4))
    for score in (scores.lira_online, scores.lira_offline):
        for location in ("mean", "median"):
            for fixed in (True, False):
                np.testing.assert_array_equal(
                    score(flat[0], flat, member, location=location, fixed_variance=fixed), 0
                )
    # far in the tail a p-value would be 0 or 1
    _, shadow_phi, member, _ = shadow_world(8, 4, seed=1)
    far = np.array([-1e4, -5e3, 5e3, 1e4])
    same = [0, 0, 0, 0]
    z = scores.lira_offline(far, shadow_phi[:, same], member[:, same])
    assert np.isfinite(z).all() and (np.diff(z) > 0).all()
    assert np.isfinite(scores.lira_online(far, 1e4 * shadow_phi, member)).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shift=st.floats(-1e3, 1e3),
    scale=st.floats(0.1, 10),
    location=st.sampled_from(["mean", "median"]),
    fixed=st.booleans(),
)
def test_lira_invariances(seed, shift, scale, location, fixed):
    """The score depends on neither scale and origin of phi nor the order of the shadows."""
    phi, shadow_phi, member, _ = shadow_world(6, 9, seed)
    order = np.random.default_rng(seed).permutation(6)
    for score in (scores.lira_online, scores.lira_offline):
        plain = score(phi, shadow_phi, member, location=location, fixed_variance=fixed)
        moved = score(
            scale * phi + shift,
            scale * shadow_phi + shift,
            member,
            location=location,
            fixed_variance=fixed,
        )
        np.testing.assert_allclose(moved, plain, rtol=1e-6, atol=1e-6)
        shuffled = score(
            phi, shadow_phi[order], member[order], location=location, fixed_variance=fixed
        )
        np.testing.assert_allclose(shuffled, plain, rtol=1e-9, atol=1e-9)


# --- RMIA ------------------------------------------------------------------------------------


def naive_rmia(loss, shadow_loss, member, population_loss, population_shadow_loss, gamma, a=None):
    """Compute RMIA from probabilities and all pairs, in 50 digits; offline if ``a`` is given.

    The shares are those for a gamma larger and smaller by 1e-12, because float64 cannot separate
    ratios that are closer.
    """

    def mean_p(losses):
        return mp.fsum(mp.exp(-mp.mpf(float(x))) for x in losses) / len(losses)

    def offline(p):
        return ((1 + mp.mpf(a)) * p + (1 - mp.mpf(a))) / 2

    shares, logs = [], []
    with mp.workdps(50):
        ratio_z = [
            mp.exp(-mp.mpf(float(x))) / (mean_p(column) if a is None else offline(mean_p(column)))
            for x, column in zip(population_loss, population_shadow_loss.T, strict=True)
        ]
        for i, x in enumerate(loss):
            out = mean_p(shadow_loss[~member[:, i], i])
            p = (mean_p(shadow_loss[member[:, i], i]) + out) / 2 if a is None else offline(out)
            ratio = mp.exp(-mp.mpf(float(x))) / p
            shares.append(
                [
                    sum(ratio / z >= gamma * (1 + mp.mpf(slack)) for z in ratio_z) / len(ratio_z)
                    for slack in (1e-12, -1e-12)
                ]
            )
            logs.append(float(mp.log(ratio)))
    return *np.array(shares).T, np.array(logs)


def test_rmia_against_mpmath():
    for gamma in [1.0, 0.3, 4.0]:
        for a in [0.0, 0.3, 1.0]:
            for size in [1.0, 100.0]:
                with case(gamma, a, size):
                    phi, shadow_phi, member, _ = shadow_world(5, 25, seed=7)
                    phi_z, shadow_z, _, _ = shadow_world(5, 33, seed=8)
                    arguments = (
                        [loss_of(size * x) for x in (phi, shadow_phi)]
                        + [member]
                        + [loss_of(size * x) for x in (phi_z, shadow_z)]
                    )
                    low, high, logs = naive_rmia(*arguments, gamma, a)
                    got = scores.rmia_offline(*arguments, a=a, gamma=gamma)
                    assert (low <= got).all() and (got <= high).all()
                    np.testing.assert_allclose(
                        scores.rmia_log_ratio(*arguments[:3], a=a), logs, rtol=1e-12, atol=1e-12
                    )
                    low, high, _ = naive_rmia(*arguments, gamma)
                    got = scores.rmia_online(*arguments, gamma=gamma)
                    assert (low <= got).all() and (got <= high).all()
                    assert size > 1 or (low == high).all()


def test_rmia_uses_the_mean_of_all_shadows_for_the_population():
    """The mean is over all shadows, not over the most confident half."""
    loss = np.array([0.5])
    shadows = np.array([[1.0], [1.0]])
    member = np.array([[True], [False]])
    p_z = np.array([0.9, 0.1])  # mean 0.5, top half 0.9
    shadow_z = -np.log(p_z)[:, None]
    # r(x) = e^-0.5 / e^-1 = 1.65; r(z) = 0.7 / 0.5 = 1.4, or 0.78 with the top half
    for bar, share in ((1.17, 1.0), (1.19, 0.0)):
        got = scores.rmia_offline(loss, shadows, member, [-np.log(0.7)], shadow_z, a=1.0, gamma=bar)
        assert got.tolist() == [share]


def test_rmia_tails():
    member = np.array([[True, False, True], [False, True, False]])
    flat = np.full((2, 3), 0.7)
    for score in (scores.rmia_offline, scores.rmia_online):
        # all ties: r(x) / r(z) = 1 >= 1
        np.testing.assert_array_equal(score(flat[0], flat, member, flat[0], flat), 1)
        np.testing.assert_array_equal(score(flat[0], flat, member, flat[0], flat, gamma=1.01), 0)
        huge = score(
            [1e4, 0.0, 1e4], 1e4 * np.ones((2, 3)), member, [1e4, 5e3], np.full((2, 2), 1e4)
        )
        assert huge.tolist() == [0.5, 1.0, 0.5]
    one = np.array([[0.7, 0.1]])  # one shadow, trained on neither
    got = scores.rmia_offline([0.7, 0.2], one, np.zeros((1, 2), bool), [0.5], [[0.5]])
    assert set(got) <= {0.0, 1.0}
    # p underflows and its ratio does not: r = e^-10000 / e^-9000 at a = 1
    got = scores.rmia_log_ratio([1e4], [[9e3]], [[False]], a=1.0)
    assert got.tolist() == [-1000.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), gamma=st.floats(0.1, 10), a=st.floats(0, 1))
def test_rmia_properties(seed, gamma, a):
    phi, shadow_phi, member, _ = shadow_world(4, 12, seed)
    loss, shadow_loss = loss_of(phi), loss_of(shadow_phi)
    order = np.random.default_rng(seed).permutation(12)

    def offline(bar, columns=slice(None)):
        return scores.rmia_offline(
            loss, shadow_loss, member, loss[columns], shadow_loss[:, columns], a=a, gamma=bar
        )

    share = offline(gamma)
    assert ((share >= 0) & (share <= 1)).all() and np.allclose(share * 12, np.round(share * 12))
    np.testing.assert_array_equal(offline(gamma, order), share)
    assert (offline(2 * gamma) <= share).all()
    # the share follows the ratio
    ratio = scores.rmia_log_ratio(loss, shadow_loss, member, a=a)
    assert (np.diff(share[np.argsort(ratio)]) >= 0).all()


# --- orientation -----------------------------------------------------------------------------


def test_members_score_higher():
    """Records with a lower loss, or a higher confidence than without them, rank as members.

    With these 400 records each AUC is above 0.65. A score with the wrong sign would be below 0.35.
    """
    phi, shadow_phi, member, truth = shadow_world(16, 400, seed=11)
    phi_z, shadow_z, _, _ = shadow_world(16, 300, seed=12, effect=0.0)
    loss, shadow_loss, reference = loss_of(phi), loss_of(shadow_phi), loss_of(phi - 2 * truth)
    out_loss = np.where(member, 0, shadow_loss).sum(axis=0) / (~member).sum(axis=0)
    population = loss_of(phi_z), loss_of(shadow_z)
    by_name = {
        "calibrated to the base": scores.calibrated_score(loss, reference),
        "calibrated to OUT shadows": scores.calibrated_score(loss, out_loss),
        "quantile": scores.quantile_score(phi, phi - 2 * truth),
        "lira online": scores.lira_online(phi, shadow_phi, member),
        "lira offline": scores.lira_offline(phi, shadow_phi, member),
        "lira online, own variance": scores.lira_online(
            phi, shadow_phi, member, fixed_variance=False
        ),
        "lira offline, median": scores.lira_offline(phi, shadow_phi, member, location="median"),
        "rmia offline": scores.rmia_offline(loss, shadow_loss, member, *population),
        "rmia online": scores.rmia_online(loss, shadow_loss, member, *population),
        "rmia log ratio": scores.rmia_log_ratio(loss, shadow_loss, member),
    }
    assert {name: naive_auc(value, truth) > 0.65 for name, value in by_name.items()} == (
        dict.fromkeys(by_name, True)
    )
    # by the loss alone, all else equal
    low_first = np.array([0.1, 0.5, 3.0])
    for value in (
        scores.loss_score(low_first),
        scores.logit_confidence(low_first),
        scores.zlib_score(low_first, ["same text"] * 3),
        scores.logit_confidence_from_logits([[2.0, 0], [1, 0], [-1, 0]], [0, 0, 0]),
    ):
        assert (np.diff(value) < 0).all()


def test_lira_offline_is_one_sided():
    """A confidence far *below* that of the OUT shadows is no evidence of membership."""
    z = scores.lira_offline([-5.0, 0.0, 5.0], np.tile([[-1.0], [1.0]], 3), np.zeros((2, 3), bool))
    np.testing.assert_allclose(z, [-5, 0, 5])


def test_members_score_higher_token_by_token():
    rng = np.random.default_rng(13)
    reference, ids = rng.standard_normal((40, 30)), rng.integers(30, size=40)
    member = reference.copy()
    member[np.arange(40), ids] += 1.0
    stranger = reference.copy()
    stranger[np.arange(40), ids] -= 1.0

    def log_probs(logits):
        return logits[np.arange(40), ids] - np.log(np.exp(logits).sum(axis=1))

    assert scores.min_k(log_probs(member)) > scores.min_k(log_probs(stranger))
    assert scores.min_k_plus_plus(member, ids) > scores.min_k_plus_plus(stranger, ids)
    assert (
        scores.error_zone(member, reference, ids)
        == 1
        > 0
        == scores.error_zone(stranger, reference, ids)
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), shift=st.floats(-1e4, 1e4))
def test_token_scores_are_free_of_the_logits_origin_and_order(seed, shift):
    rng = np.random.default_rng(seed)
    (logits, reference), ids = rng.standard_normal((2, 7, 6)), rng.integers(6, size=7)
    vocabulary, place = rng.permutation(6), rng.permutation(7)
    where = np.argsort(vocabulary)[ids]
    for score in (lambda z, ref, y: scores.min_k_plus_plus(z, y, fraction=0.5), scores.error_zone):
        want = score(logits, reference, ids)
        assert score(logits + shift, reference - shift, ids) == pytest.approx(want, abs=1e-8)
        assert score(logits[:, vocabulary], reference[:, vocabulary], where) == pytest.approx(
            want, abs=1e-12
        )
        assert score(logits[place], reference[place], ids[place]) == pytest.approx(want, abs=1e-12)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory():
    """256 shadows of 50,000 records take less than 256 MiB; their speed is in benchmarks/mia.py."""
    rng = np.random.default_rng(0)
    num_shadows, n = 256, 50_000
    shadow_phi = rng.standard_normal((num_shadows, n))
    phi, member = rng.standard_normal(n), rng.random((num_shadows, n)) < 0.5
    shadow_loss = np.abs(shadow_phi)
    loss = np.abs(phi)
    records = (phi, shadow_phi, member)
    population = (loss, shadow_loss, member, loss, shadow_loss)
    for call, arguments in (
        (scores.lira_online, records),
        (scores.lira_offline, records),
        (scores.rmia_offline, population),
        (scores.rmia_online, population),
    ):
        tracemalloc.start()
        call(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**28, (call.__name__, peak)


# --- contract --------------------------------------------------------------------------------

GOOD = dict(
    phi=np.zeros(3),
    loss=np.ones(3),
    shadow=np.ones((2, 3)),
    member=np.array([[True] * 3, [False] * 3]),
)


def lira(**changes):
    given_ = dict(phi=GOOD["phi"], shadow_phi=GOOD["shadow"], shadow_is_member=GOOD["member"])
    return scores.lira_online(**(given_ | changes))


def rmia(**changes):
    given_ = dict(
        loss=GOOD["loss"],
        shadow_loss=GOOD["shadow"],
        shadow_is_member=GOOD["member"],
        population_loss=GOOD["loss"],
        population_shadow_loss=GOOD["shadow"],
    )
    return scores.rmia_offline(**(given_ | changes))


def test_bad_input():
    for call, words in [
        (
            lambda: scores.loss_score([1.0, np.nan, np.inf]),
            r"loss must be finite, got 2 bad of 3, .* "
            r"index 1: nan",
        ),
        (lambda: scores.loss_score([]), "loss must be non-empty"),
        (lambda: scores.loss_score(["a"]), "loss must be an array of numbers"),
        (lambda: scores.loss_score([True]), "loss must be an array of numbers, got 'dtype bool'"),
        (lambda: scores.loss_score([[1.0], [1.0, 2.0]]), "loss must be an array of numbers"),
        (lambda: scores.loss_score(1.0), "loss must be an array with 1 axes"),
        (lambda: scores.logit_confidence([0.5, -1e-9]), "loss must be finite and >= 0, .* -1e-09"),
        (lambda: scores.logit_confidence_from_logits([[1.0]], [0]), "logits must .* 2 classes"),
        (lambda: scores.logit_confidence_from_logits([[1.0, 2.0]], [2]), r"labels .* in \[0, 2\)"),
        (
            lambda: scores.logit_confidence_from_logits([[1.0, 2.0]], [0.0]),
            "labels must be integers",
        ),
        (
            lambda: scores.logit_confidence_from_logits([[1.0, 2.0]], [0, 1]),
            "labels must be integers",
        ),
        (
            lambda: scores.logit_confidence_from_logits([[1.0, np.inf]], [0]),
            r"logits .* \(0, 1\): inf",
        ),
        (
            lambda: scores.calibrated_score([1.0, 2.0], [1.0]),
            r"reference_loss must be of shape \(2,\)",
        ),
        (lambda: scores.quantile_score([1.0], [np.nan]), "predicted_quantile must be finite"),
        (lambda: scores.zlib_score([1.0], "text"), "loss must be of shape"),
        (lambda: scores.zlib_score(1.0, ["text"]), "loss must be of shape"),
        (lambda: scores.zlib_score([1.0], [""]), "text must be a non-empty string"),
        (lambda: scores.min_k([]), "token_log_probs must be non-empty"),
        (lambda: scores.min_k([-1.0], fraction=0), "fraction must be .* got 0"),
        (lambda: scores.min_k([-1.0], fraction=1.5), "fraction must be .* got 1.5"),
        (lambda: scores.min_k([-np.inf]), "token_log_probs must be finite"),
        (lambda: scores.min_k_plus_plus(np.zeros((2, 3)), [0]), "token_ids must be integers"),
        (lambda: scores.min_k_plus_plus(np.zeros((1, 3)), [-1]), r"token_ids .* in \[0, 3\)"),
        (
            lambda: scores.min_k_plus_plus([[0.0, -np.inf]], [1]),
            "token_logits .* finite at token_ids",
        ),
        (
            lambda: scores.min_k_plus_plus([[0.0, np.inf]], [0]),
            "token_logits must be below infinity",
        ),
        (
            lambda: scores.error_zone(np.zeros((1, 3)), np.zeros((1, 2)), [0]),
            "reference_token_logits",
        ),
        (lambda: lira(phi=np.zeros(4)), r"shadow_phi must be of shape \(num_shadows, 4\)"),
        (lambda: lira(shadow_is_member=np.ones((3, 2))), "shadow_is_member must be of shape"),
        (
            lambda: lira(shadow_is_member=2 * np.ones((2, 3))),
            "shadow_is_member must be True and False",
        ),
        (
            lambda: lira(shadow_is_member=np.ones((2, 3))),
            "at least 1 OUT shadow, .* 3 records, first",
        ),
        (lambda: lira(shadow_is_member=np.zeros((2, 3))), "at least 1 IN shadow"),
        (lambda: lira(fixed_variance=False), r"at least 2 IN shadow .* fixed_variance=True"),
        (lambda: lira(location="mode"), "location must be one of mean, median"),
        (
            lambda: lira(shadow_phi=np.full((2, 3), np.nan)),
            r"shadow_phi .* 6 bad of 6, .* \(0, 0\)",
        ),
        (lambda: rmia(gamma=0), "gamma must be .* got 0"),
        (lambda: rmia(a=1.1), "a must be .* got 1.1"),
        (lambda: rmia(a=-0.1), "a must be"),
        (
            lambda: rmia(population_shadow_loss=np.ones((3, 2))),
            r"population_shadow_loss must be of shape \(2, 3\)",
        ),
        (lambda: rmia(population_loss=[]), "population_loss must be non-empty"),
        (lambda: rmia(shadow_is_member=np.ones((2, 3))), "at least 1 OUT shadow"),
    ]:
        with case(words):
            with pytest.raises(ValueError, match=words) as error:
                call()
            assert "\n" not in str(error.value)


def test_inputs_are_not_changed():
    logits, phi = np.ones((3, 2)), np.zeros(3)
    shadow, member = GOOD["shadow"].copy(), GOOD["member"].copy()
    scores.logit_confidence_from_logits(logits, [0, 1, 0])
    scores.min_k_plus_plus(logits, [0, 1, 0])
    lira(phi=phi, shadow_phi=shadow, shadow_is_member=member, location="median")
    rmia(shadow_loss=shadow, population_shadow_loss=shadow)
    assert (logits == 1).all() and (phi == 0).all() and (shadow == 1).all()
    np.testing.assert_array_equal(member, GOOD["member"])


def test_import_loads_no_torch():
    code = (
        "import sys, lowrank_dp.mia; assert 'numpy' not in sys.modules\n"
        "import lowrank_dp.mia.scores, lowrank_dp.mia.metrics\n"
        "sys.exit(any(n in sys.modules for n in ('torch', 'sklearn', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_of_one_value_an_entry_take_any_shape():
    """Each entry equals the value of the entry alone, for losses (num_shadows, N) and more axes."""
    rng = np.random.default_rng(0)
    for shape in ((32, 2400), (3, 4, 5), (1, 1), (7,)):
        loss, other = rng.gamma(1.0, 2.0, (2, *shape))
        logits = rng.normal(0, 3, (*shape, 4))
        labels = rng.integers(0, 4, shape)
        found = {
            "loss_score": (scores.loss_score(loss), -loss),
            "logit_confidence": (
                scores.logit_confidence(loss),
                [scores.logit_confidence([one])[0] for one in loss.ravel()[:500]],
            ),
            "calibrated_score": (scores.calibrated_score(loss, other), other - loss),
            "quantile_score": (scores.quantile_score(loss, other), loss - other),
            "logit_confidence_from_logits": (
                scores.logit_confidence_from_logits(logits, labels),
                [
                    scores.logit_confidence_from_logits([row], [label])[0]
                    for row, label in zip(
                        logits.reshape(-1, 4)[:500], labels.ravel()[:500], strict=True
                    )
                ],
            ),
        }
        for name, (values, right) in found.items():
            assert values.shape == shape, name
            right = np.ravel(right)
            np.testing.assert_allclose(
                values.ravel()[: right.size], right, rtol=1e-12, err_msg=name
            )
    # p = e^-l against the logit of the probability itself, in the tail too
    assert scores.logit_confidence([[2.0, 50.0]]) == pytest.approx(
        np.array([[np.log(np.exp(-2) / (1 - np.exp(-2))), -50.0]]), rel=1e-12
    )
    for call, message in (
        (
            lambda: scores.calibrated_score(np.ones((2, 3)), np.ones((3, 2))),
            r"reference_loss must be of shape \(2, 3\), got 'shape \(3, 2\)'",
        ),
        (lambda: scores.logit_confidence([[1.0], [-1.0]]), r"first at index \(1, 0\): -1.0"),
        (
            lambda: scores.logit_confidence_from_logits(np.ones((2, 3, 4)), [0, 1]),
            r"labels must be integers of shape \(2, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
