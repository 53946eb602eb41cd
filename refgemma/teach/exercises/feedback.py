"""Give feedback on an answer: call it, compare the result with the expected one, and compare a wrong result with bugs.

Checked by tests with solutions, stubs and typical wrong answers.
"""

import copy
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.oracle.judge import distance_from, strict_distance
from refgemma.oracle.tolerance import tolerance
from refgemma.precision import Array, Rounded, dtype_name, wide

Attempt = Callable[..., Any]

# A bug is named if it leaves at most this part of the difference. Rounding makes two programs with the same bug differ
# by 0.4 % in bfloat16, and by much less in float32. Other bugs leave a half or more.
EXPLAINED = 0.01


@dataclass(frozen=True)
class Feedback:
    """The feedback of a check; true if the answer passed.

    Examples
    --------
    >>> Feedback(False, "Not yet: try again"), bool(Feedback(True, "Right"))
    (Not yet: try again, True)
    """

    passed: bool
    message: str

    def __bool__(self) -> bool:
        """Return True if the answer passed."""
        return self.passed

    def __repr__(self) -> str:
        """Return the message, so that a notebook shows it."""
        return self.message


@dataclass(frozen=True)
class Trial:
    """One call of an answer: its arguments, the expected result, and the rounding bound of each element."""

    call: str  # the call's description in the feedback
    arguments: tuple[Any, ...]
    right: Any
    bound: Any = 0.0


@dataclass(frozen=True)
class Hint:
    """The feedback for an answer with the same result as `wrong`, a function with a known bug."""

    text: str
    wrong: Attempt


@dataclass(frozen=True)
class Raised:
    """The exception that the answer raised, instead of a result."""

    error: Exception


def give_feedback(answer: Attempt, trials: Iterable[Trial], hints: Sequence[Hint]) -> Feedback:
    """Call `answer` on each trial, and describe the first result that is wrong."""
    if definition := name_definition(answer):
        return Feedback(
            False,
            f"Not yet: that is {definition}, refgemma's own definition\n  Write the function yourself, with NumPy.",
        )
    count = 0
    for trial in trials:
        count += 1
        handed_in = copy.deepcopy(trial.arguments)
        given = call(answer, handed_in)
        problem = describe_changed_arguments(trial.arguments, handed_in) or describe_fault(given, trial)
        if problem:
            rests = ((measure_rest(given, hint, trial), hint.text) for hint in hints)
            part, text = min(rests, key=lambda pair: pair[0], default=(math.inf, ""))
            said = f"\n  Hint: {text}" if part <= EXPLAINED else ""
            return Feedback(False, f"Not yet: {trial.call}\n  {problem}{said}")
    return Feedback(True, f"Right: all {count} trials conform.")


def name_definition(answer: Attempt) -> str:
    """Return the answer's name if it is a function of this package, otherwise an empty text.

    Examples
    --------
    >>> from refgemma import ops
    >>> name_definition(ops.rotate), name_definition(lambda x: x)
    ('refgemma.ops.rotate', '')
    """
    function = inspect.unwrap(getattr(answer, "func", answer))  # the answer may also be a functools.partial
    module = str(getattr(function, "__module__", ""))
    inside = module.startswith("refgemma.") and not module.startswith("refgemma.teach.")
    return f"{module}.{function.__name__}" if inside else ""


def call(answer: Attempt, arguments: tuple[Any, ...]) -> Any:
    """Return the result of `answer`, or `Raised`."""
    try:
        with np.errstate(all="ignore"):
            return answer(*arguments)
    except Exception as error:  # show the student any exception of their function
        return Raised(error)


