"""Compute log probabilities, losses, and the token at which a sequence is classified. Checked against transformers 5.23
`ForCausalLMLoss` on recorded losses, and its classifiers and their losses in the parity tests.

Losses are computed in at least float32 and returned as Python numbers. (transformers' sequence classifiers compute
bfloat16 losses in a bfloat16 model.)
"""

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from refgemma.inputs import InputError, as_array
from refgemma.precision import Array, wide
from refgemma.shapes import Logits, TokenIds

IGNORED = -100  # label of a token that does not count
MULTI_LABEL = "multi_label_classification"


def log_softmax(logits: Float[np.ndarray, "*batch vocab"]) -> Float[np.ndarray, "*batch vocab"]:
    """Compute log probabilities: ``z - log(sum(exp(z)))``, in at least float32.

    Source: ``torch.nn.functional.log_softmax``.

    Examples
    --------
    >>> log_softmax(np.zeros(4)).round(4)
    array([-1.3863, -1.3863, -1.3863, -1.3863])
    """
    shifted = wide(logits) - np.max(wide(logits), axis=-1, keepdims=True)
    log_probabilities: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return log_probabilities


def cross_entropy(
    logits: Float[np.ndarray, "tokens classes"], labels: Int[np.ndarray, " tokens"],
    num_items: float | None = None, ignore_index: int = IGNORED,
) -> float:  # fmt: skip
    """Compute the mean of ``-log p(label)`` in nats over labels that are not -100; NaN if all are, as in torch.

    With `num_items`, return the sum divided by this number. `ignore_index` replaces -100. Computed in at least
    float32, in any precision of the logits. Source: ``torch.nn.functional.cross_entropy``.

    Raises
    ------
    InputError
        If a label is neither -100 nor a class.

    Examples
    --------
    >>> round(cross_entropy(np.zeros((2, 4)), np.array([1, -100])), 4)
    1.3863
    """
    counted = labels != ignore_index
    outside = counted & ((labels < 0) | (labels >= logits.shape[-1]))
    if outside.any():
        raise InputError(
            f"label {labels[outside][0]} is neither {ignore_index} nor a class (0 to {logits.shape[-1] - 1})"
        )
    if not counted.any() and num_items is None:
        return float("nan")
    picked: Array = log_softmax(logits[counted])[np.arange(counted.sum()), labels[counted]]
    return -float(np.mean(picked)) if num_items is None else -float(np.sum(picked)) / num_items


def _check_labels(labels: npt.ArrayLike, kinds: str, shape: tuple[int, ...], needed: str) -> Array:
    """Return `labels` as an array; check its shape, and that its dtype is one of `kinds`."""
    targets = as_array(labels, "labels")
    if targets.shape != shape or targets.dtype.kind not in kinds:
        raise InputError(f"labels have shape {targets.shape} and dtype {targets.dtype}: {needed}")
    return targets


def mean_squared_error(values: Float[np.ndarray, "*shape"], labels: npt.ArrayLike) -> float:
    """Compute the mean of ``(value - label) ** 2``, in at least float32.

    Source: ``torch.nn.MSELoss``.

    Raises
    ------
    InputError
        If `labels` are not numbers of the shape of `values`.

    Examples
    --------
    >>> mean_squared_error(np.array([1.0, 2.0]), [1.0, 4.0])
    2.0
    """
    targets = _check_labels(labels, "iuf", values.shape, f"they must be numbers of shape {values.shape}")
    difference = wide(values) - targets
    return float(np.mean(difference * difference))


def binary_cross_entropy(logits: Float[np.ndarray, "*shape"], labels: npt.ArrayLike) -> float:
    """Compute the mean of ``-y log(sigmoid(z)) - (1 - y) log(1 - sigmoid(z))``: each class is independent.

    Computed as ``max(z, 0) - z y + log(1 + exp(-|z|))``, which cannot overflow, in at least float32. Source:
    ``torch.nn.BCEWithLogitsLoss``.

    Raises
    ------
    InputError
        If `labels` are not floating-point numbers of the shape of `logits`.

    Examples
    --------
    >>> round(binary_cross_entropy(np.array([[0.0, 1000.0]]), [[1.0, 1.0]]), 4)
    0.3466
    """
    needed = f"they must be numbers from 0.0 to 1.0 of shape {logits.shape}, one for each class"
    targets = _check_labels(labels, "f", logits.shape, needed)
    z = wide(logits)
    return float(np.mean(np.maximum(z, 0) - z * targets + np.log1p(np.exp(-np.abs(z)))))


