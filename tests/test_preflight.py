"""Compare weights and tokens with the checkpoint's. The cases are copies of the conformance checkpoint and texts of the
tiny model, each wrong in one known way, made here with NumPy alone."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refgemma.cli.main import main
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.modeling.pretrained import load
from refgemma.oracle.known_bugs import KNOWN_BUGS
from refgemma.oracle.preflight import Preflight, compare_tokens, compare_weights
from refgemma.oracle.verdicts import EXIT
from refgemma.weights.conformance import CONFIG

FOLDER = find_model("conformance")
Weights = dict[str, np.ndarray]
LAYER = "model.layers.2."
Q, UP, GATE = (LAYER + name for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.gate_proj.weight"))
NORM, EMBED = LAYER + "input_layernorm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {name: x.astype(np.float32) for name, x in load_file(FOLDER / "model.safetensors").items()}


def bad(weights: Weights, folder: Path) -> list[Preflight]:
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, folder / "port.safetensors")
    return [s for s in compare_weights(folder / "port.safetensors", FOLDER, CONFIG) if s.verdict != "EXACT"]


def test_the_same_weights_are_exact_in_any_precision(weights: Weights, tmp_path: Path) -> None:
    assert bad(weights, tmp_path) == []
    assert bad({name: x.astype(ml_dtypes.bfloat16) for name, x in weights.items()}, tmp_path) == []
    assert bad(weights | {"lm_head.weight": weights[EMBED]}, tmp_path) == []  # a copy of what it is tied to


def pairs_side_by_side(x: np.ndarray) -> np.ndarray:
    """Return rows with row 2 i of a head from row i, and row 2 i + 1 from row i + 5."""
    order = [head * 10 + half * 5 + i for head in range(6) for i in range(5) for half in (0, 1)]
    return x[order]


def pairs_taken_apart(x: np.ndarray) -> np.ndarray:
    return x[[head * 10 + 2 * i + half for head in range(6) for half in (0, 1) for i in range(5)]]


CHANGES: list[tuple[str, str, str, Callable[[Weights], np.ndarray]]] = [
    (Q, "FAIL", "weights-transposed", lambda w: w[Q].T),
    (Q, "FAIL", "weights-reshaped", lambda w: w[Q].T.reshape(w[Q].shape)),
    (Q, "FAIL", "rope-weights-permuted", lambda w: pairs_side_by_side(w[Q])),
    (Q, "FAIL", "rope-weights-permuted", lambda w: pairs_taken_apart(w[Q])),
    (NORM, "FAIL", "weights-one-plus", lambda w: 1 + w[NORM]),
    (NORM, "FAIL", "weights-one-plus", lambda w: (1 + w[NORM]).astype(ml_dtypes.bfloat16)),
    (NORM, "FAIL", "weights-minus-one", lambda w: w[NORM] - 1),
    (UP, "FAIL", "weights-of-another", lambda w: w[GATE]),
    (UP, "FAIL", "UNKNOWN", lambda w: w[UP] * np.float32(1.0001)),
    (UP, "INVALID", "UNKNOWN", lambda w: np.where(w[UP] > 0.3, np.nan, w[UP])),
    (UP, "INVALID", "UNKNOWN", lambda w: w[UP].astype(np.int8)),
    (UP, "FAIL", "UNKNOWN", lambda w: w[UP][:-1]),
    (EMBED, "FAIL", "vocab-padded", lambda w: np.pad(w[EMBED], ((0, 31), (0, 0)))),
    (EMBED, "FAIL", "UNKNOWN", lambda w: np.pad(w[EMBED], ((1, 0), (0, 0)))),
    ("lm_head.weight", "FAIL", "head-untied", lambda w: w[EMBED][::-1] * np.float32(1.5)),
]


@pytest.mark.parametrize(("name", "verdict", "named", "change"), CHANGES, ids=range(len(CHANGES)))
def test_a_wrong_tensor_is_named(
    name: str, verdict: str, named: str, change: Callable[[Weights], np.ndarray], weights: Weights, tmp_path: Path
) -> None:
    found = bad(weights | {name: change(weights)}, tmp_path)
    assert [(s.name, s.verdict, s.named) for s in found] == [(name, verdict, named)]
    assert named == "UNKNOWN" or named in {v.name for v in KNOWN_BUGS}


def test_rounded_weights_are_told_and_no_mistake(weights: Weights, tmp_path: Path) -> None:
    finer = weights | {Q: weights[Q] * np.float32(1.01)}
    (tmp_path / "checkpoint").mkdir()
    save_file(finer, tmp_path / "checkpoint" / "model.safetensors")
    save_file(weights | {Q: finer[Q].astype(np.float16)}, tmp_path / "port.safetensors")
    found = compare_weights(tmp_path / "port.safetensors", tmp_path / "checkpoint", CONFIG)
    assert [(s.verdict, s.named, s.note) for s in found if s.verdict != "EXACT"] == [
        ("NOISY", "weights-rounded", "is rounded to float16")]  # fmt: skip


def test_missing_and_strange_names_are_told(weights: Weights, tmp_path: Path) -> None:
    renamed = {name.replace("layers.3.mlp.down", "layers.3.mlp.Down"): x for name, x in weights.items()}
    down = "model.layers.3.mlp.down_proj.weight"
    assert {(s.name, s.verdict) for s in bad(renamed, tmp_path)} == {
        (down, "MISSING"), (down.replace("down", "Down"), "INVALID")}  # fmt: skip


# --- tokens -----------------------------------------------------------------------------------------------------------

TURNS = json.dumps([{"role": "user", "content": "the sea"}])


def test_tokens_are_compared_with_the_text_they_are_of() -> None:
    tokenizer = load("tiny").tokenizer
    ids = tokenizer.encode("the sea is deep")
    bos = ids[0]
    about = {"text": "the sea is deep"}
    for row, verdict, named in (
        (ids, "EXACT", ""),
        (ids[1:], "FAIL", "missing-bos"),
        ([bos, *ids], "FAIL", "double-bos"),
        (ids[:-1], "FAIL", "UNKNOWN"),
        ([*ids[:2], ids[2] + 1, *ids[3:]], "FAIL", "UNKNOWN"),
    ):
        stage = compare_tokens(row, about, tokenizer)
        assert stage is not None
        assert (stage.verdict, stage.named) == (verdict, named)
    assert compare_tokens(ids, {}, tokenizer) is None


def test_turns_are_compared_with_the_template() -> None:
    tokenizer = load("tiny").tokenizer
    text = "<bos><start_of_turn>user\nthe sea<end_of_turn>\n<start_of_turn>model\n"  # Gemma's, by hand
    right = tokenizer.encode(text, add_special_tokens=False)
    for row, named in (
        (right, ""),
        (right[1:], "missing-bos"),
        ([right[0], *right], "double-bos"),
        (tokenizer.encode(text.replace("model\n", "assistant\n"), add_special_tokens=False), "template-mismatch"),
        (tokenizer.encode("the sea"), "template-mismatch"),
    ):
        stage = compare_tokens(row, {"chat": TURNS}, tokenizer)
        assert stage is not None
        assert stage.named == named
    for broken in ("{", "[]", "3", '[{"content": 1}]', '[{"role": "system", "content": "x"}]'):
        with pytest.raises(InputError, match="invalid chat in the metadata"):
            compare_tokens(right, {"chat": broken}, tokenizer)


def test_check_begins_with_weights_and_tokens(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, port = tmp_path / "run.safetensors", tmp_path / "port.safetensors"
    main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)])
    save_file(load_file(trace), trace, {"text": "a", "dtype": "float32"})
    save_file(weights | {Q: np.ascontiguousarray(weights[Q].T)}, port)
    capsys.readouterr()
    assert main(["check", str(trace), "--model", "conformance", "--weights", str(port), "--json"]) == EXIT["differs"]
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["first_divergence"]) == ("differs", Q)
    assert found["findings"] == []
    assert any("not compared" in remark for remark in found["remarks"])  # this model has no tokenizer
    assert main(["check", str(trace), "--model", "conformance", "--weights", str(tmp_path / "none")]) == 2


def test_every_format_says_that_weights_are_wrong(weights: Weights, tmp_path: Path) -> None:
    # The trace is right, so that a report of tensors alone would be green.
    trace, port, page = tmp_path / "run.safetensors", tmp_path / "port.safetensors", tmp_path / "report"
    main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)])
    save_file(weights | {NORM: 1 + weights[NORM]}, port)
    options = [f"--{kind}={page}.{kind}" for kind in ("junit", "html", "markdown")]
    wrong = main(["check", str(trace), "--model", "conformance", "--weights", str(port), *options])
    assert wrong == EXIT["differs"]
    suite = ElementTree.parse(f"{page}.junit").getroot()
    assert (suite.get("failures"), len(suite.findall("testcase/failure"))) == ("1", 1)
    assert suite.get("tests") == str(len(suite.findall("testcase")))  # skipped ones too, as pytest counts them
    for kind in ("html", "markdown"):
        assert "weights-one-plus" in Path(f"{page}.{kind}").read_text("utf-8")
