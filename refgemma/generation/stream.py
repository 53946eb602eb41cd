"""Text as it is generated. Checked against `TextStreamer` of transformers 5.23, whose text it prints character by
character instead of word by word."""

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
    """A receiver of tokens: `generate` gives it each as it comes.

    Examples
    --------
    >>> import refgemma
    >>> isinstance(TextStreamer(refgemma.AutoTokenizer.from_pretrained("tiny")), Streamer)
    True
    """

    def put(self, value: npt.NDArray[np.int64]) -> None:
        """Take the prompt ``(batch, seq)``, then again and again a new token of each row ``(batch,)``."""

    def end(self) -> None:
        """Know that no token follows."""


class TextStreamer:
    """Prints text as it is generated: a streamer for ``Gemma2ForCausalLM.generate``, for one text at a time.

    transformers' prints whole words only; here every character is printed as soon as it is certain, and never half.

    Parameters
    ----------
    tokenizer : Tokenizer
        What the tokens belong to.
    skip_prompt : bool
        Print the new text only.
    skip_special_tokens : bool
        Leave out ``<bos>``, ``<end_of_turn>`` and the like, which are printed by default, as in transformers.
    **decode_kwargs
        What else transformers hands to ``decode``: ``clean_up_tokenization_spaces`` and
        ``spaces_between_special_tokens``, which have no effect on Gemma's text.

    Notes
    -----
    A subclass with its own ``on_finalized_text(text, stream_end=False)`` does something else with the text.

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
            raise InputError(f"{type(self).__name__} takes no {unknown[0]}; what it takes is skip_special_tokens")
        self._tokenizer = tokenizer
        self._skip_next = self._skip_prompt = skip_prompt
        self._shown = frozenset() if skip_special_tokens else frozenset(tokenizer.all_special_ids)
        self._stream = TextStream(tokenizer)

    def put(self, value: npt.NDArray[np.int64]) -> None:
        """Print the text of `value`: ids ``(n,)`` or ``(1, n)``.

        Raises
        ------
        InputError
            If it gets more than one text.
        """
        if value.ndim > 1 and len(value) > 1:
            raise InputError(f"TextStreamer prints one text, and there are {len(value)}")
        if not self._skip_next:
            self.on_finalized_text("".join(self._text(int(token)) for token in value.reshape(-1)))
        self._skip_next = False

    def _text(self, token: int) -> str:
        """Return the text that becomes certain with one more token."""
        if token in self._shown:
            return self._stream.finish() + self._tokenizer.decode([token])
        return self._stream.push(token)

    def end(self) -> None:
        """Print what is left, and a line break."""
        self._skip_next = self._skip_prompt
        self.on_finalized_text(self._stream.finish(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text that has become certain; the last with a line break."""
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Text as it is generated in another thread: a streamer to iterate over.

    Parameters
    ----------
    tokenizer, skip_prompt
        As of `TextStreamer`.
    timeout : float, optional
        Seconds to wait for the next text, by default forever.
    **decode_kwargs
        ``skip_special_tokens``, and the others of `TextStreamer`.

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
        self.text_queue: Queue[str | None] = Queue()  # None: no text follows

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep the text for whoever iterates."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        """Return itself."""
        return self

    def __next__(self) -> str:
        """Wait for the next text.

        Raises
        ------
        queue.Empty
            If none comes within `timeout` seconds.
        """
        text = self.text_queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
