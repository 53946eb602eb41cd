"""Measure the claims of the notebooks: statements on the models in their prose and answers.

Each test quotes the sentences that it measures, so that a changed sentence needs a changed test.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import errors as hypothesis_errors
from notebook_cells import BY_NUMBER, SOURCES, after, answers, prose

import refgemma
from refgemma import layers, ops
from refgemma.generation import processors
from refgemma.generation.greedy import greedy
from refgemma.goldens import verify
from refgemma.precision import bf16, f16, wide
from refgemma.teach import exercises, viz
from refgemma.weights.parameters import tensor_shapes

pytestmark = pytest.mark.slow

TINY = refgemma.load("tiny")
CONFIG, WEIGHTS = TINY.config, TINY.weights
SEA = "There was once a little princess who lived in a great castle by the sea."
QUOTES: list[tuple[int, str]] = []
# Answers that explain and say nothing of a model that could be measured.
EXPLANATIONS = [
    (5, "A query is used only once, when its token looks."),
    (8, "The same seed gives the same text again"),  # tests/test_decode.py measures it
    (10, "The weights are read once for all texts."),  # benchmarks/run.py measures it
]

Test = Callable[..., None]


def claim(notebook: int, *quotes: str) -> Callable[[Test], Test]:
    """Name the sentences of a notebook that a test measures; they must occur in the notebook."""
    QUOTES.extend((notebook, quote) for quote in quotes)
    return lambda test: test


def test_each_quoted_sentence_stands_in_its_notebook() -> None:
    assert [(number, quote) for number, quote in [*QUOTES, *EXPLANATIONS] if quote not in prose(number)] == []


def unmeasured(number: int, found: list[str]) -> list[str]:
    quotes = [quote for at, quote in [*QUOTES, *EXPLANATIONS] if at == number]
    return [answer for answer in found if not any(quote in answer for quote in quotes)]


@pytest.mark.parametrize("number", BY_NUMBER)
def test_each_answer_is_measured(number: int) -> None:
    assert unmeasured(number, answers(number)) == []


def test_an_answer_that_nobody_measures_is_seen() -> None:
    assert unmeasured(2, ["Attention sinks have a value of zero."]) != []


def degrees(a: Any, b: Any) -> Any:
    return np.degrees(np.arccos(np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))


def run_tiny(text: str) -> tuple[list[int], refgemma.Forward]:
    ids = TINY.tokenizer.encode(text)
    return ids, refgemma.forward([ids], WEIGHTS, CONFIG)


def pieces(text: str) -> list[str]:
    return TINY.tokenizer.convert_ids_to_tokens(TINY.tokenizer.encode(text))[1:]


# --- every notebook ---------------------------------------------------------------------------------------------------


@claim(1, "A frequent word is one token; a rare word is several tokens.")
def test_the_example_texts_have_a_token_for_each_word() -> None:
    for text in (SEA, "The little girl looked at the", "There was once a king who had a beautiful daughter."):
        assert "".join(pieces(text)).replace("▁", " ") == text
        assert len(pieces(text)) == len(text.replace(".", " .").split())


def test_no_notebook_has_an_example_that_falls_apart() -> None:
    assert [path.name for path in SOURCES if "Once upon" in path.read_text("utf-8")] == []


# --- 1 ----------------------------------------------------------------------------------------------------------------


@claim(
    1,
    "Eight, after <code>&lt;bos&gt;</code>.",
    "<code>l</code>, <code>ittle</code>",
    "The first token of every text is `<bos>`",
)
def test_01_rare_names_fall_into_pieces() -> None:
    assert len(pieces(" Rumpelstiltskin")) == 8
    assert pieces(" little") == ["▁little"]
    assert pieces("little") == ["l", "ittle"]
    assert after(1, "ids = tiny.tokenizer.encode").tokens[0] == "<bos>"


@claim(
    1,
    "It has 2.9 million trained numbers",
    "The model knows 2048 pieces of text.",
    "(234 here, 3584 in the 9B)",
    "6 here, 42 in the 9B",
    "`intermediate` numbers (408 here)",
)
def test_01_sizes() -> None:
    nine = refgemma.Gemma2Config.preset("9b")
    assert round(sum(np.prod(shape) for shape in tensor_shapes(CONFIG).values()) / 1e6, 1) == 2.9
    assert (CONFIG.vocab_size, CONFIG.hidden_size, CONFIG.intermediate_size) == (2048, 234, 408)
    assert (nine.hidden_size, nine.num_hidden_layers, CONFIG.num_hidden_layers) == (3584, 42, 6)
    assert CONFIG.final_logit_softcapping == 30


@claim(
    1,
    "here 15.3? The rows of this text have lengths of about 0.7.",
    "a typical number has the size $0.7/\\sqrt{234} = 0.04$",
    "the first block adds numbers of a typical size of 1.2",
    "The factor brings the row's numbers to a size of about 0.7",
)
def test_01_the_embedding_scale() -> None:
    names = after(1, "run = refgemma.forward")
    size = viz.root_mean_square
    assert np.sqrt(names.hidden) == pytest.approx(15.3, abs=0.05)
    assert np.linalg.norm(names.rows, axis=1) == pytest.approx(0.69, abs=0.07)
    assert size(names.rows) == pytest.approx(0.04, abs=0.01)
    assert 0.7 / np.sqrt(234) == pytest.approx(0.04, abs=0.01)
    assert size(names.h0) == pytest.approx(0.69, abs=0.07)
    assert size(names.run.layers[0].out[0] - names.h0) == pytest.approx(1.2, abs=0.15)


@claim(1, "here the additions do not cancel out: the stream grows", "so its result has the RMS 1")
def test_01_the_record_is_the_computation() -> None:
    names = after(1, "fed = ops.linear")
    assert np.array_equal(names.run.embedded[0], names.h0)
    assert np.array_equal(names.fed, names.block.feed_forward.out)
    normed = names.x / (1 + names.layer.pre_feedforward_layernorm)
    assert np.allclose(viz.root_mean_square(normed), 1, atol=1e-4)
    raw = after(1, "raw = run.norm")
    assert np.allclose(ops.soft_cap(raw.raw, 30.0), raw.run.logits, atol=1e-4)
    assert np.isclose(raw.probs.sum(), 1)
    sizes = viz.root_mean_square(viz.residual_streams(names.run))[:, 0]
    assert (sizes[-1] > 2 * sizes[0]).all()
    shapes = after(1, "shapes = {name").shapes
    assert list(shapes)[:3] == ["cos", "sin", "embedded"]
    assert list(shapes)[-1] == "logits"


@claim(1, "The simplest choice is the most likely token, which is called **greedy**")
def test_01_greedy() -> None:
    names = after(1, "longer = list(ids)")
    expected = list(greedy(names.ids, TINY.weights, CONFIG, max_new_tokens=8))
    assert names.longer[names.seq :] == expected


@claim(1, "GELU keeps positive numbers and makes negative ones small: 0.17 or less in size.")
def test_01_gelu() -> None:
    x = np.linspace(0, 20, 2001)
    assert -0.175 < ops.gelu_tanh(-x).min() < -0.165
    assert np.abs(ops.gelu_tanh(x) - x).max() < 0.18


@claim(
    1,
    "Block 2 adds half as much again as block 1 (1.52 and 1.02).",
    "But the line rises less in block 2 (0.56) than in block 1 (0.79).",
    "Five of the six vectors stand nearly at a right angle to the stream (75 to 90 degrees).",
    "points more in the direction of the stream (51 degrees)",
)
def test_01_additions_are_nearly_perpendicular() -> None:
    names = after(1, "angles = np.degrees")
    assert np.allclose(names.sizes[1:3], [1.02, 1.52], atol=0.005)
    assert np.allclose(names.rises[1:3], [0.79, 0.56], atol=0.005)
    assert round(names.angles[1]) == 51
    others = np.delete(names.angles, 1)
    assert others.min() > 75
    assert others.max() < 90
    # Pythagoras, and what is missing from it: the angle.
    before = viz.root_mean_square(names.stream[:-1])
    cosines = np.cos(np.radians(names.angles))
    expected = np.sqrt(before**2 + names.sizes**2 + 2 * before * names.sizes * cosines)
    assert np.allclose(expected, viz.root_mean_square(names.stream[1:]), rtol=1e-4)


@claim(
    1,
    "In the two lowest rows nearly all tokens predict *themselves*.",
    "<code>girl</code> predicts the byte token <code>&lt;0xE0&gt;</code>, whose row is three times as long",
)
def test_01_the_lowest_rows_predict_themselves() -> None:
    names = after(1, "lens = viz.lens_logits")
    best = names.lens[:2, 0].argmax(-1)
    assert (best == names.ids).sum() == 2 * len(names.ids) - 1
    assert np.array_equal(names.lens[-1], names.run.logits)
    assert (names.tokens[3], names.names[best[0, 3]]) == ("▁girl", "<0xE0>")
    lengths = np.linalg.norm(WEIGHTS.embed_tokens, axis=-1)
    assert 3 < lengths[best[0, 3]] / lengths[names.ids[3]] < 3.5


# --- 2 ----------------------------------------------------------------------------------------------------------------


@claim(
    2,
    "Query heads 0, 1, 2 look at key head 0, and 3, 4, 5 at key head 1.",
    "256 in the 2B and the 9B, equal to their `head_dim`, but 144 in the 27B, whose heads have 128 numbers",
    "There it is `hidden` divided by the number of heads, 4608 / 32. The tiny model follows the 27B: 234 / 6 = 39.",
    "The tiny model has 6 query heads, and only 2 key/value heads.",
)
def test_02_heads() -> None:
    names = after(2, "keys = ops.repeat_kv")
    heads = [
        next(k for k in range(2) if np.array_equal(names.keys[0, h], names.seen.attention.k_rot[0, k]))
        for h in range(6)
    ]
    assert heads == [0, 0, 0, 1, 1, 1]
    for size in ("2b", "9b"):
        small = refgemma.Gemma2Config.preset(size)
        assert small.query_pre_attn_scalar == small.head_dim == 256
    big = refgemma.Gemma2Config.preset("27b")
    assert (big.query_pre_attn_scalar, big.head_dim) == (144, 128)
    assert (big.hidden_size, big.num_attention_heads) == (4608, 32)
    assert (CONFIG.query_pre_attn_scalar, CONFIG.hidden_size) == (39, 234)


@claim(2, "Masked keys get the probability 0.", "Every query averages the values of the keys that it sees")
def test_02_the_record_is_the_computation() -> None:
    names = after(2, "side_by_side = mixed")
    seen = names.seen.attention
    assert np.array_equal(names.q, seen.q)
    assert np.allclose(names.scores, seen.scores, atol=1e-4)
    assert np.array_equal(names.probs, seen.probs)
    assert np.allclose(names.probs.sum(axis=-1), 1, atol=1e-6)
    assert (np.triu(names.probs[0], 1) == 0).all()
    assert np.allclose(names.out, seen.out, atol=1e-5)
    assert CONFIG.num_attention_heads * CONFIG.head_dim == 192 != CONFIG.hidden_size


@claim(
    2,
    "Two of the six query heads, 1 and 4,",
    "in the 9B it would be 14 of 16",
    "less likely, by a factor of 0.72 on (geometric) average",
)
def test_02_tiled_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    owners, tiled = np.repeat([0, 1], 3), np.tile([0, 1], 3)
    assert np.nonzero(owners != tiled)[0].tolist() == [1, 4]
    assert (np.repeat(np.arange(8), 2) != np.tile(np.arange(8), 2)).sum() == 14
    ids, run = run_tiny(SEA)
    monkeypatch.setattr(layers, "repeat_kv", lambda x, groups: np.tile(x, (1, groups, 1, 1)))
    _, wrong = run_tiny(SEA)
    assert np.exp(loss(run, ids) - loss(wrong, ids)) == pytest.approx(0.72, abs=0.005)


def loss(run: refgemma.Forward, ids: list[int]) -> float:
    scores = refgemma.log_softmax(wide(run.logits[0]))
    return float(-scores[np.arange(len(ids) - 1), ids[1:]].mean())


@claim(
    2,
    "More than 90 % of a row goes to its best key, on average over the heads of this block; with the constant it "
    "is 69 %.",
)
def test_02_without_the_constant() -> None:
    names = after(2, "scores = seen.attention.q_rot @")
    mask = np.tri(names.seq, dtype=bool)[None, None]
    shares = [ops.softmax(names.scores * np.float32(f), mask)[0, :, 1:].max(-1).mean() for f in (1, np.sqrt(39))]
    assert shares[0] == pytest.approx(0.69, abs=0.005)
    assert shares[1] > 0.9


@claim(
    2,
    "Head 0 of block 2 mostly looks at the token just before (80 % of its attention). Head 0 of block 3 looks at "
    "`<bos>` (94 %).",
    "from `·great`, this head looks at all earlier tokens",
)
def test_02_patterns() -> None:
    names = after(2, "habits = {")
    to_bos = names.habits["<bos>"][3, 0]
    assert names.tokens[1 + to_bos.argmin()] == "▁great"
    assert to_bos.min() < 0.2
    assert np.delete(to_bos, to_bos.argmin()).min() > 0.9
    habits = {name: shares.mean(axis=-1) for name, shares in after(2, "habits = {").habits.items()}
    assert habits["the token before"][2, 0] == pytest.approx(0.80, abs=0.005)
    assert habits["<bos>"][3, 0] == pytest.approx(0.94, abs=0.005)
    assert habits["the token before"].argmax() == 2 * 6
    assert habits["<bos>"].argmax() == 3 * 6


@claim(
    2,
    "but without this head only 3 % of the probability moves. Head 4 of block 2 matters most, with 16.5 %.",
    "its length is 4.85, and the other values have a mean of 4.75",
    "its value is the same vector in every text",
)
def test_02_the_value_of_bos_is_not_small_and_not_used() -> None:
    moved = after(2, "moved = np.zeros").moved
    assert round(100 * moved[3, 0]) == 3
    assert moved.argmax() == 2 * 6 + 4
    assert moved[2, 4] == pytest.approx(0.165, abs=0.0005)
    lengths = np.linalg.norm(run_tiny(SEA)[1].layers[3].attention.v[0, 0], axis=-1)
    assert lengths[0] == pytest.approx(4.85, abs=0.005)
    assert lengths[1:].mean() == pytest.approx(4.75, abs=0.005)
    for one, other in zip(run_tiny(SEA)[1].layers, run_tiny("The little girl looked at the")[1].layers, strict=True):
        assert np.allclose(one.attention.v[0, :, 0], other.attention.v[0, :, 0], atol=1e-5)


# --- 3 ----------------------------------------------------------------------------------------------------------------


@claim(
    3,
    "A rotation does not change the length.",
    "their dot product depends only on $\\varphi - \\psi$",
    "a dot product is the two lengths times the cosine of the angle between the points",
    "Along a diagonal the distance is constant, and so is the score.",
)
def test_03_rotation() -> None:
    names = after(3, "products = [turn")
    assert np.isclose(np.linalg.norm(names.turn(names.query, 1.0)), np.linalg.norm(names.query))
    assert np.allclose(names.products, names.products[0])
    between = degrees(names.turn(names.query, 2.0), names.turn(names.key, 1.5)) - degrees(names.query, names.key)
    assert np.isclose(abs(between), np.degrees(0.5))
    scores = after(3, "scores = (ops.rotate").scores
    assert np.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-4)


@claim(
    3,
    "The last one rotates by 0.00018 radian per token here (0.00011 with the 256 numbers of the 9B's heads)",
    "over 320 tokens the last pair rotates by only 3 degrees",
    "The first pair rotates by one radian per token",
)
def test_03_speeds() -> None:
    speeds = after(3, "speeds = theta").speeds
    assert speeds[0] == 1
    assert speeds[-1] == pytest.approx(0.00018, abs=5e-6)
    nine = refgemma.Gemma2Config.preset("9b")
    assert nine.head_dim == 256
    assert nine.rope_theta ** -(254 / 256) == pytest.approx(0.00011, abs=5e-6)
    assert round(np.degrees(320 * speeds[-1])) == 3
    assert CONFIG.max_position_embeddings == 320


@claim(3, "Every angle is in them twice, at $i$ and at $i + \\mathrm{head\\_dim}/2$")
def test_03_tables() -> None:
    names = after(3, "positions = np.arange(12)")
    assert np.array_equal(names.cos[..., :16], names.cos[..., 16:])
    assert np.allclose(names.cos[0, 0, :, :16], np.cos(names.positions[0][:, None] * names.speeds), atol=1e-5)
    turned = after(3, "rotated = ops.rotate")
    assert np.allclose(np.linalg.norm(turned.rotated, axis=-1), np.linalg.norm(turned.x, axis=-1), rtol=1e-5)


@claim(3, "No. The query and the key determine how it depends on the distance.")
def test_03_a_score_may_rise_with_the_distance() -> None:
    assert (np.diff(after(3, "scores = (ops.rotate").scores[:, 0]) > 0).any()


@claim(
    3,
    "8 bits cannot distinguish 8000 from 8015, which is more than two turns further.",
    "by up to 6e-8 of its value",
    "No speed is above 1, so it is at most 8000 · 6e-8, or half a thousandth.",
)
def test_03_angles_need_float32() -> None:
    assert bf16(8000) == bf16(8015)
    assert 15 / (2 * np.pi) > 2
    speeds = 10000.0 ** -(np.arange(0, 256, 2) / 256)
    errors = np.abs(speeds.astype(np.float32) - speeds)
    assert (errors / speeds).max() < 6e-8
    assert 1e-4 < 8000 * errors.max() < 5e-4
    names = after(3, "far = np.arange")
    assert np.abs(names.in_float32 - names.exact).max() < 1e-6
    assert np.abs(names.in_bfloat16 - names.exact).max() > 1


# --- 4 ----------------------------------------------------------------------------------------------------------------


@claim(4, "at 8.7 for the scores and 5.2 for the logits", "never beyond")
def test_04_one_percent() -> None:
    for cap, x in ((50, 8.7), (30, 5.2)):
        assert ops.soft_cap(np.array([x]), cap)[0] / x == pytest.approx(0.99, abs=2e-4)
    bent = after(4, "bent = ops.soft_cap").bent
    assert (np.abs(bent) <= 50).all()
    assert (np.diff(bent) > 0).all()


@claim(
    4,
    "No score here reaches half of its cap",
    "It is the sink of notebook 2, a head that looks mostly at `<bos>`.",
    "so the most likely token becomes less likely",
)
def test_04_caps_of_the_tiny_model() -> None:
    names = after(4, "block, head, _, _ =")
    assert (names.block, names.head) == (3, 0)
    assert np.abs(names.scores).max() < 25
    shares = after(4, "best = np.argsort(-with_caps)")
    assert shares.with_caps[shares.best[0]] < 0.9 * shares.without_caps[shares.best[0]]
    assert np.abs(shares.plain.logits).max() < 25  # the logits without a cap
    caps = (CONFIG.attn_logit_softcapping, CONFIG.final_logit_softcapping)
    nine = refgemma.Gemma2Config.preset("9b")
    assert caps == (nine.attn_logit_softcapping, nine.final_logit_softcapping) == (50, 30)


@claim(4, "Not in exact arithmetic: the curve always rises", "two large logits may be rounded to the same number")
def test_04_the_order_stays() -> None:
    assert (np.diff(ops.soft_cap(np.linspace(-100, 100, 1001), 30.0)) > 0).all()
    assert ops.soft_cap(bf16(60.0), 30.0) == ops.soft_cap(bf16(62.0), 30.0)


@claim(4, "No probability could exceed 8 %", "has caps of 2 and 3 on purpose")
def test_04_a_cap_of_five() -> None:
    names = after(4, "def largest_probability")
    assert 0.075 < names.largest_probability(5.0, 256000) < 0.08
    assert names.largest_probability(30.0, 256000) > 1 - 1e-12
    bends = after(9, "about, _ = verify").config
    assert (bends.attn_logit_softcapping, bends.final_logit_softcapping) == (2, 3)


@claim(4, "e^-50, about 2e-22: such a test would not find it.")
def test_04_the_leak() -> None:
    names = after(4, "wrong = ops.softmax")
    assert (names.right[~names.mask] == 0).all()
    assert (names.wrong[~names.mask] > 0).all()
    assert np.exp(-50.0) == pytest.approx(2e-22, rel=0.1)


# --- 5 ----------------------------------------------------------------------------------------------------------------


@claim(
    5,
    "Place 2: three in both, because the window is not full yet. Place 9: ten in the full layer, and four in the "
    "sliding one.",
    "The window is 4096 tokens in the released models and 64 in the tiny one.",
    "a sliding layer comes first",
)
def test_05_masks() -> None:
    names = after(5, "sliding = ops.sliding_mask(places, places, window=4)")
    assert [[int(mask[place].sum()) for mask in (names.full, names.sliding)] for place in (2, 9)] == [[3, 3], [10, 4]]
    assert (refgemma.Gemma2Config.preset("9b").sliding_window, CONFIG.sliding_window) == (4096, 64)
    assert [CONFIG.is_sliding(n) for n in range(6)] == [True, False] * 3


@claim(5, "After two sliding layers, information can come from up to $2 (\\mathrm{window} - 1)$ places back.")
def test_05_reach() -> None:
    names = after(5, "def reach")
    assert [int(names.reach([names.window] * n)[-1].sum()) for n in (1, 2, 3)] == [1 + 3, 1 + 6, 1 + 9]


@claim(
    5,
    "The two agree up to rounding.",
    "So `window - 1` keys are enough, 63 here.",
    "Its logits differ from the 64th token on, but not before.",
)
def test_05_the_cache() -> None:
    names = after(5, "in_steps = np.concatenate")
    assert np.allclose(names.in_steps, names.whole.logits, atol=1e-4)
    assert [layer.keys.shape[2] for layer in names.cache] == [63, 90] * 3
    apart = after(5, "apart = np.abs").apart
    assert (apart[:63] == 0).all()
    assert apart[63] > 1e-3


@claim(5, "Only that it is at least 50.")
def test_05_short_texts_do_not_see_the_window() -> None:
    names = after(5, "whole = refgemma.forward")
    ids = names.ids[:50]
    right, same, less = (
        refgemma.forward([ids], WEIGHTS, CONFIG.changed(sliding_window=window)).logits for window in (64, 50, 49)
    )
    assert np.array_equal(right, same)
    assert not np.array_equal(right, less)


@claim(5, "A quarter: half of the layers keep half of the tokens.")
def test_05_saving() -> None:
    names = after(5, "def cache_bytes")
    full, both = (names.cache_bytes(names.nine, 8192, windows) for windows in (False, True))
    assert both / full == pytest.approx(0.75, abs=1e-3)


# --- 6 ----------------------------------------------------------------------------------------------------------------


@claim(
    6,
    "Before the factors, the output has the size 1 for an input of any usual size.",
    "at size 0.001 the right norm gives 0.71, and the wrong one 0.999",
    "the difference is in the seventh digit",
)
def test_06_the_norm() -> None:
    names = after(6, "y = x / np.sqrt")
    assert np.allclose(names.y, ops.rms_norm(names.x, names.w, CONFIG.rms_norm_eps), atol=1e-5)
    assert np.allclose(after(6, "factors = 10.0").sizes[-3:], 1, atol=1e-5)
    for size, right, wrong in ((1e-3, 0.71, 0.999), (1.0, 1.0, 1.0)):
        x = np.full(8, size)
        assert viz.root_mean_square(ops.rms_norm(x, np.zeros(8), 1e-6)) == pytest.approx(right, abs=0.005)
        assert size / (size + 1e-6) == pytest.approx(wrong, abs=5e-5)
    assert 1e-7 < abs(1 / np.sqrt(1 + 1e-6) - 1 / (1 + 1e-6)) < 1e-6


@claim(
    6,
    "The stream grows more than sevenfold, but each addition has a size between 0.5 and 1.3.",
    "the first block turns the last token's stream by 55 degrees, the last block by 12",
    "55, 21, 25, 12, 19 and 12",
)
def test_06_late_blocks_turn_less() -> None:
    names = after(6, "stream = viz.root_mean_square")
    assert 7 < names.stream[-1] / names.stream[0] < 8
    added = names.sizes[:, [1, 3]]
    assert added.min() > 0.45
    assert added.max() < 1.35
    stream = viz.residual_streams(names.run)[:, 0, -1]
    assert degrees(stream[1:], stream[:-1]).round().tolist() == [55, 21, 25, 12, 19, 12]


@claim(
    6,
    "In block 1 the factors after attention are about 0.9, but the result has the size 0.5.",
    "Column 53 of block 1 has the largest number for *every* token, but the smallest factor.",
    "The factor 0.09 then removes most of the number itself.",
    "for the last token to half the size",
    "The number is largest for <code>&lt;bos&gt;</code> (74).",
    "Here norm 2 stops them before the stream.",
)
def test_06_one_column_is_a_volume_control() -> None:
    names = after(6, "column = int(np.abs(raw[1]).argmax())")
    attention = names.run.layers[1].attention.out[0]
    assert names.column == 53
    assert (np.abs(attention).argmax(axis=-1) == 53).all()
    assert names.factors[1].argmin() == 53
    assert names.factors[1, 53] == pytest.approx(0.09, abs=0.005)
    assert np.median(names.factors[1]) == pytest.approx(0.9, abs=0.05)
    assert np.abs(attention[:, 53]).argmax() == 0
    assert attention[0, 53] == pytest.approx(74, abs=0.5)
    last = viz.root_mean_square(names.run.layers[1].post_attention_layernorm[0, -1])
    assert last == pytest.approx(0.5, abs=0.05)
    without = attention[-1].copy()  # a quiet column 53: the addition would be twice as large
    without[53] = np.median(np.abs(without))
    louder = viz.root_mean_square(ops.rms_norm(without, WEIGHTS.layers[1].post_attention_layernorm, 1e-6))
    assert louder / last == pytest.approx(1.8, abs=0.2)
    streams = np.abs(viz.residual_streams(names.run)[:, 0, :, 53])
    assert streams.max() < 10  # the column is ordinary in the stream


@claim(6, "the first additions would be much larger than the token's own vector")
def test_06_the_embedding_scale() -> None:
    names = after(6, "wrong = refgemma.forward")
    assert np.array_equal(names.run.embedded[0], names.scaled)
    first = viz.root_mean_square(names.run.layers[0].out[0] - names.run.embedded[0])
    assert (first > 10 * viz.root_mean_square(names.unscaled[0])).all()


@claim(
    6, "The 9B multiplies by 59.75 and not by", "This changes all later results by 0.2 %", "The 2B: 2304 is 48 squared."
)
def test_06_rounded_factors() -> None:
    assert bf16(np.sqrt(3584)) == 59.75
    assert 59.75 / np.sqrt(3584) == pytest.approx(1 - 0.002, abs=1e-4)
    exact = [name for name in ("2b", "9b", "27b")
             if float(bf16(width := np.sqrt(refgemma.Gemma2Config.preset(name).hidden_size))) == width]  # fmt: skip
    assert exact == ["2b"]


# --- 7 ----------------------------------------------------------------------------------------------------------------


@claim(7, "at most half an ulp, $2^{-8}$ in bfloat16", "256: the next bfloat16 number is 258")
def test_07_rounding() -> None:
    errors = after(7, "x = np.linspace(0.5, 8, 4001)").errors
    assert 2**-9 < errors["bfloat16"].max() <= 2**-8
    assert 2**-12 < errors["float16"].max() <= 2**-11
    assert bf16(1 + 2**-7) != 1
    assert bf16(1 + 2**-9) == 1
    total = bf16(0)
    for _ in range(300):
        total = total + bf16(1)
    assert float(total) == float(bf16(256) + bf16(1)) == 256
    assert float(np.nextafter(bf16(256), bf16(1000))) >= 256
    assert float(bf16(258)) == 258


@claim(7, "By one, rarely by two.", "its mean error is 0.6 of the other's")
def test_07_the_norm_that_rounds_once() -> None:
    names = after(7, "def norm_rounded_early")
    ulp = 2.0 ** (np.floor(np.log2(np.abs(wide(names.right)))) - 7)
    apart = np.abs(wide(names.right) - wide(names.early)) / ulp
    assert apart.max() == 2
    assert (apart == 2).sum() < 0.02 * (apart > 0).sum()
    exact = ops.rms_norm(wide(names.x).astype(float), wide(names.weight).astype(float), 1e-6)
    one, two = (np.abs(wide(y) - exact).mean() for y in (names.right, names.early))
    assert one / two == pytest.approx(0.6, abs=0.05)


@claim(
    7,
    "After the embedding, which is one product, it is about 50000. But after the first block it is only about 15000.",
    "the sum of 234 products has several times the error of a single rounding",
)
def test_07_float32_rounds_inside_a_sum() -> None:
    names = after(7, "depths = viz.residual_streams(exact)")
    quotient = names.errors["bfloat16"] / names.errors["float32"]
    assert 45_000 < quotient[0] < 55_000
    assert ((quotient[1:] > 7_000) & (quotient[1:] < 25_000)).all()  # the order of a sum is the BLAS's choice
    summed = viz.relative_error(ops.linear(names.x, names.weight), names.product)
    once = viz.relative_error(names.product.astype(np.float32), names.product)
    assert summed > 2 * once
    # The same in bfloat16: the error of the product is that of one rounding.
    x, weight = bf16(names.x), bf16(names.weight)
    exact = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T
    one = viz.relative_error(bf16(exact), exact)
    assert viz.relative_error(wide(ops.linear(x, weight)), exact) == pytest.approx(one, rel=0.01)


@claim(7, "Many mistakes do not change the most likely token.")
def test_07_the_most_likely_token_shows_little() -> None:
    # Mistakes that leave every most likely token of this text: no final cap, a window that the text does not fill,
    # eps of LayerNorm, an unrounded factor.
    ids, run = run_tiny(SEA)
    best = run.logits[0].argmax(-1)
    for change in ({"final_logit_softcapping": None}, {"attn_logit_softcapping": None}, {"sliding_window": 320},
                   {"rms_norm_eps": 1e-5}):  # fmt: skip
        wrong = refgemma.forward([ids], WEIGHTS, CONFIG.changed(**change)).logits[0]
        assert np.array_equal(wrong.argmax(-1), best), change


@claim(7, "A number above 65504 becomes infinity")
def test_07_large_numbers() -> None:
    names = after(7, "large = np.array")
    assert np.isinf(wide(names.in_half)).tolist() == [False, True, True]
    assert np.isfinite(wide(names.in_brain)).all()
    assert float(f16(65504)) == 65504


# --- 8 ----------------------------------------------------------------------------------------------------------------


@claim(8, "It always gives the same text, and small models soon repeat themselves.")
def test_08_greedy() -> None:
    names = after(8, "new = list(refgemma.generate")
    again = list(refgemma.generate(names.ids, WEIGHTS, CONFIG, max_new_tokens=40))
    assert names.new == again
    assert names.new[0] == int(names.logits[0, 0].argmax())
    text = TINY.tokenizer.decode(names.new)
    assert text.count("I am sure") >= 4


@claim(
    8,
    "At 0 the most likely token has probability 1, which is greedy decoding. At infinity all tokens are equally likely",
)
def test_08_limits_of_the_temperature() -> None:
    logits = after(8, "logits, cache = refgemma.next_token_logits").logits[:, 0]
    assert viz.probabilities(processors.divide(logits, 1e-3)).max() > 1 - 1e-6
    assert np.allclose(viz.probabilities(processors.divide(logits, 1e6)), 1 / 2048, rtol=1e-3)


@claim(
    8,
    "**top-p** draws from the smallest set of most likely tokens whose total probability is at least $p$",
    "The result has exactly the softmax's probabilities",
)
def test_08_top_p_and_noise() -> None:
    names = after(8, "kept_p = int")
    assert np.isfinite(processors.keep_top_p(names.logits[:, 0], 0.9)).sum() == names.kept_p
    drawn = after(8, "noise = -np.log")
    assert np.abs(drawn.counts - drawn.expected).max() < 5 * 0.5 / np.sqrt(20000)  # five standard deviations of a share


@claim(8, "log 2048 = 7.6 nats, a perplexity of 2048.")
def test_08_knowing_nothing() -> None:
    assert np.log(2048) == pytest.approx(7.6, abs=0.05)


# --- 9 ----------------------------------------------------------------------------------------------------------------


@claim(9, "Before the step there is only rounding.", "It never rejects a correct port.")
def test_09_the_step() -> None:
    names = after(9, "place = int(np.argmax")
    assert names.errors[: names.place].max(initial=0) < 1e-5 < names.errors[names.place]
    assert after(9, "bound = tolerance.linear").used.max() <= 1
    assert after(9, "result = verify.verify").result.conforms


@claim(
    9,
    "A limit that allows the largest of these errors misses mistakes in the most exact tensors.",
    "bfloat16 has an error of 0.4 % at each step",
)
def test_09_one_limit_is_not_enough() -> None:
    assert 2**-8 == pytest.approx(0.004, abs=1e-4)


@claim(
    9,
    "The window is one key too wide.",
    "Each query after the fifth sees one key more",
    "With <code>config.changed(sliding_window=6)</code> the forward pass gives the port's tensors.",
)
def test_09_the_bug() -> None:
    names = after(9, "place = int(np.argmax")
    assert names.order[names.place] == "layers.0.attention.probs"
    right, wrong = (trace["layers.0.attention.probs"] > 0 for trace in (names.recorded, names.trace))
    assert (wrong.sum(-1) - right.sum(-1))[0, 0].tolist() == [0] * 5 + [1] * 8
    _, golden = verify.load_golden("bends-forward-f32")
    run = refgemma.forward(golden["input_ids"], names.weights, names.config.changed(sliding_window=6))
    assert np.array_equal(run.logits, exercises.mystery_trace(1)["logits"])


# --- 10 ---------------------------------------------------------------------------------------------------------------


@claim(10, "3.2 billion instead of 2.6: with 256000 tokens the table is more than a fifth of the model.")
def test_10_parameters() -> None:
    names = after(10, "parts = {name: by_part")
    two = names.parts["2b"]
    assert names.total == {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}  # as published
    assert (names.total["2b"] + two["embedding"]) / 1e9 == pytest.approx(3.2, abs=0.05)
    assert two["embedding"] / names.total["2b"] > 1 / 5
    for name, config in names.sizes.items():
        feed = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
        assert names.parts[name]["feed-forward"] == feed


@claim(10, "the window of half of the layers is full, so they see no additional keys")
def test_10_the_curves_bend() -> None:
    names = after(10, "def attention_flops")
    config = names.sizes["9b"]
    steps = [names.attention_flops(config, n + 1) - names.attention_flops(config, n) for n in (4000, 5000)]
    assert steps[0] == 2 * steps[1]


@claim(10, "Reading 54 GB takes 18 seconds.", "1000 times 54 billion FLOPs", "without the 18 GB of a 9B")
def test_10_streaming() -> None:
    names = after(10, "one_by_one = refgemma.forward")
    assert np.array_equal(names.with_all.logits, names.one_by_one.logits)
    assert round(2 * names.total["27b"] / 1e9) == 54
    assert round(2 * names.total["27b"] / 3e9) == 18
    assert round(2 * names.total["9b"] / 1e9) == 18


# --- 11 ---------------------------------------------------------------------------------------------------------------


@claim(11, "In float32 it does reach it: tanh(20) is rounded to 1.")
def test_11_the_cap_is_reached() -> None:
    assert np.tanh(np.float32(20)) == 1
    assert ops.soft_cap(np.float32([1000]), 2.0)[0] == 2


@claim(11, "It has all three properties above!")
def test_11_cutting_off_passes_the_three_properties() -> None:
    cut_off = after(11, "def cut_off").cut_off
    x = np.linspace(-100, 100, 1001)
    assert (np.abs(cut_off(x, 30)) <= 30).all()
    assert np.array_equal(cut_off(-x, 30), -cut_off(x, 30))
    assert (np.diff(cut_off(x, 30)) >= 0).all()
    with pytest.raises((AssertionError, hypothesis_errors.HypothesisException)):
        after(11, "def test_bends_before_the_cap").test_bends_before_the_cap()


@claim(
    11,
    "Texts of 12 tokens never fill a window of 64.",
    "For example a model without rotation, or without caps.",
    "All changes must be on or below the diagonal.",
)
def test_11_a_consistent_model_may_be_wrong() -> None:
    names = after(11, "moved = np.zeros")
    assert (np.triu(names.moved, 1) < 1e-5).all()
    ids = names.ids
    plain = CONFIG.changed(attn_logit_softcapping=None, final_logit_softcapping=None)
    whole = refgemma.forward([ids], WEIGHTS, plain)
    first = refgemma.forward([ids[:4]], WEIGHTS, plain)
    second = refgemma.forward([ids[4:]], WEIGHTS, plain, cache=first.cache)
    assert np.allclose(np.concatenate([first.logits, second.logits], axis=1), whole.logits, atol=1e-3)
    assert not np.allclose(whole.logits, refgemma.forward([ids], WEIGHTS, CONFIG).logits, atol=0.1)
    short = [list(range(3, 15))]
    usual, wider = (refgemma.forward(short, WEIGHTS, CONFIG.changed(sliding_window=w)).logits for w in (64, 320))
    assert np.array_equal(usual, wider)


@claim(11, "Without the mistake, the model conforms:")
def test_a_port_of_ones_own_is_judged() -> None:
    last = after(11, "first at")
    assert last.report.verdict == "differs"
    assert last.report.first_divergence.tensor == "layers.0.attention.q_rot"
    story = exercises.play(rotate=last.rotate_neighbours, **last.mine)
    assert story.text != story.usual_text
    assert [part for part, feedback in story.feedback.items() if not feedback] == ["rotate"]


@claim(9, "The check looks for the wrong part and for its mistake.")
def test_the_diagnosis_of_the_answer_is_right() -> None:
    (answer,) = [text for text in answers(9) if "sliding_window=6" in text]
    assert exercises.check_diagnosis(1, answer)


# --- 12 ---------------------------------------------------------------------------------------------------------------


@claim(
    12,
    "the most frequent word of the tale. It needs two merges before: its parts are frequent in other words too.",
)
def test_12_the_first_word() -> None:
    names = after(12, "merges, frequencies = [], []")
    joined = ["".join(pair) for pair in names.merges]
    whole = [piece for piece in joined if piece in names.words and len(piece) > 2]
    assert whole[0] == "▁the" == names.words.most_common(1)[0][0]
    assert names.merges[joined.index("▁the")] == ("▁t", "he")
    assert {"▁t", "he"} < set(joined[: joined.index("▁the")])
    others = {word for word in names.words if not word.startswith("▁the") and ("▁t" in word or "he" in word)}
    assert len(others) > 20


@claim(
    12, "The first saves 206 tokens of 6013, the last saves 4.", "A merge makes the text shorter by the number of pairs"
)
def test_12_less_and_less_to_gain() -> None:
    names = after(12, "axes.plot(lengths)")
    assert (names.lengths[0], names.frequencies[0], names.frequencies[-1]) == (6013, 206, 4)
    assert np.array_equal(-np.diff(names.lengths), names.frequencies)


@claim(12, "the token at rank 100 occurs 4 times, and the law gives 1.2", "the counts are above the law")
def test_12_zipf() -> None:
    ranked = after(12, "ranked = np.sort").ranked
    assert (ranked[0], ranked[99]) == (120, 4)
    assert (ranked >= ranked[0] / np.arange(1, len(ranked) + 1)).all()


@claim(12, "Nine of 12. The first pairs are those of English")
def test_12_the_first_pieces() -> None:
    names = after(12, 'names.index("▁t")')
    joined = ["".join(pair) for pair in names.merges]
    first = names.names[names.first :]
    assert len(set(joined[:12]) & set(first[:12])) == 9
    assert len(set(joined[188:200]) & set(first[188:200])) < 3  # "Later pieces do"
    # The ids are in the order of the merges: each piece is joined from two that come before it.
    known = {piece for piece in names.names if len(piece) == 1}
    for piece in first:
        assert len(piece) == 1 or any({piece[:n], piece[n:]} <= known for n in range(1, len(piece))), piece
        known.add(piece)


@claim(12, "Gemma writes it as the bytes of its UTF-8 form, each a token of its own.")
def test_12_byte_fallback() -> None:
    snow = after(12, "snow = ").snow
    assert snow[-3:] == [f"<0x{byte:02X}>" for byte in "雪".encode()]
    assert TINY.tokenizer.decode(TINY.tokenizer.encode("The snow is 雪"), skip_special_tokens=True) == "The snow is 雪"


# --- 13 ---------------------------------------------------------------------------------------------------------------


def near(value: float, expected: float) -> bool:
    """Return True if a number is the one in the prose, in its last digit or in a thousandth: sums of float32 vary."""
    return bool(value == pytest.approx(expected, rel=1e-3, abs=0.05))


@claim(
    13,
    "No score here is above 34 and no logit above 25, so the caps have little to do.",
    "Without caps the tiny model is as good as with them.",
)
def test_13_the_caps_have_little_to_do() -> None:
    names = after(13, "largest = [float")
    assert near(names.results["Gemma 2"], 17.12)
    for name in ("no cap on the scores", "no cap on the logits", "no caps"):
        assert 1 - 1e-4 < names.results[name] / names.results["Gemma 2"] < 1.01
    assert 34 < max(names.largest) < 34.5
    assert 24 < np.abs(names.run.raw_logits).max() < 25


@claim(
    13,
    "Only QK-norm: it divides by the length of the query, so the factor has no effect.",
    "Without a limit, 99 % of the attention goes to one key.",
    "each query has 18 keys, on average, whose scores are within 0.1 of 50. The best key cannot stand out any more, "
    "and its share falls to 6 %.",
)
def test_13_what_limits_do_to_large_scores() -> None:
    names = after(13, "factors, best = ")
    assert np.ptp(names.best["QK-norm"]) < 1e-5
    assert round(100 * float(names.best["no limit"][-1])) == 99
    cap = names.best["soft cap 50"]
    assert cap[0] < cap[1] < cap[2] > cap[3] > cap[4]
    assert round(100 * float(cap[-1])) == 6
    equal = (ops.soft_cap(names.plain, 50.0) > 49.9) & names.mask
    assert round(float(equal[0, :, 64:].sum(-1).mean())) == 18


@claim(
    13,
    "A window of 16 keys is nearly as good as one of 64, but a window of 128 doubles the perplexity.",
    "The sliding blocks have never seen a key more than 63 places away",
    "even with six sliding blocks the perplexity rises only from 17.1 to 17.4.",
)
def test_13_windows() -> None:
    names = after(13, 'label="trained"')
    by_window = dict(zip(names.windows, names.curve, strict=True))
    assert by_window[16] < 1.03 * by_window[64]
    assert 1.9 < by_window[128] / by_window[64] < 2.1
    assert near(by_window[64], 17.1)
    assert near(names.results["sliding blocks only"], 17.4)
    assert names.results["full blocks only"] > 2 * by_window[64]


@claim(
    13,
    "The mean is better (32.5 against 35.3), as in the paper",
    "The model with six key heads gains nothing, because its heads are copies, but its cache is three times as large.",
)
def test_13_key_heads() -> None:
    names = after(13, "repeated = change_key_heads")
    assert near(names.results["one key head: the mean"], 32.5)
    assert near(names.results["one key head: the first"], 35.3)
    six = CONFIG.changed(num_key_value_heads=6)
    made = refgemma.forward(names.rows[:1, :20], names.repeated, six)
    usual = refgemma.forward(names.rows[:1, :20], WEIGHTS, CONFIG)
    assert np.allclose(made.logits, usual.logits, atol=1e-4)
    assert made.cache[0].keys.size == 3 * usual.cache[0].keys.size


@claim(
    13,
    "No: both are 17.1. The curve is flat near its minimum.",
    "In the 27B it is 144: 4608 numbers in the stream, divided by 32 heads.",
    "$234 / 6 = 39$, with heads of 32.",
)
def test_13_the_scale_of_the_scores() -> None:
    names = after(13, "scalars = [")
    by_scalar = dict(zip(names.scalars, names.curve, strict=True))
    assert near(by_scalar[32], 17.1)
    assert near(by_scalar[39], 17.1)
    assert by_scalar[8] > by_scalar[24] > by_scalar[39] < by_scalar[64] < by_scalar[144]
    assert refgemma.Gemma2Config.preset("27b").query_pre_attn_scalar == 144 == 4608 / 32
    assert CONFIG.query_pre_attn_scalar == 39 == CONFIG.hidden_size / CONFIG.num_attention_heads
    for name in ("2b", "9b"):
        preset = refgemma.Gemma2Config.preset(name)
        assert preset.query_pre_attn_scalar == preset.head_dim == 256


@claim(
    13,
    "and the perplexity is 54.",
    "49 % of the numbers <code>w</code> are negative, but none of the numbers <code>1 + w</code>.",
    "The perplexity is then 7703, worse than the perplexity of a model that knows nothing (2048).",
)
def test_13_norms() -> None:
    names = after(13, "def change_norms")
    assert round(names.results["all factors 1"]) == 54
    assert near(names.results["factor w in place of 1 + w"], 7703)
    stored = np.concatenate([*(getattr(layer, name) for layer in WEIGHTS.layers for name in names.names), WEIGHTS.norm])
    assert (round(100 * float((stored < 0).mean())), (1 + stored < 0).sum()) == (49, 0)


@claim(
    13,
    "This table would add 918 million numbers to the 9B, and a fifth to the 2B",
    "Gemma 3 kept the first three, and replaced the caps by QK-norm. The parts that this model relies on most (the "
    "factor <code>1 + w</code> and the embedding scale) are in all three.",
)
def test_13_the_other_parts() -> None:
    names = after(13, "order = sorted(results")
    assert names.order[-2:] == ["no embedding scale", "factor w in place of 1 + w"]
    for name, percent in (("9b", None), ("2b", 20)):
        config = refgemma.Gemma2Config.preset(name)
        table = config.vocab_size * config.hidden_size
        total = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
        assert round(table / 1e6) == {"9b": 918, "2b": 590}[name]
        assert percent is None or percent <= 100 * table / total < percent + 5


# --- 14 ---------------------------------------------------------------------------------------------------------------


@claim(
    14,
    "Block 2: its heads 0, 4 and 1 have the three highest scores, and head 0 spends more than half of its attention on "
    "the token before.",
    "no score in block 0 exceeds 0.2",
)
def test_14_previous_token_heads() -> None:
    names = after(14, "previous = probs")
    best = [divmod(int(n), 6) for n in np.argsort(-names.previous.ravel())[:3]]
    assert best == [(2, 0), (2, 4), (2, 1)]
    assert names.previous[2, 0] > 0.5
    assert names.previous[0].max() < 0.2


@claim(
    14,
    "The first 16 queries spend 79 % of their attention on <code>&lt;bos&gt;</code>, and after place 150 it is below "
    "1 %.",
    "Block 3 is a full one, so every query sees <code>&lt;bos&gt;</code>.",
)
def test_14_the_sink_has_a_reach() -> None:
    names = after(14, "sink = probs")
    assert round(100 * float(names.sink[:16].mean())) == 79
    assert names.sink[150:].max() < 0.01
    assert names.sink[90:110].max() > 0.05
    assert not CONFIG.is_sliding(3)


@claim(14, "The text of notebook 2 had 17 tokens, but these texts have 256.")
def test_14_lengths_of_the_texts() -> None:
    assert after(2, "ids = tiny.tokenizer.encode").seq == 17
    assert after(14, "probs = np.stack").rows.shape[1] == 256


@claim(
    14,
    "Here no head exceeds 0.05, and equal attention to all keys would give 0.03.",
    "the mean loss is 12.9 nats in the first copy and 12.8 in the second",
    "Both are far above log 2048 = 7.6, the loss of a model that knows nothing.",
    "at a quarter of the places the model gives a wrong token more than half of the probability",
)
def test_14_no_head_is_an_induction_head() -> None:
    names = after(14, "induction = patterns")
    assert names.induction.max() < 0.05
    assert round(names.chance, 2) == 0.03
    by_place = after(14, "by_place = losses").by_place
    first, second = by_place[1:20].mean(), by_place[21:].mean()
    assert (round(float(first), 1), round(float(second), 1)) == (12.9, 12.8)  # copying would bring it near 0
    assert np.log(2048) == pytest.approx(7.6, abs=0.05)
    wrong = names.repeated.logits[:, :-1].argmax(axis=-1) != names.twice[:, 1:]
    sure = viz.probabilities(names.repeated.logits[:, :-1]).max(axis=-1)
    assert np.mean(wrong & (sure > 0.5)) == pytest.approx(1 / 4, abs=0.03)
    scores = exercises.solutions.induction_scores(names.patterns[2, 0], 20)
    assert np.allclose(scores, names.patterns[2, 0][:, names.queries, names.queries - 19].mean(-1))


@claim(
    14,
    "in about one case of seven, but the model predicts it in more than one case of three.",
)
def test_14_the_rule_of_induction() -> None:
    names = after(14, "rule, known, right = 0")
    assert 1 / 8 < names.rule / names.known < 1 / 6
    assert 1 / 3 < names.right / names.known < 0.4


@claim(
    14,
    "without head 4 the loss rises by 0.11 nats, more than without any other head. Of the five heads that matter most, "
    "four are in this block. But head 0, which has the sharpest pattern, is only the third of them.",
    "The heads of block 3, with the sinks, matter little.",
)
def test_14_ablation() -> None:
    names = after(14, "rise = np.zeros")
    order = [divmod(int(n), 6) for n in np.argsort(-names.rise.ravel())]
    assert order[0] == (2, 4)
    assert round(float(names.rise[2, 4]), 2) == 0.11
    assert sum(block == 2 for block, _ in order[:5]) == 4
    assert order.index((2, 0)) == 2
    assert names.rise[3].max() < 0.02


@claim(
    14,
    "Before block 0 the tied head predicts the token itself, and it is very sure of this wrong answer: 20 nats.",
    "After one block, the loss is higher than the loss of a model that knows nothing.",
    "After that every block lowers the loss.",
)
def test_14_the_lens() -> None:
    names = after(14, "depth_losses = ")
    assert round(float(names.depth_losses[0])) == 20
    assert names.depth_losses[1] > np.log(2048) > names.depth_losses[2]
    assert (np.diff(names.depth_losses) < 0).all()
    assert (names.lens[0].argmax(-1) == names.rows).mean() > 0.8


@claim(
    14,
    "The feed-forward layers: together they give 6.5 of the 7.0. Of the heads, head 4 of block 2 helps most, with 0.9;",
    "It spends most of its attention on <code>at</code>, the token before the last.",
)
def test_14_attribution() -> None:
    names = after(14, "embedding, heads, fed = attribute")
    assert names.name == "▁door"
    assert (round(float(names.fed.sum()), 1), round(float(names.total), 1)) == (6.5, 7.0)
    assert names.total == pytest.approx(float(names.answer.raw_logits[0, -1, names.best]), abs=1e-4)
    assert divmod(int(names.heads.argmax()), 6) == (2, 4)
    assert round(float(names.heads.max()), 1) == 0.9
    shares = names.answer.layers[2].attention.probs[0, 4, -1]
    assert TINY.tokenizer.convert_ids_to_tokens(names.girl)[int(shares.argmax())] == "▁at"
    assert shares.max() > 0.5


# --- 15 ---------------------------------------------------------------------------------------------------------------


@claim(
    15,
    "the next cell moves one logit a little, up and down, and measures the change of the loss.",
    "The label's, <code>There</code>: the loss falls if its logit rises.",
    "The model expected a quotation mark.",
    "<code>&lt;start_of_turn&gt;</code> begins a chat.",  # golden/tiny/train.py: CHAT_SHARE
)
def test_15_the_chain_rule_is_measured() -> None:
    names = after(15, "measured = np.array")
    assert np.allclose(names.measured, names.grad_x[names.best], rtol=1e-6, atol=1e-9)
    assert names.names[:3] == ["There", '"', "<start_of_turn>"]
    assert names.best[0] == names.label
    assert (names.grad_x < 0).sum() == 1
    order = np.argsort(-names.grad_y)
    assert viz.probabilities(names.run.logits[0, 0])[order].argmax() == 0


@claim(
    15,
    "So the residual stream carries the gradient back to the embedding, and every block adds to it.",
    "the last token has no gradient: no label follows it",
)
def test_15_the_stream_of_gradients() -> None:
    sizes = after(15, "loss, grads = compute_all_gradients").sizes
    assert (sizes[:, -1] == 0).all()
    assert (sizes[0, :-1] > sizes[-1, :-1]).all()


@claim(
    15,
    "The cap of the logits takes most.",
    "The largest logits reach two thirds of their cap, and the largest scores not half of theirs.",
    "A score of 200 has the slope 1 - tanh(4)², about 0.001: it hardly learns.",
    "over 700 times too large",
)
def test_15_what_the_caps_take() -> None:
    names = after(15, "shares.append")
    assert (1 - names.shares).argmax() == 6
    assert np.abs(names.run.raw_logits).max() / 30 == pytest.approx(2 / 3, abs=0.05)
    assert max(np.abs(layer.attention.scores).max() for layer in names.run.layers) < 25
    slope = 1 - np.tanh(4) ** 2
    assert slope == pytest.approx(0.001, abs=5e-4)
    assert 700 < 1 / slope < 800


@claim(15, "Up to about 0.003.", "A long step leaves this place")
def test_15_one_step() -> None:
    names = after(15, "def loss_after_step")
    fall, line = names.loss - names.losses, names.rates * names.squares
    assert (np.abs(fall / line - 1)[names.rates <= 0.003] < 0.05).all()
    assert (np.abs(fall / line - 1)[names.rates > 0.003] > 0.1).all()
    assert names.losses[-1] > names.losses.min()


@claim(
    15,
    "4.1 times: 29 tokens against 7.",
    "If all texts have the same number of labels, the two means are equal",
    "the tokens of short texts count more",
)
def test_15_the_mean_of_the_means() -> None:
    names = after(15, "wrong = means.mean")
    assert names.counts.tolist() == [7, 29]
    assert round(29 / 7, 1) == 4.1
    assert round(after(15, "cosine = ").angle) == 37
    equal = [names.rows[0], names.rows[1][:, : names.rows[0].shape[1]]]
    right = sum(names.flat_gradient(row, num_items=14.0) for row in equal)
    wrong = np.mean([names.flat_gradient(row) for row in equal], axis=0)
    assert np.allclose(right, wrong, rtol=1e-4, atol=1e-6)


# --- 16 ---------------------------------------------------------------------------------------------------------------


@claim(
    16,
    "So the first step has the length $\\eta$ for every number, however large its gradient is.",
    "The W stands for weight decay, notebook 6. It is 0 here.",
    "Only a gradient so small that $\\epsilon$ counts gives a shorter step.",
    "Each row gives a logit at each place, and training lowers the logits of all wrong tokens a little.",
)
def test_16_the_first_step() -> None:
    names = after(16, "moved = np.concatenate")
    assert np.median(names.moved) == pytest.approx(1e-3, rel=1e-3)
    assert names.no_warmup.weight_decay == 0
    assert (names.moved < 1.01e-3).all()
    gradients = np.concatenate([np.abs(names.one.moments[n].exp_avg).ravel() for n in names.base]) / 0.1  # 1 - beta1
    assert (gradients[names.moved < 0.98e-3] < 1e-6).all()  # 100 epsilon
    table = "model.embed_tokens.weight"
    unseen = np.setdiff1d(np.arange(2048), np.concatenate(names.batch))
    assert len(unseen) > 1000
    step = np.abs(names.one.tensors[table] - names.base[table])[unseen]
    assert (step.max(axis=1) > 0).all()
    assert np.median(step) == pytest.approx(1e-3, rel=0.01)


@claim(
    16,
    "After step 30 the loss of the steps drops, but the held-out loss does not.",
    "30 steps of 8 rows are all its rows",
    "learns them by heart",
)
def test_16_the_second_pass() -> None:
    names = after(16, "display.display(axes.figure)")
    assert 30 * 8 <= len(names.rows) < 31 * 8
    losses, tested = np.array(names.state.losses), dict(names.tested)
    assert losses[20:30].mean() - losses[31:41].mean() > 0.5
    assert tested[30] - tested[40] < 0.1
    assert tested[0] - tested[60] > 2  # and it has learned


@claim(16, "A model that is trained on one kind of text forgets other kinds.")
def test_16_the_tale_is_forgotten() -> None:
    names = after(16, "shown = np.array")
    assert names.after["a tale"] - names.before["a tale"] > 0.4
    assert names.after["held out"] < names.before["held out"] - 2
    new = after(16, "trained = weights_of").new
    assert "ROMEO:" in TINY.tokenizer.decode(new)


@claim(
    16,
    "So the length of $x$ cannot change the loss, and the gradient must be at a right angle to $x$",
    "Where x is parallel to the gradient of the result, (1, 0.5) or its opposite.",
    "their arrows are the shortest",
)
def test_16_the_gradient_is_at_a_right_angle() -> None:
    names = after(16, "angles = np.linspace")
    assert np.abs((names.grad_x * names.x).sum(axis=-1)).max() < 1e-12
    lengths = np.linalg.norm(names.grad_x, axis=-1)
    along = np.abs(names.x @ names.h) / np.linalg.norm(names.h)
    assert set(np.argsort(lengths)[:2]) == set(np.argsort(-along)[:2])
    at = names.h / np.linalg.norm(names.h) * np.sqrt(2)
    assert np.abs(names.h - at * np.mean(names.h * at)).max() < 1e-12
