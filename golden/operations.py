"""Operations recorded alone, on inputs that whole models do not reach: every bf16 number, late positions, extremes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Gemma2Config
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2 import modeling_gemma2 as gemma2

Tensors = dict[str, torch.Tensor]
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def randn(*shape: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def every_bf16() -> torch.Tensor:
    """All 65280 finite bf16 numbers."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    return numbers[torch.isfinite(numbers)]


def rms_norm(dtype: torch.dtype) -> Tensors:
    """Rows from tiny to huge, and a row of zeros, where only eps keeps the result finite."""
    norm = gemma2.Gemma2RMSNorm(97).to(dtype)
    norm.weight.data = randn(97, seed=1, spread=0.5).to(dtype)
    sizes = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 30.0, 200.0]).reshape(-1, 1)
    x = (randn(6, 97, seed=2) * sizes).to(dtype)
    return {"x": x, "weight": norm.weight.data, "y": norm(x)}


def linear(dtype: torch.dtype) -> Tensors:
    x, weight = randn(11, 384, seed=3).to(dtype), randn(53, 384, seed=4, spread=0.1).to(dtype)
    return {"x": x, "weight": weight, "y": torch.nn.functional.linear(x, weight)}


def gelu(dtype: torch.dtype) -> Tensors:
    x = every_bf16() if dtype == torch.bfloat16 else torch.linspace(-12, 12, 4801).to(dtype)
    return {"x": x, "y": ACT2FN["gelu_pytorch_tanh"](x)}


def soft_cap(cap: float) -> Callable[[torch.dtype], Tensors]:
    def run(dtype: torch.dtype) -> Tensors:
        x = every_bf16() if dtype == torch.bfloat16 else torch.linspace(-400, 400, 4801).to(dtype)
        y = torch.tanh(x / cap) * cap  # the three lines of eager_attention_forward and Gemma2ForCausalLM.forward
        return {"x": x, "cap": torch.tensor([cap], dtype=torch.float64), "y": y}

    return run


def softmax(dtype: torch.dtype) -> Tensors:
    """Through transformers' own eager attention, with keys hidden and scores of any size; one key stays visible."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 1, False
    query, eye = randn(2, 3, 7, 9, seed=5, spread=4.0).to(dtype), torch.eye(9).to(dtype).expand(2, 3, 9, 9)
    visible = torch.rand((2, 1, 7, 9), generator=torch.Generator().manual_seed(6)) < 0.6
    visible[..., 0] = True
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    _, probs = gemma2.eager_attention_forward(module, query, eye, eye, mask, scaling=1.0)
    return {"scores": query, "mask": visible, "y": probs}


def rotary(head_dim: int) -> Callable[[torch.dtype], Tensors]:
    """The tables up to the last position that the released models know."""

    def run(dtype: torch.dtype) -> Tensors:
        config = Gemma2Config(head_dim=head_dim, num_hidden_layers=1)
        positions = torch.tensor(
            [[0, 1, 2, 3, 5, 8, 63, 255, 256, 257, 1000, 2047, 4095, 4096, 4097, 8000, 8190, 8191]]
        )
        cos, sin = gemma2.Gemma2RotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
        x = randn(1, 2, positions.shape[1], head_dim, seed=7).to(dtype)
        rotated, _ = gemma2.apply_rotary_pos_emb(x, x, cos, sin)
        return {"positions": positions, "cos": cos.unsqueeze(1), "sin": sin.unsqueeze(1), "x": x, "y": rotated}

    return run


def attention_scores(dtype: torch.dtype) -> Tensors:
    """At the 27B's head width and scale, which is no power of two; the line of eager_attention_forward."""
    q, k, scale = randn(2, 3, 5, 128, seed=11).to(dtype), randn(2, 3, 7, 128, seed=12).to(dtype), 144**-0.5
    return {"q": q, "k": k, "scale": torch.tensor([scale], dtype=torch.float64), "y": torch.matmul(q, k.mT) * scale}


