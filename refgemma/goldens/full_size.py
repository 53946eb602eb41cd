"""Compare refgemma with PyTorch at the size of the 9B and the 27B, on *synthetic* weights: nobody trained them, so this
is about arithmetic at full width and depth, not about what a released model answers.

Checked by making mistakes on purpose, which are found, in the tests; recorded by `golden/full_size.py`.
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

TOP_LOGITS = 3e-5  # of the largest logit: what was asked for at full depth
TWO_LAYERS, SYNTHETIC, CHECKPOINT = "-two-layers", "-synthetic", "checkpoint-"  # in the names of recordings
PIECE = 256  # a call of more tokens than this is computed in pieces, and sketched after each layer only
# In half precision the first tensors come of the same numbers, rounded at the same places: an element differs only
# where a float32 sum falls on the other side of a rounding boundary, 1 in 1000 of an operation (tests/test_golden.py).
# Four operations deep that is 0.13 of 32 samples; more than three are as good as impossible (1e-5), where rounding at
# other places moves seven or more (tools/full_size_mistakes.py).
FIRST = re.compile(
    r"calls\.\d+\.(cos|sin|embedded|layers\.0\.input_layernorm|layers\.0\.attention\.([qkv]|[qk]_rot|scores|capped))"
)
FLIPPED = 3
SAMPLED = 4096  # bytes of either end of a tensor that its fingerprint reads


def read_full_manifest() -> dict[str, Any]:
    """The recordings at full size, with provenance and hashes."""
    return dict(read_manifest("full", "refgemma-golden-full/1")["cases"])


def two_layer_names() -> list[str]:
    """The recordings of two layers at full width, which ``refgemma verify`` compares among others.

    Examples
    --------
    >>> two_layer_names()[-1]
    '9b-synthetic-two-layers'
    """
    return sorted(name for name in read_full_manifest() if name.endswith(TWO_LAYERS))


def is_full_size(name: str) -> bool:
    """Return whether `name` is meant for a recording at full size.

    Examples
    --------
    >>> is_full_size("9b-synthetic"), is_full_size("tiny-forward-f32")
    (True, False)
    """
    return SYNTHETIC in name or name.startswith(CHECKPOINT)


def load_full(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """One recording: its entry in the manifest and its tensors.

    Examples
    --------
    >>> load_full("9b-synthetic-two-layers")[0]["weights"]
    'synthetic, seed 2: nobody trained them'
    """
    cases = read_full_manifest()
    if name not in cases:
        whole = ", ".join(sorted(case for case in cases if SYNTHETIC in case))
        raise GoldenError(f"unknown recording {name!r}; there are {whole}")
    return cases[name], read_recording(golden_folder() / "full" / cases[name]["file"], cases[name]["sha256"])


def fingerprint(checkpoint: Checkpoint) -> str:
    """A name for the weights of a checkpoint: of names, formats, shapes, and the first and last 4 KiB of each tensor.

    Enough to tell one checkpoint from another, base from instruction-tuned for instance; not to find a single changed
    weight. The configuration is left out, so that a wrong one is found as a difference.

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
    """The name of the recording of these weights, made by ``golden/record.py --checkpoint``.

    Raises
    ------
    GoldenError
        If there is none.
    """
    wanted = fingerprint(checkpoint)
    for name, about in read_full_manifest().items():
        if about.get("checkpoint") == wanted:
            return name
    raise GoldenError(
        f"{checkpoint.folder}: there is no recording of these weights; make one, with PyTorch: python "
        f"golden/record.py --checkpoint {checkpoint.folder} (if they are synthetic, there is: give --full 9b-synthetic)"
    )


