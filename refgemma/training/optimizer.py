"""Compute AdamW steps, clipping by the global norm, and learning-rate schedules.

Checked against `AdamW` of torch 2.13, bit for bit except square roots, against its `clip_grad_norm_`, and against the
schedules of transformers 5.23.

No function here changes an array in place; each returns new arrays.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from refgemma.errors import RefgemmaError
from refgemma.precision import Array

# transformers' Trainer applies no weight decay to such names, which in Gemma 2 are norms and biases.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


class TrainingError(RefgemmaError):
    """Raised if training cannot start or continue; the message says why, and what to change."""


# --- one rounding -----------------------------------------------------------------------------------------------------


def split_bits(x: Any) -> tuple[Any, Any]:
    """Split float64 numbers into an upper and a lower half of 26 bits each: ``x == upper + lower``, exactly.

    Source: Veltkamp 1968; Dekker 1971, doi:10.1007/BF01397083.

    Examples
    --------
    >>> upper, lower = split_bits(np.array([1 + 2.0**-40]))
    >>> upper, lower == 2.0**-40
    (array([1.]), array([ True]))
    """
    scaled = x * (2.0**27 + 1)
    upper = scaled - (scaled - x)
    return upper, x - upper


def fused_multiply_add(
    a: float | np.floating[Any] | Float[np.ndarray, "*shape"],
    b: Float[np.ndarray, "*shape"],
    c: Float[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]:
    """Compute ``a * b + c`` with one rounding, as processors and PyTorch's vectorised kernels do.

    The product of two float32 numbers is exact in float64. In float64, a product or sum of two numbers is computed as
    the exact sum of two numbers. Then the four parts are added, the smallest first. The result is correctly rounded,
    unless the exact result is too close to the midpoint between two numbers: within ``2**-29`` (float32) or ``2**-50``
    (float64) of an ulp.

    Examples
    --------
    >>> tiny = 2.0**-30
    >>> fused_multiply_add(1 + tiny, np.array([1 - tiny]), np.array([-1.0])) == -tiny * tiny
    array([ True])
    """
    if c.dtype == np.float32:
        rounded: Array = (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)
        return rounded
    (a_upper, a_lower), (b_upper, b_lower) = split_bits(a), split_bits(b)
    product = a * b
    product_rest = ((a_upper * b_upper - product) + a_upper * b_lower + a_lower * b_upper) + a_lower * b_lower
    total = product + c
    part = total - product
    total_rest = (product - (total - part)) + (c - part)
    fused: Array = total + (total_rest + product_rest)
    return fused


def lerp(start: Float[np.ndarray, "*shape"], end: Float[np.ndarray, "*shape"], weight: float) -> Array:
    """Interpolate: ``start + weight * (end - start)``, computed from the closer end. Source: ``torch.lerp``.

    Examples
    --------
    >>> lerp(np.array([1.0]), np.array([3.0]), 0.25)
    array([1.5])
    """
    share = start.dtype.type(weight)
    if abs(share) < 0.5:
        return fused_multiply_add(share, end - start, start)
    return fused_multiply_add(share - 1, end - start, end)


# --- AdamW ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Running means of a weight's gradient and of the squared gradient, with torch's names."""

    exp_avg: Array
    exp_avg_sq: Array


@dataclass(frozen=True)
class AdamW:
    """The settings of the optimizer, with the defaults of transformers' ``TrainingArguments``.

    torch's own `weight_decay` is 0.01. `adam_beta1` and `adam_beta2` are torch's ``betas``, `adam_epsilon` its ``eps``.
    """

    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8


ADAMW = AdamW()


def first_moments(weight: Float[np.ndarray, "*shape"]) -> Moments:
    """Return the moments before the first step, which are zero.

    Examples
    --------
    >>> first_moments(np.ones(2)).exp_avg
    array([0., 0.])
    """
    return Moments(np.zeros_like(weight), np.zeros_like(weight))


