"""Introduce known bugs at the full width of the 9B and the 27B, and print where each is found.

    python tools/full_size_mistakes.py [--only TEXT] [--dtype bfloat16] [--json]

The weights are synthetic. Bugs that only show beyond the window use a longer text. docs/full-size.md has the table;
`tests/test_full_size.py` introduces three of these bugs in every test run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import test_mistakes
from test_mistakes import MISTAKES, Mistake, config

from refgemma.goldens import full_size
from refgemma.goldens import verify as oracle

SHORT, LONG, OTHER = "9b-synthetic-two-layers", "9b-synthetic-long", "27b-synthetic-two-layers"
# Introduced differently than in a small model: with the 9B's numbers, or in a text longer than the window.
REPLACED: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None] | None, str]] = {
    "query scalar is head_dim": ("query scalar 224 for 256", config(query_pre_attn_scalar=224), SHORT),
    "another final cap": ("final cap 50 for 30", config(final_logit_softcapping=50.0), SHORT),
    "no window": ("no window", config(sliding_window=8192), LONG),
    "window one too wide": ("window 4097", config(sliding_window=4097), LONG),
    "window one too narrow": ("window 4095", config(sliding_window=4095), LONG),
    **{name: (name, None, LONG) for name in ("layer parity swapped", "all layers sliding")},
    # In the 9B the scale is 1/16, which commutes with rounding, so this bug has no effect there.
    "query scaled before the product": ("query scaled before the product", None, OTHER),
}
BF16 = {"norm rounded before its weight", "sqrt(hidden) not rounded", "query scaled before the product"}
SMALL_ONLY = "an untied head taken for tied"  # no released Gemma 2 has an untied head, or biases


def at_full_size() -> Iterator[tuple[Mistake, str, str]]:
    """Yield each bug with its recording and precision."""
    for mistake in MISTAKES:
        if mistake.name == SMALL_ONLY or mistake.name.startswith("no bias"):
            continue
        name, make, recording = REPLACED.get(mistake.name, (mistake.name, None, SHORT))
        made = Mistake(name, make or mistake.make, mistake.first)
        yield made, recording, "bfloat16" if name in BF16 else "float32"
    yield Mistake("query scalar 128 for 144", config(query_pre_attn_scalar=128), "scores"), OTHER, "float32"
    unrounded = next(m for m in MISTAKES if m.name == "sqrt(hidden) not rounded")
    yield Mistake("sqrt(4608) not rounded to 68", unrounded.make, "embedded"), OTHER, "bfloat16"


def found_at(mistake: Mistake, recording: str, dtype: str) -> tuple[str, float] | None:
    """Return the first tensor outside its bound and its distance, or ``None``."""
    correct = full_size.model_of_recording
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_mistakes, "CORRECT_MODEL_OF", lambda about: correct(about, dtype, None))
        patch.setattr(oracle, "model_of", lambda about: correct(about, dtype, None))
        mistake.make(patch)
        patch.setattr(full_size, "model_of_recording", lambda about, *_: oracle.model_of(about))
        for step in full_size.verify_full(recording, dtype, reference=recording != LONG):
            if not isinstance(step, str) and not step.distance <= 1:
                return step.tensor, step.distance
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="mistakes whose name contains TEXT")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="use this precision for all bugs (default: for each, a precision that shows it)",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for mistake, recording, shows_in in at_full_size():
        if args.only not in mistake.name:
            continue
        dtype = args.dtype or shows_in
        found = found_at(mistake, recording, dtype)
        tensor, distance = found or ("not found", 0.0)
        rows.append({"mistake": mistake.name, "recording": recording, "dtype": dtype, "first": tensor,
                     "in_units_of_bound": distance if np.isfinite(distance) else "inf"})  # fmt: skip
        if not args.json:
            print(f"| {mistake.name} | {recording} | {dtype} | {tensor} | {distance:.3g} |", flush=True)
    if args.json:
        print(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
