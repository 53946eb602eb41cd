"""Test reading checkpoints: equal to safetensors' own loader, never resident when streamed, clear errors."""

import json
import math
import struct
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refgemma.config import ConfigError, Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.precision import Array, dtype_name
from refgemma.weights import library_names
from refgemma.weights import stored as module
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint, read_header
from refgemma.weights.parameters import tensor_shapes

CONFIG = Gemma2Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    query_pre_attn_scalar=12,
    sliding_window=5,
)
EMBED = "model.embed_tokens.weight"
VICTIM = "model.layers.1.mlp.up_proj.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
READ = ["float64", "float32", "float16", "bfloat16"]

Tensors = dict[str, Array]
Header = dict[str, Any]


# -- building checkpoints, whole and damaged -------------------------------------------------------------------------


def random_tensors(dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(8)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in tensor_shapes(CONFIG).items()}


def write_config(folder: Path, config: Gemma2Config = CONFIG) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def write_single(folder: Path, tensors: Tensors) -> Path:
    write_config(folder)
    save_file(tensors, folder / FILE, metadata={"format": "np"})
    return folder


def write_shards(folder: Path, tensors: Tensors, count: int = 3) -> Path:
    """Distribute the tensors to `count` shards, so that a layer's tensors are in several shards."""
    write_config(folder)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    weight_map = {name: names[position % count] for position, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def data_start(raw: bytes) -> int:
    return 8 + int(struct.unpack("<Q", raw[:8])[0])


def split(file: Path) -> tuple[Header, bytes]:
    raw = file.read_bytes()
    return json.loads(raw[8 : data_start(raw)]), raw[data_start(raw) :]


def join(file: Path, header: Header | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def bits(x: Array) -> bytes:
    return x.tobytes()


# -- what is read is what was written --------------------------------------------------------------------------------


def rounded_to_bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even, by the bits; refgemma uses another method."""
    pattern = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    kept = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16 << 16
    return kept.astype(np.uint32).view(np.float32)


EXPECTED: dict[str, Callable[[Array], Array]] = {
    "float64": lambda x: x.astype(np.float64),
    "float32": lambda x: x.astype(np.float32),
    "float16": lambda x: x.astype(np.float32).astype(np.float16).astype(np.float32),
    "bfloat16": rounded_to_bfloat16,
}


@pytest.mark.parametrize("write", [write_single, write_shards])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", READ)
def test_reads_what_safetensors_reads(tmp_path: Path, write: Any, stored: Any, dtype: str) -> None:
    tensors = random_tensors(stored)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20])  # between two bfloat16 numbers
    tensors[VICTIM][0, :4] = ties.astype(stored)
    folder = write(tmp_path, tensors)
    loaded: Tensors = {}
    for file in folder.glob("*.safetensors"):
        loaded |= load_file(file)
    found = open_checkpoint(folder)
    assert list(found.tensors) == list(tensor_shapes(CONFIG))
    for name, tensor in found.tensors.items():
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, np.dtype(stored), loaded[name].shape)
        assert bits(tensor.map()) == bits(tensors[name])
        assert dtype_name(tensor.read(dtype)) == dtype
        assert bits(tensor.read(dtype)) == bits(EXPECTED[dtype](loaded[name]))


FIELDS = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_every_tensor_reaches_its_field(tmp_path: Path, way: str) -> None:
    tensors = random_tensors()
    weights = getattr(open_checkpoint(write_single(tmp_path, tensors)), way)()
    assert len(weights.layers) == 3
    for number, layer in enumerate(weights.layers):
        for field, name in FIELDS.items():
            assert bits(getattr(layer, field)) == bits(tensors[f"model.layers.{number}.{name}.weight"])
    assert bits(weights.norm) == bits(tensors["model.norm.weight"])
    assert bits(weights.embed_tokens[:]) == bits(tensors[EMBED])


@pytest.mark.parametrize("dtype", READ)
def test_streamed_is_resident(tmp_path: Path, dtype: str) -> None:
    found = open_checkpoint(write_shards(tmp_path, random_tensors(np.float32)))
    resident, streamed = found.resident(dtype), found.streamed(dtype)
    assert resident.embed_tokens.shape == streamed.embed_tokens.shape == (61, 24)
    pairs = [(resident.norm, streamed.norm), (resident.embed_tokens[:], streamed.embed_tokens[:])]
    for own, other in zip(resident.layers, streamed.layers, strict=True):
        pairs += [(getattr(own, field), getattr(other, field)) for field in FIELDS]
    assert len(pairs) == 35
    for own, other in pairs:
        assert (dtype_name(own), dtype_name(other), own.shape) == (dtype, dtype, other.shape)
        assert bits(own) == bits(other)


@pytest.mark.parametrize("padding", [1, 2, 3, 5])
@pytest.mark.parametrize("stored", STORED)
def test_data_may_start_anywhere(tmp_path: Path, stored: Any, padding: int) -> None:
    tensors = random_tensors(stored)
    file = write_single(tmp_path, tensors) / FILE
    header, data = split(file)
    text = json.dumps(header).encode()
    join(file, text + b" " * (-len(text) % 8 + padding), data)
    found = open_checkpoint(tmp_path)
    assert found.tensors[VICTIM].start % 2 == padding % 2
    for name, tensor in found.tensors.items():
        assert bits(tensor.read("float64")) == bits(tensors[name].astype(np.float64))
    rows = np.array([[60, 3]])
    assert bits(found.streamed().embed_tokens[rows]) == bits(tensors[EMBED][rows].astype(np.float32))


def test_sizes(tmp_path: Path) -> None:
    found = open_checkpoint(write_single(tmp_path, random_tensors(np.float16)))
    # The embedding, the last norm, and of each layer four norms, four projections and three of the feed-forward.
    count = 61 * 24 + 24 + 3 * (4 * 24 + 2 * 40 * 24 + 2 * 20 * 24 + 3 * 56 * 24)
    assert (found.parameters, found.nbytes) == (count, 2 * count)
    assert (found.folder, found.config) == (tmp_path, CONFIG)
    assert len(repr(found)) < 1500  # without its tensors


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, random_tensors(np.float16))
    write_single(tmp_path, random_tensors(np.float32))
    assert open_checkpoint(str(tmp_path)).tensors[EMBED].dtype == np.float32


def test_an_unknown_precision_is_named(tmp_path: Path) -> None:
    found = open_checkpoint(write_single(tmp_path, random_tensors()))
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        found.streamed("int8")


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(5, 11),
        slice(-3, None),
        slice(50, 2, -7),
        slice(4, 4),
        np.array([7, 7, 0, 60]),
        np.array([[2, -1, 3], [0, 1, 2]]),
        np.array([], np.int64),
        np.array([3, 4], np.uint8),
        5,
    ],
    ids=str,
)
def test_rows_are_those_of_an_array(tmp_path: Path, rows: Any, dtype: str) -> None:
    found = open_checkpoint(write_single(tmp_path, random_tensors()))
    own, other = found.resident(dtype).embed_tokens[rows], found.streamed(dtype).embed_tokens[rows]
    assert (own.shape, dtype_name(own), bits(own)) == (other.shape, dtype_name(other), bits(other))
    assert own.shape == np.zeros((61, 24))[rows].shape


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    rows = open_checkpoint(write_single(tmp_path, random_tensors())).streamed().embed_tokens
    with pytest.raises(IndexError, match="61"):
        rows[np.array([0, 61])]
    with pytest.raises(TypeError, match="a slice or an array"):
        rows[:, 3]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_layers_are_a_sequence(tmp_path: Path) -> None:
    tensors = random_tensors()
    layers = open_checkpoint(write_single(tmp_path, tensors)).streamed().layers
    assert len(layers[1:]) == 2
    for layer in (layers[1], layers[-2], layers[1:][0], layers[::-1][1]):
        assert bits(layer.up_proj) == bits(tensors[VICTIM])
    for position in (3, -4):
        with pytest.raises(IndexError, match=f"layer {position} does not exist; the model has 3 layers"):
            layers[position]


def test_a_streamed_layer_is_read_each_time_and_not_kept(tmp_path: Path) -> None:
    layers = open_checkpoint(write_single(tmp_path, random_tensors())).streamed().layers
    first = layers[0]
    assert layers[0] is not first
    assert not np.shares_memory(layers[0].q_proj, first.q_proj)
    seen = weakref.ref(first)
    matrix = weakref.ref(first.q_proj)
    del first
    assert (seen(), matrix()) == (None, None)


def peak(action: Callable[[], object]) -> int:
    """Return the peak of bytes that NumPy and Python allocate while `action` runs."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_streaming_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    many = replace(CONFIG, num_hidden_layers=12, layer_types=None, hidden_size=240)
    write_config(tmp_path, many)
    tensors = {name: np.ones(shape, np.float16) for name, shape in tensor_shapes(many).items()}
    save_file(tensors, tmp_path / FILE)
    streamed = open_checkpoint(tmp_path).streamed()

    def sweep() -> None:
        for layer in streamed.layers:
            assert layer.q_proj[0, 0] == 1
            del layer  # or it would live until the next one has been read

    one_layer = sum(x.size * 4 for name, x in tensors.items() if ".layers.0." in name)
    # The layer itself, and room for one tensor's conversion: half of what a second layer would take.
    assert one_layer <= peak(sweep) < 1.5 * one_layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_conversion_needs_the_result_and_little_more(tmp_path: Path, dtype: str) -> None:
    save_file({"matrix": np.ones((3000, 1001), np.float16)}, tmp_path / "one.safetensors")
    stored = read_header(tmp_path / "one.safetensors")["matrix"]
    result = 3000 * 1001 * 4
    # A block is 1 MB in float32, and up to three copies are alive at once; one of the whole would add `result`, 12 MB.
    assert result <= peak(lambda: stored.read(dtype)) < result + 4_000_000


def test_a_27b_is_opened_without_being_read(tmp_path: Path) -> None:
    # 54 GB that take no room on the disk: a file with a hole. Only its header and two numbers are written.
    config = Gemma2Config.preset("27b")
    write_config(tmp_path, config)
    header, end = {}, 0
    for name, shape in tensor_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    join(tmp_path / FILE, header, b"")
    header_bytes = (tmp_path / FILE).stat().st_size
    with (tmp_path / FILE).open("r+b") as stream:
        stream.truncate(header_bytes + end)
        stream.seek(header_bytes + (255_999 * 4608 + 7) * 2)
        stream.write(np.array(2.5, ml_dtypes.bfloat16).tobytes())
        stream.seek(-2, 2)  # the last number of the last norm
        stream.write(np.array(-3, ml_dtypes.bfloat16).tobytes())

    def use() -> None:
        found = open_checkpoint(tmp_path)
        assert (found.nbytes, found.parameters) == (54_454_256_640, 27_227_128_320)
        weights = found.streamed("bfloat16")
        assert weights.norm[-1] == -3
        rows = weights.embed_tokens[np.array([[0, 255_999]])]
        assert (rows[0, 1, 7], rows.sum()) == (2.5, 2.5)

    assert peak(use) < 10_000_000  # the 509 headers; a layer alone would be 1.1 GB


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_without_model_in_front(tmp_path: Path) -> None:
    tensors = random_tensors()
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    found = open_checkpoint(write_single(tmp_path, bare))
    assert list(found.tensors) == list(tensors)
    assert found.tensors[VICTIM].name == VICTIM.removeprefix("model.")
    assert bits(found.resident().layers[1].up_proj) == bits(tensors[VICTIM])


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = random_tensors()
    message = refusal(write_single(tmp_path, tensors | {"norm.weight": tensors["model.norm.weight"]}))
    assert FILE in message
    assert "'norm.weight' is also stored as 'model.norm.weight'" in message or (
        "'model.norm.weight' is also stored as 'norm.weight'" in message
    )


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_of_a_classifier_is_kept(tmp_path: Path, bias: bool) -> None:
    head: Tensors = {"score.weight": np.full((5, 24), 0.5, np.float32)}
    head |= {"score.bias": np.full(5, 0.25, np.float32)} if bias else {}
    tensors = random_tensors()
    found = open_checkpoint(write_single(tmp_path, tensors | head))
    assert list(found.tensors) == [*tensors, *head]
    assert found.parameters == sum(x.size for x in tensors.values()) + sum(x.size for x in head.values())
    for name, tensor in head.items():
        assert bits(found.tensors[name].read("float32")) == bits(tensor)
    assert found.resident().norm.shape == (24,)


@pytest.mark.parametrize(
    "shapes",
    [
        {"score.weight": (24, 5)},
        {"score.weight": (24,)},
        {"score.weight": (0, 24)},
        {"score.weight": (5, 24), "score.bias": (4,)},
        {"score.bias": (5,)},
    ],
    ids=str,
)
def test_a_head_of_the_wrong_shape(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    head = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    found = open_checkpoint(write_single(tmp_path, random_tensors() | head))
    with pytest.raises(CheckpointError) as caught:  # a language model does not read it
        found.score()
    culprit = list(shapes)[-1]
    assert f"{FILE}: tensor '{culprit}' is {list(shapes[culprit])}; with hidden_size 24" in str(caught.value)


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_a_tied_head_may_be_stored_again(tmp_path: Path, write: Any) -> None:
    tensors = random_tensors()
    found = open_checkpoint(write(tmp_path, tensors | {"lm_head.weight": tensors[EMBED].copy()}))
    assert list(found.tensors) == list(tensors)  # once, so that parameters and nbytes are the model's


@pytest.mark.parametrize("row", [0, 33, 60])
def test_a_head_of_its_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    monkeypatch.setattr(
        library_names, "NUMBERS_AT_ONCE", 24 * 7
    )  # seven rows, so that `row` is in the first, a middle, the last block
    tensors = random_tensors()
    head = tensors[EMBED].copy()
    head[row, 23] = np.nextafter(head[row, 23], np.float32(9))
    folder = write_single(tmp_path, tensors | {"lm_head.weight": head})
    with pytest.warns(UserWarning, match=f"{FILE}: tensor 'lm_head.weight' differs from '{EMBED}'"):
        found = open_checkpoint(folder)
    assert not found.config.tie_word_embeddings
    assert bits(found.resident().head[:]) == bits(head)


def test_a_tied_head_in_a_wider_dtype(tmp_path: Path) -> None:
    tensors = random_tensors()
    found = open_checkpoint(write_single(tmp_path, tensors | {"lm_head.weight": tensors[EMBED].astype(np.float64)}))
    assert list(found.tensors) == list(tensors)


def test_a_head_that_cannot_be_the_embedding(tmp_path: Path) -> None:
    message = refusal(write_single(tmp_path, random_tensors() | {"lm_head.weight": np.ones((60, 24), np.float32)}))
    assert f"{FILE}: tensor 'lm_head.weight' is [60, 24], but it is tied to '{EMBED}', which is [61, 24]" in message


def test_missing_tensors_are_counted(tmp_path: Path) -> None:
    whole = random_tensors()
    tensors = {name: tensor for name, tensor in whole.items() if "layers.2" not in name}
    message = refusal(write_single(tmp_path, tensors))
    first = [f"'model.layers.2.{name}.weight'" for name in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")]
    assert f"{FILE}: lacks 11 of 35 tensors: {', '.join(first)} and 8 more" in message
    assert "config.json (3 layers)" in message


def test_extra_tensors_are_named(tmp_path: Path) -> None:
    extra = {"model.layers.3.mlp.up_proj.weight": np.ones((56, 24), np.float32), "x": np.ones(1, np.float32)}
    message = refusal(write_shards(tmp_path, random_tensors() | extra))
    assert f"{INDEX}: has 2 tensors that Gemma 2 does not have" in message
    assert all(f"'{name}'" in message for name in extra)


def test_names_of_another_model(tmp_path: Path) -> None:
    message = refusal(write_single(tmp_path, {"transformer.wte.weight": np.ones((2, 2), np.float32)}))
    assert "lacks 35 of 35 tensors" in message
    assert "has 1 tensor that Gemma 2 does not have: 'transformer.wte.weight'" in message


def test_a_misshapen_tensor(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[VICTIM] = np.ascontiguousarray(tensors[VICTIM].T)  # as many bytes, so only the shape tells
    message = refusal(write_single(tmp_path, tensors))
    assert f"{FILE}: tensor '{VICTIM}' is [24, 56]; according to config.json it must be [56, 24]" in message


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_a_bad_weight_is_found_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, bad: float, way: str
) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 100)  # the bad number is in a later block
    tensors = random_tensors(stored)
    tensors[VICTIM][7, 3] = tensors[VICTIM][55, 0] = bad
    folder = write_shards(tmp_path, tensors)
    shard = next(file for file in folder.glob("*.safetensors") if VICTIM in load_file(file))
    found = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        list(getattr(found, way)("bfloat16").layers)
    assert str(caught.value).startswith(f"{shard}: tensor '{VICTIM}', index [7, 3]: {bad} is not a finite number")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_a_bad_weight_in_a_norm(tmp_path: Path, name: str) -> None:
    tensors = random_tensors()
    tensors[name][23] = np.nan
    found = open_checkpoint(write_single(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"tensor '" + name + r"', index \[23\]: nan"):
        list(found.streamed().layers)


@pytest.mark.parametrize(
    "rows",
    [slice(2, 9), slice(50, None, -2), np.array([3, 8, 8]), np.array([[1, 2], [8, 4]]), 8, -53],
    ids=str,
)
def test_a_bad_weight_in_a_row(tmp_path: Path, rows: Any) -> None:
    tensors = random_tensors()
    tensors[EMBED][8, 5] = np.inf
    table = open_checkpoint(write_single(tmp_path, tensors)).streamed().embed_tokens
    assert table[9:].shape == (52, 24)  # only what is read is checked
    with pytest.raises(CheckpointError, match=r"index \[8, 5\]: inf is not a finite number"):
        table[rows]


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "wider"),
    [
        (np.float32, 70000.0, "float16", "float32"),
        (ml_dtypes.bfloat16, 2.0**100, "float16", "bfloat16"),
        (np.float32, np.finfo(np.float32).max, "bfloat16", "float32"),
        (np.float64, 1e300, "float32", "float64"),
        (np.float64, -1e300, "bfloat16", "float64"),
    ],
)
def test_a_weight_too_large_for_the_precision(
    tmp_path: Path, stored: Any, value: float, dtype: str, wider: str
) -> None:
    tensors = random_tensors(stored)
    tensors[VICTIM][0, 2] = value
    found = open_checkpoint(write_single(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=rf"index \[0, 2\]: .* is beyond the largest {dtype}; .* wider dtype"):
        found.resident(dtype)
    assert float(found.resident(wider).layers[1].up_proj[0, 2]) == float(tensors[VICTIM][0, 2])


# -- folders and files -----------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'}: there is no such folder"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = write_single(tmp_path, random_tensors()) / FILE
    assert refusal(file) == f"{file}: is a file; give its folder"


def test_no_config(tmp_path: Path) -> None:
    (write_single(tmp_path, random_tensors()) / "config.json").unlink()
    assert f"{tmp_path}: has no config.json" in refusal(tmp_path)


def test_a_bad_config(tmp_path: Path) -> None:
    (write_single(tmp_path, random_tensors()) / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"config.json: model_type is 'llama'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "has no weights, neither model.safetensors nor"),
        (
            ["pytorch_model.bin"],
            "has no model.safetensors, but PyTorch's pickles 'pytorch_model.bin'; convert these",
        ),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "refgemma convert"),
        (["model-00001-of-00002.safetensors"], "has neither model.safetensors nor model.safetensors.index.json, but"),
    ],
)
def test_no_weights(tmp_path: Path, files: list[str], words: str) -> None:
    write_config(tmp_path)
    for name in files:
        (tmp_path / name).write_bytes(b"\x80\x02")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: has ")
    assert words in message


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4949453792\n"


@pytest.mark.parametrize("name", [FILE, INDEX])
def test_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / name}: is a Git LFS pointer")
    assert "git lfs pull" in message


