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
# # 14. Circuits: the heads of the tiny model at work
#
# A **circuit** is a group of parts of a model that together do one recognisable task. This notebook looks for three
# kinds of heads that were found in many models. It measures their effect with three tools: ablation (notebook 2), the
# logit lens (notebook 1) and direct logit attribution. The tiny model has heads of only two of these kinds; the
# notebook shows how to find this out.
#
# ![Drawing of the model: heads, the stream and the head are lit](pictures/model-14.svg)
#
# Three parts are highlighted: the heads of attention, the residual stream to which they add, and the tied head that
# reads the stream.

# %%
from dataclasses import replace
from importlib.resources import files

import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma.teach import exercises, viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
tale = " ".join(files("refgemma.teach").joinpath("tale.txt").read_text("utf-8").split())
tale = tale.replace("‘", '"').replace("’ ", '" ').replace("’", "'")  # as in training
ids = tiny.tokenizer.encode(tale)[1:]
rows = np.array([[2, *ids[n : n + 255]] for n in range(0, 1530, 255)])  # 2 is <bos>
run = refgemma.forward(rows, weights, config)
probs = np.stack([block.attention.probs for block in run.layers])

assert probs.shape == (6, 6, 6, 256, 256)  # blocks, texts, heads, queries, keys

# %% [markdown]
# ## Previous-token heads
#
# A **previous-token head** looks from each token at the token before it. Its score is its mean attention on that token:
#
# $$\mathrm{score} = \frac{1}{n - 1} \sum_{q=1}^{n-1} p_{q,\, q-1}$$

# %%
places = np.arange(1, 256)
previous = probs[:, :, :, places, places - 1].mean(axis=(1, 3))
first = probs[:, :, :, places, 0].mean(axis=(1, 3))
assert previous.shape == first.shape == (6, 6)

pictures = {"the token before": previous, "<bos>": first}
figure, all_axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for axes, (title, score) in zip(all_axes, pictures.items(), strict=True):
    image = axes.imshow(score, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="head", ylabel="block")
_ = figure.colorbar(image, ax=all_axes, label="mean share of the attention")

# %% [markdown]
# **Question.** Which block has the previous-token heads? Could a head of block 0 do the same?
#
# <details><summary>Answer</summary>
# Block 2: its heads 0, 4 and 1 have the three highest scores, and head 0 spends more than half of its attention on the
# token before. A head of block 0 could do it too, because the rotation of queries and keys depends on nothing but their
# distance (notebook 3). But training put these heads into block 2; no score in block 0 exceeds 0.2.
# </details>
#
# ## Attention sinks depend on the length
#
# Notebook 2 found that head 0 of block 3 spends 94 % of its attention on `<bos>`. The picture above shows a much
# smaller share. The text of notebook 2 had 17 tokens, but these texts have 256. So the next cell shows the share of
# `<bos>` for each place of the query.

# %%
sink = probs[3, :, 0, :, 0].mean(axis=0)
assert sink.shape == (256,)

axes = viz.new_axes(6.4, 3)
axes.plot(sink)
axes.set(xlabel="place of the query", ylabel="share of <bos>")
_ = axes.set_title("block 3, head 0")

# %% [markdown]
# **Question.** How far does the sink reach? Is the block of this head a sliding block, in which later queries cannot
# see `<bos>`?
#
# <details><summary>Answer</summary>
# About 100 tokens. The first 16 queries spend 79 % of their attention on <code>&lt;bos&gt;</code>, and after place 150
# it is below 1 %. Block 3 is a full one, so every query sees <code>&lt;bos&gt;</code>. The score of a key also depends
# on its distance, through the rotation. In large models the sink reaches over the whole text (<a
# href="https://arxiv.org/abs/2309.17453">Xiao et al. 2023</a>). So a pattern that is measured on short texts may not
# hold for long texts.
# </details>
#
# ## Induction heads
#
# A text says *Rumpelstiltskin* once. When it says *Rumpel* again, the rest of the name can be copied. In many models,
# an **induction head** copies it ([Olsson et al. 2022](https://arxiv.org/abs/2209.11895)). This head looks for an
# earlier occurrence of the current token and attends to the token *after* that occurrence. An induction head needs a
# previous-token head in an earlier block, which writes into each token which token came before.
#
# To test for induction heads, use a text of random tokens, written twice. The second copy can be predicted only from
# the repetition:
#
# $$\mathrm{score} = \frac{1}{n} \sum_{q} p_{q,\, q - n + 1} \qquad \text{for the } n \text{ queries } q
# \text{ of the second copy}$$

