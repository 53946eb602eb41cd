"""Derive the tolerance of each operation: an error bound and a standard deviation for every element of the result.

Checked against fifty-digit arithmetic, against sums in sequence, in pairs and in blocks, and against PyTorch's
recordings in three precisions. No bound is exceeded, and no bound is 1000 times the largest observed error.

``u = 2**-24`` is the unit roundoff of float32. ``gamma(n) = n u / (1 - n u)`` bounds the relative error of n successive
roundings, in any order of a sum (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, sections 3.1 and 4.2).
A library's ``tanh``, ``exp``, ``cos`` and ``1/sqrt`` are assumed to be within 2 ulp (``4 u``). Each function has the
name and the arguments of an operation in `refgemma.ops`, and returns the `Tolerance` of float32 arithmetic. `rescale`
converts a tolerance to float64. `with_storage` adds the rounding of half-precision storage: half an ulp for every
result that PyTorch's eager kernels store. An implementation that stores fewer results stays within the tolerance.

The standard deviation of a sum is derived as follows. A sequential sum of n products ``t_i`` rounds its k-th partial
sum ``S_k``. The error is at most ``u |S_k|``; if uniformly distributed, its variance is ``u**2 S_k**2 / 3``. If the
terms have random signs, ``S_k**2`` grows like ``k t**2``, and the total is ``u**2 n / 6 * sum t_i**2``. If all terms
have one sign, ``S_k**2`` grows like ``(k / n)**2 S**2``, and the total is ``u**2 n / 9 * S**2``. The code adds both
totals. Sums in blocks or pairs have smaller errors. Any other error is assumed to be uniformly distributed within its
bound, with standard deviation ``bound / sqrt(3)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.precision import Array, as_float64

U = 2.0**-24
LIBRARY = 4 * U  # relative error of tanh, exp, cos, rsqrt
UNDERFLOW = 2.0**-126  # the smallest normal float32; smaller numbers may be rounded coarsely or to zero
EVEN = 1 / math.sqrt(3)  # the standard deviation of a uniform distribution from -1 to 1

# For each precision: the relative distance of neighbouring numbers at a power of two, and the smallest normal number.
FORMATS = {
    "bfloat16": (2.0**-7, float(ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_normal)),
    "float16": (2.0**-10, float(np.finfo(np.float16).smallest_normal)),
}


@dataclass(frozen=True)
class Arithmetic:
    """The declared arithmetic: the storage format of tensors, and the unit roundoff of sums.

    Examples
    --------
    >>> Arithmetic("bfloat16").unit == 2.0**-24, Arithmetic("float64").unit == 2.0**-53
    (True, True)
    """

    storage: str = "float32"

    @property
    def unit(self) -> float:
        """The unit roundoff of a sum; sums in half precision are accumulated in float32."""
        return 2.0**-53 if self.storage == "float64" else U


@dataclass(frozen=True)
class Tolerance:
    """The tolerance of each element of one result, in float64.

    Attributes
    ----------
    bound, spread : array
        Error bound of the arithmetic, without storage, and its standard deviation.
    stored, stored_spread : array
        The error bound of half-precision storage, and its standard deviation.
    common : float
        A relative error that all elements may share, for example from a rounded factor. An estimated common factor may
        have this error, no matter how many elements there are.
    """

    bound: Array
    spread: Array
    stored: Array
    stored_spread: Array
    common: float = 0.0
    measured: bool = False  # true if `spread` was measured by simulation; the bound is then a multiple of `spread`

    @property
    def error_bound(self) -> Array:
        """The largest error of a conforming implementation."""
        total: Array = self.bound + self.stored + UNDERFLOW
        return total

    @property
    def std(self) -> Array:
        """The standard deviation of a conforming implementation."""
        total: Array = np.sqrt(self.spread**2 + self.stored_spread**2) + UNDERFLOW
        return total

    def select(self, where: Array) -> "Tolerance":
        """Return the tolerance of the elements where `where` is true."""
        parts: dict[str, Any] = {
            n: np.broadcast_to(x, where.shape)[where] for n, x in vars(self).items() if isinstance(x, np.ndarray)
        }
        return replace(self, **parts)


def tolerance(bound: Array, spread: Array | None = None, common: float = 0.0) -> Tolerance:
    """Return the tolerance of arithmetic in float32, before a result is stored.

    Examples
    --------
    >>> tolerance(np.array([1e-6])).std.round(9)
    array([5.77e-07])
    """
    nothing = np.zeros(np.shape(bound))
    return Tolerance(bound, EVEN * bound if spread is None else spread, nothing, nothing, common)


def from_measured_std(std: Array, deviations: float) -> Tolerance:
    """Return the tolerance of a result with unrecorded inputs, whose `std` was measured by simulation.

    The bound is `deviations` times `std`; if infinite, only the root mean square is judged.
    """
    nothing = np.zeros(np.shape(std))
    bound = deviations * std if math.isfinite(deviations) else nothing + math.inf
    return Tolerance(bound, std, nothing, nothing, measured=True)


def ulp(x: Array, dtype: str) -> Array:
    """Return the distance from each element to its neighbour in `dtype`; 0 for float32 and float64.

    (The bounds already include the rounding of float32 and float64 results.)

    Examples
    --------
    >>> ulp(np.array([1.0, 1.5, 20.0]), "bfloat16").tolist()
    [0.0078125, 0.0078125, 0.125]
    """
    if dtype not in FORMATS:
        return np.zeros(x.shape)
    step, smallest = FORMATS[dtype]
    magnitude = np.maximum(np.abs(x.astype(np.float64)), smallest)
    return step * 2.0 ** np.floor(np.log2(magnitude))


def with_storage(allowed: Tolerance, exact: Array, storage: str, before: Sequence[Array] = ()) -> Tolerance:
    """Add the rounding of the result to half precision, and the errors `before` from storing earlier results."""
    steps = [*before, ulp(np.abs(exact) + allowed.bound + sum(before), storage) / 2]
    spread = np.sqrt(sum((EVEN * step) ** 2 for step in steps))
    return replace(allowed, stored=np.asarray(sum(steps)), stored_spread=np.asarray(spread))


def in_decimals(allowed: Tolerance, step: float) -> Tolerance:
    """Add the rounding of the result to decimals that are `step` apart."""
    if not step:
        return allowed
    return replace(allowed, bound=allowed.bound + step / 2, spread=np.hypot(allowed.spread, EVEN * step / 2))


def rescale(allowed: Tolerance, factor: float, floor: Array | float = 0.0) -> Tolerance:
    """Multiply the tolerance of the arithmetic by `factor`, and add `floor`.

    Tolerances derived for float32 are proportional to the unit roundoff. For another unit roundoff ``unit``, the factor
    is ``unit / U``.
    """
    bound, spread = allowed.bound * factor + floor, allowed.spread * factor + floor
    return replace(allowed, bound=bound, spread=spread, common=allowed.common * factor)


def rearrange(allowed: Tolerance, move: Callable[[Array], Array]) -> Tolerance:
    """Move the axes of a tolerance (without storage) with the function `move`."""
    return tolerance(move(allowed.bound), move(allowed.spread), allowed.common)


# --- operations -------------------------------------------------------------------------------------------------------


def gamma(n: int) -> float:
    """Return the largest relative error of `n` successive roundings.

    Examples
    --------
    >>> bool(gamma(1) >= U)
    True
    """
    return n * U / (1 - n * U)


def matmul(a: Array, b: Array) -> Tolerance:
    """Return the tolerance of sums of n products: ``gamma(n) * |a| @ |b|``."""
    left, right = as_float64(a), as_float64(b)
    n = left.shape[-1]
    squares, total = (left * left) @ (right * right), left @ right
    spread = U * np.sqrt(
        (n / 6 + EVEN**2) * squares + n / 9 * total**2
    )  # see the top of this file; plus the rounding of each product
    return tolerance(gamma(n) * (np.abs(left) @ np.abs(right)), spread)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Tolerance:
    """Return the tolerance of sums of ``in`` products; a bias is one more term."""
    products = matmul(x, weight.T)
    if bias is None:
        return products
    n, added = x.shape[-1], np.abs(as_float64(bias))
    bound = gamma(n + 1) * (products.bound / gamma(n) + added)
    total = as_float64(x) @ as_float64(weight).T + as_float64(bias)
    return tolerance(bound, np.hypot(products.spread, EVEN * U * np.abs(total)))


def rms_norm(x: Array, weight: Array, eps: float) -> Tolerance:
    """Return the tolerance of a norm.

    The mean of n squares has the relative error ``gamma(n + 1)``, its root half of this. Then 1/sqrt, (1 + w) and two
    products add their errors. The error of ``1 + w`` is u times the larger of 1 and ``|1 + w|``; relative to ``1 + w``
    it exceeds u for w near -1. All terms of the mean have one sign, so its relative standard deviation is ``u sqrt(n) /
    3``; that of the root is half of this.
    """
    n, scale = x.shape[-1], np.abs(1 + as_float64(weight))
    normed = np.abs(as_float64(x)) / np.sqrt(np.mean(as_float64(x) ** 2, axis=-1, keepdims=True) + eps)
    relative = gamma(n + 2) / 2 + LIBRARY
    usual = math.sqrt(n / 36 + (LIBRARY / U) ** 2 / 3 + 2 / 3)
    spread = U * normed * np.hypot(usual * scale, EVEN)
    return tolerance(normed * (scale * (relative + 2 * U) + U), spread, common=relative)


def rotary_tables(positions: Array, head_dim: int, theta: float) -> Tolerance:
    """Return the tolerance of the rotary tables; angles are float32 in every arithmetic, and their errors grow.

    The power in a frequency ``theta ** -e`` has the error `LIBRARY` in the candidate and ``u`` in refgemma. The
    reciprocal and the product with the position add ``u`` on each side: 9 u in total. The exponent ``e = 2 i /
    head_dim`` is rounded on each side, which adds ``2 u e |ln(theta)|``. Some implementations, such as llama.cpp,
    multiply ``theta ** (-2 / head_dim)`` by itself ``i`` times, which adds ``2 i u``. The error of a cosine is at most
    the error of its angle plus `LIBRARY`.
    """
    number = np.tile(np.arange(head_dim // 2), 2)
    exponent = 2 * number / head_dim
    angles = np.abs(as_float64(positions)) * theta**-exponent
    relative = U * (9 + 2 * exponent * abs(math.log(theta)) + 2 * number)
    return tolerance(LIBRARY + relative * angles, common=LIBRARY)


def same_angles(cos: Array) -> Tolerance:
    """Return the tolerance of rotary tables from identical angles; only the cosines of libraries may differ."""
    return tolerance(np.full(cos.shape, LIBRARY))


def _rotation_terms(x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Return the absolute values of both products of a rotation, for a number and for its partner half a head away."""
    x64, half = as_float64(x), x.shape[-1] // 2
    return np.abs(x64 * as_float64(cos)), np.abs(np.roll(x64, half, axis=-1) * as_float64(sin))


