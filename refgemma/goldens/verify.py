"""Compare refgemma with the goldens, PyTorch's recordings: case by case, tensor by tensor, in the order of execution.

Checked by introducing every known bug: each is found first at the tensor where it was introduced.

A case of a whole model is compared three times:

* ``operation``: compares each recorded tensor with its operation on the recorded inputs. A conforming implementation
  must be able to compute the tensor from these inputs (`judge`). Our own operation, in the case's precision, must be as
  close to the tensor as two roundings allow (`strict_distance`). This finds a wrong operation, not its consequences;
* ``wiring``: compares each tensor of our own run with its operation on the inputs from this run. This finds connections
  in `refgemma.layers` and `refgemma.model` that differ from the table of operations, also in cached calls;
* ``run``: compares each tensor of our own run with the recorded one; see `refgemma.goldens.distance`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refgemma import ops
from refgemma.config import Gemma2Config
from refgemma.generation.decode import generate
from refgemma.goldens.distance import END_TO_END, logits_distance, rounding_noise, run_distance
from refgemma.goldens.load import GoldenError, case_names, load_golden, model_of
from refgemma.goldens.single import in_float64, recorded_operations
from refgemma.heads import causal_lm_loss
from refgemma.model import embed
from refgemma.oracle.engine import Engine
from refgemma.oracle.judge import Judged, distance_from, judge, ratio, strict_distance
from refgemma.oracle.tolerance import FORMATS, same_angles, ulp
from refgemma.oracle.verdicts import BLIND, INVALID
from refgemma.precision import Array
from refgemma.trace.candidate import Candidate, candidate_of
from refgemma.trace.names import run_calls
from refgemma.weights.parameters import Weights


@dataclass(frozen=True)
class Comparison:
    """A tensor compared with its recording; `distance` is in units of the tolerance, at most 1 if it conforms."""

    tensor: str
    how: str  # "operation", "wiring" or "run"; see the top of this file
    distance: float
    identical: int  # number of elements that are equal bit for bit
    elements: int
    ulps: float = 0.0  # for an operation in half precision, the largest difference in ulps of elements above 1e-3
    note: str = ""  # further information

    @property
    def conforms(self) -> bool:
        """True if rounding explains the whole difference."""
        return self.distance <= 1


@dataclass(frozen=True)
class CaseResult:
    """All comparisons of one case, in the order of execution."""

    case: str
    about: Mapping[str, Any]
    comparisons: tuple[Comparison, ...]

    @property
    def conforms(self) -> bool:
        """True if every tensor conforms."""
        return all(c.conforms for c in self.comparisons)

    @property
    def tensors(self) -> int:
        """The number of recorded tensors that were compared, each counted once."""
        return len({c.tensor for c in self.comparisons if c.how != "wiring"})

    @property
    def worst(self) -> Comparison:
        """The tensor with the largest distance from its recording, in units of the tolerance."""
        return max(self.comparisons, key=lambda c: c.distance)

    @property
    def first_divergence(self) -> Comparison | None:
        """The first wrong tensor, in the order of execution."""
        return next((c for c in self.comparisons if not c.conforms), None)


# --- whole models -----------------------------------------------------------------------------------------------------


def compare_forward(about: Mapping[str, Any], golden: Mapping[str, Array], name: str) -> Iterator[Comparison]:
    """Compare a forward case: each operation alone, the wiring of our own run, and the whole run."""
    config, weights = model_of(about)
    ours = run_case(about, golden, config, weights)
    order = {tensor: place for place, tensor in enumerate(ours)}
    wired = about["density"] != "logits"  # if only logits were recorded, smaller models test the same wiring
    found = [
        *compare_operations(golden_candidate(golden, about, golden, config, name), weights, config),
        *(compare_wiring(golden_candidate(ours, about, golden, config, name), weights, config) if wired else ()),
        *compare_run(about, golden, ours, name),
    ]
    whole = len(about["calls"]) == 1
    # Sort by order of computation; the order of the three comparisons stays the same.
    for c in sorted(found, key=lambda c: order[c.tensor]):
        yield replace(c, tensor=c.tensor.removeprefix("calls.0.")) if whole else c


def golden_candidate(
    tensors: Mapping[str, Array], about: Mapping[str, Any], golden: Mapping[str, Array], config: Gemma2Config, name: str
) -> Candidate:
    """Return the tensors of a case's calls, from the recording or our own run, as a candidate for the engine."""
    given = {"input_ids": golden["input_ids"], "attention_mask": golden["attention_mask"]}
    computed = {tensor: x for tensor, x in tensors.items() if tensor.startswith("calls.")}
    return candidate_of(given | computed, config, dtype=about["dtype"], calls=about["calls"], source=name)


