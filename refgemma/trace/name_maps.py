"""Translate other implementations' tensor names to refgemma's, with data in ``maps/*.json``.

A map is a list of rules. A rule has a ``pattern``, a name in the other implementation (``{layer}`` stands for a
number), and the ``tensor`` in refgemma. If they differ, it also has the ``layout`` of the axes in einops's notation,
the number among several tensors of that name (``occurrence``, from 0), the ``part`` of a tensor that holds several, the
layout ``then`` of that part, another tensor that is added (``plus``), and ``last`` if the tensor may have only the last
row. A prefix ``calls.N.``, for one of several calls, stays. Names under
``ignored`` are known but useless, with the reason. All other names are reported as unknown; refgemma does not guess.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import einops
import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import pluralise, quote, read_object
from refgemma.inputs import InputError
from refgemma.precision import Array, as_dtype, dtype_name, wide
from refgemma.trace.debug_tree import find_debug_tree, open_debug_tree
from refgemma.trace.evaltext import is_eval_callback, open_eval_callback
from refgemma.trace.reader import Entry, TraceFile, is_there, open_safetensors
from refgemma.trace.sglang_dump import find_ranks, open_ranks

FOLDER = Path(__file__).parent / "maps"
HELP = "see refgemma/trace/maps"
GIVEN = ("input_ids", "position_ids", "attention_mask")


@dataclass(frozen=True)
class Rule:
    """One line of a map."""

    pattern: str
    tensor: str
    layout: str = ""  # einops; empty if the axes are refgemma's
    occurrence: int | str = 0  # "layer" means the first for layer 0, the second for layer 1
    part: tuple[str, ...] = ()  # number of the part, and the heads of each part: ("1", "heads", "kv_heads")
    then: str = ""  # einops, after the part was taken
    plus: str = ""  # name of a tensor with the same layout, which is added: the residual stream in two parts
    last: bool = False  # true if the tensor may have only the last row
    more_keys: bool = False  # true if the tensor may have more keys than tokens; the first keys are used


@dataclass(frozen=True)
class NameMap:
    """The names of one implementation."""

    name: str
    says: str
    learned_from: str  # the source of the map
    run_on: str  # real output with which the map was tested; empty if none
    rules: tuple[Rule, ...]
    ignored: Mapping[str, str]  # pattern -> why


@dataclass(frozen=True)
class Matched:
    """The result of applying a map to a file's names."""

    found: Mapping[str, tuple[str, Rule]]  # refgemma's name -> the file's name and the rule; `plus` is the file's name
    ignored: Mapping[str, str]  # the file's name -> the reason
    unmatched: tuple[str, ...]


def map_names() -> tuple[str, ...]:
    """Return the names of all maps.

    Examples
    --------
    >>> map_names()[:3]
    ('gemma', 'gemma_pytorch', 'litgpt')
    """
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_map(name: str) -> NameMap:
    """Return a map by its name, or from a JSON file.

    Raises
    ------
    InputError
        If there is no such map, or the file is not a map.

    Examples
    --------
    >>> load_map("mlx-lm").rules[0].tensor
    'embedded'
    """
    path = FOLDER / f"{name}.json" if name in map_names() else Path(name)
    if not path.is_file():
        raise InputError(f"unknown map {name!r}; use one of {', '.join(map_names())}, or a JSON file")
    about = read_object(path, InputError, HELP)
    rules, ignored = about.get("rules"), about.get("ignored")
    if not isinstance(rules, list) or not isinstance(ignored, dict):
        raise InputError(
            f"{path}: is not a name map; it must have a list of rules and an object of ignored names: {HELP}"
        )
    for pattern, reason in ignored.items():
        if not isinstance(reason, str) or not _is_pattern(pattern):
            raise InputError(f"{path}: ignored name {quote(pattern)} needs a reason and {A_PATTERN}; {HELP}")
    read = tuple(_read_rule(rule, f"{path}: rule {number}") for number, rule in enumerate(rules))
    known = {key: str(about.get(key, "")) for key in ("name", "says", "learned_from", "run_on")}
    return NameMap(**known, rules=read, ignored=ignored)


