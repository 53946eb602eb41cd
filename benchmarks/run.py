"""How fast refgemma is beside transformers (eager, on a CPU), as ratios of times, and what of the machine it uses.

    python benchmarks/run.py [--rounds 5] [--only 9b] [--json] [--history FILE] [--picture FILE]
    python benchmarks/run.py --again FILE       the last report of a history, measuring nothing

needs the extra `record`. Every engine runs in a process of its own (`engines.py`), the engines of a round one after
the other, so that a machine that slows down slows all. A ratio is one of medians over rounds, its spread that of the
ratios of single rounds. A round in which the machine's own matrix product changed by more than 1.5 times is repeated.
After every round the table so far is printed; interrupted (SIGINT, SIGTERM), the command reports the rounds so far.

Beside a ratio stands the least that this machine allows: the operations at the rate of NumPy's own product of square
matrices, and of a prompt every `tanh` and `exp` in threads of their own, or the bytes at the rate of reading, over the
time of transformers. Nothing made of NumPy's products gets further below it than these rates vary. Of weights in
bfloat16 it is the time that NumPy takes to read and widen them, before a single product.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from engines import layer_bytes, layer_flops

from refgemma.config import Gemma2Config

HERE = Path(__file__).parent
UNSTEADY = 1.5  # times that the machine's rate may change within a round
MOST_REPEATS = 3  # rounds thrown away before an unsteady one is kept, and said to be

GENERATE = ["-m", "refgemma", "generate", "Once upon a time", "--max-new-tokens", "200", "--json"]
GENERATE_TRANSFORMERS = """
import sys, torch, transformers
from refgemma.hub import find_model
folder = find_model("tiny")
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(len(model.generate(**inputs, max_new_tokens=200, do_sample=False)[0]))
"""


@dataclass(frozen=True)
class Row:
    """A line of the table: the ratio of two measurements, or one that is a share already."""

    work: str
    process: str  # arguments of engines.py after the engine
    name: str  # of the measurement
    goal: float
    engine: str = "fast"
    against: str | None = "transformers"
    part: str | None = None  # a measurement of the engine's that is a part of the work which nothing can spare


def layer_rows() -> Iterable[Row]:
    """What the goals are about, one layer."""
    prefill = {"9b": {128: 1.05, 512: 1.0, 2048: 0.7, 4200: 0.5}, "27b": {128: 1.15, 512: 0.98, 2048: 0.8}}
    decode = {"9b": {512: 0.85, 4096: 0.38}, "27b": {512: 1.0, 4096: 0.7}}
    for size in ("9b", "27b"):
        for kind, goals in (("prefill", prefill[size]), ("decode", decode[size])):
            for count, goal in goals.items():
                what = f"{kind} {count}"
                part = f"functions {count}" if kind == "prefill" else None
                yield Row(f"{size} layer, {what}", f"{kind} {size}", what, goal, part=part)
                if kind == "decode" or count <= 2048:
                    yield Row(f"{size} layer, {what}, definition", f"{kind} {size}", what, 1.4, "definition")
        for count in (n for n in prefill[size] if n >= 512):
            name = f"sgemm share {count}"
            yield Row(f"{size} prefill {count}, share of sgemm", f"prefill {size}", name, 0.88, against=None)
        for count in decode[size]:
            name = f"read share {count}"
            yield Row(f"{size} decode {count}, share of reading", f"decode {size}", name, 0.9, against=None)


ROWS = [
    *layer_rows(),
    Row("9b layer from bfloat16, decode 512, to bfloat16", "bf16", "decode bf16", 1.3, part="widen bf16"),
    Row("generate 200 tokens of tiny, with the start", "generate", "generate", 0.3),
    Row("9b layer, 4200 tokens, extra memory", "memory", "memory 4200", 0.12),
    Row("9b synthetic, 64 tokens, to transformers' layers", "depth", "full depth", 2.5),
]


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(engine: str, process: str) -> dict[str, float]:
    """What a process of one engine measures."""
    if process == "generate":
        began = time.perf_counter()
        command = GENERATE if engine == "fast" else ["-c", GENERATE_TRANSFORMERS]
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return {"generate": time.perf_counter() - began}
    what, *size = process.split()
    command = [sys.executable, str(HERE / "engines.py"), what, engine, *size]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return found


def machine() -> dict[str, float]:
    """GF/s of a matrix product and GB/s of reading, in NumPy, in a process of its own."""
    return measured("numpy", "machine")


def processes(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Engine and arguments of every process of a round, those of one kind beside each other."""
    wanted = [(engine, row.process) for row in rows for engine in (row.against, row.engine) if engine]
    return sorted(set(wanted), key=lambda pair: (pair[1], pair[0]))


