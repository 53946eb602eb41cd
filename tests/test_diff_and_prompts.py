"""Test refgemma diff on PyTorch's recordings (one is changed in a known place), and the inputs of refgemma prompts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refgemma.cli.main import main
from refgemma.goldens.load import load_golden
from refgemma.hub import find_model
from refgemma.modeling.pretrained import load
from refgemma.oracle.coverage import Detected, cover, run_prompt, write_prompts
from refgemma.oracle.known_bugs import known_bug
from refgemma.oracle.prompts import prompts
from refgemma.trace.names import save_trace
from refgemma.weights.conformance import CONFIG

CASE = "bends-forward-f32"
MODEL = Path(__file__).parents[1] / "golden" / "models" / "bends"


def written(tensors: dict[str, Any], path: Path) -> str:
    save_trace(tensors.items(), path, {"dtype": "float32"})
    return str(path)


@pytest.fixture(scope="module")
def torchs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Return PyTorch's recording."""
    return {n.removeprefix("calls.0."): x for n, x in load_golden(CASE)[1].items() if n != "loss"}


def diff(a: str, b: str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["diff", a, b, "--json", *options])
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["exit_code"]) == ("refgemma-diff/1", code)
    return code, found


def test_the_same_numbers_are_0(
    torchs: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = dict(torchs) | {"mine": np.array([np.nan, np.inf])}
    a = written(nan, tmp_path / "a")
    code, found = diff(a, a, capsys)
    assert (code, found["first_difference"]) == (0, None)
    assert {t["equal"] for t in found["tensors"]} == {1.0}


def test_the_first_difference_is_told_with_its_place(
    torchs: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {name: x.copy() for name, x in torchs.items()}
    changed["layers.2.attention.out"][0, 3, 5] += 0.25
    changed["layers.1.feed_forward.up"][1, 2, 4] = np.nan
    a, b = written(torchs, tmp_path / "a"), written(dict(reversed(changed.items())), tmp_path / "b")
    code, found = diff(a, b, capsys)
    assert (code, found["first_difference"]) == (1, "layers.1.feed_forward.up")
    rows = {t["tensor"]: t for t in found["tensors"] if t["equal"] < 1}
    assert list(rows) == ["layers.1.feed_forward.up", "layers.2.attention.out"]
    assert (rows["layers.1.feed_forward.up"]["largest"], rows["layers.1.feed_forward.up"]["place"]) == (
        "inf",
        [1, 2, 4],
    )
    out = rows["layers.2.attention.out"]
    assert out["largest"] == pytest.approx(0.25, rel=1e-6)
    assert out["place"] == [0, 3, 5]
    size = float(np.sqrt(np.sum(np.float64(torchs["layers.2.attention.out"]) ** 2)))
    assert out["relative"] == pytest.approx(0.25 / size, rel=1e-6)


def test_with_a_model_what_follows_from_a_difference_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], torchs: dict[str, np.ndarray]
) -> None:
    # PyTorch and refgemma differ in nearly every tensor, by rounding.
    ids = ",".join(map(str, torchs["input_ids"][0]))
    ours = str(tmp_path / "ours")
    assert main(["trace", "--ids", ids, "--model", str(MODEL), "-o", ours]) == 0
    one_row = {name: x[:1] for name, x in torchs.items() if name != "attention_mask"}
    a = written(one_row, tmp_path / "a")
    code, found = diff(a, ours, capsys, "--model", str(MODEL))
    assert found["first_difference"] is not None
    assert (code, found["first_unexplained"]) == (0, None)
    # One wrong operation: it differs by more than its inputs explain, and no other does.
    moved = {name: x.copy() for name, x in load_file(ours).items()}
    moved["layers.1.attention.mixed"] *= np.float32(1.001)
    code, found = diff(a, written(moved, tmp_path / "b"), capsys, "--model", str(MODEL))
    assert (code, found["first_unexplained"]) == (1, "layers.1.attention.mixed")
    bad = [t["tensor"] for t in found["tensors"] if (t["error_over_bound"] or 0) > 1]
    assert bad == [
        "layers.1.attention.mixed",
        "layers.1.attention.out",
    ]  # the changed one, and what was computed before


def test_a_missing_tensor_is_never_0(
    torchs: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = {name: x for name, x in torchs.items() if name != "norm"}
    a, b = written(torchs, tmp_path / "a"), written(some, tmp_path / "b")
    code, found = diff(a, b, capsys)
    assert (code, found["only_a"], found["only_b"]) == (4, ["norm"], [])
    c = written({"other": np.zeros(3)}, tmp_path / "c")
    assert diff(a, c, capsys)[0] == 4
    d = written({"norm": np.zeros((2, 2)), "input_ids": torchs["input_ids"]}, tmp_path / "d")
    assert diff(a, d, capsys)[0] == 1
    assert main(["diff", a, str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_written_as_a_port_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "-o", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "refgemma-prompts/1"
    for name, prompt in prompts(CONFIG).items():
        tensors = load_file(tmp_path / f"{name}.safetensors")
        assert (tensors["input_ids"] == prompt.input_ids).all()
        assert (tensors["attention_mask"] == prompt.attention_mask).all()
    assert (tmp_path / "prompts.json").is_file()


def test_few_prompts_are_chosen_and_what_none_shows_is_told(tmp_path: Path) -> None:
    a, b, c = (known_bug(name) for name in ("gqa-tile", "scale-224", "pad-attended"))
    found = [
        Detected("plain", "float32", (a,)),
        Detected("padded", "float32", (a, c)),
        Detected("cached", "float32", (b,)),
    ]
    chosen = cover(found)
    assert [s.prompt for s in chosen] == ["padded", "cached"]
    write_prompts(chosen, CONFIG, tmp_path, "conformance")
    about = json.loads((tmp_path / "prompts.json").read_text())
    assert about["prompts"][0]["shows"] == {"float32": ["gqa-tile", "pad-attended"]}
    assert "gelu-exact" in {v["variant"] for v in about["not_shown"]}


def test_a_prompt_in_calls_is_run_in_calls() -> None:
    model, prompt = load(find_model("conformance")), prompts(CONFIG)["cached"]
    tensors = dict(run_prompt(prompt, model.weights, model.config))
    rows = [tensors[f"calls.{n}.logits"].shape[1] for n in range(len(prompt.calls))]
    assert tuple(rows) == prompt.calls
