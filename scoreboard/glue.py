"""The cases that an engine runs, read from a job file, and the traces that it writes. Needs NumPy and safetensors."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no engine may fetch anything while it runs


class NotRun(Exception):
    """The engine cannot run this case; the message is the reason, and the page shows it."""


class Case:
    """Token ids, a mask, and the numbers of tokens of the calls that share a cache."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.name: str = about["name"]
        self.ids = np.array(about["input_ids"], np.int64)  # (batch, seq)
        self.mask = np.array(about["attention_mask"], np.int64)  # 0 is padding
        self.calls: list[int] = about["calls"]
        self.padded = not self.mask.all()

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """Yield the prefix of each call's names, and its first and last place."""
        start = 0
        for number, length in enumerate(self.calls):
            yield f"calls.{number}." if len(self.calls) > 1 else "", start, start + length
            start += length

    def only(self, *, calls: bool = False, padding: bool = False) -> None:
        """Refuse the case if the engine has no `calls` (a cache) or no `padding`."""
        if len(self.calls) > 1 and not calls:
            raise NotRun("no cache that can be called here")
        if self.padded and not padding:
            raise NotRun("no attention mask for padding")


def as_array(x: Any) -> np.ndarray:
    """Return an engine's array as NumPy's, half precision widened, which changes no number."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu().numpy()
    return np.ascontiguousarray(x, np.float32)


class Watch:
    """The outputs of a PyTorch model's modules, under the modules' names, one call after the other."""

    def __init__(self, model: Any) -> None:
        self.found: dict[str, Any] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: Any, given: Any, result: Any) -> None:
            result = result[0] if isinstance(result, tuple) and result else result
            if hasattr(result, "detach") and result.is_floating_point():
                self.found[name] = result.detach().clone()

        return note

    def take(self, prefix: str, **more: Any) -> dict[str, Any]:
        """Return the outputs since the last time, and `more`, with a call's prefix."""
        found, self.found = self.found | more, {}
        return {prefix + name: x for name, x in found.items() if name}


def save(path: Path, case: Case, tensors: dict[str, Any], about: dict[str, str]) -> None:
    """Write a trace."""
    from safetensors.numpy import save_file

    arrays = {"input_ids": case.ids} | {n: x if n == "position_ids" else as_array(x) for n, x in tensors.items()}
    if case.padded:
        arrays["attention_mask"] = case.mask
    if len(case.calls) > 1:
        about = about | {"calls": json.dumps(case.calls)}
    save_file(arrays, str(path), about)


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"FAILED: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def main(load: Callable[..., Any], run: Callable[[Any, Case], dict[str, Any]], **about: str) -> None:
    """Run each case of the job ``sys.argv[1]``.

    ``load(folder, dtype, *arguments)`` returns the model, ``run(model, case)`` the tensors of one case.
    """
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out = Path(job["out"])
    result: dict[str, str] = {}
    try:
        model = load(Path(job.get("converted", job["model"])), job["dtype"], *job["arguments"])
    except NotRun as reason:
        result = {"load": f"NOT RUN: {reason}"}
    except Exception as error:
        traceback.print_exc()
        result = {"load": first_line(error)}
    for case in [] if result else map(Case, job["cases"]):
        try:
            save(out / f"{case.name}.safetensors", case, run(model, case), {"dtype": job["dtype"], **about})
            result[case.name] = "written"
        except NotRun as reason:
            result[case.name] = f"NOT RUN: {reason}"
        except Exception as error:
            traceback.print_exc()
            result[case.name] = first_line(error)
    (out / "result.json").write_text(json.dumps(result), "utf-8")
