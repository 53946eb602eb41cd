"""Compare the speed of refgemma with that of transformers (eager, on a CPU), as ratios of times.

    python benchmarks/run.py [--rounds 5] [--only 9b] [--json] [--history FILE] [--picture FILE]
    python benchmarks/run.py --quick            rank fast, definition and transformers in about three minutes
    python benchmarks/run.py --again FILE       show the newest measurements for each kind of processor

The extra `record` is needed. Each engine runs in a separate process (`engines.py`), one after the other. Before and
after each process another one measures the rates of the machine: NumPy's product of two square matrices, and reading
from memory. A time is multiplied by the rate beside it and divided by the median of all rates. So an engine that ran
while the machine was slow is not blamed for that. A ratio is the ratio of two medians over rounds; the spread is the
range of the ratios of single rounds. A round is called unsteady if the product's rate changed by more than 1.5 times;
it is kept and counted. The table is printed after each round, and at SIGINT or SIGTERM with the rounds so far.

*Least* is the smallest ratio that this machine allows. For a prompt it is the time of the layer's multiplications at
the rate of the square product, plus the time of all `tanh` and `exp` in threads. For one token it is the time of
reading the layer. For weights in bfloat16 it is the time of reading these and widening them, without any product.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from engines import AVX512, layer_bytes, layer_flops, processor

from refgemma.config import Gemma2Config

HERE = Path(__file__).parent
UNSTEADY = 1.5  # times that the product's rate may change within a steady round
RATE = {"prefill": "sgemm", "depth": "sgemm", "decode": "read", "bf16": "read"}  # what limits each kind of work
QUICK = {"prefill": (128, 512), "decode": (512, 4096)}

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
    """A line of the table: the ratio of two measurements, or one measurement that is a share already."""

    work: str
    process: str  # arguments of engines.py after the engine
    name: str  # of the measurement
    goal: float
    engine: str = "fast"
    against: str | None = "transformers"
    part: str | None = None  # a measurement of the same engine: a part of the work that cannot be left out


def layer_rows(avx512: bool) -> Iterable[Row]:
    """Return the rows about one layer; the goals of prompts depend on the processor, because PyTorch's rate does."""
    goals: dict[str, dict[str, dict[int, float]]] = {
        "9b": {"prefill": {128: 1.05, 512: 1.0, 2048: 0.7, 4200: 0.5}, "decode": {512: 0.95, 4096: 0.45}},
        "27b": {"prefill": {128: 1.15, 512: 0.98, 2048: 0.8}, "decode": {512: 0.95, 4096: 0.6}},
    }
    if avx512:
        goals["9b"]["prefill"] = {128: 0.9, 512: 0.95, 2048: 0.75, 4200: 0.65}
        goals["27b"]["prefill"] = {128: 0.9, 512: 0.95, 2048: 0.75}
    for size, kinds in goals.items():
        for kind, counts in kinds.items():
            for count, goal in counts.items():
                what, process = f"{kind} {count}", f"{kind} {size}"
                part = f"functions {count}" if kind == "prefill" else None
                yield Row(f"{size} layer, {what}", process, what, goal, part=part)
                if count <= 2048 or kind == "decode":
                    yield Row(f"{size} layer, {what}, definition", process, what, 1.4, "definition")
                    yield Row(f"{size} layer, {what}, fast to definition", process, what, 1.03, against="definition")
        for count in (n for n in kinds["prefill"] if n >= 512):
            name = f"sgemm share {count}"
            yield Row(f"{size} prefill {count}, share of sgemm", f"prefill {size}", name, 0.88, against=None)
        for count in kinds["decode"]:
            name = f"read share {count}"
            yield Row(f"{size} decode {count}, share of reading", f"decode {size}", name, 0.85, against=None)


def all_rows(avx512: bool = AVX512) -> list[Row]:
    """Return the table's rows, with the goals for a processor with or without AVX-512."""
    return [
        *layer_rows(avx512),
        Row("9b layer from bfloat16, decode 512, to bfloat16", "bf16", "decode bf16", 1.5, part="widen bf16"),
        Row("generate 200 tokens of tiny, with the start", "generate", "generate", 0.3),
        Row("9b layer, 4200 tokens, extra memory", "memory", "memory 4200", 0.12),
        Row("9b synthetic, 64 tokens, to transformers' layers", "depth", "full depth", 2.5),
    ]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(engine: str, process: str) -> dict[str, float]:
    """Return the measurements of one process of an engine."""
    if process == "generate":
        began = time.perf_counter()
        command = GENERATE if engine == "fast" else ["-c", GENERATE_TRANSFORMERS]
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return {"generate": time.perf_counter() - began}
    what, *rest = process.split()
    command = [sys.executable, str(HERE / "engines.py"), what, engine, *rest]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return found


