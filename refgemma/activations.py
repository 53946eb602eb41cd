"""Define the activations that a configuration may name, under transformers' names. Checked against `ACT2FN` of
transformers 5.23 in the parity tests, on random numbers in float32 and bfloat16.

Gemma 2 itself uses only `gelu_tanh`, which is in `refgemma.ops`. In half precision each function rounds once per
PyTorch kernel. This is one rounding in total, unless the docstring gives another number.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from refgemma.ops import gelu_tanh
from refgemma.precision import Array, narrow, wide

Activation: TypeAlias = Callable[[Array], Array]

# NumPy has no error function. Python's own takes one number at a time: it is slow, but exact.
_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute the exact GELU: ``x * (1 + erf(x / sqrt(2))) / 2``.

    Half precision rounds once. Source: ``torch.nn.functional.gelu``; Hendrycks and Gimpel 2016, arXiv:1606.08415.

    Examples
    --------
    >>> gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    x_wide = wide(x)
    share = (0.5 * (1 + _erf(x_wide.astype(np.float64) / math.sqrt(2)))).astype(x_wide.dtype)
    return narrow(x_wide * share, like=x)


def gelu_new(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute `gelu_tanh` step by step: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))``, each step rounded.

    Source: transformers ``NewGELUActivation``.

    Examples
    --------
    >>> gelu_new(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1588,  0.    ,  0.8412])
    """
    cube = narrow(wide(x) * wide(x) * wide(x), like=x)
    activated: Array = 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * cube)))
    return activated


def sigmoid(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``1 / (1 + exp(-x))`` as ``exp(-log(1 + exp(-x)))``, which neither overflows nor loses digits.

    Half precision rounds once. Source: ``torch.sigmoid``.

    Examples
    --------
    >>> sigmoid(np.array([-1000.0, 0.0, 1.0])).round(4)
    array([0.    , 0.5   , 0.7311])
    """
    exact = np.exp(-np.logaddexp(0, -wide(x).astype(np.float64)))
    return narrow(exact.astype(wide(x).dtype), like=x)


def silu(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``x * sigmoid(x)``, also called swish.

    Half precision rounds once. Source: ``torch.nn.functional.silu``; Elfwing et al. 2017, arXiv:1702.03118.

    Examples
    --------
    >>> silu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.2689,  0.    ,  0.7311])
    """
    return narrow(wide(x) * sigmoid(wide(x)), like=x)


def quick_gelu(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``x * sigmoid(1.702 x)``, an approximation of GELU.

    Three roundings in half precision: two products and the sigmoid. Source: transformers ``QuickGELUActivation``.

    Examples
    --------
    >>> quick_gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1542,  0.    ,  0.8458])
    """
    activated: Array = x * sigmoid(1.702 * x)
    return activated


def relu(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``max(x, 0)``.

    Nothing is rounded. Source: ``torch.nn.functional.relu``.

    Examples
    --------
    >>> relu(np.array([-1.0, 0.0, 1.0]))
    array([0., 0., 1.])
    """
    activated: Array = np.maximum(x, 0)
    return activated


def relu2(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``max(x, 0) ** 2``.

    Half precision rounds once. Source: transformers ``ReLUSquaredActivation``; So et al. 2021, arXiv:2109.08668.

    Examples
    --------
    >>> relu2(np.array([-1.0, 0.0, 3.0]))
    array([0., 0., 9.])
    """
    activated: Array = relu(x) * relu(x)
    return activated


def relu6(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``min(max(x, 0), 6)``.

    Nothing is rounded. Source: ``torch.nn.functional.relu6``.

    Examples
    --------
    >>> relu6(np.array([-1.0, 3.0, 9.0]))
    array([0., 3., 6.])
    """
    activated: Array = np.clip(x, 0, 6)
    return activated


def leaky_relu(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute ``max(x, 0.01 x)``: ``x`` above 0, ``x / 100`` below.

    Half precision rounds once. Source: ``torch.nn.functional.leaky_relu``.

    Examples
    --------
    >>> leaky_relu(np.array([-1.0, 0.0, 1.0]))
    array([-0.01,  0.  ,  1.  ])
    """
    return np.where(x > 0, x, 0.01 * x)


def tanh(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute the hyperbolic tangent, ``(exp(x) - exp(-x)) / (exp(x) + exp(-x))``.

    Half precision rounds once. Source: ``torch.tanh``.

    Examples
    --------
    >>> tanh(np.array([0.0, 1.0])).round(4)
    array([0.    , 0.7616])
    """
    activated: Array = np.tanh(x)
    return activated


def identity(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return ``x`` unchanged.

    Nothing is rounded. Source: transformers ``LinearActivation``.

    Examples
    --------
    >>> identity(np.array([-1.0, 2.0]))
    array([-1.,  2.])
    """
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu,
    "gelu_new": gelu_new,
    "quick_gelu": quick_gelu,
    "silu": silu,
    "swish": silu,
    "sigmoid": sigmoid,
    "relu": relu,
    "relu2": relu2,
    "relu6": relu6,
    "leaky_relu": leaky_relu,
    "tanh": tanh,
    "linear": identity,
}
