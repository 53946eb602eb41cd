"""Use models and configurations as code for transformers does. Expected numbers of the model "tiny" are from
transformers 5.23 in float32, eager; `parity/test_classes_parity.py` has many more comparisons."""

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ConfigError,
    DynamicCache,
    Gemma2Config,
    InputError,
    RefgemmaError,
    StaticCache,
    UsageError,
    pipeline,
)
from refgemma.cache import Cache
from refgemma.hub import find_model
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint

# Logits of about 5, sums of 234 products in six layers: float32 of two implementations.
SAME = 2e-5
PACKED = [[2, 300, 400, 500, 2, 600, 700, 800]]
POSITIONS = [[0, 1, 2, 3, 0, 1, 2, 3]]
IDS = np.array([[2, 300, 400, 500]])


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained("tiny")


# --- packed rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "logits"),
    [
        ({"use_cache": False}, [-0.9145637, 0.8242645, -5.1552515, 0.8717078]),
        ({"use_cache": True}, [-0.0443873, 1.1610888, -5.0181107, 0.9576470]),
        ({"use_cache": False, "attention_mask": np.ones((1, 8), int)}, [-0.0443873, 1.1610888, -5.0181107, 0.9576470]),
    ],
    ids=["apart", "with a cache", "with a mask"],
)
def test_packed_rows(model: Any, given: dict[str, Any], logits: list[float]) -> None:
    found = model(PACKED, position_ids=POSITIONS, **given).logits[0, -1, 300:304]
    np.testing.assert_allclose(found, logits, rtol=0, atol=SAME)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [[0, 1.5]], [["0", "1"]]], ids=str)
def test_positions_that_are_none_are_refused_by_what_is_wrong(model: Any, positions: Any) -> None:
    with pytest.raises(InputError, match="position_ids has shape"):
        model(PACKED, position_ids=positions, use_cache=False)


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [Cache(), DynamicCache(), None])
def test_an_empty_cache_is_taken(model: Any, empty: Any) -> None:
    np.testing.assert_array_equal(model(IDS, past_key_values=empty).logits, model(IDS).logits)


def test_a_value_stays_a_value_and_an_object_is_filled(model: Any) -> None:
    value = model(IDS[:, :2]).past_key_values
    filled = DynamicCache(config=model.config)
    model(IDS[:, :2], past_key_values=filled, use_cache=False)
    for _ in range(2):
        after = model(IDS[:, 2:], past_key_values=value)
        assert (value.get_seq_length(), after.past_key_values.get_seq_length()) == (2, 4)
    model(IDS[:, 2:], past_key_values=filled)
    assert filled.get_seq_length() == 4


def test_the_name_of_transformers_5_24(model: Any) -> None:
    first = model(IDS[:, :2])
    assert first.cache is first["cache"] is first.past_key_values
    assert "cache" not in first.keys()
    for answer in (model(IDS[:, 2:], cache=first.cache), model.model(IDS[:, 2:], cache=first.cache)):
        assert answer.cache.get_seq_length() == 4
    filled = DynamicCache()
    tokens = model.generate(IDS, cache=filled, max_new_tokens=2, do_sample=False)
    np.testing.assert_array_equal(tokens, model.generate(IDS, max_new_tokens=2, do_sample=False))
    assert filled.get_seq_length() == 5
    with pytest.raises(InputError, match="past_key_values and cache are both given; give only one"):
        model(IDS, cache=filled, past_key_values=filled)


def test_a_static_cache_that_is_full(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=5, max_batch_size=1, device="cpu", dtype="float32")
    model(IDS, past_key_values=cache)
    with pytest.raises(InputError, match="would have 8 tokens; max_cache_len is 5: use a larger max_cache_len"):
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_a_dynamic_cache_without_a_configuration_can_always_be_cut_back(model: Any) -> None:
    """With a configuration, a sliding layer has dropped tokens that it would need, which is an error."""
    ids = np.arange(2, 102)[None]
    for config in (None, model.config):
        cache = DynamicCache(config=config)
        model(ids, past_key_values=cache)
        if config is None:
            cache.crop(-10)
            wanted = model(ids[:, :95]).logits[:, -5:]
            np.testing.assert_allclose(model(ids[:, 90:95], past_key_values=cache).logits, wanted, rtol=0, atol=SAME)
        else:
            with pytest.raises(InputError, match="cannot be cropped to 90 tokens: sliding layer 0 has dropped"):
                cache.crop(-10)
    cache.reset()
    assert (len(cache), cache.get_seq_length(), cache.is_initialized) == (0, 0, False)


