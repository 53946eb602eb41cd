"""The notebooks: each runs from top to bottom, has what every one of them has, and is paired with an .ipynb in step."""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
AGAIN = "jupytext --update --to ipynb notebooks/*.py"  # after editing a .py

plt.switch_backend("agg")


def name(path: Path) -> str:
    return path.stem


def test_there_are_eleven() -> None:
    assert [path.stem[:2] for path in SOURCES] == [f"{number:02d}" for number in range(1, 12)]
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_pair_is_in_step(path: Path) -> None:
    source = jupytext.read(path)
    paired = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in paired.cells] == [(c.cell_type, c.source) for c in source.cells], AGAIN
    for cell in paired.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_rhythm(path: Path) -> None:
    # An equation, at most 20 lines of code, a picture, a question; shapes asserted; at the end an exercise.
    cells = jupytext.read(path).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert prose.startswith(f"# {int(path.stem[:2])}. ")
    assert prose.count("$$") >= 4
    assert prose.count("**Question.**") == prose.count("<summary>Answer</summary>") >= 3
    assert sum(bool(re.search(r"assert .*shape", cell)) for cell in code) >= 5
    assert sum("axes" in cell or "viz." in cell for cell in code) >= 3
    assert re.search(r"^exercises\.check_\w+\(\w+\)$", code[-1], re.MULTILINE)
    assert {cell: len(cell.splitlines()) for cell in code if len(cell.splitlines()) > 20} == {}


@pytest.mark.timeout(60)  # the promise is 60 seconds for a notebook, in a kernel of its own
@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a module: Hypothesis asks where a function is defined.
    monkeypatch.setitem(sys.modules, "notebook", type(sys)("notebook"))
    names = vars(sys.modules["notebook"])
    for number, cell in enumerate(jupytext.read(path).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), names)
    plt.close("all")


def test_what_is_not_in_step_is_seen(tmp_path: Path) -> None:
    copy = tmp_path / SOURCES[0].name
    text = SOURCES[0].read_text("utf-8")
    copy.write_text(text.replace("# 1. One token", "# 1. Two tokens"), "utf-8")
    copy.with_suffix(".ipynb").write_bytes(SOURCES[0].with_suffix(".ipynb").read_bytes())
    with pytest.raises(AssertionError):
        test_the_pair_is_in_step(copy)
