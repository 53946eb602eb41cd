"""Compare with transformers in one process: `generate` with settings drawn by Hypothesis, and each processor alone.

No text may differ. If the two best choices are closer than rounding can distinguish, either is right, and the example
is skipped; `test_few_examples_are_left_out` counts skipped examples.
"""

import collections
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import distance, here, in_transformers, nudged, quiet, random_tensors, shapes
from transformers import Gemma2ForCausalLM, GenerationConfig
from transformers.generation import logits_process

import refgemma
from refgemma.cache import Cache
from refgemma.generation import processors
from refgemma.generation.beams import Rules, can_improve
from refgemma.generation.decode import Decoding
from refgemma.generation.generation_config import merge_settings, resolve_settings
from refgemma.generation.stream import TextStreamer
from refgemma.hub import find_model
from refgemma.model import next_token_logits

NAME, DTYPES = "Gemma2ForCausalLM", ("float32", "float64")
COUNTS: collections.Counter[str] = collections.Counter()
# Scores of two implementations differ by up to 5e-6 of the largest; a choice nearer than that may fall either way.
TIE = 2e-5


@st.composite
def prompts(draw: st.DrawFn, vocab_size: int) -> tuple[Any, Any]:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    ids = np.random.default_rng(draw(st.integers(0, 2**31))).integers(4, vocab_size, (batch, length))
    visible = np.ones((batch, length), np.int64)
    for row in range(batch):
        visible[row, : draw(st.integers(0, length - 1))] = 0
    return np.where(visible == 1, ids, 0), visible


def any_way(vocab_size: int) -> dict[str, st.SearchStrategy[Any]]:
    """Return strategies for settings that apply to every decoding method."""
    token = st.integers(4, vocab_size - 1)
    return {
        "max_new_tokens": st.integers(1, 12),
        "min_new_tokens": st.none() | st.integers(0, 6),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "no_repeat_ngram_size": st.sampled_from([0, 0, 1, 2, 3]),
        "eos_token_id": st.none() | token | st.lists(token, min_size=1, max_size=4, unique=True),
        "use_cache": st.booleans(),
    }


def models(shape: dict[str, Any], seed: int) -> tuple[Any, Any, Any]:
    """Return the model in transformers, in refgemma, and in refgemma in float64."""
    tensors = random_tensors(NAME, shape, seed)
    return in_transformers(NAME, shape, tensors, "float32"), *(here(NAME, shape, tensors, t) for t in DTYPES)


def answers(sides: tuple[Any, ...], ids: Any, visible: Any, chosen: dict[str, Any]) -> tuple[Any, ...]:
    asked = chosen | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 0}
    with quiet():
        theirs = {"attention_mask": torch.tensor(visible), "do_sample": False}
        expected = sides[0].generate(torch.tensor(ids), **theirs, **asked)
        return expected, *(model.generate(ids, attention_mask=visible, **asked) for model in sides[1:])


def nearest(scores: Any, count: int) -> float:
    """Return the smallest difference between the `count` best scores of a row and the next, relative to the largest."""
    best = -np.sort(-scores, axis=-1)[..., : count + 1]
    finite = best[np.isfinite(best).all(axis=-1)]
    return float((-np.diff(finite, axis=-1)).min(initial=np.inf) / max(1e-30, np.abs(finite).max(initial=0)))


def moved_answers(shape: dict[str, Any], seed: int, ids: Any, visible: Any, chosen: dict[str, Any], texts: Any) -> Any:
    """Return a function: the same search's results with weights moved by rounding, if the texts are the same."""

    @functools.cache
    def found() -> list[Any]:
        asked = chosen | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        with quiet():
            outputs = [
                model.generate(ids, attention_mask=visible, pad_token_id=0, **asked)
                for model in nudged(NAME, shape, random_tensors(NAME, shape, seed))
            ]
        return [output for output in outputs if np.array_equal(output.sequences, texts)]

    return found


