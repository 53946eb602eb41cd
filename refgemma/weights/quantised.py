"""Read the quantised matrices of a safetensors folder: MLX's groups of 2 to 8 bits, and float8 with scales.

Checked bit for bit against `mlx.core.dequantize` of mlx 0.32 in float32, and against compressed-tensors.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.files import quote, quote_few
from refgemma.precision import Array, as_dtype
from refgemma.weights.stored import NUMBERS_AT_ONCE, CheckpointError, ComputedRows, Stored

FLOAT8, PACKED = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint32)
RAW_DTYPES = {"F8_E4M3": FLOAT8, "U32": PACKED}  # dtype code in a header -> dtype
BITS = (2, 3, 4, 5, 6, 8)
# Extra tensors of float8 folders, for rounding activations and the cache.
ACTIVATIONS = ("input_scale", "input_scale_ub", "k_scale", "output_scale", "v_scale")


@dataclass(frozen=True)
class Dequantised(Stored):
    """A matrix ``number * scale + bias``; each group of numbers in a row shares a scale and, optionally, a bias."""

    packed: Stored
    scales: Stored
    biases: Stored | None

    @property
    def format(self) -> str:
        """The format of the stored numbers."""
        bits = self.packed.shape[-1] * 32 // self.shape[-1]
        return f"MLX {bits} bits" if self.packed.dtype == PACKED else self.packed.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix on disk."""
        return sum(part.nbytes for part in (self.packed, self.scales, self.biases) if part is not None)

    def map(self, keep: bool = False) -> Any:
        """Return the rows in float32, computed on access."""
        return ComputedRows(self, self.dtype)

    def read(self, dtype: str, rows: Any = ...) -> Array:
        """Compute the matrix, or some of its rows, and round them to `dtype`; see `Stored.read`."""
        packed = self.packed.map()[rows]
        flat, width = packed.reshape(-1, packed.shape[-1]), self.shape[-1]
        scales, biases = (self._pick(part, rows) for part in (self.scales, self.biases))
        kind = as_dtype(np.zeros(0), dtype)
        out = np.empty((len(flat), width), kind.dtype)
        step = max(1, NUMBERS_AT_ONCE // width)
        for start in range(0, len(flat), step):
            block = slice(start, start + step)
            numbers = _unpack(flat[block], width).reshape(-1, scales.shape[-1], width // scales.shape[-1])
            with np.errstate(over="ignore", invalid="ignore"):  # the check below raises an error instead
                found = numbers * scales[block, :, None] + biases[block, :, None]
                out[block] = as_dtype(found.reshape(-1, width), dtype)
            if not np.isfinite(out[block]).all():
                raise CheckpointError(
                    f"{self.file}: tensor {quote(self.name)} gives NaN, infinity or a number above the largest {dtype}"
                    "; use a wider dtype, or download the file again"
                )
        return out.reshape(*packed.shape[:-1], width).view(type(kind))

    def _pick(self, part: Stored | None, rows: Any) -> Array:
        """Return the scales or biases of the selected rows."""
        if part is None:
            zeros: Array = np.broadcast_to(np.float32(0), (self.shape[0], 1))[rows].reshape(-1, 1)
            return zeros
        groups = part.shape[1] if len(part.shape) == 2 else 1
        table = np.broadcast_to(part.map().reshape(-1, groups), (self.shape[0], groups))
        picked: Array = table[rows].reshape(-1, groups).astype(np.float32)
        return picked


def _unpack(packed: Array, width: int) -> Array:
    """Return the numbers in packed rows as float32; split each word into equal groups of bits, the lowest bits
    first."""
    if packed.dtype == FLOAT8:
        return packed.astype(np.float32)
    bits = packed.shape[-1] * 32 // width
    stream = np.unpackbits(np.ascontiguousarray(packed, "<u4").view(np.uint8), bitorder="little").reshape(-1, bits)
    return np.packbits(stream, axis=-1, bitorder="little").astype(np.float32)


def dequantise(found: Mapping[str, Stored], raw: Mapping[str, Any], source: Path) -> dict[str, Stored]:
    """Return the tensors of a folder, with each quantised matrix and its scales and biases as one tensor.

    Parameters
    ----------
    found : mapping of str to Stored
        The tensors by their names in the files.
    raw : mapping
        The contents of ``config.json``; it gives the size of MLX's groups.
    source : Path
        The file to name in a warning about the whole checkpoint.

    Raises
    ------
    CheckpointError
        If the scales of a quantised matrix are missing or have the wrong shape.

    Examples
    --------
    >>> dequantise({}, {}, Path("model.safetensors"))
    {}
    """
    tensors: dict[str, Stored] = {}
    used: set[str] = set()
    for name, tensor in found.items():
        if tensor.dtype not in RAW_DTYPES.values():
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        ends = ("scales", "biases") if tensor.dtype == PACKED else ("weight_scale",)
        parts = [f"{module}.{end}" for end in ends]
        if len(tensor.shape) != 2 or not all(part in found for part in parts):
            raise CheckpointError(
                f"{tensor.file}: tensor {quote(name)}: the dtype is {tensor.dtype.name}, but its "
                f"{' and '.join(ends)} are missing; dequantise the checkpoint with the library that made it"
            )
        used.update(parts, *([f"{module}.{end}"] for end in ACTIVATIONS))
        scales, *biases = (found[part] for part in parts)
        shape = (tensor.shape[0], _find_width(tensor, scales, biases, raw, module))
        tensors[name] = Dequantised(
            name, tensor.file, np.dtype(np.float32), shape, 0, tensor.file_bytes, tensor, scales,
            biases[0] if biases else None,
        )  # fmt: skip
    if any(tensor.dtype == FLOAT8 for tensor in found.values()):
        warnings.warn(
            f"{source}: the float8 matrices are widened to float32; libraries that compute in float8 also round "
            "activations, "
            "which refgemma does not",
            stacklevel=4,
        )
    return {name: tensor for name, tensor in tensors.items() if name not in used}


def _find_width(tensor: Stored, scales: Stored, biases: list[Stored], raw: Mapping[str, Any], module: str) -> int:
    """Check all shapes, and return the number of columns."""
    rows, words = tensor.shape
    fits = all(part.dtype not in RAW_DTYPES.values() for part in (scales, *biases))
    if tensor.dtype == FLOAT8:
        width = words
        fits &= scales.shape in ((), (1,), (rows,), (rows, 1), (1, 1))
    else:
        how = raw.get("quantization") or raw.get("quantization_config")
        how = how if isinstance(how, dict) else {}
        how = how[module] if isinstance(how.get(module), dict) else how
        size: Any = how.get("group_size")
        known = type(size) is int and 0 < size < 2**16 and how.get("mode", "affine") == "affine"
        width = scales.shape[1] * int(size) if known and len(scales.shape) == 2 else 0
        fits &= scales.shape[:1] == (rows,) and biases[0].shape == scales.shape
        fits &= width > 0 and words * 32 in [bits * width for bits in BITS]
    if not fits or not math.prod(tensor.shape):
        shapes = quote_few([str(list(part.shape)) for part in (tensor, scales, *biases)])
        raise CheckpointError(
            f"{tensor.file}: tensor {quote(tensor.name)} and its scales are {shapes}, which is not supported; "
            "dequantise the checkpoint with the library that made it"
        )
    return width
