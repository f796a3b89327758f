"""Interrupted runs: exceptions, kill -9, full disks, damage; and the privacy they then claim."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_dp.train.result as result_module
from lowrank_dp.artifacts import runs
from lowrank_dp.artifacts.runs import RunFolder, open_run
from lowrank_dp.mechanism import GaussianMechanism, SecureRandom
from lowrank_dp.restore import GradientRestorer
from lowrank_dp.train import TrainConfig, load_result
from lowrank_dp.train import identity as identity_module
from lowrank_dp.train import loop as train_module
from lowrank_dp.train import state as state_module
from lowrank_dp.train import step as step_module
from lowrank_dp.train.identity import versions_and_machine
from lowrank_dp.train.loop import train
from lowrank_dp.train.setup import prepare
from tests.oracles import assert_refused
from tests.tasks import Stop, run_main, save_bert, train_words, write_reviews

STEPS = 7
LORA = {
    "method": "lora",
    "optimizer": "adam",
    "momentum_beta": 0.9,
    "scheme": "optimal",
    "dropout": True,
    "noise_multiplier": 0.05,
    "rank": 4,
}
FULL = {"method": "full", "optimizer": "sgd", "beta1": 0.9, "schedule": "linear"}
FILTER = {"method": "lora-frozen-a", "filter_b": (0.2, 0.1), "filter_a": (-0.5, -0.2)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Make a BERT of one layer with dropout and random weights, and a task of sentences."""
    folder = tmp_path_factory.mktemp("places")
    save_bert(folder / "model", hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    write_reviews(folder / "data")
    return folder


@pytest.fixture
def config(places):
    return make_config(places)


def make_config(places, **changes):
    base = {
        "model": str(places / "model"),
        "task": str(places / "data"),
        "steps": STEPS,
        "batch_size": 10,
        "noise_multiplier": 0.6,
        "learning_rate": 1e-2,
        "eval_every": 2,
        "snapshot_every": 3,
        "micro_batch_size": 8,
        "seed": 5,
    }
    return TrainConfig(**base | changes)


def weights(folder):
    (file,) = [path for path in folder.glob("*model.safetensors")]
    return file.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(places, tmp_path_factory):
    """Return the weights of runs without an interruption, by configuration."""
    known = {}

    def find(config):
        key = json.dumps(config.as_json())
        if key not in known:
            folder = tmp_path_factory.mktemp("reference")
            train(config, folder)
            known[key] = weights(folder)
        return known[key]

    return find


def break_off(monkeypatch, owner, name, count, *, after=False):
    """Let call number ``count`` of a function raise, before or after the function does its work."""
    original, calls = getattr(owner, name), []

    def breaking(*args, **kwargs):
        calls.append(name)
        if len(calls) == count and not after:
            raise Stop
        result = original(*args, **kwargs)
        if len(calls) == count:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, breaking)


def interrupt(monkeypatch, config, folder, owner, name, count, *, after=False, resume=False):
    with monkeypatch.context() as patch:
        break_off(patch, owner, name, count, after=after)
        with pytest.raises(Stop):
            train(config, folder, resume=resume)
    assert not (folder / "training.json").exists()


