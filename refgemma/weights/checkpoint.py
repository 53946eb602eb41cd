"""Open the Hugging Face folder of a Gemma 2 and read it one tensor, one layer or a few rows at a time.

Checked bit for bit against the loader of safetensors 0.8, which also checks the headers. A file is memory-mapped only
while a tensor is read, so that a 27B (54 GB in bfloat16) is never resident. Decoding reads every tensor for every
token, so it keeps the maps. The loader of safetensors is not used for the data: it copies each tensor twice, and its
errors name no tensor.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import open_tensors, quote, quote_few, read_object
from refgemma.hub import ADAPTER_CONFIG, CONFIG_JSON, GGUF, ModelNameError, find_model, refuse_links
from refgemma.precision import Array
from refgemma.weights.gguf_weights import read_gguf_model
from refgemma.weights.initial import fits_in_memory
from refgemma.weights.library_names import check_score, match_names
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
)
from refgemma.weights.peft_adapters import ADAPTER_MODEL, PICKLED_ADAPTER, Changed, merge_adapter, read_adapter_config
from refgemma.weights.quantised import RAW_DTYPES, Dequantised, dequantise
from refgemma.weights.stored import REMEDY as REMEDY
from refgemma.weights.stored import CheckpointError as CheckpointError
from refgemma.weights.stored import Stored as Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPE_OF_CODE = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors")  # a plain file name: no folder, no drive


@dataclass(frozen=True)
class StoredRows:
    """A table on disk that reads, converts and checks rows when they are indexed.

    Parameters
    ----------
    tensor : Stored
        The table.
    dtype : str
        The precision of the returned rows; see `Stored.read`.

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
            raise TypeError(
                "the index of a table on disk selects only rows (an index, a slice or an array); cut columns afterwards"
            )
        return self.tensor.read(self.dtype, rows)


def read_header(file: Path, quantised: bool = False) -> dict[str, Stored]:
    """Read the header of one safetensors file, and return its tensors by name, without their data.

    With `quantised`, the result includes tensors in the packed formats of `refgemma.weights.quantised`.

    Raises
    ------
    CheckpointError
        If the file cannot be opened, violates the format, or has a dtype that weights cannot have.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"norm.weight": np.zeros(24, np.float32)}, Path(folder) / "one.safetensors")
    ...     read_header(Path(folder) / "one.safetensors")["norm.weight"].shape
    (24,)
    """
    opened, position = open_tensors(file, CheckpointError, REMEDY)
    file_bytes = file.stat().st_size
    known = DTYPE_OF_CODE | (RAW_DTYPES if quantised else {})
    found: dict[str, Stored] = {}
    for name in opened.offset_keys():  # in the order of the data, which has no gaps
        entry = opened.get_slice(name)
        code = entry.get_dtype()
        if code not in known:
            raise CheckpointError(
                f"{file}: tensor {quote(name)}: the dtype is {code!r}; it must be one of {', '.join(DTYPE_OF_CODE)}; "
                "dequantise the checkpoint with the library that made it"
            )
        found[name] = Stored(name, file, known[code], tuple(entry.get_shape()), position, file_bytes)
        position += found[name].nbytes
    return found


def read_shards(
    index: Path, shard_name: re.Pattern[str], read: Callable[[Path], Mapping[str, Stored]], tables: tuple[str, ...] = ()
) -> dict[str, Stored]:
    """Read the headers of all shards; each tensor must be in the shard that the index names, and only there.

    Parameters
    ----------
    index : Path
        A JSON file whose ``weight_map`` is an object from tensor names to files.
    shard_name : re.Pattern
        A pattern that the name of each shard must match: a plain file name.
    read : callable
        Function that reads the header of one shard.
    tables : tuple of str
        Suffixes of names to leave out: these tensors are not weights, and may occur in every shard.

    Raises
    ------
    CheckpointError
        If the index is damaged, a shard is missing, or index and shards belong to different checkpoints.
    """
    weight_map = read_object(index, CheckpointError, REMEDY).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object from tensor names to files; {REMEDY}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard_name.fullmatch(shard):
            raise CheckpointError(
                f"{index}: tensor {quote(name)}: the shard is {quote(shard)}; it must be the plain name of a weights "
                "file beside the index"
            )
    shards = sorted(set(weight_map.values()))
    if absent := [shard for shard in shards if not (index.parent / shard).exists()]:
        raise CheckpointError(
            f"{index}: the folder lacks {quote_few(absent)}, of {len(shards)} shards; download the missing ones"
        )
    weight_map = {name: shard for name, shard in weight_map.items() if not name.endswith(tables)}
    found: dict[str, Stored] = {}
    for shard in shards:
        for name, tensor in read(index.parent / shard).items():
            if name.endswith(tables):
                continue
            where = f"{tensor.file}: tensor {quote(name)}"
            if name in found:
                other = found[name].file.name
                raise CheckpointError(f"{where} is in {other} too; remove the file that belongs to another checkpoint")
            if name not in weight_map:
                raise CheckpointError(
                    f"{where} is not in {index.name}; fetch index and shards of the same checkpoint again"
                )
            found[name] = tensor
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointError(
                f"{index.parent / shard}: lacks tensor {quote(name)}, which {index.name} places there; "
                "fetch index and shards of the same checkpoint again"
            )
    return found


