"""Write a Hugging Face folder a few rows at a time: safetensors, in one file or in shards with an index.

Checked by reading back with the loaders of safetensors 0.8 and transformers 5.23, bit for bit.

All files are written into a staging folder inside the target folder. When complete, they are moved into place, the
index last. So a checkpoint is never half-written, and a restarted run finds the finished files in the staging folder. A
run that can be continued also reads all files back and compares them before the move.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refgemma.errors import RefgemmaError
from refgemma.files import lock_folder, new_file, open_file, replace_file
from refgemma.precision import Array, as_dtype
from refgemma.weights.checkpoint import DTYPE_OF_CODE, INDEX, SINGLE, CheckpointError, Stored, read_header

STAGING = ".refgemma-partial"
STATE = "state.json"
BLOCK_BYTES = 2**24  # bytes written at once
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# A layer's modules in the order in which torch registers them; the released shards have this order.
MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm",
    "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
IN_LAYER = re.compile(rf"(?:model\.)?layers\.(\d+)\.(?:self_attn\.|mlp\.)?({'|'.join(MODULES)})\.(?:weight|bias)")

# Name of a precision -> dtype in a file.
FILE_DTYPES: dict[str, np.dtype[Any]] = {dtype.name: dtype for dtype in DTYPE_OF_CODE.values()}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: `rows` is an array, or an object that returns an array when sliced."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Any

    @property
    def nbytes(self) -> int:
        """Bytes of its data in the file."""
        return math.prod(self.shape) * FILE_DTYPES[self.dtype].itemsize

    def blocks(self) -> Iterator[Array]:
        """Yield the data in the format of the file, some rows at a time."""
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            block = self.rows[start : start + step]
            yield np.ascontiguousarray(as_stored(block, self.dtype))


def as_stored(x: Array, dtype: str) -> Array:
    """Return `x` in a file's format: a half-precision number takes two bytes in a file, but four in computations.

    Examples
    --------
    >>> as_stored(np.array([0.1]), "bfloat16")
    array([0.100098], dtype=bfloat16)
    """
    if x.dtype == FILE_DTYPES[dtype]:
        return x.view(np.ndarray)
    return np.asarray(as_dtype(x, dtype)).astype(FILE_DTYPES[dtype])


def parse_size(size: int | str) -> int:
    """Return a size in bytes, given as a number or as text: ``"5GB"`` (1 GB is 1e9 bytes) or ``"5GiB"`` (2**30).

    Examples
    --------
    >>> parse_size("5GB"), parse_size("200MiB")
    (5000000000, 209715200)
    """
    match = re.fullmatch(r"(\d{1,18})\s*([KMGT]?I?B?)", str(size).strip().upper())
    if isinstance(size, bool) or not match or match[2] not in SIZE_UNITS or int(match[1]) == 0:
        raise CheckpointError(f"max_shard_size is {size!r}; it must be a number of bytes or a size such as 5GB")
    return int(match[1]) * SIZE_UNITS[match[2]]


def split_into_shards(outputs: Sequence[OutputTensor], limit: int) -> dict[str, list[OutputTensor]]:
    """Return the tensors of each file, in order; a file exceeds `limit` bytes only if its single tensor does.

    Examples
    --------
    >>> outputs = [OutputTensor(name, "float32", (2, 4), None) for name in "abc"]
    >>> [(file, [o.name for o in part]) for file, part in split_into_shards(outputs, 64).items()]
    [('model-00001-of-00002.safetensors', ['a', 'b']), ('model-00002-of-00002.safetensors', ['c'])]
    """
    parts: list[list[OutputTensor]] = [[]]
    for output in outputs:
        if parts[-1] and sum(o.nbytes for o in parts[-1]) + output.nbytes > limit:
            parts.append([])
        parts[-1].append(output)
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}


def _rank(output: OutputTensor) -> tuple[int, int, int]:
    """Return the place of a tensor in torch's state dict: embedding, layers, then norm and heads."""
    if found := IN_LAYER.fullmatch(output.name):
        return 1, int(found[1]), MODULES.index(found[2])
    return (0 if "embed_tokens" in output.name else 2), 0, 0


