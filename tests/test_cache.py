"""The cache's own methods, and decoding before, at and after the boundary of the window. With transformers' it is
compared in `parity/test_forward_parity.py` and `parity/test_modeling_parity.py`."""

from typing import Any

import numpy as np
import pytest

from refgemma.cache import Cache
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.inputs import InputError
from refgemma.modeling.classes import Gemma2ForCausalLM

WINDOW = 5
SHAPE: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 7, "sliding_window": WINDOW,
    "initializer_range": 0.5, "max_position_embeddings": 64,
}  # fmt: skip
MODEL = Gemma2ForCausalLM.from_config(Gemma2Config(**SHAPE), seed=1, dtype="float64")
IDS = np.random.default_rng(0).integers(3, 31, (3, 14))
# In float64, sums of a few hundred products of numbers of about 1: some hundred roundings of 2**-53.
SAME = 1e-12


def run(ids: Any, cache: Any = None, **arguments: Any) -> Any:
    return MODEL(ids, past_key_values=cache, **arguments)


def assert_same(one: Cache, other: Cache) -> None:
    assert [layer.start for layer in one] == [layer.start for layer in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.keys, b.keys, rtol=0, atol=SAME)
        np.testing.assert_allclose(a.values, b.values, rtol=0, atol=SAME)


@pytest.mark.parametrize("prompt", [1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 13])
def test_decoding_at_before_and_after_the_boundary_of_the_window(prompt: int) -> None:
    """A prompt that ends there, then token by token: what a single call gives."""
    whole = run(IDS).logits
    step = run(IDS[:, :prompt])
    np.testing.assert_allclose(step.logits, whole[:, :prompt], rtol=0, atol=SAME * np.abs(whole).max())
    for place in range(prompt, IDS.shape[1]):
        step = run(IDS[:, place : place + 1], step.past_key_values)
        assert step.past_key_values.get_seq_length() == place + 1
        np.testing.assert_allclose(step.logits[:, 0], whole[:, place], rtol=0, atol=SAME * np.abs(whole).max())


@pytest.mark.parametrize("prompt", [3, WINDOW, WINDOW + 3])
def test_decoding_with_padding_at_the_left(prompt: int) -> None:
    """Rows of three lengths: each decodes as it does alone, with its positions."""
    padding = np.array([0, 1, 2])
    mask = (np.arange(14) >= padding[:, None]).astype(int)
    positions = np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 0)
    step = run(IDS[:, :prompt], attention_mask=mask[:, :prompt], position_ids=positions[:, :prompt])
    for place in range(prompt, 14):
        step = run(
            IDS[:, place : place + 1], step.past_key_values, attention_mask=mask[:, : place + 1],
            position_ids=positions[:, place : place + 1],
        )  # fmt: skip
        for row, skipped in enumerate(padding):
            alone = run(IDS[row : row + 1, skipped : place + 1], logits_to_keep=1).logits
            np.testing.assert_allclose(step.logits[row], alone[0], rtol=0, atol=SAME * np.abs(alone).max())


def test_reorder_and_repeat_interleave_are_those_of_rows() -> None:
    cache = run(IDS[:, :7]).past_key_values
    assert_same(cache.reorder([2, 0, 0]), run(IDS[[2, 0, 0], :7]).past_key_values)
    assert_same(cache.repeat_interleave(2), run(IDS[:, :7].repeat(2, axis=0)).past_key_values)
    following = run(IDS[[1, 1], 7:9], cache.reorder([1, 1])).logits
    np.testing.assert_allclose(following, run(IDS[[1, 1], :9]).logits[:, 7:], rtol=0, atol=SAME * 100)


def test_crop_goes_back_to_an_earlier_place() -> None:
    cache = run(IDS[:, : WINDOW - 1]).past_key_values
    assert_same(cache.crop(2), run(IDS[:, :2]).past_key_values)
    assert_same(cache.crop(-1), run(IDS[:, : WINDOW - 2]).past_key_values)
    assert cache.crop(99).get_seq_length() == WINDOW - 1
    assert cache.crop(-99).get_seq_length() == 0


def test_crop_refuses_what_a_sliding_layer_has_dropped() -> None:
    with pytest.raises(InputError, match=r"cannot be cut back to 6 tokens: sliding layer 0 has dropped its first 4"):
        run(IDS[:, :8]).past_key_values.crop(6)


@pytest.mark.parametrize("prompt", [2, WINDOW + 3])
def test_the_legacy_format_goes_in_and_comes_out(prompt: int) -> None:
    cache = run(IDS[:, :prompt]).past_key_values
    legacy = cache.to_legacy()
    assert [type(pair) for pair in legacy] == [tuple, tuple]
    assert legacy[0][0].shape == (3, 2, min(prompt, WINDOW - 1), 6)
    assert_same(Cache.from_legacy(legacy, MODEL.config, MODEL.weights.norm), cache)
    answer = run(IDS[:, prompt:], legacy)
    assert isinstance(answer.past_key_values, tuple)
    assert not isinstance(answer.past_key_values, Cache)
    np.testing.assert_array_equal(answer.logits, run(IDS[:, prompt:], cache).logits)


def test_a_plain_tuple_of_sliding_layers_needs_to_be_told_its_length() -> None:
    sliding = Gemma2ForCausalLM.from_config(Gemma2Config(**SHAPE, layer_types=[SLIDING, SLIDING]), dtype="float64")
    cache = sliding(IDS[:, :8]).past_key_values
    with pytest.raises(InputError, match="does not say how many tokens it has seen"):
        sliding(IDS[:, 8:9], past_key_values=cache.to_legacy())
    told = sliding(IDS[:, 8:9], past_key_values=cache.to_legacy(), cache_position=[8]).logits
    np.testing.assert_array_equal(told, sliding(IDS[:, 8:9], past_key_values=cache).logits)


@pytest.mark.parametrize(
    ("past", "reason"),
    [
        ([], "past_key_values has 0 layers, the model 2"),
        ([(np.zeros((3, 2, 4, 6)),)] * 2, r"past_key_values\[0\] has 1 parts"),
        ([(np.zeros((3, 2, 4, 6)), np.zeros((3, 2, 5, 6)))] * 2, r"keys have shape \(3, 2, 4, 6\), values"),
        ([(np.zeros((3, 2, n, 6)), np.zeros((3, 2, n, 6))) for n in (4, 3)], "layer 1 keeps 3 tokens, but after 4"),
        ([(np.zeros((2, 2, 4, 6)), np.zeros((2, 2, 4, 6)))] * 2, "not of this model, batch size"),
    ],
)
def test_tuples_that_are_no_cache(past: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        run(IDS[:, :1], past)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda cache: cache.reorder([3]), r"rows is \[3\]: a list of row numbers from 0 to 2"),
        (lambda cache: cache.reorder([[0]]), "a list of row numbers"),
        (lambda cache: cache.repeat_interleave(0), "repeats is 0"),
    ],
)
def test_methods_refuse_what_means_nothing(call: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        call(run(IDS[:, :2]).past_key_values)


def test_layer_types_decide_what_is_kept() -> None:
    model = Gemma2ForCausalLM.from_config(Gemma2Config(**SHAPE, layer_types=[FULL, SLIDING]), dtype="float64")
    cache = model(IDS).past_key_values
    assert [layer.keys.shape[2] for layer in cache] == [14, WINDOW - 1]
    assert repr(cache) == "Cache(2 layers, 14 tokens seen)"
