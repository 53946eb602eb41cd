"""Check known bugs by kind: each is named at its own tensor, from a full trace and, if it shows, from logits alone.

Rotary tables were recorded from transformers 5.23.0 with torch 2.13.0: ``Gemma2RotaryEmbedding(config).to(dtype)``, on
positions 0 to 23 of the conformance checkpoint. ``engine-caches.npz`` has parts of the traces of scoreboard/ (torchtune
0.6.1, LitGPT 0.5.13, transformers 4.48.3, Tunix 0.1.7, DeepMind's gemma 4.0.1), and logits of golden/mistakes.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.model import forward
from refgemma.modeling.pretrained import Pretrained
from refgemma.oracle.diagnose import Report, diagnose, report_on
from refgemma.oracle.engine import Engine
from refgemma.oracle.families import list_families
from refgemma.oracle.known_bugs import KNOWN_BUGS, known_bug
from refgemma.oracle.verdicts import CONFORMS, DIFFERS, NOISY_ONLY
from refgemma.precision import as_dtype, as_float64
from refgemma.trace.candidate import Candidate, candidate_of, only
from refgemma.trace.names import field_of, named_tensors
from refgemma.weights.parameters import LayerWeights

RECORDED = Path(__file__).parents[1] / "recorded" / "rotary-to-half.npz"
IDS = np.concatenate([[[2]], np.random.default_rng(0).integers(4, 97, (1, 23))], axis=1)
DENSITIES = pytest.mark.parametrize("names", [None, ("logits",)], ids=["full", "logits"])


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return refgemma.load("conformance")


def candidate(tensors: dict[str, Any], model: Pretrained, names: tuple[str, ...] | None = None) -> Candidate:
    whole = candidate_of({"input_ids": IDS} | tensors, model.config, "float32", (IDS.shape[1],), "port")
    return whole if names is None else only(whole, names)


def report(tensors: dict[str, Any], model: Pretrained, names: tuple[str, ...] | None = None) -> Report:
    return diagnose(candidate(tensors, model, names), model.weights, model.config)


def run(model: Pretrained, layers: list[LayerWeights] | None = None, **numbers: Any) -> dict[str, Any]:
    weights = model.weights if layers is None else replace(model.weights, layers=layers)
    return dict(named_tensors(forward(IDS, weights, model.config.changed(**numbers))))


def first(found: Report) -> tuple[str, str]:
    assert found.first_divergence is not None
    return found.first_divergence.tensor, found.findings[0].named


# --- weights in the places of others ----------------------------------------------------------------------------------

Edit = Callable[[list[LayerWeights]], list[LayerWeights]]


def put(layer: int, **names: tuple[int, str]) -> Edit:
    def edit(layers: list[LayerWeights]) -> list[LayerWeights]:
        other = {name: getattr(layers[at], weight) for name, (at, weight) in names.items()}
        return [replace(x, **other) if n == layer else x for n, x in enumerate(layers)]

    return edit


MISPLACED: list[tuple[Edit, str, str]] = [
    (put(0, k_proj=(1, "k_proj")), "layers.0.attention.k",
     "layers.1.self_attn.k_proj instead of layers.0.self_attn.k_proj"),
    (put(2, v_proj=(2, "k_proj")), "layers.2.attention.v",
     "layers.2.self_attn.k_proj instead of layers.2.self_attn.v_proj"),
    (put(3, up_proj=(1, "gate_proj")), "layers.3.feed_forward.up",
     "layers.1.mlp.gate_proj instead of layers.3.mlp.up_proj"),
    (put(1, post_feedforward_layernorm=(1, "input_layernorm")), "layers.1.post_feedforward_layernorm",
     "layers.1.input_layernorm instead of layers.1.post_feedforward_layernorm"),
    # exporter-norms has the same weight there, in all layers.
    (put(1, post_attention_layernorm=(1, "pre_feedforward_layernorm")), "layers.1.post_attention_layernorm",
     "layers.1.pre_feedforward_layernorm instead of layers.1.post_attention_layernorm"),
    (lambda layers: [replace(x, k_proj=x.v_proj) for x in layers], "layers.0.attention.k",
     "v_proj instead of k_proj in layers 0, 1, 2, 3"),
]  # fmt: skip


@pytest.mark.slow
@DENSITIES
@pytest.mark.parametrize(("edit", "tensor", "says"), MISPLACED, ids=[says[:24] for _, _, says in MISPLACED])
def test_a_weight_in_anothers_place_is_named(
    edit: Edit, tensor: str, says: str, names: tuple[str, ...] | None, model: Pretrained
) -> None:
    found = report(run(model, edit(list(model.weights.layers))), model, names)
    assert found.verdict == DIFFERS
    assert first(found) == (tensor if names is None else "logits", f"weights-of-another: {says}")


def test_two_weights_exchanged_in_all_layers_are_named_from_the_logits(model: Pretrained) -> None:
    layers = [replace(x, k_proj=x.v_proj, v_proj=x.k_proj) for x in model.weights.layers]
    found = report(run(model, layers), model, ("logits",))
    assert first(found) == ("logits", "weights-of-another: k_proj and v_proj exchanged")


def test_layers_moved_by_one_are_named_from_the_logits(model: Pretrained) -> None:
    layers = list(model.weights.layers)
    found = report(run(model, layers[1:] + layers[:1]), model, ("logits",))
    assert first(found) == ("logits", "weights-of-another: each layer has the weights of the layer after it")


def test_weights_that_no_other_place_has_stay_unknown(model: Pretrained) -> None:
    layers = list(model.weights.layers)
    layers[1] = replace(layers[1], k_proj=layers[1].k_proj[::-1] + 0)
    assert first(report(run(model, layers), model)) == ("layers.1.attention.k", "UNKNOWN")


def test_what_is_too_much_to_try_is_said(monkeypatch: pytest.MonkeyPatch, model: Pretrained) -> None:
    monkeypatch.setattr("refgemma.oracle.diagnose.MULTIPLICATIONS", 1e4)
    edit, _, _ = MISPLACED[0]
    found = report(run(model, edit(list(model.weights.layers))), model, ("logits",))
    assert found.findings[0].named == "UNKNOWN"
    assert any("only partly tried" in remark for remark in found.remarks)


# --- rotary frequencies -----------------------------------------------------------------------------------------------


# Below position 2048 float16 keeps as many bits of a frequency as TF32 does: the two are one bug, under one name.
@pytest.mark.parametrize(("short", "named"), [("bf16", "rope-frequencies-in-bf16"), ("f16", "rope-tf32-angles")])
def test_inverse_frequencies_that_a_cast_rounded_are_named(short: str, named: str, model: Pretrained) -> None:
    with np.load(RECORDED) as recorded:
        tables = {name: recorded[f"{short}.{name}"] for name in ("cos", "sin")}
    assert first(report(tables, model)) == ("cos", named)


# --- caps -------------------------------------------------------------------------------------------------------------


@DENSITIES
def test_caps_exchanged_are_named(names: tuple[str, ...] | None, model: Pretrained) -> None:
    c = model.config
    wrong = run(
        model, attn_logit_softcapping=c.final_logit_softcapping, final_logit_softcapping=c.attn_logit_softcapping
    )
    tensor, named = first(report(wrong, model, names))
    assert tensor == ("layers.0.attention.capped" if names is None else "logits")
    assert "softcaps-exchanged" in named.split(" or ")


def test_a_cap_of_none_that_is_kept_as_zero_is_named(model: Pretrained) -> None:
    config = model.config.changed(final_logit_softcapping=None, attn_logit_softcapping=None)
    tensors = dict(named_tensors(forward(IDS, model.weights, config)))
    wrong = candidate({"raw_logits": tensors["raw_logits"], "logits": 0 * tensors["logits"]}, model)
    found = diagnose(wrong, model.weights, config)
    assert first(found) == ("logits", "final-softcap-none-as-zero")


# --- a part in half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_in_half_precision_is_a_way_of_rounding(dtype: str, model: Pretrained) -> None:
    # The recorded inputs, rounded, times the weights, in float64, rounded once: what a half-precision kernel gives.
    tensors, short = run(model), {"bfloat16": "bf16", "float16": "f16"}[dtype]
    product = tensors["layers.3.feed_forward.product"]
    half = as_float64(as_dtype(product, dtype)) @ as_float64(model.weights.layers[3].down_proj).T
    out = np.float32(as_float64(as_dtype(half, dtype)))
    found = report({"layers.3.feed_forward.product": product, "layers.3.feed_forward.out": out}, model)
    assert {f.field for f in found.findings} == {"feed_forward.out"}
    assert found.verdict == NOISY_ONLY
    assert first(found) == ("layers.3.feed_forward.out", f"feed_forward.out-in-{short} of layers 3")


# --- an honest port ---------------------------------------------------------------------------------------------------


@DENSITIES
def test_an_honest_port_is_nothing_of_this(names: tuple[str, ...] | None, model: Pretrained) -> None:
    found = report(run(model), model, names)
    assert found.verdict == CONFORMS
    new = {"rope-frequencies-in-bf16", "kv-cache-in-f16", "norm-weight-in-bf16", "mask-added-as-bool", "rope-partial"}
    assert new <= {bug.name for bug in found.excluded}


def test_names_are_of_one_bug_each(model: Pretrained) -> None:
    context = Engine(candidate(run(model), model), model.weights, model.config).context
    names = [bug.name for bug in (*KNOWN_BUGS, *list_families(context))]
    assert len(names) == len(set(names))


# --- a cache in half precision, as it is kept -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [(("attention.k_rot", "attention.v"), "keys-and-values-kept-in-f16"), (("attention.v",), "values-kept-in-f16")],
    ids=["both", "values"],
)
def test_keys_and_values_recorded_as_a_cache_keeps_them_are_a_way_of_rounding(
    fields: tuple[str, ...], named: str, model: Pretrained
) -> None:
    """llama.cpp stores them this way."""
    inputs = ("cos", "sin", "input_layernorm", "attention.k")
    tensors = {name: x for name, x in run(model).items() if field_of(name) in (*inputs, *fields)}
    for name in tensors:
        if field_of(name) in fields:
            tensors[name] = np.float32(as_float64(as_dtype(tensors[name], "float16")))
    kept = [finding for finding in report(tensors, model).findings if finding.field in fields]
    assert [(finding.named, finding.is_rounding) for finding in kept] == [(named, True)] * len(fields)


def test_logits_of_nan_alone_are_invalid(model: Pretrained) -> None:
    found = report({"logits": np.full_like(run(model)["logits"], np.nan)}, model)
    assert (found.verdict, first(found)) == (DIFFERS, ("logits", "UNKNOWN"))


# --- masks that engines computed --------------------------------------------------------------------------------------

ENGINES = Path(__file__).parents[1] / "recorded" / "engine-caches.npz"  # traces of scoreboard/, in part


def test_the_log_probabilities_of_mistral_rs_are_rounded_in_attention() -> None:
    """Its attention on CPUs takes and returns float16, although the model is float32."""
    found = recorded_report("mistralrs")
    named = [finding.named for finding in found.findings]
    assert (found.verdict, named) == (NOISY_ONLY, ["inputs-and-result-of-attention-in-f16"])


def recorded_report(engine: str, dtype: str = "float32", **changes: Any) -> Report:
    loaded = refgemma.load("conformance", dtype)
    found = {n.removeprefix(f"{engine}/"): x for n, x in np.load(ENGINES).items() if n.startswith(f"{engine}/")}
    calls, config = found.pop("calls").tolist(), loaded.config.changed(**changes)
    tensors = {n: x if x.dtype.kind == "i" else as_dtype(x, dtype) for n, x in found.items()}
    return diagnose(candidate_of(tensors, config, dtype, calls if len(calls) > 1 else ()), loaded.weights, config)


@pytest.mark.parametrize(
    ("engine", "named", "changes"),
    [("torchtune", "swa-window-from-call", {}), ("litgpt", "mask-added-as-bool", {}),
     ("transformers", "cache-static-shifts-early", {}),
     ("tunix", "swa-window-skips-pads", {"query_pre_attn_scalar": 10})],
)  # fmt: skip
def test_the_masks_of_engines_with_a_cache_are_named(engine: str, named: str, changes: dict[str, Any]) -> None:
    found = recorded_report(engine, **changes)
    assert (found.verdict, [f.named for f in found.findings]) == (DIFFERS, [named])


def test_rows_of_nan_do_not_hide_a_way_of_rounding() -> None:
    """In float16, a padded row of DeepMind's gemma is NaN from layer 1 on; no estimate of epsilon takes its place."""
    found = recorded_report("gemma", "float16")
    assert {i.judged.verdict for i in found.instances} >= {"BLIND"}
    named = {f.field: f.named for f in found.findings}
    assert named == {"post_attention_layernorm": "norm-in-half"}


