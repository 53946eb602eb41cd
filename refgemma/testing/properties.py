"""Define laws that hold for every Gemma 2 with any weights; each is a function of a backend and needs no recording.

Checked on refgemma itself.

Most laws relate the logits of two models or two inputs, so they apply to an implementation that returns only logits.
``causality(backend)`` searches for an example that breaks the law; ``causality(backend, scene=..., place=...)`` checks
one example. Factors are powers of two, so that both sides round in the same way.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from refgemma.config import SLIDING, Gemma2Config
from refgemma.files import pluralise
from refgemma.hub import find_model
from refgemma.oracle.engine import Engine
from refgemma.precision import Array, as_dtype, dtype_name
from refgemma.testing.laws import ROUNDOFF, Bench, Exact, Law, LoadedModel, exact, law, require
from refgemma.testing.strategies import (
    Scene,
    activations,
    cache_splits,
    chat_messages,
    padding_mask,
    positions,
    scenes,
    texts,
)
from refgemma.trace.candidate import candidate_of
from refgemma.weights.checkpoint import open_checkpoint

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ANGLE = 2.0**-24  # a rotary angle is float32 in every precision: its relative rounding error


def tensor(layer: int, name: str) -> str:
    """Return the name of a layer's weight in a checkpoint.

    Examples
    --------
    >>> tensor(3, "self_attn.q_proj")
    'model.layers.3.self_attn.q_proj.weight'
    """
    return f"model.layers.{layer}.{name}.weight"


def scale(tensors: Mapping[str, Array], factor: float, *names: str) -> dict[str, Array]:
    """Return the named tensors multiplied by `factor`."""
    return {name: tensors[name] * np.float32(factor) for name in names}


def every_layer(config: Gemma2Config, *names: str) -> list[str]:
    """Return the names of these weights in all layers."""
    return [tensor(layer, name) for layer in range(config.num_hidden_layers) for name in names]


def silence(scene: Scene, *names: str, but: int = -1) -> dict[str, Array]:
    """Return zeros for these weights in all layers except `but`, so that attention or feed-forward adds nothing."""
    kept = {tensor(but, name) for name in names}
    return {name: 0 * scene.tensors[name] for name in every_layer(scene.config, *names) if name not in kept}


ATTENTION_OUT, FEED_FORWARD_OUT = "self_attn.o_proj", "mlp.down_proj"

# --- visible keys -----------------------------------------------------------------------------------------------------


def replace_token(scene: Scene, place: int, step: int = 0) -> Array:
    """Return the texts with another token at `place`."""
    vocab, ids = scene.config.vocab_size, scene.ids
    ids[:, place] = (ids[:, place] + 1 + step % (vocab - 1)) % vocab
    return ids


@law(scene=scenes(), place=st.integers(0, 12), step=st.integers(0, 60))
def causality(bench: Bench, scene: Scene, place: int, step: int) -> None:
    """A token does not change earlier logits."""
    model, ids = bench.scene(scene), scene.ids
    place %= ids.shape[1]
    changed = model.logits(replace_token(scene, place, step))
    says = f"logits before place {place}, with another token there"
    bench.same_logits(model, ids, changed, says, at=np.s_[:, :place])


# Ordinary weights and distant caps, so that every change is large enough to be seen. With the smaller attention cap,
# scores are between -0.5 and 0.5, so that every key inside the window has enough weight.
UNBENT: dict[str, Any] = {"kinds": ["ordinary"], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 50.0}
NOTICED: dict[str, Any] = UNBENT | {"attn_logit_softcapping": 0.5}


@law(scene=scenes(seq=(11, 13), **NOTICED), place=st.integers(0, 12), layer=st.integers(0, 1))
def window_locality(bench: Bench, scene: Scene, place: int, layer: int) -> None:
    """In a sliding layer a token is visible for exactly ``sliding_window`` places, including its own.

    Layers 0, 2, 4 and so on are sliding. The attention of all other layers is set to zero.
    """
    sliding = [n for n in range(scene.config.num_hidden_layers) if scene.config.is_sliding(n)]
    model = bench.scene(scene, silence(scene, ATTENTION_OUT, but=sliding[layer % len(sliding)]))
    ids, window = scene.ids, scene.config.sliding_window
    place %= ids.shape[1] - window
    changed, last = model.logits(replace_token(scene, place)), place + window - 1
    says = f"with another token at place {place} and a window of {window}"
    bench.same_logits(model, ids, changed, f"logits from place {last + 1} on, {says}", at=np.s_[:, last + 1 :])
    bench.different_logits(model, ids, changed, f"logits at place {last}, its last, {says}", at=np.s_[:, last])


@law(scene=scenes(seq=(11, 13), num_hidden_layers=2, **NOTICED))
def full_layers_reach_back(bench: Bench, scene: Scene) -> None:
    """In a full layer, such as layer 1, the last token sees the first token at any distance."""
    model = bench.scene(scene, silence(scene, ATTENTION_OUT, but=1))
    changed = model.logits(replace_token(scene, 0))
    bench.different_logits(model, scene.ids, changed, "the last logits, with another first token", at=np.s_[:, -1])


@st.composite
def _draw_calls(draw: st.DrawFn) -> dict[str, Any]:
    scene = draw(scenes(seq=(2, 13)))
    return {"scene": scene, "calls": draw(cache_splits(len(scene.input_ids[0])))}


def read_in_calls(model: LoadedModel, ids: Array, calls: Sequence[int], mask: Any = None) -> Exact:
    """Return the logits of a text read in several calls; each continues the cache of the previous call."""
    cache, done, parts = None, 0, []
    for length in calls:
        seen = None if mask is None else mask[:, : done + length]
        output = model.run(ids[:, done : done + length], mask=seen, cache=cache)
        parts.append(exact(output.logits))
        cache, done = output.cache, done + length
    return np.concatenate(parts, axis=1)


@law(_draw_calls(), needs=["cache"])
def chunks_change_nothing(bench: Bench, scene: Scene, calls: list[int]) -> None:
    """A text read in any number of calls (prefill, chunks, single tokens) has the same logits as in one call."""
    model = bench.scene(scene)
    bench.same_logits(model, scene.ids, read_in_calls(model, scene.ids, calls), f"logits in calls of {calls}")


@law(_draw_calls(), needs=["cache"])
def a_cache_can_be_continued_twice(bench: Bench, scene: Scene, calls: list[int]) -> None:
    """Continuing a cache does not change it."""
    model, ids, first = bench.scene(scene), scene.ids, calls[0]
    if first == ids.shape[1]:
        return
    cache = model.run(ids[:, :first]).cache
    once = exact(model.run(ids[:, first:], cache=cache).logits)
    model.run(replace_token(scene, first)[:, first:], cache=cache)
    again = exact(model.run(ids[:, first:], cache=cache).logits)
    require(np.array_equal(once, again), "a second continuation of the same cache gives different logits")


@law(scene=scenes(batch=(2, 3)))
def batch_rows_are_independent(bench: Bench, scene: Scene) -> None:
    """Each row of a batch has the same logits as alone."""
    model = bench.scene(scene)
    alone = np.concatenate([model.logits(scene.ids[row : row + 1]) for row in range(len(scene.ids))])
    bench.same_logits(model, scene.ids, alone, "logits of a batch and of its rows alone")


@st.composite
def _draw_padding(draw: st.DrawFn, calls: bool = False) -> dict[str, Any]:
    scene = draw(scenes(batch=(1, 3), seq=(2, 11)))
    batch, seq = scene.ids.shape
    padded = draw(st.lists(st.integers(0, seq - 1), min_size=batch, max_size=batch))
    return {"scene": scene, "padded": padded} | ({"calls": draw(cache_splits(seq))} if calls else {})


def _padding_changes_nothing(bench: Bench, scene: Scene, padded: list[int], side: str, calls: Sequence[int]) -> None:
    model, ids, seq = bench.scene(scene), scene.ids, scene.ids.shape[1]
    mask = np.array([padding_mask(seq, count, side) for count in padded])
    together = model.logits(ids, mask=mask) if len(calls) == 1 else read_in_calls(model, ids, calls, mask)
    for row, count in enumerate(padded):
        real = slice(count, seq) if side == "left" else slice(0, seq - count)
        # Padding on the left shifts all positions, so that every angle is rounded differently.
        angle = ANGLE * seq if side == "left" else 0.0
        says = f"logits of row {row} alone, and in a batch with {count} padding tokens on its {side}"
        bench.same_logits(model, ids[row : row + 1, real], together[row : row + 1, real], says, angle=angle)


@law(_draw_padding(), needs=["padding"])
def right_padding_changes_nothing(bench: Bench, scene: Scene, padded: list[int]) -> None:
    """A row with padding on the right has the same logits as alone, for any padding tokens."""
    _padding_changes_nothing(bench, scene, padded, "right", [scene.ids.shape[1]])


@law(_draw_padding(), needs=["padding"])
def left_padding_changes_nothing(bench: Bench, scene: Scene, padded: list[int]) -> None:
    """A row with padding on the left has the same logits as alone, for any padding tokens."""
    _padding_changes_nothing(bench, scene, padded, "left", [scene.ids.shape[1]])


@law(_draw_padding(calls=True), needs=["padding", "cache"])
def left_padding_in_calls_changes_nothing(bench: Bench, scene: Scene, padded: list[int], calls: list[int]) -> None:
    """A row with padding on the left, read in several calls, has the same logits as alone."""
    _padding_changes_nothing(bench, scene, padded, "left", calls)


# --- positions --------------------------------------------------------------------------------------------------------


@st.composite
def _draw_positions(draw: st.DrawFn) -> dict[str, Any]:
    scene = draw(scenes())
    return {"scene": scene, "places": draw(positions(scene.ids.shape[1])), "shift": draw(st.integers(1, 4096))}


@law(_draw_positions(), needs=["positions"])
def only_distances_count(bench: Bench, scene: Scene, places: Array, shift: int) -> None:
    """Adding the same number to all positions does not change the logits."""
    model, ids = bench.scene(scene), scene.ids
    limit = bench.can.max_length or scene.config.max_position_embeddings
    shift %= max(1, limit - int(places.max()))
    at = np.broadcast_to(places, ids.shape)
    angle = ANGLE * float(places.max() + shift)
    moved, says = model.logits(ids, positions=at + shift), f"logits at positions {places.tolist()}, and {shift} later"
    bench.same(model, lambda m: m.logits(ids, positions=at), moved, says, angle)


@law(scene=scenes(seq=(3, 5), num_hidden_layers=1, sliding_window=5, **UNBENT))
def order_counts(bench: Bench, scene: Scene) -> None:
    """In one layer, the order of earlier tokens changes the logits, through their positions."""
    model, ids = bench.scene(scene), replace_token(scene, 0)
    ids[:, 1] = (ids[:, 0] + 1) % scene.config.vocab_size
    swapped = model.logits(ids[:, [1, 0, *range(2, ids.shape[1])]])
    bench.different_logits(model, ids, swapped, "the last logits, first tokens swapped", at=np.s_[:, -1])


@law(scene=scenes(rope_theta=1.0, head_dim=6), order=st.permutations(range(3)))
def pairs_lie_half_a_head_apart(bench: Bench, scene: Scene, order: list[int]) -> None:
    """With a rotary base of 1, all pairs ``(i, i + head_dim / 2)`` have the same angle, so their order has no
    effect."""
    rows = np.array([*order, *(3 + n for n in order)])
    moved = {
        name: scene.tensors[name].reshape(-1, 6, scene.config.hidden_size)[:, rows].reshape(scene.tensors[name].shape)
        for name in every_layer(scene.config, "self_attn.q_proj", "self_attn.k_proj")
    }
    bench.keep_logits(scene, moved, f"with the pairs of each head in the order {order}")


# --- heads ------------------------------------------------------------------------------------------------------------


def split_rows(weight: Array, head_dim: int) -> Array:
    """Reshape the rows of a projection to ``(heads, head_dim, in)``."""
    return weight.reshape(-1, head_dim, weight.shape[-1])


@law(scene=scenes())
def shared_key_heads_can_be_written_out(bench: Bench, scene: Scene) -> None:
    """Repeating each key/value head in place for its query heads does not change the logits."""
    config = scene.config
    group = config.num_attention_heads // config.num_key_value_heads
    repeated = {
        name: np.repeat(split_rows(scene.tensors[name], config.head_dim), group, axis=0).reshape(-1, config.hidden_size)
        for name in every_layer(config, "self_attn.k_proj", "self_attn.v_proj")
    }
    heads = config.num_attention_heads
    bench.keep_logits(scene, repeated, "with each shared key head written out", num_key_value_heads=heads)


@law(scene=scenes(num_key_value_heads=3, num_attention_heads=6), order=st.permutations(range(3)), flip=st.booleans())
def heads_have_no_order(bench: Bench, scene: Scene, order: list[int], flip: bool) -> None:
    """The order of key/value heads (with their query heads) has no effect, nor has the order of query heads that share
    one."""
    config = scene.config
    queries = np.arange(6).reshape(3, 2)[order, :: -1 if flip else 1].ravel()
    moved: dict[str, Array] = {}
    for layer in range(config.num_hidden_layers):
        for letter, heads in (("q", queries), ("k", order), ("v", order)):
            name = tensor(layer, f"self_attn.{letter}_proj")
            moved[name] = split_rows(scene.tensors[name], config.head_dim)[heads].reshape(-1, config.hidden_size)
        name = tensor(layer, ATTENTION_OUT)
        columns = scene.tensors[name].T
        moved[name] = split_rows(columns, config.head_dim)[queries].reshape(columns.shape).T
    bench.keep_logits(scene, moved, f"with key heads in the order {order} and query heads {queries.tolist()}")


@law(scene=scenes())
def the_query_scalar_scales_scores(bench: Bench, scene: Scene) -> None:
    """Scores are divided by ``sqrt(query_pre_attn_scalar)``; a factor of 4 compensates for doubled queries."""
    twice = scale(scene.tensors, 2, *every_layer(scene.config, "self_attn.q_proj"))
    says, scalar = "with twice the queries and four times the query scalar", 4 * scene.config.query_pre_attn_scalar
    bench.keep_logits(scene, twice, says, query_pre_attn_scalar=scalar)


# --- caps -------------------------------------------------------------------------------------------------------------


@law(scene=scenes(final_logit_softcapping=None), cap=st.sampled_from([30.0, 2.0, 0.25]))
def the_final_cap_is_a_tanh(bench: Bench, scene: Scene, cap: float) -> None:
    """Final logits with a cap are ``cap * tanh(logits without cap / cap)``: bounded, odd, in the same order."""
    raw = bench.scene(scene)
    capped = bench.model(scene.config.changed(final_logit_softcapping=cap), scene.tensors)
    bent = cap_by_hand(raw.logits(scene.ids), cap)
    bench.same_logits(capped, scene.ids, bent, f"logits with a final cap of {cap}, and by hand")


@law(scene=scenes(attn_logit_softcapping=1e-20, seq=(3, 13)), seed=st.integers(0, 9))
def a_vanishing_attention_cap_makes_all_keys_alike(bench: Bench, scene: Scene, seed: int) -> None:
    """With an attention cap near 0, all scores are near 0, so changed queries do not change the logits."""
    rng = np.random.default_rng(seed)
    others = {
        name: rng.standard_normal(scene.tensors[name].shape).astype(np.float32)
        for name in every_layer(scene.config, "self_attn.q_proj")
    }
    bench.keep_logits(scene, others, "with other query projections under an attention cap of 1e-20")


@law(scene=scenes(seq=(3, 13), num_hidden_layers=1, **NOTICED))
def the_attention_cap_counts(bench: Bench, scene: Scene) -> None:
    """With queries 64 times larger, an attention cap of 0.5 changes the logits."""
    large = scale(scene.tensors, 64, *every_layer(scene.config, "self_attn.q_proj"))
    capped, ids = bench.scene(scene, large), replace_token(scene, 0)
    free = bench.model(scene.config.changed(attn_logit_softcapping=None), scene.tensors | large)
    bench.different_logits(capped, ids, free.logits(ids), "logits with an attention cap of 0.5, and without")


@law(scene=scenes(attn_logit_softcapping=None, final_logit_softcapping=None))
def distant_caps_do_nothing(bench: Bench, scene: Scene) -> None:
    """Caps of 1e20 give the same logits as no caps."""
    bench.keep_logits(scene, {}, "with caps of 1e20", attn_logit_softcapping=1e20, final_logit_softcapping=1e20)


def overflows(x: Exact, dtype: str) -> bool:
    """Return True if a model overflowed: float16 ends at 65504, and infinities become NaN."""
    return dtype == "float16" and bool(np.isnan(x).any())


@law(scene=scenes(), cap=st.sampled_from([30.0, 0.5]))
def logits_stay_below_their_cap(bench: Bench, scene: Scene, cap: float) -> None:
    """In every precision no logit exceeds the final cap, and none is NaN, except in float16, where numbers overflow."""
    config = scene.config.changed(final_logit_softcapping=cap)
    for dtype in bench.can.dtypes:
        logits = bench.model(config, scene.tensors, dtype).logits(scene.ids)
        if overflows(logits, dtype):
            continue
        require(not np.isnan(logits).any(), f"the logits in {dtype} contain NaN")
        # A rounded tanh is at most 1; allow half a unit more for a library that rounds up.
        limit = cap * (1 + 2 * ROUNDOFF[dtype])
        require(np.abs(logits) <= limit, f"a logit in {dtype} is {np.abs(logits).max()}, beyond {cap}")


@law(scene=scenes(), needs=["tensor:layers.0.attention.probs"])
def attention_weights_sum_to_one(bench: Bench, scene: Scene) -> None:
    """A query's weights are 0 on hidden keys, not negative, and sum to 1 over the visible keys."""
    seq, window = scene.ids.shape[1], scene.config.sliding_window
    ago = np.arange(seq)[:, None] - np.arange(seq)
    for dtype in bench.can.dtypes:
        shown = bench.scene(scene, dtype=dtype).run(scene.ids, ("logits", "layers.*.attention.probs")).tensors
        for layer, kind in enumerate(scene.config.layer_types or ()):
            probs = exact(shown[f"layers.{layer}.attention.probs"])
            # Scores without a cap overflow in float16, and so may the products of an earlier feed-forward layer.
            if overflows(probs, dtype) and (layer > 0 or scene.config.attn_logit_softcapping is None):
                break
            allowed = (ago >= 0) & (ago < (window if kind == SLIDING else seq))
            require(not probs[..., ~allowed].any(), f"layer {layer} ({kind}) in {dtype} has weight on hidden keys")
            require(probs >= 0, f"layer {layer} in {dtype} has negative attention weights")
            # Each weight has one more rounding than the sum by which it is divided, and the sum has the errors of its
            # terms.
            far = np.abs(probs.sum(axis=-1) - 1).max()
            limit = (seq + 4) * ROUNDOFF[dtype]
            require(far <= limit, f"layer {layer} in {dtype}: a row of attention weights is {far} off 1")