def test_a_run_finishes_where_its_schedule_has_lowered_the_rate(places, tmp_path, monkeypatch):
    """The first three steps move matrices, and the last three are too small for float32."""
    model = shutil.copytree(places / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    ones = {name: torch.ones_like(p) for name, p in tensors.items() if p.ndim == 1}
    save_file(tensors | ones, model / "model.safetensors", metadata={"format": "pt"})
    changes = {"optimizer": "adam", "schedule": "cosine", "learning_rate": 2e-9}
    config = make_config(places, model=str(model), **changes, steps=8, snapshot_every=5)
    folder = tmp_path / "run"
    interrupt(monkeypatch, config, folder, train_module, "take_step", 6)
    assert train(config, folder, resume=True).releases == 8


def test_the_progress_of_a_resumed_run_names_its_first_step(places, tmp_path, monkeypatch):
    """A snapshot is saved after step 3; the run breaks off in its fifth step."""
    said = []
    monkeypatch.setattr(train_module, "progress", lambda steps, words: said.append(words) or steps)
    config = make_config(places, task="generated", max_examples=40)
    interrupt(monkeypatch, config, tmp_path / "run", train_module, "take_step", 5)
    train(config, tmp_path / "run", resume=True)
    assert said == ["training generated", "training generated from step 3"]


def assert_finished(config, folder, result, reference):
    """Check for the state of an undisturbed run: equal weights, and one release per step."""
    assert weights(folder) == reference
    assert result.releases == config.steps
    assert result.epsilon == GaussianMechanism(config.noise_multiplier, 1.0, 10 / 40).epsilon(
        config.steps, result.delta
    )
    assert [entry["step"] for entry in result.curve] == [0, 2, 4, 6, 7]
    assert load_result(folder) == result
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left <= {".lock"} and not (folder / "snapshots").exists()


PLACES = {
    "before a release is noted": (RunFolder, "begin_release", 5, False),
    "after the first is noted": (RunFolder, "begin_release", 1, True),
    "after a release is noted": (RunFolder, "begin_release", 6, True),
    "after the noise": (GaussianMechanism, "add_noise", 4, True),
    "before restoring": (GradientRestorer, "restore", 6, False),
    "after restoring": (GradientRestorer, "restore", 2, True),
    "in the first evaluation": (train_module, "_evaluate", 1, False),
    "in an evaluation": (train_module, "_evaluate", 4, True),
    "in the last evaluation": (train_module, "_evaluate", 5, True),
    "before a snapshot": (RunFolder, "save_snapshot", 3, False),
    "between a snapshot's two files": (runs, "write_json", 3, False),
    "after a snapshot": (RunFolder, "save_snapshot", 2, True),
    "after the last snapshot": (RunFolder, "save_snapshot", 4, True),
    "before the checkpoint": (RunFolder, "save_checkpoint", 1, False),
    "writing the checkpoint": (result_module, "save_file", 1, False),
    "between model and manifest": (runs, "write_json", 5, False),
    "between manifest and result": (runs, "write_json", 6, False),
}


FEW = (
    "after a release is noted",
    "after the noise",
    "between a snapshot's two files",
    "writing the checkpoint",
    "between manifest and result",
)


def resume_after(place, config, folder, reference, monkeypatch):
    owner, name, count, after = PLACES[place]
    interrupt(monkeypatch, config, folder, owner, name, count, after=after)
    assert_finished(config, folder, train(config, folder, resume=True), reference)


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.slow] * (p not in FEW[1:3])) for p in PLACES]
)
def test_resuming_gives_the_weights_of_the_uninterrupted_run(
    place, places, uninterrupted, tmp_path, monkeypatch
):
    config = make_config(places, **LORA)
    resume_after(place, config, tmp_path, uninterrupted(config), monkeypatch)


@pytest.mark.slow
def test_resuming_a_full_model_gives_the_weights_of_the_uninterrupted_run(
    places, uninterrupted, tmp_path, monkeypatch
):
    config = make_config(places, **FULL)
    for place in FEW:
        resume_after(place, config, tmp_path / place, uninterrupted(config), monkeypatch)


@pytest.mark.slow
def test_several_interruptions_in_a_row(places, uninterrupted, tmp_path, monkeypatch):
    config = make_config(places, **FILTER)
    reference = uninterrupted(config)
    for count, resume in ((3, False), (3, True), (2, True), (1, True), (4, True)):
        interrupt(
            monkeypatch,
            config,
            tmp_path,
            GradientRestorer,
            "restore",
            count,
            resume=resume,
            after=True,
        )
    result = train(config, tmp_path, resume=True)
    assert_finished(config, tmp_path, result, reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, None])
def test_a_replayed_step_makes_the_same_release(seed, places, tmp_path, monkeypatch):
    """The noisy sums are the same to the bit, also without a seed, so both count as one release."""
    config = make_config(places, **LORA | {"seed": seed})
    original, made = GaussianMechanism.add_noise, []

    def recording(self, sums, generator=None):
        noisy = original(self, sums, generator)
        made.append({name: total.clone() for name, total in noisy.items()})
        return noisy

    monkeypatch.setattr(GaussianMechanism, "add_noise", recording)
    interrupt(monkeypatch, config, tmp_path, GradientRestorer, "restore", 6)
    assert len(made) == 6
    result = train(config, tmp_path, resume=True)
    replayed = made[6:]  # from step 3 on
    assert len(replayed) == 4 and result.releases == STEPS
    for first, again in zip(made[3:6], replayed, strict=False):
        assert all(torch.equal(first[name], again[name]) for name in first)
    name = next(iter(made[0]))
    assert len({tuple(sums[name].flatten().tolist()) for sums in made}) == STEPS
    assert ("not secret" in result.privacy) == (seed is not None)


@pytest.mark.slow
def test_without_a_seed_every_run_is_another(places, tmp_path):
    config = make_config(places, steps=2, seed=None)
    for name in "ab":
        train(config, tmp_path / name)
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


# A stream of draws that cannot be continued


def elsewhere(device):
    return {"torch": "99.0", "device": "cpu"}


def go_elsewhere(patch):
    patch.setattr(state_module, "environment", elsewhere)
    patch.setattr(train_module, "environment", elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, None])
