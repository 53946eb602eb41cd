"""The comparison at full size, on two layers of the 9B with synthetic weights: it conforms, and mistakes are found."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refgemma import fast
from refgemma.config import Gemma2Config
from refgemma.oracle import full_size
from refgemma.oracle.full_size import full_result, load_full, verify_full
from refgemma.oracle.sketch import PROJECTIONS, SAMPLES, sketch
from refgemma.oracle.verify import CaseResult, GoldenError

NAME = "9b-synthetic-two-layers"


def result(dtype: str = "float32", reference: bool = True) -> CaseResult:
    comparisons = [step for step in verify_full(NAME, dtype, reference=reference) if not isinstance(step, str)]
    return full_result(NAME, dtype, comparisons)


def test_two_layers_conform() -> None:
    found = result()
    assert found.conforms, found.first_divergence
    names = load_full(NAME)[0]["names"]
    assert {c.tensor for c in found.comparisons} == {*names, "top_ids", "top_logits", "loss"}


def test_fast_layers_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mistake in them is found, at the layer that makes it."""
    found = result(reference=False)
    assert found.conforms, found.first_divergence
    layers = {f"calls.0.layers.{layer}.out" for layer in (0, 1)}
    others = {f"calls.0.{name}" for name in ("cos", "sin", "embedded", "norm", "raw_logits", "logits")}
    assert {c.tensor for c in found.comparisons} == layers | others | {"top_ids", "top_logits", "loss"}
    correct = fast.weigh
    monkeypatch.setattr(fast, "weigh", lambda scores, seen, scale, cap: correct(scores, seen, scale * 1.01, cap))
    first = result(reference=False).first_divergence
    assert first is not None
    assert first.tensor == "calls.0.layers.0.out"


# A change of the configuration, and the first tensor that it has to be found at.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "scalar 224 in place of 256": ({"query_pre_attn_scalar": 224}, "calls.0.layers.0.attention.scores"),
    "no attention cap": ({"attn_logit_softcapping": None}, "calls.0.layers.0.attention.capped"),
    "no final cap": ({"final_logit_softcapping": None}, "calls.0.logits"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_at_full_width(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, first = MISTAKES[mistake]
    preset = Gemma2Config.preset
    monkeypatch.setattr(full_size.Gemma2Config, "preset", lambda name: replace(preset(name), **change))
    found = result()
    assert found.first_divergence is not None
    assert found.first_divergence.tensor == first


def test_recordings_that_are_not_there() -> None:
    with pytest.raises(GoldenError, match="unknown recording '9b'; there are"):
        load_full("9b")
    with pytest.raises(GoldenError, match="was recorded in float32 and bfloat16, not in float16"):
        list(verify_full(NAME, "float16"))


@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_every_element_counts_in_a_sketch(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size)
    place = int(rng.integers(size))
    moved = np.where(np.arange(size) == place, x + 1, x)
    change = (sketch(moved) - sketch(x))[-PROJECTIONS:]
    assert np.abs(change).max() > 0
    assert len(sketch(x)) == 2 + SAMPLES + PROJECTIONS
    # Independent errors of size e make errors of size e: six of them, from a random direction each, seldom beyond five.
    noise = rng.standard_normal(size)
    assert np.abs(sketch(x + noise) - sketch(x))[-PROJECTIONS:].max() < 7
