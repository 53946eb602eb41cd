"""The tokenizer of the tiny model: round trips over all of Unicode, Gemma's conventions, refusals, streaming."""

from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, example, given
from hypothesis import strategies as st

from refgemma.tokenizer import TextStream, Tokenizer, TokenizerError

MODEL_FILE = Path(str(files("refgemma") / "checkpoints/tiny/tokenizer.model"))
TOKENIZER = Tokenizer(MODEL_FILE)
PAD, EOS, BOS, UNK, START, END = 0, 1, 2, 3, 5, 6

# SentencePiece writes a space as U+2581 inside its pieces, so a U+2581 of the text comes back as a space.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
# Text that is made of what a tokenizer may stumble over, which st.text() alone would hardly ever put together.
SPACES = [" ", "  ", " " * 9, "\n", "\n" * 5, "\r\n", "\t", "\0", "\u00a0", "\ufeff"]
RARE = ["é", "e\u0301", "ﬁ", "😀", "👩\u200d🚀", "漢字"]
STUMBLING_BLOCKS = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<0x41>", "2024", "3.14", "Alice", *SPACES, *RARE]
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<start_of_turn", "end_of_turn>"]


def texts_of(blocks: list[str]) -> st.SearchStrategy[str]:
    return st.text(CHARACTERS) | st.lists(st.sampled_from(blocks) | CHARACTERS, max_size=12).map("".join)


# Bytes make up a quarter of all ids, and half of these lists, so that characters come out whole, cut and wrong.
BYTES = st.integers(0, 255).map(lambda byte: byte_id(byte))
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | BYTES | st.sampled_from([PAD, EOS, BOS, UNK, START, END]))


def byte_id(byte: int) -> int:
    return 18 + byte


def pieces(text: str) -> list[str]:
    return TOKENIZER.pieces(TOKENIZER.encode(text, add_bos=False))


# ---- ids and pieces


def test_special_ids_are_read_from_the_model() -> None:
    t = TOKENIZER
    assert (t.pad_id, t.eos_id, t.bos_id, t.unk_id, t.start_of_turn_id, t.end_of_turn_id) == (0, 1, 2, 3, 5, 6)
    assert t.vocab_size == 2048
    assert t.pieces([0, 1, 2, 3, 5, 6]) == ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def test_ids_of_another_order_are_read_too(tmp_path: Path) -> None:
    file = train(tmp_path, pad_id=3, eos_id=2, bos_id=1, unk_id=0, user_defined_symbols=["<end_of_turn>"])
    tokenizer = Tokenizer(file)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (3, 2, 1, 0)
    assert tokenizer.start_of_turn_id is None
    assert tokenizer.end_of_turn_id == 4
    assert tokenizer.encode("")[:1] == [1]


def test_bos_comes_first_unless_refused() -> None:
    assert TOKENIZER.encode("") == [BOS]
    assert TOKENIZER.encode("", add_bos=False) == []
    assert TOKENIZER.encode("Alice") == [BOS, *TOKENIZER.encode("Alice", add_bos=False)]


@given(texts_of([*STUMBLING_BLOCKS, *MARKERS]))
@example("<bos>Alice")
def test_text_never_becomes_a_control_id(text: str) -> None:
    assert TOKENIZER.encode(text).count(BOS) == 1
    assert not {PAD, EOS, BOS, UNK} & set(TOKENIZER.encode(text, add_bos=False))


def test_no_space_is_put_before_a_text() -> None:
    assert pieces("the") == ["the"]
    assert pieces(" the") == ["▁the"]
    assert pieces("<end_of_turn>the") == ["<end_of_turn>", "the"]


def test_runs_of_spaces_and_newlines_are_pieces() -> None:
    assert pieces("a" + " " * 8) == ["a", "▁" * 8]
    assert pieces(" " * 19) == ["▁" * 8, "▁" * 8, "▁" * 3]  # the longest first, from the left
    assert pieces("\n\n\n") == ["\n\n\n"]
    assert pieces("\n" * 6) == ["\n" * 4, "\n" * 2]


