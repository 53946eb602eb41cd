"""Give hints for each exercise in stages, and show a page of progress.

Checked by tests: each exercise has its hints, and the last hint is the solution.
"""

import functools
import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refgemma.errors import RefgemmaError
from refgemma.files import read_object, replace_file
from refgemma.teach.exercises import solutions
from refgemma.teach.exercises.feedback import Attempt, Feedback

# Exercise -> its notebook, the first hint (a nudge) and the second hint (most of the answer).
HINTS: dict[str, tuple[int, str, str]] = {
    "embed": (
        1, "Each id selects one row of the table. Which number multiplies the rows, and from which axis does it come?",
        "table[ids] has the shape (*ids.shape, hidden). Multiply it by the square root of table.shape[-1]; in half "
        "precision (notebook 7), round this factor first: narrow(factor, like=table), from refgemma.",
    ),
    "gelu_tanh": (
        1, "Begin with the innermost bracket of the formula. Which three steps follow, from the inside out?",
        "With inner = x + 0.044715 * x**3, the result is 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * inner)).",
    ),
    "repeat_kv": (
        2, "Query heads 0 and 1 use key head 0, query heads 2 and 3 use key head 1. Which axis has the heads?",
        "np.repeat repeats each element in place, 0 0 1 1; np.tile repeats the whole, 0 1 0 1. The heads are axis 1.",
    ),
    "rotate": (
        3, "A pair (a, b) becomes (a cos - b sin, b cos + a sin). Where is the partner of x[..., i] in its head?",
        "Split x into its two halves. The result is x * cos + other * sin. In other, the negative second half comes "
        "first, then the first half.",
    ),
    "soft_cap": (
        4, "tanh goes smoothly from -1 to 1 and has the slope 1 at 0. What must you do before and after it?",
        "Divide by the cap, take np.tanh, and multiply by the cap.",
    ),
    "attention_probs": (
        4, "There are three steps: cap, mask, softmax. What would the cap do to a score of minus infinity?",
        "Cap the scores first. Then np.where(mask, capped, -np.inf). Then exponentials divided by the sum of their "
        "row: axis=-1, keepdims=True. Subtract the largest score of the row before np.exp.",
    ),
    "sliding_mask": (
        5, "A query's own key has the distance q - k = 0. At which other distances does the query see a key?",
        "distance = q_places[:, None] - k_places has the shape (queries, keys). A query sees distances "
        "from 0 to less than the window. Join the two conditions with & and brackets.",
    ),
    "rms_norm": (
        6, "Divide each vector by its own size. Is the factor the stored weight? What happens with a vector of zeros?",
        "With y = wide(x): y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + eps) * (1 + wide(weight)). Round once, "
        "at the end: narrow(result, like=x).",
    ),
    "round_to_bf16": (
        7, "Add half of the last kept bit to the 32 bits as a whole number, then clear the lower 16. What about ties?",
        "Add 0x7FFF plus the last bit that is kept, (bits >> 16) & 1; then & np.uint32(0xFFFF0000). View it as "
        "float32.",
    ),
    "embed_bf16": (
        7, "Two numbers are rounded: the factor and the product. Which of them does NumPy not round by itself?",
        "narrow(math.sqrt(table.shape[-1]), like=table) is the factor in bfloat16. table[ids] times this factor is "
        "rounded because table is an array in bfloat16.",
    ),
    "keep_top_p": (
        8, "Sort the tokens, the most likely first, and add up the probabilities. Which token is the last to keep?",
        "Keep a token if the sum of the tokens before it is less than p: np.cumsum(sorted) - sorted < p. Then put the "
        "result in the order of the tokens: kept[order[...]] = True.",
    ),
    "first_divergence": (
        9, "Go through the names in order. How large is an error that rounding can explain?",
        "Compare the root mean square of ours[name] - recorded[name] with 1e-5 times that of recorded[name]. Return "
        "the first name that exceeds it, and None after the loop.",
    ),
    "parameters": (
        10, "List the matrices of one block, with their two sizes, and its norms. Which parts are not in a block?",
        "Embedding: vocab_size * hidden_size, once. Block: q and o (hidden * heads * head_dim), k and v (hidden * "
        "key heads * head_dim), three of hidden * intermediate, four norms. At the end one more norm.",
    ),
    "causality_test": (
        11, "Change one token, and look at the answers before it. For which tokens must you try this?",
        "For each place but the first: logits = model(ids), changed = model(ids with another id there), and assert "
        "np.allclose(logits[:place], changed[:place], atol=1e-4).",
    ),
    "encode_word": (
        12, "Form all pairs of neighbours. Which pairs may be joined, and which pair first?",
        "In a loop: find the joined pairs that are in ranks; if there are none, return. Otherwise take the pair with "
        "the lowest "
        "rank, where it first occurs, and replace both parts: pieces[place : place + 2] = [joined].",
    ),
    "soft_cap_backward": (
        15, "The chain rule multiplies grad by the slope of the cap at x. What is the slope of tanh?",
        "The slope of tanh is 1 - tanh**2, here at x / cap. The factors cap and 1 / cap cancel.",
    ),
    "mean_gradient": (
        15, "Each row is a mean over its tokens. How do you get the sum over the tokens back?",
        "Multiply each row by its count: counts[:, None] * gradients. Sum over axis 0, and divide by counts.sum().",
    ),
    "rms_norm_backward": (
        16, "x acts in two ways: in the numerator, and through r. Over which axes does each of the two results sum?",
        "With r = 1 / sqrt(mean(x**2) + eps), n = x * r and h = grad * (1 + weight), the gradient of x is "
        "r * (h - n * mean(h * n)), the mean over axis -1. The gradient of the weight is the sum of grad * n over the "
        "other axes.",
    ),
    "qk_norm_scores": (
        13, "There are two norms and one product. Which axis has the numbers of one query?",
        "Norm q with q_weight and k with k_weight: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + "
        "weight). Then q @ k.swapaxes(-1, -2), divided by np.sqrt(scalar).",
    ),
    "induction_scores": (
        14, "Take a query in the second copy. How far back is the same token, and which key comes right after it?",
        "queries = np.arange(period + 1, 2 * period + 1). The same token is at queries - period, and its successor at "
        "queries - period + 1. Index the last two axes of probs with both arrays, and average.",
    ),
}  # fmt: skip

