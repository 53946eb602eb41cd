"""Compare one tensor with its reference, in units of its tolerance: statistics and a verdict.

Checked in the tests: correct implementations of many kinds pass, and small mistakes are found. The functions answer
three questions; docs/reference/verdicts.md lists them with all other notions of "close enough":

* `judge`: can a conforming implementation compute this result from these inputs?
* `strict_distance`: are two results of one operation on the same inputs as close as rounding allows?
* `resembles`: is this the result of a certain way of rounding?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.files import pluralise
from refgemma.oracle.tolerance import FORMATS, UNDERFLOW, Tolerance, ulp
from refgemma.oracle.verdicts import BLIND, EXACT, FAIL, INVALID, NOISY, PASS, SKEWED
from refgemma.precision import Array, as_dtype

# The root mean square of a conforming implementation is 1, by the definition of a standard deviation. It is sqrt(3) if
# each error is the largest possible.
RMS_LIMIT = 2.0
# Limit in standard deviations of a sum over all elements; chance exceeds this in one of 4e11 tensors.
DEVIATIONS = 7.0
# If a tensor's inputs were not recorded, its noise is measured by simulation, but the errors of a real run are not
# independent. So a single element may be off by `SPAN_LIMIT * DEVIATIONS`; in 14 correct configurations the largest
# error of 24672 logits was 5.8.
SPAN_LIMIT = 3.0
# The edges of the bins of errors, in standard deviations; the first and last bins include all errors beyond.
EDGES = np.linspace(-6, 6, 49)


@dataclass(frozen=True)
class Statistics:
    """The distance of a tensor from its reference."""

    elements: int = 0  # number of compared elements
    exact: float = 0.0  # share of correctly rounded elements
    error_over_bound: float = 0.0  # largest error over bound; 0 if the tolerance was measured, infinite if it is 0
    rms: float = 0.0  # root mean square error in standard deviations
    gain: float = 0.0  # distance of a common factor from 1 in standard deviations, minus the allowed common error
    bias: float = 0.0  # common offset, measured in the same way
    factor: float = 1.0  # common factor
    place: tuple[int, ...] = ()  # index of the largest error
    histogram: tuple[int, ...] = ()  # numbers of elements with errors between two `EDGES`

    @property
    def distance(self) -> float:
        """The largest of all errors, each in units of its limit; a tensor passes up to 1.

        Examples
        --------
        >>> Statistics(error_over_bound=0.5, rms=1.0, gain=-14.0).distance
        2.0
        """
        leaning = max(abs(self.gain), abs(self.bias)) / DEVIATIONS
        return max(self.error_over_bound, self.rms / RMS_LIMIT, leaning)


@dataclass(frozen=True)
class Judged:
    """A verdict with its statistics."""

    verdict: str
    statistics: Statistics
    note: str = ""


def count_errors(units: Array) -> tuple[int, ...]:
    """Return the number of errors, in standard deviations, in each bin between `EDGES`.

    Examples
    --------
    >>> counts = count_errors(np.array([0.1, 0.2, -99.0]))
    >>> counts[24], counts[0], sum(counts)
    (2, 1, 3)
    """
    bins = len(EDGES) - 1
    scaled = (units - EDGES[0]) * (bins / (EDGES[-1] - EDGES[0]))  # on this scale the edges are whole numbers
    numbers = np.clip(np.nan_to_num(scaled), 0, bins - 1).astype(np.int64)
    return tuple(int(n) for n in np.bincount(numbers, minlength=bins))


def round_to(exact: Array, storage: str) -> Array:
    """Round to a precision, and return the result in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(as_dtype(exact, storage), np.float64)


