"""Catalogue of figures: every entry is complete, and runs on the right config and model."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lowrank_dp import artifacts, figures
from lowrank_dp.commands import figures as figure_command
from lowrank_dp.experiments import (
    arms,
    gap,
    gradients,
    implicit_noise,
    membership,
    membership_configs,
)
from lowrank_dp.figures import catalog, lora, places, restoration, training
from tests.tasks import run_command

PAPER = Path(__file__).parent.parent / "paper_artifacts"
LENGTHY = [name for name in figures.NAMES if figures.find(name).lengthy]
# experiments that take many hours and have no saved result yet; `make figures` omits their figures
PENDING = {"steps_e2e_arms"}


def replaced(monkeypatch, name, **fields):
    """Replace some fields of a figure for one test."""
    module = {"restoration": restoration, "lora": lora, "training": training}[catalog.MODULES[name]]
    spec = dataclasses.replace(figures.find(name), **fields)
    monkeypatch.setitem(module.FIGURES, name, spec)


def test_every_figure_is_found_and_listed_once():
    listed = [*restoration.FIGURES, *lora.FIGURES, *training.FIGURES]
    assert listed == list(figures.NAMES) == list(catalog.MODULES)
    with pytest.raises(ValueError, match=r"^figure must be one of .*did you mean 'spectra'"):
        figures.find("spectr")


def test_the_names_load_no_experiment():
    code = (
        "import sys, lowrank_dp.figures; lowrank_dp.figures.NAMES; "
        "print(*[name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def leaves(config):
    """Values of all fields of a config, at any depth, by the name of the field."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= leaves(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def test_every_figure_has_both_scales_a_caption_and_takes_the_options():
    options = {"model": "m", "task": "t", "seed": 7, "device": "cuda"}
    own_models, own_seeds = ("device", "seed"), ("model", "task", "device")
    some = {"total_variation": (), "plan_gap": (), "plan_gap_large_batch": ()}
    some |= dict.fromkeys(("noise_cost", "tasks"), own_models)
    some |= {name: own_models for name in figures.NAMES if name.startswith("tasks_")}
    some |= {name: own_seeds for name in training.FIGURES}
    for name in figures.NAMES:
        spec = figures.find(name)
        assert spec.caption and callable(spec.headline) and callable(spec.plot), name
        assert {*spec.options} == {*some.get(name, options)}, name
        for scale, config in (("small", spec.small), ("full", spec.full)):
            changed = figures.config_of(name, scale, **options)
            assert type(changed) is type(config), name
            want = {option: options[option] for option in spec.options}
            assert want.keys() <= leaves(config).keys(), name
            assert leaves(config) | want == leaves(changed), name
            assert config == figures.configure(config), name
        assert spec.takes_source == ("source" in spec.run.__annotations__), name


def test_experiments_that_list_no_seed_replace_it():
    """Their options leave the seed out, since their runs do not depend on the seed of the base."""
    changes = membership_configs.arms((1,), ())["LoRA r=1"]
    runs = {
        "gap": lambda c: gap.setting_config(c, gap.settings(c)[0], 0.1, 3),
        "steps_sst2": lambda c: arms.arm_config(c.base, "DP-SGD", 0.1, 3),
        "membership": lambda c: membership._arm_config(c, changes, 20, 3),
        "implicit_noise": lambda c: implicit_noise.arm_config(c, {}, 0.1, 3, 20),
    }
    for name, run in runs.items():
        config = figures.find(name).full
        assert run(figures.configure(config, seed=5)) == run(config), name
        assert run(config).seed == 3, name


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("gap", "seed"),
        ("steps_sst2", "seed"),
        ("tasks", "model"),
        ("noise_cost", "task"),
        ("plan_gap", "device"),
        ("total_variation", "seed"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, capsys, name, option):
    """The option would be written into the provenance of a result that it did not change."""
    value = {"seed": 5, "model": "tiny", "task": "cola", "device": "cuda"}[option]
    places = "--output", tmp_path / "f", "--artifacts", tmp_path / "a"
    words = "--only", name, "--scale", "full", f"--{option}", value, *places
    status, _, error = run_command(capsys, figure_command.app, *words)
    assert status == 2 and "Traceback" not in error
    expected = f"--{option} must not be given with --only {name}"
    assert expected in " ".join(error.split()) and f"leave --{option} out" in error
    assert not [*tmp_path.iterdir()]


def holds(saved, kept):
    """Whether ``saved`` has every field of ``kept``, at any depth, with the same value."""
    if isinstance(kept, dict):
        return all(name in saved and holds(saved[name], kept[name]) for name in kept)
    if isinstance(kept, list) and isinstance(saved, list) and len(saved) == len(kept):
        return all(map(holds, saved, kept))
    return saved == kept and type(saved) is type(kept)


