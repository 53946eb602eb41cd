"""Read and write GGUF files. Expected values are from gguf 0.19, llama.cpp's own Python library: its files, and its
dequantised numbers. tests/parity/test_gguf_parity.py has the logits of llama.cpp itself."""

import json
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma import fast
from refgemma.cli.main import main
from refgemma.config import Gemma2Config
from refgemma.convert.convert import convert
from refgemma.convert.layouts import add_one
from refgemma.errors import RefgemmaError
from refgemma.gguf import FORMATS, read_gguf
from refgemma.hub import find_model
from refgemma.precision import as_dtype
from refgemma.tokenizer.sentencepiece_model import read_model
from refgemma.tokenizer.tokenizer import Tokenizer, TokenizerError
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.gguf_weights import gguf_names
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor, write_checkpoint

gguf: Any = pytest.importorskip("gguf", reason='gguf is not installed; pip install "refgemma[gguf]"')

TINY = find_model("tiny")
CONFIG = Gemma2Config(  # rows of 256, which all formats have, and all numbers that differ from each other
    vocab_size=2050, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=8, max_position_embeddings=99,
    rms_norm_eps=1e-5, attn_logit_softcapping=20.0, final_logit_softcapping=10.0, rope_theta=5000.0,
)  # fmt: skip
Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.post_feedforward_layernorm.weight"
IDS = [[2, 7, 300, 1900, 44]]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return bfloat16 numbers, exact in all formats except quantised ones; norms are far enough from 0."""
    rng = np.random.default_rng(seed)
    made = {n: rng.normal(0, 0.06, shape) for n, shape in tensor_shapes(CONFIG).items()}
    made |= {n: np.sign(x) * (np.abs(x) + 2**-8) for n, x in made.items() if x.ndim == 1}
    return {name: np.asarray(as_dtype(x, "bfloat16"), np.float32) for name, x in made.items()}


def folder_of(path: Path, config: Gemma2Config = CONFIG, dtype: str = "float32") -> Path:
    """Make a Hugging Face folder with these weights and the tiny model's tokenizer."""
    path.mkdir()
    config.save_pretrained(path)
    write_checkpoint(path, [OutputTensor(n, dtype, x.shape, x) for n, x in weights().items()])
    Tokenizer.from_pretrained(TINY).save_pretrained(path)
    return path


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return rows quantised by the library or, if it cannot, random bytes that are finite numbers."""
    rng, code = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(rng.normal(0, 0.06, shape).astype(np.float32), code)
    except NotImplementedError:
        _, numbers, size = next(f for f in FORMATS.values() if f[0] == kind)
        raw = rng.integers(0, 256, (shape[0], shape[1] // numbers, size), np.uint8)
        small = np.float16(2.0**-12).tobytes()  # wherever a scale is, it is among the first or last bytes
        raw[..., :4] = raw[..., -4:] = np.frombuffer(small * 2, np.uint8)
        return raw.reshape(shape[0], -1)


def write(
    path: Path, changes: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, part: int = 0
) -> Path:
    """Write a GGUF file with the library: the metadata of llama.cpp's converter, some changed or (None) left out."""
    config = CONFIG
    about: dict[str, Any] = {
        "gemma2.context_length": config.max_position_embeddings, "gemma2.embedding_length": config.hidden_size,
        "gemma2.block_count": config.num_hidden_layers, "gemma2.feed_forward_length": config.intermediate_size,
        "gemma2.attention.head_count": config.num_attention_heads,
        "gemma2.attention.head_count_kv": config.num_key_value_heads, "gemma2.attention.key_length": config.head_dim,
        "gemma2.attention.value_length": config.head_dim,
        "gemma2.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "gemma2.attn_logit_softcapping": config.attn_logit_softcapping, "gemma2.rope.freq_base": config.rope_theta,
        "gemma2.final_logit_softcapping": config.final_logit_softcapping,
        "gemma2.attention.sliding_window": config.sliding_window,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, (changes or {}).pop("general.architecture", "gemma2"), split_max_tensors=part)
    for key, value in (about | (changes or {})).items():
        adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
                bool: writer.add_bool}  # fmt: skip
        if value is not None:
            adds[type(value)](key, value)
    names = gguf_names(config.num_hidden_layers)
    whole = {names[n]: add_one(x).astype(np.float32) if x.ndim == 1 else x for n, x in weights().items()}
    for name, given in (whole | (tensors or {})).items():
        if isinstance(given, tuple):
            writer.add_tensor(name, given[0], raw_dtype=gguf.GGMLQuantizationType[given[1]])
        elif given is not None:
            writer.add_tensor(name, given)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "plain.gguf")


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, _, _ in FORMATS.values()])
def test_each_format_is_read_as_the_library_dequantises_it(kind: str, tmp_path: Path) -> None:
    shape = tensor_shapes(CONFIG)[Q_PROJ]
    raw = blocks(kind, shape)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    tensor = open_checkpoint(write(tmp_path / "a.gguf", None, {"blk.1.attn_q.weight": (raw, kind)})).tensors[Q_PROJ]
    assert tensor.nbytes == raw.nbytes
    assert tensor.format == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, kind)
    some = np.array([[3, 0], [100, 3]])
    for dtype in ("float32", "float64", "bfloat16"):
        right = np.asarray(as_dtype(expected, dtype))
        np.testing.assert_array_equal(tensor.read(dtype), right)
        np.testing.assert_array_equal(tensor.read(dtype, slice(5, 9)), right[5:9])
        np.testing.assert_array_equal(tensor.read(dtype, some), right[some])
    np.testing.assert_array_equal(np.asarray(tensor.map()[2:4], np.float32), expected[2:4])


