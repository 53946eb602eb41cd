"""The Flax parameter tree of Gemma 2 in flat files: a .npz or .safetensors whose names are paths, joined with "/".

The names are those of google-deepmind/gemma and of the released Orbax checkpoints; a released tree becomes such a file
with `numpy.savez`. Read a tensor at a time; bfloat16 in a .npz are the two-byte voids that NumPy makes of them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from refgemma.weights.checkpoint import (
    _SHORT,
    AGAIN,
    INDEX,
    SINGLE,
    CheckpointError,
    Stored,
    _read_files,
    read_header,
)
from refgemma.weights.pickles import Entry, Strided, data_of, write_zip, zip_entries
from refgemma.weights.writer import STORED, Output

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ORBAX = ("_METADATA", "checkpoint", "manifest.ocdbt", "ocdbt.process_0", "_CHECKPOINT_METADATA")
WITH_W = ("gating_einsum", "linear")  # w of the feed-forward layer: a level of its own in releases, not in the model


def tidy(name: str) -> str:
    """The one name, of several ways to write it, that is used here: the released one.

    Examples
    --------
    >>> tidy("transformer.layer_0.mlp.linear"), tidy("params/transformer/final_norm/scale")
    ('transformer/layer_0/mlp/linear/w', 'transformer/final_norm/scale')
    """
    path = name.replace(".", "/").removeprefix("params/")
    path = path if path.startswith("transformer/") else f"transformer/{path}"
    return f"{path}/w" if path.rsplit("/", 1)[-1] in WITH_W else path


def read_tree(source: Path) -> dict[str, Stored]:
    """Read names, shapes and places of the tensors of a flat Flax tree; the numbers are read when asked for.

    Parameters
    ----------
    source : Path
        A ``.npz`` or ``.safetensors`` file, or a folder with one ``.npz``, or with ``model.safetensors`` or its shards.

    Raises
    ------
    CheckpointError
        If it is damaged, or no such tree.

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
    for name, tensor in _read(source).items():
        if tidy(name) in found:
            raise CheckpointError(f"{tensor.file}: {_SHORT.repr(tidy(name))} stands in it twice, in two spellings")
        found[tidy(name)] = tensor
    return found


def _read(source: Path) -> dict[str, Stored]:
    if source.is_file():
        return read_npz(source) if source.suffix == ".npz" else read_header(source)
    if any((source / name).exists() for name in (SINGLE, INDEX)):
        return _read_files(source)[1]
    files = sorted(source.glob("*.npz"))
    if len(files) == 1:
        return read_npz(files[0])
    if any((source / name).exists() for name in ORBAX):
        raise CheckpointError(
            f"{source}: is an Orbax folder, which JAX reads; restore it there, flatten the tree to names joined with "
            "'/', write it with numpy.savez, and convert that file"
        )
    raise CheckpointError(f"{source}: holds {len(files)} .npz files and no {SINGLE}; give the one file of the tree")


def read_npz(file: Path) -> dict[str, Stored]:
    """Read names, shapes and places of the arrays of a ``.npz`` that `numpy.savez` wrote, not compressed.

    Examples
    --------
    See `read_tree`.
    """
    found = {}
    for entry_name, entry in zip_entries(file).items():
        name = entry_name.removesuffix(".npy")
        where = f"{file}: array {_SHORT.repr(name)}"
        try:
            found[name] = _array(name, file, entry)
        except CheckpointError:
            raise
        except (ValueError, EOFError) as error:
            raise CheckpointError(f"{where}: has no valid header: {' '.join(str(error).split())[:200]}") from None
    return found


def _array(name: str, file: Path, entry: Entry) -> Stored:
    with file.open("rb") as stream:
        stream.seek(entry.start)
        start = io.BytesIO(stream.read(min(entry.size, 2**16)))
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(start))
    if read is None:
        raise ValueError("it is of a version of the format that is not known here")
    shape, fortran, dtype = read(start)
    dtype = BFLOAT16 if dtype in (np.dtype("V2"), BFLOAT16) else dtype
    tensor = Stored(name, file, dtype, shape, entry.start + start.tell(), file.stat().st_size)
    if dtype not in STORED.values() or not dtype.isnative:
        raise ValueError(f"its numbers are {dtype}, not {', '.join(STORED)}")
    if tensor.nbytes != entry.size - start.tell():
        raise ValueError(f"shape {shape} takes {tensor.nbytes} bytes, but it has {entry.size - start.tell()}; {AGAIN}")
    if fortran and len(shape) > 1:
        strides = tuple(int(np.prod(shape[:axis], dtype=np.int64)) for axis in range(len(shape)))
        return Strided(name, file, dtype, shape, tensor.start, tensor.file_bytes, strides)
    return tensor


def write_npz(path: Path, outputs: Sequence[Output], bar: Any = None) -> None:
    """Write tensors as `numpy.savez` does, some rows at a time.

    Parameters
    ----------
    path : Path
        Appears under this name when it is whole.
    outputs : sequence of Output
        The tensors.
    bar : tqdm, optional
        Is told of the bytes written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_npz(Path(folder) / "one.npz", [Output("final_norm/scale", "float32", (2,), np.ones(2))])
    ...     np.load(Path(folder) / "one.npz")["final_norm/scale"]
    array([1., 1.], dtype=float32)
    """
    write_zip(path, {f"{output.name}.npy": _npy(output, bar) for output in outputs})


def _npy(output: Output, bar: Any) -> Any:
    header = io.BytesIO()
    descr = npy.dtype_to_descr(np.dtype("V2") if output.dtype == "bfloat16" else STORED[output.dtype])
    npy.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": output.shape})
    yield header.getvalue()
    yield from data_of(output, bar)
