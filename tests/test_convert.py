"""Test conversion of original checkpoints: bit for bit there and back, one-line errors for faulty files, and no file
executes anything."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import refgemma.convert.convert as conversion
from refgemma.cli.main import main
from refgemma.cli.output import INTERRUPTED, MISUSE, OK
from refgemma.config import Gemma2Config
from refgemma.convert.convert import TORCH_SHARD, convert, detect_kind, open_source
from refgemma.convert.flax_tree import read_npz, read_tree, write_npz
from refgemma.convert.layouts import flax_layout, hf_layout, pytorch_layout
from refgemma.convert.pickles import read_torch, write_torch
from refgemma.weights import save as writer
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint, read_header, read_shards
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import STAGING, OutputTensor, build_header, write_checkpoint

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 5,
}  # fmt: skip
CONFIG = Gemma2Config(**SHAPE)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def weights(config: Gemma2Config = CONFIG, dtype: str = "bfloat16") -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in tensor_shapes(config).items()}


def write_hf(folder: Path, config: Gemma2Config = CONFIG, dtype: str = "bfloat16") -> dict[str, Any]:
    tensors = weights(config, dtype)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def originals(tensors: dict[str, Any], config: Gemma2Config = CONFIG) -> dict[str, Any]:
    """Return tensors with gemma_pytorch's names from Hugging Face's, without the code under test."""
    made = {"embedder.weight": tensors["model.embed_tokens.weight"], "model.norm.weight": tensors["model.norm.weight"]}
    for n in range(config.num_hidden_layers):
        at = f"model.layers.{n}."
        parts = [tensors[f"{at}self_attn.{x}_proj.weight"] for x in "qkv"]
        made[f"{at}self_attn.qkv_proj.weight"] = np.concatenate(parts)
        names = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm"]
        names += ["post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
        made |= {f"{at}{name}.weight": tensors[f"{at}{name}.weight"] for name in names}
    return made


def flax_tree(tensors: dict[str, Any], transposed: bool, rows: int = 128, w: str = "/w") -> dict[str, Any]:
    """Return tensors with google-deepmind/gemma's names, without the code under test."""
    table = tensors["model.embed_tokens.weight"]
    padded = np.zeros((rows, table.shape[1]), table.dtype)
    padded[: len(table)] = table
    tree = {
        "transformer/embedder/input_embedding": padded,
        "transformer/final_norm/scale": tensors["model.norm.weight"],
    }
    for n in range(CONFIG.num_hidden_layers):

        def get(name: str, n: int = n) -> Any:
            return tensors[f"model.layers.{n}.{name}.weight"]

        at = f"transformer/layer_{n}/"
        q, k, v = (
            np.moveaxis(get(f"self_attn.{x}_proj").reshape(-1, 10, 24), 1, 2) for x in "qkv"
        )  # (heads, hidden, head_dim)
        gates = np.stack([get("mlp.gate_proj"), get("mlp.up_proj")])
        tree |= {
            f"{at}attn/q_einsum/w": q,
            f"{at}attn/kv_einsum/w": np.stack([k, v]),
            f"{at}attn/attn_vec_einsum/w": get("self_attn.o_proj").T.reshape(4, 10, 24),
            f"{at}mlp/gating_einsum{w}": gates if transposed else np.moveaxis(gates, 1, 2),
            f"{at}mlp/linear{w}": get("mlp.down_proj").T,
            f"{at}pre_attention_norm/scale": get("input_layernorm"),
            f"{at}post_attention_norm/scale": get("post_attention_layernorm"),
            f"{at}pre_ffw_norm/scale": get("pre_feedforward_layernorm"),
            f"{at}post_ffw_norm/scale": get("post_feedforward_layernorm"),
        }
    return tree


def outputs(tensors: dict[str, Any]) -> list[OutputTensor]:
    return [OutputTensor(name, x.dtype.name, x.shape, np.ascontiguousarray(x)) for name, x in tensors.items()]


def same(folder: Path, tensors: dict[str, Any]) -> bool:
    found = open_checkpoint(folder).tensors
    return found.keys() == tensors.keys() and all(
        found[name].dtype == x.dtype and found[name].map().tobytes() == x.tobytes() for name, x in tensors.items()
    )


