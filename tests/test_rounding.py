"""Printed bounds: rounded in one direction, by less than one unit of the last digit."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowrank_dp._rounding import rounded_down, rounded_up

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(finite, st.integers(1, 12))
@example(3.34140947, 4)
@example(9.9999, 4)
@example(0.1, 4)  # the float exceeds a tenth
@example(0.7, 4)  # the float is below seven tenths
@example(99999.5, 4)
@example(5e-324, 1)
@example(1.7976931348623157e308, 17)
def test_a_text_is_a_bound_within_one_unit_of_its_last_digit(value, digits):
    up, down = rounded_up(value, digits), rounded_down(value, digits)
    exact = Fraction(repr(value))  # the shortest decimal that reads as the float
    assert float(down) <= value <= float(up)
    unit = Fraction(10) ** (int(f"{value:.17e}".split("e")[1]) - digits + 1)
    assert 0 <= Fraction(up) - exact < unit and 0 <= exact - Fraction(down) < unit
    for text in (up, down):
        mantissa = text.split("e")[0].lstrip("-").replace(".", "").lstrip("0")
        assert len(mantissa.rstrip("0")) <= digits, text


@given(finite, st.integers(1, 12))
def test_a_number_of_few_digits_keeps_the_form_of_the_format_g(value, digits):
    value = float(f"{value:.{digits}g}")
    if math.isfinite(value) and (value == 0 or abs(value) > 1e-300):
        assert rounded_up(value, digits) == rounded_down(value, digits) == f"{value:.{digits}g}"


@pytest.mark.parametrize(
    ("value", "up", "down"),
    [
        (3.34140947, "3.342", "3.341"),
        (7.9994, "8", "7.999"),
        (8.0, "8", "8"),
        (0.00012341, "0.0001235", "0.0001234"),
        (12341.0, "1.235e+04", "1.234e+04"),
        (1e-5, "1e-05", "1e-05"),
        (-1.23456, "-1.234", "-1.235"),
        (math.inf, "inf", "inf"),
        (math.nan, "nan", "nan"),
    ],
)
def test_texts(value, up, down):
    assert (rounded_up(value), rounded_down(value)) == (up, down)
