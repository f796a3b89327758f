"""Imports between the parts of the package go in one direction, without exemptions."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_dp
from lowrank_dp._lazy import _typing_imports

ROOT = Path(lowrank_dp.__file__).parent
# a module imports only from those before it, and from its own package's inner modules
ORDER = (
    "_validate",
    "_rounding",
    "_terminal",
    "_lazy",
    "_json",
    "_options",
    "_hub",
    "losses",
    "rng",
    "artifacts",
    "theory",
    "data",
    "models",
    "grads",
    "privacy_loss",
    "accounting",
    "mechanism",
    "lora",
    "spectrum",
    "restore",
    "precondition",
    "optim",
    "evaluation",
    "membership",
    "train",
    "plan",
    "engines",
    "sweep",
    "mia",
    "audit",
    "experiments",
    "plots",
    "figures",
    "commands",
)
DOOR = "__main__"  # of every room: it stands above all of them


def imported(source, package):
    """The room of every import of ``lowrank_dp`` in a module of ``package``, for types too."""
    for node in ast.walk(ast.parse(source)):
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
                yield name.split(".")[1]


def violations(room, source, package):
    order = (*ORDER, DOOR)
    for target in imported(source, package):
        if target in (room, "__version__"):
            continue
        if target not in order or order.index(target) >= order.index(room):
            yield target


def test_direction():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):  # which loads a room when it is asked for
            continue
        room = DOOR if parts[-1] == DOOR else parts[0]
        assert room in (*ORDER, DOOR), f"add {room!r} to ORDER where it belongs"
        package = ".".join(["lowrank_dp", *parts[:-1]])
        for target in violations(room, path.read_text(), package):
            wrong.append(f"{'/'.join(parts)} comes before {target}")
    assert not wrong, wrong


def test_the_check_itself():
    for room, package, source, wrong in (
        ("grads", "lowrank_dp.grads", "from lowrank_dp import _validate, __version__", []),
        ("grads", "lowrank_dp.grads", "from lowrank_dp import restore", ["restore"]),
        ("grads", "lowrank_dp.grads", "def f():\n    import lowrank_dp.figures as x", ["figures"]),
        ("grads", "lowrank_dp.grads", "from lowrank_dp.grads.layers import x", []),
        ("grads", "lowrank_dp.grads", "from .layers import x\nfrom ..train import y", ["train"]),
        ("data", "lowrank_dp", "from . import models", ["models"]),
        ("train", "lowrank_dp", "from lowrank_dp.unheard import x", ["unheard"]),
        ("plots", "lowrank_dp.plots", "if TYPE_CHECKING:\n from lowrank_dp.mia import R", []),
        ("mia", "lowrank_dp.mia", "if TYPE_CHECKING:\n from lowrank_dp.plots import R", ["plots"]),
        ("experiments", "lowrank_dp.experiments", "from lowrank_dp.plots import R", ["plots"]),
        ("commands", "lowrank_dp.commands", "from lowrank_dp.__main__ import main", ["__main__"]),
        ("__main__", "lowrank_dp.lora", "from lowrank_dp.__main__ import main", []),
    ):
        assert list(violations(room, source, package)) == wrong, source


def test_light_imports():
    """One process tests all imports, the lightest first."""
    heavy = ("torch", "transformers", "peft", "opacus", "matplotlib")
    code = f"""
import sys
import lowrank_dp
print(*[name for name in {(*heavy, "scipy", "numpy")!r} if name in sys.modules])
print(lowrank_dp.theory.tv_bound(8, 100) > 0, "mechanism" in dir(lowrank_dp))
print(*[name for name in {heavy!r} if name in sys.modules])
import lowrank_dp.train.config, lowrank_dp.mia.options
lowrank_dp.train.config.TrainConfig(non_private=True)
print(*[name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "True True", "", ""]
    with pytest.raises(AttributeError, match="no attribute 'theroy'"):
        lowrank_dp.theroy  # noqa: B018


def test_lazy_faces_give_every_name_and_no_module_hides_one():
    seen = 0
    for path in sorted(ROOT.rglob("__init__.py")):
        if path == ROOT / "__init__.py" or "lazy(__name__)" not in path.read_text():
            continue
        package = ".".join(["lowrank_dp", *path.parent.relative_to(ROOT).parts])
        face = importlib.import_module(package)
        for name, module in _typing_imports(face).items():
            seen += 1
            assert name in face.__all__ and name in dir(face), (package, name)
            assert module != f"{package}.{name}", f"{package}: the module {name} hides the name"
            expected = getattr(importlib.import_module(module), name)
            assert getattr(face, name) is expected, (package, name)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            face.nothing  # noqa: B018
    assert seen > 50


def test_names_that_options_choose_from_are_those_that_are_defined():
    from lowrank_dp.restore import names, schemes

    assert tuple(schemes.SCHEMES) == names.SCHEME_NAMES
    assert schemes.EDGE_SCHEMES == names.EDGE_SCHEMES
    assert schemes.NON_PRIVATE_SCHEMES == names.NON_PRIVATE_SCHEMES
