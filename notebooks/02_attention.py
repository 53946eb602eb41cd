# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Attention, shared heads, and what heads look at
#
# Attention is the part of a transformer (the kind of model that Gemma is) where a token looks at the tokens before
# it. You should have seen notebook 1: *token*, *block* or *layer*, *residual stream* (the vector of a token that all
# blocks read and add to), *norm* (brings a vector to a standard size), *softmax* (scores to probabilities).

# %%
import numpy as np

import refgemma
from refgemma import ops
from refgemma.layers import split_heads
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
ids = tiny.tokenizer.encode("Once upon a time there was a little princess who lived in a great castle by the sea.")
tokens, seq = tiny.tokenizer.convert_ids_to_tokens(ids), len(ids)
run = refgemma.forward([ids], weights, config)

# %% [markdown]
# ## Queries, keys, values
#
# Each token makes three vectors of its (normed) stream $x$, by three matrices. The **query** says what it looks for,
# the **key** what it has to offer, the **value** what it hands over if it is looked at:
#
# $$q = W_q x \qquad k = W_k x \qquad v = W_v x$$
#
# This is done several times side by side, in **heads**: each has its own part of the matrices and vectors of
# `head_dim` numbers (32 here). The tiny model has 6 query heads, and only 2 key/value heads. `split_heads` cuts what
# a matrix gives for each token, heads side by side, into an array with an axis of heads.

# %%
heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
layer, seen = weights.layers[3], run.layers[3]
x = seen.input_layernorm
q = split_heads(ops.linear(x, layer.q_proj), head_dim)
k = split_heads(ops.linear(x, layer.k_proj), head_dim)
v = split_heads(ops.linear(x, layer.v_proj), head_dim)

assert q.shape == (1, heads, seq, head_dim)
assert k.shape == v.shape == (1, kv_heads, seq, head_dim)
assert np.array_equal(q, seen.attention.q)
heads, kv_heads, heads // kv_heads

# %% [markdown]
# ## Shared key heads
#
# Query heads 0, 1, 2 look at key head 0, and 3, 4, 5 at key head 1. This is **grouped-query attention** (GQA): the
# keys and values of all tokens so far must be kept in memory, so having fewer of them saves memory (notebook 5).
#
# $$\text{query head } h \text{ uses key head } \lfloor h / \mathrm{groups} \rfloor, \qquad \mathrm{groups} =
# \mathrm{heads} / \mathrm{kv\_heads}$$
#
# Before they are compared, queries and keys are turned by an angle that depends on their place in the text (notebook
# 3); the record has them as `q_rot` and `k_rot`.

# %%
groups = heads // kv_heads
keys = ops.repeat_kv(seen.attention.k_rot, groups)

assert keys.shape == (1, heads, seq, head_dim)
assert np.array_equal(keys[:, 0], keys[:, 2]) and np.array_equal(keys[:, 3], keys[:, 5])
assert not np.array_equal(keys[:, 2], keys[:, 3])

# %% [markdown]
# **Question.** One could also repeat the heads as 0, 1, 0, 1, 0, 1 (`np.tile`). All shapes would fit. What would
# happen?
#
# <details><summary>Answer</summary>
# Four of the six query heads would look at keys they were not trained with. Nothing fails; the text is nonsense. This
# has happened in **ports** (the model written anew in other programs), and one of the exercises below is about it.
# </details>
#
# ## Scores
#
# How well a query fits a key is their product, made smaller by a constant so that it does not grow with `head_dim`:
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{\mathrm{query\_pre\_attn\_scalar}}}$$
#
# (The constant is there because a sum of many products of random numbers is large: of $n$ products with the size 1
# about $\sqrt n$.)
#
# In many models that constant is `head_dim`. In Gemma 2 it is a number of its own: 144 in the 27B, whose heads have
# 128 numbers. The scores are bent so that none leaves ±50 (notebook 4), which the record calls `capped`.

# %%
scores = seen.attention.q_rot @ keys.swapaxes(-1, -2) * config.query_pre_attn_scalar**-0.5

