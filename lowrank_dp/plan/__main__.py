"""``python -m lowrank_dp.plan``: the command of :mod:`lowrank_dp.commands.plan`."""

import sys

from lowrank_dp.__main__ import main

main(["plan", *sys.argv[1:]])
