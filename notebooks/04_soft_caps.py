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
# # 4. The two soft caps and their purpose
#
# Gemma 2 limits two kinds of numbers smoothly. The scores of attention stay between −50 and 50, and the logits stay
# between −30 and 30. Few other models do this. You need from notebooks 1 and 2: *logits* and *softmax*, *slope*,
# attention *scores* and *mask*.
#
# ![Drawing of the model: the cap of 50 on scores and the cap of 30 on logits are lit](pictures/model-04.svg)
#
# The two soft caps are highlighted.

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma import ops
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
config.attn_logit_softcapping, config.final_logit_softcapping

# %% [markdown]
# ## The curve
#
# $$\mathrm{softcap}(x) = c \, \tanh(x / c)$$
#
# The hyperbolic tangent goes from −1 to 1 and is steep in the middle. So small numbers pass nearly unchanged, and large
# ones come close to $\pm c$ but never beyond. Cutting off all numbers at $c$ would also limit them. But then all
# numbers beyond $c$ would become equal, and training could not change them, because the slope there is 0. The picture
# shows the two caps of Gemma 2. In Jupyter, a slider below the picture replaces 50 by other caps.

# %%
x = np.array([0.5, 5.0, 25.0, 50.0, 100.0, 400.0])
bent = ops.soft_cap(x, 50.0)

assert bent.shape == x.shape
viz.with_sliders(lambda cap: viz.cap_curves([cap, 30.0]), cap=[50.0, 10.0, 20.0, 100.0])
dict(zip(x.tolist(), bent.round(3).tolist(), strict=True))

# %% [markdown]
# **Question.** At which $x$ does the cap reduce the number by 1 %? Use $\tanh(t) \approx t - t^3/3$.
#
# <details><summary>Answer</summary>
# At the number x for which (x/c)²/3 = 0.01, so at x = 0.17 c: at 8.7 for the scores and 5.2 for the logits. The caps
# also change ordinary numbers, but only a little.
# </details>
#
# ## The slope
#
# The slope is important for training. To find the influence of each number, training starts from the error of an answer
# and goes back through the model, part by part. At each part, it multiplies by the slope of that part (the *chain
# rule*). If a slope is 0, the product is 0, and the earlier parts learn nothing.
#
# $$\frac{d}{dx}\, c \tanh(x/c) = 1 - \tanh^2(x/c)$$
#
# This slope is never 0, so training can reduce a score that became too large. This is why the cap is called *soft*.

# %%
x = np.linspace(-150, 150, 301)
slopes = {
    "soft cap 50": 1 - np.tanh(x / 50) ** 2,
    "cut off at 50": (np.abs(x) < 50).astype(float),
}
assert all(slope.shape == x.shape for slope in slopes.values())

axes = viz.new_axes(6.4, 3)
for (name, slope), style in zip(slopes.items(), ("-", "--"), strict=True):
    axes.plot(x, slope, style, label=name)
axes.set(xlabel="before the cap", ylabel="slope", title="slope of the two limits")
_ = axes.legend()

# %% [markdown]
# ## The effect of the caps in this model
#
# The tiny model has the same caps as the released models. How large are its scores?

# %%
text = "There was once a little princess who lived in a great castle by the sea."
ids = tiny.tokenizer.encode(text)
run = refgemma.forward([ids], weights, config)
before = np.concatenate([layer.attention.scores.ravel() for layer in run.layers])
after = np.concatenate([layer.attention.capped.ravel() for layer in run.layers])

# Blocks, heads, queries, keys.
assert before.shape == after.shape == (6 * 6 * len(ids) ** 2,)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
left.hist(before, bins=60, log=True)
left.set(xlabel="score before the cap", ylabel="number of scores")
left.set_title("most scores are small (logarithmic scale)")
right.plot(before, before - after, ".", markersize=2)
right.set(xlabel="score before the cap", ylabel="before − after")
_ = right.set_title("reduction by the cap")

# %% [markdown]
# Which head has the large scores? The next picture shows the head with the largest score of all. It is the sink of
# notebook 2, a head that looks mostly at `<bos>`. Orange dots show how much the cap subtracts, for each query and each
# key that it may see.

# %%
scores = np.stack([layer.attention.scores[0] for layer in run.layers])
block, head, _, _ = np.unravel_index(scores.argmax(), scores.shape)
looking = run.layers[block].attention
taken = (looking.scores - looking.capped)[0, head]

assert scores.shape == (6, 6, len(ids), len(ids))
assert taken.shape == (len(ids), len(ids))
tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
title = f"block {block}, head {head}"
_ = viz.attention_map(looking.probs[0, head], tokens, title=title, taken=taken)

# %% [markdown]
# A cap can be removed in the configuration. So we can run the model without caps and compare the answers. No score here
# reaches half of its cap, but the probabilities still change. The cap takes more from a large logit than from a smaller
# one, so the most likely token becomes less likely.