def test_digits_are_split() -> None:
    assert pieces("in 1865") == ["in", "▁", "1", "8", "6", "5"]


def test_what_has_no_piece_becomes_its_utf8_bytes() -> None:
    assert pieces("😀") == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert TOKENIZER.encode("😀", add_bos=False) == [byte_id(byte) for byte in "😀".encode()]


# ---- there and back


@given(texts_of(STUMBLING_BLOCKS))
@example("".join(STUMBLING_BLOCKS))
def test_decode_undoes_encode(text: str) -> None:
    assume("<start_of_turn>" not in text and "<end_of_turn>" not in text)  # Hypothesis writes them too
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(texts_of([*STUMBLING_BLOCKS, *MARKERS]))
@example("".join([*STUMBLING_BLOCKS, *MARKERS]))
def test_decode_with_special_tokens_undoes_encode_of_turn_markers_too(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == "<bos>" + text


def test_special_tokens_are_left_out_or_written_out() -> None:
    ids = [BOS, START, *TOKENIZER.encode("a", add_bos=False), END, UNK, EOS, PAD]
    assert TOKENIZER.decode(ids) == "a"
    written = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert written == "<bos><start_of_turn>a<end_of_turn><unk><eos><pad>"


@pytest.mark.parametrize(
    ("utf8", "text"),
    [
        (b"\xe2", "\ufffd"),
        (b"\xe2\x82", "\ufffd\ufffd"),  # a replacement a byte, where Python writes one for both
        (b"\xe2\x82A", "\ufffd\ufffdA"),
        (b"\xc3\xa9\xff", "é\ufffd"),
        (b"\xed\xa0\x80", "\ufffd" * 3),  # half a surrogate pair
        (b"\xe2\xe2\x82\xac", "\ufffd€"),
    ],
)
def test_wrong_bytes_become_replacement_characters(utf8: bytes, text: str) -> None:
    ids = [byte_id(byte) for byte in utf8]
    assert TOKENIZER.decode(ids) == text
    assert streamed(ids) == text


def test_ids_may_come_as_any_iterable_of_integers() -> None:
    ids = TOKENIZER.encode("Alice")
    assert TOKENIZER.decode(np.array(ids)) == TOKENIZER.decode(iter(ids)) == TOKENIZER.decode(tuple(ids)) == "Alice"
    assert TOKENIZER.pieces(np.array(ids, np.int32)) == TOKENIZER.pieces(ids)
    assert TextStream(TOKENIZER).push(np.array(ids)[-1]) == TOKENIZER.decode(ids[-1:])


# ---- chat

USER, MODEL = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A cat."}


def test_a_conversation_is_laid_out_in_turns() -> None:
    assert TOKENIZER.chat_text([USER, MODEL, USER]) == (
        "<bos><start_of_turn>user\nWho are you?<end_of_turn>\n"
        "<start_of_turn>model\nA cat.<end_of_turn>\n"
        "<start_of_turn>user\nWho are you?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_the_generation_prompt_can_be_left_out() -> None:
    text = "<bos><start_of_turn>user\nWho are you?<end_of_turn>\n"
    assert TOKENIZER.chat_text([USER], add_generation_prompt=False) == text
    assert TOKENIZER.decode(TOKENIZER.chat_ids([USER], add_generation_prompt=False), False) == text


def test_content_is_trimmed_and_model_is_a_role() -> None:
    padded = [{"role": "user", "content": " \n Who are you?\t\n"}, {"role": "model", "content": "A cat."}]
    assert TOKENIZER.chat_text(padded) == TOKENIZER.chat_text([USER, MODEL])
    assert TOKENIZER.chat_ids(padded) == TOKENIZER.chat_ids([USER, MODEL])


@given(st.lists(texts_of([*STUMBLING_BLOCKS, *MARKERS]), min_size=1, max_size=4), st.booleans())
@example(["", "<", "<start_of_turn", "<<end_of_turn>"], True)
def test_the_ids_of_a_chat_are_those_of_its_text(contents: list[str], prompt: bool) -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    text = TOKENIZER.chat_text(messages, add_generation_prompt=prompt)
    ids = TOKENIZER.chat_ids(messages, add_generation_prompt=prompt)
    assert ids == TOKENIZER.encode(text.removeprefix("<bos>"))
    assert ids.count(BOS) == 1


ALTERNATE = r"Conversation roles must alternate user/assistant/user/assistant/\.\.\."


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is empty"),
        ([{"role": "system", "content": "Purr."}, USER], r"messages\[0\]: System role not supported"),
        ([USER, {"role": "system", "content": "Purr."}], r"messages\[1\]: System role not supported"),
        ([MODEL], rf"messages\[0\]: {ALTERNATE}"),
        ([USER, USER], rf"messages\[1\]: {ALTERNATE}"),
        ([USER, MODEL, MODEL], rf"messages\[2\]: {ALTERNATE}"),
        ([USER, {"role": "tool", "content": "4"}], r"messages\[1\]: unknown role 'tool'; there are user, assistant"),
        ([USER, {"role": "assistant"}], r"messages\[1\]: 'content' is missing"),
        ([{"content": "Who?"}], r"messages\[0\]: 'role' is missing"),
    ],
)
def test_what_is_no_chat_is_refused(messages: list[dict[str, str]], problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        TOKENIZER.chat_text(messages)
    with pytest.raises(TokenizerError, match=problem):
        TOKENIZER.chat_ids(messages)


def test_chat_ids_need_turn_markers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(tmp_path))
    with pytest.raises(TokenizerError, match="no <start_of_turn>"):
        tokenizer.chat_ids([USER])


