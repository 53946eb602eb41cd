"""Summarise a tensor in forty numbers, which suffice to decide if rounding explains a difference.

Checked in the tests: every element has an effect.

A sketch has the root mean square, the largest magnitude, elements at regular distances, and projections on random
directions. Every element contributes to each projection.
"""

import numpy as np
import numpy.typing as npt

from refgemma.precision import Array
from refgemma.weights.synthetic import raw_bytes

SAMPLES, PROJECTIONS = 32, 6
LENGTH = 2 + SAMPLES + PROJECTIONS
SAMPLES_AT, PROJECTIONS_AT = slice(2, 2 + SAMPLES), slice(2 + SAMPLES, LENGTH)
BLOCK = 2**20  # elements processed at once, so that a large tensor is not copied
RMS_OF_BYTES = np.sqrt((2**16 - 1) / 12 + 1 / 4)  # root mean square of a uniform number from -128 to 127


def sketch(x: Array) -> npt.NDArray[np.float64]:
    """Compute the sketch of a tensor, in float64.

    A projection is a sum of all elements times random bytes. The scale makes projections and sampled elements
    comparable: independent errors of size e in the elements give an error of size e in each projection.

    Examples
    --------
    >>> x = np.arange(1000.0)
    >>> sketch(x).shape, bool(sketch(x)[0] == np.sqrt(np.mean(x * x)))
    ((40,), True)
    >>> moved = sketch(np.where(x == 123, 124, x)) - sketch(x)
    >>> bool((moved[-PROJECTIONS:] != 0).all())
    True
    """
    flat = np.asarray(x).reshape(-1)
    places = np.linspace(0, flat.size - 1, SAMPLES).astype(np.int64)
    squares, projections = 0.0, np.zeros(PROJECTIONS)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64)
        squares += float(block @ block)
        for number in range(PROJECTIONS):
            projections[number] += float(
                block @ raw_bytes(f"projection {number}", start, len(block)).astype(np.float64)
            )
    scale = RMS_OF_BYTES * np.sqrt(flat.size)
    whole = [np.sqrt(squares / flat.size), float(np.abs(flat).max())]
    return np.concatenate([whole, flat[places].astype(np.float64), projections / scale])
