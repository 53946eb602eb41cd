# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Sliding windows and the cache
#
# Attention compares every token with every earlier token, which is expensive for long texts. Two methods reduce the
# cost in Gemma 2: every second layer looks back only a short way, and results for earlier tokens are kept. You need
# from notebook 2: *query*, *key*, *value* and their *heads*, the *causal mask* (a token sees its own place and earlier
# places), *port* (a reimplementation of the model in another program).
#
# ![Drawing of the model: the two masks and the alternating blocks are lit](pictures/model-05.svg)
#
# The two masks are highlighted, and the blocks, which use the two masks in turn.

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma import ops
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
config.sliding_window, config.layer_types

# %% [markdown]
# ## Two kinds of layers
#
# In a **full** layer, a token sees all keys up to its own place. In a **sliding** layer, it sees only the last `window`
# of these keys, including its own key:
#
# $$\text{full: } j \le i \qquad\qquad \text{sliding: } i - \mathrm{window} < j \le i$$
#
# The two kinds alternate, and a sliding layer comes first. The window is 4096 tokens in the released models and 64 in
# the tiny one. (The two kinds of layers, or blocks, differ only in attention; all other parts are the same.)

# %%
places = np.arange(12)
full = ops.causal_mask(places, places)
sliding = ops.sliding_mask(places, places, window=4)

assert full.shape == sliding.shape == (12, 12)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
viz.mask_picture(full, places, places, "full layer", axes=left)
_ = viz.mask_picture(sliding, places, places, "sliding layer, window 4", axes=right)


# %% [markdown]
# **Question.** How many keys does the query at place 2 see in each kind of layer? And at place 9?
#
# <details><summary>Answer</summary>
# Place 2: three in both, because the window is not full yet. Place 9: ten in the full layer, and four in the sliding
# one. A text shorter than the window cannot reveal a mistake in the window. Therefore several programs passed their
# tests although they had no sliding layers at all.
# </details>
#
# ## How far information travels
#
# If a sliding layer cannot see a token, the token's information is not lost. An earlier layer may have passed this
# information to a token that the sliding layer sees. After two sliding layers, information can come from up to
# $2 (\mathrm{window} - 1)$ places back. A full layer reaches every earlier place.


# %%
def reach(masks):
    """Which input can influence which output, through layers with these masks."""
    known = np.eye(len(masks[0]), dtype=bool)
    for mask in masks:
        known = (mask.astype(int) @ known.astype(int)) > 0
    return known


places = np.arange(20)
window = ops.sliding_mask(places, places, window=4)
figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for count, axes in enumerate(panels, start=1):
    known = reach([window] * count)
    assert known.shape == (20, 20)
    title = f"{count} sliding layer{'s' * (count > 1)}"
    viz.mask_picture(known, places, places, title, axes=axes)
    axes.set(xlabel="place of the input", ylabel="place of the output")

# %% [markdown]
# ## One token at a time
#
# To write a text, the model predicts the next token, appends it to the text, and repeats these two steps. The results
# for earlier tokens do not change, because an earlier token cannot see the new token. So the keys and values of earlier
# tokens are kept in the **cache**, and each step computes only one token. The text that the model continues is the
# **prompt**. Reading the whole prompt at once is called **prefill**; continuing by single tokens is called
# **decoding**.
#
# $$k_{\text{all}} = [\,k_{\text{cache}},\; k_{\text{new}}\,] \qquad v_{\text{all}} = [\,v_{\text{cache}},\;
# v_{\text{new}}\,]$$

# %%
text = "There was once a little princess who lived in a great castle by the sea. " * 6
ids = tiny.tokenizer.encode(text)[:90]
whole = refgemma.forward([ids], weights, config)

start = refgemma.forward([ids[:80]], weights, config)  # prefill
cache, logits = start.cache, [start.logits]
for token in ids[80:]:
    # Decoding: one token, and the cache.
    step = refgemma.forward([[token]], weights, config, cache=cache)
    cache, logits = step.cache, [*logits, step.logits]

in_steps = np.concatenate(logits, axis=1)
assert in_steps.shape == whole.logits.shape == (1, 90, config.vocab_size)
float(np.abs(in_steps - whole.logits).max())