def test_a_norm_is_one_less_than_in_the_file(tmp_path: Path) -> None:
    """The result is exact in float64; in float32 it is rounded once, and exact from 1/2 on."""
    g = np.linspace(-0.3, 3, 256).astype(np.float32)
    g[:3] = 1 + 2.0**-23, 2.0**-20 * 1.25, 3.5
    tensor = open_checkpoint(write(tmp_path / "a.gguf", None, {"blk.0.post_ffw_norm.weight": g})).tensors[NORM]
    exact = tensor.read("float64")
    np.testing.assert_array_equal(exact + 1, g.astype(np.float64))
    rounded = tensor.read("float32")
    np.testing.assert_array_equal(rounded, exact.astype(np.float32))
    np.testing.assert_array_equal((1 + rounded)[g >= 0.5], g[g >= 0.5])
    apart = np.abs((1 + rounded.astype(np.float64)) - g)
    assert 0 < apart[g >= 0].max() <= 2.0**-25
    assert 0 < apart[g < 0].max() <= 2.0**-24


def test_a_quantised_model_computes_as_one_of_its_numbers(tmp_path: Path) -> None:
    shapes, names = tensor_shapes(CONFIG), gguf_names(CONFIG.num_hidden_layers)
    kinds = dict(zip((n for n, s in shapes.items() if len(s) == 2), ("Q8_0", "Q4_0", "Q6_K", "Q4_K") * 9, strict=False))
    made = {names[n]: (blocks(kind, shapes[n], seed), kind) for seed, (n, kind) in enumerate(kinds.items())}
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", None, made))
    numbers = weights() | {
        n: gguf.dequantize(made[names[n]][0], gguf.GGMLQuantizationType[k]) for n, k in kinds.items()
    }
    model = refgemma.Gemma2ForCausalLM.from_state_dict(CONFIG, numbers)
    expected = refgemma.forward(IDS, model.weights, CONFIG).logits
    for kind in (checkpoint.resident(), checkpoint.streamed()):
        np.testing.assert_array_equal(refgemma.forward(IDS, kind, checkpoint.config).logits, expected)
    quick, _ = fast.next_token_logits(IDS, checkpoint.streamed(), CONFIG)
    np.testing.assert_allclose(quick, expected[:, -1:], atol=2e-5)  # pieces of float32 sums of 512, in another order


