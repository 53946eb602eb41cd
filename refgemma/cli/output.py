"""Exit codes, printing and the tokens of a prompt, shared by all commands. Checked through the command line."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from refgemma.errors import UsageError
from refgemma.files import escape, write_json
from refgemma.inputs import check_token_ids
from refgemma.modeling.pretrained import Pretrained
from refgemma.trace.names import target_file

DTYPES = ("float32", "float64", "bfloat16", "float16")
OK, DIFFERS, MISUSE, FAULT, INTERRUPTED, CUT_OFF = 0, 1, 2, 70, 130, 141
MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".gguf")

# Control characters that a model's text must not send to a terminal; line ends and tabs are allowed.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def complain(line: str = "") -> None:
    """Print a line on stderr; ignore a failure to print, so that a full disk does not change the exit code."""
    with suppress(OSError):
        say(line, error=True)


def say(*lines: str, error: bool = False) -> None:
    """Print lines immediately; escape control characters, including line ends inside a line.

    All output of the commands goes through this function, `show_text` or `as_json`, because names come from untrusted
    files.
    """
    for line in lines or ("",):
        print(escape(line), file=sys.stderr if error else sys.stdout, flush=True)


def show_text(text: str, end: str = "") -> None:
    """Print text of a model or user immediately; escape control characters if the output is a terminal."""
    shown = CONTROLS.sub(lambda found: escape(found[0]), text) if sys.stdout.isatty() else text
    print(shown, end=end, flush=True)


def as_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON object."""
    print(write_json(value, indent), flush=True)


def check_outputs(outputs: Mapping[str, str], inputs: Iterable[str | Path | None]) -> None:
    """Raise an error if an output cannot be written, is also an input, or is given twice; call it before any work.

    Parameters
    ----------
    outputs : mapping
        The path that the user gave with each flag.
    inputs : iterable
        Files and folders that the command reads. In a folder, only files that may belong to a model are protected.
    """
    read = {}
    for path in inputs:
        for file in (path, *(Path(path).iterdir() if Path(path).is_dir() else ())) if path is not None else ():
            if Path(file).suffix in MODEL_FILES or file is path:
                read[os.path.realpath(file)] = str(file)
    written: dict[str, str] = {}
    for flag, path in outputs.items():
        target = str(target_file(path))
        if target in read:
            raise UsageError(f"{flag} {path}: is an input of this command; give another file")
        if target in written:
            raise UsageError(f"{written[target]} and {flag} are both {path}; give two different files")
        written[target] = flag


def prompt_ids(args: argparse.Namespace, model: Pretrained) -> list[int]:
    """Return the token ids of ``PROMPT`` or ``--ids``."""
    if (args.prompt is None) == (args.ids is None):
        raise UsageError("give either a PROMPT or --ids, and only one of them")
    if args.ids is not None:
        parts = [part.strip() for part in args.ids.split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
            raise UsageError(f"--ids is {args.ids!r}; it must be whole numbers separated by commas")
        ids = [int(part) for part in parts]
        check_token_ids([ids], model.config.vocab_size)  # an error now saves reading the weights
        return ids
    if not args.prompt:
        raise UsageError("the prompt is empty; give a text")
    return model.tokenizer.encode(args.prompt)
