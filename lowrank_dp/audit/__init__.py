"""Privacy audit: canaries in the training loop give lower bounds on epsilon.

NON-PRIVATE: an audit reads clean sums, samples and membership bits, which a private run never
publishes. The module of each subject:

    request             options of an audit
    canaries            rows of random tokens, and training runs with these rows
    sums, weights, runs the three designs of an audit
    stepping            measurements of the design ``sums`` in one training step
    laws                statistical tests of noise, sample and contributions
    bounds              lower bounds on epsilon
    power               smallest faults that a design detects
    timing              estimate of an audit's duration
    scales              second computation of a preconditioner's scales, from the releases
    auditing            audit of a configuration, and its report
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
