"""Compare with transformers: the cache's contents after a call, and after reordering rows."""

from typing import Any

import numpy as np
import pytest
import torch
from support import here, in_transformers, quiet, random_tensors
from transformers import DynamicCache

SHAPE: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "query_pre_attn_scalar": 3, "sliding_window": 4,
}  # fmt: skip
NAME = "Gemma2Model"
# Keys of about 1. Two evaluations, each a sum of 12 products and 3 roundings of the rotation: 30 roundings.
SAME = 30 * 2**-24


@pytest.mark.parametrize("length", [2, 3, 4, 9])
def test_the_cache_holds_what_transformers_cache_holds(length: int) -> None:
    tensors = random_tensors(NAME, SHAPE, seed=0)
    model, ours = in_transformers(NAME, SHAPE, tensors, "float32"), here(NAME, SHAPE, tensors, "float32")
    ids = np.random.default_rng(0).integers(0, 31, (3, length))
    theirs = DynamicCache(config=model.config)
    with quiet():
        model(torch.tensor(ids), past_key_values=theirs)
    cache = ours(ids).past_key_values
    rows = [2, 0, 0]
    theirs.reorder_cache(torch.tensor(rows))
    for layer, expected in zip(cache.reorder(rows), theirs.layers, strict=True):
        assert layer.stop == expected.get_seq_length() == cache.get_seq_length()
        for found, wanted in ((layer.keys, expected.keys), (layer.values, expected.values)):
            assert found.shape == tuple(wanted.shape)
            np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=SAME)
    theirs.batch_repeat_interleave(2)
    for layer, expected in zip(cache.reorder(rows).repeat_interleave(2), theirs.layers, strict=True):
        np.testing.assert_allclose(layer.keys, expected.keys.numpy(), rtol=0, atol=SAME)
