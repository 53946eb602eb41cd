"""Compare refgemma with PyTorch at the size of the 9B and the 27B, on *synthetic* weights: nobody trained them, so this
is about arithmetic at full width and depth, not about what a released model answers.

Checked by making mistakes on purpose, which are found, in the tests; recorded by `golden/full_size.py`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refgemma.cache import Cache
from refgemma.config import Gemma2Config
from refgemma.hub import golden_folder
from refgemma.model import begin, blocks, head, next_past
from refgemma.ops import rms_norm
from refgemma.oracle.compare import half_rounding_noise, run_distance
from refgemma.oracle.sketch import LENGTH, sketch
from refgemma.oracle.trace import named_tensors
from refgemma.oracle.verify import AGAIN, CaseResult, Comparison, GoldenError
from refgemma.precision import Array, as_dtype, wide
from refgemma.weights.parameters import Weights
from refgemma.weights.synthetic import synthetic_weights

FORMAT = "refgemma-golden-full/1"
TOP_LOGITS = 3e-5  # of the largest logit: what was asked for at full depth
TWO_LAYERS = "-two-layers"


def read_full_manifest() -> dict[str, Any]:
    """The recordings at full size, with provenance and hashes."""
    path = golden_folder() / "full" / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        cases: dict[str, Any] = manifest["cases"]
        if manifest["format"] != FORMAT:
            raise GoldenError(f"{path}: is not a manifest of the format {FORMAT}; {AGAIN}")
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error) if isinstance(error, GoldenError) else f"{path}: cannot be read: {error!r}; {AGAIN}"
        raise GoldenError(reason) from None
    return cases


def two_layer_names() -> list[str]:
    """The recordings of two layers at full width, which ``refgemma verify`` compares among others.

    Examples
    --------
    >>> two_layer_names()[-1]
    '9b-synthetic-two-layers'
    """
    return sorted(name for name in read_full_manifest() if name.endswith(TWO_LAYERS))


def is_full_size(name: str) -> bool:
    """Whether `name` is meant for a recording at full size.

    Examples
    --------
    >>> is_full_size("9b-synthetic"), is_full_size("tiny-forward-f32")
    (True, False)
    """
    return "-synthetic" in name


def load_full(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """One recording: its entry in the manifest and its tensors.

    Examples
    --------
    >>> load_full("9b-synthetic-two-layers")[0]["weights"]
    'synthetic, seed 2: nobody trained them'
    """
    cases = read_full_manifest()
    if name not in cases:
        whole = ", ".join(sorted(case for case in cases if not case.endswith(TWO_LAYERS)))
        raise GoldenError(f"unknown recording {name!r}; there are {whole}")
    path = golden_folder() / "full" / cases[name]["file"]
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != cases[name]["sha256"]:
            raise GoldenError(f"{path}: is not the file of the manifest (other sha256); {AGAIN}")
        return cases[name], load_file(path)
    except (OSError, SafetensorError) as error:
        raise GoldenError(f"{path}: cannot be read: {error}; {AGAIN}") from None


def sketches_of(ids: Array, calls: list[int], weights: Weights, config: Gemma2Config) -> Iterator[tuple[str, Array]]:
    """The name of every tensor of every call with its sketch; of the first call the norm and the last logits whole too.

    One block is in memory at a time.
    """
    cache, done = None, 0
    for call, length in enumerate(calls):
        start = begin(ids[:, done : done + length], weights, config, cache=cache)
        yield from ((f"calls.{call}.{name}", sketch(getattr(start, name))) for name in ("cos", "sin", "embedded"))
        present, hidden = [], start.embedded
        for layer, record in enumerate(blocks(start, weights, config)):
            for name, tensor in named_tensors(record, f"layers.{layer}."):
                yield f"calls.{call}.{name}", sketch(tensor)
            present.append(next_past(layer, record, config))
            hidden = record.out
        norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
        raw_logits, logits = head(norm[:, -1:], weights, config)
        yield f"calls.{call}.norm", sketch(norm)
        yield f"calls.{call}.raw_logits", sketch(raw_logits)
        yield f"calls.{call}.logits", sketch(logits)
        if call == 0:
            yield "last_hidden_state", norm
            yield "top_logits", logits[0, -1]
        cache, done = Cache(present), done + length


def half_distance(computed: Array, recorded: Array, noise: float) -> float:
    """Of a half-precision sketch from the recorded one, in units of what two independent roundings explain.

    Of independent roundings the difference is sqrt(2) times one of them, as in `half_run_distance`. Both are estimated
    from the few numbers of a sketch, with a relative deviation of ``1 / sqrt(2 * LENGTH)`` each, so that of their ratio
    it is ``1 / sqrt(LENGTH)``: four of those are allowed.
    """
    root_mean_square = math.sqrt(float(np.mean((computed - recorded) ** 2)))
    allowed = math.sqrt(2 * noise) * (1 + 4 / math.sqrt(LENGTH))
    return root_mean_square / allowed if allowed else (math.inf if root_mean_square else 0.0)


def _compare_top(computed: Array, golden: Mapping[str, Array], dtype: str) -> Iterator[Comparison]:
    """The best tokens of the prompt's last place: in float32 all 64 and their logits, in half precision the first."""
    ids, logits = golden[f"top_ids.{dtype}"], golden[f"top_logits.{dtype}"]
    ours = wide(computed)
    if dtype == "float32":
        best = np.argsort(-ours, kind="stable")[: len(ids)]
        apart = float(np.abs(ours[ids] - logits).max()) / (TOP_LOGITS * float(np.abs(logits).max()))
    else:
        ids = ids[:1]
        best, apart = np.argmax(ours, keepdims=True), 0.0
    same = int(np.sum(best == ids))
    yield Comparison("top_ids", "run", 0.0 if same == len(ids) else math.inf, same, len(ids))
    yield Comparison("top_logits", "run", apart, int(np.sum(ours[ids] == logits[: len(ids)])), len(ids))


