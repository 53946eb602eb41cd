"""Exit codes, JSON and the tokens of a prompt, which all commands share. Checked through the command line."""

import argparse
from typing import Any

from refgemma.errors import UsageError
from refgemma.files import write_json
from refgemma.modeling.pretrained import Pretrained

DTYPES = ("float32", "float64", "bfloat16", "float16")
OK, DIFFERS, MISUSE, FAULT, INTERRUPTED, CUT_OFF = 0, 1, 2, 70, 130, 141


def as_json(value: Any) -> None:
    """Print one JSON object."""
    print(write_json(value))


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
