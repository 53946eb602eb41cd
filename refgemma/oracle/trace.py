"""A run as named tensors, in the order of execution, in memory and as a safetensors file. The names are those of the
records in `refgemma.layers` and `refgemma.model`; a test pins the list."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from refgemma.cache import LayerCache
from refgemma.files import replace_file
from refgemma.inputs import InputError
from refgemma.precision import Array, Rounded, dtype_name
from refgemma.weights.writer import stored


def named_tensors(record: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Every array of a record with its name, e.g. ``layers.3.attention.probs``, in the order of execution.

    What a record keeps for the next call (a cache) is no tensor of the trace.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> names = [name for name, _ in named_tensors(refgemma.forward([[2, 300]], tiny.weights, tiny.config))]
    >>> names[:4], names[-1]
    (['cos', 'sin', 'embedded', 'layers.0.input_layernorm'], 'logits')
    """
    if isinstance(record, np.ndarray):
        yield prefix.removesuffix("."), record
    elif isinstance(record, tuple):
        for index, item in enumerate(record):
            yield from named_tensors(item, f"{prefix}{index}.")
    elif is_dataclass(record) and not isinstance(record, LayerCache):
        for field in fields(record):
            yield from named_tensors(getattr(record, field.name), f"{prefix}{field.name}.")


def target_file(path: str | Path) -> Path:
    """Where `path` leads, links followed, after a look whether a file can be written there.

    Raises
    ------
    InputError
        For a folder, a device or a pipe, and for a folder that does not exist.

    Examples
    --------
    >>> target_file("/")
    Traceback (most recent call last):
    ...
    refgemma.inputs.InputError: /: is a folder; give the name of a file to write
    """
    target = Path(os.path.realpath(path))
    if not str(path) or target.is_dir():
        raise InputError(f"{path or repr('')}: is a folder; give the name of a file to write")
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: is no ordinary file, and is not replaced by one")
    if not target.parent.is_dir():
        raise InputError(f"{path}: there is no folder {target.parent}")
    return target


def save_trace(tensors: Mapping[str, Array], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, which appears whole or not at all.

    Raises
    ------
    InputError
        If `path` is no place for a file; see `target_file`.
    OSError
        If it cannot be written.
    """
    target = target_file(path)
    content = save({name: _in_file(x) for name, x in tensors.items()}, dict(metadata))
    replace_file(target, content)


def _in_file(x: Array) -> Array:
    """Half precision in two bytes instead of the four it is computed in; what is neither, token ids too, as it is."""
    return stored(x, dtype_name(x)) if isinstance(x, Rounded) else np.ascontiguousarray(x)
