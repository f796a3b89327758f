"""The embedded backbones: a BERT and a Llama of two layers, pretrained here on generated text.

Nothing is stored on disk: pretraining takes seconds and, on one machine, gives the same weights
each time (one thread, its own seed), so that a checkpoint can name ``tiny`` as its base.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors

from lowrank_dp._terminal import progress
from lowrank_dp.data import generated
from lowrank_dp.data.batches import SEPARATOR, collate, encode
from lowrank_dp.data.examples import Example
from lowrank_dp.losses import IGNORE

NAMES = ("tiny", "tiny-llama")
CONTEXT = 256
_WIDTH, _LAYERS, _HEADS, _VOCABULARY = 64, 2, 4, 768
_TEXTS, _PEAK_RATE = 6000, 5e-3
_STEPS = {"tiny": 250, "tiny-llama": 350}
_BATCH = {"tiny": 32, "tiny-llama": 12}
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
_PAD, _CLS, _SEP, _MASK = range(4)
_MASKED = 0.15


def tokenizer(name: str) -> Any:
    """``[CLS] text [SEP]`` for ``tiny``; the bare text for the Llama, whose end is ``[SEP]``."""
    core = Tokenizer.from_str(_bpe())
    if name == "tiny":
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", _CLS), ("[SEP]", _SEP)],
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_max_length=CONTEXT,
        model_input_names=[i for i in inputs if name == "tiny" or i != "token_type_ids"],
    )


def model(name: str, auto: Any, head: dict[str, Any]) -> tuple[Any, list[str]]:
    """The pretrained backbone under the architecture that ``auto`` gives, and the weights of its
    head, which are drawn anew.
    """
    built = auto.from_config(_config(name, **head))
    prefix = built.base_model_prefix + "."
    weights = _pretrained(name)
    wanted = built.state_dict()
    # a causal LM takes everything, a classifier the backbone
    found = {key: value for key, value in weights.items() if key in wanted}
    lost = [
        key for key in wanted if key.startswith(prefix) and key not in found and "pooler" not in key
    ]
    if lost:
        raise RuntimeError(f"pretraining of {name} left out {lost[0]}")
    built.load_state_dict(found, strict=False)
    # masked LM trains no pooler; were it drawn with the head, an adapter would not fit its base
    generator = torch.Generator().manual_seed(0)
    for key, p in built.named_parameters():
        if "pooler" in key and p.ndim == 2:
            torch.nn.init.normal_(p, std=built.config.initializer_range, generator=generator)
    return built, [key for key in wanted if not key.startswith(prefix) and key not in found]


def _config(name: str, **head: Any) -> Any:
    shape = dict(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=CONTEXT,
        pad_token_id=_PAD,
        initializer_range=_WIDTH**-0.5,
        **head,
    )
    if name == "tiny":
        return transformers.BertConfig(
            **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    return transformers.LlamaConfig(
        **shape,
        num_key_value_heads=_HEADS // 2,
        bos_token_id=None,
        eos_token_id=_SEP,
        tie_word_embeddings=True,
    )


@functools.cache
def _corpus() -> list[str]:
    return generated.corpus(_TEXTS, seed=0)


@functools.cache
def _bpe() -> str:
    """A byte-level BPE, which can spell any text, trained on the public corpus."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        _corpus(),
        vocab_size=_VOCABULARY,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        show_progress=False,
    )
    return bpe._tokenizer.to_str()


@functools.cache
def _pretrained(name: str) -> dict[str, torch.Tensor]:
    """The weights after pretraining: masked LM for ``tiny``, causal LM for ``tiny-llama``."""
    rows = _rows(name)
    with _reproducibly():
        auto = (
            transformers.AutoModelForMaskedLM
            if name == "tiny"
            else transformers.AutoModelForCausalLM
        )
        learner = auto.from_config(_config(name)).train()
        optimizer = torch.optim.AdamW(learner.parameters(), lr=_PEAK_RATE)
        steps = _STEPS[name]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=steps)
        for step in progress(range(steps), f"pretraining {name}"):
            start = step * _BATCH[name] % (len(rows) - _BATCH[name])
            batch = collate(rows[start : start + _BATCH[name]], _PAD)
            learner(**(_masked(batch) if name == "tiny" else batch)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return {key: value.detach().clone() for key, value in learner.state_dict().items()}


def _rows(name: str) -> list[dict[str, Any]]:
    """What each learns from: sentences for ``tiny``, tables with their descriptions for the Llama,
    in the form they have in fine-tuning but with the loss on the table too.
    """
    parts = [text.partition(SEPARATOR) for text in _corpus()]
    if name == "tiny":
        sentences = [Example(text, text) for text, line, _ in parts if not line]
        return encode(sentences, tokenizer(name), kind="classification", with_target=False)
    tables = [Example(table, table, target=text) for table, line, text in parts if line]
    return [
        {"input_ids": row["input_ids"], "labels": row["input_ids"]}
        for row in encode(tables, tokenizer(name), kind="generation")
    ]


def _masked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A share of the words replaced by ``[MASK]``, and the loss on those alone.

    ``[CLS]`` is asked for one word of the text at random: it learns to sum the text up, which the
    head then reads.
    """
    ids = batch["input_ids"]
    words = ids >= len(_SPECIAL)
    chosen = (torch.rand(ids.shape) < _MASKED) & words
    labels = ids.masked_fill(~chosen, IGNORE)
    labels[:, :1] = ids.gather(1, torch.multinomial(words.float(), 1))
    return {**batch, "input_ids": ids.masked_fill(chosen, _MASK), "labels": labels}


@contextmanager
def _reproducibly() -> Iterator[None]:
    """One thread and a seed of its own; the caller's generator and threads stay as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would give other weights
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
