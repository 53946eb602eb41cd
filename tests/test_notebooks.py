"""Test the notebooks: each runs from top to bottom, has the common parts, and has an up-to-date .ipynb."""

import re
import shutil
from pathlib import Path
from typing import Any

import jupytext
import jupytext.cli
import nbformat
import pytest
from notebook_cells import BY_NUMBER, FOLDER, SOURCES, run, solutions

from refgemma import layers, model, ops
from refgemma.teach import exercises

pytestmark = pytest.mark.slow

WORD_PAGE = FOLDER.parent / "docs" / "tutorial" / "index.md"
AGAIN = "jupytext --update --to ipynb notebooks/*.py"  # after editing a .py


def name(path: Path) -> str:
    return path.stem


def test_each_has_a_number_of_its_own() -> None:
    assert [*BY_NUMBER] == [*range(1, 17)]
    assert len(BY_NUMBER) == len(SOURCES)
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_pair_is_in_step(path: Path) -> None:
    source = jupytext.read(path)
    paired = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in paired.cells] == [(c.cell_type, c.source) for c in source.cells], AGAIN
    for cell in paired.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_a_save_in_jupyter_does_not_rewrite_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A notebook with jupytext's `formats` would be paired: a student's save would write the .py as well.
    source, paired = (shutil.copy(SOURCES[0].with_suffix(suffix), tmp_path) for suffix in (".py", ".ipynb"))
    notebook = nbformat.read(paired, as_version=4)
    notebook.cells[0].source = "My own title"
    nbformat.write(notebook, paired)
    jupytext.cli.jupytext(["--sync", str(paired)])
    assert "is not a paired notebook" in capsys.readouterr().err
    assert Path(source).read_bytes() == SOURCES[0].read_bytes()
    for path in SOURCES:
        assert "formats" not in nbformat.read(path.with_suffix(".ipynb"), as_version=4).metadata.get("jupytext", {})


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
    assert [line for cell in code for line in cell.splitlines() if len(line) > 88] == []  # ruff.toml beside them


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_solution_is_folded_under_each_exercise(path: Path) -> None:
    exercise = re.compile(r"^exercises\.check_(\w+)\(\1\)$", re.MULTILINE)
    cells = jupytext.read(path).cells
    found = solutions(int(path.stem[:2]))
    names = [(place, match[1]) for place, cell in enumerate(cells) if (match := exercise.search(cell.source))]
    for (place, name_of), code in zip(names, found, strict=True):
        assert cells[place + 1].source.startswith("<details><summary>Solution</summary>")
        assert max(len(line) for line in code.splitlines()) <= 88
        variables: dict[str, Any] = {}
        exec(code, variables)
        feedback = getattr(exercises, f"check_{name_of}")(variables[name_of])
        assert feedback, feedback


def raw_markdown(cell: str) -> list[str]:
    """Return Markdown and TeX inside folded HTML, where a page shows the signs; after an empty line they work."""
    folded = re.findall(r"<details>(.*?)(?:</details>|\n\n)", cell, re.DOTALL)
    return [mark for text in folded for mark in re.findall(r"\$[^$\n]*\$|\*+\w[^*]*\*|`[^`\n]*`", text)]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_answers_are_html(path: Path) -> None:
    assert [mark for cell in prose_of(path) for mark in raw_markdown(cell)] == []


def test_raw_markdown_is_seen() -> None:
    answer = "<details><summary>Answer</summary>\nThe **ports** take $a^2$, not `b`.\n</details>"
    assert raw_markdown(answer) == ["**ports*", "$a^2$", "`b`"]
    assert raw_markdown("<details><summary>Solution</summary>\n\n`x`\n\n</details>") == []


LAYERS = {name for module in (ops, layers, model) for name in vars(module) if not name.startswith("_")}


