"""Test the pictures: they show the given numbers with labels, and no text is cut off."""

import base64
import html
import json
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import IPython
import ipywidgets
import numpy as np
import pytest
import treescope
from matplotlib import pyplot as plt

import refgemma
from refgemma.teach import viz

plt.switch_backend("agg")

TINY = refgemma.load("tiny")
IDS = TINY.tokenizer.encode("Once upon a time there was a little princess")
TOKENS = TINY.tokenizer.convert_ids_to_tokens(IDS)
NAMES = TINY.tokenizer.convert_ids_to_tokens(range(TINY.config.vocab_size))
RUN = refgemma.forward([IDS], TINY.weights, TINY.config)
SEQ = len(IDS)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_an_attention_map_shows_the_probabilities_of_its_head() -> None:
    probs = RUN.layers[3].attention.probs[0, 2]
    axes = viz.attention_map(probs, TOKENS)
    assert np.array_equal(axes.images[0].get_array(), probs)
    assert [label.get_text() for label in axes.get_xticklabels()] == [viz.show_blanks(token) for token in TOKENS]


@pytest.mark.parametrize(("seq", "keys", "window"), [(9, 9, 3), (2, 9, 4), (1, 9, 5)])
def test_the_window_is_drawn_between_what_is_seen_and_what_is_not(seq: int, keys: int, window: int) -> None:
    q_places, k_places = np.arange(keys - seq, keys), np.arange(keys)
    seen = refgemma.ops.sliding_mask(q_places, k_places, window)
    axes = viz.attention_map(seen / seen.sum(axis=-1, keepdims=True), ["x"] * keys, window)
    x, y = axes.lines[0].get_data()
    for query in range(seq):
        edge = x[2 * query]
        assert (y[2 * query], y[2 * query + 1], x[2 * query + 1]) == (query - 0.5, query + 0.5, edge)
        first = int(np.argmax(seen[query]))
        if edge > -0.5:  # a line left of the first key hides nothing
            assert first - 1 < edge < first


def test_a_window_that_holds_all_keys_is_not_drawn() -> None:
    assert len(viz.attention_map(np.eye(4), ["x"] * 4, window=4).lines) == 0


def test_what_the_cap_takes_is_drawn_on_the_keys_that_are_seen() -> None:
    layer = RUN.layers[3].attention
    taken = (layer.scores - layer.capped)[0, 2]
    axes = viz.attention_map(layer.probs[0, 2], TOKENS, taken=taken)
    (dots,) = axes.collections
    places = dots.get_offsets().astype(int)
    assert {tuple(place) for place in places.tolist()} == {
        (key, query) for query in range(SEQ) for key in range(query + 1)
    }
    right = np.array([abs(taken[query, key]) for key, query in places])
    assert np.allclose(dots.get_sizes() / dots.get_sizes().max(), right / right.max())
    assert axes.get_legend().get_texts()[0].get_text() == f"reduced by the cap, at most {right.max():.2g}"


