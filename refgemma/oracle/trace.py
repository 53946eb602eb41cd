"""A run as named tensors, in the order of execution, in memory and as a safetensors file. The names are those of the
records in `refgemma.layers` and `refgemma.model`; a test pins the list."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from refgemma.cache import LayerCache
from refgemma.precision import F16, Array, Rounded


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
            if field.name != "cache":
                yield from named_tensors(getattr(record, field.name), f"{prefix}{field.name}.")


def stored(x: Array) -> Array:
    """`x` in the format a file holds: half precision in two bytes instead of the four it is computed in."""
    if isinstance(x, Rounded):
        return np.asarray(x).astype(np.float16 if isinstance(x, F16) else ml_dtypes.bfloat16)
    return np.ascontiguousarray(x)


def save_trace(tensors: Mapping[str, Array], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file, which appears whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        partial.write_bytes(save({name: stored(x) for name, x in tensors.items()}, dict(metadata)))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
