"""Compare GGUF files with transformers 5.23, which dequantises them, and with llama.cpp itself (node-llama-cpp 3.21.1),
which loads files of `refgemma convert`."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import refgemma
from refgemma.config import Gemma2Config
from refgemma.convert.convert import convert
from refgemma.heads import log_softmax
from refgemma.hub import find_model
from refgemma.oracle.known_bugs import gelu_by_table
from refgemma.precision import as_dtype
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.conformance import proportions, write_conformance
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor, write_checkpoint

CONFIG = Gemma2Config(  # head widths that llama.cpp takes, and caps that bend
    vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=8, max_position_embeddings=64,
    attn_logit_softcapping=3.0, final_logit_softcapping=6.0,
)  # fmt: skip
IDS = [2, 300, 41, 1900, 77, 9, 612, 1024, 5, 88, 1301, 640, 41, 300, 17, 1500, 233, 9]  # longer than the window
TEXT = "Once upon a time\n\n  there was é 日本 😀, \t" + " " * 20
LLAMA_CPP = os.environ.get("REFGEMMA_LLAMA_CPP")


def write_folder(folder: Path) -> Path:
    rng = np.random.default_rng(5)
    config = CONFIG
    folder.mkdir()
    config.save_pretrained(folder)
    shapes = tensor_shapes(config)
    tensors = {n: rng.normal(0, 0.3 if len(s) == 1 else 1.5 / s[-1] ** 0.5, s) for n, s in shapes.items()}
    outputs = [OutputTensor(n, "bfloat16", x.shape, as_dtype(x, "bfloat16")) for n, x in tensors.items()]
    write_checkpoint(folder, outputs)
    Tokenizer.from_pretrained(find_model("tiny")).save_pretrained(folder)
    return folder


def quantise(source: Path, target: Path, kind: str) -> None:
    """Copy a GGUF file with quantised matrices: quantised by the library or, if it cannot, random blocks."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "gemma2")
    code, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(1)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        x, raw = tensor.data, None
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, x)
            continue
        try:
            raw = gguf.quantize(gguf.dequantize(x, tensor.tensor_type), code)
        except NotImplementedError:
            raw = make_blocks(kind, int(tensor.n_elements) // 256, rng).reshape(int(tensor.shape[1]), -1)
        writer.add_tensor(tensor.name, raw, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_blocks(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return random blocks of 256 numbers of about 0.09: any bytes, with small float16 scales."""
    raw = rng.integers(0, 256, (count, 144 if kind == "Q4_K" else 210), np.uint8)
    if kind == "Q4_K":  # d and dmin
        raw[:, :4] = np.array([4e-4, 3e-3], np.float16).view(np.uint8)
    else:  # d
        raw[:, 208:] = np.array([8e-5], np.float16).view(np.uint8)
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_folder(tmp_path_factory.mktemp("gguf") / "model")
    convert(place, place / "F32.gguf", target_format="gguf", dtype="float32")
    convert(place, place / "BF16.gguf", target_format="gguf")
    for kind in ("F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"):
        quantise(place / "F32.gguf", place / f"{kind}.gguf", kind)
    return place


KINDS = ("F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_transformers(kind: str, folder: Path) -> None:
    """transformers also rounds 1 + w - 1 in float32."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf", dtype=torch.float32).state_dict()
    ours = refgemma.Gemma2ForCausalLM.from_pretrained(folder, gguf_file=f"{kind}.gguf").state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name].numpy(), err_msg=name)


def ask_llama_cpp(path: Path, ids: list[int], text: str) -> tuple[np.ndarray, list[int]]:
    """Return llama.cpp's log probabilities of the next token, and its ids of a text."""
    if LLAMA_CPP is None or shutil.which("node") is None:
        pytest.skip("REFGEMMA_LLAMA_CPP does not say where node-llama-cpp is installed, or there is no node")
    script = Path(__file__).with_name("llama_cpp.mjs")
    words = ["node", str(script), str(path), ",".join(map(str, ids)), text]
    said = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout)
    log_probabilities = np.empty(len(said["probabilities"]))
    for token, probability in said["probabilities"]:
        log_probabilities[token] = np.log(probability)
    return log_probabilities, said["tokens"]


# llama.cpp multiplies with the file's numbers, but rounds what it multiplies them with: for BF16 to bfloat16, for F16
# to float16, for quantised weights to 8 bits a block. The limits are three times the standard deviations that this
# makes of log probabilities here; those of one key more in the window, or of a cap a third higher, are 0.14 to 0.34.
NOISE = {"F32": 1e-4, "F16": 3e-3, "BF16": 0.02, "Q8_0": 0.075, "Q4_0": 0.075, "Q4_K": 0.07, "Q6_K": 0.15}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_loads_it_and_computes_the_same(kind: str, folder: Path) -> None:
    theirs, tokens = ask_llama_cpp(folder / f"{kind}.gguf", IDS, TEXT)
    model = refgemma.load(folder / f"{kind}.gguf")
    assert [2, *tokens] == model.tokenizer.encode(TEXT)
    config = model.config.changed(hidden_activation=gelu_by_table)  # which llama.cpp has on a CPU
    logits = refgemma.forward([IDS], model.weights, config).logits[0, -1]
    assert (log_softmax(logits.astype(np.float64)) - theirs).std() < NOISE[kind]


def test_llama_cpp_loads_a_conformance_checkpoint(tmp_path: Path) -> None:
    write_conformance(tmp_path / "hf", proportions(64).changed(query_pre_attn_scalar=64))
    convert(tmp_path / "hf", tmp_path / "small.gguf", "auto", "gguf", dtype="float32")
    ids = [2, *(4 + n * 37 % 250 for n in range(40))]  # more than two windows of 16
    theirs, tokens = ask_llama_cpp(tmp_path / "small.gguf", ids, "na\u00efve \N{SLIGHTLY SMILING FACE}\n  end")
    model = refgemma.load(tmp_path / "small.gguf")
    assert [2, *tokens] == model.tokenizer.encode("na\u00efve \N{SLIGHTLY SMILING FACE}\n  end")

    def error(**changes: Any) -> float:
        config = model.config.changed(hidden_activation=gelu_by_table, **changes)
        logits = refgemma.forward([ids], model.weights, config).logits[0, -1]
        return float((log_softmax(logits.astype(np.float64)) - theirs).std())

    assert error() < NOISE["F32"]
    for wrong in ({"sliding_window": 17}, {"attn_logit_softcapping": 4.0}, {"query_pre_attn_scalar": 80}):
        assert error(**wrong) > 30 * NOISE["F32"]  # the checkpoint shows this mistake
