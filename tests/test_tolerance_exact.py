"""Test the bounds against fifty digits, and against float32 in all orders and ways that a conforming port may use. No
error exceeds its bound, and each bound is at most 1000 times the largest observed error. The float64 references are
correct to nine digits of the bound.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refgemma import ops
from refgemma.oracle import tolerance as tol

Array = np.ndarray
F32 = np.float32
mpmath.mp.dps = 50
NOT_VACUOUS = 1e-3


# --- sums of products in float32 --------------------------------------------------------------------------------------


def forwards(a: Array, b: Array) -> Array:
    total = F32(0)
    for x, y in zip(a, b, strict=True):
        total = F32(total + x * y)
    return total


def backwards(a: Array, b: Array) -> Array:
    return forwards(a[::-1], b[::-1])


def shuffled(a: Array, b: Array) -> Array:
    order = np.random.default_rng(len(a)).permutation(len(a))
    return forwards(a[order], b[order])


def fused(a: Array, b: Array) -> Array:
    """Multiply and add with one rounding; in float64 the product is exact, and the sum is rounded 2**29 times finer."""
    total = F32(0)
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        total = F32(x * y + np.float64(total))
    return total


def in_pairs(a: Array, b: Array) -> Array:
    terms = a * b
    while len(terms) > 1:
        terms = np.append(terms, np.zeros(len(terms) % 2, F32))
        terms = terms[::2] + terms[1::2]
    return terms[0]


def in_blocks(a: Array, b: Array) -> Array:
    parts = np.array([forwards(a[n : n + 8], b[n : n + 8]) for n in range(0, len(a), 8)], F32)
    return forwards(parts, np.ones_like(parts))


def in_lanes(a: Array, b: Array) -> Array:
    """Compute sixteen partial sums in parallel, as vector units do."""
    lanes = np.zeros(16, F32)
    for n in range(0, len(a), 16):
        part = a[n : n + 16] * b[n : n + 16]
        lanes[: len(part)] += part
    return in_pairs(lanes, np.ones_like(lanes))


Sum = Callable[[Array, Array], Array]
SUMS: tuple[Sum, ...] = (forwards, backwards, shuffled, fused, in_pairs, in_blocks, in_lanes)


# --- operations: in float32 in several manners, in float64, in fifty digits -------------------------------------------


@dataclass(frozen=True)
class Case:
    """An operation on an input."""

    float32: list[Array]
    float64: Array  # the oracle's reference
    exact: list[mpmath.mpf]
    bound: Array


def mp(x: Array) -> list[mpmath.mpf]:
    return [mpmath.mpf(float(n)) for n in np.ravel(x)]


def normal(rng: np.random.Generator, n: int, spread: float) -> Array:
    return (rng.standard_normal(n) * spread).astype(F32)


def linear(rng: np.random.Generator, n: int, spread: float) -> Case:
    x, w = normal(rng, n, spread), normal(rng, n, 1.0)
    if n > 2 and rng.random() < 0.5:  # the terms cancel, but for one
        x[n // 2 : 2 * (n // 2)], w[n // 2 : 2 * (n // 2)] = x[: n // 2], -w[: n // 2]
    return Case(
        [np.array([dot(x, w)]) for dot in SUMS], ops.linear(x.astype(np.float64)[None], w.astype(np.float64)[None])[0],
        [mpmath.fdot(mp(x), mp(w))], tol.linear(x[None], w[None]).bound[0],
    )  # fmt: skip


def attention_scores(rng: np.random.Generator, n: int, spread: float) -> Case:
    q, k, scale = normal(rng, n, spread), normal(rng, n, 1.0), 13**-0.5
    shaped = q.reshape(1, 1, 1, n), k.reshape(1, 1, 1, n)
    reference = ops.attention_scores(*(x.astype(np.float64) for x in shaped), scale)
    # The tolerance has the rounding of the scale to float32 too, which ports that store it so have.
    return Case(
        [np.array([F32(dot(q, k) * F32(scale))]) for dot in SUMS], reference.ravel(),
        [mpmath.fdot(mp(q), mp(k)) * mpmath.mpf(scale)], tol.attention_scores(*shaped, scale).bound.ravel(),
    )  # fmt: skip


def rms_norm(rng: np.random.Generator, n: int, spread: float) -> Case:
    x, w, eps = normal(rng, n, spread), normal(rng, n, 0.7), 1e-6
    results = []
    for dot in SUMS:
        root = F32(1) / np.sqrt(F32(dot(x, x) / F32(n)) + F32(eps))
        results += [x * root * (1 + w), x * (root * (1 + w))]
    mean = mpmath.fdot(mp(x), mp(x)) / n
    exact = [a / mpmath.sqrt(mean + mpmath.mpf(eps)) * (1 + b) for a, b in zip(mp(x), mp(w), strict=True)]
    reference = ops.rms_norm(x.astype(np.float64), w.astype(np.float64), eps)
    return Case(results, reference, exact, tol.rms_norm(x, w, eps).bound)


def softmax(rng: np.random.Generator, n: int, spread: float) -> Case:
    x, mask = normal(rng, n, spread), np.ones((1, 1, 1, n), bool)
    parts = np.exp(x - x.max())
    results = []
    for dot in SUMS:
        total = dot(parts, np.ones_like(parts))
        results += [parts / total, parts * (F32(1) / total)]
    powers = [mpmath.exp(a) for a in mp(x)]
    shaped = x.reshape(1, 1, 1, n)
    reference = ops.softmax(shaped.astype(np.float64), mask).ravel()
    return Case(results, reference, [p / mpmath.fsum(powers) for p in powers], tol.softmax(shaped, mask).bound.ravel())


def soft_cap(rng: np.random.Generator, n: int, spread: float) -> Case:
    x, cap = normal(rng, n, spread), 3.0
    results = [np.tanh(x / F32(cap)) * F32(cap), np.tanh(x * (F32(1) / F32(cap))) * F32(cap)]
    exact = [cap * mpmath.tanh(a / mpmath.mpf(cap)) for a in mp(x)]
    return Case(results, ops.soft_cap(x.astype(np.float64), cap), exact, tol.soft_cap(x, cap).bound)


def gelu(rng: np.random.Generator, n: int, spread: float) -> Case:
    x = normal(rng, n, min(spread, 4.0))  # the cube of more is beyond float32
    root = mpmath.sqrt(2 / mpmath.pi)
    inner = F32(np.sqrt(2 / np.pi)) * (x + F32(0.044715) * x * x * x)
    other = F32(np.sqrt(2 / np.pi)) * x * (1 + F32(0.044715) * (x * x))
    results = [F32(0.5) * x * (1 + np.tanh(t)) for t in (inner, other)]
    exact = [a / 2 * (1 + mpmath.tanh(root * (a + mpmath.mpf("0.044715") * a**3))) for a in mp(x)]
    return Case(results, ops.gelu_tanh(x.astype(np.float64)), exact, tol.gelu_tanh(x).bound)


def rotate(rng: np.random.Generator, n: int, spread: float) -> Case:
    n += n % 2
    x, angles = normal(rng, n, spread), normal(rng, n // 2, 100.0)
    cos, sin = (np.tile(f(angles), 2) for f in (np.cos, np.sin))
    first, second = np.split(x, 2)
    swapped = np.concatenate([-second, first])
    pairs = (np.stack(both, axis=1) for both in ((swapped, x), (sin, cos)))
    mixed = np.array([fused(a, b) for a, b in zip(*pairs, strict=True)])
    exact = [a * c + s * t for a, s, c, t in zip(mp(x), mp(swapped), mp(cos), mp(sin), strict=True)]
    shaped = [y.reshape(1, 1, 1, n) for y in (x, cos, sin)]
    reference = ops.rotate(*(y.astype(np.float64) for y in shaped)).ravel()
    return Case([x * cos + swapped * sin, mixed], reference, exact, tol.rotate(*shaped).bound.ravel())


OPERATIONS = (linear, attention_scores, rms_norm, softmax, soft_cap, gelu, rotate)


def fractions(case: Case) -> Iterator[float]:
    """Yield the largest error of each way in units of the bound, compared with fifty digits."""
    limit = [mpmath.mpf(float(b)) + mpmath.mpf(tol.UNDERFLOW) for b in np.ravel(case.bound)]
    for result in case.float32:
        yield float(max(abs(a - e) / b for a, e, b in zip(mp(result), case.exact, limit, strict=True)))


@pytest.mark.parametrize("operation", OPERATIONS)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 40, 130]), st.sampled_from([1e-3, 1.0, 20.0]))
def test_no_manner_of_computing_exceeds_the_bound(
    operation: Callable[[np.random.Generator, int, float], Case], seed: int, n: int, spread: float
) -> None:
    case = operation(np.random.default_rng(seed), n, spread)
    limit = case.bound + tol.UNDERFLOW
    for result in case.float32:
        assert (np.abs(result.astype(np.float64) - case.float64) <= limit).all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_bounds_hold_against_fifty_digits_and_are_not_vacuous(
    operation: Callable[[np.random.Generator, int, float], Case],
) -> None:
    seen = []
    for n in (2, 30, 120):
        for spread in (0.1, 5.0):
            case = operation(np.random.default_rng(n), n, spread)
            seen += fractions(case)
            limit = [mpmath.mpf(float(b)) + mpmath.mpf(tol.UNDERFLOW) for b in np.ravel(case.bound)]
            # float64 rounds 2**29 times finer than float32, of which the bound counts the roundings.
            off = max(abs(a - e) / b for a, e, b in zip(mp(case.float64), case.exact, limit, strict=True))
            assert off <= 1e-8
    assert NOT_VACUOUS < max(seen) <= 1


@pytest.mark.parametrize("theta", [1e4, 0.5])
def test_rotary_tables_hold_against_fifty_digits(theta: float) -> None:
    # Frequencies and angles in float32, as every port takes them; cosine and sine in float32 or finer.
    positions, head_dim = np.array([[0, 1, 7, 40, 511, 8191]]), 10
    allowed = np.broadcast_to(tol.rotary_tables(positions[..., None], head_dim, theta).bound, (1, 6, head_dim))
    exponents = np.arange(0, head_dim, 2).astype(F32) / F32(head_dim)
    step = F32(theta ** (-2 / head_dim))
    powers = np.cumprod(np.array([1, *[step] * (head_dim // 2 - 1)], F32), dtype=F32)  # as llama.cpp does it
    seen = []
    for frequencies in (F32(1) / F32(theta) ** exponents, powers):
        angles = np.tile(positions[..., None].astype(F32) * frequencies, 2)
        for place in np.ndindex(angles.shape):
            pair = place[2] % (head_dim // 2)
            angle = mpmath.mpf(int(positions[0, place[1]])) * mpmath.mpf(theta) ** (-mpmath.mpf(2 * pair) / head_dim)
            error = abs(mpmath.mpf(float(np.cos(angles[place]))) - mpmath.cos(angle))
            seen.append(float(error / mpmath.mpf(float(allowed[place]))))
    assert NOT_VACUOUS < max(seen) <= 1
