"""Compare tokenizers of trained models, read by transformers and by refgemma: equal ids, texts and errors."""

import copy
import json
import shutil
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from refgemma.tokenizer.tokenizer import AutoTokenizer, Tokenizer, TokenizerError
from refgemma.tokenizer.tools import make_json_schema

TINY = Path(str(files("refgemma") / "checkpoints/tiny"))
TEXTS = [
    "the cat",
    "a<tool> b<|im_start|>user\nHi<|im_end|>",
    "<end_of_turn> <bos><mask>x",
    " " * 3 + "\n\n\u2581\u2581x",
    "é😀 lead",
    "",
]


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(["special", "lstrip", "rstrip", "normalized", "single_word"], False)
    return {"content": content} | plain | flags


DECLARED = {
    "5": token("<start_of_turn>", special=True),
    "6": token("<end_of_turn>", special=True),
    "4": token("<mask>", special=True),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "special and not": {"added_tokens_decoder": {"2049": token("<|im_start|>", special=True), "2048": token("<tool>")}},
    "normalized": {
        "added_tokens_decoder": {"2048": token("<tool> b", normalized=True), "2049": token(" lead", normalized=True)}
    },
    "strips": {
        "added_tokens_decoder": {
            "2048": token("<tool>", lstrip=True, rstrip=True, special=True),
            "2049": token("Hi", single_word=True),
        }
    },
    "within words": {
        "added_tokens_decoder": {"2048": token("he", single_word=True), "2049": token("at", normalized=True)}
    },
}


def from_folder(folder: Path) -> Any:
    from transformers import GemmaTokenizer

    return GemmaTokenizer.from_pretrained(folder, local_files_only=True)


pytestmark = pytest.mark.filterwarnings("ignore:.* has the id .*, not ")  # where a declared id is not the one given


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = CONFIGS[request.param]
    decoder = DECLARED | config["added_tokens_decoder"]
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_bos_token": True, "added_tokens_decoder": decoder})
    )
    return tmp_path


def same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode(text, split_special_tokens=True) == theirs.encode(text, split_special_tokens=True), text
        expected = theirs(
            text,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_token_type_ids=True,
            return_length=True,
        )
        found = ours(
            text,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_token_type_ids=True,
            return_length=True,
        )
        assert found == dict(expected)
        assert found.word_ids() == expected.word_ids()


def test_added_tokens_have_the_same_ids(folder: Path) -> None:
    same(Tokenizer.from_pretrained(folder), from_folder(folder))


def test_what_transformers_saves_is_read_to_the_same_ids(folder: Path, tmp_path: Path) -> None:
    theirs = from_folder(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    same(Tokenizer.from_pretrained(tmp_path / "theirs"), from_folder(tmp_path / "theirs"))


def test_what_is_saved_is_read_by_transformers_to_the_same_ids(folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    same(ours, from_folder(tmp_path / "ours"))
    same(Tokenizer.from_pretrained(tmp_path / "ours"), from_folder(tmp_path / "ours"))


@pytest.mark.parametrize("length", [*range(1, 70), 200, 1001])
def test_runs_of_a_saved_bare_file_are_read_as_they_were_saved(bare_saved: tuple[Tokenizer, Any], length: int) -> None:
    ours, theirs = bare_saved
    for text in (" " * length, f"a{' ' * length}the", "\u2581" * length, "e" * length, "th" * length):
        assert ours.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def bare_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(TINY / "tokenizer.model", folder)
    from_folder(folder).save_pretrained(folder / "saved")
    return Tokenizer.from_pretrained(folder / "saved"), from_folder(folder / "saved")


def test_renamed_tokens_and_added_tokens_json(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 2049, "<|im_start|>": 2048}))
    same_ids(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"7": token("<tool>", special=True)}})
    )
    same_ids(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"extra_special_tokens": ["<tool>"], "pad_token": "[PAD]", "img_token": "<|im_end|>"})
    )
    (tmp_path / "added_tokens.json").unlink()
    ours, theirs = Tokenizer.from_pretrained(tmp_path), from_folder(tmp_path)
    for name in ("<tool>", "[PAD]", "<|im_end|>"):
        assert ours.convert_tokens_to_ids(name) == theirs.convert_tokens_to_ids(name) >= 2048