def test_steps_drawn_anew_count_again(seed, places, tmp_path, monkeypatch):
    """Six releases are made here, and steps 3 to 6 again on another machine, which count too.

    The second run is killed there as well. When it is resumed, its replayed steps count once.
    """
    config = make_config(places, **FULL | {"seed": seed})
    interrupt(monkeypatch, config, tmp_path, GradientRestorer, "restore", 6)
    with monkeypatch.context() as patch:
        go_elsewhere(patch)
        interrupt(monkeypatch, config, tmp_path, GradientRestorer, "restore", 4, resume=True)
        seen = []
        result = train(config, tmp_path, resume=True, on_start=lambda _, count: seen.append(count))
    # without a seed, the second attempt on the other machine could draw new noise from step 6's
    # snapshot on; but the snapshot was made on that machine, so its stream of noise is continued
    assert seen == [result.releases] == [6 + 4]
    mechanism = GaussianMechanism(0.6, 1.0, 0.25)
    assert (
        result.epsilon
        == mechanism.epsilon(10, result.delta)
        > mechanism.epsilon(STEPS, result.delta)
    )
    assert "after 10 steps" in result.privacy


@pytest.mark.slow
def test_a_target_is_not_exceeded_by_steps_drawn_anew(places, uninterrupted, tmp_path, monkeypatch):
    config = make_config(places, noise_multiplier=None, epsilon=4.0, steps=5)
    interrupt(monkeypatch, config, tmp_path, GradientRestorer, "restore", 5)
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "snapshots").iterdir())
    with monkeypatch.context() as patch:
        go_elsewhere(patch)
        with pytest.raises(
            ValueError,
            match=r"resuming would spend epsilon .*, more than 4: "
            r"2 steps would be drawn anew, .*99\.0",
        ) as error:
            train(config, tmp_path, resume=True)
    assert "\n" not in str(error.value)
    after = sorted((path.name, path.read_bytes()) for path in (tmp_path / "snapshots").iterdir())
    assert before == after
    result = train(config, tmp_path, resume=True)  # here it goes on
    assert result.releases == 5 and result.epsilon <= 4.0
    assert weights(tmp_path) == uninterrupted(config)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"secure_rng": True}])
def test_secure_draws_are_replayed_and_count_once(changes, places, tmp_path, monkeypatch):
    """The process dies, three of its six releases are lost, and the resumed run repeats them."""
    config = make_config(places, **FULL | {"seed": None} | changes)
    original, made = GaussianMechanism.add_noise, []

    def recording(self, sums, generator=None):
        assert isinstance(generator, SecureRandom)
        made.append(original(self, sums, generator))
        return made[-1]

    monkeypatch.setattr(GaussianMechanism, "add_noise", recording)
    interrupt(monkeypatch, config, tmp_path, GradientRestorer, "restore", 6)
    for path in (tmp_path / "snapshots").iterdir():  # they hold the key
        assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    result = train(config, tmp_path, resume=True)
    assert len(made) == 6 + 4  # from step 3 on
    assert result.releases == STEPS and "AES-128-CTR" in result.privacy
    for first, again in zip(made[3:6], made[6:], strict=False):
        assert all(torch.equal(first[name], again[name]) for name in first)


def change_word_embeddings(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "word_embeddings" in name)
    tensors[name] *= 1.5
    save_file(tensors, path, {"format": "pt"})


def change_activation(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"gelu"', '"relu"'))


def change_tokenizer(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 63}))


@pytest.mark.slow
def test_what_changes_the_sums_begins_new_noise_that_counts(places, tmp_path, monkeypatch):
    """A change is made between the kill and the resumption, and another one at the same step."""
    shutil.copytree(places / "model", tmp_path / "model")
    config = make_config(places, **LORA | {"model": str(tmp_path / "model")})
    original, made = GaussianMechanism.add_noise, []

    def recording(self, sums, generator=None):
        noisy = original(self, sums, generator)
        name = next(iter(sums))
        made.append((noisy[name] - sums[name]).flatten()[:8].tolist())
        return noisy

    monkeypatch.setattr(GaussianMechanism, "add_noise", recording)
    interrupt(monkeypatch, config, tmp_path / "run", GradientRestorer, "restore", 5)  # saved at 3
    for change, named in (
        (change_activation, "configuration"),
        (change_tokenizer, "tokenizer"),
        (change_word_embeddings, "weights"),
    ):
        run = tmp_path / named
        shutil.copytree(tmp_path / "run", run)
        shutil.copytree(places / "model", tmp_path / "model", dirs_exist_ok=True)
        change(tmp_path / "model")
        with pytest.warns(UserWarning, match=f"resuming with new noise from step 3.*{named}: "):
            interrupt(monkeypatch, config, run, GradientRestorer, "restore", 2, resume=True)
        assert RunFolder(run).num_releases() == 5 + 2, named
    change_word_embeddings(tmp_path / "model")
    with pytest.warns(UserWarning, match="then / now: .*weights: "):
        result = train(config, run, resume=True)
    assert result.releases == 5 + 2 + 4 and len(made) == 5 + 3 * 2 + 4
    # the same noise would agree in all 8 entries; single entries of different noise may be equal
    assert all(
        max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-6
        for i, one in enumerate(made)
        for other in made[:i]
    )


