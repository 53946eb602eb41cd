"""What mutation testing asked for: tests of what the other tests of the core let pass. See mutation.py."""

import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest

import refgemma
from refgemma.cache import Cache, LayerCache
from refgemma.config import Gemma2Config
from refgemma.generation import decode as generation
from refgemma.generation.beams import Rules
from refgemma.generation.decode import (
    Decoding,
    Prompts,
    Reading,
    _rules,
    collect_settings,
    continue_prompt,
    count_positions,
    generate,
    generate_batch,
    mask_padding,
    stop_tokens,
)
from refgemma.generation.generation_config import GenerationConfig, merge_settings, resolve_settings
from refgemma.generation.stream import TextStreamer
from refgemma.goldens.verify import load_golden
from refgemma.heads import (
    binary_cross_entropy,
    causal_lm_loss,
    cross_entropy,
    last_tokens,
    log_softmax,
    mean_squared_error,
    sequence_classification_loss,
    token_classification_loss,
)
from refgemma.inputs import InputError
from refgemma.model import forward, next_token_logits
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.ops import gelu_tanh
from refgemma.precision import BF16, as_dtype, bf16, f16, narrow, plain, precision_named


def refused(call: Callable[[], Any], message: str) -> None:
    """The whole message: what is wrong, where, and what to do."""
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message


SMALL = Gemma2ForCausalLM.from_config(
    Gemma2Config(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=7, sliding_window=3, initializer_range=0.2,
        max_position_embeddings=64,
    ),
    seed=1,
)  # fmt: skip

# --- ops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 20), ("f16", 48), ("f32", 240)])
def test_gelu_is_rounded_where_pytorch_rounds(dtype: str, most: int) -> None:
    """All bfloat16 numbers, and 4801 others: how many PyTorch rounds to another number.

    Measured: 4, 19 and 28. A tanh that is not rounded before it is added to 1 makes that 92, 175 and 1482; a tanh taken
    in float32 20, 167 and 491.
    """
    about, golden = load_golden(f"op-gelu-{dtype}")
    x, y = (as_dtype(golden[name], about["dtype"]) for name in "xy")
    with np.errstate(all="ignore"):
        assert (plain(gelu_tanh(x)) != plain(y)).sum() < most


# --- precision --------------------------------------------------------------------------------------------------------

X = bf16(np.linspace(-3, 3, 24).reshape(2, 3, 4))


REDUCED: list[Callable[[Any], Any]] = [
    lambda x: x.mean(-1), lambda x: x.mean(axis=1, keepdims=True), lambda x: x.std(1), lambda x: x.std(ddof=1),
    lambda x: x.var(0), lambda x: x.var(axis=-1, ddof=1), lambda x: x.round(1), lambda x: x.round(decimals=1),
    lambda x: x.dot(x[0, 0]), lambda x: x[0].dot(b=x[1].T), lambda x: np.sum(x, axis=0, keepdims=True),
    lambda x: np.add(x, x, where=True), lambda x: np.modf(x)[1],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REDUCED)))
def test_methods_pass_their_arguments_on_and_round_once(number: int) -> None:
    found, in_float32 = REDUCED[number](X), REDUCED[number](np.array(plain(X)))
    assert type(found) is BF16
    np.testing.assert_array_equal(plain(found), plain(bf16(in_float32)))


def test_what_widens_and_what_does_not() -> None:
    # Only a floating-point array of at least one axis, as PyTorch promotes; also one within a list.
    single = np.ones(4, np.float32)
    for widening in (X * single, X * np.ones(4), np.concatenate([X[0, 0], single]), np.stack([single, X[0, 0]])):
        assert type(widening) is np.ndarray
    for kept in (X * np.array(2.0), X * np.float64(2.0), X * np.arange(4), X * True, X * 2, np.where(X > 0, X, 0)):
        assert type(kept) is BF16
    wider = np.clip(X, np.full(4, -1.0, np.float32), 1.0)
    assert type(wider) is np.ndarray
    assert type(np.clip(a=X, a_min=-1.0, a_max=np.full(4, 1.0, np.float32))) is np.ndarray
    # What is no floating-point array stays what it is.
    assert np.array_equal(X, X) is True
    assert np.argmax(X).dtype.kind == "i"
    assert type(np.divmod(X, bf16([2.0]))[0]) is BF16
    assert np.shape(X) == (2, 3, 4)


def test_astype_takes_the_arguments_of_numpy() -> None:
    x = bf16(np.ones((2, 3)))
    assert np.shares_memory(x.astype(np.float32, copy=False), x)
    assert not np.shares_memory(x.astype(np.float32), x)
    assert x.astype(np.float64, "F").flags.f_contiguous


def test_rounding_says_nothing_of_overflow_and_nan() -> None:
    # Warnings are errors here. The NaN is a signaling one, whose conversion the processor reports.
    signaling = np.array([0x7F800001], np.uint32).view(np.float32)
    for rounded in (bf16, f16):
        assert np.isnan(rounded(signaling)).all()
        assert np.isinf(rounded(np.float32(3.4e38))).all()


def test_rounding_is_by_way_of_float32() -> None:
    # As in a PyTorch kernel. Just above the middle between 1 and the next number; in float32 it is the middle, a tie.
    for rounded, step in ((bf16, 2.0**-7), (f16, 2.0**-10)):
        y = np.array([1 + step / 2 + 2.0**-30])
        assert plain(narrow(y, like=rounded([0.0]))).tolist() == plain(rounded(y)).tolist() == [1.0]
        assert plain(rounded([1 + step / 2 + 2.0**-20])).tolist() == [1 + step]


def test_names_of_precisions() -> None:
    said: dict[str, Any] = {
        "bfloat16": "jax.numpy.bfloat16", "float16": np.dtype("float16"), "float32": np.float32, "float64": "float64",
    }  # fmt: skip
    assert {name: precision_named(dtype) for name, dtype in said.items()} == {name: name for name in said}
    for call, message in (
        (lambda: precision_named("torch.int8"), "unknown dtype 'torch.int8': float64, float32, float16, bfloat16 are"),
        (lambda: as_dtype([1], "int8"), "unknown dtype 'int8': float64, float32, float16 and bfloat16 are"),
    ):
        with pytest.raises(ValueError, match="unknown dtype") as caught:
            call()
        assert str(caught.value) == message + " computed with"


