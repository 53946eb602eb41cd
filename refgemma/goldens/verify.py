"""Compare refgemma with the goldens, what PyTorch recorded: case by case, tensor by tensor, in the order of execution.

Checked by making every known mistake on purpose: each is found, and first at the tensor where it is made.
"""

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (makes safetensors know bfloat16)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refgemma import ops
from refgemma.cache import empty_cache
from refgemma.config import Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.files import read_object
from refgemma.generation.decode import generate
from refgemma.heads import causal_lm_loss
from refgemma.hub import find_model, golden_folder
from refgemma.inputs import check_inputs
from refgemma.model import embed, forward, layer_mask
from refgemma.oracle import bounds
from refgemma.oracle.compare import (
    END_TO_END,
    half_layer_noise,
    half_rounding_noise,
    half_run_distance,
    logits_distance,
    operation_distance,
    rounding_noise,
    run_distance,
    ulps_apart,
)
from refgemma.oracle.replay import model_operations, parts, replay
from refgemma.precision import Array, as_dtype
from refgemma.trace.names import named_tensors
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights

FORMAT = "refgemma-golden/1"
AGAIN = "install refgemma again, or in a checkout record with: python golden/record.py"


class GoldenError(RefgemmaError):
    """A golden that is missing, damaged or unknown."""


@dataclass(frozen=True)
class Comparison:
    """One tensor against its recording; `distance` is in units of what rounding allows, at most 1 if it conforms."""

    tensor: str
    how: str  # "operation", "attention", "feed_forward", "block": on its recorded input; "run": after all before it
    distance: float
    identical: int  # elements that are equal to the last bit
    elements: int
    ulps: float = 0.0  # of an operation in half precision: the largest difference among elements above 1e-3
    note: str = ""  # what else there is to say

    @property
    def conforms(self) -> bool:
        """Whether rounding explains the whole difference."""
        return self.distance <= 1


@dataclass(frozen=True)
class CaseResult:
    """All comparisons of one case, in the order of execution."""

    case: str
    about: Mapping[str, Any]
    comparisons: tuple[Comparison, ...]

    @property
    def conforms(self) -> bool:
        """Whether every tensor does."""
        return all(c.conforms for c in self.comparisons)

    @property
    def tensors(self) -> int:
        """How many recorded tensors were compared; several of them in more than one way."""
        return len({c.tensor for c in self.comparisons})

    @property
    def worst(self) -> Comparison:
        """The tensor that is farthest from its recording, in units of its bound."""
        return max(self.comparisons, key=lambda c: c.distance)

    @property
    def first_divergence(self) -> Comparison | None:
        """The tensor that is wrong first, in the order of execution; of several accounts of it the narrowest."""
        order = {c.tensor: place for place, c in enumerate(c for c in self.comparisons if c.how == "run")}
        wrong = [c for c in self.comparisons if not c.conforms]
        return min(wrong, key=lambda c: order.get(c.tensor, len(order)), default=None)


# --- the folder -------------------------------------------------------------------------------------------------------


def read_manifest() -> dict[str, Any]:
    """What is recorded, with provenance and hashes."""
    path = golden_folder() / "manifest.json"
    manifest = read_object(path, GoldenError, AGAIN)
    if manifest.get("format") != FORMAT or not manifest.get("cases"):
        raise GoldenError(f"{path}: is not a manifest of the format {FORMAT}; {AGAIN}")
    return manifest


def case_names(wanted: list[str] | None = None) -> list[str]:
    """All cases, or those `wanted` after checking that they exist.

    Raises
    ------
    GoldenError
        If there is no case of a name.

    Examples
    --------
    >>> case_names(["bends-forward-f33"])
    Traceback (most recent call last):
    ...
    refgemma.goldens.verify.GoldenError: unknown case 'bends-forward-f33'; did you mean bends-forward-f32?
    """
    known = list(read_manifest()["cases"])
    for name in wanted or []:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "refgemma verify --list names them all"
            raise GoldenError(f"unknown case {name!r}; {hint}")
    return wanted or known


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """One case: its entry in the manifest and its tensors, half precision as `BF16` and `F16` arrays.

    Raises
    ------
    GoldenError
        If the file of case `name` is missing, or is not the one that was recorded.
    """
    about = read_manifest()["cases"][name]
    path = golden_folder() / about["file"]
    again = f"{AGAIN} {name}"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != about["sha256"]:
            raise GoldenError(f"{path}: is not the file of the manifest (other sha256); {again}")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise GoldenError(f"{path}: cannot be read: {error}; {again}") from None
    return about, {tensor: _in_precision(x) for tensor, x in tensors.items()}


