"""Check untrusted texts in the commands' output: a terminal, GitHub, a browser or a test runner gets plain characters,
never something to interpret. Markup is judged by the parsers of Python's library."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import refgemma
from refgemma.cli import output
from refgemma.cli.main import main
from refgemma.files import escape, write_json
from refgemma.hub import find_model
from refgemma.teach.explorer import explore_run, render_page

TERMINAL = "a\x1b]0;title\x07\x9b31m\r\n\u202edne\x7f"  # sets a title, a colour; returns, ends a line, turns the text
MARKUP = "<script>alert(1)</script>"
NAMES = [
    MARKUP, "</td></table><img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "x\" onmouseover=\"alert(1)",
    "# Heading", "@someone", "[a link](javascript:alert(1))", "![i](https://evil.example/i.svg)", "a|b`c```d",
    "]]>&amp;&lt;",
]  # fmt: skip
STRICT = {"default-src 'none'", "base-uri 'none'", "form-action 'none'"}


class Elements(HTMLParser):
    """Collects the elements of a page, their attributes and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def policy(self) -> set[str]:
        """The directives of the Content-Security-Policy."""
        found = [a["content"] for tag, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(found) == 1
        return {part.strip() for part in (found[0] or "").split(";")}

    def assert_harmless(self) -> None:
        """Require that nothing in the page runs or is fetched."""
        for tag, attributes in self.elements:
            assert tag not in ("img", "iframe", "object", "embed", "a", "base", "form", "input", "audio", "video"), tag
            assert not any(name.startswith("on") for name in attributes), attributes
            assert not {"src", "srcdoc", "action", "xlink:href"} & attributes.keys(), attributes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a trace and weights of the conformance model, correct except for tensors with the names of `NAMES`."""
    folder = tmp_path_factory.mktemp("hostile")
    trace, weights = folder / "run.safetensors", folder / "<img src=x onerror=alert(1)>.safetensors"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)]) == 0
    save_file(load_file(trace) | {name: np.zeros(1, np.float32) for name in NAMES[:3]}, trace, {"dtype": "float32"})
    port = load_file(find_model("conformance") / "model.safetensors")
    save_file(port | {name: np.zeros(1, np.float32) for name in NAMES}, weights)
    return trace, weights


@pytest.fixture(scope="module")
def reports(files: tuple[Path, Path]) -> dict[str, str]:
    """Return the reports of `refgemma check` in each format."""
    trace, weights = files
    made = {kind: trace.with_suffix(f".{kind}") for kind in ("html", "markdown", "junit")}
    options = [part for kind, path in made.items() for part in (f"--{kind}", str(path))]
    assert main(["check", str(trace), "--model", "conformance", "--weights", str(weights), *options]) == 1
    return {kind: path.read_text("utf-8") for kind, path in made.items()}


# --- terminals --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, **config: Any) -> Path:
    """Write the conformance model with more keys in its configuration."""
    folder.mkdir()
    source = find_model("conformance")
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return folder


def test_info_shows_keys_values_and_names_in_printable_lines(tmp_path: Path, capsys: Any) -> None:
    folder = write_folder(tmp_path / "name\x1b[31m", **{TERMINAL: 1, "license": TERMINAL, "id2label": {"0": TERMINAL}})
    assert main(["info", str(folder)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.split("\n") if not line.isprintable()] == []
    assert said.count("a\\x1b]0;title\\x07\\x9b31m\\r\\n\\u202edne\\x7f") == 4  # label2id has the label as a key
    assert main(["info", str(folder), "--json"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.split("\n") if not line.isprintable()] == []
    assert json.loads(said)["config"]["license"] == TERMINAL


def test_errors_and_warnings_are_printable(tmp_path: Path, capsys: Any) -> None:
    folder = write_folder(tmp_path / "odd", quantization_config={TERMINAL: TERMINAL}, hidden_act=TERMINAL)
    assert main(["info", str(folder)]) == 0
    folder = write_folder(tmp_path / "wrong", hidden_activation=TERMINAL)
    assert main(["info", str(folder)]) == 2
    with pytest.raises(SystemExit):
        main(["info", f"--{TERMINAL}"])
    said = capsys.readouterr().err
    assert [line for line in said.split("\n") if not line.isprintable()] == []
    assert len(said.splitlines()) >= 3


def test_a_terminal_is_shown_the_controls_of_a_text_and_a_file_gets_them(capsys: Any, monkeypatch: Any) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0647\u200c\u0645\ttab\n"  # joiners are part of the text
    output.show_text(family + TERMINAL)
    assert capsys.readouterr().out == family + TERMINAL
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.show_text(family + TERMINAL)
    assert capsys.readouterr().out == family + "a\\x1b]0;title\\x07\\x9b31m\\r\n\u202edne\\x7f"


def test_commands_print_in_one_place() -> None:
    """Printing elsewhere could print untrusted escapes; only the prompt of `chat` is allowed."""
    for path in (Path(refgemma.__file__).parent / "cli").glob("*.py"):
        found = re.findall(r"(?<![\w.])print\(|\.write\(", path.read_text())
        assert len(found) == {"output.py": 3, "text.py": 1}.get(path.name, 0), path


@pytest.mark.parametrize("indent", [2, None])
def test_json_has_escapes_and_means_the_same(indent: int | None) -> None:
    value = {TERMINAL: ["\U000e0041", "\ud800", "gr\u00fc\u00df \U0001f600", MARKUP]}
    text = write_json(value, indent)
    assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(text) == value
    assert "gr\u00fc\u00df \U0001f600" in text


def test_escape_leaves_what_is_printable() -> None:
    assert escape("gr\u00fc\u00df \\n '\"") == "gr\u00fc\u00df \\n '\""


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_of_check_has_no_script_and_a_policy_against_any(reports: dict[str, str]) -> None:
    page = Elements(reports["html"])
    page.assert_harmless()
    assert page.policy() == STRICT | {"style-src 'unsafe-inline'"}
    assert "script" not in {tag for tag, _ in page.elements}
    assert MARKUP in "".join(page.texts)  # it is shown


def assert_only_code(text: str) -> None:
    """Require that a Markdown text has no markup, mention or link outside code."""
    outside = re.sub(r"```text\n.*?\n```", "", text, flags=re.DOTALL)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    assert not re.search(r"[<>@\[\]]|://|^#(?!## refgemma)", outside, re.MULTILINE), outside


def test_a_comment_of_github_has_names_as_code(reports: dict[str, str]) -> None:
    """Outside code there are only our own words; untrusted text cannot end a fence or a code span."""
    text = reports["markdown"]
    fences = [line for line in text.split("\n") if line.startswith("```")]
    assert fences == ["```text", "```"] * (len(fences) // 2)
    assert MARKUP in text
    assert_only_code(text)
    for row in text.split("\n"):
        assert not row.startswith("| ") or row.count("|") == 7


def test_a_test_runner_reads_every_name(reports: dict[str, str]) -> None:
    suite = ElementTree.fromstring(reports["junit"])
    assert set(NAMES) <= {case.get("name") for case in suite.findall("testcase")}


def test_a_control_character_does_not_break_the_xml(files: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    name = "model\x1b\x01 @someone <b>`|"
    write_folder(tmp_path / name)
    written = ["--junit", "j", "--markdown", "m", "--html", "h"]
    assert main(["check", str(files[0]), "--model", name, *written]) == 0
    assert "model\\x1b\\x01" in str(ElementTree.parse("j").getroot().get("name"))
    assert_only_code(Path("m").read_text("utf-8"))
    for name in ("m", "h"):
        assert all(line.isprintable() for line in Path(name).read_text("utf-8").split("\n"))


def test_the_explorer_shows_hostile_pieces_and_runs_only_its_own_script(monkeypatch: Any) -> None:
    tiny = refgemma.load("tiny")
    pieces = [MARKUP, "<!--", "</script>", "]]>", TERMINAL]
    monkeypatch.setattr(type(tiny.tokenizer), "convert_ids_to_tokens", lambda _, ids: [pieces[n % 5] for n in ids])
    text = render_page(explore_run([2, 300, 301, 303, 304], tiny, NAMES[1], "float32"))
    page = Elements(text)
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "run"}, {}]
    run = json.loads(next(text for text in page.texts if text.startswith("{")))
    assert [run["model"], set(run["tokens"])] == [NAMES[1], {show.replace("\n", "\u23ce") for show in pieces}]
    script_sources = next(part for part in page.policy() if part.startswith("script-src"))
    assert re.fullmatch(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", script_sources)
    assert page.policy() - {script_sources} == STRICT | {"style-src 'unsafe-inline'", "img-src data:"}