def test_committed_results_load_draw_and_save_again_to_the_digit(tmp_path):
    assert PENDING == {name for name in LENGTHY if not (PAPER / f"{name}.json").exists()}
    for name in figures.NAMES:
        if name in PENDING:
            continue
        spec = figures.find(name)
        result = artifacts.load_result(PAPER, name, spec.result)
        path = artifacts.save_result(result, tmp_path, name)
        saved, kept = (json.loads(p.read_text()) for p in (path, PAPER / path.name))
        assert holds(saved, kept), name  # the config may have fields that were added later
        with np.load(tmp_path / f"{name}.npz") as ours, np.load(PAPER / f"{name}.npz") as theirs:
            assert sorted(ours.files) == sorted(theirs.files), name
            for key in ours.files:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name}: {key}")
        artifacts.save_table(*spec.rows(result), tmp_path, name, caption=spec.caption)
        for suffix in (".csv", ".md", ".tex"):
            table = (tmp_path / name).with_suffix(suffix)
            assert table.read_bytes() == (PAPER / table.name).read_bytes(), table.name
        assert spec.plot(result).axes, name


def test_recomputing_keeps_the_task_of_a_lengthy_experiment(monkeypatch):
    monkeypatch.delenv("LOWRANK_DP_DATA", raising=False)
    for name, scale, task in (
        ("membership_e2e", "full", "e2e"),
        ("membership_e2e", "small", "generated-table"),
        ("spectra", "small", "generated"),
    ):
        seen = []
        replaced(monkeypatch, name, takes_source=False, run=seen.append, plot=lambda result: None)
        figures.show(name, recompute=True, scale=scale)
        config = seen[0]
        config = config.base if name == "membership_e2e" else config.gradients
        assert config.task == task, (name, scale)
    assert figures.config_of("spectra", "full", task="own").gradients.task == "own"
    with pytest.raises(ValueError, match="scale must be one of small, full"):
        figures.show("spectra", scale="smal")


def test_figures_of_one_model_can_share_it(monkeypatch):
    prepared = []
    monkeypatch.setattr(gradients, "prepare", lambda config: prepared.append(config) or object())
    for name in ("alignment", "ablation"):
        replaced(monkeypatch, name, run=lambda config, source: source, plot=lambda result: None)
    sources = {}
    first, second = (
        figures.show(name, recompute=True, sources=sources)[0] for name in ("alignment", "ablation")
    )
    assert first is second and len(prepared) == 1
    assert figures.show("ablation", recompute=True)[0] is not first


def test_the_small_scale_never_replaces_a_lengthy_result(monkeypatch, tmp_path, capsys):
    shutil.copytree(PAPER, tmp_path / "kept")
    for name in LENGTHY:  # a plot takes half a second, and test_plots.py has them all
        replaced(monkeypatch, name, run=None, plot=lambda result: Figure())
    saved = [name for name in LENGTHY if name not in PENDING]
    only = [word for name in saved for word in ("--only", name)]
    places = "--output", tmp_path / "figures", "--artifacts", tmp_path / "kept"
    status, _, error = run_command(capsys, figure_command.app, *only, "--scale", "small", *places)
    assert status == 0
    said = " ".join(error.split())
    assert len(saved) == len(LENGTHY) - len(PENDING) >= 8
    for name in saved:
        for path in PAPER.glob(f"{name}.*"):
            assert (tmp_path / "kept" / path.name).read_bytes() == path.read_bytes(), path.name
        assert f"{name}: drawn from the saved result" in said


def test_what_has_no_saved_result_is_left_out_unless_it_is_asked_for(monkeypatch, tmp_path, capsys):
    made = []

    def make(name, config, *_):
        made.append(name)
        return {"figure": name, "headline": {}, "privacy": "", "ran on": "", "files": []}

    monkeypatch.setattr(figure_command, "_make", make)
    shutil.copytree(PAPER, tmp_path / "kept")
    (tmp_path / "kept" / "steps_mnli.json").unlink()
    missing = PENDING | {"steps_mnli"}
    places = "--output", tmp_path / "figures", "--artifacts", tmp_path / "kept"
    for words in ((), ("--redraw",)):
        made.clear()
        status, _, error = run_command(capsys, figure_command.app, *words, *places)
        assert status == 0 and made == [name for name in figures.NAMES if name not in missing]
        for name in missing:
            assert f"{name}: left out, since no result is saved" in " ".join(error.split()), words
    made.clear()
    run_command(capsys, figure_command.app, "--scale", "full", "--update", *places)
    assert made == [*figures.NAMES]  # this scale computes all
    monkeypatch.undo()
    status, _, error = run_command(
        capsys, figure_command.app, "--redraw", "--only", "steps_mnli", *places
    )
    assert status == 2 and "no result steps_mnli.json" in " ".join(error.split())
    places = "--output", tmp_path / "new", "--artifacts", tmp_path / "nothing"
    status, _, error = run_command(capsys, figure_command.app, "--redraw", *places)
    assert status == 2 and "--artifacts must be a folder of saved results" in error
    assert not (tmp_path / "new").exists() and not (tmp_path / "nothing").exists()