def test_a_shard_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, random_tensors()) / "model-00002-of-00003.safetensors"
    shard.write_bytes(POINTER)
    assert refusal(tmp_path).startswith(f"{shard}: is a Git LFS pointer")


@pytest.mark.parametrize("name", [FILE, INDEX])
def test_an_unreadable_file(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).mkdir()  # a folder cannot be read by anyone, a file without permissions can be by root
    assert refusal(tmp_path) == f"{tmp_path / name}: cannot be read: Is a directory"


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)

    def denied(self: Path) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(RefgemmaError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Permission denied"


@pytest.mark.parametrize("change", [b"longer", None])
def test_a_file_that_changes_while_it_is_open(tmp_path: Path, change: bytes | None) -> None:
    file = write_single(tmp_path, random_tensors()) / FILE
    layers = open_checkpoint(tmp_path).streamed().layers
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] if change is None else whole + change)
    with pytest.raises(CheckpointError, match=f"had {len(whole)} bytes when opened"):
        layers[0]


def test_a_kept_map_is_one_map_and_of_a_file_that_is_whole(tmp_path: Path) -> None:
    file = write_single(tmp_path, random_tensors()) / FILE
    tensor = open_checkpoint(tmp_path).tensors["model.norm.weight"]
    kept = tensor.map(keep=True)
    assert np.shares_memory(kept, tensor.map(keep=True))
    assert not np.shares_memory(kept, tensor.map())
    np.testing.assert_array_equal(kept, tensor.map())
    file.write_bytes(file.read_bytes() + b"longer")
    with pytest.raises(CheckpointError, match="when opened"):
        tensor.map(keep=True)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        tensor.map(keep=True)


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    found = open_checkpoint(write_single(tmp_path, random_tensors()))
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"{FILE}: tensor 'model.norm.weight' cannot be read: No such file"):
        found.resident()