def config_file(folder: Path, config: Gemma2Config = CONFIG) -> Path:
    config.save_pretrained(folder / "given")
    return folder / "given" / "config.json"


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", ["pytorch", "flax", "flax-npz"])
def test_there_and_back(tmp_path: Path, kind: str, dtype: str, limit: int | None) -> None:
    tensors = write_hf(tmp_path / "hf", dtype=dtype)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    convert(tmp_path / "hf", tmp_path / "there", target_format=kind, max_shard_size=limit, vocab_rows=128)
    assert detect_kind(tmp_path / "there") == kind.removesuffix("-npz")
    done = convert(tmp_path / "there", tmp_path / "back", max_shard_size=limit)
    assert (done.source.padding, done.source.nonzero) == (67, 0)
    assert same(tmp_path / "back", tensors)
    assert open_checkpoint(tmp_path / "back").config == CONFIG
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": [1, 7]}
    assert not list(tmp_path.glob(f"*/{STAGING}"))
    if limit and kind != "flax-npz":
        assert len(list((tmp_path / "there").glob("*-of-*"))) > 1


def test_a_pytorch_original_is_read(tmp_path: Path) -> None:
    tensors = weights()
    write_torch(tmp_path / "gemma.ckpt", outputs(originals(tensors)))
    convert(tmp_path / "gemma.ckpt", tmp_path / "hf", config=config_file(tmp_path))
    assert same(tmp_path / "hf", tensors)
    made = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (made["bos_token_id"], made["eos_token_id"], made["pad_token_id"]) == (2, 1, 0)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("form", ["npz", "safetensors", "dots", "no w", "params", "fortran"])
def test_a_flax_tree_is_read(tmp_path: Path, transposed: bool, form: str) -> None:
    tensors = weights()
    tree = flax_tree(tensors, transposed, w="" if form == "no w" else "/w")
    if form == "safetensors":
        source = tmp_path / "params.safetensors"
        save_file({name: np.ascontiguousarray(x) for name, x in tree.items()}, source)
    else:
        source = tmp_path / "params.npz"
        change: dict[str, Callable[[str], str]] = {
            "dots": lambda name: name.replace("/", "."),
            "params": "params/".__add__,
        }
        order: Any = np.asfortranarray if form == "fortran" else np.asarray
        np.savez(source, **{change.get(form, str)(name): order(x) for name, x in tree.items()})
    convert(source, tmp_path / "hf", config=config_file(tmp_path))
    assert same(tmp_path / "hf", tensors)


def test_both_originals_from_one_another(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "flax", target_format="flax", transposed=False)
    convert(tmp_path / "flax", tmp_path / "torch", target_format="pytorch")
    found = read_torch(tmp_path / "torch" / "model.ckpt")
    wanted = originals(tensors)
    assert found.keys() == wanted.keys()
    assert all(found[name].map().tobytes() == x.tobytes() for name, x in wanted.items())


