"""Convert original Gemma 2 checkpoints and other PyTorch files to Hugging Face folders, and back.

Checked against files of torch.save and TensorStore, and with transformers 5.23: it loads the same model from a
converted folder.

Both directions use one table, ``refgemma.convert.layouts``.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refgemma.config import PRESETS, Gemma2Config
from refgemma.convert.flax_tree import read_npz, read_tree, write_npz
from refgemma.convert.gguf_writer import check_model, gguf_layout, write_gguf
from refgemma.convert.layouts import (
    LITGPT_EMBEDDING,
    ROWWISE,
    Original,
    View,
    flax_layout,
    hf_layout,
    litgpt_layout,
    pytorch_layout,
)
from refgemma.convert.orbax import is_orbax
from refgemma.convert.pickles import read_torch, write_torch
from refgemma.files import pluralise, quote_few, read_object, replace_file
from refgemma.hub import ADAPTER_CONFIG, CONFIG_JSON, GGUF, refuse_links
from refgemma.precision import Array
from refgemma.tokenizer.gguf_tokenizer import has_tokens
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.checkpoint import (
    INDEX,
    SINGLE,
    CheckpointError,
    Stored,
    open_checkpoint,
    read_files,
    read_shards,
)
from refgemma.weights.library_names import has_other_numbers, match_names
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD
from refgemma.weights.peft_adapters import ADAPTER_MODEL, PICKLED_ADAPTER
from refgemma.weights.save import (
    FILE_DTYPES,
    STAGING,
    OutputTensor,
    as_stored,
    build_index,
    check_same,
    claim,
    parse_size,
    split_into_shards,
    write_checkpoint,
    write_parts,
)

FORMATS = ("hf", "pytorch", "flax", "flax-npz", "gguf")
TORCH_SINGLE, TORCH_INDEX, NPZ = "model.ckpt", "pytorch_model.bin.index.json", "params.npz"
TORCH_SHARD = re.compile(r"[A-Za-z0-9_.-]{1,200}\.bin")
TORCH_FILES = ("pytorch_model.bin", "model.pth", "lit_model.pth", "pytorch_model_fsdp.bin")  # in addition to *.ckpt
ROTARY_TABLE = "freqs_cis"  # suffix of a table that gemma_pytorch may store with the weights
ORIGINAL_EMBEDDING = "embedder.weight"
EMBEDDINGS = (ORIGINAL_EMBEDDING, EMBED_TOKENS, LITGPT_EMBEDDING, "transformer/embedder/input_embedding")
GENERATION = "generation_config.json"
BESIDE = (GENERATION, "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ONE_FILE = 10**17  # bytes
PADDING = 128  # an original's embedding may be padded to a multiple of this number of rows


# --- tensors that are read on access ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor on disk; the functions `views` are applied in order."""

    tensor: Stored
    rows: slice
    views: tuple[View, ...]

    def read(self, rows: slice) -> Array:
        """Return some rows of the part; only these rows are read, unless a view moves axes."""
        kept = all(view in ROWWISE for view in self.views)
        inside = slice(self.rows.start + rows.start, self.rows.start + rows.stop) if kept else self.rows
        x = self.tensor.map()[inside]
        for view in self.views:
            x = view(x)
        return x if kept else x[rows]