def without_the_processor(device):
    """Return the versions and the machine as earlier versions of the package saved them."""
    found = versions_and_machine(device)
    del found["processor"]
    return found


def test_a_folder_without_the_processor_is_resumed_with_new_noise(places, tmp_path, monkeypatch):
    """Runs of earlier versions did not name the processor, which may be another one now."""
    config = make_config(places, **FULL)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "versions_and_machine", without_the_processor)
        interrupt(monkeypatch, config, tmp_path, GradientRestorer, "restore", 7)
    with pytest.warns(UserWarning, match="new noise from step 6 .*: processor: not set / "):
        result = train(config, tmp_path, resume=True)
    assert result.releases == STEPS + 1 and result.epsilon == GaussianMechanism(
        0.6, 1.0, 0.25
    ).epsilon(STEPS + 1, result.delta)
    # a finished run is found again, whatever processor it is read on
    monkeypatch.setattr(identity_module, "_processor", lambda: "another processor")
    break_off(monkeypatch, train_module, "prepare", 1)
    assert train(config, tmp_path, resume=True) == result


def test_a_run_resumed_with_smaller_micro_batches_draws_new_noise_that_counts(
    places, tmp_path, monkeypatch, capsys
):
    """Such as after a lack of memory: sums in other micro-batches differ in their rounding."""
    config = make_config(places, **FULL)
    interrupt(monkeypatch, config, tmp_path / "run", GradientRestorer, "restore", 5)  # saved at 3
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    smaller = replace(config, micro_batch_size=3)
    with pytest.warns(UserWarning, match="new noise from step 3 .*: micro_batch_size: 8 / 3"):
        interrupt(
            monkeypatch, smaller, tmp_path / "run", GradientRestorer, "restore", 2, resume=True
        )
    assert RunFolder(tmp_path / "run").num_releases() == 5 + 2
    with pytest.warns(UserWarning, match="new noise from step 3 "):  # the same as just now
        result = train(smaller, tmp_path / "run", resume=True)
    assert result.releases == 5 + 4 and result.config == smaller
    mechanism = GaussianMechanism(0.6, 1.0, 0.25)
    assert result.epsilon == mechanism.epsilon(9, result.delta)
    assert train(config, tmp_path / "run", resume=True) == result  # finished, in either size
    words = ("train", "--output", tmp_path / "again", "--resume", "--micro-batch-size", 3)
    assert "micro_batch_size: 8 / 3" in run_main(capsys, *words)[2]
    assert load_result(tmp_path / "again").releases == 9


def test_dropout_masks_are_those_of_the_runs_own_key(places, monkeypatch):
    """Without a seed, the masks come from a key that only the snapshots hold.

    One record more shifts the masks of the other records, so that a known mask would reveal it.
    """
    setup = prepare(make_config(places, dropout=True, seed=None), 5)
    first, other = (state_module.first_state(setup.config, "stream") for _ in range(2))
    assert len(first.mask_key) == 32 and first.mask_key != other.mask_key
    seeded = replace(setup.config, seed=3)
    keys = [state_module.first_state(seeded, stream).mask_key for stream in ("a", "a", "b")]
    assert keys[0] == keys[1] != keys[2]

    document, tensors = state_module.pack(setup, first)
    assert first.mask_key.hex() not in str(document)
    restored = state_module.unpack(setup, document, tensors)
    assert restored.mask_key == first.mask_key and not restored.restarted
    changed = {**document, "identity": {**document["identity"], "torch": "another"}}
    assert state_module.unpack(setup, changed, tensors).mask_key not in (first.mask_key, b"")

    clip, masks_from = step_module._clipped_sum, []

    def look(*arguments):
        masks_from.append(torch.get_rng_state())
        return clip(*arguments)

    monkeypatch.setattr(step_module, "_clipped_sum", look)
    with train_module._preserved_generators(setup.config):
        for state, step in ((first, 0), (restored, 0), (restored, 1), (other, 0)):
            state.step = step
            step_module.take_step(setup, state)
        torch.manual_seed(setup.seed)  # which the manifest publishes
        published = torch.get_rng_state()
    one, again, *others = masks_from
    assert torch.equal(one, again)
    assert not any(torch.equal(one, state) for state in (*others, published))


def test_the_runs_own_gpu_is_used(places, monkeypatch):
    """The current GPU of a process may be another one."""
    config = replace(make_config(places, dropout=True), device="cuda:1")
    states = {torch.device("cuda", i): torch.full((2,), i) for i in range(2)}

    def set_state(state, device="cuda:0"):
        states[torch.device(device)] = state

    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device="cuda:0": states[torch.device(device)]
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with train_module._preserved_generators(config):
        states |= {device: torch.full((2,), 8) for device in states}
    assert [state.tolist() for state in states.values()] == [[8, 8], [1, 1]]
    missing = replace(config, device="cuda:5")  # is refused by the loader of the model
    with train_module._preserved_generators(missing):
        pass
    waited_for = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    step_module._seconds(config.device)
    assert waited_for == ["cuda:1"]