def test_the_tree_is_the_one_of_the_einsums(tmp_path: Path) -> None:
    """The letters come from google-deepmind/gemma's modules.py."""
    tensors = write_hf(tmp_path / "hf", dtype="float64")
    x = np.random.default_rng(1).standard_normal((1, 3, 24))
    for transposed, letters in {True: "BTF,NHF->BTNH", False: "BTF,NFH->BTNH"}.items():
        convert(tmp_path / "hf", tmp_path / letters, target_format="flax", transposed=transposed)
        tree = {n.removeprefix("transformer/layer_1/"): t.map() for n, t in read_tree(tmp_path / letters).items()}
        layer = {n.removeprefix("model.layers.1."): t for n, t in tensors.items()}

        def linear(x: Any, name: str, layer: dict[str, Any] = layer) -> Any:
            return x @ layer[f"{name}.weight"].T

        q = np.einsum("BTD,NDH->BTNH", x, tree["attn/q_einsum/w"])
        np.testing.assert_allclose(q.reshape(1, 3, 40), linear(x, "self_attn.q_proj"))
        k, v = np.einsum("BSD,CKDH->CBSKH", x, tree["attn/kv_einsum/w"])
        np.testing.assert_allclose(k.reshape(1, 3, 20), linear(x, "self_attn.k_proj"))
        np.testing.assert_allclose(v.reshape(1, 3, 20), linear(x, "self_attn.v_proj"))
        out = np.einsum("BTNH,NHD->BTD", q, tree["attn/attn_vec_einsum/w"])
        np.testing.assert_allclose(out, linear(q.reshape(1, 3, 40), "self_attn.o_proj"))
        gate, up = np.moveaxis(np.einsum(letters, x, tree["mlp/gating_einsum/w"]), 2, 0)
        np.testing.assert_allclose(gate, linear(x, "mlp.gate_proj"))
        np.testing.assert_allclose(up, linear(x, "mlp.up_proj"))
        np.testing.assert_allclose(np.einsum("BTH,HF->BTF", up, tree["mlp/linear/w"]), linear(up, "mlp.down_proj"))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_row_is_used_once(kv_heads: int) -> None:
    config = CONFIG.changed(num_key_value_heads=kv_heads)
    for layout in (pytorch_layout(config), flax_layout(config, True), flax_layout(config, False), hf_layout(config)):
        pieces = [piece.name for original in layout for piece in original.pieces]
        assert sorted(pieces) == sorted(tensor_shapes(config))
        assert all(sum(piece.rows for piece in o.pieces) == o.shape[0] for o in layout)
        names = {original.name for original in layout}
        assert any("qkv_einsum" in name for name in names) == (
            kv_heads == 4 and "transformer/final_norm/scale" in names
        )


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_kinds_of_attention(tmp_path: Path, kv_heads: int) -> None:
    tensors = write_hf(tmp_path / "hf", CONFIG.changed(num_key_value_heads=kv_heads))
    for kind in ("flax", "pytorch"):
        convert(tmp_path / "hf", tmp_path / kind, target_format=kind)
        convert(tmp_path / kind, tmp_path / f"{kind} back")
        assert same(tmp_path / f"{kind} back", tensors)


@pytest.mark.parametrize("preset", ["2b", "9b", "27b"])
@pytest.mark.parametrize("kind", ["pytorch", "flax"])
def test_released_sizes_are_known_by_their_shapes(tmp_path: Path, preset: str, kind: str) -> None:
    """The file is sparse and as long as the checkpoint; only the padding of the table is read."""
    wanted = Gemma2Config.preset(preset)
    layout = pytorch_layout(wanted) if kind == "pytorch" else flax_layout(wanted, preset != "2b", 256128)
    start = build_header([OutputTensor(o.name, "bfloat16", o.shape, None) for o in layout])
    total = sum(2 * int(np.prod(o.shape, dtype=np.int64)) for o in layout)
    file = tmp_path / "params.safetensors"
    file.write_bytes(start)
    os.truncate(file, len(start) + total)
    found = read_header(file) if kind == "pytorch" else read_tree(file)
    assert conversion._find_config(tmp_path, found, None) == wanted
    if kind == "flax":
        source = open_source(file)
        assert (source.config, source.padding, source.nonzero) == (wanted, 128, 0)


# --- precision --------------------------------------------------------------------------------------------------------


def test_a_dtype_is_rounded_to_nearest(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", dtype="float32")
    convert(tmp_path / "hf", tmp_path / "torch", target_format="pytorch", dtype="bfloat16")
    convert(tmp_path / "torch", tmp_path / "back")
    assert same(tmp_path / "back", {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()})
    assert open_checkpoint(tmp_path / "back").config.dtype == "bfloat16"


@pytest.mark.parametrize(("value", "dtype", "told"), [
    (1e6, "float16", r"'model.norm.weight': a number is above the largest float16"),
    (np.nan, None, r"'model.norm.weight': has NaN or infinity"),
    (np.inf, "float64", r"'model.norm.weight': has NaN or infinity"),
])  # fmt: skip
def test_what_no_weight_can_be_is_refused(tmp_path: Path, value: float, dtype: str | None, told: str) -> None:
    tensors = weights(dtype="float32")
    tensors["model.norm.weight"][3] = value
    write_torch(tmp_path / "gemma.ckpt", outputs(originals(tensors)))
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "gemma.ckpt", tmp_path / "hf", config=config_file(tmp_path), dtype=dtype)
    assert not list((tmp_path / "hf").glob("*.safetensors"))


