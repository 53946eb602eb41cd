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
# # 13. New in Gemma 2
#
# The earlier notebooks explained the parts of Gemma 2. Only a few parts were new in 2024. This notebook compares Gemma
# 2 with similar models. Then it removes or replaces one part after the other in the tiny model (*ablation*, notebook 2)
# and measures how much worse the model predicts.
#
# ![Drawing of the model: norms, heads, caps, masks and the feed-forward layer are lit](pictures/model-13.svg)
#
# The parts in which Gemma 2 differs from Gemma 1 or from Llama 3 are highlighted.
#
# | part | Llama 3 8B | Gemma 1 7B | Gemma 2 9B | Gemma 3 12B |
# | --- | --- | --- | --- | --- |
# | released | April 2024 | February 2024 | June 2024 | March 2025 |
# | query heads / key heads | 32 / 8 | 16 / 16 | 16 / 8 | 16 / 8 |
# | sliding window | none | none | 4096, every second block | 1024, five of six blocks |
# | limit of the scores | none | none | soft cap 50 | QK-norm |
# | limit of the logits | none | none | soft cap 30 | none |
# | norms in a block | 2 | 2 | 4 | 4, and QK-norm |
# | factor of a norm | w | 1 + w | 1 + w | 1 + w |
# | feed-forward | SiLU gate | GELU gate | GELU gate | GELU gate |
# | embedding times √hidden | no | yes | yes | yes |
# | head | its own table | tied | tied | tied |
# | rotary base | 500,000 | 10,000 | 10,000 | 10,000 sliding, 1,000,000 full |
#
# QK-norm is explained below. SiLU is a curve similar to GELU, $x / (1 + e^{-x})$. The rotary base is $\theta$ of
# notebook 3.
#
# Sources: the reports on [Llama 3](https://arxiv.org/abs/2407.21783), [Gemma 1](https://arxiv.org/abs/2403.08295),
# [Gemma 2](https://arxiv.org/abs/2408.00118) and [Gemma 3](https://arxiv.org/abs/2503.19786), and the released
# configurations.

# %%
from dataclasses import replace
from importlib.resources import files

import numpy as np

import refgemma
from refgemma import layers, model, ops
from refgemma.teach import exercises, viz

tiny = refgemma.load("tiny")
config, weights = tiny.config, tiny.weights
tale = " ".join(files("refgemma.teach").joinpath("tale.txt").read_text("utf-8").split())
tale = tale.replace("‘", '"').replace("’ ", '" ').replace("’", "'")  # as in training
ids = tiny.tokenizer.encode(tale)[1:]
rows = np.array([[2, *ids[n : n + 255]] for n in range(0, 1530, 255)])  # 2 is <bos>

assert rows.shape == (6, 256)

# %% [markdown]
# ## The measure
#
# The measure is the perplexity (notebook 8) on "The Frog-Prince", one of the tales on which the model was trained:
#
# $$\mathrm{perplexity} = \exp\big(\mathrm{mean}(-\log p_{\text{next token}})\big)$$
#
# One warning applies to all numbers below. The model was *trained* with every part. If a part is removed afterwards,
# the perplexity shows how much this model relies on it. It does not show whether a model that is trained without the
# part would be worse. To find that out, one must train both models. Some papers did this, and the text below gives
# their results.


# %%
def perplexity(logits):
    z = logits[:, :-1] - logits[:, :-1].max(axis=-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(log_p, rows[:, 1:, None], -1).mean()))


results = {}


def measure(name, weights=weights, config=config, **given):
    tokens = None if given else rows
    logits = refgemma.forward(tokens, weights, config, **given).logits
    results[name] = perplexity(logits)
    print(f"{name:36s} {results[name]:8.2f}")


measure("Gemma 2")
assert refgemma.forward(rows, weights, config).logits.shape == (6, 256, 2048)

# %% [markdown]
# ## The caps
#
# $$\mathrm{score} = 50 \tanh(s / 50) \qquad \mathrm{logit} = 30 \tanh(z / 30)$$

# %%
caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
measure("no cap on the scores", config=config.changed(attn_logit_softcapping=None))
measure("no cap on the logits", config=config.changed(final_logit_softcapping=None))
measure("no caps", config=config.changed(**caps))
run = refgemma.forward(rows, weights, config)
largest = [float(np.abs(block.attention.scores).max()) for block in run.layers]
assert run.raw_logits.shape == (6, 256, 2048)
max(largest), float(np.abs(run.raw_logits).max())

