"""Check a caller's inputs, and convert them to the arrays that the model computes with. Checked against the defaults of
transformers 5.23 ``Gemma2Model.forward`` (positions, masks, continuation of a cache)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.files import pluralise
from refgemma.ops import causal_mask, sliding_mask
from refgemma.precision import Rounded
from refgemma.shapes import Bias, Hidden, Mask, Positions, TokenIds


class InputError(RefgemmaError):
    """Raised for an invalid input of a model: empty, ragged, of the wrong type, or out of range."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of one call. A token's *place* is its number in the whole sequence, including padding."""

    tokens: TokenIds | None  # ids to look up, or None
    embeds: Hidden | None  # embeddings given by the caller, if `tokens` is None
    places: Int[np.ndarray, " seq"]  # places of this call's tokens; masks depend on places
    positions: Positions  # for the rotary angles; equal to the places unless the caller passes others
    visible: Bool[np.ndarray, "batch total"]  # false for padding; for all places up to the last of this call
    masks: Mapping[str, Mask] | None = None  # complete masks by type of layer, which replace all other masks
    biases: Mapping[str, Bias] | None = None  # numbers to add to the scores, by type of layer


def as_array(value: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """Return `value` as an array; `name` is its name in error messages."""
    tensor: Any = value
    if hasattr(tensor, "detach"):  # a tensor of PyTorch: NumPy needs it on the CPU, without gradients, not in bfloat16
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
    try:
        return np.asarray(tensor)
    except ValueError:
        raise InputError(f"{name} is ragged: its rows have different lengths") from None


def check_token_ids(input_ids: npt.ArrayLike, vocab_size: int) -> TokenIds:
    """Return `input_ids` as an integer array ``(batch, seq)``; check that every id is in the vocabulary.

    Raises
    ------
    InputError
        If the ids are invalid; the message names the row or id.

    Examples
    --------
    >>> check_token_ids([[2, 5], [2, 99]], vocab_size=64)
    Traceback (most recent call last):
    ...
    refgemma.inputs.InputError: input_ids[1, 1] is 99; the vocabulary has 64 tokens (0 to 63)
    """
    if isinstance(input_ids, list | tuple) and all(isinstance(row, list | tuple) for row in input_ids):
        lengths = [len(row) for row in input_ids]
        if len(set(lengths)) > 1:
            row = next(i for i, length in enumerate(lengths) if length != lengths[0])
            raise InputError(
                f"input_ids is ragged: row {row} has {pluralise(lengths[row], 'token')}, row 0 has {lengths[0]}; "
                "pad the shorter rows and pass an attention_mask with 0 at the padding"
            )
    ids = as_array(input_ids, "input_ids")
    if ids.size == 0:
        raise InputError("input_ids is empty; a model needs at least one token (for example <bos>)")
    if ids.dtype.kind not in "iu":
        raise InputError(f"input_ids has dtype {ids.dtype}; token ids must be whole numbers")
    if ids.ndim != 2:
        raise InputError(f"input_ids has shape {ids.shape}; it must be (batch, seq): [ids] for a single sequence")
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise InputError(
            f"input_ids[{row}, {column}] is {ids[row, column]}; the vocabulary has {pluralise(vocab_size, 'token')} "
            f"(0 to {vocab_size - 1})"
        )
    return ids.astype(np.int64)


def check_padding(attention_mask: npt.ArrayLike | None, batch: int, total: int) -> Bool[np.ndarray, "batch total"]:
    """Return the padding mask over all tokens so far, as booleans; all true for None."""
    if attention_mask is None:
        return np.ones((batch, total), bool)
    mask = as_array(attention_mask, "attention_mask")
    if mask.shape != (batch, total):
        raise InputError(
            f"attention_mask has shape {mask.shape}; it must be {(batch, total)}, "
            "with one entry for each token, including the tokens in the cache"
        )
    if not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask may contain only 1 (a token) and 0 (padding)")
    return mask.astype(bool)


def check_positions(
    position_ids: npt.ArrayLike | None, places: Int[np.ndarray, " seq"], batch: int, limit: int
) -> Positions:
    """Return rotary positions ``(batch, seq)``, equal to `places` if None is given; warn beyond the model's `limit`."""
    positions = places[None] if position_ids is None else as_array(position_ids, "position_ids")
    if positions.dtype.kind not in "iu" or positions.shape not in ((batch, len(places)), (1, len(places))):
        raise InputError(
            f"position_ids has shape {positions.shape} and dtype {positions.dtype}; "
            f"it must be whole numbers of shape {(batch, len(places))}"
        )
    if (positions < 0).any():
        raise InputError("position_ids has a negative entry")
    if positions.max() >= limit:
        warnings.warn(
            f"the sequence exceeds max_position_embeddings ({limit}): "
            "the model was designed for shorter sequences, so its predictions may be worse",
            stacklevel=4,
        )
    return np.broadcast_to(positions, (batch, len(places)))


def check_embeddings(inputs_embeds: npt.ArrayLike, hidden_size: int) -> Float[np.ndarray, "batch seq hidden"]:
    """Return `inputs_embeds` as an array of numbers ``(batch, seq, hidden)``."""
    given = inputs_embeds if isinstance(inputs_embeds, Rounded) else as_array(inputs_embeds, "inputs_embeds")
    if given.dtype.kind != "f" or given.ndim != 3 or given.shape[2] != hidden_size or given.size == 0:
        raise InputError(
            f"inputs_embeds has shape {given.shape} and dtype {given.dtype}; "
            f"it must be numbers of shape (batch, seq, {hidden_size})"
        )
    return given


def check_mask(mask: npt.ArrayLike, batch: int, seq: int, total: int, heads: int) -> Mask | Bias:
    """Check a caller's mask ``(batch, 1 or heads, seq, total)`` of booleans or numbers.

    A boolean is true where a query may see a key. Numbers are added to the scores: 0 where a query may see a key, the
    lowest number of the format where it may not.
    """
    given = mask if isinstance(mask, Rounded) else as_array(mask, "attention_mask")
    if given.ndim != 4 or given.dtype.kind not in "bf":
        raise InputError(
            f"attention_mask has shape {given.shape} and dtype {given.dtype}; with four axes, it must hold "
            "true and false, or numbers to add to the scores"
        )
    wanted = (batch, heads, seq, total)
    if any(length not in (1, full) for length, full in zip(given.shape[:2], wanted[:2], strict=True)) or (
        given.shape[2:] != wanted[2:]
    ):
        raise InputError(
            f"attention_mask has shape {given.shape}; it must be (batch, 1 or heads, seq, tokens so far) = "
            f"{(batch, f'1 or {heads}', seq, total)}"
        )
    if given.dtype.kind == "f" and (np.isnan(given).any() or (given == np.inf).any()):
        raise InputError("attention_mask contains NaN or +inf, which would make the softmax NaN")
    blind = (given == -np.inf).all(axis=-1)
    if blind.any():
        row, head, query = np.argwhere(blind)[0]
        raise InputError(
            f"attention_mask[{row}, {head}, {query}] is minus infinity for every key, which makes its softmax NaN; "
            f"use np.finfo(np.float32).min instead of minus infinity"
        )
    return np.broadcast_to(given, (batch, *given.shape[1:]), subok=True)


def check_masks(attention_mask: Any, batch: int, seq: int, total: int, heads: int) -> Mapping[str, Mask | Bias] | None:
    """Return masks by type of layer if `attention_mask` is a mapping or has four axes, otherwise None.

    Each mask has the shape ``(batch, 1 or heads, seq, total)``.

    Raises
    ------
    InputError
        If a mask has the wrong shape or type.
    """
    if isinstance(attention_mask, Mapping):
        if set(attention_mask) != {SLIDING, FULL}:
            raise InputError(
                f"attention_mask has the keys {sorted(attention_mask)}; they must be {FULL!r} and {SLIDING!r}"
            )
        return {kind: check_mask(mask, batch, seq, total, heads) for kind, mask in attention_mask.items()}
    if attention_mask is None or as_array(attention_mask, "attention_mask").ndim != 4:
        return None
    return dict.fromkeys((SLIDING, FULL), check_mask(attention_mask, batch, seq, total, heads))


def packed_masks(
    position_ids: npt.ArrayLike, config: Gemma2Config
) -> Mapping[str, Bool[np.ndarray, "batch 1 seq seq"]] | None:
    """Return masks that separate packed texts; a text begins where a position is not the previous one plus 1.

    Return None if each row is a single text. Source: transformers ``find_packed_sequence_indices``.

    Examples
    --------
    >>> packed_masks([[0, 1, 0, 1]], Gemma2Config())[FULL][0, 0].astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 1, 1]])
    """
    positions = as_array(position_ids, "position_ids")
    if positions.ndim != 2 or positions.size == 0 or positions.dtype.kind not in "iu":
        return None  # `check_positions` refuses these
    steps = np.diff(positions.astype(np.int64), axis=1)
    texts = np.pad(np.cumsum(steps != 1, axis=1), ((0, 0), (1, 0)))
    if not texts.any():
        return None
    same = (texts[:, :, None] == texts[:, None, :])[:, None]
    places = np.arange(positions.shape[1])
    return {
        FULL: same & causal_mask(places, places), SLIDING: same & sliding_mask(places, places, config.sliding_window)
    }  # fmt: skip


def check_inputs(
    input_ids: npt.ArrayLike | None,
    config: Gemma2Config,
    *,
    attention_mask: Any = None,
    position_ids: npt.ArrayLike | None = None,
    seen: int = 0,
    inputs_embeds: npt.ArrayLike | None = None,
) -> Inputs:
    """Check all inputs of one call; the cache already holds `seen` tokens.

    Raises
    ------
    InputError
        If an input is invalid; the message names the input, the place and the requirement.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("pass either input_ids or inputs_embeds, not both or neither")
    tokens = None if input_ids is None else check_token_ids(input_ids, config.vocab_size)
    embeds = None if inputs_embeds is None else check_embeddings(inputs_embeds, config.hidden_size)
    batch, seq = (tokens if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]  # one of them is there
    places = np.arange(seen, seen + seq)
    ready = check_masks(attention_mask, batch, seq, seen + seq, config.num_attention_heads)
    visible = check_padding(attention_mask if ready is None else None, batch, seen + seq)
    positions = check_positions(position_ids, places, batch, config.max_position_embeddings)
    masks = ready and {kind: x if x.dtype == bool else np.ones(x.shape, bool) for kind, x in ready.items()}
    biases = ready and {kind: x for kind, x in ready.items() if x.dtype != bool}
    return Inputs(
        tokens=tokens, embeds=embeds, places=places, positions=positions, visible=visible, masks=masks, biases=biases
    )