# %% [markdown]
# The two agree up to rounding. Their last digits differ, because the computer adds the terms of a sum in another order
# if the arrays have other lengths.
#
# **Question.** Why are queries not kept?
#
# <details><summary>Answer</summary>
# A query is used only once, when its token looks. Every later token uses the keys and values again.
# </details>
#
# ## The cache of a sliding layer
#
# A sliding layer need not keep a key that no later query can see. The next query, at place $i$, sees the keys from
# $i - \mathrm{window} + 1$ to $i$. The key at place $i$ comes from the query's own token, not from the cache. So
# `window - 1` keys are enough, 63 here.

# %%
for number, layer in enumerate(cache):
    kind = "sliding" if config.is_sliding(number) else "full"
    kept = layer.keys.shape[2]
    shape = (1, config.num_key_value_heads, kept, config.head_dim)
    assert layer.keys.shape == layer.values.shape == shape
    places = f"places {layer.start} to {layer.stop - 1}"
    print(f"layer {number} ({kind:7s}): {places}, {kept} keys")

# %% [markdown]
# What goes wrong if one key fewer is kept? Only the oldest key of the window is missing, in every second layer. The
# next cell tries it: a model with a window of 63 keeps 62 keys. Its logits differ from the 64th token on, but not
# before.

# %%
short = refgemma.forward([ids], weights, config.changed(sliding_window=63))
apart = np.abs(short.logits - whole.logits)[0].max(axis=-1)

assert apart.shape == (len(ids),)
axes = viz.new_axes(7, 2.8)
axes.plot(apart)
axes.axvline(63, linestyle="--", color="grey", label="64th token")
axes.set(xlabel="place", ylabel="largest difference of a logit")
axes.set_title("logits with a window one too short")
_ = axes.legend()


# %% [markdown]
# **Question.** A port passes all tests with texts of 50 tokens on this model. What do these tests show about its
# window?
#
# <details><summary>Answer</summary>
# Only that it is at least 50.
# </details>
#
# ## The cost of the cache
#
# For each kept token, each layer and each key/value head, the cache holds a key and a value (the first 2 in the
# formula). Each of them has `head_dim` numbers of 2 bytes (the second 2). Gemma's numbers of 2 bytes are called
# bfloat16 (notebook 7). The picture uses the unit GiB, which is $2^{30}$ bytes. The configurations of the released
# models are in the package, as *presets*.
#
# $$\text{bytes} = 2 \cdot 2 \cdot \mathrm{kv\_heads} \cdot \mathrm{head\_dim} \cdot \sum_{\text{layers}} \text{tokens
# kept}$$


# %%
def cache_bytes(config, tokens, windows=True):
    last = config.sliding_window - 1
    kept = [
        min(tokens, last) if windows and config.is_sliding(n) else tokens
        for n in range(config.num_hidden_layers)
    ]
    return 2 * 2 * config.num_key_value_heads * config.head_dim * sum(kept)


nine = refgemma.Gemma2Config.preset("9b")
lengths = np.arange(256, 8193, 256)
axes = viz.new_axes(6.4, 3)
for label, windows in (("all layers full", False), ("every second layer slides", True)):
    sizes = np.array([cache_bytes(nine, int(n), windows) for n in lengths]) / 2**30
    assert sizes.shape == lengths.shape
    axes.plot(lengths, sizes, label=label)
axes.set(xlabel="tokens", ylabel="GiB", title="cache of the 9B, one text, bfloat16")
_ = axes.legend()

# %% [markdown]
# **Question.** Gemma 2 was designed for texts of up to 8192 tokens. At this length, how much memory do the windows
# save? Why not half?
#
# <details><summary>Answer</summary>
# A quarter: half of the layers keep half of the tokens. The saving would approach one half for texts much longer than
# the window.
# </details>
#
# ## Exercise
#
# `sliding_mask` takes the places of queries and the places of keys, which can be different. It returns an array that is
# true where a query may see a key. In the next cell, replace the line `raise NotImplementedError`, run the cell, and
# read the result of the check.

# %%
from refgemma.teach import exercises


def sliding_mask(q_places, k_places, window):
    raise NotImplementedError


exercises.check_sliding_mask(sliding_mask)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def sliding_mask(q_places, k_places, window):
#     distance = q_places[:, None] - k_places
#     seen = (distance >= 0) & (distance < window)
#     return seen
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Longformer](https://arxiv.org/abs/2004.05150) (Beltagy et al. 2020) on sliding windows.
