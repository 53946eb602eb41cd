"""Test the gradient of every operation by central differences and by the adjoint test, in each precision. Test the
gradients of the whole model by differences of its loss."""

import inspect
from typing import Any

import numpy as np
import pytest
from backward_cases import COMPOSED, EPS, OPERATIONS, check_adjoint, check_differences
from hypothesis import given, settings
from hypothesis import strategies as st

from refgemma import activations_backward, backward
from refgemma.activations import ACTIVATIONS
from refgemma.activations_backward import ACTIVATIONS_BACKWARD
from refgemma.backward import backward as go_back
from refgemma.backward import (
    causal_lm_loss_backward,
    compute_all_gradients,
    compute_classifier_gradients,
    compute_gradients,
    embed_backward,
    softmax_backward,
)
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.heads import causal_lm_loss
from refgemma.inputs import InputError
from refgemma.model import forward
from refgemma.ops import gelu_tanh
from refgemma.precision import BF16, as_dtype, bf16
from refgemma.trace.gradient_names import named_gradients
from refgemma.trace.names import named_tensors
from refgemma.weights.parameters import Score, tensor_shapes, weights_of

SEEDS = st.integers(0, 2**32 - 1)
CONFIG = Gemma2Config(
    vocab_size=11, hidden_size=6, intermediate_size=5, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, query_pre_attn_scalar=3, sliding_window=2, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0, layer_types=[SLIDING, FULL],
)  # fmt: skip
IDS = np.array([[2, 5, 7, 5], [3, 5, 9, 0]])


def random_tensors(config: Gemma2Config, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) * 0.4 for name, shape in tensor_shapes(config).items()}


TENSORS = random_tensors(CONFIG)
WEIGHTS = weights_of(TENSORS, CONFIG)


@pytest.mark.parametrize("name", OPERATIONS)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_gradients_are_central_differences(name: str, seed: int) -> None:
    check_differences(OPERATIONS[name], seed)


@pytest.mark.parametrize("name", OPERATIONS | COMPOSED)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_gradients_are_adjoint_to_complex_steps(name: str, seed: int) -> None:
    check_adjoint((OPERATIONS | COMPOSED)[name], seed)


@pytest.mark.parametrize("name", ["attention", "feed_forward", "block"])  # whole models: tensor by tensor, below
@given(seed=SEEDS)
@settings(max_examples=1)  # of a hundred elements
def test_gradients_of_layers_are_central_differences(name: str, seed: int) -> None:
    check_differences(COMPOSED[name], seed)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_gradient_has_the_shape_and_the_precision_of_its_tensor(name: str, dtype: str) -> None:
    operation = OPERATIONS[name]
    inputs = [as_dtype(x, dtype) for x in operation.draw(np.random.default_rng(3))]
    like = inputs[0]
    if operation.gradient.endswith("loss_backward") or "entropy" in name or "error" in name:
        found = operation.backward(1.0, *inputs)
    else:
        result = operation.forward(*(np.asarray(x, np.float64) for x in inputs))
        tables = {"rotate", "softmax"} & {name}
        if tables:
            return  # their tables and masks are float64 in these cases; see the whole model below
        found = operation.backward(as_dtype(np.ones(result.shape), dtype), *inputs)
    for grad, x in zip(found, inputs, strict=True):
        assert grad.shape == x.shape
        assert type(grad) is type(like)
        assert grad.dtype == like.dtype


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_gradient_of_a_run_has_its_name_shape_and_precision(dtype: str) -> None:
    weights = weights_of({name: as_dtype(x, dtype) for name, x in TENSORS.items()}, CONFIG)
    run = forward(IDS, weights, CONFIG)
    _, grads = compute_all_gradients(IDS, IDS, weights, CONFIG)
    named = dict(named_gradients(grads))
    steps = {name: x for name, x in named_tensors(run) if name not in ("cos", "sin")}
    assert set(named) == {f"grads.{name}" for name in steps} | {f"grads.{name}" for name in TENSORS}
    for name, x in (steps | TENSORS).items():
        assert named[f"grads.{name}"].shape == x.shape, name
        assert type(named[f"grads.{name}"]) is type(run.logits), name
        assert named[f"grads.{name}"].dtype == run.logits.dtype, name


def loss_along(moves: dict[str, Any], step: float, **given: Any) -> float:
    weights = weights_of({name: x + step * moves[name] for name, x in TENSORS.items()}, CONFIG)
    return compute_gradients(IDS, IDS, weights, CONFIG, **given)[0]


