"""Write the results of a check for a terminal, a program, a browser, a pull request and a test runner.

Checked in the tests: all five have the same verdict, and the JSON has every field of its schema.
"""

import math
import platform
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import escape, hash_file, pluralise, write_json
from refgemma.oracle.diagnose import Finding, Report
from refgemma.oracle.engine import Instance
from refgemma.oracle.estimate import Estimate, is_number
from refgemma.oracle.judge import Statistics
from refgemma.oracle.known_bugs import KnownBug, edit_config
from refgemma.oracle.preflight import Preflight
from refgemma.oracle.verdicts import (
    BAD,
    BLIND,
    CONFORMS,
    EXACT,
    EXIT,
    INCONCLUSIVE,
    MISSING,
    NOISY,
    NOISY_ONLY,
    UNKNOWN,
)
from refgemma.trace.names import field_of, layer_of, list_names, list_ranges

WIDTH = 118


def number(x: float) -> str:
    """Return a number as text with three digits, or the name of infinity or NaN.

    Examples
    --------
    >>> number(1234.5), number(0.25), number(float("inf"))
    ('1.23e+03', '0.25', 'inf')
    """
    return f"{x:.3g}"


def factor(x: float) -> str:
    """Return a factor as a person writes it, with two or three digits.

    Examples
    --------
    >>> factor(0.123), factor(41.7), factor(74612.0), factor(5.85e6), factor(2.5e11)
    ('0.12', '42', '74,600', '5.85 million', '2.5e+11')
    """
    if x >= 1e9 or x < 9.95:
        return f"{x:.2g}"
    return f"{x / 1e6:.3g} million" if x >= 1e6 else f"{float(f'{x:.3g}'):,.0f}"


def percent(share: float) -> str:
    """Return a share in per cent; only 0 and 1 are rounded to 0 and 100.

    Examples
    --------
    >>> percent(0.5), percent(0.99999), percent(1.0), percent(0.0001)
    ('50%', '>99%', '100%', '<1%')
    """
    return "<1%" if 0 < share < 0.01 else ">99%" if 0.99 < share < 1 else f"{share:.0%}"


def largest_error(s: Statistics) -> str:
    """Return the largest error in words: how many times the error bound of rounding."""
    if math.isinf(s.error_over_bound):
        return "must be exact"
    return f"{factor(s.error_over_bound)} x bound" if s.error_over_bound else "-"  # a measured tolerance has no bound


def typical_error(s: Statistics) -> str:
    """Return the root mean square error in words: how many times the usual error of rounding."""
    return "-" if not s.rms else "infinite" if math.isinf(s.rms) else f"{factor(s.rms)} x rounding"


def describe_statistics(s: Statistics) -> str:
    """Return the largest and the typical error of a tensor in words.

    Examples
    --------
    >>> describe_statistics(Statistics(error_over_bound=0.5, rms=1.0))
    'largest error 0.5 x bound, typical error 1 x rounding'
    """
    return f"largest error {largest_error(s)}, typical error {typical_error(s)}"


def wrap(line: str, width: int = WIDTH) -> list[str]:
    """Return a line in lines of at most `width` characters; escape control characters, and keep words and indentation.

    Examples
    --------
    >>> wrap("  one two three", 12)
    ['  one two', '    three']
    """
    line = escape(line)
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def estimate_text(e: Estimate) -> str:
    """Return an estimate as a sentence."""
    near = f", which is {e.near}" if e.near and not is_number(e.near) else ""
    fit = "" if e.fits else "; this explains only part of the error"
    return f"{e.parameter} seems to be {_with_spread(e)} instead of {e.expected:.6g}{near}{fit}"


def _with_spread(e: Estimate) -> str:
    return f"{e.value:.6g}" + (f" +- {e.uncertainty:.1g}" if e.uncertainty else "")


