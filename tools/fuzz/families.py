"""Define families of hostile files; each draws a folder of files (one is damaged) and a command that reads it."""

import argparse
import functools
import io
import itertools
import json
import pickle
import random
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from refgemma.cli.main import main, parser
from refgemma.cli.output import MISUSE, OK
from refgemma.config import Gemma2Config
from refgemma.model import forward
from refgemma.sweep.jobs import read_jobs
from refgemma.testing.strategies import tensors_of
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.checkpoint import INDEX, SINGLE, open_checkpoint

from .damage import (
    JSON_FILE,
    TENSOR_FILE,
    TEXT_FILE,
    TEXTS,
    Damage,
    damage_bytes,
    damage_header,
    damage_json,
)
from .readers import (
    ADAPTER,
    ADAPTER_SETTINGS,
    CHECKPOINT,
    CONFIG,
    EVAL_TEXT,
    NAME_MAP,
    SETTINGS,
    TENSORS,
    TINY,
    TOKENIZER_JSON,
    gguf_file,
)
from .readers import INDEX as INDEX_JSON
from .readers import MODEL as TOKENIZER_MODEL


@dataclass(frozen=True)
class Case:
    """A command and the files of its folder."""

    argv: Sequence[str]
    files: dict[str, bytes] = field(default_factory=dict)
    stdin: str = ""
    code: int | None = None  # the only right exit code
    wrong: bool = False  # true if exit code 0 would be a wrong PASS


Family = Callable[[random.Random], Case]
Files = dict[str, bytes]


# --- what is whole ----------------------------------------------------------------------------------------------------


def in_folder(folder: str, files: Files) -> Files:
    return {f"{folder}/{name}": content for name, content in files.items()}


