"""Generate as code for transformers does: each argument gives transformers' result, or an error says what to write.

Expected tokens are from transformers 5.23 with the packaged model in float32 (eager attention), recorded in the test;
`tests/parity/test_generation_parity.py` compares in one process. Draws differ from torch's, so their tests check
properties.
"""

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma import (
    GenerationConfig,
    InputError,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)

MODEL = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
TOKENIZER = refgemma.AutoTokenizer.from_pretrained("tiny")
IDS = [[2, 2010, 1972, 400, 719, 276, 574]]  # "Once upon a time"
PLAIN = [278, 862, 1985, 479, 324, 276, 471, 585]  # " the Rat, who was a very good"


def new(**settings: Any) -> list[int]:
    rows = MODEL.generate(IDS, **{"max_new_tokens": 8, **settings})
    found: list[int] = rows[0, len(IDS[0]) :].tolist()
    return found


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_go_on_and_set_seed_begins_them_again() -> None:
    set_seed(7)
    first, second = new(do_sample=True), new(do_sample=True)
    assert first != second
    set_seed(7)
    assert [new(do_sample=True), new(do_sample=True)] == [first, second]
    assert new(do_sample=True, seed=3) == new(do_sample=True, seed=3)
    searched = [new(do_sample=True, num_beams=2, temperature=9.0) for _ in range(2)]
    assert searched[0] != searched[1]


def test_set_seed_seeds_what_transformers_seeds_too() -> None:
    import random

    set_seed(5)
    first = random.random(), np.random.random()  # noqa: NPY002  # what a caller's code may use
    set_seed(5)
    assert first == (random.random(), np.random.random())  # noqa: NPY002
    for wrong in (-1, 2**32, 0.5, "1", None):
        with pytest.raises(InputError, match="must be a whole number from 0 to 2"):
            set_seed(wrong)


# --- what changes the tokens ------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """Return a name for a case that is the same in every process, without an object's address."""
    if not isinstance(value, dict):
        return str(value)
    plain = (int, float, str, list, tuple, dict, type(None))
    return ", ".join(f"{k}={v if isinstance(v, plain) else type(v).__name__}" for k, v in value.items())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bad_words_ids": [[278], [1985, 479]]}, [458, 324, 276, 598, 1419, 307, 865, 1985]),
        ({"sequence_bias": {(300,): 4.0, (278, 862): -5.0}}, [278, 300, 1820, 573, 1985, 286, 300, 498]),
        ({"sequence_bias": [[[300], 4.0], [[278, 862], -5.0]]}, [278, 300, 1820, 573, 1985, 286, 300, 498]),
        ({"suppress_tokens": [278, 862]}, [458, 324, 276, 598, 1419, 307, 865, 1985]),
        ({"begin_suppress_tokens": [278]}, [458, 324, 276, 598, 1419, 307, 865, 1985]),
        ({"forced_eos_token_id": [5, 7], "max_new_tokens": 4}, [278, 862, 1985, 5]),
        ({"forced_bos_token_id": 300}, PLAIN),  # it is forced after a prompt of one token only
        ({"exponential_decay_length_penalty": (3, 1.6), "max_new_tokens": 20}, [278, 862, 1985, 479, 324, 276, 1]),
        ({"renormalize_logits": True}, PLAIN),
        ({"guidance_scale": 1.5}, [458, 324, 276, 598, 1419, 307, 865, 1985]),
        (
            {"guidance_scale": 1.7, "negative_prompt_ids": [[2, 500, 600]]},
            [278, 1196, 1392, 467, 324, 276, 467, 479],
        ),
        (
            {"prefix_allowed_tokens_fn": lambda text, ids: [300, 301, 302, 278]},
            [278, 301, 302, 302, 301, 302, 302, 278],
        ),
        (
            {"num_beams": 3, "bad_words_ids": [[278]], "sequence_bias": {(300,): 2.0}, "suppress_tokens": [862],
             "exponential_decay_length_penalty": (3, 1.6), "max_new_tokens": 12},
            [458, 324, 276, 598, 1419, 1],
        ),
        ({"stop_strings": [", w"], "tokenizer": TOKENIZER, "max_new_tokens": 20}, [278, 862, 1985, 479]),
        ({"stop_strings": "time the", "tokenizer": TOKENIZER, "max_new_tokens": 20}, [278]),  # begun in the prompt
        ({"stop_strings": ["a time", "Once"], "tokenizer": TOKENIZER, "max_new_tokens": 4}, PLAIN[:4]),
        ({"stop_strings": ["zzz", "ery g"], "tokenizer": TOKENIZER, "max_new_tokens": 20}, PLAIN),
    ],
    ids=describe,
)  # fmt: skip
def test_settings_give_the_tokens_of_transformers(settings: dict[str, Any], expected: list[int]) -> None:
    assert new(**settings) == expected


