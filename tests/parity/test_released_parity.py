"""The comparisons with published outputs, rehearsed: those that transformers gives for the tiny model stand in."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from test_released import NORM, distribution, problems
from transformers import Gemma2ForCausalLM

import refgemma
from refgemma.hub import find_model

PROMPT = "Once upon a time there was a"


def published_by_transformers(ids: list[int]) -> tuple[list[float], list[dict[str, Any]]]:
    """Norms of the residual stream, and a table of each layer through the next norm; the last is the model's own."""
    model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    streams: list[torch.Tensor] = []

    def keep(_: Any, inputs: tuple[torch.Tensor]) -> None:
        streams.append(inputs[0].reshape(-1, inputs[0].shape[-1])[-1])

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(keep)
    model.model.norm.register_forward_pre_hook(keep)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
        norms = [*(layer.input_layernorm for layer in model.model.layers), model.model.norm]
        before = list(streams)  # the next line calls the norms, and their hooks, again
        rows = [model.lm_head(norm(x)) for norm, x in zip(norms, before, strict=True)]
    tokenizer = refgemma.load("tiny").tokenizer
    tables = []
    for row in [*rows, logits]:
        p = torch.softmax(row.double(), -1)
        top = torch.topk(p, 10)
        words = [tokenizer.decode([int(n)]) for n in top.indices]
        entropy = -float((p * torch.log2(p)).sum())
        tables.append({"top": list(zip(words, top.values.tolist(), strict=True)), "entropy": entropy})
    return [float(x.norm()) for x in before], tables


def test_a_model_that_is_right_agrees_and_one_that_is_not_does_not() -> None:
    tiny = refgemma.load("tiny")
    ids = tiny.tokenizer.encode(PROMPT)
    norms, tables = published_by_transformers(ids)
    sizes, by_layer, own = distribution(ids, tiny)
    np.testing.assert_allclose(sizes, norms, rtol=NORM)
    for found, table in zip([*by_layer, own], tables, strict=True):
        assert not problems(found, table, tiny)
    wrong = replace(tiny, config=tiny.config.changed(query_pre_attn_scalar=20))
    sizes, by_layer, own = distribution(ids, wrong)
    assert problems(own, tables[-1], tiny)
    assert problems(by_layer[-1], tables[-2], tiny)
    assert not np.allclose(sizes, norms, rtol=NORM)
    uncapped = replace(tiny, config=tiny.config.changed(final_logit_softcapping=3.0))
    assert problems(distribution(ids, uncapped)[2], tables[-1], tiny)
