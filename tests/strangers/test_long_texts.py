"""Test long texts and chats: each token is read once, the output names the measure, and the maximum length holds."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma import fast
from refgemma.cli.main import main
from refgemma.generation.decode import Memory, collect_settings, continue_prompt
from refgemma.generation.perplexity import GEMMA_CPP_TOKENS
from refgemma.goldens.released import published_text

TINY = refgemma.load("tiny")
TEXT = published_text("gettysburg")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a text of about 4,700 tokens that gives no warning."""
    path = tmp_path / "text"
    path.write_text(TEXT * 11)
    return path


def measure(path: Path, capsys: Any, *options: str) -> dict[str, Any]:
    assert main(["perplexity", str(path), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_each_token_is_computed_once(text: Path, monkeypatch: Any, capsys: Any) -> None:
    read: list[int] = []

    def count(start: Any, *rest: Any) -> Iterator[Any]:
        read.append(start.embedded.shape[1])
        return fast_outputs(start, *rest)

    fast_outputs = fast.outputs
    monkeypatch.setattr(fast, "outputs", count)
    found = measure(text, capsys)
    assert found["tokens"] > GEMMA_CPP_TOKENS
    assert found["tokens"] - 20 < sum(read) - (GEMMA_CPP_TOKENS - 1) <= found["tokens"]
    read.clear()
    measure(text, capsys, "--stride", "160")
    assert sum(read) > 1.9 * found["tokens"]  # what the option costs


@pytest.mark.slow
def test_bits_a_byte_are_of_the_whole_text(text: Path, capsys: Any) -> None:
    found = measure(text, capsys)
    whole = found["transformers"]
    nats = whole["nats_per_token"] * (found["tokens"] - 1)
    assert math.isclose(whole["bits_per_byte"], nats / math.log(2) / len(text.read_bytes()), rel_tol=1e-12)
    assert found["gemma_cpp_tokens"] == GEMMA_CPP_TOKENS
    assert found["gemma_cpp_bits_per_byte"] < 0.9 * whole["bits_per_byte"]  # of a part of the tokens, over all bytes
    assert main(["perplexity", str(text)]) == 0
    said = capsys.readouterr().out
    assert f"{whole['bits_per_byte']:.4f} bits per byte of the whole text" in said
    assert f"sums the first 3072 of the {found['tokens']} tokens" in said
    assert f"{found['gemma_cpp_bits_per_byte']:.4f}" not in said


def test_bits_of_a_text_in_one_window_are_those_of_gemma_cpp(tmp_path: Path, capsys: Any) -> None:
    """They differ by the first token, which only gemma.cpp counts."""
    (tmp_path / "short").write_text(TEXT[:300])
    found = measure(tmp_path / "short", capsys)
    first = math.log2(TINY.config.vocab_size) / 300
    assert math.isclose(found["transformers"]["bits_per_byte"] + first, found["gemma_cpp_bits_per_byte"], rel_tol=1e-9)


@pytest.mark.parametrize("option", ["--max-length", "--stride"])
def test_zero_is_not_taken_for_the_default(option: str, text: Path, capsys: Any) -> None:
    assert main(["perplexity", str(text), option, "0"]) == 2
    assert "max_length must be at least 2" in capsys.readouterr().err


# --- talks ------------------------------------------------------------------------------------------------------------


def talk(lines: list[str], capsys: Any, monkeypatch: Any, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = main(["chat", "--json", *options])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def count_reads(monkeypatch: Any) -> list[int]:
    """Record the number of tokens that the definition reads in each call."""
    read: list[int] = []
    definition = refgemma.model.next_token_logits

    def count(ids: Any, **named: Any) -> Any:
        read.append(np.shape(ids)[1])
        return definition(ids, **named)

    monkeypatch.setattr("refgemma.generation.decode.definition", count)
    return read


@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8", "--seed", "3"]], ids=["greedy", "sampled"])
def test_a_talk_is_read_once_and_is_the_same(sampling: list[str], capsys: Any, monkeypatch: Any) -> None:
    lines, options = ["Who are you?", "And who is she?", "Where?"], ["--max-new-tokens", "12", *sampling]
    read = count_reads(monkeypatch)
    code, turns, err = talk(lines, capsys, monkeypatch, *options)
    assert (code, len(turns), err) == (0, 3, "")
    once = sum(read)
    monkeypatch.setattr(Memory, "find", lambda *_: None)
    read.clear()
    assert talk(lines, capsys, monkeypatch, *options)[1] == turns
    messages = []
    for line, turn in zip(lines, turns, strict=True):
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": turn["text"]}]
    whole = len(TINY.tokenizer.apply_chat_template(messages, return_dict=False))
    # An answer that the template trims, or that has other tokens when it is read as text, is read once more.
    assert once <= whole + 12 * 3
    assert sum(read) > once + 30


def test_what_was_read_is_found_by_its_tokens() -> None:
    memory, prompt = Memory(), TINY.tokenizer.encode("Once upon a time")
    call = collect_settings(TINY.config, 4, 0.0, None, None, 0, (), {})
    new = list(continue_prompt(prompt, TINY.weights, TINY.config, call, memory=memory))
    for text, seen in ((prompt + new, 4 + len(prompt) - 1), ([*prompt, 5], len(prompt)), (prompt, 0), ([2, 9, 9], 0)):
        cache = memory.find(text)
        assert (cache.get_seq_length() if cache else 0) == seen
    again = list(continue_prompt(prompt + new[:2], TINY.weights, TINY.config, call, memory=memory))
    assert again[:2] == new[2:]  # the cache after the prompt was not spoilt by what came after it


@pytest.mark.slow
def test_a_talk_ends_at_the_models_positions(capsys: Any, monkeypatch: Any) -> None:
    code, turns, err = talk(["Tell me of a king."] * 9, capsys, monkeypatch, "--max-new-tokens", "100")
    assert code == 2
    assert 2 <= len(turns) < 9
    said = "the chat has 320 tokens; the model's maximum is 320 (max_position_embeddings): start a new chat"
    assert err == f"refgemma chat: {said}\n"


def test_a_first_turn_that_is_too_long_is_refused(capsys: Any, monkeypatch: Any) -> None:
    code, turns, err = talk(["a king and a queen " * 200], capsys, monkeypatch)
    assert (code, turns, err.count("\n")) == (2, [], 1)
    assert "the model's maximum is 320" in err


def test_a_page_says_how_much_it_holds_before_weights_are_read(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("refgemma.weights.checkpoint.Checkpoint.weights", lambda *_: pytest.fail("were read"))
    assert main(["explore", "--ids", ",".join(["2"] * 130)]) == 2
    said = "the prompt has 130 tokens; with this model a page of 2 MB holds at most 129; give a shorter prompt"
    assert capsys.readouterr().err == f"refgemma explore: {said}\n"
    for command in (["generate", "--ids", "2,99999"], ["trace", "-o", "x", "--ids", "99999"], ["explore", ""]):
        assert main(command) == 2
