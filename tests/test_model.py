"""Test the forward pass as a whole: names, precision, and laws of a causal model. test_golden compares values."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from small_model import SMALL, refused

import refgemma
from refgemma import fast, model
from refgemma.cache import Cache, empty_cache
from refgemma.generation.perplexity import token_losses
from refgemma.goldens.full_size import sketches_of
from refgemma.hub import golden_folder
from refgemma.layers import Block
from refgemma.model import forward, next_token_logits, unembed
from refgemma.modeling.classes import Gemma2ForCausalLM, Gemma2Model
from refgemma.precision import BF16, F16, Rounded
from refgemma.trace.names import named_tensors, run_in_order
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import HEAD_ROWS, LayerWeights, Weights

CHECKPOINT = open_checkpoint(golden_folder() / "models" / "bends")
CONFIG = CHECKPOINT.config
IDS = np.random.default_rng(5).integers(4, CONFIG.vocab_size, (2, 13))

LAYER = """input_layernorm attention.q attention.k attention.v attention.q_rot attention.k_rot attention.scores
attention.capped attention.probs attention.mixed attention.out post_attention_layernorm middle
pre_feedforward_layernorm feed_forward.gate feed_forward.up feed_forward.gelu feed_forward.product feed_forward.out
post_feedforward_layernorm out""".split()


def test_names_of_the_trace() -> None:
    """The names are an interface, because files of other people's runs use them."""
    names = [name for name, _ in named_tensors(forward(IDS, CHECKPOINT.resident(), CONFIG))]
    layers = [f"layers.{n}.{name}" for n in range(CONFIG.num_hidden_layers) for name in LAYER]
    assert names == ["cos", "sin", "embedded", *layers, "norm", "raw_logits", "logits"]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", BF16), ("float16", F16)])
def test_no_tensor_is_silently_widened(dtype: str, kind: type[Rounded]) -> None:
    run = forward(IDS, CHECKPOINT.resident(dtype), CONFIG)
    assert not [name for name, x in named_tensors(run) if type(x) is not kind]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_weights_precision_is_the_computations(dtype: str) -> None:
    run = forward(IDS, CHECKPOINT.resident(dtype), CONFIG)
    assert {x.dtype.name for _, x in named_tensors(run)} == {dtype}


def test_a_token_changes_nothing_before_it() -> None:
    weights = CHECKPOINT.resident("float64")
    changed = IDS.copy()
    changed[:, 8] = (changed[:, 8] + 1) % CONFIG.vocab_size
    one, other = forward(IDS, weights, CONFIG).logits, forward(changed, weights, CONFIG).logits
    np.testing.assert_array_equal(one[:, :8], other[:, :8])
    assert (one[:, 8:] != other[:, 8:]).any(axis=-1).all()


def test_a_sliding_layer_forgets_exactly_after_its_window() -> None:
    only_sliding = replace(CONFIG, num_hidden_layers=1, layer_types=None)
    weights = CHECKPOINT.resident("float64")
    changed = IDS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % CONFIG.vocab_size
    same = (forward(IDS, weights, only_sliding).logits == forward(changed, weights, only_sliding).logits).all(axis=-1)
    first_blind = 3 + CONFIG.sliding_window
    assert same[:, :3].all()
    assert not same[:, 3:first_blind].any()  # the last of these sees the changed token as its window's first key
    assert same[:, first_blind:].all()


@pytest.mark.parametrize("calls", [(13,), (1,) * 13, (4, 6, 3), (5, 8), (6, 1, 6)])
def test_any_division_into_calls_gives_the_same(calls: tuple[int, ...]) -> None:
    weights = CHECKPOINT.resident("float64")
    whole = forward(IDS, weights, CONFIG).logits
    cache, done, parts = None, 0, []
    for length in calls:
        run = forward(IDS[:, done : done + length], weights, CONFIG, cache=cache)
        parts.append(run.logits)
        cache, done = run.cache, done + length
    # float64: the same sums, perhaps in another order. Four layers of seven products of up to 56 terms are some 1e3
    # roundings in a row.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e3 * 2**-53 * np.abs(whole).max())


