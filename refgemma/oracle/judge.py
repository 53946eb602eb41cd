"""One tensor against its reference, in units of what rounding allows: statistics, and a verdict. Checked in the tests
on correct implementations of many kinds, none of which it accuses, and on small mistakes, which it finds.

========  ==============================================================================================================
verdict   when
========  ==============================================================================================================
EXACT     every element is the correctly rounded result, or what PyTorch's eager kernels make of the inputs
PASS      inside every limit
NOISY     inside the worst case, but `RMS_LIMIT` times as noisy as the declared arithmetic: some undeclared precision
SKEWED    inside the worst case, but all elements lean one way, as a wrong factor or offset makes them
FAIL      an element is outside the worst case
BLIND     the reference itself is infinite or not a number wherever it could be compared, or nothing is left to compare
MISSING   not recorded
INVALID   not a number or infinite where the reference is finite, or of another shape
========  ==============================================================================================================

Where a tensor between was not recorded, its result is computed, and the reference has a measured uncertainty instead
of a worst case: then the root mean square and the largest error are judged in standard deviations (`SPAN_LIMIT`).
"""

from dataclasses import dataclass

import numpy as np

from refgemma.oracle.tolerance import Allowance
from refgemma.precision import Array, as_dtype

EXACT, PASS, NOISY, SKEWED, FAIL = "EXACT", "PASS", "NOISY", "SKEWED", "FAIL"
BLIND, MISSING, INVALID = "BLIND", "MISSING", "INVALID"
GOOD = (EXACT, PASS)
BAD = (SKEWED, FAIL, INVALID)

# A conforming implementation has 1 by the meaning of sigma, and sqrt(3) if each of its errors were the largest
# possible.
RMS_LIMIT = 2.0
# Standard deviations of a sum over all elements: chance exceeds it in one of 4e11 tensors.
SIGMAS = 7.0
# Of a span the noise is measured by simulation; real errors of one run are not independent of each other. A single
# element may be off by `SPAN_LIMIT * SIGMAS`: of 14 honest configurations the farthest was at 5.8, in 24672 logits.
SPAN_LIMIT = 3.0
# Of the bins that errors are counted in, in standard deviations; the outermost two have all that is beyond them too.
EDGES = np.linspace(-6, 6, 49)


@dataclass(frozen=True)
class Statistics:
    """How far a tensor is from its reference."""

    elements: int = 0  # compared
    exact: float = 0.0  # share of elements that are the correctly rounded result
    worst: float = 0.0  # largest error in units of the worst case; of a span 0
    rms: float = 0.0  # root mean square error in standard deviations
    gain: float = 0.0  # a common factor, in standard deviations from 1, less what may be shared
    bias: float = 0.0  # a common offset, likewise
    factor: float = 1.0  # the common factor itself
    place: tuple[int, ...] = ()  # of the largest error
    histogram: tuple[int, ...] = ()  # elements by their error in standard deviations, see `EDGES`


@dataclass(frozen=True)
class Judged:
    """A verdict and what it rests on."""

    verdict: str
    statistics: Statistics
    note: str = ""


def counted(units: Array) -> tuple[int, ...]:
    """How many errors, in standard deviations, are in each of the bins between `EDGES`.

    Examples
    --------
    >>> counts = counted(np.array([0.1, 0.2, -99.0]))
    >>> counts[24], counts[0], sum(counts)
    (2, 1, 3)
    """
    return tuple(int(n) for n in np.histogram(np.clip(units, EDGES[0], EDGES[-1]), EDGES)[0])


