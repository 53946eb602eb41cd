"""Read and write a ``tokenizer.json`` that follows Gemma's conventions.

Checked against the tokenizers library 0.23: it reads the files written here, and gives the same ids and texts for the
released file.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from refgemma.errors import RefgemmaError
from refgemma.files import JSON_LIMIT, parse_object, quote
from refgemma.tokenizer.added_tokens import SPACE, AddedToken, read_added_token
from refgemma.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    PIECES_LIMIT,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    TokenizerError,
    gemma_rest,
)
from refgemma.tokenizer.vocabulary import BYTES, TokenizerFile, Vocabulary

# The parts of a tokenizer.json that are the same in all Gemma files.
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PRE_TOKENIZER = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
MODEL = {
    "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
}  # fmt: skip
# The end of errors about incomplete merges.
OTHERS = ", unlike in a file made from a SentencePiece model; encode with the tokenizers library and give ids"


def read_tokenizer_json(name: str, content: bytes) -> TokenizerFile:
    """Read a ``tokenizer.json`` as a SentencePiece model with the same pieces, scored by the order of the merges.

    Raises
    ------
    TokenizerError
        If the file is not a tokenizer.json, or differs from Gemma's conventions; the message names the part.
    """
    try:
        if len(content) > JSON_LIMIT:
            raise RefgemmaError(f"is {len(content)} bytes long; a model's JSON file has at most {JSON_LIMIT}")
        found = parse_object(content)
        _check_kind(found)
        model = found["model"]
        ids = _read_ids(model)
        added = _read_added(found)
        tokens = [token for _, token in added]
        pieces = _make_pieces(ids, _rank_merges(model, ids, tokens), tokens, model.get("unk_token"))
        settings = _read_settings(found)
    except RefgemmaError as error:
        raise TokenizerError(f"{name}: {error}") from None
    roles = {role: (f"<{role}>", ids.get(f"<{role}>", -1)) for role in ("bos", "eos", "pad")}
    unk = model.get("unk_token") or "<unk>"
    rest = gemma_rest(unk=(unk, ids.get(unk, -1)), **roles)
    return TokenizerFile(name, content, pieces, rest, added, settings, has_tab="<0x09>" not in ids)


def _check_kind(found: Mapping[str, Any]) -> None:
    """Raise an error unless the file cuts and joins text as Gemma's tokenizer does."""
    model = found.get("model")
    if not isinstance(model, dict):
        raise TokenizerError("has no entry model, so it is not a tokenizer.json")
    for part, value, known in (
        ("normalizer", found.get("normalizer"), (NORMALIZER,)),
        ("pre_tokenizer", found.get("pre_tokenizer"), (PRE_TOKENIZER, None)),
        ("decoder", found.get("decoder"), (DECODER,)),
    ):
        if value not in known:
            raise TokenizerError(
                f"the {part} is {quote(value)}, which differs from Gemma's; give Gemma's tokenizer.json"
            )
    for key, value in MODEL.items():
        given = model.get(key, value)
        if key == "byte_fallback" or (key == "unk_token" and (given is None or isinstance(given, str))):
            continue
        if given != value and not (key.endswith("fix") and given == ""):
            raise TokenizerError(f"the model's {key} is {quote(given)}; it must be {value!r}, as in Gemma's tokenizer")


def _read_ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the vocabulary; check that its ids are 0, 1, 2, ... in any order."""
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not ids or len(ids) > PIECES_LIMIT:
        raise TokenizerError(f"the model's vocab must be an object with 1 to {PIECES_LIMIT} pieces")
    if {type(token) for token in ids.values()} != {int} or sorted(ids.values()) != list(range(len(ids))):
        raise TokenizerError(f"the ids of the vocab must be 0 to {len(ids) - 1}, each once")
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        raise TokenizerError("a piece of the vocab holds half a surrogate pair, which is not a character") from None
    return ids


def _read_added(found: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Return the added tokens with their ids."""
    entries = found.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str)
        for entry in entries
    ):
        raise TokenizerError("added_tokens must be a list of tokens, each with an id and a content")
    return [(entry["id"], read_added_token(entry)) for entry in entries if entry["content"]]