@pytest.mark.slow
def test_a_copied_folder_makes_the_same_releases(places, tmp_path, monkeypatch):
    """Two resumptions of one snapshot make one sequence, so no noise is used for two sums."""
    config = make_config(places, **FULL | {"seed": None})
    interrupt(monkeypatch, config, tmp_path / "a", GradientRestorer, "restore", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        assert train(config, tmp_path / name, resume=True).releases == STEPS
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


# Damage


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """``half_done(config, folder)``: copy a run that stopped in step 7, with snapshots 3 and 6."""
    known = {}

    def copy(config, folder):
        key = json.dumps(config.as_json())
        if key not in known:
            known[key] = tmp_path_factory.mktemp("half done")
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, config, known[key], GradientRestorer, "restore", 7)
            names = {path.name for path in (known[key] / "snapshots").iterdir()}
            assert names == {
                "releases.jsonl",
                "step-000003.json",
                "step-000003.safetensors",
                "step-000006.json",
                "step-000006.safetensors",
            }
        shutil.copytree(known[key], folder, dirs_exist_ok=True)

    return copy


def test_a_torn_last_line_of_the_ledger_was_no_release(config, uninterrupted, half_done, tmp_path):
    half_done(config, tmp_path)
    with (tmp_path / "snapshots" / "releases.jsonl").open("ab") as ledger:
        ledger.write(b'{"stream": "another", "st')
    result = train(config, tmp_path, resume=True)
    assert_finished(config, tmp_path, result, uninterrupted(config))


def test_a_damaged_ledger_is_refused(config, half_done, tmp_path):
    """Lines are cut, appended, of another kind, or missing, which would understate the releases."""
    for number, (damage, words) in enumerate(
        [
            *(
                (damage, r"releases.jsonl is damaged, .* another folder")
                for damage in (
                    lambda text: text.replace(b'"step": 2', b'"st'),
                    lambda text: b"\0" * len(text) + b"\n",
                    lambda text: text + b"[3]\n",
                    lambda text: text + b'{"stream": "x"}\n',
                    lambda text: text + b"\n",
                    lambda text: b"\xff" + text,
                )
            ),
            *(
                (lambda text, kept=kept: b"".join(text.splitlines(True)[:kept]), "is unknown")
                for kept in (0, 5)
            ),
            (None, "the privacy spent is unknown"),
        ]
    ):
        folder = tmp_path / str(number)
        half_done(config, folder)
        ledger = folder / "snapshots" / "releases.jsonl"
        if damage is None:
            ledger.unlink()
        else:
            ledger.write_bytes(damage(ledger.read_bytes()))
        with pytest.raises(ValueError, match=words) as error:
            train(config, folder, resume=True)
        assert "\n" not in str(error.value), number
        assert not (folder / "training.json").exists(), number


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def other_json(path):
    path.write_text("[1, 2]")


DAMAGE = [
    (truncate, ".safetensors"),
    (flip, ".safetensors"),
    (empty, ".safetensors"),
    (remove, ".safetensors"),
    (truncate, ".json"),
    (empty, ".json"),
    (remove, ".json"),
    (other_json, ".json"),
]


def test_a_damaged_snapshot_is_passed_over_for_the_one_before(
    places, uninterrupted, half_done, tmp_path
):
    """Each kind of damage leads to the snapshot of step 3; one of the runs is then finished."""
    config = make_config(places, **LORA)
    for number, (damage, suffix) in enumerate(DAMAGE):
        folder = tmp_path / str(number)
        half_done(config, folder)
        damage(folder / "snapshots" / f"step-000006{suffix}")
        found, _ = RunFolder(folder).load_snapshot()
        assert found["step"] == 3, (damage.__name__, suffix)
    result = train(config, folder, resume=True)
    assert_finished(config, folder, result, uninterrupted(config))


def spoil(rng, content):
    """Flip a bit; remove, insert or overwrite a byte; cut the content; or exchange two lines."""
    place, kind = rng.randrange(len(content)), rng.randrange(7)
    if kind == 5:
        lines = content.split(b"\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
        return b"\n".join(lines)
    if kind == 6:  # a digit, so that the JSON stays valid
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        place = rng.choice(digits) if digits else place
        return content[:place] + bytes([48 + rng.randrange(10)]) + content[place + 1 :]
    return {
        0: content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :],
        1: content[:place] + content[place + 1 :],
        2: content[:place] + bytes([rng.randrange(256)]) + content[place:],
        3: content[:place],
        4: content[:place] + content[place + 3 :],
    }[kind]


