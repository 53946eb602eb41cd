"""Run the tiny model with a student's functions, and show the resulting story beside the definition's story.

Checked with the solutions, whose story equals that of `refgemma.generate`, and with typical mistakes.
"""

import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from refgemma import ops
from refgemma.errors import RefgemmaError
from refgemma.files import pluralise
from refgemma.generation.greedy import greedy
from refgemma.model import embed
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.oracle.operations import Context, Operation, operations
from refgemma.oracle.tolerance import Arithmetic
from refgemma.precision import Array
from refgemma.teach.exercises import single_operations as checks
from refgemma.teach.exercises.feedback import Attempt, Feedback
from refgemma.trace.candidate import Call
from refgemma.trace.names import LOGPROBS, save_trace

PROMPT = "There was once a little princess"
LONGEST = 200  # maximum number of new tokens; the tiny model was not trained for longer texts
STORY_SECONDS = 30.0  # time limit of a story, for slow functions

# Part that a student may write -> its definition, which gives the right shape, and its check.
REPLACEABLE: dict[str, tuple[Attempt, Callable[[Attempt], Feedback]]] = {
    "embed": (embed, checks.check_embed),
    "rms_norm": (ops.rms_norm, checks.check_rms_norm),
    "rotate": (ops.rotate, checks.check_rotate),
    "repeat_kv": (ops.repeat_kv, checks.check_repeat_kv),
    "sliding_mask": (ops.sliding_mask, checks.check_sliding_mask),
    "soft_cap": (ops.soft_cap, checks.check_soft_cap),
    "attention_probs": (lambda scores, mask, cap: scores, checks.check_attention_probs),
    "gelu_tanh": (ops.gelu_tanh, checks.check_gelu_tanh),
}


class PlayError(RefgemmaError):
    """Raised if the model cannot run on a student's function; the message names the function."""


class _TimeIsUp(PlayError):
    """Raised when a student's function is called after the time limit."""


@dataclass(frozen=True)
class Story:
    """The stories of a student's model and of the definition for the same prompt; the `repr` shows both.

    Examples
    --------
    >>> Story("Once a", "Once a", ("▁a",), ("▁a",))
    With your functions (none):
      Once a
    This is the definition's story, token for token.
    """

    text: str  # the student's story, including the prompt
    usual_text: str  # the definition's story
    tokens: tuple[str, ...]  # new tokens of the student's story
    usual_tokens: tuple[str, ...]
    feedback: Mapping[str, Feedback] = field(default_factory=dict)  # part -> feedback of its check
    seconds: float | None = None  # the time limit, if the story ended because of it

    @property
    def same(self) -> int:
        """The number of new tokens before the stories differ."""
        pairs = zip(self.tokens, self.usual_tokens, strict=False)
        return next((n for n, (ours, usual) in enumerate(pairs) if ours != usual), len(self.tokens))

    def __repr__(self) -> str:
        """Return both stories, the place where they begin to differ, and the feedback on wrong functions."""
        lines = [f"With your functions ({', '.join(self.feedback) or 'none'}):", _wrap(self.text)]
        if self.seconds is not None:
            lines.append(
                f"Your functions took more than {self.seconds:g} s; the story ends after "
                f"{pluralise(len(self.tokens), 'token')}."
            )
        if self.same == len(self.tokens):
            lines.append("This is the definition's story, token for token.")
        else:
            lines += ["With the definition:", _wrap(self.usual_text)]
            lines.append(
                f"The stories differ after {self.same} new tokens: yours continues with {self.tokens[self.same]!r}, "
                "the "
                f"definition's with {self.usual_tokens[self.same]!r}."
            )
        wrong = {part: feedback for part, feedback in self.feedback.items() if not feedback}
        lines += [f"{part}: {feedback}" for part, feedback in wrong.items()]
        if wrong and self.same == len(self.tokens):
            lines.append("This story does not show the mistake; a longer story may (tokens=200).")
        if self.feedback and not wrong:
            lines.append("All your functions pass their checks.")
        return "\n".join(lines)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 90, initial_indent="  ", subsequent_indent="  ")


