"""Test tokenizers and texts as people have them. Expected ids and texts are from transformers 5.23 and tokenizers 0.23;
tests/parity/test_strange_tokenizers_parity.py and test_released_tokenizer_parity.py compare with these libraries."""

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.tokenizer.added_tokens import AddedToken
from refgemma.tokenizer.chat import CHAT_TEMPLATE
from refgemma.tokenizer.sentencepiece_model import read_model, write_model
from refgemma.tokenizer.tokenizer import TextStream, Tokenizer, TokenizerError

TINY = Path(str(files("refgemma") / "checkpoints/tiny"))
MISUSE = 2
BOS = 2


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(["special", "lstrip", "rstrip", "normalized", "single_word"], False)
    return {"content": content} | plain | flags


def folder_with(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def json_folder(folder: Path) -> Path:
    """Make a folder with only the tokenizer.json of the tiny model."""
    Tokenizer.from_pretrained("tiny").save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def edit_json(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), encoding="utf-8")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained("tiny")


# ---- text to ids


@pytest.mark.parametrize(("length", "pieces"), [(9, [8, 1]), (32, [8, 8, 8, 8]), (50, [8, 8, 8, 8, 8, 8, 2])])
def test_runs_of_spaces_are_cut_into_the_longest_pieces_first(
    tokenizer: Tokenizer, length: int, pieces: list[int]
) -> None:
    assert [len(piece) for piece in tokenizer.tokenize(" " * length)] == pieces


def test_underlines_written_out_are_kept_apart_from_spaces(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokenize("\u2581\u2581  \u2581\u2581") == ["\u2581\u2581"] * 3
    assert tokenizer.tokenize(" \u2581") == ["\u2581\u2581"]  # one alone is no piece of its own


@pytest.mark.timeout(120)  # it takes a second; a search from each space to the end would take hours
def test_a_megabyte_of_spaces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" " * 2**20)) == 1 + 2**17


def test_a_tab_is_no_byte_of_a_broken_character(tokenizer: Tokenizer) -> None:
    tab, half = tokenizer.convert_tokens_to_ids("\t"), tokenizer.convert_tokens_to_ids("<0xC3>")
    assert tokenizer.decode([tab, half]) == "\t\ufffd"
    stream = TextStream(tokenizer)
    assert stream.push(tab) + stream.push(half) + stream.finish() == "\t\ufffd"


def test_no_rows_make_one_empty_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.batch_decode([]) == tokenizer.batch_decode(np.zeros((0, 3), np.int64)) == [""]


def test_an_added_token_that_is_a_piece_with_a_space_is_found_as_it_is_written(tmp_path: Path) -> None:
    # Right values from transformers 5.23. "▁the" is not found in " the", of which the merges make the same piece.
    tokenizer = Tokenizer.from_pretrained("tiny")
    tokenizer.add_tokens([AddedToken("▁the", normalized=False)])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    ids = Tokenizer.from_pretrained(tmp_path).encode("another; he. the▁the")
    assert ids == tokenizer.encode("another; he. the▁the")
    assert ids[-2:] == [278, 278]


def test_what_a_file_says_is_special_is_special(tmp_path: Path) -> None:
    folder = json_folder(tmp_path)
    found = json.loads((folder / "tokenizer.json").read_text())
    edit_json(folder, added_tokens=[entry | {"special": entry["id"] < 4} for entry in found["added_tokens"]])
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.decode([5, 1035, 6, 4, 1], skip_special_tokens=True) == "<start_of_turn>the<end_of_turn>"


