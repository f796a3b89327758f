"""Two thousand damaged inputs to command lines: each exits with 0, or with 2 and one line.

Configurations, data files, checkpoints, manifests, snapshots and ledgers are changed in one place,
in their structure or in their bytes. A run that is refused leaves its output folder unchanged.
"""

import hashlib
import json
import random
import shutil
import traceback
import warnings
from collections import Counter
from dataclasses import replace

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_dp.commands import _console
from lowrank_dp.commands.mia import app as mia
from lowrank_dp.commands.train import app as train_app
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.loop import train
from tests.tasks import write_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]

ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    10**30,
    10**400,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "\u0000",
    "\ud800",
    "é\n",
    [],
    [1],
    ["x"],
    [[]],
    {},
    {"a": 1},
    {"a": [None]},
    "../x",
    "~nobody/x",
    "a" * 5000,
)
ROWS = [
    {
        "text": f"the film number {i} is {('dull', 'fresh')[i % 2]} .",
        "label": i % 2,
        "who": f"u{i // 2}",
    }
    for i in range(24)
]


def odd_structure(document, rng):
    """Return ``document`` with one value replaced, removed or renamed, at any depth."""
    place = document = json.loads(json.dumps(document))
    while True:
        name = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[name], dict | list) and place[name] and rng.random() < 0.7):
            break
        place = place[name]
    if isinstance(place, dict) and rng.random() < 0.2:
        del place[name]
    elif isinstance(place, dict) and rng.random() < 0.1:
        place[f"{name}2"] = place.pop(name)
    else:
        place[name] = rng.choice(ODD)
    return document


def odd_bytes(data, rng):
    """Return ``data`` with bytes removed, overwritten or inserted, at one to three places."""
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(data) + 1)
        data = (
            data[:start]
            + rng.randbytes(rng.randrange(4))
            + data[start + rng.choice([0, 1, 2, 40, len(data)]) :]
        )
    return data


def odd_json(data, rng):
    if rng.random() < 0.25:
        return odd_bytes(data, rng)
    return json.dumps(odd_structure(json.loads(data), rng)).encode()


