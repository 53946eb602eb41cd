"""Compare with PyTorch autograd through transformers (eager): the gradients of random configurations."""

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity.support import in_transformers, random_tensors, shapes
from transformers.activations import ACT2FN

from refgemma.activations import ACTIVATIONS
from refgemma.backward import (
    activation_backward,
    attention_scores_backward,
    compute_all_gradients,
    compute_classifier_gradients,
    embed_backward,
    linear_backward,
    rms_norm_backward,
    rotate_backward,
    soft_cap_backward,
    softmax_backward,
)
from refgemma.config import Gemma2Config
from refgemma.goldens.distance import FLOOR, NOISE_FACTOR
from refgemma.inputs import InputError
from refgemma.ops import inverse_frequencies
from refgemma.oracle.tolerance import ulp
from refgemma.precision import as_dtype, bf16, dtype_name
from refgemma.trace.capture import capture_transformers, catch_tensors, in_heads
from refgemma.trace.gradient_names import named_gradients
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Score, weights_of

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
Float64 = importlib.import_module("gradients").Float64

HEADS = {
    "Gemma2ForCausalLM": "", "Gemma2ForSequenceClassification": "sequence", "Gemma2ForTokenClassification": "token",
}  # fmt: skip


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a configuration with a head, and inputs: plain, padded on either side, or packed."""
    shape = draw(shapes())
    batch, seq, rng = draw(st.integers(1, 3)), draw(st.integers(2, 8)), np.random.default_rng(draw(st.integers(0, 99)))
    ids = rng.integers(3, shape["vocab_size"], (batch, seq))
    kind = draw(st.sampled_from(["plain", "left", "right", "packed"]))
    inputs = {}
    if kind == "packed":
        inputs["position_ids"] = np.concatenate([np.arange(seq // 2), np.arange(seq - seq // 2)])[None].repeat(batch, 0)
    elif kind != "plain":
        mask = np.ones((batch, seq), int)
        mask[0, :1] = kind == "right"
        mask[-1, -1:] = kind == "left"
        ids, inputs["attention_mask"] = np.where(mask == 0, 0, ids), mask
    labels = np.where(rng.random((batch, seq)) < 0.2, -100, ids)
    labels[:, -1] = ids[:, -1]  # one counts
    return {"shape": shape, "ids": ids, "labels": labels, "inputs": inputs, "seed": int(rng.integers(0, 99))}


def by_autograd(name: str, scene: dict[str, Any], tensors: Any, labels: Any, dtype: str) -> dict[str, Any]:
    """Return every gradient by our names."""
    model = in_transformers(name, scene["shape"], tensors, dtype)
    # Ours may differ in float32, which float64 would show: a power and a quotient round by half an ulp each, here and
    # in torch, so by at most two ulps of 2**-23.
    ours = inverse_frequencies(scene["shape"]["head_dim"], scene["shape"]["rope_theta"])
    np.testing.assert_allclose(ours, model.model.rotary_emb.inv_freq.numpy(), rtol=2**-22)
    model.model.rotary_emb.inv_freq = torch.tensor(ours)
    lm = name == "Gemma2ForCausalLM"
    given = {n: torch.tensor(x) for n, x in scene["inputs"].items()}
    hooked = SimpleNamespace(model=model.model, lm_head=model.lm_head if lm else model.score)
    with Float64() if dtype == "float64" else nullcontext():
        with catch_tensors(hooked) as found:
            out = model(torch.tensor(scene["ids"]), labels=torch.tensor(labels), use_cache=False, **given)
        found["logits"] = out.logits if lm else found.pop("raw_logits")
        found = {n: x for n, x in found.items() if x.requires_grad}
        for x in found.values():
            x.retain_grad()
        out.loss.backward()
    named = {n: in_heads(n, x.grad, scene["shape"]["head_dim"]) for n, x in found.items()}
    named |= {n: p.grad for n, p in model.named_parameters()}
    return {f"grads.{n}": x.numpy() for n, x in named.items()} | {"loss": out.loss.item()}


def here(name: str, scene: dict[str, Any], tensors: Any, labels: Any, dtype: str) -> dict[str, Any]:
    config = Gemma2Config(**scene["shape"])
    given = {n: as_dtype(x, dtype) for n, x in tensors.items()}
    weights = weights_of(given, config)
    if name == "Gemma2ForCausalLM":
        loss, grads = compute_all_gradients(scene["ids"], labels, weights, config, **scene["inputs"])
    else:
        score = Score(given["score.weight"], given.get("score.bias"))
        loss, grads = compute_classifier_gradients(
            scene["ids"], labels, weights, score, config, each_token=HEADS[name] == "token", keep_activations=True,
            **scene["inputs"],
        )  # fmt: skip
    return dict(named_gradients(grads)) | {"loss": loss}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
@given(scene=scenes())
@settings(max_examples=10, phases=[Phase.generate])
def test_random_configurations(name: str, scene: dict[str, Any]) -> None:
    """In float32, the limit is eight times PyTorch's rounding error, which its own float64 shows.

    In float64, the limit is ``2**-29`` times as large, the ratio of the roundoffs. A gradient may be a sum of terms
    that cancel, for example of equal tokens. So two roundings on either side of the run's largest gradient are added.
    """
    rng = np.random.default_rng(scene["seed"])
    labels = scene["labels"]
    if HEADS[name] == "sequence":
        count = scene["shape"]["num_labels"]
        labels = rng.integers(0, count, len(labels))
        labels = labels + 0.5 if count == 1 else labels
    elif HEADS[name] == "token":
        labels = np.where(labels == -100, -100, labels % scene["shape"]["num_labels"])
    tensors = random_tensors(name, scene["shape"], scene["seed"], gain=0.7)
    theirs, exact = (by_autograd(name, scene, tensors, labels, dtype) for dtype in ("float32", "float64"))
    scale = max(float(np.abs(x).max()) for n, x in exact.items() if n != "loss")
    # The largest error of all tensors: that of a single one may be small by chance.
    noise = max(float(np.abs(theirs[n] - exact[n]).max()) for n in exact)
    for dtype, recorded, unit in (("float32", theirs, 1.0), ("float64", exact, 2.0**-29)):
        ours = here(name, scene, tensors, labels, dtype)
        assert ours.keys() == recorded.keys()
        for n in ours:
            apart = float(np.abs(ours[n] - recorded[n]).max())
            assert apart <= unit * (NOISE_FACTOR * noise + FLOOR * scale), (dtype, n, apart, noise, scale)


X = np.random.default_rng(0).standard_normal


def autograd(function: Any, grad: Any, *inputs: Any) -> list[Any]:
    """Return the gradients computed in bfloat16, as float32."""
    given = [torch.tensor(np.asarray(x)).bfloat16().requires_grad_() for x in inputs]
    function(*given).backward(torch.tensor(np.asarray(grad)).bfloat16())
    return [x.grad.float().numpy() for x in given]


def norm(x: Any, weight: Any) -> Any:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    module = Gemma2RMSNorm(x.shape[-1])
    del module.weight
    module.weight = weight
    return module(x)


def rotated(x: Any) -> Any:
    from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

    cos, sin = (torch.tensor(np.asarray(table)[:, 0]).bfloat16() for table in TABLES)
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


TABLES = bf16(np.cos(X((2, 1, 5, 8)))), bf16(np.sin(X((2, 1, 5, 8))))
IDS = np.random.default_rng(1).integers(0, 6, (4, 9))
OPERATIONS = {
    "linear": (
        torch.nn.functional.linear, lambda g, x, w, b: linear_backward(g, x, w, b), (4, 9, 7), [(4, 9, 5), (7, 5), (7,)]
    ),
    "rms_norm": (norm, lambda g, x, w: rms_norm_backward(g, x, w, 1e-6), (4, 9, 32), [(4, 9, 32), (32,)]),
    "rotate": (rotated, lambda g, x: (rotate_backward(g, *TABLES),), (2, 3, 5, 8), [(2, 3, 5, 8)]),
    "soft_cap": (
        lambda x: torch.tanh(x / 2.0) * 2.0, lambda g, x: (soft_cap_backward(g, x, 2.0),), (900,), [(900,)]
    ),
    "attention_scores": (
        lambda q, k: torch.matmul(q, k.transpose(2, 3)) * 0.3,
        lambda g, q, k: attention_scores_backward(g, q, k, 0.3), (2, 3, 5, 6), [(2, 3, 5, 8), (2, 3, 6, 8)],
    ),
    "embed": (
        lambda table: torch.nn.functional.embedding(torch.tensor(IDS), table, padding_idx=0)
        * torch.tensor(32**0.5).bfloat16(),
        lambda g, table: (embed_backward(g, IDS, 6, 0),), (4, 9, 32), [(6, 32)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_rounds_where_autograd_does(name: str) -> None:
    """At least 99 % are bit-identical; others, near a rounding boundary, differ by an ulp of the largest."""
    forward, backward, out, inputs = OPERATIONS[name]
    given, grad = [bf16(X(shape)) for shape in inputs], bf16(X(out))
    for ours, theirs in zip(backward(grad, *given), autograd(forward, grad, *given), strict=True):
        assert dtype_name(ours) == "bfloat16"
        assert np.mean(np.asarray(ours) == theirs) >= 0.99
        assert (np.abs(np.asarray(ours) - theirs) <= ulp(np.abs(theirs).max(keepdims=True), "bfloat16").max()).all()


def test_softmax_in_bfloat16() -> None:
    """Compare with unrounded weights, which autograd keeps; and measure the effect of a record's rounded weights."""
    scores, grad = bf16(X((2, 3, 5, 6)) * 3), bf16(X((2, 3, 5, 6)))
    (theirs,) = autograd(lambda x: x.softmax(-1, dtype=torch.float32).bfloat16(), grad, scores)
    exact = np.exp(np.asarray(scores) - np.asarray(scores).max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    found = softmax_backward(grad, exact)
    assert np.mean(np.asarray(found) == theirs) >= 0.99
    recorded = np.asarray(softmax_backward(grad, bf16(exact)))
    assert 0 < np.abs(recorded - theirs).max() <= 2**-7 * np.abs(np.asarray(grad)).max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_bends(name: str) -> None:
    """If there is no derivative, the result is PyTorch's choice."""
    x = torch.tensor([0.0, 6.0, -0.0]).requires_grad_()
    ACT2FN[name](x).sum().backward()
    found = activation_backward(np.ones(3, np.float32), x.detach().numpy(), ACTIVATIONS[name])
    # At most eight operations, each rounded by 2**-24 of its result, here and in torch.
    np.testing.assert_allclose(found, x.grad.numpy(), rtol=16 * 2**-24, atol=2**-24)


def test_no_label_counts() -> None:
    """The loss is NaN and the gradients are 0."""
    z = torch.zeros(2, 3, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(z, torch.tensor([-100, -100]))
    loss.backward()
    assert loss.isnan()
    assert not z.grad.any()


def test_captured_gradients_are_ours() -> None:
    """The gradients of a live model, by our names; its own gradients do not change."""
    folder = Path(__file__).parents[2] / "golden" / "models" / "bends"
    model = transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids, mask = np.array([[5, 7, 9, 7], [5, 8, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    tensors, _ = capture_transformers(model, ids, mask, backward=True)
    assert all(p.grad is None for p in model.parameters())
    checkpoint = open_checkpoint(folder)
    labels = np.where(mask == 0, -100, ids)
    _, grads = compute_all_gradients(
        ids, labels, checkpoint.resident("float32"), checkpoint.config, attention_mask=mask
    )
    ours = dict(named_gradients(grads))
    assert {name for name in tensors if name.startswith("grads.")} == ours.keys()
    # A layer has 14 operations, whose sums of at most `intermediate_size` terms round by about the root of their number
    # (Higham and Mary 2019). The recordings have sharper bounds.
    roundings = 14 * checkpoint.config.num_hidden_layers * checkpoint.config.intermediate_size**0.5
    for name, x in ours.items():
        np.testing.assert_allclose(tensors[name], x, rtol=0, atol=roundings * 2**-24 * np.abs(x).max(), err_msg=name)


def test_gradients_of_several_calls_are_refused() -> None:
    with pytest.raises(InputError, match="backward=True with 2 calls"):
        capture_transformers(None, [[2, 3]], calls=[1, 1], backward=True)
