"""Check traces as other engines write them: correct ones get no false finding, and faults are named. Correct runs are
recordings of PyTorch (golden/); DeepMind's norm is a recording of JAX 0.10.2 (tests/recorded)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import refgemma
from refgemma.cli.main import main
from refgemma.config import FULL
from refgemma.goldens.load import load_golden, model_of, read_manifest
from refgemma.hub import find_model
from refgemma.model import forward
from refgemma.oracle import check
from refgemma.oracle.diagnose import Report, diagnose
from refgemma.oracle.verdicts import BAD, CONFORMS, DIFFERS, INCONCLUSIVE, INVALID, NOISY_ONLY
from refgemma.precision import as_dtype, as_float64
from refgemma.trace.candidate import load_trace
from refgemma.trace.names import field_of, named_tensors, save_trace
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import LayerWeights

CONFORMANCE = refgemma.load("conformance")
IDS = np.random.default_rng(0).integers(4, 97, (1, 28))
IDS[0, 0] = 2
Tensors = dict[str, Any]


def recorded(case: str) -> tuple[Tensors, dict[str, str]]:
    """Return PyTorch's recording by our names, and the metadata of its trace."""
    about, golden = load_golden(case)
    whole = len(about["calls"]) == 1
    tensors = {name.removeprefix("calls.0.") if whole else name: x for name, x in golden.items() if name != "loss"}
    return tensors, {"dtype": about["dtype"], "calls": json.dumps(list(about["calls"]))}


def judged(tensors: Mapping[str, Any], about: Mapping[str, str], case: str, folder: Path, **options: Any) -> Report:
    """Check a trace against the model of a recording."""
    save_trace(tensors.items(), folder / "port.safetensors", dict(about))
    config, weights = model_of(read_manifest()["cases"][case])
    return diagnose(load_trace(folder / "port.safetensors", config), weights, config, **options)


def run(dtype: str = "float32", **changes: Any) -> Tensors:
    """Run an engine with other numbers."""
    model = CONFORMANCE if dtype == "float32" else refgemma.load("conformance", dtype)
    return dict(named_tensors(forward(IDS, model.weights, model.config.changed(**changes))))


def checked(tensors: Mapping[str, Any], folder: Path, dtype: str = "float32", **options: Any) -> Report:
    save_trace([("input_ids", IDS), *tensors.items()], folder / "port.safetensors", {"dtype": dtype})
    return check(folder / "port.safetensors", "conformance", **options)


# --- rows that are not recorded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_the_last_rows_alone_conform(rows: int, tmp_path: Path) -> None:
    tensors, about = recorded("bends-forward-f32")
    tensors["logits"] = tensors["logits"][:, -rows:]
    del tensors["raw_logits"]
    found = judged(tensors, about, "bends-forward-f32", tmp_path)
    assert found.verdict == CONFORMS
    assert any(r.startswith("logits: ") and r.endswith("rows are not recorded") for r in found.remarks)
    tensors["logits"] = tensors["logits"] * np.float32(1.01)
    assert judged(tensors, about, "bends-forward-f32", tmp_path).first_wrong == "logits"


def test_rows_of_nan_are_not_recorded(tmp_path: Path) -> None:
    tensors, about = recorded("bends-forward-f32")
    for name in ("logits", "raw_logits", "norm"):
        tensors[name] = tensors[name].copy()
        tensors[name][:, 2:-2] = np.nan
    found = judged(tensors, about, "bends-forward-f32", tmp_path)
    assert found.verdict == CONFORMS
    assert sum("rows are not recorded" in r for r in found.remarks) == 3


@pytest.mark.parametrize("name", ["attention.scores", "attention.capped", "attention.probs", "attention.v"])
def test_rows_of_nan_in_one_of_several_calls_are_not_recorded(name: str, tmp_path: Path) -> None:
    """The scores of the first call have fewer keys than the text."""
    model, calls, tensors, cache = CONFORMANCE, (12, 16), {}, None
    for number, part in enumerate(np.split(IDS, [calls[0]], axis=1)):
        step = forward(part, model.weights, model.config, cache=cache)
        tensors |= {f"calls.{number}.{n}": np.array(x) for n, x in named_tensors(step)}
        cache = step.cache
    path, about = tmp_path / "port.safetensors", {"dtype": "float32", "calls": json.dumps(calls)}
    first = tensors[f"calls.0.layers.1.{name}"]
    first[..., 3:7, :] = np.nan
    save_trace([("input_ids", IDS), *tensors.items()], path, about)
    found = check(path, "conformance")
    assert (found.verdict, found.findings) == (CONFORMS, ())
    assert f"layers.1.{name}: 4 of 28 rows are not recorded" in found.remarks
    first[..., 9, 2] = np.nan
    save_trace([("input_ids", IDS), *tensors.items()], path, about)
    assert check(path, "conformance").first_wrong == f"layers.1.{name}"


