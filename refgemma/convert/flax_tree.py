"""Read and write Gemma 2's Flax parameter tree in flat files: .npz or .safetensors, with paths joined by "/" as names.

The names are those of google-deepmind/gemma and of the released Orbax folders, which `refgemma.convert.orbax` reads.
One tensor is read at a time. In a .npz, bfloat16 numbers are two-byte voids, as NumPy writes them. Like a file of
`torch.save`, a .npz is a zip file with uncompressed entries.
"""

import ast
import io
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from refgemma.convert.orbax import is_orbax, read_orbax
from refgemma.files import new_file, open_file, quote
from refgemma.precision import Array
from refgemma.weights.checkpoint import (
    INDEX,
    REMEDY,
    SINGLE,
    CheckpointError,
    Stored,
    read_files,
    read_header,
)
from refgemma.weights.save import FILE_DTYPES, OutputTensor

# Dtypes in a header of numpy.save. NumPy does not know bfloat16 and writes two-byte voids.
DESCRS = {"<f8": FILE_DTYPES["float64"], "<f4": FILE_DTYPES["float32"], "<f2": FILE_DTYPES["float16"]}
DESCRS |= dict.fromkeys(("|V2", "<V2"), FILE_DTYPES["bfloat16"])
HEADER_LIMIT = 2**16  # bytes
WITH_W = ("gating_einsum", "linear")  # releases have "w" as a level of its own, the model's code does not
ALIGNMENT = 64  # alignment in bytes of a tensor's numbers in a zip file, as in torch.save


# --- zip files with uncompressed entries ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZipEntry:
    """The position of an entry's bytes in its zip file."""

    start: int
    size: int


def read_zip_entries(file: Path) -> dict[str, ZipEntry]:
    """Return the position of every entry in a zip file, by name; no entry may be compressed.

    Raises
    ------
    CheckpointError
        If the file is not such a zip file.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(Path(folder) / "two.npz", a=np.zeros(2), b=np.zeros(3))
    ...     list(read_zip_entries(Path(folder) / "two.npz"))
    ['a.npy', 'b.npy']
    """
    try:
        with open_file(file) as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            found = {info.filename: _locate_entry(stream, info, file) for info in infos}
            if len(found) != len(infos):
                raise CheckpointError(f"{file}: two entries have the same name; {REMEDY}")
            return found
    except CheckpointError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise CheckpointError(f"{file}: is not a complete zip file: {error.strerror}; {REMEDY}") from None
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file}: is not a complete zip file: {error}; {REMEDY}") from None


def _locate_entry(stream: IO[bytes], info: zipfile.ZipInfo, file: Path) -> ZipEntry:
    where = f"{file}: entry {quote(info.filename)}"
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(
            f"{where}: is compressed (as by TorchScript or numpy.savez_compressed) or encrypted; write the tensors "
            "with torch.save or numpy.savez"
        )
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{where}: does not begin where the zip file's directory says; {REMEDY}")
    name, extra = struct.unpack("<26xHH", header)
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > file.stat().st_size:
        raise CheckpointError(f"{where}: would end beyond the end of the file, which is truncated; {REMEDY}")
    return ZipEntry(start, info.file_size)


def add_entry(archive: zipfile.ZipFile, stream: IO[bytes], name: str, chunks: Iterable[Any]) -> None:
    """Add an aligned entry, chunk by chunk, to a zip file that is written to `stream`."""
    info = zipfile.ZipInfo(name)
    begin = stream.tell() + 30 + len(name.encode()) + 20 + 4  # header, name, 64-bit sizes, header of the padding
    padding = -begin % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as entry:
        for chunk in chunks:
            entry.write(chunk)


def iterate_data(output: OutputTensor, bar: Any = None) -> Iterator[Any]:
    """Yield the bytes of a tensor, some rows at a time."""
    for block in output.blocks():
        yield block.reshape(-1).view(np.uint8).data
        if bar is not None:
            bar.update(block.nbytes)


def write_zip(path: Path, entries: dict[str, Iterable[Any]]) -> None:
    """Write a zip file, given the entries in chunks; it gets its name only after all data is on the disk."""
    with new_file(path) as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            for name, chunks in entries.items():
                add_entry(archive, stream, name, chunks)
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class StridedTensor(Stored):
    """A tensor on disk that is not contiguous."""

    strides: tuple[int, ...]

    def map(self, keep: bool = False) -> Array:
        """Map the tensor again at each call; see `Stored.map`."""
        if not all(self.shape):
            return np.zeros(self.shape, self.dtype)
        span = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        flat = Stored(self.name, self.file, self.dtype, (span,), self.start, self.file_bytes).map()
        steps = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in numbers, of a contiguous array of `shape`.

    Examples
    --------
    >>> row_major_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- the tree ---------------------------------------------------------------------------------------------------------


