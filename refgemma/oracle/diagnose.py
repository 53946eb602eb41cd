"""Find a candidate's first wrong tensor, the known bugs that explain it, and the known bugs that its trace excludes.

Checked by introducing every known bug into transformers (docs/oracle.md).

A known bug explains a finding if, in every layer, the bug turns the candidate's own inputs into the candidate's
tensors. If no bug does, each mistake is tried in one of its tensors, and in the wrong layers, alone. For a candidate
that conforms, the same test finds the excluded bugs: those that contradict its tensors. All other bugs are
undetectable in this trace.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, reduce
from itertools import chain, combinations, islice

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.oracle import verdicts
from refgemma.oracle.engine import PRODUCTS, Engine, Instance
from refgemma.oracle.estimate import Estimate, changed_number, estimate_parameters, fit_numbers
from refgemma.oracle.families import (
    WEIGHT_OF_FIELD,
    Place,
    exchanges_at,
    exchanges_in_all,
    list_places,
    parts_in_half,
    weights_of_another,
)
from refgemma.oracle.judge import SPAN_LIMIT, judge, nearest, resembles
from refgemma.oracle.known_bugs import KNOWN_BUGS, NORMS, KnownBug, combine, in_fewer_places, known_bug
from refgemma.oracle.locate import ErrorMap, Sides, compare_sides, locate_errors, map_errors
from refgemma.oracle.optimizer_bugs import OPTIMIZER_BUGS
from refgemma.oracle.preflight import Preflight
from refgemma.oracle.spans import Computed, measure_noise
from refgemma.oracle.tolerance import from_measured_std, rescale
from refgemma.oracle.training_bugs import TRAINING_BUGS
from refgemma.precision import Array
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import AFTER, GRADS, LOGPROBS, field_of, layer_of, list_names
from refgemma.weights.parameters import Weights, tensor_shapes

# The bounds are derived for the correct operation, and a bug's operation rounds slightly differently. So its errors may
# be as large as those of the row's largest element.
BUG_FACTOR, BUG_FLOOR = 4.0, 16 * 2.0**-24
# Parts of a span's error that may remain after applying a bug. Below the first, the bug explains more than half of the
# error; below the second, the bug is present in addition to quantisation.
CLOSE, MUCH_CLOSER = 0.5, 1 / 3
LESS = 0.8  # a second way of rounding must leave at most this part of the error that the first leaves
TRIED = 4  # number of closest bugs to combine with each way of rounding
# Limit of the change from computing a part in half precision, relative to the tensor; bfloat16 rounds by 0.004 or less.
PART_LIMIT = 0.25
# Tensors of one function that a port may call from several places, or write several times.
APART = {*NORMS, "attention.q_rot", "attention.k_rot"}
# Limit of multiplications per finding for trying exchanged weights; takes 1 to 2 s.
MULTIPLICATIONS = 2e9
# Weights times tokens up to which numbers of the configuration are fitted, in up to 500 computations of the model.
# Takes 2 to 10 s for a conformance checkpoint.
FITTED = 2e8
# Bugs of code written for Gemma 1, which lacks several features of Gemma 2 at once.
GEMMA_1_BUGS = ("attn-softcap-missing", "final-softcap-missing", "scale-head-dim", "swa-all-global")


@dataclass(frozen=True)
class Finding:
    """One wrong tensor, in all layers where it is wrong."""

    field: str
    instances: tuple[Instance, ...]
    total: int  # number of recorded tensors of this field
    where: str
    explanations: tuple[KnownBug, ...]
    estimates: tuple[Estimate, ...]
    maps: tuple[ErrorMap, ...] = ()  # error maps of the first instance
    closest: tuple[KnownBug, float] | None = (
        None  # if no bug explains the finding: the closest bug, and the remaining part of the error
    )
    sides: Sides | None = None  # of the first finding: the first instance beside its reference

    @property
    def worst(self) -> Instance:
        """The instance with the largest error."""
        return max(self.instances, key=lambda i: (verdicts.BAD.index(i.judged.verdict), i.judged.statistics.rms))

    @property
    def named(self) -> str:
        """The names of the known bugs that explain the finding, or ``UNKNOWN``."""
        if self.explanations:
            return " or ".join(v.name for v in self.explanations)
        fitting = [e for e in self.estimates if e.fits]
        return " or ".join(e.named for e in fitting) or verdicts.UNKNOWN

    @property
    def is_rounding(self) -> bool:
        """True if the finding is the same model with different rounding."""
        return bool(self.explanations) and all(v.kind == "rounding" for v in self.explanations)


@dataclass(frozen=True)
class Report:
    """The result of a check."""

    candidate: Candidate
    config: Gemma2Config
    instances: tuple[Instance, ...]
    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    # Returns the excluded and the undetectable bugs. This takes most of the time of a check, and not everybody asks.
    coverage: Callable[[], tuple[tuple[KnownBug, ...], tuple[KnownBug, ...]]] = field(repr=False, compare=False)
    remarks: tuple[str, ...]
    override: float = 1.0
    drift: tuple[tuple[str, float], ...] = field(default=())
    preflight: tuple[Preflight, ...] = ()  # results for weights and tokens, if compared
    again: tuple["Report", ...] = ()  # checks that assume another precision, made if no known bug explains the findings
    changed: str = ""  # numbers of the model that the user changed

    @property
    def explained(self) -> tuple[KnownBug, ...]:
        """The known bugs that explain a finding."""
        return tuple(v for finding in self.findings for v in finding.explanations)

    @property
    def excluded(self) -> tuple[KnownBug, ...]:
        """The known bugs that contradict a recorded tensor."""
        return self.coverage()[0]

    @property
    def undetectable(self) -> tuple[KnownBug, ...]:
        """The other known bugs that explain no finding."""
        names = {v.name for v in self.explained}
        return tuple(v for v in self.coverage()[1] if v.name not in names)

    @property
    def asked(self) -> int:
        """The number of known bugs tested for: excluded, undetectable or named."""
        named = {v.name for v in self.explained if v.change is not None}
        return len({v.name for v in (*self.excluded, *self.undetectable)} | named)

    @property
    def verdict(self) -> str:
        """The verdict."""
        if any(not finding.is_rounding for finding in self.findings) or self.wrong_preflight:
            return verdicts.DIFFERS
        words = {i.judged.verdict for i in self.instances} | {result.verdict for result in self.preflight}
        if self.findings or verdicts.NOISY in words:
            return verdicts.NOISY_ONLY
        judged = {i.tensor for i in self.instances if i.judged.verdict != verdicts.BLIND}
        blind = verdicts.BLIND in words or verdicts.MISSING in words
        weights = tensor_shapes(self.config)
        ends = {"logits", LOGPROBS} & judged or {GRADS + name for name in weights} <= judged
        if self.candidate.call.step is not None:
            ends = ends and {AFTER + name for name in weights} <= judged
        return verdicts.INCONCLUSIVE if not ends or blind or self.logits_missing else verdicts.CONFORMS

    @property
    def logits_missing(self) -> int:
        """The number of missing logits of the rows' last tokens, if the file has some but not all."""
        tensors, visible = self.candidate.tensors, self.candidate.call.visible
        last = visible.shape[1] - 1 - np.argmax(visible[:, ::-1], axis=1)
        known = [x.known for name in ("logits", LOGPROBS) if (x := tensors.get(name)) is not None]
        return min((0 if k is None else int(np.sum(~k[np.arange(len(k)), last])) for k in known), default=0)

    @property
    def wrong_preflight(self) -> list[Preflight]:
        """The wrong weights and tokens."""
        return [result for result in self.preflight if result.verdict in verdicts.BAD]

    @property
    def first_wrong(self) -> str | None:
        """The name of the first wrong item: weights and tokens first, then tensors."""
        if self.wrong_preflight:
            return self.wrong_preflight[0].name
        return self.first_divergence.tensor if self.first_divergence else None

    @property
    def first_divergence(self) -> Instance | None:
        """The first wrong computed tensor, in the order of execution."""
        return self.findings[0].instances[0] if self.findings else None


