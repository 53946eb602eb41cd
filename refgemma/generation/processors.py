"""The effect of the settings of a generation on the scores of the next token. Checked against the logits processors of
transformers 5.23, which act in the order of this file.

`scores` are float32, as there, also in a float64 model: a setting then means the same in every precision.
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int

from refgemma.generation.generation_config import Settings
from refgemma.precision import Array
from refgemma.shapes import TokenIds

NextScores = Float[np.ndarray, "batch vocab"]

# --- processors: for every way of decoding ----------------------------------------------------------------------------


def penalise_repetition(
    scores: NextScores, ids: TokenIds, penalty: float, skipped: Int[np.ndarray, " batch"]
) -> NextScores:
    """Divide the score of every token that is there already by `penalty`, or multiply it where it is negative.

    The first `skipped` tokens of each row do not count: they are padding. Source: transformers
    ``RepetitionPenaltyLogitsProcessor``.

    Examples
    --------
    >>> penalise_repetition(np.array([[2.0, -2.0, 4.0]]), np.array([[2, 0, 1]]), 2.0, skipped=np.array([1]))
    array([[ 1., -4.,  4.]])
    """
    batch, vocab = scores.shape
    counted = np.arange(ids.shape[1]) >= skipped[:, None]
    there = np.zeros((batch, vocab + 1), bool)
    np.put_along_axis(there, np.where(counted, ids, vocab), True, axis=1)  # the last column takes what does not count
    penalised = np.where(scores < 0, scores * penalty, scores / penalty)
    return np.where(there[:, :vocab], penalised, scores)


def ban_repeated_ngrams(scores: NextScores, ids: TokenIds, size: int) -> NextScores:
    """Minus infinity for every token that would make the last `size` tokens a sequence that is there already.

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
    """Minus infinity for `tokens`: the ends of text, before the least length is reached.

    Source: transformers ``MinLengthLogitsProcessor``.

    Examples
    --------
    >>> forbid(np.zeros((1, 3)), [1])
    array([[  0., -inf,   0.]])
    """
    listed = np.isin(np.arange(scores.shape[1]), list(tokens))
    return np.where(listed, scores.dtype.type(-np.inf), scores)


def constrain(scores: NextScores, ids: TokenIds, skipped: Int[np.ndarray, " batch"], settings: Settings) -> NextScores:
    """The scores after what holds for every way of decoding in `settings`: penalty, n-grams, least length."""
    penalty, size = settings.repetition_penalty, settings.no_repeat_ngram_size
    penalised = scores if penalty == 1 else penalise_repetition(scores, ids, penalty, skipped)
    unrepeated = ban_repeated_ngrams(penalised, ids, size) if size else penalised
    return forbid(unrepeated, settings.eos_token_ids) if ids.shape[1] < settings.min_length else unrepeated


# --- processors: for sampling only ------------------------------------------------------------------------------------


def to_probabilities(scores: Float[np.ndarray, "*batch vocab"]) -> Float[np.ndarray, "*batch vocab"]:
    """Probabilities in the precision of `scores`: ``exp(z) / sum(exp(z))``, computed from ``z - max(z)``.

    Examples
    --------
    >>> to_probabilities(np.log([1.0, 3.0]))
    array([0.25, 0.75])
    """
    exponentials = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def divide(scores: NextScores, temperature: float) -> NextScores:
    """The scores divided by the temperature; where that overflows, with the highest score shifted to 0 before.

    A shift changes no probability, so that no temperature is too low; transformers fails there. Source: transformers
    ``TemperatureLogitsWarper``.

    Examples
    --------
    >>> divide(np.array([[1.0, 2.0]], np.float32), 0.5), divide(np.array([[1.0, 2.0]], np.float32), 1e-300)
    (array([[2., 4.]], dtype=float32), array([[-inf,   0.]], dtype=float32))
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # looked for in the next line
        heated: NextScores = scores / temperature
        if not (np.isnan(heated) | (heated == np.inf)).any():
            return heated
        shifted = (scores - scores.max(axis=-1, keepdims=True)).astype(np.float64)
        heated = (shifted / temperature).astype(scores.dtype)
    return heated


def keep_top_k(
    scores: Float[np.ndarray, "*batch vocab"], top_k: int, min_kept: int = 1
) -> Float[np.ndarray, "*batch vocab"]:
    """Minus infinity for all but the `top_k` highest scores, and those that are as high as the last of them.

    At least `min_kept` are kept.

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
    """Minus infinity for all but the most likely tokens that together reach probability `top_p`; at least `min_kept`.

    The sum runs upwards from the least likely, in float64, and is rounded to the precision of the scores, as in torch.
    The exponentials may differ from torch's in the last bit: where the sum meets ``1 - top_p`` to within a few
    roundings, one token more or less may be kept. Source: transformers ``TopPLogitsWarper``.

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
    """Minus infinity for all tokens less than `min_p` times as likely as the most likely; `min_kept` stay in any case.

    Source: transformers ``MinPLogitsWarper``. As in `keep_top_p`, a token within a few roundings of the threshold may
    be judged differently there.

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


def warp(scores: NextScores, settings: Settings) -> NextScores:
    """The scores that are drawn from: divided by the temperature, then cut to the top k, the top p, the min p.

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
    return keep_min_p(cut_p, settings.min_p, least) if settings.min_p else cut_p
