"""Membership inference: how much a checkpoint reveals about who was trained on.

A checkpoint under attack (``target``) is loaded (``loading``) and run on its ``records``; the
``signals`` become ``scores``, the scores ``metrics`` and lower bounds on ``epsilon``, and these a
``report`` with a ``verdict``. ``scores``, ``metrics`` and ``epsilon`` take arrays alone and need
numpy and scipy only. Importing this package imports none of its modules.
"""