# ---- streaming


def streamed(ids: list[int]) -> str:
    stream = TextStream(TOKENIZER)
    return "".join([*map(stream.push, ids), stream.finish()])


@given(texts_of([*STUMBLING_BLOCKS, *MARKERS]), IDS)
@example("", [byte_id(0xC3), BOS, byte_id(0xA9)])
@example("".join([*STUMBLING_BLOCKS, *MARKERS]), [END, byte_id(0xE2), byte_id(0xE2), EOS])
def test_a_stream_adds_up_to_decode_and_never_takes_back(text: str, more: list[int]) -> None:
    ids = TOKENIZER.encode(text) + more
    stream, whole = TextStream(TOKENIZER), TOKENIZER.decode(ids)
    parts = [stream.push(token) for token in ids]
    assert all(whole.startswith(prefix) for prefix in accumulate(parts))
    assert "".join(parts) + stream.finish() == whole
    assert stream.finish() == ""


@given(st.text(CHARACTERS))
def test_a_stream_gives_each_character_with_its_last_byte(text: str) -> None:
    stream, ids = TextStream(TOKENIZER), [byte_id(byte) for byte in text.encode()]
    parts = [stream.push(token) for token in ids]
    assert [part for part in parts if part] == list(text)
    assert "".join(parts) == text  # nothing is left for finish()


def test_a_stream_keeps_the_space_before_a_word() -> None:
    stream = TextStream(TOKENIZER)
    the = TOKENIZER.encode(" the", add_bos=False)
    assert [stream.push(token) for token in [BOS, *the, *the]] == ["", " the", " the"]


