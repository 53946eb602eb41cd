"""Read the trace of another implementation from a file, and check the trace before use. Checked in the tests on
damaged, foreign and incomplete files.

The file is safetensors. Its tensors have the names and shapes that ``refgemma trace`` writes: ``input_ids`` (batch,
seq); optionally ``position_ids`` and ``attention_mask`` (1 for a token, 0 for padding); and at least one named tensor,
such as ``logits``. Tensors of several calls with a shared cache are named ``calls.0.embedded``, ``calls.1.embedded``
and so on. The metadata may have ``dtype`` (the precision of the tensors) and ``engine``.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma.config import Gemma2Config
from refgemma.files import pluralise
from refgemma.heads import IGNORED
from refgemma.inputs import InputError, check_inputs
from refgemma.precision import Array, as_dtype, as_float64, wide
from refgemma.trace.name_maps import GIVEN, axis_lengths, open_trace
from refgemma.trace.names import AFTER, AXES, FIELDS, GRADS, LAYER_FIELDS, LOGPROBS, field_of, layer_of
from refgemma.trace.reader import Entry, TraceFile
from refgemma.trace.step_numbers import MOMENTS, StepNumbers, read_step_numbers
from refgemma.weights.parameters import tensor_shapes

STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
MOST_TOKENS = 2**20
# A static cache has keys that no query sees. It is an error if a tensor has more than this many times the needed
# elements.
MUCH = 16
LABELS = "labels"
WORDS = "logprob_ids"  # tensor with the ids of the words, if a file has log probabilities of some words only


@dataclass(frozen=True)
class Call:
    """The input of a run. Several calls with a shared cache are one `Call` with all tokens."""

    input_ids: npt.NDArray[np.int64]  # (batch, seq)
    positions: npt.NDArray[np.int64]  # (batch, seq), for the rotary angles
    visible: npt.NDArray[np.bool_]  # (batch, seq), false for padding
    calls: tuple[int, ...]  # number of tokens of each call
    labels: npt.NDArray[np.int64] | None = None  # (batch, seq), if gradients were recorded
    num_items: float | None = None  # divides the sum of the losses; the number of labels that count if None
    step: StepNumbers | None = None  # of the optimizer, if weights after it were recorded

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first place of the call to which each token belongs, ``(seq,)``."""
        return np.repeat(np.cumsum([0, *self.calls])[:-1], self.calls)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the candidate: the numbers in the precision of the computation, and their storage format."""

    numbers: Array
    storage: str
    known: Array | None = None  # mask of the elements that the file has; None means all
    coarse: float = 0.0  # distance of neighbouring decimals, if the file has decimals


@dataclass(frozen=True)
class Candidate:
    """A checked trace: every tensor has a known name and the right shape; all other tensors are in `refused`."""

    source: str
    dtype: str
    dtype_from: str  # "metadata", "file" or "numbers": the source of `dtype`
    call: Call
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]  # name -> why the tensor cannot be judged
    unknown: tuple[str, ...]  # names that refgemma does not use
    engine: str = ""
    name_map: str = ""  # the map of the file's names; refgemma's own if empty
    columns: int = 0  # number of columns of the logits in the file
    metadata: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # on unrecorded rows, and on tensors with a misleading name

    @cached_property
    def inputs(self) -> Mapping[str, Tensor]:
        """The complete tensors at full precision, from which other tensors can be computed."""
        return {name: x for name, x in self.tensors.items() if x.known is None and not x.coarse}


def axes_of(name: str) -> str:
    """Return the names of a tensor's axes.

    Examples
    --------
    >>> axes_of("layers.3.attention.probs"), axes_of("layers.3.out")
    ('batch heads seq keys', 'batch seq hidden')
    >>> axes_of("grads.layers.3.out"), axes_of("grads.model.norm.weight")
    ('batch seq hidden', 'out')
    """
    kind = field_of(name).removeprefix(GRADS).removeprefix(AFTER)
    if kind in AXES:
        return AXES[kind]
    return "out" if kind.endswith(("norm.weight", "bias")) else "out in"  # the gradient of a weight


def shape_of(name: str, config: Gemma2Config, batch: int, seq: int) -> tuple[int, ...]:
    """Return the shape of a named tensor of a call.

    Examples
    --------
    >>> shape_of("layers.0.attention.k", Gemma2Config.preset("9b"), batch=1, seq=5)
    (1, 8, 5, 256)
    """
    for prefix in (GRADS, AFTER, *(f"{part}." for part in MOMENTS)):
        if name.startswith(prefix) and (weight := name.removeprefix(prefix)) in (shapes := tensor_shapes(config)):
            return shapes[weight]
    call = {"batch": batch, "seq": seq, "keys": seq, "1": 1}
    lengths = call | axis_lengths(config) | {"heads*head_dim": config.num_attention_heads * config.head_dim}
    return tuple(lengths[axis] for axis in axes_of(name).split())


def is_known(name: str, config: Gemma2Config) -> bool:
    """Return True if a run of this model has a tensor of this name.

    Examples
    --------
    >>> is_known("layers.26.out", Gemma2Config.preset("2b"))
    False
    """
    return name in _known_names(config.num_hidden_layers)


@cache
def _known_names(layers: int) -> frozenset[str]:
    inside = {f"layers.{layer}.{field}" for layer in range(layers) for field in LAYER_FIELDS}
    return frozenset(inside.union(FIELDS, [LOGPROBS]).difference(LAYER_FIELDS))


def _is_gradient(name: str, config: Gemma2Config) -> bool:
    """Return True for the gradient of a computed tensor or of a weight."""
    of = name.removeprefix(GRADS)
    constant = of in ("cos", "sin", LOGPROBS)
    return name.startswith(GRADS) and not constant and (is_known(of, config) or of in tensor_shapes(config))


def load_trace(
    path: str | Path, config: Gemma2Config, dtype: str | None = None, name_map: str | None = None
) -> Candidate:
    """Read and check a candidate's trace for a model of `config`.

    Parameters
    ----------
    path : str or path
        The file.
    config : Gemma2Config
        The configuration of the model.
    dtype : str, optional
        The precision of the tensors; overrides the file's metadata.
    name_map : str, optional
        The map for the file's names, see ``refgemma/trace/name_maps.py``. By default the ``map`` in the metadata, or
        else refgemma's own names.

    Raises
    ------
    InputError
        If the file cannot be read, lacks ``input_ids``, or does not fit the model.
    """
    return check_trace(open_trace(path, config, name_map), config, dtype)


def candidate_of(
    tensors: Mapping[str, Array], config: Gemma2Config, dtype: str, calls: Sequence[int] = (), source: str = "memory"
) -> Candidate:
    """Check named tensors in memory, and return them as a trace.

    Parameters
    ----------
    tensors : mapping
        ``input_ids``, optionally ``attention_mask`` and ``position_ids``, and named tensors. Tensors of one or several
        calls may be named ``calls.0.embedded`` and so on.
    config : Gemma2Config
        The model's configuration.
    dtype : str
        The precision of the tensors.
    calls : sequence of int
        Number of tokens of each call; by default there is one call.
    source : str
        The trace's name in messages.

    Examples
    --------
    >>> import refgemma
    >>> from refgemma.trace.names import named_tensors
    >>> tiny = refgemma.load("tiny")
    >>> run = dict(named_tensors(refgemma.forward([[2, 300]], tiny.weights, tiny.config)))
    >>> candidate = candidate_of({"input_ids": np.array([[2, 300]])} | run, tiny.config, "float32")
    >>> candidate.tensors["logits"].numbers.shape
    (1, 2, 2048)
    """
    codes = {name: code for code, name in STORED.items()}
    prefix = "calls.0." if len(calls) < 2 else ""
    entries = {
        name.removeprefix(prefix): Entry("I64" if x.dtype.kind in "iub" else codes[dtype], x.shape, partial(_as_is, x))
        for name, x in tensors.items()
    }
    metadata = {"dtype": dtype} | ({"calls": json.dumps([int(n) for n in calls])} if len(calls) else {})
    return check_trace(TraceFile(source, metadata, entries), config)


def _as_is(x: Array) -> Array:
    return np.asarray(wide(x))


def check_trace(file: TraceFile, config: Gemma2Config, dtype: str | None = None) -> Candidate:
    """Check the tensors of a trace with refgemma's names; see `load_trace` for arguments and errors."""
    path = file.path
    declared = dtype or file.metadata.get("dtype")
    if declared is not None and declared not in STORED.values():
        raise InputError(f"{path}: dtype is {declared!r}; it must be one of {', '.join(STORED.values())}")
    call = _call(file, config)
    ids = {
        name for name in file.entries if name.endswith(WORDS) and name.removesuffix(WORDS) + LOGPROBS in file.entries
    }
    gradients = {name for name in file.entries if _is_gradient(name, config)}
    of_step = {name for name in file.entries if _is_of_step(name, config)}
    given = {*GIVEN, *ids, *([LABELS] if gradients else [])}
    named = [name for name in file.entries if name not in given | gradients | of_step]
    wanted = {name for name in named if is_known(_without_call(name, call), config)}
    refused: dict[str, str] = {}
    read: dict[str, Tensor] = {}
    for name in sorted(wanted):
        entry = _add_axes(name, _spread_words(name, file.entries, config), call)
        if (problem := _find_problem(name, entry, call, config)) is None:
            read[name] = Tensor(entry.read(), entry.dtype, entry.known and entry.known(), entry.coarse)
        else:
            refused[_without_call(name, call)] = problem
    judged = _join_calls(read, call, refused)
    batch, seq = call.input_ids.shape
    for name, x in judged.items():
        shape = shape_of(name, config, batch, seq)
        if name in ("cos", "sin") and x.numbers.shape == (1, *shape[1:]):
            judged[name] = replace(x, numbers=np.broadcast_to(x.numbers, shape))  # all rows share one table
        elif x.numbers.shape != shape:
            found = file.entries[name].shape if name in file.entries else x.numbers.shape  # joined, calls are longer
            refused[name] = _wrong_shape(name, found, shape)
    judged = {name: _leave_out_nan(name, x, call) for name, x in judged.items() if name not in refused}
    if gradients:
        call = _read_labels(file, call, config)
        judged |= _read_gradients(file, gradients, call, config, refused)
    if any(name.startswith(AFTER) for name in of_step):
        call, after = _read_step(file, of_step, call, config, refused, set(judged))
        judged |= after
    chosen = declared or _infer_dtype({name: x.numbers for name, x in judged.items()})
    remarks = [said for name, x in judged.items() if (said := _count_rows(name, x, call))]
    if "logits" in judged and LOGPROBS not in judged and _are_log_probabilities(judged["logits"], call):
        judged[LOGPROBS] = judged.pop("logits")
        remarks.append("logits: these are log probabilities, and are judged as such")
    tensors = {}
    for name, x in judged.items():
        numbers, storage = _choose_storage(x.numbers, chosen)
        if name.startswith(AFTER) and storage in ("bfloat16", "float16"):
            raise InputError(f"{path}: {name} is in {storage}, where optimizers round at many places; train with "
                             "float32 weights, or record the float32 master weights")  # fmt: skip
        tensors[name] = replace(x, numbers=numbers, storage=storage)
    return Candidate(
        str(path), chosen, "option" if dtype else "metadata" if declared else "numbers", call, tensors, refused,
        tuple(sorted(set(named) - wanted)), file.metadata.get("engine", ""), file.metadata.get("map", ""),
        _columns(file), file.metadata, tuple(remarks),
    )  # fmt: skip


