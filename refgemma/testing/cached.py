"""Make a backend from an engine that has only a cached path: a prefill, then one token after the other.

Checked in ``tests/test_cached_engine.py``: such engines are judged, and mistakes of either half are found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refgemma.precision import Array
from refgemma.testing.interface import BackendError, Capabilities, Output


class CachedEngine(Protocol):
    """An engine without a plain forward pass. Each method may change the cache that it gets."""

    def capabilities(self) -> Capabilities:
        """Return the capabilities; cache, padding, positions and tensors are ignored."""
        ...

    def load(self, folder: Path, dtype: str) -> Any:
        """Read a Hugging Face folder, as `load` of `refgemma.testing.interface.Backend`."""
        ...

    def prefill(self, model: Any, input_ids: npt.NDArray[np.int64]) -> tuple[Array, Any]:
        """Read the first tokens ``(batch, seq)`` of texts.

        Returns
        -------
        logits, cache
            The logits ``(batch, seq, vocab)``, or only those of the last token, ``(batch, 1, vocab)`` or
            ``(batch, vocab)``; and a cache for `decode`.
        """
        ...

    def decode(self, model: Any, input_ids: npt.NDArray[np.int64], cache: Any) -> tuple[Array, Any]:
        """Read one more token ``(batch, 1)`` of each text, and return its logits and the next cache."""
        ...


@dataclass(frozen=True)
class Fed:
    """A cache that is fed again: the tokens ``(batch, seq)`` of texts, the first `prefilled` of them in one call."""

    ids: npt.NDArray[np.int64]
    prefilled: int


class ThroughCache:
    """The backend of an engine that has only a cached path.

    `forward` prefills the first half of a text and decodes the second half, so both halves of the engine give the
    logits of every law. If `prefill` returns only the last token's logits, each beginning of the first half is
    prefilled too. To continue a cache, all earlier tokens are fed again in the same way, because an engine may change
    its cache in place.

    Parameters
    ----------
    engine : CachedEngine
        The engine; its optional methods are available too.
    """

    def __init__(self, engine: CachedEngine) -> None:
        self.engine = engine
        usual = f"{type(engine).__module__}:{type(engine).__qualname__}"
        self.__backend_name__ = getattr(engine, "__backend_name__", usual)

    def __getattr__(self, name: str) -> Any:
        """Return an optional method of the engine."""
        if name == "engine":  # not set yet: the object is being copied
            raise AttributeError(name)
        return getattr(self.engine, name)

    def capabilities(self) -> Capabilities:
        """Return the engine's capabilities, with a cache; only logits are shown."""
        can = self.engine.capabilities()
        return replace(can, tensors=("logits",), cache=True, padding=False, positions=False)

    def load(self, folder: Path, dtype: str) -> Any:
        """Let the engine load a model."""
        return self.engine.load(folder, dtype)

    def forward(
        self,
        model: Any,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        position_ids: npt.NDArray[np.int64] | None = None,
        cache: Fed | None = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:
        """Prefill and decode; padding and positions are not supported, so they are not passed."""
        if cache is None:
            fed = Fed(input_ids, (input_ids.shape[1] + 1) // 2)
            rows, live = self._prefill(model, input_ids[:, : fed.prefilled])
        else:
            fed = Fed(np.concatenate([cache.ids, input_ids], axis=1), cache.prefilled)
            live, rows = self.engine.prefill(model, fed.ids[:, : fed.prefilled])[1], []
        for place in range(fed.prefilled, fed.ids.shape[1]):
            logits, live = self.engine.decode(model, fed.ids[:, place : place + 1], live)
            rows.append(_last_row(logits, 1, "decode"))
        return Output({"logits": np.concatenate(rows[-input_ids.shape[1] :], axis=1)}, fed)

    def _prefill(self, model: Any, ids: npt.NDArray[np.int64]) -> tuple[list[Array], Any]:
        """Return the logits of each token, and the cache after the last."""
        length = ids.shape[1]
        logits, cache = self.engine.prefill(model, ids)
        if np.ndim(logits) == 3 and np.shape(logits)[1] == length:
            return [logits[:, place : place + 1] for place in range(length)], cache
        rows = [_last_row(self.engine.prefill(model, ids[:, :n])[0], n, "prefill") for n in range(1, length)]
        return [*rows, _last_row(logits, length, "prefill")], cache


def _last_row(logits: Array, length: int, method: str) -> Array:
    """Return the last token's logits ``(batch, 1, vocab)``."""
    found = logits[:, None] if np.ndim(logits) == 2 else logits
    if np.ndim(found) != 3 or np.shape(found)[1] not in (1, length):
        raise BackendError(
            f"{method} of {length} tokens returned logits of shape {np.shape(logits)} instead of (batch, tokens, vocab)"
        )
    return found[:, -1:]


def with_forward(backend: Any) -> Any:
    """Return the backend, or a backend that calls the cached path of an engine without `forward`.

    Examples
    --------
    >>> from refgemma.testing.backends import NumpyBackend
    >>> type(with_forward(NumpyBackend())).__name__
    'NumpyBackend'
    """
    cached = hasattr(backend, "prefill") and hasattr(backend, "decode")
    return ThroughCache(backend) if cached and not hasattr(backend, "forward") else backend
