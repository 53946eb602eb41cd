"""Choose the most likely tokens, draw tokens, or search with beams.

Checked against `_beam_search` of transformers 5.23, search for search.

A *beam* is an unfinished text of a search. At each step, a candidate is a beam with one more token. The best unfinished
candidates become the next beams; the best finished candidates are stored.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from refgemma.inputs import InputError
from refgemma.precision import Array
from refgemma.shapes import TokenIds

# As in transformers, this number is added to a score that must not win, so that the score stays finite.
FAR = np.float32(-1e9)

Ends: TypeAlias = Callable[[TokenIds], Bool[np.ndarray, " rows"]]


def largest(values: Float[np.ndarray, "batch n"], count: int) -> Int[np.ndarray, "batch count"]:
    """Return the indices of the `count` largest values of each row, largest first; equal values keep their order.

    torch's ``topk`` does not define the order of equal values.

    Examples
    --------
    >>> largest(np.array([[1.0, 3.0, 2.0, 3.0]]), 3)
    array([[1, 3, 2]])
    """
    thresholds = np.partition(values, -count, axis=-1)[:, -count, None]
    rows = []
    for row, candidates in zip(values, values >= thresholds, strict=True):
        places = np.flatnonzero(candidates)
        rows.append(places[np.argsort(-row[places], kind="stable")][:count])
    return np.stack(rows)


_DRAWS = np.random.default_rng(0)  # each call continues where the previous call ended


def set_seed(seed: Any, deterministic: bool = False) -> None:
    """Restart the draws of `generate`, of Python's `random` and of `numpy.random`, as transformers does.

    ``Gemma2ForCausalLM.generate`` with ``do_sample=True`` and without `seed` continues the draws of the previous call.
    The same seed gives other draws in torch.

    Parameters
    ----------
    seed : int
        The same seed gives the same draws.
    deterministic : bool
        Has no effect, because no result depends on the order of threads.

    Raises
    ------
    InputError
        If `seed` is not a whole number from 0 to 2**32 - 1.

    Examples
    --------
    >>> import refgemma
    >>> model = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    >>> refgemma.set_seed(1)
    >>> first, second = (model.generate([[2]], do_sample=True, max_new_tokens=9).tolist() for _ in range(2))
    >>> refgemma.set_seed(1)
    >>> first == second, first == model.generate([[2]], do_sample=True, max_new_tokens=9).tolist()
    (False, True)
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"the seed is {seed!r}; it must be a whole number from 0 to 2**32 - 1")
    random.seed(int(seed))
    np.random.seed(seed)  # noqa: NPY002  # a caller's own code may draw from it
    _DRAWS.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def choose_generator(seed: int | None) -> np.random.Generator:
    """Return a new generator for a seed; without a seed, return the shared generator, which continues from call to
    call."""
    return _DRAWS if seed is None else np.random.default_rng(seed)


