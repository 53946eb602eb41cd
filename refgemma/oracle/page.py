"""Write the results of a check as an HTML page that needs no network and no script.

Checked in the tests: the page has the numbers of the JSON; axe-core finds no serious fault in light or dark colours.

The verdict is first. Then follow the first difference with its picture, advice, the other differences, the known bugs
that the trace rules out, and the sizes of all errors.
"""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np

from refgemma.files import escape, pluralise
from refgemma.oracle.diagnose import Finding, Report
from refgemma.oracle.engine import Instance
from refgemma.oracle.judge import EDGES, Statistics
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug
from refgemma.oracle.locate import BOTH, EXTRA, MISSED, Element, ErrorMap, Seen, Sides
from refgemma.oracle.report import (
    bug_counts,
    cause,
    changed_keys,
    count_bugs,
    count_verdicts,
    describe_statistics,
    factor,
    finding_lines,
    label,
    largest_error,
    other_precisions,
    percent,
    preflight_lines,
    recorded_lines,
    shown_value,
    text,
    typical_error,
    unexplained_lines,
    where_to_look,
    why,
)
from refgemma.oracle.verdicts import BLIND, CONFORMS, DIFFERS, GOOD, INCONCLUSIVE, INVALID, MISSING, NOISY_ONLY, UNKNOWN
from refgemma.precision import Array
from refgemma.trace.names import field_of, layer_of, list_names

# Lower limits of a map's colours in standard deviations: rounding, then ten times more for each colour.
LEVELS = (0.0, 4.0, 10.0, 100.0, 1e3, 1e4)
EXACTLY = 1e15  # errors in units of rounding beyond this belong to elements that must be exact
CELLS = 64  # maximum number of a map's cells in each direction
VERDICT_WORDS = {
    DIFFERS: "\N{BALLOT X} differs", CONFORMS: "\N{CHECK MARK} conforms", NOISY_ONLY: "\N{ALMOST EQUAL TO} noisy",
    INCONCLUSIVE: "? inconclusive",
}  # fmt: skip
AXIS_WORDS = {
    "batch": "text", "kv_heads": "key head", "heads": "head", "seq": "position", "keys": "key", "vocab": "token id",
    "out": "row",
}  # fmt: skip
# The operation of each field, for readers who do not know refgemma's names.
FORMULAS = {
    "cos": "cosines of position * frequency", "sin": "sines of position * frequency",
    "embedded": "rows of the embedding * sqrt(hidden_size)",
    "attention.q": "input_layernorm @ q_proj.T, in heads", "attention.k": "input_layernorm @ k_proj.T, in heads",
    "attention.v": "input_layernorm @ v_proj.T, in heads", "attention.q_rot": "rotation of q by cos and sin",
    "attention.k_rot": "rotation of k by cos and sin",
    "attention.scores": "q_rot @ k_rot.T / sqrt(query_pre_attn_scalar)",
    "attention.capped": "cap * tanh(scores / cap), cap = attn_logit_softcapping",
    "attention.probs": "softmax of capped, over the keys that the mask shows",
    "attention.mixed": "probs @ v, heads joined",
    "attention.out": "mixed @ o_proj.T", "middle": "input of the layer + post_attention_layernorm",
    "feed_forward.gate": "pre_feedforward_layernorm @ gate_proj.T",
    "feed_forward.up": "pre_feedforward_layernorm @ up_proj.T", "feed_forward.gelu": "gelu_pytorch_tanh(gate)",
    "feed_forward.product": "gelu * up", "feed_forward.out": "product @ down_proj.T",
    "out": "middle + post_feedforward_layernorm", "raw_logits": "norm @ embed_tokens.T",
    "logits": "cap * tanh(raw_logits / cap), cap = final_logit_softcapping", "logprobs": "log_softmax of logits",
}  # fmt: skip
NORM_FORMULA = "x / sqrt(mean(x * x) + rms_norm_eps) * (1 + weight)"


def _to_html(words: str) -> str:
    """Return words for a page: no tags, and no character that a terminal or XML would interpret."""
    return html.escape(escape(words))


