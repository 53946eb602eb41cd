"""Read published outputs of the released checkpoints from ``golden/released``, and identify the release of a folder.

None of this data was computed with refgemma. The tests check the data for consistency without weights, and against the
checkpoints if available.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refgemma.config import PRESETS, Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.files import JSON_LIMIT, open_file, quote, read_file, read_object
from refgemma.hub import CONFIG_JSON, golden_folder
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor, file_bytes, plan_files

# Texts for which gemma.cpp published cross entropies: short name -> name in its file.
PUBLISHED = {"hungary": "Hungary", "jingle-bells": "Jingle Bells", "gettysburg": "Gettysburg, Hay Draft"}


def read_released(name: str) -> dict[str, Any]:
    """Return one data file by `name`: its source, licence, precision, caveats and numbers.

    Examples
    --------
    >>> recording = read_released("logos-in-layers-27b")
    >>> recording["checkpoint"], len(recording["residual_norms"]), recording["final"]["top"][0][0]
    ('google/gemma-2-27b', 47, ' Berlin')
    """
    recording: dict[str, Any] = json.loads((golden_folder() / "released" / f"{name}.json").read_text(encoding="utf-8"))
    return recording


def published_text(name: str) -> str:
    """Return a text for which gemma.cpp published cross entropies, by its `name` in `PUBLISHED`.

    Examples
    --------
    >>> published_text("hungary")
    'The capital of Hungary is Budapest which is located in Europe.'
    """
    texts = {text["name"]: text["text"] for text in read_released("gemma-cpp")["texts"]}
    found: str = texts[PUBLISHED[name]]
    return found


def published_figures(text: str) -> dict[str, float]:
    """Return gemma.cpp's published figures for a text, in bits per byte by model; empty for any other text.

    Examples
    --------
    >>> published_figures(published_text("hungary"))
    {'2b-it': 1.14, '9b-it': 1.28, '27b-it': 1.3}
    """
    figures: dict[str, float] = next(
        (known["bits_per_byte"] for known in read_released("gemma-cpp")["texts"] if known["text"] == text), {}
    )
    return figures


# --- the release of a folder ------------------------------------------------------------------------------------------

GENERATION_FILE = "generation_config.json"
SHARD_SIZE = "5GB"  # maximum size of the released weights files
LINES_SHOWN = 4  # maximum number of configuration keys in one message
# The keys that a released config.json and a `Gemma2Config` both have.
CONFIG_KEYS = (
    "attention_bias", "attention_dropout", "attn_logit_softcapping", "final_logit_softcapping", "head_dim",
    "hidden_activation", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "query_pre_attn_scalar", "rms_norm_eps",
    "rope_theta", "sliding_window", "use_cache", "vocab_size",
)  # fmt: skip
RELEASE_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class ReleasedFile:
    """A file of a release: its length, its SHA-256 if published, and the source of both."""

    bytes: int | None
    sha256: str | None
    state: str


@dataclass(frozen=True)
class FileVerdict:
    """The comparison of a file with the released file.

    Parameters
    ----------
    name : str
        The file's name.
    verdict : str
        ``same`` (equal SHA-256), ``same length`` (not hashed, or no hash was published), ``differs``, ``absent``,
        ``unknown`` (nothing was published about the file), or ``extra`` (the release has no such file).
    detail : str
        The difference, or the source of the released file's data.
    sha256 : str, optional
        The hash of the file in the folder, if the whole file was read.
    """

    name: str
    verdict: str
    detail: str
    sha256: str | None = None


@dataclass(frozen=True)
class Identified:
    """The release that a folder matches best, or None if no release has these sizes or no file is as released."""

    release: str | None
    revision: str | None
    files: tuple[FileVerdict, ...]

    @property
    def as_released(self) -> int:
        """The number of files that equal the released files in content, or at least in length."""
        return sum(file.verdict.startswith("same") for file in self.files)

    @property
    def complete(self) -> bool:
        """True if no file differs or is absent."""
        return self.release is not None and not {"differs", "absent"} & {file.verdict for file in self.files}


def releases() -> dict[str, Any]:
    """Return the data on each release in ``golden/released/files.json``, by hub id.

    Examples
    --------
    >>> releases()["google/gemma-2-9b-it"]["dtype"]
    'bfloat16'
    """
    found: dict[str, Any] = read_released("files")["releases"]
    return found


def released_json(release: str) -> dict[str, dict[str, Any]]:
    """Return the known contents of the released ``config.json`` and ``generation_config.json``.

    Examples
    --------
    >>> released_json("google/gemma-2-2b-it")["config.json"]["eos_token_id"]
    [1, 107]
    >>> sorted(released_json("google/gemma-2-9b"))
    ['config.json']
    """
    about = releases()[release]
    config = Gemma2Config.preset(about["size"])
    own = about.get("config", {})
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    usual = ids | {"cache_implementation": "hybrid"} | own if own else {}
    kind = {"architectures": ["Gemma2ForCausalLM"], "hidden_act": config.hidden_activation, "model_type": "gemma2"}
    known = {key: getattr(config, key) for key in CONFIG_KEYS} | kind | {"torch_dtype": about["dtype"]} | usual
    generation = {GENERATION_FILE: {"_from_model_config": True} | usual} if GENERATION_FILE in about["files"] else {}
    return {CONFIG_JSON: known} | generation


@cache
def known_files(release: str) -> dict[str, ReleasedFile]:
    """Return the known data of each file of a release: published data, and the layout of the weights.

    Unpublished lengths of shards are derived from names, shapes and dtype.

    Examples
    --------
    >>> known_files("google/gemma-2-9b")["model-00008-of-00008.safetensors"]
    ReleasedFile(bytes=2378360680, sha256=None, state='predicted')
    """
    about = releases()[release]
    shapes = tensor_shapes(Gemma2Config.preset(about["size"]))
    outputs = [OutputTensor(name, about["dtype"], shape, None) for name, shape in shapes.items()]
    known = {
        name: ReleasedFile(file_bytes(part), None, "predicted")
        for name, part in plan_files(outputs, SHARD_SIZE).items()
    }
    for name, file in about["files"].items():
        length = file.get("bytes", known[name].bytes if name in known else None)
        known[name] = ReleasedFile(length, file.get("sha256"), file["state"])
    return known


def _file_length(path: Path) -> int | None:
    """Return the length of a file, or None if it does not exist; links are followed."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise RefgemmaError(f"{path}: is a folder, a pipe or a device, not a file; remove it")
    return status.st_size


