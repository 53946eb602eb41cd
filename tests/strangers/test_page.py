"""Check docs/strangers.md: every test that it names exists, and every error says what to do instead."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "strangers.md"
TEST = re.compile(r"([\w./-]+\.py)::([\w.:]+)")
REFUSED = re.compile(r"\b(refus\w*|error|raises?)\b")
# What a next step begins with: a refusal without one leaves the reader alone.
STEP = re.compile(
    r"\b(allow|ask|begin|call|cast|check|choose|convert|copy|cut|dequantise|download|fetch|give|install|keep|leave|load|make|merge|"
    r"name|names|pass|pip|put|read|remove|rename|run|save|say|says|see|set|split|take|tie|try|turn|unset|use|wait|write)\b"
)


def rows(text: str) -> list[list[str]]:
    """Return the cells of all rows of all tables without heads; a pipe in a cell has a backslash."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] not in ("situation", "claim") and not set(row[0]) <= set("-: ")]


def names_in(file: Path) -> set[str]:
    """Return the functions and ``Class::method`` of a test file; for a module, also the names of doctests."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    found = {node.name for node in tree.body if isinstance(node, kinds)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}{mark}{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)
                      for mark in ("::", ".")}  # fmt: skip
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return found | {f"{module}.{name}" for name in found}


def problems(text: str) -> list[str]:
    """Return the problems of a page, one sentence each."""
    found, seen = [], set()
    for row in rows(text):
        if len(row) != 3:
            found.append(f"{row[0]}: has {len(row)} cells")
            continue
        situation, now, tests = row
        named = TEST.findall(tests)
        if not named:
            found.append(f"{situation}: names no test")
        for file, name in named:
            if not (ROOT / file).is_file() or name not in names_in(ROOT / file):
                found.append(f"{situation}: there is no {file}::{name}")
        if REFUSED.search(now) and not STEP.search(now):
            found.append(f"{situation}: is refused without a next step")
        if situation in seen:
            found.append(f"{situation}: stands there twice")
        seen.add(situation)
    return found


def test_every_test_exists_and_every_refusal_has_a_next_step() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not problems(text)
    assert len(rows(text)) >= 14


def test_every_claim_about_security_has_a_test() -> None:
    claims = rows((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(claims) >= 10
    for claim, tests in claims:
        named = TEST.findall(tests)
        assert named, claim
        absent = [f"{file}::{name}" for file, name in named if name not in names_in(ROOT / file)]
        assert not absent, claim


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("| a | read | `tests/strangers/test_page.py::test_nothing_at_all` |",
         "a: there is no tests/strangers/test_page.py::test_nothing_at_all"),
        ("| a | read | `tests/test_none.py::test_x` |", "a: there is no tests/test_none.py::test_x"),
        ("| a | read | |", "a: names no test"),
        ("| a | refused | `tests/strangers/test_page.py::rows` |", "a: is refused without a next step"),
        ("| a | read |", "a: has 2 cells"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_is_seen(row: str, problem: str) -> None:
    assert problems(row) == [problem]


def test_rows_that_are_right_are_let_be() -> None:
    head = "| situation | what happens now | test |\n| --- | --- | --- |\n"
    right = [
        "| a | refused: `pip install x` | `tests/strangers/test_page.py::rows` |",
        "| b | x \\| y | `refgemma/hub.py::refgemma.hub.find_model` `tests/strangers/test_page.py::test_x[1-2]` |",
    ]
    assert problems(head + right[0]) == []
    assert problems(head + right[1]) == ["b: there is no tests/strangers/test_page.py::test_x"]