# --- what is refused --------------------------------------------------------------------------------------------------


NORM, TABLE, FUSED = "model.norm.weight", "embedder.weight", "model.layers.0.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(("change", "told"), [
    (lambda t: t.pop(NORM), r"lacks 'model.norm.weight'"),
    (lambda t: t.update({"model.layers.2.input_layernorm.weight": t[NORM]}), r"has 'model.layers.2"),
    (lambda t: t.update({"embedder.weight_scaler": t[NORM]}), r"is quantised \('embedder.weight_scaler'"),
    (lambda t: t.update({NORM: t[TABLE]}), r"'model.norm.weight' has shape \(61, 24\); according to the"),
    (lambda t: t.update({TABLE: np.ones((128 + 61, 24), np.float32)}), r"the embedding has 189 rows; it must have 61"),
    (lambda t: t.update({TABLE: np.ones((60, 24), np.float32)}), r"the embedding has 60 rows; it must have 61"),
    (lambda t: t.update({FUSED: np.ones((80, 23), np.float32)}), r"has shape \(80, 23\); according to the"),
])  # fmt: skip
def test_an_original_that_is_another(tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str) -> None:
    tensors = originals(weights(dtype="float32"))
    change(tensors)
    write_torch(tmp_path / "gemma.ckpt", outputs(tensors))
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "gemma.ckpt", tmp_path / "hf", config=config_file(tmp_path))
    assert not (tmp_path / "hf").exists()


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    tree = flax_tree(weights(), True)
    tree["transformer/embedder/input_embedding"][100] = 1
    np.savez(tmp_path / "params.npz", **tree)
    source = open_source(tmp_path, config=config_file(tmp_path))
    assert (source.padding, source.nonzero) == (67, 1)


def test_a_shape_that_does_not_tell_the_layout(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", CONFIG.changed(intermediate_size=24))
    for transposed in (True, False):
        there, back = tmp_path / f"{transposed}", tmp_path / f"{transposed} back"
        convert(tmp_path / "hf", there, target_format="flax", transposed=transposed)
        with pytest.raises(CheckpointError, match="axes of gating_einsum are ambiguous"):
            convert(there, back)
        convert(there, back, transposed=transposed)
        assert same(back, tensors)


def test_no_released_size(tmp_path: Path) -> None:
    write_torch(tmp_path / "gemma.ckpt", outputs(originals(weights())))
    with pytest.raises(
        CheckpointError, match=r"hidden_size 24, num_hidden_layers 2, intermediate_size 56 fits no released"
    ):
        convert(tmp_path, tmp_path / "hf")


@pytest.mark.parametrize(("change", "told"), [
    ({"tie_word_embeddings": False}, "an untied head"), ({"attention_bias": True}, "biases in attention"),
])  # fmt: skip
def test_what_the_originals_have_no_place_for(tmp_path: Path, change: dict[str, bool], told: str) -> None:
    tensors = write_hf(tmp_path / "hf", CONFIG.changed(**change))
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "hf", tmp_path / "there", target_format="pytorch")
    convert(tmp_path / "hf", tmp_path / "again")
    assert same(tmp_path / "again", tensors)


@pytest.mark.parametrize("rows", [60, 100, 256])
def test_rows_that_are_no_padding(tmp_path: Path, rows: int) -> None:
    write_hf(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=rf"vocab_rows is {rows}[,;] .* has 61 tokens"):
        convert(tmp_path / "hf", tmp_path / "there", target_format="flax", vocab_rows=rows)


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("hello, I am a checkpoint")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"a": 1}))
    np.savez_compressed(tmp_path / "small.npz", a=np.zeros(3))
    for name, told in {
        "nothing": "no such file", "empty": "has no checkpoint", "text.ckpt": "is not a checkpoint of torch.save",
        "old.ckpt": r"is a bare pickle or has the format of PyTorch before 1.6", "small.npz": "is compressed",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=told):
            convert(tmp_path / name, tmp_path / "hf")


