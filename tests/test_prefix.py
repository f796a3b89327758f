"""Cache of frozen blocks, compared with hidden states of transformers and uncached runs."""

import os
import re
import shutil
import stat
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowrank_dp import _terminal
from lowrank_dp.artifacts.row_store import RowStore, bytes_used
from lowrank_dp.data import collate, load_task
from lowrank_dp.evaluation import evaluate
from lowrank_dp.models import load_model
from lowrank_dp.models.heads import head_state
from lowrank_dp.models.prefix import STATES, FrozenPrefix
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.train import TrainConfig
from lowrank_dp.train import loop as loop_module
from lowrank_dp.train import prefix as prefix_module
from lowrank_dp.train import setup as preparation
from lowrank_dp.train import step as steps
from lowrank_dp.train.identity import digest_of_tensors
from lowrank_dp.train.loop import train
from lowrank_dp.train.prefix import PrefixCache
from lowrank_dp.train.request import RunRequest
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state
from lowrank_dp.train.step import take_step
from tests.forks import MAIN
from tests.tasks import Stop, case, save_bert, train_words, write_reviews

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = 1e-5  # largest relative difference between a run with the cache and a run without


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Make a BERT of three blocks with dropout, with random weights, and film reviews."""
    folder = tmp_path_factory.mktemp("prefix")
    save_bert(folder / "model", hidden_size=32, num_hidden_layers=3, intermediate_size=48)
    write_reviews(folder / "data")
    return folder


def make_config(places, **changes):
    base = {
        "model": str(places / "model"),
        "task": str(places / "data"),
        "train_layers": 1,
        "steps": 4,
        "batch_size": 12,
        "noise_multiplier": 0.6,
        "learning_rate": 1e-2,
        "optimizer": "sgd",
        "eval_every": 2,
        "snapshot_every": 2,
        "micro_batch_size": 5,
        "seed": 5,
    }
    return TrainConfig(**base | changes)


def language_model(places, **changes):
    return make_config(
        places,
        **{
            "model": "tiny-llama",
            "task": "generated-table",
            "max_examples": 40,
            "batch_size": 6,
            "eval_examples": 8,
            "generate": False,
            **changes,
        },
    )


def weights(folder):
    (file,) = [path for path in folder.glob("*model.safetensors")]
    return load_file(file)


def assert_same_run(one, other):
    """Weights in folders ``one`` and ``other`` agree within ``SAME``, relative to each tensor."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        error = (first[name] - second[name]).norm()
        assert error <= SAME * first[name].norm() + 1e-7, name


# The store of rows.


def test_a_store_returns_what_was_added_to_any_later_reader(tmp_path):
    tensors = [torch.randn(n, 3) for n in (4, 1, 6)]
    keys = [bytes([i]) * 32 for i in range(3)]
    store = RowStore(tmp_path / "new" / "store")
    store.add(keys[:2], tensors[:2])
    store.add(keys[2:], tensors[2:])
    for reader in (store, RowStore(tmp_path / "new" / "store")):
        for key, tensor in zip(keys, tensors, strict=True):
            assert np.array_equal(reader[key].numpy(), tensor.numpy())
        assert bytes([9]) * 32 not in reader
        assert reader.digest(keys) == store.digest(keys)
    used = bytes_used(tmp_path / "new")
    assert used > 11 * 3 * 4
    (tmp_path / "new" / "store" / "model.safetensors").write_bytes(b"of another program")
    assert bytes_used(tmp_path / "new") == used


def test_only_the_owner_can_read_a_store(tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        store = RowStore(tmp_path / "new" / "store")
        store.add([bytes(32)], [torch.ones(1, 2)])
        with store.lock():
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / "new", *(tmp_path / "new").rglob("*")):
        asked = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == asked, path
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="must belong to the user"):
        RowStore(tmp_path / "new" / "store")


