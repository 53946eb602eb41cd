"""Merge a LoRA adapter of PEFT into its base model, one tensor at a time when the tensor is read. Checked against
PEFT 0.21 `merge_and_unload`: patterns, rank-stabilised, DoRA, embeddings, whole modules, single tokens."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import quote, quote_few, read_object
from refgemma.hub import ADAPTER_CONFIG
from refgemma.precision import Array, as_dtype
from refgemma.weights.library_names import has_other_numbers
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD, SCORE_BIAS, SCORE_WEIGHT
from refgemma.weights.stored import REMEDY, CheckpointError, ComputedRows, Stored

ADAPTER_MODEL, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"

# Keys of adapter_config.json that change nothing: they say how the adapter was made, or repeat facts of the tensors.
DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "unsloth_fixed",
}  # fmt: skip
READ_KEYS = {
    "alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "trainable_token_indices",
    "lora_bias", "use_dora", "use_rslora",
}  # fmt: skip
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # all others change the base's weights first

# A pattern is an untrusted regular expression. With few repetitions and none inside another, matching is always fast.
PATTERN_LIMIT, REPETITIONS = 200, 3

Delta: TypeAlias = Callable[[Array, Any, str], Array]

TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?:\.modules_to_save)?"
    r"\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|base_layer|"
    r"token_adapter\.trainable_tokens_delta|weight|bias)(?:\.default)?(?P<end>\.weight|\.bias)?"
)


HALF_PRECISIONS = ("bfloat16", "float16")
TOKEN_INDICES = "token_adapter.trainable_tokens_delta"  # trained rows of an embedding
BASE = ("base_layer.weight", "base_layer.bias")  # the base's own tensors, which the file repeats
ADAPTER_KINDS = ("weight", "bias")  # a module that the adapter replaces as a whole
ADAPTER_PARTS = {
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", *BASE,
    "lora_B.bias", TOKEN_INDICES, *ADAPTER_KINDS,
}  # fmt: skip


@dataclass(frozen=True)
class Changed(Stored):
    """A tensor on disk that an adapter changes when it is read."""

    base: Stored
    change: Delta  # takes rows of the base in float64, the rows' numbers, and the model's precision

    def read(self, dtype: str, rows: Any = ...) -> Array:
        """Copy the changed tensor, or some of its rows; see `Stored.read`."""
        with np.errstate(over="ignore", invalid="ignore"):  # the check below raises an error instead
            half = dtype in HALF_PRECISIONS  # PEFT rounds to the model's precision after each change
            part = np.asarray(self.base.read(dtype if half else "float64", rows), np.float64)
            found = as_dtype(self.change(part, rows, dtype), dtype)
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{self.file}: merging it into tensor {self.base.name!r} of the base gives NaN, infinity or a number "
                f"above the largest {dtype}; use a wider dtype, or download the adapter again"
            )
        return found

    def map(self, keep: bool = False) -> Any:
        """Return the rows in float64; the change is computed again at each access."""
        return ComputedRows(self, np.dtype(np.float64))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` and check that the adapter can be merged.

    Raises
    ------
    CheckpointError
        If the adapter cannot be merged; the message gives the reason.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    ...     read_adapter_config(Path(folder))["r"]
    8
    """
    path = folder / ADAPTER_CONFIG
    raw = read_object(path, CheckpointError, REMEDY)
    merge = "try to merge the adapter with PEFT (merge_and_unload, save_pretrained), and load the result"
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {quote(raw.get('peft_type'))}; it must be LORA: {merge}")
    # A key that only a newer PEFT knows may change the weights, unless its value is false.
    for key, value in raw.items():
        if key not in DESCRIPTIVE | READ_KEYS and key != "loftq_config" and value not in (None, False, {}, []):
            raise CheckpointError(f"{path}: {quote(key)} is {quote(value)}, which is not supported; {merge}")
    if raw.get("init_lora_weights") not in INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {quote(raw['init_lora_weights'])}, which changes the base's weights first; "
            f"{merge}"
        )
    for key in ("use_dora", "use_rslora", "lora_bias"):
        if not isinstance(raw.get(key, False), bool | None):
            raise CheckpointError(f"{path}: {key} is {quote(raw[key])}; it must be true or false")
    if not all(_is_valid_number(raw.get(key)) for key in ("r", "lora_alpha")):
        raise CheckpointError(f"{path}: r and lora_alpha must be numbers above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = raw.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_valid_number, pattern.values())):
            raise CheckpointError(f"{path}: {key} is {quote(pattern)}; it must be an object from names to numbers")
    return raw


def _is_valid_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def merge_adapter(
    config: Gemma2Config, tensors: Mapping[str, Stored], adapter: Mapping[str, Any], found: Mapping[str, Stored],
    folder: Path,
) -> tuple[Gemma2Config, dict[str, Stored]]:  # fmt: skip
    """Merge an adapter into the tensors of its base model; each tensor is read and changed only when it is accessed.

    Parameters
    ----------
    config, tensors : Gemma2Config, mapping of str to Stored
        The base model's configuration and tensors.
    adapter : mapping
        The adapter's configuration; see `read_adapter_config`.
    found : mapping of str to Stored
        The tensors of the adapter.
    folder : Path
        The adapter's folder.

    Returns
    -------
    config : Gemma2Config
        The configuration. As in PEFT, its head is no longer tied if the adapter replaces the embedding or the head.
    tensors : dict of str to Stored
        The merged tensors.

    Raises
    ------
    CheckpointError
        If the name or shape of an adapter's tensor does not fit the base.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.open_checkpoint(refgemma.find_model("tiny"))
    >>> merge_adapter(tiny.config, tiny.tensors, {}, {}, Path("adapter"))
    Traceback (most recent call last):
    ...
    refgemma.weights.stored.CheckpointError: adapter/adapter_model.safetensors: holds no tensor of an adapter
    """
    source = next(iter(found.values())).file if found else folder / ADAPTER_MODEL
    if not found:
        raise CheckpointError(f"{source}: holds no tensor of an adapter")
    modules = _group(found, tensors, source)
    merged = dict(tensors)
    whole = {
        f"{module}.{kind}": parts[kind] for module, parts in modules.items() for kind in parts if kind in ADAPTER_KINDS
    }
    tables = [whole[name] for name in (EMBED_TOKENS, LM_HEAD) if name in whole]
    if len(tables) == 2 and tables[0].shape == tables[1].shape == (*tables[0].shape[:1], config.hidden_size):
        # The adapter holds all rows, even of a resized base.
        config = config.changed(vocab_size=tables[0].shape[0])
        merged |= {EMBED_TOKENS: tables[0]} | ({LM_HEAD: tables[1]} if LM_HEAD in merged else {})
        if config.tie_word_embeddings and not has_other_numbers(tables[1], tables[0]):
            del whole[LM_HEAD], whole[EMBED_TOKENS]  # one table under two names stays tied
    if config.tie_word_embeddings and not whole.keys().isdisjoint({EMBED_TOKENS, LM_HEAD}):
        config = config.changed(tie_word_embeddings=False)
        merged[LM_HEAD] = merged[EMBED_TOKENS]
    for name, tensor in whole.items():
        _check_shape(tensor, merged[name].shape if name in merged else tensor.shape)
        merged[name] = tensor
    # If head and embedding share a table, PEFT changes it, whichever of the two modules the adapter names.
    tied = {} if LM_HEAD in merged else {LM_HEAD: EMBED_TOKENS}
    if tied and (shared := [name for name in ("model.embed_tokens", "lm_head") if _is_low_rank(modules.get(name, {}))]):
        warnings.warn(
            f"{source}: the LoRA of {quote_few(shared)} is merged into the table that embedding and head share, as "
            "PEFT's merge_and_unload does; unmerged, PEFT changes only one of the two and gives other logits: "
            "for those logits, save the base with tie_word_embeddings false and a separate lm_head.weight",
            stacklevel=2,
        )
    places = {module: tied.get(f"{module}.weight", f"{module}.weight") for module in modules}
    for module, parts in modules.items():
        for kind, name in zip(BASE, (places[module], f"{module}.bias"), strict=True):
            if kind in parts:
                _check_shape(parts[kind], merged[name].shape if name in merged else ())
                merged[name] = parts[kind]
    for module, parts in sorted(modules.items(), key=lambda item: item[0] == LM_HEAD.removesuffix(".weight")):
        for field, change in _make_changes(module, parts, adapter, merged[places[module]], source).items():
            name = places[module] if field == "weight" else f"{module}.{field}"
            if name not in merged:
                raise CheckpointError(
                    f"{source}: {module} has no bias in the base, so neither refgemma nor PEFT can merge lora_B.bias; "
                    "run the adapter with PEFT, or train with lora_bias=False"
                )
            base = merged[name]
            merged[name] = Changed(base.name, source, base.dtype, base.shape, 0, base.file_bytes, base, change)
    return config, merged


def _group(found: Mapping[str, Stored], tensors: Mapping[str, Stored], source: Path) -> dict[str, dict[str, Stored]]:
    """Return the adapter's tensors, grouped by the base's module and then by kind."""
    own = {*tensors, LM_HEAD, SCORE_WEIGHT, SCORE_BIAS}
    modules: dict[str, dict[str, Stored]] = {}
    strange = []
    for name, tensor in found.items():
        match = TENSOR.fullmatch(name) if len(name) < PATTERN_LIMIT else None
        module, kind = (match["module"], match["part"] + (match["end"] or "")) if match else ("", "")
        names = (module, f"model.{module}")
        module = next((m for m in names if f"{m}.{kind if kind == 'bias' else 'weight'}" in own), "")
        kind = kind if kind in (*BASE, "lora_B.bias") else kind.removesuffix(".weight")
        if not module or kind in modules.get(module, {}) or kind not in ADAPTER_PARTS:
            strange.append(name)
        modules.setdefault(module, {})[kind] = tensor
    if strange:
        raise CheckpointError(
            f"{source}: holds {quote_few(strange)}, which no tensor of this base matches; use the base that the "
            "adapter was trained on, "
            "or merge the adapter with PEFT"
        )
    return modules


def _is_low_rank(parts: Mapping[str, Stored]) -> bool:
    return any(kind.startswith("lora_") for kind in parts)


def _check_shape(tensor: Stored, shape: Sequence[int]) -> None:
    if tensor.shape == tuple(shape):
        return
    resized = ("embed_tokens" in tensor.name or "lm_head" in tensor.name) and tensor.shape[1:] == tuple(shape)[1:]
    step = (
        f"; the adapter's base had been resized: call resize_token_embeddings({tensor.shape[0]}) on the base, save "
        "it, and give "
        "its folder as base_model_name_or_path"
        if resized
        else ""
    )
    raise CheckpointError(
        f"{tensor.file}: tensor {quote(tensor.name)} is {list(tensor.shape)}; according to the base and "
        f"{ADAPTER_CONFIG} it must be {list(shape)}{step}"
    )


def _make_changes(
    module: str, parts: Mapping[str, Stored], adapter: Mapping[str, Any], base: Stored, source: Path
) -> dict[str, Delta]:
    """Return a function that changes a module's ``weight``, and one for ``bias`` if needed; check all shapes."""
    kinds = parts.keys() - {*ADAPTER_KINDS, *BASE}
    if not kinds:
        return {}
    if kinds == {TOKEN_INDICES}:
        return {"weight": _replace_tokens(module, parts[TOKEN_INDICES], adapter, base)}
    side = "lora_embedding_" if "lora_embedding_A" in kinds else "lora_"
    wanted = {f"{side}A", f"{side}B"} | ({"lora_magnitude_vector"} if adapter.get("use_dora") else set())
    if kinds - ({"lora_B.bias"} if side == "lora_" else set()) != wanted or len(base.shape) != 2:
        raise CheckpointError(
            f"{source}: {module} has {quote_few(sorted(kinds))}; {ADAPTER_CONFIG} requires "
            f"{quote_few(sorted(wanted))}; {REMEDY}"
        )
    inner, outer, magnitude = (parts.get(kind) for kind in (f"{side}A", f"{side}B", "lora_magnitude_vector"))
    assert inner is not None
    assert outer is not None
    rank = _match_pattern(adapter, "rank_pattern", module, adapter["r"])
    alpha = _match_pattern(adapter, "alpha_pattern", module, adapter["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    rows, columns = base.shape if side == "lora_" else base.shape[::-1]
    _check_shape(inner, (rank, columns))
    _check_shape(outer, (rows, rank))
    if magnitude is not None:
        _check_shape(magnitude, (rows,))
    if side != "lora_":
        return {"weight": _add_embedding(inner, outer, scale, magnitude, base)}
    changes = {"weight": _add(inner, outer, scale, magnitude)}
    if offset := parts.get("lora_B.bias"):
        _check_shape(offset, (rows,))
        changes["bias"] = lambda part, asked, _: part + scale * offset.read("float64", asked)
    return changes


def _match_pattern(adapter: Mapping[str, Any], key: str, module: str, usual: float) -> Any:
    """Return the number of the first pattern that matches the end of a module's name, as PEFT does; default:
    `usual`."""
    for pattern, value in (adapter.get(key) or {}).items():
        try:
            if len(pattern) > PATTERN_LIMIT or len(re.findall(r"[*+?{]", pattern)) > REPETITIONS or ")" in pattern:
                raise re.error("the pattern is too complex")
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{ADAPTER_CONFIG}: {key}: {quote(pattern)} must be a simple regular expression for a name: {error}"
            ) from None
    return usual


def _add(inner: Stored, outer: Stored, scale: float, magnitude: Stored | None) -> Delta:
    """Return the change of a linear layer: ``W + scale * B @ A``; for DoRA, scale its rows to the norms `magnitude`."""

    def change(part: Array, rows: Any, _: str) -> Array:
        merged = part + scale * (outer.read("float64", rows) @ inner.read("float64"))
        if magnitude is None:
            return merged
        lengths = np.linalg.norm(merged, axis=-1, keepdims=True)
        scaled: Array = magnitude.read("float64", rows)[..., None] / lengths * merged
        return scaled

    return change


def _add_embedding(inner: Stored, outer: Stored, scale: float, magnitude: Stored | None, base: Stored) -> Delta:
    """Return the change of an embedding: ``W + scale * (B @ A).T``; for DoRA, scale its columns to norms
    `magnitude`."""

    def add(part: Array, rows: Any, dtype: str) -> Array:
        delta: Array = scale * (inner.read("float64").T[rows] @ outer.read("float64").T)
        if dtype in HALF_PRECISIONS and magnitude is None:
            delta = np.asarray(as_dtype(delta, dtype), np.float64)  # PEFT rounds the product before adding it
        return part + delta

    @functools.cache
    def find_factor() -> Array:
        assert magnitude is not None
        lengths = np.linalg.norm(add(base.read("float64"), ..., "float64"), axis=0)
        factor: Array = magnitude.read("float64") / lengths
        return factor

    return add if magnitude is None else lambda part, rows, dtype: find_factor() * add(part, rows, dtype)


def _replace_tokens(module: str, tokens: Stored, adapter: Mapping[str, Any], base: Stored) -> Delta:
    """Return the change of an embedding that replaces some rows by the adapter's."""
    given = adapter.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if module.endswith(name)), None)
    if not isinstance(given, list) or not all(type(token) is int and 0 <= token < base.shape[0] for token in given):
        raise CheckpointError(f"{ADAPTER_CONFIG}: trainable_token_indices must be a list of rows of {module}")
    _check_shape(tokens, (len(given), *base.shape[1:]))
    places = np.full(base.shape[0], -1)
    places[given] = np.arange(len(given))

    def change(part: Array, rows: Any, _: str) -> Array:
        found = places[rows]
        part[found >= 0] = tokens.read("float64")[found[found >= 0]]
        return part

    return change
