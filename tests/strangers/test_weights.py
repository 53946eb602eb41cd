"""Read weights and configurations as trainers write them. ``tests/parity/test_weights_parity.py`` has transformers
5.23's result for each, with the same names."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refgemma.config import ConfigError, Gemma2Config
from refgemma.convert.convert import convert
from refgemma.convert.pickles import write_torch
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor

CONFIG = Gemma2Config(
    vocab_size=61, hidden_size=24, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=12, sliding_window=5,
)  # fmt: skip
EMBED, HEAD, VICTIM = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Any]


def random_tensors() -> Tensors:
    rng = np.random.default_rng(8)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(CONFIG).items()}


TENSORS = random_tensors()
ONES = np.ones((1, 24), np.float32)


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(json.loads(CONFIG.to_json_string()) | config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def are_the_tensors(folder: Path) -> bool:
    found = open_checkpoint(folder).tensors
    return list(found) == list(TENSORS) and all((found[n].read("float32") == x).all() for n, x in TENSORS.items())


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "v_head.summary.weight",
        "v_head.summary.bias", "value_head.weight", "score.0.weight", "module.v_head.summary.weight",
    ],
)  # fmt: skip
def test_what_no_logit_depends_on_is_not_read(tmp_path: Path, extra: str) -> None:
    folder = write(tmp_path, TENSORS | {extra: ONES})
    with pytest.warns(UserWarning, match=f"model.safetensors: '{extra}' is not read"):
        assert are_the_tensors(folder)


WRAPPERS = [
    "_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "pretrained_model.", "module._orig_mod.",
    "_orig_mod.module.",
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(tmp_path: Path, wrapper: str) -> None:
    folder = write(tmp_path, {wrapper + name: x for name, x in TENSORS.items()})
    with pytest.warns(UserWarning, match="of tensor names is ignored") as said:
        assert are_the_tensors(folder)
    assert all(f"'{part}.'" in str(said[0].message) for part in wrapper.replace("base_model.model", "*").split(".")[:-1]
               if part != "*")  # fmt: skip


def test_wrappers_at_any_depth(tmp_path: Path) -> None:
    inside = {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): x for name, x in TENSORS.items()}
    with pytest.warns(UserWarning, match=r"'_fsdp_wrapped_module\.'"):
        assert are_the_tensors(write(tmp_path, inside))


def test_a_value_head_beside_a_wrapper(tmp_path: Path) -> None:
    wrapped = {f"pretrained_model.{name}": x for name, x in TENSORS.items()} | {"v_head.summary.weight": ONES}
    folder = write(tmp_path, wrapped)
    with (
        pytest.warns(UserWarning, match="the prefix 'pretrained_model.' of tensor names"),
        pytest.warns(UserWarning, match="'v_head.summary.weight' is not read"),
    ):
        assert are_the_tensors(folder)


@pytest.mark.parametrize("prefix", ["model.model.", "model.", ""])
def test_model_twice_or_not_at_all(tmp_path: Path, prefix: str) -> None:
    assert are_the_tensors(write(tmp_path, {prefix + name.removeprefix("model."): x for name, x in TENSORS.items()}))


def test_no_weight_is_random(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": x for name, x in TENSORS.items() if name != VICTIM}
    assert f"lacks 1 of {len(TENSORS)} tensors: '{VICTIM}'" in refusal(write(tmp_path, wrapped))
    assert "has 1 tensor that Gemma 2 does not have: 'other.x'" in refusal(write(tmp_path, TENSORS | {"other.x": ONES}))


def test_an_untied_head_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, TENSORS, tie_word_embeddings=False))
    assert "lacks 'lm_head.weight', which tie_word_embeddings false requires" in message
    assert "set it to true in config.json" in message


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    both = TENSORS | {f"module.{VICTIM}": TENSORS[VICTIM]}
    assert "is also stored as" in refusal(write(tmp_path, both))


def test_an_unmerged_adapter(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    tensors = {name.replace(module, f"{module}.base_layer"): x for name, x in TENSORS.items()}
    tensors |= {f"{module}.lora_A.default.weight": ONES}
    assert "contains an unmerged adapter" in refusal(write(tmp_path, tensors))


@pytest.mark.parametrize("name", [VICTIM, EMBED])
def test_tensors_that_zero3_left_empty(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path, TENSORS | {name: np.zeros(0, np.float32)}))
    assert f"tensor '{name}' is empty, [0]; DeepSpeed's ZeRO-3" in message
    assert "zero_to_fp32.py" in message


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_head_apart_is_used(tmp_path: Path) -> None:
    folder = write(tmp_path, TENSORS | {HEAD: TENSORS[EMBED] * 2})
    with pytest.warns(UserWarning, match="differs from"):
        model = Gemma2ForCausalLM.from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    assert (model.weights.head[:] == TENSORS[EMBED] * 2).all()
    with pytest.warns(UserWarning, match="differs from"):
        again = Gemma2ForCausalLM.from_state_dict(CONFIG, TENSORS | {HEAD: TENSORS[EMBED] * 2})
    assert (again([[2, 3]]).logits == model([[2, 3]]).logits).all()
    model.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (Gemma2ForCausalLM.from_pretrained(tmp_path / "again")([[2, 3]]).logits == again([[2, 3]]).logits).all()


def test_a_head_alone_is_the_embedding(tmp_path: Path) -> None:
    tensors = {HEAD if name == EMBED else name: x for name, x in TENSORS.items()}
    assert are_the_tensors(write(tmp_path, tensors))


def test_a_classifier_s_head_beside_a_language_model(tmp_path: Path) -> None:
    assert (
        open_checkpoint(write(tmp_path, TENSORS | {"score.weight": np.ones((3, 24), np.float32)})).score() is not None
    )


# --- configurations ---------------------------------------------------------------------------------------------------


def test_hidden_act_alone_is_left_unread() -> None:
    raw = {k: v for k, v in CONFIG.to_dict().items() if k != "hidden_activation"} | {"hidden_act": "silu"}
    with pytest.warns(UserWarning, match="my.json: hidden_act = 'silu' is ignored"):
        assert Gemma2Config.from_dict(raw, "my.json").hidden_activation == "gelu_pytorch_tanh"


def test_a_null_activation_is_refused_as_in_transformers() -> None:
    with pytest.raises(ConfigError, match="hidden_activation is None; it must be one of"):
        Gemma2Config.from_dict(CONFIG.to_dict() | {"hidden_activation": None})


def test_label2id_alone_is_left_unread() -> None:
    raw = {k: v for k, v in CONFIG.to_dict().items() if k not in ("id2label", "num_labels")}
    with pytest.warns(UserWarning, match="label2id without id2label is ignored"):
        found = Gemma2Config.from_dict(raw | {"label2id": {"a": 0, "b": 1, "c": 2}})
    assert (found.num_labels, found.label2id) == (2, {"LABEL_0": 0, "LABEL_1": 1})


@pytest.mark.parametrize("leftover", [{}, None])
def test_an_empty_quantization_config(tmp_path: Path, leftover: Any) -> None:
    assert are_the_tensors(write(tmp_path, TENSORS, quantization_config=leftover))


def test_a_leftover_quantization_config(tmp_path: Path) -> None:
    folder = write(tmp_path, TENSORS, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.warns(UserWarning, match="is ignored, because the weights are not quantised"):
        assert are_the_tensors(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [({"quantization_config": {"quant_method": method}}, method) for method in ("gptq", "awq", "fp8", "bitsandbytes")]
    + [({"quantization": {"group_size": 64, "bits": 4}}, "MLX")],
)  # fmt: skip
def test_quantised_folders_are_refused_by_name(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    folder = write(tmp_path, {VICTIM: np.ones((4, 4), np.uint32 if name == "MLX" else np.int8)}, **config)
    assert f"quantised by '{name}': load the model with that library, dequantise the weights" in refusal(folder)


@pytest.mark.parametrize("code", [np.uint8, np.int8, np.int32, np.uint32])
def test_quantised_numbers_are_refused(tmp_path: Path, code: Any) -> None:
    assert "dequantise the checkpoint" in refusal(write(tmp_path, {VICTIM: np.ones((4, 4), code)}))


# Words of 32 bits, and the numbers that mlx 0.32 `dequantize` makes of them with scale 1 and bias 0.
WORDS = [2654435761, 1013904226, 3668339987, 2027808452, 387276917, 3041712678, 1401181143, 4055616904]
IN_WORDS = {
    2: "10321231313023122021303323210330", 3: "16647651632166476516364055132566",
    4: [1, 11, 9, 7, 7, 3, 14, 9, 2, 6, 3, 15, 14, 6, 12, 3, 3, 1, 13, 6, 6, 10, 10, 13, 4, 12, 6, 14, 13, 13, 8, 7],
    5: [17, 13, 30, 14, 3, 15, 10, 12, 19, 23, 27, 24, 19, 9, 20, 13, 6, 21, 22, 9, 12, 19, 23, 27, 24, 11, 29, 0, 22,
        10, 28, 2],
    6: [49, 38, 55, 13, 30, 10, 54, 60, 46, 49, 51, 4, 45, 25, 42, 54, 4, 27, 30, 55, 56, 21, 7, 24, 21, 28, 33, 9, 26,
        51, 20, 45],
    8: [177, 121, 55, 158, 98, 243, 110, 60, 19, 109, 166, 218, 196, 230, 221, 120, 117, 96, 21, 23, 38, 218, 76, 181,
        215, 83, 132, 83, 136, 205, 187, 241],
}  # fmt: skip
WIDE = CONFIG.changed(hidden_size=64)


def quantise(bits: int, group_size: int = 32) -> tuple[Tensors, dict[str, Any]]:
    """Return a model with an embedding quantised by MLX: each row has the words above twice, with its own groups."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(WIDE).items()}
    rows, module = WIDE.vocab_size, EMBED.removesuffix(".weight")
    tensors[EMBED] = np.tile(np.array(WORDS[:bits] * 2, np.uint32), (rows, 1))
    tensors |= {f"{module}.{end}": rng.random((rows, 64 // group_size), np.float32) for end in ("scales", "biases")}
    return tensors, {"quantization": {"group_size": group_size, "bits": bits}}


def write_wide(folder: Path, tensors: Tensors, **config: Any) -> Path:
    return write(folder, tensors, **{"hidden_size": 64, **config})


@pytest.mark.parametrize("bits", IN_WORDS)
@pytest.mark.parametrize("group_size", [32, 64])
def test_an_mlx_folder_is_read(tmp_path: Path, bits: int, group_size: int) -> None:
    tensors, settings = quantise(bits, group_size)
    found = open_checkpoint(write_wide(tmp_path, tensors, **settings, quantization_config=settings["quantization"]))
    numbers = np.array([int(x) for x in IN_WORDS[bits]] * 2, np.float32)
    scales, biases = (tensors[EMBED.replace("weight", end)].repeat(group_size, 1) for end in ("scales", "biases"))
    expected = numbers * scales + biases
    table = found.tensors[EMBED]
    np.testing.assert_array_equal(table.read("float32"), expected)
    np.testing.assert_array_equal(table.read("float32", np.array([[3, 0], [5, 5]])), expected[[[3, 0], [5, 5]]])
    np.testing.assert_array_equal(table.map()[2:5], expected[2:5])
    assert table.format == f"MLX {bits} bits"
    assert table.nbytes == sum(tensors[n].nbytes for n in tensors if n.startswith("model.embed_tokens"))
    convert(tmp_path, tmp_path / "plain")
    again = open_checkpoint(tmp_path / "plain")
    np.testing.assert_array_equal(again.tensors[EMBED].read("float32"), expected)
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_module_with_groups_of_its_own(tmp_path: Path) -> None:
    tensors, _ = quantise(4, 32)
    settings = {"quantization": {"group_size": 64, "bits": 8, "model.embed_tokens": {"group_size": 32, "bits": 4}}}
    assert open_checkpoint(write_wide(tmp_path, tensors, **settings)).tensors[EMBED].shape == (WIDE.vocab_size, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "which is not supported"),
        ({"quantization": {"group_size": 7, "bits": 4}}, "which is not supported"),
        ({"quantization": None}, "which is not supported"),
        ({"scales": None}, "but its scales and biases are missing"),
        ({"scales": np.ones((3, 2), np.float32)}, "which is not supported"),
        ({"biases": np.zeros((1, 2), np.uint32)}, "but its scales and biases are missing"),
    ],
    ids=str,
)
def test_mlx_folders_of_other_kinds_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tensors, settings = quantise(4)
    for end in change.keys() & {"scales", "biases"}:
        name = EMBED.replace("weight", end)
        tensors |= {name: change[end]}
    kept = {name: x for name, x in tensors.items() if x is not None}
    assert words in refusal(write_wide(tmp_path, kept, **settings | {k: x for k, x in change.items() if k[0] == "q"}))


@pytest.mark.parametrize("shape", [(), (1,), (56,), (56, 1)])
def test_float8_with_scales_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(TENSORS[VICTIM].shape).astype(ml_dtypes.float8_e4m3fn)
    scales = (1 + rng.random(shape)).astype(np.float32)
    tensors = TENSORS | {VICTIM: numbers, f"{VICTIM}_scale": np.asarray(scales)}
    tensors |= {VICTIM.replace("weight", "input_scale"): np.ones(1, np.float32)}
    folder = write(tmp_path, tensors, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.warns(UserWarning, match="also round activations, which refgemma does not"):
        found = open_checkpoint(folder)
    expected = numbers.astype(np.float32) * (scales if scales.ndim != 1 else scales[:, None])
    np.testing.assert_array_equal(found.tensors[VICTIM].read("float32"), expected)


def test_a_number_beyond_the_precision(tmp_path: Path) -> None:
    tensors, settings = quantise(8)
    tensors[EMBED.replace("weight", "scales")][3] = 1e4
    checkpoint = open_checkpoint(write_wide(tmp_path, tensors, **settings))
    with pytest.raises(CheckpointError, match="above the largest float16"):
        checkpoint.resident("float16")


# --- files of PyTorch -------------------------------------------------------------------------------------------------


def as_outputs(tensors: Tensors) -> list[OutputTensor]:
    return [OutputTensor(name, "float32", x.shape, x) for name, x in tensors.items()]


LITGPT = {
    "embed_tokens": "transformer.wte", "norm": "transformer.ln_f", "input_layernorm": "norm_1",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "norm_2",
    "post_feedforward_layernorm": "post_mlp_norm", "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj",
}  # fmt: skip


def as_litgpt(tensors: Tensors) -> Tensors:
    """Rename tensors as in LitGPT's ``copy_weights_gemma_2``; ``attn.qkv`` stacks query, key and value."""
    found: Tensors = {}
    for name, x in tensors.items():
        plain = name.removeprefix("model.").removesuffix(".weight")
        if plain in LITGPT:
            found[f"{LITGPT[plain]}.weight"] = x
            continue
        _, layer, inside = plain.split(".", 2)
        if inside in LITGPT:
            found[f"transformer.h.{layer}.{LITGPT[inside]}.weight"] = x
        elif inside == "self_attn.q_proj":
            parts = [tensors[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
            found[f"transformer.h.{layer}.attn.qkv.weight"] = np.concatenate(parts)
    return found | {HEAD: tensors[EMBED]}


PICKLES: dict[str, tuple[str, Tensors, str | None]] = {
    "transformers": ("pytorch_model.bin", TENSORS | {HEAD: TENSORS[EMBED]}, None),
    "LitGPT, converted back": ("model.pth", TENSORS, None),
    "LitGPT": ("lit_model.pth", as_litgpt(TENSORS), None),
    "LitGPT, trained": ("lit_model.pth", as_litgpt(TENSORS), "model"),
    "Lightning": ("model.ckpt", TENSORS, "state_dict"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_are_converted(tmp_path: Path, case: str) -> None:
    name, tensors, key = PICKLES[case]
    source = tmp_path / "source"
    write(source, {})
    (source / "model.safetensors").unlink()
    write_torch(source / name, as_outputs(tensors), key)
    assert f"convert these with: refgemma convert {source} NEW_FOLDER" in refusal(source)
    convert(source, tmp_path / "target")
    assert are_the_tensors(tmp_path / "target")


def test_shards_of_pickles_are_converted(tmp_path: Path) -> None:
    names = list(TENSORS)
    parts = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in parts.items():
        write_torch(tmp_path / file, as_outputs({name: TENSORS[name] for name in part}), None)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(CONFIG.to_json_string())
    convert(tmp_path, tmp_path / "target")
    assert are_the_tensors(tmp_path / "target")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("the code of a pickle ran",))


def test_no_code_of_a_pickle_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"model.norm.weight": Evil()}, 2))
    with pytest.raises(CheckpointError, match="which checkpoints never need; do not trust the file"):
        convert(tmp_path, tmp_path / "target")
    assert not capsys.readouterr().out
    assert not (tmp_path / "target").exists()


def test_a_fitting_head_that_is_not_used_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, TENSORS | {"score.weight": np.ones((2, 24), np.float32)})
    with pytest.warns(UserWarning, match="score.weight is not used by Gemma2ForCausalLM"):
        Gemma2ForCausalLM.from_pretrained(folder)
