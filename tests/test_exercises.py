"""Test every exercise: its solution passes; the stub and typical wrong answers get the right hint. The wrong answers
here are written independently of the known bugs in `refgemma.teach.exercises`."""

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refgemma import backward, ops
from refgemma.model import embed
from refgemma.precision import bf16, narrow, wide
from refgemma.teach import exercises
from refgemma.teach.exercises import solutions
from refgemma.teach.exercises.feedback import Hint, Trial, give_feedback

Answer = Callable[..., Any]


@dataclass(frozen=True)
class Wrong:
    """A wrong answer, and a part of the feedback that it must get."""

    said: str
    answer: Answer


@dataclass(frozen=True)
class Exercise:
    name: str
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def check(self) -> Answer:
        return getattr(exercises, f"check_{self.name}")

    @property
    def solution(self) -> Answer:
        return getattr(solutions, self.name)


def rows(x):
    return x / x.sum(axis=-1, keepdims=True)


def unit(x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True))


def qk(q, k, scalar):
    return np.einsum("hqd,hkd->hqk", q, k) / math.sqrt(scalar)


def induction(probs, period, shift=1, begin=1, end=1):
    seen = [probs[:, query, query - period + shift] for query in range(period + begin, 2 * period + end)]
    return sum(seen) / len(seen)


def norm_with_mean_removed(x, weight, eps):
    x_wide = wide(x)
    centred = x_wide - x_wide.mean(axis=-1, keepdims=True)
    return narrow(centred / np.sqrt(centred.var(axis=-1, keepdims=True) + eps) * (1 + wide(weight)), like=x)


def norm_by_loops_without_offset(x, weight, eps):
    return np.stack([row / math.sqrt(float((row * row).sum()) / len(row) + eps) * weight for row in x])


def norm_of_the_whole_array(x, weight, eps):
    return x / np.sqrt((x * x).mean() + eps) * (1 + weight)


def norm_in_half_precision(x, weight, eps):
    scale = 1 / np.sqrt((wide(x) ** 2).mean(axis=-1, keepdims=True) + eps)
    return narrow(wide(x) * scale, like=x) * (1 + weight)


def norm_without_root(x, weight, eps):
    return x / ((x * x).mean(-1)[..., None] + eps) * (1 + weight)


def turn_complex(x, cos, sin):
    half = x.shape[-1] // 2
    numbers = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos[..., :half] + 1j * sin[..., :half])
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape).astype(x.dtype)


def turn_backwards(x, cos, sin):
    half = x.shape[-1] // 2
    numbers = (x[..., :half] + 1j * x[..., half:]) * (cos[..., :half] - 1j * sin[..., :half])
    return np.concatenate([numbers.real, numbers.imag], axis=-1).astype(x.dtype)


def turn_without_minus(x, cos, sin):
    return x * cos + np.roll(x, x.shape[-1] // 2, axis=-1) * sin


def soft(x):
    return rows(np.exp(x))


def leak(scores, mask, cap):
    hidden = np.where(mask, scores, np.float32(-1e30))
    return soft(np.tanh(hidden / cap) * cap)


def top_p_below(probabilities, p):
    kept, total = np.zeros(len(probabilities), bool), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        total += probabilities[token]
        if total > p:
            break
        kept[token] = True
    return kept


def top_p_one_more(probabilities, p):
    kept, total, enough = np.zeros(len(probabilities), bool), 0.0, False
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        kept[token] = True
        if enough:
            break
        total += probabilities[token]
        enough = total >= p
    return kept


def top_p_from_below(probabilities, p):
    kept, total = np.zeros(len(probabilities), bool), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: probabilities[t]):
        if total >= p:
            break
        kept[token] = True
        total += probabilities[token]
    return kept


def first_unequal(ours, recorded):
    for name in recorded:
        if (ours[name] != recorded[name]).any():
            return name
    return None


def worst(ours, recorded):
    def error(name):
        return np.linalg.norm(ours[name] - recorded[name]) / np.linalg.norm(recorded[name])

    return max(recorded, key=error)


def first_by_name(ours, recorded):
    bad = [name for name in recorded if np.abs(ours[name] - recorded[name]).max() > 1e-3]
    return min(bad) if bad else None


