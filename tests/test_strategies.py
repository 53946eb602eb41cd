"""Test the strategies: the guaranteed properties of examples, and the examples to which they shrink."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import find as simplest
from hypothesis import strategies as st

from refgemma.config import Gemma2Config
from refgemma.precision import BF16, F16
from refgemma.testing import strategies as ours
from refgemma.testing.laws import write_value

FIND = settings(max_examples=2000, deadline=None, derandomize=True, database=None)
SMALL = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def axes(config: Gemma2Config) -> dict[str, int]:
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {
        "vocab": config.vocab_size, "hidden": config.hidden_size, "intermediate": config.intermediate_size,
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "queries": heads * head_dim,
    }  # fmt: skip


@settings(max_examples=300)
@given(ours.configs())
def test_every_axis_is_distinct(config: Gemma2Config) -> None:
    lengths = axes(config)
    assert len(set(lengths.values())) == len(lengths), lengths
    # With one key head its width is the head's; with more it differs from every other axis too.
    keys = config.num_key_value_heads * config.head_dim
    assert config.num_key_value_heads == 1 or keys not in lengths.values()
    assert config.query_pre_attn_scalar != config.head_dim
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.sliding_window >= 2


def test_axes_may_be_equal_where_that_is_asked_for() -> None:
    found = simplest(
        ours.configs(distinct=False), lambda c: c.num_attention_heads == c.num_key_value_heads, settings=FIND
    )
    assert found.num_attention_heads == 1


def test_a_config_shrinks_to_the_smallest() -> None:
    found = simplest(ours.configs(), lambda c: True, settings=FIND)
    assert (found.num_hidden_layers, found.num_key_value_heads, found.sliding_window) == (1, 1, 2)
    assert (found.num_attention_heads, found.vocab_size, found.intermediate_size) == (2, 11, 3)


@pytest.mark.parametrize(
    ("field", "least"),
    [("num_hidden_layers", 3), ("sliding_window", 4), ("num_key_value_heads", 2), ("vocab_size", 40)],
)
def test_a_config_shrinks_to_the_smallest_that_still_fails(field: str, least: int) -> None:
    usual = simplest(ours.configs(), lambda c: True, settings=FIND)
    found = simplest(ours.configs(), lambda c: getattr(c, field) >= least, settings=FIND)
    assert getattr(found, field) == least
    others = {"num_hidden_layers", "sliding_window", "num_key_value_heads"} - {field}
    assert {name: getattr(found, name) for name in others} == {name: getattr(usual, name) for name in others}


def test_a_scene_shrinks_to_ordinary_weights_and_few_tokens() -> None:
    found = simplest(ours.scenes(), lambda s: s.config.num_hidden_layers >= 2, settings=FIND)
    assert (found.config.num_hidden_layers, found.kind, found.seed) == (2, "ordinary", 0)
    assert found.input_ids == ((0, 0),)
    assert eval(repr(found), {"Scene": ours.Scene, "Gemma2Config": Gemma2Config}) == found


@given(ours.configs(num_hidden_layers=2, head_dim=8))
def test_fixed_fields_are_kept(config: Gemma2Config) -> None:
    assert (config.num_hidden_layers, config.head_dim) == (2, 8)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "numbers"),
    [
        # IEEE 754: sign, 5 bits of exponent with a bias of 15, 10 of fraction.
        ("float16", [0x0000, 0x8000, 0x0001, 0x3C00, 0xC000, 0x7BFF, 0x7C00, 0x7E00],
         [0.0, -0.0, 2.0**-24, 1.0, -2.0, 65504.0, np.inf, np.nan]),
        # The upper half of a float32: 8 bits of exponent, 7 of fraction.
        ("bfloat16", [0x0000, 0x8000, 0x0001, 0x3F80, 0xC000, 0x7F7F, 0xFF80, 0x7FC0],
         [0.0, -0.0, 2.0**-133, 1.0, -2.0, 2.0**127 * (2 - 2.0**-7), -np.inf, np.nan]),
        ("float32", [0x00000001, 0x7F7FFFFF], [2.0**-149, 2.0**127 * (2 - 2.0**-23)]),
        ("float64", [0x0000000000000001, 0x3FF0000000000001], [2.0**-1074, 1 + 2.0**-52]),
    ],
)  # fmt: skip
def test_bit_patterns_mean_their_numbers(dtype: str, bits: list[int], numbers: list[float]) -> None:
    made = ours.from_bits(bits, dtype)
    plain = np.asarray(made.view(np.ndarray), np.float64)
    assert np.array_equal(plain, numbers, equal_nan=True)
    assert np.array_equal(np.signbit(plain), np.signbit(numbers))
    assert isinstance(made, {"bfloat16": BF16, "float16": F16}.get(dtype, np.ndarray))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_activations_are_written_by_their_bits(dtype: str) -> None:
    @SMALL
    @given(ours.activations(dtype, finite=False))
    def come_back(x: np.ndarray) -> None:
        again = eval(write_value(x), {"from_bits": ours.from_bits})
        assert type(again) is type(x)
        assert np.array_equal(again.view(np.ndarray), x.view(np.ndarray), equal_nan=True)

    come_back()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activations_reach_every_kind_of_number(dtype: str) -> None:
    smallest = {"float16": 2.0**-14, "bfloat16": 2.0**-126}[dtype]
    plain = ours.activations(dtype, 1, finite=False).map(lambda x: float(x.view(np.ndarray)[0]))
    for wanted in (np.isnan, np.isinf, lambda x: 0 < abs(x) < smallest):
        assert wanted(simplest(plain, lambda x, wanted=wanted: bool(wanted(x)), settings=FIND))


@SMALL
@given(ours.activations("bfloat16"))
def test_finite_activations_are_finite(x: np.ndarray) -> None:
    assert np.isfinite(x).all()


# --- what a call is given ---------------------------------------------------------------------------------------------


@SMALL
@given(st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), ours.cache_splits(n))))
def test_calls_read_the_whole_text(drawn: tuple[int, list[int]]) -> None:
    length, calls = drawn
    assert sum(calls) == length
    assert min(calls) >= 1


@SMALL
@given(ours.positions(7, limit=100))
def test_positions_increase_within_their_limit(places: np.ndarray) -> None:
    assert places.shape == (1, 7)
    assert (np.diff(places) >= 1).all()
    assert 0 <= places.min() <= places.max() < 100


@SMALL
@given(ours.configs().flatmap(lambda c: st.tuples(st.just(c), ours.token_batches(c))))
def test_batches_have_padding_on_one_side_and_a_token_in_each_row(drawn: tuple[Gemma2Config, ours.TokenBatch]) -> None:
    config, batch = drawn
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert 0 <= batch.input_ids.min() <= batch.input_ids.max() < config.vocab_size
    assert batch.attention_mask.any(axis=1).all()
    steps = np.diff(batch.attention_mask, axis=1)
    assert (steps >= 0).all() or (steps <= 0).all()


@SMALL
@given(ours.configs().flatmap(lambda c: st.tuples(st.just(c), ours.weights(c))))
def test_weights_are_numbers_of_every_precision(drawn: tuple[Gemma2Config, dict[str, np.ndarray]]) -> None:
    for x in drawn[1].values():
        assert x.dtype == np.float32
        assert not (x.view(np.uint32) & 0xFFFF).any()  # the lower half of a bfloat16 number is 0


# --- text -------------------------------------------------------------------------------------------------------------


@SMALL
@given(ours.texts(), ours.chat_messages())
def test_texts_and_chats_can_be_written(text: str, messages: list[dict[str, str]]) -> None:
    assert text.encode("utf-8").decode("utf-8") == text
    assert [m["role"] for m in messages] == [("user", "assistant")[n % 2] for n in range(len(messages))]


@pytest.mark.parametrize("wanted", ["<start_of_turn>", "\u2581", "\n\n"])
def test_texts_hold_what_looks_like_a_special_token(wanted: str) -> None:
    assert wanted in simplest(ours.texts(), lambda text: wanted in text, settings=FIND)


def test_texts_reach_beyond_the_basic_plane() -> None:
    assert simplest(ours.texts(), lambda text: any(ord(c) > 0xFFFF for c in text), settings=FIND)