def test_a_scale_that_is_no_number_is_named(tmp_path: Path) -> None:
    raw = blocks("Q8_0", (256, 256))
    raw[9, 34:36] = np.float16(np.nan).reshape(1).view(np.uint8)
    tensor = open_checkpoint(write(tmp_path / "a.gguf", None, {"blk.1.attn_q.weight": (raw, "Q8_0")})).tensors[Q_PROJ]
    with pytest.raises(CheckpointError, match=r"a\.gguf: tensor 'blk\.1\.attn_q\.weight', index \[9, 32\]: nan is no"):
        tensor.read("float32", slice(4, 20))


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_the_configuration_is_that_of_the_metadata(plain: Path) -> None:
    assert open_checkpoint(plain).config == CONFIG
    assert Gemma2Config.from_pretrained(plain, num_labels=3).num_labels == 3
    assert refgemma.GenerationConfig.from_pretrained(plain).eos_token_id == 1


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    """The defaults are in llama-hparams.h and in the Gemma 2 of llama-model.cpp."""
    left_out = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window", "rope.freq_base")
    config = open_checkpoint(write(tmp_path / "a.gguf", {f"gemma2.{key}": None for key in left_out})).config
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    assert (*caps, config.sliding_window, config.rope_theta) == (50, 30, 4096, 10000)


@pytest.mark.parametrize(("layers", "scalar"), [(46, 32), (42, 64)])
def test_the_query_scalar_is_that_of_llama_cpp(layers: int, scalar: int, tmp_path: Path) -> None:
    """llama.cpp recognises the 27B by 46 layers, because no key has the scalar: 256 / 8 heads there, else head_dim
    64."""
    changes = {"gemma2.block_count": layers, "gemma2.attention.head_count": 8}
    config = Gemma2Config.from_pretrained(write(tmp_path / "a.gguf", changes))
    assert (config.query_pre_attn_scalar, config.head_dim) == (scalar, 64)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "gemma3"}, {}, "'gemma3'.* not a model of architecture 'gemma2'"),
    "adapter": ({"general.type": "adapter"}, {}, "of type 'adapter'"),
    "part": ({"split.count": 3}, {}, "is one of 3 parts of a model; rename the parts like"),
    "rope scaling": ({"gemma2.rope.scaling.factor": 2.0}, {}, r"rope\.scaling\.factor is 2\.0"),
    "head widths": ({"gemma2.attention.value_length": 16}, {}, r"value_length is 16; it must be 64"),
    "layers that differ": ({"gemma2.attention.head_count": [4, 2]}, {}, "it must be one number for all layers"),
    "text for a number": ({"gemma2.block_count": "2"}, {}, "block_count is '2'"),
    "too many layers": ({"gemma2.block_count": 2**31}, {}, r"num_hidden_layers is .*; it must be a whole number"),
    "no heads": ({"gemma2.attention.head_count": 0}, {}, r"num_attention_heads is .*; it must be"),
    "no embedding": ({}, {"token_embd.weight": None}, "token_embd.weight, the embedding"),
    "a tensor less": ({}, {"blk.1.attn_q.weight": None}, r"lacks 'blk\.1\.attn_q\.weight'"),
    "a head": ({}, {"output.weight": np.zeros((2050, 256), np.float32)}, "holds 'output.weight'"),
    "a shape": ({}, {"blk.1.attn_q.weight": np.zeros((64, 256), np.float32)}, r"is \[64, 256\]; according to .*256"),
    "a norm in half": ({}, {"output_norm.weight": np.ones(256, np.float16)}, "norm 'output_norm.weight' is F16"),
    "a format": ({}, {"output_norm.weight": np.ones(256, np.int8)}, "'output_norm.weight' in format 24"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gemma_2_of_llama_cpp_is_refused(name: str, tmp_path: Path) -> None:
    changes, tensors, reason = REFUSED[name]
    with pytest.raises(RefgemmaError, match=reason) as caught:
        open_checkpoint(write(tmp_path / "a.gguf", changes, tensors))
    assert str(caught.value).startswith(str(tmp_path / "a.gguf"))
    assert "\n" not in str(caught.value)


def test_a_model_in_several_files(plain: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", part=9)
    first, second, third = sorted(tmp_path.iterdir())
    assert first.name == "a-00001-of-00003.gguf"
    expected, found = open_checkpoint(plain), open_checkpoint(first)
    assert found.config == expected.config
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].read("float32"), tensor.read("float32"))
    assert {tensor.file for tensor in found.tensors.values()} == {first, second, third}
    convert(first, tmp_path / "folder")
    with pytest.raises(RefgemmaError, match=r"is one of 3 parts of a model; give the first, a-00001-of-00003\.gguf$"):
        open_checkpoint(second)
    second.write_bytes(third.read_bytes())
    with pytest.raises(RefgemmaError, match=r"and a-00002-of-00003\.gguf are not parts of the same model"):
        open_checkpoint(first)
    third.unlink()
    with pytest.raises(RefgemmaError, match=r"'a-00003-of-00003\.gguf' is missing; download all parts"):
        open_checkpoint(first)


