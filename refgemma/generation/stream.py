"""Text as it is generated. Checked against `TextStreamer` of transformers 5.23, whose text it prints character by
character instead of word by word."""

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from refgemma.inputs import InputError
from refgemma.tokenizer.tokenizer import TextStream, Tokenizer


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

    def __init__(self, tokenizer: Tokenizer, skip_prompt: bool = False, skip_special_tokens: bool = False) -> None:
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
            print("".join(self._text(int(token)) for token in value.reshape(-1)), end="", flush=True)
        self._skip_next = False

    def _text(self, token: int) -> str:
        """Return the text that becomes certain with one more token."""
        if token in self._shown:
            return self._stream.finish() + self._tokenizer.decode([token])
        return self._stream.push(token)

    def end(self) -> None:
        """Print what is left, and a line break."""
        print(self._stream.finish(), flush=True)
        self._skip_next = self._skip_prompt