# %%
rng = np.random.default_rng(0)
period, texts = 20, 16
copy = rng.integers(259, 2048, (texts, period))  # no special tokens, no bytes
twice = np.concatenate([np.full((texts, 1), 2), copy, copy], axis=1)
repeated = refgemma.forward(twice, weights, config)
queries = np.arange(period + 1, 2 * period + 1)
patterns = np.stack([block.attention.probs for block in repeated.layers])
induction = patterns[:, :, :, queries, queries - period + 1].mean(axis=(1, 3))
chance = (1 / (queries + 1)).mean()
assert twice.shape == (16, 41) and induction.shape == (6, 6)

axes = viz.new_axes(5, 3)
axes.bar(np.arange(36), induction.ravel())
axes.axhline(chance, linestyle=":", color="grey", label="equal attention to all keys")
axes.set(xlabel="head (six a block)", ylabel="score", title="induction", ylim=(0, 1))
_ = axes.legend()

# %% [markdown]
# An induction head has a score near 1. Here no head exceeds 0.05, and equal attention to all keys would give 0.03. Does
# the model copy in some other way? If it does, the second copy is easier to predict than the first.


# %%
def losses(logits, ids):
    z = logits[:, :-1] - logits[:, :-1].max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0]


by_place = losses(repeated.logits, twice).mean(axis=0)
assert by_place.shape == (40,)
axes = viz.new_axes(6.4, 3)
axes.plot(np.arange(1, 41), by_place, "o-", markersize=3)
axes.axvline(period + 0.5, linestyle=":", color="grey", label="the second copy begins")
axes.set(xlabel="place", ylabel="loss in nats", ylim=(0, None))
axes.set_title("random tokens, twice")
axes.legend()
by_place[1:period].mean(), by_place[period + 1 :].mean()

# %% [markdown]
# It is not: the mean loss is 12.9 nats in the first copy and 12.8 in the second. So the model does not copy. (Both are
# far above log 2048 = 7.6, the loss of a model that knows nothing. Random tokens do not resemble the tales: at a
# quarter of the places the model gives a wrong token more than half of the probability.)
#
# **Question.** The tiny model has previous-token heads, but no induction head. How much would an induction head help on
# real text?
#
# The rule itself is easy to write: find the last earlier occurrence of the token and predict its successor.

# %%
rule, known, right = 0, 0, 0
for text, logits in zip(rows, run.logits, strict=True):
    latest = {}
    for place, token in enumerate(text[:-1]):
        if token in latest:
            known += 1
            rule += text[latest[token] + 1] == text[place + 1]
            right += logits[place].argmax() == text[place + 1]
        latest[token] = place
known, rule / known, right / known

# %% [markdown]
# <details><summary>Answer</summary>
# Little. Where a token occurred before, the rule predicts the right next token in about one case of seven, but the
# model predicts it in more than one case of three. Induction helps in long texts with many names and numbers. Olsson et
# al. saw these heads appear suddenly in training, after billions of tokens. The tiny model saw a text of 0.9 million
# tokens again and again, and its longest example had 320.
# </details>
#
# ## Ablation of every head
#
# An attention pattern does not show that the model *uses* the head. So the next cell switches off one head at a time
# and measures the rise of the loss:
#
# $$\Delta = \mathrm{loss}(\text{without the head}) - \mathrm{loss}$$


# %%
def without_head(block, head):
    silent = weights.layers[block].o_proj.copy()
    silent[:, head * 32 : (head + 1) * 32] = 0
    changed = list(weights.layers)
    changed[block] = replace(changed[block], o_proj=silent)
    return refgemma.forward(two, replace(weights, layers=changed), config).logits


two = rows[:2]  # two of the six texts, to save time
normal = losses(run.logits[:2], two).mean()
rise = np.zeros((6, 6))
for block, head in np.ndindex(rise.shape):
    rise[block, head] = losses(without_head(block, head), two).mean() - normal

assert rise.shape == (6, 6)
axes = viz.new_axes(4.6, 3.2)
top = np.abs(rise).max()
image = axes.imshow(rise, cmap="RdBu_r", vmin=-top, vmax=top)
axes.figure.colorbar(image, ax=axes, label="rise of the loss in nats")
_ = axes.set(xlabel="head", ylabel="block", title="each head switched off")

# %% [markdown]
# **Question.** Which block has the most important heads? Do the heads with the sharpest patterns matter most?
#
# <details><summary>Answer</summary>
# Block 2, the block of the previous-token heads: without head 4 the loss rises by 0.11 nats, more than without any
# other head. Of the five heads that matter most, four are in this block. But head 0, which has the sharpest pattern,
# is only the third of them. The heads of block 3, with the sinks, matter little.
# </details>
#
# ## Logit lens: where the answer appears
#
# Apply the last norm and the head to the stream after each block (notebook 1), here to all tokens of the tale:
#
# $$\mathrm{logits}_d = \mathrm{head}(\mathrm{norm}(h_d))$$

# %%
lens = viz.lens_logits(run, weights, config)
depth_losses = [losses(logits, rows).mean() for logits in lens]
hits = [(logits[:, :-1].argmax(axis=-1) == rows[:, 1:]).mean() for logits in lens]
assert lens.shape == (7, 6, 256, 2048)

