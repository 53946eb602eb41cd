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
# # 2. Attention, shared heads, and attention patterns
#
# Attention is the part of a transformer (the kind of model that Gemma is) in which a token looks at earlier tokens.
# You need from notebook 1: *token*, *block* or *layer*, *residual stream* (the vector of a token that all blocks read
# and add to), *norm* (brings a vector to a standard size), *softmax* (scores to probabilities).
#
# ![Drawing of the model: attention is lit: heads, scores, mask, average of values](pictures/model-02.svg)
#
# The drawing is the same in each notebook. Here attention is highlighted, without its rotation and cap.

# %%
import numpy as np

import refgemma
from refgemma import ops
from refgemma.layers import split_heads
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
text = "There was once a little princess who lived in a great castle by the sea."
ids = tiny.tokenizer.encode(text)
tokens, seq = tiny.tokenizer.convert_ids_to_tokens(ids), len(ids)
run = refgemma.forward([ids], weights, config)

# %% [markdown]
# ## Queries, keys, values
#
# Three matrices turn each token's normalised stream $x$ into three vectors. The **query** describes the information
# that the token looks for. The **key** describes the information that it offers. The **value** is the information
# that it passes on:
#
# $$q = W_q x \qquad k = W_k x \qquad v = W_v x$$
#
# This happens several times in parallel, in **heads**. Each head has its own part of the matrices, and its vectors have
# `head_dim` numbers (32 here). The tiny model has 6 query heads, and only 2 key/value heads. The product with a matrix
# has the vectors of all heads side by side; `split_heads` returns an array with a separate axis for the heads.

# %%
heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
head_dim = config.head_dim
layer, seen = weights.layers[3], run.layers[3]
x = seen.input_layernorm
q = split_heads(ops.linear(x, layer.q_proj), head_dim)
k = split_heads(ops.linear(x, layer.k_proj), head_dim)
v = split_heads(ops.linear(x, layer.v_proj), head_dim)

assert q.shape == (1, heads, seq, head_dim)
assert k.shape == v.shape == (1, kv_heads, seq, head_dim)
assert np.array_equal(q, seen.attention.q) and np.array_equal(k, seen.attention.k)
heads, kv_heads, heads // kv_heads

# %% [markdown]
# ## Shared key heads
#
# Query heads 0, 1, 2 look at key head 0, and 3, 4, 5 at key head 1. This is **grouped-query attention** (GQA). The keys
# and values of all earlier tokens must stay in memory, so fewer key/value heads save memory (notebook 5).
#
# $$\text{query head } h \text{ uses key head } \lfloor h / \mathrm{groups} \rfloor, \qquad \mathrm{groups} =
# \mathrm{heads} / \mathrm{kv\_heads}$$
#
# Before queries and keys are compared, they are rotated by an angle that depends on their place in the text (notebook
# 3). In the record, the rotated queries and keys are called `q_rot` and `k_rot`. From here on, this notebook takes them
# from the record instead of `q` and `k`.

# %%
groups = heads // kv_heads
keys = ops.repeat_kv(seen.attention.k_rot, groups)