def _run_long_call(
    ids: Array, cache: Cache | None, weights: Weights, config: Gemma2Config, layers: fast.Outputs
) -> tuple[list[Array], Cache | None]:
    """What each layer gives for a long call, computed piece by piece so that the scores fit in memory."""
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
    """Of each layer its named tensors, what it gives, and what it remembers; of a fast one only what it gives."""
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
    """The name of every tensor of every call with its sketch; of the first whole call its norm and logits too.

    One block is in memory at a time. Of a call of more than `PIECE` tokens there is what each layer gives, and of fast
    blocks (`reference` is false) no more either.
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


WHOLE = ("last_hidden_state", "top_logits", "loss")  # of the first whole call, after its sketches


def steps_of(names: Iterable[str], reference: bool) -> list[str]:
    """What `sketches_of` gives of a recording with these `names`: so how much there is to do.

    Examples
    --------
    >>> steps_of(["calls.0.cos", "calls.0.layers.3.attention.out", "calls.0.layers.3.out"], reference=False)[:2]
    ['calls.0.cos', 'calls.0.layers.3.out']
    """
    inside = re.compile(r"calls\.\d+\.layers\.\d+\.(?!out$)")
    return [*(name for name in names if reference or not inside.match(name)), *WHOLE]


def half_tolerance(noise: float) -> float:
    """The root mean square difference of two half-precision tensors that rounding explains, with mean square `noise`.

    Of independent roundings the difference is sqrt(2) times one of them, as in `half_run_distance`. The projections of
    a sketch tell it with a relative deviation of ``1 / sqrt(2 * PROJECTIONS)``: four of those are allowed.
    """
    return math.sqrt(2 * noise) * (1 + 4 / math.sqrt(2 * PROJECTIONS))


def neighbours(tensor: str) -> Iterator[str]:
    """The names of a tensor in the first four calls, in its layer and in those before and after it.

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
    """The sketches of one recording: of one precision, and what tells its rounding error."""

    dtype: str
    names: Mapping[str, int]
    sketches: Array
    single: Array  # PyTorch's float32
    double: Array  # PyTorch's float64

    def noise(self, tensor: str) -> float:
        """Of float32 the largest error in the sketch; of half precision the mean square error of the tensor.

        In half precision only the projections tell that: into each goes every element. A score of 40 is rounded to a
        quarter, so a few attention weights are far off in any correct run; whether one of them is a sample is chance.

        What few errors tell is itself uncertain, and may by chance be small. So those of the same tensor in the layers
        before and after, and in other calls, are looked at too, since errors there are of the same size, and the
        largest counts. All of them are PyTorch's; no mistake of ours widens them.
        """
        alike = [self.names[name] for name in neighbours(tensor) if name in self.names]
        if self.dtype == "float32":
            return float(np.abs(self.single[alike] - self.double[alike]).max())
        errors = self.sketches[alike, PROJECTIONS_AT] - self.single[alike, PROJECTIONS_AT]
        return float(np.mean(errors**2, axis=1).max())

    def distance(self, tensor: str, computed: Array, recorded: Array) -> float:
        """Of something as large as `tensor` from its recording, in units of what rounding explains."""
        if self.dtype == "float32":
            return run_distance(computed, recorded, self.noise(tensor))
        apart = math.sqrt(float(np.mean((np.asarray(computed, np.float64) - recorded) ** 2)))
        allowed = half_tolerance(self.noise(tensor))
        return apart / allowed if allowed else (math.inf if apart else 0.0)

    def sketch_distance(self, tensor: str, computed: Array) -> float:
        """Of a sketch of `tensor` from the recorded one, in units of what rounding explains."""
        recorded = self.sketches[self.names[tensor]]
        if self.dtype == "float32":
            return self.distance(tensor, computed, recorded)
        distance = self.distance(tensor, computed[PROJECTIONS_AT], recorded[PROJECTIONS_AT])
        if FIRST.fullmatch(tensor):
            return max(distance, int(np.sum(computed[SAMPLES_AT] != recorded[SAMPLES_AT])) / FLIPPED)
        return distance

    def loss_distance(self, logits: str, computed: Array, recorded: Array) -> float:
        """Of the mean of ``-log p``, each of which an error of e in the logits changes by at most 2 e."""
        if self.dtype == "float32":
            allowed = NOISE_FACTOR * self.noise(logits) + FLOOR * float(self.sketches[self.names[logits]][1])
        else:
            allowed = half_tolerance(self.noise(logits))
        return float(np.abs(computed - recorded).max()) / (2 * allowed)


def _compare_top(logits: str, computed: Array, golden: Mapping[str, Array], recorded: Recorded) -> Iterator[Comparison]:
    """The best tokens of the prompt's last place: in float32 all 64, their order and their logits, else the first.

    ``top_ids`` is about which they are: another one among them conforms only if its logit is above that of PyTorch's
    last by no more than rounding allows. ``top_order`` is about their places: two may change them only if PyTorch has
    them no further apart than that, since rounding has decided their order then.
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
    """What was recorded: synthetic weights, unless they are read from a checkpoint."""
    changes = about.get("changes", {})
    if checkpoint is None and "preset" not in about:
        raise GoldenError(f"{about['weights']} was recorded; give the folder that holds it: --model DIR")
    if checkpoint is None:
        config = Gemma2Config.preset(about["preset"]).changed(**changes)
        return config, synthetic_weights(config, dtype)
    if "preset" in about and tensor_shapes(checkpoint.config) != tensor_shapes(Gemma2Config.preset(about["preset"])):
        raise GoldenError(f"{checkpoint.folder}: is a model of another size than the one recorded")
    config, weights = checkpoint.config.changed(**changes), checkpoint.weights(dtype)
    if "vocab_size" in changes:
        weights = replace(weights, embed_tokens=weights.embed_tokens[: config.vocab_size])
    return config, weights


def verify_full(
    name: str, dtype: str = "float32", checkpoint: Checkpoint | None = None, reference: bool = True
) -> Iterator[Comparison | str]:
    """Compare one model at full size with its recording; yields the name of each tensor, and then its comparison.

    Parameters
    ----------
    name : str
        ``9b-synthetic``, ``27b-synthetic``, one of them with ``-two-layers`` or ``-long``; or what `recording_of` says.
    dtype : str
        ``float32`` or ``bfloat16``.
    checkpoint : Checkpoint, optional
        What the weights are read from; by default synthetic ones are made as they are needed.
    reference : bool
        Compare every tensor of the definition; else, in float32, what each layer of `refgemma.fast` gives.

    Raises
    ------
    GoldenError
        If there is no such recording, or the checkpoint is not what was recorded.
    """
    about, golden = load_full(name)
    if f"top_ids.{dtype}" not in golden:
        raise GoldenError(f"{name}: was recorded in float32 and bfloat16, not in {dtype}")
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
    """The comparisons as a case of ``refgemma verify``."""
    return CaseResult(f"{name}-{'f32' if dtype == 'float32' else 'bf16'}", load_full(name)[0], tuple(comparisons))