def _read_labels(file: TraceFile, call: Call, config: Gemma2Config) -> Call:
    """Return the call with the labels of its loss.

    Raises
    ------
    InputError
        If labels are missing, gradients depend on the treatment of padding, or rows are packed texts.
    """
    said = f"{file.path}: labels"
    if len(call.calls) > 1:
        raise InputError(
            f"{file.path}: has gradients of {len(call.calls)} calls; record the gradients of a single call"
        )
    if LABELS not in file.entries:
        raise InputError(f"{said} are missing, but the gradients grads.* need them; add integers (batch, seq), with "
                         f"{IGNORED} for tokens that do not count")  # fmt: skip
    entry, shape = file.entries[LABELS], call.input_ids.shape
    if entry.dtype[0] not in "IU" or entry.shape not in (shape, shape[1:] if shape[0] == 1 else shape):
        raise InputError(f"{said} are {entry.dtype} of shape {entry.shape}; they must be integers of shape {shape}")
    labels = entry.read().astype(np.int64).reshape(shape)
    if (wrong := np.argwhere((labels != IGNORED) & ((labels < 0) | (labels >= config.vocab_size)))).size:
        row, place = wrong[0]
        raise InputError(f"{said}[{row}, {place}] is {labels[row, place]}; it must be {IGNORED} or a token below "
                         f"{config.vocab_size}")  # fmt: skip
    if (wrong := np.argwhere((labels[:, 1:] != IGNORED) & ~call.visible[:, :-1])).size:
        row, place = wrong[0] + (0, 1)
        raise InputError(f"{said}[{row}, {place}] is predicted from padding, whose logits have no meaning; set it to "
                         f"{IGNORED}, train again and record the new gradients")  # fmt: skip
    if "attention_mask" not in file.entries and (np.diff(call.positions, axis=1) != 1).any():
        raise InputError(f"{file.path}: position_ids restart, so the rows are packed texts; gradients can be judged "
                         "only for one text per row: record such gradients")  # fmt: skip
    number = file.metadata.get("num_items_in_batch")
    try:
        items = None if number is None else float(number)
    except ValueError:
        items = math.nan
    if items is not None and not 0 < items < math.inf:
        raise InputError(f"{file.path}: num_items_in_batch in the metadata is {str(number)[:100]!r}; it must be a "
                         "number above 0")  # fmt: skip
    return replace(call, labels=labels, num_items=items)