# --- norms and wiring -------------------------------------------------------------------------------------------------

# Norm -> the weights to negate with it so that the logits do not change; the last norm negates the logits.
REFLECTED: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": (ATTENTION_OUT,),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "post_feedforward_layernorm": (FEED_FORWARD_OUT,),
    "norm": (),
}


@law(scene=scenes(), which=st.sampled_from(sorted(REFLECTED)))
def norm_weights_count_from_minus_one(bench: Bench, scene: Scene, which: str) -> None:
    """A norm multiplies by ``1 + weight``, so that replacing ``w`` by ``-2 - w`` changes only the sign."""
    norms = [NORM] if which == "norm" else every_layer(scene.config, which)
    reflected = {name: -2 - exact(scene.tensors[name]) for name in norms}
    negated = scale(scene.tensors, -1, *every_layer(scene.config, *REFLECTED[which]))
    other, sign = bench.scene(scene, reflected | negated), -1 if which == "norm" else 1
    says = f"logits, and with {which} reflected about -1"
    bench.same_logits(bench.scene(scene), scene.ids, sign * other.logits(scene.ids), says)


@law(
    scene=scenes(rms_norm_eps=1e-30), which=st.sampled_from([ATTENTION_OUT, FEED_FORWARD_OUT]), power=st.integers(1, 6)
)
def norms_after_a_layer_erase_its_size(bench: Bench, scene: Scene, which: str, power: int) -> None:
    """The outputs of attention and feed-forward are normed before the sum, so that their size has no effect."""
    larger = scale(scene.tensors, 2.0**power, *every_layer(scene.config, which))
    bench.keep_logits(scene, larger, f"with {which} {2**power} times as large")


