"""The built site in a headless Chromium: axe-core finds no serious fault, and no page is wider than a phone.

sphinx-build -W docs docs/_build/html
npm pack axe-core@4.10.3 && tar -xzf axe-core-4.10.3.tgz package/axe.min.js
REFGEMMA_SITE=docs/_build/html REFGEMMA_AXE=package/axe.min.js pytest tests/browser/test_site.py
"""

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser

SITE, AXE = (Path(os.environ.get(name, "")) for name in ("REFGEMMA_SITE", "REFGEMMA_AXE"))
PAGES = (
    [page for page in sorted(SITE.rglob("*.html")) if not {"_static", "_modules"} & set(page.parts)]
    if SITE.name
    else []
)
# Not ours: the list in which Sphinx puts the arguments of a long signature, and what Treescope shows while it loads.
TEST = """async () => (await axe.run({exclude: [['.sig > dl'], ['treescope-container']]},
  {resultTypes: ['violations']})).violations.flatMap(
  fault => ['serious', 'critical'].includes(fault.impact)
    ? fault.nodes.map(node => `${fault.id}: ${node.html.slice(0, 120)}`) : [])"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGES, reason="REFGEMMA_SITE names no built site: sphinx-build -W docs FOLDER"),
]


def name(page: Path) -> str:
    return page.relative_to(SITE).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_page_is_wider_than_a_phone(browser: Browser, page: Path) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.goto(page.resolve().as_uri())
    wide: list[str] = tab.evaluate("""() => document.documentElement.scrollWidth <= 390 ? [] :
      [...document.querySelectorAll('main *')].filter(x => x.getBoundingClientRect().right > 391)
        .map(x => x.outerHTML.slice(0, 90)).slice(0, 3)""")
    width = tab.evaluate("() => document.documentElement.scrollWidth")
    tab.close()
    assert width <= 390, wide


@pytest.mark.skipif(not AXE.is_file(), reason="REFGEMMA_AXE names no axe.min.js: npm pack axe-core@4.10.3")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_axe_finds_no_serious_fault(browser: Browser, page: Path) -> None:
    tab = browser.new_page(bypass_csp=True)  # the explorer and the live page allow no script but their own
    tab.goto(page.resolve().as_uri())
    tab.add_script_tag(path=AXE)
    faults: dict[str, list[str]] = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        faults[scheme] = tab.evaluate(TEST)
    tab.close()
    assert faults == {"light": [], "dark": []}
