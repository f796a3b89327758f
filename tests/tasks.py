"""Small models, data and commands that several test files use."""

import gzip
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import lowrank_dp

# environment of a process that a test starts: one thread, no hub, the package of this checkout
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(lowrank_dp.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}

needs_data = pytest.mark.skipif(
    not os.environ.get("LOWRANK_DP_DATA"),
    reason="LOWRANK_DP_DATA is not set: it names the folder of the public data sets",
)


@contextmanager
def case(*what):
    """Add ``what``, which names the current case of a loop, to the report of a failure."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"case: {', '.join(map(str, what))}")
        raise


class Stop(BaseException):
    """Stops a run. The class is no ``Exception``, which would be reported as a failed write."""


def seeded(seed=0):
    """Return a CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(seed)


def write_jsonl(path, rows):
    """Write one line per row (a string is written as it is), compressed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as out:
        out.writelines(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return path


def film_reviews(count):
    """Return ``count`` records with SST-2's columns; the last word determines the label."""
    return [
        {
            "idx": i,
            "sentence": f"the film number {i} is {('dull', 'fresh')[i % 2]} .",
            "label": i % 2,
        }
        for i in range(count)
    ]


def write_reviews(folder, change=lambda rows: rows, train=40, validation=12):
    """Write a task of film reviews; ``change`` may edit the training records."""
    write_jsonl(folder / "train.jsonl", change(film_reviews(train)))
    write_jsonl(folder / "validation.jsonl", film_reviews(validation))
    return folder


def save_bert(folder, **sizes):
    """Save a BERT with dropout at random weights, for texts of up to 64 tokens."""
    import transformers

    from lowrank_dp.models import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=768,
                num_attention_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
                num_labels=2,
                **sizes,
            )
        ).save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)


def run_command(capsys, app, *arguments):
    """Run a command line in this process; return exit code, stdout and stderr."""
    from lowrank_dp.commands import _console

    with pytest.raises(SystemExit) as stop:
        _console.run(app, [str(word) for word in arguments])
    return stop.value.code, *capsys.readouterr()


def run_main(capsys, *words):
    """Run ``lowrank-dp`` in this process; return exit code, stdout and stderr."""
    from lowrank_dp.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code, *capsys.readouterr()


def train_words(config, folder, *more):
    """Words of ``lowrank-dp`` that train ``config``: an option per field off its default."""
    from lowrank_dp.train import TrainConfig

    default = TrainConfig(non_private=True).as_json()
    words = ["train", "--output", str(folder), *more]
    for name, value in config.as_json().items():
        if value == default[name] or name == "non_private":
            continue
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        words += [option if item is True else f"{option}={item}" for item in values]
    return words
