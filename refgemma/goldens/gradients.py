"""Compare our gradients with those that PyTorch autograd recorded, in three precisions. Checked by derivatives that are
switched off or wrong by a factor, each of which a recording finds.

`golden/gradients.py` keeps a sketch of each gradient (`refgemma.goldens.sketch`). The tolerance is a multiple of
PyTorch's own rounding error, the difference from its float64 recording; the largest among the gradients of the same name
in all layers counts, because one error may be small by chance. A mistake of ours cannot widen it.

* In float32, `NOISE_FACTOR` times the largest error in the sketches, as for activations (`refgemma.goldens.distance`).
* In float64, the same times ``2**-29``, the ratio of the two unit roundoffs.
* In bfloat16, two correct runs have independent errors: `half_tolerance` of the root mean square of the projections.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from refgemma.backward import Gradients, compute_all_gradients, compute_classifier_gradients
from refgemma.goldens.distance import FLOOR, NOISE_FACTOR
from refgemma.goldens.full_size import half_tolerance
from refgemma.goldens.load import model_of, read_manifest, read_recording, restore_precision
from refgemma.goldens.sketch import PROJECTIONS_AT, sketch
from refgemma.goldens.verify import Comparison
from refgemma.hub import golden_folder
from refgemma.oracle.judge import distance_from, ratio
from refgemma.precision import Array, as_dtype
from refgemma.trace.gradients import named_gradients
from refgemma.weights.parameters import SCORE_BIAS, SCORE_WEIGHT, Score

AGAIN = "record it again with: python golden/record.py --gradients"
DTYPES = ("float64", "float32", "bfloat16")
ROUNDOFF = {"float64": 2.0**-29, "float32": 1.0}  # in units of float32's


def gradient_cases() -> dict[str, Any]:
    """Return the recordings of gradients by name, with provenance and hashes.

    Examples
    --------
    >>> gradient_cases()["bends-packed"]["packed"]
    True
    """
    return dict(read_manifest("gradients", "refgemma-golden-gradients/1")["cases"])


def load_gradients(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return one recording: its entry in the manifest and its tensors."""
    about = gradient_cases()[name]
    tensors = read_recording(golden_folder() / "gradients" / about["file"], about["sha256"], AGAIN)
    return about, {tensor: restore_precision(x) for tensor, x in tensors.items()}


def run_gradients(about: Mapping[str, Any], golden: Mapping[str, Array], dtype: str) -> tuple[float, Gradients]:
    """Return our loss and gradients of a recorded case."""
    config, weights = model_of({**about, "dtype": dtype})
    given = {name: golden[name] for name in ("attention_mask", "position_ids") if name in golden}
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
    yield _compare_loss(loss, golden, dtype)
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
            allowed = ROUNDOFF[dtype] * (NOISE_FACTOR * noise + FLOOR * np.abs(recorded).max())
            distance = ratio(distance_from(computed, recorded), np.full(recorded.shape, allowed))
        yield Comparison(tensor, "run", distance, int(np.sum(computed == recorded)), recorded.size)


def _compare_loss(loss: float, golden: Mapping[str, Array], dtype: str) -> Comparison:
    """Compare the loss, with the tolerances of a gradient's numbers."""
    recorded, exact, single = (float(golden[f"loss.{kind}"][0]) for kind in (dtype, "float64", "float32"))
    if dtype == "bfloat16":
        allowed = math.sqrt(2) * 4 * abs(recorded - exact)
    else:
        allowed = ROUNDOFF[dtype] * (NOISE_FACTOR * abs(single - exact) + FLOOR * abs(recorded))
    return Comparison("loss", "run", abs(loss - recorded) / allowed, int(loss == recorded), 1)