def changed_keys(bug: KnownBug, config: Gemma2Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys of the configuration that a known bug changes, each with the expected and the wrong value."""
    edited = edit_config(bug.change, config)
    changed = {key: (x, other) for key, x in vars(config).items() if (other := getattr(edited, key)) != x}
    return {key: pair for key, pair in changed.items() if key != "rope_parameters" or "rope_theta" not in changed}


def where_to_look(bug: KnownBug, config: Gemma2Config, estimates: Sequence[Estimate] = ()) -> str:
    """Return the part of a port to look at, with the value that the trace suggests for a key of the configuration."""
    changed = changed_keys(bug, config)
    said = []
    for key, (expected, wrong) in changed.items():
        near = [e for e in estimates if explains_estimate(key, wrong, e)]
        right, found = shown_value(expected, wrong)
        found = _with_spread(near[0]) if near else found
        said.append(f"config key {key}: the trace suggests {found}, expected is {right}")
    if not changed and hasattr(config, bug.knob):
        return f"config key {bug.knob}, expected is {shown_value(getattr(config, bug.knob), None)[0]}"
    return "; ".join(said if bug.knob in changed or not bug.knob else [bug.knob, *said])


def shown_value(expected: Any, found: Any) -> tuple[str, str]:
    """Return the text of two values of a key of the configuration; of lists, only the layers that differ.

    Examples
    --------
    >>> shown_value(8, None), shown_value(("full", "sliding", "full"), ("full", "full", "full"))
    (('8', 'none'), ('sliding in layers 1', 'full in layers 1'))
    """
    if isinstance(expected, tuple) and isinstance(found, tuple):
        layers = [n for n, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
        sides = [", ".join(dict.fromkeys(side[n] for n in layers)) for side in (expected, found)]
        return f"{sides[0]} in layers {list_ranges(layers)}", f"{sides[1]} in layers {list_ranges(layers)}"
    one, other = ("none" if x is None else f"{x:g}" if isinstance(x, float) else str(x) for x in (expected, found))
    return one, other


def explains_estimate(key: str, value: Any, e: Estimate) -> bool:
    """Return True if a bug's value of a key of the configuration is the estimate."""
    return (
        e.fits and e.parameter == key and isinstance(value, int | float) and math.isclose(value, e.value, rel_tol=0.01)
    )


def finding_row(finding: Finding, width: int) -> str:
    """Return a finding's line in the table; `width` is that of the first column."""
    s, verdict = finding.worst.judged.statistics, finding.worst.judged.verdict
    layers = f"{len(finding.instances)} of {finding.total}"
    return f"{finding.field:{width}s} {verdict:8s} {layers:8s} {error_columns(s)}"


def error_columns(s: Statistics) -> str:
    """Return the columns of errors of a line in a table; `ERRORS` has their titles."""
    largest, typical = (said.replace(" million", "M") for said in (largest_error(s), typical_error(s)))
    return f"{largest:>15s} {typical:>19s} {percent(s.exact):>6s}"


ERRORS = f"{'largest error':>15s} {'typical error':>19s} {'exact':>6s}"
UNITS = (
    "bound: the largest error that rounding can cause; 1 x rounding: its usual error; exact: correctly rounded elements"
)


def preflight_lines(report: Report) -> list[str]:
    """Return the problems of weights and tokens, one line per known bug."""
    groups: dict[tuple[str, str], list[Preflight]] = {}
    for stage in report.preflight:
        if stage.verdict != EXACT:
            groups.setdefault((stage.verdict, stage.named), []).append(stage)
    lines = []
    for (verdict, named), stages in groups.items():
        notes = {stage.note for stage in stages if stage.note}
        note = f": {notes.pop()}" if len(notes) == 1 else ""
        lines.append(f"{verdict} {list_names(s.name for s in stages)}: {named or verdict.lower()}{note}")
    return lines


def first_lines(report: Report) -> list[str]:
    """Return the verdict and the details of the first finding."""
    lines = preflight_lines(report)
    if report.wrong_preflight:
        lines = [f"DIFFERS first at {report.wrong_preflight[0].name}: {report.wrong_preflight[0].named}", *lines]
        return lines + (finding_lines(report) if report.findings else [])
    return lines + finding_lines(report)


def finding_lines(report: Report) -> list[str]:
    """Return the verdict and details for the computed tensors."""
    if not report.findings:
        return [f"{report.verdict.upper() if report.verdict != NOISY_ONLY else 'NOISY'}: {why(report)}"]
    finding = report.findings[0]
    first, word = finding.instances[0], "NOISY" if report.verdict == NOISY_ONLY else "DIFFERS"
    lines = [f"{word} first at {first.tensor}: {cause(report, finding)}", *other_precisions(report)]
    if first.judged.note:
        lines.append(f"  {first.judged.note}")
    for v in finding.explanations:
        lines += [f"  {v.name}: {v.says}", f"    seen in {v.seen}"]
        lines.append(f"    look at: {where_to_look(v, report.config, finding.estimates)}")
    lines += [f"  {line}" for line in unexplained_lines(finding, report.config)]
    if finding.where:
        lines.append(f"  {finding.where}")
    if first.between:
        lines.append(f"  this tensor was computed from {list_names(first.sources) or 'the tokens'}")
        lines.append(f"  to find the operation, record also {', '.join(_to_record(first))}")
    return lines


def other_precisions(report: Report) -> list[str]:
    """Return the verdicts for the other precisions; in one line if none of them explains the trace."""
    if any(not other.findings or other.findings[0].named != UNKNOWN for other in report.again):
        said = [f"  as if computed in {other.candidate.dtype}: {_headline(other)}" for other in report.again]
        return [*said, "    if this is the candidate's arithmetic, give it with --dtype"]
    names = " and ".join(other.candidate.dtype for other in report.again)
    return [f"  also {UNKNOWN} as if computed in {names}"] if names else []


def unexplained_lines(finding: Finding, config: Gemma2Config) -> list[str]:
    """Return the estimates that no explanation mentions, and advice if nothing explains a finding."""
    lines = []
    first = finding.instances[0]
    if not finding.explanations and not any(e.fits for e in finding.estimates) and not first.judged.note:
        lines.append("no known bug explains it; --repro FILE writes its inputs and result to a file")
    if finding.closest:
        bug, left = finding.closest
        lines.append(f"closest: {bug.name} ({bug.says}), but {_as_part(left)} of the error remains")
    said = [(key, x) for v in finding.explanations for key, (_, x) in changed_keys(v, config).items()]
    return lines + [
        estimate_text(e) for e in finding.estimates if not any(explains_estimate(key, x, e) for key, x in said)
    ]


def cause(report: Report, finding: Finding) -> str:
    """Return the reason of a finding: known bugs, an estimate, a wrong shape, or ``UNKNOWN``."""
    return "not comparable" if finding.instances[0].tensor in report.candidate.refused else finding.named


def _headline(report: Report) -> str:
    """Return the verdict with the first wrong tensor."""
    finding = report.findings[0] if report.findings else None
    return report.verdict.upper() + (f" first at {finding.instances[0].tensor}: {finding.named}" if finding else "")


def _as_part(x: float) -> str:
    """Return a fraction as text.

    Examples
    --------
    >>> _as_part(0.037), _as_part(0.4), _as_part(0.0)
    ('1/27', '0.4', 'nothing')
    """
    return "nothing" if x < 1e-6 else f"1/{1 / x:.0f}" if x < 1 / 3 else f"{x:.1g}"


def label(report: Report, model: str) -> str:
    """Return the name of the model, with its changed numbers."""
    return f"{model} with {report.changed}" if report.changed else model


def why(report: Report) -> str:
    """Return the reason of a verdict without a finding."""
    noisy = [i for i in report.instances if i.judged.verdict == NOISY]
    quantised = [i.judged.note for i in noisy if i.judged.note]
    said = f"{quantised[0]}, as from quantisation" if quantised else (
        "inside the error bounds, but noisier than the declared arithmetic"
    )  # fmt: skip
    return {
        CONFORMS: "rounding explains every recorded tensor",
        NOISY_ONLY: f"{said}: {list_names(i.tensor for i in noisy) or 'weights'}",
        INCONCLUSIVE: why_inconclusive(report),
    }[report.verdict]


def _to_record(instance: Instance) -> list[str]:
    """Return tensors that divide a span into about four parts, if recorded."""
    between = [name for name in instance.between if field_of(name) in ("out", "middle", "norm", "raw_logits")]
    steps = between or list(instance.between)
    every = max(1, len(steps) // 4)
    return steps[every - 1 :: every]


def why_inconclusive(report: Report) -> str:
    """Return the reason why a check is inconclusive."""
    blind = [i.tensor for i in report.instances if i.judged.verdict == BLIND]
    if blind:
        return f"no element could be compared in {list_names(blind)}"
    if report.logits_missing:
        return (
            "rounding explains all recorded tensors, but "
            f"{pluralise(report.logits_missing, 'logit')} of the last token are missing"
        )
    if any(stage.verdict == MISSING for stage in report.preflight):
        return "some weights are missing"
    return "logits are missing, so the comparison is incomplete"


def count_verdicts(report: Report) -> str:
    """Return the number of tensors of each verdict as text."""
    counts = Counter(i.judged.verdict for i in report.instances)
    return ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))


