"""Compare time and memory of a training step of the tiny model with transformers, in alternating processes.

    python benchmarks/train.py [--rounds 5] [--json]        needs: pip install -e ".[record]"

A step takes 8 rows of 128 tokens in float32: forward (eager attention), backward, clipping, AdamW. Each process runs
steps of one engine only, because two engines in one process disturb each other's threads. Time is the median over the
steps after the first two. Memory is the peak of the process, and its increase over the memory before the first step.
Goals: at most 1.5 times the time and 1.2 times the memory of PyTorch.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS, TOKENS, STEPS, UNCOUNTED = 8, 128, 5, 2
ENGINES = ("refgemma", "recomputed", "transformers")
GOALS = {"seconds": 1.5, "peak_mb": 1.2, "step_mb": 1.2}


def refgemma_step(recompute: bool) -> Callable[[], object]:
    import refgemma
    from refgemma.training.run import TrainingArguments, first_state, train_step
    from refgemma.weights.parameters import named_weights

    tiny = refgemma.load("tiny")
    base = {name: np.array(rows[:]) for name, rows in named_weights(tiny.weights, tiny.config).items()}
    arguments = TrainingArguments(max_steps=100, weight_decay=0.1, gradient_checkpointing=recompute)
    state, rows = [first_state(base, tiny.config, arguments)], list(draw_rows())

    def step() -> None:
        state.append(train_step(state.pop(), rows, base, tiny.config, arguments))

    return step


def transformers_step() -> Callable[[], object]:
    import torch
    from transformers import Gemma2ForCausalLM

    from refgemma.hub import find_model

    model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), attn_implementation="eager", dtype=torch.float32)
    model.train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer, ids = torch.optim.AdamW(groups, lr=5e-5), torch.tensor(draw_rows())

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw_rows() -> Any:
    return np.random.default_rng(0).integers(8, 2048, (ROWS, TOKENS))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(engine: str) -> dict[str, float]:
    """Run steps in this process, and return time and memory."""
    step = transformers_step() if engine == "transformers" else refgemma_step(engine == "recomputed")
    before, times = peak_mb(), []
    for _ in range(UNCOUNTED + STEPS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(times[UNCOUNTED:]), "fastest": min(times), "peak_mb": peak_mb(),
        "step_mb": peak_mb() - before,
    }  # fmt: skip


def compare(rounds: int) -> list[dict[str, Any]]:
    """Measure every engine in its own process, in turn."""
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine in ENGINES:
            command = [sys.executable, __file__, "--engine", engine]
            found[engine].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    rows = []
    for engine in ENGINES:
        row: dict[str, Any] = {"engine": engine}
        for name in ("seconds", "fastest", "peak_mb", "step_mb"):
            row[name] = round(statistics.median(run[name] for run in found[engine]), 3)
            if name in GOALS:
                pairs = zip(found[engine], found["transformers"], strict=True)
                row[f"{name}_ratio"] = round(statistics.median(a[name] / b[name] for a, b in pairs), 2)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=ENGINES, help="measure one engine, in this process")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.engine:
        print(json.dumps(measure(args.engine)))
        return
    rows = compare(args.rounds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "goals": GOALS, "rows": rows}, indent=1))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