assert scores.shape == (1, heads, seq, seq)  # a number for each query and each key
assert np.allclose(scores, seen.attention.scores, atol=1e-4)
config.query_pre_attn_scalar, head_dim, float(np.abs(scores).max())

# %% [markdown]
# **Question.** Take the constant away. What would the softmax make of scores that are six times as large?
#
# <details><summary>Answer</summary>
# Nearly all of each row goes to its best key: the softmax of large scores is close to picking the maximum. Then there
# is hardly any slope left to learn from.
# </details>

# %% [markdown]
# ## Only the past
#
# When the model is trained, every token has to guess the next one, so it must not see it. A **mask** says which keys
# a query may see: those at its own place and before. That is the **causal** mask. What is masked gets the probability
# 0, and the rest share 1 by the softmax of their scores (the bent ones, `capped`):
#
# $$p_{ij} = \frac{e^{s_{ij}}}{\sum_{k \le i} e^{s_{ik}}} \;\text{ for } j \le i, \text{ else } 0$$

# %%
places = np.arange(seq)
mask = ops.causal_mask(places, places)
probs = ops.softmax(seen.attention.capped, mask[None, None])

assert mask.shape == (seq, seq) and probs.shape == (1, heads, seq, seq)
assert np.allclose(probs.sum(axis=-1), 1, atol=1e-6)
assert np.array_equal(probs, seen.attention.probs)
_ = viz.mask_picture(mask, places, places, "causal mask: dark may be seen")

# %% [markdown]
# ## Mixing
#
# Every query takes the values of the keys it looks at, in the shares $p$. The results of all heads are put side by
# side, and a last matrix brings them back to `hidden` numbers:
#
# $$\mathrm{attention}(x)_i = W_o \; \mathrm{concat}_h \Big(\sum_j p^h_{ij}\, v^h_j\Big)$$

# %%
mixed = probs @ ops.repeat_kv(v, groups)
side_by_side = mixed.swapaxes(1, 2).reshape(1, seq, heads * head_dim)
out = ops.linear(side_by_side, layer.o_proj)

assert side_by_side.shape == (1, seq, heads * head_dim)  # 192: need not be hidden, which is 234
assert out.shape == (1, seq, config.hidden_size)
assert np.allclose(out, seen.attention.out, atol=1e-5)

# %% [markdown]
# ## What heads look at
#
# Each row of these pictures is one query, and shows where it looks. Head 0 of block 2 looks at the token just before,
# almost always. Head 0 of block 3 looks at `<bos>`: a head that finds nothing to its liking has to put its attention
# *somewhere*, since the shares must have the sum 1, and the first token is where trained models put it. It is called
# an **attention sink**.

# %%
from matplotlib import pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
viz.attention_map(run.layers[2].attention.probs[0, 0], tokens, title="block 2, head 0: the token before", axes=left)
_ = viz.attention_map(run.layers[3].attention.probs[0, 0], tokens, title="block 3, head 0: a sink", axes=right)

# %% [markdown]
# Look at the others yourself. In Jupyter there are two sliders below the picture.


# %%
def one_head(block, head):
    probs = run.layers[block].attention.probs[0, head]
    assert probs.shape == (seq, seq)
    return viz.attention_map(probs, tokens, title=f"block {block}, head {head}")


_ = viz.with_sliders(one_head, block=range(config.num_hidden_layers), head=range(heads))

# %% [markdown]
# To see all heads at once, measure three habits: the share that goes to the token before, to the token itself and to
# `<bos>`, averaged over all queries but the first.

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
# **Question.** Does a high share prove that the model *uses* what it looks at?
#
# <details><summary>Answer</summary>
# No. What is handed over is the value vector, and that may be close to zero, as it often is for
# <code>&lt;bos&gt;</code>. To know, change the value and see what happens to the logits (the scores of the next token).
# </details>
#
# ## Exercise
#
# `repeat_kv` gives every query head its key head. The array has the axes (batch, kv_heads, keys, head_dim). Replace
# the line that raises, run the cell, and read what the check says.

# %%
from refgemma.teach import exercises


def repeat_kv(x, groups):
    raise NotImplementedError


exercises.check_repeat_kv(repeat_kv)
