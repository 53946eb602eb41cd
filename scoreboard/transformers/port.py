"""Transformers' Gemma 2 with a given attention: the outputs of its modules, and the logits."""

import inspect

import torch
import transformers
from glue import Watch, main


def load(folder, dtype, attention):
    named = {"torch_dtype" if transformers.__version__ < "4.56" else "dtype": getattr(torch, dtype)}
    if attention != "default":
        named["attn_implementation"] = attention
    model = transformers.Gemma2ForCausalLM.from_pretrained(folder, **named).eval()
    model.watch = Watch(model)
    return model


@torch.no_grad()
def run(model, case):
    ids, mask = torch.from_numpy(case.ids), torch.from_numpy(case.mask)
    cache, found = None, {}
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model.watch.take("")
    for prefix, start, end in case.pieces():
        given = {name: cache} if cache is not None else {}
        result = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], use_cache=len(case.calls) > 1, **given)
        cache = getattr(result, name, None)
        found |= model.watch.take(prefix, logits=result.logits)
    return found


main(load, run, map="transformers", engine=f"transformers {transformers.__version__}, torch {torch.__version__}")
