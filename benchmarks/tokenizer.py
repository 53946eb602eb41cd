"""Compare with the tokenizers library on 1 MB of text: python benchmarks/tokenizer.py TOKENIZER_JSON [ROUNDS]

Both read the released tokenizer.json. Processes of the two alternate; each reports the best of three times, and the
ratio of each pair is the result. Run this with an interpreter that has tokenizers.
"""

import json
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def megabyte() -> str:
    """Return 1 MB of text, from Python's own modules."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(path.read_text("utf-8", "replace") for path in files)[: 2**20]


def best(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(library: str, file: str) -> None:
    text = megabyte()
    tokenizer: Any
    start = time.perf_counter()
    if library == "refgemma":
        from refgemma.tokenizer.tokenizer import Tokenizer

        tokenizer = Tokenizer(file)
        ids, encode = tokenizer.encode(text), lambda: tokenizer.encode(text)
    else:
        from tokenizers import Tokenizer as Reference

        tokenizer = Reference.from_file(file)
        ids, encode = tokenizer.encode(text).ids, lambda: tokenizer.encode(text).ids
    load = time.perf_counter() - start
    print(json.dumps({"load": load, "encode": best(encode), "decode": best(lambda: tokenizer.decode(ids))}))


def main() -> None:
    file, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    ratios: dict[str, list[float]] = {"load": [], "encode": [], "decode": []}
    for _ in range(rounds):
        ours, theirs = (
            json.loads(
                subprocess.run([sys.executable, __file__, file, library], check=True, capture_output=True).stdout
            )
            for library in ("refgemma", "tokenizers")
        )
        for name, found in ratios.items():
            found.append(ours[name] / theirs[name])
            print(f"{name:6}  refgemma {ours[name]:.3f} s   tokenizers {theirs[name]:.3f} s", flush=True)
    for name, found in ratios.items():
        print(f"{name:6}  ratio {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    if len(sys.argv) > 2 and not sys.argv[2].isdigit():
        measure(sys.argv[2], sys.argv[1])
    else:
        main()
