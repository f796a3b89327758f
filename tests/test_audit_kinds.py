"""Audits of every kind of run: cached prefix, preconditioner, dropout, groups, DiSK, compiled."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lowrank_dp.artifacts.row_store import bytes_used
from lowrank_dp.audit import Design, audit, canaries, weights
from lowrank_dp.audit.auditing import audit_opened
from lowrank_dp.audit.canaries import Observer, open_audit, take_steps
from lowrank_dp.grads.clipping import row_gradients
from lowrank_dp.models.prefix import STATES
from lowrank_dp.models.scaled import scaled_layers
from lowrank_dp.train import preconditioning
from lowrank_dp.train import prefix as prefix_module
from lowrank_dp.train import step as step_module
from tests.planted_bugs import BUGS, CLIP, DRAW, NOISED, Replicated, without
from tests.tasks import case, film_reviews, save_bert, write_reviews

pytestmark = pytest.mark.usefixtures("one_thread")

GAMMA = 0.3 / 0.7  # look-ahead of DiSK at kappa = 0.7
SIZE, MOVED = "noise: standard deviation", "clipping: one canary moves"
AUTOGRAD, SCALES = "clipping: that is the canary's gradient", "preconditioner: scales"


def other_texts(rows):
    """Prefix each text, so that no text is one of the private task's."""
    return [row | {"sentence": f"they say: {row['sentence']}"} for row in rows]


def with_authors(rows):
    """Give each pair of rows one author."""
    return [row | {"author": f"author {row['idx'] // 2}"} for row in rows]


@pytest.fixture(scope="module")
def config(base):
    """A run of six steps on forty sentences, with noise that is easy to account for."""
    return replace(base, noise_multiplier=2.0, delta=1e-5, steps=6)


@pytest.fixture(scope="module")
def kinds(base, tmp_path_factory):
    """Changes of a configuration, by the name of the kind of run that they give."""
    folder = tmp_path_factory.mktemp("kinds")
    save_bert(  # large weights, so that a block's output depends on the row
        folder / "deep",
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=16,
        initializer_range=0.5,
    )
    write_reviews(folder / "public", other_texts)
    write_reviews(folder / "groups", with_authors)
    few = {"precondition_steps": 2, "precondition_rows": 20, "precondition_power": 0.25}
    cached = {
        "model": str(folder / "deep"),
        "train_layers": 1,
        "prefix_cache": str(folder / "cache"),
    }
    return {
        "prefix": cached,
        "prefix in bf16": {**cached, "prefix_dtype": "bf16"},
        "generated": {"precondition": "generated", **few},
        "a public task": {"precondition": str(folder / "public"), **few},
        "noisy": {  # little noise, so that the scales differ
            "precondition": "noisy",
            "precondition_every": 2,
            "precondition_power": 0.5,
            "noise_multiplier": 0.5,
        },
        "dropout": {"dropout": True},
        "groups": {"task": str(folder / "groups"), "unit": "group", "group_column": "author"},
        "DiSK": {"disk_kappa": 0.7, "optimizer": "sgd", "learning_rate": 0.5},
        "compiled": {"compile": True},
    }


# Bugs that need a kind of run -------------------------------------------------------------------


def stale_rows(patch):
    """Plant a bug: the cache finds a row by its number of tokens."""
    patch.setattr(
        prefix_module,
        "_key",
        lambda row: hashlib.sha256(f"{len(row['input_ids'])}".encode()).digest(),
    )


