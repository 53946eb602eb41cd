"""Text to ids and back, the turns of a chat, and text as it is generated, on Gemma's SentencePiece model.

Checked against transformers 5.23 `GemmaTokenizer` built from the same file, and Gemma's chat template under Jinja.
"""

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, SupportsIndex

import sentencepiece

GIT_LFS_POINTER = b"version https://git-lfs"

# The role of a message -> the name that the model was trained to see.
ROLES = {"user": "user", "assistant": "model", "model": "model"}


class TokenizerError(ValueError):
    """A file that is no Gemma tokenizer, an id that it does not have, or messages that are no Gemma chat."""


def _read_model(model_file: str | Path) -> Any:
    """Give `model_file` to SentencePiece, after a look at what it is."""
    try:
        model = Path(model_file).read_bytes()
    except OSError as error:
        raise TokenizerError(f"{model_file}: cannot be read: {error.strerror}; give a Gemma tokenizer.model") from None
    if model.startswith(GIT_LFS_POINTER):
        raise TokenizerError(f"{model_file}: is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if not model:  # SentencePiece takes no bytes for no model, and then answers every question with a default
        raise TokenizerError(f"{model_file}: is empty; download it again")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise TokenizerError(
            f"{model_file}: is no SentencePiece model, or is cut short; give tokenizer.model, not tokenizer.json"
        ) from None
    # Gemma puts no space before a text and keeps every space. A model that does otherwise (SentencePiece's default)
    # would slip a space in after each turn marker, which nobody sees in the decoded text.
    probe = "a  b "
    if "".join(processor.encode(probe, out_type=str)).replace("\u2581", " ") != probe:
        raise TokenizerError(f"{model_file}: adds or removes spaces, which Gemma's tokenizer does not; it is another's")
    return processor


def _turns(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """Check `messages` and write what stands between the markers of each turn: role, newline, trimmed content."""
    if not isinstance(messages, Sequence):
        raise TokenizerError(f"messages is a {type(messages).__name__}, not a list of messages")
    if not messages:
        raise TokenizerError("messages is empty: a chat begins with a user's turn")
    turns = []
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(f"messages[{n}] is a {type(message).__name__}, not a dict with 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"is {message[key]!r}, not a string" if key in message else "is missing"
                raise TokenizerError(f"messages[{n}]: {key!r} {problem}")
        role, content = message["role"], message["content"]
        if role == "system":
            raise TokenizerError(f"messages[{n}]: System role not supported; put it into the first user's content")
        if role not in ROLES:
            raise TokenizerError(f"messages[{n}]: unknown role {role!r}; there are {', '.join(ROLES)}")
        if ROLES[role] != ("model" if n % 2 else "user"):
            raise TokenizerError(
                f"messages[{n}]: Conversation roles must alternate user/assistant/user/assistant/... but this is {role}"
            )
        turns.append(f"{ROLES[role]}\n{content.strip()}")
    return turns


class Tokenizer:
    """Gemma's tokenizer: SentencePiece pieces, byte pieces for what has none, and ids of its own for control.

    Parameters
    ----------
    model_file : str or Path
        The ``tokenizer.model`` of a checkpoint.

    Attributes
    ----------
    vocab_size : int
        Number of ids.
    pad_id, eos_id, bos_id, unk_id : int
        Ids of ``<pad>``, ``<eos>``, ``<bos>``, ``<unk>``.
    start_of_turn_id, end_of_turn_id : int or None
        Ids of the markers around a turn; ``None`` if the model has none.

    Raises
    ------
    TokenizerError
        If the file cannot be read, is no SentencePiece model, or does not follow Gemma's conventions.

    Notes
    -----
    All answers are SentencePiece's. transformers, which converts the same file, differs from them in three ways:

    - ``<bos>``, ``<eos>``, ``<pad>`` and ``<unk>`` in a text are plain text here and become their ids there. The turn
      markers become their ids in both: text from people you do not trust can end its own turn.
    - A run of spaces longer than the longest piece of spaces (31 in Gemma, 8 in the tiny model) is cut from the left
      here, the longest piece first, and otherwise there; it decodes to the same text.
    - Byte pieces in a row that do not all make up characters become U+FFFD one by one there; here those that do make
      up a character are kept.

    Examples
    --------
    >>> from importlib.resources import files
    >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
    >>> tokenizer.vocab_size, tokenizer.bos_id
    (2048, 2)
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
    'Once upon a time'
    """

    def __init__(self, model_file: str | Path) -> None:
        self._model = _read_model(model_file)
        self.vocab_size: int = self._model.get_piece_size()
        ids = {piece: self._id_of(piece) for piece in ("<pad>", "<eos>", "<bos>", "<unk>")}
        if missing := [piece for piece, token in ids.items() if token is None]:
            raise TokenizerError(f"{model_file}: has no {', '.join(missing)}; it is not Gemma's tokenizer")
        self.pad_id, self.eos_id, self.bos_id, self.unk_id = (token for token in ids.values() if token is not None)
        self.start_of_turn_id = self._id_of("<start_of_turn>")
        self.end_of_turn_id = self._id_of("<end_of_turn>")
        self._special = {*ids.values(), self.start_of_turn_id, self.end_of_turn_id}

    def _id_of(self, piece: str) -> int | None:
        token: int = self._model.piece_to_id(piece)  # of a piece that the model lacks: the id of <unk>
        return token if self._model.id_to_piece(token) == piece else None

    def _checked_id(self, value: SupportsIndex, where: str) -> int:
        """Make `value` a Python integer that is one of the ids; `where` is what to call it in an error."""
        try:
            token = operator.index(value)  # takes NumPy's integers, and no float
        except TypeError:
            raise TokenizerError(f"{where} is a {type(value).__name__}, not a whole number") from None
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"{where} is {token}, but this tokenizer has the ids 0 to {self.vocab_size - 1}")
        return token

    def _checked_ids(self, ids: Iterable[SupportsIndex]) -> list[int]:
        try:
            values = list(ids)
        except TypeError:
            raise TokenizerError(f"ids is a {type(ids).__name__}, not a list of ids") from None
        return [self._checked_id(value, f"ids[{n}]") for n, value in enumerate(values)]

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        r"""Turn `text` into ids.

        Parameters
        ----------
        text : str
            Kept as it is: no space is added or removed. A literal ``"<bos>"`` in it is plain text, so that there is
            never a second one; for a conversation use `chat_ids`, not the text of `chat_text`.
        add_bos : bool
            Whether ``<bos>`` comes first. The model was trained with it, and without it says little of sense.

        Raises
        ------
        TokenizerError
            If `text` is no string, or holds half a surrogate pair, which is no character.

        Examples
        --------
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
        >>> tokenizer.pieces(tokenizer.encode("In 1865, \n"))
        ['<bos>', 'In', '▁', '1', '8', '6', '5', ',', '▁', '\n']
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text is a {type(text).__name__}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # Python reads a byte that is no UTF-8 as one of these, from the command line for instance.
            what = (
                f"the byte 0x{code - 0xDC00:02X}, which is no UTF-8"
                if 0xDC80 <= code <= 0xDCFF
                else "half a surrogate pair"
            )
            raise TokenizerError(f"text: character {error.start} is U+{code:04X}, {what}") from None
        ids: list[int] = self._model.encode(text, out_type=int)
        return [self.bos_id, *ids] if add_bos else ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = True) -> str:
        """Turn `ids` into text; a byte that is part of no character becomes U+FFFD.

        Parameters
        ----------
        ids : iterable of int
            A list, or an array of one axis.
        skip_special_tokens : bool
            Leave out ``<pad>``, ``<eos>``, ``<bos>``, ``<unk>`` and the turn markers; otherwise they are written out.

        Raises
        ------
        TokenizerError
            If the tokenizer lacks one of the ids, naming it and where it stands.

        Notes
        -----
        ``decode(encode(text))`` is `text`, unless `text` holds a turn marker, which is left out, or U+2581, which
        SentencePiece writes for a space.

        Examples
        --------
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
        >>> tokenizer.decode([2, *tokenizer.encode(" a cat", add_bos=False), 1], skip_special_tokens=False)
        '<bos> a cat<eos>'
        """
        kept = self._checked_ids(ids)
        if skip_special_tokens:
            kept = [token for token in kept if token not in self._special]
        # SentencePiece would write nothing for a control piece; runs are given to it whole, for their bytes.
        runs = groupby(kept, key=self._special.__contains__)
        return "".join("".join(self.pieces(run)) if special else self._model.decode([*run]) for special, run in runs)

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """Name the piece of each id, to show to people: U+2581 stands for a space, ``<0xC3>`` for a byte.

        Raises
        ------
        TokenizerError
            If the tokenizer lacks one of the ids, naming it and where it stands.

        Examples
        --------
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
        >>> tokenizer.pieces(tokenizer.encode(" the cat"))
        ['<bos>', '▁the', '▁cat']
        """
        return [self._model.id_to_piece(token) for token in self._checked_ids(ids)]

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Write the conversation as Gemma's chat template does, beginning with ``<bos>``: to look at.

        To give it to a model use `chat_ids`; `encode` takes the ``<bos>`` for plain text.

        Parameters
        ----------
        messages : sequence of mapping
            Each with ``"role"`` and ``"content"``. The roles alternate and begin with ``"user"``; the other is
            ``"assistant"``, which the template writes ``model``, or ``"model"`` itself. Content loses its outer white
            space.
        add_generation_prompt : bool
            Whether the text ends where the model is to speak.

        Raises
        ------
        TokenizerError
            If there is no message, one lacks a string, or the roles are not as above. Gemma has no system role.

        Examples
        --------
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
        >>> print(tokenizer.chat_text([{"role": "user", "content": "Tell me a tale. "}]), end="|")
        <bos><start_of_turn>user
        Tell me a tale.<end_of_turn>
        <start_of_turn>model
        |
        """
        turns = [f"<start_of_turn>{turn}<end_of_turn>\n" for turn in _turns(messages)]
        return "".join(["<bos>", *turns, "<start_of_turn>model\n" if add_generation_prompt else ""])

    def chat_ids(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        r"""Turn a conversation into ids: one ``<bos>``, the turn markers by their ids, the text between them encoded.

        Parameters
        ----------
        messages, add_generation_prompt
            As of `chat_text`.

        Raises
        ------
        TokenizerError
            As of `chat_text`; and if the model has no turn markers.

        Examples
        --------
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
        >>> tokenizer.pieces(tokenizer.chat_ids([{"role": "user", "content": "Hi"}], add_generation_prompt=False))
        ['<bos>', '<start_of_turn>', 'us', 'er', '\n', 'H', 'i', '<end_of_turn>', '\n']
        """
        start, end = self.start_of_turn_id, self.end_of_turn_id
        if start is None or end is None:
            raise TokenizerError("this tokenizer has no <start_of_turn> and <end_of_turn>, which a chat is made of")
        ids = [self.bos_id]
        for turn in _turns(messages):
            ids += [start, *self.encode(turn, add_bos=False), end, *self.encode("\n", add_bos=False)]
        return [*ids, start, *self.encode("model\n", add_bos=False)] if add_generation_prompt else ids


class TextStream:
    """Ids in, text out, as they are generated: special tokens are left out, and no half character is ever given out.

    All that `push` and `finish` return, joined, is `Tokenizer.decode` of all ids. Only the bytes of an unfinished
    character are kept, at most three, so a token costs the same however long the text is.

    Parameters
    ----------
    tokenizer : Tokenizer
        What the ids belong to.

    Examples
    --------
    >>> from importlib.resources import files
    >>> tokenizer = Tokenizer(files("refgemma") / "checkpoints/tiny/tokenizer.model")
    >>> stream = TextStream(tokenizer)
    >>> [stream.push(token) for token in tokenizer.encode("Oh 😀!")]
    ['', 'Oh', ' ', '', '', '', '😀', '!']
    >>> stream.finish()
    ''
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []  # byte pieces that begin a character

    def push(self, token: SupportsIndex) -> str:
        """Take the next id and return the text that became certain: ``""`` while bytes of a character are missing.

        Raises
        ------
        TokenizerError
            If the tokenizer lacks the id.
        """
        tokenizer = self._tokenizer
        checked = tokenizer._checked_id(token, "token")
        if checked in tokenizer._special:
            return ""
        self._held.append(checked)
        certain = len(self._held)
        if tokenizer._model.is_byte(checked):  # then all that is held are bytes
            utf8 = bytes(int(piece.strip("<>"), 16) for piece in tokenizer.pieces(self._held))
            # Python counts the bytes that no further one could complete; how they read, SentencePiece decides: it
            # writes U+FFFD for each wrong byte, Python one for several.
            _, certain = codecs.utf_8_decode(utf8, "replace", False)
        ready, self._held = self._held[:certain], self._held[certain:]
        return tokenizer.decode(ready)

    def finish(self) -> str:
        """Return what is left when no id follows: U+FFFD for each byte of a character that was never completed."""
        rest, self._held = self._held, []
        return self._tokenizer.decode(rest)
