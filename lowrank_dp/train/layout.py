"""Where a run's tensors are when several processes work at it: copies, or shards.

Both layouts answer the same questions of a step, in its order: what becomes of a micro-batch's
clipped sum, who adds the noise, who restores, and how weights get their gradients.

- :class:`Replicated`: every process holds the model. The first adds the sums up and the noise once, and
  hands the noisy sum to all; each matrix is restored by one process and handed round.
- :class:`Sharded` (FSDP2): every process holds some rows of each weight and of its optimizer state,
  and the whole weights of one block while that runs. Each parameter has an owner, to which its sum
  is reduced as soon as a micro-batch has it, which has the first process add the noise, restores
  the noisy sum, and hands out its rows: a process holds its share of the sums, and for a moment one
  whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lowrank_dp.models.trainable import blocks
from lowrank_dp.train import processes

Tensors = Mapping[str, Tensor]
Collective = Callable[[Tensors], Tensors]


class Replicated:
    """Every process holds everything; alone, nothing is exchanged."""

    reduce = None
    collective = False  # evaluating and saving is the first process's

    def noised(self, clean: Tensors, add_noise: Collective | None) -> tuple[Tensors, Tensors]:
        """``(clean, noisy)`` totals over all processes; ``clean`` has a meaning on the first only.

        The first process draws the noise for all: it is added once, after its release is in the
        ledger, and all get the same bits, which equal generators on unlike devices would not give.
        """
        clean = processes.reduce_to_rank0(clean)
        draws = add_noise is not None and processes.rank() == 0
        return clean, processes.broadcast(add_noise(clean) if draws and add_noise else clean)

    def restored(self, work: Collective, noisy: Tensors) -> Tensors:
        """``work(noisy)``, which treats each matrix by itself and leaves other tensors alone."""
        return processes.map_over_ranks(work, noisy)

    def known(self, clean: Tensors) -> Tensors:
        """NON-PRIVATE: the clean totals of what this process restores."""
        return processes.broadcast(clean)

    def assign(self, trained: Mapping[str, nn.Parameter], gradient: Tensors) -> None:
        """Put gradients into ``.grad``."""
        for name, p in trained.items():
            p.grad = gradient[name].to(p.dtype)

    def whole(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors in the model's layout, as one process would have them."""
        return dict(tensors)

    def gathered(self, tensors: Tensors) -> dict[str, Tensor]:
        """On the first process: what any process has."""
        return dict(tensors)

    def placed(self, whole: Tensor, like: Tensor) -> Tensor:
        """A whole tensor in the layout of ``like``."""
        return whole

    def owns(self, name: str) -> bool:
        """Whether this process has what is known of the parameter's gradient."""
        return True


class Sharded(Replicated):
    """Of a model that ``shard`` has sharded; ``trained`` are its parameters."""

    collective = True  # the weights of a forward come from all processes

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._trained = trained
        self._owner = processes.owners(
            {name: tuple(p.shape) for name, p in trained.items()}, processes.world_size()
        )

    def owns(self, name: str) -> bool:
        """Whether this process has what is known of the parameter's gradient."""
        return self._owner[name] == processes.rank()

    def reduce(self, name: str, part: Tensor) -> Tensor:  # type: ignore[override]
        """Of the processes' parts, their sum on the owner, and nothing elsewhere."""
        dist.reduce(part, self._owner[name])
        return part if self.owns(name) else part.new_empty(0)

    def noised(self, clean: Tensors, add_noise: Collective | None) -> tuple[Tensors, Tensors]:
        """``(clean, noisy)`` totals of what this process owns.

        The first process adds all noise, a parameter at a time, as it does to copies.
        """
        clean = {name: total for name, total in clean.items() if self.owns(name)}
        if add_noise is None:
            return clean, clean
        noisy, here = dict(clean), processes.rank()
        for name, p in self._trained.items():
            owner = self._owner[name]
            if here == owner == 0:
                noisy[name] = add_noise({name: clean[name]})[name]
            elif here == owner:
                dist.send(clean[name], 0)
                noisy[name] = torch.empty_like(clean[name])
                dist.recv(noisy[name], 0)
            elif here == 0:
                total = torch.empty(
                    p.shape, dtype=torch.promote_types(torch.float32, p.dtype), device=p.device
                )
                dist.recv(total, owner)
                dist.send(add_noise({name: total})[name], owner)
        return clean, noisy

    def restored(self, work: Collective, noisy: Tensors) -> Tensors:
        """``work`` on what this process owns."""
        return work(noisy)

    def known(self, clean: Tensors) -> Tensors:
        """NON-PRIVATE: the clean totals of what this process owns."""
        return clean

    def assign(self, trained: Mapping[str, nn.Parameter], gradient: Tensors) -> None:
        """Put rows of the gradients into ``.grad``, a parameter at a time from its owner."""
        for name, p in trained.items():
            whole = (
                gradient[name].to(p.dtype)
                if self.owns(name)
                else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            )
            p.grad = self.placed(whole, p, source=self._owner[name])

    def whole(self, tensors: Tensors) -> dict[str, Tensor]:
        """On the CPU; of the other processes, which must ask too, none keeps a tensor."""
        found = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if processes.rank() == 0:
                found[name] = tensor.cpu()
        return found

    def gathered(self, tensors: Tensors) -> dict[str, Tensor]:
        """On the first process: what any process has."""
        return processes.gather_to_rank0(tensors)

    def placed(self, whole: Tensor, like: Tensor, source: int | None = None) -> Tensor:
        """``source``: the process that has it; None where each has."""
        from torch.distributed.tensor import distribute_tensor

        here: Any = like
        if tuple(whole.shape) != tuple(like.shape):
            return whole  # such as a counter of steps
        return distribute_tensor(
            whole.to(like.device), here.device_mesh, here.placements, src_data_rank=source
        )


def equalise(model: nn.Module) -> None:
    """Give every process the first one's weights, however each came to its own."""
    if processes.world_size() > 1:
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)


def shard(model: Any, device: str) -> None:
    """Split a model's weights by rows over the processes, and move it to the device.

    Until then each process holds the whole model, on the CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (processes.world_size(),))
    parts = [model.get_submodule(name) for block in blocks(model) for name in block]
    for module in (*parts, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if hasattr(model, "get_base_model"):  # whose generate() calls the model inside
        register_fsdp_forward_method(model, "generate")
