"""What an implementation offers to be tested. Checked by running the laws through `NumpyBackend`, which offers all.

Three methods are enough: `Backend`. An implementation offers more (draw a token, search with beams, take a loss, save,
split text, single operations) by having a method of that name, see `OPTIONAL`; a law that needs one is not applicable
to a backend without it.
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

# Methods that a backend may have besides the three, and what each does; `NumpyBackend` has all of them.
OPTIONAL: Mapping[str, str] = {
    "operations": "() -> functions by the names of refgemma.ops, with their arguments",
    "sample": "(model, input_ids, count, seed) -> that many draws of the next token of one text",
    "search": "(model, input_ids, num_beams, new_tokens) -> the best text found, and its sum of log probabilities",
    "loss": "(model, input_ids, labels) -> the mean cross entropy; a label of -100 does not count",
    "save": "(model, folder) -> None: writes a Hugging Face folder that `load` can read",
    "tokenizer": "(folder) -> an object with encode, decode and apply_chat_template",
}


class Unsupported(Exception):
    """Raised by a backend for a model or a call that it does not claim to compute; the message says which."""


class BackendError(RefgemmaError):
    """A backend that cannot be found, or that is none."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Parameters
    ----------
    dtypes : tuple of str
        The precisions it computes in *throughout*, of ``float64``, ``float32``, ``float16`` and ``bfloat16``.
    max_length : int, optional
        The longest text it can be given; ``None`` for any.
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
        """Whether the tensor `name` of the trace can be had.

        Examples
        --------
        >>> Capabilities(tensors=("logits", "layers.*.out")).shows("layers.3.out")
        True
        """
        return any(fnmatchcase(name, pattern) for pattern in self.tensors)


@dataclass(frozen=True)
class Output:
    """What a call of `Backend.forward` gives: tensors by name, ``logits`` at least, and a cache to go on from."""

    tensors: Mapping[str, Array]
    cache: Any = None

    @property
    def logits(self) -> Array:
        """The final logits ``(batch, seq, vocab)``, capped."""
        return self.tensors["logits"]


class Backend(Protocol):
    """An implementation of Gemma 2. Arrays go in and come out as NumPy arrays."""

    def capabilities(self) -> Capabilities:
        """Say what can be asked for."""
        ...

    def load(self, folder: Path, dtype: str) -> Any:
        """Read a Hugging Face folder (``config.json``, ``model.safetensors``) to compute in `dtype`.

        Raises `Unsupported` for a configuration that is not computed here.
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
            What `load` gave.
        attention_mask : int array (batch, tokens so far)
            0 for padding, which may be on either side; those of earlier calls included. None: no padding.
        position_ids : int array (batch, seq)
            Rotary positions; None: 0 and up, going on from the cache.
        cache
            ``Output.cache`` of the call before. It must stay usable: two calls may go on from one cache.
        tensors : sequence of str
            What is to be in ``Output.tensors``, as patterns.
        """
        ...
