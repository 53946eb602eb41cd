"""Test `exercises.play`: the story of a model with a student's functions, right or wrong."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.oracle import check
from refgemma.teach import exercises
from refgemma.teach.exercises import PlayError, play, save_port, solutions
from refgemma.teach.exercises.stories import REPLACEABLE

SOLVED = {part: getattr(solutions, part) for part in REPLACEABLE}
SEA = "There was once a little princess"


def pairs_side_by_side(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    numbers = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos[..., :half] + 1j * sin[..., :half])
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)


def norm_without_offset(x: Any, weight: Any, eps: float) -> Any:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def generated(tokens: int) -> str:
    """Return the continuation by the package's own command, which shares no loop with `play`."""
    tiny = refgemma.load("tiny")
    prompt = tiny.tokenizer.encode(SEA)
    new = list(refgemma.generate(prompt, tiny.weights, tiny.config, max_new_tokens=tokens))
    return str(tiny.tokenizer.decode([*prompt, *new], skip_special_tokens=True))


# --- right functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(), ("rotate",), ("soft_cap", "attention_probs"), tuple(SOLVED)])
def test_right_functions_write_the_usual_story(parts: tuple[str, ...]) -> None:
    story = play(SEA, tokens=12, **{part: SOLVED[part] for part in parts})
    assert story.text == story.usual_text == generated(12)
    assert "the definition's story, token for token" in repr(story)
    assert ("All your functions pass" in repr(story)) == bool(parts)


def test_each_function_is_called() -> None:
    called = set()

    def record(part: str) -> Any:
        def function(*arguments: Any) -> Any:
            called.add(part)
            return SOLVED[part](*arguments)

        return function

    play(SEA, tokens=1, **{part: record(part) for part in REPLACEABLE})
    assert called == set(REPLACEABLE)


def test_every_exercise_on_a_part_of_the_model_has_its_place() -> None:
    whole = {
        "round_to_bf16",
        "keep_top_p",
        "parameters",
        "first_divergence",
        "causality_test",
        "diagnosis",
        "encode_word",
        "qk_norm_scores",
        "induction_scores",
        "embed_bf16",
        "soft_cap_backward",
        "mean_gradient",
        "rms_norm_backward",
    }
    checks = {name.removeprefix("check_") for name in exercises.__all__ if name.startswith("check_")} - {"seeded"}
    assert checks - whole == set(REPLACEABLE)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_mistake_changes_the_story_and_is_named() -> None:
    story = play(SEA, tokens=12, rotate=pairs_side_by_side, embed=solutions.embed)
    assert story.usual_text == generated(12) != story.text
    assert story.tokens[: story.same] == story.usual_tokens[: story.same]
    assert story.tokens[story.same] != story.usual_tokens[story.same]
    shown = repr(story)
    assert "With the definition:" in shown
    assert f"The stories differ after {story.same} new tokens" in shown
    assert "rotate: Not yet" in shown
    assert "half a head apart" in shown
    assert "embed: " not in shown


def test_the_norm_without_its_offset_writes_nonsense() -> None:
    story = play(SEA, tokens=6, rms_norm=norm_without_offset)
    assert story.same < 3
    assert "multiply by 1 + weight" in repr(story)


def test_a_mistake_that_the_story_does_not_show() -> None:
    # The window has 64 tokens, and the story is shorter.
    story = play(SEA, tokens=6, sliding_mask=lambda q, k, w: k <= q[:, None])
    assert story.same == 6
    assert "does not show the mistake; a longer story may" in repr(story)
    assert "the window is missing" in repr(story)


def test_a_longer_story_shows_it() -> None:
    story = play(SEA, tokens=40, sliding_mask=lambda q, k, w: (k <= q[:, None]) & (k > q[:, None] - 8))
    assert story.same < 40


# --- functions that cannot run ----------------------------------------------------------------------------------------


def fail(*arguments: Any) -> Any:
    raise IndexError("index 9 is out\nof bounds")


def stub(*arguments: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("part", "function", "said"),
    [
        (
            "rotate",
            fail,
            "rotate raised IndexError: index 9 is out of bounds; exercises.check_rotate(",
        ),
        ("rotate", stub, "rotate is not written yet; leave it out"),
        ("rotate", lambda x: x, "rotate raised TypeError"),
        ("embed", lambda ids, table: table[ids][0], "embed returned the shape (7, 234) instead of (1, 7, 234)"),
        ("repeat_kv", lambda x, groups: x, "repeat_kv returned the shape (1, 2, 7, 32) instead of (1, 6, 7, 32)"),
        ("gelu_tanh", lambda x: None, "gelu_tanh returned object instead of numbers"),
        ("gelu_tanh", lambda x: x * 1j, "gelu_tanh returned complex"),
        ("soft_cap", lambda x, cap: x * np.nan, "soft_cap returned NaN or infinite numbers"),
        ("sliding_mask", lambda q, k, w: np.eye(len(q)), "sliding_mask returned float64 instead of true and false"),
        ("attention_probs", lambda s, mask, cap: s[0], "attention_probs returned the shape"),
        ("rms_norm", solutions.rms_norm(np.ones(2), np.ones(2), 0.0), "rms_norm is ndarray, not a function"),
        ("rope", solutions.rotate, "rope is not a part of this model that you can replace; you can replace embed, "),
        ("gelu_tanh", lambda x: [[1.0], [1.0, 2.0]], "gelu_tanh raised ValueError"),
    ],
)
def test_an_error_names_the_function_in_one_line(part: str, function: Any, said: str) -> None:
    with pytest.raises(PlayError, match=re.escape(said)) as caught:
        play(SEA, tokens=2, **{part: function})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "tokens", "said"), [(SEA, 0, "tokens is 0"), (SEA, 999, "1 to 200"),
                                                      ("a " * 400, 2, "text has ")])  # fmt: skip
def test_arguments_that_do_not_fit(text: str, tokens: int, said: str) -> None:
    with pytest.raises(PlayError, match=said):
        play(text, tokens=tokens)


def test_a_slow_function_ends_the_story() -> None:
    def slow(x: Any) -> Any:
        time.sleep(0.1)
        return solutions.gelu_tanh(x)

    story = play(SEA, tokens=60, seconds=2, gelu_tanh=slow)
    assert 0 < len(story.tokens) < 20
    assert "took more than 2 s" in repr(story)
    assert story.same == len(story.tokens)


def test_a_function_cannot_change_the_weights() -> None:
    def clear(ids: Any, table: Any) -> Any:
        rows = solutions.embed(ids, table)
        table[:] = 0
        return rows

    assert play(SEA, tokens=4, embed=clear).same == 4
    assert play(SEA, tokens=4).text == generated(4)


# --- a port of one's own ----------------------------------------------------------------------------------------------


def test_a_port_of_solutions_conforms(tmp_path: Path) -> None:
    report = check(save_port(tmp_path / "mine.safetensors", **SOLVED))
    assert report.verdict == "conforms"


def test_a_port_with_a_mistake_is_named(tmp_path: Path) -> None:
    report = check(save_port(tmp_path / "mine.safetensors", **SOLVED | {"rotate": pairs_side_by_side}))
    assert report.verdict == "differs"
    assert report.first_divergence is not None
    assert report.first_divergence.tensor == "layers.0.attention.q_rot"
