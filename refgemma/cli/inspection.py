"""Run the commands that show a run or a folder: `trace`, `explore` and `info`. Checked through the command line."""

import argparse
import json
import os
import re
from collections import Counter
from dataclasses import asdict
from itertools import chain

import numpy as np

import refgemma
from refgemma.cli.output import OK, as_json, check_outputs, prompt_ids, say
from refgemma.errors import UsageError
from refgemma.files import pluralise, replace_file
from refgemma.goldens.released import Identified, identify_release
from refgemma.hub import find_model
from refgemma.modeling.pretrained import load
from refgemma.trace.names import run_in_order, save_trace
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import tensor_shapes


def run_trace(args: argparse.Namespace) -> int:
    """Run ``refgemma trace``."""
    from tqdm import tqdm

    check_outputs({"-o": args.output}, [find_model(args.model, args.revision, args.download)])
    model = load(args.model, args.dtype, args.revision, args.download, read=False)
    ids = prompt_ids(args, model)
    metadata = {
        "format": "refgemma-trace/1",
        "config": json.dumps(model.config.to_dict()),
        "dtype": args.dtype,
        "refgemma": refgemma.__version__,
    }
    row = np.array([ids])
    run = chain([("input_ids", row)], run_in_order(row, model.read().weights, model.config))
    bar = tqdm(run, unit="tensor", disable=None, delay=2, leave=False)
    shapes = save_trace(iter(bar), args.output, metadata)
    if args.json:
        as_json({"file": args.output, "ids": ids, "tensors": {name: list(shape) for name, shape in shapes.items()}})
    else:
        size = os.path.getsize(args.output)
        say(
            f"{args.output}: {pluralise(len(shapes), 'tensor')} of {pluralise(len(ids), 'token')}, "
            f"{size / 1e6:.1f} MB, computed in {args.dtype}"
        )
    return OK


def run_explore(args: argparse.Namespace) -> int:
    """Run ``refgemma explore``."""
    from refgemma.teach.explorer import check_length, explore_run, render_page

    check_outputs({"-o": args.output}, [find_model(args.model, args.revision, args.download)])
    if args.live:
        return run_live(args)
    model = load(args.model, args.dtype, args.revision, args.download, read=False)
    ids = prompt_ids(args, model)
    check_length(len(ids), model.config)
    content = render_page(explore_run(ids, model.read(), args.model, args.dtype)).encode()
    replace_file(args.output, content)
    if args.json:
        as_json({"file": args.output, "bytes": len(content), "ids": ids})
    else:
        say(f"{args.output}: {pluralise(len(ids), 'token')}, {len(content) / 1e6:.1f} MB; open it in a browser")
    return OK


def run_live(args: argparse.Namespace) -> int:
    """Run ``refgemma explore --live``."""
    from refgemma.teach.live import FIRST_TEXT, render_live

    if args.model != "tiny" or args.dtype != "float32" or args.ids:
        raise UsageError("--live runs the tiny model in float32 on a text; omit --model, --dtype and --ids")
    content = render_live(FIRST_TEXT if args.prompt is None else args.prompt).encode()
    replace_file(args.output, content)
    if args.json:
        as_json({"file": args.output, "bytes": len(content)})
    else:
        say(f"{args.output}: a live page, {len(content) / 1e6:.1f} MB; open it in a browser")
    return OK


def _print_release(found: Identified) -> None:
    if found.release is None:
        say("release: unknown; no release has these sizes and files", "")
        return
    name = f"{found.release} (revision {(found.revision or 'unknown')[:8]})"
    unread = any(file.verdict == "same length" for file in found.files)
    numbers = "; files of the same length were not compared by content" if unread else ""
    if found.complete:
        say(f"release: {name}, all {found.as_released} known files{numbers}")
    else:
        say(f"release: nearest is {name}, with {found.as_released} of its files{numbers}")
    for file in found.files:
        say(f"  {file.name:34s} {file.verdict:12s} {file.detail}")
    say()


def run_info(args: argparse.Namespace) -> int:
    """Run ``refgemma info``."""
    checkpoint = open_checkpoint(find_model(args.model, args.revision, args.download))
    config = checkpoint.config.to_dict()
    release = identify_release(checkpoint.folder, checkpoint.config, args.hash)
    table = [
        (name, tuple(shape), checkpoint.tensors[name].format)
        for name, shape in tensor_shapes(checkpoint.config).items()
    ]
    if args.json:
        as_json({
            "folder": str(checkpoint.folder),
            "config": config,
            "parameters": checkpoint.parameters,
            "bytes": checkpoint.nbytes,
            "released": asdict(release) | {"complete": release.complete},
            "tensors": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in table],
        })  # fmt: skip
        return OK
    say(str(checkpoint.folder), f"{checkpoint.parameters:,} parameters, {checkpoint.nbytes:,} bytes")
    _print_release(release)
    for key, value in config.items():
        say(f"{key:26s} {value}")
    say()
    for name, shape, dtype, count in _fold_layers(table):
        say(f"{name:56s} {shape!s:18s} {dtype}" + (f", in {count} layers" if count > 1 else ""))
    return OK


def _fold_layers(table: list[tuple[str, tuple[int, ...], str]]) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Merge the lines of tensors that differ only in the layer's number, written as N; add how many layers have it."""
    lines = [(re.sub(r"\blayers\.\d+\.", "layers.N.", name), shape, dtype) for name, shape, dtype in table]
    return [(*line, count) for line, count in Counter(lines).items()]
