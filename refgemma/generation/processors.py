"""Apply generation settings to the scores of the next token.

Checked against the logits processors of transformers 5.23, which run in the order of this file.

`scores` are float32 even for a float64 model, as in transformers, so that a setting has the same effect in every
precision.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from refgemma.generation.generation_config import Settings
from refgemma.heads import log_softmax
from refgemma.inputs import InputError
from refgemma.precision import Array
from refgemma.shapes import TokenIds

NextScores = Float[np.ndarray, "batch vocab"]
Processor: TypeAlias = Callable[[TokenIds, NextScores], Any]

# --- a caller's own ---------------------------------------------------------------------------------------------------


class LogitsProcessor:
    """The base class of a caller's processors; a subclass defines ``__call__``. A plain function also works.

    Examples
    --------
    >>> class Never(LogitsProcessor):
    ...     def __call__(self, input_ids, scores):
    ...         return np.where(np.arange(scores.shape[1]) == 1, -np.inf, scores)
    >>> LogitsProcessorList([Never()])(np.array([[2]]), np.zeros((1, 3)))
    array([[  0., -inf,   0.]])
    """

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return changed scores ``(rows, vocab)`` for the tokens after `input_ids` ``(rows, length)``."""
        raise NotImplementedError(f"{type(self).__name__} needs a method __call__(self, input_ids, scores)")


class LogitsProcessorList(list[Any]):
    """A list of processors, called like one processor; it applies all in order."""

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """Return the scores after all processors; a processor with more parameters also gets `others`."""
        for processor in self:
            takes_more = len(inspect.signature(processor).parameters) > 2
            scores = processor(input_ids, scores, **others) if takes_more else processor(input_ids, scores)
        return scores


# --- processors: for every way of decoding ----------------------------------------------------------------------------


def add_biases(scores: NextScores, ids: TokenIds, biases: Sequence[Any]) -> NextScores:
    """Add each sequence's bias to the score of its last token, in rows of `ids` that end with its other tokens.

    Source: transformers ``SequenceBiasLogitsProcessor``, and with minus infinity ``NoBadWordsLogitsProcessor``.

    Examples
    --------
    >>> add_biases(np.zeros((2, 4)), np.array([[1, 2], [1, 1]]), [([2, 3], -1.0), ([0], 5.0)])
    array([[ 5.,  0.,  0., -1.],
           [ 5.,  0.,  0.,  0.]])
    """
    total = np.zeros_like(scores)
    for (*before, last), bias in biases:
        if len(before) <= ids.shape[1]:
            follows = (ids[:, ids.shape[1] - len(before) :] == np.array(before, np.int64)).all(axis=1)
            total[follows, last] += bias
    biased: Array = scores + total
    return biased


def penalise_repetition(
    scores: NextScores, ids: TokenIds, penalty: float, skipped: Int[np.ndarray, " batch"]
) -> NextScores:
    """Divide the score of every token in the text so far by `penalty`; multiply if the score is negative.

    The first `skipped` tokens of each row are padding and are ignored. Source: transformers
    ``RepetitionPenaltyLogitsProcessor``.

    Examples
    --------
    >>> penalise_repetition(np.array([[2.0, -2.0, 4.0]]), np.array([[2, 0, 1]]), 2.0, skipped=np.array([1]))
    array([[ 1., -4.,  4.]])
    """
    batch, vocab = scores.shape
    counted = np.arange(ids.shape[1]) >= skipped[:, None]
    there = np.zeros((batch, vocab + 1), bool)
    np.put_along_axis(there, np.where(counted, ids, vocab), True, axis=1)  # the last column collects skipped tokens
    penalised = np.where(scores < 0, scores * penalty, scores / penalty)
    return np.where(there[:, :vocab], penalised, scores)


def ban_repeated_ngrams(scores: NextScores, ids: TokenIds, size: int) -> NextScores:
    """Set the score of each token that would repeat a sequence of `size` tokens to minus infinity.

    Padding counts as a token. Source: transformers ``NoRepeatNGramLogitsProcessor``.

    Examples
    --------
    >>> ban_repeated_ngrams(np.zeros((1, 4)), np.array([[1, 2, 3, 1]]), 2)  # after 1 there was 2
    array([[  0.,   0., -inf,   0.]])
    """
    batch, length = ids.shape
    if length < size:
        return scores
    windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=1)
    suffix = ids[:, length + 1 - size :]
    same = (windows[:, :, :-1] == suffix[:, None]).all(axis=-1)
    vocab = scores.shape[1]
    banned = np.zeros((batch, vocab + 1), bool)
    np.put_along_axis(banned, np.where(same, windows[:, :, -1], vocab), True, axis=1)
    return np.where(banned[:, :vocab], scores.dtype.type(-np.inf), scores)