@dataclass(frozen=True)
class Joined:
    """The rows of an `OutputTensor`: parts stacked by rows, then rows of zeros, in one precision."""

    name: str
    parts: tuple[tuple[Part, int], ...]
    dtype: str
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Array:
        """Return some rows; raise an error for NaN or infinity."""
        start, stop, _ = rows.indices(self.shape[0])
        blocks, at = [], 0
        for part, count in self.parts:
            first, last = max(start - at, 0), min(stop - at, count)
            if first < last:
                blocks.append(self._block(part, slice(first, last)))
            at += count
        if stop > max(at, start):
            blocks.append(np.zeros((stop - max(at, start), *self.shape[1:]), FILE_DTYPES[self.dtype]))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def _block(self, part: Part, rows: slice) -> Array:
        found = part.read(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            block = as_stored(found, self.dtype)
        if not np.isfinite(block).all():
            where = f"{part.tensor.file}: tensor {part.tensor.name!r}"
            if np.isfinite(found).all():
                raise CheckpointError(f"{where}: a number is above the largest {self.dtype}; use a wider dtype")
            raise CheckpointError(f"{where}: has NaN or infinity, so the file is damaged; write or download it again")
        return block


def _unfold(layout: Sequence[Original], found: Mapping[str, Stored]) -> dict[str, Part]:
    """For each Hugging Face name, return the part of an original tensor."""
    parts = {}
    for original in layout:
        at = 0
        for piece in original.pieces:
            parts[piece.name] = Part(found[original.name], slice(at, at + piece.rows), (piece.unfold,))
            at += piece.rows
    return parts


def _fold(layout: Sequence[Original], parts: Mapping[str, Part], dtype: str | None) -> list[OutputTensor]:
    """Return the original tensors, made from Hugging Face tensors."""
    outputs = []
    for original in layout:
        pieces = [(parts[piece.name], piece) for piece in original.pieces]
        kinds = {part.tensor.dtype.name for part, _ in pieces}
        if dtype is None and len(kinds) > 1:
            raise CheckpointError(
                f"{original.name!r} joins tensors of different precision, {' and '.join(sorted(kinds))}; give a dtype"
            )
        kind = dtype or kinds.pop()
        joined = tuple((replace(part, views=(*part.views, piece.fold)), piece.rows) for part, piece in pieces)
        outputs.append(
            OutputTensor(original.name, kind, original.shape, Joined(original.name, joined, kind, original.shape))
        )
    return outputs


# --- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: its Hugging Face tensors by name. The headers are read and checked."""

    path: Path
    kind: str
    config: Gemma2Config
    parts: Mapping[str, Part]
    padding: int = 0  # number of the embedding's rows without a token, which are dropped
    nonzero: int = 0  # number of these rows that are not zero

    @property
    def folders(self) -> list[Path]:
        """The folders to search for files such as the tokenizer; for a released Orbax folder, also its parent."""
        if self.kind == "gguf":
            return []
        if not self.path.is_dir():
            return [self.path.parent]
        if is_orbax(self.path):
            return [self.path, self.path.parent]
        return [
            self.path,
            *sorted({part.tensor.file.parent for part in self.parts.values()}),
        ]  # an adapter and its base


def detect_kind(path: Path) -> str:
    """Find the format of the checkpoint at `path` from its files.

    Examples
    --------
    >>> import refgemma
    >>> detect_kind(Path(refgemma.__file__).parent / "checkpoints" / "tiny")
    'hf'
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == GGUF and path.is_file():
        return "gguf"
    if not path.is_dir():
        return "flax" if path.suffix in (".npz", ".safetensors") else "pytorch"
    if (path / ADAPTER_CONFIG).exists():
        return "hf"
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return "flax" if any("/" in name for name in read_files(path)[1]) else "hf"
    if (path / TORCH_INDEX).exists() or _list_torch_files(path):
        return "pytorch"
    if any(path.glob("*.npz")) or is_orbax(path):
        return "flax"
    raise CheckpointError(
        f"{path}: has no checkpoint; it must have *.ckpt, {TORCH_INDEX}, {TORCH_FILES[0]}, *.npz, {SINGLE} or {INDEX}"
    )


def _list_torch_files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.ckpt")), *(folder / name for name in TORCH_FILES if (folder / name).exists())]


def _read_torch_tensors(path: Path) -> dict[str, Stored]:
    """Read the tensors (except rotary tables) of a file, or of a folder with one file or an index and shards."""
    if not path.is_dir():
        found = read_torch(path)
    elif (path / TORCH_INDEX).exists():
        found = read_shards(path / TORCH_INDEX, TORCH_SHARD, read_torch, (ROTARY_TABLE,))
    else:
        files = _list_torch_files(path)
        if len(files) != 1:
            raise CheckpointError(f"{path}: has {len(files)} PyTorch files but no {TORCH_INDEX}; give one of the files")
        found = read_torch(files[0])
    if quantised := [name for name in found if name.endswith("weight_scaler")]:
        raise CheckpointError(f"{path}: is quantised ({quote_few(quantised)}); give the unquantised checkpoint")
    return {name: tensor for name, tensor in found.items() if not name.endswith(ROTARY_TABLE)}


def _find_config(path: Path, found: Mapping[str, Stored], given: str | Path | None) -> Gemma2Config:
    """Return the given configuration, or that of the source's folder, or the released one with these shapes."""
    if given is not None:
        return Gemma2Config.from_json_file(given)
    beside = (path if path.is_dir() else path.parent) / CONFIG_JSON
    if beside.is_file() and read_object(beside, CheckpointError).get("model_type") == "gemma2":
        return Gemma2Config.from_json_file(beside)
    layers = {match[1] for name in found if (match := re.search(r"(?:layers?[._]|transformer\.h\.)(\d+)[./]", name))}
    sizes = {
        "hidden_size": _find_length(found, EMBEDDINGS, 1),
        "num_hidden_layers": len(layers),
        "intermediate_size": _find_length(
            found,
            (
                "model.layers.0.mlp.gate_proj.weight",
                "transformer.h.0.mlp.fc_1.weight",
                "transformer/layer_0/mlp/linear/w",
            ),
            0,
        ),
    }
    for preset, values in PRESETS.items():
        if all(values[key] == size for key, size in sizes.items()):
            return Gemma2Config.preset(preset)
    described = ", ".join(f"{key} {size}" for key, size in sizes.items())
    raise CheckpointError(f"{path}: {described} fits no released Gemma 2 ({', '.join(PRESETS)}); give its config.json")


def _find_length(found: Mapping[str, Stored], names: Sequence[str], axis: int) -> int:
    shapes = [found[name].shape for name in names if name in found]
    return shapes[0][axis] if shapes and len(shapes[0]) == 2 else 0


def _is_padded(rows: int, config: Gemma2Config) -> bool:
    padding = rows - config.vocab_size
    return padding == 0 or (0 < padding <= PADDING and rows % PADDING == 0)


def _count_tensor_rows(path: Path, table: Stored | None, config: Gemma2Config) -> int:
    """Return the number of rows of the embedding, which may be padded."""
    rows = table.shape[0] if table is not None and table.shape else config.vocab_size
    if not _is_padded(rows, config):
        raise CheckpointError(
            f"{path}: the embedding has {pluralise(rows, 'row')}; it must have {config.vocab_size} (vocab_size) or "
            f"the next multiple of {PADDING}; give the config.json of this checkpoint"
        )
    return rows


def _is_transposed(path: Path, gate: Stored | None, config: Gemma2Config, given: bool | None) -> bool:
    """Return True if ``gating_einsum`` is ``(2, intermediate, hidden)``."""
    if given is not None:
        return given
    if config.hidden_size == config.intermediate_size:
        raise CheckpointError(
            f"{path}: hidden_size and intermediate_size are both {config.hidden_size}, so the axes of gating_einsum "
            "are ambiguous; use --gating-einsum (transposed in Python)"
        )
    return gate is not None and gate.shape[1:] == (config.intermediate_size, config.hidden_size)


def _check_layout(path: Path, layout: Sequence[Original], found: Mapping[str, Stored]) -> None:
    """Raise an error if a tensor is missing or unexpected, or has the wrong shape or dtype."""
    wanted = {original.name: original.shape for original in layout}
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(
            f"{path}: lacks {quote_few(missing)}; the checkpoint is incomplete, or does not belong to its config: "
            "fetch both again"
        )
    if unused := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path}: has {quote_few(unused)}, which a Gemma 2 of this shape does not have; check the configuration"
        )
    for name, shape in wanted.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}; according to the configuration it must be "
                f"{shape}"
            )
        if tensor.dtype not in FILE_DTYPES.values():
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}; it must be one of {', '.join(FILE_DTYPES)}"
            )