def test_a_store_says_that_it_waits_for_another_holder(tmp_path):
    calls = []
    store = RowStore(tmp_path / "store")
    with store.lock(lambda: calls.append("free")):
        assert calls == []
        entered = threading.Event()

        def wait():
            # a store of other blocks, whose bytes count towards the same limit
            with RowStore(tmp_path / "other").lock(lambda: (calls.append("held"), entered.set())):
                calls.append("entered")

        other = threading.Thread(target=wait)
        other.start()
        assert entered.wait(30) and calls == ["held"]
    other.join(30)
    assert calls == ["held", "entered"]


def test_a_failure_while_waiting_does_not_enter_a_held_store(tmp_path):
    def fail():
        raise BrokenPipeError

    with RowStore(tmp_path / "store").lock(), pytest.raises(BrokenPipeError):
        with RowStore(tmp_path / "store").lock(fail):
            pytest.fail("entered")


def test_a_digest_depends_on_the_content_and_a_damaged_file_is_absent(tmp_path):
    key, other = bytes(32), bytes([1]) * 32
    stores = [RowStore(tmp_path / name) for name in "ab"]
    for store, value in zip(stores, (1.0, 1.0000001), strict=True):
        store.add([key], [torch.full((2, 2), value)])
    assert stores[0].digest([key]) != stores[1].digest([key])
    (file,) = (tmp_path / "a").glob("*.safetensors")
    stores[0].add([other], [torch.ones(1, 2)])
    file.write_bytes(file.read_bytes()[:-3])
    reader = RowStore(tmp_path / "a")
    assert key not in reader and other in reader


def test_a_file_that_was_changed_in_place_is_absent_until_it_is_computed_again(tmp_path):
    keys, tensors = [bytes(32), bytes([1]) * 32], [torch.ones(2, 2), torch.ones(3, 2)]
    store = RowStore(tmp_path)
    store.add(keys[:1], tensors[:1])
    (file,) = tmp_path.glob("*.safetensors")
    store.add(keys[1:], tensors[1:])
    before = store.digest(keys)
    change_last_byte(file)
    reader = RowStore(tmp_path)
    assert keys[0] not in reader and keys[1] in reader
    reader.add(keys[:1], tensors[:1])  # the same content has the same name
    assert torch.equal(reader[keys[0]], tensors[0]) and reader.digest(keys) == before