# --- checks of a map, which may be untrusted --------------------------------------------------------------------------

NAME_LIMIT, STARS_LIMIT = 200, 3  # each star multiplies the search time by the length of a name
A_LAYOUT = "axes before and after '->' in einops's notation"
A_PATTERN = f"at most {NAME_LIMIT} characters, one {{layer}} and {STARS_LIMIT} stars in its pattern"


def _is_pattern(value: object) -> bool:
    return (
        isinstance(value, str) and 0 < len(value) <= NAME_LIMIT and value.count("{layer}") <= 1
        and value.count("*") <= STARS_LIMIT
    )  # fmt: skip


def _is_layout(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"([\w() ]{1,200}->[\w() ]{1,200})?", value))


def _is_part(value: object) -> bool:
    """Return True if `value` is the index of a part, followed by the axes of all parts."""
    if value == []:
        return True
    axes = axis_lengths(Gemma2Config())
    if not isinstance(value, list) or not all(isinstance(axis, str) for axis in value):
        return False
    return set(value[1:]) <= axes.keys() and value[0] in [str(n) for n in range(len(value) - 1)]


# Field of a rule -> its requirement, and the function that checks it.
RULE_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "pattern": (A_PATTERN, _is_pattern),
    "tensor": (
        "a name in refgemma, with {layer} for a number",
        lambda value: bool(isinstance(value, str) and re.fullmatch(r"(\w|\.|\{layer\}){1,200}", value)),
    ),
    "layout": (A_LAYOUT, _is_layout),
    "then": (A_LAYOUT, _is_layout),
    "plus": (A_PATTERN, _is_pattern),
    "occurrence": (
        "a whole number from 0, or 'layer'",
        lambda value: value == "layer" or (type(value) is int and value >= 0),
    ),
    "part": ("the index of a part and the axes of all parts: ['1', 'heads', 'kv_heads']", _is_part),
    "last": ("true or false", lambda value: isinstance(value, bool)),
    "more_keys": ("true or false", lambda value: isinstance(value, bool)),
}


def _read_rule(rule: object, where: str) -> Rule:
    if not isinstance(rule, dict) or not {"pattern", "tensor"} <= rule.keys():
        raise InputError(f"{where} is not an object with a pattern and a tensor; {HELP}")
    for name, value in rule.items():
        if name not in RULE_FIELDS:
            raise InputError(f"{where} has the unknown field {quote(name)}; the fields are {', '.join(RULE_FIELDS)}")
        needed, holds = RULE_FIELDS[name]
        if not holds(value):
            raise InputError(f"{where}: {name} is {quote(value)}; it must be {needed}")
    return Rule(**{**rule, "part": tuple(rule.get("part", ()))})


def _expression(pattern: str) -> re.Pattern[str]:
    """Compile a pattern: ``{layer}`` matches a number and ``*`` any text; all else is literal."""
    parts = re.split(r"(\{layer\}|\*)", pattern)
    said = {"{layer}": r"(?P<layer>0|[1-9][0-9]*)", "*": ".*"}
    return re.compile("".join(said.get(part, re.escape(part)) for part in parts))


def split_call(name: str) -> tuple[str, str]:
    """Return the prefix of a tensor of one of several calls, or an empty one, and the name.

    Examples
    --------
    >>> split_call("calls.1.lm_head"), split_call("lm_head")
    (('calls.1.', 'lm_head'), ('', 'lm_head'))
    """
    found = re.match(r"calls\.[0-9]+\.", name)
    return (found[0], name[found.end() :]) if found else ("", name)


