"""Describe one tensor in a file, and read it in one of the four precisions.

Checked bit for bit against the loader of safetensors 0.8.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.errors import RefgemmaError
from refgemma.precision import Array, as_dtype

NUMBERS_AT_ONCE = 2**18  # numbers converted at once: 1 MB of float32 fits into the processor's cache
REMEDY = "write or download the file again"


class CheckpointError(RefgemmaError):
    """Raised for a checkpoint that cannot be read as a Gemma 2; the message names file, tensor and remedy.

    Examples
    --------
    >>> import refgemma
    >>> refgemma.open_checkpoint("gemma-2-2b")
    Traceback (most recent call last):
    refgemma.weights.stored.CheckpointError: gemma-2-2b: there is no such folder
    """


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Parameters
    ----------
    name : str
        The tensor's name in the file.
    file : Path
        The safetensors file that holds it.
    dtype : numpy.dtype
        The dtype in the file: float64, float32, float16, or bfloat16 of ml_dtypes.
    shape : tuple of int
        The tensor's shape.
    start : int
        The position of the tensor's first byte in the file.
    file_bytes : int
        The length of the file when its header was read.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> from refgemma.weights.checkpoint import read_header
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "one.safetensors"
    ...     save_file({"norm.weight": np.array([0.1, 0.2], np.float16)}, file)
    ...     stored = read_header(file)["norm.weight"]
    ...     print(stored.dtype, stored.shape, stored.read("bfloat16"))
    float16 (2,) [0.10009766 0.20019531]
    """

    name: str
    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    file_bytes: int

    @property
    def format(self) -> str:
        """The format of the stored numbers: the name of a dtype or of a quantised format."""
        return self.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _open_map(self) -> Array:
        return np.memmap(self.file, np.uint8, "r", self.start, (self.nbytes,))

    _kept_map = functools.cached_property(_open_map)

    def map(self, keep: bool = False) -> Array:
        """Memory-map the tensor in the file's dtype, read-only; no data is read yet.

        With `keep`, this object keeps the map and returns it again. Without `keep`, mapping each layer of a 9B again
        takes a sixth of the time to decode a token. The pages belong to the file, so the system can reclaim them when
        memory is short.
        """
        try:
            found = self.file.stat().st_size
            # Check first: accessing a mapped file that was truncated kills the process without a message.
            if found != self.file_bytes:
                raise CheckpointError(
                    f"{self.file}: is {found} bytes long, but had {self.file_bytes} bytes when opened; open it again"
                )
            raw = self._kept_map if keep else self._open_map()
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} cannot be read: {error.strerror}") from None
        return raw.view(self.dtype, np.ndarray).reshape(self.shape)

    def read(self, dtype: str, rows: Any = ...) -> Array:
        """Copy the tensor, or some of its rows, in one of the four precisions.

        Parameters
        ----------
        dtype : str
            ``float64``, ``float32``, ``float16`` or ``bfloat16``. Numbers are rounded to nearest, ties to even;
            widening is exact.
        rows : slice or array of int, optional
            The rows to read; all by default.

        Returns
        -------
        array
            The copy. The conversion also needs a few megabytes; for an array of rows it also needs the rows as stored.

        Raises
        ------
        CheckpointError
            If a number is NaN or infinite, in the file or after rounding to `dtype`.
        """
        part = self.map()[rows]
        flat = part.reshape(-1)
        kind = as_dtype(np.zeros(0), dtype)
        out = np.empty(flat.shape, kind.dtype)
        for start in range(0, flat.size, NUMBERS_AT_ONCE):
            block = slice(start, start + NUMBERS_AT_ONCE)
            with np.errstate(over="ignore", invalid="ignore"):  # the check below raises an error instead
                # Numbers that `dtype` holds exactly need no rounding; skipping it is four times as fast in bfloat16.
                out[block] = flat[block] if self.dtype.name == dtype else as_dtype(flat[block], dtype)
            finite = np.isfinite(out[block])
            if not finite.all():
                raise self._explain_bad_number(part, rows, start + int(np.argmin(finite)), dtype)
        return out.reshape(part.shape).view(type(kind))

    def _explain_bad_number(self, part: Array, rows: Any, position: int, dtype: str) -> CheckpointError:
        """Return the error for a bad number; `part` holds the selected `rows`, and `position` counts its numbers."""
        value, place = float(part.reshape(-1)[position]), np.unravel_index(position, part.shape)
        source = np.arange(self.shape[0])[rows]  # the tensor's row for each row of `part`
        index = [int(axis) for axis in (source[place[: source.ndim]], *place[source.ndim :])]
        where = f"{self.file}: tensor {self.name!r}, index {index}"
        if math.isfinite(value):
            return CheckpointError(f"{where}: {value} is beyond the largest {dtype}; read it in a wider dtype")
        return CheckpointError(
            f"{where}: {value} is not a finite number; the file is damaged, or the training diverged: write or "
            "download the file again"
        )


@dataclass(frozen=True)
class ComputedRows:
    """The rows of a tensor that is computed when read; indexed like an array."""

    tensor: Stored
    dtype: np.dtype[Any]

    def __getitem__(self, rows: Any, /) -> Array:
        """Return the rows of a slice or of an array of integers."""
        return self.tensor.read(self.dtype.name, rows)
