"""``python -m lowrank_dp.lora``: the command of :mod:`lowrank_dp.commands.lora`."""

import sys

from lowrank_dp.__main__ import main

main(["lora", *sys.argv[1:]])
