"""Published outputs of the released checkpoints, as data files in ``golden/released``; nothing here was computed by us.
Checked against one another without weights, and against the checkpoints by whoever has them, in the tests."""

import json
from typing import Any

from refgemma.hub import golden_folder

# Texts that gemma.cpp published cross entropies of: short name -> name in its file.
PUBLISHED = {"hungary": "Hungary", "jingle-bells": "Jingle Bells", "gettysburg": "Gettysburg, Hay Draft"}


def read_released(name: str) -> dict[str, Any]:
    """One data file, by `name`: ``checkpoint``, ``source``, ``commit``, ``licence``, ``precision``, ``caveats``, and
    the numbers.

    Examples
    --------
    >>> recording = read_released("logos-in-layers-27b")
    >>> recording["checkpoint"], len(recording["residual_norms"]), recording["final"]["top"][0][0]
    ('google/gemma-2-27b', 47, ' Berlin')
    """
    recording: dict[str, Any] = json.loads((golden_folder() / "released" / f"{name}.json").read_text(encoding="utf-8"))
    return recording


def published_text(name: str) -> str:
    """A text that gemma.cpp published cross entropies of, by its `name` in `PUBLISHED`.

    Examples
    --------
    >>> published_text("hungary")
    'The capital of Hungary is Budapest which is located in Europe.'
    """
    texts = {text["name"]: text["text"] for text in read_released("gemma-cpp")["texts"]}
    found: str = texts[PUBLISHED[name]]
    return found


def published_figures(text: str) -> dict[str, float]:
    """What gemma.cpp published for a text, in bits a byte by model; nothing for any other text.

    Examples
    --------
    >>> published_figures(published_text("hungary"))
    {'2b-it': 1.14, '9b-it': 1.28, '27b-it': 1.3}
    """
    figures: dict[str, float] = next(
        (known["bits_per_byte"] for known in read_released("gemma-cpp")["texts"] if known["text"] == text), {}
    )
    return figures
