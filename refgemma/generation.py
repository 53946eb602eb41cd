"""From logits to tokens: greedy or sampled, one token at a time. Checked against transformers 5.23 `generate` (greedy,
token for token) and its logits processors (temperature, then top-k, then top-p)."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError, token_ids
from refgemma.model import next_token_logits
from refgemma.precision import Array, wide
from refgemma.weights.parameters import Weights


def keep_top_k(logits: Float[np.ndarray, " vocab"], top_k: int) -> Float[np.ndarray, " vocab"]:
    """Minus infinity for all but the `top_k` highest logits, and those that are as high as the last of them.

    Examples
    --------
    >>> keep_top_k(np.array([1.0, 3.0, 2.0]), 2)
    array([-inf,   3.,   2.])
    """
    threshold = np.sort(logits)[-min(top_k, len(logits))]
    return np.where(logits < threshold, -np.inf, logits)


def keep_top_p(logits: Float[np.ndarray, " vocab"], top_p: float) -> Float[np.ndarray, " vocab"]:
    """Minus infinity for all but the likeliest tokens that together reach probability `top_p`; one always stays.

    Examples
    --------
    >>> keep_top_p(np.log([0.5, 0.3, 0.2]), 0.7).round(2)
    array([-0.69, -1.2 ,  -inf])
    """
    ascending = np.argsort(logits, kind="stable")
    reached = np.cumsum(probabilities(logits)[ascending])
    dropped = ascending[:-1][reached[:-1] <= 1 - top_p]  # the tail, never the likeliest
    kept = logits.copy()
    kept[dropped] = -np.inf
    return kept


def probabilities(logits: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    """``exp(z) / sum(exp(z))`` in float64."""
    exponentials = np.exp(logits.astype(np.float64) - np.max(logits))
    shares: Array = exponentials / exponentials.sum()
    return shares


def process(
    logits: Float[np.ndarray, " vocab"], temperature: float, top_k: int | None, top_p: float | None
) -> Float[np.ndarray, " vocab"]:
    """The logits that are sampled from: divided by `temperature`, then cut to the top k, then to the top p.

    In float64, and shifted so that the largest is 0, which changes no probability: then no temperature overflows.
    """
    with np.errstate(over="ignore"):  # at a temperature near 0 all but the largest become minus infinity
        heated = (logits.astype(np.float64) - np.max(logits)) / temperature
    cut_k = heated if top_k is None else keep_top_k(heated, top_k)
    return cut_k if top_p is None else keep_top_p(cut_k, top_p)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Refuse settings that mean nothing, naming the one at fault."""
    wanted: dict[str, tuple[Any, int]] = {"max_new_tokens": (max_new_tokens, 1), "top_k": (top_k, 1), "seed": (seed, 0)}
    for name, (value, least) in wanted.items():
        if value is not None and not (isinstance(value, int | np.integer) and value >= least):
            raise InputError(f"{name} must be a whole number of at least {least}, not {value}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (greedy) or a number above 0, not {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")


def generate(
    prompt: Sequence[int] | Int[np.ndarray, " seq"],
    weights: Weights,
    config: Gemma2Config,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] | None = None,
) -> Iterator[int]:
    """Continue a prompt, yielding each new token as soon as it is known.

    Parameters
    ----------
    prompt : sequence of int
        Token ids, usually beginning with ``<bos>``.
    max_new_tokens : int
        Stop after this many.
    temperature : float
        0 takes the likeliest token each time (greedy); above 0 one is drawn from ``softmax(logits / temperature)``.
    top_k, top_p : int, float, optional
        Draw only from the k likeliest, and from the likeliest that together reach probability p. Unused when greedy.
    seed : int
        Of the draws: the same seed gives the same tokens.
    stop_ids : collection of int, optional
        Tokens that end the text; the one met is yielded last. Default: the configuration's ``eos_token_id``.

    Yields
    ------
    int
        The next token.

    Raises
    ------
    InputError
        For a prompt or a setting that cannot be used, at the call rather than at the first token.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> prompt = tiny.tokenizer.encode("Once upon a time")
    >>> new = list(generate(prompt, tiny.weights, tiny.config, max_new_tokens=5))
    >>> len(new)
    5
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if len(prompt) == 0:
        raise InputError("the prompt is empty: a model needs at least one token (<bos>, for instance)")
    stops = stop_tokens(config) if stop_ids is None else frozenset(stop_ids)
    ids = token_ids([list(prompt)], config.vocab_size)
    return _tokens(ids, weights, config, max_new_tokens, temperature, top_k, top_p, seed, stops)


def stop_tokens(config: Gemma2Config) -> frozenset[int]:
    """The ids that end a text, as a set.

    Examples
    --------
    >>> sorted(stop_tokens(Gemma2Config(eos_token_id=(1, 107))))
    [1, 107]
    """
    eos = config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _tokens(
    prompt: Int[np.ndarray, "one seq"],
    weights: Weights,
    config: Gemma2Config,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stops: frozenset[int],
) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    logits, cache = next_token_logits(prompt, weights, config)
    for step in range(max_new_tokens):
        scores = wide(logits[0, -1])
        if np.isnan(scores).any():
            raise InputError(
                "the logits are NaN: numbers became too large for this precision on the way; try float32, or float64"
            )
        if temperature == 0:
            token = int(np.argmax(scores))
        else:
            token = int(rng.choice(len(scores), p=probabilities(process(scores, temperature, top_k, top_p))))
        yield token
        if token in stops or step == max_new_tokens - 1:
            return
        logits, cache = next_token_logits([[token]], weights, config, cache)
