"""Test refgemma check on a live transformers model: unchanged, and with a bug in transformers' code."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import mistakes

from refgemma.hub import find_model
from refgemma.modeling.pretrained import load
from refgemma.oracle.diagnose import diagnose, report_on
from refgemma.oracle.engine import Engine
from refgemma.oracle.known_bugs import known_bug
from refgemma.oracle.prompts import prompts
from refgemma.oracle.verdicts import CONFORMS, NOISY_ONLY
from refgemma.trace.candidate import load_trace
from refgemma.trace.names import field_of, save_trace


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prompt", ["padded", "plain", "cached"])
def test_transformers_conforms(dtype: str, prompt: str, tmp_path: Path) -> None:
    ours = load("conformance", dtype)
    candidate = mistakes.port(None, dtype, prompts(ours.config)[prompt], tmp_path, ours.config)
    report = diagnose(candidate, ours.weights, ours.config)
    assert (report.verdict, report.missing) == (CONFORMS, ())


@pytest.mark.parametrize("squares", [torch.bfloat16, torch.float32])
def test_norms_in_the_precision_of_their_input_are_a_way_of_rounding(
    squares: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepMind's norm, without a compiler and with one, is not mistaken for another eps.

    PyTorch on a CPU rounds the square root of the rows that do not fill a whole vector.
    """
    ours = load("conformance", "bfloat16")

    def norm(self, x):  # type: ignore[no-untyped-def]
        mean = x.to(squares).pow(2).mean(-1, keepdim=True).to(x.dtype)
        return x * torch.rsqrt(mean + self.eps) * (1.0 + self.weight)

    monkeypatch.setitem(mistakes.MAKE, "norm-in-half", mistakes.norms_by(norm))
    candidate = mistakes.port("norm-in-half", "bfloat16", prompts(ours.config)["padded"], tmp_path, ours.config)
    report = diagnose(candidate, ours.weights, ours.config)
    assert report.verdict == NOISY_ONLY
    assert {v.name for finding in report.findings for v in finding.explanations} == {"norm-in-half"}


@pytest.mark.parametrize(
    ("layers", "kept", "named"),
    [
        (range(4), None, "norm-without-one only in post_attention_layernorm"),
        ([2], None, "norm-without-one only in post_attention_layernorm of layer 2"),
        (range(4), ("logits",), "norm-without-one only in post_attention_layernorm"),
    ],
)
def test_a_mistake_in_one_of_several_places_is_named(
    layers: Sequence[int], kept: tuple[str, ...] | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load("conformance")

    def change(model, prompt, put):  # type: ignore[no-untyped-def]
        for layer in layers:
            norm = model.model.layers[layer].post_attention_layernorm
            put(norm, "forward", partial(lambda norm, x: mistakes.normed(norm, x.float()) * norm.weight.float(), norm))

    monkeypatch.setitem(mistakes.MAKE, "norm-without-one", change)
    candidate = mistakes.port("norm-without-one", "float32", prompts(ours.config)["plain"], tmp_path, ours.config)
    if kept:
        candidate = replace(candidate, tensors={name: candidate.tensors[name] for name in kept})
    report = diagnose(candidate, ours.weights, ours.config)
    assert [finding.named for finding in report.findings] == [named]


def test_attention_that_takes_and_returns_float16_is_a_way_of_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mistral.rs computes so on CPUs; only the logits are recorded."""
    half, ours = mistakes.half, load("conformance")
    monkeypatch.setitem(
        mistakes.MAKE, "attention-between-halves",
        mistakes.attends(score=mistakes.score_in_f16, value=half, weigh=lambda w, v: half(torch.matmul(w, v))),
    )  # fmt: skip
    prompt = prompts(ours.config)["plain"]
    candidate = mistakes.port("attention-between-halves", "float32", prompt, tmp_path, ours.config)
    candidate = replace(candidate, tensors={"logits": candidate.tensors["logits"]})
    report = diagnose(candidate, ours.weights, ours.config)
    named = [finding.named for finding in report.findings]
    assert (report.verdict, named) == (NOISY_ONLY, ["inputs-and-result-of-attention-in-f16"])


def test_a_static_cache_has_room_that_is_not_judged(tmp_path: Path) -> None:
    """The scores of transformers' static cache have more keys than there are tokens."""
    ours = load("conformance")
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), dtype=torch.float32, attn_implementation="eager", output_attentions=True
    )
    ids = prompts(ours.config)["plain"].input_ids
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    tensors, done = {"input_ids": ids}, 0
    for number, length in enumerate((6, 1, 1, 9, ids.shape[1] - 17)):
        part = torch.as_tensor(ids[:, done : done + length])
        with torch.no_grad():
            result = model(part, past_key_values=cache, cache_position=torch.arange(done, done + length))
        done += length
        tensors[f"calls.{number}.logits"] = result.logits.numpy()
        for layer, probs in enumerate(result.attentions):
            if model.config.layer_types[layer] == "full_attention":
                assert probs.shape[-1] == 40
                tensors[f"calls.{number}.layers.{layer}.attention.probs"] = probs.numpy()
    calls = f"[6, 1, 1, 9, {ids.shape[1] - 17}]"
    save_trace(tensors.items(), tmp_path / "port.safetensors", {"dtype": "float32", "calls": calls})
    report = diagnose(load_trace(tmp_path / "port.safetensors", ours.config), ours.weights, ours.config)
    assert (report.verdict, report.findings) == (CONFORMS, ())