MODEL: Files = {"config.json": CONFIG, SINGLE: CHECKPOINT}
MAKE = {"head_dim": 2, "hidden_size": 4, "intermediate_size": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


@functools.cache
def make_text_model() -> Files:
    """Make a model with the tiny model's tokenizer, and so few numbers that writing takes no time."""
    tokenizer = Tokenizer.from_pretrained("tiny")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = Gemma2Config(vocab_size=len(tokenizer), num_hidden_layers=1, **MAKE, **ids)
    return {
        "config.json": config.to_json_string().encode(),
        SINGLE: save(tensors_of(config), {"format": "pt"}),
        "generation_config.json": (TINY / "generation_config.json").read_bytes(),
        "tokenizer.model": TOKENIZER_MODEL,
        "tokenizer_config.json": SETTINGS,
    }


@contextmanager
def laid_out(files: Files) -> Iterator[Path]:
    """Write files into a temporary folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / path).write_bytes(content)
        yield Path(name)


def run(argv: Sequence[str], files: Files, wanted: str) -> bytes:
    """Run a command among `files`, and return the file `wanted` that it writes."""
    with laid_out(files) as folder:
        with redirect_stdout(io.StringIO()):
            code = main([part.replace("@", str(folder)) for part in argv])
        if code:
            raise RuntimeError(f"{argv} ended with {code}")
        return (folder / wanted).read_bytes()


@functools.cache
def make_trace(text: bool = False) -> bytes:
    files = make_text_model() if text else MODEL
    return sort_metadata(
        run(["trace", "--model", "@/m", "--ids", "2,3,4,1,2,3", "-o", "@/t"], in_folder("m", files), "t")
    )


def sort_metadata(raw: bytes) -> bytes:
    """Return a safetensors file with sorted metadata, because the library writes metadata in random order."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


GGUF_FILE = gguf_file()
SPECIAL = json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": True}}).encode()
ADDED = json.dumps({"<new>": 2048, "<other>": 5}).encode()
GENERATION = json.dumps({
    "do_sample": True, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "eos_token_id": [1, 107], "bos_token_id": 2,
    "max_new_tokens": 2, "num_beams": 2, "repetition_penalty": 1.1, "bad_words_ids": [[3]], "suppress_tokens": [4],
    "sequence_bias": [[[3], 1.0]], "min_p": 0.1, "no_repeat_ngram_size": 2, "length_penalty": 1.0,
    "num_return_sequences": 1,
}).encode()  # fmt: skip
ADAPTER_JSON = json.dumps(ADAPTER_SETTINGS | {
    "base_model_name_or_path": "model", "target_modules": ["q_proj"], "modules_to_save": None, "use_rslora": False
}).encode()  # fmt: skip
TEMPLATES = (
    b"{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}",
    b"{% for a in range(3) %}{% for m in messages %}{{ m.content * 2 }}{{ raise_exception('no') if loop.last }}"
    b"{% endfor %}{% endfor %}",
    b"{{ ''.__class__.__mro__ }}{{ messages[0]['content'].format }}{% set x = namespace(a=1) %}{{ x.a }}",
    b"{% macro f(n) %}{{ f(n - 1) if n else messages | tojson }}{% endmacro %}{{ f(3) }}{{ strftime_now('%d') }}",
)
SPARE = {"a.safetensors": CHECKPOINT, "b.safetensors": save({"model.norm.weight": TENSORS["model.norm.weight"]})}
SHORT = ["--max-new-tokens", "2"]
IDS = ["generate", "--model", "model", "--ids", "2,3", *SHORT]
TEXT = ["generate", "--model", "model", "Once <bos> upon\n\n\u00e9", *SHORT]
CHAT = ["chat", "--model", "model", *SHORT]
CONVERT = ["convert", "model", "-o", "out"]
OF_A_MODEL = (
    ["info", "model"], ["info", "model", "--json", "--hash"], IDS, [*IDS, "--num-beams", "2"], [*IDS, "--reference"],
    CONVERT,    ["trace", "--model", "model", "--ids", "2,3", "-o", "out.safetensors"], [*CONVERT, "--to", "flax-npz"],
    [*CONVERT, "--to", "pytorch"], [*CONVERT, "--dtype", "float16", "--max-shard-size", "200"],
    ["prompts", "--model", "model"], ["check", "trace.safetensors", "--model", "model"], ["verify", "--model", "model"],
)  # fmt: skip
OF_A_TRACE = (
    ["check", "port", "--model", "model"], ["check", "port", "--model", "model", "--json", "--dtype", "float64"],
    ["check", "port", "--model", "model", "--html", "out.html", "--markdown", "out.md", "--junit", "out.xml"],
    ["check", "port", "--model", "model", "--repro", "out.safetensors"], ["check", "port"],
    ["diff", "port", "whole"], ["diff", "whole", "port", "--model", "model", "--json"],
    ["map", "port", "--model", "model", "--map", "transformers"],
    ["check", "whole", "--model", "model", "--weights", "port"],
)  # fmt: skip


# --- one damaged file in a folder -------------------------------------------------------------------------------------


def damaged(
    file: str, whole: bytes | Sequence[bytes], damage: Damage, commands: Sequence[list[str]], beside: Files,
    stdin: str = "",
) -> Family:  # fmt: skip
    """Make a family in which a file is damaged once, or twice in one of ten cases."""
    kinds = [whole] if isinstance(whole, bytes) else whole

    def make(draw: random.Random) -> Case:
        content = damage(draw.choice(kinds), draw)
        if draw.random() < 0.1:
            content = damage_bytes(content, draw)
        return Case(draw.choice(commands), beside | {file: content}, stdin)

    return make


def in_model(file: str, whole: bytes | Sequence[bytes], damage: Damage, commands: Sequence[list[str]]) -> Family:
    """Make a family in which a file of a model with a tokenizer is damaged."""
    beside = in_folder("model", make_text_model())
    if file == "tokenizer.json":
        del beside["model/tokenizer.model"]
    return damaged(f"model/{file}", whole, damage, commands, beside, "hello\nwell\n\n")


def configurations(draw: random.Random) -> Case:
    files = in_folder("model", MODEL) | {"trace.safetensors": make_trace()}
    return damaged("model/config.json", CONFIG, JSON_FILE, OF_A_MODEL, files)(draw)


def headers(draw: random.Random) -> Case:
    files = in_folder("model", MODEL) | {"trace.safetensors": make_trace()}
    return damaged(f"model/{SINGLE}", CHECKPOINT, TENSOR_FILE, OF_A_MODEL, files)(draw)


def indices(draw: random.Random) -> Case:
    files = in_folder("model", {"config.json": CONFIG} | SPARE)
    return damaged(f"model/{INDEX}", INDEX_JSON, JSON_FILE, OF_A_MODEL[:6], files)(draw)


def tokenizers(draw: random.Random) -> Case:
    trace = ["trace", "a", "--model", "model", "-o", "out.safetensors"]
    commands = (TEXT, ["perplexity", "text", "--model", "model"], trace)
    file, whole, damage = draw.choice([
        ("tokenizer.model", TOKENIZER_MODEL, damage_bytes), ("tokenizer.json", TOKENIZER_JSON, JSON_FILE),
        ("tokenizer_config.json", SETTINGS, JSON_FILE), ("special_tokens_map.json", SPECIAL, JSON_FILE),
        ("added_tokens.json", ADDED, JSON_FILE),
    ])  # fmt: skip
    case = in_model(file, whole, damage, commands)(draw)
    return Case(case.argv, case.files | {"text": b"One day.\r\nTwo days, <eos>.\n"}, case.stdin)


def templates(draw: random.Random) -> Case:
    if draw.random() < 0.3:
        settings = json.loads(SETTINGS) | {"chat_template": TEMPLATES[0].decode()}
        return in_model("tokenizer_config.json", json.dumps(settings).encode(), JSON_FILE, (CHAT,))(draw)
    return in_model("chat_template.jinja", TEMPLATES, TEXT_FILE, (CHAT,))(draw)


def generation(draw: random.Random) -> Case:
    return in_model("generation_config.json", GENERATION, JSON_FILE, (TEXT, [*TEXT, "--json"], CHAT))(draw)


def gguf(draw: random.Random) -> Case:
    argv = (["info"], ["generate", "--ids", "2,3", *SHORT, "--model"], ["generate", "a b", *SHORT, "--model"],
            ["convert", "-o", "out"])  # fmt: skip
    return damaged("m.gguf", GGUF_FILE, damage_bytes, [[*part, "m.gguf"] for part in argv], {})(draw)


def adapters(draw: random.Random) -> Case:
    files = in_folder("model", MODEL) | {
        "a/adapter_config.json": ADAPTER_JSON, "a/adapter_model.safetensors": save(ADAPTER)
    }  # fmt: skip
    commands = [[part if part != "model" else "a" for part in argv] for argv in OF_A_MODEL[:8]]
    file, damage = draw.choice([("adapter_config.json", JSON_FILE), ("adapter_model.safetensors", TENSOR_FILE)])
    return damaged(f"a/{file}", files[f"a/{file}"], damage, commands, files)(draw)


def maps(draw: random.Random) -> Case:
    names = {"embed": "embedded", "odded": "other", "x.0.qkv": "logits"}
    whole = load(make_trace())
    port = save({a: whole[b] for a, b in names.items() if b in whole} | {"input_ids": whole["input_ids"]})
    known = ["port", "--model", "model", "--map", "map.json"]
    commands = (["map", *known], ["check", *known], ["map", "--json", *known])
    files = in_folder("model", MODEL) | {"port": port}
    return damaged("map.json", NAME_MAP, JSON_FILE, commands, files)(draw)


def eval_texts(draw: random.Random) -> Case:
    check = ["check", "port.txt", "--model", "model"]
    commands = (check, [*check, "--map", "llama.cpp"], ["map", *check[1:]], ["diff", "port.txt", "port.txt"])
    return damaged("port.txt", EVAL_TEXT.encode(), TEXT_FILE, commands, in_folder("model", MODEL))(draw)


def damage_numbers(raw: bytes, draw: random.Random) -> bytes:
    """Put odd numbers into some tensors of a trace, or give the tensors another dtype or shape."""
    tensors = load(raw)
    for name in draw.sample(sorted(tensors), draw.randint(1, 4)):
        x = tensors[name].copy()
        match draw.randrange(6):
            case 0 if x.size:
                x.reshape(-1)[draw.randrange(x.size)] = draw.choice([0, 1, 100])
            case 1 if x.dtype.kind == "f":
                x.reshape(-1)[:: draw.choice([1, 3])] = draw.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0])
            case 2:
                x = x.astype(draw.choice([np.float16, np.float64, np.int64, np.int8, np.bool_, np.uint64]))
            case 3:
                x = x[draw.choice([slice(0), slice(None, None, -1), slice(1), None])]
            case 4:
                x = np.repeat(x, 2, axis=-1) if x.ndim else x
            case _:
                names = [*sorted(tensors), "calls.0.logits", "attention_mask", "position_ids", "layers.9.out"]
                tensors[draw.choice(names)] = x
        tensors[name] = np.ascontiguousarray(x)
    metadata = {"dtype": "float32", "format": "refgemma-trace/1", "calls": draw.choice(["[6]", "[3, 3]", "[1, 5]"])}
    texts = [*(text for text in TEXTS if text.isprintable()), "float16", "llama.cpp", "map.json", "[" * 5000]
    for key in draw.sample([*metadata, "map", "text", "chat", "config", "engine"], draw.randint(0, 2)):
        metadata[key] = draw.choice(texts)
    return sort_metadata(save(tensors, metadata if draw.random() < 0.7 else {"dtype": "float32"}))


