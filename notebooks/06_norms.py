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
# # 6. Norms, the unit offset, and the embedding scale
#
# In a deep network (a network of many blocks), numbers change their size: each block adds to the stream, and products
# grow. Norms bring vectors back to a standard size. Gemma 2 has more norms than most models, and stores their weights
# in an unusual way. You need from notebook 1: *residual stream*, *block*, *embedding*, *logits*, *training*; and from
# notebook 2 the word *port* (a reimplementation of the model in another program).
#
# ![Drawing of the model: the norms, the stream and the embedding are lit](pictures/model-06.svg)
#
# The norms, the stream and the embedding are highlighted. This notebook measures the sizes of their vectors.

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma import ops
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
text = "There was once a little princess who lived in a great castle by the sea."
ids = tiny.tokenizer.encode(text)
tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
run = refgemma.forward([ids], weights, config)

# %% [markdown]
# ## The norm
#
# The **root mean square** (RMS) of a vector measures the size of its numbers. The norm of Gemma, RMSNorm, divides a
# vector by its RMS, and then multiplies every column by a learned factor:
#
# $$y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot (1 + w)$$
#
# The constant $\epsilon$ is a millionth; it prevents a division by zero if the vector is zero. The older LayerNorm also
# subtracts the mean. RMSNorm does not subtract the mean, and works equally well.

# %%
x = run.layers[0].middle
w = weights.layers[0].pre_feedforward_layernorm
y = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * (1 + w)

assert x.shape == y.shape == (1, len(ids), config.hidden_size)
assert w.shape == (config.hidden_size,)
viz.root_mean_square(x).round(3), viz.root_mean_square(y).round(3)

# %% [markdown]
# Before the factors, the output has the size 1 for an input of any usual size. If $x$ is a thousand times larger, the
# output is the same. If $x$ is a thousand times smaller, $\epsilon$ is no longer small compared with $x^2$, so the
# output is smaller than 1.

# %%
factors = 10.0 ** np.arange(-7, 4)
row = x[0, -1].astype(np.float64)
zero = np.zeros(len(row))
sizes = [viz.root_mean_square(ops.rms_norm(row * f, zero, 1e-6)) for f in factors]

assert np.shape(sizes) == factors.shape
axes = viz.new_axes(6.4, 3)
axes.semilogx(factors * viz.root_mean_square(row), sizes, "o-")
axes.set(xlabel="size before", ylabel="size after")
axes.set_title("RMSNorm: all sizes become 1, unless tiny")
axes.axvline(1e-3, linestyle="--", color="grey", label="square root of eps")
_ = axes.legend()

# %% [markdown]
# **Question.** A port computes `x / (sqrt(mean(x**2)) + eps)`, with $\epsilon$ outside the root. For which inputs is
# the mistake visible?
#
# <details><summary>Answer</summary>
# Only for tiny inputs: at size 0.001 the right norm gives 0.71, and the wrong one 0.999. For ordinary inputs the
# difference is in the seventh digit. So test each feature with inputs for which it matters.
# </details>
#
# ## The unit offset
#
# Most models multiply by $w$, which starts at 1. Gemma multiplies by $1 + w$, and $w$ starts at 0. In training, each
# step pulls the weights a little towards 0 (*weight decay*). With Gemma's formula, a weight of 0 means a factor of 1,
# so this pull leads to a factor of 1, not of 0.
# In a port that multiplies by $w$, all norms are wrong.

# %%
names = ["input_layernorm", "post_attention_layernorm"]
names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
figure, all_axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True)
figure.set_layout_engine("constrained")
for axes, name in zip(all_axes, names, strict=True):
    factors = np.array([1 + getattr(layer, name) for layer in weights.layers])
    assert factors.shape == (6, config.hidden_size)
    axes.boxplot(factors.T, showfliers=False, tick_labels=range(6))
    axes.set(title=name.replace("_", " "), xlabel="block")
    axes.axhline(1, linestyle=":", color="grey")
_ = all_axes[0].set_ylabel("factor 1 + w")

# %% [markdown]
# ## Four norms per block
#
# Older models apply a norm to the *input* of each half of a block. Gemma 2 also applies a norm to the *output* of each
# half, before the output is added to the stream:
#
# $$h' = h + \mathrm{norm}_2(\mathrm{attention}(\mathrm{norm}_1(h))) \qquad h'' = h' +
# \mathrm{norm}_4(\mathrm{feedforward}(\mathrm{norm}_3(h')))$$
#
# One name is misleading: `post_attention_layernorm` is norm 2 in Gemma 2. In Llama, a similar family of models, the
# norm with this name is at the place of norm 3. The picture shows the inputs and outputs of both halves in each block,
# for the last token.

# %%
vectors = [[getattr(b, name)[0, -1] for name in names] for b in run.layers]
sizes = viz.root_mean_square(np.array(vectors))
stream = viz.root_mean_square(viz.residual_streams(run)[:, 0, -1])

assert sizes.shape == (config.num_hidden_layers, 4)
axes = viz.new_axes(7, 3.4)
for column, name in enumerate(names):
    axes.plot(sizes[:, column], "o-" if name.startswith("post") else "s--", label=name)
axes.plot(stream[:-1], "k:", label="the stream itself")
axes.set(xlabel="block", ylabel="root mean square")
axes.set_title("read (dashed) and written (solid) in each block")
_ = axes.legend(fontsize=8)