def render_report(report: Report, model: str) -> str:
    """Return the report as an HTML page that needs no network."""
    page = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    return page.substitute(
        verdict=_to_html(report.verdict), headline=_banner(report, model), first=_first(report),
        strip=_strip(report), others=_others(report), coverage=_coverage(report), drift=_drift(report),
        worst=_worst(report), histogram=_histogram(report), text=html.escape(text(report, model)),
    )  # fmt: skip


# --- the verdict ------------------------------------------------------------------------------------------------------


def _banner(report: Report, model: str) -> str:
    """Return the verdict in words, with the model, the trace and the arithmetic."""
    call = report.candidate.call
    asked = "x".join(str(n) for n in call.input_ids.shape)
    facts = {
        "trace": report.candidate.source, "engine": report.candidate.engine, "model": label(report, model),
        "tokens": asked, "arithmetic": report.candidate.dtype, "tensors": count_verdicts(report),
    }  # fmt: skip
    listed = "".join(f"<div><dt>{key}</dt><dd>{_to_html(x)}</dd></div>" for key, x in facts.items() if x)
    title, more = (_to_html(said) for said in _put_in_words(report))
    word = VERDICT_WORDS[report.verdict]
    return (
        f'<header class="{report.verdict}"><p class="word">{word}</p><h1>{title}</h1><p>{more}</p>'
        f"</header><dl>{listed}</dl>"
    )


def _put_in_words(report: Report) -> tuple[str, str]:
    """Return the verdict as a title and a sentence."""
    if report.wrong_preflight:
        wrong = report.wrong_preflight[0]
        what = "The tokens differ" if wrong.name == "input_ids" else "The weights differ"
        says = next((v.says for v in KNOWN_BUGS if v.name == wrong.named), wrong.note)
        named = "" if wrong.named == UNKNOWN else f". Known bug: {wrong.named}"
        return f"{what}: {says}", f"First at {wrong.name}{f': {wrong.note}' if wrong.note else ''}{named}."
    if not report.findings:
        return {
            CONFORMS: ("Rounding explains every recorded tensor", f"Known bugs: {count_bugs(report)}."),
            NOISY_ONLY: ("The same model, with more rounding than declared", f"{_sentence(why(report))}."),
            INCONCLUSIVE: ("Too little was recorded for a verdict", f"{_sentence(why(report))}."),
        }[report.verdict]
    finding = report.findings[0]
    first, bugs = finding.instances[0], finding.explanations
    before = list(itertools.takewhile(lambda i: i.tensor != first.tensor, report.instances))
    good = all(i.judged.verdict in (*GOOD, BLIND) for i in before)
    place = f"First wrong tensor: {first.tensor}"
    if layer_of(first.tensor) is not None:
        place += (
            f" ({finding.field} is wrong in {len(finding.instances)} of {pluralise(finding.total, 'recorded layer')})"
        )
    so_far = f"; rounding explains the {pluralise(len(before), 'tensor')} before it" if good and before else ""
    if len(bugs) == 1:
        return _sentence(bugs[0].says), f"{place}{so_far}. Known bug: {bugs[0].name}, seen in {bugs[0].seen}."
    if bugs:
        return f"One of {len(bugs)} known bugs", f"{place}{so_far}. The known bugs are {finding.named}."
    return _sentence(_describe_unexplained(report, finding)), f"{place}{so_far}."


def _describe_unexplained(report: Report, finding: Finding) -> str:
    first = finding.instances[0]
    if first.tensor in report.candidate.refused or first.judged.verdict == INVALID:
        return f"{first.tensor} {first.judged.note}" if first.tensor in report.candidate.refused else (
            f"{first.tensor}: {first.judged.note}"
        )  # fmt: skip
    fitting = [line for line in unexplained_lines(finding, report.config) if " seems to be " in line]
    return fitting[0] if any(e.fits for e in finding.estimates) and fitting else (
        f"{first.tensor} is wrong, and no known bug explains it"
    )  # fmt: skip