def rotate(x: Array, cos: Array, sin: Array) -> Tolerance:
    """Return the tolerance of the sum of two products: 2 u times their absolute values."""
    first, second = _rotation_terms(x, cos, sin)
    return tolerance(2 * U * (first + second))


def rotate_stores(x: Array, cos: Array, sin: Array, storage: str) -> list[Array]:
    """Return the errors in the result from storing both products in half precision."""
    return [ulp(term, storage) / 2 for term in _rotation_terms(x, cos, sin)]


def attention_scores(q: Array, k: Array, scale: float) -> Tolerance:
    """Return the tolerance of sums of head_dim products, multiplied by a rounded scale."""
    keys = k.swapaxes(-1, -2)
    product, exact = matmul(q, keys), np.abs(as_float64(q) @ as_float64(keys))
    return tolerance(
        scale * (product.bound + 2 * U * exact), scale * np.hypot(product.spread, EVEN * 2 * U * exact), common=U
    )


def scores_stores(q: Array, k: Array, scale: float, storage: str) -> list[Array]:
    """Return the error in the result from storing the product in half precision before scaling."""
    return [scale * ulp(as_float64(q) @ as_float64(k).swapaxes(-1, -2), storage) / 2]


def soft_cap(x: Array, cap: float | None) -> Tolerance:
    """Return the tolerance of a division, a tanh and a product; tanh never increases a relative error.

    The errors of the cap's reciprocal and the library's tanh may be the same for all elements.
    """
    if cap is None:
        return tolerance(np.zeros(x.shape))
    relative = 2 * U + LIBRARY
    return tolerance(np.abs(cap * np.tanh(as_float64(x) / cap)) * relative, common=relative)


