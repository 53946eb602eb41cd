"""Describe the backward pass as a table of named operations.

Each operation computes the gradient of an activation or a weight from recorded gradients and activations. Checked
against `refgemma.backward`: the table has the same names and gives the same numbers.

The tolerances are derived for PyTorch's eager kernels, as in `refgemma.oracle.tolerance`. In half precision they
include the rounding of results that autograd stores between two named gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from refgemma import backward as back
from refgemma.heads import IGNORED, log_softmax
from refgemma.layers import merge_heads, split_heads
from refgemma.ops import repeat_kv
from refgemma.oracle import tolerance as tol
from refgemma.oracle.operations import Context, Operation, head_pieces
from refgemma.oracle.tolerance import EVEN, LIBRARY, Tolerance, U, gamma, ulp
from refgemma.precision import Array, as_float64
from refgemma.trace.names import GRADS as PREFIX
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD, NORM, layer_tensors

# --- tolerances -------------------------------------------------------------------------------------------------------


def add(parts: Sequence[Tolerance], total: Array) -> Tolerance:
    """Return the tolerance of a sum of results; each addition rounds once."""
    spread = np.sqrt(sum(part.spread**2 for part in parts) + (EVEN * len(parts) * U * total) ** 2)
    return tol.tolerance(sum((part.bound for part in parts), len(parts) * U * total), spread)


def loss_tolerance(logits: Array, labels: Array, num_items: float | None) -> Tolerance:
    """Return the tolerance of ``(softmax - one_hot) / n``.

    A log probability is the distance from the largest logit minus the logarithm of a sum. Its absolute error is the
    relative error of the softmax. The exponential, the difference and the quotient add their own errors.
    """
    x64 = as_float64(logits)
    logprobs = log_softmax(x64)
    top = np.max(x64, axis=-1, keepdims=True)
    own = U * (2 * np.abs(logprobs) + 2 * (top - x64)) + 2 * LIBRARY + gamma(x64.shape[-1] + 1) + U * np.abs(top)
    share, answers = np.exp(logprobs), shift(labels)
    counted = answers != IGNORED
    items = max(1.0, counted.sum()) if num_items is None else num_items
    sizes = share + (np.arange(x64.shape[-1]) == answers[..., None])
    return tol.tolerance(counted[..., None] * (share * own + 3 * U * sizes) / items, common=4 * U)


def norm_tolerance(grad: Array, x: Array, weight: Array, eps: float) -> Tolerance:
    """Return the tolerance of the gradient of a norm's input, ``r (h - n mean(h n))``.

    The root ``r`` has the relative error of `tolerance.rms_norm`, and PyTorch uses its third power. The mean has n
    terms.
    """
    size, x64 = x.shape[-1], as_float64(x)
    inverse = 1 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)
    normed, wide = np.abs(x64) * inverse, np.abs(grad) * (np.abs(1 + as_float64(weight)) + 1)
    relative = gamma(size + 2) / 2 + LIBRARY
    mean = np.mean(wide * normed, axis=-1, keepdims=True)
    return tol.tolerance(inverse * (wide * (relative + 4 * U) + normed * mean * (4 * relative + gamma(size + 8))))


def norm_weight_tolerance(grad: Array, x: Array, eps: float) -> Tolerance:
    """Return the tolerance of the gradient of a norm's weight: a sum of products over all tokens."""
    x64 = as_float64(x)
    normed = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + eps)
    terms = rows(np.abs(as_float64(grad) * normed))
    return tol.tolerance(terms.sum(axis=0) * (gamma(x.shape[-1] + 2) / 2 + LIBRARY + gamma(len(terms) + 2)))


def cap_tolerance(grad: Array, x: Array, cap: float | None) -> Tolerance:
    """Return the tolerance of ``grad (1 - tanh**2)``; the difference has the absolute error of ``tanh**2``."""
    if cap is None:
        return tol.tolerance(np.zeros(x.shape))
    t = np.tanh(as_float64(x) / cap)
    return tol.tolerance(np.abs(grad) * ((2 * LIBRARY + 4 * U) * t**2 + 6 * U * (1 - t**2)))


