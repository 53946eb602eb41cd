"""Compare refgemma with PyTorch at the size of the 9B and the 27B, on *synthetic* (untrained) weights. This tests the
arithmetic at full width and depth, not the outputs of a released model.

Checked by mistakes made on purpose, which the tests find; recorded by `golden/full_size.py`.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refgemma import fast
from refgemma.cache import Cache, LayerCache
from refgemma.config import Gemma2Config
from refgemma.files import open_file
from refgemma.generation.perplexity import label_losses
from refgemma.goldens.distance import FLOOR, NOISE_FACTOR, run_distance
from refgemma.goldens.load import GoldenError, read_manifest, read_recording
from refgemma.goldens.sketch import LENGTH, PROJECTIONS, PROJECTIONS_AT, SAMPLES_AT, sketch
from refgemma.goldens.verify import CaseResult, Comparison
from refgemma.hub import golden_folder
from refgemma.model import Start, begin, blocks, head, next_past, reference_outputs
from refgemma.ops import rms_norm
from refgemma.precision import Array, wide
from refgemma.trace.names import named_tensors
from refgemma.weights.checkpoint import Checkpoint
from refgemma.weights.parameters import Weights, tensor_shapes
from refgemma.weights.synthetic import synthetic_weights

TOP_LOGITS = 3e-5  # of the largest logit: the requirement at full depth
TWO_LAYERS, SYNTHETIC, CHECKPOINT = "-two-layers", "-synthetic", "checkpoint-"  # in the names of recordings
PIECE = 256  # a call with more tokens is computed in pieces, and sketched only after each layer
# In half precision the first tensors are computed from the same numbers, rounded at the same places. An element differs
# only if a float32 sum falls on the other side of a rounding boundary, 1 in 1000 per operation (tests/test_golden.py).
# After four operations this is 0.13 of 32 samples; more than three are practically impossible (1e-5). Rounding at other
# places changes seven or more (tools/full_size_mistakes.py).
FIRST = re.compile(
    r"calls\.\d+\.(cos|sin|embedded|layers\.0\.input_layernorm|layers\.0\.attention\.([qkv]|[qk]_rot|scores|capped))"
)
FLIPPED = 3
SAMPLED = 4096  # bytes at each end of a tensor that its fingerprint reads


def read_full_manifest() -> dict[str, Any]:
    """Return the recordings at full size, with provenance and hashes."""
    return dict(read_manifest("full", "refgemma-golden-full/1")["cases"])


def two_layer_names() -> list[str]:
    """Return the names of the recordings of two full-width layers, which ``refgemma verify`` includes.

    Examples
    --------
    >>> two_layer_names()[-1]
    '9b-synthetic-two-layers'
    """
    return sorted(name for name in read_full_manifest() if name.endswith(TWO_LAYERS))


def is_full_size(name: str) -> bool:
    """Return True if `name` is the name of a recording at full size.

    Examples
    --------
    >>> is_full_size("9b-synthetic"), is_full_size("tiny-forward-f32")
    (True, False)
    """
    return SYNTHETIC in name or name.startswith(CHECKPOINT)


def load_full(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return one recording: its entry in the manifest and its tensors.

    Examples
    --------
    >>> load_full("9b-synthetic-two-layers")[0]["weights"]
    'synthetic, seed 2: nobody trained them'
    """
    cases = read_full_manifest()
    if name not in cases:
        whole = ", ".join(sorted(case for case in cases if SYNTHETIC in case))
        raise GoldenError(f"unknown recording {name!r}; the recordings are {whole}")
    return cases[name], read_recording(golden_folder() / "full" / cases[name]["file"], cases[name]["sha256"])


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash the weights of a checkpoint: names, formats, shapes, and the first and last 4 KiB of each tensor.

    This distinguishes checkpoints, for example a base model from an instruction-tuned one, but does not find a single
    changed weight. The configuration is not included, so a wrong configuration is reported as a difference.

    Examples
    --------
    >>> from refgemma.hub import find_model
    >>> from refgemma.weights.checkpoint import open_checkpoint
    >>> fingerprint(open_checkpoint(find_model("tiny")))[:12]
    'c30a3c253455'
    """
    found = hashlib.sha256()
    for name, stored in checkpoint.tensors.items():
        found.update(f"{name} {stored.dtype} {stored.shape}".encode())
        with open_file(stored.file) as file:
            for start in (stored.start, stored.start + max(0, stored.nbytes - SAMPLED)):
                file.seek(start)
                found.update(file.read(min(SAMPLED, stored.nbytes)))
    return found.hexdigest()


def recording_of(checkpoint: Checkpoint) -> str:
    """Return the name of the recording of these weights, made by ``golden/record.py --checkpoint``.

    Raises
    ------
    GoldenError
        If there is no such recording.
    """
    wanted = fingerprint(checkpoint)
    for name, about in read_full_manifest().items():
        if about.get("checkpoint") == wanted:
            return name
    raise GoldenError(
        f"{checkpoint.folder}: these weights have no recording; record them with PyTorch: python "
        f"golden/record.py --checkpoint {checkpoint.folder} (for synthetic weights use --full 9b-synthetic)"
    )


def _run_long_call(
    ids: Array, cache: Cache | None, weights: Weights, config: Gemma2Config, layers: fast.Outputs
) -> tuple[list[Array], Cache | None]:
    """Return the output of each layer for a long call, computed in pieces so that the scores fit in memory."""
    outs: list[list[Array]] = [[] for _ in range(config.num_hidden_layers)]
    for first in range(0, ids.shape[1], PIECE):
        start, present = begin(ids[:, first : first + PIECE], weights, config, cache=cache), []
        for layer, (out, past) in enumerate(layers(start, weights, config)):
            outs[layer].append(out)
            present.append(past)
        cache = Cache(present)
    return [np.concatenate(out, axis=1) for out in outs], cache


def _layers(
    start: Start, weights: Weights, config: Gemma2Config, reference: bool
) -> Iterator[tuple[Iterator[tuple[str, Array]], Array, LayerCache]]:
    """Yield the named tensors, the output and the cache of each layer; for fast layers, the only tensor is the
    output."""
    if not reference:
        for layer, (out, past) in enumerate(fast.outputs(start, weights, config)):
            yield iter([(f"layers.{layer}.out", out)]), out, past
        return
    layer = 0
    for record in blocks(start, weights, config):
        yield named_tensors(record, f"layers.{layer}."), record.out, next_past(layer, record, config)
        del record
        layer += 1


def sketches_of(
    ids: Array, calls: list[int], weights: Weights, config: Gemma2Config, reference: bool = True
) -> Iterator[tuple[str, Array]]:
    """Yield the name and sketch of every tensor of every call, and the norm and logits of the first short call.

    One block is in memory at a time. For a call of more than `PIECE` tokens, and for fast blocks (`reference` is
    false), only the outputs of the layers are sketched.
    """
    cache, done, first = None, 0, True
    for call, length in enumerate(calls):
        wanted = ids[:, done : done + length]
        done += length
        if length > PIECE:
            layers = reference_outputs if reference else fast.outputs
            outs, cache = _run_long_call(wanted, cache, weights, config, layers)
            yield from ((f"calls.{call}.layers.{layer}.out", sketch(out)) for layer, out in enumerate(outs))
            continue
        start = begin(wanted, weights, config, cache=cache)
        yield from ((f"calls.{call}.{name}", sketch(getattr(start, name))) for name in ("cos", "sin", "embedded"))
        present, hidden = [], start.embedded
        for tensors, out, past in _layers(start, weights, config, reference):
            yield from ((f"calls.{call}.{name}", sketch(tensor)) for name, tensor in tensors)
            present.append(past)
            hidden = out
            del tensors
        norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
        raw_logits, logits = (head if reference else fast.fast_head)(norm[:, -1:], weights, config)
        yield f"calls.{call}.norm", sketch(norm)
        yield f"calls.{call}.raw_logits", sketch(raw_logits)
        yield f"calls.{call}.logits", sketch(logits)
        if first:
            yield "last_hidden_state", norm
            yield "top_logits", logits[0, -1]
            yield "loss", label_losses(norm[:, :-1], wanted[:, 1:], weights, config).mean(keepdims=True)
        cache, first = Cache(present), False


WHOLE = ("last_hidden_state", "top_logits", "loss")  # of the first short call, after its sketches


def steps_of(names: Iterable[str], reference: bool) -> list[str]:
    """Return the names that `sketches_of` yields for a recording with these `names`, for a progress bar.

    Examples
    --------
    >>> steps_of(["calls.0.cos", "calls.0.layers.3.attention.out", "calls.0.layers.3.out"], reference=False)[:2]
    ['calls.0.cos', 'calls.0.layers.3.out']
    """
    inside = re.compile(r"calls\.\d+\.layers\.\d+\.(?!out$)")
    return [*(name for name in names if reference or not inside.match(name)), *WHOLE]


def half_tolerance(noise: float) -> float:
    """Return the tolerance of the root mean square difference of two half-precision tensors, from the mean square
    `noise`.

    Independent roundings differ by sqrt(2) times one of them, as in `run_distance`. The projections of a sketch measure
    this with a relative deviation of ``1 / sqrt(2 * PROJECTIONS)``; the tolerance adds four of these deviations.
    """
    return math.sqrt(2 * noise) * (1 + 4 / math.sqrt(2 * PROJECTIONS))


def neighbours(tensor: str) -> Iterator[str]:
    """Yield the names of a tensor in the first four calls, in its layer and in the layers before and after it.

    Examples
    --------
    >>> list(neighbours("calls.0.norm"))[:2], list(neighbours("calls.1.layers.7.out"))[:3]
    (['calls.0.norm', 'calls.1.norm'], ['calls.0.layers.6.out', 'calls.0.layers.7.out', 'calls.0.layers.8.out'])
    """
    _, _, *place = tensor.split(".")
    for call in range(4):
        if place[0] != "layers":
            yield ".".join([f"calls.{call}", *place])
            continue
        for layer in (int(place[1]) + step for step in (-1, 0, 1)):
            yield ".".join([f"calls.{call}", "layers", str(layer), *place[2:]])


@dataclass(frozen=True)
class Recorded:
    """The sketches of one recording: in one precision, and those that measure its rounding error."""

    dtype: str
    names: Mapping[str, int]
    sketches: Array
    single: Array  # PyTorch's float32
    double: Array  # PyTorch's float64

    def noise(self, tensor: str) -> float:
        """Return the rounding error: in float32 the largest error in the sketch, else the mean square error of the
        tensor.

        In half precision only the projections measure it, because every element contributes to each of them. A score of
        40 is rounded to a multiple of a quarter, so a few attention weights have large errors in any correct run. It is
        chance if one of them is a sample.

        An estimate from few errors is uncertain, and may by chance be small. So the errors of the same tensor in the
        layers before and after, and in other calls, are used too, because they have the same size. The largest counts.
        All of them are PyTorch's errors, so a mistake of ours does not widen them.
        """
        alike = [self.names[name] for name in neighbours(tensor) if name in self.names]
        if self.dtype == "float32":
            return float(np.abs(self.single[alike] - self.double[alike]).max())
        errors = self.sketches[alike, PROJECTIONS_AT] - self.single[alike, PROJECTIONS_AT]
        return float(np.mean(errors**2, axis=1).max())

    def distance(self, tensor: str, computed: Array, recorded: Array) -> float:
        """Return the distance of numbers of the size of `tensor` from their recording, in units of the tolerance."""
        if self.dtype == "float32":
            return run_distance(computed, recorded, self.noise(tensor))
        apart = math.sqrt(float(np.mean((np.asarray(computed, np.float64) - recorded) ** 2)))
        allowed = half_tolerance(self.noise(tensor))
        return apart / allowed if allowed else (math.inf if apart else 0.0)

    def sketch_distance(self, tensor: str, computed: Array) -> float:
        """Return the distance of a sketch of `tensor` from the recorded one, in units of the tolerance."""
        recorded = self.sketches[self.names[tensor]]
        if self.dtype == "float32":
            return self.distance(tensor, computed, recorded)
        distance = self.distance(tensor, computed[PROJECTIONS_AT], recorded[PROJECTIONS_AT])
        if FIRST.fullmatch(tensor):
            return max(distance, int(np.sum(computed[SAMPLES_AT] != recorded[SAMPLES_AT])) / FLIPPED)
        return distance

    def loss_distance(self, logits: str, computed: Array, recorded: Array) -> float:
        """Return the distance of the mean of ``-log p``; an error of e in the logits changes each by at most 2 e."""
        if self.dtype == "float32":
            allowed = NOISE_FACTOR * self.noise(logits) + FLOOR * float(self.sketches[self.names[logits]][1])
        else:
            allowed = half_tolerance(self.noise(logits))
        return float(np.abs(computed - recorded).max()) / (2 * allowed)


def _compare_top(logits: str, computed: Array, golden: Mapping[str, Array], recorded: Recorded) -> Iterator[Comparison]:
    """Compare the best tokens of the prompt's last place: in float32 all 64, their order and logits, else the first.

    ``top_ids`` compares the set. A different token conforms only if its logit exceeds PyTorch's last one by at most the
    tolerance. ``top_order`` compares the order. Two tokens may be exchanged only if PyTorch's logits for them differ by
    at most the tolerance, because then rounding decides their order.
    """
    ids, logit = golden[f"top_ids.{recorded.dtype}"], golden[f"top_logits.{recorded.dtype}"]
    ours = wide(computed)
    if recorded.dtype == "float32":
        count, allowed = len(ids), TOP_LOGITS * float(np.abs(logit).max())
    else:
        count, allowed = 1, half_tolerance(recorded.noise(logits))
    best = np.argsort(-ours, kind="stable")[:count]
    beyond = (ours[np.setdiff1d(best, ids)] - logit[-1]).max(initial=0)
    yield Comparison("top_ids", "run", float(beyond) / allowed, len(np.intersect1d(best, ids[:count])), count)
    lead = (logit[:count, None] - logit)[ours[ids[:count], None] < ours[ids]].max(initial=0)
    yield Comparison("top_order", "run", float(lead) / allowed, int(np.sum(best == ids[:count])), count)
    if recorded.dtype == "float32":
        apart = float(np.abs(ours[ids] - logit).max()) / allowed
        yield Comparison("top_logits", "run", apart, int(np.sum(ours[ids] == logit)), len(ids))


def model_of_recording(
    about: Mapping[str, Any], dtype: str, checkpoint: Checkpoint | None
) -> tuple[Gemma2Config, Weights]:
    """Return the recorded model: with synthetic weights, or with those of a checkpoint."""
    changes = about.get("changes", {})
    if checkpoint is None and "preset" not in about:
        raise GoldenError(f"the recording is of {about['weights']}; give its folder: --model DIR")
    if checkpoint is None:
        config = Gemma2Config.preset(about["preset"]).changed(**changes)
        return config, synthetic_weights(config, dtype)
    if "preset" in about and tensor_shapes(checkpoint.config) != tensor_shapes(Gemma2Config.preset(about["preset"])):
        raise GoldenError(f"{checkpoint.folder}: the model has another size than the recorded one")
    config, weights = checkpoint.config.changed(**changes), checkpoint.weights(dtype)
    if "vocab_size" in changes:
        weights = replace(weights, embed_tokens=weights.embed_tokens[: config.vocab_size])
    return config, weights


def verify_full(
    name: str, dtype: str = "float32", checkpoint: Checkpoint | None = None, reference: bool = True
) -> Iterator[Comparison | str]:
    """Compare one model at full size with its recording; yield the name of each tensor, then its comparison.

    Parameters
    ----------
    name : str
        ``9b-synthetic``, ``27b-synthetic``, one of them with ``-two-layers`` or ``-long``; or the result of
        `recording_of`.
    dtype : str
        ``float32`` or ``bfloat16``.
    checkpoint : Checkpoint, optional
        The source of the weights; by default synthetic weights are generated when they are needed.
    reference : bool
        Compare every tensor of the definition; else, in float32, the output of each layer of `refgemma.fast`.

    Raises
    ------
    GoldenError
        If there is no such recording, or the checkpoint is not the recorded one.
    """
    about, golden = load_full(name)
    if f"top_ids.{dtype}" not in golden:
        raise GoldenError(f"{name}: there is no recording in {dtype}, only in float32 and bfloat16")
    config, weights = model_of_recording(about, dtype, checkpoint)
    names = {tensor: number for number, tensor in enumerate(about["names"])}
    kinds = (golden[f"sketches.{kind}"] for kind in (dtype, "float32", "float64"))
    recorded = Recorded(dtype, names, *kinds)
    last = f"calls.{next(n for n, length in enumerate(about['calls']) if length <= PIECE)}"
    definition = reference or dtype != "float32"
    for tensor, computed in sketches_of(golden["input_ids"], about["calls"], weights, config, definition):
        yield tensor
        whole = golden.get(f"{tensor}.{dtype}")
        if tensor in names:
            expected = recorded.sketches[names[tensor]]
            distance = recorded.sketch_distance(tensor, computed)
            yield Comparison(tensor, "run", distance, int(np.sum(computed == expected)), LENGTH)
        elif tensor == "top_logits":
            yield from _compare_top(f"{last}.logits", computed, golden, recorded)
        elif tensor == "loss" and whole is not None:
            distance = recorded.loss_distance(f"{last}.logits", computed, whole)
            yield Comparison(tensor, "run", distance, int(np.sum(computed == whole)), 1)
        elif whole is not None:
            theirs = whole.astype(np.float32)
            distance = recorded.distance(f"{last}.norm", computed, theirs)
            yield Comparison(tensor, "run", distance, int(np.sum(computed == theirs)), theirs.size)


def full_result(name: str, dtype: str, comparisons: list[Comparison]) -> CaseResult:
    """Return the comparisons as a case of ``refgemma verify``."""
    return CaseResult(f"{name}-{'f32' if dtype == 'float32' else 'bf16'}", load_full(name)[0], tuple(comparisons))
