"""Introduce each known bug: a recording must fail, first at the tensor with the bug.

Bugs with another number or another function come from `refgemma.oracle.known_bugs`, and are introduced into refgemma's
own code. Written here are bugs that the catalogue cannot edit: connections, weights, and loss of digits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import refgemma.layers
import refgemma.model
import refgemma.ops
from refgemma.activations import ACTIVATIONS
from refgemma.cache import keep_last
from refgemma.goldens import verify as oracle
from refgemma.layers import Block, attention, feed_forward
from refgemma.ops import linear, rms_norm
from refgemma.oracle.known_bugs import angles_in_half, edit_model, frequencies, known_bug, tables_of
from refgemma.weights.parameters import Weights

pytestmark = pytest.mark.slow

CORRECT_MODEL_OF = oracle.model_of


@dataclass(frozen=True)
class Mistake:
    """A bug, and the tensor where it must show."""

    name: str
    make: Callable[[pytest.MonkeyPatch], None]
    first: str  # the tensor that must be named
    case: str = "bends-forward-f32"


def config(**change: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a bug in the numbers; a callable value gets the correct configuration."""

    def wrong_model_of(about: Any) -> Any:
        correct, weights = CORRECT_MODEL_OF(about)
        values = {key: value(correct) if callable(value) else value for key, value in change.items()}
        return replace(correct, **values), weights

    return lambda monkeypatch: monkeypatch.setattr(oracle, "model_of", wrong_model_of)