def _sentence(said: str) -> str:
    """Return a text that begins with a capital letter, unless it begins with a name of code.

    Examples
    --------
    >>> _sentence("one key more"), _sentence("layers.0.out is wrong"), _sentence("rms_norm_eps seems to be 1")
    ('One key more', 'layers.0.out is wrong', 'rms_norm_eps seems to be 1')
    """
    return said[:1].upper() + said[1:] if said.partition(" ")[0].isalpha() else said


# --- the first difference ---------------------------------------------------------------------------------------------


def _first(report: Report) -> str:
    """Return the section of the first difference: pictures, the operation, values, and what to do."""
    lines = [f"<li>{_to_html(line)}</li>" for line in preflight_lines(report)]
    stages = f"<h2>Weights and tokens</h2><ul>{''.join(lines)}</ul>" if lines else ""
    if not report.findings:
        return stages
    finding = report.findings[0]
    first, sides = finding.instances[0], finding.sides
    parts = [stages, f"<h2>The first difference: <code>{_to_html(first.tensor)}</code></h2>"]
    if sides:
        parts += [f'<div class="pictures">{"".join(_pictures(finding, sides))}</div>']
    parts += [_operation(report, finding), _values(finding), _advice(report, finding)]
    return "".join(parts)


def _pictures(finding: Finding, sides: Sides) -> Iterable[str]:
    """Yield the pictures of the first difference; the one that tells most is first."""
    if sides.seen:
        yield _draw_seen(sides, sides.seen)
    values = (sides.candidate, sides.reference)
    finite = [x[np.isfinite(x)] for x in values]
    if sides.axes[-1] == "keys":
        top = max((float(np.abs(x).max()) for x in finite if x.size), default=0.0)
        for who, x in zip(("your port", "reference"), values, strict=True):
            yield _draw_values(sides, x, f"{_name(finding)}: {who}", top)
    if field_of(_name(finding)) != "attention.probs" and all(x.size > 1 for x in finite):
        yield _draw_scatter(sides)
    for m in finding.maps:
        yield _draw_errors(m, _name(finding))


def _name(finding: Finding) -> str:
    return finding.instances[0].tensor


def _axis(axes: Sequence[str], axis: int) -> str:
    """Return the name of an axis; the positions of a tensor with keys are queries."""
    return "query" if axes[axis] == "seq" and axes[-1] == "keys" else AXIS_WORDS.get(axes[axis], "column")


def _draw_seen(sides: Sides, seen: Seen) -> str:
    """Draw the keys that each query sees, in the port and in the reference."""
    states, (down, _) = pool_blocks(seen.states, CELLS)
    ends = seen.states.shape[0] - 1, seen.states.shape[1] - 1
    said = {
        EXTRA: ("extra", "seen only by your port: wrong"), MISSED: ("missed", "not seen by your port: wrong"),
        BOTH: ("both", "seen by both"),
    }  # fmt: skip
    legend = {style: words for state, (style, words) in said.items() if (states == state).any()}
    source = "from the recorded weights" if seen.recorded else "as the known bug has it"
    title = f"Keys that each query of layer {seen.layer} sees, {source}"
    classes = [[said[int(x)][0] if x else "" for x in row] for row in states]
    block = f" A square is {down} x {down} tokens." if down > 1 else ""
    return _draw_cells(classes, title + "." + block, ("key", "query"), (0, 0), ends, legend)


