"""Command lines as a user runs them: results, exit codes, one line on bad input, no file lost."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_dp import artifacts
from lowrank_dp.__main__ import COMMANDS, main
from lowrank_dp.commands import _console, _tables
from lowrank_dp.restore import restore
from tests.oracles import assert_refused
from tests.tasks import run_main

HEAVY = ("torch", "transformers", "peft", "opacus", "ray", "datasets", "matplotlib", "scipy")


@pytest.fixture
def call(capsys):
    """``call(command, *words)`` in this process: exit code, stdout, stderr."""
    return partial(run_main, capsys)


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


def restore_words(path, output, changes):
    options = {"--input": path, "--noise-std": "1", "--output": output} | changes
    words = [word for name, value in options.items() for word in (name, value) if value is not True]
    return ["restore", *words]


@pytest.mark.slow
def test_restore_writes_what_the_function_returns(noisy_file, tmp_path):
    """The command runs in a process of its own, as ``python -m`` starts it."""
    path, tensors = noisy_file
    out = tmp_path / "out.safetensors"
    words = restore_words(path, out, {"--scheme": "denoise", "--option": "kappa=1.1"})[1:]
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_dp.restore", *map(str, words), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weight"]["action"] == "restored" and report["noise"]["action"] == "kept"
    restored = load_file(out)
    torch.testing.assert_close(
        restored["weight"], restore(tensors["weight"], 1.0, "denoise", kappa=1.1)
    )
    assert torch.equal(restored["bias"], tensors["bias"])


def test_restore_refuses_bad_input_in_one_line(noisy_file, tmp_path, call):
    path, _ = noisy_file
    out = tmp_path / "out.safetensors"
    for changes, words in (
        ({"--scheme": "optmal"}, ["did you mean 'optimal'"]),
        ({"--scheme": "oracle"}, ["--scheme must be one of none, hard"]),
        ({"--noise-std": "-1"}, ["noise_std", "-1"]),
        ({"--option": "kapa=1", "--scheme": "denoise"}, ["kappa"]),
        ({"--option": "kappa"}, ["NAME=VALUE"]),
        ({"--option": f"kappa={'[' * 10**5}", "--scheme": "denoise"}, ["kappa must be"]),
        (
            {"--option": "norm_correction=False", "--scheme": "denoise"},
            ["norm_correction must be true or false, got 'False'"],
        ),
        ({"--option": "method=svd"}, ["--option must name an option of the scheme, got 'method'"]),
        ({"--option": "noise_std=2"}, ["got 'noise_std'"]),
        ({"--input": "missing.safetensors"}, ["missing.safetensors"]),
        ({"--input": "."}, ["--input must be an existing safetensors file, got '.'"]),
        ({"--output": tmp_path}, ["--output must be a file, and not a folder"]),
        ({"--output": "/proc/none/out"}, ["the folder of --output /proc/none can't be written to"]),
        ({"--input": __file__}, ["safetensors file"]),
        ({"--nonsense": "1"}, ["--nonsense"]),
        ({"--noise-std": "1.5"}, ["matrix noise (30, 30) must hold noise", "--noise-std"]),
    ):
        assert_refused(call(*restore_words(path, out, changes)), *words)
        assert not out.exists(), changes
    twice = ["--option", "k=2", "--option", "k=3"]
    found = call(*restore_words(path, out, {"--scheme": "truncate"}), *twice)
    assert_refused(found, "--option must give k once")
    path = tmp_path / "narrow.safetensors"  # torch has no norm of this type
    save_file({"weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, path)
    assert_refused(call(*restore_words(path, out, {})), "weight", "float32 or float64")
    save_file({"weight": torch.ones(30, 30).bfloat16()}, path)
    assert_refused(call(*restore_words(path, out, {"--noise-std": "5"})), "must hold noise")


def test_restore_replaces_a_file_only_if_told_to_and_never_its_input(noisy_file, tmp_path, call):
    path, tensors = noisy_file
    out, before = tmp_path / "out.safetensors", path.read_bytes()
    out.write_text("another's")
    assert_refused(call(*restore_words(path, out, {})), "out.safetensors exists", "--force")
    assert out.read_text() == "another's"
    (tmp_path / "symbolic").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    for same in (path, tmp_path / "symbolic", tmp_path / "hard", tmp_path / "." / path.name):
        for words in ([], ["--force"]):
            done = call(*restore_words(path, same, {}), *words)
            assert_refused(done, "another file than --input")
            assert path.read_bytes() == before, same
    code, printed, _ = call(*restore_words(path, out, {}), "--force")
    restored = load_file(out)
    assert code == 0 and restored.keys() == tensors.keys()
    assert "40×60" in printed and "restored" in printed
    row = next(line for line in printed.splitlines() if line.startswith("weight"))
    norms = [np.linalg.norm(one["weight"].numpy()) for one in (tensors, restored)]
    assert norms[0] > norms[1] and row.split()[-2:] == [f"{norm:.3g}" for norm in norms]


def test_restore_says_that_a_file_holds_no_matrix(tmp_path, call):
    path, out = tmp_path / "vectors.safetensors", tmp_path / "out.safetensors"
    save_file({"bias": torch.ones(3), "batch": torch.ones(2, 3, 4)}, path)
    code, printed, _ = call(*restore_words(path, out, {}))
    assert code == 0 and load_file(out).keys() == {"bias", "batch"}
    assert printed.startswith("no tensor of the file is a matrix with both sides above 1")


@pytest.mark.slow
def test_spectrum_measures_saves_and_prints(tmp_path, call):
    code, out, err = call(
        *("spectrum", "--model", "tiny", "--batch-size", "256", "--warm-loss", "0"),
        *("--output", tmp_path, "--json"),
    )
    assert code == 0 and err.startswith("measures: tiny"), err
    document = json.loads(out)
    assert document["privacy"].startswith("NON-PRIVATE")
    layer = document["layers"][0]
    m, n = layer["shape"]
    assert layer["edge"] == pytest.approx(0.6 * (m**0.5 + n**0.5))
    saved = np.load(tmp_path / "spectra.npz")
    for i, layer in enumerate(document["layers"]):
        assert layer["edge"] == pytest.approx(float(saved["edges"][i]))
        for kind in ("clean", "noisy"):
            s = saved[kind][i][~np.isnan(saved[kind][i])]
            p = (s / s.sum())[s > 0]
            assert layer[f"top_{kind}"] == pytest.approx(s[0]), layer["name"]
            assert layer[f"effective_rank_{kind}"] == pytest.approx(
                np.exp(-(p * np.log(p)).sum()), rel=1e-3
            ), layer["name"]
        for kind in ("noisy", "restored"):
            assert layer[f"alignment_{kind}"] == float(saved[f"alignment_{kind}"][i])
        assert layer["num_above_edge"] == (saved["noisy"][i] > saved["edges"][i]).sum()
    assert {p.name for p in tmp_path.iterdir()} == {
        "spectra.json",
        "spectra.npz",
        "spectra.png",
        "spectra.pdf",
    }
    code, out, _ = call(
        *("spectrum", "--model", "tiny", "--batch-size", "64", "--warm-loss", "0"),
        *("--scheme", "none"),
    )
    assert code == 0 and max(map(len, out.splitlines()[:20])) <= 80
    names = [line.split()[0] for line in out.splitlines()]
    assert "attention.self.query" in names and "bert.encoder.layer.1" in names


@pytest.mark.slow
def test_spectrum_of_a_language_model_is_cold_by_default(call):
    code, _, err = call(
        *("spectrum", "--model", "tiny-llama", "--task", "generated-table"),
        *("--batch-size", "8", "--json"),
    )
    assert code == 0 and err.startswith("measures: tiny-llama") and "warm-up" not in err, err


def test_commands_refuse_bad_input_in_one_line(call, tmp_path):
    for name in ("spectra.json", "lora.json"):
        (tmp_path / name).write_text("{}")
    for words, expected in (
        (["spectrum", "--output", tmp_path], ["holds spectra.json of an earlier command"]),
        (["lora", "--output", tmp_path], ["holds lora.json of an earlier command"]),
        (["spectrum", "--device", "meta", "--model", "tiny"], ["device must be a torch device"]),
        (["spectrum", "--noise-multiplier", "1e308"], ["--noise-multiplier must be", "<= 1e+09"]),
        (["spectrum", "--max-grad-norm", "1e308"], ["--max-grad-norm must be", "<= 1e+20"]),
        (["lora", "--rank", "100000000000"], ["rank must be", "<= 65536"]),
        (["lora", "--micro-batch-size", "0"], ["micro_batch_size must be"]),
        (["lora", "--draws", "99999999999999999999"], ["draws must be"]),
        (["mia", "--model", tmp_path, "--seed", "9" * 26], ["seed must be"]),
        (["plan", "--public", ""], ["--public must be a text that is not empty"]),
        (["spectrum", "--task", "sst3"], ["did you mean 'sst2'"]),
        (["spectrum", "--batch-size", "0"], ["--batch-size", "0"]),
        (["spectrum", "--noise-multiplier", "nan"], ["--noise-multiplier"]),
        (["spectrum", "--model", "nobody/nothing"], ["minilm (packaged)"]),
        (["spectrum", "--device", "toaster"], ["device"]),
        (["spectrum", "--seed", "20000000000000"], ["seed must be", "<= 4294967295"]),
        (["spectrum", "--seed", "-1"], ["seed must be"]),
        (["lora", "--seed", "20000000000000"], ["seed must be"]),
        (["spectrum", "--output", __file__], ["--output must be a folder, got"]),
        (["lora", "--output", __file__], ["--output must be a folder, got"]),
        (["lora", "--output", f"{__file__}/below"], ["--output", "below can't be written to"]),
        (["spectrum", "--output", "/proc/below"], ["--output /proc/below can't be written to"]),
        (["figures", "--output", "/proc/below"], ["--output /proc/below can't be written to"]),
        (["lora", "--rank", "0"], ["rank must be"]),
        (["figures", "--only", "spectrums"], ["did you mean 'spectra'"]),
        (["figures", "--scale", "huge"], ["small, full"]),
        (
            ["figures", "--redraw", "--artifacts", tmp_path / "no", "--output", tmp_path / "f"],
            ["--artifacts must be a folder of saved results"],
        ),
        (["spectrum", "--task", "sst3", "--output", tmp_path / "new"], ["did you mean 'sst2'"]),
        (["spectrums"], ["did you mean 'spectrum'"]),
    ):
        assert_refused(call(*words), *expected)
    assert not (tmp_path / "new").exists()


def test_the_check_of_an_output_leaves_no_folder(tmp_path, monkeypatch):
    """Folders that were there stay, and a folder that can't be written to is refused."""
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "kept" / "a" / "b", tmp_path / "kept", tmp_path / "c"):
        _console.check_output(folder)
        assert [path.name for path in tmp_path.rglob("*")] == ["kept"], folder
    with _console.hold_output(tmp_path / "c" / "d"):
        assert [path.name for path in (tmp_path / "c" / "d").iterdir()] == [".lock"]
    assert not (tmp_path / "c").exists()
    with _console.hold_output(tmp_path / "c" / "d"):
        (tmp_path / "c" / "d" / "report").write_text("kept")
    assert [path.name for path in (tmp_path / "c" / "d").iterdir()] == ["report"]

    def read_only(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    expected = f"--output {tmp_path / 'kept'} can't be written to (Permission denied): choose"
    with pytest.raises(ValueError, match=re.escape(expected)):
        _console.check_output(tmp_path / "kept")


def test_an_output_belongs_to_one_command_at_a_time(tmp_path, call, noisy_file):
    """The second command of two says so in one line, before its work; so does one of a figure."""
    out, (path, *_) = tmp_path / "out", noisy_file
    (out / "results").mkdir(parents=True)
    words = {
        "spectrum": ("--output", out),
        "lora": ("--output", out),
        "audit": ("--output", out),
        "mia": ("--model", tmp_path, "--output", out),
        "figures": ("--only", "total_variation", "--artifacts", out / "results", "--output", out),
    }
    restore = [str(word) for word in restore_words(path, out / "restored.safetensors", {})]
    with (
        _console.hold_output(out),
        _console.hold_output(out, name="restored.safetensors"),
        _console.hold_output(out / "results", name="total_variation.json"),
    ):
        held = sorted(item.name for item in out.rglob("*"))
        for command, options in words.items():
            assert_refused(call(command, *map(str, options)), "is in use by another command: wait")
        assert_refused(call(*restore), "restored.safetensors is in use by another")
        assert sorted(item.name for item in out.rglob("*")) == held
    assert sorted(item.name for item in out.rglob("*")) == ["results"]
    assert call(*restore)[0] == 0
    assert [item.name for item in out.iterdir() if item.is_file()] == ["restored.safetensors"]


def test_the_lock_of_a_killed_command_does_not_hold(tmp_path):
    (tmp_path / ".lock").write_bytes(b"")
    with _console.hold_output(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_refused_figure_leaves_no_folder(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("figures", "--only", "gap"), "no result gap.json in paper_artifacts")
    assert not [*tmp_path.iterdir()]


def test_a_terminal_without_unicode_gets_escapes(monkeypatch):
    """The work of the command would otherwise be lost at its first non-ASCII character."""
    app, out = _console.new_app("a test"), io.TextIOWrapper(io.BytesIO(), "ascii")
    app.command()(lambda: print("≥ 1"))
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as stop:
        _console.run(app, [])
    out.flush()
    assert stop.value.code == 0 and out.buffer.getvalue() == b"\\u2265 1\n"


def test_the_exact_laws_are_at_the_width_of_the_rows_that_are_projected():
    from lowrank_dp.commands.lora import exact_laws
    from lowrank_dp.experiments.lora_noise import _label

    name = "encoder.layer.3.attention.self.query.weight"
    label = _label("m", name, torch.zeros(40, 7))  # G (m, n) is projected by A (rank, n)
    assert label == "m 3.attention.query 40x7"
    measured = SimpleNamespace(sources=("fixed", label), config=SimpleNamespace(ranks=(2,)))
    assert [law["n"] for law in exact_laws(measured)] == [7]


FORMULAS = ["figures", "--only", "total_variation"]


@pytest.mark.slow
def test_figures_replace_only_results_of_the_same_configuration(tmp_path, call, monkeypatch):
    from lowrank_dp.figures import lora

    quick = replace(
        lora.FIGURES["total_variation"].small,
        ranks=(1, 4),
        fixed_ranks=(1,),
        widths=(2, 8),
        joint_ranks=(1,),
        joint_ratios=(0.5, 2.0),
    )
    spec = replace(lora.FIGURES["total_variation"], small=quick, full=replace(quick, ranks=(1, 8)))
    monkeypatch.setitem(lora.FIGURES, "total_variation", spec)
    folders = ["--artifacts", tmp_path / "a", "--output", tmp_path / "f"]
    saved = tmp_path / "a" / "total_variation.json"
    code, *_ = call(*FORMULAS, *folders)
    assert code == 0
    before = json.loads(saved.read_text())["config"]
    code, _, err = call(*FORMULAS, *folders)  # the same again
    assert code == 0 and "not computed" not in err
    words = [*FORMULAS, *folders, "--scale", "full"]
    code, _, err = call(*words)  # another configuration: a folder of its own, which is said
    trial = tmp_path / "trials"
    (named,) = trial.iterdir()
    assert code == 0 and named.name.startswith("full_") and f"{named.name}" in err
    assert "ranks" in err and "--update" in err
    assert json.loads(saved.read_text())["config"] == before
    assert json.loads((named / saved.name).read_text())["config"]["ranks"] == [1, 8]
    code, *_ = call(*words, "--update")
    assert code == 0 and json.loads(saved.read_text())["config"]["ranks"] == [1, 8]
    # a configuration that nobody asked for gives way to the saved result
    code, _, err = call(*FORMULAS, *folders)
    assert code == 0 and "not computed but drawn" in err and "--update" in err
    assert json.loads(saved.read_text())["config"]["ranks"] == [1, 8]
    for content in ("{}", "no JSON"):  # another command's
        saved.write_text(content)
        code, _, err = call(*words)
        assert code == 0 and "another command" in err
        assert saved.read_text() == content
    assert_refused(call(*words, "--redraw", "--update"), "--redraw and --update")
    for ignored in (["--seed", "3"], ["--scale", "full"], ["--model", "tiny"]):
        assert_refused(
            call(*FORMULAS, *folders, "--redraw", *ignored), f"--redraw and {ignored[0]}"
        )
    assert_refused(call(*FORMULAS, "--output", saved), "--output must be a folder")
    missing = saved.parent / "missing"
    assert_refused(call(*FORMULAS, "--redraw", "--artifacts", missing), "--artifacts must be")
    assert not missing.exists()


def test_committed_results_are_those_of_the_default_configurations():
    """Saved results have the configurations that ``make figures`` uses by default.

    Otherwise ``make figures`` in a clean checkout would draw the saved results and compute nothing.
    """
    from lowrank_dp.figures import NAMES, config_of, find

    folder = Path(__file__).parents[1] / "paper_artifacts"
    for name in NAMES:
        if find(name).lengthy:  # drawn from its saved result anyway
            continue
        config = config_of(name, "small", task="sst2")
        saved = artifacts.load_result(folder, name, find(name).result)
        assert saved.config == config, name


def test_documented_figure_commands_are_not_refused(call, monkeypatch):
    """The commands of the index are accepted, and make the saved results, not trials."""
    root, made = Path(__file__).parents[1], []

    def make(name, place, *_):
        made.append(name)
        assert place.config is None or not place.is_trial, name
        return {"figure": name, "headline": {}, "privacy": "", "ran on": "", "files": []}

    monkeypatch.chdir(root)
    monkeypatch.setattr("lowrank_dp.commands.figures._make", make)
    pages = [root / "README.md", root / "paper_artifacts/README.md", *(root / "docs").rglob("*.md")]
    text = "".join(path.read_text() for path in pages)
    options = r"(?:\s*--[\w-]+(?: +[\w/]+)?)+"
    commands = re.findall(rf'(?:lowrank_dp\.figures|make figures ARGS=")({options})[`"\n]', text)
    assert len(commands) > 15 and any("--device" in words for words in commands)
    for words in commands:
        code, _, err = call("figures", *words.split())
        assert code == 0, (words, err)
    assert {"alignment", "steps_sst2", "membership_e2e", "tasks", "momentum"} <= {*made}


def test_the_console_script_lists_its_commands(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out.strip() == "0.2.0"


def test_help_loads_nothing_heavy():
    """One process tests all commands. The module that starts a command must be light too."""
    code = f"""
import importlib, sys
from lowrank_dp.__main__ import COMMANDS, main
for command in COMMANDS:
    importlib.import_module(f"lowrank_dp.{{command}}")
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    print("heavy:", command, *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = [line for line in done.stdout.splitlines() if line.startswith("heavy:")]
    assert heavy == [f"heavy: {command}" for command in COMMANDS]


def test_a_signal_during_imports_is_one_line(tmp_path):
    """SIGINT arrives while a slow module is being imported."""
    (tmp_path / "numpy.py").write_text(
        f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport time\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    for words in (["lowrank_dp.train"], ["lowrank_dp", "mia", "--model", "x"]):
        (tmp_path / "begun").unlink(missing_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, stderr=subprocess.PIPE, text=True
        )
        while not (tmp_path / "begun").exists():
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert (child.returncode, said) == (130, "stopped by SIGINT\n"), words


def test_tables_lose_nothing_at_any_width():
    columns = ["attack", "AUC [95%]", "TPR@0.01 [95%]", "epsilon >="]
    rows = [
        ["lira-offline*", "0.512 [0.400, 0.600]", "n/a (needs 100 out)", "0.5"],
        ["bert.encoder.layer.0.query", "0.5 [0.4, 0.6]", "", "12"],
    ]
    for width in (200, 80, 60, 45, 30, 20):
        lines = _tables.table_lines(columns, rows, width)
        assert width < 30 or max(map(len, lines)) <= width, (width, lines)
        text = "".join("".join(lines).split())
        for cell in (cell for row in [columns, *rows] for cell in row):
            for word in cell.replace(".", ". ").split():
                assert word in text, (width, word)
    assert "[0.400, 0.600]" in "\n".join(_tables.table_lines(columns, rows, 60))


def test_a_name_of_any_length_is_one_short_line(capsys):
    from lowrank_dp._terminal import report

    too_long = OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000)
    assert report(str(too_long)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno ") and "File name too long: 'xxx" in line
    assert line.endswith("xxx...") and len(line) < 400


def test_progress_is_silent_without_a_terminal_whatever_the_environment_says(capsys, monkeypatch):
    """Notebooks set FORCE_COLOR; without the rule, workers would fill a cell with progress bars."""
    from lowrank_dp._terminal import progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_log_has_lines_of_progress_in_place_of_a_bar(capsys, monkeypatch):
    """Each of 100 items takes a minute. Lines are due at 1, 2, 4, 8 and 16, 26, 36, ... minutes."""
    from lowrank_dp import _terminal

    now = [0.0]
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: now[0])
    for _ in _terminal.progress(range(100), "counting"):
        now[0] += 60.0
    lines = capsys.readouterr().err.splitlines()
    minutes = [1, 2, 4, 8, 16, *range(26, 100, 10)]
    assert lines == [f"counting: {m} of 100 after {m} min" for m in minutes]
    for _ in _terminal.progress(iter("a"), "reading"):  # of unknown length
        now[0] += 90.0
    assert capsys.readouterr().err == "reading: 1 after 2 min\n"
    for _ in _terminal.progress(range(3), "shares", counts=False):
        now[0] += 30.0
    assert capsys.readouterr().err == "shares: 67% after 1 min\n"
    for _ in _terminal.progress(iter("a"), "unknown", counts=False):
        now[0] += 90.0
    assert capsys.readouterr().err == "unknown: after 2 min\n"


def test_a_log_that_takes_no_more_lines_does_not_end_the_work(monkeypatch):
    from lowrank_dp import _terminal

    monkeypatch.setattr(_terminal, "FIRST_LINE", 0)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert list(_terminal.progress(range(3), "counting")) == [0, 1, 2]
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_too_little_memory_is_one_line_that_names_the_options(capsys):
    """A real allocation of 4 PB, by torch and by numpy, and the error of a GPU."""
    from lowrank_dp.train import guards

    def refuse():
        raise torch.OutOfMemoryError("CUDA out of memory")

    for allocate in (lambda: torch.ones(10**15), lambda: np.ones(10**15), refuse):
        app = _console.new_app("allocates")
        app.command()(allocate)
        with pytest.raises(SystemExit) as exit:
            _console.run(app, [])
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: there is too little memory: lower --micro-batch-size")
        with pytest.raises(ValueError, match="micro_batch_size 4"), guards.memory(4):
            allocate()
    with pytest.raises(RuntimeError, match="another"), guards.memory(4):
        raise RuntimeError("another fault")
