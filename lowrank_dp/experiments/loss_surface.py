"""Loss of a model along a direction in weight space: slope, curvature and best step.

For weights ``w`` and a direction ``d``, the loss on fixed rows is measured along ``w - eta d``.
Automatic differentiation gives the slope ``g^T d`` and the curvature ``d^T H d``. The quadratic
model predicts that the best step decreases the loss by ``(g^T d)^2 / (2 d^T H d)``. NON-PRIVATE if
the rows are private: no gradient is clipped, and no noise is added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank_dp.models.targets import row_losses
from lowrank_dp.models.trainable import blocks

Direction = Mapping[str, Tensor]  # parameter name -> tensor; other parameters do not move


@dataclass(eq=False)
class LossSurface:
    """Mean loss over fixed rows, as a function of some weights of a model.

    The object holds the outputs of the model's frozen blocks, so the frozen blocks must not change
    while the object is in use. The mean is over rows. The loss of a row with several target tokens
    is the mean over these tokens.

    Attributes:
        model: the model, in eval mode. The methods leave its weights unchanged.
        names: names of the parameters that directions may move.
        batches: rows of the surface, with labels.
        frozen: frozen blocks below the first trained block.
        outputs: output of the last frozen block for each batch.
        row_weights: (rows,) factor of each row's loss, in the order of the batches; None means 1.
    """

    model: nn.Module
    names: list[str]
    batches: list[dict[str, Tensor]]
    frozen: list[nn.Module] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    row_weights: Tensor | None = None

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Weights that directions may move, by name."""
        return {name: self.model.get_parameter(name) for name in self.names}

    @property
    def num_rows(self) -> int:
        """Number of rows of the mean."""
        return sum(len(batch["labels"]) for batch in self.batches)

    @torch.no_grad()
    def loss(self) -> float:
        """Compute the mean loss in nats."""
        return sum(float(loss) for loss in self._losses())

    def loss_and_gradient(self) -> tuple[float, dict[str, Tensor]]:
        """Compute the mean loss in nats and the gradient of the weights, by name."""
        weights = self.weights
        total, gradient = 0.0, {name: torch.zeros_like(w) for name, w in weights.items()}
        for loss in self._losses():
            total += float(loss.detach())
            parts = torch.autograd.grad(loss, list(weights.values()))
            for sum_so_far, part in zip(gradient.values(), parts, strict=True):
                sum_so_far += part
        return total, gradient

    @contextlib.contextmanager
    def curvature(self) -> Iterator[Callable[[Direction], float]]:
        """Yield the function ``d -> d^T H d`` by Hessian-vector products, in nats per unit squared.

        The graphs of the gradients stay in memory until the end of the block.
        """
        weights = self.weights
        gradients = []
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for loss in self._losses():
                parts = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                gradients.append(dict(zip(weights, parts, strict=True)))

        def of(direction: Direction) -> float:
            slopes = [
                (gradient[name] * d).sum()
                for gradient in gradients
                for name, d in direction.items()
            ]
            products = torch.autograd.grad(
                torch.stack(slopes).sum(), [weights[name] for name in direction], retain_graph=True
            )
            return product(direction, dict(zip(direction, products, strict=True)))

        yield of

    @torch.no_grad()
    def loss_at(self, direction: Direction, step: float) -> float:
        """Compute the mean loss in nats at ``w - step * direction``."""
        # .data is changed and restored, so the graphs of `curvature` stay valid
        weights = {name: self.weights[name].data for name in direction}
        start = {name: w.clone() for name, w in weights.items()}
        try:
            for name, d in direction.items():
                weights[name].sub_(d, alpha=step)
            return self.loss()
        finally:
            for name, w in start.items():
                weights[name].copy_(w)

    def _losses(self) -> Iterator[Tensor]:
        """Yield the contribution of each batch to the mean loss, in float64."""
        rows, first = self.num_rows, 0
        for i, batch in enumerate(self.batches):
            output = self.outputs[i] if self.outputs else None
            with _replaced(self.frozen if self.outputs else [], output):
                losses = row_losses(self.model, batch, _kind(batch["labels"]))
            if self.row_weights is not None:
                losses = losses * self.row_weights[first : first + len(losses)]
                first += len(losses)
            yield losses.sum() / rows


def make_surface(
    model: nn.Module, names: list[str], batches: Iterable[dict[str, Tensor]]
) -> LossSurface:
    """Build a surface, and compute the outputs of the frozen blocks once.

    ``model`` is a classifier or a causal language model in eval mode, and ``names`` are trainable
    parameters. A block is frozen if neither the block nor any block below it has a parameter with
    ``requires_grad``.
    """
    surface = LossSurface(model, names, list(batches))
    for modules in (list(map(model.get_submodule, block)) for block in blocks(model)):
        if any(p.requires_grad for module in modules for p in module.parameters()):
            break
        surface.frozen += modules
    if surface.frozen:
        recorded: list[Any] = []
        handle = surface.frozen[-1].register_forward_hook(
            lambda module, inputs, output: recorded.append(output)
        )
        try:
            surface.loss()
        finally:
            handle.remove()
        surface.outputs = recorded
    return surface


@contextlib.contextmanager
def _replaced(modules: list[nn.Module], output: Any) -> Iterator[None]:
    """Make every module return ``output`` without computation, inside the block."""
    for module in modules:
        module.forward = lambda *inputs, **options: output
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _kind(labels: Tensor) -> str:
    """Return the kind of task that has such labels: (B, T) tokens, or one label per row."""
    if labels.ndim == 2:
        return "generation"
    return "regression" if labels.is_floating_point() else "classification"


def unit(direction: Direction) -> tuple[dict[str, Tensor], float]:
    """Scale a direction to norm 1 over all its tensors; return the result and the original norm.

    A direction of zeros is returned unchanged.
    """
    norm = float(torch.stack([d.double().square().sum() for d in direction.values()]).sum()) ** 0.5
    return {name: d / (norm or 1.0) for name, d in direction.items()}, norm


def product(one: Direction, other: Direction) -> float:
    """Return the inner product over the parameters of ``one``, in float64."""
    return float(sum((d.double() * other[name]).sum() for name, d in one.items()))


def line_search(
    change: Callable[[float], float], first: float, max_doublings: int = 12
) -> tuple[float, float]:
    """Search for the step of largest decrease of a loss, on the grid ``first * 2^k`` and between.

    The search moves from ``first`` towards a lower loss, until the best step has a worse step on
    both sides, or for ``max_doublings`` steps of the grid. Then the vertex of the parabola through
    these three points is tried.

    Args:
        change: function from a step above 0 to the change of the loss relative to step 0.
        first: first step, > 0.
        max_doublings: largest |k|.

    Returns:
        The best step and the decrease of the loss at this step; (0, 0) if every step raises the
        loss.
    """
    seen: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in seen:
            seen[k] = change(first * 2.0**k)
        return seen[k]

    best = 0
    while abs(best) < max_doublings:
        lower = min((best - 1, best, best + 1), key=at)
        if lower == best:
            break
        best = lower
    step, low = first * 2.0**best, seen[best]
    left, right = at(best - 1) - low, at(best + 1) - low
    # parabola through (-1/2, left), (0, 0), (1, right), in units of the best step
    bend = (2 * left + right) / 1.5
    if bend > 0:
        tilt = right - bend
        vertex = step * (1 - tilt / (2 * bend))
        if abs(vertex / step - 1) > 0.05 and (there := change(vertex)) < low:
            step, low = vertex, there
    return (step, -low) if low < 0 else (0.0, 0.0)
