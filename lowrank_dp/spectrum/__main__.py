"""``python -m lowrank_dp.spectrum``: the command of :mod:`lowrank_dp.commands.spectrum`."""

import sys

from lowrank_dp.__main__ import main

main(["spectrum", *sys.argv[1:]])
