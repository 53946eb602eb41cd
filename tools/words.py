"""Count the phrases that CONTRIBUTING.md asks writers to avoid, in docstrings, messages, comments and prose.

    python tools/words.py                     count in the working tree
    python tools/words.py COMMIT              count in a commit
    python tools/words.py --list [FILE ...]   print each phrase with its place

tests/test_words.py forbids these phrases. Long sentences are counted, but not forbidden. vale and proselint do not
serve here: vale downloads a program when it first runs, proselint takes no custom rules, and neither reads the strings
in `raise` and `print`.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("docstring", "message", "comment", "prose")
LONG = 25  # words
FIRST_WORDS = "docstring begins with What, Whether, Of or Those"

# Allowed: "there is no", "is no longer", "what to do", "what is wrong", "what happens", and "what" in a question.
PATTERNS = {
    FIRST_WORDS: re.compile(r"\A(What|Whether|Of|Those)\b"),
    'nominal "what"': re.compile(r"\bwhat\b(?! to\b| is wrong\b| happens\b)(?![^.!?]*\?)", re.IGNORECASE),
    '"of which"': re.compile(r"\bof which\b", re.IGNORECASE),
    '"is no", "are no"': re.compile(
        r"(?<!there )\b(is|are|was|were|be) no\b(?! longer| more| \w+er than)", re.IGNORECASE
    ),
    '"there are of"': re.compile(r"\bthere (is|are|were) of\b", re.IGNORECASE),
    '"told"': re.compile(r"\btold\b", re.IGNORECASE),
    '"anew"': re.compile(r"\banew\b", re.IGNORECASE),
    '"mend"': re.compile(r"\bmend(s|ed|ing)?\b", re.IGNORECASE),
    '"besides"': re.compile(r"\bbesides\b", re.IGNORECASE),
    '"likeliest"': re.compile(r"\blikel(iest|ier)\b", re.IGNORECASE),
    '"for want of"': re.compile(r"\bfor want of\b", re.IGNORECASE),
    '"sooner"': re.compile(r"\bsooner\b", re.IGNORECASE),
}
# Their strings are read by a person. Any attribute of these names counts: `parser.error`, `sys.exit`, `warnings.warn`.
REPORTS = {"print", "report", "warn", "error", "exit", "fail", "SystemExit", "write_line", "add_note"}
SHOWN_ARGUMENTS = {
    "help",
    "description",
    "epilog",
    "says",
    "shows",
    "seen",
    "title",
    "hint",
    "xlabel",
    "ylabel",
    "label",
}
MARKS = re.compile(r"#(!| ?(type:|noqa|fmt:|pragma|%%|///)| dependencies| -\*-)")  # comments for programs


# Code, formulas and HTML comments; CONTRIBUTING.md quotes the phrases between two of these comments.
NOT_PROSE = re.compile(r"(?ms)^ *(```|~~~).*?^ *\1|^\$\$.*?\$\$|<!-- words: off -->.*?<!-- words: on -->|<!--.*?-->")


@dataclass(frozen=True)
class Text:
    """A piece of text that a person reads."""

    file: str
    line: int
    kind: str
    text: str


def without_code(text: str) -> str:
    """Replace code, formulas, links' addresses and HTML tags by one word each, so that sentences can be counted."""
    for pattern, word in (
        (r"(?ms)^ *(```|~~~).*?^ *\1", "\n"),
        (r"(?s)\$\$.*?\$\$", "X"),
        (r"``[^`]+``|`[^`\n]+(?:\n[^`\n]+)?`|\$[^$\n]+\$", "X"),
        (r"\]\([^)]*\)", "]"),
        (r"<[^<>]+>", " "),
        (r"(?m)^ *(>>>|\.\.\.) .*$", ""),
    ):
        text = re.sub(pattern, word, text)
    return text