def count_bugs(report: Report) -> str:
    """Return the numbers of known bugs that the trace rules out, that explain a finding, and that it cannot show."""
    return "; ".join(f"{count} {said}" for count, said in bug_counts(report))


def bug_counts(report: Report) -> list[tuple[str, str]]:
    """Return the numbers above 0 of `count_bugs`, each with its words."""
    unseen = len(report.undetectable)
    named = report.asked - len({v.name for v in (*report.excluded, *report.undetectable)})
    counts = (
        (f"{len(report.excluded)} of {report.asked}", "ruled out", True),
        (f"{named}", "explains the difference" if named == 1 else "explain the differences", named > 0),
        (f"{unseen}", f"look{'s' * (unseen == 1)} like the correct model in this trace", unseen > 0),
    )
    return [(count, said) for count, said, shown in counts if shown]


def alike_lines(report: Report) -> list[str]:
    """Return the known bugs that this trace cannot show, by the inputs that would show them; most bugs first."""
    groups: dict[str, list[str]] = {}
    for v in report.undetectable:
        groups.setdefault(v.shows, []).append(v.name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"  shown by {shows}: {', '.join(names)}" for shows, names in ordered]


def recorded_lines(report: Report) -> list[str]:
    """Return the list of the tensors that were not recorded or, if it is shorter, of the recorded ones."""
    missing, recorded = report.missing, [i.tensor for i in report.instances]
    if not missing:
        return []
    if len(recorded) < len(missing):
        return [f"recorded: {list_names(recorded)}; {pluralise(len(missing), 'other tensor')} not recorded"]
    return [f"not recorded: {pluralise(len(missing), 'tensor')}: {list_names(missing)}"]