# --- written ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_what_convert_writes(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgemma.weights.save.BLOCK_BYTES", 2**14)  # a few rows at a time
    done = convert(folder_of(tmp_path / "hf"), tmp_path / "a.gguf", target_format="gguf", dtype=dtype)
    reader, names = gguf.GGUFReader(tmp_path / "a.gguf"), gguf_names(CONFIG.num_hidden_layers)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == set(names.values())
    assert done.nbytes == sum(tensor.n_bytes for tensor in reader.tensors)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    for name, x in weights().items():
        tensor = found[names[name]]
        assert tensor.tensor_type.name == ("F32" if x.ndim == 1 else kind)
        right = x + 1 if x.ndim == 1 else np.asarray(as_dtype(x, dtype), np.float32)
        np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(x.shape), right)
    # The library's writer, told what llama.cpp's converter tells it, makes the same metadata.
    theirs = gguf.GGUFReader(write(tmp_path / "b.gguf"))
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert reader.fields[key].contents() == field.contents(), key


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    convert(folder_of(tmp_path / "hf"), tmp_path / "a.gguf", target_format="gguf")
    ours, theirs = Tokenizer.from_pretrained(tmp_path / "a.gguf"), Tokenizer.from_pretrained(TINY)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    names, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert names[2048:] == ["[PAD2048]", "[PAD2049]"]  # the model has two rows more
    assert set(kinds[2048:]) == {gguf.TokenType.UNUSED}
    control = {name for name, kind in zip(names, kinds, strict=True) if kind == gguf.TokenType.CONTROL}
    assert control == {"<pad>", "<eos>", "<bos>", "<mask>", "<start_of_turn>", "<end_of_turn>"}
    mine = [name for name, kind in zip(names, kinds, strict=True) if kind == gguf.TokenType.USER_DEFINED]
    assert "  " in mine
    assert not any("▁" in name for name in mine)
    for text in ("Once upon a time\n\n  there <b>was</b> é 日本 😀\t", " " * 40, "<bos>a<end_of_turn>", "▁▁ ▁"):
        assert ours.encode(text) == theirs.encode(text)
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 2, 1)
    assert refgemma.load(tmp_path / "a.gguf").stop_ids == refgemma.load(tmp_path / "hf").stop_ids


def test_user_defined_pieces_have_spaces_in_a_file(tmp_path: Path) -> None:
    """llama.cpp's converter writes them this way; reading gives SentencePiece's form again."""
    vocabulary = [
        ("<pad>", 3),
        ("<eos>", 3),
        ("<bos>", 3),
        ("<unk>", 2),
        ("  ", 4),
        ("▁", 1),
        ("a", 1),
        ("<mine>", 3),
        ("b", 1),
    ]
    vocabulary += [(f"<0x{n:02X}>", 6) for n in range(256)]
    about = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [name for name, _ in vocabulary],
        "tokenizer.ggml.scores": [-float(n) for n in range(len(vocabulary))], "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.token_type": [kind for _, kind in vocabulary], "tokenizer.chat_template": "{{ x }}",
        "tokenizer.ggml.add_eos_token": True,
    }  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(write(tmp_path / "a.gguf", about))
    assert tokenizer.encode("a  a <mine>") == [2, 6, 4, 6, 5, 7, 1]
    assert tokenizer.decode([4, 6]) == "  a"
    assert tokenizer.chat_template == "{{ x }}"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert [p.name for p in read_model((tmp_path / "saved" / "tokenizer.model").read_bytes())[0]][4] == "▁▁"
    for key, value, reason in (
        ("tokenizer.ggml.model", "gpt2", "no SentencePiece vocabulary.*'gpt2'"),
        ("tokenizer.ggml.scores", [1.0], "no scores and types for its 265 tokens"),
        ("tokenizer.ggml.token_type", [9] * 265, "token types that SentencePiece does not know"),
        ("tokenizer.ggml.add_space_prefix", True, "adds a space before"),
        ("tokenizer.ggml.bos_token_id", 265, "265 for tokenizer.ggml.bos_token_id"),
    ):
        with pytest.raises(TokenizerError, match=reason):
            Tokenizer.from_pretrained(write(tmp_path / "b.gguf", about | {key: value}))


