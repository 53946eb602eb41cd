"""The methods of an implementation under test. Checked by running the laws through `NumpyBackend`, which has all.

Three methods are enough: `Backend`. Further methods allow further laws (draw a token, search with beams, compute a
loss, save, split text, single operations), see `OPTIONAL`. A law that needs one is not applicable to a backend without
it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refgemma.errors import RefgemmaError
from refgemma.precision import Array

# Optional methods of a backend and their descriptions; `NumpyBackend` has all of them.
OPTIONAL: Mapping[str, str] = {
    "operations": "() -> functions by the names of refgemma.ops, with their arguments",
    "sample": "(model, input_ids, count, seed) -> that many draws of the next token of one text",
    "search": "(model, input_ids, num_beams, new_tokens) -> the best text found, and its sum of log probabilities",
    "loss": "(model, input_ids, labels) -> the mean cross entropy; a label of -100 does not count",
    "gradients": "(model, input_ids, labels, attention_mask, num_items) -> the gradient of the summed loss / "
    "num_items, by the names of the weights in a checkpoint",
    "save": "(model, folder) -> None: writes a Hugging Face folder that `load` can read",
    "tokenizer": "(folder) -> an object with encode, decode and apply_chat_template",
}


class Unsupported(Exception):
    """Raised by a backend for a model or a call that it does not claim to compute; the message says which."""


class BackendError(RefgemmaError):
    """Raised for a backend that cannot be found, or an object that is not a backend."""


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a backend.

    Parameters
    ----------
    dtypes : tuple of str
        The precisions it computes in *throughout*, of ``float64``, ``float32``, ``float16`` and ``bfloat16``.
    max_length : int, optional
        The longest text it accepts; ``None`` for any.
    tensors : tuple of str
        The tensors it can show, by the names of the trace, ``*`` for anything: ``layers.*.attention.probs``.
    cache, padding, positions : bool
        Whether `Backend.forward` takes a cache, a padding mask, and rotary positions.
    """

    dtypes: tuple[str, ...] = ("float32",)
    max_length: int | None = None
    tensors: tuple[str, ...] = ("logits",)
    cache: bool = False
    padding: bool = False
    positions: bool = False

    def shows(self, name: str) -> bool:
        """Return True if the backend can return the tensor `name` of the trace.

        Examples
        --------
        >>> Capabilities(tensors=("logits", "layers.*.out")).shows("layers.3.out")
        True
        """
        return any(fnmatchcase(name, pattern) for pattern in self.tensors)


@dataclass(frozen=True)
class Output:
    """The result of `Backend.forward`: tensors by name, at least ``logits``, and a cache to continue from."""

    tensors: Mapping[str, Array]
    cache: Any = None

    @property
    def logits(self) -> Array:
        """The final logits ``(batch, seq, vocab)``, capped."""
        return self.tensors["logits"]


class Backend(Protocol):
    """An implementation of Gemma 2. Inputs and outputs are NumPy arrays."""

    def capabilities(self) -> Capabilities:
        """Return the capabilities."""
        ...

    def load(self, folder: Path, dtype: str) -> Any:
        """Read a Hugging Face folder (``config.json``, ``model.safetensors``) to compute in `dtype`.

        Raises `Unsupported` for a configuration that it does not compute.
        """
        ...

    def forward(
        self,
        model: Any,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        position_ids: npt.NDArray[np.int64] | None = None,
        cache: Any = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:
        """Compute the logits ``(batch, seq, vocab)`` of token ids ``(batch, seq)``.

        Parameters
        ----------
        model
            The result of `load`.
        attention_mask : int array (batch, tokens so far)
            0 for padding, which may be on either side; it includes tokens of earlier calls. None: no padding.
        position_ids : int array (batch, seq)
            Rotary positions; None: they start at 0, or continue those of the cache.
        cache
            ``Output.cache`` of the previous call. It must stay usable: two calls may continue one cache.
        tensors : sequence of str
            The tensors to return in ``Output.tensors``, as patterns.
        """
        ...
