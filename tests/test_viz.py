"""The pictures: what is drawn are the numbers that were handed in, labelled, and no text is cut off."""

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib import pyplot as plt

import refgemma
from refgemma import viz

plt.switch_backend("agg")

TINY = refgemma.load("tiny")
IDS = TINY.tokenizer.encode("Once upon a time there was a little princess")
TOKENS = TINY.tokenizer.convert_ids_to_tokens(IDS)
NAMES = TINY.tokenizer.convert_ids_to_tokens(range(TINY.config.vocab_size))
RUN = refgemma.forward([IDS], TINY.weights, TINY.config)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_an_attention_map_shows_the_probabilities_of_its_head() -> None:
    probs = RUN.layers[3].attention.probs[0, 2]
    axes = viz.attention_map(probs, TOKENS)
    assert np.array_equal(axes.images[0].get_array(), probs)
    assert [label.get_text() for label in axes.get_xticklabels()] == [viz.shown(token) for token in TOKENS]


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
    sizes = axes.lines[4].get_ydata()
    assert sizes[0] == pytest.approx(np.sqrt(np.mean(RUN.embedded[0, 4].astype(float) ** 2)), rel=1e-6)
    assert sizes[-1] == pytest.approx(np.sqrt(np.mean(RUN.layers[-1].out[0, 4].astype(float) ** 2)), rel=1e-6)


def test_the_lens_ends_in_the_answer_of_the_model() -> None:
    axes = viz.logit_lens(viz.lens_logits(RUN, TINY.weights, TINY.config)[:, 0], TOKENS, NAMES)
    answers = [viz.shown(NAMES[best])[:9] for best in RUN.logits[0].argmax(axis=-1)]
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
    """One of each kind, with labels as long as they come."""
    window = TINY.config.sliding_window
    long = TINY.tokenizer.encode("The little girl looked at the moon, " * 12)[: window + 12]
    run = refgemma.forward([long], TINY.weights, TINY.config)
    return {
        "attention": viz.attention_map(RUN.layers[3].attention.probs[0, 2], TOKENS, title="layer 3, head 2"),
        "attention in a window": viz.attention_map(
            run.layers[0].attention.probs[0, 1], TINY.tokenizer.convert_ids_to_tokens(long), window
        ),
        "one query": viz.attention_map(RUN.layers[3].attention.probs[0, 2, -1:], TOKENS),
        "mask": viz.mask_picture(np.tri(40, 60, dtype=bool), np.arange(40), np.arange(60)),
        "phases": viz.rotary_phases(np.arange(300), 32),
        "norms": viz.residual_norms(RUN, TOKENS),
        "norms of many tokens": viz.residual_norms(run, TINY.tokenizer.convert_ids_to_tokens(long)),
        "lens": viz.logit_lens(viz.lens_logits(RUN, TINY.weights, TINY.config)[:, 0], TOKENS, NAMES),
        "caps": viz.cap_curves(),
        "rounding": viz.rounding_growth({"float32": RUN}, refgemma.forward([IDS], *double())),
        "likeliest": viz.likeliest(RUN.logits[0, -1], NAMES),
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


def test_special_characters_of_tokens_are_shown() -> None:
    assert viz.shown("\u2581a\n") == "·a⏎"
