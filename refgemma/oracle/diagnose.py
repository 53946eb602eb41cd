"""Which tensor of a candidate is wrong first, which known bug explains it, and which known bugs the trace excludes.

Checked by making every known bug in transformers (docs/oracle.md).

A known bug explains a finding if the candidate's tensors are, in every layer, what that bug makes of the candidate's
own inputs. The same question, asked of a candidate that conforms, says what its trace excludes: the bugs under which
its tensors could not be what they are. The others are undetectable in this trace.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import chain, combinations, islice

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.oracle import verdicts
from refgemma.oracle.engine import Engine, Instance
from refgemma.oracle.estimate import Estimate, estimate_parameters
from refgemma.oracle.families import (
    WEIGHT_OF_FIELD,
    Place,
    exchanges_at,
    exchanges_in_all,
    list_places,
    parts_in_half,
    weights_of_another,
)
from refgemma.oracle.judge import SPAN_LIMIT, judge, resembles
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug, combine, known_bug
from refgemma.oracle.locate import ErrorMap, locate_errors, map_errors
from refgemma.oracle.preflight import Preflight
from refgemma.oracle.spans import Computed
from refgemma.oracle.tolerance import from_measured_std, rescale
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import field_of, layer_of
from refgemma.weights.parameters import Weights

# The operation of a known bug rounds a little differently from the right one, for which the bounds are derived: errors
# may be those of its row's largest element.
BUG_FACTOR, BUG_FLOOR = 4.0, 16 * 2.0**-24
# Multiplications that may go into trying weights in other weights' places, of one finding: a second or two.
WORK = 2e9
# What code that was written for Gemma 1 leaves out of Gemma 2, often all at once.
GEMMA_1_BUGS = ("attn-softcap-missing", "final-softcap-missing", "scale-head-dim", "swa-all-global")


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
        return max(self.instances, key=lambda i: (verdicts.BAD.index(i.judged.verdict), i.judged.statistics.rms))

    @property
    def named(self) -> str:
        """The known bugs that explain it, or ``UNKNOWN``."""
        if self.explanations:
            return " or ".join(v.name for v in self.explanations)
        fitting = [e for e in self.estimates if e.fits]
        return f"{fitting[0].parameter} = {fitting[0].value:.6g}" if fitting else verdicts.UNKNOWN

    @property
    def is_rounding(self) -> bool:
        """True if the same model, rounded elsewhere, explains it."""
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
    undetectable: tuple[KnownBug, ...]
    remarks: tuple[str, ...]
    override: float = 1.0
    drift: tuple[tuple[str, float], ...] = field(default=())
    preflight: tuple[Preflight, ...] = ()  # weights and tokens, where they were compared

    @property
    def asked(self) -> int:
        """The number of known bugs that were asked for: excluded, undetectable here, or named."""
        named = {v.name for finding in self.findings for v in finding.explanations if v.change is not None}
        return len({v.name for v in (*self.excluded, *self.undetectable)} | named)

    @property
    def verdict(self) -> str:
        """In one word."""
        if any(not finding.is_rounding for finding in self.findings) or self.wrong_preflight:
            return verdicts.DIFFERS
        words = {i.judged.verdict for i in self.instances} | {result.verdict for result in self.preflight}
        if self.findings or verdicts.NOISY in words:
            return verdicts.NOISY_ONLY
        judged = {i.tensor for i in self.instances if i.judged.verdict != verdicts.BLIND}
        blind = verdicts.BLIND in words or verdicts.MISSING in words
        return verdicts.INCONCLUSIVE if "logits" not in judged or blind or self.logits_missing else verdicts.CONFORMS

    @property
    def logits_missing(self) -> int:
        """The number of logits of the rows' last tokens that are not in the file, where it has a part of them."""
        logits = self.candidate.tensors.get("logits")
        return 0 if logits is None or logits.known is None else int(np.sum(~logits.known[:, -1]))

    @property
    def wrong_preflight(self) -> list[Preflight]:
        """Weights and tokens that are wrong."""
        return [result for result in self.preflight if result.verdict in verdicts.BAD]

    @property
    def first_wrong(self) -> str | None:
        """The name of what is wrong first: weights and tokens, then tensors."""
        if self.wrong_preflight:
            return self.wrong_preflight[0].name
        return self.first_divergence.tensor if self.first_divergence else None

    @property
    def first_divergence(self) -> Instance | None:
        """The computed tensor that is wrong first, in the order of execution."""
        return self.findings[0].instances[0] if self.findings else None


