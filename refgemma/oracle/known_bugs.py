"""List the known bugs of Gemma 2 ports as data: the change, the first tensor that shows it, and where it was seen.

Checked by introducing each bug into transformers (``docs/oracle.md`` has the table).

A known bug is an edit of a `Context`: another number of the configuration, or other functions, masks, weights or
connections. The model itself contains no code for bugs.

``kind`` gives the severity. A *mistake* is a different model. *rounding* is the same model with different rounding;
some released implementations do this on purpose, so it is only reported. A *stage* bug is not in an operation but in
the tokens, shapes or weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from refgemma import activations, ops
from refgemma.config import FULL, SLIDING, ConfigError, Gemma2Config
from refgemma.layers import merge_heads
from refgemma.oracle.operations import Context, Operation, operations, window_mask
from refgemma.oracle.tolerance import FORMATS, Arithmetic, one_rounding, ulp
from refgemma.precision import Array, as_dtype, as_float64, bf16, dtype_name, narrow, wide
from refgemma.trace.candidate import Call
from refgemma.trace.names import LAYER_NORMS, field_of, layer_of
from refgemma.weights.parameters import LayerWeights, Weights

Change = Callable[[Context], Context]


@dataclass(frozen=True)
class KnownBug:
    """One known bug.

    Parameters
    ----------
    name : str
        The bug's name in reports.
    says : str
        A description of the wrong computation.
    fields : tuple of str
        The tensors that differ, in the order of execution; ``attention.probs`` means this tensor in every layer.
    change : callable
        The edit, or ``None`` for bugs in the tokens, shapes or weights.
    seen : str
        Where the bug was seen; ``no public report`` if a search found nothing, ``unverified`` without a search.
    shows : str
        The inputs and precisions that can show the bug.
    knob : str
        The part of a port to look at.
    kind : str
        ``mistake``, ``rounding`` or ``stage``.
    ways : tuple of callable
        Other edits for the same bug, if engines or compilers round its steps differently.
    unless : str
        Another bug; if both explain a tensor, only the other is named.
    layers : tuple of int
        The layers with the bug; empty for all layers.
    """

    name: str
    says: str
    fields: tuple[str, ...]
    change: Change | None
    seen: str
    shows: str = "any input"
    knob: str = ""
    kind: str = "mistake"
    ways: tuple[Change, ...] = ()
    unless: str = ""
    layers: tuple[int, ...] = ()

    def table(self, context: Context, usual: Mapping[str, Operation]) -> dict[str, Operation]:
        """Return all operations, with this bug's changes to `fields` in its layers."""
        if self.change is None:
            return dict(usual)
        try:
            changed = operations(self.change(context))
        except ConfigError:  # the bug's numbers are impossible, such as twice the largest window
            return dict(usual)
        return {name: changed[name] if self.is_in(name) else op for name, op in usual.items()}

    def is_in(self, name: str) -> bool:
        """Return True if the bug changes the operation of a tensor."""
        return field_of(name) in self.fields and (not self.layers or layer_of(name) in self.layers)


# --- edits ------------------------------------------------------------------------------------------------------------

Table = dict[str, Operation]


def config(**changes: Any) -> Change:
    """Return an edit that changes numbers of the configuration; a callable value gets the context."""

    def change(context: Context) -> Context:
        values = {name: value(context) if callable(value) else value for name, value in changes.items()}
        return replace(context, config=context.config.changed(**values))

    return change


def function(**functions: Callable[..., Any]) -> Change:
    """Return an edit that replaces functions."""
    return lambda context: replace(context, functions=dict(context.functions) | functions)


def in_storage(name: str, make: Callable[[str], Callable[..., Any]]) -> Change:
    """Return an edit that replaces a function by one that rounds itself; `make` makes it for a precision."""
    return lambda context: function(**{name: make(context.arithmetic.storage)})(context)


def in_float32(change: Change) -> Change:
    """Return an edit for float32 only, because half precision rounds there anyway."""
    return lambda context: context if context.arithmetic.storage in FORMATS else change(context)


def mask(rule: Callable[[Context, int], Array]) -> Change:
    """Return an edit that replaces the mask."""
    return lambda context: replace(context, mask=rule)


def change_positions(rule: Callable[[Context], Array]) -> Change:
    """Return an edit that replaces the positions."""
    return lambda context: replace(context, call=replace(context.call, positions=rule(context)))


def layer_weights(edit: Callable[[LayerWeights, Context], LayerWeights]) -> Change:
    """Return an edit that changes each layer's weights."""
    return lambda context: replace(context, layer_weights=edit)


def rewire(edit: Callable[[Table, Context], Iterable[Operation]]) -> Change:
    """Return an edit that replaces operations, by name, by others with different inputs or functions."""
    return lambda context: replace(context, rewire=lambda table, c: {op.name: op for op in edit(table, c)})


def round_operands(storage: str, **places: int | tuple[int, ...]) -> Change:
    """Return an edit that rounds operands to `storage`; `places` maps the last word of a field to the operands'
    indices."""

    def edit(table: Table, context: Context) -> Iterator[Operation]:
        for op in _of_field(table, *(f"attention.{word}" for word in places)):
            chosen = np.atleast_1d(places[op.name.rpartition(".")[2]]).tolist()

            def compute(*inputs: Array, op: Operation = op, chosen: list[int] = chosen) -> Array:
                rounded = (
                    narrow(as_float64(as_dtype(wide(x), storage)), like=x) if n in chosen else x
                    for n, x in enumerate(inputs)
                )
                return op.compute(*rounded)

            yield replace(op, compute=compute)

    return in_float32(rewire(edit))


def edit_model(
    change: Change, config: Gemma2Config, weights: Weights
) -> tuple[Gemma2Config, Weights, Mapping[str, Callable[..., Any]]]:
    """Return configuration, weights and functions of a model with an edit; changes of masks and connections are left
    out."""
    usual = _make_context(config, weights)
    edited = change(usual)
    if edited.layer_weights is not usual.layer_weights:
        weights = replace(weights, layers=[edited.layer(n) for n in range(config.num_hidden_layers)])
    return edited.config, weights, edited.functions


def edit_config(change: Change | None, config: Gemma2Config) -> Gemma2Config:
    """Return the configuration with an edit; it is unchanged if the bug is elsewhere."""
    table = np.zeros((1, 1), np.float32)
    try:
        return config if change is None else change(_make_context(config, Weights(table, [], table[0]))).config
    except ConfigError:  # impossible numbers
        return config


def _make_context(config: Gemma2Config, weights: Weights) -> Context:
    """Return a context of one token, for edits that do not depend on the tokens."""
    nowhere = np.zeros((1, 1), np.int64)
    call, arithmetic = Call(nowhere, nowhere, nowhere == 0, (1,)), Arithmetic(dtype_name(weights.norm))
    return Context(config, weights, call, arithmetic, exact=False)


# --- soft caps --------------------------------------------------------------------------------------------------------


def soft_cap_by(formula: Callable[[Array, float], Array]) -> Callable[[Array, float | None], Array]:
    """Return a soft cap with another formula, which returns its input if there is no cap."""
    return lambda x, cap: x if cap is None else formula(x, cap)


x_times_tanh = soft_cap_by(lambda x, cap: np.tanh(x / cap) * x)
cut_off = soft_cap_by(lambda x, cap: np.clip(x, -cap, cap))
cap_undivided = soft_cap_by(lambda x, cap: np.tanh(x) * cap)
cap_unmultiplied = soft_cap_by(lambda x, cap: np.tanh(x / cap))
cap_twice = soft_cap_by(lambda x, cap: ops.soft_cap(ops.soft_cap(x, cap), cap))
# Subtracts a row's largest number first.
cap_of_difference = soft_cap_by(lambda x, cap: ops.soft_cap(x - np.max(x, axis=-1, keepdims=True), cap))
cap_in_half = soft_cap_by(lambda x, cap: narrow(wide(ops.soft_cap(bf16(wide(x)), cap)), like=x))


def cap_none_as_zero(x: Array, cap: float | None) -> Array:
    """Treat a missing cap as 0.0, which makes everything 0."""
    return x * 0 if cap is None else ops.soft_cap(x, cap)


@soft_cap_by
def naive_tanh(x: Array, cap: float) -> Array:
    """Return a cap whose ``tanh`` is computed from ``exp(2 x)``, which overflows in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(wide(2 * (x / cap)).astype(np.float32))
        return narrow((e - 1) / (e + 1) * np.float32(cap), like=x)


def _of_field(table: Table, *fields: str) -> Iterator[Operation]:
    return (op for name, op in table.items() if field_of(name) in fields)


def first_key_uncapped(table: Table, context: Context) -> Iterator[Operation]:
    """Leave the score of the first visible key uncapped."""
    for op in _of_field(table, "attention.capped"):

        def compute(x: Array, op: Operation = op) -> Array:
            seen = window_mask(context, layer_of(op.name) or 0)
            return np.where(seen & (np.cumsum(seen, axis=-1) == 1), x, op.compute(x))

        yield replace(op, compute=compute)


def uncapped_in(chosen: Callable[[int, int], bool]) -> Change:
    """Return an edit that leaves scores uncapped in some calls; `chosen` gets a call's number and number of tokens."""

    def edit(table: Table, context: Context) -> Iterator[Operation]:
        calls = context.call.calls
        rows = np.repeat([chosen(n, count) for n, count in enumerate(calls)], calls)[:, None]
        for op in _of_field(table, "attention.capped"):
            yield replace(op, compute=lambda x, op=op: np.where(rows, x, op.compute(x)))

    return rewire(edit)


