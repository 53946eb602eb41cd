"""Write the results of a check for a terminal, a program, a browser, a pull request and a test runner.

Checked in the tests: all five have the same verdict, and the JSON has every field of its schema.
"""

import html
import itertools
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any
from xml.etree import ElementTree

import numpy as np

from refgemma.files import escape, hash_file, write_json
from refgemma.oracle.diagnose import Finding, Report
from refgemma.oracle.engine import Instance
from refgemma.oracle.estimate import Estimate
from refgemma.oracle.judge import EDGES, Statistics
from refgemma.oracle.known_bugs import KnownBug
from refgemma.oracle.locate import ErrorMap
from refgemma.oracle.preflight import Preflight
from refgemma.oracle.verdicts import BAD, BLIND, CONFORMS, EXACT, EXIT, INCONCLUSIVE, MISSING, NOISY, NOISY_ONLY
from refgemma.precision import Array
from refgemma.trace.names import FIELDS, LAYER_FIELDS, field_of, layer_of

LINES = 30
WIDTH = 118


def number(x: float) -> str:
    """Return a number as text with three digits, or the name of infinity or NaN.

    Examples
    --------
    >>> number(1234.5), number(0.25), number(float("inf"))
    ('1.23e+03', '0.25', 'inf')
    """
    return f"{x:.3g}"


