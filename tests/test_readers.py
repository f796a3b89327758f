"""Readers against hostile files: 1,000 per reader, each read or refused in one line.

The reader of membership.json is fuzzed in test_mia_records.
"""

import ast
import gzip
import json
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowrank_dp
from lowrank_dp import artifacts
from lowrank_dp.artifacts import runs
from lowrank_dp.data import Task, formats, load_task
from lowrank_dp.mia import given_files
from lowrank_dp.models.backbones import find_backbone
from lowrank_dp.train import TrainConfig, TrainResult, load_result
from tests.refusals import refused

thousand = settings(
    max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "tiny", 10**400, -1, 2**63, "\ud800", "inf", 0, 1, 0.5])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


def one_line(read, expected):
    """Check that ``read()`` returns an ``expected``, or raises a one-line ValueError or OSError."""
    try:
        found = read()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and len(str(error)) < 4000
        return
    assert isinstance(found, expected)


def spoil(draw, content):
    """Truncate a valid file, or overwrite, remove or insert some of its bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 1, 2, 40, len(content)]))
        content = content[:start] + draw(st.binary(max_size=4)) + content[start + length :]
    return content


def mutate(draw, document):
    """Replace or remove some fields of a document, at any depth."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        place, key = document, draw(st.sampled_from(sorted(document) or ["x"]))
        while isinstance(place.get(key), dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        if draw(st.integers(0, 4)) == 0:
            place.pop(key, None)
        else:
            place[key] = draw(values)
    return document


CONFIG = TrainConfig(epsilon=2.0, scheme="truncate", scheme_options={"k": 2}, filter_b=(0.5,))
RESULT = artifacts.to_jsonable(
    TrainResult(
        config=CONFIG,
        epsilon=2.0,
        delta=1e-5,
        releases=50,
        privacy="some",
        noise_multiplier=1.0,
        sample_rate=0.1,
        curve=({"step": 0, "loss": 0.5, "seconds": 0.0},),
        seconds=1.0,
        restore_seconds=0.1,
        train_loss=0.4,
        majority=0.5,
        description="tiny",
        provenance={"a": [1]},
    )
)


@pytest.mark.slow
@thousand
@given(draw=st.data())
def test_configurations(draw):
    document = (
        draw.draw(values)
        if draw.draw(st.integers(0, 9)) == 0
        else mutate(draw.draw, CONFIG.as_json())
    )
    one_line(lambda: TrainConfig.from_json(document), TrainConfig)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.slow
@thousand
@given(draw=st.data())
def test_results_of_runs(folder, draw):
    content = json.dumps(mutate(draw.draw, RESULT)).encode()
    if draw.draw(st.booleans()):
        content = spoil(draw.draw, content)
    (folder / runs.TRAINING).write_bytes(content)
    one_line(lambda: load_result(folder), TrainResult)


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    inner: Inner
    rate: float | None
    table: tuple[tuple[float, str], ...]
    notes: dict
    array: np.ndarray


@pytest.mark.slow
@thousand
@given(draw=st.data())
def test_artifacts(folder, draw):
    given_ = Result(Inner("a", (1, 2)), 0.5, ((1.0, "x"),), {"a": [1]}, np.arange(4.0))
    path = artifacts.save_result(given_, folder, "r")
    if draw.draw(st.booleans()):
        document = mutate(draw.draw, json.loads(path.read_bytes()))
        path.write_text(json.dumps(document))
    else:
        damaged = draw.draw(st.sampled_from([path, path.with_suffix(".npz")]))
        damaged.write_bytes(spoil(draw.draw, damaged.read_bytes()))
    one_line(lambda: artifacts.load_result(folder, "r", Result), Result)


ROWS = [{"idx": i, "sentence": f"a film {i}", "label": i % 2} for i in range(4)]
TABLES = [
    {"meaning_representation": f"name[{i}]", "human_reference": f"it is {i}"} for i in range(4)
]
TRIPLES = [{"tripleset": [["a", "b", "c"]], "annotations": {"text": ["d"]}} for _ in range(3)]


@pytest.mark.slow
@thousand
@given(draw=st.data())
def test_data(folder, draw):
    rows = [
        mutate(draw.draw, row) if draw.draw(st.integers(0, 2)) == 0 else row
        for row in draw.draw(st.sampled_from([ROWS, TABLES, TRIPLES]))
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if draw.draw(st.booleans()):
        content = spoil(draw.draw, content)
    name = draw.draw(st.sampled_from(["own.jsonl", "own.jsonl.gz"]))
    if name.endswith(".gz"):
        content = gzip.compress(content)
        if draw.draw(st.booleans()):
            content = spoil(draw.draw, content)
    (folder / name).write_bytes(content)
    one_line(lambda: load_task(str(folder / name)), Task)


def test_files_of_any_size_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(artifacts.results, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(artifacts.files, "MAX_JSON_BYTES", 1 << 20)
    line = json.dumps(ROWS[0] | {"sentence": "x" * 1000}) + "\n"
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wt") as file:
        for _ in range(20_000):
            file.write(line)
    with gzip.open(tmp_path / "line.jsonl.gz", "wb") as file:
        file.write(b"[" * (20 << 20))
    with (tmp_path / runs.TRAINING).open("wb") as file:
        file.truncate(2 << 20)
    np.savez_compressed(tmp_path / "r.npz", array=np.zeros(10 << 20))
    (tmp_path / "r.json").write_text("{}")
    tracemalloc.start()
    for read, words in (
        (lambda: load_task(str(tmp_path / "bomb.jsonl.gz")), "at most 1,048,576 bytes"),
        (lambda: load_task(str(tmp_path / "line.jsonl.gz")), "longer than 1,048,576"),
        (lambda: load_result(tmp_path), "at most 1,048,576 bytes"),
        (lambda: artifacts.load_result(tmp_path, "r", Result), "more than 1,048,576"),
    ):
        with pytest.raises(ValueError, match=words):
            read()
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_the_home_folder_of_an_unknown_user_is_one_line():
    path = "~no-such-user/x"
    for name, read in (
        ("task", lambda: load_task(path)),
        ("data_dir", lambda: load_task("sst2", data_dir=path)),
        ("model", lambda: find_backbone(path)),
        ("output", lambda: runs.open_run(path).__enter__()),
        ("members", lambda: given_files.read_file(Path(path), "members", None)),
        ("precondition", lambda: TrainConfig(non_private=True, precondition=path)),
    ):
        refused(f"^{name} must be a path without ~, or with ~ of a user .*no-such-user", read)


# --- what would run code ------------------------------------------------------------------------

MODULES = ("pickle", "cPickle", "dill", "marshal", "shelve", "joblib.load", "cloudpickle")
CALLS = (
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "joblib.load",
    "yaml.load",
    "yaml.unsafe_load",
)
FLAGS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def dangers(source):
    """Yield calls and imports that could execute the content of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            for name in (module, *names, *(f"{module}.{name}" for name in names)):
                if name in MODULES:
                    yield f"line {node.lineno}: import {name}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield f"line {node.lineno}: {name}"
            given_ = {word.arg: word.value for word in node.keywords}
            for flag, value in FLAGS.items():
                found = given_.get(flag)
                if found is not None and not (
                    isinstance(found, ast.Constant) and found.value is not value
                ):
                    yield f"line {node.lineno}: {flag}={ast.unparse(found)}"
            loads = name.endswith((".from_pretrained", ".from_config"))
            if loads and not name.startswith("peft.") and "trust_remote_code" not in given_:
                yield f"line {node.lineno}: {name} without trust_remote_code=False"
            if name.endswith(("np.load", "numpy.load")) and "allow_pickle" not in given_:
                yield f"line {node.lineno}: np.load without allow_pickle=False"


PACKAGE = Path(lowrank_dp.__file__).parent


def test_nothing_that_was_read_is_run():
    found = {
        path.relative_to(PACKAGE).as_posix(): list(dangers(path.read_text()))
        for path in PACKAGE.rglob("*.py")
    }
    assert len(found) > 100
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_the_check_itself():
    for source in (
        "import pickle",
        "from pickle import load",
        "from joblib import load",
        "torch.load(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "eval(x)",
        "AutoModel.from_pretrained(m, trust_remote_code=flag)",
        "AutoModel.from_pretrained(m)",  # transformers would ask on stdout, and then run it
        "auto.from_config(c, **options)",
        "def f():\n  exec(x)",
        "os.system('ls')",
        "load(f, weights_only=False)",
    ):
        assert list(dangers(source)), source
    for source in (
        "AutoModel.from_pretrained(m, trust_remote_code=False, **options)",
        "peft.PeftModel.from_pretrained(m, f)",
    ):
        assert not list(dangers(source)), source