def capped_after_mask(context: Context) -> Context:
    """Cap the minus infinity of masked keys to ``-cap``."""
    cap = context.config.attn_logit_softcapping
    return function(softmax=softmax_over_all if cap is None else hidden_keys_at(-cap))(context)


def cap_before_scale(table: Table, context: Context) -> Iterator[Operation]:
    """Cap the product of query and key, and scale it afterwards."""
    scale = context.config.attention_scale
    for op in _of_field(table, "attention.capped"):
        yield replace(op, compute=lambda x, op=op: op.compute(x / scale) * scale)


def _then_capped(op: Operation, cap: float | None, storage: str) -> Operation:
    """Return an operation whose result is capped; half precision rounds the result first, and each step of the cap."""

    def compute(*inputs: Array) -> Array:
        result = op.compute(*inputs)
        return as_float64(ops.soft_cap(as_dtype(result, storage) if storage in FORMATS else result, cap))

    return replace(op, compute=compute)


def output_capped(table: Table, context: Context) -> Iterator[Operation]:
    """Cap the mixed values instead of the scores."""
    cap, storage = context.config.attn_logit_softcapping, context.arithmetic.storage
    for op in _of_field(table, "attention.capped"):
        yield _pass(op.name, *op.inputs)
    for op in _of_field(table, "attention.mixed"):
        yield _then_capped(op, cap, storage)


def hidden_capped(table: Table, context: Context) -> Iterator[Operation]:
    """Cap the last hidden state instead of the logits."""
    yield _then_capped(table["norm"], context.config.final_logit_softcapping, context.arithmetic.storage)
    yield _pass("logits", "raw_logits")


# --- scores and heads -------------------------------------------------------------------------------------------------


def scaled_query_in(storage: str) -> Callable[..., Array]:
    """Return scores for which the query, not the product, is scaled and rounded."""

    def scores(q: Array, k: Array, scale: float) -> Array:
        query = as_float64(as_dtype(wide(q) * scale, storage))
        return narrow(query @ as_float64(k).swapaxes(-1, -2), like=q)

    return scores


def tile_heads(x: Array, groups: int) -> Array:
    """Return key heads in the order 0, 1, 0, 1 instead of 0, 0, 1, 1."""
    return np.tile(x, (1, groups, 1, 1))


def key_heads(choose: Callable[[Array, int], Array]) -> Change:
    """Return an edit that uses other key heads; `choose` gets the correct heads and the number of key heads."""

    def repeat(x: Array, groups: int) -> Array:
        right = np.repeat(np.arange(x.shape[1]), groups)
        return x[:, choose(right, x.shape[1])]

    return function(repeat_kv=repeat)


def softmax_over_all(scores: Array, mask: Array) -> Array:
    """Return a softmax over all keys, including masked ones."""
    return ops.softmax(scores, np.ones_like(mask))


def mask_added(table: Table, context: Context) -> Iterator[Operation]:
    """Add a boolean mask to the scores, so that visible keys get 1 more; no key in the cache is hidden.

    A call sees no key of a later call. Sliding layers keep the window before the call.
    """
    storage, call = context.arithmetic.storage, context.call
    (_, k), starts = _places(context), call.starts[:, None]
    ends = np.repeat(np.cumsum(call.calls), call.calls)[:, None]
    for op in _of_field(table, "attention.probs"):
        layer = layer_of(op.name) or 0
        window = context.config.sliding_window if context.config.is_sliding(layer) else ends.max()
        kept = (k < ends) & ((starts == 0) | (k > starts - window))

        seen = window_mask(context, layer)

        def compute(scores: Array, seen: Array = seen, kept: Array = kept) -> Array:
            added = as_float64(as_dtype(as_float64(scores) + seen, storage))
            return ops.softmax(narrow(added, like=scores), np.broadcast_to(kept, seen.shape))

        yield replace(op, compute=compute)


def hidden_keys_at(score: float) -> Callable[[Array, Array], Array]:
    """Return a softmax in which hidden keys have this score instead of minus infinity."""
    return lambda scores, mask: softmax_over_all(np.where(mask, scores, score), mask)


def flash_in_f16(table: Table, context: Context) -> Iterator[Operation]:
    """Add the weighted values key by key in float16, with weights relative to the largest score so far."""
    groups = context.config.num_attention_heads // context.config.num_key_value_heads

    def mixed(probs: Array, values: Array) -> Array:
        p, v = as_float64(probs), np.repeat(as_dtype(as_float64(values), "float16"), groups, axis=1)
        total, top = as_dtype(np.zeros((*p.shape[:-1], v.shape[-1])), "float16"), np.zeros((*p.shape[:-1], 1))
        for key in range(p.shape[-1]):
            new = np.maximum(top, p[..., key, None])
            scale, weight = (as_float64(x) / np.where(new > 0, new, 1) for x in (top, p[..., key, None]))
            total = np.where(new > top, as_dtype(as_float64(total) * scale, "float16"), total)
            added = as_dtype(as_float64(total) + as_float64(v[..., key, None, :]) * weight, "float16")
            total, top = np.where(weight > 0, added, total), new
        return np.asarray(merge_heads(as_float64(total) * top))

    for op in _of_field(table, "attention.mixed"):
        yield replace(op, compute=mixed)


def also(change: Change, edit: Callable[[Table, Context], Iterable[Operation]]) -> Change:
    """Return an edit that replaces more operations than `change` does."""

    def changed(context: Context) -> Context:
        first = change(context)
        return rewire(lambda table, c: (*first.rewire(table, c).values(), *edit(table, c)))(first)

    return changed


# --- norms ------------------------------------------------------------------------------------------------------------

Norm = Callable[[Array, Array, float], Array]


def norm_offset(offset: float) -> Norm:
    """Return a norm with ``offset + weight`` instead of ``1 + weight``."""
    return lambda x, weight, eps: ops.rms_norm(x, narrow(wide(weight) + (offset - 1), like=np.zeros(0)), eps)


def norm_by(size: Callable[[Array, float], Array]) -> Norm:
    """Return a norm that divides by `size`, not by ``sqrt(mean(x**2) + eps)``."""
    return lambda x, weight, eps: narrow(wide(x) / size(wide(x), eps) * (1 + wide(weight)), like=x)


def _mean_square(x: Array) -> Array:
    return np.asarray(np.mean(x * x, axis=-1, keepdims=True))


eps_outside = norm_by(lambda x, eps: np.sqrt(_mean_square(x)) + eps)
norm_without_root = norm_by(lambda x, eps: _mean_square(x) + eps)
norm_of_sum = norm_by(lambda x, eps: np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps))
norm_of_all = norm_by(lambda x, eps: np.sqrt(np.mean(x * x) + eps))


def norm_without_factor(x: Array, weight: Array, eps: float) -> Array:
    """Return ``x / rms(x)``, without the weight."""
    return ops.rms_norm(x, np.zeros_like(weight), eps)


def mean_subtracted(x: Array, weight: Array, eps: float) -> Array:
    """Return a LayerNorm, which subtracts the mean."""
    return ops.rms_norm(narrow(wide(x) - np.mean(wide(x), axis=-1, keepdims=True), like=x), weight, eps)


def norm_in_steps(x: Array, weight: Array, eps: float) -> Array:
    """Return a norm with each step rounded to the precision of the input."""
    y: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1 + weight)
    return y


def norm_cast_early(storage: str) -> Norm:
    """Return a norm in Llama's order: round first, then multiply by the weight."""

    def norm(x: Array, weight: Array, eps: float) -> Array:
        normed = as_dtype(ops.rms_norm(as_float64(x), np.zeros(x.shape[-1]), eps), storage)
        return narrow(wide(normed * as_dtype(1 + wide(weight), storage)), like=x)

    return norm


def norm_in_storage(storage: str, squares: bool = True, root: bool = False) -> Norm:
    """Return a norm that rounds each step, as arithmetic in the precision of the input does.

    A compiler fuses the first two steps, so that the `squares` are not rounded. On a CPU, PyTorch rounds the square
    `root` only in rows that do not fill a whole vector.
    """

    def keep(y: Array) -> Array:
        return as_float64(as_dtype(y, storage))

    def norm(x: Array, weight: Array, eps: float) -> Array:
        square = as_float64(x) ** 2
        mean = keep(np.mean(keep(square) if squares else square, axis=-1, keepdims=True))
        size = np.sqrt(keep(mean + keep(np.array(eps))))
        return narrow(
            keep(keep(as_float64(x) * keep(1 / (keep(size) if root else size))) * keep(1 + as_float64(weight))), like=x
        )

    return norm


