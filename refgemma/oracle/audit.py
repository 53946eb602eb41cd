"""Audit a server: find whether it serves a checkpoint, and which known bug or quantisation explains its answers.

Checked on servers that the tests start: right ones, others with known bugs, quantised ones and hostile ones.

Two runs are judged as `refgemma check` judges a trace: a prompt, and a text that the server generates past the window.
Nobody says how a server computes. So each run is judged in several precisions, and with quantised weights if needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.oracle import report as reports
from refgemma.oracle.diagnose import Diagnosis, Finding, Report, report_on
from refgemma.oracle.engine import QUANTISED_LIMIT, UNEVEN, Engine
from refgemma.oracle.estimate import is_significant
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug
from refgemma.oracle.prompts import SEED, prompts
from refgemma.oracle.verdicts import CONFORMS, DIFFERS, EXIT, GOOD, INCONCLUSIVE, NOISY, NOISY_ONLY, UNKNOWN
from refgemma.precision import Array
from refgemma.tokenizer.tokenizer import Tokenizer, TokenizerError
from refgemma.trace.candidate import check_trace
from refgemma.trace.names import LOGPROBS
from refgemma.trace.reader import TraceFile
from refgemma.trace.server import Asking, Scores, Server, Words, find_form, make_trace, to_text, writable
from refgemma.weights.checkpoint import open_checkpoint

HALF_PRECISIONS = ("float16", "bfloat16")  # the finest that explains the numbers is named
# Rounding to 8 bits, with one scale for a row, has about this relative error; each bit less doubles it.
ERROR_OF_8_BITS, MOST_BITS = 0.007, 8
LARGER = 3.0
# The smallest error of a row, relative to the median: 0.4 or more with weights of 4 to 8 bits; 0.0001 at the first
# token if a mistake is in attention.
LEAST = 0.1
OTHER_WEIGHTS = 0.5  # share of rows with the model's own best word; other weights have less


@dataclass(frozen=True)
class Assumption:
    """The judged runs, under one assumption on how the server computes."""

    reports: tuple[Report, ...]
    engines: tuple[Engine, ...] = field(repr=False)

    @property
    def dtype(self) -> str:
        """The precision of the computation."""
        return self.engines[0].candidate.dtype

    @property
    def quantised(self) -> bool:
        """True if the weights may be rounded."""
        return self.engines[0].quantised

    @cached_property
    def errors(self) -> tuple[float, ...]:
        """The relative error of products with weights in each run, if they are quantised."""
        return tuple(max(one.quantisation.values(), default=0.0) for one in self.engines) if self.quantised else ()

    @property
    def off(self) -> float:
        """The largest of the errors."""
        return max(self.errors, default=0.0)

    @property
    def names(self) -> list[str]:
        """The names of the findings, each once; a number that all runs agree on has one name."""
        found: dict[str, Finding] = {}
        for finding in (finding for report in self.reports for finding in report.findings):
            if not any(agree(finding, other) for other in found.values()):
                found.setdefault(finding.named, finding)
        return [*found]

    @property
    def verdict(self) -> str:
        """The verdict; a run that lacks only words of the vocabulary conforms."""
        findings = [finding for report in self.reports for finding in report.findings]
        if any(not finding.is_rounding for finding in findings):
            return DIFFERS
        words = {i.judged.verdict for report in self.reports for i in report.instances}
        if findings or NOISY in words:
            return NOISY_ONLY
        return CONFORMS if words and words <= set(GOOD) else INCONCLUSIVE

    @property
    def fits(self) -> bool:
        """True if something known explains every number."""
        known = UNKNOWN not in self.names and self.verdict != INCONCLUSIVE
        return known and (not self.quantised or (self.is_even and self.off <= QUANTISED_LIMIT))

    @cached_property
    def is_even(self) -> bool:
        """True if all runs and all places have errors of about the same size, as from rounded weights.

        Other causes leave some places right: the first token sees only itself, so nothing in attention's scores,
        masks and positions changes it.
        """
        sizes = np.concatenate([_measure_rows(*one) for one in zip(self.engines, self.reports, strict=True)])
        return self.off <= UNEVEN * min(self.errors) and bool(sizes.min() >= LEAST * np.median(sizes))

    def describe(self) -> str:
        """Return a description of the server under this assumption."""
        bugs = [name for name in self.names if name != UNKNOWN]
        parts = [] if self.dtype == "float32" else [f"it computes in {self.dtype}"]
        if self.quantised:
            bits = round(8 - np.log2(max(self.off, 1e-6) / ERROR_OF_8_BITS))
            about = f", as after rounding to about {bits} bits" if 1 < bits <= MOST_BITS else ""
            parts.append(f"its weights are off by {100 * self.off:.2g} %{about}")
        if bugs:
            parts.append(f"it has {' and '.join(bugs)}")
        return " and ".join(parts) or "rounding in float32 explains every number"


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    server: str
    served: str
    form: str
    runs: tuple[str, ...]  # "prompt", "generated"
    assumptions: tuple[Assumption, ...]  # those that fit, or the only one
    agreeing: int  # rows whose best word is the model's own
    rows: int
    numbers: int
    remarks: tuple[str, ...] = ()

    @property
    def best(self) -> Assumption:
        """The assumption that is named first."""
        return self.assumptions[0]

    @property
    def verdict(self) -> str:
        """The verdict of the best assumption."""
        return self.best.verdict

    @cached_property
    def excluded(self) -> list[KnownBug]:
        """The known bugs that some run excludes.

        Behind rounded weights, a bug is excluded if it would make the error `LARGER` times as large.
        """
        if not self.best.quantised:
            return list(dict.fromkeys(v for report in self.best.reports for v in report.excluded))
        ranked = [left for one in self.best.engines for left in Diagnosis(one, KNOWN_BUGS).rank(LOGPROBS)]
        return [v for v in KNOWN_BUGS if any(left >= LARGER and v is bug for left, bug in ranked)]

    @cached_property
    def undetectable(self) -> list[KnownBug]:
        """The known bugs that no run can show."""
        named = {v for r in self.best.reports for finding in r.findings for v in finding.explanations}
        seen = {*self.excluded, *named}
        return [v for v in KNOWN_BUGS if v.change is not None and v not in seen]


def audit(
    server: Server, model: str | Path = "conformance", tokens: int = 64, requests: int = 64,
    config: Gemma2Config | None = None,
) -> Audit:  # fmt: skip
    """Ask a server for log probabilities, and find whether it serves a checkpoint.

    Parameters
    ----------
    server : Server
        The server.
    model : str or path
        The checkpoint that it should serve.
    tokens : int
        The largest number of tokens of a text; a text longer than the window shows more.
    requests : int
        The largest number of requests for a prompt, if the server does not repeat prompts.
    config : Gemma2Config, optional
        The configuration to use instead of the model's own.

    Raises
    ------
    ServerError
        If the server cannot be asked, or its answers cannot be used.
    InputError
        If too few tokens are allowed.
    """
    if min(tokens, requests) < 4:
        raise InputError(f"tokens is {tokens} and requests is {requests}; both must be at least 4")
    folder = find_model(str(model))
    config = config or open_checkpoint(folder).config
    tokenizer = _open_tokenizer(folder)
    plain = prompts(config)["plain"].input_ids[0, :tokens].tolist()
    written = None if tokenizer is None else _write_prompt(config, tokenizer, len(plain))
    asking, rows = find_form(server, Words(config.vocab_size, tokenizer), plain, written)
    ids = written if asking.form.text and written else plain
    rows = rows or asking.ask_steps(ids, requests)
    rows |= {} if 0 in rows else asking.ask_first(ids)
    traces = {"prompt": make_trace(server.base, ids, rows)}
    traces |= _generate(asking, ids, config, tokenizer)
    return _judge_runs(server, asking, traces, rows, folder, config)


def _open_tokenizer(folder: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_pretrained(folder)
    except TokenizerError:
        return None


def _write_prompt(config: Gemma2Config, tokenizer: Tokenizer, length: int) -> list[int]:
    """Return random tokens after <bos> that can be written as a text."""
    ids = np.random.default_rng(SEED).integers(4, min(config.vocab_size, len(tokenizer)), 8 * length)
    return writable([config.bos_token_id or 2, *ids.tolist()], tokenizer)[:length]


def _generate(
    asking: Asking, ids: Sequence[int], config: Gemma2Config, tokenizer: Tokenizer | None
) -> dict[str, TraceFile]:
    """Return the trace of a generated text that begins inside the window and ends past it, if the text has a few
    tokens."""
    start = max(2, min(config.sliding_window - 2, len(ids) // 2))
    while asking.form.text and start > 2 and (tokenizer is None or to_text(ids[:start], tokenizer) is None):
        start -= 1
    new = max(2, min(2 * config.sliding_window + 2, len(ids)) - start)
    text, rows = asking.generate(ids[:start], new)
    if len(rows) < 2:
        return {}
    return {"generated": make_trace(asking.server.base, text, rows, [start] + [1] * (len(text) - start))}


def _judge_runs(
    server: Server, asking: Asking, traces: dict[str, TraceFile], rows: Scores, folder: Path, config: Gemma2Config
) -> Audit:
    """Judge the traces as computed in float32, then in half precision, then with rounded weights, until one explains
    the numbers.

    A mistake in a finer precision is tried before a coarser one without a mistake, because the rounding of the coarser
    one may be larger than the mistake. The slow steps come last: known bugs in half precision and, if nothing fits,
    families of bugs.
    """

    def start(dtype: str, quantised: bool = False) -> tuple[Engine, ...]:
        weights = open_checkpoint(folder).weights(dtype)
        return tuple(
            Engine(check_trace(trace, config, dtype), weights, config, 1.0, quantised) for trace in traces.values()
        )

    def read(engines: tuple[Engine, ...], bugs: Sequence[KnownBug] | None = KNOWN_BUGS) -> Assumption:
        return Assumption(tuple(report_on(one, bugs, numbers=True) for one in engines), engines)

    plain, rounded, halves = (
        start("float32"),
        start("float32", quantised=True),
        [start(half) for half in HALF_PRECISIONS],
    )
    tried = [first := read(plain)]
    if not first.fits:
        good = [n for n, half in enumerate(halves) if are_good(half)][:1]
        tried += [read(half) for half in halves[: good[0] + 1]] if good else []
        tried += [behind := read(rounded)]
        if not any(assumption.fits for assumption in tried[:-1]) and (behind.names or not behind.fits):
            tried[1:1] = [read(half) for half in halves]
    fitting = [assumption for assumption in tried if assumption.fits] or [read(plain, None)]
    lacking = [] if "generated" in traces else ["the generated text ended early; steps with a cache were not judged"]
    if any(assumption.quantised for assumption in fitting) and 0 not in rows:
        lacking.append("the first token has no numbers; so rounded weights look like a mistake in attention")
    return Audit(server.base, server.name, _say_form(asking), tuple(traces), tuple(fitting), *_agree(plain),
                 (*asking.remarks, *lacking))  # fmt: skip


def agree(one: Finding, other: Finding) -> bool:
    """Return True if two findings are the same number of the configuration, with values that do not differ
    significantly."""
    pairs = [(a, b) for a in one.estimates for b in other.estimates if a.fits and b.fits and a.parameter == b.parameter]
    return any(not is_significant(a.value, a.uncertainty + b.uncertainty, b.value) for a, b in pairs)


def are_good(engines: Sequence[Engine]) -> bool:
    """Return True if rounding explains all numbers."""
    return all(i.judged.verdict in GOOD for one in engines for i in one.instances)


def _measure_rows(engine: Engine, report: Report) -> Array:
    """Return the error of each recorded row after the named bug, in units of the error from rounded weights."""
    named = [finding.explanations[0] for finding in report.findings if finding.explanations]
    computed = Diagnosis(engine, ()).read(named[0]) if named else engine.usual
    where = engine.where(LOGPROBS)
    errors = np.where(where, engine.candidate.tensors[LOGPROBS].numbers - computed.result(LOGPROBS), 0)
    counts = where.sum(axis=-1)
    squares = ((errors / engine.noise(LOGPROBS, 0.01)) ** 2).sum(axis=-1)
    return np.asarray(np.sqrt(squares[counts > 0] / counts[counts > 0]))


def _agree(engines: Sequence[Engine]) -> tuple[int, int, int]:
    """Return the number of rows whose best word is the model's own, of rows, and of log probabilities."""
    agreeing = rows = numbers = 0
    for engine in engines:
        where, found = engine.where(LOGPROBS), engine.candidate.tensors[LOGPROBS].numbers
        recorded = where.any(axis=-1)
        best = np.where(where, found, -np.inf).argmax(axis=-1)
        own = np.where(where, engine.usual.result(LOGPROBS), -np.inf).argmax(axis=-1)
        agreeing += int(np.sum((best == own) & recorded))
        rows += int(recorded.sum())
        numbers += int(where.sum())
    return agreeing, rows, numbers