def soft_cap_stores(x: Array, cap: float | None, storage: str) -> list[Array]:
    """Return the errors in the result from storing the quotient and the tanh in half precision."""
    if cap is None:
        return []
    t = as_float64(x) / cap
    bent = np.tanh(t)
    # tanh is steepest near 0, so take its slope half an ulp nearer to 0.
    inner = np.maximum(np.abs(t) - ulp(t, storage) / 2, 0)
    return [cap / np.cosh(inner) ** 2 * ulp(t, storage) / 2, cap * ulp(np.abs(bent) + ulp(t, storage), storage) / 2]


def softmax(scores: Array, mask: Array) -> Tolerance:
    """Return the tolerance of a softmax.

    An absolute error in exp's argument is a relative error of the result. The argument is the distance from the row's
    largest score, with relative error u. The sum has the average error of its terms. The errors of the row's sum and of
    the library's exp may be the same for all elements.
    """
    masked = np.where(mask, as_float64(scores), np.finfo(np.float64).min)
    distance = np.max(masked, axis=-1, keepdims=True) - masked
    exponentials = np.exp(-distance)
    probs = exponentials / exponentials.sum(axis=-1, keepdims=True)
    own = np.where(probs > 0, U * distance, 0)
    mean = np.sum(probs * own, axis=-1, keepdims=True)
    rounds = gamma(scores.shape[-1] + 1)
    return tolerance(probs * (own + mean + 2 * LIBRARY + rounds), common=rounds + LIBRARY)


