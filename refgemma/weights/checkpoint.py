"""Opens a Hugging Face folder of a Gemma 2 and reads it a tensor, a layer or a few rows at a time.

Checked bit for bit against the loader of safetensors 0.8; the rules of a header are those of its format description.
The file is memory-mapped while a tensor is read and let go afterwards, so that a 27B (54 GB in bfloat16) is never
resident; for decoding, which comes back to each tensor at each token, a map is kept. safetensors' own loader copies
each tensor a second time, and its errors name no tensor.
"""

import functools
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.config import Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.precision import Array, as_dtype
from refgemma.weights.initial import fits_in_memory
from refgemma.weights.parameters import (
    EMBED_TOKENS,
    LM_HEAD,
    NORM,
    SCORE_BIAS,
    SCORE_WEIGHT,
    OnDemand,
    Score,
    Weights,
    layer_tensors,
    tensor_shapes,
)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

HEADER_LIMIT = 100_000_000  # bytes: the format's own limit
MAX_AXES = 64  # NumPy's limit
BLOCK = 2**18  # numbers converted at a time: 1 MB of float32, which stays in the processor's cache
LFS_POINTER = b"version https://git-lfs"
SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors")  # a plain file name: no folder, no drive

AGAIN = "write or download the file again"

_SHORT = reprlib.Repr()  # a damaged header can hold anything: quote no more of it than fits on a screen
_SHORT.maxstring = 120


class CheckpointError(RefgemmaError):
    """A checkpoint that cannot be read as a Gemma 2: says which file, which tensor, and what to do about it.

    Examples
    --------
    >>> open_checkpoint("gemma-2-2b")
    Traceback (most recent call last):
    refgemma.weights.checkpoint.CheckpointError: gemma-2-2b: there is no such folder
    """


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Parameters
    ----------
    name : str
        Its name in the file.
    file : Path
        The safetensors file that holds it.
    dtype : numpy.dtype
        float64, float32, float16, or bfloat16 of ml_dtypes.
    shape : tuple of int
        Its shape.
    start : int
        Where its data start in the file, in bytes.
    file_bytes : int
        The length of the file when its header was read.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
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
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _map(self) -> Array:
        return np.memmap(self.file, np.uint8, "r", self.start, (self.nbytes,))

    _kept_map = functools.cached_property(_map)

    def mapped(self, keep: bool = False) -> Array:
        """Map the tensor as it lies in the file: read-only, of the file's dtype, and no part of it read yet.

        With `keep` by the same map each time, as long as this object lives: to map a layer of a 9B anew takes a sixth
        of a decoded token's time. Its pages are the file's own, which the system takes back when memory is short.
        """
        try:
            found = self.file.stat().st_size
            # A file that was cut short under its map would kill the process at the first access, without a message.
            if found != self.file_bytes:
                raise CheckpointError(
                    f"{self.file}: is {found} bytes long and was {self.file_bytes} when it was opened; open it again"
                )
            raw = self._kept_map if keep else self._map()
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name!r} cannot be read: {error.strerror}") from None
        return raw.view(self.dtype, np.ndarray).reshape(self.shape)

    def read(self, dtype: str, rows: Any = ...) -> Array:
        """Copy the tensor, or some of its rows, in one of the four precisions.

        Parameters
        ----------
        dtype : str
            ``float64``, ``float32``, ``float16`` or ``bfloat16``. Rounds to nearest, ties to even; widening is exact.
        rows : slice or array of int, optional
            Which rows; all of them if not given.

        Returns
        -------
        array
            Beside it, the conversion needs a few megabytes and, for an array of rows, these rows as stored.

        Raises
        ------
        CheckpointError
            If a number is NaN or infinite, in the file or once it is rounded to `dtype`.
        """
        part = self.mapped()[rows]
        flat = part.reshape(-1)
        kind = as_dtype(np.zeros(0), dtype)
        out = np.empty(flat.shape, kind.dtype)
        for start in range(0, flat.size, BLOCK):
            block = slice(start, start + BLOCK)
            with np.errstate(over="ignore", invalid="ignore"):  # what these would warn of is an error just below
                # Numbers that are on the grid of `dtype` already need no rounding: four times as fast in bfloat16.
                out[block] = flat[block] if self.dtype.name == dtype else as_dtype(flat[block], dtype)
            finite = np.isfinite(out[block])
            if not finite.all():
                raise self._not_finite(part, rows, start + int(np.argmin(finite)), dtype)
        return out.reshape(part.shape).view(type(kind))

    def _not_finite(self, part: Array, rows: Any, position: int, dtype: str) -> CheckpointError:
        """Make the error for number `position` of `part`, which is what `rows` selects."""
        value, place = float(part.reshape(-1)[position]), np.unravel_index(position, part.shape)
        source = np.arange(self.shape[0])[rows]  # row of the tensor for each row of `part`
        index = [int(axis) for axis in (source[place[: source.ndim]], *place[source.ndim :])]
        where = f"{self.file}: tensor {self.name!r}, index {index}"
        if math.isfinite(value):
            return CheckpointError(f"{where}: {value} is beyond the largest {dtype}; read it in a wider dtype")
        return CheckpointError(
            f"{where}: {value} is no weight; the file is damaged or was written by a training run that diverged"
        )