def _say_form(asking: Asking) -> str:
    form = asking.form
    return f"{'text' if form.text else 'token ids'}, {'repeated prompt' if form.echo else 'one token at a time'}"


def text_lines(found: Audit, model: str) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"{found.server} ({found.served}) against {model}: {found.numbers} log probabilities at {found.rows} places"
    yield f"asked with {found.form}; runs: {', '.join(found.runs)}"
    yield ""
    yield _verdict_line(found)
    for other in found.assumptions[1:]:
        yield f"  or {other.describe()}; these numbers cannot tell which"
    if any(assumption.quantised for assumption in found.assumptions):
        yield "  slightly trained weights look like rounded weights"
    for run, report in zip(found.runs, found.best.reports, strict=True):
        yield from _run_lines(run, report)
    yield f"its best word is the model's own at {found.agreeing} of {found.rows} places"
    asked = len({*found.excluded, *found.undetectable})
    unknown = UNKNOWN in found.best.names
    yield f"{'do not explain it alone' if unknown else 'excluded'}: {len(found.excluded)} of {asked} known bugs"
    if found.undetectable:
        names = ", ".join(v.name for v in found.undetectable)
        yield from reports.wrap(f"could not show {len(found.undetectable)}: {names}")
    yield from (f"remark: {remark}" for remark in found.remarks)


