"""Run the command `verify`: compare refgemma with PyTorch's recordings, and print a table or JSON. Checked through the
command line."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from refgemma.cli.output import DIFFERS, OK, as_json, say
from refgemma.errors import UsageError
from refgemma.files import pluralise
from refgemma.goldens.full_size import (
    TWO_LAYERS,
    full_result,
    is_full_size,
    load_full,
    recording_of,
    steps_of,
    two_layer_names,
    verify_full,
)
from refgemma.goldens.load import case_names
from refgemma.goldens.verify import CaseResult, Comparison, verify
from refgemma.hub import find_model
from refgemma.weights.checkpoint import Checkpoint, open_checkpoint


def case_row(result: CaseResult) -> str:
    """Return one line of the table that ``refgemma verify`` prints."""
    verdict = "conforms"
    if first := result.first_divergence:
        how_far = first.note or f"{first.distance:.3g} x its bound"
        verdict = f"DIFFERS first at {first.tensor} ({first.how}: {how_far})"
    return f"{result.case:32s} {result.tensors:7d}  {result.worst.distance:11.3f}  {verdict}"


def comparison_json(c: Comparison) -> dict[str, Any]:
    """Return one tensor of ``refgemma verify --json``."""
    return {"tensor": c.tensor, "how": c.how, "in_units_of_bound": c.distance, "note": c.note}


def case_json(result: CaseResult) -> dict[str, Any]:
    """Return one case of ``refgemma verify --json``."""
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
    """Run ``refgemma verify``."""
    if args.full and args.cases:
        raise UsageError("give either cases or --full, and only one of them")
    if args.model and args.cases:
        raise UsageError("--model and cases are both given; give only one: the cases have their own models")
    checkpoint = open_checkpoint(find_model(args.model)) if args.model else None
    if checkpoint is not None and not args.full:
        names = [recording_of(checkpoint)]
    else:
        names = [args.full] if args.full else choose_cases(args.cases)
    if args.list:
        as_json(names) if args.json else say(*names)
        return OK
    if not args.json:
        say(f"{'case':32s} {'tensors':>7s}  {'worst/bound':>11s}  verdict")
    results = []
    for name in show_progress(names):
        results.append(verify_case(name, args.dtype, checkpoint, args.reference))
        if not args.json:
            say(case_row(results[-1]))
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
        say(f"{pluralise(len(results), 'case')}, {pluralise(tensors, 'tensor')}, {len(differing)} differ; {against}")
    return DIFFERS if differing else OK


def choose_cases(cases: list[str]) -> list[str]:
    """Return the named cases; without names, return all cases and two layers of each full size."""
    if not cases:
        return [*case_names(), *two_layer_names()]
    case_names([name for name in cases if not is_full_size(name)])
    return cases


def verify_case(name: str, dtype: str, checkpoint: Checkpoint | None, reference: bool) -> CaseResult:
    """Compare one case; show a progress bar for a full-size case, because it takes longest.

    The two layers that ``verify`` compares by default are always compared tensor by tensor.
    """
    if not is_full_size(name):
        return verify(name)
    comparisons = []
    every = reference or name.endswith(TWO_LAYERS) or dtype != "float32"
    total = len(steps_of(load_full(name)[0]["names"], every))
    with tqdm(total=total, desc=name, unit="tensor", disable=None, delay=2, leave=False) as bar:
        for step in verify_full(name, dtype, checkpoint, every):
            bar.update() if isinstance(step, str) else comparisons.append(step)
    return full_result(name, dtype, comparisons)


def show_progress(names: list[str]) -> Iterator[str]:
    """Yield `names` one by one, with a progress bar on stderr if that is a terminal and stdout is not."""
    quiet = not sys.stderr.isatty() or sys.stdout.isatty()
    yield from tqdm(names, unit="case", disable=quiet, file=sys.stderr)
