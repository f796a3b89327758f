"""Table of planted privacy bugs: which audit finds which bug.

    python benchmarks/audit_bugs.py [--only NAME ...] [--output FOLDER]

Each bug of ``tests/planted_bugs.py`` is planted into ``train``. The first column says whether the
guards of ``train`` stop the run. Then the three designs of ``lowrank_dp.audit`` run with these
guards out of the way: the bound on epsilon beside the claim, and what contradicts the claim. The
model is ``tiny`` (its last block is trained), on generated text. The table is printed, and saved as
``audit_bugs`` in ``--output``. All bugs take about a quarter of an hour on one quiet core.
"""

import argparse
import difflib
import math
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from lowrank_dp import artifacts
from lowrank_dp.audit import Design, audit
from lowrank_dp.audit.auditing import LABEL
from lowrank_dp.train import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import planted_bugs
from tests.planted_bugs import BUGS, STEPS

NAME = "audit_bugs"
NONE = "none: a correct run"
CONFIG = TrainConfig(
    model="tiny",
    task="generated",
    max_examples=36,
    train_layers=1,
    batch_size=10,
    steps=20,
    noise_multiplier=4.0,
    delta=1e-5,
    learning_rate=1e-3,
    eval_examples=50,
    seed=0,
)
DESIGNS = {  # design, and what differs from CONFIG
    "sums": (Design("sums"), {}),
    "weights": (Design("weights", canaries=100), {"batch_size": 30, "noise_multiplier": 16.0}),
    "runs": (Design("runs", runs=80), {"steps": 3}),
}
CAPTION = (
    "Privacy bugs planted into train, and what sees them. Guards: whether train's own guards stop "
    f"a run of {STEPS} steps. The designs audit train's steps with the guards out of the way: "
    "'yes' is the verdict CONTRADICTION, with the largest lower bound on epsilon (95%, one-sided) "
    "and the claimed epsilon in parentheses; 'refused' is a run that fails in another check of the "
    "step. Seconds are those of the audited runs on one core. Model tiny, last block, generated "
    "text; weights: 100 canaries, runs: 80 runs of 3 steps. NON-PRIVATE, on generated records."
)
COLUMNS = ["bug", "guards", "sums", "facts (sums)", "weights", "runs", "seconds"]


@dataclass(frozen=True)
class Seen:
    """Outcome of one design on one bug: bound and claim; ``refused`` is the error of a step."""

    caught: bool
    bound: float | None
    claim: float | None
    reason: str
    seconds: float
    refused: str = ""

    @property
    def cell(self) -> str:
        """The outcome in words."""
        if self.refused:
            return "refused"
        bound = "∞" if self.bound is None else f"{self.bound:.2f}"
        return f"{'yes' if self.caught else 'no'} ({bound} against {self.claim:.2f})"


@dataclass(frozen=True)
class Row:
    """Outcomes of one bug."""

    bug: str
    guards: bool
    message: str
    designs: dict


@dataclass(frozen=True)
class Result:
    """The table; a bound of None is infinite."""

    privacy: str
    description: str
    config: dict
    designs: dict
    rows: tuple
    provenance: dict = field(default_factory=dict)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], help="name of a bug; may repeat")
    parser.add_argument("--output", help="folder of the table; default: none")
    given = parser.parse_args()
    names = given.only or [NONE, *BUGS]
    for name in names:
        if name not in (NONE, *BUGS):
            near = difflib.get_close_matches(name, [NONE, *BUGS], n=1)
            sys.exit(f"--only must be a bug of tests/planted_bugs.py, got {name!r} (near: {near})")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in names:
        rows.append(row_of(name))
        print(" | ".join(cells(rows[-1])), flush=True)
    if given.output is None:
        return
    result = Result(
        privacy=LABEL,
        description=CAPTION,
        config=CONFIG.as_json(),
        designs={
            name: {"sizes": asdict(design), "changes": changes}
            for name, (design, changes) in DESIGNS.items()
        },
        rows=tuple(asdict(row) for row in rows),
    )
    artifacts.save_result(result, given.output, NAME, seed=0)
    artifacts.save_table(COLUMNS, [cells(row) for row in rows], given.output, NAME, caption=CAPTION)


def row_of(name):
    """Plant one bug, and record which guards and audits find it."""
    plant, _, *changes = BUGS.get(name, (lambda patch: None, ""))
    config = replace(CONFIG, **(changes[0] if changes else {}))
    message = ""
    with planted(plant, STEPS), tempfile.TemporaryDirectory() as folder:
        try:
            train(
                replace(config, steps=STEPS), Path(folder) / "run", keep_model=False,
                show_progress=False,
            )  # fmt: skip
        except ValueError as error:
            message = str(error)
    designs = {}
    for design_name, (design, differing) in DESIGNS.items():
        with planted(plant, differing.get("steps", config.steps)):
            designs[design_name] = seen(config, differing, design)
    return Row(name, bool(message), message, designs)


class planted:
    """A context in which a bug is planted into runs of ``steps`` steps; torch's seed is fixed."""

    def __init__(self, plant, steps):
        self._plant, self._steps, self._patch = plant, steps, pytest.MonkeyPatch()

    def __enter__(self):
        torch.manual_seed(0)
        self._patch.setattr(planted_bugs, "STEPS", self._steps)
        self._plant(self._patch)

    def __exit__(self, *error):
        self._patch.undo()


def seen(config, differing, design):
    """Audit by one design."""
    if config.epsilon is not None:
        differing = {k: v for k, v in differing.items() if k != "noise_multiplier"}
    started = time.perf_counter()
    try:
        report = audit(replace(config, **differing), design, power=False)
    except (ValueError, KeyError) as error:
        seconds = time.perf_counter() - started
        return Seen(False, None, None, "", seconds, refused=f"{type(error).__name__}: {error}")
    bound = report.lower_bound if math.isfinite(report.lower_bound) else None
    facts = [line.what for line in report.lines if not line.passed]
    reason = "" if not facts else facts[0] + (f", and {len(facts) - 1} more" * (len(facts) > 1))
    return Seen(bool(report.contradictions), bound, report.epsilon, reason, report.seconds)


def cells(row):
    """Cells of the table."""
    sums = row.designs["sums"]
    return [
        row.bug,
        "stopped" if row.guards else "no",
        sums.cell,
        sums.reason,
        row.designs["weights"].cell,
        row.designs["runs"].cell,
        ", ".join(f"{one.seconds:.0f}" for one in row.designs.values()),
    ]


if __name__ == "__main__":
    main()
