"""The whole model: tokens, embedding, blocks, final norm, tied head, final cap. Checked against transformers 5.23
`Gemma2ForCausalLM` (eager) on recorded tensors: whole sequences, padded batches, cached decoding, chunked prefill.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma.cache import Cache, LayerCache, keep_last, past_of
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.inputs import InputError, Inputs, check_inputs
from refgemma.layers import Block, block
from refgemma.ops import causal_mask, linear, rms_norm, rotary_tables, sliding_mask, soft_cap
from refgemma.precision import Array, narrow
from refgemma.shapes import Hidden, Logits, Mask, RotaryTable, TokenIds
from refgemma.weights.parameters import Rows, Weights

HEAD_ROWS = 16384  # rows of the embedding table in use at a time: bounds the memory of a 256000-word head


@dataclass(frozen=True)
class Forward:
    """What `forward` computed, in order; `trace` in `refgemma.oracle` gives it as named tensors."""

    cos: RotaryTable
    sin: RotaryTable
    embedded: Hidden
    layers: tuple[Block, ...]
    norm: Hidden
    raw_logits: Logits  # before the cap
    logits: Logits
    cache: Cache  # not traced: what the next call continues from


@dataclass(frozen=True)
class Start:
    """What the blocks of a call begin with."""

    inputs: Inputs
    past: Cache
    cos: RotaryTable
    sin: RotaryTable
    embedded: Hidden


def embed(input_ids: TokenIds, embed_tokens: Rows) -> Hidden:
    """Look the tokens up and scale: ``embed_tokens[id] * sqrt(hidden)``.

    The factor is rounded to the precision of the weights first. In bfloat16 the 9B multiplies by 59.75, not 59.8665.
    Source: transformers ``Gemma2TextScaledWordEmbedding``.

    Examples
    --------
    >>> embed(np.array([[1, 0]]), np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]))
    array([[[0., 6., 0., 0.],
            [2., 0., 0., 0.]]])
    """
    rows: Array = embed_tokens[input_ids]
    return rows * narrow(math.sqrt(rows.shape[-1]), like=rows)


def unembed(norm: Hidden, embed_tokens: Rows) -> Logits:
    """The logits: ``norm @ embed_tokens.T``, `HEAD_ROWS` rows of the table at a time.

    The head is tied: the table that embeds the tokens also scores them. One rounding in half precision.
    Source: transformers ``Gemma2ForCausalLM``; Press and Wolf 2016, arXiv:1608.05859.

    Examples
    --------
    >>> unembed(np.array([[[1.0, 2.0]]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    array([[[1., 2., 3.]]])
    """
    starts = range(0, embed_tokens.shape[0], HEAD_ROWS)
    return np.concatenate([linear(norm, embed_tokens[start : start + HEAD_ROWS]) for start in starts], axis=-1)


def layer_mask(layer: int, past: LayerCache, inputs: Inputs, config: Gemma2Config) -> Mask:
    """What the queries may see in `layer`: causal, within its window, and no padding; or what the caller says."""
    if inputs.masks is not None:
        return inputs.masks[SLIDING if config.is_sliding(layer) else FULL][..., past.start :]
    k_places = np.arange(past.start, inputs.places[-1] + 1)
    if config.is_sliding(layer):
        allowed = sliding_mask(inputs.places, k_places, config.sliding_window)
    else:
        allowed = causal_mask(inputs.places, k_places)
    mask: Mask = allowed & inputs.visible[:, None, None, past.start :]
    return mask


def next_past(layer: int, record: Block, config: Gemma2Config) -> LayerCache:
    """What `layer` has to remember: everything, or in a sliding layer what the next query can still see."""
    present = record.attention.present
    return keep_last(present, config.sliding_window - 1) if config.is_sliding(layer) else present


def begin(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, attention_mask: Any = None,
    position_ids: npt.ArrayLike | None = None, cache: Cache | None = None, inputs_embeds: npt.ArrayLike | None = None,
) -> Start:  # fmt: skip
    """Check the inputs of a call (as of `forward`), embed its tokens, and take their rotary tables."""
    inputs = check_inputs(input_ids, config, attention_mask, position_ids, cache[0].stop if cache else 0, inputs_embeds)
    past = past_of(cache, config, batch=len(inputs.tokens), like=weights.norm)
    given = inputs.tokens.ndim == 3  # embeddings of the caller's own: they are not scaled
    embedded = narrow(inputs.tokens, like=weights.norm) if given else embed(inputs.tokens, weights.embed_tokens)
    cos, sin = rotary_tables(inputs.positions, config.head_dim, config.rope_theta, like=embedded)
    return Start(inputs, past, cos, sin, embedded)


def blocks(start: Start, weights: Weights, config: Gemma2Config) -> Iterator[Block]:
    """Run the layers one after the other, yielding the record of each `block`; nothing is kept here.

    A caller that keeps nothing either can run a model of any depth in the memory of one layer.
    """
    hidden = start.embedded
    for layer, past in enumerate(start.past):
        mask = layer_mask(layer, past, start.inputs, config)
        record = block(
            hidden, past, start.cos, start.sin, mask, weights.layers[layer],
            config.attention_scale, config.attn_logit_softcapping, config.activation, config.rms_norm_eps,
        )  # fmt: skip
        yield record
        hidden = record.out


def head(norm: Hidden, weights: Weights, config: Gemma2Config) -> tuple[Logits, Logits]:
    """The logits of the normed residual stream, before and after the final cap: ``z = norm @ head.T`` and `soft_cap`
    of it. Rounded as these two are. Source: transformers ``Gemma2ForCausalLM``.

    Raises
    ------
    InputError
        If the head is untied and missing.
    """
    if weights.lm_head is None and not config.tie_word_embeddings:
        raise InputError("these weights have no head: lm_head.weight is missing, and tie_word_embeddings is false")
    raw_logits = unembed(norm, weights.head)
    return raw_logits, soft_cap(raw_logits, config.final_logit_softcapping)


def forward(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, attention_mask: Any = None,
    position_ids: npt.ArrayLike | None = None, cache: Cache | None = None, inputs_embeds: npt.ArrayLike | None = None,
) -> Forward:  # fmt: skip
    """Compute every named tensor for a batch of token sequences: ``logits = head(norm(block(...block(embed(ids)))))``.

    Parameters
    ----------
    input_ids : int array (batch, seq)
        Token ids.
    weights : Weights
        Their precision is the precision of the computation.
    config : Gemma2Config
        The model's numbers.
    attention_mask : array, optional
        0 and 1, of shape ``(batch, tokens so far)``: 0 marks padding, on either side. Default: no padding. Or a mask of
        one's own in place of the causal and sliding ones, see `refgemma.inputs.ready_masks`.
    position_ids : int array (batch, seq), optional
        Positions for the rotary angles; by default each token's place in its row, padding counted, as in transformers.
    cache : Cache, optional
        ``Forward.cache`` of an earlier call, which this one continues. It is not changed.
    inputs_embeds : array (batch, seq, hidden), optional
        In place of `input_ids`: what the blocks begin with. Not scaled by ``sqrt(hidden)``, as in transformers 5.x; in
        4.x they were.

    Returns
    -------
    Forward
        All tensors, in order; ``.logits`` has shape ``(batch, seq, vocab)``. Rows of padding tokens are computed and
        mean nothing.

    Raises
    ------
    InputError
        For ids, masks, positions or a cache that do not fit, naming the place.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> run = forward([[2, 300, 400]], tiny.weights, tiny.config)
    >>> run.logits.shape
    (1, 3, 2048)
    >>> run.layers[3].attention.probs[0, 0].sum(axis=-1).round(3)
    array([1., 1., 1.], dtype=float32)
    """
    start = begin(input_ids, weights, config, attention_mask, position_ids, cache, inputs_embeds)
    layers = tuple(blocks(start, weights, config))
    norm = rms_norm(layers[-1].out, weights.norm, config.rms_norm_eps)
    raw_logits, logits = head(norm, weights, config)
    present = Cache(next_past(layer, record, config) for layer, record in enumerate(layers))
    return Forward(start.cos, start.sin, start.embedded, layers, norm, raw_logits, logits, present)


def next_token_logits(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, cache: Cache | None = None,
    attention_mask: Any = None, position_ids: npt.ArrayLike | None = None, inputs_embeds: npt.ArrayLike | None = None,
) -> tuple[Logits, Cache]:  # fmt: skip
    """The logits ``(batch, 1, vocab)`` after the last token, and the cache to go on from.

    `forward` for decoding, with its arguments, one block in memory.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> logits, cache = next_token_logits([[2, 300]], tiny.weights, tiny.config)
    >>> logits, cache = next_token_logits([[400]], tiny.weights, tiny.config, cache)
    >>> whole = forward([[2, 300, 400]], tiny.weights, tiny.config).logits
    >>> bool(np.allclose(logits, whole[:, -1:], atol=1e-4))
    True
    """
    start = begin(input_ids, weights, config, attention_mask, position_ids, cache, inputs_embeds)
    present = []
    for layer, record in enumerate(blocks(start, weights, config)):
        hidden = record.out[:, -1:]
        present.append(next_past(layer, record, config))
    norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    return head(norm, weights, config)[1], Cache(present)
