"""Cut, pad and join rows of ids as the arguments of transformers 5.23 ask. Checked against transformers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from refgemma.files import pluralise
from refgemma.tokenizer.sentencepiece_model import TokenizerError

# The default of model_max_length; a length counts as a limit only below LIMITED. Both as in transformers.
UNLIMITED, LIMITED = int(1e30), int(1e20)
SIDES = ("left", "right")
Cell = TypeVar("Cell")  # an id, or a Token with its position in the text

# Argument that transformers documents -> why a true value is refused here.
UNSUPPORTED = {
    "text_target": "Gemma's labels are the input_ids",
    "text_pair_target": "Gemma's labels are the input_ids",
}


def refuse(others: Mapping[str, Any]) -> None:
    """Raise an error for each unknown argument, and for a true value of an argument in `UNSUPPORTED`."""
    for name, value in others.items():
        if name not in UNSUPPORTED and name != "verbose":
            raise TokenizerError(f"unexpected keyword argument {name!r} (its value is {value!r})")
        if value and name != "verbose":
            raise TokenizerError(f"{name}={value!r} is not supported: {UNSUPPORTED[name]}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise an error if `value` is not among `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise TokenizerError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def check_positive(name: str, value: Any) -> None:
    """Raise an error unless `value` is ``None`` or a whole number of at least 1."""
    if value is not None and (type(value) is not int or value < 1):
        raise TokenizerError(f"{name} is {value!r}; it must be a whole number of at least 1")


class Token(NamedTuple):
    """An id with its origin: the span of its characters, its part of the text, and the text's number in a pair."""

    id: int
    name: str
    start: int = 0
    end: int = 0
    word: int | None = None
    sequence: int | None = None
    special: int = 1
    type: int = 0  # number of the text in a pair; special tokens have one too


class BatchEncoding(dict[str, Any]):
    """The result of a tokenizer: a dict whose entries are also attributes.

    Examples
    --------
    >>> inputs = BatchEncoding(input_ids=[2, 300], attention_mask=[1, 1])
    >>> inputs.input_ids is inputs["input_ids"], dict(**inputs) == inputs
    (True, True)
    """

    _follow: Callable[[], list[list[Token]]] | None = None  # encodes the rows again, with each token's origin

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            raise TokenizerError(
                f"inputs[{key}] is not supported, because a row is not an object; write inputs['input_ids'][n], "
                "inputs.tokens(n), inputs.word_ids(n) or inputs.token_to_chars(n, place)"
            )
        return super().__getitem__(key)

    @property
    def data(self) -> dict[str, Any]:
        """The entries as a plain dict."""
        return dict(self)

    def to(self, device: Any = None, **others: Any) -> "BatchEncoding":
        """Return this object unchanged, because refgemma only uses the CPU.

        Raises
        ------
        TokenizerError
            If `device` is not the CPU.
        """
        if device is not None and str(device).partition(":")[0] != "cpu":
            raise TokenizerError(f"device {str(device)!r} is not supported: refgemma computes on the CPU; leave it out")
        return self

    def _row(self, row: int) -> list[Token]:
        if self._follow is None:
            raise TokenizerError("the text of these ids is unknown; call the tokenizer with the text")
        rows = self._follow()
        if not 0 <= row < len(rows):
            raise TokenizerError(f"row {row} does not exist; the batch has {pluralise(len(rows), 'row')}")
        return rows[row]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Return the names of the pieces in a row; an added token's name is its text in the input."""
        return [token.name for token in self._row(batch_index)]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return the number of the text's part for each id of a row; added tokens separate parts, spaces do not.

        Examples
        --------
        >>> import refgemma
        >>> refgemma.Tokenizer.from_pretrained("tiny")("the cat<end_of_turn>").word_ids()
        [None, 0, 0, 1]
        """
        return [token.word for token in self._row(batch_index)]

    def mask_spans(self, spans: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
        """Return 1 for each id with a character within one of the `spans` of its row, 0 for each other id."""
        rows = zip((self._row(n) for n in range(len(spans))), spans, strict=True)
        return [
            [int(any(token.start < stop and token.end > start for start, stop in places)) for token in row]
            for row, places in rows
        ]

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return the number of the text (0 or 1) for each id of a row, and ``None`` for ``<bos>`` and padding."""
        return [token.sequence for token in self._row(batch_index)]

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> tuple[int, int] | None:
        """Return the start and end of a token's characters, given row and token index; one number is an index in row
        0."""
        row, place = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        token = self._row(row)[place]
        return None if token.sequence is None else (token.start, token.end)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the index of a character's token, given row and character index; one number is an index in row 0."""
        row, place = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        for n, token in enumerate(self._row(row)):
            if token.sequence == sequence_index and token.start <= place < token.end:
                return n
        return None


