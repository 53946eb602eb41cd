"""Test refgemma sweep: the report is the same for any number of workers, nothing is computed twice, and a dead worker
loses nothing. The port in these tests is a script that copies a trace, records that it ran, and may kill its worker.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refgemma.cli.main import main
from refgemma.oracle.judge import count_errors
from refgemma.sweep.tally import Tally, merge_tallies

pytestmark = pytest.mark.slow

PORT = """
import os, shutil, signal, sys
from contextlib import suppress
from pathlib import Path
trace, written, dies = sys.argv[1:]
with open("ran.txt", "a") as log:
    log.write(trace + "\\n")
marker = Path(trace + ".died")
if dies == "always" or dies == "once" and not marker.exists():
    marker.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
shutil.copy(trace, written)
"""


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Make three traces of the conformance checkpoint, and a port that copies one."""
    for name, ids in (("a", "2,5,9,30,31,7,8,9,10,11"), ("b", "2,5,9,30"), ("c", "2,40,41,42")):
        assert main(["trace", "--ids", ids, "--model", "conformance", "-o", str(tmp_path / f"{name}.safetensors")]) == 0
    (tmp_path / "port.py").write_text(PORT)
    capsys.readouterr()
    return tmp_path


def run(name: str, dies: str = "never") -> dict[str, Any]:
    return {
        "name": name,
        "run": f"{sys.executable} port.py {name}.safetensors {{trace}} {dies}",
        "model": "conformance",
    }


def written(folder: Path, *jobs: dict[str, Any]) -> Path:
    (folder / "jobs.jsonl").write_text("\n".join(json.dumps(job) for job in jobs))
    return folder / "jobs.jsonl"


