"""Test the operations of the model beyond PyTorch's recordings."""

import numpy as np
import pytest

from refgemma.goldens.load import load_golden
from refgemma.ops import causal_mask, gelu_tanh, inverse_frequencies, rotary_tables, sliding_mask
from refgemma.precision import as_dtype, bf16, narrow, plain


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 20), ("f16", 48), ("f32", 240)])
def test_gelu_is_rounded_where_pytorch_rounds(dtype: str, most: int) -> None:
    """Test all bfloat16 numbers and 4801 others: how many does PyTorch round to another number?

    Measured: 4, 19 and 28. Without rounding tanh before adding 1, these become 92, 175 and 1482; with tanh in float32,
    20, 167 and 491.
    """
    about, golden = load_golden(f"op-gelu-{dtype}")
    x, y = (as_dtype(golden[name], about["dtype"]) for name in "xy")
    with np.errstate(all="ignore"):
        assert (plain(gelu_tanh(x)) != plain(y)).sum() < most


def test_masks_are_these_pictures() -> None:
    picture = """
        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . 1 1 1 . .
        . . 1 1 1 .
        . . . 1 1 1
    """
    expected = np.array([[cell == "1" for cell in row.split()] for row in picture.strip().splitlines()])
    np.testing.assert_array_equal(sliding_mask(np.arange(6), np.arange(6), window=3), expected)
    # The same rows in decoding, when the keys before place 2 are gone already.
    np.testing.assert_array_equal(sliding_mask(np.array([4, 5]), np.arange(2, 6), window=3), expected[4:, 2:])
    np.testing.assert_array_equal(causal_mask(np.arange(6), np.arange(6)), np.tri(6, dtype=bool))


@pytest.mark.parametrize("head_dim", [2, 6, 128, 256])
def test_frequencies_are_float32_in_every_precision(head_dim: int) -> None:
    """There are three roundings to float32: of the exponent (below 1), the power, and its inverse."""
    found = inverse_frequencies(head_dim, 10000.0)
    assert found.dtype == np.float32
    exact = 10000.0 ** (-2 * np.arange(head_dim // 2) / head_dim)
    np.testing.assert_allclose(found, exact, rtol=np.log(10000.0) * 2.0**-25 + 2.0**-23, atol=0)
    positions = np.array([[0, 1, 8191]])
    for like in (np.zeros(0), np.zeros(0, np.float32), bf16([0])):
        cos, sin = rotary_tables(positions, head_dim, 10000.0, like=like)
        angles = (positions[0, :, None].astype(np.float32) * found).astype(np.float64)
        np.testing.assert_array_equal(cos[0, 0, :, : head_dim // 2], narrow(np.cos(angles), like))
        np.testing.assert_array_equal(sin[0, 0, :, head_dim // 2 :], narrow(np.sin(angles), like))