class Diagnosis:
    """Compare a candidate's recorded tensors with the results of known bugs on the candidate's inputs."""

    def __init__(self, engine: Engine, bugs: Sequence[KnownBug] | None = None, numbers: bool = False) -> None:
        self.engine, self.usual, self.candidate = engine, engine.usual, engine.candidate
        self.whole = bugs is None  # whether families of bugs and estimates are tried, too
        self.numbers = numbers or self.whole  # whether numbers are fitted to tensors with unrecorded inputs
        call = self.candidate.call
        trainers = (
            () if call.labels is None else TRAINING_BUGS if call.step is None else (*TRAINING_BUGS, *OPTIMIZER_BUGS)
        )
        self.bugs = (*KNOWN_BUGS, *trainers) if bugs is None else tuple(bugs)
        self._fits: dict[tuple[str, str], bool | None] = {}  # the results of `fits`; None for a tensor without the bug
        self._left: dict[tuple[str, str], float] = {}
        self._parts: list[KnownBug] = []  # parts in half precision already tried
        # Explanations that are not in the table of known bugs, such as pairs; of a pair, the results of one bug alone.
        self._others: dict[str, tuple[KnownBug, Computed | None]] = {}
        self.untried = False  # true if some exchanged weights were not tried, to save time

    @cached_property
    def few(self) -> set[str]:
        """Tensors with unrecorded inputs and few wrong elements; a bug must explain these elements to explain
        anything."""
        wrong = (i for i in self.engine.instances if i.between and i.judged.verdict == verdicts.FAIL)
        return {i.tensor for i in wrong if i.judged.statistics.rms <= SPAN_LIMIT}

    @cached_property
    def blind(self) -> set[str]:
        """The names of the tensors in which nothing can be compared."""
        return {i.tensor for i in self.engine.instances if i.judged.verdict == verdicts.BLIND}

    @cached_property
    def wrong(self) -> set[str]:
        """The names of the wrong tensors."""
        return {i.tensor for i in self.engine.instances if i.judged.verdict in verdicts.BAD}

    def fits(self, name: str, computed: Computed, bug: KnownBug, before: Computed | None = None) -> bool:
        """Return True if a known bug turns a recorded tensor's inputs into the tensor.

        If `bug` combines a bug with a way of rounding, `before` is the bug alone.
        """
        if name in self.blind:  # NaN of an earlier tensor, for example, contradicts no bug
            return True
        found, exact, where = self.candidate.tensors[name], computed.result(name), self.engine.where(name)
        if not self.engine.is_direct(name):
            left = self._measure(name, computed, exact)
            if name in self.wrong:
                self._left[bug.name, name] = left
            if bug.kind == "mistake" and not before and left > SPAN_LIMIT * self.engine.override:
                return False  # `judge` would say the same later; results that are not finite explain nothing
        allowed = self.engine.tolerance(name, computed, exact)
        # The noise was measured for the correct model, not for this bug, so only its size is judged.
        if allowed.measured and name not in self.few:
            allowed = from_measured_std(allowed.spread, math.inf)
        eager = None
        if self.engine.rounds_several_times(name, computed):
            table = bug.table(self.engine.eager_context, self.engine.eager_table)
            eager = self.engine.eager_result(name, computed, table)
        if bug.kind == "rounding" or before:
            usual = (before or self.usual).result(name)
            others = [self.read(replace(bug, change=way)).result(name) for way in bug.ways]
            ways = [nearest(found.numbers, [exact, *others])] + ([] if eager is None else [eager])
            if not any(resembles(found.numbers, way, usual, allowed, found.storage, where) for way in ways):
                return False
            if not (allowed.measured and name in self.few):
                return True
        elif not allowed.measured:
            with np.errstate(invalid="ignore"):
                floor = BUG_FLOOR * np.max(np.abs(exact), axis=-1, keepdims=True)
            allowed = rescale(allowed, BUG_FACTOR, floor)
        judged = judge(found.numbers, exact, allowed, found.storage, where, eager, self.engine.override)
        return judged.verdict in (*verdicts.GOOD, verdicts.BLIND)

    def is_consistent(
        self, bug: KnownBug, names: Sequence[str] | None = None, before: Computed | None = None
    ) -> bool | None:
        """Return True if a bug turns the recorded inputs into the recorded tensors; None if it affects no recorded
        tensor."""
        names = self.engine.recorded if names is None else names
        if not any(bug.is_in(step) for name in names for step in self.usual.span(name)):
            return None  # without making the operations with the bug, which takes longer
        computed, found = None, []
        for name in names:
            key = bug.name, name
            if before or key not in self._fits:
                computed = computed or self.read(bug)
                touched = any(computed.table[step] is not self.usual.table[step] for step in computed.span(name))
                self._fits[key] = self.fits(name, computed, bug, before) if touched else None
            if self._fits[key] is False:
                return False
            found.append(self._fits[key])
        return True if True in found else None

    def explain(self, finding: Sequence[Instance]) -> tuple[KnownBug, ...]:
        """Return the listed bugs that explain a finding in every layer and contradict no other tensor."""
        names = [i.tensor for i in finding]
        same_field = [n for n in self.engine.recorded if field_of(n) == field_of(names[0])]
        if finding[0].judged.verdict == verdicts.INVALID:
            return tuple(v for v in self.bugs if v.kind == "stage" and self._is_preflight_bug(v, finding[0]))
        good = [i.tensor for i in self.engine.instances if i.judged.verdict in verdicts.GOOD]
        found = []
        for v in self.bugs:
            if v.change is None or not self.is_consistent(v, names) or self.is_consistent(v, same_field) is False:
                continue
            if self.is_consistent(v, good) is not False:
                found.append(v)
        return tuple(self._choose([v for v in found if v.kind == "mistake"]) or found)

    def _repeat(self, names: Sequence[str]) -> tuple[KnownBug, ...]:
        """Return explanations of earlier findings that are not in the table of known bugs and explain these tensors."""
        if not names or names[0].startswith((GRADS, AFTER)):
            return ()
        return tuple(v for v, before in self._others.values() if self.is_consistent(v, names, before))

    def search(self, finding: Sequence[Instance]) -> tuple[KnownBug, ...]:
        """Return families of bugs and combinations that explain a finding."""
        names = [i.tensor for i in finding]
        if finding[0].judged.verdict == verdicts.INVALID or names[0].startswith((GRADS, AFTER)):
            return ()
        good = [i.tensor for i in self.engine.instances if i.judged.verdict in verdicts.GOOD]
        found: list[KnownBug] = []
        direct = all(self.engine.is_direct(name) for name in names)
        if self.whole:
            found = found or self._find_part(names)
            if direct:  # another tensor's weight is simpler than a part of a bug that changes several tensors
                found = found or self._find_weights(names, good)
            found = found or self._find_in_fewer_places(names, good)
        if finding[0].between:
            found = found or self._find_roundings(names)
        if self.whole and not direct:
            found = found or self._find_weights(names, good)
        found = found or self._find_pairs(finding) or self._find_gemma_1(finding)
        listed = {v.name for v in self.bugs} | self._others.keys()
        self._others |= {v.name: (v, None) for v in found if v.name not in listed}
        return tuple(found)

    def _choose(self, mistakes: Sequence[KnownBug]) -> list[KnownBug]:
        """Leave out each mistake that another one replaces, because the other explains more fields or is named
        alone."""
        wrong: dict[str, list[str]] = {}
        for name in self.engine.recorded:
            if name in self.wrong:
                wrong.setdefault(field_of(name), []).append(name)
        explained = {v.name: {kind for kind in wrong if kind in v.fields and self.is_consistent(v, wrong[kind])}
                     for v in mistakes} if len(mistakes) > 1 else {}  # fmt: skip
        return [
            v for v in mistakes
            if v.unless not in explained and not any(explained[v.name] < other for other in explained.values())
        ]  # fmt: skip

    def _find_part(self, names: Sequence[str]) -> list[KnownBug]:
        """Return the largest part that explains every tensor it affects, some of `names` among them, if computed in
        half precision."""
        self._parts = []
        if self.candidate.dtype != "float32" or self._apart(names[0]) > PART_LIMIT:
            return []
        wrong = sorted({layer for name in names if (layer := layer_of(name)) is not None})
        alone = wrong and len(wrong) < self.engine.config.num_hidden_layers
        self._parts = [*parts_in_half(), *(parts_in_half(wrong) if alone else ())]
        for part in self._parts:
            if self.is_consistent(part, names) and self.is_consistent(part):
                return [part]
        return []

    def _find_in_fewer_places(self, names: Sequence[str], good: Sequence[str]) -> list[KnownBug]:
        """Return mistakes that are in only one of their fields, or not in all layers.

        An example is a port with four functions of norms, if only one multiplies by w. If the inputs of the wrong
        tensors are recorded, the field and the layers are known. Otherwise each field is tried, in all layers.
        """
        kind, layers = field_of(names[0]), {layer_of(name) for name in names} - {None}
        mistakes = [v for v in self.bugs if v.kind == "mistake" and v.change is not None]
        if all(self.engine.is_direct(name) for name in names):
            recorded = {layer_of(name) for name in self.engine.recorded if field_of(name) == kind} - {None}
            some = tuple(sorted(layer for layer in layers if layer is not None)) if layers != recorded else ()
            # A bug of this field alone, in all layers, was tried before.
            tried = [in_fewer_places(v, kind, some) for v in mistakes if kind in v.fields and (some or v.fields[1:])]
        else:
            several = [v for v in mistakes if len(v.fields) > 1 and set(v.fields) <= APART]
            steps = {field_of(step) for name in names for step in self.usual.span(name)}
            tried = [in_fewer_places(v, field) for v in several for field in v.fields if field in steps]
        fitting = [v for v in tried if self.is_consistent(v, names) and self.is_consistent(v, good) is not False]
        return self._choose(fitting)

    def _apart(self, name: str) -> float:
        """Return the distance of a recorded tensor from its reference, relative to the reference's size."""
        where = self.engine.where(name)
        with np.errstate(all="ignore"):
            return float(
                np.linalg.norm(self.engine.errors(name)[where]) / np.linalg.norm(self.usual.result(name)[where])
            )

    def _find_weights(self, names: Sequence[str], good: Sequence[str]) -> list[KnownBug]:
        """Return bugs that exchange weights: the weight of each wrong tensor, else all weights that lead to the first.

        Each try computes the tensors in between again. So large models try only some weights, and a remark says so.
        """
        context, kinds = self.engine.context, {field_of(name) for name in names}
        if not kinds - set(WEIGHT_OF_FIELD) and all(self.engine.is_direct(name) for name in names):
            sources: dict[Place, Place] = {}
            for name in names:
                place = (layer_of(name), WEIGHT_OF_FIELD[field_of(name)])
                fitting = (v for v in exchanges_at(context, place) if self.is_consistent(v, [name]))
                if (bug := next(fitting, None)) is None:
                    return []
                sources |= bug.sources
            return [weights_of_another(sources)]
        steps = self.usual.span(names[0])
        if len(steps) == 1:
            return []
        places = [(layer_of(s), WEIGHT_OF_FIELD[field_of(s)]) for s in steps if field_of(s) in WEIGHT_OF_FIELD]
        tried = chain(exchanges_in_all(context), *(exchanges_at(context, place) for place in places))
        numbers = sum(math.prod(list_places(context)[place]) for place in places)
        affordable = int(MULTIPLICATIONS // max(1, numbers * self.candidate.call.input_ids.size))
        for bug in islice(tried, affordable):
            if self.is_consistent(bug, names) and self.is_consistent(bug, good) is not False:
                return [bug]
        self.untried |= next(tried, None) is not None
        return []

    def _find_pairs(self, finding: Sequence[Instance]) -> list[KnownBug]:
        """Return pairs of a bug and a way of rounding; the bug alone explains the first of several tensors, or most of
        the error.

        This is only for tensors with unrecorded inputs; a wrong operation on recorded inputs has a single reason.
        """
        if not finding[0].between:
            return []
        names = [i.tensor for i in finding]
        alone = [v for v in self.bugs if v.change is not None and self.is_consistent(v, names[:1])]
        alone = alone if len(finding) > 1 else []
        close = [
            v for left, v in self.rank(names[0])[:TRIED] if left < CLOSE and v.kind == "mistake" and v not in alone
        ]
        ways = [r for r in self.bugs if r.kind == "rounding"]
        pairs = [combine(v, r) for v in alone for r in ways if r is not v]
        if found := [pair for pair in pairs if self.is_consistent(pair, names)]:
            return found
        for v in close:
            before = self.read(v)
            fitting = [pair for r in ways if self.is_consistent(pair := combine(v, r), names, before)]
            self._others |= {pair.name: (pair, before) for pair in fitting}
            found += fitting
        return found or self._find_behind_rounding(names)

    def _find_behind_rounding(self, names: Sequence[str]) -> list[KnownBug]:
        """Return a mistake combined with a way of rounding that explains most of the error, if both explain all."""
        found: list[tuple[float, KnownBug, Computed]] = []
        for left, r in self.rank(names[0])[:TRIED]:
            if r.kind == "rounding" and left < CLOSE:
                before, usual = self.read(r), self._measure(names[0], self.usual)
                for v in self.bugs:
                    if v.kind == "mistake" and v.change is not None:
                        pair = combine(v, r)
                        more = self._measure(names[0], self.read(pair)) / max(usual, 1e-300)
                        if more < CLOSE * left and self.is_consistent(pair, names, before):
                            found.append((more, pair, before))
        if not found:
            return []
        _, pair, before = min(found, key=lambda one: one[0])
        self._others[pair.name] = pair, before
        return [pair]

    def _find_roundings(self, names: Sequence[str]) -> list[KnownBug]:
        """Return the way of rounding, or the two, that come closest, if the rest is their own noise.

        Results that are rounded to half precision in every layer go apart: a tiny difference before a rounding can
        change its result, and the next layer rounds other numbers. So most of the error must be explained, and the
        rest must be within the noise that is measured with this rounding.
        """
        if self.candidate.dtype != "float32" or self._apart(names[0]) > PART_LIMIT:
            return []
        ways = [(left, v) for left, v in self.rank(names[0]) if v.kind == "rounding"]
        usual = max(self._measure(names[0], self.usual), 1e-300)
        tried = ways[:TRIED]
        for n, (alone, v) in enumerate(ways[:TRIED]):
            pairs = (
                (self._measure(names[0], self.read(pair := combine(v, r))) / usual, pair) for _, r in ways[n + 1 :]
            )
            tried += [(left, pair) for left, pair in pairs if left < LESS * alone]
        for _, v in sorted((one for one in tried if one[0] < CLOSE), key=lambda one: one[0])[:TRIED]:
            if all(self._is_noise(name, self.read(v)) for name in names):
                return [v]
        return []

    def _is_noise(self, name: str, computed: Computed) -> bool:
        """Return True if the noise of a way of rounding explains the rest of a recorded tensor's error."""
        where = self.engine.where(name)
        with np.errstate(all="ignore"):
            errors = self.candidate.tensors[name].numbers - computed.result(name)
            spread = measure_noise(computed, [name], self.engine.context)[name]
            return bool(np.sqrt(np.mean((errors / spread)[where] ** 2)) <= 1)

    def rank(self, name: str) -> list[tuple[float, KnownBug]]:
        """Return the bugs, each with the part of a span's root mean square error that remains; the smallest part
        first."""
        usual, bugs = self._measure(name, self.usual), [v for v in (*self.bugs, *self._parts) if v.change is not None]
        for v in bugs:
            if (v.name, name) not in self._left:
                self._left[v.name, name] = self._measure(name, self.read(v))
        left = [(self._left[v.name, name] / max(usual, 1e-300), v) for v in bugs]
        return sorted(left, key=lambda one: one[0])

    def _measure(self, name: str, computed: Computed, exact: Array | None = None) -> float:
        """Return the root mean square error of a recorded tensor, in standard deviations, if computed with a bug.

        `exact` is the result with the bug, if it is already known.
        """
        where = self.engine.where(name)
        with np.errstate(all="ignore"):
            exact = computed.result(name) if exact is None else exact
            error = self.candidate.tensors[name].numbers - exact
            units = (error / self.engine.tolerance(name, computed, exact).std)[where]
            found = float(np.sqrt(np.mean(units**2)))
        return found if math.isfinite(found) else math.inf

    def read(self, bug: KnownBug) -> Computed:
        """Return the operations with a bug; reuse results that the bug does not change."""
        return self.usual.edit(bug.table(self.engine.context, self.usual.table))

    def _find_behind(self, names: Sequence[str]) -> tuple[KnownBug, ...]:
        """Return bugs that reduce an error so much that they must be present, although quantisation could explain
        it."""
        ranked = [(left, v) for left, v in self.rank(names[0]) if v.kind == "mistake"]
        return tuple(self._choose([v for left, v in ranked if left <= min(MUCH_CLOSER, 1.2 * ranked[0][0])]))

    def _find_gemma_1(self, finding: Sequence[Instance]) -> list[KnownBug]:
        """Return the smallest combinations of `GEMMA_1_BUGS` that explain several operations."""
        if not finding[0].between or not self.whole:
            return []
        names = [i.tensor for i in finding]
        for count in range(2, len(GEMMA_1_BUGS) + 1):
            together = (reduce(combine, map(known_bug, chosen)) for chosen in combinations(GEMMA_1_BUGS, count))
            if found := [v for v in together if self.is_consistent(v, names)]:
                return found
        return []

    def _find_numbers(self, names: Sequence[str]) -> tuple[Estimate, ...]:
        """Return other values of numbers of the configuration; each explains all tensors that it affects, some of
        `names` among them."""
        if not names or names[0].startswith((GRADS, AFTER)):
            return ()
        weights, tokens = self.engine.context.weights, self.candidate.call.input_ids.size
        size = sum(math.prod(shape) for shape in list_places(self.engine.context).values())
        if self.engine.quantised or (size + math.prod(weights.embed_tokens.shape)) * tokens > FITTED:
            return ()
        others = [i.tensor for i in self.engine.instances if i.judged.verdict in verdicts.GOOD]
        fitted = ((e, changed_number(e.parameter, e.value)) for e in fit_numbers(self.engine, names))
        return tuple(
            replace(e, fits=True) for e, bug in fitted
            if self.is_consistent(bug, names) and self.is_consistent(bug, others) is not False
        )  # fmt: skip

    def _is_preflight_bug(self, bug: KnownBug, instance: Instance) -> bool:
        call, kind = self.candidate.call, field_of(instance.tensor)
        match bug.name:
            case "vocab-padded":
                return instance.tensor == "logits" and self.candidate.columns > self.engine.config.vocab_size
            case "left-pad-nan":
                return not call.visible[:, 0].all() and kind.startswith("attention")
            case "fp16-overflow":
                return self.candidate.dtype == "float16"
        return False

    def findings(self) -> Iterator[Finding]:
        """Yield the findings, one per field, in the order of execution."""
        groups: dict[str, list[Instance]] = {}
        excused: dict[str, list[Instance]] = {}  # tensors with unrecorded inputs whose error quantisation could explain
        for instance in self.engine.instances:
            if instance.judged.verdict in verdicts.BAD:
                groups.setdefault(field_of(instance.tensor), []).append(instance)
            elif self.engine.quantised and instance.between and instance.judged.verdict == verdicts.NOISY:
                excused.setdefault(field_of(instance.tensor), []).append(instance)
        for kind, some in excused.items():
            if kind not in groups and (behind := self._find_behind([i.tensor for i in some])):
                yield Finding(kind, tuple(some), len(some), "", behind, ())
        earlier: list[KnownBug] = []  # bugs that explain gradients nearer to the loss
        unknown = (
            False  # true if one of these gradients is unexplained; then later gradients are wrong for the same reason
        )
        for kind, wrong in groups.items():
            total = sum(field_of(i.tensor) == kind for i in self.engine.instances)
            # Tensors with a wrong shape or NaN give no information on the numbers of other tensors.
            judged = [i for i in wrong if i.judged.verdict != verdicts.INVALID]
            first, names = (judged or wrong)[0], [i.tensor for i in judged]
            fitted = tuple(estimate_parameters(self.engine, names)) if self.whole else ()
            where = locate_errors(self.engine, first.tensor) if judged and not first.between else ""
            maps = map_errors(self.engine, first.tensor) if first.tensor in self.candidate.tensors else ()
            repeated = tuple(v for v in earlier if kind.startswith(GRADS) and self.is_consistent(v, names))
            if unknown and kind.startswith(GRADS) and first.between:
                yield Finding(kind, tuple(wrong), total, where, repeated, fitted, maps)
                continue
            explained, closest = repeated or self.explain(judged or wrong) or self._repeat(names), None
            numbers: tuple[Estimate, ...] = ()
            if not explained and first.between and self.numbers and not any(e.fits for e in fitted):
                numbers = self._find_numbers(names)
            if not explained and not numbers:
                explained = self.search(judged or wrong)
            fitted += numbers
            if kind.startswith(GRADS):
                earlier += [v for v in explained if v not in earlier]
                unknown |= not explained
            if not explained and judged and first.between and not any(e.fits for e in fitted):
                ranked = self.rank(names[0])
                closest = (ranked[0][1], ranked[0][0]) if ranked and ranked[0][0] < CLOSE else None
                if self.engine.quantised:
                    explained = self._find_behind(names)
            if explained and all(v.kind == "rounding" for v in explained):
                fitted = ()  # different rounding also changes an estimate
            yield Finding(kind, tuple(wrong), total, where, explained, fitted, maps, closest)

    def coverage(self) -> tuple[tuple[KnownBug, ...], tuple[KnownBug, ...]]:
        """Return the excluded bugs, which contradict the recorded tensors, and the undetectable bugs."""
        excluded: list[KnownBug] = []
        undetectable: list[KnownBug] = []
        for v in self.bugs:
            if v.change is not None:
                (excluded if self.is_consistent(v) is False else undetectable).append(v)
        return tuple(excluded), tuple(undetectable)

    def drift(self) -> Iterator[tuple[str, float]]:
        """Yield how far the residual stream and logits are from the model's own, relative to their size, as
        information."""
        alone = Computed(self.usual.table, replace(self.candidate, tensors={}))
        for name in self.usual.table:
            if field_of(name) not in ("embedded", "out", "norm", "logits"):
                continue
            own = alone.value(name)
            if name in self.candidate.tensors:
                where = self.engine.where(name)
                found, ours = self.candidate.tensors[name].numbers[where], own[where]
                with np.errstate(invalid="ignore"):
                    yield name, float(np.sqrt(np.sum((found - ours) ** 2) / max(np.sum(ours**2), 1e-300)))

    def remarks(self) -> Iterator[str]:
        """Yield further remarks for the reader."""
        candidate, call = self.candidate, self.candidate.call
        texts = [row[seen].tolist() for row, seen in zip(call.input_ids, call.visible, strict=True)]
        bos = self.engine.config.bos_token_id
        without = [row for row, text in enumerate(texts) if text[:1] != [bos]]
        twice = [row for row, text in enumerate(texts) if text[:2] == [bos, bos]]
        if bos is not None and without:
            remark = "(missing-bos); real texts do; without it, the quality is much worse"
            yield f"tokens: row {without[0]} does not begin with <bos> {remark}"
        elif bos is not None and twice:
            yield f"tokens: row {twice[0]} begins with <bos> twice (double-bos)"
        if self.untried:
            yield "exchanged weights were only partly tried; record the projections and norms to find them"
        if candidate.unknown:
            yield f"not tensors of this model: {list_names(candidate.unknown)}"
        if candidate.dtype_from == "numbers":
            yield f"the file does not name its dtype; all its numbers are exact in {candidate.dtype}"
        yield from candidate.remarks
        if self.engine.override != 1:
            yield f"OVERRIDE: all tolerances were multiplied by {self.engine.override:g}, because of --allow"


def diagnose(
    candidate: Candidate, weights: Weights, config: Gemma2Config, override: float = 1.0, quantised: bool = False
) -> Report:
    """Judge a candidate's tensors, and report wrong tensors with the reason.

    Parameters
    ----------
    candidate : Candidate
        The candidate; see `refgemma.trace.candidate.load_trace`.
    weights : Weights
        The model's weights, in the candidate's precision.
    config : Gemma2Config
        The model's configuration.
    override : float
        A factor on all tolerances. Every report shows it if it is not 1.
    quantised : bool
        If true, weights are quantised, and products with weights may have the errors of quantisation. Weights also
        count as quantised if every such product has these errors and no known bug explains them.

    Examples
    --------
    >>> import tempfile, refgemma
    >>> from pathlib import Path
    >>> from refgemma.trace.candidate import load_trace
    >>> from refgemma.trace.names import named_tensors, save_trace
    >>> tiny = refgemma.load("tiny")
    >>> ids = np.array([[2, 300, 400, 500]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     wrong = tiny.config.changed(final_logit_softcapping=None)
    ...     run = dict(named_tensors(refgemma.forward(ids, tiny.weights, wrong)))
    ...     _ = save_trace(({"input_ids": ids} | run).items(), Path(folder) / "port.safetensors", {"dtype": "float32"})
    ...     report = diagnose(load_trace(Path(folder) / "port.safetensors", tiny.config), tiny.weights, tiny.config)
    >>> report.verdict, report.first_divergence.tensor, report.findings[0].named
    ('differs', 'logits', 'final-softcap-missing')
    """
    found = report_on(Engine(candidate, weights, config, override, quantised))
    if HEAD_FIELDS & {finding.field for finding in found.findings}:
        engine = Engine(join_halves(candidate), weights, config, override, quantised)
        wrong = {field_of(i.tensor) for i in engine.instances if i.judged.verdict in verdicts.BAD}
        # Explanations take most of the time, so they are searched for only if no head is wrong in this order.
        if not HEAD_FIELDS & wrong:
            turned = report_on(engine)
            found = found if HEAD_FIELDS & {finding.field for finding in turned.findings} else turned
    if not quantised and looks_quantised(found):
        again = report_on(Engine(found.candidate, weights, config, override, quantised=True))
        said = "all products with weights have errors as from quantisation; judged as with --quantised"
        found = replace(again, remarks=(*again.remarks, said))
    return found


HEAD_FIELDS = {"attention.q", "attention.k", "attention.q_rot", "attention.k_rot"}


def join_halves(candidate: Candidate) -> Candidate:
    """Reorder each head of queries and keys from adjacent pairs to halves.

    With weights in that row order and a rotation of adjacent pairs, the model is the same: no score differs.
    """

    def move(x: Array) -> Array:
        return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)

    said = "queries and keys are in the order for adjacent pairs, and are rotated in this order: the same model"
    tensors = {
        name: replace(x, numbers=move(x.numbers), known=None if x.known is None else move(x.known))
        if field_of(name) in HEAD_FIELDS else x
        for name, x in candidate.tensors.items()
    }  # fmt: skip
    return replace(candidate, tensors=tensors, remarks=(*candidate.remarks, said))