def strings(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """Yield the outermost strings below a node."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from strings(child)


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    """Return the text of a string, with `X` for each inserted value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the strings of several words that are raised, printed, reported or shown by `--help`."""
    seen: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Raise) and node.exc is not None:
            parts = [node.exc]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in REPORTS or name.endswith(("Error", "Warning")):
                parts = [*node.args]
            parts += [word.value for word in node.keywords if word.arg in SHOWN_ARGUMENTS]
        for part in parts:
            for found in strings(part):
                if id(found) not in seen and len(text_of(found).split()) > 2:
                    seen.add(id(found))
                    yield found.lineno, text_of(found)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comments for readers; consecutive lines are one comment."""
    lines: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not MARKS.match(token.string):
            alone = not token.line[: token.start[1]].strip()
            if lines and not (alone and token.start[0] == last + 1):
                yield last - len(lines) + 1, "\n".join(lines)
                lines = []
            lines.append(token.string.lstrip("#").strip())
            last = token.start[0]
    if lines:
        yield last - len(lines) + 1, "\n".join(lines)


def python_texts(file: str, source: str) -> Iterator[Text]:
    """Yield the docstrings, messages and comments of a program."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield Text(file, node.body[0].lineno, "docstring", without_code(text))
    for line, text in messages(tree):
        yield Text(file, line, "message", without_code(text))
    for line, text in comments(source):
        yield Text(file, line, "comment", without_code(text))


def notebook_texts(file: str, source: str) -> Iterator[Text]:
    """Yield the text cells of a notebook, and the comments and messages of its program."""
    line = 1
    for cell in re.split(r"(?m)^(?=# %%)", source):
        head, _, body = cell.partition("\n")
        if head.startswith("# %% [markdown]"):
            text = re.sub(r"(?m)^# ?", "", body)
            yield from paragraphs(file, line + 1, text)
        elif head.startswith("# %%"):
            for at, text in comments(body):
                yield Text(file, line + at, "comment", without_code(text))
            for at, text in messages(ast.parse(body)):
                yield Text(file, line + at, "message", without_code(text))
        line += cell.count("\n")


def paragraphs(file: str, line: int, text: str) -> Iterator[Text]:
    """Yield the paragraphs, items of lists and cells of tables of a text in Markdown."""
    text = NOT_PROSE.sub(lambda m: "\n" * m[0].count("\n"), text)
    for part in re.finditer(r"(?ms)(?:^(?=\S| )(?!\s*\n).+?)(?=\n\s*\n|\n *(?:[-*]|\d+\.) |\n *\||\n#|\Z)", text):
        at = line + text.count("\n", 0, part.start())
        cells = part[0].split("|") if part[0].lstrip().startswith("|") else [part[0]]
        for cell in cells:
            if words := without_code(cell).strip(" \n-*#>:|"):
                yield Text(file, at, "prose", words)


class Page(HTMLParser):
    """Collect the text of an HTML page, without styles and programs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("style", "script") and data.strip():
            self.found.append((self.getpos()[0], data.strip()))


def texts_of(file: str, source: str) -> Iterator[Text]:
    """Yield all texts of a file that a person reads."""
    if file.endswith(".md"):
        yield from paragraphs(file, 1, source)
    elif file.endswith(".html"):
        page = Page()
        page.feed(source)
        yield from (Text(file, line, "prose", text) for line, text in page.found)
    elif file.startswith("notebooks/"):
        yield from notebook_texts(file, source)
    else:
        yield from python_texts(file, source)


def read(root: Path, only: Iterable[str] = ()) -> list[Text]:
    """Read the package, the documentation and the notebooks below `root`, or only some files and folders of these."""
    patterns = ("*.md", "docs/**/*.md", "docs/*.py", "notebooks/*.py", "refgemma/**/*.py", "refgemma/**/*.html")
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if "_build" not in path.parts})
    names = {path.relative_to(root).as_posix(): path for path in files}
    kept = {name: path for name, path in names.items() if not list(only) or name.startswith(tuple(only))}
    return [text for name, path in kept.items() for text in texts_of(name, path.read_text("utf-8"))]


def matches(text: Text) -> Iterator[tuple[str, str]]:
    """Yield each phrase to avoid that a text contains: the pattern's name and some words around it."""
    for name, pattern in PATTERNS.items():
        if name == FIRST_WORDS and text.kind != "docstring":
            continue
        for found in pattern.finditer(text.text):
            around = text.text[max(found.start() - 40, 0) : found.end() + 40]
            yield name, " ".join(around.split())


def sentences(text: str) -> list[str]:
    """Split a text into sentences; also at an empty line, a colon or semicolon, and an item of a list."""
    parts = re.split(r"(?<=[.!?:;])\s+(?=[\"'(*A-Z0-9])|\n\s*\n|\n\s*[-*] ", text)
    return [" ".join(part.split()) for part in parts if len(part.split()) > 1]


def count(texts: Iterable[Text]) -> dict[str, Counter[str]]:
    """Count each pattern, and the long sentences of prose and docstrings, by the kind of text."""
    table: dict[str, Counter[str]] = {name: Counter() for name in ("texts", *PATTERNS, f"over {LONG} words")}
    for text in texts:
        table["texts"][text.kind] += 1
        for name, _ in matches(text):
            table[name][text.kind] += 1
        long = sum(len(sentence.split()) > LONG for sentence in sentences(text.text))
        table[f"over {LONG} words"][text.kind] += long
    return table


def checkout(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def main() -> int:
    """Print the table, or the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="default: the working tree")
    parser.add_argument("--list", nargs="*", metavar="FILE", help="print each phrase, in these files or folders only")
    args = parser.parse_args()
    if args.list is not None:
        found = [
            f"{t.file}:{t.line}: {t.kind}, {name}: {words}" for t in read(ROOT, args.list) for name, words in matches(t)
        ]
        print("\n".join(found) or "no phrase to avoid was found")
        return bool(found)
    with tempfile.TemporaryDirectory() as folder:
        if args.commit:
            checkout(args.commit, Path(folder))
        table = count(read(Path(folder) if args.commit else ROOT))
    print("| | " + " | ".join([*KINDS, "all"]) + " |\n" + "| --- " * (len(KINDS) + 2) + "|")
    for name, counts in table.items():
        print(f"| {name} | " + " | ".join(f"{counts[kind]:,}" for kind in KINDS) + f" | {counts.total():,} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
