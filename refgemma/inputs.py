"""What a caller hands in, checked and put into the arrays the model computes with. Checked against the defaults of
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
from refgemma.ops import causal_mask, sliding_mask
from refgemma.precision import Rounded
from refgemma.shapes import Bias, Hidden, Mask, Positions, TokenIds


class InputError(RefgemmaError):
    """An input that no model can take: empty, ragged, of the wrong type, or out of range."""


@dataclass(frozen=True)
class Inputs:
    """One call's inputs. A *place* counts all tokens of a sequence from its first, padding included."""

    tokens: TokenIds | None  # ids to look up
    embeds: Hidden | None  # or what stands in for their embeddings: one of the two is given
    places: Int[np.ndarray, " seq"]  # of this call's tokens; masks are functions of places
    positions: Positions  # what the rotary angles are taken of; the places, unless the caller says otherwise
    visible: Bool[np.ndarray, "batch total"]  # false for padding; over all places up to the last of this call
    masks: Mapping[str, Mask] | None = None  # ready-made, for each type of layer: then nothing else hides a key
    biases: Mapping[str, Bias] | None = None  # added to the scores, for each type of layer that has one


def as_array(value: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """`value` as an array; `name` is what to call it if its rows are not all of one length."""
    tensor: Any = value
    if hasattr(tensor, "detach"):  # PyTorch's, which NumPy reads without gradients, from the CPU, and not in bfloat16
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
    try:
        return np.asarray(tensor)
    except ValueError:
        raise InputError(f"{name} is ragged: its rows are not all of one length") from None


def check_token_ids(input_ids: npt.ArrayLike, vocab_size: int) -> TokenIds:
    """`input_ids` as an integer array ``(batch, seq)`` with every id inside the vocabulary.

    Raises
    ------
    InputError
        Naming the row or the id that is wrong.

    Examples
    --------
    >>> check_token_ids([[2, 5], [2, 99]], vocab_size=64)
    Traceback (most recent call last):
    ...
    refgemma.inputs.InputError: input_ids[1, 1] is 99: not in the vocabulary of 64 tokens (0 to 63)
    """
    if isinstance(input_ids, list | tuple) and all(isinstance(row, list | tuple) for row in input_ids):
        lengths = [len(row) for row in input_ids]
        if len(set(lengths)) > 1:
            row = next(i for i, length in enumerate(lengths) if length != lengths[0])
            raise InputError(
                f"input_ids is ragged: row {row} has {lengths[row]} tokens, row 0 has {lengths[0]}; "
                "pad the shorter rows and pass an attention_mask with 0 at the padding"
            )
    ids = as_array(input_ids, "input_ids")
    if ids.size == 0:
        raise InputError("input_ids is empty: a model needs at least one token (<bos>, for instance)")
    if ids.dtype.kind not in "iu":
        raise InputError(f"input_ids has dtype {ids.dtype}: token ids are whole numbers")
    if ids.ndim != 2:
        raise InputError(f"input_ids has shape {ids.shape}: (batch, seq) is needed, [ids] for a single sequence")
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise InputError(
            f"input_ids[{row}, {column}] is {ids[row, column]}: not in the vocabulary of {vocab_size} tokens "
            f"(0 to {vocab_size - 1})"
        )
    return ids.astype(np.int64)


def check_padding(attention_mask: npt.ArrayLike | None, batch: int, total: int) -> Bool[np.ndarray, "batch total"]:
    """The padding mask over all tokens so far, as booleans; all true if none is given."""
    if attention_mask is None:
        return np.ones((batch, total), bool)
    mask = as_array(attention_mask, "attention_mask")
    if mask.shape != (batch, total):
        raise InputError(
            f"attention_mask has shape {mask.shape}, but {(batch, total)} is needed: "
            "one entry for each token so far, those in the cache included"
        )
    if not np.isin(mask, (0, 1)).all():
        raise InputError("attention_mask may hold 1 (a token) and 0 (padding) only")
    return mask.astype(bool)


def check_positions(
    position_ids: npt.ArrayLike | None, places: Int[np.ndarray, " seq"], batch: int, limit: int
) -> Positions:
    """Rotary positions ``(batch, seq)``, the places if none are given; warns beyond the model's `limit`."""
    positions = places[None] if position_ids is None else as_array(position_ids, "position_ids")
    if positions.dtype.kind not in "iu" or positions.shape not in ((batch, len(places)), (1, len(places))):
        raise InputError(
            f"position_ids has shape {positions.shape} and dtype {positions.dtype}: "
            f"whole numbers of shape {(batch, len(places))} are needed"
        )
    if (positions < 0).any():
        raise InputError("position_ids has a negative entry")
    if positions.max() >= limit:
        warnings.warn(
            f"the sequence goes beyond max_position_embeddings ({limit}): "
            "the model was not made for that many tokens, its predictions may degrade",
            stacklevel=4,
        )
    return np.broadcast_to(positions, (batch, len(places)))


def check_embeddings(inputs_embeds: npt.ArrayLike, hidden_size: int) -> Float[np.ndarray, "batch seq hidden"]:
    """`inputs_embeds` as an array of numbers ``(batch, seq, hidden)``."""
    given = inputs_embeds if isinstance(inputs_embeds, Rounded) else as_array(inputs_embeds, "inputs_embeds")
    if given.dtype.kind != "f" or given.ndim != 3 or given.shape[2] != hidden_size or given.size == 0:
        raise InputError(
            f"inputs_embeds has shape {given.shape} and dtype {given.dtype}: "
            f"numbers of shape (batch, seq, {hidden_size}) are needed"
        )
    return given


def check_mask(mask: npt.ArrayLike, batch: int, seq: int, total: int, heads: int) -> Mask | Bias:
    """A mask ``(batch, 1 or heads, seq, total)`` that a caller has made: true where a query may see a key, or numbers.

    Numbers are added to the scores: 0 where a query may see a key, the lowest of the format where it may not.
    """
    given = mask if isinstance(mask, Rounded) else as_array(mask, "attention_mask")
    if given.ndim != 4 or given.dtype.kind not in "bf":
        raise InputError(
            f"attention_mask has shape {given.shape} and dtype {given.dtype}: with four axes, it is a mask of "
            "true and false or of numbers to add to the scores"
        )
    wanted = (batch, heads, seq, total)
    if any(length not in (1, full) for length, full in zip(given.shape[:2], wanted[:2], strict=True)) or (
        given.shape[2:] != wanted[2:]
    ):
        raise InputError(
            f"attention_mask has shape {given.shape}: (batch, 1 or heads, seq, tokens so far) = "
            f"{(batch, f'1 or {heads}', seq, total)} is needed"
        )
    if given.dtype.kind == "f" and (np.isnan(given).any() or (given == np.inf).any()):
        raise InputError("attention_mask holds NaN or plus infinity: scores cannot be told apart after that is added")
    blind = (given == -np.inf).all(axis=-1)
    if blind.any():
        row, head, query = np.argwhere(blind)[0]
        raise InputError(
            f"attention_mask[{row}, {head}, {query}] is minus infinity for every key, which makes NaN of its softmax; "
            f"use np.finfo(np.float32).min"
        )
    return np.broadcast_to(given, (batch, *given.shape[1:]), subok=True)


def check_masks(attention_mask: Any, batch: int, seq: int, total: int, heads: int) -> Mapping[str, Mask | Bias] | None:
    """Masks by type of layer, if that is what `attention_mask` is: one of four axes for all, or a mapping.

    Each is ``(batch, 1 or heads, seq, total)``.

    Raises
    ------
    InputError
        If a mask has another shape or kind.
    """
    if isinstance(attention_mask, Mapping):
        if set(attention_mask) != {SLIDING, FULL}:
            raise InputError(
                f"attention_mask has the keys {sorted(attention_mask)}: {FULL!r} and {SLIDING!r} are needed"
            )
        return {kind: check_mask(mask, batch, seq, total, heads) for kind, mask in attention_mask.items()}
    if attention_mask is None or as_array(attention_mask, "attention_mask").ndim != 4:
        return None
    return dict.fromkeys((SLIDING, FULL), check_mask(attention_mask, batch, seq, total, heads))


def packed_masks(
    position_ids: npt.ArrayLike, config: Gemma2Config
) -> Mapping[str, Bool[np.ndarray, "batch 1 seq seq"]] | None:
    """Return masks that keep packed texts apart: each begins where a position is not one more than that before it.

    None if every row is one text. Source: transformers ``find_packed_sequence_indices``.

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
        return None  # which `check_positions` refuses
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
    """All inputs of one call, after `seen` tokens that are in the cache already.

    Raises
    ------
    InputError
        Saying which input is wrong, where, and what is needed.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("give either input_ids or inputs_embeds, and only one of them")
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