def assert_scores_agree(kind: str, ours: Any, theirs: Any, exact: Any, moved: Any, steps: int | None = None) -> None:
    """Require minus infinity at the same places; elsewhere, differences up to 5e-6 of the largest, or up to
    rounding."""
    sides = (getattr(output, kind)[:steps] for output in (ours, theirs, exact))
    for step, (found, expected, true) in enumerate(zip(*sides, strict=True)):
        wanted = expected.numpy()
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(found), finite)
        others = functools.partial(picked, moved, kind, step, finite)
        assert distance(found[finite], wanted[finite], true[finite], others) <= 1


def picked(moved: Any, kind: str, step: int, finite: Any) -> list[Any]:
    return [getattr(output, kind)[step][finite] for output in moved()]


@settings(max_examples=120)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_greedy(data: st.DataObject, seed: int) -> None:
    shape = data.draw(shapes(pad_token_id=0))
    ids, visible = data.draw(prompts(shape["vocab_size"]))
    chosen = data.draw(st.fixed_dictionaries(any_way(shape["vocab_size"])))
    expected, found, exact = answers(models(shape, seed), ids, visible, chosen)
    COUNTS["greedy"] += 1
    if min(nearest(step, 1) for step in exact.scores) < TIE:
        COUNTS["greedy left out"] += 1
        return
    np.testing.assert_array_equal(found.sequences, expected.sequences.numpy())
    moved = moved_answers(shape, seed, ids, visible, chosen, found.sequences)
    assert_scores_agree("scores", found, expected, exact, moved)
    assert_scores_agree("logits", found, expected, exact, moved)


@settings(max_examples=120)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_beam_search(data: st.DataObject, seed: int) -> None:
    shape = data.draw(shapes(pad_token_id=0))
    ids, visible = data.draw(prompts(shape["vocab_size"]))
    beams = data.draw(st.integers(2, 4))
    chosen = data.draw(
        st.fixed_dictionaries({
            **any_way(shape["vocab_size"]),
            "num_beams": st.just(beams),
            "num_return_sequences": st.integers(1, beams),
            "length_penalty": st.sampled_from([1.0, 0.0, 2.0, -1.0]),
            "early_stopping": st.sampled_from([True, False, "never"]),
        })
    )  # fmt: skip
    sides = models(shape, seed)
    expected, found, exact = answers(sides, ids, visible, chosen)
    COUNTS["beams"] += 1
    same = found.sequences.shape == expected.sequences.shape and (found.sequences == expected.sequences.numpy()).all()
    if not same and near_tie_in_search(sides[2], ids, visible, chosen):
        COUNTS["beams left out"] += 1
        return
    np.testing.assert_array_equal(found.sequences, expected.sequences.numpy())
    np.testing.assert_array_equal(found.beam_indices, expected.beam_indices.numpy())
    moved = moved_answers(shape, seed, ids, visible, chosen, found.sequences)
    scores = found.sequences_scores, expected.sequences_scores.numpy(), exact.sequences_scores
    assert distance(*scores, lambda: [output.sequences_scores for output in moved()]) <= 1
    assert_scores_agree("logits", found, expected, exact, moved, steps=1)  # later rows may be other beams


def near_tie_in_search(ours: Any, ids: Any, visible: Any, chosen: dict[str, Any]) -> bool:
    """Return True if a search finds another text when rounding changes its scores."""
    texts = []
    for seed in range(6):
        noise = np.random.default_rng(seed)

        def moved(_: Any, scores: Any, noise: Any = noise) -> Any:
            size = np.abs(scores[np.isfinite(scores)]).max()
            return scores + (noise.uniform(-TIE, TIE, scores.shape) * size).astype(np.float32)

        with quiet():
            texts.append(ours.generate(ids, None, [moved], attention_mask=visible, pad_token_id=0, **chosen).tolist())
    return any(text != texts[0] for text in texts)


