"""Rows of ids cut, padded and put together, as the arguments of transformers 5.23 say. Checked against it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.tokenizer.vocabulary import TokenizerError

# The model_max_length of a tokenizer that sets none, and below what it is taken for a length; both as in transformers.
UNLIMITED, LIMITED = int(1e30), int(1e20)
SIDES = ("left", "right")

# Arguments that transformers documents -> why they are refused, unless they ask for nothing.
UNSUPPORTED = {
    "text_pair": "Gemma has no pairs; join the two texts yourself",
    "text_target": "Gemma's labels are its input_ids",
    "text_pair_target": "Gemma's labels are its input_ids",
    "stride": "it belongs to return_overflowing_tokens",
    "is_split_into_words": "Gemma's spaces belong to its pieces; join the words yourself",
    "return_token_type_ids": "Gemma has no token types",
    "return_overflowing_tokens": "what truncation cuts off is not returned here",
    "return_special_tokens_mask": "compare input_ids with all_special_ids",
    "return_offsets_mapping": "pieces are not followed back into the text here",
    "return_length": "take the sum of attention_mask",
    "tools": "Gemma 2's chat template has none",
    "documents": "Gemma 2's chat template has none",
    "chat_template": "only Gemma 2's own is known here, and nothing is rendered with Jinja",
    "continue_final_message": "take the text with tokenize=False, cut off its end, and encode that",
    "return_assistant_tokens_mask": "Gemma 2's chat template does not mark them",
    "split_special_tokens": "in a chat it is sanitize_control_tokens=True",
    "tokenizer_kwargs": "give them as arguments of their own",
}


def refuse(others: Mapping[str, Any]) -> None:
    """Refuse arguments that no parameter takes, unless transformers has them and they ask for nothing."""
    for name, value in others.items():
        if name not in UNSUPPORTED and name != "verbose":
            raise TokenizerError(f"{name}={value!r} is not known to this tokenizer; look for a slip of the pen")
        if value and name != "verbose":
            raise TokenizerError(f"{name}={value!r} is not supported: {UNSUPPORTED[name]}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a `value` that is not among `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise TokenizerError(f"{name} is {value!r}; there are {', '.join(map(repr, choices))}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is neither ``None`` nor a whole number from 1 on."""
    if value is not None and (type(value) is not int or value < 1):
        raise TokenizerError(f"{name} is {value!r}, not a whole number of at least 1")


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict whose entries are attributes, too.

    Examples
    --------
    >>> inputs = BatchEncoding(input_ids=[2, 300], attention_mask=[1, 1])
    >>> inputs.input_ids is inputs["input_ids"], dict(**inputs) == inputs
    (True, True)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} in it, only {', '.join(self)}") from None


@dataclass(frozen=True)
class Layout:
    """How rows of ids are put together; what the fields mean, `refgemma.tokenizer.tokenizer.Tokenizer` says.

    Raises
    ------
    TokenizerError
        For a value that there is not, or values that contradict each other.

    Examples
    --------
    >>> Layout(padding=True).batch([[2, 300], [2]], pad_token_id=0)
    {'input_ids': [[2, 300], [0, 2]], 'attention_mask': [[1, 1], [0, 1]]}
    """

    padding: bool | str = False
    truncation: bool | str | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_side: str = "left"
    truncation_side: str = "right"
    return_tensors: str | None = None
    return_attention_mask: bool | None = None

    def __post_init__(self) -> None:
        check_choice("padding", self.padding, (False, True, "longest", "max_length", "do_not_pad"))
        check_choice(
            "truncation", self.truncation, (None, False, True, "longest_first", "only_first", "do_not_truncate")
        )
        check_choice("padding_side", self.padding_side, SIDES)
        check_choice("truncation_side", self.truncation_side, SIDES)
        check_positive("max_length", self.max_length)
        check_positive("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.return_tensors not in (None, "np"):
            raise TokenizerError(
                f"return_tensors is {self.return_tensors!r}, but refgemma computes in NumPy; say 'np', from which "
                "every other library makes its own"
            )
        if self.max_length is not None and not self.truncates and self.padding != "max_length":
            warnings.warn(
                f"max_length={self.max_length} has no effect with padding={self.padding!r} and truncation="
                f"{self.truncation!r}; say truncation=True or padding='max_length'",
                stacklevel=5,  # where the tokenizer was called
            )
        multiple = self.pad_to_multiple_of or 1
        if self.truncates and self.pads and self.max_length is not None and self.max_length % multiple:
            raise TokenizerError(f"max_length {self.max_length} is no multiple of pad_to_multiple_of {multiple}")

    @property
    def pads(self) -> bool:
        """Whether rows are padded."""
        return self.padding not in (False, "do_not_pad")

    @property
    def truncates(self) -> bool:
        """Whether rows are cut. Where nothing is said, a `max_length` says it, unless it may be meant for padding."""
        if self.truncation is None:
            return self.max_length is not None and self.padding is False
        return self.truncation not in (False, "do_not_truncate")

    def cut(self, row: list[int], reserved: int = 0) -> list[int]:
        """Cut `row` to at most `max_length` ids, less those `reserved` for special tokens."""
        if not self.truncates or self.max_length is None:
            return row
        space = self.max_length - reserved
        if space < 0:
            raise TokenizerError(
                f"max_length {self.max_length} has no room for the {reserved} special tokens; raise it, or say "
                "add_special_tokens=False"
            )
        return row[:space] if self.truncation_side == "right" else row[max(len(row) - space, 0) :]

    def batch(self, rows: list[list[int]], pad_token_id: int) -> BatchEncoding:
        """Pad `rows`, and make their masks."""
        width = 0
        if self.padding == "max_length":
            width = self.max_length or 0
        elif self.pads:
            width = max(map(len, rows))
        width += -width % (self.pad_to_multiple_of or 1)
        encoding = BatchEncoding(input_ids=[self._pad(row, width, pad_token_id) for row in rows])
        if self.return_attention_mask is not False:
            encoding["attention_mask"] = [self._pad([1] * len(row), width, 0) for row in rows]
        return encoding if self.return_tensors is None else _to_arrays(encoding)

    def _pad(self, row: list[int], width: int, value: int) -> list[int]:
        padding = [value] * (width - len(row))
        return [*padding, *row] if self.padding_side == "left" else [*row, *padding]


def _to_arrays(encoding: BatchEncoding) -> BatchEncoding:
    lengths = sorted({len(row) for row in encoding.input_ids})
    if len(lengths) > 1:
        raise TokenizerError(f"the rows have {lengths[0]} to {lengths[-1]} tokens, which makes no array; padding=True")
    return BatchEncoding({key: np.array(rows, dtype=np.int64) for key, rows in encoding.items()})
