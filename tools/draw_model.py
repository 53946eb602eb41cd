"""Draw Gemma 2 as an SVG, with the sizes of a configuration; checked by tests that read the numbers back.

    python tools/draw_model.py           write docs/_static/model.svg and notebooks/pictures/*.svg

The drawing is light or dark, as the reader's system. It is legible at the width of a phone (358 pixels).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

import refgemma
from refgemma.config import Gemma2Config

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 400, 724
PANEL, BOX, BOX_WIDTH = 128, 184, 202  # left edge of the panel and of its boxes; width of the boxes
STREAM, TRUNK = 156, 60  # x of the residual stream, in a block and through the model

# Every part that can be highlighted.
PARTS = (
    "tokens", "embedding", "stream", "blocks", "norms", "heads", "rotary", "scores", "attention cap", "mask", "mix",
    "feed-forward", "head", "final cap", "logits", "sizes",
)  # fmt: skip

# Notebook -> the highlighted parts (all alike if empty), and the model whose sizes are shown.
NOTEBOOKS: dict[str, tuple[tuple[str, ...], str]] = {
    "01": ((), "tiny"),
    "02": (("heads", "scores", "mask", "mix"), "tiny"),
    "03": (("rotary",), "tiny"),
    "04": (("attention cap", "final cap"), "tiny"),
    "05": (("mask", "blocks"), "tiny"),
    "06": (("norms", "embedding", "stream"), "tiny"),
    "07": (("norms", "rotary", "mix"), "tiny"),  # these parts compute in float32 inside a bfloat16 model
    "08": (("logits", "final cap"), "tiny"),
    "09": ((), "tiny"),
    "10": (("sizes", "embedding", "heads", "feed-forward"), "9b"),
    "11": (("norms", "rotary", "attention cap", "mask", "mix"), "tiny"),
    "12": (("tokens",), "tiny"),
    "13": (("norms", "heads", "attention cap", "mask", "feed-forward", "final cap"), "tiny"),
    "14": (("stream", "heads", "mix", "head"), "tiny"),
    "15": (("attention cap", "final cap", "stream"), "tiny"),
    "16": (("norms",), "tiny"),
}

# Use of a colour -> the colour on light and on dark background.
COLOURS = {
    "paper": ("#ffffff", "#12161f"), "ink": ("#1b2130", "#eef1f6"), "soft": ("#566074", "#a7b1c2"),
    "edge": ("#c3cad6", "#414b5e"), "stream": ("#c2410c", "#fb923c"), "hidden": ("#d3daf0", "#27345a"),
    "norm": ("#0f766e", "#5eead4"), "norm-fill": ("#d9f2ee", "#123b38"),
    "attention": ("#1d4ed8", "#93b4ff"), "attention-fill": ("#e0e9ff", "#1b2c57"),
    "feed": ("#7e22ce", "#d8b4fe"), "feed-fill": ("#f1e4fd", "#3a2155"),
    "cap": ("#92400e", "#fcd34d"), "cap-fill": ("#fdecc8", "#46340c"),
    "table": ("#334155", "#cbd5e1"), "table-fill": ("#e8ecf2", "#27303f"), "lit": ("#e11d48", "#fb7185"),
}  # fmt: skip
DIM = 0.42  # share of its own colour that a part keeps if other parts are highlighted

RULES = """
text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--ink); }
.name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 12px; }
.title { font-size: 17px; font-weight: 650; } .soft { fill: var(--soft); } .strong { font-weight: 650; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.flow { stroke: var(--soft); stroke-width: 1.4; fill: none; } .tip { fill: var(--soft); }
.stream { stroke: var(--stream); stroke-width: 4; fill: none; } .plus { fill: var(--paper); stroke: var(--stream); }
.box, .plus { stroke-width: 1.4; } .lit .box { stroke: var(--lit); stroke-width: 2.6; }
.norm { fill: var(--norm-fill); stroke: var(--norm); } .feed { fill: var(--feed-fill); stroke: var(--feed); }
.attention { fill: var(--attention-fill); stroke: var(--attention); }
.cap { fill: var(--cap-fill); stroke: var(--cap); }
.table { fill: var(--table-fill); stroke: var(--table); } .panel { fill: none; stroke: var(--edge); stroke-width: 1.2; }
.curve { stroke: var(--cap); stroke-width: 1.8; fill: none; } .turn { stroke: var(--attention); fill: none; }
.seen, .turned { fill: var(--attention); } .hidden { fill: var(--hidden); } .paper { fill: var(--paper); }
.tied { stroke: var(--table); stroke-dasharray: 4 3; fill: none; stroke-width: 1.4; }
""".strip()


def mix(colour: str, paper: str) -> str:
    """Return a colour that keeps the share DIM of `colour` on `paper`."""
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(paper[1:]), strict=True)
    return "#" + bytes(round(DIM * c + (1 - DIM) * p) for c, p in pairs).hex()


def style() -> str:
    """Return the style sheet: light and dark, each also dimmed."""

    def variables(dark: int, dim: bool) -> str:
        paper = COLOURS["paper"][dark]
        pairs = ((name, pair[dark]) for name, pair in COLOURS.items())
        return " ".join(f"--{name}: {mix(colour, paper) if dim else colour};" for name, colour in pairs)

    light, dark = (f"svg {{ {variables(n, False)} }}\n.dim {{ {variables(n, True)} }}" for n in (0, 1))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{RULES}"


@dataclass
class Drawing:
    """The elements of a drawing, and the highlighted parts."""

    lit: frozenset[str]
    elements: list[str] = field(default_factory=list)

    def add(self, element: str) -> None:
        self.elements.append(element)

    def begin(self, part: str) -> None:
        """Begin the elements of one part; `end` ends them."""
        state = "" if not self.lit else " lit" if part in self.lit else " dim"
        self.add(f'<g class="part{state}" data-part="{part}">')

    def end(self) -> None:
        self.add("</g>")

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.add(f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, style: str, text: str = "", font: str = "") -> None:
        self.add(f'<rect class="box {style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 4.5, text, f"middle {font}")

    def path(self, points: str, style: str) -> None:
        self.add(f'<path class="{style}" d="{points}"/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Draw an arrow down or to one side."""
        along, across = np.sign([to_x - x, to_y - y]) * 6.0, np.sign([to_y - y, to_x - x]) * 3.2
        base = np.array([to_x, to_y]) - along
        (ax, ay), (bx, by) = base + across, base - across
        self.path(f"M{x:g} {y:g}L{base[0]:g} {base[1]:g}", "flow")
        self.path(f"M{to_x:g} {to_y:g}L{ax:g} {ay:g}L{bx:g} {by:g}Z", "tip")

    def curve(self, x: float, y: float, size: float = 9) -> None:
        """Draw the curve of a soft cap around a point."""
        self.path(f"M{x - size:g} {y + 6:g}C{x:g} {y + 6:g} {x:g} {y - 6:g} {x + size:g} {y - 6:g}", "curve")


def draw(lit: Iterable[str] = (), model: str = "9b") -> str:
    """Return the drawing of a model's configuration (tiny, 2b, 9b or 27b); the parts in `lit` are highlighted."""
    for part in (picture := Drawing(frozenset(lit))).lit:
        if part not in PARTS:
            raise ValueError(f"{part!r} is not a part of the drawing; it has {', '.join(PARTS)}")
    config = load_config(model)
    draw_whole(picture, config)
    draw_block(picture, config)
    draw_sizes(picture, model)
    label = "the tiny model" if model == "tiny" else f"Gemma 2 {model.upper()}"
    shown = f" Highlighted: {', '.join(part for part in PARTS if part in picture.lit)}." if picture.lit else ""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">The architecture of Gemma 2, with the sizes of {label}</title>',
        f'<desc id="desc">{escape(describe(config) + shown)}</desc>',
        f"<style>{style()}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="paper"/>',
        f'<text class="title" x="14" y="25">{"A tiny Gemma 2" if model == "tiny" else label}</text>',
        *picture.elements,
        "</svg>\n",
    ])  # fmt: skip


