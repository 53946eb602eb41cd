"""TransformerLens's bridge on transformers' Gemma 2: its hooks, and the logits."""

from importlib.metadata import version

import torch
import transformers
from glue import main
from transformer_lens.model_bridge import TransformerBridge


def load(folder, dtype):
    kind = getattr(torch, dtype)
    model = transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager").eval()
    return TransformerBridge.boot_transformers(str(folder), hf_model=model, dtype=kind)


@torch.no_grad()
def run(model, case):
    case.only()
    logits, cache = model.run_with_cache(torch.from_numpy(case.ids))
    return {n: x for n, x in cache.items() if torch.is_tensor(x) and x.is_floating_point()} | {"logits": logits}


main(load, run, map="transformer-lens", engine=f"transformer-lens {version('transformer-lens')}")
