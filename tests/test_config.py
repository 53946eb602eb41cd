"""Test configurations: documented defaults, old and new released files, and errors with a reason."""

import json

import pytest

from refgemma.config import ConfigError, Gemma2Config

# The released 9B's config.json, key for key (published with the model).
RELEASED_9B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


def test_documented_defaults() -> None:
    """The defaults equal those of the documentation page, which no released model has."""
    config = Gemma2Config()
    found = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
             config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.query_pre_attn_scalar,
             config.sliding_window, config.attn_logit_softcapping, config.final_logit_softcapping)  # fmt: skip
    assert found == (256000, 3072, 24576, 28, 16, 16, 256, 224, 4096, 50.0, 30.0)


def test_released_file_is_the_preset() -> None:
    assert Gemma2Config.from_dict(RELEASED_9B) == Gemma2Config.preset("9b")


def test_transformers_5_writes_rope_parameters_and_layer_types() -> None:
    newer = {k: v for k, v in RELEASED_9B.items() if k not in ("rope_theta", "hidden_act")}
    newer |= {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "dtype": "bfloat16"}
    newer |= {"layer_types": ["full_attention"] * 42}
    config = Gemma2Config.from_dict(newer)
    assert config.rope_theta == 500.0
    assert not any(config.is_sliding(layer) for layer in range(42))


def test_scale_of_the_27b_is_not_head_dim() -> None:
    assert Gemma2Config.preset("27b").attention_scale == 144**-0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_key_value_heads": 7}, r"num_attention_heads is 16; it must be a multiple of num_key_value_heads \(7\)"),
        ({"head_dim": 255}, "head_dim is 255; it must be even"),
        ({"hidden_activation": "softplus"}, "hidden_activation is 'softplus'; it must be one of gelu_pytorch_tanh"),
        ({"hidden_activation": 3}, "hidden_activation is 3; it must be one of"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a whole number from 1 to 2147483647"),
        ({"sliding_window": None}, "sliding_window is .*; it must be"),
        ({"hidden_size": 3584.0}, "hidden_size is .*; it must be a whole number"),
        ({"vocab_size": True}, "vocab_size is .*; it must be"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is .*; it must be a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta is .*; it must be"),
        ({"attn_logit_softcapping": -1}, "attn_logit_softcapping is .*; it must be a number above 0, or None"),
        ({"layer_types": ["full_attention"]}, "layer_types is .* it must name"),
        ({"attention_dropout": 1.0}, "attention_dropout is .*; it must be a number from 0 to below 1"),
        ({"initializer_range": -1}, "initializer_range is .*; it must be a number of at least 0"),
        ({"model_type": "gemma3"}, "model_type is 'gemma3'; refgemma reads 'gemma2' only"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is {'rope_type': 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters is .*; it must be"),
        ({"rope_parameters": 3}, "rope_parameters is 3; it must be"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope_theta is .*; it must be a number"),
        ({"num_labels": 0}, "it must name each of the 0 labels"),
        ({"id2label": {"0": "a", "2": "b"}}, "it must name each of the 2 labels"),
        ({"id2label": ["a"]}, "id2label is .* it must name"),
        ({"problem_type": "ranking"}, "problem_type is .*; it must be one of regression"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "num_labels is 1; .* needs at least 2"),
        ({"layer_types": 5}, "layer_types is .* it must name"),
        ({"layer_types": [[1], [2]]}, "layer_types is .* it must name"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is .*; it must be a whole number"),
        ({"hidden_size": 10**400}, "hidden_size is .*; it must be a whole number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is .*; it must be a number"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is .*; it must be a token id"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"my.json: .*{reason}|my.json: {reason}"):
        Gemma2Config.from_dict(RELEASED_9B | change, source="my.json")


@pytest.mark.parametrize("key", ["hidden_size", "query_pre_attn_scalar", "head_dim"])
def test_a_missing_size_is_not_guessed(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {key}"):
        Gemma2Config.from_dict({k: v for k, v in RELEASED_9B.items() if k != key})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_file_that_is_no_object(text: str, tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: (is not JSON|must be a JSON object)"):
        Gemma2Config.from_json_file(path)


def test_round_trip(tmp_path) -> None:
    config = Gemma2Config.from_dict(RELEASED_9B | {"eos_token_id": [1, 107]})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert Gemma2Config.from_json_file(path) == config