def change_last_byte(file):
    """Flip one bit of a tensor, whose file stays as long and as readable as before."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# The prefix of a model, against the hidden states that transformers returns.


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["encoder", "tiny-llama"])
def test_the_prefix_is_the_hidden_state_of_transformers(name, method, places):
    task = load_task("generated" if name == "encoder" else "generated-table", max_examples=20)
    path = str(places / "model") if name == "encoder" else name
    model, _ = load_model(path, task=task, method=method, train_layers=1, seed=0)
    model.eval()
    prefix = FrozenPrefix(model)
    assert prefix.length == prefix.num_blocks - 1 == {"encoder": 2}.get(name, prefix.length)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    batch = {"input_ids": torch.randint(5, 90, (3, 7)), "attention_mask": mask}
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True)
    expected = whole.hidden_states[prefix.length]
    states = prefix.run(batch)
    assert torch.allclose(states, expected, atol=1e-6)
    # with given states the model computes from them; without, it computes as before
    prefix.install()
    with torch.no_grad():
        same = model(**batch, **{STATES: states}).logits
        moved = model(**batch, **{STATES: states.flip(0)}).logits
        without = model(**batch).logits
    assert torch.allclose(same, whole.logits, atol=1e-5)
    assert not torch.allclose(moved, whole.logits, atol=1e-3)
    assert torch.equal(without, whole.logits)
    prefix.remove()
    with torch.no_grad():
        assert torch.equal(model(**batch, **{STATES: states.flip(0)}).logits, whole.logits)


def test_a_model_without_frozen_blocks_has_no_prefix(places):
    task = load_task("generated", max_examples=20)
    for layers in (None, 3):
        model, _ = load_model(str(places / "model"), task=task, train_layers=layers)
        with pytest.raises(ValueError, match="no transformer block is frozen"):
            FrozenPrefix(model)


def test_frozen_weights_and_no_others_name_the_store(places):
    task = load_task("generated", max_examples=20)
    model, _ = load_model(str(places / "model"), task=task, train_layers=1, seed=0)
    names = set(FrozenPrefix(model).tensors())
    every = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    above = {name for name in every if ".layer.2." in name or not name.startswith("bert.")}
    assert names == {name for name in every - above if "pooler" not in name}


@pytest.mark.parametrize("method", ["full", "lora", "lora-frozen-a"])
def test_seeds_share_a_store_though_each_draws_its_own_head(method):
    """PEFT keeps a frozen copy of the head as it was drawn, which no frozen block reads."""
    task = load_task("generated", max_examples=20)
    found = []
    for seed in (0, 1):
        model, _ = load_model("tiny", task=task, train_layers=1, method=method, rank=2, seed=seed)
        tensors = FrozenPrefix(model).tensors()
        found.append((digest_of_tensors(tensors.items()), model))
    (one, first), (other, second) = found
    assert one == other
    heads = [head_state(model)["classifier.weight"] for model in (first, second)]
    assert not torch.equal(*heads)


# Whole runs.

RUNS = {
    "last block": {},
    "two blocks": {"train_layers": 2, "optimizer": "adam", "scheme": "optimal"},
    "head only": {"train_layers": "pooler"},
    "lora": {"method": "lora", "rank": 2},
    "padded": {"padding": "max-length", "max_length": 20},
    "groups": {"task": "generated-table", "model": "tiny-llama", "max_examples": 40,
               "batch_size": 4, "unit": "group", "eval_examples": 8, "generate": False},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_the_cache_is_the_run_without(name, places, tmp_path):
    config = make_config(places, **RUNS[name])
    plain = train(config, tmp_path / "plain")
    cached = train(replace(config, prefix_cache=str(tmp_path / "cache")), tmp_path / "cached")
    assert "cached in float32" in cached.description and "but not" not in cached.description
    assert "cached" not in plain.description
    assert cached.privacy == plain.privacy and cached.releases == plain.releases
    assert_same_run(tmp_path / "plain", tmp_path / "cached")
    for one, other in zip(plain.curve, cached.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=SAME)
    assert cached.train_loss == pytest.approx(plain.train_loss, rel=SAME)


def test_every_batch_holds_the_states_of_its_own_rows(places, tmp_path):
    setup = prepare(make_config(places, prefix_cache=str(tmp_path / "cache")), 5)
    seen = 0
    for batch in setup.batches([*range(0, len(setup.rows), 3), 1]):
        bare = {n: t for n, t in batch.items() if n not in (STATES, "labels")}
        for i, row in enumerate(batch["input_ids"]):
            length = int(batch["attention_mask"][i].sum())
            alone = {n: t[i : i + 1, :length] for n, t in bare.items()}
            with torch.no_grad():
                expected = setup.model(**alone, output_hidden_states=True).hidden_states[2][0]
            own = batch[STATES][i]
            assert torch.allclose(own[: len(expected)], expected, atol=1e-5), row
            assert not own[len(expected) :].any()
            seen += 1
    assert seen == len(range(0, len(setup.rows), 3)) + 1


def test_rows_that_differ_in_their_segments_have_states_of_their_own(places, tmp_path):
    setup = prepare(make_config(places, prefix_cache=str(tmp_path / "cache")), 5)
    row = setup.rows[0]
    twin = {**row, "token_type_ids": [1 - segment for segment in row["token_type_ids"]]}
    batch = collate([row, twin], setup.tokenizer.pad_token_id)
    found = setup.prefix.including([twin]).for_training([row, twin], batch)[STATES]
    with torch.no_grad():
        whole = setup.model(**batch, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found, whole)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def count_frozen(setup, work):
    """Count the rows on which ``work`` runs the first block with the block's own forward."""
    block = setup.model.bert.encoder.layer[0]
    rows = []
    with torch.no_grad():
        handle = block.attention.register_forward_hook(
            lambda module, args, output: rows.append(len(output[0]))
        )
    work()
    handle.remove()
    return sum(rows)


