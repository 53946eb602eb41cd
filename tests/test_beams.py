"""Test beam searches: with enough beams the best text is found, and every step continues the chosen beams."""

import itertools
from typing import Any

import numpy as np
from small_model import NO_END, RECORD, SMALL, call_with, log_probabilities

import refgemma
from refgemma.generation.beams import Rules, advance_search, collect_texts, draw, is_over, largest, start_search
from refgemma.generation.decode import (
    _rules,
)
from refgemma.generation.generation_config import resolve_settings
from refgemma.heads import (
    log_softmax,
)
from refgemma.model import forward

TINY = refgemma.load("tiny")
PROMPT = TINY.tokenizer.encode("Once upon a time")
MODEL = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")


def test_a_search_with_enough_beams_finds_the_best_of_all_texts() -> None:
    """Scores depend only on the last token; all texts of four tokens (one ends a text) are tried."""
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
    """The first draw is distributed as the softmax, the second as the softmax of the remaining scores."""
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


def test_the_rules_of_a_search() -> None:
    def rules(**settings: Any) -> Rules:
        call = call_with(num_beams=3, max_new_tokens=4, length_penalty=0.5, early_stopping=True, **settings)
        return _rules(resolve_settings(call, 2, 13, 64))

    # Twice the beams, or one candidate more for each end of text, of which some may take all places.
    assert rules() == Rules(3, 6, longest=4, early_stopping=True, length_penalty=0.5, fill=-1)
    assert rules(eos_token_id=7) == Rules(3, 6, longest=4, early_stopping=True, length_penalty=0.5, fill=7)
    three = {"eos_token_id": (7, 8, 9), "pad_token_id": 5}
    assert rules(**three) == Rules(3, 12, longest=4, early_stopping=True, length_penalty=0.5, fill=5)
    assert rules(eos_token_id=7, pad_token_id=0).fill == 7


def test_a_search_finds_the_best_of_all_texts() -> None:
    """With thirteen beams and two tokens, every text is a candidate. All texts are tried."""
    asked = {"num_beams": 13, "max_new_tokens": 2, "output_scores": True, "output_logits": True} | NO_END | RECORD
    found = SMALL.generate([[3, 4], [6, 7]], num_return_sequences=3, **asked)
    for row, prompt in enumerate(([3, 4], [6, 7])):
        texts = [[*prompt, a, b] for a in range(13) for b in range(13)]
        sums = log_probabilities(texts, 2)
        best = np.argsort(-sums)[:3]
        rows = slice(3 * row, 3 * row + 3)
        assert found.sequences[rows].tolist() == [texts[n] for n in best]
        # Means of two float32 log probabilities of about 5.
        np.testing.assert_allclose(found.sequences_scores[rows], sums[best] / 2, rtol=0, atol=1e-5)
    # The row of the step before that each token continued: at first the prompt's own, then the beam of the first token.
    assert found.beam_indices.shape == (6, 2)
    assert found.beam_indices[:, 0].tolist() == [0, 0, 0, 13, 13, 13]
    assert len(found.scores) == len(found.logits) == 2
    np.testing.assert_allclose(found.scores[0], log_softmax(found.logits[0]), rtol=0, atol=1e-5)
    assert found.scores[0].dtype == found.scores[1].dtype == np.float32
    first = SMALL([[3, 4]]).logits[0, -1]
    np.testing.assert_allclose(found.logits[0][:13], np.tile(first, (13, 1)), rtol=0, atol=1e-4)
    assert found.past_key_values.get_seq_length() == 3
    assert found.past_key_values[0].keys.shape[0] == 26
    bare = SMALL.generate([[3, 4]], num_beams=2, max_new_tokens=2, use_cache=False, **NO_END, **RECORD)
    assert list(bare.keys()) == ["sequences", "beam_indices"]
    assert SMALL.generate([[3, 4]], num_beams=2, max_new_tokens=2, **NO_END).shape == (1, 4)


def test_a_search_goes_on_from_the_beams_it_chose() -> None:
    """Beams change rows; with a cache that does not follow them, the texts would have other scores."""
    for use_cache in (True, False):
        found = SMALL.generate(
            [[3, 4], [6, 7]], num_beams=4, num_return_sequences=4, max_new_tokens=6, use_cache=use_cache,
            output_scores=True, length_penalty=0.0, **NO_END, **RECORD,
        )  # fmt: skip
        assert len(np.unique(found.beam_indices)) > 3
        # Sums of six float32 log probabilities of about 5.
        np.testing.assert_allclose(found.sequences_scores, log_probabilities(found.sequences, 2), rtol=0, atol=1e-4)


def test_a_search_ends_where_texts_end() -> None:
    free = SMALL.generate([[3, 4]], num_beams=3, max_new_tokens=6, **NO_END)[0].tolist()
    ended = SMALL.generate([[3, 4]], num_beams=3, max_new_tokens=6, eos_token_id=free[3], early_stopping=True)
    assert free[3] in ended[0, 2:]
    stopped = SMALL.generate(
        [[3, 4]], None, [], [lambda ids, scores: ids[:, -1] >= 0], num_beams=3, max_new_tokens=6, **NO_END
    )
    assert stopped.shape == (1, 3)
    drawn = {"num_beams": 3, "do_sample": True, "max_new_tokens": 6} | NO_END
    texts = [SMALL.generate([[3, 4]], seed=seed, **drawn).tolist() for seed in (0, 0, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len({str(text) for text in texts}) > 1