def plan_files(outputs: Sequence[OutputTensor], max_shard_size: int | str) -> dict[str, list[OutputTensor]]:
    """Return the tensors of each file, in the order of transformers and safetensors; no data is read or written.

    Files are filled in the order of the state dict. Inside a file, wider dtypes come first, then names are sorted. This
    reproduces the released index files and the lengths of the released shards to the byte.

    Examples
    --------
    >>> names = ["norm", "layers.0.input_layernorm", "layers.0.mlp.up_proj", "embed_tokens"]
    >>> outputs = [OutputTensor(f"model.{name}.weight", "float32", (2,), None) for name in names]
    >>> [[output.name[6:-7] for output in part] for part in plan_files(outputs, 16).values()]
    [['embed_tokens', 'layers.0.mlp.up_proj'], ['layers.0.input_layernorm', 'norm']]
    """
    shards = split_into_shards(sorted(outputs, key=_rank), parse_size(max_shard_size))
    return {
        name: sorted(part, key=lambda output: (-FILE_DTYPES[output.dtype].itemsize, output.name))
        for name, part in shards.items()
    }


def build_index(files: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    """Return the index of a checkpoint in several files.

    Examples
    --------
    >>> index = json.loads(build_index({"a.safetensors": [OutputTensor("norm.weight", "float32", (2,), None)]}))
    >>> index
    {'metadata': {'total_size': 8}, 'weight_map': {'norm.weight': 'a.safetensors'}}
    """
    total = sum(output.nbytes for part in files.values() for output in part)
    weight_map = dict(sorted((output.name, name) for name, part in files.items() for output in part))
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def build_header(outputs: Sequence[OutputTensor]) -> bytes:
    """Return the start of a safetensors file: the length of the JSON text, then the text, padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this entry
    position = 0
    for output in outputs:
        end = position + output.nbytes
        code = CODE_OF_DTYPE[FILE_DTYPES[output.dtype]]
        entries[output.name] = {"dtype": code, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(outputs: Sequence[OutputTensor]) -> int:
    """Return the length of the safetensors file that holds `outputs`.

    Examples
    --------
    >>> file_bytes([OutputTensor("norm.weight", "float32", (2,), None)])
    112
    """
    return len(build_header(outputs)) + sum(output.nbytes for output in outputs)


def write_file(path: Path, outputs: Sequence[OutputTensor], bar: Any) -> None:
    """Write one safetensors file; it gets its name only after all data is on the disk."""
    with new_file(path) as file:
        file.write(build_header(outputs))
        for output in outputs:
            for block in output.blocks():
                file.write(block.reshape(-1).view(np.uint8).data)
                bar.update(block.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _is_finished(path: Path, outputs: Sequence[OutputTensor]) -> bool:
    """Return True if an earlier run finished this file, because its name, header and length are right."""
    if not path.is_file():
        return False
    start = build_header(outputs)
    with open_file(path) as file:
        same = file.read(len(start)) == start
    return same and path.stat().st_size == file_bytes(outputs)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left; free some space, or "
            "give a folder on another disk"
        )


@contextmanager
def claim(folder: Path, fingerprint: str) -> Iterator[None]:
    """Lock a folder after checking that it is empty, or belongs to an interrupted run with the same fingerprint.

    After an interruption, or if the disk is full, the finished files stay, and the same run continues with them. After
    an error in the source or on the disk, the folder is restored to its state before the first run.

    Raises
    ------
    CheckpointError
        If the folder holds anything else, or another process is writing to it.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give an empty folder or a new one")
    staging, made = folder / STAGING, not folder.exists()
    state = staging / STATE
    fresh = not (state.is_file() and state.read_text(encoding="utf-8") == fingerprint)
    if fresh:
        # A run that is killed at its start leaves an empty staging folder.
        begun = [staging] if staging.is_dir() and all(path.suffix == ".part" for path in staging.iterdir()) else []
        if not made and list(folder.iterdir()) not in ([], begun):
            fault = "an unfinished checkpoint of another run" if state.is_file() else "files"
            raise CheckpointError(f"{folder}: already contains {fault}; give an empty folder, or remove this one first")
        staging.mkdir(parents=True, exist_ok=True)
    with lock_folder(staging, CheckpointError):
        try:
            replace_file(state, fingerprint.encode())
            yield
        except RefgemmaError:
            if fresh:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path == staging else path.unlink()
            if made:
                folder.rmdir()
            raise


def write_checkpoint(
    folder: str | Path, outputs: Sequence[OutputTensor], max_shard_size: int | str = "50GB", fingerprint: str = ""
) -> None:
    """Write the weights of a checkpoint into `folder`; replace weights that are already there.

    Shows a progress bar on stderr after two seconds, if stderr is a terminal. Needs a few times 16 MB of memory in
    addition to the rows that `outputs` return.

    Parameters
    ----------
    folder : str or Path
        Created if it does not exist.
    outputs : sequence of Output
        All tensors, in any order; see `plan_files` for the order in the files.
    max_shard_size : int or str
        A larger checkpoint is written as several files with an index; see `parse_size`.
    fingerprint : str
        Identifies the content, so that an interrupted run can be continued. A run with the same fingerprint keeps the
        finished files, and compares all files with the content before it moves them into place. Without a fingerprint,
        a run starts again, and removes its files if it fails.

    Raises
    ------
    CheckpointError
        If the disk has too little space, a number cannot be read, or a file differs from the tensors when read back.
    OSError
        If the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_checkpoint(folder, [OutputTensor("norm.weight", "bfloat16", (3,), np.ones(3))])
    ...     read_header(Path(folder) / "model.safetensors")["norm.weight"].read("float32")
    array([1., 1., 1.], dtype=float32)
    """
    target = Path(folder)
    shards = plan_files(outputs, max_shard_size)
    staging = target / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    if fingerprint:  # the folder is staging for a claimed target
        _write_shards(staging, shards, fingerprint)
        check_written(staging, outputs)
        _move_into_place(target, shards)
        return
    with lock_folder(staging, CheckpointError):
        try:
            _write_shards(staging, shards, fingerprint)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _move_into_place(target, shards)


def _write_shards(staging: Path, shards: dict[str, list[OutputTensor]], fingerprint: str) -> None:
    state = staging / STATE
    if not fingerprint or not state.is_file() or state.read_text(encoding="utf-8") != fingerprint:
        for path in staging.iterdir():
            path.unlink()
        replace_file(state, fingerprint.encode())
    write_parts(staging, {n: part for n, part in shards.items() if not _is_finished(staging / n, part)}, write_file)


def write_parts(folder: Path, parts: Mapping[str, Sequence[OutputTensor]], write: Callable[..., None]) -> None:
    """Write each file of `parts`, with one progress bar for all.

    Raises
    ------
    CheckpointError
        If the disk has too little space.
    """
    for partial in folder.glob("*.part"):  # left by a killed run
        partial.unlink()
    total = sum(output.nbytes for part in parts.values() for output in part)
    _check_space(folder, total)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None, delay=2) as bar:
        for name, part in parts.items():
            write(folder / name, part, bar=bar)


