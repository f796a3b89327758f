"""The generated tables of README.md and of the claim index are up to date."""

from tests.readme_map import INDEX, PACKAGE, README, index, modules_of, written
from tests.test_imports import ORDER


def test_the_table_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert text == written(text), "the table of modules in README.md is out of date: run `make map`"
    text = INDEX.read_text(encoding="utf-8")
    assert text == index(text), "the table of larger models is out of date: run `make map`"


def test_every_module_is_in_the_table():
    listed = {path for room in ORDER for path in modules_of(room)}
    faces = {PACKAGE / "__init__.py", *(PACKAGE / room / "__init__.py" for room in ORDER)}
    inner = {path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"}
    assert inner - faces == listed
