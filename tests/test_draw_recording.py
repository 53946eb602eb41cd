"""Test the recording of `refgemma check` in README: its text is the command's output, and it needs no motion."""

import re
from xml.etree import ElementTree

import draw_recording
import numpy as np
import pytest

from refgemma.cli.main import main
from refgemma.trace.names import save_trace

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = draw_recording.draw()
ROOT = ElementTree.fromstring(DRAWN)
TEXTS = ["".join(element.itertext()) for element in ROOT.iter(f"{SVG}text")]


def test_the_file_is_current() -> None:
    path = draw_recording.ROOT / "docs" / "_static" / "check.svg"
    assert path.read_text("utf-8") == DRAWN, "python tools/regen.py"


def test_its_text_is_the_output(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, _ = draw_recording.make_port()
    save_trace(tensors, "port.safetensors", {"dtype": "float32"})
    assert main(draw_recording.COMMAND.split()[1:]) == 1
    out = " ".join(capsys.readouterr().out.split())
    comment, dollar, command, *lines = TEXTS
    assert (dollar, command) == ("$", draw_recording.COMMAND)
    assert comment.startswith("# ")
    said = " ".join(" ".join(lines[:-4]).split())  # the last four are the picture's
    assert out.startswith(said)
    for part in ("DIFFERS first at layers.0.attention.probs: swa-window-plus-one", "seen in transformers #29623"):
        assert part in said


def test_the_picture_is_the_wrong_tensor() -> None:
    tensors, mask = draw_recording.make_port()
    probs = np.asarray(dict(tensors)["layers.0.attention.probs"])[0, 0]
    count = {style: len([r for r in ROOT.iter(f"{SVG}rect") if r.get("class") == style]) for style in ("seen", "wrong")}
    assert count == {"seen": int(mask.sum()), "wrong": int((probs > 0).sum() - mask.sum())}
    assert count["wrong"] == 24 - 8  # one key for each token whose window is full


def test_a_check_that_finds_nothing_makes_no_recording() -> None:
    from refgemma.trace.names import run_in_order

    model = draw_recording.refgemma.load("conformance")
    ids = np.random.default_rng(0).integers(4, 97, (1, 24))
    right = [("input_ids", ids), *run_in_order(ids, model.weights, model.config)]
    with pytest.raises(RuntimeError, match="must return 1, for the wrong window"):
        draw_recording.record(right)


def test_it_ends_in_ten_seconds_and_needs_no_motion() -> None:
    style = str(ROOT.find(f"{SVG}style").text)  # type: ignore[union-attr]
    still, moving = style.split("@media (prefers-reduced-motion: no-preference)")
    assert "animation" not in still
    assert set(re.findall(r"animation: \w+ ([\d.]+)s linear (\w+)", moving)) == {("9", "1")}
    assert draw_recording.SECONDS <= 10
    assert [element.text for element in ROOT if element.get("id") == "title"]
