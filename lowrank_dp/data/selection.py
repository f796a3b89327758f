"""Subsets of records that adding one record hardly changes, and subsets of an exact size.

Private training reads a part of a data set where the user asks for a number of records, for a
hold-out, or for random members. Differential privacy compares two data sets that differ by one
record, so that record must not displace another one. :func:`draw` therefore decides on each unit
alone: a keyed hash of the unit's content, as a number from 0 to 1, is compared with a threshold.
The size of such a subset is random, as the size of a Poisson sample is.

:func:`subset` has an exact size instead, and is for records that no training reads.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from lowrank_dp.data.examples import Example

T = TypeVar("T")
_BITS = 64
_LOOKED_AT = 5000  # records, by require_alone


def group_units(examples: Iterable[Example], unit: str) -> list[list[Example]]:
    """The units of privacy, in order of first appearance: each row, or all rows of a group."""
    units: dict[str, list[Example]] = {}
    for example in examples:
        units.setdefault(example.group if unit == "group" else example.id, []).append(example)
    return list(units.values())


def rounded_count(count: int) -> int:
    """The perfect square nearest to ``count``, which a threshold depends on in place of it.

    The threshold of a subset of ``size`` of ``count`` units is ``size / rounded_count(count)``.
    With the count itself the threshold would move, and with it other units' membership, whenever
    one unit is added. The rounded count moves at one in 2 sqrt(count) sizes only, and differs from
    the count by at most sqrt(count): the error that it makes in the subset's size is at most one
    standard deviation of that size.

    >>> [rounded_count(n) for n in (400, 401, 420, 421, 67_349, 67_350)]
    [400, 400, 400, 441, 67600, 67600]
    """
    root = math.isqrt(count)
    return root * root if count - root * root <= root else (root + 1) * (root + 1)


def threshold(size: int, count: int) -> float:
    """The probability in [0, 1] that chooses ``size`` of ``count`` units on average.

    The probability is ``size / rounded_count(count)``, and 1 where the two round alike or
    ``size`` is larger, so that no unit is dropped for a rounding.

    >>> threshold(100, 400), threshold(100, 401), threshold(400, 401), threshold(500, 400)
    (0.25, 0.25, 1.0, 1.0)
    """
    rounded = rounded_count(count)
    return 1.0 if rounded <= rounded_count(size) else size / rounded


def draw(
    contents: Iterable[str],
    probability: float,
    purpose: str,
    seed: int | str,
    *,
    copies: str = "together",
) -> list[bool]:
    """For each unit, whether a keyed hash of the unit's content falls below ``probability``.

    Args:
        contents: what identifies each unit, as :func:`unit_content` gives it.
        probability: the threshold, in [0, 1].
        purpose, seed: the key. Draws of different purposes or seeds are independent.
        copies: of units with the same content. "together": all are chosen or none is, so that a
            copy of a held-out row is not trained on. "apart": the n-th copy is hashed with its
            number, so that each unit has an independent coin. Either way, a unit that is added
            changes the multiset of chosen contents by at most that unit.
    """
    key = hashlib.sha256(f"lowrank_dp {purpose} {seed}".encode()).digest()
    limit = int(probability * 2**_BITS)
    seen: Counter[str] = Counter()
    chosen = []
    for content in contents:
        number = seen[content] if copies == "apart" else 0
        seen[content] += 1
        digest = hashlib.blake2b(f"{number} {content}".encode(), digest_size=_BITS // 8, key=key)
        chosen.append(int.from_bytes(digest.digest(), "big") < limit)
    return chosen


def unit_content(unit: Sequence[Example]) -> str:
    """What a unit of privacy is hashed by: one row to the letter, or the id of a group of rows.

    The label counts, because two rows may differ in the label only. The row's id does not count,
    because a row that is inserted shifts the numbers of the rows behind it.
    """
    row = unit[0]
    if len(unit) > 1:
        return f"group {row.group}"
    group = row.group if has_group(row) else None
    return repr((row.text, row.text_pair, row.label, row.target, group))


def has_group(example: Example) -> bool:
    """Whether the row is known to belong to a source record or to a value of a group column."""
    return example.group not in ("", example.id)


def partition(
    examples: Sequence[Example], probability: float, purpose: str, seed: int | str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The rows whose groups :func:`draw` chooses with ``probability``, and the other rows.

    The expected number of chosen rows is ``probability * len(examples)``; both parts keep the
    order of the rows. A known group is hashed by its id alone, so that a row more in a group moves
    no other row. A row without a known group is hashed by its content; copies stay together.
    """
    contents = [f"group {e.group}" if has_group(e) else unit_content([e]) for e in examples]
    chosen = draw(contents, probability, purpose, seed)
    return (
        tuple(e for e, bit in zip(examples, chosen, strict=True) if bit),
        tuple(e for e, bit in zip(examples, chosen, strict=True) if not bit),
    )


def require_alone(
    choose: Callable[[Sequence[T]], Sequence[T]],
    everything: Sequence[T],
    content: Callable[[T], str],
    option: str,
) -> None:
    """Raise ``ValueError`` if ``choose`` does not decide on each of ``everything`` alone.

    ``choose`` gives the chosen ones of a sequence. It is called on the first thousands, and again
    without the first that it chose, and without the first that it did not choose: all others must
    fare as before. They are told apart by their ``content``, so that the order of equal ones does
    not matter.
    """
    everything = everything[:_LOOKED_AT]
    chosen = choose(everything)
    before, taken = Counter(map(content, chosen)), {*map(id, chosen)}
    for side in (True, False):
        left_out = next((one for one in everything if (id(one) in taken) is side), None)
        if left_out is None:
            continue
        again = Counter(map(content, choose([one for one in everything if one is not left_out])))
        gone = before - again
        if again - before or sum(gone.values()) > 1 or gone.keys() - {content(left_out)}:
            raise ValueError(
                f"{option} does not choose each record by itself: without one of the "
                "records another subset of the rest is chosen, and the privacy "
                "stated would not hold"
            )


def subset(examples: tuple[Example, ...], size: int, seed: str) -> tuple[Example, ...]:
    """At most ``size`` examples in their own order: whole groups, in random order, that fit.

    ``seed`` alone decides which groups. One example more in ``examples`` may change the whole
    subset, so private training must not read the subset: it is for evaluation and attacks.
    Raises ``ValueError`` if no group has at most ``size`` examples.
    """
    if len(examples) <= size:
        return examples
    members: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        members.setdefault(example.group, []).append(position)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    kept: list[int] = []
    for group in groups:
        if len(kept) + len(group) <= size:
            kept += group
    if not kept:
        raise ValueError(
            f"max_examples must be at least {min(map(len, groups))}, the size of the "
            f"smallest group, got {size}"
        )
    return tuple(examples[i] for i in sorted(kept))
