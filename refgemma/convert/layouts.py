"""Describe how tensors of the original Gemma 2 releases are made from Hugging Face tensors: stacked, with axes moved.

Names and shapes follow gemma_pytorch's `model.py` and google-deepmind/gemma's `modules.py`. The order of the norms was
also checked against MaxText's converter. With weights converted by this table, gemma_pytorch's own module computes the
same logits as refgemma.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.precision import Array
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD, NORM, layer_tensors, tensor_shapes

View: TypeAlias = Callable[[Array], Array]


def _identity(x: Array) -> Array:
    return x


def add_one(x: Array) -> Array:
    """Return ``x + 1`` in float64."""
    return x.astype(np.float64) + 1


ROWWISE = (_identity, add_one)  # views whose result row depends only on the same input row


@dataclass(frozen=True)
class Piece:
    """The rows of an original tensor that correspond to one Hugging Face tensor.

    `fold` makes the rows from the Hugging Face tensor; `unfold` is the inverse.
    """

    name: str
    rows: int
    fold: View = _identity
    unfold: View = _identity


@dataclass(frozen=True)
class Original:
    """One tensor of an original checkpoint: pieces stacked by rows."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def pytorch_layout(config: Gemma2Config, vocab_rows: int | None = None) -> list[Original]:
    """Return the tensors of gemma_pytorch, which equal Hugging Face's except the embedding's name and ``qkv_proj``.

    Examples
    --------
    >>> layout = {original.name: original.shape for original in pytorch_layout(Gemma2Config.preset("2b"))}
    >>> layout["embedder.weight"], layout["model.layers.25.self_attn.qkv_proj.weight"]
    ((256000, 2304), (4096, 2304))
    """
    shapes = tensor_shapes(config)
    rows, hidden = vocab_rows or config.vocab_size, config.hidden_size
    layout = [Original("embedder.weight", (rows, hidden), (Piece(EMBED_TOKENS, config.vocab_size),))]
    for layer in range(config.num_hidden_layers):
        names = layer_tensors(layer)
        fused = tuple(Piece(names[key], shapes[names[key]][0]) for key in ("q_proj", "k_proj", "v_proj"))
        name = names["q_proj"].replace("q_proj", "qkv_proj")
        layout.append(Original(name, (sum(piece.rows for piece in fused), hidden), fused))
        others = [name for name in names.values() if name not in {piece.name for piece in fused}]
        layout += [Original(name, shapes[name], (Piece(name, shapes[name][0]),)) for name in others]
    return [*layout, Original(NORM, (hidden,), (Piece(NORM, hidden),))]


def _fold_heads(name: str, heads: int, config: Gemma2Config, stacked: bool) -> Piece:
    """Return the piece for a projection ``(heads*head_dim, hidden)``, in Flax ``(heads, hidden, head_dim)``."""
    hidden, head_dim = config.hidden_size, config.head_dim

    def fold(x: Array) -> Array:
        folded = x.reshape(heads, head_dim, hidden).transpose(0, 2, 1)
        return folded[None] if stacked else folded

    def unfold(x: Array) -> Array:
        return x.reshape(heads, hidden, head_dim).transpose(0, 2, 1).reshape(heads * head_dim, hidden)

    return Piece(name, 1 if stacked else heads, fold, unfold)


def _transpose(name: str, rows: int) -> Piece:
    return Piece(name, rows, lambda x: x.T, lambda x: x.T)


def _fold_gate(name: str, transposed: bool) -> Piece:
    """Return the piece for one half of ``gating_einsum``; if `transposed`, it equals Hugging Face's tensor."""
    if transposed:
        return Piece(name, 1, lambda x: x[None], lambda x: x[0])
    return Piece(name, 1, lambda x: x.T[None], lambda x: x[0].T)