def test_a_mask_picture_has_the_places_for_labels() -> None:
    q_places, k_places = np.array([5, 6]), np.arange(3, 7)
    axes = viz.mask_picture(refgemma.ops.sliding_mask(q_places, k_places, 2), q_places, k_places)
    assert np.array_equal(axes.collections[0].get_array(), [[0, 1, 1, 0], [0, 0, 1, 1]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "4", "5", "6"]


def test_rotary_phases_are_cosines_of_position_times_frequency() -> None:
    drawn = viz.rotary_phases(np.arange(50), head_dim=8, theta=100.0).images[0].get_array()
    angles = np.arange(50) * 100.0 ** (-np.arange(4)[:, None] / 4)
    assert drawn.shape == (4, 50)
    assert np.allclose(drawn, np.cos(angles), atol=1e-5)  # float32 angles up to 49: 49 ulp of 2**-24 and their cosine


def test_residual_norms_have_a_line_a_token() -> None:
    axes = viz.residual_norms(RUN, TOKENS)
    assert len(axes.lines) == len(IDS)
    *before, last = [line.get_color() for line in axes.lines]
    assert {*before} == {"darkgrey"}
    assert last != "darkgrey"
    last_label = f"{len(IDS) - 1} {viz.show_blanks(TOKENS[-1])}, the last token"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["tokens before", last_label]
    sizes = axes.lines[4].get_ydata()
    assert sizes[0] == pytest.approx(np.sqrt(np.mean(RUN.embedded[0, 4].astype(float) ** 2)), rel=1e-6)
    assert sizes[-1] == pytest.approx(np.sqrt(np.mean(RUN.layers[-1].out[0, 4].astype(float) ** 2)), rel=1e-6)


def test_the_lens_ends_in_the_answer_of_the_model() -> None:
    axes = viz.logit_lens(viz.lens_logits(RUN, TINY.weights, TINY.config)[:, 0], TOKENS, NAMES)
    answers = [viz.show_blanks(NAMES[best])[:9] for best in RUN.logits[0].argmax(axis=-1)]
    assert [text.get_text() for text in axes.texts[-len(IDS) :]] == answers


def test_cap_curves_stay_below_their_caps_and_are_steep_at_zero() -> None:
    for line, cap in zip(viz.cap_curves([50.0, 30.0]).lines[2:], (50.0, 30.0), strict=True):
        x, y = line.get_data()
        assert np.all(np.abs(y) < cap)
        middle = len(x) // 2
        assert (y[middle + 1] - y[middle]) / (x[middle + 1] - x[middle]) == pytest.approx(1, abs=1e-3)


def test_rounding_grows_from_bfloat16_to_float32() -> None:
    models = {dtype: refgemma.load("tiny", dtype) for dtype in ("bfloat16", "float32", "float64")}
    runs = {dtype: refgemma.forward([IDS], model.weights, model.config) for dtype, model in models.items()}
    axes = viz.rounding_growth({name: runs[name] for name in ("bfloat16", "float32")}, runs["float64"])
    rough, fine = (line.get_ydata() for line in axes.lines)
    # float32 carries 2**16 times as many digits, and both runs take the same operations.
    assert np.all(np.array(rough[1:]) > 2**13 * np.array(fine[1:]))
    assert np.all(np.array(rough[1:]) < 2**19 * np.array(fine[1:]))


def pictures() -> dict[str, viz.Axes]:
    """Return one picture of each kind, with the longest labels."""
    window = TINY.config.sliding_window
    long = TINY.tokenizer.encode("The little girl looked at the moon, " * 12)[: window + 12]
    run = refgemma.forward([long], TINY.weights, TINY.config)
    return {
        "attention": viz.attention_map(RUN.layers[3].attention.probs[0, 2], TOKENS, title="layer 3, head 2"),
        "attention in a window": viz.attention_map(
            run.layers[0].attention.probs[0, 1], TINY.tokenizer.convert_ids_to_tokens(long), window
        ),
        "attention and cap": viz.attention_map(
            RUN.layers[3].attention.probs[0, 2], TOKENS, taken=np.ones((SEQ, SEQ), np.float32)
        ),
        "one query": viz.attention_map(RUN.layers[3].attention.probs[0, 2, -1:], TOKENS),
        "mask": viz.mask_picture(np.tri(40, 60, dtype=bool), np.arange(40), np.arange(60)),
        "phases": viz.rotary_phases(np.arange(300), 32),
        "norms": viz.residual_norms(RUN, TOKENS),
        "norms of many tokens": viz.residual_norms(run, TINY.tokenizer.convert_ids_to_tokens(long)),
        "lens": viz.logit_lens(viz.lens_logits(RUN, TINY.weights, TINY.config)[:, 0], TOKENS, NAMES),
        "caps": viz.cap_curves(),
        "rounding": viz.rounding_growth({"float32": RUN}, refgemma.forward([IDS], *double())),
        "most likely tokens": viz.most_likely_tokens(RUN.logits[0, -1], NAMES),
    }


def double() -> tuple[refgemma.Weights, refgemma.Gemma2Config]:
    model = refgemma.load("tiny", "float64")
    return model.weights, model.config


def test_no_text_is_cut_off() -> None:
    for name, axes in pictures().items():
        figure = axes.figure
        figure.canvas.draw()
        page = figure.bbox.padded(1)
        texts = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):  # matplotlib draws no label of a tick that lies outside
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        for text in texts:
            if text.get_visible() and text.get_text():
                box = text.get_window_extent()
                assert page.x0 <= box.x0 <= box.x1 <= page.x1, (name, text.get_text())
                assert page.y0 <= box.y0 <= box.y1 <= page.y1, (name, text.get_text())
        assert axes.get_xlabel(), name
        assert axes.get_title(), name