@dataclass(frozen=True)
class StoredRows:
    """A table on disk whose rows are read, converted and checked when they are asked for.

    Parameters
    ----------
    tensor : Stored
        The table.
    dtype : str
        The precision of the rows handed out; see `Stored.read`.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "one.safetensors"
    ...     save_file({"embed_tokens.weight": np.arange(8, dtype=np.float32).reshape(4, 2)}, file)
    ...     table = StoredRows(read_header(file)["embed_tokens.weight"], "float32")
    ...     print(table.shape, table[2:3], table[np.array([[0, 3]])].shape)
    (4, 2) [[4. 5.]] (1, 2, 2)
    """

    tensor: Stored
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """``(vocab, hidden)``."""
        return self.tensor.shape

    def __getitem__(self, rows: Any, /) -> Array:
        """Read the rows of a slice, or of an array of integers, which gives ``(*rows.shape, hidden)``."""
        if isinstance(rows, tuple):
            raise TypeError("rows on disk are asked for by one slice or one array of integers: cut columns afterwards")
        return self.tensor.read(self.dtype, rows)


def _few(names: Sequence[str]) -> str:
    """Quote the first three names and count the others."""
    shown = ", ".join(_SHORT.repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; of a key that stands twice, Python would silently take the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_SHORT.repr(key)} stands in it twice")
        found[key] = value
    return found


def _json_object(raw: bytes, file: Path, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a key twice, nested without end
        raise CheckpointError(f"{file}: {what} is not valid: {error}; {AGAIN}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: {what} is {_SHORT.repr(parsed)}, not a JSON object; {AGAIN}")
    return parsed


def _refuse_pointer(start: bytes, file: Path) -> None:
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file}: is a Git LFS pointer, a few lines of text in place of the data; fetch these with 'git lfs pull'"
        )


def _header_bytes(file: Path) -> tuple[bytes, int]:
    """Read the JSON text at the start of a safetensors file, and the length of the whole file."""
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
        _refuse_pointer(start, file)
        size, length = file.stat().st_size, int.from_bytes(start[:8], "little")
        if size < 8:
            raise CheckpointError(f"{file}: is {size} bytes long, not even the length of a header; {AGAIN}")
        if length > HEADER_LIMIT:
            raise CheckpointError(
                f"{file}: says that its header is {length} bytes long, over the {HEADER_LIMIT} of the format; "
                "it is no safetensors file, or a damaged one"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{file}: is {size} bytes long, shorter than its header, which needs {8 + length}; {AGAIN}"
            )
        stream.seek(8)
        return stream.read(length), size


