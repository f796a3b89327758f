"""Load the models of an attack: the checkpoint, and the reference, the model before fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lowrank_dp.artifacts import runs
from lowrank_dp.data import Task, encode
from lowrank_dp.mia.checkpoint import has_label_head, load_checkpoint
from lowrank_dp.mia.options import NEEDS_BASE, Options
from lowrank_dp.mia.requirements import check_named
from lowrank_dp.mia.target import Target
from lowrank_dp.models import load_model
from lowrank_dp.models.backbones import find_backbone, one_line
from lowrank_dp.models.base import check_base_weights


@dataclass(frozen=True)
class Loaded:
    """A target's models, and its records as tokens.

    Attributes:
        model, tokenizer: the checkpoint's model and tokenizer.
        reference: the model before fine-tuning, which may be ``model`` itself (an adapter that can
            be switched off); None if the model before is not known.
        why_no_reference: the reason why ``reference`` is None, else "".
        rows: the attacked records, then the population, as token rows of ``data.encode``.
    """

    model: Any
    tokenizer: Any
    reference: Any
    why_no_reference: str
    rows: list[dict[str, Any]]


def load(target: Target, options: Options) -> Loaded:
    """Load everything that an attack needs before the first forward pass.

    Raises ValueError in one line for everything that can be refused without a forward pass: weights
    that are missing or damaged, a folder without its tokenizer, a base without a head, a named
    attack that is unavailable, and records that do not fit the model's context.
    """
    check_named(target, options)
    model, tokenizer = load_checkpoint(
        target.folder,
        options.base,
        task=target.records.task,
        device=options.device,
        **_trained_part(target),
    )
    reference, why_no_reference = find_reference(target, options, model)
    form = {name: value for name, value in target.encoding.items() if name != "pad_to"}
    rows = encode(
        (*target.records.examples, *target.population), tokenizer, kind=target.records.kind, **form
    )
    return Loaded(model, tokenizer, reference, why_no_reference, rows)


def _trained_part(target: Target) -> dict[str, Any]:
    """Return arguments of ``load_model`` that make the recipe's parameters trainable.

    White-box attacks differentiate by these parameters.
    """
    if target.result is None or (target.folder / "adapter_config.json").is_file():
        return {"method": target.result.config.method} if target.result else {}
    config = target.result.config
    return {"train_embeddings": config.train_embeddings, "train_layers": config.train_layers}


def find_reference(target: Target, options: Options, model: Any) -> tuple[Any, str]:
    """Load the model before fine-tuning, or return None and the reason why the model is unknown.

    The reference is ``model`` itself for an adapter of a causal language model, because that
    adapter can be switched off. For a run of this package, the reference is the base with the head
    that the run started with. For a classifier that another program trained, the reference is a
    base that is a classifier, with the base's own head. Raises ValueError with the reason if an
    attack that needs the reference was named.
    """
    if target.records.kind == "generation" and hasattr(model, "disable_adapter"):
        return model, ""
    if reason := _why_no_reference(target):
        if asked := [name for name in options.named if name in NEEDS_BASE]:
            raise ValueError(f"attack {asked[0]!r} can't be made: {reason}")
        return None, reason
    assert target.base is not None
    # if the base is the checkpoint under another name, every calibrated score is 0
    found = find_backbone(target.base["model"])
    if Path(found.path).is_dir() and Path(found.path).samefile(target.folder):
        raise ValueError(
            f"base must be the model before fine-tuning, got {found.path}, the checkpoint itself"
        )
    return load_reference(
        target.folder, target.base, target.records.task, device=options.device
    ), ""


def _why_no_reference(target: Target) -> str:
    if target.base is None:
        return "the model before fine-tuning is not known: give --base"
    if target.records.kind == "generation":
        return ""
    if (target.folder / runs.MEMBERSHIP).is_file():
        if not (target.folder / runs.INITIAL_HEAD).is_file():
            return (
                f"{target.folder} holds no {runs.INITIAL_HEAD}, the head before training, "
                "so there is no loss before fine-tuning to compare with"
            )
    elif not has_label_head(target.base["model"]):
        return (
            f"--base {target.base['model']} is no classifier, and a head drawn at random has "
            "no loss to compare with: it needs a base with its own trained head"
        )
    return ""


def load_reference(
    folder: str | Path, base: Mapping[str, Any], task: Task, *, device: str = "cpu"
) -> Any:
    """Load the manifest's base with the head that the run started with.

    A checkpoint without ``initial_head.safetensors`` was trained by another program, and its base
    must have a head of its own. ``base`` maps "model" to the base's name, "seed" to the seed of the
    head, and optionally "weights" to the SHA-256 of the base's weights. Raises ValueError if a
    weight of the reference would be drawn at random, or if the base's weights are not those that
    the manifest names.
    """
    file = Path(folder) / runs.INITIAL_HEAD
    with one_line(str(file)):
        head = load_file(file) if file.is_file() else {}
    try:
        model, _ = load_model(
            base["model"], task=task, seed=base["seed"], device=device, new_head=bool(head)
        )
    except ValueError as error:
        raise ValueError(
            f"base: {error}; without a base nothing can be calibrated: give another, "
            "or leave out the attack 'base'"
        ) from None
    check_base_weights(model, base.get("weights"), Path(folder).name, base["model"])
    if lost := sorted(set(getattr(model, "lowrank_dp_new", ())) - head.keys()):
        raise ValueError(
            f"{file} must hold what the base {base['model']} lacks, {', '.join(lost)}, which would "
            "be drawn at random: train again, or leave out the attack 'base'"
        )
    with one_line(str(file)):
        _, unexpected = model.load_state_dict(head, strict=False)
    if unexpected:
        raise ValueError(f"{file} must fit the base model, got {unexpected[0]}")
    return model.eval()
