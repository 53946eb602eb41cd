"""What rounding may do to each tensor of a run: a worst case no conforming implementation exceeds, and a usual size.

Checked in the tests: never exceeded by sums in any order, in pairs and in blocks, nor by PyTorch's recorded results in
three precisions; and at most 1000 times the largest error seen.

The worst case ``bound`` is that of `refgemma.oracle.bounds` for arithmetic in float32, and where the tensors are kept
in half precision, half an ulp more for every result that PyTorch's eager kernels store on the way (an implementation
that stores fewer of them stays inside). The usual size ``sigma`` is a standard deviation. A sum of n products ``t_i``,
taken one after the other, rounds its k-th partial sum ``S_k``, which errs by at most ``u |S_k|``, evenly distributed:
variance ``u**2 S_k**2 / 3``. Where the terms have random signs, ``S_k**2`` grows like ``k t**2``, which adds up to
``u**2 n / 6 * sum t_i**2``; where they have one sign, like ``(k / n)**2 S**2``, which adds up to ``u**2 n / 9 *
S**2``. Both are counted. Sums in blocks or pairs err less. Any other result is taken to lie evenly within its bound,
whose standard deviation is ``bound / sqrt(3)``.

``common`` is the relative error that all elements may share, a rounded factor for instance: what an estimate of a
common factor may be off by however many elements there are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refgemma.oracle import bounds
from refgemma.oracle.bounds import LIBRARY, UNDERFLOW, U
from refgemma.oracle.compare import ulp
from refgemma.precision import Array, wide

EVEN = 1 / math.sqrt(3)  # the standard deviation of what lies evenly within -1 and 1


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
        """Half precision is accumulated in float32."""
        return 2.0**-53 if self.storage == "float64" else U


@dataclass(frozen=True)
class Allowance:
    """How far rounding may carry each element of one result, in float64."""

    bound: Array  # worst case of the arithmetic, storage not counted
    spread: Array  # its standard deviation
    stored: Array  # worst case of what half-precision storage adds
    stored_spread: Array
    common: float  # relative error that all elements may share

    @property
    def worst(self) -> Array:
        """No conforming implementation is farther off than this."""
        total: Array = self.bound + self.stored + UNDERFLOW
        return total

    @property
    def sigma(self) -> Array:
        """One standard deviation of a conforming implementation."""
        total: Array = np.sqrt(self.spread**2 + self.stored_spread**2) + UNDERFLOW
        return total


def allowance(bound: Array, spread: Array | None = None, common: float = 0.0) -> Allowance:
    """Of arithmetic in float32, before anything is stored."""
    nothing = np.zeros(np.shape(bound))
    return Allowance(bound, EVEN * bound if spread is None else spread, nothing, nothing, common)


def stored(allowed: Allowance, exact: Array, storage: str, *before: Array) -> Allowance:
    """With the rounding of the result to half precision, and the errors that stores `before` it leave in it."""
    steps = [*before, ulp(np.abs(exact) + allowed.bound + sum(before), storage) / 2]
    spread = np.sqrt(sum((EVEN * step) ** 2 for step in steps))
    return replace(allowed, stored=np.asarray(sum(steps)), stored_spread=np.asarray(spread))


def in_unit(allowed: Allowance, arithmetic: Arithmetic) -> Allowance:
    """The bounds are derived for float32, and proportional to its unit roundoff."""
    factor = arithmetic.unit / U
    return replace(
        allowed, bound=allowed.bound * factor, spread=allowed.spread * factor, common=allowed.common * factor
    )


def in_decimals(allowed: Allowance, step: float) -> Allowance:
    """With the rounding of the result to decimals, `step` apart."""
    if not step:
        return allowed
    return replace(allowed, bound=allowed.bound + step / 2, spread=np.hypot(allowed.spread, EVEN * step / 2))


def _sum_spread(n: int, squares: Array, total: Array) -> Array:
    """Of a sum of n products in any order, see above; and of the products themselves."""
    spread: Array = U * np.sqrt((n / 6 + EVEN**2) * squares + n / 9 * total**2)
    return spread


def _f64(x: Array) -> Array:
    return np.asarray(wide(x), np.float64)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Allowance:
    """A sum of ``in`` products, and the bias."""
    a, b = _f64(x), _f64(weight).T
    spread = _sum_spread(a.shape[-1], (a * a) @ (b * b), a @ b)
    if bias is not None:
        spread = np.hypot(spread, EVEN * U * np.abs(a @ b + _f64(bias)))
    return allowance(bounds.linear(x, weight, bias), spread)


def matmul(a: Array, b: Array) -> Allowance:
    """Sums of products, batched."""
    left, right = _f64(a), _f64(b)
    return allowance(bounds.matmul(a, b), _sum_spread(left.shape[-1], (left * left) @ (right * right), left @ right))


def attention_scores(q: Array, k: Array, scale: float) -> Allowance:
    """A product of matrices times a scale that is rounded itself."""
    product = matmul(q, k.swapaxes(-1, -2))
    exact = np.abs(_f64(q) @ _f64(k).swapaxes(-1, -2))
    bound = bounds.attention_scores(q, k, scale) + U * exact * scale
    return allowance(bound, scale * np.hypot(product.spread, EVEN * 2 * U * exact), common=U)


def rms_norm(x: Array, weight: Array, eps: float) -> Allowance:
    """The mean of squares has terms of one sign: its error is ``u sqrt(n) / 3`` of itself, the root's half of that."""
    bound = bounds.rms_norm(x, weight, eps)
    n = x.shape[-1]
    root = _f64(x) / np.sqrt(np.mean(_f64(x) ** 2, axis=-1, keepdims=True) + eps)
    relative = math.sqrt(n / 36 + (LIBRARY / U) ** 2 / 3 + 2 / 3)
    spread = U * np.abs(root) * np.hypot(relative * np.abs(1 + _f64(weight)), EVEN)
    return allowance(bound, spread, common=bounds.gamma(n + 2) / 2 + LIBRARY)


