"""Solve each exercise of `refgemma.teach.exercises`. Checked with the exercises' own checks.

They are written for reading, and use only NumPy if that is the point of the exercise. The arguments (`x`, `ids`, `cos`,
`sin`, `scores`, `cap`, `q_places`, `k_places`, `weight`, `eps`, `probabilities`, `characters`, `ranks`,
`ours`, `recorded`, `model`, `q`, `k`, `q_weight`, `k_weight`, `scalar`, `probs`, `period`, `grad`, `gradients`,
`counts`) are those of the notebooks.
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.precision import Array, narrow, wide


def embed(ids: Array, table: Array) -> Array:
    """Multiply rows of the table by sqrt(hidden), rounded to the table's precision."""
    rows: Array = table[ids]
    return rows * narrow(math.sqrt(table.shape[-1]), like=table)


def embed_bf16(ids: Array, table: Array) -> Array:
    """Round the factor to the precision of the table, then multiply."""
    factor = narrow(math.sqrt(table.shape[-1]), like=table)
    rows: Array = table[ids] * factor
    return rows


def gelu_tanh(x: Array) -> Array:
    """Compute the tanh form of GELU."""
    bent: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return bent


def repeat_kv(x: Array, groups: int) -> Array:
    """Repeat each key head `groups` times; copies are adjacent."""
    return np.repeat(x, groups, axis=1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs of numbers that are half a head apart."""
    half = x.shape[-1] // 2
    turned: Array = x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin
    return turned


def soft_cap(x: Array, cap: float) -> Array:
    """Limit smoothly to the range from ``-cap`` to `cap`."""
    bent: Array = cap * np.tanh(x / cap)
    return bent


def attention_probs(scores: Array, mask: Array, cap: float) -> Array:
    """Apply cap, mask and softmax, in this order."""
    masked = np.where(mask, soft_cap(scores, cap), -np.inf)
    exponentials = np.exp(masked - masked.max(axis=-1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def sliding_mask(q_places: Array, k_places: Array, window: int) -> Array:
    """Return true for the last `window` keys, including the query's own."""
    distance = q_places[:, None] - k_places
    seen: Array = (distance >= 0) & (distance < window)
    return seen


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Compute in float32, and round once at the end."""
    x_wide = wide(x)
    normed = x_wide / np.sqrt(np.mean(x_wide**2, axis=-1, keepdims=True) + eps)
    return narrow(normed * (1 + wide(weight)), like=x)


def qk_norm_scores(q: Array, k: Array, q_weight: Array, k_weight: Array, scalar: float) -> Array:
    """Multiply normed queries by normed keys, and divide by the root of `scalar`."""
    q, k = rms_norm(q, q_weight, 1e-6), rms_norm(k, k_weight, 1e-6)
    scores: Array = q @ k.swapaxes(-1, -2) / math.sqrt(scalar)
    return scores


def induction_scores(probs: Array, period: int) -> Array:
    """Average each head's attention on the token after the earlier occurrence."""
    queries = np.arange(period + 1, 2 * period + 1)
    return np.asarray(probs[:, queries, queries - period + 1].mean(axis=-1))


def round_to_bf16(x: Array) -> Array:
    """Round float32 to eight bits of precision, ties to even, by integer arithmetic on the bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1  # the last bit to keep
    rounded = (bits + 0x7FFF + odd) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def keep_top_p(probabilities: Array, p: float) -> Array:
    """Keep the most likely tokens, up to and including the token that reaches `p`."""
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(probabilities), bool)
    kept[order[before < p]] = True
    return kept


def encode_word(characters: list[str], ranks: Mapping[str, int]) -> list[str]:
    """Join the pair with the lowest rank until no pair forms a piece."""
    pieces = list(characters)
    while True:
        joined = [a + b for a, b in pairwise(pieces)]
        known = [piece for piece in joined if piece in ranks]
        if not known:
            return pieces
        place = joined.index(min(known, key=lambda piece: ranks[piece]))
        pieces[place : place + 2] = [joined[place]]


def soft_cap_backward(grad: Array, x: Array, cap: float) -> Array:
    """Multiply the gradient by the slope of the cap."""
    slope: Array = 1 - np.tanh(x / cap) ** 2
    return grad * slope


def mean_gradient(gradients: Array, counts: Array) -> Array:
    """Weigh the gradient of each micro-batch by its share of the tokens."""
    shares: Array = counts / counts.sum()
    return shares @ gradients


def rms_norm_backward(grad: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """Remove the part of the gradient along x; sum the weight's gradient over all tokens."""
    r = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    n = x * r
    h = grad * (1 + weight)
    grad_x = r * (h - n * np.mean(h * n, axis=-1, keepdims=True))
    return grad_x, (grad * n).sum(axis=(0, 1))


def parameters(config: Gemma2Config) -> int:
    """Count the numbers of embedding, attention, feed-forward and norms."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = hidden * config.head_dim * heads
    block = attention + 3 * hidden * config.intermediate_size + 4 * hidden
    return config.vocab_size * hidden + layers * block + hidden


def first_divergence(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str | None:
    """Return the first tensor, in the order of computation, whose relative error exceeds rounding."""
    for name, right in recorded.items():
        error = np.sqrt(np.mean((ours[name] - right) ** 2))
        if error > 1e-5 * np.sqrt(np.mean(right**2)):
            return name
    return None


def causality_test(model: Callable[[list[int]], Any]) -> None:
    """Change each token except the first; no earlier logit may change."""
    ids = [2, 300, 400, 500, 600, 700, 800, 900]
    before = model(ids)
    for place in range(1, len(ids)):
        after = model([*ids[:place], 1000, *ids[place + 1 :]])
        same = np.allclose(before[:place], after[:place], atol=1e-4)
        assert same, f"token {place} changes an answer before it"
