"""The exercises on the whole model: choosing tokens, counting parameters, finding a bug, testing a property."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.goldens.load import load_golden, model_of
from refgemma.model import forward
from refgemma.modeling.pretrained import load
from refgemma.precision import Array
from refgemma.teach.exercises.feedback import Answer, Feedback, Mistake, Raised, Trial, called, judge
from refgemma.trace.names import named_tensors
from refgemma.weights.parameters import Weights

GOLDEN = "bends-forward-f32"

# --- choosing tokens --------------------------------------------------------------------------------------------------


def _kept(probabilities: Array, chosen: Array) -> Array:
    kept = np.zeros(len(probabilities), bool)
    kept[chosen] = True
    return kept


def _order(probabilities: Array) -> Array:
    return np.argsort(-probabilities, kind="stable")


def check_keep_top_p(answer: Answer) -> Feedback:
    """``keep_top_p(probabilities, p)``: true for the likeliest tokens that together have at least probability p.

    As few as possible, so the one that reaches p is the last that is kept. Right is what one can add up by hand.

    Examples
    --------
    >>> print(str(check_keep_top_p(lambda probabilities, p: probabilities >= p)).splitlines()[-1])
      Hint: p is the probability of all kept tokens together, not of each.
    """
    shares = np.array([0.25, 0.0625, 0.375, 0.125, 0.1875])  # exact in binary; in order: 2, 0, 4, 3, 1
    keeps = {0.5: [2, 0], 0.625: [2, 0], 0.7: [2, 0, 4], 0.3: [2], 1.0: [0, 1, 2, 3, 4]}
    trials = [
        Trial(f"keep_top_p({shares.tolist()}, {p})", (shares, p), _kept(shares, np.array(chosen)))
        for p, chosen in keeps.items()
    ]

    def running(probabilities: Array) -> Array:
        return np.cumsum(probabilities[_order(probabilities)])

    return judge(answer, trials, [
        Mistake("the token that reaches p is kept, too.",
                lambda s, p: _kept(s, _order(s)[running(s) <= p])),
        Mistake("the token that reaches p is kept, too.", lambda s, p: _kept(s, _order(s)[running(s) < p])),
        Mistake("one token too many: stop at the one that reaches p.",
                lambda s, p: _kept(s, _order(s)[running(s) - s[_order(s)] <= p])),
        Mistake("one token too many: stop at the one that reaches p.",
                lambda s, p: _kept(s, _order(s)[: int(np.argmax(running(s) >= p)) + 2])),
        Mistake("begin with the likeliest: sort before you add up.",
                lambda s, p: np.cumsum(s) - s < p),
        Mistake("begin with the likeliest, not with the least likely.",
                lambda s, p: _kept(s, np.argsort(s)[np.cumsum(np.sort(s)) - np.sort(s) < p])),
        Mistake("the result is in sorted order: put it back in the order of the tokens.",
                lambda s, p: running(s) - s[_order(s)] < p),
        Mistake("p is the probability of all kept tokens together, not of each.", lambda s, p: s >= p),
    ])  # fmt: skip


# --- counting ---------------------------------------------------------------------------------------------------------

PUBLISHED = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}


def _count(
    c: Gemma2Config, kv_heads: int | None = None, norms: int = 4, matrices: int = 3, tables: int = 1,
    heads_width: int | None = None, last: int = 1,
) -> int:  # fmt: skip
    """Parameters, with what one might get wrong as arguments."""
    width = c.num_attention_heads * c.head_dim if heads_width is None else heads_width
    keys = (c.num_key_value_heads if kv_heads is None else kv_heads) * c.head_dim
    block = 2 * c.hidden_size * (width + keys) + matrices * c.hidden_size * c.intermediate_size + norms * c.hidden_size
    return tables * c.vocab_size * c.hidden_size + c.num_hidden_layers * block + last * c.hidden_size


def check_parameters(answer: Answer) -> Feedback:
    """``parameters(config)``: how many numbers a model has. Right are the counts published with the released models.

    Examples
    --------
    >>> print(str(check_parameters(lambda config: config.vocab_size * config.hidden_size)).splitlines()[1])
      589824000 instead of 2614341888
    """
    trials = [
        Trial(f"parameters(config) of the {name}", (Gemma2Config.preset(name),), count)
        for name, count in PUBLISHED.items()
    ]
    return judge(answer, trials, [
        Mistake("the head is tied: the embedding table is used twice, but is there once.", partial(_count, tables=2)),
        Mistake("the embedding table is missing.", partial(_count, tables=0)),
        Mistake("keys and values have fewer heads than queries: num_key_value_heads.",
                lambda c: _count(c, kv_heads=c.num_attention_heads)),
        Mistake("the feed-forward layer has three matrices: gate, up and down.", partial(_count, matrices=2)),
        Mistake("a block has four norms.", partial(_count, norms=2)),
        Mistake("the norms have parameters, too: four in a block, and a last one.", partial(_count, norms=0, last=0)),
        Mistake("the last norm, after all blocks, is missing.", partial(_count, last=0)),
        Mistake("heads * head_dim need not be hidden_size.", lambda c: _count(c, heads_width=c.hidden_size)),
    ])  # fmt: skip


# --- finding a bug ----------------------------------------------------------------------------------------------------


def _each_layer(weights: Weights, change: Callable[[Any], Mapping[str, Array]]) -> Weights:
    return replace(weights, layers=[replace(layer, **change(layer)) for layer in weights.layers])


# What is wrong with each port, as an edit of its configuration or weights; and the tensor that shows it first.
_PORTS: dict[int, tuple[str, Callable[[Gemma2Config, Weights], tuple[Gemma2Config, Weights]]]] = {
    1: ("layers.0.attention.probs", lambda c, w: (c.changed(sliding_window=c.sliding_window + 1), w)),
    2: ("layers.0.attention.scores", lambda c, w: (c.changed(query_pre_attn_scalar=c.head_dim), w)),
    3: ("layers.0.feed_forward.gate", lambda c, w: (
        c, _each_layer(w, lambda layer: {"gate_proj": layer.up_proj, "up_proj": layer.gate_proj}))),
    4: ("layers.0.post_attention_layernorm", lambda c, w: (
        c, _each_layer(w, lambda layer: {"post_attention_layernorm": layer.post_attention_layernorm - 1}))),
    5: ("logits", lambda c, w: (c.changed(final_logit_softcapping=None), w)),
    6: ("cos", lambda c, w: (c.changed(rope_theta=1e6, rope_parameters=None), w)),
}  # fmt: skip


def _trace(change: Callable[[Gemma2Config, Weights], tuple[Gemma2Config, Weights]]) -> dict[str, Array]:
    """What refgemma computes of the recording's input, with a configuration and weights that were changed."""
    about, golden = load_golden(GOLDEN)
    config, weights = change(*model_of(about))
    return dict(named_tensors(forward(golden["input_ids"], weights, config)))