def _draw_values(sides: Sides, x: Array, title: str, top: float) -> str:
    """Draw values as cells; `top` is the largest absolute value of all compared pictures."""
    steps = np.round(6 * np.sqrt(np.abs(x) / top)) if top else np.zeros_like(x)
    steps = np.where(np.isfinite(x), steps, np.nan)
    classes = [
        ["odd" if np.isinf(v) else "" if np.isnan(n) or not n else f"{'m' if v < 0 else 'p'}{n:.0f}" for v, n in row]
        for row in np.stack([x, steps], axis=-1)
    ]
    down, across = sides.along
    fixed = _name_element(sides, [n for n in range(len(sides.axes)) if n not in sides.along], sides.corner)
    legend = {"p6": f"{top:.3g}", "p2": f"{top / 9:.2g}"} | ({"m6": f"-{top:.3g}"} if (x < 0).any() else {})
    legend |= {"odd": "not finite"} if np.isinf(x).any() else {}
    corner = (sides.corner[down] if down != across else 0, sides.corner[across])
    axes = (_axis(sides.axes, across), _axis(sides.axes, down))
    ends = corner[0] + x.shape[0] - 1, corner[1] + x.shape[1] - 1
    return _draw_cells(classes, f"{title}{f', {fixed}' if fixed else ''}", axes, corner, ends, legend)


def _draw_errors(m: ErrorMap, name: str) -> str:
    """Draw the largest errors along two axes."""
    numbers, (down, across) = pool_blocks(m.numbers, CELLS)
    ends = m.numbers.shape[0] - 1, m.numbers.shape[1] - 1
    classes = [
        ["" if np.isnan(x) else f"e{sum(bool(x >= least) for least in LEVELS) - 1}" for x in row] for row in numbers
    ]
    levels = [*(f"below {factor(least)}" for least in LEVELS[1:]), f"from {factor(LEVELS[-1])}"]
    legend = {f"e{n}": f"{said} x" for n, said in enumerate(levels)}
    block = "" if (down, across) == (1, 1) else f" A square shows the largest of {down} x {across} elements."
    title = f"{name}: largest error, in units of the usual rounding error.{block}"
    axes = (m.rows, m.columns)
    return _draw_cells(classes, title, (_axis(axes, 1), _axis(axes, 0)), (0, 0), ends, legend)


