"""The built site in a headless Chromium: no serious fault by axe-core, no page wider than a phone, a search that finds.

sphinx-build -W docs docs/_build/html
npm pack axe-core@4.10.3 && tar -xzf axe-core-4.10.3.tgz package/axe.min.js
REFGEMMA_SITE=docs/_build/html REFGEMMA_AXE=package/axe.min.js pytest tests/browser/test_site.py
"""

import os
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page

SITE, AXE = (Path(os.environ.get(name, "")) for name in ("REFGEMMA_SITE", "REFGEMMA_AXE"))
PAGES = (
    [page for page in sorted(SITE.rglob("*.html")) if not {"_static", "_modules"} & set(page.parts)]
    if SITE.name
    else []
)
# Not ours: the list in which Sphinx puts the arguments of a long signature, and what Treescope shows while it loads.
TEST = """async (rules) => (await axe.run({exclude: [['.sig > dl'], ['treescope-container']]},
  {...rules, resultTypes: ['violations']})).violations.flatMap(
  fault => ['serious', 'critical'].includes(fault.impact)
    ? fault.nodes.map(node => `${fault.id}: ${node.html.slice(0, 120)} ${node.failureSummary}`) : [])"""
# A colour that fades from light to dark has other values for a moment.
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"
# axe takes 10 s for the colours of a long page, and 30 s for those of a page of the reference. So it is given at most
# eight of the entries of a reference, and eight of the rows, list items and words of code with parts of equal classes.
SHORTEN = """() => {
  document.querySelectorAll('dl.py').forEach((entry, place) => place < 8 || entry.remove())
  const kept = {}
  for (const one of document.querySelectorAll('tr, li, pre span')) {
    const parts = new Set([one.parentElement, one, ...one.querySelectorAll('*')].map(x => x?.tagName + x?.className))
    const kind = [...parts].sort().join()
    kept[kind] = (kept[kind] ?? 0) + 1
    if (kept[kind] > 8) one.remove()
  }
}"""
# The width of the page, and the first three elements that reach over the edge of a page that is too wide.
WIDTH = """() => [document.documentElement.scrollWidth, document.documentElement.scrollWidth <= 390 ? [] :
  [...document.querySelectorAll('body *')].filter(x => x.getBoundingClientRect().right > 391)
    .map(x => x.outerHTML.slice(0, 90)).slice(0, 3)]"""
# While `holds` is true, the page does not hear that its width has changed.
HOLD = """window.holds = window.held = false
addEventListener('resize', event => { if (holds) { held = true; event.stopImmediatePropagation() } })"""
CONTRAST, OTHERS = {"runOnly": ["color-contrast"]}, {"rules": {"color-contrast": {"enabled": False}}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGES, reason="REFGEMMA_SITE names no built site: sphinx-build -W docs FOLDER"),
]


def name(page: Path) -> str:
    return page.relative_to(SITE).as_posix()


@pytest.fixture(scope="module", params=PAGES, ids=name)
def tab(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Open each page once for all tests of it."""
    tab = browser.new_page(bypass_csp=True)  # the explorer and the live page allow no script but their own
    tab.add_init_script(HOLD)
    tab.goto(request.param.resolve().as_uri())
    yield tab
    tab.close()


def test_no_page_is_wider_than_a_phone(tab: Page) -> None:
    """A page that draws itself for the new width is narrow before it has done so, too."""
    tab.evaluate("() => { holds = true }")
    tab.set_viewport_size({"width": 390, "height": 800})
    before = tab.evaluate(WIDTH)
    tab.wait_for_function("() => held")
    assert tab.evaluate(WIDTH) == before
    tab.evaluate("() => { holds = false; dispatchEvent(new Event('resize')) }")
    assert (before, tab.evaluate(WIDTH)) == ([390, []], [390, []])


@pytest.mark.skipif(not AXE.is_file(), reason="REFGEMMA_AXE names no axe.min.js: npm pack axe-core@4.10.3")
def test_axe_finds_no_serious_fault(tab: Page) -> None:
    tab.set_viewport_size({"width": 1280, "height": 720})
    tab.add_script_tag(path=AXE)
    tab.add_style_tag(content=STILL)
    faults: dict[str, list[str]] = {"in any colours": tab.evaluate(TEST, OTHERS)}
    tab.evaluate(SHORTEN)
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        faults[scheme] = tab.evaluate(TEST, CONTRAST)
    assert faults == {"in any colours": [], "light": [], "dark": []}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing for a request."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the site: from a file, a browser does not let the search load its index."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("install", "install.html"),
        ("cite", "install.html"),
        ("colab", "install.html"),
        ("binder", "install.html"),
        ("gguf", "how-to/gguf.html"),
        ("nbgrader", "how-to/teach-a-course.html"),
        ("teacher", "how-to/teach-a-course.html"),
        ("scoreboard", "scoreboard.html"),
        ("lora", "training.html"),
    ],
)
def test_a_search_finds_the_page_first(browser: Browser, address: str, word: str, page: str) -> None:
    tab = browser.new_page()
    tab.goto(f"{address}/search.html?q={word}")
    tab.wait_for_function("() => /found|did not match/i.test(document.querySelector('#search-results').innerText)")
    first = tab.evaluate("() => document.querySelector('ul.search li a')?.getAttribute('href')")
    tab.close()
    assert first is not None
    assert first.split("?")[0].split("#")[0] == page
