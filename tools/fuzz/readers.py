"""Fuzz everything that reads other people's files.

Damaged or invented contents must be read or give the documented error. Any other exception, a crash, endless waiting
or excessive memory is a fault.

    pip install -e ".[test]" "atheris>=3"
    python -m tools.fuzz.readers NAME [-max_total_time=120 ...]      coverage-guided, with libFuzzer's options

``tests/test_fuzz.py`` tests the same readers with Hypothesis, and has a test for each fault that was found.
"""

from __future__ import annotations

import gc
import io
import json
import math
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from safetensors.numpy import save

from refgemma.config import ConfigError, Gemma2Config
from refgemma.convert.flax_tree import read_npz
from refgemma.convert.pickles import read_torch, write_torch
from refgemma.generation.generation_config import GenerationConfig
from refgemma.gguf import NUMBERS, SIZES
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.sweep.jobs import read_jobs
from refgemma.testing.strategies import tensors_of
from refgemma.tokenizer.tokenizer import Tokenizer, TokenizerError
from refgemma.trace.candidate import load_trace
from refgemma.trace.name_maps import apply_map, load_map, open_trace
from refgemma.trace.reader import Entry, TraceFile
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint, read_header
from refgemma.weights.gguf_weights import gguf_names
from refgemma.weights.save import OutputTensor

SMALL = Gemma2Config(
    vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader: the file to read, the errors that it may raise, the other files of the folder, and initial contents."""

    file: str
    read: Callable[[Path], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]
    beside: tuple[tuple[str, bytes], ...] = ()
    wrapped: Callable[[bytes], bytes] = bytes  # makes the file from the fuzzed content

    def __call__(self, content: bytes) -> Any:
        """Read `content`, and return the result, or None for a documented error; raise any other error."""
        with tempfile.TemporaryDirectory(prefix="refgemma-") as name:
            folder = Path(name)
            for other, raw in self.beside:
                (folder / other).write_bytes(raw)
            (folder / self.file).write_bytes(self.wrapped(content))
            try:
                return self.read(folder / self.file)
            except self.error:
                return None


def every_number(tensors: Any) -> Any:
    return [tensor.read("float32") for tensor in tensors.values() if tensor.nbytes < 2**20]


def tokenized(file: Path) -> Any:
    tokenizer = Tokenizer.from_pretrained(file.parent)
    ids = tokenizer.encode("a text of <bos> two\n\nlines \u00e9")
    return tokenizer.decode(ids)


def tiny_json() -> bytes:
    """Return the tiny model's tokenizer.json, with fewer pieces."""
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.from_pretrained("tiny").save_pretrained(folder)
        found = json.loads((Path(folder) / "tokenizer.json").read_bytes())
    names = [name for n, name in enumerate(found["model"]["vocab"]) if n < 300 or len(name) == 1]
    kept = found["model"]["vocab"] = {name: n for n, name in enumerate(names)}
    found["model"]["merges"] = [pair for pair in found["model"]["merges"] if {*pair, "".join(pair)} <= kept.keys()]
    return json.dumps(found).encode()


def as_torch(raw: bytes) -> bytes:
    """Return a checkpoint of torch.save with the pickle `raw`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("m/data.pkl", raw)
        for number in "01":
            archive.writestr(f"m/data/{number}", bytes(64))
    return stream.getvalue()


def pickled() -> bytes:
    """Return the pickle that `write_torch` writes for two tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ckpt"
        write_torch(file, [OutputTensor(name, "bfloat16", (3, 2), np.ones((3, 2))) for name in ("norm.weight", "a")])
        with zipfile.ZipFile(file) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{"transformer/final_norm/scale": np.ones(3, np.float32), "b": np.ones((2, 2), np.float16)})
    return stream.getvalue()


def candidates() -> tuple[bytes, ...]:
    ids = np.array([[2, 3, 4]])
    whole = {"input_ids": ids, "logits": np.ones((1, 3, 5), np.float32), "embedded": np.ones((1, 3, 4), np.float16)}
    probs = {f"calls.{n}.layers.0.attention.probs": np.ones((1, 2, 1 + n, 1 + 2 * n), np.float32) for n in (0, 1)}
    return (
        save(whole, {"dtype": "float32", "engine": "x"}),
        save({"input_ids": ids, "attention_mask": ids * 0 + 1, "position_ids": ids} | probs, {"calls": "[1, 2]"}),
    )


