"""Audit of a run's privacy by canaries in its own training loop, beside the accountant's claim.

NON-PRIVATE: an audit reads clean sums, samples and membership bits, which a private run never
publishes.

    request  options of an audit      canaries  rows of random tokens, and runs with them
    sums, weights, runs  the designs  stepping  what the design sums reads in one step
    laws  tests of the stated laws    bounds    lower bounds on epsilon
    power  factors that are found     timing    estimate of an audit's duration
    scales  a preconditioner's scales, computed a second time from the releases
    auditing  the audit of a configuration, and its report
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.audit.auditing import Report, audit
    from lowrank_dp.audit.bounds import LowerBound, law_bound, threshold_bound
    from lowrank_dp.audit.laws import Line
    from lowrank_dp.audit.request import Design
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Design", "Line", "LowerBound", "Report", "audit", "law_bound", "threshold_bound"]
