"""What is made of the logits: log probabilities and the language-modelling loss. Checked against transformers 5.23
`ForCausalLMLoss` on recorded losses."""

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from refgemma.inputs import InputError, as_array
from refgemma.precision import Array, wide
from refgemma.shapes import Logits

IGNORED = -100  # the label of a token that does not count


def log_softmax(logits: Float[np.ndarray, "*batch vocab"]) -> Float[np.ndarray, "*batch vocab"]:
    """Log probabilities: ``z - log(sum(exp(z)))``, in at least float32.

    Examples
    --------
    >>> log_softmax(np.zeros(4)).round(4)
    array([-1.3863, -1.3863, -1.3863, -1.3863])
    """
    shifted = wide(logits) - np.max(wide(logits), axis=-1, keepdims=True)
    log_probabilities: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return log_probabilities


def cross_entropy(logits: Float[np.ndarray, "tokens vocab"], labels: Int[np.ndarray, " tokens"]) -> float:
    """The mean of ``-log p(label)`` over the labels that are not -100, in nats; NaN if there are none, as in torch.

    Raises
    ------
    InputError
        If a label is neither -100 nor in the vocabulary.

    Examples
    --------
    >>> round(cross_entropy(np.zeros((2, 4)), np.array([1, -100])), 4)
    1.3863
    """
    counted = labels != IGNORED
    outside = counted & ((labels < 0) | (labels >= logits.shape[-1]))
    if outside.any():
        raise InputError(f"label {labels[outside][0]} is neither -100 nor one of the {logits.shape[-1]} tokens")
    if not counted.any():
        return float("nan")
    picked: Array = log_softmax(logits[counted])[np.arange(counted.sum()), labels[counted]]
    return -float(np.mean(picked))


def causal_lm_loss(logits: Logits, labels: npt.ArrayLike) -> float:
    """Cross entropy of each token given the ones before it, in nats a token.

    The logits at place ``t`` are judged by the label at ``t + 1``; labels of -100 do not count.
    Source: transformers ``ForCausalLMLoss``.

    Parameters
    ----------
    logits : (batch, seq, vocab)
        From `forward`.
    labels : int array (batch, seq)
        Usually the input ids themselves, with -100 at padding.

    Examples
    --------
    >>> round(causal_lm_loss(np.zeros((1, 3, 4)), [[1, 2, 3]]), 4)
    1.3863
    """
    targets = as_array(labels, "labels")
    if targets.shape != logits.shape[:2] or targets.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {targets.shape} and dtype {targets.dtype}: "
            f"whole numbers of shape {logits.shape[:2]} are needed"
        )
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets[:, 1:].ravel())
