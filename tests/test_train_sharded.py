"""Models sharded over processes (FSDP2): against one process, and with failing processes."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy import stats
from torch import nn

import lowrank_dp
from lowrank_dp.artifacts.runs import RunFolder
from lowrank_dp.data import load_task
from lowrank_dp.grads.clipping import PaddingBatch, clipped_sum, clipped_sum_over
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.mia.shadows import shadow_configs
from lowrank_dp.models.scaled import full_weights
from lowrank_dp.train import TrainConfig, load_result
from lowrank_dp.train.loop import train
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state
from lowrank_dp.train.step import take_step

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
SIGMA, BOUND, STEPS, ABOUT = 0.3, 0.5, 4, 60
TRAIN = {
    name: len(load_task(name, max_examples=ABOUT).train)
    for name in ("generated", "generated-table")
}
BASE = {
    "model": "tiny-llama",
    "task": "generated-table",
    "max_examples": ABOUT,
    "noise_multiplier": SIGMA,
    "max_grad_norm": BOUND,
    "steps": STEPS,
    "batch_size": 9,
    "learning_rate": 1e-2,
    "optimizer": "sgd",
    "micro_batch_size": 3,
    "eval_every": 100,
    "snapshot_every": 2,
    "eval_examples": 10,
    "generate": False,
    "seed": 5,
    "shard": True,
}

RUNS = {
    "restored": {"scheme": "optimal", "momentum_beta": 0.9, "restore_method": "exact"},
    "tied": {"train_embeddings": True, "optimizer": "adamw", "weight_decay": 0.1},
    "LoRA": {
        "method": "lora",
        "rank": 1,
        "optimizer": "adam",
        "generate": True,
        "max_new_tokens": 3,
    },  # of one row, which one process has
    "frozen": {"method": "lora-frozen-a", "unit": "group", "scheme": "denoise"},
    "preconditioned": {"precondition": "generated", "precondition_rows": 12},
    "oracle": {"scheme": "oracle", "diagnostic": True},
    "non-private": {"noise_multiplier": None, "non_private": True},
    "one at most": {"batch_size": 1},  # one process has no row, or both have none
    "classifier": {"model": "BERT", "task": "generated", "method": "lora"},
    "bf16": {"precision": "bf16"},
    "secure": {"seed": None, "secure_rng": True},
}

WORKER = """
import json, os, sys
import torch
from safetensors.torch import save_file
from lowrank_dp.train import loop as module
from lowrank_dp.train import step as step_module
from lowrank_dp.train import TrainConfig, train
torch.set_num_threads(1)
folder, rank = sys.argv[2], int(os.environ["RANK"])
report = {"held": {}, "streams": {}, "results": {}}
original = module.take_step

def looking(setup, state):
    clean, noisy = original(setup, state)
    for kind, sums in (("clean", clean), ("noisy", noisy)):
        save_file(dict(sums), f"{folder}/{name}-{kind}-{state.step}-{rank}.safetensors")
    moments = [value for entry in setup.optimizer.state.values() for value in entry.values()]
    report["held"][name] = {
        "weights": sum(p.to_local().numel() for p in setup.model.parameters()),
        "moments": sum(t.to_local().numel() for t in moments if hasattr(t, "to_local")),
        "sums": sum(t.numel() for t in clean.values()),
        "means": sum(t.outputs[0].numel() for t in state.restorer.filters.values())}
    report["streams"].setdefault(name, []).append(state.stream)
    return clean, noisy

module.take_step = looking
for name, document in json.loads(sys.argv[1]).items():
    result = train(TrainConfig.from_json(document), f"{folder}/{name}", show_progress=False)
    report["results"][name] = [result.epsilon, result.releases, result.curve[-1]["loss"],
                               result.description]
module.take_step = original

