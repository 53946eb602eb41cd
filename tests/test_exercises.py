"""Every exercise both ways: its solution passes; the stub, and wrong answers as a student may write them, get the hint
that helps. The wrong answers here are written apart from the known bugs that `refgemma.teach.exercises` knows."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refgemma.precision import bf16, narrow, wide
from refgemma.teach import exercises
from refgemma.teach.exercises import solutions
from refgemma.teach.exercises.feedback import Hint, Trial, give_feedback

Answer = Callable[..., Any]


@dataclass(frozen=True)
class Wrong:
    """An answer, and a part of what the check has to say to it."""

    said: str
    answer: Answer


@dataclass(frozen=True)
class Exercise:
    name: str
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def check(self) -> Answer:
        return getattr(exercises, f"check_{self.name}")

    @property
    def solution(self) -> Answer:
        return getattr(solutions, self.name)


def rows(x):
    return x / x.sum(axis=-1, keepdims=True)


def norm_with_mean_removed(x, weight, eps):
    x_wide = wide(x)
    centred = x_wide - x_wide.mean(axis=-1, keepdims=True)
    return narrow(centred / np.sqrt(centred.var(axis=-1, keepdims=True) + eps) * (1 + wide(weight)), like=x)


def norm_by_loops_without_offset(x, weight, eps):
    return np.stack([row / math.sqrt(float((row * row).sum()) / len(row) + eps) * weight for row in x])


def norm_of_the_whole_array(x, weight, eps):
    return x / np.sqrt((x * x).mean() + eps) * (1 + weight)


def norm_in_half_precision(x, weight, eps):
    scale = 1 / np.sqrt((wide(x) ** 2).mean(axis=-1, keepdims=True) + eps)
    return narrow(wide(x) * scale, like=x) * (1 + weight)


def norm_without_root(x, weight, eps):
    return x / ((x * x).mean(-1)[..., None] + eps) * (1 + weight)


def turn_complex(x, cos, sin):
    half = x.shape[-1] // 2
    numbers = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos[..., :half] + 1j * sin[..., :half])
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape).astype(x.dtype)


def turn_backwards(x, cos, sin):
    half = x.shape[-1] // 2
    numbers = (x[..., :half] + 1j * x[..., half:]) * (cos[..., :half] - 1j * sin[..., :half])
    return np.concatenate([numbers.real, numbers.imag], axis=-1).astype(x.dtype)


def turn_without_minus(x, cos, sin):
    return x * cos + np.roll(x, x.shape[-1] // 2, axis=-1) * sin


def soft(x):
    return rows(np.exp(x))


def leak(scores, mask, cap):
    hidden = np.where(mask, scores, np.float32(-1e30))
    return soft(np.tanh(hidden / cap) * cap)


def top_p_below(probabilities, p):
    kept, total = np.zeros(len(probabilities), bool), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        total += probabilities[token]
        if total > p:
            break
        kept[token] = True
    return kept


def top_p_one_more(probabilities, p):
    kept, total, enough = np.zeros(len(probabilities), bool), 0.0, False
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        kept[token] = True
        if enough:
            break
        total += probabilities[token]
        enough = total >= p
    return kept


def top_p_from_below(probabilities, p):
    kept, total = np.zeros(len(probabilities), bool), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: probabilities[t]):
        if total >= p:
            break
        kept[token] = True
        total += probabilities[token]
    return kept


def first_unequal(ours, recorded):
    for name in recorded:
        if (ours[name] != recorded[name]).any():
            return name
    return None


def worst(ours, recorded):
    def error(name):
        return np.linalg.norm(ours[name] - recorded[name]) / np.linalg.norm(recorded[name])

    return max(recorded, key=error)


def first_by_name(ours, recorded):
    bad = [name for name in recorded if np.abs(ours[name] - recorded[name]).max() > 1e-3]
    return min(bad) if bad else None


def causality_at_the_end(model):
    ids = list(range(10, 20))
    assert np.allclose(model(ids)[:9], model([*ids[:9], 77])[:9], atol=1e-4)


def causality_to_the_last_digit(model):
    ids = list(range(10, 20))
    for place in range(1, 10):
        assert (model(ids)[:place] == model(ids[:place])[:place]).all()


def causality_of_what_may_change(model):
    ids = list(range(10, 20))
    assert np.allclose(model(ids)[5:], model([*ids[:5], 77, *ids[6:]])[5:], atol=1e-4)


def causality_far_away(model):
    ids = list(range(10, 20))
    for place in range(2, 10):
        before, after = model(ids), model([*ids[:place], 77, *ids[place + 1 :]])
        assert np.allclose(before[: place - 1], after[: place - 1], atol=1e-4)


def parameters_of(config, kv_heads=None, matrices=3, tables=1, norms=4):
    h, d = config.hidden_size, config.head_dim
    kv = config.num_key_value_heads if kv_heads is None else kv_heads
    attention = h * d * config.num_attention_heads * 2 + h * d * kv * 2
    layer = attention + matrices * h * config.intermediate_size + norms * h
    return tables * config.vocab_size * h + config.num_hidden_layers * layer + h


EXERCISES = [
    Exercise("embed", [
        Wrong("sqrt(hidden) is missing", lambda ids, table: np.stack([table[row] for row in ids])),
        Wrong("not hidden", lambda ids, table: 0.0 + table[ids] * float(table.shape[1])),
        Wrong("be rounded to the table's precision", lambda ids, table: table[ids] * table.shape[1] ** 0.5),
        Wrong("columns, not of rows", lambda ids, table: table[ids] * len(table) ** 0.5),
        Wrong("divide by sqrt", lambda ids, table: table[ids] / narrow(table.shape[1] ** 0.5, like=table)),
    ]),
    Exercise("gelu_tanh", [
        Wrong("ReLU", lambda x: x * (x > 0)),
        Wrong("exact GELU", lambda x: np.array([0.5 * t * math.erfc(-t / math.sqrt(2)) for t in x.tolist()], x.dtype)),
        Wrong("SiLU", lambda x: x * (0.5 + 0.5 * np.tanh(x / 2))),
        Wrong("cube is missing", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * x)) / 2),
        Wrong("0.5 in front", lambda x: x + x * np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x))),
    ]),
    Exercise("repeat_kv", [
        Wrong("0 1 2 0 1 2", lambda x, groups: np.concatenate([x] * groups, axis=1)),
        Wrong("the heads are axis 1", lambda x, groups: np.repeat(x, groups, axis=0)),
        Wrong("the heads are axis 1", lambda x, groups: np.repeat(x, groups, axis=-2)),
        Wrong("nothing is repeated", lambda x, groups: x.copy()),
    ]),
    Exercise("rotate", [
        Wrong("half a head apart", turn_complex),
        Wrong("in the wrong direction", turn_backwards),
        Wrong("a minus is missing", turn_without_minus),
        Wrong("nothing is rotated", lambda x, cos, sin: x.copy()),
        Wrong("must be exchanged", lambda x, cos, sin: x * (cos + sin)),
    ]),
    Exercise("soft_cap", [
        Wrong("cuts off", lambda x, cap: np.minimum(np.maximum(x, -cap), cap)),
        Wrong("divide x by the cap", lambda x, cap: np.tanh(x) * cap),
        Wrong("between -1 and 1", lambda x, cap: np.tanh(x / cap)),
        Wrong("the values are unchanged", lambda x, cap: x),
    ]),
    Exercise("attention_probs", [
        Wrong("after the cap", leak),
        Wrong("the cap is missing", lambda s, mask, cap: soft(np.where(mask, s, -np.inf))),
        Wrong("the mask is missing", lambda s, mask, cap: soft(cap * np.tanh(s / cap))),
        Wrong("the sum of a row is not 1", lambda s, mask, cap: soft(cap * np.tanh(s / cap)) * mask),
        Wrong("must be minus infinity", lambda s, mask, cap: soft(cap * np.tanh(s / cap) * mask)),
    ]),
    Exercise("sliding_mask", [
        Wrong("window is missing", lambda q, k, w: np.less_equal.outer(k, q).T),
        Wrong("one key too wide", lambda q, k, w: (k <= q[:, None]) & (k >= q[:, None] - w)),
        Wrong("one key too narrow", lambda q, k, w: (k <= q[:, None]) & (k > q[:, None] - w + 1)),
        Wrong("may not see later keys", lambda q, k, w: k > q[:, None] - w),
        Wrong("you exchanged them", lambda q, k, w: (k[:, None] <= q) & (k[:, None] > q - w)),
        Wrong("arguments q_places", lambda q, k, w:
              np.array([[0 <= i - j < w for j in range(len(k))] for i in range(len(q))])),
    ]),
    Exercise("rms_norm", [
        Wrong("multiply by 1 + weight", norm_by_loops_without_offset),
        Wrong("LayerNorm", norm_with_mean_removed),
        Wrong("each vector separately", norm_of_the_whole_array),
        Wrong("square root of the mean square", norm_without_root),
        Wrong("round once at the end", norm_in_half_precision),
        Wrong("not their sum", lambda x, w, eps:
              narrow(wide(x) / np.sqrt((wide(x) ** 2).sum(-1, keepdims=True) + eps) * (1 + wide(w)), like=x)),
    ]),
    Exercise("round_to_bf16", [
        Wrong("truncates the lower half", lambda x: (x.view(np.uint32) // 65536 * 65536).astype(np.uint32).view("f4")),
        Wrong("always up", lambda x: ((x.view(np.uint32) + 32768) // 65536 * 65536).astype(np.uint32).view("f4")),
        Wrong("float16", lambda x: np.float32(np.float16(x))),
        Wrong("nothing is rounded", lambda x: np.array(x)),
    ]),
    Exercise("keep_top_p", [
        Wrong("reaches p is kept", top_p_below),
        Wrong("one token too many", top_p_one_more),
        Wrong("not with the least likely", top_p_from_below),
        Wrong("all kept tokens together", lambda s, p: np.array([share >= p for share in s])),
    ]),
    Exercise("parameters", [
        Wrong("head is tied", lambda config: parameters_of(config, tables=2)),
        Wrong("num_key_value_heads", lambda config: parameters_of(config, kv_heads=config.num_attention_heads)),
        Wrong("three matrices", lambda config: parameters_of(config, matrices=2)),
        Wrong("four norms", lambda config: parameters_of(config, norms=2)),
    ]),
    Exercise("first_divergence", [
        Wrong("return the first, not the worst", worst),
        Wrong("allow for rounding", first_unequal),
        Wrong("alphabetical order", first_by_name),
    ]),
    Exercise("causality_test", [
        Wrong("every token except the first", causality_at_the_end),
        Wrong("to the last digit", causality_to_the_last_digit),
        Wrong("which may change", causality_of_what_may_change),
        Wrong("all answers before it", causality_far_away),
        Wrong("does it raise", lambda model: bool(np.isfinite(model([5, 6])).all())),
    ]),
]  # fmt: skip

CHECKS = [name for name in exercises.__all__ if name.startswith("check_")]
WRONG = [(exercise, wrong) for exercise in EXERCISES for wrong in exercise.wrong]


def stub(*arguments: Any) -> Any:
    raise NotImplementedError


def hint(message: str) -> str:
    return message.partition("Hint: ")[2]


def test_every_exercise_is_here_and_in_a_notebook() -> None:
    assert sorted(f"check_{exercise.name}" for exercise in EXERCISES) == sorted(CHECKS)
    notebooks = "".join(path.read_text("utf-8") for path in (Path(__file__).parents[1] / "notebooks").glob("*.py"))
    assert set(re.findall(r"exercises\.(check_\w+)\(", notebooks)) == set(CHECKS)


def test_a_solution_has_the_arguments_of_its_notebook() -> None:
    notebooks = "".join(path.read_text("utf-8") for path in (Path(__file__).parents[1] / "notebooks").glob("*.py"))
    for exercise in EXERCISES:
        arguments = ", ".join(inspect.signature(exercise.solution).parameters)
        assert f"def {exercise.name}({arguments}):\n    raise NotImplementedError\n" in notebooks


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_the_solution_passes(exercise: Exercise) -> None:
    feedback = exercise.check(exercise.solution)
    assert feedback.passed, feedback
    assert repr(feedback).startswith("Right")


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_the_stub_is_told_that_nothing_is_written(exercise: Exercise) -> None:
    feedback = exercise.check(stub)
    assert not feedback.passed
    assert "nothing is written yet" in repr(feedback)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_a_crash_is_told_not_thrown(exercise: Exercise) -> None:
    def crash(*arguments: Any) -> Any:
        raise IndexError("list index out of range")

    feedback = exercise.check(crash)
    assert not feedback.passed
    assert "IndexError: list index out of range" in repr(feedback)


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=[f"{e.name} {e.wrong.index(w)}: {w.said}" for e, w in WRONG])
def test_a_wrong_answer_gets_its_hint(exercise: Exercise, wrong: Wrong) -> None:
    feedback = exercise.check(wrong.answer)
    assert not feedback.passed
    assert wrong.said in hint(feedback.message), feedback


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_there_are_three_wrong_answers_at_least(exercise: Exercise) -> None:
    assert len(exercise.wrong) >= 3


# --- what the judge says of any answer --------------------------------------------------------------------------------


DOUBLED = np.array([1.0, 2.0, 4.0], np.float32)


def said(answer: Answer, right: Any = DOUBLED) -> str:
    argument = np.array([0.5, 1.0, 2.0], np.float32)
    known = Hint("never", lambda x: np.full(3, 7.0, np.float32))
    return repr(give_feedback(answer, [Trial("double(x)", (argument,), right, 1e-6)], [known]))


def test_no_result() -> None:
    assert "None; does it end with `return ...`?" in said(lambda x: None)


def test_another_shape() -> None:
    assert "the shape is (3, 1) instead of (3,)" in said(lambda x: 2 * x[:, None])


def test_no_numbers() -> None:
    assert "returned str, not an array of numbers" in said(lambda x: "2, 4, 8")
    assert "returned rows of different lengths" in said(lambda x: [[1.0], [2.0, 3.0]])


def test_not_a_number() -> None:
    assert "NaN (not a number), first at [1]" in said(lambda x: np.array([1.0, np.nan, 4.0]))


def test_the_farthest_element_is_shown() -> None:
    assert "2 of 3 elements are wrong; the largest error, at [2], is 8 instead of 4" in said(
        lambda x: 4 * x - [1, 1, 0]
    )


def test_an_argument_that_is_written_into() -> None:
    def doubled(x: Any) -> Any:
        x *= 2
        return x

    assert "changes its argument" in said(doubled)


def test_lists_and_double_precision_will_do() -> None:
    assert said(lambda x: [2 * float(number) for number in x]).startswith("Right")


def test_a_result_that_should_be_rounded_and_is_not() -> None:
    assert "not rounded to bfloat16" in said(lambda x: 2 * x, right=bf16([1.0, 2.0, 4.0]))


def test_a_mistake_nobody_knows_gets_no_hint() -> None:
    assert "Hint" not in said(lambda x: 3 * x)
    assert "Hint: never" in said(lambda x: np.full(3, 7.0))


def test_rounding_is_judged_against_another_library() -> None:
    numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(solutions.round_to_bf16(numbers), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_an_array_where_a_number_is_asked_for() -> None:
    assert "instead of 2614341888" in repr(exercises.check_parameters(lambda config: np.arange(3)))


def test_a_port_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="number is 7; the ports have the numbers 1 to 6"):
        exercises.mystery_trace(7)