def test_steps_and_evaluations_run_no_frozen_block(places, tmp_path):
    config = make_config(places, prefix_cache=str(tmp_path / "cache"))
    for changes, frozen in (({}, True), ({"prefix_cache": ""}, False)):
        setup = prepare(replace(config, **changes), 5)
        state = first_state(setup.config, "x")
        for work in (partial(take_step, setup, state), partial(loop_module._scores, setup)):
            assert (count_frozen(setup, work) == 0) == frozen


def test_after_its_attention_the_last_block_runs_on_the_first_position(places, tmp_path):
    setup = prepare(make_config(places, prefix_cache=str(tmp_path / "cache")), 5)
    shapes = []
    strided = []
    last = setup.model.bert.encoder.layer[2]
    last.output.dense.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    for layer in (last.intermediate.dense, last.output.dense):
        # torch copies a frozen weight once per row of a batch that is not contiguous
        layer.register_forward_pre_hook(
            lambda module, args: strided.append(not args[0].is_contiguous())
        )
    for batch in setup.batches(range(6)):
        setup.model(**batch)
    assert shapes == [(5, 1, 32), (1, 1, 32)]
    assert len(strided) == 4 and not any(strided)


def test_a_run_tells_that_it_waits_for_the_cache(places, tmp_path, monkeypatch, capsys):
    lock = RowStore.lock

    def held(store, on_wait=None):
        if on_wait is not None:
            on_wait()
        return lock(store)

    monkeypatch.setattr(RowStore, "lock", held)
    for shown in (True, False):  # a sweep's workers show nothing
        config = make_config(places, prefix_cache=str(tmp_path / f"cache {shown}"))
        prepare(config, 5, RunRequest(show_progress=shown))
        line = "waiting: another process fills the cache of the frozen blocks\n"
        assert (line in capsys.readouterr().err) == shown
    monkeypatch.setattr(prefix_module.processes, "rank", lambda: 1)  # another process of the run
    monkeypatch.setattr(_terminal, "FIRST_LINE", 0)
    prepare(replace(config, prefix_cache=str(tmp_path / "other")), 5, RunRequest())
    said = capsys.readouterr().err
    assert line not in said and "frozen blocks, training rows: " in said


def test_progress_of_the_cache_tells_no_number_of_rows(places, tmp_path, monkeypatch, capsys):
    """The number of distinct rows, and of rows of a group, is private; 3 rows at a time are run."""
    monkeypatch.setattr(_terminal, "FIRST_LINE", 0)
    monkeypatch.setattr(_terminal, "LONGEST_WAIT", 0)
    config = make_config(places, prefix_cache=str(tmp_path / "cache"), micro_batch_size=3)
    prepare(config, 5, RunRequest())
    lines = [line for line in capsys.readouterr().err.splitlines() if "frozen blocks" in line]
    assert len(lines) > 4 and "frozen blocks, training rows: 100% after 0 min" in lines
    for line in lines:
        assert re.fullmatch(r"frozen blocks, \w+ rows: \d+% after 0 min", line)


def test_a_second_run_reads_what_the_first_has_computed(places, tmp_path, monkeypatch):
    config = make_config(places, prefix_cache=str(tmp_path / "cache"))
    before = prepare(config, 5)
    names = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    calls = []
    original = prefix_module._run
    monkeypatch.setattr(prefix_module, "_run", lambda *a: calls.append(a) or original(*a))
    again = prepare(replace(config, seed=6, learning_rate=0.5), 6)
    assert not calls
    assert {path.name for path in (tmp_path / "cache").rglob("*.safetensors")} == names
    assert again.digests["prefix"] == before.digests["prefix"]
    assert prepare(replace(config, train_layers=2), 5).digests["prefix"] != again.digests["prefix"]
    assert calls


def test_half_the_size_in_bf16(places, tmp_path):
    sizes = {}
    for dtype in ("float32", "bf16"):
        config = make_config(places, prefix_cache=str(tmp_path / dtype), prefix_dtype=dtype)
        result = train(config, tmp_path / f"run-{dtype}")
        assert f"cached in {dtype}" in result.description
        sizes[dtype] = bytes_used(tmp_path / dtype), result.curve[-1]["loss"]
    assert sizes["bf16"][0] < 0.7 * sizes["float32"][0]
    assert sizes["bf16"][1] == pytest.approx(sizes["float32"][1], rel=0.02)


