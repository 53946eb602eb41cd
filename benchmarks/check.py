"""Measure time and memory of `refgemma check` for a full trace of the tiny model.

    python benchmarks/check.py                64 tokens, three times, each in its own process
    python benchmarks/check.py --tokens 200

The peak is the largest resident set of the process, including Python, NumPy and the model. The load average is printed
too, because a time measured on a busy machine says little.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def measured(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return wall-clock seconds, processor seconds and the exit code."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    ids = ",".join(str(n) for n in [2, *np.random.default_rng(0).integers(4, 500, args.tokens - 1)])
    refgemma = [sys.executable, "-m", "refgemma"]
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder) / "run.safetensors")
        subprocess.run([*refgemma, "trace", "--ids", ids, "-o", trace], stdout=subprocess.DEVNULL, check=True)
        for _ in range(args.times):
            seconds, processor, code = measured([*refgemma, "check", trace])
            print(f"{args.tokens} tokens, exit code {code}: {seconds:.1f} s, {processor:.1f} s of processor time; "
                  f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"peak memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