def draw(scores: Float[np.ndarray, "batch n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, "batch count"]:
    """Draw `count` indices of each row without replacement, with probabilities ``softmax(scores)``.

    Each score gets a random number from the standard Gumbel distribution; the draws are the largest sums, in descending
    order. So the first draw follows the softmax, the next the softmax of the remaining scores, and so on. A score of
    minus infinity is drawn only when all others have been drawn.

    Examples
    --------
    >>> draw(np.array([[0.0, -np.inf, 0.0]]), 2, np.random.default_rng(0)).tolist()
    [[2, 0]]
    """
    return largest(scores.astype(np.float64) + rng.gumbel(size=scores.shape), count)


@dataclass(frozen=True)
class Rules:
    """The settings of a search."""

    num_beams: int
    candidates: int  # number of candidates per step; more than the beams, because some may be finished
    longest: int  # maximum number of new tokens
    early_stopping: bool | str  # True, False or "never"
    length_penalty: float
    fill: int  # token that fills a text after its end


@dataclass(frozen=True)
class Beams:
    """The state of a search after some steps, best beams first.

    `origins` has, for each new token, the row of the previous step that the token continued. Rows are numbered through
    the whole batch. After the end of a text, the number is -1.
    """

    running: Int[np.ndarray, "batch beams length"]
    running_scores: Float[np.ndarray, "batch beams"]  # sums of log probabilities
    running_origins: Int[np.ndarray, "batch beams new"]
    finished: Int[np.ndarray, "batch beams length"]  # finished texts, padded; meaningless where `is_finished` is false
    finished_scores: Float[np.ndarray, "batch beams"]  # divided by the length penalty
    finished_origins: Int[np.ndarray, "batch beams new"]
    is_finished: Bool[np.ndarray, "batch beams"]
    improvable: Bool[np.ndarray, " batch"]  # true if a beam may still become better than a finished text
    exhausted: bool  # true if no candidate of the last step can be continued


@dataclass(frozen=True)
class Candidates:
    """The candidates of one step."""

    sequences: Int[np.ndarray, "batch candidates length"]
    scores: Float[np.ndarray, "batch candidates"]
    origins: Int[np.ndarray, "batch candidates new"]
    ended: Bool[np.ndarray, "batch candidates"]


def pick(values: Array, places: Int[np.ndarray, "batch picked"]) -> Array:
    """Return the entries of `values` (batch, n, ...) at the indices `places` of each row.

    Examples
    --------
    >>> pick(np.array([[10, 11], [20, 21]]), np.array([[1, 1, 0], [0, 0, 1]])).tolist()
    [[11, 11, 10], [20, 20, 21]]
    """
    picked: Array = values[np.arange(len(values))[:, None], places]
    return picked


def start_search(prompt: Int[np.ndarray, "batch seq"], rules: Rules) -> Beams:
    """Return a search before its first step; all beams are the prompt, but only the first beam counts, to avoid
    duplicates."""
    batch, count = len(prompt), rules.num_beams
    sequences = np.repeat(prompt[:, None], count, axis=1)
    origins = np.zeros((batch, count, 0), np.int64)
    only_first = np.where(np.arange(count) > 0, FAR, np.float32(0))
    return Beams(
        running=sequences,
        running_scores=np.tile(only_first, (batch, 1)),
        running_origins=origins,
        finished=sequences,
        finished_scores=np.full((batch, count), FAR),
        finished_origins=origins,
        is_finished=np.zeros((batch, count), bool),
        improvable=np.ones(batch, bool),
        exhausted=False,
    )


def find_candidates(
    beams: Beams,
    log_probs: Float[np.ndarray, "rows vocab"],
    ends: Ends,
    rules: Rules,
    rng: np.random.Generator | None,
) -> Candidates:
    """Return the best candidates of all beams, best first, or randomly drawn candidates in the order of drawing."""
    batch, count = beams.running_scores.shape
    vocab = log_probs.shape[1]
    totals = log_probs.reshape(batch, count, vocab) + beams.running_scores[:, :, None]
    flat = totals.reshape(batch, count * vocab)
    chosen = largest(flat, rules.candidates) if rng is None else draw(flat, rules.candidates, rng)
    parents, tokens = np.divmod(chosen, vocab)
    sequences = np.concatenate([pick(beams.running, parents), tokens[:, :, None]], axis=2)
    rows = parents + count * np.arange(batch)[:, None]
    origins = np.concatenate([pick(beams.running_origins, parents), rows[:, :, None]], axis=2)
    ended = ends(sequences.reshape(batch * rules.candidates, -1)).reshape(batch, rules.candidates)
    return Candidates(sequences, pick(flat, chosen), origins, ended)


def _plus_column(values: Array, fill: int) -> Array:
    """Return `values` (batch, n, length) with `fill` appended in the last axis."""
    return np.concatenate([values, np.full((*values.shape[:2], 1), fill)], axis=2)


def _add_finished(beams: Beams, found: Candidates, rules: Rules) -> dict[str, Any]:
    """Return the finished texts after a step: the best of the earlier texts and the texts that have just ended.

    Only the best `num_beams` candidates can become finished texts; the others can only be continued.
    """
    now = found.ended & (np.arange(rules.candidates) < rules.num_beams)
    closed = beams.is_finished.all(axis=1, keepdims=True) & (rules.early_stopping is True)
    new_tokens = found.origins.shape[2]
    # In this order, as in transformers, because float32 sums depend on the order.
    divided = found.scores / float(new_tokens) ** rules.length_penalty
    scores = divided + closed * FAR + ~beams.improvable[:, None] * FAR + ~now * FAR
    all_scores = np.concatenate([beams.finished_scores, scores], axis=1)
    best = largest(all_scores, rules.num_beams)
    sequences = np.concatenate([_plus_column(beams.finished, rules.fill), found.sequences], axis=1)
    origins = np.concatenate([_plus_column(beams.finished_origins, -1), found.origins], axis=1)
    return {
        "finished": pick(sequences, best),
        "finished_scores": pick(all_scores, best),
        "finished_origins": pick(origins, best),
        "is_finished": pick(np.concatenate([beams.is_finished, now], axis=1), best),
    }


def can_improve(
    running_scores: Float[np.ndarray, "batch beams"],
    finished_scores: Float[np.ndarray, "batch beams"],
    is_finished: Bool[np.ndarray, "batch beams"],
    new_tokens: int,
    rules: Rules,
) -> Bool[np.ndarray, " batch"]:
    """Return true if the best beam's score, after the length penalty, could still exceed the worst finished text's.

    The final length is unknown. If longer texts are favoured, ``early_stopping="never"`` uses the maximum length, which
    is safe. Otherwise the present length is used, as an estimate.
    """
    safe = rules.early_stopping == "never" and rules.length_penalty > 0
    length = rules.longest if safe else new_tokens
    possible = running_scores[:, :1] / float(length) ** rules.length_penalty
    worst = np.where(is_finished, finished_scores.min(axis=1, keepdims=True), FAR)
    better: Bool[np.ndarray, " batch"] = (possible > worst).any(axis=1)
    return better


def advance_search(
    beams: Beams,
    log_probs: Float[np.ndarray, "rows vocab"],
    ends: Ends,
    rules: Rules,
    rng: np.random.Generator | None = None,
) -> Beams:
    """Return the search after one more step. Source: transformers ``GenerationMixin._beam_search``.

    Parameters
    ----------
    beams : Beams
        The search so far.
    log_probs : float32 array (batch * beams, vocab)
        Log probabilities of the tokens after each running beam.
    ends : callable
        Takes sequences ``(rows, length)`` and returns true for each complete row.
    rules : Rules
        The rules of the search.
    rng : numpy.random.Generator, optional
        Generator that draws the candidates by probability; without it, the most likely candidates are used.

    Examples
    --------
    >>> rules = Rules(2, candidates=4, longest=5, early_stopping=False, length_penalty=1.0, fill=0)
    >>> log_probs = np.log(np.array([[0.1, 0.2, 0.7]] * 2, np.float32))
    >>> beams = advance_search(start_search(np.array([[5]]), rules), log_probs, lambda ids: ids[:, -1] == 2, rules)
    >>> beams.running.tolist(), beams.finished[0, 0].tolist(), beams.is_finished.tolist()
    ([[[5, 1], [5, 0]]], [5, 2], [[True, False]])
    """
    found = find_candidates(beams, log_probs, ends, rules, rng)
    scores = found.scores + found.ended * FAR
    best = largest(scores, rules.num_beams)
    running_scores = pick(scores, best)
    finished = _add_finished(beams, found, rules)
    better = can_improve(
        running_scores, finished["finished_scores"], finished["is_finished"], found.origins.shape[2], rules
    )
    return Beams(
        running=pick(found.sequences, best),
        running_scores=running_scores,
        running_origins=pick(found.origins, best),
        improvable=beams.improvable & better,
        exhausted=bool(found.ended.all()),
        **finished,
    )


def is_over(beams: Beams, rules: Rules) -> bool:
    """Return True if a search has ended: no beam can improve, all texts are finished, or no candidate can continue."""
    complete = rules.early_stopping is True and bool(beams.is_finished.all())
    return beams.exhausted or complete or not beams.improvable.any()


def collect_texts(beams: Beams, count: int) -> tuple[TokenIds, Float[np.ndarray, " rows"], Int[np.ndarray, "rows new"]]:
    """Return the `count` best finished texts per prompt, as tokens, scores and origins; the longest text sets the
    length."""
    rows, width = len(beams.finished) * count, beams.finished_origins.shape[2]
    origins = beams.finished_origins[:, :count].reshape(rows, width)
    unused = width - int((origins >= 0).sum(axis=1).max())
    sequences = beams.finished[:, :count].reshape(rows, -1)
    length = sequences.shape[1] - unused
    return sequences[:, :length], beams.finished_scores[:, :count].reshape(rows), origins[:, : width - unused]