@settings(max_examples=150)
@given(st.integers(0, 2**31), st.sampled_from([True, False, "never"]), st.sampled_from([0.0, 1.0, 2.0, -1.0]))
def test_when_a_search_can_still_gain(seed: int, early_stopping: Any, penalty: float) -> None:
    """Short searches seldom depend on it, so it is compared alone."""
    rng = np.random.default_rng(seed)
    running = -np.sort(rng.uniform(0, 60, (4, 3)).astype(np.float32), axis=1)
    finished = -np.sort(rng.uniform(0, 4, (4, 3)).astype(np.float32), axis=1)
    is_finished, before = rng.random((4, 3)) < 0.9, rng.random((4, 1)) < 0.8
    expected = Gemma2ForCausalLM._check_early_stop_heuristic(
        torch.tensor(before), torch.tensor(running), torch.tensor(finished), torch.tensor(is_finished), cur_len=9,
        max_length=16, decoder_prompt_len=4, early_stopping=early_stopping, length_penalty=penalty,
    )  # fmt: skip
    rules = Rules(3, 6, longest=12, early_stopping=early_stopping, length_penalty=penalty, fill=0)
    found = before[:, 0] & can_improve(running, finished, is_finished, 5, rules)
    np.testing.assert_array_equal(found, expected.numpy()[:, 0])


def test_few_examples_are_left_out() -> None:
    """Of those that ran before in this process; with a selection of tests there may be none."""
    for kind in ("greedy", "beams"):
        assert COUNTS[f"{kind} left out"] <= 0.05 * COUNTS[kind], COUNTS


@pytest.mark.parametrize("chosen", [
    {}, {"max_length": 30}, {"max_new_tokens": 100}, {"min_length": 20, "max_length": 60},
    {"num_beams": 4, "max_new_tokens": 60}, {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    {"repetition_penalty": 1.2, "max_new_tokens": 80}, {"eos_token_id": None, "max_new_tokens": 90},
], ids=str)  # fmt: skip
def test_texts_of_the_tiny_model(chosen: dict[str, Any]) -> None:
    """A trained model, its own generation_config.json, left padding, past the window of 64."""
    theirs = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    ours = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    encode = refgemma.load("tiny").tokenizer.encode
    rows = [encode(text) for text in ("The king", "In the wood there lived", '"I am afraid," said')]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    with quiet():
        expected = theirs.generate(torch.tensor(ids), do_sample=False, **chosen).numpy()
        np.testing.assert_array_equal(ours.generate(ids, **chosen), expected)


def test_bfloat16_greedy_texts_of_the_tiny_model() -> None:
    theirs = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.bfloat16, attn_implementation="eager")
    ours = refgemma.Gemma2ForCausalLM.from_pretrained("tiny", dtype="bfloat16")
    ids = np.array([refgemma.load("tiny").tokenizer.encode("In the wood there lived")])
    with quiet():
        expected = theirs.generate(torch.tensor(ids), do_sample=False, max_new_tokens=12).numpy()
    np.testing.assert_array_equal(ours.generate(ids, max_new_tokens=12), expected)


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_prompts_of_embeddings_and_from_a_cache(data: st.DataObject, seed: int) -> None:
    """Embeddings give back new tokens only; a cache of a prompt's beginning changes nothing."""
    shape = data.draw(shapes(pad_token_id=0, eos_token_id=None))
    theirs, ours, _ = models(shape, seed)
    ids, visible = data.draw(prompts(shape["vocab_size"]))
    limit = data.draw(st.sampled_from([{"max_new_tokens": 5}, {"max_length": ids.shape[1] + 4}, {}]))
    whole = ours.generate(ids, attention_mask=visible, **limit, return_dict_in_generate=True, output_scores=True)
    if min(nearest(step, 1) for step in whole.scores) < TIE:
        return
    embeds = ours.weights.embed_tokens[ids] * np.float32(shape["hidden_size"] ** 0.5)
    with quiet():
        expected = theirs.generate(
            inputs_embeds=torch.tensor(embeds), attention_mask=torch.tensor(visible), do_sample=False, **limit
        ).numpy()
    np.testing.assert_array_equal(ours.generate(inputs_embeds=embeds, attention_mask=visible, **limit), expected)
    begun = int(visible.argmax(axis=1).max()) + 1  # not in anyone's padding
    if begun < ids.shape[1] and limit != {}:
        positions = np.where(visible == 1, np.cumsum(visible, axis=1) - 1, 0)
        past = ours.model(ids[:, :begun], attention_mask=visible[:, :begun], position_ids=positions[:, :begun])
        assert isinstance(past.past_key_values, Cache)
        again = ours.generate(ids, attention_mask=visible, past_key_values=past.past_key_values, **limit)
        np.testing.assert_array_equal(again, whole.sequences)