def _whole_numbers(value: Any) -> bool:
    """Whether `value` is a list that can be a shape or a pair of offsets; true and 2.0 are no whole numbers."""
    return isinstance(value, list) and len(value) <= MAX_AXES and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _stored(name: str, entry: Any, file: Path, data_start: int, file_bytes: int) -> Stored:
    """One entry of a header, ``{"dtype": "BF16", "shape": [61, 24], "data_offsets": [0, 2928]}``."""
    where = f"{file}: tensor {_SHORT.repr(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: its entry in the header lacks dtype, shape or data_offsets; {AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: its dtype is {_SHORT.repr(dtype)}; {', '.join(DTYPES)} are read here, and a quantised "
            "checkpoint has to be converted to one of them first"
        )
    if not _whole_numbers(shape):
        raise CheckpointError(f"{where}: its shape is {_SHORT.repr(shape)}, not a list of lengths; {AGAIN}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: its data_offsets are {_SHORT.repr(offsets)}, not the first byte and the one after the last; "
            + AGAIN
        )
    tensor = Stored(name, file, DTYPES[dtype], tuple(shape), data_start + offsets[0], file_bytes)
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: shape {_SHORT.repr(shape)} in {dtype} takes {tensor.nbytes} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}; {AGAIN}"
        )
    if data_start + offsets[1] > file_bytes:
        raise CheckpointError(
            f"{where}: its data end at byte {data_start + offsets[1]}, but the file is {file_bytes} bytes long: "
            f"half-written, or a download that was cut short; {AGAIN}"
        )
    return tensor


def _check_layout(tensors: list[Stored], file: Path, data_start: int, file_bytes: int) -> None:
    """Require that the data of the tensors follow each other without a gap and fill the file."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        where = f"{file}: tensor {_SHORT.repr(tensor.name)}"
        if tensor.start != position:
            fault = "overlap those of another tensor" if tensor.start < position else "leave a hole before them"
            raise CheckpointError(
                f"{where}: its data start at byte {tensor.start}, not {position}: they {fault}; {AGAIN}"
            )
        position += tensor.nbytes
    if position < file_bytes:
        raise CheckpointError(f"{file}: {file_bytes - position} bytes at its end belong to no tensor; {AGAIN}")


def read_header(file: Path) -> dict[str, Stored]:
    """Read the header of one safetensors file: its tensors by name, without their data.

    A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON), and the data.

    Raises
    ------
    CheckpointError
        If the file breaks a rule of the format.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"norm.weight": np.zeros(24, np.float32)}, Path(folder) / "one.safetensors")
    ...     read_header(Path(folder) / "one.safetensors")["norm.weight"].shape
    (24,)
    """
    raw, file_bytes = _header_bytes(file)
    header = _json_object(raw, file, "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ is {_SHORT.repr(metadata)}, not an object of strings; {AGAIN}")
    data_start = 8 + len(raw)
    tensors = {name: _stored(name, entry, file, data_start, file_bytes) for name, entry in header.items()}
    _check_layout(list(tensors.values()), file, data_start, file_bytes)
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    """Read the index of a checkpoint in several files: name of a tensor -> file name of its shard."""
    raw = index.read_bytes()
    _refuse_pointer(raw, index)
    weight_map = _json_object(raw, index, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map, the object from tensor names to files; {AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index}: tensor {_SHORT.repr(name)}: its shard is {_SHORT.repr(shard)}, "
                "not the plain name of a .safetensors file beside the index"
            )
    return weight_map


def _read_shards(index: Path) -> dict[str, Stored]:
    """Read the headers of all shards: each tensor is where the index says, and nowhere else."""
    weight_map = _read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    if absent := [shard for shard in shards if not (index.parent / shard).exists()]:
        raise CheckpointError(f"{index}: the folder lacks {_few(absent)} of its {len(shards)} shards; download them")
    found: dict[str, Stored] = {}
    for shard in shards:
        for name, tensor in read_header(index.parent / shard).items():
            if name in found:
                raise CheckpointError(
                    f"{tensor.file}: tensor {_SHORT.repr(name)} is in {found[name].file.name} too; "
                    "one of the two is a leftover of another checkpoint"
                )
            if name not in weight_map:
                raise CheckpointError(
                    f"{tensor.file}: tensor {_SHORT.repr(name)} is not in {index.name}; "
                    "index and shard are of two checkpoints"
                )
            found[name] = tensor
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointError(
                f"{index.parent / shard}: lacks tensor {_SHORT.repr(name)}, which {index.name} places there; "
                "index and shard are of two checkpoints"
            )
    return found


def _read_files(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """Find the file to name in errors about the whole checkpoint, and every tensor in the folder.

    A single file goes before an index, as in transformers.
    """
    if (folder / SINGLE).exists():
        return folder / SINGLE, read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return folder / INDEX, _read_shards(folder / INDEX)
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.startswith("pytorch_model")]:
        raise CheckpointError(
            f"{folder}: holds its weights as {_few(pickles)}, which only PyTorch can read; convert them to "
            "safetensors: load them with transformers and call save_pretrained, which writes model.safetensors"
        )
    if shards := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(
            f"{folder}: holds {_few(shards)}, but neither {SINGLE} nor {INDEX}; "
            "fetch the index, or rename a file that holds the whole model"
        )
    raise CheckpointError(f"{folder}: holds no weights, neither {SINGLE} nor {INDEX}; give the folder that holds them")


def _check_head(head: Stored, table: Stored) -> None:
    """Require that a stored head holds the bytes of the embedding it is tied to: any other is another model's."""
    where = f"{head.file}: tensor {head.name!r}"
    if (head.shape, head.dtype) != (table.shape, table.dtype):
        raise CheckpointError(
            f"{where}: is {head.dtype} {list(head.shape)}, but it is tied to {table.name!r}, "
            f"which is {table.dtype} {list(table.shape)}; leave it out when the model is saved"
        )
    own, tied = head.mapped(), table.mapped()
    step = max(1, BLOCK // head.shape[1])
    for start in range(0, head.shape[0], step):
        rows = slice(start, start + step)
        different = (own[rows].view(np.uint8) != tied[rows].view(np.uint8)).any(axis=1)
        if different.any():
            row = start + int(np.argmax(different))
            raise CheckpointError(
                f"{where}: row {row} differs from that of {table.name!r}, to which Gemma 2's head is tied; "
                "this model's head was trained apart and is not computed here"
            )


def _check_score(score: Mapping[str, Stored], hidden_size: int) -> None:
    """Require a classifier's head to be ``(num_labels, hidden)``, and its bias, if there is one, ``(num_labels,)``."""
    num_labels = score[SCORE_WEIGHT].shape[0] if SCORE_WEIGHT in score and score[SCORE_WEIGHT].shape else 0
    expected = {SCORE_WEIGHT: (num_labels, hidden_size), SCORE_BIAS: (num_labels,)}
    for name, tensor in score.items():
        if tensor.shape != expected[name] or not num_labels:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is {list(tensor.shape)}; with hidden_size {hidden_size}, "
                f"{SCORE_WEIGHT} has to be [num_labels, {hidden_size}] and {SCORE_BIAS}, if there is one, [num_labels]"
            )


