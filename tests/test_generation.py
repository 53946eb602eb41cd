"""Decoding: greedy is the likeliest token each time; sampling draws what its settings allow, with those odds; a search
with enough beams finds the best text of all. Texts beside transformers: `parity/test_generation_parity.py`."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.config import ConfigError
from refgemma.generation.beams import Rules, advance_search, collect_texts, draw, is_over, largest, start_search
from refgemma.generation.decode import generate
from refgemma.generation.generation_config import GenerationConfig, merge_settings, resolve_settings
from refgemma.generation.processors import keep_min_p, keep_top_k, keep_top_p, to_probabilities
from refgemma.generation.stream import TextStreamer
from refgemma.inputs import InputError
from refgemma.model import forward

TINY = refgemma.load("tiny")
PROMPT = TINY.tokenizer.encode("Once upon a time")


def run(**settings) -> list[int]:
    return list(generate(PROMPT, TINY.weights, TINY.config, **{"max_new_tokens": 8, **settings}))


def test_greedy_is_the_argmax_of_forward() -> None:
    """The recorded text of PyTorch is in the goldens; here each step is checked without a cache."""
    ids = list(PROMPT)
    for token in run():
        assert token == int(np.argmax(forward([ids], TINY.weights, TINY.config).logits[0, -1]))
        ids.append(token)


def test_a_stop_id_ends_the_text_and_is_the_last_token() -> None:
    tokens = run()
    assert run(stop_ids={tokens[3]}) == tokens[: tokens.index(tokens[3]) + 1]


def test_a_seed_fixes_the_draws() -> None:
    assert run(temperature=1.0, seed=3) == run(temperature=1.0, seed=3)
    assert len({tuple(run(temperature=1.0, seed=seed)) for seed in range(4)}) > 1


def test_one_candidate_is_greedy() -> None:
    assert run(temperature=2.0, top_k=1) == run() == run(temperature=1.0, top_p=1e-6)


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = np.log([0.1, 0.4, 0.05, 0.25, 0.2])
    assert np.isfinite(keep_top_k(logits, 2)).tolist() == [False, True, False, True, False]
    # 0.4 + 0.25 is short of 0.7, so the token that passes it stays too.
    assert np.isfinite(keep_top_p(logits, 0.7)).tolist() == [False, True, False, True, True]
    assert np.isfinite(keep_top_p(logits, 1.0)).all()
    assert np.isfinite(keep_top_k(logits, 99)).all()


def test_draws_have_the_computed_odds() -> None:
    """Chi-square of the first token's draws against softmax(logits / temperature) cut to five tokens."""
    logits = forward([PROMPT], TINY.weights, TINY.config).logits[0, -1]
    expected = to_probabilities(keep_top_k(logits.astype(np.float64) / 1.5, 5))
    draws = [run(temperature=1.5, top_k=5, max_new_tokens=1, seed=seed)[0] for seed in range(400)]
    kept = np.flatnonzero(expected)
    assert set(draws) <= set(kept.tolist())
    counts = np.array([draws.count(token) for token in kept])
    chi_square = np.sum((counts - 400 * expected[kept]) ** 2 / (400 * expected[kept]))
    assert chi_square < 18.5  # four degrees of freedom: exceeded once in a thousand sets of seeds, and these are fixed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"temperature": -1}, "temperature must be a number above 0, .* not -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"top_p": -0.5}, "top_p must be a number from 0 to 1, not -0.5"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p must be a number from 0 to 1, not 2"),
        ({"num_beams": 2}, "one text, token by token, has no beams"),
        ({"top_q": 0.5}, "top_q is no setting of generate; is top_p meant?"),
    ],
)
def test_settings_that_mean_nothing(settings, reason) -> None:
    with pytest.raises(InputError, match=reason):
        run(**settings)


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    tokens = run(temperature=temperature)
    assert len(tokens) == 8
    if temperature < 1:
        assert tokens == run()


@pytest.mark.parametrize(("prompt", "reason"), [([], "prompt is empty"), ([2, 5000], r"input_ids\[0, 1\] is 5000")])
def test_prompts_are_refused_at_the_call(prompt, reason) -> None:
    with pytest.raises(InputError, match=reason):
        generate(prompt, TINY.weights, TINY.config)


def test_logits_that_are_nan_are_an_error() -> None:
    """Finite weights, so large that the sums overflow."""
    first = replace(TINY.weights.layers[0], q_proj=np.full_like(TINY.weights.layers[0].q_proj, 3.4e38))
    weights = replace(TINY.weights, layers=[first, *TINY.weights.layers[1:]])
    with np.errstate(all="ignore"), pytest.raises(InputError, match="the logits are NaN"):
        list(generate(PROMPT, weights, TINY.config, 3))