@pytest.mark.slow
@pytest.mark.parametrize("given", [
    {}, {"attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]]}, {"position_ids": [[0, 1, 0, 1], [0, 1, 2, 0]]},
    {"num_items": 20},
], ids=["plain", "padded", "packed", "part"])  # fmt: skip
def test_the_loss_changes_as_its_gradients_say(given: dict[str, Any]) -> None:
    """Each tensor is moved alone. Step and bound are as in `check_differences`."""
    _, grads = compute_gradients(IDS, IDS, WEIGHTS, CONFIG, **given)
    rng, step = np.random.default_rng(1), 2.0**-17
    for name, x in TENSORS.items():
        moves = {other: np.zeros(y.shape) for other, y in TENSORS.items()} | {name: rng.standard_normal(x.shape)}
        if name == "model.embed_tokens.weight":
            moves[name][CONFIG.pad_token_id] = 0  # PyTorch's embedding does not train this row
        fine, coarse = (
            (loss_along(moves, h, **given) - loss_along(moves, -h, **given)) / (2 * h) for h in (step, 2 * step)
        )
        ours = float(np.sum(grads[name] * moves[name]))
        assert abs(ours - fine) <= 3 * abs(coarse - fine) + 64 * EPS * 4 / step, name
        assert abs(fine) > 1e-6, name  # it does something


def test_embeddings_handed_in_have_gradients() -> None:
    """A change of one embedding changes the loss as its gradient says, also through what follows it."""
    embeds = forward(IDS, WEIGHTS, CONFIG).embedded
    run = forward(None, WEIGHTS, CONFIG, inputs_embeds=embeds)
    grads = go_back(causal_lm_loss_backward(run.logits, IDS), run, None, WEIGHTS, CONFIG)
    moves, step = np.random.default_rng(2).standard_normal(embeds.shape), 2.0**-17
    ends = [
        causal_lm_loss(forward(None, WEIGHTS, CONFIG, inputs_embeds=embeds + h * moves).logits, IDS)
        for h in (step, -step)
    ]
    # The second derivative's step error, measured above, is below 1e-8 here.
    assert abs(float(np.sum(grads.embedded * moves)) - (ends[0] - ends[1]) / (2 * step)) < 1e-8
    whole = compute_gradients(IDS, IDS, WEIGHTS, CONFIG)[1]["model.embed_tokens.weight"]
    alone = grads.weights["model.embed_tokens.weight"]  # only as the head
    np.testing.assert_allclose(whole - embed_backward(grads.embedded, IDS, 11, 0), alone, rtol=1e-12, atol=1e-15)


def test_a_past_is_part_of_the_keys_and_has_a_gradient() -> None:
    """The second call's keys include the first call's, which are constants for its gradient."""
    first = forward(IDS[:, :2], WEIGHTS, CONFIG)
    run = forward(IDS[:, 2:], WEIGHTS, CONFIG, cache=first.cache)
    grads = go_back(causal_lm_loss_backward(run.logits, IDS[:, 2:]), run, IDS[:, 2:], WEIGHTS, CONFIG)
    past = grads.layers[1].attention.present
    assert past.keys.shape == run.layers[1].attention.present.keys.shape == (2, 2, 4, 4)
    assert np.abs(past.keys[:, :, :2]).max() > 0
    np.testing.assert_array_equal(past.keys[:, :, 2:], grads.layers[1].attention.k_rot)


def test_micro_batches_add_up_if_each_is_divided_by_all_tokens() -> None:
    """A mean of their means is another gradient if the numbers of labels differ."""
    labels = np.where(np.arange(8).reshape(2, 4) < 3, -100, IDS)
    _, whole = compute_gradients(IDS, labels, WEIGHTS, CONFIG)
    n = int((labels[:, 1:] != -100).sum())
    parts = [compute_gradients(IDS[r : r + 1], labels[r : r + 1], WEIGHTS, CONFIG, num_items=n)[1] for r in (0, 1)]
    means = [compute_gradients(IDS[r : r + 1], labels[r : r + 1], WEIGHTS, CONFIG)[1] for r in (0, 1)]
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-11, atol=1e-15)
    assert np.abs((means[0][name] + means[1][name]) / 2 - whole[name]).max() > 1e-3 * np.abs(whole[name]).max()


def test_the_padding_row_learns_only_as_a_head() -> None:
    """transformers makes the embedding with ``padding_idx=pad_token_id``."""
    grad = np.ones((2, 4, 3))
    assert not embed_backward(grad, IDS, 11, 0)[0].any()
    assert embed_backward(grad, IDS, 11, None)[0].all()


