"""The whole model: tokens, embedding, blocks, final norm, tied head, final cap. Checked against transformers 5.23
`Gemma2ForCausalLM` (eager) on recorded tensors: whole sequences, padded batches, cached decoding, chunked prefill.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int

from refgemma.cache import Cache, LayerCache, empty_cache, keep_last
from refgemma.config import Gemma2Config
from refgemma.inputs import InputError, Inputs, check_inputs
from refgemma.layers import Block, block
from refgemma.ops import causal_mask, linear, rms_norm, rotary_tables, sliding_mask, soft_cap
from refgemma.precision import Array, dtype_name, narrow
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

    The head is tied: the table that embeds the tokens also scores them.

    Examples
    --------
    >>> unembed(np.array([[[1.0, 2.0]]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    array([[[1., 2., 3.]]])
    """
    starts = range(0, embed_tokens.shape[0], HEAD_ROWS)
    return np.concatenate([linear(norm, embed_tokens[start : start + HEAD_ROWS]) for start in starts], axis=-1)


def layer_mask(
    layer: int, past: LayerCache, places: Int[np.ndarray, " seq"], visible: Bool[np.ndarray, "batch total"],
    config: Gemma2Config,
) -> Mask:  # fmt: skip
    """What the queries at `places` may see in `layer`: causal, within its window, and no padding."""
    k_places = np.arange(past.start, places[-1] + 1)
    if config.is_sliding(layer):
        allowed = sliding_mask(places, k_places, config.sliding_window)
    else:
        allowed = causal_mask(places, k_places)
    mask: Mask = allowed & visible[:, None, None, past.start :]
    return mask


def blocks(
    embedded: Hidden,
    cos: RotaryTable,
    sin: RotaryTable,
    inputs: Inputs,
    cache: Cache,
    weights: Weights,
    config: Gemma2Config,
) -> Iterator[Block]:
    """Run the layers one after the other, yielding the record of each `block`; nothing is kept here.

    A caller that keeps nothing either can run a model of any depth in the memory of one layer.
    """
    hidden = embedded
    for layer, past in enumerate(cache):
        mask = layer_mask(layer, past, inputs.places, inputs.visible, config)
        record = block(
            hidden, past, cos, sin, mask, weights.layers[layer],
            config.attention_scale, config.attn_logit_softcapping, config.rms_norm_eps,
        )  # fmt: skip
        yield record
        hidden = record.out


def next_past(layer: int, record: Block, config: Gemma2Config) -> LayerCache:
    """What `layer` has to remember: everything, or in a sliding layer what the next query can still see."""
    present = record.attention.present
    return keep_last(present, config.sliding_window - 1) if config.is_sliding(layer) else present


def past_of(cache: Cache | None, config: Gemma2Config, batch: int, like: Array) -> Cache:
    """The cache to go on from, or an empty one, after a look whether it is one of this model and batch."""
    nothing = empty_cache(config, batch, like)
    if cache is None:
        return nothing
    kept = [(layer.keys.shape[0], layer.keys.shape[1], layer.keys.shape[3]) for layer in cache]
    needed = [(batch, config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers
    if kept != needed or {dtype_name(layer.keys) for layer in cache} != {dtype_name(like)}:
        raise InputError(
            f"the cache is one of {len(cache)} layers, not of this model, batch size ({batch}) and "
            f"precision ({dtype_name(like)}): go on from the cache that an earlier call with the same ones returned"
        )
    return cache


def before_blocks(inputs: Inputs, weights: Weights, config: Gemma2Config) -> tuple[RotaryTable, RotaryTable, Hidden]:
    """The rotary tables, cosines and sines, and the embedded tokens."""
    embedded = embed(inputs.input_ids, weights.embed_tokens)
    cos, sin = rotary_tables(inputs.positions, config.head_dim, config.rope_theta, like=embedded)
    return cos, sin, embedded


def after_blocks(hidden: Hidden, weights: Weights, config: Gemma2Config) -> tuple[Hidden, Logits, Logits]:
    """The final norm, the logits, and the capped logits."""
    norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    raw_logits = unembed(norm, weights.embed_tokens)
    return norm, raw_logits, soft_cap(raw_logits, config.final_logit_softcapping)


def forward(
    input_ids: npt.ArrayLike,
    weights: Weights,
    config: Gemma2Config,
    attention_mask: npt.ArrayLike | None = None,
    position_ids: npt.ArrayLike | None = None,
    cache: Cache | None = None,
) -> Forward:
    """Compute every named tensor of the model for a batch of token sequences.

    Parameters
    ----------
    input_ids : int array (batch, seq)
        Token ids.
    weights : Weights
        Their precision is the precision of the computation.
    config : Gemma2Config
        The model's numbers.
    attention_mask : array of 0 and 1, (batch, tokens so far), optional
        0 marks padding, on either side. Default: no padding.
    position_ids : int array (batch, seq), optional
        Positions for the rotary angles; by default each token's place in its row, padding counted, as in transformers.
    cache : Cache, optional
        ``Forward.cache`` of an earlier call, which this one continues. It is not changed.

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
    seen = cache[0].stop if cache else 0
    inputs = check_inputs(input_ids, config, attention_mask, position_ids, seen)
    past = past_of(cache, config, batch=len(inputs.input_ids), like=weights.norm)
    cos, sin, embedded = before_blocks(inputs, weights, config)
    layers = tuple(blocks(embedded, cos, sin, inputs, past, weights, config))
    norm, raw_logits, logits = after_blocks(layers[-1].out, weights, config)
    present = tuple(next_past(layer, record, config) for layer, record in enumerate(layers))
    return Forward(cos, sin, embedded, layers, norm, raw_logits, logits, present)


def next_token_logits(
    input_ids: npt.ArrayLike, weights: Weights, config: Gemma2Config, cache: Cache | None = None
) -> tuple[Logits, Cache]:
    """The logits after the last token, and the cache to go on from: `forward` for decoding, one block in memory.

    Parameters
    ----------
    input_ids : int array (batch, seq)
        The prompt, or the tokens that come after those in `cache`; no padding.

    Returns
    -------
    logits : (batch, 1, vocab)
    cache : Cache

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
    seen = cache[0].stop if cache else 0
    inputs = check_inputs(input_ids, config, seen=seen)
    past = past_of(cache, config, batch=len(inputs.input_ids), like=weights.norm)
    cos, sin, embedded = before_blocks(inputs, weights, config)
    present = []
    for layer, record in enumerate(blocks(embedded, cos, sin, inputs, past, weights, config)):
        hidden = record.out
        present.append(next_past(layer, record, config))
    _, _, logits = after_blocks(hidden[:, -1:], weights, config)
    return logits, tuple(present)
