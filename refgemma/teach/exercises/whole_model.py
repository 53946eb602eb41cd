"""Check exercises on the whole model: choose tokens, encode a word, count parameters, find a bug, test a property."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.goldens.load import load_golden, model_of
from refgemma.model import forward
from refgemma.modeling.pretrained import load
from refgemma.oracle import known_bugs as bugs
from refgemma.oracle.known_bugs import Change
from refgemma.oracle.operations import Context
from refgemma.precision import Array
from refgemma.teach.exercises.feedback import Attempt, Feedback, Hint, Raised, Trial, call, give_feedback
from refgemma.teach.exercises.guide import count_tries, record
from refgemma.trace.names import named_tensors
from refgemma.weights.parameters import LayerWeights

GOLDEN = "bends-forward-f32"

# --- choosing tokens --------------------------------------------------------------------------------------------------


def _mark(probabilities: Array, chosen: Array) -> Array:
    kept = np.zeros(len(probabilities), bool)
    kept[chosen] = True
    return kept


def _sort(probabilities: Array) -> Array:
    return np.argsort(-probabilities, kind="stable")


@count_tries
def check_keep_top_p(answer: Attempt) -> Feedback:
    """Check ``keep_top_p(probabilities, p)``: true for the fewest, most likely tokens that together reach p.

    The token that reaches p is the last token kept. The expected results were added up by hand.

    Examples
    --------
    >>> print(str(check_keep_top_p(lambda probabilities, p: probabilities >= p)).splitlines()[-1])
      Hint: p is the probability of all kept tokens together, not of each.
    """
    shares = np.array([0.25, 0.0625, 0.375, 0.125, 0.1875])  # exact in binary; in order: 2, 0, 4, 3, 1
    keeps = {0.5: [2, 0], 0.625: [2, 0], 0.7: [2, 0, 4], 0.3: [2], 1.0: [0, 1, 2, 3, 4]}
    trials = [
        Trial(f"keep_top_p({shares.tolist()}, {p})", (shares, p), _mark(shares, np.array(chosen)))
        for p, chosen in keeps.items()
    ]

    def running(probabilities: Array) -> Array:
        return np.cumsum(probabilities[_sort(probabilities)])

    return give_feedback(answer, trials, [
        Hint("keep the token that reaches p, too.",
             lambda s, p: _mark(s, _sort(s)[running(s) <= p])),
        Hint("keep the token that reaches p, too.", lambda s, p: _mark(s, _sort(s)[running(s) < p])),
        Hint("that is one token too many: stop at the token that reaches p.",
             lambda s, p: _mark(s, _sort(s)[running(s) - s[_sort(s)] <= p])),
        Hint("that is one token too many: stop at the token that reaches p.",
             lambda s, p: _mark(s, _sort(s)[: int(np.argmax(running(s) >= p)) + 2])),
        Hint("start with the most likely token: sort the probabilities before you add them up.",
             lambda s, p: np.cumsum(s) - s < p),
        Hint("start with the most likely token, not with the least likely.",
             lambda s, p: _mark(s, np.argsort(s)[np.cumsum(np.sort(s)) - np.sort(s) < p])),
        Hint("the result is in sorted order; return it in the order of the tokens.",
             lambda s, p: running(s) - s[_sort(s)] < p),
        Hint("p is the probability of all kept tokens together, not of each.", lambda s, p: s >= p),
        Hint("true means that a token is kept.", lambda s, p: running(s)[np.argsort(_sort(s))] - s >= p),
        Hint("you keep all tokens.", lambda s, p: np.ones(len(s), bool)),
        Hint("return true or false for each token, not the kept probabilities.",
             lambda s, p: np.where(running(s)[np.argsort(_sort(s))] - s < p, s, 0)),
        Hint("return true or false for each token, not the numbers of the kept tokens.",
             lambda s, p: _sort(s)[running(s) - s[_sort(s)] < p]),
    ])  # fmt: skip


# --- reading a word ---------------------------------------------------------------------------------------------------


def _join_by(choose: Callable[[list[str], Mapping[str, int]], int], once: bool = False) -> Attempt:
    """Return an `encode_word` that joins the pair that `choose` selects from the joined pairs."""

    def encode(characters: list[str], ranks: Mapping[str, int]) -> str:
        pieces = list(characters)
        while True:
            joined = [a + b for a, b in pairwise(pieces)]
            if not any(piece in ranks for piece in joined):
                return " ".join(pieces)
            place = choose(joined, ranks)
            pieces[place : place + 2] = [joined[place]]
            if once:
                return " ".join(pieces)

    return encode


def _take_longest(characters: list[str], ranks: Mapping[str, int]) -> str:
    text, pieces = "".join(characters), []
    while text:
        end = next((n for n in range(len(text), 1, -1) if text[:n] in ranks), 1)
        pieces.append(text[:end])
        text = text[end:]
    return " ".join(pieces)


@count_tries
def check_encode_word(answer: Attempt) -> Feedback:
    """Check ``encode_word(characters, ranks)``: the pieces of a word, after merges in the order of their ranks.

    The expected pieces of the short words were found by hand, those of the last word by SentencePiece.

    Examples
    --------
    >>> print(str(check_encode_word(lambda characters, ranks: characters)).splitlines()[1])
      'a b c d' instead of 'ab cd'
    """
    names = load("tiny").tokenizer.convert_ids_to_tokens(range(load("tiny").config.vocab_size))
    tiny = {name: place for place, name in enumerate(names[names.index("▁t") :]) if len(name) > 1}
    words: list[tuple[str, dict[str, int], str]] = [
        ("abcd", {"ab": 0, "bc": 2, "cd": 1}, "ab cd"),
        ("abcd", {"ab": 1, "bc": 0, "cd": 2}, "a bc d"),
        ("aaa", {"aa": 0}, "aa a"),
        ("▁Rumpelstiltskin", tiny, "▁R ump el st il ts k in"),
    ]
    trials = [
        Trial(f"encode_word({list(word)}, {ranks if ranks is not tiny else '...'})", (list(word), ranks), right)
        for word, ranks, right in words
    ]

    def answer_in_words(characters: list[str], ranks: Mapping[str, int]) -> Any:
        pieces = answer(characters, ranks)
        return " ".join(map(str, pieces)) if isinstance(pieces, list | tuple) else pieces

    def by_rank(best: Callable[..., str]) -> Callable[[list[str], Mapping[str, int]], int]:
        return lambda joined, ranks: joined.index(best((p for p in joined if p in ranks), key=lambda p: ranks[p]))

    def leftmost(joined: list[str], ranks: Mapping[str, int]) -> int:
        return next(n for n, piece in enumerate(joined) if piece in ranks)

    def last_lowest(joined: list[str], ranks: Mapping[str, int]) -> int:
        return len(joined) - 1 - by_rank(min)(joined[::-1], ranks)

    order = "join the pair with the lowest rank first, not the leftmost pair or the longest piece."
    return give_feedback(answer_in_words, trials, [
        Hint(order, _join_by(leftmost)),
        Hint(order, _take_longest),
        Hint("the merge with the lowest rank comes first, because it was learned first.", _join_by(by_rank(max))),
        Hint("that is one merge; go on until no pair forms a piece.", _join_by(by_rank(min), once=True)),
        Hint("nothing is joined.", lambda characters, ranks: " ".join(characters)),
        Hint("if a pair occurs twice, join the leftmost one first.", _join_by(last_lowest)),
        Hint("return the list of pieces, not the whole word.", lambda characters, ranks: "".join(characters)),
    ])  # fmt: skip


# --- counting ---------------------------------------------------------------------------------------------------------

PARAMETER_COUNTS = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}


def _count(
    c: Gemma2Config, kv_heads: int | None = None, norms: int = 4, matrices: int = 3, tables: int = 1,
    heads_width: int | None = None, last: int = 1, own: int | None = None,
) -> int:  # fmt: skip
    """Count the parameters; the arguments make typical mistakes."""
    width = c.num_attention_heads * c.head_dim if heads_width is None else heads_width
    keys = (c.num_key_value_heads if kv_heads is None else kv_heads) * c.head_dim
    attention = 2 * c.hidden_size * (width + keys) if own is None else own
    block = attention + matrices * c.hidden_size * c.intermediate_size + norms * c.hidden_size
    return tables * c.vocab_size * c.hidden_size + c.num_hidden_layers * block + last * c.hidden_size


@count_tries
def check_parameters(answer: Attempt) -> Feedback:
    """Check ``parameters(config)``: the number of parameters, as published with the released models.

    Examples
    --------
    >>> print(str(check_parameters(lambda config: config.vocab_size * config.hidden_size)).splitlines()[1])
      589824000 instead of 2614341888
    """
    trials = [
        Trial(f"parameters(config) of the {name}", (Gemma2Config.preset(name),), count)
        for name, count in PARAMETER_COUNTS.items()
    ]
    return give_feedback(answer, trials, [
        Hint("the head is tied, so the embedding table counts only once.", partial(_count, tables=2)),
        Hint("the embedding table is missing.", partial(_count, tables=0)),
        Hint("keys and values have fewer heads than queries: num_key_value_heads.",
             lambda c: _count(c, kv_heads=c.num_attention_heads)),
        Hint("the feed-forward layer has three matrices: gate, up and down.", partial(_count, matrices=2)),
        Hint("a block has four norms.", partial(_count, norms=2)),
        Hint("the norms have parameters too: four norms per block, and a last one.", partial(_count, norms=0, last=0)),
        Hint("the last norm, after all blocks, is missing.", partial(_count, last=0)),
        Hint("heads * head_dim need not be hidden_size.", lambda c: _count(c, heads_width=c.hidden_size)),
        Hint("attention is not 4 * hidden**2: q and o have hidden * heads * head_dim numbers each, k and v have "
             "hidden * key heads * head_dim.", lambda c: _count(c, own=4 * c.hidden_size**2)),
        Hint("attention has a fourth matrix, the output projection.",
             lambda c: _count(c) - c.num_hidden_layers * c.hidden_size * c.num_attention_heads * c.head_dim),
        Hint("keys and values have a matrix each; one is missing.",
             lambda c: _count(c) - c.num_hidden_layers * c.hidden_size * c.num_key_value_heads * c.head_dim),
        Hint("the matrices of attention are for all heads; you count one head.",
             lambda c: _count(c, own=4 * c.hidden_size * c.head_dim)),
        Hint("the attention is missing.", partial(_count, own=0)),
        Hint("the feed-forward layer is missing.", partial(_count, matrices=0)),
        Hint("the feed-forward layer has three matrices: gate, up and down.", partial(_count, matrices=1)),
        Hint("a block has four norms.", partial(_count, norms=1)),
        Hint("a block has four norms.", partial(_count, norms=3)),
        Hint("count every block: num_hidden_layers.", lambda c: _count(c.changed(num_hidden_layers=1))),
        Hint("return the number of parameters, not billions of parameters.", lambda c: _count(c) / 1e9),
    ])  # fmt: skip


# --- looking for a circuit --------------------------------------------------------------------------------------------


@count_tries
def check_induction_scores(answer: Attempt) -> Feedback:
    """Check ``induction_scores(probs, period)``: each head's mean attention on the token after the earlier occurrence.

    `probs` has the axes (heads, queries, keys). The text is ``<bos>`` and the same `period` tokens twice. The queries
    are those of the second copy. The expected results were added up by hand.

    Examples
    --------
    >>> wrong = lambda probs, period: np.diagonal(probs, -period, 1, 2)[:, -period:].mean(axis=-1)
    >>> print(str(check_induction_scores(wrong)).splitlines()[-1])
      Hint: that is the attention on the earlier occurrence itself; take the token after it.
    """
    probs = np.array([
        [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.25, 0.25, 0.5, 0, 0], [0, 0.5, 0.125, 0.375, 0],
         [0.25, 0, 0.125, 0.375, 0.25]],
        [[1, 0, 0, 0, 0], [0.25, 0.75, 0, 0, 0], [0.5, 0.375, 0.125, 0, 0], [0.0625, 0, 0.875, 0.0625, 0],
         [0.125, 0.125, 0, 0.625, 0.125]],
    ])  # fmt: skip
    # Text <bos> a b a b: the second a (place 3) looks for the b at place 2, the second b (place 4) for the a at 3.
    right = np.array([(0.125 + 0.375) / 2, (0.875 + 0.625) / 2])

    # Text <bos> a b c a b c: the second a, b, c (places 4, 5, 6) look for the keys 2, 3 and 4.
    longer = np.array([[
        [1, 0, 0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0, 0], [0.25, 0.5, 0.25, 0, 0, 0, 0],
        [0.25, 0.25, 0.25, 0.25, 0, 0, 0], [0.125, 0, 0.5, 0.25, 0.125, 0, 0],
        [0, 0.25, 0.125, 0.25, 0.25, 0.125, 0], [0.0625, 0, 0.0625, 0.125, 0.375, 0.25, 0.125],
    ]])  # fmt: skip
    trials = [
        Trial("induction_scores(probs, 2) of two heads", (probs, 2), right, 1e-12),
        Trial("induction_scores(probs, 3) of one head", (longer, 3), np.array([(0.5 + 0.25 + 0.375) / 3]), 1e-12),
    ]

    def mean_of(shift: int, first: int = 1, last: int = 1) -> Attempt:
        """Return an answer that averages keys `shift` places after the query, of queries from `first` to `last`."""

        def scores(probs: Array, period: int) -> Array:
            queries = np.arange(first * period + 1, (last + 1) * period + 1)
            return np.asarray(probs[:, queries, queries - period + shift].mean(axis=-1))

        return scores

    def choose(probs: Array, period: int) -> Array:
        queries = np.arange(period + 1, 2 * period + 1)
        return np.asarray(probs[:, queries, queries - period + 1])

    return give_feedback(answer, trials, [
        Hint("that is the attention on the earlier occurrence itself; take the token after it.", mean_of(0)),
        Hint("that is the attention on the token before the earlier occurrence; take the token after it.", mean_of(-1)),
        Hint("that is the attention on the token before the query (a previous-token head).",
             lambda probs, period: probs[:, (q := np.arange(period + 1, 2 * period + 1)), q - 1].mean(axis=-1)),
        Hint("the token after the earlier occurrence is one place after it, not two.", mean_of(2)),
        Hint("place 0 is <bos>: the second copy begins at place period + 1.",
             lambda probs, period: probs[:, (q := np.arange(period, 2 * period)), q - period + 1].mean(axis=-1)),
        Hint("place 0 is <bos>: the second copy begins at place period + 1.",
             lambda probs, period: probs[:, (q := np.arange(period, 2 * period + 1)), q - period + 1].mean(axis=-1)),
        Hint("the second copy has period queries; the last one, at place 2 * period, is missing.",
             lambda probs, period: probs[:, (q := np.arange(period + 1, 2 * period)), q - period + 1].mean(axis=-1)),
        Hint("take the mean over the queries; you take the sum.", lambda probs, period: choose(probs, period).sum(-1)),
        Hint("take the mean, not the maximum.", lambda probs, period: choose(probs, period).max(-1)),
        Hint("return one number for each head; you average over the heads too.",
             lambda probs, period: choose(probs, period).mean()),
        Hint("average over the queries, not over the heads.", lambda probs, period: choose(probs, period).mean(axis=0)),
        Hint("return one number for each head: the mean over the queries is missing.", choose),
        Hint("only the queries of the second copy have an earlier occurrence; divide by their number, period.",
             lambda probs, period: choose(probs, period).sum(-1) / probs.shape[1]),
        Hint("queries are the second axis of probs, and keys the third; you exchanged them.",
             lambda probs, period: choose(probs.swapaxes(-1, -2), period).mean(axis=-1)),
    ])  # fmt: skip


# --- finding a bug ----------------------------------------------------------------------------------------------------


def _reduce_post_attention_norm(layer: LayerWeights, context: Context) -> LayerWeights:
    return replace(layer, post_attention_layernorm=layer.post_attention_layernorm - 1)


# Number of a port -> its first wrong tensor and its bug.
_PORTS: dict[int, tuple[str, Change]] = {
    1: ("layers.0.attention.probs", bugs.sliding_window(lambda window: window + 1)),
    2: ("layers.0.attention.scores", bugs.config(query_pre_attn_scalar=lambda context: context.config.head_dim)),
    3: ("layers.0.feed_forward.gate", bugs.layer_weights(bugs.swapped_gate)),
    4: ("layers.0.post_attention_layernorm", bugs.layer_weights(_reduce_post_attention_norm)),
    5: ("logits", bugs.config(final_logit_softcapping=None)),
    6: ("cos", bugs.config(rope_theta=1e6, rope_parameters=None)),
}


def _run_port(change: Change = lambda context: context) -> dict[str, Array]:
    """Return the tensors of a run with a bug, for the recording's input."""
    about, golden = load_golden(GOLDEN)
    config, weights, _ = bugs.edit_model(change, *model_of(about))
    return dict(named_tensors(forward(golden["input_ids"], weights, config)))