# -- headers ---------------------------------------------------------------------------------------------------------

Damage = Callable[[Header, bytes], tuple[Header | bytes, bytes]]


def entry(**changes: Any) -> Damage:
    """Replace fields of the victim's entry; None removes a field."""

    def damage(header: Header, data: bytes) -> tuple[Header, bytes]:
        changed = header[VICTIM] | changes
        return header | {VICTIM: {key: value for key, value in changed.items() if value is not None}}, data

    return damage


def moved(begin: int, end: int) -> Damage:
    """Move both ends of the victim's data by these numbers of bytes."""
    return lambda header, data: entry(
        data_offsets=[header[VICTIM]["data_offsets"][0] + begin, header[VICTIM]["data_offsets"][1] + end]
    )(header, data)


def twice(header: Header, data: bytes) -> tuple[bytes, bytes]:
    text = json.dumps(header)
    return (text[:-1] + f', "{VICTIM}": ' + json.dumps(header[VICTIM]) + "}").encode(), data


def quantised(header: Header, data: bytes) -> tuple[Header, bytes]:
    """Make each byte of the data a number."""
    return entry(dtype="F8_E4M3", shape=[56, 24 * 4])(header, data)


LAYOUT = "invalid shape, data type, or offset for tensor"  # the library's words, which name no tensor
OFFSET = f"invalid offset for tensor `{VICTIM}`"

