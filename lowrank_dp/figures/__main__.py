"""``python -m lowrank_dp.figures``: the command of :mod:`lowrank_dp.commands.figures`."""

import sys

from lowrank_dp.__main__ import main

main(["figures", *sys.argv[1:]])