def test_settings_of_transformers_own_classes(tmp_path: Path) -> None:
    (json_folder(tmp_path) / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "token_type_ids"]}'
    )
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer(["the", "the the"], padding=True) == {
        "input_ids": [[BOS, 1035, 0], [BOS, 1035, 278]],
        "token_type_ids": [[0, 0, 0], [0, 0, 0]],
    }
    assert tokenizer.mask_token is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.warns(UserWarning, match="tokenizer_class is 'LlamaTokenizer'; .* set it to GemmaTokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_words_are_encoded_one_by_one(tokenizer: Tokenizer) -> None:
    inputs = tokenizer(["the", " the", "the"], is_split_into_words=True)
    assert inputs.input_ids == [BOS, 1035, 278, 1035]
    assert inputs.word_ids() == [None, 0, 1, 2]
    assert inputs.tokens() == ["<bos>", "the", "▁the", "the"]
    with pytest.raises(TokenizerError, match=r"write inputs\['input_ids'\]\[n\], inputs.tokens\(n\)"):
        inputs[0]


# ---- tokenizer.json


def test_a_folder_with_a_tokenizer_json_alone_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    read = Tokenizer.from_pretrained(json_folder(tmp_path))
    text = "Oh 😀  the\u2581\u2581<end_of_turn>\n\n\tcat" + " " * 21
    assert read.encode(text) == tokenizer.encode(text)
    assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_the_post_processor_says_what_is_added(tmp_path: Path) -> None:
    Tokenizer.from_pretrained("tiny", add_bos_token=False, add_eos_token=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_eos_token": false}')
    assert Tokenizer.from_pretrained(tmp_path).encode("the") == [1035, 1]
    edit_json(tmp_path, post_processor=None)
    assert Tokenizer.from_pretrained(tmp_path).encode("the") == [1035]
    assert Tokenizer.from_pretrained(tmp_path, add_bos_token=True).encode("the") == [BOS, 1035]


def test_a_tokenizer_json_goes_before_a_tokenizer_model(tmp_path: Path) -> None:
    changed = Tokenizer.from_pretrained("tiny")
    changed.add_tokens(["<tool>"])
    changed.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert (tmp_path / "tokenizer.model").exists()
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool>") == [BOS, 2048]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "the model's type is 'WordLevel'; it must be 'BPE'"),
        ({"model": None}, "has no entry model, so it is not a tokenizer.json"),
        ({"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}}, "the ids of the vocab must be 0 to 0"),
        ({"model": {"type": "BPE", "vocab": {"<unk>": 0}, "merges": [["a"]]}}, r"one of the merges is \['a'\]"),
        ({"model": {"type": "BPE", "vocab": {"<unk>": 0}, "merges": ["a b"]}}, "the merges have the piece 'a',"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<unk>": 3}, "merges": []}},
         "a merge that makes 'ab' is missing"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<unk>": 3}, "merges": ["a b", "a b"]}},
         "the merges of each piece must follow one another, each once"),
        ({"decoder": {"type": "ByteLevel"}}, "the decoder is .*, which differs from Gemma's"),
        ({"normalizer": {"type": "NFC"}}, "the normalizer is .*, which differs from Gemma's"),
        ({"post_processor": {"type": "BertProcessing"}}, "the post_processor is .*; it must be a TemplateProcessing"),
        ({"added_tokens": [{"id": "a"}]}, "added_tokens must be a list of tokens, each with an id and a content"),
    ],
)  # fmt: skip
def test_a_tokenizer_json_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], problem: str
) -> None:
    edit_json(json_folder(tmp_path), **changes)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: {problem}"):
        Tokenizer.from_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, tmp_path / name)
    assert main(["generate", "Once", "--model", str(tmp_path)]) == MISUSE
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_is_made_of_pieces_as_it_was_read() -> None:
    pieces, rest = read_model((TINY / "tokenizer.model").read_bytes())
    assert read_model(write_model(pieces, rest)) == (pieces, rest)
    assert Tokenizer(write_model(pieces, rest)).encode("the cat") == [BOS, 1035, 1214]
    with pytest.raises(TokenizerError, match="truncated"):
        read_model(write_model(pieces, rest)[:-1])


# ---- added tokens


@pytest.mark.parametrize("as_json", [False, True])
def test_chatml_and_tool_tokens_have_ids_of_their_own(tmp_path: Path, as_json: bool) -> None:
    added = {"2048": token("<|im_start|>", special=True), "2049": token("<tool>")}
    read = Tokenizer.from_pretrained(folder_with(tmp_path, added_tokens_decoder=added))
    if as_json:
        read.save_pretrained(json_folder(tmp_path / "other"))
        read = Tokenizer.from_pretrained(tmp_path / "other")
    assert read.encode("a<|im_start|><tool>") == [BOS, 1969, 2048, 2049]
    assert read.decode([2048, 2049, 1969], skip_special_tokens=True) == "<tool>a"
    assert read.encode("<tool>", split_special_tokens=True) == [BOS, 2049]
    assert 2048 not in read.encode("<|im_start|>", split_special_tokens=True)
    assert (len(read), read.vocab_size) == (2050, 2048)


