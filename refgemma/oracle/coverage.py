"""Find the known bugs that each prompt can show.

Checked in tests/parity: for each prompt the result equals the bugs that `refgemma check` excludes on transformers' run.

A prompt shows a bug if `refgemma check` excludes the bug, given the trace of a correct port. So refgemma runs the
prompt in each precision, and checks its own full trace.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refgemma.config import Gemma2Config
from refgemma.files import replace_file, write_json
from refgemma.oracle.diagnose import Diagnosis
from refgemma.oracle.engine import Engine
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug
from refgemma.oracle.prompts import Prompt, prompts
from refgemma.precision import Array
from refgemma.trace.candidate import candidate_of
from refgemma.trace.names import run_calls, save_trace
from refgemma.weights.parameters import Weights

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Detected:
    """The known bugs that one prompt shows in one precision."""

    prompt: str
    dtype: str
    variants: tuple[KnownBug, ...]


def run_prompt(prompt: Prompt, weights: Weights, config: Gemma2Config) -> Iterator[tuple[str, Array]]:
    """Yield the trace of a prompt as a port would write it: calls in order, with a shared cache.

    Examples
    --------
    >>> import refgemma
    >>> model = refgemma.load("conformance")
    >>> tensors = dict(run_prompt(prompts(model.config)["cached"], model.weights, model.config))
    >>> tensors["calls.1.logits"].shape
    (1, 6, 97)
    """
    yield from input_tensors(prompt)
    yield from run_calls(prompt.input_ids, prompt.calls, weights, config, prompt.attention_mask)


def input_tensors(prompt: Prompt) -> Iterator[tuple[str, Array]]:
    """Yield the input tensors of a prompt."""
    yield "input_ids", prompt.input_ids
    yield "attention_mask", prompt.attention_mask


def detect(prompt: Prompt, dtype: str, weights: Weights, config: Gemma2Config) -> Detected:
    """Return the known bugs that a correct port's full trace of a prompt excludes."""
    candidate = candidate_of(dict(run_prompt(prompt, weights, config)), config, dtype, prompt.calls, prompt.name)
    return Detected(prompt.name, dtype, Diagnosis(Engine(candidate, weights, config)).coverage()[0])


def about(prompt: Prompt) -> dict[str, str]:
    """Return the metadata for a prompt's file."""
    return {"calls": json.dumps(prompt.calls), "prompt": prompt.name}


def cover(found: Sequence[Detected]) -> list[Detected]:
    """Choose a few prompts that together show all bugs: next is always the prompt that shows most of the remaining
    bugs.

    Examples
    --------
    >>> a, b, c = KNOWN_BUGS[:3]
    >>> rows = [("p", "f", (a,)), ("q", "f", (a,)), ("q", "h", (b,)), ("r", "f", (c, b))]
    >>> some = [Detected(*row) for row in rows]
    >>> [(s.prompt, s.dtype) for s in cover(some)]
    [('q', 'f'), ('q', 'h'), ('r', 'f')]
    """
    by_prompt: dict[str, set[str]] = {}
    for s in found:
        by_prompt.setdefault(s.prompt, set()).update(v.name for v in s.variants)
    left = set().union(*by_prompt.values())
    chosen = []
    while left:
        best = max(by_prompt, key=lambda name: len(left & by_prompt[name]))
        left -= by_prompt[best]
        chosen.append(best)
    return [s for s in found if s.prompt in chosen]


def list_undetected(found: Sequence[Detected]) -> list[KnownBug]:
    """Return the known bugs that change a computation but that no prompt shows."""
    seen = {v.name for s in found for v in s.variants}
    return [v for v in KNOWN_BUGS if v.change is not None and v.name not in seen]


def as_json(found: Sequence[Detected], config: Gemma2Config, model: str) -> dict[str, Any]:
    """Return all results as JSON types."""
    known = prompts(config)
    return {
        "schema": "refgemma-prompts/1", "model": model,
        "prompts": [
            {"file": f"{name}.safetensors", "name": name, "why": known[name].why, "calls": list(known[name].calls),
             "shows": {s.dtype: [v.name for v in s.variants] for s in found if s.prompt == name}}
            for name in dict.fromkeys(s.prompt for s in found)
        ],
        "not_shown": [{"variant": v.name, "needs": v.shows} for v in list_undetected(found)],
        "found_elsewhere": [v.name for v in KNOWN_BUGS if v.change is None],
    }  # fmt: skip


def write_prompts(found: Sequence[Detected], config: Gemma2Config, folder: Path, model: str) -> list[Path]:
    """Write a file with each prompt's inputs, and ``prompts.json`` with the known bugs that each prompt shows."""
    folder.mkdir(parents=True, exist_ok=True)
    known, written = prompts(config), []
    for name in dict.fromkeys(s.prompt for s in found):
        written.append(folder / f"{name}.safetensors")
        save_trace(input_tensors(known[name]), written[-1], about(known[name]) | {"model": model})
    written.append(folder / "prompts.json")
    replace_file(written[-1], (write_json(as_json(found, config, model)) + "\n").encode())
    return written
