"""Compare ways to share the products of one decoded token between processors: own threads, BLAS's threads, one thread.

    python benchmarks/threads.py 9b [--rounds 5] [--json]
    OPENBLAS_CORETYPE=Haswell python benchmarks/threads.py 9b      the kernels that BLAS uses without AVX-512
    NUMPY_MADVISE_HUGEPAGE=0 python benchmarks/threads.py 9b       without huge pages
    python benchmarks/threads.py 9b --busy                         beside a program that keeps one processor busy

A row is the time of the seven products of a layer in float32, and the rate of reading that this means. The ways
alternate. The last row is the time to wake a thread and wait for it. Below the table stands how many products the own
threads computed in turn on one processor, instead of at the same time (Linux only).
"""

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from engines import config_of, processor
from threadpoolctl import threadpool_info

from refgemma import fast
from refgemma.precision import Array
from refgemma.weights.synthetic import synthetic_weights


def pin(process: int, counter: list[int], lock: threading.Lock) -> None:
    """Keep the calling thread on a processor of its own."""
    with lock:
        counter[0] += 1
        os.sched_setaffinity(process, {sorted(os.sched_getaffinity(0))[counter[0] % (os.cpu_count() or 1)]})


def count_same_processor(matrices: list[Array], rounds: int) -> str:
    """Return how many products of a layer had their parts begun on one processor, as "3 of 35"."""
    current, begun = ctypes.CDLL(None).sched_getcpu, list[set[int]]()

    def multiply_rows(matrix: Array, start: int, stop: int) -> None:
        begun[-1].add(current())
        np.matmul(matrix[start:stop], np.ones((matrix.shape[1], 1), np.float32))

    for matrix in matrices * rounds:
        begun.append(set())
        fast.in_threads(functools.partial(multiply_rows, matrix), len(matrix), 1, fast.CUT)
    return f"{sum(len(processors) == 1 for processors in begun)} of {len(begun)}"


def make_ways(matrices: list[Array]) -> dict[str, Callable[[], object]]:
    """Return the ways to compute the products of all matrices with one token."""
    columns = [np.ones((matrix.shape[1], 1), np.float32) for matrix in matrices]
    out = [np.empty((len(matrix), 1), np.float32) for matrix in matrices]
    tasks = list(zip(matrices, columns, out, strict=True))
    pinned = ThreadPoolExecutor(fast.THREADS, initializer=pin, initargs=(0, [0], threading.Lock()))
    maximum = ThreadPoolExecutor(fast.THREADS)

    def in_own_threads() -> None:
        for matrix, x, y in tasks:
            fast.in_threads(functools.partial(fast.multiply_rows, matrix, x, y), len(y), 1, fast.CUT)

    def in_pinned_threads() -> None:
        for matrix, x, y in tasks:
            cuts = [len(matrix) * n // fast.THREADS // fast.CUT * fast.CUT for n in range(fast.THREADS)]
            parts = zip(cuts, [*cuts[1:], len(matrix)], strict=True)
            list(pinned.map(lambda pair, m=matrix, x=x, y=y: fast.multiply_rows(m, x, y, *pair), parts))  # type: ignore[misc]

    return {
        "own threads": fast.own_threads()(in_own_threads),
        "own threads, pinned": fast.own_threads()(in_pinned_threads),
        "BLAS's threads, x @ weight.T": lambda: [x.T @ matrix.T for matrix, x, _ in tasks],
        "BLAS's threads, weight @ x": lambda: [matrix @ x for matrix, x, _ in tasks],
        "one thread": fast.own_threads()(lambda: [matrix @ x for matrix, x, _ in tasks]),
        "reading, maxima in threads": lambda: [
            list(maximum.map(np.max, np.array_split(matrix, fast.THREADS))) for matrix in matrices
        ],
    }


def wake() -> float:
    """Return the seconds to give a waiting thread nothing to do and wait for it."""
    began = time.perf_counter()
    fast.in_threads(lambda start, stop: None, fast.THREADS)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("2b", "9b", "27b"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", action="store_true", help="beside a program that keeps one processor busy")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if args.busy else None
    try:
        measure(args)
    finally:
        if other:
            other.kill()


def measure(args: argparse.Namespace) -> None:
    """Measure all ways and print them."""
    weights = vars(synthetic_weights(config_of(args.size)).layers[1]).values()
    matrices = [matrix for matrix in weights if matrix is not None and matrix.ndim == 2]
    gigabytes = sum(matrix.nbytes for matrix in matrices) / 1e9
    ways, times = make_ways(matrices), dict[str, list[float]]()
    for _ in range(args.rounds):
        for name, way in ways.items():
            way()
            for _ in range(7):
                began = time.perf_counter()
                way()
                times.setdefault(name, []).append(time.perf_counter() - began)
            time.sleep(0.1)  # BLAS's threads spin for a while
    times["waking a thread"] = [wake() for _ in range(1000)]
    same = fast.own_threads()(count_same_processor)(matrices, 10) if sys.platform == "linux" else "not measured"
    blas = [library["architecture"] for library in threadpool_info() if library["user_api"] == "blas"]
    about = {
        "processor": processor(),
        "kernels": ", ".join(blas),
        "threads": fast.THREADS,
        "size": args.size,
        "busy": args.busy,
        "same": same,
    }
    rows = {name: [round(1000 * q, 3) for q in statistics.quantiles(found, n=4)] for name, found in times.items()}
    if args.json:
        print(json.dumps(about | {"milliseconds": rows}, indent=1))
        return
    print("| way | ms | quartiles | GB/s |\n| --- | --- | --- | --- |")
    for name, (low, middle, high) in rows.items():
        rate = "" if name.startswith("waking") else f"{1000 * gigabytes / middle:.1f}"
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {rate} |")
    print("\n{processor}; kernels {kernels}; {threads} threads; a layer of the {size}".format(**about))
    print(f"own threads: {same} products were computed in turn on one processor")


if __name__ == "__main__":
    main()
