"""The embedded backbones ``tiny`` and ``tiny-llama``: a BERT and a Llama of two layers.

Their weights and their tokenizer lie in this folder. ``python -m lowrank_dp.models.tiny.pretrain``
makes the files anew, from generated public text.

    architecture  configurations     loading  from this folder     pretrain  the script
"""

from lowrank_dp.models.tiny.architecture import CONTEXT, NAMES
from lowrank_dp.models.tiny.loading import model, tokenizer

__all__ = ["CONTEXT", "NAMES", "model", "tokenizer"]
