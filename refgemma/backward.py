"""Compute the gradients of Gemma 2 by the chain rule, one operation at a time, from the loss to every weight. Checked
against PyTorch autograd through transformers 5.23 (eager), against central differences, and by the adjoint test.

``grad`` is always the gradient of the loss with respect to an operation's result: an array of the result's shape,
``grad[i] = dL/dy[i]``. For each operation ``y = f(x)`` of `refgemma.ops`, a function here takes `grad` and returns the
gradients of the inputs: ``dL/dx[j] = sum_i grad[i] * dy[i]/dx[j]``. The order is the reverse of the forward pass.

The records of the forward pass have the inputs of every operation, so nothing else is stored. Cheap steps inside an
operation are computed again: the tanh of a cap, the root of a norm, the slope of an activation, the repeated key heads
and the softmax of the logits.

The gradient of a tensor that is used several times is the sum of the gradients from all its uses.

In half precision each function rounds where PyTorch's autograd does: autograd's kernels also widen to float32 and round
once. A docstring says where this cannot be reproduced.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from refgemma.activations import Activation, sigmoid
from refgemma.activations_backward import ACTIVATIONS_BACKWARD, tanh_backward
from refgemma.cache import LayerCache
from refgemma.config import Gemma2Config
from refgemma.heads import (
    IGNORED,
    causal_lm_loss,
    infer_problem_type,
    last_tokens,
    log_softmax,
    sequence_classification_loss,
    token_classification_loss,
)
from refgemma.inputs import InputError, check_token_ids, packed_masks
from refgemma.layers import Attention, Block, FeedForward, merge_heads, split_heads
from refgemma.model import Forward, Start, begin, blocks, embedding_scale, forward, head_table
from refgemma.ops import gelu_tanh, linear, repeat_kv, rms_norm
from refgemma.precision import Array, narrow, wide
from refgemma.shapes import Heads, Hidden, Intermediate, Logits, RotaryTable, Scores, TokenIds
from refgemma.weights.parameters import (
    EMBED_TOKENS,
    LM_HEAD,
    NORM,
    SCORE_BIAS,
    SCORE_WEIGHT,
    LayerWeights,
    Score,
    Weights,
    layer_tensors,
)

# --- operations, in the order of ops.py -------------------------------------------------------------------------------


def linear_backward(
    grad: Float[np.ndarray, "*batch out"], x: Float[np.ndarray, "*batch in"], weight: Float[np.ndarray, "out in"],
    bias: Float[np.ndarray, " out"] | None = None,
) -> tuple[Float[np.ndarray, "*batch in"], Float[np.ndarray, "out in"], Float[np.ndarray, " out"] | None]:  # fmt: skip
    """Return the gradients of `linear`: ``grad @ weight``, ``grad.T @ x`` and the sum of `grad`.

    ``y[t, o] = sum_i x[t, i] weight[o, i] + bias[o]``. The input ``x[t, i]`` affects every output ``o`` of its own
    token, with the factor ``weight[o, i]``. The weight affects output ``o`` of every token, with the factor
    ``x[t, i]``, and so does the bias, with the factor 1. So the gradients of weight and bias sum over all tokens.
    Source: ``torch.nn.functional.linear`` under autograd.

    Examples
    --------
    >>> grad, x, weight = np.array([[1.0, 2.0]]), np.array([[3.0]]), np.array([[10.0], [20.0]])
    >>> grad_x, grad_weight, _ = linear_backward(grad, x, weight)
    >>> grad_x, grad_weight
    (array([[50.]]), array([[3.],
           [6.]]))
    """
    rows = grad.reshape(-1, grad.shape[-1])  # one row per token
    grad_x = (rows @ weight).reshape(x.shape)
    grad_weight = rows.T @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_weight, None if bias is None else rows.sum(axis=0)


def rms_norm_backward(
    grad: Float[np.ndarray, "*batch hidden"], x: Float[np.ndarray, "*batch hidden"],
    weight: Float[np.ndarray, " hidden"], eps: float,
) -> tuple[Float[np.ndarray, "*batch hidden"], Float[np.ndarray, " hidden"]]:  # fmt: skip
    """Return the gradients of `rms_norm`: of `x` ``r * (h - n * mean(h * n))``, of `weight` the sum of ``grad * n``.

    Here ``r = 1 / sqrt(mean(x**2) + eps)``, ``n = x * r`` and ``h = grad * (1 + weight)``, which is the gradient of
    ``n``. Each ``x[j]`` affects ``n[j]`` directly, with the factor ``r``, and every ``n[i]`` through the mean. Because
    ``dr/dx[j] = -r**3 x[j] / hidden``, both together are ``dn[i]/dx[j] = r (1 if i == j else 0) - n[i] n[j] r /
    hidden``. Multiplied by ``h[i]`` and added over ``i``, this is the formula. Without `eps`, a longer `x` gives the
    same result, so the gradient of `x` has no part along `x`: their dot product is 0. The sum of `weight` is over
    tokens.

    The weight is an offset from one, but ``d(1 + w)/dw = 1``. All steps use (at least) float32, and each gradient is
    rounded once. Source: transformers ``Gemma2RMSNorm`` under autograd; Zhang and Sennrich 2019, arXiv:1910.07467.

    Examples
    --------
    >>> x = np.array([3.0, 4.0])
    >>> grad_x, grad_weight = rms_norm_backward(np.array([1.0, 0.0]), x, np.zeros(2), eps=0.0)
    >>> grad_x.round(4), float(abs(grad_x @ x).round(4)), grad_weight.round(4)
    (array([ 0.181 , -0.1358]), 0.0, array([0.8485, 0.    ]))
    """
    x_wide, scale, hidden = wide(x), 1 + wide(weight), x.shape[-1]
    inverse = 1 / np.sqrt(np.mean(x_wide * x_wide, axis=-1, keepdims=True) + eps)
    normed = x_wide * inverse
    products = wide(grad) * normed
    mean = (products @ scale)[..., None] / hidden  # of h * n = grad * (1 + weight) * n
    grad_x = inverse * (wide(grad) * scale - normed * mean)
    grad_weight = products.reshape(-1, hidden).sum(axis=0)
    return narrow(grad_x, like=x), narrow(grad_weight, like=weight)


def rotate_backward(
    grad: Float[np.ndarray, "batch any_heads seq head_dim"], cos: RotaryTable, sin: RotaryTable
) -> Float[np.ndarray, "batch any_heads seq head_dim"]:
    """Return the gradient of `rotate`: rotate back, ``grad * cos + (second half, -first half) of (grad * sin)``.

    The result is linear in ``x``: a pair ``(a, b)`` becomes ``(a cos - b sin, b cos + a sin)``. So ``a`` receives
    ``grad_a cos + grad_b sin`` and ``b`` receives ``grad_b cos - grad_a sin``. That is the transposed matrix, which
    for a rotation is the inverse. Half precision has three roundings, as in `rotate`. Source: transformers
    ``apply_rotary_pos_emb`` under autograd.

    Examples
    --------
    >>> quarter_turn = np.full((1, 1, 1, 2), np.pi / 2)
    >>> rotate_backward(np.array([[[[0.0, 1.0]]]]), np.cos(quarter_turn), np.sin(quarter_turn)).round(6)
    array([[[[1., 0.]]]])
    """
    first, second = np.split(grad * sin, 2, axis=-1)
    turned: Array = grad * cos + np.concatenate([second, -first], axis=-1)
    return turned


def repeat_kv_backward(
    grad: Float[np.ndarray, "batch heads keys head_dim"], groups: int
) -> Float[np.ndarray, "batch kv_heads keys head_dim"]:
    """Return the gradient of `repeat_kv`: the sum over the `groups` query heads that share a key/value head.

    Each copy has the derivative 1, and all copies affect the loss. Half precision sums in float32 and rounds once.
    Source: transformers ``repeat_kv`` under autograd.

    Examples
    --------
    >>> repeat_kv_backward(np.array([1.0, 2.0, 10.0, 20.0]).reshape(1, 4, 1, 1), groups=2).ravel()
    array([ 3., 30.])
    """
    batch, heads, keys, head_dim = grad.shape
    summed: Array = grad.reshape(batch, heads // groups, groups, keys, head_dim).sum(axis=2)
    return summed


def soft_cap_backward(
    grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"], cap: float | None
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `soft_cap`: ``grad * (1 - tanh(x / cap)**2)``; with ``None``, return `grad` unchanged.

    ``y = cap * tanh(x / cap)``. The derivative of tanh is ``1 - tanh**2``; the factors ``cap`` outside and ``1 / cap``
    inside cancel. From the result, this is ``1 - (y / cap)**2``. Far beyond the cap it is almost 0: a saturated score
    does not learn.

    Half precision has three roundings, because autograd goes back through three kernels: the product with the cap,
    tanh and the quotient. So the two factors do not cancel in the code. (PyTorch stores the tanh; here it is computed
    again.) Source: transformers ``eager_attention_forward`` and ``Gemma2ForCausalLM`` under autograd; Bello et al.
    2016, arXiv:1611.09940.

    Examples
    --------
    >>> soft_cap_backward(np.ones(3), np.array([0.0, 50.0, 1000.0]), cap=50.0).round(3)
    array([1.  , 0.42, 0.  ])
    """
    return grad if cap is None else tanh_backward(grad * cap, x / cap) / cap


