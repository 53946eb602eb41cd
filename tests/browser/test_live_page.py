"""The live page in a headless Chromium: it is a right port of Gemma 2, and each bug that it makes is found by name."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

import refgemma
from refgemma.teach.live import render_live
from refgemma.teach.viz import probabilities

pytestmark = pytest.mark.slow

TINY = refgemma.load("tiny")
SEA = "There was once a little princess who lived in a great castle by the sea."
LONG = " ".join([SEA] * 4) + " There was"  # 67 tokens, more than the window of 64
BUGS = ("attn-softcap-missing", "final-softcap-missing", "scale-head-dim", "gqa-tile", "norm-without-one",
        "embed-scale-missing", "rope-interleaved", "rope-theta-1e6", "rope-position-from-1", "swa-window-plus-one",
        "swa-layer-parity-swapped", "swa-all-global", "silu-instead-of-gelu")  # fmt: skip
TOKENS_OF = (
    """text => new Promise(receive => ask("run", {text, bug: "", changes: {}}, data => receive(data.ids), "test"))"""
)
STORY_OF = """text => new Promise(receive => { let last = ""; const times = []; let then = performance.now();
  ask("story", {text, bug: "", changes: {}, temperature: 0, seed: 1, count: 40}, data => {
    if (data.done) return receive([last, times]);
    last = data.text; times.push(performance.now() - then); then = performance.now(); }, "test"); })"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "page.html"
    path.write_text(render_live(), "utf-8")
    return path


@pytest.fixture(scope="module")
def opened(browser: Browser, file: Path) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("#next code")
    yield page
    assert said == []
    assert {url.split(":")[0] for url in asked} <= {"file", "blob", "data"}


@pytest.fixture
def live(opened: Page) -> Page:
    """The page, with nothing changed."""
    opened.select_option("#bug", "")
    for switch in ("attentionCap", "finalCap"):
        opened.set_checked(f"#{switch}", True)
    opened.fill("#window", "64")
    opened.select_option("#parity", "0")
    opened.fill("#text", SEA)
    return opened


def check(live: Page, folder: Path) -> tuple[int, str]:
    """Save the trace as a reader does, and check it."""
    with live.expect_download() as download:
        live.click("#save")
    path = folder / "trace.safetensors"
    download.value.save_as(path)
    command = [sys.executable, "-m", "refgemma", "check", path]  # not in pytest, where shapes are checked and cost time
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_right_model_conforms(live: Page, tmp_path: Path) -> None:
    live.fill("#text", LONG)
    code, out = check(live, tmp_path)
    assert code == 0
    assert "\nCONFORMS: rounding explains every recorded tensor\n" in out
    assert "132 tensors of 1x67 tokens" in " ".join(out.split())


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_is_named(bug: str, live: Page, tmp_path: Path) -> None:
    live.fill("#text", LONG)
    live.select_option("#bug", bug)
    code, out = check(live, tmp_path)
    assert code == 1
    assert f": {bug}\n" in next(line + "\n" for line in out.splitlines() if line.startswith("DIFFERS first at"))


@pytest.mark.parametrize(
    ("switch", "bug"),
    [("attentionCap", "attn-softcap-missing"), ("finalCap", "final-softcap-missing"),
     ("window", "swa-window-plus-one"), ("parity", "swa-layer-parity-swapped")],
)  # fmt: skip
def test_each_switch_does_what_it_says(switch: str, bug: str, live: Page, tmp_path: Path) -> None:
    live.fill("#text", LONG)
    if switch == "window":
        live.fill("#window", "65")
    elif switch == "parity":
        live.select_option("#parity", "1")
    else:
        live.set_checked(f"#{switch}", False)
    code, out = check(live, tmp_path)
    assert code == 1
    assert bug in next(line for line in out.splitlines() if line.startswith("DIFFERS first at"))


def test_all_bugs_are_offered(live: Page) -> None:
    values = live.eval_on_selector_all("#bug option", "options => options.map(option => option.value)")
    assert sorted(values) == sorted(["", *BUGS])


@pytest.mark.parametrize(
    "text",
    [SEA, "", " a", "  two  blanks ", "née œ ☃", "<bos> is written", "\n\nHe said, \"No\"\n", "Rumpelstiltskin"],
)  # fmt: skip
def test_tokens_are_the_tokenizers(text: str, live: Page) -> None:
    # "<bos>" in a text stays text here, as with split_special_tokens=True.
    assert live.evaluate(TOKENS_OF, text) == TINY.tokenizer(text, split_special_tokens=True)["input_ids"]


def test_the_prediction_is_shown_first(live: Page) -> None:
    ids = TINY.tokenizer.encode(SEA)
    shares = probabilities(refgemma.forward([ids], TINY.weights, TINY.config).logits[0, -1])
    best = np.argsort(-shares)[:10]
    live.wait_for_function("() => document.querySelectorAll('#next code').length === 10")
    expected = [TINY.tokenizer.convert_ids_to_tokens([int(n)])[0].replace("▁", "·").replace("\n", "⏎") for n in best]
    live.wait_for_function("first => document.querySelector('#next code').textContent === first", arg=expected[0])
    assert live.locator("#next code").all_text_contents() == expected
    assert (
        live.inner_text("#next-words")
        == f"After “.” the model gives “{expected[0]}” a probability of {100 * shares[best[0]]:.0f} %."
    )
    box = live.locator("#next-words").bounding_box()
    assert box is not None
    assert box["y"] < 400
    assert live.inner_text("#large-words") == "Most of its attention, 80 % on average, is on the token just before."


def test_the_story_is_that_of_refgemma_and_quick(live: Page) -> None:
    text, milliseconds = live.evaluate(STORY_OF, "There was once a king")
    ids = TINY.tokenizer.encode("There was once a king")
    new = list(refgemma.generate(ids, TINY.weights, TINY.config, max_new_tokens=40))
    assert text == TINY.tokenizer.decode([*ids, *new], skip_special_tokens=True)
    assert np.median(milliseconds) < 60


def test_a_bug_changes_the_story(live: Page) -> None:
    live.select_option("#bug", "norm-without-one")
    live.click("#continue")
    live.wait_for_function("() => document.getElementById('wrong').textContent.length > 120")
    live.wait_for_function("() => document.getElementById('right').textContent.length > 120")
    assert live.inner_text("#right") != live.inner_text("#wrong")
    assert "norms multiply by w" in live.inner_text("#status")


def test_first_paint(browser: Browser, file: Path) -> None:
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("#next code")
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 1000
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, file: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(file.as_uri())
    page.wait_for_selector("#next code")
    page.select_option("#bug", "swa-layer-parity-swapped")  # the longest name
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#next-words").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 844  # the prediction is on the first screen
    page.close()


def test_the_keyboard_reaches_everything(live: Page) -> None:
    unnamed = live.evaluate("""[...document.querySelectorAll('button, select, input, textarea, canvas[role]')].filter(
        e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).length""")
    assert unnamed == 0
    live.focus("#heads button:nth-of-type(1)")
    live.keyboard.press("Tab")
    live.keyboard.press("Enter")
    assert live.inner_text("#large-title") == "Attention of block 0, head 1"
    assert live.evaluate("document.querySelectorAll('#heads [aria-pressed=true]').length") == 1
