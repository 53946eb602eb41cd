"""What another implementation computed, read from a file and checked before anything is made of it. Checked in the
tests on damaged, foreign and incomplete files.

The file is safetensors. Its tensors have the names and shapes that `refgemma trace` writes: ``input_ids`` (batch,
seq), and any of ``position_ids``, ``attention_mask`` (1 for a token, 0 for padding) and the named tensors; ``logits``
at the least are of use. Tensors of several calls that share a cache are named ``calls.0.embedded``,
``calls.1.embedded`` and so on. Its metadata may say ``dtype`` (what tensors are stored in) and ``engine``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes safetensors know bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError, check_inputs
from refgemma.oracle.graph import FIELDS, Call, field_of, layer_of
from refgemma.precision import Array, as_dtype

STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
GIVEN = ("input_ids", "position_ids", "attention_mask")
AXES: Mapping[str, str] = {
    "cos": "batch 1 seq head_dim",
    "embedded": "batch seq hidden",
    "attention.q": "batch heads seq head_dim",
    "attention.k": "batch kv_heads seq head_dim",
    "attention.scores": "batch heads seq keys",
    "attention.mixed": "batch seq heads*head_dim",
    "feed_forward.gate": "batch seq intermediate",
    "logits": "batch seq vocab",
}
_SAME_AXES = {
    "cos": ("sin",),
    "attention.q": ("attention.q_rot",),
    "attention.k": ("attention.v", "attention.k_rot"),
    "attention.scores": ("attention.capped", "attention.probs"),
    "attention.mixed": (),
    "feed_forward.gate": ("feed_forward.up", "feed_forward.gelu", "feed_forward.product"),
    "logits": ("raw_logits",),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the candidate: its numbers in the precision they were computed in, and what they are kept in."""

    numbers: Array
    storage: str


@dataclass(frozen=True)
class Candidate:
    """A checked trace: every tensor has a known name and the right shape; what has not is in `refused`."""

    source: str
    dtype: str
    dtype_from: str  # "metadata", "file" or "numbers": how `dtype` is known
    call: Call
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]  # name -> why the tensor cannot be judged
    unknown: tuple[str, ...]  # names that are none of ours
    engine: str = ""


def axes_of(name: str) -> str:
    """The axes of a named tensor, as words.

    Examples
    --------
    >>> axes_of("layers.3.attention.probs"), axes_of("layers.3.out")
    ('batch heads seq keys', 'batch seq hidden')
    """
    kind = field_of(name)
    first = next((key for key, same in _SAME_AXES.items() if kind in same), kind)
    return AXES.get(first, "batch seq hidden")


def shape_of(name: str, config: Gemma2Config, batch: int, seq: int) -> tuple[int, ...]:
    """The shape that a named tensor of a call has.

    Examples
    --------
    >>> shape_of("layers.0.attention.k", Gemma2Config.preset("9b"), batch=1, seq=5)
    (1, 8, 5, 256)
    """
    lengths = {
        "batch": batch, "seq": seq, "keys": seq, "1": 1, "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "hidden": config.hidden_size,
        "intermediate": config.intermediate_size, "vocab": config.vocab_size,
        "heads*head_dim": config.num_attention_heads * config.head_dim,
    }  # fmt: skip
    return tuple(lengths[axis] for axis in axes_of(name).split())


def is_known(name: str, config: Gemma2Config) -> bool:
    """Whether a run of this model has a tensor of that name.

    Examples
    --------
    >>> is_known("layers.26.out", Gemma2Config.preset("2b"))
    False
    """
    if not name.startswith("layers."):
        return name in FIELDS and FIELDS.index(name) not in range(3, len(FIELDS) - 3)
    parts = name.split(".", 2)
    number = parts[1]
    return (
        len(parts) == 3 and number.isdecimal() and number.isascii() and str(int(number)) == number
        and int(number) < config.num_hidden_layers and parts[2] in FIELDS[3:-3]
    )  # fmt: skip


