"""CPU seconds of the commands to their first line of output, and of ``--help``.

    python benchmarks/startup.py [--quick]

Each command runs on ``tiny`` and the generated task, three times (once with ``--quick``), and is
stopped after its first line. The least of the times (user and system time of the process, in
seconds) is printed beside the limit. Other load on the machine makes CPU seconds longer too, so the
limits hold for a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from lowrank_dp.__main__ import COMMANDS

FIRST_LINE, HELP = 4.0, 1.0  # largest CPU seconds on one core
TASK = ["--model", "tiny", "--task", "generated"]
TRAIN = ["train", *TASK, "--batch-size", "16", "--steps", "2", "--learning-rate", "0.1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def process(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank_dp", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def seconds(arguments: list[str]) -> float:
    """CPU seconds of a command until its first line; raises RuntimeError if that is an error."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with process(arguments) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        running.kill()
    if not line or line.startswith("error"):
        raise RuntimeError(f"{' '.join(arguments)}: {line}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="run each command once")
    runs = 1 if parser.parse_args().quick else 3
    with tempfile.TemporaryDirectory() as temporary:
        attacked = Path(temporary) / "attacked"
        trained = [*TRAIN, "--non-private", "--membership", "bernoulli", "--seed", "0"]
        with process([*trained, "--output", str(attacked)]) as training:
            training.communicate()
        timed = {
            "train --noise-multiplier 1": [*TRAIN, "--noise-multiplier", "1"],
            "train --epsilon 8": [*TRAIN, "--epsilon", "8"],
            "train --epsilon 8 --method lora": [*TRAIN, "--epsilon", "8", "--method", "lora"],
            "spectrum": ["spectrum", *TASK, "--batch-size", "64"],
            "mia": ["mia", "--model", str(attacked)],
        } | {f"{command} --help": [command, "--help"] for command in COMMANDS}
        for name, arguments in timed.items():
            found = []
            for run in range(runs):
                folder = Path(temporary) / f"{name} {run}"
                output = ["--output", str(folder)] if arguments[0] == "train" else []
                found.append(seconds([*arguments, *(output if "--help" not in arguments else [])]))
            limit = HELP if name.endswith("--help") else FIRST_LINE
            print(f"{name:<34}{min(found):6.2f} s   limit {limit:.0f} s", flush=True)


if __name__ == "__main__":
    main()
