"""The weights of a Gemma 2 as dataclasses with Hugging Face's names, and the table of all tensors with their shapes.
Checked against the state dict of transformers 5.23 `Gemma2ForCausalLM`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from refgemma.config import Gemma2Config


@runtime_checkable
class Rows(Protocol):
    """An embedding table: an array, or something on disk that is read and converted as it is indexed by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(vocab, hidden)``."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """The rows of a slice or of an integer array."""
        ...


@dataclass(frozen=True)
class LayerWeights:
    """One block's weights, in the order in which the block uses them; matrices are ``(out, in)``."""

    input_layernorm: Float[np.ndarray, " hidden"]
    q_proj: Float[np.ndarray, "heads*head_dim hidden"]
    k_proj: Float[np.ndarray, "kv_heads*head_dim hidden"]
    v_proj: Float[np.ndarray, "kv_heads*head_dim hidden"]
    o_proj: Float[np.ndarray, "hidden heads*head_dim"]
    post_attention_layernorm: Float[np.ndarray, " hidden"]
    pre_feedforward_layernorm: Float[np.ndarray, " hidden"]
    gate_proj: Float[np.ndarray, "intermediate hidden"]
    up_proj: Float[np.ndarray, "intermediate hidden"]
    down_proj: Float[np.ndarray, "hidden intermediate"]
    post_feedforward_layernorm: Float[np.ndarray, " hidden"]


@dataclass(frozen=True)
class Weights:
    """All weights. `layers` may read each block as it is asked for; `embed_tokens` may read rows as they are."""

    embed_tokens: Rows
    layers: Sequence[LayerWeights]
    norm: Float[np.ndarray, " hidden"]


_INSIDE = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_INSIDE |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}

EMBED_TOKENS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
# The head is tied to the embedding; a checkpoint may store it a second time under this name.
LM_HEAD = "lm_head.weight"


def layer_tensors(layer: int) -> dict[str, str]:
    """Field of `LayerWeights` -> name of the tensor in a checkpoint, for block `layer`.

    Examples
    --------
    >>> layer_tensors(3)["q_proj"]
    'model.layers.3.self_attn.q_proj.weight'
    """
    return {f.name: f"model.layers.{layer}.{_INSIDE.get(f.name, f.name)}.weight" for f in fields(LayerWeights)}


def tensor_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `config` holds, in the order of execution, with its shape.

    Examples
    --------
    >>> shapes = tensor_shapes(Gemma2Config.preset("9b"))
    >>> len(shapes), shapes["model.embed_tokens.weight"]
    (464, (256000, 3584))
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "input_layernorm": (hidden,),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
        "post_feedforward_layernorm": (hidden,),
    }
    table: dict[str, tuple[int, ...]] = {EMBED_TOKENS: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        table |= {name: shapes[field] for field, name in layer_tensors(layer).items()}
    return table | {NORM: (hidden,)}