@law(scene=scenes(rms_norm_eps=1e-30), power=st.integers(1, 6))
def norms_before_a_layer_erase_the_size_of_the_stream(bench: Bench, scene: Scene, power: int) -> None:
    """Scaling the whole residual stream does not change the logits, because each layer reads the stream through a norm.

    The embeddings of the input tokens and the outputs of the layers are scaled. The head uses the same table unscaled,
    so only the logits of tokens outside the input are compared.
    """
    factor = 2.0**power
    tensors, read = scene.tensors, np.unique(scene.ids)
    table = tensors[EMBED].copy()
    table[read] *= factor
    # 1 + w' = factor (1 + w)
    norms = every_layer(scene.config, "post_attention_layernorm", "post_feedforward_layernorm")
    larger = {name: factor * (1 + exact(tensors[name])) - 1 for name in norms}
    unread = np.setdiff1d(np.arange(scene.config.vocab_size), read)
    other = bench.scene(scene, larger | {EMBED: table}).logits(scene.ids)
    says = f"logits, and with a residual stream {2**power} times as large"
    bench.same_logits(bench.scene(scene), scene.ids, other, says, at=np.s_[..., unread])


@law(scene=scenes())
def the_embedding_scale_grows_with_the_root_of_the_width(bench: Bench, scene: Scene) -> None:
    """A model that is four times wider, with every number repeated four times, has the same logits.

    The embedding is halved, because ``sqrt(hidden)`` is twice as large.
    """
    tensors = scene.tensors
    wide_tensors: dict[str, Array] = {}
    for name, x in tensors.items():
        if name == EMBED:
            wide_tensors[name] = np.tile(x, 4) / 2
        elif name == NORM:
            wide_tensors[name] = (np.tile(exact(x), 4) - 1) / 2  # 1 + w' = (1 + w) / 2, as the head's rows are halves
        elif x.ndim == 1:
            wide_tensors[name] = np.tile(x, 4)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            wide_tensors[name] = np.tile(x, (4, 1))
        else:
            wide_tensors[name] = np.tile(x, 4) / 4
    bench.keep_logits(scene, wide_tensors, "of four times the width", hidden_size=4 * scene.config.hidden_size)


@law(scene=scenes())
def up_is_linear(bench: Bench, scene: Scene) -> None:
    """Only ``gate`` goes through the activation: negating both ``up`` and ``down`` changes nothing."""
    negated = scale(scene.tensors, -1, *every_layer(scene.config, "mlp.up_proj", FEED_FORWARD_OUT))
    bench.keep_logits(scene, negated, "with up_proj and down_proj negated")


def norm_by_hand(x: Exact, weight: Exact, eps: float) -> Exact:
    """Return a norm in float64, for the laws that compute by hand."""
    y: Exact = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * (1 + weight)
    return y


def cap_by_hand(x: Exact, cap: float | None) -> Exact:
    """Return a soft cap in float64."""
    y: Exact = x if cap is None else cap * np.tanh(x / cap)
    return y


def gelu_by_hand(x: Exact) -> Exact:
    """Return the tanh form of GELU in float64."""
    y: Exact = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


Layer = Callable[[Exact, Callable[[str], Exact]], Exact]


def logits_by_hand(scene: Scene, tensors: Mapping[str, Array], layer: Layer | None = None) -> Exact:
    """Return the logits of a model with one `layer`, a function of the stream and of the weights by name."""
    config, table = scene.config, exact(tensors[EMBED])
    stream = table[scene.ids] * math.sqrt(config.hidden_size)
    if layer is not None:
        stream = stream + layer(stream, lambda name: exact(tensors[tensor(0, name)]))
    norm = norm_by_hand(stream, exact(tensors[NORM]), config.rms_norm_eps)
    return cap_by_hand(norm @ table.T, config.final_logit_softcapping)