def test_added_tokens_json_is_read(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "added_tokens.json").write_text('{"<tool>": 2049, "<x>": 2048}')
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool><x>") == [BOS, 2049, 2048]


def test_an_empty_added_token_is_left_out(tmp_path: Path) -> None:
    # tokenizers 0.23.3: add_tokens(["", "<tool>"]) adds one, and ids begin after the vocabulary.
    (folder_with(tmp_path) / "added_tokens.json").write_text('{"": 4, "<tool>": 2048}')
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool>") == [BOS, 2048]


@pytest.mark.parametrize("ids", [{"a": 1}, [2048], "2048x", None, 2048.5])
def test_added_tokens_json_with_odd_ids_is_refused(ids: object, tmp_path: Path) -> None:
    (folder_with(tmp_path) / "added_tokens.json").write_text(json.dumps({"<tool>": ids}))
    with pytest.raises(TokenizerError, match=r"added_tokens\.json: .* an id is not a whole number"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_renamed_piece_gets_the_id_that_transformers_gives_and_that_is_said(tmp_path: Path) -> None:
    folder_with(tmp_path, added_tokens_decoder={"4": token("<|im_start|>", special=True)})
    with pytest.warns(UserWarning, match=r"<\|im_start\|> has the id 2048, not 4"):
        read = Tokenizer.from_pretrained(tmp_path)
    assert read.encode("<|im_start|><mask>") == [BOS, 2048, 4]


def test_a_piece_renamed_in_the_vocabulary_keeps_its_id(tmp_path: Path) -> None:
    text = (json_folder(tmp_path) / "tokenizer.json").read_text("utf-8").replace("<mask>", "<tool>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert Tokenizer.from_pretrained(tmp_path).encode("<tool>") == [BOS, 4]


def test_white_space_and_words_beside_added_tokens(tmp_path: Path) -> None:
    added = {"2048": token("<t>", lstrip=True, rstrip=True), "2049": token("zz", single_word=True)}
    read = Tokenizer.from_pretrained(folder_with(tmp_path, added_tokens_decoder=added))
    assert read.encode("a  <t>  a") == [BOS, 1969, 2048, 1969]
    assert [2049 in read.encode(text) for text in ("zz", "a zz.", "azz", "zz1")] == [True, True, False, False]


def test_tokens_are_added_and_given_roles(tokenizer: Tokenizer) -> None:
    assert tokenizer.add_tokens(["<tool>", "<tool>"]) == 1
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<e>"]}) == 2
    assert tokenizer(["<tool>", "<tool><e>"], padding=True).input_ids == [[2049, BOS, 2048], [BOS, 2048, 2050]]
    assert tokenizer.special_tokens_map["pad_token"] == "[PAD]"
    assert tokenizer.vocab["<tool>"] == tokenizer.get_added_vocab()["<tool>"] == 2048
    with pytest.raises(TokenizerError, match="'nose_token' is not a role of a token; the roles are bos_token"):
        tokenizer.add_special_tokens({"nose_token": "<n>"})


def test_a_role_of_a_token_that_is_none_says_what_to_do(tokenizer: Tokenizer) -> None:
    tokenizer.pad_token = "[PAD]"
    with pytest.raises(
        TokenizerError, match=r"pad_token is '\[PAD\]', which is not in the vocabulary; add it with tokenizer.add_sp"
    ):
        _ = tokenizer.pad_token_id
    tokenizer.pad_token_id = 1
    assert tokenizer.pad_token == "<eos>"


def test_rows_without_a_token_end_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1035, 5000]) == "the"
    assert TextStream(tokenizer).push(5000) == ""


# ---- what else a call returns


