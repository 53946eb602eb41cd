"""Test the comparison at full size, on two layers of the synthetic 9B: it conforms, and bugs are found."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from full_size_mistakes import at_full_size, found_at
from hypothesis import given
from hypothesis import strategies as st

from refgemma import fast
from refgemma.config import Gemma2Config
from refgemma.goldens import full_size
from refgemma.goldens.full_size import full_result, load_full, verify_full
from refgemma.goldens.load import GoldenError
from refgemma.goldens.sketch import PROJECTIONS, SAMPLES, sketch
from refgemma.goldens.verify import CaseResult

pytestmark = pytest.mark.slow

NAME = "9b-synthetic-two-layers"
TOP = ("top_ids", "top_order", "top_logits")


def result(dtype: str = "float32", reference: bool = True) -> CaseResult:
    comparisons = [step for step in verify_full(NAME, dtype, reference=reference) if not isinstance(step, str)]
    return full_result(NAME, dtype, comparisons)


def test_two_layers_conform() -> None:
    found = result()
    assert found.conforms, found.first_divergence
    names = load_full(NAME)[0]["names"]
    assert {c.tensor for c in found.comparisons} == {*names, *TOP, "loss"}


def test_fast_layers_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the fast layers is found, at the layer with the bug."""
    found = result(reference=False)
    assert found.conforms, found.first_divergence
    steps = [step for step in verify_full(NAME, reference=False) if isinstance(step, str)]
    # As many as the progress bar counts to.
    assert sorted(steps) == sorted(full_size.steps_of(load_full(NAME)[0]["names"], reference=False))
    layers = {f"calls.0.layers.{layer}.out" for layer in (0, 1)}
    others = {f"calls.0.{name}" for name in ("cos", "sin", "embedded", "norm", "raw_logits", "logits")}
    assert {c.tensor for c in found.comparisons} == layers | others | {*TOP, "loss"}
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


@pytest.mark.parametrize(
    ("ours", "ids", "order"),
    [
        ([90.0, 50.0, 40.0, 39.9999, 10.0], 0.0, 0.0),
        ([90.0, 50.0, 39.9999, 40.0, 10.0], 0.0, 1e-4 / 0.0027),  # PyTorch's own lead, in units of 3e-5 * 90
        ([50.0, 90.0, 40.0, 39.9999, 10.0], 0.0, 40 / 0.0027),
        ([90.0, 50.0, 40.0, 39.9999, 40.5], (40.5 - 39.9999) / 0.0027, 0.0),  # one that PyTorch has not among the four
        ([90.0, 50.0, 40.0, 39.9998, 39.9999], 0.0, 0.0),  # the same, but its logit is that of PyTorch's last
    ],
)
def test_places_may_change_only_within_rounding(ours: list[float], ids: float, order: float) -> None:
    logit = np.array([90.0, 50.0, 40.0, 39.9999])
    golden = {"top_ids.float32": np.arange(4), "top_logits.float32": logit}
    recorded = full_size.Recorded("float32", {}, logit, logit, logit)
    found = {c.tensor: c for c in full_size._compare_top("calls.0.logits", np.array(ours), golden, recorded)}
    assert found["top_ids"].distance == pytest.approx(ids)
    assert found["top_order"].distance == pytest.approx(order)


def test_in_half_precision_the_first_has_to_be_the_first() -> None:
    """float32 and bfloat16 differ by a hundredth everywhere; two runs may then differ by about two hundredths."""
    logit = np.array([9.0, 8.0, 7.99])
    golden = {"top_ids.bfloat16": np.arange(3), "top_logits.bfloat16": logit}
    sketches = np.zeros((1, 40))
    recorded = full_size.Recorded("bfloat16", {"calls.0.logits": 0}, sketches, sketches + 0.01, sketches)

    def distances(ours: list[float]) -> tuple[float, float]:
        found = {c.tensor: c for c in full_size._compare_top("calls.0.logits", np.array(ours), golden, recorded)}
        return found["top_ids"].distance, found["top_order"].distance

    assert distances([9.1, 7.9, 8.1, 1.0]) == (0, 0)
    assert distances([8.5, 8.6, 8.0, 1.0])[1] > 30
    assert distances([9.0, 8.0, 7.9, 9.1])[0] > 30


def test_few_elements_far_off_are_no_mistake_in_half_precision() -> None:
    """A few attention weights in each row are large; the scores are up to 30, with errors of a tenth."""
    rng = np.random.default_rng(1)
    names = {f"calls.0.layers.{layer}.attention.probs": layer for layer in range(3)}

    def probs(scores: np.ndarray, error: float) -> np.ndarray:
        exponentials = np.exp(scores + error * rng.standard_normal(scores.shape))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def distances(error: float) -> list[float]:
        found = []
        for _ in range(100):
            scores = 10 * rng.standard_normal((3, 256, 64))
            half, single = (np.stack([sketch(x) for x in probs(scores, size)]) for size in (0.1, 0))
            recorded = full_size.Recorded("bfloat16", names, half, single, single)
            found.append(recorded.sketch_distance("calls.0.layers.1.attention.probs", sketch(probs(scores[1], error))))
        return found

    assert max(distances(0.1)) <= 1
    assert np.median(distances(1)) > 1


@pytest.mark.parametrize("name", ["norm rounded before its weight", "sqrt(hidden) not rounded"])
def test_rounding_elsewhere_is_found_at_full_width(name: str) -> None:
    """The error is no larger than the rounding of a whole run, but the first tensors have few roundings."""
    mistake, recording, dtype = next(made for made in at_full_size() if made[0].name == name)
    found = found_at(mistake, recording, dtype)
    assert found is not None
    assert found[0] == f"calls.0.{mistake.first}"


def test_recordings_that_are_not_there() -> None:
    with pytest.raises(GoldenError, match="unknown recording '9b'; the recordings are"):
        load_full("9b")
    with pytest.raises(GoldenError, match="there is no recording in float16"):
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