def read_file(path: str | Path) -> tuple[dict[str, str], dict[str, str], dict[str, Array]]:
    """The metadata, the stored dtypes and the tensors of a safetensors file.

    Raises
    ------
    InputError
        If it is none, saying why.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; give the safetensors file in it")
    if not Path(path).exists():
        raise InputError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            foreign = sorted(name for name, dtype in dtypes.items() if dtype[0] == "F" and dtype not in STORED)
            if foreign:
                raise InputError(
                    f"{path}: {foreign[0]} is stored as {dtypes[foreign[0]]}; {', '.join(STORED)} can be read"
                )
            return file.metadata() or {}, dtypes, {name: file.get_tensor(name) for name in dtypes}
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is no whole safetensors file ({reason}); write it again") from None


def load_candidate(path: str | Path, config: Gemma2Config, dtype: str | None = None) -> Candidate:
    """Read and check a candidate's trace for a model of `config`.

    Parameters
    ----------
    path : str or path
        The file.
    config : Gemma2Config
        The model that it claims to be.
    dtype : str, optional
        What it stores tensors in, if neither its metadata nor the numbers say so.

    Raises
    ------
    InputError
        If the file cannot be read, or lacks ``input_ids``, or those do not fit the model.
    """
    metadata, dtypes, tensors = read_file(path)
    if "input_ids" not in tensors:
        raise InputError(f"{path}: lacks input_ids, the tokens that were run; add them as integers (batch, seq)")
    try:
        call = _call(tensors, metadata, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    declared = dtype or metadata.get("dtype")
    if declared is not None and declared not in STORED.values():
        raise InputError(f"{path}: dtype is {declared!r}; {', '.join(STORED.values())} are known")
    named = {name: x for name, x in tensors.items() if name not in GIVEN}
    if len(call.calls) > 1:
        named = _joined(named, call)
    floats = {name: x for name, x in named.items() if is_known(name, config)}
    refused = {}
    batch, seq = call.input_ids.shape
    for name, x in list(floats.items()):
        wanted = shape_of(name, config, batch, seq)
        if name in ("cos", "sin") and x.shape == (1, *wanted[1:]):
            x = floats[name] = np.broadcast_to(x, wanted)  # one table for all rows
        if dtypes.get(name, "F")[0] not in "FB" or x.dtype.kind not in "fV" or x.dtype == bool:
            refused[name] = f"holds {x.dtype}, not floating-point numbers"
        elif x.shape != wanted:
            refused[name] = f"has shape {x.shape}; {wanted} is needed: ({axes_of(name).replace(' ', ', ')})"
    judged = {name: x for name, x in floats.items() if name not in refused}
    chosen = declared or _told_by(judged)
    return Candidate(
        str(path), chosen, "option" if dtype else "metadata" if declared else "numbers", call,
        {name: Tensor(*_stored(x, chosen)) for name, x in judged.items()}, refused,
        tuple(sorted(set(named) - set(floats))), metadata.get("engine", ""),
    )  # fmt: skip


def _call(tensors: Mapping[str, Array], metadata: Mapping[str, str], config: Gemma2Config) -> Call:
    ids = tensors["input_ids"]
    inputs = check_inputs(ids[None] if ids.ndim == 1 else ids, config, tensors.get("attention_mask"),
                          tensors.get("position_ids"))  # fmt: skip
    seq = inputs.tokens.shape[1]
    try:
        calls = tuple(int(n) for n in json.loads(metadata.get("calls", f"[{seq}]")))
    except (ValueError, TypeError):
        raise InputError(f"the metadata's calls is {metadata['calls']!r}: a list of token counts is needed") from None
    if sum(calls) != seq or min(calls) < 1:
        raise InputError(f"the metadata's calls are of {list(calls)} tokens, but input_ids has {seq}")
    return Call(inputs.tokens, inputs.positions, inputs.visible, calls)


def _joined(tensors: Mapping[str, Array], call: Call) -> dict[str, Array]:
    """The tensors of calls that share a cache, one below the other; the keys of a row end at its call's last token.

    A key that the cache no longer held was not looked at: its probability is 0, and its score is not a number that was
    computed, which no comparison asks for.
    """
    seq, ends = call.input_ids.shape[1], np.cumsum(call.calls)
    joined = {name: x for name, x in tensors.items() if not name.startswith("calls.")}
    for name in {name.split(".", 2)[2] for name in tensors if name.startswith("calls.")}:
        parts = [tensors.get(f"calls.{n}.{name}") for n in range(len(ends))]
        if any(part is None or part.ndim not in (3, 4) for part in parts):
            continue
        if axes_of(name).endswith("keys"):
            parts = [_placed(part, int(end), seq) for part, end in zip(parts, ends, strict=True) if part is not None]
        joined[name] = np.concatenate(parts, axis=parts[0].ndim - 2)  # type: ignore[arg-type, union-attr]
    return joined


def _placed(x: Array, end: int, seq: int) -> Array:
    """``(batch, heads, rows, keys)`` whose last key is token ``end - 1``, among all `seq` keys."""
    kept = x[..., max(0, x.shape[-1] - end) :]
    before = end - kept.shape[-1]
    return np.pad(kept, [(0, 0)] * 3 + [(before, seq - end)])


def _told_by(tensors: Mapping[str, Array]) -> str:
    """The precision that the numbers show: the file's, or the half precision that they all are numbers of."""
    if not tensors:
        return "float32"
    widest = max((x.dtype for x in tensors.values()), key=lambda dtype: dtype.itemsize).name
    for half in ("bfloat16", "float16"):
        if all(_on_grid(x, half) for x in tensors.values()):
            return half
    return widest


def _on_grid(x: Array, dtype: str) -> bool:
    numbers = x.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    with np.errstate(over="ignore"):
        return bool(np.array_equal(np.asarray(as_dtype(finite, dtype), np.float64), finite))


def _stored(x: Array, dtype: str) -> tuple[Array, str]:
    """The numbers, and what they are kept in: `dtype`, unless they are finer."""
    if dtype in ("bfloat16", "float16") and not _on_grid(x, dtype):
        return x.astype(np.float64), "float64" if x.dtype == np.float64 else "float32"
    return x.astype(np.float64), dtype


def only(candidate: Candidate, names: tuple[str, ...]) -> Candidate:
    """The candidate with some of its tensors.

    Parameters
    ----------
    candidate : Candidate
        A checked trace.
    names : tuple of str
        Those to keep; ``layers.*.out`` keeps that of every layer.
    """

    def wanted(name: str) -> bool:
        layer = layer_of(name)
        return name in names or (layer is not None and f"layers.*.{field_of(name)}" in names)

    return replace(candidate, tensors={name: x for name, x in candidate.tensors.items() if wanted(name)})