def describe_changed_arguments(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    """Return the feedback for an answer that changed one of its arguments, or an empty text."""
    for old, new in zip(before, after, strict=True):
        if isinstance(old, np.ndarray) and not np.array_equal(old, new):
            return "your function changes its argument; make a new array (x = x * 2, not x *= 2)"
    return ""


def describe_fault(given: Any, trial: Trial) -> str:
    """Return one sentence that describes the fault of a result, or an empty text if it conforms."""
    if isinstance(given, Raised):
        if isinstance(given.error, NotImplementedError):
            return "nothing is written yet: replace the line that raises NotImplementedError"
        return f"your function raised {type(given.error).__name__}: {given.error}"
    if given is None:
        return "your function returned None; does it end with `return ...`?"
    if isinstance(trial.right, str) and not isinstance(given, str):
        return f"your function returned {type(given).__name__} instead of {type(trial.right).__name__}"
    if not isinstance(trial.right, np.ndarray):
        same = np.shape(given) == () and given == trial.right
        return "" if same else f"{reprlib.repr(given)} instead of {trial.right!r}"
    return describe_wrong_array(given, trial.right, trial.bound)


def describe_wrong_array(given: Any, right: Array, bound: Any) -> str:
    """Describe the fault of an array: kind, shape, precision, or the element with the largest error."""
    try:
        array = given if isinstance(given, np.ndarray) else np.asarray(given)
    except ValueError:
        return "your function returned rows of different lengths, which are not an array"
    if array.dtype.kind not in "biuf":
        return f"your function returned {type(given).__name__}, not an array of numbers"
    if array.shape != right.shape:
        return f"the shape is {array.shape} instead of {right.shape}"
    if isinstance(right, Rounded) and type(array) is not type(right):
        name = dtype_name(right)
        return f"the result is not rounded to {name}; return narrow(result, like=x), or keep the arrays in {name}"
    if np.isnan(wide(array)).any():
        place = tuple(int(n) for n in np.argwhere(np.isnan(wide(array)))[0])
        return f"the result contains NaN (not a number), first at {list(place)}"
    if right.dtype == bool and array.dtype != bool:
        return f"the result is {array.dtype}, not bool; ~mask and table[mask] need True and False, not 1 and 0"
    if conforms(array, right, bound):
        return ""
    apart = distance_from(array, right)
    place = tuple(int(n) for n in np.unravel_index(np.argmax(apart), apart.shape))
    wrong = int(np.sum(array != right if isinstance(right, Rounded) else apart > 2 * np.asarray(bound)))
    return (
        f"{wrong} of {right.size} elements {'is' if wrong == 1 else 'are'} wrong; the largest error, at "
        f"{list(place)}, is {_show(array[place])} "
        f"instead of {_show(right[place])}"
    )


def _show(value: Any) -> str:
    return str(bool(value)) if np.asarray(value).dtype == bool else f"{float(value):.6g}"


def conforms(array: Array, right: Array, bound: Any) -> bool:
    """Return True if rounding explains the difference of two arrays of the same shape."""
    if right.dtype.kind != "f":
        return bool(np.array_equal(array, right))
    allowed = np.broadcast_to(np.asarray(bound, np.float64), right.shape)
    # The answer is judged in the precision of the expected result.
    return strict_distance(wide(array), wide(right), tolerance(allowed), dtype_name(right)) <= 1


def measure_rest(given: Any, hint: Hint, trial: Trial) -> float:
    """Return the part of a result's error that a bug does not explain; 0 if the bug gives the same result.

    This is the result's distance from the bug's result, divided by the distance from the expected result. It is
    infinite if the bug does not change this trial's result.
    """
    made = call(hint.wrong, copy.deepcopy(trial.arguments))
    if isinstance(given, Raised) or isinstance(made, Raised):
        same = isinstance(given, Raised) and isinstance(made, Raised) and repr(given.error) == repr(made.error)
        return 0.0 if same else math.inf
    if not describe_fault(made, trial):
        return math.inf
    if isinstance(made, str):
        return 0.0 if isinstance(given, str) and given == made else math.inf
    ours, theirs, right = (read_numbers(x) for x in (given, made, trial.right))
    if ours is None or theirs is None or right is None or ours.shape != theirs.shape:
        return math.inf
    if np.array_equal(ours, theirs):
        return 0.0
    finite = np.isfinite(ours)
    if not np.array_equal(finite, np.isfinite(theirs)):
        return math.inf
    error = ours - right if ours.shape == right.shape else ours  # a result of another shape is wrong as a whole
    remains, total = np.linalg.norm((ours - theirs)[finite]), np.linalg.norm(error[finite])
    return float(remains / total) if np.isfinite(total) and total > 0 else math.inf


def read_numbers(x: Any) -> Array | None:
    """Return a result in float64, or None if it is not an array of numbers."""
    try:
        array = np.asarray(x)
    except ValueError:
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" else None
