"""Time of `lowrank_dp.theory`, compared with its limits: `python benchmarks/theory.py`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from lowrank_dp import theory


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def slowest(function: Callable[..., object], points: list[tuple]) -> float:
    return max(seconds(lambda point=point: function(*point), repeats=3) for point in points)


def import_seconds() -> float:
    def fresh(code: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True), repeats=3)

    return fresh("import lowrank_dp.theory") - fresh("pass")


def main() -> int:
    grid = np.arange(1, 1001)
    coordinate = [(r, b) for r in (1, 2, 16, 60, 1000, 10**5) for b in (0.0, 1e-3, 0.5, 1 - 1e-9)]
    joint = [(r, n) for r in (1, 16, 1024, 10**5) for n in (2, 768, 4096, 10**6)]
    private = [
        (e, r, n, t, k)
        for e in (0.0, 1.0, 1000.0)
        for r in (1, 16, 256, 10**5)
        for n in (16, 4096, 10**6)
        for t in (1e-3, 0.1, 2.0)
        for k in (1.0, 1.1)
    ]
    rows = [
        (
            "tv_bound, 1000 x 1000 grid",
            1.0,
            seconds(lambda: theory.tv_bound(grid[:, None], grid, reference="paper")),
        ),
        (
            "tv_exact, slowest point",
            0.02,
            slowest(lambda r, b: theory.tv_exact(r, 2, beta2=b), coordinate),
        ),
        ("joint_tv, slowest point", 0.2, slowest(theory.joint_tv, joint)),
        (
            "privacy_profile, slowest point",
            0.05,
            slowest(
                lambda e, r, n, t, k: theory.privacy_profile(e, r, n, angle=t, norm_ratio=k),
                private,
            ),
        ),
        ("import lowrank_dp.theory", 1.5, import_seconds()),
    ]
    print(f"{'':34}{'measured':>12}{'asked':>10}")
    for name, asked, measured in rows:
        print(f"{name:34}{measured:>10.4f} s{asked:>8g} s{'' if measured < asked else '  MISSED'}")
    return int(any(measured >= asked for _, asked, measured in rows))


if __name__ == "__main__":
    sys.exit(main())