@pytest.mark.parametrize("fast", [False, True])
def test_a_deep_copy_is_another_cache(model: Any, fast: bool) -> None:
    """The cache of `generate` has free space for more tokens, which two copies must not share."""
    cache = DynamicCache(config=model.config)
    if fast:
        model.generate(IDS, past_key_values=cache, max_new_tokens=3, do_sample=False)
    else:
        model(IDS, past_key_values=cache)
    seen = cache.get_seq_length()
    copies = [copy.deepcopy(cache), copy.deepcopy(cache)]
    for token, own in zip(([[5]], [[6]]), copies, strict=True):
        model(token, past_key_values=own)
    one, other = (own[0].keys[:, :, -1] for own in copies)
    assert (one != other).any()
    assert cache.get_seq_length() == seen


# --- names and arguments ----------------------------------------------------------------------------------------------


def test_the_auto_classes_give_the_documented_ones(tmp_path: Path) -> None:
    assert type(AutoConfig.from_pretrained("tiny")) is Gemma2Config
    assert type(AutoModel.from_pretrained("tiny")) is refgemma.Gemma2Model
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("tiny"))) is refgemma.Gemma2ForCausalLM
    for auto, wanted in (
        (AutoModelForSequenceClassification, refgemma.Gemma2ForSequenceClassification),
        (AutoModelForTokenClassification, refgemma.Gemma2ForTokenClassification),
    ):
        with pytest.warns(UserWarning, match="has no classifier's head"):
            found = auto.from_pretrained("tiny", num_labels=3)
        assert type(found) is wanted


# Every one of them changes nothing in transformers' numbers either.
HARMLESS: dict[str, Any] = {
    "attn_implementation": "eager", "device_map": "auto", "force_download": False, "load_in_4bit": False,
    "load_in_8bit": None, "local_files_only": True, "low_cpu_mem_usage": True, "max_memory": {0: "1GB"},
    "offload_folder": "elsewhere", "quantization_config": None, "resume_download": True, "subfolder": "", "token": "x",
    "trust_remote_code": True, "use_auth_token": True, "use_safetensors": True, "variant": None, "revision": None,
    "torch_dtype": None, "dtype": None, "config": None, "cache_dir": None,
}  # fmt: skip


OF_MODELS = ("torch_dtype", "dtype", "config")


@pytest.mark.parametrize(
    ("cls", "argument"),
    [(AutoModelForCausalLM, name) for name in HARMLESS]
    + [(AutoConfig, name) for name in HARMLESS if name not in OF_MODELS],
)
def test_arguments_that_change_nothing_are_taken_in_silence(cls: Any, argument: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cls.from_pretrained("tiny", **{argument: HARMLESS[argument]})
    if cls is AutoConfig:
        assert found == AutoConfig.from_pretrained("tiny")
    else:
        np.testing.assert_array_equal(found(IDS).logits, AutoModelForCausalLM.from_pretrained("tiny")(IDS).logits)


@pytest.mark.parametrize(
    ("argument", "value", "advice"),
    [
        ("attn_implementation", "flash_attention_2", "refgemma computes as transformers' 'eager' does; leave it out"),
        ("load_in_4bit", True, "refgemma does not quantise weights; leave it out"),
        ("quantization_config", {"bits": 4}, "refgemma does not quantise weights; leave it out"),
        ("output_loading_info", True, "nothing is left to report"),
        ("state_dict", {}, r"use from_state_dict\(config, state_dict\)"),
        ("subfolder", "inside", "give the path of the folder inside"),
        ("use_safetensors", False, "leave it out"),
        ("variant", "fp16", "rename the files"),
        ("hiden_size", 4, "unknown field 'hiden_size'"),
    ],
)  # fmt: skip
def test_arguments_that_would_change_the_result_are_refused(argument: str, value: Any, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice) as caught:
        AutoModelForCausalLM.from_pretrained("tiny", **{argument: value})
    assert argument in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_a_precision_under_either_name(name: str) -> None:
    """``"auto"`` means the configuration's precision, which is bfloat16 for "tiny"."""
    for value, wanted in (("float16", "float16"), ("auto", "bfloat16"), (np.float64, "float64"), (None, "float32")):
        assert AutoModelForCausalLM.from_pretrained("tiny", **{name: value}).dtype == wanted
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("tiny"), **{name: "float16"}).dtype == "float16"


