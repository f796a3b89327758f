"""Rules of the code base: short ``__init__`` files, modules and functions, and no import cycle."""

import ast
import graphlib
from pathlib import Path

import lowrank_dp

ROOT = Path(lowrank_dp.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
MAX_FACE, MAX_FILE, MAX_BODY = 40, 400, 60
FACE = '''"""Say."""
import a
X = 1
def f(): ...
if TYPE_CHECKING:
    import b
'''


def where(path, node=None):
    return path.relative_to(ROOT.parent).as_posix() + (f":{node.lineno}" if node else "")


def is_typing_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def body_lines(function):
    """Lines of a function after its signature and its docstring."""
    body = function.body[ast.get_docstring(function) is not None :]
    return function.end_lineno - body[0].lineno + 1 if body else 0


def faces_with_more_than_names(path, tree):
    """Yield each statement of an ``__init__.py`` that is no docstring, import or assignment."""
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        plain = isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AugAssign)
        if not (docstring or plain or is_typing_only(node)):
            yield where(path, node)


def imports_of(path, tree):
    """Modules of the package that ``path`` imports when it is imported itself."""
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{where(path, node)}: a relative import"
            names = [(node.module, alias.name) for alias in node.names]
        for module, name in names:
            if not module.startswith("lowrank_dp"):
                continue
            inner = ROOT.parent.joinpath(*module.split("."), name or "__init__")
            for file in (inner.with_suffix(".py"), inner / "__init__.py"):
                if file in TREES:
                    yield file
                    break
            else:
                file = ROOT.parent.joinpath(*module.split("."))
                yield file / "__init__.py" if file.is_dir() else file.with_suffix(".py")


def test_a_face_is_short_and_lists_names():
    wrong = []
    for path, tree in TREES.items():
        if path.name == "__init__.py":
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > MAX_FACE:
                wrong.append(f"{where(path)}: {count} lines")
            wrong += faces_with_more_than_names(path, tree)
    assert not wrong, wrong


def test_no_file_is_long():
    counts = {where(path): path.read_text(encoding="utf-8").count("\n") for path in TREES}
    long = {name: count for name, count in counts.items() if count > MAX_FILE}
    assert not long, long


def test_no_function_is_long():
    long = {
        f"{where(path, node)} {node.name}": body_lines(node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MAX_BODY
    }
    assert not long, long


def test_no_circle_of_imports():
    graph = {path: {*imports_of(path, tree)} - {path} for path, tree in TREES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(where(path) for path in reversed(error.args[1]))
        raise AssertionError(f"imports in a circle: {circle}") from None


def test_home_folders_are_found_in_one_place():
    """pathlib raises RuntimeError for an unknown user, which no command line turns into a line."""
    found = [where(path) for path in TREES if "expanduser" in path.read_text(encoding="utf-8")]
    assert found == ["lowrank_dp/_validate.py"]


def test_nothing_is_left_to_do():
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X ")
    found = [
        f"{where(path)}:{number}"
        for path in TREES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not found, found


def test_the_checks_see_what_they_look_for():
    function = ast.parse(
        'def f():\n    """Say."""\n    a = 1\n    return (\n        a\n    )'
    ).body[0]
    assert body_lines(function) == 4
    face = ast.parse(FACE)
    assert [*faces_with_more_than_names(ROOT / "x.py", face)] == ["lowrank_dp/x.py:4"]
    seen = ast.parse("from lowrank_dp import data\nfrom lowrank_dp.data.tasks import load_task")
    assert [where(path) for path in imports_of(ROOT / "x.py", seen)] == [
        "lowrank_dp/data/__init__.py",
        "lowrank_dp/data/tasks.py",
    ]
