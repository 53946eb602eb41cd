"""Run one case in this process, and report problems: the exit code, the output, remaining and opened files, and memory.

Another process watches, and kills this one if it takes too long.
"""

import contextlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from refgemma.cli import candidates
from refgemma.cli import main as command_line
from refgemma.cli.output import FAULT, MISUSE, OK

from .families import Case, list_codes

MEMORY = 2**30  # bytes
LINE = 2000  # maximum length of an error message in characters
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
          "os.chown",
          "os.utime", "os.setxattr", "shutil.rmtree", "shutil.move")  # fmt: skip
BETWEEN_TWO = ("os.rename", "os.link", "os.symlink", "shutil.move")
OUTPUTS = ("-o", "--output", "--html", "--junit", "--bundle", "--repro")
PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn")
SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
CODE = [Path(__file__).parents[2],
        *map(Path, {sys.prefix, sys.base_prefix, *filter(None, [sys.pycache_prefix, *sys.path])})]  # fmt: skip
SYSTEM = ("/dev/null", "/dev/urandom", "/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/etc/localtime", "/sys")


@dataclass(frozen=True)
class Result:
    """The result of a case; without a fault, `problem` is empty."""

    problem: str
    code: int | None
    said: str = ""
    peak: int = 0  # peak memory in bytes
    seconds: float = 0.0  # processor time in seconds


# --- what a process does, as Python's audit events say ---------------------------------------------------------------


class Audit:
    """Record each use of a file outside the case's folders, and each process, socket and unpickled name."""

    def __init__(self) -> None:
        self.active, self.seen = False, list[str]()
        self.folders: list[str] = []
        self.named: set[str] = set()  # paths in the arguments, or in a file of jobs
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Examine an event; prevent unexpected processes and sockets."""
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.look_at(os.fsdecode(arguments[0]), isinstance(arguments[2], int) and bool(arguments[2] & 3))
        elif event in WRITES:
            for path in arguments[: 2 if event in BETWEEN_TWO else 1]:
                # A path relative to an open folder comes from `shutil.rmtree`, which was checked as a whole.
                within = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)
                if isinstance(path, str | bytes | os.PathLike) and not within:
                    self.look_at(os.fsdecode(path), True)
        elif event == "pickle.find_class":
            self.seen.append(f"unpickles {arguments[:2]}")
        elif event in ("subprocess.Popen", "os.posix_spawn") and "template_worker" in str(arguments[1]):
            return  # a chat template's own process; since Python 3.13, `subprocess` can start it by posix_spawn
        elif event == "subprocess.Popen":
            if str(arguments[1][0]) not in self.named:
                self.seen.append(f"starts {arguments[1]!r:.100}")
            raise FileNotFoundError(2, "no process is started while fuzzing", str(arguments[0]))
        elif event in PROCESSES or event in SOCKETS:
            self.seen.append(f"{event} {arguments!r:.100}")
            raise PermissionError(1, f"no {event} while fuzzing")

    def look_at(self, path: str, writes: bool) -> None:
        """Record a path outside the folders, and prevent writing there, because root may run the fuzzer."""
        whole = os.path.realpath(path)
        if any(whole == folder or whole.startswith(f"{folder}/") for folder in self.folders) or whole == "/dev/null":
            return
        if writes:
            self.seen.append(f"writes {path!r:.100}")
            raise PermissionError(1, "nothing is written outside the folder while fuzzing", path)
        named = {path, whole} & self.named or whole.startswith(SYSTEM)
        if not named and not any(whole.startswith(f"{folder}/") for folder in CODE):
            self.seen.append(f"opens {path!r:.100}")


AUDIT = Audit()


# --- one case ---------------------------------------------------------------------------------------------------------


class Inline(Executor):
    """An executor in this process, because nobody would watch a sweep's own worker processes."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **others: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **others))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def run_inline(workers: int) -> Iterator[Executor]:
    """Replace `refgemma.sweep.runner.processes`."""
    yield Inline()


LAST_FAULT = [""]
_describe = command_line.describe_error


def describe_error(error: Exception) -> str:
    """Return an error with its traceback, of which the command would print only one line."""
    LAST_FAULT[0] = "".join(traceback.format_exception(error))
    return _describe(error)


def prepare() -> None:
    """Prepare this process for running cases."""
    sys.dont_write_bytecode = True  # a case may be the first to import a module
    candidates.processes = run_inline
    command_line.describe_error = describe_error
    os.environ |= {"HF_HOME": "/nonexistent/hub", "COLUMNS": "100"}


