"""Read the output of llama.cpp's ``llama-eval-callback`` as tensors. Checked in the tests on a recorded run of
llama.cpp.

Each operation prints a line ``name = (type) OP(...) = {ne0, ne1, ne2, ne3}``, then numbers in brackets with four
decimals: the first three and the last three along each axis. So most numbers of a tensor are unknown, and the known
numbers are accurate to half a unit of the fourth decimal. Programs built since January 2026 print the tokens
after ``number of input tokens``; otherwise the user passes the tokens.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from refgemma.files import open_file, pluralise, quote, read_file
from refgemma.inputs import InputError
from refgemma.precision import Array
from refgemma.trace.reader import Entry, TraceFile

SHOWN = 3  # number of printed numbers at each end of an axis
STEP = 1e-4
HEAD = re.compile(
    r"(?:common_debug_cb_eval|ggml_debug):\s+(?P<name>.+?) = \((?P<type>\w+)\)\s+"
    r"(?P<op>\w+)\((?P<of>[^{]*)\{.*= \{(?P<ne>[\d, ]+)\}"
)
UNNAMED = re.compile(r"node_\d+")
NUMBER = re.compile(r"-?(?:\d+\.\d+|inf|nan)", re.IGNORECASE)
TOKEN = re.compile(r"\d{1,9}")
TOKENS = re.compile(r"number of input tokens = (\d+)")
PEEK = 2**18


def is_eval_callback(path: Path) -> bool:
    """Return True if a file begins like the output of ``llama-eval-callback``."""
    with open_file(path) as file:
        start = file.read(PEEK)
    return b"common_debug_cb_eval:" in start or b"ggml_debug:" in start


def open_eval_callback(path: str | Path) -> TraceFile:
    """Return the tensors of a text; repeated names are numbered: ``Qcur-0``, ``Qcur-0#1``.

    Raises
    ------
    InputError
        If a tensor's numbers do not fit its shape; the message names the line.
    """
    entries: dict[str, Entry] = {}
    counts: dict[str, int] = {}
    lines = read_file(path).decode("utf-8", errors="replace").splitlines()
    ids = list(_tokens(lines, path))
    if ids:
        entries["input_ids"] = Entry("I64", (1, len(ids)), lambda: np.array([ids]))
    starts = [n for n, line in enumerate(lines) if HEAD.search(line)]
    for start, end in pairwise([*starts, len(lines)]):
        head = HEAD.search(lines[start])
        assert head is not None
        name = head["name"].strip()
        if UNNAMED.fullmatch(name):
            name = f"{head['op']}({head['of']})"  # the number in the name changes in each version
        number = counts.get(name, 0)
        counts[name] = number + 1
        axes = head["ne"].replace(" ", "").split(",")
        if not all(axis.isdecimal() and len(axis) < 12 for axis in axes):
            raise InputError(f"{path}: line {start + 1}: {quote(head['ne'])} is not the shape of a tensor")
        shape = tuple(int(axis) for axis in axes)[::-1]
        rows = [line for line in lines[start + 1 : end] if "[" in line and NUMBER.search(line)]
        numbers = [float(x) for row in rows for x in NUMBER.findall(row)]
        if len(numbers) != shape[0] * math.prod(min(n, 2 * SHOWN) for n in shape[1:]):
            if not numbers:
                continue  # only the name is printed for a quantized tensor
            raise InputError(
                f"{path}: line {start + 1}: {name} has shape {shape}, followed by {pluralise(len(numbers), 'number')}"
            )
        places = _list_printed(shape)
        printed = np.reshape(np.array(numbers, np.float32), [len(along) for along in places])
        dtype = {"f16": "F16", "bf16": "BF16", "f32": "F32"}.get(head["type"], "I64")
        key = f"{name}#{number}" if number else name
        read, known = (partial(_spread, shape, places, x) for x in (printed, np.ones_like(printed, bool)))
        entries[key] = Entry(dtype, shape, read, known, STEP)
    return TraceFile(str(path), {"engine": "llama.cpp, llama-eval-callback", "map": "llama.cpp", "dtype": "float32"},
                     entries)  # fmt: skip


def _tokens(lines: list[str], path: str | Path) -> Iterator[int]:
    for start, line in enumerate(lines):
        if (hit := TOKENS.search(line)) is not None:
            for number, row in enumerate(lines[start + 1 : start + 1 + int(hit[1][:9])], start + 2):
                if not (words := row.split()) or not TOKEN.fullmatch(words[-1]):
                    raise InputError(f"{path}: line {number}: {quote(row)} does not end in a token id")
                yield int(words[-1])
            return


def _list_printed(shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Return the printed indices along each axis; along the first axis, return all indices."""
    return tuple(
        np.arange(n) if axis == 0 or n <= 2 * SHOWN else np.array([*range(SHOWN), *range(n - SHOWN, n)])
        for axis, n in enumerate(shape)
    )


def _spread(shape: tuple[int, ...], places: tuple[Array, ...], numbers: Array) -> Array:
    """Return zeros with `numbers` at the given indices."""
    whole = np.zeros(shape, numbers.dtype)
    whole[np.ix_(*places)] = numbers
    return whole
