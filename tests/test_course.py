"""The tool that builds executed notebooks, slides and sheets, and the checks for graded assignments."""

import re
from pathlib import Path
from typing import Any

import course
import jupytext
import nbformat
import numpy as np
import pytest
from notebook_cells import SOURCES

from refgemma.errors import RefgemmaError
from refgemma.teach import exercises
from refgemma.teach.exercises import grading, solutions


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_sheet_has_no_solution_and_a_test_for_each_exercise(path: Any) -> None:
    notebook = jupytext.read(path)
    sheet = course.make_sheet(notebook)
    nbformat.validate(sheet)
    text = "\n".join(cell.source for cell in sheet.cells)
    names = [match[1] for cell in notebook.cells if (match := course.EXERCISE.search(cell.source))]
    assert "<summary>Solution</summary>" not in text
    assert not course.EXERCISE.search(text)
    marks = [cell.metadata["nbgrader"] for cell in sheet.cells if "nbgrader" in cell.metadata]
    assert [mark["grade_id"] for mark in marks] == [part for name in names for part in (name, f"test_{name}")]
    assert [mark["solution"] for mark in marks] == [True, False] * len(names)
    assert [mark.get("points") for mark in marks] == [None, 1] * len(names)
    for place, cell in enumerate(sheet.cells):
        if cell.metadata.get("nbgrader", {}).get("grade"):
            with pytest.raises(exercises.Unsolved, match="nothing is written yet"):
                exec(f"{sheet.cells[place - 1].source}\n{cell.source}", {})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_master_has_a_question_for_each_exercise(path: Any) -> None:
    """Otter replaces what is between BEGIN SOLUTION and END SOLUTION by dots in the notebook of the students."""
    notebook = jupytext.read(path)
    master = course.make_master(notebook)
    nbformat.validate(master)
    names = [match[1] for cell in notebook.cells if (match := course.EXERCISE.search(cell.source))]
    sources = [cell.source for cell in master.cells]
    starts = [place for place, source in enumerate(sources) if source.startswith("# BEGIN QUESTION")]
    assert [sources[place] for place in starts] == [f"# BEGIN QUESTION\nname: {name}\npoints: 1" for name in names]
    for place, name in zip(starts, names, strict=True):
        _, begin, solution, end, begin_tests, test, end_tests, end_question = sources[place : place + 8]
        assert [begin, end, begin_tests] == ["# BEGIN SOLUTION", "# END SOLUTION", "# BEGIN TESTS"]
        assert [end_tests, end_question] == ["# END TESTS", "# END QUESTION"]
        stub = re.sub(r"    # BEGIN SOLUTION\n.*?    # END SOLUTION", "    ...", solution, flags=re.DOTALL)
        assert f"def {name}(" in stub
        assert not any(line.startswith("    ") for line in stub.splitlines() if line.strip() != "...")
        assert test.endswith(f"exercises.require(exercises.check_{name}({name}))")
        exec(f"{solution}\n{test}", {})  # the solution of the notebook is right
        with pytest.raises(exercises.Unsolved):
            exec(f"{stub}\n{test}", {})


def test_the_sheets_are_written(tmp_path: Path) -> None:
    assert course.main([str(tmp_path), "--only", "sheets", "04", "12"]) == 0
    assert sorted(path.name for path in (tmp_path / "sheets").glob("*.ipynb")) == [
        "04_soft_caps.ipynb", "12_tokenizer.ipynb",
    ]  # fmt: skip
    assert (tmp_path / "sheets" / "pictures" / "model-04.svg").is_file()
    assert course.main([str(tmp_path), "--only", "masters", "04"]) == 0
    assert "# BEGIN TESTS" in (tmp_path / "masters" / "04_soft_caps.ipynb").read_text("utf-8")
    with pytest.raises(SystemExit, match="there is no notebook 99; give numbers such as 01"):
        course.main([str(tmp_path), "99"])


def test_slides_have_real_sections() -> None:
    slides = course.split_slides(jupytext.read(SOURCES[3]))
    nbformat.validate(slides)
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in slides.cells]
    headings = [cell.source for cell in slides.cells if cell.source.startswith("#") and cell.cell_type == "markdown"]
    assert kinds.count("slide") == len(headings) >= 6
    for place, cell in enumerate(slides.cells):
        if cell.source.startswith("<details><summary>Answer"):
            assert kinds[place] == "fragment"
            assert slides.cells[place - 1].source.startswith("**Question.**")
            assert "</details>" in cell.source
    assert max(cell.source.count("## ") for cell in slides.cells) == 1


# --- graded checks ----------------------------------------------------------------------------------------------------


def test_require_raises_the_feedback() -> None:
    right = exercises.check_soft_cap(solutions.soft_cap)
    wrong = exercises.check_soft_cap(lambda x, cap: x)
    exercises.require()
    exercises.require(right, right)
    with pytest.raises(exercises.Unsolved) as raised:
        exercises.require(right, wrong)
    assert str(raised.value) == wrong.message
    assert isinstance(raised.value, AssertionError)
    assert isinstance(raised.value, RefgemmaError)
    with pytest.raises(exercises.Unsolved, match="takes the result of a check, not function"):
        exercises.require(solutions.soft_cap)


def rewrite(name: str) -> Any:
    """The solution as a student's own function."""

    def answer(*arguments: Any) -> Any:
        return getattr(solutions, name)(*arguments)

    answer.__name__ = name
    return answer


@pytest.mark.parametrize("name", grading.INPUTS)
def test_a_right_answer_passes_with_every_seed(name: str) -> None:
    for seed in range(5):
        feedback = exercises.check_seeded(rewrite(name), seed)
        assert feedback, feedback


@pytest.mark.parametrize("name", grading.INPUTS)
def test_results_of_another_seed_do_not_pass(name: str) -> None:
    other = getattr(solutions, name)(*grading.INPUTS[name](np.random.default_rng(1)))
    refused = [not exercises.check_seeded(lambda *arguments: other, seed, name) for seed in range(2, 12)]
    assert sum(refused) >= 9  # a mask of few keys can be the same by chance


def test_a_wrong_answer_is_found_on_drawn_inputs() -> None:
    cut = exercises.check_seeded(lambda x, cap: np.clip(x, -cap, cap), 3, "soft_cap")
    assert "drawn with seed 3" in cut.message
    assert not exercises.check_seeded(lambda x, weight, eps: solutions.rms_norm(x, weight - 1, eps), 3, "rms_norm")
    almost = exercises.check_seeded(lambda x: solutions.gelu_tanh(x) + 1e-4, 3, "gelu_tanh")
    assert not almost


def test_the_solution_itself_is_refused() -> None:
    assert "write the function yourself" in exercises.check_seeded(solutions.soft_cap, 1).message


@pytest.mark.parametrize("name", ["parameters", "", "soft_caps"])
def test_an_exercise_without_drawn_inputs_is_named(name: str) -> None:
    with pytest.raises(exercises.SeedError, match=r"no inputs are drawn for .*; the exercises are embed, "):
        exercises.check_seeded(lambda: None, 1, name)