def _read_gradients(
    file: TraceFile, names: set[str], call: Call, config: Gemma2Config, refused: dict[str, str]
) -> dict[str, Tensor]:
    """Return the gradients with the right shapes; add all others to `refused`."""
    read = {}
    for name in sorted(names):
        entry, shape = file.entries[name], shape_of(name, config, *call.input_ids.shape)
        if entry.dtype not in STORED:
            refused[name] = f"is stored as {entry.dtype}; refgemma reads {', '.join(STORED)}"
        elif entry.shape != shape:
            refused[name] = _wrong_shape(name, entry.shape, shape)
        else:
            read[name] = Tensor(entry.read(), entry.dtype)
    return read


def _is_of_step(name: str, config: Gemma2Config) -> bool:
    """Return True for a weight after a step of the optimizer, and for a moment before it."""
    return any(
        name.startswith(prefix) and name.removeprefix(prefix) in tensor_shapes(config)
        for prefix in (AFTER, *(f"{part}." for part in MOMENTS))
    )


def _read_step(
    file: TraceFile, names: set[str], call: Call, config: Gemma2Config, refused: dict[str, str], judged: set[str]
) -> tuple[Call, dict[str, Tensor]]:
    """Return the call with the numbers of its step, and the weights after it; the others are added to `refused`.

    Raises
    ------
    InputError
        If a number of the step is missing or out of range.
    """
    read = _read_gradients(file, names, call, config, refused)
    moments = {name: x.numbers for name, x in read.items() if not name.startswith(AFTER)}
    step = read_step_numbers(file.path, file.metadata, moments)
    after = {name: x for name, x in read.items() if name.startswith(AFTER)}
    for name in after:
        weight = name.removeprefix(AFTER)
        needed = {GRADS + weight} if not step.max_grad_norm else {GRADS + other for other in tensor_shapes(config)}
        if step.step > 1 and step.optimizer == "adamw":
            needed |= {f"{part}.{weight}" for part in MOMENTS}
        if missing := sorted(needed - judged - moments.keys()):
            refused[name] = f"cannot be judged without {missing[0]}, which is missing; record it"
    return replace(call, step=step), {name: x for name, x in after.items() if name not in refused}