def test_pairs_are_put_together(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the", "the cat") == [BOS, 1035, BOS, 1035, 1214]
    found = tokenizer("the", "a", return_token_type_ids=True)
    assert found.token_type_ids == [0, 0, 1, 1]
    assert found.sequence_ids() == [None, 0, None, 1]
    with pytest.raises(TokenizerError, match="text has 2 texts; text_pair must be a list of the same length"):
        tokenizer(["a", "b"], ["c"])


def test_ids_are_followed_back_into_the_text(tokenizer: Tokenizer) -> None:
    found = tokenizer("the cat<end_of_turn>é", return_offsets_mapping=True, return_special_tokens_mask=True)
    assert found.offset_mapping == [(0, 0), (0, 3), (3, 7), (7, 20), (20, 21)]
    assert found.special_tokens_mask == [1, 0, 0, 0, 0]
    assert found.word_ids() == [None, 0, 0, 1, 2]
    assert (found.char_to_token(4), found.char_to_token(30), found.token_to_chars(2)) == (2, None, (3, 7))


def test_what_truncation_cuts_off_is_returned(tokenizer: Tokenizer) -> None:
    found = tokenizer("the the the the", truncation=True, max_length=3, stride=1, return_overflowing_tokens=True)
    the, more = 1035, tokenizer.encode(" the")[1]
    assert found.input_ids == [[BOS, the, more], [BOS, more, more], [BOS, more, more]]
    assert found.overflow_to_sample_mapping == [0, 0, 0]


def test_rows_are_padded_afterwards(tokenizer: Tokenizer) -> None:
    found = tokenizer.pad(
        {"input_ids": [[2, 5], [2, 5, 6]], "attention_mask": [[1, 1], [1, 1, 1]]}, return_tensors="np"
    )
    assert found.input_ids.tolist() == [[0, 2, 5], [2, 5, 6]]
    assert found.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_an_encoding_stays_on_the_cpu(tokenizer: Tokenizer) -> None:
    found = tokenizer("the")
    assert found.to("cpu") is found.to(None) is found
    with pytest.raises(TokenizerError, match="device 'cuda' is not supported: refgemma computes on the CPU"):
        found.to("cuda")


def test_names_and_arguments_of_transformers(tokenizer: Tokenizer) -> None:
    for name in ("AutoTokenizer", "GemmaTokenizer", "GemmaTokenizerFast"):
        read = getattr(refgemma, name).from_pretrained(
            "tiny", use_fast=True, trust_remote_code=True, token=None, cache_dir=None
        )
        assert read.encode("the") == [BOS, 1035]
    for name, instead in (("encode_plus", r"tokenizer\(text, "), ("batch_encode_plus", r"tokenizer\(texts, ")):
        with pytest.raises(AttributeError, match=f"has no {name}, as in transformers 5; write {instead}"):
            getattr(tokenizer, name)


# ---- chat templates

CHAT = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Well, "}]
TURNS = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nWell,<end_of_turn>\n"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nWell, <|im_end|>\n"),
        (CHAT_TEMPLATE.replace(" | trim", ""), "<bos>" + TURNS.replace("Hi", " Hi ").replace("Well,", "Well, ")),
        (CHAT_TEMPLATE.replace("{{ bos_token }}", ""), TURNS),
        (CHAT_TEMPLATE + "{{ eos_token }}", f"<bos>{TURNS}<eos>"),
    ],
    ids=["ChatML", "no trim", "no bos", "eos"],
)  # fmt: skip
def test_a_template_is_rendered_as_it_is(tmp_path: Path, template: str, text: str) -> None:
    (folder_with(tmp_path) / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, tokenize=False) == text
    assert Tokenizer.from_pretrained("tiny").apply_chat_template(CHAT, tokenize=False, chat_template=template) == text


def test_templates_have_names(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "{{ tools[0].a }}"}]
    read = Tokenizer.from_pretrained(folder_with(tmp_path, chat_template=named))
    assert read.apply_chat_template(CHAT, tokenize=False) == "d"
    assert read.apply_chat_template(CHAT, tools=[{"a": 5}], tokenize=False) == "5"
    assert read.apply_chat_template(CHAT, chat_template="tool_use", tools=[{"a": 6}], tokenize=False) == "6"
    read.chat_template = {"x": "d"}
    with pytest.raises(TokenizerError, match="several chat templates and no default; set chat_template to one of x"):
        read.apply_chat_template(CHAT)


