"""Test interrupted commands, full disks and two writers: outputs are complete or absent, and no process is left.
`tools/interrupt.py` draws the moments of the second test, and tries many more."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupt
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.convert import convert as conversion
from refgemma.convert import gguf_writer
from refgemma.errors import RefgemmaError
from refgemma.files import lock_folder
from refgemma.hub import find_model
from refgemma.sweep.runner import cluster
from refgemma.weights.save import STAGING

TINY = find_model("tiny")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_of_the_imports_is_silent(number: int) -> None:
    process = interrupt.start([sys.executable, "-m", "refgemma", "check", "absent"], "imports")
    while not interrupt.takes_signals(process.pid):
        time.sleep(0.001)
    process.send_signal(number)  # NumPy and the rest are not imported yet
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + number, "", "")


@pytest.mark.slow
def test_a_stopped_conversion_leaves_all_or_nothing_and_continues(capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["SIGINT", "SIGTERM", "SIGKILL", "file limit"]
    assert interrupt.main(["--rounds", "1", "--cases", "convert --to pytorch", "--ways", *ways]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| all | ")


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """The tool compares every file with that of a run that nothing stopped."""
    assert interrupt.main(["--rounds", "1", "--cases", "train", "--ways", "SIGKILL"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 0 |")


@pytest.mark.parametrize("kind", ["pytorch", "flax-npz", "flax", "gguf"])
def test_nothing_is_in_place_before_it_is_compared(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = find_model("conformance") if kind != "gguf" else of_llama_cpp(tmp_path)
    target = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    command = ["convert", str(source), "-o", str(target), "--to", kind]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for module in (conversion, gguf_writer):
            patch.setattr(module, "check_same", stop)
        patch.setattr("refgemma.weights.save.check_same", stop)
        assert main(command) == 130
    left = [target] if target.is_file() else [path for path in target.glob("*") if path.suffix != ".json"]
    assert [path.name for path in left] == ([] if kind == "gguf" else [STAGING])
    assert main(command) == OK
    assert "compared: identical" in capsys.readouterr().out
    assert not (target / STAGING).exists()


def of_llama_cpp(folder: Path) -> Path:
    """Make a copy of the conformance model with llama.cpp's query scalar."""
    from refgemma.weights.checkpoint import open_checkpoint

    config = open_checkpoint(find_model("conformance")).config
    (folder / "source").mkdir()
    config.changed(query_pre_attn_scalar=config.head_dim).save_pretrained(folder / "source")
    save_file(load_file(find_model("conformance") / "model.safetensors"), folder / "source" / "model.safetensors")
    return folder / "source"


@pytest.mark.parametrize("kind", ["hf", "pytorch", "flax-npz"])
def test_a_source_that_is_damaged_leaves_nothing(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "m"
    conversion.Gemma2Config.from_pretrained(find_model("conformance")).save_pretrained(source)
    weights = load_file(find_model("conformance") / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)  # seen when rows are written
    save_file(weights, source / "model.safetensors")
    command = ["convert", str(source), "-o", str(target), "--to", kind]
    for there in (False, True):
        assert main(command) == MISUSE
        assert "has NaN or infinity" in capsys.readouterr().err
        assert (list(target.iterdir()) == []) if there else not target.exists()
        target.mkdir(exist_ok=True)
    save_file(load_file(find_model("conformance") / "model.safetensors"), source / "model.safetensors")
    assert main(command) == OK


def test_a_folder_that_is_being_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STAGING).mkdir()  # what a process has made that was killed at once; or that is at work
    command = ["convert", str(find_model("conformance")), "-o", str(tmp_path)]
    with lock_folder(tmp_path / STAGING, RefgemmaError):
        assert main(command) == MISUSE
        assert "another process is writing to this folder" in capsys.readouterr().err
    assert main(command) == OK


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    assert main(["trace", "--ids", "2,5", "--model", "conformance", "-o", str(tmp_path / "run.safetensors")]) == OK
    return tmp_path / "run.safetensors"


def refuse(command: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Require one line, exit code 2, and that no file has changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(command) == MISUSE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_input_is_not_replaced_and_two_outputs_are_two_files(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trace.parent
    (folder / "link.html").symlink_to(trace)
    model = folder / "model"
    model.mkdir()
    for file in find_model("conformance").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    check = ["check", str(trace), "--model", str(model)]
    for flag in ("--html", "--markdown", "--junit", "--card", "--repro"):
        refuse([*check, flag, str(trace)], f"{flag} {trace}: is an input", folder, capsys)
    refuse([*check, "--html", str(folder / "link.html")], "is an input", folder, capsys)
    refuse([*check, "--html", str(model / "config.json")], "is an input", folder, capsys)
    same = str(folder / "x")
    refuse([*check, "--html", same, "--junit", same], f"--html and --junit are both {same}", folder, capsys)
    for command in ("trace", "explore"):
        written = [command, "--model", str(model), "--ids", "2,5", "-o", str(model / "model.safetensors")]
        refuse(written, "is an input", folder, capsys)
    assert main([*check, "--html", same, "--junit", f"{same}.xml"]) == OK
    assert main([*check, "--html", same, "--junit", f"{same}.xml"]) == OK  # an output is replaced


def test_a_gguf_file_is_not_converted_into_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "m.gguf")
    assert main(["convert", str(of_llama_cpp(tmp_path)), "-o", file, "--to", "gguf"]) == OK
    refuse(["convert", file, "-o", file, "--to", "gguf"], "is the source", tmp_path, capsys)
    refuse(["convert", file, "-o", f"{tmp_path}/n.gguf/", "--to", "gguf"], "is a folder", tmp_path, capsys)


def test_a_name_of_a_folder_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(["trace", "--ids", "2,5", "-o", f"{tmp_path}/good.safetensors/"], "is a folder", tmp_path, capsys)


def test_an_error_that_cannot_be_printed_keeps_its_code() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "refgemma", "info", "nowhere"]
        assert subprocess.run(command, stderr=full, stdout=subprocess.DEVNULL, check=False).returncode == MISUSE


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_command_has_started_ends_with_check(number: int, tmp_path: Path) -> None:
    (tmp_path / "port").write_text("#!/bin/sh\ntouch started\nsleep 100 &\nsleep 100\n")
    (tmp_path / "port").chmod(0o755)
    command = [sys.executable, "-m", "refgemma", "check", str(tmp_path / "t"), "--run", str(tmp_path / "port")]
    process = interrupt.start(["sh", "-c", f'cd {tmp_path} && exec "$@"', "sh", *command], "check-run")
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert len(interrupt.find_processes("check-run")) >= 3
    process.send_signal(number)
    process.communicate(timeout=20)
    assert interrupt.wait_for_orphans("check-run") == []


def test_a_scheduler_that_ends_gives_one_line() -> None:
    from concurrent.futures import CancelledError

    from distributed import LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs="CRITICAL"
        ) as local,
        pytest.raises(RefgemmaError, match="the scheduler ended before all jobs were done"),
        cluster(local.scheduler_address),
    ):
        raise CancelledError  # what a future of Dask raises then