def _spread_words(name: str, entries: Mapping[str, Entry], config: Gemma2Config) -> Entry:
    """Return the entry of a tensor; spread log probabilities of some words over the whole vocabulary."""
    entry, ids = entries[name], entries.get(f"{name.removesuffix(LOGPROBS)}{WORDS}")
    if ids is None or not name.endswith(LOGPROBS) or ids.dtype[0] not in "IU" or ids.shape != entry.shape:
        return entry
    if entry.shape[-1] > config.vocab_size:  # do not read it: its shape will be refused
        return entry
    shape = (*entry.shape[:-1], config.vocab_size)

    def spread(numbers: Array) -> Array:
        words = ids.read().astype(np.int64)
        inside = (words >= 0) & (words < config.vocab_size)  # other numbers fill rows with fewer words
        whole = np.zeros((*shape[:-1], config.vocab_size + 1), numbers.dtype)
        np.put_along_axis(whole, np.where(inside, words, config.vocab_size), numbers, axis=-1)
        return whole[..., :-1]

    # A server gives minus infinity or nothing for words that it leaves out.
    return replace(entry, shape=shape, read=lambda: spread(entry.read()),
                   known=lambda: spread(np.isfinite(entry.read().astype(np.float64))))  # fmt: skip


def _add_axes(name: str, entry: Entry, call: Call) -> Entry:
    """Return the entry with its missing axes of length 1: that of cos and sin, then the batch of a single text."""
    axes = axes_of(_without_call(name, call)).split()
    ones = [axes.index(axis) for axis in ("1", "batch") if axis in axes and (axis == "1" or len(call.input_ids) == 1)]
    added = sorted(ones[: max(0, len(axes) - len(entry.shape))])
    if not added or len(entry.shape) + len(added) != len(axes):
        return entry
    shape = list(entry.shape)
    for place in added:
        shape.insert(place, 1)

    def reshape(read: Callable[[], Array]) -> Callable[[], Array]:
        return lambda: read().reshape(shape)

    return replace(
        entry, shape=tuple(shape), read=reshape(entry.read), known=None if entry.known is None else reshape(entry.known)
    )


