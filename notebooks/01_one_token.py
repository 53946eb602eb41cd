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
# # 1. One token through the model
#
# A language model reads a text. For every word it knows, it estimates how likely that word is to come next. This
# notebook follows one token through all of Gemma 2, from the number of the token to the estimate for the next word.
# Each later notebook looks at one part.
#
# Gemma 2 is a language model that Google released in 2024 in three sizes: the 2B, the 9B and the 27B. The name of a
# size says how many billions of numbers the model contains. These numbers are the model's **weights**. They were
# **trained**: changed, a little at a time, until the model's answers fitted a great deal of text. A number, the error,
# says how badly the answers fit. For each weight, training computes the slope: how much the error changes if the weight
# changes. The slope gives the direction of the change. `refgemma` is this model in NumPy.
#
# You need NumPy: arrays, shapes, and `@` for the product of matrices. The notebooks explain everything else when it is
# needed. The model in this notebook is *tiny*. It has 2.9 million trained numbers, while the 9B has 9.2 billion, but it
# has the same parts in the same order. The tiny model was trained on old tales. It is inside the package, so nothing is
# downloaded. A model also has a **configuration**: the few numbers that give the sizes of its parts.
#
# ![Drawing of the model: all parts of Gemma 2](pictures/model-01.svg)
#
# The drawing shows the whole model, with the sizes of the tiny model. In each later notebook, the part that the
# notebook explains is highlighted. Notebook 2 explains `÷ √39`, notebook 4 `cap 50` and `cap 30`, and notebook 5
# `sliding`, `full` and `last 64`.

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
# The model knows 2048 pieces of text. A piece is called a **token**, its number is its **id**, and all tokens together
# are the **vocabulary**. A frequent word is one token; a rare word is several tokens. The first token of every text is
# `<bos>` (*beginning of sequence*). In the list below, `▁` stands for a space; the pictures show it as `·`.

# %%
ids = tiny.tokenizer.encode("The little girl looked at the")
tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
names = tiny.tokenizer.convert_ids_to_tokens(range(config.vocab_size))

seq = len(ids)
list(zip(ids, tokens, strict=True))

# %% [markdown]
# **Question.** How many tokens does `" Rumpelstiltskin"` have? Try it. Why does it have more than `" little"`? (The
# space belongs to the token of a word. Also try `"little"` without the space.)
#
# <details><summary>Answer</summary>
# Eight, after <code>&lt;bos&gt;</code>. The vocabulary contains the pieces that were frequent in the training text. A
# rare name is split into short pieces, and if necessary into single letters. Without a space, as at the start of a
# line, <code>little</code> was rare too, so it is split: <code>l</code>, <code>ittle</code>.
# </details>
#
# ## The embedding
#
# The model is a **neural network**, a long chain of matrix products with simple curved functions between them. A neural
# network computes with vectors, not with ids. So each token id selects one row of a table $E$. The table has one row
# per token and `hidden` columns (234 here, 3584 in the 9B). This lookup is called the **embedding**. Gemma multiplies
# the rows by a constant:
#
# $$h_0 = \sqrt{\mathrm{hidden}} \; E[\mathrm{id}]$$
#
# Why by $\sqrt{\mathrm{hidden}}$, here 15.3? The rows of this text have lengths of about 0.7. Such a length is spread
# over 234 numbers, so a typical number has the size $0.7/\sqrt{234} = 0.04$. But the first block adds numbers of a
# typical size of 1.2, which would hide the token. The factor brings the row's numbers to a size of about 0.7 (notebook
# 6 leaves the factor out).
#
# The vector $h$ is called the **residual stream**: every later part of the model reads it and adds something to it.

# %%
hidden = config.hidden_size
rows = weights.embed_tokens[ids]
h0 = rows * np.float32(np.sqrt(hidden))

assert weights.embed_tokens.shape == (config.vocab_size, hidden)
assert h0.shape == (seq, hidden)
print("lengths of the rows:", np.linalg.norm(rows, axis=1).round(2))
h0[-1, :5]

# %% [markdown]
# One call, `refgemma.forward`, runs the whole model. It takes a **batch**: several texts of the same length. So its
# arrays have one more axis, the first axis. `forward` returns a *record*, which holds every intermediate array under a
# name.

# %%
run = refgemma.forward([ids], weights, config)

assert run.embedded.shape == (1, seq, hidden)
len(run.layers), run.logits.shape

# %% [markdown]
# ## A block
#
# The model is a stack of **blocks**, also called layers: 6 here, 42 in the 9B. All blocks have the same structure and
# different weights. A block has two halves. The first, **attention**, is the only place where tokens learn about
# other tokens. The second, the **feed-forward** layer, works on each token alone. Each half is between two **norms**,
# which bring a vector to a standard size (notebook 6). The result is *added* to the stream:
#
# $$h' = h + \mathrm{norm}(\mathrm{attention}(\mathrm{norm}(h)))$$
# $$h'' = h' + \mathrm{norm}(\mathrm{feedforward}(\mathrm{norm}(h')))$$
#
# In the record of a block, $h'$ is called `middle` and $h''$ is called `out`. The result of a norm has the same name
# as its weights. All these names end in `layernorm`, the name of an older kind of norm.