# Name of the damage -> the damage, and what the message has to say: the library's reason, or ours.
HEADERS: dict[str, tuple[Damage, str]] = {
    "not JSON": (lambda h, d: (json.dumps(h).encode()[:-1], d), "invalid JSON in header: EOF"),
    "not UTF-8": (lambda h, d: (json.dumps(h).encode().replace(b"up_proj", b"up\xff\xfe\xfdoj"), d), "invalid UTF-8"),
    "UTF-16": (lambda h, d: (json.dumps(h).encode("utf-16"), d), "invalid UTF-8"),
    "a key twice": (twice, f"duplicate key '{VICTIM}'"),
    "a list": (lambda h, d: (b"[1, 2]", d), "invalid type: sequence"),
    "nested without end": (lambda h, d: (b"[" * 100_000, d), "invalid type: sequence"),
    "nested without end, deeper": (lambda h, d: (b'{"a": {"x": ' + b"[" * 100_000, d), "recursion limit"),
    "a number of 5000 digits": (entry(shape=["DIGITS"]), "number out of range"),
    "5000 digits that nobody needs": (entry(more=["DIGITS"]), "number out of range"),
    "metadata a list": (lambda h, d: (h | {"__metadata__": ["np"]}, d), "invalid type: sequence"),
    "metadata a number": (lambda h, d: (h | {"__metadata__": {"a": 1}}, d), "integer `1`, expected a string"),
    "entry a list": (lambda h, d: (h | {VICTIM: [1]}, d), "invalid type: integer `1`"),
    "no dtype": (entry(dtype=None), "missing field `dtype`"),
    "no shape": (entry(shape=None), "missing field `shape`"),
    "no offsets": (entry(data_offsets=None), "missing field `data_offsets`"),
    "dtype of integers": (
        entry(dtype="I32"),
        f"tensor '{VICTIM}': the dtype is 'I32'; it must be one of F64, F32, F16, BF16",
    ),
    "quantised": (
        quantised,
        f"tensor '{VICTIM}': the dtype is float8_e4m3fn, but its weight_scale are missing; dequantise",
    ),
    "dtype a number": (entry(dtype=32), "invalid type: integer `32`"),
    "dtype a list": (entry(dtype=["F32"]), "invalid type: sequence"),
    "shape a number": (entry(shape=56), "invalid type: integer `56`"),
    "shape with a fraction": (entry(shape=[56.0, 24]), "floating point `56.0`"),
    "shape with a truth": (entry(shape=[56 * 24, True]), "boolean `true`"),
    "shape with a word": (entry(shape=["56", 24]), 'string "56"'),
    "negative shape": (entry(shape=[-56, -24]), "integer `-56`"),
    "shape of too many axes": (entry(shape=[56, 24] + [1] * 63), f"tensor '{VICTIM}' has more than 64 axes"),
    "huge shape": (entry(shape=[2**80, 24]), "floating point `1.2089258196146292e"),
    "overflowing shape": (entry(shape=[2**40, 2**40]), "overflow"),
    "offsets a word": (entry(data_offsets="0:8"), 'string "0:8"'),
    "one offset": (entry(data_offsets=[8]), "invalid length 1"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), "invalid length 3"),
    "negative offset": (entry(data_offsets=[-8, 8]), "integer `-8`"),
    "reversed offsets": (entry(data_offsets=[16, 8]), OFFSET),
    "fraction": (entry(data_offsets=[0.0, 8.0]), "floating point `0.0`"),
    "too few bytes": (moved(0, -8), LAYOUT),
    "another shape": (entry(shape=[56, 25]), LAYOUT),
    "half the dtype": (entry(dtype="F16"), LAYOUT),
    "overlap": (moved(-8, -8), OFFSET),
    "hole": (moved(8, 8), OFFSET),
    "outside of the file": (moved(2**40, 2**40), "invalid offset for tensor"),
    "a byte too many": (lambda h, d: (h, d + b"\0"), "file not fully covered"),
    "no tensor": (lambda h, d: ({}, d), "file not fully covered"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header(tmp_path: Path, name: str) -> None:
    damage, words = HEADERS[name]
    file = write_single(tmp_path, random_tensors()) / FILE
    header, data = damage(*split(file))
    if not isinstance(header, bytes):
        header = json.dumps(header).encode().replace(b'"DIGITS"', b"9" * 5000)
    join(file, header, data)
    message = refusal(tmp_path)
    assert message.startswith(str(file))
    assert words in message
    assert message.endswith("write or download the file again") or "dequantise the checkpoint" in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(file))  # however much nonsense the file holds