def cap_stores(grad: Array, x: Array, cap: float | None, storage: str) -> list[Array]:
    """Return the errors in the result from storing the quotient, its tanh, and two products in half precision."""
    if cap is None:
        return []
    inner = as_float64(x) / cap
    t = np.tanh(inner)
    slope = 1 - t**2
    of_tanh = ulp(t, storage) / 2 + slope * ulp(inner, storage) / 2
    return [
        np.abs(grad) * (2 * np.abs(t) * of_tanh + of_tanh**2),
        (slope + of_tanh) * ulp(grad * cap, storage) / cap, ulp(np.abs(grad * cap) * (slope + of_tanh), storage) / cap,
    ]  # fmt: skip


def softmax_tolerance(grad: Array, probs: Array) -> Tolerance:
    """Return the tolerance of ``p (g - sum(g p))``, a sum over the keys."""
    wide, keys = np.abs(grad), probs.shape[-1]
    mean = np.sum(wide * probs, axis=-1, keepdims=True)
    return tol.tolerance(probs * (4 * U * wide + (gamma(keys + 3) + U) * mean))


def softmax_stores(grad: Array, probs: Array, storage: str) -> list[Array]:
    """Return the error in the result because the trace has rounded probabilities, but autograd uses unrounded ones."""
    off, mean = ulp(probs, storage) / 2, np.sum(grad * probs, axis=-1, keepdims=True)
    return [off * np.abs(grad - mean) + probs * np.sum(off * np.abs(grad), axis=-1, keepdims=True)]


def gelu_tolerance(grad: Array, x: Array) -> Tolerance:
    """Return the tolerance of GELU's slope: eight roundings of each term, as for PyTorch's recordings."""
    bent = np.minimum(np.abs(as_float64(x)), 8)  # beyond 8, tanh is 1, or the slope is very small
    return tol.tolerance(8 * U * np.abs(grad) * (1 + 0.4 * bent * (1 + 3 * 0.044715 * bent**2)))


def embed_tolerance(grad: Array, ids: Array, vocab: int, scale: float) -> Tolerance:
    """Return the tolerance of ``sqrt(hidden)`` times the sums over equal tokens."""
    most = int(np.bincount(ids.ravel()).max())
    return tol.tolerance(gamma(most + 2) * sum_tokens(np.abs(grad), ids, vocab, scale))


def sum_tokens(grad: Array, ids: Array, vocab: int, scale: float) -> Array:
    """Return the gradient of the embedding table, summed over all tokens."""
    table = np.zeros((vocab, grad.shape[-1]))
    np.add.at(table, ids.ravel(), rows(grad) * scale)
    return table


# --- operations -------------------------------------------------------------------------------------------------------


def rows(x: Array) -> Array:
    """Reshape to one row per token; merge heads."""
    return (merge_heads(x) if x.ndim == 4 else x).reshape(-1, x.shape[-1] if x.ndim == 3 else x.shape[1] * x.shape[3])


def shift(labels: Array) -> Array:
    """Return the label for the logits at each place: the next token."""
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), IGNORED)], axis=1)


def divide_by(context: Context) -> float:
    """Return the number that the sum of all losses is divided by."""
    call = context.call
    assert call.labels is not None
    return call.num_items or float(max(1, np.sum(shift(call.labels) != IGNORED)))


def loss_backward(logits: Array, context: Context) -> Array:
    """Return the gradient of the logits."""
    assert context.call.labels is not None
    return back.causal_lm_loss_backward(logits, context.call.labels, divide_by(context))


def _copy(name: str, source: str) -> Operation:
    return Operation(name, (source,), lambda x: x, lambda x: tol.tolerance(np.zeros(x.shape)))