def test_guided_scores_are_those_of_transformers() -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True}
    found = MODEL.generate(IDS, max_new_tokens=2, guidance_scale=1.5, **asked)
    expected = [[-0.5072732, 0.1808767, -13.7155123], [-8.9983740, -9.4149170, -19.6697979]]
    # Three times the difference of two runs, which is up to 5e-6.
    np.testing.assert_allclose([step[0, [278, 458, 1]] for step in found.scores], expected, rtol=0, atol=2e-5)


def test_the_first_token_is_forced_after_bos() -> None:
    found = MODEL.generate([[2]], forced_bos_token_id=300, max_new_tokens=4)
    assert found.tolist() == [[2, 300, 498, 307, 278]]


def test_max_time_ends_a_text_after_the_token_that_passes_it() -> None:
    assert new(max_time=0) == PLAIN[:1]
    assert new(max_time=1000.0) == PLAIN


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"}, {"synced_gpus": False}, {"synced_gpus": True}, {"custom_generate": None},
        {"generator": None}, {"num_beam_groups": 1}, {"diversity_penalty": 0.0}, {"unheard_of": None},
        {"logits_processor": None, "stopping_criteria": None, "streamer": None, "assistant_model": None},
        {"prompt_lookup_num_tokens": 3}, {"assistant_model": MODEL}, {"trust_remote_code": True}, {"low_memory": True},
    ],
    ids=describe,
)  # fmt: skip
def test_what_changes_no_token_is_taken_in_silence(settings: dict[str, Any]) -> None:
    assert new(**settings) == PLAIN


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"generator": 5}, "generator = 5 is not supported; .* pass seed=, or call set_seed"),
        (
            {"custom_generate": "me/repo"},
            "custom_generate = 'me/repo' is not supported; refgemma runs no code from a repository",
        ),
        (
            {"num_beam_groups": 2, "num_beams": 4},
            "num_beam_groups = 2 is not supported; transformers 5 implements it by",
        ),
        ({"cache_implementation": "quantized"}, "refgemma has no quantized cache, which gives other numbers"),
        ({"stop_strings": "x"}, "stop_strings need the model's tokenizer"),
        ({"stop_strings": [""], "tokenizer": TOKENIZER}, "stop_strings is .*; it must be a nonempty text"),
        ({"bad_words_ids": [[2048]]}, "bad_words_ids is 2048; the vocabulary has 2048 tokens"),
        ({"bad_words_ids": [5]}, "bad_words_ids is .*; it must be a list of lists of token ids"),
        ({"sequence_bias": {300: 1.0}}, "sequence_bias is .*; it must be a dict of tuples of token ids to numbers"),
        ({"suppress_tokens": [5], "forced_eos_token_id": 5}, "forced_eos_token_id is .5., but suppress_tokens forbids"),
        ({"guidance_scale": 2.0, "num_beams": 2}, "guidance_scale is not supported with beam search; use num_beams=1"),
        (
            {"guidance_scale": 2.0, "negative_prompt_ids": [2]},
            "the negative prompt has shape .1,.; it must have one row for each of the 1",
        ),
        ({"prefix_allowed_tokens_fn": lambda text, ids: []}, "prefix_allowed_tokens_fn lists no token for text 0"),
        ({"exponential_decay_length_penalty": (1, 2.0), "eos_token_id": None}, "set eos_token_id"),
        (
            {"prefix_allowed_tokens_fn": lambda text, ids: [5], "suppress_tokens": [5]},
            "forbid every token; allow at least one",
        ),
        ({"typical_p": 0}, "typical_p is 0; it must be a number above 0, up to 1"),
        ({"stopping_criteria": lambda ids, scores: True}, "stopping_criteria is a function; it must be a list"),
        ({"generation_config": {"top_k": 5}}, "generation_config is a dict; it must be a GenerationConfig"),
        ({"temprature": 1.0}, "unexpected generation option 'temprature'; did you mean temperature?"),
        ({"inputs_embed": 1.0}, "unexpected generation option 'inputs_embed'$"),
    ],
    ids=describe,
)
def test_the_others_are_refused_in_one_line(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        new(**settings)
    assert "\n" not in str(caught.value)


# --- what callers hand in ---------------------------------------------------------------------------------------------


class Forbid(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.copy()
        scores[:, self.token] = -np.inf
        return scores


class AtLength(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self.length


def test_processors_and_criteria_as_classes_lists_and_functions() -> None:
    without = [458, 324, 276, 598, 1419, 307, 865, 1985]  # as with suppress_tokens=[278], which transformers gives
    assert new(logits_processor=LogitsProcessorList([Forbid(278)])) == without
    assert new(logits_processor=[Forbid(278), lambda ids, scores: scores]) == without
    assert new(stopping_criteria=StoppingCriteriaList([AtLength(9)])) == PLAIN[:2]
    assert new(stopping_criteria=[lambda ids, scores, **kwargs: ids[0][-1] == 1985]) == PLAIN[:3]


def test_lists_are_called_as_one() -> None:
    scores, ids = np.zeros((2, 3)), np.array([[1], [2]])
    assert LogitsProcessorList([Forbid(0), Forbid(2)])(ids, scores).tolist() == [[-np.inf, 0, -np.inf]] * 2
    further = LogitsProcessorList([lambda ids, scores, cur_len: scores + cur_len])
    assert further(ids, scores, cur_len=4).tolist() == [[4.0] * 3] * 2
    several = StoppingCriteriaList([lambda ids, scores: ids[:, 0] == 1, AtLength(5)])
    assert several(ids, None).tolist() == [True, False]
    for base in (LogitsProcessor(), StoppingCriteria()):
        with pytest.raises(NotImplementedError, match="needs a method __call__"):
            base(ids, scores)


def test_what_a_tokenizer_returns_is_a_first_argument() -> None:
    inputs = TOKENIZER(["Once upon a time", "The king"], padding=True, padding_side="left", return_tensors="np")
    expected = MODEL.generate(**inputs, max_new_tokens=5)
    assert MODEL.generate(inputs, max_new_tokens=5).tolist() == expected.tolist()
    assert MODEL.generate(dict(inputs), GenerationConfig(max_new_tokens=5)).tolist() == expected.tolist()
    with pytest.raises(InputError, match="unexpected generation option 'offset_mapping'"):
        MODEL.generate({"input_ids": IDS, "offset_mapping": [[0, 1]]})


def test_text_from_another_thread() -> None:
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60, skip_special_tokens=True)
    kwargs = {"inputs": IDS, "streamer": streamer, "max_new_tokens": 8}
    thread = threading.Thread(target=MODEL.generate, kwargs=kwargs)
    thread.start()
    assert "".join(streamer) == " the Rat, who was a very good"
    thread.join()


def test_hidden_states_and_attentions_of_each_step() -> None:
    asked = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    found = MODEL.generate(IDS, max_new_tokens=3, **asked)
    assert found.sequences[0, 7:].tolist() == PLAIN[:3]
    assert [len(step) for step in found.hidden_states] == [7, 7, 7]  # the embedded tokens and six layers
    assert [step[0].shape for step in found.hidden_states] == [(1, 7, 234), (1, 1, 234), (1, 1, 234)]
    assert [step[5].shape for step in found.attentions] == [(1, 6, 7, 7), (1, 6, 1, 8), (1, 6, 1, 9)]
    forward = MODEL(IDS, output_hidden_states=True, output_attentions=True)
    for one, other in zip(found.hidden_states[0] + found.attentions[0], forward.hidden_states + forward.attentions,
                          strict=True):  # fmt: skip
        np.testing.assert_array_equal(one, other)
    only = MODEL.generate(IDS, max_new_tokens=1, **asked | {"output_attentions": False})
    assert list(only.keys()) == ["sequences", "hidden_states", "past_key_values"]


GREEDY_TRANSITIONS = [-1.3789865970611572, -3.4053635597229004, -1.7756110429763794]
BEAM_TRANSITIONS = [
    [-1.9304660558700562, -0.31524744629859924, -0.6806143522262573],
    [-1.9304660558700562, -0.31524744629859924, -2.430002212524414],
]


def test_transition_scores() -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3}
    found = MODEL.generate(IDS, **asked)
    scores = MODEL.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    # Recorded from transformers 5.23; two float32 runs of this model differ by up to 5e-6.
    np.testing.assert_allclose(scores, [GREEDY_TRANSITIONS], rtol=0, atol=2e-5)
    beams = MODEL.generate(IDS, num_beams=3, num_return_sequences=2, **asked)
    scores = MODEL.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    np.testing.assert_allclose(scores, BEAM_TRANSITIONS, rtol=0, atol=2e-5)
    np.testing.assert_allclose(scores.sum(axis=1) / 3, beams.sequences_scores, rtol=1e-5)


def test_a_generation_config_takes_what_generate_takes() -> None:
    config = GenerationConfig(max_new_tokens=3, cache_implementation="static", num_beam_groups=1, unheard_of=None)
    assert config == GenerationConfig(max_new_tokens=3)
    assert MODEL.generate(IDS, generation_config=config)[0, 7:].tolist() == PLAIN[:3]
    with pytest.raises(InputError, match=r"unexpected generation option 'temprature'; did you mean temperature\?"):
        GenerationConfig(temprature=1.0)
    with pytest.raises(InputError, match="num_beam_groups = 2 is not supported"):
        GenerationConfig(num_beam_groups=2)


def test_a_cache_is_gone_on_from() -> None:
    cache = refgemma.DynamicCache(config=MODEL.config)
    first = MODEL.generate(IDS, past_key_values=cache, max_new_tokens=4)
    second = MODEL.generate(first, cache=cache, max_new_tokens=4)
    assert second[0, 7:].tolist() == PLAIN
    assert cache.get_seq_length() == 7 + 8 - 1


def test_what_code_reads_and_writes_in_a_generation_configuration(tmp_path: Path) -> None:
    """transformers 5.23 returns the same, and None for each of these settings that is not set."""
    config = GenerationConfig(top_k=5)
    assert config.update(top_p=0.5, colour="red") == {"colour": "red"}
    assert (config.top_k, config.top_p) == (5, 0.5)
    with pytest.raises(InputError, match="top_p is 2; it must be"):
        config.update(top_k=7, top_p=2)
    assert (config.top_k, config.top_p) == (5, 0.5)
    assert config.cache_implementation is config.num_assistant_tokens is config.watermarking_config is None
    assert not hasattr(config, "colour")
    config.to_json_file(tmp_path / "any.json")
    written = json.loads((tmp_path / "any.json").read_text())
    assert written == json.loads(config.to_json_string()) == {"top_k": 5, "top_p": 0.5}
    assert config.to_diff_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