def compare_operations(candidate: Candidate, weights: Weights, config: Gemma2Config) -> Iterator[Comparison]:
    """Compare each recorded tensor with its operation, if all inputs are recorded."""
    engine = Engine(candidate, weights, config)
    for name in filter(engine.is_direct, engine.recorded):
        judged, found = engine.judge(name), candidate.tensors[name]
        where = engine.where(name)
        ours, theirs = engine.eager_result(name)[where], found.numbers[where]
        tables = name in ("cos", "sin")
        allowed = same_angles(ours) if tables else engine.tolerance(name).select(where)
        strict = strict_distance(ours, theirs, allowed, found.storage)
        yield _compare_both(_name_in_call(name, judged, candidate), judged, strict, ours, theirs, found.storage)


def compare_wiring(candidate: Candidate, weights: Weights, config: Gemma2Config) -> Iterator[Comparison]:
    """Compare each tensor of our own run with its operation on the inputs from this run."""
    engine = Engine(candidate, weights, config)
    for instance in engine.instances:
        judged = instance.judged
        if judged.verdict != BLIND:
            s = judged.statistics
            name = _name_in_call(instance.tensor, judged, candidate)
            yield Comparison(
                name, "wiring", _measure(judged), round(s.exact * s.elements), s.elements, note=judged.note
            )


def _measure(judged: Judged) -> float:
    return np.inf if judged.verdict == INVALID else judged.statistics.distance


def _compare_both(name: str, judged: Judged, strict: float, ours: Array, theirs: Array, dtype: str) -> Comparison:
    """Compare a tensor by both measures, `judge` and `strict_distance`."""
    distance, same = max(_measure(judged), strict), int(np.sum(ours == theirs))
    return Comparison(name, "operation", distance, same, theirs.size, ulps_apart(ours, theirs, dtype), judged.note)


def ulps_apart(computed: Array, recorded: Array, dtype: str) -> float:
    """Return the largest difference in ulps of half precision, among elements above 1e-3."""
    counted = (np.abs(recorded) > 1e-3) & np.isfinite(recorded)
    if dtype not in FORMATS or not counted.any():
        return 0.0
    return ratio(distance_from(computed, recorded)[counted], ulp(recorded, dtype)[counted])


def _name_in_call(name: str, judged: Judged, candidate: Candidate) -> str:
    """Return the name of a tensor in the call that has its largest error."""
    seq = judged.statistics.place[-2] if judged.statistics.place else 0
    ends = np.cumsum(candidate.call.calls)
    return f"calls.{int(np.searchsorted(ends, seq, side='right'))}.{name}"


def compare_run(
    about: Mapping[str, Any], golden: Mapping[str, Array], ours: Mapping[str, Array], name: str
) -> Iterator[Comparison]:
    """Compare each tensor of a run with the recorded one, in the rows of real tokens."""
    dtype = about["dtype"]
    if dtype == "float32":
        other = run_case(about, golden, *model_of({**about, "dtype": "float64"}))
    else:
        other = load_golden(name.rpartition("-")[0] + "-f32")[1]
    computed, theirs, reference = (_real_tokens(x, about, golden) for x in (ours, golden, other))
    theirs = {tensor: x for tensor, x in theirs.items() if tensor in computed and tensor in reference}
    same_shape = {tensor for tensor, x in theirs.items() if computed[tensor].shape == x.shape}
    noise = _pool({t: rounding_noise(computed[t], theirs[t], reference[t], dtype) for t in same_shape})
    for tensor, recorded in theirs.items():
        x = computed[tensor]
        if tensor not in same_shape:
            shapes = f"its shape is {x.shape} instead of {recorded.shape}"
            yield Comparison(tensor, "run", np.inf, 0, recorded.size, note=shapes)
            continue
        distance = run_distance(x, recorded, noise[tensor], dtype)
        if tensor.endswith(".logits") and dtype == "float32":
            distance = max(distance, logits_distance(x, recorded))
        yield Comparison(tensor, "run", distance, int(np.sum(x == recorded)), recorded.size)


def run_case(
    about: Mapping[str, Any], golden: Mapping[str, Array], config: Gemma2Config, weights: Weights
) -> dict[str, Array]:
    """Return all tensors of a case's calls, ``calls.0.embedded`` and so on; calls continue from the previous cache.

    The result includes the loss, if PyTorch recorded one.
    """
    ids, padding = golden["input_ids"], golden["attention_mask"]
    tensors = dict(run_calls(ids, about["calls"], weights, config, padding))
    if "loss" in golden:
        labels = np.where(padding == 1, ids, -100)
        tensors["loss"] = np.array([causal_lm_loss(tensors["calls.0.logits"], labels)])
    return tensors


