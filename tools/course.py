"""Build the notebooks for a course: executed, as slides, as sheets for nbgrader, and as masters for Otter.

    pip install ".[notebooks]"                  nbconvert comes with JupyterLab
    python tools/course.py build/course         write executed/, slides/, sheets/ and masters/
    python tools/course.py build/course --only sheets 01 04

The folder is not for git. tests/test_course.py checks the sheets, masters and slides. nbgrader's own validator has
accepted the sheets, and its autograder gave a solution all points and a stub none. Otter 7.0.0 has accepted the
masters:
`otter assign` runs the solution of each. For notebook 4, `otter run` gave the solution 2 of 2 points and the stub none.
"""

from __future__ import annotations

import argparse
import copy
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
KINDS = ("executed", "slides", "sheets", "masters")
EXERCISE = re.compile(r"^exercises\.check_(\w+)\(\1\)$", re.MULTILINE)
SOLUTION = re.compile(r"<summary>Solution</summary>\n+```python\n(.*?)```", re.DOTALL)


def split_slides(notebook: Any) -> Any:
    """Return a notebook in which each heading and each question begins a slide, and an answer follows its question.

    A heading goes to the right, a question and a code cell go down; an answer appears on the slide of its question.
    """
    made = nbformat.v4.new_notebook(metadata=copy.deepcopy(notebook.metadata))
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            made.cells.append(copy.deepcopy(cell))
            made.cells[-1].metadata["slideshow"] = {"slide_type": "subslide"}
            continue
        for part in re.split(r"\n(?=##? |\*\*Question|<details>)", cell.source):
            kind = "slide" if part.startswith("#") else "fragment" if part.startswith("<details>") else "subslide"
            made.cells.append(nbformat.v4.new_markdown_cell(part.strip(), metadata={"slideshow": {"slide_type": kind}}))
    return made


def grade(name: str, **flags: bool | int) -> dict[str, Any]:
    """Return the metadata by which nbgrader knows a cell."""
    usual = {"grade": False, "locked": False, "solution": False, "task": False, "schema_version": 3}
    return {"nbgrader": usual | {"grade_id": name} | flags}


def replace_exercises(notebook: Any, make_cells: Callable[[str, str], list[Any]]) -> Any:
    """Return a notebook without solutions; `make_cells` gets the name and the code of an exercise, and returns its
    cells."""
    made = nbformat.v4.new_notebook(metadata=copy.deepcopy(notebook.metadata))
    for cell in notebook.cells:
        exercise = EXERCISE.search(cell.source) if cell.cell_type == "code" else None
        if exercise:
            made.cells += make_cells(exercise[1], EXERCISE.sub("", cell.source).strip())
        elif not SOLUTION.search(cell.source):
            made.cells.append(copy.deepcopy(cell))
    return made


def write_test(name: str) -> str:
    """Return the code of an exercise's graded test."""
    return f"from refgemma.teach import exercises\n\nexercises.require(exercises.check_{name}({name}))"


def make_sheet(notebook: Any) -> Any:
    """Return a notebook for students: no solutions, and two cells for each exercise, the answer and its graded test."""

    def make_cells(name: str, answer: str) -> list[Any]:
        test = grade(f"test_{name}", grade=True, locked=True, points=1)
        return [
            nbformat.v4.new_code_cell(answer, metadata=grade(name, solution=True)),
            nbformat.v4.new_code_cell(write_test(name), metadata=test),
        ]

    return replace_exercises(notebook, make_cells)


def mark_solution(code: str, name: str) -> str:
    """Return a solution in which Otter replaces the body of the function `name` for students."""
    before, head, rest = re.split(rf"(^def {name}\(.*\n)", code, flags=re.MULTILINE)
    body = re.match(r"(?:    .*\n|\n)+", rest)
    if body is None:
        raise ValueError(f"the solution of {name} has no body")
    after = rest[body.end() :]
    return f"{before}{head}    # BEGIN SOLUTION\n{body[0].rstrip()}\n    # END SOLUTION\n{after}".rstrip()


def make_master(notebook: Any) -> Any:
    """Return a master notebook for `otter assign`, in which each exercise is a question of one point."""
    solutions = iter([match[1] for cell in notebook.cells if (match := SOLUTION.search(cell.source))])

    def make_cells(name: str, _: str) -> list[Any]:
        return [
            nbformat.v4.new_raw_cell(f"# BEGIN QUESTION\nname: {name}\npoints: 1"),
            nbformat.v4.new_raw_cell("# BEGIN SOLUTION"),
            nbformat.v4.new_code_cell(mark_solution(next(solutions), name)),
            nbformat.v4.new_raw_cell("# END SOLUTION"),
            nbformat.v4.new_raw_cell("# BEGIN TESTS"),
            nbformat.v4.new_code_cell(write_test(name)),
            nbformat.v4.new_raw_cell("# END TESTS"),
            nbformat.v4.new_raw_cell("# END QUESTION"),
        ]

    made = replace_exercises(notebook, make_cells)
    made.cells.insert(0, nbformat.v4.new_raw_cell("# ASSIGNMENT CONFIG\nexport_cell: false\ngenerate:\n  pdf: false"))
    return made


def execute(notebook: Any) -> Any:
    """Return the notebook with the outputs of a run."""
    from nbclient import NotebookClient

    made = copy.deepcopy(notebook)
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    NotebookClient(made, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new files are written here; others stay")
    parser.add_argument("notebooks", nargs="*", help="their numbers, such as 01; default: all")
    parser.add_argument("--only", choices=KINDS, action="append", help="one of the four; may be repeated")
    parser.add_argument(
        "--reveal", default="https://unpkg.com/reveal.js@^4", help="reveal.js for the slides: URL, folder"
    )
    args = parser.parse_intermixed_args(arguments)
    sources = [path for path in sorted(NOTEBOOKS.glob("*.py")) if not args.notebooks or path.stem[:2] in args.notebooks]
    if not sources:
        sys.exit(f"there is no notebook {' '.join(args.notebooks)}; give numbers such as 01")
    for kind in args.only or KINDS:
        target = args.folder / kind
        shutil.copytree(NOTEBOOKS / "pictures", target / "pictures", dirs_exist_ok=True)
        for path in sources:
            notebook = jupytext.read(path)
            if kind in ("sheets", "masters"):
                made = make_sheet(notebook) if kind == "sheets" else make_master(notebook)
                nbformat.write(made, target / f"{path.stem}.ipynb")
                continue
            run = execute(notebook if kind == "executed" else split_slides(notebook))
            if kind == "executed":
                nbformat.write(run, target / f"{path.stem}.ipynb")
                continue
            from nbconvert import SlidesExporter

            page, _ = SlidesExporter(reveal_url_prefix=args.reveal).from_notebook_node(run)
            (target / f"{path.stem}.slides.html").write_text(page, "utf-8")
            print(f"{kind}: {path.stem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