def test_embeddings_in_bfloat16_are_added_one_after_the_other() -> None:
    """256 + 1 is 256 in bfloat16, each time, as in PyTorch 2.13; a sum that is rounded once would be 260."""
    grad = bf16(np.array([[[256.0], [1.0], [1.0], [1.0], [1.0]]]))
    found = embed_backward(grad, np.full((1, 5), 3), 4, None)
    assert isinstance(found, BF16)
    assert found[3, 0] == 256


def test_a_query_that_sees_no_key_has_the_gradient_of_autograd() -> None:
    """torch 2.13 gives 0.25 and -0.25 for ``softmax(x + finfo.min)`` with x = (1, 2) and gradient (1, 0)."""
    found = softmax_backward(np.array([[[[1.0, 0.0]]]]), np.full((1, 1, 1, 2), 0.5))
    np.testing.assert_array_equal(found[0, 0, 0], [0.25, -0.25])


def test_a_function_of_the_callers_is_refused() -> None:
    config = CONFIG.changed(hidden_activation=lambda x: x)
    with pytest.raises(InputError, match=r"a function whose derivative is unknown; add it to refgemma\.activations_"):
        compute_gradients(IDS, IDS, WEIGHTS, config)


def test_no_label_counts() -> None:
    """The loss is NaN and every gradient 0, as in torch 2.13."""
    loss, grads = compute_gradients(IDS, np.full(IDS.shape, -100), WEIGHTS, CONFIG)
    assert np.isnan(loss)
    assert not any(np.any(grad) for grad in grads.values())


@pytest.mark.parametrize("each_token", [True, False])
def test_the_loss_of_a_classifier_changes_as_its_gradients_say(each_token: bool) -> None:
    rng, step = np.random.default_rng(5), 2.0**-17
    score = Score(rng.standard_normal((3, 6)), rng.standard_normal(3) if each_token else None)
    labels = [[0, -100, 2, 1], [1, 1, -100, 0]] if each_token else [2, 0]

    def loss_at(h: float) -> float:
        weights = weights_of({name: x + h * moves[name] for name, x in TENSORS.items()}, CONFIG)
        bias = None if score.bias is None else score.bias + h * moves["score.bias"]
        head = Score(score.weight + h * moves["score.weight"], bias)
        return compute_classifier_gradients(IDS, labels, weights, head, CONFIG, each_token=each_token)[0]

    grads = compute_classifier_gradients(IDS, labels, WEIGHTS, score, CONFIG, each_token=each_token)[1].weights
    moves = {name: rng.standard_normal(grad.shape) for name, grad in grads.items()}
    moves["model.embed_tokens.weight"][0] = 0
    fine, coarse = ((loss_at(h) - loss_at(-h)) / (2 * h) for h in (step, 2 * step))
    ours = sum(float(np.sum(grads[name] * moves[name])) for name in grads)
    assert abs(ours - fine) <= 3 * abs(coarse - fine) + 64 * EPS * 4 / step
    assert set(grads) >= set(TENSORS) | {"score.weight"}


def test_sequences_without_a_padding_token_are_classified_one_at_a_time() -> None:
    score, config = Score(np.ones((3, 6))), CONFIG.changed(pad_token_id=None)
    with pytest.raises(InputError, match="2 sequences, but pad_token_id is None in the configuration; set it"):
        compute_classifier_gradients(IDS, [0, 1], WEIGHTS, score, config)
    loss, _ = compute_classifier_gradients(IDS[:1], [0], WEIGHTS, score, config)
    assert loss > 0


def test_every_backward_has_a_case() -> None:
    """A derivative without a case would be untested."""

    def public_functions(module: Any) -> set[str]:
        return {
            name for name, x in vars(module).items()
            if inspect.isfunction(x) and x.__module__ == module.__name__ and not name.startswith("_")
        }  # fmt: skip

    assert public_functions(backward) == {operation.gradient for operation in (OPERATIONS | COMPOSED).values()}
    found = {function.__name__ for function in ACTIVATIONS_BACKWARD.values()}
    assert public_functions(activations_backward) == found
    assert set(ACTIVATIONS_BACKWARD) | {gelu_tanh} == set(ACTIVATIONS.values())


def test_only_what_takes_no_complex_number_is_compared_with_differences() -> None:
    without = {name for name, operation in (OPERATIONS | COMPOSED).items() if operation.plain is None}
    assert without == {"activation gelu"}
