"""Beside transformers in one process: random configurations, paddings and divisions into calls that nobody recorded."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma2ForCausalLM
from transformers import Gemma2Config as TorchConfig

import refgemma
from refgemma.cache import Cache
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.generation import keep_top_k, keep_top_p
from refgemma.heads import causal_lm_loss
from refgemma.hub import find_model
from refgemma.oracle.compare import logits_distance, rounding_noise, run_distance
from refgemma.precision import as_dtype, bf16
from refgemma.weights.parameters import EMBED_TOKENS, NORM, LayerWeights, Weights, layer_tensors, tensor_shapes

torch.set_num_threads(1)
for warm_up in (torch.cos, torch.sin, torch.tanh, torch.exp, torch.rsqrt):
    warm_up(torch.ones(1))  # MKL's first call can race (pytorch#188792)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(20, 90)),
        "hidden_size": kv_heads * group * draw(st.integers(3, 9)),
        "intermediate_size": draw(st.integers(3, 50)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 8)),
        "query_pre_attn_scalar": draw(st.integers(1, 40)),
        # Not 1: transformers' cache keeps all keys then (`keys[:, :, -1 + 1:]`), and its decoding is not its forward.
        "sliding_window": draw(st.integers(2, 9)),
        "attn_logit_softcapping": draw(st.sampled_from([None, 2.0, 50.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 3.0, 30.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "layer_types": draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers)),
    }


def random_tensors(shape: dict[str, Any], seed: int) -> dict[str, Any]:
    """Weights that are bf16 numbers, so that they are the same in every precision."""
    rng = np.random.default_rng(seed)
    spread = 1.2 / np.sqrt(shape["hidden_size"])
    sizes = tensor_shapes(Gemma2Config.from_dict(shape)).items()
    return {n: np.asarray(bf16(rng.standard_normal(s) * (0.3 if len(s) == 1 else spread))) for n, s in sizes}


def in_transformers(shape: dict[str, Any], tensors: dict[str, Any], dtype: str) -> Gemma2ForCausalLM:
    """Made in its precision: a cast afterwards would round the rotary frequencies."""
    config = TorchConfig(**shape)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    model.load_state_dict(state | {"lm_head.weight": state[EMBED_TOKENS]})
    return model


def here(tensors: dict[str, Any], config: Gemma2Config, dtype: str) -> Weights:
    ours = {name: as_dtype(x, dtype) for name, x in tensors.items()}
    layers = [
        LayerWeights(**{field: ours[name] for field, name in layer_tensors(layer).items()})
        for layer in range(config.num_hidden_layers)
    ]
    return Weights(ours[EMBED_TOKENS], layers, ours[NORM])


def logits_here(ids, mask, calls: list[int], weights: Weights, config: Gemma2Config):
    """All calls' logits, one after the other."""
    cache: Cache | None = None
    done, parts = 0, []
    for length in calls:
        end = done + length
        run = refgemma.forward(ids[:, done:end], weights, config, attention_mask=mask[:, :end], cache=cache)
        cache, done = run.cache, end
        parts.append(run.logits)
    return np.concatenate(parts, axis=1)


def logits_there(ids, mask, calls: list[int], model: Gemma2ForCausalLM):
    cache, done, parts = DynamicCache(config=model.config), 0, []
    for length in calls:
        end = done + length
        with torch.no_grad():
            ids_part, mask_part = torch.tensor(ids[:, done:end]), torch.tensor(mask[:, :end])
            parts.append(model(ids_part, attention_mask=mask_part, past_key_values=cache).logits.numpy())
        done = end
    return np.concatenate(parts, axis=1)


