"""Check that the laws for gradients hold on transformers, and find mistakes that were made in PyTorch.

`python tests/parity/test_gradient_laws_parity.py` tries every mistake with every law, and writes the table of
docs/property-tests.md.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_trainers_parity import MAKE, attention

from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.testing.adapters import TransformersEager
from refgemma.testing.interface import Capabilities
from refgemma.testing.properties import LAWS
from refgemma.testing.strategies import Scene

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))

from gradients import Float64

GRADIENT_LAWS = [name for name, law in LAWS.items() if "gradients" in law.needs]
SLOPE = "the_gradient_is_the_slope_of_the_loss"
PAGE = Path(__file__).parents[2] / "docs" / "property-tests.md"
BEGIN, END = "<!-- python tests/parity/test_gradient_laws_parity.py -->", "<!-- end of gradient laws -->"


class Eager64(TransformersEager):
    """transformers' own model in float64, without its float32 steps."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), dtypes=("float64",))

    def _prepare_run(self) -> Any:
        return Float64()


BACKENDS: dict[str, type[TransformersEager]] = {name: TransformersEager for name in GRADIENT_LAWS} | {SLOPE: Eager64}

# Text with a token that occurs twice, and layers in which window and caps act.
EXAMPLE: dict[str, Any] = {
    "scene": Scene(
        Gemma2Config(
            vocab_size=11, hidden_size=8, intermediate_size=5, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, query_pre_attn_scalar=3, sliding_window=2,
            attn_logit_softcapping=2.0, final_logit_softcapping=2.0, layer_types=[SLIDING, FULL],
        ),
        ((2, 5, 7, 5, 3, 9), (2, 4, 8, 6, 8, 1)), seed=1,
    ),
}  # fmt: skip
PLACES = {name: [4] for name in GRADIENT_LAWS} | {SLOPE: [3, 4, 5]}  # each moves another third of the weights


def detach_embedding(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A tied table learns as head only."""
    if model.config.tie_word_embeddings:
        usual = model.model.embed_tokens.forward
        model.model.embed_tokens.forward = lambda ids: usual(ids).detach()


def detach_head(model: Any, patch: pytest.MonkeyPatch) -> None:
    """A tied table learns as embedding only."""
    if model.config.tie_word_embeddings:
        MAKE["tied-embedding-embedding-only"](model, patch)


def count_padding(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Padding tokens are labels."""
    usual = model.forward

    def forward(*given: Any, attention_mask: Any = None, labels: Any = None, **named: Any) -> Any:
        if labels is not None and attention_mask is not None:
            labels = torch.where(attention_mask == 0, 1, labels)
        return usual(*given, attention_mask=attention_mask, labels=labels, **named)

    model.forward = forward


def causal_only(mask: Any) -> Any:
    """Return a causal mask, without window and padding."""
    n = mask.shape[-1]
    return torch.full((n, n), torch.finfo(mask.dtype).min, dtype=mask.dtype).triu(1)[None, None]


# Two mistakes of the catalogue know the shape of one batch; here they are made for any shape.
MISTAKES: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = MAKE | {
    "tied-embedding-head-only": detach_embedding,
    "tied-embedding-embedding-only": detach_head,
    "padding-counted": count_padding,
    "attn-backward-without-window": attention(mask=causal_only),
    "backward without a mask": attention(mask=torch.zeros_like),
}
FOUND = {
    "gradients_of_two_parts_of_the_labels_add_up": ["loss-mean-of-means", "loss-divided-twice"],
    "gradients_of_the_rows_of_a_batch_add_up": ["loss-mean-of-means", "embedding-last-token-wins"],
    "the_number_of_items_divides_gradients": ["loss-summed", "loss-mean-of-means"],
    "tokens_after_the_last_label_teach_nothing": ["backward without a mask", "labels-not-shifted"],
    "a_tied_table_learns_as_embedding_and_as_head": ["tied-embedding-head-only", "tied-embedding-embedding-only"],
    "padding_changes_no_gradient": ["padding-counted", "attn-backward-without-window"],
    SLOPE: ["final-softcap-no-derivative", "norm-weight-gradient-missing"],
}


def finds(law: str, mistake: str, patch: pytest.MonkeyPatch) -> bool:
    """Return True if a law does not hold in the example after a mistake was made."""

    class Mistaken(BACKENDS[law]):  # type: ignore[misc]
        def load(self, folder: Any, dtype: str) -> Any:
            model = super().load(folder, dtype)
            patch.undo()  # of the model that was loaded before
            MISTAKES[mistake](model, patch)
            return model

    try:
        for place in PLACES[law]:
            LAWS[law](Mistaken(), **EXAMPLE | {"place": place})
    except AssertionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GRADIENT_LAWS if name != SLOPE])
def test_a_law_holds(name: str) -> None:
    LAWS[name](TransformersEager(), "dev")


@pytest.mark.parametrize("name", GRADIENT_LAWS)
def test_a_law_holds_in_the_example(name: str) -> None:
    for place in PLACES[name]:
        LAWS[name](BACKENDS[name](), **EXAMPLE | {"place": place})


def test_every_law_is_here() -> None:
    assert FOUND.keys() == set(GRADIENT_LAWS)


@pytest.mark.parametrize(("law", "mistake"), [(law, mistake) for law, some in FOUND.items() for mistake in some])
def test_a_law_finds_a_mistake(law: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finds(law, mistake, monkeypatch)


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> str:
    """Return Markdown: for each mistake the laws that find it."""
    lines = ["| mistake made in PyTorch | laws that find it |", "| --- | --- |"]
    for mistake in MISTAKES:
        found = []
        for law in GRADIENT_LAWS:
            with pytest.MonkeyPatch.context() as patch:
                if finds(law, mistake, patch):
                    found.append(f"`{law}`")
        lines.append(f"| {mistake} | {', '.join(found) or 'none'} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")