def causality_at_the_end(model):
    ids = list(range(10, 20))
    assert np.allclose(model(ids)[:9], model([*ids[:9], 77])[:9], atol=1e-4)


def causality_to_the_last_digit(model):
    ids = list(range(10, 20))
    for place in range(1, 10):
        assert (model(ids)[:place] == model(ids[:place])[:place]).all()


def causality_of_what_may_change(model):
    ids = list(range(10, 20))
    assert np.allclose(model(ids)[5:], model([*ids[:5], 77, *ids[6:]])[5:], atol=1e-4)


def causality_far_away(model):
    ids = list(range(10, 20))
    for place in range(2, 10):
        before, after = model(ids), model([*ids[:place], 77, *ids[place + 1 :]])
        assert np.allclose(before[: place - 1], after[: place - 1], atol=1e-4)


def parameters_of(config, kv_heads=None, matrices=3, tables=1, norms=4, attention=None):
    h, d = config.hidden_size, config.head_dim
    kv = config.num_key_value_heads if kv_heads is None else kv_heads
    if attention is None:
        attention = h * d * config.num_attention_heads * 2 + h * d * kv * 2
    layer = attention + matrices * h * config.intermediate_size + norms * h
    return tables * config.vocab_size * h + config.num_hidden_layers * layer + h


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def turn(x, cos, sin, *, first=-1, second=1):
    """Rotate with the given signs of the two halves in the second product."""
    left, right = halves(x)
    return x * cos + np.concatenate([first * right, second * left], axis=-1) * sin


def gelu(x, plus=1, cube=0.044715, root=0.7978845608028654):
    return x * (1 + plus * np.tanh(root * (x + cube * x * x * x))) / 2


def rms(x, eps=0.0):
    return np.sqrt((wide(x) ** 2).sum(-1, keepdims=True) / x.shape[-1] + eps)


def norm(x, w, size, scale=lambda y, w: y + y * w):
    return narrow(scale(wide(x) / size, wide(w)), like=x)


def first_not_close(**tolerances):
    def find(ours, recorded):
        for name, x in recorded.items():
            if not np.allclose(ours[name], x, **tolerances):
                return name
        return None

    return find


def join_pairs(characters, ranks, best=min, rounds=99):
    pieces = list(characters)
    for _ in range(rounds):
        places = [n for n in range(len(pieces) - 1) if pieces[n] + pieces[n + 1] in ranks]
        if not places:
            break
        place = best(places, key=lambda n: ranks[pieces[n] + pieces[n + 1]])
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def norm_learns(*, mean=1, factor=lambda w: 1 + w, axes=-1, front=lambda r: r, eps=None, weight=None):
    """The gradients of a norm; the arguments make typical mistakes."""

    def learn(grad, x, w, given_eps):
        root = np.sqrt((x * x).sum(axis=-1, keepdims=True) / x.shape[-1] + (given_eps if eps is None else eps))
        n, h = x / root, grad * factor(w)
        grad_x = front(1 / root) * (h - mean * n * np.mean(h * n, axis=axes, keepdims=True))
        return grad_x, np.einsum("abi,abi->i", grad, n) if weight is None else weight(grad, x, n, w)

    return learn


def causality_of_a_cut_text(model):
    ids = list(range(10, 20))
    for place in range(1, 10):
        assert np.allclose(model(ids)[:place], model(ids[:place])[:place])


