"""Test the rounding bounds: they hold for every order of summation, and are not too wide."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refgemma import ops
from refgemma.goldens.distance import logits_distance, rounding_noise, run_distance
from refgemma.oracle import tolerance as tol
from refgemma.oracle.judge import judge, strict_distance
from refgemma.oracle.spans import add_typical_spread
from refgemma.oracle.tolerance import tolerance, ulp

SEEDS = st.integers(0, 2**32 - 1)
# The largest error that random inputs show must be at least this part of the bound, or the bound says nothing.
NOT_VACUOUS = 1e-3


def normal(seed: int, *shape: int, spread: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def fraction(computed: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> float:
    """Return the largest error in units of the bound."""
    error = np.abs(computed.astype(np.float64) - exact)
    return float(np.max(error / (bound + tol.UNDERFLOW)))


def sum_in_order(terms: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Add float32 terms along the last axis one after another, which gives the largest errors of all orders."""
    total = np.zeros(terms.shape[:-1], np.float32)
    for index in order:
        total = total + terms[..., index]
    return total


@given(SEEDS, st.sampled_from([1, 7, 64, 300]), st.sampled_from([1e-3, 1.0, 30.0]))
def test_linear_in_any_order(seed: int, n: int, spread: float) -> None:
    x, weight = normal(seed, 3, n, spread=spread), normal(seed + 1, 5, n)
    bound, exact = tol.linear(x, weight).bound, x.astype(np.float64) @ weight.T.astype(np.float64)
    assert fraction(ops.linear(x, weight), exact, bound) <= 1
    shuffled = np.random.default_rng(seed).permutation(n)
    assert fraction(sum_in_order(x[:, None, :] * weight, shuffled), exact, bound) <= 1


@given(SEEDS, st.sampled_from([2, 24, 300]), st.sampled_from([1e-4, 1.0, 200.0]))
def test_rms_norm(seed: int, n: int, spread: float) -> None:
    x, weight = normal(seed, 4, n, spread=spread), normal(seed + 1, n, spread=0.5)
    exact = ops.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    assert fraction(ops.rms_norm(x, weight, 1e-6), exact, tol.rms_norm(x, weight, 1e-6).bound) <= 1


@given(SEEDS, st.sampled_from([0.1, 5.0, 100.0]), st.sampled_from([2.0, 50.0]))
def test_soft_cap(seed: int, spread: float, cap: float) -> None:
    x = normal(seed, 100, spread=spread)
    assert fraction(ops.soft_cap(x, cap), ops.soft_cap(x.astype(np.float64), cap), tol.soft_cap(x, cap).bound) <= 1


@given(SEEDS, st.sampled_from([0.1, 3.0, 30.0]))
def test_softmax(seed: int, spread: float) -> None:
    scores = normal(seed, 1, 2, 5, 9, spread=spread)
    mask = np.random.default_rng(seed).random((1, 1, 5, 9)) < 0.7
    mask[..., 0] = True
    exact = ops.softmax(scores.astype(np.float64), mask)
    assert fraction(ops.softmax(scores, mask), exact, tol.softmax(scores, mask).bound) <= 1


@given(SEEDS, st.sampled_from([0.1, 2.0, 8.0]))
def test_gelu(seed: int, spread: float) -> None:
    x = normal(seed, 200, spread=spread)
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * (x * x * x))
    in_float32 = np.float32(0.5) * x * (1 + np.tanh(inner))  # as others compute it: with a float32 tanh
    exact = ops.gelu_tanh(x.astype(np.float64))
    assert fraction(ops.gelu_tanh(x), exact, tol.gelu_tanh(x).bound) <= 1
    assert fraction(in_float32, exact, tol.gelu_tanh(x).bound) <= 1


