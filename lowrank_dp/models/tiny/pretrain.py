"""Pretrain the embedded backbones on generated public text: ``python -m`` this module.

The script writes ``tiny.safetensors``, ``tiny-llama.safetensors`` and ``tokenizer.json`` into the
folder that its argument names, or else beside itself. It takes seconds. The last bits of the
weights depend on the machine: the files in the repository keep them, so that ``tiny`` is the same
model everywhere and a checkpoint can name ``tiny`` as its base.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer

from lowrank_dp._terminal import progress
from lowrank_dp.data import generated
from lowrank_dp.data.batches import collate
from lowrank_dp.data.encoding import SEPARATOR, encode
from lowrank_dp.data.examples import Example
from lowrank_dp.losses import IGNORE
from lowrank_dp.models.tiny.architecture import (
    MASK,
    NAMES,
    PAD,
    SPECIAL_TOKENS,
    VOCABULARY,
    config,
)
from lowrank_dp.models.tiny.loading import FOLDER, TOKENIZER, tokenizer, weights_file

_TEXTS, _PEAK_RATE = 6000, 5e-3
_STEPS = {"tiny": 250, "tiny-llama": 350}
_BATCH = {"tiny": 32, "tiny-llama": 12}
_MASKED = 0.15  # share of the words that masked language modelling hides


def main(folder: Path = FOLDER) -> None:
    """Write the tokenizer and both backbones' weights into ``folder``."""
    (folder / TOKENIZER).write_text(train_tokenizer())
    for name in NAMES:
        save_file(pretrain(name, folder), folder / weights_file(name))


@functools.cache
def _corpus() -> list[str]:
    return generated.corpus(_TEXTS, seed=0)


def train_tokenizer() -> str:
    """Train a byte-level BPE, which can spell any text, on the public corpus; return its JSON."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        _corpus(),
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    return bpe._tokenizer.to_str()


def pretrain(name: str, folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """Pretrain the backbone ``name`` and return its weights, without those of a head.

    ``tiny`` learns masked language modelling, ``tiny-llama`` next tokens. The tokenizer is read
    from ``folder``.
    """
    rows = _rows(name, tokenizer(name, folder))
    with _reproducibly():
        auto: Any = (
            transformers.AutoModelForMaskedLM
            if name == "tiny"
            else transformers.AutoModelForCausalLM
        )
        learner = auto.from_config(config(name), trust_remote_code=False).train()
        optimizer = torch.optim.AdamW(learner.parameters(), lr=_PEAK_RATE)
        steps = _STEPS[name]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps)
        for step in progress(range(steps), f"pretraining {name}"):
            start = step * _BATCH[name] % (len(rows) - _BATCH[name])
            batch = collate(rows[start : start + _BATCH[name]], PAD)
            learner(**(_masked(batch) if name == "tiny" else batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    prefix = f"{learner.base_model_prefix}."
    weights = {
        key: value.detach().clone()
        for key, value in learner.state_dict().items()
        if key.startswith(prefix)
    }
    return weights | (_pooler(learner.config, prefix) if name == "tiny" else {})


def _pooler(shape: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Draw the pooler of a BERT, which masked language modelling does not train.

    The pooler belongs to the backbone: if each run drew its own pooler with the head, an adapter
    would not fit its base.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(shape.hidden_size, shape.hidden_size)
    weight.normal_(std=shape.initializer_range, generator=generator)
    return {
        f"{prefix}pooler.dense.weight": weight,
        f"{prefix}pooler.dense.bias": torch.zeros(shape.hidden_size),
    }


def _rows(name: str, encoder: Any) -> list[dict[str, Any]]:
    """Encode the training texts of backbone ``name`` as token rows.

    ``tiny`` learns from sentences. ``tiny-llama`` learns from tables with their descriptions, in
    the form that they have in fine-tuning, but with the loss on the table too.
    """
    parts = [text.partition(SEPARATOR) for text in _corpus()]
    if name == "tiny":
        sentences = [Example(text, text) for text, line, _ in parts if not line]
        return encode(sentences, encoder, kind="classification", with_target=False)
    tables = [Example(table, table, target=text) for table, line, text in parts if line]
    return [
        {"input_ids": row["input_ids"], "labels": row["input_ids"]}
        for row in encode(tables, encoder, kind="generation")
    ]


def _masked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace a share of the words by ``[MASK]``, and put the loss on those words alone.

    At ``[CLS]`` the label is one word of the text, drawn at random. ``[CLS]`` so learns to
    summarise the text, and a classifier's head reads the summary.
    """
    ids = batch["input_ids"]
    words = ids >= len(SPECIAL_TOKENS)
    chosen = (torch.rand(ids.shape) < _MASKED) & words
    labels = ids.masked_fill(~chosen, IGNORE)
    labels[:, :1] = ids.gather(1, torch.multinomial(words.float(), 1))
    return {**batch, "input_ids": ids.masked_fill(chosen, MASK), "labels": labels}


@contextmanager
def _reproducibly() -> Iterator[None]:
    """Run a block in one thread from a fixed seed, and restore threads and generator afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads sum in another order, which gives other weights
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