def text(report: Report, model: str) -> str:
    """Return the report for a terminal, wrapped at `WIDTH` characters."""
    call, candidate = report.candidate.call, report.candidate
    asked = "x".join(str(n) for n in call.input_ids.shape)
    count = pluralise(len(report.instances), f"tensor of {asked} tokens")
    unused = f"; {pluralise(len(candidate.unknown), 'other name')} not used" if candidate.unknown else ""
    lines = [f"{candidate.source} against {label(report, model)}: {count} in {candidate.dtype}{unused}", ""]
    lines += [*first_lines(report), ""]
    if report.findings:
        width = max(28, *(len(finding.field) for finding in report.findings))
        lines.append(f"{'tensor':{width}s} {'verdict':8s} {'layers':8s} {ERRORS}")
        for finding in report.findings:
            named = "" if finding is report.findings[0] else f"  {cause(report, finding)}"
            lines.append(finding_row(finding, width) + named)
        lines.append(UNITS)
    lines.append(count_verdicts(report))
    lines.append(f"known bugs: {count_bugs(report)}" + (":" if report.undetectable else ""))
    lines += alike_lines(report)
    lines += [*recorded_lines(report), *(f"remark: {r}" for r in report.remarks)]
    said = f"[{report.changed}] " if report.changed else ""
    return "\n".join(said + part if part else "" for line in lines for part in wrap(line, WIDTH - len(said)))


