"""``python -m lowrank_dp.train``: the command of :mod:`lowrank_dp.commands.train`."""

import sys

from lowrank_dp.__main__ import main

main(["train", *sys.argv[1:]])