def one_round(rows: list[Row]) -> tuple[dict[tuple[str, str, str], float], list[dict[str, float]]]:
    """All measurements by engine, process and name; and the machine's rates before each kind of process and after."""
    found, rates = {}, []
    for kind, pairs in groupby(processes(rows), key=itemgetter(1)):
        rates.append(machine())
        for engine, process in pairs:
            for name, value in measured(engine, process).items():
                found[engine, process, name] = value
        print(f"{kind}: {rates[-1]['sgemm']:.0f} GF/s before", file=sys.stderr)
    return found, [*rates, machine()]


def steady(rates: list[dict[str, float]]) -> bool:
    """Whether the machine stayed the same."""
    products = [rate["sgemm"] for rate in rates]
    return max(products) <= UNSTEADY * min(products)


def result(row: Row, rounds: list[dict[tuple[str, str, str], float]]) -> dict[str, object]:
    """The ratio, its spread, and whether the goal is met: a share is to be at least the goal, a ratio at most."""

    def values(engine: str, name: str = row.name) -> list[float]:
        return [found[engine, row.process, name] for found in rounds]

    own = values(row.engine)
    other = values(row.against) if row.against else [1.0] * len(own)
    ratio = statistics.median(own) / statistics.median(other)
    each = [a / b for a, b in zip(own, other, strict=True)]
    met = ratio <= row.goal if row.against else ratio >= row.goal
    spread = [round(min(each), 3), round(max(each), 3)]
    medians = {name: statistics.median(values(name)) for name in (row.engine, row.against) if name}
    if row.part:
        medians[row.part] = statistics.median(values(row.engine, row.part))
    return {
        "work": row.work, "ratio": round(ratio, 3), "spread": spread, "goal": row.goal, "met": met, "medians": medians
    }  # fmt: skip