def traces(draw: random.Random) -> Case:
    text = draw.random() < 0.2  # use a tokenizer, so that a text or chat in the metadata is compared
    whole = make_trace(text)
    files = in_folder("model", make_text_model() if text else MODEL) | {"whole": whole, "map.json": NAME_MAP}
    damage = draw.choice([damage_numbers, damage_header, damage_bytes])
    return damaged("port", whole, damage, OF_A_TRACE, files)(draw)


# --- jobs and what is kept of them ------------------------------------------------------------------------------------

JOB = {"trace": "t.safetensors", "model": "model", "config": {"sliding_window": 8}, "name": "one", "dtype": "float32"}
JOBS = (
    json.dumps(JOB).encode() + b"\n",
    b'{"trace": ["t.safetensors", "u.safetensors"], "model": "model", "allow": 2, "weights": "model"}\n',
    b'{"run": "./absent {model} {prompt} {trace}", "prompt": "t.safetensors", "model": "model", "map": "llama.cpp"}\n',
)


def of_jobs() -> Files:
    return in_folder("model", MODEL) | {"t.safetensors": make_trace(), "u.safetensors": make_trace()}


def jobs(draw: random.Random) -> Case:
    line = damage_json(draw.choice(JOBS), draw) if draw.random() < 0.6 else TEXT_FILE(b"".join(JOBS), draw)
    argv = ["sweep", "jobs.jsonl", *draw.choice([[], ["--json"], ["--again"]])]
    return Case(argv, of_jobs() | {"jobs.jsonl": line})


