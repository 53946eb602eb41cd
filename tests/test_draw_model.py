"""Test the drawing of the model: numbers equal the configurations', and each notebook's part is highlighted."""

import re
from xml.etree import ElementTree

import draw_model
import pytest
from notebook_cells import BY_NUMBER, prose

import refgemma

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("model", ["tiny", "2b", "9b", "27b"])
def test_the_sizes_are_those_of_the_configuration(model: str) -> None:
    config = draw_model.load_config(model)
    found = texts(draw_model.draw(model=model))
    kinds = [f"{n} {'sliding' if config.is_sliding(n) else 'full'}" for n in range(config.num_hidden_layers)]
    assert [text for text in found if re.fullmatch(r"\d+ (sliding|full)", text)] in (kinds, kinds[:4] + kinds[-2:])
    said = " ".join(found)
    for part in (f"{config.num_attention_heads} query heads of {config.head_dim}",
                 f"{config.num_key_value_heads} key/value heads", f"q · k ÷ √{config.query_pre_attn_scalar:g}",
                 f"cap {config.attn_logit_softcapping:g}", f"cap {config.final_logit_softcapping:g}",
                 f"{config.hidden_size:,} → {config.intermediate_size:,} → {config.hidden_size:,}",
                 f"× {config.hidden_size:,}", f"{config.vocab_size:,}"):  # fmt: skip
        assert part in said


def test_the_table_has_every_released_size() -> None:
    found = texts(draw_model.draw())
    for name in ("2b", "9b", "27b"):
        config = refgemma.Gemma2Config.preset(name)
        assert f"{config.num_attention_heads} / {config.num_key_value_heads}" in found
        assert f"{config.intermediate_size:,}" in found


@pytest.mark.parametrize("heads", [(6, 2), (16, 8), (32, 16)])
def test_each_head_is_drawn(heads: tuple[int, int]) -> None:
    model = {6: "tiny", 16: "9b", 32: "27b"}[heads[0]]
    root = ElementTree.fromstring(draw_model.draw(model=model))
    (part,) = [group for group in root.iter(f"{SVG}g") if group.get("data-part") == "heads"]
    assert len(list(part.iter(f"{SVG}rect"))) == sum(heads)


def states(svg: str) -> dict[str, set[str]]:
    """Return the states of each part: highlighted or dim."""
    found: dict[str, set[str]] = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        found.setdefault(str(group.get("data-part")), set()).add(str(group.get("class")))
    return found


def test_a_lit_part_stands_out_and_the_others_step_back() -> None:
    assert set(states(draw_model.draw())) == set(draw_model.PARTS)
    assert set.union(*states(draw_model.draw()).values()) == {"part"}
    found = states(draw_model.draw(["rotary"]))
    assert found.pop("rotary") == {"part lit"}
    assert set.union(*found.values()) == {"part dim"}
    with pytest.raises(ValueError, match="'rotation' is not a part of the drawing; it has tokens, embedding"):
        draw_model.draw(["rotation"])


@pytest.mark.parametrize("number", BY_NUMBER)
def test_each_notebook_shows_its_picture(number: int) -> None:
    lit, model = draw_model.NOTEBOOKS[f"{number:02d}"]
    path = draw_model.ROOT / "notebooks" / "pictures" / f"model-{number:02d}.svg"
    assert re.search(rf"!\[Drawing of the model: [^\]]+\]\(pictures/{path.name}\)", prose(number))
    assert path.read_text("utf-8") == draw_model.draw(lit, model), "python tools/regen.py"
    said = prose(number).replace("the part that the notebook explains is highlighted", "")  # notebook 1, of the others
    assert bool(lit) == bool(re.search(r"\b(is|are) highlighted\b", said))


def test_a_reader_who_does_not_see_it_is_told_what_it_shows() -> None:
    root = ElementTree.fromstring(draw_model.draw(["mask"]))
    assert root.get("role") == "img"
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert str(root.get("aria-labelledby")).split() == list(named) == ["title", "desc"]
    assert "16 query heads that share 8 key/value heads" in str(named["desc"])
    assert str(named["desc"]).endswith("Highlighted: mask.")


def luminance(colour: str) -> float:
    parts = [value / 255 for value in bytes.fromhex(colour[1:])]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [0, 1])
def test_text_has_the_contrast_of_wcag_aa(dark: int) -> None:
    colours = {name: pair[dark] for name, pair in draw_model.COLOURS.items()}
    for behind in ("paper", "norm-fill", "attention-fill", "feed-fill", "cap-fill", "table-fill"):
        assert contrast(colours["ink"], colours[behind]) >= 4.5
    assert contrast(colours["soft"], colours["paper"]) >= 4.5
    for line in ("stream", "norm", "attention", "feed", "cap", "table", "lit"):
        assert contrast(colours[line], colours["paper"]) >= 3


def test_it_needs_no_network() -> None:
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", draw_model.draw()) == []
