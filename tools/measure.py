"""Count the size of the package as docs/architecture.md states it; checked on small examples in tests/test_tools.py.

    python tools/measure.py [FOLDER] [--list | --rooms]

Code lines are lines with code; blank lines, comments and docstrings do not count. A name is defined twice if two files
define it at top level. A circle is a group of files that import one another, also inside functions. A function counts
as named by a participle if its name is one word that ends in -ed or is an irregular participle.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
IRREGULAR = {"bound", "built", "drawn", "found", "given", "held", "kept", "known", "left", "lost", "made", "said",
             "seen", "sent", "shown", "taken", "told", "understood", "written"}  # fmt: skip
VERBS = {"embed", "exceed", "feed", "need", "proceed", "seed", "speed"}


def code_lines(text: str) -> int:
    """Count the lines of a program that have code."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            documentation |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def top_level_names(tree: ast.Module) -> Iterator[str]:
    """Yield the functions, classes and variables that a file defines."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def duplicate_names(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Find the names that several files define at top level, with the files."""
    where: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees.items():
        for name in top_level_names(tree):
            if not name.startswith("__"):
                where[name].add(file)
    return {name: sorted(files) for name, files in sorted(where.items()) if len(files) > 1}


def imports(trees: Mapping[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Find the imports of each file; ``from package import name`` counts only if `name` is a file."""
    modules = {_module(file, package): file for file in trees}
    found: dict[str, set[str]] = {file: set() for file in trees}
    for module, file in modules.items():
        above = module.split(".") if file.endswith("__init__.py") else module.split(".")[:-1]
        for node in ast.walk(trees[file]):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = above[: len(above) + 1 - node.level] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{source}.{alias.name}" for alias in node.names]
            for name in names:
                target = name if name in modules else name.rpartition(".")[0]
                if target in modules and target not in (module, package):
                    found[file].add(modules[target])
    return found


def _module(file: str, package: str) -> str:
    dotted = file.removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip(".")
    return f"{package}.{dotted}".rstrip(".")


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Find the groups of files in which each file leads to all others."""
    reached = {start: _reachable(start, edges) for start in edges}
    groups = {frozenset({a, *(b for b in reached[a] if a in reached.get(b, ()))}) for a in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(start: str, edges: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    open_ends = list(edges[start])
    while open_ends:
        if (end := open_ends.pop()) not in found:
            found.add(end)
            open_ends += edges.get(end, ())
    return found


def participles(tree: ast.Module) -> list[str]:
    """Find the functions and methods (not properties) whose name is a single past participle."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        name = node.name.strip("_")
        participle = (name.endswith("ed") and name not in VERBS) or name in IRREGULAR
        if participle and "_" not in name and "property" not in decorators:
            found.append(node.name)
    return found


def fixed_lines(tree: ast.Module) -> int:
    """Count the lines of imports, ``__all__``, decorators, and the signatures of classes and functions."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines |= set(range(first, max(node.body[0].lineno, node.lineno + 1)))
    return len(lines)


def rooms(folder: Path) -> dict[str, tuple[int, int, int]]:
    """For each folder, and for all files at the top, count files, code lines and `fixed_lines`."""
    counts: dict[str, tuple[int, int, int]] = {}
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).parts[0] if path.parent != folder else "files at the top"
        text = path.read_text("utf-8")
        found = (1, code_lines(text), fixed_lines(ast.parse(text)))
        counts[room] = tuple(map(sum, zip(counts.get(room, (0, 0, 0)), found, strict=True)))  # type: ignore[assignment]
    return dict(sorted(counts.items(), key=lambda item: -item[1][1]))


def measure(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """Count everything in a package; return the number and the counted items for each row."""
    texts = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lines = {file: code_lines(text) for file, text in texts.items()}
    sitting = {file: lines.get(file, 0) for file in ("ops.py", "layers.py", "model.py")}
    top = [file for file in texts if "/" not in file]
    duplicates = duplicate_names(trees)
    twice = [f"{name}: {', '.join(files)}" for name, files in duplicates.items()]
    largest = sorted(((count, file) for file, count in lines.items()), reverse=True)
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    round_trips = circles(imports(trees, folder.name))
    participle = [f"{file}: {name}" for file, tree in trees.items() for name in participles(tree)]
    return {
        "code lines": (sum(lines.values()), [f"{count:6} {file}" for count, file in largest]),
        "code lines of the sitting read (ops, layers, model)": (sum(sitting.values()), []),
        "files": (len(texts), []),
        "files at the top": (len(top), top),
        "import circles": (len(round_trips), [", ".join(group) for group in round_trips]),
        "names defined in more than one file": (len(duplicates), twice),
        "functions": (len(functions), []),
        "functions named by a participle": (len(participle), participle),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "refgemma")
    parser.add_argument("--list", action="store_true", help="print the counted items below each row")
    parser.add_argument("--rooms", action="store_true", help="print the code lines of each folder instead")
    args = parser.parse_args()
    if args.rooms:
        counts = rooms(args.folder)
        total = tuple(map(sum, zip(*counts.values(), strict=True)))
        print("| room | files | code lines | of these imports and signatures |\n| --- | --- | --- | --- |")
        for room, (files, lines, fixed) in (counts | {"all": total}).items():
            print(f"| {room} | {files} | {lines:,} | {fixed:,} |")
        return
    print("| | |\n| --- | --- |")
    for row, (count, listed) in measure(args.folder).items():
        print(f"| {row} | {count:,} |")
        if args.list:
            print("".join(f"    {line}\n" for line in listed), end="")


if __name__ == "__main__":
    main()