def odd_lines(data, rng):
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    if rng.random() < 0.2:
        lines.insert(number, rng.choice(lines))
    else:
        lines[number] = odd_json(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def odd_tensors(path, rng):
    """Damage a safetensors file: a tensor is missing, added, or of another shape, type or value."""
    if rng.random() < 0.4:
        return path.write_bytes(odd_bytes(path.read_bytes(), rng))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    change = rng.randrange(6)
    if change == 1:
        tensors["other." + name] = tensor
    elif change > 1:
        tensors[name] = (
            tensor[..., :-1].contiguous()
            if change == 2 and tensor.ndim
            else tensor.to(torch.int32)
            if change == 3
            else torch.full_like(tensor, float("nan"))
            if change == 4 and tensor.is_floating_point()
            else torch.zeros(0)
        )
    save_file(tensors, path)


def contents(folder):
    """Hash of every file below a folder; None if there is no folder."""
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


class Trial:
    """Runs commands in this process, and records each command that does not end as it should."""

    def __init__(self, capsys):
        self.capsys, self.codes, self.wrong = capsys, Counter(), []

    def __call__(self, app, arguments, what, output):
        before, code = contents(output), None
        self.capsys.readouterr()
        try:
            with warnings.catch_warnings():
                _console.run(app, [str(word) for word in arguments])
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.wrong.append((what, repr(error)[:200], f"{place.filename}:{place.lineno}"))
            return None
        said = self.capsys.readouterr().err
        lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
        one_line = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1500
        if not ((code == 2 and one_line) or (code == 0 and not lines)):
            self.wrong.append((what, code, said[:2000]))
        if code == 2 and contents(output) != before:
            self.wrong.append((what, said[:300], "the output folder has changed"))
        self.codes[code] += 1
        return code

    def check(self, fewest_refused):
        assert not self.wrong, f"{len(self.wrong)} went wrong, such as {self.wrong[:3]}"
        assert self.codes[2] >= fewest_refused, self.codes


@pytest.fixture
def trial(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    return Trial(capsys)


@pytest.fixture(scope="module")
def made(small_bert, tmp_path_factory):
    """Return data in every format, two finished runs and a killed run; tests copy them."""
    import datasets

    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "data"
    for place, text in (("jsonl", "text"), ("named/glue/sst2", "sentence")):
        for split in ("train", "validation"):
            rows = [{(text if k == "text" else k): v for k, v in row.items()} for row in ROWS]
            write_jsonl(data / place / f"{split}.jsonl", rows)
    table = pandas.DataFrame(ROWS)
    table.to_csv(data / "a.csv", index=False)
    table.to_csv(data / "a.tsv", index=False, sep="\t")
    table.to_json(data / "a.json", orient="records")
    table.to_parquet(data / "a.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(data / "saved")

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LOWRANK_DP_DATA", str(data / "named"))
        recipe = TrainConfig(
            model=str(small_bert),
            task="sst2",
            steps=2,
            batch_size=4,
            noise_multiplier=1.0,
            seed=1,
            membership="half",
            snapshot_every=1,
        )
        train(recipe, folder / "full", show_progress=False)
        train(replace(recipe, method="lora"), folder / "lora", show_progress=False)
        patch.setattr("lowrank_dp.train.loop.save_run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder / "killed", show_progress=False)
    return folder


CONFIG = {
    "steps": 2,
    "batch_size": 512,
    "noise_multiplier": 1.0,
    "seed": 1,
    "delta": 1e-3,
    "learning_rate": 1e-3,
    "scheme": "optimal",
    "scheme_options": {"k": 2},
    "filter_b": [0.5],
    "method": "lora",
    "target_modules": ["query"],
    "text_column": "text",
    "beta1": None,
    "label_column": "label",
    "group_column": "who",
    "unit": "group",
    "max_examples": 20,
}


def test_configurations(made, small_bert, tmp_path, trial):
    rng = random.Random(1)
    base = (
        TrainConfig(non_private=True).as_json()
        | CONFIG
        | {"model": str(small_bert), "task": str(made / "data" / "jsonl")}
    )
    file, output = tmp_path / "config.json", tmp_path / "out"
    for _ in range(700):
        content = odd_json(json.dumps(base).encode(), rng)
        file.write_bytes(content)
        trial(train_app, ["--config", file, "--output", output], content[-3000:], output)
        shutil.rmtree(output, ignore_errors=True)
    trial.check(500)


def test_data_files(made, small_bert, tmp_path, trial):
    """The batch is larger than the data, so that the command refuses a readable file too."""
    rng = random.Random(2)
    shutil.copytree(made / "data", data := tmp_path / "data")
    shutil.rmtree(data / "named")
    output, changes = tmp_path / "out", {".jsonl": odd_lines, ".json": odd_json}
    for path in sorted(p for p in data.rglob("*") if p.is_file()):
        task = next(p for p in (path, *path.parents) if p.parent == data)
        good = path.read_bytes()
        for _ in range(70):
            content = changes.get(path.suffix, odd_bytes)(good, rng)
            path.write_bytes(content)
            trial(
                train_app,
                [
                    "--model",
                    small_bert,
                    "--task",
                    task,
                    "--non-private",
                    "--output",
                    output,
                    "--group-column",
                    "who",
                ],
                (path, content),
                output,
            )
            path.write_bytes(good)
    trial.check(500)


def test_checkpoints(made, tmp_path, trial):
    """Manifests, results, heads, configurations, weights and tokenizers, in a plan of an attack."""
    rng = random.Random(3)
    for name in ("full", "lora"):
        shutil.copytree(made / name, tmp_path / name)
        for path in sorted((tmp_path / name).glob("*")):
            if not path.is_file() or path.suffix not in (".json", ".safetensors"):
                continue
            good = path.read_bytes()
            for _ in range(120 if path.name in ("membership.json", "training.json") else 25):
                if path.suffix == ".json":
                    path.write_bytes(odd_json(good, rng))
                else:
                    odd_tensors(path, rng)
                trial(
                    mia,
                    [
                        "--model",
                        tmp_path / name,
                        "--data-dir",
                        made / "data" / "named",
                        "--dry-run",
                        "--output",
                        tmp_path / "report",
                    ],
                    (path, path.read_bytes()[:3000]),
                    tmp_path / "report",
                )
                path.write_bytes(good)
    trial.check(300)


def test_killed_runs(made, small_bert, tmp_path, trial, monkeypatch):
    """A run that resumes from damaged snapshots or ledger finishes; a refused run stays intact."""
    monkeypatch.setenv("LOWRANK_DP_DATA", str(made / "data" / "named"))
    rng, run = random.Random(4), tmp_path / "run"
    names = sorted(p.name for p in (made / "killed" / "snapshots").iterdir())
    for number in range(60):
        shutil.copytree(made / "killed", run)
        path = run / "snapshots" / names[number % len(names)]
        if path.suffix == ".safetensors":
            odd_tensors(path, rng)
        else:
            path.write_bytes(
                (odd_json if path.suffix == ".json" else odd_lines)(path.read_bytes(), rng)
            )
        trial(
            train_app,
            [
                "--resume",
                "--model",
                small_bert,
                "--task",
                "sst2",
                "--steps",
                "2",
                "--batch-size",
                "4",
                "--noise-multiplier",
                "1.0",
                "--seed",
                "1",
                "--membership",
                "half",
                "--snapshot-every",
                "1",
                "--output",
                run,
            ],
            (path, path.read_bytes()[:3000]),
            run,
        )
        shutil.rmtree(run)
    trial.check(10)
