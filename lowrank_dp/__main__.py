"""Console script ``lowrank-dp`` and ``python -m lowrank_dp``: one subcommand per module."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

from lowrank_dp import __version__

COMMANDS = {
    "spectrum": "measure the spectra of a model's gradients",
    "restore": "restore noisy gradients in a file",
    "lora": "measure LoRA's implicit noise on real layers",
    "plan": "predict the effects of noise on a private run, without spending privacy",
    "train": "fine-tune a model with differential privacy",
    "audit": "bound the epsilon of a run from below, by canaries in its training loop",
    "mia": "attack a checkpoint by membership inference",
    "figures": "draw the papers' figures",
}
# Number of new objects after which the garbage collector runs. Imports make many objects that live
# as long as the process. With Python's default of 700, the collector would run a thousand times,
# which takes 0.6 s of CPU.
_NEW_OBJECTS = 50_000


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand and exit.

    SIGINT at any moment prints one line on stderr and exits with code 130.
    """
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"lowrank-dp {__version__}: differentially private fine-tuning with "
            "low rank\n\nusage: lowrank-dp COMMAND [OPTIONS]   "
            "(lowrank-dp COMMAND --help)\n"
        )
        print("\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items()))
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    from lowrank_dp import _terminal, _validate

    try:
        command = _validate.choice("command", arguments[0], COMMANDS)
    except ValueError as error:
        sys.exit(_terminal.report(str(error)))
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
    console = import_module("lowrank_dp.commands._console")
    console.run(import_module(f"lowrank_dp.commands.{command}").app, arguments[1:])


if __name__ == "__main__":
    main()