EVAL_TEXT = """0.00 I number of input tokens = 2
0.00 I   2
0.00 I   3
common_debug_cb_eval:         inp_scaled = (f32)      SCALE(embd{4, 2, 1, 1}, }) = {4, 2, 1, 1}
    [
        [
            [     -0.1605,      -0.3530,       0.3316,       0.3316  ],
            [     -0.0669,      -0.0374,      -0.0515,      -0.0515  ],
        ],
    ]
common_debug_cb_eval:      result_output = (f32)    MUL_MAT(x{5, 2, 1, 1}, }) = {5, 1, 1, 1}
            [     -0.0669,      -0.0374,      -0.0515,      -0.0515,  0.5   ],
"""
RULES = [
    {"pattern": "embed*ded", "tensor": "embedded", "layout": "batch seq hidden -> batch seq hidden", "last": True},
    {"pattern": "x.{layer}.qkv", "tensor": "layers.{layer}.attention.q", "occurrence": 0, "more_keys": False,
     "layout": "batch seq (all head_dim) -> batch all seq head_dim", "part": ["0", "heads", "kv_heads", "kv_heads"]},
]  # fmt: skip
NAME_MAP = json.dumps(
    {"name": "x", "says": "", "learned_from": "", "run_on": "", "rules": RULES, "ignored": {"*cache": "a cache"}}
).encode()
JOBS = b"""{"trace": ["a.safetensors", "b.safetensors"], "dtype": "float32", "allow": 2}
{"run": "port {trace}", "model": "tiny", "config": {"sliding_window": 8}, "name": "one"}
"""


def read_text(file: Path) -> Any:
    """Return the tensors of llama.cpp's text with refgemma's names; read all numbers."""
    entries = open_trace(file, SMALL, "llama.cpp").entries.values()
    return [entry.read() for entry in entries if math.prod(entry.shape) < 2**18]


def use_map(file: Path) -> Any:
    names = {"embedded": (1, 3, 4), "other": (1, 3, 4), "x.0.qkv": (1, 3, 8), "a" * 60: (1,)}
    entries = {name: Entry("F32", shape, lambda shape=shape: np.zeros(shape)) for name, shape in names.items()}
    trace = apply_map(TraceFile("port", {}, entries), load_map(str(file)), SMALL)
    return [entry.read() for entry in trace.entries.values()]


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file() -> bytes:
    """Return a GGUF file of the small model, with a tokenizer of four special tokens and the bytes."""
    numbers = {f"gemma2.{key}": getattr(SMALL, field) for field, (key, _) in (SIZES | NUMBERS).items()}
    numbers |= {"gemma2.attention.head_count_kv": 1, "gemma2.attention.key_length": 2}
    texts = {"general.architecture": "gemma2", "tokenizer.ggml.model": "llama", "tokenizer.chat_template": "{{ a }}"}
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", "a", "b", *(f"<0x{n:02X}>" for n in range(256))]
    kinds, scores = [3, 3, 3, 2, 1, 1, 1, *[6] * 256], range(len(tokens))
    lists = {
        "tokens": (8, b"".join(map(packed, tokens))), "token_type": (5, struct.pack(f"<{len(kinds)}i", *kinds)),
        "scores": (6, struct.pack(f"<{len(scores)}f", *scores)),
    }  # fmt: skip
    pairs = [
        packed(k) + (struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v))
        for k, v in numbers.items()
    ]
    pairs += [packed(key) + struct.pack("<I", 8) + packed(text) for key, text in texts.items()]
    pairs += [
        packed(f"tokenizer.ggml.{k}") + struct.pack("<IIQ", 9, t, len(tokens)) + raw for k, (t, raw) in lists.items()
    ]
    names, infos, data = gguf_names(1), [], b""
    for name, x in tensors_of(SMALL).items():
        axes = struct.pack(f"<I{x.ndim}Q", x.ndim, *x.shape[::-1])
        infos.append(packed(names[name]) + axes + struct.pack("<IQ", 0, len(data)))
        data += x.astype(np.float32).tobytes()
        data += bytes(-len(data) % 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs + infos)
    return header + bytes(-len(header) % 32) + data


def read_whole(file: Path) -> Any:
    return open_checkpoint(file).resident("bfloat16"), Tokenizer.from_pretrained(file).encode("a text")


