"""Test the cache's methods, and decoding before, at and after the window's boundary. `parity/test_forward_parity.py`
and `parity/test_modeling_parity.py` compare with transformers."""

from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
from small_model import SMALL, refused

from refgemma.cache import Cache, LayerCache
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.inputs import InputError
from refgemma.model import forward
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.precision import BF16, bf16, plain

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
    """A prompt that ends there, continued token by token, gives the result of a single call."""
    whole = run(IDS).logits
    step = run(IDS[:, :prompt])
    np.testing.assert_allclose(step.logits, whole[:, :prompt], rtol=0, atol=SAME * np.abs(whole).max())
    for place in range(prompt, IDS.shape[1]):
        step = run(IDS[:, place : place + 1], step.past_key_values)
        assert step.past_key_values.get_seq_length() == place + 1
        np.testing.assert_allclose(step.logits[:, 0], whole[:, place], rtol=0, atol=SAME * np.abs(whole).max())


@pytest.mark.parametrize("prompt", [3, WINDOW, WINDOW + 3])
def test_decoding_with_padding_at_the_left(prompt: int) -> None:
    """Each of three rows of different lengths decodes as it does alone, with its positions."""
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
    with pytest.raises(InputError, match=r"cannot be cropped to 6 tokens: sliding layer 0 has dropped its first 4"):
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
    with pytest.raises(InputError, match="the number of tokens it has seen is unknown"):
        sliding(IDS[:, 8:9], past_key_values=cache.to_legacy())
    told = sliding(IDS[:, 8:9], past_key_values=cache.to_legacy(), cache_position=[8]).logits
    np.testing.assert_array_equal(told, sliding(IDS[:, 8:9], past_key_values=cache).logits)


@pytest.mark.parametrize(
    ("past", "reason"),
    [
        ([], "past_key_values has 0 layers; the model has 2"),
        ([(np.zeros((3, 2, 4, 6)),)] * 2, r"past_key_values\[0\] has 1 parts"),
        ([(np.zeros((3, 2, 4, 6)), np.zeros((3, 2, 5, 6)))] * 2, r"keys have shape \(3, 2, 4, 6\), values"),
        ([(np.zeros((3, 2, n, 6)), np.zeros((3, 2, n, 6))) for n in (4, 3)], "layer 1 keeps 3 tokens; after 4 tokens"),
        ([(np.zeros((2, 2, 4, 6)), np.zeros((2, 2, 4, 6)))] * 2, "does not fit this model, batch size"),
    ],
)
def test_tuples_that_are_no_cache(past: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        run(IDS[:, :1], past)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda cache: cache.reorder([3]), r"rows is \[3\]; it must be a list of row numbers from 0 to 2"),
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


def layer(rows: int = 3, kept: int = 4, start: int = 0, seed: int = 0) -> LayerCache:
    keys, values = np.random.default_rng(seed).standard_normal((2, rows, 2, kept, 6))
    return LayerCache(keys, values, start)


def test_a_layer_is_a_pair() -> None:
    one = layer(kept=4, start=3)
    keys, values = one
    assert keys is one.keys is one[0]
    assert values is one.values is one[1]
    assert (len(one), one.stop) == (2, 7)


def test_rows_of_a_cache() -> None:
    cache = Cache([layer(start=3)])  # of a single layer
    assert cache.get_seq_length() == 7
    assert Cache().get_seq_length() == 0
    assert repr(cache) == "Cache(1 layers, 7 tokens seen)"
    for picked in (cache.reorder(np.array([2, 0], np.uint8)), cache.reorder([2, 0])):
        np.testing.assert_array_equal(picked[0].keys, cache[0].keys[[2, 0]])
        np.testing.assert_array_equal(picked[0].values, cache[0].values[[2, 0]])
        assert picked[0].start == 3
    np.testing.assert_array_equal(cache.repeat_interleave(1)[0].keys, cache[0].keys)
    np.testing.assert_array_equal(cache.repeat_interleave(np.int64(2))[0].values, cache[0].values[[0, 0, 1, 1, 2, 2]])
    rows = "it must be a list of row numbers from 0 to {}"
    for wrong, said in (([3], "[3]"), ([-1, 0], "[-1, 0]"), ([[0]], "[[0]]"), ([0.0], "[0.0]")):
        refused(lambda wrong=wrong: cache.reorder(wrong), f"rows is {said}; {rows.format(2)}")
    refused(lambda: Cache().reorder([0]), f"rows is [0]; {rows.format(-1)}")
    refused(lambda: cache.reorder([[0], [1, 2]]), "rows is ragged: its rows have different lengths")
    for repeats in (0, 1.5):
        message = f"repeats is {repeats}; it must be a whole number of at least 1"
        refused(lambda repeats=repeats: cache.repeat_interleave(repeats), message)


def test_cutting_a_cache_back() -> None:
    cache = Cache([layer(seed=1), layer(seed=2)])
    for asked, left in ((3, 3), (0, 0), (-1, 3), (-4, 0), (-9, 0), (9, 4), (4, 4)):
        cut = cache.crop(asked)
        assert cut.get_seq_length() == left
        np.testing.assert_array_equal(cut[1].keys, cache[1].keys[:, :, :left])
        np.testing.assert_array_equal(cut[1].values, cache[1].values[:, :, :left])
        assert not np.shares_memory(cut[0].keys, cache[0].keys)
    dropped = Cache([layer(kept=9), layer(start=5), layer(start=5)])
    assert dropped.crop(9).get_seq_length() == 9  # nothing is cut
    for asked in (8, -1):
        refused(
            lambda asked=asked: dropped.crop(asked),
            "the cache cannot be cropped to 8 tokens: sliding layer 1 has dropped its first 5; "
            "keep an earlier cache (caches never change) and continue from it",
        )