def verify_full(name: str, dtype: str = "float32", weights: Weights | None = None) -> Iterator[Comparison | str]:
    """Compare one model at full size with its recording; first yields the name of each tensor, then its comparison.

    Parameters
    ----------
    name : str
        ``9b-synthetic``, ``27b-synthetic``, or one of them with ``-two-layers``.
    dtype : str
        ``float32`` or ``bfloat16``.
    weights : Weights, optional
        In place of the synthetic ones, for instance the same from disk.
    """
    about, golden = load_full(name)
    if f"sketches.{dtype}" not in golden:
        raise GoldenError(f"{name}: was recorded in float32 and bfloat16, not in {dtype}")
    config = Gemma2Config.preset(about["preset"]).changed(num_hidden_layers=about["layers"])
    place = {tensor: number for number, tensor in enumerate(about["names"])}
    recorded, single, double = (golden[f"sketches.{t}"] for t in (dtype, "float32", "float64"))
    made = synthetic_weights(config, dtype) if weights is None else weights
    for tensor, computed in sketches_of(golden["input_ids"], about["calls"], made, config):
        yield tensor
        if tensor == "top_logits":
            yield from _compare_top(computed, golden, dtype)
        elif tensor == "last_hidden_state" and f"last_hidden_state.{dtype}" in golden:
            theirs = np.asarray(as_dtype(golden[f"last_hidden_state.{dtype}"].astype(np.float32), "float32"))
            n = place["calls.0.norm"]
            if dtype == "float32":
                distance = run_distance(computed, theirs, float(np.abs(single[n] - double[n]).max()))
            else:
                distance = half_distance(np.asarray(computed), theirs, half_rounding_noise(recorded[n], single[n]))
            yield Comparison(tensor, "run", distance, int(np.sum(computed == theirs)), theirs.size)
        elif tensor in place:
            n = place[tensor]
            if dtype == "float32":
                distance = run_distance(computed, recorded[n], float(np.abs(single[n] - double[n]).max()))
            else:
                distance = half_distance(computed, recorded[n], half_rounding_noise(recorded[n], single[n]))
            yield Comparison(tensor, "run", distance, int(np.sum(computed == recorded[n])), LENGTH)


def full_result(name: str, dtype: str, comparisons: list[Comparison]) -> CaseResult:
    """The comparisons as a case of ``refgemma verify``."""
    return CaseResult(f"{name}-{'f32' if dtype == 'float32' else 'bf16'}", load_full(name)[0], tuple(comparisons))