def match(file: TraceFile, names: NameMap) -> Matched:
    """Match the names of a file with the rules of a map.

    In a file that keeps the order, tensors with the same name are called ``name``, ``name#1``, ``name#2``.
    """
    found: dict[str, tuple[str, Rule]] = {}
    used: set[str] = set()
    for rule in names.rules:
        expression = _expression(rule.pattern)
        for theirs in file.entries:
            call, name = split_call(theirs)
            name, _, number = name.partition("#")
            hit = expression.fullmatch(name)
            if hit is None or (rule.occurrence != "layer" and int(number or 0) != rule.occurrence):
                continue
            layer = hit.groupdict().get("layer") or number or "0"
            ours, added = call + rule.tensor.replace("{layer}", layer), call + rule.plus.replace("{layer}", layer)
            if rule.plus and (added not in file.entries or file.entries[added].shape != file.entries[theirs].shape):
                continue  # both names are reported as unknown
            if ours in found and found[ours][0] != theirs:
                raise InputError(
                    f"{file.path}: the map {names.name} gives {ours} for both {found[ours][0]} and {theirs}"
                )
            found[ours] = (theirs, replace(rule, plus=added if rule.plus else ""))
            used |= {theirs, added}
    rest = [name for name in file.entries if name not in used and name not in GIVEN]
    why = {pattern: _expression(pattern) for pattern in names.ignored}
    ignored = {
        name: names.ignored[hits[0]]
        for name in rest
        if (hits := [pattern for pattern, e in why.items() if e.fullmatch(split_call(name)[1].partition("#")[0])])
    }
    return Matched(found, ignored, tuple(name for name in rest if name not in ignored))


def apply_map(file: TraceFile, names: NameMap, config: Gemma2Config) -> TraceFile:
    """Return the file with refgemma's names and axes; tensors without a rule keep their names."""
    matched = match(file, names)
    entries = {name: file.entries[name] for name in (*GIVEN, *matched.unmatched) if name in file.entries}
    seq = file.entries["input_ids"].shape[-1] if "input_ids" in file.entries and entries["input_ids"].shape else 0
    for ours, (theirs, rule) in matched.found.items():
        entry = file.entries[theirs]
        if rule.plus:
            entry = _add_entries(entry, file.entries[rule.plus])
        call = split_call(ours)[0]
        entries[ours] = _arrange_entry(entry, rule, config, file.lengths.get(call, 0) if call else seq)
    return TraceFile(file.path, {**file.metadata, "map": names.name}, entries)


def _add_entries(one: Entry, other: Entry) -> Entry:
    """Return the sum of two tensors, rounded as the engine rounds it before its next operation.

    The file may store numbers of half precision as float32. So the sum is rounded to half precision if all of them have
    that precision.
    """

    def read() -> Array:
        x, y = one.read(), other.read()
        halves = (half for half in ("bfloat16", "float16") if _is_exact(x, half) and _is_exact(y, half))
        return x + y if x.itemsize == 2 else wide(as_dtype(x + y, next(halves, dtype_name(x))))

    return replace(one, read=read)


def _is_exact(x: Array, dtype: str) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(wide(as_dtype(x, dtype)), x, equal_nan=True)


def axis_lengths(config: Gemma2Config, ranks: int = 1) -> dict[str, int]:
    """Return the lengths of the axes that a model determines, by the names used in layouts.

    The axis ``ranks`` has one element for each process of a tensor-parallel engine; ``rank_heads``, ``rank_kv_heads``
    and ``rank_intermediate`` are the lengths in one process.
    """
    each = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
            "intermediate": config.intermediate_size}  # fmt: skip
    return {f"rank_{axis}": length // ranks for axis, length in each.items()} | {
        **each, "head_dim": config.head_dim, "hidden": config.hidden_size, "vocab": config.vocab_size,
        "groups": config.num_attention_heads // config.num_key_value_heads,
    }  # fmt: skip


