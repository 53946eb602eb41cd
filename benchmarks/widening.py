"""Compare ways to multiply bfloat16 weights with one token: what each takes to widen and multiply a 9B layer.

    python benchmarks/widening.py [--rounds 8] [--tile 19] [--json]

Each way uses the threads of `refgemma.fast`, one tile of ``2 ** tile`` weights at a time, and the ways alternate. The
last two rows are limits: casting without any product, and reading the weights.
"""

import argparse
import functools
import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from engines import config_of, processor

from refgemma import fast
from refgemma.precision import Array
from refgemma.weights.synthetic import synthetic_weights

Fill: TypeAlias = Callable[[Any, Array, Array, int, int], None]  # weight, x, y, first row, last row
KEPT = threading.local()


def tiles(start: int, stop: int, width: int, size: int) -> list[tuple[int, int]]:
    """Return the rows of each tile."""
    rows = max(size // width // fast.CUT, 1) * fast.CUT
    return [(first, min(first + rows, stop)) for first in range(start, stop, rows)]


def cast(source: Any, x: Array, y: Array, start: int, stop: int, *, size: int, product: bool = True) -> None:
    """Cast with ml_dtypes, as `refgemma.fast` does, into a new buffer for each weight."""
    parts = tiles(start, stop, len(x), size)
    buffer = np.empty((parts[0][1] - start, len(x)), np.float32)
    for first, last in parts:
        tile = buffer[: last - first]
        tile[...] = source[first:last]
        if product:
            np.matmul(tile, x, out=y[first:last])


def cast_into_kept_buffer(source: Any, x: Array, y: Array, start: int, stop: int, *, size: int) -> None:
    """Cast into a buffer that each thread keeps from weight to weight."""
    parts = tiles(start, stop, len(x), size)
    needed = (parts[0][1] - start) * len(x)
    if getattr(KEPT, "buffer", np.empty(0)).size < needed:
        KEPT.buffer = np.empty(needed, np.float32)
    for first, last in parts:
        tile = KEPT.buffer[: (last - first) * len(x)].reshape(-1, len(x))
        tile[...] = source[first:last]
        np.matmul(tile, x, out=y[first:last])


def shift(source: Any, x: Array, y: Array, start: int, stop: int, *, size: int) -> None:
    """Widen 16-bit integers and shift them to the upper half of a float32."""
    parts = tiles(start, stop, len(x), size)
    buffer = np.empty((parts[0][1] - start, len(x)), np.uint32)
    for first, last in parts:
        tile = buffer[: last - first]
        np.left_shift(source[first:last].view(np.uint16), 16, out=tile, dtype=np.uint32)
        np.matmul(tile.view(np.float32), x, out=y[first:last])


def shift_pairs(source: Any, x: Array, y: Array, start: int, stop: int, *, size: int) -> None:
    """Take two weights as one 32-bit integer: a shift gives the even ones, a mask the odd ones."""
    even, odd = np.ascontiguousarray(x[0::2]), np.ascontiguousarray(x[1::2])
    parts = tiles(start, stop, len(even), size)
    buffer = np.empty((parts[0][1] - start, len(even)), np.uint32)
    for first, last in parts:
        tile, pairs = buffer[: last - first], source[first:last].view(np.uint32)
        np.left_shift(pairs, np.uint32(16), out=tile)
        np.matmul(tile.view(np.float32), even, out=y[first:last])
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=tile)
        y[first:last] += tile.view(np.float32) @ odd


def einsum(source: Any, x: Array, y: Array, start: int, stop: int, *, size: int) -> None:
    """Leave the widening to `numpy.einsum`, which casts some numbers at a time."""
    np.einsum("oi,ij->oj", source[start:stop], x, out=y[start:stop], dtype=np.float32, casting="same_kind")


def read(source: Any, x: Array, y: Array, start: int, stop: int, *, size: int) -> None:
    """Read the weights as 64-bit integers."""
    np.max(source[start:stop].view(np.uint64))


WAYS: dict[str, Callable[..., None]] = {
    "cast with ml_dtypes": cast,
    "the same, into a kept buffer": cast_into_kept_buffer,
    "shift 16-bit integers": shift,
    "shift and mask pairs": shift_pairs,
    "numpy.einsum": einsum,
    "limit: cast, no product": functools.partial(cast, product=False),
    "limit: read": read,
}


@fast.own_threads()
def compute_token(tasks: list[tuple[Any, Array]], fill: Fill) -> list[Array]:
    """Compute the products of all matrices with their columns."""
    found = []
    for matrix, x in tasks:
        y = np.empty((len(matrix), 1), np.float32)
        fast.in_threads(functools.partial(fill, matrix, x, y), len(y), fast.WORK // x.size, fast.CUT)
        found.append(y)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tile", type=int, default=19, help="binary logarithm of the weights in a tile")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layer = vars(synthetic_weights(config_of("9b")).layers[1]).values()
    matrices = [matrix for matrix in layer if matrix is not None and matrix.ndim == 2]
    rng = np.random.default_rng(0)
    columns = [rng.standard_normal((matrix.shape[1], 1), np.float32) for matrix in matrices]
    expected = [matrix.astype(np.float64) @ x for matrix, x in zip(matrices, columns, strict=True)]
    narrow = [matrix.astype(ml_dtypes.bfloat16) for matrix in matrices]  # synthetic weights are exact in bfloat16
    tasks, times = list(zip(narrow, columns, strict=True)), dict[str, list[float]]()
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            fill = functools.partial(way, size=2**args.tile)
            found = compute_token(tasks, fill)
            if not name.startswith("limit"):
                for y, exact in zip(found, expected, strict=True):
                    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * float(np.abs(exact).max()))
            for _ in range(3):
                began = time.perf_counter()
                compute_token(tasks, fill)
                times.setdefault(name, []).append(1000 * (time.perf_counter() - began))
    rows = {name: [round(q, 1) for q in statistics.quantiles(found, n=4)] for name, found in times.items()}
    if args.json:
        print(json.dumps({"processor": processor(), "milliseconds": rows}, indent=1))
        return
    print("| way | ms | quartiles | limit / time |\n| --- | --- | --- | --- |")
    for name, (low, middle, high) in rows.items():
        print(f"| {name} | {middle:.1f} | {low} to {high} | {rows['limit: cast, no product'][1] / middle:.2f} |")
    print(f"\n{processor()}; {fast.THREADS} threads; tiles of 2 ** {args.tile} weights")


if __name__ == "__main__":
    main()
