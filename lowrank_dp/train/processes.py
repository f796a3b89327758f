"""Processes of one data-parallel run under torchrun, and their exchanges.

Rank 0 draws the Poisson sample, and each rank clips some of the rows. Rank 0 adds the clipped sums
and the noise, and broadcasts the noisy sum. Every rank then restores some of the matrices. Rank 0
alone writes files, evaluates (unless the model is sharded) and holds a clean total. A run of a
single process exchanges nothing.

A process that stops closes its connections, which stops the others at their next exchange.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from lowrank_dp import _terminal

# Longest wait of the other ranks for rank 0, which evaluates alone. A rank that has died is noticed
# at once, since its connections are closed.
TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """Rank of this process: 0 for the first or only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Connect the processes that torchrun started, for the length of the block.

    A process that was started alone connects to nothing. On a GPU, each process makes the GPU of
    its LOCAL_RANK the current device. If one process fails, all fail. Under torchrun, the process
    that notices first raises its error (a ``ConnectionError``, if another process stopped), and
    the others raise ``SystemExit``, so that one line is printed.

    Raises:
        ValueError: if a process has no GPU of its own.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        _take_gpu(device)
    with _lost_connections():
        store = _connect("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        with _lost_connections():
            yield
            barrier()  # no rank closes its connections before the others have read from them
    except Exception as error:
        if not _reports_first(store) and isinstance(error, (ValueError, OSError)):
            raise SystemExit(_terminal.BAD_INPUT) from error
        raise
    finally:
        dist.destroy_process_group()


def _take_gpu(device: str) -> None:
    """Make the GPU of this process's LOCAL_RANK the current device."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device != "cuda" or local >= count:
        raise ValueError(
            f"device must be cpu, or cuda with a GPU for each process, got "
            f"{device!r} for process {local} of a machine with {count} GPUs"
        )
    torch.cuda.set_device(local)


def _connect(backend: str) -> dist.Store:
    """Open the process group, and return the store that the processes share."""
    store, number, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # A second run of the same processes must not find the addresses of the first run.
    group = (store.add("lowrank_dp groups", 1) - 1) // world
    store = dist.PrefixStore(f"lowrank_dp {group}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=TIMEOUT)
    return store


def _reports_first(store: dist.Store) -> bool:
    """Return whether this process is the first to report an error; True if that is unknown."""
    if not dist.is_torchelastic_launched():  # rank 0 keeps the store then, and may have died
        return True
    try:
        return store.add("said", 1) == 1
    except RuntimeError:
        return True


@contextmanager
def _lost_connections() -> Iterator[None]:
    """Turn the error of a failed exchange into a ``ConnectionError`` of one line."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, whose text names a source file of gloo.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = _terminal.first_line(error).split(". ")[0].split("] ", 1)[-1]
        raise ConnectionError(
            f"another process of this run has stopped or can't be reached ({reason}): continue "
            "with --resume; with another number of processes, the steps since the last snapshot "
            "count again"
        ) from error


def barrier() -> None:
    """Wait, by gloo, until every rank has called this function."""
    dist.all_reduce(torch.zeros(1))


def broadcast_from_rank0(
    document: Any = None, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Return rank 0's JSON document and tensors on every rank; the other ranks pass nothing.

    The tensors are on the CPU. They travel as safetensors: nothing is pickled.
    """
    if world_size() == 1:
        return document, dict(tensors or {})
    data = save({name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()})
    return json.loads(_broadcast_bytes(json.dumps(document).encode())), load(_broadcast_bytes(data))


def _broadcast_bytes(data: bytes) -> bytes:
    """Return rank 0's bytes, whose length only rank 0 knows."""
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    buffer = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if rank() == 0
        else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(buffer, 0)
    return buffer.numpy().tobytes()


def gather_to_rank0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, on rank 0, the tensors of all ranks by name, on the CPU; elsewhere an empty dict."""
    found = {name: tensor.cpu() for name, tensor in tensors.items()} if rank() == 0 else {}
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    for source in range(1, world_size()):
        if rank() == source:
            dist.send(torch.tensor(len(data)), 0)
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
        elif rank() == 0:
            size = torch.tensor(0)
            dist.recv(size, source)
            buffer = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(buffer, source)
            found |= load(buffer.numpy().tobytes())
    return found


def reduce_to_rank0(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, on rank 0, the sums over all ranks. NON-PRIVATE.

    The other ranks get numbers without a meaning: a reduction to all ranks would give each of them
    a clean total. A reduction followed by a :func:`broadcast` of the noisy sum moves as many bytes
    as one reduction to all.
    """
    if world_size() == 1:
        return dict(sums)
    return _as_one(lambda flat: dist.reduce(flat, 0), sums)


def broadcast(tensors: Mapping[str, Tensor], source: int = 0) -> dict[str, Tensor]:
    """Return the tensors of rank ``source``; others pass tensors of the same shapes and types."""
    if world_size() == 1:
        return dict(tensors)
    return _as_one(lambda flat: dist.broadcast(flat, source), tensors)


def _as_one(exchange: Callable[[Tensor], Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Exchange all tensors as one flat tensor, since every exchange has a latency."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    if flat.is_cuda:
        barrier()  # gloo notices a process that has died; NCCL would wait for it
    exchange(flat)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }


def owners(shapes: Mapping[str, tuple[int, ...]], count: int) -> dict[str, int]:
    """Assign every tensor to one of ``count`` ranks, so that their loads are about equal.

    The load of a tensor is its number of entries, which the time of a fast restoration is
    proportional to. The largest tensor comes first, and each goes to the rank with the least load:
    the largest load is at most 4/3 of the smallest possible one (Graham, 1969).

    >>> owners({"a": (4, 4), "b": (3, 4), "c": (3, 3)}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    costs = {name: math.prod(shape) for name, shape in shapes.items()}
    loads, owner = [0] * count, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += costs[name]
    return owner


def map_over_ranks(
    work: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``work(tensors)`` on every rank, each matrix done by its owner and broadcast.

    ``work`` treats every matrix by itself, and leaves other tensors as they are.
    """
    if world_size() == 1:
        return dict(work(tensors))
    owner = owners(
        {name: tuple(t.shape) for name, t in tensors.items() if t.ndim == 2}, world_size()
    )
    done = dict(tensors)
    done.update(work({name: tensors[name] for name in owner if owner[name] == rank()}))
    for source in sorted(set(owner.values())):
        done.update(broadcast({n: done[n] for n in owner if owner[n] == source}, source))
    return done
