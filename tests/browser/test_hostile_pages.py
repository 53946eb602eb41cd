"""Test pages with untrusted texts in a headless Chromium: only our own script runs, and nothing is fetched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser
from safetensors.numpy import load_file, save_file

import refgemma
from refgemma.cli.main import main
from refgemma.hub import find_model
from refgemma.teach.explorer import TEMPLATE, explore_run, render_page

RUNS = "window.ran=1"
TEXTS = [
    f"<script>{RUNS}</script>", f"</td></table></pre><img src=x onerror={RUNS}>", f"<svg onload={RUNS}></svg>",
    f'" onmouseover="{RUNS}" style="position:fixed;inset:0', f"</script><script>{RUNS}</script>",
    f"<!--<script>{RUNS}", f"</title><script>{RUNS}</script>", "<link rel=stylesheet href=//evil.example/a.css>",
    f"<a href='javascript:{RUNS}'>x</a>", "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
]  # fmt: skip


def look_at(browser: Browser, path: Path) -> tuple[Any, list[str], str]:
    """Open a page, hover over and press everything; return the scripts that ran, the requests, and the text."""
    context = browser.new_context()
    opened = context.new_page()
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(path.as_uri())
    opened.evaluate("""for (const element of document.querySelectorAll("*"))
        for (const kind of ["mouseover", "click", "focus", "error", "load"]) element.dispatchEvent(new Event(kind))""")
    opened.wait_for_timeout(200)
    found = opened.evaluate("window.ran"), asked, opened.locator("body").inner_text()
    context.close()
    return found


def test_nothing_runs_in_a_report(browser: Browser, tmp_path: Path) -> None:
    trace, weights, page = (tmp_path / name for name in ("run.safetensors", "port.safetensors", "report.html"))
    main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(trace)])
    strange = {text: np.zeros(1, np.float32) for text in TEXTS}
    save_file(load_file(trace) | strange, trace, {"dtype": "float32"})
    save_file(load_file(find_model("conformance") / "model.safetensors") | strange, weights)
    options = ["--model", "conformance", "--weights", str(weights), "--html", str(page)]
    assert main(["check", str(trace), *options]) == 1
    ran, asked, text = look_at(browser, page)
    assert ran is None
    assert asked == [page.as_uri()]
    assert TEXTS[0] in text


def test_nothing_but_its_own_script_runs_in_the_explorer(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, page = refgemma.load("tiny"), tmp_path / "page.html"
    monkeypatch.setattr(type(tiny.tokenizer), "convert_ids_to_tokens", lambda _, ids: [TEXTS[n % 11] for n in ids])
    page.write_text(render_page(explore_run([2, *range(300, 311)], tiny, TEXTS[6], "float32")), "utf-8")
    ran, asked, text = look_at(browser, page)
    assert ran is None
    assert {url for url in asked if not url.startswith("data:,")} == {page.as_uri()}
    assert TEXTS[4] in text  # the page's own script did run


def test_the_policy_stops_a_script_that_was_not_escaped(browser: Browser, tmp_path: Path) -> None:
    """Test the second protection without the first."""
    script = f"<script>{RUNS}</script><img src=x onerror={RUNS}>"
    page, report = tmp_path / "page.html", tmp_path / "report.html"
    run = explore_run([2, 300], refgemma.load("tiny"), "tiny", "float32")
    page.write_text(render_page(run).replace("<main>", f"<main>{script}"), "utf-8")
    template = (TEMPLATE.parents[1] / "oracle" / "report.html").read_text("utf-8")
    report.write_text(template.replace("$text", script), "utf-8")
    for path in (page, report):
        assert look_at(browser, path)[0] is None
    report.write_text(template.replace("default-src 'none'", "").replace("$text", script), "utf-8")
    assert look_at(browser, report)[0] == 1  # what is tried does run where no policy stops it
