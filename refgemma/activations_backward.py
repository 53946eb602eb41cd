"""Compute the gradients of the activations in `refgemma.activations`, in the same order. Checked
against PyTorch autograd through `ACT2FN` of transformers 5.23 in the parity tests, and against central differences.

Each function takes the gradient of the result and the input ``x``, and returns ``grad * dy/dx``. In half precision it
rounds where autograd does: once for each PyTorch kernel of the forward pass, unless the docstring says otherwise. The
gradient of Gemma 2's own `gelu_tanh` is in `refgemma.backward`.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from refgemma import activations
from refgemma.activations import Activation, relu, sigmoid
from refgemma.precision import Array, narrow, wide

ActivationBackward: TypeAlias = Callable[[Array, Array], Array]


def gelu_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `gelu`: ``grad * (P(x) + x p(x))``.

    ``P`` is the normal distribution, ``(1 + erf(x / sqrt(2))) / 2``, and ``p`` its density, ``exp(-x**2 / 2) / sqrt(2
    pi)``. ``y = x P(x)`` and ``P' = p``. One rounding in half precision. Source: ``torch.nn.functional.gelu``.

    Examples
    --------
    >>> gelu_backward(np.ones(3), np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.0833,  0.5   ,  1.0833])
    """
    x_wide = wide(x)
    below = 0.5 * (1 + activations._erf(x_wide.astype(np.float64) / math.sqrt(2))).astype(x_wide.dtype)
    density = np.exp(-0.5 * x_wide * x_wide) / math.sqrt(2 * math.pi)
    return narrow(wide(grad) * (below + x_wide * density), like=x)


def gelu_new_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `gelu_new`, each step rounded: ``grad * (0.5 (1 + t) + 0.5 x (1 - t**2) du/dx)``.

    Here ``t = tanh(u)`` and ``u = sqrt(2/pi) (x + 0.044715 x**3)``. ``x`` is used three times; autograd sums the three
    gradients, beginning with the last use. Source: transformers ``NewGELUActivation``.

    Examples
    --------
    >>> gelu_new_backward(np.ones(3), np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.083,  0.5  ,  1.083])
    """
    cube, root = narrow(wide(x) * wide(x) * wide(x), like=x), math.sqrt(2 / math.pi)
    t = np.tanh(root * (x + 0.044715 * cube))
    through_sum = narrow(wide(grad * (0.5 * x)) * (1 - wide(t) * wide(t)), like=x) * root
    through_cube = (through_sum * 0.044715) * (3 * (x * x))
    summed: Array = (through_sum + through_cube) + (grad * (1.0 + t)) * 0.5
    return summed


def sigmoid_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `sigmoid`: ``grad * (1 - y) * y``.

    ``y = 1 / (1 + exp(-x))``, so ``dy/dx = exp(-x) / (1 + exp(-x))**2 = (1 - y) y``. The rounded ``y`` is used, and the
    result is rounded once in half precision. Source: ``torch.sigmoid``.

    Examples
    --------
    >>> sigmoid_backward(np.ones(2), np.array([0.0, 1.0])).round(4)
    array([0.25  , 0.1966])
    """
    y = wide(sigmoid(x))
    return narrow(wide(grad) * (1 - y) * y, like=x)


def silu_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `silu`: ``grad * s * (1 + x (1 - s))`` with ``s = sigmoid(x)``.

    By the product rule, from ``y = x s`` and ``s' = s (1 - s)``. One rounding in half precision. Source:
    ``torch.nn.functional.silu``.

    Examples
    --------
    >>> silu_backward(np.ones(3), np.array([-1.0, 0.0, 1.0])).round(4)
    array([0.0723, 0.5   , 0.9277])
    """
    s = sigmoid(wide(x))
    return narrow(wide(grad) * s * (1 + wide(x) * (1 - s)), like=x)


def quick_gelu_backward(
    grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `quick_gelu`: ``grad * (s + 1.702 x s (1 - s))`` with ``s = sigmoid(1.702 x)``.

    By the product rule; each step is rounded. Source: transformers ``QuickGELUActivation``.

    Examples
    --------
    >>> quick_gelu_backward(np.ones(3), np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.0678,  0.5   ,  1.0678])
    """
    inner = 1.702 * x
    summed: Array = grad * sigmoid(inner) + sigmoid_backward(grad * x, inner) * 1.702
    return summed


def relu_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `relu`: `grad` where ``x > 0``, else 0.

    The derivative at 0 is undefined; PyTorch uses 0. Nothing is rounded. Source: ``torch.nn.functional.relu``.

    Examples
    --------
    >>> relu_backward(np.ones(3), np.array([-1.0, 0.0, 1.0]))
    array([0., 0., 1.])
    """
    return np.where(x > 0, grad, 0)


def relu2_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `relu2`: ``grad * 2 max(x, 0)``.

    Half precision rounds once. Source: transformers ``ReLUSquaredActivation``.

    Examples
    --------
    >>> relu2_backward(np.ones(3), np.array([-1.0, 0.0, 3.0]))
    array([0., 0., 6.])
    """
    return relu_backward(grad * (2 * relu(x)), x)


def relu6_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `relu6`: `grad` where ``0 < x < 6``, else 0.

    At 0 and 6 the derivative is undefined; PyTorch uses 0. Nothing is rounded. Source: ``torch.nn.functional.relu6``.

    Examples
    --------
    >>> relu6_backward(np.ones(3), np.array([-1.0, 3.0, 9.0]))
    array([0., 1., 0.])
    """
    return np.where((x > 0) & (x < 6), grad, 0)


def leaky_relu_backward(
    grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `leaky_relu`: `grad` where ``x > 0``, else ``grad / 100``.

    Half precision rounds once. Source: ``torch.nn.functional.leaky_relu``.

    Examples
    --------
    >>> leaky_relu_backward(np.ones(3), np.array([-1.0, 0.0, 1.0]))
    array([0.01, 0.01, 1.  ])
    """
    return np.where(x > 0, grad, 0.01 * grad)


def tanh_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `tanh`: ``grad * (1 - y**2)``.

    ``y = sinh(x) / cosh(x)``, so ``dy/dx = (cosh**2 - sinh**2) / cosh**2 = 1 - y**2``. The rounded ``y`` is used, and
    the result is rounded once in half precision. Source: ``torch.tanh``.

    Examples
    --------
    >>> tanh_backward(np.ones(2), np.array([0.0, 1.0])).round(4)
    array([1.  , 0.42])
    """
    y = wide(np.tanh(x))
    return narrow(wide(grad) * (1 - y * y), like=x)


def identity_backward(grad: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the gradient of `identity`: `grad`.

    Nothing is rounded. Source: transformers ``LinearActivation``.

    Examples
    --------
    >>> identity_backward(np.array([-1.0, 2.0]), np.zeros(2))
    array([-1.,  2.])
    """
    return grad


ACTIVATIONS_BACKWARD: dict[Activation, ActivationBackward] = {
    activations.gelu: gelu_backward,
    activations.gelu_new: gelu_new_backward,
    activations.quick_gelu: quick_gelu_backward,
    activations.silu: silu_backward,
    activations.sigmoid: sigmoid_backward,
    activations.relu: relu_backward,
    activations.relu2: relu2_backward,
    activations.relu6: relu6_backward,
    activations.leaky_relu: leaky_relu_backward,
    activations.tanh: tanh_backward,
    activations.identity: identity_backward,
}