@cache
def _recorded() -> dict[str, Array]:
    _, golden = load_golden(GOLDEN)
    order = _trace(lambda config, weights: (config, weights))  # a file of tensors has them by the alphabet
    return {name: golden[f"calls.0.{name}"] for name in order if f"calls.0.{name}" in golden}


def recorded_trace() -> dict[str, Array]:
    """What PyTorch computed in the recording ``bends-forward-f32``: tensors by name, in the order of computation.

    Examples
    --------
    >>> list(recorded_trace())[:3]
    ['cos', 'sin', 'embedded']
    """
    return dict(_recorded())


def mystery_trace(number: int) -> dict[str, Array]:
    """The trace of a port that has a bug: tensors by name, in the order of computation.

    The port has read what the recording ``bends-forward-f32`` was made of.

    Parameters
    ----------
    number : int
        1 to 6: which port.

    Raises
    ------
    ValueError
        If there is no port of that number.

    Examples
    --------
    >>> list(mystery_trace(2))[:3]
    ['cos', 'sin', 'embedded']
    """
    if number not in _PORTS:
        raise ValueError(f"there is no port {number}: they are numbered from 1 to {len(_PORTS)}")
    made = _trace(_PORTS[number][1])
    return {name: made[name] for name in _recorded()}


def _errors(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> dict[str, float]:
    return {name: float(np.sqrt(np.mean((ours[name] - x) ** 2) / np.mean(x**2))) for name, x in recorded.items()}


def check_first_divergence(answer: Answer) -> Feedback:
    """``first_divergence(ours, recorded)``: the name of the first tensor that rounding does not explain, or None.

    Both are mappings from names to arrays, in the order of computation.

    Examples
    --------
    >>> print(str(check_first_divergence(lambda ours, recorded: "logits")).splitlines()[1])
      'logits' instead of 'layers.0.attention.probs'
    """

    def trials() -> Iterator[Trial]:
        for number, (first, _) in _PORTS.items():
            yield Trial(
                f"first_divergence(ours, recorded) of port {number}", (mystery_trace(number), _recorded()), first
            )
        right = _trace(lambda config, weights: (config, weights))
        yield Trial("first_divergence(ours, recorded) of a port without a bug", (right, _recorded()), "none")

    def worst(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str:
        errors = _errors(ours, recorded)
        return max(errors, key=lambda name: errors[name])

    def wrong_names(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> list[str]:
        return [name for name, error in _errors(ours, recorded).items() if error > 1e-5]

    def exact(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str:
        return next((name for name, x in recorded.items() if not np.array_equal(ours[name], x)), "none")

    def named(ours: Mapping[str, Array], recorded: Mapping[str, Array]) -> str:
        found = answer(ours, recorded)
        return "none" if found is None else found

    return judge(named, trials(), [
        Mistake("that is the tensor with the largest error. Errors grow on the way: take the first, not the worst.",
                worst),
        Mistake("that is the first by the alphabet; the order of computation is that of the mapping.",
                lambda o, r: min(wrong_names(o, r), default="none")),
        Mistake("that is the last wrong tensor; the bug is where the first is.",
                lambda o, r: [*wrong_names(o, r), "none"][-1 if not wrong_names(o, r) else -2]),
        Mistake("two programs that are both right differ in the last digits: allow for rounding, say 1e-5.",
                exact),
        Mistake("that is the last tensor before the difference; name the first that is wrong.",
                lambda o, r: [*r][max([*r].index(wrong_names(o, r)[0]) - 1, 0)] if wrong_names(o, r) else "none"),
    ])  # fmt: skip


# --- testing a property -----------------------------------------------------------------------------------------------

Model = Callable[[list[int]], Array]


def _model(mask: Callable[[int], Array] | None) -> Model:
    tiny = load("tiny")

    def model(ids: list[int]) -> Array:
        seen = None if mask is None else mask(len(ids))[None, None]
        logits: Array = forward([ids], tiny.weights, tiny.config, attention_mask=seen).logits[0]
        return logits

    return model


def check_causality_test(answer: Answer) -> Feedback:
    """``causality_test(model)``: raises AssertionError if a token of a text changes an answer before it, else nothing.

    ``model(ids)`` takes a list of token ids and returns logits (seq, vocab). The test is
    given a right model and wrong ones.

    Examples
    --------
    >>> print(str(check_causality_test(lambda model: None)).splitlines()[0])
    Not yet: your test accepts a model in which every token sees the whole text
    """
    right = called(answer, (_model(None),))
    if isinstance(right, Raised):
        error = f"{type(right.error).__name__}: {right.error}"
        if isinstance(right.error, NotImplementedError):
            hint = "nothing is written yet: replace the line that raises NotImplementedError"
        elif isinstance(right.error, AssertionError):
            hint = (
                "it may compare to the last digit, where sums of other lengths are rounded otherwise (np.allclose, "
                "atol=1e-4); or it looks at answers at or after the changed token, which may change"
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
         "does it raise (assert ...) where an answer before the changed token moved?"),
        ("every token sees the next one", one_ahead,
         "only the answer just before the changed token moves at once: compare all answers up to it, logits[:place]."),
        ("only the first token sees the second", first_sees_second,
         "change every token but the first, and compare all answers before it, logits[:place]."),
    ]  # fmt: skip
    for what, mask, hint in leaks:
        outcome = called(answer, (_model(mask),))
        if not isinstance(outcome, Raised):
            return Feedback(False, f"Not yet: your test accepts a model in which {what}\n  Hint: {hint}")
        if not isinstance(outcome.error, AssertionError):
            error = f"{type(outcome.error).__name__}: {outcome.error}"
            return Feedback(False, f"Not yet: your test fails with another error than AssertionError\n  {error}")
    return Feedback(True, "Right: the right model passes, and three that see the future are caught.")
