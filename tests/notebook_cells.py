"""Read the notebooks for tests: their prose, and the variables after each code cell."""

import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
BY_NUMBER = {int(path.stem[:2]): path for path in SOURCES}

plt.switch_backend("agg")


@cache
def cells(number: int) -> list[Any]:
    return list(jupytext.read(BY_NUMBER[number]).cells)


@cache
def prose(number: int) -> str:
    """Return all text of a notebook, with one space between words."""
    return " ".join(" ".join(cell.source for cell in cells(number) if cell.cell_type == "markdown").split())


@cache
def answers(number: int) -> list[str]:
    return re.findall(r"<details><summary>Answer</summary>(.*?)</details>", prose(number))


def solutions(number: int) -> list[str]:
    """Return the code of the folded solutions of a notebook's exercises."""
    text = "\n".join(cell.source for cell in cells(number) if cell.cell_type == "markdown")
    return re.findall(r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n\n</details>", text, re.DOTALL)


@cache
def run(number: int) -> dict[str, dict[str, Any]]:
    """Run a notebook; return the variables after each code cell."""
    snapshots = {}
    sys.modules["notebook"] = type(sys)("notebook")  # as a module: Hypothesis asks where a function is defined
    names = vars(sys.modules["notebook"])
    try:
        for place, cell in enumerate(cells(number)):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{BY_NUMBER[number].name}, cell {place}", "exec"), names)
                snapshots[cell.source] = dict(names)
    finally:
        del sys.modules["notebook"]
        plt.close("all")
    return snapshots


def after(number: int, line: str) -> SimpleNamespace:
    """Return the variables after the cell that contains `line`."""
    found = [names for cell, names in run(number).items() if line in cell]
    assert len(found) == 1, f"{len(found)} cells of notebook {number} contain {line!r}"
    return SimpleNamespace(**{name: value for name, value in found[0].items() if not name.startswith("__")})
