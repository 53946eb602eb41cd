"""Test LoRA adapters of PEFT, merged when read: the formula, and one-line errors for what cannot be merged. PEFT's own
merges are in ``tests/parity/test_weights_parity.py``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.readers import ADAPTER, ADAPTER_SETTINGS, BASE_FILES, SMALL
from safetensors.numpy import save_file

import refgemma
from refgemma.convert.convert import convert
from refgemma.convert.pickles import write_torch
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor

Q = "model.layers.0.self_attn.q_proj"
FILE = "adapter_model.safetensors"


def write(folder: Path, tensors: dict[str, Any], **settings: Any) -> Path:
    """Write an adapter next to the weights of its base."""
    for name, content in BASE_FILES:
        (folder / name).write_bytes(content)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_SETTINGS | settings))
    save_file(tensors, folder / FILE)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 16 / 2), ({"use_rslora": True}, 16 / 2**0.5), ({"alpha_pattern": {"q_proj": 3}}, 3 / 2)],
    ids=["plain", "rank-stabilised", "pattern"],
)
def test_the_formula(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    inner, outer = (ADAPTER[f"base_model.model.{Q}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    found = open_checkpoint(write(tmp_path, ADAPTER, **settings))
    (tmp_path / "adapter_config.json").unlink()
    base = open_checkpoint(tmp_path).tensors[f"{Q}.weight"].read("float64")
    expected = (base + scale * outer @ inner).astype(np.float32)
    assert (found.tensors[f"{Q}.weight"].read("float32") == expected).all()
    assert not (base.astype(np.float32) == expected).all()


def test_the_base_elsewhere_and_every_way_to_load(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, content in BASE_FILES:
        (base / name).write_bytes(content)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_SETTINGS | {"base_model_name_or_path": str(base)}))
    save_file(ADAPTER, adapter / FILE)
    logits = Gemma2ForCausalLM.from_pretrained(adapter)([[2, 3]]).logits
    assert not (logits == Gemma2ForCausalLM.from_pretrained(base)([[2, 3]]).logits).all()
    assert refgemma.load(adapter).stop_ids == {1, 3}
    convert(adapter, tmp_path / "merged")
    assert (Gemma2ForCausalLM.from_pretrained(tmp_path / "merged")([[2, 3]]).logits == logits).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; it must be LORA"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"use_qalora": True}, "'use_qalora' is True, which is not supported"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is [[0, 2]]"),
        ({"a_key_of_tomorrow": 1}, "'a_key_of_tomorrow' is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights first"),
        ({"r": 3}, "according to the base and adapter_config.json it must be [3, 4]"),
        ({"r": 0}, "r and lora_alpha must be numbers above 0"),
        ({"use_dora": True}, "'lora_A', 'lora_B'; adapter_config.json requires"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "must be a simple regular expression for a name"),
    ],
    ids=str,
)
def test_what_cannot_be_merged(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    assert words in refusal(write(tmp_path, ADAPTER, **settings))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (f"{Q}.lora_A.weight", (2, 5), "is [2, 5]; according to the base and adapter_config.json it must be [2, 4]"),
        (f"{Q}.lora_B.weight", (5, 2), "is [5, 2]"),
        ("model.layers.9.self_attn.q_proj.lora_A.weight", (2, 4), "which no tensor of this base matches"),
        ("model.norm.lora_A.weight", (2, 4), "model.norm has 'lora_A'"),
        ("model.embed_tokens.weight", (6, 4), "is [6, 4]"),
    ],
)
def test_adapters_of_wrong_shapes(tmp_path: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    assert words in refusal(write(tmp_path, ADAPTER | {f"base_model.model.{name}": np.ones(shape, np.float32)}))


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER_SETTINGS | {"base_model_name_or_path": "no/base"}))
    assert f"no {FILE}" in refusal(tmp_path)
    save_file(ADAPTER, tmp_path / FILE)
    assert "adapter_config.json: base_model_name_or_path: no/base" in refusal(tmp_path)


def test_a_whole_head_unties(tmp_path: Path) -> None:
    head = np.ones(tensor_shapes(SMALL)["model.embed_tokens.weight"], np.float32)
    found = open_checkpoint(write(tmp_path, ADAPTER | {"base_model.model.lm_head.weight": head}))
    assert not found.config.tie_word_embeddings
    assert (found.resident().head[:] == head).all()


def test_a_shared_table_is_said(tmp_path: Path) -> None:
    vocab, hidden = tensor_shapes(SMALL)["model.embed_tokens.weight"]
    sides = {"lora_embedding_A": (2, vocab), "lora_embedding_B": (hidden, 2)}
    table = {f"base_model.model.model.embed_tokens.{k}": np.ones(shape, np.float32) for k, shape in sides.items()}
    with pytest.warns(UserWarning, match=r"LoRA of 'model\.embed_tokens' is merged into the table"):
        open_checkpoint(write(tmp_path, table))


def test_tables_of_a_resized_base(tmp_path: Path) -> None:
    vocab, hidden = tensor_shapes(SMALL)["model.embed_tokens.weight"]
    table = np.random.default_rng(0).standard_normal((vocab + 3, hidden)).astype(np.float32)
    both = {f"base_model.model.{name}.weight": table for name in ("lm_head", "model.embed_tokens")}
    found = open_checkpoint(write(tmp_path, ADAPTER | both))
    assert (found.config.vocab_size, found.config.tie_word_embeddings) == (vocab + 3, True)
    assert (found.resident().head[:] == table).all()
    assert f"call resize_token_embeddings({vocab + 3}) on the base" in refusal(
        write(tmp_path, ADAPTER | {"base_model.model.lm_head.weight": table})
    )


def test_a_bias_that_the_base_lacks(tmp_path: Path) -> None:
    bias = {f"base_model.model.{Q}.lora_B.bias": np.ones(tensor_shapes(SMALL)[f"{Q}.weight"][0], np.float32)}
    assert "train with lora_bias=False" in refusal(write(tmp_path, ADAPTER | bias, lora_bias=True))


def test_a_pickled_adapter_is_converted(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    write(folder, ADAPTER)
    expected = open_checkpoint(folder).tensors[f"{Q}.weight"].read("float32")
    (folder / FILE).unlink()
    write_torch(folder / "adapter_model.bin", [OutputTensor(n, "float32", x.shape, x) for n, x in ADAPTER.items()])
    assert f"merge it into its base with: refgemma convert {folder} NEW_FOLDER" in refusal(folder)
    convert(folder, tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    assert (merged.tensors[f"{Q}.weight"].read("float32") == expected).all()


def test_a_large_adapter_is_merged_at_each_token_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refgemma.weights.checkpoint.fits_in_memory", lambda *_: False)
    with pytest.warns(UserWarning, match=r"merge it once with. refgemma convert"):
        open_checkpoint(write(tmp_path, ADAPTER)).weights()
