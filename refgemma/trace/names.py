"""Name the tensors of a run in the order of execution, and save them to a safetensors file. The names are those of the
records in `refgemma.layers` and `refgemma.model`; a test pins the list."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import numpy.typing as npt

from refgemma.cache import LayerCache
from refgemma.config import Gemma2Config
from refgemma.files import new_file
from refgemma.inputs import InputError
from refgemma.model import Forward, begin, blocks, forward, head
from refgemma.ops import rms_norm
from refgemma.precision import Array, Rounded, dtype_name
from refgemma.shapes import TokenIds
from refgemma.weights.parameters import Weights
from refgemma.weights.save import CODE_OF_DTYPE, as_stored

GRADS = "grads."  # before the name of a tensor or weight: its gradient
LAYER = re.compile(r"\blayers\.(\d{1,4})(?=\.)")
MOST_NAMES = 40  # names in a list: a model has fewer kinds of tensors, but a file may have any number of names
AFTER = "weights.after."  # before the name of a weight: the weight after a step of the optimizer


@lru_cache(maxsize=4096)  # a check asks for the same names many thousand times
def field_of(name: str) -> str:
    """Return ``attention.probs`` for ``layers.3.attention.probs``; gradients keep ``grads.``.

    Examples
    --------
    >>> field_of("layers.13.feed_forward.out"), field_of("logits")
    ('feed_forward.out', 'logits')
    >>> field_of("grads.layers.3.out"), field_of("grads.model.layers.3.self_attn.q_proj.weight")
    ('grads.out', 'grads.self_attn.q_proj.weight')
    """
    for prefix in (GRADS, AFTER):
        if name.startswith(prefix):
            return prefix + field_of(name.removeprefix(prefix).removeprefix("model."))
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def layer_of(name: str) -> int | None:
    """Return the number of the layer in a tensor's `name`, or None.

    Examples
    --------
    >>> layer_of("layers.13.out"), layer_of("norm"), layer_of("grads.layers.2.out")
    (13, None, 2)
    """
    name = name.removeprefix(GRADS).removeprefix(AFTER).removeprefix("model.")
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def list_ranges(numbers: Iterable[int]) -> str:
    """Return sorted whole numbers as text.

    Examples
    --------
    >>> list_ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def group_layers(names: Iterable[str]) -> list[str]:
    """Return names, with the same tensor of several layers as one name.

    Examples
    --------
    >>> group_layers(["layers.0.out", "layers.1.out", "layers.1.middle", "logits"])
    ['layers.0-1.out', 'layers.1.middle', 'logits']
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = LAYER.search(name)
        groups.setdefault((name[: found.start(1)], name[found.end(1) :]) if found else (name, ""), []).extend(
            [int(found[1])] if found else []
        )
    return [f"{before}{list_ranges(sorted(layers))}{after}" for (before, after), layers in groups.items()]


def list_names(names: Iterable[str]) -> str:
    """Return a list of names as text; only a list of more than `MOST_NAMES` kinds is not complete, and says so.

    Examples
    --------
    >>> list_names(f"x{n}" for n in range(42)).split(", ")[-1]
    'x39 and 2 more (--json lists all)'
    """
    listed = group_layers(names)
    rest = len(listed) - MOST_NAMES
    return ", ".join(listed[:MOST_NAMES]) + (f" and {rest} more (--json lists all)" if rest > 0 else "")


def named_tensors(record: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Yield every array of a record with its name, such as ``layers.3.attention.probs``, in the order of execution.

    `prefix` is put before each name. The cache for the next call is not part of the trace.

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


def trace_axes(record: Any = Forward, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every name of a trace with its axes, as in the records; ``N`` stands for a layer's number.

    The names come from `record` and the records inside it; each begins with `prefix`.

    Examples
    --------
    >>> axes = dict(trace_axes())
    >>> axes["layers.N.attention.q"], axes["logits"]
    ('batch heads seq head_dim', 'batch seq vocab')
    """
    for field in fields(record):
        kind, name = field.type, prefix + field.name
        if get_origin(kind) is tuple:
            kind, name = get_args(kind)[0], f"{name}.N"
        if hasattr(kind, "dim_str"):
            yield name, kind.dim_str
        elif is_dataclass(kind) and kind is not LayerCache:
            yield from trace_axes(kind, f"{name}.")