def _cap_backward(context: Context, name: str, grad: str, x: str, cap: float | None) -> Operation:
    usual = context.function("soft_cap_backward", back.soft_cap_backward)
    return Operation(
        name, (grad, x), lambda g, z: usual(g, z, cap), partial(cap_tolerance, cap=cap), partial(cap_stores, cap=cap)
    )


def _norm_backward(
    context: Context, name: str, grad: str, x: str, weight: Callable[[], Any], residual: str = ""
) -> Operation:
    """Return the backward operation of a norm; add the gradient of the residual stream if `stream` is given."""
    function, eps = context.function("rms_norm_backward", back.rms_norm_backward), context.config.rms_norm_eps
    join = context.function("residual_backward", np.add)

    def compute(grad: Array, x: Array, stream: Array | None = None) -> Array:
        through = function(grad, x, weight(), eps)[0]
        return np.asarray(through if stream is None else join(stream, through))

    def tolerate(grad: Array, x: Array, stream: Array | None = None) -> Tolerance:
        through = norm_tolerance(grad, x, weight(), eps)
        return through if stream is None else add([through], np.abs(compute(grad, x, stream)))

    def stores(grad: Array, x: Array, stream: Array | None = None, *, storage: str) -> list[Array]:
        return [] if stream is None else [ulp(function(grad, x, weight(), eps)[0], storage) / 2]

    return Operation(name, (grad, x, *([residual] if residual else [])), compute, tolerate, stores)


def _norm_weight(context: Context, name: str, grad: str, x: str, weight: Callable[[], Any]) -> Operation:
    function, eps = context.function("rms_norm_backward", back.rms_norm_backward), context.config.rms_norm_eps
    return Operation(
        PREFIX + name, (grad, x), lambda g, z: function(g, z, weight(), eps)[1],
        lambda g, z: norm_weight_tolerance(g, z, eps),
    )  # fmt: skip


def _inputs(name: str, grads: tuple[str, ...], weights: Callable[[], Sequence[Array]]) -> Operation:
    """Return the gradient of an input of one or more projections, summed in autograd's order."""

    def through(*given: Array) -> list[Array]:
        return [rows(g) @ w for g, w in zip(given, weights(), strict=True)]

    def shape(x: Array, like: Array) -> Array:
        batch, seq = (like.shape[0], like.shape[2]) if like.ndim == 4 else like.shape[:2]
        return x.reshape(batch, seq, -1)

    def tolerate(*given: Array) -> Tolerance:
        parts = [tol.matmul(rows(g), w) for g, w in zip(given, weights(), strict=True)]
        total = add(parts, np.asarray(sum(np.abs(x) for x in through(*given)))) if len(parts) > 1 else parts[0]
        return tol.rearrange(total, lambda x: shape(x, given[0]))

    def stores(*given: Array, storage: str) -> list[Array]:
        parts = through(*given)
        sums = [sum(parts[:n]) for n in range(2, len(parts))]
        stored = [*parts, *sums] if len(parts) > 1 else []
        return [shape(ulp(np.asarray(x), storage) / 2, given[0]) for x in stored]

    return Operation(name, grads, lambda *given: shape(np.asarray(sum(through(*given))), given[0]), tolerate, stores)


def _weight(name: str, grad: str, x: str) -> Operation:
    """Return the gradient of a matrix: a sum over all tokens."""
    return Operation(
        PREFIX + name, (grad, x), lambda g, z: rows(g).T @ rows(z), lambda g, z: tol.matmul(rows(g).T, rows(z))
    )


def _bias(name: str, grad: str) -> Operation:
    return Operation(
        PREFIX + name, (grad,), lambda g: rows(g).sum(axis=0),
        lambda g: tol.tolerance(gamma(len(rows(g))) * np.abs(rows(g)).sum(axis=0)),
    )  # fmt: skip