# %% [markdown]
# **Question.** Without caps the tiny model is as good as with them. Then why does Gemma 2 have them?
#
# <details><summary>Answer</summary>
# The caps help to train large models. No score here is above 34 and no logit above 25, so the caps have little to do.
# In large models, scores can grow from step to step until each softmax looks at one key only. Its slope is then 0, and
# training can break down. The caps came from a <a href="https://arxiv.org/abs/1611.09940">paper of 2016</a>. At the
# release, Google also saw only <a
# href="https://huggingface.co/blog/gemma2#soft-capping-and-attention-implementations">very minor differences</a> when
# the caps of attention were left out after training.
# </details>
#
# ## From caps to QK-norm
#
# At first, fast programs for attention (FlashAttention) could not compute a cap. Gemma 3 replaced the cap by
# **QK-norm**: each query and each key goes through its own RMSNorm, so their product is limited without a cap ([Henry
# et al. 2020](https://arxiv.org/abs/2010.04245), [Dehghani et al. 2023](https://arxiv.org/abs/2302.05442)):
#
# $$s_{ij} = \frac{\mathrm{norm}(q_i) \cdot \mathrm{norm}(k_j)}{\sqrt{\mathrm{query\_pre\_attn\_scalar}}}$$
#
# The next cell imitates scores that grow in training: it multiplies the queries of one block by a factor.

# %%
seen = run.layers[3].attention
q, k = seen.q_rot[:1], ops.repeat_kv(seen.k_rot[:1], 3)
no_factor, places = np.zeros(32, np.float32), np.arange(256)
mask = ops.causal_mask(places, places)[None, None]
assert q.shape == k.shape == (1, 6, 256, 32)

factors, best = [1, 3, 10, 30, 100], {"no limit": [], "soft cap 50": [], "QK-norm": []}
for factor in factors:
    plain = ops.attention_scores(q * factor, k, 39**-0.5)
    unit_q, unit_k = (ops.rms_norm(x, no_factor, 1e-6) for x in (q * factor, k))
    limited = ops.soft_cap(plain, 50.0), ops.attention_scores(unit_q, unit_k, 39**-0.5)
    for found, scores in zip(best.values(), (plain, *limited), strict=True):
        found.append(ops.softmax(scores, mask).max(axis=-1)[0, :, 64:].mean())

axes = viz.new_axes(6.4, 3)
for name, shares in best.items():
    axes.semilogx(factors, shares, "o-", label=name)
axes.set(xlabel="factor of the queries", ylabel="mean share")
axes.set_title("attention on the best key")
_ = axes.legend()

# %% [markdown]
# **Question.** Follow each line from a factor of 1 to 100. Which of the three methods keeps its attention pattern?
#
# <details><summary>Answer</summary>
# Only QK-norm: it divides by the length of the query, so the factor has no effect. (The share with QK-norm is low,
# because the tiny model was not trained with QK-norm. Gemma 3 learns the factors <code>1 + w</code> of these norms.)
# Without a limit, 99 % of the attention goes to one key. With the cap, the share rises too, but at a factor of 100 each
# query has 18 keys, on average, whose scores are within 0.1 of 50. The best key cannot stand out any more, and its
# share falls to 6 %.
# </details>
#
# ## Sliding windows
#
# Half of the blocks see the last 64 tokens only (4096 in the released models). This saves memory and time (notebook 5).
# How does the model depend on the window? The window can be changed without training.
#
# $$\text{query } i \text{ sees keys } j \text{ with } 0 \le i - j < \mathrm{window}$$

# %%
windows = [2, 4, 8, 16, 32, 64, 96, 128, 256]
curve = []
for window in windows:
    changed = config.changed(sliding_window=window)
    curve.append(perplexity(refgemma.forward(rows, weights, changed).logits))
assert np.shape(curve) == (9,)

axes = viz.new_axes(6.4, 3)
axes.semilogx(windows, curve, "o-")
axes.set_xticks(windows, windows)
axes.minorticks_off()
axes.axvline(64, linestyle=":", color="grey", label="trained")
axes.set(xlabel="window", ylabel="perplexity", title="another window after training")
_ = axes.legend()
kinds = ("sliding_attention", "full_attention")
measure("full blocks only", config=config.changed(layer_types=kinds[1:] * 6))
measure("sliding blocks only", config=config.changed(layer_types=kinds[:1] * 6))
exchanged = config.changed(layer_types=kinds[::-1] * 3)
measure("full and sliding exchanged", config=exchanged)