# --- roundings that go apart ------------------------------------------------------------------------------------------

FEW = ("gelu-f16-table", "kv-cache-in-f16", "attention-products-in-f16", "attention-flash-in-f16",
       "embed-scale-in-2-decimals", "norm-weight-in-bf16", "scale-256", "swa-window-plus-one")  # fmt: skip


def judge_logits(made: str, model: Pretrained, factor: float = 1.0) -> Report:
    """Judge transformers' logits with mistakes of golden/mistakes.py, for few known bugs."""
    found = np.load(ENGINES)
    tensors = {"input_ids": found[f"{made}/input_ids"], "logits": found[f"{made}/logits"] * np.float32(factor)}
    port = candidate_of(tensors, model.config, "float32")
    return report_on(Engine(port, model.weights, model.config), [known_bug(name) for name in FEW])


@pytest.mark.parametrize(
    ("made", "verdict"),
    [("attention-products-in-f16 + gelu-f16-table", NOISY_ONLY), ("attention-flash-in-f16", NOISY_ONLY),
     ("embed-scale-in-2-decimals + norm-weight-in-bf16", DIFFERS)],
)  # fmt: skip
def test_roundings_and_what_is_behind_them_are_named_by_logits(made: str, verdict: str, model: Pretrained) -> None:
    found = judge_logits(made, model)
    assert (found.verdict, [f.named for f in found.findings]) == (verdict, [made])


def test_a_wrong_number_is_not_excused_by_a_way_of_rounding(model: Pretrained) -> None:
    found = judge_logits("attention-products-in-f16 + gelu-f16-table", model, factor=1.002)
    assert (found.verdict, [f.named for f in found.findings]) == (DIFFERS, ["UNKNOWN"])
