"""Test the comparisons with published outputs on transformers' outputs for the tiny model."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_released import NORM, apart, continue_greedily, distribution, likeliest, problems, relative_differences
from transformers import Gemma2ForCausalLM

import refgemma
from refgemma.goldens.released import read_released, releases
from refgemma.hub import find_model

PROMPT = "Once upon a time there was a"


def published_by_transformers(ids: list[int]) -> tuple[list[float], list[dict[str, Any]]]:
    """Return norms of the residual stream, and a table of each layer through the next norm; the last is the model's
    own."""
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


def test_the_likeliest_in_bfloat16_are_those_of_transformers_and_a_mistake_is_seen() -> None:
    tiny = refgemma.load("tiny", "bfloat16")
    ids = tiny.tokenizer.encode(PROMPT)
    model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
    top = torch.topk(p, 5)
    words = [tiny.tokenizer.decode([int(n)]).strip() for n in top.indices]
    theirs = list(zip(words, top.values.tolist(), strict=True))
    allowed = read_released("circuit-tracer-2b")["tolerance"]["probability"]
    assert not apart(likeliest(ids, tiny), theirs, allowed)
    wrong = replace(tiny, config=tiny.config.changed(final_logit_softcapping=3.0))
    assert apart(likeliest(ids, wrong), theirs, allowed)


def test_bfloat16_changes_as_much_here_as_in_transformers() -> None:
    narrow, wide = refgemma.load("tiny", "bfloat16"), refgemma.load("tiny")
    ids = wide.tokenizer.encode(PROMPT)
    streams = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            streams.append([x.double() for x in model(torch.tensor([ids]), output_hidden_states=True).hidden_states])
    ours = relative_differences(ids, narrow, wide)
    for n, (rounded, exact) in enumerate(zip(streams[0][:-1], streams[1][:-1], strict=True)):  # the last is normed
        theirs = float((rounded - exact).norm() / exact.norm())
        found = ours["embedded", None] if n == 0 else ours["out", n - 1]
        assert theirs / 3 <= found <= theirs * 3


def test_greedy_texts_are_those_of_transformers() -> None:
    tiny = refgemma.load("tiny")
    ids = tiny.tokenizer.encode(PROMPT)
    model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert continue_greedily(ids, tiny, 12) == theirs.tolist()


# --- the released tokenizer, where there is one -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode() -> Callable[..., list[int]]:
    """Return the encoding function of the tokenizers library, for the released tokenizer.json."""
    if not (name := os.environ.get("REFGEMMA_TOKENIZER_JSON")):
        pytest.skip("needs the released tokenizer: REFGEMMA_TOKENIZER_JSON does not say where its tokenizer.json lies")
    file = Path(name)
    pinned = releases()["google/gemma-2-2b"]["files"]["tokenizer.json"]["sha256"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == pinned, f"{file} is not the released one"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text, special=True: tokenizer.encode(text, add_special_tokens=special).ids


def test_published_ids_are_those_of_the_published_prompt(encode: Callable[..., list[int]]) -> None:
    recording = read_released("text-generation-inference-9b-it")
    assert encode(recording["prompt"]) == [token for token, _ in recording["prefill"]]
    whole = encode(recording["prompt"] + recording["continuation"])
    assert whole == [token for part in ("prefill", "decode") for token, _ in recording[part]]


def test_published_texts_have_the_hundred_tokens_that_were_asked_for(encode: Callable[..., list[int]]) -> None:
    recording = read_released("optimum-habana")
    prompt = encode(recording["prompt"])
    for case in recording["texts"]:
        ids = encode(case["text"])
        assert ids[: len(prompt)] == prompt
        assert len(ids) - len(prompt) == 100, case["device"]


def test_the_likeliest_words_are_one_token_each(encode: Callable[..., list[int]]) -> None:
    for case in read_released("circuit-tracer-2b")["prompts"]:
        blank = "" if case["prompt"].endswith(" ") else " "
        for word, _ in case["top"]:
            assert len(encode(blank + word, False)) == 1, (case["prompt"], word)


def test_the_compared_prompt_has_fourteen_tokens(encode: Callable[..., list[int]]) -> None:
    """interp-engine gives the token at which each point differs most: at most 13, counted from 0."""
    assert len(encode(read_released("interp-engine")["prompt"])) == 14