def attention_scores_backward(
    grad: Scores, q: Float[np.ndarray, "batch heads seq head_dim"],
    k: Float[np.ndarray, "batch heads keys head_dim"], scale: float,
) -> tuple[Float[np.ndarray, "batch heads seq head_dim"], Float[np.ndarray, "batch heads keys head_dim"]]:  # fmt: skip
    """Return the gradients of `attention_scores`: of `q` ``scale * grad @ k``, of `k` ``scale * grad' @ q``.

    ``scores[i, j] = scale * sum_d q[i, d] k[j, d]``. The gradient of a query sums over the keys it is compared with,
    the gradient of a key over queries; ``grad'`` has queries and keys exchanged. In half precision the scaled `grad` is
    rounded, then each product. Source: transformers ``eager_attention_forward`` under autograd.

    Examples
    --------
    >>> q, k = np.array([[[[3.0, 4.0]]]]), np.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    >>> grad_q, grad_k = attention_scores_backward(np.array([[[[1.0, 10.0]]]]), q, k, scale=0.5)
    >>> grad_q[0, 0], grad_k[0, 0]
    (array([[0.5, 5. ]]), array([[ 1.5,  2. ],
           [15. , 20. ]]))
    """
    scaled = grad * scale
    return scaled @ k, scaled.swapaxes(-1, -2) @ q


