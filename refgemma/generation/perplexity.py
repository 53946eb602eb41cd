"""Compute the perplexity of a text as transformers and gemma.cpp define it.

Checked against the program on transformers' page on perplexity, run with transformers 5.23, and against gemma.cpp's
formula, written out in a test.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from refgemma import fast
from refgemma.cache import Cache
from refgemma.config import Gemma2Config
from refgemma.inputs import InputError
from refgemma.model import begin, head_table
from refgemma.ops import linear, rms_norm, soft_cap
from refgemma.precision import wide
from refgemma.shapes import Hidden
from refgemma.weights.parameters import Weights, row_pieces

CHUNK_TOKENS = 512  # tokens computed at once; limits the memory for scores
GEMMA_CPP_TOKENS = 3072  # maximum number of tokens in gemma.cpp's sum
GEMMA_CPP_MOST = 64.0  # maximum of the nats per token in gemma.cpp


def label_losses(
    norm: Hidden, labels: Int[np.ndarray, "batch seq"], weights: Weights, config: Gemma2Config
) -> Float[np.ndarray, "batch seq"]:
    """Return ``-log p(label)`` of each label in nats, computed in float64 from the normed hidden states.

    This is ``log(sum(exp(logits))) - logits[label]``. The sum uses one piece of the head at a time: with a
    vocabulary of 256000 tokens, all logits of a long text would not fit into memory.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> run = refgemma.forward([[2, 300, 400]], tiny.weights, tiny.config)
    >>> losses = label_losses(run.norm[:, :-1], np.array([[300, 400]]), tiny.weights, tiny.config)
    >>> bool(np.isclose(losses.mean(), refgemma.heads.causal_lm_loss(run.logits, np.array([[2, 300, 400]]))))
    True
    """
    total = np.full(labels.shape, -np.inf)
    of_label, start = np.empty(labels.shape), 0
    for raw_logits in map(partial(linear, norm), row_pieces(head_table(weights, config))):
        logits = wide(soft_cap(raw_logits, config.final_logit_softcapping)).astype(np.float64)
        largest = logits.max(axis=-1)
        total = np.logaddexp(total, largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1)))
        here = (labels >= start) & (labels < start + logits.shape[-1])
        of_label[here] = logits[here, labels[here] - start]
        start += logits.shape[-1]
    losses: npt.NDArray[np.float64] = total - of_label
    return losses


def token_losses(
    ids: Sequence[int], weights: Weights, config: Gemma2Config, layers: fast.Outputs = fast.outputs
) -> Float[np.ndarray, " tokens_after_first"]:
    """Return ``-log p(token)`` in nats for every token of `ids` except the first, given all earlier tokens.

    Tokens are computed `CHUNK_TOKENS` at a time; each piece continues from the cache of the previous piece. `layers` is
    the function that runs the layers: `refgemma.fast.outputs` or `refgemma.model.reference_outputs`.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> token_losses([2, 300, 400], tiny.weights, tiny.config).shape
    (2,)
    """
    row = np.array([ids], np.int64)
    losses: list[npt.NDArray[np.float64]] = []
    cache = None
    for first in range(0, row.shape[1] - 1, CHUNK_TOKENS):
        tokens = row[:, first : min(first + CHUNK_TOKENS, row.shape[1] - 1)]
        start, present = begin(tokens, weights, config, cache=cache), []
        hidden = start.embedded
        for out, past in layers(start, weights, config):
            hidden = out
            present.append(past)
        cache = Cache(present)
        norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
        labels = row[:, first + 1 : first + 1 + tokens.shape[1]]
        losses.append(label_losses(norm, labels, weights, config)[0])
    return np.concatenate(losses) if losses else np.zeros(0)


@dataclass(frozen=True)
class Window:
    """A part of a text that is read at once: tokens `start` to `stop`. Only the last `targets` tokens are scored."""

    start: int
    stop: int
    targets: int


def split_windows(tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """Yield windows of `max_length` tokens every `stride` tokens; each window scores the tokens not scored before.

    Source: transformers' page "Perplexity of fixed-length models".

    Examples
    --------
    >>> [(w.start, w.stop, w.targets) for w in split_windows(10, max_length=6, stride=2)]
    [(0, 6, 6), (2, 8, 2), (4, 10, 2)]
    """
    judged = 0
    for start in range(0, tokens, stride):
        stop = min(start + max_length, tokens)
        yield Window(start, stop, stop - judged)
        judged = stop
        if stop == tokens:
            return


@dataclass(frozen=True)
class StridedPerplexity:
    """A perplexity as transformers defines it."""

    perplexity: float
    nats_per_token: float
    tokens: int  # number of tokens in the mean
    windows: int


def strided_perplexity(
    ids: Sequence[int], weights: Weights, config: Gemma2Config, max_length: int, stride: int,
    layers: fast.Outputs = fast.outputs, report: Callable[[int], object] | None = None,
) -> StridedPerplexity:  # fmt: skip
    """Return ``exp`` of a text's mean loss, computed in windows as on transformers' documentation page.

    Each window begins at position 0 and gives the mean loss of its targets. The page weights this mean by the number of
    targets minus one, and so does this function. That is exact only for the first window, whose first token has no
    loss. If windows overlap, the difference is small.

    Parameters
    ----------
    ids : sequence of int
        The whole text. Only the text begins with ``<bos>``; later windows begin in the middle of the text, although
        Gemma was not trained for this.
    weights, config
        The model's weights and configuration.
    max_length : int
        Number of tokens of a window, at least 2.
    stride : int
        Number of tokens from the start of one window to the next, 1 to `max_length`.
    layers : callable
        Function that runs the layers; see `token_losses`.
    report : callable, optional
        Function called for each window, with the number of tokens to score.

    Raises
    ------
    InputError
        If the text has fewer than two tokens, or a number is out of range.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> ids = tiny.tokenizer.encode("Once upon a time there was a king.")
    >>> found = strided_perplexity(ids, tiny.weights, tiny.config, max_length=128, stride=64)
    >>> found.windows, found.perplexity < 100
    (1, True)
    """
    if not 1 <= stride <= max_length or max_length < 2:
        raise InputError(
            f"max_length is {max_length} and stride is {stride}; max_length must be at least 2, and stride from 1 to "
            "max_length"
        )
    if len(ids) < 2:
        raise InputError("the text has only one token; give a longer text")
    total, weight, number = 0.0, 0, 0
    for window in split_windows(len(ids), max_length, stride):
        if report is not None:
            report(window.targets)
        if window.targets < 2:
            continue  # the weight is 0; on the page the loss may be NaN, a mean of nothing
        losses = token_losses(ids[window.start : window.stop], weights, config, layers)[-window.targets :]
        total += float(losses.mean()) * (window.targets - 1)
        weight += window.targets - 1
        number += 1
    return StridedPerplexity(math.exp(total / weight), total / weight, weight, number)


def gemma_cpp_bits_per_byte(
    ids: Sequence[int], text_bytes: int, weights: Weights, config: Gemma2Config, layers: fast.Outputs = fast.outputs
) -> float:
    """Return gemma.cpp's cross entropy: ``(log2(vocab) + sum(min(-ln p, 64)) / ln 2) / bytes of the text``.

    The first term is for the first token, ``<bos>``, as if all tokens were equally likely. The sum covers only the
    first 3072 tokens, but is divided by the bytes of the whole text. gemma.cpp prints the result as "per-token
    entropy".

    Source: gemma.cpp ``evals/cross_entropy.cc`` and ``evals/benchmark_helper.cc``.

    Parameters
    ----------
    ids : sequence of int
        ``<bos>`` and the tokens of the text, without chat markers.
    text_bytes : int
        Length of the text in UTF-8.
    weights, config
        The model's weights and configuration.
    layers : callable
        Function that runs the layers; see `token_losses`.

    Raises
    ------
    InputError
        If the text is empty.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> text = "Once upon a time there was a king."
    >>> 1 < gemma_cpp_bits_per_byte(tiny.tokenizer.encode(text), len(text.encode()), tiny.weights, tiny.config) < 3
    True
    """
    if text_bytes < 1:
        raise InputError("the text is empty; give a text")
    losses = token_losses(ids[:GEMMA_CPP_TOKENS], weights, config, layers)
    nats = math.log(config.vocab_size) + float(np.minimum(losses, GEMMA_CPP_MOST).sum())
    return nats / math.log(2) / text_bytes
