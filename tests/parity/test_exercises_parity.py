"""The scores of Gemma 3 in an exercise, recorded again from transformers; the comparison of models in notebook 13."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="compares with transformers")

import numpy as np
import torch
from transformers import Gemma3TextConfig, GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from refgemma.teach.exercises import single_operations as exercise

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip


def test_the_scores_of_gemma_3() -> None:
    def norm(x: np.ndarray, weight: np.ndarray) -> torch.Tensor:
        module = Gemma3RMSNorm(4, eps=1e-6)
        module.weight.data = torch.tensor(weight)
        return module(torch.tensor(x))

    q, k = norm(exercise._QUERIES, exercise._Q_WEIGHT), norm(exercise._KEYS, exercise._K_WEIGHT)
    recorded = (q @ k.transpose(-1, -2) * 9**-0.5).detach().numpy()
    assert np.abs(recorded - exercise._QK_SCORES).max() < 1e-6  # the recorded digits


def norms(layer: torch.nn.Module) -> list[str]:
    return sorted(name for name, _ in layer.named_children() if "norm" in name)


def test_the_table_of_notebook_13() -> None:
    llama = LlamaDecoderLayer(LlamaConfig(**SMALL), 0)
    gemma = GemmaDecoderLayer(GemmaConfig(**SMALL), 0)
    third = Gemma3DecoderLayer(Gemma3TextConfig(**SMALL), 0)
    assert len(norms(llama)) == len(norms(gemma)) == 2
    assert len(norms(third)) == 4
    assert norms(third.self_attn) == ["k_norm", "q_norm"]
    assert norms(gemma.self_attn) == norms(llama.self_attn) == []
    assert (LlamaConfig().hidden_act, GemmaConfig().hidden_act) == ("silu", "gelu_pytorch_tanh")
    assert Gemma3TextConfig().hidden_activation == "gelu_pytorch_tanh"
    assert Gemma3TextConfig().attn_logit_softcapping is Gemma3TextConfig().final_logit_softcapping is None
    assert (LlamaConfig().tie_word_embeddings, GemmaConfig().tie_word_embeddings) == (False, True)
    assert Gemma3TextConfig().layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]
    seven = GemmaConfig()
    assert (seven.num_attention_heads, seven.num_key_value_heads) == (16, 16)
    rope = Gemma3TextConfig().rope_parameters
    assert [rope[kind]["rope_theta"] for kind in ("sliding_attention", "full_attention")] == [10_000, 1_000_000]
    # A fresh norm multiplies by w = 1 in Llama, by 1 + w with w = 0 in Gemma.
    assert float(llama.input_layernorm.weight.detach()[0]) == 1
    assert float(third.input_layernorm.weight.detach()[0]) == float(gemma.input_layernorm.weight.detach()[0]) == 0
    embed = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)).model.embed_tokens
    assert float(embed.embed_scale) == 4
