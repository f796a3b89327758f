"""One module per claim of the papers: a frozen config in, a frozen result out.

Each module has ``run(config) -> Result``. Nothing here draws or saves:
:func:`lowrank_dp.artifacts.save_result` fills the field ``provenance`` of a result.
"""
