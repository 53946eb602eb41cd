"""Operations, attention, feed-forward and blocks again, each fed its *recorded* input: so that what is wrong is found,
and what it did to the tensors after it is not held against them. Checked on the recordings of transformers 5.23."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refgemma import ops
from refgemma.cache import Cache
from refgemma.config import Gemma2Config
from refgemma.layers import attention, block, feed_forward, merge_heads, split_heads
from refgemma.model import embed, unembed
from refgemma.oracle import bounds
from refgemma.precision import Array
from refgemma.trace.names import named_tensors
from refgemma.weights.parameters import LayerWeights, Weights


@dataclass(frozen=True)
class Operation:
    """One tensor of the trace: how it is computed from earlier ones, and how far rounding may carry it."""

    name: str
    inputs: tuple[str, ...]
    compute: Callable[..., Array]
    bound: Callable[..., Array]


def _heads(
    function: Callable[..., Array], weight: Array, bias: Array | None, head_dim: int
) -> Callable[[Array], Array]:
    return lambda x: split_heads(function(x, weight, bias), head_dim)


def attention_operations(
    prefix: str, source: str, weights: LayerWeights, config: Gemma2Config, mask: Array
) -> list[Operation]:
    """The operations of one attention layer, in order; `mask` is what its queries may see."""
    head_dim, scale, cap = config.head_dim, config.attention_scale, config.attn_logit_softcapping
    groups = config.num_attention_heads // config.num_key_value_heads

    def scores(q_rot: Array, k_rot: Array) -> Array:
        return ops.attention_scores(q_rot, ops.repeat_kv(k_rot, groups), scale)

    def scores_bound(q_rot: Array, k_rot: Array) -> Array:
        return bounds.attention_scores(q_rot, ops.repeat_kv(k_rot, groups), scale)

    def mixed(probs: Array, v: Array) -> Array:
        return merge_heads(probs @ ops.repeat_kv(v, groups))

    def mixed_bound(probs: Array, v: Array) -> Array:
        return merge_heads(bounds.matmul(probs, ops.repeat_kv(v, groups)))

    p = prefix + "attention."
    return [
        *(
            Operation(
                p + letter,
                (source,),
                _heads(ops.linear, weight, bias, head_dim),
                _heads(bounds.linear, weight, bias, head_dim),
            )
            for letter, weight, bias in (
                ("q", weights.q_proj, weights.q_proj_bias),
                ("k", weights.k_proj, weights.k_proj_bias),
                ("v", weights.v_proj, weights.v_proj_bias),
            )
        ),
        Operation(p + "q_rot", (p + "q", "cos", "sin"), ops.rotate, bounds.rotate),
        Operation(p + "k_rot", (p + "k", "cos", "sin"), ops.rotate, bounds.rotate),
        Operation(p + "scores", (p + "q_rot", p + "k_rot"), scores, scores_bound),
        Operation(p + "capped", (p + "scores",), partial(ops.soft_cap, cap=cap), partial(bounds.soft_cap, cap=cap)),
        Operation(p + "probs", (p + "capped",), partial(ops.softmax, mask=mask), partial(bounds.softmax, mask=mask)),
        Operation(p + "mixed", (p + "probs", p + "v"), mixed, mixed_bound),
        _linear(p + "out", p + "mixed", weights.o_proj, weights.o_proj_bias),
    ]


def _linear(name: str, source: str, weight: Array, bias: Array | None = None) -> Operation:
    return Operation(
        name,
        (source,),
        partial(ops.linear, weight=weight, bias=bias),
        partial(bounds.linear, weight=weight, bias=bias),
    )


def _norm(name: str, source: str, weight: Array, eps: float) -> Operation:
    return Operation(
        name,
        (source,),
        partial(ops.rms_norm, weight=weight, eps=eps),
        partial(bounds.rms_norm, weight=weight, eps=eps),
    )


def _sum(name: str, left: str, right: str) -> Operation:
    return Operation(name, (left, right), np.add, bounds.add)


def block_operations(layer: int, weights: LayerWeights, config: Gemma2Config, mask: Array) -> list[Operation]:
    """The operations of block `layer`, in order."""
    p, eps = f"layers.{layer}.", config.rms_norm_eps
    source = f"layers.{layer - 1}.out" if layer else "embedded"
    f, is_gelu = p + "feed_forward.", config.hidden_activation == "gelu_pytorch_tanh"
    return [
        _norm(p + "input_layernorm", source, weights.input_layernorm, eps),
        *attention_operations(p, p + "input_layernorm", weights, config, mask),
        _norm(p + "post_attention_layernorm", p + "attention.out", weights.post_attention_layernorm, eps),
        _sum(p + "middle", source, p + "post_attention_layernorm"),
        _norm(p + "pre_feedforward_layernorm", p + "middle", weights.pre_feedforward_layernorm, eps),
        _linear(f + "gate", p + "pre_feedforward_layernorm", weights.gate_proj),
        _linear(f + "up", p + "pre_feedforward_layernorm", weights.up_proj),
        # Of another activation no bound is derived: it is judged as part of the layer only.
        *([Operation(f + "gelu", (f + "gate",), ops.gelu_tanh, bounds.gelu_tanh)] if is_gelu else []),
        Operation(f + "product", (f + "gelu", f + "up"), np.multiply, bounds.product),
        _linear(f + "out", f + "product", weights.down_proj),
        _norm(p + "post_feedforward_layernorm", f + "out", weights.post_feedforward_layernorm, eps),
        _sum(p + "out", p + "middle", p + "post_feedforward_layernorm"),
    ]


def model_operations(
    input_ids: Array, positions: Array, masks: list[Array], weights: Weights, config: Gemma2Config
) -> Iterator[Operation]:
    """All operations of one call without a cache, in order; `masks` has one mask a layer."""
    like = weights.norm
    cos, sin = ops.rotary_tables(positions, config.head_dim, config.rope_theta, like)
    table_bound = bounds.rotary_tables(positions[:, None, :, None] * np.ones(config.head_dim))
    yield Operation("cos", (), lambda: cos, lambda: table_bound)
    yield Operation("sin", (), lambda: sin, lambda: table_bound)
    rows: Any = weights.embed_tokens
    embedded = embed(input_ids, rows)
    yield Operation("embedded", (), lambda: embedded, lambda: bounds.U * np.abs(np.asarray(embedded, np.float64)))
    for layer, mask in enumerate(masks):
        yield from block_operations(layer, weights.layers[layer], config, mask)
    yield _norm("norm", f"layers.{len(masks) - 1}.out", weights.norm, config.rms_norm_eps)
    table = weights.head[:]
    yield Operation("raw_logits", ("norm",), lambda x: unembed(x, table), partial(bounds.linear, weight=table))
    cap = config.final_logit_softcapping
    yield Operation("logits", ("raw_logits",), partial(ops.soft_cap, cap=cap), partial(bounds.soft_cap, cap=cap))


def replay(recorded: Mapping[str, Array], operations: Iterator[Operation]) -> Iterator[tuple[str, Array, Array]]:
    """For every recorded tensor whose inputs are recorded too: its name, what we compute, and the float32 bound."""
    for operation in operations:
        if operation.name in recorded and all(name in recorded for name in operation.inputs):
            inputs = [recorded[name] for name in operation.inputs]
            yield operation.name, operation.compute(*inputs), operation.bound(*inputs)


def parts(
    recorded: Mapping[str, Array], nothing: Cache, masks: list[Array], weights: Weights, config: Gemma2Config
) -> Iterator[tuple[str, str, Array]]:
    """Attention, feed-forward and block of each layer on their recorded inputs: which, the tensor's name, the tensor.

    `nothing` is an empty cache; `masks` has one mask a layer.
    """
    if "cos" not in recorded:
        return
    cos, sin, scale, cap = recorded["cos"], recorded["sin"], config.attention_scale, config.attn_logit_softcapping
    eps = config.rms_norm_eps
    for layer, mask in enumerate(masks):
        p, layer_weights = f"layers.{layer}.", weights.layers[layer]
        source = f"layers.{layer - 1}.out" if layer else "embedded"
        if (x := recorded.get(p + "input_layernorm")) is not None:
            attended = attention(
                x, layer_weights, past=nothing[layer], cos=cos, sin=sin, mask=mask, scale=scale, cap=cap
            )
            yield from (("attention", name, y) for name, y in named_tensors(attended, p + "attention."))
        if (x := recorded.get(p + "pre_feedforward_layernorm")) is not None:
            fed = feed_forward(x, layer_weights, config.activation)
            yield from (("feed_forward", name, y) for name, y in named_tensors(fed, p + "feed_forward."))
        if (x := recorded.get(source)) is not None:
            whole = block(
                x, layer_weights, past=nothing[layer], cos=cos, sin=sin, mask=mask, scale=scale, cap=cap,
                activation=config.activation, eps=eps,
            )  # fmt: skip
            yield from (("block", name, y) for name, y in named_tensors(whole, p))
