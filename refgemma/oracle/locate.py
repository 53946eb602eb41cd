"""Locate the wrong elements of a tensor by head, position, distance and half of a head, in words and as maps.

Checked in the tests by making chosen elements wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.config import ConfigError
from refgemma.files import pluralise
from refgemma.oracle.engine import Engine
from refgemma.oracle.known_bugs import KnownBug
from refgemma.precision import Array
from refgemma.trace.candidate import axes_of
from refgemma.trace.names import field_of, layer_of, list_ranges

SIDE = 48  # maximum number of rows and columns of the values that a report shows
WORST = 8  # number of elements that a report lists
MOST_RANGES = 8  # maximum number of ranges that describe wrong places; more are counted
UNDERFLOWN = 1e-6  # weights below this may be 0 in a port
HIDDEN, BOTH, MISSED, EXTRA = range(4)  # a key for a query: seen by none, both, only the reference, only the port


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


@dataclass(frozen=True)
class Element:
    """An element of a wrong tensor."""

    place: tuple[int, ...]
    candidate: float
    reference: float
    units: float  # the error in standard deviations of rounding


@dataclass(frozen=True)
class Seen:
    """The keys that each query sees, in the port and in the reference."""

    layer: int
    states: Array  # (queries, keys): `HIDDEN`, `BOTH`, `MISSED` or `EXTRA`
    recorded: bool  # true if the port recorded its weights; else the known bug gives them


@dataclass(frozen=True)
class Sides:
    """The elements of a wrong tensor with the largest errors, each with its reference."""

    axes: tuple[str, ...]
    corner: tuple[int, ...]  # place of the first of the values
    along: tuple[int, int]  # the axes of the values
    candidate: Array  # values around the largest error, at most `SIDE` a side; NaN if not compared, infinity for NaN
    reference: Array
    worst: tuple[Element, ...]  # the largest errors of different rows
    relative: float  # size of the error relative to the reference
    seen: Seen | None


def compare_sides(engine: Engine, name: str, bugs: Sequence[KnownBug]) -> Sides:
    """Compare a wrong tensor with its reference, element by element; `bugs` are the known bugs that explain it."""
    found, reference = engine.candidate.tensors[name].numbers, engine.usual.result(name)
    where = engine.where(name)
    with np.errstate(all="ignore"):
        units = np.abs(found - reference) / engine.tolerance(name).std
        units = np.where(where, np.where(np.isnan(units), np.inf, units), -1)
        relative = float(np.linalg.norm((found - reference)[where]) / np.linalg.norm(reference[where]))
    rows = units.reshape(-1, units.shape[-1] if units.ndim > 1 else 1)
    order = np.argsort(-rows.max(axis=-1), kind="stable")[:WORST]
    flat = [int(row * rows.shape[1] + rows[row].argmax()) for row in order]
    places = [tuple(int(n) for n in np.unravel_index(n, found.shape)) for n in flat]
    beyond = [p for p in places if p == places[0] or units[p] > 3]
    worst = [Element(p, float(found[p]), float(reference[p]), float(units[p])) for p in beyond]
    axes = tuple(axes_of(name).split())
    along = (axes.index("seq") if "seq" in axes else max(0, len(axes) - 2), len(axes) - 1)
    at, cut = places[0], list[Any](places[0])
    for axis in along:
        start = max(0, min(at[axis] - SIDE // 2, found.shape[axis] - SIDE))
        cut[axis] = slice(start, start + SIDE)
    corner = tuple(n.start if isinstance(n, slice) else n for n in cut)
    shown = np.where(np.isnan(found), np.inf, found)  # NaN stands for elements that are not compared
    candidate, right = (np.atleast_2d(np.where(where, x, np.nan)[tuple(cut)]) for x in (shown, reference))
    return Sides(axes, corner, along, candidate, right, tuple(worst), relative, find_seen(engine, name, at, bugs))


def find_seen(engine: Engine, name: str, at: Sequence[int], bugs: Sequence[KnownBug]) -> Seen | None:
    """Return the keys that the port and the reference see, if they differ; `at` is the place of the largest error."""
    context, layer = engine.context, layer_of(name)
    if field_of(name) == "attention.probs" and layer is not None:
        right, weights = context.mask(context, layer)[at[0], 0], engine.candidate.tensors[name].numbers[at[0], at[1]]
        due = engine.usual.result(name)[at[0], at[1]] > UNDERFLOWN
        states = _find_mask_errors(right, np.where(right & ~due, right, weights != 0), context.call.visible[at[0]])
        return Seen(layer, states, True) if (states > BOTH).any() and np.isfinite(weights).all() else None
    for bug in bugs:
        try:
            wrong = bug.change(context) if bug.change else context
        except ConfigError:
            continue
        for n in range(context.config.num_hidden_layers if wrong is not context else 0):
            right, other = context.mask(context, n)[:, 0], wrong.mask(wrong, n)[:, 0]
            rows = np.flatnonzero((right != other).any(axis=(1, 2)))
            for row in rows:
                states = _find_mask_errors(right[row], other[row], context.call.visible[row])
                if (states > BOTH).any():
                    return Seen(n, states, False)
    return None


def _find_mask_errors(right: Array, wrong: Array, visible: Array) -> Array:
    """Return `HIDDEN`, `BOTH`, `MISSED` or `EXTRA` for each key of each query; padding sees nothing."""
    states = np.where(right, np.where(wrong, BOTH, MISSED), np.where(wrong, EXTRA, HIDDEN))
    return np.where(visible[:, None], states, HIDDEN)


def list_some(numbers: Array, total: int, word: str) -> str:
    """Return ``heads 1, 3`` or ``positions 8 to 23``, or an empty string if `numbers` has all.

    Examples
    --------
    >>> list_some(np.array([1, 3]), 4, "heads"), list_some(np.arange(8, 24), 25, "positions")
    ('heads 1, 3', 'positions 8 to 23')
    >>> list_some(np.arange(0, 40, 2), 40, "positions")
    '20 of 40 positions, from 0 to 38'
    """
    if len(numbers) in (0, total):
        return ""
    ranges = list_ranges(numbers.tolist()).split(",")
    if len(ranges) > MOST_RANGES:
        return f"{len(numbers)} of {total} {word}, from {numbers[0]} to {numbers[-1]}"
    return f"{word} {', '.join(ranges).replace('-', ' to ')}"


def locate_errors(engine: Engine, name: str) -> str:
    """Describe where the wrong elements are."""
    wrong = find_wrong(engine, name)
    if not wrong.any():
        return "small errors across the whole tensor"
    axes = axes_of(name).split()
    said = [f"{np.sum(wrong)} of {pluralise(wrong.size, 'element')}"]
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
