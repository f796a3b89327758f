"""Labels of a classifier: their names, and the order of the logits."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_dp.models.heads import final_layer

# names that checkpoints on the hub use for GLUE's labels, folded by `_fold`
_SYNONYMS = {
    "neg": "negative",
    "pos": "positive",
    "entail": "entailment",
    "entailed": "entailment",
    "contradict": "contradiction",
    "contradicted": "contradiction",
    "non_entailment": "not_entailment",
    "no_entailment": "not_entailment",
    "non_equivalent": "not_equivalent",
    "non_duplicate": "not_duplicate",
}


def own_label_names(config: Mapping[str, Any], where: str) -> list[str] | None:
    """Read the names of a checkpoint's labels, in the order of its logits; None without names.

    ``LABEL_0``, ``LABEL_1``, ... in order do not count as names. Raises ValueError that starts with
    ``where`` if ``id2label`` does not name the labels 0 to n - 1, or ``label2id`` contradicts it.
    """
    by_id = config.get("id2label")
    by_name = config.get("label2id")
    names = _in_order(by_id, f"{where}: id2label") if by_id else None
    others = None
    if by_name:
        _check_map(by_name, f"{where}: label2id")
        others = _in_order({str(i): name for name, i in by_name.items()}, f"{where}: label2id")
    found = [one for one in (names, others) if one is not None and not _is_default(one)]
    if len(found) == 2 and operator.ne(*_keys(*found)):
        raise ValueError(
            f"{where}: id2label ({', '.join(found[0])}) and label2id "
            f"({', '.join(found[1])}) must have one order"
        )
    return found[0] if found else None


def label_rows(own: Sequence[str] | None, task: Sequence[str], name: str) -> list[int] | None:
    """Find, for each of the task's labels, its row in the head; None if the order is unknown.

    Labels that are spelt alike on both sides are compared as they are. Otherwise, the comparison
    ignores case, hyphens, underscores and spaces, and knows the usual synonyms of GLUE's labels.
    The order is unknown if the task's labels are numbers or ``own`` is None.

    Raises ValueError, which lists both, if ``own`` and ``task`` are not the same labels.
    """
    if own is None or not task or _is_default(task):
        return None
    mine, wanted = _keys(own, task)
    if set(mine) != set(wanted) and set(map(_number, own)) == set(range(len(task))):
        mine, wanted = [str(_number(one)) for one in own], [str(i) for i in range(len(task))]
    if sorted(mine) != sorted(wanted) or len(set(mine)) != len(mine):
        raise ValueError(
            f"labels of {name} must be the task's {', '.join(task)} in any order, "
            f"got {', '.join(own)}; if they mean the same, rename id2label in its "
            "config.json"
        )
    return [mine.index(one) for one in wanted]


def order_labels(
    model: Any, config: Mapping[str, Any], label_names: Sequence[str], name: str
) -> None:
    """Permute the logits of a classifier's own head into the order of the task's labels.

    The rows of the head's last linear layer are permuted in place, and the model's ``id2label``
    then has the task's names. ``config`` is the content of the checkpoint's ``config.json``, and
    ``name`` names the checkpoint in errors. Raises ValueError as :func:`label_rows` does.
    """
    own = own_label_names(config, f"config.json of {name}")
    rows = label_rows(own, label_names, name)
    if rows is not None:
        layer: Any = model.get_submodule(final_layer(model))
        permute_rows([p for p in (layer.weight, layer.bias) if p is not None], rows)
    name_labels(model, own, label_names)


def name_labels(model: Any, own: Sequence[str] | None, task: Sequence[str]) -> None:
    """Write the names of the labels into the model's configuration.

    The names are the task's, or ``own`` if the task's labels are numbers.
    """
    names = own if own is not None and (not task or _is_default(task)) else task
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {label: i for i, label in enumerate(names)}


def permute_rows(parameters: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Permute the first axis of each tensor in place."""
    with torch.no_grad():
        for p in parameters:
            p.copy_(p[list(rows)].clone())


def _in_order(names: Any, what: str) -> list[str]:
    """List the names of a map from the numbers 0 to n - 1, in the order of the numbers."""
    _check_map(names, what)
    try:
        by_number = {int(key): value for key, value in names.items()}
    except (TypeError, ValueError):
        by_number = {}
    if sorted(by_number) != list(range(len(names))) or not all(
        isinstance(value, str) for value in by_number.values()
    ):
        raise ValueError(f"{what} must name the labels 0 to {len(names) - 1}, got {names!r}")
    return [by_number[i] for i in range(len(names))]


def _check_map(names: Any, what: str) -> None:
    if not isinstance(names, Mapping):
        raise ValueError(f"{what} must be a JSON object, got {type(names).__name__}")


def _keys(first: Sequence[str], second: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names as they are if both lists hold the same names, and else folded.

    Own data may have classes that fold alike, such as US and us.
    """
    if sorted(first) == sorted(second):
        return [*first], [*second]
    return [_fold(name) for name in first], [_fold(name) for name in second]


def _fold(name: str) -> str:
    """Remove differences in case and separators, and replace synonyms."""
    folded = re.sub(r"[-_\s]+", "_", name.strip().lower())
    return _SYNONYMS.get(folded, folded)


def _number(name: str) -> int | None:
    """Return k for the names ``LABEL_k`` and ``k``, else None."""
    found = re.fullmatch(r"(?:label_)?(\d{1,4})", _fold(name))
    return int(found[1]) if found else None


def _is_default(names: Sequence[str]) -> bool:
    """Tell whether the names are only the numbers of the labels, in order."""
    return [_number(name) for name in names] == list(range(len(names)))
