"""How far rounding can carry a float32 evaluation of each operation from the exact result: one bound an element.
Derived below; checked by property tests against float64 over random inputs.

Notation: ``u = 2**-24`` is the unit roundoff of float32, and ``gamma(n) = n u / (1 - n u)`` bounds the relative error
of n roundings in a row, whatever the order of a sum (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002,
section 3.1 and 4.2). A library's ``tanh``, ``exp``, ``cos`` and ``1/sqrt`` are taken to be within 2 ulp (4 u). Each
function takes the arguments of the operation of its name in `refgemma.ops` (`x`, `weight`, `eps`, `cos`, `sin`, `q`,
`k`, `cap`, `scores`, `mask`; for the tables `angles`, position times frequency; for a sum or a product its terms `a`
and `b`), and gives a float64 array of the shape of its result. Two conforming evaluations may differ by twice the
bound, and by `UNDERFLOW`: numbers that small may be rounded coarsely or to zero.
"""

import math

import numpy as np
import numpy.typing as npt

from refgemma.precision import Array, wide

U = 2.0**-24
LIBRARY = 4 * U  # relative error allowed to tanh, exp, cos, rsqrt
UNDERFLOW = 2.0**-126  # the smallest normal float32


def _f64(x: Array) -> npt.NDArray[np.float64]:
    return np.asarray(wide(x), np.float64)


def gamma(n: int) -> float:
    """The relative error that `n` roundings in a row can amount to.

    Examples
    --------
    >>> bool(gamma(1) >= U)
    True
    """
    return n * U / (1 - n * U)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """A sum of n products: ``gamma(n) * sum |x| |w|``; a bias is one term more."""
    terms = np.abs(_f64(x)) @ np.abs(_f64(weight)).T
    if bias is None:
        return gamma(x.shape[-1]) * terms
    return gamma(x.shape[-1] + 1) * (terms + np.abs(_f64(bias)))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """The mean of n squares is off by gamma(n + 1), its root by half of that; then 1/sqrt, (1 + w) and two products."""
    x64 = np.abs(_f64(x))
    normed = x64 / np.sqrt(np.mean(x64 * x64, axis=-1, keepdims=True) + eps)
    relative = gamma(x.shape[-1] + 2) / 2 + LIBRARY + 2 * U
    # And 1 + w is off by u of the larger of 1 and |1 + w|, which is more than u of itself where w is near -1.
    bound: Array = normed * (np.abs(1 + _f64(weight)) * relative + U)
    return bound


def rotary_tables(angles: Array) -> Array:
    """The angle in float32 is off by u relative to itself, and a cosine by no more than its angle."""
    return LIBRARY + U * np.abs(_f64(angles))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Two products and a sum: 2 u of the absolute values."""
    first, second = np.split(np.abs(_f64(x)), 2, axis=-1)
    swapped = np.concatenate([second, first], axis=-1)
    bound: Array = 2 * U * (np.abs(_f64(x) * _f64(cos)) + swapped * np.abs(_f64(sin)))
    return bound


def matmul(a: Array, b: Array) -> Array:
    """Sums of n products, batched: ``gamma(n) * |a| @ |b|``."""
    return gamma(a.shape[-1]) * (np.abs(_f64(a)) @ np.abs(_f64(b)))


def attention_scores(q: Array, k: Array, scale: float) -> Array:
    """Sums of head_dim products, and the product with the scale."""
    keys = k.swapaxes(-1, -2)
    bound: Array = (matmul(q, keys) + U * np.abs(_f64(q) @ _f64(keys))) * scale
    return bound


def soft_cap(x: Array, cap: float | None) -> Array:
    """Division, tanh, product; and tanh never enlarges the relative error of its argument."""
    if cap is None:
        return np.zeros(x.shape)
    return np.abs(cap * np.tanh(_f64(x) / cap)) * (2 * U + LIBRARY)


def softmax(scores: Array, mask: Array) -> Array:
    """An absolute error of exp's argument is a relative one of its result; the sum errs as its summands do on average.

    The argument is the distance from the row's largest score, off by u relative to itself.
    """
    masked = np.where(mask, _f64(scores), np.finfo(np.float64).min)
    distance = np.max(masked, axis=-1, keepdims=True) - masked
    exponentials = np.exp(-distance)
    probs = exponentials / exponentials.sum(axis=-1, keepdims=True)
    own = np.where(probs > 0, U * distance, 0)
    mean = np.sum(probs * own, axis=-1, keepdims=True)
    bound: Array = probs * (own + mean + 2 * LIBRARY + gamma(scores.shape[-1] + 1))
    return bound


def gelu_tanh(x: Array) -> Array:
    """An absolute error: in ``1 + tanh`` the digits cancel for negative x, so that it is relative to x, not to y.

    The argument of tanh carries 4 roundings, and ``|t| sech(t)**2 < 0.45``; tanh itself is within 4 u, the sum adds
    another u; half of all that times x, and two products.
    """
    x64 = _f64(x)
    y = 0.5 * x64 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3)))
    bound: Array = 0.5 * np.abs(x64) * (4 * U * 0.45 + LIBRARY + U) + 2 * U * np.abs(y)
    return bound


def product(a: Array, b: Array) -> Array:
    """One rounding."""
    return U * np.abs(_f64(a) * _f64(b))


def add(a: Array, b: Array) -> Array:
    """One rounding."""
    return U * np.abs(_f64(a) + _f64(b))
