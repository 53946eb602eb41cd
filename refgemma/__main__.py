"""The command line: it handles arguments and prints; the work is done elsewhere.

Exit codes: 0 all is well (verify: conforms), 1 verify found a difference, 2 misuse or bad input, 130 interrupted,
141 the reader of the output went away before its end.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import refgemma
from refgemma import fast
from refgemma.config import ConfigError, Gemma2Config
from refgemma.files import replace_file
from refgemma.generation import Prompts, continued, generate_batch, sampling
from refgemma.hub import ModelNameError, find_model
from refgemma.inputs import InputError
from refgemma.oracle import commands as oracle
from refgemma.oracle.full_size import (
    TWO_LAYERS,
    full_result,
    is_full_size,
    load_full,
    recording_of,
    steps_of,
    two_layer_names,
    verify_full,
)
from refgemma.oracle.trace import run_in_order, save_trace, target_file
from refgemma.oracle.verify import CaseResult, Comparison, GoldenError, case_names, verify
from refgemma.perplexity import gemma_cpp_bits_per_byte, strided_perplexity
from refgemma.pretrained import Pretrained, load
from refgemma.released import PUBLISHED, published_figures, published_text
from refgemma.settings import GenerationConfig
from refgemma.tokenizer import TextStream, TokenizerError
from refgemma.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from refgemma.weights.convert import FORMATS, convert
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.synthetic import write_synthetic

OK, DIFFERS, MISUSE, INTERRUPTED, CUT_OFF = 0, 1, 2, 130, 141
EXIT_CODES = (
    "Exit codes: 0 all is well, 1 verify or check found a difference, 2 misuse or bad input (one line says which), "
    "3 and 4: see refgemma check --help."
)
MODEL_HELP = "tiny, conformance, a Hugging Face folder, or a hub id like google/gemma-2-9b"
DTYPES = ("float32", "float64", "bfloat16", "float16")
# What a person can have done wrong, as opposed to a fault of this program.
MISTAKES = (
    CheckpointError, ConfigError, GoldenError, InputError, ModelNameError, TokenizerError, OSError, UnicodeError
)  # fmt: skip


# --- arguments --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(MISUSE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """All commands and their arguments."""
    top = Parser(
        prog="refgemma",
        description="Gemma 2 in NumPy: run it, look inside, compare it with PyTorch.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"refgemma {refgemma.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> Parser:
        command: Parser = commands.add_parser(name, help=help, description=help)
        command.add_argument("--json", action="store_true", help="print JSON instead of text (chat: an object a turn)")
        return command

    def add_hub(command: Parser) -> None:
        command.add_argument("--revision", default="main", metavar="REV", help="of a hub id: branch, tag or commit")
        command.add_argument("--download", action="store_true", help="download a hub id that is not in the cache")

    def add_model(command: Parser) -> None:
        command.add_argument("--model", default="tiny", metavar="MODEL", help=f"{MODEL_HELP} (default: tiny)")
        add_hub(command)
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the computation")

    def add_reference(command: Parser) -> None:
        command.add_argument("--reference", action="store_true", help="compute as the definition says, which is slower")

    def add_sampling(command: Parser) -> None:
        command.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
        command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
        command.add_argument("--top-k", type=int, metavar="K", help="draw only from the K likeliest tokens")
        command.add_argument(
            "--top-p", type=float, metavar="P", help="draw only from the likeliest up to probability P"
        )
        command.add_argument(
            "--min-p", type=float, metavar="P", help="draw only tokens P times as likely as the likeliest"
        )
        command.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
        command.add_argument("--min-new-tokens", type=int, metavar="N", help="no end of text before N tokens")
        command.add_argument("--seed", type=int, default=0)
        add_reference(command)

    def add_prompt(command: Parser) -> None:
        command.add_argument("prompt", nargs="?", metavar="PROMPT")
        command.add_argument("--ids", metavar="ID,ID,...", help="token ids instead of a prompt, taken as they are")

    command = add("generate", "continue a text")
    add_prompt(command)
    add_model(command)
    add_sampling(command)
    command.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="search with N beams, and print the best"
    )

    command = add("chat", "talk in turns; an empty line or end of input ends it")
    add_model(command)
    add_sampling(command)

    command = add("verify", "compare with what PyTorch recorded, tensor by tensor")
    command.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    command.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    command.add_argument(
        "--full",
        metavar="NAME",
        help="instead: a whole model at full size with synthetic weights, 9b-synthetic for instance",
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --full and --model")
    command.add_argument(
        "--model",
        metavar="DIR",
        help="instead: a checkpoint, with what golden/record.py --checkpoint recorded of it; with --full, "
        "what refgemma synth wrote",
    )
    command.add_argument(
        "--reference",
        action="store_true",
        help="of --full and --model in float32: every tensor of the definition, not what each fast layer gives",
    )

    command = add("trace", "write every named tensor of a run to a safetensors file")
    add_prompt(command)
    command.add_argument("-o", "--output", required=True, metavar="FILE")
    add_model(command)

    command = add("explore", "write one page that shows a run: attention, sizes and answers by token, layer and head")
    add_prompt(command)
    command.add_argument("-o", "--output", default="explorer.html", metavar="FILE", help="default: explorer.html")
    add_model(command)

    command = add("perplexity", "how well a model predicts a text, as transformers defines it and as gemma.cpp does")
    command.add_argument("file", nargs="?", metavar="FILE", help="a text in UTF-8")
    command.add_argument(
        "--published", choices=list(PUBLISHED), help="instead: a text that gemma.cpp has published figures of"
    )
    add_model(command)
    command.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a window (default: 4096, or what the model can)"
    )
    command.add_argument("--stride", type=int, default=512, metavar="N", help="tokens from window to window (512)")
    add_reference(command)

    command = add("convert", "convert an original checkpoint to a Hugging Face folder, or back")
    command.add_argument("source", metavar="SOURCE", help="a folder or file: .ckpt, .npz, .safetensors, shards")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="an empty folder, or none yet")
    command.add_argument("--from", dest="kind", choices=("auto", "hf", "pytorch", "flax"), default="auto")
    command.add_argument("--to", choices=FORMATS, default="hf", help="default: hf")
    command.add_argument("--config", metavar="FILE", help="config.json of an original that is no released size")
    command.add_argument("--dtype", choices=DTYPES, help="default: that of the source, bit for bit")
    command.add_argument("--max-shard-size", metavar="SIZE", help="of a file (default: 5GB; pytorch: all in one)")
    command.add_argument("--vocab-rows", type=int, metavar="N", help="pad the embedding of an original: 256128 in Flax")
    command.add_argument(
        "--gating-einsum", choices=("transposed", "plain"), help="its layout in a Flax tree, where sizes do not tell"
    )

    command = add("synth", "write a checkpoint of a released size with synthetic weights, that nobody trained")
    command.add_argument("size", choices=("2b", "9b", "27b"), metavar="SIZE", help="2b, 9b or 27b")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="an empty folder, or none yet")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")

    command = add("info", "print a model's configuration, size and tensors")
    command.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help=f"{MODEL_HELP} (default: tiny)")
    add_hub(command)

    oracle.add_commands(add)
    return top


def prompt_ids(args: argparse.Namespace, model: Pretrained) -> list[int]:
    """The token ids of ``PROMPT`` or ``--ids``."""
    if (args.prompt is None) == (args.ids is None):
        raise InputError("give either a PROMPT or --ids, and only one of them")
    if args.ids is not None:
        parts = [part.strip() for part in args.ids.split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
            raise InputError(f"--ids {args.ids!r}: whole numbers with commas between them are needed")
        return [int(part) for part in parts]
    if not args.prompt:
        raise InputError("the prompt is empty")
    return model.tokenizer.encode(args.prompt)


def as_json(value: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


# --- commands ---------------------------------------------------------------------------------------------------------


def generation_settings(model: Pretrained, args: argparse.Namespace) -> GenerationConfig:
    """The sampling arguments, checked."""
    others = {name: getattr(args, name) for name in ("min_p", "repetition_penalty", "min_new_tokens")}
    others["num_beams"] = getattr(args, "num_beams", 1)
    common = (args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, model.stop_ids)
    return sampling(model.config, *common, others)


def new_tokens(ids: Sequence[int], model: Pretrained, args: argparse.Namespace) -> Iterator[int]:
    """The continuation of `ids` under the sampling arguments, as it is made; that of a search when it is found."""
    call = generation_settings(model, args)
    if call.num_beams == 1:
        return continued(ids, model.weights, model.config, call, args.reference)
    output = generate_batch(Prompts([ids]), model.weights, model.config, call, reference=args.reference)
    found = output.sequences[0, len(ids) :].tolist()
    end = next((n for n, token in enumerate(found) if token in model.stop_ids), len(found))
    return iter(found[: end + 1])


def stream_text(tokens: Iterator[int], model: Pretrained, show: bool) -> tuple[list[int], str]:
    """Collect tokens and their text, printing it as it comes if `show`."""
    stream, ids, texts = TextStream(model.tokenizer), [], []
    for token in tokens:
        ids.append(token)
        if token not in model.stop_ids:
            texts.append(stream.push(token))
            if show:
                print(texts[-1], end="", flush=True)
    texts.append(stream.finish())
    if show:
        print(texts[-1], flush=True)
    return ids, "".join(texts)


def stream_ids(tokens: Iterator[int], show: bool) -> list[int]:
    """Collect tokens of a model that has no tokenizer, printing their ids as they come if `show`."""
    ids = []
    for token in tokens:
        ids.append(token)
        if show:
            print(f",{token}", end="", flush=True)
    if show:
        print(flush=True)
    return ids


def run_generate(args: argparse.Namespace) -> int:
    """``refgemma generate``: ids, where there is no tokenizer and the prompt is ids."""
    model = load(args.model, args.dtype, args.revision, args.download)
    ids = prompt_ids(args, model)
    tokens = new_tokens(ids, model, args)
    text: str | None = None
    began = time.perf_counter()
    if model.has_tokenizer:
        if not args.json:
            print(model.tokenizer.decode(ids, skip_special_tokens=True), end="", flush=True)
        made, text = stream_text(tokens, model, show=not args.json)
    else:
        if not args.json:
            print(",".join(str(token) for token in ids), end="", flush=True)
        made = stream_ids(tokens, show=not args.json)
    if args.json:
        as_json({
            "prompt_ids": ids,
            "ids": made,
            "text": text,
            "stopped": "stop_id" if made[-1] in model.stop_ids else "max_new_tokens",
            "tokens_per_second": round(len(made) / (time.perf_counter() - began), 1),
        })  # fmt: skip
    return OK


def read_line() -> str:
    """What the person says next, asked for at a terminal; empty at the end of input, or if there is none."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        print("you> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def run_chat(args: argparse.Namespace) -> int:
    """``refgemma chat``: one JSON object a turn with ``--json``."""
    model = load(args.model, args.dtype, args.revision, args.download)
    generation_settings(model, args)  # wrong settings are refused before anybody says anything
    messages: list[dict[str, str]] = []
    while True:
        line = read_line()
        if not line:
            return OK
        messages.append({"role": "user", "content": line})
        # Sanitized: whoever types "<end_of_turn>" means these letters, and does not end the turn.
        ids = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
        made, text = stream_text(new_tokens(ids, model, args), model, show=not args.json)
        messages.append({"role": "assistant", "content": text})
        if args.json:
            print(json.dumps({"turn": len(messages) // 2, "ids": made, "text": text}, ensure_ascii=False), flush=True)


def case_row(result: CaseResult) -> str:
    """One line of the table that ``refgemma verify`` prints."""
    verdict = "conforms"
    if first := result.first_divergence:
        how_far = first.note or f"{first.distance:.3g} x its bound"
        verdict = f"DIFFERS first at {first.tensor} ({first.how}: {how_far})"
    return f"{result.case:32s} {result.tensors:7d}  {result.worst.distance:11.3f}  {verdict}"


def comparison_json(c: Comparison) -> dict[str, Any]:
    """One tensor of ``refgemma verify --json``; JSON has no infinity, so an infinite distance is written "inf"."""
    distance = c.distance if np.isfinite(c.distance) else "inf"
    return {"tensor": c.tensor, "how": c.how, "in_units_of_bound": distance, "note": c.note}


def case_json(result: CaseResult) -> dict[str, Any]:
    """One case of ``refgemma verify --json``."""
    first = result.first_divergence
    alone = [c for c in result.comparisons if c.how == "operation"]
    return {
        "case": result.case,
        "verdict": "conforms" if result.conforms else "differs",
        "tensors": result.tensors,
        "operation_elements": sum(c.elements for c in alone),
        "bit_identical": sum(c.identical for c in alone),
        "worst": comparison_json(result.worst),
        "first_divergence": first and comparison_json(first),
    }


def run_verify(args: argparse.Namespace) -> int:
    """``refgemma verify``."""
    if args.full and args.cases:
        raise InputError("give either cases or --full, and only one of them")
    if args.model and args.cases:
        raise InputError("--model is a checkpoint, compared with its own recording; the cases have models of their own")
    checkpoint = open_checkpoint(find_model(args.model)) if args.model else None
    if checkpoint is not None and not args.full:
        names = [recording_of(checkpoint)]
    else:
        names = [args.full] if args.full else asked(args.cases)
    if args.list:
        as_json(names) if args.json else print("\n".join(names))
        return OK
    if not args.json:
        print(f"{'case':32s} {'tensors':>7s}  {'worst/bound':>11s}  verdict")
    results = []
    for name in progress(names):
        results.append(verified(name, args.dtype, checkpoint, args.reference))
        if not args.json:
            print(case_row(results[-1]), flush=True)
    differing = [r.case for r in results if not r.conforms]
    tensors = sum(r.tensors for r in results)
    if args.json:
        as_json({
            "verdict": "differs" if differing else "conforms",
            "tensors": tensors,
            "recorded_with": {key: results[0].about[key] for key in ("torch", "transformers", "attn_implementation")},
            "cases": [case_json(r) for r in results],
        })  # fmt: skip
    else:
        about = results[0].about
        against = f"recorded with torch {about['torch']}, transformers {about['transformers']} (eager)"
        print(f"{len(results)} cases, {tensors} tensors, {len(differing)} differ; {against}")
    return DIFFERS if differing else OK


def asked(cases: list[str]) -> list[str]:
    """The cases that were named, after a look whether they exist; or all, and two layers of each full size."""
    if not cases:
        return [*case_names(), *two_layer_names()]
    case_names([name for name in cases if not is_full_size(name)])
    return cases


def verified(name: str, dtype: str, checkpoint: Checkpoint | None, reference: bool) -> CaseResult:
    """One case; one at full size with a bar of its own, since it takes longer than all others.

    Two layers, which ``verify`` compares by itself, are always compared tensor by tensor.
    """
    from tqdm import tqdm

    if not is_full_size(name):
        return verify(name)
    comparisons = []
    every = reference or name.endswith(TWO_LAYERS) or dtype != "float32"
    total = len(steps_of(load_full(name)[0]["names"], every))
    with tqdm(total=total, desc=name, unit="tensor", disable=None, delay=2, leave=False) as bar:
        for step in verify_full(name, dtype, checkpoint, every):
            bar.update() if isinstance(step, str) else comparisons.append(step)
    return full_result(name, dtype, comparisons)


def progress(names: list[str]) -> Iterator[str]:
    """`names` one by one, with a bar on stderr if that is a terminal and stdout is not."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty() or sys.stdout.isatty()
    yield from tqdm(names, unit="case", disable=quiet, file=sys.stderr)


def run_trace(args: argparse.Namespace) -> int:
    """``refgemma trace``."""
    from tqdm import tqdm

    target_file(args.output)  # before a minute's work, not after it
    model = load(args.model, args.dtype, args.revision, args.download)
    ids = prompt_ids(args, model)
    metadata = {
        "format": "refgemma-trace/1",
        "config": json.dumps(model.config.to_dict()),
        "dtype": args.dtype,
        "refgemma": refgemma.__version__,
    }
    row = np.array([ids])
    run = chain([("input_ids", row)], run_in_order(row, model.weights, model.config))
    bar = tqdm(run, unit="tensor", disable=None, delay=2, leave=False)
    shapes = save_trace(iter(bar), args.output, metadata)
    if args.json:
        as_json({"file": args.output, "ids": ids, "tensors": {name: list(shape) for name, shape in shapes.items()}})
    else:
        size = os.path.getsize(args.output)
        print(
            f"{args.output}: {len(shapes)} tensors of {len(ids)} tokens, {size / 1e6:.1f} MB, computed in {args.dtype}"
        )
    return OK


def run_explore(args: argparse.Namespace) -> int:
    """``refgemma explore``."""
    from refgemma.explorer import explored, page

    target_file(args.output)  # before the work, not after it
    model = load(args.model, args.dtype, args.revision, args.download)
    ids = prompt_ids(args, model)
    content = page(explored(ids, model, args.model, args.dtype)).encode()
    replace_file(args.output, content)
    if args.json:
        as_json({"file": args.output, "bytes": len(content), "ids": ids})
    else:
        print(f"{args.output}: {len(ids)} tokens, {len(content) / 1e6:.1f} MB; open it in a browser")
    return OK


def text_of(args: argparse.Namespace) -> str:
    """The text of ``FILE`` or ``--published``."""
    if (args.file is None) == (args.published is None):
        raise InputError("give either a FILE or --published, and only one of them")
    if args.published:
        return published_text(args.published)
    try:
        return Path(args.file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{args.file}: is no text in UTF-8 (byte {error.start})") from None


def run_perplexity(args: argparse.Namespace) -> int:
    """``refgemma perplexity``."""
    text = text_of(args)
    model = load(args.model, args.dtype, args.revision, args.download)
    ids = model.tokenizer.encode(text)
    max_length = args.max_length or min(4096, model.config.max_position_embeddings)
    layers = fast.reference_outputs if args.reference else fast.outputs
    strided = strided_perplexity(ids, model.weights, model.config, max_length, min(args.stride, max_length), layers)
    bits = gemma_cpp_bits_per_byte(ids, len(text.encode()), model.weights, model.config, layers)
    figures = published_figures(text)
    if args.json:
        as_json({
            "tokens": len(ids),
            "bytes": len(text.encode()),
            "transformers": {**asdict(strided), "max_length": max_length, "stride": min(args.stride, max_length)},
            "gemma_cpp_bits_per_byte": bits,
            "published_gemma_cpp_bits_per_byte": figures,
        })  # fmt: skip
        return OK
    print(f"{len(ids)} tokens, {len(text.encode())} bytes, computed in {args.dtype}")
    print(
        f"transformers: perplexity {strided.perplexity:.4f} ({strided.nats_per_token:.4f} nats a token, windows: "
        f"{strided.windows} of {max_length} every {min(args.stride, max_length)})"
    )
    print(f"gemma.cpp:    {bits:.4f} bits a byte, <bos> counted as log2 of the vocabulary")
    for model_name, figure in figures.items():
        print(f"              {figure:.2f} published for gemma-2-{model_name}, within 0.02")
    if not figures:
        print(f"              no figures are published of this text; there are of --published {', '.join(PUBLISHED)}")
    return OK


def run_info(args: argparse.Namespace) -> int:
    """``refgemma info``."""
    checkpoint = open_checkpoint(find_model(args.model, args.revision, args.download))
    config = checkpoint.config.to_dict()
    table = [
        (name, tuple(shape), str(checkpoint.tensors[name].dtype))
        for name, shape in tensor_shapes(checkpoint.config).items()
    ]
    if args.json:
        as_json({
            "folder": str(checkpoint.folder),
            "config": config,
            "parameters": checkpoint.parameters,
            "bytes": checkpoint.nbytes,
            "tensors": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in table],
        })  # fmt: skip
        return OK
    print(f"{checkpoint.folder}\n{checkpoint.parameters:,} parameters, {checkpoint.nbytes:,} bytes\n")
    for key, value in config.items():
        print(f"{key:26s} {value}")
    print()
    for name, shape, dtype in table:
        print(f"{name:56s} {shape!s:18s} {dtype}")
    return OK


def run_convert(args: argparse.Namespace) -> int:
    """``refgemma convert``."""
    transposed = None if args.gating_einsum is None else args.gating_einsum == "transposed"
    done = convert(
        args.source, args.output, args.kind, args.to, args.config, args.dtype, args.max_shard_size, args.vocab_rows,
        transposed,
    )  # fmt: skip
    source, dtypes = done.source, sorted({output.dtype for output in done.outputs})
    if args.json:
        as_json({
            "source": str(source.path),
            "from": source.kind,
            "target": str(done.target),
            "to": done.kind,
            "tensors": len(done.outputs),
            "bytes": done.nbytes,
            "dtypes": dtypes,
            "dropped_rows": source.padding,
            "dropped_rows_not_zero": source.nonzero,
            "verified": True,
        })  # fmt: skip
        return OK
    if source.padding:
        print(f"left out {source.padding} rows of the embedding, beyond the vocabulary; {source.nonzero} were not zero")
    print(
        f"{done.target}: {len(done.outputs)} tensors, {done.nbytes:,} bytes in {', '.join(dtypes)}, "
        f"from {source.kind} to {done.kind}, read again and found the same"
    )
    return OK


def run_synth(args: argparse.Namespace) -> int:
    """``refgemma synth``."""
    config = Gemma2Config.preset(args.size)
    parameters = write_synthetic(config, args.output, args.max_shard_size)
    if args.json:
        as_json({"folder": args.output, "parameters": parameters, "dtype": "bfloat16", "weights": "synthetic"})
    else:
        print(
            f"{args.output}: {parameters:,} synthetic weights in bfloat16, of the size {args.size}; nobody trained them"
        )
    return OK


# --- main -------------------------------------------------------------------------------------------------------------


@contextmanager
def short_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, and the same one only once."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            print(f"refgemma: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parser().parse_args(argv)
    run = {
        "generate": run_generate,
        "chat": run_chat,
        "verify": run_verify,
        "trace": run_trace,
        "explore": run_explore,
        "info": run_info,
        "convert": run_convert,
        "synth": run_synth,
        "perplexity": run_perplexity,
        **oracle.RUN,
    }[args.command]
    try:
        with short_warnings():
            return run(args)
    except BrokenPipeError:  # whoever read our output has seen enough; Python must not find out again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    except MemoryError:
        print(f"refgemma {args.command}: not enough memory: the prompt is too long for this machine", file=sys.stderr)
        return MISUSE
    except MISTAKES as error:
        print(f"refgemma {args.command}: {one_line(error)}", file=sys.stderr)
        return MISUSE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def one_line(error: Exception) -> str:
    """An error's message without line breaks; an OSError's with its file."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
