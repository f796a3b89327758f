"""``python -m lowrank_dp.train`` as a user runs it: what it prints, leaves behind and refuses."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lowrank_dp import _cli
from lowrank_dp.train import load_result
from lowrank_dp.train.__main__ import app

SMALL = {"--model": "tiny", "--task": "generated", "--batch-size": "32", "--steps": "3",
         "--max-examples": "120", "--eval-examples": "40", "--eval-every": "2"}


def command(output, *extra, **changes):
    options = SMALL | {"--output": str(output)} | {
        f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()}
    return [word for pair in options.items() for word in pair] + list(extra)


def run(capsys, arguments):
    """(exit code, stdout, stderr) of the command, in this process."""
    with pytest.raises(SystemExit) as stopped:
        _cli.run(app, arguments)
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.mark.slow
def test_the_contracts_command_in_a_process_of_its_own(tmp_path):
    arguments = command(tmp_path / "out", epsilon=8, scheme="optimal", momentum_beta=0.9,
                        membership="bernoulli", method="lora", rank=4, batch_size=16)
    done = subprocess.run([sys.executable, "-m", "lowrank_dp.train", *arguments],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("accuracy", 1)
    result = load_result(tmp_path / "out")
    for words in ("neighbours: add or remove one example", "Poisson sampling",
                  "accountant: PLD", "RDP cross-check"):
        assert words in " ".join(before.split()), "the statement comes before the training"
    assert "majority class" in after and result.epsilon <= 8
    assert {"adapter_model.safetensors", "membership.json", "training.json",
            "initial_head.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    # a finished run does nothing more
    again = subprocess.run([sys.executable, "-m", "lowrank_dp.train", *arguments, "--resume"],
                           capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert load_result(tmp_path / "out") == result


def test_json_is_all_there_is_on_stdout(tmp_path, capsys):
    code, out, err = run(capsys, command(tmp_path / "out", "--json", noise_multiplier=1))
    document = json.loads(out)
    assert code == 0 and "privacy:" in err
    assert document["epsilon"] == load_result(tmp_path / "out").epsilon > 0
    assert document["curve"][-1]["step"] == 3


@pytest.mark.parametrize(("changes", "extra", "words"), [
    ({"model": "minilmm"}, ["--non-private"], ["minilm"]),
    ({"task": "sst3"}, ["--non-private"], ["did you mean 'sst2'"]),
    ({"scheme": "optmal", "noise_multiplier": 1}, [], ["did you mean 'optimal'"]),
    ({"method": "lorra"}, ["--non-private"], ["did you mean 'lora'"]),
    ({}, [], ["exactly one of epsilon, noise_multiplier and non_private"]),
    ({"epsilon": 1, "noise_multiplier": 1}, [], ["epsilon and noise_multiplier"]),
    ({"epsilon": 1e-9, "delta": 1e-15}, [], ["cannot be met"]),
    ({"epsilon": -1}, [], ["epsilon", "> 0"]),
    ({"batch_size": 4096, "noise_multiplier": 1}, [], ["batch_size", "120", "4,096"]),
    ({"max_length": 100_000}, ["--non-private"], ["max_length", "256"]),
    ({"scheme": "oracle", "noise_multiplier": 1}, [], ["diagnostic"]),
    ({"scheme": "optimal"}, ["--non-private"], ["nothing to restore"]),
    ({"scheme": "denoise", "option": "kapa=1", "noise_multiplier": 1}, [], ["'kappa'"]),
    ({"scheme": "denoise", "option": "kappa", "noise_multiplier": 1}, [], ["NAME=VALUE"]),
    ({"momentum_beta": 0.9, "beta1": 0.9, "noise_multiplier": 1}, [], ["beta1"]),
    ({"steps": 0}, ["--non-private"], ["steps"]),
    ({"learning_rate": "nan"}, ["--non-private"], ["learning_rate"]),
    ({"device": "toaster"}, ["--non-private"], ["device"]),
    ({"train_layers": "nothing_like_it"}, ["--non-private"], ["train_layers"]),
    ({"nonsense": 1}, ["--non-private"], ["--nonsense"]),
])
def test_bad_input_is_one_line_and_leaves_nothing(changes, extra, words, tmp_path, capsys):
    code, out, err = run(capsys, command(tmp_path / "out", *extra, **changes))
    assert code == 2, (out, err)
    said = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("error: "), err
    assert all(word in said[0] for word in words), said[0]
    assert "Traceback" not in out + err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rows", "words"), [
    ([{"sentence": f"text {i}", "label": 1} for i in range(40)], ["two classes"]),
    ([{"sentence": "a", "label": 0}, {"sentence": "b", "label": -1}], ["line 2", "label"]),
    ([{"sentence": "a", "label": 0}, {"sentence": 7, "label": 1}], ["line 2", "sentence"]),
    ([], ["rows", "empty", "hold"]),
])
def test_bad_data_is_named(rows, words, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(capsys, command(tmp_path / "out", "--non-private", task=folder,
                                       batch_size=4))
    assert code == 2 and err.count("\n") == 1, err
    assert any(word in err for word in words), err


def test_a_folder_that_is_not_empty_and_a_file(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    code, _, err = run(capsys, command(tmp_path / "out", "--non-private"))
    assert code == 2 and "must be empty, found thesis.tex" in err and "--resume" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, command(tmp_path / "file", "--non-private"))
    assert code == 2 and "a folder" in err


def test_a_large_delta_is_a_warning(tmp_path, capsys):
    code, _, err = run(capsys, command(tmp_path / "out", noise_multiplier=1, delta=0.1))
    assert code == 0 and err.startswith("warning: delta 0.1 is not below 1/N")


def test_help_lists_every_field_of_the_configuration():
    from dataclasses import fields

    from lowrank_dp.train import TrainConfig

    text = CliRunner().invoke(app, ["--help"]).stdout
    other_names = {"scheme_options": "--option", "restore_method": None}
    for field in fields(TrainConfig):
        option = other_names.get(field.name, "--" + field.name.replace("_", "-"))
        assert option is None or option in text, option