def soft_cap(x: Array, cap: float | None) -> Allowance:
    """Three roundings, of which the reciprocal of the cap and the library's tanh may err the same everywhere."""
    return allowance(bounds.soft_cap(x, cap), common=2 * U + LIBRARY)


def soft_cap_stores(x: Array, cap: float | None, storage: str) -> list[Array]:
    """What the quotient and the tanh, stored in half precision, leave in the result."""
    if cap is None:
        return []
    t = _f64(x) / cap
    bent = np.tanh(t)
    # At the quotient rounded away from 0 the slope is smaller, towards 0 larger: the largest within half an ulp counts.
    inner = np.maximum(np.abs(t) - ulp(t, storage) / 2, 0)
    return [cap / np.cosh(inner) ** 2 * ulp(t, storage) / 2, cap * ulp(np.abs(bent) + ulp(t, storage), storage) / 2]


def softmax(scores: Array, mask: Array) -> Allowance:
    """The sum of a row and the library's exp may err the same everywhere."""
    return allowance(bounds.softmax(scores, mask), common=bounds.gamma(scores.shape[-1] + 1) + LIBRARY)


def gelu_tanh(x: Array) -> Allowance:
    """An absolute error, see `refgemma.oracle.bounds.gelu_tanh`."""
    return allowance(bounds.gelu_tanh(x), common=4 * U)


def rotary_tables(positions: Array, head_dim: int, theta: float) -> Allowance:
    """The angle is a float32 in every arithmetic, and its error grows with the position.

    Of a frequency ``theta ** -e`` the power is off by `LIBRARY` on the port's side and ``u`` on ours, the reciprocal
    and the product with the position by ``u`` on either: 9 u. The exponent ``e = 2 i / head_dim`` is rounded on either
    side, which costs ``2 u e ln(theta)``. A port may also multiply ``theta ** (-2 / head_dim)`` by itself ``i`` times,
    as llama.cpp does: ``2 i u``. A cosine is off by no more than its angle, and by `LIBRARY`.
    """
    number = np.tile(np.arange(head_dim // 2), 2)
    exponent = 2 * number / head_dim
    angles = np.abs(_f64(positions)) * theta**-exponent
    relative = U * (9 + 2 * exponent * math.log(theta) + 2 * number)
    return allowance(LIBRARY + relative * angles, common=LIBRARY)


def rotate(x: Array, cos: Array, sin: Array) -> Allowance:
    """Two products and a sum."""
    return allowance(bounds.rotate(x, cos, sin))


def rotate_stores(x: Array, cos: Array, sin: Array, storage: str) -> list[Array]:
    """Both products, stored in half precision."""
    first, second = np.split(np.abs(_f64(x)), 2, axis=-1)
    swapped = np.concatenate([second, first], axis=-1)
    return [ulp(_f64(x) * _f64(cos), storage) / 2, ulp(swapped * _f64(sin), storage) / 2]


def one_rounding(exact: Array, common: float = 0.0) -> Allowance:
    """A sum or product of two numbers."""
    return allowance(U * np.abs(exact), common=common)


Allows = Callable[..., Allowance]
