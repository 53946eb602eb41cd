"""Compute the gradients of a batch with little memory: a row at a time, and a layer at a time.

Checked bit for bit against `compute_gradients` of `refgemma.backward`, and against the accumulation of transformers
5.23.

Two ways save memory without changing the computed sum. `accumulate_gradients` adds the gradients of a batch row by row;
each loss is divided by the number of tokens in the *whole* batch. `recompute_gradients` keeps only the input of each
block, and computes the block a second time in the backward pass.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from refgemma.backward import (
    block_backward,
    causal_lm_loss_backward,
    compute_gradients,
    embed_backward,
    linear_backward,
    rms_norm_backward,
    soft_cap_backward,
)
from refgemma.config import Gemma2Config
from refgemma.fast import THREADS, helpers, own_threads
from refgemma.generation.perplexity import token_losses
from refgemma.heads import causal_lm_loss
from refgemma.inputs import check_token_ids, packed_masks
from refgemma.model import Start, begin, blocks, head, head_table, run_block
from refgemma.ops import rms_norm
from refgemma.precision import Array
from refgemma.shapes import Hidden, TokenIds
from refgemma.weights.parameters import EMBED_TOKENS, LM_HEAD, NORM, Weights, layer_tensors

Named: TypeAlias = Iterator[tuple[str, Array]]


# --- a layer at a time ------------------------------------------------------------------------------------------------


def recompute_gradients(
    input_ids: npt.ArrayLike, labels: npt.ArrayLike, weights: Weights, config: Gemma2Config, *,
    attention_mask: Any = None, position_ids: npt.ArrayLike | None = None, num_items: float | None = None,
) -> tuple[float, Named]:  # fmt: skip
    """Return the results of `refgemma.backward.compute_gradients`, with the record of only one block in memory.

    The forward pass keeps the input of each block. The backward pass computes each block again from its input, and
    drops the record when the gradients are known. This costs a second forward pass. Arguments and results equal those
    of `compute_gradients`, bit for bit. PyTorch calls this gradient checkpointing: Chen et al. 2016, arXiv:1604.06174.

    Returns
    -------
    loss : float
        The loss in nats per token.
    gradients : iterator of (str, array)
        Each gradient with its name, computed when the iterator reaches it: the head first, the embedding last. With
        weights on disk (``Checkpoint.streamed``), a caller that keeps none needs memory for one layer and the tables.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> ids = [[2, 300, 400]]
    >>> loss, gradients = recompute_gradients(ids, ids, tiny.weights, tiny.config)
    >>> plain_loss, plain = compute_gradients(ids, ids, tiny.weights, tiny.config)
    >>> loss == plain_loss, all((gradient == plain[name]).all() for name, gradient in gradients)
    (True, True)
    """
    ids = check_token_ids(input_ids, config.vocab_size)
    if attention_mask is None and position_ids is not None:
        attention_mask = packed_masks(position_ids, config)
    start = begin(ids, weights, config, attention_mask=attention_mask, position_ids=position_ids)
    stream = [start.embedded]
    for record in blocks(start, weights, config):
        stream.append(record.out)
        del record  # free the memory before the next block
    norm = rms_norm(stream[-1], weights.norm, config.rms_norm_eps)
    raw_logits, logits = head(norm, weights, config)
    loss = causal_lm_loss(logits, labels, num_items)
    grad_logits = causal_lm_loss_backward(logits, labels, num_items)
    grad_raw = soft_cap_backward(grad_logits, raw_logits, config.final_logit_softcapping)
    return loss, _go_back(grad_raw, norm, stream, ids, start, weights, config)


def _go_back(
    grad_raw: Array, norm: Hidden, stream: list[Hidden], ids: TokenIds, start: Start, weights: Weights,
    config: Gemma2Config,
) -> Named:  # fmt: skip
    """Yield the gradients from the head to the embedding; `stream`, the inputs of the blocks, is emptied."""
    grad_norm, grad_head, _ = linear_backward(grad_raw, norm, head_table(weights, config)[:])
    if weights.lm_head is not None:
        yield LM_HEAD, grad_head
    grad, of_norm = rms_norm_backward(grad_norm, stream.pop(), weights.norm, config.rms_norm_eps)
    yield NORM, of_norm
    for layer in reversed(range(config.num_hidden_layers)):
        hidden, shared = stream.pop(), {"cos": start.cos, "sin": start.sin}
        record = run_block(hidden, weights, config, layer=layer, inputs=start.inputs, past=start.past[layer], **shared)
        grad, _, of_layer = block_backward(
            grad, record, hidden, weights.layers[layer], **shared, scale=config.attention_scale,
            cap=config.attn_logit_softcapping, activation=config.activation, eps=config.rms_norm_eps,
        )  # fmt: skip
        del record, hidden
        for field, name in layer_tensors(layer, config.attention_bias).items():
            yield name, getattr(of_layer, field)
        del of_layer
    of_embedding = embed_backward(grad, ids, config.vocab_size, config.pad_token_id)
    yield EMBED_TOKENS, of_embedding if weights.lm_head is not None else of_embedding + grad_head


# --- a row at a time --------------------------------------------------------------------------------------------------


def count_targets(rows: Sequence[npt.NDArray[np.int64]]) -> int:
    """Return how many tokens of `rows` are predicted: all except the first token of each row.

    Examples
    --------
    >>> count_targets([np.array([2, 5, 6]), np.array([2, 7])])
    3
    """
    return sum(len(row) - 1 for row in rows)


def accumulate_gradients(
    rows: Sequence[npt.NDArray[np.int64]], weights: Weights, config: Gemma2Config, gradient_checkpointing: bool = False
) -> tuple[float, dict[str, Array]]:
    """Return the mean loss over all tokens of a batch, and its gradients.

    Each row is computed alone, so that rows of different lengths need no padding. The loss is divided by the number of
    tokens of the whole batch. A mean over the rows' means would give a token more weight in a short row than in a long
    row. Trainers had this bug until 2024 (transformers #34191).

    Rows are computed in several threads, but added in order. So the result does not depend, in any bit, on the number
    of threads or on how a batch is cut into micro-batches.

    Parameters
    ----------
    rows : sequence of int arrays
        Token ids, each row with at least two.
    weights, config
        The model's weights and configuration.
    gradient_checkpointing : bool
        If true, use `recompute_gradients`: same result bit for bit, less memory, a third more time.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> rows = [np.array([2, 300, 400, 500]), np.array([2, 600])]
    >>> loss, gradients = accumulate_gradients(rows, tiny.weights, tiny.config)
    >>> losses = [compute_gradients([row], [row], tiny.weights, tiny.config)[0] for row in rows]
    >>> bool(np.isclose(loss, (3 * losses[0] + 1 * losses[1]) / 4))
    True
    """
    num_items = count_targets(rows)

    def compute(row: npt.NDArray[np.int64]) -> tuple[float, dict[str, Array]]:
        ids = row[None]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller checks the loss
            if gradient_checkpointing:
                loss, named = recompute_gradients(ids, ids, weights, config, num_items=num_items)
                return loss, dict(named)
            return compute_gradients(ids, ids, weights, config, num_items=num_items)

    loss, total = 0.0, dict[str, Array]()
    with own_threads():
        for row_loss, gradients in map_in_order(compute, rows):
            loss += row_loss
            for name, gradient in gradients.items():
                total[name] = np.add(total[name], gradient, out=total[name]) if name in total else gradient
            del gradients
    return loss, total


def map_in_order(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield ``function(item)`` for each item, in order, computed in parallel by all threads.

    Examples
    --------
    >>> list(map_in_order(abs, [-3, 1, -2]))
    [3, 1, 2]
    """
    for first in range(0, len(items), THREADS):
        yield from helpers(os.getpid()).map(function, items[first : first + THREADS])


def mean_loss(rows: Sequence[npt.NDArray[np.int64]], weights: Weights, config: Gemma2Config) -> float:
    """Return the mean loss of all tokens of `rows` in nats, without gradients.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> rows = [np.array([2, 300, 400, 500]), np.array([2, 600])]
    >>> loss, _ = accumulate_gradients(rows, tiny.weights, tiny.config)
    >>> bool(np.isclose(mean_loss(rows, tiny.weights, tiny.config), loss))
    True
    """
    total = sum(float(token_losses(row.tolist(), weights, config).sum()) for row in rows)
    return total / count_targets(rows)