def _in_precision(x: Array) -> Array:
    if x.dtype.kind in "iub":
        return x
    return as_dtype(x.astype(np.float64 if x.dtype == np.float64 else np.float32), x.dtype.name)


def model_of(about: Mapping[str, Any]) -> tuple[Gemma2Config, Weights]:
    """The model that a case was recorded on, in the case's precision."""
    folder = find_model("tiny") if about["model"] == "tiny" else golden_folder() / "models" / about["model"]
    for file, recorded in read_manifest()["models"][about["model"]].items():
        try:
            found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except OSError as error:
            raise GoldenError(f"{folder / file}: cannot be read: {error.strerror}; {AGAIN}") from None
        if found != recorded:
            raise GoldenError(f"{folder / file}: is not what the goldens were recorded with (other sha256); {AGAIN}")
    checkpoint = open_checkpoint(folder)
    return checkpoint.config, checkpoint.resident(about["dtype"])


# --- whole models -----------------------------------------------------------------------------------------------------


def compare_forward(about: Mapping[str, Any], golden: Mapping[str, Array], name: str) -> Iterator[Comparison]:
    """A forward case: of a whole sequence each operation and layer alone, then the tensors of all calls."""
    config, weights = model_of(about)
    whole = len(about["calls"]) == 1
    if whole:
        yield from _compare_alone(about, golden, config, weights)
    ours = _of_real_tokens(run_calls(about, golden, config, weights), about, golden)
    theirs = _of_real_tokens(golden, about, golden)
    if about["dtype"] == "float32":
        doubled = run_calls(about, golden, *model_of({**about, "dtype": "float64"}))
        exact = _of_real_tokens(doubled, about, golden)
        noise = _pooled(
            {t: rounding_noise(ours[t], x, exact[t]) for t, x in theirs.items() if ours[t].shape == x.shape}
        )
        measure = run_distance
    else:
        twin = _of_real_tokens(load_golden(name.rpartition("-")[0] + "-f32")[1], about, golden)
        noise = _pooled({tensor: half_rounding_noise(x, twin[tensor]) for tensor, x in theirs.items()})
        measure = half_run_distance
    for tensor, computed in ours.items():
        if (recorded := theirs.get(tensor)) is None:
            continue
        shown = tensor.removeprefix("calls.0.") if whole else tensor
        if computed.shape != recorded.shape:
            shapes = f"its shape is {computed.shape} instead of {recorded.shape}"
            yield Comparison(shown, "run", np.inf, 0, recorded.size, note=shapes)
            continue
        distance = measure(computed, recorded, noise[tensor])
        if tensor.endswith(".logits") and about["dtype"] == "float32":
            distance = max(distance, logits_distance(computed, recorded))
        yield _compare(shown, "run", computed, recorded, distance)


def run_calls(
    about: Mapping[str, Any], golden: Mapping[str, Array], config: Gemma2Config, weights: Weights
) -> dict[str, Array]:
    """All tensors of a case's calls, ``calls.0.embedded`` and so on, each call going on from the cache of the last.

    With them the loss, where PyTorch recorded one.
    """
    ids, padding = golden["input_ids"], golden["attention_mask"]
    tensors: dict[str, Array] = {}
    cache, done = None, 0
    for call, length in enumerate(about["calls"]):
        end = done + length
        run = forward(ids[:, done:end], weights, config, attention_mask=padding[:, :end], cache=cache)
        tensors |= {f"calls.{call}.{name}": x for name, x in named_tensors(run)}
        cache, done = run.cache, end
    if "loss" in golden:
        labels = np.where(padding == 1, ids, -100)
        tensors["loss"] = np.array([causal_lm_loss(tensors["calls.0.logits"], labels)])
    return tensors