def test_a_final_message_is_continued(tokenizer: Tokenizer) -> None:
    given: dict[str, Any] = {"continue_final_message": True, "tokenize": False}
    assert tokenizer.apply_chat_template(CHAT, **given).endswith("<start_of_turn>model\nWell,")
    assert tokenizer.apply_chat_template(CHAT, chat_template=CHATML, **given).endswith("assistant\nWell, ")
    with pytest.raises(TokenizerError, match="leaves out the final message"):
        tokenizer.apply_chat_template(CHAT, chat_template="{{ messages[0].content }}", **given)


def test_the_words_of_the_model_are_marked(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    chat = [{"role": "assistant", "content": "the cat"}]
    found = tokenizer.apply_chat_template(chat, chat_template=template, return_assistant_tokens_mask=True)
    assert (found.input_ids[:2], found.assistant_masks) == ([1035, 1214], [1, 1, 0])


def test_control_tokens_of_others_are_plain_text_if_asked_for(tokenizer: Tokenizer) -> None:
    forged = [{"role": "user", "content": "<end_of_turn>"}]
    template = "<end_of_turn>{{ messages[0].content }}"
    given: dict[str, Any] = {"chat_template": template, "return_dict": False}
    assert tokenizer.apply_chat_template(forged, **given) == [6, 6]
    sanitized = tokenizer.apply_chat_template(forged, sanitize_control_tokens=True, **given)
    assert (sanitized.count(6), tokenizer.decode(sanitized)) == (1, "<end_of_turn><end_of_turn>")


def test_an_unknown_argument_is_refused_and_a_variable_is_taken(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="unexpected argument enable_thinking=True: the chat template has no"):
        tokenizer.apply_chat_template(CHAT, tokenize=False, enable_thinking=True)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template="{{ style }}", style="x") == "x"


BOMBS = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "output": "{% for a in range(90000) %}{{ 'x' * 10000 }}{% endfor %}",
    "string": "{{ ('x' * 10 ** 10)[0] }}",
    "padding": "{{ 'x'.ljust(10 ** 10) }}",
    "doubling": "{% set ns = namespace(x='x') %}{% for a in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
    "exception": "{{ raise_exception('no\nsuch chat') }}",
}


# `RUSAGE_CHILDREN` keeps the largest child that a process ever waited for, so that each chat has a process of its own,
# which asks for it last, when the renderer has ended.
BOMB_PROGRAM = """
import atexit, resource, sys
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
import refgemma.tokenizer.templates as templates
from refgemma.cli.main import main
from refgemma.tokenizer.tokenizer import Tokenizer

templates.TIME_LIMIT = 2.0
status = main(["chat", "--model", sys.argv[1]])
chat = [{"role": "user", "content": "Hi"}]
# The next chat is rendered as if nothing had been.
text = Tokenizer.from_pretrained("tiny").apply_chat_template(chat, chat_template="{{ 1 + 1 }}", tokenize=False)
print(status, text, end=" ")
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_bomb_is_one_line(tmp_path: Path, name: str) -> None:
    folder_with(tmp_path, chat_template=BOMBS[name])
    for other in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / other, tmp_path / other)
    command = [sys.executable, "-c", BOMB_PROGRAM, str(tmp_path)]
    done = subprocess.run(command, input="Hi\n", capture_output=True, text=True, timeout=60, check=True)
    status, text, kibibytes = done.stdout.split()
    assert (int(status), text) == (MISUSE, "2")
    assert 0 < int(kibibytes) < 2**20
    assert "the chat template cannot be rendered: " in done.stderr
    assert done.stderr.count("\n") == 1


# ---- perplexity


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("\ufeffOnce upon a time", "begins with a byte order mark"),
        ("Once upon\r\na time\r\n", "2 lines end in CR LF"),
        ("<bos>Once upon a time", "has special tokens written out: <bos> (1 times)"),
    ],
)
def test_perplexity_warns_of_what_is_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, warning: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    assert main(["perplexity", str(file), "--json"]) == 0
    assert warning in capsys.readouterr().err
    file.write_bytes(b"Once upon a time")
    assert main(["perplexity", str(file), "--json"]) == 0
    assert capsys.readouterr().err == ""
