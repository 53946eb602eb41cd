"""The page of `refgemma check --html` in a headless Chromium: no fault of accessibility in light or dark colours, and
no wider than a phone.

npm pack axe-core@4.10.3 && tar -xzf axe-core-4.10.3.tgz package/axe.min.js
REFGEMMA_AXE=package/axe.min.js pytest tests/browser/test_report_page.py
"""

import os
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page
from safetensors.numpy import load_file, save_file

from refgemma.cli.main import main

AXE = Path(os.environ.get("REFGEMMA_AXE", ""))
TEST = """async () => (await axe.run({resultTypes: ['violations']})).violations.flatMap(
  fault => fault.nodes.map(node => `${fault.id}: ${node.html.slice(0, 120)}`))"""


@pytest.fixture(scope="module", params=["right", "wrong"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a port that conforms, or of one with several verdicts: a wrong cap, a NaN and a wrong shape."""
    folder = tmp_path_factory.mktemp("report")
    trace, page = folder / "run.safetensors", folder / "page.html"
    assert main(["trace", "--ids", "2,5,9,30,31,40,7,8,6,44", "--model", "conformance", "-o", str(trace)]) == 0
    tensors = load_file(trace)
    if request.param == "wrong":
        tensors["layers.0.attention.capped"] = tensors["layers.0.attention.scores"]
        tensors["layers.1.attention.probs"][0, 0, 3] = np.nan
        tensors["layers.2.out"] = tensors["layers.2.out"][:, 1:]
        tensors["a.long.name.of.another.model" * 9] = np.zeros(1, np.float32)
    save_file(tensors, trace, {"dtype": "float32"})
    code = main(["check", str(trace), "--model", "conformance", "--html", str(page)])
    assert code == (request.param == "wrong")
    return page


def open_all(browser: Browser, report: Path, width: int) -> Page:
    """Open a report with all its details open."""
    tab = browser.new_page(viewport={"width": width, "height": 800}, bypass_csp=True)
    tab.goto(report.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    return tab


def test_the_report_is_not_wider_than_a_phone(browser: Browser, report: Path) -> None:
    tab = open_all(browser, report, 375)
    width = tab.evaluate("document.documentElement.scrollWidth")
    tab.close()
    assert width == 375


@pytest.mark.skipif(not AXE.is_file(), reason="REFGEMMA_AXE names no axe.min.js: npm pack axe-core@4.10.3")
def test_axe_finds_no_fault_in_the_report(browser: Browser, report: Path) -> None:
    tab = open_all(browser, report, 1200)
    tab.add_script_tag(path=AXE)
    faults: dict[str, list[str]] = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        faults[scheme] = tab.evaluate(TEST)
    tab.close()
    assert faults == {"light": [], "dark": []}