@settings(max_examples=60)
@given(
    shapes(), st.integers(0, 2**31), st.integers(1, 3), st.lists(st.integers(1, 8), min_size=1, max_size=4), st.data()
)
def test_logits_and_loss(shape: dict[str, Any], seed: int, batch: int, calls: list[int], data: st.DataObject) -> None:
    config, tensors = Gemma2Config.from_dict(shape), random_tensors(shape, seed)
    model, weights = in_transformers(shape, tensors, "float32"), here(tensors, config, "float32")
    total = sum(calls)
    ids = np.random.default_rng(seed).integers(0, shape["vocab_size"], (batch, total))
    mask = np.ones_like(ids)
    side = data.draw(st.sampled_from(["none", "left", "right"]))
    for row in range(batch):
        padding = data.draw(st.integers(0, total - 1)) if side != "none" else 0
        mask[row, : padding if side == "left" else 0] = 0
        mask[row, total - (padding if side == "right" else 0) :] = 0
    real = mask == 1
    theirs, ours = logits_there(ids, mask, calls, model)[real], logits_here(ids, mask, calls, weights, config)
    exact = logits_here(ids, mask, calls, here(tensors, config, "float64"), config)[real]
    # 5e-6 of the largest logit, as was asked for; a model of width 3 may be worse conditioned than that: then no more
    # than its own rounding explains.
    by_noise = run_distance(ours[real], theirs, rounding_noise(ours[real], theirs, exact))
    assert min(logits_distance(ours[real], theirs), by_noise) <= 1
    if len(calls) == 1 and mask[:, 1:].any():
        labels = np.where(real, ids, -100)
        with torch.no_grad():
            loss = model(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss.item()
        # A loss is a difference of logits of this size.
        assert abs(causal_lm_loss(ours, labels) - loss) <= 2 * np.abs(ours[real] - theirs).max() + 1e-6


@settings(max_examples=25)
@given(shapes(), st.integers(0, 2**31))
def test_bfloat16_runs_stay_within_their_rounding_noise(shape: dict[str, Any], seed: int) -> None:
    """Two correct bf16 runs differ by less than either does from float32, since most roundings are the same ones."""
    ids = np.random.default_rng(seed).integers(0, shape["vocab_size"], (2, 12))
    runs = {}
    config, tensors = Gemma2Config.from_dict(shape), random_tensors(shape, seed)
    for dtype in ("float32", "bfloat16"):
        with torch.no_grad():
            theirs = in_transformers(shape, tensors, dtype)(torch.tensor(ids)).logits.float().numpy()
        runs[dtype] = (np.asarray(refgemma.forward(ids, here(tensors, config, dtype), config).logits), theirs)
    ours, theirs = runs["bfloat16"]
    noise = theirs - runs["float32"][1]
    assert np.sqrt(np.mean((ours - theirs) ** 2)) <= np.sqrt(2 * np.mean(noise**2))


def test_greedy_text_of_the_tiny_model() -> None:
    tiny = refgemma.load("tiny")
    model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    for prompt in ("The king", "In the wood there lived", '"I am afraid," said'):
        ids = tiny.tokenizer.encode(prompt)
        made = model.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False)[0, len(ids) :].tolist()
        ours = list(refgemma.generate(ids, tiny.weights, tiny.config, 100, stop_ids=tiny.stop_ids))
        assert ours == made


@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(0.05, 1.0))
def test_top_k_and_top_p(seed: int, top_k: int, top_p: float) -> None:
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = (np.random.default_rng(seed).standard_normal(25) * 3).astype(np.float32)
    scores = torch.tensor(logits)[None]
    np.testing.assert_array_equal(keep_top_k(logits, top_k), TopKLogitsWarper(top_k)(None, scores.clone())[0].numpy())
    np.testing.assert_array_equal(keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(None, scores.clone())[0].numpy())


def test_the_cache_holds_what_transformers_cache_holds() -> None:
    shape = {
        "vocab_size": 31, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "query_pre_attn_scalar": 3, "sliding_window": 4,
    }  # fmt: skip
    config, tensors = Gemma2Config.from_dict(shape), random_tensors(shape, seed=0)
    model, weights = in_transformers(shape, tensors, "float32"), here(tensors, config, "float32")
    ids = np.random.default_rng(0).integers(0, 31, (1, 9))
    theirs = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor(ids), past_key_values=theirs)
    ours: Cache = refgemma.forward(ids, weights, config).cache
    for layer, expected in zip(ours, theirs.layers, strict=True):
        assert layer.keys.shape == tuple(expected.keys.shape)
        # Keys of about 1. Two evaluations, each a sum of 12 products and 3 roundings of the rotation: 30 roundings.
        np.testing.assert_allclose(layer.keys, expected.keys.numpy(), rtol=0, atol=30 * 2**-24)
        assert layer.stop == expected.get_seq_length()
