"""Read the tensors of a GGUF file as the numbers that llama.cpp multiplies with. Checked bit for bit against gguf 0.19,
and against the logits of llama.cpp.

Blocks of quantised numbers are widened to float32 when accessed, some rows at a time. The file holds g = 1 + w for a
norm; refgemma uses w. In float64 the subtraction is exact for every g of at least 2**-29, in float32 for every g of at
least 1/2. For a smaller g, float32 rounds w: then 1 + w is within 2**-25 of a positive g, and 2**-24 of a negative g.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import pluralise, quote, quote_few
from refgemma.gguf import Gguf, GgufTensor, config_fields, read_gguf
from refgemma.precision import Array, as_dtype
from refgemma.weights.parameters import EMBED_TOKENS, NORM, layer_tensors, tensor_shapes
from refgemma.weights.stored import CheckpointError, Stored

NUMBERS_AT_ONCE = 2**16  # numbers widened at once: 0.25 MB of float32 fit into the processor's cache
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

# Field of a layer's weights -> the name of its tensor in a GGUF file.
NAMES = {
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gguf_names(num_hidden_layers: int) -> dict[str, str]:
    """Return the name in a GGUF file of each tensor of `tensor_shapes`.

    Examples
    --------
    >>> gguf_names(26)["model.layers.3.self_attn.q_proj.weight"]
    'blk.3.attn_q.weight'
    """
    names = {EMBED_TOKENS: "token_embd.weight"}
    for layer in range(num_hidden_layers):
        names |= {name: f"blk.{layer}.{NAMES[field]}.weight" for field, name in layer_tensors(layer).items()}
    return names | {NORM: "output_norm.weight"}


# --- numbers ----------------------------------------------------------------------------------------------------------


def _widen_q8_0(rows: Array, out: Array) -> None:
    """Widen rows of Q8_0, whose blocks are a float16 scale and 32 bytes; the products are exact."""
    blocks = rows.reshape(-1, 34)
    numbers = out.reshape(-1, 32)
    numbers[...] = blocks[:, 2:].view(np.int8)  # convert, then multiply in place: NumPy buffers a product of two dtypes
    numbers *= blocks[:, :2].view(np.float16).astype(np.float32)


def _widen_by_library(kind: str) -> Callable[[Array, Array], None]:
    from gguf import GGMLQuantizationType, dequantize

    def widen(rows: Array, out: Array) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # the caller checks for NaN and infinity
            out[...] = dequantize(rows, GGMLQuantizationType[kind])

    return widen


@dataclass(frozen=True)
class Widened:
    """Quantised rows that are widened to float32 when indexed like an array."""

    raw: Array
    width: int
    widen: Callable[[Array, Array], None]

    def __getitem__(self, rows: Any, /) -> Array:
        """Return the rows of a slice or of an array of integers."""
        raw = self.raw[rows]
        flat, out = raw.reshape(-1, raw.shape[-1]), np.empty((*raw.shape[:-1], self.width), np.float32)
        self.widen(flat, out.reshape(len(flat), self.width))
        return out


@dataclass(frozen=True)
class Quantised(Stored):
    """A quantised tensor: `raw` holds its bytes, one row for each row of float32 numbers."""

    kind: str
    raw: Stored
    widen: Callable[[Array, Array], None]

    @property
    def format(self) -> str:
        """The name of its quantised format."""
        return self.kind

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return self.raw.nbytes

    def map(self, keep: bool = False) -> Any:
        """Map the bytes; rows are widened when accessed. See `Stored.map`."""
        return Widened(self.raw.map(keep), self.shape[-1], self.widen)

    def read(self, dtype: str, rows: Any = ...) -> Array:
        """Widen the tensor, or some of its rows, and round them to `dtype`; see `Stored.read`."""
        raw = self.raw.map()[rows]
        flat, width, kind = raw.reshape(-1, raw.shape[-1]), self.shape[-1], as_dtype(np.zeros(0), dtype)
        out = np.empty((len(flat), width), kind.dtype)
        step = max(1, NUMBERS_AT_ONCE // width)
        for start in range(0, len(flat), step):
            block = out[start : start + step]
            if dtype == "float32":
                self.widen(flat[start : start + step], block)
            else:
                with np.errstate(over="ignore"):  # the check below raises an error instead
                    block[...] = as_dtype(Widened(flat, width, self.widen)[start : start + step], dtype)
            # A sum of squares is finite only if all numbers are; computing it is faster than checking each number.
            if not math.isfinite(np.vdot(block, block)) and not (finite := np.isfinite(block)).all():
                part = Widened(flat, width, self.widen)[:].reshape(*raw.shape[:-1], width)
                raise self._explain_bad_number(part, rows, start * width + int(np.argmin(finite)), dtype)
        return out.reshape(*raw.shape[:-1], width).view(type(kind))


@dataclass(frozen=True)
class GgufNorm(Stored):
    """The weight w of a norm; the file holds 1 + w."""

    def map(self, keep: bool = False) -> Array:
        """Return w in float64, where the subtraction is exact."""
        return super().map(keep).astype(np.float64) - 1


# --- a file -----------------------------------------------------------------------------------------------------------


def locate(file: Gguf, tensor: GgufTensor) -> Stored:
    """Return a tensor of a file as an object that reads it.

    Raises
    ------
    CheckpointError
        If the tensor's quantised format needs the library gguf, which is not installed.
    """
    path, file_bytes = tensor.path or file.path, tensor.file_bytes or file.file_bytes
    where = (tensor.name, path)
    if tensor.format in PLAIN:
        return Stored(*where, PLAIN[tensor.format], tensor.shape, tensor.start, file_bytes)
    if tensor.format != "Q8_0" and find_spec("gguf") is None:
        raise CheckpointError(
            f"{path}: tensor {quote(tensor.name)} is quantised as {tensor.format}, which needs the library gguf; "
            'pip install "refgemma[gguf]"'
        )
    rows = (*tensor.shape[:-1], tensor.nbytes // max(1, math.prod(tensor.shape[:-1])))
    raw = Stored(*where, np.dtype(np.uint8), rows, tensor.start, file_bytes)
    widen = _widen_q8_0 if tensor.format == "Q8_0" else _widen_by_library(tensor.format)
    return Quantised(*where, np.dtype(np.float32), tensor.shape, tensor.start, file_bytes, tensor.format, raw, widen)


def _locate_norm(file: Gguf, tensor: GgufTensor) -> Stored:
    if tensor.format != "F32":
        raise CheckpointError(f"{file.path}: norm {quote(tensor.name)} is {tensor.format}; it must be F32")
    stored = locate(file, tensor)
    return GgufNorm(stored.name, stored.file, stored.dtype, stored.shape, stored.start, stored.file_bytes)


def read_gguf_model(path: Path) -> tuple[Gemma2Config, dict[str, Stored]]:
    """Read the configuration and the tensors' positions; names and order are those of `tensor_shapes`.

    Raises
    ------
    CheckpointError, ConfigError
        If the file is damaged, is not a Gemma 2, or lacks a tensor.
    """
    file = read_gguf(path, CheckpointError)
    config = Gemma2Config.from_dict(config_fields(file, CheckpointError), str(path))
    if config.num_hidden_layers > len(file.tensors):
        raise CheckpointError(
            f"{path}: has {pluralise(len(file.tensors), 'tensor')} for {pluralise(config.num_hidden_layers, 'layer')}"
        )
    shapes, names = tensor_shapes(config), gguf_names(config.num_hidden_layers)
    lacking = [name for name in names.values() if name not in file.tensors]
    strange = sorted(file.tensors.keys() - names.values())
    if lacking or strange:
        what = f"lacks {quote_few(lacking)}" if lacking else f"holds {quote_few(strange)}"
        raise CheckpointError(f"{path}: {what}, unlike a Gemma 2 of this size; download it again")
    for name, theirs in names.items():
        if file.tensors[theirs].shape != shapes[name]:
            raise CheckpointError(
                f"{path}: tensor {quote(theirs)} is {list(file.tensors[theirs].shape)}; according to the metadata it "
                "must be "
                f"{list(shapes[name])}; download it again"
            )
    found = {name: file.tensors[theirs] for name, theirs in names.items()}
    return config, {
        name: (_locate_norm if len(shapes[name]) == 1 else locate)(file, tensor) for name, tensor in found.items()
    }