@given(SEEDS)
def test_rotation(seed: int) -> None:
    x, angles = normal(seed, 1, 2, 7, 10), normal(seed + 1, 1, 1, 7, 10, spread=100)
    cos, sin = np.cos(angles), np.sin(angles)
    exact = ops.rotate(*(a.astype(np.float64) for a in (x, cos, sin)))
    assert fraction(ops.rotate(x, cos, sin), exact, tol.rotate(x, cos, sin).bound) <= 1


def test_bounds_are_not_vacuous() -> None:
    x, weight = normal(0, 400, 64), normal(1, 64, 64)
    mask = np.ones((1, 1, 20, 30), bool)
    scores = normal(2, 1, 3, 20, 30, spread=5)
    seen = {
        "linear": fraction(ops.linear(x, weight), x.astype(np.float64) @ weight.T, tol.linear(x, weight).bound),
        "rms_norm": fraction(
            ops.rms_norm(x, weight[0], 1e-6),
            ops.rms_norm(x.astype(np.float64), weight[0].astype(np.float64), 1e-6),
            tol.rms_norm(x, weight[0], 1e-6).bound,
        ),
        "soft_cap": fraction(ops.soft_cap(x, 2.0), ops.soft_cap(x.astype(np.float64), 2.0), tol.soft_cap(x, 2.0).bound),
        "softmax": fraction(
            ops.softmax(scores, mask), ops.softmax(scores.astype(np.float64), mask), tol.softmax(scores, mask).bound
        ),
        "gelu": fraction(ops.gelu_tanh(x), ops.gelu_tanh(x.astype(np.float64)), tol.gelu_tanh(x).bound),
    }
    assert not {name: part for name, part in seen.items() if part < NOT_VACUOUS}


def test_ulp_is_the_distance_to_the_next_number() -> None:
    every = np.arange(0x0080, 0x7F80, dtype=np.uint16)  # the positive normal bf16 numbers
    numbers = (every.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(ulp(numbers, "bfloat16")[:-1], [b - a for a, b in pairwise(numbers)])


def test_an_ulp_too_many_and_a_neighbour_too_often_are_told_from_rounding() -> None:
    recorded, bound = np.linspace(1, 1.9, 1000), tolerance(np.full(1000, 1e-6))
    step = ulp(recorded, "bfloat16")
    one_neighbour, two_apart = recorded.copy(), recorded.copy()
    one_neighbour[3] += step[3]
    two_apart[3] += 2 * step[3]
    assert strict_distance(recorded, recorded, bound, "bfloat16") == 0
    assert strict_distance(one_neighbour, recorded, bound, "bfloat16") <= 1
    assert strict_distance(two_apart, recorded, bound, "bfloat16") > 1
    # Rounding boundaries within 1e-6 explain one or two elements of a thousand, not a hundred.
    assert strict_distance(np.where(np.arange(1000) % 10, recorded, recorded + step), recorded, bound, "bfloat16") > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_never_conform(bad: float) -> None:
    recorded = np.ones(4)
    computed = np.array([1, 1, bad, 1])
    assert strict_distance(computed, recorded, tolerance(np.ones(4)), "float32") > 1
    assert run_distance(computed, recorded, noise=1e-6) > 1
    assert run_distance(computed, recorded, noise=rounding_noise(computed, recorded, computed)) > 1
    assert run_distance(computed, recorded, rounding_noise(computed, recorded, recorded, "bfloat16"), "bfloat16") > 1
    assert run_distance(computed, recorded, 1e-6, "bfloat16") > 1
    assert logits_distance(computed, recorded) > 1


def test_a_number_beyond_all_others_is_a_verdict_and_not_a_warning() -> None:
    exact = np.ones(2)  # under pytest a warning of NumPy's is an error
    assert judge(np.array([1e200, 1.0]), exact, tol.one_rounding(exact), "float64", np.ones(2, bool)).verdict == "FAIL"
    assert not np.isfinite(add_typical_spread(np.array([np.inf, np.nan]))).any()
    assert add_typical_spread(np.array([1e200, 1e200]))[0] == np.inf