@dataclass
class Round:
    """The measurements of a round by engine, process and name; and the rates of the machine by kind."""

    found: dict[tuple[str, str, str], float] = field(default_factory=dict)
    beside: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # the mean rates of a process
    rates: list[dict[str, float]] = field(default_factory=list)

    @property
    def steady(self) -> bool:
        """Whether the rate of the machine's product stayed about the same."""
        products = [rate["sgemm"] for rate in self.rates]
        return max(products) <= UNSTEADY * min(products)

    def run(self, rows: Iterable[Row]) -> None:
        """Run all processes once, those of one kind beside each other, with the rates of the machine in between."""
        wanted = {(engine, row.process) for row in rows for engine in (row.against, row.engine) if engine}
        self.rates.append(measure("numpy", "machine"))
        for engine, process in sorted(wanted, key=lambda pair: (pair[1], pair[0])):
            for name, value in measure(engine, process).items():
                self.found[engine, process, name] = value
            self.rates.append(measure("numpy", "machine"))
            self.beside[engine, process] = {k: (self.rates[-2][k] + self.rates[-1][k]) / 2 for k in self.rates[-1]}
            rate = self.rates[-1]
            print(f"{engine} {process}: {rate['sgemm']:.0f} GF/s, {rate['read']:.1f} GB/s", file=sys.stderr, flush=True)


def summarize(rows: Iterable[Row], rounds: list[Round]) -> dict[str, Any]:
    """Return the report of some rounds; the last one may be incomplete."""
    rates = [rate for one in rounds for rate in one.rates]
    typical = {kind: statistics.median(rate[kind] for rate in rates) for kind in ("sgemm", "read")}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "rounds": len(rounds),
        "unsteady": sum(not one.steady for one in rounds),
        "sgemm_gflops": round(typical["sgemm"], 1),
        "read_gb_per_s": round(typical["read"], 1),
    }
    results = (result(row, rounds, typical) for row in rows)
    report["rows"] = [row | {"least": least(row, report)} for row in results if row]
    return report


