"""How far rounding may carry the result of each operation: an error bound for every element, and a standard deviation.

Derived below. Checked against fifty digits, against sums in every order, in pairs and in blocks, and against PyTorch's
recordings in three precisions: no bound is exceeded, and none is 1000 times the largest error seen.

``u = 2**-24`` is the unit roundoff of float32. ``gamma(n) = n u / (1 - n u)`` bounds the relative error of n roundings
in a row, in any order of a sum (Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, sections 3.1 and 4.2).
A library's ``tanh``, ``exp``, ``cos`` and ``1/sqrt`` are taken to be within 2 ulp (``4 u``). A function here takes the
arguments of the operation of its name in `refgemma.ops`, and returns the `Tolerance` of float32 arithmetic;
`rescale` turns it into that of float64, and `with_storage` adds what half-precision storage rounds: half an ulp for
every result that PyTorch's eager kernels store on the way. An implementation that stores fewer of them stays inside.

A standard deviation: a sum of n products ``t_i``, taken one after the other, rounds its k-th partial sum ``S_k``, which
errs by at most ``u |S_k|``, evenly distributed: variance ``u**2 S_k**2 / 3``. Where the terms have random signs,
``S_k**2`` grows like ``k t**2``, which adds up to ``u**2 n / 6 * sum t_i**2``; where they have one sign, like ``(k /
n)**2 S**2``, which adds up to ``u**2 n / 9 * S**2``. Both are counted. Sums in blocks or pairs err less. Any other
result is taken to lie evenly within its bound, whose standard deviation is ``bound / sqrt(3)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.precision import Array, as_float64

U = 2.0**-24
LIBRARY = 4 * U  # relative error allowed to tanh, exp, cos, rsqrt
UNDERFLOW = 2.0**-126  # the smallest normal float32: smaller numbers may be rounded coarsely, or to zero
EVEN = 1 / math.sqrt(3)  # the standard deviation of a number that lies evenly within -1 and 1

# Relative distance of neighbouring numbers at a power of two, and the smallest normal number.
FORMATS = {
    "bfloat16": (2.0**-7, float(ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_normal)),
    "float16": (2.0**-10, float(np.finfo(np.float16).smallest_normal)),
}


@dataclass(frozen=True)
class Arithmetic:
    """The declared arithmetic: what tensors are stored in, and the unit roundoff of the sums (float32's, or float64's).

    Examples
    --------
    >>> Arithmetic("bfloat16").unit == 2.0**-24, Arithmetic("float64").unit == 2.0**-53
    (True, True)
    """

    storage: str = "float32"

    @property
    def unit(self) -> float:
        """The unit roundoff of a sum. Half precision is accumulated in float32."""
        return 2.0**-53 if self.storage == "float64" else U


@dataclass(frozen=True)
class Tolerance:
    """How far rounding may carry each element of one result, in float64.

    Attributes
    ----------
    bound, spread : array
        Error bound of the arithmetic, storage not counted, and its standard deviation.
    stored, stored_spread : array
        The same of what half-precision storage adds.
    common : float
        The relative error that all elements may share, of a rounded factor for instance: an estimate of a common
        factor may be off by as much, however many elements there are.
    """

    bound: Array
    spread: Array
    stored: Array
    stored_spread: Array
    common: float = 0.0
    measured: bool = False  # whether `spread` was measured by simulation, and the bound is only a multiple of it

    @property
    def error_bound(self) -> Array:
        """No conforming implementation is farther off than this."""
        total: Array = self.bound + self.stored + UNDERFLOW
        return total

    @property
    def std(self) -> Array:
        """One standard deviation of a conforming implementation."""
        total: Array = np.sqrt(self.spread**2 + self.stored_spread**2) + UNDERFLOW
        return total

    def select(self, where: Array) -> "Tolerance":
        """Return the tolerance of the elements `where` is true."""
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
    """Return the tolerance of a result whose inputs were not recorded: `std` was measured by simulation.

    Its bound is so many standard `deviations`; infinity leaves only the root mean square to judge by.
    """
    nothing = np.zeros(np.shape(std))
    bound = deviations * std if math.isfinite(deviations) else nothing + math.inf
    return Tolerance(bound, std, nothing, nothing, measured=True)


def ulp(x: Array, dtype: str) -> Array:
    """Return the distance from each element to its neighbour in `dtype`; 0 for float32 and float64.

    The bounds contain the rounding of a float32 result.

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
    """Add the rounding of the result to half precision, and the errors that stores `before` it leave in it."""
    steps = [*before, ulp(np.abs(exact) + allowed.bound + sum(before), storage) / 2]
    spread = np.sqrt(sum((EVEN * step) ** 2 for step in steps))
    return replace(allowed, stored=np.asarray(sum(steps)), stored_spread=np.asarray(spread))