def _read_merges(model: Mapping[str, Any]) -> list[str]:
    """Return the merges as two pieces with a space between. (A file has either this form or pairs.)"""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError("the model has no list of merges")
    found = []
    for merge in merges:
        try:
            found.append(merge if type(merge) is str else " ".join([*merge]))
        except TypeError:
            found.append("")
        if found[-1].count(" ") != 1:
            raise TokenizerError(f"one of the merges is {quote(merge)}; it must be two pieces")
    return found


def _rank_merges(model: Mapping[str, Any], ids: Mapping[str, int], added: Iterable[AddedToken]) -> dict[str, int]:
    """Return the rank of each merged piece in the order of the merges.

    SentencePiece joins any two pieces whose concatenation is a piece. So the file must list all possible merges of each
    piece, one after another. For a piece that is always found in the text first, the list may be incomplete.
    """
    merges = _read_merges(model)
    wholes = [merge.replace(" ", "") for merge in merges]
    ranks = {whole: place for place, whole in enumerate(dict.fromkeys(wholes))}
    parts = {part for merge in merges for part in merge.split(" ")}
    if unknown := (parts | ranks.keys()) - ids.keys():
        raise TokenizerError(f"the merges have the piece {quote(min(unknown))}, which is not in the vocab")
    turns = Counter(whole for whole, _ in groupby(wholes))  # the order does not matter in runs of one character
    if len(set(merges)) < len(merges) or any(turns[whole] > 1 < len(set(whole)) for whole in turns):
        raise TokenizerError(f"the merges of each piece must follow one another, each once{OTHERS}")
    unmade = {token.content for token in added if len(token.content) > 1 and token.content not in ranks}
    first = {token.content for token in added if not token.single_word and SPACE not in token.content}
    free = ids.keys() - BYTES.keys() - unmade
    lacking = _find_lacking(merges, free, free)
    if found := _find_lacking(merges, free - first, lacking - first):
        raise TokenizerError(f"a merge that makes {quote(min(found))} is missing{OTHERS}")
    return {piece: place for piece, place in ranks.items() if piece not in lacking & first}


def _find_lacking(merges: Iterable[str], free: set[str], pieces: set[str]) -> set[str]:
    """Return the `pieces` that two pieces of `free` form without a merge in the list."""
    if not pieces:
        return set()
    numbers = Counter([merge.replace(" ", "") for merge in merges if free.issuperset(merge.split(" "))])
    lacking = set()
    for piece in pieces:
        number = 0
        for n in range(1, len(piece)):
            if piece[:n] in free and piece[n:] in free:
                number += 1
        if number != numbers[piece]:
            lacking.add(piece)
    return lacking


def _make_pieces(
    ids: Mapping[str, int], ranks: Mapping[str, int], added: Iterable[AddedToken], unk: str | None
) -> list[Piece]:
    """Return the pieces by id; a text can only give merged pieces, single characters and bytes."""
    kinds = dict.fromkeys(BYTES, BYTE) | {unk or "<unk>": UNKNOWN}
    for token in added:
        if token.content not in ranks and len(token.content) > 1:
            kinds.setdefault(token.content, CONTROL if token.special else USER_DEFINED)
    if "<0x09>" not in ids and "<0x0A>" in ids and "\t" in ids:
        kinds["\t"] = BYTE
    pieces = [Piece("", 0.0, NORMAL)] * len(ids)
    for name, number in ids.items():
        kind = kinds.get(name, NORMAL)
        score = -float(ranks.get(name, len(ranks) + 1)) if kind == NORMAL else 0.0
        pieces[number] = Piece("<0x09>" if name == "\t" and kind == BYTE else name, score, kind)
    if sum(piece.type == UNKNOWN for piece in pieces) != 1:
        raise TokenizerError(f"the vocab has no {unk or '<unk>'}, so this is not Gemma's tokenizer")
    return pieces