def scaled_after_the_clip(patch):
    """Plant a bug: rows are clipped by the norm without scales, and scaled afterwards."""

    def clip(model, batches, bound, **arguments):
        total, norms = {}, []
        scale = {
            f"{name}.weight": layer.row_scale[:, None] * layer.col_scale
            for name, layer in scaled_layers(model).items()
        }
        for batch in batches:
            for row in range(len(batch["labels"])):
                alone = {key: value[row : row + 1] for key, value in batch.items()}
                gradient, norm = CLIP(model, [alone], np.inf, **arguments)
                full = {name: g / scale.get(name, 1) for name, g in gradient.items()}
                size = float(torch.cat([g.flatten() for g in full.values()]).norm())
                for name, g in gradient.items():
                    total[name] = total.get(name, 0) + g * min(1.0, bound / size)
                norms.append(norm)
        return (total, torch.cat(norms)) if norms else CLIP(model, [], bound, **arguments)

    patch.setattr(step_module, "clipped_sum_over", clip)


def scales_from_clean_sums(patch):
    """Plant a bug: a noisy preconditioner reads the sums before the noise."""
    kept, refresh = {}, preconditioning.refresh

    def add_noise(self, clean, mechanism, generator):
        kept.update({name: total.clone() for name, total in clean.items()})
        return NOISED(self, clean, mechanism, generator)

    patch.setattr(Replicated, "add_noise", add_noise)
    patch.setattr(
        preconditioning,
        "refresh",
        lambda model, optimizer, moments, noisy, *rest: refresh(
            model, optimizer, moments, kept, *rest
        ),
    )


def clipped_to_3_with_dropout(patch):
    """Plant a bug: C is three times as large in training mode."""
    patch.setattr(
        step_module,
        "clipped_sum_over",
        lambda model, batches, bound, **arguments: CLIP(
            model, batches, bound * (3 if model.training else 1), **arguments
        ),
    )


def all_rows_of_a_group(patch):
    """Plant a bug: a sampled group takes part with all of its rows."""
    patch.setattr(
        step_module,
        "_draw",
        lambda unit_rows, mechanism, generator, one_each: DRAW(
            unit_rows, mechanism, generator, False
        ),
    )


# Tests ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_correct_runs_of_every_kind_are_consistent(config, kinds):
    """A line fails with probability at most 1e-3 per run; the seeds are fixed."""
    for kind, changes in kinds.items():
        with case(kind):
            if kind == "compiled":
                continue
            report = audit(replace(config, **changes), Design("sums", canaries=2), power=False)
            assert report.verdict == "CONSISTENT", report.contradictions
            assert report.objection == "" and report.lower_bound < report.epsilon
            scales = [line for line in report.lines if line.what.startswith(SCALES)]
            assert len(scales) == ("precondition" in changes)
            assert ("cached in" in report.description) == ("prefix" in kind)
            assert ("without dropout" in report.description) == ("dropout" in kind)


QUICK = ("generated: scales after the clip", "prefix: stale rows", "dropout: C tripled in training")
FAULTS = {
    "prefix: stale rows": (stale_rows, AUTOGRAD),
    "prefix in bf16: stale rows": (stale_rows, AUTOGRAD),
    "prefix: noise over sqrt 2": (BUGS["noise over sqrt 2"][0], SIZE),
    "generated: scales after the clip": (scaled_after_the_clip, AUTOGRAD),
    "a public task: scales after the clip": (scaled_after_the_clip, AUTOGRAD),
    "noisy: scales after the clip": (scaled_after_the_clip, AUTOGRAD),
    "noisy: scales from clean sums": (scales_from_clean_sums, SCALES),
    "noisy: noise over sqrt 2": (BUGS["noise over sqrt 2"][0], SIZE),
    "dropout: C tripled in training": (clipped_to_3_with_dropout, MOVED),
    "dropout: noise over sqrt 2": (BUGS["noise over sqrt 2"][0], SIZE),
    "dropout: clipped after summing": (BUGS["clipped after summing"][0], AUTOGRAD),
    "groups: all rows": (all_rows_of_a_group, "sample: no unit twice"),
    "DiSK: C doubled": (BUGS["C doubled"][0], MOVED),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.slow] * (f not in QUICK)) for f in FAULTS]
)
def test_faults_of_every_kind_contradict_the_claim(fault, config, kinds, monkeypatch):
    plant, line = FAULTS[fault]
    config = replace(config, **kinds[fault.split(":")[0]])
    if plant is stale_rows:  # in a folder without rows
        config = replace(config, prefix_cache=config.prefix_cache + " stale")
    plant(monkeypatch)
    report = audit(config, Design("sums", canaries=2), power=False)
    assert report.verdict == "CONTRADICTION"
    assert any(found.what.startswith(line) for found in report.lines if not found.passed)


