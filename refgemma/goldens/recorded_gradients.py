"""Compare our gradients with those that PyTorch autograd recorded, in three precisions.

Checked with derivatives that are missing or wrong by a factor; a recording finds each of them.

``golden/gradients.py`` stores a sketch of each gradient (``refgemma.goldens.sketch``). The tolerance is a multiple of
PyTorch's own rounding error: the difference from its float64 recording. One error may be small by chance, so the
largest error of the same gradient in all layers is used. A mistake of ours cannot increase this tolerance.

* In float32, the tolerance is `NOISE_FACTOR` times the largest error in the sketches, as for activations
  (`refgemma.goldens.distance`).
* In float64, it is the float32 tolerance times ``2**-29``, the ratio of the two unit roundoffs.
  At full width, this is less than the effect of one rotary frequency, whose last bit differs from torch's.
* In bfloat16, two correct runs have independent errors; it is `half_tolerance` of the projections' root mean square.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from refgemma.activations import ACTIVATIONS
from refgemma.backward import Gradients, activation_backward, compute_all_gradients, compute_classifier_gradients
from refgemma.config import Gemma2Config
from refgemma.goldens.distance import FLOOR, NOISE_FACTOR
from refgemma.goldens.full_size import half_tolerance, model_of_recording
from refgemma.goldens.load import model_of, read_manifest, read_recording, restore_precision
from refgemma.goldens.sketch import PROJECTIONS_AT, sketch
from refgemma.goldens.verify import Comparison
from refgemma.hub import golden_folder
from refgemma.oracle.judge import distance_from, ratio
from refgemma.oracle.tolerance import UNDERFLOW, U, ulp
from refgemma.precision import Array, as_dtype, as_float64
from refgemma.trace.gradient_names import named_gradients
from refgemma.weights.parameters import SCORE_BIAS, SCORE_WEIGHT, Score, Weights

RECORD_AGAIN = "record it again with: python golden/record.py --gradients"
FORMAT = "refgemma-golden-gradients/1"
GRADIENT_PRECISIONS = ("float64", "float32", "bfloat16")
FLOAT32_UNITS = {"float64": 2.0**-29, "float32": 1.0}  # unit roundoff in units of float32's


def gradient_cases() -> dict[str, Any]:
    """Return the recordings of gradients by name, with provenance and hashes.

    Examples
    --------
    >>> gradient_cases()["bends-packed"]["packed"]
    True
    """
    return dict(read_manifest("gradients", FORMAT)["cases"])


def load_gradients(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return one recording: its entry in the manifest and its tensors."""
    about = gradient_cases()[name]
    tensors = read_recording(golden_folder() / "gradients" / about["file"], about["sha256"], RECORD_AGAIN)
    return about, {tensor: restore_precision(x) for tensor, x in tensors.items()}


def recorded_operations() -> dict[str, Array]:
    """Return the recorded gradients of a soft cap and of a norm in float32, with their inputs.

    Examples
    --------
    >>> sorted(recorded_operations())[:2]
    ['rms_norm.grad', 'rms_norm.grad_weight']
    """
    about = read_manifest("gradients", FORMAT)["operations"]
    return read_recording(golden_folder() / "gradients" / about["file"], about["sha256"], RECORD_AGAIN)


def model_with_gradients(about: Mapping[str, Any], dtype: str) -> tuple[Gemma2Config, Weights]:
    """Return the model of a recorded case: one of the stored models, or two synthetic layers at full width."""
    return model_of_recording(about, dtype, None) if "preset" in about else model_of({**about, "dtype": dtype})


def run_gradients(about: Mapping[str, Any], golden: Mapping[str, Array], dtype: str) -> tuple[float, Gradients]:
    """Return our loss and gradients of a recorded case."""
    config, weights = model_with_gradients(about, dtype)
    config = config.changed(problem_type=about["problem_type"])
    given: dict[str, Any] = {name: golden[name] for name in ("attention_mask", "position_ids") if name in golden}
    ids, labels = golden["input_ids"], golden["labels"]
    if about["head"] == "language model":
        return compute_all_gradients(ids, labels, weights, config, num_items=about["num_items"], **given)
    head = [as_dtype(golden[name], dtype) for name in (SCORE_WEIGHT, SCORE_BIAS) if name in golden]
    return compute_classifier_gradients(
        ids, labels, weights, Score(*head), config, each_token=about["head"] == "token", keep_activations=True, **given
    )