# %% [markdown]
# **Question.** The stream grows more than sevenfold, but each addition has a size between 0.5 and 1.3. What follows
# for the last blocks?
#
# <details><summary>Answer</summary>
# They turn the stream less: the first block turns the last token's stream by 55 degrees, the last block by 12. (The
# angle does not decrease at every block: the angles are 55, 21, 25, 12, 19 and 12.) This is one reason why late blocks
# of deep models can often be removed with little harm (Gromov et al. 2024).
# </details>
#
# ## One column as a volume control
#
# In block 1 the factors after attention are about 0.9, but the result has the size 0.5. The reason: the norm divides by
# the size of the *whole* vector, so if one number is huge, all other numbers become small. The next cell shows the
# output of attention before the norm.

# %%
# The last token, before norm 2.
raw = np.array([b.attention.out[0, -1] for b in run.layers])
factors = np.array([1 + layer.post_attention_layernorm for layer in weights.layers])
column = int(np.abs(raw[1]).argmax())
assert raw.shape == factors.shape == (config.num_hidden_layers, config.hidden_size)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
left.plot(np.abs(raw[1]))
left.annotate(f"column {column}", (column, np.abs(raw[1, column])), (column + 12, 10))
left.set(xlabel="column", ylabel="size of the number")
left.set_title("block 1: after attention, before the norm")
right.plot(factors[1])
right.annotate(f"column {column}", (column, factors[1, column]), (column + 12, 0.12))
right.set(xlabel="column", ylabel="factor 1 + w", ylim=(0, 1.1))
right.set_title("block 1: the factors of norm 2")
for number, b in enumerate(run.layers):
    largest = np.abs(b.attention.out[0]).argmax(axis=-1)
    print(f"block {number}: the largest number of each token is in column", *largest)

# %% [markdown]
# **Question.** Column 53 of block 1 has the largest number for *every* token, but the smallest factor. What is the
# purpose of this column?
#
# <details><summary>Answer</summary>
# It is a volume control. The larger the number in this column, the smaller all other columns become after the division.
# The factor 0.09 then removes most of the number itself. In this way, a head can reduce the whole vector that attention
# adds: for the last token to half the size. The box plot above leaves out the outliers, so it does not show this
# factor. The number is largest for <code>&lt;bos&gt;</code> (74). Large models have huge numbers in a few fixed columns
# of the stream itself, most of them at the first token. These are called <b>massive activations</b> (Sun et al. 2024).
# Here norm 2 stops them before the stream. If a model is stored with few bits, huge numbers are a problem, because the
# scale must fit the largest number.
# </details>
#
# ## The embedding scale
#
# The rows of the embedding table are short vectors, and the head uses them too (notebook 1). Before the first block,
# Gemma scales them up:
#
# $$h_0 = \sqrt{\mathrm{hidden}} \; E[\mathrm{id}]$$
#
# Norms remove any scale, so does this factor matter? It does, because the vectors that blocks *add* have a fixed size.
# Without the factor, the first additions would be much larger than the token's own vector.

# %%
scaled = weights.embed_tokens[ids] * np.float32(np.sqrt(config.hidden_size))
# `inputs_embeds` is not scaled.
unscaled = weights.embed_tokens[ids][None]
wrong = refgemma.forward(None, weights, config, inputs_embeds=unscaled)
assert wrong.embedded.shape == run.embedded.shape == (1, len(ids), config.hidden_size)

names = tiny.tokenizer.convert_ids_to_tokens(range(config.vocab_size))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
viz.most_likely_tokens(run.logits[0, -1], names, title="as it should be", axes=left)
_ = viz.most_likely_tokens(
    wrong.logits[0, -1], names, title="without the scale", axes=right
)

# %% [markdown]
# In a model that computes in bfloat16 (numbers of 16 bits, notebook 7), the factor itself is first rounded to bfloat16.
# The 9B multiplies by 59.75 and not by $\sqrt{3584} = 59.866\dots$ This changes all later results by 0.2 %, but this
# rounding is part of the released model.

# %%
for name in ("2b", "9b", "27b"):
    width = refgemma.Gemma2Config.preset(name).hidden_size
    rounded = float(refgemma.bf16(np.sqrt(width)))
    print(f"{name:4s} sqrt({width}) = {np.sqrt(width):.4f}, in bfloat16 {rounded}")

# %% [markdown]
# **Question.** For which of the three models does the rounding change nothing?
#
# <details><summary>Answer</summary>
# The 2B: 2304 is 48 squared. So a test on the 2B alone cannot reveal this mistake in a port.
# </details>
#
# ## Exercise
#
# Write `rms_norm` from the formula. The check runs it in float32 and in bfloat16. For bfloat16, compute with `wide(x)`
# (the same numbers as float32) and return `narrow(result, like=x)` (rounded to the precision of `x`). Both functions
# are in `refgemma`; notebook 7 explains them. In the next cell, replace the line `raise NotImplementedError`, run the
# cell, and read the result of the check.

# %%
from refgemma.teach import exercises


def rms_norm(x, weight, eps):
    raise NotImplementedError


exercises.check_rms_norm(rms_norm)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
# from refgemma import narrow, wide
#
#
# def rms_norm(x, weight, eps):
#     x_wide = wide(x)
#     normed = x_wide / np.sqrt(np.mean(x_wide**2, axis=-1, keepdims=True) + eps)
#     return narrow(normed * (1 + wide(weight)), like=x)
# ```
#
# </details>

# %% [markdown]
# **Papers.** [RMSNorm](https://arxiv.org/abs/1910.07467) (Zhang and Sennrich 2019);
# [massive activations](https://arxiv.org/abs/2402.17762) (Sun et al. 2024).
