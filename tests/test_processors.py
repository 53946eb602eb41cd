"""What the settings do to scores: each cut keeps what it says."""

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
from refgemma.generation.processors import keep_min_p, keep_top_k, keep_top_p

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