def _is_nan(x: Array) -> npt.NDArray[np.bool_]:
    """Return True for each NaN; also for the arrays of bfloat16 that `safetensors` reads."""
    empty: npt.NDArray[np.bool_] = np.isnan(x if x.dtype.kind == "f" else x.astype(np.float32))
    return empty


def _leave_out_nan(name: str, x: Tensor, call: Call) -> Tensor:
    """Treat rows of NaN as unrecorded if the same text has other rows."""
    others = tuple(n for n, axis in enumerate(axes_of(name).split()) if axis not in ("batch", "seq"))
    empty = _is_nan(x.numbers).all(axis=others) & call.visible
    empty &= (call.visible & ~empty).any(axis=1, keepdims=True)
    if not empty.any():
        return x
    there = np.broadcast_to(~np.expand_dims(empty, others), x.numbers.shape)
    return replace(x, numbers=np.where(there, x.numbers, 0), known=there if x.known is None else there & x.known)


def _count_rows(name: str, x: Tensor, call: Call) -> str:
    """Return a remark with the number of unrecorded rows of a tensor, or an empty string."""
    if x.known is None or x.coarse:
        return ""
    others = tuple(n for n, axis in enumerate(axes_of(name).split()) if axis not in ("batch", "seq"))
    missing = int(np.sum(~x.known.any(axis=others) & call.visible))
    count = f"{missing} of {pluralise(int(call.visible.sum()), 'row')} {'is' if missing == 1 else 'are'}"
    return f"{name}: {count} not recorded" if missing else ""


def _are_log_probabilities(x: Tensor, call: Call) -> bool:
    """Return True if the exponentials of each row add up to 1: these are log probabilities, not logits."""
    rows = x.numbers[call.visible & (True if x.known is None else x.known.all(axis=-1))].astype(np.float64)
    if not len(rows) or not rows.max() <= 0:
        return False
    with np.errstate(over="ignore"):
        sums = np.exp(rows).sum(axis=-1)
    # bfloat16 rounds a logarithm of 8 by up to 2**-6; the errors of many words cancel.
    return bool((np.abs(sums - 1) < (0.05 if x.storage in ("BF16", "F16") else 1e-3)).all())


def _columns(file: TraceFile) -> int:
    logits = file.entries.get("logits") or file.entries.get("calls.0.logits")
    return logits.shape[-1] if logits and logits.shape and logits.dtype in STORED else 0


def _without_call(name: str, call: Call) -> str:
    """Return ``embedded`` for ``calls.0.embedded``, if there are several calls."""
    parts = name.split(".", 2)
    several = len(call.calls) > 1 and parts[0] == "calls" and len(parts) == 3 and parts[1].isdecimal()
    return parts[2] if several and int(parts[1]) < len(call.calls) else name


def _find_problem(name: str, entry: Entry, call: Call, config: Gemma2Config) -> str | None:
    """Return the reason why a tensor cannot be judged, from the header only, however large the data."""
    field_name = _without_call(name, call)
    shape = shape_of(field_name, config, *call.input_ids.shape)
    if entry.dtype not in STORED:
        floating = (
            f"; refgemma reads {', '.join(STORED)}" if entry.dtype[0] == "F" else ", not as floating-point numbers"
        )
        return f"is stored as {entry.dtype}{floating}"
    rows = call.input_ids.shape[1] if name == field_name else call.calls[int(name.split(".")[1])]
    if len(entry.shape) == len(shape) and entry.shape[-2] > rows:
        return _wrong_shape(field_name, entry.shape, (*shape[:-2], rows, shape[-1]))
    if len(entry.shape) != len(shape) or math.prod(entry.shape) > MUCH * math.prod(shape):
        return _wrong_shape(field_name, entry.shape, shape)
    return None