def unchanged(folder):
    """Whether a copy of the folder holds every committed result, byte for byte."""
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in PAPER.glob("*.*"))


def stand_in(monkeypatch, name, description=None):
    """Let an experiment return the saved result with the configuration that was asked for."""
    saved = artifacts.load_result(PAPER, name, figures.find(name).result)

    def run(config):
        changed = {} if description is None else {"description": description}
        return dataclasses.replace(saved, config=config, provenance={}, **changed)

    replaced(monkeypatch, name, run=run, takes_source=False, plot=lambda result: Figure((1, 1)))


def test_without_the_data_the_committed_results_are_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LOWRANK_DP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PAPER, tmp_path / "paper_artifacts")
    for name in ("spectra", "lora_noise"):
        replaced(monkeypatch, name, run=None, plot=lambda result: Figure((1, 1)))
    status, _, error = run_command(capsys, figure_command.app, "--only", "spectra,lora_noise")
    assert status == 0 and unchanged(tmp_path / "paper_artifacts")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}{suffix}" for name in ("spectra", "lora_noise") for suffix in (".png", ".pdf")
    }
    assert "spectra: not computed but drawn" in " ".join(error.split())
    assert not (tmp_path / "trials").exists()


def test_another_task_model_scale_or_seed_is_a_trial_in_a_folder_of_its_own(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PAPER, tmp_path / "paper_artifacts")
    stand_in(monkeypatch, "spectra")
    folders = set()
    for words in (
        ("--task", "generated"),
        ("--task", "generated", "--model", "tiny"),
        ("--task", "sst2", "--scale", "full"),
        ("--task", "sst2", "--seed", "5"),
    ):
        status, _, error = run_command(capsys, figure_command.app, "--only", "spectra", *words)
        assert status == 0 and unchanged(tmp_path / "paper_artifacts"), words
        (folder,) = {*(tmp_path / "trials").iterdir()} - folders
        folders.add(folder)
        assert f"a trial, written to trials/{folder.name}" in " ".join(error.split()), words
        assert {path.name for path in folder.iterdir()} == {
            f"spectra{suffix}"
            for suffix in (".png", ".pdf", ".json", ".npz", ".csv", ".md", ".tex")
        }
        assert [*(tmp_path / "figures").iterdir()] == [], words
    words = "--only", "spectra", "--task", "generated", "--output", "asked"
    assert run_command(capsys, figure_command.app, *words)[0] == 0
    assert (tmp_path / "asked" / "spectra.png").exists()
    assert run_command(capsys, figure_command.app, *words, "--update")[0] == 0
    config = json.loads((tmp_path / "paper_artifacts" / "spectra.json").read_text())["config"]
    assert config["gradients"]["task"] == "generated"  # replaced on purpose


def test_trials_that_differ_in_one_option_never_share_a_folder(tmp_path):
    first = {"task": "sst2", "model": "tiny", "seed": 0, "device": "cpu"}
    requests = [("small", first), ("full", first)] + [
        ("small", first | change)
        for change in ({"task": "cola"}, {"model": "minilm"}, {"seed": 1}, {"device": "cuda"})
    ]
    folders = {
        places.trial_folder(
            "spectra", places.Request(scale, changes, frozenset(), ("spectra",), tmp_path / "a")
        )
        for scale, changes in requests
    }
    assert len(folders) == len(requests) and {f.parent for f in folders} == {tmp_path / "trials"}


