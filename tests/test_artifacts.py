"""Results, tables and figures on disk: round trips, atomicity, and damaged files."""

import csv
import json
import math
import os
import re
import stat
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

import lowrank_dp
from lowrank_dp import artifacts
from lowrank_dp.artifacts import results
from lowrank_dp.artifacts.files import atomic_write
from lowrank_dp.artifacts.provenance import provenance
from lowrank_dp.artifacts.results import load_result, save_result
from lowrank_dp.artifacts.tables import save_figure, save_table
from lowrank_dp.mechanism import NO_RECORDS, NON_PRIVATE
from lowrank_dp.plots.style import new_figure


@dataclass(frozen=True)
class Config:
    model: str = "minilm"
    sizes: tuple[int, ...] = (512, 1024)
    rate: float = 0.1


@dataclass(frozen=True)
class Result:
    config: Config
    values: np.ndarray
    labels: tuple[str, ...] = ("a", "b")
    flags: np.ndarray = field(default_factory=lambda: np.array([True, False]))
    score: float = 0.5
    note: str = "café ≤ 3"
    provenance: dict = field(default_factory=dict)
    missing: None = None


@dataclass(frozen=True)
class Other:
    score: float


@dataclass(frozen=True)
class Reserved:
    kind: str


@dataclass(frozen=True)
class Loose:
    value: object


def result(**changes):
    return Result(**{"config": Config(), "values": np.linspace(0, 1, 5), **changes})


def test_round_trip(tmp_path):
    values = np.array([[1.5, np.nan], [np.inf, 0]])
    given = result(
        config=Config("tiny", (3,), 1e-17),
        values=values,
        score=np.float64(1 / 3),
        provenance={"seed": 3, "nested": {"a": [1, 2]}},
    )
    path = save_result(given, tmp_path / "new" / "folder", "name.v1")
    assert path == tmp_path / "new" / "folder" / "name.v1.json"
    got = load_result(tmp_path / "new" / "folder", "name.v1", Result)
    np.testing.assert_array_equal(got.values, given.values)
    np.testing.assert_array_equal(got.flags, given.flags)
    assert got.flags.dtype == bool and got.config == given.config and got.labels == ("a", "b")
    assert got.score == 1 / 3 and got.note == given.note and got.missing is None
    assert got.provenance["seed"] == 3 and got.provenance["nested"]["a"] == [1, 2]
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1 and document["kind"] == "Result"
    assert document["arrays"] == ["flags", "values"] and "values" not in document
    assert sorted(p.name for p in path.parent.iterdir()) == ["name.v1.json", "name.v1.npz"]


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        path = save_result(result(), tmp_path, "r")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_atomic_write(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()
    assert path.read_bytes() == b"old"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"half of the n")
            file.flush()
            assert path.read_bytes() == b"old"
            raise error
        assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_cannot_be_saved_leaves_the_old_files(tmp_path):
    save_result(result(), tmp_path, "r")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for bad, words in (
        (result(values=np.array([object()])), "^values must be an array of numbers"),
        (result(score=math.nan), "not JSON compliant"),
        (Reserved("x"), "^result must be without a field 'kind'"),
        (Result, "^result must be a dataclass instance"),
        ({"a": 1}, "^result must be a dataclass"),
    ):
        with pytest.raises(ValueError, match=words):
            save_result(bad, tmp_path, "r")
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before, words


