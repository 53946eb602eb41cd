"""Test the programs of tools/ that count, on small examples that can be counted by eye."""

import ast
from pathlib import Path

import mutation
import pytest
from measure import circles, code_lines, duplicate_names, fixed_lines, imports, measure, participles, rooms
from mutation import FAST_TESTS, Mutant, Result, code, problems, table, total

PROGRAM = '''"""A file.

With two more lines of documentation."""

import os  # one


# a comment
class Class:
    """No code."""

    value = (
        1,  # four lines of code, whatever is written beside them

    )

    def method(self):
        "A docstring in other quotes."
        return """a text
that is code"""
'''


def test_code_lines_are_counted() -> None:
    assert code_lines(PROGRAM) == len(["import", "class", "value", "1", ")", "def", "return", "that"])
    assert code_lines('x = 1\n"""A string, where no docstring is."""\n') == 2
    assert code_lines("") == 0


def parsed(**texts: str) -> dict[str, ast.Module]:
    return {f"{name.replace('__', '/')}.py": ast.parse(text) for name, text in texts.items()}


def test_names_of_two_files_are_found() -> None:
    trees = parsed(a="def f(): ...\nX: int = 1\n__all__ = []", b="X = 2\nclass g: ...", c__d="def f():\n    g = 1")
    assert duplicate_names(trees) == {"X": ["a.py", "b.py"], "f": ["a.py", "c/d.py"]}


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"a": "import p.b", "b": "def late():\n    from p.a import x"}, [["a.py", "b.py"]]),
        ({"a": "from p import b", "b": "from . import a"}, [["a.py", "b.py"]]),
        ({"r__a": "from ..b import x", "b": "from p.r import c", "r__c": "from .a import y"},
         [["b.py", "r/a.py", "r/c.py"]]),
        ({"a": "from p.b import x", "b": "import numpy", "c": "from p.a import y"}, []),
    ],
)  # fmt: skip
def test_circles_are_found(texts: dict[str, str], found: list[list[str]]) -> None:
    packages = {"__init__.py": ast.parse(""), "r/__init__.py": ast.parse("")}
    assert circles(imports(parsed(**texts) | packages, "p")) == found


def test_participles_are_found() -> None:
    text = """
def judged(): ...
def told(): ...
def judge(): ...
def read(): ...
def embed(): ...
def rounded_to_bf16(): ...
class A:
    @property
    def kept(self): ...
    def _given(self): ...
"""
    assert participles(ast.parse(text)) == ["judged", "told", "_given"]


def test_a_folder_is_measured(tmp_path: Path) -> None:
    (tmp_path / "p" / "room").mkdir(parents=True)
    (tmp_path / "p" / "ops.py").write_text("import p.room.one\nx = 1\n")
    (tmp_path / "p" / "room" / "one.py").write_text('"""A."""\nimport p.ops\nx = 1\ndef made(): ...\n')
    counts = {row: count for row, (count, _) in measure(tmp_path / "p").items()}
    assert list(counts.values()) == [5, 2, 2, 1, 1, 1, 1, 1]


def test_imports_and_signatures_are_counted() -> None:
    text = """
import os
from a import (
    b,
)
__all__ = ["f"]

@decorated
def f(
    x,
):
    return x

class A:
    x = 1
"""
    assert fixed_lines(ast.parse(text)) == len(["import", "from", "b", ")", "all", "@", "def", "x", "):", "class"])


def test_rooms_are_counted(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "ops.py").write_text("import os\nx = 1\n")
    (tmp_path / "layers.py").write_text("y = 1\n")
    (tmp_path / "room" / "one.py").write_text("def f():\n    x = 1\n    y = 2\n    return x + y\n")
    assert rooms(tmp_path) == {"room": (1, 4, 1), "files at the top": (2, 3, 1)}


# --- mutation testing -------------------------------------------------------------------------------------------------


def test_the_modules_and_tests_of_the_core_exist() -> None:
    assert {"ops", "layers", "model"} <= set(FAST_TESTS)
    assert all(tests and all((mutation.ROOT / test).is_file() for test in tests) for tests in FAST_TESTS.values())


def test_the_arguments_are_given() -> None:
    assert all(because.strip() for argued in mutation.read_arguments().values() for because in argued.values())


def test_what_is_missing_or_stale_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Mutant("linear", "y = x", "y = None"), Mutant("linear", "a", "b")
    results = {module: Result(mutation.sha256(module), 10, [one]) for module in FAST_TESTS}
    argued = {module: {one: "the same"} for module in FAST_TESTS}
    assert problems(results, argued) == []
    assert problems({k: v for k, v in results.items() if k != "layers"}, argued) == [
        "layers: not measured; run it",
        "stale: no results for layers",
    ]
    assert problems(results, argued | {"ops": {}}) == [f"not argued: ops.{one}"]
    assert problems(results, argued | {"ops": {one: "?", other: "?"}}) == [f"stale: ops.{other} does not survive"]
    monkeypatch.setattr(mutation, "code", lambda text: code(text).replace("np.tanh", "np.sinh"))
    assert problems(results, argued) == ["ops: the results are from an earlier version; run it again"]


def test_the_score_is_the_share_that_is_found() -> None:
    results = {"a": Result("", 10, [Mutant("f", "x", "y")]), "b": Result("", 30)}
    assert (results["a"].score, total(results).score) == (0.9, 0.975)
    assert table(results).splitlines()[-1] == "| all | 40 | 39 | 1 | 97.5% |"


def test_results_outlive_other_words() -> None:
    before = '"""A."""\n\n\ndef f(x):\n    """B."""\n    return x + 1  # why\n'
    after = '"""Other\nwords."""\n\ndef f(x):\n    # more\n    """C."""\n    return (\n        x + 1)\n'
    assert code(before) == "deff(x):returnx+1"
    assert code(after) == "deff(x):return(x+1)"
    assert code(before) != code(before.replace("+ 1", "+ 2"))