def _matched(found: Mapping[str, Stored], config: Gemma2Config, source: Path) -> dict[str, Stored]:
    """Give the tensors the names and order of `tensor_shapes`; those of a classifier's head come last."""
    expected = tensor_shapes(config)
    named: dict[str, Stored] = {}
    bare = EMBED_TOKENS not in found
    for name, tensor in found.items():
        full = f"model.{name}" if f"model.{name}" in expected else name  # saved from a bare Gemma2Model
        if full in named:
            raise CheckpointError(f"{tensor.file}: tensor {name!r} is stored as {named[full].name!r} too; remove one")
        named[full] = tensor
    head = named.pop(LM_HEAD, None) if config.tie_word_embeddings else None
    if LM_HEAD in expected and LM_HEAD not in named and (bare or SCORE_WEIGHT in named):
        del expected[LM_HEAD]  # only a causal language model has one
    score = {name: named.pop(name) for name in (SCORE_WEIGHT, SCORE_BIAS) if name in named}
    missing, extra = [name for name in expected if name not in named], [name for name in named if name not in expected]
    if missing or extra:
        faults = [f"lacks {len(missing)} of {len(expected)} tensors: {_few(missing)}"] if missing else []
        faults += [f"holds {len(extra)} that Gemma 2 has no place for: {_few(extra)}"] if extra else []
        raise CheckpointError(
            f"{source}: {'; '.join(faults)}. The checkpoint is incomplete, or not the one that {CONFIG} "
            f"({config.num_hidden_layers} layers) describes: fetch both again"
        )
    for name, shape in expected.items():
        if named[name].shape != shape:
            raise CheckpointError(
                f"{named[name].file}: tensor {named[name].name!r} is {list(named[name].shape)}, but {CONFIG} makes it "
                f"{list(shape)}; the weights and the configuration are of two models"
            )
    if head is not None:
        _check_head(head, named[EMBED_TOKENS])
    _check_score(score, config.hidden_size)
    return {name: named[name] for name in expected} | score


