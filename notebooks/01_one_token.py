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
# # 1. One token through the model
#
# A language model reads a text and says, for every word it knows, how likely that word is to come next. This notebook
# follows one token through all of Gemma 2, from its number to that answer. Later notebooks look at one part each.
#
# Gemma 2 is a language model that Google released in 2024 in three sizes, the 2B, the 9B and the 27B, called after
# the billions of numbers in them. These numbers are the model's **weights**. They were **trained**: changed, a
# little at a time, until the model's answers fitted a great deal of text. To know which way to change a number,
# training asks how the answer moves if the number does (the slope). `refgemma` is this model in NumPy.
#
# You need NumPy: arrays, shapes, and `@` for the product of matrices. Everything else is explained when it comes up.
# The model here is *tiny*: 2.9 million trained numbers, where the 9B has 9.2 billion, but with the same parts in the
# same order. It was trained on old tales, and it is inside the package, so nothing is downloaded. Besides its weights
# it has a **configuration**: the few numbers that say how large its parts are.

# %%
import numpy as np

import refgemma
from refgemma import ops
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
config.num_hidden_layers, config.hidden_size, config.vocab_size

# %% [markdown]
# ## From text to numbers
#
# The model knows 2048 pieces of text. A piece is called a **token**, its number is its **id**, and all of them
# together are the **vocabulary**. A frequent word is one token; a rare one is several. The first token of every text
# is `<bos>` (*beginning of sequence*). In the list below `▁` stands for a blank.

# %%
ids = tiny.tokenizer.encode("The little girl looked at the")
tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
names = tiny.tokenizer.convert_ids_to_tokens(range(config.vocab_size))

seq = len(ids)
assert tokens[0] == "<bos>"
list(zip(ids, tokens, strict=True))

# %% [markdown]
# **Question.** How many tokens does `"Rumpelstiltskin"` have? Try it. Why is that more than `"little"`?
#
# <details><summary>Answer</summary>
# The vocabulary was made from the pieces that were frequent in the training text. A name that is hardly ever there is
# put together from short pieces, if need be from single letters.
# </details>
#
# ## The embedding
#
# The model is a **neural network**, a long chain of products of matrices with simple bent curves in between. Such a
# network computes with vectors, not with numbers of pieces. So each token has a row in a table $E$ with one row a
# token and `hidden` columns (234 here, 3584 in the 9B). Looking the rows up is called **embedding**. Gemma multiplies
# them by a constant (notebook 6 says what for):
#
# $$h_0 = \sqrt{\mathrm{hidden}} \; E[\mathrm{id}]$$
#
# The vector $h$ is called the **residual stream**: every later part of the model reads it and adds something to it.

# %%
hidden = config.hidden_size
h0 = weights.embed_tokens[ids] * np.float32(np.sqrt(hidden))

assert weights.embed_tokens.shape == (config.vocab_size, hidden)
assert h0.shape == (seq, hidden)
h0[-1, :5]

# %% [markdown]
# All the model does comes out of one call, `refgemma.forward`. It takes a **batch**, several texts of one length, and
# so its arrays have one axis more, the first. Its result is a *record*: every array that was computed on the way, by
# name.

# %%
run = refgemma.forward([ids], weights, config)

assert run.embedded.shape == (1, seq, hidden)
assert np.array_equal(run.embedded[0], h0)
len(run.layers), run.logits.shape

# %% [markdown]
# ## A block
#
# The model is a stack of **blocks** (also called layers) that are built alike and have different weights: 6 here, 42
# in the 9B. A block has two halves. The first, **attention**, is the only place where tokens learn about other
# tokens. The second, the **feed-forward** layer, works on each token alone. Either half is wrapped in two **norms**,
# which bring a vector to a standard size (notebook 6), and what comes out is *added* to the stream:
#
# $$h' = h + \mathrm{norm}(\mathrm{attention}(\mathrm{norm}(h)))$$
# $$h'' = h' + \mathrm{norm}(\mathrm{feedforward}(\mathrm{norm}(h')))$$
#
# The record of a block calls $h'$ `middle` and $h''$ `out`, and each norm by the name of its weights: they all end in
# `layernorm`, after an older kind of norm.

# %%
block = run.layers[0]  # the record of the first block

assert block.middle.shape == block.out.shape == (1, seq, hidden)
assert np.array_equal(block.middle, run.embedded + block.post_attention_layernorm)
assert np.array_equal(block.out, block.middle + block.post_feedforward_layernorm)
[name for name in vars(block)]

# %% [markdown]
# Because every block adds, the stream grows. The picture shows the size of its numbers, the **root mean square**
# $\sqrt{\mathrm{mean}(h^2)}$, before the first block (0 blocks done) and after each.

# %%
_ = viz.residual_norms(run, tokens)