def swept(jobs: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Run a sweep; return exit code and report."""
    code = main(["sweep", str(jobs), "--json", *options])
    return code, capsys.readouterr().out


def ran(folder: Path) -> list[str]:
    """Return the traces for which the port was run."""
    return (folder / "ran.txt").read_text().split() if (folder / "ran.txt").exists() else []


def test_the_report_is_the_same_for_any_number_of_workers_and_order_of_jobs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[dict[str, Any]] = [
        {"trace": ["a.safetensors", "b.safetensors", "c.safetensors"], "model": "conformance"},
        {"trace": "a.safetensors", "model": "conformance", "config": [{"sliding_window": 9}, {"sliding_window": 7}]},
        {"run": "false {trace}", "model": "conformance"},
    ]
    one = swept(written(folder, *jobs), capsys, "--workers", "1", "--results", str(folder / "one"))
    two = swept(written(folder, *jobs[::-1], jobs[0]), capsys, "--workers", "2", "--results", str(folder / "two"))
    assert one == two
    assert one[0] == 1
    found = json.loads(one[1])
    assert found["schema"] == "refgemma-sweep/1"
    assert found["counts"] == {"differs": 2, "failed": 1, "conforms": 3}
    assert {job["named"] for job in found["jobs"]} == {"", "swa-window-minus-one", "swa-window-plus-one"}
    probs = next(row for row in found["tensors"] if row["tensor"] == "attention.probs")
    assert probs["verdicts"] == {"FAIL": 4, "PASS": 16}  # two sliding layers, two jobs
    assert sum(probs["histogram"]) == probs["elements"] == 6 * 4 * (3 * 100 + 2 * 16)


def test_what_was_done_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = written(folder, run("a"), run("b"))
    first = swept(jobs, capsys, "--workers", "1")
    assert (first[0], sorted(ran(folder))) == (0, ["a.safetensors", "b.safetensors"])
    assert swept(jobs, capsys, "--workers", "1") == first
    assert len(ran(folder)) == 2
    # One result is lost: only that job is done again.
    next((folder / "jobs.jsonl.results").iterdir()).unlink()
    assert swept(jobs, capsys, "--workers", "1") == first
    assert len(ran(folder)) == 3
    # The port was changed: both are.
    (folder / "port.py").write_text(PORT + "# mended\n")
    assert swept(jobs, capsys, "--workers", "1")[0] == 0
    assert len(ran(folder)) == 5
    assert swept(jobs, capsys, "--workers", "1", "--again")[0] == 0
    assert len(ran(folder)) == 7


def test_a_changed_trace_is_checked_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = written(folder, {"trace": "a.safetensors", "model": "conformance"})
    assert swept(jobs, capsys, "--workers", "1")[0] == 0
    content = bytearray((folder / "a.safetensors").read_bytes())
    content[-2] ^= 0x7F  # the exponent of the last logit
    (folder / "a.safetensors").write_bytes(content)
    code, report = swept(jobs, capsys, "--workers", "1")
    assert (code, json.loads(report)["jobs"][0]["first_divergence"]) == (1, "logits")


def test_a_killed_worker_loses_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = written(folder, run("a"), run("b", "once"), run("c"))
    code, report = swept(jobs, capsys, "--workers", "2")
    assert (code, json.loads(report)["counts"]) == (0, {"conforms": 3})
    assert (folder / "b.safetensors.died").exists()  # or the test shows nothing
    assert swept(jobs, capsys, "--workers", "1", "--again") == (code, report)


def test_a_job_that_kills_every_worker_is_lost_and_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = written(folder, run("a"), run("b", "always"), run("c"))
    code, report = swept(jobs, capsys, "--workers", "2")
    verdicts = {job["name"]: job["verdict"] for job in json.loads(report)["jobs"]}
    assert (code, verdicts) == (5, {"a": "conforms", "b": "lost", "c": "conforms"})


@pytest.mark.parametrize(
    ("job", "verdict", "code", "said"),
    [
        ({"run": "port {trace}"}, "failed", 5, "cannot be run"),
        ({"run": "true {trace}"}, "failed", 5, "did not write trace.safetensors"),
        ({"run": "cp port.py {trace}"}, "unreadable", 2, "not a complete safetensors file"),
        ({"trace": "port.py"}, "unreadable", 2, "not a complete safetensors file"),
        (
            {"run": "cp a.safetensors {trace} {prompt}", "prompt": "b.safetensors"},
            "unreadable",
            2,
            "input_ids of the",
        ),
    ],
)
def test_a_job_that_comes_to_nothing_is_told(
    job: dict[str, str], verdict: str, code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "prompt" in job:
        copy = "import shutil, sys; shutil.copy(*sys.argv[1:3])"  # cp, with an argument more
        job = job | {"run": job["run"].replace("cp", f"{sys.executable} -c '{copy}'")}
    found = swept(written(folder, job | {"model": "conformance"}), capsys, "--workers", "1")
    [told] = json.loads(found[1])["jobs"]
    assert (found[0], told["verdict"]) == (code, verdict)
    assert said in told["message"]
    assert "/tmp" not in told["message"]
    assert not list((folder / "jobs.jsonl.results").iterdir())  # the next time it is tried again


def test_a_command_gets_the_model_with_the_jobs_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = f"{sys.executable} -m refgemma trace --ids 2,5,9,30 --model {{model}} -o {{trace}}"
    job = {"run": port, "model": "conformance", "config": [{"attn_logit_softcapping": 5.0}, {"sliding_window": 3}]}
    code, report = swept(written(folder, job), capsys, "--workers", "1")
    assert (code, json.loads(report)["counts"]) == (0, {"conforms": 2})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("", "contains no job"),
        ("\xff", "is not text"),
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: must be a JSON object, but is a list"),
        ('{"trace": "a.safetensors"}\n{"model": "tiny"}', "line 2: give either trace"),
        ('{"trace": "a.safetensors", "run": "x {trace}"}', "give either trace"),
        ('{"trace": "none.safetensors"}', "none.safetensors"),
        ('{"trace": "a.safetensors", "model": "no-such"}', "no-such"),
        ('{"trace": "a.safetensors", "colour": "red"}', "unknown field 'colour'"),
        ('{"trace": 3}', "trace is 3"),
        ('{"trace": "a.safetensors", "allow": -1}', "a factor above 0"),
        ('{"trace": "a.safetensors", "map": "none"}', "unknown map"),
        ('{"trace": "a.safetensors", "config": {"caps": 3}}', "unknown field 'caps'"),
        ('{"trace": "a.safetensors", "config": {"head_dim": 4}}', "changes the shapes"),
        ('{"run": "port"}', "run must contain {trace}"),
        ('{"run": "port {trace} {prompt}"}', "run must contain {trace}"),
        ('{"run": "port \' {trace}"}', "not a valid command"),
    ],
)
def test_a_bad_file_of_jobs_is_refused_in_one_line(
    text: str | None, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "jobs.jsonl"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert main(["sweep", str(path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out


def test_other_misuse_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = written(folder, {"trace": "a.safetensors", "model": "conformance"})
    wrong = ((["--workers", "0"], "must be at least 1"), (["--scheduler", "tcp://127.0.0.1:9"], "--scheduler"))
    for options, said in wrong:
        assert main(["sweep", str(jobs), *options]) == 2
        assert said in capsys.readouterr().err


def test_a_terminal_report_lists_all_jobs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    windows = [{"sliding_window": n} for n in range(2, 22)]
    jobs = written(folder, {"trace": "a.safetensors", "model": "conformance", "config": windows})
    assert main(["sweep", str(jobs), "--workers", "2"]) == 1
    said = capsys.readouterr().out
    assert said.count("differs  ") == 19  # all but the right window
    assert max(map(len, said.splitlines())) <= 118


# --- a cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> Iterator[str]:
    """Yield the address of a scheduler with two workers, each in its own process."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs="CRITICAL"
    ) as cluster:
        yield cluster.scheduler_address


