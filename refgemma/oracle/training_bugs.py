"""List the known bugs of trainers as data: in the loss, in a derivative, or in a sum of gradients.

Checked by introducing each bug into PyTorch, and by reading gradients from a trace
(tests/parity/test_trainers_parity.py).

Each is a `KnownBug` of the backward pass: an edit of the functions in `refgemma.oracle.backward_operations`. The
forward pass is correct, so only a trace with gradients can show such a bug.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refgemma import backward as back
from refgemma import ops
from refgemma.activations import gelu
from refgemma.heads import IGNORED
from refgemma.oracle.backward_operations import divide_by, loss_backward, rows, shift, sum_tokens
from refgemma.oracle.known_bugs import KnownBug, function, rewire
from refgemma.oracle.operations import Context, Operation
from refgemma.oracle.tolerance import ulp
from refgemma.precision import Array
from refgemma.trace.names import GRADS, LAYER_NORMS, field_of
from refgemma.weights.parameters import EMBED_TOKENS, NORM

# --- losses -----------------------------------------------------------------------------------------------------------


def labels_of(context: Context) -> Array:
    """Return the labels of the run."""
    assert context.call.labels is not None
    return context.call.labels


def with_labels(choose: Callable[[Context], Array]) -> Callable[[Array, Context], Array]:
    """Return a loss with other labels; `choose` gives the label for the logits at each place."""

    def loss(logits: Array, context: Context) -> Array:
        flat, labels = logits.reshape(-1, logits.shape[-1]), choose(context)
        return back.cross_entropy_backward(flat, labels.ravel(), context.call.num_items).reshape(logits.shape)

    return loss


def shift_again(context: Context) -> Array:
    """Return the labels shifted twice."""
    return shift(shift(labels_of(context)))


def with_padding(context: Context) -> Array:
    """Return the next token as label, also where it is padding."""
    hidden = ~context.call.visible
    return shift(np.where(hidden, context.call.input_ids, labels_of(context)))


def rescale_loss(factor: Callable[[Context], Any]) -> Callable[[Array, Context], Array]:
    """Return a loss that is multiplied by a factor, or by one factor per row."""
    return lambda logits, context: loss_backward(logits, context) * factor(context)


def per_row(context: Context) -> Array:
    """Return the factors per row that change a mean over all tokens to the mean of the rows' means."""
    counts = np.sum(shift(labels_of(context)) != IGNORED, axis=1)
    share = divide_by(context) / np.maximum(counts, 1) / len(counts)
    return np.asarray(share[:, None, None])


def by_all_places(context: Context) -> float:
    """Return the factor that changes the mean to one over all places, including ignored labels."""
    rows_of, places = labels_of(context).shape
    return divide_by(context) / float(rows_of * (places - 1))


# --- derivatives ------------------------------------------------------------------------------------------------------


def pass_through(grad: Array, x: Array, cap: float | None) -> Array:
    """Return the gradient of a soft cap as if the cap were the identity."""
    return grad


def slope_of_result(grad: Array, x: Array, cap: float | None) -> Array:
    """Return the gradient of a soft cap, with the slope taken at the result instead of the input."""
    return grad if cap is None else back.soft_cap_backward(grad, cap * np.tanh(x / cap), cap)


def norm_backward_by(
    input_gradient: Callable[[Array, Array, Array, float], Array],
) -> Callable[..., tuple[Array, Array]]:
    """Return the backward pass of a norm with another gradient of the input."""
    return lambda grad, x, weight, eps: (
        input_gradient(grad, x, weight, eps), back.rms_norm_backward(grad, x, weight, eps)[1]
    )  # fmt: skip