def test_back_to_a_folder(tmp_path: Path) -> None:
    convert(folder_of(tmp_path / "hf", dtype="bfloat16"), tmp_path / "a.gguf", target_format="gguf")
    convert(tmp_path / "a.gguf", tmp_path / "again", dtype="bfloat16")
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "again"))
    assert first == again
    assert Tokenizer.from_pretrained(tmp_path / "again").encode("A <b>\n\n") == [
        2,
        *Tokenizer.from_pretrained(TINY).encode("A <b>\n\n")[1:],
    ]
    assert open_checkpoint(tmp_path / "again").config == CONFIG


def test_a_quantised_file_becomes_a_folder(tmp_path: Path) -> None:
    raw = blocks("Q4_K", (2050, 256))
    convert(write(tmp_path / "a.gguf", None, {"token_embd.weight": (raw, "Q4_K")}), tmp_path / "hf")
    table = open_checkpoint(tmp_path / "hf").tensors["model.embed_tokens.weight"].read("float32")
    np.testing.assert_array_equal(table, gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_K))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"query_pre_attn_scalar": 100},
            r"query_pre_attn_scalar is 100, .* 64 .*multiply each q_proj by 0\.8 and set the field",
        ),
        ({"attn_logit_softcapping": None}, "attn_logit_softcapping is None, but llama.cpp uses 50.0"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"layer_types": ("full_attention",) * 2}, "layer_types"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_not_written(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "hf", CONFIG.changed(**changes))
    (tmp_path / "a.gguf").write_text("old")
    with pytest.raises(CheckpointError, match=reason):
        convert(folder, tmp_path / "a.gguf", target_format="gguf")
    assert (tmp_path / "a.gguf").read_text() == "old"


def test_the_name_of_what_is_written_ends_in_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(TINY), "-o", str(tmp_path / "a"), "--to", "gguf"]) == 2
    assert "the name of a GGUF file must end in .gguf" in capsys.readouterr().err


# --- where a model is named -------------------------------------------------------------------------------------------