def _move_into_place(target: Path, shards: dict[str, list[OutputTensor]]) -> None:
    """Remove the old weights, then move the new ones into place, the index last, so that no mixture can be read."""
    for path in [target / SINGLE, target / INDEX]:
        path.unlink(missing_ok=True)
    for path in target.iterdir():
        if SHARD.fullmatch(path.name):
            path.unlink()
    for name in shards:
        os.replace(target / STAGING / name, target / name)
    if len(shards) > 1:
        replace_file(target / INDEX, build_index(shards))
    shutil.rmtree(target / STAGING)


def check_written(folder: str | Path, outputs: Sequence[OutputTensor]) -> None:
    """Read all files back and compare them, byte for byte, with the tensors to write.

    Raises
    ------
    CheckpointError
        If a tensor differs; the message names the first.
    """
    root = Path(folder)
    files = sorted(path for path in root.iterdir() if path.name == SINGLE or SHARD.fullmatch(path.name))
    found = {name: tensor for file in files for name, tensor in read_header(file).items()}
    check_same(found, outputs, root)


def check_same(found: Mapping[str, Stored], outputs: Sequence[OutputTensor], folder: Path) -> None:
    """Compare the tensors `found` in `folder` with the tensors to write; see `check_written`."""
    total = sum(output.nbytes for output in outputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=None, delay=2) as bar:
        for output in outputs:
            tensor = found.get(output.name)
            if tensor is None or (tensor.shape, tensor.dtype) != (output.shape, FILE_DTYPES[output.dtype]):
                raise CheckpointError(
                    f"{folder}: tensor {output.name!r} is missing after writing; did another process change the folder?"
                )
            row = 0
            for block in output.blocks():
                # Map the file again each time, because all pages read through one map stay in memory.
                again = np.ascontiguousarray(tensor.map()[row : row + len(block)])
                if again.tobytes() != block.tobytes():
                    raise CheckpointError(
                        f"{tensor.file}: tensor {output.name!r} differs from row {row} on when read back; the disk is "
                        "failing, or another process changed the file: remove the file if it exists, and run again"
                    )
                row += len(block)
                bar.update(block.nbytes)
