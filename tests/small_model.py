"""Provide a model small enough to try every text, for several tests."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refgemma.config import Gemma2Config
from refgemma.generation.generation_config import GenerationConfig, merge_settings
from refgemma.heads import (
    log_softmax,
)
from refgemma.inputs import InputError
from refgemma.modeling.classes import Gemma2ForCausalLM


def refused(call: Callable[[], Any], message: str) -> None:
    """Require that a call raises InputError with this whole message."""
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message


SMALL = Gemma2ForCausalLM.from_config(
    Gemma2Config(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=7, sliding_window=3, initializer_range=0.2,
        max_position_embeddings=64,
    ),
    seed=1,
)  # fmt: skip


NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": None}


RECORD: dict[str, Any] = {"return_dict_in_generate": True}


def call_with(**settings: Any) -> GenerationConfig:
    return merge_settings(None, GenerationConfig(), NO_END | settings)


def log_probabilities(texts: Any, begins: int) -> Any:
    """Return the sum of log probabilities of each text's tokens from place `begins` on, from one forward pass."""
    ids = np.array(texts)
    told = log_softmax(SMALL(ids).logits.astype(np.float64))[:, begins - 1 : -1]
    return np.take_along_axis(told, ids[:, begins:, None], axis=2).sum(axis=(1, 2))
