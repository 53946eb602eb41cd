"""Test under load, in one process, in threads and in processes: `python benchmarks/load.py [PART ...]`.

Each part prints a row of the table in docs/reliability.md. The exit code is 1 if a part fails.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import refgemma
from refgemma import fast
from refgemma.trace.names import run_in_order, save_trace

ROW = [2, *range(300, 315)]
MEGABYTE = 2**20


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def hash_logits(ids: list[int] = ROW) -> str:
    """Return a hash of the logits of the tiny model."""
    tiny = refgemma.load("tiny")
    return hashlib.sha256(fast.next_token_logits([ids], tiny.weights, tiny.config)[0].tobytes()).hexdigest()[:16]


def run_forwards(count: int = 2000) -> tuple[bool, str]:
    """Run the model repeatedly; memory must grow by at most the size of NumPy's own caches."""
    tiny, early = refgemma.load("tiny"), 0
    for number in range(count):
        refgemma.forward([ROW], tiny.weights, tiny.config)
        if number == count // 10:
            early = resident_bytes()
    grown = (resident_bytes() - early) / MEGABYTE
    return grown < 5, f"{count} forwards of {len(ROW)} tokens: {grown:+.1f} MiB after the first {count // 10}"


def run_threads(threads: int = 8, count: int = 160) -> tuple[bool, str]:
    """Run the model in threads; all results have the same bytes."""
    alone = hash_logits()
    with ThreadPoolExecutor(threads) as pool:
        found = set(pool.map(lambda _: hash_logits(), range(count)))
    return found == {alone}, f"{count} forwards in {threads} threads: {len(found)} different results"


def run_processes() -> tuple[bool, str]:
    """Run the model in processes started in every way; the results have the same bytes."""
    found = {hash_logits()}
    for way in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(way).Pool(2) as pool:
            found |= set(pool.map(hash_logits, [ROW] * 4))
    return len(found) == 1, f"fork, spawn, forkserver, two processes each: {len(found)} different results"


def run_tokens(count: int = 5000) -> tuple[bool, str]:
    """Decode many tokens, with a warning beyond the model's maximum; every token is valid."""
    tiny = refgemma.load("tiny")
    model = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    began, before = time.perf_counter(), resident_bytes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = np.asarray(model.generate(np.array([ROW]), max_new_tokens=count, min_new_tokens=count, do_sample=False))
    seconds = time.perf_counter() - began
    good = made.shape == (1, len(ROW) + count) and 0 <= made.min() and made.max() < tiny.config.vocab_size
    beyond = len(ROW) + count > tiny.config.max_position_embeddings
    said = any(str(tiny.config.max_position_embeddings) in str(warning.message) for warning in caught)
    grown = (resident_bytes() - before) / MEGABYTE
    figures = f"{count} tokens in {seconds:.0f} s, {grown:.0f} MiB"
    positions = f"{tiny.config.max_position_embeddings} positions, {'warned of' if said else 'no warning'}"
    return good and said == beyond, f"{figures}; {positions}"


def run_chat(turns: int = 40) -> tuple[bool, str]:
    """Talk until the model has no positions left: one line says so, and the exit code is not that of a crash."""
    line = "once upon a time there was a king who had a daughter " * 12
    command = [sys.executable, "-m", "refgemma", "chat", "--max-new-tokens", "4", "--json"]
    done = subprocess.run(command, input=(line + "\n") * turns, capture_output=True, text=True, check=False)
    answers, lines = done.stdout.count("\n"), done.stderr.splitlines()
    good = done.returncode in (0, 2) and answers < turns and len(lines) == 1 and "position" in lines[0]
    said = f"exit code {done.returncode}, {lines[0][:120]!r}" if lines else f"exit code {done.returncode}"
    return good, f"chat of {turns} turns: {answers} answers, then {said}"


def run_trace(tokens: int = 1024) -> tuple[bool, str]:
    """Check a long trace with all tensors whose size is not quadratic in the number of tokens."""
    model = refgemma.load("conformance")
    ids = np.array([[2, *np.random.default_rng(0).integers(5, model.config.vocab_size, tokens - 1).tolist()]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.safetensors"
        run = (pair for pair in run_in_order(ids, model.weights, model.config) if pair[1].shape[-1] != tokens)
        save_trace([("input_ids", ids), *run], path, {"dtype": "float32"})
        began, size = time.perf_counter(), path.stat().st_size
        done = subprocess.run(
            [sys.executable, "-m", "refgemma", "check", str(path), "--model", "conformance", "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    verdict = json.loads(done.stdout)["verdict"] if done.stdout else done.stderr
    figures = f"trace of {tokens} tokens, {size / MEGABYTE:.0f} MiB, checked in {seconds:.0f} s"
    return verdict == "conforms", f"{figures}, at most {peak:.0f} MiB: {verdict}"


def run_sweep(jobs: int = 500) -> tuple[bool, str]:
    """Sweep many jobs, each with another configuration; a second run computes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        trace, table = Path(folder) / "run.safetensors", Path(folder) / "jobs.jsonl"
        refgemma_command = [sys.executable, "-m", "refgemma"]
        traced = ["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)]
        subprocess.run([*refgemma_command, *traced], check=True, capture_output=True)
        job = {"trace": str(trace), "model": "conformance"}
        lines = [json.dumps(job | {"config": {"sliding_window": 8 + n}}) for n in range(jobs)]
        table.write_text("\n".join(lines) + "\n")
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            done = subprocess.run(
                [*refgemma_command, "sweep", str(table), "--json"], capture_output=True, text=True, check=False
            )
            seconds.append(time.perf_counter() - began)
    counts = json.loads(done.stdout)["counts"] if done.stdout else {done.stderr: 1}
    return counts == {"conforms": jobs}, f"{jobs} jobs in {seconds[0]:.0f} s, again in {seconds[1]:.0f} s: {counts}"


PARTS: dict[str, Callable[[], tuple[bool, str]]] = {
    "forwards": run_forwards, "threads": run_threads, "processes": run_processes, "tokens": run_tokens,
    "chat": run_chat, "trace": run_trace, "sweep": run_sweep,
}  # fmt: skip


def main() -> int:
    """Run the parts and print their rows."""
    parser = argparse.ArgumentParser(description="much work in one process, in many threads and in many processes")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown parts {unknown}")
    print("| part | figures | holds |\n| --- | --- | --- |", flush=True)
    good = True
    for part in parts:
        holds, figures = PARTS[part]()
        good &= holds
        print(f"| {part} | {figures} | {'yes' if holds else 'NO'} |", flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
