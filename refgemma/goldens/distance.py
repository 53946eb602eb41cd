"""How far a tensor of a whole run is from its recording, in units of what rounding explains: at most 1 if it conforms.

Checked in the tests: no recorded run is farther off, NaN and infinity never conform.

* In float32, a tensor may be off by `NOISE_FACTOR` times the error that rounding makes in it, which the same run in
  float64 shows: ours or PyTorch's, whichever is smaller. So a mistake does not widen its own tolerance, neither one
  that loses digits (then PyTorch's error is the smaller) nor any other (then ours is). The logits must also be within
  `END_TO_END` of the largest logit.
* In half precision, the root mean square difference of two correct runs is that of two independent roundings, sqrt(2)
  times the rounding error of one: PyTorch's distance from its own float32 recording.
"""

import math

import numpy as np

from refgemma.oracle.judge import distance_from, ratio
from refgemma.precision import Array

END_TO_END = 5e-6
# Two correct runs err independently and by similar amounts, so they differ by about sqrt(2) of one's error. But the
# largest of few errors is itself uncertain, and libraries sum in other orders: PyTorch may err a few times as much.
NOISE_FACTOR = 8
# What is left where our own rounding happens to be exact: two roundings on either side.
FLOOR = 4 * 2.0**-24


def rounding_noise(computed: Array, recorded: Array, reference: Array, dtype: str = "float32") -> float:
    """Return the rounding error of a run's tensor.

    In float32 the largest error, ours or the recorded one, of which the smaller counts; `reference` is our own run in
    float64. In half precision the mean square error of the recording; `reference` is PyTorch's float32 recording.
    """
    if dtype != "float32":
        return float(np.mean(distance_from(recorded, reference) ** 2))
    # Python's min would pass a NaN by; numpy's gives it back, and nothing conforms to it.
    errors = (distance_from(x, reference).max(initial=0) for x in (computed, recorded))
    return float(np.minimum(*errors))


def run_distance(computed: Array, recorded: Array, noise: float, dtype: str = "float32") -> float:
    """Return the distance of a run's tensor from the recorded one, given the `rounding_noise` of this tensor."""
    apart = distance_from(computed, recorded)
    if dtype != "float32":
        return ratio(np.sqrt(np.mean(apart**2, keepdims=True)), np.array([math.sqrt(2 * noise)]))
    return ratio(apart, np.full(recorded.shape, NOISE_FACTOR * noise + FLOOR * np.abs(recorded).max(initial=0)))


def logits_distance(computed: Array, recorded: Array) -> float:
    """Return the distance of float32 logits from the recorded ones, in units of `END_TO_END` times the largest."""
    allowed = np.full(recorded.shape, END_TO_END * np.abs(recorded).max(initial=0))
    return ratio(distance_from(computed, recorded), allowed)