def _wrong_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    said = f"has shape {found}; it must be {wanted}: ({axes_of(name).replace(' ', ', ')})"
    for one, other in combinations(range(len(found)), 2):
        exchanged = list(found)
        exchanged[one], exchanged[other] = found[other], found[one]
        if tuple(exchanged) == wanted:
            return f"{said}; transpose its axes {one} and {other}"
    return said


def _call(file: TraceFile, config: Gemma2Config) -> Call:
    if "input_ids" not in file.entries:
        raise InputError(
            f"{file.path}: input_ids, the tokens of the run, are missing; add them as integers (batch, seq)"
        )
    given = {name: file.entries[name] for name in GIVEN if name in file.entries}
    for name, entry in given.items():
        if math.prod(entry.shape) > MOST_TOKENS:
            raise InputError(f"{file.path}: {name} has shape {entry.shape}; the limit is {MOST_TOKENS} tokens")
        if entry.dtype[0] not in "IUB" or entry.dtype == "BF16":
            raise InputError(f"{file.path}: {name} is stored as {entry.dtype}; it must be integers")
    try:
        return _read_call({name: entry.read() for name, entry in given.items()}, file.metadata, config)
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None


def _read_call(tensors: Mapping[str, Array], metadata: Mapping[str, str], config: Gemma2Config) -> Call:
    ids = tensors["input_ids"]
    inputs = check_inputs(ids[None] if ids.ndim == 1 else ids, config, attention_mask=tensors.get("attention_mask"),
                          position_ids=tensors.get("position_ids"))  # fmt: skip
    assert inputs.tokens is not None  # a trace has no embeddings as input
    seq = inputs.tokens.shape[1]
    try:
        calls = tuple(int(n) for n in json.loads(metadata.get("calls", f"[{seq}]")))
    except (ValueError, TypeError, OverflowError, RecursionError):
        said = metadata["calls"][:100]
        raise InputError(f"calls in the metadata is {said!r}; it must be a list of token counts") from None
    if sum(calls) != seq or min(calls) < 1:
        raise InputError(
            f"calls in the metadata is {list(calls)}; its numbers must be positive, with the sum {seq}, "
            "the number of input_ids"
        )
    return Call(inputs.tokens, inputs.positions, inputs.visible, calls)


def _join_calls(tensors: Mapping[str, Tensor], call: Call, refused: dict[str, str]) -> dict[str, Tensor]:
    """Join the tensors of calls with a shared cache along ``seq``; a row's keys end at the last token of its call.

    A key that the cache had dropped was not visible: its probability is 0, and its score was not computed and is not
    compared. If a call did not record a tensor, its rows are unknown.
    """
    seq, joined = call.input_ids.shape[1], {}
    for kind in dict.fromkeys(_without_call(name, call) for name in tensors):
        whole = kind in tensors
        lengths = (seq,) if whole else call.calls
        found = [tensors.get(kind if whole else f"calls.{n}.{kind}") for n in range(len(lengths))]
        ends = np.cumsum(lengths)
        parts = [x and _place(x, kind, n, int(end), seq) for x, n, end in zip(found, lengths, ends, strict=True)]
        there = [x for x in parts if x is not None]
        others = {(*x.numbers.shape[:-2], x.numbers.shape[-1]) for x in there}
        if len(others) > 1:
            shapes = ", ".join(str(x.numbers.shape) for x in found if x is not None)
            refused[kind] = f"has different axes in some calls: {shapes}"
            continue
        parts = [x or _unknown_rows(there[0], n) for x, n in zip(parts, lengths, strict=True)]
        numbers = np.concatenate([x.numbers for x in parts if x], axis=-2)
        masks = [np.ones(x.numbers.shape, bool) if x.known is None else x.known for x in parts if x]
        partial = any(x.known is not None for x in parts if x)
        joined[kind] = replace(there[0], numbers=numbers, known=np.concatenate(masks, axis=-2) if partial else None)
    return joined


