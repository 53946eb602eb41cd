"""Test the drawings in a headless Chromium: on a phone, text is legible, inside the picture, and not covered."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
PICTURES = [
    *(ROOT / "docs" / "_static" / f"{name}.svg" for name in ("model", "check")),
    *sorted((ROOT / "notebooks" / "pictures").glob("*.svg")),
]
PHONE = 390 - 2 * 16  # pixels, without the margins of a page
TEXTS = """svg => [...svg.querySelectorAll('text')].map(text => {
  const box = text.getBoundingClientRect();
  return {text: text.textContent, x: box.x, y: box.y, right: box.right, bottom: box.bottom,
          size: parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a};
})"""


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_text_is_legible_and_free(browser: Browser, path: Path) -> None:
    page = browser.new_page(viewport={"width": PHONE, "height": 900})
    svg = path.read_text("utf-8").replace("<svg ", '<svg style="width:100%;height:auto" ', 1)
    page.set_content(f"<body style='margin:0'>{svg}</body>")
    found = page.eval_on_selector("svg", TEXTS)
    height = page.eval_on_selector("svg", "svg => svg.getBoundingClientRect().height")
    page.close()
    assert len(found) > 15
    for text in found:
        assert text["size"] >= 9.5, text
        assert text["x"] >= 0, text
        assert text["right"] <= PHONE, text
        assert text["bottom"] <= height, text
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            apart = (one["right"] <= other["x"] + 1 or other["right"] <= one["x"] + 1
                     or one["bottom"] <= other["y"] + 4 or other["bottom"] <= one["y"] + 4)  # fmt: skip
            assert apart, (one, other)
