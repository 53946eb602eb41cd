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
# # 6. Norms, the unit offset, and the embedding scale
#
# In a deep network (one with many blocks) numbers drift: each block adds to the stream, and products grow. Norms
# bring them back to a standard size. Gemma 2 has more norms than most models, and stores their weights in an unusual
# way. You need from notebook 1: *residual stream*, *block*, *embedding*, *logits*, *training*; and from notebook 2
# the word *port* (a reimplementation of the model in another program).

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma import ops
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
ids = tiny.tokenizer.encode("Once upon a time there was a little princess")
tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
run = refgemma.forward([ids], weights, config)

# %% [markdown]
# ## The norm
#
# The **root mean square** (RMS) of a vector measures the size of its numbers. RMSNorm divides by it, and then
# multiplies every column by a learned factor:
#
# $$y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot (1 + w)$$
#
# $\epsilon$, a millionth, prevents a division by zero for a vector of zeros. The older LayerNorm also subtracts the
# mean; RMSNorm does not, and works equally well.

# %%
x = run.layers[0].middle
w = weights.layers[0].pre_feedforward_layernorm
y = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * (1 + w)

assert x.shape == y.shape == (1, len(ids), config.hidden_size)
assert w.shape == (config.hidden_size,)
assert np.allclose(y, ops.rms_norm(x, w, config.rms_norm_eps), atol=1e-5)
viz.root_mean_square(x).round(3), viz.root_mean_square(y).round(3)

# %% [markdown]
# The output has a size near 1 for an input of any usual size. If $x$ is a thousand times larger, the output is the
# same. If $x$ is a thousand times smaller, $\epsilon$ is no longer small compared with its square.

# %%
factors = 10.0 ** np.arange(-7, 4)
row = x[0, -1].astype(np.float64)
sizes = [viz.root_mean_square(ops.rms_norm(row * f, np.zeros(len(row)), 1e-6)) for f in factors]

assert np.shape(sizes) == factors.shape
assert np.allclose(sizes[-3:], 1, atol=1e-5)
axes = viz.new_axes(6.4, 3)
axes.semilogx(factors * viz.root_mean_square(row), sizes, "o-")
axes.set(xlabel="size before", ylabel="size after", title="RMSNorm: all sizes become 1, unless tiny")
axes.axvline(1e-3, linestyle="--", color="grey", label="square root of eps")
_ = axes.legend()

# %% [markdown]
# **Question.** A port computes `x / (sqrt(mean(x**2)) + eps)`, with $\epsilon$ outside the root. For which inputs is
# the mistake visible?
#
# <details><summary>Answer</summary>
# Only for tiny ones: at size 0.001 the right norm gives 0.71, and the wrong one 0.999. For ordinary inputs the
# difference is in the seventh digit. Test with inputs for which the feature matters.
# </details>
#
# ## The unit offset
#
# Most models multiply by $w$, which starts at 1. Gemma multiplies by $1 + w$, and $w$ starts at 0. During training,
# weights are pulled towards 0 a little (*weight decay*). With Gemma's formula, 0 means a factor of 1. In a port that
# multiplies by $w$, all norms are wrong.

# %%
rows = [
    (name, n, 1 + getattr(layer, name))
    for n, layer in enumerate(weights.layers)
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
]
assert all(factors.shape == (config.hidden_size,) for _, _, factors in rows)

figure, all_axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
for axes, kind in zip(all_axes, dict.fromkeys(name for name, _, _ in rows), strict=True):
    axes.boxplot([factors for name, _, factors in rows if name == kind], showfliers=False, tick_labels=range(6))
    axes.set(title=kind.replace("_", " "), xlabel="block")
    axes.axhline(1, linestyle=":", color="grey")
_ = all_axes[0].set_ylabel("factor 1 + w")