# --- cache ------------------------------------------------------------------------------------------------------------


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
    rows = "a list of row numbers from 0 to {} is needed"
    for wrong, said in (([3], "[3]"), ([-1, 0], "[-1, 0]"), ([[0]], "[[0]]"), ([0.0], "[0.0]")):
        refused(lambda wrong=wrong: cache.reorder(wrong), f"rows is {said}: {rows.format(2)}")
    refused(lambda: Cache().reorder([0]), f"rows is [0]: {rows.format(-1)}")
    refused(lambda: cache.reorder([[0], [1, 2]]), "rows is ragged: its rows are not all of one length")
    for repeats in (0, 1.5):
        message = f"repeats is {repeats}: a whole number of at least 1 is needed"
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
            "the cache cannot be cut back to 8 tokens: sliding layer 1 has dropped its first 5; "
            "keep an earlier cache (caches are never changed) and go on from that",
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
    keeps = "past_key_values: layer {} keeps {} tokens, but after {} it has to keep {}"
    refused(lambda: starts(both, (3, 8)), keeps.format(0, 3, 8, 4))
    refused(lambda: starts(both, (4, 7), seen=8), keeps.format(1, 7, 8, 8))
    refused(lambda: starts(both, (4, 8), seen=7), keeps.format(1, 8, 7, 7))
    for kept in ((4, 4), (9, 9)):
        refused(
            lambda kept=kept: starts(sliding, kept),
            "past_key_values is a plain tuple of sliding layers only, which does not say how many tokens it has seen; "
            "pass cache_position, or the Cache itself",
        )
    refused(lambda: Cache.from_legacy(pairs(4), both, like), "past_key_values has 1 layers, the model 2")
    refused(lambda: Cache.from_legacy([], both, like), "past_key_values has 0 layers, the model 2")
    refused(
        lambda: Cache.from_legacy([(np.zeros(1),)], both, like),
        "past_key_values[0] has 1 parts: a pair (keys, values) is needed",
    )


@pytest.fixture
def _unchecked() -> Iterator[None]:
    """What a caller without annotations may hand in: the shapes and types of calls are not checked meanwhile."""
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
            f"past_key_values[0]: keys have shape {keys.shape}, values {values.shape}; both have to be numbers "
            "of shape (batch, kv_heads, tokens, head_dim)",
        )
    refused(lambda: pair([[1.0], [1.0, 2.0]], good), "past_key_values[0] is ragged: its rows are not all of one length")


# --- model ------------------------------------------------------------------------------------------------------------


def test_reading_for_the_next_token_is_reading() -> None:
    """With a mask, positions, a cache, or embeddings: the last logits of `forward`, and its cache."""
    config, ids = SMALL.config, np.array([[3, 4, 5, 6], [6, 7, 8, 9]])
    weights = SMALL.weights
    mask, places = np.array([[0, 1, 1, 1], [1] * 4]), np.array([[0, 5, 6, 7], [9, 10, 11, 12]])
    embeds = np.random.default_rng(0).standard_normal((2, 4, 12)).astype(np.float32)
    given: list[dict[str, Any]] = [
        {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "position_ids": places},
        {"input_ids": None, "inputs_embeds": embeds},
    ]  # fmt: skip
    seen = []
    for arguments in given:
        run = forward(weights=weights, config=config, **arguments)
        logits, cache = next_token_logits(weights=weights, config=config, **arguments)
        assert logits.shape == (2, 1, 13)
        # The head of one row or of four: float32 sums of 12 products, of logits of about 3.
        np.testing.assert_allclose(logits, run.logits[:, -1:], rtol=0, atol=12 * 3 * 2**-24)
        for one, other in zip(cache, run.cache, strict=True):
            np.testing.assert_array_equal(one.keys, other.keys)
        after = next_token_logits([[3], [4]], weights, config, cache=cache)[0]
        expected = forward([[3], [4]], weights, config, cache=run.cache).logits
        np.testing.assert_allclose(after, expected, rtol=0, atol=12 * 3 * 2**-24)
        seen.append(logits)
    plainly = next_token_logits(ids, weights, config)[0]
    for logits in seen:  # none of the three is left out
        assert np.abs(logits - plainly).max() > 1e-3


def test_a_model_of_one_layer_goes_on_too() -> None:
    config = SMALL.config.changed(num_hidden_layers=1, layer_types=None)
    weights = Gemma2ForCausalLM.from_config(config, seed=1).weights
    ids = [[3, 4, 5, 6, 7]]
    cache = forward([ids[0][:3]], weights, config).cache
    whole = forward(ids, weights, config).logits
    after = forward([ids[0][3:]], weights, config, cache=cache).logits
    # float32 logits of about 3, in another order of summing.
    np.testing.assert_allclose(after, whole[:, 3:], rtol=0, atol=12 * 3 * 2**-24)


def test_each_layer_takes_the_mask_of_its_kind() -> None:
    # With a window of 3 the last of five tokens is seen by the last three.
    ago = np.arange(5)[:, None] - np.arange(5)
    pictures = {"full_attention": ago >= 0, "sliding_attention": (ago >= 0) & (ago < 3)}
    masks = {kind: picture[None, None] for kind, picture in pictures.items()}
    run = partial(forward, [[3, 4, 5, 6, 7]], SMALL.weights, SMALL.config)
    np.testing.assert_array_equal(run(attention_mask=masks).logits, run().logits)
    exchanged = dict(zip(masks, reversed(masks.values()), strict=True))
    assert np.abs(run(attention_mask=exchanged).logits - run().logits).max() > 1e-3


