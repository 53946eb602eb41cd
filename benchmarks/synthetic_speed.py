"""Measure how many synthetic float32 weights per second are made, for a whole model of a released size.

    python benchmarks/synthetic_speed.py 9b

The result is in docs/full-size.md. As in `refgemma.fast`, threads make a few rows at a time, which are then dropped.
"""

import argparse
import json
import math
import resource
import time

from refgemma.config import Gemma2Config
from refgemma.fast import THREADS, TILE, in_threads
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.synthetic import Synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("2b", "9b", "27b"))
    args = parser.parse_args()
    config, made, began = Gemma2Config.preset(args.size), 0, time.perf_counter()
    for name, shape in tensor_shapes(config).items():
        tensor, rows = Synthetic(name, shape, config), max(1, TILE // math.prod(shape[1:]))

        def fill(start: int, stop: int, tensor: Synthetic = tensor, rows: int = rows) -> None:
            for first in range(start, stop, rows):
                tensor[first : min(first + rows, stop)]

        in_threads(fill, shape[0])
        made += math.prod(shape)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    processor = used.ru_utime + used.ru_stime
    print(json.dumps({
        "weights": made,
        "threads": THREADS,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "billions_a_second": round(made / seconds / 1e9, 2),
        "billions_a_processor_second": round(made / processor / 1e9, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