def play(text: str = PROMPT, *, tokens: int = 40, seconds: float = STORY_SECONDS, **functions: Any) -> Story:
    """Write a story with the tiny model, which uses your functions instead of the definition's.

    You can pass any of the functions of the exercises: ``embed``, ``rms_norm``, ``rotate``, ``repeat_kv``,
    ``sliding_mask``, ``soft_cap``, ``attention_probs`` and ``gelu_tanh``. For the others, the definition is used. If
    you pass `attention_probs`, your `soft_cap` is used only for the logits. Each step takes the most likely token.

    Parameters
    ----------
    text : str
        The beginning of the story.
    tokens : int
        The number of new tokens, 1 to 200.
    seconds : float
        The time limit. Afterwards, the next call of one of your functions ends the story.
    **functions : callable
        Your functions, by the names of the exercises.

    Returns
    -------
    Story
        The two stories, and the feedback of each function's check.

    Raises
    ------
    PlayError
        If a function raises an error, or returns NaN, a wrong shape or something else than numbers; also for invalid
        arguments.

    Examples
    --------
    >>> from refgemma.teach.exercises import solutions
    >>> play(tokens=8, rotate=solutions.rotate)
    With your functions (rotate):
      There was once a little princess, who was sitting in the middle of
    This is the definition's story, token for token.
    All your functions pass their checks.
    """
    tiny = load("tiny")
    prompt = _read_prompt(tiny, text, functions)
    if not 1 <= tokens <= LONGEST:
        raise PlayError(f"tokens is {tokens}; it must be from 1 to {LONGEST}")
    usual, new, up = _write_usual(text, tokens), list[int](), False
    until = time.monotonic() + seconds
    try:
        for _ in range(tokens):
            logits = _run(tiny, [*prompt, *new], functions, until)["logits"][0, -1]
            if not np.isfinite(logits).all():
                raise PlayError("the logits are NaN or infinite: your functions return too large numbers")
            new.append(int(np.argmax(logits)))
            if new[-1] in tiny.stop_ids:
                break
    except _TimeIsUp:
        up = True
    feedback = {part: REPLACEABLE[part][1](function) for part, function in functions.items()}
    names = tiny.tokenizer.convert_ids_to_tokens
    ours, theirs = (tiny.tokenizer.decode([*prompt, *ids], skip_special_tokens=True) for ids in (new, usual))
    return Story(ours, theirs, tuple(names(new)), tuple(names(usual)), feedback, seconds if up else None)


def save_port(path: str | Path, text: str = PROMPT, **functions: Any) -> Path:
    """Write the trace of the tiny model with your functions, for ``refgemma check``; see `play` for the arguments.

    Examples
    --------
    >>> import tempfile
    >>> from refgemma.oracle import check
    >>> from refgemma.teach.exercises import solutions
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = check(save_port(f"{folder}/mine.safetensors", rms_norm=solutions.rms_norm))
    >>> report.verdict
    'conforms'
    """
    tiny = load("tiny")
    ids = _read_prompt(tiny, text, functions)
    tensors = _run(tiny, ids, functions, time.monotonic() + STORY_SECONDS)
    save_trace([("input_ids", np.array([ids])), *tensors.items()], path, {"dtype": "float32"})
    return Path(path)