@functools.cache
def make_kept() -> tuple[str, bytes]:
    """Return the file that a sweep stores for its single job; its name depends only on the job."""
    name = f"jobs.jsonl.results/{read_key()}.json"
    files = of_jobs() | {"jobs.jsonl": json.dumps(JOB).encode()}
    return name, run(["sweep", "@/jobs.jsonl"], files, name)


def read_key() -> str:
    with laid_out(of_jobs() | {"jobs.jsonl": json.dumps(JOB).encode()}) as folder:
        return read_jobs(folder / "jobs.jsonl")[0].key


def results(draw: random.Random) -> Case:
    name, content = make_kept()
    files = of_jobs() | {"jobs.jsonl": json.dumps(JOB).encode(), name: JSON_FILE(content, draw)}
    return Case(["sweep", "jobs.jsonl", *draw.choice([[], ["--json"]])], files, code=0)


# --- pickles and archives ---------------------------------------------------------------------------------------------

OPCODES = b"(.0N]}t)\x85\x86\x87\x88\x89aeusbRQqrhj\x94K\x01M\x01\x02J\x01\x02\x03\x04G12345678"
OPCODES += b"c\x93X\x8c\x8a\x80\x95lIFSVUTBCdo\x81\x92"
CYCLES = (b"}q\x00X\x01\x00\x00\x00ah\x00s", b"]q\x00h\x00a", b"}q\x00]q\x01h\x01ah\x00b")
CALLED = (
    b"ctorch\ndevice\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
)


