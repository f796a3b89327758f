"""Options of an attack, each with its help text and its check, and the attacks' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.data import Columns
from lowrank_dp.data.template import Template
from lowrank_dp.engines import ENGINES, check_engine
from lowrank_dp.train.config_checks import MOST, PRECISIONS

# name -> the score, in words
ATTACKS = {
    "loss": "minus the loss",
    "base": "loss before fine-tuning minus loss",
    "zlib": "minus the loss, divided by the compressed length of the text",
    "min-k": "mean log-probability of the least likely 20% of tokens",
    "min-k++": "mean standardised log-probability of the lowest 20% of tokens",
    "ez": "error zone: upward share of the change against the base, at tokens predicted wrongly",
    "quantile": "confidence minus the non-members' quantile predicted from the record's features",
    "gradient": "minus the norm of the loss gradient (white-box)",
    "projection": "asymmetry of B A against the gradient sum without the record, minus that with "
    "the record (white-box; one step with a frozen A, all other records known)",
    "lira": "log-likelihood ratio under shadows with and without the record",
    "lira-offline": "z-score against shadows without the record",
    "rmia": "share of population records with a smaller likelihood ratio",
    "rmia-offline": "share of population records with a smaller likelihood ratio, from shadows "
    "without the record",
}
WHITE_BOX = ("gradient", "projection")
SHADOW_ATTACKS = ("lira", "lira-offline", "rmia", "rmia-offline")
NEEDS_BASE = ("base", "ez", "projection")
# every attack that reads the population: if others are named, no population is measured
NEEDS_POPULATION = ("quantile", "rmia", "rmia-offline")
CONFIDENCE = 0.95  # of the lower bound on epsilon
# confidence of each of two lower bounds, of which the larger is reported (Bonferroni)
CONFIDENCE_OF_TWO = 1 - (1 - CONFIDENCE) / 2
POPULATION = 1000  # largest number of validation records, which are in no model


def _names(text: str) -> tuple[str, ...]:
    return () if text == "auto" else tuple(text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise ValueError(f"--fpr must be numbers with commas between, got {text!r}") from None


@dataclass(frozen=True)
class Options:
    """Options of an attack.

    Every field is an option of ``python -m lowrank_dp.mia``; the help text of the option documents
    the field. Raises ValueError for a value out of its range and for values that exclude each
    other.
    """

    attacks: tuple[str, ...] = option(
        (),
        f"Attacks to run: auto, or names separated by commas: {', '.join(ATTACKS)}. The primary "
        "attack is run too. Default: auto, which runs every attack that the checkpoint and the "
        "shadow models allow.",
        parse=_names,
    )
    primary: str = option(
        "",
        "Attack that decides the verdict, chosen before the attacks run. Default: lira-offline "
        "with shadow models, else base, else loss.",
    )
    num_shadows: int = option(
        0,
        "Number of shadow models to train with the configuration of the checkpoint.",
        name="shadows",
    )
    shadow_dir: Path | None = option(None, "Folder of shadow models that were trained before.")
    members: Path | None = option(
        None,
        "File of records that were trained on, for a checkpoint without membership.json: "
        "JSON Lines or another table.",
    )
    nonmembers: Path | None = option(None, "File of records that were not trained on.")
    population: Path | None = option(
        None,
        "File of records that no model was trained on, for RMIA and the quantile attack. Default: "
        f"up to {POPULATION:,} records of the validation split, if one of these attacks is run.",
    )
    base: str = option(
        "",
        "Model that the checkpoint was fine-tuned from, in place of the model that the manifest or "
        "the adapter names.",
    )
    data_dir: Path | None = option(None, "Folder of the task's data, in place of LOWRANK_DP_DATA.")
    fpr: tuple[float, ...] = option(
        (0.01, 0.001),
        "False-positive rates, separated by commas, at which the true-positive rate is reported. "
        "Default: 0.01,0.001.",
        parse=_rates,
    )
    delta: float | None = option(
        None,
        "Delta of the lower bound on epsilon and of the accountant's epsilon, which is computed "
        "for this delta. Default: the delta of the run.",
    )
    guesses: int = option(
        0,
        "Number of guesses of the one-run audit, chosen before the attacks run; 0 omits the audit. "
        "The audit needs a checkpoint trained with --membership bernoulli. With the audit there "
        f"are two lower bounds on epsilon, each at a confidence of {CONFIDENCE_OF_TWO:.1%}.",
    )
    white_box: bool = option(
        False,
        "Run the white-box attacks too: the attack by the norm of each record's gradient and, "
        "where the checkpoint's configuration allows it, the attack by LoRA's projection.",
    )
    max_records: int | None = option(
        None, "Number of records of a random subset to attack. Default: all records."
    )
    batch_size: int = option(
        64,
        "Number of records in memory at a time. For a large vocabulary, fewer records are taken.",
    )
    precision: str = option(
        "float32",
        "Precision of the passes through the models; logits are scored in float64. bf16 is faster, "
        "and rounds logits and gradients. The attack 'projection' is always in float32.",
        choices=PRECISIONS,
    )
    seed: int = option(0, "Random seed of shadow models, splits and subsets.")
    device: str = option("cpu", "Device of the models: cpu or cuda.")
    num_workers: int | None = option(
        None,
        "Number of shadow models trained at a time. Default: one per CPU core, and 4 on a GPU.",
    )
    engine: str = option("loky", "Engine that trains the shadow models.", choices=ENGINES)
    columns: Columns = field(default_factory=Columns)
    template: str | None = option(
        None,
        "Template of the text that a causal language model of another program was trained on for "
        "each record, such as '### Input: {prompt}\\n### Response: {target}', or '{text}' for "
        "plain texts.",
    )
    max_length: int | None = option(
        None, "Number of tokens that a text is cut to, for a checkpoint of another program."
    )

    def __post_init__(self) -> None:
        check_engine(self.engine)
        _validate.choice("precision", self.precision, PRECISIONS)
        for name in self.named:
            _validate.choice("attack", name, ATTACKS)
        for rate in self.fpr:
            _validate.real("fpr", rate, low=0, high=1, low_open=True, high_open=True)
        if self.delta is not None:
            _validate.real("delta", self.delta, low=0, high=1, high_open=True)
        _validate.integer("shadows", self.num_shadows, low=0)
        _validate.integer("guesses", self.guesses, low=0)
        _validate.integer("batch_size", self.batch_size)
        if self.num_workers is not None:
            _validate.integer("num_workers", self.num_workers)
        _validate.integer("seed", self.seed, low=0, high=MOST)
        if self.max_length is not None:
            _validate.integer("max_length", self.max_length)
        if self.template is not None:
            Template.parse(self.template)
        if self.num_shadows and self.shadow_dir is not None:
            raise ValueError("shadows and shadow_dir must not both be given")

    @property
    def named(self) -> tuple[str, ...]:
        """Attacks that were named; a named attack that is unavailable is an error."""
        return (*self.attacks, *filter(None, [self.primary]))
