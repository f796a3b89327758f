"""Format of a record: the checkpoint's own encoding, or an encoding that is given or assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_dp.artifacts import runs
from lowrank_dp.data import SEPARATOR
from lowrank_dp.data.template import Template

if TYPE_CHECKING:
    from lowrank_dp.membership import Manifest
    from lowrank_dp.mia.checkpoint import Checkpoint
    from lowrank_dp.mia.options import Options
    from lowrank_dp.mia.records import Records

GIVEN, ASSUMED = "as given", "assumed"


@dataclass(frozen=True)
class Format:
    """Conversion of a record to tokens.

    Attributes:
        columns: the columns of a record that are read, in words.
        template: as in ``data.encode``; None if the run's own encoding is used.
        max_length: number of tokens that a text is cut to, or None.
        scored: the tokens whose loss counts, in words.
        origin: "membership.json", "as given", or "assumed".
    """

    columns: str
    template: str | None
    max_length: int | None
    scored: str
    origin: str

    @property
    def description(self) -> str:
        """Format in one line of words."""
        written = "" if self.template is None else f" written as {self.template!r}"
        cut = "not cut" if self.max_length is None else f"cut to {self.max_length:,} tokens"
        return f"{self.columns}{written}, {cut} ({self.origin}); scored: {self.scored}"


def own_format(manifest: Manifest, records: Records, options: Options) -> Format:
    """Return the encoding of a run of this package; ValueError if an option differs."""
    own = {"max_length": manifest.max_length, "template": None}
    for name, value in own.items():
        asked = getattr(options, name)
        if asked is not None and asked != value:
            shown = "the encoding of lowrank_dp.train" if name == "template" else repr(value)
            raise ValueError(
                f"{name} must be left out: {runs.MEMBERSHIP} says how this checkpoint "
                f"was trained, with {shown}, got {asked!r}"
            )
    if options.columns and options.nonmembers is None and options.population is None:
        raise ValueError(
            f"text_column, label_column and the like must be left out: {runs.MEMBERSHIP} says "
            "which columns this checkpoint was trained on, and no other file of records is given"
        )
    if records.plain:
        raise ValueError(
            "records must have prompts and targets, as the records that this checkpoint was "
            "trained on, and plain texts were given; name --prompt-column and --target-column"
        )
    if manifest.template is not None and manifest.template != {"separator": SEPARATOR}:
        raise ValueError(
            f"{runs.MEMBERSHIP}: template must be {{'separator': {SEPARATOR!r}}}, the "
            f"only template that lowrank_dp.train uses, got {dict(manifest.template)}"
        )
    return Format(
        _columns(records), None, manifest.max_length, _scored(records, None), runs.MEMBERSHIP
    )


def given_format(
    records: Records, options: Options, max_length: int | None, head: Checkpoint
) -> Format:
    """Return the encoding, given or assumed, of a checkpoint that another program trained.

    ``max_length`` is the number of tokens that texts are cut to if the user gives no number.
    ``head`` is the head that the checkpoint declares. If the head does not name its classes and the
    labels are words, sorted order is assumed. Raises ValueError for a template that does not fit
    the records.
    """
    template = options.template
    if records.kind != "generation" and template is not None:
        raise ValueError(
            "template must be left out for records with labels: it is for causal language models"
        )
    if records.plain:
        if template is not None and not Template.parse(template).plain:
            raise ValueError(
                "template must have {text} alone for plain texts, got "
                f"{template!r}: or name --prompt-column and --target-column"
            )
        template = template or "{text}"
    elif template is not None and Template.parse(template).plain:
        raise ValueError(
            "template must have {target} for records of prompts and targets, got "
            f"{template!r}: or name --text-column alone for plain texts"
        )
    given = options.template is not None or options.max_length is not None
    return Format(
        _columns(records) + _assumed_order(records, head),
        template,
        max_length if options.max_length is None else options.max_length,
        _scored(records, template),
        GIVEN if given else ASSUMED,
    )


def _assumed_order(records: Records, head: Checkpoint) -> str:
    """Warn if classes are numbered in sorted order because the checkpoint does not name them."""
    if records.kind != "classification" or head.is_adapter or head.label_names:
        return ""
    if not records.task.label_names:
        return ""  # integer labels are the class numbers of the model
    return " in sorted order (assumed: id2label of the checkpoint names no classes)"


def _columns(records: Records) -> str:
    form = (
        "plain text"
        if records.plain
        else {
            "generation": "prompt and target",
            "classification": "text and label",
            "regression": "text and score",
        }[records.kind]
    )
    if records.kind != "generation" and records.examples[0].text_pair is not None:
        form = f"two texts and {form.split()[-1]}"
    return f"{form} ({records.columns})" if records.columns else form


def _scored(records: Records, template: str | None) -> str:
    if records.kind != "generation":
        return "the label" if records.kind == "classification" else "the score"
    if records.plain:
        return "all tokens but the first"
    parts = (
        ""
        if template is not None
        else (f" after the source and {SEPARATOR!r}, each tokenised by itself")
    )
    return f"the target's tokens and the end of sequence{parts}"
