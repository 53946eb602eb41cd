"""Describe the model as a table of named operations.

Each operation can be computed alone, exactly or with the rounding of PyTorch's eager kernels. Checked against
`refgemma.model.forward`: the table has the same names and calls the same operations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from refgemma import ops
from refgemma.config import Gemma2Config
from refgemma.heads import log_softmax
from refgemma.layers import merge_heads, split_heads
from refgemma.model import embedding_scale
from refgemma.oracle import tolerance as tol
from refgemma.oracle.tolerance import FORMATS, Arithmetic, Tolerance, U, rescale, with_storage
from refgemma.precision import Array, as_dtype, as_float64
from refgemma.trace.candidate import Call
from refgemma.trace.names import LOGPROBS
from refgemma.weights.parameters import LayerWeights, Weights, row_pieces


def store_nothing(*inputs: Array, storage: str) -> list[Array]:
    """Return no errors, for an operation that stores no intermediate result."""
    return []


@dataclass(frozen=True)
class Operation:
    """The operation that computes one named tensor: its inputs, function and tolerance."""

    name: str
    inputs: tuple[str, ...]
    compute: Callable[..., Array]
    allowed: Callable[..., Tolerance]  # tolerance of float32 arithmetic without storage, given the inputs
    stores: Callable[..., list[Array]] = store_nothing  # errors from storing intermediate results

    def tolerance(self, inputs: Sequence[Array], exact: Array, storage: str, unit: float = U) -> Tolerance:
        """Return the tolerance of the result, stored in `storage`; `unit` is the unit roundoff of the arithmetic."""
        with np.errstate(over="ignore", invalid="ignore"):
            stored = self.stores(*inputs, storage=storage) if storage in FORMATS else []
            return with_storage(rescale(self.allowed(*inputs), unit / U), exact, storage, stored)


SMALL = 2**21  # numbers; smaller layers and tables are kept in float64


class Layers(Sequence[LayerWeights]):
    """Layers converted to float64. The last accessed layer is kept in memory; small layers are all kept."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self._layers = layers
        self._kept: dict[int, LayerWeights] = {}

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._layers)

    def __getitem__(self, layer: Any) -> Any:
        """Return block `layer`."""
        if layer not in self._kept:
            found = self._layers[layer]
            numbers: dict[str, Any] = {name: None if x is None else as_float64(x) for name, x in vars(found).items()}
            size = len(self) * sum(x.size for x in numbers.values() if x is not None)
            self._kept = (self._kept if size <= SMALL else {}) | {layer: LayerWeights(**numbers)}
        return self._kept[layer]


def double(weights: Weights) -> Weights:
    """Return the weights in float64; layers are converted when accessed, and a large embedding table is unchanged."""
    table = weights.embed_tokens
    if isinstance(table, np.ndarray) and table.size <= SMALL:
        table = as_float64(table)
    return Weights(table, Layers(weights.layers), as_float64(weights.norm), weights.lm_head)


def window_mask(context: "Context", layer: int) -> Array:
    """Return a mask that is true for the keys that each query can see: ``(batch, 1, seq, keys)``."""
    places = np.arange(context.call.input_ids.shape[1])
    if context.config.is_sliding(layer):
        allowed = ops.sliding_mask(places, places, context.config.sliding_window)
    else:
        allowed = ops.causal_mask(places, places)
    mask: Array = allowed & context.call.visible[:, None, None, :]
    return mask


