"""Compare refgemma with engines that people use, in decoded tokens per second of a whole model.

    python benchmarks/peers.py tiny [--rounds 3] [--only llama] [--tokens 64] [--json] [--work FOLDER]
    python benchmarks/peers.py 2b             synthetic weights with the sizes of the 2B; FOLDER needs 30 GB

Each engine decodes the same number of tokens after the same 8 ids, greedily, on a text of one row, in a separate
process; the engines of a round run one after the other. The first token is not counted. It prints after each round,
and ends with its table at SIGINT or SIGTERM. An engine that is not installed is listed as NOT RUN. PyTorch's engines
need the extra `record`; `torch.compile` needs a C++ compiler; ONNX Runtime needs onnxruntime-genai and onnx-ir;
llama.cpp needs node, ``npm install node-llama-cpp`` in the folder of ``REFGEMMA_LLAMA_CPP``, and the extra `gguf`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from engines import processor

import refgemma
from refgemma import fast, model
from refgemma.config import Gemma2Config
from refgemma.convert.convert import convert
from refgemma.hub import find_model
from refgemma.tokenizer.sentencepiece_model import NORMAL, Piece, read_model, write_model
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.conformance import VOCABULARY, make_tokenizer
from refgemma.weights.parameters import Weights
from refgemma.weights.synthetic import write_synthetic

IDS = [2, 6, 7, 8, 9, 10, 11, 12]
LLAMA_CPP = os.environ.get("REFGEMMA_LLAMA_CPP")


def seconds_per_token(tokens: Iterator[object], count: int) -> float:
    """Return the time of one token after the first."""
    next(tokens)
    began = time.perf_counter()
    for _ in range(count):
        next(tokens)
    return (time.perf_counter() - began) / count


# --- engines: each returns the seconds of one token -------------------------------------------------------------------


def decode(read: Any, weights: Weights, config: Gemma2Config) -> Iterator[int]:
    """Yield the most likely tokens after `IDS`; `read` is a `next_token_logits`."""
    ids, cache = [IDS], None
    while True:
        logits, cache = read(ids, weights, config, cache=cache)
        ids = [[int(np.argmax(logits[0, -1]))]]
        yield ids[0][0]


def run_fast(folder: Path, count: int) -> float:
    checkpoint = open_checkpoint(folder)
    return seconds_per_token(decode(fast.next_token_logits, checkpoint.resident(), checkpoint.config), count)


def run_fast_from_file(folder: Path, count: int) -> float:
    checkpoint = open_checkpoint(folder)
    return seconds_per_token(decode(fast.next_token_logits, checkpoint.streamed(), checkpoint.config), count)


def run_definition(folder: Path, count: int) -> float:
    checkpoint = open_checkpoint(folder)
    return seconds_per_token(decode(model.next_token_logits, checkpoint.resident(), checkpoint.config), count)


def transformers_tokens(folder: Path, dtype: str, compiled: bool, count: int) -> Iterator[int]:
    import torch
    import transformers

    torch.set_grad_enabled(False)
    kind = getattr(torch, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager").eval()
    cache: Any = transformers.DynamicCache(config=theirs.config)
    if compiled:  # of fixed shapes, so that no step is compiled again
        cache = transformers.StaticCache(config=theirs.config, max_cache_len=len(IDS) + 2 * count + 8)
        theirs.forward = torch.compile(theirs.forward)
    ids, start = torch.tensor([IDS]), 0
    while True:
        places = torch.arange(start, start + ids.shape[1])
        out = theirs(ids, past_key_values=cache, cache_position=places, position_ids=places[None], logits_to_keep=1)
        ids, start = out.logits[:, -1:].argmax(-1), start + ids.shape[1]
        yield int(ids)


def run_transformers(folder: Path, count: int, dtype: str = "float32", compiled: bool = False) -> float:
    tokens = transformers_tokens(folder, dtype, compiled, count)
    for _ in range(8 if compiled else 1):  # compile the prompt and the steps
        next(tokens)
    return seconds_per_token(tokens, count)


def run_onnxruntime(folder: Path, count: int) -> float:
    import onnxruntime_genai

    target = folder.parent / f"{folder.name}-onnx"
    if not (target / "genai_config.json").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", target]
        subprocess.run([*command, "-p", "fp32", "-e", "cpu"], check=True, capture_output=True)
    theirs = onnxruntime_genai.Model(str(target))
    options = onnxruntime_genai.GeneratorParams(theirs)
    options.set_search_options(do_sample=False, min_length=len(IDS) + count + 1, max_length=len(IDS) + count + 1)
    generator = onnxruntime_genai.Generator(theirs, options)
    generator.append_tokens(np.array([IDS], np.int32))

    def tokens() -> Iterator[int]:
        while True:
            generator.generate_next_token()
            yield 0

    return seconds_per_token(tokens(), count)


LLAMA = """
import {pathToFileURL} from "node:url";
import path from "node:path";
const library = path.join(process.env.REFGEMMA_LLAMA_CPP, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library).href);
const [modelPath, ids, count, threads] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512, flashAttention: false, threads: Number(threads)});
let last, began, made = 0;
const options = {temperature: 0, yieldEogToken: true};
for await (const token of context.getSequence().evaluate(ids.split(",").map(Number), options)) {
    began ??= performance.now();
    last = performance.now();
    if (made++ == Number(count)) break;
}
console.log((last - began) / 1000 / (made - 1));
process.exit(0);
"""


def run_llama_cpp(folder: Path, count: int, kind: str) -> float:
    file = folder.parent / f"{folder.name}-{kind}.gguf"
    if not file.exists():
        write_gguf(folder, file, kind)
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / "llama.mjs"
        script.write_text(LLAMA)
        command = ["node", str(script), str(file), ",".join(map(str, IDS)), str(count), str(os.cpu_count())]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """Convert the checkpoint; for a quantised format, quantise its matrices with the library gguf."""
    if kind in ("F32", "BF16"):
        convert(folder, file, "auto", "gguf", dtype={"F32": "float32", "BF16": "bfloat16"}[kind])
        return
    import gguf

    plain = folder.parent / f"{folder.name}-BF16.gguf"
    if not plain.exists():
        write_gguf(folder, plain, "BF16")
    reader, code = gguf.GGUFReader(plain), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "gemma2")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        x = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), code) if matrix else tensor.data
        writer.add_tensor(tensor.name, x, raw_dtype=code if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ENGINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "refgemma fast, float32": (run_fast, {}),
    "refgemma fast, from the bfloat16 file": (run_fast_from_file, {}),
    "refgemma definition, float32": (run_definition, {}),
    "transformers, float32": (run_transformers, {}),
    "transformers, bfloat16": (run_transformers, {"dtype": "bfloat16"}),
    "transformers, float32, torch.compile": (run_transformers, {"compiled": True}),
    "onnxruntime-genai, float32": (run_onnxruntime, {}),
    "llama.cpp, F32": (run_llama_cpp, {"kind": "F32"}),
    "llama.cpp, BF16": (run_llama_cpp, {"kind": "BF16"}),
    "llama.cpp, Q8_0": (run_llama_cpp, {"kind": "Q8_0"}),
}


def explain_absence(engine: str) -> str:
    """Return why an engine cannot run here, or nothing."""
    needs = {"transformers": ("torch", "transformers"), "onnxruntime": ("onnxruntime_genai", "onnx_ir", "torch")}
    for name, packages in needs.items():
        missing = [package for package in packages if find_spec(package) is None]
        if engine.startswith(name) and missing:
            return f"{', '.join(missing)} not installed"
    if "compile" in engine and shutil.which("c++") is None:
        return "no C++ compiler"
    if engine.startswith("llama.cpp") and (LLAMA_CPP is None or shutil.which("node") is None):
        return "node is missing" if LLAMA_CPP else "REFGEMMA_LLAMA_CPP is not set"
    return ""


# --- the model, and the table -----------------------------------------------------------------------------------------


def prepare(name: str, work: Path) -> Path:
    """Return the folder of the model; a synthetic 2B is written once, with a tokenizer that llama.cpp can load."""
    if name == "tiny":
        folder = work / "tiny"
        shutil.copytree(find_model("tiny"), folder, dirs_exist_ok=True)
        config = Gemma2Config.from_pretrained(folder)
        config.changed(query_pre_attn_scalar=config.head_dim).save_pretrained(folder)  # llama.cpp knows no other
        return folder
    folder = work / name
    if not (folder / "config.json").exists():
        config = Gemma2Config.preset(name)
        write_synthetic(config, folder)
        Tokenizer(make_long_tokenizer(config.vocab_size)).save_pretrained(folder)
    return folder


def make_long_tokenizer(size: int) -> bytes:
    """Return a ``tokenizer.model`` with special tokens, a piece for each byte, and ordinary pieces up to `size`."""
    pieces, rest = read_model(make_tokenizer(VOCABULARY))
    more = (Piece(f"\N{LOWER ONE EIGHTH BLOCK}{n}", -float(n), NORMAL) for n in range(len(pieces), size))
    return write_model([*pieces, *more], rest)


def table(times: dict[str, list[float]], absent: dict[str, str]) -> str:
    """Return the engines as a table in Markdown, the fastest first."""
    lines = ["| engine | tokens per second | range |", "| --- | --- | --- |"]
    for engine, found in sorted(times.items(), key=lambda pair: statistics.median(pair[1])):
        rates = [1 / seconds for seconds in found]
        lines.append(f"| {engine} | {statistics.median(rates):.3g} | {min(rates):.3g} to {max(rates):.3g} |")
    return "\n".join([*lines, *(f"| {engine} | NOT RUN: {reason} | |" for engine, reason in absent.items())])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("tiny", "2b"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", default="", metavar="REGEX", help="engines whose name matches")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the files of the models here")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # run one engine in this process, and print its seconds
    args = parser.parse_args()
    if args.engine:
        run, settings = ENGINES[args.engine]
        print(run(args.work, args.tokens, **settings))
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folder = prepare(args.model, work)
        engines = [engine for engine in ENGINES if re.search(args.only, engine)]
        absent = {engine: reason for engine in engines if (reason := explain_absence(engine))}
        times: dict[str, list[float]] = {}
        try:
            for number in range(args.rounds):
                for engine in (engine for engine in engines if engine not in absent):
                    command = [sys.executable, __file__, args.model, "--engine", engine, "--work", str(folder)]
                    run = subprocess.run([*command, "--tokens", str(args.tokens)], capture_output=True, text=True)
                    if run.returncode:
                        absent[engine] = (run.stderr.strip().splitlines() or ["it failed"])[-1][:200]
                        continue
                    times.setdefault(engine, []).append(float(run.stdout.split()[-1]))
                    print(f"{engine}: {1 / times[engine][-1]:.3g} tokens per second", file=sys.stderr, flush=True)
                print(f"\nafter {number + 1} rounds\n{table(times, absent)}\n", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted: the last round is incomplete", file=sys.stderr)
    if args.json:
        print(json.dumps({"processor": processor(), "seconds_per_token": times, "not_run": absent}, indent=1))
    else:
        print(f"{table(times, absent)}\n\n{processor()}, {os.cpu_count()} processors, {args.tokens} tokens, "
              f"refgemma {refgemma.__version__}, NumPy {np.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
