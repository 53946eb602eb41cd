"""Test the page of a check: one file that needs no network and shows the contents of the JSON."""

import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import refgemma
from refgemma.cli.main import main
from refgemma.hub import find_model
from refgemma.oracle.judge import EDGES, count_errors
from refgemma.oracle.page import CELLS, pool_blocks
from refgemma.trace.names import named_tensors, save_trace


class Tags(HTMLParser):
    """Collects every element's name and attributes, and checks that all are closed."""

    EMPTY = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open.pop() in self.EMPTY
        self.open.pop()


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """Write a run with ten wrong scores in one head."""
    path = tmp_path / "run.safetensors"
    ids = ",".join(str(n) for n in range(2, 22))
    assert main(["trace", "--ids", ids, "--model", "conformance", "-o", str(path)]) == 0
    tensors = load_file(path)
    tensors["layers.1.attention.scores"][0, 3, 9, :10] += 1
    save_trace(tensors.items(), path, {"dtype": "float32"})
    return path


def test_the_page_shows_what_the_json_has(wrong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    page_file = wrong.with_name("page.html")
    assert main(["check", str(wrong), "--model", "conformance", "--json", "--html", str(page_file)]) == 1
    found = json.loads(capsys.readouterr().out)
    page = page_file.read_text("utf-8")
    tags = Tags(page)
    assert tags.open == []
    # Nothing is fetched and nothing runs.
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    assert not re.search(r"https?:|//|src=|url\(", page)
    # The strip has a cell of every tensor, in standard deviations.
    cells = [str(attributes["title"]) for tag, attributes in tags.seen if tag == "td" and "title" in attributes]
    for tensor in found["tensors"]:
        [cell] = [cell for cell in cells if cell.startswith(f"{tensor['tensor']}:")]
        assert tensor["verdict"] in cell
        typical = re.search(r"typical error ([\d.,e+]+)( million)? x rounding", cell)
        found_rms = float(typical[1].replace(",", "")) * (1e6 if typical[2] else 1) if typical else 0.0
        assert found_rms == pytest.approx(tensor["rms_over_sigma"], rel=0.06)  # two digits
    # The histogram has every element that was compared.
    counts = [int(n) for n in re.findall(r"to -?[\d.]+: (\d+) elements?", page)]
    assert len(counts) == len(EDGES) - 1
    assert sum(counts) == sum(t["elements"] for t in found["tensors"])
    # The maps show the one row of the one head.
    title = "layers.1.attention.scores: largest error, in units of the usual rounding error."
    assert f'aria-label="{title} Across: position; down: head"' in page
    by_key = page.split(f'aria-label="{title} Across: key; down: query"')[1].split("</svg>")[0]
    worst = re.findall(r'<path class="e5" d="([^"]*)"', by_key)
    size, left, top = 14, 44, 6  # pixels: a cell, and the place of the first
    assert worst == [f"M{left} {top + 9 * size}h{10 * size}v{size}h-{10 * size}z"]  # row 9, keys 0 to 9


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run whose window is one key too wide; three tensors have the names of another engine."""
    path = tmp_path_factory.mktemp("window") / "run.safetensors"
    model = refgemma.load("conformance")
    ids = np.array([[2, *np.random.default_rng(1).integers(3, 90, 19)]])
    run = refgemma.forward(ids, model.weights, model.config.changed(sliding_window=9))
    tensors = {"input_ids": ids} | dict(named_tensors(run))
    tensors |= {f"model.layers.{n}.self_attn.q_proj": np.zeros(1, np.float32) for n in range(3)}
    save_trace(tensors.items(), path, {"dtype": "float32"})
    return path


def test_the_page_of_a_wrong_window_shows_its_band_and_values(window: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    page_file = window.with_name("page.html")
    assert main(["check", str(window), "--model", "conformance", "--json", "--html", str(page_file)]) == 1
    found = json.loads(capsys.readouterr().out)
    page = page_file.read_text("utf-8")
    assert Tags(page).open == []
    assert "<h1>The window has one key too many</h1>" in page
    first = page[page.index("<h2>The first difference") :]
    picture = first[first.index("<svg") :].split("</svg>")[0]  # the first picture
    (extra,) = re.findall(r'<path class="extra" d="([^"]*)"', picture)
    squares = [(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)h14v14h-14z", extra)]
    assert squares == [(6 + 14 * query, 44 + 14 * (query - 8)) for query in range(8, 20)]
    # The table has the recorded numbers, and 0 for the reference.
    probs = load_file(window)["layers.0.attention.probs"]
    rows = re.findall(r"text (\d+), head (\d+), query (\d+), key (\d+)</th><td>([\d.]+)</td><td>([\d.]+)</td>", first)
    assert rows
    for *place, ours, theirs in rows:
        row, head, query, key = map(int, place)
        assert query - key == 8
        assert float(ours) == pytest.approx(probs[row, head, query, key], rel=1e-5)
        assert float(theirs) == 0
    # No list is cut.
    for name in [*(bug["variant"] for bug in found["blind"]), *found["excluded"]]:
        assert f"<b>{name}</b>" in page
    assert found["findings"][0]["explanations"][0]["suggests"] == {"sliding_window": {"expected": 8, "found": 9}}


def test_the_text_is_wrapped_and_says_where_to_look(window: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(window), "--model", "conformance"]) == 1
    said = capsys.readouterr().out
    assert "..." not in said
    assert max(map(len, said.splitlines())) <= 118
    words = " ".join(said.split())
    assert "look at: config key sliding_window: the trace suggests 9, expected is 8" in words
    assert "--map transformers knows 3 of 3 unknown names in the file" in words
    assert "not tensors of this model: model.layers.0-2.self_attn.q_proj" in words
    ruled_out, total, alike = re.findall(
        r"known bugs: (\d+) of (\d+) ruled out; 1 explains the difference; (\d+) look like the correct model in this "
        r"trace: shown by",
        words,
    )[0]
    assert int(ruled_out) + 1 + int(alike) == int(total)


def test_the_bugs_that_a_trace_cannot_show_are_grouped_by_the_inputs_that_show_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, comment = tmp_path / "run.safetensors", tmp_path / "comment.md"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(path)]) == 0
    command = ["check", str(path), "--model", "conformance"]
    assert main([*command, "--json"]) == main([*command, "--markdown", str(comment)]) == 0
    listed, _, said = capsys.readouterr().out.partition("\n}\n")
    alike = json.loads(listed[listed.index("{") :] + "}")["blind"]
    groups = re.findall(r"  shown by ([^:]+): ((?:\S+,\s+)*\S+)", said)
    sizes = Counter(bug["shows"] for bug in alike)
    assert {shows for shows, _ in groups} == set(sizes)
    for shows, names in groups:
        assert names.replace(",", " ").split() == [bug["variant"] for bug in alike if bug["shows"] == shows]
    assert [sizes[shows] for shows, _ in groups] == sorted(sizes.values(), reverse=True)
    for text in (said, comment.read_text("utf-8")):
        assert f"{len(alike)} look like the correct model in this trace:" in text
        assert all(f"shown by {shows}: " in text for shows in sizes)


@pytest.mark.parametrize("wrong", ["shape", "nan"])
def test_a_tensor_that_is_not_comparable_says_why_in_the_headline(window: Path, tmp_path: Path, wrong: str) -> None:
    trace, page_file, name = tmp_path / "run.safetensors", tmp_path / "page.html", "layers.0.attention.q"
    tensors = {n: x for n, x in load_file(window).items() if not n.startswith("model.")}
    tensors[name] = tensors[name][..., :-1] if wrong == "shape" else np.full_like(tensors[name], np.nan)
    tensors[name][0, 0, 3, 2] = 0  # positions that are all NaN count as not recorded
    save_file(tensors, trace, {"dtype": "float32"})
    assert main(["check", str(trace), "--model", "conformance", "--html", str(page_file)]) == 1
    (title,) = re.findall("<h1>(.*)</h1>", page_file.read_text("utf-8"))
    expected = {"shape": f"{name} has shape (1, 6, 20, 9); it must be (1, 6, 20, 10): (batch, heads, seq, head_dim)",
                "nan": f"{name}: 59 elements are nan"}  # fmt: skip
    assert title.startswith(expected[wrong])


def test_a_page_of_what_conforms_has_no_maps(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(path)]) == 0
    assert main(["check", str(path), "--model", "conformance", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<h1>Rounding explains every recorded tensor</h1>" in page
    assert "first difference" not in page
    assert Tags(page).open == []


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_a_map_is_made_smaller_and_keeps_what_is_largest(rows: int, columns: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).standard_normal((rows, columns))
    small, (down, across) = pool_blocks(numbers, CELLS)
    assert max(small.shape) <= CELLS
    assert small.shape == (-(-rows // down), -(-columns // across))
    y, x = np.unravel_index(np.argmax(numbers), numbers.shape)
    assert small[y // down, x // across] == numbers[y, x]


def test_errors_are_counted_as_they_lie() -> None:
    # Of a million normal numbers, each bin has its share, to five times its own standard deviation.
    counts = np.array(count_errors(np.random.default_rng(0).standard_normal(1_000_000)))
    inside = (EDGES[:-1] >= -3) & (EDGES[1:] <= 3)
    middle = (EDGES[1:] + EDGES[:-1]) / 2
    wanted = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi) * np.diff(EDGES) * 1e6
    assert (
        np.abs(counts - wanted)[inside] < 5 * np.sqrt(wanted[inside]) + 0.003 * wanted[inside]
    ).all()  # the curve bends within a bin


def test_a_card_has_the_identities_and_the_limits_of_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, card = tmp_path / "run.safetensors", tmp_path / "card.json"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)]) == 0
    capsys.readouterr()
    assert main(["check", str(trace), "--model", "conformance", "--card", str(card), "--json"]) == 0
    report, written = json.loads(capsys.readouterr().out), json.loads(card.read_text("utf-8"))
    assert written["verdict"] == "conforms"
    assert written["versions"]["numpy"] == np.__version__
    listed = {role: (file["bytes"], file["sha256"]) for role, file in written["files"].items()}
    model = find_model("conformance")
    weights = (model / "model.safetensors").read_bytes()
    assert listed["model/model.safetensors"] == (len(weights), hashlib.sha256(weights).hexdigest())
    assert listed["candidate"] == (trace.stat().st_size, hashlib.sha256(trace.read_bytes()).hexdigest())
    # Three tokens are fewer than the window of 8: the card must not read as if windows had been tested.
    assert "swa-window-plus-one" in written["known_bugs_not_detectable"]
    assert written["known_bugs_excluded"] == report["excluded"]
    assert written["tensors_judged"] == len(report["tensors"])


def test_a_card_of_a_wrong_port_says_so(tmp_path: Path) -> None:
    trace, card = tmp_path / "run.safetensors", tmp_path / "card.json"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)]) == 0
    run = load_file(trace)
    run["logits"] = run["logits"] * np.float32(1.5)
    save_file(run, trace, {"dtype": "float32", "engine": "mine 1.2"})
    assert main(["check", str(trace), "--model", "conformance", "--card", str(card)]) == 1
    written = json.loads(card.read_text("utf-8"))
    assert (written["verdict"], written["first_divergence"], written["engine"]) == ("differs", "logits", "mine 1.2")