def softmax_backward(grad: Scores, probs: Scores) -> Scores:
    """Return the gradient of the scores of `softmax`, from its result: ``probs * (grad - sum(grad * probs))``.

    ``p[j] = exp(s[j]) / sum_k exp(s[k])``. The score ``s[j]`` raises its own exponential and, through the sum,
    lowers every weight: ``dp[i]/ds[j] = p[i] (1 if i == j else 0) - p[i] p[j]``. Multiplied by ``grad[i]`` and added
    over ``i``, this is ``p[j] (grad[j] - sum(grad * probs))``. So a score's gradient is positive where `grad` is above
    its mean weighted by `probs`, and the gradients of a row sum to 0. In a row with a visible key, a masked key has the
    weight 0 and so the gradient 0; the mask is not needed.

    A query that may see no key weighs all keys equally, whatever the scores, so their derivative is 0. This function
    does not return 0, because PyTorch does not: PyTorch adds the lowest number to the scores of masked keys, and
    differentiates this sum, although rounding makes it constant. The formula above gives the same as PyTorch.

    Computed in (at least) float32 and rounded once. PyTorch uses the weights before they are rounded to half precision,
    but the records do not have these. Pass unrounded `probs` to get PyTorch's rounding. Source: transformers
    ``eager_attention_forward`` under autograd.

    Examples
    --------
    >>> softmax_backward(np.array([[[[1.0, 0.0, 7.0]]]]), np.array([[[[0.5, 0.5, 0.0]]]]))
    array([[[[ 0.25, -0.25,  0.  ]]]])
    """
    products = wide(grad) * wide(probs)
    mean = products.sum(axis=-1, keepdims=True)
    return narrow(products - wide(probs) * mean, like=grad)


def gelu_tanh_backward(
    grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `gelu_tanh`: ``grad * (0.5 (1 + t) + 0.5 x (1 - t**2) du/dx)``.

    ``y = 0.5 x (1 + t)`` with ``t = tanh(u)`` and ``u = sqrt(2/pi) (x + 0.044715 x**3)``, so that ``du/dx =
    sqrt(2/pi) (1 + 3 * 0.044715 x**2)``: the product rule, then the chain rule. Half precision has one rounding.
    Source: ``torch.nn.functional.gelu(approximate="tanh")`` under autograd.

    Examples
    --------
    >>> gelu_tanh_backward(np.ones(3), np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.083,  0.5  ,  1.083])
    """
    x_wide = wide(x)
    square, root = x_wide * x_wide, math.sqrt(2 / math.pi)
    t = np.tanh(root * x_wide * (1 + 0.044715 * square))
    slope = 0.5 * (1 + t) + 0.5 * x_wide * (1 - t * t) * (root * (1 + 3 * 0.044715 * square))
    return narrow(wide(grad) * slope, like=x)


def activation_backward(
    grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"], activation: Activation
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `activation`: Gemma 2's own, or one of `refgemma.activations_backward`.

    Raises
    ------
    InputError
        If `activation` is a caller's own function, whose derivative is unknown.

    Examples
    --------
    >>> activation_backward(np.ones(1), np.zeros(1), gelu_tanh)
    array([0.5])
    """
    if activation is gelu_tanh:
        return gelu_tanh_backward(grad, x)
    if activation not in ACTIVATIONS_BACKWARD:
        raise InputError(
            f"hidden_activation is {activation!r}, a function whose derivative is unknown; "
            "add it to refgemma.activations_backward.ACTIVATIONS_BACKWARD"
        )
    return ACTIVATIONS_BACKWARD[activation](grad, x)


