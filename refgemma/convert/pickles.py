"""Read and write files of `torch.save` without PyTorch: zip files with one pickle and each tensor's numbers.

Checked both ways against torch 2.13. The pickle is read by an interpreter in this file, which knows only the opcodes
that such a file needs. It compares names in the pickle with a short list; it imports nothing and calls nothing.
"""

import pickle
import pickletools
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.convert.flax_tree import (
    StridedTensor,
    ZipEntry,
    iterate_data,
    read_zip_entries,
    row_major_strides,
    write_zip,
)
from refgemma.files import AXES_LIMIT, open_file, quote
from refgemma.weights.checkpoint import REMEDY, CheckpointError, Stored
from refgemma.weights.save import FILE_DTYPES, OutputTensor

PICKLE_LIMIT = 2**24  # bytes; the pickle of a 27B has 100,000
STEPS_LIMIT = 2**20  # opcodes; each may make an object, and the pickle of a 27B has 12,000
ARGUMENTS_LIMIT = 10  # maximum number of a call's arguments, which each call copies

STATE_KEYS = ("model_state_dict", "model", "state_dict", "module")  # keys under which a dict may hold the state dict

STORAGES: dict[str, np.dtype[Any]] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    # Possible in a checkpoint, but not weights: the rotary table, counters, quantised numbers.
    "torch.ComplexFloatStorage": np.dtype(np.complex64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}


# --- the pickle: read -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """A name that a pickle would import; it is not imported."""

    dotted: str


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype[Any]
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Check the arguments of ``torch._utils._rebuild_tensor_v2``, and return the tensor's position."""
    if not isinstance(storage, _Storage) or not all(isinstance(part, tuple) for part in (shape, strides)):
        raise ValueError("a tensor lacks storage, shape or strides")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > AXES_LIMIT or not all(_is_count(n) for n in numbers):
        raise ValueError(f"a tensor has the invalid shape {quote(shape)} with strides {quote(strides)}")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if all(shape) and last >= storage.count:
        raise ValueError(f"a tensor exceeds the {storage.count} numbers of its storage")
    return _Tensor(storage, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _check_size(axes: Any) -> tuple[int, ...]:
    """Return a shape if it is a tuple; a list is refused, because copying it repeatedly could fill the memory."""
    if not isinstance(axes, tuple):
        raise ValueError(f"a shape is {quote(axes)}; it must be a tuple")
    return axes


# Name of a function that a checkpoint may call -> the function used here instead.
_RESULTS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": _check_size,
    "torch.device": lambda *where: where,
}