def _unknown_rows(like: Tensor, rows: int) -> Tensor:
    """Return a tensor of `rows` unrecorded rows, with the other axes as in `like`."""
    shape = (*like.numbers.shape[:-2], rows, like.numbers.shape[-1])
    return replace(like, numbers=np.zeros(shape, like.numbers.dtype), known=np.zeros(shape, bool))


def _place(x: Tensor, name: str, rows: int, end: int, seq: int) -> Tensor:
    """Pad a call's tensor to `rows` rows and all `seq` keys; token ``end - 1`` is the last token of the call.

    If the call recorded fewer rows, these are the last rows. More keys than tokens are free space at the end of a
    static cache; fewer keys are the last keys, which a cache kept.
    """
    missing = max(0, rows - x.numbers.shape[-2])
    keys, pads = slice(None), [(0, 0)] * (x.numbers.ndim - 2) + [(missing, 0), (0, 0)]
    if axes_of(name).endswith("keys") and (x.numbers.shape[-1] > end or end < seq or rows < end):
        keys, kept = slice(end), min(end, x.numbers.shape[-1])
        pads[-1] = (end - kept, seq - end)
    known = x.known
    if missing and known is None:
        known = np.ones(x.numbers.shape, bool)
    numbers = np.pad(x.numbers[..., keys], pads)
    if pads[-1] != (0, 0):  # a row of NaN stays one: it was not recorded
        empty = np.pad(_is_nan(x.numbers).all(axis=-1, keepdims=True), [*pads[:-1], (0, 0)])
        numbers = np.where(empty, np.array(np.nan, numbers.dtype), numbers)
    return replace(x, numbers=numbers, known=None if known is None else np.pad(known[..., keys], pads))


def _infer_dtype(tensors: Mapping[str, Array]) -> str:
    """Return the precision of the file or, if all numbers are exact in a half precision, that precision."""
    if not tensors:
        return "float32"
    widest = max((x.dtype for x in tensors.values()), key=lambda dtype: dtype.itemsize).name
    for half in ("bfloat16", "float16"):
        if all(_on_grid(x, half) for x in tensors.values()):
            return half
    return widest


def _on_grid(x: Array, dtype: str) -> bool:
    numbers = as_float64(x)
    finite = numbers[np.isfinite(numbers)]
    with np.errstate(over="ignore"):
        return bool(np.array_equal(as_dtype(finite, dtype), finite))


def _choose_storage(x: Array, dtype: str) -> tuple[Array, str]:
    """Return the numbers and their storage format: `dtype`, unless the numbers need a finer format."""
    if dtype in ("bfloat16", "float16") and not _on_grid(x, dtype):
        return x.astype(np.float64), "float64" if x.dtype == np.float64 else "float32"
    return x.astype(np.float64), dtype


def only(candidate: Candidate, names: tuple[str, ...]) -> Candidate:
    """Return the candidate with only some of its tensors.

    Parameters
    ----------
    candidate : Candidate
        A checked trace.
    names : tuple of str
        The tensors to keep; ``layers.*.out`` means this tensor of every layer.
    """

    def is_wanted(name: str) -> bool:
        layer = layer_of(name)
        return name in names or (layer is not None and f"layers.*.{field_of(name)}" in names)

    return replace(candidate, tensors={name: x for name, x in candidate.tensors.items() if is_wanted(name)})


def first_tokens(candidate: Candidate, count: int) -> Candidate:
    """Return the candidate with only the first tokens of each sequence, which later tokens do not change."""
    call = candidate.call
    tokens: Any = {n: x[:, :count] for n, x in vars(call).items() if isinstance(x, np.ndarray)}
    tensors = {
        name: replace(
            x, numbers=first_rows(name, x.numbers, count),
            known=None if x.known is None else first_rows(name, x.known, count),
        )
        for name, x in candidate.tensors.items() if field_of(name) in AXES
    }  # fmt: skip
    return replace(candidate, call=replace(call, calls=(count,), **tokens), tensors=tensors)


def first_rows(name: str, x: Array, count: int) -> Array:
    """Return the part of a tensor, or of a mask of its elements, for the first tokens.

    Examples
    --------
    >>> first_rows("layers.0.attention.probs", np.ones((1, 2, 6, 6)), 4).shape
    (1, 2, 4, 4)
    >>> first_rows("logits", np.ones((1, 6, 97)), 4).shape
    (1, 4, 97)
    """
    return x[tuple(slice(count if axis in ("seq", "keys") else None) for axis in axes_of(name).split())]
