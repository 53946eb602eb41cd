"""The pieces of a Gemma ``tokenizer.model``: plain text to ids, ids to pieces, ids to text. Checked against what
transformers 5.23 makes of the same file."""

import re
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece

from refgemma.files import LFS_POINTER
from refgemma.tokenizer.sentencepiece_model import TokenizerError

__all__ = ["TokenizerError", "Vocabulary", "check_text"]

SPACE = "\u2581"  # how a piece writes a space


def _read_model(model_file: str | Path) -> bytes:
    try:
        model = Path(model_file).read_bytes()
    except OSError as error:
        raise TokenizerError(f"{model_file}: cannot be read: {error.strerror}; give a Gemma tokenizer.model") from None
    if model.startswith(LFS_POINTER):
        raise TokenizerError(f"{model_file}: is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if not model:  # SentencePiece takes no bytes for no model, and then answers every question with a default
        raise TokenizerError(f"{model_file}: is empty; download it again")
    return model


def _hide_piece(model: bytes, piece: str) -> bytes:
    """Return `model` with `piece` made a control piece, if it was user-defined.

    SentencePiece finds user-defined pieces in any text, and control pieces in none. In the file a piece is its name,
    its score and its type: the fields 1, 2 and 3 of a protobuf message, in which 4 is user-defined and 3 control.
    """
    name = piece.encode()
    if len(name) > 127:  # its length takes more than a byte; that it is found in text after all is seen below
        return model
    head = rb"\n" + re.escape(bytes([len(name)]) + name) + rb"\x15.{4}\x18"
    return re.sub(b"(" + head + rb")\x04", lambda found: found[1] + b"\x03", model, count=1, flags=re.DOTALL)


def _decode_bytes(utf8: bytes) -> str:
    """Return the characters of `utf8`; if it is not UTF-8, U+FFFD for each byte, as transformers does."""
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(utf8)


def check_text(text: object) -> str:
    """Refuse what is no string, or holds half a surrogate pair, which is no character."""
    if not isinstance(text, str):
        raise TokenizerError(f"text is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python reads a byte that is no UTF-8 as one of these, from the command line for instance.
        byte = f"the byte 0x{code - 0xDC00:02X}, which is no UTF-8"
        what = byte if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        raise TokenizerError(f"text: character {error.start} is U+{code:04X}, {what}") from None
    return text


class Vocabulary:
    """The pieces and their ids. Of `special`, those that the file has are never found in a text.

    Parameters
    ----------
    model_file : str or Path
        A ``tokenizer.model``.
    special : iterable of str
        Pieces that steer the model.

    Attributes
    ----------
    content : bytes
        The file as it is.
    special : dict of str to int
        The ids of the special pieces that the file has.

    Raises
    ------
    TokenizerError
        If the file cannot be read, is no SentencePiece model, or does not follow Gemma's conventions.

    Examples
    --------
    >>> from importlib.resources import files
    >>> vocabulary = Vocabulary(files("refgemma") / "checkpoints/tiny/tokenizer.model", ["<bos>", "<end_of_turn>"])
    >>> vocabulary.pieces(vocabulary.encode("the<end_of_turn>"))[:2], vocabulary.id_of("<end_of_turn>")
    (['the', '<0x3C>'], 6)
    """

    def __init__(self, model_file: str | Path, special: Iterable[str]) -> None:
        self.content = model = _read_model(model_file)
        names = list(special)
        for piece in names:
            model = _hide_piece(model, piece)
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._model.id_to_piece(list(range(len(self))))  # a damaged piece is no text: not later, in mid-sentence
        except (RuntimeError, UnicodeError):
            raise TokenizerError(
                f"{model_file}: is no SentencePiece model, or is cut short; give tokenizer.model, not tokenizer.json"
            ) from None
        # Gemma puts no space before a text and keeps every space. A model that does otherwise (SentencePiece's default)
        # would slip a space in after each turn marker, which nobody sees in the decoded text.
        probe = "a  b "
        if "".join(self._model.encode(probe, out_type=str)).replace(SPACE, " ") != probe:
            raise TokenizerError(
                f"{model_file}: adds or removes spaces, which Gemma's tokenizer does not; it is another's"
            )
        self.special = {piece: token for piece in names if (token := self.id_of(piece)) is not None}
        for piece, token in self.special.items():
            # Without byte pieces, which Gemma has, any character may be unknown: that is no special token of the text.
            if token != self._model.unk_id() and token in self._model.encode(piece):
                raise TokenizerError(f"{model_file}: {piece} is an ordinary piece in it, which any text may contain")

    def __len__(self) -> int:
        """Return the number of ids."""
        return int(self._model.get_piece_size())

    def id_of(self, piece: str) -> int | None:
        """Return the id of `piece`; ``None`` if there is no such piece."""
        token: int = self._model.piece_to_id(piece)  # of a piece that the model lacks: the id of <unk>
        return token if self._model.id_to_piece(token) == piece else None

    def is_byte(self, token: int) -> bool:
        """Tell whether `token` stands for one byte of a character that has no piece."""
        return bool(self._model.is_byte(token))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Name the piece of each id."""
        return [self._model.id_to_piece(token) for token in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that `ids` stand for; special pieces are written out."""
        runs = ((byte, self.pieces(run)) for byte, run in groupby(ids, key=self.is_byte))
        return "".join(
            _decode_bytes(bytes(int(piece.strip("<>"), 16) for piece in run))
            if byte
            else "".join(run).replace(SPACE, " ")
            for byte, run in runs
        )

    @cached_property
    def _runs(self) -> list[int]:
        """The ids of one space, two, three, ... as long as there is a piece: 31 in Gemma, 8 in the tiny model."""
        ids: list[int] = []
        while (token := self.id_of(SPACE * (len(ids) + 1))) is not None:
            ids.append(token)
        return ids

    def _encode_run(self, length: int) -> list[int]:
        """Encode a run of `length` spaces, longer than the longest piece: put together from two pieces at a time.

        transformers does so, the shortest results first and of those the shortest left halves, where SentencePiece
        takes the longest piece as often as it can.
        """
        parts = [1] * length
        for size in range(2, len(self._runs) + 1):
            for left in range(1, size):
                if {left, size - left} <= set(parts):
                    parts = _join(parts, left, size - left)
        return [self._runs[part - 1] for part in parts]

    def encode(self, text: str) -> list[int]:
        """Encode `text`, all of it plain: no id is one of `special`.

        transformers' ids, which differ from SentencePiece's in long runs of spaces (see `_encode_run`) and in that
        U+2581, if the text itself has several of them, does not go together with spaces beside it.
        """
        longest = len(self._runs)
        if longest < 2:
            return list(self._model.encode(text))
        ids = []
        for n, part in enumerate(re.split(f"({SPACE}{{2,{longest}}})", text)):
            if n % 2:
                ids.append(self._runs[len(part) - 1])
                continue
            for m, words in enumerate(re.split(f"([ {SPACE}]{{{longest + 1},}})", part)):
                ids += self._encode_run(len(words)) if m % 2 else self._model.encode(words)
        return ids


def _join(parts: list[int], left: int, right: int) -> list[int]:
    """Return `parts` with each `left` before a `right` made one, beginning with the first."""
    joined, n = [], 0
    while n < len(parts):
        pair = parts[n : n + 2] == [left, right]
        joined.append(left + right if pair else parts[n])
        n += 2 if pair else 1
    return joined
