"""Convert between plain text and the pieces and ids of a Gemma tokenizer.

Checked against the results of the tokenizers library with the released ``tokenizer.json``.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece

from refgemma.files import LFS_POINTER, read_file
from refgemma.tokenizer.added_tokens import SPACE, AddedToken, Splitter
from refgemma.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    TokenizerError,
    read_model,
    write_model,
)

__all__ = ["TokenizerError", "TokenizerFile", "Vocabulary", "check_text"]

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # byte pieces


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a ``tokenizer.model`` or a ``tokenizer.json``.

    `content` is the file's bytes; `pieces` and `rest` make its SentencePiece model. `added` has the added tokens, which
    are found in a text first, with their ids in the file. `settings` has parameters of
    `refgemma.tokenizer.tokenizer.Tokenizer`. `has_tab` is true if the piece of byte 9 is a tab, as in the released
    ``tokenizer.json``.
    """

    name: str
    content: bytes
    pieces: list[Piece]
    rest: bytes
    added: list[tuple[int, AddedToken]]
    settings: dict[str, Any] = field(default_factory=dict)
    has_tab: bool = True

    @property
    def is_json(self) -> bool:
        """True if the content is a ``tokenizer.json``."""
        return self.name.endswith(".json")


def read_sentencepiece(name: str, content: bytes) -> TokenizerFile:
    """Read a ``tokenizer.model``; its control and user-defined pieces become added tokens.

    Raises
    ------
    TokenizerError
        If `content` is not a SentencePiece model.
    """
    try:
        pieces, rest = read_model(content)
    except TokenizerError as error:
        raise TokenizerError(f"{name}: {error}; give a Gemma tokenizer.model or tokenizer.json") from None
    added = [
        (token, AddedToken(piece.name, normalized=False, special=piece.type == CONTROL))
        for token, piece in enumerate(pieces)
        if piece.type in (CONTROL, USER_DEFINED)
    ]
    return TokenizerFile(name, content, pieces, rest, added)


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a tokenizer's file.

    Raises
    ------
    TokenizerError
        If the file cannot be read, is empty or is a Git LFS pointer.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}; give a Gemma tokenizer.model") from None
    if content.startswith(LFS_POINTER):
        raise TokenizerError(f"{path}: is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if not content:  # SentencePiece would accept an empty model and use defaults
        raise TokenizerError(f"{path}: is empty; download it again")
    return content


def _decode_bytes(utf8: bytes) -> str:
    """Return the characters of `utf8`; if it is not valid UTF-8, return U+FFFD for each byte, as in transformers."""
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(utf8)


def join_pieces(names: Iterable[str]) -> str:
    """Return the text that pieces represent."""
    return "".join(
        _decode_bytes(bytes(BYTES[name] for name in run)) if byte else "".join(run).replace(SPACE, " ")
        for byte, run in groupby(names, key=BYTES.__contains__)
    )


def check_text(text: object) -> str:
    """Return `text`; raise an error if it is not a string or contains half a surrogate pair."""
    if not isinstance(text, str):
        raise TokenizerError(f"text is a {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python represents a byte that is not UTF-8 by such a code, for example in arguments of a command.
        byte = f"the byte 0x{code - 0xDC00:02X}, which is not UTF-8"
        what = byte if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        raise TokenizerError(f"text: character {error.start} is U+{code:04X}, {what}") from None
    return text


class Vocabulary:
    """The pieces with their ids, and the added tokens, which are found before a text is cut into pieces.

    Parameters
    ----------
    file : TokenizerFile
        The content of the tokenizer's file.
    special : iterable of str
        Pieces that steer the model; those in the file become added tokens.

    Attributes
    ----------
    names : list of str
        The piece of each id.
    ids : dict of str to int
        The id of each piece.
    added : dict of str to AddedToken
        The added tokens by content.
    special : dict of str to int
        The ids of the special tokens.
    skipped : set of int
        The ids that decoding leaves out on request.
    base : int
        Number of pieces in the file; tokens added later have higher ids.

    Raises
    ------
    TokenizerError
        If the file does not follow Gemma's conventions.

    Examples
    --------
    >>> from importlib.resources import files
    >>> path = files("refgemma") / "checkpoints/tiny/tokenizer.model"
    >>> vocabulary = Vocabulary(read_sentencepiece("tiny", path.read_bytes()), ["<bos>", "<end_of_turn>"])
    >>> vocabulary.encode("the<end_of_turn>"), len(vocabulary.encode("<end_of_turn>", leave_special=True))
    ([1035, 6], 9)
    """

    def __init__(self, file: TokenizerFile, special: Iterable[str]) -> None:
        self.file = file
        self.names = [piece.name for piece in file.pieces]
        self.ids = {name: token for token, name in enumerate(self.names)}
        self.base = len(self.names)
        if file.has_tab and (tab := self.ids.get("<0x09>")) is not None and "\t" not in self.ids:
            del self.ids["<0x09>"]
            self.names[tab], self.ids["\t"] = "\t", tab
        self._texts: list[str | None] = []
        self._extend_texts()
        self.special = {name: self.ids[name] for name in special if name in self.ids}
        self._model: Any = self._load_model(file)
        self.added: dict[str, AddedToken] = {}
        self.add([token for _, token in sorted(file.added, key=lambda entry: entry[0])])
        self.add([AddedToken(name, special=True) for name in self.special if name not in self.added])
        known = [(n, str(t), self.ids[str(t)]) for n, t in file.added if str(t)]  # an empty token is left out
        moved = [f"{name} has the id {token}, not {n}" for n, name, token in known if token != n]
        if moved:
            warnings.warn(
                f"{file.name}: {', '.join(moved[:3])}{', ...' * (len(moved) > 3)}: refgemma keeps the id of a piece, "
                "and gives "
                "a token that is not a piece the next free id, as in transformers",
                stacklevel=2,
            )

    @property
    def content(self) -> bytes:
        """The SentencePiece model of the file."""
        file = self.file
        return write_model(file.pieces, file.rest) if file.is_json else file.content

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of the file and the tokens added to it, as the pieces of one SentencePiece model."""
        more = [Piece(name, 0.0, CONTROL if name in self.special else USER_DEFINED) for name in self.names[self.base :]]
        return [
            piece._replace(type=USER_DEFINED) if piece.type == NORMAL and self._is_found(piece.name) else piece
            for piece in [*self.file.pieces, *more]
        ]

    def _is_found(self, name: str) -> bool:
        """Return True if a text can contain the added token `name`: it has no U+2581, or one that replaced a space."""
        if name not in self.added:
            return False
        return bool(self.added[name].normalized) or SPACE not in name or not name.strip(SPACE)

    def _load_model(self, file: TokenizerFile) -> Any:
        """Make the SentencePiece model for the text between added tokens, and check its conventions."""
        pieces = [self._change_type(piece) for piece in file.pieces]
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=write_model(pieces, file.rest))
            # Gemma adds no space before a text and keeps every space. SentencePiece's default would insert a space
            # after each turn marker, invisible in the decoded text.
            probe = "a  b "
            spaced = join_pieces([self.names[token] for token in model.encode(probe)])
        except (RuntimeError, UnicodeError):
            raise TokenizerError(
                f"{file.name}: is not a SentencePiece model, or is truncated; download it again"
            ) from None
        if spaced != probe:
            raise TokenizerError(
                f"{file.name}: this tokenizer adds or removes spaces; give Gemma's tokenizer, which keeps all spaces"
            )
        return model

    @staticmethod
    def _change_type(piece: Piece) -> Piece:
        """Return the piece; change the type of a user-defined piece, which SentencePiece would find in any text.

        The text between added tokens must not give such a piece. Runs of one character are an exception: SentencePiece
        must join runs of spaces as the tokenizers library does, taking the longest piece first.
        """
        name, _, kind = piece
        if kind != USER_DEFINED:
            return piece
        return Piece(name, float(len(name)), NORMAL) if len(set(name)) == 1 else piece._replace(type=CONTROL)

    def _extend_texts(self) -> None:
        new = self.names[len(self._texts) :]
        self._texts += [None if name in BYTES else name.replace(SPACE, " ") for name in new]

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.names)

    def add(self, tokens: Iterable[AddedToken]) -> int:
        """Add tokens; return how many are new or have new properties. A token that is not a piece gets the next id.

        A special token stays special. As in the tokenizers library, a token with normalised spaces has U+2581 in its
        name, and decoding never leaves it out.
        """
        number = 0
        for token in tokens:
            name = token.content
            if name and self.added.get(name) != token:
                if name not in self.ids:
                    self.ids[name] = len(self.names)
                    self.names.append(name)
                self.names[self.ids[name]] = name.replace(" ", SPACE) if token.normalized else name
                self.added[name] = token
                number += 1
            if name and token.special:
                self.special.setdefault(name, self.ids[name])
        self.skipped = {token for name, token in self.special.items() if self.names[token] == name}
        self._extend_texts()
        self._splitter = Splitter(self.added.values(), self.special)
        return number

    def is_byte(self, token: int) -> bool:
        """Return True if `token` is a byte piece: one byte of a character that has no piece."""
        return token < len(self._texts) and self._texts[token] is None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, including special pieces; unknown ids give no text."""
        texts = self._texts
        try:
            return "".join([texts[token] for token in ids])  # type: ignore[misc]
        except (TypeError, IndexError):  # some ids are bytes, or rows of the model without a token
            known = [token for token in ids if token < len(texts)]
        return join_pieces([self.names[token] for token in known])

    def encode(self, text: str, leave_special: bool = False) -> list[int]:
        """Encode `text`; if `leave_special`, treat special tokens as plain text."""
        parts = self._splitter.split(text, leave_special)
        plain = [text[start:stop] for content, start, stop in parts if content is None]
        if len(plain) == len(parts) == 1:
            return list(self._model.encode(text))
        rows = iter(self._model.encode(plain, num_threads=1))
        ids: list[int] = []
        for content, _, _ in parts:
            if content is None:
                ids += next(rows)
            else:
                ids.append(self.ids[content])
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encode `text` without looking for added tokens."""
        return list(self._model.encode(text))

    def follow(self, text: str, leave_special: bool = False) -> list[tuple[int, str, int, int, int]]:
        """Encode `text`, and return each id with the position of its characters.

        Returns
        -------
        list of tuple
            For each id: the id, its name (an added token's own text), start, end, and the number of its part of the
            text.
        """
        found = []
        for number, (content, start, stop) in enumerate(self._splitter.split(text, leave_special)):
            if content is not None:
                name = text[start:stop].replace(" ", SPACE) if self.added[content].normalized else text[start:stop]
                found.append((self.ids[content], name, start, stop, number))
                continue
            pending = 0  # missing bytes of the character at `start`
            for token in self._model.encode(text[start:stop]):
                if token == self._model.unk_id():
                    raise TokenizerError(
                        f"{self.file.name}: has no byte pieces, so the position of an unknown character cannot be found"
                    )
                name = self.names[token]
                if self.is_byte(token):
                    pending = (pending or len(text[start].encode())) - 1
                    found.append((token, name, start, start + 1, number))
                    start += not pending
                else:
                    found.append((token, name, start, start + len(name), number))
                    start += len(name)
        return found