def embed(hidden: int) -> Callable[[torch.dtype], Tensors]:
    """At the released widths, where sqrt(hidden) is or is not a number of the format."""

    def run(dtype: torch.dtype) -> Tensors:
        layer = gemma2.Gemma2TextScaledWordEmbedding(5, hidden, 0, embed_scale=hidden**0.5).to(dtype)
        layer.weight.data = randn(5, hidden, seed=8).to(dtype)
        ids = torch.tensor([[4, 0, 3], [1, 2, 4]])
        return {"ids": ids, "weight": layer.weight.data, "y": layer(ids)}

    return run


def repeat_kv(dtype: torch.dtype) -> Tensors:
    x = randn(2, 3, 5, 4, seed=9).to(dtype)
    return {"x": x, "groups": torch.tensor([2]), "y": gemma2.repeat_kv(x, 2)}


def masks(dtype: torch.dtype) -> Tensors:
    """Both masks of a whole sequence with padding on the left and on the right; visible is 1."""
    config = Gemma2Config(sliding_window=4, attn_implementation="eager", num_hidden_layers=2)
    padding = torch.ones(3, 11, dtype=torch.long)
    padding[1, :3], padding[2, -2:] = 0, 0
    common = dict(config=config, inputs_embeds=torch.zeros(3, 11, 1), attention_mask=padding, past_key_values=None)
    full, sliding = create_causal_mask(**common), create_sliding_window_causal_mask(**common)
    return {"padding": padding, "full": full == 0, "sliding": sliding == 0, "window": torch.tensor([4])}


def loss(dtype: torch.dtype) -> Tensors:
    logits, labels = randn(2, 7, 19, seed=10, spread=5.0).to(dtype), torch.arange(14).reshape(2, 7) % 19
    labels[0, 3], labels[1, :2] = -100, -100
    from transformers.loss.loss_utils import ForCausalLMLoss

    value = ForCausalLMLoss(logits, labels, vocab_size=19).reshape(1)
    nothing = torch.full_like(labels, -100)
    return {
        "logits": logits,
        "labels": labels,
        "y": value,
        "y_nothing": ForCausalLMLoss(logits, nothing, vocab_size=19).reshape(1),
    }


_ALL, _ONE = (torch.float32, torch.bfloat16, torch.float16), (torch.float32,)

_FUNCTIONS: dict[str, tuple[str, Callable[[torch.dtype], Tensors], tuple[torch.dtype, ...]]] = {
    "rms-norm": ("rms_norm", rms_norm, _ALL),
    "linear": ("linear", linear, _ALL),
    "gelu": ("gelu_tanh", gelu, _ALL),
    "soft-cap-50": ("soft_cap", soft_cap(50.0), _ALL),
    "soft-cap-30": ("soft_cap", soft_cap(30.0), _ALL),
    "attention-scores": ("attention_scores", attention_scores, _ALL),
    "softmax": ("softmax", softmax, _ALL),
    "rotary-256": ("rotary", rotary(256), _ALL),
    "rotary-128": ("rotary", rotary(128), _ALL),
    "embed-3584": ("embed", embed(3584), _ALL),
    "embed-4608": ("embed", embed(4608), _ALL),
    "repeat-kv": ("repeat_kv", repeat_kv, _ONE),
    "masks": ("masks", masks, _ONE),
    "loss": ("loss", loss, _ONE),
}


def _cases() -> dict[str, tuple[dict[str, Any], Callable[[], Tensors]]]:
    made: dict[str, tuple[dict[str, Any], Callable[[], Tensors]]] = {}
    for name, (operation, function, dtypes) in _FUNCTIONS.items():
        for dtype in dtypes:
            about = {"operation": operation, "dtype": str(dtype).removeprefix("torch.")}
            made[f"op-{name}-{SHORT[dtype]}"] = (about, partial(_recorded, function, dtype))
    return made


def _recorded(function: Callable[[torch.dtype], Tensors], dtype: torch.dtype) -> Tensors:
    return {name: tensor.detach().clone().contiguous() for name, tensor in function(dtype).items()}


OP_CASES = _cases()