class Calls:
    """An object that requests a call when unpickled."""

    def __reduce__(self) -> Any:
        return draw_call, ("id",)


def draw_call(command: str) -> None:
    """A function that no reader of a checkpoint may call."""
    raise AssertionError(command)


def draw_pickle(draw: random.Random) -> bytes:
    """Draw a pickle: damaged, of random opcodes, deep, cyclic or wide, or one that requests a call."""
    depth = draw.choice([10, 1000, 100_000, 1_000_000])
    match draw.randrange(9):
        case 0 | 1 | 2:
            return damage_bytes(read_entries("model.ckpt")["archive/data.pkl"], draw)
        case 3:
            return b"\x80\x02" + bytes(draw.choices(OPCODES, k=draw.choice([5, 50, 1000]))) + b"."
        case 4:
            return b"\x80\x02" + draw.choice([b"]", b"(", b"}", b")", b"]q\x00h\x00a", b"N\x85"]) * depth + b"."
        case 5:  # each list contains the previous list twice
            return b"\x80\x02]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(draw.choice([3, 30, 200]))) + b"."
        case 6:  # a dict and a list that contain themselves
            return b"\x80\x02" + draw.choice(CYCLES) + b"."
        case 7:
            odd: list[Any] = [Calls(), {"a": Calls()}, {b"a": 1}, {1: {2}}, {"a": 2**4000}, {"x": [1.5, (1, 2)]}]
            return pickle.dumps(draw.choice(odd), draw.randrange(6))
        case _:  # many arguments for repeated calls
            calls = b"h\x01h\x00R" * draw.choice([5, 50_000])
            return b"\x80\x02(" + b"N" * 10_000 + b"tq\x00" + draw.choice(CALLED) + b"q\x01" + calls + b"."


def pickles(draw: random.Random) -> Case:
    raw = draw_pickle(draw)
    content = pack(read_entries("model.ckpt") | {"archive/data.pkl": raw}) if draw.random() < 0.9 else raw
    files = {"in/config.json": CONFIG, "in/model.ckpt": content}
    source = draw.choice([["in"], ["in/model.ckpt", "--from", "pytorch"]])
    return Case(["convert", *source, "-o", "out"], files)


