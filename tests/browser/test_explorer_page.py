"""Test the explorer's page in a headless Chromium: no error, no request, and the numbers of the trace."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page

import refgemma
from refgemma.teach.explorer import explore_run, render_page
from refgemma.teach.viz import show_blanks

TINY = refgemma.load("tiny")
IDS = TINY.tokenizer.encode("Once upon a time there was a little princess who had a golden ball. " * 5)
TOKENS = [show_blanks(token) for token in TINY.tokenizer.convert_ids_to_tokens(IDS)]
RUN = refgemma.forward([IDS], TINY.weights, TINY.config)
SEQ, LAST = len(IDS), len(IDS) - 1
WINDOW = 64
PROBS = np.stack([layer.attention.probs[0] for layer in RUN.layers]).astype(np.float64)
HALF_OF_THE_LAST_DIGIT = 0.5001e-4  # shares are shown with four decimals; JavaScript rounds the exact number, as here


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(render_page(explore_run(IDS, TINY, "tiny", "float32")), "utf-8")
    return path


@pytest.fixture
def explorer(browser: Browser, file: Path) -> Iterator[Page]:
    """Open the page; at the end of each test, check that no error occurred and no request was made."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    context.close()
    assert said == []
    assert {url.split("#")[0] for url in asked} <= {file.as_uri(), "data:,"}


def picture(explorer: Page) -> str:
    drawn: str = explorer.evaluate("document.getElementById('map').toDataURL()")
    return drawn


def slider(explorer: Page, name: str) -> Locator:
    return explorer.get_by_role("slider", name=name)


def rows(explorer: Page, table: str) -> list[list[str]]:
    return [row.split("\t") for row in explorer.locator(f"#{table} tbody").inner_text().split("\n")]


def test_the_page_holds_every_share_of_the_trace(explorer: Page) -> None:
    every = """Array.from({length: layers}, (_, l) => Array.from({length: heads}, (_, h) => Array.from({length: seq},
        (_, q) => Array.from({length: seq}, (_, k) => share(l, h, q, k)))))"""
    assert np.array_equal(np.array(explorer.evaluate(every)), PROBS)


@pytest.mark.parametrize(("token", "layer", "head"), [(0, 0, 0), (7, 3, 2), (80, 4, 5)])
def test_the_keys_are_those_of_the_chosen_token_layer_and_head(
    explorer: Page, token: int, layer: int, head: int
) -> None:
    explorer.locator("#tokens input").nth(token).check(force=True)
    slider(explorer, "Layer").fill(str(layer))
    slider(explorer, "Head").fill(str(head))
    shares = PROBS[layer, head, token]
    seen = [row for row in rows(explorer, "keys") if row[0]]
    assert len(seen) == min(16, token + 1)
    for place, text, share in seen:
        assert text == TOKENS[int(place)]
        assert abs(float(share) - shares[int(place)]) <= HALF_OF_THE_LAST_DIGIT
    assert [float(row[2]) for row in seen] == sorted((float(row[2]) for row in seen), reverse=True)
    assert float(seen[0][2]) == pytest.approx(shares.max(), abs=HALF_OF_THE_LAST_DIGIT)


def test_the_answers_are_the_likeliest_next_tokens(explorer: Page) -> None:
    explorer.locator("#tokens input").nth(4).check(force=True)
    logits = RUN.logits[0, 4].astype(np.float64)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-shares, kind="stable")[:5]
    last = rows(explorer, "answers")[-1]
    assert last[0] == "6"
    assert last[1::2] == [show_blanks(piece) for piece in TINY.tokenizer.convert_ids_to_tokens(best.tolist())]
    assert np.abs(np.array(last[2::2], float) - shares[best]).max() <= HALF_OF_THE_LAST_DIGIT


def test_the_sizes_are_those_of_the_residual_stream(explorer: Page) -> None:
    explorer.locator("#tokens input").nth(2).check(force=True)
    label = explorer.locator("#norms svg").get_attribute("aria-label") or ""
    said = [float(number) for number in label.rsplit(":", 1)[1].split(",")]
    streams = [RUN.embedded, *(layer.out for layer in RUN.layers)]
    sizes = [np.sqrt(np.mean(x[0, 2].astype(np.float64) ** 2)) for x in streams]
    assert np.abs(np.array(said) - sizes).max() <= 0.5001e-3  # three decimals
    heights = explorer.locator("#norms circle").evaluate_all("all => all.map(c => Number(c.getAttribute('cy')))")
    assert np.corrcoef(heights, sizes)[0, 1] == pytest.approx(-1, abs=1e-6)  # a straight line, downwards as pixels go


def test_the_tensors_have_their_shapes(explorer: Page) -> None:
    slider(explorer, "Layer").fill("3")
    shapes = {row[0]: row[2] for row in rows(explorer, "tensors")}
    assert shapes["layers.3.attention.k"] == str(RUN.layers[3].attention.k.shape)
    assert shapes["logits"] == str(RUN.logits.shape)