@law(scene=scenes(), power=st.integers(0, 6))
def a_silent_model_can_be_calculated_by_hand(bench: Bench, scene: Scene, power: int) -> None:
    """If all layers add nothing, the logits are ``cap(norm(sqrt(hidden) E[ids]) E^T)``."""
    small = scale(scene.tensors, 2.0**-power, EMBED)
    model = bench.scene(scene, silence(scene, ATTENTION_OUT, FEED_FORWARD_OUT) | small)
    by_hand = logits_by_hand(scene, scene.tensors | small)
    bench.same_logits(model, scene.ids, by_hand, "logits of a model whose layers add nothing, and calculated by hand")


@law(scene=scenes(kinds=["ordinary", "tied rows"], num_hidden_layers=1, final_logit_softcapping=None))
def one_feed_forward_layer_can_be_calculated_by_hand(bench: Bench, scene: Scene) -> None:
    """With attention set to zero, one layer adds ``norm(down(gelu(gate(norm(x))) * up(norm(x))))``, with the tanh
    GELU."""
    eps = scene.config.rms_norm_eps

    def feed_forward(stream: Exact, weight: Callable[[str], Exact]) -> Exact:
        x = norm_by_hand(stream, weight("pre_feedforward_layernorm"), eps)
        product = gelu_by_hand(x @ weight("mlp.gate_proj").T) * (x @ weight("mlp.up_proj").T)
        return norm_by_hand(product @ weight(FEED_FORWARD_OUT).T, weight("post_feedforward_layernorm"), eps)

    by_hand = logits_by_hand(scene, scene.tensors, feed_forward)
    model = bench.scene(scene, silence(scene, ATTENTION_OUT))
    bench.same_logits(model, scene.ids, by_hand, "logits of one feed-forward layer, calculated by hand")


@law(scene=scenes(seq=(1, 1), kinds=["ordinary", "tied rows"], num_hidden_layers=1, final_logit_softcapping=None))
def one_token_sees_its_own_value(bench: Bench, scene: Scene) -> None:
    """A single token's attention gives its own projected value; no other part of attention has an effect."""
    config = scene.config

    def attend(stream: Exact, weight: Callable[[str], Exact]) -> Exact:
        x = norm_by_hand(stream, weight("input_layernorm"), config.rms_norm_eps)
        value = (x @ weight("self_attn.v_proj").T).reshape(*scene.ids.shape, -1, config.head_dim)
        group = config.num_attention_heads // config.num_key_value_heads
        mixed = np.repeat(value, group, axis=2).reshape(*scene.ids.shape, -1)
        return norm_by_hand(mixed @ weight(ATTENTION_OUT).T, weight("post_attention_layernorm"), config.rms_norm_eps)

    by_hand = logits_by_hand(scene, scene.tensors, attend)
    model = bench.scene(scene, silence(scene, FEED_FORWARD_OUT))
    bench.same_logits(model, scene.ids, by_hand, "logits of one token, its attention calculated by hand")


# --- embedding and head -----------------------------------------------------------------------------------------------


@law(scene=scenes(seq=(1, 5), final_logit_softcapping=None), token=st.integers(0, 60))
def the_head_is_the_embedding(bench: Bench, scene: Scene, token: int) -> None:
    """Doubling the embedding of a token outside the input doubles its logit, and changes no other logit."""
    unread = np.setdiff1d(np.arange(scene.config.vocab_size), scene.ids)
    token = int(unread[token % len(unread)])
    table = scene.tensors[EMBED].copy()
    table[token] *= 2
    model = bench.scene(scene)
    expected = model.logits(scene.ids)
    expected[..., token] *= 2
    says = f"logits with twice the embedding of token {token}, which is not read"
    bench.same_logits(bench.scene(scene, {EMBED: table}), scene.ids, expected, says)


@law(scene=scenes(), seed=st.integers(0, 2**16))
def the_vocabulary_has_no_order(bench: Bench, scene: Scene, seed: int) -> None:
    """Renumbering the tokens, in the embedding and in the text, only renumbers the logits."""
    renumbered = np.random.default_rng(seed).permutation(scene.config.vocab_size)  # token n becomes renumbered[n]
    table = np.empty_like(scene.tensors[EMBED])
    table[renumbered] = scene.tensors[EMBED]
    other = bench.scene(scene, {EMBED: table}).logits(renumbered[scene.ids])
    bench.same_logits(bench.scene(scene), scene.ids, other[..., renumbered], "logits, and with the tokens renumbered")


@law(scene=scenes(tie_word_embeddings=False, final_logit_softcapping=None, seq=(1, 5)))
def an_untied_head_is_used(bench: Bench, scene: Scene) -> None:
    """If ``tie_word_embeddings`` is false, doubling the head doubles the logits. (No released Gemma 2 has such a
    head.)"""
    twice, logits = bench.scene(scene, scale(scene.tensors, 2, HEAD)), bench.scene(scene).logits(scene.ids)
    bench.same_logits(twice, scene.ids, 2 * logits, "logits with twice the head")


@law(scene=scenes(seq=(3, 9), num_hidden_layers=1, attention_bias=True, **UNBENT), letter=st.sampled_from("qkvo"))
def each_bias_counts(bench: Bench, scene: Scene, letter: str) -> None:
    """If ``attention_bias`` is true, each of the four biases changes the logits. (No released Gemma 2 has them.)"""
    name = f"model.layers.0.self_attn.{letter}_proj.bias"
    ids = replace_token(scene, 0)
    # The same bias for all keys would shift all scores of a query equally, but rotary positions rotate the bias. A size
    # of 4 is enough.
    without = bench.scene(scene, {name: 0 * scene.tensors[name] + 4})
    bench.different_logits(bench.scene(scene), ids, without.logits(ids), f"logits with another {letter} bias")


@law(scene=scenes(attention_bias=True))
def a_value_bias_goes_through(bench: Bench, scene: Scene) -> None:
    """Attention weights sum to 1, so that a bias of the values can be moved through ``o_proj`` into its bias."""
    config = scene.config
    moved: dict[str, Array] = {}
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}.self_attn."
        bias = scene.tensors[p + "v_proj.bias"]
        spread = np.repeat(bias.reshape(-1, config.head_dim), group, axis=0).ravel()
        through = exact(scene.tensors[p + "o_proj.weight"]) @ exact(spread) + exact(scene.tensors[p + "o_proj.bias"])
        moved |= {p + "v_proj.bias": 0 * bias, p + "o_proj.bias": through}
    bench.keep_logits(scene, moved, "with the bias of the values moved into that of the output")


# --- tensors of a trace -----------------------------------------------------------------------------------------------


@law(scene=scenes(), needs=["tensor:embedded"])
def the_embedding_is_scaled_by_the_rounded_root(bench: Bench, scene: Scene) -> None:
    """In each precision the embedding is ``E[ids] * round(sqrt(hidden))``, rounded once (59.75 for the 9B in bf16)."""
    for dtype in bench.can.dtypes:
        shown = bench.scene(scene, dtype=dtype).run(scene.ids, ("logits", "embedded")).tensors["embedded"]
        root = float(as_dtype(math.sqrt(scene.config.hidden_size), dtype))
        expected = as_dtype(exact(scene.tensors[EMBED])[scene.ids] * root, dtype)
        apart = np.abs(exact(shown) - exact(expected))
        limit = ROUNDOFF[dtype] * np.abs(exact(expected)) * (1 if dtype in ("float32", "float64") else 0)
        require(apart <= limit, f"in {dtype} the embedding is not E[ids] * {root}, by up to {apart.max()}")


STREAM = ("embedded", "layers.*.post_attention_layernorm", "layers.*.post_feedforward_layernorm", "layers.*.out")


@law(scene=scenes(), needs=[f"tensor:{name.replace('*', '0')}" for name in STREAM])
def the_stream_is_a_sum(bench: Bench, scene: Scene) -> None:
    """The last layer's output is the sum of the embedding and the outputs of all attention and feed-forward norms."""

    def add_up(m: LoadedModel) -> Exact:
        shown = m.run(scene.ids, ("logits", *STREAM)).tensors
        added = [x for name, x in shown.items() if name == "embedded" or name.endswith("_layernorm")]
        total: Exact = np.sum([exact(x) for x in added], axis=0)
        return total

    model, last = bench.scene(scene), f"layers.{scene.config.num_hidden_layers - 1}.out"
    stream = model.run(scene.ids, ("logits", last)).tensors[last]
    bench.same(model, add_up, stream, "the sum of the parts, and the stream")


