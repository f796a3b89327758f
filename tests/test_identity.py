"""Comparisons of a resumed run before it draws noise again, and a folder that a run releases."""

import fcntl
import json

import pytest
import torch

from lowrank_dp.artifacts.runs import InUse, RunFolder, open_run
from lowrank_dp.train import TrainConfig, identity
from lowrank_dp.train.identity import (
    changed,
    describe_processor,
    not_repeatable,
    versions_and_machine,
)


def test_settings_that_choose_kernels_are_part_of_a_runs_identity(monkeypatch):
    """A setting changes the rounding of sums; model, data and versions stay the same."""
    before = versions_and_machine("cpu")
    assert changed(before, versions_and_machine("cpu")) == []
    for variable, value in (
        ("MKL_CBWR", "COMPATIBLE"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("ONEDNN_MAX_CPU_ISA", "SSE41"),
        ("ATEN_CPU_CAPABILITY", "default"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert changed(before, versions_and_machine("cpu")) == [
                f"{variable}: not set / {value}"
            ]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        (difference,) = changed(before, versions_and_machine("cpu"))
        assert difference.startswith("float32 matrix products: ")
    finally:
        torch.set_float32_matmul_precision(precision)
    torch._C._set_mkldnn_enabled(False)
    try:
        assert changed(before, versions_and_machine("cpu")) == ["mkldnn: True / False"]
    finally:
        torch._C._set_mkldnn_enabled(True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "attention kernels" in str(changed(before, versions_and_machine("cpu")))
    torch.use_deterministic_algorithms(True)
    try:
        assert changed(before, versions_and_machine("cpu")) == [
            "deterministic algorithms: False / True"
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert changed(before, versions_and_machine("cpu")) == []


CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Gold
cpu MHz\t\t: 2596.120
cache size\t: 1024 KB
flags\t\t: fpu avx2 avx512f

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Gold
cpu MHz\t\t: 1200.000
cache size\t: 1024 KB
flags\t\t: fpu avx2 avx512f
"""


def test_the_processor_is_part_of_a_runs_identity(tmp_path, monkeypatch):
    """Two processors with AVX512 may run other kernels of MKL and oneDNN."""
    before = describe_processor(CPUINFO)
    assert before.startswith("Intel(R) Xeon(R) Gold (")
    for old, new in (
        ("GenuineIntel", "AuthenticAMD"),
        ("avx512f", "avx512f amx_bf16"),
        ("avx512f", "avx512f avx_vnni"),
        ("1024 KB", "2048 KB"),
        ("Gold", "Platinum"),
        ("model name", "model\t\t: 85\nmodel name"),
    ):
        assert describe_processor(CPUINFO.replace(old, new)) != before, new
    for old, new in (("2596.120", "3100.000"), ("processor\t: 1", "processor\t: 3")):
        assert describe_processor(CPUINFO.replace(old, new)) == before, new
    arm = "processor : 0\nFeatures : fp asimd sve\nCPU part : 0xd40\n"
    assert describe_processor(arm) != describe_processor(arm.replace("sve", "sve2"))
    assert describe_processor("") == ""
    # without /proc/cpuinfo, the system's own words
    now = versions_and_machine("cpu")
    monkeypatch.setattr(identity, "_CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(identity.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(identity.platform, "processor", lambda: "arm")
    identity._processor.cache_clear()
    try:
        (difference,) = changed(now, versions_and_machine("cpu"))
    finally:
        identity._processor.cache_clear()
    assert difference == f"processor: {now['processor']} / arm64 arm"


def test_a_stream_of_another_library_is_not_read_as_this_ones():
    """Snapshots with randomgen's noise also hold a key and a position, of another stream."""
    now = versions_and_machine("cpu")
    before = {name: value for name, value in now.items() if name != "cryptography"}
    before["randomgen"] = "2.5.1"
    assert changed(before, now) == [
        f"cryptography: not set / {now['cryptography']}",
        "randomgen: 2.5.1 / not set",
    ]


def test_a_digest_that_differs_is_told_in_words():
    assert changed(
        {"weights": "0" * 64, "threads": "1"}, {"weights": "1" * 64, "threads": "2"}
    ) == ["threads: 1 / 2", "weights: other content than before"]


def test_steps_on_a_gpu_are_not_replayed_with_their_noise():
    """Atomic additions have no fixed order, so the sums of two attempts differ by rounding."""
    assert not not_repeatable(TrainConfig(noise_multiplier=1.0))
    assert "compiled" in not_repeatable(TrainConfig(noise_multiplier=1.0, compile=True))
    on_gpu = TrainConfig(noise_multiplier=1.0, device="cuda:0")
    assert "GPU" in not_repeatable(on_gpu)
    torch.use_deterministic_algorithms(True)
    try:
        assert not not_repeatable(on_gpu)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_release_whose_line_lacks_only_its_end_counts(tmp_path):
    with open_run(tmp_path / "run") as folder:
        for step in range(3):
            folder.begin_release("a", step)
        ledger = folder.snapshots / "releases.jsonl"
        whole = ledger.read_bytes()
        ledger.write_bytes(whole[:-1])
        assert folder.num_releases() == 3
        assert ledger.read_bytes() == whole
        ledger.write_bytes(whole[:-2])  # was being written, before its release was made
        assert folder.num_releases() == 2
        folder.begin_release("a", 2)
        assert ledger.read_bytes() == whole
        entry = json.loads(whole.splitlines()[-1]) | {"step": 7}
        ledger.write_bytes(whole[: whole.rindex(b'{"number"')] + json.dumps(entry).encode())
        with pytest.raises(ValueError, match="line 3 does not match"):
            folder.num_releases()


def test_a_lock_that_was_removed_while_it_was_waited_for_does_not_hold(tmp_path, monkeypatch):
    """A run that leaves an empty folder removes its lock, and a third run could lock a new file."""
    path = tmp_path / "run"
    flock = fcntl.flock

    def leave_first(file, operation):
        (path / ".lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", leave_first)
    with pytest.raises(InUse, match="by a run that was just ending: try again"), open_run(path):
        pass
    monkeypatch.undo()
    with open_run(path) as folder:
        assert isinstance(folder, RunFolder)
