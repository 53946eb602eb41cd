"""Test training: ten steps recorded from PyTorch, arithmetic, accumulation, recomputation, rows, adapters, checkpoints.
The recording is from ``golden/training.py``; ``tests/parity/test_training_parity.py`` has more comparisons."""

import json
import math
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from refgemma.backward import compute_gradients
from refgemma.config import Gemma2Config
from refgemma.hub import find_model, golden_folder
from refgemma.modeling.pretrained import load
from refgemma.training import gradients
from refgemma.training.data import hold_out, pack_rows, read_text, take_batch
from refgemma.training.gradients import accumulate_gradients, mean_loss, recompute_gradients
from refgemma.training.lora import Lora, parse_modules
from refgemma.training.optimizer import TrainingError, clip_grad_norm, decays, fused_multiply_add, lerp, schedule
from refgemma.training.run import State, TrainingArguments, first_state, read_state, train_step, write_state
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.initial import initial_weights
from refgemma.weights.parameters import named_weights, tensor_shapes, weights_of
from refgemma.weights.synthetic import synthetic_weights

SMALL: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 3, "initializer_range": 0.3,
}  # fmt: skip
ROWS = [np.array(row) for row in ([2, 5, 6, 7, 8], [2, 9], [2, 10, 11], [2, 12, 13, 14, 15, 16, 17], [2, 3, 4])]


def small_base(dtype: str = "float64", **changes: Any) -> tuple[dict[str, Any], Gemma2Config]:
    config = Gemma2Config(**SMALL | changes)
    weights = initial_weights(config, seed=1, dtype=dtype)
    return {name: rows[:] for name, rows in named_weights(weights, config).items()}, config


# --- ten steps of PyTorch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording() -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(golden_folder() / "training" / "adamw.safetensors", framework="np") as file:
        return json.loads(file.metadata()["about"]), {name: file.get_tensor(name) for name in file.keys()}


def train_as_recorded(recording: tuple[dict[str, Any], dict[str, Any]], dtype: str) -> list[State]:
    about, tensors = recording
    config, arguments = Gemma2Config(**about["config"]), TrainingArguments(**about["arguments"])
    rows = [tensors[f"row.{n}"] for n in range(12)]
    base = {name: tensors[f"start.{name}"].astype(dtype) for name in tensor_shapes(config)}
    states, size = [first_state(base, config, arguments)], about["rows_per_step"]
    for step in range(arguments.max_steps):
        batch = [rows[n % 12] for n in range(step * size, (step + 1) * size)]
        states.append(train_step(states[-1], batch, base, config, arguments))
        assert arguments.rate(step) == tensors[f"float64.{step}.learning_rate"]
    return states[1:]


def test_ten_steps_in_float64(recording: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for step, state in enumerate(train_as_recorded(recording, "float64")):
        # The weights are below 2 in size: a step adds a few roundings of 2**-52, and there are ten steps.
        for name, tensor in state.tensors.items():
            np.testing.assert_allclose(
                tensor, recording[1][f"float64.{step}.{name}"], rtol=0, atol=40 * 2.0**-52, err_msg=f"{step} {name}"
            )
        assert state.losses[-1] == pytest.approx(recording[1][f"float64.{step}.loss"], rel=1e-14)
        assert state.grad_norm == pytest.approx(recording[1][f"float64.{step}.grad_norm"], rel=1e-13)


def test_ten_steps_in_float32(recording: tuple[dict[str, Any], dict[str, Any]]) -> None:
    # Both round the same operations in other orders, so their errors have the same distribution. A tensor of nine
    # numbers is too small to show it: without AVX-512, the error of one such tensor is 2.1 times that of PyTorch.
    # So all numbers of a step are compared. Their root mean square varies by a few percent, their largest by a factor.
    for step, state in enumerate(train_as_recorded(recording, "float32")):
        theirs, exact = (
            np.concatenate([recording[1][f"{dtype}.{step}.{name}"].ravel() for name in state.tensors])
            for dtype in ("float32", "float64")
        )
        error = np.concatenate([tensor.ravel() for tensor in state.tensors.values()]) - exact
        assert np.sqrt(np.mean(error**2)) <= 1.25 * np.sqrt(np.mean((theirs - exact) ** 2)), step
        assert np.abs(error).max() <= 2 * np.abs(theirs - exact).max(), step


# --- arithmetic -------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


@given(numbers, numbers, numbers)
def test_a_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    expected = float(Fraction(a) * Fraction(b) + Fraction(c))
    assert fused_multiply_add(a, np.array([b]), np.array([c]))[0] == expected


def test_a_fused_multiply_add_where_two_roundings_differ() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1000))
    c = -a * b * (1 + 2.0**-40 * rng.integers(-4, 5, 1000))  # most digits cancel
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert (fused_multiply_add(a, b, c) == exact).all()
    assert (a * b + c != exact).mean() > 0.5