def test_any_damage_is_refused_in_a_line_or_harmless(tmp_path):
    """Each of 200 damaged files is refused in one line, or a snapshot that was written is read."""
    rng = random.Random(0)
    with open_run(tmp_path / "run") as folder:
        written = {}
        for step in range(9):
            if step % 3 == 0:
                state = {"config": {"a": step}, "seed": 5, "curve": [{"loss": 0.25 + step}]}
                folder.save_snapshot(step, state, {"t": torch.full((3,), float(step))})
                written[step] = state
            folder.begin_release("stream", step)
        files = {path: path.read_bytes() for path in sorted(folder.snapshots.iterdir())}
        assert len(files) == 5
        outcomes = {"refused": 0, "read": 0}
        for number in range(200):
            path = list(files)[number % len(files)]
            spoiled = spoil(rng, files[path])
            path.write_bytes(spoiled)
            try:
                found, tensors = folder.load_snapshot()
                made = folder.num_releases("stream", range(found["step"], 9))
            except ValueError as error:
                assert "\n" not in str(error) and "start afresh" in str(error)
                outcomes["refused"] += 1
            else:
                step = found["step"]
                assert {name: found[name] for name in written[step]} == written[step]
                assert torch.equal(tensors["t"], torch.full((3,), float(step))) and made == 9
                outcomes["read"] += 1
            for other, content in files.items():
                other.write_bytes(content)
        assert min(outcomes.values()) > 20
        # without files there is no snapshot
        for path in files:
            path.unlink()
        assert folder.load_snapshot() is None


def test_a_step_that_was_turned_back_is_not_believed(config, half_done, tmp_path):
    """The JSON's step 6 is edited to 4, so that releases would be counted for fewer draws."""
    half_done(config, tmp_path)
    path = tmp_path / "snapshots" / "step-000006.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 4}))
    assert RunFolder(tmp_path).load_snapshot()[0]["step"] == 3


def test_files_of_an_earlier_version_are_named(config, half_done, tmp_path):
    half_done(config, tmp_path)
    ledger = tmp_path / "snapshots" / "releases.jsonl"
    kept = ledger.read_bytes()
    ledger.write_text("".join(json.dumps({"stream": "x", "step": i}) + "\n" for i in range(7)))
    with pytest.raises(ValueError, match=r"releases.jsonl was written by an earlier version"):
        train(config, tmp_path, resume=True)
    ledger.write_bytes(kept)
    path = tmp_path / "snapshots" / "step-000006.json"
    document = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {
                name: value
                for name, value in document.items()
                if name not in ("digest", "format", "ledger")
            }
        )
    )
    with pytest.raises(ValueError, match=r"step-000006.json was written by an earlier version"):
        train(config, tmp_path, resume=True)


def test_without_a_whole_snapshot_the_releases_made_are_not_forgotten(places, half_done, tmp_path):
    """The privacy that they spent depends on a configuration that is lost with the snapshot."""
    for seed in (5, None):
        config, folder = make_config(places, seed=seed), tmp_path / str(seed)
        half_done(config, folder)
        for path in (folder / "snapshots").glob("*.safetensors"):
            flip(path)
        with pytest.raises(ValueError, match="no intact snapshot, though 7 releases were made"):
            train(config, folder, resume=True)


# A run that differs from the run in the folder


def test_another_configuration_is_refused(config, places, half_done, tmp_path):
    half_done(config, tmp_path)
    other = make_config(places, learning_rate=2e-2, snapshot_every=4)
    with pytest.raises(
        ValueError,
        match=r"differ in learning_rate: 0.02 / 0.01; "
        r"snapshot_every: 4 / 3$",
    ):
        train(other, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"must be empty, found snapshots: .*--resume"):
        train(config, tmp_path)


def test_other_data_is_refused(places, tmp_path, half_done):
    write_reviews(tmp_path / "data")
    config = make_config(places, task=str(tmp_path / "data"))
    half_done(config, tmp_path / "run")

    def in_row_7(change):
        return lambda rows: [row | change(row) if row["idx"] == 7 else row for row in rows]

    for change in (
        in_row_7(lambda row: {"sentence": row["sentence"].upper()}),
        in_row_7(lambda row: {"label": 1 - row["label"]}),
        lambda rows: rows[:-1],
        lambda rows: rows[::-1],
    ):
        write_reviews(tmp_path / "data", change)
        with pytest.raises(ValueError, match="not those that the run began with"):
            train(config, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(config, places, tmp_path, monkeypatch):
    result = train(config, tmp_path, resume=True)  # in an empty folder the run starts at step 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    break_off(monkeypatch, train_module, "prepare", 1)
    assert train(config, tmp_path, resume=True) == result
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="differ in steps: 3 / 7"):
        train(make_config(places, steps=3), tmp_path, resume=True)
    with pytest.raises(ValueError, match="must be empty, found"):
        train(config, tmp_path)
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(ValueError, match=r"training.json must have schema_version 1"):
        train(config, tmp_path, resume=True)


@pytest.mark.slow
def test_snapshots_that_outlived_their_run_are_removed(config, tmp_path):
    """The run was killed just after its result was written; its generators could undo the noise."""
    train(config, tmp_path)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "step-000006.json").write_text("{}")
    (tmp_path / ".checkpoint-abc").mkdir()
    (tmp_path / ".membership.json.abc").write_text("{")
    train(config, tmp_path, resume=True)
    assert not (tmp_path / "snapshots").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]


