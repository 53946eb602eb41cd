"""Exercises on single operations. The expected results were recorded from PyTorch (`golden/`)."""

import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from refgemma import activations, ops
from refgemma.goldens.load import load_golden
from refgemma.oracle import known_bugs as bugs
from refgemma.oracle import tolerance as tol
from refgemma.precision import Array, bf16, narrow, wide
from refgemma.teach.exercises.feedback import Attempt, Feedback, Hint, Trial, give_feedback

EPS = 1e-6

# --- embedding --------------------------------------------------------------------------------------------------------


def check_embed(answer: Attempt) -> Feedback:
    """Check ``embed(ids, table)``: rows of the table times ``sqrt(hidden)``, the factor in the table's precision.

    Examples
    --------
    >>> check_embed(lambda ids, table: table[ids])
    Not yet: embed(ids, table) with a table of 5 rows and 3584 columns in float32
      21504 of 21504 elements are wrong; the largest error, at [0, 2, 1908], is -3.92562 instead of -235.013
      Hint: the factor sqrt(hidden) is missing.
    """

    def trials() -> Iterator[Trial]:
        for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
            for width in (3584, 4608):
                _, g = load_golden(f"op-embed-{width}-{short}")
                bound = tol.U * np.abs(np.asarray(wide(g["y"]), np.float64))
                call = f"embed(ids, table) with a table of 5 rows and {width} columns in {dtype}"
                yield Trial(call, (g["ids"], g["weight"]), g["y"], bound)

    return give_feedback(answer, trials(), [
        Hint("the factor sqrt(hidden) is missing.", lambda ids, table: table[ids]),
        Hint("the factor is sqrt(hidden), not hidden.", lambda ids, table: table[ids] * table.shape[-1]),
        Hint("the factor is the square root of the number of columns, not of rows.",
             lambda ids, table: table[ids] * np.float32(math.sqrt(table.shape[0]))),
        Hint("you divide by sqrt(hidden); multiply by it instead.",
             lambda ids, table: table[ids] / narrow(math.sqrt(table.shape[-1]), like=table)),
        Hint("the factor itself must first be rounded to the table's precision: narrow(sqrt(hidden), like=table).",
             lambda ids, table: table[ids] * math.sqrt(table.shape[-1])),
    ])  # fmt: skip


# --- GELU -------------------------------------------------------------------------------------------------------------


def check_gelu_tanh(answer: Attempt) -> Feedback:
    """Check ``gelu_tanh(x)``: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))``.

    Examples
    --------
    >>> print(str(check_gelu_tanh(lambda x: np.maximum(x, 0))).splitlines()[-1])
      Hint: that is ReLU, which has a kink at 0.
    """
    _, g = load_golden("op-gelu-f32")
    near = np.abs(g["x"]) < 12  # beyond, GELU is x or 0, and the cube of the largest recorded numbers overflows
    x, y = g["x"][near], g["y"][near]
    return give_feedback(answer, [Trial("gelu_tanh(x) on numbers from -12 to 12", (x,), y, tol.gelu_tanh(x).bound)], [
        Hint("that is ReLU, which has a kink at 0.", activations.relu),
        Hint("that is the exact GELU with the error function; Gemma 2 uses the tanh form, up to 5e-4 away.",
             activations.gelu),
        Hint("that is x * sigmoid(1.702 x), another approximation of GELU.", activations.quick_gelu),
        Hint("that is SiLU, x * sigmoid(x), which Llama uses.", activations.silu),
        Hint("the cube is missing: tanh(sqrt(2/pi) (x + 0.044715 x**3)).", bugs.gelu_without_cube),
        Hint("sqrt(2/pi) multiplies the whole bracket, including the cube.", bugs.gelu_cube_outside),
        Hint("the 0.5 in front is missing.", bugs.gelu_without_half),
    ])  # fmt: skip


# --- shared key heads -------------------------------------------------------------------------------------------------


