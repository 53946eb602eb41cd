"""The known mistakes, made in transformers' own code: what `refgemma check` is tried on. Each is written
here once more, apart from the oracle's catalogue, which gives the names and the fields that score an answer.

    python golden/mistakes.py                 make every mistake in float32 and bfloat16 and print what check says
    python golden/mistakes.py --write         and write the table into docs/oracle.md

Each mistake is a function of the model, the prompt, and `put`, which sets an attribute and takes it back afterwards.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Gemma2ForCausalLM
from transformers.models.gemma2 import modeling_gemma2 as modeling

from refgemma.hub import find_model
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.oracle.diagnose import Diagnosis, Report, diagnose
from refgemma.oracle.engine import Engine
from refgemma.oracle.families import list_families
from refgemma.oracle.known_bugs import KNOWN_BUGS, KnownBug
from refgemma.oracle.prompts import Prompt, prompts
from refgemma.oracle.verdicts import CONFORMS
from refgemma.trace.candidate import load_trace, only
from refgemma.trace.capture import capture_transformers
from refgemma.trace.names import field_of, save_trace

Put = Callable[[Any, str, Any], None]
Make = Callable[[Gemma2ForCausalLM, Prompt, Put], Any]
HALF = torch.bfloat16


# --- attention --------------------------------------------------------------------------------------------------------


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """As transformers does it, in three kernels."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def attention(
    score: Callable[..., Tensor] = lambda q, k, scale: torch.matmul(q, k.transpose(2, 3)) * scale,
    cap: Callable[..., Tensor] = lambda scores, cap, mask: capped(scores, cap),
    order: str = "cap, mask",
    mask_of: Callable[..., Tensor] | None = None,
    hide: Callable[[Tensor, Tensor], Tensor] = lambda scores, mask: scores + mask,
    value: Callable[[Tensor], Tensor] = lambda values: values,
    mixed: Callable[[Tensor, float | None], Tensor] = lambda output, cap: output,
    weigh: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Callable[..., Any]:
    """transformers' eager attention, with parts exchanged."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None,
               **_: Any) -> Any:  # fmt: skip
        if mask_of is not None:
            seen = mask_of(module, q.shape[2], k.shape[2], mask)
            mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
        keys = modeling.repeat_kv(k, module.num_key_value_groups)
        values = modeling.repeat_kv(v, module.num_key_value_groups)
        scores = score(q, keys, scaling)
        weights = cap(scores + mask, softcap, mask) if order == "mask, cap" else hide(cap(scores, softcap, mask), mask)
        weights = torch.nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return mixed(weigh(weights, value(values)), softcap).transpose(1, 2).contiguous(), weights

    return attend


def attends(**parts: Any) -> Make:
    """Another attention."""
    return lambda model, prompt, put: put(modeling, "eager_attention_forward", attention(**parts))


def of_attention(name: str, value: Callable[[Any], Any]) -> Make:
    """Another number in every attention module."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        for layer in model.model.layers:
            put(layer.self_attn, name, value(model.config))

    return make


def first_key_uncapped(scores: Tensor, cap: float, mask: Tensor) -> Tensor:
    bent = capped(scores, cap)
    seen = (mask == 0).to(torch.int64)
    first = (seen == 1) & (seen.cumsum(-1) == 1)
    return torch.where(first, scores, bent) * 1.0  # the last multiplication is what a capture takes for the result


def prefill_uncapped(scores: Tensor, cap: float, mask: Tensor) -> Tensor:
    queries, keys = scores.shape[-2:]
    return (scores if queries == keys else capped(scores, cap)) * 1.0  # only in the first call there are no other keys


def step_uncapped(scores: Tensor, cap: float, mask: Tensor) -> Tensor:
    queries, keys = scores.shape[-2:]
    return (scores if queries == 1 < keys else capped(scores, cap)) * 1.0


def cap_before_scale(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3)) * scale


def bent_then_scaled(scores: Tensor, cap: float, mask: Tensor) -> Tensor:
    scale = 13**-0.5  # of the conformance checkpoint
    return torch.tanh((scores / scale) / cap) * cap * scale


def cap_in_half(x: Tensor, cap: float, mask: Tensor | None = None) -> Tensor:
    return capped(x.to(HALF), cap).to(x.dtype)


def cache_in(dtype: torch.dtype) -> Make:
    """Keys and values as a cache of another precision gives them back."""

    def kept(x: Tensor) -> Tensor:
        return x.to(dtype).to(x.dtype)

    return attends(score=lambda q, k, scale: torch.matmul(q, kept(k).transpose(2, 3)) * scale, value=kept)


def half(x: Tensor) -> Tensor:
    """Through float16 and back."""
    return x.to(torch.float16).to(x.dtype)