def arrange(x: Array, rule: Rule, config: Gemma2Config) -> Array:
    """Return one tensor with refgemma's axes.

    Raises
    ------
    InputError
        If the tensor's axes do not fit the rule.

    Examples
    --------
    >>> rule = Rule("x", "layers.0.attention.q", "batch seq (heads head_dim) -> batch heads seq head_dim")
    >>> arrange(np.zeros((1, 3, 2048)), rule, Gemma2Config.preset("2b")).shape
    (1, 8, 3, 256)
    """
    lengths = axis_lengths(config, x.shape[0] if rule.layout.startswith("ranks ") and x.ndim and x.shape[0] else 1)
    if rule.layout:
        x = _rearrange(x, rule.layout, lengths)
    if rule.part:
        sizes = [lengths[axis] for axis in rule.part[1:]]
        if x.shape[1] != sum(sizes):
            raise InputError(f"has {pluralise(x.shape[1], 'head')}; it must have {sum(sizes)}")
        x = np.split(x, np.cumsum(sizes)[:-1], axis=1)[int(rule.part[0])]
    return _rearrange(x, rule.then, lengths) if rule.then else x


def _rearrange(x: Array, layout: str, lengths: Mapping[str, int]) -> Array:
    before = layout.split("->")[0]
    words = re.findall(r"\w+", before)
    try:
        found: Array = einops.rearrange(x, layout, **{axis: n for axis, n in lengths.items() if axis in words})
    except (einops.EinopsError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"has shape {x.shape}, which does not fit {before!r} ({reason})") from None
    return found


def _arrange_entry(entry: Entry, rule: Rule, config: Gemma2Config, seq: int) -> Entry:
    """Return the entry with refgemma's axes, without reading it; keep the axes if they do not fit the rule."""
    try:
        shape = arrange(np.broadcast_to(np.zeros((), np.int8), entry.shape), rule, config).shape
    except InputError:
        return replace(entry)
    rows = seq if rule.last and len(shape) > 1 and shape[-2] == 1 < seq else shape[-2] if len(shape) > 1 else 0
    alone = len(shape) > 1 and rows != shape[-2]
    keys = min(seq, shape[-1]) if rule.more_keys and shape and seq else None
    shape = shape if keys is None else (*shape[:-1], keys)

    def place(x: Array, fill: Any) -> Array:
        own = arrange(x, rule, config)[..., :keys]
        if not alone:
            return own
        whole = np.full((*shape[:-2], rows, shape[-1]), fill, own.dtype)
        whole[..., -1:, :] = own
        return whole

    def read_known() -> Array:
        return place(np.ones(entry.shape, bool) if entry.known is None else entry.known(), False)

    return replace(
        entry, shape=(*shape[:-2], rows, shape[-1]) if alone else shape, read=lambda: place(entry.read(), 0),
        known=read_known if alone or entry.known is not None else None,
    )  # fmt: skip


def open_any(path: str | Path) -> TraceFile:
    """Open a safetensors file, the output of ``llama-eval-callback``, or a folder of a dumper that is known."""
    if ranks := find_ranks(path):
        return open_ranks(ranks)
    if (tree := find_debug_tree(path)) is not None:
        return open_debug_tree(tree)
    return open_eval_callback(path) if is_eval_callback(is_there(path)) else open_safetensors(path)


def open_trace(path: str | Path, config: Gemma2Config, name_map: str | None = None) -> TraceFile:
    """Open a candidate's file with refgemma's names.

    Parameters
    ----------
    path : str or path
        A safetensors file, the text of ``llama-eval-callback``, or a folder of ``model_addition_debugger_context`` or
        of SGLang's tensor dumps.
    config : Gemma2Config
        The model's configuration, which gives the lengths of the axes.
    name_map : str, optional
        The map for the names; by default the ``map`` in the metadata, or else refgemma's own names.
    """
    file = open_any(path)
    chosen = name_map or file.metadata.get("map")
    if not name_map and chosen and chosen not in map_names():  # a file must not choose which other file is opened
        raise InputError(f"{path}: the metadata names the map {quote(chosen)}; to use this map, pass it with --map")
    return apply_map(file, load_map(chosen), config) if chosen else file