class _Machine:
    """The stack machine of a pickle, limited to plain containers and tensors."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, raw: bytes) -> Any:
        """Return the object in the pickle."""
        for opcode, argument, _ in islice(pickletools.genops(raw), STEPS_LIMIT):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in _STEPS:
                raise ValueError(
                    f"it has the opcode {opcode.name}, which checkpoints never need; do not trust the file"
                )
            _STEPS[opcode.name](self, argument)
        raise ValueError(f"it has more than {STEPS_LIMIT} opcodes, more than any checkpoint; do not trust the file")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.stack.pop() for _ in range(count)]))

    def name(self, dotted: str) -> None:
        dotted = dotted.replace(" ", ".")
        if dotted not in _RESULTS and dotted not in STORAGES:
            raise ValueError(f"it imports {quote(dotted)}, which checkpoints never need; do not trust the file")
        self.stack.append(_Name(dotted))

    def stack_name(self, _: Any) -> None:
        parts = self.take(2)
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("it imports an object without a name; do not trust the file")
        self.name(".".join(parts))

    def reduce(self, _: Any) -> None:
        made, arguments = self.take(2)
        if not isinstance(made, _Name) or made.dotted not in _RESULTS or not isinstance(arguments, tuple):
            raise ValueError(f"it calls {quote(made)}; do not trust the file")
        if len(arguments) > ARGUMENTS_LIMIT:
            raise ValueError(f"it calls {made.dotted} with {len(arguments)} arguments; do not trust the file")
        self.stack.append(_RESULTS[made.dotted](*arguments))

    def storage(self, _: Any) -> None:
        kind, dtype, key, _device, count = self.stack.pop()
        known = isinstance(dtype, _Name) and dtype.dotted in STORAGES
        if kind != "storage" or not known or not isinstance(key, str) or not _is_count(count):
            raise ValueError(f"it refers to {quote(kind)}; it may refer only to storages: do not trust the file")
        self.stack.append(_Storage(STORAGES[dtype.dotted], key, count))

    def set_items(self, pairs: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in pairs[::2]):
            raise ValueError("a dictionary has a key that is neither a string nor an integer")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append(self, items: Sequence[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("it appends to an object that is not a list")
        self.stack[-1].extend(items)

    def build(self, _: Any) -> None:
        self.stack.pop()  # drop the attributes of a state dict (_metadata)
        if not isinstance(self.stack[-1], dict):
            raise ValueError("it sets the attributes of an object that is not a dict; do not trust the file")


def _push(self: _Machine, value: Any) -> None:
    self.stack.append(value)


def _put(self: _Machine, index: int) -> None:
    self.memo[index] = self.stack[-1]


def _get(self: _Machine, index: int) -> None:
    self.stack.append(self.memo[index])


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    "MARK": _Machine.mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "BINPERSID": _Machine.storage,
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "BUILD": _Machine.build,
}


# --- a checkpoint: read -----------------------------------------------------------------------------------------------


def read_torch(file: Path) -> dict[str, Stored]:
    """Read names, shapes and positions of the tensors in a file of `torch.save`, without executing anything.

    Parameters
    ----------
    file : Path
        A file with a state dict, or with a dict that holds one under ``model_state_dict``, ``model``, ``state_dict`` or
        ``module``.

    Raises
    ------
    CheckpointError
        If the file is not such a file, or needs anything except tensors.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_torch(Path(folder) / "model.ckpt", [OutputTensor("norm.weight", "bfloat16", (3,), np.ones(3))])
    ...     read_torch(Path(folder) / "model.ckpt")["norm.weight"].read("float32")
    array([1., 1., 1.], dtype=float32)
    """
    top, locate = _open_torch(file)
    return {name: locate(name, tensor) for name, tensor in _find_state_dict(top, file).items()}


def read_tensors(file: Path) -> dict[str, Stored]:
    """Read the tensors in a dict that `torch.save` wrote; those of a list or tuple are ``name``, ``name#1`` and so on.

    Raises
    ------
    CheckpointError
        If the file is not such a file, or has no such dict.
    OSError
        If the file cannot be opened.
    """
    top, locate = _open_torch(file)
    if not isinstance(top, dict):
        raise CheckpointError(f"{file}: has no dict from names to tensors")
    found = {}
    for name, value in top.items():
        for number, tensor in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(name, str) and isinstance(tensor, _Tensor):
                found[f"{name}#{number}" if number else name] = locate(name, tensor)
    return found


def _open_torch(file: Path) -> tuple[Any, Callable[[str, _Tensor], Stored]]:
    """Return the object in a file of `torch.save`, and a function that locates one of its tensors."""
    _refuse_others(file)
    entries = read_zip_entries(file)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in entries:
        raise CheckpointError(
            f"{file}: is not a checkpoint of torch.save (TorchScript?); save its state_dict() instead"
        )
    order = _read_entry(file, entries, f"{roots[0]}byteorder") if f"{roots[0]}byteorder" in entries else b"little"
    if order != b"little":
        raise CheckpointError(f"{file}: the byte order is {quote(order)}; save it on a little-endian machine")
    top = _unpickle(_read_entry(file, entries, f"{roots[0]}data.pkl"), file)
    return top, lambda name, tensor: _locate_tensor(name, tensor, file, entries, roots[0])


def _refuse_others(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: is not a file; give the checkpoint that torch.save wrote")
    with open_file(file) as stream:
        start = stream.read(16)
    if start[:1] == b"\x80":
        raise CheckpointError(
            f"{file}: is a bare pickle or has the format of PyTorch before 1.6; load it with "
            "torch.load(..., weights_only=True) and write it again with torch.save"
        )
    if start[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{file}: is not a checkpoint of torch.save, which is a zip file; {REMEDY}")


def _read_entry(file: Path, entries: dict[str, ZipEntry], name: str) -> bytes:
    if entries[name].size > PICKLE_LIMIT:
        raise CheckpointError(
            f"{file}: {name} has {entries[name].size} bytes, more than in any checkpoint; do not trust the file"
        )
    with open_file(file) as stream:
        stream.seek(entries[name].start)
        return stream.read(entries[name].size)


def _unpickle(raw: bytes, file: Path) -> Any:
    try:
        return _Machine().run(raw)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        fault = error if isinstance(error, ValueError) else "the pickle is damaged"
        raise CheckpointError(f"{file}: the pickle cannot be read: {' '.join(str(fault).split())[:300]}") from None


def _find_state_dict(top: Any, file: Path) -> dict[str, _Tensor]:
    state = top
    if isinstance(top, dict):
        state = next((top[key] for key in STATE_KEYS if isinstance(top.get(key), dict)), top)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{file}: has no state dict (a dict from names to tensors); give the model's checkpoint")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise CheckpointError(f"{file}: {quote(name)} in the state dict is not a tensor; save only tensors")
    return state


def _locate_tensor(name: str, tensor: _Tensor, file: Path, entries: dict[str, ZipEntry], root: str) -> Stored:
    where = f"{file}: tensor {quote(name)}"
    storage, entry = tensor.storage, entries.get(f"{root}data/{tensor.storage.key}")
    if entry is None:
        raise CheckpointError(f"{where}: the file lacks the numbers, entry {quote(storage.key)}; {REMEDY}")
    itemsize = storage.dtype.itemsize
    if storage.count * itemsize > entry.size:
        raise CheckpointError(f"{where}: must have {storage.count * itemsize} bytes, but has {entry.size}; {REMEDY}")
    start, size = entry.start + tensor.offset * itemsize, file.stat().st_size
    plain = Stored(name, file, storage.dtype, tensor.shape, start, size)
    if tensor.strides == row_major_strides(tensor.shape):
        return plain
    return StridedTensor(name, file, storage.dtype, tensor.shape, start, size, tensor.strides)


# --- a checkpoint: written --------------------------------------------------------------------------------------------


def write_torch(
    path: Path, outputs: Sequence[OutputTensor], key: str | None = "model_state_dict", bar: Any = None
) -> None:
    """Write tensors as `torch.save` does, some rows at a time; ``torch.load(path, weights_only=True)`` reads them.

    Parameters
    ----------
    path : Path
        The path of the file, which appears only when complete.
    outputs : sequence of Output
        The tensors.
    key : str, optional
        The key of the state dict inside a dict; by default, the file has the state dict itself.
    bar : tqdm, optional
        Progress bar that counts the written bytes.

    Examples
    --------
    See `read_torch`.
    """
    chunks = {f"archive/data/{number}": iterate_data(output, bar) for number, output in enumerate(outputs)}
    state: dict[str, Iterable[Any]] = {"archive/data.pkl": [_pickle_state(outputs, key)]}
    write_zip(path, state | {"archive/byteorder": [b"little"]} | chunks | {"archive/version": [b"3\n"]})


def _pickle_state(outputs: Sequence[OutputTensor], key: str | None) -> bytes:
    """Return the pickle of a state dict, opcode by opcode, as torch.save writes it."""
    state = _EMPTY_STATE + pickle.MARK
    for number, output in enumerate(outputs):
        state += _encode_text(output.name) + _pickle_tensor(output, str(number))
    state += pickle.SETITEMS
    if key is not None:
        state = pickle.EMPTY_DICT + _encode_text(key) + state + pickle.SETITEM
    return pickle.PROTO + b"\x02" + state + pickle.STOP


def _pickle_tensor(output: OutputTensor, number: str) -> bytes:
    count = int(np.prod(output.shape, dtype=np.int64))
    module, kind = STORAGE_OF[FILE_DTYPES[output.dtype]].split(".")
    key = _encode_text("storage") + _encode_global(module, kind) + _encode_text(number) + _encode_text("cpu")
    storage = pickle.MARK + key + _encode_int(count) + pickle.TUPLE + pickle.BINPERSID
    place = _encode_int(0) + _encode_ints(output.shape) + _encode_ints(row_major_strides(output.shape))
    arguments = pickle.MARK + storage + place + pickle.NEWFALSE + _EMPTY_STATE + pickle.TUPLE
    return _encode_global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _encode_global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


_EMPTY_STATE = _encode_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def _encode_text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _encode_int(number: int) -> bytes:
    if number < 2**31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)


def _encode_ints(numbers: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(_encode_int(number) for number in numbers) + pickle.TUPLE