def short(names: Iterable[str], most: int = 8) -> str:
    """Return a list of the first names, and how many more there are.

    Examples
    --------
    >>> short("abc", most=2)
    'a, b and 1 more'
    """
    listed = list(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def cut(line: str) -> str:
    """Return a line cut to the maximum width; escape control characters."""
    line = escape(line)
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def estimate_text(e: Estimate) -> str:
    """Return an estimate as a sentence."""
    spread = f" +- {e.uncertainty:.1g}" if e.uncertainty else ""
    near = f", which is {e.near}" if e.near else ""
    fit = "" if e.fits else "; this explains only part of the error"
    return f"{e.parameter} seems to be {e.value:.6g}{spread} instead of {e.expected:.6g}{near}{fit}"


def finding_row(finding: Finding) -> str:
    """Return a finding's line in the table."""
    s, verdict = finding.worst.judged.statistics, finding.worst.judged.verdict
    layers = f"{len(finding.instances)} of {finding.total}"
    error = number(s.error_over_bound) if s.error_over_bound else "-"  # a measured tolerance has no bound
    return f"{finding.field:28s} {verdict:8s}{layers:>9s} {error:>11s} {number(s.rms):>10s} {s.exact:>7.3f}"


def preflight_lines(report: Report) -> list[str]:
    """Return the problems of weights and tokens, one line per known bug."""
    groups: dict[tuple[str, str], list[Preflight]] = {}
    for stage in report.preflight:
        if stage.verdict != EXACT:
            groups.setdefault((stage.verdict, stage.named), []).append(stage)
    lines = []
    for (verdict, named), stages in list(groups.items())[:5]:
        notes = {stage.note for stage in stages if stage.note}
        note = f": {notes.pop()}" if len(notes) == 1 else ""
        lines.append(f"{verdict} {short([s.name for s in stages], 3)}: {named or verdict.lower()}{note}")
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
        said = {
            CONFORMS: "CONFORMS: rounding explains every recorded tensor",
            NOISY_ONLY: _why_noisy(report)
            + ": "
            + short([i.tensor for i in report.instances if i.judged.verdict == NOISY] or ["weights"]),
            INCONCLUSIVE: "INCONCLUSIVE: " + why_inconclusive(report),
        }
        return [said[report.verdict]]
    finding = report.findings[0]
    more = [f"  as if computed in {other.candidate.dtype}: {_headline(other)}" for other in report.again]
    first, word = finding.instances[0], "NOISY" if report.verdict == NOISY_ONLY else "DIFFERS"
    lines = [f"{word} first at {first.tensor}: {finding.named}", *more]
    if more:
        lines.append("    give the candidate's arithmetic with --dtype")
    if first.judged.note:
        lines.append(f"  {first.judged.note}")
    for v in finding.explanations[:3]:
        lines.append(f"  {v.name}: {v.says}")
        lines.append(f"    seen in {v.seen}; look at: {v.knob}")
    if not finding.explanations and not any(e.fits for e in finding.estimates) and not first.judged.note:
        lines.append("  no known bug explains it; --repro FILE writes its inputs and result to a file")
    if finding.closest:
        bug, left = finding.closest
        lines.append(f"  closest: {bug.name} ({bug.says}), but {_as_part(left)} of the error remains")
    lines += [f"  {estimate_text(e)}" for e in finding.estimates]
    if finding.where:
        lines.append(f"  {finding.where}")
    if first.between:
        lines.append(
            f"  this tensor was computed from {short(first.sources) or 'the tokens'}; to find the operation, record "
            "also"
        )
        lines.append(f"    {short(_to_record(first), 5)}")
    return lines


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


def _why_noisy(report: Report) -> str:
    quantised = [i.judged.note for i in report.instances if i.judged.verdict == NOISY and i.judged.note]
    return f"NOISY: {quantised[0]}, as from quantisation" if quantised else (
        "NOISY: inside the error bounds, but noisier than the declared arithmetic"
    )  # fmt: skip


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
        return f"no element could be compared in {short(blind)}"
    if report.logits_missing:
        return (
            f"rounding explains all recorded tensors, but {report.logits_missing} logits of the last token are missing"
        )
    if any(stage.verdict == MISSING for stage in report.preflight):
        return "some weights are missing"
    return "logits are missing, so the comparison is incomplete"


def text(report: Report, model: str) -> str:
    """Return the report for a terminal, at most `LINES` lines."""
    call, candidate = report.candidate.call, report.candidate
    counts = Counter(i.judged.verdict for i in report.instances)
    asked = "x".join(str(n) for n in call.input_ids.shape)
    against = f"{candidate.source} against {label(report, model)}"
    lines = [
        f"{against}: {len(report.instances)} tensors of {asked} tokens in {candidate.dtype}",
        "",
        *first_lines(report),
        "",
    ]
    if report.findings:
        lines.append(
            f"{'tensor':28s} {'verdict':8s}{'layers':>9s} {'error/bound':>11s} {'rms/sigma':>10s} {'exact':>7s}"
        )
        room = LINES - len(lines) - 7
        for finding in report.findings[: max(1, room)]:
            named = "" if finding is report.findings[0] else f"  {finding.named}"
            lines.append(finding_row(finding) + named)
        if len(report.findings) > room:
            lines.append(f"and {len(report.findings) - room} other tensors")
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    lines.append(f"excluded: {len(report.excluded)} of {report.asked} known bugs")
    if report.undetectable:
        names = short([v.name for v in report.undetectable], 5)
        lines.append(f"this trace cannot show {len(report.undetectable)} known bugs (--json lists all): {names}")
    if report.missing:
        lines.append(f"not recorded: {len(report.missing)} tensors, {short(report.missing, 3)}")
    kept = [cut(line) for line in (*lines, *(f"remark: {r}" for r in report.remarks))]
    said = f"[{report.changed}] " if report.changed else ""
    return "\n".join(cut(said + line) if line else "" for line in kept[:LINES])


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


def finding_json(finding: Finding) -> dict[str, Any]:
    """Return one finding as JSON types."""
    return {
        "tensor": finding.instances[0].tensor,
        "field": finding.field,
        "layers": [layer for i in finding.instances if (layer := layer_of(i.tensor)) is not None],
        "recorded": finding.total,
        "statistic": statistic_json(finding.worst),
        "named": finding.named,
        "explanations": [known_bug_json(v) for v in finding.explanations],
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
        "findings": [finding_json(f) for f in report.findings],
        "tensors": [{"tensor": i.tensor} | statistic_json(i) for i in report.instances],
        "missing": report.missing,
        "excluded": [v.name for v in report.excluded],
        "blind": [{"variant": v.name, "shows": v.shows} for v in report.undetectable],
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
            said = i.judged.note or f"{_describe_error(i.judged.statistics)}: {named.get(i.tensor)}"
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
    return ["```text", *(escape(line).replace("`", "'") for line in lines), "```", ""]


def markdown(report: Report, model: str) -> str:
    """Return a comment for a pull request; names and texts from the trace are formatted as code."""
    rows = [
        f"| {_as_code(f.field)} | {f.worst.judged.verdict} | {len(f.instances)} of {f.total} | "
        f"{number(f.worst.judged.statistics.error_over_bound)} | {number(f.worst.judged.statistics.rms)} | "
        f"{_as_code(f.named)} |"
        for f in report.findings
    ]
    table = [
        "| tensor | verdict | layers | error/bound | rms/sigma | explained by |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    counts = Counter(i.judged.verdict for i in report.instances)
    return "\n".join([
        f"### refgemma check against {_as_code(label(report, model))}: {report.verdict}", "",
        *_as_block(first_lines(report)),
        *(table if rows else []), *([""] if rows else []),
        ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) + ".",
        "",
        f"Excluded {len(report.excluded)} of {report.asked} known bugs. "
        f"Not shown by this trace: {', '.join(v.name for v in report.undetectable) or 'none'}.",
        *(["", *_as_block(report.remarks)] if report.remarks else [""]),
    ])  # fmt: skip


# --- a page -----------------------------------------------------------------------------------------------------------

# Lower limits of a map's colours in standard deviations: rounding, then ten times more for each colour.
LEVELS = ((0.0, "#7fc98f"), (4.0, "#f0c419"), (10.0, "#f4a300"), (100.0, "#e8743b"), (1e3, "#d62828"), (1e4, "#7f1d1d"))
CELLS = 64  # maximum number of a map's cells in each direction
MAPS = 6  # maximum number of findings shown as maps


def page(report: Report, model: str) -> str:
    """Return the report as an HTML page that needs no network."""
    page = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    return page.substitute(
        verdict=html.escape(report.verdict), text=html.escape(text(report, model)), strip=_strip(report),
        drift=_drift(report), worst=_worst(report), histogram=_histogram(report), maps=_maps(report),
    )  # fmt: skip


def _describe_error(s: Statistics) -> str:
    return f"error {number(s.error_over_bound)} x bound, rms {number(s.rms)} sigma"


def _strip(report: Report) -> str:
    by_name = {i.tensor: i for i in report.instances}
    count = report.config.num_hidden_layers
    rows = ["<tr><th>tensor</th>" + "".join(f"<th>{n}</th>" for n in range(count)) + "</tr>"]
    for kind in FIELDS:
        names = [f"layers.{n}.{kind}" for n in range(count)] if kind in LAYER_FIELDS else [kind]
        cells = "".join(_cell(by_name.get(name), name) for name in names)
        rows.append(f"<tr><th>{kind}</th>{cells}</tr>")
    return "".join(rows)


def _cell(instance: Instance | None, name: str) -> str:
    if instance is None:
        return f'<td title="{html.escape(name)}: not recorded" class="{MISSING}"></td>'
    s, verdict = instance.judged.statistics, instance.judged.verdict
    title = f"{name}: {verdict}, {_describe_error(s)}, exact {s.exact:.3f}"
    rms = f"{s.rms:.1f}" if 0 < s.rms < 100 else f"{s.rms:.0e}" if s.rms else verdict[0]
    return f'<td title="{html.escape(title)}" class="{verdict}">{rms}</td>'


def _drift(report: Report) -> str:
    points = [(name, x) for name, x in report.drift if np.isfinite(x) and x > 0]
    if not points:
        return "<p>The residual stream was not recorded, or does not differ.</p>"
    logs = np.log10([x for _, x in points])
    low, high = np.floor(logs.min()), np.ceil(logs.max() + 1e-9)
    step = 640 / max(1, len(points) - 1)
    y = 180 - 160 * (logs - low) / max(1.0, high - low)
    path = " ".join(f"{40 + n * step:.1f},{v:.1f}" for n, v in enumerate(y))
    dots = "".join(
        f'<circle cx="{40 + n * step:.1f}" cy="{v:.1f}" r="3" fill="#1769aa">'
        f"<title>{html.escape(name)}: {x:.3g}</title></circle>"
        for n, (v, (name, x)) in enumerate(zip(y, points, strict=True))
    )
    return (
        f'<svg viewBox="0 0 720 200" role="img" aria-label="drift"><polyline points="{path}" fill="none" '
        f'stroke="#1769aa"/>{dots}<text x="0" y="24">1e{high:.0f}</text><text x="0" y="184">1e{low:.0f}</text></svg>'
    )


def _worst(report: Report) -> str:
    ratios = np.array([i.judged.statistics.error_over_bound for i in report.instances])
    logs = np.log10(np.maximum(ratios[np.isfinite(ratios)], 1e-6))
    counts, edges = np.histogram(np.clip(logs, -6, 8), bins=28, range=(-6, 8))
    titles = [f"1e{edge:.1f}: {count} tensors" for edge, count in zip(edges, counts, strict=False)]
    colours = ["#d62828" if edge >= 0 else "#2a9d4b" for edge in edges]
    ticks = {n: f"1e{edges[n]:.0f}" for n in range(0, 29, 4)}
    return _bar_chart("largest errors", counts / max(1, counts.max()), titles, colours, ticks)


def _histogram(report: Report) -> str:
    """Return a chart of the shares of elements between the edges, with the normal distribution for comparison."""
    count_errors = [s.histogram for i in report.instances if (s := i.judged.statistics).histogram]
    counts = np.sum(count_errors, axis=0) if count_errors else np.zeros(len(EDGES) - 1)
    share = counts / max(1, counts.sum())
    normal = np.diff([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in EDGES])
    top = max(share.max(), normal.max())
    titles = [
        f"{low:g} to {high:g}: {count} elements" for low, high, count in zip(EDGES, EDGES[1:], counts, strict=False)
    ]
    ticks = {n: f"{EDGES[n]:g}" for n in range(0, len(EDGES), 8)}
    return _bar_chart("errors", share / top, titles, ["#1769aa"] * len(share), ticks, normal / top)


def _bar_chart(
    label: str, bars: Array, titles: Sequence[str], colours: Sequence[str], ticks: Mapping[int, str],
    curve: Array | None = None,
) -> str:  # fmt: skip
    """Return a chart of bars with heights up to 1, labels below some edges, and an optional curve."""
    width = 672 / len(bars)
    parts = [
        f'<rect x="{40 + width * n:.1f}" y="{170 - 150 * bar:.1f}" width="{width - 1:.1f}" height="{150 * bar:.1f}" '
        f'fill="{colour}"><title>{title}</title></rect>'
        for n, (bar, title, colour) in enumerate(zip(bars, titles, colours, strict=False))
    ]
    if curve is not None:
        points = " ".join(f"{40 + width * (n + 0.5):.1f},{170 - 150 * y:.1f}" for n, y in enumerate(curve))
        parts.append(f'<polyline points="{points}" fill="none" stroke="#d62828" stroke-width="2"/>')
    parts += [f'<text x="{36 + width * n:.1f}" y="188">{said}</text>' for n, said in ticks.items()]
    return f'<svg viewBox="0 0 740 200" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _maps(report: Report) -> str:
    """Return maps of the errors of the first findings."""
    figures = [
        f"<figure><figcaption>{html.escape(finding.instances[0].tensor)}: largest error in standard deviations, "
        f"{m.rows} down, {m.columns} across</figcaption>{_map(m)}</figure>"
        for finding in report.findings[:MAPS]
        for m in finding.maps
    ]
    keys = ", ".join(
        f'<span style="background:{colour};color:#000;padding:0 .4rem">from {least:g}</span>'
        for least, colour in LEVELS
    )
    return f"<p>Standard deviations: {keys}. White cells were not compared.</p>{''.join(figures)}" if figures else ""


def _map(m: ErrorMap) -> str:
    """Return one map as SVG; adjacent cells of the same colour form one rectangle."""
    numbers, (down, across) = pool_blocks(m.numbers, CELLS)
    size = 10
    parts = []
    for y, row in enumerate(numbers):
        levels = [-1 if np.isnan(x) else sum(bool(x >= least) for least, _ in LEVELS) - 1 for x in row]
        x = 0
        for level, cells in itertools.groupby(levels):
            width = len(list(cells))
            if level >= 0:
                parts.append(f'<rect x="{30 + size * x}" y="{size * y}" width="{size * width}" height="{size}" '
                             f'fill="{LEVELS[level][1]}"/>')  # fmt: skip
            x += width
    high, wide = (size * n for n in numbers.shape)
    ticks = (
        f'<text x="30" y="{high + 14}">0</text><text x="{10 + wide}" y="{high + 14}">{m.numbers.shape[1] - 1}</text>'
        f'<text x="0" y="{size}">0</text><text x="0" y="{high}">{m.numbers.shape[0] - 1}</text>'
    )
    cell = "" if (down, across) == (1, 1) else f"<p>Each cell shows the largest of {down} x {across} elements.</p>"
    label = f"{m.rows} by {m.columns}"
    return (
        f'<svg viewBox="0 0 {60 + wide} {high + 20}" width="{60 + wide}" role="img" aria-label="{label}">'
        f"{''.join(parts)}{ticks}</svg>{cell}"
    )


def pool_blocks(numbers: Array, most: int) -> tuple[Array, tuple[int, int]]:
    """Divide into at most `most` blocks in each direction; return each block's maximum, ignoring NaN, and the block
    size.

    Examples
    --------
    >>> pool_blocks(np.array([[1.0, 5, 2], [np.nan, 0, 9]]), 2)
    (array([[5., 2.],
           [0., 9.]]), (1, 2))
    """
    blocks = tuple(-(-n // most) for n in numbers.shape)
    padding = [(0, -n % block) for n, block in zip(numbers.shape, blocks, strict=True)]
    padded = np.pad(numbers, padding, constant_values=np.nan)
    shape = (padded.shape[0] // blocks[0], blocks[0], padded.shape[1] // blocks[1], blocks[1])
    return np.fmax.reduce(padded.reshape(shape), axis=(1, 3)), (blocks[0], blocks[1])
