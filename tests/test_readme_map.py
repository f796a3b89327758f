"""README's table of modules says what the code says."""

from tests.readme_map import PACKAGE, README, modules_of, written
from tests.test_imports import ORDER


def test_the_table_is_the_code_s():
    text = README.read_text(encoding="utf-8")
    assert text == written(text), "README's table of modules is out of date: run `make map`"


def test_every_module_is_in_the_table():
    listed = {path for room in ORDER for path in modules_of(room)}
    inner = {
        path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
    }
    assert inner == listed