def test_half_precision_generates_too() -> None:
    half = refgemma.load("tiny", dtype="bfloat16")
    assert len(list(generate(PROMPT, half.weights, half.config, max_new_tokens=3, temperature=1.0))) == 3


# --- the method -------------------------------------------------------------------------------------------------------

MODEL = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")


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
        ("[]", "holds a list, not a JSON object"),
        ('{"top_k": -1}', "top_k must be a whole number of at least 0, not -1"),
        ('{"num_beam_groups": 3}', "num_beam_groups = 3 is not computed here"),
        ('{"eos_token_id": []}', "eos_token_id must be a token id, or several"),
        ('{"temprature": 2}', "temprature is no setting of generate; is temperature meant?"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        GenerationConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_a_prompt_means_the_same_with_padding_at_its_left() -> None:
    alone = MODEL.generate([PROMPT], max_new_tokens=70, eos_token_id=None)[0]
    padded = [[0] * 5 + PROMPT, [2] * (5 + len(PROMPT))]
    for mask in (None, [[0] * 5 + [1] * len(PROMPT), [1] * (5 + len(PROMPT))]):
        batch = MODEL.generate(padded, attention_mask=mask, max_new_tokens=70, eos_token_id=None)
        assert batch[0, 5:].tolist() == alone.tolist()


def test_without_a_cache_the_tokens_are_the_same() -> None:
    for settings in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 5}):
        texts = [MODEL.generate([PROMPT], max_new_tokens=9, use_cache=use, **settings) for use in (True, False)]
        assert texts[0].tolist() == texts[1].tolist()


def test_an_ended_text_is_filled_while_others_go_on() -> None:
    greedy = MODEL.generate([PROMPT, PROMPT[::-1]], max_new_tokens=8, eos_token_id=None)
    end = int(greedy[0, len(PROMPT) + 2])
    assert end not in greedy[1, len(PROMPT) :]
    found = MODEL.generate([PROMPT, PROMPT[::-1]], max_new_tokens=8, eos_token_id=[end, 5])
    assert found[0, len(PROMPT) :].tolist() == [*greedy[0, len(PROMPT) : len(PROMPT) + 3], 0, 0, 0, 0, 0]
    assert found[1].tolist() == greedy[1].tolist()
    later = MODEL.generate([PROMPT], max_new_tokens=8, eos_token_id=end, min_new_tokens=5)
    assert end not in later[0, len(PROMPT) : len(PROMPT) + 5]


def test_several_sequences_are_drawn_apart_and_a_seed_fixes_them() -> None:
    def sampled(**settings: Any) -> Any:
        return MODEL.generate([PROMPT], do_sample=True, num_return_sequences=3, max_new_tokens=8, **settings).tolist()

    assert len(sampled()) == 3
    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert len({tuple(row) for row in sampled(seed=1)}) == 3


def test_a_record_has_what_was_asked_for() -> None:
    found = MODEL.generate([PROMPT], max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert list(found.keys()) == ["sequences", "logits", "past_key_values"]
    assert found.past_key_values.get_seq_length() == len(PROMPT) + 2
    again = MODEL.generate(found.sequences, past_key_values=found.past_key_values, max_new_tokens=3)
    assert again.tolist() == MODEL.generate([PROMPT], max_new_tokens=6).tolist()


def test_processors_and_criteria_of_the_caller() -> None:
    def only_seven(ids: Any, scores: Any) -> Any:
        return np.where(np.arange(scores.shape[1]) == 7, scores, -np.inf)

    found = MODEL.generate([PROMPT], None, [only_seven], [lambda ids, scores: ids.shape[1] >= len(PROMPT) + 2])
    assert found[0, len(PROMPT) :].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"max_length": 3}, "the prompt has 7 tokens, which leaves none of max_length"),
        ({"num_return_sequences": 2}, "without do_sample=True or num_beams"),
        ({"num_return_sequences": 3, "num_beams": 2}, r"num_return_sequences \(3\) is more than num_beams \(2\)"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0: scores cannot be divided"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000: not in the vocabulary of 2048"),
        ({"num_beams": 2, "streamer": TextStreamer(TINY.tokenizer)}, "a beam search has none before its end"),
        ({"input_ids": [PROMPT]}, "only once"),
        ({"inputs_embeds": np.zeros((1, 2, 234), np.float32)}, "inputs_embeds are the whole prompt"),
        ({"num_beam_groups": 2}, "num_beam_groups = 2 is not computed here"),
        ({"do_sample": 1}, "do_sample must be True or False, not 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        MODEL.generate([PROMPT], **arguments)


def test_padding_at_the_right_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="padding at the right"):
        MODEL.generate([[2, 300, 0], [2, 300, 400]], max_new_tokens=1)
    with pytest.warns(UserWarning, match="min_new_tokens .9. cannot be reached"):
        MODEL.generate([PROMPT], max_new_tokens=1, min_new_tokens=9)