def _compare_json(path: Path, released: Mapping[str, Any], whole: bool) -> str:
    """List the keys of a JSON file that differ from the release; if not `whole`, only keys that are known in both."""
    try:
        own = read_object(path, RefgemmaError)
    except RefgemmaError as error:
        return str(error)
    keys = own.keys() | released.keys() if whole else own.keys() & released.keys()
    said = [
        f"{quote(key)[1:-1]} is {quote(own[key]) if key in own else 'absent'}, released "
        f"{quote(released[key]) if key in released else 'without'}"
        for key in sorted(keys)
        if (key in own) != (key in released) or own[key] != released[key]
    ]
    return "; ".join(said[:LINES_SHOWN] + ([f"and {len(said) - LINES_SHOWN} more"] if len(said) > LINES_SHOWN else []))


def _judge(path: Path, known: ReleasedFile | None, json_keys: Mapping[str, Any], hash_weights: bool) -> FileVerdict:
    """Compare one file of a folder with that of a release."""
    length = _file_length(path)
    if length is None:
        return FileVerdict(path.name, "absent", "the release has this file")
    if known is None:
        different = _compare_json(path, json_keys, whole=False)
        return FileVerdict(
            path.name, "differs" if different else "unknown", different or "nothing was published about this file"
        )
    sha256 = None
    if known.bytes in (None, length):
        if hash_weights or (path.suffix != ".safetensors" and length <= JSON_LIMIT):
            with open_file(path) as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 and sha256 == known.sha256:
            return FileVerdict(path.name, "same", known.state, sha256)
        if None in (sha256, known.sha256) and known.bytes is not None:
            how = "no hash was published" if known.sha256 is None else "use --hash to compare the hash"
            return FileVerdict(path.name, "same length", f"{known.state}; {how}", sha256)
    different = _compare_json(path, json_keys, whole=True) if json_keys else ""
    lengths = "different content" if known.bytes in (None, length) else f"{length:,} bytes, released {known.bytes:,}"
    return FileVerdict(path.name, "differs", different or lengths, sha256)


