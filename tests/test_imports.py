"""Values walk through the package in one direction, and imports with them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_dp

ROOT = Path(lowrank_dp.__file__).parent
# a module imports only from those before it, and from its own package's inner modules
ORDER = (
    "_validate",
    "_terminal",
    "_lazy",
    "_options",
    "_json",
    "_hub",
    "losses",
    "rng",
    "artifacts",
    "theory",
    "data",
    "models",
    "grads",
    "accounting",
    "mechanism",
    "lora",
    "spectrum",
    "restore",
    "optim",
    "evaluation",
    "membership",
    "train",
    "engines",
    "sweep",
    "mia",
    "experiments",
    "plots",
    "figures",
    "commands",
)


def type_checking_nodes(tree):
    """Every node under ``if TYPE_CHECKING:``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from ast.walk(statement)


def imported(source, package):
    """(room, only for types) of every import of ``lowrank_dp`` in a module of ``package``."""
    tree = ast.parse(source)
    typing_only = {id(node) for node in type_checking_nodes(tree)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("lowrank_dp."):
                yield name.split(".")[1], id(node) in typing_only


def violations(room, source, package):
    for target, _ in imported(source, package):
        if target == room or target.startswith("__"):
            continue
        if target not in ORDER or ORDER.index(target) >= ORDER.index(room):
            yield target


FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.name != "__main__.py" and path != ROOT / "__init__.py"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_direction(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert parts[0] in ORDER, f"add {parts[0]!r} to ORDER where it belongs"
    package = ".".join(["lowrank_dp", *parts[:-1]])
    wrong = list(violations(parts[0], path.read_text(), package))
    assert not wrong, f"{parts[0]} comes before {', '.join(wrong)}"


@pytest.mark.parametrize(
    "room, package, source, wrong",
    [
        ("grads", "lowrank_dp.grads", "from lowrank_dp import _validate, __version__", []),
        ("grads", "lowrank_dp.grads", "from lowrank_dp import restore", ["restore"]),
        ("grads", "lowrank_dp.grads", "def f():\n    import lowrank_dp.figures as x", ["figures"]),
        ("grads", "lowrank_dp.grads", "from lowrank_dp.grads.layers import x", []),
        ("grads", "lowrank_dp.grads", "from .layers import x\nfrom ..train import y", ["train"]),
        ("data", "lowrank_dp", "from . import models", ["models"]),
        ("train", "lowrank_dp", "from lowrank_dp.unheard import x", ["unheard"]),
        (
            "plots",
            "lowrank_dp.plots",
            "if TYPE_CHECKING:\n from lowrank_dp.experiments import R",
            [],
        ),
        ("plots", "lowrank_dp.plots", "from lowrank_dp.experiments import R", []),
        ("experiments", "lowrank_dp.experiments", "from lowrank_dp.plots import R", ["plots"]),
    ],
)
def test_the_check_itself(room, package, source, wrong):
    assert list(violations(room, source, package)) == wrong


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("lowrank_dp", ("torch", "transformers", "peft", "opacus", "matplotlib", "scipy", "numpy")),
        ("lowrank_dp.theory", ("torch", "transformers", "peft", "opacus", "matplotlib")),
    ],
)
def test_light_imports(module, heavy):
    code = f"import sys, {module}; print(*[n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_lazy_submodules():
    code = "import lowrank_dp; print(lowrank_dp.theory.tv_bound(8, 100) > 0, dir(lowrank_dp))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True") and "'mechanism'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'theroy'"):
        lowrank_dp.theroy  # noqa: B018
