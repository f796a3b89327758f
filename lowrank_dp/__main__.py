"""The console script ``lowrank-dp`` and ``python -m lowrank_dp``: one subcommand a module."""

from __future__ import annotations

import sys
from importlib import import_module

from lowrank_dp import __version__, _terminal, _validate

COMMANDS = {
    "spectrum": ("lowrank_dp.commands.spectrum", "measure the spectra of a model's gradients"),
    "restore": ("lowrank_dp.commands.restore", "restore noisy gradients in a file"),
    "lora": ("lowrank_dp.commands.lora", "measure LoRA's implicit noise on real layers"),
    "train": ("lowrank_dp.commands.train", "differentially private fine-tuning"),
    "mia": ("lowrank_dp.commands.mia", "membership inference from a checkpoint"),
    "figures": ("lowrank_dp.commands.figures", "draw the papers' figures"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand; only its own module is imported."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"lowrank-dp {__version__}: what low rank does for private fine-tuning, and what "
            "noise does to low rank\n\nusage: lowrank-dp COMMAND [OPTIONS]   "
            "(lowrank-dp COMMAND --help)\n"
        )
        print("\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()))
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    try:
        module, _ = COMMANDS[_validate.choice("command", arguments[0], COMMANDS)]
    except ValueError as error:
        sys.exit(_terminal.report(str(error)))
    _terminal.run(import_module(module).app, arguments[1:])


if __name__ == "__main__":
    main()
