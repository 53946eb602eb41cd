"""Which tensor of a candidate is wrong first, which known mistake explains it, and which mistakes the trace excludes.
Checked by making every mistake of the catalogue in transformers (docs/oracle.md).

A mistake explains a finding if the candidate's tensors are, in every layer, what that mistake makes of the candidate's
own inputs. The same question, asked of a candidate that conforms, tells what its trace excludes: the mistakes under
which its tensors could not be what they are. The others are blind spots of this trace.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import combinations

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError
from refgemma.oracle import judge as j
from refgemma.oracle.estimate import Estimate, estimates
from refgemma.oracle.judge import BAD, BLIND, FAIL, GOOD, INVALID, NOISY, Judged, Statistics, judge, judge_span
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug, both, known_bug
from refgemma.oracle.locate import ErrorMap, attribution, error_maps
from refgemma.oracle.operations import Context, Operation, doubled, operations
from refgemma.oracle.preflight import Stage
from refgemma.oracle.spans import SEVERAL_ROUNDINGS, Computed, span_noise, where_compared
from refgemma.oracle.tolerance import EVEN, Allowance, Arithmetic, in_decimals
from refgemma.precision import Array, as_dtype
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import field_of
from refgemma.weights.parameters import Weights

CONFORMS, DIFFERS, NOISY_ONLY, INCONCLUSIVE = "conforms", "differs", "noisy", "inconclusive"
UNKNOWN = "UNKNOWN"
# A variant's own operation rounds a little differently from the right one, for which the bounds are derived.
VARIANT_SLACK = 4.0
VARIANT_FLOOR = 16 * 2.0**-24
# What code that was written for Gemma 1 leaves out of Gemma 2, often all at once.
LEFT_OUT = ("attn-softcap-missing", "final-softcap-missing", "scale-head-dim", "swa-all-global")


@dataclass(frozen=True)
class Instance:
    """One recorded tensor, judged on what was recorded before it."""

    tensor: str
    sources: tuple[str, ...]  # recorded tensors that it was computed from
    between: tuple[str, ...]  # tensors that lie between, which were not recorded
    judged: Judged


@dataclass(frozen=True)
class Finding:
    """One wrong tensor, in all layers where it is wrong."""

    field: str
    instances: tuple[Instance, ...]
    total: int  # of how many recorded
    where: str
    explanations: tuple[KnownBug, ...]
    estimates: tuple[Estimate, ...]
    maps: tuple[ErrorMap, ...] = ()  # of the first instance

    @property
    def worst(self) -> Instance:
        """The instance that is wrong most."""
        order = {INVALID: 3, FAIL: 2, j.SKEWED: 1}
        return max(self.instances, key=lambda i: (order.get(i.judged.verdict, 0), i.judged.statistics.rms))

    @property
    def named(self) -> str:
        """The mistakes that explain it, or ``UNKNOWN``."""
        if self.explanations:
            return " or ".join(v.name for v in self.explanations)
        fitting = [e for e in self.estimates if e.fits]
        return f"{fitting[0].parameter} = {fitting[0].value:.6g}" if fitting else UNKNOWN

    @property
    def is_rounding(self) -> bool:
        """Whether the same model, rounded elsewhere, explains it."""
        return bool(self.explanations) and all(v.kind == "rounding" for v in self.explanations)


@dataclass(frozen=True)
class Report:
    """All that a check found."""

    candidate: Candidate
    config: Gemma2Config
    instances: tuple[Instance, ...]
    findings: tuple[Finding, ...]
    missing: tuple[str, ...]
    excluded: tuple[KnownBug, ...]
    blind: tuple[KnownBug, ...]
    remarks: tuple[str, ...]
    override: float = 1.0
    drift: tuple[tuple[str, float], ...] = field(default=())
    stages: tuple[Stage, ...] = ()  # weights and tokens, where they were compared

    @property
    def asked(self) -> int:
        """Of how many known mistakes it was asked whether they were made: excluded, not to be shown here, or named."""
        named = {v.name for finding in self.findings for v in finding.explanations if v.change is not None}
        return len({v.name for v in (*self.excluded, *self.blind)} | named)

    @property
    def verdict(self) -> str:
        """In one word."""
        if any(not finding.is_rounding for finding in self.findings) or self.wrong_stages:
            return DIFFERS
        stages = {stage.verdict for stage in self.stages}
        if self.findings or NOISY in stages or any(i.judged.verdict == NOISY for i in self.instances):
            return NOISY_ONLY
        judged = {i.tensor for i in self.instances if i.judged.verdict != BLIND}
        blind = any(i.judged.verdict == BLIND for i in self.instances) or j.MISSING in stages
        return INCONCLUSIVE if "logits" not in judged or blind or self.logits_missing else CONFORMS

    @property
    def logits_missing(self) -> int:
        """How many logits of the rows' last tokens are not in the file, of those that it has a part of."""
        logits = self.candidate.tensors.get("logits")
        return 0 if logits is None or logits.known is None else int(np.sum(~logits.known[:, -1]))

    @property
    def wrong_stages(self) -> list[Stage]:
        """Weights and tokens that are wrong."""
        return [stage for stage in self.stages if stage.verdict in BAD]

    @property
    def first_divergence(self) -> Instance | None:
        """The computed tensor that is wrong first, in the order of execution."""
        return self.findings[0].instances[0] if self.findings else None


