"""Define every operation with a gradient, and two laws for gradients.

Checked by the defects in test_backward_golden.py; each breaks a law.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma import activations, backward, heads, model, ops
from refgemma.activations import ACTIVATIONS

EPS = 2.0**-52
STEP = 2.0**-17  # near the cube root of EPS, where truncation and rounding of a central difference are of one size


def without_checks(module: Any) -> Any:
    """Import a module again without checking its annotations, so that it takes complex numbers."""
    spec = importlib.util.spec_from_file_location(f"plain_{module.__name__.rpartition('.')[2]}", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


PLAIN = without_checks(ops)


@dataclass(frozen=True)
class Operation:
    """A function of float64 arrays, and its gradient, a function of `refgemma.backward` that is looked up at each
    call."""

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]]  # (grad, *inputs) -> the gradient of each input
    draw: Callable[[np.random.Generator], list[Any]]
    gradient: str  # the name of the function under test
    plain: Callable[..., Any] | None = None  # the same for complex numbers


def size(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 5))


def arrays(*shapes: tuple[int, ...]) -> Callable[[np.random.Generator], list[Any]]:
    return lambda rng: [rng.standard_normal(shape) for shape in shapes]


def no_bend(rng: np.random.Generator) -> list[Any]:
    """Return numbers away from 0 and 6, where the relu functions have no derivative."""
    x = rng.standard_normal(12) * 4
    return [np.where(np.minimum(np.abs(x), np.abs(x - 6)) < 0.01, 1.0, x)]


def draw_linear(rng: np.random.Generator) -> list[Any]:
    inside, out = size(rng), size(rng)
    return [rng.standard_normal(shape) for shape in ((2, size(rng), inside), (out, inside), (out,))]


def draw_scores(rng: np.random.Generator) -> list[Any]:
    heads, dim = size(rng), size(rng)
    return [rng.standard_normal((2, heads, size(rng), dim)) for _ in range(2)]


MASK = np.tri(4, 5, dtype=bool)[None, None]  # every query sees a key
COS, SIN = np.cos(np.arange(12.0)).reshape(1, 1, 3, 4), np.sin(np.arange(12.0) + 1).reshape(1, 1, 3, 4)
IDS = np.array([[2, 0, 2], [3, 2, 1]])
LABELS = np.array([1, -100, 0, 2])

OPERATIONS: dict[str, Operation] = {
    "linear": Operation(
        ops.linear, lambda g, x, w, b: backward.linear_backward(g, x, w, b), draw_linear, "linear_backward",
        lambda x, w, b: PLAIN.linear(x, w) + b,
    ),
    "rms_norm": Operation(
        lambda x, w: ops.rms_norm(x, w, 0.1), lambda g, x, w: backward.rms_norm_backward(g, x, w, 0.1),
        arrays((2, 3, 5), (5,)), "rms_norm_backward", lambda x, w: PLAIN.rms_norm(x, w, 0.1),
    ),
    "rotate": Operation(
        lambda x: ops.rotate(x, COS, SIN), lambda g, x: (backward.rotate_backward(g, COS, SIN),),
        arrays((1, 2, 3, 4)), "rotate_backward", lambda x: PLAIN.rotate(x, COS, SIN),
    ),
    "repeat_kv": Operation(
        lambda x: ops.repeat_kv(x, 3), lambda g, x: (backward.repeat_kv_backward(g, 3),), arrays((2, 2, 3, 2)),
        "repeat_kv_backward", lambda x: PLAIN.repeat_kv(x, 3),
    ),
    "soft_cap": Operation(
        lambda x: ops.soft_cap(x, 2.0), lambda g, x: (backward.soft_cap_backward(g, x, 2.0),),
        lambda rng: [rng.standard_normal(9) * 3], "soft_cap_backward", lambda x: PLAIN.soft_cap(x, 2.0),
    ),
    "no cap": Operation(
        lambda x: ops.soft_cap(x, None), lambda g, x: (backward.soft_cap_backward(g, x, None),), arrays((9,)),
        "soft_cap_backward", lambda x: PLAIN.soft_cap(x, None),
    ),
    "attention_scores": Operation(
        lambda q, k: ops.attention_scores(q, k, 0.3),
        lambda g, q, k: backward.attention_scores_backward(g, q, k, 0.3), draw_scores, "attention_scores_backward",
        lambda q, k: PLAIN.attention_scores(q, k, 0.3),
    ),
    "softmax": Operation(
        lambda s: ops.softmax(s, MASK), lambda g, s: (backward.softmax_backward(g, ops.softmax(s, MASK)),),
        lambda rng: [rng.standard_normal((1, 2, 4, 5)) * 3], "softmax_backward", lambda s: PLAIN.softmax(s, MASK),
    ),
    "embed": Operation(
        lambda table: model.embed(IDS, table), lambda g, table: (backward.embed_backward(g, IDS, 5, None),),
        arrays((5, 7)), "embed_backward", lambda table: table[IDS] * np.sqrt(7),
    ),
    "cross_entropy": Operation(
        lambda z: np.array(heads.cross_entropy(z, LABELS)),
        lambda g, z: (g * backward.cross_entropy_backward(z, LABELS),), arrays((4, 3)), "cross_entropy_backward",
    ),
    "cross_entropy of a part": Operation(
        lambda z: np.array(heads.cross_entropy(z, LABELS, 10)),
        lambda g, z: (g * backward.cross_entropy_backward(z, LABELS, 10),), arrays((4, 3)), "cross_entropy_backward",
    ),
    "causal_lm_loss": Operation(
        lambda z: np.array(heads.causal_lm_loss(z, IDS)), lambda g, z: (g * backward.causal_lm_loss_backward(z, IDS),),
        arrays((2, 3, 4)), "causal_lm_loss_backward",
    ),
    "mean_squared_error": Operation(
        lambda z: np.array(heads.mean_squared_error(z, LABELS / 50)),
        lambda g, z: (g * backward.mean_squared_error_backward(z, LABELS / 50),), arrays((4,)),
        "mean_squared_error_backward",
    ),
    "binary_cross_entropy": Operation(
        lambda z: np.array(heads.binary_cross_entropy(z, np.array([0.0, 0.25, 1.0]))),
        lambda g, z: (g * backward.binary_cross_entropy_backward(z, np.array([0.0, 0.25, 1.0])),), arrays((3,)),
        "binary_cross_entropy_backward",
    ),
}  # fmt: skip
# gelu and sigmoid take real numbers only, and gelu_tanh takes tanh in float64.
COMPLEX_ACTIVATIONS = {"gelu_new", "tanh", "linear", "leaky_relu"}
PLAIN_ACTIVATIONS = without_checks(activations)


def activation_operation(name: str) -> Operation:
    forward = ACTIVATIONS[name]
    plain = PLAIN_ACTIVATIONS.ACTIVATIONS[name] if name in COMPLEX_ACTIVATIONS else None
    gradient = "gelu_tanh_backward" if forward is ops.gelu_tanh else "activation_backward"
    return Operation(
        forward, lambda g, x: (backward.activation_backward(g, x, forward),), no_bend, gradient, plain
    )  # fmt: skip


OPERATIONS |= {f"activation {name}": activation_operation(name) for name in ACTIVATIONS}


def along(operation: Operation, inputs: list[Any], grad: Any, moves: list[Any], step: float) -> tuple[float, float]:
    """Return the central difference of ``<grad, f(x + t move)>``, and the size of the numbers in it."""
    ends = [operation.forward(*(x + sign * step * v for x, v in zip(inputs, moves, strict=True))) for sign in (1, -1)]
    size = max(float(np.sum(np.abs(grad * end))) for end in ends)
    return float(np.sum(grad * (ends[0] - ends[1]))) / (2 * step), size


def directions(inputs: list[Any], rng: np.random.Generator) -> Iterator[list[Any]]:
    """Yield directions: each element alone, then all elements at random."""
    for number, x in enumerate(inputs):
        for place in np.ndindex(x.shape):
            moves = [np.zeros(y.shape) for y in inputs]
            moves[number][place] = 1.0
            yield moves
    yield [rng.standard_normal(x.shape) for x in inputs]


def check_differences(operation: Operation, seed: int) -> None:
    """Compare a gradient with central differences, element by element.

    A difference over a step h has the error ``h**2 f''' / 6``, and over 2 h four times this error. So three times the
    distance between both differences bounds the error. Rounding of f adds 64 roundings of its size, divided by h.
    """
    rng = np.random.default_rng(seed)
    inputs = operation.draw(rng)
    grad = rng.standard_normal(np.shape(operation.forward(*inputs)))
    found = operation.backward(grad, *inputs)
    for moves in directions(inputs, rng):
        ours = sum(float(np.sum(g * v)) for g, v in zip(found, moves, strict=True))
        fine, scale = along(operation, inputs, grad, moves, STEP)
        coarse, _ = along(operation, inputs, grad, moves, 2 * STEP)
        assert abs(ours - fine) <= 3 * abs(coarse - fine) + 64 * EPS * (scale + 1) / STEP


def check_adjoint(operation: Operation, seed: int) -> None:
    """Compare ``<grad, J move>`` with ``<backward(grad), move>``; a complex step gives J without error except rounding.

    ``f(x + i h v)`` has the imaginary part ``h J v``. No difference is taken, so h can be 1e-100. Only the rounding of
    both inner products remains: 256 roundings of the sum of the terms' sizes, because they have at most 256 terms.
    """
    rng = np.random.default_rng(seed)
    inputs = operation.draw(rng)
    grad = rng.standard_normal(np.shape(operation.forward(*inputs)))
    moves = [rng.standard_normal(x.shape) for x in inputs]
    found = operation.backward(grad, *inputs)
    assert operation.plain is not None
    moved = operation.plain(*(x + 1e-100j * v for x, v in zip(inputs, moves, strict=True))).imag / 1e-100
    ours = sum(float(np.sum(g * v)) for g, v in zip(found, moves, strict=True))
    sizes = sum(float(np.sum(np.abs(g * v))) for g, v in zip(found, moves, strict=True))
    assert abs(ours - float(np.sum(grad * moved))) <= 256 * EPS * (sizes + float(np.sum(np.abs(grad * moved))))
