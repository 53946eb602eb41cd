"""Test the documented classes: construction, results, errors. `parity/test_documented_names.py` and
`parity/test_modeling_parity.py` compare numbers with transformers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.config import ConfigError, Gemma2Config
from refgemma.generation.outputs import ModelOutput
from refgemma.heads import causal_lm_loss
from refgemma.inputs import InputError
from refgemma.modeling.classes import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
)
from refgemma.weights.checkpoint import CheckpointError

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 5, "num_labels": 3,
    "initializer_range": 0.3,
}  # fmt: skip
CONFIG = Gemma2Config(**SHAPE)
CLASSES = [Gemma2Model, Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2ForTokenClassification]
IDS = np.random.default_rng(0).integers(4, 60, (2, 7))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_seed_makes_the_same_weights_and_another_others(cls: Any) -> None:
    one, same, other = (cls.from_config(CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    assert one.keys() == same.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, same[name])
        assert (tensor != other[name]).any() == (tensor.ndim == 2)


def test_weights_begin_as_documented() -> None:
    """A normal of standard deviation 0.02, truncated at twice that; norms, biases and the padding's embedding are
    zero."""
    config = Gemma2Config(**SHAPE | {"initializer_range": 0.02, "attention_bias": True, "intermediate_size": 4000})
    state = Gemma2ForCausalLM.from_config(config).state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 1:
            assert not tensor.any(), name
        else:
            assert np.abs(tensor).max() <= 0.04, name
    assert not state["model.embed_tokens.weight"][0].any()
    drawn = state["model.layers.1.mlp.up_proj.weight"]
    # The standard deviation of a normal cut at two is 0.8796 of it; of 96,000 numbers it is known to 1 in 400.
    assert abs(drawn.std() / (0.8796 * 0.02) - 1) < 0.01
    assert abs(drawn.mean()) < 4 * 0.02 / math.sqrt(drawn.size)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_makes_the_same_model(cls: Any) -> None:
    model = cls.from_config(CONFIG, seed=3)
    again = cls.from_state_dict(CONFIG, model.state_dict())
    np.testing.assert_array_equal(again(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("model.norm.weight"), "lacks 'model.norm.weight'"),
        (lambda state: state.update({"model.norm.weight": np.zeros(3)}), r"has shape \(3,\); according to"),
        (lambda state: state.update(extra=np.zeros(3)), "has 'model.extra'|has 'extra'"),
    ],
)
def test_state_dicts_that_do_not_fit(change: Any, reason: str) -> None:
    state = Gemma2ForCausalLM.from_config(CONFIG).state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=reason):
        Gemma2ForCausalLM.from_state_dict(CONFIG, state)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_comes_back_is_asked_for_in_the_call_or_in_the_configuration(cls: Any) -> None:
    model = cls.from_config(CONFIG)
    plain = model(IDS)
    assert isinstance(plain, ModelOutput)
    assert set(plain) == {"last_hidden_state" if cls is Gemma2Model else "logits"} | (
        {"past_key_values"} if cls is not Gemma2ForTokenClassification else set()
    )
    asked = model(IDS, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert [len(asked.hidden_states), len(asked.attentions)] == [4, 3]
    assert "past_key_values" not in asked
    always = CONFIG.changed(output_hidden_states=True, output_attentions=True, use_cache=False, return_dict=False)
    configured = cls.from_state_dict(always, model.state_dict())(IDS)
    assert isinstance(configured, tuple)
    assert len(configured) == 3
    np.testing.assert_array_equal(configured[1][-1], asked.hidden_states[-1])


def test_classifiers_pool_at_the_last_token_on_either_side() -> None:
    model = Gemma2ForSequenceClassification.from_config(CONFIG, seed=2)
    alone = model(IDS[:1, :4]).logits
    right = model([[*IDS[0, :4], 0, 0]]).logits
    # Trailing padding is after the last token, which does not see it: sums of the same numbers in another shape.
    np.testing.assert_allclose(right, alone, rtol=0, atol=1e-5)
    left = model(
        [[0, 0, *IDS[0, :4]]], attention_mask=[[0, 0, 1, 1, 1, 1]], position_ids=[[0, 0, 0, 1, 2, 3]]
    ).logits  # fmt: skip
    np.testing.assert_allclose(left, alone, rtol=0, atol=1e-5)


def test_classifiers_without_a_pad_id_take_one_row() -> None:
    model = Gemma2ForSequenceClassification.from_config(CONFIG.changed(pad_token_id=None))
    assert model(IDS[:1]).logits.shape == (1, 3)
    with pytest.raises(InputError, match="there are 2 sequences, but pad_token_id is None"):
        model(IDS)


def test_classifiers_of_embeddings_take_the_last_place_and_say_so() -> None:
    model = Gemma2ForSequenceClassification.from_config(CONFIG)
    embeds = np.random.default_rng(0).standard_normal((2, 7, 24)).astype(np.float32)
    with pytest.warns(UserWarning, match="padding is not visible in inputs_embeds"):
        pooled = model(inputs_embeds=embeds).logits
    states = Gemma2Model(CONFIG, weights=model.weights)(inputs_embeds=embeds).last_hidden_state
    np.testing.assert_allclose(pooled, states[:, -1] @ model.score.weight.T, rtol=0, atol=1e-5)


def test_losses_by_hand() -> None:
    config = CONFIG.changed(num_labels=2)
    model = Gemma2ForSequenceClassification.from_config(config, seed=4)
    a, b = model(IDS[:1]).logits[0].astype(np.float64)
    # float32 losses of logits of about 1.
    close = {"rel": 1e-5, "abs": 1e-6}
    assert model(IDS[:1], labels=[1]).loss == pytest.approx(math.log(1 + math.exp(a - b)), **close)
    both = math.log(1 + math.exp(-a)) + math.log(1 + math.exp(b))
    other = Gemma2ForSequenceClassification(config.changed(), weights=model.weights, score=model.score)
    assert other(IDS[:1], labels=[[1.0, 0.0]]).loss == pytest.approx(both / 2, **close)
    numbers = Gemma2ForSequenceClassification(
        config.changed(problem_type="regression"), weights=model.weights, score=model.score
    )
    assert numbers(IDS[:1], labels=[[0.5, 2.0]]).loss == pytest.approx(((a - 0.5) ** 2 + (b - 2) ** 2) / 2, **close)
    ignored = Gemma2ForTokenClassification.from_config(config)
    assert math.isnan(ignored(IDS, labels=np.full(IDS.shape, -100)).loss)
    causal = Gemma2ForCausalLM.from_config(CONFIG)
    answer = causal(IDS, labels=IDS)
    assert answer.loss == pytest.approx(causal_lm_loss(answer.logits, IDS), rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "labels", "reason"),
    [
        (Gemma2ForCausalLM, [[1, 2]], r"labels have shape \(1, 2\)"),
        (Gemma2ForTokenClassification, np.full(IDS.shape, 3), "label 3 is neither -100 nor a class"),
        (Gemma2ForSequenceClassification, [0], "for each of the 2 sequences"),
        (Gemma2ForSequenceClassification, [[1, 0, 0], [0, 1, 0]], "for each of the 2 sequences"),
    ],
)
def test_labels_that_do_not_fit(cls: Any, labels: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        cls.from_config(CONFIG)(IDS, labels=labels)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (-1, "logits_to_keep is -1"),
        (np.array([7]), "places from -7 to 6"),
        (np.array([0.5]), "dtype float64"),
        (np.ones((2, 3), bool), r"booleans in shape \(2, 7\)"),
    ],
)
def test_logits_to_keep_that_do_not_fit(kept: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Gemma2ForCausalLM.from_config(CONFIG)(IDS, logits_to_keep=kept)


def test_logits_to_keep_by_places_of_each_row() -> None:
    model = Gemma2ForCausalLM.from_config(CONFIG)
    whole = model(IDS).logits
    mask = np.arange(7) >= np.array([[3], [5]])
    # The head of fewer rows may be summed in another order: float32 sums of 24 products of logits of about 10.
    for kept, expected in (
        (2, whole[:, -2:]), (np.array([0, 3]), whole[:, [0, 3]]), (mask, whole[mask]),
        (np.array([[0], [6]]), np.stack([whole[0, [0]], whole[1, [6]]])),
    ):  # fmt: skip
        np.testing.assert_allclose(model(IDS, logits_to_keep=kept).logits, expected, rtol=0, atol=24 * 10 * 2**-24)


def test_a_configuration_in_place_of_a_model_and_the_other_way_round() -> None:
    with pytest.raises(ConfigError, match="config is a dict; it must be a Gemma2Config"):
        Gemma2Model({"vocab_size": 3})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"to load a model by name use Gemma2Model\.from_pretrained"):
        Gemma2Model("tiny")  # type: ignore[arg-type]


def test_a_model_without_a_head_of_its_own_is_warned_of(tmp_path: Path) -> None:
    Gemma2ForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no classifier's head"):
        model = Gemma2ForSequenceClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "trained")
    again = Gemma2ForSequenceClassification.from_pretrained(tmp_path / "trained")
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match="no bias; Gemma2ForTokenClassification"):
        Gemma2ForTokenClassification.from_pretrained(tmp_path / "trained")
    more = CONFIG.num_hidden_layers + 1
    with pytest.raises(ConfigError, match=r"model\.layers\.\d\.input_layernorm\.weight is missing"):
        Gemma2ForCausalLM.from_pretrained(tmp_path, num_hidden_layers=more)
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight has shape .*change the shapes"):
        Gemma2ForCausalLM.from_pretrained(tmp_path, vocab_size=7)


def test_what_is_saved_says_what_it_is(tmp_path: Path) -> None:
    Gemma2ForTokenClassification.from_config(CONFIG, dtype="bfloat16").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["Gemma2ForTokenClassification"]
    assert raw["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="a function, which JSON cannot hold"):
        Gemma2Model.from_config(CONFIG.changed(hidden_activation=np.tanh)).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_function_as_activation() -> None:
    named = Gemma2Model.from_config(CONFIG.changed(hidden_activation="relu"), seed=1)
    given = Gemma2Model.from_config(CONFIG.changed(hidden_activation=lambda x: np.maximum(x, 0)), seed=1)
    np.testing.assert_array_equal(given(IDS).last_hidden_state, named(IDS).last_hidden_state)


def test_the_functions_are_the_classes() -> None:
    """`refgemma.forward`, which keeps every tensor, equals the class, which keeps only requested tensors."""
    model = Gemma2ForCausalLM.from_config(CONFIG, seed=1)
    run = refgemma.forward(IDS, model.weights, CONFIG)
    answer = model(IDS, output_hidden_states=True, output_attentions=True)
    np.testing.assert_array_equal(answer.logits, run.logits)
    np.testing.assert_array_equal(answer.hidden_states[-1], run.norm)
    np.testing.assert_array_equal(answer.hidden_states[1], run.layers[0].out)
    np.testing.assert_array_equal(answer.attentions[2], run.layers[2].attention.probs)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", np.float32, np.dtype("float64")], ids=str)
def test_a_dtype_by_its_name_or_as_numpy_has_it(dtype: Any) -> None:
    wanted = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    assert Gemma2ForCausalLM.from_pretrained("tiny", dtype=dtype).dtype == wanted
    assert Gemma2Model.from_config(CONFIG, dtype=dtype).dtype == wanted


def test_arguments_that_belong_to_transformers_are_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match="load_in_4bit=True: refgemma does not quantise weights"):
        Gemma2ForCausalLM.from_pretrained("tiny", load_in_4bit=True)
    with pytest.raises(ConfigError, match="attn_implementation='sdpa': refgemma computes as transformers' 'eager'"):
        Gemma2Model.from_pretrained("tiny", attn_implementation="sdpa")
    with pytest.raises(ValueError, match="unknown dtype 'int8'; it must be one of float64, float32"):
        Gemma2Model.from_pretrained("tiny", dtype="int8")


def test_names_at_the_top() -> None:
    for name in refgemma.__all__:
        assert getattr(refgemma, name) is not None