def looks_quantised(report: Report) -> bool:
    """Return True if nearly all products with weights are wrong, and no known bug explains the errors."""
    products = [i for i in report.instances if field_of(i.tensor) in PRODUCTS and not i.between]
    wrong = [i for i in products if i.judged.verdict in (verdicts.SKEWED, verdicts.FAIL)]
    unknown = {f.field for f in report.findings if not f.explanations and f.field in PRODUCTS}
    return len({field_of(i.tensor) for i in products}) >= 3 and len(unknown) >= 3 and len(wrong) >= 0.75 * len(products)


def report_on(engine: Engine, bugs: Sequence[KnownBug] | None = None, numbers: bool = False) -> Report:
    """Judge all recorded tensors of an engine's candidate.

    Given `bugs`, test only these; then numbers of the configuration are estimated only if `numbers` is true.
    """
    candidate, config, override = engine.candidate, engine.config, engine.override
    work = Diagnosis(engine, bugs, numbers)
    order = list(engine.usual.table)
    findings = tuple(sorted(work.findings(), key=lambda finding: order.index(finding.instances[0].tensor)))
    if findings and work.whole and (name := findings[0].instances[0].tensor) in candidate.tensors:
        sides = compare_sides(engine, name, findings[0].explanations)
        findings = (replace(findings[0], sides=sides), *findings[1:])
    done = {*candidate.tensors, *candidate.refused, LOGPROBS} | ({"logits"} if LOGPROBS in candidate.tensors else set())
    missing = tuple(name for name in order if name not in done)
    return Report(
        candidate, config, tuple(engine.instances), findings, missing, cache(work.coverage), tuple(work.remarks()),
        override, tuple(work.drift()),
    )  # fmt: skip
