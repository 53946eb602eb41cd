"""Transformers' Gemma 2 with a given attention: the outputs of its modules, and the logits."""

import inspect

import torch
import transformers
from glue import NotRun, Watch, main

VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])
OLD = VERSION < (4, 56)
SCALED_LATER = VERSION < (5, 0)  # the embedding is multiplied by sqrt(hidden) outside of its module


def load(folder, dtype, attention):
    named = {"torch_dtype" if OLD else "dtype": getattr(torch, dtype)}
    if attention != "default":
        named["attn_implementation"] = attention
    try:
        model = transformers.Gemma2ForCausalLM.from_pretrained(folder, **named).eval()
    except ValueError as error:
        raise NotRun(str(error).partition(" yet.")[0]) from None  # since 5.0 it refuses sdpa
    model.watch = Watch(model)
    return model


def new_cache(model, length):
    """Return a cache as `generate` makes it; before 4.56 a call alone makes one that is too small."""
    if OLD:
        return transformers.cache_utils.HybridCache(model.config, 1, length, dtype=model.dtype, device="cpu")
    return None


@torch.no_grad()
def run(model, case):
    ids, mask = torch.from_numpy(case.ids), torch.from_numpy(case.mask)
    cache, found = new_cache(model, ids.shape[1]) if len(case.calls) > 1 else None, {}
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model.watch.take("")
    for prefix, start, end in case.pieces():
        given = {name: cache} if cache is not None else {}
        if OLD and cache is not None:
            given["cache_position"] = torch.arange(start, end)
        given |= {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        result = model(use_cache=len(case.calls) > 1, **given)
        cache = getattr(result, name, None)
        found |= model.watch.take(prefix, logits=result.logits)
    if SCALED_LATER:
        found = {n: x for n, x in found.items() if not n.endswith("model.embed_tokens")}
    return found


main(load, run, map="transformers", engine=f"transformers {transformers.__version__}, torch {torch.__version__}")
