"""Detection of copies of private records in data that should be public."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lowrank_dp.data.examples import Example

COPY = 0.5  # smallest share of common texts at which one data set counts as a copy of the other


def is_copy(public: Sequence[Example], private: Sequence[Example]) -> bool:
    """Return whether half of the private texts are public, or half of the public texts private.

    The compared text of an example is its target if the example has a target, and otherwise its
    text or pair of texts. Case and white space do not count. NON-PRIVATE: the result depends on
    private records. Use the result only to refuse a run. One record changes the result only if the
    share is at the limit ``COPY``.
    """
    return max(_share(public, private), _share(private, public)) >= COPY


def _share(examples: Sequence[Example], others: Iterable[Example]) -> float:
    known = set(map(_text, others))
    return sum(_text(example) in known for example in examples) / max(1, len(examples))


def _text(example: Example) -> str:
    whole = example.target or f"{example.text} {example.text_pair or ''}"
    return " ".join(whole.casefold().split())
