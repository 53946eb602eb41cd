"""The commands of the oracle: `check` and `variants`. They handle arguments and print; checked through the command
line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.files import replace_file
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.oracle import report as reports
from refgemma.oracle.candidate import Candidate, load_candidate
from refgemma.oracle.diagnose import Check, Report, check
from refgemma.oracle.trace import save_trace, target_file
from refgemma.oracle.variants import VARIANTS
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights

DTYPES = ("float32", "float64", "bfloat16", "float16")
CODES = "Exit codes: 0 conforms, 1 differs, 2 misuse or bad file, 3 noisy only, 4 inconclusive, 5 the backend failed."
BUNDLE_LIMIT = 1_000_000


def add_commands(add: Callable[[str, str], Any]) -> None:
    """Register the oracle's commands; `add` makes one of a name and a sentence."""
    command = add("check", "say which tensor of another implementation is wrong first, and which known mistake it is")
    command.epilog = CODES
    command.add_argument("candidate", metavar="CANDIDATE", help="the safetensors file that it wrote")
    command.add_argument(
        "--model", default="tiny", metavar="MODEL", help="tiny, conformance or a folder (default: tiny)"
    )
    command.add_argument("--dtype", choices=DTYPES, help="what it stores tensors in, if its file does not say so")
    command.add_argument("--allow", type=float, default=1.0, metavar="X",
                         help="multiply what rounding may do by X; every report says so")  # fmt: skip
    for kind in ("html", "markdown", "junit"):
        command.add_argument(f"--{kind}", metavar="FILE", help=f"write the report as {kind} too")
    command.add_argument("--bundle", metavar="FILE", help="keep the first finding's inputs and result, below 1 MB")

    command = add("variants", "list the known mistakes of Gemma 2 ports, or describe one")
    command.add_argument("name", nargs="?", metavar="NAME")


def read_weights(folder: Path, dtype: str) -> Weights:
    """A model's weights in the candidate's precision."""
    return open_checkpoint(folder).weights(dtype)


def run_check(args: argparse.Namespace) -> int:
    """``refgemma check``."""
    outputs = {kind: path for kind in ("html", "markdown", "junit", "bundle") if (path := getattr(args, kind))}
    for path in outputs.values():
        target_file(path)  # before the work, not after it
    if not args.allow > 0 or not np.isfinite(args.allow):
        raise InputError(f"--allow {args.allow}: a factor above 0 is needed")
    folder = find_model(args.model)
    config = open_checkpoint(folder).config
    candidate = load_candidate(args.candidate, config, args.dtype)
    if not candidate.tensors and not candidate.refused:
        raise InputError(f"{args.candidate}: holds no tensor of this model; logits at the least are needed")
    weights = read_weights(folder, candidate.dtype)
    found = check(candidate, weights, config, args.allow)
    made = {"html": reports.page, "markdown": reports.markdown, "junit": reports.junit}
    for kind, path in outputs.items():
        if kind == "bundle":
            write_bundle(candidate, weights, found, path)
        else:
            replace_file(path, made[kind](found, args.model).encode())
    print(reports.dumps(reports.as_json(found, args.model)) if args.json else reports.text(found, args.model))
    return reports.EXIT[found.verdict]


def write_bundle(candidate: Candidate, weights: Weights, found: Report, path: str) -> None:
    """The inputs and the result of the first finding's operation: what somebody else needs to look at it."""
    if not found.findings:
        raise InputError("--bundle: nothing differs, so there is nothing to keep")
    first = found.findings[0].instances[0]
    work = Check(candidate, weights, found.config)
    if first.tensor not in candidate.tensors:
        raise InputError(f"--bundle: {first.tensor} {first.judged.note}: there is nothing to keep")
    tensors = {name: candidate.tensors[name].numbers for name in (*first.sources, first.tensor)}
    tensors["expected"] = work.usual.result(first.tensor)
    rows = max(x.shape[-2] for x in tensors.values())
    while sum(x.nbytes for x in tensors.values()) > BUNDLE_LIMIT - 10_000 and rows > 1:
        rows //= 2
        tensors = {name: x[:1, ..., :rows, :] for name, x in tensors.items()}
    about = {"format": "refgemma-bundle/1", "tensor": first.tensor, "inputs": ",".join(first.sources),
             "named": found.findings[0].named, "dtype": candidate.dtype}  # fmt: skip
    save_trace(tensors.items(), path, about)


def run_variants(args: argparse.Namespace) -> int:
    """``refgemma variants``."""
    chosen = [v for v in VARIANTS if args.name in (None, v.name)]
    if not chosen:
        near = [v.name for v in VARIANTS if args.name in v.name or args.name in v.fields[0]]
        hint = f"there are {', '.join(near[:6])}" if near else "refgemma variants lists them"
        raise InputError(f"unknown variant {args.name!r}; {hint}")
    if args.json:
        print(reports.dumps([reports.variant_json(v) for v in chosen]))
    elif args.name:
        v = chosen[0]
        print(f"{v.name} ({v.kind})\n  {v.says}\n  first tensor: {v.fields[0]}; all: {', '.join(v.fields)}")
        print(f"  look at: {v.knob}\n  shown by: {v.shows}\n  seen in: {v.seen}")
    else:
        for v in chosen:
            print(f"{v.name:34s} {v.fields[0]:28s} {v.says}")
    return 0


RUN = {"check": run_check, "variants": run_variants}