json.dump(report, open(f"{folder}/rank-{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def sharded(small_bert, start, tmp_path_factory):
    """What two processes did: the configurations, the folder, and a report from each process."""
    folder = tmp_path_factory.mktemp("sharded")
    configs = {name: TrainConfig(**BASE | changes) for name, changes in RUNS.items()}
    configs["classifier"] = replace(configs["classifier"], model=str(small_bert))
    documents = json.dumps({name: config.as_json() for name, config in configs.items()})
    two = start(2, WORKER, documents, folder)
    said = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    reports = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return configs, folder, reports


def alone(config, stream):
    """The same steps in this process, with the same draws: (clean, noisy) of each, and the run."""
    setup = prepare(replace(config, shard=False), 5)
    start = {n: p.detach().clone() for n, p in setup.trained.items()}
    state = first_state(config, stream)
    return [take_step(setup, state) for _ in range(STEPS)], setup, start


@pytest.mark.parametrize("name", list(RUNS)[:-2])
def test_shards_train_as_one_process_does(name, sharded):
    """Each sum is on one process; noise (to the bit) and weights are those of a single process."""
    configs, folder, reports = sharded
    steps, setup, start = alone(configs[name], reports[0]["streams"][name][0])
    for step, pair in enumerate(steps, 1):
        parts = {
            kind: [
                load_file(folder / f"{name}-{kind}-{step}-{rank}.safetensors") for rank in range(2)
            ]
            for kind in ("clean", "noisy")
        }
        for kind, want in zip(parts, pair, strict=True):
            assert not parts[kind][0].keys() & parts[kind][1].keys()
            got = parts[kind][0] | parts[kind][1]
            assert got.keys() == want.keys()
            largest = max(float(total.abs().max()) for total in want.values())
            for n in want:
                assert got[n].shape == want[n].shape
                assert float((got[n] - want[n]).abs().max()) <= 2e-5 * max(largest, 0.1), (step, n)
        if name not in ("oracle", "non-private"):
            clean, noisy = (parts[kind][0] | parts[kind][1] for kind in parts)
            added = torch.cat([(noisy[n] - clean[n]).flatten() for n in clean])
            alone_added = torch.cat([(pair[1][n] - pair[0][n]).flatten() for n in clean])
            torch.testing.assert_close(added, alone_added, rtol=0, atol=1e-5)
    adapter = configs[name].method != "full"
    saved = load_file(folder / name / f"{'adapter_' * adapter}model.safetensors")
    trained = {n: p.detach() for n, p in setup.trained.items()}
    for n, p in full_weights(setup.model, trained).items():
        moved = max(float((trained[n] - start[n]).abs().max()), 1e-3)
        stored = n.replace(".default", "").replace("modules_to_save.", "")
        assert float((saved[stored] - p).abs().max()) <= 2e-4 * moved, n


def test_secure_noise_is_added_once(sharded):
    """A chi-squared test of the variance over all entries and steps (false alarm rate 1e-6)."""
    _, folder, _ = sharded
    noise = np.concatenate(
        [
            (
                load_file(folder / f"secure-noisy-{step}-{rank}.safetensors")[name].double()
                - total.double()
            )
            .flatten()
            .numpy()
            for step in range(1, STEPS + 1)
            for rank in range(2)
            for name, total in load_file(folder / f"secure-clean-{step}-{rank}.safetensors").items()
        ]
    )
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], noise.size)
    assert noise.size > 200_000 and low < float(np.sum((noise / (SIGMA * BOUND)) ** 2)) < high


def test_each_process_holds_its_share(sharded):
    _, _, reports = sharded
    first, second = (report["held"] for report in reports)
    whole = prepare(TrainConfig(**BASE | {"shard": False}), 5)
    count = sum(p.numel() for p in whole.model.parameters())
    trained = sum(p.numel() for p in whole.trained.values())
    for held in (first, second):
        assert 0.45 * count <= held["restored"]["weights"] <= 0.55 * count
        assert 0.4 * trained <= held["restored"]["sums"] <= 0.6 * trained  # a matrix is not split
        assert held["restored"]["means"] == held["restored"]["sums"]
    assert first["restored"]["sums"] + second["restored"]["sums"] == trained
    assert first["tied"]["moments"] + second["tied"]["moments"] == 2 * count  # Adam's, of all


def test_epsilon_and_results_are_those_of_one_process(sharded):
    configs, _, reports = sharded
    for name, config in configs.items():
        epsilon, releases, loss, description = reports[0]["results"][name]
        assert reports[1]["results"][name] == [epsilon, releases, loss, description]
        assert releases == STEPS and description.endswith(", by 2 processes, which share the model")
        if name in ("oracle", "non-private"):
            assert epsilon is None
        elif config.unit == "example":
            count = TRAIN[config.task]
            mechanism = GaussianMechanism(SIGMA, BOUND, config.batch_size / count)
            assert epsilon == mechanism.epsilon(STEPS, count**-1.1)


def test_the_checkpoint_is_a_plain_one(sharded):
    """transformers loads the checkpoint with tied weights; PEFT loads LoRA's and generates text."""
    import peft

    _, folder, _ = sharded
    saved = load_file(folder / "tied" / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), saved[name], rtol=0, atol=0)
    base, _ = lowrank_dp.models.load_model("tiny-llama")
    before = base(input_ids=torch.arange(5)[None]).logits
    adapted = peft.PeftModel.from_pretrained(base, folder / "LoRA")
    assert adapted.generate(input_ids=torch.arange(5)[None], max_new_tokens=2).shape == (1, 7)
    assert not torch.allclose(adapted(input_ids=torch.arange(5)[None]).logits, before)
    assert {"bleu", "rouge_l"} <= load_result(folder / "LoRA").curve[-1].keys()


def test_bf16_is_near(sharded):
    configs, folder, reports = sharded
    steps, *_ = alone(
        replace(configs["bf16"], precision="float32"), reports[0]["streams"]["bf16"][0]
    )
    got = {
        n: total
        for rank in range(2)
        for n, total in load_file(folder / f"bf16-clean-1-{rank}.safetensors").items()
    }
    want = torch.cat([total.flatten() for total in steps[0][0].values()])
    found = torch.cat([got[n].flatten() for n in steps[0][0]])
    assert all(total.dtype == torch.float32 for total in got.values())
    assert 1e-6 < float((found - want).norm() / want.norm()) < 0.05


