"""Check exercises on single operations. The expected results were recorded from PyTorch (`golden/`)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from refgemma import activations, ops
from refgemma.goldens.load import load_golden
from refgemma.oracle import known_bugs as bugs
from refgemma.oracle import tolerance as tol
from refgemma.precision import Array, bf16, narrow, wide
from refgemma.teach.exercises.feedback import Attempt, Feedback, Hint, Trial, give_feedback
from refgemma.teach.exercises.guide import count_tries

EPS = 1e-6

# --- embedding --------------------------------------------------------------------------------------------------------


@count_tries
def check_embed(answer: Attempt) -> Feedback:
    """Check ``embed(ids, table)``: rows of the table times ``sqrt(hidden)``, rounded to the table's precision.

    Examples
    --------
    >>> check_embed(lambda ids, table: table[ids])
    Not yet: embed(ids, table) with a table of 5 rows and 3584 columns in float32
      21504 of 21504 elements are wrong; the largest error, at [0, 2, 1908], is -3.92562 instead of -235.013
      Hint: the factor sqrt(hidden) is missing.
    """

    def trials() -> Iterator[Trial]:
        for width in (3584, 4608):
            _, g = load_golden(f"op-embed-{width}-f32")
            bound = tol.U * np.abs(np.asarray(g["y"], np.float64))
            call = f"embed(ids, table) with a table of 5 rows and {width} columns in float32"
            yield Trial(call, (g["ids"], g["weight"]), g["y"], bound)

    return give_feedback(answer, trials(), [
        Hint("the factor sqrt(hidden) is missing.", lambda ids, table: table[ids]),
        Hint("the factor is sqrt(hidden), not hidden.", lambda ids, table: table[ids] * table.shape[-1]),
        Hint("the factor is the square root of the number of columns, not of rows.",
             lambda ids, table: table[ids] * np.float32(math.sqrt(table.shape[0]))),
        Hint("the factor is the square root of the number of columns, not of ids.",
             lambda ids, table: table[ids] * np.float32(math.sqrt(len(ids)))),
        Hint("the factor is the square root of the number of columns, not of ids.",
             lambda ids, table: table[ids] * np.float32(math.sqrt(ids.shape[-1]))),
        Hint("the factor is the square root of the number of columns, not of ids.",
             lambda ids, table: table[ids] * np.float32(math.sqrt(ids.size))),
        Hint("multiply by sqrt(hidden) instead of adding it.",
             lambda ids, table: table[ids] + np.float32(math.sqrt(table.shape[-1]))),
        Hint("look up the row of each id, table[ids]; you take the first rows.",
             lambda ids, table: table[: len(ids)] * narrow(math.sqrt(table.shape[-1]), like=table)),
        Hint("you divide by sqrt(hidden); multiply by it instead.",
             lambda ids, table: table[ids] / narrow(math.sqrt(table.shape[-1]), like=table)),
    ])  # fmt: skip


@count_tries
def check_embed_bf16(answer: Attempt) -> Feedback:
    """Check ``embed_bf16(ids, table)``: `embed` of a table in bfloat16, with a factor in bfloat16.

    Examples
    --------
    >>> check_embed_bf16(lambda ids, table: table[ids] * math.sqrt(table.shape[-1]))
    Not yet: embed_bf16(ids, table) with a table of 5 rows and 3584 columns
      7738 of 21504 elements are wrong; the largest error, at [0, 0, 229], is -137 instead of -136
      Hint: the factor itself must first be rounded to the table's precision: narrow(sqrt(hidden), like=table).
    """

    def trials() -> Iterator[Trial]:
        for width in (3584, 4608):
            _, g = load_golden(f"op-embed-{width}-bf16")
            bound = tol.U * np.abs(np.asarray(wide(g["y"]), np.float64))
            call = f"embed_bf16(ids, table) with a table of 5 rows and {width} columns"
            yield Trial(call, (g["ids"], g["weight"]), g["y"], bound)

    def times(factor: Callable[[float], Any]) -> Attempt:
        return lambda ids, table: bf16(wide(table[ids]) * np.float32(factor(math.sqrt(table.shape[-1]))))

    return give_feedback(answer, trials(), [
        Hint("the factor itself must first be rounded to the table's precision: narrow(sqrt(hidden), like=table).",
             times(lambda root: root)),
        Hint("round the factor to bfloat16, not to a whole number.", times(round)),
        Hint("round the factor to the nearest bfloat16 number; you cut off its digits.",
             times(lambda root: _cut(np.array(root, np.float32), 0))),
        Hint("bfloat16 is not float16: it keeps eight bits of digits, float16 eleven.",
             times(lambda root: np.float16(root))),
        Hint("the factor sqrt(hidden) is missing.", lambda ids, table: table[ids]),
        Hint("the factor is sqrt(hidden), not hidden.", times(lambda root: root**2)),
        Hint("you divide by sqrt(hidden); multiply by it instead.",
             times(lambda root: 1 / float(bf16(root)))),
        Hint("you divide by sqrt(hidden); multiply by it instead.",
             lambda ids, table: table[ids] / narrow(math.sqrt(table.shape[-1]), like=table)),
    ])  # fmt: skip


# --- GELU -------------------------------------------------------------------------------------------------------------


@count_tries
def check_gelu_tanh(answer: Attempt) -> Feedback:
    """Check ``gelu_tanh(x)``: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))``.

    Examples
    --------
    >>> print(str(check_gelu_tanh(lambda x: np.maximum(x, 0))).splitlines()[-1])
      Hint: that is ReLU, which has a kink at 0.
    """
    _, g = load_golden("op-gelu-f32")
    near = np.abs(g["x"]) < 12  # beyond 12, GELU is x or 0, and the cubes of the largest recorded numbers overflow
    x, y = g["x"][near], g["y"][near]
    return give_feedback(answer, [Trial("gelu_tanh(x) on numbers from -12 to 12", (x,), y, tol.gelu_tanh(x).bound)], [
        Hint("that is ReLU, which has a kink at 0.", activations.relu),
        Hint("that is the exact GELU with the error function; Gemma 2 uses the tanh form, which differs by up to 5e-4.",
             activations.gelu),
        Hint("that is x * sigmoid(1.702 x), another approximation of GELU.", activations.quick_gelu),
        Hint("that is SiLU, x * sigmoid(x), which Llama uses.", activations.silu),
        Hint("the cube is missing: tanh(sqrt(2/pi) (x + 0.044715 x**3)).", bugs.gelu_without_cube),
        Hint("sqrt(2/pi) multiplies the whole bracket, including the cube.", bugs.gelu_cube_outside),
        Hint("the 0.5 in front is missing.", bugs.gelu_without_half),
        Hint("a sign is wrong: 1 + tanh(...), not 1 - tanh(...).", lambda x: _gelu(x, one=(1, -1))),
        Hint("a sign is wrong: x + 0.044715 x**3, not x - 0.044715 x**3.", lambda x: _gelu(x, cube=-0.044715)),
        Hint("a sign is wrong: the result has the sign of 0.5 x.", lambda x: -_gelu(x)),
        Hint("the 1 is missing: 0.5 x (1 + tanh(...)).", lambda x: _gelu(x, one=(0, 1))),
        Hint("the x in front is missing: 0.5 x (1 + tanh(...)).", lambda x: _gelu(x) / x),
        Hint("0.5 x multiplies the whole bracket (1 + tanh(...)).", lambda x: 0.5 * x + np.tanh(_bend(x))),
        Hint("the factor is sqrt(2 / pi): the root of the quotient.", lambda x: _gelu(x, root=2 / math.pi)),
        Hint("the factor is sqrt(2 / pi): the root of the quotient.", lambda x: _gelu(x, root=math.sqrt(2) / math.pi)),
        Hint("the factor is sqrt(2 / pi), not sqrt(pi / 2).", lambda x: _gelu(x, root=math.sqrt(math.pi / 2))),
        Hint("the power is 3: x + 0.044715 x**3.", lambda x: _gelu(x, power=2)),
        Hint("the constant is 0.044715.", lambda x: _gelu(x, cube=0.44715)),
    ])  # fmt: skip


def _bend(x: Array, cube: float = 0.044715, root: float = math.sqrt(2 / math.pi), power: int = 3) -> Array:
    return np.asarray(root * (x + cube * x**power))


def _gelu(x: Array, one: tuple[int, int] = (1, 1), **mistakes: Any) -> Array:
    """Compute GELU; the arguments introduce mistakes."""
    return np.asarray(0.5 * x * (one[0] + one[1] * np.tanh(_bend(x, **mistakes))))


# --- shared key heads -------------------------------------------------------------------------------------------------


@count_tries
def check_repeat_kv(answer: Attempt) -> Feedback:
    """Check ``repeat_kv(x, groups)``: repeat the heads of (batch, kv_heads, keys, head_dim) for the query heads.

    Examples
    --------
    >>> print(str(check_repeat_kv(lambda x, groups: np.tile(x, (1, groups, 1, 1)))).splitlines()[-1])
      Hint: the heads have the order 0 1 2 0 1 2, but neighbours share a key head: 0 0 1 1 2 2.
    """
    _, g = load_golden("op-repeat-kv-f32")
    groups = int(g["groups"][0])
    call = f"repeat_kv(x, {groups}) on 3 key heads"
    return give_feedback(answer, [Trial(call, (g["x"], groups), g["y"])], [
        Hint("the heads have the order 0 1 2 0 1 2, but neighbours share a key head: 0 0 1 1 2 2.", bugs.tile_heads),
        Hint("that repeats the places (axis 2); the heads are axis 1.",
             lambda x, groups: np.repeat(x, groups, axis=2)),
        Hint("that repeats the texts of the batch (axis 0); the heads are axis 1.",
             lambda x, groups: np.repeat(x, groups, axis=0)),
        Hint("that repeats the numbers of each vector (the last axis); the heads are axis 1.",
             lambda x, groups: np.repeat(x, groups, axis=-1)),
        Hint("np.tile(x, groups) repeats the last axis; the heads are axis 1.", lambda x, groups: np.tile(x, groups)),
        Hint("without an axis, np.repeat returns one long row; the heads are axis=1.",
             lambda x, groups: np.repeat(x, groups)),
        Hint("the copies are a new axis; reshape it into the heads: (batch, kv_heads * groups, keys, head_dim).",
             lambda x, groups: np.stack([x] * groups, axis=2)),
        Hint("repeat each head `groups` times; you repeat it once for each head.",
             lambda x, groups: np.repeat(x, x.shape[1], axis=1)),
        Hint("nothing is repeated: there must be a key head for each query head.", lambda x, groups: x),
    ])  # fmt: skip


# --- rotary positions -------------------------------------------------------------------------------------------------


@count_tries
def check_rotate(answer: Attempt) -> Feedback:
    """Check ``rotate(x, cos, sin)``: rotate each pair ``(x[i], x[i + head_dim/2])`` by its angle.

    Examples
    --------
    >>> print(str(check_rotate(lambda x, cos, sin: x)).splitlines()[-1])
      Hint: nothing is rotated.
    """

    def trials() -> Iterator[Trial]:
        for width in (256, 128):
            _, g = load_golden(f"op-rotary-{width}-f32")
            x, cos, sin = g["x"], g["cos"], g["sin"]
            yield Trial(f"rotate(x, cos, sin), heads of {width}", (x, cos, sin), g["y"], tol.rotate(x, cos, sin).bound)

    halves = "pairs lie half a head apart, (0, head_dim/2), not side by side, (0, 1)."
    return give_feedback(answer, trials(), [
        Hint("nothing is rotated.", bugs.leave_unturned),
        Hint(halves, bugs.neighbours),
        Hint(halves, bugs.neighbours_by_place),
        Hint("that rotates in the wrong direction: the minus belongs to the second half, which becomes the first.",
             bugs.turned_back),
        Hint("a minus is missing: a rotation is (a cos - b sin, b cos + a sin).", bugs.turned_without_minus),
        Hint("the two halves must be exchanged in the second product.", bugs.turned_in_place),
        Hint("cosine and sine are exchanged.", bugs.cos_for_sin),
        Hint("one sign is wrong: only the half that becomes the first is negative, (a cos - b sin, b cos + a sin).",
             bugs.rotate_by(lambda x: -np.roll(x, x.shape[-1] // 2, axis=-1))),
        Hint("the two halves must be exchanged in the second product.", bugs.rotate_by(lambda x: _negate(x, 0))),
        Hint("the two halves must be exchanged in the second product.", bugs.rotate_by(lambda x: _negate(x, 1))),
        Hint("a sign is wrong: nothing is negative in x * cos.",
             lambda x, cos, sin: ops.rotate(x, cos, sin) - x * cos + _negate(x, 0) * cos),
        Hint("a sign is wrong: nothing is negative in x * cos.",
             lambda x, cos, sin: ops.rotate(x, cos, sin) - x * cos + _negate(x, 1) * cos),
        Hint("the second product is missing: x * cos + (-second half, first half) * sin.",
             lambda x, cos, sin: x * cos),
    ])  # fmt: skip


def _negate(x: Array, half: int) -> Array:
    halves = np.split(x, 2, axis=-1)
    halves[half] = -halves[half]
    return np.concatenate(halves, axis=-1)


# --- soft cap ---------------------------------------------------------------------------------------------------------


@count_tries
def check_soft_cap(answer: Attempt) -> Feedback:
    """Check ``soft_cap(x, cap)``: ``cap * tanh(x / cap)``.

    Examples
    --------
    >>> print(str(check_soft_cap(lambda x, cap: np.clip(x, -cap, cap))).splitlines()[-1])
      Hint: that clips at the cap. A soft cap also reduces smaller numbers: cap * tanh(x / cap).
    """

    def trials() -> Iterator[Trial]:
        for cap in (50, 30):
            _, g = load_golden(f"op-soft-cap-{cap}-f32")
            low, high = g["x"].min(), g["x"].max()
            call = f"soft_cap(x, cap) on numbers from {low:g} to {high:g} with a cap of {cap}"
            yield Trial(call, (g["x"], float(cap)), g["y"], tol.soft_cap(g["x"], float(cap)).bound)

    return give_feedback(answer, trials(), [
        Hint("the values are unchanged. The formula is cap * tanh(x / cap).", lambda x, cap: x),
        Hint("that clips at the cap. A soft cap also reduces smaller numbers: cap * tanh(x / cap).", bugs.cut_off),
        Hint("divide x by the cap inside the tanh.", bugs.cap_undivided),
        Hint("the result lies between -1 and 1: multiply it by the cap.", bugs.cap_unmultiplied),
        Hint("that limits only large positive numbers, and with a kink: cap * tanh(x / cap).",
             lambda x, cap: np.minimum(x, cap)),
        Hint("divide x by the cap inside the tanh; you multiply by it.", lambda x, cap: cap * np.tanh(x * cap)),
        Hint("inside the tanh is x / cap; you have cap / x.", lambda x, cap: cap * np.tanh(cap / x)),
        Hint("multiply the tanh by the cap; you divide by it.", lambda x, cap: np.tanh(x / cap) / cap),
        Hint("a sign is wrong: the result has the sign of x.", lambda x, cap: -cap * np.tanh(x / cap)),
        Hint("that is the arc tangent, which goes beyond the cap; use tanh.", lambda x, cap: cap * np.arctan(x / cap)),
        Hint("that is a sigmoid, between 0 and the cap; tanh lies between -cap and cap.",
             lambda x, cap: cap / (1 + np.exp(-x / cap))),
        Hint("use the argument cap, which is 50 or 30, not a fixed number.",
             lambda x, cap: ops.soft_cap(x, 80 - cap)),
    ])  # fmt: skip


# --- from scores to probabilities -------------------------------------------------------------------------------------


@count_tries
def check_attention_probs(answer: Attempt) -> Feedback:
    """Check ``attention_probs(scores, mask, cap)``: cap, mask, softmax. `mask` is true where a query may see a key.

    Examples
    --------
    >>> wrong = lambda scores, mask, cap: np.where(mask, scores, 0.0)
    >>> bool(check_attention_probs(wrong))
    False
    """
    _, g = load_golden("bends-forward-f32")
    cap, window = 2.0, 5  # of the model "bends" in golden/cases.py

    def trials() -> Iterator[Trial]:
        for layer, kind in ((1, "full"), (0, "sliding")):
            prefix = f"calls.0.layers.{layer}.attention."
            seq = g[prefix + "scores"].shape[-1]
            mask = np.tri(seq, dtype=bool)
            if kind == "sliding":
                mask &= ~np.tri(seq, k=-window, dtype=bool)
            # An error of the capped score is a relative error of its exponential, and so of the result.
            bound = tol.softmax(g[prefix + "capped"], mask).bound
            bound = bound + 2 * g[prefix + "probs"] * float(tol.soft_cap(np.array([1e9]), cap).bound[0])
            call = f"attention_probs(scores, mask, {cap}) of a {kind} layer"
            yield Trial(call, (g[prefix + "scores"], mask[None, None], cap), g[prefix + "probs"], bound)

    def probs(softmax: Callable[[Array, Array], Array]) -> Attempt:
        return lambda scores, mask, cap: softmax(ops.soft_cap(scores, cap), mask.repeat(len(scores), axis=0))

    return give_feedback(answer, trials(), [
        Hint("apply the mask after the cap: a capped minus infinity makes later tokens visible.",
             lambda scores, mask, cap: probs(bugs.hidden_keys_at(-cap))(scores, mask, cap)),
        Hint("the cap is missing.", lambda scores, mask, cap: ops.softmax(scores, mask.repeat(len(scores), axis=0))),
        Hint("the mask is missing: tokens see later tokens.", probs(bugs.softmax_over_all)),
        Hint("the mask is inverted: true means that a key may be seen.",
             probs(lambda capped, mask: ops.softmax(capped, ~mask))),
        Hint("apply the softmax along the keys, the last axis, so that each row has the sum 1.",
             probs(lambda capped, mask: _exchange(ops.softmax(_exchange(capped), _exchange(mask))))),
        Hint("mask the scores: if you set probabilities to 0 after the softmax, the sum of a row is not 1.",
             probs(lambda capped, mask: np.where(mask, bugs.softmax_over_all(capped, mask), 0))),
        Hint("a score of 0 does not hide a key; its score must be minus infinity.",
             probs(bugs.hidden_keys_at(0))),
        Hint("divide each row by its own sum: np.sum(..., axis=-1, keepdims=True); you divide by the sum of all.",
             probs(lambda capped, mask: (e := np.exp(np.where(mask, capped, -np.inf))) / e.sum())),
        Hint("keep the axis of the sum: np.sum(..., axis=-1, keepdims=True).",
             probs(lambda capped, mask: (e := np.exp(np.where(mask, capped, -np.inf))) / e.sum(axis=-1))),
        Hint("the capped scores lie between -1 and 1: multiply the tanh by the cap.",
             lambda scores, mask, cap: ops.softmax(np.tanh(scores / cap), mask.repeat(len(scores), axis=0))),
        Hint("divide the scores by the cap inside the tanh.",
             lambda scores, mask, cap: ops.softmax(cap * np.tanh(scores), mask.repeat(len(scores), axis=0))),
        Hint("that clips the scores at the cap; the cap is soft: cap * tanh(scores / cap).",
             lambda scores, mask, cap: ops.softmax(np.clip(scores, -cap, cap), mask.repeat(len(scores), axis=0))),
        Hint("the exponential is missing: divide exp(scores) by their sum.",
             probs(lambda capped, mask: (w := np.where(mask, capped, 0)) / w.sum(axis=-1, keepdims=True))),
        Hint("a score of -1 does not hide a key; its score must be minus infinity.",
             probs(bugs.hidden_keys_at(-1))),
        Hint("adding the mask hides nothing; the score of a hidden key must be minus infinity.",
             probs(lambda capped, mask: bugs.softmax_over_all(capped + mask, mask))),
        Hint("cap the scores, before the mask and the softmax; you cap the probabilities.",
             lambda scores, mask, cap: ops.soft_cap(ops.softmax(scores, mask.repeat(len(scores), axis=0)), cap)),
        Hint("the mask is inverted: true means that a key may be seen.",
             probs(lambda capped, mask: bugs.softmax_over_all(np.where(mask, -np.inf, capped), mask))),
        Hint("these are exponentials: divide each row by its sum.",
             probs(lambda capped, mask: np.exp(np.where(mask, capped, -np.inf)))),
    ])  # fmt: skip


def _exchange(x: Array) -> Array:
    return x.swapaxes(-1, -2)


# --- windows ----------------------------------------------------------------------------------------------------------


@count_tries
def check_sliding_mask(answer: Attempt) -> Feedback:
    """Check ``sliding_mask(q_places, k_places, window)``: true for the last `window` keys up to the query's own.

    Examples
    --------
    >>> print(str(check_sliding_mask(lambda q, k, window: k <= q[:, None])).splitlines()[-1])
      Hint: that is the causal mask; the window is missing.
    """
    _, g = load_golden("op-masks-f32")
    window = int(g["window"][0])
    row = int(np.argmax(g["padding"].sum(axis=-1)))  # the row without padding
    recorded = g["sliding"][row, 0].astype(bool)
    places = np.arange(len(recorded))

    trials = [
        Trial(f"sliding_mask(q_places, k_places, {window}), a whole text of {len(places)} tokens",
              (places, places, window), recorded),
        Trial(f"sliding_mask(q_places, k_places, {window}), the last two tokens of the text only",
              (places[-2:], places, window), recorded[-2:]),
    ]  # fmt: skip
    return give_feedback(answer, trials, [
        Hint("that is the causal mask; the window is missing.", lambda q, k, w: ops.causal_mask(q, k)),
        Hint("the window is one key too wide: the query's own place counts as one of the keys.",
             lambda q, k, w: ops.sliding_mask(q, k, w + 1)),
        Hint("the window is one key too narrow: the query's own place counts as one of the keys.",
             lambda q, k, w: ops.sliding_mask(q, k, w - 1)),
        Hint("a query may not see later keys, even if they are near.", bugs.window_both_ways),
        Hint("a query may not see later keys: the window ends at its own place.",
             bugs.window_open_ahead),
        Hint("a query must also see its own key.", lambda q, k, w: ops.sliding_mask(q, k, w) & (k != q[:, None])),
        Hint("the window ends at the query's own key, which it includes: q - window < k <= q.",
             lambda q, k, w: (k < q[:, None]) & (k >= q[:, None] - w)),
        Hint("the window ends at each query; you always show the first keys of the text.",
             lambda q, k, w: ops.causal_mask(q, k) & (k < w)),
        Hint("the window ends at each query; your windows lie side by side.",
             lambda q, k, w: ops.causal_mask(q, k) & (k // w == q[:, None] // w)),
        Hint("compare each query with each key: make q_places a column, q_places[:, None].",
             lambda q, k, w: (k <= q) & (k > q - w)),
        Hint("for arrays write & and brackets, not `and`: (a <= b) & (c > d).",
             lambda q, k, w: (k <= q[:, None]) and (k > q[:, None] - w)),
        Hint("a mask has true and false, not the numbers to add to scores.",
             lambda q, k, w: np.where(ops.sliding_mask(q, k, w), 0, -np.inf)),
        Hint("rows are queries and columns are keys; you exchanged them.",
             lambda q, k, w: ops.sliding_mask(q, k, w).T),
        Hint("true means that a key may be seen.", lambda q, k, w: ~ops.sliding_mask(q, k, w)),
        Hint("use the arguments q_places and k_places: when a text is continued, the first query is not at place 0.",
             lambda q, k, w: ops.sliding_mask(np.arange(len(q)), k, w)),
    ])  # fmt: skip


# --- norms ------------------------------------------------------------------------------------------------------------


@count_tries
def check_rms_norm(answer: Attempt) -> Feedback:
    """Check ``rms_norm(x, weight, eps)``: ``x / sqrt(mean(x**2) + eps) * (1 + weight)`` in float32, rounded once.

    Examples
    --------
    >>> wrong = lambda x, weight, eps: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight
    >>> print(str(check_rms_norm(wrong)).splitlines()[-1])
      Hint: Gemma stores the weight as an offset from one: multiply by 1 + weight.
    """

    def trials() -> Iterator[Trial]:
        for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
            _, g = load_golden(f"op-rms-norm-{short}")
            bound = tol.rms_norm(g["x"], g["weight"], EPS).bound
            yield Trial(f"rms_norm(x, weight, {EPS}) in {dtype}", (g["x"], g["weight"], EPS), g["y"], bound)

    zero = "a vector of zeros is divided by 0: eps is missing, sqrt(mean(x**2) + eps)."
    early = "in half precision, compute in float32 (wide) and round once at the end (narrow); you round earlier."
    return give_feedback(answer, trials(), [
        Hint("Gemma stores the weight as an offset from one: multiply by 1 + weight.", bugs.norm_offset(0)),
        Hint("that is LayerNorm: RMSNorm does not subtract the mean.", bugs.mean_subtracted),
        Hint("divide by the square root of the mean square.", bugs.norm_without_root),
        Hint("use the mean of the squares, not their sum.", bugs.norm_of_sum),
        Hint("compute the mean of each vector separately: axis=-1, keepdims=True.", bugs.norm_of_all),
        Hint("eps belongs inside the root: sqrt(mean(x**2) + eps).", bugs.eps_outside),
        Hint("the factor 1 + weight is missing.", bugs.norm_without_factor),
        Hint(zero, _norm_answer(lambda x: _size(x))),
        Hint(zero, _norm_answer(lambda x: _size(x), lambda y, w: y * w)),
        Hint(f"{zero} And use the mean of the squares, not their sum.",
             _norm_answer(lambda x: np.linalg.norm(x, axis=-1, keepdims=True))),
        Hint("use the mean of the squares, not their sum; np.linalg.norm is the root of the sum.",
             lambda x, w, eps: _norm_answer(lambda x: np.linalg.norm(x, axis=-1, keepdims=True) + eps)(x, w, eps)),
        Hint("std subtracts the mean; divide by sqrt(mean(x**2) + eps).",
             lambda x, w, eps: _norm_answer(lambda x: np.std(x, axis=-1, keepdims=True) + eps)(x, w, eps)),
        Hint("var subtracts the mean; divide by sqrt(mean(x**2) + eps).",
             bugs.norm_by(lambda x, eps: np.sqrt(np.var(x, axis=-1, keepdims=True) + eps))),
        Hint("put 1 + weight in brackets: * (1 + weight).",
             lambda x, w, eps: _norm_answer(lambda x: _size(x, eps), lambda y, w: y * w + 1)(x, w, eps)),
        Hint("multiply by 1 + weight; you add it.",
             lambda x, w, eps: _norm_answer(lambda x: _size(x, eps), lambda y, w: y + 1 + w)(x, w, eps)),
        Hint("a sign is wrong: multiply by 1 + weight.",
             lambda x, w, eps: _norm_answer(lambda x: _size(x, eps), lambda y, w: y * (1 - w))(x, w, eps)),
        Hint("square first, then take the mean: mean(x**2), not mean(x)**2.",
             bugs.norm_by(lambda x, eps: np.sqrt(np.mean(x, axis=-1, keepdims=True) ** 2 + eps))),
        Hint("take the mean of the squares, and then the root; you take the mean of the sizes.",
             lambda x, w, eps: _norm_answer(lambda x: np.mean(np.abs(x), axis=-1, keepdims=True) + eps)(x, w, eps)),
        Hint("divide by the root mean square; you multiply by it.",
             bugs.norm_by(lambda x, eps: 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))),
        Hint("compute the mean of each vector: axis=-1, not axis=0.",
             bugs.norm_by(lambda x, eps: np.sqrt(np.mean(x * x, axis=0, keepdims=True) + eps))),
        Hint("keep the axis of the mean: np.mean(..., axis=-1, keepdims=True).",
             lambda x, w, eps: x / np.sqrt((x * x).mean(-1) + eps)),
        Hint(early, bugs.norm_cast_early("bfloat16")),
        Hint(early, bugs.norm_in_steps),
    ])  # fmt: skip


def _size(x: Array, eps: float = 0.0) -> Array:
    return np.asarray(np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def _norm_answer(
    size: Callable[[Array], Array], scale: Callable[[Array, Array], Array] = lambda y, w: y * (1 + w)
) -> Attempt:  # fmt: skip
    """Return a norm with another divisor or another use of the weight."""
    return lambda x, weight, eps: narrow(scale(wide(x) / size(wide(x)), wide(weight)), like=x)


# --- norms of queries and keys ----------------------------------------------------------------------------------------

# Two heads of four numbers, three queries and four keys; the scores were recorded from transformers 5.23:
# Gemma3RMSNorm of each, and torch's product. tests/parity/test_exercises_parity.py records them again.
_QUERIES = np.array(
    [
        [[2.5, 2.5, 2, 2.5], [-3, 2, 3, -1.5], [-2, -2.5, 2, 3]],
        [[0.5, 0.5, 2, -3], [2, 2.5, -2.5, 3], [2.5, -1.5, 0, 2]],
    ],
    np.float32,
)
_KEYS = np.array(
    [[[20, -20, 8, -4], [-8, 16, 8, -4], [20, 0, 20, -20], [20, 16, 0, 0]],
     [[-8, -12, -12, 16], [-4, 24, -8, 0], [-4, 12, -8, 24], [8, -24, 24, 4]]], np.float32)  # fmt: skip
_Q_WEIGHT, _K_WEIGHT = np.array([[0.5, -0.25, 1, 0], [-0.5, 0.75, 0.25, 2]], np.float32)
_QK_SCORES = np.array(
    [[[-0.17079876, 0.66391367, -0.10087125, 0.98228759], [-0.17798197, 1.86823678, 1.5241468, -0.03171408],
      [0.3693645, -0.50464982, -0.87807024, -0.89069551]],
     [[-3.16232014, -0.36483550, -3.20268989, 0.7366333], [1.79496360, 1.26543033, 2.79472542, -1.35969543],
      [1.60017443, -0.80615008, 1.50499988, 0.9266963]]], np.float32)  # fmt: skip


def _qk_scores(
    norm_q: Callable[[Array, Array], Array], norm_k: Callable[[Array, Array], Array] | None = None,
    scale: Callable[[float], float] = lambda scalar: scalar**-0.5,
) -> Attempt:  # fmt: skip
    """Return an answer to `qk_norm_scores` with these norms of queries and keys, and this factor."""

    def scores(q: Array, k: Array, q_weight: Array, k_weight: Array, scalar: float) -> Array:
        made: Array = norm_q(q, q_weight) @ _exchange((norm_k or norm_q)(k, k_weight)) * scale(scalar)
        return made

    return scores


@count_tries
def check_qk_norm_scores(answer: Attempt) -> Feedback:
    """Check ``qk_norm_scores(q, k, q_weight, k_weight, scalar)``: the attention scores of Gemma 3.

    Examples
    --------
    >>> wrong = lambda q, k, q_weight, k_weight, scalar: q @ k.swapaxes(-1, -2) / np.sqrt(scalar)
    >>> print(str(check_qk_norm_scores(wrong)).splitlines()[-1])
      Hint: both norms are missing: these are the scores of Gemma 2.
    """

    def norm(x: Array, weight: Array) -> Array:
        return ops.rms_norm(x, weight, EPS)

    def other(size: Callable[[Array], Array], factor: Callable[[Array], Array] = lambda w: 1 + w) -> Attempt:
        return _qk_scores(lambda x, w: x / size(x) * factor(w))

    # Some twenty roundings of float32 on the way, of numbers up to 4.
    trial = Trial(
        "qk_norm_scores(q, k, q_weight, k_weight, 9), two heads of four numbers",
        (_QUERIES, _KEYS, _Q_WEIGHT, _K_WEIGHT, 9.0), _QK_SCORES, 20 * 4 * 2.0**-24,
    )  # fmt: skip
    return give_feedback(answer, [trial], [
        Hint("both norms are missing: these are the scores of Gemma 2.", _qk_scores(lambda x, w: x)),
        Hint("the norm of the keys is missing.", _qk_scores(norm, lambda x, w: x)),
        Hint("the norm of the queries is missing.", _qk_scores(lambda x, w: x, norm)),
        Hint("Gemma stores the weight as an offset from one: multiply by 1 + weight.", other(_size, lambda w: w)),
        Hint("the factors 1 + weight are missing.", other(_size, lambda w: np.ones_like(w))),
        Hint("queries and keys have weights of their own; you use one for both.",
             lambda q, k, q_weight, k_weight, scalar: _qk_scores(norm)(q, k, k_weight, k_weight, scalar)),
        Hint("queries and keys have weights of their own; you use one for both.",
             lambda q, k, q_weight, k_weight, scalar: _qk_scores(norm)(q, k, q_weight, q_weight, scalar)),
        Hint("divide by the root of scalar; you divide by scalar.", _qk_scores(norm, scale=lambda scalar: 1 / scalar)),
        Hint("divide by the root of scalar; you multiply by it.", _qk_scores(norm, scale=lambda scalar: scalar**0.5)),
        Hint("the division by the root of scalar is missing.", _qk_scores(norm, scale=lambda scalar: 1)),
        Hint("divide by the root of the argument scalar, which need not be head_dim.",
             _qk_scores(norm, scale=lambda scalar: 0.5)),
        Hint("use the mean of the squares, not their sum: np.linalg.norm is the root of the sum.",
             other(lambda x: np.linalg.norm(x, axis=-1, keepdims=True))),
        Hint("each vector has its own size: axis=-1, keepdims=True.", other(lambda x: np.sqrt(np.mean(x * x)))),
        Hint("divide by the root of the mean square; the root is missing.",
             other(lambda x: np.mean(x * x, axis=-1, keepdims=True))),
        Hint("that is LayerNorm: RMSNorm does not subtract the mean.",
             _qk_scores(lambda x, w: norm(x - x.mean(axis=-1, keepdims=True), w))),
        Hint("QK-norm replaces the cap; there is no tanh here.",
             lambda *given: ops.soft_cap(_qk_scores(norm)(*given), 50.0)),
        Hint("the scores have no softmax yet.",
             lambda *given: (e := np.exp(_qk_scores(norm)(*given))) / e.sum(axis=-1, keepdims=True)),
    ])  # fmt: skip


# --- rounding ---------------------------------------------------------------------------------------------------------


def _cut(x: Array, added: int) -> Array:
    words = (np.asarray(x, np.float32).view(np.uint32) + np.uint32(added)) & np.uint32(0xFFFF0000)
    return words.view(np.float32)


def _round(x: Array) -> Array:
    return np.asarray(x.astype(ml_dtypes.bfloat16).astype(np.float32))


@count_tries
def check_round_to_bf16(answer: Attempt) -> Feedback:
    """Check ``round_to_bf16(x)``: round float32 numbers to bfloat16, ties to even, and return a float32 array.

    The expected result is the conversion of `ml_dtypes`, which machine-learning libraries use.

    Examples
    --------
    >>> print(str(check_round_to_bf16(lambda x: np.round(x, 2))).splitlines()[0])
    Not yet: round_to_bf16(x) on numbers of all sizes
    """
    rng = np.random.default_rng(7)
    sizes = (rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500)).astype(np.float32)
    ties = (1 + np.arange(1, 65, 2) * 2.0**-8).astype(np.float32)  # half way between two bfloat16 numbers

    trials = [
        Trial("round_to_bf16(x) on numbers of all sizes", (sizes,), _round(sizes)),
        Trial("round_to_bf16(x) on numbers half way between two bfloat16 numbers", (ties,), _round(ties)),
    ]
    return give_feedback(answer, trials, [
        Hint("that truncates the lower half; round to the nearest instead.", lambda x: _cut(x, 0)),
        Hint("a number in the middle is rounded to the neighbour whose last bit is 0 (ties to even), not always up.",
             lambda x: _cut(x, 0x8000)),
        Hint("a number in the middle is rounded to the neighbour whose last bit is 0 (ties to even), not always down.",
             lambda x: _cut(x, 0x7FFF)),
        Hint("that is float16: five exponent bits and eleven bits of precision.",
             lambda x: x.astype(np.float16).astype(np.float32)),
        Hint("nothing is rounded.", lambda x: x),
        Hint("return float32 numbers: view the rounded bits as float32, .view(np.float32).",
             lambda x: _round(x).view(np.uint32)),
        Hint("return float32 numbers: you return the upper half of the bits as a whole number.",
             lambda x: x.view(np.uint32) >> 16),
        Hint("return float32 numbers: you return the upper half of the bits as a whole number.",
             lambda x: _round(x).view(np.uint32) >> 16),
        Hint("that always rounds away from 0; round to the nearest instead.", lambda x: _cut(x, 0xFFFF)),
        Hint("bfloat16 has eight bits of precision, including the leading 1, which is not stored; you keep seven.",
             lambda x: np.ldexp(np.round(np.frexp(x)[0] * 2**7) / 2**7, np.frexp(x)[1])),
        Hint("bfloat16 has eight bits of precision, including the leading 1, which is not stored; you keep nine.",
             lambda x: np.ldexp(np.round(np.frexp(x)[0] * 2**9) / 2**9, np.frexp(x)[1])),
        Hint("bf16(x) returns an array that rounds every operation; return an ordinary array: wide(bf16(x)).", bf16),
    ])  # fmt: skip
