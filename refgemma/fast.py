"""The blocks of `refgemma.layers`, computed faster: the results are equal up to rounding.

Checked against the definition on random shapes, windows, caches, padding and numbers of threads, and against PyTorch's
recordings (``refgemma verify --full``). `refgemma.layers` defines the computation. This file works in pieces that fit
the processor's cache, skips masked keys and avoids copies.

It serves float32 and float64. In half precision, where the place of each rounding matters, the definition itself runs.
"""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float
from threadpoolctl import ThreadpoolController

from refgemma import model, ops
from refgemma.activations import Activation
from refgemma.cache import Cache, LayerCache, keep_last
from refgemma.config import Gemma2Config
from refgemma.model import Given, Start, begin, reference_outputs
from refgemma.precision import Array, Rounded
from refgemma.shapes import Hidden, Logits, RotaryTable
from refgemma.weights.checkpoint import StoredRows
from refgemma.weights.parameters import LayerWeights, OnDemand, Rows, Weights

ROWS = 1000  # tokens that go through a block together: fewer make the matrix products slower, more need more memory;
# with 1024, rows of the arrays would collide in the cache
QUERIES = 128  # tokens whose scores are computed together, for one key/value head
SQUARE = 256  # rows and columns that are transposed together: a quarter of a megabyte of each array
CHUNK = 2**17  # numbers that all elementwise operations process before the next ones: half a megabyte
TILE, LARGE_TILE = 2**19, 2**21  # weights that a thread widens at a time, for products with few and with many tokens
FEW = 4  # tokens or queries; for so few, reading the other factor takes all the time
WORK = 2**21  # multiplications that are worth a separate thread
CUT = 48  # rows: a matrix that is split at multiples of it has the same tiles in OpenBLAS's kernels as the whole
SAFE_CAP = 60.0  # exp(60) times any number of keys is far from the largest float32, and exp(-60) from the smallest


# --- threads ----------------------------------------------------------------------------------------------------------

BLAS = ThreadpoolController().select(user_api="blas")
THREADS = max((library.num_threads for library in BLAS.lib_controllers), default=os.cpu_count() or 1)
ALONE = threading.RLock()
if hasattr(os, "register_at_fork"):  # do not fork while another thread holds the lock: the child could never release it
    os.register_at_fork(before=ALONE.acquire, after_in_parent=ALONE.release, after_in_child=ALONE.release)


@contextmanager
def own_threads() -> Iterator[None]:
    """Limit BLAS to the thread that calls it; also usable as a decorator.

    BLAS splits a matrix between its threads, and next to a split some of its kernels sum in another order. Its threads
    also spin for a while after each product, on processors that the elementwise operations need. The number of BLAS's
    threads is global to the process. So one block is computed at a time, and the number is restored after it.
    """
    with ALONE, BLAS.limit(limits=1):
        yield