# --- searches ---------------------------------------------------------------------------------------------------------


def test_a_search_with_enough_beams_finds_the_best_of_all_texts() -> None:
    """Scores that depend on the last token only; all texts of four tokens, one of which ends a text, are tried."""
    rng = np.random.default_rng(3)
    end, longest = 0, 4
    table = np.log(rng.dirichlet(np.ones(5), 5)).astype(np.float32)
    best_score, best_text = -np.inf, ()
    for length in range(1, longest + 1):
        for text in itertools.product(range(5), repeat=length):
            whole = end not in text[:-1] and (text[-1] == end or length == longest)
            score = sum(table[a, b] for a, b in itertools.pairwise((4, *text))) / length
            if whole and score > best_score:
                best_score, best_text = score, text
    rules = Rules(125, candidates=250, longest=longest, early_stopping="never", length_penalty=1.0, fill=end)
    beams = start_search(np.array([[4]]), rules)
    while not is_over(beams, rules):
        last = beams.running[0, :, -1]
        beams = advance_search(beams, table[last], lambda x: (x[:, -1] == end) | (x.shape[1] > longest), rules)
    texts, scores, origins = collect_texts(beams, 1)
    assert texts[0, 1 : 1 + len(best_text)].tolist() == list(best_text)
    # Sums of at most four float32 log to_probabilities below 10: four roundings of 2**-24 * 10.
    assert abs(scores[0] - best_score) < 4 * 10 * 2**-24
    assert (origins[0] >= 0).sum() == len(best_text)


def test_a_wider_search_finds_no_worse_text() -> None:
    def best(beams: int) -> float:
        found = MODEL.generate(
            [PROMPT], num_beams=beams, max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        return float(found.sequences_scores[0])

    found = MODEL.generate([PROMPT], max_new_tokens=12, eos_token_id=None)[0]
    log_probs = refgemma.log_softmax(forward([found], TINY.weights, TINY.config).logits[0])
    places = np.arange(len(PROMPT), len(found))
    greedy = float(log_probs[places - 1, found[places]].mean())
    # A mean of twelve numbers, each off by some float32 roundings of logits of about 20.
    assert best(2) >= greedy - 20 * 2**-20
    assert best(6) >= best(2)


def test_largest_takes_the_first_of_equal_values() -> None:
    assert largest(np.array([[1.0, 2.0, 2.0, 0.0, 2.0]]), 3).tolist() == [[1, 2, 4]]


def test_draws_without_replacement_have_the_odds_of_a_softmax() -> None:
    """The first of two draws is distributed as the softmax, the second as the softmax of what is left."""
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    drawn = draw(np.log(np.tile(shares, (4000, 1))), 2, np.random.default_rng(0))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    pairs = {(a, b): shares[a] * shares[b] / (1 - shares[a]) for a in range(4) for b in range(4) if a != b}
    counts = np.array([np.sum((drawn == pair).all(axis=1)) for pair in pairs])
    expected = 4000 * np.array(list(pairs.values()))
    # Eleven degrees of freedom: exceeded once in a thousand seeds, and this one is fixed.
    assert np.sum((counts - expected) ** 2 / expected) < 31.3


def test_beam_sampling_runs_and_is_seeded() -> None:
    def sampled(seed: int) -> Any:
        return MODEL.generate([PROMPT], num_beams=2, do_sample=True, max_new_tokens=8, seed=seed).tolist()

    assert sampled(1) == sampled(1)
    assert len({str(sampled(seed)) for seed in range(4)}) > 1


def test_min_p_keeps_what_it_says() -> None:
    shares = np.log([0.5, 0.3, 0.15, 0.05])
    assert np.isfinite(keep_min_p(shares, 0.31)).tolist() == [True, True, False, False]
    assert np.isfinite(keep_min_p(shares, 1.0, min_kept=2)).tolist() == [True, True, False, False]


def test_a_streamer_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    ids = MODEL.generate([PROMPT], max_new_tokens=9, streamer=TextStreamer(TINY.tokenizer))
    assert capsys.readouterr().out == TINY.tokenizer.decode(ids[0]) + "\n"
    streamer = TextStreamer(TINY.tokenizer, skip_special_tokens=True)
    MODEL.generate([PROMPT], max_new_tokens=9, streamer=streamer)
    assert capsys.readouterr().out == TINY.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    with pytest.raises(InputError, match="TextStreamer prints one text, and there are 2"):
        MODEL.generate([PROMPT, PROMPT], max_new_tokens=9, streamer=TextStreamer(TINY.tokenizer))
