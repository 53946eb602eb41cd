"""The tokenizer against transformers' `GemmaTokenizer` made from the same file, and Gemma's template under Jinja."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from refgemma.tokenizer import Tokenizer, TokenizerError

TINY = Path(str(files("refgemma") / "checkpoints/tiny"))
TOKENIZER = Tokenizer(TINY / "tokenizer.model")
MARKERS = ["<start_of_turn>", "<end_of_turn>"]
LONGEST_SPACES = 8  # the longest piece of spaces that the tiny model has

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

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
BLOCKS = st.sampled_from([*TEXTS, *MARKERS, " ", "  ", "\n", "\n" * 5, "the", " a", "é", "😀", "12", "<", ">"])
RANDOM_TEXTS = st.text(CHARACTERS) | st.lists(BLOCKS | CHARACTERS, max_size=8).map("".join)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The other implementation, its turn markers special, as a released Gemma's tokenizer_config.json declares them."""
    pytest.importorskip("google.protobuf", reason="transformers reads the file with it: pip install protobuf")
    from transformers import GemmaTokenizer

    tokenizer = GemmaTokenizer.from_pretrained(TINY, local_files_only=True)
    # Said afterwards: as an argument of from_pretrained they replace the pieces of newlines as tokens to look for.
    tokenizer.add_special_tokens({"extra_special_tokens": MARKERS})
    return tokenizer


def ours_differs_by_design(text: str) -> bool:
    """Whether `text` holds what the two are known, and below are shown, to treat differently."""
    return bool(re.search("<(pad|eos|bos|unk)>", text)) or " " * (LONGEST_SPACES + 1) in text


# ---- ids


def test_all_pieces_have_the_same_ids(theirs: Any) -> None:
    assert theirs.convert_ids_to_tokens(range(len(theirs))) == TOKENIZER.pieces(range(TOKENIZER.vocab_size))
    ids = [theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id]
    assert ids == [TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.bos_id, TOKENIZER.unk_id]
    assert theirs.convert_tokens_to_ids(MARKERS) == [TOKENIZER.start_of_turn_id, TOKENIZER.end_of_turn_id]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_the_same_ids(theirs: Any, text: str) -> None:
    assert TOKENIZER.encode(text) == theirs.encode(text)
    assert TOKENIZER.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False)


@given(text=RANDOM_TEXTS)
def test_encode_gives_the_same_ids_for_any_text(theirs: Any, text: str) -> None:
    assume(not ours_differs_by_design(text))
    assert TOKENIZER.encode(text) == theirs.encode(text)


@given(text=RANDOM_TEXTS)
def test_decode_gives_the_same_text(theirs: Any, text: str) -> None:
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id, TOKENIZER.unk_id, TOKENIZER.pad_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
    assume("<mask>" not in text)  # special in a tokenizer converted from the bare file, and not in a released one
    assert TOKENIZER.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# ---- the three differences that the docstring of `Tokenizer` names


@pytest.mark.parametrize("piece", ["<pad>", "<eos>", "<bos>", "<unk>"])
def test_only_transformers_takes_control_tokens_from_a_text(theirs: Any, piece: str) -> None:
    (control,) = theirs.encode(piece, add_special_tokens=False)
    assert control == theirs.convert_tokens_to_ids(piece)
    assert control not in TOKENIZER.encode(piece, add_bos=False)


def test_long_runs_of_spaces_are_cut_otherwise(theirs: Any) -> None:
    ours = TOKENIZER.encode(" " * 9, add_bos=False)
    others = theirs.encode(" " * 9, add_special_tokens=False)
    assert [len(piece) for piece in TOKENIZER.pieces(ours)] == [8, 1]
    assert [len(piece) for piece in TOKENIZER.pieces(others)] == [4, 5]
    assert TOKENIZER.decode(ours) == TOKENIZER.decode(others) == " " * 9


def test_wrong_bytes_spoil_their_neighbours_only_in_transformers(theirs: Any) -> None:
    ids = theirs.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xFF>"])
    assert TOKENIZER.decode(ids) == "é\ufffd"
    assert theirs.decode(ids) == "\ufffd\ufffd\ufffd"
    assert TOKENIZER.decode(ids[:1]) == theirs.decode(ids[:1]) == "\ufffd"


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
    assert TOKENIZER.chat_text(messages, add_generation_prompt=prompt) == rendered(messages, prompt)


@given(messages=CHATS, prompt=st.booleans())
def test_chat_ids_are_those_of_apply_chat_template(theirs: Any, messages: list[dict[str, str]], prompt: bool) -> None:
    assume(not any(ours_differs_by_design(message["content"]) for message in messages))
    template = dict(chat_template=TEMPLATE, add_generation_prompt=prompt, return_dict=False)
    ids = theirs.apply_chat_template(messages, **template)
    assert TOKENIZER.chat_ids(messages, add_generation_prompt=prompt) == ids


@pytest.mark.parametrize("roles", ["system", "system user", "assistant", "user user", "user assistant assistant"])
def test_the_template_refuses_the_same_chats_in_the_same_words(roles: str) -> None:
    messages = [{"role": role, "content": "Hi"} for role in roles.split()]
    with pytest.raises(TemplateError) as refusal:
        rendered(messages, True)
    with pytest.raises(TokenizerError, match=re.escape(str(refusal.value))):
        TOKENIZER.chat_text(messages)
