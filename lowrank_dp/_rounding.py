"""Text of a bound, rounded in the direction in which the text is still a bound.

The digits and the form of a text are those of the format ``g``. A float stands for its shortest
decimal: 0.7 is rounded to "0.7" in both directions. The text, read as a float, is therefore on the
right side of the value.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context


def rounded_up(value: float, digits: int = 4) -> str:
    """Return the smallest number >= ``value`` with at most ``digits`` >= 1 significant digits.

    >>> rounded_up(3.34140947), rounded_up(7.9999), rounded_up(8.0)
    ('3.342', '8', '8')
    """
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int = 4) -> str:
    """Return the largest number <= ``value`` with at most ``digits`` >= 1 significant digits.

    >>> rounded_down(0.76328), rounded_down(1.99999, 3)
    ('0.7632', '1.99')
    """
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return f"{value:g}"
    context = Context(prec=digits, rounding=rounding)
    number = context.normalize(context.create_decimal(repr(float(value))))
    exponent = number.adjusted()
    if -5 < exponent < digits:
        return f"{number:f}"
    return f"{number.scaleb(-exponent, context):f}e{exponent:+03d}"
