"""``lowrank-dp train`` as a user runs it: results, exit codes, one line on bad input."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from lowrank_dp.__main__ import main
from lowrank_dp.commands import _console
from lowrank_dp.commands.figures import Options as Figures
from lowrank_dp.commands.lora import Options as Lora
from lowrank_dp.commands.spectrum import Options as Spectrum
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.mia.options import Options as Attack
from lowrank_dp.models import load_model
from lowrank_dp.train import TrainConfig, load_result
from lowrank_dp.train.step import take_step
from tests.oracles import assert_refused
from tests.tasks import run_main, write_reviews

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).parent.parent / "paper_artifacts" / "configs"


@pytest.fixture(scope="module")
def places(small_bert, tmp_path_factory):
    """Make a BERT of two layers with random weights, and a task of sentences with labels."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(small_bert, folder / "model")
    write_reviews(folder / "data")
    return folder


def words(places, output, changes):
    """Words of a command line; an option with None is left out, and True makes a flag."""
    options = {
        "--model": str(places / "model"),
        "--task": str(places / "data"),
        "--noise-multiplier": "0.8",
        "--batch-size": "10",
        "--steps": "2",
        "--seed": "1",
        "--output": str(output),
    } | changes
    return [
        word
        for name, value in options.items()
        if value is not None
        for word in ([name] if value is True else [name, value])
    ]


@pytest.fixture
def call(places, tmp_path, capsys):
    """Run the command in this process; return exit code, stdout and stderr."""

    def run(changes=(), output=None):
        return run_main(capsys, "train", *words(places, output or tmp_path / "out", dict(changes)))

    return run


