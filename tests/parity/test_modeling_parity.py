"""Compare with transformers in one process: the four classes on random configurations, inputs and arguments."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CLASSES, as_torch, distance, here, in_transformers, quiet, random_tensors, shapes
from transformers import DynamicCache

from refgemma.cache import Cache

LANGUAGE, SEQUENCES, TOKENS = CLASSES[1:]


@st.composite
def inputs(draw: st.DrawFn, name: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Draw ids with padding on one side, their division into calls, and all other arguments of a caller."""
    calls = draw(st.lists(st.integers(1, 8), min_size=1, max_size=1 if name == TOKENS else 4))
    batch, total = draw(st.integers(1, 3)), sum(calls)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    ids = rng.integers(1, shape["vocab_size"], (batch, total))
    visible = np.ones((batch, total), bool)
    side = draw(st.sampled_from(["none", "left", "right"]))
    for row in range(batch):
        padding = draw(st.integers(0, total - 1)) if side != "none" else 0
        visible[row, : padding if side == "left" else 0] = False
        visible[row, total - (padding if side == "right" else 0) :] = False
    ids[~visible] = shape["pad_token_id"] or 0
    ready = draw(st.sampled_from(["2-D", "2-D", "4-D bool", "4-D float"])) if len(calls) == 1 else "2-D"
    return {
        "calls": calls,
        "ids": ids,
        "visible": visible,
        "embeds": rng.standard_normal((batch, total, shape["hidden_size"])).astype(np.float32),
        "embedded": draw(st.booleans()) and name != SEQUENCES,  # its pooling needs ids, or warns and takes the last
        "mask": "2-D" if side == "none" and ready == "2-D" and draw(st.booleans()) else ready,
        "positions": np.cumsum(visible, axis=1) * draw(st.integers(1, 5)) if draw(st.booleans()) else None,
        "classes": rng.integers(0, shape["num_labels"], (batch, total)),
        "numbers": rng.standard_normal((batch, shape["num_labels"])).astype(np.float32),
        "problem_type": draw(st.sampled_from([None, None, "multi_label_classification"])),
        "legacy": draw(st.booleans()),
        "logits_to_keep": draw(st.integers(0, 3)),
    }


def ready_mask(drawn: dict[str, Any]) -> Any:
    """Return a causal mask with four axes, without padding, where every query sees itself: bool, or numbers to add."""
    total = drawn["ids"].shape[1]
    seen = np.tril(np.ones((total, total), bool)) & drawn["visible"][:, None, None, :] | np.eye(total, dtype=bool)
    return seen if drawn["mask"] == "4-D bool" else np.where(seen, np.float32(0), np.finfo(np.float32).min)


def labels_of(name: str, drawn: dict[str, Any], shape: dict[str, Any]) -> Any:
    if name == LANGUAGE:
        return np.where(drawn["visible"], drawn["ids"], -100)
    if name == TOKENS:
        return np.where(drawn["visible"], drawn["classes"], -100)
    if drawn["problem_type"] == "multi_label_classification":
        return (drawn["numbers"] > 0).astype(np.float32)
    return drawn["numbers"][:, 0] if shape["num_labels"] == 1 else drawn["classes"][:, 0]


def arguments(name: str, drawn: dict[str, Any], shape: dict[str, Any], part: slice, torch_side: bool) -> dict[str, Any]:
    """Return the arguments of one call."""
    whole = len(drawn["calls"]) == 1
    given: dict[str, Any] = {"attention_mask": drawn["visible"][:, : part.stop].astype(int)}
    if drawn["mask"] != "2-D":
        mask = ready_mask(drawn)
        # transformers adds a bool mask to the scores as 0 and 1 in its eager attention: numbers say what is meant.
        numbers = np.where(mask, np.float32(0), np.finfo(np.float32).min) if mask.dtype == bool else mask
        given["attention_mask"] = numbers if torch_side else mask
    given |= {"inputs_embeds": drawn["embeds"][:, part]} if drawn["embedded"] else {"input_ids": drawn["ids"][:, part]}
    if drawn["positions"] is not None:
        given["position_ids"] = drawn["positions"][:, part]
    if whole and name != CLASSES[0]:
        given["labels"] = labels_of(name, drawn, shape)
    given |= {"output_hidden_states": True, "output_attentions": True} if whole else {}
    return {key: as_torch(value) for key, value in given.items()} if torch_side else given