def _attention_backward(context: Context, layer: int, names: dict[str, str]) -> Iterator[Operation]:
    config, a = context.config, f"layers.{layer}.attention."
    g, groups, scale = PREFIX + a, context.groups, context.config.attention_scale
    share = context.function("repeat_kv_backward", back.repeat_kv_backward)
    softmax = context.function("softmax_backward", back.softmax_backward)
    score = context.function("attention_scores_backward", back.attention_scores_backward)
    turn_back = context.function("rotate_backward", back.rotate_backward)

    def weight(letter: str) -> Array:
        return np.asarray(getattr(context.layer(layer), f"{letter}_proj"))

    def sum_copies(copies: Tolerance) -> Tolerance:
        """Return the tolerance of a sum over the copies of a key head."""
        bound = back.repeat_kv_backward(copies.bound * (1 + gamma(groups)), groups)
        return tol.tolerance(bound, np.sqrt(back.repeat_kv_backward(copies.spread**2, groups)))

    def of_keys(left: Array, right: Array) -> Tolerance:
        """Return the tolerance of ``left.T @ right``, summed over the copies of a key head."""
        exact = np.abs(left.swapaxes(-1, -2)) @ np.abs(right)
        summed = sum_copies(tol.matmul(left.swapaxes(-1, -2), right))
        return add([summed], gamma(groups) / U * back.repeat_kv_backward(exact, groups))

    def stores_of_keys(left: Array, right: Array, storage: str) -> list[Array]:
        return [back.repeat_kv_backward(ulp(left.swapaxes(-1, -2) @ right, storage) / 2, groups)]

    def heads(mixed: Array) -> Array:
        return split_heads(mixed, config.head_dim)

    yield _inputs(g + "mixed", (g + "out",), lambda: [weight("o")])
    yield _weight(names["o_proj"], g + "out", a + "mixed")
    yield Operation(
        g + "probs", (g + "mixed", a + "v"), lambda m, v: heads(m) @ repeat_kv(v, groups).swapaxes(-1, -2),
        lambda m, v: tol.matmul(heads(m), repeat_kv(v, groups).swapaxes(-1, -2)),
    )  # fmt: skip
    yield Operation(
        g + "v", (g + "mixed", a + "probs"), lambda m, p: share(p.swapaxes(-1, -2) @ heads(m), groups),
        lambda m, p: of_keys(p, heads(m)), lambda m, p, storage: stores_of_keys(p, heads(m), storage),
    )  # fmt: skip
    yield Operation(g + "capped", (g + "probs", a + "probs"), softmax, softmax_tolerance, softmax_stores)
    yield _cap_backward(context, g + "scores", g + "capped", a + "scores", config.attn_logit_softcapping)

    def scaled_stores(grad: Array, other: Array, storage: str) -> Array:
        """Return the error from storing the scaled gradient, before its product with `other`."""
        return ulp(grad * scale, storage) / 2 @ np.abs(other)

    def allowed_q(s: Array, k: Array) -> Tolerance:
        keys = repeat_kv(k, groups)
        return add([tol.matmul(s * scale, keys)], 2 * np.abs(s * scale) @ np.abs(keys))

    yield Operation(
        g + "q_rot", (g + "scores", a + "k_rot"),
        lambda s, k: score(s, np.zeros((*s.shape[:3], k.shape[-1])), repeat_kv(k, groups), scale)[0], allowed_q,
        lambda s, k, storage: [scaled_stores(s, repeat_kv(k, groups), storage)],
    )  # fmt: skip

    def allowed_k(s: Array, q: Array) -> Tolerance:
        exact = np.abs(s * scale).swapaxes(-1, -2) @ np.abs(q)
        return add([of_keys(s * scale, q)], 2 * back.repeat_kv_backward(exact, groups))

    def stores_k(s: Array, q: Array, storage: str) -> list[Array]:
        early = scaled_stores(s.swapaxes(-1, -2), q, storage)
        return [back.repeat_kv_backward(early, groups), *stores_of_keys(s * scale, q, storage)]

    yield Operation(
        g + "k_rot", (g + "scores", a + "q_rot"),
        lambda s, q: share(score(s, q, np.zeros((*q.shape[:2], s.shape[-1], q.shape[-1])), scale)[1], groups),
        allowed_k, stores_k,
    )  # fmt: skip
    for letter in ("q", "k"):
        yield Operation(
            g + letter, (f"{g}{letter}_rot", "cos", "sin"), turn_back,
            lambda x, cos, sin: tol.rotate(x, cos, sin), tol.rotate_stores,
        )  # fmt: skip
    for letter in ("q", "k", "v"):
        yield _weight(names[f"{letter}_proj"], g + letter, f"layers.{layer}.input_layernorm")
    for field, name in names.items():
        if field.endswith("_bias"):
            yield _bias(name, g + ("out" if field == "o_proj_bias" else field[0]))
    yield _inputs(
        f"{PREFIX}layers.{layer}.input_layernorm", (g + "v", g + "k", g + "q"), lambda: [weight(n) for n in "vkq"]
    )


