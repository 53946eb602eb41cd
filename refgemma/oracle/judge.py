"""One tensor against its reference, in units of what rounding allows: statistics, and a verdict.

Checked in the tests on correct implementations of many kinds, none of which it accuses, and on small mistakes, which it
finds. There are three questions, and docs/reference/verdicts.md has them with all other notions of "close enough":

* `judge`: is this what a conforming implementation can make of these inputs?
* `strict_distance`: are these two results of one operation on the same inputs as near as two roundings can be?
* `resembles`: is this what a certain way of rounding makes of them?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refgemma.oracle.tolerance import FORMATS, UNDERFLOW, Tolerance, ulp
from refgemma.oracle.verdicts import BLIND, EXACT, FAIL, INVALID, NOISY, PASS, SKEWED
from refgemma.precision import Array, as_dtype

# A conforming implementation has 1 by the meaning of a standard deviation, and sqrt(3) if each of its errors were the
# largest possible.
RMS_LIMIT = 2.0
# Standard deviations of a sum over all elements: chance exceeds it in one of 4e11 tensors.
DEVIATIONS = 7.0
# The noise of a tensor whose inputs were not recorded is measured by simulation; real errors of one run are not
# independent of each other. A single element may be off by `SPAN_LIMIT * DEVIATIONS`: of 14 honest configurations the
# farthest was at 5.8, in 24672 logits.
SPAN_LIMIT = 3.0
# The edges of the bins that errors are counted in, in standard deviations; the outermost two have all beyond them too.
EDGES = np.linspace(-6, 6, 49)


@dataclass(frozen=True)
class Statistics:
    """How far a tensor is from its reference."""

    elements: int = 0  # compared
    exact: float = 0.0  # share of elements that are the correctly rounded result
    error_over_bound: float = 0.0  # the largest; 0 where the tolerance was measured, infinite where nothing is allowed
    rms: float = 0.0  # root mean square error in standard deviations
    gain: float = 0.0  # a common factor, in standard deviations from 1, less what may be shared
    bias: float = 0.0  # a common offset, likewise
    factor: float = 1.0  # the common factor itself
    place: tuple[int, ...] = ()  # of the largest error
    histogram: tuple[int, ...] = ()  # elements by their error in standard deviations, see `EDGES`

    @property
    def distance(self) -> float:
        """The largest of all errors in units of its limit: at most 1 for what passes.

        Examples
        --------
        >>> Statistics(error_over_bound=0.5, rms=1.0, gain=-14.0).distance
        2.0
        """
        leaning = max(abs(self.gain), abs(self.bias)) / DEVIATIONS
        return max(self.error_over_bound, self.rms / RMS_LIMIT, leaning)


@dataclass(frozen=True)
class Judged:
    """A verdict and what it rests on."""

    verdict: str
    statistics: Statistics
    note: str = ""


def count_errors(units: Array) -> tuple[int, ...]:
    """Count the errors, in standard deviations, in each of the bins between `EDGES`.

    Examples
    --------
    >>> counts = count_errors(np.array([0.1, 0.2, -99.0]))
    >>> counts[24], counts[0], sum(counts)
    (2, 1, 3)
    """
    bins = len(EDGES) - 1
    scaled = (units - EDGES[0]) * (bins / (EDGES[-1] - EDGES[0]))  # the edges lie at whole numbers of this
    numbers = np.clip(np.nan_to_num(scaled), 0, bins - 1).astype(np.int64)
    return tuple(int(n) for n in np.bincount(numbers, minlength=bins))


def round_to(exact: Array, storage: str) -> Array:
    """Round to a precision, and return the result in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(as_dtype(exact, storage), np.float64)