# %% [markdown]
# **Question.** Which block adds the most to the last token? What would the picture be if all blocks added nothing?
#
# <details><summary>Answer</summary>
# Look for the steepest part of its line. If nothing were added, every line would be flat, and the answer would depend
# on the last token alone.
# </details>
#
# ## Inside the feed-forward half
#
# Two matrices make `intermediate` numbers each (408 here) of the vector. One of the two results, the *gate*, is bent
# by a function called GELU, which lets positive numbers through and makes negative ones almost 0, and is multiplied
# with the other, the *up* part. A third matrix brings the product back to `hidden` numbers:
#
# $$\mathrm{feedforward}(x) = W_{down}\,\big(\mathrm{gelu}(W_{gate}\,x) \cdot W_{up}\,x\big)$$

# %%
layer = weights.layers[0]
x = block.pre_feedforward_layernorm  # what this half is given
gate = ops.linear(x, layer.gate_proj)  # x @ W.T: weights are stored as (out, in)
up = ops.linear(x, layer.up_proj)
fed = ops.linear(ops.gelu_tanh(gate) * up, layer.down_proj)

assert gate.shape == up.shape == (1, seq, config.intermediate_size)
assert np.array_equal(fed, block.feed_forward.out)
print(f"{np.mean(block.feed_forward.gelu < 0):.0%} of the gates are closed (negative after GELU)")

# %% [markdown]
# ## Out of the model
#
# After the last block the stream is normed once more, and compared with every row of the embedding table by a
# product. The 2048 results are the **logits**, the scores of all tokens for the next place. That the table which
# embeds tokens also scores them is called a *tied head*. Last, the logits are bent so that none leaves ±30 (notebook
# 4):
#
# $$\mathrm{logits} = 30 \tanh\big(\mathrm{norm}(h)\,E^T / 30\big)$$
#
# The **softmax** turns scores into probabilities, positive numbers with the sum 1: $p_i = e^{z_i} / \sum_j e^{z_j}$.

# %%
raw = run.norm @ weights.embed_tokens.T
assert raw.shape == run.logits.shape == (1, seq, config.vocab_size)
assert np.allclose(ops.soft_cap(raw, config.final_logit_softcapping), run.logits, atol=1e-4)

probs = viz.probabilities(run.logits[0, -1])
assert probs.shape == (config.vocab_size,) and np.isclose(probs.sum(), 1)
_ = viz.most_likely_tokens(run.logits[0, -1], names, title="after: The little girl looked at the")

# %% [markdown]
# Every place gives an answer, not only the last one: after each token the model says what could come next, without
# having seen what did. That is how it was trained. And one can ask *early*: norm and score the stream after each
# block, as if it were the last one. That picture is called the **logit lens**; the lowest row is the embedding alone.
# (A label like `<0xE0>` is the token of a single byte: what no other token covers is written in bytes.)

# %%
lens = viz.lens_logits(run, weights, config)
assert lens.shape == (config.num_hidden_layers + 1, 1, seq, config.vocab_size)
_ = viz.logit_lens(lens[:, 0], tokens, names)

# %% [markdown]
# **Question.** In the lowest rows many tokens predict *themselves*. Why?
#
# <details><summary>Answer</summary>
# The head is tied. The stream there is still (nearly) the token's own row of the table, and the product of a row with
# itself is larger than with any other.
# </details>
#
# ## Every tensor by name
#
# An array with any number of axes is called a **tensor**. What you have seen is a record inside a record. Its fields,
# in order, are the *trace*: the list by which two programs that compute the same model can be compared (notebook 9).
# These are the tensors of one block, with their shapes. (`cos` and `sin`, before all blocks, belong to notebook 3.)

# %%
from refgemma.trace.names import named_tensors

shapes = {name: tensor.shape for name, tensor in named_tensors(run)}
assert list(shapes)[:3] == ["cos", "sin", "embedded"] and list(shapes)[-1] == "logits"
for name, shape in shapes.items():
    if name.startswith("layers.0."):
        print(f"{name:40s} {shape}")

# %% [markdown]
# Two of these shapes look odd: `q` has an axis of 6, and `k` and `v` have 2 in its place. Notebook 2 says why. And
# here is the trace at its most literal: point at a square to see its number. Each of the 6 pictures is one *head*, a
# word of notebook 2 as well; its rows are tokens that look, its columns the tokens that they look at.

# %%
looks = run.layers[3].attention.probs
assert looks.shape == (1, config.num_attention_heads, seq, seq)
viz.array_view(looks, "batch heads seq keys")

# %% [markdown]
# ## Exercises
#
# `embed` looks rows up and scales them. Mind half precision (numbers of 16 bits, notebook 7): the factor has the
# precision of the table. Replace the line that raises, run the cell, and read what the check says. What is right was
# recorded from PyTorch, the library in which the model is usually run. Answers are in
# `refgemma.teach.exercises.solutions`; look there last.

# %%
from refgemma.teach import exercises


def embed(ids, table):
    raise NotImplementedError


exercises.check_embed(embed)


# %% [markdown]
# `gelu_tanh` is the function that bends the gates: $\tfrac12 x\,(1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3)))$.


# %%
def gelu_tanh(x):
    raise NotImplementedError


exercises.check_gelu_tanh(gelu_tanh)