# --- for programs -----------------------------------------------------------------------------------------------------


def known_bug_json(v: KnownBug) -> dict[str, Any]:
    """Return a catalogue entry as JSON types."""
    return {
        "variant": v.name, "kind": v.kind, "says": v.says, "first_tensor": v.fields[0], "tensors": v.fields,
        "knob": v.knob, "seen": v.seen, "shows": v.shows,
    }  # fmt: skip


def statistic_json(instance: Instance) -> dict[str, Any]:
    """Return the statistics of one verdict as JSON types."""
    s = instance.judged.statistics
    return {
        "verdict": instance.judged.verdict,
        "error_over_bound": s.error_over_bound, "rms_over_sigma": s.rms, "gain_sigmas": s.gain, "bias_sigmas": s.bias,
        "factor": s.factor, "exact": s.exact, "elements": s.elements, "worst_place": s.place,
        "note": instance.judged.note,
        "limit": "measured" if instance.between else "derived",
    }  # fmt: skip


def suggestion_json(v: KnownBug, config: Gemma2Config) -> dict[str, Any]:
    """Return the keys of the configuration that a known bug changes, as JSON types."""
    changed = changed_keys(v, config).items()
    return {"suggests": {key: {"expected": expected, "found": found} for key, (expected, found) in changed}}


def finding_json(finding: Finding, config: Gemma2Config) -> dict[str, Any]:
    """Return one finding as JSON types."""
    return {
        "tensor": finding.instances[0].tensor,
        "field": finding.field,
        "layers": [layer for i in finding.instances if (layer := layer_of(i.tensor)) is not None],
        "recorded": finding.total,
        "statistic": statistic_json(finding.worst),
        "named": finding.named,
        "explanations": [known_bug_json(v) | suggestion_json(v, config) for v in finding.explanations],
        "estimates": [asdict(e) for e in finding.estimates],
        "closest": finding.closest and {"variant": finding.closest[0].name, "leaves": finding.closest[1]},
        "where": finding.where,
        "computed_from": finding.instances[0].sources,
        "not_recorded_between": finding.instances[0].between,
    }  # fmt: skip


def as_json(report: Report, model: str) -> dict[str, Any]:
    """Return all results as JSON types."""
    return {
        "schema": "refgemma-check/1",
        "candidate": report.candidate.source,
        "engine": report.candidate.engine,
        "model": model,
        "changed": report.changed,
        "dtype": report.candidate.dtype,
        "dtype_from": report.candidate.dtype_from,
        "shape": report.candidate.call.input_ids.shape,
        "verdict": report.verdict,
        "exit_code": EXIT[report.verdict],
        "first_divergence": report.first_wrong,
        "stages": [asdict(result) for result in report.preflight],
        "findings": [finding_json(f, report.config) for f in report.findings],
        "tensors": [{"tensor": i.tensor} | statistic_json(i) for i in report.instances],
        "missing": report.missing,
        "excluded": [v.name for v in report.excluded],
        "blind": [{"variant": v.name, "shows": v.shows} for v in report.undetectable],
        "unknown": report.candidate.unknown,
        "remarks": report.remarks,
        "again": [{"dtype": r.candidate.dtype, "verdict": r.verdict, "said": _headline(r)} for r in report.again],
        "override": report.override,
        "drift": [{"tensor": name, "relative": x} for name, x in report.drift],
    }


