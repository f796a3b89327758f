"""Command lines as a user runs them: results, exit codes, one line on bad input."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_dp.restore import restore
from tests.oracles import assert_refused


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def noisy_file(tmp_path):
    torch.manual_seed(0)
    signal = torch.outer(torch.randn(40), torch.randn(60))
    tensors = {
        "weight": signal + torch.randn(40, 60),
        "bias": torch.randn(40),
        "noise": torch.randn(30, 30),
    }
    save_file(tensors, tmp_path / "noisy.safetensors")
    return tmp_path / "noisy.safetensors", tensors


def test_restore_writes_what_the_function_returns(noisy_file, tmp_path):
    path, tensors = noisy_file
    out = tmp_path / "out.safetensors"
    done = run(
        "lowrank_dp.restore",
        "--input",
        str(path),
        "--noise-std",
        "1",
        "--output",
        str(out),
        "--scheme",
        "denoise",
        "--option",
        "kappa=1.1",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weight"]["action"] == "restored" and report["noise"]["action"] == "kept"
    restored = load_file(out)
    torch.testing.assert_close(
        restored["weight"], restore(tensors["weight"], 1.0, "denoise", kappa=1.1)
    )
    assert torch.equal(restored["bias"], tensors["bias"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--scheme": "optmal"}, ["did you mean 'optimal'"]),
        ({"--noise-std": "-1"}, ["noise_std", "-1"]),
        ({"--option": "kapa=1", "--scheme": "denoise"}, ["kappa"]),
        ({"--option": "kappa"}, ["NAME=VALUE"]),
        ({"--input": "missing.safetensors"}, ["missing.safetensors"]),
        ({"--input": __file__}, ["safetensors file"]),
        ({"--nonsense": "1"}, ["--nonsense"]),
    ],
)
def test_restore_refuses_bad_input_in_one_line(noisy_file, tmp_path, changes, words):
    path, _ = noisy_file
    out = tmp_path / "out.safetensors"
    options = {"--input": str(path), "--noise-std": "1", "--output": str(out)} | changes
    assert_refused(
        run("lowrank_dp.restore", *[word for pair in options.items() for word in pair]), *words
    )
    assert not out.exists()


@pytest.mark.slow
def test_spectrum_measures_saves_and_prints(tmp_path):
    done = run(
        "lowrank_dp.spectrum",
        "--model",
        "tiny",
        "--batch-size",
        "256",
        "--warm-loss",
        "0",
        "--output",
        str(tmp_path),
        "--json",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["privacy"].startswith("NON-PRIVATE")
    layer = document["layers"][0]
    m, n = layer["shape"]
    assert layer["edge"] == pytest.approx(0.6 * (m**0.5 + n**0.5))
    assert {p.name for p in tmp_path.iterdir()} == {
        "spectra.json",
        "spectra.npz",
        "spectra.png",
        "spectra.pdf",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lowrank_dp.spectrum", "--task", "sst3"], ["did you mean 'sst2'"]),
        (["lowrank_dp.spectrum", "--batch-size", "0"], ["--batch-size", "0"]),
        (["lowrank_dp.spectrum", "--noise-multiplier", "nan"], ["--noise-multiplier"]),
        (["lowrank_dp.spectrum", "--model", "nobody/nothing"], ["minilm (packaged)"]),
        (["lowrank_dp.spectrum", "--device", "toaster"], ["device"]),
        (["lowrank_dp.figures", "--only", "spectrums"], ["did you mean 'spectra'"]),
        (["lowrank_dp.figures", "--scale", "huge"], ["small, full"]),
        (["lowrank_dp.figures", "--redraw", "--artifacts", "nowhere"], ["no result spectra.json"]),
        (["lowrank_dp", "spectrums"], ["did you mean 'spectrum'"]),
    ],
)
def test_commands_refuse_bad_input_in_one_line(arguments, words):
    assert_refused(run(*arguments), *words)


def test_the_console_script_lists_its_commands():
    done = run("lowrank_dp", "--help")
    assert done.returncode == 0
    for command in ("spectrum", "restore", "lora", "train", "mia", "figures"):
        assert command in done.stdout
    assert run("lowrank_dp", "--version").stdout.strip() == "0.1.0"


def test_progress_is_silent_without_a_terminal_whatever_the_environment_says():
    """A notebook sets FORCE_COLOR, and its workers would fill the cell with bars."""
    code = "from lowrank_dp._terminal import progress; print(list(progress(range(3), 'counting')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1"},
    )
    assert done.stdout == "[0, 1, 2]\n" and done.stderr == ""
