"""Test the fuzzer of the commands, `python -m tools.fuzz`: correct runs pass, and each check finds a fault."""

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz.watch as watch
import pytest
from fuzz.__main__ import Worker, keep_case, read_case
from fuzz.families import FAMILIES, Case, list_codes, list_commands, make_case
from fuzz.watch import Result, run_case

from refgemma.cli import candidates
from refgemma.cli import main as command_line
from refgemma.files import replace_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer reads /proc")


@pytest.fixture(autouse=True)
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare this process as `watch.prepare` does, until the end of a test."""
    monkeypatch.setattr(candidates, "processes", watch.run_inline)
    monkeypatch.setattr(command_line, "describe_error", watch.describe_error)
    monkeypatch.setenv("HF_HOME", "/nonexistent/hub")


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_of_every_family_pass(family: str) -> None:
    cases = [make_case(family, 3, number) for number in range(3)]
    assert cases == [make_case(family, 3, number) for number in range(3)]
    assert [run_case(case).problem for case in cases] == [""] * 3


def test_the_allowed_exit_codes_are_those_of_the_help() -> None:
    assert list_codes("check") == list_codes("sweep") == {0, 1, 2, 3, 4, 5}
    assert list_codes("audit") == {0, 1, 2, 3, 4}
    assert list_codes("check-config") == list_codes("diff") == {0, 1, 2, 4}
    assert list_codes("map") == {0, 2, 4}
    assert list_codes("verify") == {0, 1, 2}
    assert {name for name in list_commands() if list_codes(name) == {0, 2}} == {
        "chat", "conformance", "convert", "explore", "generate", "info", "known-bugs", "perplexity", "prompts", "synth",
        "trace", "train", "variants",
    }  # fmt: skip
    assert list_codes("no such command") == {0, 2}


def say(text: str, code: int) -> Callable[[list[str]], int]:
    def main(_: list[str]) -> int:
        sys.stderr.write(text)
        return code

    return main


def write(name: str, code: int) -> Callable[[list[str]], int]:
    def main(_: list[str]) -> int:
        Path(name).write_bytes(b"")
        if code == 2:
            print("refgemma info: no", file=sys.stderr)
        return code

    return main


def do(action: Callable[[], Any]) -> Callable[[list[str]], int]:
    def main(_: list[str]) -> int:
        try:
            action()
        except OSError:
            pass
        return 0

    return main


def take_memory() -> None:
    assert len(bytearray(watch.MEMORY + 1)) > 0


FAULTS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "an exception": (lambda _: {}["a"], "traceback: KeyError: 'a'"),
    "a fault of our own": (say("refgemma info: internal error: a", 70), "fault of our own: a"),
    "an exit code": (say("", 3), "exit code 3"),
    "no line": (say("", 2), "0 lines of error: []"),
    "two lines": (say("refgemma info: a\nb\n", 2), "2 lines of error: ['refgemma info: a', 'b']"),
    "an escape": (say("refgemma: warning: \x1b[31m\n", 0), "prints ['\\x1b'], which a terminal obeys"),
    "NumPy's warning": (say("refgemma: warning: overflow encountered in add\n", 0), "a warning of NumPy's: refgemma: "),
    "a partial file": (write(".out.1.part", 0), "leaves '.out.1.part'"),
    "a file of a refused command": (write("out", 2), "ended with an error, but leaves 'out'"),
    "a file that was there": (write("kept", 0), "changes 'kept'"),
    "a file elsewhere": (do(lambda: open("/etc/hostname").close()), "opens '/etc/hostname'"),
    "a file written elsewhere": (do(lambda: os.mkdir("/nonexistent/a")), "writes '/nonexistent/a'"),
    "a pickle": (do(lambda: pickle.loads(pickle.dumps(Path("a"))) and None), "unpickles ('pathlib"),
    "a process": (do(lambda: subprocess.run(["true"], check=False)), "starts ['true']"),
    "a shell": (do(lambda: os.system("true")), "os.system"),
    "a socket": (do(lambda: socket.create_connection(("127.0.0.1", 9))), "socket."),
    "memory": (do(take_memory), "takes 1"),
    "a temporary file": (do(lambda: tempfile.mkstemp()), "leaves a temporary file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main, problem = FAULTS[fault]
    monkeypatch.setattr(command_line, "main", main)
    assert run_case(Case(["info"], {"kept": b"whole"})).problem.startswith(problem)


@pytest.mark.parametrize(("case", "problem"), [
    (Case(["check"], wrong=True), "wrong PASS"), (Case(["sweep"], code=4), "exit code 0; it must be 4"),
    (Case(["info"]), ""),
])  # fmt: skip
def test_a_wrong_answer_is_found(case: Case, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "main", say("", 0))
    assert run_case(case).problem == problem


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("how", ["replace", "open", "remove", "truncate", "move", "chmod", "rmtree"])
def test_nothing_outside_the_folder_is_written(
    how: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "folder" / "victim"
    victim.parent.mkdir()
    victim.write_bytes(b"whole")
    before = victim.stat()
    actions = {
        "replace": lambda: replace_file(victim, b"x"), "open": lambda: victim.open("w").close(),
        "remove": victim.unlink,
        "truncate": lambda: os.truncate(victim, 0), "move": lambda: os.replace("kept", victim),
        "chmod": lambda: victim.chmod(0), "rmtree": lambda: shutil.rmtree(victim.parent),
    }  # fmt: skip
    monkeypatch.setattr(command_line, "main", do(actions[how]))
    case = Case(["info", *([str(victim)] if named else [])], {"kept": b"new"})
    assert run_case(case).problem.startswith("writes ")
    assert victim.read_bytes() == b"whole"
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]
    assert victim.stat().st_mode == before.st_mode


def test_no_argument_names_a_file_of_the_system() -> None:
    given = {part for number in range(3000) for part in make_case("arguments", 1, number).argv}
    assert len(given) > 60
    assert not [part for part in given if ".." in part or part.startswith("/")]


def test_processor_time_and_memory_of_a_case_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "main", do(lambda: sum(range(3_000_000)) + len(b"x" * 2**27)))
    result = run_case(Case(["info"]))
    assert result.seconds > 0.01
    assert result.peak > 2**27


def test_a_hang_and_a_crash_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = multiprocessing.Value("i", 0)  # shared with the processes of the worker

    def main(_: list[str]) -> int:
        runs.value += 1
        if runs.value == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            pass

    monkeypatch.setattr(command_line, "main", main)
    monkeypatch.setattr("fuzz.__main__.SECONDS", 0.2)
    worker = Worker(["configurations"], 0, 0, 1)
    worker.start()
    found = []
    while len(found) < 2:
        found += [heard] if (heard := worker.hear()) else []
    worker.stop()
    assert not Path(worker.folder).exists()
    assert [where for where, _ in found] == [("configurations", 0), ("configurations", 1)]
    assert [result.problem for _, result in found] == ["has not ended after 0 s", "the process ended with -9"]


def test_a_failing_case_is_kept_and_read(tmp_path: Path) -> None:
    case = make_case("pickles", 5, 1)
    assert read_case(keep_case(tmp_path, case, Result("no", 1), ("pickles", 1), 5)) == case


WHOLE = ("configurations", "headers", "indices", "tokenizers", "templates", "generation", "gguf", "adapters", "maps",
         "eval-texts", "traces", "results", "dumps")  # fmt: skip


@pytest.mark.parametrize("family", WHOLE)
def test_most_whole_files_are_not_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every file gave an error, no fault behind the readers could be found."""
    for damage in ("JSON_FILE", "TENSOR_FILE", "TEXT_FILE", "damage_bytes", "damage_header", "damage_numbers"):
        monkeypatch.setattr(f"fuzz.families.{damage}", lambda raw, draw: raw)
    results = [run_case(make_case(family, 1, number)) for number in range(6)]
    assert [result.problem for result in results] == [""] * len(results)
    assert [result.code for result in results].count(2) <= 3
