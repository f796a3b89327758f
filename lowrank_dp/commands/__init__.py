"""Command lines, one module per command.

A command reads its options, calls the package once, and prints text or JSON. No other module
imports this package, except ``lowrank_dp.__main__``, which starts a command.
"""
