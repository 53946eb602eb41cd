"""Stop every command that writes, at random moments and in eight ways, and examine the remaining files.

Run `python tools/interrupt.py --rounds 2`; a small part runs in the tests.

Whatever stops a command, these rules hold: each output is complete or absent, the error is at most one line, and no
process is left after five seconds. Running the same command again does its work, or refuses to overwrite a finished
output. The table counts attempts that stopped a command, and attempts that came too late. Each fault is printed above
the table and makes the exit code 1.

The ways of stopping a command are:

- SIGINT, SIGTERM and SIGKILL after the command has installed its handlers (before that, Python itself answers);
- a limit on file lengths, as on a full disk (RLIMIT_FSIZE);
- a full disk (a small tmpfs, only as root);
- a folder without write permission (chmod, and chattr +i as root);
- the same command twice at once;
- an output that cannot be printed (/dev/full).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refgemma.convert.convert import FORMATS
from refgemma.hub import find_model
from refgemma.weights.save import STAGING

STATE = "checkpoint.safetensors"  # of a training run that has not finished
MARK = "REFGEMMA_INTERRUPTED_RUN"  # in the environment of all processes that a run starts
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
WAYS = (*SIGNALS, "file limit", "full disk", "read-only folder", "two at once", "output full")
PATIENCE = 60.0  # seconds after which a command counts as hanging
ORPHANS = 5.0  # seconds within which all processes must end


@dataclass(frozen=True)
class Case:
    """A command, with `{out}` for the folder of outputs and `{given}` for the folder of inputs."""

    name: str
    arguments: str
    resumes: bool = False  # refuses if it has finished, and continues otherwise
    endless: bool = False  # writes gigabytes, so do not wait for its end

    def command(self, out: Path, given: Path) -> list[str]:
        """Return the words of the command; a training run that left its state is resumed."""
        words = [word.format(out=out, given=given) for word in self.arguments.split()]
        return [sys.executable, "-m", "refgemma", *words, *(["--resume"] if list(out.rglob(STATE)) else [])]


CONVERT = "convert {given}/tiny -o {out}/m --max-shard-size 2MB --to"
TRAIN = "train {given}/book.txt -o {out}/m --max-steps 6 --seq-len 16 --batch-size 2 --save-steps 1"
REPORTS = "--html {out}/page.html --markdown {out}/r.md --junit {out}/r.xml --repro {out}/repro.safetensors"
CASES = (
    *(Case(f"convert --to {kind}", f"{CONVERT} {kind}", resumes=True) for kind in FORMATS if kind != "gguf"),
    Case("convert --to gguf", "convert {given}/llama -o {out}/m.gguf --to gguf"),
    Case("synth", "synth 2b -o {out}/m", resumes=True, endless=True),
    Case("train", TRAIN, resumes=True),
    Case("train --lora-r", f"{TRAIN} --lora-r 2", resumes=True),
    Case("trace", "trace --ids 2,300,301,5 -o {out}/run.safetensors"),
    Case("explore", "explore --ids 2,300,301,5 -o {out}/page.html"),
    Case("check", f"check {{given}}/run.safetensors --model conformance --json {REPORTS}"),
    Case("check --run", "check {given}/made.safetensors --run {given}/port --html {out}/page.html"),
    Case("prompts", "prompts -o {out}/prompts"),
    Case("sweep", "sweep {given}/jobs.jsonl --workers 2 --results {out}/kept"),
    Case("verify", "verify bends-forward-f32 op-linear-bf16 --json"),
    Case("info", "info {given}/tiny --json"),
    Case("diff", "diff {given}/run.safetensors {given}/other.safetensors --json"),
)


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def make_inputs(given: Path) -> None:
    """Write the commands' inputs: a model, two traces (one is wrong), jobs, and a slow port."""
    given.mkdir()
    shutil.copytree(find_model("tiny"), given / "tiny")
    shutil.copytree(given / "tiny", given / "llama")
    config = (given / "llama" / "config.json").read_text()  # llama.cpp uses head_dim as query_pre_attn_scalar
    width = json.loads(config)["head_dim"]
    (given / "llama" / "config.json").write_text(
        json.dumps(json.loads(config) | {"query_pre_attn_scalar": width}, indent=2)
    )
    for name, ids in (("run", "2,300,301"), ("other", "2,300,302")):
        trace = [
            "trace",
            "--model",
            "conformance",
            "--ids",
            ids.replace("30", "3"),
            "-o",
            f"{given}/{name}.safetensors",
        ]
        subprocess.run([sys.executable, "-m", "refgemma", *trace], check=True, stdout=subprocess.DEVNULL)
    damaged = bytearray((given / "run.safetensors").read_bytes())
    damaged[-3] ^= 1  # the last logit
    (given / "run.safetensors").write_bytes(damaged)
    (given / "jobs.jsonl").write_text(
        f'{{"trace": "{given}/run.safetensors", "model": "conformance"}}\n'
        f'{{"trace": "{given}/other.safetensors", "model": "conformance"}}\n'
    )
    (given / "book.txt").write_text("It was a dark night, and the wind blew over the hills. " * 60)
    (given / "port").write_text(
        "#!/bin/sh\nexec >/dev/null 2>&1\nsleep 0.3\n"
        f"{sys.executable} -m refgemma trace --ids 2,300 -o {given}/made.safetensors\n"
    )
    (given / "port").chmod(0o755)


