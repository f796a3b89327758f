"""Check that bad input raises ValueError, for loops over many cases; a failure names the case."""

import re

import pytest


def refused(words, function, *arguments, **options):
    """Check that a call raises a ValueError of one line whose message matches ``words``."""
    case = f"{getattr(function, '__name__', function)}, {arguments}, {options}"
    try:
        function(*arguments, **options)
    except ValueError as error:
        message = str(error)
    else:
        pytest.fail(f"{case} was accepted; expected a refusal that matches {words!r}")
    assert re.search(words, message), f"{case} was refused with {message!r}, not {words!r}"
    assert "\n" not in message, f"{case} was refused with several lines: {message!r}"
