"""Reference values of epsilon from other implementations, for tests/data/accounting.json.

The script is slow and is run only to make that file. It takes dp-accounting's RDP with 400 orders
everywhere; dp-accounting's PLD where its composition is precise (delta >= 1e-8), at an interval of
at most 1e-3 or a twentieth of one step's standard deviation; and without sampling the exact profile
of Balle & Wang (2018) by mpmath.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import dp_accounting
import mpmath
import numpy as np
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution

OUTPUT = Path(__file__).parents[1] / "tests" / "data" / "accounting.json"
ORDERS = [*np.linspace(1.02, 12, 150), *range(13, 200), *np.geomspace(200, 20_000, 60).round()]
# sample rate, noise multiplier, steps
SETTINGS = [
    (1.0, 10.0, 1),
    (1.0, 300.0, 10**6),
    (1.0, 0.5, 3),
    (0.5, 20.0, 10**4),
    (0.3, 0.5, 10),
    (0.1, 2.0, 1000),
    (0.0304, 0.8, 500),
    (0.01, 754.8, 10**5),
    (0.01, 1000.0, 1000),
    (0.01, 0.7, 10**5),
    (1e-3, 0.5, 10**5),
    (1e-4, 1.0, 10**6),
]
DELTAS = (1e-3, 1e-5, 1e-8, 1e-12, 1e-20)


def exact(mu: float, delta: float) -> float:
    with mpmath.workdps(50):
        low, high = mpmath.mpf(0), mpmath.mpf(mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta)))
        for _ in range(120):
            middle = (low + high) / 2
            spent = mpmath.ncdf(mu / 2 - middle / mu) - mpmath.exp(middle) * mpmath.ncdf(
                -mu / 2 - middle / mu
            )
            low, high = (middle, high) if spent > delta else (low, middle)
        return float(high)


def reference(rate: float, sigma: float, steps: int, delta: float) -> dict[str, float]:
    found: dict[str, float] = {"rate": rate, "sigma": sigma, "steps": steps, "delta": delta}
    if rate == 1:
        return found | {"exact": exact(math.sqrt(steps) / sigma, delta)}
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    found["rdp"] = float(rdp.RdpAccountant(ORDERS).compose(step, steps).get_epsilon(delta))
    if delta >= 1e-8:
        spread = rate * math.sqrt(math.expm1(min(sigma**-2, 50)))
        interval = max(min(1e-3, spread / 20), 1e-7)
        one = privacy_loss_distribution.from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=interval
        )
        found["pld"] = float(one.self_compose(steps).get_epsilon_for_delta(delta))
    return found


if __name__ == "__main__":
    rows = []
    for setting in SETTINGS:
        rows += [reference(*setting, delta) for delta in DELTAS]
        print(*rows[-len(DELTAS) :], sep="\n", file=sys.stderr, flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")