def test_an_orbax_folder_without_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TensorStore installed, `parity/test_convert_parity.py` tests reading such a folder."""
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_METADATA").write_text("{}")
    monkeypatch.setattr("refgemma.convert.orbax.find_spec", lambda _: None)
    with pytest.raises(
        CheckpointError, match=r"is an Orbax folder; to read it, install .*pip install 'refgemma\[flax\]'"
    ):
        convert(tmp_path / "orbax", tmp_path / "hf")


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "torch", target_format="pytorch", max_shard_size=20_000)
    index = tmp_path / "torch" / "pytorch_model.bin.index.json"
    whole = json.loads(index.read_text())
    first, *_, last = sorted(set(whole["weight_map"].values()))
    assert "model_state_dict" not in str(read_torch(index.parent / first))
    for change, told in [
        ({"embedder.weight": "../outside.bin"}, "it must be the plain name of a weights file"),
        ({"embedder.weight": "pytorch_model-9.bin"}, "the folder lacks 'pytorch_model-9.bin'"),
        ({"another": first}, "lacks tensor 'another', which pytorch_model.bin.index.json places there"),
    ]:
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=told):
            open_source(index.parent)
    index.write_text(json.dumps(whole))
    shutil.copyfile(index.parent / first, index.parent / last)
    with pytest.raises(CheckpointError, match=f"'embedder.weight' is in {first} too"):
        open_source(index.parent)


def test_every_shard_may_hold_the_rotary_table(tmp_path: Path) -> None:
    table = OutputTensor("freqs_cis", "float32", (2, 2), np.ones((2, 2), np.float32))
    for name in ("a", "b"):
        norm = OutputTensor(f"{name}.weight", "float32", (3,), np.full(3, 0.5, np.float32))
        write_torch(tmp_path / f"{name}.bin", [norm, table], None)
    weight_map = {"a.weight": "a.bin", "b.weight": "b.bin", "freqs_cis": "a.bin"}
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = read_shards(tmp_path / "index.json", TORCH_SHARD, read_torch, ("freqs_cis",))
    assert list(found) == ["a.weight", "b.weight"]
    with pytest.raises(CheckpointError, match=r"'freqs_cis' is in a\.bin too"):
        read_shards(tmp_path / "index.json", TORCH_SHARD, read_torch)


# --- pickles that want more than tensors ------------------------------------------------------------------------------


class Calls:
    """An object that is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(path: Path, raw: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/data/0", bytes(64))
    return path


def attacks(mark: Path) -> dict[str, bytes]:
    touch = f"touch {mark}"
    code = f"open({str(mark)!r}, 'w').close()"
    deep = b"\x80\x02" + b"(" * 100_000 + b"t" * 99_999 + b"."
    return {
        "system": pickle.dumps({"model_state_dict": Calls(os.system, touch)}, 2),
        "eval": pickle.dumps(Calls(eval, code), 4),
        "exec, nested": pickle.dumps({"a": [Calls(getattr, Calls(exec, code), "x")]}, 2),
        "old opcode": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "name and reduce": b"cposix\nsystem\nX" + len(touch).to_bytes(4, "little") + touch.encode() + b"\x85R.",
        "a call of a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R)R.",
        "attributes of a class": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
        "attributes through getattr": b"\x80\x02cbuiltins\ngetattr\ncollections\nOrderedDict\n.",
        "the class of a class": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "a persistent id": b"\x80\x02X\x01\x00\x00\x00xQ.",
        "an extension": b"\x80\x02\x82\x01.",
        "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "a huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "a text without end": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "a number without end": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
        "a bomb of depth": deep,
        "a name of depth": b"\x80\x04" + b")" + b"\x85" * 100_000 + b"\x94h\x00\x93.",
        "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "itself as a key": b"\x80\x02}q\x00h\x00h\x00s.",
        "nothing on the stack": b"\x80\x02.",
        "no end": b"\x80\x02}",
        "an empty file": b"",
    }