def test_a_last_row_of_nan_leaves_the_verdict_open(tmp_path: Path) -> None:
    tensors, about = recorded("bends-forward-f32")
    tensors["logits"] = tensors["logits"].copy()
    tensors["logits"][:, -1] = np.nan
    assert judged(tensors, about, "bends-forward-f32", tmp_path).verdict == INCONCLUSIVE


@pytest.mark.parametrize("where", [np.s_[:], np.s_[:, 3, 1]], ids=["all rows", "one number"])
def test_computed_nan_is_invalid(where: Any, tmp_path: Path) -> None:
    tensors, about = recorded("bends-forward-f32")
    tensors["layers.1.out"] = tensors["layers.1.out"].copy()
    tensors["layers.1.out"][where] = np.nan
    found = judged(tensors, about, "bends-forward-f32", tmp_path)
    verdicts = {i.tensor: i.judged.verdict for i in found.instances}
    assert (found.verdict, verdicts["layers.1.out"]) == (DIFFERS, INVALID)


@pytest.mark.slow
def test_steps_that_record_nothing_are_not_recorded(tmp_path: Path) -> None:
    """The prompt has only its last row's logits, some steps have none, as in decoders and speculative decoding."""
    case = "bends-decode-f32"
    tensors, about = recorded(case)
    calls = len(json.loads(about["calls"]))
    assert calls > 3
    tensors["calls.0.logits"] = tensors["calls.0.logits"][:, -1:]
    for name in [name for name in tensors if name.startswith("calls.2.") or name == "calls.1.layers.1.out"]:
        del tensors[name]
    found = judged(tensors, about, case, tmp_path)
    assert (found.verdict, found.findings) == (CONFORMS, ())
    tensors[f"calls.{calls - 1}.logits"] = tensors[f"calls.{calls - 1}.logits"] + np.float32(0.01)
    assert judged(tensors, about, case, tmp_path).first_wrong == "logits"


@pytest.mark.parametrize("case", ["bends-forward-f32", "bends-decode-f32", "bends-decode-left-padded-bf16"])
def test_room_in_a_static_cache_is_padding_at_the_end(case: str, tmp_path: Path) -> None:
    tensors, about = recorded(case)
    calls = json.loads(about["calls"])
    ends = dict(enumerate(np.cumsum(calls)))
    for name, x in tensors.items():
        if field_of(name.split(".", 2)[2] if name.startswith("calls.") else name) in (
            "attention.scores", "attention.capped", "attention.probs",
        ):  # fmt: skip
            end = ends[int(name.split(".")[1])] if name.startswith("calls.") else sum(calls)
            if x.shape[-1] == end:  # a cache of a layer that slides may have fewer
                room = [(0, 0)] * 3 + [(0, sum(calls) + 9 - end)]
                numbers = np.pad(as_float64(x), room, constant_values=0 if name.endswith("probs") else 7)
                tensors[name] = as_dtype(numbers, about["dtype"])
    found = judged(tensors, about, case, tmp_path)
    assert (found.verdict, found.findings) == (CONFORMS, ())


# --- the same model, otherwise ----------------------------------------------------------------------------------------


def in_pairs(x: Any) -> Any:
    """Reorder heads for rotating neighbours: number ``i`` at ``2 i``, number ``i + head_dim / 2`` at ``2 i + 1``."""
    half = x.shape[-1] // 2
    return np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)


HEADS = ("attention.q", "attention.k", "attention.q_rot", "attention.k_rot")