class Diagnosis:
    """What the known bugs make of a candidate's inputs, beside what it recorded."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.usual, self.candidate = engine, engine.usual, engine.candidate
        self.untried = False  # whether other weights' places were left out, for the time that they take

    @cached_property
    def few(self) -> set[str]:
        """The tensors of unrecorded inputs that are wrong in few elements: a bug that leaves these explains nothing."""
        wrong = (i for i in self.engine.instances if i.between and i.judged.verdict == verdicts.FAIL)
        return {i.tensor for i in wrong if i.judged.statistics.rms <= SPAN_LIMIT}

    def fits(self, name: str, computed: Computed, bug: KnownBug) -> bool:
        """Return whether a recorded tensor is what a known bug makes of its inputs."""
        found, exact, where = self.candidate.tensors[name], computed.result(name), self.engine.where(name)
        allowed = self.engine.tolerance(name, computed, exact)
        # The noise of another reading of the model is not that of the right one, so that only its size is judged.
        if allowed.measured and name not in self.few:
            allowed = from_measured_std(allowed.spread, math.inf)
        eager = None
        if self.engine.rounds_several_times(name, computed):
            table = bug.table(self.engine.eager_context, self.engine.eager_table)
            eager = self.engine.eager_result(name, computed, table)
        if bug.kind == "rounding":
            usual = self.usual.result(name)
            ways = [exact] if eager is None else [exact, eager]
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

    def is_consistent(self, bug: KnownBug, names: Sequence[str] | None = None) -> bool | None:
        """Return whether the recorded tensors are what a bug makes of their inputs; None if it touches none of them."""
        computed = self.usual.edit(bug.table(self.engine.context, self.usual.table))
        touched = False
        for name in self.engine.recorded if names is None else names:
            if all(computed.table[step] is self.usual.table[step] for step in computed.span(name)):
                continue
            touched = True
            if not self.fits(name, computed, bug):
                return False
        return True if touched else None

    def explain(self, finding: Sequence[Instance]) -> tuple[KnownBug, ...]:
        """Return the bugs that explain a finding in every layer, and make nothing else worse that they touch."""
        names = [i.tensor for i in finding]
        same_field = [n for n in self.engine.recorded if field_of(n) == field_of(names[0])]
        if finding[0].judged.verdict == verdicts.INVALID:
            return tuple(v for v in KNOWN_BUGS if v.kind == "stage" and self._is_preflight_bug(v, finding[0]))
        good = [i.tensor for i in self.engine.instances if i.judged.verdict in verdicts.GOOD]
        found = []
        for v in KNOWN_BUGS:
            if v.change is None or not self.is_consistent(v, names) or self.is_consistent(v, same_field) is False:
                continue
            if self.is_consistent(v, good) is not False:
                found.append(v)
        mistakes = [v for v in found if v.kind == "mistake"]
        found = mistakes or found or self._find_part(names) or self._find_weights(names, good)
        return tuple(found or self._find_pairs(finding) or self._find_gemma_1(finding))

    def _find_part(self, names: Sequence[str]) -> list[KnownBug]:
        """The largest part in half precision that explains every tensor it touches, some of `names` among them."""
        if self.candidate.dtype != "float32":
            return []
        wrong = sorted({layer for name in names if (layer := layer_of(name)) is not None})
        alone = wrong and len(wrong) < self.engine.config.num_hidden_layers
        for part in chain(parts_in_half(), parts_in_half(wrong) if alone else ()):
            if self.is_consistent(part, names) and self.is_consistent(part):
                return [part]
        return []

    def _find_weights(self, names: Sequence[str], good: Sequence[str]) -> list[KnownBug]:
        """Weights in the places of others: of each wrong tensor's own operation, else of all on the way to the first.

        What lies on the way is computed anew for each, so that of large models not all are tried, which is said.
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
        affordable = int(WORK // max(1, numbers * self.candidate.call.input_ids.size))
        for bug in islice(tried, affordable):
            if self.is_consistent(bug, names) and self.is_consistent(bug, good) is not False:
                return [bug]
        self.untried |= next(tried, None) is not None
        return []

    def _find_pairs(self, finding: Sequence[Instance]) -> list[KnownBug]:
        """A bug that explains the first of several tensors alone, with a way of rounding that then explains all.

        Only of tensors whose inputs were not recorded: what one operation made of its own inputs has one reason.
        """
        if len(finding) < 2 or not finding[0].between:
            return []
        names = [i.tensor for i in finding]
        alone = [v for v in KNOWN_BUGS if v.change is not None and self.is_consistent(v, names[:1])]
        pairs = (combine(v, r) for v in alone for r in KNOWN_BUGS if r.kind == "rounding" and r is not v)
        return [pair for pair in pairs if self.is_consistent(pair, names)]

    def _find_gemma_1(self, finding: Sequence[Instance]) -> list[KnownBug]:
        """The fewest of `GEMMA_1_BUGS` that together explain several operations; as many as there are ways."""
        if not finding[0].between:
            return []
        names = [i.tensor for i in finding]
        for count in range(2, len(GEMMA_1_BUGS) + 1):
            together = (reduce(combine, map(known_bug, chosen)) for chosen in combinations(GEMMA_1_BUGS, count))
            if found := [v for v in together if self.is_consistent(v, names)]:
                return found
        return []

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
        """What is wrong, a field at a time, in the order of execution."""
        groups: dict[str, list[Instance]] = {}
        for instance in self.engine.instances:
            if instance.judged.verdict in verdicts.BAD:
                groups.setdefault(field_of(instance.tensor), []).append(instance)
        for kind, wrong in groups.items():
            total = sum(field_of(i.tensor) == kind for i in self.engine.instances)
            # Tensors of another shape, or with NaN, say nothing of the numbers of the others.
            judged = [i for i in wrong if i.judged.verdict != verdicts.INVALID]
            first, names = (judged or wrong)[0], [i.tensor for i in judged]
            fitted = tuple(estimate_parameters(self.usual, names, self.engine.context))
            where = locate_errors(self.engine, first.tensor) if judged and not first.between else ""
            maps = map_errors(self.engine, first.tensor) if first.tensor in self.candidate.tensors else ()
            yield Finding(kind, tuple(wrong), total, where, self.explain(judged or wrong), fitted, maps)

    def coverage(self) -> tuple[tuple[KnownBug, ...], tuple[KnownBug, ...]]:
        """Return the bugs under which the tensors could not be what they are, and those that are undetectable."""
        excluded: list[KnownBug] = []
        undetectable: list[KnownBug] = []
        for v in KNOWN_BUGS:
            if v.change is not None:
                (excluded if self.is_consistent(v) is False else undetectable).append(v)
        return tuple(excluded), tuple(undetectable)

    def drift(self) -> Iterator[tuple[str, float]]:
        """The relative distance of the residual stream and logits from the model's own; it accuses no tensor."""
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
        """What else a reader should know."""
        candidate, call = self.candidate, self.candidate.call
        texts = [row[seen].tolist() for row, seen in zip(call.input_ids, call.visible, strict=True)]
        bos = self.engine.config.bos_token_id
        without = [row for row, text in enumerate(texts) if text[:1] != [bos]]
        twice = [row for row, text in enumerate(texts) if text[:2] == [bos, bos]]
        if bos is not None and without:
            remark = "(missing-bos); real texts do, and quality suffers badly without"
            yield f"tokens: row {without[0]} does not begin with <bos> {remark}"
        elif bos is not None and twice:
            yield f"tokens: row {twice[0]} begins with <bos> twice (double-bos)"
        if self.untried:
            yield "weights in the places of others were not all tried: record the projections and norms to name one"
        for name in candidate.unknown[:3]:
            yield f"{name}: is no tensor of this model"
        if len(candidate.unknown) > 3:
            yield f"and {len(candidate.unknown) - 3} other unknown tensors"
        if candidate.dtype_from == "numbers":
            yield f"the file does not say its dtype; its numbers are those of {candidate.dtype}"
        if self.engine.override != 1:
            yield f"OVERRIDE: everything that rounding may do was multiplied by {self.engine.override:g}, by option"


def diagnose(candidate: Candidate, weights: Weights, config: Gemma2Config, override: float = 1.0) -> Report:
    """Judge a candidate's tensors, and say what is wrong with them.

    Parameters
    ----------
    candidate : Candidate
        From `refgemma.trace.candidate.load_trace`.
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
    engine = Engine(candidate, weights, config, override)
    work = Diagnosis(engine)
    order = list(engine.usual.table)
    findings = tuple(sorted(work.findings(), key=lambda finding: order.index(finding.instances[0].tensor)))
    excluded, undetectable = work.coverage()
    explained = {v.name for finding in findings for v in finding.explanations}
    missing = tuple(name for name in order if name not in candidate.tensors and name not in candidate.refused)
    return Report(
        candidate, config, tuple(engine.instances), findings, missing, excluded,
        tuple(v for v in undetectable if v.name not in explained), tuple(work.remarks()), override, tuple(work.drift()),
    )  # fmt: skip
