"""Compare the tokenizer with transformers' `GemmaTokenizer` from the same file, and Gemma's template with Jinja."""

import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from refgemma.tokenizer.added_tokens import FLAGS
from refgemma.tokenizer.tokenizer import Tokenizer, TokenizerError

TINY = Path(str(files("refgemma") / "checkpoints/tiny"))
TOKENIZER = Tokenizer(TINY / "tokenizer.model")
MARKERS = ["<start_of_turn>", "<end_of_turn>"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *MARKERS]

TEXTS = [
    "Once upon a time there was a little girl, and she lived in a house by the wood.",
    'He said, "I don\'t know -- perhaps; who can tell?" and went on.\n\nThe next morning it rained.',
    " leading and trailing ",
    "In 1865, 3.14 of 2024's 007 were 1,000,000.",
    "\n\n\n\n\n\n\ttabs\tand\r\nreturns\n" + "\n" * 13,
    "    four spaces,        eight  two",
    "Ünïcödé, façade, e\u0301, ﬁ, ½, \u00a0, \u200b, \ufeff, \0, \x7f",
    "😀👩\u200d🚀🇩🇪",
    "漢字かな交じり文 한국어 العربية हिन्दी",
    "<start_of_turn>user\nHi<end_of_turn>\n<mask><<end_of_turn>><start_of_turn",
    "<0x41> <unused7> </b> <h1>",
    "def f(x: int) -> int:\n    return x ** 2  # ≈ x²\n",
]

CHARACTERS = st.characters(exclude_categories=["Cs"])
SPACES = [" ", "  ", " " * 9, " " * 31, "\u2581", "\u2581" * 2, "\u2581" * 9, "\n", "\n" * 5, "\t"]
BLOCKS = st.sampled_from([*TEXTS, *SPECIAL, *SPACES, "the", " a", "é", "😀", "12", "<", ">", "<eos", "turn>"])
RANDOM_TEXTS = st.text(CHARACTERS) | st.lists(BLOCKS | CHARACTERS, max_size=8).map("".join)
BYTES = st.integers(18, 18 + 255)  # a quarter of all ids, and more of these lists
RANDOM_IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | BYTES | st.integers(0, 17))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return transformers' tokenizer for the files of `save_pretrained`: same model, with the special tokens declared
    as in a released Gemma's tokenizer_config.json."""
    pytest.importorskip("google.protobuf", reason="transformers reads the file with it: pip install protobuf")
    folder = tmp_path_factory.mktemp("saved")
    TOKENIZER.save_pretrained(folder)
    return from_folder(folder)


def from_folder(folder: Path) -> Any:
    from transformers import GemmaTokenizer

    return GemmaTokenizer.from_pretrained(folder, local_files_only=True)


# ---- ids


def test_all_pieces_and_special_tokens_have_the_same_ids(theirs: Any) -> None:
    assert theirs.get_vocab() == TOKENIZER.get_vocab()
    everything = range(len(theirs))
    assert theirs.convert_ids_to_tokens(everything) == TOKENIZER.convert_ids_to_tokens(everything)
    names = ["pad_token", "eos_token", "bos_token", "unk_token"]
    for name in [*names, *[f"{name}_id" for name in names], "vocab_size", "padding_side", "truncation_side"]:
        assert getattr(theirs, name) == getattr(TOKENIZER, name)
    assert theirs.convert_tokens_to_ids(["no piece", *SPECIAL]) == TOKENIZER.convert_tokens_to_ids(
        ["no piece", *SPECIAL]
    )
    # Of a tokenizer.json, transformers lists those that have a role only, though it leaves out the turn markers, too.
    assert theirs.all_special_tokens + MARKERS == TOKENIZER.all_special_tokens
    assert theirs.special_tokens_map == TOKENIZER.special_tokens_map
    ours = {token: (str(added), added.flags) for token, added in TOKENIZER.added_tokens_decoder.items()}
    flags = {
        token: (str(a), {name: getattr(a, name) for name in FLAGS}) for token, a in theirs.added_tokens_decoder.items()
    }
    assert ours == flags


@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_the_same_ids(theirs: Any, text: str) -> None:
    assert TOKENIZER.encode(text) == theirs.encode(text)
    assert TOKENIZER.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@given(text=RANDOM_TEXTS, split=st.booleans())
