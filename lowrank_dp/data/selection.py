"""Choose random subsets of records by a keyed hash of each unit of privacy by itself.

Private training reads a part of a data set if the user asks for a number of records
(``max_examples``), for a hold-out or for random members. Differential privacy compares two data
sets that differ in one record, so adding a record must not displace another record. :func:`draw`
therefore decides on each unit of privacy alone: it compares a keyed hash of the unit's content, as
a number from 0 to 1, with a threshold. The size of such a subset is random, like the size of a
Poisson sample.

:func:`subset` has an exact size instead, and is for records that no private training reads.
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
_MOST_CHECKED = 5000  # largest number of records that require_alone checks


def group_units(examples: Iterable[Example], unit: str) -> list[list[Example]]:
    """Group examples into units of privacy, in order of first appearance.

    A unit is one example, or, with ``unit="group"``, all examples of one group.
    """
    units: dict[str, list[Example]] = {}
    for example in examples:
        units.setdefault(example.group if unit == "group" else example.id, []).append(example)
    return list(units.values())


def rounded_count(count: int) -> int:
    """Round ``count`` to the nearest perfect square, for use in a threshold.

    The threshold of a subset of ``size`` of ``count`` units is ``size / rounded_count(count)``.
    With ``count`` itself, each added unit would move the threshold and so the membership of other
    units. The rounded count changes at only one in 2 sqrt(count) values of ``count``. It differs
    from ``count`` by at most sqrt(count), so the error in the subset's size is at most one standard
    deviation of that size.

    >>> [rounded_count(n) for n in (400, 401, 420, 421, 67_349, 67_350)]
    [400, 400, 400, 441, 67600, 67600]
    """
    root = math.isqrt(count)
    return root * root if count - root * root <= root else (root + 1) * (root + 1)


def threshold(size: int, count: int) -> float:
    """Return the probability, in [0, 1], that chooses ``size`` of ``count`` units on average.

    The probability is ``size / rounded_count(count)``, or 1 if ``size`` and ``count`` round to the
    same square or ``size`` is larger, so that rounding alone drops no unit.

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
    """Choose each unit whose content has a keyed hash below ``probability``.

    Args:
        contents: the content of each unit, the result of :func:`unit_content`.
        probability: the threshold, in [0, 1].
        purpose, seed: the key of the hash. Draws with different keys are independent.
        copies: how units with the same content are chosen. "together": all or none, so that no
            copy of a held-out row is trained on. "apart": the n-th copy is hashed with its number,
            so that each unit is drawn independently.

    Returns:
        For each unit, whether it is chosen. In either mode, adding a unit changes the multiset of
        chosen contents by at most that unit.
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
    """Return the text by which a unit of privacy is hashed: a row's content, or a group's id.

    The content includes the label, because two rows may differ in the label only. The content
    excludes the row's id, because an inserted row shifts the numbers of all rows after it.
    """
    row = unit[0]
    if len(unit) > 1:
        return f"group {row.group}"
    group = row.group if has_group(row) else None
    return repr((row.text, row.text_pair, row.label, row.target, group))


def has_group(example: Example) -> bool:
    """Tell whether the row belongs to a known source record or value of a group column."""
    return example.group not in ("", example.id)


def partition(
    examples: Sequence[Example], probability: float, purpose: str, seed: int | str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Partition rows into those whose groups :func:`draw` chooses, and the other rows.

    The expected number of chosen rows is ``probability * len(examples)``; both parts keep the
    order of the rows. A known group is hashed by its id alone, so that adding a row to a group
    moves no other row. A row without a known group is hashed by its content; copies stay together.
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
    """Raise ValueError if ``choose`` does not decide on each record alone.

    ``choose`` returns the chosen records of a sequence, and is called three times: on the first
    5,000 records of ``everything``, on these without the first chosen record, and on these without
    the first record that was not chosen. The choice among all other records must be the same.
    Records are compared by ``content``, so the order of copies does not matter. ``option`` names
    the user's option in the message.
    """
    everything = everything[:_MOST_CHECKED]
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
    """Choose at most ``size`` examples, as whole groups; the examples keep their order.

    The groups are shuffled by ``seed``, and each group that still fits is taken. If every group has
    more than ``size`` examples, the subset is the first ``size`` examples of the smallest group.
    Adding one example may change the whole subset, so private training must not read it: the
    function is for evaluation and attacks.
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
    if not kept:  # an error could end a run after its last step, with its result unsaved
        kept = min(groups, key=len)[:size]
    return tuple(examples[i] for i in sorted(kept))