def card(report: Report, model: str, files: Mapping[str, Path], version: str) -> str:
    """Return a verification card as JSON: the verdict, the hashes of the files, and the bugs that the check cannot see.

    Parameters
    ----------
    report : Report
        The result of the check.
    model : str
        The name of the model.
    files : mapping
        The path of each file, by its role: ``candidate``, ``model/config.json`` ...
    version : str
        The version of refgemma.
    """
    versions = {"python": platform.python_version(), "numpy": np.__version__, "refgemma": version}
    about = as_json(report, model)
    kept = (
        "candidate", "engine", "model", "changed", "dtype", "dtype_from", "shape", "verdict", "exit_code",
        "first_divergence", "override", "remarks",
    )  # fmt: skip
    content = {key: about[key] for key in kept} | {
        "schema": "refgemma-card/1",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
        "metadata": {key: x for key, x in sorted(report.candidate.metadata.items()) if len(x) <= WIDTH},
        "files": {
            role: {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
            for role, path in files.items()
        },
        "known_bugs": sorted({finding.named for finding in report.findings}),
        "tensors_judged": len(report.instances),
        "tensors_missing": list(report.missing),
        "known_bugs_excluded": [v.name for v in report.excluded],
        "known_bugs_not_detectable": {v.name: v.shows for v in report.undetectable},
    }
    return write_json(content) + "\n"


def junit(report: Report, model: str) -> str:
    """Return JUnit XML with a test case for each tensor, each compared weight or row of tokens, and the verdict.

    The last case is the verdict, so that a noisy or inconclusive run without a wrong tensor fails too.
    """
    absent = [*report.missing, *(p.name for p in report.preflight if p.verdict == MISSING)]
    suite = ElementTree.Element("testsuite", name=escape(f"refgemma check {label(report, model)}"))
    for p in report.preflight:
        if p.verdict != MISSING:
            case = ElementTree.SubElement(suite, "testcase", classname="preflight", name=escape(p.name))
            if p.verdict in BAD:
                said = escape(f"{p.named}: {p.note}".strip(": "))
                ElementTree.SubElement(case, "failure", type=p.verdict, message=said)
    named = {i.tensor: f.named for f in report.findings for i in f.instances}
    for i in report.instances:
        case = ElementTree.SubElement(suite, "testcase", classname=field_of(i.tensor), name=i.tensor)
        if i.judged.verdict in BAD:
            said = i.judged.note or f"{describe_statistics(i.judged.statistics)}: {named.get(i.tensor)}"
            ElementTree.SubElement(case, "failure", type=i.judged.verdict, message=escape(said))
    for name in map(escape, absent):
        case = ElementTree.SubElement(suite, "testcase", classname=field_of(name), name=name)
        ElementTree.SubElement(case, "skipped", message="not recorded")
    case = ElementTree.SubElement(suite, "testcase", classname="check", name="verdict")
    if report.verdict != CONFORMS and suite.find("testcase/failure") is None:
        ElementTree.SubElement(case, "failure", type=report.verdict, message=escape(first_lines(report)[0]))
    suite.set("tests", str(len(suite)))
    for count, tag in (("failures", "failure"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{tag}"))))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _as_code(text: str) -> str:
    """Return `text` formatted as code, so that GitHub does not interpret links, mentions or markup in it."""
    shown = escape(text).replace("`", "'").replace("|", "\N{BROKEN BAR}")
    return f"`{shown}`"


def _as_block(lines: Iterable[str]) -> list[str]:
    return ["```text", *(part.replace("`", "'") for line in lines for part in wrap(line)), "```", ""]


def markdown(report: Report, model: str) -> str:
    """Return a comment for a pull request; names and texts from the trace are formatted as code."""
    rows = [
        f"| {_as_code(f.field)} | {f.worst.judged.verdict} | {len(f.instances)} of {f.total} | "
        f"{largest_error(f.worst.judged.statistics)} | {typical_error(f.worst.judged.statistics)} | "
        f"{_as_code(cause(report, f))} |"
        for f in report.findings
    ]
    table = [
        "| tensor | verdict | layers | largest error | typical error | explained by |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    unseen = "; ".join(line.strip() for line in alike_lines(report))
    return "\n".join([
        f"### refgemma check against {_as_code(label(report, model))}: {report.verdict}", "",
        *_as_block(first_lines(report)),
        *([*table, "", f"{UNITS}.", ""] if rows else []),
        f"{count_verdicts(report)}.", "",
        f"Known bugs: {count_bugs(report)}{f': {unseen}' if unseen else ''}.",
        *(["", *_as_block(report.remarks)] if report.remarks else [""]),
    ])  # fmt: skip
