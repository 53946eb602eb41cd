"""Compare losses and log probabilities with results computed by hand."""

import math
from typing import Any

import numpy as np
import pytest
from small_model import refused

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
            f"label {label} is neither -100 nor a class (0 to 2)",
        )


def test_the_causal_loss_is_of_the_next_token() -> None:
    logits = np.log(np.stack([ODDS, ODDS[::-1]]))
    # Row 0: 0.25 for token 1 after the first, 0.7 for 2 after the second; row 1: 0.05 for 0 after the first.
    labels = np.array([[0, 1, 2, -100], [2, 0, -100, -100]])
    by_hand = -(math.log(0.25) + math.log(0.7) + math.log(0.05)) / 3
    assert causal_lm_loss(logits, labels) == pytest.approx(by_hand, abs=1e-12)
    first = -math.log(0.25)
    assert causal_lm_loss(logits[:1, :2], [[2, 1]]) == pytest.approx(first, abs=1e-12)
    needed = "they must be whole numbers of shape (2, 4)"
    refused(lambda: causal_lm_loss(logits, [[1, 2]]), f"labels have shape (1, 2) and dtype int64: {needed}")
    refused(lambda: causal_lm_loss(logits, np.zeros((2, 4))), f"labels have shape (2, 4) and dtype float64: {needed}")
    refused(lambda: causal_lm_loss(logits, [[1], [1, 2]]), "labels is ragged: its rows have different lengths")


def test_the_loss_of_a_token_classifier_is_of_the_same_token() -> None:
    logits = np.log(np.stack([ODDS, ODDS[::-1]]))
    by_hand = -(math.log(0.5) + math.log(0.8) + math.log(0.5)) / 3
    labels = np.array([[0, -100, -100, 2], [-100, -100, -100, 1]])
    logits[1, 3] = np.log([0.25, 0.5, 0.25])
    assert token_classification_loss(logits, labels) == pytest.approx(by_hand, abs=1e-12)
    assert token_classification_loss(logits[:1, :1], [[0]]) == pytest.approx(-math.log(0.5), abs=1e-12)
    needed = "they must be whole numbers of shape (2, 4)"
    refused(lambda: token_classification_loss(logits, [[1, 2]]), f"labels have shape (1, 2) and dtype int64: {needed}")
    refused(
        lambda: token_classification_loss(logits, np.zeros((2, 4))),
        f"labels have shape (2, 4) and dtype float64: {needed}",
    )
    refused(
        lambda: token_classification_loss(logits, [[1], [1, 2]]),
        "labels is ragged: its rows have different lengths",
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

    a_class = "they must be one whole number from 0 to 2 for each of the 2 sequences"
    wrong([1], None, f"labels have shape (1,) and dtype int64: {a_class}")
    wrong([0.0, 1.0], "single_label_classification", f"labels have shape (2,) and dtype float64: {a_class}")
    numbers = "they must be numbers of shape (2, 3)"
    wrong([1.0], "regression", f"labels have shape (1,) and dtype float64: {numbers}")
    wrong(np.ones((2, 3), bool), "regression", f"labels have shape (2, 3) and dtype bool: {numbers}")
    fractions = "they must be numbers from 0.0 to 1.0 of shape (2, 3), one for each class"
    wrong([0.0, 1.0], None, f"labels have shape (2,) and dtype float64: {fractions}")
    wrong([[1, 0, 0]] * 2, "multi_label_classification", f"labels have shape (2, 3) and dtype int64: {fractions}")
    wrong([[1], [1, 2]], None, "labels is ragged: its rows have different lengths")
    for loss in (mean_squared_error, binary_cross_entropy):
        refused(lambda loss=loss: loss(three, [[1], [1, 2]]), "labels is ragged: its rows have different lengths")
