"""Training, its commands and sharded models on a GPU, against the CPU; skipped without CUDA.

The restoration of matrices on a GPU is tested in ``test_restore.py``.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lowrank_dp.data import load_task
from lowrank_dp.data.batches import micro_batches
from lowrank_dp.data.encoding import encode
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models import load_model
from lowrank_dp.rng import SecureRandom
from lowrank_dp.sweep import sweep
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.loop import train
from tests.oracles import clip_one_by_one
from tests.tasks import ENVIRONMENT, Stop, case, run_main

if torch.cuda.is_available():  # steps can be deterministic only if cuBLAS's first call finds this
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CLASSIFIER = TrainConfig(
    model="tiny",
    task="generated",
    max_examples=120,
    noise_free=True,
    steps=6,
    batch_size=20,
    micro_batch_size=8,
    learning_rate=0.1,
    optimizer="sgd",
    eval_every=2,
    snapshot_every=2,
    seed=3,
    device=DEVICE,
)
LANGUAGE_MODEL = replace(
    CLASSIFIER, model="tiny-llama", task="generated-table", eval_examples=20, generate=False
)
NOISY = {"noise_free": False, "noise_multiplier": 0.7}
SAME = 1e-4  # relative distance of sums in float32 on two devices
KINDS = {"tiny": "generated", "tiny-llama": "generated-table"}


def loaded(name, device, **options):
    """Return a model in float32 and a batch of twelve rows of its task, on one device."""
    task = load_task(KINDS[name], max_examples=40)
    model, tokenizer = load_model(name, task=task, device=device, **options)
    rows = encode(task.train[:12], tokenizer, kind=task.kind)
    ((_, batch),) = micro_batches(rows, 12, tokenizer.pad_token_id, device=device)
    return model, batch


def distance(found, wanted):
    """Return the relative distance of two sets of tensors by name, in the Euclidean norm."""
    pairs = [(found[name].double().cpu(), total.double().cpu()) for name, total in wanted.items()]
    first, second = (torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2))
    return float((first - second).norm() / second.norm())


def curves_differ(first, second):
    """Return the largest difference of two runs' losses over their curves."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(first.curve, second.curve, strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_clipped_sums_are_those_of_the_loop_on_the_cpu(name, method):
    """Each backend, and bf16, against one backward pass per row on the CPU."""
    model, batch = loaded(name, "cpu", method=method)
    wanted, norms = clip_one_by_one(model.eval(), batch, None)
    bound = float(norms.median())
    model, batch = loaded(name, DEVICE, method=method)
    compiled = ("compiled",) if method == "full" else ()  # a graph takes half a minute
    for backend in ("bookkeeping", "loop", *compiled):
        found, seen = clipped_sum(model, batch, bound, backend=backend)
        with case(backend):
            assert all(total.device.type == DEVICE for total in found.values())
            assert distance(found, wanted) < SAME
            assert (seen.cpu() - norms).abs().max() < SAME * norms.max()
    half, seen = clipped_sum(model, batch, bound, autocast_dtype=torch.bfloat16)
    # bf16 keeps 8 bits of a number: the sum moves by about 2^-8 in each of a few roundings
    assert all(total.dtype == torch.float32 for total in half.values())
    assert 1e-5 < distance(half, wanted) < 0.06
    one = {key: value[:1] for key, value in batch.items()}
    alone, _ = clipped_sum(model, one, bound / 100, autocast_dtype=torch.bfloat16)
    size = sum(float(t.double().square().sum()) for t in alone.values()) ** 0.5
    assert size == pytest.approx(bound / 100, rel=1e-2)


def test_noise_on_the_gpu():
    """Torch's generator: scale, independence of the seeds; AES: the bits of the CPU.

    A mean or a variance of 10^6 normal numbers is beyond these bounds with probability below 2e-6.
    """
    mechanism, sums = GaussianMechanism(2.0, 1.5, 0.1), {"w": torch.zeros(1000, 1000)}
    on_gpu = {name: total.to(DEVICE) for name, total in sums.items()}
    drawn = [
        mechanism.add_noise(on_gpu, torch.Generator(DEVICE).manual_seed(seed))["w"] / 3.0
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].device.type == DEVICE
    for noise in (drawn[0], drawn[2], (drawn[0] - drawn[2]) / 2**0.5):
        assert abs(float(noise.mean())) < 5e-3
        assert abs(float(noise.var()) - 1) < 7e-3
    key = bytes(range(16))
    found = mechanism.add_noise(on_gpu, SecureRandom(key))["w"]
    assert torch.equal(found.cpu(), mechanism.add_noise(sums, SecureRandom(key))["w"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora", "optimizer": "adam", "learning_rate": 1e-2, "precision": "bf16"},
        {"train_layers": 1, "prefix_cache": True},
    ],
    ids=["full", "LoRA, bf16", "cached prefix"],
)
@pytest.mark.parametrize("base", [CLASSIFIER, LANGUAGE_MODEL], ids=["classifier", "language model"])
def test_a_run_is_that_of_the_cpu(base, changes, tmp_path, monkeypatch):
    """Noise-free runs, with the samples of one stream: a stream's name states the device."""
    monkeypatch.setattr("lowrank_dp.train.state.environment", lambda device: {"device": "any"})
    asked = dict(changes)
    if asked.pop("prefix_cache", False):
        asked["prefix_cache"] = str(tmp_path / "cache")
    config = replace(base, **asked)
    found = train(config, tmp_path / "gpu", show_progress=False)
    plain = {"device": "cpu", "prefix_cache": ""}
    wanted = train(replace(config, **plain), tmp_path / "cpu", show_progress=False)
    losses = [entry["loss"] for entry in wanted.curve]
    moved = max(losses) - min(losses)
    assert moved > 1e-3
    # bf16 with another size of micro-batch moves by 0.07 of it on the CPU
    assert curves_differ(found, wanted) < moved * (0.2 if asked.get("precision") else 0.01)