@pytest.mark.parametrize("case", ["bends-forward-f32", "bends-left-padded-bf16"])
def test_permuted_rows_with_pairs_turned_are_the_same_model(case: str, tmp_path: Path) -> None:
    tensors, about = recorded(case)
    moved = {name: in_pairs(x) if field_of(name) in HEADS else x for name, x in tensors.items()}
    found = judged(moved, about, case, tmp_path)
    assert (found.verdict, found.findings) == (CONFORMS, ())
    assert any("the same model" in r for r in found.remarks)
    only_weights = {name: in_pairs(x) if field_of(name) in HEADS[:2] else x for name, x in tensors.items()}
    assert judged(only_weights, about, case, tmp_path).verdict == DIFFERS


# jax.jit of DeepMind's RMSNorm (gemma/gm/nn/_layers.py), and without it, on bfloat16 numbers: docs/oracle.md.
JAX = Path(__file__).parents[1] / "recorded" / "deepmind-norm.npz"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_deepminds_norm_is_a_way_of_rounding(dtype: str, how: str, tmp_path: Path) -> None:
    kept = np.load(JAX)
    x, result = (as_dtype(kept[f"{dtype}.{part}"], dtype) for part in ("x", how))
    model = refgemma.load("conformance", dtype)
    last = model.config.num_hidden_layers - 1
    tensors = {"input_ids": IDS[:, : x.shape[1]], f"layers.{last}.out": x, "norm": result}
    save_trace(tensors.items(), tmp_path / "port.safetensors", {"dtype": dtype})
    candidate = load_trace(tmp_path / "port.safetensors", model.config)
    weights = replace(model.weights, norm=as_dtype(kept[f"{dtype}.weight"], dtype))
    found = diagnose(candidate, weights, model.config)
    finding = next(f for f in found.findings if f.field == "norm")
    assert finding.is_rounding
    assert "norm-in-half" in {v.name for v in finding.explanations}


