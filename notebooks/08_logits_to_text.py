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
# # 8. From logits to text
#
# The model returns scores, the logits; a separate step chooses a token. You need from notebook 1: *token*, *logits*,
# *softmax* (scores to probabilities). The function `next_token_logits` returns the logits after the last token. It also
# returns the *cache* of notebook 5, which is not needed here.
#
# ![Drawing of the model: the final cap and the logits are lit](pictures/model-08.svg)
#
# The last cap and the logits are highlighted. The next token is chosen from these logits.

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma.generation import processors
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
ids = tiny.tokenizer.encode('The old man looked at the boy and said, "')
names = tiny.tokenizer.convert_ids_to_tokens(range(config.vocab_size))
logits, cache = refgemma.next_token_logits([ids], weights, config)
assert logits.shape == (1, 1, config.vocab_size)

# %% [markdown]
# ## Greedy
#
# The simplest choice is always the most likely token. This is called **greedy** decoding. It always gives the same
# text, and small models soon repeat themselves.
#
# $$\mathrm{next} = \arg\max_i z_i$$

# %%
new = list(refgemma.generate(ids, weights, config, max_new_tokens=40))
print(tiny.tokenizer.decode([*ids, *new], skip_special_tokens=True))

# %% [markdown]
# ## Temperature
#
# You can also **draw** a token at random, according to the probabilities. This is called *sampling*. Before the
# softmax, all logits $z$ are divided by a number $T$, the **temperature**:
#
# $$p_i = \frac{e^{z_i / T}}{\sum_j e^{z_j / T}}$$
#
# A temperature below 1 makes likely tokens even more likely. A temperature above 1 makes the probabilities more
# similar.

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for axes, temperature in zip(panels, (0.5, 1.0, 2.0), strict=True):
    heated = processors.divide(logits[:, 0], temperature)
    assert heated.shape == (1, config.vocab_size)
    title = f"temperature {temperature}"
    viz.most_likely_tokens(heated[0], names, count=10, title=title, axes=axes)
    axes.set_xlim(0, 0.6)

# %% [markdown]
# **Question.** What happens if the temperature approaches 0? And if it grows without limit?
#
# <details><summary>Answer</summary>
# At 0 the most likely token has probability 1, which is greedy decoding. At infinity all tokens are equally likely,
# which is noise.
# </details>
#
# ## Cutting off the tail
#
# There are 2048 tokens (256000 in the released models). Most of them are very unlikely. They are called the *tail*.
# There are so many of them that one is sometimes drawn and spoils the text. Two methods prevent this. **top-k** draws
# only from the $k$ most likely tokens. **top-p** draws from the smallest set of most likely tokens whose total
# probability is at least $p$: few tokens if the model is sure, many if it is not. Both methods give all other tokens
# the score minus infinity, whose exponential is 0.

# %%
p = np.sort(viz.probabilities(logits[0, 0]))[::-1]
together = np.cumsum(p)
kept_p = int(np.argmax(together >= 0.9)) + 1  # the one that reaches 0.9 is kept
assert p.shape == together.shape == (config.vocab_size,)

axes = viz.new_axes(6.4, 3)
axes.semilogx(np.arange(1, len(p) + 1), together)
axes.axvline(40, linestyle="--", color="tab:orange", label="top-k 40")
label = f"top-p 0.9: {kept_p} tokens"
axes.axvline(kept_p, linestyle="--", color="tab:green", label=label)
axes.set(xlabel="tokens, the most likely first", ylabel="total probability")
axes.set_title("total probability of the most likely tokens")
_ = axes.legend()

# %%
for seed in range(3):
    how = {"max_new_tokens": 40, "temperature": 0.8, "top_k": 40, "seed": seed}
    drawn = refgemma.generate(ids, weights, config, **how)
    story = tiny.tokenizer.decode([*ids, *drawn], skip_special_tokens=True)
    print(f"seed {seed}:", story, "\n")

