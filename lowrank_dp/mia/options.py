"""What an attack is asked to do: the attacks' names, and the options with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowrank_dp import _validate
from lowrank_dp.data import Columns
from lowrank_dp.data.template import Template
from lowrank_dp.engines import check_engine

# name -> what it needs and means, in words
ATTACKS = {
    "loss": "-loss",
    "base": "loss before fine-tuning minus loss",
    "zlib": "-loss over the compressed length",
    "min-k": "mean of the least likely 20% of tokens",
    "min-k++": "the same, standardised over the vocabulary",
    "ez": "error zone: where tokens were wrong, gains over losses against the base",
    "quantile": "confidence over the non-members' quantile that its features predict",
    "gradient": "-norm of the loss gradient (white-box)",
    "projection": "symmetry of B A against the gradient sum with the record, over that without "
    "(white-box; one step with a frozen A, all other records known)",
    "lira": "likelihood ratio against shadows with and without the record",
    "lira-offline": "z-score against shadows without the record",
    "rmia": "share of population records whose likelihood ratio is beaten",
    "rmia-offline": "the same, from shadows without the record",
}
WHITE_BOX = ("gradient", "projection")
SHADOW_ATTACKS = ("lira", "lira-offline", "rmia", "rmia-offline")
NEEDS_BASE = ("base", "ez", "projection")
POPULATION = 1000  # the largest number of validation records; they are in no model


@dataclass(frozen=True)
class Options:
    r"""What an attack is asked to do.

    Attributes:
        attacks: names in ``ATTACKS``; () takes all that the checkpoint and the shadows allow.
        primary: the attack that the verdict rests on, named beforehand; "" takes "lira-offline"
            with shadows, else "base", else "loss".
        num_shadows, shadow_dir: the number of shadows to train, or the folder of trained shadows.
        members, nonmembers: files of records, for a checkpoint without membership.json, in any
            format that ``data.load_task`` reads.
        population: a file of records that are in no model, for RMIA and the quantile attack;
            None takes up to 1,000 of the validation split.
        columns: names of the columns of those files.
        base: the model that the checkpoint was fine-tuned from, in place of what the manifest or
            the adapter's configuration says.
        template: how a causal language model that was trained elsewhere was shown its records, as
            in ``data.encode``: ``"{source}\n{target}"``, or ``"{text}"`` for plain texts. None
            takes these two, by the records' form.
        max_length: number of tokens that each text is cut to, for a checkpoint trained elsewhere.
        data_dir: of the task, as in ``data.load_task``.
        fpr: false-positive rates at which the true-positive rate is reported.
        delta: of the lower bound on epsilon; None takes the accountant's.
        guesses: of the one-run audit; 0 for none. Needs independent coins.
        white_box: also the gradient's norm, and the projection attack where the recipe allows it.
        max_records, batch_size, seed, device: of the computation.
        num_workers, engine: shadows trained at a time, and where, as in ``sweep``.
    """

    attacks: tuple[str, ...] = ()
    primary: str = ""
    num_shadows: int = 0
    shadow_dir: Path | None = None
    members: Path | None = None
    nonmembers: Path | None = None
    population: Path | None = None
    base: str = ""
    data_dir: Path | None = None
    fpr: tuple[float, ...] = (0.01, 0.001)
    delta: float | None = None
    guesses: int = 0
    white_box: bool = False
    max_records: int | None = None
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    num_workers: int | None = None
    engine: str = "loky"
    columns: Columns = field(default_factory=Columns)
    template: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_engine(self.engine)
        for name in self.named:
            _validate.choice("attack", name, ATTACKS)
        for rate in self.fpr:
            _validate.real("fpr", rate, low=0, high=1, low_open=True, high_open=True)
        if self.delta is not None:
            _validate.real("delta", self.delta, low=0, high=1, high_open=True)
        _validate.integer("shadows", self.num_shadows, low=0)
        _validate.integer("guesses", self.guesses, low=0)
        _validate.integer("batch_size", self.batch_size)
        _validate.integer("seed", self.seed, low=0)
        if self.max_length is not None:
            _validate.integer("max_length", self.max_length)
        if self.template is not None:
            Template.parse(self.template)
        if self.num_shadows and self.shadow_dir is not None:
            raise ValueError("shadows and shadow_dir must not both be given")

    @property
    def named(self) -> tuple[str, ...]:
        """The attacks that were asked for by name: each is made, or the reason is an error."""
        return (*self.attacks, *filter(None, [self.primary]))
