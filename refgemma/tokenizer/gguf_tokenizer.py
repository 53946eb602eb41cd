"""Read the tokenizer in the metadata of a GGUF file. Checked against the tokenizer.model from which the file was
made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.errors import RefgemmaError
from refgemma.files import one_line, pluralise, quote
from refgemma.gguf import read_gguf
from refgemma.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    TokenizerError,
    gemma_rest,
    write_model,
)

SPACE_MARK = "\u2581"  # how a piece writes a space; a GGUF file's user-defined pieces have the space itself
# Role of a token -> name of its id in a GGUF file, and Gemma's piece for the role if the file has no such id.
ROLE_KEYS = {"bos": ("bos", "<bos>"), "eos": ("eos", "<eos>"), "unk": ("unknown", "<unk>"), "pad": ("padding", "<pad>")}


def _read_pieces(about: Mapping[str, Any]) -> list[Piece]:
    """Return the pieces in the order of their ids."""
    names, scores, kinds = (about.get(key) for key in ("tokens", "scores", "token_type"))
    if about.get("model") != "llama" or not isinstance(names, list):
        raise RefgemmaError(f"has no SentencePiece vocabulary; its tokenizer.ggml.model is {quote(about.get('model'))}")
    if not all(isinstance(x, np.ndarray) and len(x) == len(names) for x in (scores, kinds)):
        raise RefgemmaError(f"has no scores and types for its {pluralise(len(names), 'token')}")
    if not np.isin(kinds, range(NORMAL, BYTE + 1)).all():  # type: ignore[arg-type]  # they are an array
        raise RefgemmaError(f"has token types that SentencePiece does not know; they must be {NORMAL} to {BYTE}")
    pieces = map(Piece, names, map(float, scores), map(int, kinds))  # type: ignore[arg-type]  # they are arrays
    return [p._replace(name=p.name.replace(" ", SPACE_MARK)) if p.type == USER_DEFINED else p for p in pieces]


def _name_roles(about: Mapping[str, Any], names: list[str]) -> dict[str, tuple[str, int]]:
    """Return piece and id for each role; a role without a token has the id -1."""
    found = {}
    for role, (key, usual) in ROLE_KEYS.items():
        token = about.get(f"{key}_token_id", names.index(usual) if usual in names else -1)
        if type(token) is not int or not -1 <= token < len(names):
            raise RefgemmaError(f"has {quote(token)} for tokenizer.ggml.{key}_token_id, which is not the id of a token")
        found[role] = (names[token], token) if token >= 0 else ("", -1)
    return found


def has_tokens(path: Path) -> bool:
    """Return True if a GGUF file has a vocabulary. (A file may be made for ids only.)"""
    return "tokenizer.ggml.tokens" in read_gguf(path, TokenizerError).metadata


def read_gguf_tokenizer(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the SentencePiece model in the metadata, and the parameters of `Tokenizer`.

    Raises
    ------
    TokenizerError
        If the file is damaged, or its vocabulary does not follow Gemma's conventions.
    """
    metadata = read_gguf(path, TokenizerError).metadata
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    with one_line(path, TokenizerError, "give a GGUF file with Gemma's tokenizer"):
        pieces = _read_pieces(about)
        if about.get("add_space_prefix") is True:
            raise RefgemmaError("adds a space before a text, unlike Gemma's tokenizer")
        roles = _name_roles(about, [piece.name for piece in pieces])
    settings: dict[str, Any] = {f"{role}_token": name for role, (name, token) in roles.items() if token >= 0}
    settings |= {key: about[key] for key in ("add_bos_token", "add_eos_token") if key in about}
    settings["extra_special_tokens"] = [piece.name for piece in pieces if piece.type == CONTROL]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return write_model(pieces, gemma_rest(**roles)), settings