def test_snapshots_that_cannot_be_deleted_are_named_and_the_result_stays(
    places, tmp_path, monkeypatch, capsys
):
    """In the run itself, and when the finished run is opened again."""
    config, folder = make_config(places, steps=1), tmp_path / "run"
    original = shutil.rmtree

    def failing(path, **options):
        if path.name == "snapshots":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        original(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", failing)
        for more in ((), ("--resume",)):
            code, _, said = run_main(capsys, *train_words(config, folder), *more)
            named = f"{folder / 'snapshots'} could not be deleted"
            assert_refused((code, "", said), named, f"before you publish {folder}")
            assert load_result(folder).releases == 1 and len(weights(folder)) > 1000
    assert train(config, folder, resume=True) == load_result(folder)
    assert not (folder / "snapshots").exists()


def test_a_failed_write_says_how_to_go_on(tmp_path, monkeypatch):
    def full(path, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(tmp_path / "run") as folder:
        for snapshot, words in ((False, "begin the run again"), (True, "the last snapshot is int")):
            if snapshot:
                folder.save_snapshot(0, {}, {})
            with monkeypatch.context() as patch:
                patch.setattr(runs, "atomic_write", full)
                with pytest.raises(OSError, match=rf"No space .*: free some space, then .*{words}"):
                    folder.save_snapshot(1, {}, {})


def test_folders_that_are_not_a_runs(config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"must be empty.*found thesis.tex"):
            train(config, tmp_path / "other", resume=resume)
    assert [path.name for path in (tmp_path / "other").iterdir() if path.name != ".lock"] == [
        "thesis.tex"
    ]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="output must be a folder"):
        train(config, tmp_path / "file")
    for place in (tmp_path / "file" / "below", "/proc/lowrank_dp"):
        with pytest.raises(OSError):
            train(config, place)


def test_a_refused_run_leaves_nothing_in_the_way(places, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'generated'"):
        train(make_config(places, task="generatd"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    train(make_config(places, steps=1), tmp_path / "new")


# Ledger and lock without a run


def test_the_ledger_counts_pairs_once(tmp_path):
    with open_run(tmp_path / "run") as folder:
        for stream, step in (("a", 0), ("a", 1), ("a", 1), ("b", 1), ("b", 2)):
            folder.begin_release(stream, step)
        assert folder.num_releases() == 4
        assert folder.num_releases("b", range(1, 5)) == 6  # b has yet to make steps 3 and 4
        assert folder.num_releases("c", range(1, 5)) == 8
        lines = (folder.snapshots / "releases.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [entry["number"] for entry in found] == [1, 2, 3, 4, 5]
    assert len({entry["chain"] for entry in found}) == 5
    assert [(entry["stream"], entry["step"]) for entry in found] == [
        (stream, step) for stream, step in (("a", 0), ("a", 1), ("a", 1), ("b", 1), ("b", 2))
    ]


def test_a_last_line_counts_if_only_its_newline_is_missing(tmp_path):
    """A release may follow a whole line; no release follows a line that was cut short."""
    for missing, count in ((1, 3), (2, 2), (40, 2)):
        with open_run(tmp_path / str(missing)) as folder:
            for step in range(3):
                folder.begin_release("a", step)
            path = folder.snapshots / "releases.jsonl"
            path.write_bytes(path.read_bytes()[:-missing])
            assert folder.num_releases() == count, missing
            folder.begin_release("a", count)
            assert folder.num_releases() == count + 1, missing


def test_two_snapshots_are_kept(tmp_path):
    with open_run(tmp_path / "run") as folder:
        for step in (0, 5, 10, 15):
            folder.save_snapshot(step, {"x": step}, {"t": torch.full((3,), float(step))})
        names = {path.name for path in folder.snapshots.iterdir()}
        assert names == {
            f"step-{step:06d}.{suffix}" for step in (10, 15) for suffix in ("json", "safetensors")
        }
        document, tensors = folder.load_snapshot()
        assert (document["step"], document["x"]) == (15, 15)
        assert torch.equal(tensors["t"], torch.full((3,), 15.0))


HOLD = """
import sys, time
from lowrank_dp.artifacts.runs import open_run
with open_run(sys.argv[1]) as folder:
    folder.begin_release("x", 0)
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_folder_belongs_to_one_process_and_is_free_when_it_dies(places, tmp_path):
    config = make_config(places, steps=1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for resume in (True, False):
            with pytest.raises(ValueError, match="in use by another run: wait for it"):
                train(config, tmp_path / "run", resume=resume)
        assert not list(tmp_path.rglob("step-*"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(60)
        holder.stdout.close()
    with open_run(tmp_path / "run", resume=True) as folder:
        assert folder.num_releases() == 1
        with pytest.raises(ValueError, match="in use"), open_run(tmp_path / "run", resume=True):
            pass


# Full disks, in processes whose files may not grow beyond a size

LIMITED = """
import json, os, resource, sys
import torch
from lowrank_dp.__main__ import main
from lowrank_dp.models import load_model
torch.set_num_threads(1)
load_model(sys.argv[3])  # so that its libraries are imported once
codes = []
for number, (limit, arguments) in enumerate(json.loads(sys.argv[1])):
    if (child := os.fork()) == 0:
        sys.stderr = open(f"{sys.argv[2]}/{number}.err", "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 99
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_a_full_disk_costs_nothing_that_was_done(places, tmp_path, monkeypatch):
    """The disk is full while a snapshot or the checkpoint is written; the run then resumes."""
    growing = make_config(places, optimizer="adam")  # whose state appears after the first step
    narrow = make_config(places, optimizer="adam", train_layers="pooler")
    sizes = []
    original = RunFolder.save_snapshot

    def measuring(self, step, *rest):
        original(self, step, *rest)
        sizes.append((self.snapshots / f"step-{step:06d}.safetensors").stat().st_size)

    references = []
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_snapshot", measuring)
        for config in (growing, narrow):
            train(config, tmp_path / f"whole {len(references)}")
            references.append(weights(tmp_path / f"whole {len(references)}"))
    first, later, *_, small = sizes
    assert later > 1.5 * first and len(references[1]) > 1.5 * small
    limits = (first + later) // 2, (small + len(references[1])) // 2
    jobs = [
        (limit, train_words(config, tmp_path / name))
        for limit, config, name in zip(
            limits, (growing, narrow), ("snapshot", "checkpoint"), strict=True
        )
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(jobs), str(tmp_path), growing.model],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 2]
    for number, (config, name, step) in enumerate(
        ((growing, "snapshot", 0), (narrow, "checkpoint", STEPS))
    ):
        said = (tmp_path / f"{number}.err").read_text()
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert name in said and "too large" in said.lower() and "--resume" in said, said
        folder = tmp_path / name
        assert not (folder / "training.json").exists()
        assert RunFolder(folder).load_snapshot()[0]["step"] == step
        names = [path.name for path in folder.rglob(".*")]
        assert names == [".lock"], names  # nothing half-written
        result = train(config, folder, resume=True)
        assert_finished(config, folder, result, references[number])


# kill -9

KILL = """
import json, os, random, signal, sys, time
import torch
from lowrank_dp.evaluation import evaluate
from lowrank_dp.train import TrainConfig, train
from lowrank_dp.train.setup import prepare
torch.set_num_threads(1)

def begin(config, folder):
    if (child := os.fork()) == 0:
        code = 1
        try:
            train(config, folder, resume=True, show_progress=False)
            code = 0
        finally:
            os._exit(code)
    return child

def ended(child):
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None

def lines(folder):
    ledger = f"{folder}/snapshots/releases.jsonl"
    return open(ledger).read().count(chr(10)) if os.path.exists(ledger) else 0

for name, (kills, document) in json.loads(sys.argv[1]).items():
    config, rng = TrainConfig.from_json(document), random.Random(name)
    folder, progress = f"{sys.argv[2]}/{name}", []
    setup = prepare(config, 0)  # so that libraries are imported once
    evaluate(setup.model, setup.tokenizer, setup.task)
    while True:
        child, goal = begin(config, folder), lines(folder) + rng.randint(1, 5)
        while (code := ended(child)) is None:
            if len(progress) < kills and lines(folder) >= goal:
                time.sleep(rng.uniform(0, 0.06))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                progress.append(lines(folder))
                break
            time.sleep(0.002)
        else:
            break
    assert code == 0, code
    print(json.dumps([name, progress]))
"""


@pytest.mark.slow
def test_kill_9_at_random_times_changes_nothing(places, uninterrupted, tmp_path):
    """A seed chooses the kills: a few steps after each start, in mid-step. Then the run ends."""
    configs = {
        "lora": (4, make_config(places, **LORA, steps=24)),
        "full": (3, make_config(places, **FULL, steps=24)),
        "unseeded": (2, make_config(places, **LORA | {"seed": None}, steps=24)),
    }
    jobs = {name: (kills, config.as_json()) for name, (kills, config) in configs.items()}
    done = subprocess.run(
        [sys.executable, "-c", KILL, json.dumps(jobs), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    progress = dict(map(json.loads, done.stdout.splitlines()))
    for name, (kills, config) in configs.items():
        assert len(progress[name]) == kills and min(progress[name]) >= 1, progress
        folder = tmp_path / name
        assert load_result(folder).releases == 24
        assert name == "unseeded" or weights(folder) == uninterrupted(config)
        assert not (folder / "snapshots").exists()
        assert {path.name for path in folder.iterdir() if path.name.startswith(".")} <= {".lock"}
