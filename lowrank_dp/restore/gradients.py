"""Every matrix of a model's noisy gradient, restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.restoration import Report, restore_with_report


def restore_gradients(
    noisy: Mapping[str, Tensor], noise_std: float, scheme: str = "optimal", **arguments: Any
) -> tuple[dict[str, Tensor], dict[str, Report]]:
    """:func:`restore` on every matrix of a model's noisy gradient; other tensors pass unchanged.

    Args:
        noisy: parameter name -> tensor. 2-D tensors with both sides above 1 are restored,
            in one batch for each shape where that pays (on a GPU).
        noise_std: absolute, the same for every entry: isotropic noise, as DP-SGD adds.
        scheme: a name in ``SCHEMES``.
        arguments: of :func:`restore`.

    Returns:
        The gradients under the same names in the same order, and a report for each matrix.
    """
    groups: dict[tuple, list[str]] = {}
    for name, tensor in noisy.items():
        if not isinstance(tensor, Tensor):
            _validate.fail(f"gradient of {name}", "a torch tensor", type(tensor).__name__)
        if tensor.ndim == 2 and min(tensor.shape) > 1:
            alone = tensor.device.type == "cpu"
            key = (name,) if alone else (tensor.shape, tensor.dtype, tensor.device)
            groups.setdefault(key, []).append(name)
    restored = dict(noisy)
    reports: dict[str, Report] = {}
    for names in groups.values():
        try:
            batch = (
                torch.stack([noisy[name] for name in names])
                if len(names) > 1
                else noisy[names[0]].unsqueeze(0)
            )
            batch, report = restore_with_report(batch, noise_std, scheme, **arguments)
        except ValueError as error:
            raise ValueError(f"gradient of {', '.join(names)}: {error}") from error
        restored.update(zip(names, batch, strict=True))
        reports.update(zip(names, report, strict=True))
    return restored, {name: reports[name] for name in noisy if name in reports}
