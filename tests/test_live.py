"""Test the live page as a file: it is complete, safe and offline. tests/browser/test_live_page.py runs it."""

import json
import re
from pathlib import Path

import pytest

from refgemma.cli.main import main
from refgemma.oracle.known_bugs import KNOWN_BUGS
from refgemma.teach.live import FIRST_TEXT, HERE, describe_bugs, render_live

PAGE = render_live()


def test_it_is_one_file_that_asks_for_nothing() -> None:
    assert len(PAGE.encode()) < 8_500_000
    sources = re.sub(r'"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+"', "", PAGE)  # links to where bugs were seen
    assert re.findall(r"https?:|@import|\bimport\(|\bfetch\(|XMLHttpRequest|WebSocket", sources) == []
    assert "default-src 'none'" in PAGE
    assert f">{FIRST_TEXT}</textarea>" in PAGE
    assert not re.search(r"@(PORT|MODEL|WEIGHTS|TEXT)@", PAGE)


def test_its_bugs_are_known_ones() -> None:
    source = (HERE / "gemma2.js").read_text("utf-8")
    made = re.findall(r'^  "([\w-]+)": \["', source, re.MULTILINE)
    assert len(made) == 13
    assert set(made) <= {bug.name for bug in KNOWN_BUGS}


def test_each_bug_has_its_row_of_the_table() -> None:
    bugs = describe_bugs((HERE / "gemma2.js").read_text("utf-8"))
    known = {bug.name: bug for bug in KNOWN_BUGS}
    assert len(bugs) == 13
    assert {name: bug["says"] for name, bug in bugs.items()} == {name: known[name].says for name in bugs}
    assert bugs["silu-instead-of-gelu"]["seen"] == []  # no public report
    addresses = {bug["seen"][0][1] for bug in bugs.values() if bug["seen"]}
    assert addresses == {
        "",  # AiDotNet #2074 and a commit of google-deepmind/gemma
        "https://github.com/vllm-project/vllm/issues/5908",
        "https://github.com/apple/ml-cross-entropy/issues/48",
        "https://github.com/antonellof/ferrox/issues/40",
        "https://github.com/onnx/onnx/issues/7274",
        "https://github.com/linkedin/Liger-Kernel/issues/74",
        "https://github.com/marin-community/levanter/issues/978",
        "https://github.com/huggingface/transformers/issues/31775",
        "https://github.com/huggingface/transformers/issues/29623",
    }


def test_a_text_cannot_leave_its_place() -> None:
    page = render_live("</textarea><script>alert(1)</script>@PORT@")
    assert "<script>alert(1)" not in page
    assert page.count("function forward(") == 1


def test_explore_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    assert main(["explore", "A king", "--live", "-o", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "bytes": file.stat().st_size}
    assert ">A king</textarea>" in file.read_text("utf-8")


@pytest.mark.parametrize("option", [("--model", "conformance"), ("--dtype", "bfloat16"), ("--ids", "2,300")])
def test_an_option_that_would_change_nothing_is_refused(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explore", "--live", *option, "-o", str(tmp_path / "page.html")]) == 2
    assert "--live runs the tiny model in float32 on a text; omit --model, --dtype and --ids" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