def test_a_cache_is_not_changed_by_going_on_from_it() -> None:
    weights = CHECKPOINT.resident()
    cache = forward(IDS[:, :7], weights, CONFIG).cache
    first = forward(IDS[:, 7:9], weights, CONFIG, cache=cache).logits
    forward(IDS[:, 9:], weights, CONFIG, cache=cache)
    np.testing.assert_array_equal(first, forward(IDS[:, 7:9], weights, CONFIG, cache=cache).logits)


def test_sliding_layers_keep_a_window_and_full_layers_everything() -> None:
    cache = forward(IDS, CHECKPOINT.resident(), CONFIG).cache
    kept = [layer.keys.shape[2] for layer in cache]
    assert kept == [CONFIG.sliding_window - 1, 13, CONFIG.sliding_window - 1, 13]
    assert {layer.stop for layer in cache} == {13}


def test_a_padded_row_gives_what_it_gives_alone() -> None:
    """Left padding shifts all positions equally, and only differences count."""
    weights = CHECKPOINT.resident("float64")
    alone = forward(IDS[:1, 4:], weights, CONFIG).logits
    padded, mask = np.zeros((1, 13), int), np.zeros((1, 13), int)
    padded[:, 4:], mask[:, 4:] = IDS[:1, 4:], 1
    shifted = forward(padded, weights, CONFIG, attention_mask=mask).logits[:, 4:]
    # The angles are float32 (that is part of the model): a shifted position rounds each of them anew, by 2**-24 of up
    # to 13 radians, in four layers; 1e2 such roundings cover that.
    np.testing.assert_allclose(shifted, alone, rtol=0, atol=1e2 * 2**-24 * np.abs(alone).max())
    positions = np.maximum(np.arange(13) - 4, 0)[None]
    placed = forward(padded, weights, CONFIG, attention_mask=mask, position_ids=positions).logits[:, 4:]
    np.testing.assert_allclose(placed, alone, rtol=0, atol=1e3 * 2**-53 * np.abs(alone).max())  # as in the test above


def test_next_token_logits_is_forward() -> None:
    weights = CHECKPOINT.resident()
    logits, cache = next_token_logits(IDS[:, :7], weights, CONFIG)
    run = forward(IDS[:, :7], weights, CONFIG)
    # The head multiplies one row instead of seven, which BLAS may sum in another order: a rounding for each of the
    # `hidden_size` terms.
    np.testing.assert_allclose(
        logits, run.logits[:, -1:], rtol=0, atol=CONFIG.hidden_size * 2**-24 * np.abs(run.logits).max()
    )
    for ours, expected in zip(cache, run.cache, strict=True):
        np.testing.assert_array_equal(ours.keys, expected.keys)
        assert ours.start == expected.start


def test_streamed_weights_give_the_same_run() -> None:
    resident = forward(IDS, CHECKPOINT.resident("bfloat16"), CONFIG)
    streamed = forward(IDS, CHECKPOINT.streamed("bfloat16"), CONFIG)
    for (name, x), (_, y) in zip(named_tensors(resident), named_tensors(streamed), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_large_head_is_computed_in_pieces() -> None:
    table = np.random.default_rng(0).standard_normal((2 * HEAD_ROWS + 5, 3))
    norm = np.random.default_rng(1).standard_normal((1, 2, 3))
    np.testing.assert_array_equal(unembed(norm, table), norm @ table.T)


def test_an_empty_cache_changes_nothing() -> None:
    weights = CHECKPOINT.resident()
    nothing = empty_cache(CONFIG, batch=2, like=weights.norm)
    np.testing.assert_array_equal(
        forward(IDS, weights, CONFIG, cache=nothing).logits, forward(IDS, weights, CONFIG).logits
    )


def test_beyond_the_longest_sequence_it_warns() -> None:
    short = replace(CONFIG, max_position_embeddings=12)
    with pytest.warns(UserWarning, match=r"exceeds max_position_embeddings \(12\)"):
        forward(IDS, CHECKPOINT.resident(), short)


def test_the_tiny_models_shape_hides_nothing() -> None:
    config = refgemma.load("tiny").config
    assert config.num_attention_heads != config.num_key_value_heads
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.query_pre_attn_scalar != config.head_dim
    assert np.log2(config.query_pre_attn_scalar) % 1 != 0
    assert refgemma.bf16(config.hidden_size**0.5) != np.float32(config.hidden_size**0.5)
    assert config.sliding_window < config.max_position_embeddings / 2
    kinds = [config.is_sliding(layer) for layer in range(config.num_hidden_layers)]
    assert kinds.count(True) > 1
    assert kinds.count(False) > 1
    axes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim, config.sliding_window,
            config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim]  # fmt: skip
    assert len(set(axes)) >= len(axes) - 1  # 2 x 32 key widths and a window of 64 are the one coincidence


