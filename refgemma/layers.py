"""Compute a layer of Gemma 2: attention, feed-forward, block. Checked against transformers 5.23 `Gemma2DecoderLayer`
(eager) on recordings of every tensor named here.

Each function returns a record of all its results, in the order of computation. The records give the names of the trace:
``run.layers[3].attention.probs`` in Python is ``layers.3.attention.probs`` in a file. The comment beside each name is
its meaning in the reference of these names.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from refgemma.activations import Activation
from refgemma.cache import LayerCache, extend
from refgemma.ops import attention_scores, linear, repeat_kv, rms_norm, rotate, soft_cap, softmax
from refgemma.precision import Array, narrow
from refgemma.shapes import Bias, Heads, Hidden, Intermediate, KVHeads, Mask, Merged, RotaryTable, Scores
from refgemma.weights.parameters import LayerWeights


@dataclass(frozen=True)
class Attention:
    """Every step of `attention`."""

    q: Heads  # queries
    k: KVHeads  # keys
    v: KVHeads  # values
    q_rot: Heads  # queries, rotated by their positions
    k_rot: KVHeads  # keys, rotated by their positions
    scores: Scores  # scaled products of queries and keys
    capped: Scores  # scores after the cap, not yet masked
    probs: Scores  # weights of the visible values, from softmax; each row has the sum 1
    mixed: Merged  # values weighted by probs; heads are concatenated
    out: Hidden  # mixed values after the output projection
    present: LayerCache  # keys and values of the past and this call, for the next call; not traced


@dataclass(frozen=True)
class FeedForward:
    """Every step of `feed_forward`."""

    gate: Intermediate  # gate projection
    up: Intermediate  # up projection
    gelu: Intermediate  # GELU of gate (or another activation)
    product: Intermediate  # product of gelu and up
    out: Hidden  # product after the down projection


@dataclass(frozen=True)
class Block:
    """Every step of `block`. The norms have the names of their weights."""

    input_layernorm: Hidden  # norm of the residual stream; the input of attention
    attention: Attention
    post_attention_layernorm: Hidden  # norm of attention's result, before the sum
    middle: Hidden  # residual stream between attention and feed-forward
    pre_feedforward_layernorm: Hidden  # norm of middle; the input of feed-forward
    feed_forward: FeedForward
    post_feedforward_layernorm: Hidden  # norm of feed-forward's result, before the sum
    out: Hidden  # residual stream after the layer


def split_heads(x: Float[np.ndarray, "batch seq width"], head_dim: int) -> Array:
    """Reshape ``(batch, seq, heads * head_dim)`` to ``(batch, heads, seq, head_dim)``."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def merge_heads(x: Heads) -> Array:
    """Reshape ``(batch, heads, seq, head_dim)`` to ``(batch, seq, heads * head_dim)``."""
    swapped = x.swapaxes(1, 2)
    return swapped.reshape(*swapped.shape[:2], -1)