def check_repeat_kv(answer: Attempt) -> Feedback:
    """Check ``repeat_kv(x, groups)``: from (batch, kv_heads, keys, head_dim) to as many heads as there are queries.

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
        Hint("nothing is repeated: there must be a key head for each query head.", lambda x, groups: x),
    ])  # fmt: skip


# --- rotary positions -------------------------------------------------------------------------------------------------


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
    ])  # fmt: skip


# --- soft cap ---------------------------------------------------------------------------------------------------------


def check_soft_cap(answer: Attempt) -> Feedback:
    """Check ``soft_cap(x, cap)``: ``cap * tanh(x / cap)``.

    Examples
    --------
    >>> print(str(check_soft_cap(lambda x, cap: np.clip(x, -cap, cap))).splitlines()[-1])
      Hint: that cuts off at the cap. A soft cap also reduces smaller numbers: cap * tanh(x / cap).
    """

    def trials() -> Iterator[Trial]:
        for cap in (50, 30):
            _, g = load_golden(f"op-soft-cap-{cap}-f32")
            low, high = g["x"].min(), g["x"].max()
            call = f"soft_cap(x, cap) on numbers from {low:g} to {high:g} with a cap of {cap}"
            yield Trial(call, (g["x"], float(cap)), g["y"], tol.soft_cap(g["x"], float(cap)).bound)

    return give_feedback(answer, trials(), [
        Hint("the values are unchanged. The formula is cap * tanh(x / cap).", lambda x, cap: x),
        Hint("that cuts off at the cap. A soft cap also reduces smaller numbers: cap * tanh(x / cap).", bugs.cut_off),
        Hint("divide x by the cap inside the tanh.", bugs.cap_undivided),
        Hint("the result lies between -1 and 1: multiply it by the cap.", bugs.cap_unmultiplied),
        Hint("use the argument cap, which is 50 or 30, not a fixed number.",
             lambda x, cap: ops.soft_cap(x, 80 - cap)),
    ])  # fmt: skip


# --- from scores to probabilities -------------------------------------------------------------------------------------


def check_attention_probs(answer: Attempt) -> Feedback:
    """Check ``attention_probs(scores, mask, cap)``: cap, mask, softmax. `mask` is true where a key may be seen.

    Examples
    --------
    >>> wrong = lambda scores, mask, cap: np.where(mask, scores, 0.0)
    >>> bool(check_attention_probs(wrong))
    False
    """
    _, g = load_golden("bends-forward-f32")
    cap, window = 2.0, 5  # of the model "bends", see golden/cases.py

    def trials() -> Iterator[Trial]:
        for layer, kind in ((1, "full"), (0, "sliding")):
            prefix = f"calls.0.layers.{layer}.attention."
            seq = g[prefix + "scores"].shape[-1]
            mask = np.tri(seq, dtype=bool)
            if kind == "sliding":
                mask &= ~np.tri(seq, k=-window, dtype=bool)
            # An error of the cap is an error of the exponent, so it is a relative error of the result and of the sum.
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
        Hint("a score of 0 is an ordinary score; to hide a key its score must be minus infinity.",
             probs(bugs.hidden_keys_at(0))),
        Hint("these are exponentials: divide each row by its sum.",
             probs(lambda capped, mask: np.exp(np.where(mask, capped, -np.inf)))),
    ])  # fmt: skip


def _exchange(x: Array) -> Array:
    return x.swapaxes(-1, -2)


# --- windows ----------------------------------------------------------------------------------------------------------


def check_sliding_mask(answer: Attempt) -> Feedback:
    """Check ``sliding_mask(q_places, k_places, window)``: true for the last `window` keys, including the query's own.

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
        Hint("a query may not see later keys, even near ones: keys are at its place or before.", bugs.window_both_ways),
        Hint("a query may not see later keys: the window ends at its own place.",
             bugs.window_open_ahead),
        Hint("a query must also see its own key.", lambda q, k, w: ops.sliding_mask(q, k, w) & (k != q[:, None])),
        Hint("rows are queries and columns are keys; you exchanged them.",
             lambda q, k, w: ops.sliding_mask(q, k, w).T),
        Hint("true means that a key may be seen.", lambda q, k, w: ~ops.sliding_mask(q, k, w)),
        Hint("use the arguments q_places and k_places: when a text is continued, the first query is not at place 0.",
             lambda q, k, w: ops.sliding_mask(np.arange(len(q)), k, w)),
    ])  # fmt: skip


