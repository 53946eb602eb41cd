"""The scoreboard: the page shows what results.json holds, each folder has what it needs, and a planted engine gets the
verdict that it deserves."""

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import board
import pytest
from board import (
    REFERENCE_WRONG,
    Row,
    check_entries,
    expired,
    main,
    read_results,
    read_rows,
    run_row,
    worst,
    write_page,
)

ROWS = read_rows()
FOLDERS = sorted({row.folder for row in ROWS})
TODAY = date(2026, 11, 29)


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_results() -> None:
    assert board.PAGE.read_text("utf-8") == write_page(ROWS, read_results()), "run: python scoreboard/board.py --page"


def test_every_result_has_its_reason_or_its_evidence() -> None:
    assert list(check_entries(ROWS, read_results())) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_has_what_it_needs(folder: Path) -> None:
    for row in (row for row in ROWS if row.folder == folder):
        assert row.says.endswith(".")
        if row.not_run:
            continue
        assert row.version, "the version of the engine is pinned"
        assert all("==" in pin for pin in row.requirements)
        assert all("@" in pin[1:] for pin in row.npm)
        assert 15 <= board.glue_lines(row) <= 100
    if (repro := folder / "repro.py").is_file():
        text = repro.read_text("utf-8")
        assert "refgemma" not in text
        assert sum(bool(line.strip()) for line in text.splitlines()) <= 30


def test_no_engine_is_described_and_not_shown() -> None:
    with_a_port = {path.parent for name in ("port.py", "port.mjs") for path in board.HERE.glob(f"*/{name}")}
    assert with_a_port <= set(FOLDERS)
    assert {row.name for row in ROWS} == set(read_results())


# --- expiry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "newest", "pinned", "reason"),
    [
        ("2026-11-29", "1.0", "", ""),
        ("2026-08-31", "1.0", "", ""),
        ("2026-08-30", "1.0", "", "91 days old"),
        ("2026-11-29", "1.1", "", "version 1.1 is on the index; the row is for 1.0"),
        ("2026-11-29", "1.1", "an old release", ""),
        ("2026-08-30", "1.1", "an old release", "91 days old"),
        ("2026-11-29", None, "", ""),
    ],
)
def test_a_row_expires(on: str, newest: str | None, pinned: str, reason: str) -> None:
    assert expired({"date": on, "version": "1.0"}, TODAY, newest, pinned) == reason


def test_the_command_lists_what_expired(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("one", board.HERE, "One.", "one", requirements=("one==1.0",))
    monkeypatch.setattr(board, "read_rows", lambda names: [row])
    monkeypatch.setattr(board, "read_results", lambda: {"one": {"date": date.today().isoformat(), "version": "1.0"}})
    for newest, code in (("1.0", 0), ("2.0", 1)):
        monkeypatch.setattr(board, "newest_version", lambda row, newest=newest: newest)
        assert main(["--expired"]) == code
    assert "one: version 2.0 is on the index" in capsys.readouterr().out


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-engine"]) == 2
    assert "there is no engine 'no-such-engine'" in capsys.readouterr().err


# --- wrong results ----------------------------------------------------------------------------------------------------

GOOD = {"verdict": "conforms", "tensors": 3, "evidence": {"file": "plain.safetensors", "bytes": 9, "sha256": "0"}}
ROW = Row("one", board.HERE, "One.", "one", requirements=("one==1.0",))


def entry(**changes: Any) -> dict[str, Any]:
    measured = {"install_seconds": 1, "run_seconds": 2, "glue_lines": 30}
    return {"version": "1.0", "date": "2026-11-29", **measured, "results": {"float32": {"plain": GOOD}}} | changes


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (entry(), []),
        (entry(version="2.0"), ["one: the row is for 2.0, but 1.0 is pinned"]),
        (entry(results={}), ["one: has to have either results or the reason why it was not run"]),
        (entry(not_run="no GPU"), ["one: has to have either results or the reason why it was not run"]),
        (
            entry(results={"float32": {"plain": GOOD | {"verdict": "good"}}}),
            ["one float32 plain: unknown verdict 'good'"],
        ),
        (
            entry(results={"float32": {"plain": {"verdict": "conforms"}}}),
            ["one float32 plain: a verdict without evidence"],
        ),
        (
            entry(results={"float32": {"plain": {"verdict": "NOT RUN"}}}),
            ["one float32 plain: NOT RUN without a reason"],
        ),
        (
            entry(results={"float32": {"plain": GOOD | {"verdict": "differs"}}}),
            ["one float32 plain: differs and the first tensor contradict each other"],
        ),
        (
            entry(results={"float32": {"plain": GOOD | {"first": "logits", "named": "UNKNOWN"}}}),
            ["one float32 plain: conforms and the first tensor contradict each other"],
        ),
    ],
)
def test_a_wrong_row_is_caught(found: dict[str, Any], wrong: list[str]) -> None:
    assert list(check_entries([ROW], {"one": found})) == wrong


