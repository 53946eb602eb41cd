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
# # 10. The 9B and the 27B in numbers
#
# How large are the released models, which parts are the largest, and what does a token cost? The configuration answers
# all three questions. You need notebooks 1 (the parts of a block), 2 (*heads*, *key/value heads*, the *query scalar*
# under the root of the scores) and 5 (the cache, the window). You also need to know that a bfloat16 number has 2 bytes
# (notebook 7).
#
# ![Drawing of the model: the parts with the most numbers, and the sizes](pictures/model-10.svg)
#
# The drawing shows the 9B. The parts with the most numbers and the table of sizes are highlighted.

# %%
import numpy as np

import refgemma
from refgemma.teach import viz
from refgemma.weights.parameters import tensor_shapes

sizes = {name: refgemma.Gemma2Config.preset(name) for name in ("2b", "9b", "27b")}
for name, config in sizes.items():
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads}"
    print(
        f"{name:4s} hidden {config.hidden_size}, layers {config.num_hidden_layers}, "
        f"intermediate {config.intermediate_size}, heads {heads} of {config.head_dim}, "
        f"query scalar {config.query_pre_attn_scalar}"
    )


# %% [markdown]
# ## Parameters
#
# A **parameter** is one trained number. A matrix that turns $n$ numbers into $m$ numbers has $n \cdot m$ parameters.
# The matrices of each block have this many parameters:
#
# $$\text{attention} = \mathrm{hidden} \cdot \mathrm{head\_dim} \cdot (2\,\mathrm{heads} + 2\,\mathrm{kv\_heads}) \qquad
# \text{feed-forward} = 3 \cdot \mathrm{hidden} \cdot \mathrm{intermediate}$$


# %%
PARTS = {"embed": "embedding", "self_attn": "attention"}
PARTS |= {"mlp": "feed-forward", "norm": "norms"}


