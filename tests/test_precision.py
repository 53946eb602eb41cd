"""Half precision: rounding against ml_dtypes and against the bits themselves; nothing widens or narrows unasked."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refgemma.precision import BF16, F16, as_dtype, bf16, dtype_name, f16, narrow, plain, wide

FLOATS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=8), elements=st.floats(width=32))


def round_bits(x: np.ndarray) -> np.ndarray:
    """Rounding to bfloat16 as it is taught: add half of what is cut off, a bit less for even numbers, and cut."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


@given(FLOATS)
def test_bf16_rounds_to_nearest_even(x: np.ndarray) -> None:
    np.testing.assert_array_equal(plain(bf16(x)), round_bits(x))


@given(FLOATS)
def test_f16_rounds_as_numpy_does(x: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(plain(f16(x)), x.astype(np.float16).astype(np.float32))


def test_rounding_of_special_numbers() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    expected = [np.inf, -np.inf, np.nan, np.inf, float(ml_dtypes.bfloat16(1e-40)), 1.0, 1 + 2**-6]
    np.testing.assert_array_equal(plain(bf16(x)), np.array(expected, np.float32))


X = bf16(np.linspace(-3, 3, 24).reshape(2, 3, 4))
OPERATIONS = {
    "multiply by a number": lambda x: x * 0.1,
    "divide": lambda x: x / 3.0,
    "tanh": np.tanh,
    "add": lambda x: x + x,
    "matmul": lambda x: x @ x.swapaxes(-1, -2),
    "sum": lambda x: x.sum(-1),
    "max": lambda x: x.max(-1),
    "slice": lambda x: x[..., 1:],
    "take rows": lambda x: x[[1, 0]],
    "reshape": lambda x: x.reshape(6, 4),
    "repeat": lambda x: np.repeat(x, 2, axis=1),
    "concatenate": lambda x: np.concatenate([-x, x], axis=-1),
    "stack": lambda x: np.stack([x, x]),
    "where": lambda x: np.where(x > 0, x, 0.0),
    "split": lambda x: np.split(x, 2, axis=-1)[1],
    "einsum": lambda x: np.einsum("ijk,ilk->ijl", x, x),
    "zeros_like": np.zeros_like,
    "mean": lambda x: x.mean(-1),
    "std": lambda x: x.std(),
    "round": lambda x: x.round(2),
    "dot": lambda x: x.dot(x[0, 0]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", [BF16, F16])
def test_every_result_is_rounded_once(name: str, kind: type) -> None:
    x = as_dtype(X, "bfloat16" if kind is BF16 else "float16")
    result, in_float32 = OPERATIONS[name](x), OPERATIONS[name](plain(x))
    assert type(result) is kind
    np.testing.assert_array_equal(plain(result), plain(as_dtype(in_float32, dtype_name(x))))


def test_a_wider_array_widens_but_a_number_does_not() -> None:
    assert type(X + np.ones(4, np.float32)) is np.ndarray
    assert type(X + f16(np.ones(4))) is np.ndarray
    assert type(np.concatenate([X, np.ones((2, 3, 4), np.float32)])) is np.ndarray
    assert type(X + 1.0) is BF16
    assert type(X > 0) is not BF16


def test_scalars_are_not_rounded_before_use() -> None:
    """144 ** -0.5 rounded to bf16 first would give other products for a third of all numbers."""
    scale = 144**-0.5
    np.testing.assert_array_equal(plain(X * scale), round_bits(plain(X) * np.float32(scale)))
    assert not np.array_equal(plain(X * scale), plain(X * float(bf16(scale))))


def test_what_is_put_into_an_array_is_rounded() -> None:
    x = bf16([1.0, 2.0, 3.0])
    x[0] = 0.1
    x[1:] = np.array([1.001, 0.3], np.float32)
    np.testing.assert_array_equal(plain(x), round_bits(np.array([0.1, 1.001, 0.3])))
    y = x
    x += 1.001
    assert y is x
    np.testing.assert_array_equal(plain(x), round_bits(round_bits(np.array([0.1, 1.001, 0.3])) + np.float32(1.001)))


def test_astype_leaves_the_grid() -> None:
    assert type(X.astype(np.float64)) is np.ndarray


def test_wide_and_narrow() -> None:
    assert wide(X).dtype == np.float32
    assert type(wide(X)) is np.ndarray
    doubled = np.ones(3)
    assert wide(doubled) is doubled  # float64 is not brought down, unlike in PyTorch
    assert narrow(np.float64(1.001), like=X) == 1.0
    assert narrow([0.1], like=np.zeros(1, np.float32)).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_names(dtype: str) -> None:
    assert dtype_name(as_dtype([0.5], dtype)) == dtype


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        as_dtype([1], "int8")
