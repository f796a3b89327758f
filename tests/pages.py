"""What a page's commands need to run within seconds: small models, few steps, made-up files."""

import csv
from pathlib import Path

import torch

from tests.tasks import save_bert, write_jsonl

# values of options on a page, and those that replace them here
PACKAGED = {"minilm": "tiny", "sst2": "generated", "cola": "generated", "e2e": "generated-table"}
MOST = {"--batch-size": 48, "--steps": 2, "--max-length": 64}
# options that a command gets in addition
MORE = {"plan": ("--trial-steps", "6")}
# arguments of commands that are not run: files that no test can make within seconds
NOT_HERE = ("model-q4_k_m.gguf",)


def shrunk(command, words):
    """Words of a command, on packaged models and tasks, and with small sizes."""
    small = [PACKAGED.get(word, word) for word in words]
    for i, option in enumerate(small[:-1]):
        if option in MOST:
            small[i + 1] = str(min(int(small[i + 1]), MOST[option]))
    return [*small, *MORE.get(command, ())]


def opacus():
    """Names that the blocks on Opacus use: an optimizer, a noisy sum, public batches."""
    from opacus.optimizers import DPOptimizer

    weight = torch.nn.Parameter(torch.zeros(8, 6))
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(3)]
    return {
        "optimizer": DPOptimizer(
            torch.optim.SGD([weight], lr=1.0),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=8,
        ),
        "noisy_sum": torch.randn(8, 6),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "model": model,
        "public_batches": batches,
        "loss_of": lambda model, batch: torch.nn.functional.cross_entropy(
            model(batch[0]), batch[1]
        ),
    }


def own_checkpoint():
    """Write checkpoints of other programs, and their records, to the working directory."""
    import peft
    import transformers

    from lowrank_dp.data import load_task
    from lowrank_dp.models import load_tokenizer

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    for folder in ("my-checkpoint", "my-base"):
        save_bert(folder, **sizes)
    base = transformers.AutoModelForSequenceClassification.from_pretrained("my-base")
    adapter = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(base, adapter).save_pretrained("my-adapter")
    load_tokenizer("tiny").save_pretrained("my-adapter")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=768, num_attention_heads=2, max_position_embeddings=256, **sizes
        )
    ).save_pretrained("my-llm")
    load_tokenizer("tiny-llama").save_pretrained("my-llm")

    labels = [{"text": x.text, "label": x.label} for x in load_task("generated").train[:120]]
    targets = [
        {"prompt": x.text, "target": x.target} for x in load_task("generated-table").train[:120]
    ]
    for name, part in (("members", slice(60)), ("others", slice(60, 120))):
        write_jsonl(Path(f"{name}.jsonl"), targets[part])
        with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows(labels[part])
    return {}


def plan_and_measure():
    """Write the file of gradients that the page restores."""
    from safetensors.torch import save_file

    save_file({"layer.weight": torch.randn(12, 8)}, "noisy.safetensors")
    return {}
