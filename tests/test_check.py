"""Test refgemma check on PyTorch's recordings. With the same model, there is no finding. With another model, the report
gives the right tensor and the right name of the difference."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import refgemma
from refgemma.cli.main import main
from refgemma.config import FULL, SLIDING, ConfigError, Gemma2Config
from refgemma.goldens.load import load_golden, model_of, read_manifest
from refgemma.model import forward
from refgemma.oracle import check
from refgemma.oracle import tolerance as tol
from refgemma.oracle.diagnose import Report, diagnose
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug, in_fewer_places
from refgemma.oracle.tolerance import with_storage
from refgemma.oracle.verdicts import CONFORMS, DIFFERS, GOOD
from refgemma.precision import as_dtype
from refgemma.trace.candidate import load_trace, only
from refgemma.trace.names import named_tensors, save_trace

BLOCK = ("embedded", "norm", "logits", "layers.*.attention.out", "layers.*.middle", "layers.*.out")
CASES = {name: about for name, about in read_manifest()["cases"].items() if "calls" in about}
SMALL = [name for name, about in CASES.items() if about["model"] != "tiny"]


def port(case: str, folder: Path) -> Path:
    """Write a case of PyTorch's recordings as a candidate's file."""
    about, golden = load_golden(case)
    whole = len(about["calls"]) == 1
    tensors = {name.removeprefix("calls.0.") if whole else name: x for name, x in golden.items() if name != "loss"}
    metadata = {"dtype": about["dtype"], "calls": json.dumps(list(about["calls"]))}
    save_trace(tensors.items(), folder / "port.safetensors", metadata)
    return folder / "port.safetensors"


def checked(case: str, folder: Path, tensors: tuple[str, ...] | None = None, **wrong: Any) -> Report:
    """Check a recording against its own model, or against a model with other numbers."""
    config, weights = model_of(CASES[case])
    candidate = load_trace(port(case, folder), config)
    candidate = candidate if tensors is None else only(candidate, tensors)
    return diagnose(candidate, weights, replace(config, **wrong))


@pytest.mark.parametrize("case", SMALL)
def test_pytorch_is_not_accused(case: str, tmp_path: Path) -> None:
    report = checked(case, tmp_path)
    assert report.verdict == CONFORMS
    assert {i.judged.verdict for i in report.instances} <= set(GOOD)
    assert len(report.excluded) > 45


@pytest.mark.parametrize("case", ["bends-forward-f32", "bends-forward-bf16"])
def test_pytorch_is_not_accused_by_its_logits_alone(case: str, tmp_path: Path) -> None:
    assert checked(case, tmp_path, ("logits",)).verdict == CONFORMS


# The recording is right and the model is wrong by one number: the name is then that of the way back.
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("wrong", "tensor", "named"),
    [
        ({"query_pre_attn_scalar": 13}, "layers.0.attention.scores", "query_pre_attn_scalar = 12"),
        ({"attn_logit_softcapping": 4.0}, "layers.0.attention.capped", "attn_logit_softcapping = 2"),
        ({"final_logit_softcapping": 5.0}, "logits", "final_logit_softcapping = 3"),
        ({"sliding_window": 6}, "layers.0.attention.probs", "swa-window-minus-one"),
        ({"sliding_window": 4}, "layers.0.attention.probs", "swa-window-plus-one"),
        ({"layer_types": (FULL, SLIDING) * 2}, "layers.0.attention.probs", "swa-layer-parity-swapped"),
        (
            {"layer_types": (FULL,) * 4},
            "layers.0.attention.probs",
            "swa-layer-parity-swapped only in layers 0, 2 or swa-all-local only in layers 0, 2",
        ),
        ({"rope_theta": 12345.0, "rope_parameters": None}, "cos", "rope_theta = 10000"),
    ],
)
def test_a_difference_is_named(wrong: Mapping[str, Any], tensor: str, named: str, dtype: str, tmp_path: Path) -> None:
    report = checked(f"bends-forward-{dtype}", tmp_path, **wrong)
    assert report.verdict == DIFFERS
    assert report.first_divergence is not None
    assert report.first_divergence.tensor == tensor
    if named.startswith(("swa", "UNKNOWN")) or dtype == "f32":
        assert report.findings[0].named == named
    else:  # a number estimated from bfloat16 is known to three digits
        parameter, value = named.split(" = ")
        estimate = next(e for e in report.findings[0].estimates if e.parameter == parameter)
        assert estimate.fits
        assert estimate.value == pytest.approx(float(value), rel=3e-3)
    assert len({f.field for f in report.findings}) == 1 or tensor == "cos"  # what follows from it is not accused


def test_no_bug_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of one field is not tried in that field and all layers again; a bug of several fields is tried in each."""
    tried: list[str] = []

    def noted(bug: KnownBug, field: str, layers: tuple[int, ...] = ()) -> KnownBug:
        tried.append(f"{field}: {bug.name} {layers}")
        return in_fewer_places(bug, field, layers)

    monkeypatch.setattr("refgemma.oracle.diagnose.in_fewer_places", noted)
    assert checked("bends-forward-f32", tmp_path, attn_logit_softcapping=4.0).first_wrong == "layers.0.attention.capped"
    alone = {bug.name for bug in KNOWN_BUGS if bug.fields == ("attention.capped",)}
    assert alone
    assert not [one for one in tried if one.split()[1] in alone]
    checked("bends-forward-f32", tmp_path, query_pre_attn_scalar=13)
    assert "attention.scores: gqa-tile ()" in tried
    assert len(tried) == len(set(tried))