def test_the_positions_that_both_are_given() -> None:
    """Rotary scores depend only on differences of positions, so that a text alone does not show the given positions."""
    shape = {"vocab_size": 25, "hidden_size": 4, "num_hidden_layers": 1, "head_dim": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 3, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    theirs, ours, _ = models(shape, 0)
    ids = np.array([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9], [0, 5, 6, 7, 0]])  # the last with padding at the right, too
    seen: dict[str, list[Any]] = {"there": [], "here": []}
    there = theirs.model.rotary_emb.forward

    def noted_there(x: Any, position_ids: Any) -> Any:
        seen["there"].append(position_ids.numpy())
        return there(x, position_ids)

    def noted_here(*arguments: Any, position_ids: Any, **others: Any) -> Any:
        seen["here"].append(position_ids)
        return next_token_logits(*arguments, position_ids=position_ids, **others)

    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs.model.rotary_emb, "forward", noted_there)
        patch.setattr("refgemma.generation.decode.next_token_logits", noted_here)
        for model in (theirs, ours):
            given = torch.tensor(ids) if model is theirs else ids
            mask = torch.tensor(ids != 0).long() if model is theirs else (ids != 0).astype(int)
            model.generate(given, attention_mask=mask, max_new_tokens=4)
    assert len(seen["here"]) == len(seen["there"]) == 4
    for found, expected in zip(seen["here"], seen["there"], strict=True):
        np.testing.assert_array_equal(found, expected)


# --- processors alone -------------------------------------------------------------------------------------------------


def drawn_scores(seed: int, batch: int = 3, vocab: int = 25) -> Any:
    """Return scores with ties, and with minus infinity as from an earlier processor."""
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((batch, vocab)) * 3).astype(np.float32)
    scores[:, rng.integers(0, vocab, 4)] = scores[:, :1]
    scores[:, rng.integers(1, vocab, 3)] = -np.inf
    return scores


ALONE = {
    "top_k": (processors.keep_top_k, logits_process.TopKLogitsWarper, st.integers(1, 40)),
    "top_p": (processors.keep_top_p, logits_process.TopPLogitsWarper, st.floats(0.05, 1.0)),
    "min_p": (processors.keep_min_p, logits_process.MinPLogitsWarper, st.floats(0.0, 1.0)),
}


@pytest.mark.parametrize("name", ALONE)
@settings(max_examples=150)
@given(data=st.data(), seed=st.integers(0, 2**31), least=st.integers(1, 4))
def test_cuts_alone(name: str, data: st.DataObject, seed: int, least: int) -> None:
    ours, theirs, values = ALONE[name]
    value, scores = data.draw(values), drawn_scores(seed)
    expected = theirs(value, min_tokens_to_keep=least)(None, torch.tensor(scores)).numpy()
    found = ours(scores, value, least)
    # Of equal scores torch's sort promises no order: which of them are kept may differ, not how many.
    if not np.array_equal(np.sort(found), np.sort(expected)):
        # And a sum of probabilities may meet the threshold to within a few roundings of 1.
        assert name != "top_k"
        moved = [np.sort(ours(scores, min(1.0, value + shift), least)) for shift in (-4e-7, 4e-7)]
        assert any(np.array_equal(one, np.sort(expected)) for one in moved)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**31), penalty=st.floats(0.2, 5), size=st.integers(1, 4))