# --- what can be moved and pointed at ---------------------------------------------------------------------------------


class Screen:
    """Records what a notebook would show: displayed objects, and replacements of the first figure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, somebody: bool) -> None:
        self.displayed: list[Any] = []
        self.updates: list[Any] = []
        kernel = SimpleNamespace(_allow_stdin=somebody)
        monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
        monkeypatch.setattr("IPython.display.display", self.display)

    def display(self, shown: Any, display_id: bool = False) -> Any:
        self.displayed.append(shown)
        return SimpleNamespace(update=self.updates.append) if display_id else None


def layer_map(layer: int, head: int) -> viz.Axes:
    return viz.attention_map(RUN.layers[layer].attention.probs[0, head], TOKENS)


def test_moving_a_slider_draws_the_other_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, somebody=True)
    first = viz.with_sliders(layer_map, layer=range(6), head=range(6))
    figure, box = screen.displayed
    assert figure is first.figure
    assert np.array_equal(first.images[0].get_array(), RUN.layers[0].attention.probs[0, 0])
    layer, head = box.children
    assert isinstance(layer, ipywidgets.SelectionSlider)
    assert (layer.description, head.description) == ("layer", "head")
    layer.value = 3
    head.value = 2
    drawn = [figure.axes[0].images[0].get_array() for figure in screen.updates]
    assert np.array_equal(drawn[0], RUN.layers[3].attention.probs[0, 0])
    assert np.array_equal(drawn[1], RUN.layers[3].attention.probs[0, 2])
    assert plt.get_fignums() == []  # none is left for Jupyter to show a second time


def test_without_anybody_to_move_them_there_are_no_sliders(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, somebody=False)
    axes = viz.with_sliders(layer_map, layer=[4, 5], head=[1])
    assert screen.displayed == []
    assert plt.get_fignums() == [axes.figure.number]
    assert np.array_equal(axes.images[0].get_array(), RUN.layers[4].attention.probs[0, 1])


@pytest.mark.parametrize("missing", ["ipywidgets", "IPython"])
def test_without_the_packages_the_picture_stands(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, somebody=True)
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    axes = viz.with_sliders(layer_map, layer=[4, 5], head=[1])
    assert screen.displayed == []
    assert np.array_equal(axes.images[0].get_array(), RUN.layers[4].attention.probs[0, 1])


def array_page(x: np.ndarray, axes: str) -> tuple[str, np.ndarray]:
    """Return the page of an array view, and the numbers in it."""
    page = html.unescape(treescope.render_to_html(viz.array_view(x, axes), compressed=False))
    (numbers,) = re.findall(r'"arrayBase64": "([^"]*)"', page)
    return page, np.frombuffer(base64.b64decode(numbers), "<f4")


def test_an_array_view_holds_the_numbers_and_the_names_of_the_axes() -> None:
    x = np.arange(24.0).reshape(2, 1, 3, 4) / 8
    page, numbers = array_page(x, "batch heads seq keys")
    assert np.array_equal(numbers, x.ravel())
    (across,), (down,) = (re.findall(rf'"{side}AxisSpecs": (\[.*?\])', page) for side in "xy")
    assert [axis["label"] for axis in json.loads(across)] == ["keys: 4", "heads: 1"]  # the inner one first
    assert [axis["label"] for axis in json.loads(down)] == ["seq: 3", "batch: 2"]
    shown_at_once = viz.array_view(x, "batch heads seq keys")._repr_html_()
    assert not re.search(r"(src|href)=|fetch\(|import\(", shown_at_once)  # it needs no network


def test_half_precision_has_an_array_view() -> None:
    _, numbers = array_page(refgemma.bf16([1 / 3, 1.0]), "keys")
    assert numbers.tolist() == [0.333984375, 1.0]


def test_an_array_view_wants_a_name_for_each_axis() -> None:
    with pytest.raises(ValueError, match=r"has 2 names \(seq keys\); the array has 3 axes"):
        viz.array_view(np.zeros((1, 2, 3)), "seq keys")


def test_special_characters_of_tokens_are_shown() -> None:
    assert viz.show_blanks("\u2581a\n") == "·a⏎"


def test_a_former_name_says_what_it_is_now() -> None:
    with pytest.raises(AttributeError, match=r"refgemma\.teach\.viz\.likeliest is now .*\.most_likely_tokens"):
        viz.likeliest  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        viz.nothing  # noqa: B018
