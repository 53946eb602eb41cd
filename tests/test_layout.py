"""The import ladder of docs/architecture.md, read from the source: a file imports only from rungs below its own."""

import ast
import importlib
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import refgemma
from refgemma.errors import MOVED
from refgemma.ops import rms_norm

# Of the checkout, not of what is installed: these tests are about the source.
PACKAGE = Path(__file__).parents[1] / "refgemma"

# From the ground up. A name is a file, or a folder whose files may import one another.
RUNGS = (
    {"errors"},
    {"files", "hub", "precision", "shapes"},
    {"ops", "tokenizer"},
    {"activations"},
    {"config"},
    {"inputs", "weights"},
    {"cache", "convert"},
    {"layers"},
    {"heads", "model"},
    {"fast"},
    {"generation"},
    {"modeling", "trace"},
    {"oracle"},
    {"goldens", "sweep"},
    {"testing", "teach"},
    {"cli"},
    {"__main__"},
)
RUNG = {name: rung for rung, names in enumerate(RUNGS) for name in names}

# An operation is given numbers, never a configuration; so it can be tested, read and reused alone.
FORBIDDEN = {("ops", "config")}

# Someone who wants to read one Gemma 2 in NumPy should not wait for these, nor need to have them.
HEAVY = {"matplotlib", "torch", "transformers"}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in `tree`, a module of `package`; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = [*above, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*source, alias.name])) for alias in node.names)


def unit(dotted: str) -> str:
    """The name on the ladder: ``weights`` for ``refgemma.weights.parameters.LayerWeights``; may be no file at all."""
    return dotted.split(".")[1] if "." in dotted else ""


def ladder_problems(file: str, source: str) -> list[str]:
    """What `source`, the text of refgemma/`file`, imports that it may not, a sentence each."""
    parts = Path(file).with_suffix("").parts
    if parts == ("__init__",):
        return []  # gathers the public names, from every rung
    own = parts[0]
    if own not in RUNG:
        return [f"{file}: unknown; give it a rung in tests/test_layout.py and docs/architecture.md"]
    problems = []
    for line, name in imports(ast.parse(source), package=".".join(("refgemma", *parts[:-1]))):
        if name.split(".")[0] != "refgemma" or (unit(name) == own and len(parts) > 1):
            continue
        if unit(name) not in RUNG:
            if own == "cli":
                continue  # the command line stands above the public names, too
            problems.append(f"{file}:{line}: imports {name}; import from the file that defines it")
        elif RUNG[unit(name)] >= RUNG[own] or (own, unit(name)) in FORBIDDEN:
            problems.append(f"{file}:{line}: {own} may not import {unit(name)}")
    return problems


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that are no comment, no docstring and not blank."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]
    return {line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - texts


def outside_functions(tree: ast.Module) -> ast.Module:
    """`tree` without the bodies of its functions, which run only when they are called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def heavy_imports(file: str, source: str) -> list[str]:
    """The imports of `source` that would make ``import refgemma`` slow or impossible."""
    found = imports(outside_functions(ast.parse(source)), package="refgemma")
    return [f"{file}:{line}: imports {name} at module level" for line, name in found if name.split(".")[0] in HEAVY]


FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_below(file: str) -> None:
    assert not ladder_problems(file, FILES[file])


@pytest.mark.parametrize("file", FILES)
def test_nothing_heavy_is_imported_at_module_level(file: str) -> None:
    assert not heavy_imports(file, FILES[file])


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("layers.py", "from refgemma.model import forward", "layers may not import model"),
        ("heads.py", "from refgemma.model import forward", "heads may not import model"),
        ("layers.py", "def late():\n    import refgemma.oracle.check", "layers may not import oracle"),
        ("layers.py", "from . import model", "layers may not import model"),
        ("layers.py", "from .model import forward", "layers may not import model"),
        ("weights/convert.py", "from ..model import forward", "weights may not import model"),
        ("weights/convert.py", "from .. import model", "weights may not import model"),
        ("ops.py", "from refgemma.config import Gemma2Config", "ops may not import config"),
        ("tokenizer.py", "from refgemma.config import Gemma2Config", "tokenizer may not import config"),
        ("layers.py", "from refgemma import Weights", "import from the file that defines it"),
        ("layers.py", "import refgemma", "import from the file that defines it"),
        ("novelty.py", "", "give it a rung"),
        ("novelty/part.py", "", "give it a rung"),
    ],
)
def test_the_ladder_is_guarded(file: str, source: str, problem: str) -> None:
    assert problem in " ".join(ladder_problems(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from refgemma.goldens.verify import verify"),
        ("cli/main.py", "from refgemma import __version__"),
        ("layers.py", "import numpy\nfrom refgemma.ops import linear\nfrom refgemma.weights.parameters import Weights"),
        ("weights/convert.py", "from refgemma.weights.parameters import Weights\nfrom .checkpoint import Checkpoint"),
        ("oracle/verify.py", "from refgemma.oracle.compare import compare\nfrom refgemma.model import forward"),
    ],
)
def test_the_ladder_can_be_climbed(file: str, source: str) -> None:
    assert ladder_problems(file, source) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch.nn", 1),
        ("try:\n    from matplotlib import pyplot\nexcept ImportError:\n    pass", 1),
        ("class Model:\n    import transformers", 1),
        ("def plot():\n    import matplotlib", 0),
        ("import numpy", 0),
    ],
)
def test_heavy_imports_are_seen(source: str, count: int) -> None:
    assert len(heavy_imports("any.py", source)) == count


def test_importing_refgemma_imports_nothing_heavy() -> None:
    # Through what others import, too. A finder that is asked first notes the attempt even where nothing is installed.
    program = f"""
import sys
asked = []
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            asked.append(name)
sys.meta_path.insert(0, Spy())
import refgemma
print(sorted(asked))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_every_folder_is_a_package() -> None:
    # Without its __init__.py a folder's files are imported by pytest under other names, and their shapes go unchecked.
    folders = {Path(file).parent.as_posix() for file in FILES}
    assert folders <= {Path(file).parent.as_posix() for file in FILES if file.endswith("__init__.py")}


def test_the_model_is_read_in_one_sitting() -> None:
    """Of code, not of explanation: fewer than three hundred lines, as docs/architecture.md promises the reader."""
    lines = {name: len(code_lines(FILES[f"{name}.py"])) for name in ("ops", "layers", "model")}
    assert sum(lines.values()) <= 300, lines
    source = '"""Text."""\n\nx = (1,\n  2)  # why\n# why\ndef f():\n    """Text."""\n    y = """a\nb"""\n'
    assert code_lines(source) == {3, 4, 6, 8, 9}


def test_the_checkout_is_what_is_tested() -> None:
    # Another refgemma, installed from a wheel, would be tested in its place without a word.
    assert Path(refgemma.__file__).parent == PACKAGE, 'pip install -e ".[test]" installs this checkout'


def test_shapes_are_checked_in_this_run() -> None:
    # Every other test relies on --jaxtyping-packages; were it to stop working, they would still pass.
    with pytest.raises(TypeCheckError):
        rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)


@pytest.mark.parametrize("old", MOVED)
def test_a_module_of_version_0_1_says_its_present_name(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"^refgemma.{old} is now refgemma.{MOVED[old]}$"):
        importlib.import_module(f"refgemma.{old}")
    importlib.import_module(f"refgemma.{MOVED[old]}")
