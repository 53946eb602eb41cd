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
# # 10. The 9B and the 27B by numbers
#
# How large are the released models, where do their numbers sit, and what does a token cost? All of it follows from
# the configuration. You need notebooks 1 (the parts of a block), 2 (*heads*, *key/value heads*, the *query scalar*
# under the root of the scores), 5 (the cache, the window) and of 7 that a bfloat16 number has 2 bytes.

# %%
import numpy as np

import refgemma
from refgemma.teach import viz
from refgemma.weights.parameters import tensor_shapes

sizes = {name: refgemma.Gemma2Config.preset(name) for name in ("2b", "9b", "27b")}
for name, config in sizes.items():
    print(
        f"{name:4s} hidden {config.hidden_size}, layers {config.num_hidden_layers}, intermediate "
        f"{config.intermediate_size}, heads {config.num_attention_heads}/{config.num_key_value_heads} "
        f"of {config.head_dim}, query scalar {config.query_pre_attn_scalar}"
    )


# %% [markdown]
# ## Parameters
#
# A **parameter** is one trained number. A matrix from $n$ to $m$ numbers has $n \cdot m$ of them. In each block:
#
# $$\text{attention} = \mathrm{hidden} \cdot \mathrm{head\_dim} \cdot (2\,\mathrm{heads} + 2\,\mathrm{kv\_heads}) \qquad
# \text{feed-forward} = 3 \cdot \mathrm{hidden} \cdot \mathrm{intermediate}$$


# %%
PARTS = {"embed": "embedding", "self_attn": "attention", "mlp": "feed-forward", "norm": "norms"}


def by_part(config):
    """Trained numbers by part of the model, from the names and shapes of its tensors."""
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, shape in tensor_shapes(config).items():
        part = next(part for sign, part in PARTS.items() if sign in name)
        counts[part] += int(np.prod(shape))
    return counts


parts = {name: by_part(config) for name, config in sizes.items()}
total = {name: sum(part.values()) for name, part in parts.items()}
for name, config in sizes.items():
    gate = tensor_shapes(config)["model.layers.0.mlp.gate_proj.weight"]
    assert gate == (config.intermediate_size, config.hidden_size)
    assert parts[name]["feed-forward"] == config.num_hidden_layers * 3 * gate[0] * gate[1]
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
# **Question.** The embedding table is counted once although it is used twice. What would the 2B be with a head of its
# own?
#
# <details><summary>Answer</summary>
# 3.2 billion instead of 2.6: with 256000 tokens the table is more than a fifth of the model. (Hence the name "2b",
# which leaves the table out.)
# </details>
#
# ## Operations
#
# A product of a matrix and a vector takes a multiplication and an addition for each parameter. So a token costs about
# 2 operations for each parameter. Attention adds two products for each key that is seen, query with key and share
# with value: for each layer $4 \cdot \mathrm{heads} \cdot \mathrm{head\_dim}$ operations. Floating-point operations
# are called **FLOPs**. (The embedding is only looked up; but the head, which is the same table, is a product.)
#
# $$\text{FLOPs a token} \approx 2 \cdot \text{parameters} + 4 \cdot \mathrm{heads} \cdot \mathrm{head\_dim} \cdot
# \sum_{\text{layers}} \text{keys seen}$$


# %%
def attention_flops(config, place):
    """For the keys that the token at `place` sees, with everything before it in the cache."""
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
axes.set(xlabel="place of the token", ylabel="percent", title="attention's part of the work")
_ = axes.legend()


# %% [markdown]
# **Question.** The curves bend at 4096. Why?
#
# <details><summary>Answer</summary>
# From there on half of the layers see no more keys than before: their window is full.
# </details>
#
# ## Memory
#
# Two bytes a parameter in bfloat16, four in float32; and the cache of notebook 5 for each text.


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
    print(f"{name:4s} weights in bfloat16 {stored:5.1f} GiB, cache of 8192 tokens {cached:.2f} GiB")

