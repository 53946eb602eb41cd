"""What a caller can get wrong: each input refused with its place and what is needed."""

import numpy as np
import pytest

from refgemma.config import Gemma2Config
from refgemma.heads import causal_lm_loss
from refgemma.inputs import InputError, check_inputs

CONFIG = Gemma2Config(vocab_size=61, num_hidden_layers=1, max_position_embeddings=20)


@pytest.mark.parametrize(
    ("input_ids", "reason"),
    [
        ([], "input_ids is empty"),
        ([[]], "input_ids is empty"),
        ([2, 3], r"shape \(2,\): \(batch, seq\) is needed, \[ids\] for a single sequence"),
        ([[[2]]], r"shape \(1, 1, 1\)"),
        (
            [[2, 3, 4], [2, 3]],
            "ragged: row 1 has 2 tokens, row 0 has 3; pad the shorter rows and pass an attention_mask",
        ),
        ([np.array([2, 3]), np.array([2])], "input_ids is ragged"),
        ([[10**30]], "dtype object: token ids are whole numbers"),
        ([[2.0, 3.0]], "dtype float64: token ids are whole numbers"),
        ([["2"]], "dtype <U1"),
        ([[True]], "dtype bool"),
        ([[2, 61]], r"input_ids\[0, 1\] is 61: not in the vocabulary of 61 tokens \(0 to 60\)"),
        ([[2], [-1]], r"input_ids\[1, 0\] is -1"),
    ],
)
def test_token_ids(input_ids: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs(input_ids, CONFIG)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([[1, 1, 1]], r"attention_mask has shape \(1, 3\), but \(1, 5\) is needed.*those in the cache included"),
        ([[1, 1, 1, 1, 2]], "may hold 1 .* and 0"),
        ([[0.5] * 5], "may hold 1"),
        ([[1, 1], [1]], "attention_mask is ragged"),
    ],
)
def test_attention_masks(mask: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_inputs([[2, 3]], CONFIG, attention_mask=mask, seen=3)


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
    with pytest.warns(UserWarning, match=r"beyond max_position_embeddings \(20\)"):
        check_inputs([[2]], CONFIG, seen=20)


def test_labels() -> None:
    logits = np.zeros((1, 3, 61))
    with pytest.raises(InputError, match=r"labels have shape \(1, 2\)"):
        causal_lm_loss(logits, [[1, 2]])
    with pytest.raises(InputError, match="labels is ragged"):
        causal_lm_loss(logits, [[1, 2, 3], [1]])
    with pytest.raises(InputError, match="label 61 is neither -100 nor one of the 61 classes"):
        causal_lm_loss(logits, [[1, 61, 2]])
