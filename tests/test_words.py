"""Check that tools/words.py finds the phrases that CONTRIBUTING.md asks writers to avoid, and that none is left."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from words import Text, matches, messages, notebook_texts, paragraphs, python_texts, read, sentences, texts_of


def phrases(kind: str, text: str) -> list[str]:
    return [name for name, _ in matches(Text("x.py", 1, kind, text))]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It returns what it computed.", ['nominal "what"']),
        ("What is a token?", []),
        ("Say what to do.", []),
        ("The cap is no number.", ['"is no", "are no"']),
        ("There is no cap. It is no longer used.", []),
        ("Three files, of which one is empty, told anew.", ['"of which"', '"told"', '"anew"']),
        ("The likeliest token comes sooner.", ['"likeliest"', '"sooner"']),
    ],
)
def test_a_phrase_is_found(text: str, found: list[str]) -> None:
    assert phrases("prose", text) == found


@pytest.mark.parametrize("first", ["What", "Whether", "Of", "Those"])
def test_only_a_docstring_may_not_begin_so(first: str) -> None:
    assert any("begins" in name for name in phrases("docstring", f"{first} the layers do."))
    assert not any("begins" in name for name in phrases("comment", f"{first} the layers do."))


def test_the_texts_of_a_program() -> None:
    source = '''"""A file."""
# One comment
# of two lines.
def f(x):
    """Return `what` it holds."""  # noqa: D
    raise ValueError(f"{x} is no number")
    print("two words")
'''
    found = [(text.line, text.kind, text.text) for text in python_texts("x.py", source)]
    assert found == [
        (1, "docstring", "A file."),
        (5, "docstring", "Return X it holds."),
        (6, "message", "X is no number"),
        (2, "comment", "One comment\nof two lines."),
    ]
    assert list(messages(ast.parse("parser.add_argument('x', help='what it is')"))) == [(1, "what it is")]


def test_the_texts_of_a_page_and_a_notebook() -> None:
    page = "# Title\n\nOne\nparagraph.\n\n- an item\n- another\n\n```\nwhat\n```\n\n| a | told |\n"
    found = [(text.line, text.text) for text in paragraphs("x.md", 1, page)]
    assert found == [(1, "Title"), (3, "One\nparagraph."), (6, "an item"), (7, "another"), (13, "a"), (13, "told")]
    cells = list(notebook_texts("n.py", "# %% [markdown]\n# Some text.\n\n# %%\nx = 1\n# A comment.\nprint('a b c')\n"))
    assert [(text.line, text.kind, text.text) for text in cells] == [
        (2, "prose", "Some text."),
        (6, "comment", "A comment."),
        (7, "message", "a b c"),
    ]
    html = "<style>told</style>\n<p>Some text</p>"
    assert [(text.line, text.text) for text in texts_of("x.html", html)] == [(2, "Some text")]


def test_sentences_are_split() -> None:
    assert sentences("One is here. Two is\nthere: Three follows. `x` is 1.5 now.") == [
        "One is here.",
        "Two is there:",
        "Three follows. `x` is 1.5 now.",
    ]


# --- the check of the repository --------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]

# A phrase that may stay: (file, words around it as `tools/words.py --list` prints them) -> why.
ALLOWED: dict[tuple[str, str], str] = {}

TEXTS = read(ROOT)
FOUND = [(text.file, text.line, name, words) for text in TEXTS for name, words in matches(text)]


def test_no_phrase_to_avoid_is_left() -> None:
    left = [
        f"{file}:{line}: {name}: {words}"
        for file, line, name, words in FOUND
        if not any(file == at and part in words for at, part in ALLOWED)
    ]
    assert not left, "rewrite these (CONTRIBUTING.md, English):\n" + "\n".join(left)


def test_the_exceptions_are_needed() -> None:
    unneeded = [key for key in ALLOWED if not any(f == key[0] and key[1] in words for f, *_, words in FOUND)]
    assert not unneeded, "remove these lines of ALLOWED"


def test_the_whole_repository_is_read() -> None:
    files = {text.file for text in TEXTS}
    expected = {"README.md", "docs/how-to/gguf.md", "notebooks/01_one_token.py", "refgemma/ops.py",
                "refgemma/teach/explorer.html"}  # fmt: skip
    assert expected <= files


# Never 1: each stands behind a condition, a product sign ("1x20 tokens"), or counts the fields of a configuration.
NEVER_ONE = {"CONFORMANCE_LIMIT", "asked", "across", "count", "down", "found.size", "len(bugs)", "len(check.numbers)",
             "prompt.input_ids.shape[1]"}  # fmt: skip


@pytest.mark.parametrize("folder", ["cli", "oracle"])
def test_counts_in_messages_agree_with_their_nouns(folder: str) -> None:
    """Test that no message has `{len(x)} tensors`, which would read "1 tensors" for one tensor."""
    nouns = r" (tensor|token|element|layer|row|job|bug|known bug|prompt|name|weight|text|step|case|number|head)s\b"
    found = [
        f"{path.name}:{node.lineno}: {{{ast.unparse(value.value)}}}{after.value}"
        for path in sorted((ROOT / "refgemma" / folder).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for value, after in pairwise(node.values if isinstance(node, ast.JoinedStr) else ())
        if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)
        if re.match(nouns, str(after.value)) and ast.unparse(value.value) not in NEVER_ONE
    ]
    assert not found, "write pluralise(len(x), 'tensor')"