def test_a_file_is_a_model(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = refgemma.forward(IDS, refgemma.load(plain).weights, CONFIG).logits
    for model in (
        refgemma.Gemma2ForCausalLM.from_pretrained(str(plain)),
        refgemma.Gemma2ForCausalLM.from_pretrained(plain.parent, gguf_file=plain.name),
    ):
        np.testing.assert_array_equal(model(IDS).logits, expected)
    assert main(["info", str(plain), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["config"]["hidden_size"] == 256
    assert {"name": Q_PROJ, "shape": [256, 256], "dtype": "float32"} in about["tensors"]
    assert main(["generate", "--model", str(plain), "--ids", "2,7", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    with pytest.raises(refgemma.ModelNameError, match=r"the file other\.gguf is missing"):
        refgemma.load(plain.parent, gguf_file="other.gguf")
    with pytest.raises(refgemma.ModelNameError, match="no such folder"):
        refgemma.load(plain.parent / "other.gguf")
    with pytest.raises(TokenizerError, match="no SentencePiece vocabulary"):
        Tokenizer.from_pretrained(plain)


# --- without the library ----------------------------------------------------------------------------------------------


def test_without_the_library_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eight = write(tmp_path / "8.gguf", None, {"blk.1.attn_q.weight": (blocks("Q8_0", (256, 256)), "Q8_0")})
    four = write(tmp_path / "4.gguf", None, {"blk.1.attn_q.weight": (blocks("Q4_K", (256, 256)), "Q4_K")})
    folder = folder_of(tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_checkpoint(eight).resident().layers[1].q_proj.shape == (256, 256)
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_q\.weight' is quantised as Q4_K.*refgemma\[gguf\]"):
        open_checkpoint(four)
    with pytest.raises(CheckpointError, match=r"refgemma\[gguf\]"):
        convert(folder, tmp_path / "a.gguf", target_format="gguf")
    assert not (tmp_path / "a.gguf").exists()


# --- damaged files ----------------------------------------------------------------------------------------------------


def patched(raw: bytes, at: int, letters: str, *values: int) -> bytes:
    new = struct.pack("<" + letters, *values)
    return raw[:at] + new + raw[at + len(new) :]


def first_info(raw: bytes) -> int:
    """Return where the header describes the first tensor, after the name."""
    return raw.index(b"token_embd.weight") + len("token_embd.weight")


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "is empty"),
    "pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "another file": (lambda raw: b"PK" + raw, "does not begin with the letters GGUF"),
    "another version": (lambda raw: patched(raw, 4, "I", 1), "version 1"),
    "big endian": (lambda raw: patched(raw, 4, "I", 3 << 24), "byte order"),
    "cut in the header": (lambda raw: raw[:300], "is too short: the data at byte"),
    "cut in a tensor": (lambda raw: raw[:-1], "would end later"),
    "a text beyond the file": (lambda raw: patched(raw, 24, "Q", 2**62), "is too short"),
    "tensors without end": (lambda raw: patched(raw, 8, "Q", 2**64 - 1), "claims to have 18446744073709551615 tensors"),
    "many tensors": (lambda raw: patched(raw, 8, "Q", 2**17), "same name|is too short|axes"),
    "keys without end": (lambda raw: patched(raw, 16, "Q", 2**63), "claims to have"),
    "many axes": (lambda raw: patched(raw, first_info(raw), "I", 2**31), "has 2147483648 axes"),
    "a long axis": (lambda raw: patched(raw, first_info(raw) + 12, "Q", 2**63), "would end later"),
    "an offset beyond": (lambda raw: patched(raw, first_info(raw) + 24, "Q", 2**63), "at offset 9223372036854775808"),
    "an offset that overlaps": (lambda raw: patched(raw, first_info(raw) + 24, "Q", 32), "at offset 32"),
    "a list too long": (lambda raw: bomb(8, 2**20 + 1) + bytes(2**24), "array of 1048577 values"),
    "an unknown format": (lambda raw: patched(raw, first_info(raw) + 20, "I", 999), "in format 999"),
    "rows of no whole blocks": (
        lambda raw: patched(patched(raw, first_info(raw) + 20, "I", 12), first_info(raw) + 4, "Q", 255), "a multiple"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_and_exit_2(
    name: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = DAMAGED[name]
    file = tmp_path / "a.gguf"
    file.write_bytes(damage(plain.read_bytes()))
    with pytest.raises(CheckpointError, match=reason):
        read_gguf(file, CheckpointError)
    assert main(["info", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"refgemma info: {file}: ")


def bomb(kind: int, count: int, fill: bytes = b"") -> bytes:
    """Return a header whose single value is an array of `count` values of type `kind`."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, kind, count) + fill


@pytest.mark.timeout(120)  # each takes under a second
@pytest.mark.parametrize(
    ("content", "sparse"),
    [
        (bomb(8, 2**60), 0), (bomb(8, 2**20), 2**34),
            (bomb(8, 2**20 + 1), 2**34), (bomb(10, 2**60), 0), (bomb(10, 2**31), 2**34),
        (bomb(9, 2**60), 2**34), (bomb(0, 2**26), 2**34), (bomb(8, 2**20, struct.pack("<Q", 2**40)), 2**34),
    ],
)  # fmt: skip
def test_bombs(content: bytes, sparse: int, tmp_path: Path) -> None:
    """Counts that exceed the file's length, and sparse files of 16 GB that are long enough, need little memory."""
    file = tmp_path / "a.gguf"
    with file.open("wb") as stream:
        stream.write(content)
        stream.truncate(max(len(content), sparse))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        open_checkpoint(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**28