def _verdict_line(found: Audit) -> str:
    best = found.best
    if best.verdict == DIFFERS:
        known = [name for name in best.names if name != UNKNOWN]
        if known:
            return f"DIFFERS: {best.describe()}" + ("; and something unknown" if UNKNOWN in best.names else "")
        if found.agreeing < OTHER_WEIGHTS * found.rows:
            return "DIFFERS: UNKNOWN; its best words are others, so it probably serves other weights"
        return "DIFFERS: UNKNOWN; no known bug, other number, precision or quantisation explains it"
    if best.verdict == INCONCLUSIVE:
        return "INCONCLUSIVE: no log probability could be compared"
    return f"{best.verdict.upper()}: it serves this checkpoint; {best.describe()}"


def _run_lines(run: str, report: Report) -> Iterator[str]:
    for finding in report.findings:
        yield f"  {run}: {finding.named}, error {reports.number(finding.worst.judged.statistics.rms)} times rounding"
        for v in finding.explanations[:2]:
            yield f"    {v.says}; seen in {v.seen}"
        if finding.closest:
            yield f"    closest: {finding.closest[0].name}, but {finding.closest[1]:.2g} of the error remains"
        yield from (f"    {reports.estimate_text(e)}" for e in finding.estimates)
    if not report.findings:
        errors = [i.judged.statistics.rms for i in report.instances]
        yield f"  {run}: error {reports.number(max(errors, default=0.0))} times rounding"


def as_json(found: Audit, model: str) -> dict[str, Any]:
    """Return the result as JSON types."""
    return {
        "schema": "refgemma-audit/1", "server": found.server, "served": found.served, "model": model,
        "form": found.form, "verdict": found.verdict, "exit_code": EXIT[found.verdict], "says": _verdict_line(found),
        "assumptions": [
            {"dtype": r.dtype, "quantised": r.quantised, "weights_off": r.off, "verdict": r.verdict, "named": r.names,
             "runs": {run: reports.as_json(one, model) for run, one in zip(found.runs, r.reports, strict=True)}}
            for r in found.assumptions
        ],
        "best_word_agrees": found.agreeing, "places": found.rows, "log_probabilities": found.numbers,
        "excluded": [v.name for v in found.excluded], "not_shown": [v.name for v in found.undetectable],
        "remarks": list(found.remarks),
    }  # fmt: skip