# %% [markdown]
# **Question.** A window of 16 keys is nearly as good as one of 64, but a window of 128 doubles the perplexity. How can
# more keys do harm?
#
# <details><summary>Answer</summary>
# The sliding blocks have never seen a key more than 63 places away, so for larger distances their scores are untrained.
# Near keys carry most of the information: even with six sliding blocks the perplexity rises only from 17.1 to 17.4. The
# <a href="https://arxiv.org/abs/2408.00118">report on Gemma 2</a> also finds that a smaller window after training
# changes the perplexity of the 9B very little. Gemma 3 went further, with five sliding blocks for each full one.
# </details>
#
# ## Fewer key heads
#
# Two key heads serve six query heads. If the key heads are repeated, a model with six key heads computes the same
# result. A model with fewer key heads loses information: [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245) made
# fewer key heads out of many, either by their mean or by keeping the first of them, and trained on.
#
# $$\bar W_k = \tfrac{1}{2} (W_k^{(0)} + W_k^{(1)})$$


# %%
def change_key_heads(change):
    made = []
    for layer in weights.layers:
        k, v = (p.reshape(2, 32, 234) for p in (layer.k_proj, layer.v_proj))
        k, v = (change(p).reshape(-1, 234) for p in (k, v))
        made.append(replace(layer, k_proj=k, v_proj=v))
    return replace(weights, layers=made)


repeated = change_key_heads(lambda p: np.repeat(p, 3, axis=0))
mean = change_key_heads(lambda p: p.mean(axis=0))
first = change_key_heads(lambda p: p[:1])
assert repeated.layers[0].k_proj.shape == (6 * 32, 234)
assert mean.layers[0].k_proj.shape == first.layers[0].k_proj.shape == (32, 234)
measure("six key heads", repeated, config.changed(num_key_value_heads=6))
measure("one key head: the mean", mean, config.changed(num_key_value_heads=1))
measure("one key head: the first", first, config.changed(num_key_value_heads=1))

# %% [markdown]
# **Question.** Which of the two ways to make one key head is better? What does the model with six key heads gain?
#
# <details><summary>Answer</summary>
# The mean is better (32.5 against 35.3), as in the paper: it keeps something of each head. The model with six key heads
# gains nothing, because its heads are copies, but its cache is three times as large. The report on Gemma 2 compares a
# 9B trained with grouped heads and a 9B trained without. Grouped heads gave nearly the same quality, with fewer
# parameters and a faster answer.
# </details>
#
# ## 144 = 4608 / 32
#
# Scores are divided by the root of `query_pre_attn_scalar`. It is 256 in the 2B and the 9B, the size of a head. In the
# 27B it is 144: 4608 numbers in the stream, divided by 32 heads. (Its heads have 128 numbers.) The 9B was first
# published with $3584 / 16 = 224$, which was
# [corrected](https://github.com/huggingface/transformers/issues/31891) to 256. The tiny model follows the 27B:
# $234 / 6 = 39$, with heads of 32.

# %%
scalars = [8, 16, 24, 32, 39, 48, 64, 144]
curve = []
for scalar in scalars:
    changed = config.changed(query_pre_attn_scalar=scalar)
    curve.append(perplexity(refgemma.forward(rows, weights, changed).logits))
assert np.shape(curve) == (8,)

axes = viz.new_axes(6.4, 3)
axes.semilogx(scalars, curve, "o-")
axes.set_xticks(scalars, scalars)
axes.minorticks_off()
for value, name in ((39, "hidden / heads = 39"), (32, "head_dim = 32")):
    axes.axvline(value, linestyle=":", color="grey")
    axes.text(value, 18 if value == 39 else 18.6, " " + name)
axes.set(xlabel="query_pre_attn_scalar", ylabel="perplexity")
axes.set_title("the scale of the scores")
wide27 = refgemma.Gemma2Config.preset("27b")
wide27.hidden_size / wide27.num_attention_heads, wide27.query_pre_attn_scalar

# %% [markdown]
# **Question.** A port divides by the root of 32 in place of 39. Would the perplexity reveal the mistake?
#
# <details><summary>Answer</summary>
# No: both are 17.1. The curve is flat near its minimum. So a mistake in this number was published, and nobody noticed
# it for weeks. A comparison of tensors (notebook 9) finds the mistake at once.
# </details>
#
# ## Four norms, and 1 + w
#
# The loop below computes the model again, but the norms that `without` names return their input unchanged:
#
# $$h' = h + \mathrm{norm}_2(\mathrm{attention}(\mathrm{norm}_1(h))) \qquad h'' = h' +
# \mathrm{norm}_4(\mathrm{feedforward}(\mathrm{norm}_3(h')))$$

# %%
names = ["input_layernorm", "post_attention_layernorm"]
names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
start = model.begin(rows, weights, config)
turn = {"cos": start.cos, "sin": start.sin}
assert start.embedded.shape == (6, 256, 234)


