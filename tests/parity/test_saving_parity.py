"""Compare with transformers: save here, load and save there, load here again; no bit changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import refgemma
import refgemma.modeling.classes
from refgemma.config import Gemma2Config

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 5, "num_labels": 3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "eos_token_id": [1, 7],
}  # fmt: skip
CLASSES = [
    "Gemma2Model", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification", "Gemma2ForTokenClassification",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False, "attention_bias": True}], ids=["gemma", "not"])
@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(tmp_path: Path, name: str, change: dict[str, Any], dtype: str) -> None:
    ours, theirs = getattr(refgemma.modeling.classes, name), getattr(transformers, name)
    model = ours.from_config(Gemma2Config(**SHAPE, **change), seed=3, dtype=dtype)
    model.save_pretrained(tmp_path / "ours", max_shard_size="10KB")
    there, report = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)  # in the precision of the file
    assert not any(report.values()), report
    assert there.dtype == getattr(torch, dtype)
    for tensor_name, tensor in there.state_dict().items():
        np.testing.assert_array_equal(tensor.float().numpy(), np.asarray(model.state_dict()[tensor_name]))
    there.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    again = ours.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert again.dtype == dtype
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for tensor_name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[tensor_name].view(np.uint8), tensor.view(np.uint8))


def test_the_tiny_model_as_transformers_saves_it(tmp_path: Path) -> None:
    model = refgemma.modeling.classes.Gemma2ForCausalLM.from_pretrained("tiny", dtype="bfloat16")
    model.save_pretrained(tmp_path / "ours")
    transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (refgemma.load(tmp_path / side) for side in ("ours", "theirs"))
    assert ours.config == theirs.config
    np.testing.assert_array_equal(ours.weights.embed_tokens[:], theirs.weights.embed_tokens[:])