def load_config(model: str) -> Gemma2Config:
    return refgemma.load("tiny").config if model == "tiny" else Gemma2Config.preset(model)


def describe(config: Gemma2Config) -> str:
    """Return a description for readers who cannot see the drawing."""
    c = config
    return (
        f"Each token id selects a row of an embedding table of {c.vocab_size:,} rows and {c.hidden_size:,} columns, "
        f"times the square root of {c.hidden_size:,}. This residual stream runs through {c.num_hidden_layers} blocks. "
        f"Blocks with a sliding window of {c.sliding_window:,} tokens and blocks with full attention alternate, a "
        f"sliding one first. A block adds to the stream twice. First: norm, {c.num_attention_heads} query heads that "
        f"share {c.num_key_value_heads} key/value heads of {c.head_dim} numbers, rotation by the position, scores with "
        f"a soft cap of {c.attn_logit_softcapping:g}, mask, softmax, the average of values, a second norm. Then: norm, "
        f"a feed-forward layer of {c.intermediate_size:,} numbers with GELU, a fourth norm. At the end: a norm, the "
        f"product with the same embedding table, a soft cap of {c.final_logit_softcapping:g}, and a score for each "
        "token."
    )


# --- the whole model, on the left -------------------------------------------------------------------------------------


def draw_whole(picture: Drawing, config: Gemma2Config) -> None:
    """Draw the path from token ids to logits."""
    left, width = 14, 92
    last = config.num_hidden_layers - 1
    picture.begin("stream")
    picture.path(f"M{TRUNK} 122V438", "stream")
    picture.end()
    picture.begin("tokens")
    picture.text(TRUNK, 52, "token ids", "middle strong")
    picture.arrow(TRUNK, 58, TRUNK, 68)
    picture.end()
    picture.begin("embedding")
    picture.box(left, 70, width, 56, "table")
    for y, text in ((86, "embedding"), (102, f"{config.vocab_size:,}"), (118, f"× {config.hidden_size:,}")):
        picture.text(TRUNK, y, text, "middle" + (" strong" if y == 86 else ""))
    picture.add(f'<rect x="{left}" y="129" width="{width}" height="18" class="paper"/>')
    picture.text(TRUNK, 142, f"times √{config.hidden_size:,}", "middle")
    picture.end()
    picture.begin("blocks")
    shown = [0, 1, 2, 3, None, last - 1, last] if last > 5 else list(range(last + 1))
    for row, number in enumerate(shown):
        y = 156 + 36 * row
        if number is None:
            picture.add(f'<rect x="{TRUNK - 12}" y="{y - 2}" width="24" height="26" class="paper"/>')
            picture.text(TRUNK, y + 16, "⋮", "middle title")
        else:
            kind = "sliding" if config.is_sliding(number) else "full"
            picture.box(left, y, width, 25, "attention")
            picture.text(left + 6, y + 17, f"{number} {kind}")
            draw_triangle(picture, left + width - 20, y + 5, 16, 5, 2 if kind == "sliding" else 5)
    picture.end()
    picture.begin("norms")
    picture.box(left, 414, width, 24, "norm", "norm")
    picture.end()
    picture.begin("head")
    picture.arrow(TRUNK, 438, TRUNK, 450)
    picture.box(left, 452, width, 40, "table")
    picture.text(TRUNK, 468, "head: the", "middle")
    picture.text(TRUNK, 484, "same table", "middle")
    picture.path(f"M{left} 98H7V472H{left}", "tied")
    picture.end()
    picture.begin("final cap")
    picture.arrow(TRUNK, 492, TRUNK, 504)
    picture.box(left, 506, width, 24, "cap")
    picture.text(left + 12, 522.5, f"cap {config.final_logit_softcapping:g}")
    picture.curve(left + 74, 518)
    picture.end()
    picture.begin("logits")
    picture.arrow(TRUNK, 530, TRUNK, 542)
    picture.text(TRUNK, 557, f"{config.vocab_size:,}", "middle strong")
    picture.text(TRUNK, 573, "scores: logits", "middle strong")
    picture.end()


