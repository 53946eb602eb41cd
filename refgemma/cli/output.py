"""Exit codes, JSON and the tokens of a prompt, which all commands share. Checked through the command line."""

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
from refgemma.modeling.pretrained import Pretrained
from refgemma.trace.names import target_file

DTYPES = ("float32", "float64", "bfloat16", "float16")
OK, DIFFERS, MISUSE, FAULT, INTERRUPTED, CUT_OFF = 0, 1, 2, 70, 130, 141
MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".gguf")

# What a text of a model may not do to a terminal; lines, tabs and characters of any script are text.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def complain(line: str = "") -> None:
    """Print a line on stderr, if anybody can read it there; a full disk behind it changes no exit code."""
    with suppress(OSError):
        say(line, error=True)


def say(*lines: str, error: bool = False) -> None:
    """Print lines at once, with escapes for the characters that a terminal would obey, an end of line among them.

    Everything that the commands print goes through here, `show_text` or `as_json`: names come from strangers' files.
    """
    for line in lines or ("",):
        print(escape(line), file=sys.stderr if error else sys.stdout, flush=True)


def show_text(text: str, end: str = "") -> None:
    """Print what a model or a user wrote, at once: to a terminal without control characters, to a file as it is."""
    shown = CONTROLS.sub(lambda found: escape(found[0]), text) if sys.stdout.isatty() else text
    print(shown, end=end, flush=True)


def as_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON object."""
    print(write_json(value, indent), flush=True)


def check_outputs(outputs: Mapping[str, str], inputs: Iterable[str | Path | None]) -> None:
    """Refuse, before any work, outputs that cannot be written, that are one file, or that are a file which is read.

    Parameters
    ----------
    outputs : mapping
        Flag -> the path given with it.
    inputs : iterable
        Files and folders that the command reads; of a folder, files that may belong to a model are meant.
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
            raise UsageError(f"{flag} {path}: is an input of this command, and is not replaced; give another file")
        if target in written:
            raise UsageError(f"{written[target]} and {flag} are both {path}; give each a file of its own")
        written[target] = flag


def prompt_ids(args: argparse.Namespace, model: Pretrained) -> list[int]:
    """The token ids of ``PROMPT`` or ``--ids``."""
    if (args.prompt is None) == (args.ids is None):
        raise UsageError("give either a PROMPT or --ids, and only one of them")
    if args.ids is not None:
        parts = [part.strip() for part in args.ids.split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
            raise UsageError(f"--ids {args.ids!r}: whole numbers with commas between them are needed")
        return [int(part) for part in parts]
    if not args.prompt:
        raise UsageError("the prompt is empty")
    return model.tokenizer.encode(args.prompt)
