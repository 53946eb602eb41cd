"""Provide transformers' cache classes, which a call of a model fills in place.

Checked against `DynamicCache` and `StaticCache` of transformers 5.23 in the parity tests: in loops that pass a cache,
and by its content afterwards.

Each object holds an immutable `refgemma.cache.Cache`; a change replaces this value.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma.cache import Cache, LayerCache
from refgemma.config import Gemma2Config
from refgemma.files import pluralise
from refgemma.inputs import InputError
from refgemma.precision import Array, Rounded


class DynamicCache:
    """A cache that a model fills in place if a caller passes it as ``past_key_values``.

    Parameters
    ----------
    ddp_cache_data : sequence of (keys, values), optional
        The initial content, one pair per layer, each array ``(batch, kv_heads, tokens, head_dim)``.
    config : Gemma2Config, optional
        If given, sliding layers keep only the last ``window - 1`` tokens; otherwise every layer keeps all tokens.
    offloading, offload_only_non_sliding : bool
        Ignored, because all numbers are in main memory.

    Examples
    --------
    >>> from refgemma import Gemma2ForCausalLM
    >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
    >>> cache = DynamicCache(config=model.config)
    >>> output = model([[2, 300]], past_key_values=cache)
    >>> output.past_key_values is cache, cache.get_seq_length(), cache
    (True, 2, DynamicCache(6 layers, 2 tokens seen))
    """

    def __init__(
        self, ddp_cache_data: Iterable[Sequence[Array]] | None = None, config: Gemma2Config | None = None,
        offloading: bool = False, offload_only_non_sliding: bool = False,
    ) -> None:  # fmt: skip
        pairs = [[x if isinstance(x, Rounded) else np.asarray(x) for x in pair[:2]] for pair in ddp_cache_data or ()]
        self.value = Cache(LayerCache(keys, values, 0) for keys, values in pairs)
        self.keeps_all = config is None

    def __repr__(self) -> str:
        """Return the number of layers and of tokens, without values."""
        return repr(self.value).replace("Cache", type(self).__name__, 1)

    def __len__(self) -> int:
        """Return the number of layers; 0 before the first call."""
        return len(self.value)

    def __iter__(self) -> Iterator[LayerCache]:
        """Yield the pair (keys, values) of each layer."""
        return iter(self.value)

    def __getitem__(self, layer: int) -> LayerCache:
        """Return the pair (keys, values) of a layer."""
        return self.value[layer]

    @property
    def layers(self) -> Cache:
        """The layers of the cache, each with ``keys`` and ``values``."""
        return self.value

    @property
    def is_initialized(self) -> bool:
        """True if a call has filled the cache."""
        return bool(self.value)

    def fill(self, value: Cache) -> None:
        """Replace the content by another value."""
        self.value = value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.value.get_seq_length(layer_idx)

    def get_max_length(self) -> int:
        """Return the maximum number of tokens; -1 means unlimited."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end: ``-3`` removes three; ``3`` keeps three, as in transformers 4.

        Raises
        ------
        InputError
            If a sliding layer would need tokens that it has dropped; use ``DynamicCache()`` without `config`, which
            keeps all.
        """
        if tokens_to_remove:
            self.fill(self.value.crop(tokens_to_remove))

    def reorder_cache(self, beam_idx: npt.ArrayLike) -> None:
        """Replace each row ``i`` by row ``beam_idx[i]``."""
        self.fill(self.value.reorder(beam_idx))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; copies of a row are adjacent."""
        self.fill(self.value.repeat_interleave(repeats))

    def reset(self) -> None:
        """Remove all tokens."""
        self.fill(Cache())

    def to_legacy_cache(self) -> tuple[tuple[Array, Array], ...]:
        """Return a tuple of pairs (keys, values)."""
        return self.value.to_legacy()

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Sequence[Array]] | None = None) -> "DynamicCache":
        """Make a cache from a tuple of pairs (keys, values) of all tokens."""
        return DynamicCache(past_key_values)


class StaticCache(DynamicCache):
    """A cache of at most `max_cache_len` tokens, filled in place; otherwise like `DynamicCache`.

    Parameters
    ----------
    config : Gemma2Config
        The model's configuration.
    max_cache_len : int
        The maximum number of tokens.
    **ignored
        Other arguments of transformers: ``max_batch_size``, ``device``, ``dtype``, ``offloading``.

    Examples
    --------
    >>> StaticCache(Gemma2Config(), max_cache_len=128).get_max_length()
    128
    """

    def __init__(self, config: Gemma2Config, max_cache_len: int, **ignored: Any) -> None:
        super().__init__(config=config)
        self.max_cache_len = max_cache_len

    def fill(self, value: Cache) -> None:
        """Replace the content by another value.

        Raises
        ------
        InputError
            If the new value has too many tokens.
        """
        if value.get_seq_length() > self.max_cache_len:
            raise InputError(
                f"the StaticCache would have {pluralise(value.get_seq_length(), 'token')}; max_cache_len is "
                f"{self.max_cache_len}: "
                "use a larger max_cache_len, or a DynamicCache"
            )
        super().fill(value)

    def get_max_length(self) -> int:
        """Return the maximum number of tokens."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length
