"""Define the key/value cache as an immutable value with each block's earlier keys and values. Checked against the
cached decoding recorded from transformers 5.23 (`DynamicCache` with sliding layers).

A `Cache` never changes: `forward` takes a cache and returns the next, and methods return new caches. So a prompt can
be continued in many ways from one cache, and a step can be discarded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError, as_array
from refgemma.precision import Array, Rounded, as_dtype, dtype_name
from refgemma.shapes import KVHeads, Past

LegacyCache: TypeAlias = Sequence[Sequence[Array]]


@dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated by their positions) and values of one layer, and the place of the first key that is kept.

    It can be unpacked and indexed as the pair ``(keys, values)``, like a layer in the legacy format.
    """

    keys: Past
    values: Past
    start: int

    @property
    def stop(self) -> int:
        """The number of tokens that this layer has seen, including dropped ones."""
        kept: int = self.keys.shape[2]
        return self.start + kept

    def __iter__(self) -> Iterator[Array]:
        """Yield keys, then values."""
        return iter((self.keys, self.values))

    def __getitem__(self, index: int) -> Array:
        """Return the keys for 0, the values for 1."""
        return (self.keys, self.values)[index]

    def __len__(self) -> int:
        """Return 2, the length of the pair, for any number of tokens."""
        return 2


class Cache(tuple[LayerCache, ...]):
    """The keys and values of all layers, with one `LayerCache` each.

    A full layer keeps every token, a sliding layer the last ``window - 1``. The cache is a tuple, so code for the
    legacy format (``past[layer][0].shape[2]``) can read it too.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> cache = refgemma.forward([[2, 300], [2, 400]], tiny.weights, tiny.config).cache
    >>> cache.get_seq_length(), cache[0].keys.shape
    (2, (2, 2, 2, 32))
    >>> cache.reorder([1, 1, 0])[0].keys.shape, cache.crop(1).get_seq_length()
    ((3, 2, 2, 32), 1)
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """Return the numbers of layers and tokens, not their values."""
        return f"Cache({len(self)} layers, {self.get_seq_length()} tokens seen)"

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of tokens that the cache has seen; 0 for a cache without layers."""
        return self[layer].stop if self else 0

    def _rows(self, select: Callable[[Array], Array]) -> "Cache":
        return Cache(LayerCache(select(layer.keys), select(layer.values), layer.start) for layer in self)

    def reorder(self, rows: npt.ArrayLike) -> "Cache":
        """Return a cache whose row ``i`` is row ``rows[i]`` of this cache, for beams or to drop or repeat sequences.

        Raises
        ------
        InputError
            If `rows` are not row numbers of this cache.
        """
        picked = as_array(rows, "rows")
        batch = self[0].keys.shape[0] if self else 0
        if picked.ndim != 1 or picked.dtype.kind not in "iu" or ((picked < 0) | (picked >= batch)).any():
            raise InputError(f"rows is {picked.tolist()}; it must be a list of row numbers from 0 to {batch - 1}")
        return self._rows(lambda x: x[picked])

    def repeat_interleave(self, repeats: Any) -> "Cache":
        """Repeat every row `repeats` times; rows 0, 1 become 0, 0, 1, 1.

        Raises
        ------
        InputError
            If `repeats` is not a whole number of at least 1.
        """
        if not isinstance(repeats, int | np.integer) or repeats < 1:
            raise InputError(f"repeats is {repeats!r}; it must be a whole number of at least 1")
        return self._rows(lambda x: np.repeat(x, repeats, axis=0))

    def crop(self, max_length: int) -> "Cache":
        """Return the cache of the first `max_length` tokens; a negative number is the number of tokens to remove.

        Raises
        ------
        InputError
            If a sliding layer has already dropped keys that the shorter cache needs.
        """
        seen = self.get_seq_length()
        length = max(max_length + seen, 0) if max_length < 0 else min(max_length, seen)
        dropped = [n for n, layer in enumerate(self) if layer.start and length < layer.stop]
        if dropped:
            raise InputError(
                f"the cache cannot be cropped to {length} tokens: sliding layer {dropped[0]} has dropped its first "
                f"{self[dropped[0]].start}; keep an earlier cache (caches never change) and continue from it"
            )
        return self._rows(lambda x: x[:, :, :length].copy())

    def to_legacy(self) -> tuple[tuple[Array, Array], ...]:
        """Return a tuple of plain pairs ``(keys, values)``, each ``(batch, kv_heads, kept, head_dim)``.

        The tuple does not say how many tokens sliding layers have dropped; see `from_legacy`.
        """
        return tuple((layer.keys, layer.values) for layer in self)

    @classmethod
    def from_legacy(cls, pairs: LegacyCache, config: Gemma2Config, like: Array, seen: int | None = None) -> "Cache":
        """Make a cache from a tuple of pairs ``(keys, values)``, one per layer, in the precision of `like`.

        Parameters
        ----------
        pairs : sequence of (keys, values)
            Arrays ``(batch, kv_heads, kept, head_dim)`` for the last `kept` tokens.
        seen : int, optional
            The number of tokens that the cache has seen. The default is the number that the longest layer keeps, which
            is right if a layer is full, or if no window is filled yet.

        Raises
        ------
        InputError
            If a layer is not such a pair, or the number of tokens seen is unknown.
        """
        layers = [_pair(pair, n, like) for n, pair in enumerate(pairs)]
        if not layers or len(layers) != config.num_hidden_layers:
            raise InputError(f"past_key_values has {len(layers)} layers; the model has {config.num_hidden_layers}")
        kept = [keys.shape[2] for keys, _ in layers]
        total = max(kept) if seen is None else seen
        told = any(not config.is_sliding(n) for n in range(len(layers))) or total < config.sliding_window - 1
        if seen is None and not told:
            raise InputError(
                "past_key_values is a plain tuple with sliding layers only, so the number of tokens it has seen is "
                "unknown; pass cache_position, or the Cache itself"
            )
        for n, count in enumerate(kept):
            needed = min(total, config.sliding_window - 1) if config.is_sliding(n) else total
            if not needed <= count <= total:
                raise InputError(
                    f"past_key_values: layer {n} keeps {count} tokens; after {total} tokens it must keep {needed}"
                )
        return cls(LayerCache(keys, values, total - count) for (keys, values), count in zip(layers, kept, strict=True))


