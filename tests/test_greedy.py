"""Test greedy decoding by the definition: it gives the engine's tokens, and the command line uses it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.config import Gemma2Config
from refgemma.generation.generation_config import GenerationConfig
from refgemma.generation.greedy import greedy, is_plain_greedy
from refgemma.inputs import InputError
from refgemma.weights.initial import initial_weights

TINY = refgemma.load("tiny")
PROMPTS = ["Once upon a time", "The king, the queen", "A"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_gives_the_tokens_of_the_engine(prompt: str, dtype: str) -> None:
    """Test fast code in float32, the definition in bfloat16. The sixty tokens of the first prompt exceed the window."""
    model = refgemma.load("tiny", dtype)
    ids, stops = model.tokenizer.encode(prompt), model.stop_ids
    count = 60 if prompt == PROMPTS[0] else 20
    definition = list(greedy(ids, model.weights, model.config, max_new_tokens=count, stop_ids=stops))
    assert definition == list(refgemma.generate(ids, model.weights, model.config, count, stop_ids=stops))
    assert len(definition) > 10


def test_greedy_gives_the_tokens_of_the_engine_with_any_sizes() -> None:
    for seed in range(8):
        config = Gemma2Config(
            vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=1 + seed % 3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=7, sliding_window=1 + seed, initializer_range=0.4,
        )  # fmt: skip
        weights = initial_weights(config, seed)
        found = list(greedy([3, 4 + seed], weights, config, max_new_tokens=20, stop_ids={7}))
        assert found == list(refgemma.generate([3, 4 + seed], weights, config, 20, stop_ids={7}))
        assert len(found) == 20 or found[-1] == 7


def test_greedy_ends_at_a_stop_token_and_at_the_count() -> None:
    ids = TINY.tokenizer.encode(PROMPTS[0])
    five = list(greedy(ids, TINY.weights, TINY.config, max_new_tokens=5))
    assert len(five) == 5
    assert list(greedy(ids, TINY.weights, TINY.config, max_new_tokens=5, stop_ids={five[2]})) == five[:3]
    assert list(greedy(np.array(ids), TINY.weights, TINY.config, max_new_tokens=2)) == five[:2]


def test_greedy_refuses_at_the_call() -> None:
    for prompt, reason in (([], "input_ids is empty"), ([2, 99999], "the vocabulary has")):
        with pytest.raises(InputError, match=reason):
            greedy(prompt, TINY.weights, TINY.config)
    broken = replace(TINY.weights, norm=np.full_like(TINY.weights.norm, np.nan))
    with pytest.raises(InputError, match="the logits are NaN"):
        next(greedy([2], broken, TINY.config))


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 2}, {"repetition_penalty": 1.1}, {"min_length": 1},
     {"no_repeat_ngram_size": 2}, {"min_new_tokens": 1}, {"guidance_scale": 1.5}, {"sequence_bias": {(5,): 1.0}},
     {"bad_words_ids": [[5]]}, {"suppress_tokens": [5]}, {"begin_suppress_tokens": [5]}, {"forced_bos_token_id": 5},
     {"forced_eos_token_id": 5}, {"exponential_decay_length_penalty": (1, 2.0)}, {"stop_strings": "x"},
     {"max_time": 1.0}],
)  # fmt: skip
def test_what_is_more_than_greedy(settings: dict[str, Any]) -> None:
    assert is_plain_greedy(GenerationConfig(max_new_tokens=3, top_k=5, num_beams=1, repetition_penalty=1.0))
    assert not is_plain_greedy(GenerationConfig(**settings))


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [([], 6), (["--temperature", "1"], 0), (["--num-beams", "2"], 0), (["--repetition-penalty", "2"], 0),
     (["--model", "folder"], 0), (["--model", "folder", "--reference"], 6)],
)  # fmt: skip
def test_the_embedded_model_is_computed_by_the_definition(
    arguments: list[str], blocks: int, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """A greedily decoded token runs each block of the definition once; another model uses the fast code."""
    (tmp_path / "folder").symlink_to(TINY.folder)
    monkeypatch.chdir(tmp_path)
    run, ran = refgemma.model.block, []
    monkeypatch.setattr(refgemma.model, "block", lambda *given, **named: ran.append(1) or run(*given, **named))
    assert main(["generate", "Once upon a time", "--max-new-tokens", "1", *arguments]) == 0
    assert len(ran) == blocks
    assert capsys.readouterr().out.startswith("Once upon a time")