def test_a_cluster_loses_nothing_with_a_worker(
    folder: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = written(folder, run("a"), run("b", "once"), run("c"), {"trace": "a.safetensors", "model": "conformance"})
    clustered = swept(jobs, capsys, "--scheduler", scheduler)
    assert (folder / "b.safetensors.died").exists()  # a worker was killed in the middle
    assert json.loads(clustered[1])["counts"] == {"conforms": 4}
    assert swept(jobs, capsys, "--workers", "1", "--results", str(folder / "alone")) == clustered


# --- merging ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_a_merged_tally_is_that_of_all_errors_in_any_order(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors = [rng.standard_normal(size) * 10.0 ** rng.integers(-8, 8) for size in sizes]

    def of(z: np.ndarray, at: str) -> Tally:
        return Tally({"PASS": 1}, len(z), int(np.sum(z > 0)), float(np.sum(z * z)), float(np.max(np.abs(z))), at,
                     count_errors(z))  # fmt: skip

    tallies = [of(z, f"layers.{n}.out") for n, z in enumerate(errors)]
    total, everything = merge_tallies(tallies), np.concatenate(errors)
    assert merge_tallies(random.Random(seed).sample(tallies, len(tallies))) == total
    assert Tally.from_json(json.loads(json.dumps(total.as_json()))) == total
    assert total.verdicts == {"PASS": len(sizes)}
    assert total.rms == pytest.approx(np.sqrt(np.mean(everything**2)), rel=1e-12)  # sums of at most 400 numbers
    whole = of(everything, total.at)
    assert (total.elements, total.exact, total.worst, total.histogram) == (
        whole.elements, whole.exact, whole.worst, whole.histogram
    )  # fmt: skip


# A shell makes what it runs in the background ignore SIGINT, and so the tests of such a pytest.
INTERRUPTIBLE = """
import signal, sys
from refgemma.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_and_no_command_outlives_a_sweep(number: int, tmp_path: Path) -> None:
    command = "sh -c 'echo $PPID $$ > pids; exec sleep 100' {trace}"
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"run": command}) + "\n")
    sweep = [sys.executable, "-c", INTERRUPTIBLE, "sweep", "jobs.jsonl", "--workers", "1"]
    with subprocess.Popen(sweep, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
        started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in said
        wait_for(lambda: not any(is_running(pid) for pid in started), seconds=60)


@pytest.mark.parametrize("delay", [0, 0.05, 0.2])
def test_ctrl_c_while_workers_start_is_silent(delay: float, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"run": "sh -c 'sleep 100' {trace}"}) + "\n")
    sweep = [sys.executable, "-c", INTERRUPTIBLE, "sweep", "jobs.jsonl", "--workers", "1"]
    with subprocess.Popen(sweep, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: has_worker(process.pid))
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker gets it too, while it imports
        assert process.communicate(timeout=60)[1].strip() == ""
        assert process.returncode == 130


def has_worker(group: int) -> bool:
    """Return True if a process of `group` is a worker of `multiprocessing`."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            words = stat.read_text().rpartition(")")[2].split()
            if int(words[2]) == group and b"spawn_main" in stat.with_name("cmdline").read_bytes():
                return True
    return False


def is_running(pid: int) -> bool:
    """Return True if a process exists and has not ended; an ended process may remain as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)