# %%
without = config.changed(attn_logit_softcapping=None, final_logit_softcapping=None)
plain = refgemma.forward([ids], weights, without)
with_caps, without_caps = (viz.probabilities(r.logits[0, -1]) for r in (run, plain))

assert with_caps.shape == without_caps.shape == (config.vocab_size,)
best = np.argsort(-with_caps)[:5]
for token in best:
    name = viz.show_blanks(tiny.tokenizer.convert_ids_to_tokens([int(token)])[0])
    shares = f"with caps {with_caps[token]:.4f}   without {without_caps[token]:.4f}"
    print(f"{name:12s} {shares}")


# %% [markdown]
# **Question.** Can the final cap change which token is the most likely?
#
# <details><summary>Answer</summary>
# Not in exact arithmetic: the curve always rises, so the logits keep their order. Therefore a test that looks only at
# the most likely token does not notice a missing final cap. A test of the probabilities notices it. In half precision
# (numbers of 16 bits, notebook 7) two large logits may be rounded to the same number.
# </details>
#
# ## No probability reaches 1
#
# With a cap $c$ on $n$ logits, the largest one is at most $c$ and the others are at least $-c$. So no probability is
# larger than
#
# $$p_{max} = \frac{e^{c}}{e^{c} + (n - 1) e^{-c}}$$


# %%
def largest_probability(cap, n):
    return 1 / (1 + (n - 1) * np.exp(-2 * cap))


caps = np.linspace(1, 30, 100)
axes = viz.new_axes(6.4, 3)
for n in (2048, 256000):
    limits = largest_probability(caps, n)
    axes.plot(caps, limits, label=f"{n} tokens")
axes.set(xlabel="cap of the logits", ylabel="largest probability")
axes.set_title("how sure the model can be")
_ = axes.legend()

# %% [markdown]
# **Question.** In practice, a cap of 30 does not limit the probabilities. What would a cap of 5 do with a vocabulary of
# 256000 tokens?
#
# <details><summary>Answer</summary>
# No probability could exceed 8 %, so the model could never be sure. The smallest model in refgemma's tests,
# <code>bends</code>, has caps of 2 and 3 on purpose, so that a mistake in a cap changes the result.
# </details>
#
# ## First the cap, then the mask
#
# A masked score becomes minus infinity, whose exponential is 0. If the cap came *after* the mask, minus infinity
# would become $-c$, and $e^{-c}$ is not 0. Information from later tokens would then leak to earlier ones. The order
# is part of the model.

# %%
rng = np.random.default_rng(0)
scores = (3 * rng.standard_normal((1, 1, 6, 6))).astype(np.float32)
mask = ops.causal_mask(np.arange(6), np.arange(6))[None, None]

right = ops.softmax(ops.soft_cap(scores, 2.0), mask)
masked = np.where(mask, scores, -np.inf)
wrong = ops.softmax(ops.soft_cap(masked, 2.0), np.ones_like(mask))
assert right.shape == wrong.shape == (1, 1, 6, 6)

figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
letters = list("abcdef")
viz.attention_map(right[0, 0], letters, title="cap, then mask", axes=panels[0])
_ = viz.attention_map(
    wrong[0, 0], letters, title="mask, then cap: leaks", axes=panels[1]
)

# %% [markdown]
# **Question.** Suppose that the mask comes first, with the released cap of 50, and the best visible score is 0. How
# much does one masked key leak? Would a test with a tolerance of 1e-5 find this leak?
#
# <details><summary>Answer</summary>
# e^-50, about 2e-22: such a test would not find it. The leak is visible only if all visible scores are near −50, or
# in models with small caps. So test with caps that change the scores.
# </details>
#
# ## Exercises
#
# Write `soft_cap` from the formula. In the next cell, replace the line `raise NotImplementedError`, run the cell, and
# read the result of the check.

# %%
from refgemma.teach import exercises


def soft_cap(x, cap):
    raise NotImplementedError


exercises.check_soft_cap(soft_cap)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def soft_cap(x, cap):
#     bent = cap * np.tanh(x / cap)
#     return bent
# ```
#
# </details>


# %% [markdown]
# `attention_probs` turns scores into probabilities. The mask is true where a key may be seen. The order of the steps
# matters.


# %%
def attention_probs(scores, mask, cap):
    raise NotImplementedError


exercises.check_attention_probs(attention_probs)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def attention_probs(scores, mask, cap):
#     masked = np.where(mask, cap * np.tanh(scores / cap), -np.inf)
#     exponentials = np.exp(masked - masked.max(axis=-1, keepdims=True))
#     shares = exponentials / exponentials.sum(axis=-1, keepdims=True)
#     return shares
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Bello et al. 2016](https://arxiv.org/abs/1611.09940) capped scores with a tanh.
