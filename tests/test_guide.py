"""Test the staged hints of the exercises, the page of progress, and the diagnoses of the mystery traces."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from refgemma.teach import exercises
from refgemma.teach.exercises import ProgressError, check_diagnosis, guide, hint, progress, solutions
from refgemma.teach.exercises.guide import HINTS


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Reset hints and tries before and after each test."""
    for state in (guide._shown, guide._session, guide._unsaved):
        state.clear()
    yield
    for state in (guide._shown, guide._session, guide._unsaved):
        state.clear()


# --- hints ------------------------------------------------------------------------------------------------------------


def test_each_exercise_has_hints_and_the_right_notebook() -> None:
    assert {f"check_{name}" for name in HINTS} == {
        name
        for name in exercises.__all__
        if name.startswith("check_") and name not in ("check_diagnosis", "check_seeded")
    }
    folder = Path(__file__).parents[1] / "notebooks"
    for name, (notebook, _, _) in HINTS.items():
        (path,) = folder.glob(f"{notebook:02d}_*.py")
        assert f"exercises.check_{name}({name})" in path.read_text("utf-8")


@pytest.mark.parametrize("name", HINTS)
def test_each_call_says_more(name: str) -> None:
    first, second, third, fourth = (hint(name) for _ in range(4))
    assert repr(first).startswith("Hint 1 of 3: ")
    assert first.endswith("?")  # a nudge asks
    assert second.startswith("Hint 2 of 3: ")
    assert second.endswith(".")
    assert third == fourth
    assert inspect.getsource(getattr(solutions, name)) in third


def test_a_hint_for_a_function_and_of_a_stage() -> None:
    def rotate() -> None: ...

    assert hint(rotate, stage=2) == hint("check_rotate", stage=2)
    assert hint(rotate).startswith("Hint 1 of 3")  # a stage is not counted


@pytest.mark.parametrize("exercise", ["rope", "", len])
def test_a_hint_for_no_exercise(exercise: object) -> None:
    with pytest.raises(ProgressError, match=r"there is no exercise .*; the exercises are embed, "):
        hint(exercise)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 4])
def test_a_hint_of_no_stage(stage: int) -> None:
    with pytest.raises(ProgressError, match="it must be 1, 2 or 3"):
        hint("rotate", stage)


# --- progress ---------------------------------------------------------------------------------------------------------


def row(page: str, name: str) -> str:
    (found,) = [line for line in page.splitlines() if f"  {name} " in line + " "]
    return found.split(name)[1].strip()


def test_the_page_counts_tries() -> None:
    assert "Solved: 0 of 20 exercises, 0 of 6 diagnoses" in repr(progress())
    exercises.check_soft_cap(lambda x, cap: x)
    exercises.check_soft_cap(solutions.soft_cap)
    exercises.check_soft_cap(lambda x, cap: x)  # a solved exercise stays solved
    exercises.check_rotate(lambda x, cos, sin: x)
    check_diagnosis(1, "the window is one key too wide")
    page = progress()
    assert "Solved: 1 of 20 exercises, 1 of 6 diagnoses" in page
    assert row(page, "soft_cap") == "solved, 3 tries"
    assert row(page, "rotate") == "open, 1 try"
    assert row(page, "embed") == ""
    assert row(page, "diagnosis 1") == "solved, 1 try"


def test_a_stub_is_not_a_try() -> None:
    def stub(x: object, cap: object) -> object:
        raise NotImplementedError

    exercises.check_soft_cap(stub)
    check_diagnosis(1, "")
    assert row(progress(), "soft_cap") == ""
    assert "diagnosis 1" not in progress()


def test_a_file_joins_notebooks(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    exercises.check_soft_cap(solutions.soft_cap)
    progress(file)
    assert row(progress(file), "soft_cap") == "solved, 1 try"  # not counted twice
    guide._session.clear()  # another notebook
    exercises.check_soft_cap(lambda x, cap: x)
    exercises.check_rotate(solutions.rotate)
    page = progress(file)
    assert row(page, "soft_cap") == "solved, 2 tries"
    assert row(page, "rotate") == "solved, 1 try"
    assert row(progress(), "soft_cap") == "open, 1 try"  # of this session


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"rope": {"tries": 1, "solved": true}}', '{"rotate": 1}',
                '{"rotate": {"tries": true, "solved": true}}', '{"rotate": {"tries": 1}}'],
)  # fmt: skip
def test_a_damaged_file_is_kept(tmp_path: Path, content: str) -> None:
    file = tmp_path / "progress.json"
    file.write_text(content)
    with pytest.raises(ProgressError, match=r"progress\.json: .*") as caught:
        progress(file)
    assert "\n" not in str(caught.value)
    assert file.read_text() == content


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ProgressError, match="cannot be written"):
        progress(tmp_path / "nowhere" / "progress.json")


# --- diagnoses --------------------------------------------------------------------------------------------------------

RIGHT = {
    1: ["The window is one key too wide.", "sliding window of 6 instead of 5", "the mask shows one key more"],
    2: ["scores are scaled with head_dim instead of query_pre_attn_scalar", "the scale is 1/sqrt(head dim)",
        "it divides by the square root of head_dim: wrong scaling"],
    3: ["gate and up are exchanged", "The up matrix is used for the gate, they are swapped", "gate/up mixed up"],
    4: ["post_attention_layernorm multiplies by the weight, not 1 + weight",
        "the norm after attention has no offset of one", "the weight of the post-attention norm is minus 1"],
    5: ["the final soft cap is missing", "the logits are not capped", "No cap of the logits"],
    6: ["rope theta is 1e6 instead of 1e4", "the rotary base is too large", "theta is 1000000"],
}  # fmt: skip
PAIRS = [(number, text) for number, texts in RIGHT.items() for text in texts]


@pytest.mark.parametrize(("number", "text"), PAIRS, ids=[text for _, text in PAIRS])
def test_a_right_diagnosis_fits_its_port_only(number: int, text: str) -> None:
    assert [port for port in RIGHT if check_diagnosis(port, text)] == [number]


@pytest.mark.parametrize(
    ("number", "text"), [(1, "the window"), (2, "the scale is wrong"), (3, "gate and up"), (4, "post attention norm"),
                         (5, "the cap"), (6, "rope theta")],
)  # fmt: skip
def test_the_part_alone_is_not_enough(number: int, text: str) -> None:
    feedback = check_diagnosis(number, text)
    assert not feedback
    assert "you named the right part" in repr(feedback)


@pytest.mark.parametrize(
    ("number", "tensor"), [(1, "layers.0.attention.probs"), (2, "layers.0.attention.scores"),
                           (3, "layers.0.feed_forward.gate"), (5, "logits"), (6, "cos")],
)  # fmt: skip
def test_a_wrong_part_gets_the_first_wrong_tensor(number: int, tensor: str) -> None:
    feedback = check_diagnosis(number, "something is wrong with the embedding")
    assert not feedback
    assert f"its first wrong tensor is {tensor}." in repr(feedback)


def test_nothing_and_too_much() -> None:
    assert "nothing is written yet" in repr(check_diagnosis(2, " \n "))
    assert not check_diagnosis(1, "x" * 10_000_000 + "window too wide")
    with pytest.raises(ValueError, match="the ports have the numbers 1 to 6"):
        check_diagnosis(7, "window")
