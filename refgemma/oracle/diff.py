"""Compare two traces: find the first tensor that differs, and the differences that inputs and rounding do not explain.

Checked in the tests on recordings of PyTorch; one of them has a change in a known place.

An operation gives ``a = f(inputs of a) + e`` in the first trace and ``b = f(inputs of b) + e'`` in the second, where
``B`` and ``B'`` from ``refgemma.oracle.tolerance`` bound the errors. So ``(a - b) - (f(inputs of a) - f(inputs of b))``
is at most ``B + B'``, however much the inputs differ. A larger difference is unexplained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError
from refgemma.oracle.engine import Engine
from refgemma.precision import Array
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import FIELDS, field_of, layer_of
from refgemma.trace.reader import TraceFile
from refgemma.weights.parameters import Weights


@dataclass(frozen=True)
class Difference:
    """One tensor of two traces.

    Examples
    --------
    >>> Difference("logits", "", elements=4, equal=0.5).differs
    True
    """

    tensor: str
    problem: str  # why the two tensors cannot be compared; empty if they can
    elements: int = 0
    equal: float = 0.0  # share of equal elements
    largest: float = 0.0  # largest absolute difference
    relative: float = 0.0  # root mean square of the difference, divided by that of the first tensor
    place: tuple[int, ...] = ()  # index of the largest difference
    unexplained: float | None = None  # largest unexplained difference over its bound, if both traces have all inputs

    @property
    def differs(self) -> bool:
        """True if the tensors are not equal bit for bit."""
        return bool(self.problem) or self.equal < 1


def sort_names(names: list[str]) -> list[str]:
    """Return refgemma's names in the order of execution, then all other names in their given order.

    Examples
    --------
    >>> sort_names(["logits", "mine", "layers.10.out", "layers.2.out", "cos"])
    ['cos', 'layers.2.out', 'layers.10.out', 'logits', 'mine']
    """

    def key(name: str) -> tuple[int, int, int]:
        kind, layered = field_of(name), name.startswith("layers.")
        if kind not in FIELDS or (layered and not name.split(".")[1].isdecimal()):
            return len(FIELDS), 0, names.index(name)
        place = FIELDS.index(kind)
        return (3, layer_of(name) or 0, place) if layered else (min(place, 4), 0, place)

    return sorted(names, key=key)


def compare_tensors(name: str, a: Array, b: Array) -> Difference:
    """Compare the arrays `a` and `b` of the tensor `name`.

    Examples
    --------
    >>> d = compare_tensors("x", np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    >>> isinstance(d, Difference), d.equal, d.largest, d.place
    (True, 0.5, 0.5, (1,))
    """
    if a.shape != b.shape:
        return Difference(name, f"has shapes {a.shape} and {b.shape}")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    if not x.size or same.all():
        return Difference(name, "", x.size, 1.0)
    with np.errstate(all="ignore"):
        gap = np.where(same, 0.0, np.abs(x - y))
        gap = np.where(np.isnan(gap), np.inf, gap)
        finite = np.isfinite(gap) & np.isfinite(x)
        relative = np.sqrt(np.sum(gap[finite] ** 2) / max(float(np.sum(x[finite] ** 2)), 1e-300))
    place = tuple(int(n) for n in np.unravel_index(np.argmax(gap), gap.shape))
    return Difference(name, "", x.size, float(same.mean()), float(gap.max()), float(relative), place)


def compare_traces(a: TraceFile, b: TraceFile) -> list[Difference]:
    """Compare every tensor that both files have, in the order of execution."""
    found = []
    for name in sort_names([name for name in a.entries if name in b.entries]):
        left, right = a.entries[name], b.entries[name]
        if left.shape != right.shape:
            found.append(Difference(name, f"has shapes {left.shape} and {right.shape}"))
        else:
            found.append(compare_tensors(name, left.read(), right.read()))
    return found


def measure_unexplained(
    a: Candidate, b: Candidate, weights: Mapping[str, Weights], config: Gemma2Config
) -> dict[str, float]:
    """Return the unexplained difference of each tensor whose inputs both traces have, in units of its bound.

    Parameters
    ----------
    a, b : Candidate
        Two traces of the same tokens.
    weights : mapping
        The model's weights, by precision.
    config : Gemma2Config
        The model's configuration.
    """
    if not np.array_equal(a.call.input_ids, b.call.input_ids):
        raise InputError(f"{a.source} and {b.source} have different tokens; give two traces of the same tokens")
    engines = [Engine(c, weights[c.dtype], config) for c in (a, b)]
    found = {}
    for name in engines[0].usual.table:
        if any(name not in c.tensors for c in (a, b)) or not all(e.is_direct(name) for e in engines):
            continue
        error_a, error_b = (e.errors(name) for e in engines)
        bound = engines[0].tolerance(name).error_bound + engines[1].tolerance(name).error_bound
        with np.errstate(invalid="ignore"):
            units = (np.abs(error_a - error_b) / bound)[engines[0].where(name) & engines[1].where(name)]
        found[name] = float(np.nanmax(units, initial=0.0)) if np.isfinite(units).all() else float("inf")
    return found


def as_json(a: str, b: str, found: list[Difference], only_a: list[str], only_b: list[str], code: int) -> dict[str, Any]:
    """Return all results as JSON types."""
    return {
        "schema": "refgemma-diff/1", "a": a, "b": b, "exit_code": code,
        "first_difference": next((d.tensor for d in found if d.differs), None),
        "first_unexplained": next((d.tensor for d in found if (d.unexplained or 0) > 1), None),
        "tensors": [
            {"tensor": d.tensor, "problem": d.problem, "elements": d.elements, "equal": d.equal,
             "largest": d.largest, "relative": d.relative, "place": d.place, "error_over_bound": d.unexplained}
            for d in found
        ],
        "only_a": only_a, "only_b": only_b,
    }  # fmt: skip
