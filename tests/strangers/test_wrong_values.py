"""Test values of a wrong type and impossible sizes in each file of a model: a one-line error quotes the value before
memory is used. transformers 5.23 also refuses such values of a configuration (StrictDataclass...Error). tokenizers 0.23
refuses such flags of a token (TypeError). In a generation_config.json, transformers accepts a word as true."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import refgemma
from refgemma.cli.main import main
from refgemma.config import LIMITS, ConfigError, Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.files import parse_object
from refgemma.generation.generation_config import GenerationConfig
from refgemma.hub import find_model
from refgemma.tokenizer.added_tokens import ADDED_LIMIT
from refgemma.tokenizer.sentencepiece_model import PIECES_LIMIT
from refgemma.weights.parameters import OnDemand, tensor_shapes

TINY = find_model("tiny")
CONFIG = json.loads((TINY / "config.json").read_text())
HUGE = 10**400  # a whole number of JSON that no float holds
WORDS: list[Any] = ["false", "1", "x", "", [], {}, [1], -1, 1.5, HUGE]


@pytest.mark.parametrize("value", WORDS, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize(
    "name",
    ["tie_word_embeddings", "use_cache", "attention_bias", "vocab_size", "num_hidden_layers", "head_dim",
     "sliding_window", "rms_norm_eps", "rope_theta", "pad_token_id", "bos_token_id", "problem_type", "layer_types"],
)  # fmt: skip
def test_a_field_of_the_configuration_with_a_wrong_value(name: str, value: Any) -> None:
    if name in ("rms_norm_eps", "rope_theta") and value == 1.5:
        return
    with pytest.raises(ConfigError, match=name):
        Gemma2Config.from_dict(CONFIG | {name: value})


@pytest.mark.parametrize("value", ["x", 7, [1], True])
def test_labels_that_are_no_mapping(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"label2id is .*; it must be an object"):
        Gemma2Config.from_dict(CONFIG | {"id2label": {"0": "a", "1": "b"}, "label2id": value})


@pytest.mark.parametrize("value", ["false", "1", [1.5], HUGE], ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize(
    "name",
    ["do_sample", "use_cache", "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty",
     "guidance_scale", "max_time", "max_new_tokens", "num_beams", "eos_token_id", "early_stopping"],
)  # fmt: skip
def test_a_setting_of_generation_with_a_wrong_value(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(RefgemmaError, match=name):
        GenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"add_bos_token": "false"}, "add_bos_token"), ({"split_special_tokens": "false"}, "split_special_tokens"),
        ({"padding_side": ""}, "padding_side"), ({"padding_side": False}, "padding_side"),
        ({"truncation_side": []}, "truncation_side"), ({"model_max_length": "9"}, "model_max_length"),
        ({"model_max_length": float("nan")}, "model_max_length"), ({"extra_special_tokens": False}, "special tokens"),
        ({"additional_special_tokens": 0}, "special tokens"), ({"bos_token": 2}, "special tokens"),
        ({"added_tokens_decoder": {"4": {"content": "<mask>", "special": "false"}}}, "special of an added token is 'f"),
        ({"added_tokens_decoder": {"4": {"content": "<mask>", "lstrip": 1}}}, "lstrip of an added token is 1"),
    ],
)  # fmt: skip
def test_a_setting_of_the_tokenizer_with_a_wrong_value(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(RefgemmaError, match=said):
        refgemma.Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["use_dora", "use_rslora", "lora_bias"])
def test_a_flag_of_an_adapter_that_is_a_word(name: str, tmp_path: Path) -> None:
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(TINY), name: "false"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RefgemmaError, match=f"{name} is 'false'; it must be true or false"):
        refgemma.load(tmp_path)


@pytest.mark.parametrize("written", ["1e400", "-1.5e999"])
def test_a_number_that_no_float_holds_is_quoted_as_it_is_written(written: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(RefgemmaError, match=f"the number '{written}' is beyond the largest float"):
        parse_object(f'{{"rms_norm_eps": {written}}}'.encode())
    assert parse_object(b'{"a": [1e308, -0.5, 12345678901234567890]}') == {"a": [1e308, -0.5, 12345678901234567890]}


@pytest.mark.parametrize("written", ["1e300", "-1e-300", "0.0", "1e-400"])
def test_a_refused_number_is_the_one_that_was_given(written: str) -> None:
    given = re.escape(repr(float(written)))
    with pytest.raises(ConfigError, match=f"rms_norm_eps is {given}; it must be "):
        Gemma2Config.from_dict(CONFIG | {"rms_norm_eps": float(written)})


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "name"), [(limit, name) for limit, names in LIMITS.items() for name in names])
def test_sizes_that_no_gemma_has_are_refused(limit: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {limit + 1}; it must be at most {limit}"):
        Gemma2Config(**{name: limit + 1})
    largest = max(getattr(Gemma2Config.preset(size), name) for size in ("2b", "9b", "27b"))
    assert limit >= 4 * largest


def test_a_block_that_this_machine_cannot_hold_is_not_read(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Rows:
        shape = (2**15, 2**18)

        def __getitem__(self, rows: Any) -> Any:
            pytest.fail("was read")

    layers = OnDemand(lambda _: Rows(), range(3))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 2**22, "SC_PAGE_SIZE": 4096}[name])
    # 11 tensors of 2^33 numbers in float32
    with pytest.raises(MemoryError, match="block 2 takes 378"):
        layers[2]
    monkeypatch.setattr("refgemma.cli.inspection.load", lambda *_, **__: layers[1])
    assert main(["trace", "--ids", "2", "-o", "x"]) == 2
    assert capsys.readouterr().err.startswith("refgemma trace: not enough memory: block 1 takes ")


MEASURE = """
import sys
from refgemma.cli.main import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, peak // 1024)
"""


def of_holes(folder: Path, **config: Any) -> None:
    """Write a checkpoint whose header and configuration agree, with a hole in the file instead of numbers."""
    raw = CONFIG | config
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = tensor_shapes(Gemma2Config.from_dict({**CONFIG}).changed(num_hidden_layers=1))
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at := at + 4 * int(np.prod(shape))]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def many_pieces(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    piece = b"\x0a\x08\x0a\x01a\x15\0\0\0\0"
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes() + piece * (PIECES_LIMIT + 1))


def many_added(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = [f"<e{n}>" for n in range(ADDED_LIMIT + 1)]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


ODD = {
    "a vocabulary of 10^9": lambda folder: of_holes(folder, vocab_size=10**9),
    "10^6 layers": lambda folder: of_holes(folder, num_hidden_layers=10**6),
    "1024 layers that are not there": lambda folder: of_holes(folder, num_hidden_layers=1024),
    "a wide model": lambda folder: of_holes(folder, hidden_size=2**31 - 2),
    "a header that lies": lambda folder: (
        of_holes(folder), (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    ),
    "pieces without end": many_pieces,
    "added tokens without end": many_added,
}  # fmt: skip


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="NOT RUN: this system does not say a process's memory"
)
@pytest.mark.timeout(120)  # each takes a second or two
@pytest.mark.parametrize("name", ODD)
def test_odd_folders_take_little_memory_before_they_are_refused(name: str, tmp_path: Path) -> None:
    ODD[name](tmp_path)
    command = [sys.executable, "-c", MEASURE, "explore", "Once", "-o", str(tmp_path / "page"), "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, mebibytes = done.stdout.split()
    assert (int(code), done.stderr.count("\n")) == (2, 1), done.stderr
    assert int(mebibytes) < 1024