def test_the_header_of_the_tests_is_read_back(tmp_path: Path) -> None:
    # Were `split` and `join` to spoil the file by themselves, every damage above would be "found".
    tensors = random_tensors()
    file = write_single(tmp_path, tensors) / FILE
    join(file, *split(file))
    assert bits(open_checkpoint(tmp_path).resident().layers[1].up_proj) == bits(tensors[VICTIM])


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 500, -5000, -1])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    file = write_single(tmp_path, random_tensors()) / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    message = refusal(tmp_path)
    assert message.startswith(str(file))
    assert message.endswith("write or download the file again")
    size = len(whole[:kept])
    if size < 8:
        assert "header too small" in message
    elif size < data_start(whole):
        assert "invalid header length" in message
    else:
        assert "file not fully covered" in message


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (100_000_001, "header too large"),
        (2**64 - 1, "header too large"),
        (100_000_000, "invalid header length"),
    ],
)
def test_a_header_of_absurd_length(tmp_path: Path, length: int, words: str) -> None:
    file = write_single(tmp_path, random_tensors()) / FILE
    join(file, *split(file), length=length)
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: is not a complete safetensors file")
    assert words in message


def test_another_format_under_this_name(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / FILE).write_bytes(b"PK\x03\x04" + bytes(range(200)))  # a zip, as torch.save writes
    assert "is not a complete safetensors file" in refusal(tmp_path)