def test_each_control_changes_the_picture(explorer: Page) -> None:
    seen = {picture(explorer)}
    slider(explorer, "Layer").fill("3")
    seen.add(picture(explorer))
    slider(explorer, "Head").fill("4")
    seen.add(picture(explorer))
    explorer.locator("#tokens label").nth(5).click()
    seen.add(picture(explorer))
    assert len(seen) == 4
    slider(explorer, "Layer").fill("0")
    assert "sliding layer, window 64" in explorer.locator("#map-title").inner_text()


def test_a_cell_says_its_value_under_the_pointer(explorer: Page) -> None:
    left, top, cell = explorer.evaluate("[grid.left, grid.top, grid.cell]")
    for query, key in ((LAST, 60), (20, 3), (70, 2)):
        explorer.locator("#map").hover(position={"x": left + (key + 0.5) * cell, "y": top + (query + 0.5) * cell})
        text = explorer.locator("#tip").inner_text()
        assert text.startswith(f"{query} {TOKENS[query]} ")
        assert text.endswith(f" {key} {TOKENS[key]}")
        if query - key < WINDOW:
            share = float(re.findall(r"gives ([\d.]+) of", text)[0])
            assert share == pytest.approx(PROBS[0, 0, query, key], abs=0.5001e-6)  # six decimals
        else:
            assert "cannot see" in text


def test_a_cells_colour_is_its_share(explorer: Page) -> None:
    pixels = """(cells) => { const canvas = document.getElementById("map"), pen = canvas.getContext("2d");
        const all = pen.getImageData(0, 0, canvas.width, canvas.height).data;
        return cells.map(([query, key]) => {
            const x = Math.floor(grid.left + (key + .5) * grid.cell);
            const y = Math.floor(grid.top + (query + .5) * grid.cell);
            return Array.from(all.slice(4 * (y * canvas.width + x)).slice(0, 3)); }); }"""
    cells = ((10, 3), (50, 49), (30, 0))
    low, high = np.array([0xF3, 0xF7, 0xFC]), np.array([0x08, 0x30, 0x6B])
    drawn = explorer.evaluate(pixels, cells)
    for (query, key), pixel in zip(cells, drawn, strict=True):
        expected = low + (high - low) * np.sqrt(PROBS[0, 0, query, key])
        assert np.abs(pixel - expected).max() <= 1  # a byte of colour, rounded


def test_everything_is_reached_by_keyboard(explorer: Page) -> None:
    assert SEQ > WINDOW
    explorer.keyboard.press("Tab")  # the tokens, which are one stop
    explorer.keyboard.press("ArrowLeft")
    assert explorer.evaluate("chosen.token") == LAST - 1
    explorer.keyboard.press("Tab")
    explorer.keyboard.press("ArrowRight")
    explorer.keyboard.press("Tab")
    explorer.keyboard.press("End")
    assert explorer.evaluate("[chosen.layer, chosen.head]") == [1, 5]
    explorer.keyboard.press("Tab")
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        explorer.keyboard.press(key)
    said = explorer.locator("#said").inner_text()
    query, key = LAST - 2, LAST - 3
    assert said.startswith(f"{query} {TOKENS[query]} gives {PROBS[1, 5, query, key]:.6f} of its attention to {key} ")
    assert explorer.evaluate("document.activeElement.id") == "map"


def test_a_screen_reader_finds_names_for_everything(explorer: Page) -> None:
    for control in explorer.locator("input, canvas, svg[role=img], [role=region]").all():
        name = control.evaluate("e => e.ariaLabel || (e.labels && e.labels[0] && e.labels[0].textContent) || "
                                "document.getElementById(e.getAttribute('aria-labelledby'))?.textContent")  # fmt: skip
        assert name
    assert explorer.locator("[aria-live]").count() == 1
    for table in ("keys", "answers", "tensors"):
        assert explorer.locator(f"#{table} thead th[scope=col]").count() >= 3
    assert slider(explorer, "Layer").get_attribute("aria-valuetext") == "0, sliding, window 64"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 360)])
def test_light_dark_and_narrow(browser: Browser, file: Path, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})  # type: ignore[arg-type]
    opened = context.new_page()
    opened.goto(f"{file.as_uri()}#token=3&layer=5&head=1")
    assert opened.evaluate("[chosen.token, chosen.layer, chosen.head]") == [3, 5, 1]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width  # the page itself never scrolls sideways
    back, front = opened.evaluate("""['backgroundColor', 'color'].map(
        (name) => getComputedStyle(document.body)[name].match(/[0-9]+/g).map(Number))""")
    assert (sum(back) > sum(front)) == (scheme == "light")
    assert contrast(back, front) >= 4.5  # WCAG 2.2, criterion 1.4.3
    soft = opened.evaluate("getComputedStyle(document.querySelector('.soft')).color.match(/[0-9]+/g).map(Number)")
    assert contrast(back, soft) >= 4.5
    context.close()


def contrast(one: list[int], other: list[int]) -> float:
    """Return the contrast ratio of two colours as defined by WCAG 2.2."""

    def light(colour: list[int]) -> float:
        parts = np.array(colour[:3]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
