"""Test one layer: the effect of a caller's own numbers on the attention weights, and the memory of a block."""

import numpy as np
import pytest

from refgemma.cache import LayerCache
from refgemma.layers import attention, block
from refgemma.ops import gelu_tanh
from refgemma.precision import BF16, as_dtype, bf16, plain
from refgemma.weights.parameters import LayerWeights


def one_head(dtype: str) -> LayerWeights:
    """Return projections of one number to one head of two; each value is the token's own number."""
    norm, both, first = as_dtype([0.0], dtype), as_dtype([[1.0], [0.0]], dtype), as_dtype([[1.0, 0.0]], dtype)
    return LayerWeights(norm, both, both, both, first, norm, norm, both, both, first, norm)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("bias_dtype", ["float64", "float32", "bfloat16"])
def test_a_bias_is_added_to_the_capped_scores_and_takes_no_mask_away(dtype: str, bias_dtype: str) -> None:
    """Computed by hand, from scores 1 * (1, 0, 5, 9) and exp(0), exp(log 3), exp(-inf); the last key is masked.

    The weights 1/4 and 3/4 are bfloat16 numbers; rounding log 3 to bfloat16 changes them by less than one ulp.
    """
    weights, x = one_head(dtype), as_dtype([[[1.0]]], dtype)
    past = LayerCache(
        as_dtype([[[[1.0, 0], [0, 0], [5, 0]]]], dtype), as_dtype([[[[1.0, 0], [2, 0], [4, 0]]]], dtype), 0
    )
    turn = as_dtype(np.ones((1, 1, 1, 2)), dtype), as_dtype(np.zeros((1, 1, 1, 2)), dtype)
    bias = as_dtype([[[[-1.0, np.log(3.0), -np.inf, 7.0]]]], bias_dtype)
    mask = np.array([[[[True, True, True, False]]]])
    with np.errstate(invalid="ignore"):
        run = attention(x, weights, past=past, cos=turn[0], sin=turn[1], mask=mask, scale=1.0, cap=None, bias=bias)
    exact = {"float64": 2.0**-51, "float32": 2.0**-22, "bfloat16": 2.0**-8}
    atol = max(exact[dtype], exact[bias_dtype])
    np.testing.assert_allclose(plain(run.probs), [[[[0.25, 0.75, 0.0, 0.0]]]], rtol=0, atol=atol)
    np.testing.assert_allclose(plain(run.out), [[[0.25 + 1.5]]], rtol=0, atol=8 * atol)
    assert plain(run.capped).tolist() == [[[[1.0, 0.0, 5.0, 1.0]]]]  # as they were
    assert type(run.probs) is type(x)


def test_a_bias_of_half_precision_is_added_as_pytorch_adds_it() -> None:
    """One kernel rounds once: 16 + 2**-4 is a tie between two bfloat16 numbers and becomes 16, but not in float32."""
    weights, x = one_head("bfloat16"), bf16([[[4.0]]])
    past = LayerCache(bf16([[[[4.0, 0.0]]]]), bf16([[[[1.0, 0.0]]]]), 0)
    cos, sin = bf16(np.ones((1, 1, 1, 2))), bf16(np.zeros((1, 1, 1, 2)))
    mask, numbers = np.ones((1, 1, 1, 2), bool), np.array([[[[2.0**-4, 0.0]]]])
    probs = {}
    for dtype in ("bfloat16", "float32"):
        bias = as_dtype(numbers, dtype)
        run = attention(x, weights, past=past, cos=cos, sin=sin, mask=mask, scale=1.0, cap=None, bias=bias)
        assert type(run.probs) is BF16
        probs[dtype] = plain(run.probs).ravel().tolist()
    assert probs["bfloat16"] == [0.5, 0.5]
    assert probs["float32"] == [0.515625, 0.484375]  # 1 / (1 + exp(-1/16)), rounded to bfloat16


def test_a_block_adds_its_bias() -> None:
    """A bias of minus infinity hides a key like the mask."""
    weights, x = one_head("float64"), as_dtype([[[1.0], [2.0]]], "float64")
    past = LayerCache(np.zeros((1, 1, 0, 2)), np.zeros((1, 1, 0, 2)), 0)
    turn = np.ones((1, 1, 2, 2)), np.zeros((1, 1, 2, 2))
    hidden = np.array([[[[True, False], [False, True]]]])
    settings = {
        "past": past,
        "cos": turn[0],
        "sin": turn[1],
        "scale": 1.0,
        "cap": None,
        "activation": gelu_tanh,
        "eps": 1e-6,
    }
    masked = block(x, weights, mask=hidden, **settings)
    biased = block(x, weights, mask=np.ones_like(hidden), bias=np.where(hidden, 0.0, -np.inf), **settings)
    assert masked.attention.probs.tolist() == biased.attention.probs.tolist() == [[[[1.0, 0.0], [0.0, 1.0]]]]
    assert masked.out.tolist() == biased.out.tolist()