def read_outputs(out: Path) -> dict[str, bytes]:
    """Return the contents of all finished files by name; unfinished files have special names."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".part" and path.name != STATE and STAGING not in path.parts
    }


def find_leftovers(out: Path) -> list[str]:
    """Return the names of leftovers: files that no finished command leaves."""
    return [path.name for path in out.rglob("*") if path.suffix == ".part" or path.name in (STAGING, STATE)]


# --- processes --------------------------------------------------------------------------------------------------------


def start(command: Sequence[str], mark: str, before: Callable[[], object] | None = None,
          stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":  # fmt: skip
    """Start a command in its own session, with signals as in a terminal."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
        if before is not None:
            before()

    environment = os.environ | {MARK: mark, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=prepare,
    )  # fmt: skip


def takes_signals(pid: int) -> bool:
    """Return True if a process handles SIGTERM; refgemma installs this handler first."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True  # the process has ended
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def find_processes(mark: str) -> list[int]:
    """Return the processes that a run started and that are still running."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def wait_for_orphans(mark: str) -> list[int]:
    """Return the processes that are still running after five seconds."""
    until = time.monotonic() + ORPHANS
    while (left := find_processes(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


# --- ways -------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a tmpfs of a size on a folder; yield True if that was possible."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def unwritable(folder: Path) -> Iterator[bool]:
    """Remove write permission for a folder, even for root; yield True if that was possible."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    taken = not root or not subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode
    try:
        yield taken
    finally:
        if root and taken:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        folder.chmod(0o755)


@dataclass
class Reference:
    """The result of a command that nothing stops."""

    code: int
    outputs: dict[str, bytes]
    seconds: float

    @property
    def largest(self) -> int:
        """Return the length of the longest output in bytes."""
        return max(map(len, self.outputs.values()), default=0)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a process; return its exit code and its stderr."""
    try:
        said = process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -999, f"hangs for more than {PATIENCE} s"
    return process.returncode, said


def judge_text(said: str) -> list[str]:
    """Return a list of problems with stderr."""
    lines = [line for line in said.splitlines() if line.startswith("refgemma ")]
    bad = [word for word in ("Traceback", "Exception ignored", "Error in", "hangs") if word in said]
    return [f"stderr: {said[-400:]!r}"] if bad or len(lines) > 1 else []


class Attempts:
    """Run cases in all ways, and count the results."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.given = folder / "given"
        make_inputs(self.given)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.references: dict[str, Reference] = {}

    def new_folder(self) -> Path:
        """Return a new folder for outputs."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def refer(self, case: Case) -> Reference:
        """Run the command once undisturbed, and return the result."""
        if case.name not in self.references:
            if case.endless:
                return Reference(0, {}, 3.0)
            out = self.new_folder()
            began = time.monotonic()
            code, said = finish(start(case.command(out, self.given), "reference"))
            outputs = {name: text.replace(str(out).encode(), b"OUT") for name, text in read_outputs(out).items()}
            self.references[case.name] = Reference(code, outputs, time.monotonic() - began)
            if code not in (0, 1) or judge_text(said):
                raise RuntimeError(f"{case.name} fails undisturbed: exit code {code}: {said}")
            shutil.rmtree(out)
        return self.references[case.name]

    def attempt(self, case: Case, way: str) -> None:
        """Stop a case once, examine the remaining files, and run the command again."""
        reference, out, mark = self.refer(case), self.new_folder(), uuid.uuid4().hex
        faults: list[str] = []
        stopped = False

        def judge(process: "subprocess.Popen[str]", allowed: Sequence[int]) -> int:
            code, said = finish(process)
            faults.extend(judge_text(said))
            if code not in (reference.code, *allowed):
                faults.append(f"exit code {code}: {said!r}")
            return code

        command = case.command(out, self.given)
        if way in SIGNALS:
            number = signal.Signals[way]
            process = start(command, mark)
            while not takes_signals(process.pid):
                time.sleep(0.002)
            low = self.random.choice((0.0, 0.6))  # importing takes most of the time, so interrupt also later
            time.sleep(self.random.uniform(low, 1.0) * reference.seconds)
            process.send_signal(number)
            ended = -number if number == signal.SIGKILL else 128 + number
            code = judge(process, (ended, -number))
            stopped = code in (ended, -number)
            if code not in (ended, reference.code):  # Python restores its own handlers at the very end
                faults += self.compare(out, reference, "killed by the signal", every=True)
        elif way == "file limit":
            limit = self.random.randrange(0, max(1, reference.largest))
            process = start(command, mark, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            stopped = judge(process, (2, 5)) in (2, 5)  # 5 means that the command of check --run was stopped
        elif way == "full disk":
            size = self.random.randrange(4096, max(8192, reference.largest * 2))
            with small_disk(out, size) as possible:
                if not possible:
                    self.counts[way, "NOT RUN"] += 1
                    return
                stopped = judge(start(command, mark), (2,)) == 2
                faults += self.compare(out, reference, "after it")
        elif way == "read-only folder":
            with unwritable(out) as possible:
                if not possible:
                    self.counts[way, "NOT RUN"] += 1
                    return
                stopped = judge(start(command, mark), (2,)) == 2
        elif way == "two at once":
            processes = [start(command, mark)]
            time.sleep(self.random.uniform(0, 0.3))
            processes.append(start(command, mark))
            codes = [judge(process, (2,)) for process in processes]
            stopped = True
            if all(code == 2 for code in codes):
                faults.append(f"both were refused: {codes}")
        elif way == "output full":
            with open("/dev/full", "w") as full:
                stopped = judge(start(command, mark, stdout=full.fileno()), (2,)) == 2
        if orphans := wait_for_orphans(mark):
            faults.append(f"processes are left: {orphans}")
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
        faults += self.compare(out, reference, "after it")
        if not case.endless:
            whole = self.compare(out, reference, "", every=True) == []
            code, said = finish(start(case.command(out, self.given), mark))
            refused = case.resumes and whole and code == 2
            if code != reference.code and not refused:
                faults.append(f"again: exit code {code}: {said!r}")
            faults += judge_text(said) + self.compare(out, reference, "again", every=True)
            if left := [] if refused else find_leftovers(out):
                faults.append(f"again: leaves {left}")
        self.counts[way, "stopped" if stopped else "too quick"] += 1
        self.counts[way, "faults"] += bool(faults)
        for fault in faults:
            self.faults.append(f"{case.name}, {way}: {fault}")
            print(self.faults[-1], flush=True)
        shutil.rmtree(out)

    def compare(self, out: Path, reference: Reference, when: str, every: bool = False) -> list[str]:
        """Return how the outputs differ from an undisturbed run; report absent outputs only if `every`."""
        found = {name: text.replace(str(out).encode(), b"OUT") for name, text in read_outputs(out).items()}
        known = reference.outputs or {name: text for name, text in found.items() if name.endswith("config.json")}
        bad = [f"{when}: {name} is not whole" for name, text in found.items() if known.get(name) != text]
        absent = [f"{when}: {name} is absent" for name in reference.outputs if name not in found]
        return bad + (absent if every else [])


def table(counts: Counter[tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of the table."""
    columns = ("stopped", "too quick", "NOT RUN", "faults")
    yield "| way | " + " | ".join(columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for way in WAYS:
        if any(counts[way, column] for column in columns):
            yield f"| {way} | " + " | ".join(str(counts[way, column]) for column in columns) + " |"
    yield "| all | " + " | ".join(str(sum(counts[way, c] for way in WAYS)) for c in columns) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="stop every command that writes, and look at what is left")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of every case in every way (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES], help="run only these cases")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="use only these ways")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell makes background commands ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="refgemma-interrupt-") as folder:
        attempts = Attempts(Path(folder), args.seed)
        try:
            for _ in range(args.rounds):
                for case in CASES:
                    for way in args.ways:
                        if case.name in args.cases and not (case.endless and way not in SIGNALS):
                            attempts.attempt(case, way)
        finally:  # if interrupted, still print the results so far
            print("\n".join(table(attempts.counts)), flush=True)
    return int(bool(attempts.faults))


if __name__ == "__main__":
    sys.exit(main())