def flax_layout(config: Gemma2Config, transposed: bool, vocab_rows: int | None = None) -> list[Original]:
    """Return the tensors of google-deepmind/gemma; `transposed` is its `transpose_gating_einsum` (2B: false).

    Examples
    --------
    >>> layout = {original.name: original.shape for original in flax_layout(Gemma2Config.preset("2b"), False, 256128)}
    >>> layout["transformer/embedder/input_embedding"], layout["transformer/layer_0/attn/kv_einsum/w"]
    ((256128, 2304), (2, 4, 2304, 256))
    """
    hidden, width = config.hidden_size, config.intermediate_size
    rows = vocab_rows or config.vocab_size
    table = (Piece(EMBED_TOKENS, config.vocab_size),)
    layout = [Original("transformer/embedder/input_embedding", (rows, hidden), table)]
    for layer in range(config.num_hidden_layers):
        names, path = layer_tensors(layer), f"transformer/layer_{layer}"
        norms = {
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
        layout += _flax_attention(config, names, f"{path}/attn")
        layout += [
            Original(f"{path}/{flax}/scale", (hidden,), (Piece(names[ours], hidden),)) for flax, ours in norms.items()
        ]
        gates = tuple(_fold_gate(names[key], transposed) for key in ("gate_proj", "up_proj"))
        shape = (2, width, hidden) if transposed else (2, hidden, width)
        layout.append(Original(f"{path}/mlp/gating_einsum/w", shape, gates))
        down = (_transpose(names["down_proj"], width),)
        layout.append(Original(f"{path}/mlp/linear/w", (width, hidden), down))
    return [*layout, Original("transformer/final_norm/scale", (hidden,), (Piece(NORM, hidden),))]


def _flax_attention(config: Gemma2Config, names: Mapping[str, str], path: str) -> list[Original]:
    heads, kv_heads, hidden, head_dim = (
        config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.head_dim,
    )  # fmt: skip
    out = Piece(
        names["o_proj"], heads, lambda x: x.T.reshape(heads, head_dim, hidden), lambda x: x.reshape(-1, hidden).T
    )
    vec = Original(f"{path}/attn_vec_einsum/w", (heads, head_dim, hidden), (out,))
    keys = tuple(_fold_heads(names[key], kv_heads, config, True) for key in ("k_proj", "v_proj"))
    if heads == kv_heads:
        both = (_fold_heads(names["q_proj"], heads, config, True), *keys)
        return [Original(f"{path}/qkv_einsum/w", (3, heads, hidden, head_dim), both), vec]
    query = (_fold_heads(names["q_proj"], heads, config, False),)
    return [
        Original(f"{path}/q_einsum/w", (heads, hidden, head_dim), query),
        Original(f"{path}/kv_einsum/w", (2, kv_heads, hidden, head_dim), keys),
        vec,
    ]


# Name of LitGPT's tensor inside a layer -> the fields of `LayerWeights` that are stacked in it.
LITGPT = {
    "norm_1": ("input_layernorm",),
    "attn.qkv": ("q_proj", "k_proj", "v_proj"),
    "attn.proj": ("o_proj",),
    "post_attention_norm": ("post_attention_layernorm",),
    "norm_2": ("pre_feedforward_layernorm",),
    "mlp.fc_1": ("gate_proj",),
    "mlp.fc_2": ("up_proj",),
    "mlp.proj": ("down_proj",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}
LITGPT_EMBEDDING = "transformer.wte.weight"


def litgpt_layout(config: Gemma2Config) -> list[Original]:
    """Return the tensors of LitGPT's ``lit_model.pth``, with the names of its function ``copy_weights_gemma_2``.

    Examples
    --------
    >>> [original.name for original in litgpt_layout(Gemma2Config.preset("2b"))][:3]
    ['transformer.wte.weight', 'transformer.h.0.norm_1.weight', 'transformer.h.0.attn.qkv.weight']
    """
    shapes = tensor_shapes(config)
    names: dict[str, tuple[str, ...]] = {LITGPT_EMBEDDING: (EMBED_TOKENS,)}
    for layer in range(config.num_hidden_layers):
        own = layer_tensors(layer)
        names |= {
            f"transformer.h.{layer}.{module}.weight": tuple(own[key] for key in keys) for module, keys in LITGPT.items()
        }
    names |= {"transformer.ln_f.weight": (NORM,)} | ({LM_HEAD: (LM_HEAD,)} if LM_HEAD in shapes else {})
    layout = []
    for name, parts in names.items():
        pieces = tuple(Piece(part, shapes[part][0]) for part in parts)
        layout.append(Original(name, (sum(piece.rows for piece in pieces), *shapes[parts[0]][1:]), pieces))
    return layout


def hf_layout(config: Gemma2Config) -> list[Original]:
    """Return the tensors of a Hugging Face folder, unchanged.

    Examples
    --------
    >>> len(hf_layout(Gemma2Config.preset("2b")))
    288
    """
    return [Original(name, shape, (Piece(name, shape[0]),)) for name, shape in tensor_shapes(config).items()]
