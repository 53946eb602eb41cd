"""Test transformers as a backend: laws and recordings for its three attention implementations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma2ForCausalLM

from refgemma.config import Gemma2Config
from refgemma.hub import find_model, golden_folder
from refgemma.testing import properties
from refgemma.testing.adapters import Transformers, TransformersEager, TransformersFlex, TransformersSdpa
from refgemma.testing.laws import Law
from refgemma.testing.recordings import check_golden
from refgemma.testing.strategies import Scene

ADAPTERS = [TransformersEager, TransformersSdpa, TransformersFlex]


def config(**changes: Any) -> Gemma2Config:
    sizes = {
        "vocab_size": 17, "hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 3,
    }  # fmt: skip
    return Gemma2Config(**sizes | changes)


TEXTS = ((3, 5, 7, 11, 2, 6, 1), (1, 2, 16, 4, 9, 9, 3))
UNCAPPED = Scene(config(attn_logit_softcapping=None), TEXTS)
ONE_TEXT = Scene(config(attn_logit_softcapping=None, vocab_size=7), ((3, 5, 2),))
GAPS = np.array([[4, 5, 9, 10, 40, 41, 47]])  # which transformers, without a mask, takes for several texts

# Laws that hold for all three, where there is no cap.
HELD: list[tuple[Law, dict[str, Any]]] = [
    (properties.causality, {"scene": UNCAPPED, "place": 3, "step": 1}),
    (properties.chunks_change_nothing, {"scene": UNCAPPED, "calls": [4, 1, 2]}),
    (properties.a_cache_can_be_continued_twice, {"scene": UNCAPPED, "calls": [5, 2]}),
    (properties.left_padding_changes_nothing, {"scene": UNCAPPED, "padded": [0, 4]}),
    (properties.left_padding_in_calls_changes_nothing, {"scene": UNCAPPED, "padded": [0, 4], "calls": [3, 3, 1]}),
    (properties.only_distances_count, {"scene": UNCAPPED, "places": GAPS, "shift": 100}),
    (properties.the_stream_is_a_sum, {"scene": UNCAPPED}),
    (properties.results_are_of_their_precision, {"scene": UNCAPPED}),
    (properties.what_is_saved_is_loaded_again, {"scene": UNCAPPED}),
    (properties.the_loss_is_a_mean_cross_entropy, {"scene": UNCAPPED, "labels": [[1, 2, -100, 3, 4, 0, 0]] * 2}),
    (properties.draws_follow_the_probabilities, {"scene": ONE_TEXT, "seed": 0}),
    (properties.a_search_with_all_beams_finds_the_best, {"scene": ONE_TEXT}),
]

# Laws about the cap of attention, which torch's fused attention has not.
CAPPED = Scene(config(attn_logit_softcapping=1e-20), TEXTS)
BENT = Scene(config(attn_logit_softcapping=0.5, num_hidden_layers=1), TEXTS)
ABOUT_THE_CAP: list[tuple[Law, dict[str, Any]]] = [
    (properties.a_vanishing_attention_cap_makes_all_keys_alike, {"scene": CAPPED, "seed": 0}),
    (properties.the_attention_cap_counts, {"scene": BENT}),
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("law", "example"), HELD, ids=[law.name for law, _ in HELD])
def test_laws_that_hold(adapter: type[Transformers], law: Law, example: dict[str, Any]) -> None:
    law(adapter(), **example)


@pytest.mark.parametrize(("law", "example"), ABOUT_THE_CAP, ids=[law.name for law, _ in ABOUT_THE_CAP])
def test_the_missing_cap_of_sdpa_is_found(law: Law, example: dict[str, Any]) -> None:
    for adapter in (TransformersEager(), TransformersFlex()):
        law(adapter, **example)
    with pytest.raises(AssertionError, match="attention cap"):
        law(TransformersSdpa(), **example)


@pytest.mark.parametrize("adapter", [TransformersEager, TransformersFlex])
@pytest.mark.parametrize("case", ["bends-forward-f32", "bends-decode-left-padded-f32", "bends-forward-bf16"])
def test_recordings_are_met(adapter: type[Transformers], case: str) -> None:
    check_golden(adapter(), case)


def test_recordings_find_the_missing_cap_of_sdpa() -> None:
    check_golden(TransformersSdpa(), "no-caps-forward-f32")
    with pytest.raises(AssertionError, match=r"first calls.0.layers.0.attention.mixed"):
        check_golden(TransformersSdpa(), "bends-forward-f32")


def test_transformers_itself_refuses_sdpa() -> None:
    # If it does no longer, the adapter need not go past it, and docs/property-tests.md is out of date.
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        Gemma2ForCausalLM.from_pretrained(golden_folder() / "models" / "bends", attn_implementation="sdpa")


def test_what_is_shown_is_what_is_claimed() -> None:
    for adapter in (TransformersEager(), TransformersSdpa(), TransformersFlex()):
        model = adapter.load(Path(find_model("conformance")), "float32")
        detect = adapter.forward(model, np.array([[2, 5, 7]]), tensors=("*",)).tensors
        assert all(adapter.capabilities().shows(name) for name in detect)
        last = f"layers.{model.config.num_hidden_layers - 1}."
        claimed = [name.replace("layers.*.", last) for name in adapter.capabilities().tensors if not name.endswith("*")]
        assert set(claimed) <= set(detect)