@pytest.mark.parametrize("weight", [0.1, 0.49, 0.5, 0.9])
def test_interpolation_begins_at_the_nearer_end(weight: float) -> None:
    assert lerp(np.array([1e20]), np.array([1.0]), weight)[0] == pytest.approx(1e20 * (1 - weight) + weight)
    assert lerp(np.zeros(1), np.ones(1), weight)[0] == pytest.approx(weight, abs=1e-16)


def test_clipping_keeps_the_direction() -> None:
    gradients = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    clipped, norm = clip_grad_norm(gradients, 1.0)
    assert norm == 5
    assert clipped["a"][0] / clipped["b"][0, 0] == pytest.approx(0.75)
    assert clip_grad_norm(gradients, 6.0)[0]["a"][0] == 3  # shorter ones stay


def test_norms_and_biases_do_not_decay() -> None:
    names = tensor_shapes(Gemma2Config(**SMALL, attention_bias=True, tie_word_embeddings=False))
    kept = {name.split(".")[-2] + "." + name.split(".")[-1] for name in names if not decays(name)}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    expected = {f"{part}_layernorm.weight" for part in norms} | {f"{part}_proj.bias" for part in "qkvo"}
    assert kept == expected | {"norm.weight"}


@pytest.mark.parametrize(
    ("kind", "rates"),
    [  # transformers' LambdaLR with 2 of 6 steps to warm up
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_schedules(kind: str, rates: list[float]) -> None:
    assert [schedule(kind, step, 2, 6) for step in range(6)] == pytest.approx(rates)
    assert schedule(kind, 0, 0, 6) == 1


# --- gradients of a batch ---------------------------------------------------------------------------------------------


def padded(rows: list[Any]) -> tuple[Any, Any, Any]:
    """Return the same rows in one batch: ids, mask, labels."""
    width = max(map(len, rows))
    ids = np.array([np.pad(row, (0, width - len(row))) for row in rows])
    mask = np.array([np.arange(width) < len(row) for row in rows]).astype(int)
    return ids, mask, np.where(mask, ids, -100)


def test_rows_are_added_as_in_one_padded_batch() -> None:
    base, config = small_base()
    weights = weights_of(base, config)
    loss, found = accumulate_gradients(ROWS, weights, config)
    ids, mask, labels = padded(ROWS)
    expected_loss, expected = compute_gradients(ids, labels, weights, config, attention_mask=mask)
    assert loss == pytest.approx(expected_loss, rel=1e-14)
    for name, gradient in expected.items():  # sums of some 15 tokens in another order
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-14 * np.abs(gradient).max(), err_msg=name)
    assert mean_loss(ROWS, weights, config) == pytest.approx(loss, rel=1e-14)


def test_a_mean_of_means_would_differ() -> None:
    base, config = small_base()
    weights = weights_of(base, config)
    loss, _ = accumulate_gradients(ROWS, weights, config)
    means = [compute_gradients([row], [row], weights, config)[0] for row in ROWS]
    assert abs(np.mean(means) - loss) > 0.001


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "attention_bias": True}], ids=["tied", "untied"]
)
def test_recomputation_changes_no_bit(changes: dict[str, Any]) -> None:
    for dtype in ("float32", "float64"):
        base, config = small_base(dtype, **changes)
        weights = weights_of(base, config)
        ids, mask, labels = padded(ROWS)
        loss, expected = compute_gradients(ids, labels, weights, config, attention_mask=mask, num_items=20)
        again, named = recompute_gradients(ids, labels, weights, config, attention_mask=mask, num_items=20)
        found = dict(named)
        assert again == loss
        assert found.keys() == expected.keys()
        assert all((found[name] == gradient).all() for name, gradient in expected.items())
        plain, checkpointed = (accumulate_gradients(ROWS, weights, config, flag) for flag in (False, True))
        assert plain[0] == checkpointed[0]
        assert all((plain[1][name] == gradient).all() for name, gradient in checkpointed[1].items())