# %% [markdown]
# To write one token, every parameter is read once. So the speed of a single text is bounded by how fast memory can be
# read, long before arithmetic counts. (A *GPU*, a graphics processor, is what large models are usually run on; its
# own memory is fast.)
#
# $$\text{tokens a second} \le \frac{\text{bytes a second}}{\text{bytes of weights}}$$

# %%
speeds = {"a solid-state disk": 3e9, "memory of a laptop": 60e9, "memory of a large GPU": 3e12}
rates = np.array([[speed / (2 * count) for count in total.values()] for speed in speeds.values()])
assert rates.shape == (3, 3)

axes = viz.new_axes(6.4, 3)
for row, label in enumerate(speeds):
    axes.semilogy(list(sizes), rates[row], "o-", label=f"{label}: {speeds[label] / 1e9:g} GB/s")
axes.set(
    xlabel="model", ylabel="tokens a second", title="at most, one text at a time (round figures)", ylim=(0.02, 1e5)
)
_ = axes.legend(loc="upper right")

# %% [markdown]
# **Question.** Many texts at once (a batch) are computed nearly as fast as one. Why?
#
# <details><summary>Answer</summary>
# The weights are read once for all of them. Only the arithmetic grows, of which there is plenty, and the caches.
# </details>
#
# ## Streaming: a model larger than memory
#
# Blocks are used one after the other, and each only once a token. So a model can be run with a single block in
# memory: read it, use it, forget it. The files with the weights of a model are called a **checkpoint**, and
# `Checkpoint.streamed` gives weights that are read from the disk when they are asked for. Shown here with the tiny
# model; nothing but the file's name would be different for a 9B.

# %%
from refgemma.weights.checkpoint import open_checkpoint

tiny = refgemma.load("tiny")
checkpoint = open_checkpoint(tiny.folder)
streamed = checkpoint.streamed("float32")
ids = tiny.tokenizer.encode("Once upon a time")
with_all = refgemma.forward([ids], tiny.weights, tiny.config)
one_by_one = refgemma.forward([ids], streamed, tiny.config)

assert one_by_one.logits.shape == (1, len(ids), tiny.config.vocab_size)
assert np.array_equal(with_all.logits, one_by_one.logits)
largest = {
    name: sum(int(np.prod(s)) for n, s in tensor_shapes(c).items() if n.startswith("model.layers.0."))
    for name, c in sizes.items()
}
for name, count in largest.items():
    print(f"{name:4s} one block in float32: {4 * count / 2**30:.2f} GiB")

# %% [markdown]
# **Question.** At 3 GB a second, how long does one token of the 27B take from a disk? And a prompt of 1000 tokens?
#
# <details><summary>Answer</summary>
# 54 GB take 18 seconds. The prompt takes the same reading, since all its tokens use a block while it is there, and
# then the arithmetic: 1000 times 54 billion FLOPs.
# </details>
#
# Weights with random numbers in them are called *synthetic* here. They say nothing, but have every shape right, and
# any rows of any tensor can be made when they are needed, without the 18 GB of a 9B.

# %%
from refgemma.weights.synthetic import synthetic_weights

nine = synthetic_weights(sizes["9b"])
rows = nine.embed_tokens[1000:1008]
assert rows.shape == (8, 3584) and len(nine.layers) == 42

axes = viz.new_axes(8, 2.4)
image = axes.imshow(rows[:, :64], cmap="RdBu", aspect="auto", interpolation="nearest")
axes.figure.colorbar(image, ax=axes, label="weight")
_ = axes.set(xlabel="column", ylabel="row", title="eight rows of a synthetic embedding table")

# %% [markdown]
# ## Exercise
#
# `parameters` gives the number of all parameters of a model from its configuration alone, by formulas like the two
# above (which are for one block; what else is there?). It is compared with what was published. Replace the line that
# raises, run the cell, and read what the check says.

# %%
from refgemma.teach import exercises


def parameters(config):
    raise NotImplementedError


exercises.check_parameters(parameters)
