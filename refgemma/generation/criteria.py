"""Decide when a text is complete, by a caller's criteria, stop strings or time.

Checked against the criteria of transformers 5.23: texts end at the same token.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool

from refgemma.generation.generation_config import Settings
from refgemma.inputs import InputError
from refgemma.shapes import TokenIds

Criterion: TypeAlias = Callable[[TokenIds, Any], Any]


class StoppingCriteria:
    """The base class of a caller's criteria; a subclass defines ``__call__``. A plain function also works.

    Examples
    --------
    >>> class Long(StoppingCriteria):
    ...     def __call__(self, input_ids, scores, **others):
    ...         return input_ids.shape[1] > 3
    >>> StoppingCriteriaList([Long()])(np.array([[2, 5, 6, 7]]), None)
    array([ True])
    """

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """Return true for each complete row of `input_ids` ``(rows, length)``, or one value for all rows."""
        raise NotImplementedError(f"{type(self).__name__} needs a method __call__(self, input_ids, scores, **kwargs)")


class StoppingCriteriaList(list[Any]):
    """A list of criteria, called like one criterion; a text is complete if one criterion is met."""

    def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
        """Return true for each complete row."""
        complete = np.zeros(len(input_ids), bool)
        for criterion in self:
            complete = complete | np.asarray(criterion(input_ids, scores, **others), bool)
        return complete


def end_at_strings(strings: str | list[str], tokenizer: Any) -> Criterion:
    """Return a criterion for stop strings: a text is complete if one of `strings` ends inside its last token.

    Texts are compared as bytes, including special tokens. Source: transformers ``StopStringCriteria``.

    Parameters
    ----------
    strings : str or list of str
        The strings; none may be empty.
    tokenizer : Tokenizer
        A tokenizer; only its ``convert_ids_to_tokens`` is used.

    Examples
    --------
    >>> import refgemma
    >>> tokenizer = refgemma.AutoTokenizer.from_pretrained("tiny")
    >>> ends = end_at_strings("the king", tokenizer)
    >>> ends(np.array([tokenizer.encode("the king"), tokenizer.encode("the child")]), None)
    array([ True, False])
    """
    stops = [string.encode() for string in ([strings] if isinstance(strings, str) else strings)]
    longest = max(map(len, stops))  # in bytes; so many last tokens are enough to search

    @cache
    def spell(token: int) -> bytes:
        if token >= len(tokenizer):
            return b"\xff"  # a row of the model without a piece
        piece = tokenizer.convert_ids_to_tokens([token])[0]
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        return bytes.fromhex(piece[3:5]) if is_byte else piece.replace("\u2581", " ").encode()

    def contains_end(row: Any) -> bool:
        *before, last = (spell(int(token)) for token in row[-longest:])
        text, begin = b"".join([*before, last]), sum(map(len, before))
        return any(text.find(stop, max(0, begin + 1 - len(stop))) >= 0 for stop in stops)

    def ends(ids: TokenIds, scores: Any, **others: Any) -> Bool[np.ndarray, " rows"]:
        return np.array([contains_end(row) for row in ids])

    return ends


def list_criteria(settings: Settings, tokenizer: Any) -> Iterator[Criterion]:
    """Yield the criteria of the settings `max_time` and `stop_strings`.

    Raises
    ------
    InputError
        If stop strings are given without a tokenizer.
    """
    if (seconds := settings.max_time) is not None:
        began = time.monotonic()
        yield lambda ids, scores: time.monotonic() - began > seconds
    if settings.stop_strings is not None:
        if tokenizer is None:
            raise InputError("stop_strings need the model's tokenizer to search the text; pass tokenizer=")
        yield end_at_strings(settings.stop_strings, tokenizer)
