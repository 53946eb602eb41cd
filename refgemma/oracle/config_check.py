"""Compare an engine's configuration of a released Gemma 2 with the release.

Checked on torchtune 0.6.1, which exchanges the two caps, and on litgpt 0.5.13, whose Gemma 2 has Llama's epsilon.

A trace of a small model cannot show a wrong preset, because the small model has its own configuration.
"""

import ast
import importlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import PRESETS, Gemma2Config
from refgemma.errors import RefgemmaError, UsageError
from refgemma.files import pluralise, read_file, read_object
from refgemma.gguf import config_fields, read_gguf
from refgemma.hub import CONFIG_JSON, find_model
from refgemma.oracle.known_bugs import KNOWN_BUGS, edit_config
from refgemma.oracle.verdicts import CONFORMS, DIFFERS, INCONCLUSIVE

# Each field with the names that engines use for it, the most specific first. `hidden_dim` is the width of the residual
# stream in KerasHub, but the width of the feed-forward layer in DeepMind's code, where `embed_dim` is the former.
FIELD_NAMES = {
    "vocab_size": ("vocab_size", "vocabulary_size", "num_embed"),
    "hidden_size": ("hidden_size", "embed_dim", "embedding_dim", "n_embd", "d_model", "model_dim", "dim", "hidden_dim"),
    "intermediate_size": (
        "intermediate_size", "intermediate_dim", "ffn_dim", "mlp_dim", "mlp_hidden_dim", "hidden_dim",
    ),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "num_decoder_blocks", "n_layer", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "num_query_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_query_groups", "n_kv_heads"),
    "head_dim": ("head_dim", "head_size", "kv_channels", "projection_dim"),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", "attention_scores_scalar"),
    "sliding_window": ("sliding_window", "sliding_window_size", "attn_window_size"),
    "attn_logit_softcapping": (
        "attn_logit_softcapping", "attention_logit_softcapping", "attention_logit_soft_cap", "attn_logits_soft_cap",
        "attn_logit_softcap", "hidden_capping_value",
    ),
    "final_logit_softcapping": (
        "final_logit_softcapping", "final_logit_soft_cap", "final_logit_softcap", "final_capping_value",
    ),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rope_theta", "rope_base", "rotary_base", "rope_wavelength"),
    "layer_types": ("layer_types", "attn_types", "attention_types", "sliding_window_indices"),
    "hidden_activation": ("hidden_activation", "gelu_approximate"),
}  # fmt: skip
# The fields that decide the shapes of the weights: if one of them differs, the released weights do not fit.
SHAPE_FIELDS = tuple(FIELD_NAMES)[: tuple(FIELD_NAMES).index("head_dim") + 1]
ACTIVATION_NAMES = {"tanh": "gelu_pytorch_tanh", "gelu_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
PADDED_VOCABULARY = 256128  # rows of the table in DeepMind's own files; the last 128 belong to no token


class PresetError(RefgemmaError):
    """Raised for a configuration that cannot be read, or that has none of Gemma 2's numbers."""


@dataclass(frozen=True)
class Number:
    """A number of an engine's configuration, with the released number."""

    field: str
    name: str  # the engine's name for it
    value: Any
    released: Any

    @property
    def differs(self) -> bool:
        """True if the engine's number differs from the released one."""
        if self.field == "vocab_size" and self.value == PADDED_VOCABULARY:
            return False
        return bool(self.value != self.released)


@dataclass(frozen=True)
class PresetCheck:
    """The result: the compared numbers, and the known bugs that explain differences."""

    source: str
    size: str
    numbers: tuple[Number, ...]
    missing: tuple[str, ...]  # fields that the engine's configuration does not give
    bugs: tuple[str, ...]
    closest: str  # the release with the most equal numbers; `size` may be another one, which the user chose
    is_released: bool  # true if the weights of a release have these shapes

    @property
    def verdict(self) -> str:
        """``differs``, ``conforms``, or ``inconclusive`` if a field is missing."""
        if any(number.differs for number in self.numbers):
            return DIFFERS
        return INCONCLUSIVE if self.missing else CONFORMS


def check_preset(source: str, size: str | None = None) -> PresetCheck:
    """Compare an engine's configuration with that of a released Gemma 2.

    Parameters
    ----------
    source : str
        As in `read_preset`.
    size : str, optional
        ``"2b"``, ``"9b"`` or ``"27b"``; by default the release with the most equal numbers.

    Raises
    ------
    PresetError
        If `source` cannot be read, or gives none of Gemma 2's numbers.
    UsageError
        If there is no release of that size.

    Examples
    --------
    >>> check_preset('refgemma.config:Gemma2Config.preset("9b")').verdict
    'conforms'
    """
    given = match_fields(read_preset(source))
    if not given:
        raise PresetError(
            f"{source}: found no number of a Gemma 2, such as hidden_size or head_dim; give the engine's configuration"
        )
    if size is not None and size not in PRESETS:
        raise UsageError(f"--size {size}: unknown; the released sizes are {', '.join(PRESETS)}")
    compared = {name: compare(given, Gemma2Config.preset(name)) for name in PRESETS}
    closest = min(compared, key=lambda name: sum(number.differs for number in compared[name]))
    size = size or closest
    missing = tuple(field for field in FIELD_NAMES if field not in given)
    bugs = explain(compared[size], Gemma2Config.preset(size))
    is_released = any(map(have_its_shapes, compared.values()))
    return PresetCheck(source, size, compared[size], missing, bugs, closest, is_released)


def read_preset(source: str) -> dict[str, Any]:
    """Return the names and values of a configuration, including those in nested mappings.

    Parameters
    ----------
    source : str
        One of: a JSON file such as ``config.json``; a ``.gguf`` file; a Hugging Face folder or hub id;
        ``FILE.py:FUNCTION``, which is read but not run; or ``MODULE:NAME``, which is imported. NAME is an expression
        that gives a mapping or an object with attributes, such as ``Config.from_name("Gemma-2-9b")``. If NAME is a
        function, it is not called, because it may build the whole model; the literal arguments in its source are used.

    Raises
    ------
    PresetError
        If the source cannot be read.
    """
    path, colon, name = source.partition(":")
    if colon and path.endswith(".py"):
        return read_source(read_file(path).decode("utf-8", "replace"), name, source)
    if colon and not Path(source).exists():
        return read_imported(path, name, source)
    if source.endswith(".gguf"):
        return Gemma2Config(**config_fields(read_gguf(source, PresetError), PresetError)).to_dict()
    file = Path(source) if source.endswith(".json") else find_model(source) / CONFIG_JSON
    values = read_object(file, PresetError)
    if values.get("model_type") == "gemma2":  # fill in transformers' defaults
        return Gemma2Config.from_dict(values).to_dict()
    return flatten(values)


def read_imported(module: str, name: str, source: str) -> dict[str, Any]:
    """Import a module, and return the numbers of one of its objects."""
    try:
        found: Any = eval(name, vars(importlib.import_module(module)))
        if inspect.isroutine(found):
            return read_source(textwrap.dedent(inspect.getsource(found)), found.__name__, source)
    except PresetError:
        raise
    except Exception as error:  # another project's code may raise anything
        raise PresetError(f"{source}: {type(error).__name__}: {error}") from None
    if isinstance(found, Mapping):
        return flatten(found)
    return flatten({name: getattr(found, name, None) for name in dir(found) if not name.startswith("_")})


def read_source(text: str, function: str, source: str) -> dict[str, Any]:
    """Return the literal keyword arguments of all calls inside a function, without running the function."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise PresetError(f"{source}: not Python: {error}") from None
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    if not functions:
        raise PresetError(f"{source}: no function {function!r}")
    return dict(_find_literals(functions[0]))


def _find_literals(function: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    for call in ast.walk(function):
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            if keyword.arg is not None:
                try:
                    yield keyword.arg, ast.literal_eval(keyword.value)
                except ValueError:  # not a literal: the engine computes this argument
                    pass


def flatten(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of a mapping and of its nested mappings; outer values have priority."""
    inner = [flatten(value) for value in values.values() if isinstance(value, Mapping)]
    return {key: value for one in inner for key, value in one.items()} | {str(k): v for k, v in values.items()}


def match_fields(values: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the engine's name and value for each field that it gives; no name is used for two fields."""
    found: dict[str, tuple[str, Any]] = {}
    for field, names in FIELD_NAMES.items():
        used = {name for name, _ in found.values()}
        name = next((name for name in names if name in values and name not in used), None)
        if name is not None and _is_value(values[name]):
            found[field] = name, values[name]
    return found


def numbers_for(engine: Any, model: str | Path = "conformance") -> dict[str, Any]:
    """Return the numbers of a model under the names that an engine's configuration has for them.

    Numbers for which the engine's configuration has no name known here are missing, and so is the activation. Compare
    the result with the engine's documentation before use.

    Parameters
    ----------
    engine : mapping, dataclass instance or callable
        The engine's configuration of a released Gemma 2, or a function whose parameters are the numbers.
    model : str or Path
        ``"conformance"``, ``"tiny"`` or a folder.

    Examples
    --------
    >>> numbers_for({"n_embd": 2304, "n_layer": 26, "sliding_window_indices": [1, 0] * 13})
    {'n_embd': 30, 'n_layer': 4, 'sliding_window_indices': [1, 0, 1, 0]}
    """
    if isinstance(engine, Mapping):
        given = dict(engine)
    elif is_dataclass(engine):
        given = {one.name: getattr(engine, one.name) for one in fields(engine)}
    else:
        given = dict.fromkeys(inspect.signature(engine).parameters)
    config = Gemma2Config.from_dict(read_object(find_model(model) / CONFIG_JSON, PresetError))
    found = {}
    for field, (name, value) in match_fields(given).items():
        if field == "layer_types" and value:
            sliding, full = value[:2]  # the engine's own words: the first layer of a released Gemma 2 slides
            types = config.layer_types or ()
            found[name] = type(value)(full if one == "full_attention" else sliding for one in types)
        elif field not in ("layer_types", "hidden_activation"):
            found[name] = getattr(config, field)
    return found


def _is_value(value: Any) -> bool:
    """Return True if `value` is a plain value, not a property, a function or a tensor."""
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, np.number))