def pack(entries: dict[str, bytes]) -> bytes:
    """Return an archive with uncompressed entries."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def read_entries(name: str) -> dict[str, bytes]:
    """Return the entries of an original checkpoint."""
    with zipfile.ZipFile(io.BytesIO(make_originals()[name])) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


def zipped(entries: dict[str, bytes], draw: random.Random) -> bytes:
    """Return an archive with entries that may be compressed, doubled, or oddly named."""
    stream = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            for _ in range(draw.choice([1, 1, 1, 1, 2])):
                info = zipfile.ZipInfo(draw.choice([name, name, name, "../" + name, "/etc/" + name, name * 50]))
                info.compress_type = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
                archive.writestr(info, content)
    return stream.getvalue()


@functools.cache
def make_originals() -> dict[str, bytes]:
    """Return the small model as PyTorch and Flax checkpoints."""
    files = in_folder("m", MODEL)
    return {
        "model.ckpt": run(["convert", "@/m", "-o", "@/o", "--to", "pytorch"], files, "o/model.ckpt"),
        "params.npz": run(["convert", "@/m", "-o", "@/o", "--to", "flax-npz"], files, "o/params.npz"),
        "flax.safetensors": run(["convert", "@/m", "-o", "@/o", "--to", "flax"], files, "o/model.safetensors"),
    }


def archives(draw: random.Random) -> Case:
    name = draw.choice(sorted(make_originals()))
    whole = make_originals()[name]
    if name == "flax.safetensors":
        content = TENSOR_FILE(whole, draw)
    elif draw.random() < 0.5:
        content = damage_bytes(whole, draw)
    else:
        entries = read_entries(name)
        chosen = draw.choice(sorted(entries))
        content = zipped(entries | {chosen: damage_bytes(entries[chosen], draw)}, draw)
    argv = ["convert", f"in/{name}", "-o", "out", "--config", "in/config.json", "--gating-einsum", "transposed"]
    return Case(argv, {"in/config.json": CONFIG, f"in/{name}": content})


RECORDED = Path(__file__).resolve().parents[2] / "tests" / "recorded" / "sglang"


@functools.cache
def make_dump() -> tuple[Files, Files]:
    """Return the files of SGLang's dump among the recorded samples, and those of its model."""
    files: Files = {}
    for name in ("config.json", SINGLE):
        files[name] = run(["conformance", "-o", "@/m", "--head-dim", "8"], {}, f"m/{name}")
    return {str(path.relative_to(RECORDED)): path.read_bytes() for path in sorted(RECORDED.rglob("*.pt"))}, files


def dumps(draw: random.Random) -> Case:
    """Damage a file of a dump or one entry of it, or leave out, add, exchange or rename files."""
    dump, model = make_dump()
    files, chosen = dict(dump), draw.choice(sorted(dump))
    match draw.randrange(6):
        case 0 | 1:
            files[chosen] = damage_bytes(files[chosen], draw)
        case 2 | 3:
            with zipfile.ZipFile(io.BytesIO(files[chosen])) as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            name = draw.choice(sorted(entries))
            files[chosen] = pack(entries | {name: damage_bytes(entries[name], draw)})
        case 4:
            other, content = draw.choice(sorted(dump)), files.pop(chosen)
            files |= draw.choice([{}, {chosen: files.get(other, b"")}, {chosen.replace("Pass0000", "Pass9"): content}])
        case _:
            folder = draw.choice(
                ["TP0_PP0_Rank0_pid1", "TP7_PP0_Rank7_pid1", "TP0_PP1_Rank0_pid1", "TP\u0660_PP0", "a"]
            )
            files |= {f"{folder}/{Path(chosen).name}": files[chosen]}
    commands = [["check", "port", "--model", "model"], ["map", "port", "--model", "model"], ["diff", "port", "port"]]
    return Case(draw.choice(commands), in_folder("port", files) | in_folder("model", model))


# --- arguments --------------------------------------------------------------------------------------------------------

NEVER = ("--download", "--scheduler", "--full", "--workers", "--cover")  # networks, minutes
ODD_NUMBERS = ("0", "-1", "2", "3", "nan", "inf", "1e400", "", "x", "\u0663", "1_000", "9" * 30, "0x10", "2.5", " 4")
# An argument may name a file to write, but never a system file.
HARMLESS = tuple(text for text in TEXTS if not text.startswith(("/", "..")))
ODD_PATHS = (
    "",
    ".",
    "model",
    "absent",
    "absent/out",
    "whole",
    "model/config.json",
    "out/",
    "a" * 300,
)


@functools.cache
def list_commands() -> dict[str, argparse.ArgumentParser]:
    return dict(next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices)


@functools.cache
def list_options() -> dict[str, list[argparse.Action]]:
    return {name: command._actions for name, command in list_commands().items() if name not in ("synth", "verify")}