def result(row: Row, rounds: list[Round], typical: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the ratio, its spread, and whether the goal is met: a share at least the goal, a ratio at most.

    ``None`` means that no round has measured the row yet.
    """

    def values(engine: str, name: str = row.name) -> list[float]:
        """Return the measurements of all rounds; times are scaled by the rate beside them."""
        kind = RATE.get(row.process.split()[0]) if row.against else None
        found = []
        for one in rounds:
            if (engine, row.process, name) in one.found and (engine, row.process) in one.beside:
                scale = one.beside[engine, row.process][kind] / typical[kind] if kind else 1.0
                found.append(one.found[engine, row.process, name] * scale)
        return found

    own, other = values(row.engine), values(row.against) if row.against else [1.0] * len(rounds)
    each = [a / b for a, b in zip(own, other, strict=False)]  # an interrupted round may have only one of them
    if not each:
        return None
    ratio = statistics.median(own[: len(each)]) / statistics.median(other[: len(each)])
    met = ratio <= row.goal if row.against else ratio >= row.goal
    medians = {name: statistics.median(values(name)) for name in (row.engine, row.against) if name}
    if row.part:
        medians[row.part] = statistics.median(values(row.engine, row.part))
    spread = [round(min(each), 3), round(max(each), 3)]
    return {
        "work": row.work, "ratio": round(ratio, 3), "spread": spread, "goal": row.goal, "met": met, "medians": medians
    }  # fmt: skip


def least(row: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """Return the smallest ratio that the machine's rates allow, for rows that compare `fast` and transformers."""
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


def new_report(rows: list[Row], wanted: int) -> dict[str, Any]:
    """Measure so many rounds, or until interrupted."""
    rounds: list[Round] = []
    try:
        for _ in range(wanted):
            rounds.append(Round())
            rounds[-1].run(rows)
            print(f"\nafter {len(rounds)} rounds\n{table(summarize(rows, rounds))}\n", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not any(one.beside for one in rounds):
            raise
        print("interrupted: the last round is incomplete", file=sys.stderr)
    return summarize(rows, [one for one in rounds if one.rates])


def quick_rows(size: str) -> list[Row]:
    """Return the rows of the quick mode: the common shapes of one layer, each compared with the definition's peers."""
    found = []
    for kind, counts in QUICK.items():
        process = " ".join([kind, size, *map(str, counts)])
        for count in counts:
            for engine in ("fast", "definition"):
                found.append(Row(f"{size} layer, {kind} {count}, {engine}", process, f"{kind} {count}", 1.0, engine))
    return found


# --- showing ----------------------------------------------------------------------------------------------------------


def ranking(report: Mapping[str, Any]) -> str:
    """Return the engines of each work in order, with their times and the ratio to the first."""
    times: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        times.setdefault(row["work"].rpartition(", ")[0], {}).update(row["medians"])
    lines = ["| work | first | second | third |", "| --- | --- | --- | --- |"]
    for work, engines in times.items():
        order = sorted(engines.items(), key=lambda pair: pair[1])
        cells = [f"{name} {1000 * value:.1f} ms ({value / order[0][1]:.2f})" for name, value in order]
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows: list[Mapping[str, object]], file: str) -> None:
    """Draw ratios and shares in two panels; an SVG keeps its words as text, and is the same file for the same rows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "speed"}
    from matplotlib import pyplot as plt

    shares = [row for row in rows if "share" in str(row["work"])]
    panels = [
        ("time of refgemma / time of transformers: lower is better", [row for row in rows if row not in shares]),
        ("share of the machine's own rate: higher is better", shares),
    ]
    panels = [(title, some) for title, some in panels if some]
    figure, all_axes = plt.subplots(
        len(panels), figsize=(9, 0.3 * len(rows) + 1.5), layout="constrained", squeeze=False,
        height_ratios=[len(some) + 1 for _, some in panels],
    )  # fmt: skip
    for axes, (title, some) in zip(all_axes[:, 0], panels, strict=True):
        places, colors = range(len(some)), ["#4c78a8" if row["met"] else "#e45756" for row in some]
        axes.barh(places, [row["ratio"] for row in some], color=colors)
        axes.plot([row["goal"] for row in some], places, "k|", markersize=12, label="goal")
        axes.set_yticks(places, [str(row["work"]) for row in some], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(title)
        axes.legend()
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.endswith(".svg") else None)


def table(report: Mapping[str, Any]) -> str:
    """Return the report as a table in Markdown."""
    lines = ["| work | ratio | spread | goal | met | least |", "| --- | --- | --- | --- | --- | --- |"]
    for row in report["rows"]:
        low, high = row["spread"]
        met, limit = "yes" if row["met"] else "no", "" if row["least"] is None else f"{row['least']:.2f}"
        spread = f"{low:.2f} to {high:.2f}"
        lines.append(f"| {row['work']} | {row['ratio']:.2f} | {spread} | {row['goal']} | {met} | {limit} |")
    about = "{processor}: {rounds} rounds ({unsteady} unsteady), {sgemm_gflops} GF/s, reading {read_gb_per_s} GB/s"
    return "\n".join([*lines, "", about.format(**report)])


def side_by_side(reports: list[Mapping[str, Any]]) -> str:
    """Return the last report of each kind of processor in one table; a goal stands beside its ratio."""
    names = [str(report["processor"]) for report in reports]
    lines = [f"| work | {' | '.join(f'{name} | goal' for name in names)} |", "| --- |" + " --- | --- |" * len(names)]
    for work in dict.fromkeys(row["work"] for report in reversed(reports) for row in report["rows"]):
        cells = [work]
        for report in reports:
            row = next((row for row in report["rows"] if row["work"] == work), None)
            cells += [f"{row['ratio']:.2f}", f"{row['goal']}{'' if row['met'] else ' (missed)'}"] if row else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def last_reports(file: str) -> list[dict[str, Any]]:
    """Return a report for each kind of processor: the newest measurement of each row, with the goal of today."""
    reports: dict[str, dict[str, Any]] = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        report: dict[str, Any] = json.loads(line)
        name = report["processor"]
        measured = {row["work"]: row | {"least": least(row, report)} for row in report["rows"]}
        reports[name] = report | {"rows": reports.pop(name, {"rows": {}})["rows"] | measured}
    for name, report in reports.items():
        rows = [(row, report["rows"].get(row.work)) for row in all_rows("with AVX" in name)]
        report["rows"] = [
            found | {"goal": row.goal, "met": found["ratio"] <= row.goal if row.against else found["ratio"] >= row.goal}
            for row, found in rows
            if found
        ]
    return list(reports.values())


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help="5; 1 with --quick")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument("--quick", nargs="?", const="9b", choices=("2b", "9b", "27b"), help="rank three engines")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--history", metavar="FILE", help="add a line to this file (benchmarks/history.jsonl)")
    parser.add_argument("--again", metavar="FILE", help="show the newest rows of such a file for each processor")
    parser.add_argument("--picture", metavar="FILE")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background a shell makes its commands ignore SIGINT
        signal.signal(number, interrupt)
    rows = [row for row in (quick_rows(args.quick) if args.quick else all_rows()) if args.only in row.work]
    rounds = args.rounds if args.rounds is not None else (1 if args.quick else 5)
    if not rows or rounds < 1:
        parser.error("--rounds must be at least 1" if rows else f"--only {args.only!r}: no row has this in its name")
    if args.picture:
        import matplotlib.pyplot  # noqa: F401  fail before the measurements, not after them
    if args.again:
        try:
            reports = last_reports(args.again)
            report = reports[-1]
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"--again {args.again}: cannot read a history: {error!r}")
    else:
        report = new_report(rows, rounds)
        reports = [report]
    if args.history:
        with open(args.history, "a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
    report["rows"] = [row for row in report["rows"] if args.only in row["work"]]
    if args.picture:
        picture(report["rows"], args.picture)
    if args.json:
        print(json.dumps(reports if args.again else report, indent=1))
    elif args.quick:
        print(ranking(report))
    else:
        print(table(report) if len(reports) == 1 else f"{table(report)}\n\n{side_by_side(reports)}")


if __name__ == "__main__":
    main()
