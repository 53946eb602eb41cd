"""The laws for gradients that need no float64, on transformers: they hold, and find mistakes made in PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity.test_trainers_parity import MAKE, attention

from refgemma.testing.adapters import TransformersEager
from refgemma.testing.laws import LawBroken
from refgemma.testing.properties import LAWS

GRADIENT_LAWS = [name for name, law in LAWS.items() if "gradients" in law.needs and "dtype:float64" not in law.needs]


def detach_embedding(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A tied table learns as head only."""
    if model.config.tie_word_embeddings:
        usual = model.model.embed_tokens.forward
        model.model.embed_tokens.forward = lambda ids: usual(ids).detach()


def detach_head(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A tied table learns as embedding only."""
    if model.config.tie_word_embeddings:
        MAKE["tied-embedding-embedding-only"](model, patch)


MISTAKES: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = MAKE | {
    "tied table, head only": detach_embedding,
    "tied table, embedding only": detach_head,
    "backward without a mask": attention(mask=torch.zeros_like),
}
FOUND = {
    "gradients_of_two_parts_of_the_labels_add_up": ["loss-mean-of-means", "loss-divided-twice"],
    "the_number_of_items_divides_gradients": ["loss-summed", "loss-mean-of-means"],
    "tokens_after_the_last_label_teach_nothing": ["backward without a mask", "labels-not-shifted"],
    "a_tied_table_learns_as_embedding_and_as_head": ["tied table, head only", "tied table, embedding only"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT_LAWS)
def test_a_law_holds(name: str) -> None:
    LAWS[name](TransformersEager(), "dev")


def test_every_law_is_here() -> None:
    assert FOUND.keys() == set(GRADIENT_LAWS)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "mistake"), [(law, mistake) for law, some in FOUND.items() for mistake in some])
def test_a_law_finds_a_mistake(law: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mistaken(TransformersEager):
        def load(self, folder: Any, dtype: str) -> Any:
            model = super().load(folder, dtype)
            MISTAKES[mistake](model, monkeypatch)
            return model

    with pytest.raises(LawBroken, match=law):
        LAWS[law](Mistaken(), "dev")