def open_source(
    path: str | Path, kind: str = "auto", config: str | Path | None = None, transposed: bool | None = None
) -> Source:
    """Open a checkpoint in any supported format, and check everything except the numbers.

    Parameters
    ----------
    path : str or Path
        A file or a folder.
    kind : str
        ``hf``, ``gguf``, ``pytorch``, ``flax``, or ``auto`` to find the format from the files.
    config : str or Path, optional
        The ``config.json`` of an original checkpoint. By default that of its folder, or the released one with these
        shapes.
    transposed : bool, optional
        If true, ``gating_einsum`` of a Flax tree is ``(2, intermediate, hidden)``. By default found from the shape.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be converted; the message names the file, the tensor and the remedy.

    Examples
    --------
    >>> import refgemma
    >>> source = open_source(Path(refgemma.__file__).parent / "checkpoints" / "tiny")
    >>> source.kind, len(source.parts)
    ('hf', 68)
    """
    path = Path(path)
    kind = detect_kind(path) if kind == "auto" else kind
    if kind in ("hf", "gguf"):
        if config is not None:
            raise CheckpointError(f"{path}: already has a configuration; leave out --config")
        return _open_hf(path, kind)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_dir():
        refuse_links(path, every=True)
    found = _read_torch_tensors(path) if kind == "pytorch" else read_tree(path)
    shape = _find_config(path, found, config)
    if kind == "pytorch" and ORIGINAL_EMBEDDING not in found:
        return _open_state_dict(path, shape, found)
    if kind == "pytorch":
        name = ORIGINAL_EMBEDDING
        rows = _count_tensor_rows(path, found.get(name), shape)
        layout = pytorch_layout(shape, rows)
    else:
        name = "transformer/embedder/input_embedding"
        rows = _count_tensor_rows(path, found.get(name), shape)
        gate = found.get("transformer/layer_0/mlp/gating_einsum/w")
        layout = flax_layout(shape, _is_transposed(path, gate, shape, transposed), rows)
    _check_layout(path, layout, found)
    nonzero = int(np.count_nonzero(found[name].map()[shape.vocab_size :].any(axis=1)))
    return Source(path, kind, shape, _unfold(layout, found), rows - shape.vocab_size, nonzero)


