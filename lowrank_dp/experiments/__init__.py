"""Experiments: one module per claim of the papers, from a frozen config to a frozen result.

Each module has ``run(config) -> Result``. No module here draws or saves:
:func:`lowrank_dp.artifacts.save_result` fills the field ``provenance`` of a result.
"""