def list_codes(name: str) -> set[int]:
    """Return the exit codes that the help of a command states; without any, 0 and 2."""
    command = list_commands().get(name)
    stated = (command.epilog or "").partition("Exit codes: ")[2].partition(".")[0] if command else ""
    return {int(code) for code in re.findall(r"(?:^|, | and )(\d)(?= )", stated)} or {OK, MISUSE}


def draw_argument(action: argparse.Action, draw: random.Random) -> str:
    if action.choices and draw.random() < 0.8:
        return str(draw.choice([c for c in action.choices if c != "docs"]))
    if action.type in (int, float) or action.dest == "ids":
        # Request few tokens, because many take long.
        chosen = ODD_NUMBERS if action.dest not in ("max_new_tokens", "min_new_tokens") else ODD_NUMBERS[:-5]
        return ",".join(draw.choices(chosen, k=draw.choice([1, 3]) if action.dest == "ids" else 1))
    # Use short prompts, because the work for a trace grows with the square of the tokens.
    longest = 500 if action.dest == "prompt" else None
    return draw.choice([*ODD_PATHS, *(text[:longest] for text in HARMLESS if text)])


def arguments(draw: random.Random) -> Case:
    if draw.random() < 0.1:
        words = [
            "verify",
            "synth",
            "2b",
            "-o",
            "--list",
            "--json",
            "absent",
            "--version",
            "--help",
            "-1",
            "--",
            *HARMLESS,
        ]
        argv = [draw.choice(["", "verify", "info", "nothing", "synth", *HARMLESS]), *draw.choices(words, k=2)]
        if argv[:1] == ["verify"] and not {"--help", "--list"} & set(argv):
            argv.insert(1, "absent")
        if argv[0] == "synth" and "2b" in argv:
            argv.append("9b")  # one argument too many, because synth would write gigabytes
    else:
        name = draw.choice(sorted(list_options()))
        actions = [a for a in list_options()[name] if not set(a.option_strings) & {*NEVER, "-h"}]
        required = [a for a in actions if a.required or not a.option_strings]
        argv = [name]
        for action in itertools.chain(required, draw.sample(actions, min(len(actions), draw.randint(0, 3)))):
            argv += action.option_strings[-1:]
            if action.nargs != 0:
                argv.append(draw_argument(action, draw))
        if name in ("generate", "chat"):
            argv += SHORT
        if draw.random() < 0.6 and name != "info":
            argv += ["--model", "model"] if name not in ("map", "sweep", "convert", "known-bugs", "variants") else []
    argv = [part.replace("\0", "0") for part in argv]  # no system starts a command with a NUL
    files = in_folder("model", make_text_model()) | {"whole": make_trace(), "jobs.jsonl": JOBS[0], "a.txt": b"a text"}
    return Case(argv, files, "hello\n\n")


def prompts(draw: random.Random) -> Case:
    """Draw texts, used as a file, as a prompt, or as input of a chat."""
    text = TEXT_FILE(b"One day, a <bos> girl.\r\n\r\nShe <end_of_turn> said 12 <0x0A>\t\n", draw)
    files = in_folder("model", make_text_model()) | {"text": text}
    said = text.decode("utf-8", "replace").replace("\0", "0")[:2000]
    measure = ["perplexity", "text", "--model", "model"]
    argv, stdin = draw.choice([
        (measure, ""), ([*measure, "--max-length", "8", "--stride", draw.choice(["1", "7", "8", "9", "0", "-1"])], ""),
        (["generate", said, "--model", "model", *SHORT], ""), (CHAT, said),
        (["explore", said[:200], "--model", "model", "-o", "out.html"], ""),
    ])  # fmt: skip
    return Case(argv, files, stdin)


# --- a wrong port -----------------------------------------------------------------------------------------------------

NUMBERS = ("rope_theta", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
           "sliding_window")  # fmt: skip