@cache
def _load_recorded() -> dict[str, Array]:
    _, golden = load_golden(GOLDEN)
    order = _run_port()  # a file has its tensors in alphabetical order
    return {name: golden[f"calls.0.{name}"] for name in order if f"calls.0.{name}" in golden}


def recorded_trace() -> dict[str, Array]:
    """Return PyTorch's tensors of the recording ``bends-forward-f32`` by name, in the order of computation.

    Examples
    --------
    >>> list(recorded_trace())[:3]
    ['cos', 'sin', 'embedded']
    """
    return dict(_load_recorded())


def mystery_trace(number: int) -> dict[str, Array]:
    """Return the trace of a port with a bug: tensors by name, in the order of computation.

    The port has the same input as the recording ``bends-forward-f32``.

    Parameters
    ----------
    number : int
        The number of the port, 1 to 6.

    Raises
    ------
    ValueError
        If there is no port with that number.

    Examples
    --------
    >>> list(mystery_trace(2))[:3]
    ['cos', 'sin', 'embedded']
    """
    if number not in _PORTS:
        raise ValueError(f"number is {number}; the ports have the numbers 1 to {len(_PORTS)}")
    made = _run_port(_PORTS[number][1])
    return {name: made[name] for name in _load_recorded()}


# Number of a port -> a pattern for its wrong part and a pattern for the mistake. A right diagnosis matches both.
_DIAGNOSES: dict[int, tuple[str, str]] = {
    1: (r"window|sliding|mask", r"wide|large|big|more|long|\b6\b|\+ ?1|plus"),
    2: (r"scal|query_pre_attn|sqrt", r"head_?.?dim|query_pre_attn"),
    3: (
        r"\bup\b.*\bgate\b|\bgate\b.*\bup\b",
        r"exchang|swap|switch|revers|mix|interchang|confus|instead|wrong (way|order)",
    ),
    4: (
        r"post.?attention|after (the )?attention|second norm",
        r"1 ?\+|offset|plus (1|one)|minus (1|one)|- ?1\b|\bby the weight|1 is missing",
    ),
    5: (
        r"\bcap|soft.?cap|tanh",
        r"(final|last|logit|head|output).*(miss|without|not|no |absent|left out|none|forg)"
        r"|(miss|without|not|no |absent|left out|none|forg).*(final|last|logit|head|output)",
    ),
    6: (
        r"theta|base|frequenc|rope|rotary|angle",
        r"1e6|million|1[_, ]?000[_, ]?000|large|big|high|slow|100 times|1e4|10[_, ]?000\b|wrong",
    ),
}


