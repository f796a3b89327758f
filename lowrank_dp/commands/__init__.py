"""The command lines, one module per command: options in, one call into the package, text out.

Nothing in the package imports this package; ``lowrank_dp.__main__`` starts a command from it.
"""