def compare(given: Mapping[str, tuple[str, Any]], released: Gemma2Config) -> tuple[Number, ...]:
    """Return each given number together with the released number."""
    numbers = []
    for field, (name, value) in given.items():
        if field == "layer_types" and isinstance(value, (list, tuple)):
            value = read_layer_types(value)
        if field == "hidden_activation" and isinstance(value, str):
            value = ACTIVATION_NAMES.get(value, value)
        numbers.append(Number(field, name, value, getattr(released, field)))
    return tuple(numbers)


def have_its_shapes(numbers: Iterable[Number]) -> bool:
    """Return True if the weights of a release fit the engine's numbers."""
    return not any(number.differs and number.field in SHAPE_FIELDS for number in numbers)


def read_layer_types(values: list[Any] | tuple[Any, ...]) -> tuple[str, ...]:
    """Return an engine's layer types in Hugging Face's words; 1, ``local`` and ``sliding`` mean sliding."""
    words = [str(getattr(value, "name", value)).lower() for value in values]
    sliding = [word in ("1", "true") or "sliding" in word or "local" in word for word in words]
    return tuple("sliding_attention" if one else "full_attention" for one in sliding)


def explain(numbers: tuple[Number, ...], released: Gemma2Config) -> tuple[str, ...]:
    """Return the known bugs that explain wrong numbers; leave out a bug if another explains more."""
    wrong = {number.field: number.value for number in numbers if number.differs}
    found: dict[str, set[str]] = {}
    for bug in KNOWN_BUGS:
        edited = edit_config(bug.change, released)
        changed = {field for field in FIELD_NAMES if getattr(edited, field) != getattr(released, field)}
        if changed and all(field in wrong and wrong[field] == getattr(edited, field) for field in changed):
            found[bug.name] = changed
    return tuple(name for name, changed in found.items() if not any(changed < other for other in found.values()))