def causal_lm_loss(
    logits: Logits, labels: npt.ArrayLike, num_items_in_batch: float | None = None, ignore_index: int = IGNORED,
    shift_labels: npt.ArrayLike | None = None,
) -> float:  # fmt: skip
    """Compute the mean cross entropy of each token given all earlier tokens, in nats per token.

    The logits at place ``t`` are compared with the label at ``t + 1`` by `cross_entropy`, in at least float32; labels
    of
    -100 do not count. Source: transformers ``ForCausalLMLoss``.

    Parameters
    ----------
    logits : (batch, seq, vocab)
        The logits of `forward`.
    labels : int array (batch, seq)
        The labels; usually the input ids themselves, with -100 at padding.
    num_items_in_batch : float, optional
        Divides the sum of the losses, instead of the number of labels that count.
    ignore_index : int
        A label with this number does not count.
    shift_labels : int array (batch, seq), optional
        Used instead of `labels`; the logits at place ``t`` are compared with the label at ``t``.

    Raises
    ------
    InputError
        If `labels` are not whole numbers of the right shape.

    Examples
    --------
    >>> round(causal_lm_loss(np.zeros((1, 3, 4)), [[1, 2, 3]]), 4)
    1.3863
    """
    given = labels if shift_labels is None else shift_labels
    targets = _check_labels(given, "iu", logits.shape[:2], f"they must be whole numbers of shape {logits.shape[:2]}")
    if shift_labels is None:
        logits, targets = logits[:, :-1], targets[:, 1:]
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.ravel(), num_items_in_batch, ignore_index)


def last_tokens(input_ids: TokenIds, pad_token_id: int) -> Int[np.ndarray, " batch"]:
    """Return the place of each row's rightmost token that is not padding; 0 if the whole row is padding.

    ``argmax(place * (id != pad))``: the last token of the text, with padding on either side. Padding is recognised by
    its id, not by the attention mask. Source: transformers ``GenericForSequenceClassification``.

    Examples
    --------
    >>> last_tokens(np.array([[5, 6, 0, 0], [0, 0, 5, 6]]), pad_token_id=0)
    array([1, 3])
    """
    places = np.arange(input_ids.shape[1])
    last: Array = np.argmax(places * (input_ids != pad_token_id), axis=-1)
    return last


def infer_problem_type(labels: npt.ArrayLike, num_labels: int) -> str:
    """Return the problem type: regression for one class, single label for whole numbers, otherwise multi-label.

    Source: transformers ``ForSequenceClassificationLoss``.

    Examples
    --------
    >>> infer_problem_type([2, 0], 3)
    'single_label_classification'
    """
    if num_labels == 1:
        return "regression"
    return "single_label_classification" if as_array(labels, "labels").dtype.kind in "iu" else MULTI_LABEL


def sequence_classification_loss(
    logits: Float[np.ndarray, "batch labels"], labels: npt.ArrayLike, problem_type: str | None
) -> float:
    """Compute the loss of a sequence classifier, in at least float32.

    The loss is `mean_squared_error`, `cross_entropy` or `binary_cross_entropy`. Source: transformers
    ``ForSequenceClassificationLoss``.

    Parameters
    ----------
    logits : array (batch, num_labels)
    labels : array
        Regression: numbers, of shape ``(batch,)`` for one class and ``(batch, num_labels)`` for several.
        Single label: the class of each sequence, whole numbers of shape ``(batch,)``; -100 is ignored.
        Multi-label: for each sequence and class a number from 0.0 to 1.0.
    problem_type : str, optional
        Selects one of the three losses; see `infer_problem_type` for the default.

    Raises
    ------
    InputError
        If `labels` do not fit the problem type.

    Examples
    --------
    >>> sequence_classification_loss(np.array([[1.0], [2.0]]), [1.0, 4.0], None)
    2.0
    >>> round(sequence_classification_loss(np.zeros((2, 4)), [3, 0], None), 4)
    1.3863
    """
    targets, num_labels = as_array(labels, "labels"), logits.shape[1]
    match problem_type or infer_problem_type(targets, num_labels):
        case "regression" if num_labels == 1:
            return mean_squared_error(logits[:, 0], targets.reshape(-1))
        case "regression":
            return mean_squared_error(logits, targets)
        case "multi_label_classification":
            return binary_cross_entropy(logits, targets)
    if targets.dtype.kind not in "iu" or targets.size != len(logits):
        raise InputError(
            f"labels have shape {targets.shape} and dtype {targets.dtype}: "
            f"they must be one whole number from 0 to {num_labels - 1} for each of the {len(logits)} sequences"
        )
    return cross_entropy(logits, targets.reshape(-1))


def token_classification_loss(logits: Float[np.ndarray, "batch seq labels"], labels: npt.ArrayLike) -> float:
    """Compute `cross_entropy` over all tokens whose label is not -100, in at least float32.

    Source: transformers ``ForTokenClassification``.

    Raises
    ------
    InputError
        If `labels` are not whole numbers ``(batch, seq)``.

    Examples
    --------
    >>> round(token_classification_loss(np.zeros((1, 3, 4)), [[1, -100, 3]]), 4)
    1.3863
    """
    targets = _check_labels(labels, "iu", logits.shape[:2], f"they must be whole numbers of shape {logits.shape[:2]}")
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.ravel())