@law(scene=scenes(seq=(1, 6), num_hidden_layers=2))
def results_are_of_their_precision(bench: Bench, scene: Scene) -> None:
    """Each returned tensor has only numbers of the requested precision; in float64 some are not float32 numbers."""
    for dtype in bench.can.dtypes:
        shown = bench.scene(scene, dtype=dtype).run(scene.ids, ("*",)).tensors
        for name, x in shown.items():
            with np.errstate(over="ignore"):
                same = np.array_equal(exact(as_dtype(exact(x), dtype)), exact(x), equal_nan=True)
            require(same, f"{name} contains numbers that do not exist in {dtype}")
        if dtype == "float64":
            logits = exact(shown["logits"])
            # With constant weights, all logits may be the same round number.
            finer = scene.kind == "constant" or not np.array_equal(logits, logits.astype(np.float32))
            require(finer, "all float64 logits are float32 numbers")


@law(scene=scenes())
def the_same_twice(bench: Bench, scene: Scene) -> None:
    """The same call gives bit for bit the same logits, also after loading the model again, in every precision."""
    for dtype in bench.can.dtypes:
        model = bench.scene(scene, dtype=dtype)
        first, second = model.logits(scene.ids), model.logits(scene.ids)
        again = exact(bench.backend.forward(bench.backend.load(model.folder, dtype), scene.ids).logits)
        same = np.array_equal(first, second, equal_nan=True) and np.array_equal(first, again, equal_nan=True)
        require(same, f"the same call in {dtype} gives different logits the second time")


LAYER_WEIGHTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", ATTENTION_OUT,
    "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", FEED_FORWARD_OUT,
    "post_feedforward_layernorm",
)  # fmt: skip


@law(
    scene=scenes(seq=(3, 9), num_hidden_layers=1, **UNBENT),
    which=st.sampled_from([EMBED, NORM, *(tensor(0, name) for name in LAYER_WEIGHTS)]),
    needs=["dtype:float32"],
)
def no_weight_is_kept_in_half(bench: Bench, scene: Scene, which: str) -> None:
    """In float32, weights have more digits than in bfloat16: changing a weight by less than half a bfloat16 step has an
    effect."""
    ids, vocab = scene.ids, scene.config.vocab_size
    ids[:, 1], ids[:, 2] = (ids[:, 0] + 1) % vocab, (ids[:, 0] + 2) % vocab  # three values to choose among
    x = scene.tensors[which]
    signs = np.random.default_rng(0).choice([-1, 1], x.shape)
    changed = bench.scene(scene, {which: (x * (1 + 2.0**-10 * signs)).astype(np.float32)})
    says = f"logits with a thousandth more or less in {which}"
    bench.different_logits(bench.scene(scene), ids, changed.logits(ids), says)


@law(scene=scenes(), needs=["dtype:float64", "dtype:float32"])
def float32_is_near_float64(bench: Bench, scene: Scene) -> None:
    """The difference between float32 and float64 logits is explained by rounding."""
    single, double = bench.scene(scene, dtype="float32"), bench.scene(scene, dtype="float64")
    bench.same_logits(single, scene.ids, double.logits(scene.ids), "logits in float32 and in float64")


ALL_TENSORS = [
    f"tensor:{name}"
    for name in ("cos", "embedded", "layers.0.attention.scores", "layers.0.feed_forward.product", "raw_logits")
]


def operation_by_operation(bench: Bench, scene: Scene, dtype: str) -> Iterator[tuple[str, int, int]]:
    """Yield each tensor of a run, computed from earlier tensors: its name, and the number of unexplained elements.

    Each element has its own tolerance, from `refgemma.oracle.tolerance`.
    """
    model = bench.scene(scene, dtype=dtype)
    shown = {name: exact(x) for name, x in model.run(scene.ids, ("*",)).tensors.items()}
    candidate = candidate_of({"input_ids": scene.ids} | shown, scene.config, dtype, source="a run")
    for name, problem in candidate.refused.items():
        require(False, f"{name} {problem}")
    engine = Engine(candidate, open_checkpoint(model.folder).resident(dtype), scene.config)
    for name in filter(engine.is_direct, engine.recorded):
        if name != "embedded":  # its factor is rounded, as part of the model; another law tests this
            where = engine.where(name)
            beyond = (np.abs(engine.errors(name)) > engine.tolerance(name).error_bound) & where
            yield name, int(beyond.sum()), int(where.sum())


@law(scene=scenes(), needs=["dtype:float32", *ALL_TENSORS])
def each_operation_keeps_within_its_bound(bench: Bench, scene: Scene) -> None:
    """Each tensor of a float32 run equals the float64 operation on earlier tensors, within a derived bound."""
    for name, beyond, size in operation_by_operation(bench, scene, "float32"):
        require(not beyond, f"{name}: beyond the bound of rounding in {beyond} of {pluralise(size, 'element')}")


@law(scene=scenes(), needs=["dtype:bfloat16", *ALL_TENSORS])
def a_kernel_rounds_once(bench: Bench, scene: Scene) -> None:
    """Each tensor of a bfloat16 run equals the operation on earlier tensors, rounded where PyTorch's kernels round.

    A norm, a softmax, a projection or a sum is computed in float32 and rounds once: half a step of bfloat16. The error
    is larger if a norm is rounded before its weight, or queries are rounded instead of scores.
    """
    for name, beyond, size in operation_by_operation(bench, scene, "bfloat16"):
        require(not beyond, f"{name}: rounded more often or elsewhere in {beyond} of {pluralise(size, 'element')}")


# --- single operations ------------------------------------------------------------------------------------------------

ANY_DTYPE = st.sampled_from(["float32", "float64", "bfloat16", "float16"])


def any_numbers(size: int, limit: float) -> st.SearchStrategy[Array]:
    """Draw numbers of any precision with magnitudes up to `limit`."""
    return ANY_DTYPE.flatmap(lambda dtype: activations(dtype, size)).map(lambda x: np.clip(x, -limit, limit))


@law(x=ANY_DTYPE.flatmap(activations), cap=st.sampled_from([50.0, 30.0, 2.0]), needs=["operations"])
def soft_cap_is_bounded_odd_and_monotone(bench: Bench, x: Array, cap: float) -> None:
    """``|cap(x)|`` is at most ``cap`` and at most ``|x|``, ``cap(-x) = -cap(x)``, and the order of numbers is kept."""
    soft_cap, u = bench.operations["soft_cap"], 2.0**-8
    y = soft_cap(x, cap)
    require(type(y) is type(x) and y.dtype == x.dtype, f"soft_cap makes {type(y).__name__} of {type(x).__name__}")
    y, minus, x64 = exact(y), exact(soft_cap(-x, cap)), exact(x)
    require(np.array_equal(y, -minus), "soft_cap is not odd")
    require(np.abs(y) <= cap, f"soft_cap goes beyond {cap}")
    # Division, tanh and product round at least to bfloat16; a tiny quotient rounds by half of float16's smallest step.
    require(np.abs(y) <= np.abs(x64) * (1 + 4 * u) + cap * 2.0**-24, "soft_cap enlarges a number")
    order = np.argsort(x64)
    drop = np.diff(y[order])
    require(drop >= -4 * 2.0**-24 * cap, "soft_cap does not keep the order of numbers")


@law(x=activations("float32").map(lambda x: np.clip(x, -1, 1)), needs=["operations"])
def a_distant_soft_cap_is_the_identity(bench: Bench, x: Array) -> None:
    """A very large cap changes numbers only by the rounding of three steps; None changes nothing."""
    soft_cap = bench.operations["soft_cap"]
    far = exact(soft_cap(x, 2.0**40))
    # A quotient below float32's smallest normal number loses digits.
    limit = 4 * 2.0**-24 * np.abs(exact(x)) + 2.0 ** (40 - 126)
    require(np.abs(far - exact(x)) <= limit, "a cap of 2**40 changes numbers below 1")
    require(np.array_equal(exact(soft_cap(x, None)), exact(x)), "no cap changes numbers")


HEADS = st.builds(
    lambda seed, heads, seq, half: np.random.default_rng(seed).standard_normal((2, 1, heads, seq, 2 * half)),
    st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 5), st.integers(1, 8),
)  # fmt: skip


