"""The built package, installed and used outside of the repository: commands, theory, a figure."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import lowrank_dp
from lowrank_dp.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
CODE = """
import lowrank_dp, sys
from lowrank_dp.theory import tv_bound, tv_exact
assert tv_exact(8, 768) < tv_bound(8, 768) < 0.06
assert "torch" not in sys.modules
from lowrank_dp.models import load_model
load_model("tiny", kind="classification", num_labels=2)
print(lowrank_dp.__version__, lowrank_dp.__file__)
"""


def run(*words, cwd):
    """Run a program without the repository on its path; return its exit code and its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    environment.pop("LOWRANK_DP_DATA", None)
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def built(folder):
    """Build the sdist, and the wheel from the sdist; return the wheel."""
    hatchling = (sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    code, said = run(*hatchling, cwd=ROOT)
    assert code == 0, f"{said}\n(`make install` adds hatchling)"
    (sdist,) = folder.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    code, said = run(*pip, "-w", folder, sdist, cwd=folder)
    assert code == 0, said
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel, folder):
    """Install the wheel beside this interpreter's other packages; return the new interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    code, said = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder
    )
    assert code == 0, said
    return python


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    assert lowrank_dp.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    dated = rf"^version: {re.escape(version)}\ndate-released: (.+)$"
    released = re.findall(dated, citation, re.MULTILINE)
    changes = re.findall(
        r"^## \[([\d.]+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released == [changes[0][1]] and changes[0][0] == version
    assert any(name.startswith("jupyter") for name in project["dependencies"])


@pytest.mark.slow
def test_the_wheel_of_the_sdist_works_in_an_empty_folder(tmp_path):
    (tmp_path / "dist").mkdir()
    wheel = built(tmp_path / "dist")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = subprocess.run(
        ["git", "ls-files", "lowrank_dp"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {*shipped} == {name for name in names if name.startswith("lowrank_dp/")}

    python, empty = installed(wheel, tmp_path / "venv"), tmp_path / "empty"
    empty.mkdir()
    code, said = run(python, "-c", CODE, cwd=empty)
    assert code == 0, said
    version, file = said.split()[-2:]
    assert version == lowrank_dp.__version__ and Path(file).is_relative_to(tmp_path / "venv")
    for command in COMMANDS:
        code, said = run(python, "-m", f"lowrank_dp.{command}", "--help", cwd=empty)
        assert code == 0 and "Usage" in said, (command, said)
    code, said = run(tmp_path / "venv" / "bin" / "lowrank-dp", "--version", cwd=empty)
    assert (code, said.strip()) == (0, version)

    words = (python, "-m", "lowrank_dp.figures")
    code, said = run(*words, "--only", "total_variation", "--output", "asked", cwd=empty)
    assert code == 0, said
    assert {path.name for path in empty.iterdir()} == {"asked", "paper_artifacts"}
    assert {path.suffix for path in (empty / "asked").iterdir()} == {".png", ".pdf"}
    # the wheel holds no saved results; for a figure of hours, the message says where they are
    code, said = run(*words, "--only", "steps_sst2", cwd=empty)
    assert code == 2 and said.count("\n") == 1, said
    assert "no result steps_sst2.json in paper_artifacts" in said and "--artifacts" in said
    words += ("--artifacts", ROOT / "paper_artifacts", "--output", "asked")
    code, said = run(*words, "--redraw", "--only", "steps_sst2", cwd=empty)
    assert code == 0 and (empty / "asked" / "steps_sst2.png").exists(), said