def _read_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that the post-processor adds, and the sides on which texts are padded and cut."""
    settings: dict[str, Any] = {"before": [], "after": []}
    for key, name in (("padding", "padding_side"), ("truncation", "truncation_side")):
        if isinstance(given := found.get(key), dict) and isinstance(side := given.get("direction"), str):
            settings[name] = side.lower()
    processor = found.get("post_processor")
    if processor is None:
        return settings
    single = _read_template(processor, "single")
    if "A" not in single or single.index("A") > 1 or len(single) - single.index("A") > 2:
        raise TokenizerError(f"the post_processor writes {quote(single)}; it must write <bos>, a text and <eos>")
    place = single.index("A")
    settings["before"], settings["after"] = single[:place], single[place + 1 :]
    return settings


def _read_template(processor: Any, name: str) -> list[str]:
    """Return the tokens of a template, with "A" or "B" for the texts."""
    try:
        if processor["type"] != "TemplateProcessing":
            raise TypeError
        parts: list[str] = [
            part["Sequence"]["id"] if "Sequence" in part else part["SpecialToken"]["id"] for part in processor[name]
        ]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError
    except (KeyError, TypeError, IndexError):
        raise TokenizerError(f"the post_processor is {quote(processor)}; it must be a TemplateProcessing") from None
    return parts


# ---- writing


def write_tokenizer_json(vocabulary: Vocabulary, before: Sequence[str], after: Sequence[str]) -> bytes:
    """Return the bytes of a ``tokenizer.json``; with it the tokenizers library gives the same ids.

    `before` and `after` are the tokens before and after a text.
    """
    found = parse_object(vocabulary.file.content) if vocabulary.file.is_json else _make_json(vocabulary)
    found["added_tokens"] = [
        {"id": vocabulary.ids[name], "content": name} | token.flags | {"special": name in vocabulary.special}
        for name, token in sorted(vocabulary.added.items(), key=lambda item: vocabulary.ids[item[0]])
    ]
    found["post_processor"] = {
        "type": "TemplateProcessing",
        "single": _write_template(before, "A", after, 0),
        "pair": _write_template(before, "A", after, 0) + _write_template(before, "B", after, 1),
        "special_tokens": {
            name: {"id": name, "ids": [vocabulary.ids[name]], "tokens": [name]} for name in [*before, *after]
        },
    }
    found["truncation"] = found["padding"] = None
    return (json.dumps(found, ensure_ascii=False) + "\n").encode()


def _write_template(before: Sequence[str], text: str, after: Sequence[str], type_id: int) -> list[dict[str, Any]]:
    def token(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": type_id}}

    return [*map(token, before), {"Sequence": {"id": text, "type_id": type_id}}, *map(token, after)]


def _make_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Make a tokenizer.json from a SentencePiece model; merges are all pairs that form a piece, highest score first."""
    names = vocabulary.names[: vocabulary.base]
    scores = {
        name: float(len(name)) if piece.type == USER_DEFINED else piece.score
        for name, piece in zip(names, vocabulary.file.pieces, strict=True)
        if piece.type == NORMAL or (piece.type == USER_DEFINED and len(set(name)) == 1)
    }
    merges = []
    for name in sorted(scores, key=lambda name: -scores[name]):
        splits = [(name[:n], name[n:]) for n in range(1, len(name))]
        pairs = [pair for pair in splits if pair[0] in scores and pair[1] in scores]
        merges += sorted(pairs, key=lambda pair: (vocabulary.ids[pair[0]], vocabulary.ids[pair[1]]))
    unk = next(piece.name for piece in vocabulary.file.pieces if piece.type == UNKNOWN)
    bytes_there = BYTES.keys() - {"<0x09>"} <= vocabulary.ids.keys()
    model = MODEL | {"unk_token": unk, "byte_fallback": bytes_there}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": NORMALIZER,
        "pre_tokenizer": PRE_TOKENIZER, "post_processor": None, "decoder": DECODER,
        "model": model | {"vocab": {name: token for token, name in enumerate(names)}, "merges": merges},
    }  # fmt: skip
