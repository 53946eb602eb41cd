"""Test the effect of settings on scores: each setting keeps the right tokens."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_model import call_with

import refgemma
from refgemma.generation.decode import (
    Decoding,
    generate,
)
from refgemma.generation.generation_config import resolve_settings
from refgemma.generation.processors import (
    add_biases,
    favour_ends,
    keep_allowed,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
)

TINY = refgemma.load("tiny")
PROMPT = TINY.tokenizer.encode("Once upon a time")


def run(**settings) -> list[int]:
    return list(generate(PROMPT, TINY.weights, TINY.config, **{"max_new_tokens": 8, **settings}))


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = np.log([0.1, 0.4, 0.05, 0.25, 0.2])
    assert np.isfinite(keep_top_k(logits, 2)).tolist() == [False, True, False, True, False]
    # 0.4 + 0.25 is short of 0.7, so the token that passes it stays too.
    assert np.isfinite(keep_top_p(logits, 0.7)).tolist() == [False, True, False, True, True]
    assert np.isfinite(keep_top_p(logits, 1.0)).all()
    assert np.isfinite(keep_top_k(logits, 99)).all()


def test_min_p_keeps_what_it_says() -> None:
    shares = np.log([0.5, 0.3, 0.15, 0.05])
    assert np.isfinite(keep_min_p(shares, 0.31)).tolist() == [True, True, False, False]
    assert np.isfinite(keep_min_p(shares, 1.0, min_kept=2)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    tokens = run(temperature=temperature)
    assert len(tokens) == 8
    if temperature < 1:
        assert tokens == run()


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


def test_all_settings_in_the_order_of_transformers() -> None:
    """Expected scores are from transformers 5.23's processors for these settings and scores."""
    call = call_with(
        sequence_bias={(3,): -1.0, (5, 2, 0): 2.0}, repetition_penalty=2.0, no_repeat_ngram_size=2,
        bad_words_ids=[[7], [2, 6], [1, 4]], eos_token_id=[4], exponential_decay_length_penalty=(1, 2.0),
        suppress_tokens=[1], renormalize_logits=True, max_length=9,
    )  # fmt: skip
    scores, ids = np.array([[2.0, -1.0, 0.5, 3.0, -0.5, 1.5, -2.0, 0.0]], np.float32), np.array([[1, 2, 5, 2]])
    settings = resolve_settings(call, prompt_length=2, vocab_size=8, limit=64)
    how = Decoding(settings, np.zeros(1, int), allowed=lambda text, row: [0, 1, 2, 3, 4, 5])
    expected = [-0.16311218, -np.inf, -3.9131122, -2.1631122, -4.1631122, -np.inf, -np.inf, -np.inf]
    np.testing.assert_allclose(how.scores(ids, scores), [expected], rtol=1e-6)
    drawn = replace(settings, do_sample=True, temperature=4.0, top_k=3, typical_p=0.8)
    expected = [-0.47407699, -np.inf, -np.inf, -0.97407699, -np.inf, -np.inf, -np.inf, -np.inf]
    np.testing.assert_allclose(replace(how, settings=drawn).scores(ids, scores), [expected], rtol=1e-6)


def test_biases_and_forced_tokens_by_hand() -> None:
    scores = np.array([[1.0, 2.0, -np.inf]], np.float32)
    assert add_biases(scores, np.array([[0]]), [([1, 1, 0], 5.0)]).tolist() == scores.tolist()  # a text too short
    assert add_biases(scores, np.array([[1, 0]]), [([1, 0, 1], -np.inf), ([0], 1.0)]).tolist() == [
        [2, -np.inf, -np.inf]
    ]
    assert favour_ends(scores, 5, 5, 2.0, [0]).tolist() == scores.tolist()
    assert favour_ends(scores, 6, 5, 2.0, [0, 2]).tolist() == [[2.0, 2.0, -np.inf]]
    assert np.isfinite(favour_ends(scores, 9, 0, 1e300, [0])[:, :2]).all()
    # Both beams of the first text have nothing left; of the second one has.
    rows = np.array([[-np.inf, 1.0], [-np.inf, 2.0], [-np.inf, 3.0], [4.0, 5.0]], np.float32)
    found = keep_allowed(rows, np.zeros((4, 1), int), lambda text, ids: [0], num_beams=2)
    assert found.tolist() == [[0, -np.inf], [0, -np.inf], [-np.inf, -np.inf], [4.0, -np.inf]]


def test_typical_keeps_what_it_says() -> None:
    shares = np.log([0.6, 0.3, 0.1])  # -log p: 0.51, 1.20, 2.30; the entropy is 0.90
    assert np.isfinite(keep_typical(shares, 0.2)).tolist() == [False, True, False]
    assert np.isfinite(keep_typical(shares, 0.2, min_kept=2)).tolist() == [True, True, False]
    assert np.isfinite(keep_typical(shares, 0.5)).tolist() == [True, True, False]
    assert np.isfinite(keep_typical(np.log([0.6, 0.3, 0.1]), 0.95)).all()