@law(pair=HEADS, start=st.integers(0, 4000), shift=st.integers(0, 4000), needs=["operations"])
def rotation_keeps_lengths_and_distances(bench: Bench, pair: Array, start: int, shift: int) -> None:
    """Rotation keeps the length of every pair; the product of two rotated vectors depends only on their distance."""
    ops, (q, k) = bench.operations, pair
    half, places = q.shape[-1] // 2, start + np.arange(q.shape[2])[None]

    def rotate(x: Array, at: Array) -> Exact:
        return exact(ops["rotate"](x, *ops["rotary_tables"](at, 2 * half, 10000.0, like=x)))

    for x in (q, k):
        y = rotate(x, places)
        before, after = (z[..., :half] ** 2 + z[..., half:] ** 2 for z in (exact(x), y))
        # cos and sin are within 2 ulp, so cos**2 + sin**2 is within 16 u of 1.
        require(np.abs(after - before) <= 16 * 2.0**-53 * before + 1e-300, "a pair changes its length")
    scores = rotate(q, places) @ rotate(k, places).swapaxes(-1, -2)
    moved = rotate(q, places + shift) @ rotate(k, places + shift).swapaxes(-1, -2)
    size = np.linalg.norm(exact(q), axis=-1)[..., None] * np.linalg.norm(exact(k), axis=-1)[..., None, :]
    # Each angle has two float32 roundings (frequency and product), in query and key, at both places.
    limit = 8 * ANGLE * (start + shift + q.shape[2]) * size + 64 * 2.0**-53 * size
    require(np.abs(scores - moved) <= limit, f"scores change if both tokens are shifted by {shift}")


@law(pair=HEADS, needs=["operations"])
def position_zero_does_not_turn(bench: Bench, pair: Array) -> None:
    """At position 0 nothing is rotated; one step rotates the first pair by one radian, and each other pair by its
    angle."""
    ops, q = bench.operations, pair[0]
    half = q.shape[-1] // 2
    cos, sin = ops["rotary_tables"](np.array([[0, 1]]), 2 * half, 10000.0, like=q)
    require(np.array_equal(exact(cos)[0, 0, 0], np.ones(2 * half)), "the cosines at position 0 are not 1")
    require(not exact(sin)[0, 0, 0].any(), "the sines at position 0 are not 0")
    angles = np.tile(10000.0 ** (-np.arange(half) / half), 2)
    # The angle is a float32 number, two roundings away from the exact angle.
    near = np.abs(exact(sin)[0, 0, 1] - np.sin(angles)).max() <= 4 * ANGLE
    require(near, "the angles of position 1 are not theta ** (-2 i / head_dim)")


@law(x=any_numbers(6, 256), eps=st.sampled_from([1e-6, 1e-2]), needs=["operations"])
def rms_norm_has_unit_size_and_offset(bench: Bench, x: Array, eps: float) -> None:
    """The result does not depend on the size of the input (if eps grows too), and is multiplied by 1 + weight."""
    rms_norm, u = bench.operations["rms_norm"], 2.0**-8
    zero = np.zeros_like(x)
    y = rms_norm(x, zero, eps)
    require(type(y) is type(x) and y.dtype == x.dtype, f"rms_norm makes {type(y).__name__} of {type(x).__name__}")
    x64 = exact(x)
    expected = x64 / np.sqrt((x64**2).mean() + eps)
    tolerance = 4 * ROUNDOFF[dtype_name(x)] + 8 * (2.0**-53 if dtype_name(x) == "float64" else 2.0**-24)
    require(np.abs(exact(y) - expected) <= tolerance * np.abs(expected) + 2.0**-24, "not x / rms(x)")
    larger = exact(rms_norm(4 * x, zero, 16 * eps))
    require(np.abs(larger - exact(y)) <= 4 * u * np.abs(exact(y)) + 2.0**-24, "its size depends on the input's")
    require(not exact(rms_norm(x, zero - 1, eps)).any(), "a weight of -1 does not give 0")
    doubled = np.abs(exact(rms_norm(x, zero + 1, eps)) - 2 * exact(y))
    # This is exact, except for float16's smallest numbers, which lose half a step before doubling.
    require(doubled <= 2.0**-24, "a weight of 1 does not double")


@law(x=any_numbers(8, 80), hidden=st.lists(st.booleans(), min_size=8, max_size=8), needs=["operations"])
def softmax_sums_to_one_over_what_is_visible(bench: Bench, x: Array, hidden: list[bool]) -> None:
    """Rows sum to 1 over the visible keys and are 0 elsewhere; adding a number to all scores changes nothing."""
    softmax = bench.operations["softmax"]
    mask = ~np.array(hidden)[None, None, None]
    mask[..., 0] = True
    scores = x[None, None, None]
    probs = softmax(scores, mask)
    require(type(probs) is type(x) and probs.dtype == x.dtype, f"softmax makes {type(probs).__name__} of its input")
    p, u = exact(probs), ROUNDOFF[dtype_name(x)]
    require(not p[~mask].any(), "a hidden key has weight")
    # Scores are up to 80, and exp multiplies the rounding of its argument by up to 80.
    require(abs(p.sum() - 1) <= 12 * u, "the weights do not sum to 1")
    shifted = exact(softmax(np.clip(scores, -16, 16) + scores.dtype.type(0), mask))
    visible = np.where(mask, np.clip(exact(scores), -16, 16), -np.inf)
    by_hand = np.exp(visible - visible.max()) / np.exp(visible - visible.max()).sum()
    require(np.abs(shifted - by_hand) <= 80 * 2.0**-24 + 2 * u, "not exp(s) / sum of exp(s)")


@law(x=ANY_DTYPE.flatmap(activations), needs=["operations"])
def gelu_of_opposite_numbers_differs_by_the_number(bench: Bench, x: Array) -> None:
    """``gelu(x) - gelu(-x) = x``; GELU is between 0 and x for positive x, and at least -0.171."""
    gelu_tanh = bench.operations["gelu_tanh"]
    with np.errstate(over="ignore", invalid="ignore"):  # the cubes of the largest numbers overflow
        y, minus = gelu_tanh(x), gelu_tanh(-x)
    require(type(y) is type(x) and y.dtype == x.dtype, f"gelu_tanh makes {type(y).__name__} of {type(x).__name__}")
    u, x64 = ROUNDOFF[dtype_name(x)] + 2.0**-24, exact(x)
    difference = np.abs(exact(y) - exact(minus) - x64)
    require(difference <= 8 * u * np.abs(x64) + 2.0**-24, "gelu(x) - gelu(-x) is not x")
    require(exact(y) >= -0.171, "gelu is below its minimum of -0.170")
    middle = np.clip(x64, -8, 8)
    near = np.abs(exact(y) - gelu_by_hand(middle)) <= 8 * u * np.abs(middle) + 2.0**-24
    require(near[np.abs(x64) <= 8].all(), "not the tanh form of GELU")


@law(pair=HEADS, scale=st.sampled_from([0.25, 1.0, 2.0]), needs=["operations"])
def attention_scores_are_scaled_products(bench: Bench, pair: Array, scale: float) -> None:
    """``scores[i, j] = scale * sum_d q[i, d] k[j, d]``, exactly for whole numbers."""
    q, k = np.round(4 * pair)  # sums of such small whole numbers are exact in any order
    scores = exact(bench.operations["attention_scores"](q, k, scale))
    by_hand = scale * np.einsum("bhid,bhjd->bhij", q, k)
    require(np.array_equal(scores, by_hand), "scores are not scale * q k^T")