def adamw(
    weight: Float[np.ndarray, "*shape"], gradient: Float[np.ndarray, "*shape"], moments: Moments, step: int,
    learning_rate: float, numbers: AdamW = ADAMW,
) -> tuple[Float[np.ndarray, "*shape"], Moments]:  # fmt: skip
    """Return a weight and its moments after one step of AdamW.

    ::

        w = w * (1 - lr * decay)                          the decay is not part of the gradient
        m = m + (1 - beta1) * (g - m)                     mean of the gradient
        v = beta2 * v + (1 - beta2) * g**2                mean of its square
        w = w - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

    The divisors ``1 - beta**t`` correct for m and v starting at zero. The roundings are those of torch's
    ``_single_tensor_adam`` on a processor with fused multiply-add. Its ``fused=True``, the default of transformers'
    ``Trainer``, rounds at other places. Source: Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019,
    arXiv:1711.05101.

    MKL's square root, which torch calls, is not always correctly rounded: one in 80 float64 results differs by an ulp
    from NumPy's. So the moments equal torch's bit for bit, but the length of a step may differ by an ulp.

    Parameters
    ----------
    weight, gradient : arrays of one shape
        The weight and its gradient, in float32 or float64.
    moments : Moments
        The moments from `first_moments` or from the previous step.
    step : int
        The number of this step, from 1.
    learning_rate : float
        The learning rate of this step.
    numbers : AdamW
        The other settings of the optimizer.

    Examples
    --------
    The length of the first step equals the learning rate, for any length of the gradient:

    >>> weight = np.array([1.0, 1.0])
    >>> adamw(weight, np.array([5.0, -0.001]), first_moments(weight), step=1, learning_rate=0.1)[0].round(4)
    array([0.9, 1.1])
    """
    beta1, beta2 = numbers.adam_beta1, numbers.adam_beta2
    decayed = weight * (1 - learning_rate * numbers.weight_decay)
    exp_avg = lerp(moments.exp_avg, gradient, 1 - beta1)
    exp_avg_sq = fused_multiply_add((1 - beta2) * gradient, gradient, moments.exp_avg_sq * beta2)
    denominator = np.sqrt(exp_avg_sq) / (1 - beta2**step) ** 0.5 + numbers.adam_epsilon
    step_size = learning_rate / (1 - beta1**step)
    return decayed + -step_size * exp_avg / denominator, Moments(exp_avg, exp_avg_sq)


def decays(name: str) -> bool:
    """Return True if the weight with this name decays: matrices decay, norms and biases do not.

    Source: transformers ``Trainer.get_decay_parameter_names``. A norm of Gemma 2 multiplies by ``1 + weight``, so decay
    would pull the factor to 1, not to 0.

    Examples
    --------
    >>> decays("model.layers.0.mlp.up_proj.weight"), decays("model.embed_tokens.weight"), decays("model.norm.weight")
    (True, True, False)
    """
    return not NOT_DECAYED.search(name.lower())


# --- before and beside the step ---------------------------------------------------------------------------------------


def global_norm(gradients: Mapping[str, Array]) -> float:
    """Return the length of the vector of all gradients, summed in float64.

    Examples
    --------
    >>> global_norm({"a": np.array([3.0]), "b": np.array([[4.0]])})
    5.0
    """
    return math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients.values()))


def clip_grad_norm(gradients: Mapping[str, Array], max_norm: float) -> tuple[dict[str, Array], float]:
    """Scale all gradients by ``max_norm / (norm + 1e-6)`` if their global norm exceeds `max_norm`.

    Returns
    -------
    dict of str to array
        The scaled gradients.
    float
        The norm before scaling. torch sums squares in float32, refgemma in float64.

    Notes
    -----
    Source: ``torch.nn.utils.clip_grad_norm_``. A factor for each tensor, or for each micro-batch, would change the
    direction of the step.

    Examples
    --------
    >>> clip_grad_norm({"a": np.array([3.0]), "b": np.array([4.0])}, max_norm=1.0)[0]["b"].round(4)
    array([0.8])
    """
    norm = global_norm(gradients)
    factor = min(1.0, max_norm / (norm + 1e-6))
    return {name: gradient * factor for name, gradient in gradients.items()}, norm


def count_warmup(warmup_steps: float, steps: int) -> int:
    """Return the number of warm-up steps; as in ``TrainingArguments``, values below 1 are a fraction of all steps.

    Examples
    --------
    >>> count_warmup(20, steps=1000), count_warmup(0.03, steps=1000)
    (20, 30)
    """
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(steps * warmup_steps)


# (Steps since the warm-up, number of steps after the warm-up) -> factor of the learning rate.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda done, steps: max(0.0, (steps - done) / max(1, steps)),
    "cosine": lambda done, steps: max(0.0, 0.5 * (1 + math.cos(math.pi * done / max(1, steps)))),
    "constant_with_warmup": lambda done, steps: 1.0,
}


def schedule(kind: str, step: int, warmup: int, steps: int) -> float:
    """Return the factor of the learning rate at `step`, counted from 0: a linear rise, then the schedule `kind`.

    With a warm-up, the factor is 0 at step 0, as in transformers' ``get_linear_schedule_with_warmup`` and
    ``get_cosine_schedule_with_warmup``. The last step is ``steps - 1``, so the schedule does not reach its end.

    Examples
    --------
    >>> [schedule("linear", step, warmup=2, steps=6) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return step / warmup
    return SCHEDULES[kind](step - warmup, steps - warmup)