def _real_tokens(
    tensors: Mapping[str, Array], about: Mapping[str, Any], golden: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the tensors of the calls without the rows of padding tokens, which have no meaning; keep the loss."""
    padding, starts = golden["attention_mask"].astype(bool), np.cumsum([0, *about["calls"]])
    kept = {}
    for name, x in tensors.items():
        if name.startswith("calls."):
            call = int(name.split(".")[1])
            kept[name] = _real_rows(x, padding[:, starts[call] : starts[call + 1]])
    return kept | ({"loss": tensors["loss"]} if "loss" in tensors else {})


def _real_rows(x: Array, real: Array) -> Array:
    """Return the rows of all tokens except padding; ``seq`` is the second last axis."""
    rows = np.broadcast_to(x, (len(real), *x.shape[1:]))  # all texts may share one rotary table
    return rows[real] if x.ndim == 3 else rows.swapaxes(1, 2)[real]


def _pool(noise: Mapping[str, float]) -> dict[str, float]:
    """Combine the noise of a tensor over all calls, because one decoding step has too few elements to measure noise."""
    fields = {tensor: tensor.split(".", 2)[-1] for tensor in noise}
    return {tensor: max(noise[other] for other in noise if fields[other] == fields[tensor]) for tensor in noise}


# --- operations and text ----------------------------------------------------------------------------------------------


def compare_operation(about: Mapping[str, Any], golden: Mapping[str, Array]) -> Iterator[Comparison]:
    """Compare an operation that was recorded alone."""
    match about["operation"]:
        case "masks":
            yield from _compare_masks(golden)
        case "loss":
            yield from _compare_loss(golden)
        case kind:
            yield from compare_single(kind, about["dtype"], golden)


def compare_single(kind: str, dtype: str, golden: Mapping[str, Array]) -> Iterator[Comparison]:
    """Compare an operation on its recorded inputs by both measures, `judge` and `strict_distance`."""
    functions = vars(ops) | {"embed": embed}
    for operation, inputs in recorded_operations(kind, golden, functions):
        recorded = np.asarray(golden[operation.name], np.float64)
        with np.errstate(over="ignore"):  # the cubes of the largest numbers overflow
            ours = np.asarray(operation.compute(*inputs), np.float64)
            exact = np.asarray(operation.compute(*in_float64(inputs)), np.float64)
        allowed = operation.tolerance(in_float64(inputs), exact, dtype)
        everywhere = np.ones(recorded.shape, bool)
        judged = judge(recorded, exact, allowed, dtype, everywhere, ours)
        strict = strict_distance(ours, recorded, allowed, dtype)
        yield _compare_both(operation.name, judged, strict, ours, recorded, dtype)


def _compare_loss(golden: Mapping[str, Array]) -> Iterator[Comparison]:
    labels, recorded = golden["labels"], golden["y"].astype(np.float64)
    ours = np.array([causal_lm_loss(golden["logits"], labels)])
    # Use the tolerance of the logits, because the loss is a mean of log probabilities, each a sum over the vocabulary.
    distance = ratio(distance_from(ours, recorded), np.abs(recorded) * END_TO_END)
    yield Comparison("y", "operation", distance, int(np.sum(ours == recorded)), 1)
    nothing = np.array([causal_lm_loss(golden["logits"], np.full_like(labels, -100))])
    same = bool(np.isnan(nothing[0]) and np.isnan(golden["y_nothing"][0]))
    yield Comparison("y_nothing", "operation", 0.0 if same else np.inf, int(same), 1)


def _compare_masks(g: Mapping[str, Array]) -> Iterator[Comparison]:
    padding, window = g["padding"].astype(bool), int(g["window"][0])
    places = np.arange(padding.shape[1])
    ours = {"full": ops.causal_mask(places, places), "sliding": ops.sliding_mask(places, places, window)}
    for name, mask in ours.items():
        # A padding token's query may see any key, so it is not compared.
        both = (mask & padding[:, None, None], g[name].astype(bool))
        computed, recorded = (m.swapaxes(1, 2)[padding] for m in both)
        different = np.sum(computed != recorded)
        yield Comparison(name, "operation", np.inf if different else 0.0, computed.size - int(different), computed.size)


def compare_greedy(about: Mapping[str, Any], golden: Mapping[str, Array]) -> Iterator[Comparison]:
    """Compare greedily generated texts, which must be equal token by token."""
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
        If the case is unknown, or its files are missing or damaged.

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
            raise GoldenError(f"{name}: unknown kind {other!r}; it needs another version of refgemma")
    found = tuple(comparisons)
    assert found, f"{name}: nothing was compared"
    return CaseResult(name, about, found)