def weights(change: Callable[[Weights], Weights]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a bug in the loaded weights."""

    def wrong_model_of(about: Any) -> Any:
        correct, loaded = CORRECT_MODEL_OF(about)
        return correct, change(loaded)

    return lambda monkeypatch: monkeypatch.setattr(oracle, "model_of", wrong_model_of)


def without_bias(letter: str) -> Callable[[Weights], Weights]:
    bias = f"{letter}_proj_bias"
    return lambda loaded: replace(
        loaded,
        layers=[replace(layer, **{bias: np.zeros_like(getattr(layer, bias))}) for layer in loaded.layers],
    )


def operation(name: str, wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a bug in one operation, wherever it is used."""
    correct = getattr(refgemma.ops, name, None)

    def made(*args: Any, **named: Any) -> Any:
        with pytest.MonkeyPatch.context() as unmade:  # a known bug may be made of the correct operation
            if correct:
                unmade.setattr(refgemma.ops, name, correct)
            return wrong(*args, **named)

    def make(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (refgemma.ops, refgemma.layers, refgemma.model):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, made)
        for key, activation in ACTIVATIONS.items():
            if activation.__name__ == name:
                monkeypatch.setitem(ACTIVATIONS, key, made)

    return make


def known(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a bug of the catalogue; its numbers and functions take effect when a recording's model is loaded."""
    change = known_bug(name).change
    assert change is not None

    def make(monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong_model_of(about: Any) -> Any:
            wrong_config, loaded, functions = edit_model(change, *CORRECT_MODEL_OF(about))
            for operation_name, wrong in functions.items():
                operation(operation_name, wrong)(monkeypatch)
            return wrong_config, loaded

        monkeypatch.setattr(oracle, "model_of", wrong_model_of)

    return make


def angles_by_float32_exponential(positions, head_dim, theta):
    # A float32 power is an ulp off in many entries on some processors and on others exact; the exponent of this one
    # is rounded, on any.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return positions.astype(np.float32) * np.exp(-exponents * np.log(np.float32(theta)))


def angles_by_float64(positions, head_dim, theta):
    return positions * frequencies(head_dim, theta)


def block_without_post_norms(hidden, weights, *, activation, eps, **attending):
    input_layernorm = rms_norm(hidden, weights.input_layernorm, eps)
    attended = attention(input_layernorm, weights, **attending)
    middle = hidden + attended.out
    pre_feedforward_layernorm = rms_norm(middle, weights.pre_feedforward_layernorm, eps)
    fed = feed_forward(pre_feedforward_layernorm, weights, activation)
    return Block(
        input_layernorm, attended, attended.out, middle, pre_feedforward_layernorm, fed, fed.out, middle + fed.out
    )


def scores_that_lose_digits(q, k, scale):
    return (q @ k.swapaxes(-1, -2) * scale + np.float32(3000)) - np.float32(3000)


def norm_that_loses_digits(x, weight, eps):
    return (rms_norm(x, weight, eps) + np.float32(1000)) - np.float32(1000)


def feed_forward_swapped(x, weights, activation):
    return feed_forward(x, replace(weights, gate_proj=weights.up_proj, up_proj=weights.gate_proj), activation)


MISTAKES = [
    Mistake("no attention cap", known("attn-softcap-missing"), "layers.0.attention.capped"),
    Mistake("no final cap", known("final-softcap-missing"), "logits"),
    Mistake("another final cap", config(final_logit_softcapping=5.0), "logits"),
    Mistake("no window", known("swa-all-global"), "layers.0.attention.probs"),
    Mistake("window one too wide", known("swa-window-plus-one"), "layers.0.attention.probs"),
    Mistake("window one too narrow", known("swa-window-minus-one"), "layers.0.attention.probs"),
    Mistake("layer parity swapped", known("swa-layer-parity-swapped"), "layers.0.attention.probs"),
    Mistake("all layers sliding", known("swa-all-local"), "layers.1.attention.probs"),
    Mistake("norm without 1 +", known("norm-without-one"), "layers.0.input_layernorm"),
    Mistake("norm rounded before its weight", known("norm-cast-order-llama"), "layers.0.input_layernorm",
            "bends-forward-bf16"),
    Mistake("exact GELU", known("gelu-exact"), "layers.0.feed_forward.gelu"),
    Mistake("query scalar is head_dim", known("scale-head-dim"), "layers.0.attention.scores"),
    Mistake("sqrt(hidden) not rounded", operation("embedding_scale", lambda hidden, like: hidden**0.5), "embedded",
            "bends-forward-bf16"),
    Mistake("no embedding scale", operation("embedding_scale", lambda hidden, like: 1.0), "embedded"),
    Mistake("rotation of neighbours", known("rope-interleaved"), "layers.0.attention.q_rot"),
    Mistake("no rotation", known("rope-missing"), "layers.0.attention.q_rot"),
    Mistake("rotary base", known("rope-theta-1e6"), "cos"),
    Mistake("frequencies by a float32 exponential",
            operation("rotary_tables", tables_of(angles_by_float32_exponential)), "cos", "op-rotary-256-f32"),
    Mistake("angles in float64", operation("rotary_tables", tables_of(angles_by_float64)), "cos", "op-rotary-128-f32"),
    # On the recording of an operation, which has no model to load.
    Mistake("angles in bf16", operation("rotary_tables", tables_of(angles_in_half)), "cos", "op-rotary-128-bf16"),
    Mistake("key heads tiled", known("gqa-tile"), "layers.0.attention.scores"),
    Mistake("cap after mask", known("attn-softcap-after-mask"), "layers.0.attention.probs"),
    Mistake("query scaled before the product", known("q-prescale-order"), "layers.0.attention.scores",
            "bends-forward-bf16"),
    # In the layer only, where no single operation shows it: the layer on its recorded input does.
    Mistake("scores lose digits", lambda m: m.setattr(refgemma.layers, "attention_scores", scores_that_lose_digits),
            "layers.0.attention.scores"),
    Mistake("norm loses digits", lambda m: m.setattr(refgemma.layers, "rms_norm", norm_that_loses_digits),
            "layers.0.input_layernorm"),
    Mistake("no post-norms", operation("block", block_without_post_norms), "layers.0.post_attention_layernorm"),
    Mistake("gate and up swapped", operation("feed_forward", feed_forward_swapped), "layers.0.feed_forward.gate"),
    Mistake("another eps", known("norm-eps-1e-5"), "layers.0.input_layernorm", "global-first-forward-f32"),
    *(
        Mistake(f"no bias of {letter}", weights(without_bias(letter)), f"layers.0.attention.{tensor}",
                "untied-with-biases-forward-f32")
        for letter, tensor in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
    ),
    Mistake("an untied head taken for tied", weights(lambda loaded: replace(loaded, lm_head=loaded.embed_tokens)),
            "raw_logits", "untied-with-biases-forward-f32"),
    Mistake("head without the table's order", operation("unembed", lambda n, t: linear(n, t[:][::-1])), "raw_logits"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name.replace(" ", "-"))
def test_mistake_is_caught_where_it_is(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert oracle.verify(mistake.case).conforms  # the test would be worthless on a golden that fails anyway
    mistake.make(monkeypatch)
    result = oracle.verify(mistake.case)
    assert not result.conforms
    assert result.first_divergence is not None
    assert result.first_divergence.tensor == mistake.first


@pytest.mark.parametrize("lost", [1, 2])
def test_a_cache_that_drops_too_much_is_caught_in_decoding(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_next_past(layer, done, config):
        kept = config.sliding_window - 1 - lost
        return keep_last(done.attention.present, kept) if config.is_sliding(layer) else done.attention.present

    monkeypatch.setattr(refgemma.model, "next_past", wrong_next_past)
    result = oracle.verify("bends-decode-f32")
    assert result.first_divergence is not None
    # A window of 5 keeps 4 keys: the first call of 3 tokens and one step leave that many.
    assert result.first_divergence.tensor == f"calls.{3 - lost}.layers.0.attention.probs"


def test_positions_that_start_again_are_caught_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = refgemma.model.rotary_tables
    monkeypatch.setattr(refgemma.model, "rotary_tables", lambda p, *rest, **named: correct(p - p.min(), *rest, **named))
    result = oracle.verify("bends-decode-f32")
    assert result.first_divergence is not None
    assert result.first_divergence.tensor == "calls.1.cos"


def test_padding_that_is_attended_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = refgemma.model.layer_mask

    def unpadded(layer, past, inputs, config):
        return correct(layer, past, replace(inputs, visible=np.ones_like(inputs.visible)), config)

    monkeypatch.setattr(refgemma.model, "layer_mask", unpadded)
    result = oracle.verify("bends-left-padded-f32")
    assert result.first_divergence is not None
    assert result.first_divergence.tensor == "layers.0.attention.probs"