def threads_for(tokens: int, weights: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return the lock of a block or of the head, with or without the limit of BLAS's threads.

    One token takes as long as reading the weights. BLAS's threads share this at least as well as those of this file,
    and on some machines much better, because they do not sleep between two products (`docs/speed.md`). So nothing is
    limited for one token, unless its weights are widened. The last bits of such products can depend on the number of
    BLAS's threads; inside `own_threads` they do not.
    """
    in_memory = all(weight is None or isinstance(weight, np.ndarray) for weight in weights)
    return ALONE if tokens == 1 and in_memory else own_threads()


@functools.cache
def helpers(process: int) -> ThreadPoolExecutor:
    """Return the waiting threads of a process; starting threads for each product takes a tenth of a token's time.

    A forked process has its parent's memory but none of its threads. So each process number has its own threads.
    """
    return ThreadPoolExecutor()


def in_threads(fill: Callable[[int, int], None], count: int, least: int = 1, multiple: int = 1) -> None:
    """Call ``fill(start, stop)`` for parts of ``range(count)``, one part per thread; the first runs in this thread.

    Each part has at least `least` elements, before its start is moved to a multiple of `multiple`.
    """
    parts = min(THREADS, count // max(least, multiple))
    if parts <= 1:
        fill(0, count)
        return
    each = count // parts // multiple * multiple
    bounds = [*(n * each for n in range(parts)), count]
    others = [helpers(os.getpid()).submit(fill, *pair) for pair in itertools.pairwise(bounds[1:])]
    fill(0, bounds[1])
    for other in others:
        other.result()


# --- matrix products --------------------------------------------------------------------------------------------------


def multiply_rows(weight: Array, x: Array, y: Array, start: int, stop: int) -> None:
    """Compute some rows of ``y = weight @ x``."""
    np.matmul(weight[start:stop], x, out=y[start:stop])


def widen_and_multiply_rows(source: Any, x: Array, y: Array, start: int, stop: int) -> None:
    """Compute some rows of ``y = source @ x``: widen one tile at a time, and use it while it is in the cache."""
    width, few = len(x), x.shape[1] <= FEW
    rows = max((TILE if few else LARGE_TILE) // width // CUT, 1) * CUT
    buffer, vectors = np.empty((min(rows, stop - start), width), x.dtype), np.ascontiguousarray(x.T)
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        tile = buffer[: last - first]
        tile[...] = source[first:last]
        if few and len(vectors) > 1:  # for these, BLAS would first reorder the whole tile
            np.vecdot(tile[:, None], vectors, out=y[first:last])
        else:
            np.matmul(tile, x, out=y[first:last])


def multiply(weight: Rows, x: Float[np.ndarray, "in seq"]) -> Float[np.ndarray, "out seq"]:
    """Compute ``weight @ x`` with one token per column; each thread computes some rows of the weight.

    For few tokens this is up to 1.5 times as fast as ``x.T @ weight.T``. Its sums do not depend on the split into rows.
    A single column is left to BLAS's threads (`threads_for`).

    Examples
    --------
    >>> multiply(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[1.0], [2.0]]))
    array([[1.],
           [3.]])
    """
    # Weights are used as stored, unchecked: a non-finite number appears in the product, and is searched for then.
    few = x.shape[1] <= FEW  # more tokens will follow: keep the map of the file
    source: Any = weight.tensor.map(keep=few) if isinstance(weight, StoredRows) else weight
    in_memory = isinstance(weight, np.ndarray)
    y = np.empty((weight.shape[0], x.shape[1]), np.result_type(source, x) if in_memory else x.dtype)
    fill = multiply_rows if in_memory else widen_and_multiply_rows
    least = len(y) if in_memory and x.shape[1] == 1 else WORK // max(1, x.size)
    in_threads(functools.partial(fill, source, x, y), len(y), least, CUT)
    if isinstance(weight, StoredRows) and not np.isfinite(y).all():
        weight[:]  # raises an error with the file and the place, if the weight is not finite
    return y


def transpose_rows(x: Array, y: Array, start: int, stop: int) -> None:
    """Compute some rows of ``y = x.T``, one square at a time to use all of each cache line of `x`."""
    for first in range(start, stop, SQUARE):
        rows = slice(first, min(first + SQUARE, stop))
        for column in range(0, len(x), SQUARE):
            columns = slice(column, column + SQUARE)
            y[rows, columns] = x[columns, rows].T


def transpose(x: Float[np.ndarray, "any seq"]) -> Float[np.ndarray, "seq any"]:
    """Return ``x.T`` as a contiguous array."""
    y = np.empty(x.shape[::-1], x.dtype)
    in_threads(functools.partial(transpose_rows, x, y), len(y), CHUNK // max(1, len(x)))
    return y


def fast_linear(x: Float[np.ndarray, "rows in"], weight: Rows, bias: Any = None) -> Float[np.ndarray, "rows out"]:
    """Compute ``x @ weight.T + bias``; the weight may still be on disk, or not yet generated.

    Examples
    --------
    >>> fast_linear(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    array([[1., 3.]])
    """
    y = transpose(multiply(weight, x.T))
    if bias is not None:
        y += bias[:]
    return y


# --- elementwise ------------------------------------------------------------------------------------------------------


def work_on_chunks(work: Callable[..., None], arrays: tuple[Array, ...], rows: int, start: int, stop: int) -> None:
    """Call `work` with the rows of `arrays` from `start` to `stop`, `rows` at a time."""
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        work(*(array[first:last] for array in arrays))


def over_chunks(work: Callable[..., None], *arrays: Array) -> None:
    """Call `work` with some rows of equally long arrays, few enough to stay in the cache between operations."""
    rows = max(1, CHUNK // max(1, arrays[0][0].size)) if len(arrays[0]) else 1
    in_threads(functools.partial(work_on_chunks, work, arrays, rows), len(arrays[0]), rows)


def norm_rows(x: Array, normed: Array, gain: Array, eps: float) -> None:
    """Compute `refgemma.ops.rms_norm` without storing the squares."""
    mean_square = np.vecdot(x, x)[:, None] / x.dtype.type(x.shape[-1])
    np.multiply(x, 1 / np.sqrt(mean_square + x.dtype.type(eps)), out=normed)
    normed *= gain


def fast_rms_norm(x: Float[np.ndarray, "rows hidden"], weight: Rows, eps: float) -> Float[np.ndarray, "rows hidden"]:
    """Compute `refgemma.ops.rms_norm`."""
    normed = np.empty_like(x)
    over_chunks(functools.partial(norm_rows, gain=1 + weight[:], eps=eps), x, normed)
    return normed


def rotate_rows(x: Array, cos: Array, sin: Array, rotated: Array) -> None:
    """Compute `refgemma.ops.rotate`, half a head at a time."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    np.multiply(first, cos, out=rotated[..., :half])
    rotated[..., :half] -= second * sin
    np.multiply(second, cos, out=rotated[..., half:])
    rotated[..., half:] += first * sin


def fast_rotate(x: Float[np.ndarray, "seq any_heads head_dim"], cos: Array, sin: Array, rotated: Array) -> None:
    """Write `refgemma.ops.rotate` of `x` into `rotated`; tables are ``(seq, head_dim)``."""
    half = x.shape[-1] // 2
    over_chunks(rotate_rows, x, cos[:, None, :half], sin[:, None, :half], rotated)


def gate_up_rows(gate: Array, up: Array, activation: Activation) -> None:
    """Replace `gate` by ``activation(gate) * up``."""
    if activation is ops.gelu_tanh:
        inner = gate * gate
        inner *= gate.dtype.type(0.044715)
        inner += 1
        inner *= gate
        inner *= gate.dtype.type(math.sqrt(2 / math.pi))
        np.tanh(inner, out=inner)
        inner += 1
        inner *= gate.dtype.type(0.5)
        gate *= inner
    else:
        gate[...] = activation(gate)
    gate *= up


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass
class Buffer:
    """Keys and values of a layer, with room for later ones; the first `used` places never change."""

    keys: Float[np.ndarray, "batch kv_heads room head_dim"]
    values: Float[np.ndarray, "batch kv_heads room head_dim"]
    used: int


@dataclass(frozen=True)
class BufferedLayer(LayerCache):
    """A `LayerCache` whose keys and values are places of a `Buffer`, from `first` on.

    It behaves like any other value. The first call that continues it writes behind it in the same buffer. A later call
    finds these places used and copies to a new buffer.
    """

    buffer: Buffer
    first: int


def reserve(past: LayerCache, count: int) -> BufferedLayer:
    """Return `past` with `count` more places, which are not filled yet."""
    batch, kv_heads, kept, head_dim = past.keys.shape
    if isinstance(past, BufferedLayer) and past.first + kept == past.buffer.used <= past.buffer.keys.shape[2] - count:
        buffer, first = past.buffer, past.first
    else:
        spare = (kept + count) // 2 if kept else 0  # none after a whole prompt, which may be the only call
        shape = (batch, kv_heads, kept + count + spare, head_dim)
        buffer, first = Buffer(np.empty(shape, past.keys.dtype), np.empty(shape, past.keys.dtype), kept), 0
        buffer.keys[:, :, :kept], buffer.values[:, :, :kept] = past.keys, past.values
    buffer.used = first + kept + count
    places = slice(first, buffer.used)
    return BufferedLayer(buffer.keys[:, :, places], buffer.values[:, :, places], past.start, buffer, first)


def forget(present: BufferedLayer, window: int) -> LayerCache:
    """Keep the last ``window - 1`` tokens of a sliding layer; copy only if the unused part before them is larger."""
    dropped = max(present.keys.shape[2] - (window - 1), 0)
    if present.first + dropped > window:
        return keep_last(present, window - 1)
    keys, values = present.keys[:, :, dropped:], present.values[:, :, dropped:]
    return BufferedLayer(keys, values, present.start + dropped, present.buffer, present.first + dropped)


# --- the block --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """The numbers of a block."""

    scale: float
    cap: float | None
    window: int | None  # of a sliding layer
    activation: Activation
    eps: float


def weigh(scores: Float[np.ndarray, "seq groups keys"], seen: Array, scale: float, cap: float | None) -> None:
    """Replace scores by ``exp(capped scores) * seen``; `seen` is 1 or 0, ``(seq, 1, keys)``.

    They are not divided by their sum here. The much fewer mixed values are divided later.
    """
    kind = scores.dtype.type
    if cap is not None and cap <= SAFE_CAP:  # the cap bounds the scores, so no maximum is needed
        scores *= kind(scale / cap)
        np.tanh(scores, out=scores)
        scores *= kind(cap)
    else:
        scores *= kind(scale)
        scores[...] = np.where(seen, ops.soft_cap(scores, cap), np.finfo(kind).min)
        scores -= np.max(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores *= seen


def score_keys(q: Float[np.ndarray, "queries head_dim"], keys: Float[np.ndarray, "keys head_dim"]) -> Array:
    """Compute ``q @ keys.T``; for few queries without BLAS, which would first reorder all keys."""
    return np.ascontiguousarray(np.vecdot(keys[:, None], q).T) if len(q) <= FEW else q @ keys.T


def mix(scores: Float[np.ndarray, "queries keys"], values: Float[np.ndarray, "keys head_dim"]) -> Array:
    """Compute ``scores @ values``; for few queries without BLAS, like `score_keys`."""
    few: Array = np.einsum("qk,kd->qd", scores, values) if len(scores) <= FEW else scores @ values
    return few


def attend_heads(
    q: Float[np.ndarray, "seq kv_heads groups head_dim"], keys: Array, values: Array, seen: Array, numbers: Numbers,
    mixed: Float[np.ndarray, "seq kv_heads groups head_dim"], start: int, stop: int,
) -> None:  # fmt: skip
    """Compute some heads of `attend`; the queries that share a key/value head are rows of one product."""
    seq, _, groups, head_dim = q.shape
    for head in range(start, stop):
        scores = score_keys(q[:, head].reshape(-1, head_dim), keys[head]).reshape(seq, groups, -1)
        total = np.empty((seq, groups, 1), scores.dtype)
        rows = max(1, CHUNK // scores[0].size)
        for first in range(0, seq, rows):
            some = slice(first, first + rows)
            weigh(scores[some], seen[some], numbers.scale, numbers.cap)
            np.sum(scores[some], axis=-1, keepdims=True, out=total[some])
        total[total == 0] = 1  # the query of a padding token sees no key; its row is meaningless
        found = mix(scores.reshape(seq * groups, -1), values[head])
        np.divide(found.reshape(seq, groups, head_dim), total, out=mixed[:, head])


def attend(
    q_rot: Float[np.ndarray, "seq heads head_dim"], keys: Float[np.ndarray, "kv_heads keys head_dim"],
    values: Float[np.ndarray, "kv_heads keys head_dim"], seen: Array, numbers: Numbers,
) -> Float[np.ndarray, "seq heads head_dim"]:  # fmt: skip
    """Return the mixed values of a few queries of one text."""
    seq, heads, head_dim = q_rot.shape
    mixed, kv_heads = np.empty_like(q_rot), len(keys)
    q, out = (array.reshape(seq, kv_heads, heads // kv_heads, head_dim) for array in (q_rot, mixed))
    of_heads = functools.partial(attend_heads, q, keys, values, seen, numbers, out)
    # With few queries these multiplications, with tanh and exp, take four times as long as those with a weight.
    in_threads(of_heads, kv_heads, WORK // 4 // (q[:, 0].size * keys.shape[1]))
    return mixed


def fast_attention(
    q_rot: Float[np.ndarray, "batch seq heads head_dim"], first: int, present: LayerCache,
    visible: Bool[np.ndarray, "batch total"], numbers: Numbers,
) -> Float[np.ndarray, "batch seq heads head_dim"]:  # fmt: skip
    """Return the mixed values of the queries from place `first` on, computed `QUERIES` queries at a time.

    Keys that none of these can see are skipped: keys after the last query, and before the window of the first.
    """
    mixed = np.empty_like(q_rot)
    for start in range(first, first + q_rot.shape[1], QUERIES):
        stop = min(start + QUERIES, first + q_rot.shape[1])
        oldest = present.start if numbers.window is None else max(present.start, start - numbers.window + 1)
        q_places, k_places = np.arange(start, stop)[:, None], np.arange(oldest, stop)
        allowed = k_places <= q_places
        if numbers.window is not None:
            allowed &= k_places > q_places - numbers.window
        kept = slice(oldest - present.start, stop - present.start)
        for row in range(len(q_rot)):
            seen = (allowed & visible[row, k_places]).astype(q_rot.dtype)[:, None]
            keys, values = present.keys[row, :, kept], present.values[row, :, kept]
            piece = slice(start - first, stop - first)
            mixed[row, piece] = attend(q_rot[row, piece], keys, values, seen, numbers)
    return mixed


def attention_of_piece(
    hidden: Hidden, first: int, present: LayerCache, cos: Array, sin: Array, visible: Bool[np.ndarray, "batch total"],
    weights: Mapping[str, Any], numbers: Numbers,
) -> Float[np.ndarray, "rows hidden"]:  # fmt: skip
    """Compute the first half of `refgemma.layers.block` for the tokens from place `first` on, one token per row.

    Their keys and values are written into `present`.
    """
    batch, seq, width = hidden.shape
    x = hidden.reshape(batch * seq, width)
    normed = fast_rms_norm(x, weights["input_layernorm"], numbers.eps)
    projected = (fast_linear(normed, weights[f"{name}_proj"], weights[f"{name}_proj_bias"]) for name in "qkv")
    q, k, v = (rows.reshape(batch, seq, -1, cos.shape[-1]) for rows in projected)
    q_rot = np.empty_like(q)
    new = slice(first - present.start, first - present.start + seq)
    present.values[:, :, new] = v.swapaxes(1, 2)
    for row in range(batch):
        fast_rotate(q[row], cos[row], sin[row], q_rot[row])
        fast_rotate(k[row], cos[row], sin[row], present.keys[row, :, new].swapaxes(0, 1))
    mixed = fast_attention(q_rot, first, present, visible, numbers)
    attended = fast_linear(mixed.reshape(batch * seq, -1), weights["o_proj"], weights["o_proj_bias"])
    middle = fast_rms_norm(attended, weights["post_attention_layernorm"], numbers.eps)
    middle += x
    return middle


def fast_feed_forward(
    normed: Float[np.ndarray, "rows hidden"], weights: Mapping[str, Any], activation: Activation
) -> Float[np.ndarray, "rows hidden"]:
    """Compute the feed-forward network, with one token per column until the last product."""
    gate, up = (multiply(weights[f"{name}_proj"], normed.T) for name in ("gate", "up"))
    over_chunks(functools.partial(gate_up_rows, activation=activation), gate, up)  # gate is the product now
    return transpose(multiply(weights["down_proj"], gate))


def piece_of_block(
    hidden: Hidden, first: int, present: LayerCache, cos: Array, sin: Array, visible: Bool[np.ndarray, "batch total"],
    weights: Mapping[str, Any], numbers: Numbers,
) -> Hidden:  # fmt: skip
    """Compute `refgemma.layers.block` for the tokens from place `first` on; write keys and values into `present`."""
    middle = attention_of_piece(hidden, first, present, cos, sin, visible, weights, numbers)
    normed = fast_rms_norm(middle, weights["pre_feedforward_layernorm"], numbers.eps)
    fed = fast_feed_forward(normed, weights, numbers.activation)
    middle += fast_rms_norm(fed, weights["post_feedforward_layernorm"], numbers.eps)
    return middle.reshape(hidden.shape)


def fast_block(
    hidden: Hidden, past: LayerCache, cos: RotaryTable, sin: RotaryTable, visible: Bool[np.ndarray, "batch total"],
    weights: Mapping[str, Any], numbers: Numbers,
) -> tuple[Hidden, BufferedLayer]:  # fmt: skip
    """Compute `refgemma.layers.block` in pieces of at most `ROWS` tokens; return its output and cache.

    No token looks at a later piece, so each piece goes through the whole block before the next one. In addition to its
    results, a block needs ``ROWS * (3 * hidden + max(2 * intermediate, 4 * heads * head_dim))`` numbers and, for
    scores, ``QUERIES * keys * (1 + THREADS * heads / kv_heads)``.
    """
    out, seq = np.empty_like(hidden), hidden.shape[1]
    present = reserve(past, seq)
    pieces = -(-seq // max(1, ROWS // len(hidden)))
    step = -(-seq // pieces)  # equal pieces: the products of a small last piece would be slower
    with threads_for(hidden.shape[0] * seq, weights.values()):
        for start in range(0, seq, step):
            part = slice(start, start + step)
            out[:, part] = piece_of_block(
                hidden[:, part], past.stop + start, present, cos[:, 0, part], sin[:, 0, part], visible, weights, numbers
            )
    return out, present


# --- the model --------------------------------------------------------------------------------------------------------


def layer_rows(layers: Any, layer: int) -> Mapping[str, Any]:
    """Return the weights of block `layer` by field: arrays, or objects that give rows of them."""
    absent = dict.fromkeys(name for name in LayerWeights.__dataclass_fields__ if name.endswith("_bias"))
    return absent | (layers.rows(layer) if isinstance(layers, OnDemand) else vars(layers[layer]))


Outputs: TypeAlias = Callable[[Start, Weights, Gemma2Config], Iterator[tuple[Hidden, LayerCache]]]


def outputs(start: Start, weights: Weights, config: Gemma2Config) -> Iterator[tuple[Hidden, LayerCache]]:
    """Compute `refgemma.model.reference_outputs` faster; in half precision or with a caller's own mask, call it.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> start = begin([[2, 300, 400]], tiny.weights, tiny.config)
    >>> definition = reference_outputs(start, tiny.weights, tiny.config)
    >>> pairs = zip(outputs(start, tiny.weights, tiny.config), definition)
    >>> all(np.allclose(fast, exact, atol=1e-4) for (fast, _), (exact, _) in pairs)
    True
    """
    if start.inputs.masks is not None or isinstance(start.embedded, Rounded):
        yield from reference_outputs(start, weights, config)
        return
    hidden = start.embedded
    for layer, past in enumerate(start.past):
        window = config.sliding_window if config.is_sliding(layer) else None
        numbers = Numbers(
            config.attention_scale, config.attn_logit_softcapping, window, config.activation, config.rms_norm_eps
        )
        rows = layer_rows(weights.layers, layer)
        hidden, present = fast_block(hidden, past, start.cos, start.sin, start.inputs.visible, rows, numbers)
        yield hidden, present if window is None else forget(present, window)


def fast_head(norm: Hidden, weights: Weights, config: Gemma2Config) -> tuple[Logits, Logits]:
    """Compute `refgemma.model.head`, widening a few rows of the table at a time."""
    if isinstance(norm, Rounded):
        return model.head(norm, weights, config)
    x, table = norm.reshape(-1, norm.shape[-1]), model.head_table(weights, config)
    with threads_for(len(x), [table]):
        raw_logits = fast_linear(x, table).reshape(*norm.shape[:2], -1)
    return raw_logits, ops.soft_cap(raw_logits, config.final_logit_softcapping)


def next_token_logits(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, **given: Unpack[Given]
) -> tuple[Logits, Cache]:  # fmt: skip
    """Compute `refgemma.model.next_token_logits` with fast blocks; the arguments are the same.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> logits, cache = next_token_logits([[2, 300]], tiny.weights, tiny.config)
    >>> logits, cache = next_token_logits([[400]], tiny.weights, tiny.config, cache=cache)
    >>> definition = refgemma.forward([[2, 300, 400]], tiny.weights, tiny.config).logits[:, -1:]
    >>> bool(np.allclose(logits, definition, atol=1e-4))
    True
    """
    start = begin(input_ids, weights, config, **given)
    present = []
    for out, past in outputs(start, weights, config):
        last = out[:, -1:]
        present.append(past)
    norm = ops.rms_norm(last, weights.norm, config.rms_norm_eps)
    return fast_head(norm, weights, config)[1], Cache(present)