# %% [markdown]
# **Question.** The **seed** determines the sequence of random numbers. Why is it useful?
#
# <details><summary>Answer</summary>
# The same seed gives the same text again, so you can show it to others or look for the cause of a problem.
# </details>
#
# ## Drawing by adding noise
#
# You can draw from the softmax without a sum over all tokens. Add an independent random number $g$ to each logit, and
# take the token with the largest sum. Here $g = -\log(-\log u)$, where $u$ is uniform between 0 and 1; its distribution
# is called *Gumbel*. The result has exactly the softmax's probabilities ($\sim$ means: is distributed as). The next
# cell draws 20000 times from the 8 most likely tokens.
#
# $$\arg\max_i (z_i + g_i) \;\sim\; \mathrm{softmax}(z)$$

# %%
rng = np.random.default_rng(0)
best = np.argsort(-logits[0, 0])[:8]
z = logits[0, 0, best]
noise = -np.log(-np.log(rng.random((20000, 8))))
counts = np.bincount((z + noise).argmax(axis=-1), minlength=8) / 20000

expected = viz.probabilities(z)
assert noise.shape == (20000, 8) and counts.shape == expected.shape == (8,)
axes = viz.new_axes(6.4, 3)
axes.bar(np.arange(8) - 0.2, expected, width=0.4, label="softmax")
axes.bar(np.arange(8) + 0.2, counts, width=0.4, label="20000 draws with noise")
axes.set_xticks(range(8), [viz.show_blanks(names[token]) for token in best])
axes.set(xlabel="token", ylabel="share", title="the largest of noisy logits")
_ = axes.legend()


# %% [markdown]
# ## How good is a model?
#
# To measure a model, give it a text that people wrote, and compute the probability $p$ that the model gave to each next
# token. The mean of $-\log p$ is the **loss**, in nats (natural logarithms). $e^{\mathrm{loss}}$ is called
# **perplexity**. If the perplexity is 50, the model is as unsure as in a choice between 50 equally likely tokens. In
# the formula, $p(a \mid b)$ is the probability of $a$ if $b$ is known. In the code, `log_softmax` returns the
# logarithms of the softmax directly.
#
# $$\mathrm{loss} = -\frac{1}{n} \sum_t \log p(\mathrm{token}_{t+1} \mid \text{tokens up to } t)$$


# %%
def surprise(text):
    """How unlikely each token was after those before it, in nats."""
    tokens = tiny.tokenizer.encode(text)
    scores = refgemma.forward([tokens], weights, config).logits[0]
    found = -refgemma.log_softmax(scores)[np.arange(len(tokens) - 1), tokens[1:]]
    assert scores.shape == (len(tokens), config.vocab_size)
    return found, tiny.tokenizer.convert_ids_to_tokens(tokens[1:])


found, pieces = surprise("There was once a king who had a beautiful daughter.")
axes = viz.new_axes(8, 3)
axes.bar(range(len(found)), found)
axes.set_xticks(range(len(found)), map(viz.show_blanks, pieces), rotation=90)
axes.set(xlabel="token", ylabel="surprise in nats")
_ = axes.set_title(f"mean {found.mean():.2f}, perplexity {np.exp(found.mean()):.0f}")

# %% [markdown]
# **Question.** A model that knows nothing about language gives all 2048 tokens the same probability. What is its
# loss?
#
# <details><summary>Answer</summary>
# log 2048 = 7.6 nats, a perplexity of 2048.
# </details>
#
# ## Exercise
#
# `keep_top_p` returns an array that is true for the tokens that top-p keeps, in the order of the given probabilities.
# In the next cell, replace the line `raise NotImplementedError`, run the cell, and read the result of the check.

# %%
from refgemma.teach import exercises


def keep_top_p(probabilities, p):
    raise NotImplementedError


exercises.check_keep_top_p(keep_top_p)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def keep_top_p(probabilities, p):
#     order = np.argsort(-probabilities)
#     before = np.cumsum(probabilities[order]) - probabilities[order]
#     kept = np.zeros(len(probabilities), bool)
#     kept[order[before < p]] = True
#     return kept
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Top-p](https://arxiv.org/abs/1904.09751) (Holtzman et al. 2019).