NORM_WAYS = tuple(
    in_storage("rms_norm", partial(norm_in_storage, squares=squares, root=root))
    for squares in (True, False)
    for root in (False, True)
)


def norm_weight_in_storage(storage: str) -> Norm:
    """Return a norm with ``1 + weight`` rounded to half precision."""
    return lambda x, weight, eps: ops.rms_norm(x, as_float64(as_dtype(1 + wide(weight), storage)) - 1, eps)


def norm_weight_in(storage: str) -> Change:
    """Return an edit that rounds ``1 + weight`` to half precision in a float32 engine."""
    return in_float32(function(rms_norm=norm_weight_in_storage(storage)))


def _pass(name: str, source: str) -> Operation:
    """Return an operation that returns its input unchanged."""
    return Operation(name, (source,), lambda x: x + 0, one_rounding)


def _norm_sum(norm: Operation, left: str, right: str) -> Operation:
    """Return a norm of a sum. Rounding the sum causes the same relative error in the result."""

    def stores(h: Array, a: Array, storage: str) -> list[Array]:
        step = ulp(h + a, storage) / 2
        return [np.abs(norm.compute(h + a)) * step / np.maximum(np.abs(h + a), 1e-300)]

    return Operation(
        norm.name, (left, right), lambda h, a: norm.compute(h + a), lambda h, a: norm.allowed(h + a), stores
    )


def norm_after_residual(table: Table, context: Context) -> Iterator[Operation]:
    """Apply the post-attention norm to the sum."""
    for middle in _of_field(table, "middle"):
        stream, normed = middle.inputs
        yield _norm_sum(table[normed], stream, *table[normed].inputs)
        yield _pass(middle.name, normed)


def llama_block(table: Table, context: Context) -> Iterator[Operation]:
    """Use Llama's two norms; the norm named post-attention gives the input of the feed-forward layer."""
    for middle in _of_field(table, "middle"):
        p, (stream, normed) = middle.name.removesuffix("middle"), middle.inputs
        attended = table[normed].inputs
        yield replace(middle, inputs=(stream, *attended))
        yield _norm_sum(table[normed], stream, *attended)
        yield _pass(p + "pre_feedforward_layernorm", normed)
        yield _pass(p + "post_feedforward_layernorm", p + "feed_forward.out")


def norms_of_unrounded_sums(table: Table, context: Context) -> Iterator[Operation]:
    """Use the sum of the residual stream as it is before it is rounded; only the stream itself is rounded."""
    for op in _of_field(table, "input_layernorm", "pre_feedforward_layernorm", "norm"):
        if field_of(op.inputs[0]) in ("middle", "out"):

            def compute(h: Array, a: Array, op: Operation = op) -> Array:
                return narrow(op.compute(wide(h) + wide(a)), like=h)

            yield replace(_norm_sum(op, *table[op.inputs[0]].inputs), compute=compute)


def without(*norms: str) -> Change:
    """Return an edit that leaves out norms."""
    return rewire(lambda table, context: (_pass(op.name, *op.inputs) for op in _of_field(table, *norms)))


def exporter_norms(weights: LayerWeights, context: Context) -> LayerWeights:
    """Move the pre-feed-forward norm's weight to the post-attention norm, and replace it by zeros."""
    kept = weights.pre_feedforward_layernorm
    return replace(weights, post_attention_layernorm=kept, pre_feedforward_layernorm=np.zeros_like(kept))


# --- embedding and head -----------------------------------------------------------------------------------------------


def scaled_embedding(scale: Callable[[Context], float]) -> Change:
    """Return an edit that multiplies the embeddings by another number."""

    def embed(context: Context) -> Array:
        rows = context.weights.embed_tokens[context.call.input_ids]
        found = as_float64(rows) * scale(context)
        return found if context.exact else narrow(found, like=rows)

    return function(embed=embed)


def in_half(result: Callable[..., Array]) -> Callable[..., Array]:
    """Return a function whose result is rounded to bfloat16."""
    return lambda x, *rest: narrow(wide(bf16(wide(result(x, *rest)))), like=x)


def scale_in_decimals(decimals: int) -> Change:
    """Return an edit with ``sqrt(hidden)`` rounded to `decimals` decimals."""
    return in_float32(scaled_embedding(lambda c: round(math.sqrt(c.config.hidden_size), decimals)))


# --- feed-forward -----------------------------------------------------------------------------------------------------


