"""Membership inference: how much a checkpoint reveals about the records that it was trained on.

A checkpoint under attack (``target``) is loaded (``loading``) and run on its ``records``. The
``signals`` become ``scores``, the scores become ``metrics`` and lower bounds on ``epsilon``, and
the ``report`` states all of them with a ``verdict``. ``scores``, ``metrics`` and ``epsilon`` take
arrays alone and need numpy and scipy only. Importing this package imports none of its modules.
"""