def list_files(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of each file in a folder, with None for folders."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes() if path.stat().st_size < 2**24 else b""
        else:
            found[str(path.relative_to(folder))] = None
    return found


def read_peak() -> int:
    """Return the peak memory of this process since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run_case(case: Case) -> Result:
    """Run a case in its own folder."""
    top = Path(tempfile.mkdtemp(prefix="refgemma-fuzz-"))
    folder, scratch = top / "case", top / "tmp"
    try:
        scratch.mkdir()
        for name, content in case.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        folder.mkdir(exist_ok=True)
        before, began = list_files(folder), time.process_time()
        code, out, err = call(case, folder, scratch)
        peak, seconds = read_peak(), time.process_time() - began
        problem = judge(case, code, out, err) or (f"takes {peak >> 20} MiB" if peak > MEMORY else "")
        if not problem:
            left = list_files(folder)
            outputs = {file for option, file in pairwise(case.argv) if option in OUTPUTS}
            problem = judge_files(code, before, left, outputs) or (
                "leaves a temporary file" if list_files(scratch) else ""
            )
        return Result(problem, code, f"{err[-3000:]}{LAST_FAULT[0][-3000:] if code == FAULT else ''}", peak, seconds)
    finally:
        os.chdir("/")
        shutil.rmtree(top, ignore_errors=True)


def call(case: Case, folder: Path, scratch: Path) -> tuple[int | None, str, str]:
    """Run a case's command; return the exit code and the printed text."""
    os.chdir(folder)
    kept = tempfile.tempdir, sys.stdin, sys.stdout, sys.stderr
    out, err = io.BytesIO(), io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(case.stdin.encode("utf-8", "surrogateescape")), "utf-8", "surrogateescape")
    streams = io.TextIOWrapper(out, "utf-8"), io.TextIOWrapper(err, "utf-8", "backslashreplace")
    sys.stdout, sys.stderr = streams
    tempfile.tempdir = str(scratch)
    AUDIT.seen, AUDIT.folders = [], [os.path.realpath(folder.parent)]
    AUDIT.named = {*case.argv, *(part + "/" for part in case.argv), "./absent"}
    for command in (value for option, value in pairwise(case.argv) if option == "--run"):
        with contextlib.suppress(ValueError):  # an unclosed quote
            AUDIT.named.update(shlex.split(command)[:1])
    if "jobs.jsonl" in case.files:  # a file of jobs names files to read, as arguments do
        AUDIT.named |= {"/etc/passwd", "/dev/zero", os.path.realpath("../../etc/passwd")}
    forget_peak()
    LAST_FAULT[0] = ""
    code: int | None = None
    try:
        AUDIT.active = True
        with warnings.catch_warnings():
            code = command_line.main(list(case.argv))
        sys.stdout.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        AUDIT.active = False
        for stream in streams:
            with contextlib.suppress(Exception):
                stream.flush()
        tempfile.tempdir, sys.stdin, sys.stdout, sys.stderr = kept
    return code, out.getvalue().decode("utf-8", "replace"), err.getvalue().decode("utf-8", "replace")


def judge(case: Case, code: int | None, out: str, err: str) -> str:
    """Return the problem with a command's exit code or output, or an empty text."""
    command = case.argv[0] if case.argv else ""
    if AUDIT.seen:
        return AUDIT.seen[0]
    if "Traceback" in err or code is None:
        return "traceback: " + (err.strip().splitlines() or [""])[-1]
    if code == FAULT:
        return "fault of our own: " + err.partition("internal error: ")[2][:100]
    if code not in list_codes(command):
        return f"exit code {code}"
    if case.code not in (None, code):
        return f"exit code {code}; it must be {case.code}"
    if case.wrong and code == OK:
        return "wrong PASS"
    lines = err.splitlines()
    if code == MISUSE:
        said = [line for line in lines if not line.startswith("refgemma: ") or line.endswith("--help)")]  # no warnings
        if command == "sweep" and not said and out:
            return ""  # the report says which job cannot be read
        if len(said) != 1 or len(said[0]) > LINE or not said[0].isprintable() or not said[0].startswith("refgemma"):
            return f"{len(said)} lines of error: {said[:2]!r:.100}"
    if odd := [line for line in lines if "encountered in" in line]:
        return f"a warning of NumPy's: {odd[0][:100]}"
    shown = err if command in ("generate", "chat") else out + err  # a model's text may have any character in a file
    obeyed = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs")} - set("\n\t")
    return f"prints {sorted(obeyed)!r:.100}, which a terminal obeys" if obeyed else ""


def judge_files(
    code: int | None, before: dict[str, bytes | None], left: dict[str, bytes | None], outputs: Collection[str] = ()
) -> str:
    """Return the problem with the files that a command leaves; it may replace the outputs that its arguments name."""
    changed = [name for name in before if before[name] != left.get(name, b"?") and ".results/" not in name]
    if gone := [name for name in changed if code == MISUSE or name not in outputs]:
        return f"changes {gone[0]!r:.60}"
    fresh = [name for name in left if name not in before]
    if partial := [name for name in fresh if name.endswith(".part") or "/." in f"/{name}"]:
        return f"leaves {partial[0]!r:.60}"
    new = [name for name in fresh if not name.startswith("jobs.jsonl.results")]  # results of finished jobs
    if code == MISUSE and new:
        return f"ended with an error, but leaves {new[0]!r:.60}"
    return ""
