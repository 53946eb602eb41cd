"""Describe an open file of named tensors, with functions that read one tensor each.

Checked in the tests on damaged, foreign and huge files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from refgemma.files import open_tensors
from refgemma.inputs import InputError
from refgemma.precision import Array


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Parameters
    ----------
    dtype : str
        The dtype in safetensors' notation: ``BF16``, ``F32``, ``I64``.
    shape : tuple of int
        The shape.
    read : callable
        Function that returns the numbers.
    known : callable, optional
        Function that returns a mask of the elements that the file has; None means all.
    coarse : float
        The distance of neighbouring numbers if the file has decimals, else 0.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]
    known: Callable[[], Array] | None = None
    coarse: float = 0.0


@dataclass(frozen=True)
class TraceFile:
    """The names, dtypes and shapes of a file's tensors, and the file's metadata."""

    path: str
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    lengths: Mapping[str, int] = field(default_factory=dict)  # number of tokens of each call, by its prefix, if known


def is_there(path: str | Path) -> Path:
    """Return `path` if it is a regular file.

    Raises
    ------
    InputError
        If `path` is a folder or a device, or does not exist.

    Examples
    --------
    >>> is_there("/")
    Traceback (most recent call last):
    ...
    refgemma.inputs.InputError: /: is a folder; give the safetensors file inside
    """
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{path}: is a folder; give the safetensors file inside")
    if not file.exists():
        raise InputError(f"{path}: there is no such file")
    if not file.is_file():
        raise InputError(f"{path}: is not a regular file; give a safetensors file")
    return file


def open_safetensors(path: str | Path) -> TraceFile:
    """Open a safetensors file; its tensors stay on the disk until they are read.

    Raises
    ------
    InputError
        If the file is not a safetensors file; the message gives the reason.
    """
    opened, _ = open_tensors(is_there(path), InputError, "write it again")
    entries = {}
    for name in opened.keys():
        found = opened.get_slice(name)
        entries[name] = Entry(found.get_dtype(), tuple(found.get_shape()), _reader(opened, str(path), name))
    return TraceFile(str(path), opened.metadata() or {}, entries)


def _reader(opened: Any, path: str, name: str) -> Callable[[], Array]:
    def read() -> Array:
        try:
            return np.asarray(opened.get_tensor(name))
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: {name} cannot be read ({reason}); write it again") from None

    return read
