"""Measure the distance of a run's tensor from its recording in units of the tolerance; up to 1, the tensor conforms.

Checked in the tests: all recorded runs conform, and NaN and infinity never conform.

* In float32, the tolerance is `NOISE_FACTOR` times the tensor's rounding error: our error or PyTorch's, whichever is
  smaller, measured with the same run in float64. So a mistake cannot increase its own tolerance: if our run loses
  digits, PyTorch's error is smaller; for any other mistake, ours is. The logits must also be within `END_TO_END` of the
  largest logit.
* In half precision, two correct runs differ by two independent roundings: in root mean square, sqrt(2) times the
  rounding error of one. PyTorch's distance from its own float32 recording gives this error.
"""

import math

import numpy as np

from refgemma.oracle.judge import distance_from, ratio
from refgemma.precision import Array

END_TO_END = 5e-6
# Two correct runs have independent errors of similar size, so they differ by about sqrt(2) times one error. But the
# largest of a few errors is itself uncertain, and libraries sum in different orders, so PyTorch's error may be a few
# times as large.
NOISE_FACTOR = 8
# The minimum tolerance, for a tensor that our run happens to compute exactly: two roundings on each side.
FLOOR = 4 * 2.0**-24


def rounding_noise(computed: Array, recorded: Array, reference: Array, dtype: str = "float32") -> float:
    """Return the rounding error of a run's tensor.

    In float32 it is the smaller of our largest error and the recording's; `reference` is our own run in float64. In
    half precision it is the mean square error of the recording; `reference` is PyTorch's float32 recording.
    """
    if dtype != "float32":
        return float(np.mean(distance_from(recorded, reference) ** 2))
    # Python's min may ignore a NaN; NumPy's returns NaN, so that the tensor does not conform.
    errors = (distance_from(x, reference).max(initial=0) for x in (computed, recorded))
    return float(np.minimum(*errors))


def run_distance(computed: Array, recorded: Array, noise: float, dtype: str = "float32") -> float:
    """Return the distance of a run's tensor from the recorded one, given the `rounding_noise` of this tensor."""
    apart = distance_from(computed, recorded)
    if dtype != "float32":
        return ratio(np.sqrt(np.mean(apart**2, keepdims=True)), np.array([math.sqrt(2 * noise)]))
    return ratio(apart, np.full(recorded.shape, NOISE_FACTOR * noise + FLOOR * np.abs(recorded).max(initial=0)))


def logits_distance(computed: Array, recorded: Array) -> float:
    """Return the distance of float32 logits from the recording, in units of `END_TO_END` times the largest logit."""
    allowed = np.full(recorded.shape, END_TO_END * np.abs(recorded).max(initial=0))
    return ratio(distance_from(computed, recorded), allowed)