def test_constraints_alone(seed: int, penalty: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    scores, ids, skipped = drawn_scores(seed), rng.integers(0, 25, (3, 9)), rng.integers(0, 9, 3)
    there = logits_process.RepetitionPenaltyLogitsProcessor(penalty, torch.tensor(skipped))
    expected = there(torch.tensor(ids), torch.tensor(scores)).numpy()
    np.testing.assert_array_equal(processors.penalise_repetition(scores, ids, penalty, skipped), expected)
    few = ids % 3  # so that n-grams do recur
    ngrams = logits_process.NoRepeatNGramLogitsProcessor(size)(torch.tensor(few), torch.tensor(scores)).numpy()
    np.testing.assert_array_equal(processors.ban_repeated_ngrams(scores, few, size), ngrams)


SAMPLED = {
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "top_k": st.sampled_from([0, 3, 10, 50]),
    "top_p": st.sampled_from([1.0, 0.9, 0.5]),
    "min_p": st.sampled_from([None, 0.05, 0.3]),
    "num_beams": st.sampled_from([1, 1, 3]),
    "eos_token_id": st.sampled_from([None, 7, [7, 9]]),
    "min_new_tokens": st.sampled_from([None, 4]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
}


@settings(max_examples=100)
@given(chosen=st.fixed_dictionaries(SAMPLED), seed=st.integers(0, 2**31))
def test_all_processors_in_their_order(chosen: dict[str, Any], seed: int) -> None:
    """What is drawn from, against the list that transformers makes of the same settings."""
    chosen = {key: value for key, value in chosen.items() if value is not None} | {"do_sample": True}
    rng = np.random.default_rng(seed)
    ids, scores = rng.integers(0, 25, (3, 6)), (rng.standard_normal((3, 25)) * 3).astype(np.float32)
    shape = {"vocab_size": 25, "hidden_size": 4, "num_hidden_layers": 1, "head_dim": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 3, "eos_token_id": None}  # fmt: skip
    model = in_transformers(NAME, shape, random_tensors(NAME, shape, 0), "float32")
    there, _ = model._prepare_generation_config(GenerationConfig(**chosen))
    model._prepare_special_tokens(there, True, device="cpu")
    made = model._get_logits_processor(there, input_ids_seq_length=4, device="cpu")
    expected = made(torch.tensor(ids), torch.tensor(scores)).numpy()
    call = merge_settings(None, refgemma.GenerationConfig(), chosen | {"max_new_tokens": 9})
    ours = resolve_settings(call, prompt_length=4, vocab_size=25, limit=99)
    nothing = np.zeros(3, int)
    found = processors.warp(processors.constrain(scores, ids, nothing, ours), ours)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_array_equal(found[np.isfinite(found)], expected[np.isfinite(expected)])


def test_generation_configs_are_read_by_both(tmp_path: Any) -> None:
    chosen = {"do_sample": True, "top_k": 7, "eos_token_id": [1, 107], "max_new_tokens": 9, "min_p": 0.1}
    GenerationConfig(**chosen).save_pretrained(tmp_path / "theirs")
    ours = refgemma.GenerationConfig.from_pretrained(tmp_path / "theirs")
    assert ours.to_dict() == chosen
    ours.save_pretrained(tmp_path / "ours")
    theirs = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert {key: value for key, value in theirs.to_dict().items() if key in chosen} == chosen


def test_a_streamer_is_given_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    class Noted:
        def __init__(self) -> None:
            self.given: list[list[int]] = []

        def put(self, value: Any) -> None:
            self.given.append(np.asarray(value).reshape(-1).tolist())

        def end(self) -> None:
            self.given.append([])

    theirs = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    ours = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")
    ids = [refgemma.load("tiny").tokenizer.encode("The king")]
    there, found = Noted(), Noted()
    with quiet():
        theirs.generate(torch.tensor(ids), do_sample=False, max_new_tokens=6, streamer=there)
    ours.generate(ids, max_new_tokens=6, streamer=found)
    assert found.given == there.given
    ours.generate(ids, max_new_tokens=6, streamer=TextStreamer(refgemma.load("tiny").tokenizer, skip_prompt=True))
    text = refgemma.load("tiny").tokenizer.decode([token for tokens in found.given[1:] for token in tokens])
    assert capsys.readouterr().out == text + "\n"


FURTHER = {
    "sequence_bias": st.sampled_from([None, {(3,): 2.5, (5, 3): -4.0, (1, 2, 3): 9.0, (7,): -1.0}, {(24,): -9.0}]),
    "bad_words_ids": st.sampled_from([None, [[3], [5, 9], [1, 2, 4]], [[20]]]),
    "suppress_tokens": st.sampled_from([None, [], [5, 21]]),
    "begin_suppress_tokens": st.sampled_from([None, [6, 21]]),
    "forced_bos_token_id": st.sampled_from([None, None, 8]),
    "forced_eos_token_id": st.sampled_from([None, None, 8, [8, 9]]),
    "exponential_decay_length_penalty": st.sampled_from([None, (0, 1.5), (1, 0.7), (9, 2.0)]),
    "renormalize_logits": st.sampled_from([None, True, False]),
    "typical_p": st.sampled_from([None, 1.0, 0.9, 0.3]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "no_repeat_ngram_size": st.sampled_from([0, 2]),
    "min_new_tokens": st.sampled_from([None, 2]),
    "do_sample": st.booleans(),
    "temperature": st.sampled_from([1.0, 0.5]),
    "top_k": st.sampled_from([0, 6]),
    "num_beams": st.sampled_from([1, 3]),
}


@functools.cache
def one_layer() -> Any:
    shape = {"vocab_size": 25, "hidden_size": 4, "num_hidden_layers": 1, "head_dim": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 3, "eos_token_id": None}  # fmt: skip
    return in_transformers(NAME, shape, random_tensors(NAME, shape, 0), "float32")


@settings(max_examples=100)
@given(
    chosen=st.fixed_dictionaries(FURTHER), seed=st.integers(0, 2**31), begin=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([1, 2, 6]), longest=st.sampled_from([7, 20]), prefix=st.booleans(),
)  # fmt: skip
def test_further_processors_in_their_order(
    chosen: dict[str, Any], seed: int, begin: int, length: int, longest: int, prefix: bool
) -> None:
    """Those that a caller seldom asks for: the same scores, minus infinity in the same places."""
    chosen = {key: value for key, value in chosen.items() if value is not None} | {"eos_token_id": [7, 9]}
    begin = min(begin, length)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 10, (3, length))
    scores = (rng.standard_normal((3, 25)) * 3).astype(np.float32)
    # Sometimes nothing of what is allowed has a score left.
    allowed = (lambda text, row: [int(row[-1]), 4, 20] if text else [20]) if prefix else None
    model = one_layer()
    there, _ = model._prepare_generation_config(GenerationConfig(**chosen | {"max_length": longest}))
    model._prepare_special_tokens(there, True, device="cpu")
    made = model._get_logits_processor(
        there, input_ids_seq_length=begin, prefix_allowed_tokens_fn=allowed, device="cpu"
    )  # fmt: skip
    expected = made(torch.tensor(ids), torch.tensor(scores)).numpy()
    call = merge_settings(None, refgemma.GenerationConfig(), chosen | {"max_length": longest})
    how = Decoding(
        resolve_settings(call, prompt_length=begin, vocab_size=25, limit=99), np.zeros(3, int), (), (), allowed
    )
    found = how.scores(ids, scores)
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    finite = np.isfinite(expected)
    # A sum of exponentials is rounded differently, by a few ulps of scores up to 20.
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-6, atol=5e-6)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**31), mass=st.floats(0.05, 0.95), least=st.integers(1, 4))
def test_typical_alone(seed: int, mass: float, least: int) -> None:
    scores = (np.random.default_rng(seed).standard_normal((3, 25)) * 3).astype(np.float32)
    scores[:, seed % 25] = -np.inf
    expected = logits_process.TypicalLogitsWarper(mass, min_tokens_to_keep=least)(None, torch.tensor(scores)).numpy()
    # A sum of probabilities may meet the threshold to within a few roundings of 1.
    near = [processors.keep_typical(scores, min(1.0, mass + shift), least) for shift in (0, -4e-7, 4e-7)]
    assert any(np.array_equal(one, expected) for one in near)


