"""Cache of the frozen blocks' outputs, so that steps and evaluations run the trained blocks only.

A cached output depends on one row's tokens and on frozen weights. A folder that runs share
(:class:`lowrank_dp.artifacts.row_store.RowStore`) holds one output per row, named by a hash of all
inputs of the output. The outputs are as sensitive as the records: only the owner can read them.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp._json import json_digest
from lowrank_dp._terminal import first_line, progress, tell
from lowrank_dp.artifacts.row_store import RowStore, bytes_used
from lowrank_dp.data.batches import collate
from lowrank_dp.evaluation.inference import evaluating
from lowrank_dp.grads import Batch
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.models.heads import without_adapter
from lowrank_dp.models.precision import autocast, autocast_dtype_of
from lowrank_dp.models.prefix import STATES, FrozenPrefix
from lowrank_dp.train import processes
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.identity import digest_of_tensors, settings_of, versions_and_machine
from lowrank_dp.train.request import RunRequest

OFF = "off"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FORMAT = 1  # version of the stored tensors; to be raised if their meaning changes
FILE_BYTES = 64 << 20  # approximate size of one file of a store
AGREEMENT = 1e-3  # largest error of a clipped sum on public rows, relative to the sum's norm

Row = Mapping[str, Any]
Fill = Callable[[Sequence[Row]], tuple[RowStore | None, str]]


@dataclass(frozen=True)
class PrefixCache:
    """Cached outputs of the frozen blocks for one run.

    Attributes:
        note: cached blocks, or why there is no cache, in words; empty if no cache was requested.
        digest: SHA-256 of the outputs of the training rows; empty if steps do not read the cache.
        pad_to: number of tokens that every row is padded to, or None.
        training, evaluation: stores of the outputs; None if the cache is not read there.
        fill_training: adds outputs of more training rows; None if steps do not read the cache.
    """

    note: str = ""
    digest: str = ""
    pad_to: int | None = None
    training: RowStore | None = None
    evaluation: RowStore | None = None
    fill_training: Fill | None = None

    def including(self, rows: Sequence[Row]) -> PrefixCache:
        """Return the cache with the outputs of more training rows, if steps read the cache.

        Raises ``ValueError`` if these outputs do not fit into the folder.
        """
        if self.fill_training is None:
            return self
        store, reason = self.fill_training(rows)
        if store is None:
            raise ValueError(f"prefix_cache must have room for {len(rows)} further rows: {reason}")
        return replace(self, training=store)

    def for_training(self, rows: Sequence[Row], batch: Batch) -> Batch:
        """Return a training batch with the cached outputs of its rows, if steps read the cache."""
        return _with_states(self.training, rows, batch, self.pad_to)

    def for_evaluation(self, rows: Sequence[Row], batch: Batch) -> Batch:
        """Return an evaluation batch with the cached outputs, if every row's output is cached."""
        return _with_states(self.evaluation, rows, batch, self.pad_to)


def cache_wanted(config: TrainConfig) -> bool:
    """Return whether the configuration names a cache folder."""
    return config.prefix_cache not in ("", OFF)


def without_states(batch: Batch) -> Batch:
    """Return the batch without cached outputs. The whole model runs on such a batch."""
    return {name: value for name, value in batch.items() if name != STATES}


def open_cache(
    model: Any,
    config: TrainConfig,
    request: RunRequest,
    *,
    training: Sequence[Row],
    evaluation: Sequence[Row],
    public: Sequence[Batch],
    pad_token_id: int,
    pad_to: int | None,
) -> PrefixCache:
    """Open the cache in the folder ``config.prefix_cache``, and compute its missing outputs.

    Args:
        model: the model on its device; gets hooks, which stay, that read the cached outputs.
        config: configuration of the run.
        request: options of the cache beside the configuration.
        training: encoded rows that are trained on.
        evaluation: encoded rows of the evaluations.
        public: batches of public rows, on which steps with and without cache are compared.
        pad_token_id: id of the padding token.
        pad_to: number of tokens that every row is padded to, or None.

    Raises:
        ValueError: if the folder belongs to another user or can't be made.
        OSError: if a file in the folder can't be written.
    """
    if reason := _unavailable(config):
        return PrefixCache(f"frozen blocks not cached ({reason})")
    try:
        prefix = FrozenPrefix(model)
    except ValueError as error:  # a sweep requests a cache for all runs, also without frozen blocks
        asked = request.shared_by is None
        return PrefixCache(f"frozen blocks not cached ({first_line(error)})" if asked else "")
    try:
        with evaluating(model):
            _install(model, prefix, public, config)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        return PrefixCache(f"frozen blocks not cached ({first_line(error)})")
    fill = partial(_filled, model, prefix, config, request, pad_token_id, pad_to)
    stores, reasons = dict[str, RowStore | None](), list[str]()
    for use, rows, pays in (
        ("training", training, _pays(config, request, len(training))),
        ("evaluation", evaluation, _evaluations(config, request) > 1),
    ):
        stores[use], reason = (None, "as the run began") if pays is None else fill(rows, use, pays)
        reasons += [f"{use} ({reason})"] if reason else []
    used = stores["training"]
    digest = _over_ranks(used.digest([_key(row) for row in training]) if used else "")
    if not any(stores.values()):
        prefix.remove()
        return PrefixCache(f"frozen blocks not cached in {' and '.join(reasons)}")
    note = f"frozen blocks 1 to {prefix.length} of {prefix.num_blocks} cached in "
    note += config.prefix_dtype + (f", but not in {reasons[0]}" if reasons else "")
    further = partial(fill, use="further", pays=True) if used else None
    return PrefixCache(note, digest, pad_to, used, stores["evaluation"], further)