def least(row: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """The ratio that the machine's own rates allow, of rows about a layer of `fast` and transformers; else ``None``.

    Of weights in bfloat16, which NumPy has to widen before it multiplies: what it takes to widen them.
    """
    if "widen bf16" in row["medians"]:
        return round(row["medians"]["widen bf16"] / row["medians"]["transformers"], 3)
    found = re.fullmatch(r"(\w+) layer, (prefill|decode) (\d+)", row["work"])
    if not found:
        return None
    config, count = Gemma2Config.preset(found[1]), int(found[3])
    if found[2] == "prefill":
        functions = row["medians"].get(f"functions {count}", 0.0)
        seconds = layer_flops(config, count) / report["sgemm_gflops"] / 1e9 + functions
    else:
        seconds = layer_bytes(config, count) / report["read_gb_per_s"] / 1e9
    return round(seconds / row["medians"]["transformers"], 3)


# --- showing ----------------------------------------------------------------------------------------------------------


def picture(rows: list[Mapping[str, object]], file: str) -> None:
    """Ratios and goals as bars; an SVG keeps its words as text, and is the same file for the same rows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "speed"}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.3 * len(rows) + 1), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row["ratio"] for row in rows], color=["#4c78a8" if row["met"] else "#e45756" for row in rows])
    axes.plot([row["goal"] for row in rows], places, "k|", markersize=12, label="goal")
    axes.set_yticks(places, [str(row["work"]) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("NumPy / transformers; or share of the machine's own rate")
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.endswith(".svg") else None)


def table(report: Mapping[str, Any]) -> str:
    """The report as a table in Markdown."""
    lines = ["| work | ratio | spread | goal | met | least |", "| --- | --- | --- | --- | --- | --- |"]
    for row in report["rows"]:
        low, high = row["spread"]
        met, limit = "yes" if row["met"] else "no", "" if row["least"] is None else f"{row['least']:.2f}"
        spread = f"{low:.2f} to {high:.2f}"
        lines.append(f"| {row['work']} | {row['ratio']:.2f} | {spread} | {row['goal']} | {met} | {limit} |")
    about = "{rounds} rounds ({thrown_away} thrown away), sgemm {sgemm_gflops} GF/s, reading {read_gb_per_s} GB/s"
    unsteady = "" if report["steady"] else "; no round was steady: the machine's matrix product changed meanwhile"
    return "\n".join([*lines, "", about.format(**report) + unsteady])


def new_report(rows: list[Row], wanted: int) -> dict[str, Any]:
    """Measure until so many rounds were steady, or until interrupted; without a steady round, report the others."""
    rounds: list[tuple[dict[tuple[str, str, str], float], list[dict[str, float]]]] = []
    report: dict[str, Any] = {}
    try:
        while sum(steady(rates) for _, rates in rounds) < wanted and len(rounds) < wanted + MOST_REPEATS:
            rounds.append(one_round(rows))
            report = summarize(rows, rounds)
            print(f"\nafter {len(rounds)} rounds\n{table(report)}\n", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not rounds:
            raise
    return report


def summarize(
    rows: list[Row], rounds: list[tuple[dict[tuple[str, str, str], float], list[dict[str, float]]]]
) -> dict[str, Any]:
    """Return the report of the steady rounds; of all of them, marked as unsteady, if none was steady."""
    kept = [(found, rates) for found, rates in rounds if steady(rates)]
    thrown = len(rounds) - len(kept) if kept else 0
    of_rounds = kept or rounds
    rates = [rate for _, of_round in of_rounds for rate in of_round]
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "rounds": len(of_rounds),
        "thrown_away": thrown,
        "steady": bool(kept),
        "sgemm_gflops": round(statistics.median(rate["sgemm"] for rate in rates), 1),
        "read_gb_per_s": round(statistics.median(rate["read"] for rate in rates), 1),
        "rows": [result(row, [found for found, _ in of_rounds]) for row in rows],
    }
    report["rows"] = [row | {"least": least(row, report)} for row in report["rows"]]
    return report


def last_report(file: str) -> dict[str, Any]:
    """The last line of a history."""
    report: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[-1])
    for row in report["rows"]:
        least(row, report)  # what is missing is missed here
    return report


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--history", metavar="FILE", help="add a line to this file (benchmarks/history.jsonl)")
    parser.add_argument("--again", metavar="FILE", help="show the last line of such a file")
    parser.add_argument("--picture", metavar="FILE")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background a shell makes its commands ignore SIGINT
        signal.signal(number, interrupt)
    rows = [row for row in ROWS if args.only in row.work]
    if not rows or args.rounds < 1:
        parser.error(f"--only {args.only!r}: no row is called so" if not rows else "--rounds must be at least 1")
    if args.picture:
        import matplotlib.pyplot  # noqa: F401  a missing package is said before the measuring, not after it
    if args.again:
        try:
            report = last_report(args.again)
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"--again {args.again}: no history can be read: {error!r}")
    else:
        report = new_report(rows, args.rounds)
    if args.history:
        with open(args.history, "a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
    report["rows"] = [row | {"least": least(row, report)} for row in report["rows"] if args.only in row["work"]]
    if args.picture:
        picture(report["rows"], args.picture)
    print(json.dumps(report, indent=1) if args.json else table(report))


if __name__ == "__main__":
    main()