def run(model: Any, name: str, drawn: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """Run all calls of one side; return the numbers of real tokens by name, and the loss of a single call."""
    torch_side = isinstance(model, torch.nn.Module)
    past: Any = DynamicCache(config=model.config) if torch_side and len(drawn["calls"]) > 1 else None
    done, outputs = 0, []
    for length in drawn["calls"]:
        with quiet():
            given = arguments(name, drawn, shape, slice(done, done + length), torch_side)
            outputs.append(model(**given, past_key_values=past))
        past = getattr(outputs[-1], "past_key_values", None)
        if isinstance(past, Cache) and drawn["legacy"]:
            past = past.to_legacy()
        done += length
    return numbers(outputs, name, drawn)


def plain(x: Any) -> Any:
    return x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def numbers(outputs: list[Any], name: str, drawn: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers to compare: nothing of padding, and only real queries' attention."""
    visible = drawn["visible"]
    main = "last_hidden_state" if name == CLASSES[0] else "logits"
    found: dict[str, Any] = {}
    if name == SEQUENCES:
        found[main] = plain(outputs[-1][main])
    else:
        found[main] = np.concatenate([plain(output[main]) for output in outputs], axis=1)[visible]
    if len(outputs) == 1:
        (output,) = outputs
        for layer, state in enumerate(output.hidden_states):
            found[f"hidden_states.{layer}"] = plain(state)[visible]
        for layer, probs in enumerate(output.attentions):
            found[f"attentions.{layer}"] = np.moveaxis(plain(probs), 1, 2)[visible]
        if name != CLASSES[0]:
            found["loss"] = plain(output.loss)
    return found


def loss_allowance(ours: dict[str, Any], theirs: dict[str, Any], drawn: dict[str, Any]) -> float:
    """Return how much a loss may differ, given the difference of the logits.

    A cross entropy changes by at most twice the largest change of a logit, a squared error by its derivative times this
    change. The loss itself is rounded about sixteen times at the size of its largest term.
    """
    apart = float(np.abs(ours["logits"] - theirs["logits"]).max(initial=0))
    size = 1 + float(np.abs(theirs["logits"]).max(initial=0)) + float(np.abs(drawn["numbers"]).max())
    return 2 * size * apart + 16 * 2**-24 * size**2


@pytest.mark.filterwarnings("ignore:attention_mask is boolean. here true means visible")
@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=70)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_float32(name: str, data: st.DataObject, seed: int) -> None:
    """Every number of every output, 280 examples in all."""
    shape = data.draw(shapes(pad_token_id=0))
    drawn = data.draw(inputs(name, shape))
    shape["problem_type"] = drawn["problem_type"] if name == SEQUENCES else None
    tensors = random_tensors(name, shape, seed)
    theirs = run(in_transformers(name, shape, tensors, "float32"), name, drawn, shape)
    ours = run(here(name, shape, tensors, "float32"), name, drawn, shape)
    exact = run(here(name, shape, tensors, "float64"), name, drawn, shape)
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key != "loss":
            assert ours[key].shape == theirs[key].shape
            assert distance(ours[key], theirs[key], exact[key]) <= 1, key
    if "loss" in ours and not np.isnan(theirs["loss"]):
        assert abs(float(ours["loss"] - theirs["loss"])) <= loss_allowance(ours, theirs, drawn)
    elif "loss" in ours:
        assert np.isnan(ours["loss"])  # no label counts


@pytest.mark.filterwarnings("ignore:attention_mask is boolean. here true means visible")
@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_bfloat16(name: str, data: st.DataObject, seed: int) -> None:
    """Two correct bf16 runs differ by less than two independent roundings would: most roundings are the same ones."""
    shape = data.draw(shapes(pad_token_id=0))
    drawn = data.draw(inputs(name, shape)) | {"mask": "2-D", "embedded": False}
    tensors = random_tensors(name, shape, seed)
    half, single = (run(in_transformers(name, shape, tensors, t), name, drawn, shape) for t in ("bfloat16", "float32"))
    ours = run(here(name, shape, tensors, "bfloat16"), name, drawn, shape)
    # Of a classifier's few logits no mean is known: the states before count with them.
    keys = [key for key in ours if key != "loss" and not key.startswith("attentions")]
    apart, noise = (
        np.concatenate([(one[key] - other[key]).reshape(-1) for key in keys])
        for one, other in ((ours, half), (half, single))
    )
    assert np.sqrt(np.mean(apart**2)) <= np.sqrt(2 * np.mean(noise**2))


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_logits_to_keep(data: st.DataObject, seed: int) -> None:
    """The number of last tokens, or their places."""
    shape = data.draw(shapes(pad_token_id=0))
    drawn = data.draw(inputs(LANGUAGE, shape))
    tensors = random_tensors(LANGUAGE, shape, seed)
    theirs, ours, exact = in_transformers(LANGUAGE, shape, tensors, "float32"), *(
        here(LANGUAGE, shape, tensors, dtype) for dtype in ("float32", "float64")
    )  # fmt: skip
    places = np.unique(np.random.default_rng(seed).integers(0, drawn["ids"].shape[1], 3))
    for kept in (drawn["logits_to_keep"], places):
        with quiet():
            expected = theirs(torch.tensor(drawn["ids"]), logits_to_keep=as_torch(kept)).logits.numpy()
        found, true = (model(drawn["ids"], logits_to_keep=kept).logits for model in (ours, exact))
        assert found.shape == expected.shape
        assert distance(found, expected, true) <= 1