def check_diagnosis(number: int, diagnosis: str) -> Feedback:
    """Check a sentence that names the mistake of a port from `mystery_trace`.

    The sentence must name the wrong part and its mistake, in the words of the notebooks. The check searches for these
    words; it does not understand the sentence.

    Parameters
    ----------
    number : int
        The number of the port, 1 to 6.
    diagnosis : str
        Your sentence.

    Raises
    ------
    ValueError
        If there is no port with that number.

    Examples
    --------
    >>> check_diagnosis(1, "the softmax is wrong")
    Not yet: another part of port 1 is wrong
      Hint: its first wrong tensor is layers.0.attention.probs. Which step computes this tensor, and with which numbers?
    >>> check_diagnosis(1, "the window is wrong")
    Not yet: you named the right part. Add the mistake: how does this part differ from the definition?
    >>> check_diagnosis(1, "the window is one key too wide")
    Right: that is the mistake of port 1.
    """
    if number not in _PORTS:
        raise ValueError(f"number is {number}; the ports have the numbers 1 to {len(_PORTS)}")
    words = " ".join(diagnosis[:500].lower().split())
    part, mistake = (bool(re.search(pattern, words)) for pattern in _DIAGNOSES[number])
    if not words:
        feedback = Feedback(False, "Not yet: nothing is written yet; put a sentence between the quotation marks")
    elif part and mistake:
        feedback = Feedback(True, f"Right: that is the mistake of port {number}.")
    elif part:
        feedback = Feedback(
            False, "Not yet: you named the right part. Add the mistake: how does this part differ from the definition?"
        )
    else:
        tensor = _PORTS[number][0]
        feedback = Feedback(
            False,
            f"Not yet: another part of port {number} is wrong\n  Hint: its first wrong tensor is {tensor}. Which "
            "step computes this tensor, and with which numbers?",
        )
    return record(f"diagnosis {number}", feedback)