@dataclass(frozen=True)
class Context:
    """All values that the operations use. A known bug changes these values: numbers, functions, masks or
    connections."""

    config: Gemma2Config
    weights: Weights  # in float64, or in the candidate's precision
    call: Call
    arithmetic: Arithmetic
    exact: bool = True  # true if `weights` and all results are float64
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    mask: Callable[["Context", int], Array] = window_mask
    layer_weights: Callable[[LayerWeights, "Context"], LayerWeights] = lambda weights, context: weights
    rewire: Callable[[dict[str, Operation], "Context"], Mapping[str, Operation]] = lambda table, context: {}
    backward: Callable[["Context"], Iterator[Operation]] = lambda context: iter(
        ()
    )  # operations of the backward pass, if it is judged

    def function(self, name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        """Return this context's function `name`, or else the usual function."""
        return self.functions.get(name, usual)

    def layer(self, number: int) -> LayerWeights:
        """Return the weights of a block."""
        return self.layer_weights(self.weights.layers[number], self)

    @property
    def groups(self) -> int:
        """The number of query heads that share a key head."""
        return self.config.num_attention_heads // self.config.num_key_value_heads

    def embedding_scale(self) -> float:
        """Return ``sqrt(hidden)``, rounded to the candidate's precision."""
        return float(embedding_scale(self.config.hidden_size, like=as_dtype(np.zeros(0), self.arithmetic.storage)))


def scale_rows(context: Context) -> Array:
    """Return the rows of the tokens, multiplied by ``sqrt(hidden)``."""
    rows = context.weights.embed_tokens[context.call.input_ids]
    scaled: Array = (as_float64(rows) if context.exact else rows) * context.embedding_scale()
    return scaled


def head_pieces(context: Context) -> Iterator[Array]:
    """Yield the rows of the head, a piece at a time."""
    for rows in row_pieces(context.weights.head):
        yield as_float64(rows) if context.exact else rows


def _ends(context: Context) -> Iterator[Operation]:
    """Yield the operations before the layers and after them."""
    config, last = context.config, f"layers.{context.config.num_hidden_layers - 1}.out"
    like = np.zeros(0) if context.exact else context.weights.norm
    tables = context.function("rotary_tables", ops.rotary_tables)
    positions = context.call.positions
    arguments = (positions, config.head_dim, config.rope_theta, like)
    allowed = partial(tol.rotary_tables, positions[:, None, :, None], config.head_dim, config.rope_theta)
    yield Operation("cos", (), lambda: tables(*arguments)[0], allowed)
    yield Operation("sin", (), lambda: tables(*arguments)[1], allowed)
    embedding = context.function("embed", scale_rows)
    yield Operation(
        "embedded", (), lambda: embedding(context), lambda: tol.one_rounding(as_float64(scale_rows(context)), common=U)
    )
    yield _norm(context, "norm", last, lambda: context.weights.norm)
    unembed, cap = context.function("unembed", ops.linear), config.final_logit_softcapping

    def raw_logits(norm: Array) -> Array:
        return np.concatenate([unembed(norm, rows) for rows in head_pieces(context)], axis=-1)

    def raw_logits_tolerance(norm: Array) -> Tolerance:
        pieces = [tol.linear(norm, rows) for rows in head_pieces(context)]
        bound = np.concatenate([piece.bound for piece in pieces], axis=-1)
        return tol.tolerance(bound, np.concatenate([piece.spread for piece in pieces], axis=-1))

    yield Operation("raw_logits", ("norm",), raw_logits, raw_logits_tolerance)
    yield _cap(context, "logits", "raw_logits", cap)
    yield Operation(LOGPROBS, ("logits",), context.function("log_softmax", log_softmax), tol.log_softmax)


def _norm(context: Context, name: str, source: str, weight: Callable[[], Array]) -> Operation:
    norm, eps = context.function("rms_norm", ops.rms_norm), context.config.rms_norm_eps
    return Operation(name, (source,), lambda x: norm(x, weight(), eps), lambda x: tol.rms_norm(x, weight(), eps))


def _cap(context: Context, name: str, source: str, cap: float | None) -> Operation:
    soft_cap = context.function("soft_cap", ops.soft_cap)
    allowed, stores = partial(tol.soft_cap, cap=cap), partial(tol.soft_cap_stores, cap=cap)
    return Operation(name, (source,), lambda x: soft_cap(x, cap), allowed, stores)


def _sum(name: str, left: str, right: str) -> Operation:
    return Operation(name, (left, right), np.add, lambda a, b: tol.one_rounding(a + b))


Matrix = Callable[[], tuple[Array, Array | None]]  # returns a weight and its bias or None


def _linear(name: str, source: str, weight: Matrix) -> Operation:
    return Operation(name, (source,), lambda x: ops.linear(x, *weight()), lambda x: tol.linear(x, *weight()))


def _heads(name: str, source: str, weight: Matrix, head_dim: int) -> Operation:
    """Return a projection whose result is split into heads."""
    split = partial(split_heads, head_dim=head_dim)
    flat = _linear(name, source, weight)
    return Operation(name, (source,), lambda x: split(flat.compute(x)), lambda x: tol.rearrange(flat.allowed(x), split))


def _attention(context: Context, layer: int, source: str) -> Iterator[Operation]:
    config, p = context.config, f"layers.{layer}.attention."
    scale, cap = config.attention_scale, config.attn_logit_softcapping
    repeat = context.function("repeat_kv", ops.repeat_kv)
    rotate, softmax = context.function("rotate", ops.rotate), context.function("softmax", ops.softmax)
    score = context.function("attention_scores", ops.attention_scores)

    def share_keys(compute: Callable[..., Any]) -> Callable[..., Any]:
        """Return the operation with key or value heads repeated for the query heads."""
        return lambda left, kv, **named: compute(left, repeat(kv, context.groups), **named)

    def weight(letter: str) -> Matrix:
        def read_matrix() -> tuple[Array, Array | None]:
            weights = context.layer(layer)
            return getattr(weights, f"{letter}_proj"), getattr(weights, f"{letter}_proj_bias")

        return read_matrix

    for letter in ("q", "k", "v"):
        yield _heads(p + letter, source, weight(letter), config.head_dim)
    for letter in ("q", "k"):
        yield Operation(f"{p}{letter}_rot", (p + letter, "cos", "sin"), rotate, tol.rotate, tol.rotate_stores)
    yield Operation(
        p + "scores", (p + "q_rot", p + "k_rot"), share_keys(partial(score, scale=scale)),
        share_keys(partial(tol.attention_scores, scale=scale)), share_keys(partial(tol.scores_stores, scale=scale)),
    )  # fmt: skip
    yield _cap(context, p + "capped", p + "scores", cap)
    yield Operation(
        p + "probs", (p + "capped",),
        lambda x: softmax(x, context.mask(context, layer)),
        lambda x: tol.softmax(x, context.mask(context, layer)),
    )  # fmt: skip
    yield Operation(
        p + "mixed", (p + "probs", p + "v"), share_keys(lambda probs, v: merge_heads(probs @ v)),
        share_keys(lambda probs, v: tol.rearrange(tol.matmul(probs, v), merge_heads)),
    )  # fmt: skip
    yield _linear(p + "out", p + "mixed", weight("o"))


def _block(context: Context, layer: int) -> Iterator[Operation]:
    p = f"layers.{layer}."
    source, f = f"layers.{layer - 1}.out" if layer else "embedded", p + "feed_forward."
    gelu = context.function("gelu_tanh", context.config.activation)

    def weight(name: str) -> Callable[[], Any]:
        return lambda: getattr(context.layer(layer), name)

    def matrix(name: str) -> Matrix:
        return lambda: (getattr(context.layer(layer), name), None)

    yield _norm(context, p + "input_layernorm", source, weight("input_layernorm"))
    yield from _attention(context, layer, p + "input_layernorm")
    yield _norm(context, p + "post_attention_layernorm", p + "attention.out", weight("post_attention_layernorm"))
    yield _sum(p + "middle", source, p + "post_attention_layernorm")
    yield _norm(context, p + "pre_feedforward_layernorm", p + "middle", weight("pre_feedforward_layernorm"))
    yield _linear(f + "gate", p + "pre_feedforward_layernorm", matrix("gate_proj"))
    yield _linear(f + "up", p + "pre_feedforward_layernorm", matrix("up_proj"))
    yield Operation(f + "gelu", (f + "gate",), gelu, tol.gelu_tanh)
    yield Operation(f + "product", (f + "gelu", f + "up"), np.multiply, lambda a, b: tol.one_rounding(a * b))
    yield _linear(f + "out", f + "product", matrix("down_proj"))
    yield _norm(context, p + "post_feedforward_layernorm", f + "out", weight("post_feedforward_layernorm"))
    yield _sum(p + "out", p + "middle", p + "post_feedforward_layernorm")


def operations(context: Context) -> dict[str, Operation]:
    """Return every operation of a call by the name of its result, in the order of execution.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> call = Call(np.array([[2, 300]]), np.array([[0, 1]]), np.ones((1, 2), bool), (2,))
    >>> table = operations(Context(tiny.config, double(tiny.weights), call, Arithmetic()))
    >>> table["layers.3.attention.probs"].inputs
    ('layers.3.attention.capped',)
    """
    first = [*_ends(context)]
    before, after = first[:3], first[3:]
    layers = [op for layer in range(context.config.num_hidden_layers) for op in _block(context, layer)]
    table = {op.name: op for op in [*before, *layers, *after, *context.backward(context)]}
    return table | dict(context.rewire(table, context))