_shown: Counter[str] = Counter()
Result = tuple[int, bool]  # number of tries; true if one was right
_session: dict[str, Result] = {}
_unsaved: dict[str, Result] = {}


class ProgressError(RefgemmaError):
    """Raised for an unknown exercise, or for a progress file that cannot be read."""


class Page(str):
    """A text that a notebook shows without quotes."""

    def __repr__(self) -> str:
        """Return the text."""
        return str(self)


def hint(exercise: str | Callable[..., Any], stage: int | None = None) -> Page:
    """Return the next hint for an exercise: first a nudge, then most of the answer, then a solution.

    Parameters
    ----------
    exercise : str or callable
        The name of the exercise, or your function of that name.
    stage : int, optional
        The number of the hint, 1 to 3; by default the next hint.

    Raises
    ------
    ProgressError
        If there is no exercise of this name, or no hint of this number.

    Examples
    --------
    >>> hint("soft_cap", stage=1)
    Hint 1 of 3: tanh goes smoothly from -1 to 1 and has the slope 1 at 0. What must you do before and after it?
    >>> hint("soft_cap", stage=2)
    Hint 2 of 3: Divide by the cap, take np.tanh, and multiply by the cap.
    """
    name = exercise if isinstance(exercise, str) else getattr(exercise, "__name__", "")
    name = name.removeprefix("check_")
    if name not in HINTS:
        raise ProgressError(f"there is no exercise {name!r}; the exercises are {', '.join(HINTS)}")
    if stage is None:
        stage = _shown[name] = min(_shown[name] + 1, 3)
    elif stage not in (1, 2, 3):
        raise ProgressError(f"stage is {stage}; it must be 1, 2 or 3")
    texts = *HINTS[name][1:], "a solution\n\n" + inspect.getsource(getattr(solutions, name))
    return Page(f"Hint {stage} of 3: {texts[stage - 1]}")


def record(name: str, feedback: Feedback) -> Feedback:
    """Count one try of an exercise, unless the function is still a stub; return the feedback."""
    if "nothing is written yet" not in feedback.message:
        for results in (_session, _unsaved):
            tries, solved = results.get(name, (0, False))
            results[name] = (tries + 1, solved or feedback.passed)
    return feedback


def count_tries(check: Callable[[Attempt], Feedback]) -> Callable[[Attempt], Feedback]:
    """Return a check that also counts its calls for `progress`."""
    name = check.__name__.removeprefix("check_")

    @functools.wraps(check)
    def count(answer: Attempt) -> Feedback:
        return record(name, check(answer))

    return count


def progress(path: str | Path | None = None) -> Page:
    """Return a page with the state of each exercise.

    Every call of a check counts as a try, except on a stub. Without a file, the page describes this Python session. To
    combine several notebooks, give all the same file; each call adds the new tries to it.

    Parameters
    ----------
    path : path, optional
        A JSON file, such as ``progress.json``.

    Raises
    ------
    ProgressError
        If the file was not written by this function, or cannot be written.

    Examples
    --------
    >>> page = progress()
    >>> " 1  gelu_tanh" in page, "11  causality_test" in page
    (True, True)
    """
    results = dict(_session) if path is None else _join(Path(path))
    ports = sorted(name for name in results if name not in HINTS)
    solved = {name for name, result in results.items() if result[1]}
    exercises, diagnoses = len(solved & HINTS.keys()), len(solved.difference(HINTS))
    lines = [f"Solved: {exercises} of {len(HINTS)} exercises, {diagnoses} of 6 diagnoses", "", "notebook  exercise"]
    rows = [*((notebook, name) for name, (notebook, _, _) in HINTS.items()), *((9, port) for port in ports)]
    lines += [f"{notebook:8d}  {name:18s}{_describe_result(results.get(name))}" for notebook, name in rows]
    return Page("\n".join(line.rstrip() for line in lines))


def _describe_result(result: Result | None) -> str:
    if result is None:
        return ""
    tries, solved = result
    return f"{'solved' if solved else 'open'}, {tries} {'try' if tries == 1 else 'tries'}"


def _join(path: Path) -> dict[str, Result]:
    """Add the new tries to a file, and return all results."""
    results = _read(path)
    for name, (tries, solved) in _unsaved.items():
        before = results.get(name, (0, False))
        results[name] = (before[0] + tries, before[1] or solved)
    content = {name: {"tries": tries, "solved": solved} for name, (tries, solved) in results.items()}
    try:
        replace_file(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ProgressError(f"{path}: cannot be written ({error.strerror}); give another file") from error
    _unsaved.clear()
    return results


def _read(path: Path) -> dict[str, Result]:
    """Return the results in a file, or none if it does not exist."""
    if not path.exists():
        return {}
    results = {}
    for name, entry in read_object(path, ProgressError, "delete it, or give another file").items():
        tries, solved = (entry.get("tries"), entry.get("solved")) if isinstance(entry, dict) else (None, None)
        if not (name in HINTS or name.startswith("diagnosis ")) or type(tries) is not int or type(solved) is not bool:
            raise ProgressError(
                f"{path}: {name[:40]!r} is not the state of an exercise; delete it, or give another file"
            )
        results[name] = (tries, solved)
    return results
