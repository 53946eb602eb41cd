"""Measure the tiny model: seconds from the start of a process to the first token, then tokens per second.

    python benchmarks/decode.py [--rounds 5] [--json]

Each round is a separate process, started as a user would. The medians and the ranges are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

GOALS = {"seconds to the first token": 1.5, "tokens a second": 150.0}

FIRST = ["-m", "refgemma", "generate", "Once upon a time", "--max-new-tokens", "1"]
# 250 new tokens exceed the window of 64, but not the maximum of 320 tokens. There are no stop ids.
STEADY = """
import time, refgemma
tiny = refgemma.load("tiny")
tokens = refgemma.generate(tiny.tokenizer.encode("Once upon a time"), tiny.weights, tiny.config, 251, stop_ids=())
next(tokens)
began = time.perf_counter()
count = sum(1 for _ in tokens)
print(count / (time.perf_counter() - began))
"""


def seconds_to_first_token() -> float:
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *FIRST], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(len("Once upon a time") + 1)  # the prompt is printed first, then the text of the first token
    elapsed = time.perf_counter() - began
    process.communicate()
    return elapsed


def tokens_per_second() -> float:
    return float(subprocess.run([sys.executable, "-c", STEADY], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rounds = [(seconds_to_first_token(), tokens_per_second()) for _ in range(args.rounds)]
    rows = []
    for (work, goal), values in zip(GOALS.items(), zip(*rounds, strict=True), strict=True):
        median = statistics.median(values)
        met = median <= goal if "seconds" in work else median >= goal
        spread = [round(min(values), 2), round(max(values), 2)]
        rows.append({"work": work, "median": round(median, 2), "spread": spread, "goal": goal, "met": met})
    if args.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    for row in rows:
        verdict = f"goal {row['goal']:g}: {'met' if row['met'] else 'MISSED'}"
        print(f"{row['work']:28s} {row['median']:8.2f}  {row['spread']}  {verdict}")


if __name__ == "__main__":
    main()