def log_softmax(x: Array) -> Tolerance:
    """Return the tolerance of log probabilities.

    The distance from the row's largest number has the relative error u; the error of the sum is as in `softmax`. An
    absolute error of the logarithm equals the relative error of the sum, which is the same for the whole row.
    """
    x64 = as_float64(x)
    distance = np.max(x64, axis=-1, keepdims=True) - x64
    exponentials = np.exp(-distance)
    total = exponentials.sum(axis=-1, keepdims=True)
    of_sum = np.sum(exponentials * U * distance, axis=-1, keepdims=True) / total + LIBRARY + gamma(x.shape[-1] + 1)
    log_of_sum = np.log(total)
    return tolerance(
        2 * U * distance + of_sum + (LIBRARY + 2 * U) * log_of_sum + U * np.abs(np.max(x64, axis=-1, keepdims=True))
    )


def gelu_tanh(x: Array) -> Tolerance:
    """Return the tolerance of GELU; it is relative to x, not to y, because ``1 + tanh`` cancels for negative x.

    The argument of tanh has 4 roundings, and ``|t| sech(t)**2 < 0.45``. tanh itself is within 4 u, and adding 1 rounds
    once more. Half of this total is multiplied by x; two more products follow.
    """
    x64 = as_float64(x)
    y = 0.5 * x64 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3)))
    return tolerance(0.5 * np.abs(x64) * (4 * U * 0.45 + LIBRARY + U) + 2 * U * np.abs(y), common=4 * U)


def one_rounding(exact: Array, common: float = 0.0) -> Tolerance:
    """Return the tolerance of a sum or product of two numbers: one rounding."""
    return tolerance(U * np.abs(exact), common=common)
