"""Exercises in graded assignments: a check that raises, and a check on inputs drawn from a seed. Checked by tests with
solutions and wrong answers, and by nbgrader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refgemma.errors import RefgemmaError
from refgemma.ops import rotary_tables
from refgemma.precision import Array, bf16, wide
from refgemma.teach.exercises import solutions
from refgemma.teach.exercises.feedback import Attempt, Feedback, Trial, give_feedback


class Unsolved(RefgemmaError, AssertionError):
    """Raised for an answer that did not pass; the message is the feedback.

    Examples
    --------
    >>> issubclass(Unsolved, AssertionError)
    True
    """


class SeedError(RefgemmaError):
    """Raised for an exercise whose inputs are not drawn from a seed."""


def require(*feedbacks: Any) -> None:
    """Raise the feedback on the first answer that did not pass: a test cell for nbgrader, Otter and other graders.

    Parameters
    ----------
    *feedbacks : Feedback
        Results of checks.

    Raises
    ------
    Unsolved
        If an answer did not pass. The message is its feedback.

    Examples
    --------
    >>> from refgemma.teach import exercises
    >>> exercises.require(exercises.check_soft_cap(exercises.solutions.soft_cap))
    >>> try:
    ...     exercises.require(exercises.check_soft_cap(lambda x, cap: x))
    ... except exercises.Unsolved as error:
    ...     print(str(error).splitlines()[-1])
      Hint: the values are unchanged. The formula is cap * tanh(x / cap).
    """
    for feedback in feedbacks:
        if not isinstance(feedback, Feedback):
            raise Unsolved(f"require takes the result of a check, not {type(feedback).__name__}: require(check_x(x))")
        if not feedback:
            raise Unsolved(feedback.message)


def _draw_scores(rng: np.random.Generator) -> tuple[Any, ...]:
    return rng.normal(0, 4, (1, 2, 7, 7)), np.tri(7, dtype=bool)[None, None], float(rng.integers(2, 9))


def _draw_rotation(rng: np.random.Generator) -> tuple[Any, ...]:
    return rng.standard_normal((1, 2, 5, 8)), *rotary_tables(np.arange(5)[None], 8, 10000.0, np.zeros(0))


def _draw_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    keys = int(rng.integers(8, 16))
    return np.arange(keys - 4, keys), np.arange(keys), int(rng.integers(2, 7))


def _draw_attention(rng: np.random.Generator) -> tuple[Any, ...]:
    period = int(rng.integers(3, 8))
    probs = np.tril(rng.random((3, 2 * period + 1, 2 * period + 1)))
    return probs / probs.sum(axis=-1, keepdims=True), period


# Exercise -> its arguments, drawn from a generator. The other exercises have few possible inputs.
INPUTS: dict[str, Callable[[np.random.Generator], tuple[Any, ...]]] = {
    "embed": lambda rng: (rng.integers(0, 9, (2, 5)), rng.standard_normal((9, int(rng.integers(6, 40))))),
    "gelu_tanh": lambda rng: (rng.normal(0, 3, 200),),
    "repeat_kv": lambda rng: (rng.standard_normal((2, 3, 4, 5)), int(rng.integers(2, 5))),
    "rotate": _draw_rotation,
    "soft_cap": lambda rng: (rng.normal(0, 60, 200), float(rng.integers(5, 60))),
    "attention_probs": _draw_scores,
    "sliding_mask": _draw_mask,
    "rms_norm": lambda rng: (rng.standard_normal((3, 4, 16)), rng.normal(0, 0.5, 16), 1e-6),
    "round_to_bf16": lambda rng: ((rng.standard_normal(300) * 10.0 ** rng.integers(-20, 20, 300)).astype(np.float32),),
    "embed_bf16": lambda rng: (rng.integers(0, 9, (2, 5)), bf16(rng.standard_normal((9, int(rng.integers(200, 400)))))),
    "keep_top_p": lambda rng: (rng.dirichlet(np.ones(9)), float(rng.uniform(0.2, 0.9))),
    "qk_norm_scores": lambda rng: (
        *rng.standard_normal((2, 2, 6, 8)), *rng.normal(0, 0.5, (2, 8)), float(rng.integers(2, 30))
    ),
    "induction_scores": _draw_attention,
}  # fmt: skip


def check_seeded(answer: Attempt, seed: int, name: str = "") -> Feedback:
    """Check an answer on inputs drawn from a seed, so that recorded results cannot be copied.

    The expected result is that of `solutions`. Its difference from an answer may be the rounding of float32, because
    the answer may convert to it. The solutions themselves are refused. The call counts no try for `progress`.

    Parameters
    ----------
    answer : callable
        The student's function.
    seed : int
        Any number of at least 0, for example one for each student.
    name : str, optional
        The name of the exercise; by default that of the function.

    Raises
    ------
    SeedError
        If the exercise does not exist, or its inputs are not drawn from a seed.

    Examples
    --------
    >>> def soft_cap(x, cap):
    ...     return np.clip(x, -cap, cap)
    >>> print(str(check_seeded(soft_cap, seed=7)).splitlines()[0])
    Not yet: soft_cap(...) on numbers drawn with seed 7
    """
    name = name or str(getattr(answer, "__name__", ""))
    if name not in INPUTS:
        raise SeedError(f"no inputs are drawn for {name!r}; the exercises are {', '.join(INPUTS)}")
    if getattr(answer, "__module__", "") == solutions.__name__:
        return Feedback(False, f"Not yet: that is the solution of {name} in this package; write the function yourself")
    arguments = INPUTS[name](np.random.default_rng(seed))
    right: Array = getattr(solutions, name)(*arguments)
    # A dozen float32 roundings of numbers as large as the largest result.
    bound = 12 * 2.0**-24 * np.abs(np.asarray(wide(right), np.float64)).max() if right.dtype.kind == "f" else 0.0
    if name in ("embed_bf16", "round_to_bf16"):
        bound = 0.0
    return give_feedback(answer, [Trial(f"{name}(...) on numbers drawn with seed {seed}", arguments, right, bound)], [])