EXERCISES = [
    Exercise("embed", [
        Wrong("sqrt(hidden) is missing", lambda ids, table: np.stack([table[row] for row in ids])),
        Wrong("not hidden", lambda ids, table: 0.0 + table[ids] * float(table.shape[1])),
        Wrong("columns, not of rows", lambda ids, table: table[ids] * len(table) ** 0.5),
        Wrong("divide by sqrt", lambda ids, table: table[ids] / narrow(table.shape[1] ** 0.5, like=table)),
        Wrong("not of ids", lambda ids, table: table[ids] * np.sqrt(np.float32(len(ids)))),
        Wrong("instead of adding", lambda ids, table: np.float32(table.shape[1] ** 0.5) + table[ids]),
    ]),
    Exercise("embed_bf16", [
        Wrong("be rounded to the table's precision", lambda ids, table: table[ids] * table.shape[1] ** 0.5),
        Wrong("must first be rounded", lambda ids, table: bf16(wide(table)[ids] * np.float32(table.shape[1] ** 0.5))),
        Wrong("not to a whole number", lambda ids, table: table[ids] * float(round(table.shape[1] ** 0.5))),
        Wrong("sqrt(hidden) is missing", lambda ids, table: table[ids]),
        Wrong("not hidden", lambda ids, table: bf16(wide(table)[ids] * table.shape[1])),
        Wrong("divide by sqrt", lambda ids, table: table[ids] / bf16(table.shape[1] ** 0.5)),
    ]),
    Exercise("gelu_tanh", [
        Wrong("ReLU", lambda x: x * (x > 0)),
        Wrong("exact GELU", lambda x: np.array([0.5 * t * math.erfc(-t / math.sqrt(2)) for t in x.tolist()], x.dtype)),
        Wrong("SiLU", lambda x: x * (0.5 + 0.5 * np.tanh(x / 2))),
        Wrong("cube is missing", lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * x)) / 2),
        Wrong("0.5 in front", lambda x: x + x * np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x))),
        Wrong("not 1 - tanh", lambda x: gelu(x, plus=-1)),
        Wrong("not x - 0.044715", lambda x: gelu(x, cube=-0.044715)),
        Wrong("the sign of 0.5 x", lambda x: -gelu(x)),
        Wrong("root of the quotient", lambda x: gelu(x, root=2 / np.pi)),
        Wrong("not sqrt(pi / 2)", lambda x: gelu(x, root=1.2533141373155)),
        Wrong("the constant is", lambda x: gelu(x, cube=0.44715)),
        Wrong("the 1 is missing", lambda x: gelu(x) - x / 2),
    ]),
    Exercise("repeat_kv", [
        Wrong("0 1 2 0 1 2", lambda x, groups: np.concatenate([x] * groups, axis=1)),
        Wrong("the heads are axis 1", lambda x, groups: np.repeat(x, groups, axis=0)),
        Wrong("the heads are axis 1", lambda x, groups: np.repeat(x, groups, axis=-2)),
        Wrong("nothing is repeated", lambda x, groups: x.copy()),
        Wrong("one long row", lambda x, groups: x.repeat(groups)),
        Wrong("the last axis", lambda x, groups: np.concatenate([x] * groups, axis=-1)),
        Wrong("reshape it into the heads", lambda x, groups: x[:, :, None] + np.zeros((1, 1, groups, 1, 1))),
    ]),
    Exercise("rotate", [
        Wrong("half a head apart", turn_complex),
        Wrong("in the wrong direction", turn_backwards),
        Wrong("a minus is missing", turn_without_minus),
        Wrong("nothing is rotated", lambda x, cos, sin: x.copy()),
        Wrong("must be exchanged", lambda x, cos, sin: x * (cos + sin)),
        Wrong("one sign is wrong", lambda x, cos, sin: turn(x, cos, sin, first=-1, second=-1)),
        Wrong("a minus is missing", lambda x, cos, sin: turn(x, cos, sin, first=1)),
        Wrong("in the wrong direction", lambda x, cos, sin: turn(x, cos, sin, first=1, second=-1)),
        Wrong("must be exchanged", lambda x, cos, sin: x * cos + np.hstack([-1, 1]).repeat(x.shape[-1] // 2) * x * sin),
        Wrong("second product is missing", lambda x, cos, sin: cos * x),
    ]),
    Exercise("soft_cap", [
        Wrong("clips at the cap", lambda x, cap: np.minimum(np.maximum(x, -cap), cap)),
        Wrong("divide x by the cap", lambda x, cap: np.tanh(x) * cap),
        Wrong("between -1 and 1", lambda x, cap: np.tanh(x / cap)),
        Wrong("the values are unchanged", lambda x, cap: x),
        Wrong("only large positive", lambda x, cap: np.where(x < cap, x, cap)),
        Wrong("you multiply by it", lambda x, cap: cap * np.tanh(x * cap)),
        Wrong("a sign is wrong", lambda x, cap: cap * np.tanh(-x / cap)),
        Wrong("not a fixed number", lambda x, cap: 50 * np.tanh(x / 50)),
    ]),
    Exercise("attention_probs", [
        Wrong("after the cap", leak),
        Wrong("the cap is missing", lambda s, mask, cap: soft(np.where(mask, s, -np.inf))),
        Wrong("the mask is missing", lambda s, mask, cap: soft(cap * np.tanh(s / cap))),
        Wrong("the sum of a row is not 1", lambda s, mask, cap: soft(cap * np.tanh(s / cap)) * mask),
        Wrong("must be minus infinity", lambda s, mask, cap: soft(cap * np.tanh(s / cap) * mask)),
        Wrong("by its own sum", lambda s, mask, cap: (e := np.exp(cap * np.tanh(s / cap)) * mask) / np.sum(e)),
        Wrong("keep the axis", lambda s, mask, cap: (e := np.exp(cap * np.tanh(s / cap)) * mask) / e.sum(-1)),
        Wrong("multiply the tanh by the cap", lambda s, mask, cap: soft(np.where(mask, np.tanh(s / cap), -1e30))),
        Wrong("is soft", lambda s, mask, cap: soft(np.where(mask, np.minimum(np.maximum(s, -cap), cap), -1e30))),
        Wrong("adding the mask", lambda s, mask, cap: soft(cap * np.tanh(s / cap) + mask)),
    ]),
    Exercise("sliding_mask", [
        Wrong("window is missing", lambda q, k, w: np.less_equal.outer(k, q).T),
        Wrong("one key too wide", lambda q, k, w: (k <= q[:, None]) & (k >= q[:, None] - w)),
        Wrong("one key too narrow", lambda q, k, w: (k <= q[:, None]) & (k > q[:, None] - w + 1)),
        Wrong("may not see later keys", lambda q, k, w: k > q[:, None] - w),
        Wrong("you exchanged them", lambda q, k, w: (k[:, None] <= q) & (k[:, None] > q - w)),
        Wrong("arguments q_places", lambda q, k, w:
              np.array([[0 <= i - j < w for j in range(len(k))] for i in range(len(q))])),
        Wrong("make q_places a column", lambda q, k, w: (k - q <= 0) & (k - q > -w)),
        Wrong("brackets, not `and`", lambda q, k, w: (k <= q[:, None]) and (k > q[:, None] - w)),
        Wrong("the first keys of the text", lambda q, k, w: (k <= q[:, None]) * (k < w)),
        Wrong("not the numbers to add", lambda q, k, w: np.log((k <= q[:, None]) & (k > q[:, None] - w))),
    ]),
    Exercise("rms_norm", [
        Wrong("multiply by 1 + weight", norm_by_loops_without_offset),
        Wrong("LayerNorm", norm_with_mean_removed),
        Wrong("each vector separately", norm_of_the_whole_array),
        Wrong("square root of the mean square", norm_without_root),
        Wrong("round once at the end", norm_in_half_precision),
        Wrong("not their sum", lambda x, w, eps:
              narrow(wide(x) / np.sqrt((wide(x) ** 2).sum(-1, keepdims=True) + eps) * (1 + wide(w)), like=x)),
        Wrong("eps is missing", lambda x, w, eps: norm(x, w, rms(x))),
        Wrong("eps is missing", lambda x, w, eps: norm(x, w, rms(x), lambda y, w: y * w)),
        Wrong("not their sum", lambda x, w, eps: norm(x, w, np.linalg.norm(wide(x), axis=-1, keepdims=True))),
        Wrong("eps belongs inside", lambda x, w, eps: norm(x, w, rms(x) + eps)),
        Wrong("in brackets", lambda x, w, eps: norm(x, w, rms(x, eps), lambda y, w: 1 + w * y)),
        Wrong("a sign is wrong", lambda x, w, eps: norm(x, w, rms(x, eps), lambda y, w: y - y * w)),
        Wrong("std subtracts", lambda x, w, eps: norm(x, w, wide(x).std(-1, keepdims=True) + eps)),
        Wrong("keepdims=True", lambda x, w, eps: x / np.sqrt(np.mean(x**2, -1) + eps)),
    ]),
    Exercise("round_to_bf16", [
        Wrong("truncates the lower half", lambda x: (x.view(np.uint32) // 65536 * 65536).astype(np.uint32).view("f4")),
        Wrong("always up", lambda x: ((x.view(np.uint32) + 32768) // 65536 * 65536).astype(np.uint32).view("f4")),
        Wrong("float16", lambda x: np.float32(np.float16(x))),
        Wrong("nothing is rounded", lambda x: np.array(x)),
        Wrong("view(np.float32)", lambda x: x.astype(ml_dtypes.bfloat16).astype("f4").view("u4")),
        Wrong("upper half of the bits", lambda x: x.view(np.uint16)[1::2]),
        Wrong("away from 0", lambda x: ((x.view("u4") + 65535) // 65536 * 65536).astype("u4").view("f4")),
        Wrong("nothing is rounded", lambda x: np.round(x, 7)),
    ]),
    Exercise("keep_top_p", [
        Wrong("keep the token that reaches p", top_p_below),
        Wrong("one token too many", top_p_one_more),
        Wrong("not with the least likely", top_p_from_below),
        Wrong("all kept tokens together", lambda s, p: np.array([share >= p for share in s])),
        Wrong("true means", lambda s, p: ~solutions.keep_top_p(s, p)),
        Wrong("you keep all tokens", lambda s, p: s > 0),
        Wrong("not the kept probabilities", lambda s, p: s * solutions.keep_top_p(s, p)),
    ]),
    Exercise("encode_word", [
        Wrong("the merge with the lowest rank comes first", lambda word, ranks: join_pairs(word, ranks, best=max)),
        Wrong("that is one merge", lambda word, ranks: join_pairs(word, ranks, rounds=1)),
        Wrong("not the leftmost pair", lambda word, ranks: join_pairs(word, ranks, best=lambda places, key: places[0])),
        Wrong("nothing is joined", lambda word, ranks: word),
        Wrong("not the whole word", lambda word, ranks: "".join(word)),
        Wrong("leftmost one first", lambda word, ranks: [piece[::-1] for piece in join_pairs(
            word[::-1], {piece[::-1]: rank for piece, rank in ranks.items()})[::-1]]),
    ]),
    Exercise("qk_norm_scores", [
        Wrong("both norms are missing", lambda q, k, wq, wk, scalar: np.einsum("hqd,hkd->hqk", q, k) / scalar**0.5),
        Wrong("norm of the keys is missing", lambda q, k, wq, wk, scalar: qk(unit(q) * (1 + wq), k, scalar)),
        Wrong("multiply by 1 + weight", lambda q, k, wq, wk, scalar: qk(unit(q) * wq, unit(k) * wk, scalar)),
        Wrong("factors 1 + weight are missing", lambda q, k, wq, wk, scalar: qk(unit(q), unit(k), scalar)),
        Wrong("one for both", lambda q, k, wq, wk, scalar: qk(unit(q) * (1 + wk), unit(k) * (1 + wk), scalar)),
        Wrong("you divide by scalar", lambda q, k, wq, wk, scalar:
              qk(unit(q) * (1 + wq), unit(k) * (1 + wk), scalar**2)),
        Wrong("need not be head_dim", lambda q, k, wq, wk, scalar:
              qk(unit(q) * (1 + wq), unit(k) * (1 + wk), q.shape[-1])),
        Wrong("no tanh here", lambda q, k, wq, wk, scalar:
              50 * np.tanh(qk(unit(q) * (1 + wq), unit(k) * (1 + wk), scalar) / 50)),
        Wrong("no softmax yet", lambda q, k, wq, wk, scalar:
              rows(np.exp(qk(unit(q) * (1 + wq), unit(k) * (1 + wk), scalar)))),
    ]),
    Exercise("induction_scores", [
        Wrong("earlier occurrence itself", lambda probs, period: induction(probs, period, shift=0)),
        Wrong("begins at place period + 1", lambda probs, period: induction(probs, period, begin=0)),
        Wrong("begins at place period + 1", lambda probs, period: induction(probs, period, begin=0, end=0)),
        Wrong("previous-token head", lambda probs, period: induction(probs, period, shift=period - 1)),
        Wrong("the last one, at place 2 * period, is missing", lambda probs, period: induction(probs, period, end=0)),
        Wrong("you take the sum", lambda probs, period: period * induction(probs, period)),
        Wrong("over the heads too", lambda probs, period: float(induction(probs, period).mean())),
        Wrong("you exchanged them", lambda probs, period: induction(probs.transpose(0, 2, 1), period)),
        Wrong("divide by their number", lambda probs, period: induction(probs, period) * period / len(probs[0])),
    ]),
    Exercise("soft_cap_backward", [
        Wrong("passes the cap unchanged", lambda grad, x, cap: grad.copy()),
        Wrong("not to the result", lambda grad, x, cap: grad / np.cosh(np.tanh(x / cap)) ** 2),
        Wrong("slope alone", lambda grad, x, cap: 1 / np.cosh(x / cap) ** 2),
        Wrong("cancel", lambda grad, x, cap: grad / np.cosh(x / cap) ** 2 / cap),
        Wrong("cancel", lambda grad, x, cap: cap * grad / np.cosh(x / cap) ** 2),
        Wrong("divide x by the cap", lambda grad, x, cap: grad / np.cosh(np.clip(x, -50, 50)) ** 2),
        Wrong("the square is missing", lambda grad, x, cap: grad * (1 - np.tanh(x / cap))),
        Wrong("a sign is wrong", lambda grad, x, cap: grad * (1 + np.tanh(x / cap) ** 2)),
        Wrong("slope of cutting off", lambda grad, x, cap: np.where(abs(x) < cap, grad, 0)),
        Wrong("caps the gradient", lambda grad, x, cap: cap * np.tanh(grad / cap)),
    ]),
    Exercise("mean_gradient", [
        Wrong("the same weight", lambda gradients, counts: sum(gradients) / len(gradients)),
        Wrong("by the number of all tokens", lambda gradients, counts: (gradients.T * counts).sum(axis=1)),
        Wrong("not of micro-batches", lambda gradients, counts: (gradients.T * counts).mean(axis=1)),
        Wrong("nothing is divided", lambda gradients, counts: sum(gradients)),
        Wrong("it is a mean, and you need a sum", lambda gradients, counts: sum(gradients) / sum(counts)),
        Wrong("once more", lambda gradients, counts: sum(g / n for g, n in zip(gradients, counts, strict=True))),
        Wrong("one gradient remains", lambda gradients, counts: (gradients.T * counts / counts.sum()).T),
    ]),
    Exercise("rms_norm_backward", [
        Wrong("gradient of x comes first", lambda *given: solutions.rms_norm_backward(*given)[::-1]),
        Wrong("a second term is missing", norm_learns(mean=0)),
        Wrong("Gemma multiplies by 1 + weight", norm_learns(factor=lambda w: w)),
        Wrong("factor 1 + weight is missing", norm_learns(factor=lambda w: 1)),
        Wrong("not its sum", norm_learns(mean=24)),
        Wrong("each vector", norm_learns(axes=None)),
        Wrong("a sign is wrong", norm_learns(mean=-1)),
        Wrong("r in front is missing", norm_learns(front=lambda r: 1)),
        Wrong("eps is missing", norm_learns(eps=0)),
        Wrong("sum over all axes but the last", norm_learns(weight=lambda g, x, n, w: n * g)),
        Wrong("one of them", norm_learns(weight=lambda g, x, n, w: np.add.reduce(n * g))),
        Wrong("not over the numbers of a vector", norm_learns(weight=lambda g, x, n, w: (n * g).sum(-1))),
        Wrong("not x", norm_learns(weight=lambda g, x, n, w: np.einsum("abi,abi->i", g, x))),
        Wrong("of a bias", norm_learns(weight=lambda g, x, n, w: g.sum((0, 1)))),
        Wrong("does not belong here", norm_learns(weight=lambda g, x, n, w: np.einsum("abi,abi->i", g, n) * (1 + w))),
        Wrong("you take the mean", norm_learns(weight=lambda g, x, n, w: (g * n).mean((0, 1)))),
    ]),
    Exercise("parameters", [
        Wrong("head is tied", lambda config: parameters_of(config, tables=2)),
        Wrong("num_key_value_heads", lambda config: parameters_of(config, kv_heads=config.num_attention_heads)),
        Wrong("three matrices", lambda config: parameters_of(config, matrices=2)),
        Wrong("four norms", lambda config: parameters_of(config, norms=2)),
        Wrong("not 4 * hidden**2", lambda config: parameters_of(config, attention=4 * config.hidden_size**2)),
        Wrong("count every block", lambda config: parameters_of(config.changed(num_hidden_layers=1))),
        Wrong("not billions", lambda config: round(parameters_of(config) / 1e9, 1)),
        Wrong("feed-forward layer is missing", lambda config: parameters_of(config, matrices=0)),
    ]),
    Exercise("first_divergence", [
        Wrong("return the first, not the worst", worst),
        Wrong("allow for rounding", first_unequal),
        Wrong("alphabetical order", first_by_name),
        Wrong("defaults of np.allclose", first_not_close()),
        Wrong("near 0 has a large relative error", first_not_close(rtol=1e-4, atol=0)),
        Wrong("larger rounding errors", first_not_close(rtol=0, atol=1e-6)),
        Wrong("None", lambda ours, recorded: first_not_close(atol=1e-4)(ours, recorded) or "logits"),
    ]),
    Exercise("causality_test", [
        Wrong("every token except the first", causality_at_the_end),
        Wrong("may compare exactly", causality_to_the_last_digit),
        Wrong("which may change", causality_of_what_may_change),
        Wrong("all earlier logits", causality_far_away),
        Wrong("does your test raise", lambda model: bool(np.isfinite(model([5, 6])).all())),
        Wrong("np.allclose, atol=1e-4", causality_of_a_cut_text),
    ]),
]  # fmt: skip

CHECKS = [
    name for name in exercises.__all__ if name.startswith("check_") and name not in ("check_diagnosis", "check_seeded")
]
WRONG = [(exercise, wrong) for exercise in EXERCISES for wrong in exercise.wrong]


def stub(*arguments: Any) -> Any:
    raise NotImplementedError


def hint(message: str) -> str:
    return message.partition("Hint: ")[2]


def test_every_exercise_is_here_and_in_a_notebook() -> None:
    assert sorted(f"check_{exercise.name}" for exercise in EXERCISES) == sorted(CHECKS)
    notebooks = "".join(path.read_text("utf-8") for path in (Path(__file__).parents[1] / "notebooks").glob("*.py"))
    assert set(re.findall(r"exercises\.(check_\w+)\(", notebooks)) == {*CHECKS, "check_diagnosis"}


def test_a_solution_has_the_arguments_of_its_notebook() -> None:
    notebooks = "".join(path.read_text("utf-8") for path in (Path(__file__).parents[1] / "notebooks").glob("*.py"))
    for exercise in EXERCISES:
        arguments = ", ".join(inspect.signature(exercise.solution).parameters)
        assert f"def {exercise.name}({arguments}):\n    raise NotImplementedError\n" in notebooks


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_the_solution_passes(exercise: Exercise) -> None:
    feedback = exercise.check(exercise.solution)
    assert feedback.passed, feedback
    assert repr(feedback).startswith("Right")


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_the_stub_is_told_that_nothing_is_written(exercise: Exercise) -> None:
    feedback = exercise.check(stub)
    assert not feedback.passed
    assert "nothing is written yet" in repr(feedback)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_a_crash_is_told_not_thrown(exercise: Exercise) -> None:
    def crash(*arguments: Any) -> Any:
        raise IndexError("list index out of range")

    feedback = exercise.check(crash)
    assert not feedback.passed
    assert "IndexError: list index out of range" in repr(feedback)


@pytest.mark.parametrize(("exercise", "wrong"), WRONG, ids=[f"{e.name} {e.wrong.index(w)}: {w.said}" for e, w in WRONG])
def test_a_wrong_answer_gets_its_hint(exercise: Exercise, wrong: Wrong) -> None:
    feedback = exercise.check(wrong.answer)
    assert not feedback.passed
    assert wrong.said in hint(feedback.message), feedback


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_there_are_four_wrong_answers_at_least(exercise: Exercise) -> None:
    assert len({wrong.said for wrong in exercise.wrong}) >= 4


@pytest.mark.parametrize("name", ["gelu_tanh", "repeat_kv", "rotate", "soft_cap", "sliding_mask", "rms_norm"])
def test_the_definition_is_not_an_answer(name: str) -> None:
    definition = getattr(ops, name)
    for answer in (definition, functools.partial(definition)):
        feedback = getattr(exercises, f"check_{name}")(answer)
        assert not feedback
        assert f"refgemma.ops.{name}, refgemma's own definition" in feedback.message
    assert not exercises.check_embed(embed)


def test_the_cell_of_notebook_1_is_an_answer() -> None:
    # Its own first code: the rounding of the factor belongs to notebook 7.
    def embed(ids, table):
        return table[ids] * np.float32(np.sqrt(table.shape[-1]))

    assert exercises.check_embed(embed)
    assert "must first be rounded" in exercises.check_embed_bf16(embed).message


@pytest.mark.parametrize("kind", [int, np.float32, np.uint8])
def test_a_mask_of_numbers_is_not_a_mask(kind: type) -> None:
    def ints(*arguments: Any) -> Any:
        return solutions.sliding_mask(*arguments).astype(kind)

    message = repr(exercises.check_sliding_mask(ints))
    assert f"the result is {np.dtype(kind)}, not bool" in message
    assert "not bool" in repr(exercises.check_keep_top_p(lambda s, p: solutions.keep_top_p(s, p).astype(kind)))
    assert exercises.check_sliding_mask(lambda *arguments: solutions.sliding_mask(*arguments).tolist())


@pytest.mark.parametrize("result", [["cos"], 11, np.zeros(3)])
def test_a_name_is_asked_for(result: Any) -> None:
    message = repr(exercises.check_first_divergence(lambda ours, recorded: result))
    assert f"returned {type(result).__name__} instead of str" in message


@pytest.mark.parametrize("result", [np.zeros(3), (np.zeros(3),), 1.0])
def test_a_pair_is_asked_for(result: Any) -> None:
    message = repr(exercises.check_rms_norm_backward(lambda grad, x, weight, eps: result))
    assert "return two gradients" in message


def test_the_definitions_gradient_is_not_an_answer() -> None:
    assert "refgemma's own definition" in repr(exercises.check_rms_norm_backward(backward.rms_norm_backward))
    assert "refgemma's own definition" in repr(exercises.check_soft_cap_backward(backward.soft_cap_backward))


# --- what the judge says of any answer --------------------------------------------------------------------------------


DOUBLED = np.array([1.0, 2.0, 4.0], np.float32)


def said(answer: Answer, right: Any = DOUBLED) -> str:
    argument = np.array([0.5, 1.0, 2.0], np.float32)
    known = Hint("never", lambda x: np.full(3, 7.0, np.float32))
    return repr(give_feedback(answer, [Trial("double(x)", (argument,), right, 1e-6)], [known]))


def test_no_result() -> None:
    assert "None; does it end with `return ...`?" in said(lambda x: None)


def test_another_shape() -> None:
    assert "the shape is (3, 1) instead of (3,)" in said(lambda x: 2 * x[:, None])


def test_no_numbers() -> None:
    assert "returned str, not an array of numbers" in said(lambda x: "2, 4, 8")
    assert "returned rows of different lengths" in said(lambda x: [[1.0], [2.0, 3.0]])


def test_not_a_number() -> None:
    assert "NaN (not a number), first at [1]" in said(lambda x: np.array([1.0, np.nan, 4.0]))


def test_the_farthest_element_is_shown() -> None:
    assert "2 of 3 elements are wrong; the largest error, at [2], is 8 instead of 4" in said(
        lambda x: 4 * x - [1, 1, 0]
    )


def test_an_argument_that_is_written_into() -> None:
    def doubled(x: Any) -> Any:
        x *= 2
        return x

    assert "changes its argument" in said(doubled)


def test_lists_and_double_precision_will_do() -> None:
    assert said(lambda x: [2 * float(number) for number in x]).startswith("Right")


def test_a_result_that_should_be_rounded_and_is_not() -> None:
    assert "not rounded to bfloat16" in said(lambda x: 2 * x, right=bf16([1.0, 2.0, 4.0]))


def test_a_mistake_nobody_knows_gets_no_hint() -> None:
    assert "Hint" not in said(lambda x: 3 * x)
    assert "Hint: never" in said(lambda x: np.full(3, 7.0))


def test_rounding_is_judged_against_another_library() -> None:
    numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(solutions.round_to_bf16(numbers), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_an_array_where_a_number_is_asked_for() -> None:
    assert "instead of 2614341888" in repr(exercises.check_parameters(lambda config: np.arange(3)))


def test_a_port_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="number is 7; the ports have the numbers 1 to 6"):
        exercises.mystery_trace(7)