def _draw_cells(
    classes: Sequence[Sequence[str]], title: str, axes: tuple[str, str], corner: tuple[int, int],
    ends: tuple[int, int], legend: Mapping[str, str],
) -> str:  # fmt: skip
    """Draw a map with the titles of its axes, across and down, and the numbers of their ends, down and across.

    Adjacent cells of one class form one rectangle.
    """
    rows, columns = len(classes), len(classes[0])
    size = max(5, min(14, 300 // max(rows, columns)))
    left, bottom = 44, rows * size + 6
    shapes: dict[str, list[str]] = {}
    for y, row in enumerate(classes):
        x = 0
        for style, cells in itertools.groupby(row):
            width = len(list(cells))
            if style:
                shapes.setdefault(style, []).append(
                    f"M{left + size * x} {6 + size * y}h{size * width}v{size}h-{size * width}z"
                )
            x += width
    paths = "".join(f'<path class="{style}" d="{"".join(drawn)}"/>' for style, drawn in shapes.items())
    right = left + columns * size
    ticks = (
        f'<text x="{left}" y="{bottom + 14}">{corner[1]}</text>'
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end">{ends[1]}</text>'
        f'<text x="{left - 4}" y="17" text-anchor="end">{corner[0]}</text>'
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">{ends[0]}</text>'
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 14}" text-anchor="middle">{_to_html(axes[0])}</text>'
        f'<text transform="translate(12 {(6 + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{_to_html(axes[1])}</text>"
    )
    width, height = right + 6, bottom + 20
    keys = "".join(f'<li><i class="{style}"></i>{_to_html(said)}</li>' for style, said in legend.items())
    return (
        f'<figure><figcaption>{_to_html(title)}</figcaption><svg viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{_to_html(title)} Across: {_to_html(axes[0])}; down: {_to_html(axes[1])}">'
        f'<rect class="panel" x="{left}" y="6" width="{columns * size}" height="{rows * size}"/>{paths}{ticks}</svg>'
        f'<ul class="legend">{keys}</ul></figure>'
    )


def _draw_scatter(sides: Sides) -> str:
    """Draw the port's values against the reference's; a right port is on the diagonal."""
    y, x = sides.candidate.ravel(), sides.reference.ravel()
    usable = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    usable = usable[:: max(1, len(usable) // 600)]
    x, y = x[usable], y[usable]
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    span = high - low or 1.0
    px, py = 52 + 290 * (x - low) / span, 306 - 290 * (y - low) / span
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in zip(px, py, strict=True))
    title = "Each element of your port against the reference; a right port is on the dashed line"
    ticks = (
        f'<text x="52" y="322">{low:.3g}</text><text x="342" y="322" text-anchor="end">{high:.3g}</text>'
        f'<text x="48" y="306" text-anchor="end">{low:.3g}</text>'
        f'<text x="48" y="26" text-anchor="end">{high:.3g}</text>'
        '<text x="197" y="322" text-anchor="middle">reference</text>'
        '<text transform="translate(12 160) rotate(-90)" text-anchor="middle">your port</text>'
    )
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 350 328" width="350" role="img" '
        f'aria-label="{title}">'
        f'<rect class="panel" x="52" y="16" width="290" height="290"/><path class="guide" d="M52 306L342 16"/>'
        f'<g class="dots">{dots}</g>{ticks}</svg></figure>'
    )


def _operation(report: Report, finding: Finding) -> str:
    """Return the operation side by side: in the reference, and in the port as far as it is known."""
    first = finding.instances[0]
    kind = field_of(first.tensor)
    formula = FORMULAS.get(kind, NORM_FORMULA if kind.endswith("norm") else "")
    says = "; or ".join(v.says for v in finding.explanations) or "not known"
    rows = [("operation", formula, says)] if formula and not first.between else [("operations", "the model's", says)]
    for v in finding.explanations[:1]:
        rows += [
            (f"config key {key}", shown_value(expected, wrong)[0], shown_value(expected, wrong)[1])
            for key, (expected, wrong) in changed_keys(v, report.config).items()
        ]
    rows += [(e.parameter, f"{e.expected:.6g}", f"{e.value:.6g} (estimated)") for e in finding.estimates
             if all(e.parameter not in key for key, *_ in rows)]  # fmt: skip
    shapes = first.judged.note.partition("has shape ")[2].partition("; it must be ")
    if first.tensor in report.candidate.refused and shapes[2]:
        rows = [("shape", shapes[2], shapes[0])]
    body = [(key, _to_html(ours), _to_html(theirs)) for key, ours, theirs in rows]
    sources = list_names(first.sources)
    note = (
        f"<p>Both sides start from your port's own {_to_html(sources)}.</p>" if first.sources and finding.sides else ""
    )
    if first.between:
        count = pluralise(len(first.between), "tensor")
        note += f"<p>Not recorded, so the reference computes them: {count} in between.</p>"
    return _table("Side by side", ("item", "reference", "your port"), body) + note


def _values(finding: Finding) -> str:
    """Return a table of the elements with the largest errors: the port's and the reference's values."""
    sides, judged = finding.sides, finding.instances[0].judged
    if not sides:
        return ""
    bound = judged.statistics.error_over_bound
    said = [
        f"{_to_html(_sentence(judged.note))}." if judged.note else "",
        f"The tensor is off by {percent(sides.relative)} of its size." if math.isfinite(sides.relative) else "",
        f"The largest error is {factor(bound)} times what rounding can cause at most." if 0 < bound < math.inf else "",
    ]
    rows = [
        (
            _name_element(sides, range(len(sides.axes)), e.place), f"{e.candidate:.6g}", f"{e.reference:.6g}",
            f"{e.candidate - e.reference:.3g}", f"{e.candidate / e.reference:.6g}" if e.reference else "-",
            _describe_units(e),
        ) for e in sides.worst
    ]  # fmt: skip
    heads = ("place, counted from 0", "your port", "reference", "difference", "ratio", "error / usual rounding")
    where = f"<p>Wrong: {_to_html(finding.where)}.</p>" if finding.where else ""
    table = _table("Largest errors of different rows", heads, rows, numbers=True)
    return f"<p>{' '.join(filter(None, said))}</p>{where}{table}"


def _describe_units(e: Element) -> str:
    if not math.isfinite(e.candidate):
        return "not finite"
    return "must be exact" if e.units > EXACTLY else f"{factor(e.units)} x"


def _name_element(sides: Sides, axes: Iterable[int], place: Sequence[int]) -> str:
    return ", ".join(f"{_axis(sides.axes, n)} {place[n]}" for n in axes)


def _advice(report: Report, finding: Finding) -> str:
    """Return what to look at, and what to record or try next."""
    lines = [
        f"<li><b>{_to_html(v.name)}</b>: {_to_html(v.says)}. Seen in {_to_html(v.seen)}. "
        f"Look at: {_to_html(where_to_look(v, report.config, finding.estimates))}.</li>"
        for v in finding.explanations
    ]
    lines += [f"<li>{_to_html(_sentence(line))}.</li>" for line in unexplained_lines(finding, report.config)]
    rest = [*other_precisions(report), *(line for line in finding_lines(report) if line.startswith("  to find"))]
    lines += [f"<li>{_to_html(_sentence(line.strip()))}.</li>" for line in rest]
    return f"<h3>What to do</h3><ul>{''.join(lines)}</ul>" if lines else ""


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Return a table that scrolls by itself; the cells of `rows` are HTML, and the first of each row is its head."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    style = ' class="numbers"' if numbers else ""
    return (
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table{style}>'
        f"<caption>{caption}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- everything else --------------------------------------------------------------------------------------------------


def _strip(report: Report) -> str:
    """Return the rows of a table with a cell for each tensor."""
    kinds: dict[str, dict[int, Instance]] = {}
    for i in report.instances:
        kinds.setdefault(field_of(i.tensor), {})[layer_of(i.tensor) or 0] = i
    count = report.config.num_hidden_layers
    heads = "".join(f'<th scope="col">{n}</th>' for n in range(count))
    rows = [f'<thead><tr><th scope="col">tensor \\ layer</th>{heads}</tr></thead>']
    for kind, layers in kinds.items():
        alone = layer_of(layers[min(layers)].tensor) is None
        cells = "".join(_cell(layers.get(n)) for n in range(1 if alone else count))
        rows.append(f'<tr><th scope="row">{_to_html(kind)}</th>{cells}</tr>')
    return "".join(rows)


def _cell(instance: Instance | None) -> str:
    if instance is None:
        return f'<td title="not recorded" class="{MISSING}"></td>'
    s, verdict = instance.judged.statistics, instance.judged.verdict
    title = f"{instance.tensor}: {verdict}, {describe_statistics(s)}, exact {percent(s.exact)}"
    return f'<td title="{_to_html(title)}" class="{verdict}">{_compact(s, verdict)}</td>'


def _compact(s: Statistics, verdict: str) -> str:
    """Return the typical error in at most four characters.

    Examples
    --------
    >>> [_compact(Statistics(rms=x), "EXACT") for x in (0.0, 0.94, 41.7, 86700.0, 2e9)]
    ['E', '0.9', '42', '87k', '2e9']
    """
    if not s.rms or not math.isfinite(s.rms):
        return verdict[0]
    if s.rms >= 1e9:
        return f"{s.rms:.0e}".replace("+0", "").replace("+", "")
    for least, unit in ((1e6, "M"), (1e3, "k")):
        if s.rms >= least:
            return f"{s.rms / least:.0f}{unit}"
    return f"{s.rms:.1f}" if s.rms < 9.95 else f"{s.rms:.0f}"


def _others(report: Report) -> str:
    """Return the table of all findings, and the maps of those after the first."""
    if not report.findings:
        return ""
    rows = []
    for f in report.findings:
        s = f.worst.judged.statistics
        rows.append((
            f"<code>{_to_html(f.field)}</code>", f.worst.judged.verdict, f"{len(f.instances)} of {f.total}",
            largest_error(s), typical_error(s), percent(s.exact), _to_html(cause(report, f)),
        ))  # fmt: skip
    heads = ("tensor", "verdict", "layers", "largest error", "typical error", "exact", "explained by")
    maps = "".join(
        f"<details><summary>Where <code>{_to_html(_name(f))}</code> is wrong</summary>"
        f'<div class="pictures">{"".join(_draw_errors(m, _name(f)) for m in f.maps)}</div></details>'
        for f in report.findings[1:] if f.maps
    )  # fmt: skip
    return f"<h2>All wrong tensors</h2>{_table('Wrong tensors, in the order of execution', heads, rows)}{maps}"


def _coverage(report: Report) -> str:
    """Return the known bugs that the trace rules out and cannot show, unrecorded tensors, and remarks."""
    styles = {"ruled": "PASS", "explain": "FAIL", "look": "BLIND"}
    bar = "".join(
        f'<li class="{styles[said.partition(" ")[0].rstrip("s")]}"><b>{count}</b> {said}</li>'
        for count, said in bug_counts(report)
    )
    lists = [
        _details("Look like the correct model in this trace, with the inputs that show each", report.undetectable,
                 lambda v: f"{v.says}; shown by {v.shows}"),
        _details("Ruled out", report.excluded, lambda v: v.says),
    ]  # fmt: skip
    said = [*recorded_lines(report), *report.remarks]
    remarks = "".join(f"<li>{_to_html(_sentence(line))}</li>" for line in said)
    return f'<ul class="bar">{bar}</ul>{"".join(lists)}' + (f"<h3>Remarks</h3><ul>{remarks}</ul>" if remarks else "")


def _details(title: str, bugs: Sequence[KnownBug], describe: Callable[[KnownBug], str]) -> str:
    if not bugs:
        return ""
    items = "".join(f"<li><b>{_to_html(v.name)}</b>: {_to_html(describe(v))}</li>" for v in bugs)
    return f"<details><summary>{_to_html(title)}</summary><ul>{items}</ul></details>"


# --- charts -----------------------------------------------------------------------------------------------------------

LEFT, TOP, WIDE, HIGH = 56, 10, 412, 170  # the area of a chart's data, in pixels


def _drift(report: Report) -> str:
    """Return a chart of the residual stream's relative error along the model."""
    points = [(name, x) for name, x in report.drift if np.isfinite(x) and x > 0]
    if not points:
        return "<p>The residual stream was not recorded, or does not differ.</p>"
    logs = np.log10([x for _, x in points])
    low, high = np.floor(logs.min()), np.ceil(logs.max() + 1e-9)
    step = WIDE / max(1, len(points) - 1)
    y = TOP + HIGH - HIGH * (logs - low) / max(1.0, high - low)
    path = " ".join(f"{LEFT + n * step:.1f},{v:.1f}" for n, v in enumerate(y))
    dots = "".join(
        f'<circle cx="{LEFT + n * step:.1f}" cy="{v:.1f}" r="3"><title>{_to_html(name)}: {x:.3g}</title></circle>'
        for n, (v, (name, x)) in enumerate(zip(y, points, strict=True))
    )
    ticks = {0.0: points[0][0], 1.0: points[-1][0]} if len(points) > 1 else {0.5: points[0][0]}
    drawn = f'<polyline class="line" points="{path}"/><g class="dots">{dots}</g>'
    return _chart("Drift", drawn, ticks, {0.0: _power(low), 1.0: _power(high)}, "place in the model", "relative error")


def _power(exponent: float) -> str:
    """Return a power of ten as text.

    Examples
    --------
    >>> _power(-3), _power(0), _power(12)
    ('10⁻³', '1', '10¹²')
    """
    return "1" if not exponent else "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _worst(report: Report) -> str:
    """Return a chart of the largest errors of the tensors, in units of their bounds."""
    ratios = np.array([i.judged.statistics.error_over_bound for i in report.instances])
    ratios = np.where(np.isinf(ratios), 1e8, ratios)
    ratios = ratios[ratios > 0]
    if not len(ratios):
        return "<p>No tensor has a derived bound: their inputs were not recorded.</p>"
    counts, edges = np.histogram(np.clip(np.log10(ratios), -6, 7.9), bins=28, range=(-6, 8))
    titles = [
        f"from {10**edge:.2g} x bound: {pluralise(int(count), 'tensor')}"
        for edge, count in zip(edges, counts, strict=False)
    ]
    styles = ["wrong" if edge >= 0 else "right" for edge in edges]
    ticks = {n / 28: _power(edges[n]) for n in range(0, 29, 4)}
    bars = _bars(counts / counts.max(), titles, styles)
    return _chart(
        "Largest errors", bars, ticks, {0.0: "0", 1.0: str(counts.max())}, "largest error / error bound", "tensors"
    )


def _histogram(report: Report) -> str:
    """Return a chart of the shares of elements between the edges, with the normal distribution for comparison."""
    counted = [s.histogram for i in report.instances if (s := i.judged.statistics).histogram]
    counts = np.sum(counted, axis=0) if counted else np.zeros(len(EDGES) - 1)
    share = counts / max(1, counts.sum())
    normal = np.diff([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in EDGES])
    top = max(share.max(), normal.max())
    titles = [
        f"{low:g} to {high:g}: {pluralise(int(count), 'element')}"
        for low, high, count in zip(EDGES, EDGES[1:], counts, strict=False)
    ]
    bars = _bars(share / top, titles, ["plain"] * len(share))
    step = WIDE / len(share)
    points = " ".join(f"{LEFT + step * (n + 0.5):.1f},{TOP + HIGH * (1 - y):.1f}" for n, y in enumerate(normal / top))
    ticks = {n / (len(EDGES) - 1): f"{EDGES[n]:g}" for n in range(0, len(EDGES), 8)}
    curve = f'<polyline class="curve" points="{points}"/>'
    return _chart(
        "Errors", bars + curve, ticks, {0.0: "0", 1.0: f"{top:.0%}"}, "error / usual rounding error", "elements"
    )


def _bars(heights: Array, titles: Sequence[str], styles: Sequence[str]) -> str:
    step = WIDE / len(heights)
    return "".join(
        f'<rect class="{style}" x="{LEFT + step * n:.1f}" y="{TOP + HIGH * (1 - y):.1f}" width="{step - 1:.1f}" '
        f'height="{HIGH * y:.1f}"><title>{title}</title></rect>'
        for n, (y, title, style) in enumerate(zip(heights, titles, styles, strict=False))
    )


def _chart(
    name: str, drawn: str, across: Mapping[float, str], up: Mapping[float, str], title_x: str, title_y: str
) -> str:
    """Return a chart with its axes: labels at parts of their length, and titles."""
    bottom = TOP + HIGH
    ends = {0.0: "start", 1.0: "end"} if len(across) < 3 else {}
    labels = [
        f'<text x="{LEFT + WIDE * x:.0f}" y="{bottom + 16}" text-anchor="{ends.get(x, "middle")}">'
        f"{_to_html(said)}</text>"
        for x, said in across.items()
    ]
    labels += [
        f'<text x="{LEFT - 5}" y="{bottom - HIGH * y + 4:.0f}" text-anchor="end">{said}</text>'
        for y, said in up.items()
    ]
    labels += [
        f'<text x="{LEFT + WIDE / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{title_x}</text>',
        f'<text transform="translate(13 {TOP + HIGH / 2:.0f}) rotate(-90)" text-anchor="middle">{title_y}</text>',
    ]
    return (
        f'<svg viewBox="0 0 480 {bottom + 42}" width="480" role="img" aria-label="{name}: {title_y} by {title_x}">'
        f'<path class="axes" d="M{LEFT} {TOP}V{bottom}H{LEFT + WIDE}"/>{drawn}{"".join(labels)}</svg>'
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
    padded = np.pad(np.asarray(numbers, np.float64), padding, constant_values=np.nan)
    shape = (padded.shape[0] // blocks[0], blocks[0], padded.shape[1] // blocks[1], blocks[1])
    return np.fmax.reduce(padded.reshape(shape), axis=(1, 3)), (blocks[0], blocks[1])