@np.errstate(all="ignore")  # an overflow gives a verdict, not a NumPy warning
def judge(
    found: Array, exact: Array, allowed: Tolerance, storage: str, where: Array, eager: Array | None = None,
    override: float = 1.0,
) -> Judged:  # fmt: skip
    """Compare a tensor with its reference, and return the verdict.

    Parameters
    ----------
    found, exact : array
        The candidate's tensor and the reference, in float64.
    allowed : Tolerance
        The tolerance. If it was measured, the standard deviation decides; see `SPAN_LIMIT`.
    storage : str
        The storage format of the tensor.
    where : bool array
        True for the elements to compare; its shape must broadcast.
    eager : array, optional
        The result of PyTorch's eager kernels on the same inputs, if they round several times.
    override : float
        A user's factor on the tolerance; every report shows it if it is not 1.

    Examples
    --------
    >>> from refgemma.oracle.tolerance import one_rounding, with_storage
    >>> exact = np.array([1.0, 1 / 3])
    >>> allowed = with_storage(one_rounding(exact), exact, "float32")
    >>> judge(np.float64(np.float32(exact)), exact, allowed, "float32", np.ones(2, bool)).verdict
    'EXACT'
    >>> judge(exact * 1.001, exact, allowed, "float32", np.ones(2, bool)).verdict
    'FAIL'
    """
    where = np.broadcast_to(where, found.shape)
    if not where.any():
        return Judged(BLIND, Statistics(), "there is no element to compare")
    places, c, r = np.argwhere(where), found[where], exact[where]
    nearest = round_to(r, storage)
    if eager is not None and np.sum(eager[where] == c) > np.sum(nearest == c):
        nearest = eager[where]
    same = float(np.mean(c == nearest))
    wrong = ~np.isfinite(c) & np.isfinite(r if allowed.measured else nearest)
    if wrong.any():
        place = tuple(int(n) for n in places[np.argmax(wrong)])
        return Judged(INVALID, Statistics(len(c), same, place=place), _describe_odd(int(wrong.sum()), c[wrong][0]))
    std, bound = (np.broadcast_to(x, found.shape)[where] * override for x in (allowed.std, allowed.error_bound))
    if not np.isfinite(r).all():
        return Judged(BLIND, Statistics(), "the reference is not finite")
    usable = np.isfinite(c)  # an infinite element is correct here, because float16 overflows
    # If the bound exceeds twice the largest element, nothing can be judged; for example, cosines of angles beyond
    # float32's whole numbers. A tensor of zeros has only the smallest possible bound.
    limit = math.inf if allowed.measured or not r.any() else 2 * np.abs(r).max()
    if not usable.any() or not np.isfinite(std[usable]).all() or not (bound[usable] <= limit).all():
        return Judged(BLIND, Statistics(), "the tolerance exceeds the tensor's own size")
    c, r, nearest, places, std, bound = (x[usable] for x in (c, r, nearest, places, std, bound))
    errors = (c - r) / std
    if allowed.measured:
        return _judge_measured(errors, c - r, bound, same, places)
    if same == 1:
        return Judged(EXACT, Statistics(len(c), 1.0, histogram=count_errors(errors)))
    units = np.abs(c - r) / bound
    place = tuple(int(n) for n in places[np.argmax(units)])
    exactly = (np.broadcast_to(allowed.bound + allowed.stored, found.shape)[where][usable] == 0) & (units > 1)
    largest = math.inf if exactly.any() else float(units.max())
    statistics = Statistics(
        len(c), same, largest, float(np.sqrt(np.mean(errors[~exactly] ** 2))) if not exactly.all() else math.inf,
        *_measure_leaning(c - nearest, r, std, allowed.common * override), place, count_errors(errors),
    )  # fmt: skip
    return Judged(_choose_verdict(statistics), statistics, _describe_exact(c[exactly], r[exactly]))


def _describe_odd(count: int, number: float) -> str:
    return f"{pluralise(count, 'element')} {'is' if count == 1 else 'are'} {number}"


def _judge_measured(errors: Array, apart: Array, bound: Array, same: float, places: Array) -> Judged:
    rms, farthest = float(np.sqrt(np.mean(errors**2))), np.abs(errors)
    place = tuple(int(n) for n in places[np.argmax(farthest)])
    statistics = Statistics(len(errors), same, 0.0, rms, place=place, histogram=count_errors(errors))
    beyond = rms > SPAN_LIMIT or bool((np.abs(apart) > bound).any())
    return Judged(FAIL if beyond else PASS, statistics)


def _describe_exact(found: Array, exact: Array) -> str:
    """Return a description of errors in elements whose tolerance is 0, or an empty string."""
    if not len(found):
        return ""
    farthest = np.argmax(np.abs(found - exact))
    count = pluralise(len(found), "element")
    return f"{count} must be exactly {exact[farthest]:g}, independent of rounding; one is {found[farthest]:.3g}"


def _measure_leaning(error: Array, exact: Array, std: Array, common: float) -> tuple[float, float, float]:
    """Return the common factor and offset in standard deviations, and the factor, by weighted least squares."""
    weight = exact / std
    squares = float(np.sum(weight * weight))
    slope = float(np.sum(weight * (error / std))) / squares if squares else 0.0
    shared = common * np.sqrt(squares)
    gain = slope * np.sqrt(squares)
    offset = float(np.sum(error / std)) / np.sqrt(len(error))
    shared_offset = common * float(np.sum(np.abs(exact) / std)) / np.sqrt(len(error))
    beyond = [np.sign(z) * max(0.0, abs(z) - s) for z, s in ((gain, shared), (offset, shared_offset))]
    return float(beyond[0]), float(beyond[1]), 1 + slope