def _block_backward(context: Context, layer: int) -> Iterator[Operation]:
    p = f"layers.{layer}."
    g, before = PREFIX + p, f"layers.{layer - 1}.out" if layer else "embedded"
    names = layer_tensors(layer, context.config.attention_bias)
    gelu = context.function("gelu_tanh_backward", back.gelu_tanh_backward)
    product = context.function("product_backward", lambda grad, gelu, up: (grad * up, grad * gelu))

    def weight(name: str) -> Callable[[], Any]:
        return lambda: getattr(context.layer(layer), name)

    f, d = p + "feed_forward.", g + "feed_forward."
    norms = ("post_feedforward_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "input_layernorm")
    post_mlp, pre, post_attention, first = norms
    yield _copy(g + post_mlp, g + "out")
    yield _norm_backward(context, d + "out", g + post_mlp, f + "out", weight(post_mlp))
    yield _norm_weight(context, names[post_mlp], g + post_mlp, f + "out", weight(post_mlp))
    yield _inputs(d + "product", (d + "out",), lambda: [weight("down_proj")()])
    yield _weight(names["down_proj"], d + "out", f + "product")
    for place, factor in enumerate(("gelu", "up")):
        yield Operation(
            d + factor, (d + "product", f + "gelu", f + "up"),
            lambda grad, a, b, place=place: product(grad, a, b)[place],
            lambda grad, a, b, place=place: tol.one_rounding(grad * (b, a)[place]),
        )  # fmt: skip
    yield Operation(d + "gate", (d + "gelu", f + "gate"), gelu, gelu_tolerance)
    yield _weight(names["gate_proj"], d + "gate", p + pre)
    yield _weight(names["up_proj"], d + "up", p + pre)
    yield _inputs(g + pre, (d + "up", d + "gate"), lambda: [weight("up_proj")(), weight("gate_proj")()])
    yield _norm_backward(context, g + "middle", g + pre, p + "middle", weight(pre), g + "out")
    yield _norm_weight(context, names[pre], g + pre, p + "middle", weight(pre))
    yield _copy(g + post_attention, g + "middle")
    yield _norm_backward(context, g + "attention.out", g + post_attention, p + "attention.out", weight(post_attention))
    yield _norm_weight(context, names[post_attention], g + post_attention, p + "attention.out", weight(post_attention))
    yield from _attention_backward(context, layer, names)
    yield _norm_backward(context, PREFIX + before, g + first, before, weight(first), g + "middle")
    yield _norm_weight(context, names[first], g + first, before, weight(first))


def _head(context: Context) -> Iterator[Operation]:
    """Yield the backward operations from the loss to the last block."""
    config, last = context.config, f"layers.{context.config.num_hidden_layers - 1}.out"
    raw, norm = PREFIX + "raw_logits", PREFIX + "norm"
    loss, labels = context.function("loss_backward", loss_backward), context.call.labels
    assert labels is not None
    yield Operation(
        PREFIX + "logits", ("logits",), lambda x: loss(x, context),
        lambda x: loss_tolerance(x, labels, context.call.num_items),
    )  # fmt: skip
    yield _cap_backward(context, raw, PREFIX + "logits", "raw_logits", config.final_logit_softcapping)

    def by_pieces(grad: Array, multiply: Callable[[Array, Array], Any]) -> list[Any]:
        found, start = [], 0
        for piece in head_pieces(context):
            found.append(multiply(grad[..., start : start + len(piece)], as_float64(piece)))
            start += len(piece)
        return found

    def tolerate(grad: Array) -> Tolerance:
        total = np.abs(sum(by_pieces(grad, lambda g, w: np.abs(g) @ np.abs(w))))
        parts = by_pieces(grad, tol.matmul)
        return parts[0] if len(parts) == 1 else tol.tolerance(gamma(grad.shape[-1]) * total)

    yield Operation(norm, (raw,), lambda grad: np.asarray(sum(by_pieces(grad, np.matmul))), tolerate)
    if context.weights.lm_head is not None:
        yield _weight(LM_HEAD, raw, "norm")
    yield _norm_backward(context, PREFIX + last, norm, last, lambda: context.weights.norm)
    yield _norm_weight(context, NORM, norm, last, lambda: context.weights.norm)


def _embedding(context: Context) -> Operation:
    config, ids, scale = context.config, context.call.input_ids, context.embedding_scale()
    embed = context.function("embed_backward", partial(sum_tokens, scale=scale))
    tie = context.function("tied_backward", np.add)
    name, embedded, head = PREFIX + EMBED_TOKENS, PREFIX + "embedded", (PREFIX + "raw_logits", "norm")

    def alone(grad: Array) -> Array:
        return np.asarray(embed(grad, ids, config.vocab_size))

    def stores_alone(grad: Array, storage: str) -> list[Array]:
        """Return the errors from storing each product and each sum over equal tokens."""
        most = np.bincount(ids.ravel(), minlength=config.vocab_size)[:, None]
        sums = sum_tokens(np.abs(grad), ids, config.vocab_size, scale)
        return [ulp(sums, storage) / 2 * np.maximum(2 * most, 1) * (most > 0)]

    if context.weights.lm_head is not None:
        allowed_alone = partial(embed_tolerance, ids=ids, vocab=config.vocab_size, scale=scale)
        return Operation(name, (embedded,), alone, lambda grad: allowed_alone(grad), stores_alone)

    def compute(grad: Array, raw: Array, norm: Array) -> Array:
        return np.asarray(tie(alone(grad), rows(raw).T @ rows(norm)))

    def tolerate(grad: Array, raw: Array, norm: Array) -> Tolerance:
        parts = [embed_tolerance(grad, ids, config.vocab_size, scale), tol.matmul(rows(raw).T, rows(norm))]
        return add(parts, np.abs(compute(grad, raw, norm)))

    def stores(grad: Array, raw: Array, norm: Array, storage: str) -> list[Array]:
        return [*stores_alone(grad, storage), ulp(rows(raw).T @ rows(norm), storage) / 2]

    return Operation(name, (embedded, *head), compute, tolerate, stores)


def backward_operations(context: Context) -> Iterator[Operation]:
    """Yield the operations of the backward pass, named by their gradients, in the order of execution.

    Examples
    --------
    >>> import refgemma
    >>> from refgemma.oracle.operations import double
    >>> from refgemma.oracle.tolerance import Arithmetic
    >>> from refgemma.trace.candidate import Call
    >>> tiny, ids = refgemma.load("tiny"), np.array([[2, 300]])
    >>> call = Call(ids, np.array([[0, 1]]), np.ones((1, 2), bool), (2,), labels=ids)
    >>> names = [op.name for op in backward_operations(Context(tiny.config, double(tiny.weights), call, Arithmetic()))]
    >>> names[0], names[-1]
    ('grads.logits', 'grads.model.embed_tokens.weight')
    """
    yield from _head(context)
    for layer in reversed(range(context.config.num_hidden_layers)):
        yield from _block_backward(context, layer)
    yield _embedding(context)