def test_one_wrong_element_is_seen(tmp_path: Path) -> None:
    path = port("bends-forward-f32", tmp_path)
    tensors = load_file(path)
    tensors["layers.2.feed_forward.gelu"][1, 3, 7] *= np.float32(1.0001)
    save_trace(tensors.items(), path, {"dtype": "float32"})
    config, weights = model_of(CASES["bends-forward-f32"])
    report = diagnose(load_trace(path, config), weights, config)
    assert report.first_divergence is not None
    assert report.first_divergence.tensor == "layers.2.feed_forward.gelu"
    assert report.findings[0].named == "UNKNOWN"
    assert report.first_divergence.judged.statistics.place == (1, 3, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 10,
             "layer_types": (FULL,) * 4},
            "attn-softcap-missing + final-softcap-missing + scale-head-dim + swa-all-global",
        ),
        ({"final_logit_softcapping": None, "layer_types": (FULL,) * 4}, "final-softcap-missing + swa-all-global"),
        ({"final_logit_softcapping": None, "query_pre_attn_scalar": 17}, "UNKNOWN"),
    ],
)  # fmt: skip
def test_what_was_left_out_together_is_named_from_the_logits(
    changes: Mapping[str, Any], named: str, tmp_path: Path
) -> None:
    model = refgemma.load("conformance")
    ids = np.random.default_rng(0).integers(4, 97, (1, 20))
    logits = forward(ids, model.weights, model.config.changed(**changes)).logits
    save_trace([("input_ids", ids), ("logits", logits)], tmp_path / "port.safetensors", {"dtype": "float32"})
    report = diagnose(load_trace(tmp_path / "port.safetensors", model.config), model.weights, model.config)
    assert [f.named for f in report.findings] == [named]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_logit_is_seen_among_the_logits_alone(dtype: str, tmp_path: Path) -> None:
    model = refgemma.load("conformance", dtype)
    ids = np.random.default_rng(0).integers(4, 97, (2, 24))
    logits = np.array(forward(ids, model.weights, model.config).logits, np.float32)
    logits[1, 15, 7] = -logits[1, 15, 7] + 0.25
    wrong = [("input_ids", ids), ("logits", as_dtype(logits, dtype))]
    save_trace(wrong, tmp_path / "port.safetensors", {"dtype": dtype})
    report = diagnose(load_trace(tmp_path / "port.safetensors", model.config), model.weights, model.config)
    assert (report.verdict, [f.named for f in report.findings]) == (DIFFERS, ["UNKNOWN"])
    assert report.findings[0].worst.judged.statistics.place == (1, 15, 7)