def _judge_template(folder: Path) -> FileVerdict:
    """Compare the text of a folder's chat template, which is in its own file or in the tokenizer's settings."""
    released = read_released("files")["chat_template"]
    try:
        if (folder / "chat_template.jinja").exists():
            text: object = read_file(folder / "chat_template.jinja", JSON_LIMIT).decode("utf-8", "replace")
        elif (folder / "tokenizer_config.json").exists():
            text = read_object(folder / "tokenizer_config.json", RefgemmaError).get("chat_template")
        else:
            text = None
    except (OSError, RefgemmaError) as error:
        return FileVerdict("chat template", "differs", str(error))
    if text is None:
        return FileVerdict("chat template", "absent", "the release has a chat template")
    sha256 = hashlib.sha256(str(text).encode("utf-8", "replace")).hexdigest()
    if sha256 != released["sha256"]:
        return FileVerdict("chat template", "differs", "different text", sha256)
    return FileVerdict("chat template", "same", released["state"], sha256)


def _judge_all(folder: Path, release: str, hash_weights: bool) -> Identified:
    known, json_keys = known_files(release), released_json(release)
    others = {
        CONFIG_JSON,
        GENERATION_FILE,
        *(name for file in releases().values() for name in file["files"]),
    } - known.keys()
    here = {name for name in others if not name.endswith(".safetensors") and _file_length(folder / name) is not None}
    found = [
        _judge(folder / name, known.get(name), json_keys.get(name, {}), hash_weights)
        for name in sorted(known.keys() | here)
    ]
    if release.endswith("-it"):
        found.append(_judge_template(folder))
    extra = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name not in known]
    found += [FileVerdict(quote(name)[1:-1], "extra", "the release has no such file") for name in extra[:LINES_SHOWN]]
    return Identified(release, releases()[release]["revision"], tuple(found))


def identify_release(folder: str | Path, config: Gemma2Config, hash_weights: bool = False) -> Identified:
    """Identify the release to which a folder belongs, and list the differences file by file.

    Weights files are compared by length; their contents are read only with `hash_weights`. A fine-tuned model with the
    same names, shapes and dtype has the released lengths, too.

    Parameters
    ----------
    folder : str or Path
        A Hugging Face folder.
    config : Gemma2Config
        The folder's configuration.
    hash_weights : bool
        If true, hash the weights too, which takes some seconds per gigabyte.

    Raises
    ------
    RefgemmaError
        If a folder, a pipe or a device has the name of a released file.

    Examples
    --------
    >>> identify_release(golden_folder(), Gemma2Config())
    Identified(release=None, revision=None, files=())
    """
    names = [
        name for name, about in releases().items()
        if Path(folder).is_dir()  # not a GGUF file, because nothing was published about GGUF
        and all(getattr(config, size) == PRESETS[about["size"]][size] for size in RELEASE_SIZES)
    ]  # fmt: skip
    found = [_judge_all(Path(folder), name, hash_weights) for name in names]
    telling = [one for one in found if any(file.verdict.startswith("same") for file in one.files if _tells(file.name))]
    return max(telling, key=_count_same, default=Identified(None, None, ()))


def _tells(name: str) -> bool:
    """Return True if a file differs between releases. (The tokenizer's files do not.)"""
    return name.startswith(("config", "generation_config", "model"))


def _count_same(found: Identified) -> tuple[int, int]:
    return sum(file.verdict == "same" for file in found.files), found.as_released