def written_again(cells: list[str]) -> list[str]:
    """Return the functions of the model that cells define outside exercises."""
    return [
        function
        for cell in cells
        for function in re.findall(r"^(?:def|class) (\w+)", cell, re.MULTILINE)
        if function in LAYERS and f"exercises.check_{function}({function})" not in cell
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_layer_is_written_again_but_in_an_exercise(path: Path) -> None:
    assert written_again([cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]) == []


def test_a_layer_that_is_written_again_is_seen() -> None:
    cell = "def soft_cap(x, cap):\n    return x\n"
    assert written_again([cell, cell + "\n\nexercises.check_soft_cap(soft_cap)"]) == ["soft_cap"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_it_runs(path: Path) -> None:
    assert run(int(path.stem[:2]))


def test_what_is_not_in_step_is_seen(tmp_path: Path) -> None:
    copy = tmp_path / SOURCES[0].name
    text = SOURCES[0].read_text("utf-8")
    copy.write_text(text.replace("# 1. One token", "# 1. Two tokens"), "utf-8")
    copy.with_suffix(".ipynb").write_bytes(SOURCES[0].with_suffix(".ipynb").read_bytes())
    with pytest.raises(AssertionError):
        test_the_pair_is_in_step(copy)


COURSE = (FOLDER.parent / "docs" / "how-to" / "teach-a-course.md").read_text("utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_page_for_teachers_has_its_row(path: Path) -> None:
    (row,) = [line for line in COURSE.splitlines() if line.startswith("| [") and f"/{path.stem}.ipynb)" in line]
    _, title, objective, minutes, difficulty, tasks, papers, _ = row.split("|")
    assert title.split("]")[0].strip().startswith(f"[{int(path.stem[:2])} ")
    assert 30 <= int(minutes) <= 90
    assert int(difficulty) in (1, 2, 3)
    assert len(objective.split()) >= 5
    found = re.findall(r"^exercises\.check_(\w+)\(\1\)$", path.read_text("utf-8"), re.MULTILINE)
    assert re.findall(r"`(\w+)`", tasks) == found
    links = re.findall(r"\((https://[^)]+)\)", papers)
    text = "\n".join(prose_of(path))
    assert links
    assert [link for link in links if link not in text] == []


# --- words ------------------------------------------------------------------------------------------------------------

# What docs/tutorial/index.md says: word -> the notebook that explains it.
WORDS = {
    word: int(number)
    for number, words in re.findall(r"^\| (\d+) \| (.*) \|$", WORD_PAGE.read_text("utf-8"), re.MULTILINE)
    for word in words.split(", ")
}
# Everyday words as well, which mean nothing special in an earlier notebook.
EVERYDAY = {"heads", "key", "value", "full", "query", "mask", "rounded", "property", "float32"}


def prose_of(path: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "markdown"]


def used_too_early(word: str, explained: int, notebook: int, cells: list[str]) -> list[str]:
    """Return cells of an earlier notebook that use a word without a reference to its explanation."""
    said = re.compile(rf"\b{word.removesuffix('s')}s?\b", re.IGNORECASE)
    if notebook >= explained or word in EVERYDAY:
        return []
    pointer = re.compile(rf"notebook\s+{explained}\b", re.IGNORECASE)
    return [cell for cell in cells if said.search(cell) and not pointer.search(cell)]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_explained_where_the_index_says(word: str) -> None:
    prose = "\n".join(prose_of(BY_NUMBER[WORDS[word]]))
    set_off = rf"\*{re.escape(word)}\*|<b>{re.escape(word)}</b>"
    assert re.search(set_off, " ".join(prose.split())), "a word is set off where it is explained"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_word_is_used_before_it_is_explained(path: Path) -> None:
    number = int(path.stem[:2])
    early = {
        word: found for word, where in WORDS.items() if (found := used_too_early(word, where, number, prose_of(path)))
    }
    assert early == {}


def test_a_word_used_too_early_is_seen() -> None:
    assert used_too_early("perplexity", 8, 7, ["Its perplexity is 9."]) == ["Its perplexity is 9."]
    assert used_too_early("perplexity", 8, 7, ["Its perplexity (notebook 8) is 9."]) == []
    assert used_too_early("blocks", 1, 7, ["A block."]) == []