def rounded(exact: Array, storage: str) -> Array:
    """The correctly rounded result, in float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(as_dtype(exact, storage), np.float64)


def judge(
    found: Array, exact: Array, allowed: Allowance, storage: str, where: Array, eager: Array | None = None,
    override: float = 1.0,
) -> Judged:  # fmt: skip
    """Judge one operation's result on recorded inputs.

    Parameters
    ----------
    found, exact : array
        The candidate's tensor and the reference, in float64.
    allowed : Allowance
        What rounding may do.
    storage : str
        What the tensor is kept in.
    where : bool array
        Which elements mean something, of a shape that broadcasts.
    eager : array, optional
        What PyTorch's eager kernels make of the same inputs: in half precision it rounds several times.
    override : float
        A user's factor on what is allowed; 1 unless the report says otherwise.

    Examples
    --------
    >>> from refgemma.oracle.tolerance import one_rounding, stored
    >>> exact = np.array([1.0, 1 / 3])
    >>> allowed = stored(one_rounding(exact), exact, "float32")
    >>> judge(np.float64(np.float32(exact)), exact, allowed, "float32", np.ones(2, bool)).verdict
    'EXACT'
    >>> judge(exact * 1.001, exact, allowed, "float32", np.ones(2, bool)).verdict
    'FAIL'
    """
    where = np.broadcast_to(where, found.shape)
    if not where.any():
        return Judged(BLIND, Statistics(), "nothing in it is compared")
    places = np.argwhere(where)
    c, r = found[where], exact[where]
    nearest = rounded(r, storage)
    if eager is not None and np.sum(eager[where] == c) > np.sum(nearest == c):
        nearest = eager[where]
    same = float(np.mean(c == nearest))
    wrong = ~np.isfinite(c) & np.isfinite(nearest)
    if wrong.any():
        place = tuple(int(n) for n in places[np.argmax(wrong)])
        note = f"{int(wrong.sum())} elements are {c[wrong][0]}"
        return Judged(INVALID, Statistics(len(c), same, place=place), note)
    usable = np.isfinite(c) & np.isfinite(r)
    if not usable.any():
        return Judged(BLIND, Statistics(), "the reference is not finite")
    c, r, nearest, places = c[usable], r[usable], nearest[usable], places[usable]
    sigma = np.broadcast_to(allowed.sigma, found.shape)[where][usable] * override
    errors = (c - r) / sigma
    if same == 1:
        return Judged(EXACT, Statistics(len(c), 1.0, histogram=counted(errors)))
    bound = np.broadcast_to(allowed.worst, found.shape)[where][usable] * override
    units = np.abs(c - r) / bound
    statistics = Statistics(
        len(c), same, float(units.max()), float(np.sqrt(np.mean(errors**2))),
        *_leaning(c - nearest, r, sigma, allowed.common * override), tuple(int(n) for n in places[np.argmax(units)]),
        counted(errors),
    )  # fmt: skip
    return Judged(_verdict(statistics), statistics)


def _leaning(error: Array, exact: Array, sigma: Array, common: float) -> tuple[float, float, float]:
    """The common factor and offset in standard deviations, and the factor; by weighted least squares."""
    weight = exact / sigma
    squares = float(np.sum(weight * weight))
    slope = float(np.sum(weight * (error / sigma))) / squares if squares else 0.0
    shared = common * np.sqrt(squares)
    gain = slope * np.sqrt(squares)
    offset = float(np.sum(error / sigma)) / np.sqrt(len(error))
    shared_offset = common * float(np.sum(np.abs(exact) / sigma)) / np.sqrt(len(error))
    beyond = [np.sign(z) * max(0.0, abs(z) - s) for z, s in ((gain, shared), (offset, shared_offset))]
    return float(beyond[0]), float(beyond[1]), 1 + slope


def _verdict(s: Statistics) -> str:
    if s.worst > 1:
        return FAIL
    if max(abs(s.gain), abs(s.bias)) > SIGMAS:
        return SKEWED
    return NOISY if s.rms > RMS_LIMIT else PASS


def judge_span(
    found: Array, exact: Array, sigma: Array, where: Array, storage: str, largest: bool = True
) -> Judged:  # fmt: skip
    """Judge a tensor whose inputs were not recorded: `sigma` is the measured uncertainty of the reference.

    Without `largest` by the root mean square alone: of a mistake the noise is not that of the right model, for which
    `sigma` was measured.
    """
    where = np.broadcast_to(where, found.shape)
    if not where.any():
        return Judged(BLIND, Statistics(), "nothing in it is compared")
    places = np.argwhere(where)
    c, r, s = found[where], exact[where], np.broadcast_to(sigma, found.shape)[where]
    wrong = ~np.isfinite(c) & np.isfinite(r)
    if wrong.any():
        place = tuple(int(n) for n in places[np.argmax(wrong)])
        return Judged(INVALID, Statistics(len(c), 0.0, place=place), f"{int(wrong.sum())} elements are {c[wrong][0]}")
    usable = np.isfinite(c) & np.isfinite(r)
    if not usable.any():
        return Judged(BLIND, Statistics(), "the reference is not finite")
    c, r, s, places = c[usable], r[usable], s[usable], places[usable]
    units = (c - r) / s
    rms = float(np.sqrt(np.mean(units**2)))
    place = tuple(int(n) for n in places[np.argmax(np.abs(units))])
    same = float(np.mean(c == rounded(r, storage)))
    statistics = Statistics(len(c), same, 0.0, rms, place=place, histogram=counted(units))
    beyond = rms > SPAN_LIMIT or bool(largest and np.abs(units).max() > SPAN_LIMIT * SIGMAS)
    return Judged(FAIL if beyond else PASS, statistics)


def mostly(found: Array, exact: Array, usual: Array, sigma: Array, where: Array) -> bool:
    """Whether a span ends in what a certain way of rounding gives: 9 of 10 elements are within five deviations.

    The others may lie so near to a boundary of that rounding that the arithmetic before it decides. That moves a result
    as far as such roundings move results: no further than twice the largest difference from the `usual` ones.
    """
    where = np.broadcast_to(where, found.shape)
    if not where.any():
        return True
    c, r = found[where], exact[where]
    limit = 5 * np.broadcast_to(sigma, found.shape)[where]
    with np.errstate(invalid="ignore"):
        error, moved = np.abs(c - r), np.abs(r - usual[where])
        return bool(np.mean(error <= limit) >= 0.9 and (error <= limit + 2 * moved.max()).all())


def matches(found: Array, reference: Array, usual: Array, allowed: Allowance, storage: str, where: Array) -> bool:
    """Whether a tensor is what a certain way of rounding gives: 97 of 100 elements agree without its rounding.

    The others may lie so near to a boundary of rounding that the arithmetic before it decides; see `mostly`.
    """
    where = np.broadcast_to(where, found.shape)
    if not where.any():
        return True
    c, r = found[where], rounded(reference[where], storage)
    with np.errstate(invalid="ignore"):
        error, moved = np.abs(c - r), np.abs(reference[where] - usual[where])
        near = (error <= np.broadcast_to(4 * allowed.bound, found.shape)[where] + 2.0**-126) | (c == r)
        limit = np.broadcast_to(4 * allowed.worst, found.shape)[where] + 2 * moved.max()
        return bool(np.mean(near) >= 0.97 and (near | (error <= limit)).all())