@pytest.mark.parametrize("name", ["gelu-exact", "gqa-tile", "scale-head-dim", "swa-all-global", "norm-two-plus"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mistake_in_transformers_is_named(name: str, dtype: str, tmp_path: Path) -> None:
    ours = load("conformance", dtype)
    candidate = mistakes.port(name, dtype, prompts(ours.config)["padded"], tmp_path, ours.config)
    report = diagnose(candidate, ours.weights, ours.config)
    assert report.first_divergence is not None
    assert field_of(report.first_divergence.tensor) == known_bug(name).fields[0]
    assert [v.name for v in report.findings[0].explanations] == [name]


# Each number's range, in which the logits show it: caps and scores that bend, eps that is a part of the mean square.
NUMBERS = {
    "rope_theta": (1e3, 1e6), "query_pre_attn_scalar": (2, 200), "attn_logit_softcapping": (0.5, 20.0),
    "final_logit_softcapping": (0.5, 20.0), "rms_norm_eps": (1e-5, 1e-2), "sliding_window": (2, 20),
}  # fmt: skip


@pytest.mark.parametrize("parameter", NUMBERS)
@settings(max_examples=3)
@given(part=st.floats(0.01, 0.99))
def test_a_number_is_found_in_logits_alone(
    parameter: str, part: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours, (low, high) = load("conformance"), NUMBERS[parameter]
    value = low * (high / low) ** part
    value = round(value) if isinstance(low, int) else value
    expected = getattr(ours.config, parameter)
    assume(abs(value - expected) > 0.01 * expected)
    config = transformers.AutoConfig.from_pretrained(find_model("conformance"))
    if parameter == "rope_theta":
        config.rope_parameters = {"rope_type": "default", "rope_theta": value}
    setattr(config, parameter, value)
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), config=config, dtype=torch.float32, attn_implementation="eager"
    )
    ids = prompts(ours.config)["plain"].input_ids
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)).logits.numpy()
    path = tmp_path_factory.mktemp("port") / "port.safetensors"
    save_trace({"input_ids": ids, "logits": logits}.items(), path, {"dtype": "float32"})
    engine = Engine(load_trace(path, ours.config), ours.weights, ours.config)
    [finding] = report_on(engine, bugs=(), numbers=True).findings  # no known bug may have the name
    [found] = finding.estimates
    assert (found.parameter, found.fits, finding.named) == (parameter, True, found.named)
    # Five standard deviations; PyTorch's float32 rounding is not independent of place to place, which moves a number
    # further, by a few units of 2**-24.
    assert abs(found.value - value) <= 5 * found.uncertainty + 16 * 2.0**-24 * value
