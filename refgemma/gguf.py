"""Read the header of a GGUF file: metadata and the positions of the tensors.

Checked against files that gguf 0.19 writes and llama.cpp reads, and by fuzzing. The gguf library's own reader makes an
object for every piece of the vocabulary, which takes seconds and a gigabyte. It also trusts the counts and offsets in
the file. This reader checks each count and offset against the length of the file.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.errors import RefgemmaError
from refgemma.files import LFS_POINTER, one_line, open_file, quote, refuse_pointer

VERSIONS = (2, 3)
REMEDY = "download or write it again"
METADATA_LIMIT = 2**26  # bytes; the header of a Gemma 2 has 6 to 20 MB, almost all of it the vocabulary
ENTRIES_LIMIT = 2**17  # keys, or tensors: a 27B has 508
TEXTS_LIMIT = 2**20  # texts in a list: Gemma 2 has 256,000 pieces
AXES = 4  # the maximum in ggml
PARTS_LIMIT = 999  # files of one model, named like model-00001-of-00003.gguf
PART_NAME = re.compile(r"(.*-)(\d{5})(-of-\d{5}\.gguf)")

# GGUF's number for a value type -> the type's letter in `struct`. Strings and arrays are read separately.
LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# GGUF's number for a tensor format -> its name, and how many numbers and bytes a block has.
FORMATS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
}  # fmt: skip


# Field of the configuration -> its key, and llama.cpp's default for a missing key.
SIZES: dict[str, tuple[str, int | None]] = {
    "hidden_size": ("embedding_length", None), "num_hidden_layers": ("block_count", None),
    "intermediate_size": ("feed_forward_length", None), "num_attention_heads": ("attention.head_count", None),
    "max_position_embeddings": ("context_length", None), "sliding_window": ("attention.sliding_window", 4096),
}  # fmt: skip
NUMBERS: dict[str, tuple[str, float | None]] = {
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", None), "rope_theta": ("rope.freq_base", 10000.0),
    "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
    "final_logit_softcapping": ("final_logit_softcapping", 30.0),
}  # fmt: skip
IDS = {f"{role}_token_id": f"tokenizer.ggml.{key}_token_id" for role, key in zip(
    ("bos", "eos", "pad"), ("bos", "eos", "padding"), strict=True)}  # fmt: skip
LAYERS_27B = 46  # llama.cpp recognises the 27B, whose query scalar differs from head_dim, by this number


@dataclass(frozen=True)
class GgufTensor:
    """One tensor in the header: its format, its shape with rows first, the position of its first byte, and its length.

    If the model is in several files, `path` and `file_bytes` describe the file with this tensor.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path | None = None
    file_bytes: int = 0


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file; `read_gguf` makes it."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    file_bytes: int