@pytest.mark.slow
@pytest.mark.parametrize("names", [None, BLOCK, ("logits",)], ids=["full", "block", "logits"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_few_wrong_elements_are_no_way_of_rounding(dtype: str, names: tuple[str, ...] | None, tmp_path: Path) -> None:
    # One of 97 logits, and of as many scores: fewer than near a boundary of rounding there may be, but far off.
    model = refgemma.load("conformance", dtype)
    ids = np.random.default_rng(0).integers(4, 97, (1, 20))
    tensors = dict(named_tensors(forward(ids, model.weights, model.config)))
    for name in ("logits", "layers.1.out", "layers.1.attention.scores"):
        wrong = as_dtype(np.array(tensors[name], np.float32), dtype)
        wrong[..., 5] = as_dtype(np.array(wrong[..., 5], np.float32) + 1, dtype)
        save_trace(({"input_ids": ids} | tensors | {name: wrong}).items(), tmp_path / "p.safetensors", {"dtype": dtype})
        whole = load_trace(tmp_path / "p.safetensors", model.config)
        if names is None or name in names or (name == "layers.1.out" and "layers.*.out" in names):
            report = diagnose(whole if names is None else only(whole, names), model.weights, model.config)
            assert report.verdict == DIFFERS
            assert report.first_divergence is not None
            assert report.first_divergence.tensor == name


# --- bounds -----------------------------------------------------------------------------------------------------------


def sums(terms: np.ndarray) -> dict[str, np.ndarray]:
    """Return float32 sums along the last axis: in order, in reverse order, in pairs, in blocks of eight."""
    forwards, backwards = np.zeros(terms.shape[:-1], np.float32), np.zeros(terms.shape[:-1], np.float32)
    for n in range(terms.shape[-1]):
        forwards, backwards = forwards + terms[..., n], backwards + terms[..., -1 - n]
    pairs = terms
    while pairs.shape[-1] > 1:
        pairs = np.concatenate([pairs, np.zeros_like(pairs[..., : pairs.shape[-1] % 2])], axis=-1)
        pairs = pairs[..., ::2] + pairs[..., 1::2]
    blocks = np.zeros(terms.shape[:-1], np.float32)
    for start in range(0, terms.shape[-1], 8):
        block = np.zeros_like(blocks)
        for n in range(start, min(start + 8, terms.shape[-1])):
            block = block + terms[..., n]
        blocks = blocks + block
    return {"forwards": forwards, "backwards": backwards, "pairs": pairs[..., 0], "blocks": blocks}


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 40, 300]), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_sums_in_any_order_are_allowed(seed: int, n: int, storage: str) -> None:
    rng = np.random.default_rng(seed)
    x = np.asarray(as_dtype(rng.standard_normal((4, n)), storage), np.float64)
    weight = np.asarray(as_dtype(rng.standard_normal((6, n)), storage), np.float64)
    exact = x @ weight.T
    allowed = with_storage(tol.linear(x, weight), exact, storage)
    terms = x.astype(np.float32)[:, None, :] * weight.astype(np.float32)
    for result in sums(terms).values():
        error = np.abs(np.asarray(as_dtype(result, storage), np.float64) - exact)
        assert (error <= allowed.error_bound).all()
        assert np.sqrt(np.mean((error / allowed.std) ** 2)) < 2.5


def test_what_is_allowed_is_not_vacuous(tmp_path: Path) -> None:
    # Of every kind of tensor some element errs by a thousandth of what it may, or all elements are exact.
    for case in ("bends-forward-f32", "bends-forward-bf16"):
        for instance in checked(case, tmp_path).instances:
            s = instance.judged.statistics
            assert s.exact == 1 or s.error_over_bound > 1e-3, instance


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_catalogue_is_whole() -> None:
    assert len(KNOWN_BUGS) >= 45
    assert len({v.name for v in KNOWN_BUGS}) == len(KNOWN_BUGS)
    for v in KNOWN_BUGS:
        assert v.says
        assert v.seen
        assert v.shows
        assert v.knob
        assert v.fields


