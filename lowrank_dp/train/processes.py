"""Several processes at one run, data-parallel, as torchrun starts them; alone, none of it acts.

Every process holds the model and draws the same Poisson sample, of which it clips its share. The
first adds the shares up and the noise once, and hands the noisy sum to all; what follows is the
same everywhere, but that each matrix is restored by one process. Only the first writes, evaluates
and ever holds a clean total.

Whatever stops a process closes its connections, and that stops the others at their next exchange.
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

# how long the others may wait for the first, which evaluates alone; one that died is noticed at
# once, by its closed connection
TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """Number of this process; 0 is the first, or the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work at this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def processes(device: str) -> Iterator[None]:
    """The processes that torchrun started, connected while the block lasts; alone, nothing.

    On a GPU each process takes that of its LOCAL_RANK, as its current device. When one fails, all
    do: under torchrun the first to notice raises its error, a ``ConnectionError`` if it was another
    process that stopped, and the others raise ``SystemExit``, so that one line is printed.

    Raises:
        ValueError: if a process has no GPU of its own.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device != "cuda" or local >= count:
            raise ValueError(
                f"device must be cpu, or cuda with a GPU for each process, got "
                f"{device!r} for process {local} of a machine with {count} GPUs"
            )
        torch.cuda.set_device(local)
    with _explained():
        store, number, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # a second run of the same processes must not find the first one's addresses
        group = (store.add("lowrank_dp groups", 1) - 1) // world
        store = dist.PrefixStore(f"lowrank_dp {group}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=number,
            world_size=world,
            timeout=TIMEOUT,
        )
    try:
        with _explained():
            yield
            barrier()  # or one would close its connections before another has read from them
    except Exception as error:
        if not _first_to_say(store) and isinstance(error, (ValueError, OSError)):
            raise SystemExit(_terminal.BAD_INPUT) from error
        raise
    finally:
        dist.destroy_process_group()


def _first_to_say(store: dist.Store) -> bool:
    """Whether no other process has reported an error; True where that can't be known."""
    if not dist.is_torchelastic_launched():  # then the first process keeps the store, and may die
        return True
    try:
        return store.add("said", 1) == 1
    except RuntimeError:
        return True


@contextmanager
def _explained() -> Iterator[None]:
    """A failed exchange as one line."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise  # gloo has no error of its own, but names the file that it comes from
        reason = str(error).splitlines()[0].split(". ")[0].split("] ", 1)[-1]
        raise ConnectionError(
            f"another process of this run has stopped or can't be reached ({reason}): go on with "
            "--resume; with another number of processes, the steps since the last snapshot count "
            "again"
        ) from error


def barrier() -> None:
    """Wait for all processes, by gloo."""
    dist.all_reduce(torch.zeros(1))


def broadcast_from_rank0(
    document: Any = None, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """What the first process passes, on every process: a JSON document, and tensors (on the CPU).

    Nothing is pickled. The others pass nothing.
    """
    if world_size() == 1:
        return document, dict(tensors or {})
    data = save({name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()})
    return json.loads(_bytes(json.dumps(document).encode())), load(_bytes(data))


def _bytes(data: bytes) -> bytes:
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
    """On the first process, the tensors of all under their names, on the CPU; elsewhere nothing."""
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
    """All processes' ``sums`` added up, on the first; the others get numbers without a meaning.

    NON-PRIVATE, which is why it is a reduction to one and not to all: together with
    :func:`broadcast` of the noisy sum it moves as many bytes as an all-reduce.
    """
    if world_size() == 1:
        return dict(sums)
    return _flat(lambda flat: dist.reduce(flat, 0), sums)


def broadcast(tensors: Mapping[str, Tensor], source: int = 0) -> dict[str, Tensor]:
    """The tensors of process ``source``; the others pass such of the same shapes and types."""
    if world_size() == 1:
        return dict(tensors)
    return _flat(lambda flat: dist.broadcast(flat, source), tensors)


def _flat(exchange: Callable[[Tensor], Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``exchange`` on all tensors as one, since each exchange has its latency."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    if flat.is_cuda:
        barrier()  # gloo notices a process that has died, NCCL would wait for it
    exchange(flat)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }


def owners(shapes: Mapping[str, tuple[int, ...]], count: int) -> dict[str, int]:
    """For each tensor the process, of ``count``, that restores it.

    The largest first, each to the process with the least to do, by ``m n``, which the fast path's
    time grows with: at most 4/3 of the best possible longest share (Graham, 1969).

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
    """``work(tensors)``, each matrix done by its owner and handed to all.

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
        done.update(
            broadcast({name: done[name] for name in owner if owner[name] == source}, source)
        )
    return done
