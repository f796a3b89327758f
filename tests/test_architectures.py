"""A table of transformers' architectures: each is right, or refused with one line."""

import collections

import pytest
import torch
from architectures import batch_of, build

from lowrank_dp.grads import clipped_sum

pytestmark = pytest.mark.slow
TYPES = {
    "sequence": """albert bert big_bird bloom camembert canine convbert ctrl data2vec-text deberta
        deberta-v2 distilbert electra ernie esm eurobert exaone4 falcon flaubert fnet funnel gemma
        glm4 gpt2 gpt_bigcode gpt_neox gptj helium ibert layoutlm mobilebert modernbert mpnet mpt
        nystromformer olmo2 openai-gpt opt persimmon phi3 rembert roberta roformer squeezebert tapas
        xlm xlm-roberta-xl xlnet yoso""",
    "causal": """arcee biogpt gemma2 gpt2 gptj granite lfm2 llama mamba mistral mixtral nemotron
        olmo phi qwen2 qwen3 smollm3 starcoder2 stablelm xglm modernbert-decoder rwkv""",
}


def alone(model, batch, bound):
    """The definition: each row's gradient by itself and without padding, clipped, added up."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained.items()}
    norms = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        one = {name: value[row:row + 1] for name, value in batch.items()}
        one = {name: value[:, :length] if value.ndim == 2 else value for name, value in one.items()}
        gradient = torch.autograd.grad(model(**one).loss, [*trained.values()], allow_unused=True)
        norm = torch.stack([g.double().norm() for g in gradient if g is not None]).norm()
        norms.append(norm)
        for name, g in zip(trained, gradient, strict=True):
            if g is not None:
                total[name] += g.double() * min(1.0, bound / float(norm))
    return total, torch.stack(norms)


def outcome(model, batch):
    """``"right"``, or the line of a refusal; anything else that happens."""
    try:
        sums, norms = clipped_sum(model, batch, 0.1)
    except ValueError as error:
        line = str(error)
        return "refused" if line and "\n" not in line else f"not one line: {line}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    total, true = alone(model, batch, 0.1)
    whole = torch.stack([t.norm() for t in total.values()]).norm()
    off = max(float((sums[name] - total[name]).norm() / torch.maximum(t.norm(), 1e-2 * whole))
              for name, t in total.items())
    off = max(off, float(((norms - true) / true).abs().max()))
    return "right" if off < 1e-5 else f"wrong by {off:.1e}"


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_right_or_refused():
    table = {}
    for kind, names in TYPES.items():
        for name in names.split():
            for method in ("full", "lora"):
                try:
                    model = build(name, kind, method)
                except ValueError:
                    table[name, kind, method, "not built"] = "refused"  # no layer to adapt or train
                    continue
                for padded in (True, False):
                    way = "padded" if padded else "unpadded"
                    table[name, kind, method, way] = outcome(model, batch_of(kind, padded))
    for case, found in table.items():
        print(*case, found)
    counts = collections.Counter(found for found in table.values())
    print(len({case[:2] for case in table}), "architectures:", dict(counts))
    wrong = {case: found for case, found in table.items() if found not in ("right", "refused")}
    assert not wrong
    assert counts["right"] > 2 * counts["refused"]
    assert table["fnet", "sequence", "full", "padded"] == "refused"
    assert table["fnet", "sequence", "full", "unpadded"] == "right"
