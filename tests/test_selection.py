"""Subsets of records: the change by one more record, and a naive recomputation by hashlib."""

import gzip
import hashlib
import math
import os
import random
from collections import Counter

import pytest
from scipy import stats

from lowrank_dp.data import Example, group_units, load_task
from lowrank_dp.data.selection import partition, rounded_count, subset, threshold
from lowrank_dp.data.task import Task
from lowrank_dp.membership.units import draw_members
from lowrank_dp.train.records import hold_out
from tests.tasks import needs_data, write_jsonl


def records(rng, count, grouped):
    """Make rows; some are copies, and some differ in their label only."""
    rows = []
    for _ in range(count):
        text = f"text {rng.randrange(2 * count)}"
        user = f"t/group/{rng.randrange(max(2, count // 3))}" if grouped else None
        rows.append((text, rng.choice([None, "pair"]), rng.randrange(2), user))
    return rows


def numbered(rows):
    """Make examples whose ids are row numbers, as a file without ids gives."""
    return tuple(
        Example(f"t/train/{i}", text, pair, label, group=user or f"t/train/{i}")
        for i, (text, pair, label, user) in enumerate(rows)
    )


def contents(examples):
    return Counter((e.text, e.text_pair, e.label) for e in examples)


def difference(before, after):
    """Count the records removed and added between two multisets."""
    return (
        (contents(before) - contents(after)).total(),
        (contents(after) - contents(before)).total(),
    )


