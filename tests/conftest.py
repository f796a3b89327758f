"""What several test files share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import lowrank_dp
from lowrank_dp.models import load_tokenizer
from lowrank_dp.train import TrainConfig

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(lowrank_dp.__file__).parents[1]),
}


@pytest.fixture(scope="session")
def torchrun():
    """``torchrun(count, script, *arguments)``: what so many processes did, all of them well."""

    def run(count, *arguments):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(count),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=400,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def start():
    """``start(count, *arguments)`` of python: so many connected processes, which no agent stops."""

    def begin(count, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [
            subprocess.Popen(
                [sys.executable, *arguments],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={
                    **ENVIRONMENT,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "WORLD_SIZE": str(count),
                    "RANK": str(rank),
                },
            )
            for rank in range(count)
        ]

    return begin


@pytest.fixture(scope="module")
def one_thread():
    """Sums of a few numbers gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_waiting(monkeypatch):
    """A call of ``time.sleep`` fails: the hub's libraries wait between their attempts."""

    def sleep(seconds):
        raise AssertionError(f"a wait of {seconds} s")

    monkeypatch.setattr("time.sleep", sleep)


def save_bert(folder, **sizes):
    """A BERT with dropout at random weights, for texts of up to 64 tokens."""
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
    tokenizer = load_tokenizer("tiny")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory):
    """Folder of a BERT of two layers; to be read only."""
    folder = tmp_path_factory.mktemp("small_bert")
    save_bert(folder, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration that takes a moment: a BERT of one layer, forty sentences, two steps."""
    folder = tmp_path_factory.mktemp("places")
    save_bert(folder / "model", hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    (folder / "data").mkdir()
    for split, count in (("train", 40), ("validation", 12)):
        (folder / "data" / f"{split}.jsonl").write_text(
            "".join(
                json.dumps({"sentence": f"film {i} is {('dull', 'fresh')[i % 2]}", "label": i % 2})
                + "\n"
                for i in range(count)
            )
        )
    return TrainConfig(
        model=str(folder / "model"),
        task=str(folder / "data"),
        steps=2,
        batch_size=10,
        noise_multiplier=0.8,
        learning_rate=1e-3,
        seed=0,
    )
