"""Draw a recording of `refgemma check` as an SVG that plays once; its text is the command's own output.

    python tools/draw_recording.py       write docs/_static/check.svg

The candidate is refgemma with a window that is one token too wide. Readers who prefer reduced motion see the last
picture.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import textwrap
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from draw_model import COLOURS

import refgemma
from refgemma import ops
from refgemma.__main__ import main as refgemma_main
from refgemma.trace.names import run_in_order, save_trace

ROOT = Path(__file__).parents[1]
COMMAND = "refgemma check port.safetensors --model conformance"
COLUMNS, LINE, LEFT, SIZE = 58, 18.0, 16, 12.5  # the terminal's columns; line height, margin and font size in pixels
CHARACTER = 0.602 * SIZE  # the width of a character of most monospaced fonts
WIDTH = round(2 * LEFT + COLUMNS * CHARACTER)
SECONDS, TYPED, GAP = 9.0, 2.4, 0.45  # duration; time when the command is typed; time between two lines

INK = {name: pair[1] for name, pair in COLOURS.items()}  # a terminal is dark on any background
STYLE = f"""
text {{ font: {SIZE}px ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; fill: {INK["ink"]};
  white-space: pre; }}
.soft {{ fill: {INK["soft"]}; }} .bad {{ fill: #ff8a8a; font-weight: 700; }}
.name {{ fill: {INK["cap"]}; font-weight: 700; }} .good {{ fill: {INK["norm"]}; }} .seen {{ fill: {INK["attention"]}; }}
.wrong {{ fill: #ff5d5d; }} .hidden {{ fill: {INK["hidden"]}; }} .cover {{ visibility: hidden; fill: {INK["paper"]}; }}
""".strip()


def make_port() -> tuple[Any, np.ndarray]:
    """Return the tensors of a port whose window is one token too wide, and the mask that it should have used."""
    model = refgemma.load("conformance")
    ids = np.random.default_rng(0).integers(4, 97, (1, 24))
    ids[:, 0] = 2  # <bos>
    wrong = model.config.changed(sliding_window=model.config.sliding_window + 1)
    places = np.arange(24)
    tensors = [("input_ids", ids), *run_in_order(ids, model.weights, wrong)]
    return tensors, ops.sliding_mask(places, places, model.config.sliding_window)


def record(tensors: Any) -> list[str]:
    """Return the lines that the command prints, up to the end of the first finding."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        os.chdir(folder)
        try:
            save_trace(tensors, "port.safetensors", {"dtype": "float32"})
            code = refgemma_main(COMMAND.split()[1:])
        finally:
            os.chdir(here)
    lines = out.getvalue().splitlines()
    if code != 1:
        raise RuntimeError(f"{COMMAND} returned {code}; it must return 1, for the wrong window")
    start = next(number for number, line in enumerate(lines) if line.startswith("DIFFERS"))
    end = next((n for n in range(start + 1, len(lines)) if not lines[n].startswith("  ")), len(lines))
    return lines[:end]


def style_of(line: str) -> str:
    """Return the class of a line of output."""
    for sign, style in (("DIFFERS", "bad"), ("seen in", "good"), ("look at", "name"), ("against", "soft")):
        if sign in line:
            return style
    return ""


def wrap(line: str) -> list[str]:
    """Wrap a line of output at the terminal's width; keep the indentation."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line, COLUMNS, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    ) or [""]


class Recording:
    """The elements of the picture, and the time when each appears."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.rules: list[str] = []
        self.y = 34.0

    def show(self, element: str, second: float) -> None:
        """Make an element appear at a time."""
        number = len(self.rules)
        share = 100 * second / SECONDS
        self.rules.append(
            f"@keyframes a{number} {{ 0%, {share:.1f}% {{ opacity: 0; }} {share + 0.1:.1f}%, 100% {{ opacity: 1; }} }} "
            f".a{number} {{ animation: a{number} {SECONDS:g}s linear 1; }}"
        )
        self.elements.append(f'<g class="a{number}">{element}</g>')

    def write(self, line: str, style: str, second: float) -> None:
        text = f'<text class="{style}" x="{LEFT}" y="{self.y:g}">{escape(line)}</text>'
        self.show(text, second)
        self.y += LINE

    def type_command(self) -> None:
        """Write the command; a cover uncovers its letters one by one."""
        letters = len(COMMAND)
        width = letters * CHARACTER
        x = LEFT + 2 * CHARACTER
        self.elements.append(f'<text class="good" x="{LEFT}" y="{self.y:g}">$</text>')
        self.elements.append(f'<text x="{x:.4g}" y="{self.y:g}">{escape(COMMAND)}</text>')
        self.elements.append(
            f'<rect class="cover" x="{x:.4g}" y="{self.y - 13:g}" width="{width + 40:.4g}" height="17"/>'
        )
        begin, end = 100 * 0.5 / SECONDS, 100 * TYPED / SECONDS
        self.rules.append(
            f"@keyframes type {{ 0%, {begin:.1f}% {{ visibility: visible; transform: none; animation-timing-function: "
            f"steps({letters}); }} {end:.1f}% {{ visibility: visible; transform: translateX({width:.4g}px); }} "
            f"{end + 0.1:.1f}%, 100% {{ visibility: hidden; }} }} .cover {{ animation: type {SECONDS:g}s linear 1; }}"
        )
        self.y += LINE

    def draw_band(self, probs: np.ndarray, mask: np.ndarray, second: float) -> None:
        """Draw the attention of one head, with the keys that a token must not see marked."""
        side = 5.6
        cells = []
        for query, key in np.ndindex(mask.shape):
            style = "seen" if mask[query, key] else "wrong" if probs[query, key] > 0 else "hidden"
            x, y = LEFT + key * side, self.y + query * side
            cells.append(f'<rect class="{style}" x="{x:.4g}" y="{y:.5g}" width="5" height="5"/>')
        right = LEFT + 24 * side + 16
        window = int(mask.sum(-1).max())
        words = (
            ("soft", "layers.0.attention.probs, one head"), ("soft", "rows: tokens; columns: keys"),
            ("seen", f"may be seen: the last {window} tokens"), ("bad", f"seen by this port: token {window + 1}, too"),
        )  # fmt: skip
        for row, (style, text) in enumerate(words):
            cells.append(f'<text class="{style}" x="{right:g}" y="{self.y + 36 + 20 * row:g}">{text}</text>')
        self.show("".join(cells), second)
        self.y += 24 * side


def draw() -> str:
    """Return the picture."""
    tensors, mask = make_port()
    lines = record(tensors)
    recording = Recording()
    recording.write("# the tensors that your port computed, in one file", "soft", 0.2)
    recording.type_command()
    second = TYPED + 0.5
    for line in lines:
        for part in wrap(line):
            recording.write(part, style_of(line), second)
        second += GAP if line else 0.0
    recording.y += 2
    recording.draw_band(np.asarray(dict(tensors)["layers.0.attention.probs"])[0, 0], mask, second + 0.3)
    height = round(recording.y + 14)
    told = " ".join(line.strip() for line in lines if line)
    motion = "\n".join(recording.rules)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        '<title id="title">refgemma check finds a window that is one token too wide</title>',
        f'<desc id="desc">A terminal: {escape(COMMAND)}. {escape(told)}</desc>',
        f"<style>{STYLE}\n@media (prefers-reduced-motion: no-preference) {{\n{motion}\n}}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{INK["paper"]}" stroke="{INK["edge"]}"/>',
        *recording.elements,
        "</svg>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    (ROOT / "docs" / "_static" / "check.svg").write_text(draw(), "utf-8")