KILLED = """
import os, signal, sys
from lowrank_dp.__main__ import main
import lowrank_dp.train.layout as layout
reduce, calls = layout.Sharded.reduce, []
def dying(self, name, part):
    calls.append(name)
    if os.environ["RANK"] == "1" and len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return reduce(self, name, part)
layout.Sharded.reduce = dying
main(sys.argv[2:])
"""


def test_killed_mid_step_and_resumed(sharded, start, tmp_path):
    """The other process ends within seconds, with one line.

    Two processes resume the run to the same bits. If three processes resume a copy, lost steps
    count again.
    """

    def train_by(count, folder, after=0):
        """Exit codes and output; the second process is killed after the given number of sums."""
        running = start(
            count,
            KILLED,
            str(after),
            "train",
            "--config",
            str(tmp_path / "config.json"),
            "--output",
            str(folder),
            "--resume",
        )
        said = [process.communicate(timeout=120) for process in running]
        return [process.returncode for process in running], said

    _, folder, _ = sharded
    (tmp_path / "config.json").write_text(json.dumps(BASE | RUNS["restored"]))
    setup = prepare(TrainConfig(**BASE | {"shard": False}), 5)
    codes, said = train_by(2, tmp_path / "run", after=1 + 6 * len(setup.trained))
    assert codes == [2, -signal.SIGKILL], said
    (line,) = said[0][1].splitlines()
    assert line.startswith("error: another process of this run has stopped")
    snapshot, _ = RunFolder(tmp_path / "run").load_snapshot()
    made = RunFolder(tmp_path / "run").num_releases()
    assert 2 <= snapshot["step"] < made <= STEPS  # a step has one to three micro-batches

    shutil.copytree(tmp_path / "run", tmp_path / "three")
    codes, said = train_by(2, tmp_path / "run")
    assert codes == [0, 0], said
    assert load_result(tmp_path / "run").releases == STEPS  # replayed steps count once
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        folder / "restored" / "model.safetensors"
    ).read_bytes()

    codes, said = train_by(3, tmp_path / "three")
    assert codes == [0, 0, 0], said
    result = load_result(tmp_path / "three")
    assert result.releases == made + STEPS - snapshot["step"]
    assert result.epsilon == setup.mechanism.epsilon(result.releases, result.delta)


# Without other processes


def test_one_process_has_nothing_to_share():
    with pytest.raises(ValueError, match=r"shard must go with several processes: .* torchrun"):
        prepare(TrainConfig(**BASE), 5)


def test_shadows_of_such_a_run_are_trained_alone():
    config = TrainConfig(**BASE | {"membership": "bernoulli", "seed": None, "secure_rng": True})
    assert not any(one.shard or one.secure_rng for one in shadow_configs(config, 3, seed=0))


def test_an_idle_batch_adds_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, labels):
            logits = self.layer(x)
            return transformers.utils.ModelOutput(
                loss=nn.functional.cross_entropy(logits, labels), logits=logits
            )

    torch.manual_seed(0)
    model, labels = Model(), torch.tensor([0, 1, 1])
    batch = {"x": torch.randn(3, 3), "labels": labels}
    want, norms = clipped_sum(model, batch, 0.1)
    seen = []

    def reduce(name, part):
        seen.append(name)
        return 2 * part

    got, same = clipped_sum_over(
        model, [PaddingBatch(batch), batch, PaddingBatch(batch)], 0.1, reduce=reduce
    )
    torch.testing.assert_close(same, norms)
    assert seen == ["layer.weight", "layer.bias"] * 3
    for name in want:
        torch.testing.assert_close(got[name], 2 * want[name])
    empty, none = clipped_sum_over(model, [PaddingBatch(batch)], 0.1)
    assert not any(total.any() for total in empty.values()) and len(none) == 0


def test_a_sharded_model_needs_its_reduction(tmp_path):
    """Without it, each process would clip and add its own rows only, and return that as the sum."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        from lowrank_dp.models import load_model
        from lowrank_dp.train.layout import shard

        model, _ = load_model("tiny-llama")
        shard(model, "cpu")
        batch = {
            "input_ids": torch.ones(2, 4, dtype=torch.long),
            "labels": torch.ones(2, 4, dtype=torch.long),
        }
        with pytest.raises(ValueError, match=r"sharded over processes: .*reduce"):
            clipped_sum(model, batch, 1.0)
        with pytest.raises(ValueError, match="needs backend 'bookkeeping', got 'loop'"):
            clipped_sum_over(model, [batch], 1.0, backend="loop", reduce=lambda name, part: part)
    finally:
        torch.distributed.destroy_process_group()


def test_train_is_refused_alone(tmp_path):
    with pytest.raises(ValueError, match="shard must go with several"):
        train(TrainConfig(**BASE), tmp_path)