@pytest.mark.parametrize("name", list(attacks(Path("mark"))))
def test_a_pickle_executes_nothing(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "executed"
    with pytest.raises(CheckpointError, match=r"^[^\n]{10,500}$"):
        read_torch(zipped(tmp_path / "evil.ckpt", attacks(mark)[name]))
    assert not mark.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    for name in ("system", "eval", "old opcode", "name and reduce"):
        mark = tmp_path / name.replace(" ", "")
        pickle.loads(attacks(mark)[name])
        assert mark.exists(), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tensors = [OutputTensor(name, "float32", (2, 3), np.ones((2, 3), np.float32)) for name in ("a", "b")]
    write_torch(folder / "a.ckpt", tensors)
    write_npz(folder / "a.npz", tensors)
    return folder


@given(st.data())
def test_a_damaged_file_is_refused_or_read(small: Path, data: st.DataObject) -> None:
    kind, read = data.draw(st.sampled_from([("ckpt", read_torch), ("npz", read_npz)]))
    raw = bytearray((small / f"a.{kind}").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = small / f"damaged.{kind}"
    damaged.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))
    try:
        for tensor in read(damaged).values():
            tensor.map().sum()
    except (CheckpointError, OSError):
        pass


def test_a_tensor_beyond_its_storage(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.ckpt", [OutputTensor("a", "float32", (2, 3), np.ones((2, 3), np.float32))])
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        raw = archive.read("archive/data.pkl")
    shape = b"J\x02\x00\x00\x00J\x03\x00\x00\x00t"
    assert shape in raw
    with pytest.raises(CheckpointError, match="exceeds the 6 numbers of its storage"):
        read_torch(zipped(tmp_path / "b.ckpt", raw.replace(shape, b"J\x02\x00\x00\x00J\x04\x00\x00\x00t")))
    count = raw.replace(b"J\x06\x00\x00\x00t", b"J\x60\x00\x00\x00t")
    with pytest.raises(CheckpointError, match="tensor 'a': must have 384 bytes, but has 64"):
        read_torch(zipped(tmp_path / "c.ckpt", count))
    with pytest.raises(CheckpointError, match="the file lacks the numbers, entry '1'"):
        read_torch(zipped(tmp_path / "d.ckpt", raw.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001")))


# --- interrupted, full, in the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "flax", "pytorch"])
def test_an_interrupted_run_is_continued(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    reads: list[str] = []
    original = conversion.Joined.__getitem__

    def noted(self: Any, rows: slice) -> Any:
        reads.append(self.name)
        if len(reads) == stop:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(conversion.Joined, "__getitem__", noted)

    def run(target: str, **more: Any) -> Any:
        return convert(tmp_path / "hf", tmp_path / target, target_format=kind, max_shard_size=6_000, **more)

    stop = 10**9
    run("whole")
    first = reads[: len(reads) // 2]  # the other half is read to be compared
    reads.clear()
    stop = len(first) * 3 // 4
    with pytest.raises(KeyboardInterrupt):
        run("there")
    stop = 10**9
    with pytest.raises(CheckpointError, match="an unfinished checkpoint of another run"):
        run("there", dtype="float32")
    reads.clear()
    run("there")
    assert len(reads) < 2 * len(first) - stop_margin(first)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == whole


def stop_margin(reads: list[str]) -> int:
    """Return where to stop, so that at least a quarter of the tensors are not read a second time."""
    return len(reads) // 4


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    program = f"""
import time
import refgemma.convert.convert as conversion
original = conversion.Joined.__getitem__
def slow(self, rows):
    if self.name == "model.layers.1.mlp.up_proj.weight":
        print("reading", flush=True)
        time.sleep(60)
    return original(self, rows)
conversion.Joined.__getitem__ = slow
conversion.convert({str(tmp_path / "hf")!r}, {str(tmp_path / "there")!r}, target_format="pytorch", max_shard_size=9000)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list((tmp_path / "there").glob("*.bin"))
    convert(tmp_path / "hf", tmp_path / "there", target_format="pytorch", max_shard_size=9000)
    convert(tmp_path / "there", tmp_path / "back")
    assert same(tmp_path / "back", tensors)


def test_a_changed_source_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "hf", tmp_path / "there", target_format="flax")
    os.utime(tmp_path / "hf" / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="an unfinished checkpoint of another run"):
        convert(tmp_path / "hf", tmp_path / "there", target_format="flax")


@pytest.mark.parametrize("kind", ["hf", "pytorch", "flax-npz"])
def test_a_full_disk(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
        with pytest.raises(CheckpointError, match=r"GB, but the disk has 0\.0 GB left"):
            convert(tmp_path / "hf", tmp_path / "there", target_format=kind)
    convert(tmp_path / "hf", tmp_path / "there", target_format=kind)


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_bytes()
    for target in (tmp_path / "hf", tmp_path / "hf" / "config.json"):
        with pytest.raises(CheckpointError, match=r"give an empty folder"):
            convert(tmp_path / "hf", target, target_format="pytorch")
    assert (tmp_path / "hf" / "config.json").read_bytes() == before
    assert len(list((tmp_path / "hf").iterdir())) == 2


@pytest.mark.parametrize("kind", ["pytorch", "flax", "flax-npz"])
def test_what_the_disk_has_made_of_it_is_checked(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf")
    module, name = (writer, "check_written") if kind == "flax" else (conversion, "check_same")
    check = getattr(module, name)

    def damage(*arguments: Any) -> None:
        there = tmp_path / "there"
        file = next(path for path in (there / STAGING).iterdir() if path.suffix in (".ckpt", ".npz", ".safetensors"))
        place = read_tree(file) if kind != "pytorch" else read_torch(file)
        raw = bytearray(file.read_bytes())
        raw[next(iter(place.values())).start + 48 * 5] ^= 1
        file.write_bytes(bytes(raw))
        check(*arguments)

    monkeypatch.setattr(module, name, damage)
    with pytest.raises(CheckpointError, match=r"differs from row 0 on when read back"):
        convert(tmp_path / "hf", tmp_path / "there", target_format=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "pytorch", "flax"])
def test_memory_is_that_of_a_tensor(tmp_path: Path, kind: str) -> None:
    """The checkpoint has 330 MB, the largest tensor 67 MB; it is converted in its own process."""
    config = Gemma2Config(**SHAPE | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 3})
    zeros = [
        OutputTensor(name, "float32", shape, np.broadcast_to(np.float32(1), shape))
        for name, shape in tensor_shapes(config).items()
    ]
    config.save_pretrained(tmp_path / "hf")
    write_checkpoint(tmp_path / "hf", zeros)
    program = f"""
import resource, refgemma.convert.convert as conversion
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
conversion.convert({str(tmp_path / "hf")!r}, {str(tmp_path / "there")!r}, target_format={kind!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) * resource_unit() < 250e6


def resource_unit() -> int:
    """Return the number of bytes in the unit of `ru_maxrss`."""
    return 1 if sys.platform == "darwin" else 1024


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_hf(tmp_path / "hf")
    hf, there, back = (str(tmp_path / name) for name in ("hf", "there", "back"))
    assert main(["convert", hf, "-o", there, "--to", "flax", "--vocab-rows", "128", "--json"]) == OK
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)
    assert (told["from"], told["to"], told["tensors"], told["verified"]) == ("hf", "flax", 20, True)
    assert main(["convert", there, "-o", back, "--max-shard-size", "20KB"]) == OK
    assert "dropped 67 rows of the embedding beyond the vocabulary; 0 were not zero" in capsys.readouterr().out
    assert same(Path(back), tensors)
    assert load_file(Path(there) / "model.safetensors")["transformer/embedder/input_embedding"].shape == (128, 24)


@pytest.mark.parametrize("arguments", [
    ["nothing"], ["hf"], ["hf", "--to", "pytorch", "--max-shard-size", "much"], ["hf", "--from", "pytorch"],
    ["hf", "--config", "hf/config.json"], ["hf", "--vocab-rows", "128"], ["hf", "--from", "flax"],
])  # fmt: skip
def test_mistakes_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    write_hf(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    output = "hf" if arguments == ["hf"] else "there"
    assert main(["convert", *arguments, "-o", output]) == MISUSE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("refgemma convert: ")
    assert not (tmp_path / "there").exists()


def test_an_interruption_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(tmp_path / "hf")
    monkeypatch.setattr(conversion, "write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["convert", str(tmp_path / "hf"), "-o", str(tmp_path / "there")]) == INTERRUPTED
