"""The step of an optimizer as operations: each weight after the step, from the weight before and its recorded gradient.
Checked against `AdamW` and `SGD` of torch 2.13 (tests/parity/test_optimizers_parity.py).

The weights before the step are the model's. Moments are zero before the first step; before a later one the trace has
them (``exp_avg.`` and ``exp_avg_sq.`` before the name of the weight).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.oracle.operations import Context, Operation
from refgemma.oracle.tolerance import Tolerance, U, tolerance
from refgemma.precision import Array, as_float64
from refgemma.trace.names import AFTER, GRADS
from refgemma.trace.step_numbers import StepNumbers
from refgemma.training.optimizer import decays
from refgemma.weights.parameters import named_weights, tensor_shapes

# --- the step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightStep:
    """One weight before the step: its gradient as it was recorded, the factor of clipping, and the moments."""

    weight: Array
    grad: Array
    exp_avg: Array
    exp_avg_sq: Array
    numbers: StepNumbers
    decay: float  # of this weight
    factor: float = 1.0


def adamw_step(s: WeightStep) -> Array:
    """Return a weight after one step of AdamW; see `refgemma.training.optimizer.adamw`."""
    return adamw_by(s)


def adamw_by(
    s: WeightStep, *, correct: bool = True, count: int = 0, early: bool = False, inside: bool = False, l2: bool = False,
    after: bool = False,
) -> Array:  # fmt: skip
    """Return a weight after one step of AdamW; the arguments make mistakes."""
    n, rate, t = s.numbers, s.numbers.learning_rate, s.numbers.step + count
    g = s.grad * s.factor + (s.decay * s.weight if l2 else 0)
    keep = 1.0 if l2 else 1 - rate * s.decay
    m = s.exp_avg + (1 - n.adam_beta1) * (g - s.exp_avg)
    v = n.adam_beta2 * s.exp_avg_sq + (1 - n.adam_beta2) * g * g
    of_m, of_v = (1 - n.adam_beta1**t, 1 - n.adam_beta2**t) if correct else (1.0, 1.0)
    if early:  # eps is added before the correction
        root = (np.sqrt(v) + n.adam_epsilon) / math.sqrt(of_v)
    else:
        root = np.sqrt(v / of_v + n.adam_epsilon) if inside else np.sqrt(v / of_v) + n.adam_epsilon
    move = rate * m / of_m / root
    return np.asarray((s.weight - move) * keep if after else s.weight * keep - move)


def sgd_step(s: WeightStep) -> Array:
    """Return a weight after one step of stochastic gradient descent without momentum; decay is part of the gradient.

    Source: ``torch.optim.SGD``.
    """
    return np.asarray(s.weight - s.numbers.learning_rate * (s.grad * s.factor + s.decay * s.weight))


OPTIMIZER_STEPS: Mapping[str, Callable[[WeightStep], Array]] = {"adamw": adamw_step, "sgd": sgd_step}


def step_tolerance(s: WeightStep, sizes: int) -> Tolerance:
    """Return the tolerance of the weight after a step.

    AdamW moves a weight by a quotient. Its numerator and its denominator have at most 12 roundings each: a moment, its
    correction, the root or the rate. So the move has at most 24. The decayed weight and the sum have three. A global
    norm of n squares has the relative error ``sqrt(n) u`` (Higham and Mary 2019, doi:10.1137/18M1226312), and so has
    the factor of clipping, which occurs in the numerator and in the denominator.
    """
    n, clipped = s.numbers, s.factor != 1
    relative = 12 * U + (U * math.sqrt(sizes) if clipped else 0.0)
    g = np.abs(s.grad * s.factor)
    if n.optimizer == "sgd":
        return tolerance(
            n.learning_rate * relative * (g + s.decay * np.abs(s.weight)) + 3 * U * (np.abs(s.weight) + g * 0)
        )
    m = n.adam_beta1 * np.abs(s.exp_avg) + (1 - n.adam_beta1) * g
    v = n.adam_beta2 * s.exp_avg_sq + (1 - n.adam_beta2) * g * g
    root = np.sqrt(v / (1 - n.adam_beta2**n.step)) + n.adam_epsilon
    move = n.learning_rate * m / (1 - n.adam_beta1**n.step) / root
    return tolerance(2 * relative * move + 3 * U * np.abs(s.weight))


def norm_of(gradients: Sequence[Array]) -> float:
    """Return the length of all gradients as one vector."""
    return math.sqrt(sum(float(np.sum(np.square(g))) for g in gradients))


def clip_by_norm(grad: Array, norm: float, limit: float) -> float:
    """Return the factor of clipping by the global norm. Source: ``torch.nn.utils.clip_grad_norm_``."""
    return min(1.0, limit / (norm + 1e-6))


def optimizer_operations(context: Context) -> Iterator[Operation]:
    """Yield the operation of each weight after the step, in the order of the model."""
    numbers = context.call.step
    if numbers is None:
        return
    weights = named_weights(context.weights, context.config)
    step = context.function("optimizer_step", OPTIMIZER_STEPS[numbers.optimizer])
    choose, clip = context.function("decays", decays), context.function("clip", clip_by_norm)
    every = tuple(GRADS + name for name in weights) if numbers.max_grad_norm else ()
    norms: list[float] = []  # of all gradients, computed once

    def prepare(name: str, grad: Array, others: tuple[Array, ...]) -> WeightStep:
        weight = as_float64(weights[name][:])
        first, second = (
            as_float64(numbers.moments.get(f"{part}.{name}", np.zeros(weight.shape)))
            for part in ("exp_avg", "exp_avg_sq")
        )
        if others and not norms:
            norms.append(norm_of(others))
        factor = clip(grad, norms[0], numbers.max_grad_norm) if others else 1.0
        decay = numbers.weight_decay if choose(name) else 0.0
        return WeightStep(weight, grad, first, second, numbers, decay, factor)

    sizes = sum(math.prod(shape) for shape in tensor_shapes(context.config).values())
    for name in weights:
        yield Operation(
            AFTER + name, (GRADS + name, *every),
            lambda grad, *others, name=name: step(prepare(name, grad, others)),
            lambda grad, *others, name=name: step_tolerance(prepare(name, grad, others), sizes),
        )  # fmt: skip