def _read_prompt(tiny: Pretrained, text: str, functions: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a prompt; raise an error for an unknown part or a text that is too long."""
    for part, function in functions.items():
        if part not in REPLACEABLE:
            raise PlayError(
                f"{part} is not a part of this model that you can replace; you can replace {', '.join(REPLACEABLE)}"
            )
        if not callable(function):
            raise PlayError(
                f"{part} is {type(function).__name__}, not a function; pass {part}={part}, without brackets"
            )
    ids: list[int] = tiny.tokenizer.encode(text)
    if len(ids) > tiny.config.max_position_embeddings - LONGEST:
        raise PlayError(
            f"text has {pluralise(len(ids), 'token')}; begin with at most "
            f"{tiny.config.max_position_embeddings - LONGEST} tokens"
        )
    return ids


@cache
def _write_usual(text: str, tokens: int) -> list[int]:
    tiny = load("tiny")
    prompt = tiny.tokenizer.encode(text)
    return list(greedy(prompt, tiny.weights, tiny.config, max_new_tokens=tokens, stop_ids=tiny.stop_ids))


def _run(tiny: Pretrained, ids: list[int], functions: Mapping[str, Attempt], until: float) -> dict[str, Array]:
    """Return all tensors of the tiny model with a student's functions, by name."""
    row = np.array([ids])
    call = Call(row, np.arange(len(ids))[None], row >= 0, (len(ids),))
    context = Context(tiny.config, tiny.weights, call, Arithmetic(), exact=False)
    table = operations(_replace_parts(context, {part: _guard(part, f, until) for part, f in functions.items()}))
    tensors: dict[str, Array] = {}
    for name, op in table.items():
        if name != LOGPROBS:
            tensors[name] = op.compute(*(tensors[source] for source in op.inputs))
    return tensors


def _replace_parts(context: Context, parts: Mapping[str, Attempt]) -> Context:
    """Return a context that uses a student's functions with the arguments of the exercises."""
    named = {part: f for part, f in parts.items() if part not in ("embed", "sliding_mask", "attention_probs")}
    if "embed" in parts:
        named["embed"] = lambda c: parts["embed"](c.call.input_ids, c.weights.embed_tokens)
    context = replace(context, functions=named)
    if "sliding_mask" in parts:
        context = replace(context, mask=partial(_mask, parts["sliding_mask"]))
    if "attention_probs" in parts:
        context = replace(context, rewire=partial(_weigh_scores, parts["attention_probs"]))
    return context


def _mask(sliding_mask: Attempt, context: Context, layer: int) -> Array:
    places = np.arange(context.call.input_ids.shape[1])
    if context.config.is_sliding(layer):
        seen: Array = sliding_mask(places, places, context.config.sliding_window)
    else:
        seen = ops.causal_mask(places, places)
    return seen[None, None]


def _weigh_scores(attention_probs: Attempt, table: dict[str, Operation], context: Context) -> dict[str, Operation]:
    """Return operations that compute ``attention.probs`` from the uncapped scores by `attention_probs`."""
    cap = context.config.attn_logit_softcapping
    new = {}
    for layer in range(context.config.num_hidden_layers):
        op = table[f"layers.{layer}.attention.probs"]
        compute = lambda x, layer=layer: attention_probs(x, context.mask(context, layer), cap)  # noqa: E731
        new[op.name] = replace(op, inputs=(f"layers.{layer}.attention.scores",), compute=compute)
    return new


def _guard(part: str, function: Attempt, until: float) -> Attempt:
    """Wrap a student's function: turn its errors into `PlayError`, and check shape and type of its result."""
    definition = REPLACEABLE[part][0]
    kinds, wanted = ("b", "true and false") if part == "sliding_mask" else ("iuf", "numbers")
    advice = f"exercises.check_{part}({part}) gives more details"

    def compute(*arguments: Any) -> Array:
        if time.monotonic() > until:
            raise _TimeIsUp
        try:
            with np.errstate(all="ignore"):
                result = np.asarray(function(*(x.copy() if isinstance(x, np.ndarray) else x for x in arguments)))
        except NotImplementedError:
            raise PlayError(f"{part} is not written yet; leave it out, or write it first") from None
        except Exception as error:
            said = " ".join(str(error).split())
            raise PlayError(f"{part} raised {type(error).__name__}: {said}; {advice}") from error
        shape = definition(*arguments).shape
        if result.dtype.kind not in kinds:
            raise PlayError(f"{part} returned {result.dtype} instead of {wanted}; {advice}")
        if result.shape != shape:
            raise PlayError(f"{part} returned the shape {result.shape} instead of {shape}; {advice}")
        if not np.isfinite(result).all():
            raise PlayError(f"{part} returned NaN or infinite numbers; {advice}")
        return result if kinds == "b" else result.astype(np.float32)

    return compute