class _Cursor:
    """Read values one after another from the beginning of a file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.content):
            limit = " (or has a header above 64 MiB)" if len(self.content) == METADATA_LIMIT else ""
            raise RefgemmaError(f"is too short: the data at byte {start} would extend beyond the file's end{limit}")
        return self.content[start : self.at]

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        at = self.at
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise RefgemmaError(f"has text at byte {at} that is not UTF-8") from None

    def texts(self, count: int) -> list[str]:
        """Return the next `count` texts in one call; a call for each text would double the time of reading a file."""
        content, at, found, length = self.content, self.at, [], struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + length(content, at)[0]
                found.append(content[start:at].decode())
        except struct.error:
            at = len(content) + 1
        except UnicodeDecodeError:
            raise RefgemmaError(f"has text at byte {start} that is not UTF-8") from None
        self.take(at - self.at)
        return found

    def value(self, kind: int) -> Any:
        """Return a value of type `kind`: a number, a text, an array of numbers or a list of texts."""
        if kind in LETTERS:
            return self.number(LETTERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise RefgemmaError(f"has a value of the unknown type {kind} at byte {self.at}")
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING and count <= TEXTS_LIMIT:
            return self.texts(count)
        if kind in LETTERS:
            item = np.dtype("<" + LETTERS[kind])
            return np.frombuffer(self.take(count * item.itemsize), item)
        raise RefgemmaError(f"has an array of {count} values of type {kind} at byte {self.at}, which no Gemma 2 has")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata:
            raise RefgemmaError(f"has the duplicate key {quote(key)}")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """Read one tensor's entry in the header; its `start` is relative to the first byte of all tensor data."""
    name, axes = cursor.text(), cursor.number("I")
    if not 1 <= axes <= AXES:
        raise RefgemmaError(f"has {axes} axes for tensor {quote(name)}; 1 to {AXES} are allowed")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    code, start = cursor.number("I"), cursor.number("Q")
    if code not in FORMATS:
        known = ", ".join(kind for kind, _, _ in FORMATS.values())
        raise RefgemmaError(f"has tensor {quote(name)} in format {code}; refgemma reads {known}")
    kind, numbers, nbytes = FORMATS[code]
    if shape[-1] % numbers:
        raise RefgemmaError(f"has rows of {shape[-1]} in tensor {quote(name)}; {kind} needs a multiple of {numbers}")
    return GgufTensor(name, kind, shape, start, math.prod(shape) // numbers * nbytes)


def _place_tensors(tensors: Iterable[GgufTensor], first: int, alignment: int, file_bytes: int) -> Iterator[GgufTensor]:
    """Check that each tensor begins where the previous tensor ends, as in ggml, and lies inside the file."""
    expected = 0
    for tensor in tensors:
        where = f"tensor {quote(tensor.name)}"
        if tensor.start != expected:
            raise RefgemmaError(
                f"has {where} at offset {tensor.start}; it must be {expected}, where the previous tensor ends"
            )
        if first + tensor.start + tensor.nbytes > file_bytes:
            raise RefgemmaError(f"is {file_bytes} bytes long, but its {where} would end later")
        expected += -(-tensor.nbytes // alignment) * alignment
        yield replace(tensor, start=first + tensor.start)


def _parse(path: Path, cursor: _Cursor, file_bytes: int) -> Gguf:
    refuse_pointer(cursor.content[: len(LFS_POINTER)])
    if cursor.take(4) != b"GGUF":
        raise RefgemmaError("does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise RefgemmaError(f"has version {version} of the format, or another byte order; refgemma reads 2 and 3")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if max(tensors, keys) > ENTRIES_LIMIT:
        raise RefgemmaError(f"claims to have {tensors} tensors and {keys} keys; the limit is {ENTRIES_LIMIT} for each")
    metadata = _read_metadata(cursor, keys)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise RefgemmaError(f"has general.alignment {quote(alignment)}; it must be a power of two")
    listed = [_read_tensor(cursor) for _ in range(tensors)]
    first = -(-cursor.at // alignment) * alignment
    found = {tensor.name: tensor for tensor in _place_tensors(listed, first, alignment, file_bytes)}
    if len(found) < len(listed):
        raise RefgemmaError("has two tensors of the same name")
    return Gguf(path, metadata, found, file_bytes)


def read_gguf(path: str | Path, error: type[RefgemmaError]) -> Gguf:
    """Read the header of a GGUF file: metadata and the positions of the tensors, without their numbers.

    Parameters
    ----------
    path : str or Path
        The file, or the first of a model's several files.
    error : type
        The exception to raise.

    Raises
    ------
    error
        If the file cannot be read, is truncated, or contradicts its header; the message is one line with the file's
        name.

    Examples
    --------
    >>> read_gguf("model.gguf", RefgemmaError)
    Traceback (most recent call last):
    refgemma.errors.RefgemmaError: model.gguf: cannot be read: No such file or directory
    """
    first = _read_part(Path(path), error)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return first
    with one_line(path, error, ""):
        return _join_parts(first, count, error)


def _read_part(path: Path, error: type[RefgemmaError]) -> Gguf:
    with one_line(path, error, REMEDY), open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:
            raise RefgemmaError("is empty")
        with mmap.mmap(stream.fileno(), min(size, METADATA_LIMIT), access=mmap.ACCESS_READ) as content:
            return _parse(path, _Cursor(content), size)


def _join_parts(first: Gguf, count: Any, error: type[RefgemmaError]) -> Gguf:
    """Return the header of a model in several numbered files of one folder."""
    name = PART_NAME.fullmatch(first.path.name)
    if name is None or type(count) is not int or not 1 < count <= PARTS_LIMIT:
        raise RefgemmaError(
            f"is one of {quote(count)} parts of a model; rename the parts like model-00001-of-00003.gguf"
        )
    paths = [first.path.with_name(f"{name[1]}{number:05}{name[3]}") for number in range(1, count + 1)]
    if first.metadata.get("split.no", 0) != 0 or first.path != paths[0]:
        raise RefgemmaError(f"is one of {count} parts of a model; give the first, {paths[0].name}")
    if absent := [path.name for path in paths if not path.exists()]:
        raise RefgemmaError(f"is one of {count} parts of a model; {quote(absent[0])} is missing; download all parts")
    tensors: dict[str, GgufTensor] = {}
    for number, path in enumerate(paths):
        part = _read_part(path, error) if number else first
        if (part.metadata.get("split.no", 0), part.metadata.get("split.count")) != (number, count):
            raise RefgemmaError(f"and {path.name} are not parts of the same model; download all parts again")
        if twice := tensors.keys() & part.tensors.keys():
            raise RefgemmaError(f"has tensor {quote(min(twice))} in two parts")
        tensors |= {
            name: replace(tensor, path=path, file_bytes=part.file_bytes) for name, tensor in part.tensors.items()
        }
    return replace(first, tensors=tensors)


# --- from metadata to the configuration -------------------------------------------------------------------------------


def _read_number(metadata: Mapping[str, Any], key: str, default: float | None) -> Any:
    """Return a number; if the value is a list with a number for each layer, these must be equal."""
    value = metadata.get(key, default)
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        value = value[0].item()
    if type(value) not in (int, float):
        raise RefgemmaError(f"{key} is {quote(value)}; it must be one number for all layers")
    # Undo the rounding to float32: 1e-06, not 9.999999974752427e-07.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_numbers(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if metadata.get("general.architecture") != "gemma2" or metadata.get("general.type", "model") != "model":
        what = f"{metadata.get('general.architecture')!r} of type {metadata.get('general.type', 'model')!r}"
        raise RefgemmaError(f"is a {what[:200]}, not a model of architecture 'gemma2'")
    fields = {
        field: _read_number(metadata, f"gemma2.{key}", default) for field, (key, default) in (SIZES | NUMBERS).items()
    }
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    fields["num_key_value_heads"] = _read_number(metadata, "gemma2.attention.head_count_kv", heads)
    share = fields["hidden_size"] // max(heads, 1)
    width = fields["head_dim"] = _read_number(metadata, "gemma2.attention.key_length", share)
    # The file does not contain the query scalar; this is llama.cpp's rule for it.
    fields["query_pre_attn_scalar"] = share if layers == LAYERS_27B else width
    for key, expected in (
        ("attention.value_length", width),
        ("rope.dimension_count", width),
        ("rope.scaling.factor", 1),
    ):
        if metadata.get(f"gemma2.{key}", expected) != expected:
            raise RefgemmaError(
                f"gemma2.{key} is {quote(metadata[f'gemma2.{key}'])}; it must be {expected}, as in Gemma 2"
            )
    return fields


def config_fields(file: Gguf, error: type[RefgemmaError]) -> dict[str, Any]:
    """Return the fields of the configuration from the metadata, with llama.cpp's defaults for missing keys.

    No key gives the query scalar. As in llama.cpp, it is ``hidden_size // num_attention_heads`` for a model of 46
    layers, and ``head_dim`` for any other.

    Raises
    ------
    error
        If the file is not a Gemma 2, or has a setting that Gemma 2 does not have.
    """
    with one_line(file.path, error, ""):
        fields = _read_numbers(file.metadata)
        table = file.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise RefgemmaError("lacks the matrix token_embd.weight, the embedding")
        ids = {field: file.metadata[key] for field, key in IDS.items() if key in file.metadata}
        return fields | ids | {"model_type": "gemma2", "vocab_size": table.shape[0], "dtype": "float32"}