assert keys.shape == (1, heads, seq, head_dim)
[[h, h // groups] for h in range(heads)]  # query head, and the key head that it uses

# %% [markdown]
# **Question.** You could also repeat the heads as 0, 1, 0, 1, 0, 1 (`np.tile`). All shapes would fit. What would
# happen?
#
# <details><summary>Answer</summary>
# Two of the six query heads, 1 and 4, would look at keys that they were not trained with; in the 9B it would be 14 of
# 16. No error appears, but the answers get worse: the right next token of this text becomes less likely, by a factor of
# 0.72 on (geometric) average. This mistake has happened in <b>ports</b> (reimplementations of the model in other
# programs). The exercise below is about it.
# </details>
#
# ## Scores
#
# The product of a query and a key measures how well they fit. This product is divided by a constant, so that it does
# not grow with `head_dim`:
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{\mathrm{query\_pre\_attn\_scalar}}}$$
#
# (A sum of $n$ random products of size 1 has a size of about $\sqrt n$. The constant compensates for this.)
#
# In many models the constant under the root is `head_dim`. In Gemma 2 it is a separate number: 256 in the 2B and the
# 9B, equal to their `head_dim`, but 144 in the 27B, whose heads have 128 numbers. There it is `hidden` divided by the
# number of heads, 4608 / 32. The tiny model follows the 27B: 234 / 6 = 39. A smooth function then keeps the scores
# between −50 and 50 (notebook 4). In the record, the result is called `capped`.

# %%
scale = config.query_pre_attn_scalar**-0.5
scores = seen.attention.q_rot @ keys.swapaxes(-1, -2) * scale

assert scores.shape == (1, heads, seq, seq)  # a number for each query and each key
config.query_pre_attn_scalar, head_dim, float(np.abs(scores).max())

# %% [markdown]
# **Question.** Suppose the constant is removed, so that the scores are √39 ≈ 6.2 times as large. What does the softmax
# return for them? (Leave the cap out.)
#
# <details><summary>Answer</summary>
# More than 90 % of a row goes to its best key, on average over the heads of this block; with the constant it is 69 %.
# If the scores are large, the softmax nearly picks the maximum. Its result then hardly changes if a score changes: the
# slope is almost 0, and training has little to learn from.
# </details>

# %% [markdown]
# ## Only the past
#
# During training, the model must predict the next token at every place, so a token must not see the next token. A
# **mask** marks the keys that a query may see. The **causal** mask allows the keys at the query's own place and at
# earlier places. Masked keys get the probability 0. The softmax of the other scores, after the cap ($c_{ij}$, in
# the record `capped`), gives the other probabilities, whose sum is 1:
#
# $$p_{ij} = \frac{e^{c_{ij}}}{\sum_{k \le i} e^{c_{ik}}} \;\text{ for } j \le i, \text{ else } 0$$

# %%
places = np.arange(seq)
mask = ops.causal_mask(places, places)
probs = ops.softmax(seen.attention.capped, mask[None, None])

assert mask.shape == (seq, seq) and probs.shape == (1, heads, seq, seq)
assert np.array_equal(probs, seen.attention.probs)
_ = viz.mask_picture(mask, places, places, "causal mask: dark may be seen")

# %% [markdown]
# ## Mixing
#
# Every query averages the values of the keys that it sees, with the weights $p$. The results of all heads are placed
# side by side, and a last matrix brings them back to `hidden` numbers. Three query heads share a value head, as they
# share a key head: `repeat_kv` returns the value $v^h$ of each query head $h$.
#
# $$\mathrm{attention}(x)_i = W_o \; \mathrm{concat}_h \Big(\sum_j p^h_{ij}\, v^h_j\Big)$$

# %%
mixed = probs @ ops.repeat_kv(v, groups)
side_by_side = mixed.swapaxes(1, 2).reshape(1, seq, heads * head_dim)
out = ops.linear(side_by_side, layer.o_proj)

# 192 numbers: this need not be hidden, which is 234.
assert side_by_side.shape == (1, seq, heads * head_dim)
assert out.shape == (1, seq, config.hidden_size)
assert np.allclose(out, seen.attention.out, atol=1e-5)

# %% [markdown]
# ## Attention patterns
#
# Each row of these pictures shows where one query looks. Head 0 of block 2 mostly looks at the token just before (80 %
# of its attention). Head 0 of block 3 looks at `<bos>` (94 %). One row is an exception: from `·great`, this head looks
# at all earlier tokens. The probabilities of a query must have the sum 1, so a head that finds nothing relevant must
# still look *somewhere*. Trained models then use the first token. It is called an **attention sink**.

# %%
from matplotlib import pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
before, sink = (run.layers[block].attention.probs[0, 0] for block in (2, 3))
viz.attention_map(before, tokens, title="block 2, head 0: the token before", axes=left)
_ = viz.attention_map(sink, tokens, title="block 3, head 0: a sink", axes=right)

# %% [markdown]
# Look at the other heads yourself. In Jupyter there are two sliders below the picture. On the website,
# <a href="../live.html">the live page</a> shows all heads.


# %%
def one_head(block, head):
    probs = run.layers[block].attention.probs[0, head]
    return viz.attention_map(probs, tokens, title=f"block {block}, head {head}")


_ = viz.with_sliders(one_head, block=range(config.num_hidden_layers), head=range(heads))

# %% [markdown]
# To see all heads at once, the next cell measures three shares of the attention: on the token before, on the token
# itself and on `<bos>`. The shares are averaged over all queries except the first.

# %%
probs = np.stack([block.attention.probs[0] for block in run.layers])
assert probs.shape == (config.num_hidden_layers, heads, seq, seq)

later = places[1:]
habits = {
    "the token before": probs[:, :, later, later - 1],
    "itself": probs[:, :, later, later],
    "<bos>": probs[:, :, later, 0],
}
figure, all_axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for axes, (habit, shares) in zip(all_axes, habits.items(), strict=True):
    image = axes.imshow(shares.mean(axis=-1), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=habit, xlabel="head", ylabel="block")
_ = figure.colorbar(image, ax=all_axes, label="mean share of the attention")

# %% [markdown]
# **Question.** Does a high share prove that the model *uses* the token that it looks at?
#
# To find out, the next cell switches a head off and compares the answers. The numbers of a head go through `head_dim`
# columns of $W_o$, so these columns are set to 0. (Switching off a part to find its effect is called **ablation**.) The
# result is the share of the probability that moves to other next tokens, averaged over the places after `<bos>`. (It is
# half of the sum of all changes, because one token gains as much as the others lose.)

# %%
from dataclasses import replace


def without_head(block, head):
    """The probabilities of the next token if one head adds nothing."""
    silent = weights.layers[block].o_proj.copy()
    silent[:, head * head_dim : (head + 1) * head_dim] = 0
    layers = list(weights.layers)
    layers[block] = replace(layers[block], o_proj=silent)
    ablated = refgemma.forward([ids], replace(weights, layers=layers), config)
    return viz.probabilities(ablated.logits[0])


normal = viz.probabilities(run.logits[0])
moved = np.zeros((config.num_hidden_layers, heads))
for block, head in np.ndindex(moved.shape):
    change = np.abs(without_head(block, head) - normal)
    moved[block, head] = change.sum(axis=-1)[1:].mean() / 2

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
share = habits["<bos>"].mean(axis=-1)
pictures = ((left, share, "share of <bos>"), (right, moved, "moved if ablated"))
for axes, image, title in pictures:
    figure.colorbar(axes.imshow(image, cmap="Blues", vmin=0), ax=axes)
    axes.set(title=title, xlabel="head", ylabel="block")
print(f"moved at most: {moved.max():.1%}")

# %% [markdown]
# <details><summary>Answer</summary>
# No. Head 0 of block 3 spends 94 % of its attention on <code>&lt;bos&gt;</code>, but without this head only 3 % of the
# probability moves. Head 4 of block 2 matters most, with 16.5 %. The reason is not a small value of
# <code>&lt;bos&gt;</code>: its length is 4.85, and the other values have a mean of 4.75. But <code>&lt;bos&gt;</code>
# sees only itself, so its value is the same vector in every text. So the vector that this head adds says almost nothing
# about the text.
# </details>
#
# ## Exercise
#
# `repeat_kv` repeats the key heads, so that every query head has its key head. The array `x` has the axes (batch,
# kv_heads, keys, head_dim). In the next cell, replace the line `raise NotImplementedError`, run the cell, and read the
# result of the check. `exercises.hint("repeat_kv")` gives a hint.

# %%
from refgemma.teach import exercises


def repeat_kv(x, groups):
    raise NotImplementedError


exercises.check_repeat_kv(repeat_kv)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def repeat_kv(x, groups):
#     return np.repeat(x, groups, axis=1)
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Grouped-query attention](https://arxiv.org/abs/2305.13245) (Ainslie et al. 2023);
# [attention sinks](https://arxiv.org/abs/2309.17453) (Xiao et al. 2023).