def naive(content, purpose, seed, number=0):
    """Compute the hash of a unit as a fraction, by its definition."""
    key = hashlib.sha256(f"lowrank_dp {purpose} {seed}".encode()).digest()
    digest = hashlib.blake2b(f"{number} {content}".encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") / 2**64


@pytest.mark.slow
def test_one_record_more_changes_that_record_alone():
    """Data, positions, sizes and seeds are random; half of the trials have groups."""
    rng = random.Random(1)
    crossed = 0
    for trial in range(250):
        rows = records(rng, rng.randrange(20, 300), grouped=trial % 2 == 1)
        where = rng.choice([0, len(rows), rng.randrange(len(rows))])
        longer = [
            *rows[:where],
            rng.choice([*records(rng, 1, trial % 2 == 1), rng.choice(rows)]),
            *rows[where:],
        ]
        size, seed = rng.randrange(1, len(rows) + 2), rng.randrange(100)
        before, after = numbered(rows), numbered(longer)
        crossed += rounded_count(len(before)) != rounded_count(len(after))
        if rounded_count(len(before)) == rounded_count(len(after)):
            probability = threshold(size, len(before))
            assert probability == threshold(size, len(after))
            for one, two in zip(
                partition(before, probability, "max_examples train", seed),
                partition(after, probability, "max_examples train", seed),
                strict=True,
            ):
                assert difference(one, two) in ((0, 0), (0, 1)), trial
            task, again = (
                Task("t", "classification", 2, ("0", "1"), (), {"train": e}, "")
                for e in (before, after)
            )
            if 30 < size < len(rows) // 2 and len(before) > 100:
                for split in ("train", "validation"):
                    assert difference(
                        hold_out(task, size, "example").split(split),
                        hold_out(again, size, "example").split(split),
                    ) in ((0, 0), (0, 1)), trial
        members = [
            [
                e
                for e, bit in zip(
                    found, draw_members([[e] for e in found], "bernoulli", seed), strict=True
                )
                if bit
            ]
            for found in (before, after)
        ]
        assert difference(*members) in ((0, 0), (0, 1)), trial
    assert crossed < 25  # of 250 sizes; at these the public number itself changes


def test_one_group_more_changes_that_group_alone():
    rng = random.Random(2)
    for _ in range(60):
        rows = records(rng, 90, grouped=True)
        new = [(f"new {i}", None, 0, "t/group/new") for i in range(rng.randrange(1, 4))]
        longer = [*rows]
        for row in new:
            longer.insert(rng.randrange(len(longer) + 1), row)
        seed = rng.randrange(50)
        found = []
        for examples in (numbered(rows), numbered(longer)):
            units = group_units(examples, "group")
            bits = draw_members(units, "bernoulli", seed)
            found.append([e for unit, bit in zip(units, bits, strict=True) if bit for e in unit])
        assert difference(*found) in ((0, 0), (0, len(new)))


def test_a_subset_is_part_of_the_smallest_group_if_no_whole_group_fits():
    """Such as one prompt for all records, in an evaluation on fewer records."""
    examples = tuple(
        Example(f"t/{group}/{i}", "x", target="y", group=group)
        for i in range(7)
        for group in ("a", "b", "c")
        if i < {"a": 7, "b": 5, "c": 6}[group]
    )
    for size in (1, 4):
        kept = subset(examples, size, "0/train")
        assert [e.id for e in kept] == [f"t/b/{i}" for i in range(size)]
    assert {e.group for e in subset(examples, 5, "0/train")} == {"b"}
    assert Counter(e.group for e in subset(examples, 12, "0/train")).total() in (11, 12)
    assert subset(examples, 18, "0/train") == examples


def test_each_unit_is_chosen_by_its_own_hash():
    """Rows, groups, and copies (kept together or apart) are chosen as the definition says."""
    rng = random.Random(3)
    examples = numbered(records(rng, 200, False) + records(rng, 200, True))
    chosen, rest = partition(examples, 0.3, "max_examples train", 7)
    assert 0 < len(chosen) < 400
    for part, inside in ((chosen, True), (rest, False)):
        for e in part:
            content = (
                f"group {e.group}"
                if "/group/" in e.group
                else repr((e.text, e.text_pair, e.label, e.target, None))
            )
            assert (naive(content, "max_examples train", 7) < 0.3) == inside
    seen = Counter()
    for e, bit in zip(examples, draw_members([[e] for e in examples], "bernoulli", 5), strict=True):
        content = repr(
            (e.text, e.text_pair, e.label, e.target, e.group if "/group/" in e.group else None)
        )
        assert bit == (naive(content, "membership", 5, seen[content]) < 0.5)
        seen[content] += 1
    assert max(seen.values()) > 1
    units = [unit for unit in group_units(examples, "group") if len(unit) > 1]
    assert draw_members(units, "bernoulli", 5) == [
        naive(f"group {unit[0].group}", "membership", 5) < 0.5 for unit in units
    ]


def test_copies_are_drawn_apart_for_membership_and_together_for_a_holdout():
    """500 copies of a text get independent fair coins (false alarm 1e-8), and one hold-out draw."""
    copies = numbered([("the same", None, 0, None)] * 500)
    heads = sum(draw_members([[e] for e in copies], "bernoulli", 0))
    assert stats.binomtest(heads, 500, 0.5).pvalue > 1e-8
    for seed in range(20):
        chosen, rest = partition(copies, 0.5, "holdout", seed)
        assert {len(chosen), len(rest)} == {0, 500}


@pytest.mark.slow
def test_sizes_are_those_of_a_binomial():
    """Each size fits its binomial distribution (false alarm 1e-9); the mean is within 5 errors."""
    for count, size in ((400, 100), (1000, 30), (5000, 1000), (4000, 3999)):
        examples = numbered([(f"text {i}", None, i % 2, None) for i in range(count)])
        probability = threshold(size, count)
        assert abs(probability * count - size) <= 1.1 * size / math.sqrt(count) + 1
        found = [len(partition(examples, probability, "p", seed)[0]) for seed in range(40)]
        assert all(stats.binomtest(n, count, probability).pvalue > 1e-9 for n in found)
        error = math.sqrt(count * probability * (1 - probability) / 40)
        assert abs(sum(found) / 40 - count * probability) <= 5 * error
        assert len(set(found)) > 3 or probability == 1


def test_the_rounded_count_is_the_nearest_square_and_moves_seldom():
    moves = 0
    for count in range(1, 20_000):
        root = round(math.sqrt(count))
        assert rounded_count(count) == root**2 and abs(root**2 - count) <= root
        moves += rounded_count(count) != rounded_count(count + 1)
    assert moves == 140  # at n (n + 1), and 140 x 141 < 20,000 < 141 x 142
    for count in range(1, 300):
        for size in range(count, count + 3):
            assert threshold(size, count) == 1
        assert threshold(1, count + 3) <= 1


def test_max_examples_of_a_file_with_one_record_more(tmp_path):
    """Rows are read from files, with the user's ids or without ids."""
    rng = random.Random(4)
    for trial in range(12):
        rows = [{"text": f"t {rng.random()}", "label": i % 3} for i in range(150)]
        if trial % 2:
            rows = [{**row, "idx": i} for i, row in enumerate(rows)]
        new = {"text": "new", "label": 0} | ({"idx": 999} if trial % 2 else {})
        where = rng.randrange(151)
        found = []
        for content in (rows, [*rows[:where], new, *rows[where:]]):
            path = write_jsonl(tmp_path / f"{trial}.jsonl", content)
            found.append(load_task(str(path), max_examples=40, seed=trial).train)
        assert difference(*found) in ((0, 0), (0, 1))
        assert 15 < len(found[0]) < 70
    with pytest.raises(
        ValueError,
        match=r"max_examples 1 chose none of the \d+ examples of the "
        r"train split",
    ):
        for seed in range(100):
            load_task(str(path), max_examples=1, seed=seed)


@pytest.mark.slow
@needs_data
def test_sst2_with_one_record_inserted(tmp_path):
    """With row numbers, one insertion changed 906 of 1,000 records; with hashes, at most one."""
    source = os.path.join(os.environ["LOWRANK_DP_DATA"], "glue", "sst2", "train.jsonl.gz")
    with gzip.open(source) as file:
        lines = file.read().splitlines(keepends=True)
    lines.insert(1234, b'{"sentence": "a new record", "label": 1, "idx": 900000}\n')
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines))
    before = load_task("sst2", max_examples=1000).train
    after = load_task("sst2", data_dir=tmp_path, max_examples=1000).train
    assert difference(before, after) in ((0, 0), (0, 1))
    assert stats.binomtest(len(before), 67_349, 1000 / 67_349).pvalue > 1e-6