# -- indexes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "duplicate key 'a'"),
        (b"[]", "must be a JSON object, but is a list"),
        (b"{}", "weight_map must be"),
        (b'{"weight_map": []}', "weight_map must be"),
        (b'{"weight_map": {}}', "weight_map must be"),
        (b'{"weight_map": {"a": 3}}', "tensor 'a': the shard is 3"),
        (b'{"weight_map": {"a": ["b.safetensors"]}}', "tensor 'a': the shard is ['b.safetensors']"),
        (b'{"weight_map": {"a": "../b.safetensors"}}', "the shard is '../b.safetensors'; it must be the plain name"),
        (b'{"weight_map": {"a": "/etc/b.safetensors"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "sub/b.safetensors"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "..\\\\b.safetensors"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "C:b.safetensors"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": ".."}}', "it must be the plain name"),
        (b'{"weight_map": {"a": ""}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "b.safetensors\\n"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "\\u0000.safetensors"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "it must be the plain name"),
        (b'{"weight_map": {"a": "%s.safetensors"}}' % (b"b" * 5000), "it must be the plain name"),
        (b'{"weight_map": {"a": "b.safetensors"}}', "lacks 'b.safetensors', of 1 shards"),
    ],
)
def test_a_damaged_index(tmp_path: Path, text: bytes, words: str) -> None:
    write_config(tmp_path)
    (tmp_path / INDEX).write_bytes(text)
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path / INDEX))
    assert words in message
    assert len(message) < 600 + len(str(tmp_path))