# The axes of each field, in the order of execution; the fields of one layer; its norms. A run has no log probabilities,
# but servers give these instead of logits.
LOGPROBS = "logprobs"
FIELDS = tuple(field_of(name) for name, _ in trace_axes())
AXES = {field_of(name): axes for name, axes in trace_axes()}
AXES[LOGPROBS] = AXES["logits"]
LAYER_FIELDS = tuple(field_of(name) for name, _ in trace_axes() if name.startswith("layers."))
LAYER_NORMS = tuple(field for field in LAYER_FIELDS if field.endswith("norm"))


def target_file(path: str | Path) -> Path:
    """Follow links in `path`, check that a file can be written there, and return the target.

    Raises
    ------
    InputError
        If `path` is a folder, a device or a pipe, or its folder does not exist.

    Examples
    --------
    >>> target_file("/")
    Traceback (most recent call last):
    ...
    refgemma.inputs.InputError: /: is a folder; give the name of a file to write
    """
    target = Path(os.path.realpath(path))
    if not str(path) or target.is_dir() or str(path).endswith("/"):
        raise InputError(f"{path or repr('')}: is a folder; give the name of a file to write")
    if target.exists() and not target.is_file():
        raise InputError(f"{path}: is a device or a pipe; give the name of a file to write")
    if not target.parent.is_dir():
        raise InputError(f"{path}: the folder {target.parent} does not exist")
    return target


def run_in_order(ids: TokenIds, weights: Weights, config: Gemma2Config) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of `forward` with their names, one block at a time, so that a deep model needs little memory.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> [name for name, _ in run_in_order(np.array([[2, 300]]), tiny.weights, tiny.config)][-3:]
    ['norm', 'raw_logits', 'logits']
    """
    start = begin(ids, weights, config)
    yield from (("cos", start.cos), ("sin", start.sin), ("embedded", start.embedded))
    hidden, layer = start.embedded, 0
    for record in blocks(start, weights, config):
        yield from named_tensors(record, f"layers.{layer}.")
        hidden, layer = record.out, layer + 1
        del record
    norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    yield "norm", norm
    raw_logits, logits = head(norm, weights, config)
    yield from (("raw_logits", raw_logits), ("logits", logits))


def run_calls(
    ids: TokenIds, calls: Sequence[int], weights: Weights, config: Gemma2Config, attention_mask: npt.ArrayLike
) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of calls with a shared cache: ``calls.0.embedded`` and so on; `calls` are token counts.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> ids = np.array([[2, 300, 400]])
    >>> tensors = dict(run_calls(ids, [2, 1], tiny.weights, tiny.config, np.ones_like(ids)))
    >>> tensors["calls.1.logits"].shape
    (1, 1, 2048)
    """
    cache, seen = None, np.asarray(attention_mask)
    for number, (start, end) in enumerate(pairwise(np.cumsum([0, *calls]))):
        run = forward(ids[:, start:end], weights, config, attention_mask=seen[:, :end], cache=cache)
        yield from named_tensors(run, f"calls.{number}.")
        cache = run.cache


def save_trace(
    tensors: Iterable[tuple[str, Array]], path: str | Path, metadata: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Write tensors to a safetensors file, which appears complete or not at all; each tensor is written and dropped.

    The header of the file comes first, with the position of each tensor and the `metadata`. So the data is first
    written to a temporary file, then copied behind the header. For a moment this takes twice the space on the disk.

    Returns
    -------
    dict
        The shape of each tensor, by name.

    Raises
    ------
    InputError
        If `path` cannot be a file; see `target_file`.
    OSError
        If the file cannot be written.
    """
    target = target_file(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    with tempfile.TemporaryFile(dir=target.parent) as data, new_file(target) as file:
        for name, tensor in tensors:
            x = _in_file(tensor)
            start = data.tell()
            data.write(x.reshape(-1).view(np.uint8).data)
            code = (
                CODE_OF_DTYPE[x.dtype] if x.dtype in CODE_OF_DTYPE else f"{x.dtype.kind.upper()}{8 * x.dtype.itemsize}"
            )
            header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [start, data.tell()]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        data.seek(0)
        shutil.copyfileobj(data, file, 2**22)
    del header["__metadata__"]
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _in_file(x: Array) -> Array:
    """Convert half precision to two bytes; return all other arrays, such as token ids, unchanged."""
    return as_stored(x, dtype_name(x)) if isinstance(x, Rounded) else np.ascontiguousarray(x)
