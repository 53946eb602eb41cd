"""The exercises on single operations. What is right was recorded from PyTorch (`golden/`)."""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from refgemma.activations import gelu, relu
from refgemma.goldens.load import load_golden
from refgemma.oracle import tolerance as tol
from refgemma.precision import Array, bf16, narrow, wide
from refgemma.teach.exercises.feedback import Answer, Feedback, Mistake, Trial, judge

EPS = 1e-6

# --- embedding --------------------------------------------------------------------------------------------------------


def check_embed(answer: Answer) -> Feedback:
    """``embed(ids, table)``: rows of the table times ``sqrt(hidden)``, the factor in the precision of the table.

    Examples
    --------
    >>> check_embed(lambda ids, table: table[ids])
    Not yet: embed(ids, table) with a table of 5 rows and 3584 columns in float32
      21504 of 21504 elements are wrong; the farthest, at [0, 2, 1908], is -3.92562 instead of -235.013
      Hint: the factor sqrt(hidden) is missing.
    """

    def trials() -> Iterator[Trial]:
        for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
            for width in (3584, 4608):
                _, g = load_golden(f"op-embed-{width}-{short}")
                bound = tol.U * np.abs(np.asarray(wide(g["y"]), np.float64))
                call = f"embed(ids, table) with a table of 5 rows and {width} columns in {dtype}"
                yield Trial(call, (g["ids"], g["weight"]), g["y"], bound)

    return judge(answer, trials(), [
        Mistake("the factor sqrt(hidden) is missing.", lambda ids, table: table[ids]),
        Mistake("the factor is sqrt(hidden), not hidden.", lambda ids, table: table[ids] * table.shape[-1]),
        Mistake("the factor is the square root of the number of columns, not of rows.",
                lambda ids, table: table[ids] * np.float32(math.sqrt(table.shape[0]))),
        Mistake("you divide by sqrt(hidden); the rows are to become longer.",
                lambda ids, table: table[ids] / narrow(math.sqrt(table.shape[-1]), like=table)),
        Mistake("the factor itself has to be rounded to the table's precision first: narrow(sqrt(hidden), like=table).",
                lambda ids, table: table[ids] * math.sqrt(table.shape[-1])),
    ])  # fmt: skip


# --- GELU -------------------------------------------------------------------------------------------------------------


def check_gelu_tanh(answer: Answer) -> Feedback:
    """``gelu_tanh(x)``: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))``.

    Examples
    --------
    >>> print(str(check_gelu_tanh(lambda x: np.maximum(x, 0))).splitlines()[-1])
      Hint: that is ReLU, which has a kink at 0.
    """
    _, g = load_golden("op-gelu-f32")
    near = np.abs(g["x"]) < 12  # beyond, GELU is x or 0, and the cube of the largest recorded numbers overflows
    x, y = g["x"][near], g["y"][near]
    return judge(answer, [Trial("gelu_tanh(x) on numbers from -12 to 12", (x,), y, tol.gelu_tanh(x).bound)], [
        Mistake("that is ReLU, which has a kink at 0.", relu),
        Mistake("that is the exact GELU with the error function; Gemma 2 uses the tanh form, up to 5e-4 away.", gelu),
        Mistake("that is x * sigmoid(1.702 x), another approximation of GELU.",
                lambda x: x / (1 + np.exp(-1.702 * x))),
        Mistake("that is SiLU, x * sigmoid(x), which Llama uses.", lambda x: x / (1 + np.exp(-x))),
        Mistake("the cube is missing: tanh(sqrt(2/pi) (x + 0.044715 x**3)).",
                lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x))),
        Mistake("sqrt(2/pi) multiplies the whole bracket, the cube too.",
                lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x + 0.044715 * x**3))),
        Mistake("the 0.5 in front is missing.",
                lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ])  # fmt: skip


# --- shared key heads -------------------------------------------------------------------------------------------------