TENSORS = tensors_of(SMALL)
CHECKPOINT, CONFIG = save(TENSORS, {"format": "pt"}), SMALL.to_json_string().encode()
INDEX = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(TENSORS, "a.safetensors")}).encode()
TINY = find_model("tiny")
MODEL, SETTINGS = ((TINY / name).read_bytes() for name in ("tokenizer.model", "tokenizer_config.json"))
TOKENIZER_JSON = tiny_json()

BASE_FILES = (("config.json", CONFIG), ("model.safetensors", CHECKPOINT))
ADAPTER_SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}}
ADAPTER = {
    f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": np.full(shape, 0.5, np.float32)
    for side, shape in {"A": (2, 4), "B": (4, 2)}.items()
}

TARGETS: dict[str, Target] = {
    "header": Target("model.safetensors", lambda f: every_number(read_header(f)), CheckpointError, (CHECKPOINT,)),
    "checkpoint": Target("model.safetensors", lambda f: open_checkpoint(f.parent).resident("bfloat16"), CheckpointError,
                         (CHECKPOINT,), (("config.json", CONFIG),)),
    "index": Target("model.safetensors.index.json", lambda f: open_checkpoint(f.parent), CheckpointError, (INDEX,),
                    (("config.json", CONFIG), ("a.safetensors", CHECKPOINT))),
    "adapter": Target("adapter_model.safetensors", lambda f: open_checkpoint(f.parent).resident(), CheckpointError,
                      (save(ADAPTER),),
                      (*BASE_FILES, ("adapter_config.json", json.dumps(ADAPTER_SETTINGS).encode()))),
    "adapter-config": Target("adapter_config.json", lambda f: open_checkpoint(f.parent).resident(), CheckpointError,
                             (json.dumps(ADAPTER_SETTINGS).encode(),),
                             (*BASE_FILES, ("adapter_model.safetensors", save(ADAPTER)))),
    "config": Target("config.json", lambda f: Gemma2Config.from_json_file(f).to_json_string(), ConfigError,
                     (CONFIG, (TINY / "config.json").read_bytes())),
    "generation": Target("generation_config.json", lambda f: GenerationConfig.from_json_file(f).to_dict(),
                         (ConfigError, InputError),
                         ((TINY / "generation_config.json").read_bytes(), b'{"temperature": 0.5, "top_k": 3}')),
    "tokenizer-settings": Target("tokenizer_config.json", tokenized, TokenizerError, (SETTINGS,),
                                 (("tokenizer.model", MODEL),)),
    "tokenizer-model": Target("tokenizer.model", tokenized, TokenizerError, (MODEL,)),
    "tokenizer-json": Target("tokenizer.json", tokenized, TokenizerError, (TOKENIZER_JSON,)),
    "candidate": Target("port.safetensors", lambda f: load_trace(f, SMALL), InputError, candidates()),
    "map": Target("map.json", use_map, InputError, (NAME_MAP,)),
    "eval-text": Target("port.txt", read_text, InputError, (EVAL_TEXT.encode(),)),
    "jobs": Target("jobs.jsonl", read_jobs, InputError, (JOBS,), (("a.safetensors", b"a"), ("b.safetensors", b"b"))),
    "pickle": Target("model.ckpt", lambda f: every_number(read_torch(f)), CheckpointError,
                     (pickled(), pickle.dumps({"a": [1, "b", (2.0, None)]}, 2)), (), as_torch),
    "torch": Target("model.ckpt", lambda f: every_number(read_torch(f)), CheckpointError, (as_torch(pickled()),)),
    "gguf": Target("model.gguf", read_whole, (CheckpointError, ConfigError, TokenizerError), (gguf_file(),)),
    "npz": Target("params.npz", lambda f: every_number(read_npz(f)), CheckpointError, (npz(),)),
}  # fmt: skip


GUIDED = ("refgemma", "json", "zipfile", "ast")  # modules whose branches guide libFuzzer


def main() -> None:
    """Run libFuzzer on a target; it begins with the seeds, and ends at the first fault."""
    import atheris

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and str(function.__module__).partition(".")[0] in GUIDED:
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = ["-timeout=10", "-rss_limit_mb=1500", "-max_len=65536", "-artifact_prefix=/dev/shm/refgemma-"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], corpus], lambda content: target(content) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