@pytest.mark.slow
def test_two_layers_of_the_2b_at_their_full_width() -> None:
    config = Gemma2Config.preset("2b").changed(num_hidden_layers=2, vocab_size=512)
    weights, ids = synthetic_weights(config), [[2, 5, 400, 7, 100, 9]]  # each layer is made when it is asked for
    loss, expected = compute_gradients(ids, ids, weights, config)
    again, named = recompute_gradients(ids, ids, weights, config)
    assert again == loss
    for name, gradient in named:
        assert (gradient == expected.pop(name)).all(), name
    assert not expected


def test_recomputation_keeps_one_block() -> None:
    tiny = load("tiny")
    ids = np.random.default_rng(0).integers(8, 2048, (4, 64))

    def peak(compute: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            compute()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def recompute() -> None:
        for _ in recompute_gradients(ids, ids, tiny.weights, tiny.config)[1]:
            pass

    # Six blocks against one, and no gradient is kept. Both hold the logits.
    assert peak(recompute) < 0.5 * peak(lambda: compute_gradients(ids, ids, tiny.weights, tiny.config))


def test_packed_texts_are_recomputed_apart() -> None:
    base, config = small_base()
    weights, ids, places = weights_of(base, config), [[2, 5, 6, 2, 7]], [[0, 1, 2, 0, 1]]
    _, expected = compute_gradients(ids, ids, weights, config, position_ids=places)
    found = dict(recompute_gradients(ids, ids, weights, config, position_ids=places)[1])
    assert all((found[name] == gradient).all() for name, gradient in expected.items())


def test_no_bit_depends_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = small_base("float32")
    weights = weights_of(base, config)
    expected = accumulate_gradients(ROWS, weights, config)
    for threads in (1, 3, 16):
        monkeypatch.setattr(gradients, "THREADS", threads)
        loss, found = accumulate_gradients(ROWS, weights, config)
        assert loss == expected[0]
        assert all((found[name] == gradient).all() for name, gradient in expected[1].items())


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_hold_every_token_once() -> None:
    ids = list(range(10, 35))
    rows = pack_rows(ids, 8, bos=2)
    assert [len(row) for row in rows] == [8, 8, 8, 5]
    assert all(row[0] == 2 for row in rows)
    assert [token for row in rows for token in row[1:]] == ids
    assert [row.tolist() for row in pack_rows([5, 6, 7], 2, bos=None)] == [[5, 6]]  # a single token predicts nothing
    train, held = hold_out(rows, 25)
    assert [*train, *held] == rows
    assert len(held) == 1
    assert [len(part) for part in hold_out(rows, 0.1)] == [3, 1]
    assert [len(part) for part in hold_out(rows, 99.9)] == [1, 3]
    with pytest.raises(TrainingError, match="too short"):
        hold_out(rows[:1], 10)


def test_every_row_comes_once_a_pass_in_another_order() -> None:
    rows = pack_rows(range(10, 31), 4, bos=2)  # 7 of them
    drawn = [int(row[1]) for step in range(7) for row in take_batch(rows, step, 3, seed=5)]
    passes = [drawn[first : first + 7] for first in (0, 7, 14)]
    assert all(sorted(part) == list(range(10, 31, 3)) for part in passes)
    assert len({tuple(part) for part in passes}) == 3
    assert [int(row[1]) for row in take_batch(rows, 2, 3, seed=5)] == drawn[6:9]
    assert drawn != [int(row[1]) for step in range(7) for row in take_batch(rows, step, 3, seed=6)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"a\0b", "character 1 is NUL"), (b"\xff\xfe", "byte 0 is not UTF-8")],
)
def test_what_is_no_text(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(TrainingError, match=problem):
        read_text(tmp_path / "text")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_the_gradients_of_an_adapter() -> None:
    base, config = small_base()
    lora = Lora(r=2, lora_alpha=3.0, target_modules=("v_proj", "down_proj"))
    rng = np.random.default_rng(0)
    adapter = {name: rng.standard_normal(x.shape) * 0.1 for name, x in lora.draw(base, config, 0).items()}

    def loss(changed: dict[str, Any]) -> float:
        return accumulate_gradients(ROWS, weights_of(lora.merge(base, changed, config), config), config)[0]

    _, full = accumulate_gradients(ROWS, weights_of(lora.merge(base, adapter, config), config), config)
    found = lora.pull_back(full, adapter, config)
    assert found.keys() == adapter.keys()
    for name, tensor in adapter.items():
        place = tuple(int(rng.integers(n)) for n in tensor.shape)
        step = np.zeros_like(tensor)
        step[place] = 1e-5
        difference = (loss(adapter | {name: tensor + step}) - loss(adapter | {name: tensor - step})) / 2e-5
        # The central difference errs by the third derivative times 1e-10, and by 2**-52 * loss / 1e-5.
        assert found[name][place] == pytest.approx(difference, abs=2e-9), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_weights_that_are_trained_are_those_that_are_read(dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(find_model("tiny"))
    base = {name: rows[:] for name, rows in named_weights(checkpoint.weights(dtype), checkpoint.config).items()}
    lora = Lora(r=3, lora_alpha=5.0, target_modules=parse_modules("all-linear"))
    rng = np.random.default_rng(0)
    drawn = lora.draw(base, checkpoint.config, 0)
    adapter = {name: (rng.standard_normal(x.shape) * 0.1).astype(dtype) for name, x in drawn.items()}
    lora.save(tmp_path, adapter, str(find_model("tiny")))
    merged, read = lora.merge(base, adapter, checkpoint.config), open_checkpoint(tmp_path).weights(dtype)
    for name, rows in named_weights(read, checkpoint.config).items():
        assert (rows[:] == merged[name]).all(), name
    assert sum((merged[name] != base[name]).any() for name in base) == 7 * 6


def test_names_of_projections() -> None:
    assert parse_modules("v_proj, q_proj") == ("q_proj", "v_proj")
    with pytest.raises(TrainingError, match="'lm_head' is not a projection; give all-linear or any of q_proj, "):
        parse_modules("q_proj,lm_head")


def test_an_adapter_learns_and_its_base_stays() -> None:
    base, config = small_base()
    before = {name: tensor.copy() for name, tensor in base.items()}
    arguments = TrainingArguments(max_steps=20, learning_rate=0.05, lora=Lora(r=2, lora_alpha=4.0))
    state = first_state(base, config, arguments)
    for _ in range(20):
        state = train_step(state, ROWS, base, config, arguments)
    assert state.losses[-1] < state.losses[0] - 0.1
    assert all((before[name] == tensor).all() for name, tensor in base.items())
    assert len(state.tensors) == 2 * 2 * 2


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_as_it_was(tmp_path: Path) -> None:
    base, config = small_base("float32")
    arguments = TrainingArguments(max_steps=3, learning_rate=0.01)
    first = first_state(base, config, arguments)
    state = train_step(train_step(first, ROWS, base, config, arguments), ROWS, base, config, arguments)
    state = State(state.tensors, state.moments, state.losses, state.grad_norm, held_out=3.25)
    write_state(tmp_path / "c", state, {"seed": 1, "text": "x"})
    found = read_state(tmp_path / "c", first, {"seed": 1, "text": "x"})
    assert (found.losses, found.grad_norm, found.held_out, found.step) == (state.losses, state.grad_norm, 3.25, 2)
    for name, tensor in state.tensors.items():
        assert (found.tensors[name] == tensor).all()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (getattr(found.moments[name], moment) == getattr(state.moments[name], moment)).all()
    with pytest.raises(TrainingError, match="belongs to another run: seed was 1, not 2"):
        read_state(tmp_path / "c", first, {"seed": 2, "text": "x"})
    other, _ = small_base("float32", hidden_size=9)
    with pytest.raises(TrainingError, match="is missing, or has another shape"):
        read_state(tmp_path / "c", first_state(other, config, arguments), {"seed": 1})
    damaged = (tmp_path / "c").read_bytes()
    for content in (b"", damaged[:100], damaged[:-1], damaged.replace(b"losses", b"lasses")):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(TrainingError, match="remove the folder and train again"):
            read_state(tmp_path / "c", first, {"seed": 1, "text": "x"})


def test_training_stops_where_numbers_are_not_finite() -> None:
    base, config = small_base("float32")
    arguments = TrainingArguments(max_steps=3, learning_rate=1e30)
    state = train_step(first_state(base, config, arguments), ROWS, base, config, arguments)
    with pytest.raises(TrainingError, match=r"step 2: the loss .* gradient nan, so training stops; lower the learning"):
        train_step(state, ROWS, base, config, arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("warmup_steps", -1.0),
        ("warmup_steps", 11), ("weight_decay", -0.1), ("adam_beta1", 1.0), ("adam_epsilon", 0.0),
        ("max_grad_norm", math.inf), ("per_device_train_batch_size", 0), ("seed", -1), ("lr_scheduler_type", "step"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=rf"{name} is .*; it must (be|not)"):
        TrainingArguments(**{"max_steps": 10} | {name: value})
