"""Find added tokens in a text before the rest is cut into pieces. Checked against the tokenizers library 0.23."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from refgemma.files import quote
from refgemma.tokenizer.sentencepiece_model import TokenizerError

SPACE = "\u2581"  # how a piece writes a space
# White space as Unicode defines it; Python's own definition also includes U+001C to U+001F.
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
ADDED_LIMIT = 2**14  # added tokens in a file; Gemma's file has a sixtieth of this
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text wherever its content occurs.

    Parameters
    ----------
    content : str
        The text of the token.
    single_word : bool
        If true, the token is not found inside a word.
    lstrip, rstrip : bool
        If true, white space before or after the token becomes part of it.
    special : bool
        If true, the token steers the model: decoding can leave it out, and `split_special_tokens` makes it plain text.
    normalized : bool
        If true, a space and U+2581 count as the same character. By default true, unless `special`.

    Examples
    --------
    >>> AddedToken("<tool>").normalized, AddedToken("<tool>", special=True).normalized
    (True, False)
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            raise TokenizerError(f"an added token is {quote(self.content)}; it must be a string")
        object.__setattr__(self, "_is_open", self.normalized is None)
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        """Return the text."""
        return self.content

    @property
    def flags(self) -> dict[str, bool]:
        """All fields except the content, as files write them."""
        return {name: bool(getattr(self, name)) for name in FLAGS}


def make_special(token: AddedToken) -> AddedToken:
    """Return the token with `special` set; `normalized` becomes false unless it was set."""
    given = None if getattr(token, "_is_open", False) else token.normalized
    return token if token.special else replace(token, special=True, normalized=given)


def read_added_token(found: Any, special: bool = True) -> AddedToken:
    """Return the token that a file or caller gives as a text or as a mapping; `special` is used for a text.

    Examples
    --------
    >>> read_added_token({"content": "<tool>", "special": False, "normalized": False}).special
    False
    """
    if isinstance(found, AddedToken):
        return found
    if isinstance(found, Mapping) and "content" in found:
        flags = {name: found[name] for name in FLAGS if found.get(name) is not None}
        if wrong := [name for name, value in flags.items() if not isinstance(value, bool)]:
            raise TokenizerError(f"{wrong[0]} of an added token is {quote(flags[wrong[0]])}; it must be true or false")
        return AddedToken(found["content"], **flags)
    if isinstance(found, str):
        return AddedToken(found, special=special)
    if (content := getattr(found, "content", None)) is not None:  # an AddedToken of the tokenizers library
        if special:  # that library also sets `special`, which gives the default of `normalized`
            found.special = True
        return AddedToken(content, **{name: bool(getattr(found, name)) for name in FLAGS})
    raise TokenizerError(f"an added token is {quote(found)}; it must be a string")


def _is_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"


class Splitter:
    """Find `tokens` in a text from left to right; at each position, find the longest.

    Parameters
    ----------
    tokens : collection of AddedToken
        The tokens to find. Tokens with `normalized` are found last, in the remaining text.
    special : collection of str
        The contents of the special tokens; a call can treat these as plain text.

    Examples
    --------
    >>> splitter = Splitter([AddedToken("<a>", special=True), AddedToken("<ab>")], ["<a>"])
    >>> splitter.split("x<ab> <a>")
    [(None, 0, 1), ('<ab>', 1, 5), (None, 5, 6), ('<a>', 6, 9)]
    >>> splitter.split("x<ab> <a>", leave_special=True)
    [(None, 0, 1), ('<ab>', 1, 5), (None, 5, 9)]
    """

    def __init__(self, tokens: Collection[AddedToken], special: Collection[str]) -> None:
        self._special = frozenset(special)
        written = {token.content: token for token in tokens if not token.normalized and token.content}
        spaced = {token.content.replace(" ", SPACE): token for token in tokens if token.normalized and token.content}
        self._passes = [(found, _compile(found)) for found in (written, spaced) if found]
        self._any_spaced = bool(spaced)

    def split(self, text: str, leave_special: bool = False) -> list[tuple[str | None, int, int]]:
        """Return the parts of a text: each with its token's content (``None`` for other text), start and end."""
        parts: list[tuple[str | None, int, int]] = [(None, 0, len(text))] if text else []
        for tokens, pattern in self._passes:
            if self._any_spaced and tokens is self._passes[-1][0]:
                text = text.replace(" ", SPACE)
            if len(parts) == 1 and not parts[0][0]:
                parts = self._find(text, 0, len(text), tokens, pattern, leave_special)
                continue
            whole, parts = parts, []
            for part in whole:
                parts += [part] if part[0] else self._find(text, *part[1:], tokens, pattern, leave_special)
        return parts

    def _find(
        self, text: str, done: int, end: int, tokens: dict[str, AddedToken], pattern: re.Pattern[str],
        leave_special: bool,
    ) -> list[tuple[str | None, int, int]]:  # fmt: skip
        parts: list[tuple[str | None, int, int]] = []
        begin = done
        for match in pattern.finditer(text, done, end):
            token = tokens[match[0]]
            start, stop = match.span()
            if leave_special and token.content in self._special:
                continue
            if token.single_word and (
                (start > begin and _is_word(text[start - 1])) or (stop < end and _is_word(text[stop]))
            ):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip(WHITE))
            if token.rstrip:
                stop = end - len(text[stop:end].lstrip(WHITE))
            if done < start:
                parts.append((None, done, start))
            if start < stop:  # a token that takes white space can leave nothing for the next token
                parts.append((token.content, start, stop))
            done = stop
        return [*parts, (None, done, end)] if done < end else parts


def _compile(contents: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))