# --- the functions of layers.py, in its order -------------------------------------------------------------------------


def attention_backward(
    grad: Hidden, record: Attention, x: Hidden, weights: LayerWeights, *, cos: RotaryTable, sin: RotaryTable,
    scale: float, cap: float | None,
) -> tuple[Hidden, Attention, dict[str, Array]]:  # fmt: skip
    """Return the gradients of `attention`: of the input `x`, of all steps, and of the weights.

    A key and a value serve every query that sees them, so their gradients sum over queries. The input serves all three
    projections, so its gradient is a sum, too.

    Parameters
    ----------
    grad : (batch, seq, hidden)
        The gradient of ``record.out``.
    record : Attention
        The record of the forward pass.
    x, weights, cos, sin, scale, cap
        The arguments of the forward pass.

    Returns
    -------
    tuple
        The gradient of `x`; a record like `record` with the gradient of each step; the gradients of the weights, by
        their fields in `LayerWeights`.
    """
    head_dim, seq = cos.shape[-1], x.shape[1]
    groups = record.q.shape[1] // record.k.shape[1]
    keys, values = (repeat_kv(past, groups) for past in record.present)
    of: dict[str, Any] = {}  # gradients of weights

    grad_mixed, of["o_proj"], of["o_proj_bias"] = linear_backward(
        grad, record.mixed, weights.o_proj, weights.o_proj_bias
    )
    grad_heads: Heads = split_heads(grad_mixed, head_dim)  # gradient of probs @ values
    grad_probs = grad_heads @ values.swapaxes(-1, -2)
    grad_values = repeat_kv_backward(record.probs.swapaxes(-1, -2) @ grad_heads, groups)

    grad_capped = softmax_backward(grad_probs, record.probs)
    grad_scores = soft_cap_backward(grad_capped, record.scores, cap)
    grad_q_rot, grad_keys = attention_scores_backward(grad_scores, record.q_rot, keys, scale)
    grad_keys = repeat_kv_backward(grad_keys, groups)

    grad_k_rot, grad_v = grad_keys[:, :, -seq:], grad_values[:, :, -seq:]  # earlier entries belong to the past
    grad_q = rotate_backward(grad_q_rot, cos, sin)
    grad_k = rotate_backward(grad_k_rot, cos, sin)
    through_q, of["q_proj"], of["q_proj_bias"] = linear_backward(
        merge_heads(grad_q), x, weights.q_proj, weights.q_proj_bias
    )
    through_k, of["k_proj"], of["k_proj_bias"] = linear_backward(
        merge_heads(grad_k), x, weights.k_proj, weights.k_proj_bias
    )
    through_v, of["v_proj"], of["v_proj_bias"] = linear_backward(
        merge_heads(grad_v), x, weights.v_proj, weights.v_proj_bias
    )
    grads = Attention(
        q=grad_q, k=grad_k, v=grad_v, q_rot=grad_q_rot, k_rot=grad_k_rot, scores=grad_scores, capped=grad_capped,
        probs=grad_probs, mixed=grad_mixed, out=grad,
        present=LayerCache(grad_keys, grad_values, record.present.start),
    )  # fmt: skip
    return (through_v + through_k) + through_q, grads, of  # in autograd's order: half precision rounds each sum


def feed_forward_backward(
    grad: Hidden, record: FeedForward, x: Hidden, weights: LayerWeights, activation: Activation
) -> tuple[Hidden, FeedForward, dict[str, Array]]:
    """Return the gradients of `feed_forward`: of the input `x`, of all steps, and of the weights.

    In a product each factor receives the gradient times the other factor, so ``gate`` learns where ``up`` is large.
    Arguments and results are as in `attention_backward`.
    """
    of: dict[str, Any] = {}
    grad_product: Intermediate
    grad_product, of["down_proj"], _ = linear_backward(grad, record.product, weights.down_proj)
    grad_gelu = grad_product * record.up
    grad_up = grad_product * record.gelu
    grad_gate = activation_backward(grad_gelu, record.gate, activation)
    through_up, of["up_proj"], _ = linear_backward(grad_up, x, weights.up_proj)
    through_gate, of["gate_proj"], _ = linear_backward(grad_gate, x, weights.gate_proj)
    grads = FeedForward(gate=grad_gate, up=grad_up, gelu=grad_gelu, product=grad_product, out=grad)
    return through_up + through_gate, grads, of