def _open_hf(path: Path, kind: str) -> Source:
    pickled = path / PICKLED_ADAPTER
    adapter = read_torch(pickled) if pickled.exists() and not (path / ADAPTER_MODEL).exists() else None
    checkpoint = open_checkpoint(path, adapter)
    _check_layout(path, hf_layout(checkpoint.config), checkpoint.tensors)
    return Source(path, kind, checkpoint.config, _unfold(hf_layout(checkpoint.config), checkpoint.tensors))


def _open_state_dict(path: Path, config: Gemma2Config, found: Mapping[str, Stored]) -> Source:
    """Open PyTorch tensors that have transformers' or LitGPT's names."""
    if LITGPT_EMBEDDING in found:
        head = found.get(LM_HEAD)
        if head is not None and config.tie_word_embeddings:
            if has_other_numbers(head, found[LITGPT_EMBEDDING]):
                config = config.changed(tie_word_embeddings=False)
            else:
                found = {name: tensor for name, tensor in found.items() if name != LM_HEAD}
        layout = litgpt_layout(config)
    else:
        config, found = match_names(found, config, path)
        layout = hf_layout(config)
    _check_layout(path, layout, found)
    return Source(path, "pytorch", config, _unfold(layout, found))


# --- the target -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """The result of `convert`."""

    source: Source
    target: Path
    kind: str
    outputs: Sequence[OutputTensor]

    @property
    def nbytes(self) -> int:
        """The number of bytes of all written tensors."""
        return sum(output.nbytes for output in self.outputs)


