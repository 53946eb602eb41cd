"""Test damaged and invented files: only documented errors, no crash, no hang, limited memory.

``tools/fuzz/readers.py`` has the readers, and can run them under atheris; faults that were found are tests here.
"""

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from fuzz.readers import (
    CHECKPOINT,
    CONFIG,
    EVAL_TEXT,
    INDEX,
    JOBS,
    MODEL,
    NAME_MAP,
    RULES,
    SETTINGS,
    TARGETS,
    TOKENIZER_JSON,
    pickled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from refgemma.trace.names import FIELDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # an example takes some milliseconds

EXAMPLES = settings(max_examples=60)
MEMORY = 2**26  # bytes: the files here have some kilobytes


def ask(name: str, content: bytes) -> None:
    """Read the content; do not catch undocumented errors."""
    tracemalloc.start()
    try:
        TARGETS[name](content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY + 100 * len(content)


# --- bytes ------------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Draw a file with some bytes changed, inserted, removed, doubled, or cut off."""
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        end = min(len(raw), at + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["change", "insert", "delete", "double", "cut", "number"])):
            case "change":
                new = draw(st.binary(min_size=1, max_size=8))
                raw[at : at + len(new)] = new
            case "insert":
                raw[at:at] = draw(st.binary(max_size=40))
            case "delete":
                del raw[at:end]
            case "double":
                raw[at:at] = raw[at:end]
            case "cut":
                del raw[at:]
            case "number":
                number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
                raw[at : at + 8] = struct.pack("<Q", number)
    return bytes(raw)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name: str) -> None:
    @EXAMPLES
    @given(damaged(TARGETS[name].seeds))
    def try_it(content: bytes) -> None:
        ask(name, content)

    try_it()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    @settings(max_examples=20)
    @given(st.binary(max_size=200))
    def try_it(content: bytes) -> None:
        ask(name, content)

    try_it()


# --- JSON -------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, 1e308, True]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def edited(draw: st.DrawFn, text: bytes) -> Any:
    """Draw a JSON object with some values replaced at any depth."""
    top = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        place, kept = top, []
        while isinstance(place, dict | list) and len(place):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            kept.append((place, key))
            place = place[key]
        if kept:
            into, key = draw(st.sampled_from(kept))
            into[key] = draw(JSON)
    return top


@pytest.mark.filterwarnings("ignore:.*tokenizer_class is ")  # of another model: read as Gemma's, and said
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config", CONFIG),
        ("index", INDEX),
        ("tokenizer-settings", SETTINGS),
        ("map", NAME_MAP),
        ("tokenizer-json", TOKENIZER_JSON),
    ]
    + [("jobs", line) for line in JOBS.splitlines()]
    + [("generation", seed) for seed in TARGETS["generation"].seeds],
)
def test_other_values_in_json(name: str, text: bytes) -> None:
    @EXAMPLES
    @given(edited(text))
    def try_it(content: Any) -> None:
        ask(name, json.dumps(content).encode("utf-8", "surrogatepass"))

    try_it()


@pytest.mark.parametrize(
    "name", ["config", "index", "generation", "tokenizer-settings", "tokenizer-json", "map", "jobs"]
)
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'{"vocab_size": 1e999}', b"\xff"]
)
def test_json_without_end(name: str, content: bytes) -> None:
    ask(name, content)


HEADER = CHECKPOINT[8 : 8 + int.from_bytes(CHECKPOINT[:8], "little")]


@pytest.mark.parametrize("name", ["header", "checkpoint"])
def test_other_values_in_a_header(name: str) -> None:
    @EXAMPLES
    @given(edited(HEADER))
    def try_it(header: Any) -> None:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        ask(name, struct.pack("<Q", len(text)) + text + CHECKPOINT[8 + len(HEADER) :])

    try_it()


# --- candidates -------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5]), max_size=4).map(tuple)
DTYPES = st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_])
NAMES = st.one_of(
    st.sampled_from(["input_ids", "attention_mask", "position_ids", "logits", "embedded", "cos", "calls", "x"]),
    st.builds("layers.{}.{}".format, st.integers(-1, 2), st.sampled_from(FIELDS)),
    st.builds("calls.{}.{}".format, st.integers(0, 2), st.sampled_from([*FIELDS, "layers.0.attention.probs", ""])),
    st.text(max_size=6),
)
TENSOR = st.builds(lambda shape, dtype, value: np.full(shape, value).astype(dtype), SHAPES, DTYPES, st.integers(0, 4))
METADATA = st.dictionaries(
    st.sampled_from(["dtype", "calls", "engine", "x"]),
    st.sampled_from(
        ["float32", "bfloat16", "[1, 2]", "[3]", "[-1, 4]", "[]", "{}", "[1e999]", "[true, 2]", "NaN", "[" * 9999]
    ),
)


