"""Test the explorer's page without a browser: its numbers equal the trace's, and the page is one small file without
external references. tests/browser tests the page in a browser."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.teach.explorer import PAGE_LIMIT, TEMPLATE, explore_run, most_tokens, page_bytes, render_page
from refgemma.trace.names import named_tensors, trace_axes

pytestmark = pytest.mark.slow

TINY = refgemma.load("tiny")
IDS = TINY.tokenizer.encode("Once upon a time there was a little princess who")
RUN = refgemma.forward([IDS], TINY.weights, TINY.config)
SEQ, LAYERS, HEADS = len(IDS), 6, 6


def data_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.findall(r'<script type="application/json" id="run">(.*)</script>', text)[0])
    return found


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


@pytest.fixture(scope="module")
def text() -> str:
    return render_page(explore_run(IDS, TINY, "tiny", "float32"))


@pytest.fixture(scope="module")
def data(text: str) -> dict[str, Any]:
    return data_of(text)


def test_the_shares_are_those_of_the_trace_bit_for_bit(data: dict[str, Any]) -> None:
    places = iter(unpacked(data["attention"]))
    for layer in RUN.layers:
        for head in layer.attention.probs[0]:
            for query in range(SEQ):
                assert [next(places) for _ in range(query + 1)] == head[query, : query + 1].tolist()
                assert not head[query, query + 1 :].any()  # what the page leaves out
    assert not list(places)


def test_the_sizes_are_root_mean_squares_of_the_tensors(data: dict[str, Any]) -> None:
    tensors = dict(named_tensors(RUN))
    assert [entry["name"] for entry in data["tensors"]] == [name for name, _ in trace_axes()]
    for entry in data["tensors"]:
        layers = range(LAYERS) if "N" in entry["name"] else [0]
        sizes = unpacked(entry["sizes"]).reshape(len(layers), SEQ)
        for layer in layers:
            tensor = tensors[entry["name"].replace("N", str(layer))]
            assert list(tensor.shape) == entry["shape"]
            assert len(entry["axes"].split()) == tensor.ndim
            for token in range(SEQ):
                numbers = tensor[..., token, :].astype(np.float64).ravel()
                # Taken in float64 here and there, and rounded to float32 once: half an ulp, 2**-24.
                assert sizes[layer, token] == pytest.approx(np.linalg.norm(numbers) / len(numbers) ** 0.5, rel=2**-23)


def test_the_residual_stream_is_that_before_and_after_each_block(data: dict[str, Any]) -> None:
    by_name = {entry["name"]: unpacked(entry["sizes"]) for entry in data["tensors"]}
    expected = np.concatenate([by_name["embedded"], by_name["layers.N.out"]])
    assert np.array_equal(unpacked(data["residual"]), expected)


def test_the_last_answers_are_those_of_the_model(data: dict[str, Any]) -> None:
    ids = np.array(data["answers"]["ids"])
    shares = unpacked(data["answers"]["shares"]).reshape(ids.shape)
    assert ids.shape == (LAYERS + 1, SEQ, 5)
    for token in range(SEQ):
        logits = RUN.logits[0, token].astype(np.float64)
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert ids[-1, token].tolist() == sorted(range(len(expected)), key=lambda t: -expected[t])[:5]
        # The page's softmax is float32, a sum of 2048 terms: 12 roundings pairwise, and two more.
        assert np.allclose(shares[-1, token], expected[ids[-1, token]], rtol=14 * 2**-23, atol=0)


def test_the_texts_are_those_of_the_tokenizer(data: dict[str, Any]) -> None:
    assert data["tokens"][:5] == ["<bos>", "O", "n", "ce", "·upon"]
    for token, piece in data["texts"].items():
        assert piece == TINY.tokenizer.convert_ids_to_tokens(int(token)).replace("▁", "·").replace("\n", "⏎")


def test_windows_and_groups_are_the_configurations(data: dict[str, Any]) -> None:
    assert data["layers"] == [64, None, 64, None, 64, None]
    assert (data["heads"], data["groups"]) == (6, 3)


def test_it_refers_to_nothing_outside(text: str) -> None:
    without_data = TEMPLATE.read_text("utf-8")
    # The one address is the name of the SVG namespace, which is never fetched.
    assert set(re.findall(r"\w+://[^\"'\s]+", without_data)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", without_data) == ["data:,"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", without_data)
    assert "default-src 'none'" in text  # and a browser would refuse


def test_nothing_in_a_prompt_is_taken_for_markup() -> None:
    run = explore_run(IDS, TINY, "<i>x</i>", "float32")
    run["tokens"][1] = "</script><script>alert(1)</script>&<b>"  # a large vocabulary may have such a token
    made = render_page(run)
    assert made.count("</script>") == TEMPLATE.read_text("utf-8").count("</script>")
    assert "<i>x" not in made
    assert data_of(made)["tokens"] == run["tokens"]


def test_a_page_is_small_and_a_prompt_too_long_for_one_is_refused() -> None:
    most = most_tokens(TINY.config)
    ids = (TINY.tokenizer.encode("There was once a king who had three daughters, and " * 20))[:most]
    made = render_page(explore_run(ids, TINY, "tiny", "float32"))
    assert 0.75 * PAGE_LIMIT < len(made.encode()) <= page_bytes(most, TINY.config) <= PAGE_LIMIT
    with pytest.raises(refgemma.InputError, match=f"has {most + 1} tokens; with this model .* holds at most {most}"):
        explore_run([*ids, 2], TINY, "tiny", "float32")


def test_half_precision_is_shown_as_it_is() -> None:
    model = refgemma.load("tiny", "bfloat16")
    found = explore_run(IDS, model, "tiny", "bfloat16")
    probs = refgemma.forward([IDS], model.weights, model.config).layers[5].attention.probs
    last = unpacked(found["attention"])[-SEQ:]
    assert np.array_equal(last, np.asarray(probs)[0, -1, -1])
    assert np.array_equal(last, np.asarray(refgemma.bf16(last)))  # each a bfloat16 number


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    assert main(["explore", "Once upon a time", "-o", str(target)]) == OK
    assert "7 tokens" in capsys.readouterr().out
    first = data_of(target.read_text("utf-8"))
    assert main(["explore", "--ids", ",".join(map(str, first["ids"])), "-o", str(target), "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert said == {"file": str(target), "bytes": target.stat().st_size, "ids": first["ids"]}
    assert data_of(target.read_text("utf-8")) == first
    assert list(tmp_path.iterdir()) == [target]


def test_a_model_without_tokenizer_shows_ids(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    assert main(["explore", "--ids", "2,70,40", "--model", "conformance", "-o", str(target)]) == OK
    assert data_of(target.read_text("utf-8"))["tokens"] == ["#2", "#70", "#40"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["explore"], "either a PROMPT or --ids"),
        (["explore", "word " * 400], "a page of 2 MB holds"),
        (["explore", "Once", "-o", "no/such/folder/page.html"], "no/such/folder"),
        (["explore", "Once", "-o", "."], "is a folder"),
        (["explore", "--ids", "2,99999"], "the vocabulary has"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == MISUSE
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert reason in err


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "page.html.part")

    monkeypatch.setattr("refgemma.files.os.replace", full_disk)
    assert main(["explore", "Once", "-o", str(tmp_path / "page.html")]) == MISUSE
    assert list(tmp_path.iterdir()) == []
