"""Numbers of README.md, the pages and the claim index, and the results that the numbers come from.

:func:`unsourced` lists the numbers of a page that have no source. A number has a source if it
stands, to its rounding, in a result that its sentence, list item or table row names. If its
sentence names no result, the results that its section names count. A number stands in a result if
it stands in the result's table, in the scalars of the result's JSON, or in :data:`COMPUTED`, which
computes numbers from the result's arrays. "a ± b" and "a (b to c)" count as one number. A section
that names no result is checked for all numbers but single digits. A number that is no measurement
stands in :data:`DEFINITIONS`, with its reason. ``python -m tests.page_numbers`` lists all numbers
without a source.
"""

import functools
import json
import re
import runpy
from decimal import Decimal
from pathlib import Path

import numpy as np
from scipy import stats

from lowrank_dp import theory
from lowrank_dp.artifacts import load_result
from lowrank_dp.experiments import (
    membership,
    noise_cost,
    noise_cost_verdicts,
    plan_check,
    protocol,
    steps,
)
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.experiments.noise_cost_directions import DIRECTIONS, SCHEMES
from lowrank_dp.train import TrainConfig

ROOT = Path(__file__).parent.parent
ARTIFACTS = ROOT / "paper_artifacts"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ARTIFACTS / "README.md",
]
VALUE = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\d)"
# an interval, or a number that is no part of a name
NUMBER = re.compile(
    rf"(?<![\w.])(?<!\w-)(?:{VALUE} ± {VALUE}|{VALUE} \(-?{VALUE} to -?{VALUE}\)|{VALUE}%?)"
    r"(?!\w|\.\d)"
)
NOT_PROSE = re.compile(
    r"^#+ [\d.]* ?|^    .*?$|(?<=\])\([^)]*\)|`[^`]*`|\d{4}\.\d{5}|"  # headings, code, links, arXiv
    r"versions?\s\d[\d.]*(?: (?:to|and) \d+)?|\brank 0\b|exit code \d",
    re.MULTILINE | re.IGNORECASE,
)
REPLACED = (
    (r"(\d+) (to|and) (\d+)%", r"\1% \2 \3%"),  # 12 and 16%
    (r"−", "-"),
)


def _arrays(name):
    return np.load(ARTIFACTS / f"{name}.npz")


