"""Provide refgemma as a backend, and find any backend by name. Checked by running the laws through refgemma.

`refgemma.testing.interface` defines a backend; its names can also be imported from here.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma import ops
from refgemma.backward import compute_gradients
from refgemma.config import Gemma2Config
from refgemma.generation.beams import draw
from refgemma.generation.decode import Prompts, generate_batch
from refgemma.generation.generation_config import GenerationConfig, merge_settings
from refgemma.heads import causal_lm_loss
from refgemma.model import forward, next_token_logits
from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.precision import Array, wide
from refgemma.testing.cached import with_forward
from refgemma.testing.interface import OPTIONAL, Backend, BackendError, Capabilities, Output, Unsupported
from refgemma.testing.program import Program
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.trace.names import named_tensors
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights

__all__ = [
    "OPTIONAL",
    "Backend",
    "BackendError",
    "Capabilities",
    "Loaded",
    "NumpyBackend",
    "Output",
    "Unsupported",
    "backend_named",
]


@dataclass(frozen=True)
class Loaded:
    """A loaded model: configuration and weights."""

    folder: Path
    config: Gemma2Config
    weights: Weights
    dtype: str


class NumpyBackend:
    """refgemma itself.

    Examples
    --------
    >>> from refgemma.hub import find_model
    >>> backend = NumpyBackend()
    >>> model = backend.load(find_model("conformance"), "bfloat16")
    >>> backend.forward(model, np.array([[2, 5, 7]])).logits.shape
    (1, 3, 97)
    """

    def capabilities(self) -> Capabilities:
        """Return all capabilities that a backend can have."""
        every = ("cos", "sin", "embedded", "layers.*", "norm", "raw_logits", "logits")
        return Capabilities(
            ("float64", "float32", "bfloat16", "float16"), tensors=every, cache=True, padding=True, positions=True
        )

    def load(self, folder: Path, dtype: str) -> Loaded:
        """Read all weights into memory."""
        checkpoint = open_checkpoint(folder)
        return Loaded(folder, checkpoint.config, checkpoint.resident(dtype), dtype)

    def forward(
        self,
        model: Loaded,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        position_ids: npt.NDArray[np.int64] | None = None,
        cache: Any = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:
        """Call `refgemma.model.forward`."""
        run = forward(
            input_ids, model.weights, model.config,
            attention_mask=attention_mask, position_ids=position_ids, cache=cache,
        )  # fmt: skip
        found = {name: x for name, x in named_tensors(run) if any(fnmatchcase(name, wanted) for wanted in tensors)}
        return Output(found, run.cache)

    def operations(self) -> Mapping[str, Callable[..., Array]]:
        """Return the current functions of `refgemma.ops`."""
        names = ("linear", "rms_norm", "rotary_tables", "rotate", "repeat_kv", "soft_cap", "attention_scores",
                 "softmax", "gelu_tanh", "causal_mask", "sliding_mask")  # fmt: skip
        return {name: getattr(ops, name) for name in names}

    def sample(self, model: Loaded, input_ids: npt.NDArray[np.int64], count: int, seed: int) -> Array:
        """Draw from the logits of the last token, like `generate`."""
        logits = wide(next_token_logits(input_ids, model.weights, model.config)[0][:, -1]).astype(np.float32)
        return draw(np.repeat(logits, count, axis=0), 1, np.random.default_rng(seed))[:, 0]

    def search(
        self, model: Loaded, input_ids: npt.NDArray[np.int64], num_beams: int, new_tokens: int
    ) -> tuple[Array, float]:
        """Search with beams over texts of exactly `new_tokens` new tokens."""
        asked = {"num_beams": num_beams, "max_new_tokens": new_tokens, "output_scores": True, "length_penalty": 0.0}
        call = merge_settings(None, GenerationConfig(), asked | {"return_dict_in_generate": True})
        found: Any = generate_batch(Prompts(input_ids), model.weights, model.config, call)
        return found.sequences[0], float(found.sequences_scores[0])

    def loss(self, model: Loaded, input_ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> float:
        """Compute `refgemma.heads.causal_lm_loss` of a forward pass."""
        return causal_lm_loss(forward(input_ids, model.weights, model.config).logits, labels)

    def gradients(
        self, model: Loaded, input_ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None, num_items: float,
    ) -> Mapping[str, Array]:  # fmt: skip
        """Compute `refgemma.backward.compute_gradients`."""
        return compute_gradients(
            input_ids, labels, model.weights, model.config, attention_mask=attention_mask, num_items=num_items
        )[1]

    def save(self, model: Loaded, folder: Path) -> None:
        """Save with `save_pretrained` of the documented class."""
        Gemma2ForCausalLM.from_pretrained(model.folder, dtype=model.dtype).save_pretrained(folder)

    def tokenizer(self, folder: Path) -> Tokenizer:
        """Return the tokenizer of a folder."""
        return Tokenizer.from_pretrained(folder)


def backend_named(name: str) -> Any:
    """Return the backend with a name like ``mypkg.adapter:Backend``; a class is called without arguments.

    An engine with ``prefill`` and ``decode`` instead of ``forward`` becomes a backend; see `refgemma.testing.cached`.

    A name like ``program:./port --threads 1`` means a program; see `refgemma.testing.program`.

    Raises
    ------
    BackendError
        If the name does not exist, or the object lacks one of the three methods.

    Examples
    --------
    >>> type(backend_named("refgemma.testing.backends:NumpyBackend")).__name__
    'NumpyBackend'
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise BackendError(f"backend {name!r}: use the form package.module:Name or program:COMMAND")
    if module == "program":
        return Program(attribute)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise BackendError(f"backend {name!r}: {module} cannot be imported: {error}") from error
    except AttributeError:
        raise BackendError(f"backend {name!r}: {module} has no {attribute}") from None
    backend = with_forward(found() if isinstance(found, type) else found)
    if lacking := [method for method in ("capabilities", "load", "forward") if not hasattr(backend, method)]:
        raise BackendError(
            f"backend {name!r}: the object lacks {', '.join(lacking)}; see refgemma.testing.interface.Backend"
        )
    return backend
