"""Command lines, one module per command, which reads options, calls the package, prints text.

No other module imports this package, except ``lowrank_dp.__main__``, which starts a command.
"""