def test_a_row_of_no_engine_is_caught() -> None:
    assert list(check_entries([], {"one": entry()})) == ["one: is in only one of results.json and the folders"]


def test_the_page_says_what_was_not_run_and_whose_fault_a_difference_is() -> None:
    other = Row("two", board.HERE, "Two.", "two", not_run="needs a GPU")
    ours = {"verdict": "differs", "first": "logits", "named": "UNKNOWN", "class": REFERENCE_WRONG, "says": "evidence"}
    results = {"one": entry(results={"float32": {"plain": GOOD | ours}})}
    results["two"] = {"version": "", "date": "2026-11-29", "results": {}, "not_run": "needs a GPU"}
    page = write_page([ROW, other], results)
    assert f"| {REFERENCE_WRONG} (1 of 1) |" in page
    assert "NOT RUN, needs a GPU" in page
    assert "| NOT RUN | NOT RUN | NOT RUN |" in page


@pytest.mark.parametrize(
    ("verdicts", "shown"),
    [
        (["conforms", "NOT RUN", "noisy"], "noisy (2 of 3)"),
        (["conforms", "FAILED", "differs"], "differs (3 of 3)"),
        (["NOT RUN", "NOT RUN"], "NOT RUN"),
        (["conforms", "FAILED"], "FAILED (2 of 2)"),
    ],
)
def test_the_worst_case_is_shown(verdicts: list[str], shown: str) -> None:
    assert worst({str(n): {"verdict": verdict} for n, verdict in enumerate(verdicts)}) == shown


# --- planted engines --------------------------------------------------------------------------------------------------

PORT = """
import sys
sys.path.insert(0, {root!r})
import refgemma
from glue import NotRun, main
from refgemma.trace.names import run_in_order

def load(folder, dtype, *given):
    if "broken" in given:
        raise RuntimeError("no such layer\\nmore lines")
    model = refgemma.load(str(folder), dtype)
    return model.weights, model.config.changed(sliding_window=9) if "wide" in given else model.config

def run(model, case):
    if case.padded:
        raise NotRun("no attention mask for padding")
    found = dict(run_in_order(case.ids, *model))
    wrong = {{"norm": found["norm"][..., :7]}} if case.name == "short" else {{}}
    return {{"logits": found["logits"], **wrong}}

main(load, run, engine="planted")
"""


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(board, "BUILD", tmp_path / "build")
    (tmp_path / "port.py").write_text(PORT.format(root=str(board.ROOT)), "utf-8")

    def run(*arguments: str, **changes: Any) -> dict[str, Any]:
        row = Row("planted", tmp_path, "Planted.", "planted", index="", dtypes=("float32",), arguments=arguments,
                  command=f"{sys.executable} port.py", **changes)  # fmt: skip
        return run_row(row, TODAY)

    return run


@pytest.mark.slow
def test_a_planted_engine_gets_its_verdict(plant: Callable[..., dict[str, Any]]) -> None:
    right = plant(cases=("plain", "padded"))["results"]["float32"]
    assert (right["plain"]["verdict"], right["plain"]["tensors"]) == ("conforms", 1)
    assert right["padded"] == {"verdict": "NOT RUN", "says": "no attention mask for padding"}
    wrong = plant("wide", cases=("plain",))["results"]["float32"]["plain"]
    assert (wrong["verdict"], wrong["first"], wrong["named"]) == ("differs", "logits", "swa-window-plus-one")
    json.dumps(wrong)


@pytest.mark.slow
def test_a_mistake_of_the_port_is_no_verdict(plant: Callable[..., dict[str, Any]]) -> None:
    found = plant(cases=("short",))["results"]["float32"]["short"]
    assert found["verdict"] == "FAILED"
    assert found["says"].startswith("the port wrote norm, which has shape (1, 7, 7)")


def test_an_engine_that_fails_gets_no_verdict(plant: Callable[..., dict[str, Any]]) -> None:
    failed = plant("broken", cases=("plain",))["results"]["float32"]["plain"]
    assert failed == {"verdict": "FAILED", "says": "RuntimeError: no such layer"}


def test_an_engine_that_cannot_be_installed_is_not_run(plant: Callable[..., dict[str, Any]]) -> None:
    assert plant(not_run="needs a GPU") | {"date": ""} == {
        "version": "", "date": "", "results": {}, "not_run": "needs a GPU",
    }  # fmt: skip