def tidy(name: str) -> str:
    """Return a name in the spelling of the releases, which refgemma uses.

    Examples
    --------
    >>> tidy("transformer.layer_0.mlp.linear"), tidy("params/transformer/final_norm/scale")
    ('transformer/layer_0/mlp/linear/w', 'transformer/final_norm/scale')
    """
    path = name.replace(".", "/").removeprefix("params/")
    path = path if path.startswith("transformer/") else f"transformer/{path}"
    return f"{path}/w" if path.rsplit("/", 1)[-1] in WITH_W else path


def read_tree(source: Path) -> dict[str, Stored]:
    """Read names, shapes and positions of the tensors of a flat Flax tree; the numbers are read when accessed.

    Parameters
    ----------
    source : Path
        A ``.npz`` or ``.safetensors`` file, or a folder with one ``.npz``, or with ``model.safetensors`` or its shards.

    Raises
    ------
    CheckpointError
        If the file is damaged, or is not such a tree.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tree = {"transformer/final_norm/scale": np.ones(3, np.float32)}
    ...     np.savez(Path(folder) / "params.npz", **tree)
    ...     read_tree(Path(folder) / "params.npz")["transformer/final_norm/scale"].read("float32")
    array([1., 1., 1.], dtype=float32)
    """
    found: dict[str, Stored] = {}
    for name, tensor in _read_source(source).items():
        if tidy(name) in found:
            raise CheckpointError(f"{tensor.file}: has {quote(tidy(name))} twice, in two spellings; remove one")
        found[tidy(name)] = tensor
    return found


def _read_source(source: Path) -> dict[str, Stored]:
    if source.is_file():
        return read_npz(source) if source.suffix == ".npz" else read_header(source)
    if any((source / name).exists() for name in (SINGLE, INDEX)):
        return read_files(source)[1]
    files = sorted(source.glob("*.npz"))
    if len(files) == 1:
        return read_npz(files[0])
    if is_orbax(source):
        return read_orbax(source)
    raise CheckpointError(f"{source}: has {len(files)} .npz files and no {SINGLE}; give the file with the tree")


def read_npz(file: Path) -> dict[str, Stored]:
    """Read names, shapes and positions of the arrays in an uncompressed ``.npz``, as from `numpy.savez`.

    Examples
    --------
    See `read_tree`.
    """
    found = {}
    for entry_name, entry in read_zip_entries(file).items():
        name = entry_name.removesuffix(".npy")
        where = f"{file}: array {quote(name)}"
        try:
            found[name] = _read_array(name, file, entry)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"{where}: cannot be read: {' '.join(str(error).split())[:200]}; {REMEDY}") from None
    return found


def _read_array(name: str, file: Path, entry: ZipEntry) -> Stored:
    with open_file(file) as stream:
        stream.seek(entry.start)
        raw = stream.read(min(entry.size, HEADER_LIMIT))
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(raw[:8])
    if width is None:
        raise ValueError("it lacks the header of numpy.save")
    length = 8 + width + int.from_bytes(raw[8 : 8 + width], "little")
    header = ast.literal_eval(raw[8 + width : length].decode("latin-1").strip())
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header lacks descr, fortran_order or shape")
    shape, dtype = header["shape"], DESCRS.get(str(header["descr"])[:20])
    if dtype is None:
        raise ValueError(f"its dtype is {quote(header['descr'])}; it must be one of {', '.join(FILE_DTYPES)}")
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise ValueError(f"its shape is {quote(shape)}")
    tensor = Stored(name, file, dtype, shape, entry.start + length, file.stat().st_size)
    if tensor.nbytes != entry.size - length:
        raise ValueError(f"shape {shape} takes {tensor.nbytes} bytes, but it has {entry.size - length}")
    if header["fortran_order"] and len(shape) > 1:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
        return StridedTensor(name, file, dtype, shape, tensor.start, tensor.file_bytes, strides)
    return tensor


def write_npz(path: Path, outputs: Sequence[OutputTensor], bar: Any = None) -> None:
    """Write tensors as `numpy.savez` does, some rows at a time.

    Parameters
    ----------
    path : Path
        The path of the file, which appears only when complete.
    outputs : sequence of Output
        The tensors.
    bar : tqdm, optional
        Progress bar that counts the written bytes.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_npz(Path(folder) / "one.npz", [OutputTensor("final_norm/scale", "float32", (2,), np.ones(2))])
    ...     np.load(Path(folder) / "one.npz")["final_norm/scale"]
    array([1., 1.], dtype=float32)
    """
    write_zip(path, {f"{output.name}.npy": _encode_npy(output, bar) for output in outputs})


def _encode_npy(output: OutputTensor, bar: Any) -> Any:
    header = io.BytesIO()
    descr = npy.dtype_to_descr(np.dtype("V2") if output.dtype == "bfloat16" else FILE_DTYPES[output.dtype])
    npy.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": output.shape})
    yield header.getvalue()
    yield from iterate_data(output, bar)