def _choose_verdict(s: Statistics) -> str:
    if s.error_over_bound > 1:
        return FAIL
    if max(abs(s.gain), abs(s.bias)) > DEVIATIONS:
        return SKEWED
    return NOISY if s.rms > RMS_LIMIT else PASS


# --- strict -----------------------------------------------------------------------------------------------------------


def distance_from(computed: Array, reference: Array) -> Array:
    """Return the absolute difference in float64; NaN if either is NaN or both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.abs(np.asarray(computed, np.float64) - np.asarray(reference, np.float64))


def ratio(difference: Array, allowed: Array) -> float:
    """Return the largest difference in units of the tolerance; infinite if either is NaN, or if the tolerance is 0 and
    the difference is not.

    Examples
    --------
    >>> ratio(np.array([1.0, 3.0]), np.array([2.0, 2.0])), ratio(np.array([1.0]), np.array([0.0]))
    (1.5, inf)
    """
    if np.isnan(difference).any() or np.isnan(allowed).any():
        return math.inf
    units = np.divide(difference, allowed, out=np.where(difference > 0, math.inf, 0.0), where=allowed > 0)
    return float(units.max(initial=0))


def strict_distance(computed: Array, recorded: Array, allowed: Tolerance, dtype: str) -> float:
    """Return the distance of two results of one operation on the same inputs; it is at most 1 if both round correctly.

    Every element may be off by twice the operation's float32 bound. In half precision the results are rounded once
    more. So two of them may be one ulp apart, but only if a boundary of rounding lies within the bound. There is one
    boundary per ulp, so it lies within ``2 * bound`` on either side of a result with probability ``4 * bound / ulp``.
    This limits the number of elements that may differ: the expected number, plus three standard deviations, plus one.

    Examples
    --------
    >>> from refgemma.oracle.tolerance import one_rounding
    >>> x = np.linspace(1, 1.9, 1000)
    >>> strict_distance(x, x, one_rounding(x), "bfloat16")
    0.0
    >>> strict_distance(np.where(np.arange(1000) % 10, x, x + 2.0**-7), x, one_rounding(x), "bfloat16") > 1
    True
    """
    bound = np.broadcast_to(allowed.bound, recorded.shape)
    step = ulp(np.asarray(recorded, np.float64), dtype)
    difference = np.where(computed == recorded, 0.0, distance_from(computed, recorded))  # equal infinities conform
    apart = ratio(difference, 2 * (bound + UNDERFLOW) + step)
    if dtype not in FORMATS:
        return apart
    expected = float(np.minimum(1, 4 * bound / step).sum())
    return max(apart, float(np.sum(difference > 0)) / (1 + expected + 3 * math.sqrt(expected)))


# --- a way of rounding ------------------------------------------------------------------------------------------------


def resembles(
    found: Array, reference: Array, usual: Array, allowed: Tolerance, storage: str, where: Array
) -> bool:  # fmt: skip
    """Return True if a tensor is the result of a certain way of rounding; `reference` is that result.

    Nearly all elements must agree: 97 of 100 within four float32 bounds or, if the tolerance was measured, 9 of 10
    within five standard deviations. The others may be so close to a boundary of rounding that earlier arithmetic
    decides. This changes a result by at most twice the largest difference from the `usual` results.
    """
    where = np.broadcast_to(where, found.shape)
    if not where.any():
        return True
    c, r = found[where], reference[where]
    inner, outer = (np.broadcast_to(x, found.shape)[where] for x in _limits(allowed))
    with np.errstate(invalid="ignore"):
        moved = np.abs(r - usual[where]).max()
        r = r if allowed.measured else round_to(r, storage)
        near = (np.abs(c - r) <= inner) | (c == r)
        share = 0.9 if allowed.measured else 0.97
        return bool(np.mean(near) >= share and (near | (np.abs(c - r) <= outer + 2 * moved)).all())


def nearest(found: Array, ways: Sequence[Array]) -> Array:
    """For each element, return the nearest of several results.

    Examples
    --------
    >>> nearest(np.array([1.0, 2.0]), [np.array([1.1, 1.0]), np.array([3.0, 2.1])]).tolist()
    [1.1, 2.1]
    """
    stacked = np.stack(ways)
    best = np.abs(stacked - found).argmin(axis=0)
    return np.asarray(np.take_along_axis(stacked, best[None], axis=0)[0])


def _limits(allowed: Tolerance) -> tuple[Array, Array]:
    """Return the limit for most elements, and the limit for the other elements before their change is added."""
    if allowed.measured:
        return 5 * allowed.spread, 5 * allowed.spread
    return 4 * allowed.bound + UNDERFLOW, 4 * allowed.error_bound