def in_decimals(allowed: Tolerance, step: float) -> Tolerance:
    """Add the rounding of the result to decimals that are `step` apart."""
    if not step:
        return allowed
    return replace(allowed, bound=allowed.bound + step / 2, spread=np.hypot(allowed.spread, EVEN * step / 2))


def rescale(allowed: Tolerance, factor: float, floor: Array | float = 0.0) -> Tolerance:
    """Multiply what arithmetic may do by `factor`, and add `floor` to it.

    All that is derived for float32 is proportional to the unit roundoff: the factor of another is ``unit / U``.
    """
    bound, spread = allowed.bound * factor + floor, allowed.spread * factor + floor
    return replace(allowed, bound=bound, spread=spread, common=allowed.common * factor)


def rearrange(allowed: Tolerance, move: Callable[[Array], Array]) -> Tolerance:
    """Move the axes of a tolerance, before anything is stored, as an operation moves those of its result."""
    return tolerance(move(allowed.bound), move(allowed.spread), allowed.common)


# --- operations -------------------------------------------------------------------------------------------------------


def gamma(n: int) -> float:
    """Return the relative error that `n` roundings in a row can amount to.

    Examples
    --------
    >>> bool(gamma(1) >= U)
    True
    """
    return n * U / (1 - n * U)


def matmul(a: Array, b: Array) -> Tolerance:
    """Sums of n products: ``gamma(n) * |a| @ |b|``."""
    left, right = as_float64(a), as_float64(b)
    n = left.shape[-1]
    squares, total = (left * left) @ (right * right), left @ right
    spread = U * np.sqrt((n / 6 + EVEN**2) * squares + n / 9 * total**2)  # see above; and of the products themselves
    return tolerance(gamma(n) * (np.abs(left) @ np.abs(right)), spread)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Tolerance:
    """A sum of ``in`` products; a bias is one term more."""
    products = matmul(x, weight.T)
    if bias is None:
        return products
    n, added = x.shape[-1], np.abs(as_float64(bias))
    bound = gamma(n + 1) * (products.bound / gamma(n) + added)
    total = as_float64(x) @ as_float64(weight).T + as_float64(bias)
    return tolerance(bound, np.hypot(products.spread, EVEN * U * np.abs(total)))


def rms_norm(x: Array, weight: Array, eps: float) -> Tolerance:
    """The mean of n squares is off by ``gamma(n + 1)``, its root by half of it; then 1/sqrt, (1 + w) and two products.

    ``1 + w`` is off by u of the larger of 1 and ``|1 + w|``, which is more than u of itself where w is near -1.
    The terms of the mean have one sign: its standard deviation is ``u sqrt(n) / 3`` of itself, the root's half of that.
    """
    n, scale = x.shape[-1], np.abs(1 + as_float64(weight))
    normed = np.abs(as_float64(x)) / np.sqrt(np.mean(as_float64(x) ** 2, axis=-1, keepdims=True) + eps)
    relative = gamma(n + 2) / 2 + LIBRARY
    usual = math.sqrt(n / 36 + (LIBRARY / U) ** 2 / 3 + 2 / 3)
    spread = U * normed * np.hypot(usual * scale, EVEN)
    return tolerance(normed * (scale * (relative + 2 * U) + U), spread, common=relative)