@settings(max_examples=200)
@given(st.dictionaries(NAMES, TENSOR, max_size=5), METADATA, st.booleans())
def test_made_up_candidates(tensors: dict[str, Any], metadata: dict[str, str], whole: bool) -> None:
    ids = {"input_ids": np.array([[2, 3, 4]])} if whole else {}
    with np.errstate(all="ignore"):
        ask("candidate", save(tensors | ids, metadata or None))


# --- what was found ---------------------------------------------------------------------------------------------------


def config_with(**values: Any) -> bytes:
    return json.dumps(json.loads(CONFIG) | values).encode()


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def map_with(**values: Any) -> bytes:
    return json.dumps(json.loads(NAME_MAP) | {"rules": [RULES[0] | values]}).encode()


def candidate_with(calls: str) -> bytes:
    return save({"input_ids": np.array([[2, 3, 4]]), "logits": np.ones((1, 3, 5), np.float32)}, {"calls": calls})


def size_bomb() -> bytes:
    """Return a pickle that makes a shape from a long list repeatedly; each was a copy."""
    opening = b"\x80\x02](" + b"K\x01" * 50_000 + b"eq\x00" + b"ctorch\nSize\nq\x01"
    return opening + b"h\x01h\x00\x85R" * 400 + b"."


def many_arguments() -> bytes:
    """Return a pickle that repeatedly calls something with ten thousand arguments; each call copies the arguments."""
    return b"\x80\x02(" + b"N" * 10_000 + b"tq\x00ctorch\ndevice\nq\x01" + b"h\x01h\x00R" * 50_000 + b"."


FOUND = {
    "list for a name": ("config", config_with(hidden_activation=["gelu"])),
    "mapping for a name": ("config", config_with(hidden_activation={"name": "gelu"})),
    "layers without end": ("config", config_with(num_hidden_layers=2**31 - 1, layer_types=None)),
    "long label": ("config", config_with(id2label={"1" * 5000: "a"})),
    "a name of 300 MB": ("map", map_with(tensor="{layer:>300000000}")),
    "an attribute in a name": ("map", map_with(tensor="{0.__class__}")),
    "a pattern that takes for ever": ("map", map_with(pattern="*a" * 12)),
    "a group twice": ("map", map_with(pattern="{layer}.{layer}")),
    "a part that is not there": ("map", map_with(part=["7", "heads"])),
    "a size of which too few numbers are printed": (
        "eval-text",
        EVAL_TEXT.replace("{5, 1, 1, 1}", "{100000000, 1, 1, 1}").encode(),
    ),
    "rows that are not printed": ("eval-text", EVAL_TEXT.replace("{5, 1, 1, 1}", "{5, 1, 1, 100000000}").encode()),
    "half a shape": ("eval-text", EVAL_TEXT.replace("{5, 1, 1, 1}", "{5, , 1}").encode()),
    "a token that is cut off": ("eval-text", EVAL_TEXT.replace("I   3", "").encode()),
    "1.6e9 jobs": ("jobs", json.dumps(dict.fromkeys(["trace", "dtype", "map", "weights"], ["x"] * 200)).encode()),
    "NUL in a name": ("jobs", b'{"trace": "a\\u0000.safetensors"}'),
    "half a character in a name": ("jobs", b'{"trace": "a\\ud800.safetensors"}'),
    "infinite call": ("candidate", candidate_with("[1e999]")),
    "deep calls": ("candidate", candidate_with("[" * 100_000)),
    "copies of a shape": ("pickle", size_bomb()),
    "many arguments of a call": ("pickle", many_arguments()),
    "a million opcodes": ("pickle", pickled()[:-1] + b"Nb" * 2**19 + b"."),
    "500 levels": ("index", json.dumps(json.loads(INDEX) | {"metadata": deep(500)}).encode()),
    "a factor beyond all numbers": ("jobs", b'{"trace": "a.safetensors", "allow": 1' + b"0" * 400 + b"}"),
    "a piece is no text": ("tokenizer-model", MODEL.replace(b"the", b"t\xc2e", 1)),
    "the piece of a byte is no text": ("tokenizer-model", MODEL.replace(b"<0xB5>", b"<0x\xc25>", 1)),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what: str) -> None:
    name, content = FOUND[what]
    ask(name, content)
    assert TARGETS[name](content) is None  # it is refused


def test_a_large_tensor_of_which_six_numbers_are_printed_takes_no_memory() -> None:
    text = EVAL_TEXT.replace("{5, 1, 1, 1}", "{100000000, 1, 1, 1}").replace("-0.0515,  0.5", "-0.0515,  0.5, 0.25")
    ask("eval-text", text.encode())
    assert len(TARGETS["eval-text"](text.encode())) == 2  # it is read, but for the numbers


def test_whole_files_are_still_read() -> None:
    # Were every file refused, all of the above would pass.
    read = {name for name, target in TARGETS.items() if target(target.seeds[0]) is not None}
    assert read == set(TARGETS)