def _of_real_tokens(
    tensors: Mapping[str, Array], about: Mapping[str, Any], golden: Mapping[str, Array]
) -> dict[str, Array]:
    """The tensors of the calls without the rows of padding tokens, which mean nothing; and the loss."""
    padding, starts = golden["attention_mask"].astype(bool), np.cumsum([0, *about["calls"]])
    kept = {}
    for name, x in tensors.items():
        if name.startswith("calls."):
            call = int(name.split(".")[1])
            kept[name] = _real_rows(x, padding[:, starts[call] : starts[call + 1]])
    return kept | ({"loss": tensors["loss"]} if "loss" in tensors else {})


def _real_rows(x: Array, real: Array) -> Array:
    """The rows of tokens that are no padding; ``seq`` is the last axis but one."""
    return x[real] if x.ndim == 3 else x.swapaxes(1, 2)[real]


def _pooled(noise: Mapping[str, float]) -> dict[str, float]:
    """The noise of a tensor over all calls: one decoding step has too few elements to measure it by."""
    fields = {tensor: tensor.split(".", 2)[-1] for tensor in noise}
    return {tensor: max(noise[other] for other in noise if fields[other] == fields[tensor]) for tensor in noise}


def _compare(name: str, how: str, computed: Array, recorded: Array, distance: float, ulps: float = 0.0) -> Comparison:
    return Comparison(name, how, distance, int(np.sum(computed == recorded)), recorded.size, ulps)


def _compare_alone(
    about: Mapping[str, Any], golden: Mapping[str, Array], config: Gemma2Config, weights: Weights
) -> Iterator[Comparison]:
    """Each operation, attention, feed-forward and block of a whole sequence, fed what PyTorch fed it."""
    dtype = about["dtype"]
    recorded = {tensor.removeprefix("calls.0."): x for tensor, x in golden.items()}
    padding = golden["attention_mask"].astype(bool)
    inputs = check_inputs(golden["input_ids"], config, attention_mask=padding)
    nothing = empty_cache(config, batch=len(padding), like=weights.norm)
    masks = [layer_mask(n, past, inputs, config) for n, past in enumerate(nothing)]
    operations = model_operations(inputs.tokens, inputs.positions, masks, weights, config)
    for name, computed, bound in replay(recorded, operations):
        ours, theirs = _real_rows(computed, padding), _real_rows(recorded[name], padding)
        allowed = _real_rows(np.broadcast_to(bound, computed.shape), padding)
        distance = operation_distance(ours, theirs, allowed, dtype)
        yield _compare(name, "operation", ours, theirs, distance, ulps_apart(ours, theirs, dtype))

    _, doubled = model_of({**about, "dtype": "float64"})
    widened = {name: x.astype(np.float64) for name, x in recorded.items()}
    exactly = parts(widened, empty_cache(config, len(padding), doubled.norm), masks, doubled, config)
    for (part, name, computed), (_, _, exact) in zip(
        parts(recorded, nothing, masks, weights, config), exactly, strict=True
    ):
        if name in recorded:
            ours, theirs, reference = (_real_rows(x, padding) for x in (computed, recorded[name], exact))
            if dtype == "float32":
                distance = run_distance(ours, theirs, rounding_noise(ours, theirs, reference))
            else:
                distance = half_run_distance(ours, theirs, half_layer_noise(ours, theirs, reference))
            yield _compare(name, part, ours, theirs, distance)


# --- operations and text ----------------------------------------------------------------------------------------------


