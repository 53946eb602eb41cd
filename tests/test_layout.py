"""Test the layout beyond `lint-imports`: the cost of an import, the amount of code in the sitting read, and that this
checkout is tested. The layers of imports are in pyproject.toml."""

import importlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import conftest
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from measure import code_lines

import refgemma
from refgemma.errors import MOVED
from refgemma.ops import rms_norm

# Of the checkout, not of what is installed: these tests are about the source.
PACKAGE = Path(__file__).parents[1] / "refgemma"

# Someone who wants to read one Gemma 2 in NumPy should not wait for these, nor need to have them.
HEAVY = {"matplotlib", "torch", "transformers"}

FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
MODULES = [f"refgemma.{file.removesuffix('.py').replace('/', '.')}" for file in FILES if "__" not in file]

# Imports what it is given, and prints which of HEAVY was asked for, also by what others import. A finder that is asked
# first notes the attempt even where nothing is installed.
SPY = f"""
import importlib, sys
asked = set()
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            asked.add(name)
sys.meta_path.insert(0, Spy())
for name in sys.argv[1:]:
    importlib.import_module(name)
print(sorted(asked))
"""


@pytest.mark.parametrize(
    ("modules", "asked"),
    [
        pytest.param(["refgemma"], [], id="refgemma"),
        pytest.param(MODULES, [], id="every module"),
        pytest.param(["refgemma", "refgemma.teach.viz", "matplotlib"], ["matplotlib"], id="the spy sees one"),
    ],
)
def test_importing_refgemma_imports_nothing_heavy(modules: list[str], asked: list[str]) -> None:
    command = [sys.executable, "-c", SPY, *modules]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    assert (run.stdout.strip(), run.stderr) == (str(asked), "")


def test_every_folder_is_a_package() -> None:
    # Without its __init__.py a folder's files are imported by pytest under other names, and their shapes go unchecked.
    folders = {Path(file).parent.as_posix() for file in FILES}
    assert folders <= {Path(file).parent.as_posix() for file in FILES if file.endswith("__init__.py")}


def test_no_two_files_have_one_name() -> None:
    """A reader names a file without its folder."""
    files = Counter(path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in files.items() if count > 1] == []


def test_the_model_is_read_in_one_sitting() -> None:
    # Code only: explanation is what makes it readable, and costs nothing here.
    lines = {name: code_lines((PACKAGE / f"{name}.py").read_text("utf-8")) for name in ("ops", "layers", "model")}
    assert sum(lines.values()) <= 300, lines  # what docs/architecture.md promises the reader


def test_the_checkout_is_what_is_tested() -> None:
    # Another refgemma, installed from a wheel, would be tested in its place without a word.
    assert Path(refgemma.__file__).parent == PACKAGE, 'pip install -e ".[test]" installs this checkout'


@pytest.mark.skipif(os.environ.get("REFGEMMA_CHECK_SHAPES") == "0", reason="REFGEMMA_CHECK_SHAPES=0 turns them off")
def test_shapes_are_checked_in_this_run() -> None:
    # Every other test relies on the hook in conftest.py; were it to stop working, they would still pass.
    with pytest.raises(TypeCheckError):
        rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)


@pytest.mark.skipif(os.environ.get("REFGEMMA_CHECK_SHAPES") == "0", reason="REFGEMMA_CHECK_SHAPES=0 turns them off")
def test_the_first_calls_of_a_test_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "CHECKS", 4)  # two calls
    conftest.pytest_runtest_logstart()
    rms_norm(np.ones((2, 3)), np.ones(3), 1e-6)
    with pytest.raises(TypeCheckError):
        rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)
    rms_norm(np.ones((2, 3)), np.ones(3), 1e-6)
    with pytest.raises(ValueError, match="broadcast"):  # NumPy's own error
        rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)
    conftest.pytest_runtest_logstart()
    with pytest.raises(TypeCheckError):
        rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)


@pytest.mark.parametrize("old", MOVED)
def test_a_module_of_an_earlier_version_says_its_present_name(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"^refgemma.{old} is now refgemma.{MOVED[old]}$"):
        importlib.import_module(f"refgemma.{old}")
    importlib.import_module(f"refgemma.{MOVED[old]}")