def inverse_root(x: Array, eps: float) -> Array:
    """Return ``1 / sqrt(mean(x**2) + eps)``."""
    return np.asarray(1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def norm_weight_by(
    weight_gradient: Callable[[Array, Array, Array, float], Array],
) -> Callable[..., tuple[Array, Array]]:
    """Return the backward pass of a norm with another gradient of the weight."""
    return lambda grad, x, weight, eps: (
        back.rms_norm_backward(grad, x, weight, eps)[0], weight_gradient(grad, x, weight, eps)
    )  # fmt: skip


def gelu_exact_backward(grad: Array, x: Array) -> Array:
    """Return the gradient of GELU with the error function."""
    return back.activation_backward(grad, x, gelu)


def first_copy(grad: Array, groups: int) -> Array:
    """Return the gradient from the first query head of those that share a key head."""
    return np.asarray(grad[:, ::groups])


def without_scale(grad: Array, q: Array, k: Array, scale: float) -> tuple[Array, Array]:
    """Return the gradients of queries and keys without the scale of the scores."""
    return back.attention_scores_backward(grad, q, k, 1.0)


def last_token_wins(grad: Array, ids: Array, vocab: int, scale: float) -> Array:
    """Return the gradient of the embedding table if equal tokens overwrite each other's gradient."""
    table = np.zeros((vocab, grad.shape[-1]))
    table[ids.ravel()] = rows(grad) * scale
    return table


def embed_as(compute: Callable[..., Array], scale: Callable[[Context], float]) -> Callable[[Context], Context]:
    """Return an edit with another gradient of the embedding table."""
    return lambda context: function(embed_backward=partial(compute, scale=scale(context)))(context)


def without_window(table: Mapping[str, Operation], context: Context) -> Iterator[Operation]:
    """Compute the attention weights again in the backward pass, with a causal mask but no window."""
    places = np.arange(context.call.input_ids.shape[1])
    seen = ops.causal_mask(places, places) & context.call.visible[:, None, None, :]

    def round_weights(grad: Array, probs: Array, value: Operation, storage: str) -> list[Array]:
        """Return the errors of a value's gradient; the weights are rounded again, before their product."""
        return [*value.stores(grad, probs, storage=storage), value.compute(np.abs(grad), ulp(probs, storage) / 2)]

    for layer in range(context.config.num_hidden_layers):
        a = f"layers.{layer}.attention."
        scores, value = table[f"grads.{a}capped"], table[f"grads.{a}v"]
        for op, stores in ((scores, scores.stores), (value, partial(round_weights, value=value))):
            yield replace(
                op, inputs=(op.inputs[0], a + "capped"),
                compute=lambda grad, x, op=op: op.compute(grad, ops.softmax(x, seen)),
                allowed=lambda grad, x, op=op: op.allowed(grad, ops.softmax(x, seen)),
                stores=lambda grad, x, storage, stores=stores: stores(grad, ops.softmax(x, seen), storage=storage),
            )  # fmt: skip


# --- the catalogue ----------------------------------------------------------------------------------------------------

LOSS, FINAL, CAPPED = ("grads.logits",), ("grads.raw_logits",), ("grads.attention.scores",)
SOFTMAX, TURNED, TABLE = (
    ("grads.attention.capped",),
    ("grads.attention.q", "grads.attention.k"),
    (field_of(GRADS + EMBED_TOKENS),),
)
SHARED = ("grads.attention.v", "grads.attention.k_rot")
ROTATED = ("grads.attention.q_rot", "grads.attention.k_rot")
NORM_INPUTS = ("grads.out", "grads.embedded", "grads.middle", "grads.attention.out", "grads.feed_forward.out")
NORM_WEIGHTS = (field_of(GRADS + NORM), *(f"grads.{norm}.weight" for norm in LAYER_NORMS))
RAGGED = "rows with different numbers of labels that count"
GITHUB = "https://github.com/"

TRAINING_BUGS: tuple[KnownBug, ...] = (
    # the loss
    KnownBug("loss-mean-of-means", "the loss is the mean of the rows' means, or of micro-batches of one row", LOSS,
             function(loss_backward=rescale_loss(per_row)), f"{GITHUB}ml-explore/mlx-lm/pull/1544", RAGGED,
             "num_items_in_batch, gradient_accumulation_steps"),
    KnownBug("loss-summed", "the losses of all tokens are added, not averaged", LOSS,
             function(loss_backward=rescale_loss(divide_by)), f"{GITHUB}karpathy/nanochat/pull/59",
             "more than one label that counts", "reduction"),
    KnownBug("loss-not-divided-by-steps", "the mean losses of rows, or of micro-batches of one row, are added", LOSS,
             function(loss_backward=rescale_loss(lambda c: per_row(c) * len(labels_of(c)))),
             f"{GITHUB}verl-project/verl/pull/3332", "more than one row", "gradient_accumulation_steps"),
    KnownBug("loss-divided-twice", "the mean over all tokens is also divided by the number of micro-batches of one row",
             LOSS, function(loss_backward=rescale_loss(lambda c: 1 / len(labels_of(c)))),
             f"{GITHUB}unslothai/unsloth-zoo/pull/1023", "more than one row", "model_accepts_loss_kwargs"),
    KnownBug("loss-ignored-in-denominator", "the sum of the losses is divided by all places, including ignored ones",
             LOSS, function(loss_backward=rescale_loss(by_all_places)), f"{GITHUB}NVIDIA/TransformerEngine/pull/2476",
             "a label that is ignored", "ignore_index", unless="loss-mean-of-means"),
    KnownBug("padding-counted", "padding tokens count as labels",
             LOSS, function(loss_backward=with_labels(with_padding)),
             f"{GITHUB}huggingface/transformers/issues/2759", "right padding", "labels of padding: -100"),
    KnownBug("labels-shifted-twice", "logits are compared with the token after the next one", LOSS,
             function(loss_backward=with_labels(shift_again)), f"{GITHUB}huggingface/transformers/pull/47395",
             "more than two tokens", "shift of the labels in the data and in the loss"),
    KnownBug("labels-not-shifted", "logits are compared with the token at their own place", LOSS,
             function(loss_backward=with_labels(labels_of)), f"{GITHUB}huggingface/transformers/issues/27517",
             knob="shift of the labels"),
    # soft caps
    KnownBug("final-softcap-no-derivative", "the soft cap of the logits passes the gradient unchanged", FINAL,
             function(soft_cap_backward=pass_through), "no public report",
             "logits not far below the cap", "backward of the fused loss"),
    KnownBug("final-softcap-slope-of-result", "the slope of the soft cap is taken at the result, not at the input",
             FINAL, function(soft_cap_backward=slope_of_result), "no public report", "logits not far below the cap",
             "tensor saved for the backward"),
    KnownBug("attn-softcap-no-derivative", "the soft cap of the scores passes the gradient unchanged", CAPPED,
             function(soft_cap_backward=pass_through), f"{GITHUB}Dao-AILab/flash-attention/issues/1065",
             "scores not far below the cap", "backward of the attention kernel"),
    KnownBug("attn-softcap-slope-of-result", "the slope of the soft cap is taken at the result, not at the input",
             CAPPED, function(soft_cap_backward=slope_of_result), "no public report", "scores not far below the cap",
             "tensor saved for the backward"),
    # attention
    KnownBug("softmax-no-row-sum", "p g instead of p (g - sum(p g)): the sum over the row is missing", SOFTMAX,
             function(softmax_backward=lambda grad, probs: grad * probs),
             "no public report; deeplearning4j/libnd4j #440 lacks this sum, too", knob="backward of softmax"),
    KnownBug("attn-scores-detached", "no gradient goes back through the attention weights", SOFTMAX,
             function(softmax_backward=lambda grad, probs: 0 * grad), f"{GITHUB}huggingface/candle/pull/3612",
             "more than one token", "operations without a backward"),
    KnownBug("attn-scale-missing-in-backward", "gradients of queries and keys lack the scale of the scores", ROTATED,
             function(attention_scores_backward=without_scale), "no public report",
             knob="softmax scale in the backward"),
    KnownBug("attn-backward-without-window", "the backward pass recomputes the attention weights without the window",
             (*SOFTMAX, "grads.attention.v"), rewire(without_window), f"{GITHUB}meta-pytorch/MSLK/pull/263",
             "more tokens than the window", "window_size of the backward kernel"),
    KnownBug("gqa-gradient-averaged", "a key head gets the mean, not the sum, of its query heads' gradients", SHARED,
             function(repeat_kv_backward=lambda grad, groups: back.repeat_kv_backward(grad, groups) / groups),
             "no public report", "more query heads than key heads", "repeat_kv"),
    KnownBug("gqa-gradient-of-one-head", "a key head gets the gradient of only one of its query heads", SHARED,
             function(repeat_kv_backward=first_copy), f"{GITHUB}ooples/AiDotNet.Tensors/pull/633",
             "more query heads than key heads", "sum over query heads of dK and dV"),
    KnownBug("rope-gradient-turned-forwards",
             "gradients of queries and keys are rotated as in the forward pass, not back", TURNED,
             function(rotate_backward=ops.rotate), "no public report; ngxson/llama.cpp #59 exchanges the flags",
             "a position other than 0", "sign of sin in the backward"),
    KnownBug("rope-gradient-not-turned", "gradients of queries and keys are not rotated back", TURNED,
             function(rotate_backward=lambda grad, cos, sin: grad), f"{GITHUB}naver/croco/issues/49",
             "a position other than 0", "backward of rope"),
    # feed-forward
    KnownBug("gelu-exact-in-backward", "the slope is that of GELU with the error function",
             ("grads.feed_forward.gate",),
             function(gelu_tanh_backward=gelu_exact_backward), f"{GITHUB}tensorflow/tensorflow/issues/47724",
             knob="approximate of the backward"),
    KnownBug("gelu-slope-missing", "GELU passes the gradient unchanged", ("grads.feed_forward.gate",),
             function(gelu_tanh_backward=lambda grad, x: grad), "no public report", knob="backward of GELU"),
    KnownBug("gate-up-gradients-exchanged", "gate gets up's gradient, and up gets gate's",
             ("grads.feed_forward.gelu", "grads.feed_forward.up"),
             function(product_backward=lambda grad, gate, up: (grad * gate, grad * up)),
             "no public report; unsloth #3314 suspects it",
             knob="rule of products"),
    # norms
    KnownBug("norm-weight-for-1-plus-weight", "gradients of a norm's input have the factor w instead of 1 + w",
             NORM_INPUTS,
             function(rms_norm_backward=norm_backward_by(
                 lambda grad, x, weight, eps: back.rms_norm_backward(grad, x, weight - 1, eps)[0])),
             "no public report; Liger-Kernel #74 has it in the forward pass", knob="offset of the backward"),
    KnownBug("norm-weight-missing-in-backward", "gradients of a norm's input lack the factor 1 + w", NORM_INPUTS,
             function(rms_norm_backward=norm_backward_by(
                 lambda grad, x, weight, eps: back.rms_norm_backward(grad, x, 0 * weight, eps)[0])),
             f"{GITHUB}karpathy/llm.c/pull/763", knob="weight in the backward"),
    KnownBug("norm-projection-missing", "the gradient treats the root mean square as a constant", NORM_INPUTS,
             function(rms_norm_backward=norm_backward_by(
                 lambda grad, x, weight, eps: grad * (1 + weight) * inverse_root(x, eps))),
             "no public report; attorch #17 has this term wrong, not missing",
             knob="gradient through the root mean square"),
    KnownBug("norm-weight-gradient-of-input", "gradients of a norm's weight use the input instead of the normed input",
             NORM_WEIGHTS, function(rms_norm_backward=norm_weight_by(
                 lambda grad, x, weight, eps: np.sum(rows(grad * x), axis=0))),
             "no public report", knob="gradient of the weight"),
    KnownBug("norm-weight-gradient-missing", "norms' weights get no gradient", NORM_WEIGHTS,
             function(rms_norm_backward=norm_weight_by(lambda grad, x, weight, eps: 0 * weight)),
             f"{GITHUB}unslothai/unsloth/pull/4550", knob="gradient of the weight"),
    # residual stream and embedding
    KnownBug("residual-gradient-missing", "the gradient does not bypass attention and feed-forward",
             ("grads.out", "grads.embedded", "grads.middle"),
             function(residual_backward=lambda stream, through: through), f"{GITHUB}paiml/entrenar/issues/313",
             knob="sum of both gradients"),
    KnownBug("tied-embedding-head-only", "a tied table gets only the gradient of the head, not of the embedding", TABLE,
             function(tied_backward=lambda embedding, head: head), f"{GITHUB}paiml/entrenar/issues/314",
             "a model with a tied head", "tie_word_embeddings"),
    KnownBug("tied-embedding-embedding-only", "a tied table gets only the gradient of the embedding, not of the head",
             TABLE,
             function(tied_backward=lambda embedding, head: embedding), f"{GITHUB}paiml/entrenar/issues/314",
             "a model with a tied head", "tie_word_embeddings"),
    KnownBug("embedding-gradient-unscaled", "the gradient of the embedding lacks the factor sqrt(hidden)", TABLE,
             embed_as(sum_tokens, lambda context: 1.0), "no public report", knob="normalizer in the backward"),
    KnownBug("embedding-last-token-wins", "equal tokens overwrite each other's gradient", TABLE,
             embed_as(last_token_wins, Context.embedding_scale), f"{GITHUB}tenstorrent/tt-metal/issues/6232",
             "a token that occurs twice", "scatter without a sum"),
)  # fmt: skip
