"""Decode greedily with the slow definition: take the most likely token at each step.

Checked against recorded texts of transformers 5.23, and against `refgemma.generation.decode.generate` token for token.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields

import numpy as np
from jaxtyping import Float, Int

from refgemma.config import Gemma2Config
from refgemma.generation.generation_config import GenerationConfig
from refgemma.inputs import InputError, check_token_ids
from refgemma.model import next_token_logits
from refgemma.precision import Array, wide
from refgemma.shapes import Logits
from refgemma.weights.parameters import Weights


def last_scores(logits: Logits) -> Float[np.ndarray, "batch vocab"]:
    """Return the logits after the last token, in float32 as in transformers.

    Raises
    ------
    InputError
        If a logit is NaN.

    Examples
    --------
    >>> last_scores(np.zeros((1, 3, 5))).shape
    (1, 5)
    """
    last: Array = wide(logits[:, -1]).astype(np.float32)
    if np.isnan(last).any():
        raise InputError("the logits are NaN: a number overflowed this precision; try float32 or float64")
    return last


def greedy(
    prompt: Sequence[int] | Int[np.ndarray, " seq"], weights: Weights, config: Gemma2Config, *,
    max_new_tokens: int = 128, stop_ids: Collection[int] = (),
) -> Iterator[int]:  # fmt: skip
    """Continue a prompt with the most likely token at each step, computed by `refgemma.model`.

    The prompt is read once as a whole. Then each new token is read alone, with a cache of all earlier tokens.

    Parameters
    ----------
    prompt : sequence of int
        Token ids, usually beginning with ``<bos>``.
    weights, config
        The model's weights and configuration.
    max_new_tokens : int
        The maximum number of new tokens.
    stop_ids : collection of int
        Tokens that end the text; the last generated token is then one of these.

    Yields
    ------
    int
        The next token.

    Raises
    ------
    InputError
        If the prompt is invalid (raised by the call itself), or if logits are NaN (raised at that token).

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> prompt = tiny.tokenizer.encode("Once upon a time")
    >>> new = list(greedy(prompt, tiny.weights, tiny.config, max_new_tokens=5))
    >>> new == list(refgemma.generate(prompt, tiny.weights, tiny.config, max_new_tokens=5))
    True
    """
    ids = check_token_ids([list(prompt)], config.vocab_size)

    def decode() -> Iterator[int]:
        unread, cache = ids, None
        for _ in range(max_new_tokens):
            logits, cache = next_token_logits(unread, weights, config, cache=cache)
            token = int(np.argmax(last_scores(logits)))
            yield token
            if token in stop_ids:
                return
            unread = np.array([[token]])

    return decode()


# These settings do not change the tokens of greedy decoding: they set its end, other methods, or the output's form.
OF_OTHER_WAYS = frozenset({
    "max_length", "max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "seed",
    "early_stopping", "length_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "renormalize_logits",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate",
})  # fmt: skip


def is_plain_greedy(call: GenerationConfig) -> bool:
    """Return True if `call` asks for plain greedy decoding, so that `greedy` can be used.

    Examples
    --------
    >>> is_plain_greedy(GenerationConfig(max_new_tokens=3)), is_plain_greedy(GenerationConfig(num_beams=2))
    (True, False)
    """
    return all(
        getattr(call, setting.name) in (None, setting.metadata["default"])
        for setting in fields(call)
        if setting.name not in OF_OTHER_WAYS
    )
