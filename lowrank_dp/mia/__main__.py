"""``python -m lowrank_dp.mia``: the command of :mod:`lowrank_dp.commands.mia`."""

import sys

from lowrank_dp.__main__ import main

main(["mia", *sys.argv[1:]])