def _measure_errors(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(np.sqrt(np.mean((ours[name] - x) ** 2) / np.mean(x**2))) for name, x in recorded.items()}


@count_tries
def check_first_divergence(answer: Attempt) -> Feedback:
    """Check ``first_divergence(ours, recorded)``: the name of the first tensor that rounding does not explain, or None.

    Both are mappings from names to arrays, in the order of computation.

    Examples
    --------
    >>> print(str(check_first_divergence(lambda ours, recorded: "logits")).splitlines()[1])
      'logits' instead of 'layers.0.attention.probs'
    """

    def trials() -> Iterator[Trial]:
        for number, (first, _) in _PORTS.items():
            yield Trial(
                f"first_divergence(ours, recorded) of port {number}", (mystery_trace(number), _load_recorded()), first
            )
        right = _run_port()
        yield Trial("first_divergence(ours, recorded) of a port without a bug", (right, _load_recorded()), "none")

    def worst(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str:
        errors = _measure_errors(ours, recorded)
        return max(errors, key=lambda name: errors[name])

    def wrong_names(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> list[str]:
        return [name for name, error in _measure_errors(ours, recorded).items() if error > 1e-5]

    def exact(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str:
        return next((name for name, x in recorded.items() if not np.array_equal(ours[name], x)), "none")

    def first_beyond(limit: Callable[[Array], Array]) -> Attempt:
        def first(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str:
            return next((name for name, x in recorded.items() if (np.abs(ours[name] - x) > limit(x)).any()), "none")

        return first

    absolute = "larger numbers have larger rounding errors: divide the error by the tensor's size."

    def answer_in_words(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> Any:
        found = answer(ours, recorded)
        return "none" if found is None else found

    return give_feedback(answer_in_words, trials(), [
        Hint("that is the tensor with the largest error. Errors grow along the way: return the first, not the worst.",
             worst),
        Hint("that is the first tensor in alphabetical order; the mapping is in the order of computation.",
             lambda o, r: min(wrong_names(o, r), default="none")),
        Hint("that is the last wrong tensor; the bug is at the first wrong tensor.",
             lambda o, r: [*wrong_names(o, r), "none"][-1 if not wrong_names(o, r) else -2]),
        Hint("two correct programs differ in the last digits: allow for rounding, for example 1e-5.",
             exact),
        Hint("the defaults of np.allclose allow an error of 1e-8 near 0, less than rounding: pass atol, or divide the "
             "error of the whole tensor by its size.", first_beyond(lambda x: 1e-8 + 1e-5 * np.abs(x))),
        Hint("a number near 0 has a large relative error: divide the error of the whole tensor by its size.",
             first_beyond(lambda x: 1e-4 * np.abs(x))),
        Hint("that is the tensor with the largest error. Errors grow along the way: return the first, not the worst.",
             lambda o, r: max(r, key=lambda name: np.abs(o[name] - r[name]).max())),
        Hint(absolute, first_beyond(lambda x: np.full_like(x, 1e-6))),
        Hint(absolute, first_beyond(lambda x: np.full_like(x, 1e-5))),
        Hint("errors have both signs: take their size (np.abs, or the square) before the mean.",
             lambda o, r: next((n for n, x in r.items() if abs(np.mean(o[n] - x)) > 1e-5), "none")),
        Hint("a port without a bug has no wrong tensor: return None.",
             lambda o, r: "" if not wrong_names(o, r) else "none"),
        Hint("a port without a bug has no wrong tensor: return None.",
             lambda o, r: [*r][-1] if not wrong_names(o, r) else "none"),
        Hint("that is the last correct tensor; return the first wrong one.",
             lambda o, r: [*r][max([*r].index(wrong_names(o, r)[0]) - 1, 0)] if wrong_names(o, r) else "none"),
    ])  # fmt: skip


# --- testing a property -----------------------------------------------------------------------------------------------

LogitsOf = Callable[[list[int]], Array]


def _make_model(mask: Callable[[int], Array] | None) -> LogitsOf:
    tiny = load("tiny")

    def model(ids: list[int]) -> Array:
        seen = None if mask is None else mask(len(ids))[None, None]
        logits: Array = forward([ids], tiny.weights, tiny.config, attention_mask=seen).logits[0]
        return logits

    return model


@count_tries
def check_causality_test(answer: Attempt) -> Feedback:
    """Check ``causality_test(model)``: raises AssertionError if a token of a text changes an earlier answer.

    ``model(ids)`` takes a list of token ids and returns logits (seq, vocab). The check calls the test with a right
    model, which must pass, and with wrong models, which must fail.

    Examples
    --------
    >>> print(str(check_causality_test(lambda model: None)).splitlines()[0])
    Not yet: your test accepts a model in which every token sees the whole text
    """
    right = call(answer, (_make_model(None),))
    if isinstance(right, Raised):
        error = f"{type(right.error).__name__}: {right.error}"
        if isinstance(right.error, NotImplementedError):
            hint = "nothing is written yet: replace the line that raises NotImplementedError"
        elif isinstance(right.error, AssertionError):
            hint = (
                "your test may compare exactly, although sums of different lengths round differently (use "
                "np.allclose, atol=1e-4); or it compares logits at or after the changed token, which may change"
            )
        else:
            hint = "ids are a list of whole numbers below 2048; the logits have the shape (seq, vocab)"
        return Feedback(False, f"Not yet: your test rejects the right model\n  {error}\n  Hint: {hint}.")

    def one_ahead(seq: int) -> Array:
        return np.tri(seq, k=1, dtype=bool)

    def first_sees_second(seq: int) -> Array:
        mask = np.tri(seq, dtype=bool)
        mask[0, 1:2] = True
        return mask

    leaks: list[tuple[str, Callable[[int], Array], str]] = [
        ("every token sees the whole text", lambda seq: np.ones((seq, seq), bool),
         "does your test raise (assert ...) if logits before the changed token change?"),
        ("every token sees the next one", one_ahead,
         "only the logits just before the changed token change: compare all earlier logits, logits[:place]."),
        ("only the first token sees the second", first_sees_second,
         "change every token except the first, and compare all earlier logits, logits[:place]."),
    ]  # fmt: skip
    for what, mask, hint in leaks:
        outcome = call(answer, (_make_model(mask),))
        if not isinstance(outcome, Raised):
            return Feedback(False, f"Not yet: your test accepts a model in which {what}\n  Hint: {hint}")
        if not isinstance(outcome.error, AssertionError):
            error = f"{type(outcome.error).__name__}: {outcome.error}"
            return Feedback(False, f"Not yet: your test raises an error other than AssertionError\n  {error}")
    return Feedback(True, "Right: the right model passes, and the three models that see later tokens fail.")
