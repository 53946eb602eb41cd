"""The key/value cache as a plain value: what a block has to remember of the tokens before. Checked against the
recorded cached decoding of transformers 5.23 (`DynamicCache` with sliding layers).

A `Cache` is never changed: `forward` takes one and returns the next. So a prompt can be continued in many ways from
one cache, and nothing goes wrong when a step is thrown away.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.precision import Array
from refgemma.shapes import KVHeads, Past


@dataclass(frozen=True)
class LayerCache:
    """Keys (already turned to their positions) and values of one layer, and the place of the first one kept."""

    keys: Past
    values: Past
    start: int

    @property
    def stop(self) -> int:
        """How many tokens this layer has seen; not how many it has kept."""
        kept: int = self.keys.shape[2]
        return self.start + kept


Cache: TypeAlias = tuple[LayerCache, ...]


def empty_cache(config: Gemma2Config, batch: int, like: Array) -> Cache:
    """The cache before the first token, in the precision of `like`.

    Examples
    --------
    >>> config = Gemma2Config(num_hidden_layers=2, num_key_value_heads=4, head_dim=8)
    >>> empty_cache(config, batch=3, like=np.zeros(0, np.float32))[0].keys.shape
    (3, 4, 0, 8)
    """
    nothing = np.zeros_like(like, shape=(batch, config.num_key_value_heads, 0, config.head_dim))
    return (LayerCache(nothing, nothing, start=0),) * config.num_hidden_layers


def extend(past: LayerCache, keys: KVHeads, values: KVHeads) -> LayerCache:
    """`past` followed by the keys and values of this call."""
    return LayerCache(
        np.concatenate([past.keys, keys], axis=2), np.concatenate([past.values, values], axis=2), past.start
    )


def keep_last(layer: LayerCache, count: int) -> LayerCache:
    """Drop all but the last `count` tokens.

    A sliding layer keeps ``window - 1``: the next query brings the window's last key itself. Keeping one fewer, or
    dropping one step too early, is a mistake that several implementations made.

    Examples
    --------
    >>> full = LayerCache(np.zeros((1, 1, 5, 2)), np.zeros((1, 1, 5, 2)), start=0)
    >>> keep_last(full, 3).start, keep_last(full, 3).stop, keep_last(full, 9).start
    (2, 5, 0)
    """
    dropped = max(layer.keys.shape[2] - count, 0)
    if not dropped:
        return layer
    # Copies: a view would keep the dropped tokens in memory.
    return LayerCache(layer.keys[:, :, dropped:].copy(), layer.values[:, :, dropped:].copy(), layer.start + dropped)