def _unavailable(config: TrainConfig) -> str:
    """Return the option that excludes the cache, or an empty string."""
    for name in ("dropout", "shard", "compile", "train_embeddings"):
        if getattr(config, name):
            return f"--{name.replace('_', '-')}"
    return ""


def _pays(config: TrainConfig, request: RunRequest, num_rows: int) -> bool | None:
    """Return whether filling the cache for training saves time; None if steps must not read it."""
    if request.training is not None:
        return request.training or None
    if request.shared_by is None:
        return True
    return config.steps * config.batch_size * request.shared_by >= num_rows


def _evaluations(config: TrainConfig, request: RunRequest) -> float:
    """Return the number of evaluations of the runs that share the folder."""
    shared_by = math.inf if request.shared_by is None else request.shared_by
    return shared_by * (1 + config.steps // config.eval_every)


def _over_ranks(digest: str) -> str:
    """Return, on rank 0, a digest of the digests of all ranks; empty if all are empty."""
    mine = torch.tensor([*digest.encode(), 0])
    found = processes.gather_to_rank0({f"{processes.rank():08}": mine})
    if len(found) < 2 or all(len(other) == 1 for other in found.values()):
        return digest
    return json_digest({rank: found[rank].tolist() for rank in sorted(found)})


def _install(
    model: Any, prefix: FrozenPrefix, public: Sequence[Batch], config: TrainConfig
) -> None:
    """Install the fastest form of the prefix that leaves clipped sums on public rows unchanged.

    If no form agrees with the whole model, the model is left unchanged and ValueError is raised.
    """
    public = [{n: t.to(config.device) for n, t in batch.items()} for batch in public]
    given = [
        {**batch, STATES: _unpadded(prefix.run(batch), batch, config.padding)} for batch in public
    ]
    sums = partial(_sums, model, config.padding)
    expected = [sums(batch) for batch in public]
    for first_position_only in (True, False):
        with suppress(ValueError, RuntimeError, TypeError):
            prefix.install(first_position_only=first_position_only)
            if all(map(_agree, map(sums, given), expected)):
                return
        prefix.remove()
    raise ValueError("the model uses more than the last frozen block's output")


def _sums(model: Any, padding: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a batch's clipped sum, as one vector, and the norms of its rows."""
    found, norms = clipped_sum(model, batch, 1.0, padding=padding, check_rows=False)
    return torch.cat([total.flatten().double() for total in found.values()]), norms.double()


def _agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Return whether sums and norms agree within ``AGREEMENT``, relative to their size."""
    return all(
        bool((new - old).norm() <= AGREEMENT * old.norm())
        for new, old in zip(found, expected, strict=True)
    )


def _unpadded(states: Tensor, batch: Mapping[str, Tensor], padding: str) -> Tensor:
    """Return the outputs as the store does: with zeros at the padding, unless rows include it."""
    if padding == "max-length":
        return states
    return states * batch["attention_mask"].unsqueeze(-1).to(states.dtype)


def _with_states(
    store: RowStore | None, rows: Sequence[Row], batch: Batch, pad_to: int | None
) -> Batch:
    if store is None:
        return batch
    keys = [_key(row) for row in rows]
    if not all(key in store for key in keys):
        return batch
    found = [store[key] for key in keys]
    ids = batch["input_ids"]
    states = found[0].new_zeros((*ids.shape, found[0].shape[-1]))
    for i, (row, tensor) in enumerate(zip(rows, found, strict=True)):
        if len(tensor) != (pad_to or len(row["input_ids"])):
            raise ValueError(f"the cached output of a row has another length: {len(tensor)}")
        states[i, : len(tensor)] = tensor
    return {**batch, STATES: states.to(ids.device)}


def _key(row: Row) -> bytes:
    """Return the name of a row in a store: SHA-256 of the row's inputs to the frozen blocks."""
    tokens = (row["input_ids"], row.get("token_type_ids"))
    return hashlib.sha256(repr(tokens).encode()).digest()


def _filled(
    model: Any,
    prefix: FrozenPrefix,
    config: TrainConfig,
    request: RunRequest,
    pad_token_id: int,
    pad_to: int | None,
    rows: Sequence[Row],
    use: str,
    pays: bool,
) -> tuple[RowStore | None, str]:
    """Return the store with the outputs of all ``rows``, or None with the reason in words.

    Missing outputs are computed, in ``config.precision``, only if ``pays`` is set and they fit.
    """
    root = _validate.expanded("prefix_cache", config.prefix_cache)
    try:
        store = RowStore(root / _name(model, prefix, config, pad_to))
    except OSError as error:
        _validate.fail("prefix_cache", "a folder that can be written", f"{root} ({error.strerror})")
    distinct = {_key(row): row for row in rows}
    if all(key in store for key in distinct):
        return store, ""
    if not pays:
        return None, "too few steps: filling the cache would take longer than it saves"
    waits = partial(tell, "waiting: another process fills the cache of the frozen blocks")
    tells = request.show_progress and processes.rank() == 0  # one line, not one per process
    with store.lock(waits if tells else None), evaluating(model):
        missing = [row for key, row in distinct.items() if key not in store]
        run = partial(_run, prefix, config, pad_token_id, pad_to)
        tokens = sum(pad_to or len(row["input_ids"]) for row in missing)
        if missing and (reason := _no_room(root, config, tokens, run(missing[:1])[0])):
            return None, reason
        size = config.micro_batch_size
        missing.sort(key=lambda row: -len(row["input_ids"]))
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        # without counts: the numbers of rows and tokens are private
        shown = progress(parts, f"frozen blocks, {use} rows", counts=False)
        _write(store, shown if request.show_progress else parts, run)
    return store, ""


def _name(model: Any, prefix: FrozenPrefix, config: TrainConfig, pad_to: int | None) -> str:
    """Return the name of a store: a digest of all inputs of its outputs except the rows."""
    base = without_adapter(model)
    versions = versions_and_machine(config.device)
    document = {
        "format": FORMAT,
        "weights": digest_of_tensors(prefix.tensors().items()),
        "configuration": settings_of(getattr(base, "config", None)),
        "attention": str(getattr(getattr(base, "config", None), "_attn_implementation", None)),
        "blocks": prefix.length,
        "pad_to": pad_to,
        "autocast": autocast_dtype_of(config.precision) is not None,
        "stored": config.prefix_dtype,
        "device": torch.device(config.device).type,
        "torch": torch.__version__,
        "transformers": versions["transformers"],
        "lowrank_dp": versions["lowrank_dp"].split()[0],
        "float32 matrix products": versions["float32 matrix products"],
        "TF32 override": versions.get("NVIDIA_TF32_OVERRIDE", ""),
    }
    return json_digest(document, default=str)[:32]


def _no_room(root: Path, config: TrainConfig, tokens: int, example: Tensor) -> str:
    """Return why the outputs of ``tokens`` tokens do not fit, or an empty string.

    The reason states no size, because the number of tokens is private.
    """
    needed = tokens * example.shape[-1] * example.itemsize
    allowed = config.prefix_gigabytes * 1e9
    if needed > allowed:
        return f"outputs larger than --prefix-gigabytes {config.prefix_gigabytes:g} allows"
    if needed > allowed - bytes_used(root):
        return (
            "no room beside the outputs of other models or blocks that the cache holds under "
            f"--prefix-gigabytes {config.prefix_gigabytes:g}; delete the cache to begin a new one"
        )
    if needed > shutil.disk_usage(root).free:
        return "outputs larger than the free space on the disk"
    return ""


def _write(
    store: RowStore, parts: Iterable[Sequence[Row]], run: Callable[[Sequence[Row]], list[Tensor]]
) -> None:
    """Add the outputs of all rows to the store, in files of about ``FILE_BYTES``."""
    keys: list[bytes] = []
    tensors: list[Tensor] = []
    for part in parts:
        keys += [_key(row) for row in part]
        tensors += run(part)
        if sum(t.numel() * t.itemsize for t in tensors) >= FILE_BYTES:
            store.add(keys, tensors)
            keys, tensors = [], []
    if keys:
        store.add(keys, tensors)


def _run(
    prefix: FrozenPrefix,
    config: TrainConfig,
    pad_token_id: int,
    pad_to: int | None,
    rows: Sequence[Row],
) -> list[Tensor]:
    """Return the outputs (T_i, d) of rows, without padding unless padding is part of a row."""
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    batch = collate(bare, pad_token_id, length=pad_to)
    device = torch.device(config.device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with autocast(device, autocast_dtype_of(config.precision)):
        states = prefix.run(batch)
    stored = states.to("cpu", DTYPES[config.prefix_dtype])
    return [part[: pad_to or len(row["input_ids"])] for part, row in zip(stored, rows, strict=True)]
