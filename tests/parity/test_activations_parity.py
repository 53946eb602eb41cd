"""Compare with transformers: the activations that a configuration may name."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from refgemma.activations import ACTIVATIONS
from refgemma.oracle.tolerance import ulp
from refgemma.precision import bf16

NUMBERS = np.concatenate([
    (np.random.default_rng(0).standard_normal(4000) * 4), [0.0, -0.0, 1e-30, -1e-30, 40.0, -40.0, 6.0, 1e4, -1e4],
]).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_float32(name: str) -> None:
    with torch.no_grad():
        expected = ACT2FN[name](torch.tensor(NUMBERS)).numpy()
    found = ACTIVATIONS[name](NUMBERS)
    assert found.dtype == np.float32
    assert (np.abs(found - expected) <= allowed(name, expected)).all()


def allowed(name: str, expected: Any) -> Any:
    """Return eight float32 roundings of the result; for a GELU, ``x (1 + t) / 2``, of `x`, because ``1 + t`` loses
    digits."""
    return 8 * 2**-24 * (np.abs(NUMBERS) if name.startswith("gelu") else np.abs(expected)) + 1e-38


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_bfloat16(name: str) -> None:
    """Equal numbers, or neighbours if the float32 result is next to a rounding boundary."""
    x = bf16(NUMBERS)
    with torch.no_grad():
        expected = ACT2FN[name](torch.tensor(np.asarray(x)).bfloat16()).float().numpy()
    apart = np.abs(np.asarray(ACTIVATIONS[name](x)) - expected)
    # gelu_new rounds every step to bfloat16: 1 + tanh, a half or less, may fall to either side by an ulp of 1.
    steps = 2**-8 * np.abs(NUMBERS) if name == "gelu_new" else 0.0
    assert (apart <= ulp(expected, "bfloat16") + allowed(name, expected) + steps).all()
    assert np.mean(apart > allowed(name, expected)) < 0.01