def block_backward(
    grad: Hidden, record: Block, hidden: Hidden, weights: LayerWeights, *, cos: RotaryTable, sin: RotaryTable,
    scale: float, cap: float | None, activation: Activation, eps: float,
) -> tuple[Hidden, Block, LayerWeights]:  # fmt: skip
    """Return the gradients of `block`: of the input `hidden`, of all steps, and of the weights.

    ``out = middle + norm(mlp(norm(middle)))``: a sum passes its gradient to both terms. So the gradient of the residual
    stream goes straight back to the first layer, and each half of a layer adds to it. Arguments and results are as in
    `attention_backward`; the gradients of the weights are a `LayerWeights`.
    """
    of: dict[str, Any] = {}
    grad_fed, of["post_feedforward_layernorm"] = rms_norm_backward(
        grad, record.feed_forward.out, weights.post_feedforward_layernorm, eps
    )
    grad_pre, fed, of_mlp = feed_forward_backward(
        grad_fed, record.feed_forward, record.pre_feedforward_layernorm, weights, activation
    )
    through_mlp, of["pre_feedforward_layernorm"] = rms_norm_backward(
        grad_pre, record.middle, weights.pre_feedforward_layernorm, eps
    )
    grad_middle = grad + through_mlp

    grad_attended, of["post_attention_layernorm"] = rms_norm_backward(
        grad_middle, record.attention.out, weights.post_attention_layernorm, eps
    )
    grad_input, attended, of_attention = attention_backward(
        grad_attended, record.attention, record.input_layernorm, weights, cos=cos, sin=sin, scale=scale, cap=cap
    )
    through_attention, of["input_layernorm"] = rms_norm_backward(grad_input, hidden, weights.input_layernorm, eps)
    grads = Block(
        input_layernorm=grad_input, attention=attended, post_attention_layernorm=grad_middle, middle=grad_middle,
        pre_feedforward_layernorm=grad_pre, feed_forward=fed, post_feedforward_layernorm=grad, out=grad,
    )  # fmt: skip
    return grad_middle + through_attention, grads, LayerWeights(**of, **of_mlp, **of_attention)


# --- the functions of model.py, in its order --------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """The gradients of every step of `forward`, with the same names, and of the weights."""

    embedded: Hidden  # also the gradient of `inputs_embeds`, if given
    layers: tuple[Block, ...]
    norm: Hidden
    raw_logits: Logits | None  # None for a classifier
    logits: Float[np.ndarray, "batch seq classes"]
    weights: dict[str, Array]  # by name in a checkpoint


def embed_backward(
    grad: Hidden, input_ids: TokenIds, vocab: int, padding: int | None
) -> Float[np.ndarray, "vocab hidden"]:
    """Return the gradient of the table of `embed`: for each row, ``sqrt(hidden)`` times the sum over its tokens.

    ``y[t] = table[id[t]] * sqrt(hidden)``: a row is used by all tokens with its id. The row of the token `padding` gets
    no gradient, because PyTorch's embedding does not train its ``padding_idx``; a tied head still gives it a gradient.

    In half precision each product rounds, and so does each sum, in the order of the tokens. To keep this order, the
    first tokens of all ids are added at once, then all second tokens, and so on. Source: transformers
    ``Gemma2TextScaledWordEmbedding`` under autograd.

    Examples
    --------
    >>> embed_backward(np.ones((1, 3, 1)), np.array([[2, 0, 2]]), vocab=4, padding=0).ravel()
    array([0., 0., 2., 0.])
    """
    rows = (grad * embedding_scale(grad.shape[-1], like=grad)).reshape(-1, grad.shape[-1])
    ids = input_ids.ravel()
    table = narrow(np.zeros((vocab, rows.shape[-1])), like=grad)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    turn = np.arange(len(ids)) - np.searchsorted(ordered, ordered)  # 0 for the first token of its id, 1 for the second
    for now in range(turn.max() + 1):
        places = order[turn == now]
        table[ids[places]] += rows[places]
    if padding is not None:
        table[padding] = 0
    return table


def backward(
    grad_logits: Logits, run: Forward, input_ids: TokenIds | None, weights: Weights, config: Gemma2Config, *,
    keep_activations: bool = True,
) -> Gradients:  # fmt: skip
    """Return the gradients of every step and every weight of `forward`, given the gradient of the logits.

    If the head is tied, the gradient of the table is the sum of two: from the head and from the embedding.

    Parameters
    ----------
    grad_logits : (batch, seq, vocab)
        The gradient of the logits, for example from `causal_lm_loss_backward`.
    run : Forward
        The record of `forward`.
    input_ids : int array (batch, seq), optional
        The tokens of `forward`; None if embeddings were passed, so that the embedding table gets no gradient.
    weights, config
        The arguments of `forward`.
    keep_activations : bool
        If true, keep the gradients of the layers' steps; otherwise ``.layers`` is empty.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> ids = np.array([[2, 300, 400]])
    >>> run = forward(ids, tiny.weights, tiny.config)
    >>> grads = backward(causal_lm_loss_backward(run.logits, ids), run, ids, tiny.weights, tiny.config)
    >>> grads.layers[3].attention.probs.shape, grads.weights["model.norm.weight"].shape
    ((1, 6, 3, 3), (234,))
    """
    grad_raw = soft_cap_backward(grad_logits, run.raw_logits, config.final_logit_softcapping)
    grad_norm, grad_head, _ = linear_backward(grad_raw, run.norm, head_table(weights, config)[:])
    grad, layers, of = _trunk_backward(grad_norm, run, run.layers, input_ids, weights, config, keep_activations)
    if weights.lm_head is None:
        of[EMBED_TOKENS] = of[EMBED_TOKENS] + grad_head
    else:
        of[LM_HEAD] = grad_head
    return Gradients(embedded=grad, layers=layers, norm=grad_norm, raw_logits=grad_raw, logits=grad_logits, weights=of)