# --- norms ------------------------------------------------------------------------------------------------------------


def check_rms_norm(answer: Attempt) -> Feedback:
    """Check ``rms_norm(x, weight, eps)``: ``x / sqrt(mean(x**2) + eps) * (1 + weight)``, in float32, rounded at the
    end.

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

    early = "in half precision, compute in float32 (wide) and round once at the end (narrow); you round earlier."
    return give_feedback(answer, trials(), [
        Hint("Gemma stores the weight as an offset from one: multiply by 1 + weight.", bugs.norm_offset(0)),
        Hint("that is LayerNorm: RMSNorm does not subtract the mean.", bugs.mean_subtracted),
        Hint("divide by the square root of the mean square.", bugs.norm_without_root),
        Hint("use the mean of the squares, not their sum.", bugs.norm_of_sum),
        Hint("compute the mean of each vector separately: axis=-1, keepdims=True.", bugs.norm_of_all),
        Hint("eps belongs inside the root: sqrt(mean(x**2) + eps).", bugs.eps_outside),
        Hint("the factor 1 + weight is missing.", bugs.norm_without_factor),
        Hint(early, bugs.norm_cast_early("bfloat16")),
        Hint(early, bugs.norm_in_steps),
    ])  # fmt: skip


# --- rounding ---------------------------------------------------------------------------------------------------------


def _cut(x: Array, added: int) -> Array:
    words = (np.asarray(x, np.float32).view(np.uint32) + np.uint32(added)) & np.uint32(0xFFFF0000)
    return words.view(np.float32)


def check_round_to_bf16(answer: Attempt) -> Feedback:
    """Check ``round_to_bf16(x)``: float32 numbers rounded to bfloat16, ties to even, as a float32 array.

    The expected result is the conversion of `ml_dtypes`, which the machine-learning libraries share.

    Examples
    --------
    >>> print(str(check_round_to_bf16(lambda x: np.round(x, 2))).splitlines()[0])
    Not yet: round_to_bf16(x) on numbers of all sizes
    """
    rng = np.random.default_rng(7)
    sizes = (rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500)).astype(np.float32)
    ties = (1 + np.arange(1, 65, 2) * 2.0**-8).astype(np.float32)  # half way between two bfloat16 numbers

    def right(x: Array) -> Array:
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)

    trials = [
        Trial("round_to_bf16(x) on numbers of all sizes", (sizes,), right(sizes)),
        Trial("round_to_bf16(x) on numbers half way between two bfloat16 numbers", (ties,), right(ties)),
    ]
    return give_feedback(answer, trials, [
        Hint("that truncates the lower half; round to the nearest instead.", lambda x: _cut(x, 0)),
        Hint("a number in the middle is rounded to the neighbour whose last bit is 0 (ties to even), not always up.",
             lambda x: _cut(x, 0x8000)),
        Hint("a number in the middle is rounded to the neighbour whose last bit is 0 (ties to even), not always down.",
             lambda x: _cut(x, 0x7FFF)),
        Hint("that is float16: five bits for the power and eleven for the digits.",
             lambda x: x.astype(np.float16).astype(np.float32)),
        Hint("nothing is rounded.", lambda x: x),
        Hint("bf16(x) returns an array that rounds every operation; return an ordinary one: wide(bf16(x)).", bf16),
    ])  # fmt: skip