# --- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_other_number(seed: int, tmp_path: Path) -> None:
    """Products with errors of five per cent are not mistaken for another eps, scale, cap or theta."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: x * np.float32(1 + 0.05 * rng.standard_normal(x.shape)).astype(np.float32)
        if field_of(name) in ("embedded", "input_layernorm", "attention.scores", "attention.capped", "cos") else x
        for name, x in run().items()
    }  # fmt: skip
    found = checked(tensors, tmp_path)
    assert found.verdict == DIFFERS
    assert [e for finding in found.findings for e in finding.estimates] == []


def test_another_number_is_still_estimated(tmp_path: Path) -> None:
    found = checked(run(rms_norm_eps=1e-3), tmp_path)
    estimate = found.findings[0].estimates[0]
    assert (estimate.parameter, estimate.fits) == ("rms_norm_eps", True)
    assert estimate.value == pytest.approx(1e-3, rel=1e-3)


# --- unknown is the last resort ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_declared_dtype_is_said(tmp_path: Path) -> None:
    """The tensors were computed in bfloat16 and written as float32."""
    logits = np.float32(as_float64(run("bfloat16")["logits"]))
    found = checked({"logits": logits}, tmp_path)
    assert found.verdict == DIFFERS
    assert {r.candidate.dtype: r.verdict for r in found.again}["bfloat16"] == CONFORMS
    said = refgemma.oracle.report.text(found, "conformance")
    assert "as if computed in bfloat16: CONFORMS" in said
    assert "--dtype" in said


@pytest.mark.slow
def test_a_bug_and_a_way_of_rounding_are_named_from_the_logits(tmp_path: Path) -> None:
    """The run has no window, and computes the last cap in bfloat16."""
    raw = as_dtype(run(layer_types=(FULL,) * 4)["raw_logits"], "bfloat16")
    cap = CONFORMANCE.config.final_logit_softcapping
    logits = np.float32(as_float64(np.tanh(raw / cap) * cap))
    found = checked({"logits": logits}, tmp_path)
    assert "swa-all-global + final-softcap-in-bf16" in found.findings[0].named.split(" or ")


@pytest.mark.slow
def test_the_closest_bug_is_said_with_what_it_leaves(tmp_path: Path) -> None:
    """The run has no window, and an unknown number."""
    logits = run(layer_types=(FULL,) * 4, query_pre_attn_scalar=14)["logits"]
    found = checked({"logits": logits}, tmp_path)
    finding = found.findings[0]
    assert finding.named == "UNKNOWN"
    assert finding.closest is not None
    assert finding.closest[0].name == "swa-all-global"
    assert 0.01 < finding.closest[1] < 0.5
    assert "closest: swa-all-global" in refgemma.oracle.report.text(found, "conformance")


# --- quantised engines ------------------------------------------------------------------------------------------------


def quantise(x: Any, bits: int) -> Any:
    """Quantise to whole numbers with this number of bits, with a scale for each row."""
    if not hasattr(x, "ndim") or x.ndim != 2:
        return x
    scale = np.abs(x).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.float32(np.round(x / scale) * scale)


def quantised_run(bits: int = 8, **changes: Any) -> tuple[Tensors, Tensors]:
    """Return the tensors of an engine with quantised weights, and the weights by name."""
    weights = CONFORMANCE.weights
    layers = [LayerWeights(**{n: quantise(x, bits) for n, x in vars(layer).items()}) for layer in weights.layers]
    table = quantise(weights.embed_tokens, bits)
    few = replace(weights, embed_tokens=table, layers=layers)
    tensors = dict(named_tensors(forward(IDS, few, CONFORMANCE.config.changed(**changes))))
    stored = open_checkpoint(find_model("conformance")).tensors
    return tensors, {name: quantise(np.float32(x.read("float32")), bits) for name, x in stored.items()}


def test_one_wrong_matrix_is_not_quantised(tmp_path: Path) -> None:
    tensors, weights = quantised_run()
    stored = open_checkpoint(find_model("conformance")).tensors
    name = "model.layers.1.mlp.up_proj.weight"
    one = {other: np.float32(x.read("float32")) for other, x in stored.items()} | {name: weights[name]}
    save_file(one, tmp_path / "weights.safetensors")
    found = checked(tensors, tmp_path, weights=tmp_path / "weights.safetensors")
    assert [(stage.name, stage.named) for stage in found.wrong_preflight] == [(name, "UNKNOWN")]


LOGITS, BLOCK = ("logits",), ("embedded", "norm", "logits", "attention.out", "middle", "out")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("fields", [None, BLOCK, LOGITS], ids=["full", "block", "logits"])
def test_a_quantised_engine_is_noisy(fields: tuple[str, ...] | None, bits: int, tmp_path: Path) -> None:
    tensors, _ = quantised_run(bits)
    kept = {name: x for name, x in tensors.items() if fields is None or field_of(name) in fields}
    found = checked(kept, tmp_path, quantised=True)
    assert (found.verdict, found.findings) == (NOISY_ONLY, ())
    assert "as from quantisation" in refgemma.oracle.report.text(found, "conformance")


def test_quantisation_is_found_in_a_full_trace(tmp_path: Path) -> None:
    found = checked(quantised_run()[0], tmp_path)
    assert found.verdict == NOISY_ONLY
    assert any("--quantised" in r for r in found.remarks)


@pytest.mark.parametrize("fields", [None, LOGITS], ids=["full", "logits"])
def test_a_missing_window_is_named_behind_quantisation(fields: tuple[str, ...] | None, tmp_path: Path) -> None:
    tensors, _ = quantised_run(layer_types=(FULL,) * 4)
    kept = {name: x for name, x in tensors.items() if fields is None or field_of(name) in fields}
    found = checked(kept, tmp_path, quantised=True)
    assert (found.verdict, [f.named for f in found.findings]) == (DIFFERS, ["swa-all-global"])


def test_products_are_judged_by_dequantised_weights(tmp_path: Path) -> None:
    tensors, weights = quantised_run()
    save_file(weights, tmp_path / "weights.safetensors")
    found = checked(tensors, tmp_path, weights=tmp_path / "weights.safetensors", quantised=True)
    assert found.verdict == NOISY_ONLY  # the weights are
    assert {i.judged.verdict for i in found.instances} <= {"EXACT", "PASS"}
    assert {stage.named for stage in found.preflight if stage.verdict != "EXACT"} == {"weights-quantised"}
    tensors["layers.2.attention.q"] = tensors["layers.2.attention.q"] * np.float32(1.001)
    wrong = checked(tensors, tmp_path, weights=tmp_path / "weights.safetensors", quantised=True)
    assert [i.tensor for i in wrong.instances if i.judged.verdict in BAD] == [
        "layers.2.attention.q", "layers.2.attention.q_rot"
    ]  # fmt: skip


# --- log probabilities ------------------------------------------------------------------------------------------------


def log_probabilities(logits: Any, temperature: float = 1.0) -> Any:
    z = as_float64(logits) / temperature
    z = z - z.max(-1, keepdims=True)
    return np.float32(z - np.log(np.exp(z).sum(-1, keepdims=True)))


@pytest.mark.parametrize("name", ["logprobs", "logits"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_are_judged(name: str, dtype: str, tmp_path: Path) -> None:
    case = {"float32": "bends-forward-f32", "bfloat16": "bends-forward-bf16"}[dtype]
    golden, about = recorded(case)
    given = {n: x for n, x in golden.items() if n in ("input_ids", "attention_mask")}
    tensors = given | {name: as_dtype(log_probabilities(golden["logits"]), dtype)}
    found = judged(tensors, about, case, tmp_path)
    assert [(i.tensor, i.judged.verdict) for i in found.instances] == [("logprobs", "PASS")]
    assert found.verdict == CONFORMS
    assert ("logits: these are log probabilities, and are judged as such" in found.remarks) == (name == "logits")
    # Beside logits that are recorded they are one operation, with a derived bound.
    assert judged(golden | {"logprobs": log_probabilities(golden["logits"])}, about, case, tmp_path).verdict == CONFORMS


def test_the_best_words_with_their_ids_are_judged(tmp_path: Path) -> None:
    rows = log_probabilities(run()["logits"])
    ids = np.argsort(-rows, axis=-1)[..., :5]
    tensors = {"logprobs": np.take_along_axis(rows, ids, -1), "logprob_ids": ids}
    found = checked(tensors, tmp_path)
    assert [(i.tensor, i.judged.verdict) for i in found.instances] == [("logprobs", "PASS")]
    assert found.verdict == INCONCLUSIVE  # 5 of 97 words are there
    wrong = log_probabilities(run(final_logit_softcapping=None)["logits"])
    ids = np.argsort(-wrong, axis=-1)[..., :5]
    found = checked({"logprobs": np.take_along_axis(wrong, ids, -1), "logprob_ids": ids}, tmp_path)
    assert (found.verdict, found.findings[0].named) == (DIFFERS, "final-softcap-missing")


@pytest.mark.slow
def test_a_temperature_is_found(tmp_path: Path) -> None:
    found = checked({"logprobs": log_probabilities(run()["logits"], temperature=0.7)}, tmp_path)
    assert found.verdict == DIFFERS
    assert found.findings[0].named.startswith("temperature = 0.7")


def test_a_missing_cap_is_visible_in_log_probabilities(tmp_path: Path) -> None:
    found = checked({"logprobs": log_probabilities(run(final_logit_softcapping=None)["logits"])}, tmp_path)
    assert (found.verdict, found.findings[0].named) == (DIFFERS, "final-softcap-missing")


# --- another configuration --------------------------------------------------------------------------------------------


def test_a_changed_configuration_is_said_in_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "port.safetensors"
    save_trace([("input_ids", IDS), *run(query_pre_attn_scalar=10).items()], path, {"dtype": "float32"})
    assert main(["check", str(path), "--model", "conformance"]) == 1
    capsys.readouterr()
    assert main(["check", str(path), "--model", "conformance", "--set", "query_pre_attn_scalar=10"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines
    assert all(line.startswith("[query_pre_attn_scalar=10] ") for line in lines)
    files = {kind: tmp_path / kind for kind in ("html", "markdown", "junit")}
    asked = [f"--{kind}={file}" for kind, file in files.items()]
    main(["check", str(path), "--model", "conformance", "--set", "query_pre_attn_scalar=10", "--json", *asked])
    assert json.loads(capsys.readouterr().out)["changed"] == "query_pre_attn_scalar=10"
    assert all("query_pre_attn_scalar=10" in file.read_text() for file in files.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("query_pre_attn_scalar", "it must be NAME=VALUE with"),
        ("query_pre_attn_scalar=ten", "it must be NAME=VALUE with"),
        ("scalar=10", "unknown field 'scalar'"),
        ("sliding_window=0", "sliding_window"),
        ("head_dim=4", "change the shapes of the weights"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    change: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "port.safetensors"
    save_trace([("input_ids", IDS), *run().items()], path, {"dtype": "float32"})
    assert main(["check", str(path), "--model", "conformance", "--set", change]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