class Check:
    """A candidate beside the model that it claims to be."""

    def __init__(self, candidate: Candidate, weights: Weights, config: Gemma2Config, override: float = 1.0) -> None:
        if config.hidden_activation != "gelu_pytorch_tanh":
            raise InputError(
                f"hidden_activation is {config.hidden_activation!r}: bounds are derived for Gemma 2's only"
            )
        self.candidate, self.config, self.override = candidate, config, override
        arithmetic = Arithmetic(candidate.dtype)
        self.context = Context(config, doubled(weights), candidate.call, arithmetic)
        self.eager_context = replace(self.context, weights=weights, exact=False)
        self.usual = Computed(operations(self.context), candidate)
        self._noise: dict[str, Array] = {}
        self._usual_eager: dict[str, Operation] | None = None

    @cached_property
    def recorded(self) -> list[str]:
        """The recorded tensors in the order of execution."""
        return [name for name in self.usual.table if name in self.candidate.tensors]

    def instances(self) -> Iterator[Instance]:
        """Each recorded tensor, judged."""
        for name in self.usual.table:
            if name in self.candidate.refused:
                yield Instance(name, (), (), Judged(INVALID, Statistics(), self.candidate.refused[name]))
            elif name in self.candidate.tensors:
                *between, _ = self.usual.span(name)
                sources = {s for step in (*between, name) for s in self.usual.table[step].inputs}
                recorded = tuple(s for s in self.usual.table if s in sources and s in self.candidate.inputs)
                yield Instance(name, recorded, tuple(between), self.judged(name, self.usual, None))

    def noise(self, name: str) -> Array:
        """The measured uncertainty of a span; that of the right model serves every variant."""
        if name not in self._noise:
            spans = [n for n in self.recorded if len(self.usual.span(n)) > 1 and n not in self._noise]
            names = spans if name in spans else [name]  # a variant may be wired otherwise, and have another span
            for found, noise in span_noise(self.usual, names, self.context).items():
                coarse = EVEN * self.candidate.tensors[found].coarse / 2
                self._noise[found] = np.hypot(noise * self.override, coarse)
        return self._noise[name]

    def judged(self, name: str, computed: Computed, known_bug: KnownBug | None) -> Judged:
        """A recorded tensor against one reading of the model."""
        found, where = self.candidate.tensors[name], self.where(name)
        exact = computed.result(name)
        if len(computed.span(name)) > 1:
            largest = known_bug is None or name in self.few
            judged = judge_span(found.numbers, exact, self.noise(name), where, found.storage, largest)
            if known_bug is not None and known_bug.kind == "rounding":
                same = j.mostly(found.numbers, exact, self.usual.result(name), self.noise(name), where)
                return Judged(j.PASS if same and (judged.verdict == j.PASS or not largest) else FAIL, Statistics())
            return judged
        inputs = computed.inputs(name)
        op = computed.table[name]
        allowed = in_decimals(op.allowance(inputs, exact, self.context.arithmetic, found.storage), found.coarse)
        if known_bug is not None and known_bug.kind == "rounding":
            eager = self._eager(name, inputs, found.storage, known_bug)
            references = (exact,) if eager is None else (exact, eager)
            usual = self.usual.result(name)
            same = any(j.matches(found.numbers, r, usual, allowed, found.storage, where) for r in references)
            return Judged(j.PASS if same else FAIL, Statistics())
        if known_bug is not None:
            allowed = _widened(allowed, VARIANT_SLACK, exact)
        eager = self._eager(name, inputs, found.storage, known_bug)
        return judge(found.numbers, exact, allowed, found.storage, where, eager, self.override)

    def _eager(self, name: str, inputs: Sequence[Array], storage: str, known_bug: KnownBug | None) -> Array | None:
        """The operation as PyTorch's eager kernels round it."""
        if storage not in ("bfloat16", "float16") or field_of(name) not in SEVERAL_ROUNDINGS:
            return None
        if self._usual_eager is None:
            self._usual_eager = operations(self.eager_context)
        table = self._usual_eager if known_bug is None else known_bug.table(self.eager_context, self._usual_eager)
        with np.errstate(all="ignore"):
            result = table[name].compute(*(as_dtype(x, storage) for x in inputs))
        return np.asarray(result, np.float64)

    def consistent(self, known_bug: KnownBug, names: Sequence[str] | None = None) -> bool | None:
        """Whether the recorded tensors are what a variant makes of their inputs; None if it touches none of them."""
        computed = Computed(known_bug.table(self.context, self.usual.table), self.candidate)
        touched = False
        for name in self.recorded if names is None else names:
            if all(computed.table[step] is self.usual.table[step] for step in computed.span(name)):
                continue
            touched = True
            if self.judged(name, computed, known_bug).verdict not in (*GOOD, BLIND):
                return False
        return True if touched else None

    def explanations(self, finding: Sequence[Instance]) -> tuple[KnownBug, ...]:
        """The variants that explain a finding in every layer; and what they touch besides is not worse for it."""
        names = [i.tensor for i in finding]
        same_field = [n for n in self.recorded if field_of(n) == field_of(names[0])]
        if finding[0].judged.verdict == INVALID:
            return tuple(v for v in KNOWN_BUGS if v.kind == "stage" and self._at_stage(v, finding[0]))
        good = [i.tensor for i in self.all if i.judged.verdict in GOOD]
        found = []
        for v in KNOWN_BUGS:
            if v.change is None or not self.consistent(v, names) or self.consistent(v, same_field) is False:
                continue
            if self.consistent(v, good) is not False:
                found.append(v)
        mistakes = [v for v in found if v.kind == "mistake"]
        return tuple(mistakes or found or self._pairs(finding) or self._left_out(finding))

    def _pairs(self, finding: Sequence[Instance]) -> list[KnownBug]:
        """A mistake that explains the first of several spans alone, with a way of rounding that then explains all.

        Only of spans: what one operation made of its own inputs has one reason.
        """
        if len(finding) < 2 or not finding[0].between:
            return []
        names = [i.tensor for i in finding]
        alone = [v for v in KNOWN_BUGS if v.change is not None and self.consistent(v, names[:1])]
        pairs = (both(v, r) for v in alone for r in KNOWN_BUGS if r.kind == "rounding" and r is not v)
        return [pair for pair in pairs if self.consistent(pair, names)]

    def _left_out(self, finding: Sequence[Instance]) -> list[KnownBug]:
        """The fewest of `LEFT_OUT` that together explain several operations; as many as there are ways."""
        if not finding[0].between:
            return []
        names = [i.tensor for i in finding]
        for count in range(2, len(LEFT_OUT) + 1):
            together = (reduce(both, map(known_bug, chosen)) for chosen in combinations(LEFT_OUT, count))
            if found := [v for v in together if self.consistent(v, names)]:
                return found
        return []

    def _at_stage(self, known_bug: KnownBug, instance: Instance) -> bool:
        call, kind = self.candidate.call, field_of(instance.tensor)
        match known_bug.name:
            case "vocab-padded":
                return instance.tensor == "logits" and self.candidate.columns > self.config.vocab_size
            case "left-pad-nan":
                return not call.visible[:, 0].all() and kind.startswith("attention")
            case "fp16-overflow":
                return self.candidate.dtype == "float16"
        return False

    @cached_property
    def few(self) -> set[str]:
        """The spans that are wrong in few elements: a mistake that leaves these as they are explains nothing."""
        wrong = (i for i in self.all if i.between and i.judged.verdict == FAIL)
        return {i.tensor for i in wrong if i.judged.statistics.rms <= j.SPAN_LIMIT}

    @cached_property
    def all(self) -> list[Instance]:
        """Each recorded tensor, judged; kept."""
        return list(self.instances())

    def findings(self) -> Iterator[Finding]:
        """What is wrong, a field at a time, in the order of execution."""
        groups: dict[str, list[Instance]] = {}
        for instance in self.all:
            if instance.judged.verdict in BAD:
                groups.setdefault(field_of(instance.tensor), []).append(instance)
        for kind, wrong in groups.items():
            total = sum(field_of(i.tensor) == kind for i in self.all)
            invalid = wrong[0].judged.verdict == INVALID
            names = [i.tensor for i in wrong]
            direct = not wrong[0].between
            fitted = () if invalid else tuple(estimates(self.usual, names, self.context))
            where = "" if invalid or not direct else attribution(self, wrong[0].tensor)
            maps = error_maps(self, names[0]) if names[0] in self.candidate.tensors else ()
            yield Finding(kind, tuple(wrong), total, where, self.explanations(wrong), fitted, maps)

    def sigma(self, name: str) -> Array:
        """The standard deviation of each element of one recorded tensor."""
        if len(self.usual.span(name)) > 1:
            return self.noise(name)
        return self.allowance(name).sigma

    def allowance(self, name: str) -> Allowance:
        """What rounding may do to one recorded tensor whose inputs are recorded."""
        inputs, storage = self.usual.inputs(name), self.candidate.tensors[name].storage
        exact = self.usual.result(name)
        allowed = self.usual.table[name].allowance(inputs, exact, self.context.arithmetic, storage)
        return in_decimals(allowed, self.candidate.tensors[name].coarse)

    def where(self, name: str) -> Array:
        """Which elements of a recorded tensor are compared."""
        known = self.candidate.tensors[name].known
        where = where_compared(name, self.context)
        return where if known is None else where & known

    def power(self) -> tuple[tuple[KnownBug, ...], tuple[KnownBug, ...]]:
        """The variants under which the recorded tensors could not be what they are; and those that cannot be told."""
        excluded: list[KnownBug] = []
        blind: list[KnownBug] = []
        for v in KNOWN_BUGS:
            if v.change is not None:
                (excluded if self.consistent(v) is False else blind).append(v)
        return tuple(excluded), tuple(blind)

    def drift(self) -> Iterator[tuple[str, float]]:
        """How far the residual stream and logits are from the model's own, relative; told, and accused of nothing."""
        alone = Computed(self.usual.table, replace(self.candidate, tensors={}))
        for name in self.usual.table:
            if field_of(name) not in ("embedded", "out", "norm", "logits"):
                continue
            own = alone.value(name)
            if name in self.candidate.tensors:
                where = np.broadcast_to(self.where(name), own.shape)
                found, ours = self.candidate.tensors[name].numbers[where], own[where]
                with np.errstate(invalid="ignore"):
                    yield name, float(np.sqrt(np.sum((found - ours) ** 2) / max(np.sum(ours**2), 1e-300)))

    def remarks(self) -> Iterator[str]:
        """What is to be said besides."""
        candidate, call = self.candidate, self.candidate.call
        first = [int(row[np.argmax(seen)]) for row, seen in zip(call.input_ids, call.visible, strict=True)]
        second = [int(row[min(np.argmax(seen) + 1, len(row) - 1)]) for row, seen in
                  zip(call.input_ids, call.visible, strict=True)]  # fmt: skip
        bos = self.config.bos_token_id
        if bos is not None and any(token != bos for token in first):
            remark = "(missing-bos); real texts do, and quality suffers badly without"
            yield f"tokens: row {next(n for n, t in enumerate(first) if t != bos)} does not begin with <bos> {remark}"
        elif bos is not None and call.input_ids.shape[1] > 1 and bos in second:
            yield f"tokens: row {second.index(bos)} begins with <bos> twice (double-bos)"
        for name in candidate.unknown[:3]:
            yield f"{name}: is no tensor of this model"
        if len(candidate.unknown) > 3:
            yield f"and {len(candidate.unknown) - 3} other unknown tensors"
        if candidate.dtype_from == "numbers":
            yield f"the file does not say its dtype; its numbers are those of {candidate.dtype}"
        if self.override != 1:
            yield f"OVERRIDE: everything that rounding may do was multiplied by {self.override:g}, by option"