def check_repeat_kv(answer: Answer) -> Feedback:
    """``repeat_kv(x, groups)``: from (batch, kv_heads, keys, head_dim) to as many heads as there are queries.

    Examples
    --------
    >>> print(str(check_repeat_kv(lambda x, groups: np.tile(x, (1, groups, 1, 1)))).splitlines()[-1])
      Hint: the heads come as 0 1 2 0 1 2, but neighbours share a key head: 0 0 1 1 2 2.
    """
    _, g = load_golden("op-repeat-kv-f32")
    groups = int(g["groups"][0])
    call = f"repeat_kv(x, {groups}) on 3 key heads"
    return judge(answer, [Trial(call, (g["x"], groups), g["y"])], [
        Mistake("the heads come as 0 1 2 0 1 2, but neighbours share a key head: 0 0 1 1 2 2.",
                lambda x, groups: np.tile(x, (1, groups, 1, 1))),
        Mistake("that repeats the places (axis 2); the heads are axis 1.",
                lambda x, groups: np.repeat(x, groups, axis=2)),
        Mistake("that repeats the texts of the batch (axis 0); the heads are axis 1.",
                lambda x, groups: np.repeat(x, groups, axis=0)),
        Mistake("nothing is repeated: there must be a key head for each query head.", lambda x, groups: x),
    ])  # fmt: skip


# --- rotary positions -------------------------------------------------------------------------------------------------


