"""Test every name of the Transformers documentation page of Gemma 2, set to a value that has an effect. Both libraries
agree, and the result differs from the result without the name. (Mixtures are in `test_modeling_parity.py`.)"""

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import refgemma.modeling.classes
from refgemma.config import Gemma2Config
from refgemma.goldens.distance import END_TO_END

PAGE: dict[str, dict[str, str | None]] = json.loads(
    (Path(__file__).parents[1] / "documentation_page.json").read_text(encoding="utf-8")
)
BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 5, "num_labels": 3,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "initializer_range": 0.3,
}  # fmt: skip
CLASSES = [
    "Gemma2Model", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification", "Gemma2ForTokenClassification",
]  # fmt: skip
IDS = np.random.default_rng(0).integers(4, 60, (2, 13))
IDS[1, 9:] = 0
LABELS = {
    "Gemma2ForCausalLM": np.where(IDS == 0, -100, IDS),
    "Gemma2ForSequenceClassification": np.array([2, 0]),
    "Gemma2ForTokenClassification": np.where(IDS % 3 == 0, -100, IDS % 3),
}

torch.set_num_threads(1)
for warm_up in (torch.cos, torch.sin, torch.tanh, torch.exp, torch.rsqrt):
    warm_up(torch.ones(1))  # MKL's first call can race (pytorch#188792)


def pair(name: str, **shape: Any) -> tuple[Any, Any]:
    """Return the same model in both libraries, also with random norms and biases."""
    config = transformers.Gemma2Config(**BASE | shape)
    torch.manual_seed(0)
    theirs = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    tensors = {n: x.numpy() for n, x in theirs.state_dict().items()}
    return theirs, getattr(refgemma.modeling.classes, name).from_state_dict(Gemma2Config(**BASE | shape), tensors)