def test_a_model_without_a_head_says_so() -> None:
    config = SMALL.config.changed(tie_word_embeddings=False)
    refused(
        lambda: forward([[3]], replace(SMALL.weights, lm_head=None), config),
        "these weights have no head: lm_head.weight is missing, and tie_word_embeddings is false",
    )
    untied = replace(SMALL.weights, lm_head=2 * SMALL.weights.embed_tokens)
    # Twice the head, without a cap: twice the logits, to the last bit.
    raw = [
        forward([[3]], weights, config).raw_logits for weights in (untied, replace(untied, lm_head=untied.lm_head / 2))
    ]
    np.testing.assert_array_equal(raw[0], 2 * raw[1])


# --- heads ------------------------------------------------------------------------------------------------------------

# Probabilities of three classes in sums by hand.
ODDS = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2], [0.05, 0.15, 0.8]])
# float64, some roundings of numbers below 1000, of which one is 2**-44.
NEAR = {"rtol": 0, "atol": 10 * 2.0**-44}


def test_log_softmax_is_of_the_last_axis_and_of_any_size() -> None:
    logs = np.log(np.stack([ODDS, ODDS[::-1]]))
    away = np.array([-900.0, 0.0, 900.0, 40.0])[:, None]  # exp of these is 0 or infinite in float64
    np.testing.assert_allclose(log_softmax(logs + away), logs, **NEAR)


def test_cross_entropy_by_hand() -> None:
    logits = np.log(ODDS)
    by_hand = -(math.log(0.5) + math.log(0.7) + math.log(0.4)) / 3
    assert cross_entropy(logits, np.array([0, 2, 1, -100])) == pytest.approx(by_hand, abs=1e-12)
    for label in (-1, 3, -101):
        refused(
            lambda label=label: cross_entropy(logits, np.array([-100, 0, label, 7])),
            f"label {label} is neither -100 nor one of the 3 classes, 0 and up",
        )


def test_the_causal_loss_is_of_the_next_token() -> None:
    logits = np.log(np.stack([ODDS, ODDS[::-1]]))
    # Row 0: 0.25 for token 1 after the first, 0.7 for 2 after the second; row 1: 0.05 for 0 after the first.
    labels = np.array([[0, 1, 2, -100], [2, 0, -100, -100]])
    by_hand = -(math.log(0.25) + math.log(0.7) + math.log(0.05)) / 3
    assert causal_lm_loss(logits, labels) == pytest.approx(by_hand, abs=1e-12)
    first = -math.log(0.25)
    assert causal_lm_loss(logits[:1, :2], [[2, 1]]) == pytest.approx(first, abs=1e-12)
    needed = "whole numbers of shape (2, 4) are needed"
    refused(lambda: causal_lm_loss(logits, [[1, 2]]), f"labels have shape (1, 2) and dtype int64: {needed}")
    refused(lambda: causal_lm_loss(logits, np.zeros((2, 4))), f"labels have shape (2, 4) and dtype float64: {needed}")
    refused(lambda: causal_lm_loss(logits, [[1], [1, 2]]), "labels is ragged: its rows are not all of one length")


def test_the_loss_of_a_token_classifier_is_of_the_same_token() -> None:
    logits = np.log(np.stack([ODDS, ODDS[::-1]]))
    by_hand = -(math.log(0.5) + math.log(0.8) + math.log(0.5)) / 3
    labels = np.array([[0, -100, -100, 2], [-100, -100, -100, 1]])
    logits[1, 3] = np.log([0.25, 0.5, 0.25])
    assert token_classification_loss(logits, labels) == pytest.approx(by_hand, abs=1e-12)
    assert token_classification_loss(logits[:1, :1], [[0]]) == pytest.approx(-math.log(0.5), abs=1e-12)
    needed = "whole numbers of shape (2, 4) are needed"
    refused(lambda: token_classification_loss(logits, [[1, 2]]), f"labels have shape (1, 2) and dtype int64: {needed}")
    refused(
        lambda: token_classification_loss(logits, np.zeros((2, 4))),
        f"labels have shape (2, 4) and dtype float64: {needed}",
    )
    refused(
        lambda: token_classification_loss(logits, [[1], [1, 2]]),
        "labels is ragged: its rows are not all of one length",
    )


def test_the_last_token_is_the_rightmost_that_is_no_padding() -> None:
    ids = np.array([[5, 6, 9, 9, 9], [9, 9, 5, 6, 7], [9, 5, 9, 6, 9], [9, 9, 9, 9, 9], [5, 9, 9, 9, 9]])
    assert last_tokens(ids, 9).tolist() == [1, 4, 3, 0, 0]


def test_the_three_kinds_of_sequence_classifier_by_hand() -> None:
    one, three = np.array([[1.0], [2.5]]), np.log(ODDS[:2])

    def loss(logits: Any, labels: Any, kind: str | None = None) -> Any:
        return pytest.approx(sequence_classification_loss(logits, labels, kind), abs=1e-12)

    # Regression: of one class, guessed and said, labels of either shape, whole or not; of several.
    assert loss(one, [3.0, 2.0]) == (2.0**2 + 0.5**2) / 2
    assert loss(one, np.array([[3], [2]], np.uint8)) == (2.0**2 + 0.5**2) / 2
    assert loss(one, [3, 2], "regression") == (2.0**2 + 0.5**2) / 2
    assert loss(np.array([[1.0, 4.0]]), [[0.0, 2.0]], "regression") == (1 + 4) / 2
    # Single label: guessed of whole numbers, said of one class too.
    single = -(math.log(0.25) + math.log(0.7)) / 2
    assert loss(three, [1, 2]) == single
    assert loss(three, [[1], [2]], "single_label_classification") == single
    assert loss(one, [0, 0], "single_label_classification") == 0.0
    # Multi-label: guessed of fractions; of single labels of one class too, if that is said.
    z, y = np.array([[2.0, -3.0], [0.5, 0.0]]), np.array([[1.0, 0.25], [0.0, 1.0]])
    sigmoid = 1 / (1 + np.exp(-z))
    multi = -float(np.mean(y * np.log(sigmoid) + (1 - y) * np.log(1 - sigmoid)))
    assert loss(z, y) == multi
    assert loss(z[:, :1], y[:, :1], "multi_label_classification") == -float(
        np.mean(y[:, 0] * np.log(sigmoid[:, 0]) + (1 - y[:, 0]) * np.log(1 - sigmoid[:, 0]))
    )