def verify_gradients(name: str, dtype: str) -> Iterator[Comparison]:
    """Compare the loss and every recorded gradient of a case, in the order of the recording.

    Examples
    --------
    >>> all(comparison.conforms for comparison in verify_gradients("no-caps", "float64"))
    True
    """
    about, golden = load_gradients(name)
    loss, gradients = run_gradients(about, golden, dtype)
    yield _compare_gradient_loss(loss, golden, dtype)
    ours = dict(named_gradients(gradients))
    exact, single = golden["sketches.float64"], golden["errors.float32"]
    errors = np.zeros_like(single) if dtype == "float64" else golden[f"errors.{dtype}"]
    fields = [re.sub(r"layers\.\d+\.", "layers.N.", tensor) for tensor in about["names"]]
    for row, tensor in enumerate(about["names"]):
        alike = [number for number, field in enumerate(fields) if field == fields[row]]
        computed, recorded = sketch(ours[tensor]), exact[row] + errors[row]
        if dtype == "bfloat16":
            noise = float(np.mean(errors[alike, PROJECTIONS_AT] ** 2, axis=1).max())
            apart = computed[PROJECTIONS_AT] - recorded[PROJECTIONS_AT]
            distance = ratio(np.sqrt(np.mean(apart**2, keepdims=True)), np.array([half_tolerance(noise)]))
        else:
            noise = float(np.abs(single[alike]).max())
            allowed = FLOAT32_UNITS[dtype] * (NOISE_FACTOR * noise + FLOOR * np.abs(recorded).max())
            distance = ratio(distance_from(computed, recorded), np.full(recorded.shape, allowed))
        yield Comparison(tensor, "run", distance, int(np.sum(computed == recorded)), recorded.size)


def verify_activations(dtype: str) -> Iterator[Comparison]:
    """Compare the gradient of each activation with its recording, on the recorded numbers.

    The tolerance is eight roundings of the result and of `grad`: a derivative is near 1, or is the small difference of
    two terms near 1. Some functions add the term that multiplies the errors of an inner function. This term is
    ``x (1 - t**2) du/dx / 2`` for the tanh forms of GELU, and ``x s (1 - s)`` for `silu` and `quick_gelu`. bfloat16
    adds one ulp of the result. If a function has several kernels, bfloat16 adds one ulp of all these terms instead.

    Examples
    --------
    >>> [comparison.tensor for comparison in verify_activations("float32")][:2]
    ['gelu_pytorch_tanh', 'gelu']
    """
    about = read_manifest("gradients", FORMAT)["activations"]
    golden = read_recording(golden_folder() / "gradients" / about["file"], about["sha256"], RECORD_AGAIN)
    x, grad = (as_dtype(golden[name].astype(np.float32), dtype) for name in ("x", "grad"))
    bent = np.minimum(np.abs(as_float64(x)), 8)  # beyond 8, tanh and sigmoid are 1 in every precision, or very small
    for name in about["names"]:
        recorded = golden[f"{name}.{dtype}"].astype(np.float64)
        computed = as_float64(activation_backward(grad, x, ACTIVATIONS[name]))
        size = np.maximum(np.abs(as_float64(grad)), np.abs(recorded))
        if name in ("gelu_pytorch_tanh", "gelu_new"):
            size = size * (1 + 0.5 * bent * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * bent**2))
        if name in ("quick_gelu", "silu"):
            size = size * (1 + bent)
        allowed = 8 * U * FLOAT32_UNITS.get(dtype, 1.0) * size + UNDERFLOW
        if dtype == "bfloat16":
            allowed = allowed + ulp(size if name in ("gelu_new", "quick_gelu") else recorded, dtype)
        distance = ratio(distance_from(computed, recorded), allowed)
        yield Comparison(name, "operation", distance, int(np.sum(computed == recorded)), recorded.size)


@cache
def _loss_noise(dtype: str) -> float:
    """Return the largest relative error of PyTorch's losses; a single error may be small by chance."""
    recordings = (load_gradients(name)[1] for name in gradient_cases())
    return max(float(np.abs(x[f"loss.{dtype}"] / x["loss.float64"] - 1)[0]) for x in recordings)


def _compare_gradient_loss(loss: float, golden: Mapping[str, Array], dtype: str) -> Comparison:
    """Compare the loss; the tolerance is `NOISE_FACTOR` times PyTorch's error."""
    recorded = float(golden[f"loss.{dtype}"][0])
    noise = _loss_noise("float32" if dtype == "float64" else dtype)
    allowed = FLOAT32_UNITS.get(dtype, 1.0) * NOISE_FACTOR * noise * abs(recorded)
    return Comparison("loss", "run", abs(loss - recorded) / allowed, int(loss == recorded), 1)