def test_disk_trouble(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/r\.npz could not be written \(.*(exists|directory)\)"):
        save_result(result(), tmp_path / "file", "r")


def test_a_disk_that_fills_up_leaves_both_old_files(monkeypatch, tmp_path):
    """The arrays of one result and the fields of another would be a wrong result."""
    save_result(result(), tmp_path, "r")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    written = results.atomic_write

    class Full:
        """A file whose buffered bytes do not fit on the disk."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def flush(self):
            raise OSError("No space left on device")

    @contextmanager
    def full(path, **options):
        with written(path, **options) as file:
            yield Full(file) if path.suffix == ".npz" else file

    monkeypatch.setattr(results, "atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        save_result(result(score=0.125), tmp_path, "r")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class Attack:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK_FOLDER"],)


def npz_with(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def corrupt_middle(folder):
    data = bytearray((folder / "r.npz").read_bytes())
    for i in range(40, len(data) - 200):
        data[i] ^= 0x5A
    (folder / "r.npz").write_bytes(data)


def change_json(folder, **changes):
    document = json.loads((folder / "r.json").read_text())
    document.update(changes)
    (folder / "r.json").write_text(json.dumps(document))


DAMAGES = (
    lambda f: (f / "r.npz").write_bytes((f / "r.npz").read_bytes()[:-30]),
    lambda f: (f / "r.npz").write_bytes((f / "r.npz").read_bytes()[:100]),
    lambda f: (f / "r.npz").write_bytes(b""),
    lambda f: (f / "r.npz").write_bytes(b"\x80\x04]."),
    corrupt_middle,
    lambda f: np.save((f / "r.npz").open("wb"), np.ones(3)),
    lambda f: npz_with(f / "r.npz", values=b"\x93NUMPY\x01\x00\x10\x00{'descr': nonsens"),
    lambda f: npz_with(f / "r.npz", values=b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535),
    lambda f: (f / "r.json").write_bytes((f / "r.json").read_bytes()[:-40]),
    lambda f: (f / "r.json").write_text(""),
    lambda f: (f / "r.json").write_bytes(b"\xff\xfe\x00"),
    lambda f: (f / "r.json").write_text("[" * 100000),
    lambda f: (f / "r.json").write_text("[1, 2]"),
    lambda f: (f / "r.json").write_text("null"),
    lambda f: change_json(f, schema_version=2),
    lambda f: change_json(f, kind="Other"),
    lambda f: change_json(f, config={"model": "a", "unknown": 1}),
    lambda f: npz_with(f / "r.npz"),
)


def test_damaged_files(tmp_path):
    for i, damage in enumerate(DAMAGES):
        save_result(result(), tmp_path, "r")
        damage(tmp_path)
        with pytest.raises(ValueError) as caught:
            load_result(tmp_path, "r", Result)
            pytest.fail(f"damage {i} was not noticed")
        assert str(caught.value).startswith(f"result {tmp_path / 'r.json'}"), i
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000, i


def test_the_files_of_two_results_are_not_one_result(tmp_path):
    """A process that is killed between its two files leaves the new fields and the old arrays."""
    save_result(result(values=np.zeros(5)), tmp_path, "r")
    old = (tmp_path / "r.npz").read_bytes()
    save_result(result(values=np.ones(5)), tmp_path, "r")
    (tmp_path / "r.npz").write_bytes(old)
    with pytest.raises(ValueError, match=r"r\.json is half written: r\.npz is of another result"):
        load_result(tmp_path, "r", Result)
    document = json.loads((tmp_path / "r.json").read_text())
    del document["arrays_sha256"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    assert not load_result(tmp_path, "r", Result).values.any()  # results of earlier versions


def test_pickles_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACK_FOLDER", str(tmp_path / "attacked"))
    save_result(result(), tmp_path, "r")
    np.savez(tmp_path / "r.npz", values=np.array([Attack()], dtype=object), flags=np.ones(2))
    with pytest.raises(ValueError, match="cannot be read"):
        load_result(tmp_path, "r", Result)
    assert not (tmp_path / "attacked").exists()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no result r\.json"):
        load_result(tmp_path, "r", Result)
    save_result(result(), tmp_path, "r")
    (tmp_path / "r.npz").unlink()
    with pytest.raises(FileNotFoundError, match="compute it first"):
        load_result(tmp_path, "r", Result)
    save_result(Other(1.0), tmp_path, "o")
    with pytest.raises(ValueError, match="must be a Result, got 'Other'"):
        load_result(tmp_path, "o", Result)


def test_provenance_without_folders(tmp_path, monkeypatch):
    secret = str(tmp_path / "secret" / "out")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *(str(tmp_path / "run.py"), "--output", secret),
            *(f"--model={secret}", "--seed=3", secret, "a b"),
        ],
    )
    found = provenance(seed=3, device="cuda")
    assert found["command"].endswith("--output out --model=out --seed=3 out 'a b'")
    text = json.dumps(found)
    assert str(tmp_path) not in text and os.getcwd() not in text
    assert os.path.expanduser("~") not in text
    assert found["seed"] == 3 and found["device"] == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the name of {device}")
    assert provenance(device="cuda:1")["gpu"] == "the name of cuda:1"
    assert "gpu" not in provenance()
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", [f"{os.getcwd()}/benchmarks/audit_bugs.py", "--output", "a"])
    assert provenance()["command"] == "python benchmarks/audit_bugs.py --output a"
    assert found["versions"]["numpy"] == np.__version__
    assert found["time"].endswith("+00:00") and found["git_commit"]
    save_result(Loose(found), tmp_path, "p")
    assert load_result(tmp_path, "p", Loose).value == found


@dataclass(frozen=True)
class Stamped:
    score: float
    provenance: dict = field(default_factory=dict)


def test_an_empty_provenance_is_filled_and_a_loaded_one_stays(tmp_path):
    first = save_result(Stamped(0.5), tmp_path, "r", seed=3, device="cuda").read_bytes()
    loaded = load_result(tmp_path, "r", Stamped)
    assert loaded.provenance["seed"] == 3 and loaded.provenance["device"] == "cuda"
    assert loaded.provenance["command"] and loaded.provenance["time"].endswith("+00:00")
    assert save_result(loaded, tmp_path, "r", seed=4).read_bytes() == first


def test_json_files_are_read_in_one_way(tmp_path):
    path = tmp_path / "a.json"
    for text, limits, words in (
        ("[1]", {}, f"{path} must hold a JSON object, got list"),
        ("{", {}, f"{path} must be JSON ("),
        ("[" * 100_000, {}, f"{path} must be JSON ("),
        ('{"a": 1}', {"max_bytes": 7}, f"{path} must have at most 7 bytes, got 8"),
        ('{"a": 1, "a": 2}', {"strict": True}, "the name 'a' occurs twice"),
        ('{"a": NaN}', {"strict": True}, "NaN is not a finite number"),
        ('{"a": 1e999}', {"strict": True}, "1e999 is not a finite number"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            artifacts.read_json(path, **limits)
        assert "\n" not in str(caught.value), text
    path.write_text('{"a": 1, "a": 2, "b": NaN}')
    assert artifacts.read_json(path)["a"] == 2
    with pytest.raises(FileNotFoundError):
        artifacts.read_json(tmp_path / "none.json")


def test_changes_since_the_commit_are_stated(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, check=True)
        return done.stdout.decode().strip()

    module = tmp_path / "package" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(lowrank_dp, "__file__", str(module))
    installed = tmp_path / "venv" / "__init__.py"  # inside the checkout, and not tracked
    installed.parent.mkdir()
    installed.write_text("")
    with monkeypatch.context() as other:
        other.setattr(lowrank_dp, "__file__", str(installed))
        assert provenance()["git_commit"] == "unknown"
    assert provenance()["git_commit"] == git("rev-parse", "HEAD")
    module.write_text("changed = True")
    assert provenance()["git_commit"] == git("rev-parse", "HEAD") + "+changes"


def test_commit_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_commit"] == "unknown"


def test_tables(tmp_path):
    columns = ["name", "50% & more|less"]
    rows = [["a|b, c", 0.5], ['say "x"_1 {y}', r"\alpha^2 ~ #3 $5"], ["< 2", "> 1"]]
    paths = save_table(columns, rows, tmp_path, "t", caption="Score_1 in %")
    assert [p.name for p in paths] == ["t.csv", "t.md", "t.tex"]
    with paths[0].open(newline="") as file:
        assert list(csv.reader(file)) == [columns, *[[str(c) for c in row] for row in rows]]
    lines = paths[1].read_text().splitlines()
    assert lines[0] == "Score_1 in %" and lines[2] == r"| name | 50% & more\|less |"
    assert lines[3] == "|---|---|" and lines[4] == r"| a\|b, c | 0.5 |" and len(lines) == 7
    tex = paths[2].read_text()
    assert r"\caption{Score\_1 in \%}" in tex and r"\begin{tabular}{ll}" in tex
    assert r"name & 50\% \& more|less \\" in tex and r"a|b, c & 0.5 \\" in tex
    assert (
        r'say "x"\_1 \{y\} & \textbackslash{}alpha\textasciicircum{}2 \textasciitilde{} '
        r"\#3 \$5 \\"
    ) in tex
    assert r"\textless{} 2 & \textgreater{} 1 \\" in tex  # "<" is an exclamation mark in OT1
    with pytest.raises(ValueError, match=r"^rows must each have 2 cells"):
        save_table(columns, [["a"]], tmp_path, "t", caption="")
    assert paths[2].read_text() == tex


def test_figures(tmp_path):
    figure, axes = new_figure(1, 2, width=3.0, height=2.0)
    axes[0, 0].plot([0, 1], [1, 0])
    axes[0, 0].set_xlabel("singular value σ")
    png, pdf = save_figure(figure, tmp_path / "figures", "f")
    with Image.open(png) as image:
        assert image.size == (600, 400)
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF") and b"/FontFile2" in data  # embedded as TrueType
    assert b"/CIDFontType2" in data and b"/Type3" not in data
    assert b"/CreationDate" not in data
    again = save_figure(figure, tmp_path / "again", "f")[1]
    assert again.read_bytes() == data
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["f.pdf", "f.png"]
    assert b"/Subject" not in data
    png, pdf = save_figure(figure, tmp_path / "marked", "f", privacy=NON_PRIVATE)
    with Image.open(png) as image:
        assert image.info["Description"] == NON_PRIVATE and image.info["Title"] == "f"
    assert f"/Subject ({NON_PRIVATE})".encode() in pdf.read_bytes()


def test_markers():
    assert "NON-PRIVATE" in NON_PRIVATE and "no private records" in NO_RECORDS


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    abandoned, other = tmp_path / ".a[1].json.x9_2abcd", tmp_path / ".b.json.x9_2abcd"
    for path in (abandoned, other):
        path.write_text("half")
    with artifacts.atomic_write(tmp_path / "a[1].json") as first:
        first.write(b"1")
        with artifacts.atomic_write(tmp_path / "a[1].json") as second:  # at work at the same time
            second.write(b"2")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", other.name}
    assert (tmp_path / "a[1].json").read_text() == "1"
