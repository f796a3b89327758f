"""Layout of a run's tensors on its ranks: replicated, or sharded.

A :class:`Layout` decides, in the order of a step, how a micro-batch's clipped sum is reduced, which
rank adds the noise, which rank restores which matrix, and how weights get their gradients.

- :class:`Replicated`: every rank holds the whole model. Rank 0 adds the sums and the noise, and
  broadcasts the noisy sum; each rank restores its share of the matrices.
- :class:`Sharded` (FSDP2): every rank holds some rows of each weight and of the optimizer's state,
  and the whole weights of one block while the block runs. Every parameter has an owner, one
  of the ranks. Each micro-batch's sum is reduced to the owner, which has rank 0 add the noise,
  restores the noisy sum and scatters its rows. A rank holds its share of the sums, and for a moment
  one whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models.trainable import blocks
from lowrank_dp.rng import Generator
from lowrank_dp.train import processes

Tensors = Mapping[str, Tensor]


class Layout(Protocol):
    """Placement of a run's tensors on its ranks, and the exchanges of a step.

    Attributes:
        collective: whether every rank must take part in an evaluation and in a snapshot.
    """

    collective: bool

    @property
    def reduce(self) -> Callable[[str, Tensor], Tensor] | None:
        """Reduction of a micro-batch's sum over ranks; None if only totals are reduced."""

    def add_noise(
        self, sums: Tensors, mechanism: GaussianMechanism | None, generator: Generator
    ) -> tuple[Tensors, Tensors]:
        """Return ``(clean, noisy)`` totals over all ranks; the clean one is NON-PRIVATE.

        Rank 0 draws all noise, once, after its release is in the ledger: equal generators on
        different devices would not give equal bits. Without a mechanism both totals are clean.
        """

    def map_over_ranks(self, work: Callable[[Tensors], Tensors], noisy: Tensors) -> Tensors:
        """Return the part of ``work(noisy)`` that :meth:`assign` needs.

        One rank processes each matrix. ``work`` treats every matrix by itself, and leaves other
        tensors as they are.
        """

    def restored_clean(self, clean: Tensors) -> Tensors:
        """Return the clean totals of the matrices that this rank restores. NON-PRIVATE.

        Only an oracle scheme reads clean totals.
        """

    def assign(self, trained: Mapping[str, nn.Parameter], gradient: Tensors) -> None:
        """Put the gradients into ``.grad``, in the parameters' type."""

    def full_tensors(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return, on rank 0, the tensors as one process would hold them; all ranks must call."""

    def gather(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return, on rank 0, the tensors that any rank owns; all ranks must call."""

    def distribute(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return a whole tensor in the layout of ``like``."""

    def owns(self, name: str) -> bool:
        """Return whether this rank holds the noisy sum of the parameter."""


class Replicated:
    """Layout in which every rank holds all tensors."""

    collective = False  # rank 0 evaluates and saves alone
    reduce = None

    def add_noise(
        self, sums: Tensors, mechanism: GaussianMechanism | None, generator: Generator
    ) -> tuple[Tensors, Tensors]:
        """Add up the sums and the noise on rank 0; the clean total is meaningless elsewhere."""
        clean = processes.reduce_to_rank0(sums)
        private = mechanism is not None and processes.rank() == 0
        noisy = mechanism.add_noise(clean, generator) if private and mechanism else clean
        return clean, processes.broadcast(noisy)

    def map_over_ranks(self, work: Callable[[Tensors], Tensors], noisy: Tensors) -> Tensors:
        """Return ``work(noisy)``, each matrix done by its owner and broadcast."""
        return processes.map_over_ranks(work, noisy)

    def restored_clean(self, clean: Tensors) -> Tensors:
        """Return the clean totals of rank 0. NON-PRIVATE."""
        return processes.broadcast(clean)

    def assign(self, trained: Mapping[str, nn.Parameter], gradient: Tensors) -> None:
        """Put the gradients into ``.grad``."""
        for name, p in trained.items():
            p.grad = gradient[name].to(p.dtype)

    def full_tensors(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors, which are whole."""
        return dict(tensors)

    def gather(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors, which rank 0 has."""
        return dict(tensors)

    def distribute(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return the tensor."""
        return whole

    def owns(self, name: str) -> bool:
        """Return True."""
        return True


class Sharded:
    """Layout of a model that :func:`shard` has split.

    Args:
        trained: the model's trained parameters, sharded.
    """

    collective = True  # the weights of a forward pass come from all ranks

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._trained = trained
        self._owner = processes.owners(
            {name: tuple(p.shape) for name, p in trained.items()}, processes.world_size()
        )

    def owns(self, name: str) -> bool:
        """Return whether this rank owns the parameter's sum."""
        return self._owner[name] == processes.rank()

    def reduce(self, name: str, part: Tensor) -> Tensor:
        """Return the sum of all ranks' parts on the owner, and an empty tensor elsewhere."""
        dist.reduce(part, self._owner[name])
        return part if self.owns(name) else part.new_empty(0)

    def add_noise(
        self, sums: Tensors, mechanism: GaussianMechanism | None, generator: Generator
    ) -> tuple[Tensors, Tensors]:
        """Send each owned total to rank 0, which adds the noise and sends the total back."""
        clean = {name: total for name, total in sums.items() if self.owns(name)}
        if mechanism is None:
            return clean, clean
        noisy, here = dict(clean), processes.rank()
        for name, p in self._trained.items():  # in rank 0's order of draws, one at a time
            owner = self._owner[name]
            if here == owner == 0:
                noisy[name] = mechanism.add_noise({name: clean[name]}, generator)[name]
            elif here == owner:
                dist.send(clean[name], 0)
                noisy[name] = torch.empty_like(clean[name])
                dist.recv(noisy[name], 0)
            elif here == 0:
                total = torch.empty(
                    p.shape, dtype=torch.promote_types(torch.float32, p.dtype), device=p.device
                )
                dist.recv(total, owner)
                dist.send(mechanism.add_noise({name: total}, generator)[name], owner)
        return clean, noisy

    def map_over_ranks(self, work: Callable[[Tensors], Tensors], noisy: Tensors) -> Tensors:
        """Return ``work`` of the sums that this rank owns; :meth:`assign` scatters the rows."""
        return work(noisy)

    def restored_clean(self, clean: Tensors) -> Tensors:
        """Return the clean totals, which this rank owns. NON-PRIVATE."""
        return clean

    def assign(self, trained: Mapping[str, nn.Parameter], gradient: Tensors) -> None:
        """Scatter the rows of each gradient from its owner into ``.grad``, one at a time."""
        for name, p in trained.items():
            whole = (
                gradient[name].to(p.dtype)
                if self.owns(name)
                else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            )
            p.grad = _distribute(whole, p, source=self._owner[name])

    def full_tensors(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return whole tensors on rank 0, on the CPU; an empty dict elsewhere."""
        found = {}
        for name, tensor in tensors.items():
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if processes.rank() == 0:
                found[name] = tensor.cpu()
        return found

    def gather(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return, on rank 0, the tensors of all ranks."""
        return processes.gather_to_rank0(tensors)

    def distribute(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that every rank has whole."""
        return _distribute(whole, like, source=None)


def _distribute(whole: Tensor, like: Tensor, source: int | None) -> Tensor:
    """Shard a tensor as ``like`` is sharded.

    ``source`` is the rank that holds the whole tensor, or None if every rank holds it.
    """
    from torch.distributed.tensor import distribute_tensor

    here: Any = like
    if tuple(whole.shape) != tuple(like.shape):
        return whole  # an entry of the optimizer's state that is not sharded: a step counter
    return distribute_tensor(
        whole.to(like.device), here.device_mesh, here.placements, src_data_rank=source
    )


def equalise(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if processes.world_size() > 1:
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.data, 0)


def shard(model: Any, device: str) -> None:
    """Split a model's weights by rows over the ranks (FSDP2), and move the model to the device.

    Before the call, every rank must hold the whole model on the CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (processes.world_size(),))
    parts = [model.get_submodule(name) for block in blocks(model) for name in block]
    for module in (*parts, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if hasattr(model, "get_base_model"):  # an adapter's generate() calls the base model
        register_fsdp_forward_method(model, "generate")
