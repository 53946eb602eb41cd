"""Test the settings of a generation: their sources, errors, and the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_model import SMALL, refused

import refgemma
from refgemma.config import ConfigError
from refgemma.generation.decode import (
    collect_settings,
    generate,
    stop_tokens,
)
from refgemma.generation.generation_config import GenerationConfig, merge_settings, resolve_settings
from refgemma.inputs import InputError

TINY = refgemma.load("tiny")
PROMPT = TINY.tokenizer.encode("Once upon a time")
MODEL = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")


def run(**settings) -> list[int]:
    return list(generate(PROMPT, TINY.weights, TINY.config, **{"max_new_tokens": 8, **settings}))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number of at least 1"),
        ({"temperature": -1}, "temperature is -1; it must be a number above 0, "),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
        ({"top_p": -0.5}, "top_p is -0.5; it must be a number from 0 to 1"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p is 2; it must be a number from 0 to 1"),
        ({"num_beams": 2}, "num_beams and num_return_sequences must be 1 for one text"),
        ({"top_q": 0.5}, "unexpected generation option 'top_q'; did you mean top_p?"),
    ],
)
def test_settings_that_mean_nothing(settings, reason) -> None:
    with pytest.raises(InputError, match=reason):
        run(**settings)


def test_settings_come_from_the_call_then_the_config_then_the_model_then_the_defaults() -> None:
    model = GenerationConfig(top_p=0.9, max_length=50, eos_token_id=1)
    call = merge_settings(
        GenerationConfig(top_p=0.8, temperature=0.5), model, {"temperature": 2.0, "max_new_tokens": 3}
    )
    assert (call.top_p, call.temperature, call.eos_token_id, call.top_k) == (0.8, 2.0, 1, 50)
    assert resolve_settings(call, prompt_length=7, vocab_size=64, limit=99).max_length == 10  # max_new_tokens wins


def test_twenty_new_tokens_where_nothing_is_said_but_not_beyond_the_positions() -> None:
    call = merge_settings(None, GenerationConfig(), {})
    assert resolve_settings(call, prompt_length=7, vocab_size=64, limit=99).max_length == 27
    assert resolve_settings(call, prompt_length=7, vocab_size=64, limit=20).max_length == 20


def test_the_folder_says_how_to_generate(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 6]
    settings = {"eos_token_id": [9], "max_new_tokens": 4, "_from_model_config": True, "cache_implementation": "hybrid"}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert refgemma.Gemma2ForCausalLM.from_pretrained(tmp_path).generate([PROMPT]).shape == (1, len(PROMPT) + 4)
    fresh = refgemma.Gemma2ForCausalLM(TINY.config)
    assert fresh.generation_config.to_dict() == {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object, but is a list"),
        ('{"top_k": -1}', "top_k is -1; it must be a whole number of at least 0"),
        ('{"num_beam_groups": 3}', "num_beam_groups = 3 is not supported"),
        ('{"eos_token_id": []}', r"eos_token_id is \(\); it must be a token id or several"),
        ('{"temprature": 2}', "unexpected generation option 'temprature'; did you mean temperature?"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        GenerationConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_the_settings_of_one_text() -> None:
    config = SMALL.config.changed(eos_token_id=(7, 5), pad_token_id=9)
    call = collect_settings(config, 3, 0.5, 4, 0.75, 6, None, {"min_p": 0.25})
    assert (call.max_new_tokens, call.temperature, call.top_k, call.top_p, call.seed) == (3, 0.5, 4, 0.75, 6)
    assert (call.min_p, call.do_sample, call.eos_token_id, call.pad_token_id) == (0.25, True, (5, 7), 9)
    call = collect_settings(config, 3, 0.0, None, None, 0, {8}, {})
    assert (call.do_sample, call.eos_token_id, call.top_k) == (False, (8,), 0)
    assert collect_settings(config, 3, 1.0, 1, None, 0, (), {}).eos_token_id is None
    assert collect_settings(config.changed(eos_token_id=None), 3, 0.0, None, None, 0, None, {}).eos_token_id is None
    refused(
        lambda: collect_settings(config, 3, 1.0, 0, None, 0, None, {}),
        "top_k is 0; it must be at least 1: leave it out to draw from all tokens",
    )
    assert stop_tokens(config) == {5, 7}
    assert stop_tokens(config.changed(eos_token_id=4)) == {4}
    assert stop_tokens(config.changed(eos_token_id=None)) == frozenset()


def test_settings_of_lists_are_kept_and_written(tmp_path: Path) -> None:
    """They are kept as tuples, and written as lists; transformers reads biases in the file as pairs."""
    config = GenerationConfig(
        sequence_bias={(3, np.int64(4)): np.float32(0.5)}, bad_words_ids=[np.array([5, 6])], stop_strings=["a", "b"],
        exponential_decay_length_penalty=[2, 1.5], suppress_tokens=np.array([7]), forced_eos_token_id=(1, 6),
    )  # fmt: skip
    assert config.sequence_bias == (((3, 4), 0.5),)
    assert (config.bad_words_ids, config.suppress_tokens) == (((5, 6),), (7,))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "sequence_bias": [[[3, 4], 0.5]], "bad_words_ids": [[5, 6]], "stop_strings": ["a", "b"],
        "exponential_decay_length_penalty": [2, 1.5], "suppress_tokens": [7], "forced_eos_token_id": [1, 6],
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_bias": {}}, {"sequence_bias": {(): 1.0}}, {"sequence_bias": {(3,): float("nan")}},
        {"sequence_bias": [[3, 1.0]]}, {"sequence_bias": [[[3]]]}, {"bad_words_ids": []}, {"bad_words_ids": [[]]},
        {"bad_words_ids": [[-1]]}, {"bad_words_ids": [["a"]]}, {"suppress_tokens": 5}, {"begin_suppress_tokens": [1.5]},
        {"forced_bos_token_id": [5]}, {"forced_eos_token_id": []}, {"exponential_decay_length_penalty": 2},
        {"exponential_decay_length_penalty": (1, float("inf"))}, {"stop_strings": []}, {"stop_strings": [1]},
        {"max_time": -1}, {"typical_p": 1.1}, {"guidance_scale": "x"}, {"renormalize_logits": 1},
        {"output_attentions": 2},
    ],
    ids=str,
)  # fmt: skip
def test_lists_that_mean_nothing(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(InputError, match=f"^{name} is .*; it must be "):
        GenerationConfig(**settings)