def test_a_cache_of_another_model_batch_or_precision_is_refused() -> None:
    weights = CHECKPOINT.resident()
    cache = forward(IDS, weights, CONFIG).cache
    wrong = {
        "fewer layers": (IDS, weights, Cache(cache[:2])),
        "another batch": (IDS[:1], weights, cache),
        "another precision": (IDS, CHECKPOINT.resident("bfloat16"), cache),
    }
    for ids, other_weights, other_cache in wrong.values():
        with pytest.raises(refgemma.InputError, match="continue from a cache that the same model returned"):
            forward(ids, other_weights, CONFIG, cache=other_cache)


def test_what_is_dropped_from_a_cache_is_not_kept_in_memory() -> None:
    for layer in forward(IDS, CHECKPOINT.resident(), CONFIG).cache:
        kept = layer.keys if layer.keys.base is None else layer.keys.base
        assert kept.size == layer.keys.size


class Watched(Sequence[LayerWeights]):
    """Layers that notice if the previous layer is still in memory when the next is requested."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self.layers, self.given = layers, []

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer):
        assert not [reference for reference in self.given if reference() is not None]
        weights = replace(self.layers[layer])  # a new object, held by nobody else
        self.given.append(weakref.ref(weights))
        return weights


def test_decoding_holds_one_layer_at_a_time() -> None:
    """Otherwise a 27B that is read from disk would be resident."""
    resident = CHECKPOINT.resident()
    watched = replace(resident, layers=Watched(resident.layers))
    next_token_logits(IDS, watched, CONFIG)
    forward(IDS, watched, CONFIG)
    assert len(watched.layers.given) == 2 * CONFIG.num_hidden_layers


def read_all(weights: Weights) -> None:
    for _ in run_in_order(IDS, weights, CONFIG):
        pass


def read_sketches(weights: Weights) -> None:
    for _ in sketches_of(IDS, [IDS.shape[1]], weights, CONFIG):
        pass


RUNS: dict[str, Callable[[Weights], Any]] = {
    "next_token_logits": lambda weights: next_token_logits(IDS, weights, CONFIG),
    "reference_outputs": lambda weights: token_losses(IDS[0].tolist(), weights, CONFIG, model.reference_outputs),
    "the documented class": lambda weights: Gemma2Model(CONFIG, weights=weights)(IDS, output_hidden_states=True),
    "fast, in half precision": lambda weights: fast.next_token_logits(IDS, CHECKPOINT.resident("bfloat16"), CONFIG),
    "run_in_order": read_all,
    "sketches_of": read_sketches,
}


@pytest.mark.parametrize("name", RUNS)
def test_one_block_is_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is computed, no record of an earlier block is left, neither here nor in the caller."""
    compute, records = model.block, []

    def watched(*given: Any, **named: Any) -> Block:
        assert [n for n, record in enumerate(records) if record() is not None] == []
        record = compute(*given, **named)
        records.append(weakref.ref(record))
        return record

    monkeypatch.setattr(model, "block", watched)
    RUNS[name](CHECKPOINT.resident())
    assert len(records) == CONFIG.num_hidden_layers


def test_reading_for_the_next_token_is_reading() -> None:
    """With a mask, positions, a cache, or embeddings, the result is the last logits of `forward` and its cache."""
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
        "lm_head.weight is missing from the weights, and tie_word_embeddings is false",
    )
    untied = replace(SMALL.weights, lm_head=2 * SMALL.weights.embed_tokens)
    # Twice the head, without a cap: twice the logits, to the last bit.
    raw = [
        forward([[3]], weights, config).raw_logits for weights in (untied, replace(untied, lm_head=untied.lm_head / 2))
    ]
    np.testing.assert_array_equal(raw[0], 2 * raw[1])