# %%
def run_without(without):
    def norm(x, n):  # the norm number n of the block
        factors, eps = getattr(layer, names[n - 1]), config.rms_norm_eps
        return x if n in without else ops.rms_norm(x, factors, eps)

    h = start.embedded
    for number, layer in enumerate(weights.layers):
        past = start.past[number]
        mask = model.layer_mask(number, past, start.inputs, config)
        scale, cap = config.attention_scale, config.attn_logit_softcapping
        settings = {"past": past, "mask": mask, "scale": scale, "cap": cap} | turn
        h = h + norm(layers.attention(norm(h, 1), layer, **settings).out, 2)
        h = h + norm(layers.feed_forward(norm(h, 3), layer, config.activation).out, 4)
    last = ops.rms_norm(h, weights.norm, config.rms_norm_eps)
    return model.head(last, weights, config)[1]


# %%
assert np.array_equal(run_without([]), run.logits)
for title, without in (("before", [1, 3]), ("after", [2, 4])):
    name = f"no norms {title} the halves"
    results[name] = perplexity(run_without(without))
    print(f"{name:36s} {results[name]:8.2f}")


def change_norms(change):
    made = [
        replace(layer, **{name: change(getattr(layer, name)) for name in names})
        for layer in weights.layers
    ]
    return replace(weights, layers=made, norm=change(weights.norm))


assert change_norms(np.zeros_like).norm.shape == (234,)
measure("all factors 1", change_norms(np.zeros_like))
measure("factor w in place of 1 + w", change_norms(lambda w: w - 1))

# %% [markdown]
# **Question.** Without its learned factors the model is much better than with the wrong factors `w`. Why?
#
# <details><summary>Answer</summary>
# If all factors are 1, the sizes of the vectors are a little wrong, and the perplexity is 54. With <code>w</code>, many
# factors have the wrong sign: 49 % of the numbers <code>w</code> are negative, but none of the numbers <code>1 +
# w</code>. The perplexity is then 7703, worse than the perplexity of a model that knows nothing (2048).
# </details>
#
# ## The other parts
#
# GELU, its gate, and the embedding scale are older than Gemma 2. A gate multiplies the feed-forward layer's numbers by
# other numbers ([Shazeer 2020](https://arxiv.org/abs/2002.05202)). The sign $\odot$ multiplies two vectors number by
# number:
#
# $$\mathrm{feedforward}(x) = W_{down} \, \big(\mathrm{gelu}(W_{gate}\, x) \odot W_{up}\, x\big)$$

# %%
measure("SiLU in place of GELU", config=config.changed(hidden_activation="silu"))
measure("no embedding scale", inputs_embeds=weights.embed_tokens[rows])
order = sorted(results, key=results.get)
axes = viz.new_axes(7, 4.6)
axes.barh(order, [results[name] for name in order])
axes.axvline(results["Gemma 2"], linestyle=":", color="grey")
_ = axes.set(xscale="log", xlabel="perplexity (lower is better)", xlim=(10, 20000))

# %% [markdown]
# A tied head cannot be removed after training, because a separate table for the head would have to be learned. This
# table would add 918 million numbers to the 9B, and a fifth to the 2B ([Press and Wolf
# 2016](https://arxiv.org/abs/1608.05859)).
#
# **Question.** Which parts of the table at the top are in Gemma 2, but not in Gemma 1? Which of them did Gemma 3 keep?
#
# <details><summary>Answer</summary>
# Sliding windows, fewer key heads, norms 2 and 4, and the two caps. Gemma 3 kept the first three, and replaced the caps
# by QK-norm. The parts that this model relies on most (the factor <code>1 + w</code> and the embedding scale) are in
# all three.
# </details>
#
# ## Exercise
#
# Write the scores of Gemma 3. `q` and `k` have the axes (heads, tokens, head_dim) and the same number of heads. Each
# goes through an RMSNorm over `head_dim` with its own weight and an epsilon of 1e-6, as in notebook 6. The scores are
# the products, divided by the root of `scalar`. Replace the line that raises, run the cell, and read the result of the
# check.


# %%
def qk_norm_scores(q, k, q_weight, k_weight, scalar):
    raise NotImplementedError


exercises.check_qk_norm_scores(qk_norm_scores)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def qk_norm_scores(q, k, q_weight, k_weight, scalar):
#     def norm(x, weight):
#         size = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
#         return x / size * (1 + weight)
#
#     q, k = norm(q, q_weight), norm(k, k_weight)
#     return q @ k.swapaxes(-1, -2) / np.sqrt(scalar)
# ```
#
# </details>
