"""``python -m lowrank_dp.audit``: the command of :mod:`lowrank_dp.commands.audit`."""

import sys

from lowrank_dp.__main__ import main

main(["audit", *sys.argv[1:]])