def _json(name):
    if name.endswith(".py"):
        return {}
    path = ROOT / name if "/" in name else ARTIFACTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _steps(name, arm):
    """Steps to 90% of a row of a table, mean over the seeds; a miss counts one step too many."""
    table = (ARTIFACTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    column = next(line for line in table if line.startswith("| arm |")).split(" | ")
    row = next(line for line in table if line.startswith(f"| {arm} |")).split(" | ")
    steps = row[column.index("steps to 90%, by seed")].split(", ")
    miss = _json(name)["config"]["base"]["steps"] + 1
    return sum(miss if step == "not reached" else int(step) for step in steps) / len(steps)


def _alignment():
    arrays = _arrays("alignment")
    restored = arrays["num_above_edge"][arrays["noise_multiplier"] == 0.6]
    return [len(_json("alignment")["layers"]), *np.rint(restored.mean(axis=1))]


def _noise_costs(result, optimizers=("Adam", "SGD")):
    return [
        _steps(result, f"DP-{name}") / _steps(result, f"noise-free {name} (NON-PRIVATE)")
        for name in optimizers
    ]


def _tuning(result, rate):
    """List a rate, and each arm's mean score over its tuning runs at that rate."""
    arms = [arm for arm in _json(result)["tuned"] if rate in arm["rates"]]
    return [rate, *(np.mean(arm["scores"][arm["rates"].index(rate)]) for arm in arms)]


def _final_score_ratio(name):
    """Steps of DP-Adam over noise-free Adam if a gain were that of the score of the last step."""
    result = load_result(ARTIFACTS, name, steps.Result)
    sign = 1 if result.higher_is_better else -1
    curves = sign * np.stack([result.of(arm).mean(axis=0) for arm in ("DP-Adam", "DP-SGD")])
    start = curves[:, 0].mean()
    target = sign * (start + 0.9 * (curves[:, -1].min() - start))
    private, clean = (
        protocol.steps_to(result.of(arm), target, higher_is_better=result.higher_is_better).mean()
        for arm in ("DP-Adam", "noise-free Adam (NON-PRIVATE)")
    )
    return private / clean


def _noise_cost():
    """Schemes times settings and stages, and those with a gain above or below the noisy sum's."""
    result = load_result(ARTIFACTS, "noise_cost", noise_cost.Result)
    factors = noise_cost_verdicts.gain_factors(result)  # (cases, stages, warm-ups, directions)
    logs = np.moveaxis(factors[..., [DIRECTIONS.index(name) for name in SCHEMES]], 2, 0)
    ends = [mean_and_interval(values) for values in logs.reshape(len(logs), -1).T]
    above, below = (sum(sign * mean > half for mean, half in ends) for sign in (1, -1))
    return [len(SCHEMES), len(ends), above, below]


def _projection_privacy():
    """Deltas of one vector, and the least exact delta and its rank, by width, at a small angle."""
    config, angle = _json("projection_privacy")["config"], 0.016
    ranks, widths = (np.array(config[name]) for name in ("rank_grid", "widths"))
    delta = np.asarray(theory.privacy_profile(1.0, ranks, widths[:, None], angle=angle))
    return [
        theory.privacy_profile(1.0, 4, 4096, angle=0.1),
        theory.gaussian_privacy_profile(1.0, 4, angle=0.1),
        *ranks[delta.argmin(axis=1)],
        *delta.min(axis=1),
    ]


def _comparisons(result):
    """Number of comparisons of larger models in which a restored gradient is nearer, and of all."""
    starts = _arrays(result)["cosine"].mean(axis=3)  # (cases, stages, starts, schemes, averages)
    gain = starts[..., 1, :] - starts[..., 0, :]
    _, p = stats.ttest_1samp(gain, 0, axis=2)
    return [((p < 0.05) & (gain.mean(axis=2) > 0)).sum(), p.size]


def _membership(name):
    """The training loss at which arms are compared, correlation of AUC and loss, mean members."""
    result = load_result(ARTIFACTS, name, membership.Result)
    plain = ["DP" not in arm for arm in result.arms]
    return [
        membership.matched_value(result, "train_loss"),
        np.corrcoef(result.train_loss[plain].ravel(), result.auc[plain].ravel())[0, 1],
        result.config.base.max_examples / 2,
    ]


def _vector_privacy():
    arrays, config = _arrays("vector_privacy"), _json("vector_privacy")["config"]
    theorem, exact = arrays["hu_epsilon"], arrays["exact_epsilon"]
    shown = (exact > 0) & np.isfinite(theorem)
    ratios = theorem[shown] / exact[shown]
    composed = arrays["composed"][config["composed_angles"].index(0.01)]
    return [
        arrays["angle"][:, -1].max(),
        *arrays["angle"][:, -1, 0],  # medians of the layers
        ratios.min(),
        np.rint(ratios.max()),
        composed[config["steps"].index(100)],
    ]


def _plan_check():
    result = load_result(ARTIFACTS, "plan_check", plan_check.Result)
    return np.abs(plan_check.errors(result)).mean(axis=(1, 2, 3)).ravel()


def _audit_bugs():
    """Bugs that change a sum, a sample, the noise or the release, and those that are seen."""
    bugs = [row for row in _json("audit_bugs")["rows"] if row["bug"] != "none: a correct run"]
    bugs = [row for row in bugs if not row["bug"].startswith("ledger")]
    return [len(bugs), sum(row["designs"]["sums"]["caught"] for row in bugs)]


def _scale():
    """What splitting the matrices costs, as a share of a step, and an error of the model."""
    result = _json("benchmarks/scale.json")
    shares = []
    for line in [*result["here"]["lines"], *result["assumed"]["lines"]]:
        step = line["clip"] + line["exchange"]
        whole, split = line["unsplit restore"], line["restore"] + line["hand out"]
        shares.append((split - whole) / (step + split))
    rows = {row["figure"]: row for row in result["rows"]}
    clip = rows["clip, 2 processes"]
    return [*shares, clip["measured"] / clip["model"]]


def _gpu():
    """Time of restoring over that of the clipped sum, on the GPU that was measured."""
    step = _json("benchmarks/gpu.json")["step"]["RoBERTa-base"]
    return [step["restore"] / step["float32"]]


def _estimates():
    """Parameters, minutes and GiB of the configurations for larger models."""
    estimate = runpy.run_path(str(ROOT / "benchmarks" / "estimate.py"))["estimate"]
    texts = [path.read_text(encoding="utf-8") for path in (ARTIFACTS / "configs").glob("*.json")]
    found = [estimate(TrainConfig.from_json(json.loads(text))) for text in texts]
    return [value for *values, memory in found for value in (*values, np.rint(memory))]


COMPUTED = {
    "alignment": _alignment,
    "steps_sst2": lambda: [*_noise_costs("steps_sst2"), *_tuning("steps_sst2", 0.00316)],
    "steps_sst2_all": lambda: _noise_costs("steps_sst2_all"),
    "steps_sst2_mpnet": lambda: [
        *_noise_costs("steps_sst2_mpnet"),
        *_tuning("steps_sst2_mpnet", 0.001),
    ],
    "steps_cola_mpnet": lambda: _noise_costs("steps_cola_mpnet"),
    "steps_dart": lambda: _noise_costs("steps_dart"),
    "steps_gemma": lambda: [
        *_noise_costs("steps_gemma", ("Adam",)),
        _final_score_ratio("steps_gemma"),
    ],
    "steps_smollm2": lambda: [
        *_noise_costs("steps_smollm2"),
        _final_score_ratio("steps_smollm2"),
        *_tuning("steps_smollm2", 0.001),
    ],
    "steps_mnli": lambda: [*_noise_costs("steps_mnli"), *_tuning("steps_mnli", 0.00316)],
    "steps_e2e": lambda: [*_noise_costs("steps_e2e"), *_tuning("steps_e2e", 0.00316)],
    "tasks_mpnet": lambda: _comparisons("tasks_mpnet"),
    "tasks_gemma": lambda: _comparisons("tasks_gemma"),
    "tasks_qwen": lambda: _comparisons("tasks_qwen"),
    "membership": lambda: _membership("membership"),
    "membership_e2e": lambda: _membership("membership_e2e"),
    "membership_gemma": lambda: _membership("membership_gemma"),
    "vector_privacy": _vector_privacy,
    "plan_check": _plan_check,
    "audit_bugs": _audit_bugs,
    "noise_cost": _noise_cost,
    "benchmarks/gpu.json": _gpu,
    "benchmarks/scale.json": _scale,
    "benchmarks/estimate.py": _estimates,
    "total_variation": lambda: [
        64 * theory.tv_exact(64, 10**6),
        theory.joint_tv(8, 768),
        theory.joint_tv(10**6, 2, reference="paper"),
    ],
    "projection_privacy": _projection_privacy,
}

# numbers that are not measured, by page: what they are, and the numbers
DEFINITIONS = {
    "README.md": {
        "version of Python": "3.11",
        "arguments of the code below": "768",
    },
    "docs/cite.md": {"years": "2012 2014 2017"},
    "docs/concepts/glossary.md": {
        "AUC of chance": "0.5",
        "year": "2007",
        "share of the gain at the target": "90%",
    },
    "docs/concepts/privacy.md": {
        "exponent of the default delta": "1.1",
        "number of points beyond which PLD is left out, and an example of it": "24 20 0.001 4e7",
    },
    "docs/concepts/threat-model.md": {
        "FALSE_ALARMS of train's checks": "5e-7",
        "bits of a seed": "63",
        "year": "2012",
    },
    "docs/faq.md": {
        "exponent of the default delta": "1.1",
        "number of units of an example": "120",
        "the default delta times N": "0.6 0.33",
        "size of SST-2": "67,349",
        "AUC of chance": "0.5",
        "a false-positive rate, and the records that it needs": "0.1% 1,000",
    },
    "docs/findings/lora-noise.md": {"kurtosis 3 + 6/r at a beta of 0, a formula": "3 6 0"},
    "docs/findings/restoration.md": {
        "evaluated examples of SST-2 and E2E, the examples of E2E, and their tables": (
            "872 998 62 4,672 113 7"
        ),
    },
    "docs/guide.md": {"parameters of MiniLM, in millions": "22.7"},
    "docs/how-to/audit.md": {
        "default sizes of the designs": "200",
        "number of a theorem": "5.2",
        "default of --confidence": "0.95",
        "power that the report names": "0.8",
        "an example of a line of the report": "1.002",
        "tolerances of contributions, relative to C": "0.02 0.2",
        "sizes of the test of 1,000 canaries": "20,000 600 16",
        "its number of guesses, and the bound if all are right": "250 4.2",
        "words of the model tiny": "768",
    },
    "docs/how-to/clusters.md": {"size of an assumed model, in billions": "3.6"},
    "docs/how-to/gpu.md": {"version of torch": "2.11", "rows, and tokens of a row": "256 64"},
    "docs/how-to/opacus.md": {"momentum of SGD": "0.9"},
    "docs/how-to/own-checkpoint.md": {
        "version of Llama": "3.1",
        "least size of --population": "100",
        "an example of --shadows": "16",
        "level of the guards": "99%",
        "least share of records with one score in the verdict NO EVIDENCE": "90%",
        "AUC of chance": "0.5",
        "rate of false positives in the report": "0.01 1%",
        "confidence of the bound in the report, and of each of two bounds": "95% 97.5%",
        "power of the verdict": "80%",
    },
    "docs/how-to/own-data.md": {
        "value of --holdout in the block above": "50",
        "most classes": "1,000",
        "exponent of the default delta": "1.1",
        "number of groups of an example, and its default delta": "120 0.005",
    },
    "docs/tutorial.md": {
        "half of --max-examples in the block above": "200",
        "AUC of chance": "0.5",
    },
    "paper_artifacts/README.md": {
        "simulated audits of tests/test_audit.py, and their nominal rate": "400 5%",
        "kurtosis 3 + 6/r, a formula": "6",
        "parameters of the larger models, in millions and billions": "110 270 0.5",
        "bits of the weights of their builds": "4",
    },
}


@functools.cache
def texts(name):
    """Numbers of a result as they are written, intervals whole: its table and its JSON."""
    result = _json(name)
    if isinstance(result, dict):
        result.pop("provenance", None)
    table = ARTIFACTS / f"{name}.md"
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    found = NUMBER.findall(f"{text} {json.dumps(result)}")
    return {value.replace(",", "") for value in found}


@functools.cache
def values(name):
    """Numbers of a result, without their signs."""
    plain = {part for text in texts(name) for part in re.findall(VALUE.replace(",", ""), text)}
    percent = {float(text[:-1]) / 100 for text in texts(name) if text.endswith("%")}
    computed = {abs(float(value)) for value in COMPUTED.get(name, list)()}
    return np.array(sorted({float(part) for part in plain} | percent | computed))


def is_source(name, number):
    """Whether ``number``, as a page writes it, stands in the result ``name``.

    An interval and a whole number must be equal, other numbers equal to their rounding.
    """
    number = number.replace(",", "")
    if not re.fullmatch(VALUE + "%?", number):
        return number in texts(name)
    shown = Decimal(number.removesuffix("%"))
    exponent = int(shown.as_tuple().exponent)
    scale = 100 if number.endswith("%") else 1
    rounding = 0.5 * 10.0**exponent if exponent < 0 or scale == 100 else 0
    return bool((np.abs(values(name) * scale - float(shown)) <= rounding * (1 + 1e-6)).any())


def named(text):
    """Results that a text names: by a link to the table or figure, or in backticks."""
    linked = re.findall(r"(?:paper_artifacts|figures)/([\w-]+)\.(?:md|json|png)", text)
    quoted = re.findall(r"`(\w+)`", text)
    found = {name for name in [*linked, *quoted] if (ARTIFACTS / f"{name}.json").exists()}
    return found | set(re.findall(r"benchmarks/\w+\.json|benchmarks/estimate\.py", text))


def blocks(text):
    """Pairs of a paragraph, list item or table row, and the section that it stands in."""
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        for block in re.split(r"\n\s*\n|\n(?=- |\|)", section):
            yield block, section


def definitions_of(page):
    """Numbers of a page (path in the repository) that are no measurements."""
    return {number for text in DEFINITIONS.get(page, {}).values() for number in text.split()}


def numbers(text):
    """Yield each number of a page that needs a source, its block, and the results named there."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!-- (?:map|verdicts):.*?<!-- end", "", text, flags=re.DOTALL)
    for block, section in blocks(text):
        sources = named(block) or named(section)
        prose = NOT_PROSE.sub("", block)
        for pattern, replacement in REPLACED:
            prose = re.sub(pattern, replacement, prose)
        for number in NUMBER.findall(prose):
            if sources or not re.fullmatch(r"\d,?", number):
                yield number.rstrip(","), " ".join(block.split()), sources


def unsourced(text, definitions=()):
    """Numbers of a page that have no source, each with its block."""
    return [
        (number, block)
        for number, block, sources in numbers(text)
        if number not in definitions and not any(is_source(name, number) for name in sources)
    ]


if __name__ == "__main__":
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for number, block in unsourced(page.read_text(encoding="utf-8"), definitions_of(name)):
            print(f"{name}: {number} has no source in: {block}")