def _pair(pair: Sequence[Array], layer: int, like: Array) -> tuple[Array, Array]:
    """Check the keys and values of one layer of the legacy format."""
    if len(pair) != 2:
        raise InputError(f"past_key_values[{layer}] has {len(pair)} parts; it must be a pair (keys, values)")
    name = f"past_key_values[{layer}]"
    keys, values = (x if isinstance(x, Rounded) else as_array(x, name) for x in pair)
    if keys.ndim != 4 or keys.shape != values.shape or keys.dtype.kind != "f" or values.dtype.kind != "f":
        raise InputError(
            f"past_key_values[{layer}]: keys have shape {keys.shape}, values {values.shape}; both must be numbers "
            "of shape (batch, kv_heads, tokens, head_dim)"
        )
    return as_dtype(keys, dtype_name(like)), as_dtype(values, dtype_name(like))


def empty_cache(config: Gemma2Config, batch: int, like: Array) -> Cache:
    """Return the cache before the first token, in the precision of `like`.

    Examples
    --------
    >>> config = Gemma2Config(num_hidden_layers=2, num_key_value_heads=4, head_dim=8)
    >>> empty_cache(config, batch=3, like=np.zeros(0, np.float32))[0].keys.shape
    (3, 4, 0, 8)
    """
    nothing = np.zeros_like(like, shape=(batch, config.num_key_value_heads, 0, config.head_dim))
    return Cache([LayerCache(nothing, nothing, start=0)] * config.num_hidden_layers)


def check_cache(cache: Cache | None, config: Gemma2Config, batch: int, like: Array) -> Cache:
    """Return `cache`, or an empty cache for None; raise an error if it belongs to another model or batch.

    The cache must have the precision of `like`.

    Raises
    ------
    InputError
        If the cache does not fit the model, the batch or the precision.
    """
    if cache is None:
        return empty_cache(config, batch, like)
    heads, head_dim, precision = config.num_key_value_heads, config.head_dim, dtype_name(like)
    if len(cache) != config.num_hidden_layers or any(
        x.shape != (batch, heads, layer.keys.shape[2], head_dim) or dtype_name(x) != precision
        for layer in cache
        for x in layer
    ):
        raise InputError(
            f"the cache of {len(cache)} layers does not fit this model, batch size ({batch}) or precision "
            f"({precision}); continue from a cache that the same model returned for the same batch"
        )
    return cache


def extend(past: LayerCache, keys: KVHeads, values: KVHeads) -> LayerCache:
    """Append the keys and values of this call to `past`."""
    return LayerCache(
        np.concatenate([past.keys, keys], axis=2), np.concatenate([past.values, values], axis=2), past.start
    )


def keep_last(layer: LayerCache, count: int) -> LayerCache:
    """Drop all but the last `count` tokens.

    A sliding layer keeps ``window - 1`` tokens, because the next query adds the window's last key itself. Several
    implementations kept one key fewer, or dropped it one step too early.

    Examples
    --------
    >>> full = LayerCache(np.zeros((1, 1, 5, 2)), np.zeros((1, 1, 5, 2)), start=0)
    >>> keep_last(full, 3).start, keep_last(full, 3).stop, keep_last(full, 9).start
    (2, 5, 0)
    """
    dropped = max(layer.keys.shape[2] - count, 0)
    if not dropped:
        return layer
    # Copy, because a view would keep the dropped tokens in memory.
    return LayerCache(layer.keys[:, :, dropped:].copy(), layer.values[:, :, dropped:].copy(), layer.start + dropped)