def by_part(config):
    """Trained numbers by part of the model, from its tensors' names and shapes."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, shape in tensor_shapes(config).items():
        part = next(part for sign, part in PARTS.items() if sign in name)
        counts[part] += int(np.prod(shape))
    return counts


parts = {name: by_part(config) for name, config in sizes.items()}
total = {name: sum(part.values()) for name, part in parts.items()}
for name in sizes:
    print(f"{name:4s} {total[name]:,}")

# %%
table = np.array([[part[kind] for kind in part] for part in parts.values()]) / 1e9
assert table.shape == (3, 4)

axes = viz.new_axes(6.4, 3)
left = np.zeros(3)
for column, kind in enumerate(parts["2b"]):
    axes.barh(list(sizes), table[:, column], left=left, label=kind)
    left += table[:, column]
axes.set(xlabel="billions of parameters", ylabel="model", title="where the numbers sit")
_ = axes.legend()


# %% [markdown]
# **Question.** The embedding table is counted once, although it is used twice: for the embedding and for the head. How
# large would the 2B be with a separate table for the head?
#
# <details><summary>Answer</summary>
# 3.2 billion instead of 2.6: with 256000 tokens the table is more than a fifth of the model. (The name "2b" does not
# count the table.)
# </details>
#
# ## Operations
#
# A product of a matrix and a vector takes one multiplication and one addition for each parameter. So a token costs
# about 2 operations per parameter. For each visible key, attention adds two products: query with key, and probability
# with value. These products take $4 \cdot \mathrm{heads} \cdot \mathrm{head\_dim}$ operations per key and layer.
# Floating-point operations are called **FLOPs**. (The embedding is only a lookup, but the head is a product with the
# same table.)
#
# $$\text{FLOPs per token} \approx 2 \cdot \text{parameters} + 4 \cdot \mathrm{heads} \cdot \mathrm{head\_dim} \cdot
# \sum_{\text{layers}} \text{keys seen}$$


# %%
def attention_flops(config, place):
    """For the keys that the token at `place` sees, with all others in the cache."""
    seen = [
        min(place + 1, config.sliding_window) if config.is_sliding(n) else place + 1
        for n in range(config.num_hidden_layers)
    ]
    width = config.num_attention_heads * config.head_dim
    return 4 * width * sum(seen)


places = np.arange(0, 8192, 64)
axes = viz.new_axes(6.4, 3)
for name, config in sizes.items():
    looking = np.array([attention_flops(config, int(place)) for place in places])
    shares = looking / (2 * total[name] + looking)
    assert shares.shape == places.shape
    axes.plot(places, 100 * shares, label=name)
axes.set(xlabel="place of the token", ylabel="percent of the operations")
axes.set_title("products with visible keys and values")
_ = axes.legend()


# %% [markdown]
# **Question.** Why do the curves bend at 4096?
#
# <details><summary>Answer</summary>
# From place 4096 on, the window of half of the layers is full, so they see no additional keys.
# </details>
#
# ## Memory
#
# A parameter takes two bytes in bfloat16 and four in float32. (A GiB is $2^{30}$ bytes, a GB is $10^9$ bytes.) Each
# text also needs the cache of notebook 5.


# %%
def cache_bytes(config, tokens):
    kept = sum(
        min(tokens, config.sliding_window - 1) if config.is_sliding(n) else tokens
        for n in range(config.num_hidden_layers)
    )
    return 2 * 2 * config.num_key_value_heads * config.head_dim * kept


for name, config in sizes.items():
    stored = 2 * total[name] / 2**30
    cached = cache_bytes(config, 8192) / 2**30
    cache = f"cache of 8192 tokens {cached:.2f} GiB"
    print(f"{name:4s} weights in bfloat16 {stored:5.1f} GiB, {cache}")

# %% [markdown]
# To write one token, the computer reads every parameter once. So for a single text, the speed of reading memory is the
# limit, long before the speed of arithmetic. (Large models usually run on a *GPU*, a graphics processor with fast
# memory.)
#
# $$\text{tokens per second} \le \frac{\text{bytes per second}}{\text{bytes of weights}}$$

# %%
speeds = {"a solid-state disk": 3e9, "memory of a laptop": 60e9}
speeds["memory of a large GPU"] = 3e12
bytes_read = 2 * np.array(list(total.values()))
rates = np.array([speed / bytes_read for speed in speeds.values()])
assert rates.shape == (3, 3)

axes = viz.new_axes(6.4, 3)
for row, label in enumerate(speeds):
    label = f"{label}: {speeds[label] / 1e9:g} GB/s"
    axes.semilogy(list(sizes), rates[row], "o-", label=label)
axes.set(xlabel="model", ylabel="tokens per second", ylim=(0.02, 1e5))
axes.set_title("at most, one text at a time (round figures)")
_ = axes.legend(loc="upper right")

# %% [markdown]
# **Question.** Why does one step for a batch of many texts take nearly the same time as for a single text?
#
# <details><summary>Answer</summary>
# The weights are read once for all texts. With more texts, only the caches and the arithmetic grow, and the arithmetic
# is not the limit.
# </details>
#
# ## Streaming: a model larger than memory
#
# The blocks are used one after the other, and each block only once per token. So a model can run with a single block in
# memory: the program reads a block, uses it and discards it. The files with the weights of a model are called a
# **checkpoint**. `Checkpoint.streamed` returns weights that are read from the disk when they are needed. This example
# uses the tiny model; for a 9B, only the name of the folder would differ.

# %%
from refgemma.weights.checkpoint import open_checkpoint

tiny = refgemma.load("tiny")
checkpoint = open_checkpoint(tiny.folder)
streamed = checkpoint.streamed("float32")
ids = tiny.tokenizer.encode("There was once a king")
with_all = refgemma.forward([ids], tiny.weights, tiny.config)
one_by_one = refgemma.forward([ids], streamed, tiny.config)

assert one_by_one.logits.shape == (1, len(ids), tiny.config.vocab_size)
print("the same logits:", np.array_equal(with_all.logits, one_by_one.logits))
for name, config in sizes.items():
    shapes = tensor_shapes(config).items()
    block = [shape for tensor, shape in shapes if tensor.startswith("model.layers.0.")]
    count = sum(int(np.prod(shape)) for shape in block)
    print(f"{name:4s} one block in float32: {4 * count / 2**30:.2f} GiB")

# %% [markdown]
# **Question.** The weights of the 27B are on a disk that reads 3 GB per second. How long does one token take? And a
# prompt of 1000 tokens?
#
# <details><summary>Answer</summary>
# Reading 54 GB takes 18 seconds. For the prompt, the weights are also read only once, because all its tokens use a
# block while the block is in memory. The time for the arithmetic is added: 1000 times 54 billion FLOPs.
# </details>
#
# refgemma can also make random weights of any size, called *synthetic* weights. A model with synthetic weights writes
# meaningless texts, but every shape is right. Any rows of any tensor can be generated when they are needed, without the
# 18 GB of a 9B.

# %%
from refgemma.weights.synthetic import synthetic_weights

nine = synthetic_weights(sizes["9b"])
rows = nine.embed_tokens[1000:1008]
assert rows.shape == (8, 3584) and len(nine.layers) == 42

axes = viz.new_axes(8, 2.4)
image = axes.imshow(rows[:, :64], cmap="RdBu", aspect="auto", interpolation="nearest")
axes.figure.colorbar(image, ax=axes, label="weight")
axes.set(xlabel="column", ylabel="row")
_ = axes.set_title("eight rows of a synthetic embedding table")

# %% [markdown]
# ## Exercise
#
# `parameters` returns the number of all parameters of a model from its configuration alone, by formulas like the two
# above. (The two formulas are for the matrices of one block; which other parts does the model have?) The check compares
# your result with the published numbers. In the next cell, replace the line `raise NotImplementedError`, run the cell,
# and read the result of the check.

# %%
from refgemma.teach import exercises


def parameters(config):
    raise NotImplementedError


exercises.check_parameters(parameters)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def parameters(config):
#     hidden, layers = config.hidden_size, config.num_hidden_layers
#     heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
#     attention = hidden * config.head_dim * heads
#     block = attention + 3 * hidden * config.intermediate_size + 4 * hidden
#     return config.vocab_size * hidden + layers * block + hidden
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Scaling laws](https://arxiv.org/abs/2001.08361) (Kaplan et al. 2020) count parameters and FLOPs in the
# same way.