def _widened(allowed: Allowance, factor: float, exact: Array) -> Allowance:
    """What rounding may do to another function than the bounds are for: errors may be those of its row's largest."""
    with np.errstate(invalid="ignore"):
        floor = VARIANT_FLOOR * np.max(np.abs(exact), axis=-1, keepdims=True)
    return replace(
        allowed, bound=allowed.bound * factor + floor, spread=allowed.spread * factor + floor,
        common=allowed.common * factor,
    )  # fmt: skip


def check(candidate: Candidate, weights: Weights, config: Gemma2Config, override: float = 1.0) -> Report:
    """Compare a candidate with the model it claims to be, and say what is wrong with it.

    Parameters
    ----------
    candidate : Candidate
        From `refgemma.trace.candidate.load_candidate`.
    weights : Weights
        The model's, in the candidate's precision.
    config : Gemma2Config
        The model's.
    override : float
        A factor on everything that rounding may do. Other than 1, every report says so.

    Examples
    --------
    >>> import tempfile, refgemma
    >>> from pathlib import Path
    >>> from refgemma.trace.candidate import load_candidate
    >>> from refgemma.trace.names import named_tensors, save_trace
    >>> tiny = refgemma.load("tiny")
    >>> ids = np.array([[2, 300, 400, 500]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     wrong = tiny.config.changed(final_logit_softcapping=None)
    ...     run = dict(named_tensors(refgemma.forward(ids, tiny.weights, wrong)))
    ...     _ = save_trace(({"input_ids": ids} | run).items(), Path(folder) / "port.safetensors", {"dtype": "float32"})
    ...     report = check(load_candidate(Path(folder) / "port.safetensors", tiny.config), tiny.weights, tiny.config)
    >>> report.verdict, report.first_divergence.tensor, report.findings[0].named
    ('differs', 'logits', 'final-softcap-missing')
    """
    work = Check(candidate, weights, config, override)
    findings = tuple(work.findings())
    excluded, blind = work.power()
    names = [name for name in work.usual.table if name not in candidate.tensors and name not in candidate.refused]
    explained = {v.name for finding in findings for v in finding.explanations}
    blind = tuple(v for v in blind if v.name not in explained)
    order = {name: place for place, name in enumerate(work.usual.table)}
    findings = tuple(sorted(findings, key=lambda f: order[f.instances[0].tensor]))
    return Report(
        candidate, config, tuple(work.all), findings, tuple(names), excluded, blind, tuple(work.remarks()), override,
        tuple(work.drift()),
    )  # fmt: skip