def rotary_tables(positions: Array, head_dim: int, theta: float) -> Tolerance:
    """The angle is a float32 in every arithmetic, and its error grows with the position.

    The power in a frequency ``theta ** -e`` is off by `LIBRARY` on the other side and ``u`` on ours, the reciprocal
    and the product with the position by ``u`` on either: 9 u. The exponent ``e = 2 i / head_dim`` is rounded on either
    side, which costs ``2 u e |ln(theta)|``. Some multiply ``theta ** (-2 / head_dim)`` by itself ``i`` times, as
    llama.cpp does: ``2 i u``. A cosine is off by no more than its angle, and by `LIBRARY`.
    """
    number = np.tile(np.arange(head_dim // 2), 2)
    exponent = 2 * number / head_dim
    angles = np.abs(as_float64(positions)) * theta**-exponent
    relative = U * (9 + 2 * exponent * abs(math.log(theta)) + 2 * number)
    return tolerance(LIBRARY + relative * angles, common=LIBRARY)


def same_angles(cos: Array) -> Tolerance:
    """Rotary tables of angles that agree to the last bit: only a library's cosine may differ."""
    return tolerance(np.full(cos.shape, LIBRARY))


def _rotation_terms(x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """The absolute values of both products: of a number, and of the one half a head away."""
    x64, half = as_float64(x), x.shape[-1] // 2
    return np.abs(x64 * as_float64(cos)), np.abs(np.roll(x64, half, axis=-1) * as_float64(sin))


def rotate(x: Array, cos: Array, sin: Array) -> Tolerance:
    """Two products and a sum: 2 u of the absolute values."""
    first, second = _rotation_terms(x, cos, sin)
    return tolerance(2 * U * (first + second))


def rotate_stores(x: Array, cos: Array, sin: Array, storage: str) -> list[Array]:
    """Return what both products, stored in half precision, leave in the result."""
    return [ulp(term, storage) / 2 for term in _rotation_terms(x, cos, sin)]


def attention_scores(q: Array, k: Array, scale: float) -> Tolerance:
    """Sums of head_dim products, the product with the scale, and the rounding of the scale itself."""
    keys = k.swapaxes(-1, -2)
    product, exact = matmul(q, keys), np.abs(as_float64(q) @ as_float64(keys))
    return tolerance(
        scale * (product.bound + 2 * U * exact), scale * np.hypot(product.spread, EVEN * 2 * U * exact), common=U
    )


def scores_stores(q: Array, k: Array, scale: float, storage: str) -> list[Array]:
    """Return what the product, stored in half precision before it is scaled, leaves in the result."""
    return [scale * ulp(as_float64(q) @ as_float64(k).swapaxes(-1, -2), storage) / 2]


def soft_cap(x: Array, cap: float | None) -> Tolerance:
    """Division, tanh, product; tanh never enlarges the relative error of its argument.

    The reciprocal of the cap and the library's tanh may err the same everywhere.
    """
    if cap is None:
        return tolerance(np.zeros(x.shape))
    relative = 2 * U + LIBRARY
    return tolerance(np.abs(cap * np.tanh(as_float64(x) / cap)) * relative, common=relative)


def soft_cap_stores(x: Array, cap: float | None, storage: str) -> list[Array]:
    """Return what the quotient and the tanh, stored in half precision, leave in the result."""
    if cap is None:
        return []
    t = as_float64(x) / cap
    bent = np.tanh(t)
    # At the quotient rounded away from 0 the slope is smaller, towards 0 larger: the largest within half an ulp counts.
    inner = np.maximum(np.abs(t) - ulp(t, storage) / 2, 0)
    return [cap / np.cosh(inner) ** 2 * ulp(t, storage) / 2, cap * ulp(np.abs(bent) + ulp(t, storage), storage) / 2]


def softmax(scores: Array, mask: Array) -> Tolerance:
    """An absolute error of exp's argument is a relative one of its result; the sum errs as its summands do on average.

    The argument is the distance from the row's largest score, off by u relative to itself. The sum of a row and the
    library's exp may err the same everywhere.
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
    """The distance from the row's largest number is off by u of itself; the logarithm of the sum as `softmax` has it.

    An absolute error of the logarithm is the relative one of the sum, which the whole row shares.
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
    """An absolute error: in ``1 + tanh`` the digits cancel for negative x, so that it is relative to x, not to y.

    The argument of tanh carries 4 roundings, and ``|t| sech(t)**2 < 0.45``; tanh itself is within 4 u, the sum adds
    another u; half of all that times x, and two products.
    """
    x64 = as_float64(x)
    y = 0.5 * x64 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3)))
    return tolerance(0.5 * np.abs(x64) * (4 * U * 0.45 + LIBRARY + U) + 2 * U * np.abs(y), common=4 * U)


def one_rounding(exact: Array, common: float = 0.0) -> Tolerance:
    """A sum or product of two numbers."""
    return tolerance(U * np.abs(exact), common=common)
