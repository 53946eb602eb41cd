"""Give hostile files and arguments to every command: `python -m tools.fuzz`.

A case is a folder of files (one of them damaged) and a command. The same seed gives the same cases. Each process runs
many cases one after another, and is killed if a case takes 20 s of processor time. A failing case is written to a file;
``--again FILE`` runs it once more. This needs Linux.
"""

import argparse
import base64
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .families import FAMILIES, Case, make_case
from .watch import Result, prepare, run_case

SECONDS = 20.0  # maximum processor time of a case
IDLE = 90.0  # maximum wall-clock time of a case, in case it waits for ever
ADDRESSES = 6 * 2**30  # address space of a process in bytes
FRESH = 300  # number of cases after which a process is replaced
KEPT = 3  # maximum number of files for failures of one kind in a family

Where = tuple[str, int]  # family and number of a case


def keep_case(folder: Path, case: Case, result: Result, where: Where, seed: int) -> Path:
    """Write a case to a file that `read_case` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{where[0]}-{seed}-{where[1]}.json"
    files = {name: base64.b64encode(content).decode() for name, content in case.files.items()}
    text = json.dumps({"result": asdict(result), "case": asdict(case) | {"files": files}}, indent=1)
    file.write_text(text)
    return file


def read_case(file: Path) -> Case:
    kept = json.loads(file.read_text())["case"]
    return Case(**kept | {"files": {name: base64.b64decode(content) for name, content in kept["files"].items()}})


def work(pipe: Connection, cases: Iterator[Where], seed: int, folder: str) -> None:
    """Run cases in this process; report each case before it runs, and its result afterwards."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    tempfile.tempdir = folder
    prepare()
    for family, number in cases:
        pipe.send(((family, number), None))
        pipe.send(((family, number), run_case(make_case(family, seed, number))))


@dataclass
class Worker:
    """A process that runs every `step`-th case, and its state."""

    families: list[str]
    seed: int
    first: int  # its first round; each round has one case of each family
    step: int  # distance of its rounds
    at: int = 0  # number of the next case
    where: Where | None = None  # the case that is running
    process: Any = None
    pipe: Any = None
    folder: str = ""
    begun: float = 0.0
    cpu: float = 0.0
    done: int = 0

    def cases(self) -> Iterator[Where]:
        """Yield the remaining cases of this process."""
        for number in itertools.count(self.at):
            turn, place = divmod(number, len(self.families))
            if turn % self.step == self.first:
                yield self.families[place], number

    def stop(self) -> None:
        """Kill the process, and remove the files of the running case."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the process, or restart it after the case at which it was killed."""
        self.stop()
        self.folder = tempfile.mkdtemp(prefix="refgemma-fuzz-")
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(theirs, self.cases(), self.seed, self.folder), daemon=True)
        with warnings.catch_warnings(
            action="ignore", category=DeprecationWarning
        ):  # BLAS has threads, which do no harm
            self.process.start()
        theirs.close()
        self.where, self.done, self.begun, self.cpu = None, 0, time.monotonic(), 0.0

    def used(self) -> float:
        """Return the processor time so far, in seconds."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return self.cpu
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hear(self) -> tuple[Where, Result] | None:
        """Return the result of a case that has ended, by itself or at a limit, or None."""
        try:
            while self.pipe.poll():
                where, result = self.pipe.recv()
                self.at = where[1]
                if result is None:
                    self.where, self.begun, self.cpu = where, time.monotonic(), self.used()
                else:
                    self.where, self.at, self.done = None, where[1] + 1, self.done + 1
                    return where, result
        except (EOFError, OSError):
            self.process.join()
            return self.end(f"the process ended with {self.process.exitcode}")
        if self.where and (self.used() - self.cpu > SECONDS or time.monotonic() - self.begun > IDLE):
            return self.end(f"has not ended after {SECONDS:.0f} s")
        return None

    def end(self, problem: str) -> tuple[Where, Result] | None:
        """Give up the running case; another process runs the next case."""
        self.process.kill()
        self.process.join()
        where = self.where
        if where is None or self.process.exitcode == 1:
            raise RuntimeError(f"the fuzzer itself failed at {where}")
        self.at = where[1] + 1
        self.start()
        return where, Result(problem, None)


@dataclass
class Row:
    """The results of a family's cases."""

    codes: Counter[int | None] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, 0)  # processor time in seconds, and the number of the case
    peak: int = 0


def run(families: list[str], seed: int, seconds: float, workers: int, folder: Path, limit: int) -> dict[str, Row]:
    """Run cases until the time is over, or `limit` cases are done."""
    rows = {family: Row() for family in families}
    some = [Worker(families, seed, first, workers) for first in range(workers)]
    end = time.monotonic() + seconds
    for worker in some:
        worker.start()
    done = 0
    try:
        while time.monotonic() < end and done < limit:
            wait([worker.pipe for worker in some], 0.5)
            for worker in some:
                if (heard := worker.hear()) is None:
                    continue
                (family, number), result = heard
                done += 1
                row = rows[family]
                row.codes[result.code] += 1
                row.slowest = max(row.slowest, (result.seconds, number))
                row.peak = max(row.peak, result.peak)
                if result.problem:
                    kind = re.sub(r"\d+", "N", result.problem)
                    row.failures[kind] += 1
                    if row.failures[kind] <= KEPT:
                        file = keep_case(folder, make_case(family, seed, number), result, (family, number), seed)
                        print(f"{family} {number}: {result.problem}\n    {file}", flush=True)
                if worker.done >= FRESH and worker.where is None:
                    worker.start()
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        for worker in some:
            worker.stop()
    return rows


def show(rows: dict[str, Row]) -> int:
    """Print a table, and return how many cases failed."""
    columns = " ".join(f"{column:>7s}" for column in ("cases", "read", "refused", "other", "failed"))
    print(f"\n{'family':16s} {columns} {'slowest':>9s} {'memory':>9s}  slowest")
    total = Counter[str]()
    for family, row in rows.items():
        counts = {
            "cases": row.codes.total(), "read": row.codes[0], "refused": row.codes[2],
            "other": row.codes.total() - row.codes[0] - row.codes[2], "failed": row.failures.total(),
        }  # fmt: skip
        total.update(counts)
        numbers = " ".join(f"{n:7d}" for n in counts.values())
        print(f"{family:16s} {numbers} {row.slowest[0]:7.1f} s {row.peak >> 20:5d} MiB  case {row.slowest[1]}")
    print(f"{'all':16s} " + " ".join(f"{total[key]:7d}" for key in ("cases", "read", "refused", "other", "failed")))
    for family, row in rows.items():
        for kind, count in row.failures.most_common():
            print(f"  {family}: {count} x {kind}")
    return total["failed"]


def main() -> int:
    """Run the fuzzer as the arguments say; return 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--cases", type=int, default=2**31, help="stop after this number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder for failing cases")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run a failing case again")
    args = parser.parse_args()
    memory = Path("/dev/shm")
    tempfile.tempdir = str(memory) if os.access(memory, os.W_OK) else None
    if args.again:
        prepare()
        result = run_case(read_case(args.again))
        print(f"{result.said}\nexit code {result.code}, {result.peak >> 20} MiB")
        print(result.problem or "nothing is wrong")
        return int(bool(result.problem))
    began = time.monotonic()
    rows = run(args.family or list(FAMILIES), args.seed, args.seconds, args.workers, args.failures, args.cases)
    failed = show(rows)
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