def _trunk_backward(
    grad_norm: Hidden, start: Start | Forward, records: Sequence[Block], input_ids: TokenIds | None, weights: Weights,
    config: Gemma2Config, keep_activations: bool,
) -> tuple[Hidden, tuple[Block, ...], dict[str, Any]]:  # fmt: skip
    """Return the gradients of the embedded tokens, the blocks and the weights, given the gradient of the final norm."""
    stream = [start.embedded, *(record.out for record in records)]
    of: dict[str, Any] = {}
    layers: tuple[Block, ...] = ()
    grad, of[NORM] = rms_norm_backward(grad_norm, stream[-1], weights.norm, config.rms_norm_eps)
    for layer in reversed(range(len(records))):
        grad, grads, of_layer = block_backward(
            grad, records[layer], stream[layer], weights.layers[layer], cos=start.cos, sin=start.sin,
            scale=config.attention_scale, cap=config.attn_logit_softcapping, activation=config.activation,
            eps=config.rms_norm_eps,
        )  # fmt: skip
        of |= {name: getattr(of_layer, field) for field, name in layer_tensors(layer, config.attention_bias).items()}
        layers = (grads, *layers) if keep_activations else ()
    if input_ids is None:
        of[EMBED_TOKENS] = narrow(np.zeros(weights.embed_tokens.shape), like=grad)
    else:
        of[EMBED_TOKENS] = embed_backward(grad, input_ids, config.vocab_size, config.pad_token_id)
    return grad, layers, of


# --- losses, in the order of heads.py ---------------------------------------------------------------------------------


def cross_entropy_backward(
    logits: Float[np.ndarray, "tokens classes"], labels: Int[np.ndarray, " tokens"],
    num_items: float | None = None, ignore_index: int = IGNORED,
) -> Float[np.ndarray, "tokens classes"]:  # fmt: skip
    """Return the gradient of the logits of `cross_entropy`: ``(softmax(z) - one_hot(label)) / n``, or 0 if ignored.

    ``loss = (1/n) sum_t (log sum_k exp(z[t, k]) - z[t, label[t]])``: the derivative of the first term is the softmax,
    of the second term 1 at the label. ``n`` is `num_items` or the number of labels that count. So every token of a
    batch has the same weight; averaging the means of parts of a batch gives another gradient.

    Computed in at least float32 and rounded once, to the precision of the logits. Source:
    ``torch.nn.functional.cross_entropy`` under autograd, with ``logits.float()`` as in transformers.

    Examples
    --------
    >>> cross_entropy_backward(np.zeros((2, 4)), np.array([1, -100]))
    array([[ 0.25, -0.75,  0.25,  0.25],
           [ 0.  ,  0.  ,  0.  ,  0.  ]])
    """
    counted = np.flatnonzero(labels != ignore_index)
    share = np.exp(log_softmax(logits[counted]))
    share[np.arange(len(counted)), labels[counted]] -= 1
    grad = np.zeros(logits.shape, share.dtype)
    grad[counted] = share / (len(counted) if num_items is None else num_items)
    return narrow(grad, like=logits)