def _choose_layout(source: Source, kind: str, vocab_rows: int | None, transposed: bool | None) -> list[Original]:
    config = source.config
    if vocab_rows is not None and (kind == "hf" or not _is_padded(vocab_rows, config)):
        raise CheckpointError(
            f"vocab_rows is {vocab_rows}, but {source.path} has {config.vocab_size} tokens; leave vocab_rows out for "
            "a Hugging "
            f"Face folder, or give the next multiple of {PADDING} for an original format"
        )
    if kind == "hf":
        return hf_layout(config)
    if config.attention_bias or not config.tie_word_embeddings:
        what = "biases in attention" if config.attention_bias else "an untied head"
        raise CheckpointError(f"{source.path}: has {what}, which the original formats cannot store; convert to hf")
    if vocab_rows is not None and vocab_rows < config.vocab_size:
        raise CheckpointError(
            f"vocab_rows is {vocab_rows}; {source.path} has {config.vocab_size} tokens: give at least as many rows"
        )
    if kind == "pytorch":
        return pytorch_layout(config, vocab_rows)
    released_2b = (config.hidden_size, config.num_hidden_layers) == (2304, 26)
    return flax_layout(config, not released_2b if transposed is None else transposed, vocab_rows)


def convert(
    source: str | Path, target: str | Path, source_format: str = "auto", target_format: str = "hf",
    config: str | Path | None = None, dtype: str | None = None, max_shard_size: int | str | None = None,
    vocab_rows: int | None = None, transposed: bool | None = None,
) -> Converted:  # fmt: skip
    """Convert a checkpoint a few rows at a time, and compare the written files with the source.

    After an interruption, the same call continues with the first unfinished file.

    Parameters
    ----------
    source : str or Path
        A folder or a file; see `open_source`.
    target : str or Path
        An empty or new folder, or the folder of the same interrupted conversion. For GGUF, a file.
    source_format, target_format : str
        ``hf``, ``gguf``, ``pytorch`` or ``flax``; for the source also ``auto``, for the target also ``flax-npz``.
    config : str or Path, optional
        See `open_source`.
    dtype : str, optional
        The precision to write. By default that of the source; then numbers are copied bit for bit.
    max_shard_size : int or str, optional
        See `write_checkpoint`. By default 5GB, but one file for ``pytorch``; ``flax-npz`` is always one file.
    vocab_rows : int, optional
        Number of rows of the embedding in an original format, 256128 in the released Flax trees. Rows without a token
        are zero.
    transposed : bool, optional
        The layout of ``gating_einsum`` if source or target is a Flax tree; see `flax_layout`.

    Raises
    ------
    CheckpointError
        If the source is incomplete, a number does not fit `dtype`, or the target has other files.
    OSError
        If a file cannot be read or written.

    Examples
    --------
    >>> import tempfile
    >>> import refgemma
    >>> tiny = Path(refgemma.__file__).parent / "checkpoints" / "tiny"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = convert(tiny, f"{folder}/torch", target_format="pytorch")
    ...     _ = convert(f"{folder}/torch", f"{folder}/hf")
    ...     again = refgemma.load(f"{folder}/hf")
    >>> np.array_equal(again.weights.norm, refgemma.load("tiny").weights.norm)
    True
    """
    if target_format not in FORMATS or (dtype is not None and dtype not in FILE_DTYPES):
        raise CheckpointError(
            f"cannot write {target_format} in {dtype}; use one of {', '.join((*FORMATS, *FILE_DTYPES))}"
        )
    if target_format == "gguf":
        if str(target).endswith("/"):
            raise CheckpointError(f"{target}: is a folder; give the name of a file that ends in {GGUF}")
        return _convert_to_gguf(open_source(source, source_format, config, transposed), Path(target), dtype)
    size = parse_size(max_shard_size or (ONE_FILE if target_format == "pytorch" else "5GB"))
    opened = open_source(source, source_format, config, transposed)
    layout = _choose_layout(opened, target_format, vocab_rows, transposed)
    outputs = _fold(layout, opened.parts, dtype)
    folder = Path(target)
    fingerprint = _make_fingerprint(opened, outputs, target_format, size)
    with claim(folder, fingerprint):
        _write_beside(opened, folder, target_format, outputs[0].dtype)
        if target_format in ("hf", "flax"):
            write_checkpoint(folder, outputs, size, fingerprint)
        else:
            _write_zips(folder, outputs, target_format, size)
    return Converted(opened, folder, target_format, outputs)


