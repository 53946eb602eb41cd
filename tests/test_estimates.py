"""Test estimates of a candidate's numbers and the location of its errors. `refgemma check` must identify the changed
number or the changed elements of each run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refgemma
from refgemma.config import Gemma2Config
from refgemma.model import forward
from refgemma.modeling.pretrained import Pretrained
from refgemma.oracle import estimate
from refgemma.oracle.diagnose import Diagnosis, report_on
from refgemma.oracle.engine import Engine
from refgemma.oracle.estimate import WITH_EARLIER_TOKENS, Estimate, fit_numbers
from refgemma.oracle.known_bugs import KnownBug, function
from refgemma.oracle.locate import map_errors
from refgemma.trace.candidate import Candidate, load_trace
from refgemma.trace.names import named_tensors, save_trace
from refgemma.weights.parameters import Weights

IDS = np.random.default_rng(3).integers(4, 97, (2, 20))
MODELS = {dtype: refgemma.load("conformance", dtype) for dtype in ("float32", "bfloat16")}
Tensors = dict[str, np.ndarray]


def run(model: Pretrained, **changes: Any) -> Tensors:
    """Return the tensors of a model with other numbers."""
    return dict(named_tensors(forward(IDS, model.weights, model.config.changed(**changes))))


def candidate(tensors: Mapping[str, Any], folder: Path, config: Gemma2Config, dtype: str = "float32") -> Candidate:
    save_trace(({"input_ids": IDS} | dict(tensors)).items(), folder / "port.safetensors", {"dtype": dtype})
    return load_trace(folder / "port.safetensors", config)


def estimates(tensors: Mapping[str, Any], folder: Path, dtype: str = "float32") -> dict[str, Estimate]:
    """Return the first estimate of each parameter in all findings."""
    model = MODELS[dtype]
    work = Engine(candidate(tensors, folder, model.config, dtype), model.weights, model.config)
    found: dict[str, Estimate] = {}
    for finding in Diagnosis(work).findings():
        for e in finding.estimates:
            found.setdefault(e.parameter, e)
    return found


@pytest.mark.parametrize("dtype", MODELS)
@pytest.mark.parametrize("window", [3, 7, 9, 15])
def test_a_window_is_found(window: int, dtype: str, tmp_path: Path) -> None:
    found = estimates(run(MODELS[dtype], sliding_window=window), tmp_path, dtype)["sliding_window"]
    assert (found.value, found.expected, found.fits) == (window, 8, True)


def test_a_mask_that_is_no_window_does_not_fit(tmp_path: Path) -> None:
    tensors = run(MODELS["float32"])
    probs = np.array(tensors["layers.0.attention.probs"])
    probs[..., 2] = 0  # as if nobody saw key 2
    tensors["layers.0.attention.probs"] = probs / probs.sum(axis=-1, keepdims=True)
    found = estimates(tensors, tmp_path).get("sliding_window")
    assert found is None or not found.fits


@pytest.mark.parametrize("offset", [1, 3])
def test_a_position_offset_is_found(offset: int, tmp_path: Path) -> None:
    model = MODELS["float32"]
    positions = np.broadcast_to(np.arange(IDS.shape[1]) + offset, IDS.shape)
    shifted = dict(named_tensors(forward(IDS, model.weights, model.config, position_ids=positions)))
    found = estimates(shifted, tmp_path)["position offset"]
    assert (found.value, found.expected, found.fits) == (offset, 0, True)


@pytest.mark.parametrize("dtype", MODELS)
def test_an_embedding_scale_is_found(dtype: str, tmp_path: Path) -> None:
    model = MODELS[dtype]
    unscaled = model.weights.embed_tokens[IDS]  # as if nothing were scaled
    found = estimates({"embedded": unscaled}, tmp_path, dtype)["embedding scale"]
    assert found.fits
    assert found.value == pytest.approx(1, rel=1e-4)
    assert found.near == "1 (no scale)"


# The fields that a parameter is estimated from, and what it may be: caps and scales that bend, eps that matters.
RANGES = {
    "query_pre_attn_scalar": (2.0, 200.0),
    "attn_logit_softcapping": (0.5, 20.0),
    "final_logit_softcapping": (0.5, 20.0),
    "rms_norm_eps": (1e-6, 1e-3),
    "rope_theta": (1e2, 1e6),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", MODELS)
@pytest.mark.parametrize("parameter", RANGES)
@settings(max_examples=8)
@given(st.floats(0, 1))
def test_an_estimate_is_off_by_no_more_than_it_says(
    parameter: str, dtype: str, tmp_path_factory: pytest.TempPathFactory, part: float
) -> None:
    model = MODELS[dtype]
    low, high = RANGES[parameter]
    value = low * (high / low) ** part
    changes: dict[str, Any] = {parameter: value}
    if parameter == "query_pre_attn_scalar":
        changes[parameter] = value = round(value)
    if parameter == "rope_theta":
        changes["rope_parameters"] = None
    found = estimates(run(model, **changes), tmp_path_factory.mktemp("port"), dtype).get(parameter)
    if found is None:  # too near to the model's own number to be a finding
        assert value == pytest.approx(
            getattr(model.config, parameter), rel=0.5 if parameter == "rms_norm_eps" else 0.05
        )
        return
    assert found.fits
    # Five standard deviations; rounding that all elements share moves an estimate besides, by a few units of 2**-24,
    # or in bfloat16, where cosines and factors are stored with 8 bits, of 2**-9.
    shared = 2.0**-9 if dtype == "bfloat16" else 16 * 2.0**-24
    assert abs(found.value - value) <= 5 * found.uncertainty + shared * value


def noisy(weights: Weights, size: float, matrix: str = "q_proj") -> Weights:
    """Return weights of which one matrix has random errors. The first token does not show those of the queries."""
    layer = weights.layers[1]
    right = getattr(layer, matrix)
    wrong = right * (1 + size * np.random.default_rng(1).standard_normal(right.shape))
    changed = replace(layer, **{matrix: np.float32(wrong)})
    return replace(weights, layers=[weights.layers[0], changed, *weights.layers[2:]])


def named_by_logits(tensors: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the names of the findings, if only the logits are recorded and no known bug may have the name."""
    model = MODELS["float32"]
    recorded = {name: x for name, x in tensors.items() if name in ("logits", "attention_mask")}
    port = candidate(recorded, folder, model.config)
    return [f.named for f in report_on(Engine(port, model.weights, model.config), bugs=(), numbers=True).findings]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"rope_theta": 20000.0, "rope_parameters": None}, "rope_theta = 20000"),
     ({"query_pre_attn_scalar": 14}, "query_pre_attn_scalar = 14"),
     ({"attn_logit_softcapping": 3.25}, "attn_logit_softcapping = 3.25"),
     ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30"),
     ({"rms_norm_eps": 1e-4}, "rms_norm_eps = 0.0001"), ({"sliding_window": 5}, "sliding_window = 5")],
)  # fmt: skip
def test_logits_alone_name_a_number(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    [found] = named_by_logits(run(MODELS["float32"], **changes), tmp_path)
    parameter, value = found.split(" = ")
    assert parameter == named.split(" = ")[0]
    # The relative uncertainty of the numbers is 1e-6 to 1e-5.
    assert float(value) == pytest.approx(float(named.split(" = ")[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"rope_theta": 20000.0, "rope_parameters": None}, "rope_theta = 20000"),
     ({"query_pre_attn_scalar": 14}, "query_pre_attn_scalar = 14"), ({"sliding_window": 5}, "sliding_window = 5")],
)  # fmt: skip
def test_logits_of_padded_texts_name_a_number(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = MODELS["float32"]
    mask = np.ones(IDS.shape, np.int64)
    mask[0, :6] = 0
    wrong = forward(IDS, model.weights, model.config.changed(**changes), attention_mask=mask)
    assert named_by_logits({"logits": wrong.logits, "attention_mask": mask}, tmp_path) == [named]


@pytest.mark.parametrize("changes", [{"rope_theta": 500.0, "rope_parameters": None}, {"query_pre_attn_scalar": 14},
                                     {"attn_logit_softcapping": 0.5}, {"sliding_window": 1}])  # fmt: skip
def test_the_first_token_shows_no_number_of_attention(changes: dict[str, Any]) -> None:
    """So these numbers are not tried if the first token's row is wrong."""
    right, wrong = run(MODELS["float32"])["logits"], run(MODELS["float32"], **changes)["logits"]
    assert (wrong[:, 0] == right[:, 0]).all()
    assert (wrong[:, 1] != right[:, 1]).any()
    assert set(changes) & set(WITH_EARLIER_TOKENS)


@pytest.mark.parametrize("window", [5, 12])
def test_a_row_shorter_than_both_windows_is_the_same(window: int) -> None:
    """So only windows that reach the first wrong row are tried."""
    right, wrong = run(MODELS["float32"])["logits"], run(MODELS["float32"], sliding_window=window)["logits"]
    same = (wrong == right).all(axis=(0, 2))
    assert same.argmin() == min(window, MODELS["float32"].config.sliding_window)


@pytest.mark.parametrize("matrix", ["o_proj", "q_proj"])
def test_numbers_that_cannot_explain_the_first_row_are_not_tried(
    matrix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    model, tried = MODELS["float32"], set()
    logits = forward(IDS, noisy(model.weights, 1.0, matrix), model.config).logits
    port = candidate({"logits": logits}, tmp_path, model.config)
    monkeypatch.setattr(estimate, "_fit_number", lambda engine, names, parameter, *_: tried.add(parameter))
    assert list(fit_numbers(Engine(port, model.weights, model.config), ["logits"])) == []
    everywhere = {"final_logit_softcapping", "rms_norm_eps", "embedding scale"}
    assert tried == (everywhere if matrix == "o_proj" else everywhere | set(WITH_EARLIER_TOKENS))


@pytest.mark.parametrize("size", [1e-6, 1e-4, 0.01, 1.0])
def test_no_number_is_named_for_other_weights(size: float, tmp_path: Path) -> None:
    model = MODELS["float32"]
    tensors = dict(named_tensors(forward(IDS, noisy(model.weights, size), model.config)))
    assert named_by_logits(tensors, tmp_path) in ([], ["UNKNOWN"])


@pytest.mark.parametrize("size", [3e-4, 1e-3])
def test_a_number_that_leaves_more_than_rounding_is_not_named(size: float, tmp_path: Path) -> None:
    """The number leaves little of the error, because the other mistake is small."""
    model = MODELS["float32"]
    config = model.config.changed(rope_theta=20000.0, rope_parameters=None)
    tensors = dict(named_tensors(forward(IDS, noisy(model.weights, size), config)))
    port = candidate({"logits": tensors["logits"]}, tmp_path, model.config)
    engine = Engine(port, model.weights, model.config)
    assert [e.parameter for e in fit_numbers(engine, ["logits"])] == ["rope_theta"]
    assert named_by_logits(tensors, tmp_path) == ["UNKNOWN"]


def test_a_bug_whose_results_are_not_numbers_is_ruled_out(tmp_path: Path) -> None:
    model = MODELS["float32"]
    bug = KnownBug("nan", "", ("logits",), function(soft_cap=lambda x, cap: x * np.nan), "")
    for weights in (model.weights, noisy(model.weights, 1.0)):  # of a port that conforms, and of one that does not
        port = candidate({"logits": forward(IDS, weights, model.config).logits}, tmp_path, model.config)
        report = report_on(Engine(port, model.weights, model.config), bugs=(bug,))
        assert [found.named for found in report.findings] == ([] if weights is model.weights else ["UNKNOWN"])
        assert report.excluded == (bug,)


def test_numbers_are_tried_before_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families take longer."""
    monkeypatch.setattr(Diagnosis, "search", lambda self, finding: pytest.fail("a family was tried"))
    model = MODELS["float32"]
    logits = run(model, rope_theta=20000.0, rope_parameters=None)["logits"]
    port = candidate({"logits": logits}, tmp_path, model.config)
    [found] = report_on(Engine(port, model.weights, model.config)).findings
    assert found.named == "rope_theta = 20000"


def test_two_numbers_are_not_taken_for_one(tmp_path: Path) -> None:
    tensors = run(MODELS["float32"], rms_norm_eps=1e-4, attn_logit_softcapping=4.0)
    assert named_by_logits(tensors, tmp_path) == ["UNKNOWN"]


# --- where ------------------------------------------------------------------------------------------------------------


def spoilt(name: str, spoil: Callable[[np.ndarray], None], folder: Path) -> Engine:
    """Check a run in which some elements of one tensor are doubled."""
    model = MODELS["float32"]
    tensors = run(model)
    wrong = np.array(tensors[name])
    spoil(wrong)
    return Engine(candidate(tensors | {name: wrong}, folder, model.config), model.weights, model.config)


def twice(*place: Any) -> Callable[[np.ndarray], None]:
    def spoil(x: np.ndarray) -> None:
        x[place] = 2 * x[place] + 1

    return spoil


ALL = slice(None)


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("layers.1.attention.scores", (ALL, [1, 4]), "heads 1, 4"),
        ("layers.1.attention.k", (ALL, 2), "key heads 2"),
        ("layers.1.attention.out", (1,), "rows 1"),
        ("layers.1.feed_forward.gelu", (ALL, slice(5, 12)), "positions 5 to 11"),
        ("layers.1.feed_forward.gelu", (ALL, [0, 7]), "positions 0, 7"),
        ("layers.1.attention.scores", (ALL, ALL, ALL, 0), "only key 0"),
        ("layers.0.attention.probs", (ALL, ALL, range(7, 20), range(13)), "keys 7 to 7 before their query; first at"),
        (
            "layers.0.attention.probs",
            (ALL, ALL, range(8, 20), range(12)),
            "keys 8 to 8 before their query; keys be",
        ),
        ("layers.0.attention.probs", (ALL, ALL, range(9), range(1, 10)), "only keys after their query"),
        ("layers.2.attention.q_rot", (ALL, ALL, ALL, slice(5, 10)), "second halves of heads"),
        ("layers.2.attention.q_rot", (ALL, ALL, ALL, slice(5)), "first halves of heads"),
        ("logits", (ALL, ALL, slice(90, 97)), "columns 90 to 96"),
    ],
)
def test_find_wrong_are_described(name: str, place: tuple[Any, ...], said: str, tmp_path: Path) -> None:
    work = spoilt(name, twice(*place), tmp_path)
    finding = next(f for f in Diagnosis(work).findings() if f.instances[0].tensor == name)
    assert said in finding.where, finding.where


def test_a_map_shows_the_find_wrong_and_no_others(tmp_path: Path) -> None:
    name = "layers.1.attention.scores"
    work = spoilt(name, twice(0, 4, 13, 6), tmp_path)
    by_key, by_head = map_errors(work, name)
    assert (by_key.rows, by_key.columns) == ("seq", "keys")
    assert (by_head.rows, by_head.columns) == ("heads", "seq")
    assert np.argwhere(by_key.numbers > 10).tolist() == [[13, 6]]
    assert np.argwhere(by_head.numbers > 10).tolist() == [[4, 13]]
    assert np.isnan(by_key.numbers[6, 13])  # a key that the query may not see
    assert np.nanmax(np.where(by_key.numbers > 10, np.nan, by_key.numbers)) < 4  # the others are rounding


def test_what_is_no_number_is_in_the_map(tmp_path: Path) -> None:
    name = "layers.1.attention.out"

    def spoil(x: np.ndarray) -> None:
        x[0, 2, 3] = np.nan

    work = spoilt(name, spoil, tmp_path)
    [only] = map_errors(work, name)
    assert np.argwhere(np.isinf(only.numbers)).tolist() == [[2, 3]]
    first = next(iter(Diagnosis(work).findings()))
    assert len(replace(first).maps) == 1
