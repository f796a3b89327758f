"""``python -m lowrank_dp.restore``: the command of :mod:`lowrank_dp.commands.restore`."""

import sys

from lowrank_dp.__main__ import main

main(["restore", *sys.argv[1:]])