def test_the_legacy_format_by_hand() -> None:
    # A window of 5: a sliding layer keeps 4 tokens at least, if it has seen so many.
    both = Gemma2Config(num_hidden_layers=2, sliding_window=5)
    sliding = both.changed(layer_types=["sliding_attention"] * 2)
    like = np.zeros(0, np.float32)

    def pairs(*kept: int) -> list[Any]:
        return [tuple(layer(kept=count, seed=n)) for n, count in enumerate(kept)]

    def starts(config: Gemma2Config, kept: tuple[int, ...], seen: int | None = None) -> list[int]:
        cache = Cache.from_legacy(pairs(*kept), config, like, seen)
        assert [one.keys.dtype.name for one in cache] == ["float32"] * 2
        for one, (keys, values) in zip(cache, pairs(*kept), strict=True):
            np.testing.assert_array_equal(one.keys, keys.astype(np.float32))
            np.testing.assert_array_equal(one.values, values.astype(np.float32))
        return [one.start for one in cache]

    assert starts(both, (4, 8)) == [4, 0]
    assert starts(both, (6, 8)) == [2, 0]  # more than it has to keep
    assert starts(both, (8, 8)) == [0, 0]
    assert starts(both, (3, 3)) == [0, 0]
    assert starts(both, (4, 4)) == [0, 0]  # a full layer says that these are all
    assert starts(sliding, (3, 3)) == [0, 0]
    assert starts(sliding, (4, 4), seen=9) == [5, 5]
    keeps = "past_key_values: layer {} keeps {} tokens; after {} tokens it must keep {}"
    refused(lambda: starts(both, (3, 8)), keeps.format(0, 3, 8, 4))
    refused(lambda: starts(both, (4, 7), seen=8), keeps.format(1, 7, 8, 8))
    refused(lambda: starts(both, (4, 8), seen=7), keeps.format(1, 8, 7, 7))
    for kept in ((4, 4), (9, 9)):
        refused(
            lambda kept=kept: starts(sliding, kept),
            "past_key_values is a plain tuple with sliding layers only, so the number of tokens it has seen is "
            "unknown; pass cache_position, or the Cache itself",
        )
    refused(lambda: Cache.from_legacy(pairs(4), both, like), "past_key_values has 1 layers; the model has 2")
    refused(lambda: Cache.from_legacy([], both, like), "past_key_values has 0 layers; the model has 2")
    refused(
        lambda: Cache.from_legacy([(np.zeros(1),)], both, like),
        "past_key_values[0] has 1 parts; it must be a pair (keys, values)",
    )


@pytest.fixture
def _unchecked() -> Iterator[None]:
    """Do not check shapes and types of calls in this block, as for a caller without annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked")
def test_pairs_of_the_legacy_format() -> None:
    config = Gemma2Config(num_hidden_layers=1, layer_types=["full_attention"])
    good, like = np.ones((1, 2, 3, 4)), bf16([0.0])

    def pair(keys: Any, values: Any) -> LayerCache:
        return Cache.from_legacy([(keys, values)], config, like)[0]

    # Nested lists, numbers of any format, half precision: all come to the precision of the weights.
    for keys in (good.tolist(), good.astype(np.float32), bf16(good)):
        kept = pair(keys, 2 * good)
        assert type(kept.keys) is type(kept.values) is BF16
        assert (plain(kept.keys).tolist(), plain(kept.values).tolist()) == (good.tolist(), (2 * good).tolist())
    for keys, values in (
        (good[0], good[0]), (good[None], good[None]), (good, good[..., :2]), (good.astype(int), good),
        (good, good.astype(int)),
    ):  # fmt: skip
        refused(
            lambda keys=keys, values=values: pair(keys, values),
            f"past_key_values[0]: keys have shape {keys.shape}, values {values.shape}; both must be numbers "
            "of shape (batch, kv_heads, tokens, head_dim)",
        )
    refused(lambda: pair([[1.0], [1.0, 2.0]], good), "past_key_values[0] is ragged: its rows have different lengths")


@pytest.mark.usefixtures("_unchecked")
def test_a_cache_made_by_hand_is_looked_at_whole() -> None:
    """`LayerCache` does not check its content; keys and values of each layer are compared when a call continues."""
    config, weights = SMALL.config, SMALL.weights
    cache = forward([[3, 4]], weights, config).cache
    keys, values = cache[1]
    for wrong in (
        LayerCache(keys, values[..., :-1], 0), LayerCache(keys, values[:, :, 1:], 0),
        LayerCache(keys[:, :1], values, 0), LayerCache(keys, values.astype(np.float64), 0),
        LayerCache(bf16(keys), values, 0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="continue from a cache that the same model returned"):
            forward([[5]], weights, config, cache=Cache([cache[0], wrong]))
    forward([[5]], weights, config, cache=Cache([cache[0], LayerCache(keys, values, 0)]))