def test_the_same_options_on_another_model_or_data_are_a_trial(monkeypatch, tmp_path, capsys):
    """A config can leave the model to what is installed: without MiniLM, the tiny model runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PAPER, tmp_path / "paper_artifacts")
    words = "--only", "spectra", "--task", "sst2"
    stand_in(monkeypatch, "spectra", description="tiny, 100 examples")
    status, _, error = run_command(capsys, figure_command.app, *words)
    assert status == 0 and unchanged(tmp_path / "paper_artifacts")
    assert "computed on tiny, 100 examples" in " ".join(error.split())
    assert len([*(tmp_path / "trials").glob("*/spectra.json")]) == 1
    saved = artifacts.load_result(PAPER, "spectra", figures.find("spectra").result).description
    model, rest = saved.split("; ", 1)  # a later version adds words
    stand_in(monkeypatch, "spectra", description=f"{model}; in float32; {rest}")
    assert run_command(capsys, figure_command.app, *words)[0] == 0
    assert not unchanged(tmp_path / "paper_artifacts")  # the new provenance is the only change
    assert (tmp_path / "figures" / "spectra.png").exists()


def test_where_no_result_is_saved_only_the_published_config_goes_beside_the_others(tmp_path):
    def place(name, **changes):
        own = changes.pop("own_folder", False)
        scale = changes.pop("scale", "small")
        given = frozenset(changes)
        changes = {"device": "cpu", "seed": 0} | changes
        return places.place_of(
            name, places.Request(scale, changes, given, (name,), tmp_path / "a", own_folder=own)
        )

    for name, options, trial in (
        ("spectra", {"task": "sst2"}, False),
        ("spectra", {"task": "generated"}, True),
        ("spectra", {"task": "generated", "own_folder": True}, False),
        ("total_variation", {}, False),
        ("steps_sst2", {"scale": "full"}, False),
        ("steps_sst2", {"scale": "full", "task": "cola"}, True),
        ("steps_sst2", {"task": "generated"}, True),
    ):
        found = place(name, **options)
        assert found.config is not None and found.is_trial == trial, (name, options)
        assert found.folder.parent == (tmp_path / "trials" if trial else tmp_path), name
    with pytest.raises(FileNotFoundError, match=r"^no result tasks.json in .* --artifacts"):
        place("tasks")


def test_update_is_refused_for_a_trial_of_a_lengthy_figure(monkeypatch, tmp_path, capsys):
    """The options were dropped, and the saved result of another task was drawn."""
    made = {}

    def make(name, place, *_):
        made[name] = place.config
        return {"figure": name, "headline": {}, "privacy": "", "ran on": "", "files": []}

    monkeypatch.setattr(figure_command, "_make", make)
    places = "--output", tmp_path / "f", "--artifacts", PAPER
    lengthy = "--only", "steps_sst2"
    for words in (("--task", "cola"), ("--scale", "small"), ("--task", "cola", "--device", "cuda")):
        words = *lengthy, *words, "--update", *places
        status, _, error = run_command(capsys, figure_command.app, *words)
        said = " ".join(error.split())
        assert status == 2 and "the small scale of steps_sst2" in said and "--scale full" in said
        assert "leave --update out" in said and not made
    run_command(capsys, figure_command.app, *lengthy, *places)
    assert made.pop("steps_sst2") is None  # the saved result is drawn
    words = *lengthy, "--scale", "full", "--update", *places
    assert run_command(capsys, figure_command.app, *words)[0] == 0
    assert made.pop("steps_sst2") == figures.config_of("steps_sst2", "full")
    # without names, --update replaces the results of the small scale, and draws the others
    assert run_command(capsys, figure_command.app, "--update", *places)[0] == 0
    assert made["steps_sst2"] is None and made["spectra"] is not None


def test_only_takes_commas_and_may_be_repeated(monkeypatch, tmp_path, capsys):
    made = []

    def make(name, *_):
        made.append(name)
        return {"figure": name, "headline": {}, "privacy": "", "ran on": "", "files": []}

    monkeypatch.setattr(figure_command, "_make", make)
    places = "--output", tmp_path / "f", "--artifacts", PAPER
    words = "--only", "spectra, tasks", "--only", "spectra", "--only", "ablation"
    assert run_command(capsys, figure_command.app, *words, *places)[0] == 0
    assert made == ["spectra", "tasks", "ablation"]
    words = "--only", "spectra,tasc"
    status, _, error = run_command(capsys, figure_command.app, *words, *places)
    assert status == 2 and "did you mean 'tasks'" in error


def test_the_default_task_never_is_the_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWRANK_DP_DATA", raising=False)
    assert figures.default_task() == "generated"
    monkeypatch.setenv("LOWRANK_DP_DATA", str(tmp_path))
    assert figures.default_task() == "generated"
    (tmp_path / "glue/sst2").mkdir(parents=True)
    (tmp_path / "glue/sst2/train.jsonl.gz").touch()
    assert figures.default_task() == "sst2"


def test_a_computed_result_says_how_it_was_made(monkeypatch, tmp_path, capsys):
    """Experiments return no provenance: the command adds it, with seed and device."""
    computed = figures.find("total_variation").small
    computed = figures.compute(
        "total_variation",
        dataclasses.replace(computed, ranks=(1, 4), widths=(2, 64), joint_ranks=(4,)),
    )
    assert computed.provenance == {}
    replaced(monkeypatch, "total_variation", run=lambda config: computed, options=("seed",))
    places = "--output", tmp_path, "--artifacts", tmp_path
    words = "--only", "total_variation", "--seed", 3, *places
    assert run_command(capsys, figure_command.app, *words)[0] == 0
    found = json.loads((tmp_path / "total_variation.json").read_text())["provenance"]
    assert found["seed"] == 3 and found["device"] == "cpu"
    assert found["git_commit"] and found["versions"]["numpy"] == np.__version__