@pytest.mark.slow
def test_the_command_of_the_readme(places, tmp_path):
    """Every option of the contract, in a process of its own; stdout holds JSON and nothing else."""
    options = {
        "--method": "lora",
        "--rank": "4",
        "--scheme": "optimal",
        "--momentum-beta": "0.9",
        "--noise-multiplier": None,
        "--epsilon": "8",
        "--delta": "1e-3",
        "--batch-size": "6",
        "--steps": "3",
        "--learning-rate": "1e-3",
        "--max-grad-norm": "0.5",
        "--micro-batch-size": "4",
        "--max-examples": "30",
        "--membership": "bernoulli",
        "--device": "cpu",
        "--resume": True,
        "--json": True,
    }
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_dp.train", *words(places, tmp_path / "out", options)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out" / "training.json").read_text())
    said = done.stderr.splitlines()
    assert [line.split(":")[0] for line in said] == ["trains", "privacy"], said
    assert "(local folder), BertForSequenceClassification, LoRA of rank 4" in said[0]
    assert f"privacy: {document['privacy']}" == said[1]

    config = load_result(tmp_path / "out").config
    assert (
        config.method,
        config.rank,
        config.momentum_beta,
        config.epsilon,
        config.delta,
        config.max_examples,
        config.membership,
        config.seed,
    ) == ("lora", 4, 0.9, 8.0, 1e-3, 30, "bernoulli", 1)
    members = json.loads((tmp_path / "out" / "membership.json").read_text())
    assert 15 <= members["num_records"] <= 40  # 30 of 40 are expected
    assert 6 <= members["num_members"] < members["num_records"]
    rate = 6 / members["num_members"]
    assert (
        document["epsilon"]
        == GaussianMechanism(document["noise_multiplier"], 0.5, rate).epsilon(3, 1e-3)
        <= 8
    )
    assert "--output out" in document["provenance"]["command"]

    ours, tokenizer = load_model(str(tmp_path / "out"))
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = tokenizer(["the film is fresh .", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, ours(**batch).logits)


def test_what_is_printed_for_people(call, tmp_path):
    """The folder's name looks like rich's markup. A second command only reads the finished run."""
    output = tmp_path / "run [/b] [red]"
    asked = {"--delta": "0.1", "--eval-every": "1", "--scheme": "optimal"}
    code, out, err = call(asked, output)
    assert code == 0 and err.startswith("warning: delta 0.1 is not below 1/N = 0.025")
    assert err.count("\n") == 1
    lines = out.splitlines()
    assert lines[0].startswith("trains: ") and "40 of 40 examples trained on" in lines[0]
    assert lines[1].startswith("privacy: (") and "noise drawn from seed 1" in lines[1]
    for text in (
        "accuracy",
        "majority class: 0.5",
        "loss on members",
        "(NON-PRIVATE)",
        "restoring: ",
        f"checkpoint: {output}",
        "privacy spent: (",
    ):
        assert text in out, text
    code, again, _ = call(asked | {"--resume": True}, output)
    assert code == 0 and again == "\n".join(lines[2:]) + "\n"
    code, out, err = call(asked | {"--resume": True, "--json": True}, output)
    assert code == 0 and not err
    assert json.loads(out) == json.loads((output / "training.json").read_text())
    code, out, _ = call({"--delta": "0.1"}, tmp_path / "plain")
    assert code == 0 and "restoring: " not in out  # nothing is restored


def test_a_run_without_privacy_says_so(call):
    code, out, _ = call({"--noise-multiplier": None, "--non-private": True, "--steps": "1"})
    assert code == 0 and "privacy: NON-PRIVATE: no clipping and no noise" in out
    assert "-DP" not in out


def test_a_run_that_clips_without_noise_says_so(call):
    code, out, _ = call({"--noise-multiplier": None, "--noise-free": True, "--steps": "1"})
    assert code == 0 and out.count("NON-PRIVATE: sampled and clipped") == 2
    assert "without noise, for diagnosis only" in " ".join(out.split()) and "-DP" not in out


def test_options_reach_the_configuration(call, tmp_path):
    code, *_ = call(
        {
            "--scheme": "denoise",
            "--option": "kappa=1.5",
            "--below": "zero",
            "--filter-b": "0.5",
            "--train-layers": "1",
            "--optimizer": "adamw",
            "--weight-decay": "0.01",
            "--schedule": "linear",
            "--warmup-steps": "1",
            "--max-examples": "30",
            "--dropout": True,
            "--no-generate": True,
            "--snapshot-every": "1",
            "--steps": "1",
            "--max-length": "20",
        }
    )
    config = load_result(tmp_path / "out").config
    assert code == 0
    assert config.restoration == {"method": "fast", "below": "zero", "kappa": 1.5}
    assert config.filter_b == (0.5,) and config.train_layers == 1
    assert config.max_examples == 30
    assert config.dropout and not config.generate and config.max_length == 20


def test_a_configuration_file_gives_the_defaults(call, tmp_path):
    """Options on the command line have priority over the file."""
    document = {
        "steps": 7,
        "learning_rate": 0.25,
        "scheme": "denoise",
        "scheme_options": {"kappa": 1.5},
        "train_layers": 1,
        "filter_b": [0.5],
        "non_private": False,
        "noise_multiplier": 1.0,
    }
    (tmp_path / "run.json").write_text(json.dumps(document))
    code, *_ = call(
        {"--config": str(tmp_path / "run.json"), "--noise-multiplier": None, "--steps": "1"}
    )
    config = load_result(tmp_path / "out").config
    assert code == 0 and (config.steps, config.learning_rate) == (1, 0.25)
    assert config.scheme_options == {"kappa": 1.5} and config.train_layers == 1
    assert config.filter_b == (0.5,)


def test_processes_are_connected_for_the_device_of_a_configuration_file(
    call, tmp_path, monkeypatch
):
    """Under torchrun, the device decides between gloo and NCCL."""
    devices = []

    @contextlib.contextmanager
    def processes(device):
        devices.append(device)
        yield

    monkeypatch.setattr("lowrank_dp.train.processes.processes", processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "run.json").write_text('{"device": "cuda", "noise_multiplier": 0.8}')
    code, _, err = call({"--config": str(tmp_path / "run.json")})
    assert code == 2 and "device" in err and devices[0] == "cuda", (devices, err)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "must be JSON"),
        ("[]", "one JSON object"),
        ("[" * 100_000, "must be JSON"),
        ('{"steps": 1, "epsilon": 1.0, "epsilon": 8.0}', "'epsilon' occurs twice"),
        *(
            (f'{{"{name}": {value}, "noise_multiplier": 1.0}}', f"{expected} must be")
            for name, value, expected in (
                *(
                    (n, "1" + "0" * 400, n)
                    for n in (
                        "learning_rate",
                        "steps",
                        "rank",
                        "holdout",
                        "data_seed",
                        "max_length",
                        "max_grad_norm",
                    )
                ),
                ("weight_decay", "1e308", "weight_decay"),
                ("max_grad_norm", "1e308", "max_grad_norm"),
                ("max_grad_norm", "1e-308", "max_grad_norm"),
                ("rank", "1000000", "rank"),
                ("filter_b", "[1e308]", "filter's coefficient"),
                ("num_beams", "1001", "num_beams"),
                ("filter_b", "[1e-320]", "filter's coefficient"),
                ("device", f'"cuda:{"9" * 40}"', "device"),
            )
        ),
        ('{"noise_multiplier": 1e308}', "noise_multiplier must be"),
        ('{"stepps": 3, "non_private": true}', "did you mean 'steps'"),
        ('{"steps": "many", "non_private": true}', "steps must be of the type int"),
        ('{"steps": 3}', "exactly one of epsilon"),
        ('{"epsilon": 3, "non_private": true}', "got epsilon and non_private"),
        ('{"scheme_options": {"kappa": []}, "scheme": "denoise", "epsilon": 3}', "kappa"),
    ],
)
def test_a_bad_configuration_file_is_refused(text, expected, call, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    words = {"--config": str(tmp_path / "bad.json"), "--noise-multiplier": None, "--steps": None}
    assert_refused(call(words), "--config", expected)


def test_a_privacy_option_replaces_that_of_the_configuration_file(call, tmp_path, monkeypatch):
    """A file need not be complete, and its privacy fields exclude one another."""
    trained = []

    def stop(config, *arguments, **options):
        trained.append(config)
        raise ValueError("stopped")

    monkeypatch.setattr("lowrank_dp.train.loop.train", stop)
    file, four = tmp_path / "run.json", ("epsilon", "noise_multiplier", "non_private", "noise_free")
    documents = [{}, {"epsilon": 3}, {"noise_multiplier": 0.5}, {"non_private": True}]
    for document in [*documents, {"noise_free": True, "epsilon": None}]:
        for name, value in (("epsilon", "2"), ("noise-multiplier", "0.7"), ("non-private", True)):
            file.write_text(json.dumps({"learning_rate": 0.5, **document}))
            words = {"--config": str(file), "--noise-multiplier": None, f"--{name}": value}
            assert_refused(call(words), "stopped")
            config, field = trained.pop(), name.replace("-", "_")
            found = {one: getattr(config, one) for one in four if getattr(config, one)}
            assert found == {field: value if value is True else float(value)}, (document, name)
            assert config.learning_rate == 0.5
    file.write_text('{"noise_multiplier": 0.5}')
    words = {
        "--config": str(file),
        "--noise-multiplier": None,
        "--epsilon": "2",
        "--noise-free": True,
    }
    assert_refused(call(words), "got epsilon and noise_free")


def test_a_configuration_file_that_is_not_there_is_refused(call, tmp_path):
    assert_refused(
        call({"--config": str(tmp_path / "gone.json")}), "--config", "gone.json can't be read"
    )


def test_resume_alone_goes_on_from_the_saved_configuration(call, tmp_path, capsys, monkeypatch):
    """Options and files beside --resume must agree; the run is killed after its first step."""
    output, taken = tmp_path / "out", []

    def broken_off(*arguments):
        if taken:
            raise KeyboardInterrupt
        taken.append(1)
        return take_step(*arguments)

    def resume(*words):
        return run_main(capsys, "train", "--resume", "--output", output, *words)

    assert_refused(resume(), "--resume found no run in", "give the options of a new run")
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_dp.train.loop.take_step", broken_off)
        code, _, err = call({"--snapshot-every": "1", "--scheme": "denoise"}, output)
    assert code == 130 and err == "stopped by SIGINT\n"
    (tmp_path / "other.json").write_text('{"noise_multiplier": 0.8, "learning_rate": 0.5}')
    (tmp_path / "same.json").write_text('{"noise_multiplier": 0.8, "scheme": "denoise"}')
    for words, expected in (
        (["--steps", "3"], "steps: 3 / 2"),
        (["--noise-multiplier", "0.9", "--seed", "1"], "noise_multiplier: 0.9 / 0.8"),
        (["--epsilon", "8"], "epsilon: 8.0 / None"),
        (["--config", str(tmp_path / "other.json")], "learning_rate: 0.5 / 0.0001"),
    ):
        assert_refused(resume(*words), "the configuration that the run began with", expected)
    code, _, err = resume("--seed", "1", "--config", str(tmp_path / "same.json"))
    config = load_result(output).config
    assert code == 0 and not err, err
    assert (config.steps, config.scheme, config.seed) == (2, "denoise", 1)
    code, out, _ = resume()  # the run is finished: the command prints the same result again
    assert code == 0 and f"checkpoint: {output}" in out
    assert_refused(resume("--steps", "3"), "steps: 3 / 2")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_configurations_of_larger_runs_are_valid(path):
    config = TrainConfig.from_json(json.loads(path.read_text()))
    assert config.epsilon == 8 and config.device == "cuda"


BAD = {
    "unknown model": ({"--model": "minilmm"}, ["did you mean 'minilm'"]),
    "unknown task": ({"--task": "sst3"}, ["did you mean 'sst2'"]),
    "missing folder": ({"--task": "no/such/folder"}, ["task must be", "no/such/folder"]),
    "unknown scheme": ({"--scheme": "optmal"}, ["did you mean 'optimal'"]),
    "unknown method": ({"--method": "lorra"}, ["did you mean 'lora'"]),
    "unknown membership": ({"--membership": "bernouli"}, ["did you mean 'bernoulli'"]),
    "no privacy": ({"--noise-multiplier": None}, ["exactly one of", "non_private"]),
    "two privacies": ({"--epsilon": "8"}, ["exactly one of", "epsilon and noise_multiplier"]),
    "noise and none": ({"--noise-free": True}, ["exactly one of"]),
    "private and not": ({"--non-private": True}, ["exactly one of"]),
    "epsilon out of reach": (
        {"--noise-multiplier": None, "--epsilon": "1e-9", "--delta": "1e-12"},
        ["epsilon = 1e-09", "cannot be met"],
    ),
    "no protection": ({"--noise-multiplier": "1e-9"}, ["protects nothing", "larger"]),
    "delta": ({"--delta": "1"}, ["delta must be"]),
    "epsilon": ({"--noise-multiplier": None, "--epsilon": "-1"}, ["epsilon", "> 0"]),
    "nan": ({"--learning-rate": "nan"}, ["learning_rate must be a finite number"]),
    "nothing to restore": (
        {"--noise-multiplier": None, "--non-private": True, "--scheme": "optimal"},
        ["scheme must be 'none' without noise"],
    ),
    "batch": ({"--batch-size": "41"}, ["batch_size must be at most the 40 examples"]),
    "batch of members": ({"--batch-size": "21", "--membership": "half"}, ["the 20 examples"]),
    "no batch": ({"--batch-size": "0"}, ["batch_size must be an integer >= 1"]),
    "not a number": ({"--steps": "many"}, ["--steps", "integer"]),
    "unknown option": ({"--stepz": "3"}, ["--stepz"]),
    "no output": ({"--output": None}, ["--output"]),
    "context": ({"--max-length": "65"}, ["max_length must be", "<= 64"]),
    "holdout": ({"--holdout": "40"}, ["holdout must be below the 40 examples"]),
    "column": (
        {"--text-column": "sentense", "--label-column": "label"},
        ["text_column must be a column", "did you mean 'sentence'"],
    ),
    "columns of two kinds": (
        {"--text-column": "sentence", "--target-column": "label"},
        ["must go without text_column"],
    ),
    "columns of a known task": ({"--task": "generated", "--text-column": "a"}, ["are known"]),
    "no groups": ({"--unit": "group"}, ["unit 'group' must come with groups of rows"]),
    "oracle": ({"--scheme": "oracle"}, ["clean gradients", "diagnostic"]),
    "scheme option": ({"--scheme": "denoise", "--option": "kapa=1"}, ["did you mean 'kappa'"]),
    "a scheme's truth value": (
        {"--scheme": "denoise", "--option": "norm_correction=no"},
        ["norm_correction must be true or false"],
    ),
    "scheme option's form": ({"--scheme": "truncate", "--option": "k"}, ["NAME=VALUE"]),
    "the run's own": ({"--scheme": "optimal", "--option": "noise_std=3"}, ["noise_std"]),
    "two averages": ({"--momentum-beta": "0.9", "--beta1": "0.9"}, ["beta1 must be 0"]),
    "device": ({"--device": "toaster"}, ["device must be", "toaster"]),
    "layers": ({"--train-layers": "["}, ["train_layers must be a regular expression"]),
    "no such layer": ({"--train-layers": "nothing_like_it"}, ["matches no trainable parameter"]),
    "no ASCII digit": ({"--train-layers": "²"}, ["matches no trainable parameter"]),
    "too many layers": ({"--train-layers": "3"}, ["train_layers", "3"]),
    "no such module": (
        {"--method": "lora", "--target-modules": "nonsense"},
        ["target_modules must be", "query"],
    ),
    "encoder": ({"--task": "generated-table"}, ["causal language model", "tiny-llama"]),
    "seed": ({"--seed": "99999999999999999999"}, ["seed must be"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, call, tmp_path):
    changes, expected = BAD[case]
    assert_refused(call(changes), *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", ["1", "3"])
def test_a_run_that_diverges_ends_in_one_line(steps, call, tmp_path):
    """The run diverges in its evaluation, or in the step after the evaluation."""
    code, out, err = call({"--learning-rate": "1e12", "--optimizer": "sgd", "--steps": steps})
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "lower the learning rate" in err or "with a lower learning rate" in err
    assert [line.split(":")[0] for line in out.splitlines()] == ["trains", "privacy"]
    assert not (tmp_path / "out" / "training.json").exists()


def test_cuda_is_refused_where_there_is_none(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(call({"--device": "cuda"}), "device must be cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert_refused(call({"--device": "cuda:2"}), "device must be one of cpu, cuda:0, cuda:1, got")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda rows: [{**row, "label": 1} for row in rows],
            ["two classes or more", "all have label 1"],
        ),
        (
            lambda rows: [{**row, "label": -1 if row["idx"] == 6 else 1} for row in rows],
            ["train.jsonl line 7", "'label' must be a class: an integer >= 0", "got -1"],
        ),
        (
            lambda rows: [{**row, "label": "good"} if row["idx"] == 6 else row for row in rows],
            ["train.jsonl line 7", "'label'", "good"],
        ),
        (
            lambda rows: [
                {key: row[key] for key in ("idx", "label")} if row["idx"] == 6 else row
                for row in rows
            ],
            ["train.jsonl line 7", "'sentence' is missing"],
        ),
        (
            lambda rows: [{**row, "sentence": 7} if row["idx"] == 6 else row for row in rows],
            ["train.jsonl line 7", "'sentence' must be a string, got 7"],
        ),
        (
            lambda rows: [{**row, "sentence": ""} if row["idx"] == 6 else row for row in rows],
            ["train.jsonl line 7", "'sentence' must be a text that is not empty"],
        ),
        (lambda rows: [{**row, "idx": 0} for row in rows], ["line 2", "idx 0 occurs twice"]),
        (lambda rows: [], ["train"]),
    ],
    ids=[
        "one class",
        "negative label",
        "text as label",
        "no text",
        "number as text",
        "empty text",
        "idx twice",
        "empty",
    ],
)
def test_bad_records_are_refused_by_file_and_line(change, expected, call, tmp_path):
    write_reviews(tmp_path / "own", change)
    assert_refused(call({"--task": str(tmp_path / "own")}), *expected)
    assert not (tmp_path / "out").exists()


def test_labels_that_a_known_task_does_not_have(call, tmp_path, monkeypatch):
    def three_classes(rows):
        return [{**row, "label": 2} if row["idx"] == 4 else row for row in rows]

    write_reviews(tmp_path / "glue" / "sst2", three_classes)
    monkeypatch.setenv("LOWRANK_DP_DATA", str(tmp_path))
    assert_refused(call({"--task": "sst2"}), "sst2/train.jsonl line 5", "from 0 to 1, got 2")


def test_a_task_without_validation_is_refused(call, tmp_path):
    write_reviews(tmp_path / "own", validation=0)
    (tmp_path / "own" / "validation.jsonl").unlink()
    assert_refused(call({"--task": str(tmp_path / "own")}), "has no validation split")
    code, *_ = call({"--task": str(tmp_path / "own"), "--holdout": "10", "--steps": "1"})
    assert code == 0  # unless one is set aside


def test_a_table_of_ones_own(call, tmp_path):
    """A CSV with named columns: a warning names unread columns, the first line names the others."""
    rows = "".join(
        f'"a film, number {i}",{("bad", "good", "ok")[i % 3]},u{i % 15},x\n' for i in range(45)
    )
    (tmp_path / "reviews.csv").write_text("review,stars,user,note\n" + rows)
    named = {
        "--model": "tiny",
        "--task": str(tmp_path / "reviews.csv"),
        "--text-column": "review",
        "--label-column": "stars",
    }
    code, out, err = call(
        {
            **named,
            "--group-column": "user",
            "--unit": "group",
            "--holdout": "5",
            "--batch-size": "4",
            "--steps": "1",
        }
    )
    assert code == 0 and err.count("\n") == 1, err
    assert err.startswith("warning: ") and "not read: column 'note'" in err
    first = out.splitlines()[0]
    assert (
        first.startswith("trains: ")
        and ("text from 'review', label from 'stars' (3 classes: bad, good, ok), group from 'user'")
        in first
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "ok"}
    document = json.loads((tmp_path / "out" / "membership.json").read_text())
    assert document["task"] == "reviews" and len(set(document["groups"])) < 15
    assert document["recipe"]["group_column"] == "user"
    assert_refused(
        call({**named, "--unit": "group", "--holdout": "5"}, tmp_path / "other"),
        "error: unit 'group' must come with groups of rows, reviews has none that are known: "
        "name their column by group_column (not read so far: 'user', 'note')",
    )
    assert not (tmp_path / "other").exists()


def test_places_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(call(output=tmp_path / "file"), "output must be a folder")
    assert_refused(call(output=tmp_path / "file" / "below"), "file")
    assert_refused(call(output="/proc/lowrank_dp"), "/proc/lowrank_dp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert_refused(call(output=tmp_path / "full"), "must be empty, found thesis.tex")
    assert_refused(call({"--resume": True}, output=tmp_path / "full"), "found thesis.tex")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_help_lists_every_option_with_its_help_text(capsys):
    """A field without an option would be accepted in a file, and would have no effect."""
    for command, kind, more in (
        ("train", TrainConfig, ["--output", "--config", "--resume", "--json"]),
        ("mia", Attack, ["--model", "--compare", "--output", "--force", "--dry-run", "--json"]),
        ("spectrum", Spectrum, ["--output", "--json"]),
        ("lora", Lora, ["--output", "--json"]),
        ("figures", Figures, ["--output", "--artifacts", "--redraw", "--update", "--json"]),
        ("restore", None, ["--input", "--noise-std", "--scheme", "--option", "--force"]),
    ):
        code, out, err = run_main(capsys, command, "--help")
        assert code == 0 and not err, command
        shown = "".join(out.split())
        for field, _ in _console._declared(kind) if kind else ():
            if command == "mia" and field.name == "group":
                assert "--group-column" not in out
                continue
            name = "--" + (field.metadata["name"] or field.name).replace("_", "-")
            assert f" {name} " in out or f"{name}/" in out or f"{name}\n" in out, (command, name)
            assert "".join(field.metadata["help"].split()) in shown, (command, name)
        for name in more:
            assert f" {name} " in out or f" {name}\n" in out, (command, name)
    main(["--help"])
    assert "differentially private fine-tuning" in capsys.readouterr().out