def same_ids(folder: Path) -> None:
    ours, theirs = Tokenizer.from_pretrained(folder), from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


# ---- every kind of added token, by every file that can list it

CONTENTS = [
    "the", "▁the", "he", "▁", "▁▁", "\n", "\n\n", "t", "▁t", "at", "ing", "<tool>", "▁lead", " lead", "a b", "the cat",
    "▁the▁", "☃", "é", "<b>", "<0x41>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "x ▁", " ",
]  # fmt: skip
WORDS = [content for content in CONTENTS if content != "<start_of_turn>"] + [
    "another;", "he.", "   ", " cat", " the", "king", "\r\n", "A", "\t",
]  # fmt: skip
ROUTES = ["json", "config and json", "plain class and json", "config and model", "added_tokens and json"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """Return both libraries' tokenizers for a tokenizer.json that transformers wrote, and for one that refgemma
    wrote."""
    folder = tmp_path_factory.mktemp("kinds")
    from_folder(TINY).save_pretrained(folder / "theirs")
    Tokenizer.from_pretrained("tiny").save_pretrained(folder / "ours")
    names = {False: "theirs", True: "ours"}
    return {key: json.loads((folder / name / "tokenizer.json").read_text()) for key, name in names.items()}


def write_route(folder: Path, route: str, entries: list[dict[str, Any]], found: dict[str, Any]) -> None:
    ids, number = found["model"]["vocab"], len(found["model"]["vocab"])
    for entry in entries:
        if (known := ids.get(entry["content"])) is None:
            known, number = number, number + 1
        entry["id"] = known
    if route == "json":
        kept = [e for e in found["added_tokens"] if e["content"] not in {entry["content"] for entry in entries}]
        found = found | {"added_tokens": sorted([*kept, *entries], key=lambda entry: entry["id"])}
    if "json" in route:
        (folder / "tokenizer.json").write_text(json.dumps(found))
    else:
        shutil.copy(TINY / "tokenizer.model", folder)
    config: dict[str, Any] = {"add_bos_token": True, "tokenizer_class": "GemmaTokenizer"}
    if route.startswith(("config", "plain")):
        config["added_tokens_decoder"] = {
            entry["id"]: {key: value for key, value in entry.items() if key != "id"} for entry in entries
        }
    if route.startswith("plain"):
        config |= {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad")}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if route.startswith("added"):
        (folder / "added_tokens.json").write_text(json.dumps({e["content"]: e["id"] for e in entries}))
        config["extra_special_tokens"] = [entries[0]["content"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_every_kind_of_added_token_from_every_file(
    kinds: dict[bool, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, route: str, data: st.DataObject
) -> None:
    from transformers import GemmaTokenizer, PreTrainedTokenizerFast

    flags = st.fixed_dictionaries(
        {name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    )
    contents = data.draw(st.lists(st.sampled_from(CONTENTS), min_size=1, max_size=3, unique=True))
    folder = tmp_path_factory.mktemp("route")
    write_route(folder, route, [{"content": c} | data.draw(flags) for c in contents], kinds[data.draw(st.booleans())])
    kind = PreTrainedTokenizerFast if route.startswith("plain") else GemmaTokenizer
    ours, theirs = Tokenizer.from_pretrained(folder), kind.from_pretrained(folder, local_files_only=True)
    assert (len(ours), ours.padding_side, ours.mask_token) == (len(theirs), theirs.padding_side, theirs.mask_token)
    # A tab of a bare tokenizer.model has the name of the released file here, and that of its byte in transformers.
    words = st.lists(st.sampled_from(WORDS if "json" in route else WORDS[:-1]), min_size=1, max_size=6)
    for text in ["another; he. the", *("".join(data.draw(words)) for _ in range(8))]:
        for split in (False, True):
            given: dict[str, Any] = {"split_special_tokens": split, "return_offsets_mapping": True}
            found, expected = ours(text, **given), theirs(text, **given)
            assert found == dict(expected), text
            assert found.tokens() == expected.tokens()
            assert ours.convert_ids_to_tokens(found.input_ids) == theirs.convert_ids_to_tokens(found.input_ids)
            for skip in (False, True):
                assert ours.decode(found.input_ids, skip) == theirs.decode(found.input_ids, skip)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("pair")
    AutoTokenizer.from_pretrained("tiny").save_pretrained(folder)
    return Tokenizer.from_pretrained(folder), from_folder(folder)


LONG = "Alice met the king. " * 5
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("a", "b"), {}),
    ((["a b", "the"], ["the cat", "x"]), {"padding": True}),
    (([("a", "b"), ("the cat", "c")],), {"padding": True, "return_token_type_ids": True}),
    ((LONG, LONG), {"truncation": True, "max_length": 20}),
    ((LONG, "the cat"), {"truncation": True, "max_length": 20}),
    (("the cat", LONG), {"truncation": "longest_first", "max_length": 21}),
    ((LONG, LONG), {"truncation": "only_first", "max_length": 50}),
    ((LONG, LONG), {"truncation": "only_second", "max_length": 50}),
    ((LONG,), {"truncation": True, "max_length": 16, "stride": 4, "return_overflowing_tokens": True}),
    (([LONG, "the cat"],), {"truncation": True, "max_length": 9, "return_overflowing_tokens": True, "padding": True}),
    (([LONG, "a"],), {"return_offsets_mapping": True, "padding": True, "return_special_tokens_mask": True}),
    ((["the", " cat<bos>", ""],), {"is_split_into_words": True, "return_offsets_mapping": True}),
    (([["the", "cat"], ["é"]], [["a"], ["b c"]]), {"is_split_into_words": True, "padding": True}),
    (("the cat",), {"return_offsets_mapping": True, "return_length": True, "padding": "max_length", "max_length": 6}),
]


@pytest.mark.parametrize(("texts", "arguments"), CALLS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_calls_give_the_same(pair: tuple[Tokenizer, Any], texts: Any, arguments: dict[str, Any], side: str) -> None:
    ours, theirs = pair
    ours.truncation_side = theirs.truncation_side = side
    found, expected = ours(*texts, **arguments), theirs(*texts, **arguments)
    assert found == dict(expected)
    rows = range(len(expected.encodings))
    assert [found.tokens(n) for n in rows] == [expected.tokens(n) for n in rows]
    if "is_split_into_words" in arguments:
        assert [found.word_ids(n) for n in rows] == [expected.word_ids(n) for n in rows]
    ours.truncation_side = theirs.truncation_side = "right"


def test_tokens_are_added_alike(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    Tokenizer.from_pretrained("tiny").save_pretrained(tmp_path)
    both = Tokenizer.from_pretrained(tmp_path), from_folder(tmp_path)
    results = []
    for tokenizer in both:
        results.append([
            tokenizer.add_tokens(["<tool>", " lead", "the", "<tool>"]),
            tokenizer.add_tokens([AddedToken("<x>", rstrip=True)], special_tokens=True),
            tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<e1>", "<e2>"]}),
            len(tokenizer), tokenizer.vocab_size, tokenizer.pad_token_id, tokenizer.special_tokens_map,
            tokenizer.encode("<x>  the<tool> lead [PAD]<e1><e2>"), tokenizer.vocab == tokenizer.get_vocab(),
            tokenizer(["a", "a b"], padding=True), tokenizer.convert_tokens_to_string(["▁a", "<0xC3>", "<0xA9>", "b"]),
            tokenizer.pad({"input_ids": [[2, 5], [2, 5, 6]], "labels": [[1], [1]]}, padding=True)["input_ids"],
            tokenizer.num_special_tokens_to_add(), tokenizer.get_added_vocab()["<tool>"],
            tokenizer.decode([2, 2048, 2049, 3000, 2050], skip_special_tokens=True),
        ])  # fmt: skip
    ours, theirs = results
    theirs[9] = dict(theirs[9])
    assert ours == theirs
    both[0].save_pretrained(tmp_path / "again")
    assert from_folder(tmp_path / "again").encode("<x>  the<tool> lead [PAD]<e1>") == both[1].encode(
        "<x>  the<tool> lead [PAD]<e1>"
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_tokens_of_every_kind_are_added_alike(pair: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    from tokenizers import AddedToken

    ours, theirs = (copy.deepcopy(tokenizer) for tokenizer in pair)
    for _ in range(data.draw(st.integers(1, 3))):
        content, special, flag = data.draw(st.tuples(st.sampled_from(CONTENTS), st.booleans(), st.booleans()))
        token = AddedToken(content, lstrip=flag, rstrip=not special, normalized=flag, special=special)
        calls: dict[str, tuple[Any, ...]] = {
            "add_tokens": ([token], data.draw(st.booleans())),
            "add_special_tokens": (data.draw(st.sampled_from([
                {"pad_token": content}, {"extra_special_tokens": [content]}, {"extra_special_tokens": [token]},
            ])),),
        }  # fmt: skip
        name = data.draw(st.sampled_from(sorted(calls)))
        assert getattr(ours, name)(*calls[name]) == getattr(theirs, name)(*calls[name])
    for _ in range(8):
        text = "".join(data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6)))
        for split in (False, True):
            ids = theirs.encode(text, split_special_tokens=split)
            assert ours.encode(text, split_special_tokens=split) == ids
            assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_no_ids_are_an_empty_text(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.batch_decode([]) == theirs.batch_decode([]) == [""]
    assert ours.batch_decode([[]]) == theirs.batch_decode([[]]) == [""]


# ---- chat templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "tools": (
        "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson(indent=2) }}\n{% endfor %}"
        "{% for d in documents or [] %}{{ d.title }}{% endfor %}" + CHATML
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{% endif %}"
        "{{ ns.n }}{{ m.content.strip() | upper }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    ),
    "blocks": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m.content | trim }}\n    {% else %}\n"
        "A: {{ m.content }}\n    {% endif %}\n{% endfor %}"
    ),
    "variable": "{{ style | default('none') }}{{ messages[0].content }}{{ eos_token }}",
}
CHAT = [
    {"role": "user", "content": " Hi <end_of_turn> "},
    {"role": "assistant", "content": "Well, <tool> ", "tool_calls": None},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"tools": [{"name": "é", "n": 1}]},
        {"documents": [{"title": "t"}]},
        {"style": "x"},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_templates_are_rendered_alike(pair: tuple[Tokenizer, Any], name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = pair
    given = arguments | {"chat_template": TEMPLATES[name]}
    if not all(argument in TEMPLATES[name] for argument in arguments if argument in ("tools", "documents", "style")):
        with pytest.raises(TokenizerError, match="the chat template has no such variable"):
            ours.apply_chat_template(CHAT, tokenize=False, **given)
        return
    try:
        expected = theirs.apply_chat_template(CHAT, tokenize=False, **given)
    except ValueError:
        with pytest.raises(TokenizerError):
            ours.apply_chat_template(CHAT, tokenize=False, **given)
        return
    assert ours.apply_chat_template(CHAT, tokenize=False, **given) == expected
    for sanitize in (False, True):
        ids = theirs.apply_chat_template(CHAT, return_dict=False, sanitize_control_tokens=sanitize, **given)
        assert ours.apply_chat_template(CHAT, return_dict=False, sanitize_control_tokens=sanitize, **given) == ids


def test_gemmas_own_template_continues_alike(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for content in ("Well,", "Well, ", " Well,\n"):
        chat = [CHAT[0], {"role": "assistant", "content": content}]
        given: dict[str, Any] = {"continue_final_message": True, "tokenize": False}
        assert ours.apply_chat_template(chat, **given) == theirs.apply_chat_template(chat, **given)


def test_assistant_masks_are_the_same(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    for chats in (CHAT, [CHAT * 2, CHAT]):
        given: dict[str, Any] = {"chat_template": template, "return_assistant_tokens_mask": True}
        assert ours.apply_chat_template(chats, **given) == dict(theirs.apply_chat_template(chats, **given))


def test_templates_of_a_folder_are_the_same(tmp_path: Path) -> None:
    theirs = from_folder(TINY)
    theirs.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["tools"]}
    theirs.save_pretrained(tmp_path)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), from_folder(tmp_path)
    assert ours.chat_template == theirs.chat_template
    for arguments in ({}, {"tools": [{"a": 1}]}, {"chat_template": "tool_use"}):
        given: dict[str, Any] = arguments | {"tokenize": False}
        assert ours.apply_chat_template(CHAT, **given) == theirs.apply_chat_template(CHAT, **given)
    ours.save_pretrained(tmp_path / "ours")
    assert from_folder(tmp_path / "ours").chat_template == theirs.chat_template


# ---- functions as tools


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = 1


def weather(place: str, days: int = 1, unit: Unit = Unit.KELVIN) -> dict[str, float]:
    """
    Tell the weather.

    It may rain.

    Args:
        place: Where, for example
            in Paris: the capital
        days: How many
        unit: Which (choices: ["celsius", 1])

    Returns:
        Temperatures.

    Raises:
        ValueError: Never.
    """
    return {}


def many(
    a: list[int], b: dict[str, list[str]], c: tuple[int, str], d: int | None, e: Union[int, str], f: Any,  # noqa: UP007
    g: Literal["x", 2, None], h: list[int] | str, i: list | tuple, j: Optional[bool] = None,  # type: ignore[type-arg]  # noqa: UP045
) -> bytes:  # fmt: skip
    """Take much.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
    """
    return b""


class Tool:
    def method(self, x: float) -> None:
        """Do it.

        Args:
            x: A number
        """


def no_docstring(a: int) -> None: ...


def no_description(a: int) -> None:
    """Do it."""


def no_annotation(a) -> None:  # type: ignore[no-untyped-def]
    """Do it.

    Args:
        a: A
    """


def no_json(a: bytes) -> None:
    """Do it.

    Args:
        a: A
    """


@pytest.mark.parametrize("function", [weather, many, Tool().method])
def test_a_function_is_the_tool_that_transformers_makes_of_it(pair: tuple[Tokenizer, Any], function: Any) -> None:
    from transformers.utils import get_json_schema

    assert make_json_schema(function) == get_json_schema(function)
    ours, theirs = pair
    arguments: dict[str, Any] = {"tools": [function], "tokenize": False, "chat_template": TEMPLATES["tools"]}
    assert ours.apply_chat_template(CHAT, **arguments) == theirs.apply_chat_template(CHAT, **arguments)


@pytest.mark.parametrize("function", [no_docstring, no_description, no_annotation, no_json])
def test_a_function_that_is_no_tool_is_refused_by_both(pair: tuple[Tokenizer, Any], function: Any) -> None:
    from transformers.utils import get_json_schema

    with pytest.raises(Exception, match=r".*"):
        get_json_schema(function)
    with pytest.raises(
        TokenizerError, match=f"tools: the function {function.__name__} has .*; add it, or give the JSON"
    ):
        pair[0].apply_chat_template(CHAT, tools=[function], chat_template=TEMPLATES["tools"])