def test_labels_that_no_classifier_takes() -> None:
    three = np.zeros((2, 3))

    def wrong(labels: Any, kind: str | None, message: str, logits: Any = three) -> None:
        refused(lambda: sequence_classification_loss(logits, labels, kind), message)

    a_class = "the class of each of the 2 sequences is needed, whole numbers from 0 to 2"
    wrong([1], None, f"labels have shape (1,) and dtype int64: {a_class}")
    wrong([0.0, 1.0], "single_label_classification", f"labels have shape (2,) and dtype float64: {a_class}")
    numbers = "numbers of shape (2, 3) are needed"
    wrong([1.0], "regression", f"labels have shape (1,) and dtype float64: {numbers}")
    wrong(np.ones((2, 3), bool), "regression", f"labels have shape (2, 3) and dtype bool: {numbers}")
    fractions = "numbers from 0.0 to 1.0 of shape (2, 3) are needed, one for each class"
    wrong([0.0, 1.0], None, f"labels have shape (2,) and dtype float64: {fractions}")
    wrong([[1, 0, 0]] * 2, "multi_label_classification", f"labels have shape (2, 3) and dtype int64: {fractions}")
    wrong([[1], [1, 2]], None, "labels is ragged: its rows are not all of one length")
    for loss in (mean_squared_error, binary_cross_entropy):
        refused(lambda loss=loss: loss(three, [[1], [1, 2]]), "labels is ragged: its rows are not all of one length")


# --- generation -------------------------------------------------------------------------------------------------------

NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": None}
RECORD: dict[str, Any] = {"return_dict_in_generate": True}


def call_with(**settings: Any) -> GenerationConfig:
    return merge_settings(None, GenerationConfig(), NO_END | settings)


def log_probabilities(texts: Any, begins: int) -> Any:
    """Of the tokens of each text from place `begins` on: the sum of log probabilities, from a single forward pass."""
    ids = np.array(texts)
    told = log_softmax(SMALL(ids).logits.astype(np.float64))[:, begins - 1 : -1]
    return np.take_along_axis(told, ids[:, begins:, None], axis=2).sum(axis=(1, 2))


def test_padding_and_positions_by_hand() -> None:
    ids = np.array([[0, 2, 5], [2, 1, 7], [1, 0, 0]])
    assert mask_padding(ids, 0, [1]).tolist() == (ids != 0).tolist()
    assert mask_padding(ids, 1, []).tolist() == (ids != 1).tolist()
    assert mask_padding(ids, 0, [3, 0]).all()  # a pad token that may end a text is no padding
    assert mask_padding(ids, None, []).all()
    visible = np.array([[False, False, True, True], [True, True, True, True], [False, True, False, True]])
    assert count_positions(visible).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 1]]


def test_without_prompts_one_text_begins_with_bos() -> None:
    assert SMALL.generate(bos_token_id=5, max_new_tokens=2, **NO_END)[0, 0] == 5
    refused(
        lambda: SMALL.generate(bos_token_id=None), "give input_ids: no bos_token_id is set that a text could begin with"
    )
    message = "input_ids[0, 0] is 13: not in the vocabulary of 13 tokens (0 to 12)"
    refused(lambda: SMALL.generate(bos_token_id=13), message)
    refused(lambda: SMALL.generate([[13]]), message)


def reading(**changes: Any) -> Reading:
    whole = {"ids": np.array([[3, 4, 5], [6, 7, 8]]), "visible": np.array([[False, True, True], [True] * 3]),
             "positions": np.array([[0, 0, 1], [0, 1, 2]]), "cache": None}  # fmt: skip
    return Reading(**(whole | changes))