# %% [markdown]
# **Question.** Look at block 0 in the second panel. What did training do there?
#
# <details><summary>Answer</summary>
# The factors after attention are well below 1: the first blocks learned to add less of attention's output.
# </details>
#
# ## Four norms per block
#
# Older models apply a norm to the *input* of each half of a block. Gemma 2 also applies one to its *output*, before
# the output is added:
#
# $$h' = h + \mathrm{norm}_2(\mathrm{attention}(\mathrm{norm}_1(h))) \qquad h'' = h' +
# \mathrm{norm}_4(\mathrm{feedforward}(\mathrm{norm}_3(h')))$$
#
# One name is misleading: `post_attention_layernorm` is norm 2 in Gemma 2. In Llama, another similar family of models,
# the norm of that name is at the place of norm 3. The picture shows the inputs and outputs of both halves in each
# block, for the last token.

# %%
names = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
sizes = np.array([[viz.root_mean_square(getattr(b, name)[0, -1]) for name in names] for b in run.layers])
stream = viz.root_mean_square(viz.residual_streams(run)[:, 0, -1])

assert sizes.shape == (config.num_hidden_layers, 4) and stream.shape == (config.num_hidden_layers + 1,)
axes = viz.new_axes(7, 3.4)
for column, name in enumerate(names):
    axes.plot(sizes[:, column], "o-" if name.startswith("post") else "s--", label=name)
axes.plot(stream[:-1], "k:", label="the stream itself")
axes.set(xlabel="block", ylabel="root mean square", title="read (dashed) and written (solid) in each block")
_ = axes.legend(fontsize=8)

# %% [markdown]
# **Question.** The stream grows, but the outputs keep their size. What does that mean for the last blocks?
#
# <details><summary>Answer</summary>
# Each changes the stream's direction less than the block before. This is one reason why the last blocks of deep
# models can often be removed with little harm.
# </details>
#
# ## The embedding scale
#
# The rows of the embedding table are short vectors, and the head uses them too (notebook 1). For the blocks they are
# scaled up:
#
# $$h_0 = \sqrt{\mathrm{hidden}} \; E[\mathrm{id}]$$
#
# Norms remove any scale, so does it matter? It does: the vectors that blocks *add* have a fixed size. Without the
# factor, the first additions would be much larger than the token's own vector.

# %%
scaled = weights.embed_tokens[ids] * np.float32(np.sqrt(config.hidden_size))
assert np.array_equal(run.embedded[0], scaled)

unscaled = weights.embed_tokens[ids][None]  # passed without the scale: `inputs_embeds` is not scaled
wrong = refgemma.forward(None, weights, config, inputs_embeds=unscaled)
assert wrong.embedded.shape == run.embedded.shape == (1, len(ids), config.hidden_size)

names = tiny.tokenizer.convert_ids_to_tokens(range(config.vocab_size))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
viz.most_likely_tokens(run.logits[0, -1], names, title="as it should be", axes=left)
_ = viz.most_likely_tokens(wrong.logits[0, -1], names, title="without the scale", axes=right)

# %% [markdown]
# In a model that computes in bfloat16 (numbers of 16 bits, notebook 7), the factor itself is first rounded to
# bfloat16. The 9B multiplies by 59.75 and not by $\sqrt{3584} = 59.866\dots$ This changes all later results by 0.2 %,
# and is part of the released model.

# %%
for name in ("2b", "9b", "27b"):
    width = refgemma.Gemma2Config.preset(name).hidden_size
    print(f"{name:4s} sqrt({width}) = {np.sqrt(width):.4f}, in bfloat16 {float(refgemma.bf16(np.sqrt(width)))}")

# %% [markdown]
# **Question.** For which of the three models does the rounding change nothing?
#
# <details><summary>Answer</summary>
# The 2B: 2304 is 48 squared. So a test on the 2B alone cannot reveal this mistake in a port.
# </details>
#
# ## Exercise
#
# Write `rms_norm` from the formula. The check runs it in float32 and in bfloat16. For bfloat16, compute with
# `wide(x)` (the same numbers as float32) and return `narrow(result, like=x)` (rounded to the precision of `x`). Both
# functions are in `refgemma`; notebook 7 explains them. Replace the line that raises, run the cell, and read the
# result of the check.

# %%
from refgemma.teach import exercises


def rms_norm(x, weight, eps):
    raise NotImplementedError


exercises.check_rms_norm(rms_norm)