def activation(formula: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return another activation, computed in float64 and rounded once."""
    return lambda x: narrow(formula(as_float64(x)), like=x)


@activation
def gelu_by_table(x: Array) -> Array:
    """Return GELU from a table of float16 numbers for float16 inputs; beyond 10, x or 0."""
    half = as_float64(as_dtype(np.clip(x, -10, 10), "float16"))
    looked_up = as_float64(as_dtype(ops.gelu_tanh(half), "float16"))
    return np.where(x <= -10, 0, np.where(x >= 10, x, looked_up))


ROOT = math.sqrt(2 / math.pi)
gelu_without_cube = activation(lambda x: 0.5 * x * (1 + np.tanh(ROOT * x)))
gelu_cube_outside = activation(
    lambda x: 0.5 * x * (1 + np.tanh(ROOT * x + 0.044715 * x**3))
)  # the cube is not multiplied by the root
gelu_without_half = activation(lambda x: 2 * ops.gelu_tanh(x))


def swapped_gate(weights: LayerWeights, context: Context) -> LayerWeights:
    """Exchange the weights of gate and up."""
    return replace(weights, gate_proj=weights.up_proj, up_proj=weights.gate_proj)


def reshaped_gate(weights: LayerWeights, context: Context) -> LayerWeights:
    """Read gate and up as reshaped matrices where they should be transposed."""
    gate, up = (np.ascontiguousarray(x).reshape(x.shape[::-1]).T for x in (weights.gate_proj, weights.up_proj))
    return replace(weights, gate_proj=gate, up_proj=up)


def activated_up(table: Table, context: Context) -> Iterator[Operation]:
    """Apply the activation to up instead of gate."""
    for product in _of_field(table, "feed_forward.product"):
        gelu, up = product.inputs
        yield replace(table[gelu], inputs=(up,))
        yield replace(product, inputs=(gelu, *table[gelu].inputs))


# --- rotary positions -------------------------------------------------------------------------------------------------


def neighbours(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs ``(2 i, 2 i + 1)``."""
    half = x.shape[-1] // 2
    even, odd = x[..., ::2], x[..., 1::2]
    turned = [even * cos[..., :half] - odd * sin[..., :half], odd * cos[..., :half] + even * sin[..., :half]]
    return np.stack(turned, axis=-1).reshape(x.shape)


def rotate_in_place(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate in place: compute the second half from the first half's result."""
    first, second = np.split(x, 2, axis=-1)
    cos1, cos2 = np.split(cos, 2, axis=-1)
    sin1, sin2 = np.split(sin, 2, axis=-1)
    turned = first * cos1 - second * sin1
    return np.concatenate([turned, second * cos2 + turned * sin2], axis=-1)


def leave_unturned(x: Array, cos: Array, sin: Array) -> Array:
    """Return the input without rotation."""
    return x + 0


def turned_back(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate in the opposite direction."""
    return ops.rotate(x, cos, -sin)


def cos_for_sin(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate with cosine and sine exchanged."""
    return ops.rotate(x, sin, cos)


def rotate_by(partner: Callable[[Array], Array]) -> Callable[[Array, Array, Array], Array]:
    """Return ``x cos + y sin`` with another `y`. (The correct `y` exchanges the halves and negates one.)"""
    return lambda x, cos, sin: x * cos + partner(x) * sin


# Rotates the pairs (2 i, 2 i + 1), but with the angles for halves.
neighbours_by_place = rotate_by(lambda x: np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape))
turned_without_minus = rotate_by(lambda x: np.roll(x, x.shape[-1] // 2, axis=-1))
turned_in_place = rotate_by(lambda x: x)


def tables_of(angles: Callable[..., Array]) -> Callable[..., Any]:
    """Return a function that makes rotary tables from other angles."""

    def tables(positions: Array, head_dim: int, theta: float, like: Array) -> tuple[Array, Array]:
        half = as_float64(angles(positions[:, None, :, None], head_dim, theta))
        both = np.concatenate([half, half], axis=-1)
        return narrow(np.cos(both), like), narrow(np.sin(both), like)

    return tables


def frequencies(head_dim: int, theta: float) -> Array:
    """Return the frequencies ``theta ** (-2 i / head_dim)``."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def angles_in_half(positions: Array, head_dim: int, theta: float) -> Array:
    """Return angles from rounded positions, rounded to bfloat16 again."""
    return wide(bf16(positions) * bf16(frequencies(head_dim, theta)))


def angles_in_tf32(positions: Array, head_dim: int, theta: float) -> Array:
    """Return angles from a matrix product that rounds its inputs to ten bits."""
    return _tf32(positions) * _tf32(frequencies(head_dim, theta))


def angles_of_frequencies_in(storage: str) -> Callable[..., Array]:
    """Return float32 angles with frequencies rounded to half precision."""

    def angles(positions: Array, head_dim: int, theta: float) -> Array:
        return as_float64(positions) * as_float64(as_dtype(frequencies(head_dim, theta), storage))

    return angles


def beyond_tf32(change: Change) -> Change:
    """Return an edit for runs with positions above the eleven bits of TF32, because smaller positions show no
    difference."""
    return lambda context: change(context) if np.max(context.call.positions, initial=0) > 2048 else context


def turned_in_part(pairs_of_part: bool) -> Change:
    """Return an edit that rotates half of each head, pairing numbers inside this half or across the whole head."""

    def edit(table: Table, context: Context) -> Iterator[Operation]:
        d = context.config.head_dim
        part = d // 4 * 2
        own = ops.rotary_tables(context.call.positions, part, context.config.rope_theta, np.zeros(0))

        def turn(x: Array, cos: Array, sin: Array) -> Array:
            if pairs_of_part:
                c, s = (narrow(table, like=x) for table in own)
                return np.concatenate([ops.rotate(x[..., :part], c, s), x[..., part:]], axis=-1)
            turned = np.tile(np.arange(d // 2) < part // 2, 2)
            return np.where(turned, ops.rotate(x, cos, sin), x)

        for op in _of_field(table, *TURNED):
            yield replace(op, compute=turn)

    return rewire(edit)


def _tf32(x: Array) -> Array:
    """Round to 10 bits after the leading bit, as tensor cores do with float32 inputs."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    kept = (bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return as_float64(kept.view(np.float32))


def without_pads(context: Context) -> Array:
    """Return positions that do not count padding."""
    return np.asarray(np.maximum(np.cumsum(context.call.visible, axis=1) - 1, 0))


def restart_positions(context: Context) -> Array:
    """Return positions that begin at 0 in each call."""
    return np.subtract(context.call.positions, context.call.starts)


def frozen_at_window(context: Context) -> Array:
    """Return positions that take the cache's length from a sliding layer, where it never exceeds the window."""
    call = context.call
    kept = np.minimum(call.starts, context.config.sliding_window - 1)
    return np.broadcast_to(kept + np.arange(len(kept)) - call.starts, call.positions.shape)


def half_swapped_rows(weights: LayerWeights, context: Context) -> LayerWeights:
    """Return query and key weights with rows in the order for rotating adjacent pairs."""
    d = context.config.head_dim
    q, k = (interleave(x, d) for x in (weights.q_proj, weights.k_proj))
    return replace(weights, q_proj=q, k_proj=k)


def interleave(x: Array, head_dim: int, parts: int = 2) -> Array:
    """Return the rows of each head in the order for adjacent pairs, as in llama.cpp's conversion of Llama.

    With ``parts=head_dim // 2``, it is the inverse.

    Examples
    --------
    >>> interleave(np.arange(4)[:, None], head_dim=4).ravel().tolist()
    [0, 2, 1, 3]
    """
    rows = x.reshape(-1, parts, head_dim // parts, x.shape[-1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(x.shape)


# --- masks ------------------------------------------------------------------------------------------------------------


def window_both_ways(q_places: Array, k_places: Array, window: int) -> Array:
    """Return a mask whose window extends equally far before and after the query."""
    return np.asarray(np.abs(q_places[:, None] - k_places) < window)


def window_open_ahead(q_places: Array, k_places: Array, window: int) -> Array:
    """Return a mask that is true from the window's first key to the last key of all."""
    return np.asarray(k_places > q_places[:, None] - window)


def layer_types(is_sliding: Callable[[Context, int], bool]) -> Change:
    """Return an edit that chooses other layer types by layer number."""

    def types(context: Context) -> tuple[str, ...]:
        return tuple(SLIDING if is_sliding(context, n) else FULL for n in range(context.config.num_hidden_layers))

    return config(layer_types=types)


def sliding_window(change: Callable[[int], int]) -> Change:
    """Return an edit that changes the window."""
    return config(sliding_window=lambda c: max(1, change(c.config.sliding_window)))


def _places(context: Context) -> tuple[Array, Array]:
    n = np.arange(context.call.input_ids.shape[1])
    return n[:, None], n


def _unless_padding(seen: Array, context: Context) -> Array:
    return np.asarray(seen & context.call.visible[:, None, None, :])


def two_sided(context: Context, layer: int) -> Array:
    """Return a mask whose window extends to both sides."""
    if not context.config.is_sliding(layer):
        return window_mask(context, layer)
    _, places = _places(context)
    return _unless_padding(window_both_ways(places, places, context.config.sliding_window), context)


def not_causal(context: Context, layer: int) -> Array:
    """Return a mask that is not causal: full layers see all keys, sliding layers see keys from the window's start
    on."""
    _, places = _places(context)
    window = context.config.sliding_window if context.config.is_sliding(layer) else len(places)
    return _unless_padding(window_open_ahead(places, places, window), context)


def pads_seen(context: Context, layer: int) -> Array:
    """Return a mask that does not hide padding."""
    call = replace(context.call, visible=np.ones_like(context.call.visible))
    return window_mask(replace(context, call=call), layer)


def strictly_before(context: Context, layer: int) -> Array:
    """Return a mask in which no query sees its own key, except the first."""
    q, k = _places(context)
    return np.asarray(window_mask(context, layer) & ((k < q) | (q == 0)))


def one_dropped(context: Context, layer: int) -> Array:
    """Return the mask of a sliding cache that drops one key too many if the cache is full when a call begins."""
    _, k = _places(context)
    oldest = context.call.starts[:, None] - (context.config.sliding_window - 2)
    return window_mask(context, layer) & ~(context.config.is_sliding(layer) & (k < oldest))


def ring_overwritten(context: Context, layer: int) -> Array:
    """Return the mask of a ring buffer, as long as the window, in which a chunk overwrites keys that its first queries
    need."""
    q, k = _places(context)
    ends = context.call.starts + np.repeat(context.call.calls, context.call.calls)
    lost = context.config.is_sliding(layer) & (k < ends[:, None] - context.config.sliding_window)
    return np.asarray(window_mask(context, layer) & (~lost | (k == q)))


def chunk_sees_all(context: Context, layer: int) -> Array:
    """Return a mask that does not apply the window inside a later chunk."""
    (q, k), starts = _places(context), context.call.starts[:, None]
    wide_open = (k <= q) & (k > starts - context.config.sliding_window) & (starts > 0)
    return window_mask(context, layer) | _unless_padding(wide_open, context)


def window_from_call(context: Context, layer: int) -> Array:
    """Return the mask of a window that counts a token's place from the start of its call, but a key's from the start
    of the text."""
    if not context.config.is_sliding(layer):
        return window_mask(context, layer)
    (q, k), starts = _places(context), context.call.starts[:, None]
    return _unless_padding((k <= q) & (np.abs(k - (q - starts)) < context.config.sliding_window), context)


def window_from_first_token(context: Context, layer: int) -> Array:
    """Return the mask of a window that counts a token's place without padding, but a key's with it."""
    if not context.config.is_sliding(layer):
        return window_mask(context, layer)
    (q, k), tokens = _places(context), without_pads(context)[:, None, :, None]
    return _unless_padding((k <= q) & (np.abs(k - tokens) < context.config.sliding_window), context)


def static_slots(call: Call, window: int) -> Array:
    """Return the place of the key in each slot that a query sees in a static cache as long as the window: ``(seq,
    slots)``; -1 for an empty slot that is seen, -2 for a slot that is not seen.

    This is transformers' HybridCache before 4.50. A call that ends at the window's last place or later moves all keys
    by one slot only, and writes its own keys beyond the window into the last slot, one over the other. The mask
    compares slots with places.
    """
    cache, start, rows = np.full(window, -1), 0, np.full((sum(call.calls), max(window, *call.calls)), -2)
    for tokens in call.calls:
        places = np.arange(start, start + tokens)
        if tokens > window:
            held, cache = places, places[-window:]
        else:
            held = cache = np.roll(cache, -1) if places[-1] >= window - 1 else cache.copy()
            cache[np.minimum(places, window - 1)] = places
        columns = np.arange(len(held)) + max(0, start + tokens - len(held))  # of the mask
        seen = (columns <= places[:, None]) & (columns > (places - start)[:, None] - window)
        rows[start : start + tokens, : len(held)] = np.where(seen, held, -2)
        start += tokens
    return rows


def static_cache(table: Table, context: Context) -> Iterator[Operation]:
    """Use a static cache of sliding layers that moves its keys too early and writes a chunk into one slot."""
    if len(context.call.calls) == 1:
        return
    slots, (_, k) = static_slots(context.call, context.config.sliding_window), _places(context)
    seen = (slots[:, :, None] == k).any(axis=1)
    empty = np.arange(slots.shape[1]) < (slots == -1).sum(axis=1)[:, None]
    for op in _of_field(table, "attention.probs"):
        if not context.config.is_sliding(layer_of(op.name) or 0):
            continue

        def compute(scores: Array) -> Array:
            shape = scores.shape[:-1]
            mask = np.broadcast_to(_unless_padding(seen, context), (*shape[:1], 1, *seen.shape))
            zeros = np.zeros_like(scores, shape=(*shape, empty.shape[1])) if empty.any() else scores[..., :0]
            holes = np.broadcast_to(empty[..., : zeros.shape[-1]], (*mask.shape[:-1], zeros.shape[-1]))
            both = np.concatenate([scores, narrow(as_float64(zeros), like=scores)], axis=-1)
            return ops.softmax(both, np.concatenate([mask, holes], axis=-1))[..., : scores.shape[-1]]

        yield replace(op, compute=compute)


def in_calls(
    chosen: Callable[[int, int], bool], seen: Callable[[Context, int, Array, Array, Array], Array]
) -> Callable[[Context, int], Array]:
    """Return a rule that changes the mask of some calls; `chosen` gets a call's number and number of tokens.

    `seen` gets the places of queries and keys, and the first and last place of the query's call; it returns True for
    visible keys.
    """

    def rule(context: Context, layer: int) -> Array:
        (q, k), call = _places(context), context.call
        tokens = np.array(call.calls)
        where = np.repeat([chosen(n, int(count)) for n, count in enumerate(tokens)], tokens)[:, None]
        ends = np.repeat(np.cumsum(tokens), tokens)[:, None]
        return np.where(where, seen(context, layer, q, k, ends), window_mask(context, layer))

    return rule


def _in_call(context: Context, layer: int, q: Array, k: Array, ends: Array) -> Array:
    """Return a mask that shows every key up to the end of the call, including padding."""
    return np.asarray(k < ends)


def _causal_in_call(context: Context, layer: int, q: Array, k: Array, ends: Array) -> Array:
    """Return a mask that shows all earlier keys, without a window."""
    return _unless_padding(k <= q, context)


def _from_start(context: Context, layer: int, q: Array, k: Array, ends: Array) -> Array:
    """Return a mask that is aligned to the start in full layers: a call's first query sees only the first key."""
    if context.config.is_sliding(layer):
        return window_mask(context, layer)
    return _unless_padding(k <= q - context.call.starts[:, None], context)


prefill_sees_all = in_calls(lambda n, tokens: n == 0, _in_call)
later_chunk_sees_all = in_calls(lambda n, tokens: n > 0 and tokens > 1, _in_call)
decode_sees_all = in_calls(lambda n, tokens: n > 0 and tokens == 1, _in_call)
prefill_without_window = in_calls(lambda n, tokens: n == 0, _causal_in_call)
decode_without_window = in_calls(lambda n, tokens: n > 0 and tokens == 1, _causal_in_call)
aligned_to_start = in_calls(lambda n, tokens: n > 0, _from_start)


# --- the catalogue ----------------------------------------------------------------------------------------------------

NORMS = (*LAYER_NORMS, "norm")
PROBS, CAPPED, SCORES = ("attention.probs",), ("attention.capped",), ("attention.scores",)
MIXED = (*SCORES, "attention.mixed")
TABLES, TURNED = ("cos", "sin"), ("attention.q_rot", "attention.k_rot")
LONG = "more tokens than the window"
HALF = "bfloat16 or float16"

KNOWN_BUGS: tuple[KnownBug, ...] = (
    # soft caps
    KnownBug("attn-softcap-missing", "scores are not capped", CAPPED, config(attn_logit_softcapping=None),
             "vllm #5908, llama.cpp #8197, vllm-metal #665, sgl-kernel-xpu #491", "scores not far below the cap",
             "attn_logit_softcapping"),
    KnownBug("attn-softcap-after-mask",
             "the mask is added before the cap, so that masked keys have the weight exp(-cap)", PROBS,
             capped_after_mask, "onnx #7865, flash-attention #1025", "a small cap", "order of cap and mask"),
    KnownBug("attn-softcap-skips-first-key", "the first key of each row is not capped", CAPPED,
             rewire(first_key_uncapped), "gemma.cpp 4974f24", "scores not far below the cap", "online softmax"),
    KnownBug("attn-softcap-missing-in-prefill", "in the first call scores are not capped", CAPPED,
             uncapped_in(lambda n, tokens: n == 0), "imp #688", "scores not far below the cap",
             "attn_logit_softcapping of prefill", unless="attn-softcap-missing"),
    KnownBug("attn-softcap-missing-in-decode", "in calls of one token scores are not capped", CAPPED,
             uncapped_in(lambda n, tokens: n > 0 and tokens == 1), "larql #237",
             "several calls, scores not far below the cap", "attn_logit_softcapping of a step"),
    KnownBug("attn-softcap-x-tanh", "scores are x tanh(x / cap) instead of cap tanh(x / cap)", CAPPED,
             function(soft_cap=x_times_tanh), "unsloth-zoo #593", knob="soft cap formula"),
    KnownBug("attn-softcap-subtracts-max", "the row's largest score is subtracted before the cap", CAPPED,
             function(soft_cap=cap_of_difference), "gemma.cpp 2a0e6ee, removed in e588a7f", knob="soft cap formula"),
    KnownBug("attn-softcap-final-cap", "scores are capped with the cap of the logits", CAPPED,
             config(attn_logit_softcapping=lambda c: c.config.final_logit_softcapping),
             "unverified: gemma ffe7bc1 is the other way round", knob="attn_logit_softcapping"),
    KnownBug("attn-softcap-twice", "scores are capped twice", CAPPED, function(soft_cap=cap_twice), "unverified",
             knob="a cap in both kernel and caller"),
    KnownBug("attn-softcap-clip", "scores are clipped at the cap, not capped smoothly",
             CAPPED, function(soft_cap=cut_off),
             "unverified", "scores not far below the cap", "soft cap formula", unless="attn-softcap-missing"),
    KnownBug("attn-softcap-unmultiplied", "scores are tanh(x / cap), not multiplied by the cap", CAPPED,
             function(soft_cap=cap_unmultiplied), "unverified", knob="soft cap formula"),
    KnownBug("attn-softcap-on-output", "the output of attention is capped instead of the scores",
             (*CAPPED, "attention.mixed"),
             rewire(output_capped), "unverified", "scores or mixed values not far below the cap", "place of the cap"),
    KnownBug("softcaps-exchanged", "the caps of scores and logits are exchanged",
             (*CAPPED, "logits"),
             config(attn_logit_softcapping=lambda c: c.config.final_logit_softcapping,
                    final_logit_softcapping=lambda c: c.config.attn_logit_softcapping),
             "torchtune's gemma2_2b (hidden_capping_value=30.0, final_capping_value=50.0)", knob="both caps"),
    KnownBug("attn-softcap-none-as-zero", "a cap of None is treated as 0.0, which makes every score 0", CAPPED,
             function(soft_cap=cap_none_as_zero), "unverified; Megatron-LM #6590, mistral.rs #1930 refuse 0 for that",
             "a model without this cap", "attn_logit_softcapping"),
    KnownBug("attn-softcap-before-scale", "the product of query and key is capped, then scaled",
             CAPPED, rewire(cap_before_scale),
             "unverified", knob="order of cap and scale"),
    KnownBug("attn-softcap-in-bf16", "scores are capped in bfloat16", CAPPED, function(soft_cap=cap_in_half),
             "nanochat #326, mlx-examples #857", "float32", "dtype of tanh", "rounding"),
    KnownBug("attn-softcap-tanh-overflow", "tanh is computed from exp(2 x), which overflows",
             CAPPED, function(soft_cap=naive_tanh),
             "Primus #1057", "scores above 44 caps", "tanh", "rounding"),
    KnownBug("final-softcap-missing", "logits are not capped", ("logits",), config(final_logit_softcapping=None),
             "ml-cross-entropy #48, vllm #52173, NxDI #97", knob="final_logit_softcapping"),
    KnownBug("final-softcap-attn-cap", "logits are capped with the cap of the scores", ("logits",),
             config(final_logit_softcapping=lambda c: c.config.attn_logit_softcapping), "google-deepmind/gemma ffe7bc1",
             knob="final_logit_softcapping"),
    KnownBug("final-softcap-twice", "logits are capped twice", ("logits",), function(soft_cap=cap_twice),
             "Megatron-Bridge #4645", knob="a cap in both the head and the loss or sampler"),
    KnownBug("final-softcap-clip", "logits are clipped at the cap, not capped smoothly",
             ("logits",), function(soft_cap=cut_off),
             "unverified", "logits beyond the cap", "soft cap formula", unless="final-softcap-missing"),
    KnownBug("final-softcap-unmultiplied", "logits are tanh(x / cap), not multiplied by the cap", ("logits",),
             function(soft_cap=cap_unmultiplied), "unverified", knob="soft cap formula"),
    KnownBug("final-softcap-none-as-zero", "a cap of None is treated as 0.0, which makes every logit 0", ("logits",),
             function(soft_cap=cap_none_as_zero), "unverified; mistral.rs #1930 refuses 0 for that",
             "a model without this cap", "final_logit_softcapping"),
    KnownBug("final-softcap-on-hidden", "the last hidden state is capped instead of the logits", ("norm", "logits"),
             rewire(hidden_capped), "unverified", knob="place of the cap"),
    KnownBug("final-softcap-x-tanh", "logits are x tanh(x / cap) instead of cap tanh(x / cap)", ("logits",),
             function(soft_cap=x_times_tanh), "unsloth-zoo #593", knob="soft cap formula"),
    KnownBug("final-softcap-subtracts-max", "the row's largest logit is subtracted before the cap", ("logits",),
             function(soft_cap=cap_of_difference), "gemma.cpp 2a0e6ee", knob="soft cap formula"),
    KnownBug("final-softcap-in-bf16", "logits are capped in bfloat16", ("logits",), function(soft_cap=cap_in_half),
             "nanochat #326", "float32", "dtype of tanh", "rounding"),
    # scale and heads
    KnownBug("scale-head-dim", "scores are scaled with head_dim**-0.5", SCORES,
             config(query_pre_attn_scalar=lambda c: c.config.head_dim), "ferrox #40, llama.cpp #8444 (27B)",
             "query_pre_attn_scalar other than head_dim", "query_pre_attn_scalar"),
    KnownBug("scale-224", "scores are scaled with 224**-0.5", SCORES, config(query_pre_attn_scalar=224),
             "gemma_pytorch a88abd5, transformers #31891, MaxText, TransformerLens #693 (9B)",
             "a scalar other than 224", "query_pre_attn_scalar"),
    KnownBug("scale-256", "scores are scaled with 256**-0.5", SCORES, config(query_pre_attn_scalar=256),
             "trl #7227 (left at the default)", "a scalar other than 256", "query_pre_attn_scalar"),
    KnownBug("scale-hidden-over-heads", "scores are scaled with (hidden / heads)**-0.5", SCORES,
             config(query_pre_attn_scalar=lambda c: c.config.hidden_size / c.config.num_attention_heads),
             "llama.cpp before #8444, TransformerLens before #694", "a scalar other than hidden / heads",
             "query_pre_attn_scalar"),
    KnownBug("scale-missing", "scores are not scaled", SCORES, config(query_pre_attn_scalar=1.0), "unverified",
             knob="query_pre_attn_scalar"),
    KnownBug("q-prescale-order", "the query is scaled and rounded before the product with the keys", SCORES,
             in_storage("attention_scores", scaled_query_in), "gemma_pytorch, llama.cpp, gemma.cpp do so", HALF,
             "place of the scale", "rounding"),
    KnownBug("kv-cache-in-bf16", "keys and values are rounded to bfloat16 in the cache", MIXED,
             round_operands("bfloat16", scores=1, mixed=1), "gemma.cpp 343482c", "float32", "dtype of the cache",
             "rounding"),
    KnownBug("kv-cache-in-f16", "keys and values are rounded to float16 in the cache", MIXED,
             round_operands("float16", scores=1, mixed=1),
             "llama.cpp's default; xFasterTransformer #336", "float32", "dtype of the cache", "rounding"),
    KnownBug("attention-products-in-f16", "queries, keys, probabilities and values are rounded to float16, but no sum",
             MIXED, round_operands("float16", scores=(0, 1), mixed=(0, 1)),
             "llama.cpp on CPUs: ggml rounds both operands if the cache is float16", "float32", "dtype of the cache",
             "rounding"),
    KnownBug("attention-flash-in-f16",
             "flash attention rounds queries, keys and values to float16, and adds the weighted values in float16",
             MIXED, in_float32(also(round_operands("float16", scores=(0, 1)), flash_in_f16)),
             "llama.cpp on CPUs (ggml_flash_attn_ext)", "float32", "flash attention", "rounding"),
    KnownBug("kv-head-of-first", "every query head uses the first key head", MIXED,
             key_heads(lambda right, count: right * 0), "ONNXim #33", "more than one key head", "key heads"),
    KnownBug("kv-head-of-next-shard", "each query head uses the key head after its own", MIXED,
             key_heads(lambda right, count: (right + 1) % count), "sglang #19086, vllm #52516 (offsets of shards)",
             "more than one key head", "key heads of a shard"),
    KnownBug("kv-head-of-first-shard", "the second half of the query heads uses the key heads of the first half",
             MIXED, key_heads(lambda right, count: right % (-(-count // 2))), "vllm #52516 (one rank's heads for all)",
             "more than one key head", "key heads of a shard"),
    KnownBug("gqa-tile", "key heads are tiled (0, 1, 0, 1) instead of repeated (0, 0, 1, 1)",
             MIXED, function(repeat_kv=tile_heads),
             "onnx #7274, axlearn #842, candle-vllm #52", "more than one key head", "repeat_kv"),
    # norms and wiring
    KnownBug("norm-without-one", "norms multiply by w instead of 1 + w",
             NORMS, function(rms_norm=norm_offset(0)),
             "Liger-Kernel #74", knob="norm offset"),
    KnownBug("norm-two-plus", "norms multiply by 2 + w, because 1 is added to weights that include 1",
             NORMS, function(rms_norm=norm_offset(2)),
             "vllm #31464, meganeura #188", knob="norm offset"),
    KnownBug("final-norm-without-one", "the last norm multiplies by w instead of 1 + w", ("norm",),
             function(rms_norm=norm_offset(0)), "imp #1289", knob="norm offset"),
    KnownBug("norm-eps-1e-5", "eps is 1e-5 instead of 1e-6", NORMS, config(rms_norm_eps=1e-5), "Llama's default",
             "float32, or activations below 0.01", "rms_norm_eps"),
    KnownBug("norm-eps-outside-root", "norms divide by root + eps instead of sqrt(mean + eps)", NORMS,
             function(rms_norm=eps_outside), "unverified", "float32, or activations below 0.01", "place of eps"),
    KnownBug("norm-subtracts-mean", "norms subtract the mean, as LayerNorm does",
             NORMS, function(rms_norm=mean_subtracted),
             "unverified", knob="norm"),
    KnownBug("norm-cast-order-llama", "norms round before multiplying by 1 + w", NORMS,
             in_storage("rms_norm", norm_cast_early), "transformers #29402, gemma_pytorch f499fd4", HALF,
             "place of the cast", "rounding"),
    KnownBug("norm-in-half", "norms round every step to half precision", NORMS, NORM_WAYS[0],
             "google-deepmind/gemma RMSNorm, on purpose", HALF, "dtype of the norm", "rounding", NORM_WAYS[1:]),
    KnownBug("norm-of-unrounded-sum", "norms use the sum of the residual stream before it is rounded",
             ("pre_feedforward_layernorm", "input_layernorm", "norm"), rewire(norms_of_unrounded_sums),
             "vllm 0.32.0, fused_add_rms_norm", HALF, "dtype of the residual stream", "rounding"),
    KnownBug("norm-weight-in-half", "1 + w is rounded to half precision", NORMS,
             in_storage("rms_norm", norm_weight_in_storage), "Unsloth's list of Gemma bugs", HALF, "dtype of 1 + w",
             "rounding"),
    KnownBug("norm-weight-in-bf16", "1 + w is rounded to bfloat16; all else is float32", NORMS,
             norm_weight_in("bfloat16"), "llama.cpp's conversion before #5810, vllm #53203", "float32",
             "dtype of 1 + w", "rounding"),
    KnownBug("norm-weight-in-f16", "1 + w is rounded to float16; all else is float32", NORMS,
             norm_weight_in("float16"), "unverified", "float32", "dtype of 1 + w", "rounding"),
    KnownBug("post-attn-norm-after-residual", "the post-attention norm is applied to h + attention",
             ("post_attention_layernorm", "middle"), rewire(norm_after_residual),
             "google-deepmind/gemma 205e096, 7279d94", knob="post-attention norm"),
    KnownBug("llama-block",
             "the post-attention norm gives the input of the feed-forward layer, whose own norms are missing",
             ("post_attention_layernorm", "middle", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
             rewire(llama_block), "exllamav2 #539, TensorRT-LLM #1984", knob="block"),
    KnownBug("post-norms-missing", "attention and feed-forward are added to the residual stream without their norms",
             ("post_attention_layernorm", "post_feedforward_layernorm"),
             without("post_attention_layernorm", "post_feedforward_layernorm"), "exllamav2 #539, mllm #223",
             knob="post norms"),
    KnownBug("post-ffw-norm-missing", "feed-forward is added to the residual stream without its norm",
             ("post_feedforward_layernorm",),
             without("post_feedforward_layernorm"), "exllamav2 #539", knob="post norms"),
    KnownBug("pre-ffw-norm-missing", "the input of feed-forward is not normed", ("pre_feedforward_layernorm",),
             without("pre_feedforward_layernorm"), "unverified", knob="pre norms"),
    KnownBug("exporter-norms",
             "the post-attention norm has the pre-feed-forward norm's weight, and that norm has zeros",
             ("post_attention_layernorm", "pre_feedforward_layernorm"), layer_weights(exporter_norms), "NeMo #11951",
             knob="names of norms"),
    KnownBug("final-norm-missing", "the last norm is missing", ("norm",), without("norm"), "unverified",
             knob="model.norm"),
    # embedding and head
    KnownBug("embed-scale-missing", "embeddings are not scaled", ("embedded",), scaled_embedding(lambda c: 1.0),
             "levanter #978", "sqrt(hidden) other than 1", "normalizer"),
    KnownBug("embed-scale-twice", "embeddings are scaled twice", ("embedded",),
             scaled_embedding(lambda c: c.embedding_scale() ** 2), "OpenTau #179", knob="inputs_embeds"),
    KnownBug("embed-scale-not-rounded", "sqrt(hidden) is not rounded to the model's precision", ("embedded",),
             scaled_embedding(lambda c: math.sqrt(c.config.hidden_size)), "gemma_pytorch f499fd4, litgpt #1031",
             "half precision, and sqrt(hidden) inexact in it", "normalizer"),
    KnownBug("embed-scale-in-bf16", "sqrt(hidden) is rounded to bfloat16 in every precision", ("embedded",),
             scaled_embedding(lambda c: float(bf16(math.sqrt(c.config.hidden_size)))),
             "gemma.cpp EmbeddingScaling, on purpose", "float32, and sqrt(hidden) inexact in bfloat16", "normalizer"),
    KnownBug("embed-scale-in-1-decimals", "sqrt(hidden) is rounded to 1 decimal", ("embedded",),
             scale_in_decimals(1), "unverified", "float32, and sqrt(hidden) with more decimals", "normalizer"),
    KnownBug("embed-scale-in-2-decimals", "sqrt(hidden) is rounded to 2 decimals", ("embedded",),
             scale_in_decimals(2), "unverified", "float32, and sqrt(hidden) with more decimals", "normalizer"),
    KnownBug("embed-scale-in-3-decimals", "sqrt(hidden) is rounded to 3 decimals", ("embedded",),
             scale_in_decimals(3), "unverified", "float32, and sqrt(hidden) with more decimals", "normalizer"),
    KnownBug("embed-scale-in-4-decimals", "sqrt(hidden) is rounded to 4 decimals", ("embedded",),
             scale_in_decimals(4), "unverified", "float32, and sqrt(hidden) with more decimals", "normalizer"),
    KnownBug("logits-in-bf16", "logits are rounded to bfloat16 before the cap", ("raw_logits",),
             function(unembed=in_half(ops.linear)), "transformers before #29285", "float32", "dtype of the head",
             "rounding"),
    # feed-forward
    KnownBug("gelu-exact", "GELU is computed with the error function, not with tanh",
             ("feed_forward.gelu",), function(gelu_tanh=activations.gelu),
             "gemma_pytorch 0a7afad, transformers #29402, TransformerLens #596", knob="hidden_activation"),
    KnownBug("gelu-f16-table", "GELU is read from a table of float16 numbers", ("feed_forward.gelu",),
             function(gelu_tanh=gelu_by_table), "llama.cpp on CPUs, on purpose (GGML_GELU_FP16)", "float32",
             "table of GELU", "rounding"),
    KnownBug("gelu-sigmoid", "GELU is approximated by x sigmoid(1.702 x)",
             ("feed_forward.gelu",), function(gelu_tanh=activations.quick_gelu),
             "unverified", knob="hidden_activation"),
    KnownBug("silu-instead-of-gelu", "the activation is SiLU, x sigmoid(x), instead of GELU",
             ("feed_forward.gelu",), function(gelu_tanh=activations.silu), "unverified", knob="hidden_activation"),
    KnownBug("relu-instead-of-gelu", "the activation is ReLU, max(x, 0), instead of GELU",
             ("feed_forward.gelu",), function(gelu_tanh=activations.relu), "unverified", knob="hidden_activation"),
    KnownBug("gate-up-swapped", "the weights of gate and up are exchanged", ("feed_forward.gate", "feed_forward.up"),
             layer_weights(swapped_gate), "unverified", knob="gate_proj, up_proj"),
    KnownBug("activation-on-up", "the product is gelu(up) gate instead of gelu(gate) up",
             ("feed_forward.gelu", "feed_forward.product"),
             rewire(activated_up), "unverified", knob="feed-forward"),
    KnownBug("gating-reshape-not-transpose", "gate and up are reshaped where they should be transposed",
             ("feed_forward.gate", "feed_forward.up"), layer_weights(reshaped_gate), "google-deepmind/gemma 5e2ff66",
             knob="transpose_gating_einsum"),
    # rotary positions
    KnownBug("rope-interleaved", "the pairs (2 i, 2 i + 1) are rotated instead of (i, i + head_dim / 2)",
             TURNED, function(rotate=neighbours),
             "AiDotNet #2074, lattice #392", "a position other than 0", "rope layout"),
    KnownBug("rope-clobbered-input", "the second half is rotated with the first half's result instead of its input",
             TURNED,
             function(rotate=rotate_in_place), "gemma.cpp 7f62c26", "a position other than 0", "rotation in place"),
    KnownBug("rope-missing", "queries and keys are not rotated", TURNED, function(rotate=leave_unturned), "unverified",
             "a position other than 0", "rope"),
    KnownBug("rope-turned-back", "queries and keys are rotated in the opposite direction", TURNED,
             function(rotate=turned_back), "unverified", "a position other than 0", "sign of sin"),
    KnownBug("rope-bf16-angles", "positions and angles are bfloat16", TABLES,
             function(rotary_tables=tables_of(angles_in_half)), "transformers #29285, Keras #1497, candle-vllm #50",
             "positions above 1; larger differences at higher positions", "dtype of angles"),
    KnownBug("rope-frequencies-in-bf16", "inverse frequencies are rounded to bfloat16, as by model.to(torch.bfloat16)",
             TABLES, function(rotary_tables=tables_of(angles_of_frequencies_in("bfloat16"))),
             "transformers #30709, NeMo Automodel #2549, sglang-jax #1472, Megatron-LM #744",
             "positions above 0; larger differences at higher positions", "dtype of inv_freq"),
    KnownBug("rope-frequencies-in-f16", "inverse frequencies are rounded to float16, as by model.half()", TABLES,
             beyond_tf32(function(rotary_tables=tables_of(angles_of_frequencies_in("float16")))),
             "gpt-neox #1003", "positions above 2048; below, rope-tf32-angles gives the same", "dtype of inv_freq"),
    KnownBug("rope-tf32-angles",
             "angles are a TF32 product, or use float16 inverse frequencies (model.half()): both keep ten bits",
             TABLES, function(rotary_tables=tables_of(angles_in_tf32)), "transformers #48428, gpt-neox #1003",
             "float32, or positions above 2048", "dtype of angles"),
    KnownBug("rope-partial", "half of each head is rotated, with its own frequencies and pairs", TURNED,
             turned_in_part(pairs_of_part=True), "unverified: partial_rotary_factor of other models (pie #603)",
             "a position other than 0", "partial_rotary_factor"),
    KnownBug("rope-partial-proportional", "half of the pairs of each head are rotated", TURNED,
             turned_in_part(pairs_of_part=False), "unverified: Gemma 4's full layers (nexusquant #12)",
             "a position other than 0", "partial_rotary_factor"),
    KnownBug("rope-theta-1e6", "theta is 1000000 instead of 10000",
             TABLES, config(rope_theta=1e6, rope_parameters=None),
             "unverified; Gemma 3 uses it in full layers", "a position other than 0", "rope_theta"),
    KnownBug("rope-theta-160000", "theta is 160000 instead of 10000",
             TABLES, config(rope_theta=160000.0, rope_parameters=None),
             "config.json in a vllm 0.8.0 issue", "a position other than 0", "rope_theta"),
    KnownBug("rope-positions-skip-pads", "positions do not count padding", TABLES, change_positions(without_pads),
             "transformers' generate does so on purpose; pass position_ids", "left padding", "position_ids"),
    KnownBug("rope-position-from-1", "positions begin at 1", TABLES, change_positions(lambda c: c.call.positions + 1),
             "prime-rl #3466", knob="position_ids"),
    KnownBug("rope-weights-permuted", "rows of q and k are in the order for adjacent pairs",
             ("attention.q", "attention.k"), layer_weights(half_swapped_rows), "llama.cpp's conversion of Llama",
             knob="permutation of q_proj, k_proj"),
    # masks
    KnownBug("swa-layer-parity-swapped", "odd layers slide instead of even layers", PROBS,
             layer_types(lambda c, n: not c.config.is_sliding(n)),
             "transformers before #31775, mistral.rs #486, TransformerLens", LONG, "layer_types"),
    KnownBug("swa-all-global", "no layer slides", PROBS, layer_types(lambda c, n: False),
             "vllm #5908, mlx-examples #857, keras-hub #2186", LONG, "sliding_window"),
    KnownBug("swa-all-local", "every layer slides", PROBS, layer_types(lambda c, n: True),
             "llama.cpp #15798, TensorRT-LLM #1984", LONG, "layer_types"),
    KnownBug("swa-first-layer-global", "layer 0 does not slide", PROBS,
             layer_types(lambda c, n: n > 0 and c.config.is_sliding(n)), "NeMo #9672", LONG, "layer_number"),
    KnownBug("swa-window-plus-one", "the window has one key too many", PROBS, sliding_window(lambda w: w + 1),
             "transformers #29623, NeMo #9672, SGLang #1056", LONG, "sliding_window"),
    KnownBug("swa-window-minus-one", "the window has one key too few", PROBS, sliding_window(lambda w: w - 1),
             "SGLang #1746", LONG, "sliding_window"),
    KnownBug("swa-window-halved", "the window is half as long",
             PROBS, sliding_window(lambda w: w // 2), "transformers #47940",
             LONG, "sliding_window"),
    KnownBug("swa-window-from-call",
             "the window counts a token's place from the start of its call, so that a step sees only the oldest keys",
             PROBS, mask(window_from_call), "torchtune 0.6.1 (Gemma 2, with a cache)",
             "several calls, beyond the window", "sliding_window with a cache"),
    KnownBug("swa-window-skips-pads", "the window counts a token's place without padding, but a key's with padding",
             PROBS, mask(window_from_first_token), "Tunix 0.1.7", "left padding, and more tokens than the window less "
             "the padding", "sliding_window with padding"),
    KnownBug("swa-two-sided", "sliding layers see as many keys after the query as before", PROBS, mask(two_sided),
             "google-deepmind/gemma 9218f5f, transformers' flash attention", "more than one token", "causal"),
    KnownBug("mask-not-causal", "queries see later keys", PROBS, mask(not_causal),
             "onnx #7865's companions; unverified", "more than one token", "causal"),
    KnownBug("mask-added-as-bool", "a boolean mask is added to the scores, so that it hides nothing", PROBS,
             rewire(mask_added), "transformers #41443, litgpt #1672", "more than one token", "dtype of the mask"),
    KnownBug("mask-missing-in-prefill", "the first call has no mask: every query sees all its keys", PROBS,
             mask(prefill_sees_all), "mlxcel #1001 (gemma2), TinyLLM #17", "more than one token", "mask of prefill",
             unless="attn-softcap-after-mask"),
    KnownBug("mask-missing-in-chunk", "a later call of several tokens has no mask", PROBS, mask(later_chunk_sees_all),
             "TinyLLM #17", "several calls, a later one of several tokens", "mask of a chunk"),
    KnownBug("mask-missing-in-decode", "a call of one token has no mask: it sees padding and keys beyond the window",
             PROBS,
             mask(decode_sees_all), "unverified", "several calls, beyond the window or padded", "mask of a step"),
    KnownBug("prefill-without-window", "in the first call no layer slides", PROBS, mask(prefill_without_window),
             "sglang #33915 (ragged prefill)", LONG, "sliding_window of prefill", unless="swa-all-global"),
    KnownBug("decode-without-window", "in calls of one token no layer slides", PROBS, mask(decode_without_window),
             "unsloth-zoo #635 (in review)", "several calls, beyond the window", "sliding_window of a step"),
    KnownBug("mask-aligned-to-start", "in full layers the first query of a later call sees only the first key", PROBS,
             mask(aligned_to_start), "Megatron-Bridge #5259 (Gemma 2), onnx #8068, pytorch #108108 (is_causal=True)",
             "several calls", "is_causal with a cache"),
    KnownBug("mask-without-self", "a query does not see its own key", PROBS, mask(strictly_before), "unverified",
             "more than one token", "causal"),
    KnownBug("pad-attended", "queries see padding", PROBS, mask(pads_seen), "google-deepmind/gemma bf2d158",
             "left padding", "attention_mask"),
    # caches
    KnownBug("cache-drops-one-key", "a sliding cache that is full has one key too few", PROBS, mask(one_dropped),
             "transformers #37574, #38046", "several calls, beyond the window", "cache roll"),
    KnownBug("cache-static-shifts-early",
             "a static sliding cache moves its keys one step too early, so that an empty slot is seen, and keeps only "
             "the last key of a chunk", PROBS, rewire(static_cache),
             "transformers before 4.50 (HybridCache; #37574)", "several calls, beyond the window", "HybridCache"),
    KnownBug("chunked-prefill-ring-overwritten", "a chunk overwrites the keys that its first queries need", PROBS,
             mask(ring_overwritten), "executorch #20346, vllm #4057", "several calls, beyond the window",
             "ring buffer"),
    KnownBug("chunk-without-window", "queries of a later chunk see more than the window", PROBS, mask(chunk_sees_all),
             "transformers #35681", "several calls, a chunk of several tokens beyond the window", "mask of a chunk"),
    KnownBug("cache-length-from-layer-0", "positions stop at the window", TABLES, change_positions(frozen_at_window),
             "transformers #38156", "several calls, beyond the window", "get_seq_length"),
    KnownBug("positions-restart", "positions begin at 0 in every call", TABLES, change_positions(restart_positions),
             "mlx-vlm #1983 (Qwen3-Omni)", "several calls", "position_ids"),
    # other stages
    KnownBug("missing-bos", "the text does not begin with <bos>", ("input_ids",), None,
             "lm-evaluation-harness #2049, llama.cpp #8156", "a text", "add_bos", "stage"),
    KnownBug("double-bos", "the text begins with <bos> twice", ("input_ids",), None, "unsloth #2939, gemma 20cb3da",
             "a text", "add_bos", "stage"),
    KnownBug("template-mismatch", "turns are not written as in Gemma's template", ("input_ids",), None,
             "unverified", "a chat, in the trace's metadata", "chat_template", "stage"),
    KnownBug("weights-transposed", "a matrix is transposed", ("weights",), None, "unverified",
             "the port's weights", "layout of linear layers", "stage"),
    KnownBug("weights-reshaped", "a matrix is reshaped where it should be transposed", ("weights",), None,
             "google-deepmind/gemma 5e2ff66", "the port's weights", "layout of linear layers", "stage"),
    KnownBug("weights-one-plus", "norms are stored as 1 + w", ("weights",), None, "llama.cpp's conversion, on purpose",
             "the port's weights", "norm offset", "stage"),
    KnownBug("weights-minus-one", "1 is subtracted from norm weights that do not include 1",
             ("weights",), None, "unverified",
             "the port's weights", "norm offset", "stage"),
    KnownBug("weights-rounded", "weights are stored in half precision", ("weights",), None, "unverified",
             "the port's weights", "dtype of weights", "stage"),
    KnownBug("weights-of-another", "a tensor has the numbers of another tensor",
             ("weights",), None, "NeMo #11951 (norms)",
             "the port's weights", "names of weights", "stage"),
    KnownBug("head-untied", "the head is not the embedding matrix", ("weights",), None, "unverified",
             "the port's weights", "tie_word_embeddings", "stage"),
    KnownBug("vocab-padded", "logits have more columns than the vocabulary", ("logits",), None,
             "Flax checkpoints have 256128 rows", "any input", "vocab_size", "stage"),
    KnownBug("left-pad-nan", "rows of padding are NaN and reach real tokens", ("attention.mixed",), None,
             "transformers #30004", "left padding, float16", "mask value", "stage"),
    KnownBug("fp16-overflow", "activations above 65504 overflow to infinity", ("feed_forward.product",), None,
             "vllm #6177, mlx-examples #876 (27B)", "float16", "dtype", "stage"),
)  # fmt: skip


def combine(one: KnownBug, other: KnownBug) -> KnownBug:
    """Return a bug that combines two mistakes.

    Examples
    --------
    >>> combine(known_bug("scale-head-dim"), known_bug("gelu-f16-table")).name
    'scale-head-dim + gelu-f16-table'
    """
    assert one.change is not None
    assert other.change is not None
    first, second = one.change, other.change
    kind = "mistake" if "mistake" in (one.kind, other.kind) else one.kind
    return replace(
        one, kind=kind, name=f"{one.name} + {other.name}", says=f"{one.says}; and {other.says}",
        fields=tuple(dict.fromkeys((*one.fields, *other.fields))), change=lambda context: second(first(context)),
        seen=f"{one.seen}; {other.seen}", knob=f"{one.knob}; {other.knob}",
    )  # fmt: skip


def in_fewer_places(bug: KnownBug, field: str, layers: tuple[int, ...] = ()) -> KnownBug:
    """Return a bug that is in only one of its fields, and if `layers` are given, only in these.

    Examples
    --------
    >>> in_fewer_places(known_bug("norm-without-one"), "post_attention_layernorm", (3,)).name
    'norm-without-one only in post_attention_layernorm of layer 3'
    """
    where = field if len(bug.fields) > 1 or not layers else ""
    if layers:
        where += f"{' of ' if where else ''}layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    says = f"{bug.says}; here only in {where}"
    return replace(bug, name=f"{bug.name} only in {where}", says=says, fields=(field,), layers=layers)


def known_bug(name: str) -> KnownBug:
    """Return a known bug by name.

    Examples
    --------
    >>> known_bug("gqa-tile").fields
    ('attention.scores', 'attention.mixed')
    """
    return next(v for v in KNOWN_BUGS if v.name == name)
