"""Hold the weights of a Gemma 2 in dataclasses with Hugging Face's names, and list all tensors with their shapes.

Checked against the state dict of transformers 5.23 `Gemma2ForCausalLM`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from refgemma.config import Gemma2Config
from refgemma.files import pluralise


@runtime_checkable
class Rows(Protocol):
    """An embedding table: an array, or a table on disk that reads and converts rows when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(vocab, hidden)``."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the rows of a slice or of an integer array."""
        ...


HEAD_ROWS = 16384  # rows in use at once; limits the memory for a head of 256000 tokens


def row_pieces(table: Rows) -> Iterator[Any]:
    """Yield the rows of an embedding table, `HEAD_ROWS` at a time.

    Examples
    --------
    >>> [rows.shape for rows in row_pieces(np.zeros((20000, 2)))]
    [(16384, 2), (3616, 2)]
    """
    return (table[start : start + HEAD_ROWS] for start in range(0, table.shape[0], HEAD_ROWS))


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one block, in the order of use; matrices have the shape ``(out, in)``."""

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
    q_proj_bias: Float[np.ndarray, " heads*head_dim"] | None = (
        None  # only with config.attention_bias; no released model has it
    )
    k_proj_bias: Float[np.ndarray, " kv_heads*head_dim"] | None = None
    v_proj_bias: Float[np.ndarray, " kv_heads*head_dim"] | None = None
    o_proj_bias: Float[np.ndarray, " hidden"] | None = None


@dataclass(frozen=True)
class Weights:
    """All weights of a model; `layers` and `embed_tokens` may read a block or a row only when it is accessed."""

    embed_tokens: Rows
    layers: Sequence[LayerWeights]
    norm: Float[np.ndarray, " hidden"]
    lm_head: Rows | None = None  # an untied head; no released Gemma 2 has one

    @property
    def head(self) -> Rows:
        """The table that scores the tokens: the embedding table, unless the head is untied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head


@dataclass(frozen=True)
class Score:
    """The head of a classifier; a token classifier has a bias."""

    weight: Float[np.ndarray, "labels hidden"]
    bias: Float[np.ndarray, " labels"] | None = None


_INSIDE = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_INSIDE |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}

EMBED_TOKENS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
# The head. If it is tied to the embedding, a checkpoint may store the same table again under this name.
LM_HEAD = "lm_head.weight"
# The head of a sequence or token classifier.
SCORE_WEIGHT = "score.weight"
SCORE_BIAS = "score.bias"


def _name_tensor(field: str) -> str:
    """Return a tensor's name inside its layer, given the field: ``self_attn.q_proj.bias`` for ``q_proj_bias``."""
    module = field.removesuffix("_bias")
    return f"{_INSIDE.get(module, module)}.{'weight' if module == field else 'bias'}"


def layer_tensors(layer: int, bias: bool = False) -> dict[str, str]:
    """Return the tensor name in a checkpoint for each field of `LayerWeights` in block `layer`.

    Parameters
    ----------
    layer : int
        The number of the block.
    bias : bool
        If true, the projections of attention have biases.

    Examples
    --------
    >>> layer_tensors(3)["q_proj"]
    'model.layers.3.self_attn.q_proj.weight'
    """
    names = [f.name for f in fields(LayerWeights) if bias or not f.name.endswith("_bias")]
    return {name: f"model.layers.{layer}.{_name_tensor(name)}" for name in names}


