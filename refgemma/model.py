"""Run the whole model: tokens, embedding, blocks, final norm, tied head, final cap. Checked against transformers 5.23
`Gemma2ForCausalLM` (eager) on recorded tensors: whole sequences, padded batches, cached decoding, chunked prefill.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from refgemma.cache import Cache, LayerCache, check_cache, keep_last
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.inputs import InputError, Inputs, check_inputs
from refgemma.layers import Block, block
from refgemma.ops import causal_mask, linear, rms_norm, rotary_tables, sliding_mask, soft_cap
from refgemma.precision import Array, narrow
from refgemma.shapes import Bias, Hidden, Logits, Mask, RotaryTable, TokenIds
from refgemma.weights.parameters import Rows, Weights, row_pieces


@dataclass(frozen=True)
class Forward:
    """Every step of `forward`, in order; `refgemma.trace.names` returns it as named tensors."""

    cos: RotaryTable  # cosines of the rotary angles
    sin: RotaryTable  # sines of the rotary angles
    embedded: Hidden  # rows of the tokens in the embedding table, times sqrt(hidden)
    layers: tuple[Block, ...]
    norm: Hidden  # norm of the last layer's residual stream
    raw_logits: Logits  # scores of all tokens, before the cap
    logits: Logits  # scores of all tokens, after the cap
    cache: Cache  # for the next call; not traced


def embedding_scale(hidden_size: int, like: Array) -> Array:
    """Return ``sqrt(hidden_size)`` in the precision of `like`; for the 9B in bfloat16, 59.75, not 59.8665.

    Examples
    --------
    >>> from refgemma.precision import bf16
    >>> float(embedding_scale(3584, like=np.zeros(0))), float(embedding_scale(3584, like=bf16([0])))
    (59.86651818838306, 59.75)
    """
    return narrow(math.sqrt(hidden_size), like=like)


def embed(input_ids: TokenIds, embed_tokens: Rows) -> Hidden:
    """Look up the rows of the tokens and scale them: ``embed_tokens[id] * sqrt(hidden)``.

    The factor is first rounded to the precision of the weights; see `embedding_scale`. Source: transformers
    ``Gemma2TextScaledWordEmbedding``.

    Examples
    --------
    >>> embed(np.array([[1, 0]]), np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]))
    array([[[0., 6., 0., 0.],
            [2., 0., 0., 0.]]])
    """
    rows: Array = embed_tokens[input_ids]
    return rows * embedding_scale(rows.shape[-1], like=rows)


def unembed(norm: Hidden, embed_tokens: Rows) -> Logits:
    """Score every token of the vocabulary: ``norm @ embed_tokens.T``.

    The head is tied: the table that embeds the tokens also scores them. The table is read one piece at a time, which
    changes no sum. In half precision each score rounds once. Source: transformers ``Gemma2ForCausalLM``; Press and Wolf
    2016, arXiv:1608.05859.

    Examples
    --------
    >>> unembed(np.array([[[1.0, 2.0]]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    array([[[1., 2., 3.]]])
    """
    return np.concatenate([*map(partial(linear, norm), row_pieces(embed_tokens))], axis=-1)


def layer_mask(layer: int, past: LayerCache, inputs: Inputs, config: Gemma2Config) -> Mask:
    """Return the mask of `layer`: causal, inside the window and without padding; or else the caller's own mask."""
    if inputs.masks is not None:
        return inputs.masks[SLIDING if config.is_sliding(layer) else FULL][..., past.start :]
    k_places = np.arange(past.start, inputs.places[-1] + 1)
    if config.is_sliding(layer):
        allowed = sliding_mask(inputs.places, k_places, config.sliding_window)
    else:
        allowed = causal_mask(inputs.places, k_places)
    mask: Mask = allowed & inputs.visible[:, None, None, past.start :]
    return mask


def layer_bias(layer: int, past: LayerCache, inputs: Inputs, config: Gemma2Config) -> Bias | None:
    """Return the numbers to add to the scores of `layer`, or None if the caller passes no mask of numbers."""
    bias = (inputs.biases or {}).get(SLIDING if config.is_sliding(layer) else FULL)
    return None if bias is None else bias[..., past.start :]


def next_past(layer: int, record: Block, config: Gemma2Config) -> LayerCache:
    """Return the cache of `layer`: all keys and values; in a sliding layer, only those that the next query can see."""
    present = record.attention.present
    return keep_last(present, config.sliding_window - 1) if config.is_sliding(layer) else present


class Given(TypedDict, total=False):
    """The optional arguments of `forward`, `begin` and `next_token_logits`."""

    attention_mask: Any
    position_ids: npt.ArrayLike | None
    cache: Cache | None
    inputs_embeds: npt.ArrayLike | None


def check_call(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, *, cache: Cache | None = None,
    **given: Any,
) -> tuple[Inputs, Cache]:  # fmt: skip
    """Check the arguments of `forward`; return them as arrays, with the cache to continue from."""
    inputs = check_inputs(input_ids, config, seen=cache[0].stop if cache else 0, **given)
    return inputs, check_cache(cache, config, batch=len(inputs.positions), like=weights.norm)


def embed_inputs(inputs: Inputs, weights: Weights) -> Hidden:
    """Embed the tokens of a call; return a caller's own embeddings unchanged."""
    if inputs.embeds is not None:
        return narrow(inputs.embeds, like=weights.norm)
    assert inputs.tokens is not None  # `check_inputs` ensures it
    return embed(inputs.tokens, weights.embed_tokens)


def run_block(
    hidden: Hidden, weights: Weights, config: Gemma2Config, *, layer: int, inputs: Inputs, past: LayerCache,
    cos: RotaryTable, sin: RotaryTable,
) -> Block:  # fmt: skip
    """Run `block` with the weights, the mask and the configuration of `layer`."""
    return block(
        hidden, weights.layers[layer], past=past, cos=cos, sin=sin, mask=layer_mask(layer, past, inputs, config),
        scale=config.attention_scale, cap=config.attn_logit_softcapping, activation=config.activation,
        eps=config.rms_norm_eps, bias=layer_bias(layer, past, inputs, config),
    )  # fmt: skip


def head_table(weights: Weights, config: Gemma2Config) -> Rows:
    """Return the table that scores the tokens: the embedding table, unless the head is untied.

    Raises
    ------
    InputError
        If the head is untied and missing.
    """
    if weights.lm_head is None and not config.tie_word_embeddings:
        raise InputError("lm_head.weight is missing from the weights, and tie_word_embeddings is false")
    return weights.head


def head(norm: Hidden, weights: Weights, config: Gemma2Config) -> tuple[Logits, Logits]:
    """Return the logits before and after the final cap, from the residual stream after the final norm.

    These are ``z = norm @ head.T`` and ``soft_cap(z)``, with the roundings of the two operations. Source: transformers
    ``Gemma2ForCausalLM``.

    Raises
    ------
    InputError
        If the head is untied and missing.
    """
    raw_logits = unembed(norm, head_table(weights, config))
    return raw_logits, soft_cap(raw_logits, config.final_logit_softcapping)


def forward(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, *, attention_mask: Any = None,
    position_ids: npt.ArrayLike | None = None, cache: Cache | None = None, inputs_embeds: npt.ArrayLike | None = None,
) -> Forward:  # fmt: skip
    """Compute every named tensor for a batch of token sequences: ``logits = head(norm(block(...block(embed(ids)))))``.

    Parameters
    ----------
    input_ids : int array (batch, seq)
        Token ids.
    weights : Weights
        The weights; their precision is the precision of the computation.
    config : Gemma2Config
        The model's configuration.
    attention_mask : array, optional
        ``(batch, tokens so far)`` with 0 for padding, on either side, and 1 for tokens. Default: no padding. Or your
        own mask, which replaces the causal and sliding masks; see `refgemma.inputs.check_masks`.
    position_ids : int array (batch, seq), optional
        Positions for the rotary angles; by default each token's place in its row, including padding, as in
        transformers.
    cache : Cache, optional
        ``Forward.cache`` of an earlier call, which this call continues. The cache does not change.
    inputs_embeds : array (batch, seq, hidden), optional
        The input of the first block, instead of `input_ids`. It is not multiplied by ``sqrt(hidden)``, as in
        transformers 5.x (unlike 4.x).

    Returns
    -------
    Forward
        All tensors, in order; ``.logits`` has shape ``(batch, seq, vocab)``. Rows of padding tokens are computed but
        meaningless.

    Raises
    ------
    InputError
        If ids, masks, positions or a cache are invalid; the message names the place.

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
    inputs, past = check_call(
        input_ids, weights, config, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
        inputs_embeds=inputs_embeds,
    )  # fmt: skip
    embedded = embed_inputs(inputs, weights)
    cos, sin = rotary_tables(inputs.positions, config.head_dim, config.rope_theta, like=embedded)

    hidden, layers = embedded, []
    for layer in range(config.num_hidden_layers):
        record = run_block(hidden, weights, config, layer=layer, inputs=inputs, past=past[layer], cos=cos, sin=sin)
        hidden = record.out
        layers.append(record)

    norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    raw_logits, logits = head(norm, weights, config)
    present = Cache(next_past(layer, record, config) for layer, record in enumerate(layers))
    return Forward(
        cos=cos, sin=sin, embedded=embedded, layers=tuple(layers), norm=norm, raw_logits=raw_logits, logits=logits,
        cache=present,
    )  # fmt: skip


# --- the same with one block in memory --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The input of the first block of a call, and the inputs that all blocks share."""

    inputs: Inputs
    past: Cache
    cos: RotaryTable
    sin: RotaryTable
    embedded: Hidden


def begin(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, **given: Unpack[Given]
) -> Start:  # fmt: skip
    """Do the steps of `forward` before the first block; the arguments are the same."""
    inputs, past = check_call(input_ids, weights, config, **given)
    embedded = embed_inputs(inputs, weights)
    cos, sin = rotary_tables(inputs.positions, config.head_dim, config.rope_theta, like=embedded)
    return Start(inputs=inputs, past=past, cos=cos, sin=sin, embedded=embedded)


def blocks(start: Start, weights: Weights, config: Gemma2Config) -> Iterator[Block]:
    """Run the blocks one after another, and yield the record of each without keeping it.

    If the caller deletes each record (``del record``) before the next, a model of any depth runs in the memory of one
    block. Do not use `enumerate` or `zip`, which keep their last item; count by hand.
    """
    hidden = start.embedded
    for layer, past in enumerate(start.past):
        record = run_block(
            hidden, weights, config, layer=layer, inputs=start.inputs, past=past, cos=start.cos, sin=start.sin
        )
        hidden = record.out
        yield record
        del record


def reference_outputs(start: Start, weights: Weights, config: Gemma2Config) -> Iterator[tuple[Hidden, LayerCache]]:
    """Yield the output and the cache of each block."""
    layer = 0
    for record in blocks(start, weights, config):
        yield record.out, next_past(layer, record, config)
        del record
        layer += 1


def next_token_logits(
    input_ids: npt.ArrayLike | None, weights: Weights, config: Gemma2Config, **given: Unpack[Given]
) -> tuple[Logits, Cache]:  # fmt: skip
    """Return the logits ``(batch, 1, vocab)`` after the last token, and the cache to continue from.

    This is `forward` for decoding: same arguments, but only one block in memory.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> logits, cache = next_token_logits([[2, 300]], tiny.weights, tiny.config)
    >>> logits, cache = next_token_logits([[400]], tiny.weights, tiny.config, cache=cache)
    >>> whole = forward([[2, 300, 400]], tiny.weights, tiny.config).logits
    >>> bool(np.allclose(logits, whole[:, -1:], atol=1e-4))
    True
    """
    start = begin(input_ids, weights, config, **given)
    present = []
    for out, past in reference_outputs(start, weights, config):
        last = out[:, -1:]
        present.append(past)
    norm = rms_norm(last, weights.norm, config.rms_norm_eps)
    return head(norm, weights, config)[1], Cache(present)
