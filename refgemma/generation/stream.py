"""Print text while it is generated. Checked against `TextStreamer` of transformers 5.23: the text is the same, printed
by characters instead of words."""

from collections.abc import Iterator
from queue import Queue
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from refgemma.inputs import InputError
from refgemma.tokenizer.tokenizer import TextStream, Tokenizer

DECODE_WITHOUT_EFFECT = frozenset({"clean_up_tokenization_spaces", "spaces_between_special_tokens"})


@runtime_checkable
class Streamer(Protocol):
    """An object that receives each new token from `generate`.

    Examples
    --------
    >>> import refgemma
    >>> isinstance(TextStreamer(refgemma.AutoTokenizer.from_pretrained("tiny")), Streamer)
    True
    """

    def put(self, value: npt.NDArray[np.int64]) -> None:
        """Take the prompts ``(batch, seq)`` in the first call, and the new token of each row ``(batch,)`` in later
        calls."""

    def end(self) -> None:
        """Take note that no token follows."""


class TextStreamer:
    """A streamer for ``Gemma2ForCausalLM.generate`` that prints one text while it is generated.

    transformers prints only whole words. Here each character is printed as soon as it is complete.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer of the tokens.
    skip_prompt : bool
        If true, print only the new text.
    skip_special_tokens : bool
        If true, leave out ``<bos>``, ``<end_of_turn>`` and other special tokens. Default: false, as in transformers.
    **decode_kwargs
        Other arguments that transformers passes to ``decode``, ``clean_up_tokenization_spaces`` and
        ``spaces_between_special_tokens``. These have no effect on Gemma's text.

    Notes
    -----
    To use the text in another way, define ``on_finalized_text(text, stream_end=False)`` in a subclass.

    Examples
    --------
    >>> import refgemma
    >>> model = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    >>> tokenizer = refgemma.AutoTokenizer.from_pretrained("tiny")
    >>> streamer = TextStreamer(tokenizer)
    >>> inputs = tokenizer("The king", return_tensors="np")
    >>> ids = model.generate(**inputs, max_new_tokens=4, streamer=streamer)
    <bos>The king's son was
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_prompt: bool = False, skip_special_tokens: bool = False, **decode_kwargs: Any
    ) -> None:
        if unknown := sorted(decode_kwargs.keys() - DECODE_WITHOUT_EFFECT):
            raise InputError(f"{type(self).__name__} has no argument {unknown[0]!r}; use skip_special_tokens")
        self._tokenizer = tokenizer
        self._skip_next = self._skip_prompt = skip_prompt
        self._shown = frozenset() if skip_special_tokens else frozenset(tokenizer.all_special_ids)
        self._stream = TextStream(tokenizer)

    def put(self, value: npt.NDArray[np.int64]) -> None:
        """Print the text of `value`: ids ``(n,)`` or ``(1, n)``.

        Raises
        ------
        InputError
            If `value` has more than one text.
        """
        if value.ndim > 1 and len(value) > 1:
            raise InputError(f"TextStreamer got {len(value)} texts, but prints only one; generate one text at a time")
        if not self._skip_next:
            self.on_finalized_text("".join(self._text(int(token)) for token in value.reshape(-1)))
        self._skip_next = False

    def _text(self, token: int) -> str:
        """Return the text that one more token completes."""
        if token in self._shown:
            return self._stream.finish() + self._tokenizer.decode([token])
        return self._stream.push(token)

    def end(self) -> None:
        """Print the rest, and a line break."""
        self._skip_next = self._skip_prompt
        self.on_finalized_text(self._stream.finish(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print complete text, with a line break at the end of the stream."""
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """A streamer to iterate over; it yields text that another thread generates.

    Parameters
    ----------
    tokenizer, skip_prompt
        As in `TextStreamer`.
    timeout : float, optional
        Seconds to wait for the next text; by default, no limit.
    **decode_kwargs
        ``skip_special_tokens``, and the other arguments of `TextStreamer`.

    Examples
    --------
    >>> import refgemma
    >>> from threading import Thread
    >>> model = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    >>> tokenizer = refgemma.AutoTokenizer.from_pretrained("tiny")
    >>> streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    >>> inputs = tokenizer("The king", return_tensors="np")
    >>> thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 4})
    >>> thread.start()
    >>> "".join(streamer)
    "'s son was"
    >>> thread.join()
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: Queue[str | None] = Queue()  # None means that no text follows

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Store the text for the iterating thread."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        """Return this object."""
        return self

    def __next__(self) -> str:
        """Wait for the next text and return it.

        Raises
        ------
        queue.Empty
            If no text arrives within `timeout` seconds.
        """
        text = self.text_queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