def forbid(scores: NextScores, tokens: Collection[int]) -> NextScores:
    """Set the scores of `tokens` to minus infinity, for example of end tokens below the minimum length.

    Source: transformers ``MinLengthLogitsProcessor``.

    Examples
    --------
    >>> forbid(np.zeros((1, 3)), [1])
    array([[  0., -inf,   0.]])
    """
    listed = np.isin(np.arange(scores.shape[1]), list(tokens))
    return np.where(listed, scores.dtype.type(-np.inf), scores)


def force(scores: NextScores, tokens: Collection[int]) -> NextScores:
    """Set the scores of `tokens` to 0 and all others to minus infinity.

    Source: transformers ``ForcedBOSTokenLogitsProcessor`` and ``ForcedEOSTokenLogitsProcessor``.

    Examples
    --------
    >>> force(np.ones((1, 3)), [1])
    array([[-inf,   0., -inf]])
    """
    listed = np.isin(np.arange(scores.shape[1]), list(tokens))
    return np.broadcast_to(np.where(listed, scores.dtype.type(0), scores.dtype.type(-np.inf)), scores.shape)


def keep_allowed(scores: NextScores, ids: TokenIds, allowed: Callable[[int, Any], Any], num_beams: int) -> NextScores:
    """Set scores to minus infinity except for the tokens that ``allowed(text, ids of a row)`` lists.

    Each text has `num_beams` rows. If no finite score is left, the listed tokens become equally likely. Source:
    transformers ``PrefixConstrainedLogitsProcessor``.

    Raises
    ------
    InputError
        If `allowed` lists no token.

    Examples
    --------
    >>> keep_allowed(np.array([[1.0, 2.0, 3.0]]), np.array([[5]]), lambda text, row: [0, 1], 1)
    array([[  1.,   2., -inf]])
    """
    listed = np.full_like(scores, -np.inf)
    for row, tokens in enumerate(ids):
        found = np.asarray(allowed(row // num_beams, tokens))
        if found.size == 0:
            raise InputError(
                f"prefix_allowed_tokens_fn lists no token for text {row // num_beams}; it must list at least one"
            )
        listed[row, found] = 0
    kept = scores + listed
    nothing = np.isneginf(kept.max(axis=1)).reshape(-1, num_beams).all(axis=1)
    return np.where(np.repeat(nothing, num_beams)[:, None], listed, kept)


def favour_ends(scores: NextScores, length: int, start: int, factor: float, ends: Collection[int]) -> NextScores:
    """Increase the scores of end tokens by powers of `factor`, for texts longer than `start`.

    Source: transformers ``ExponentialDecayLengthPenalty``.

    Examples
    --------
    >>> favour_ends(np.array([[-1.0, 2.0]]), length=7, start=5, factor=2.0, ends=[0])  # -1 + 1 * (2**2 - 1)
    array([[2., 2.]])
    """
    if length <= start:
        return scores
    with np.errstate(over="ignore"):
        growth = float(np.float64(factor) ** (length - start)) - 1
    listed = np.isin(np.arange(scores.shape[1]), list(ends)) & np.isfinite(scores)
    # Limit the scores, so that none becomes infinite.
    return scores + np.abs(np.where(listed, scores, 0)) * min(growth, 1e30)


def list_constraints(
    settings: Settings, skipped: Int[np.ndarray, " batch"], allowed: Callable[[int, Any], Any] | None
) -> Iterator[Processor]:
    """Yield the processors for every decoding method, in the order of transformers ``_get_logits_processor``."""
    said, ends, begin = settings, settings.eos_token_ids, settings.prompt_length
    words = [word for word in said.bad_words_ids or () if len(word) > 1 or word[0] not in ends]
    if said.sequence_bias is not None:
        yield lambda ids, scores: add_biases(scores, ids, said.sequence_bias or ())
    if said.repetition_penalty != 1:
        yield lambda ids, scores: penalise_repetition(scores, ids, said.repetition_penalty, skipped)
    if said.no_repeat_ngram_size:
        yield lambda ids, scores: ban_repeated_ngrams(scores, ids, said.no_repeat_ngram_size)
    if words:
        yield lambda ids, scores: add_biases(scores, ids, [(word, -np.inf) for word in words])
    yield lambda ids, scores: forbid(scores, ends) if ids.shape[1] < said.min_length else scores
    if allowed is not None:
        yield lambda ids, scores: keep_allowed(scores, ids, allowed, said.num_beams)
    if (first := said.forced_bos_token_id) is not None:
        yield lambda ids, scores: force(scores, [first]) if ids.shape[1] == 1 else scores
    if (last := said.forced_eos_token_id) is not None:
        forced = last if isinstance(last, list) else [last]
        yield lambda ids, scores: force(scores, forced) if ids.shape[1] == said.max_length - 1 else scores
    if decay := said.exponential_decay_length_penalty:
        yield lambda ids, scores: favour_ends(scores, ids.shape[1], begin + decay[0], decay[1], ends)
    if never := said.suppress_tokens:
        yield lambda ids, scores: forbid(scores, never)
    if not_first := said.begin_suppress_tokens:
        place = begin if begin > 1 or first is None else begin + 1
        yield lambda ids, scores: forbid(scores, not_first) if ids.shape[1] == place else scores


def constrain(
    scores: NextScores, ids: TokenIds, skipped: Int[np.ndarray, " batch"], settings: Settings,
    allowed: Callable[[int, Any], Any] | None = None,
) -> NextScores:  # fmt: skip
    """Return the scores after all processors of `list_constraints`; `allowed` is ``prefix_allowed_tokens_fn``."""
    for process in list_constraints(settings, skipped, allowed):
        scores = process(ids, scores)
    return scores


# --- processors: for sampling only ------------------------------------------------------------------------------------


def to_probabilities(scores: Float[np.ndarray, "*batch vocab"]) -> Float[np.ndarray, "*batch vocab"]:
    """Return probabilities in the precision of `scores`: ``exp(z) / sum(exp(z))``, computed from ``z - max(z)``.

    Examples
    --------
    >>> to_probabilities(np.log([1.0, 3.0]))
    array([0.25, 0.75])
    """
    exponentials = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def divide(scores: NextScores, temperature: float) -> NextScores:
    """Divide the scores by the temperature; if this overflows, first shift the highest score to 0.

    A shift changes no probability, so any temperature works; transformers fails for very low temperatures. Source:
    transformers ``TemperatureLogitsWarper``.

    Examples
    --------
    >>> divide(np.array([[1.0, 2.0]], np.float32), 0.5), divide(np.array([[1.0, 2.0]], np.float32), 1e-300)
    (array([[2., 4.]], dtype=float32), array([[-inf,   0.]], dtype=float32))
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # overflow is handled below
        heated: NextScores = scores / temperature
        if not (np.isnan(heated) | (heated == np.inf)).any():
            return heated
        shifted = (scores - scores.max(axis=-1, keepdims=True)).astype(np.float64)
        heated = (shifted / temperature).astype(scores.dtype)
    return heated


def keep_top_k(
    scores: Float[np.ndarray, "*batch vocab"], top_k: int, min_kept: int = 1
) -> Float[np.ndarray, "*batch vocab"]:
    """Set all scores except the `top_k` highest to minus infinity; also keep scores equal to the lowest of these.

    At least `min_kept` scores are kept.

    Source: transformers ``TopKLogitsWarper``.

    Examples
    --------
    >>> keep_top_k(np.array([1.0, 3.0, 2.0]), 2)
    array([-inf,   3.,   2.])
    """
    count = min(max(top_k, min_kept), scores.shape[-1])
    threshold = np.partition(scores, -count, axis=-1)[..., -count, None]
    return np.where(scores < threshold, scores.dtype.type(-np.inf), scores)


def keep_top_p(
    scores: Float[np.ndarray, "*batch vocab"], top_p: float, min_kept: int = 1
) -> Float[np.ndarray, "*batch vocab"]:
    """Keep only the most likely tokens that together reach probability `top_p`, but at least `min_kept` tokens.

    All other scores become minus infinity. The sum starts at the least likely token, in float64, and is rounded to the
    precision of the scores, as in torch. The exponentials may differ from torch's in the last bit. So the number of
    kept tokens may differ by one if the sum is within a few roundings of ``1 - top_p``. Source: transformers
    ``TopPLogitsWarper``.

    Examples
    --------
    >>> keep_top_p(np.log([0.5, 0.3, 0.2]), 0.7).round(2)
    array([-0.69, -1.2 ,  -inf])
    """
    ascending = np.argsort(scores, axis=-1, kind="stable")
    shares = to_probabilities(np.take_along_axis(scores, ascending, axis=-1))
    reached = np.cumsum(shares, axis=-1, dtype=np.float64).astype(scores.dtype)
    ranks = np.arange(scores.shape[-1])
    dropped_in_order = (reached <= 1 - top_p) & (ranks < len(ranks) - min_kept)
    dropped = np.zeros(scores.shape, bool)
    np.put_along_axis(dropped, ascending, dropped_in_order, axis=-1)
    return np.where(dropped, scores.dtype.type(-np.inf), scores)


def keep_min_p(
    scores: Float[np.ndarray, "*batch vocab"], min_p: float, min_kept: int = 1
) -> Float[np.ndarray, "*batch vocab"]:
    """Keep only tokens at least `min_p` times as likely as the most likely, but at least `min_kept` tokens.

    All other scores become minus infinity. Source: transformers ``MinPLogitsWarper``. As in `keep_top_p`, the result
    for a token within a few roundings of the threshold may differ from transformers.

    Examples
    --------
    >>> keep_min_p(np.log([0.5, 0.3, 0.2]), 0.5).round(2)
    array([-0.69, -1.2 ,  -inf])
    """
    shares = to_probabilities(scores)
    count = min(min_kept, scores.shape[-1])
    kept = shares >= min_p * shares.max(axis=-1, keepdims=True)
    np.put_along_axis(kept, np.argsort(-shares, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return np.where(kept, scores, scores.dtype.type(-np.inf))


def keep_typical(
    scores: Float[np.ndarray, "*batch vocab"], mass: float, min_kept: int = 1
) -> Float[np.ndarray, "*batch vocab"]:
    """Keep only the most typical tokens that together reach probability `mass`, but at least `min_kept` tokens.

    All other scores become minus infinity. A token is more typical if its ``-log p`` is closer to the mean, which is
    the entropy. Source: transformers ``TypicalLogitsWarper``. As in `keep_top_p`, the result may differ from
    transformers if a sum is within a few roundings of `mass`.

    Examples
    --------
    >>> keep_typical(np.log([0.6, 0.3, 0.1]), 0.2).round(2)  # the entropy is 0.90
    array([-inf, -1.2, -inf])
    """
    information = -log_softmax(scores)
    with np.errstate(invalid="ignore"):  # 0 * inf is NaN, but must count as 0
        entropy = np.nansum(information * np.exp(-information), axis=-1, keepdims=True)
    distance = np.abs(information - entropy)
    nearest = np.argsort(distance, axis=-1, kind="stable")
    shares = to_probabilities(np.take_along_axis(scores, nearest, axis=-1))
    reached = np.cumsum(shares, axis=-1, dtype=np.float64).astype(scores.dtype)
    last = np.minimum((reached < mass).sum(axis=-1, keepdims=True), scores.shape[-1] - 1)
    in_order = np.take_along_axis(distance, nearest, axis=-1)
    kept_in_order = (in_order <= np.take_along_axis(in_order, last, axis=-1)) | (np.arange(scores.shape[-1]) < min_kept)
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, nearest, kept_in_order, axis=-1)
    return np.where(kept, scores, scores.dtype.type(-np.inf))


def warp(scores: NextScores, settings: Settings) -> NextScores:
    """Prepare scores for sampling: divide by the temperature, then apply top k, top p, min p and typical p.

    Examples
    --------
    >>> from refgemma.generation.generation_config import GenerationConfig, resolve_settings, merge_settings
    >>> call = merge_settings(None, GenerationConfig(), {"do_sample": True, "temperature": 2.0, "top_k": 2})
    >>> warp(np.array([[4.0, 2.0, 0.0]]), resolve_settings(call, prompt_length=1, vocab_size=3, limit=9))
    array([[  2.,   1., -inf]])
    """
    least = settings.min_kept
    heated = divide(scores, settings.temperature)
    cut_k = keep_top_k(heated, settings.top_k, least) if settings.top_k else heated
    cut_p = keep_top_p(cut_k, settings.top_p, least) if settings.top_p < 1 else cut_k
    cut_min = keep_min_p(cut_p, settings.min_p, least) if settings.min_p else cut_p
    return keep_typical(cut_min, settings.typical_p, least) if settings.typical_p < 1 else cut_min