@dataclass(frozen=True)
class Layout:
    """The settings for cutting and padding rows; `refgemma.tokenizer.tokenizer.Tokenizer` explains the fields.

    Raises
    ------
    TokenizerError
        For an unknown value, or values that contradict each other.

    Examples
    --------
    >>> Layout(padding=True).batch([[2, 300], [2]], pad=0)
    {'input_ids': [[2, 300], [0, 2]], 'attention_mask': [[1, 1], [0, 1]]}
    """

    padding: bool | str = False
    truncation: bool | str | None = None
    max_length: int | None = None
    stride: int = 0
    pad_to_multiple_of: int | None = None
    padding_side: str = "left"
    truncation_side: str = "right"
    return_tensors: str | None = None
    return_attention_mask: bool | None = None
    return_token_type_ids: bool | None = None
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    return_overflowing_tokens: bool = False

    def __post_init__(self) -> None:
        check_choice("padding", self.padding, (False, True, "longest", "max_length", "do_not_pad"))
        check_choice(
            "truncation",
            self.truncation,
            (None, False, True, "longest_first", "only_first", "only_second", "do_not_truncate"),
        )
        check_choice("padding_side", self.padding_side, SIDES)
        check_choice("truncation_side", self.truncation_side, SIDES)
        check_positive("max_length", self.max_length)
        check_positive("pad_to_multiple_of", self.pad_to_multiple_of)
        if self.stride:
            check_positive("stride", self.stride)
        if self.return_tensors not in (None, "np"):
            raise TokenizerError(
                f"return_tensors is {self.return_tensors!r}; it must be 'np', because refgemma uses NumPy: "
                "convert the arrays with the other library"
            )
        if self.max_length is not None and not self.truncates and self.padding != "max_length":
            warnings.warn(
                f"max_length={self.max_length} has no effect with padding={self.padding!r} and truncation="
                f"{self.truncation!r}; set truncation=True or padding='max_length'",
                stacklevel=5,  # the line that called the tokenizer
            )
        multiple = self.pad_to_multiple_of or 1
        if self.truncates and self.pads and self.max_length is not None and self.max_length % multiple:
            raise TokenizerError(
                f"max_length is {self.max_length}; it must be a multiple of pad_to_multiple_of, {multiple}"
            )

    @property
    def pads(self) -> bool:
        """True if rows are padded."""
        return self.padding not in (False, "do_not_pad")

    @property
    def truncates(self) -> bool:
        """True if rows are cut. If `truncation` is not given, rows are cut if `max_length` is given and rows are not
        padded."""
        if self.truncation is None:
            return self.max_length is not None and self.padding is False
        return self.truncation not in (False, "do_not_truncate")

    @property
    def follows(self) -> bool:
        """True if an output needs each token's origin."""
        return bool(self.return_offsets_mapping or self.return_special_tokens_mask or self.return_token_type_ids)

    def cut(self, texts: Sequence[list[Cell]], reserved: int = 0) -> list[list[list[Cell]]]:
        """Cut the one or two `texts` of a row to `max_length` ids, including those `reserved` for special tokens.

        Returns
        -------
        list
            The row. With `return_overflowing_tokens`, rows with the remaining ids follow; each repeats the last
            `stride` ids of the previous row.
        """
        if not self.truncates or self.max_length is None:
            return [list(texts)]
        space = self.max_length - reserved
        if space < 0:
            raise TokenizerError(
                f"max_length is {self.max_length}, less than the {reserved} special tokens; use a larger value, or set "
                "add_special_tokens=False"
            )
        if self.stride and self.stride >= space:
            raise TokenizerError(
                f"stride is {self.stride}; it must be below {space}, the number of ids that fit into max_length"
            )
        if len(texts) > 1:
            if self.return_overflowing_tokens:
                raise TokenizerError("return_overflowing_tokens is not supported for pairs; give one text per row")
            return [[self._cut(text, n) for text, n in zip(texts, self._share(texts, space), strict=True)]]
        if self.truncation == "only_second":
            raise TokenizerError("truncation='only_second' needs two texts per row; there is one")
        if not self.return_overflowing_tokens or len(texts[0]) <= space:
            return [[self._cut(texts[0], space)]]
        return [[window] for window in self._windows(texts[0], space)]

    def _cut(self, row: list[Cell], space: int) -> list[Cell]:
        return row[:space] if self.truncation_side == "right" else row[max(len(row) - space, 0) :]

    def _windows(self, row: list[Cell], space: int) -> list[list[Cell]]:
        if space == 0:
            return [[]]
        step, ends = space - self.stride, range(space, len(row) + space, space - self.stride)
        if self.truncation_side == "right":
            count = next(n for n, end in enumerate(ends) if end >= len(row)) + 1
            return [row[n * step : n * step + space] for n in range(count)]
        count = next(n for n, end in enumerate(ends) if end >= len(row)) + 1
        return [row[max(len(row) - n * step - space, 0) : len(row) - n * step] for n in range(count)]

    def _share(self, texts: Sequence[list[Cell]], space: int) -> list[int]:
        """Return how many ids of each of two texts to keep in `space`; same rule as in the tokenizers library."""
        lengths = [len(text) for text in texts]
        excess = sum(lengths) - space
        if excess <= 0:
            return lengths
        if self.truncation in ("only_first", "only_second"):
            n = int(self.truncation == "only_second")
            if lengths[n] <= excess:
                raise TokenizerError(
                    f"truncation={self.truncation!r} cannot cut {excess} ids from {lengths[n]}; raise max_length"
                )
            lengths[n] -= excess
            return lengths
        short = min(lengths)
        long = short if short > space else max(short, space - short)
        if short + long > space:
            short, long = space // 2, space // 2 + space % 2
        return [short, long] if lengths[0] <= lengths[1] else [long, short]

    def batch(self, rows: Sequence[Sequence[int | Token]], pad: int | None) -> BatchEncoding:
        """Pad `rows` with the id `pad`, and add the other requested entries."""
        if pad is None and self.pads:
            raise TokenizerError("this tokenizer has no pad_token; set one: tokenizer.pad_token = tokenizer.eos_token")
        followed = self.pad(rows, Token(pad or 0, "")) if self.follows else []
        columns: dict[str, Any] = {}
        if self.follows:
            columns["input_ids"] = [[token.id for token in row] for row in followed]
        else:
            columns["input_ids"] = self.pad(rows, pad)
        if self.return_token_type_ids:
            columns["token_type_ids"] = [[token.type for token in row] for row in followed]
        if self.return_attention_mask is not False:
            columns["attention_mask"] = self.pad([[1] * len(row) for row in rows], 0)
        if self.return_special_tokens_mask:
            columns["special_tokens_mask"] = [[token.special for token in row] for row in followed]
        if self.return_offsets_mapping:
            columns["offset_mapping"] = [[(token.start, token.end) for token in row] for row in followed]
        if self.return_length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        return BatchEncoding(columns)

    def pad(self, rows: Sequence[Sequence[Any]], value: Any) -> list[list[Any]]:
        """Pad `rows` with `value`."""
        width = 0
        if self.padding == "max_length":
            width = self.max_length or 0
        elif self.pads:
            width = max(map(len, rows))
        width += -width % (self.pad_to_multiple_of or 1)
        padding = [[value] * (width - len(row)) for row in rows]
        if self.padding_side == "left":
            return [[*more, *row] for more, row in zip(padding, rows, strict=True)]
        return [[*row, *more] for more, row in zip(padding, rows, strict=True)]


def to_arrays(encoding: BatchEncoding) -> BatchEncoding:
    """Return the entries as arrays of int64.

    Raises
    ------
    TokenizerError
        If the rows have different lengths.
    """
    lengths = sorted({len(row) for row in encoding.input_ids})
    if len(lengths) > 1:
        raise TokenizerError(f"the rows have {lengths[0]} to {lengths[-1]} tokens; set padding=True to make an array")
    return BatchEncoding({key: np.array(rows, dtype=np.int64) for key, rows in encoding.items()})
