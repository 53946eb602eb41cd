"""Stop every command that writes, at random moments and in eight ways, and look at what is left. Run it as
`python tools/interrupt.py --rounds 2`; a small part of it is among the tests.

Whatever stops a command: each output is whole or absent, the error is at most one line, and no process is left after
five seconds. The same command then does its work, or refuses to write what is finished. The table counts the attempts
that stopped a command, and those that came too late. Every fault is printed above it, and makes the exit code 1.

Ways: SIGINT, SIGTERM and SIGKILL after the command has begun to take signals (before that, Python itself answers); a
limit on the length of files, as on a full disk (RLIMIT_FSIZE); a full disk (a small tmpfs, as root only); a folder that
nobody may write (chmod, and chattr +i as root); the same command twice at once; outputs that cannot be printed
(/dev/full).
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

MARK = "REFGEMMA_INTERRUPTED_RUN"  # in the environment of all that a run starts
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
WAYS = (*SIGNALS, "file limit", "full disk", "read-only folder", "two at once", "output full")
PATIENCE = 60.0  # seconds after which a command hangs
ORPHANS = 5.0  # seconds in which all processes have to end


@dataclass(frozen=True)
class Case:
    """A command, with `{out}` for the folder of its outputs and `{given}` for that of its inputs."""

    name: str
    arguments: str
    resumes: bool = False  # says "holds files already" if it has finished, and goes on if it has not
    endless: bool = False  # writes gigabytes: it is not waited for

    def command(self, out: Path, given: Path) -> list[str]:
        """Return the words of the command."""
        words = [word.format(out=out, given=given) for word in self.arguments.split()]
        return [sys.executable, "-m", "refgemma", *words]


CONVERT = "convert {given}/tiny -o {out}/m --max-shard-size 2MB --to"
REPORTS = "--html {out}/page.html --markdown {out}/r.md --junit {out}/r.xml --repro {out}/repro.safetensors"
CASES = (
    *(Case(f"convert --to {kind}", f"{CONVERT} {kind}", resumes=True) for kind in FORMATS if kind != "gguf"),
    Case("convert --to gguf", "convert {given}/llama -o {out}/m.gguf --to gguf"),
    Case("synth", "synth 2b -o {out}/m", resumes=True, endless=True),
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
    """Write what the commands read: a model, two traces, one of them wrong, jobs, and a port that takes a while."""
    given.mkdir()
    shutil.copytree(find_model("tiny"), given / "tiny")
    shutil.copytree(given / "tiny", given / "llama")
    config = (given / "llama" / "config.json").read_text()  # llama.cpp takes head_dim for query_pre_attn_scalar
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
    (given / "port").write_text(
        "#!/bin/sh\nexec >/dev/null 2>&1\nsleep 0.3\n"
        f"{sys.executable} -m refgemma trace --ids 2,300 -o {given}/made.safetensors\n"
    )
    (given / "port").chmod(0o755)


def read_outputs(out: Path) -> dict[str, bytes]:
    """Return all finished files: name -> content. What is still being written has a name that says so."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".part" and STAGING not in path.parts
    }


def find_leftovers(out: Path) -> list[str]:
    """Return what is in the folder that no finished command leaves."""
    return [path.name for path in out.rglob("*") if path.suffix == ".part" or path.name == STAGING]


# --- processes --------------------------------------------------------------------------------------------------------


def start(command: Sequence[str], mark: str, before: Callable[[], object] | None = None,
          stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":  # fmt: skip
    """Start a command in a session of its own, with signals as a terminal has them."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        if before is not None:
            before()

    environment = os.environ | {MARK: mark, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=prepare,
    )  # fmt: skip


def takes_signals(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM, which refgemma installs before anything else."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True  # it has ended
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def find_processes(mark: str) -> list[int]:
    """Return the processes that a run has started and that have not ended."""
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
    """Return the processes that are still there after five seconds."""
    until = time.monotonic() + ORPHANS
    while (left := find_processes(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


# --- ways -------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Put a tmpfs of a size in a folder's place; say whether that was possible."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def unwritable(folder: Path) -> Iterator[bool]:
    """Take the right to write into a folder, from root too; say whether that was possible."""
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
    """What a command does when nothing stops it."""

    code: int
    outputs: dict[str, bytes]
    seconds: float

    @property
    def largest(self) -> int:
        """Bytes of the longest output."""
        return max(map(len, self.outputs.values()), default=0)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a process; its code and what it said on stderr."""
    try:
        said = process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -999, f"hangs for more than {PATIENCE} s"
    return process.returncode, said


def judge_text(said: str) -> list[str]:
    """Return what is wrong with stderr."""
    lines = [line for line in said.splitlines() if line.startswith("refgemma ")]
    bad = [word for word in ("Traceback", "Exception ignored", "Error in", "hangs") if word in said]
    return [f"stderr: {said[-400:]!r}"] if bad or len(lines) > 1 else []


class Attempts:
    """Runs cases in ways, and counts."""

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
        """Return what the command does undisturbed, by running it once."""
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
        """Stop a case once, look at what is left, and do it again."""
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
            low = self.random.choice((0.0, 0.6))  # importing takes most of the time
            time.sleep(self.random.uniform(low, 1.0) * reference.seconds)
            process.send_signal(number)
            ended = -number if number == signal.SIGKILL else 128 + number
            code = judge(process, (ended, -number))
            stopped = code in (ended, -number)
            if code not in (ended, reference.code):  # Python gives its handlers back at the very end
                faults += self.compare(out, reference, "killed by the signal", every=True)
        elif way == "file limit":
            limit = self.random.randrange(0, max(1, reference.largest))
            process = start(command, mark, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            stopped = judge(process, (2, 5)) in (2, 5)  # 5: the command of check --run has met it
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
            code, said = finish(start(command, mark))
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
        """Return how the outputs differ from those of an undisturbed run; absent ones only if `every` is asked for."""
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
    parser.add_argument("--rounds", type=int, default=2, help="of every case in every way (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES], help="some of the cases")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="some of the ways")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="refgemma-interrupt-") as folder:
        attempts = Attempts(Path(folder), args.seed)
        try:
            for _ in range(args.rounds):
                for case in CASES:
                    for way in args.ways:
                        if case.name in args.cases and not (case.endless and way not in SIGNALS):
                            attempts.attempt(case, way)
        finally:  # interrupted itself, it still says what it has found
            print("\n".join(table(attempts.counts)), flush=True)
    return int(bool(attempts.faults))


if __name__ == "__main__":
    sys.exit(main())