def test_the_model_is_told_what_is_not_in_the_cache() -> None:
    told: dict[str, Any] = {}
    cache = SMALL([[3, 4], [6, 7]]).past_key_values

    def model(ids: Any, **given: Any) -> Any:
        told.clear()
        told.update(ids=None if ids is None else ids.tolist(), **given)
        return np.arange(52.0).reshape(2, 2, 13), cache

    last, after = reading().next_logits(model)
    assert last.dtype == np.float32
    assert last.tolist() == [list(range(13, 26)), list(range(39, 52))]
    assert after is cache
    assert told["ids"] == [[3, 4, 5], [6, 7, 8]]
    assert told["attention_mask"].tolist() == [[False, True, True], [True] * 3]
    assert told["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert told["cache"] is told["inputs_embeds"] is None
    reading(cache=cache, visible=np.ones((2, 3), bool)).next_logits(model)
    assert told["ids"] == [[5], [8]]
    assert told["attention_mask"] is None
    assert told["position_ids"].tolist() == [[1], [2]]
    assert told["cache"] is cache
    embeds = np.ones((2, 3, 12))
    reading(ids=np.zeros((2, 0), int), embeds=embeds).next_logits(model)
    assert told["ids"] is None
    assert told["inputs_embeds"] is embeds

    def broken(ids: Any, **given: Any) -> Any:
        return np.array([[[0.0, np.nan]], [[0.0, 1.0]]]), cache

    refused(
        lambda: reading().next_logits(broken),
        "the logits are NaN: numbers became too large for this precision on the way; try float32, or float64",
    )


def test_a_reading_goes_on_and_is_repeated() -> None:
    cache = SMALL([[3, 4], [6, 7]]).past_key_values
    after = reading(embeds=np.ones((2, 3, 12))).add_tokens(np.array([[3, 4, 5, 9], [6, 7, 8, 9]]), cache)
    assert after.ids.tolist() == [[3, 4, 5, 9], [6, 7, 8, 9]]
    assert after.visible.tolist() == [[False, True, True, True], [True] * 4]
    assert after.positions.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert after.cache is cache
    assert after.embeds is None
    embeds = np.arange(72.0).reshape(2, 3, 12)
    twice = reading(cache=cache, embeds=embeds).repeat(2)
    assert twice.ids.tolist() == [[3, 4, 5], [3, 4, 5], [6, 7, 8], [6, 7, 8]]
    assert twice.visible.tolist() == [[False, True, True]] * 2 + [[True] * 3] * 2
    assert twice.positions.tolist() == [[0, 0, 1]] * 2 + [[0, 1, 2]] * 2
    np.testing.assert_array_equal(twice.cache[1].keys, cache[1].keys[[0, 0, 1, 1]])
    np.testing.assert_array_equal(twice.embeds, embeds[[0, 0, 1, 1]])
    assert reading().repeat(2).cache is reading().repeat(2).embeds is None


def test_prompts_as_they_are_read() -> None:
    config, call = SMALL.config, call_with(pad_token_id=0, eos_token_id=(1, 4))

    def read(call: Any = call, **given: Any) -> Reading:
        return Prompts(**given).reading(call, config)

    ids = [[0, 2, 5], [6, 0, 8]]
    plain = read(input_ids=ids)
    assert plain.ids.tolist() == ids
    assert plain.visible.tolist() == [[False, True, True], [True, False, True]]
    assert plain.positions.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert plain.cache is plain.embeds is None
    # A pad token that may end a text, as one of several or as the only one; or none at all.
    for ends in ((1, 0), 0):
        assert read(call_with(pad_token_id=0, eos_token_id=ends), input_ids=ids).visible.all()
    assert not read(call_with(pad_token_id=0), input_ids=ids).visible.all()
    assert read(call_with(eos_token_id=0), input_ids=ids).visible.all()
    masked = read(input_ids=ids, attention_mask=[[1, 1, 1], [0, 1, 1]], position_ids=[[5, 6, 7], [1, 2, 3]])
    assert masked.visible.tolist() == [[True] * 3, [False, True, True]]
    assert masked.positions.tolist() == [[5, 6, 7], [1, 2, 3]]
    with pytest.warns(UserWarning, match=r"beyond max_position_embeddings \(64\)"):
        read(input_ids=ids, position_ids=[[62, 63, 64]])
    # With a cache: all tokens, or those after it with a mask over all.
    cache = SMALL([[3, 4], [6, 7]]).past_key_values
    assert read(input_ids=ids, past_key_values=cache).cache is cache
    rest = read(input_ids=[[5], [8]], past_key_values=cache, attention_mask=[[0, 1, 1], [1, 1, 1]])
    assert rest.visible.tolist() == [[False, True, True], [True] * 3]
    assert rest.positions.tolist() == [[0, 0, 1], [0, 1, 2]]
    refused(
        lambda: read(input_ids=[[5, 6], [7, 8]], past_key_values=cache),
        "the cache has seen 2 tokens and the prompt has 2: one more is needed at least",
    )
    shape = "attention_mask has shape {}, but (2, 3) is needed: one entry for each token so far, those in the cache"
    refused(lambda: read(input_ids=ids, attention_mask=[[1] * 4] * 2), shape.format("(2, 4)") + " included")
    refused(lambda: read(input_ids=ids, attention_mask=1, past_key_values=cache), shape.format("()") + " included")
    one_row = shape.format("(3,)") + " included"
    refused(lambda: read(input_ids=ids, attention_mask=[1, 1, 1], past_key_values=cache), one_row)
    # Embeddings: no ids, but a mask and positions.
    embeds = np.ones((2, 3, 12))
    embedded = read(inputs_embeds=embeds)
    assert embedded.ids.shape == (2, 0)
    assert embedded.ids.dtype == np.int64
    assert embedded.visible.tolist() == [[True] * 3] * 2
    assert embedded.embeds is embeds
    assert read(inputs_embeds=embeds, attention_mask=[[0, 1, 1]] * 2).positions.tolist() == [[0, 0, 1]] * 2
    whole = "inputs_embeds are the whole prompt: give no input_ids and no past_key_values"
    refused(lambda: read(inputs_embeds=embeds, input_ids=ids), whole)
    refused(lambda: read(inputs_embeds=embeds, past_key_values=cache), whole)
    needed = "numbers of shape (batch, seq, 12) are needed"
    refused(
        lambda: read(inputs_embeds=np.ones((2, 3, 11))),
        f"inputs_embeds has shape (2, 3, 11) and dtype float64: {needed}",
    )


def test_embeddings_of_tokens_are_continued_as_the_tokens_are() -> None:
    ids = [[3, 4, 5], [6, 7, 8]]
    # In place of ids embeddings are taken as the blocks take them: scaled by sqrt(12), in float32.
    embeds = SMALL.weights.embed_tokens[np.array(ids)] * np.float32(math.sqrt(12))
    for settings in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "seed": 3}):
        told = SMALL.generate(ids, max_new_tokens=5, **NO_END, **settings)
        new = SMALL.generate(inputs_embeds=embeds, max_new_tokens=5, use_cache=False, **NO_END, **settings)
        assert new.tolist() == told[:, 3:].tolist()
    assert SMALL.generate(inputs_embeds=embeds, max_length=7, **NO_END).shape == (2, 4)
    assert SMALL.generate(inputs_embeds=embeds[:, :1], **NO_END).shape == (2, 20)
    with pytest.raises(InputError, match="the prompt has 3 tokens, which leaves none of max_length"):
        SMALL.generate(inputs_embeds=embeds, max_length=3, **NO_END)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_a_cache_is_gone_on_from(settings: dict[str, Any]) -> None:
    ids = [[3, 4, 5, 6], [6, 7, 8, 9]]
    cache = SMALL([row[:3] for row in ids]).past_key_values
    whole = SMALL.generate(ids, max_new_tokens=4, **NO_END, **settings).tolist()
    # What only the cache knows is kept, also where no cache is asked for.
    for use_cache in (True, False):
        found = SMALL.generate(ids, past_key_values=cache, max_new_tokens=4, use_cache=use_cache, **NO_END, **settings)
        assert found.tolist() == whole


