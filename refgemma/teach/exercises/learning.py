"""Exercises on training. The expected gradients were recorded from PyTorch autograd (`golden/gradients`)."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refgemma import backward as back
from refgemma import ops
from refgemma.goldens.recorded_gradients import recorded_operations
from refgemma.oracle import training_bugs as bugs
from refgemma.oracle.backward_operations import cap_tolerance, norm_tolerance, norm_weight_tolerance
from refgemma.precision import Array
from refgemma.teach.exercises.feedback import Attempt, Feedback, Hint, Trial, give_feedback
from refgemma.teach.exercises.guide import count_tries

NORM_EPS = 1e-6

# --- soft cap ---------------------------------------------------------------------------------------------------------


@count_tries
def check_soft_cap_backward(answer: Attempt) -> Feedback:
    """Check ``soft_cap_backward(grad, x, cap)``: ``grad * (1 - tanh(x / cap)**2)``.

    Examples
    --------
    >>> print(str(check_soft_cap_backward(lambda grad, x, cap: grad)).splitlines()[-1])
      Hint: the gradient passes the cap unchanged. Multiply it by the slope, 1 - tanh(x / cap)**2.
    """
    g = recorded_operations()

    def trials() -> Iterator[Trial]:
        x, grad = g["soft_cap.x"], g["soft_cap.grad"]
        for cap in (50, 30):
            call = f"soft_cap_backward(grad, x, cap) on numbers from {x.min():g} to {x.max():g} with a cap of {cap}"
            bound = cap_tolerance(grad, x, float(cap)).bound
            yield Trial(call, (grad, x, float(cap)), g[f"soft_cap.{cap}"], bound)

    def slope(of_tanh: Callable[[Array], Any]) -> Attempt:
        return lambda grad, x, cap: grad * of_tanh(np.tanh(x / cap))

    return give_feedback(answer, trials(), [
        Hint("the gradient passes the cap unchanged. Multiply it by the slope, 1 - tanh(x / cap)**2.",
             bugs.pass_through),
        Hint("the slope belongs to the input x, not to the result of the cap.", bugs.slope_of_result),
        Hint("that caps the gradient. Multiply it by the slope of the cap instead.",
             lambda grad, x, cap: ops.soft_cap(grad, cap)),
        Hint("that is the slope alone. The chain rule multiplies it by grad.",
             lambda grad, x, cap: 1 - np.tanh(x / cap) ** 2),
        Hint("the factors cap (outside the tanh) and 1 / cap (inside) cancel: no cap remains outside the tanh.",
             lambda grad, x, cap: back.soft_cap_backward(grad, x, cap) / cap),
        Hint("the factors cap (outside the tanh) and 1 / cap (inside) cancel: no cap remains outside the tanh.",
             lambda grad, x, cap: back.soft_cap_backward(grad, x, cap) * cap),
        Hint("divide x by the cap inside the tanh.", lambda grad, x, cap: grad * (1 - np.tanh(x) ** 2)),
        Hint("the square is missing: the slope of tanh is 1 - tanh**2.", slope(lambda t: 1 - t)),
        Hint("a sign is wrong: the slope of tanh is 1 - tanh**2.", slope(lambda t: 1 + t**2)),
        Hint("the 1 is missing: the slope of tanh is 1 - tanh**2.", slope(lambda t: -(t**2))),
        Hint("the 1 is missing: the slope of tanh is 1 - tanh**2.", slope(lambda t: t**2)),
        Hint("that is tanh, not its slope: 1 - tanh**2.", slope(lambda t: t)),
        Hint("that is the slope of cutting off. A soft cap has the slope 1 - tanh(x / cap)**2.",
             lambda grad, x, cap: grad * (np.abs(x) < cap)),
    ])  # fmt: skip


# --- norm -------------------------------------------------------------------------------------------------------------


def _take_part(answer: Attempt, place: int) -> Attempt:
    """Return a function that returns one of the two gradients of an answer."""

    @functools.wraps(answer)
    def take(*arguments: Any) -> Any:
        found = answer(*arguments)
        if found is None:
            return None
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise TypeError("return two gradients: that of x, and that of weight")
        return found[place]

    return take


def _norm_parts(x: Array, eps: float) -> tuple[Array, Array]:
    inverse = bugs.inverse_root(x, eps)
    return inverse, x * inverse


def _input_by(compute: Callable[..., Any]) -> Attempt:
    """Return a function with another gradient of x, from ``r``, ``n``, ``h`` and the mean of ``h * n``."""

    def wrong(grad: Array, x: Array, weight: Array, eps: float) -> tuple[Any, None]:
        inverse, normed = _norm_parts(x, eps)
        h = grad * (1 + weight)
        return compute(inverse, normed, h, np.mean(h * normed, axis=-1, keepdims=True)), None

    return wrong


def _weight_by(compute: Callable[..., Any]) -> Attempt:
    """Return a function with another gradient of the weight, from ``grad``, ``x``, ``normed`` and ``weight``."""
    return lambda grad, x, weight, eps: (None, compute(grad, x, _norm_parts(x, eps)[1], weight))


def _sum_rows(x: Array) -> Array:
    return np.asarray(x.reshape(-1, x.shape[-1]).sum(axis=0))


@count_tries
def check_rms_norm_backward(answer: Attempt) -> Feedback:
    """Check ``rms_norm_backward(grad, x, weight, eps)``: the gradients of `x` and of `weight`, as a pair.

    With ``r = 1 / sqrt(mean(x**2) + eps)``, ``n = x * r`` and ``h = grad * (1 + weight)``, the first is ``r * (h - n *
    mean(h * n))``. The second is the sum of ``grad * n`` over all tokens.

    Examples
    --------
    >>> def wrong(grad, x, weight, eps):
    ...     r = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    ...     return grad * (1 + weight) * r, (grad * x * r).sum(axis=(0, 1))
    >>> print(str(check_rms_norm_backward(wrong)).splitlines()[-1])
      Hint: r depends on x too: a second term is missing, - r * n * mean(h * n).
    """
    g = {name: x for name, x in recorded_operations().items() if name.startswith("rms_norm.")}
    grad, x, weight, grad_x, grad_weight = (
        g[f"rms_norm.{name}"] for name in ("grad", "x", "weight", "grad_x", "grad_weight")
    )
    arguments, call = (grad, x, weight, NORM_EPS), f"of rms_norm_backward(grad, x, weight, {NORM_EPS})"
    right, projection = back.rms_norm_backward, "r depends on x too: a second term is missing, - r * n * mean(h * n)."
    of_x = Trial(f"the first result {call}, the gradient of x", arguments, grad_x,
                 norm_tolerance(grad, x, weight, NORM_EPS).bound)  # fmt: skip
    of_weight = Trial(f"the second result {call}, the gradient of weight", arguments, grad_weight,
                      norm_weight_tolerance(grad, x, NORM_EPS).bound)  # fmt: skip
    hints = [[
        Hint("the gradient of x comes first, then that of the weight.", lambda *given: right(*given)[::-1]),
        Hint("that is the norm itself. Its gradient begins with h = grad * (1 + weight).",
             lambda grad, x, weight, eps: (ops.rms_norm(x, weight, eps), None)),
        Hint(projection, _input_by(lambda r, n, h, mean: h * r)),
        Hint("Gemma multiplies by 1 + weight: h = grad * (1 + weight).",
             lambda grad, x, weight, eps: right(grad, x, weight - 1, eps)),
        Hint("the factor 1 + weight is missing: h = grad * (1 + weight).",
             lambda grad, x, weight, eps: right(grad, x, 0 * weight, eps)),
        Hint(f"{projection} And Gemma multiplies by 1 + weight: h = grad * (1 + weight).",
             lambda grad, x, weight, eps: (grad * weight * bugs.inverse_root(x, eps), None)),
        Hint("take the mean of h * n, not its sum.", _input_by(lambda r, n, h, mean: r * (h - n * mean * h.shape[-1]))),
        Hint("take the mean of each vector: axis=-1, keepdims=True.",
             _input_by(lambda r, n, h, mean: r * (h - n * np.mean(h * n)))),
        Hint("the factor r in front is missing.", _input_by(lambda r, n, h, mean: h - n * mean)),
        Hint("a sign is wrong: the second term is subtracted.", _input_by(lambda r, n, h, mean: r * (h + n * mean))),
        Hint("the second term has the normed n, not x.",
             _input_by(lambda r, n, h, mean: r * (h - n / r * mean))),
        Hint("the second term has the normed n, not x.",
             _input_by(lambda r, n, h, mean: r * (h - n / r * np.mean(h * n / r, axis=-1, keepdims=True)))),
        Hint("the mean is that of h * n, with h = grad * (1 + weight); there you have grad * n.",
             lambda grad, x, weight, eps: _input_by(lambda r, n, h, mean: r * (
                 h - n * np.mean(grad * n, axis=-1, keepdims=True)))(grad, x, weight, eps)),
        Hint("the second term is n times the mean of h * n; the factor n is missing.",
             _input_by(lambda r, n, h, mean: r * (h - mean))),
        Hint("that is the gradient of LayerNorm: RMSNorm subtracts no mean, so its gradient does not either.",
             _input_by(lambda r, n, h, mean: r * (h - np.mean(h, axis=-1, keepdims=True) - n * mean))),
        Hint("eps is missing: r = 1 / sqrt(mean(x**2) + eps).",
             lambda grad, x, weight, eps: right(grad, x, weight, 0.0)),
    ], [
        Hint("a weight serves all tokens: sum over all axes but the last.", _weight_by(lambda g, x, n, w: g * n)),
        Hint("sum over the texts and the tokens, axes 0 and 1; you sum over one of them.",
             _weight_by(lambda g, x, n, w: (g * n).sum(axis=0))),
        Hint("sum over the texts and the tokens, axes 0 and 1; you sum over one of them.",
             _weight_by(lambda g, x, n, w: (g * n).sum(axis=1))),
        Hint("sum over all tokens, not over the numbers of a vector.",
             _weight_by(lambda g, x, n, w: (g * n).sum(axis=-1))),
        Hint("the weight multiplies the normed n = x * r, not x.", _weight_by(lambda g, x, n, w: _sum_rows(g * x))),
        Hint("that is the gradient of a bias: a weight's is multiplied by n.",
             _weight_by(lambda g, x, n, w: _sum_rows(g))),
        Hint("d(1 + w)/dw is 1: the factor 1 + weight does not belong here.",
             _weight_by(lambda g, x, n, w: _sum_rows(g * n * (1 + w)))),
        Hint("sum over all tokens; you take the mean.",
             _weight_by(lambda g, x, n, w: _sum_rows(g * n) * n.shape[-1] / n.size)),
    ]]  # fmt: skip
    feedback = Feedback(True, "")
    for place, trial in enumerate((of_x, of_weight)):
        if feedback:
            wrong = [Hint(hint.text, _take_part(hint.wrong, place)) for hint in hints[place]]
            feedback = give_feedback(_take_part(answer, place), [trial], wrong)
    return Feedback(True, "Right: both gradients conform.") if feedback else feedback


# --- accumulation -----------------------------------------------------------------------------------------------------


@count_tries
def check_mean_gradient(answer: Attempt) -> Feedback:
    """Check ``mean_gradient(gradients, counts)``: the gradient of the mean loss of all tokens, from those of parts.

    A row of `gradients` is the gradient of the mean loss of one micro-batch, and `counts` has its number of tokens. The
    expected results were added up by hand.

    Examples
    --------
    >>> print(str(check_mean_gradient(lambda gradients, counts: gradients.mean(axis=0))).splitlines()[-1])
      Hint: every token must have the same weight; so a micro-batch with more tokens has a larger one.
    """
    gradients = np.array([[8.0, 0.0, -4.0, 1.0], [0.0, 8.0, 4.0, 1.0], [4.0, 4.0, -8.0, 1.0]])
    cases = [([2, 6, 8], [3.0, 5.0, -3.0, 1.0]), ([8, 8, 16], [4.0, 4.0, -4.0, 1.0]), ([16, 0, 0], gradients[0])]
    trials = [
        Trial(f"mean_gradient(gradients, {counts}), 3 micro-batches of 4 gradients", (gradients, np.array(counts)),
              np.asarray(right, np.float64), 1e-6)  # another order of operations rounds by much less
        for counts, right in cases
    ]  # fmt: skip
    return give_feedback(answer, trials, [
        Hint("every token must have the same weight; so a micro-batch with more tokens has a larger one.",
             lambda g, n: g.mean(axis=0)),
        Hint("divide the sum by the number of all tokens.", lambda g, n: n @ g),
        Hint("divide by the number of all tokens, not of micro-batches.", lambda g, n: n @ g / len(n)),
        Hint("multiply each gradient by its number of tokens: it is a mean, and you need a sum.",
             lambda g, n: g.sum(axis=0) / n.sum()),
        Hint("the gradients are added, but nothing is divided; multiply each by its share of the tokens.",
             lambda g, n: g.sum(axis=0)),
        Hint("each gradient is divided by its number of tokens once more; multiply by it.",
             lambda g, n: (g / n[:, None]).sum(axis=0)),
        Hint("each gradient is divided by its number of tokens once more; multiply by it.",
             lambda g, n: (g / n[:, None]).mean(axis=0)),
        Hint("sum over the micro-batches, the first axis.", lambda g, n: g.mean(axis=-1)),
        Hint("sum over the micro-batches, the first axis: one gradient remains.",
             lambda g, n: n[:, None] * g / n.sum()),
    ])  # fmt: skip
