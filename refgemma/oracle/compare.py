"""How far two tensors are apart, in units of what rounding allows. A distance of at most 1 conforms.

Three measures, each with its reason:

* an operation on given inputs: every element within twice the operation's float32 bound. In half precision the
  results are rounded once more, so that two of them may be neighbours, an ulp apart, but only where a rounding
  boundary lies within the bound: no more elements than that may differ at all;
* a run, or a layer, in float32: within `NOISE_FACTOR` times the error that rounding makes in it, which the same
  computation in float64 shows: ours or PyTorch's, whichever is smaller. So a mistake does not widen its own tolerance,
  neither one that loses digits (then PyTorch's error is the smaller) nor any other (then ours is). The logits must also
  be within `END_TO_END` of the largest logit;
* a run, or a layer, in half precision: the root mean square difference of two correct runs is that of two independent
  roundings, sqrt(2) times the rounding error of one: for a run, PyTorch's distance from its float32 recording.
"""

import math

import ml_dtypes
import numpy as np

from refgemma.oracle.bounds import UNDERFLOW
from refgemma.precision import Array

END_TO_END = 5e-6
# Two correct runs err independently and by similar amounts, so they differ by about sqrt(2) of one's error. But the
# largest of few errors is itself uncertain, and libraries sum in other orders: PyTorch may err a few times as much.
NOISE_FACTOR = 8
# What is left where our own rounding happens to be exact: two roundings on either side.
FLOOR = 4 * 2.0**-24

# Relative distance of neighbouring numbers at a power of two, and the smallest normal number.
_FORMATS = {
    "bfloat16": (2.0**-7, float(ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_normal)),
    "float16": (2.0**-10, float(np.finfo(np.float16).smallest_normal)),
}


def ulp(x: Array, dtype: str) -> Array:
    """The distance from each element to its neighbour in `dtype`; 0 for float32, whose rounding the bounds contain.

    Examples
    --------
    >>> ulp(np.array([1.0, 1.5, 20.0]), "bfloat16").tolist()
    [0.0078125, 0.0078125, 0.125]
    """
    if dtype not in _FORMATS:
        return np.zeros(x.shape)
    step, smallest = _FORMATS[dtype]
    magnitude = np.maximum(np.abs(x.astype(np.float64)), smallest)
    return step * 2.0 ** np.floor(np.log2(magnitude))


def _apart(computed: Array, reference: Array) -> Array:
    """The absolute difference in float64; NaN where either is NaN or both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.abs(computed.astype(np.float64) - reference.astype(np.float64))


def ratio(difference: Array, allowed: Array) -> float:
    """The largest difference in units of what is allowed; infinite where either is NaN, or where nothing is allowed."""
    if np.isnan(difference).any() or np.isnan(allowed).any():
        return math.inf
    units = np.divide(difference, allowed, out=np.where(difference > 0, math.inf, 0.0), where=allowed > 0)
    return float(units.max(initial=0))


def operation_distance(computed: Array, recorded: Array, bound: Array, dtype: str) -> float:
    """Of one operation's result from the recorded one, computed from the same inputs; `bound` is for one result."""
    reference = recorded.astype(np.float64)
    step = ulp(reference, dtype)
    difference = np.where(computed == recorded, 0.0, _apart(computed, recorded))  # the same infinity conforms
    apart = ratio(difference, 2 * (bound + UNDERFLOW) + step)
    return apart if dtype == "float32" else max(apart, _too_many(difference, bound, step))


def ulps_apart(computed: Array, recorded: Array, dtype: str) -> float:
    """The largest difference in ulps of `dtype`, among elements above 1e-3; 0 in float32, where it is not asked for."""
    reference = recorded.astype(np.float64)
    counted = (np.abs(reference) > 1e-3) & np.isfinite(reference)
    if dtype not in _FORMATS or not counted.any():
        return 0.0
    return float(np.max((_apart(computed, recorded) / ulp(reference, dtype))[counted]))


def _too_many(difference: Array, bound: Array, step: Array) -> float:
    """The number of differing elements in units of the number that rounding boundaries allow.

    A boundary, of which there is one an ulp, lies within ``2 * bound`` on either side of a result with probability
    ``4 * bound / ulp``; to the expected number come three standard deviations and one.
    """
    expected = float(np.minimum(1, 4 * bound / step).sum())
    return float(np.sum(difference > 0)) / (1 + expected + 3 * math.sqrt(expected))


def rounding_noise(computed: Array, recorded: Array, exact: Array) -> float:
    """The largest error that rounding made in a float32 tensor, ours or the recorded one, given our own in float64."""
    # Python's min would pass a NaN by; numpy's gives it back, and nothing conforms to it.
    return float(np.minimum(_apart(computed, exact).max(initial=0), _apart(recorded, exact).max(initial=0)))


def run_distance(computed: Array, recorded: Array, noise: float) -> float:
    """Of a float32 run's tensor from the recorded one, given the `rounding_noise` of this tensor."""
    allowed = NOISE_FACTOR * noise + FLOOR * np.abs(recorded).max(initial=0)
    return ratio(_apart(computed, recorded), np.full(recorded.shape, allowed))


def half_rounding_noise(recorded: Array, recorded_float32: Array) -> float:
    """The mean square distance of a half-precision recording from PyTorch's float32 recording of the same."""
    return float(np.mean(_apart(recorded, recorded_float32) ** 2))


def half_layer_noise(computed: Array, recorded: Array, exact: Array) -> float:
    """The mean square rounding error of a half-precision tensor, ours or the recorded one, given ours in float64."""
    errors = (np.mean(_apart(x, exact) ** 2) for x in (computed, recorded))
    return float(np.minimum(*errors))


def half_run_distance(computed: Array, recorded: Array, noise: float) -> float:
    """Of a half-precision run's tensor from the recorded one, given the `half_rounding_noise` of this tensor."""
    root_mean_square = np.sqrt(np.mean(_apart(computed, recorded) ** 2))
    return ratio(np.array([root_mean_square]), np.array([math.sqrt(2 * noise)]))


def logits_distance(computed: Array, recorded: Array) -> float:
    """Of float32 logits from the recorded ones, in units of `END_TO_END` times the largest."""
    allowed = np.full(recorded.shape, END_TO_END * np.abs(recorded).max(initial=0))
    return ratio(_apart(computed, recorded), allowed)