def test_encode_gives_the_same_ids_for_any_text(theirs: Any, text: str, split: bool) -> None:
    ours = TOKENIZER.encode(text, split_special_tokens=split)
    assert ours == theirs.encode(text, split_special_tokens=split)
    assert TOKENIZER.tokenize(text) == theirs.tokenize(text)


@pytest.mark.parametrize("length", [*range(1, 70), 1000, 1001])
def test_runs_of_spaces_are_cut_the_same_way(theirs: Any, length: int) -> None:
    for text in (" " * length, "a" + " " * length + "the", "\u2581" * length, " \u2581" * length):
        assert TOKENIZER.encode(text) == theirs.encode(text)


@given(ids=RANDOM_IDS, skip=st.booleans())
def test_decode_gives_the_same_text(theirs: Any, ids: list[int], skip: bool) -> None:
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    batch = [ids, [2, *ids]]
    assert TOKENIZER.batch_decode(batch, skip_special_tokens=skip) == theirs.batch_decode(
        batch, skip_special_tokens=skip
    )


# ---- batches

PADDINGS = [{"padding": value} for value in (False, True, "longest", "do_not_pad", "max_length")]
TRUNCATIONS = [{}, *({"truncation": value} for value in (None, False, True, "longest_first", "only_first"))]


@given(
    texts=st.lists(RANDOM_TEXTS, min_size=1, max_size=4) | RANDOM_TEXTS,
    padding=st.sampled_from(PADDINGS),
    truncation=st.sampled_from(TRUNCATIONS),
    length=st.none() | st.integers(1, 12).map(lambda n: 2 * n),
    others=st.fixed_dictionaries({}, optional={
        "padding_side": st.sampled_from(["left", "right"]), "pad_to_multiple_of": st.just(2),
        "add_special_tokens": st.booleans(), "return_attention_mask": st.booleans(),
        "split_special_tokens": st.booleans(),
    }),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*max_length:UserWarning")  # both warn of a length without effect
def test_batches_are_the_same(
    theirs: Any, texts: Any, padding: dict[str, Any], truncation: dict[str, Any], length: int | None, others: Any
) -> None:
    arguments = padding | truncation | others | {"max_length": length}
    assert TOKENIZER(texts, **arguments) == dict(theirs(texts, **arguments))


@given(texts=st.lists(RANDOM_TEXTS, min_size=1, max_size=4) | RANDOM_TEXTS, side=st.sampled_from(["left", "right"]))
def test_arrays_are_the_same(theirs: Any, texts: Any, side: str) -> None:
    arguments = {"padding": True, "padding_side": side, "return_tensors": "np"}
    ours, others = TOKENIZER(texts, **arguments), theirs(texts, **arguments)
    assert ours.keys() == others.keys()
    for key, array in ours.items():
        assert array.dtype == others[key].dtype
        assert np.array_equal(array, others[key])


SETTINGS: list[dict[str, Any]] = [
    {"add_eos_token": True, "add_bos_token": False},
    {"truncation_side": "left", "add_eos_token": True},
    {"model_max_length": 5},
    {"padding_side": "right", "pad_token": "<eos>"},
    {"eos_token": "<end_of_turn>", "add_eos_token": True},
    {"split_special_tokens": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_a_saved_tokenizer_is_the_same_in_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    ours = Tokenizer.from_pretrained("tiny", **settings)
    ours.save_pretrained(tmp_path)
    others = from_folder(tmp_path)
    for arguments in ({}, {"padding": True}, {"truncation": True, "max_length": 6}, {"truncation": True}):
        assert ours([*TEXTS, *SPECIAL], **arguments) == dict(others([*TEXTS, *SPECIAL], **arguments)), arguments
    ids = ours.encode("".join([*TEXTS, *SPECIAL]), split_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == others.decode(ids, skip_special_tokens=True)


# ---- a vocabulary that has more of Gemma's: runs of 31, markup, and pieces that begin or end like special tokens

MARKUP = ["<unused0>", "[@BOS@]", "<table>", "<b>", "</b>"]
RICH_BLOCKS = [*SPECIAL, *MARKUP, *SPACES, "\n" * 33, "\u2581" * 33, "the", " a", "(", "<", ">", "</", "_", "s>", "é"]
RICH_TEXTS = st.lists(st.sampled_from([*RICH_BLOCKS, " " * 40]) | CHARACTERS, max_size=8).map("".join)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Return our and transformers' tokenizers of a model that is trained here."""
    pytest.importorskip("google.protobuf", reason="transformers reads the file with it: pip install protobuf")
    folder = tmp_path_factory.mktemp("rich")
    lines = ["the <start of a<bos <end (<s <sta </e> x> x>> </a> <unk> <bosom> turn> _turn>) os> s> ></ <_"] * 40
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420,
        hard_vocab_limit=False, minloglevel=2, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        unk_piece="<unk>", user_defined_symbols=[
            "<mask>", *MARKERS, *["\n" * n for n in range(1, 32)], *["\u2581" * n for n in range(2, 32)], *MARKUP
        ],
    )  # fmt: skip
    ours = Tokenizer(folder / "tokenizer.model")
    ours.save_pretrained(folder / "saved")
    return ours, from_folder(folder / "saved")


@given(text=RICH_TEXTS, split=st.booleans())
def test_a_rich_vocabulary_gives_the_same_ids(rich: tuple[Tokenizer, Any], text: str, split: bool) -> None:
    ours, others = (tokenizer.encode(text, split_special_tokens=split) for tokenizer in rich)
    assert ours == others
    assert rich[0].decode(ours) == rich[1].decode(ours)


# The marks that transformers puts around control tokens in a text that it sanitizes, and first drops from that text.
# Nothing is marked here, so these characters stay.
DROPPED = {"\U000f0000", "\U000f0001"}


def test_characters_that_only_transformers_drops_stay(rich: tuple[Tokenizer, Any]) -> None:
    for character in DROPPED:
        messages = [{"role": "user", "content": f"a{character}b"}]
        ours, others = (
            t.decode(t.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]) for t in rich
        )
        assert ours.replace(character, "") == others
        assert character in ours


@given(text=RICH_TEXTS, sanitize=st.booleans())
@example("<pad>>", True)  # ">>" is a piece, and is not made across the border of a special token
def test_a_rich_vocabulary_gives_the_same_chats(rich: tuple[Tokenizer, Any], text: str, sanitize: bool) -> None:
    assume(not (sanitize and set(text) & DROPPED))
    messages = [{"role": "user", "content": text}]
    ours, others = (t.apply_chat_template(messages, sanitize_control_tokens=sanitize) for t in rich)
    assert ours == dict(others)


@given(text=RICH_TEXTS)
def test_no_special_token_comes_out_of_a_text_that_is_split(rich: tuple[Tokenizer, Any], text: str) -> None:
    ours, _ = rich
    ids = ours.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(ours.all_special_ids)
    assert ours.decode(ids) == text.replace("\u2581", " ")


# ---- what transformers makes of a bare tokenizer.model, without a tokenizer_config.json: the differences that remain


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("google.protobuf", reason="transformers reads the file with it: pip install protobuf")
    shutil.copy(TINY / "tokenizer.model", folder := tmp_path_factory.mktemp("bare"))
    return from_folder(folder)


def test_only_refgemma_begins_with_bos_unless_told_otherwise(bare: Any) -> None:
    assert bare.encode("Alice") == TOKENIZER.encode("Alice", add_special_tokens=False)


@pytest.mark.parametrize("marker", MARKERS)
def test_only_refgemma_knows_that_turn_markers_are_special(bare: Any, marker: str) -> None:
    token = TOKENIZER.convert_tokens_to_ids(marker)
    assert bare.encode(marker, split_special_tokens=True) == [token]
    assert token not in TOKENIZER.encode(marker, split_special_tokens=True)
    assert bare.decode([token], skip_special_tokens=True) == marker
    assert TOKENIZER.decode([token], skip_special_tokens=True) == ""


@given(text=RANDOM_TEXTS)
def test_everything_else_is_the_same_without_a_configuration(bare: Any, text: str) -> None:
    assert TOKENIZER.encode(text, add_special_tokens=False) == bare.encode(text)


# ---- chat

# Gemma 2's template, from its documented behaviour, a line a rule; `-` keeps the line breaks of this layout out.
TEMPLATE = r"""
{{- bos_token -}}
{%- if messages[0]["role"] == "system" -%} {{- raise_exception("System role not supported") -}} {%- endif -%}
{%- for message in messages -%}
    {%- if (message["role"] == "user") != (loop.index0 is even) -%}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") -}}
    {%- endif -%}
    {%- set role = "model" if message["role"] == "assistant" else message["role"] -%}
    {{- "<start_of_turn>" ~ role ~ "\n" ~ (message["content"] | trim) ~ "<end_of_turn>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- "<start_of_turn>model\n" -}} {%- endif -%}
"""


def rendered(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    values = {"bos_token": "<bos>", "messages": messages, "add_generation_prompt": add_generation_prompt}
    return environment.from_string(TEMPLATE).render(values)


ROLES = ["user", "assistant"]
CHATS = st.lists(RANDOM_TEXTS | st.sampled_from(["", " \n ", "\x1c x\u2003"]), min_size=1, max_size=5).map(
    lambda contents: [{"role": ROLES[n % 2], "content": content} for n, content in enumerate(contents)]
)


@given(CHATS, st.booleans())
def test_chat_text_is_what_the_template_renders(messages: list[dict[str, str]], prompt: bool) -> None:
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert text == rendered(messages, prompt)


@given(messages=CHATS, prompt=st.booleans(), template=st.sampled_from([None, TEMPLATE]))
def test_chats_are_those_of_apply_chat_template(
    theirs: Any, messages: list[dict[str, str]], prompt: bool, template: str | None
) -> None:
    ours = TOKENIZER.apply_chat_template(messages, add_generation_prompt=prompt)
    assert ours == dict(theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt))
    text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert TOKENIZER.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False) == text


@given(messages=CHATS, prompt=st.booleans())
def test_sanitized_chats_are_those_of_apply_chat_template(
    theirs: Any, messages: list[dict[str, str]], prompt: bool
) -> None:
    # transformers marks what it found with these two characters, after it took them out of the contents; we keep them.
    assume(not re.search("[\U000f0000\U000f0001]", "".join(message["content"] for message in messages)))
    arguments = {"add_generation_prompt": prompt, "sanitize_control_tokens": True, "return_dict": False}
    assert TOKENIZER.apply_chat_template(messages, **arguments) == theirs.apply_chat_template(messages, **arguments)


@given(chats=st.lists(CHATS, min_size=1, max_size=3), length=st.none() | st.integers(1, 9))
def test_batches_of_chats_are_the_same(theirs: Any, chats: Any, length: int | None) -> None:
    arguments = {"padding": True, "truncation": length is not None, "max_length": length, "return_tensors": "np"}
    ours, others = (tokenizer.apply_chat_template(chats, **arguments) for tokenizer in (TOKENIZER, theirs))
    assert {key: array.tolist() for key, array in ours.items()} == {key: x.tolist() for key, x in others.items()}


def test_only_transformers_takes_its_own_marks_out_of_sanitized_contents(theirs: Any) -> None:
    messages = [{"role": "user", "content": "a\U000f0000b"}]
    ours, others = (t.apply_chat_template(messages, sanitize_control_tokens=True) for t in (TOKENIZER, theirs))
    assert "a\U000f0000b" in TOKENIZER.decode(ours.input_ids)
    assert "ab" in theirs.decode(others.input_ids)


def test_only_the_template_takes_any_role_in_the_place_of_the_models() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "4"}]
    assert "<start_of_turn>tool\n4<end_of_turn>" in rendered(messages, False)
    with pytest.raises(TokenizerError, match="unknown role 'tool'"):
        TOKENIZER.apply_chat_template(messages)


@pytest.mark.parametrize("roles", ["system", "system user", "assistant", "user user", "user assistant assistant"])
def test_the_template_refuses_the_same_chats_in_the_same_words(roles: str) -> None:
    messages = [{"role": role, "content": "Hi"} for role in roles.split()]
    with pytest.raises(TemplateError) as refusal:
        rendered(messages, True)
    with pytest.raises(TokenizerError, match=re.escape(str(refusal.value))):
        TOKENIZER.apply_chat_template(messages)