def compare_operation(about: Mapping[str, Any], g: Mapping[str, Array]) -> Iterator[Comparison]:
    """An operation recorded alone."""

    def one(name: str, computed: Array, bound: Array) -> Comparison:
        allowed = np.broadcast_to(bound, computed.shape)
        distance = operation_distance(computed, g[name], allowed, about["dtype"])
        return _compare(name, "operation", computed, g[name], distance, ulps_apart(computed, g[name], about["dtype"]))

    exact = np.zeros(1)
    match about["operation"]:
        case "rms_norm":
            yield one("y", ops.rms_norm(g["x"], g["weight"], 1e-6), bounds.rms_norm(g["x"], g["weight"], 1e-6))
        case "linear":
            yield one("y", ops.linear(g["x"], g["weight"]), bounds.linear(g["x"], g["weight"]))
        case "gelu_tanh":
            with np.errstate(over="ignore"):  # the cube of the largest numbers
                yield one("y", ops.gelu_tanh(g["x"]), bounds.gelu_tanh(g["x"]))
        case "soft_cap":
            cap = float(g["cap"][0])
            yield one("y", ops.soft_cap(g["x"], cap), bounds.soft_cap(g["x"], cap))
        case "attention_scores":
            scale = float(g["scale"][0])
            bound = bounds.attention_scores(g["q"], g["k"], scale)
            yield one("y", ops.attention_scores(g["q"], g["k"], scale), bound)
        case "softmax":
            mask = g["mask"].astype(bool)
            yield one("y", ops.softmax(g["scores"], mask), bounds.softmax(g["scores"], mask))
        case "rotary":
            head_dim = g["cos"].shape[-1]
            cos, sin = ops.rotary_tables(g["positions"], head_dim, 10000.0, like=g["cos"])
            # Twice a library's error: the angles themselves have to be the same to the last bit.
            yield one("cos", cos, np.full(1, bounds.LIBRARY))
            yield one("sin", sin, np.full(1, bounds.LIBRARY))
            yield one("y", ops.rotate(g["x"], g["cos"], g["sin"]), bounds.rotate(g["x"], g["cos"], g["sin"]))
        case "embed":
            computed = embed(g["ids"], g["weight"])
            yield one("y", computed, bounds.U * np.abs(np.asarray(computed, np.float64)))
        case "repeat_kv":
            yield one("y", ops.repeat_kv(g["x"], int(g["groups"][0])), exact)
        case "masks":
            yield from _compare_masks(g)
        case "loss":
            labels = g["labels"]
            # Of the same size as a whole run's tolerance: a mean of log probabilities, each a sum over the vocabulary.
            allowed = np.abs(g["y"].astype(np.float64)) * END_TO_END
            yield one("y", np.array([causal_lm_loss(g["logits"], labels)]), allowed)
            nothing = np.array([causal_lm_loss(g["logits"], np.full_like(labels, -100))])
            same = bool(np.isnan(nothing[0]) and np.isnan(g["y_nothing"][0]))
            yield Comparison("y_nothing", "operation", 0.0 if same else np.inf, int(same), 1)
        case other:
            raise GoldenError(f"this version of refgemma does not know the recorded operation {other!r}")


def _compare_masks(g: Mapping[str, Array]) -> Iterator[Comparison]:
    padding, window = g["padding"].astype(bool), int(g["window"][0])
    places = np.arange(padding.shape[1])
    ours = {"full": ops.causal_mask(places, places), "sliding": ops.sliding_mask(places, places, window)}
    for name, mask in ours.items():
        # A query that is padding itself may see what it likes.
        computed, recorded = (
            (m.swapaxes(1, 2)[padding]) for m in (mask & padding[:, None, None], g[name].astype(bool))
        )
        different = np.sum(computed != recorded)
        yield Comparison(name, "operation", np.inf if different else 0.0, computed.size - int(different), computed.size)


def compare_greedy(about: Mapping[str, Any], golden: Mapping[str, Array]) -> Iterator[Comparison]:
    """Text continued greedily: token for token the same."""
    config, weights = model_of(about)
    for number in range(len(about["prompts"])):
        recorded = golden[f"continued.{number}"]
        ours = np.array(list(generate(golden[f"prompt.{number}"], weights, config, max_new_tokens=about["new_tokens"])))
        same = ours.shape == recorded.shape and bool((ours == recorded).all())
        agreed = int(np.sum(ours[: len(recorded)] == recorded[: len(ours)]))
        yield Comparison(f"continued.{number}", "run", 0.0 if same else np.inf, agreed, len(recorded))


def verify(name: str) -> CaseResult:
    """Compare one case with its golden.

    Parameters
    ----------
    name : str
        One of `case_names`.

    Raises
    ------
    GoldenError
        If it is unknown, or its files are missing or damaged.

    Examples
    --------
    >>> result = verify("bends-forward-bf16")
    >>> result.conforms, result.first_divergence
    (True, None)
    """
    [name] = case_names([name])
    about, golden = load_golden(name)
    match about["kind"]:
        case "forward":
            comparisons = compare_forward(about, golden, name)
        case "operation":
            comparisons = compare_operation(about, golden)
        case "greedy":
            comparisons = compare_greedy(about, golden)
        case other:
            raise GoldenError(f"{name}: this version of refgemma does not know the kind {other!r}")
    found = tuple(comparisons)
    assert found, f"{name}: nothing was compared"
    return CaseResult(name, about, found)