# %%
block = run.layers[0]  # the record of the first block

assert block.middle.shape == block.out.shape == (1, seq, hidden)
assert np.array_equal(block.middle, run.embedded + block.post_attention_layernorm)
assert np.array_equal(block.out, block.middle + block.post_feedforward_layernorm)
list(vars(block))

# %% [markdown]
# Every block adds to the stream, and here the additions do not cancel out: the stream grows. The picture shows the size
# of the numbers in the stream, the **root mean square** (RMS) $\sqrt{\mathrm{mean}(h^2)}$, before the first block (0
# blocks done) and after each block. Each line is a token; the line of the last token is coloured, the others are grey.
# A norm divides a vector by its root mean square, so its result has the RMS 1, and then multiplies each column by a
# trained factor $1 + w$ (notebook 6). It is therefore called *RMSNorm*.

# %%
_ = viz.residual_norms(run, tokens)

# %% [markdown]
# Is the line steepest in the block that adds most? For each block, the next cell measures two sizes for the last token:
# the size of the vector that the block adds, and the rise of the line. The number above the bar is the angle between
# the added vector and the stream.

# %%
# The last token: before the first block, and after each.
stream = viz.residual_streams(run)[:, 0, -1]
added = np.diff(stream, axis=0)
sizes = viz.root_mean_square(added)
rises = np.diff(viz.root_mean_square(stream))
lengths = np.linalg.norm(added, axis=1) * np.linalg.norm(stream[:-1], axis=1)
angles = np.degrees(np.arccos(np.sum(added * stream[:-1], axis=1) / lengths))

axes = viz.new_axes(6.4, 3)
axes.bar(np.arange(6) - 0.2, sizes, width=0.4, label="size of the added vector")
axes.bar(np.arange(6) + 0.2, rises, width=0.4, label="rise of the line")
axes.set(xlabel="block", ylabel="root mean square", ylim=(0, 2.2))
axes.set_title("size of the addition, and growth")
for number, angle in enumerate(angles):
    axes.text(number - 0.2, sizes[number] + 0.04, f"{angle:.0f}°", ha="center")
_ = axes.legend(loc="upper center", ncols=2)

# %% [markdown]
# **Question.** Blocks are numbered from 0. Block 2 adds half as much again as block 1 (1.52 and 1.02). But the line
# rises less in block 2 (0.56) than in block 1 (0.79). How is that possible?
#
# <details><summary>Answer</summary>
# Five of the six vectors stand nearly at a right angle to the stream (75 to 90 degrees). Such a vector turns the stream
# more than it lengthens the stream: the lengths add like the sides of a right triangle, √(a² + b²). The vector of block
# 1 points more in the direction of the stream (51 degrees). So the slope of the line does not show how much a block
# adds.
# </details>
#
# ## Inside the feed-forward half
#
# Two matrices turn the vector into two vectors of `intermediate` numbers (408 here). One vector, the *gate*, goes
# through a function called GELU. GELU keeps positive numbers and makes negative ones small: 0.17 or less in size. The
# gate is then multiplied by the other vector, *up*, number by number, so it controls how much of each number of *up*
# passes. Where the gate is negative, it is *closed*. A third matrix brings the product back to `hidden` numbers:
#
# $$\mathrm{feedforward}(x) = W_{down}\,\big(\mathrm{gelu}(W_{gate}\,x) \cdot W_{up}\,x\big)$$

# %%
layer = weights.layers[0]
x = block.pre_feedforward_layernorm  # the input of this half
gate = ops.linear(x, layer.gate_proj)  # x @ W.T: weights are stored as (out, in)
up = ops.linear(x, layer.up_proj)
fed = ops.linear(ops.gelu_tanh(gate) * up, layer.down_proj)

assert gate.shape == up.shape == (1, seq, config.intermediate_size)
closed = np.mean(block.feed_forward.gelu < 0)
print(f"{closed:.0%} of the gates are closed (negative)")

# %% [markdown]
# ## Out of the model
#
# After the last block, the stream goes through one more norm. Its product with each row of the embedding table gives
# the **logits**: 2048 numbers, one score for each token as the next token. The same table is used at the start, for the
# embedding; this is called a *tied head*. (The *heads* of attention, in notebook 2, are something else.) Last, a smooth
# function keeps the logits between −30 and 30 (notebook 4):
#
# $$\mathrm{logits} = 30 \tanh\big(\mathrm{norm}(h)\,E^T / 30\big)$$
#
# The **softmax** turns scores into probabilities, positive numbers with the sum 1: $p_i = e^{z_i} / \sum_j e^{z_j}$.

