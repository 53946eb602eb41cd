"""Draw new random weights from a truncated normal, when they are needed.

Checked against the zeros, shapes and standard deviation of transformers 5.23 `Gemma2PreTrainedModel._init_weights`.
That method draws from a full normal, although its documentation says truncated.

Each block of rows of each tensor has its own random generator. So making a model of any size takes no time, and a
layer's weights do not depend on how often or in which order they are read.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma.config import Gemma2Config
from refgemma.precision import Array, as_dtype
from refgemma.weights.parameters import (
    EMBED_TOKENS,
    LM_HEAD,
    NORM,
    SCORE_BIAS,
    SCORE_WEIGHT,
    OnDemand,
    Rows,
    Score,
    Weights,
    tensor_shapes,
)

BLOCK_ROWS = 1024
RESIDENT_BYTES = 4 * 2**30


def truncated_normal(shape: tuple[int, ...], std: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw from a normal distribution; draw numbers beyond two standard deviations again.

    The result has a standard deviation of ``0.88 * std``, as in TensorFlow's initialiser of the same name.

    Examples
    --------
    >>> bool(np.abs(truncated_normal((1000,), 0.02, np.random.default_rng(0))).max() <= 0.04)
    True
    """
    drawn = rng.standard_normal(shape, np.float32)
    while (beyond := np.abs(drawn) > 2).any():
        drawn[beyond] = rng.standard_normal(int(beyond.sum()), np.float32)
    return drawn * np.float32(std)


@dataclass(frozen=True)
class Drawn:
    """A new random tensor, drawn when rows are accessed; norms, biases and the padding token's embedding are zero.

    Examples
    --------
    >>> config = Gemma2Config(vocab_size=3000, hidden_size=8)
    >>> table = Drawn(EMBED_TOKENS, (3000, 8), config, seed=0, dtype="float32")
    >>> bool((table[2500:] == table[:][2500:]).all()), table[np.array([[0, 5]])].shape, table[0:1].any()
    (True, (1, 2, 8), np.False_)
    """

    name: str
    shape: tuple[int, ...]
    config: Gemma2Config
    seed: int
    dtype: str

    def _block(self, number: int) -> npt.NDArray[np.float32]:
        rows = min(BLOCK_ROWS, self.shape[0] - number * BLOCK_ROWS)
        if len(self.shape) == 1:
            return np.zeros(rows, np.float32)
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), number])
        block = truncated_normal((rows, *self.shape[1:]), self.config.initializer_range, rng)
        padding = self.config.pad_token_id
        if self.name == EMBED_TOKENS and padding is not None and padding // BLOCK_ROWS == number:
            block[padding % BLOCK_ROWS] = 0
        return block

    def __getitem__(self, rows: Any, /) -> Array:
        """Return the rows of a slice or of an array of integers."""
        wanted = np.arange(self.shape[0])[rows]
        drawn = np.empty((*wanted.shape, *self.shape[1:]), np.float32)
        for number in np.unique(wanted // BLOCK_ROWS):
            here = wanted // BLOCK_ROWS == number
            drawn[here] = self._block(int(number))[wanted[here] % BLOCK_ROWS]
        return as_dtype(drawn, self.dtype)


def fits_in_memory(parameters: int, dtype: str) -> bool:
    """Return True if a model takes at most 4 GiB in `dtype`; a larger model is read layer by layer.

    Examples
    --------
    >>> fits_in_memory(2_922_426, "float32"), fits_in_memory(9_241_705_984, "float32")
    (True, False)
    """
    return parameters * (8 if dtype == "float64" else 4) <= RESIDENT_BYTES


def initial_weights(config: Gemma2Config, seed: int = 0, dtype: str = "float32") -> Weights:
    """Return new random weights; those of a model over 4 GiB are drawn again at each use.

    Examples
    --------
    >>> initial_weights(Gemma2Config.preset("27b")).embed_tokens[5:6].shape
    (1, 4608)
    """
    shapes = tensor_shapes(config)
    resident = fits_in_memory(sum(math.prod(shape) for shape in shapes.values()), dtype)

    def tensor(name: str) -> Drawn:
        return Drawn(name, shapes[name], config, seed, dtype)

    def table(name: str) -> Rows:
        return tensor(name)[:] if resident else tensor(name)

    layers = OnDemand(tensor, range(config.num_hidden_layers), config.attention_bias)
    return Weights(
        embed_tokens=table(EMBED_TOKENS),
        layers=list(layers) if resident else layers,
        norm=tensor(NORM)[:],
        lm_head=None if config.tie_word_embeddings else table(LM_HEAD),
    )


def initial_score(config: Gemma2Config, seed: int = 0, dtype: str = "float32", bias: bool = False) -> Score:
    """Return a classifier's new random head: normal weights and, if `bias`, a bias of zeros.

    Examples
    --------
    >>> initial_score(Gemma2Config(hidden_size=8, num_labels=3)).weight.shape
    (3, 8)
    """
    labels = config.num_labels or 0  # not None, because the configuration sets a default
    weight = Drawn(SCORE_WEIGHT, (labels, config.hidden_size), config, seed, dtype)[:]
    return Score(weight, Drawn(SCORE_BIAS, (labels,), config, seed, dtype)[:] if bias else None)
