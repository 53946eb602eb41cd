"""Cut a text into rows of tokens, hold out the last rows, and choose the rows of each step. Checked against the packing
of transformers' ``run_clm.py``, except that each row here begins with ``<bos>``.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from refgemma.files import read_file
from refgemma.training.optimizer import TrainingError

Row = npt.NDArray[np.int64]


def read_text(path: str | Path) -> str:
    """Read a text in UTF-8.

    Raises
    ------
    TrainingError
        If the file is not a text.

    Examples
    --------
    >>> read_text(__file__)[:3]
    '\"\"\"'
    """
    try:
        text = read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 with iconv") from None
    if "\0" in text:
        raise TrainingError(f"{path}: character {text.index(chr(0))} is NUL, so the file is not a text; give a text")
    if not text.strip():
        raise TrainingError(f"{path}: is empty; give a text to train on")
    return text


def pack_rows(ids: Sequence[int], seq_len: int, bos: int | None) -> list[Row]:
    """Cut a text into rows of `seq_len` tokens, each beginning with ``<bos>``; only the last row may be shorter.

    Rows are not padded. In the loss, each token of a shorter row has the same weight.

    Examples
    --------
    >>> pack_rows([5, 6, 7, 8, 9], seq_len=3, bos=2)
    [array([2, 5, 6]), array([2, 7, 8]), array([2, 9])]
    """
    first = [] if bos is None else [bos]
    step = seq_len - len(first)
    rows = [np.array([*first, *ids[start : start + step]], np.int64) for start in range(0, len(ids), step)]
    return [row for row in rows if len(row) > 1]  # a row of one token predicts nothing


def hold_out(rows: Sequence[Row], percentage: float) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on, and the last `percentage` of the rows (at least one) to hold out.

    Raises
    ------
    TrainingError
        If there are fewer than two rows, or the percentage is out of range.

    Examples
    --------
    >>> train, held_out = hold_out(pack_rows(range(40), 5, bos=2), percentage=20)
    >>> len(train), len(held_out)
    (8, 2)
    """
    if not 0 < percentage < 100:
        raise TrainingError(f"the validation split is {percentage:g} percent; it must be above 0 and below 100")
    if len(rows) < 2:
        raise TrainingError(
            "the text is too short: at least one row to train on and one to hold out are needed; lower --seq-len"
        )
    held = min(len(rows) - 1, max(1, round(len(rows) * percentage / 100)))
    return list(rows[:-held]), list(rows[-held:])


def take_batch(rows: Sequence[Row], step: int, size: int, seed: int) -> list[Row]:
    """Return the rows of a step; each pass over the text has a new random order.

    The result depends only on the arguments, so that a resumed run continues with the right rows.

    Examples
    --------
    >>> rows = pack_rows(range(6), 2, bos=2)
    >>> sorted(int(row[1]) for step in range(3) for row in take_batch(rows, step, 2, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    numbers = range(step * size, (step + 1) * size)
    epochs = {n // len(rows) for n in numbers}
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch in epochs}
    return [rows[order[n // len(rows)][n % len(rows)]] for n in numbers]


def hash_rows(rows: Sequence[Row]) -> str:
    """Return a hash of all tokens, by which a resumed run recognises its text.

    Examples
    --------
    >>> hash_rows(pack_rows([5], 2, bos=2)) == hash_rows(pack_rows([6], 2, bos=2))
    False
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
    return digest.hexdigest()