def score_in_f16(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.matmul(half(q), half(k).transpose(2, 3)) * scale


def weigh_in_f16(weights: Tensor, values: Tensor) -> Tensor:
    return torch.matmul(half(weights), half(values))


def flash_in_f16(weights: Tensor, values: Tensor) -> Tensor:
    """llama.cpp's loop over the keys of a query: the sum is float16, and is scaled whenever a larger score comes."""
    logs, v = weights.double().log(), half(values)
    best = torch.full_like(logs[..., :1], -torch.inf)
    total, size = torch.zeros(*weights.shape[:-1], v.shape[-1], dtype=torch.float16), torch.zeros_like(best)
    for key in range(weights.shape[-1]):
        score = logs[..., key : key + 1]
        more = score > best
        if more.any():
            shrink = torch.where(more & best.isfinite(), (best - score).exp(), torch.where(more, 0.0, 1.0))
            total = torch.where(more, (total.double() * shrink).half(), total)
            size, best = size * shrink, torch.where(more, score, best)
        part = torch.where(score.isfinite(), (score - best).exp(), 0.0)
        added = (total.double() + part * v[..., key : key + 1, :].double()).half()
        total, size = torch.where(part > 0, added, total), size + part
    return (total.double() / size).to(values.dtype)


def key_heads(choose: Callable[[int, int, int], int]) -> Make:
    """Another key head for each query head, from its number, that of its key head and how many key heads there are."""

    def repeat(x: Tensor, groups: int) -> Tensor:
        heads, count = x.shape[1] * groups, x.shape[1]
        return torch.stack([x[:, choose(h, h // groups, count)] for h in range(heads)], dim=1)

    return lambda model, prompt, put: put(modeling, "repeat_kv", repeat)


def both(*makes: Make) -> Make:
    """Several at once."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        for one in makes:
            one(model, prompt, put)

    return make


def in_half(*classes: type[torch.nn.Module] | str) -> Make:
    """Modules whose inputs are cast to bfloat16, and whose results are cast back, by class or by name in a layer."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        chosen = tuple(c for c in classes if isinstance(c, type))
        for name, module in model.named_modules():
            if isinstance(module, chosen) or name.rpartition(".")[2] in classes:
                put(module, "forward", _in_half(module, module.forward))

    return make


def _in_half(module: torch.nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:
        kept = {name: p.data for name, p in module.named_parameters()}
        for p in module.parameters():
            p.data = p.data.to(HALF)
        try:
            return forward(x.to(HALF)).to(x.dtype)
        finally:
            for name, p in module.named_parameters():
                p.data = kept[name]

    return run


def attention_in_half(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
    """As an attention that computes in bfloat16 only is called from a float32 model."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **named: Any) -> Any:
        hidden = mask.clamp(min=torch.finfo(HALF).min).to(HALF)  # minus infinity would make rows of padding NaN
        output, weights = attention()(module, q.to(HALF), k.to(HALF), v.to(HALF), hidden, **named)
        return output.to(q.dtype), weights.to(q.dtype)

    put(modeling, "eager_attention_forward", attend)


def weight_of(to: str, at: str) -> Make:
    """A weight of another module of the model."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        put(model.model.get_submodule(to).weight, "data", model.model.get_submodule(at).weight.data.clone())

    return make


# --- logits, norms, blocks --------------------------------------------------------------------------------------------


def logits_by(function: Callable[[Tensor, float], Tensor]) -> Make:
    """What is done to the raw logits instead of the cap."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        cap, forward = model.config.final_logit_softcapping, model.forward

        def wrong(*args: Any, **named: Any) -> Any:
            result = forward(*args, **named)
            result.logits = function(result.logits, cap)
            return result

        put(model.config, "final_logit_softcapping", None)
        put(model, "forward", wrong)

    return make


def norms_by(function: Callable[[Any, Tensor], Tensor]) -> Make:
    """Another norm, everywhere."""
    return lambda model, prompt, put: put(modeling.Gemma2RMSNorm, "forward", function)


def of_norms(name: str, value: float) -> Make:
    """Another number in every norm."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        for module in model.modules():
            if isinstance(module, modeling.Gemma2RMSNorm):
                put(module, name, value)

    return make


def normed(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def layers_by(function: Callable[..., Tensor]) -> Make:
    """Another wiring of the block; `function` gets the layer, the residual stream and attention as a function."""

    def forward(self: Any, hidden_states: Tensor, **named: Any) -> Tensor:
        return function(self, hidden_states, lambda x: self.self_attn(hidden_states=x, **named)[0])

    return lambda model, prompt, put: put(modeling.Gemma2DecoderLayer, "forward", forward)


def weight_in(dtype: torch.dtype) -> Make:
    """``1 + w`` as another precision has it."""
    return norms_by(
        lambda self, x: (normed(self, x.float()) * (1.0 + self.weight.float()).to(dtype).float()).type_as(x)
    )


def hidden_capped(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
    norm, cap = model.model.norm.forward, model.config.final_logit_softcapping
    put(model.model.norm, "forward", lambda x: capped(norm(x), cap))


def after_residual(layer: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    h = layer.post_attention_layernorm(h + attend(layer.input_layernorm(h)))
    return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))


def llama_block(layer: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    h = h + attend(layer.input_layernorm(h))
    return h + layer.mlp(layer.post_attention_layernorm(h))


def no_post_norms(layer: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    h = h + attend(layer.input_layernorm(h))
    return h + layer.mlp(layer.pre_feedforward_layernorm(h))


def no_post_feed_forward_norm(layer: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    h = h + layer.post_attention_layernorm(attend(layer.input_layernorm(h)))
    return h + layer.mlp(layer.pre_feedforward_layernorm(h))


def no_pre_feed_forward_norm(layer: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    h = h + layer.post_attention_layernorm(attend(layer.input_layernorm(h)))
    return h + layer.post_feedforward_layernorm(layer.mlp(h))


def sums_unrounded(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
    """A kernel that adds and normalises: the norm of the float32 sum, which is rounded only when stored."""
    kept: list[tuple[Tensor, Tensor]] = []  # the last sum, as stored and in float32
    norm = modeling.Gemma2RMSNorm.forward

    def add(x: Tensor, residual: Tensor) -> Tensor:
        exact = x.float() + residual.float()
        kept[:] = [(exact.to(x.dtype), exact)]
        return kept[0][0]

    def after_sum(self: Any, x: Tensor) -> Tensor:
        if not kept or kept[0][0] is not x:
            return norm(self, x)
        return (normed(self, kept[0][1]) * (1.0 + self.weight.float())).to(x.dtype)

    def block(layer: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        h = add(layer.post_attention_layernorm(attend(layer.input_layernorm(h))), h)
        return add(layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h))), h)

    put(modeling.Gemma2RMSNorm, "forward", after_sum)
    layers_by(block)(model, prompt, put)


def weights_by(change: Callable[[Any, Any], None]) -> Make:
    """Other weights in every layer."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        for layer in model.model.layers:
            change(layer, put)

    return make


def exporter_norms(layer: Any, put: Put) -> None:
    weight = layer.pre_feedforward_layernorm.weight.data
    put(layer.post_attention_layernorm.weight, "data", weight.clone())
    put(layer.pre_feedforward_layernorm.weight, "data", torch.zeros_like(weight))


def swapped(layer: Any, put: Put) -> None:
    gate, up = layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data
    put(layer.mlp.gate_proj.weight, "data", up)
    put(layer.mlp.up_proj.weight, "data", gate)


def reshaped(layer: Any, put: Put) -> None:
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        rows, columns = linear.weight.shape
        put(linear.weight, "data", linear.weight.data.reshape(columns, rows).T.contiguous())


def permuted(layer: Any, put: Put) -> None:
    attend = layer.self_attn
    for linear in (attend.q_proj, attend.k_proj):
        w = linear.weight.data
        rows = w.view(-1, 2, attend.head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        put(linear.weight, "data", rows.contiguous())


def activation(module: Callable[[], torch.nn.Module]) -> Make:
    return weights_by(lambda layer, put: put(layer.mlp, "act_fn", module()))


class QuickGelu(torch.nn.Module):
    """With a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TableGelu(torch.nn.Module):
    """Looked up in float16, as ggml does."""

    def forward(self, x: Tensor) -> Tensor:
        half = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros_like(x), half))


def activated_up(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


# --- embedding, positions, masks --------------------------------------------------------------------------------------


def embedding_by(function: Callable[[Any, Tensor], Tensor]) -> Make:
    """Another scaling of the rows."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        table = model.model.embed_tokens
        put(table, "forward", lambda ids: function(table, torch.nn.functional.embedding(ids, table.weight)))

    return make


def scale_in_decimals(n: int) -> Make:
    """sqrt(hidden) as it is written out."""
    return embedding_by(lambda table, x: (x.float() * float(f"{x.shape[-1] ** 0.5:.{n}f}")).to(x.dtype))


def turned_by(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Make:
    """Another rotation."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> Any:
        return tuple(function(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))

    return lambda model, prompt, put: put(modeling, "apply_rotary_pos_emb", rotate)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b, c, s = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)


def clobbered(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, half = x.clone(), x.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    x[..., :half] = x[..., :half] * c - x[..., half:] * s
    x[..., half:] = x[..., half:] * c + x[..., :half] * s
    return x


def tables_by(angles: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """Rotary tables of other angles, from positions and inverse frequencies."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        rotary = model.model.rotary_emb

        def forward(x: Tensor, position_ids: Tensor) -> Any:
            half = angles(position_ids[:, :, None].float(), rotary.inv_freq).float()
            both = torch.cat((half, half), dim=-1)
            return both.cos().to(x.dtype), both.sin().to(x.dtype)

        put(rotary, "forward", forward)

    return make


def tf32(x: Tensor) -> Tensor:
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def frequencies_in(dtype: torch.dtype) -> Make:
    """As ``model.to(dtype)`` leaves the buffer."""
    return lambda model, prompt, put: put(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.to(dtype))


def turned_in_part(own: bool) -> Make:
    """Half of each head is turned: alone, as Phi and GLM do it, or half of the whole head's pairs, as Gemma 4."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        rotary, places = model.model.rotary_emb, [torch.zeros(0)]
        forward = rotary.forward

        def remember(x: Tensor, position_ids: Tensor) -> Any:
            places[0] = position_ids
            return forward(x, position_ids)

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            d = x.shape[-1]
            part = 2 * (d // 4)
            if not own:
                keep = torch.arange(d) % (d // 2) >= part // 2
                return torch.where(keep, x, x * cos + modeling.rotate_half(x) * sin)
            inverse = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, part, 2).float() / part)
            angles = places[0][:, None, :, None].float() * torch.cat((inverse, inverse))
            c, s = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            first = x[..., :part]
            return torch.cat((first * c + modeling.rotate_half(first) * s, x[..., part:]), dim=-1)

        put(rotary, "forward", remember)
        turned_by(rotate)(model, prompt, put)

    return make


def theta(value: float) -> Make:
    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        rotary, d = model.model.rotary_emb, model.config.head_dim
        put(rotary, "inv_freq", 1.0 / value ** (torch.arange(0, d, 2, dtype=torch.float32) / d))

    return make


def positions_by(rule: Callable[[Any, Prompt], np.ndarray]) -> Make:
    """Other positions; `rule` gives those of all tokens, and each call takes its own."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        all_positions, rotary, done = torch.as_tensor(rule(model.config, prompt)), model.model.rotary_emb, [0]
        forward = rotary.forward

        def wrong(x: Tensor, position_ids: Tensor) -> Any:
            start, done[0] = done[0], done[0] + x.shape[1]
            return forward(x, all_positions[:, start : done[0]])

        put(rotary, "forward", wrong)

    return make


def from_one(config: Any, prompt: Prompt) -> np.ndarray:
    return np.arange(1, prompt.input_ids.shape[1] + 1)[None]


def pads_not_counted(config: Any, prompt: Prompt) -> np.ndarray:
    return np.asarray(np.maximum(prompt.attention_mask.cumsum(1) - 1, 0))


def restarted(config: Any, prompt: Prompt) -> np.ndarray:
    return np.concatenate([np.arange(n) for n in prompt.calls])[None]


def stopped_at_window(config: Any, prompt: Prompt) -> np.ndarray:
    parts, done = [], 0
    for n in prompt.calls:
        parts.append(min(done, config.sliding_window - 1) + np.arange(n))
        done += n
    return np.asarray(np.concatenate(parts)[None])


def masked_by(rule: Callable[..., Tensor], full_cache: bool = False) -> Make:
    """Another mask, and, with `full_cache`, a cache that keeps all keys in layers that slide. `rule` gets the places of
    queries and keys, whether the layer slides, its number, the window and how many queries there are, and says what may
    be seen; padding stays hidden."""

    def make(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
        window = model.config.sliding_window
        done: dict[int, int] = {}  # tokens of the calls so far, by layer
        visible = torch.as_tensor(prompt.attention_mask).bool()
        kinds = model.config.layer_types

        def mask_of(module: Any, queries: int, keys: int, mask: Tensor) -> Tensor:
            number = module.layer_idx
            end = done[number] = done.get(number, 0) + queries
            q = torch.arange(end - queries, end)[:, None]
            # The cache of a layer that slides no longer has the first keys; eager attention is given those it has.
            k = torch.arange(end - keys, end)[None, :]
            seen = rule(q, k, kinds[number] == "sliding_attention", number, window, queries)
            hidden = visible if getattr(rule, "hides_padding", True) else torch.ones_like(visible)
            return seen & hidden[:, None, None, end - keys : end]

        put(modeling, "eager_attention_forward", attention(mask_of=mask_of))
        if full_cache:
            put(model.config, "layer_types", ["full_attention"] * len(kinds))

    return make


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def window_of(size: Callable[[int], int] = lambda w: w, slides: Callable[[bool, int], bool] = lambda s, n: s) -> Make:
    """Other windows, or other layers that have one."""

    def rule(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
        return causal(q, k) & (k > q - size(window)) if slides(sliding, number) else causal(q, k)

    return masked_by(rule)


def usual(q: Tensor, k: Tensor, sliding: bool, window: int) -> Tensor:
    return causal(q, k) & (k > q - window) if sliding else causal(q, k)


def two_sided(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return (q - k).abs() < window if sliding else causal(q, k)


def not_causal(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return k > q - window if sliding else (k == k) & (q == q)


def without_self(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return usual(q, k, sliding, window) & ((k != q) | (q == 0))


def pads_seen(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return usual(q, k, sliding, window)


pads_seen.hides_padding = False  # type: ignore[attr-defined]


def one_dropped(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    kept = k >= q[0] - (window - 2) if sliding else k == k
    return usual(q, k, sliding, window) & kept


def ring_overwritten(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    kept = (k > q[-1] - window) | (k == q) if sliding else k == k
    return usual(q, k, sliding, window) & kept


def chunk_sees_all(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    if sliding and int(q[0]) > 0:
        return causal(q, k) & (k > q[0] - window)
    return usual(q, k, sliding, window)


def window_from_call(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    """torchtune's triu and tril of a mask that has only the rows of the call."""
    whole = torch.ones(queries, k.shape[1])
    near = torch.triu(whole, -window + 1) * torch.tril(whole, window - 1)
    return causal(q, k) & (near == 1) if sliding else causal(q, k)


def window_skips_pads(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
    """Tunix's window: positions without padding, compared with places in the row."""
    positions = (torch.as_tensor(prompt.attention_mask).cumsum(-1) - 1).clamp(min=0)

    def rule(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
        at = positions[:, None, q[:, 0], None]
        near = (k >= at - window + 1) & (k <= at + window - 1)
        return causal(q, k) & near if sliding else causal(q, k)

    masked_by(rule)(model, prompt, put)


def static_cache(model: Gemma2ForCausalLM, prompt: Prompt, put: Put) -> None:
    """transformers 4.48's HybridCache: its `_sliding_update` moves the numbers of the keys here, not the keys."""
    window, kinds = model.config.sliding_window, model.config.layer_types
    cache = {n: torch.full((window,), -1) for n, kind in enumerate(kinds) if kind == "sliding_attention"}
    done: dict[int, int] = {}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None,
               **_: Any) -> Any:  # fmt: skip
        number, queries = module.layer_idx, q.shape[2]
        start = done.get(number, 0)
        end = done[number] = start + queries
        places = torch.arange(start, end)
        rows = torch.arange(end)[None] <= places[:, None]
        empty = torch.zeros(queries, window, dtype=torch.bool)
        if number in cache and len(prompt.calls) > 1:
            if queries > window:
                held, cache[number] = places, places[-window:]
            else:
                slots = places.clamp(0, window - 1)
                shift = int(slots[-1] >= window - 1)
                held = cache[number][(torch.ones(window, dtype=torch.long).cumsum(0) + shift - 1) % window]
                for slot, place in zip(slots, places, strict=True):
                    held[slot] = place
                cache[number] = held
            wide = torch.where(torch.ones(queries, end, dtype=torch.bool).tril(-window), False, rows)
            size = max(queries, window)
            seen = wide[:, max(0, end - size) :][:, : len(held)]
            seen = torch.nn.functional.pad(seen, (0, len(held) - seen.shape[1]))
            rows = torch.zeros(queries, end, dtype=torch.bool)
            for column, place in enumerate(held.tolist()):
                if place >= 0:
                    rows[:, place] |= seen[:, column]
                elif place == -1:
                    empty[:, column] = seen[:, column]
        keys = modeling.repeat_kv(k, module.num_key_value_groups)
        scores = capped(torch.matmul(q, keys.transpose(2, 3)) * scaling, softcap)
        both = torch.cat([scores, torch.zeros(*scores.shape[:-1], window, dtype=scores.dtype)], -1)
        both = both.masked_fill(~torch.cat([rows, empty], -1), torch.finfo(q.dtype).min)
        weights = torch.nn.functional.softmax(both, dim=-1, dtype=torch.float32).to(q.dtype)
        values = modeling.repeat_kv(v, module.num_key_value_groups)
        return torch.matmul(weights[..., :end], values).transpose(1, 2).contiguous(), weights[..., :end]

    put(modeling, "eager_attention_forward", attend)
    put(model.config, "layer_types", ["full_attention"] * len(kinds))


def prefill_unmasked(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return (q >= 0) & (k >= 0) if int(q[0]) == 0 else usual(q, k, sliding, window)


prefill_unmasked.hides_padding = False  # type: ignore[attr-defined]


def chunk_unmasked(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return (q >= 0) & (k >= 0) if int(q[0]) > 0 and queries > 1 else usual(q, k, sliding, window)


def step_unmasked(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return (q >= 0) & (k >= 0) if int(q[0]) > 0 and queries == 1 else usual(q, k, sliding, window)


def prefill_without_window(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    return usual(q, k, sliding and int(q[0]) > 0, window)


def aligned_to_start(q: Tensor, k: Tensor, sliding: bool, number: int, window: int, queries: int) -> Tensor:
    """torch's ``is_causal=True``: upper left."""
    return usual(q, k, sliding, window) if sliding else torch.ones(queries, k.shape[1]).tril().bool()


# --- the list ---------------------------------------------------------------------------------------------------------

MAKE: dict[str, Make] = {
    "attn-softcap-missing": of_attention("attn_logit_softcapping", lambda c: None),
    "attn-softcap-after-mask": attends(order="mask, cap"),
    "attn-softcap-skips-first-key": attends(cap=first_key_uncapped),
    "attn-softcap-missing-in-prefill": attends(cap=prefill_uncapped),
    "attn-softcap-missing-in-decode": attends(cap=step_uncapped),
    "attn-softcap-x-tanh": attends(cap=lambda s, cap, mask: s * torch.tanh(s / cap) * 1.0),
    "attn-softcap-subtracts-max": attends(cap=lambda s, cap, mask: capped(s - s.amax(-1, keepdim=True), cap)),
    "attn-softcap-final-cap": of_attention("attn_logit_softcapping", lambda c: c.final_logit_softcapping),
    "attn-softcap-twice": attends(cap=lambda s, cap, mask: capped(capped(s, cap), cap)),
    "attn-softcap-clip": attends(cap=lambda s, cap, mask: s.clamp(-cap, cap) * 1.0),
    "attn-softcap-unmultiplied": attends(cap=lambda s, cap, mask: torch.tanh(s / cap) * 1.0),
    "attn-softcap-on-output": attends(cap=lambda s, cap, mask: s * 1.0, mixed=capped),
    "softcaps-exchanged": both(
        of_attention("attn_logit_softcapping", lambda c: 2.0), logits_by(lambda x, cap: capped(x, 3.0))),
    "attn-softcap-before-scale": attends(cap=bent_then_scaled),
    "attn-softcap-in-bf16": attends(cap=cap_in_half),
    "final-softcap-missing": logits_by(lambda x, cap: x),
    "final-softcap-attn-cap": logits_by(lambda x, cap: capped(x, 3.0)),
    "final-softcap-twice": logits_by(lambda x, cap: capped(capped(x, cap), cap)),
    "final-softcap-clip": logits_by(lambda x, cap: x.clamp(-cap, cap)),
    "final-softcap-unmultiplied": logits_by(lambda x, cap: torch.tanh(x / cap)),
    "final-softcap-on-hidden": both(hidden_capped, logits_by(lambda x, cap: x)),
    "final-softcap-x-tanh": logits_by(lambda x, cap: x * torch.tanh(x / cap)),
    "final-softcap-subtracts-max": logits_by(lambda x, cap: capped(x - x.amax(-1, keepdim=True), cap)),
    "final-softcap-in-bf16": logits_by(lambda x, cap: cap_in_half(x, cap)),
    "scale-head-dim": of_attention("scaling", lambda c: c.head_dim**-0.5),
    "scale-224": of_attention("scaling", lambda c: 224**-0.5),
    "scale-256": of_attention("scaling", lambda c: 256**-0.5),
    "scale-hidden-over-heads": of_attention("scaling", lambda c: (c.hidden_size / c.num_attention_heads) ** -0.5),
    "scale-missing": of_attention("scaling", lambda c: 1.0),
    "q-prescale-order": attends(score=lambda q, k, scale: torch.matmul(q * scale, k.transpose(2, 3))),
    "kv-cache-in-bf16": cache_in(HALF),
    "attention-products-in-f16": attends(score=score_in_f16, weigh=weigh_in_f16),
    "attention-flash-in-f16": attends(score=score_in_f16, weigh=flash_in_f16),
    "kv-cache-in-f16": cache_in(torch.float16),
    "kv-head-of-first": key_heads(lambda head, own, count: 0),
    "kv-head-of-next-shard": key_heads(lambda head, own, count: (own + 1) % count),
    "kv-head-of-first-shard": key_heads(
        lambda head, own, count: own if own < (count + 1) // 2 else own - (count + 1) // 2),
    "gqa-tile": lambda model, prompt, put: put(modeling, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1)),
    "norm-without-one": norms_by(lambda self, x: (normed(self, x.float()) * self.weight.float()).type_as(x)),
    "norm-two-plus": norms_by(lambda self, x: (normed(self, x.float()) * (2.0 + self.weight.float())).type_as(x)),
    "final-norm-without-one": lambda model, prompt, put: put(
        model.model.norm, "forward",
        lambda x: (normed(model.model.norm, x.float()) * model.model.norm.weight.float()).type_as(x)),
    "norm-eps-1e-5": of_norms("eps", 1e-5),
    "norm-eps-outside-root": norms_by(
        lambda self, x: (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
                         * (1.0 + self.weight.float())).type_as(x)),
    "norm-subtracts-mean": norms_by(
        lambda self, x: (normed(self, x.float() - x.float().mean(-1, keepdim=True))
                         * (1.0 + self.weight.float())).type_as(x)),
    "norm-cast-order-llama": norms_by(lambda self, x: normed(self, x.float()).type_as(x) * (1.0 + self.weight)),
    "norm-in-half": norms_by(
        lambda self, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)),
    "norm-of-unrounded-sum": sums_unrounded,
    "norm-weight-in-half": norms_by(lambda self, x: (normed(self, x.float()) * (1.0 + self.weight).float()).type_as(x)),
    "norm-weight-in-bf16": weight_in(HALF),
    "norm-weight-in-f16": weight_in(torch.float16),
    "post-attn-norm-after-residual": layers_by(after_residual),
    "llama-block": layers_by(llama_block),
    "post-norms-missing": layers_by(no_post_norms),
    "post-ffw-norm-missing": layers_by(no_post_feed_forward_norm),
    "pre-ffw-norm-missing": layers_by(no_pre_feed_forward_norm),
    "exporter-norms": weights_by(exporter_norms),
    "final-norm-missing": lambda model, prompt, put: put(model.model.norm, "forward", lambda x: x * 1),
    "embed-scale-missing": embedding_by(lambda table, x: x),
    "embed-scale-twice": embedding_by(
        lambda table, x: (x.float() * table.embed_scale.to(x.dtype).float() ** 2).to(x.dtype)),
    "embed-scale-not-rounded": embedding_by(lambda table, x: (x.float() * math.sqrt(x.shape[-1])).to(x.dtype)),
    "embed-scale-in-bf16": embedding_by(
        lambda table, x: (x.float() * torch.tensor(math.sqrt(x.shape[-1])).to(HALF).float()).to(x.dtype)),
    **{f"embed-scale-in-{n}-decimals": scale_in_decimals(n) for n in (1, 2, 3, 4)},
    "logits-in-bf16": lambda model, prompt, put: put(
        model.lm_head, "forward",
        lambda x: torch.nn.functional.linear(x, model.lm_head.weight).to(HALF).to(x.dtype)),
    "gelu-exact": activation(torch.nn.GELU),
    "gelu-f16-table": activation(TableGelu),
    "gelu-sigmoid": activation(QuickGelu),
    "silu-instead-of-gelu": activation(torch.nn.SiLU),
    "relu-instead-of-gelu": activation(torch.nn.ReLU),
    "gate-up-swapped": weights_by(swapped),
    "activation-on-up": lambda model, prompt, put: put(modeling.Gemma2MLP, "forward", activated_up),
    "gating-reshape-not-transpose": weights_by(reshaped),
    "rope-interleaved": turned_by(neighbours),
    "rope-clobbered-input": turned_by(clobbered),
    "rope-missing": turned_by(lambda x, cos, sin: x),
    "rope-turned-back": turned_by(lambda x, cos, sin: x * cos - modeling.rotate_half(x) * sin),
    "rope-bf16-angles": tables_by(lambda pos, inv: pos.to(HALF) * inv.to(HALF)),
    "rope-frequencies-in-bf16": frequencies_in(HALF),
    "rope-tf32-angles": tables_by(lambda pos, inv: tf32(pos) * tf32(inv)),
    "rope-partial": turned_in_part(own=True),
    "rope-partial-proportional": turned_in_part(own=False),
    "rope-theta-1e6": theta(1e6),
    "rope-theta-160000": theta(160000.0),
    "rope-positions-skip-pads": positions_by(pads_not_counted),
    "rope-position-from-1": positions_by(from_one),
    "rope-weights-permuted": weights_by(permuted),
    "swa-layer-parity-swapped": window_of(slides=lambda sliding, n: not sliding),
    "swa-all-global": window_of(slides=lambda sliding, n: False),
    "swa-all-local": window_of(slides=lambda sliding, n: True),
    "swa-first-layer-global": window_of(slides=lambda sliding, n: sliding and n > 0),
    "swa-window-plus-one": window_of(lambda w: w + 1),
    "swa-window-minus-one": window_of(lambda w: w - 1),
    "swa-window-halved": window_of(lambda w: w // 2),
    "swa-window-from-call": masked_by(window_from_call, full_cache=True),
    "swa-window-skips-pads": window_skips_pads,
    "swa-two-sided": masked_by(two_sided),
    "mask-not-causal": masked_by(not_causal),
    "mask-added-as-bool": attends(hide=lambda scores, mask: scores + (mask == 0)),
    "mask-missing-in-prefill": masked_by(prefill_unmasked),
    "mask-missing-in-chunk": masked_by(chunk_unmasked, full_cache=True),
    "mask-missing-in-decode": masked_by(step_unmasked, full_cache=True),
    "prefill-without-window": masked_by(prefill_without_window),
    "decode-without-window": masked_by(
        lambda q, k, sliding, number, window, queries: usual(
            q, k, sliding and not (queries == 1 and int(q[0]) > 0), window), full_cache=True),
    "mask-aligned-to-start": masked_by(aligned_to_start),
    "mask-without-self": masked_by(without_self),
    "pad-attended": masked_by(pads_seen),
    "cache-drops-one-key": masked_by(one_dropped),
    "cache-static-shifts-early": static_cache,
    "chunked-prefill-ring-overwritten": masked_by(ring_overwritten),
    "chunk-without-window": masked_by(chunk_sees_all),
    "cache-length-from-layer-0": positions_by(stopped_at_window),
    "positions-restart": positions_by(restarted),
    # of families: some of many
    "attention-in-bf16": attention_in_half,
    "projections-in-bf16": in_half("q_proj", "k_proj", "v_proj"),
    "norms-in-bf16": in_half(modeling.Gemma2RMSNorm),
    "feed_forward.out-in-bf16": in_half("down_proj"),
    **{f"weights-of-another: {at} instead of {to}": weight_of(to, at) for to, at in (
        ("layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj"),
        ("layers.2.self_attn.v_proj", "layers.2.self_attn.k_proj"),
        ("layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj"),
        ("layers.3.self_attn.o_proj", "layers.0.self_attn.o_proj"),
        ("layers.1.mlp.up_proj", "layers.2.mlp.up_proj"),
        ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj"),
        ("layers.1.post_attention_layernorm", "layers.1.pre_feedforward_layernorm"),
        ("layers.2.input_layernorm", "layers.3.input_layernorm"),
        ("norm", "layers.3.post_feedforward_layernorm"))},
}  # fmt: skip

CACHED = (
    "cache-drops-one-key", "chunked-prefill-ring-overwritten", "chunk-without-window", "cache-length-from-layer-0",
    "positions-restart", "mask-missing-in-chunk", "mask-missing-in-decode", "decode-without-window",
    "mask-aligned-to-start", "prefill-without-window", "swa-window-from-call", "cache-static-shifts-early",
    "attn-softcap-missing-in-prefill", "attn-softcap-missing-in-decode",
)  # fmt: skip

# What a port writes down: all, one tensor a step of the block, or only what comes out.
BLOCK = ("embedded", "norm", "logits", *(f"layers.*.{name}" for name in (
    "input_layernorm", "attention.out", "middle", "pre_feedforward_layernorm", "feed_forward.out", "out")))  # fmt: skip
DENSITIES: dict[str, tuple[str, ...] | None] = {"full": None, "block": BLOCK, "logits": ("logits",)}


@contextmanager
def made(name: str, model: Gemma2ForCausalLM, prompt: Prompt) -> Iterator[None]:
    """Inside, the mistake is made."""
    undo: list[Callable[[], None]] = []

    def put(owner: Any, attribute: str, value: Any) -> None:
        own = vars(owner) if hasattr(owner, "__dict__") else {}
        had = getattr(owner, attribute, None)
        inside = attribute in own or isinstance(owner, type | torch.Tensor) or not callable(value)
        if isinstance(had, torch.nn.Module) or inside:
            undo.append(lambda: setattr(owner, attribute, had))
        else:
            undo.append(lambda: delattr(owner, attribute))
        setattr(owner, attribute, value)

    try:
        MAKE[name](model, prompt, put)
        yield
    finally:
        for step in reversed(undo):
            step()


@dataclass(frozen=True)
class Outcome:
    """What check said of one wrong port."""

    name: str
    dtype: str
    density: str
    showable: bool  # whether the honest port's trace excludes the mistake, so that this one has to be found
    detected: bool
    first: bool  # whether the first tensor is the catalogue's
    named: int  # how many names were listed, if the right one is among them; else 0
    said: str


def port(name: str | None, dtype: str, prompt: Prompt, folder: Path, config: Any) -> Any:
    """The trace of transformers with a mistake in it, or without."""
    torch_dtype = getattr(torch, dtype)
    model = Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), dtype=torch_dtype, attn_implementation="eager"
    ).eval()
    calls = prompt.calls
    if name is None:
        tensors, about = capture_transformers(model, prompt.input_ids, prompt.attention_mask, calls)
    else:
        with made(name, model, prompt):
            tensors, about = capture_transformers(model, prompt.input_ids, prompt.attention_mask, calls)
    save_trace(tensors.items(), folder / "port.safetensors", about)
    return load_trace(folder / "port.safetensors", config)


def reports_of(candidate: Any, ours: Pretrained) -> dict[str, Report]:
    """What check says of the whole trace and of parts of it."""
    parts = {d: candidate if names is None else only(candidate, names) for d, names in DENSITIES.items()}
    return {density: diagnose(part, ours.weights, ours.config) for density, part in parts.items()}


def outcomes(dtype: str, names: list[str]) -> Iterator[Outcome]:
    """Every mistake in one precision."""
    ours = load("conformance", dtype)
    known = prompts(ours.config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        honest = {p: reports_of(port(None, dtype, known[p], folder, ours.config), ours) for p in ("padded", "cached")}
        for reports in honest.values():
            for density, report in reports.items():
                assert report.verdict == CONFORMS, (dtype, density, report.findings, report.verdict)
        whole = honest["padded"]["full"].candidate
        context = Engine(whole, ours.weights, ours.config).context
        bug_of = {v.name: v for v in (*KNOWN_BUGS, *list_families(context))}
        for name in tqdm(names, desc=dtype, disable=None):
            which = "cached" if name in CACHED else "padded"
            found = reports_of(port(name, dtype, known[which], folder, ours.config), ours)
            for density, report in found.items():
                bug = bug_of[name]
                yield _outcome(bug, dtype, density, shows(bug, honest[which][density], ours), report)


def shows(bug: KnownBug, honest: Report, ours: Pretrained) -> bool:
    """Whether an honest port's trace excludes a bug. Of families that is asked here: no report lists them."""
    if bug in KNOWN_BUGS:
        return bug.name in {v.name for v in honest.excluded}
    return Diagnosis(Engine(honest.candidate, ours.weights, ours.config)).is_consistent(bug) is False


def _outcome(bug: KnownBug, dtype: str, density: str, showable: bool, report: Report) -> Outcome:
    name, first = bug.name, report.first_divergence
    explained = [v.name for v in report.findings[0].explanations] if report.findings else []
    at = field_of(first.tensor) if first else ""
    # A tensor that a port does not compute cannot be recorded: the wrong one is then the next.
    said = f"{report.verdict} {first.tensor if first else ''} {report.findings[0].named if report.findings else ''}"
    named = len(explained) if name in explained else 0
    span = bool(first and bug.fields[0] in {field_of(b) for b in (*first.between, first.tensor)})
    return Outcome(name, dtype, density, showable, report.verdict != CONFORMS, at == bug.fields[0] or span,
                   named, said.strip())  # fmt: skip


def table(found: list[Outcome]) -> str:
    """The matrix, in Markdown."""
    columns = [(d, density) for d in ("float32", "bfloat16") for density in DENSITIES]
    short = {"float32": "f32", "bfloat16": "bf16"}
    lines = ["| mistake | " + " | ".join(f"{short[d]} {density}" for d, density in columns) + " |",
             "|---|" + "---|" * len(columns)]  # fmt: skip
    cells = {(o.name, o.dtype, o.density): o for o in found}
    for name in MAKE:
        row = [_cell(cells[name, d, density]) for d, density in columns if (name, d, density) in cells]
        if row:
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(o: Outcome) -> str:
    if not o.showable:
        return "found" if o.detected else "blind"
    if not o.detected:
        return "**missed**"
    return {0: "unnamed", 1: "named"}.get(o.named, f"1 of {o.named}")


def rates(found: list[Outcome]) -> str:
    """Detection, first tensor and naming of what each density can show, in Markdown."""
    lines = ["| precision, trace | can be shown | detected | first tensor right | named, at most two names |",
             "|---|---|---|---|---|"]  # fmt: skip
    for (dtype, density), _ in Counter((o.dtype, o.density) for o in found).items():
        some = [o for o in found if (o.dtype, o.density) == (dtype, density) and o.showable]
        counts = [sum(o.detected for o in some), sum(o.first for o in some), sum(o.named in (1, 2) for o in some)]
        detect = " | ".join(f"{n} ({n / max(1, len(some)):.0%})" for n in counts)
        lines.append(f"| {dtype}, {density} | {len(some)} | {detect} |")
    return "\n".join(lines)


BEGIN, END = "<!-- python golden/mistakes.py --write -->", "<!-- end -->"


def write(found: list[Outcome], path: Path) -> None:
    """Put the tables into the page, between its marks: of the catalogue, and of the families of known bugs."""
    catalogue = {v.name for v in KNOWN_BUGS}
    known, families = ([o for o in found if (o.name in catalogue) is wanted] for wanted in (True, False))
    made = f"{rates(known)}\n\n{table(known)}\n\nSome members of the families:\n\n{table(families)}"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mistakes to make (default: all)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--write", action="store_true", help="write the tables into docs/oracle.md")
    args = parser.parse_args()
    names = args.names or list(MAKE)
    found = [o for dtype in args.dtype or ("float32", "bfloat16") for o in outcomes(dtype, names)]
    for o in found:
        if not (o.showable and o.detected and o.first and o.named in (1, 2)):
            print(f"{o.name:34s} {o.dtype:9s} {o.density:7s} {'can be shown' if o.showable else 'blind':13s} {o.said}")
    print(rates(found))
    missing = {v.name for v in KNOWN_BUGS if v.change is not None} - set(MAKE)
    print(f"not made in transformers: {', '.join(sorted(missing))}")
    if args.write:
        write(found, Path(__file__).parents[1] / "docs" / "oracle.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