def draw_triangle(picture: Drawing, x: float, y: float, size: float, cells: int, window: int) -> None:
    """Draw a mask of `cells` queries and keys, each of which sees the last `window` keys."""
    side = size / cells
    for query in range(cells):
        for key in range(cells):
            style = "seen" if query - window < key <= query else "hidden"
            picture.add(
                f'<rect class="{style}" x="{x + key * side:.4g}" y="{y + query * side:.4g}" width="{side * 0.88:.3g}" '
                f'height="{side * 0.88:.3g}"/>'
            )


# --- one block, on the right ------------------------------------------------------------------------------------------


def draw_block(picture: Drawing, config: Gemma2Config) -> None:
    """Draw the two halves of a block next to the residual stream."""
    picture.path(f"M106 192L{PANEL} 38M106 217L{PANEL} 580", "panel")
    picture.add(f'<rect class="panel" x="{PANEL}" y="38" width="266" height="542" rx="8"/>')
    picture.text(BOX, 58, f"one of {config.num_hidden_layers} blocks", "strong")
    picture.begin("stream")
    picture.path(f"M{STREAM} 44V572", "stream")
    picture.path(f"M{STREAM - 6} 566L{STREAM} 575L{STREAM + 6} 566", "stream")
    picture.add(f'<text class="soft middle" transform="translate({STREAM - 11} 216) rotate(-90)">residual stream: '
                f"{config.hidden_size:,} numbers per token</text>")  # fmt: skip
    picture.end()
    draw_half(picture, 68, 368, "input_layernorm", "post_attention_layernorm")
    draw_attention(picture, config)
    draw_half(picture, 410, 534, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    draw_feed_forward(picture, config)


def draw_half(picture: Drawing, top: float, bottom: float, first: str, second: str) -> None:
    """Draw the norms of a half, and the arrows from the stream and back."""
    picture.begin("norms")
    for y, name in ((top, first), (bottom, second)):
        picture.box(BOX, y, BOX_WIDTH, 24, "norm", name, "name")
    picture.end()
    picture.begin("stream")
    picture.arrow(STREAM + 2, top + 12, BOX - 1, top + 12)
    picture.arrow(BOX, bottom + 12, STREAM + 9, bottom + 12)
    picture.add(f'<circle class="plus" cx="{STREAM}" cy="{bottom + 12}" r="8"/>')
    picture.path(f"M{STREAM - 4} {bottom + 12}h8M{STREAM} {bottom + 8}v8", "flow")
    picture.end()


def draw_attention(picture: Drawing, config: Gemma2Config) -> None:
    """Draw attention: grouped heads, rotation, scores and cap, masks, mix."""
    middle, groups = BOX + BOX_WIDTH / 2, config.num_attention_heads // config.num_key_value_heads
    picture.begin("heads")
    picture.arrow(middle, 92, middle, 102)
    picture.text(middle, 116, f"{config.num_attention_heads} query heads of {config.head_dim}", "middle")
    each = BOX_WIDTH / config.num_attention_heads
    for group in range(config.num_key_value_heads):
        start, width = BOX + group * groups * each, groups * each
        for head in range(groups):
            x = start + head * each
            picture.add(
                f'<rect class="box attention" x="{x + 1:.5g}" y="122" width="{each - 2:.4g}" height="12" rx="2"/>'
            )
            picture.path(f"M{x + each / 2:.5g} 134L{start + width / 2:.5g} 145", "flow")
        picture.add(
            f'<rect class="box attention" x="{start + 1:.5g}" y="145" width="{width - 2:.4g}" height="12" rx="2"/>'
        )
    picture.text(middle, 172, f"{config.num_key_value_heads} key/value heads, {groups} share one", "middle")
    picture.end()
    picture.begin("rotary")
    picture.arrow(middle, 177, middle, 185)
    picture.box(BOX, 187, BOX_WIDTH, 24, "attention")
    picture.text(middle + 10, 203.5, "rotate q, k by position", "middle")
    picture.path(f"M{BOX + 11} 203A6.5 6.5 0 1 1 {BOX + 21} 203", "turn")
    picture.path(f"M{BOX + 18} 206L{BOX + 26} 205L{BOX + 22} 198Z", "turned")
    picture.end()
    picture.begin("scores")
    picture.arrow(BOX + 55, 211, BOX + 55, 221)
    picture.box(BOX, 223, 112, 24, "attention", f"q · k ÷ √{config.query_pre_attn_scalar:g}")
    picture.end()
    picture.begin("attention cap")
    picture.arrow(BOX + 112, 235, BOX + 121, 235)
    picture.box(BOX + 122, 223, 80, 24, "cap")
    picture.text(BOX + 131, 239.5, f"cap {config.attn_logit_softcapping:g}")
    picture.curve(BOX + 186, 235)
    picture.end()
    picture.begin("mask")
    picture.arrow(middle, 247, middle, 257)
    picture.box(BOX, 259, BOX_WIDTH, 58, "attention")
    draw_triangle(picture, BOX + 8, 265, 46, 9, 4)
    draw_triangle(picture, BOX + 108, 265, 46, 9, 9)
    for x, lines in ((58, ("sliding:", "last", f"{config.sliding_window:,}")), (158, ("full:", "all so", "far"))):
        for row, line in enumerate(lines):
            picture.text(BOX + x, 277 + 15 * row, line)
    picture.end()
    picture.begin("mix")
    picture.arrow(middle, 317, middle, 327)
    picture.box(BOX, 329, BOX_WIDTH, 24, "attention", "softmax, average of values")
    picture.arrow(middle, 353, middle, 366)
    picture.end()


def draw_feed_forward(picture: Drawing, config: Gemma2Config) -> None:
    """Draw the feed-forward layer: wider, GELU, product, back."""
    middle, half = BOX + BOX_WIDTH / 2, BOX_WIDTH / 2
    picture.begin("feed-forward")
    picture.arrow(middle, 434, middle, 442)
    narrow = half * config.hidden_size / config.intermediate_size
    picture.add(
        f'<path class="box feed" d="M{middle - narrow:.5g} 444H{middle + narrow:.5g}L{BOX + BOX_WIDTH} 462V502'
        f'L{middle + narrow:.5g} 520H{middle - narrow:.5g}L{BOX} 502V462Z"/>'
    )
    picture.text(middle, 478, "GELU(gate) × up", "middle strong")
    picture.text(
        middle, 496, f"{config.hidden_size:,} → {config.intermediate_size:,} → {config.hidden_size:,}", "middle"
    )
    picture.arrow(middle, 520, middle, 532)
    picture.end()


# --- sizes, below -----------------------------------------------------------------------------------------------------


def draw_sizes(picture: Drawing, shown: str) -> None:
    """Draw the table with the sizes of all models; the column of the drawn model is bold."""
    models = {name: load_config(name) for name in ("tiny", "2b", "9b", "27b")}
    rows = {
        "blocks": [f"{c.num_hidden_layers}" for c in models.values()],
        "stream": [f"{c.hidden_size:,}" for c in models.values()],
        "heads q / kv": [f"{c.num_attention_heads} / {c.num_key_value_heads}" for c in models.values()],
        "head width": [f"{c.head_dim}" for c in models.values()],
        "feed-forward": [f"{c.intermediate_size:,}" for c in models.values()],
        "window": [f"{c.sliding_window:,}" for c in models.values()],
        "vocabulary": [f"{c.vocab_size:,}" for c in models.values()],
    }
    picture.begin("sizes")
    columns = dict(zip(models, (170, 242, 314, 386), strict=True))
    x, top = columns[shown], 588
    picture.add(f'<rect class="box table" x="{x - 62}" y="{top + 1}" width="68" height="129" rx="5"/>')
    for name, x in columns.items():
        picture.text(x, top + 15, name if name == "tiny" else name.upper(), "end strong")
    for row, (label, values) in enumerate(rows.items()):
        y = top + 31 + 15.2 * row
        picture.text(14, y, label, "soft")
        for (name, x), value in zip(columns.items(), values, strict=True):
            picture.text(x, y, value, "end" + (" strong" if name == shown else ""))
    picture.end()


def main() -> None:
    """Write the picture for README and the site, and one for each notebook."""
    (ROOT / "docs" / "_static" / "model.svg").write_text(draw(), "utf-8")
    folder = ROOT / "notebooks" / "pictures"
    folder.mkdir(exist_ok=True)
    for number, (lit, model) in NOTEBOOKS.items():
        (folder / f"model-{number}.svg").write_text(draw(lit, model), "utf-8")


if __name__ == "__main__":
    main()
