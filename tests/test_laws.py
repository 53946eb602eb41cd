"""Test how close two results must be for a law: rounding in a file is allowed for, and overflow is left out, but
nothing else."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from refgemma.config import Gemma2Config
from refgemma.testing.backends import NumpyBackend
from refgemma.testing.interface import Unsupported
from refgemma.testing.laws import FILE_ROUNDOFF, PROFILES, REFUSALS_IN_A_ROW, Bench, Law, Refused, Search
from refgemma.testing.properties import LAWS, NORM
from refgemma.testing.strategies import Scene

CONFIG = Gemma2Config(
    vocab_size=11, hidden_size=16, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, sliding_window=2, query_pre_attn_scalar=3,
)  # fmt: skip
# One weight of the norm after feed-forward is 1.5e-6: neither -2 - w nor 8 (1 + w) - 1 nor (w - 1) / 2 is float32.
TINY = {"scene": Scene(CONFIG, ((1, 2, 3),), "ordinary", 161)}
# The same for the last norm, with a weight of 1.1e-5.
TINY_LAST = {"scene": Scene(CONFIG, ((1, 2, 3),), "ordinary", 2641)}


@pytest.mark.parametrize(
    ("law", "example"),
    [
        ("norm_weights_count_from_minus_one", TINY | {"which": "post_feedforward_layernorm"}),
        ("norm_weights_count_from_minus_one", TINY_LAST | {"which": "norm"}),
        ("norms_before_a_layer_erase_the_size_of_the_stream", TINY | {"power": 3}),
        (
            "the_embedding_scale_grows_with_the_root_of_the_width",
            {"scene": Scene(CONFIG, ((1, 2, 3),), "ordinary", 14022)},
        ),
    ],
)
def test_a_weight_that_the_file_rounds_breaks_no_law(law: str, example: dict[str, Any]) -> None:
    LAWS[law](NumpyBackend(), **example)


def test_only_a_weight_that_float32_does_not_have_widens_the_tolerance() -> None:
    scene = TINY["scene"]
    with Bench(NumpyBackend()) as bench:
        model = bench.scene(scene)
        exact = bench.allowed(model, lambda m: m.logits(scene.ids))
        assert exact < 1e-12
        bench.scene(scene, {NORM: -2 - scene.tensors[NORM].astype(np.float64)})
        assert bench.allowed(model, lambda m: m.logits(scene.ids)) == exact  # every -2 - w of this norm is float32
        rounded = bench.scene(scene, {NORM: scene.tensors[NORM] + np.float64(1e-9)})
        assert bench.allowed(model, lambda m: m.logits(scene.ids)) > FILE_ROUNDOFF
        assert rounded.tensors[NORM].dtype == np.float32


def test_scores_that_overflow_float16_break_no_law() -> None:
    config = Gemma2Config(
        vocab_size=11, hidden_size=6, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=2, query_pre_attn_scalar=3, attn_logit_softcapping=None,
    )  # fmt: skip
    LAWS["attention_weights_sum_to_one"](NumpyBackend(), scene=Scene(config, ((0, 0),), "huge norms", 0))


def search_refusing(accepted: range) -> Search:
    """Search for an example with a law that accepts only some examples, by their number; it draws no models."""
    seen: list[int] = []

    def check(bench: Bench, **example: int) -> None:
        seen.append(1)
        if len(seen) - 1 not in accepted:
            raise Unsupported("not this one")

    return Search(Law("any", "any", check, st.fixed_dictionaries({"n": st.integers()}), ()), NumpyBackend())


@pytest.mark.parametrize("profile", ["dev", "ci", "deep"])
def test_a_search_ends_if_every_example_is_refused(profile: str) -> None:
    search = search_refusing(range(0))
    with pytest.raises(Refused, match="not this one"):
        search.run(PROFILES[profile])
    assert sum(search.refused.values()) == REFUSALS_IN_A_ROW == 90


def test_a_search_goes_on_if_an_example_was_accepted() -> None:
    search = search_refusing(range(REFUSALS_IN_A_ROW - 1, REFUSALS_IN_A_ROW + 100))
    search.run(PROFILES["dev"])
    assert search.checked == PROFILES["dev"].max_examples
    search = search_refusing(range(1))
    search.run(PROFILES["dev"])
    assert search.checked == 1
    assert sum(search.refused.values()) > REFUSALS_IN_A_ROW
