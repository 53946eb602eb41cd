"""Locate the wrong elements of a tensor by head, position, distance and half of a head, in words and as maps.

Checked in the tests by making chosen elements wrong.
"""

from dataclasses import dataclass

import numpy as np

from refgemma.oracle.engine import Engine
from refgemma.precision import Array
from refgemma.trace.candidate import axes_of


def find_wrong(engine: Engine, name: str) -> Array:
    """Return a mask of the elements beyond the error bound or, if there are none, beyond three standard deviations."""
    error, where, allowed = np.abs(engine.errors(name)), engine.where(name), engine.tolerance(name)
    beyond = (error > allowed.error_bound) & where
    return np.asarray(beyond if beyond.any() else (error > 3 * allowed.std) & where)


@dataclass(frozen=True)
class ErrorMap:
    """The errors of a tensor along two of its axes."""

    rows: str  # the names of the axes
    columns: str
    numbers: Array  # the largest error in standard deviations; NaN for elements that are not compared


def map_errors(engine: Engine, name: str) -> tuple[ErrorMap, ...]:
    """Return maps of a wrong tensor's errors: by position and last axis and, if it has heads, by head and position."""
    with np.errstate(invalid="ignore"):
        units = np.abs(engine.errors(name)) / engine.tolerance(name).std
    units = np.where(engine.where(name), np.where(np.isfinite(units), units, np.inf), np.nan)
    axes = axes_of(name).split()
    if "seq" not in axes:  # the gradient of a weight
        return ()
    seq, last = axes.index("seq"), len(axes) - 1
    pairs = [(seq, last), *([(1, seq)] if axes[1] in ("heads", "kv_heads") else [])]
    return tuple(
        ErrorMap(axes[a], axes[b], np.fmax.reduce(units, axis=tuple(n for n in range(len(axes)) if n not in (a, b))))
        for a, b in pairs
    )


def list_some(numbers: Array, total: int, word: str) -> str:
    """Return ``heads 1, 2`` or ``positions 8 to 23``, or an empty string if `numbers` has all.

    Examples
    --------
    >>> list_some(np.array([1, 2]), 4, "heads"), list_some(np.arange(8, 24), 24, "positions")
    ('heads 1, 2', 'positions 8 to 23')
    """
    if len(numbers) in (0, total):
        return ""
    if len(numbers) > 3 and len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{word} {numbers[0]} to {numbers[-1]}"
    return f"{word} " + ", ".join(str(n) for n in numbers[:6]) + (", ..." if len(numbers) > 6 else "")


def locate_errors(engine: Engine, name: str) -> str:
    """Describe where the wrong elements are."""
    wrong = find_wrong(engine, name)
    if not wrong.any():
        return "small errors across the whole tensor"
    axes = axes_of(name).split()
    said = [f"{np.sum(wrong)} of {wrong.size} elements"]
    lengths = dict(zip(axes, wrong.shape, strict=True))
    words = {"batch": "rows", "heads": "heads", "kv_heads": "key heads", "seq": "positions"}
    for axis, word in words.items():
        if axis in axes:
            others = tuple(n for n, other in enumerate(axes) if other != axis)
            said.append(list_some(np.flatnonzero(wrong.any(axis=others)), lengths[axis], word))
    last = np.flatnonzero(wrong.any(axis=tuple(range(wrong.ndim - 1))))
    if axes[-1] == "keys":
        said.append(describe_distances(wrong, engine.config.sliding_window))
    elif axes[-1] == "head_dim":
        said.append(describe_halves(last, lengths["head_dim"]))
    elif axes[-1] == "vocab":
        said.append(list_some(last, lengths["vocab"], "columns"))
    return "; ".join(part for part in said if part)


def describe_distances(wrong: Array, window: int) -> str:
    """Describe how far the wrong keys are from their queries."""
    _, _, queries, keys = np.nonzero(wrong)
    if len(set(keys)) == 1 and wrong.shape[-1] > 2:
        return f"only key {keys[0]}"
    apart = queries - keys
    low, high = int(apart.min()), int(apart.max())
    if high < 0:
        return "only keys after their query"
    beyond = (
        "; keys beyond the window" if low >= window else "; first at the window's edge" if low == window - 1 else ""
    )
    return f"keys {low} to {high} before their query{beyond}"


def describe_halves(places: Array, head_dim: int) -> str:
    """Name the half of each head that has all wrong elements, or return an empty string."""
    if len(places) and places.min() >= head_dim // 2:
        return "second halves of heads"
    if len(places) and places.max() < head_dim // 2:
        return "first halves of heads"
    return ""
