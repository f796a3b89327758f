"""Recognise a copy of private records among data that is said to be public."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lowrank_dp.data.examples import Example

COPY = 0.5  # share of common texts from which on one set of records counts as a copy of the other


def is_copy(public: Sequence[Example], private: Sequence[Example]) -> bool:
    """Tell whether half of the private texts are public ones, or half of the public texts private.

    The text of an example is its target, if it has one, and else its text or pair of texts; case
    and white space do not count. The answer reads private records: it serves to refuse a run, and
    one record changes it only if the share is at its bound.
    """
    return max(_share(public, private), _share(private, public)) >= COPY


def _share(examples: Sequence[Example], others: Iterable[Example]) -> float:
    known = set(map(_text, others))
    return sum(_text(example) in known for example in examples) / max(1, len(examples))


def _text(example: Example) -> str:
    whole = example.target or f"{example.text} {example.text_pair or ''}"
    return " ".join(whole.casefold().split())
