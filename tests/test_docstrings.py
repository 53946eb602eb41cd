"""Every name that the reference shows: what it is, its arguments and shapes, what it raises, and an example."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import refgemma
from refgemma import shapes

SHAPES = {name for name in vars(shapes) if name[0].isupper()}  # Hidden, Scores ...: each is an array with named axes
API = Path(__file__).parents[1] / "docs" / "reference" / "api"
DIRECTIVE = re.compile(r"automodule:: (\S+)\n   :members:(.*)")

# What cannot be run here, and where it is.
PYTORCH = "needs PyTorch; tests/parity has it"
WITHOUT_EXAMPLE = {
    "refgemma.trace.capture.capture_transformers": PYTORCH,
    "refgemma.testing.adapters.Transformers": PYTORCH,
    "refgemma.testing.adapters.TransformersEager": PYTORCH,
    "refgemma.testing.adapters.TransformersSdpa": PYTORCH,
    "refgemma.testing.adapters.TransformersFlex": PYTORCH,
}


@dataclass(frozen=True)
class Shown:
    """A function, class, method or property of the reference."""

    name: str  # with its module
    kind: str  # function, class, method
    function: Any  # whose docstring and source it is
    page: str  # the text of its page

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""


def members(module: Any, listed: str) -> Iterator[tuple[str, Any]]:
    """The functions and classes that ``automodule`` shows, with their names there: Hypothesis renames a strategy."""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    names = [name.strip() for name in listed.split(",")] if listed.strip() else getattr(module, "__all__", own)
    for name in names:
        value = getattr(module, name)
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def shown() -> Iterator[Shown]:
    for path in sorted(API.glob("*.md")):
        page = path.read_text("utf-8")
        for module, listed in DIRECTIVE.findall(page):
            for own_name, value in members(importlib.import_module(module), listed):
                name = f"{value.__module__}.{own_name}"
                yield Shown(name, "class" if inspect.isclass(value) else "function", value, page)
                for inner, method in vars(value).items() if inspect.isclass(value) else ():
                    function = getattr(method, "__func__", getattr(method, "fget", method))
                    if inspect.isfunction(function) and not inner.startswith("_"):
                        yield Shown(f"{name}.{inner}", "method", function, page)


SHOWN = {item.name: item for item in shown()}


def tree(function: Any) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except OSError:  # a strategy that Hypothesis made of a function: that one, as its file has it
        file = ast.parse(inspect.getsource(inspect.getmodule(function)))
        return next(node for node in file.body if getattr(node, "name", "") == function.__name__)


def own_raises(function: Any) -> set[str]:
    """The exceptions that its own lines raise; in what it calls they are not looked for."""
    found = set()
    for node in ast.walk(tree(function)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
    return found


def arguments(function: Any) -> Iterator[tuple[str, str]]:
    """Names and annotations, as they are written."""
    definition = next(node for node in ast.walk(tree(function)) if isinstance(node, ast.FunctionDef))
    given = definition.args
    for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
        if argument.arg not in ("self", "cls", "draw"):
            yield argument.arg, ast.unparse(argument.annotation) if argument.annotation else ""


def explains_itself(annotation: str) -> bool:
    """Whether an argument's annotation, which the reference shows, has the words of its axes or a class of ours."""
    names = set(re.findall(r"\w+", annotation))
    classes = {name.rpartition(".")[2] for name, item in SHOWN.items() if item.kind == "class"}
    return bool(names & ({"Float", "Int", "Bool", *SHAPES} | classes))


def names(argument: str, item: Shown) -> bool:
    """Whether the docstring says the argument's name; or that of its file, or of a function that it refers to."""
    module = inspect.getdoc(inspect.getmodule(item.function)) or ""
    package = inspect.getdoc(importlib.import_module(item.name.rpartition(".")[0].rpartition(".")[0])) or ""
    others = [other.doc for other in SHOWN.values() if f"`{other.name.rpartition('.')[2]}`" in item.doc]
    texts = [item.doc, *(re.sub(r"[^`]*(`[^`]*`)?", r"\1 ", text) for text in (module, package)), *others]
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(argument)}(?![A-Za-z0-9])", text) for text in texts)


def problems(item: Shown) -> list[str]:
    """What is missing, a sentence each."""
    found: list[str] = []
    doc = item.doc
    if not re.match(r"\S.*", doc):
        return ["has no docstring"]
    if item.kind != "class":
        found += [f"raises {name}, which its docstring does not say" for name in own_raises(item.function)
                  if not re.search(rf"Raises\n-+\n(.*\n)*?.*\b{name}\b", doc + "\n")]  # fmt: skip
    if item.kind == "function":
        for name, annotation in arguments(item.function):
            if not explains_itself(annotation) and not names(name, item):
                found.append(f"does not say what {name} is")
    if item.kind != "method" and item.name not in WITHOUT_EXAMPLE and not is_exception(item.function):
        last = item.name.rpartition(".")[2]
        lines = re.findall(r"^ *(?:>>>|\.\.\.) .*", item.page, re.MULTILINE)
        if ">>>" not in doc and not any(re.search(rf"\b{last}\b", line) for line in lines):
            found.append("has no example, in its docstring or on its page")
    return found


def is_exception(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


# --- the maths --------------------------------------------------------------------------------------------------------

# What computes numbers of the model, or of what is made of them.
MATHS = [
    name
    for name, item in SHOWN.items()
    if item.kind == "function"
    and re.match(r"refgemma\.(ops|activations|heads)\.|refgemma\.layers\.(attention|block|feed_forward)$", name)
] + [f"refgemma.model.{name}" for name in ("embed", "unembed", "head", "forward")]
FORMULA = re.compile(r"``[^`]*([+*/@<=]| - |max\(|-log )[^`]*``|``x`` itself|`cross_entropy`")
SOURCE = re.compile(r"Source: |as in transformers")
ROUNDING = re.compile(r"precision|[Rr]ound|float32|float64")
EXACT = {"ops.causal_mask", "ops.sliding_mask", "heads.last_tokens"}  # their results are places, or true and false


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_has_its_formula_source_and_rounding(name: str) -> None:
    doc = SHOWN[name].doc
    assert FORMULA.search(doc), "a formula"
    assert SOURCE.search(doc), "the paper, or the other implementation"
    assert name.removeprefix("refgemma.") in EXACT or ROUNDING.search(doc), "what is rounded, and how often"


def test_the_reference_shows_something() -> None:
    assert len(SHOWN) > 200
    assert {"refgemma.ops.softmax", "refgemma.cache.Cache.crop", "refgemma.modeling.classes.Gemma2ForCausalLM"} <= set(
        SHOWN
    )


def test_every_public_name_is_shown() -> None:
    for name in refgemma.__all__:
        value = getattr(refgemma, name)
        assert f"{value.__module__}.{value.__qualname__}" in SHOWN, name


@pytest.mark.parametrize("name", SHOWN)
def test_a_docstring_is_whole(name: str) -> None:
    assert problems(SHOWN[name]) == []