def attention(
    x: Hidden, weights: LayerWeights, *, past: LayerCache, cos: RotaryTable, sin: RotaryTable, mask: Mask,
    scale: float, cap: float | None, bias: Bias | None = None,
) -> Attention:  # fmt: skip
    """Mix the values of all visible tokens: ``softmax(mask(cap(scale * q k^T))) v``, projected to ``hidden``.

    Each operation rounds as documented in `refgemma.ops`; mixing the values rounds once. Source: transformers
    ``Gemma2Attention``.

    Parameters
    ----------
    x : (batch, seq, hidden)
        The residual stream after its norm.
    weights : LayerWeights
        Only the four projections and their biases are used.
    past : LayerCache
        Keys and values of the tokens before this call.
    cos, sin : (batch, 1, seq, head_dim)
        The result of `rotary_tables`.
    mask : (batch, 1 or heads, seq, keys)
        True where a query may see a key. The axis ``keys`` has the past, then this call.
    scale, cap : float
        ``query_pre_attn_scalar ** -0.5`` (not ``head_dim ** -0.5``) and the cap of the scores.
    bias : (batch, 1 or heads, seq, keys), optional
        A caller's own mask of numbers, added to the capped scores. Gemma 2 has none.
    """
    head_dim = cos.shape[-1]
    q = split_heads(linear(x, weights.q_proj, weights.q_proj_bias), head_dim)
    k = split_heads(linear(x, weights.k_proj, weights.k_proj_bias), head_dim)
    v = split_heads(linear(x, weights.v_proj, weights.v_proj_bias), head_dim)
    q_rot = rotate(q, cos, sin)
    k_rot = rotate(k, cos, sin)

    present = extend(past, k_rot, v)
    groups = q.shape[1] // k.shape[1]
    keys = repeat_kv(present.keys, groups)
    values = repeat_kv(present.values, groups)

    scores = attention_scores(q_rot, keys, scale)
    capped = soft_cap(scores, cap)
    probs = softmax(capped, mask) if bias is None else narrow(softmax(capped + bias, mask), like=capped)
    mixed = merge_heads(probs @ values)
    out = linear(mixed, weights.o_proj, weights.o_proj_bias)
    return Attention(
        q=q, k=k, v=v, q_rot=q_rot, k_rot=k_rot, scores=scores, capped=capped, probs=probs, mixed=mixed, out=out,
        present=present,
    )  # fmt: skip


def feed_forward(x: Hidden, weights: LayerWeights, activation: Activation) -> FeedForward:
    """Compute the gated feed-forward layer: ``down(gelu(gate(x)) * up(x))``; `activation` is `gelu_tanh` in Gemma 2.

    In half precision each operation rounds once. Source: transformers ``Gemma2MLP``; Shazeer 2020, arXiv:2002.05202.
    """
    gate = linear(x, weights.gate_proj)
    up = linear(x, weights.up_proj)
    gelu = activation(gate)
    product = gelu * up
    out = linear(product, weights.down_proj)
    return FeedForward(gate=gate, up=up, gelu=gelu, product=product, out=out)


def block(
    hidden: Hidden, weights: LayerWeights, *, past: LayerCache, cos: RotaryTable, sin: RotaryTable, mask: Mask,
    scale: float, cap: float | None, activation: Activation, eps: float, bias: Bias | None = None,
) -> Block:  # fmt: skip
    """Compute one layer: ``middle = hidden + norm(attention(norm(hidden)))``, ``out = middle +
    norm(mlp(norm(middle)))``.

    There are four norms, one before and one after each half. ``post_attention_layernorm`` follows attention, before the
    sum; in Llama the norm of this name feeds the feed-forward layer. For the arguments see `attention` and
    `feed_forward`; `eps` is for the norms. In half precision each sum rounds once. Source: transformers
    ``Gemma2DecoderLayer``.
    """
    input_layernorm = rms_norm(hidden, weights.input_layernorm, eps)
    attended = attention(
        input_layernorm, weights, past=past, cos=cos, sin=sin, mask=mask, scale=scale, cap=cap, bias=bias
    )
    post_attention_layernorm = rms_norm(attended.out, weights.post_attention_layernorm, eps)
    middle = hidden + post_attention_layernorm

    pre_feedforward_layernorm = rms_norm(middle, weights.pre_feedforward_layernorm, eps)
    fed = feed_forward(pre_feedforward_layernorm, weights, activation)
    post_feedforward_layernorm = rms_norm(fed.out, weights.post_feedforward_layernorm, eps)
    out = middle + post_feedforward_layernorm
    return Block(
        input_layernorm=input_layernorm, attention=attended, post_attention_layernorm=post_attention_layernorm,
        middle=middle, pre_feedforward_layernorm=pre_feedforward_layernorm, feed_forward=fed,
        post_feedforward_layernorm=post_feedforward_layernorm, out=out,
    )  # fmt: skip
