"""Make prompts that show the known bugs, on the conformance checkpoint and on other models. Checked in the tests and in
tests/parity.

The conformance checkpoint is a small model in which every known bug is visible; `refgemma.weights.conformance` writes
the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.precision import Array

SEED = 5


@dataclass(frozen=True)
class Prompt:
    """A batch of tokens, and how to split it into calls of a model."""

    name: str
    why: str
    input_ids: Array  # (batch, seq)
    attention_mask: Array
    calls: tuple[int, ...]  # numbers of tokens of successive calls, which share a cache


def prompts(config: Gemma2Config) -> Mapping[str, Prompt]:
    """Return prompts with random tokens after <bos>; together they show all bugs that can show.

    Examples
    --------
    >>> import refgemma
    >>> {name: prompt.calls for name, prompt in prompts(refgemma.load("conformance").config).items()}
    {'padded': (28,), 'plain': (28,), 'cached': (10, 6, 1, 1, 9, 1)}
    """
    window = min(config.sliding_window, 1024)
    length = 3 * window + 4
    ids = np.random.default_rng(SEED).integers(4, config.vocab_size, (2, length))
    ids[:, 0] = 2 if config.bos_token_id is None else config.bos_token_id
    seen = np.ones_like(ids)
    padded, visible = ids.copy(), seen.copy()
    padded[1, 3:], visible[1, :3] = ids[1, :-3], 0
    padded[1, :3] = config.pad_token_id or 0
    pieces = (window + 2, window - 2, 1, 1, window + 1)
    return {
        "padded": Prompt("padded", "two rows; the second has left padding", padded, visible, (length,)),
        "plain": Prompt("plain", "one row, longer than three windows", ids[:1], seen[:1], (length,)),
        "cached": Prompt("cached", "one row in several calls that share a cache", ids[:1], seen[:1],
                         (*pieces, length - sum(pieces))),
    }  # fmt: skip