def test_autocast_runs_have_a_store_of_their_own(places, tmp_path):
    config = make_config(places, precision="bf16")
    plain = train(config, tmp_path / "plain")
    cached = replace(config, prefix_cache=str(tmp_path / "cache"))
    found = train(cached, tmp_path / "cached")
    assert len(list((tmp_path / "cache").glob("*/"))) == 1  # for steps and for evaluations
    assert found.curve[-1]["loss"] == pytest.approx(plain.curve[-1]["loss"], rel=0.01)
    train(replace(cached, precision="float32"), tmp_path / "single")
    assert len(list((tmp_path / "cache").glob("*/"))) == 2


def test_evaluations_have_the_precision_of_the_steps(places, tmp_path):
    """Evaluations before the first step, with and without the cache, as ``evaluate`` computes."""
    for cache in ("", str(tmp_path / "cache")):
        losses = {}
        for precision in ("float32", "bf16"):
            setup = prepare(make_config(places, precision=precision, prefix_cache=cache), 5)
            losses[precision] = loop_module._scores(setup)["loss"]
            want = evaluate(
                setup.model,
                setup.tokenizer,
                setup.task,
                batch_size=setup.config.micro_batch_size,
                max_examples=setup.config.eval_examples,
                autocast_dtype=torch.bfloat16 if precision == "bf16" else None,
            )["loss"]
            # the cached first position is one row of a product of another shape, which rounds anew
            rounding = 2e-3 if cache and precision == "bf16" else 1e-6
            assert losses[precision] == pytest.approx(want, rel=rounding)
        assert losses["bf16"] != pytest.approx(losses["float32"], rel=1e-6)


# Models without a cache, and the reasons.


def test_without_a_cache_the_description_says_why(places, tmp_path):
    for changes, words in (
        ({"train_layers": None}, "no transformer block is frozen"),
        ({"dropout": True}, "--dropout"),
        ({"prefix_gigabytes": 1e-6}, "outputs larger than --prefix-gigabytes 1e-06 allows"),
    ):
        with case(*changes):
            config = make_config(places, prefix_cache=str(tmp_path / "cache"), **changes)
            setup = prepare(config, 5)
            assert words in setup.description and "\n" not in setup.description
            assert "prefix" not in setup.digests
            assert not any(STATES in batch for batch in setup.batches(range(4)))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    setup = prepare(make_config(places, prefix_cache="off"), 5)
    assert "cache" not in setup.description and setup.prefix == PrefixCache()


def test_a_cache_that_another_model_fills_says_so(places, tmp_path):
    cache = tmp_path / "cache"
    prepare(make_config(places, prefix_cache=str(cache), train_layers=1), 5)
    room = 1.5 * bytes_used(cache) / 1e9
    other = make_config(places, prefix_cache=str(cache), train_layers=2, prefix_gigabytes=room)
    assert "no room beside the outputs of other models or blocks" in prepare(other, 5).description
    shutil.rmtree(cache)  # the fix that the description names
    assert "frozen blocks 1 to 1 of 3 cached" in prepare(other, 5).description


