"""The live page in a headless Chromium: it is a right port of Gemma 2, and each bug that it makes is found by name."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

import refgemma
from refgemma.oracle.known_bugs import KNOWN_BUGS
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
    opened.wait_for_function("() => /^17 tokens in \\d+ ms$/.test(document.getElementById('status').textContent)")
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


# The text is shorter than the window, and rotated scores depend on the distance of two tokens only.
WITHOUT_EFFECT = ("swa-window-plus-one", "swa-layer-parity-swapped", "swa-all-global", "rope-position-from-1")


@pytest.mark.parametrize("bug", BUGS)
def test_the_status_says_if_a_bug_has_no_effect(bug: str, live: Page) -> None:
    live.select_option("#bug", bug)
    name = live.text_content(f"#bug option[value='{bug}']")
    live.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=name)
    assert ("no effect on this text" in live.inner_text("#status")) == (bug in WITHOUT_EFFECT)
    assert live.is_visible("#next-key") == (bug not in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("switch", "words"), [("attentionCap", "no soft cap of scores"), ("finalCap", "no soft cap of logits")]
)
def test_the_status_names_a_switch(switch: str, words: str, live: Page) -> None:
    live.set_checked(f"#{switch}", False)
    live.wait_for_function(
        "text => document.getElementById('status').textContent.endsWith(text)", arg=f"changed: {words}"
    )


def in_percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_is_described(bug: str, live: Page) -> None:
    assert not live.is_visible("#bug-words")
    live.select_option("#bug", bug)
    (known,) = (known for known in KNOWN_BUGS if known.name == bug)
    text = live.inner_text("#bug-words")
    assert text.startswith(f"What is wrong: {known.says}.")
    assert (f"Inputs that show it: {known.shows}." in text) == (known.shows != "any input")
    assert text.endswith(f" Seen in {known.seen}.") == (not known.seen.startswith("unverified"))
    for link in live.locator("#bug-words a").all():
        name, number = link.inner_text().replace(" before", "").split("#")
        assert (link.get_attribute("href") or "").endswith(f"/{name.strip()}/issues/{number.split()[0]}")


@pytest.mark.parametrize(
    ("bug", "address"),
    [("norm-without-one", "https://github.com/linkedin/Liger-Kernel/issues/74"),
     ("swa-layer-parity-swapped", "https://github.com/huggingface/transformers/issues/31775"),
     ("scale-head-dim", "https://github.com/antonellof/ferrox/issues/40")],
)  # fmt: skip
def test_a_bug_links_to_its_source(bug: str, address: str, live: Page) -> None:
    live.select_option("#bug", bug)
    assert live.locator("#bug-words a").first.get_attribute("href") == address


def test_the_right_probability_is_beside_the_wrong_one(live: Page) -> None:
    live.select_option("#bug", "norm-without-one")
    live.wait_for_selector("#next-key", state="visible")
    ids = TINY.tokenizer.encode(SEA)
    shares = probabilities(refgemma.forward([ids], TINY.weights, TINY.config).logits[0, -1])
    pieces = TINY.tokenizer.convert_ids_to_tokens(range(len(shares)))
    visible = [piece.replace("▁", "·").replace("\n", "⏎") for piece in pieces]
    right = dict(zip(visible, map(in_percent, shares), strict=True))
    tokens = live.locator("#next code").all_text_contents()
    numbers = live.locator("#next .number").all_text_contents()
    assert [number.split(" (")[1] for number in numbers] == [f"{right[token]})" for token in tokens]
    best = int(shares.argmax())
    assert live.inner_text("#next-words").endswith(
        f"The right model gives “{visible[best]}” {in_percent(shares[best])}."
    )


def test_a_head_without_a_habit(live: Page) -> None:
    probs = [
        block.attention.probs[0]
        for block in refgemma.forward([TINY.tokenizer.encode(SEA)], TINY.weights, TINY.config).layers
    ]
    later = np.arange(1, probs[0].shape[-1])
    shares = np.array(
        [[[head[later, keys].mean() for keys in (later - 1, later, 0)] for head in block] for block in probs]
    )
    block, head = np.argwhere(shares.max(axis=-1) < 0.4)[0]
    live.click(f"#heads button[aria-label='block {block}, head {head}']")
    words = live.inner_text("#large-words")
    live.click("#heads button[aria-label='block 2, head 0']")
    assert words.startswith("On this text no single habit has 40 % of this head's attention.")
    assert f"The largest share, {in_percent(shares[block, head].max())}, is" in words


# What the page writes on the large map if it is drawn again.
WRITTEN = """() => { const texts = [], pen = CanvasRenderingContext2D.prototype, write = pen.fillText;
  pen.fillText = function (text) { texts.push(text); };
  drawLarge();
  pen.fillText = write;
  return texts; }"""
AXES = ["the token that looks", "the token looked at"]


def open_phone(browser: Browser, file: Path) -> Page:
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(file.as_uri())
    page.wait_for_selector("#next code")
    return page


def test_the_map_names_each_row_and_column_on_a_phone(browser: Browser, file: Path) -> None:
    page = open_phone(browser, file)
    tokens = [piece.replace("▁", "·") for piece in TINY.tokenizer.convert_ids_to_tokens(TINY.tokenizer.encode(SEA))]
    assert page.evaluate(WRITTEN) == [*tokens, *tokens, *AXES]
    page.close()


def test_the_map_of_a_long_text_names_the_chosen_cell(live: Page) -> None:
    live.fill("#text", LONG)
    live.wait_for_function("() => shown.ids.length === 67")
    live.evaluate("look(53, 40)")
    texts = live.evaluate(WRITTEN)
    tokens = live.locator("#tokens button").all_text_contents()
    assert {tokens[53], tokens[40]} <= set(texts)
    assert len(texts) < 67  # a name for each row and column would cover the others


def attention(block: int, head: int, query: int, key: int) -> str:
    run = refgemma.forward([TINY.tokenizer.encode(SEA)], TINY.weights, TINY.config)
    return in_percent(run.layers[block].attention.probs[0, head, query, key])


def cell_at(page: Page, query: int, key: int) -> tuple[float, float]:
    """Return the place of a square of the large map in the window."""
    page.locator("#large").scroll_into_view_if_needed()
    x, y = page.evaluate(
        """([query, key]) => { const box = document.getElementById("large").getBoundingClientRect();
      return [box.left + map.left + (key + .5) * map.side, box.top + (query + .5) * map.side]; }""",
        [query, key],
    )
    return x, y


def test_a_cell_is_read_by_mouse_and_keyboard(live: Page) -> None:
    live.mouse.move(*cell_at(live, 12, 11))
    expected = f"“·castle” (token 12) gives {attention(2, 0, 12, 11)} of its attention to “·great” (token 11)."
    assert live.inner_text("#tip") == expected
    live.mouse.move(*cell_at(live, 11, 12))
    assert live.inner_text("#tip") == "“·great” (token 11) cannot see “·castle” (token 12), which comes later."
    live.mouse.move(1, 1)
    assert not live.is_visible("#tip")
    live.mouse.click(*cell_at(live, 12, 10))
    live.focus("#large")
    live.keyboard.press("ArrowRight")
    assert live.inner_text("#cell-words").startswith(f"{expected} It looks most at: ")
    live.keyboard.press("ArrowUp")
    assert f"“·great” (token 11) gives {attention(2, 0, 11, 11)} of its" in live.inner_text("#cell-words")
    assert live.inner_text("#tokens [aria-pressed=true]") == "·great"  # the residual stream is of the same token


def test_a_cell_is_read_by_touch(browser: Browser, file: Path) -> None:
    page = open_phone(browser, file)
    page.touchscreen.tap(*cell_at(page, 12, 5))
    expected = f"“·castle” (token 12) gives {attention(2, 0, 12, 5)} of its attention to “·little” (token 5)."
    assert page.inner_text("#cell-words").startswith(expected)
    page.close()


def test_a_cell_outside_the_window(live: Page) -> None:
    live.fill("#window", "4")
    live.wait_for_function("() => shown.windows[2] === 4")
    live.evaluate("look(12, 8)")
    assert "(token 8): it is outside the window of 4 tokens." in live.inner_text("#cell-words")
    live.evaluate("look(12, 9)")
    assert "of its attention to “·in” (token 9)." in live.inner_text("#cell-words")


def test_every_control_is_explained(live: Page) -> None:
    assert live.locator("fieldset label").count() == live.locator("fieldset label small").count() == 6


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


def test_the_story_is_that_of_refgemma_and_each_token_is_computed_once(live: Page) -> None:
    text, milliseconds = live.evaluate(STORY_OF, "There was once a king")
    ids = TINY.tokenizer.encode("There was once a king")
    new = list(refgemma.generate(ids, TINY.weights, TINY.config, max_new_tokens=40))
    assert text == TINY.tokenizer.decode([*ids, *new], skip_special_tokens=True)
    # A token with a cache takes a sixth of the time of the whole text; without one, each token would take all of it.
    live.fill("#text", text)
    count = len(ids) + len(new)
    live.wait_for_function("n => document.getElementById('status').textContent.startsWith(`${n} tokens in`)", arg=count)
    assert np.median(milliseconds[-10:]) < int(live.inner_text("#status").split()[3]) / 2


def change(page: Page, control: str, value: str) -> tuple[list[str], str]:
    """Change a control; return the stories that are marked at once, and the words above the stories."""
    marked, words = page.evaluate(
        """([control, value]) => {
          document.getElementById(control).value = value;
          document.getElementById(control).dispatchEvent(new Event("input"));
          return [[...document.querySelectorAll(".story.old")].map(story => story.id),
            document.getElementById("story-words").textContent]; }""",
        [control, value],
    )
    return marked, words


def finish_stories(page: Page) -> list[str]:
    """Wait until both stories are those of the settings, and return them."""
    page.wait_for_function("""() => document.getElementById("story-words").textContent.startsWith("Written at")
      && document.getElementById("story-words").textContent.includes(
        `temperature ${Number(document.getElementById("temperature").value).toFixed(1)}`)
      && !document.querySelector(".story.old")""")
    return [page.inner_text(f"#{name}") for name in ("right", "wrong")]


def test_a_story_is_written_again_after_a_change(live: Page) -> None:
    live.fill("#text", "There was once a king")
    live.fill("#temperature", "0.7")
    live.click("#continue")
    first, second = finish_stories(live)
    assert first == second

    marked, words = change(live, "bug", "norm-without-one")
    assert marked == ["wrong"]
    assert words.startswith("A story in italics is of the earlier settings.")
    right, wrong = finish_stories(live)
    assert right == first  # the right model has no bug
    assert wrong != first
    assert live.inner_text("#story-words").endswith(
        "Changed in the model as set above: norms multiply by w, not 1 + w."
    )

    live.select_option("#bug", "")
    assert change(live, "temperature", "0")[0] == ["right", "wrong"]
    ids = TINY.tokenizer.encode("There was once a king")
    new = list(refgemma.generate(ids, TINY.weights, TINY.config, max_new_tokens=60))
    greedy = TINY.tokenizer.decode([*ids, *new], skip_special_tokens=True)
    assert finish_stories(live) == [greedy, greedy]

    live.fill("#temperature", "0.7")
    assert finish_stories(live) == [first, second]  # the random numbers are the same


def test_a_change_marks_a_story_that_is_being_written(live: Page) -> None:
    live.click("#continue")
    live.wait_for_function("() => /Writing/.test(document.getElementById('story-words').textContent)")
    # Without the new question, the earlier question's answers arrive; they must not remove the mark.
    live.evaluate("usual = setTimeout; window.setTimeout = () => 0")
    assert change(live, "temperature", "1.2")[0] == ["right", "wrong"]
    live.wait_for_timeout(500)
    assert live.locator(".story.old").count() == 2
    live.evaluate("window.setTimeout = usual; tell()")
    first = finish_stories(live)
    live.fill("#temperature", "0.7")
    live.fill("#temperature", "1.2")  # back within the pause
    assert finish_stories(live) == first


def test_a_story_of_another_text_does_not_stay(live: Page) -> None:
    live.click("#continue")
    finish_stories(live)
    assert change(live, "text", "A king")[0] == ["right", "wrong"]
    assert all(story.startswith("A king") for story in finish_stories(live))


def test_a_text_without_room_for_a_story_replaces_the_story(live: Page) -> None:
    live.click("#continue")
    finish_stories(live)
    live.fill("#text", " ".join([SEA] * 20))  # 320 tokens are the model's limit
    assert all(story.startswith(f"{SEA} {SEA}") for story in finish_stories(live))


def test_a_bug_changes_the_story(live: Page) -> None:
    live.select_option("#bug", "norm-without-one")
    live.click("#continue")
    right, wrong = finish_stories(live)
    assert len(right) > 120
    assert len(wrong) > 120
    assert right != wrong
    assert "norms multiply by w" in live.inner_text("#status")


def test_the_page_is_drawn_before_the_weights_are_read(browser: Browser, file: Path) -> None:
    page = browser.new_page()
    page.add_init_script("""new MutationObserver(() => {
        if (!window.predicted && document.querySelector('#next code')) window.predicted = performance.now(); })
      .observe(document, {subtree: true, childList: true})""")
    page.goto(file.as_uri())
    page.wait_for_selector("#next code")
    drawn = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert drawn < page.evaluate("predicted") / 2  # it is a tenth of the time
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


def test_a_window_that_becomes_narrow(browser: Browser, file: Path) -> None:
    """The page is not wider than the window before the large map is drawn again."""
    page = browser.new_page(viewport={"width": 700, "height": 900})
    page.add_init_script("addEventListener('resize', event => event.stopImmediatePropagation())")
    page.goto(file.as_uri())
    page.wait_for_selector("#next code")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
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