figure, (left, middle) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(depth_losses, "o-")
left.axhline(np.log(2048), linestyle=":", color="grey", label="knows nothing")
left.set(xlabel="blocks done", ylabel="loss in nats", title="loss of the lens")
left.legend()
middle.plot(hits, "o-")
middle.set(xlabel="blocks done", ylabel="share of the places")
middle.set_title("the right token is the most likely")

# %% [markdown]
# **Question.** After one block, the loss is higher than the loss of a model that knows nothing. Is the stream worthless
# there?
#
# <details><summary>Answer</summary>
# No. The lens reads the stream as if the other blocks did not exist. Before block 0 the tied head predicts the token
# itself, and it is very sure of this wrong answer: 20 nats. The other blocks were trained to read this stream, and the
# head was not. After that every block lowers the loss.
# </details>
#
# ## Direct logit attribution
#
# The stream is a sum of these parts: the embedding, and for each block six heads and a feed-forward layer. The last
# norm divides it by one number $s$. So the logit before its cap is a sum too, with one term for each part. This is
# **direct logit attribution** ([Elhage et al. 2021](https://transformer-circuits.pub/2021/framework/index.html)). The
# sign $\odot$ multiplies two vectors number by number:
#
# $$z_t = \sum_{\text{parts}} \frac{\mathrm{part} \odot (1 + w)}{s} \cdot E[t]$$
#
# Gemma 2 has one difficulty: norm 2 stands between the heads and the stream. But this norm also divides the sum of the
# heads by one number, so each head can be divided by the same number.


# %%
def attribute(run, place, token):
    """The terms of one logit: embedding, heads (6, 6), feed-forward (6,)."""
    size = viz.root_mean_square(run.layers[-1].out[0, place])
    direction = (1 + weights.norm) * weights.embed_tokens[token] / size
    heads, fed = np.zeros((6, 6)), np.zeros(6)
    for number, layer in enumerate(weights.layers):
        block = run.layers[number]
        mixed = block.attention.mixed[0, place].reshape(6, 32)
        by_head = np.einsum("oha,ha->ho", layer.o_proj.reshape(234, 6, 32), mixed)
        factor = 1 + layer.post_attention_layernorm
        size = viz.root_mean_square(block.attention.out[0, place])
        heads[number] = by_head * factor / size @ direction
        fed[number] = block.post_feedforward_layernorm[0, place] @ direction
    return run.embedded[0, place] @ direction, heads, fed


# %%
girl = tiny.tokenizer.encode("The little girl looked at the")
answer = refgemma.forward([girl], weights, config)
best = int(answer.logits[0, -1].argmax())
name = tiny.tokenizer.convert_ids_to_tokens([best])[0]
embedding, heads, fed = attribute(answer, -1, best)
total = embedding + heads.sum() + fed.sum()

assert heads.shape == (6, 6) and fed.shape == (6,)
assert np.isclose(total, answer.raw_logits[0, -1, best], atol=1e-4)
figure, (left, middle) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
top = np.abs(heads).max()
image = left.imshow(heads, cmap="RdBu", vmin=-top, vmax=top)
figure.colorbar(image, ax=left, label="part of the logit")
left.set(xlabel="head", ylabel="block", title=f"heads, for {viz.show_blanks(name)}")
middle.bar(["embedding", *map(str, range(6))], [embedding, *fed])
middle.set(xlabel="feed-forward of block", ylabel="part of the logit")
_ = middle.set_title(f"the logit, the sum of all parts: {total:.2f}")

# %% [markdown]
# **Question.** Which parts write the answer *door*? Which head helps most, and does it look at the right word?
#
# <details><summary>Answer</summary>
# The feed-forward layers: together they give 6.5 of the 7.0. Of the heads, head 4 of block 2 helps most, with 0.9; the
# ablation found the same head. It spends most of its attention on <code>at</code>, the token before the last. The
# attribution is <em>direct</em>: a head that only prepares the input of a later block gets no share of the result. So a
# head may have a small share here and a large effect in the ablation.
# </details>
#
# ## Exercise
#
# `induction_scores` gets the attention of one block on a repeated text: `probs` with the axes (heads, queries, keys).
# The text is `<bos>`, followed by the same `period` tokens twice. Each query of the second copy has an earlier
# occurrence in the first copy. For each head, return the mean attention of these queries on the token after the earlier
# occurrence. Replace the line that raises, run the cell, and read the result of the check.


# %%
def induction_scores(probs, period):
    raise NotImplementedError


exercises.check_induction_scores(induction_scores)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def induction_scores(probs, period):
#     queries = np.arange(period + 1, 2 * period + 1)
#     return probs[:, queries, queries - period + 1].mean(axis=-1)
# ```
#
# </details>