@dataclass(frozen=True)
class Checkpoint:
    """A Gemma 2 on disk, headers read and checked, data not; made by `open_checkpoint`.

    Parameters
    ----------
    folder : Path
        The folder.
    config : Gemma2Config
        Its ``config.json``.
    tensors : mapping of str to Stored
        Every tensor of `tensor_shapes`, under that name also if the file leaves out ``model.``; then ``score.weight``
        and ``score.bias`` of a classifier. A stored ``lm_head.weight`` that is tied is the embedding once more and is
        not listed.

    Examples
    --------
    See `open_checkpoint`.
    """

    folder: Path
    config: Gemma2Config
    tensors: Mapping[str, Stored] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """How many numbers `tensors` hold."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def score(self, dtype: str = "float32") -> Score | None:
        """Read the head of a classifier, if there is one."""
        if SCORE_WEIGHT not in self.tensors:
            return None
        bias = self.tensors[SCORE_BIAS].read(dtype) if SCORE_BIAS in self.tensors else None
        return Score(self.tensors[SCORE_WEIGHT].read(dtype), bias)

    def weights(self, dtype: str = "float32") -> Weights:
        """`resident`, or `streamed` if that would take more than 4 GiB."""
        return self.resident(dtype) if fits_in_memory(self.parameters, dtype) else self.streamed(dtype)

    def resident(self, dtype: str = "float32") -> Weights:
        """Read all weights into memory; see `Stored.read` for `dtype` and errors."""
        streamed = self.streamed(dtype)
        head = None if streamed.lm_head is None else streamed.lm_head[:]
        return Weights(streamed.embed_tokens[:], list(streamed.layers), streamed.norm, head)

    def streamed(self, dtype: str = "float32") -> Weights:
        """Give the same weights, but read each block and each row of the embedding when it is asked for, and keep none.

        The numbers are those of `resident`, bit for bit. A NaN in the file is met when its block or row is read. What
        `refgemma.fast` decodes with stays mapped, which a system counts as the process's memory and can take back.
        """

        def tensor(name: str) -> StoredRows:
            return StoredRows(self.tensors[name], dtype)

        bias = layer_tensors(0, bias=True)["q_proj_bias"] in self.tensors
        layers = OnDemand(tensor, range(self.config.num_hidden_layers), bias)
        head = tensor(LM_HEAD) if LM_HEAD in self.tensors else None
        return Weights(tensor(EMBED_TOKENS), layers, tensor(NORM)[:], head)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a folder with ``config.json`` and ``model.safetensors``, or with an index and its shards.

    Reads the headers only and checks what can be checked from them: that files, index and configuration agree, and
    that each file is complete. (Only a stored ``lm_head.weight`` is compared with the embedding here and now.)

    Parameters
    ----------
    folder : str or Path
        As downloaded from the Hugging Face hub, or as ``save_pretrained`` writes it.

    Raises
    ------
    CheckpointError
        For anything wrong with the files: names the file, the tensor and what to do.
    ConfigError
        For a ``config.json`` that is not a Gemma 2's.

    Examples
    --------
    >>> import json, tempfile
    >>> from safetensors.numpy import save_file
    >>> config = Gemma2Config(vocab_size=61, hidden_size=24, intermediate_size=56, num_hidden_layers=2,
    ...                       num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    >>> weights = {name: np.full(shape, 0.1, np.float16) for name, shape in tensor_shapes(config).items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "config.json").write_text(json.dumps(config.to_dict()))
    ...     save_file(weights, Path(folder) / "model.safetensors")
    ...     checkpoint = open_checkpoint(folder)
    ...     resident, streamed = checkpoint.resident(), checkpoint.streamed()
    ...     block = streamed.layers[1]  # read now
    >>> checkpoint.parameters, checkpoint.nbytes, block.q_proj.shape
    (15504, 31008, (40, 24))
    """
    folder = Path(folder)
    if not folder.is_dir():
        fault = "is a file; give the folder that holds it" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder}: {fault}")
    for path in (folder / name for name in (CONFIG, SINGLE, INDEX)):
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading it might wait for ever
            raise CheckpointError(f"{path}: is a pipe or a device, not a file")
    try:
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{folder}: holds no {CONFIG}; give the folder of a Hugging Face checkpoint")
        config = Gemma2Config.from_json_file(folder / CONFIG)
        source, found = _read_files(folder)
        return Checkpoint(folder, config, _matched(found, config, source))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
