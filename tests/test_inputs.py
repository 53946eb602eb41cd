"""Test invalid inputs: each error names the place and the requirement."""

import numpy as np
import pytest

from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.heads import causal_lm_loss
from refgemma.inputs import InputError, check_inputs

CONFIG = Gemma2Config(vocab_size=61, num_hidden_layers=1, max_position_embeddings=20)


@pytest.mark.parametrize(
    ("input_ids", "reason"),
    [
        ([], "input_ids is empty"),
        ([[]], "input_ids is empty"),
        ([2, 3], r"shape \(2,\); it must be \(batch, seq\): \[ids\] for a single sequence"),
        ([[[2]]], r"shape \(1, 1, 1\)"),
        (
            [[2, 3, 4], [2, 3]],
            "ragged: row 1 has 2 tokens, row 0 has 3; pad the shorter rows and pass an attention_mask",
        ),
        ([np.array([2, 3]), np.array([2])], "input_ids is ragged"),
        ([[10**30]], "dtype object; token ids must be whole numbers"),
        ([[2.0, 3.0]], "dtype float64; token ids must be whole numbers"),
        ([["2"]], "dtype <U1"),
        ([[True]], "dtype bool"),
        ([[2, 61]], r"input_ids\[0, 1\] is 61; the vocabulary has 61 tokens \(0 to 60\)"),
        ([[2], [-1]], r"input_ids\[1, 0\] is -1"),
    ],
)
def test_token_ids(input_ids: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs(input_ids, CONFIG)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([[1, 1, 1]], r"attention_mask has shape \(1, 3\); it must be \(1, 5\).*including the tokens in the cache"),
        ([[1, 1, 1, 1, 2]], "may contain only 1 .* and 0"),
        ([[0.5] * 5], "may contain only 1"),
        ([[1, 1], [1]], "attention_mask is ragged"),
    ],
)
def test_attention_masks(mask: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs([[2, 3]], CONFIG, attention_mask=mask, seen=3)


LOWEST = np.finfo(np.float32).min
BLIND = np.zeros((1, 1, 2, 5))
BLIND[0, 0, 1] = -np.inf


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.ones((1, 1, 2, 5), int), r"shape \(1, 1, 2, 5\) and dtype int64; with four axes, it must hold true and"),
        (np.ones((1, 1, 2, 4), bool), r"it must be \(batch, 1 or heads, seq, tokens so far\) = \(1, '1 or 16', 2, 5\)"),
        (np.ones((1, 3, 2, 5), bool), r"attention_mask has shape \(1, 3, 2, 5\)"),
        (np.ones((2, 1, 2, 5), bool), r"attention_mask has shape \(2, 1, 2, 5\)"),
        (np.full((1, 1, 2, 5), np.nan), "NaN or \\+inf"),
        (np.full((1, 1, 2, 5), np.inf), "NaN or \\+inf"),
        (BLIND, r"attention_mask\[0, 0, 1\] is minus infinity for every key.*use np.finfo"),
        ({"full_attention": BLIND}, "they must be 'full_attention' and 'sliding_attention'"),
        ({"full_attention": np.ones((1, 5)), "sliding_attention": np.ones((1, 5))}, "with four axes"),
    ],
)
def test_masks_of_ones_own(mask: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs([[2, 3]], CONFIG, attention_mask=mask, seen=3)


def test_a_mask_of_ones_own_is_taken_as_it_is() -> None:
    """A mask may be for one head or all, one row or all, and for both types of layer or each."""
    mask = np.where(np.eye(2, 5, dtype=bool), 0, LOWEST).astype(np.float32)[None, None]
    inputs = check_inputs([[2, 3], [2, 4]], CONFIG, attention_mask=mask, seen=3)
    for given in (inputs.masks, inputs.biases):
        assert given is not None
        assert {kind: m.shape for kind, m in given.items()} == {FULL: (2, 1, 2, 5), SLIDING: (2, 1, 2, 5)}
    # Numbers are added to the scores, and hide nothing by themselves; true and false hide, and nothing is added.
    seen = np.arange(80).reshape(1, 16, 1, 5) % 2 == np.array([[0], [1]])
    inputs = check_inputs([[2, 3]], CONFIG, attention_mask={FULL: mask, SLIDING: seen}, seen=3)
    assert inputs.masks is not None
    assert inputs.biases is not None
    assert inputs.masks[FULL].all()
    np.testing.assert_array_equal(inputs.masks[SLIDING], seen)
    assert set(inputs.biases) == {FULL}
    np.testing.assert_array_equal(inputs.biases[FULL], mask)


@pytest.mark.parametrize(
    ("embeds", "reason"),
    [
        (np.zeros((1, 2)), r"inputs_embeds has shape \(1, 2\)"),
        (np.zeros((1, 2, 5)), r"it must be numbers of shape \(batch, seq, 3072\)"),
        (np.zeros((1, 2, 3072), int), "dtype int64"),
        (np.zeros((1, 0, 3072)), "inputs_embeds has shape"),
        ([[1.0], [1.0, 2.0]], "inputs_embeds is ragged"),
    ],
)
def test_embeddings_as_input(embeds: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs(None, CONFIG, inputs_embeds=embeds)


def test_tokens_or_embeddings_and_only_one_of_them() -> None:
    for ids, embeds in ((None, None), ([[2]], np.zeros((1, 1, 3072)))):
        with pytest.raises(InputError, match="either input_ids or inputs_embeds, not both"):
            check_inputs(ids, CONFIG, inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("positions", "reason"),
    [([[0]], "shape"), ([[0.0, 1.0]], "float64"), ([[0, -1]], "negative")],
)
def test_positions(positions: object, reason: str) -> None:
    with pytest.raises(InputError, match=rf"position_ids has .*{reason}"):
        check_inputs([[2, 3]], CONFIG, position_ids=positions)


def test_places_go_on_after_the_cache_and_positions_follow_them() -> None:
    inputs = check_inputs([[2, 3]], CONFIG, seen=7)
    assert inputs.places.tolist() == [7, 8]
    assert inputs.positions.tolist() == [[7, 8]]
    assert inputs.visible.shape == (1, 9)
    assert inputs.visible.all()


def test_the_last_known_position_does_not_warn() -> None:
    check_inputs([[2]], CONFIG, seen=19)
    with pytest.warns(UserWarning, match=r"exceeds max_position_embeddings \(20\)"):
        check_inputs([[2]], CONFIG, seen=20)


def test_labels() -> None:
    logits = np.zeros((1, 3, 61))
    with pytest.raises(InputError, match=r"labels have shape \(1, 2\)"):
        causal_lm_loss(logits, [[1, 2]])
    with pytest.raises(InputError, match="labels is ragged"):
        causal_lm_loss(logits, [[1, 2, 3], [1]])
    with pytest.raises(InputError, match="label 61 is neither -100 nor a class"):
        causal_lm_loss(logits, [[1, 61, 2]])