def preset_json(check: PresetCheck, code: int) -> dict[str, Any]:
    """Return the result as JSON."""
    numbers = [
        {
            "field": n.field,
            "name": n.name,
            "value": _as_builtin(n.value),
            "released": _as_builtin(n.released),
            "differs": n.differs,
        }
        for n in check.numbers
    ]
    return {
        "schema": "refgemma-check-config/1", "source": check.source, "size": check.size, "verdict": check.verdict,
        "closest": check.closest, "is_released_size": check.is_released, "numbers": numbers,
        "missing": list(check.missing), "known_bugs": list(check.bugs), "exit_code": code,
    }  # fmt: skip


def _as_builtin(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda x: x.item()))


def lines(check: PresetCheck) -> Iterator[str]:
    """Yield the lines of the report: the verdict, the wrong numbers, the known bugs, and the missing numbers."""
    wrong = [number for number in check.numbers if number.differs]
    yield f"{check.source} {check.verdict}: {len(check.numbers)} numbers compared with google/gemma-2-{check.size}"
    if not check.is_released:
        yield f"  not a released size; closest is google/gemma-2-{check.closest}"
    for number in wrong:
        own = "" if number.name == number.field else f" ({number.name})"
        yield f"  {number.field}{own} is {_show_value(number.value)}; the release has {_show_value(number.released)}"
    for bug in KNOWN_BUGS:
        if bug.name in check.bugs:
            yield f"  known bug {bug.name}: {bug.says}; seen in {bug.seen}"
    if check.missing:
        yield f"not given by the engine: {', '.join(check.missing)}"


def _show_value(value: Any) -> str:
    if not isinstance(value, tuple):
        return repr(value)
    return f"{pluralise(len(value), 'layer')}, {sum('sliding' in str(one) for one in value)} of them sliding"