def test_a_private_run_says_where_its_noise_comes_from(tmp_path):
    """Restored DP runs, unseeded: Philox on the GPU, or AES by ``secure_rng``."""
    config = replace(
        CLASSIFIER, **NOISY, seed=None, scheme="optimal", below="zero", momentum_beta=0.9
    )
    result = train(config, tmp_path / "philox", show_progress=False)
    assert "Philox" in result.privacy and "not cryptographic" in result.privacy
    assert result.epsilon == GaussianMechanism(0.7, 1.0, result.sample_rate).epsilon(
        6, result.delta
    )
    result = train(replace(config, secure_rng=True), tmp_path / "aes", show_progress=False)
    assert "AES-128-CTR" in result.privacy and "Philox" not in result.privacy


def test_a_killed_run_resumes(tmp_path):
    """Steps after the snapshot are drawn anew and count again, unless they are deterministic."""
    config = replace(CLASSIFIER, **NOISY, snapshot_every=4)

    def killed(setup, entry):
        if entry["step"] == 6:
            raise Stop

    unbroken = None
    for deterministic, releases in ((False, 8), (True, 6)):
        torch.use_deterministic_algorithms(deterministic)
        try:
            folder = tmp_path / f"{deterministic}"
            with pytest.raises(Stop):
                train(config, folder, show_progress=False, on_evaluation=killed)
            if deterministic:
                unbroken = train(config, tmp_path / "unbroken", show_progress=False)
                resumed = train(config, folder, resume=True, show_progress=False)
            else:
                with pytest.warns(UserWarning, match="GPU"):
                    resumed = train(config, folder, resume=True, show_progress=False)
        finally:
            torch.use_deterministic_algorithms(False)
        assert resumed.releases == releases and resumed.curve[-1]["step"] == 6
    assert curves_differ(resumed, unbroken) == 0


def test_a_sweep_shares_the_gpu(tmp_path):
    configs = [replace(CLASSIFIER, learning_rate=rate) for rate in (0.1, 0.2)]
    outcomes = sweep(configs, tmp_path / "sweep", num_workers=2)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    alone = train(configs[1], tmp_path / "alone", show_progress=False)
    assert curves_differ(outcomes[1].result, alone) < 1e-4


def test_the_commands_run_on_a_gpu(tmp_path, capsys):
    """Train, generate, attack; spectra; LoRA's noise: as typed, with ``--device cuda``."""
    device = "--device", DEVICE
    run = tmp_path / "run"
    words = "train --model tiny-llama --task generated-table --non-private --max-examples 80"
    more = "--membership bernoulli --method lora --rank 4 --steps 6 --batch-size 16 --num-beams 2"
    words = [*words.split(), *more.split(), "--max-new-tokens", "4", "--eval-examples", "8"]
    code, _, err = run_main(capsys, *words, "--seed", "1", "--output", run, *device)
    assert code == 0, err
    code, out, err = run_main(capsys, "mia", "--model", run, "--json", *device)
    assert code == 0 and json.loads(out), err
    code, out, err = run_main(
        capsys, *"spectrum --model tiny --task generated --batch-size 64 --json".split(), *device
    )
    assert code == 0 and json.loads(out), err
    code, out, err = run_main(
        capsys, *"lora --model tiny --task generated --rank 4 --json".split(), *device
    )
    assert code == 0 and json.loads(out), err


SHARDED = """
import sys
import torch
from torch import distributed as dist
from lowrank_dp.grads.clipping import clipped_sum, clipped_sum_over
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.train.layout import Replicated, Sharded, shard
from lowrank_dp.train.processes import broadcast_from_rank0
from tests.test_gpu import DEVICE, distance, loaded

torch.cuda.set_device(0)
dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
name = sys.argv[1]
model, batch = loaded(name, DEVICE)
wanted, norms = clipped_sum(model, batch, 0.5)
model, _ = loaded(name, "cpu")
shard(model, DEVICE)
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
layout = Sharded(trained)
sums, found_norms = clipped_sum_over(model, [batch], 0.5, check_rows=False, reduce=layout.reduce)
assert distance(sums, wanted) < 1e-5, distance(sums, wanted)
assert (found_norms - norms).abs().max() < 1e-5 * norms.max()
mechanism = GaussianMechanism(1.0, 0.5, 0.1)
clean, noisy = layout.add_noise(sums, mechanism, torch.Generator(DEVICE).manual_seed(0))
_, same = Replicated().add_noise(wanted, mechanism, torch.Generator(DEVICE).manual_seed(0))
assert distance(noisy, same) < 1e-5
layout.assign(trained, noisy)
assert distance({n: p.grad.full_tensor() for n, p in trained.items()}, noisy) == 0
total = torch.ones(3, device=DEVICE)
dist.all_reduce(total)
assert broadcast_from_rank0({"a": 1})[0] == {"a": 1} and total.tolist() == [1, 1, 1]
dist.destroy_process_group()
print("sharded sums agree")
"""


@pytest.mark.parametrize("name", KINDS)
def test_a_sharded_model_on_nccl_has_the_sums_of_the_whole_model(name):
    """FSDP2 and NCCL with one process, which exchanges its shards with itself."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, name],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert done.returncode == 0 and "sharded sums agree" in done.stdout, done.stderr