def read_files(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """Return the path for errors about the whole checkpoint, and every tensor in the folder.

    A single file has priority over an index, as in transformers.
    """
    read = functools.partial(read_header, quantised=True)
    if (folder / SINGLE).exists():
        return folder / SINGLE, read(folder / SINGLE)
    if (folder / INDEX).exists():
        return folder / INDEX, read_shards(folder / INDEX, SHARD_NAME, read)
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith((".bin", ".pth", ".ckpt", ".pt"))]:
        raise CheckpointError(
            f"{folder}: has no {SINGLE}, but PyTorch's pickles {quote_few(pickles)}; convert these with: "
            f"refgemma convert {folder} NEW_FOLDER"
        )
    if shards := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(
            f"{folder}: has neither {SINGLE} nor {INDEX}, but {quote_few(shards)}; "
            "fetch the index, or rename the file to {SINGLE} if it holds the whole model"
        )
    raise CheckpointError(f"{folder}: has no weights, neither {SINGLE} nor {INDEX}; give the folder with the weights")


@dataclass(frozen=True)
class Checkpoint:
    """A Gemma 2 on disk: the headers are read and checked, the data is not. `open_checkpoint` makes it.

    Parameters
    ----------
    folder : Path
        The folder; for an adapter, the folder of its base.
    config : Gemma2Config
        The configuration in ``config.json``.
    tensors : mapping of str to Stored
        Every tensor of `tensor_shapes` under that name, even if the names in the file lack ``model.``; then a
        classifier's ``score.weight`` and ``score.bias``. A tied ``lm_head.weight`` is not listed, because it repeats
        the embedding.

    Examples
    --------
    See `open_checkpoint`.
    """

    folder: Path
    config: Gemma2Config
    tensors: Mapping[str, Stored] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The number of bytes of `tensors` on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """The number of parameters in `tensors`."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def score(self, dtype: str = "float32") -> Score | None:
        """Read the head of a classifier; return None if there is none."""
        score = {name: self.tensors[name] for name in (SCORE_WEIGHT, SCORE_BIAS) if name in self.tensors}
        if not score:
            return None
        check_score(score, self.config.hidden_size)
        bias = self.tensors[SCORE_BIAS].read(dtype) if SCORE_BIAS in self.tensors else None
        return Score(self.tensors[SCORE_WEIGHT].read(dtype), bias)

    def weights(self, dtype: str = "float32") -> Weights:
        """Return `resident` weights, or `streamed` weights if they would take more than 4 GiB."""
        if fits_in_memory(self.parameters, dtype):
            return self.resident(dtype)
        if any(isinstance(tensor, Changed) for tensor in self.tensors.values()):
            warnings.warn(
                f"{self.folder}: the model is too large for memory, so the adapter is merged again for every token; "
                "merge it "
                "once with: refgemma convert ADAPTER NEW_FOLDER",
                stacklevel=3,
            )
        return self.streamed(dtype)

    def resident(self, dtype: str = "float32") -> Weights:
        """Read all weights into memory; see `Stored.read` for `dtype` and errors."""
        streamed = self.streamed(dtype)
        head = None if streamed.lm_head is None else streamed.lm_head[:]
        return Weights(streamed.embed_tokens[:], list(streamed.layers), streamed.norm, head)

    def streamed(self, dtype: str = "float32") -> Weights:
        """Return weights that read each block and each row of the embedding when accessed, and keep none in memory.

        The numbers equal those of `resident`, bit for bit. A NaN in the file raises an error only when its block or row
        is read. While decoding, `refgemma.fast` keeps its tensors mapped. The system counts mapped pages as memory of
        the process, but can reclaim them.
        """

        def tensor(name: str) -> StoredRows:
            return StoredRows(self.tensors[name], dtype)

        bias = layer_tensors(0, bias=True)["q_proj_bias"] in self.tensors
        layers = OnDemand(tensor, range(self.config.num_hidden_layers), bias)
        head = tensor(LM_HEAD) if LM_HEAD in self.tensors else None
        return Weights(tensor(EMBED_TOKENS), layers, tensor(NORM)[:], head)


def open_checkpoint(folder: str | Path, adapter: Mapping[str, Stored] | None = None) -> Checkpoint:
    """Open a Hugging Face folder (one weights file, or an index and shards), a PEFT adapter, or a GGUF file.

    This reads only the headers. It checks that files, index and configuration agree and that each file is complete. The
    one exception is a stored ``lm_head.weight``, whose data is compared with the embedding at once.

    Parameters
    ----------
    folder : str or Path
        A folder from the Hugging Face hub or from ``save_pretrained``, a PEFT adapter, or a ``.gguf`` file. An adapter
        is merged into its base when a tensor is read.
    adapter : mapping of str to Stored, optional
        The tensors of an adapter, used instead of ``adapter_model.safetensors``.

    Raises
    ------
    CheckpointError
        For any problem in the files; the message names the file, the tensor and the remedy.
    ConfigError
        If ``config.json`` is not that of a Gemma 2.

    Examples
    --------
    >>> import json, tempfile
    >>> from safetensors.numpy import save_file
    >>> config = Gemma2Config(vocab_size=61, hidden_size=24, intermediate_size=56, num_hidden_layers=2,
    ...                       num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    >>> from refgemma.weights.parameters import tensor_shapes
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
    if folder.is_file() and folder.suffix == GGUF:
        return Checkpoint(folder, *read_gguf_model(folder))
    if not folder.is_dir():
        fault = "is a file; give its folder" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder}: {fault}")
    refuse_links(folder)
    for path in (folder / name for name in (CONFIG_JSON, SINGLE, INDEX, ADAPTER_CONFIG, ADAPTER_MODEL)):
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading such a file could wait for ever
            raise CheckpointError(f"{path}: is a pipe or a device; it must be a file")
    try:
        return _open_adapter(folder, adapter) if (folder / ADAPTER_CONFIG).exists() else _open_model(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None


def _open_model(folder: Path) -> Checkpoint:
    if not (folder / CONFIG_JSON).exists():
        raise CheckpointError(f"{folder}: has no {CONFIG_JSON}; give the folder of a Hugging Face checkpoint")
    config = Gemma2Config.from_json_file(folder / CONFIG_JSON)
    raw = read_object(folder / CONFIG_JSON, CheckpointError)
    leftover = raw.get("quantization_config")
    try:
        source, found = read_files(folder)
        found = dequantise(found, raw, source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_name_quantisation(raw)}") from None
    if leftover and not any(isinstance(tensor, Dequantised) for tensor in found.values()):
        warnings.warn(
            f"{folder / CONFIG_JSON}: quantization_config = {quote(leftover)} is ignored, because the weights are not "
            "quantised; remove it from the configuration",
            stacklevel=4,
        )
    return Checkpoint(folder, *match_names(found, config, source))


def _name_quantisation(raw: Mapping[str, Any]) -> str:
    """Return a note with the quantisation method in a configuration and the remedy, or an empty string."""
    method = raw.get("quantization_config") or raw.get("quantization")  # the second is MLX's
    if not isinstance(method, dict):
        return ""
    name = method.get("quant_method", "MLX" if "group_size" in method else "a method without a name")
    return (
        f"; according to {CONFIG_JSON} the weights are quantised by {quote(name)}: load the model with that library, "
        "dequantise the weights and save the model again"
    )


def _open_adapter(folder: Path, tensors: Mapping[str, Stored] | None) -> Checkpoint:
    """Open an adapter's base, in the same folder or where ``adapter_config.json`` points, and merge the adapter."""
    adapter = read_adapter_config(folder)
    if tensors is None and not (folder / ADAPTER_MODEL).exists():
        if (folder / PICKLED_ADAPTER).exists():
            raise CheckpointError(
                f"{folder}: has no {ADAPTER_MODEL}, but PyTorch's pickle {PICKLED_ADAPTER}; merge it into its base "
                f"with: refgemma convert {folder} NEW_FOLDER"
            )
        raise CheckpointError(
            f"{folder}: has {ADAPTER_CONFIG} but no {ADAPTER_MODEL}; save the adapter with a newer PEFT"
        )
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        base = _open_model(folder)
    else:
        name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision") or "main"
        if not isinstance(name, str) or not isinstance(revision, str):
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {quote(name)}; it must be the base's folder "
                "or hub id"
            )
        try:
            place = find_model(name, revision)
        except ModelNameError as error:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {error}") from None
        if (place / ADAPTER_CONFIG).exists():
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: the base, {place}, is an adapter too; merge it first")
        base = open_checkpoint(place)
    merged = merge_adapter(base.config, base.tensors, adapter, tensors or read_header(folder / ADAPTER_MODEL), folder)
    return Checkpoint(base.folder, *merged)