# %%
raw = run.norm @ weights.embed_tokens.T
assert raw.shape == run.logits.shape == (1, seq, config.vocab_size)
assert np.allclose(30 * np.tanh(raw / 30), run.logits, atol=1e-4)

probs = viz.probabilities(run.logits[0, -1])
assert probs.shape == (config.vocab_size,)
title = "after: The little girl looked at the"
_ = viz.most_likely_tokens(run.logits[0, -1], names, title=title)

# %% [markdown]
# To write a text, the model repeats this: it chooses a token, appends it, and computes the next answer. The simplest
# choice is the most likely token, which is called **greedy** (notebook 8 has other choices).

# %%
longer = list(ids)
for _ in range(8):
    answer = refgemma.forward([longer], weights, config)
    longer.append(int(answer.logits[0, -1].argmax()))

assert len(longer) == seq + 8
tiny.tokenizer.decode(longer, skip_special_tokens=True)

# %% [markdown]
# This loop computes every token again at each step. A *cache* avoids this (notebook 5).
#
# The **place** of a token is its number in the text, from 0. The model gives an answer at every place, not only at the
# last one. After each token it predicts the next token without seeing it, as in training. We can also compute logits
# *early*: apply the norm and the head to the stream after each block, as if that block were the last. The picture of
# these logits is called the **logit lens**; its lowest row is the embedding alone. Each square shows the most likely
# token, and a darker square a higher probability. (A label like `<0xE0>` is the token of a single byte. Text that no
# other token covers is written in bytes.)

# %%
lens = viz.lens_logits(run, weights, config)
assert lens.shape == (config.num_hidden_layers + 1, 1, seq, config.vocab_size)
_ = viz.logit_lens(lens[:, 0], tokens, names)

# %% [markdown]
# **Question.** In the two lowest rows nearly all tokens predict *themselves*. Why?
#
# <details><summary>Answer</summary>
# The head is tied: it scores a token with the token's row of the embedding table. In the two lowest rows the stream
# still points in the direction of the token's own row, and no other row has exactly this direction. But the product
# also grows with the length of a row, so a long row can win. Before the first block, <code>girl</code> predicts the
# byte token <code>&lt;0xE0&gt;</code>, whose row is three times as long.
# </details>
#
# ## Every tensor by name
#
# An array with any number of axes is called a **tensor**. The fields of the record, in the order of computation, are
# the *trace*. With the trace you can compare two programs that compute the same model (notebook 9). The next cell
# prints the tensors of one block, with their shapes. (`cos` and `sin`, before all blocks, belong to notebook 3.)

# %%
from refgemma.trace.names import named_tensors

shapes = {name: tensor.shape for name, tensor in named_tensors(run)}
for name, shape in shapes.items():
    if name.startswith("layers.0."):
        print(f"{name:40s} {shape}")

# %% [markdown]
# One shape may surprise you: `q` has an axis of length 6, but in `k` and `v` this axis has length 2. Notebook 2
# explains why. The next picture shows one tensor of the trace directly: hover over a square to see its number. Each of
# the 6 pictures is one *head* (notebook 2). A row is a token that looks at other tokens; a column is a token that is
# looked at.

# %%
looks = run.layers[3].attention.probs
assert looks.shape == (1, config.num_attention_heads, seq, seq)
viz.array_view(looks, "batch heads seq keys")

# %% [markdown]
# ## Exercises
#
# `embed` looks up rows and scales them. In half precision (numbers of 16 bits, notebook 7) the factor is rounded to the
# precision of the table; `narrow(number, like=table)` does this (`from refgemma import narrow`). In the next cell,
# replace the line `raise NotImplementedError`, run the cell, and read the result of the check. The expected values were
# recorded from PyTorch, the library that usually runs the model. If you are stuck, `exercises.hint("embed")` gives a
# hint, and each further call of `exercises.hint` gives a larger one. A solution is folded below each exercise.
# `exercises.progress("progress.json")` shows a page of your progress; use the same file in all notebooks.

# %%
from refgemma.teach import exercises


def embed(ids, table):
    raise NotImplementedError


exercises.check_embed(embed)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import math
#
# from refgemma import narrow
#
#
# def embed(ids, table):
#     rows = table[ids]
#     return rows * narrow(math.sqrt(table.shape[-1]), like=table)
# ```
#
# </details>


# %% [markdown]
# `gelu_tanh` is the function that is applied to the gates: $\tfrac12 x\,(1 + \tanh(\sqrt{2/\pi}\,(x +
# 0.044715\,x^3)))$.


# %%
def gelu_tanh(x):
    raise NotImplementedError


exercises.check_gelu_tanh(gelu_tanh)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import math
# import numpy as np
#
#
# def gelu_tanh(x):
#     bent = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
#     return bent
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Attention is all you need](https://arxiv.org/abs/1706.03762) (Vaswani et al. 2017) introduced the
# transformer; the [report on Gemma 2](https://arxiv.org/abs/2408.00118) describes this model.
