"""Check that the reference shows every public name, and that docstrings list the errors that functions raise. Ruff's D
rules and `numpydoc lint` check the form of docstrings."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import refgemma

API = Path(__file__).parents[1] / "docs" / "reference" / "api"
DIRECTIVE = re.compile(r"automodule:: (\S+)\n   :members:(.*)")


def members(module: Any, listed: str) -> Iterator[tuple[str, Any]]:
    """Yield the functions and classes that ``automodule`` shows, with their names there. (Hypothesis renames
    strategies.)"""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    names = [name.strip() for name in listed.split(",")] if listed.strip() else getattr(module, "__all__", own)
    for name in names:
        value = getattr(module, name)
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def shown() -> Iterator[tuple[str, Any]]:
    """Yield the functions, classes, methods and properties of the reference, by full name."""
    for path in sorted(API.glob("*.md")):
        for module, listed in DIRECTIVE.findall(path.read_text("utf-8")):
            for own_name, value in members(importlib.import_module(module), listed):
                name = f"{value.__module__}.{own_name}"
                yield name, value
                for inner, method in vars(value).items() if inspect.isclass(value) else ():
                    function = getattr(method, "__func__", getattr(method, "fget", method))
                    if inspect.isfunction(function) and not inner.startswith("_"):
                        yield f"{name}.{inner}", function


SHOWN = dict(shown())


def raised(function: Any) -> set[str]:
    """Return the exceptions that a function's own lines raise; functions that it calls are not searched."""
    try:
        tree: ast.AST = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except OSError:  # a strategy that Hypothesis made of a function: that one, as its file has it
        file = ast.parse(inspect.getsource(inspect.getmodule(function)))  # type: ignore[arg-type]
        tree = next(node for node in file.body if getattr(node, "name", "") == function.__name__)
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_the_reference_shows_something() -> None:
    expected = {"refgemma.ops.softmax", "refgemma.cache.Cache.crop", "refgemma.modeling.classes.Gemma2ForCausalLM"}
    assert expected <= set(SHOWN)
    assert sum("InputError" in raised(function) for function in SHOWN.values()) > 10  # the next test can fail


def test_every_public_name_is_shown() -> None:
    for name in refgemma.__all__:
        value = getattr(refgemma, name)
        assert f"{value.__module__}.{value.__qualname__}" in SHOWN, name


@pytest.mark.parametrize("name", [name for name, value in SHOWN.items() if not inspect.isclass(value)])
def test_a_docstring_says_what_is_raised(name: str) -> None:
    doc = inspect.getdoc(SHOWN[name]) or ""
    assert {error for error in raised(SHOWN[name]) if error not in doc} == set()
