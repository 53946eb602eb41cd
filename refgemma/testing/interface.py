"""Define the methods of an implementation under test. Checked by the laws on `NumpyBackend`, which has all.

The three methods of `Backend` are enough. Optional methods (see `OPTIONAL`) allow more laws: draw a token, search with
beams, compute a loss, save, split text, single operations. A law that needs a method is not applicable to a backend
without it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refgemma.config import Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.precision import Array

# Optional methods of a backend and their descriptions; `NumpyBackend` has all of them.
OPTIONAL: Mapping[str, str] = {
    "operations": "() -> functions by the names of refgemma.ops, with their arguments",
    "sample": "(model, input_ids, count, seed) -> `count` draws of the next token of one text",
    "search": "(model, input_ids, num_beams, new_tokens) -> the best text found, and its sum of log probabilities",
    "loss": "(model, input_ids, labels) -> the mean cross entropy; a label of -100 does not count",
    "gradients": "(model, input_ids, labels, attention_mask, num_items) -> the gradient of the summed loss / "
    "num_items, by the names of the weights in a checkpoint",
    "save": "(model, folder) -> None: writes a Hugging Face folder that `load` can read",
    "tokenizer": "(folder) -> an object with encode, decode and apply_chat_template",
}

# Models that engines refuse: a word for `Capabilities.refuses`, and True for such a model.
REFUSALS: Mapping[str, Callable[[Gemma2Config], bool]] = {
    "no-attention-cap": lambda config: config.attn_logit_softcapping is None,
    "no-final-cap": lambda config: config.final_logit_softcapping is None,
    "odd-groups": lambda config: config.num_attention_heads // config.num_key_value_heads % 2 == 1,
}


class Unsupported(Exception):
    """Raised by a backend for a model or a call that it does not support; the message names it."""


class BackendError(RefgemmaError):
    """Raised for a backend that cannot be found, or an object that is not a backend."""


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a backend.

    Parameters
    ----------
    dtypes : tuple of str
        The precisions that it uses in *every* step: any of ``float64``, ``float32``, ``float16`` and ``bfloat16``.
    max_length : int, optional
        The longest text that it accepts; ``None`` means any length.
    tensors : tuple of str
        The tensors that it can return, by trace names in which ``*`` matches anything: ``layers.*.attention.probs``.
    cache, padding, positions : bool
        True if `Backend.forward` takes a cache, a padding mask, or rotary positions.
    refuses : tuple of str
        Models that the backend is not asked to load. A word of `REFUSALS`: ``no-attention-cap`` and ``no-final-cap``
        (the cap is None), ``odd-groups`` (an odd number of query heads share a key head). Or a key that the backend
        does not read in ``config.json``, such as ``layer_types``, ``rope_parameters`` or ``attention_bias``: the file
        is written without this key, and a model that needs it is refused.

    Raises
    ------
    BackendError
        If `refuses` has another word.
    """

    dtypes: tuple[str, ...] = ("float32",)
    max_length: int | None = None
    tensors: tuple[str, ...] = ("logits",)
    cache: bool = False
    padding: bool = False
    positions: bool = False
    refuses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        for word in self.refuses:
            if word not in REFUSALS and word not in {field.name for field in fields(Gemma2Config)}:
                raise BackendError(
                    f"refuses has {word!r}; it must be {', '.join(REFUSALS)}, or a key of Gemma 2's config.json"
                )

    def shows(self, name: str) -> bool:
        """Return True if the backend can return the tensor `name` of the trace.

        Examples
        --------
        >>> Capabilities(tensors=("logits", "layers.*.out")).shows("layers.3.out")
        True
        """
        return any(fnmatchcase(name, pattern) for pattern in self.tensors)

    def refuse_model(self, config: Gemma2Config) -> None:
        """Raise `Unsupported` for a model that the backend refuses; the message is the word of `refuses`.

        Examples
        --------
        >>> Capabilities(refuses=("layer_types",)).refuse_model(Gemma2Config())
        >>> Capabilities(refuses=("attention_bias",)).refuse_model(Gemma2Config(attention_bias=True))
        Traceback (most recent call last):
            ...
        refgemma.testing.interface.Unsupported: attention_bias
        """
        for word in self.refuses:
            if word in REFUSALS:
                refused = REFUSALS[word](config)
            else:
                values = json.loads(config.to_json_string())
                refused = Gemma2Config.from_dict({k: v for k, v in values.items() if k != word}) != config
            if refused:
                raise Unsupported(word)

    def save_config(self, config: Gemma2Config, folder: Path) -> None:
        """Write ``config.json`` without the keys that the backend refuses."""
        config.save_pretrained(folder)
        values = {k: v for k, v in config.to_diff_dict().items() if k not in self.refuses}
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True), "utf-8")


@dataclass(frozen=True)
class Output:
    """The result of `Backend.forward`: tensors by name (at least ``logits``), and a cache to continue from."""

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

        Raises `Unsupported` for a configuration that the backend does not support.
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
            0 for padding, on either side, else 1; includes tokens of earlier calls. None means no padding.
        position_ids : int array (batch, seq)
            Rotary positions. None means that positions start at 0, or continue after the cache.
        cache
            ``Output.cache`` of an earlier call, which must not change, because two calls may continue the same cache.
        tensors : sequence of str
            Patterns of the tensors to return in ``Output.tensors``.
        """
        ...