def test_outputs_of_another_precision_of_products_have_a_cache_of_their_own(places, tmp_path):
    config = make_config(places, prefix_cache=str(tmp_path / "cache"))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            prepare(config, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(list((tmp_path / "cache").glob("*/"))) == 2


def read_first_block_in_last(model):
    """Let the last block add the first block's output to its input."""
    kept = []
    layers = model.bert.encoder.layer
    layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    layers[2].register_forward_pre_hook(lambda module, args: (args[0] + kept.pop(), *args[1:]))


def read_two_positions(model):
    """Let the pooler read the mean of the first two positions."""
    model.bert.pooler.register_forward_pre_hook(
        lambda module, args: (args[0][:, :2].mean(1, keepdim=True),)
    )


@pytest.mark.parametrize("change", [read_first_block_in_last, read_two_positions])
def test_a_model_that_reads_more_is_computed_in_full(change, places, tmp_path, monkeypatch):
    original = preparation._load_model

    def loading(*arguments):
        model, tokenizer = original(*arguments)
        change(model)
        return model, tokenizer

    monkeypatch.setattr(preparation, "_load_model", loading)
    setup = prepare(make_config(places, prefix_cache=str(tmp_path / "cache")), 5)
    cached = change is read_two_positions
    assert ("uses more than the last frozen block" in setup.description) != cached
    shapes = []
    setup.model.bert.encoder.layer[2].output.dense.register_forward_hook(
        lambda module, args, output: shapes.append(output.shape[1])
    )
    for batch in setup.batches(range(4)):
        assert (STATES in batch) == cached
        whole = {n: t for n, t in batch.items() if n != STATES}
        assert torch.allclose(setup.model(**batch).logits, setup.model(**whole).logits, atol=1e-5)
    assert all(positions > 1 for positions in shapes)


def test_a_layer_that_trains_below_the_frozen_blocks_has_no_cache(places, tmp_path, monkeypatch):
    original = preparation._load_model

    def loading(*arguments):  # gradients below the pooler vanish beside those of the head
        model, tokenizer = original(*arguments)
        with torch.no_grad():
            model.bert.pooler.dense.weight.mul_(1e-4)
        return model, tokenizer

    monkeypatch.setattr(preparation, "_load_model", loading)
    for layers, words in (
        (r"layer\.2|pooler|classifier", "frozen blocks 1 to 2 of 3 cached"),
        (r"embeddings\.LayerNorm|layer\.2|pooler|classifier", "embeddings.LayerNorm is trained"),
    ):
        changes = {"train_layers": layers, "prefix_cache": str(tmp_path / "cache")}
        with case(layers):
            assert words in prepare(make_config(places, **changes), 5).description


def test_another_rows_states_stop_the_run(places, tmp_path, monkeypatch):
    config = make_config(
        places,
        model="tiny",
        task="generated",
        max_examples=60,
        prefix_cache=str(tmp_path / "cache"),
        steps=1,
    )
    original = PrefixCache.for_training

    def mixed(self, rows, batch):
        found = dict(original(self, rows, batch))
        found[STATES] = found[STATES].roll(1, 0)
        return found

    monkeypatch.setattr(PrefixCache, "for_training", mixed)
    with pytest.raises(ValueError, match="clipped gradients of single rows are not those"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_tenth_too_much_of_a_row_stops_the_run(dtype, places, tmp_path, monkeypatch):
    config = make_config(
        places, prefix_cache=str(tmp_path / "cache"), prefix_dtype=dtype, steps=1, max_grad_norm=10
    )
    train(config, tmp_path / "right")
    original = steps._clipped_sum

    def longer(*arguments):
        sums, norms = original(*arguments)
        return {name: 1.1 * total for name, total in sums.items()}, norms

    monkeypatch.setattr(steps, "_clipped_sum", longer)
    with pytest.raises(ValueError, match="the privacy stated would not hold"):
        train(config, tmp_path / "run")


def test_a_first_pass_must_pay(places, tmp_path):
    config = make_config(places, prefix_cache=str(tmp_path / "cache"), steps=1, eval_every=1)
    few = prepare(config, 5, RunRequest(shared_by=1))
    assert "not in training (too few steps" in few.description
    assert few.prefix.training is None and few.prefix.evaluation is not None
    many = prepare(config, 5, RunRequest(shared_by=50))
    assert many.digests["prefix"] and "but not" not in many.description
    # an existing cache is read, whether or not building it would save time
    assert prepare(config, 5, RunRequest(shared_by=1)).digests["prefix"]


# Resuming.


def interrupt(monkeypatch, config, folder, count):
    """Stop the run at the beginning of step ``count``."""
    calls = []
    original = loop_module.take_step

    def breaking(setup, state):
        calls.append(0)
        if len(calls) == count:
            raise Stop
        return original(setup, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "take_step", breaking)
        with pytest.raises(Stop):
            train(config, folder)


def test_resuming_with_the_cache_repeats_the_run_to_the_bit(places, tmp_path, monkeypatch):
    config = make_config(places, prefix_cache=str(tmp_path / "cache"))
    train(config, tmp_path / "whole")
    interrupt(monkeypatch, config, tmp_path / "run", 4)
    result = train(config, tmp_path / "run", resume=True)
    assert result.releases == config.steps
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change", ["gone", "other states", "a byte in place"])
def test_other_states_begin_new_noise_that_counts(change, places, tmp_path, monkeypatch):
    config = make_config(places, prefix_cache=str(tmp_path / "cache"))
    interrupt(monkeypatch, config, tmp_path / "run", 4)
    if change == "gone":
        config = replace(config, prefix_cache="")
    else:
        if change == "a byte in place":  # the file is then computed again, here with other values
            for file in (tmp_path / "cache").glob("*/*.safetensors"):
                change_last_byte(file)
        else:
            shutil.rmtree(tmp_path / "cache")
        original = prefix_module._run
        monkeypatch.setattr(
            prefix_module, "_run", lambda *a: [t * (1 + 1e-6) for t in original(*a)]
        )
    with pytest.warns(UserWarning, match="resuming with new noise.*prefix"):
        result = train(config, tmp_path / "run", resume=True)
    assert result.releases == config.steps + 2  # both steps after the snapshot draw new noise


def test_a_run_that_began_without_the_cache_goes_on_without(places, tmp_path, monkeypatch):
    config = make_config(places)
    train(config, tmp_path / "whole")
    interrupt(monkeypatch, config, tmp_path / "run", 4)
    cached = replace(config, prefix_cache=str(tmp_path / "cache"))
    result = train(cached, tmp_path / "run", resume=True)
    assert result.releases == config.steps and "but not in training" in result.description
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


# Several processes, sweeps, and bad input.


@pytest.mark.slow
def test_processes_that_share_a_run_share_its_cache(places, tmp_path, start):
    for name, cache in (("plain", ""), ("cached", str(tmp_path / "cache"))):
        config = make_config(places, prefix_cache=cache)
        running = start(2, MAIN, *train_words(config, tmp_path / name))
        said = [process.communicate(timeout=200) for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        assert ("cached in float32" in " ".join(said[0][0].split())) == bool(cache)
    assert_same_run(tmp_path / "plain", tmp_path / "cached")


def test_a_sweep_shares_one_cache_and_names_its_runs_as_without(places, tmp_path):
    configs = [make_config(places, seed=seed) for seed in (1, 2)]
    outcomes = sweep(configs, tmp_path / "sweep", engine="sequential")
    assert all("cached in float32" in outcome.result.description for outcome in outcomes)
    assert len([*(tmp_path / "sweep" / "prefix_cache").glob("*/")]) == 1
    named = replace(configs[0], prefix_cache="elsewhere", prefix_gigabytes=3.0)
    assert run_folder(named, tmp_path) == run_folder(configs[0], tmp_path)
    other = replace(configs[0], prefix_dtype="bf16")
    assert run_folder(other, tmp_path) != run_folder(configs[0], tmp_path)
    off = [replace(configs[0], prefix_cache="off", seed=3)]
    assert "cached" not in sweep(off, tmp_path / "off", engine="sequential")[0].result.description
    assert not (tmp_path / "off" / "prefix_cache").exists()


def test_bad_input_is_named(places):
    for changes, words in (
        ({"prefix_dtype": "bf17"}, "prefix_dtype.*bf16"),
        ({"prefix_gigabytes": 0}, "prefix_gigabytes"),
    ):
        with case(*changes), pytest.raises(ValueError, match=words):
            make_config(places, **changes)
    file = places / "data" / "train.jsonl"
    with pytest.raises(ValueError, match="prefix_cache must be a folder that can be written"):
        prepare(make_config(places, prefix_cache=str(file)), 5)