@np.errstate(all="ignore")  # a number beyond all others is a verdict, not a warning of NumPy's
def judge(
    found: Array, exact: Array, allowed: Tolerance, storage: str, where: Array, eager: Array | None = None,
    override: float = 1.0,
) -> Judged:  # fmt: skip
    """Judge a tensor by what rounding may do to it.

    Parameters
    ----------
    found, exact : array
        The candidate's tensor and the reference, in float64.
    allowed : Tolerance
        What rounding may do. A measured one is judged by its standard deviation: see `SPAN_LIMIT`.
    storage : str
        What the tensor is kept in.
    where : bool array
        Which elements mean something, of a shape that broadcasts.
    eager : array, optional
        What PyTorch's eager kernels make of the same inputs: in half precision they round several times.
    override : float
        A user's factor on what is allowed; 1 unless the report says otherwise.

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
        return Judged(BLIND, Statistics(), "nothing in it is compared")
    places, c, r = np.argwhere(where), found[where], exact[where]
    nearest = round_to(r, storage)
    if eager is not None and np.sum(eager[where] == c) > np.sum(nearest == c):
        nearest = eager[where]
    same = float(np.mean(c == nearest))
    wrong = ~np.isfinite(c) & np.isfinite(r if allowed.measured else nearest)
    if wrong.any():
        place = tuple(int(n) for n in places[np.argmax(wrong)])
        return Judged(INVALID, Statistics(len(c), same, place=place), f"{int(wrong.sum())} elements are {c[wrong][0]}")
    std, bound = (np.broadcast_to(x, found.shape)[where] * override for x in (allowed.std, allowed.error_bound))
    if not np.isfinite(r).all():
        return Judged(BLIND, Statistics(), "the reference is not finite")
    usable = np.isfinite(c)  # an infinite element is the correctly rounded result here, as float16 overflows
    # Rounding that may do more than the largest element and its opposite leaves nothing to judge: such are the cosines
    # of angles beyond float32's whole numbers. A tensor of zeros has only the smallest of bounds.
    limit = math.inf if allowed.measured or not r.any() else 2 * np.abs(r).max()
    if not usable.any() or not np.isfinite(std[usable]).all() or not (bound[usable] <= limit).all():
        return Judged(BLIND, Statistics(), "rounding may do more than the tensor's own size")
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


def _judge_measured(errors: Array, apart: Array, bound: Array, same: float, places: Array) -> Judged:
    rms, farthest = float(np.sqrt(np.mean(errors**2))), np.abs(errors)
    place = tuple(int(n) for n in places[np.argmax(farthest)])
    statistics = Statistics(len(errors), same, 0.0, rms, place=place, histogram=count_errors(errors))
    beyond = rms > SPAN_LIMIT or bool((np.abs(apart) > bound).any())
    return Judged(FAIL if beyond else PASS, statistics)


def _describe_exact(found: Array, exact: Array) -> str:
    """Say what is wrong where rounding may do nothing at all, so that an error has no bound to be measured by."""
    if not len(found):
        return ""
    farthest = np.argmax(np.abs(found - exact))
    count = "1 element" if len(found) == 1 else f"{len(found)} elements"
    return f"{count} must be exactly {exact[farthest]:g}, whatever is rounded; one is {found[farthest]:.3g}"


def _measure_leaning(error: Array, exact: Array, std: Array, common: float) -> tuple[float, float, float]:
    """The common factor and offset in standard deviations, and the factor; by weighted least squares."""
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
    """The absolute difference in float64; NaN where either is NaN, or both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.abs(np.asarray(computed, np.float64) - np.asarray(reference, np.float64))


def ratio(difference: Array, allowed: Array) -> float:
    """The largest difference in units of what is allowed; infinite where either is NaN, or where nothing is allowed.

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
    """Return the distance of two results of one operation on the same inputs; at most 1 if both are rounded rightly.

    Every element may be off by twice the operation's float32 bound. In half precision the results are rounded once
    more, so that two of them may be neighbours, an ulp apart, but only where a boundary of rounding lies within the
    bound: no more elements than that may differ at all. A boundary, of which there is one an ulp, lies within ``2 *
    bound`` on either side of a result with probability ``4 * bound / ulp``; to the expected number come three standard
    deviations and one.

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
    difference = np.where(computed == recorded, 0.0, distance_from(computed, recorded))  # the same infinity conforms
    apart = ratio(difference, 2 * (bound + UNDERFLOW) + step)
    if dtype not in FORMATS:
        return apart
    expected = float(np.minimum(1, 4 * bound / step).sum())
    return max(apart, float(np.sum(difference > 0)) / (1 + expected + 3 * math.sqrt(expected)))


# --- a way of rounding ------------------------------------------------------------------------------------------------


def resembles(
    found: Array, reference: Array, usual: Array, allowed: Tolerance, storage: str, where: Array
) -> bool:  # fmt: skip
    """Return whether a tensor is what a certain way of rounding, `reference`, gives.

    Nearly all elements agree without the rounding of that way itself: 97 of 100 within four bounds of float32
    arithmetic, or where the tolerance was measured 9 of 10 within five standard deviations. The others may lie so near
    to a boundary of rounding that the arithmetic before it decides. That moves a result as far as such roundings move
    results: no farther than twice the largest difference from the `usual` ones.
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
    """Return the nearest of several results at each element.

    Examples
    --------
    >>> nearest(np.array([1.0, 2.0]), [np.array([1.1, 1.0]), np.array([3.0, 2.1])]).tolist()
    [1.1, 2.1]
    """
    stacked = np.stack(ways)
    best = np.abs(stacked - found).argmin(axis=0)
    return np.asarray(np.take_along_axis(stacked, best[None], axis=0)[0])


def _limits(allowed: Tolerance) -> tuple[Array, Array]:
    """How far most elements may be off, and how far the others may before they are moved."""
    if allowed.measured:
        return 5 * allowed.spread, 5 * allowed.spread
    return 4 * allowed.bound + UNDERFLOW, 4 * allowed.error_bound
