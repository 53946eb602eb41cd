"""Run the command line: handle arguments and print results; other modules do the work.

Exit codes: 0 success (verify: conforms), 1 verify found a difference, 2 misuse or bad input, 70 an internal error of
refgemma, 130 interrupted, 143 terminated, 141 the output was closed early, as by ``head``.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import refgemma
from refgemma.cli import candidates as oracle
from refgemma.cli.folders import run_convert, run_synth
from refgemma.cli.inspection import run_explore, run_info, run_trace
from refgemma.cli.output import CUT_OFF, DTYPES, FAULT, MISUSE, complain
from refgemma.cli.signals import raise_on_signals
from refgemma.cli.text import run_chat, run_generate, run_perplexity
from refgemma.cli.training import add_train, run_train
from refgemma.cli.verification import run_verify
from refgemma.convert.convert import FORMATS
from refgemma.errors import RefgemmaError
from refgemma.files import escape
from refgemma.goldens.released import PUBLISHED

EXIT_CODES = (
    "Exit codes: 0 success, 1 verify or check found a difference, 2 misuse or bad input (one line on stderr says why), "
    "3 and 4: see refgemma check --help, 70 an internal error of refgemma."
)
MODEL_HELP = "tiny, conformance, a Hugging Face folder, a .gguf file, or a hub id like google/gemma-2-9b"
LINE = 1500  # maximum characters of an error message


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(MISUSE, escape(f"{self.prog}: {shorten(message)} (see {self.prog} --help)") + "\n")


def parser() -> Parser:
    """Return the parser of all commands and their arguments."""
    top = Parser(
        prog="refgemma",
        description="Gemma 2 in NumPy: run it, look inside, compare it with PyTorch.",
        epilog=EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"refgemma {refgemma.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, hidden: bool = False) -> Parser:
        shown: dict[str, Any] = {} if hidden else {"help": help}
        command: Parser = commands.add_parser(name, description=help, **shown)
        command.add_argument(
            "--json", action="store_true", help="print JSON instead of text (chat: one object per turn)"
        )
        return command

    def add_hub(command: Parser) -> None:
        command.add_argument("--revision", default="main", metavar="REV", help="branch, tag or commit of a hub id")
        command.add_argument("--download", action="store_true", help="download a hub id that is not in the cache")

    def add_model(command: Parser) -> None:
        command.add_argument("--model", default="tiny", metavar="MODEL", help=f"{MODEL_HELP} (default: tiny)")
        add_hub(command)
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the computation")

    def add_reference(command: Parser) -> None:
        command.add_argument(
            "--reference", action="store_true", help="compute with the slower definition instead of the fast code"
        )

    def add_sampling(command: Parser) -> None:
        command.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
        command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
        command.add_argument("--top-k", type=int, metavar="K", help="draw only from the K most likely tokens")
        command.add_argument(
            "--top-p", type=float, metavar="P", help="draw only from the most likely tokens that reach probability P"
        )
        command.add_argument(
            "--min-p",
            type=float,
            metavar="P",
            help="draw only from tokens at least P times as likely as the most likely token",
        )
        command.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: fewer repetitions")
        command.add_argument("--min-new-tokens", type=int, metavar="N", help="generate at least N tokens")
        command.add_argument("--seed", type=int, default=0)
        add_reference(command)

    def add_prompt(command: Parser) -> None:
        command.add_argument("prompt", nargs="?", metavar="PROMPT")
        command.add_argument("--ids", metavar="ID,ID,...", help="token ids instead of a prompt, used unchanged")

    command = add("generate", "continue a text")
    add_prompt(command)
    add_model(command)
    add_sampling(command)
    command.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="run a beam search with N beams, and print the best text"
    )

    command = add("chat", "chat with a model; an empty line or the end of input ends the chat")
    add_model(command)
    add_sampling(command)

    command = add("verify", "compare with PyTorch's recordings, tensor by tensor")
    command.epilog = "Exit codes: 0 conforms, 1 differs, 2 misuse or bad file."
    command.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    command.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    command.add_argument(
        "--full",
        metavar="NAME",
        help="compare a full-size model with synthetic weights instead, for example 9b-synthetic",
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of --full and --model"
    )
    command.add_argument(
        "--model",
        metavar="DIR",
        help="compare this checkpoint instead; it needs a recording from golden/record.py --checkpoint; with --full, "
        "give a folder from refgemma synth",
    )
    command.add_argument(
        "--reference",
        action="store_true",
        help="for --full and --model in float32: compare every tensor of the definition, not only outputs of layers",
    )

    command = add("trace", "write every named tensor of a run to a safetensors file")
    add_prompt(command)
    command.add_argument("-o", "--output", required=True, metavar="FILE")
    add_model(command)

    command = add(
        "explore",
        "write an HTML page that shows a run: attention, norms and predictions for each token, layer and head",
    )
    add_prompt(command)
    command.add_argument("-o", "--output", default="explorer.html", metavar="FILE", help="default: explorer.html")
    command.add_argument(
        "--live", action="store_true", help="write a page that runs the tiny model in the browser, on any text"
    )
    add_model(command)

    command = add("perplexity", "measure how well a model predicts a text, as transformers and gemma.cpp define it")
    command.add_argument("file", nargs="?", metavar="FILE", help="a text in UTF-8")
    command.add_argument(
        "--published", choices=list(PUBLISHED), help="use a text for which gemma.cpp published figures instead"
    )
    add_model(command)
    command.add_argument(
        "--max-length", type=int, metavar="N", help="tokens per window (default: 4096, or the model's maximum)"
    )
    command.add_argument(
        "--stride", type=int, metavar="N",
        help="tokens from one window's start to the next (default: --max-length; a smaller value takes longer)",
    )  # fmt: skip
    add_reference(command)

    add_train(add("train", "train a model on a text, and write it as a Hugging Face folder"), add_hub, MODEL_HELP)

    command = add("convert", "convert an original checkpoint or a GGUF file to a Hugging Face folder, or back")
    command.add_argument("source", metavar="SOURCE", help="a folder or file: .ckpt, .npz, .gguf, .safetensors, shards")
    command.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="an empty folder, or none yet; a file for gguf"
    )
    command.add_argument("--from", dest="kind", choices=("auto", "hf", "pytorch", "flax", "gguf"), default="auto")
    command.add_argument("--to", choices=FORMATS, default="hf", help="default: hf")
    command.add_argument(
        "--config", metavar="FILE", help="config.json of an original checkpoint whose size was not released"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help="precision of the weights (default: that of the source, bit for bit)"
    )
    command.add_argument(
        "--max-shard-size", metavar="SIZE", help="maximum size of a file (default: 5GB; pytorch: one file)"
    )
    command.add_argument(
        "--vocab-rows",
        type=int,
        metavar="N",
        help="pad the embedding of an original checkpoint to N rows: 256128 in Flax",
    )
    command.add_argument(
        "--gating-einsum",
        choices=("transposed", "plain"),
        help="layout of gating_einsum in a Flax tree, if the sizes leave it open",
    )

    command = add("synth", "write a checkpoint of a released size with synthetic (untrained) weights")
    command.add_argument("size", choices=("2b", "9b", "27b"), metavar="SIZE", help="2b, 9b or 27b")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="an empty folder, or none yet")
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a file (default: 5GB)"
    )

    command = add("info", "print a model's configuration, size and tensors, and the release of its files")
    command.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help=f"{MODEL_HELP} (default: tiny)")
    command.add_argument("--hash", action="store_true", help="compare the weights by hash, not only by length")
    add_hub(command)

    oracle.add_commands(add)
    return top


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print each warning once, in one line on stderr; reword NumPy's warnings about large numbers."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        said = str(message)
        if isinstance(message, RuntimeWarning) and " encountered in " in said:
            said = "numbers became too large for this precision; are the weights damaged? The result is not reliable"
        if said not in shown:
            shown.add(said)
            complain(f"refgemma: warning: {said}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed the stream; print would then write to the other one
            setattr(sys, name, open(os.devnull, "w"))  # until the process ends
    try:
        with raise_on_signals():
            return run_command(argv)
    except KeyboardInterrupt as interruption:
        complain()
        return 128 + getattr(interruption, "number", signal.SIGINT)


def run_command(argv: Sequence[str] | None) -> int:
    """Run one command and return its exit code, unless it is interrupted."""
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
        "train": run_train,
        "perplexity": run_perplexity,
        **oracle.RUN,
    }[args.command]
    try:
        with short_warnings():
            return run(args)
    except BrokenPipeError:  # the reader closed our output; Python must not fail on it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    except MemoryError as error:
        what = describe_error(error) or "the prompt is too long for this machine"
        complain(f"refgemma {args.command}: not enough memory: {what}")
        return MISUSE
    except (RefgemmaError, OSError, UnicodeError) as error:
        complain(f"refgemma {args.command}: {describe_error(error)}")
        return MISUSE
    except Exception as error:  # internal error; Python's own exit code 1 would mean that files differ
        if sys.flags.dev_mode:
            raise
        complain(
            f"refgemma {args.command}: internal error: {type(error).__name__}: {describe_error(error)}; "
            f"please report it with the output of: python -X dev -m refgemma {args.command} ..."
        )
        return FAULT


def describe_error(error: Exception) -> str:
    """Return an error's message in one line; add the file's name to an OSError."""
    return shorten(
        f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    )


def shorten(message: str) -> str:
    """Return a message in one line; cut a long one in the middle, because its ends name the place and the remedy."""
    said = " ".join(message.split())
    return said if len(said) <= LINE else f"{said[: LINE - 400]} ... {said[-400:]}"
