"""Measure how fast a quantised GGUF file is read as float32, in bytes of the file per second on one processor.

The result is in docs/how-to/gguf.md.

    python benchmarks/gguf_speed.py [Q8_0 ...]

A matrix of the 9B's feed-forward layer, with random blocks, is read repeatedly from the system's cache.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from refgemma.gguf import FORMATS, Gguf, GgufTensor
from refgemma.weights.gguf_weights import locate

SHAPE = (14336, 3584)  # up_proj


def measure(kind: str, folder: Path) -> dict[str, float | str]:
    _, numbers, size = next(known for known in FORMATS.values() if known[0] == kind)
    blocks = np.random.default_rng(0).integers(0, 256, (SHAPE[0] * SHAPE[1] // numbers, size), np.uint8)
    scales = np.array([0.01, 0.01], np.float16).view(np.uint8)
    blocks[:, :4] = blocks[:, -4:] = scales  # wherever the format has its scales
    (folder / kind).write_bytes(blocks.tobytes())
    tensor = GgufTensor("blk.0.ffn_up.weight", kind, SHAPE, 0, blocks.nbytes)
    stored = locate(Gguf(folder / kind, {}, {}, blocks.nbytes), tensor)
    seconds = []
    for _ in range(7):
        began = time.process_time()
        stored.read("float32")
        seconds.append(time.process_time() - began)
    best, usual = min(seconds), sorted(seconds)[len(seconds) // 2]
    return {"format": kind, "GB_a_second": round(blocks.nbytes / best / 1e9, 2),
            "median_GB_a_second": round(blocks.nbytes / usual / 1e9, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=["Q8_0"], metavar="FORMAT")
    with tempfile.TemporaryDirectory() as folder:
        for kind in parser.parse_args().formats:
            print(json.dumps(measure(kind, Path(folder))))


if __name__ == "__main__":
    main()
