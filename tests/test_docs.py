"""Test the pages of the site without building it: tables are current, examples run, formulas' roundings are counted,
and the link check finds faults. A step of .ci/run checks that the site builds without a warning."""

import doctest
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refgemma import layers, model, ops, precision
from refgemma.trace.names import trace_axes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
FORWARD = (DOCS / "explanation" / "forward.md").read_text("utf-8")

sys.path.insert(0, str(DOCS))
links, tables = importlib.import_module("links"), importlib.import_module("tables")


@pytest.mark.parametrize("name", tables.PAGES)
def test_the_tables_are_those_of_the_package(name: str) -> None:
    assert (DOCS / "reference" / f"{name}.md").read_text("utf-8") == tables.PAGES[name](), "python docs/tables.py"


def test_every_name_of_a_trace_has_a_meaning() -> None:
    assert all(0 < len(meaning) <= 80 for meaning in tables.meanings().values())  # one short phrase


def page_name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("path", [p for p in PAGES if "```pycon" in p.read_text("utf-8")], ids=page_name)
def test_the_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```(python|pycon)\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, path.name, "exec"), names)
        else:
            example = doctest.DocTestParser().get_doctest(block, names, path.name, path.name, 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            said: list[str] = []
            runner.run(example, out=said.append, clear_globs=False)
            assert not said, "".join(said)
            names = example.globs


def test_every_page_is_reached_from_an_index() -> None:
    listed = "\n".join((DOCS / part).read_text("utf-8") for part in ("how-to/index.md", "reference/index.md"))
    for path in PAGES:
        folder = path.relative_to(DOCS).parts[0]
        if folder in ("how-to", "reference") and path.name != "index.md":
            assert path.relative_to(DOCS / folder).with_suffix("").as_posix() in listed.split()


def test_commands_in_the_pages_exist() -> None:
    known = set(re.findall(r"^## refgemma (\w+)", tables.command_line(), re.MULTILINE))
    for path in PAGES:
        blocks = "\n".join(re.findall(r"```(?:console|text)\n(.*?)```", path.read_text("utf-8"), re.DOTALL))
        assert set(re.findall(r"^(?:\$ )?refgemma (\w+)", blocks, re.MULTILINE)) <= known, path


# --- the forward pass -------------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| `([\w.]+)` \| \{py:func\}`~([\w.]+)` \| (\d) \|$", re.MULTILINE)


def test_every_tensor_has_its_equation_in_order() -> None:
    inside = [name for name, _ in trace_axes()]
    named = [name for name, _, _ in ROW.findall(FORWARD)]
    assert sorted(named) == sorted(inside)
    order = [name for name in named if name not in ("cos", "sin", "embedded")]
    assert order == [name for name in inside if name not in ("cos", "sin", "embedded")]
    for _, function, _ in ROW.findall(FORWARD):
        module, _, attribute = function.rpartition(".")
        assert inspect.isfunction(getattr(importlib.import_module(module), attribute))


class Roundings:
    """Counts roundings of results: the calls of `_onto_grid` that change a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        usual = precision._onto_grid

        def counted(x: Any, kind: Any) -> Any:
            result = usual(x, kind)
            self.count += not np.array_equal(np.asarray(result), np.asarray(x, np.float64))
            return result

        monkeypatch.setattr(precision, "_onto_grid", counted)

    def of(self, compute: Callable[[], Any]) -> int:
        self.count = 0
        compute()
        return self.count


def test_the_roundings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, weight, table = (precision.bf16(rng.normal(size=size)) for size in ((1, 4, 6), 6, (9, 6)))
    q, k = (precision.bf16(rng.normal(size=(1, 2, 4, 6))) for _ in range(2))
    cos, sin = ops.rotary_tables(np.arange(4)[None], 6, 10.0, like=x)
    probs = ops.softmax(q @ k.swapaxes(-1, -2), np.tri(4, dtype=bool)[None, None])
    of = Roundings(monkeypatch).of
    counted = {
        "embedded": of(lambda: model.embed(np.array([[1, 2]]), table)) - 1,  # the factor is rounded, too
        "cos": of(lambda: ops.rotary_tables(np.arange(4)[None], 6, 10.0, like=x)) - 1,
        "sin": of(lambda: ops.rotary_tables(np.arange(4)[None], 6, 10.0, like=x)) - 1,
        "rms_norm": of(lambda: ops.rms_norm(x, weight, 1e-6)),
        "linear": of(lambda: ops.linear(x, table)),
        "unembed": of(lambda: model.unembed(x, table)),
        "rotate": of(lambda: ops.rotate(q, cos, sin)),
        "attention_scores": of(lambda: ops.attention_scores(q, k, 13**-0.5)),
        "soft_cap": of(lambda: ops.soft_cap(x, 3.0)),
        "softmax": of(lambda: ops.softmax(q @ k.swapaxes(-1, -2), np.tri(4, dtype=bool)[None, None])) - 1,
        "attention": of(lambda: layers.merge_heads(probs @ k)),
        "block": of(lambda: x + weight),
        "feed_forward": of(lambda: x * weight),
        "gelu_tanh": of(lambda: ops.gelu_tanh(x)),
    }
    for tensor, function, said in ROW.findall(FORWARD):
        assert int(said) == counted.get(tensor, counted.get(function.rpartition(".")[2])), tensor


# --- links and formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ('<a href="#gone">x</a>', "#gone has no such place"),
        ('<a href="other.html#gone">x</a>', "other.html#gone has no such place"),
        ('<script src="https://cdn.example.org/x.js"></script>', "fetches https://cdn.example.org/x.js"),
        ('<img src="//cdn.example.org/x.png">', "fetches //cdn.example.org/x.png"),
        ('<link rel="stylesheet" href="https://cdn.example.org/x.css">', "fetches https://cdn.example.org/x.css"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
    ],
)
def test_a_link_that_is_wrong_is_seen(page: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text("<p id='here'>x</p>")
    (tmp_path / "index.html").write_text(page)
    found = links.problems(tmp_path)
    assert len(found) == 1
    assert problem in found[0]


def test_links_that_are_right_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text("<p id='here'>x</p>")
    page = '<p id="a b"><a href="other.html#here">x</a><a href="#a%20b">y</a><a href="https://example.org">z</a>'
    (tmp_path / "index.html").write_text(page + '<a href="other.html?x=1">q</a><img src="data:,">')
    assert links.problems(tmp_path) == []
