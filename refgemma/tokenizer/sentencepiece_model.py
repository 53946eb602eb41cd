"""Read the pieces of a SentencePiece model, and write a model from pieces.

Checked against the sentencepiece library: it reads the models written here, and finds the same pieces in its own files.

A model is a protobuf message. Field 1 is repeated, once per piece, and contains the name (1), the score (2) and the
type (3). The other fields say how to prepare text; they are copied unchanged.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

from refgemma.errors import RefgemmaError
from refgemma.files import quote

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the types of a piece
PIECES_LIMIT = 2**20  # ids: four times as many as Gemma's
_FLOAT = struct.Struct("<f")


class TokenizerError(RefgemmaError):
    """Raised for a tokenizer that is not Gemma's, an unknown id, an invalid chat, or an unsupported argument."""


class Piece(NamedTuple):
    """A piece of the vocabulary: `type` is a number such as `NORMAL`; SentencePiece merges the highest `score`
    first."""

    name: str
    score: float
    type: int


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number_field(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def gemma_rest(**roles: tuple[str, int]) -> bytes:
    """Return a model's fields after the pieces, with Gemma's conventions: BPE, byte pieces, no space added or removed.

    `roles` gives the name and id of ``unk``, ``bos``, ``eos`` and ``pad``; the id is -1 for a missing token.
    """
    trainer = _number_field(3, 2) + _number_field(35, 1)
    for n, role in enumerate(("unk", "bos", "eos", "pad")):
        name, token = roles[role]
        trainer += _number_field(40 + n, token % 2**64) + _message(45 + n, name.encode())
    return _message(2, trainer) + _message(
        3, _message(1, b"identity") + _number_field(3, 0) + _number_field(4, 0) + _number_field(5, 1)
    )


def write_model(pieces: Iterable[Piece], rest: bytes) -> bytes:
    """Return the bytes of a SentencePiece model, from `pieces` in the order of their ids and the other fields, `rest`.

    Examples
    --------
    >>> model = write_model([Piece("<unk>", 0.0, UNKNOWN)], gemma_rest(
    ...     unk=("<unk>", 0), bos=("<bos>", -1), eos=("<eos>", -1), pad=("<pad>", -1)))
    >>> read_model(model)[0]
    [Piece(name='<unk>', score=0.0, type=2)]
    """
    return b"".join([*(_write_piece(*piece) for piece in pieces), rest])


def _write_piece(name: str, score: float, kind: int) -> bytes:
    content = name.encode()
    if len(content) < 119:  # each length then fits in one byte: same result as below in a third of the time
        return b"\n%c\n%c%b\x15%b\x18%c" % (len(content) + 9, len(content), content, _FLOAT.pack(score), kind)
    return _message(1, _message(1, content) + b"\x15" + _FLOAT.pack(score) + _number_field(3, kind))


def read_model(model: bytes) -> tuple[list[Piece], bytes]:
    """Return the pieces of a SentencePiece model, and its other fields.

    Raises
    ------
    TokenizerError
        If `model` is not a SentencePiece model, or a name is not UTF-8.
    """
    pieces: list[Piece] = []
    rest, at = [], 0
    try:
        while at < len(model):
            if len(pieces) > PIECES_LIMIT:
                raise TokenizerError(f"has more than {PIECES_LIMIT} pieces; Gemma has 256000")
            if model[at] == 10 and (piece := _read_short_piece(model, at)):
                pieces.append(piece)
                at += 2 + model[at + 1]
                continue
            field, value, stop = _read_field(model, at, len(model))
            if field == 1:
                pieces.append(_read_piece(model, value, stop))
            else:
                rest.append(model[at:stop])
            at = stop
    except (IndexError, struct.error, UnicodeDecodeError):
        raise TokenizerError("is not a SentencePiece model, or is truncated") from None
    if odd := next((piece for piece in pieces if not NORMAL <= piece.type <= BYTE), None):
        raise TokenizerError(f"the type of piece {quote(odd.name)} is {odd.type}; it must be from {NORMAL} to {BYTE}")
    return pieces, b"".join(rest)


def _read_short_piece(model: bytes, at: int) -> Piece | None:
    """Return the piece at `at` if it has the usual form (short; name, score and type in this order), else ``None``."""
    stop, end = at + 2 + model[at + 1], at + 4 + model[at + 3]
    if model[at + 1] > 127 or model[at + 2] != 10 or model[end] != 0x15 or stop - end not in (5, 7):
        return None
    kind = model[end + 6] if stop - end == 7 and model[end + 5] == 24 else NORMAL
    return Piece(model[at + 4 : end].decode(), _FLOAT.unpack_from(model, end + 1)[0], kind)


def _read_piece(model: bytes, at: int, end: int) -> Piece:
    name, score, kind = "", 0.0, NORMAL
    while at < end:
        field, value, at = _read_field(model, at, end)
        if field == 1:
            name = model[value:at].decode()
        elif field == 2:
            (score,) = _FLOAT.unpack_from(model, value)
        elif field == 3:
            kind = _read_varint(model, value)[0]
    return Piece(name, score, kind)


def _read_varint(model: bytes, at: int) -> tuple[int, int]:
    """Return a number and the position after it."""
    number = model[at]
    if number < 128:
        return number, at + 1
    number, shift = number & 127, 7
    while True:
        at += 1
        number |= (model[at] & 127) << shift
        if model[at] < 128:
            return number, at + 1
        shift += 7


def _read_field(model: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Return the number of the field at `at`, and the start and end of its value."""
    tag, value = _read_varint(model, at)
    match tag & 7:
        case 0:
            stop = _read_varint(model, value)[1]
        case 1:
            stop = value + 8
        case 2:
            length, value = _read_varint(model, value)
            stop = value + length
        case 5:
            stop = value + 4
        case _:
            raise IndexError
    if stop > end:
        raise IndexError
    return tag >> 3, value, stop
