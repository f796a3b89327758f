"""The shift check with and without a shift; near-duplicates against brute force.

Simulations have fixed seeds; the stated error rates are those of the tests over all seeds.
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lowrank_dp.data import Example, load_task
from lowrank_dp.mia import duplicates, metrics, shift, units
from lowrank_dp.mia.duplicates import Pair
from tests.tasks import case


@pytest.fixture(scope="module")
def sentences():
    return load_task("generated", seed=5).train


@pytest.fixture(scope="module")
def tables():
    """Return records in whole groups; each group has one to three rows."""
    return load_task("generated-table", seed=5).train


def texts(*found, **fields):
    return [Example(f"x/{i}", text, group=f"x/{i}", **fields) for i, text in enumerate(found)]


def draw(rng, examples, count):
    return [examples[i] for i in rng.choice(len(examples), count, replace=False)]


def members_by_group(rng, examples):
    member = {group: rng.random() < 0.5 for group in sorted({e.group for e in examples})}
    return np.array([member[e.group] for e in examples])


def z_score(auc):
    return (auc.value - 0.5) / auc.se


def excludes_half(auc):
    return not auc.ci[0] <= 0.5 <= auc.ci[1]


# --- no shift --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shift_check_has_one_false_alarm_in_a_hundred(sentences):
    """150 audits: at a true rate of 1%, more than 7 alarms have probability 2e-4.

    A mean or a standard deviation outside of these bounds has a probability below 1e-3.
    """
    rng = np.random.default_rng(1)
    found = [
        shift.blind_baseline(draw(rng, sentences, 120), rng.random(120) < 0.5, seed=i)
        for i in range(150)
    ]
    z = np.array([z_score(auc) for auc in found])
    assert sum(map(excludes_half, found)) <= 7
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.8 < z.std() < 1.2


@pytest.mark.slow
def test_the_shift_check_keeps_its_level_for_sampled_groups(tables):
    """Rows of a group are similar and sampled together; counted singly, they shorten the interval.

    There are 150 audits as above. The wrong standard deviation is about sqrt(2.3), from the mean
    square of a group's size over its mean.
    """
    rng = np.random.default_rng(2)
    groups = sorted({e.group for e in tables})
    z, alarms = [], 0
    for i in range(150):
        chosen = set(rng.choice(groups, 80, replace=False))
        examples = [e for e in tables if e.group in chosen]
        auc = shift.blind_baseline(examples, members_by_group(rng, examples), seed=i)
        z.append(z_score(auc))
        alarms += excludes_half(auc)
    assert alarms <= 7
    assert 0.8 < np.std(z) < 1.2


def test_a_fixed_half_is_no_shift_and_a_few_records_widen_the_interval(sentences):
    rng = np.random.default_rng(3)
    few = shift.blind_baseline(sentences[:40], rng.permutation(40) < 20)
    many = shift.blind_baseline(sentences[:1000], rng.permutation(1000) < 500)
    assert not excludes_half(few) and not excludes_half(many)
    assert few.se > 4 * many.se
    # the Mann-Whitney variance of four folds of 200, about 100 a side
    assert many.se == pytest.approx(np.sqrt(201 / (12 * 100 * 100) / 4), rel=0.01)


def test_copies_and_groups_do_not_leak_across_folds(sentences):
    """Four copies of a text are sampled together: one copy in training would reveal the others."""
    rng = np.random.default_rng(4)
    member = rng.random(150) < 0.5
    copies = [
        replace(e, id=f"{e.id}/{i}", group=f"{e.id}/{i}", text=("  " * i) + e.text.title())
        for e in sentences[:150]
        for i in range(4)
    ]
    apart = [replace(e, text=f"{e.text} {i}") for i, e in enumerate(copies)]
    grouped = [replace(e, group=e.id.rsplit("/", 1)[0]) for e in apart]
    truth = np.repeat(member, 4)
    assert not excludes_half(shift.blind_baseline(copies, truth))
    assert not excludes_half(shift.blind_baseline(grouped, truth))
    leaking = shift.blind_baseline(apart, truth)
    assert leaking.ci[0] > 0.5


def test_units_are_chained_through_groups_and_copies():
    examples = [
        Example("a", "one", group="g"),
        Example("b", "two", group="g"),
        Example("c", " TWO ", group="h"),
        Example("d", "three", group="h"),
        Example("e", "four", group="i"),
        Example("f", "five"),
        Example("j", "six"),
    ]
    numbers = units.unit_numbers(examples).tolist()
    assert len(set(numbers[:4])) == 1
    assert sorted({numbers.index(u) for u in numbers}) == [0, 4, 5, 6]


def test_why_the_folds_go_forwards():
    """With two-way folds and linear scores, the variance is twice the sum of the folds' variances.

    The docstring of the package makes this claim. Exact arithmetic checks it by the covariance of
    all products y_i y_j.
    """
    rng = np.random.default_rng(5)
    points = rng.standard_normal((40, 6))
    kernel, fold = points @ points.T, np.arange(40) % 5
    both_ways = np.where(fold[:, None] != fold, kernel, 0)
    forwards = np.where(fold[:, None] > fold, kernel, 0)

    def variance(weights):
        """Variance of sum_ij w_ij y_i y_j for independent signs y, with w_ii = 0."""
        symmetric = weights + weights.T
        return (np.triu(symmetric, 1) ** 2).sum()

    def by_fold(weights):
        return sum(variance(np.where(fold[:, None] == f, weights, 0)) for f in range(5))

    assert variance(both_ways) == pytest.approx(2 * by_fold(both_ways))
    assert variance(forwards) == pytest.approx(by_fold(forwards))


# --- a shift ---------------------------------------------------------------------------------


def test_a_planted_shift_is_found(sentences):
    """Two in five members differ: the AUC of this difference alone is 0.7 (0.6 for the label)."""
    for name, change in {
        "length": lambda e: replace(e, text=e.text + " , all in all"),
        "word": lambda e: replace(e, text=f"notably {e.text}"),
        "case": lambda e: replace(e, text=e.text.upper()),
        "label": lambda e: replace(e, label=1),
        "pair": lambda e: replace(e, text_pair="a second text"),
    }.items():
        with case(name):
            rng = np.random.default_rng(6)
            truth = rng.random(1200) < 0.5
            examples = [
                change(e) if bit and rng.random() < 0.4 else e
                for e, bit in zip(sentences[:1200], truth, strict=True)
            ]
            found = shift.blind_baseline(examples, truth)
            assert found.ci[0] > 0.5
            assert shift.shift_verdict(found, None) == "INVALID (shift)"
            flipped = shift.blind_baseline(examples, ~truth)  # with members and non-members swapped
            assert flipped.value == pytest.approx(found.value, abs=0.01)


def test_real_scores_and_targets_are_seen():
    rng = np.random.default_rng(7)
    truth = rng.random(400) < 0.5
    scored = [
        Example(f"x/{i}", "same", label=float(rng.normal(2 * bit)), group=f"x/{i}")
        for i, bit in enumerate(truth)
    ]
    # all texts are copies, so all are one unit
    with pytest.raises(ValueError, match=r"in several groups .* 400 records in 1 groups"):
        shift.blind_baseline(scored, truth)
    apart = [replace(e, text=f"text {i}") for i, e in enumerate(scored)]
    assert shift.blind_baseline(apart, truth).ci[0] > 0.7
    written = [
        Example(f"x/{i}", f"t {i}", target="yes" if bit else "no", group=f"x/{i}")
        for i, bit in enumerate(truth)
    ]
    assert shift.blind_baseline(written, truth).value > 0.99


def test_verdict():
    def at(low, high):
        return metrics.Auc((low + high) / 2, 0.01, (low, high))

    fair, above, below = at(0.48, 0.53), at(0.51, 0.55), at(0.42, 0.49)
    assert shift.shift_verdict(fair, None) == shift.shift_verdict(fair, fair) == "ok"
    for shifted in ((above, None), (below, None), (above, fair), (fair, above), (fair, below)):
        assert shift.shift_verdict(*shifted) == "INVALID (shift)"
    assert shift.shift_verdict(at(0.5, 0.6), None) == "ok"  # at the edge it is not excluded


# --- AUC by unit -----------------------------------------------------------------------------


def test_unit_auc_is_auc_where_groups_are_single_records(sentences):
    rng = np.random.default_rng(8)
    truth, scores = rng.random(60) < 0.5, rng.standard_normal(60)
    assert units.unit_auc(scores, sentences[:60], truth, confidence=0.99) == metrics.auc(
        scores, truth, confidence=0.99
    )


def test_unit_auc_by_hand():
    examples = [Example(str(i), f"text {i}", group=g) for i, g in enumerate("aabbcd")]
    truth = [1, 1, 1, 0, 0, 0]
    scores = [1.0, 3.0, 9.0, 0.0, 5.0, 1.5]  # members 2 and 9; others 0, 5, 1.5
    found = units.unit_auc(scores, examples, truth, confidence=0.9)
    assert found == metrics.auc([2.0, 9.0, 0.0, 5.0, 1.5], [1, 1, 0, 0, 0], confidence=0.9)
    assert found.value == 5 / 6


def test_unit_auc_keeps_its_level_where_rows_are_sampled_together():
    """Groups of 8 rows share one loss and one bit: 300 audits, of which 1% may give an alarm.

    More than 11 alarms have a probability of 1e-4. If rows are counted singly, the standard
    deviation is sqrt(8), and some 36% give an alarm.
    """
    rng = np.random.default_rng(9)
    examples = [
        Example(f"{g}/{i}", f"text {g} {i}", group=str(g)) for g in range(60) for i in range(8)
    ]
    alarms = {"units": 0, "rows": 0}
    for _ in range(300):
        scores, truth = (np.repeat(x, 8) for x in (rng.standard_normal(60), rng.random(60) < 0.5))
        alarms["units"] += excludes_half(units.unit_auc(scores, examples, truth, confidence=0.99))
        alarms["rows"] += excludes_half(metrics.auc(scores, truth, confidence=0.99))
    assert alarms["units"] <= 11 < 60 < alarms["rows"]


# --- copies ----------------------------------------------------------------------------------


def test_overlap_finds_each_copied_non_member_once():
    examples = texts(
        "A film .", "a  FILM .", "other", "a film .", "Other", "no copy", "ﬁlm", "film"
    )
    truth = [1, 1, 0, 0, 1, 0, 0, 1]
    assert duplicates.overlap(examples, truth) == (
        Pair("x/4", "x/2", 1.0),
        Pair("x/0", "x/3", 1.0),
        Pair("x/7", "x/6", 1.0),
    )
    assert duplicates.overlap(examples[4:6], [1, 0]) == ()
    assert {
        (p.nonmember, p.member) for p in duplicates.overlap(examples, np.logical_not(truth))
    } == {
        ("x/0", "x/3"),
        ("x/1", "x/3"),
        ("x/4", "x/2"),
        ("x/7", "x/6"),
    }


def test_overlap_sees_the_whole_record_but_not_the_label():
    a = Example("a", "q", "p", label=0)
    assert duplicates.overlap([a, replace(a, id="b", label=1)], [1, 0]) == (Pair("a", "b", 1.0),)
    assert duplicates.overlap([a, replace(a, id="b", text_pair="r")], [1, 0]) == ()
    assert duplicates.overlap([a, replace(a, id="b", text_pair=None, target="p")], [1, 0]) == ()


def grams(text, n=5):
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def brute_force(examples, truth, threshold):
    """Best similarity of each non-member, by sets, and all members that have this similarity."""
    found = {}
    for other, bit in zip(examples, truth, strict=True):
        if bit:
            continue
        alike = {}
        for member, inside in zip(examples, truth, strict=True):
            a, b = grams(member.text.lower()), grams(other.text.lower())
            if inside and a | b and member.text == other.text:
                alike = {}
                break
            if inside and a | b:
                alike[member.id] = len(a & b) / len(a | b)
        best = max(alike.values(), default=0)
        if best >= threshold:
            found[other.id] = best, {i for i, value in alike.items() if value == best}
    return found


def check_against_brute_force(examples, truth, threshold):
    expected = brute_force(examples, truth, threshold)
    got = duplicates.near_duplicates(examples, truth, threshold=threshold)
    assert [p.nonmember for p in got] == [e.id for e in examples if e.id in expected]
    for pair in got:
        value, members = expected[pair.nonmember]
        assert pair.similarity == pytest.approx(value, abs=1e-12)
        assert pair.member == min(members, key=lambda i: int(i.split("/")[1]))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab", min_size=5, max_size=14), st.booleans()),
        min_size=2,
        max_size=12,
        unique_by=lambda pair: pair[0],
    ),
    st.sampled_from([0.3, 0.5, 0.75, 0.8, 1.0]),
)
def test_near_duplicates_are_those_of_brute_force(pairs, threshold):
    truth = [bit for _, bit in pairs]
    if len(set(truth)) == 2:
        check_against_brute_force(texts(*(text for text, _ in pairs)), truth, threshold)


def test_near_duplicates_of_edited_sentences(sentences, monkeypatch):
    rng = np.random.default_rng(10)
    monkeypatch.setattr(duplicates, "_BLOCK", 17)
    monkeypatch.setattr(duplicates, "_PAIRS", 23)
    originals = [e.text for e in sentences[:150]]
    edited = []
    for text in originals[:60]:
        letters = list(text)
        for at in rng.choice(len(letters), rng.integers(1, 4), replace=False):
            letters[at] = "q"
        edited.append("".join(letters))
    examples = texts(*originals, *edited)
    truth = rng.permutation(len(examples)) < 100
    assert duplicates.near_duplicates(examples, truth)
    check_against_brute_force(examples, truth, duplicates.NEAR)
    check_against_brute_force(examples, truth, 0.4)


def test_near_duplicates_ignore_case_accents_and_exact_copies():
    long = "the café in bergen serves a very good soup on monday"
    examples = texts(long, long.replace("é", "e").upper(), long.title(), "tiny", "tin")
    assert duplicates.near_duplicates(examples, [1, 0, 0, 1, 0]) == (Pair("x/0", "x/1", 1.0),)
    pair = [Example("a", long, "and then some more"), Example("b", long, "and then some mora")]
    assert [p.member for p in duplicates.near_duplicates(pair, [0, 1])] == ["b"]


def test_near_duplicates_of_one_in_a_thousand_is_found_in_linear_memory():
    """8,000 records have 16 million pairs, which would take 64 MB at four bytes per pair."""
    rng = np.random.default_rng(11)
    words = np.array([f"w{i:04d}" for i in range(3000)])
    found = [" ".join(words[rng.integers(0, 3000, 5)]) for _ in range(8000)]
    truth = np.arange(8000) < 4000
    for i in range(4):
        found[4000 + i] = found[i][:-1] + "x"
    examples = texts(*found)
    tracemalloc.start()
    pairs = duplicates.near_duplicates(examples, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(p.member, p.nonmember) for p in pairs] == [
        (f"x/{i}", f"x/{4000 + i}") for i in range(4)
    ]
    assert peak < 60e6


# --- bad input -------------------------------------------------------------------------------


def test_bad_truth():
    for guard in [shift.blind_baseline, duplicates.overlap, duplicates.near_duplicates]:
        for truth, message in [
            ([1, 1, 1], "is_member must have members and non-members, got 3 of 3"),
            ([0, 0, 0], "is_member must have members and non-members, got 0 of 3"),
            ([1, 0], "is_member must be of shape"),
            ([1, 0, 2], "True and False, or 1 and 0"),
        ]:
            with case(guard.__name__, truth, message):
                with pytest.raises(ValueError, match=message) as caught:
                    guard(texts("a b", "c d", "e f"), truth)
                assert "\n" not in str(caught.value)


def test_other_bad_input():
    examples = texts("a b", "c d", "e f")
    with pytest.raises(ValueError, match="folds must be an integer >= 2"):
        shift.blind_baseline(examples, [1, 0, 1], folds=1)
    with pytest.raises(ValueError, match="seed must be"):
        shift.blind_baseline(examples, [1, 0, 1], seed=-1)
    with pytest.raises(ValueError, match="several groups for the shift check"):
        shift.blind_baseline(examples, [1, 0, 1])
    with pytest.raises(ValueError, match="threshold must be a finite number > 0 and <= 1"):
        duplicates.near_duplicates(examples, [1, 0, 1], threshold=0)
    with pytest.raises(ValueError, match="scores must be of shape"):
        units.unit_auc([1.0, 2.0], examples, [1, 0, 1], confidence=0.99)


def test_blank_texts_and_one_word_texts_pass(sentences):
    truth = np.arange(100) % 2 == 0
    blank = texts(*("" if i % 3 == 0 else f"only{i}" for i in range(100)))
    assert 0 <= shift.blind_baseline(blank, truth).value <= 1
    assert duplicates.near_duplicates(blank, truth, threshold=1.0) == ()


def test_results_are_those_of_the_seed(sentences):
    truth = np.random.default_rng(12).random(200) < 0.5
    assert (
        shift.blind_baseline(sentences[:200], truth, seed=3)
        == shift.blind_baseline(sentences[:200], truth, seed=3)
        != shift.blind_baseline(sentences[:200], truth, seed=4)
    )


def test_interval_at_its_own_confidence(sentences):
    truth = np.random.default_rng(13).random(300) < 0.5
    found = shift.blind_baseline(sentences[:300], truth)
    reach = stats.norm.ppf(0.995) * found.se
    assert found.ci == pytest.approx((found.value - reach, found.value + reach))
