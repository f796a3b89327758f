"""Checks that every step's sample is the Poisson sample that the accounting assumes.

A message names the kind of fault, and never reveals whether a particular unit was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from lowrank_dp.train import evidence
from lowrank_dp.train.evidence import Watch

FALSE_ALARMS = 5e-7  # bound on the probability that the samples of an honest run stop it
_FAMILIES = 4  # number of checks that share FALSE_ALARMS


class SamplingCheck:
    """Refuse samples in which units do not take part independently with the stated probability.

    No unit may be in a sample twice. Four numbers are compared with their binomial distributions:
    the units in a sample, the spread of that number, the units common to two successive samples,
    and the samples that each unit takes part in.

    Args:
        unit_rows: rows of each unit.
        rate: probability with which a unit takes part, in (0, 1].
        steps: largest number of steps of the run.
    """

    def __init__(self, unit_rows: Sequence[Sequence[int]], rate: float, steps: int) -> None:
        self._unit_of = {row: unit for unit, rows in enumerate(unit_rows) for row in rows}
        self._rows_of = [len(rows) for rows in unit_rows]
        self._units, self._rate = len(unit_rows), rate
        self._drawn = np.zeros(self._units)
        self._steps, self._last = 0, np.zeros(0, dtype=int)
        share = FALSE_ALARMS / _FAMILIES
        if rate < 1:
            by_rate = evidence.successes(rate)
            self._count, self._common = (Watch(by_rate, 1, steps, share) for _ in range(2))
            self._even = Watch(evidence.too_even(self._units, rate), 1, steps, share)
            self._each, self._level = by_rate, np.log(self._units / share)

    def check(self, rows: Sequence[int], *, one_each: bool) -> None:
        """Check one step's sample, and the samples of the run so far.

        Args:
            rows: rows of the sample.
            one_each: whether a unit takes part with one of its rows, or with all of them.

        Raises:
            ValueError: if the sample, or the samples so far, are not as stated.
        """
        units = np.array([self._unit_of[row] for row in rows], dtype=int)
        most = np.ones(self._units) if one_each else np.array(self._rows_of)
        times = np.bincount(units, minlength=self._units)
        if len(set(rows)) < len(rows) or bool((times > most).any()):
            self._refuse("has a unit twice")
        units = np.unique(units)
        self._steps += 1
        self._drawn[units] += 1
        size = np.array([float(len(units))])
        if self._rate == 1:
            if len(units) < self._units:
                self._refuse("lacks a unit though the rate is 1")
            return
        if self._count.add(size, np.array([self._units]), mean=self._rate) is not None:
            self._refuse(f"has another size than a rate of {self._rate:.4g} gives")
        common = np.array([float(len(np.intersect1d(units, self._last, assume_unique=True)))])
        if self._common.add(common, np.array([len(self._last)]), mean=self._rate) is not None:
            self._refuse("depends on the sample of the step before")
        self._last = units
        spread = evidence.spread(size, self._units, self._rate)
        if self._even.add(spread, np.ones(1)) is not None:
            self._refuse("is of a fixed size, not a Poisson sample")
        ends = np.array([self._drawn.min(), self._drawn.max()])
        if bool((self._each(ends, np.full(2, self._steps)) >= self._level).any()):
            self._refuse("takes a unit more or less often than the others")

    def _refuse(self, what: str) -> NoReturn:
        """Raise ``ValueError`` with the fault of the sample and the requirement."""
        raise ValueError(
            f"the sample {what}: units must take part independently, each with the "
            "same probability, and the privacy stated would not hold"
        )