def test_a_stream_decodes_no_more_than_an_unfinished_character(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
        lengths.append(len(ids))
        return original(tokenizer, ids)

    original = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", decode)
    streamed(TOKENIZER.encode("Alice sighed 😀 " * 50))
    assert max(lengths) == 4  # the bytes of 😀; decoding the history each time would reach hundreds


# ---- refusals


@pytest.mark.parametrize("token", [-1, 2048, 2**40])
def test_ids_out_of_range_are_named_with_their_place(token: int) -> None:
    problem = rf"ids\[2\] is {token}, but this tokenizer has the ids 0 to 2047"
    with pytest.raises(TokenizerError, match=problem):
        TOKENIZER.decode([BOS, 300, token])
    with pytest.raises(TokenizerError, match=problem):
        TOKENIZER.pieces([BOS, 300, token])
    with pytest.raises(TokenizerError, match=f"token is {token}, but"):
        TextStream(TOKENIZER).push(token)


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(TokenizerError, match=r"character 2 is U\+D83D, half a surrogate pair"):
        TOKENIZER.encode("ab\ud83d")


@pytest.mark.parametrize(
    ("method", "argument", "problem"),
    [
        ("encode", None, "text is a NoneType, not a string"),
        ("encode", ["a", "b"], "text is a list, not a string"),
        ("encode", b"a", "text is a bytes, not a string"),
        ("decode", 5, "ids is a int, not a list of ids"),
        ("decode", [2, 1.5], r"ids\[1\] is a float, not a whole number"),
        ("decode", "text", r"ids\[0\] is a str, not a whole number"),
        ("pieces", [[2, 300]], r"ids\[0\] is a list, not a whole number"),
        ("chat_ids", None, "messages is a NoneType, not a list"),
        ("chat_ids", USER, "messages is a dict, not a list"),
        ("chat_ids", "Hello", r"messages\[0\] is a str, not a dict"),
        ("chat_text", [{"role": "user", "content": 5}], r"messages\[0\]: 'content' is 5, not a string"),
        ("chat_text", [{"role": ["user"], "content": "a"}], r"messages\[0\]: 'role' is \['user'\], not a string"),
        ("chat_text", [{"role": "user", "content": None}], r"messages\[0\]: 'content' is None, not a string"),
    ],
)
def test_wrong_types_are_refused(method: str, argument: object, problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        getattr(TOKENIZER, method)(argument)


# ---- files that are no tokenizer


def train(folder: Path, **changes: Any) -> Path:
    """Train a model of a few dozen pieces with Gemma's conventions but for `changes`; its file."""
    options: dict[str, Any] = dict(model_type="bpe", vocab_size=40, minloglevel=2, hard_vocab_limit=False)
    options |= dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    options |= dict(pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>")
    options |= dict(add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity")
    lines = ["a cat and a  bat sat ", "and a rat sat at a  hat "]
    prefix = folder / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), **(options | changes)
    )
    return prefix.with_suffix(".model")


def test_a_model_with_gemmas_conventions_is_taken(tmp_path: Path) -> None:
    assert Tokenizer(str(train(tmp_path))).decode([BOS]) == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"add_dummy_prefix": True}, "adds or removes spaces"),
        ({"remove_extra_whitespaces": True}, "adds or removes spaces"),
        ({"bos_piece": "<s>", "eos_piece": "</s>"}, "has no <eos>, <bos>"),
        ({"pad_id": -1, "eos_id": 0, "bos_id": 1, "unk_id": 2}, "has no <pad>"),
    ],
)
def test_a_model_of_other_conventions_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(TokenizerError, match=rf"small\.model: {problem}"):
        Tokenizer(train(tmp_path, **changes))


WHOLE = MODEL_FILE.read_bytes()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4241003\n", "is a Git LFS pointer"),
        (b"", "is empty"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "is no SentencePiece model"),
        (WHOLE[:1000], "is no SentencePiece model, or is cut short"),
        (WHOLE[:-5], "is no SentencePiece model, or is cut short"),
    ],
    ids=["lfs", "empty", "json", "head", "cut"],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model: {problem}"):
        Tokenizer(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"missing\.model: cannot be read: No such file"):
        Tokenizer(tmp_path / "missing.model")
    with pytest.raises(TokenizerError, match=f"{tmp_path.name}: cannot be read"):
        Tokenizer(tmp_path)
