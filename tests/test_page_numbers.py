"""Every number of README.md, the pages and the claim index has a result or a definition."""

import re

from tests.page_numbers import (
    DEFINITIONS,
    PAGES,
    ROOT,
    definitions_of,
    is_source,
    numbers,
    unsourced,
)

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def changed(number):
    """Change the last digit of a number, before a percent sign or an exponent."""
    digit = list(re.finditer(r"\d(?=\D|$)", number))[0 if "e" in number else -1]
    return f"{number[: digit.start()]}{(int(digit[0]) + 5) % 10}{number[digit.end() :]}"


def test_every_number_has_a_source():
    for page, text in TEXTS.items():
        assert unsourced(text, definitions_of(page)) == [], page


def test_every_definition_is_needed():
    for page in DEFINITIONS:
        found = {number for number, _ in unsourced(TEXTS[page])}
        assert definitions_of(page) <= found, page
        assert sum(len(text.split()) for text in DEFINITIONS[page].values()) == len(
            definitions_of(page)
        ), page


def test_a_changed_digit_of_a_page_is_noticed():
    for page, old, new in (
        ("README.md", "0.630 for the restored", "0.650 for the restored"),
        ("docs/guide.md", "8.8 ± 1.4 steps more", "8.9 ± 1.4 steps more"),
        ("docs/guide.md", "15 of 38 layers", "14 of 38 layers"),
        ("docs/findings/membership.md", "| 0.684 ± 0.066", "| 0.684 ± 0.067"),
        ("docs/findings/restoration.md", "is 0.781 with DP-Adam", "is 0.771 with DP-Adam"),
        ("docs/how-to/clusters.md", "took\n1.98 s", "took\n1.97 s"),
        ("paper_artifacts/README.md", "1.24 times the steps", "1.34 times the steps"),
    ):
        assert TEXTS[page].count(old) == 1, (page, old)
        found = unsourced(TEXTS[page].replace(old, new), definitions_of(page))
        assert len(found) == 1, (page, new, found)


def test_most_changed_digits_of_all_pages_are_noticed():
    """A changed digit is not noticed if the same results hold the changed number too."""
    total = missed = 0
    for text in TEXTS.values():
        for number, _, sources in numbers(text):
            if len(re.sub(r"\D|^0\.0*", "", number)) < 3 or not any(
                is_source(name, number) for name in sources
            ):
                continue
            total += 1
            missed += any(is_source(name, changed(number)) for name in sources)
    assert total > 400 and missed < 0.08 * total, (missed, total)