@law(pair=HEADS, groups=st.integers(1, 3), needs=["operations"])
def query_heads_share_in_order(bench: Bench, pair: Array, groups: int) -> None:
    """Query head ``h`` gets key/value head ``h // groups``."""
    k = pair[1]
    repeated = exact(bench.operations["repeat_kv"](k, groups))
    same = all(np.array_equal(repeated[:, head], k[:, head // groups]) for head in range(groups * k.shape[1]))
    require(repeated.shape[1] == groups * k.shape[1] and same, f"head h is not key/value head h // {groups}")


@law(pair=HEADS, biased=st.booleans(), needs=["operations"])
def linear_is_a_sum_of_products(bench: Bench, pair: Array, biased: bool) -> None:
    """``y[o] = sum_i x[i] w[o, i] + b[o]``, exactly for whole numbers."""
    x, weight = np.round(4 * pair[0]), np.round(4 * pair[1, 0, 0])
    bias = np.round(4 * pair[1, 0, 0, :, 0]) if biased else None
    y = exact(bench.operations["linear"](x, weight, bias))
    by_hand = np.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias)
    require(np.array_equal(y, by_hand), "linear is not x w^T + b")


@law(start=st.integers(0, 9), seq=st.integers(1, 9), window=st.integers(1, 9), needs=["operations"])
def masks_are_functions_of_places(bench: Bench, start: int, seq: int, window: int) -> None:
    """A query sees its own key and earlier keys; in a sliding layer, only the last ``window`` of these."""
    ops, queries, keys = bench.operations, start + np.arange(seq), np.arange(start + seq)
    full, sliding = ops["causal_mask"](queries, keys), ops["sliding_mask"](queries, keys, window)
    for row, query in enumerate(queries):
        require(full[row].tolist() == [key <= query for key in keys], f"query {query} of a full layer")
        seen = [query - window < key <= query for key in keys]
        require(sliding[row].tolist() == seen, f"query {query} of a sliding layer, window {window}")


# --- tokens, losses, files --------------------------------------------------------------------------------------------


def log_probabilities(logits: Exact) -> Exact:
    """Return log probabilities in float64, for the laws that compute by hand."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Exact = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


DRAW_COUNT = 4000


@law(scene=scenes(batch=(1, 1), seq=(1, 6), final_logit_softcapping=2.0), seed=st.integers(0, 2**16), needs=["sample"])
def draws_follow_the_probabilities(bench: Bench, scene: Scene, seed: int) -> None:
    """The frequencies of drawn tokens follow the softmax of the logits, by a chi-square test at five sigma."""
    model = bench.scene(scene)
    probabilities = np.exp(log_probabilities(model.logits(scene.ids)[0, -1]))
    drawn = np.asarray(bench.backend.sample(model.handle, scene.ids, DRAW_COUNT, seed))
    require(drawn.shape == (DRAW_COUNT,), f"{DRAW_COUNT} draws have shape {drawn.shape}")
    counts, expected = np.bincount(drawn, minlength=len(probabilities)), DRAW_COUNT * probabilities
    often = expected >= 5  # the test needs classes that are not rare, so rare classes are combined
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], max(expected[~often].sum(), 1e-9))
    counts, expected = (counts, expected) if expected[-1] >= 5 else (counts[:-1], expected[:-1])
    freedom = max(1, len(counts) - 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty 1931: the cube root of chi-square / freedom is nearly normal.
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
    require(statistic <= limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom; {limit:.1f} is 5 sigma")


@law(scene=scenes(kinds=["ordinary"], batch=(1, 1), seq=(1, 4), vocab_size=7), needs=["search"])
def a_search_with_all_beams_finds_the_best(bench: Bench, scene: Scene) -> None:
    """With one beam per token, a search over two tokens finds the most likely text; greedy decoding is never better.

    With fewer beams, greedy decoding may correctly find a better text.
    """
    model, ids, vocab = bench.scene(scene), scene.ids, scene.config.vocab_size
    first = log_probabilities(model.logits(ids)[0, -1])
    continued = np.concatenate([np.repeat(ids, vocab, axis=0), np.arange(vocab)[:, None]], axis=1)
    sums = first[:, None] + log_probabilities(model.logits(continued)[:, -1])
    greedy = int(first.argmax())
    text, score = bench.backend.search(model.handle, ids, vocab, 2)
    require(len(text) == ids.shape[1] + 2, f"two tokens after {ids.shape[1]} make {len(text)}")
    own = sums[text[-2], text[-1]]
    near = 1e-5 * (1 + abs(own))  # scores are float32 sums of two log probabilities
    require(abs(own - score) <= near, f"the score is {score}, but the log probability of the text is {own}")
    require(own >= sums.max() - near, f"the text found has {own}, the best {sums.max()}")
    require(own >= sums[greedy].max() - near, f"the text found has {own}, the greedy one {sums[greedy].max()}")


@st.composite
def _draw_labels(draw: st.DrawFn) -> dict[str, Any]:
    scene = draw(scenes(seq=(2, 9)))
    label = st.one_of(st.just(-100), st.integers(0, scene.config.vocab_size - 1))
    batch, seq = scene.ids.shape
    rows = st.lists(st.lists(label, min_size=seq, max_size=seq), min_size=batch, max_size=batch)
    return {"scene": scene, "labels": draw(rows)}


@law(_draw_labels(), ["loss"])
def the_loss_is_a_mean_cross_entropy(bench: Bench, scene: Scene, labels: list[list[int]]) -> None:
    """The loss is the mean of ``-log p(label)`` for the next token over labels that are not -100, or NaN if all are."""
    model, targets = bench.scene(scene), np.array(labels)
    told = log_probabilities(model.logits(scene.ids))
    taken = [
        -told[row, place - 1, targets[row, place]]
        for row in range(len(targets)) for place in range(1, targets.shape[1]) if targets[row, place] != -100
    ]  # fmt: skip
    loss = bench.backend.loss(model.handle, scene.ids, targets)
    by_hand = float(np.mean(taken)) if taken else math.nan
    both_nan = math.isnan(loss) and math.isnan(by_hand)
    require(both_nan or abs(loss - by_hand) <= 1e-6 * (1 + abs(by_hand)), f"the loss is {loss}, by hand {by_hand}")


# --- gradients --------------------------------------------------------------------------------------------------------


@st.composite
def _draw_taught(draw: st.DrawFn, /, batch: tuple[int, int] = (1, 2), **fixed: Any) -> dict[str, Any]:
    """Draw a model of ordinary weights, texts, and a place from 1: the first label of the second part.

    Neighbouring tokens differ. A query that sees only equal tokens has equal values, so the backward pass of softmax
    subtracts equal numbers, ``g - sum(p * g)``. The gradient of its scores is then nothing but the rounding of ``g``,
    which depends on the shape of the batch. Changed weights keep the values equal, so the tolerance would not show it.
    """
    scene = draw(scenes(kinds=("ordinary",), batch=batch, seq=(3, 9), **fixed))
    assume(np.all(scene.ids[:, 1:] != scene.ids[:, :-1]))
    return {"scene": scene, "place": draw(st.integers(2, scene.ids.shape[1] - 1))}


Gradients = Mapping[str, Array]
Learn = Callable[[LoadedModel], Gradients]


def learn(model: LoadedModel, ids: Array, labels: Array, items: float, mask: Array | None = None) -> Gradients:
    """Return the backend's gradients of the sum of the losses, divided by `items`."""
    found: Gradients = model.bench.backend.gradients(model.handle, ids, labels, mask, items)
    missing = sorted(model.tensors.keys() - found.keys())
    require(not missing, f"there is no gradient of {missing[:3]}")
    return {name: exact(found[name]) for name in model.tensors}


def same_gradients(bench: Bench, model: LoadedModel, ask: Learn, other: Gradients, says: str, angle: float = 0) -> None:
    """Require that the gradients of `ask` are `other`, weight by weight, up to rounding."""
    known: dict[int, Gradients] = {}

    def ask_for(name: str) -> Callable[[LoadedModel], Array]:
        def of(m: LoadedModel) -> Array:
            if id(m) not in known:
                known[id(m)] = ask(m)
            return known[id(m)][name]

        return of

    for name, expected in other.items():
        bench.same(model, ask_for(name), expected, f"the gradient of {name}, {says}", angle)


def labels_in(scene: Scene, first: int, end: int) -> Array:
    """Return the tokens of a scene as labels, those from place `first` to before `end`; the others do not count."""
    labels = np.full(scene.ids.shape, -100)
    labels[:, first:end] = scene.ids[:, first:end]
    return labels


@law(_draw_taught(), ["gradients"])
def gradients_of_two_parts_of_the_labels_add_up(bench: Bench, scene: Scene, place: int) -> None:
    """The gradient of all labels is the sum of those of two parts, if all are divided by the same number."""
    model, items = bench.scene(scene), float(scene.ids.size)
    end = scene.ids.shape[1]
    parts = [learn(model, scene.ids, labels_in(scene, *part), items) for part in ((1, place), (place, end))]
    summed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    same_gradients(bench, model, lambda m: learn(m, scene.ids, labels_in(scene, 1, end), items), summed,
                   "and the sum of those of two parts of the labels")  # fmt: skip


@law(_draw_taught(batch=(2, 3)), ["gradients"])
def gradients_of_the_rows_of_a_batch_add_up(bench: Bench, scene: Scene, place: int) -> None:
    """The gradient of a batch is the sum of its rows' gradients, if all are divided by the number of all labels."""
    model, labels = bench.scene(scene), labels_in(scene, 1, scene.ids.shape[1])
    labels[0, place:] = -100  # so that the rows have different numbers of labels
    items = float(np.sum(labels != -100))
    rows = [learn(model, scene.ids[row : row + 1], labels[row : row + 1], items) for row in range(len(labels))]
    summed = {name: np.asarray(sum(row[name] for row in rows)) for name in rows[0]}
    same_gradients(bench, model, lambda m: learn(m, scene.ids, labels, items), summed, "and the sum of its rows'")


@law(_draw_taught(), ["gradients"])
def the_number_of_items_divides_gradients(bench: Bench, scene: Scene, place: int) -> None:
    """Twice the number of items gives half of each gradient; the labels' own number is the mean."""
    model, labels = bench.scene(scene), labels_in(scene, 1, place)
    items = float(np.sum(labels != -100))
    twice = learn(model, scene.ids, labels, 2 * items)
    same_gradients(bench, model, lambda m: learn(m, scene.ids, labels, items),
                   {name: 2 * x for name, x in twice.items()}, "and twice that for twice the items")  # fmt: skip


@law(_draw_taught(), ["gradients"])
def tokens_after_the_last_label_teach_nothing(bench: Bench, scene: Scene, place: int) -> None:
    """Tokens from the last label on change no gradient, if that label stays."""
    model, labels = bench.scene(scene), labels_in(scene, 1, place)
    other = np.array(scene.ids)
    other[:, place - 1 :] = (other[:, place - 1 :] + 1) % scene.config.vocab_size
    items = float(np.sum(labels != -100))
    same_gradients(bench, model, lambda m: learn(m, scene.ids, labels, items), learn(model, other, labels, items),
                   "and with other tokens after the last that predicts a label")  # fmt: skip


@law(_draw_taught(tie_word_embeddings=True), ["gradients"])
def a_tied_table_learns_as_embedding_and_as_head(bench: Bench, scene: Scene, place: int) -> None:
    """The gradient of a tied table is the sum of the two gradients of an equal embedding and head."""
    model, ids, labels = bench.scene(scene), scene.ids, labels_in(scene, 1, place)
    apart = bench.model(
        scene.config.changed(tie_word_embeddings=False), dict(model.tensors) | {HEAD: model.tensors[EMBED]}
    )
    items = float(np.sum(labels != -100))
    both = dict(learn(apart, ids, labels, items))
    both[EMBED] = both[EMBED] + both.pop(HEAD)
    same_gradients(bench, model, lambda m: learn(m, ids, labels, items), both, "and that of an equal untied model")


@law(_draw_taught(), ["gradients", "padding"])
def padding_changes_no_gradient(bench: Bench, scene: Scene, place: int) -> None:
    """Texts with padding at either side, whose labels do not count, have the same gradients as without."""
    model, labels, batch = bench.scene(scene), labels_in(scene, 1, scene.ids.shape[1]), len(scene.ids)
    items, more = float(np.sum(labels != -100)), place - 1
    for side, widths in (("right", ((0, 0), (0, more))), ("left", ((0, 0), (more, 0)))):
        ids = np.pad(scene.ids, widths, constant_values=1)
        mask = np.array([padding_mask(ids.shape[1], more, side)] * batch)
        padded_labels = np.pad(labels, widths, constant_values=-100)
        padded = learn(model, ids, padded_labels, items, mask)
        angle = ANGLE * ids.shape[1] if side == "left" else 0.0
        same_gradients(bench, model, lambda m: learn(m, scene.ids, labels, items), padded,
                       f"and with {more} padding tokens at the {side}", angle)  # fmt: skip


@law(_draw_taught(), ["gradients", "loss", "dtype:float64"])
def the_gradient_is_the_slope_of_the_loss(bench: Bench, scene: Scene, place: int) -> None:
    """A small change of a weight changes the loss by its product with the gradient, to first order.

    The change is along the gradient and in a random direction, because a gradient of 0 gives no direction.
    """
    model, labels = bench.scene(scene), labels_in(scene, 1, place)
    grads = learn(model, scene.ids, labels, float(np.sum(labels != -100)))
    rng = np.random.default_rng(scene.seed)
    moves = {name: x / max(float(np.abs(x).max()), 1e-300) + rng.standard_normal(x.shape) for name, x in grads.items()}
    if scene.config.pad_token_id is not None:
        moves[EMBED][scene.config.pad_token_id] = 0  # PyTorch does not train this row as an embedding

    def slope(name: str, step: float) -> tuple[float, float]:
        """Return the change of the loss between two models, and the change that the gradient gives."""
        both = [(model.tensors[name] + sign * step * moves[name]).astype(np.float32) for sign in (1, -1)]
        up, down = (bench.backend.loss(bench.scene(scene, {name: x}).handle, scene.ids, labels) for x in both)
        return up - down, float(np.sum(grads[name] * (exact(both[0]) - exact(both[1]))))

    for name in list(grads)[place % 3 :: 3]:  # a third of the weights in each example: four models are loaded for one
        (far, of_far), (near, of_near) = slope(name, 2.0**-13), slope(name, 2.0**-14)
        # The error of a central difference falls with the square of the step: the wider one shows it.
        truncation = abs(far / 2 - near) + 1e-3 * abs(of_far / 2 - of_near)
        require(abs(near - of_near) <= truncation + 1e-5 * abs(of_near) + 1e-11,
                f"a small change of {name} changes the loss by {near:.6g}, not {of_near:.6g}")  # fmt: skip


@law(scene=scenes(seq=(1, 5)), needs=["save"])
def what_is_saved_is_loaded_again(bench: Bench, scene: Scene) -> None:
    """A saved and loaded model has the same logits bit for bit."""
    for dtype in bench.can.dtypes:
        model, folder = bench.scene(scene, dtype=dtype), bench.new_folder()
        bench.backend.save(model.handle, folder)
        again = bench.backend.forward(bench.backend.load(folder, dtype), scene.ids).logits
        same = np.array_equal(model.logits(scene.ids), exact(again), equal_nan=True)
        require(same, f"a model saved in {dtype} and loaded again has different logits")


@law(text=texts(), needs=["tokenizer"])
def a_text_comes_back(bench: Bench, text: str) -> None:
    """Decoding the ids of any text gives the same text; no id is outside the vocabulary.

    The exception is U+2581, SentencePiece's mark for a space, which becomes a space. With special tokens, `encode`
    gives one ``<bos>``, then the text.
    """
    tokenizer = bench.backend.tokenizer(find_model("tiny"))
    for split in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
        require(all(0 <= token < len(tokenizer) for token in ids), "an id is outside the vocabulary")
        back = tokenizer.decode(ids)
        require(back == text.replace("\u2581", " "), f"{text!r} is decoded as {back!r}")
        if split:
            require(not set(ids) & set(tokenizer.all_special_ids), f"{text!r} as plain text gave a special token")
        prompt = tokenizer.encode(text, split_special_tokens=split)
        once = prompt[1:] == ids and tokenizer.decode(prompt[:1]) == "<bos>"
        require(once, f"the prompt of {text!r} is not one <bos> and the text, but {tokenizer.decode(prompt)!r}")


@law(messages=chat_messages(), prompt=st.booleans(), needs=["tokenizer"])
def a_chat_is_written_in_turns(bench: Bench, messages: list[dict[str, str]], prompt: bool) -> None:
    """A chat becomes one ``<bos>`` and the trimmed turns, as text and as ids; the assistant's role becomes model."""
    tokenizer = bench.backend.tokenizer(find_model("tiny"))
    names = {"user": "user", "assistant": "model"}
    turns = [f"<start_of_turn>{names[m['role']]}\n{m['content'].strip()}<end_of_turn>\n" for m in messages]
    by_hand = "<bos>" + "".join(turns) + ("<start_of_turn>model\n" if prompt else "")
    told = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    require(told == by_hand, f"the chat is {told!r}; it must be {by_hand!r}")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    require(
        ids == tokenizer.encode(by_hand, add_special_tokens=False), f"its ids are decoded as {tokenizer.decode(ids)!r}"
    )


LAWS: Mapping[str, Law] = {name: value for name, value in list(globals().items()) if isinstance(value, Law)}