def test_auto_is_the_precision_of_the_configuration_rather_than_that_of_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(find_model("tiny"), folder)
    for written, wanted in (("float16", "float16"), (None, "bfloat16")):
        AutoConfig.from_pretrained("tiny", dtype=written).save_pretrained(folder)
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == wanted


def test_a_cache_folder_that_is_named(tmp_path: Path) -> None:
    """The cache has the layout of huggingface_hub 1.x."""
    repository = tmp_path / "models--someone--small"
    shutil.copytree(find_model("tiny"), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for cls in (AutoConfig, AutoModel):
        assert cls.from_pretrained("someone/small", cache_dir=tmp_path) is not None
    with pytest.raises(refgemma.ModelNameError, match="elsewhere has no snapshot"):
        AutoModel.from_pretrained("someone/small", cache_dir=tmp_path / "elsewhere")


@pytest.mark.parametrize("how", ["argument", "configuration", "path"])
def test_fewer_layers_than_the_folder_has(how: str, tmp_path: Path) -> None:
    """The first two layers are used, as in transformers, and a warning names the others."""
    config = AutoConfig.from_pretrained("tiny", num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    given = {"argument": {"num_hidden_layers": 2}, "configuration": {"config": config}, "path": {"config": tmp_path}}
    with pytest.warns(UserWarning, match="layers 2 to 5 are left out"):
        found = AutoModel.from_pretrained("tiny", **given[how])
    states = AutoModel.from_pretrained("tiny")(IDS, output_hidden_states=True).hidden_states
    np.testing.assert_array_equal(found(IDS, output_hidden_states=True).hidden_states[1], states[1])
    assert len(found.layers) == 2


def test_a_head_of_another_size(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained("tiny", num_hidden_layers=1, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="set ignore_mismatched_sizes=True for a new random head"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match="has no matching classifier's head"):
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert found([[2, 3]]).logits.shape == (1, 5)


# --- configurations ---------------------------------------------------------------------------------------------------


def test_names_of_a_configuration_before_transformers_5(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained("tiny")
    assert config.torch_dtype == config.dtype == "bfloat16"
    config.torch_dtype = "float32"
    assert config.dtype == "float32"
    assert "torch_dtype" not in config.to_dict()
    config.to_json_file(tmp_path / "any.json")
    assert (
        json.loads((tmp_path / "any.json").read_text()) == config.to_diff_dict() == json.loads(config.to_json_string())
    )


def test_a_configuration_that_is_set() -> None:
    config = AutoConfig.from_pretrained("tiny")
    config.num_hidden_layers = 3
    config.num_labels = 3
    config.rope_theta = 5000
    config.my_note = "kept"
    assert config.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    other = Gemma2Config(num_hidden_layers=3, layer_types=["full_attention", "full_attention", "sliding_attention"])
    other.num_hidden_layers = 2
    assert other.layer_types == ("full_attention", "full_attention")  # the first ones, as in transformers
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.changed()):
        assert other == config
        assert other.my_note == "kept"


def test_what_is_set_on_a_model_counts_at_once(model: Any) -> None:
    logits = model(IDS).logits
    model.config.use_cache = False
    model.config.output_hidden_states = True
    model.config.final_logit_softcapping = None
    answer = model(IDS)
    assert list(answer) == ["logits", "hidden_states"]
    cap = 30.0
    np.testing.assert_allclose(cap * np.tanh(answer.logits / cap), logits, rtol=0, atol=SAME)
    model.config.update({"pad_token_id": None, "output_hidden_states": False})
    assert list(model(IDS)) == ["logits"]


@pytest.mark.parametrize(
    ("name", "value"), [("head_dim", 0), ("rms_norm_eps", -1.0), ("pad_token_id", -1), ("problem_type", "other")]
)
def test_a_value_that_no_gemma_2_can_have_is_refused_and_changes_nothing(name: str, value: Any) -> None:
    config = AutoConfig.from_pretrained("tiny")
    before = getattr(config, name)
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be"):
        setattr(config, name, value)
    assert getattr(config, name) == before


def test_fields_that_contradict_one_another_are_refused_where_they_are_used(model: Any) -> None:
    """They are not refused earlier, because one of the two must be set first."""
    config = AutoConfig.from_pretrained("tiny")
    config.num_attention_heads = 3
    with pytest.raises(
        ConfigError, match=r"num_attention_heads is 3; it must be a multiple of num_key_value_heads \(2\)"
    ):
        AutoModelForCausalLM.from_config(config)
    config.num_key_value_heads = 1
    AutoModelForCausalLM.from_config(config)
    model.config.num_attention_heads = 3
    with pytest.raises(ConfigError, match="must be a multiple of"):
        model(IDS)


def test_attributes_that_are_no_fields(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = Gemma2Config(num_hidden_layers=2, my_note="kept", _private=1)
    config.save_pretrained(tmp_path)
    again = Gemma2Config.from_pretrained(tmp_path)
    assert (again.my_note, again.to_dict()["my_note"], hasattr(again, "_private")) == ("kept", "kept", False)
    with pytest.warns(UserWarning, match="unknown field 'num_hidden_layer' .*did you mean 'num_hidden_layers'"):
        Gemma2Config(num_hidden_layer=2)
    with pytest.raises(ConfigError, match="to_dict is a method or a property, not a field"):
        config.to_dict = 3  # type: ignore[method-assign, assignment]
    with pytest.raises(ConfigError, match="check is a method or a property, not a field"):
        Gemma2Config(check=3)
    assert callable(Gemma2Config.from_dict(config.to_dict() | {"check": 3}).check)
    config.my_note = object()
    with pytest.raises(ConfigError, match="is an object, which a file cannot hold"):
        config.save_pretrained(tmp_path)


def test_a_configuration_is_printed_as_json(model: Any) -> None:
    lines = str(model.config).splitlines()
    assert (lines[0], lines[-1]) == ("Gemma2Config {", "}")
    assert '  "sliding_window": 64,' in lines
    assert "tanh" in str(Gemma2Config(hidden_activation=np.tanh))


def test_a_generation_configuration_that_is_set(model: Any) -> None:
    model.generation_config.max_new_tokens = 2
    model.generation_config.eos_token_id = [1, 107]
    assert model.generation_config.eos_token_id == (1, 107)
    assert model.generate(IDS).shape == (1, 6)
    with pytest.raises(InputError, match="top_k is -3; it must be"):
        model.generation_config.top_k = -3
    assert model.generation_config.top_k is None
    with pytest.raises(InputError, match="unexpected generation option 'top_q'; did you mean top_p"):
        model.generation_config.top_q = 0.5


# --- what torch's modules have ----------------------------------------------------------------------------------------


def test_a_device_changes_nothing(model: Any) -> None:
    before = model(IDS).logits
    for moved in (model.to("cuda"), model.to("cuda:0"), model.cpu(), model.cuda(), model.to(0), model.eval()):
        assert moved is model
    np.testing.assert_array_equal(model(IDS).logits, before)
    assert (model.device, model.training) == ("cpu", False)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        model.to("int8")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("method", "dtype"), [
    ("half", "float16"), ("bfloat16", "bfloat16"), ("float", "float32"), ("double", "float64"),
])  # fmt: skip
def test_another_precision_is_that_of_from_pretrained(method: str, dtype: str, streamed: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained("tiny")
    if streamed:
        model.weights = open_checkpoint(find_model("tiny")).streamed("float32")
    assert getattr(model, method)() is model
    assert model.dtype == dtype
    wanted = AutoModelForCausalLM.from_pretrained("tiny", dtype=dtype)
    np.testing.assert_array_equal(model(IDS).logits, wanted(IDS).logits)
    tokens = [m.generate(IDS, max_new_tokens=3, do_sample=False) for m in (model, wanted)]
    np.testing.assert_array_equal(*tokens)


def test_a_classifier_is_converted_with_its_head() -> None:
    config = AutoConfig.from_pretrained("tiny", num_hidden_layers=1)
    assert AutoModelForTokenClassification.from_config(config).double()(IDS).logits.dtype == np.float64


def test_training_changes_nothing_and_says_so_where_it_would(model: Any) -> None:
    assert model.train().train(False) is model
    model.config.attention_dropout = 0.1
    with pytest.warns(UserWarning, match="refgemma never applies dropout"):
        model.train()


def test_weights_by_their_names_and_modules(model: Any) -> None:
    """The numbers equal those of transformers' modules with the same names."""
    ones = np.ones((1, 1, 234), np.float32)
    logits = model.lm_head(model.model.norm(ones))[0, 0, 300:303]
    np.testing.assert_allclose(logits, [-1.3700996, 1.1435284, 0.9089733], rtol=0, atol=SAME)
    embedded = model.get_input_embeddings()([[300]])[0, 0, :3]
    np.testing.assert_allclose(embedded, [-0.1605892, -1.6656464, 0.0241584], rtol=0, atol=SAME)
    assert model.get_output_embeddings().weight.shape == model.model.embed_tokens.weight.shape == (2048, 234)
    assert [layer.mlp.down_proj.weight.shape for layer in model.model.layers[:2]] == [(234, 408)] * 2
    assert model.model.layers[-1].self_attn.q_proj.bias is None
    assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == (2_922_426, 2_443_194)
    assert model.get_memory_footprint() == 11_689_836
    with pytest.raises(AttributeError, match=r"layers\.0 has no 'attention'; it has self_attn, mlp, input_layernorm"):
        _ = model.model.layers[0].attention
    with pytest.raises(InputError, match=r"layers\.0\.mlp cannot be called alone"):
        model.model.layers[0].mlp(ones)
    with pytest.raises(IndexError):
        _ = model.model.layers[6]


def test_what_is_changed_in_place_changes_the_model(model: Any) -> None:
    """This holds for any of the names, and for the model without its head."""
    for change in (
        lambda: model.model.layers[0].self_attn.q_proj.weight.__imul__(2),
        lambda: dict(model.named_parameters())["model.norm.weight"].__iadd__(1),
        lambda: model.model.load_state_dict({"norm.weight": np.zeros(234, np.float32)}, strict=False),
        lambda: model.model.half(),
        lambda: next(iter(model.parameters())).__imul__(2),
    ):
        before = model(IDS).logits
        change()
        assert (model(IDS).logits != before).any()


def test_load_state_dict(model: Any) -> None:
    fresh = AutoModelForCausalLM.from_config(model.config, seed=1)
    assert fresh.load_state_dict(model.state_dict()) == ([], [])
    np.testing.assert_array_equal(fresh(IDS).logits, model(IDS).logits)
    fresh.model.norm.weight[:] = 0
    assert (fresh(IDS).logits != model(IDS).logits).any()  # the tensors were copied
    for name in ("model.norm.weight", "lm_head.weight"):  # a tied head, too, as in torch
        with pytest.raises(CheckpointError, match=f"lacks {name!r}; add it, or use strict=False"):
            fresh.load_state_dict({k: x for k, x in model.state_dict().items() if k != name})
    with pytest.raises(CheckpointError, match=r"lacks 'model\.norm\.weight'"):
        fresh.load_state_dict({k: x for k, x in model.state_dict().items() if k != "model.norm.weight"})
    with pytest.raises(CheckpointError, match="has 'other'"):
        fresh.load_state_dict(model.state_dict() | {"other": IDS})
    keys = fresh.load_state_dict({"model.norm.weight": model.weights.norm, "other": IDS}, strict=False)
    assert keys.unexpected_keys == ["other"]
    assert "model.norm.weight" not in keys.missing_keys
    np.testing.assert_array_equal(fresh(IDS).logits, model(IDS).logits)


def test_a_head_of_its_own_stays_where_the_model_without_it_is_loaded() -> None:
    config = AutoConfig.from_pretrained("tiny", num_hidden_layers=1, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, seed=1)
    before = model.lm_head.weight.copy()
    model.model.load_state_dict(AutoModel.from_config(config, seed=2).state_dict())
    np.testing.assert_array_equal(model.lm_head.weight, before)


def test_names_come_in_the_order_of_torch(model: Any) -> None:
    layer = [
        *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
        "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ]  # fmt: skip
    names = [f"model.layers.{n}.{part}.weight" for n in range(6) for part in layer]
    expected = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    assert list(model.state_dict()) == expected
    assert [name for name, _ in model.named_parameters()] == expected[:-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_is_assigned(dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained("tiny", dtype=dtype)
    other = AutoModelForCausalLM.from_pretrained("tiny", dtype=dtype)
    projection = model.model.layers[1].self_attn.v_proj
    new = projection.weight * np.float32(1.7)
    projection.weight = np.asarray(new, np.float64)
    other.load_state_dict({"model.layers.1.self_attn.v_proj.weight": new}, strict=False)
    np.testing.assert_array_equal(np.asarray(model(IDS).logits), np.asarray(other(IDS).logits))
    assert (np.asarray(model(IDS).logits) != np.asarray(AutoModelForCausalLM.from_pretrained("tiny")(IDS).logits)).any()
    with pytest.raises(InputError, match=r"has shape \(3,\); it must have shape \(64, 234\)"):
        projection.weight = np.zeros(3)


def test_what_is_read_from_disk_is_not_written_into_in_vain() -> None:
    model = AutoModelForCausalLM.from_pretrained("tiny")
    model.weights = open_checkpoint(find_model("tiny")).streamed()
    for weight in (
        model.model.layers[0].mlp.up_proj.weight,
        dict(model.named_parameters())["model.embed_tokens.weight"],
    ):
        with pytest.raises(ValueError, match="read-only"):
            weight[:] = 0
    model.model.norm.weight[:] = -1  # this one is in memory, and 1 + w is what a norm multiplies with
    assert not model(IDS).logits.any()
    with pytest.raises(InputError, match=r"is read from disk .* replace it with load_state_dict"):
        model.model.layers[0].mlp.up_proj.weight = np.zeros((408, 234), np.float32)


def test_parts_are_gone_through(model: Any) -> None:
    modules = dict(model.named_modules())
    assert modules[""] is model
    assert len(modules) == len(list(model.modules())) == 6 + 6 * 14
    for found in (modules["model.layers.0.mlp"], model.get_submodule("model.layers.0.mlp")):
        assert found.up_proj.weight is not None
        assert repr(found) == repr(model.model.layers[0].mlp)
    assert model.get_parameter("model.norm.weight").shape == (234,)
    assert (model.can_generate(), model.model.can_generate()) == (True, False)
    for base in (model.base_model, model.get_decoder(), model.model.base_model):
        np.testing.assert_array_equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    seen: list[Any] = []
    assert model.apply(seen.append) is model
    assert seen[-1] is model
    assert len(seen) == len(modules)


# Losses of transformers 5.23 with the same ids, in float32.
@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({"num_items_in_batch": 5}, 8.187106),
        ({"ignore_index": 400}, 12.858916),
        ({"shift_labels": [[300, 400, 500, -100]]}, 13.645177),
        ({"shift_labels": [[300, 400, 500, -100]], "num_items_in_batch": 2}, 20.467766),
        ({"labels": [[-100] * 4], "num_items_in_batch": 2}, 0),
    ],
    ids=str,
)
def test_losses_as_trainers_ask_for_them(model: Any, given: dict[str, Any], loss: float) -> None:
    assert model(IDS, **{"labels": IDS} | given).loss == pytest.approx(loss, abs=SAME)


def test_the_kind_of_problem_stays(model: Any) -> None:
    config = AutoConfig.from_pretrained("tiny", num_labels=3)
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier(IDS, labels=[[1.0, 0.0, 1.0]])
    assert classifier.config.problem_type == "multi_label_classification"
    with pytest.raises(InputError, match=r"numbers from 0\.0 to 1\.0 of shape"):
        classifier(IDS, labels=[2])


def test_a_mask_of_four_axes_with_true_and_false(model: Any) -> None:
    seen = np.tril(np.ones((1, 1, 4, 4), bool))
    with pytest.warns(UserWarning, match="here true means visible, but transformers adds"):
        found = model(IDS, attention_mask=seen).logits
    np.testing.assert_allclose(found, model(IDS).logits, rtol=0, atol=SAME)


# --- more rows --------------------------------------------------------------------------------------------------------


def test_resize_token_embeddings(model: Any) -> None:
    """New rows are the mean of the old rows, as in transformers, plus 3e-5 of their spread of 0.06."""
    before, old = model(IDS).logits, model.model.embed_tokens.weight.copy()
    assert model.resize_token_embeddings(2050, pad_to_multiple_of=8).weight.shape == (2056, 234)
    assert model.config.vocab_size == model.model.config.vocab_size == 2056
    rows = model.get_input_embeddings().weight
    np.testing.assert_array_equal(rows[:2048], old)
    mean = [0.0635511, 0.0101939, -0.0317360]
    np.testing.assert_allclose(rows[2048:, :3], np.broadcast_to(mean, (8, 3)), rtol=0, atol=1.5e-5)
    assert len(np.unique(rows[2048:, 0])) == 8
    logits = model([[2, 300, 400, 2055]]).logits
    assert logits.shape == (1, 4, 2056)
    np.testing.assert_allclose(logits[:, :3, :2048], before[:, :3], rtol=0, atol=SAME)
    assert model.resize_token_embeddings(2000).weight.shape == (2000, 234)
    assert model.resize_token_embeddings().weight.shape == (2000, 234)
    with pytest.raises(InputError, match="the vocabulary has 2000 tokens"):
        model([[2000]])


def test_a_resized_model_is_saved_with_its_rows(model: Any, tmp_path: Path) -> None:
    model.resize_token_embeddings(2051)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 2051
    np.testing.assert_array_equal(again([[2, 2050]]).logits, model([[2, 2050]]).logits)


def test_a_head_is_untied_and_saved(model: Any, tmp_path: Path) -> None:
    before = model(IDS).logits
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(IDS).logits, before)
    again.lm_head.weight = again.lm_head.weight * 2  # and not the embedding
    np.testing.assert_array_equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_long_argument_is_cut_in_the_line(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"use from_state_dict\(config, state_dict\)$") as caught:
        AutoModelForCausalLM.from_pretrained("tiny", state_dict=model.state_dict())
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, 2.5, "2050"])
def test_a_number_of_rows_that_is_none(model: Any, count: Any) -> None:
    with pytest.raises(InputError, match=r"new_num_tokens is .*; it must be a whole number of at least 1"):
        model.resize_token_embeddings(count)
    assert model.config.vocab_size == 2048


def test_bfloat16_rows(model: Any) -> None:
    rows = model.bfloat16().resize_token_embeddings(2049).weight
    np.testing.assert_array_equal(rows, refgemma.bf16(np.asarray(rows)))


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_nothing_is_uploaded(model: Any) -> None:
    with pytest.raises(RefgemmaError, match="push_to_hub is not supported; use save_pretrained"):
        model.push_to_hub("me/my-gemma")


def test_a_pipeline(model: Any) -> None:
    """The texts equal those of transformers' pipeline with the same model."""
    greedy: dict[str, Any] = {"do_sample": False}
    pipe = pipeline("text-generation", model="tiny", torch_dtype="float32", device_map="auto", batch_size=2, **greedy)
    assert pipe("Once upon a time", max_new_tokens=6) == [{"generated_text": "Once upon a time the Rat, who was a"}]
    assert pipe(["The king"], max_new_tokens=3, return_full_text=False) == [[{"generated_text": "'s son"}]]
    messages = [{"role": "user", "content": "Who are you?"}]
    for talk in (pipe(messages, max_new_tokens=4), pipe([messages], max_new_tokens=4)[0]):
        assert talk[0]["generated_text"][0] == messages[0]
        assert talk[0]["generated_text"][1]["role"] == "assistant"
    tokenizer = refgemma.AutoTokenizer.from_pretrained("tiny")
    own = pipeline(model=model, tokenizer=tokenizer)
    assert own("The king", max_new_tokens=3, **greedy) == [{"generated_text": "The king's son"}]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"task": "translation", "model": "tiny"}, "it must be 'text-generation'"),
        ({"task": "text-generation"}, "the model is missing"),
    ],
)
def test_pipelines_that_there_are_not(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        pipeline(**given)