def mean_squared_error_backward(
    values: Float[np.ndarray, "*shape"], labels: npt.ArrayLike
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of the values of `mean_squared_error`: ``2 (value - label) / n``.

    The result is computed in at least float32 and rounded once. Source: ``torch.nn.MSELoss`` under autograd.

    Examples
    --------
    >>> mean_squared_error_backward(np.array([1.0, 2.0]), [1.0, 4.0])
    array([ 0., -2.])
    """
    return narrow(2 * (wide(values) - np.asarray(labels)) / values.size, like=values)


def binary_cross_entropy_backward(
    logits: Float[np.ndarray, "*shape"], labels: npt.ArrayLike
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of the logits of `binary_cross_entropy`: ``(sigmoid(z) - y) / n``.

    ``loss = log(1 + exp(z)) - z y`` for each class, and the derivative of the first term is the sigmoid. Computed in at
    least float32 and rounded once. Source: ``torch.nn.BCEWithLogitsLoss`` under autograd.

    Examples
    --------
    >>> binary_cross_entropy_backward(np.array([[0.0, 1000.0]]), [[1.0, 1.0]])
    array([[-0.25,  0.  ]])
    """
    return narrow((sigmoid(wide(logits)) - np.asarray(labels)) / logits.size, like=logits)


def sequence_classification_loss_backward(
    logits: Float[np.ndarray, "batch labels"], labels: npt.ArrayLike, problem_type: str | None
) -> Float[np.ndarray, "batch labels"]:
    """Return the gradient of the logits of `sequence_classification_loss`, for all three problem types.

    For a half-precision model, PyTorch computes this loss in half precision, and autograd rounds more often. refgemma
    computes the gradient in float32 and rounds once. Source: transformers ``ForSequenceClassificationLoss``.

    Examples
    --------
    >>> sequence_classification_loss_backward(np.array([[1.0], [2.0]]), [1.0, 4.0], None)
    array([[ 0.],
           [-2.]])
    """
    targets, num_labels = np.asarray(labels), logits.shape[1]
    match problem_type or infer_problem_type(targets, num_labels):
        case "regression":
            return mean_squared_error_backward(logits, targets.reshape(logits.shape))
        case "multi_label_classification":
            return binary_cross_entropy_backward(logits, targets)
    return cross_entropy_backward(logits, targets.reshape(-1))


def causal_lm_loss_backward(
    logits: Logits, labels: npt.ArrayLike, num_items_in_batch: float | None = None, ignore_index: int = IGNORED
) -> Logits:
    """Return the gradient of the logits of `causal_lm_loss`: `cross_entropy_backward` with shifted labels.

    The logits at place ``t`` predict the label at ``t + 1``, so the last place of each row has the gradient 0.
    Source: transformers ``ForCausalLMLoss`` under autograd.

    Examples
    --------
    >>> causal_lm_loss_backward(np.zeros((1, 2, 2)), [[0, 1]])
    array([[[ 0.5, -0.5],
            [ 0. ,  0. ]]])
    """
    targets = np.asarray(labels)
    shifted = np.concatenate([targets[:, 1:], np.full((len(targets), 1), ignore_index)], axis=1)
    flat = logits.reshape(-1, logits.shape[-1])
    return cross_entropy_backward(flat, shifted.ravel(), num_items_in_batch, ignore_index).reshape(logits.shape)


def compute_gradients(
    input_ids: npt.ArrayLike, labels: npt.ArrayLike, weights: Weights, config: Gemma2Config, *,
    attention_mask: Any = None, position_ids: npt.ArrayLike | None = None, num_items: float | None = None,
) -> tuple[float, dict[str, Array]]:  # fmt: skip
    """Return the loss of a language model on `labels`, and the gradient of each weight.

    This is all that a training step needs from the model: `forward`, `causal_lm_loss` and `backward`. Dropout is off,
    as in evaluation; Gemma 2 has no dropout.

    Parameters
    ----------
    input_ids : int array (batch, seq)
        Token ids.
    labels : int array (batch, seq)
        Usually the input ids themselves, with -100 where a token does not count, for instance at padding.
    weights : Weights
        The weights; their precision is the precision of the computation.
    config : Gemma2Config
        The model's configuration.
    attention_mask : array, optional
        As in `forward`.
    position_ids : int array (batch, seq), optional
        As in `forward`. Without `attention_mask`, positions that restart begin another text of a packed row; see
        ``refgemma.inputs.packed_masks``.
    num_items : float, optional
        Divides the sum of the losses, instead of the number of labels that count. To accumulate the gradients of
        several batches, pass the number of labels that count in all of them; the first label of a row never counts,
        because no logits predict it. A mean over each of the batches gives tokens of short batches too much weight.

    Returns
    -------
    loss : float
        The loss in nats per token.
    gradients : dict
        The gradient of each weight under its name in a checkpoint (``model.layers.0.self_attn.q_proj.weight``), in the
        precision of the weights. A tied head has no entry of its own.

    Raises
    ------
    InputError
        If the inputs or labels are invalid.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> ids = [[2, 300, 400]]
    >>> loss, grads = compute_gradients(ids, ids, tiny.weights, tiny.config)
    >>> round(loss, 1), grads["model.layers.0.self_attn.q_proj.weight"].shape
    (14.6, (192, 234))
    """
    loss, grads = compute_all_gradients(
        input_ids, labels, weights, config, attention_mask=attention_mask, position_ids=position_ids,
        num_items=num_items, keep_activations=False,
    )  # fmt: skip
    return loss, grads.weights


def compute_all_gradients(
    input_ids: npt.ArrayLike, labels: npt.ArrayLike, weights: Weights, config: Gemma2Config, *,
    attention_mask: Any = None, position_ids: npt.ArrayLike | None = None, num_items: float | None = None,
    keep_activations: bool = True,
) -> tuple[float, Gradients]:  # fmt: skip
    """Return the loss of a language model on `labels`, and the gradients of all steps and weights.

    For the arguments see `compute_gradients`, and `backward` for `keep_activations`.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> _, grads = compute_all_gradients([[2, 300]], [[2, 300]], tiny.weights, tiny.config)
    >>> bool((grads.logits[0, 1] == 0).all())  # nothing follows the last token
    True
    """
    ids = check_token_ids(input_ids, config.vocab_size)
    if attention_mask is None and position_ids is not None:
        attention_mask = packed_masks(position_ids, config)
    run = forward(ids, weights, config, attention_mask=attention_mask, position_ids=position_ids)
    loss = causal_lm_loss(run.logits, labels, num_items)
    grad_logits = causal_lm_loss_backward(run.logits, labels, num_items)
    return loss, backward(grad_logits, run, ids, weights, config, keep_activations=keep_activations)


def compute_classifier_gradients(
    input_ids: npt.ArrayLike, labels: npt.ArrayLike, weights: Weights, score: Score, config: Gemma2Config, *,
    each_token: bool = False, attention_mask: Any = None, position_ids: npt.ArrayLike | None = None,
    keep_activations: bool = False,
) -> tuple[float, Gradients]:  # fmt: skip
    """Return the loss of a classifier on `labels`, and all gradients; dropout is off, as in evaluation.

    A sequence classifier has a loss at one token of each row, so the gradient of all other logits is 0. The layers are
    as in `backward`. Source: transformers ``Gemma2ForSequenceClassification`` and
    ``Gemma2ForTokenClassification``.

    Parameters
    ----------
    input_ids, weights, config, attention_mask, position_ids
        As in `compute_gradients`.
    labels : array
        Labels as in `sequence_classification_loss` or, with `each_token`, as in `token_classification_loss`.
    score : Score
        The head of the classifier.
    each_token : bool
        If true, each token has a label; otherwise each sequence.
    keep_activations : bool
        If true, keep the gradients of the layers' steps.

    Raises
    ------
    InputError
        If the inputs or labels are invalid.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> score = Score(np.zeros((3, 234), np.float32))
    >>> loss, grads = compute_classifier_gradients([[2, 300], [2, 400]], [0, 2], tiny.weights, score, tiny.config)
    >>> round(loss, 4), grads.weights["score.weight"].shape
    (1.0986, (3, 234))
    """
    ids = check_token_ids(input_ids, config.vocab_size)
    if attention_mask is None and position_ids is not None:
        attention_mask = packed_masks(position_ids, config)
    start = begin(ids, weights, config, attention_mask=attention_mask, position_ids=position_ids)
    records = list(blocks(start, weights, config))
    norm = rms_norm(records[-1].out, weights.norm, config.rms_norm_eps)
    logits = linear(norm, score.weight, score.bias)
    if each_token:
        loss = token_classification_loss(logits, labels)
        flat = logits.reshape(-1, logits.shape[-1])
        grad_logits = cross_entropy_backward(flat, np.asarray(labels).ravel()).reshape(logits.shape)
    else:
        place = np.arange(len(ids)), _last_places(ids, config)
        loss = sequence_classification_loss(logits[place], labels, config.problem_type)
        grad_logits = narrow(np.zeros(logits.shape), like=logits)
        grad_logits[place] = sequence_classification_loss_backward(logits[place], labels, config.problem_type)
    grad_norm, grad_weight, grad_bias = linear_backward(grad_logits, norm, score.weight, score.bias)
    grad, layers, of = _trunk_backward(grad_norm, start, records, ids, weights, config, keep_activations)
    of[SCORE_WEIGHT] = grad_weight
    if score.bias is not None:
        of[SCORE_BIAS] = grad_bias
    return loss, Gradients(
        embedded=grad, layers=layers, norm=grad_norm, raw_logits=None, logits=grad_logits, weights=of
    )


def _last_places(input_ids: TokenIds, config: Gemma2Config) -> Int[np.ndarray, " batch"]:
    """Return the place at which each row is classified: `last_tokens`, or the last place if there is no pad token."""
    if config.pad_token_id is not None:
        return last_tokens(input_ids, config.pad_token_id)
    if len(input_ids) > 1:
        raise InputError(f"there are {len(input_ids)} sequences, but pad_token_id is None in the configuration; set it")
    return np.array([input_ids.shape[1] - 1])