THREE_TEXTS = ("The king", "In the wood there lived", '"I am afraid," said')


@functools.cache
def tiny_models() -> tuple[Any, Any, Any, Any, Any]:
    """Return the packaged model and its tokenizer on both sides, and three prompts with padding."""
    from transformers import GemmaTokenizer

    theirs = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    ours, tokenizer = refgemma.Gemma2ForCausalLM.from_pretrained("tiny"), refgemma.load("tiny").tokenizer
    rows = [tokenizer.encode(text) for text in THREE_TEXTS]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    there = GemmaTokenizer.from_pretrained(find_model("tiny"), local_files_only=True)
    return theirs, ours, there, tokenizer, ids


@pytest.mark.parametrize("chosen", [
    {"stop_strings": ["the", "\n"]}, {"stop_strings": "<end_of_turn>"}, {"stop_strings": ["e", "\u00e9"]},
    {"bad_words_ids": [[276], [324, 471]]}, {"sequence_bias": {(276,): 3.0, (324, 276): -9.0}},
    {"suppress_tokens": [276, 324]}, {"begin_suppress_tokens": [324, 458]}, {"forced_eos_token_id": 6},
    {"exponential_decay_length_penalty": (4, 1.4)}, {"renormalize_logits": True, "num_beams": 2},
    {"guidance_scale": 1.5}, {"guidance_scale": 0.5, "negative_prompt_ids": [[2, 300], [2, 400], [0, 2]],
                              "negative_prompt_attention_mask": [[1, 1], [1, 1], [0, 1]]},
    {"prefix_allowed_tokens_fn": lambda text, row: [300 + text, 276, 324]},
    {"prefix_allowed_tokens_fn": lambda text, row: [300 + text, 276, 324], "num_beams": 3},
    {"stop_strings": ["the"], "num_beams": 3}, {"bad_words_ids": [[276]], "num_beams": 3},
], ids=str)  # fmt: skip
def test_further_settings_give_the_same_texts(chosen: dict[str, Any]) -> None:
    theirs, ours, their_tokenizer, tokenizer, ids = tiny_models()
    tensors = {key: torch.tensor(value) if key.startswith("negative") else value for key, value in chosen.items()}
    asked = {"max_new_tokens": 12}
    with quiet():
        expected = theirs.generate(torch.tensor(ids), do_sample=False, tokenizer=their_tokenizer, **asked, **tensors)
        found = ours.generate(ids, tokenizer=tokenizer, **asked, **chosen)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("chosen", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_assisted_texts_are_the_same(chosen: dict[str, Any]) -> None:
    """transformers takes one text at a time for assisted generation."""
    theirs, ours, _, _, ids = tiny_models()
    for row in ids:
        prompt = row[None, row != 0]
        both = [
            chosen | ({"assistant_model": model} if "assistant_model" in chosen else {}) for model in (theirs, ours)
        ]
        with quiet():
            expected = theirs.generate(torch.tensor(prompt), do_sample=False, max_new_tokens=24, **both[0])
            np.testing.assert_array_equal(ours.generate(prompt, max_new_tokens=24, **both[1]), expected.numpy())


@pytest.mark.parametrize("beams", [1, 2])
def test_layers_and_transition_scores_of_generate(beams: int) -> None:
    """The prompt is longer than the window of 64, has padding on the left, and the steps continue from the cache."""
    theirs, ours, _, _, ids = tiny_models()
    long = np.concatenate([ids] * 12, axis=1)
    mask = (np.arange(long.shape[1]) >= [[3], [0], [1]]).astype(int)
    asked = {"max_new_tokens": 3, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True,
             "output_attentions": True, "output_hidden_states": True}  # fmt: skip
    with quiet():
        expected = theirs.generate(
            torch.tensor(long), attention_mask=torch.tensor(mask), do_sample=False, **asked
        )  # fmt: skip
        found = ours.generate(long, attention_mask=mask, **asked)
    assert list(found) == list(expected)
    for kind in ("attentions", "hidden_states"):
        steps = zip(getattr(found, kind), getattr(expected, kind), strict=True)
        for one, other in (pair for step in steps for pair in zip(*step, strict=True)):
            # Hidden states of up to 100, in float32; what padding looks at is of no meaning.
            rows = np.repeat(mask, beams, axis=0)[:, : other.shape[-2]] == 1 if other.shape[-2] > 1 else slice(None)
            ours_kept, theirs_kept = (x.swapaxes(1, 2) if kind == "attentions" else x for x in (one, other.numpy()))
            np.testing.assert_allclose(ours_kept[rows], theirs_kept[rows], rtol=0, atol=1e-4)
    for normalize in (False, True):
        scores = theirs.compute_transition_scores(
            expected.sequences, expected.scores, expected.get("beam_indices"), normalize_logits=normalize
        )
        np.testing.assert_allclose(
            ours.compute_transition_scores(found.sequences, found.scores, found.get("beam_indices"), normalize),
            scores.numpy(), rtol=0, atol=2e-5,
        )  # fmt: skip