@pytest.mark.slow
def test_compiled_runs_are_audited_as_compiled(config, kinds, monkeypatch, without_cpp):
    """One model is compiled once, and audited for a correct run and for a run with C tripled."""
    audited = open_audit(replace(config, **kinds["compiled"]), 1)
    backends, factor = [], 1

    def clip(model, batches, bound, *, backend, **options):
        backends.append(backend)
        return CLIP(model, batches, bound * factor, backend=backend, **options)

    monkeypatch.setattr(step_module, "clipped_sum_over", clip)
    for factor, verdict in ((1, "CONSISTENT"), (3, "CONTRADICTION")):  # noqa: B007
        report = audit_opened(audited, Design("sums", canaries=1), power=False)
        assert report.verdict == verdict, report.contradictions
    assert set(backends) == {"compiled"}


@pytest.mark.slow
def test_other_designs_take_every_kind(config, kinds):
    for kind, changes in kinds.items():
        if kind in ("compiled", "prefix in bf16", "a public task"):
            continue
        for design in (Design("weights", canaries=30), Design("runs", runs=8)):
            with case(kind, design.design):
                report = audit(replace(config, **changes, steps=2), design, power=False)
                assert report.verdict == "CONSISTENT"


def test_canaries_are_cached_with_outputs_of_their_own(config, kinds):
    """The cached outputs of canaries equal the hidden states that transformers computes."""
    config = replace(config, **kinds["prefix"])
    audited = open_audit(config, 3)
    (batch,) = audited.batches(audited.canaries)
    encoder = AutoModel.from_pretrained(config.model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = encoder(**inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(batch[STATES], expected)
    assert len({tuple(states.flatten().tolist()) for states in batch[STATES]}) == 3
    assert open_audit(replace(config, prefix_cache=""), 3).setup.prefix.training is None
    size = bytes_used(Path(config.prefix_cache))
    with pytest.raises(ValueError, match="prefix_cache must have room for 4 further rows"):
        open_audit(replace(config, prefix_gigabytes=size / 1e9, seed=1), 4)


def test_contributions_are_measured_where_the_step_takes_gradients(config, kinds):
    """DiSK takes gradients at the weights plus GAMMA times their last movement."""
    audited = open_audit(replace(config, **kinds["DiSK"]), 2)
    p = next(iter(audited.setup.trained.values()))
    ahead, at, before = [], [], [p.detach().clone()]

    class Look(Observer):
        def clipped(self, sums, norms, clip, step):
            ahead.append(p.detach().clone())

        def assigned(self, noisy, step):
            at.append(p.detach().clone())

    take_steps(audited, lambda setup, state: Look(), 0)
    assert len(ahead) == config.steps
    before += at
    for point, here, last in zip(ahead, at, before, strict=False):
        torch.testing.assert_close(point, here + GAMMA * (here - last))
    assert not torch.equal(ahead[-1], at[-1])


def test_scores_of_canaries_are_taken_at_the_point_of_the_gradients(config, kinds):
    """With DiSK, scores are inner products of filtered releases and gradients by autograd."""
    audited = open_audit(replace(config, **kinds["DiSK"], steps=3), 20)
    model, trained = audited.setup.model, audited.setup.trained
    expected, gradients = np.zeros(20), []

    class Both(weights.ProjectionObserver):
        def clipped(self, sums, norms, clip, step):
            super().clipped(sums, norms, clip, step)
            (batch,) = audited.batches(audited.canaries)
            gradients[:] = row_gradients(model, batch)

        def assigned(self, noisy, step):
            super().assigned(noisy, step)
            for i, gradient in enumerate(gradients):
                size = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
                along = sum(float((g * trained[n].grad).sum()) for n, g in gradient.items())
                expected[i] += along * config.batch_size / max(size, audited.max_grad_norm)

    observer = Both(audited)

    def observer_of(setup, state):
        observer.look_ahead = state.look_ahead
        return observer

    take_steps(audited, observer_of, 0)
    np.testing.assert_allclose(observer.scores, expected, rtol=2e-2, atol=2e-2)


def test_runs_begin_with_the_same_scales_and_dropout(config, kinds):
    """A second run with number 0 makes the same releases as the first, to the bit."""
    for kind in ("noisy", "dropout"):
        audited, released = open_audit(replace(config, **kinds[kind]), 2), []

        class Look(Observer):
            def noised(self, clean, noisy, noise, step):
                released.append(torch.cat([t.flatten() for t in noisy.values()]))  # noqa: B023

        for seed in range(2):  # of the caller's own random numbers
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            take_steps(audited, lambda setup, state: Look(), 0)
            assert torch.equal(torch.get_rng_state(), state)
        steps = config.steps
        for first, second in zip(released[:steps], released[steps:], strict=True):
            assert torch.equal(first, second), kind


def test_masks_of_a_canary_are_those_of_autograd(config, kinds):
    """The comparison passes, and other dropout masks change the gradient by over 5% of its norm."""
    config = replace(config, **kinds["dropout"], steps=1)
    audited = open_audit(config, 1)
    report = audit_opened(audited, Design("sums", canaries=1), power=False)
    (line,) = (line for line in report.lines if line.what.startswith(AUTOGRAD))
    assert line.passed, line
    audited.setup.model.train()
    batch = audited.batches(audited.canaries)[0]
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (gradient,) = row_gradients(audited.setup.model, batch)
        found.append(torch.cat([g.flatten() for g in gradient.values()]))
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


def test_runs_of_several_processes_are_refused_with_a_way_out(config, monkeypatch):
    with pytest.raises(ValueError, match=r"shard must be False .* in one process"):
        canaries.open_audit(replace(config, shard=True), 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"not by torchrun .* audit the same configuration in one"):
        canaries.open_audit(config, 2)


def save_wide_bert(folder, words):
    """Save a BERT of one layer with 20,000 tokens: ``words`` and fillers."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)]
    vocabulary += [f"w{i}" for i in range(20_000 - len(vocabulary))]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, "[UNK]"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokens.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                initializer_range=0.1,
                num_labels=2,
            )
        ).save_pretrained(folder)


@pytest.mark.slow
def test_one_run_with_a_thousand_canaries_sees_an_embedding_without_noise(
    config, tmp_path, monkeypatch
):
    """The losses under the final weights alone contradict a claimed epsilon of 2.

    If all 250 guesses are right, the bound is 4.2.
    """
    rows = film_reviews(600)
    save_wide_bert(tmp_path / "model", {w for row in rows for w in row["sentence"].split()})
    write_reviews(tmp_path / "data", train=600)
    config = replace(
        config,
        model=str(tmp_path / "model"),
        task=str(tmp_path / "data"),
        train_embeddings=True,
        steps=16,
        batch_size=580,
        noise_multiplier=None,
        epsilon=2.0,
        delta=1e-6,
        learning_rate=2e-3,
        micro_batch_size=256,
    )
    without(lambda name: name.endswith("word_embeddings.weight"))(monkeypatch)
    report = audit(config, Design("weights", canaries=1000), power=False)
    assert report.epsilon == 2 and report.verdict == "CONTRADICTION"
    assert report.bounds[0].method.startswith("loss") and report.bounds[0].epsilon > 2