def _neighbours(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    even, odd = x[..., ::2], x[..., 1::2]
    turned = [even * cos[..., :half] - odd * sin[..., :half], odd * cos[..., :half] + even * sin[..., :half]]
    return np.stack(turned, axis=-1).reshape(x.shape)


def _neighbours_of_wide_tables(x: Array, cos: Array, sin: Array) -> Array:
    partners = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    turned: Array = x * cos + partners * sin
    return turned


def _turned(x: Array, sign_first: int, sign_second: int) -> Array:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([sign_first * second, sign_second * first], axis=-1)


def check_rotate(answer: Answer) -> Feedback:
    """``rotate(x, cos, sin)``: turn each pair ``(x[i], x[i + head_dim/2])`` by its angle.

    Examples
    --------
    >>> print(str(check_rotate(lambda x, cos, sin: x)).splitlines()[-1])
      Hint: nothing is turned.
    """

    def trials() -> Iterator[Trial]:
        for width in (256, 128):
            _, g = load_golden(f"op-rotary-{width}-f32")
            x, cos, sin = g["x"], g["cos"], g["sin"]
            yield Trial(f"rotate(x, cos, sin), heads of {width}", (x, cos, sin), g["y"], tol.rotate(x, cos, sin).bound)

    halves = "pairs lie half a head apart, (0, head_dim/2), not side by side, (0, 1)."
    return judge(answer, trials(), [
        Mistake("nothing is turned.", lambda x, cos, sin: x),
        Mistake(halves, _neighbours),
        Mistake(halves, _neighbours_of_wide_tables),
        Mistake("that turns the other way: the minus belongs to the second half, which becomes the first.",
                lambda x, cos, sin: x * cos + _turned(x, 1, -1) * sin),
        Mistake("a minus is missing: a turn is (a cos - b sin, b cos + a sin).",
                lambda x, cos, sin: x * cos + _turned(x, 1, 1) * sin),
        Mistake("the two halves have to change places in the second product.",
                lambda x, cos, sin: x * cos + x * sin),
        Mistake("cosine and sine are exchanged.", lambda x, cos, sin: x * sin + _turned(x, -1, 1) * cos),
    ])  # fmt: skip


# --- soft cap ---------------------------------------------------------------------------------------------------------


def check_soft_cap(answer: Answer) -> Feedback:
    """``soft_cap(x, cap)``: ``cap * tanh(x / cap)``.

    Examples
    --------
    >>> print(str(check_soft_cap(lambda x, cap: np.clip(x, -cap, cap))).splitlines()[-1])
      Hint: that cuts off at the cap. A soft cap bends before it: cap * tanh(x / cap).
    """

    def trials() -> Iterator[Trial]:
        for cap in (50, 30):
            _, g = load_golden(f"op-soft-cap-{cap}-f32")
            low, high = g["x"].min(), g["x"].max()
            call = f"soft_cap(x, cap) on numbers from {low:g} to {high:g} with a cap of {cap}"
            yield Trial(call, (g["x"], float(cap)), g["y"], tol.soft_cap(g["x"], float(cap)).bound)

    return judge(answer, trials(), [
        Mistake("nothing is bent here. The formula is cap * tanh(x / cap).", lambda x, cap: x),
        Mistake("that cuts off at the cap. A soft cap bends before it: cap * tanh(x / cap).",
                lambda x, cap: np.clip(x, -cap, cap)),
        Mistake("x has to be divided by the cap inside the tanh.", lambda x, cap: cap * np.tanh(x)),
        Mistake("the result lies between -1 and 1: multiply by the cap again.", lambda x, cap: np.tanh(x / cap)),
        Mistake("the cap is 50 or 30 as it is handed in; you use one of your own.",
                lambda x, cap: (80 - cap) * np.tanh(x / (80 - cap))),
    ])  # fmt: skip


# --- from scores to probabilities -------------------------------------------------------------------------------------


def _softmax(masked: Array, axis: int = -1) -> Array:
    exponentials = np.exp(masked - masked.max(axis=axis, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=axis, keepdims=True)
    return shares


def check_attention_probs(answer: Answer) -> Feedback:
    """``attention_probs(scores, mask, cap)``: cap, mask, softmax. `mask` is true where a key may be seen.

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
            # The cap's own error is one of the exponent's, and so a relative one of the result; likewise for the sum.
            bound = tol.softmax(g[prefix + "capped"], mask).bound
            bound = bound + 2 * g[prefix + "probs"] * float(tol.soft_cap(np.array([1e9]), cap).bound[0])
            call = f"attention_probs(scores, mask, {cap}) of a {kind} layer"
            yield Trial(call, (g[prefix + "scores"], mask[None, None], cap), g[prefix + "probs"], bound)

    def capped(scores: Array, cap: float) -> Array:
        return cap * np.tanh(scores / cap)

    return judge(answer, trials(), [
        Mistake("the mask has to come after the cap: minus infinity, capped, lets the future through.",
                lambda scores, mask, cap: _softmax(capped(np.where(mask, scores, -np.inf), cap))),
        Mistake("the cap is missing.", lambda scores, mask, cap: _softmax(np.where(mask, scores, -np.inf))),
        Mistake("the mask is missing: tokens see the future.", lambda scores, mask, cap: _softmax(capped(scores, cap))),
        Mistake("the mask is the wrong way round: true means that a key may be seen.",
                lambda scores, mask, cap: _softmax(np.where(mask, -np.inf, capped(scores, cap)))),
        Mistake("the softmax has to run along the keys, the last axis, so that each row has the sum 1.",
                lambda scores, mask, cap: _softmax(np.where(mask, capped(scores, cap), -np.inf), axis=-2)),
        Mistake("probabilities that are set to 0 after the softmax leave rows whose sum is not 1: mask the scores.",
                lambda scores, mask, cap: np.where(mask, _softmax(capped(scores, cap)), 0)),
        Mistake("a score of 0 is an ordinary score; to hide a key its score must be minus infinity.",
                lambda scores, mask, cap: _softmax(np.where(mask, capped(scores, cap), 0))),
        Mistake("these are exponentials: divide each row by its sum.",
                lambda scores, mask, cap: np.exp(np.where(mask, capped(scores, cap), -np.inf))),
    ])  # fmt: skip


# --- windows ----------------------------------------------------------------------------------------------------------


def _distance(q_places: Array, k_places: Array) -> Array:
    apart: Array = q_places[:, None] - k_places
    return apart


def check_sliding_mask(answer: Answer) -> Feedback:
    """``sliding_mask(q_places, k_places, window)``: true for the last `window` keys, the query's own included.

    Examples
    --------
    >>> print(str(check_sliding_mask(lambda q, k, window: k <= q[:, None])).splitlines()[-1])
      Hint: that is the causal mask; the window is missing.
    """
    _, g = load_golden("op-masks-f32")
    window = int(g["window"][0])
    row = int(np.argmax(g["padding"].sum(axis=-1)))  # the one without padding
    recorded = g["sliding"][row, 0].astype(bool)
    places = np.arange(len(recorded))

    trials = [
        Trial(f"sliding_mask(q_places, k_places, {window}), a whole text of {len(places)} tokens",
              (places, places, window), recorded),
        Trial(f"sliding_mask(q_places, k_places, {window}), the last two tokens of the text only",
              (places[-2:], places, window), recorded[-2:]),
    ]  # fmt: skip
    return judge(answer, trials, [
        Mistake("that is the causal mask; the window is missing.", lambda q, k, w: _distance(q, k) >= 0),
        Mistake("the window is one too wide: the query's own place counts as one of the keys.",
                lambda q, k, w: (_distance(q, k) >= 0) & (_distance(q, k) <= w)),
        Mistake("the window is one too narrow: the query's own place counts as one of the keys.",
                lambda q, k, w: (_distance(q, k) >= 0) & (_distance(q, k) < w - 1)),
        Mistake("a query may not see the future, however near: keys come at its place or before.",
                lambda q, k, w: np.abs(_distance(q, k)) < w),
        Mistake("a query may not see the future: the window begins behind it and ends at its own place.",
                lambda q, k, w: _distance(q, k) < w),
        Mistake("a query must see itself, too.", lambda q, k, w: (_distance(q, k) > 0) & (_distance(q, k) < w)),
        Mistake("rows are queries and columns are keys; yours are the other way round.",
                lambda q, k, w: ((_distance(q, k) >= 0) & (_distance(q, k) < w)).T),
        Mistake("true means that a key may be seen.", lambda q, k, w: (_distance(q, k) < 0) | (_distance(q, k) >= w)),
        Mistake("use the places that are handed in: when a text is continued, the first query is not at place 0.",
                lambda q, k, w: (_distance(np.arange(len(q)), k) >= 0) & (_distance(np.arange(len(q)), k) < w)),
    ])  # fmt: skip


# --- norms ------------------------------------------------------------------------------------------------------------


def _norm(x: Array, weight: Array, eps: float, subtract: bool = False) -> Array:
    x_wide = wide(x) - np.mean(wide(x), axis=-1, keepdims=True) if subtract else wide(x)
    normed: Array = x_wide / np.sqrt(np.mean(x_wide**2, axis=-1, keepdims=True) + eps)
    return normed


def check_rms_norm(answer: Answer) -> Feedback:
    """``rms_norm(x, weight, eps)``: ``x / sqrt(mean(x**2) + eps) * (1 + weight)``, in float32, rounded once at the end.

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

    early = "in half precision, compute in float32 (wide) and round once at the end (narrow); you round on the way."
    return judge(answer, trials(), [
        Mistake("Gemma stores the weight as an offset from one: multiply by 1 + weight.",
                lambda x, weight, eps: narrow(_norm(x, weight, eps) * wide(weight), like=x)),
        Mistake("that is LayerNorm: RMSNorm does not subtract the mean.",
                lambda x, weight, eps: narrow(_norm(x, weight, eps, subtract=True) * (1 + wide(weight)), like=x)),
        Mistake("divide by the square root of the mean square.", lambda x, weight, eps: narrow(
            wide(x) / (np.mean(wide(x) ** 2, axis=-1, keepdims=True) + eps) * (1 + wide(weight)), like=x)),
        Mistake("take the mean of the squares, not their sum.", lambda x, weight, eps: narrow(
            wide(x) / np.sqrt(np.sum(wide(x) ** 2, axis=-1, keepdims=True) + eps) * (1 + wide(weight)), like=x)),
        Mistake("the mean runs over each vector alone: axis=-1, keepdims=True.", lambda x, weight, eps: narrow(
            wide(x) / np.sqrt(np.mean(wide(x) ** 2) + eps) * (1 + wide(weight)), like=x)),
        Mistake("eps belongs inside the root: sqrt(mean(x**2) + eps).", lambda x, weight, eps: narrow(
            wide(x) / (np.sqrt(np.mean(wide(x) ** 2, axis=-1, keepdims=True)) + eps) * (1 + wide(weight)), like=x)),
        Mistake("the factor 1 + weight is missing.", lambda x, weight, eps: narrow(_norm(x, weight, eps), like=x)),
        Mistake(early, lambda x, weight, eps: narrow(_norm(x, weight, eps), like=x) * (1 + weight)),
        Mistake(early, lambda x, weight, eps: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * (1 + weight)),
        Mistake(early, lambda x, weight, eps:
                x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1.0 + weight)),
    ])  # fmt: skip


# --- rounding ---------------------------------------------------------------------------------------------------------


def _cut(x: Array, added: int) -> Array:
    words = (np.asarray(x, np.float32).view(np.uint32) + np.uint32(added)) & np.uint32(0xFFFF0000)
    return words.view(np.float32)


def check_round_to_bf16(answer: Answer) -> Feedback:
    """``round_to_bf16(x)``: float32 numbers rounded to bfloat16, ties to even, as a float32 array.

    What is right is the conversion of `ml_dtypes`, which the machine-learning libraries share.

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
    return judge(answer, trials, [
        Mistake("that cuts the lower half off; round to the nearest instead.", lambda x: _cut(x, 0)),
        Mistake("numbers half way go to the neighbour whose last bit is 0 (ties to even), not always up.",
                lambda x: _cut(x, 0x8000)),
        Mistake("numbers half way go to the neighbour whose last bit is 0 (ties to even), not always down.",
                lambda x: _cut(x, 0x7FFF)),
        Mistake("that is float16: five bits of power and eleven of digits.",
                lambda x: x.astype(np.float16).astype(np.float32)),
        Mistake("nothing is rounded.", lambda x: x),
        Mistake("bf16(x) gives an array that goes on rounding; return an ordinary one: wide(bf16(x)).", bf16),
    ])  # fmt: skip