def test_an_absent_shard(tmp_path: Path) -> None:
    (write_shards(tmp_path, random_tensors()) / "model-00002-of-00003.safetensors").unlink()
    message = refusal(tmp_path)
    assert f"{INDEX}: the folder lacks 'model-00002-of-00003.safetensors', of 3 shards" in message


def test_a_truncated_shard(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, random_tensors()) / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(tmp_path).startswith(f"{shard}: is not a complete safetensors file")


def test_a_shard_that_lacks_a_tensor(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, random_tensors()) / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    del tensors[EMBED]
    save_file(tensors, shard)
    assert f"{shard}: lacks tensor '{EMBED}', which {INDEX} places there" in refusal(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    write_shards(tmp_path, random_tensors())
    edit_index(tmp_path, lambda weight_map: weight_map.update({EMBED: "model-00002-of-00003.safetensors"}))
    assert f"model-00002-of-00003.safetensors: lacks tensor '{EMBED}'" in refusal(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = random_tensors()
    shard = write_shards(tmp_path, tensors) / "model-00002-of-00003.safetensors"
    save_file(load_file(shard) | {EMBED: tensors[EMBED]}, shard)
    assert f"{shard}: tensor '{EMBED}' is in model-00001-of-00003.safetensors too" in refusal(tmp_path)


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    write_shards(tmp_path, random_tensors())
    edit_index(tmp_path, lambda weight_map: weight_map.pop(EMBED))
    assert f"model-00001-of-00003.safetensors: tensor '{EMBED}' is not in {INDEX}" in refusal(tmp_path)


# -- any damage ------------------------------------------------------------------------------------------------------


def opens_equal_or_is_refused(folder: Path, tensors: Tensors) -> bool:
    """Return True if `folder` was read, and check that it has `tensors`; only two exceptions are allowed."""
    try:
        found = open_checkpoint(folder)
        read = {name: tensor.read("float32") for name, tensor in found.tensors.items()}
    except (CheckpointError, ConfigError):
        return False
    assert list(read) == list(tensors)
    assert all(bits(read[name]) == bits(tensors[name]) for name in read)
    return True


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = write_single(tmp_path_factory.mktemp("single"), random_tensors())
    return folder, (folder / FILE).read_bytes()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = write_shards(tmp_path_factory.mktemp("sharded"), random_tensors())
    return folder, (folder / INDEX).read_bytes()


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4)


def flipped(raw: bytes, end: int, flips: list[tuple[float, int]]) -> bytes:
    """Return `raw` with some bits of its first `end` bytes flipped."""
    damaged = bytearray(raw)
    for place, pattern in flips:
        damaged[int(place * end)] ^= pattern
    return bytes(damaged)


@given(flips=FLIPS, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
@example(flips=[], kept=1.0)
@settings(max_examples=150)
def test_a_file_damaged_at_random(single: tuple[Path, bytes], flips: list[tuple[float, int]], kept: float) -> None:
    folder, raw = single
    damaged = flipped(raw, data_start(raw), flips)
    (folder / FILE).write_bytes(damaged[: int(kept * len(raw))])
    whole = opens_equal_or_is_refused(folder, random_tensors())
    assert whole or flips or kept < 1


@given(flips=FLIPS, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
@example(flips=[], kept=1.0)
@settings(max_examples=100)
def test_an_index_damaged_at_random(sharded: tuple[Path, bytes], flips: list[tuple[float, int]], kept: float) -> None:
    folder, raw = sharded
    (folder / INDEX).write_bytes(flipped(raw, len(raw), flips)[: int(kept * len(raw))])
    whole = opens_equal_or_is_refused(folder, random_tensors())
    assert whole or flips or kept < 1


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("BF16")
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6)
NUMBERS = st.lists(st.integers(-1, 2**70) | st.sampled_from([0, 24, 56, 1344, 5376]), max_size=3)


@given(field=st.sampled_from(["dtype", "shape", "data_offsets", None, "__metadata__"]), value=JSON | NUMBERS)
@example(field="shape", value=[56, 24])
@settings(max_examples=150)
def test_a_header_that_holds_anything(single: tuple[Path, bytes], field: str | None, value: Any) -> None:
    folder, raw = single
    (folder / FILE).write_bytes(raw)
    header, data = split(folder / FILE)
    if field in ("dtype", "shape", "data_offsets"):
        header[VICTIM][field] = value
    else:
        header[VICTIM if field is None else field] = value
    join(folder / FILE, header, data)
    whole = opens_equal_or_is_refused(folder, random_tensors())
    assert whole or (field, value) != ("shape", [56, 24])


@given(everything=st.booleans(), value=JSON)
@settings(max_examples=100)
def test_an_index_that_holds_anything(sharded: tuple[Path, bytes], everything: bool, value: Any) -> None:
    folder, raw = sharded
    index = json.loads(raw)
    if everything:
        index["weight_map"] = value
    else:
        index["weight_map"][VICTIM] = value
    (folder / INDEX).write_text(json.dumps(index))
    assert not opens_equal_or_is_refused(folder, random_tensors())