def test_exit_codes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "run.safetensors"
    assert main(["trace", "--ids", "2,5,9,30,31", "--model", "conformance", "-o", str(trace)]) == 0
    capsys.readouterr()
    assert main(["check", str(trace), "--model", "conformance"]) == 0
    said = capsys.readouterr().out
    assert "CONFORMS" in said
    assert max(map(len, said.splitlines())) <= 118
    tensors = load_file(trace)
    tensors["logits"] = tensors["raw_logits"]
    save_trace(tensors.items(), trace, {"dtype": "float32"})
    files = [f for kind in ("html", "markdown", "junit", "bundle") for f in (f"--{kind}", str(tmp_path / kind))]
    assert main(["check", str(trace), "--model", "conformance", "--json", *files]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "refgemma-check/1"
    assert (found["verdict"], found["first_divergence"]) == ("differs", "logits")
    assert found["findings"][0]["explanations"][0]["variant"] == "final-softcap-missing"
    assert found["excluded"]
    assert found["blind"]
    for kind in ("html", "markdown", "junit"):
        assert "final-softcap-missing" in (tmp_path / kind).read_text(encoding="utf-8")
    assert "://" not in (tmp_path / "html").read_text(encoding="utf-8")  # it needs no network
    assert set(load_file(tmp_path / "bundle")) == {"raw_logits", "logits", "expected"}
    without = {name: x for name, x in tensors.items() if name != "logits"}
    save_trace(without.items(), trace, {"dtype": "float32"})
    assert main(["check", str(trace), "--model", "conformance"]) == 4  # nothing missing ends in 0


def test_a_named_mistake_is_no_blind_spot(tmp_path: Path) -> None:
    """The trace has only logits, of the model with a window that is one key too wide."""
    config, weights = model_of(CASES["bends-forward-f32"])
    ids = np.array([[2, *range(5, 25)]])
    wrong = forward(ids, weights, config.changed(sliding_window=config.sliding_window + 1)).logits
    save_trace([("input_ids", ids), ("logits", wrong)], tmp_path / "port.safetensors", {"dtype": "float32"})
    report = diagnose(load_trace(tmp_path / "port.safetensors", config), weights, config)
    assert report.findings[0].named == "swa-window-plus-one"
    assert "swa-window-plus-one" not in {v.name for v in (*report.undetectable, *report.excluded)}
    assert report.asked == len(report.undetectable) + len(report.excluded) + 1


def test_an_override_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "run.safetensors"
    main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)])
    main(["check", str(trace), "--model", "conformance", "--allow", "10"])
    assert "OVERRIDE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "not a complete safetensors file"),
        (b"\xff" * 4096, "not a complete safetensors file"),
        ({"logits": np.zeros((1, 3, 97), np.float32)}, "input_ids, the tokens of the run, are missing"),
        ({"input_ids": np.array([[2, 500]])}, "the vocabulary has"),
        ({"input_ids": np.array([[2, 5]])}, "has no tensor of this model"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    assert main(["check", str(path), "--model", "conformance"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_other_shapes_are_invalid(bad: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.safetensors"
    main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(path)])
    tensors = load_file(path)
    tensors["layers.1.attention.out"][0, 1, 2] = bad
    tensors["logits"] = np.pad(tensors["logits"], ((0, 0), (0, 0), (0, 3)))
    save_trace(tensors.items(), path, {"dtype": "float32"})
    capsys.readouterr()
    assert main(["check", str(path), "--model", "conformance", "--json"]) == 1
    found = {t["tensor"]: t["verdict"] for t in json.loads(capsys.readouterr().out)["tensors"]}
    assert found["layers.1.attention.out"] == found["logits"] == "INVALID"


NUMBERS = (
    "rms_norm_eps", "rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip


@pytest.fixture(scope="module")
def own_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run.safetensors"
    assert main(["trace", "--ids", "2,5,9,30", "--model", "conformance", "-o", str(path)]) == 0
    return path


@pytest.mark.slow
@settings(max_examples=15)
@given(st.sampled_from(NUMBERS), st.floats(-310, 310))
@example("rope_theta", -299.0)  # no angle is finite
@example("rope_theta", -30.0)  # angles too large for float32 to tell apart
@example("rms_norm_eps", 299.0)  # a known bug would have sixteen times as much
def test_a_model_with_another_number_is_refused_or_differs(own_trace: Path, name: str, exponent: float) -> None:
    """A trace passes only for a model that computes what was traced."""
    usual = Gemma2Config.from_pretrained("conformance")
    value = float(f"{'%.3f' % 10 ** (exponent % 1)}e{int(exponent // 1)}")
    try:
        config = usual.changed(**{name: value})
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert repr(value) in refusal
        return
    with np.errstate(all="ignore"):
        report = check(own_trace, "conformance", config=config)
        found = forward([[2, 5, 9, 30]], refgemma.load("conformance").weights, config).logits
    if report.verdict == CONFORMS:  # float32 logits, none above the cap 2: some hundred roundings of each
        np.testing.assert_allclose(found, load_file(own_trace)["logits"], atol=1e-4)


def test_a_half_precision_trace_keeps_the_order_of_its_axes(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    assert main(["trace", "--ids", "2,5,9,30", "--model", "conformance", "--dtype", "bfloat16", "-o", str(path)]) == 0
    assert main(["check", str(path), "--model", "conformance"]) == 0


@pytest.mark.parametrize("layer", [0, 1])
def test_one_tensor_of_another_shape_hides_no_estimate(layer: int, tmp_path: Path) -> None:
    """The cap is wrong in every layer, and one layer's tensor has an extra axis."""
    tiny = refgemma.load("conformance")
    ids = np.array([[2, 5, 9, 30]])
    run = forward(ids, tiny.weights, tiny.config.changed(attn_logit_softcapping=5.0))
    tensors = {"input_ids": ids, **dict(named_tensors(run))}
    tensors[f"layers.{layer}.attention.capped"] = tensors[f"layers.{layer}.attention.capped"][..., None]
    save_trace(tensors.items(), tmp_path / "port.safetensors", {"dtype": "float32"})
    report = check(tmp_path / "port.safetensors", "conformance")
    assert report.findings[0].named == "attn_logit_softcapping = 5"