def as_torch(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    return {key: torch.tensor(x) for key, x in value.items()} if isinstance(value, dict) else value


def arrays(output: Any) -> dict[str, Any]:
    """Return all numbers of an output, by name or index; a cache layer by layer."""
    if isinstance(output, transformers.DynamicCache):
        output = [(layer.keys, layer.values) for layer in output.layers]
    if isinstance(output, torch.Tensor):
        return {"": output.detach().numpy()}
    if isinstance(output, np.ndarray | np.floating):
        return {"": np.asarray(output)}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    return {f"{key}.{inner}": x for key, item in items for inner, x in arrays(item).items()}


def call(model: Any, arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that padding is not visible in inputs_embeds: both say so
        if isinstance(model, torch.nn.Module):
            with torch.no_grad():
                return model(**{key: as_torch(value) for key, value in arguments.items()})
        return model(**arguments)


def assert_agree(theirs: Any, ours: Any) -> None:
    """Require equal names and types, and float32 numbers within 5e-6 of the array's largest, which was asked for."""
    assert isinstance(ours, tuple) == isinstance(theirs, tuple)
    expected, found = arrays(theirs), arrays(ours)
    assert list(found) == list(expected)
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, rtol=0, atol=END_TO_END * max(1e-30, np.abs(x).max()), err_msg=key)


def differ(one: Any, other: Any) -> bool:
    a, b = arrays(one), arrays(other)
    return list(a) != list(b) or any(a[k].shape != b[k].shape or not np.array_equal(a[k], b[k]) for k in a)


ARGUMENTS: dict[str, Any] = {
    "input_ids": (IDS + 1) % 61,
    "attention_mask": (np.arange(13) > np.array([[2], [5]])).astype(int),
    "position_ids": np.array([[*range(7), *range(3, 9)]] * 2),
    "past_key_values": "from an earlier call",
    "inputs_embeds": np.random.default_rng(1).standard_normal((2, 13, 24)).astype(np.float32),
    "labels": "of the class",
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "cache_position": np.arange(9, 13),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_argument(name: str, argument: str) -> None:
    documented = PAGE[f"{name}.forward"]
    assert (argument in documented) == (
        argument in inspect.signature(getattr(refgemma.modeling.classes, name)).parameters
        or (argument in inspect.signature(getattr(refgemma.modeling.classes, name).forward).parameters)
    )
    if argument not in documented:
        assert (name, argument) == ("Gemma2Model", "labels")
        return
    theirs, ours = pair(name)
    plain: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    if argument in ("past_key_values", "cache_position"):
        assert_continues(theirs, ours, argument)
        return
    given = plain | {argument: LABELS[name] if argument == "labels" else ARGUMENTS[argument]}
    if argument == "inputs_embeds":
        del given["input_ids"]
    answer = call(ours, given)
    expected = call(theirs, given)
    if argument == "attention_mask":  # rows of padding mean nothing, and differ where no key can be seen
        answer, expected = (call(model, given | {"use_cache": False}) for model in (ours, theirs))
        if name != "Gemma2ForSequenceClassification":
            kept = given["attention_mask"] == 1
            answer, expected = [np.asarray(answer[0])[kept]], [expected[0].numpy()[kept]]
    assert_agree(expected, answer)
    changes = name != "Gemma2ForTokenClassification" or argument != "use_cache"  # it returns no cache in any case
    assert differ(call(ours, plain), call(ours, given)) == changes


def assert_continues(theirs: Any, ours: Any, argument: str) -> None:
    """Test a cache of nine tokens, then four more, as a `Cache` and as the legacy tuple; the format is kept."""
    base_theirs = theirs.model if hasattr(theirs, "model") else theirs
    base_ours = ours.model if hasattr(ours, "model") else ours
    first_theirs, first = call(base_theirs, {"input_ids": IDS[:, :9]}), call(base_ours, {"input_ids": IDS[:, :9]})
    following = {"input_ids": IDS[:, 9:], "past_key_values": first_theirs.past_key_values}
    expected = call(theirs, following)
    position = {"cache_position": ARGUMENTS["cache_position"]} if argument == "cache_position" else {}
    for past in (first.past_key_values, first.past_key_values.to_legacy()):
        answer = call(ours, following | position | {"past_key_values": past})
        assert_agree(expected, answer)
        if "past_key_values" in answer:
            assert type(answer.past_key_values) is type(past)
    if argument == "cache_position":
        with pytest.raises(refgemma.InputError, match=r"cache_position is \[0, 1, 2, 3\]; after 9 tokens"):
            call(ours, following | {"past_key_values": first.past_key_values, "cache_position": np.arange(4)})


FIELDS: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "hidden_activation": "silu",
    "max_position_embeddings": 8,
    "initializer_range": 0.02,
    "rms_norm_eps": 0.1,
    "use_cache": False,
    "pad_token_id": int(IDS[0, -1]),
    "eos_token_id": 7,
    "bos_token_id": 9,
    "tie_word_embeddings": False,
    "rope_theta": 50.0,
    "attention_bias": True,
    "attention_dropout": 0.5,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "query_pre_attn_scalar": 3,
    "sliding_window": 3,
    "**kwargs": {"num_labels": 1},
}
# What only says how to generate, is inactive outside training, or (the length) only makes refgemma warn.
WITHOUT_EFFECT = {"eos_token_id", "bos_token_id", "attention_dropout", "max_position_embeddings"}


@pytest.mark.parametrize("field", FIELDS)
def test_config_field(field: str) -> None:
    """Test the field with the class that shows most of its effect; defaults are as on the page."""
    documented = PAGE["Gemma2Config"][field]
    if documented is not None:
        assert repr(getattr(Gemma2Config(), field)) == documented.replace("1e-06", repr(1e-6))
    name = "Gemma2ForSequenceClassification" if field in ("pad_token_id", "**kwargs") else "Gemma2ForCausalLM"
    change = FIELDS[field] if field == "**kwargs" else {field: FIELDS[field]}
    theirs, ours = pair(name, **change)
    assert getattr(ours.config, field, None) == getattr(theirs.config, field, None) or field == "rope_theta"
    answer = call(ours, {"input_ids": IDS})
    assert_agree(call(theirs, {"input_ids": IDS}), answer)
    assert differ(call(pair(name)[1], {"input_ids": IDS}), answer) == (field not in WITHOUT_EFFECT)


@pytest.mark.parametrize("name", CLASSES)
def test_class(name: str) -> None:
    """Test the page's positional arguments in order, and a model made from a configuration alone."""
    ours = getattr(refgemma.modeling.classes, name)
    documented = [argument for argument, default in PAGE[f"{name}.forward"].items() if default == "None"]
    assert list(inspect.signature(ours.forward).parameters)[1 : len(documented) + 1] == documented
    assert next(iter(inspect.signature(ours).parameters)) == "config"
    config = Gemma2Config(**BASE)
    model = ours(config)
    assert model.config is config
    theirs = getattr(transformers, name)(transformers.Gemma2Config(**BASE))
    assert {n: x.shape for n, x in model.state_dict().items()} == {
        n: tuple(x.shape) for n, x in theirs.state_dict().items()
    }
    assert model.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("field", PAGE["Gemma2ForCausalLM.returns"])
def test_returned(field: str) -> None:
    """Read a field by attribute, by name, and by index in the tuple; it is absent where the page says so."""
    theirs, ours = pair("Gemma2ForCausalLM")
    asked = {"labels": LABELS["Gemma2ForCausalLM"], "output_hidden_states": True, "output_attentions": True}
    answer, expected = (call(model, {"input_ids": IDS} | asked) for model in (ours, theirs))
    assert list(answer.keys()) == list(expected.keys()) == list(PAGE["Gemma2ForCausalLM.returns"])
    place = list(answer.keys()).index(field)
    assert answer[field] is answer[place] is getattr(answer, field) is answer.to_tuple()[place]
    assert_agree({field: expected[field]}, {field: answer[field]})
    bare = call(ours, {"input_ids": IDS, "use_cache": False})
    assert (getattr(bare, field) is not None) == (field == "logits")
