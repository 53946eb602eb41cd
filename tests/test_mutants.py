"""What mutation testing asked for: tests of what the other tests of the core let pass. See mutation.py."""

import numpy as np

from refgemma.ops import softmax


def test_a_mask_of_numbers_is_added_to_the_scores() -> None:
    # exp(0), exp(log 3) and exp(-inf), by hand: weights 1/4, 3/4 and 0.
    scores = np.array([[[[1.0, 0.0, 5.0]]]])
    mask = np.array([[[[-1.0, np.log(3.0), -np.inf]]]])
    assert np.allclose(softmax(scores, mask), [[[[0.25, 0.75, 0.0]]]], rtol=0, atol=1e-15)