FACTORS = (1e-299, 1e-30, 1e-3, 0.5, 2.0, 100.0, 1e30, 1e299)
PORT = Gemma2Config(vocab_size=11, num_hidden_layers=2, sliding_window=3, **(MAKE | {"head_dim": 4}))
PORT_IDS = [[2, 3, 4, 1, 5, 7, 10, 9]]
PORT_TENSORS = {name: x * 3 for name, x in tensors_of(PORT).items()}


@functools.cache
def make_port() -> tuple[Files, bytes]:
    files = {"config.json": PORT.to_json_string().encode(), SINGLE: save(PORT_TENSORS, {"format": "pt"})}
    ids = ",".join(map(str, PORT_IDS[0]))
    return files, sort_metadata(run(["trace", "--model", "@/m", "--ids", ids, "-o", "@/t"], in_folder("m", files), "t"))


def differs(files: Files) -> bool:
    """Return True if a model's logits differ from the port's by far more than rounding."""
    try:
        with laid_out(files) as folder, np.errstate(all="ignore"):
            checkpoint = open_checkpoint(folder)
            found = forward(np.array(PORT_IDS), checkpoint.weights("float64"), checkpoint.config).logits
    except ValueError:
        return False  # an error, which the exit code shows
    right = load(make_port()[1])["logits"].astype(np.float64)
    return not bool(np.abs(found - right).max() <= 1e-3 * np.abs(right).max())  # NaN counts as a difference


def wrong_ports(draw: random.Random) -> Case:
    """Draw a check of one model's trace against a model with another configuration number, weight or tensor."""
    files, trace = make_port()
    argv = ["check", "port", "--model", "model", *draw.choice([[], ["--json"], ["--dtype", "float32"]])]
    kind = draw.randrange(3)
    if kind == 0:
        config = json.loads(files["config.json"])
        key = draw.choice(NUMBERS)
        value = float(config[key]) * draw.choice(FACTORS)
        changed = config | {key: max(1, int(value)) if key == "sliding_window" else value}
        files = files | {"config.json": json.dumps(changed).encode()}
    elif kind == 1:
        tensors = {name: x.copy() for name, x in PORT_TENSORS.items()}
        x = tensors[draw.choice(sorted(tensors))]
        x.reshape(-1)[draw.randrange(x.size)] += draw.choice([-3.0, 0.5, 1e4, 1e30, np.inf, np.nan])
        files = files | {SINGLE: save(tensors, {"format": "pt"})}
    else:
        tensors = {name: x.copy() for name, x in load(trace).items()}
        name = draw.choice([n for n, x in sorted(tensors.items()) if x.dtype.kind == "f"])
        flat = tensors[name].reshape(-1)
        usual = np.flatnonzero(np.isfinite(flat) & (np.abs(flat) < 1e30))
        flat[draw.choice(usual.tolist())] += draw.choice([0.5, -2.0, 1e30, np.nan, np.inf]) * np.abs(flat[usual]).max()
        masked = name.endswith(("scores", "probs", "capped", "masked"))  # masked elements may have any value
        trace = save(tensors, {"dtype": "float32"})
        return Case(argv, in_folder("model", files) | {"port": trace}, wrong=not masked)
    return Case(argv, in_folder("model", files) | {"port": trace}, wrong=differs(files))


FAMILIES: dict[str, Family] = {
    "configurations": configurations, "headers": headers, "indices": indices, "tokenizers": tokenizers,
    "templates": templates, "generation": generation, "gguf": gguf, "adapters": adapters, "maps": maps,
    "eval-texts": eval_texts, "traces": traces, "jobs": jobs, "results": results, "pickles": pickles,
    "archives": archives, "dumps": dumps, "arguments": arguments, "prompts": prompts, "wrong-ports": wrong_ports,
}  # fmt: skip


def make_case(family: str, seed: int, number: int) -> Case:
    """Make a case; the same arguments give the same case."""
    return FAMILIES[family](random.Random(f"{seed} {family} {number}"))