def tensor_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors in a checkpoint with this `config`, in the order of use.

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
        "q_proj_bias": (queries,),
        "k_proj_bias": (keys,),
        "v_proj_bias": (keys,),
        "o_proj_bias": (hidden,),
    }
    table: dict[str, tuple[int, ...]] = {EMBED_TOKENS: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        table |= {name: shapes[field] for field, name in layer_tensors(layer, config.attention_bias).items()}
    head = {} if config.tie_word_embeddings else {LM_HEAD: (config.vocab_size, hidden)}
    return table | {NORM: (hidden,)} | head


def weights_of(tensors: Mapping[str, Any], config: Gemma2Config) -> Weights:
    """Return `Weights`, given tensors by the names of `tensor_shapes`.

    Examples
    --------
    >>> config = Gemma2Config(vocab_size=5, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    >>> weights = weights_of({name: np.zeros(shape) for name, shape in tensor_shapes(config).items()}, config)
    >>> weights.layers[0].down_proj.shape
    (4, 6)
    """
    layers = [
        LayerWeights(**{field: tensors[name] for field, name in layer_tensors(n, config.attention_bias).items()})
        for n in range(config.num_hidden_layers)
    ]
    head = None if config.tie_word_embeddings else tensors.get(LM_HEAD)  # a bare model or a classifier has no head
    return Weights(tensors[EMBED_TOKENS], layers, tensors[NORM], head)


def require_memory(nbytes: int, what: str) -> None:
    """Raise `MemoryError` if `nbytes` exceed the machine's memory; otherwise the system would kill the process
    later."""
    holds = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if nbytes > holds:
        raise MemoryError(f"{what} takes {nbytes / 1e9:.1f} GB; this machine has {holds / 1e9:.1f} GB")


@dataclass(frozen=True)
class OnDemand(Sequence[LayerWeights]):
    """A sequence of blocks; each access makes or reads a block again, and none is kept.

    Parameters
    ----------
    tensor : callable
        Function that returns the rows of a tensor, given the tensor's name.
    numbers : range
        The numbers of the blocks in this sequence.
    bias : bool
        If true, the projections of attention have biases.

    Examples
    --------
    >>> layers = OnDemand(lambda name: np.zeros((4, 2)), range(26))
    >>> len(layers), layers[-2:].numbers, layers[3].q_proj.shape
    (26, range(24, 26), (4, 2))
    """

    tensor: Callable[[str], Rows] = field(repr=False)
    numbers: range
    bias: bool = False

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.numbers)

    def __getitem__(self, layer: Any) -> Any:
        """Make block `layer`; for a slice, return a sequence of its blocks without making them."""
        if isinstance(layer, slice):
            return replace(self, numbers=self.numbers[layer])
        tensors = self.rows(layer)
        require_memory(4 * sum(math.prod(rows.shape) for rows in tensors.values()), f"block {layer}")
        return LayerWeights(**{name: rows[:] for name, rows in tensors.items()})

    def __iter__(self) -> Iterator[LayerWeights]:
        """Make one block at a time. (The iterator of `Sequence` would keep each block while making the next.)"""
        return (self[layer] for layer in range(len(self)))

    def rows(self, layer: int) -> dict[str, Rows]:
        """Return the tensors of block `layer` by field; their rows are not made yet."""
        if not -len(self) <= layer < len(self):
            raise IndexError(f"layer {layer} does not exist; the model has {pluralise(len(self), 'layer')}")
        names = layer_tensors(self.numbers[layer], self.bias)
        return {name: self.tensor(tensor) for name, tensor in names.items()}


class _OneLayer:
    """Keep the last accessed layer, so that its tensors are read from disk only once."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self._layers = layers
        self._kept: dict[int, LayerWeights] = {}

    def __call__(self, number: int) -> LayerWeights:
        if number not in self._kept:
            self._kept.clear()  # free this memory before reading the next layer
            self._kept[number] = self._layers[number]
        return self._kept[number]


@dataclass(frozen=True)
class LayerRows:
    """One tensor of a layer; accessing its rows reads the layer."""

    layer: Callable[[int], LayerWeights]
    number: int
    field: str
    shape: tuple[int, ...]
    kept: bool  # true if the layer stays in memory, so that changes to its tensors persist

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the rows of a slice or of an integer array."""
        return getattr(self.layer(self.number), self.field)[rows]


def named_weights(weights: Weights, config: Gemma2Config) -> dict[str, Rows]:
    """Return every tensor by name, in torch's order; a tensor on disk is read when its rows are accessed.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> named_weights(tiny.weights, tiny.config)["model.layers.5.self_attn.q_proj.weight"][:2].shape
    (2, 234)
    """
    shapes, one_layer = tensor_shapes(config), _OneLayer(weights.layers)
    named: dict[str, Rows] = {EMBED_TOKENS: weights.embed_tokens}
    order = list(layer_tensors(0))

    def place(item: tuple[str, str]) -> tuple[bool, int]:  # put norms last, and a bias after its weight
        return item[0].endswith("layernorm"), order.index(item[0].removesuffix("_bias"))

    for n in range(config.num_hidden_layers):
        for weight, name in sorted(layer_tensors(n, config.attention_bias).items(), key=place):
            named[name] = LayerRows(one_layer, n, weight, shapes[name], not isinstance(weights.layers, OnDemand))
    named[NORM] = weights.norm
    return named if weights.lm_head is None else named | {LM_HEAD: weights.lm_head}