def test_padding_at_the_left_changes_nothing() -> None:
    settings: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"num_beams": 2}, {"repetition_penalty": 1.5}):
        alone = SMALL.generate([[3, 4]], **settings, **more)[0].tolist()
        padded = SMALL.generate([[0, 0, 3, 4], [5, 6, 7, 8]], **settings, **more)
        assert padded[0, 2:].tolist() == alone
        assert padded[1].tolist() == SMALL.generate([[5, 6, 7, 8]], **settings, **more)[0].tolist()
    message = "^there is padding at the right of a prompt, which new tokens would follow: set padding_side='left'$"
    with pytest.warns(UserWarning, match=message):
        SMALL.generate([[3, 4], [3, 0]], **settings)


def test_a_warning_names_the_line_of_the_caller(tmp_path: Path) -> None:
    # In a process of its own: under pytest each call goes through a function that checks the shapes.
    script = tmp_path / "caller.py"
    script.write_text(
        "import refgemma\nmodel = refgemma.Gemma2ForCausalLM.from_pretrained('tiny')\n"
        "model.generate([[2, 300, 0], [2, 300, 400]], max_new_tokens=1)\n"
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stderr
    assert f"{script}:3: UserWarning: there is padding at the right" in said


def test_what_ends_a_text() -> None:
    settings = resolve_settings(call_with(eos_token_id=(5, 7), max_new_tokens=3), 2, 13, 64)
    zeros = np.zeros((3, 13), np.float32)
    how = Decoding(settings, np.zeros(3, int))
    assert how.check_ended(np.array([[5, 5, 4], [4, 4, 7], [4, 4, 5]]), zeros).tolist() == [False, True, True]
    assert how.check_ended(np.full((3, 5), 4), zeros).all()
    assert not how.check_ended(np.full((3, 4), 4), zeros).any()
    asked: list[Any] = []

    def criterion(ids: Any, scores: Any) -> Any:
        asked.append((ids.tolist(), scores is zeros))
        return [1, 0, 0]

    how = Decoding(settings, np.zeros(3, int), criteria=[criterion, lambda ids, scores: [0, 1, 0]])
    assert how.check_ended(np.full((3, 4), 4), zeros).tolist() == [True, True, False]
    assert how.check_ended(np.array([[4], [4], [5]]), zeros).tolist() == [True, True, True]
    assert asked == [([[4] * 4] * 3, True), ([[4], [4], [5]], True)]


def test_scores_are_constrained_then_the_callers_then_cut() -> None:
    raw = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    ids = np.array([[0, 2]])
    call = call_with(repetition_penalty=2.0, top_k=2, temperature=0.5, do_sample=True, max_new_tokens=2)
    settings = resolve_settings(call, 2, 4, 64)

    def first_is_out(ids: Any, scores: Any) -> Any:
        assert ids.tolist() == [[0, 2]]
        return np.where(np.arange(4) == 1, np.float32(-np.inf), scores)

    # Token 2 is there already: its score is doubled, as it is negative; token 0 is padding. Then 1 is out; then all are
    # divided by 0.5, and the best two of them stay.
    expected = np.array([[2 * math.log(0.4), -np.inf, -np.inf, 2 * math.log(0.1)]])
    found = Decoding(settings, np.array([1]), [first_is_out]).scores(ids, raw)
    np.testing.assert_allclose(found, expected, rtol=4 * 2**-24)  # three float32 steps
    greedy = Decoding(replace(settings, do_sample=False), np.array([1]), [first_is_out]).scores(ids, raw)
    by_hand = np.array([[math.log(0.4), -np.inf, 2 * math.log(0.2), math.log(0.1)]])
    np.testing.assert_allclose(greedy, by_hand, rtol=4 * 2**-24)


def test_a_text_that_criteria_end_is_filled_only_where_a_text_can_end_by_itself() -> None:
    greedy = SMALL.generate([[3, 4], [6, 7]], max_new_tokens=4, **NO_END)

    def first_row(ids: Any, scores: Any) -> Any:
        return np.array([True, False])

    # As in transformers, where pad tokens are put in only if there is an end of text.
    for settings, expected in (
        ({"pad_token_id": 0, "eos_token_id": None}, greedy[0].tolist()),
        ({"pad_token_id": None, "eos_token_id": None}, greedy[0].tolist()),
        ({"pad_token_id": 0, "eos_token_id": 11}, [*greedy[0, :3].tolist(), 0, 0, 0]),
        ({"pad_token_id": None, "eos_token_id": 11}, [*greedy[0, :3].tolist(), 11, 11, 11]),
    ):
        assert 11 not in greedy
        found = SMALL.generate([[3, 4], [6, 7]], None, [], [first_row], max_new_tokens=4, **settings)
        assert found.tolist() == [expected, greedy[1].tolist()]


def test_records_of_greedy_texts() -> None:
    ids, forbidden = [[3, 4], [6, 7]], [lambda ids, scores: np.where(np.arange(13) == 5, -np.inf, scores)]
    asked = {"max_new_tokens": 3, "output_scores": True, "output_logits": True} | NO_END | RECORD
    whole = SMALL.generate(ids, None, forbidden, **asked)
    assert list(whole.keys()) == ["sequences", "scores", "logits", "past_key_values"]
    assert len(whole.scores) == len(whole.logits) == 3
    logits = SMALL(whole.sequences).logits[:, 1:-1]
    for step in range(3):
        # float32 logits of about 10, read token by token and at once.
        np.testing.assert_allclose(whole.logits[step], logits[:, step], rtol=0, atol=1e-4)
        assert (whole.scores[step][:, 5] == -np.inf).all()
        others = np.arange(13) != 5
        np.testing.assert_array_equal(whole.scores[step][:, others], whole.logits[step][:, others])
    assert whole.past_key_values.get_seq_length() == 4
    bare = SMALL.generate(ids, max_new_tokens=3, use_cache=False, **NO_END, **RECORD)
    assert list(bare.keys()) == ["sequences"]


class Listener:
    """Writes down what it is given."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Any) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_a_streamer_is_given_the_prompt_then_each_token_then_the_end() -> None:
    listener = Listener()
    found = SMALL.generate([[3, 4], [6, 7]], streamer=listener, max_new_tokens=2, **NO_END)
    assert listener.heard == [[[3, 4], [6, 7]], found[:, 2].tolist(), found[:, 3].tolist(), "end"]
    refused(
        lambda: SMALL.generate([[3, 4]], streamer=listener, num_beams=2),
        "a streamer is given tokens that stay, and a beam search has none before its end",
    )


def test_the_rules_of_a_search() -> None:
    def rules(**settings: Any) -> Rules:
        call = call_with(num_beams=3, max_new_tokens=4, length_penalty=0.5, early_stopping=True, **settings)
        return _rules(resolve_settings(call, 2, 13, 64))

    # Twice the beams, or one candidate more for each end of text, of which some may take all places.
    assert rules() == Rules(3, 6, longest=4, early_stopping=True, length_penalty=0.5, fill=-1)
    assert rules(eos_token_id=7) == Rules(3, 6, longest=4, early_stopping=True, length_penalty=0.5, fill=7)
    three = {"eos_token_id": (7, 8, 9), "pad_token_id": 5}
    assert rules(**three) == Rules(3, 12, longest=4, early_stopping=True, length_penalty=0.5, fill=5)
    assert rules(eos_token_id=7, pad_token_id=0).fill == 7


def test_a_search_finds_the_best_of_all_texts() -> None:
    """Thirteen beams and two tokens: every text is a candidate. All of them are tried."""
    asked = {"num_beams": 13, "max_new_tokens": 2, "output_scores": True, "output_logits": True} | NO_END | RECORD
    found = SMALL.generate([[3, 4], [6, 7]], num_return_sequences=3, **asked)
    for row, prompt in enumerate(([3, 4], [6, 7])):
        texts = [[*prompt, a, b] for a in range(13) for b in range(13)]
        sums = log_probabilities(texts, 2)
        best = np.argsort(-sums)[:3]
        rows = slice(3 * row, 3 * row + 3)
        assert found.sequences[rows].tolist() == [texts[n] for n in best]
        # Means of two float32 log probabilities of about 5.
        np.testing.assert_allclose(found.sequences_scores[rows], sums[best] / 2, rtol=0, atol=1e-5)
    # The row of the step before that each token continued: at first the prompt's own, then the beam of the first token.
    assert found.beam_indices.shape == (6, 2)
    assert found.beam_indices[:, 0].tolist() == [0, 0, 0, 13, 13, 13]
    assert len(found.scores) == len(found.logits) == 2
    np.testing.assert_allclose(found.scores[0], log_softmax(found.logits[0]), rtol=0, atol=1e-5)
    assert found.scores[0].dtype == found.scores[1].dtype == np.float32
    first = SMALL([[3, 4]]).logits[0, -1]
    np.testing.assert_allclose(found.logits[0][:13], np.tile(first, (13, 1)), rtol=0, atol=1e-4)
    assert found.past_key_values.get_seq_length() == 3
    assert found.past_key_values[0].keys.shape[0] == 26
    bare = SMALL.generate([[3, 4]], num_beams=2, max_new_tokens=2, use_cache=False, **NO_END, **RECORD)
    assert list(bare.keys()) == ["sequences", "beam_indices"]
    assert SMALL.generate([[3, 4]], num_beams=2, max_new_tokens=2, **NO_END).shape == (1, 4)


def test_a_search_goes_on_from_the_beams_it_chose() -> None:
    """Beams change places: with a cache that did not follow them the texts would have other scores."""
    for use_cache in (True, False):
        found = SMALL.generate(
            [[3, 4], [6, 7]], num_beams=4, num_return_sequences=4, max_new_tokens=6, use_cache=use_cache,
            output_scores=True, length_penalty=0.0, **NO_END, **RECORD,
        )  # fmt: skip
        assert len(np.unique(found.beam_indices)) > 3
        # Sums of six float32 log probabilities of about 5.
        np.testing.assert_allclose(found.sequences_scores, log_probabilities(found.sequences, 2), rtol=0, atol=1e-4)


def test_a_search_ends_where_texts_end() -> None:
    free = SMALL.generate([[3, 4]], num_beams=3, max_new_tokens=6, **NO_END)[0].tolist()
    ended = SMALL.generate([[3, 4]], num_beams=3, max_new_tokens=6, eos_token_id=free[3], early_stopping=True)
    assert free[3] in ended[0, 2:]
    stopped = SMALL.generate(
        [[3, 4]], None, [], [lambda ids, scores: ids[:, -1] >= 0], num_beams=3, max_new_tokens=6, **NO_END
    )
    assert stopped.shape == (1, 3)
    drawn = {"num_beams": 3, "do_sample": True, "max_new_tokens": 6} | NO_END
    texts = [SMALL.generate([[3, 4]], seed=seed, **drawn).tolist() for seed in (0, 0, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len({str(text) for text in texts}) > 1


@pytest.mark.parametrize("beams", [1, 2])
def test_without_a_cache_the_whole_text_is_read_at_each_step(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read, lengths = generation.next_token_logits, []

    def noted(ids: Any, **named: Any) -> Any:
        lengths.append(ids.shape[1])
        return read(ids, **named)

    monkeypatch.setattr(generation, "next_token_logits", noted)
    for use_cache in (True, False):
        SMALL.generate([[3, 4]], num_beams=beams, max_new_tokens=3, use_cache=use_cache, **NO_END)
    assert lengths == [2, 1, 1, 2, 3, 4]


def test_the_fast_computation_reads_unless_the_definition_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(name: str, read: Any) -> Any:
        def reads(*given: Any, **named: Any) -> Any:
            asked.append(name)
            return read(*given, **named)

        return reads

    monkeypatch.setattr(generation, "next_token_logits", noted("fast", generation.next_token_logits))
    monkeypatch.setattr(generation, "definition", noted("definition", generation.definition))
    call = call_with(max_new_tokens=1)
    weights, config = SMALL.weights, SMALL.config
    list(generate([3, 4], weights, config, max_new_tokens=1))
    list(continue_prompt([3, 4], weights, config, call))
    list(continue_prompt([3, 4], weights, config, call, reference=True))
    generate_batch(Prompts([[3, 4]]), weights, config, call)
    generate_batch(Prompts([[3, 4]]), weights, config, call, reference=True)
    assert asked == ["fast", "fast", "definition", "fast", "definition"]


def test_twenty_tokens_where_nothing_is_said_and_none_beyond_the_positions() -> None:
    weights, config = SMALL.weights, SMALL.config
    assert len(list(continue_prompt([3, 4], weights, config, call_with()))) == 20
    assert len(list(continue_prompt([3] * 60, weights, config, call_with()))) == 4


def test_the_default_settings_of_generate() -> None:
    weights, config = SMALL.weights, SMALL.config.changed(max_position_embeddings=512)
    assert len(list(generate([3, 4], weights, config, stop_ids=()))) == 128
    greedy = SMALL.generate([[3, 4]], max_new_tokens=6, **NO_END)[0, 2:].tolist()
    assert list(generate([3, 4], weights, config, 6, stop_ids=())) == greedy
    drawn = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": ()}
    assert list(generate([3, 4], weights, config, **drawn)) == list(generate([3, 4], weights, config, **drawn, seed=0))
    with pytest.warns(UserWarning, match=r"beyond max_position_embeddings \(64\)"):
        list(generate([3] * 64, weights, SMALL.config, 2, stop_ids=()))


def test_the_settings_of_one_text() -> None:
    config = SMALL.config.changed(eos_token_id=(7, 5), pad_token_id=9)
    call = collect_settings(config, 3, 0.5, 4, 0.75, 6, None, {"min_p": 0.25})
    assert (call.max_new_tokens, call.temperature, call.top_k, call.top_p, call.seed) == (3, 0.5, 4, 0.75, 6)
    assert (call.min_p, call.do_sample, call.eos_token_id, call.pad_token_id) == (0.25, True, (5, 7), 9)
    call = collect_settings(config, 3, 0.0, None, None, 0, {8}, {})
    assert (call.do_sample, call.eos_token_id, call.top_k) == (False, (8,), 0)
    assert collect_settings(config, 3, 1.0, 1, None, 0, (), {}).eos_token_id is None
    assert collect_settings(config.changed(eos_token_id=None), 3, 0.0, None, None, 0, None, {}).eos_token_id is None
    refused(
        lambda: collect_settings(config, 3, 1.0, 0, None, 0, None, {}),
        "top_k must be a whole number of at least 1, not 0; leave it out to draw from all tokens",
    )
    assert stop_tokens(config) == {5, 7}
    assert stop_tokens(config.changed(eos_token_id=4)) == {4}
    assert stop_tokens(config.changed(eos_token_id=None)) == frozenset()


def test_one_text_is_no_search() -> None:
    weights, config = SMALL.weights, SMALL.config
    message = "one text, token by token, has no beams; for a search use Gemma2ForCausalLM.generate"
    refused(lambda: generate([3], weights, config, num_beams=2), message)
    refused(lambda: generate([3], weights, config, temperature=1.0, num_return_sequences=2), message)
    refused(
        lambda: generate([], weights, config),
        "the prompt is empty: a model needs at least one token (<bos>, for instance)",
    )
    assert len(list(generate([3], weights, config, 2, stop_ids=()))) == 2
    refused(
        lambda: generate([3], weights, config, stop_ids={13}),
        "eos_token_id is 13: not in the vocabulary of 13 tokens",
    )
    # Repeated tokens are counted from the first: nothing is padding, whatever its id.
    plain, penalised = (list(generate([0, 3], weights, config, 6, stop_ids=(), **more)) for more in (
        {}, {"repetition_penalty": 1e6}))  # fmt: skip
    assert len(set(plain)) < 6 or not {0, 3}.isdisjoint(plain)
    assert len({0, 3, *penalised}) == 8


class Screen(io.StringIO):
    """Counts how often it is told to show what it has."""

    shown = 0

    def flush(self) -> None:
        self.shown += 1


def test_a_text_streamer_prints_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = refgemma.AutoTokenizer.from_pretrained("tiny")
    ids = np.array(tokenizer.encode("The king, the queen"))

    def printed(streamer: TextStreamer, *calls: Any) -> Screen:
        screen = Screen()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            for call in calls:
                streamer.end() if call is None else streamer.put(call)
        return screen

    words = "<bos>The king, the queen"
    screen = printed(TextStreamer(tokenizer), ids[None, :3], ids[3:4], *ids[4:, None], None)
    assert screen.getvalue() == words + "\n"
    assert screen.shown == 3 + len(ids) - 4  # after each call
    assert printed(TextStreamer(tokenizer, skip_special_tokens=True), ids, None).getvalue() == words[5:] + "\n"
    # The prompt is skipped, of each text anew.
    skipping = TextStreamer(tokenizer, skip_prompt=True)
    twice = printed(skipping, ids[:3], ids[3:], None, ids[:3], ids[3:], None).getvalue()
    assert twice == 2 * ", the queen\n"
    refused(
        lambda: TextStreamer(tokenizer).put(ids[None].repeat(2, 0)), "TextStreamer prints one text, and there are 2"
    )
    assert printed(TextStreamer(tokenizer), ids[None, :1], ids[1:], None).getvalue() == words + "\n"
    # Bytes are kept back until their run is over: at a piece, a special token, or the end. What is no character then is
    # a replacement character for each byte, as transformers' byte fallback has it.
    face = np.array(tokenizer.encode("\U0001f642", add_special_tokens=False))
    end = np.array([tokenizer.convert_tokens_to_ids("<end_of_turn>")])
    assert printed(TextStreamer(tokenizer), face[:2]).getvalue() == ""
    assert printed(TextStreamer(tokenizer), face[:2], face[2:], None).getvalue() == "\U0001f642\n"
    assert printed(TextStreamer(tokenizer), face[:2], None).getvalue() == "\ufffd\ufffd\n"
    assert printed(TextStreamer(tokenizer), face[:2], end).getvalue() == "\ufffd\ufffd<end_of_turn>"