def _find_tokenizer(source: Source) -> Tokenizer | None:
    own = [source.path] if source.kind == "gguf" and has_tokens(source.path) else []
    places = own or [p for p in source.folders if (p / "tokenizer.model").is_file()]
    if places:
        return Tokenizer.from_pretrained(places[0])
    warnings.warn(
        f"{source.path}: has no tokenizer, so the GGUF file has none and can be used only with token ids", stacklevel=2
    )
    return None


def _convert_to_gguf(source: Source, target: Path, dtype: str | None) -> Converted:
    """Write a GGUF file with norms in float32, as in llama.cpp, and with the tokenizer if there is one."""
    if target.suffix != GGUF or target.is_dir():
        raise CheckpointError(f"{target}: the name of a GGUF file must end in {GGUF}")
    if any(os.path.realpath(part.tensor.file) == os.path.realpath(target) for part in source.parts.values()):
        raise CheckpointError(f"{target}: is the source; give another file")
    check_model(source.config, source.path)
    matrices, norms = gguf_layout(source.config)
    outputs = _fold(matrices, source.parts, dtype) + _fold(norms, source.parts, "float32")
    write_gguf(target, source.config, _find_tokenizer(source), outputs)
    return Converted(source, target, "gguf", outputs)


def _make_fingerprint(source: Source, outputs: Sequence[OutputTensor], kind: str, size: int) -> str:
    """Return a hash of the source and the settings; only a run with the same hash continues an interrupted run."""
    files = sorted({part.tensor.file for part in source.parts.values()})
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    tensors = [(output.name, output.dtype, output.shape) for output in outputs]
    text = json.dumps([stats, tensors, kind, size, source.config.to_json_string()])
    return hashlib.sha256(text.encode()).hexdigest()


def _write_beside(source: Source, folder: Path, kind: str, dtype: str) -> None:
    """Write the other files of the folder: the configuration, and copies of the source's tokenizer files and so on."""
    config = source.config.changed(dtype=dtype, architectures=("Gemma2ForCausalLM",))
    config.save_pretrained(folder)
    if source.kind == "gguf" and has_tokens(source.path):
        Tokenizer.from_pretrained(source.path).save_pretrained(folder)
    for name in BESIDE:
        if found := [place / name for place in source.folders if (place / name).is_file()]:
            shutil.copyfile(found[0], folder / name)
    if kind == "hf" and not (folder / GENERATION).exists():
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        about = ids | {"_from_model_config": True, "cache_implementation": "hybrid"}
        replace_file(folder / GENERATION, (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())


def _write_zips(folder: Path, outputs: Sequence[OutputTensor], kind: str, limit: int) -> None:
    """Write PyTorch's format (one file, or shards with an index) or a ``.npz``; compare, then move into place."""
    parts = _split_into_files(outputs, kind, limit)
    staging = folder / STAGING
    key = None if len(parts) > 1 else "model_state_dict"
    write = write_npz if kind == "flax-npz" else functools.partial(write_torch, key=key)
    write_parts(staging, {name: part for name, part in parts.items() if not (staging / name).is_file()}, write)
    read = read_npz if kind == "flax-npz" else read_torch
    check_same({name: tensor for file in parts for name, tensor in read(staging / file).items()}, outputs, staging)
    for name in parts:
        os.replace(staging / name, folder / name)
    if len(parts) > 1:
        replace_file(folder / TORCH_INDEX, build_index(parts))
    shutil.rmtree(staging)


def _split_into_files(outputs: Sequence[OutputTensor], kind: str, limit: int) -> dict[str, list[OutputTensor]]:
    if kind == "flax-npz":
        return {NPZ: list(outputs)}
    parts = split_into_shards(outputs, limit)
    if len(parts) == 1:
        return {TORCH_SINGLE: list(outputs)}
    return {f"pytorch_{name.removesuffix('.safetensors')}.bin": part for name, part in parts.items()}
