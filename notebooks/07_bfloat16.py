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
# # 7. bfloat16: where numbers are rounded, and the cost
#
# Models are stored and run with 16 bits per number, to save memory. This notebook shows how 16 bits change the numbers,
# and where the model rounds. You need from notebook 1: *block*, *residual stream*, *logits*; from notebook 2 *port* (a
# reimplementation of the model in another program); from notebook 6 the *norm* and its factor $1 + w$. PyTorch is the
# library that usually runs the model.
#
# ![Drawing of the model: the norms, the rotation and the softmax are lit](pictures/model-07.svg)
#
# The parts that compute in float32 inside a bfloat16 model are highlighted.

# %%
import numpy as np

import refgemma
from refgemma import ops
from refgemma.precision import bf16, f16, narrow, wide
from refgemma.teach import viz

precisions = ("float64", "float32", "float16", "bfloat16")
models = {name: refgemma.load("tiny", name) for name in precisions}
tokenizer = models["float32"].tokenizer


# %% [markdown]
# ## The format
#
# A floating-point number is a sign, a power of two (its *exponent*), and digits (its *significand*). **float32** has 8
# bits for the exponent and 24 for the significand. (The first of the 24 is always 1, so it is not stored.) **bfloat16**
# is the upper half of a float32: the same 8 bits for the exponent, but only 8 bits for the significand. (The *b* stands
# for the group that invented the format, Google Brain.) **float16** has 5 bits for the exponent and 11 for the
# significand: more digits, but no numbers above 65504. bfloat16 and float16 are called *half precision*. The distance
# from a number to the next one is called an **ulp** (*unit in the last place*): at 1.0 it is $2^{-7}$ in bfloat16,
# $2^{-10}$ in float16 and $2^{-23}$ in float32. In the code, `bf16` and `f16` round to these formats, and `wide`
# returns the result as ordinary float32 numbers.


# %%
def bits(x):
    """The 16 bits of a bfloat16 number: sign, power, digits."""
    word = int(np.array(wide(bf16(x)), np.float32).view(np.uint32)) >> 16
    text = f"{word:016b}"
    return f"{text[0]} {text[1:9]} {text[9:]}"


for x in (1.0, 1 + 2**-7, 0.1, 3.14159, -2.5):
    print(f"{x:10.6f} -> {float(bf16(x)):10.6f}   {bits(x)}")
bf16(1 + 2**-7), bf16(1 + 2**-9)  # an ulp counts, a quarter of an ulp does not

# %% [markdown]
# ## Rounding
#
# A result between two bfloat16 numbers is **rounded** to the nearer of the two. If both are equally near, the result is
# rounded to the number whose last bit is 0 (*ties to even*). So the **relative error**, the error divided by the
# number, is at most half an ulp, $2^{-8}$ in bfloat16:
#
# $$|\mathrm{round}(x) - x| \le 2^{-8}\, |x|$$

# %%
x = np.linspace(0.5, 8, 4001).astype(np.float32)
rounded = {"bfloat16": wide(bf16(x)), "float16": wide(f16(x))}
errors = {name: np.abs(numbers - x) / x for name, numbers in rounded.items()}
assert all(error.shape == x.shape for error in errors.values())

axes = viz.new_axes(7, 3)
for name, error in errors.items():
    axes.plot(x, error, linewidth=0.6, label=name)
axes.set(xlabel="number", ylabel="relative error")
axes.set_title("rounding: worst just above a power of two")
_ = axes.legend()

# %% [markdown]
# **Question.** What is `bf16(256) + bf16(1)`, and why? What happens if you add 300 ones, one after another, in
# bfloat16?
#
# <details><summary>Answer</summary>
# 256: the next bfloat16 number is 258, and 257 is in the middle, so it is rounded to the number whose last bit is 0. If
# you add ones, the sum never exceeds 256. Therefore sums are computed in float32, and only their result is rounded.
# </details>
#
# ## One kernel, one rounding
#
# A **kernel** is one operation that PyTorch starts: a product of matrices, a sum, a tanh. In a bfloat16 model, a kernel
# reads bfloat16 numbers, computes in float32 and rounds its result once. refgemma follows this rule: a `BF16` array
# rounds the result of every NumPy operation. Two operations round twice. The result can differ from a result that is
# rounded once at the end:
#
# $$\mathrm{round}(\mathrm{round}(a \cdot b) + c) \ne \mathrm{round}(a \cdot b + c)$$

# %%
rng = np.random.default_rng(0)
a, b, c = (bf16(rng.standard_normal(1000)) for _ in range(3))
twice = a * b + c  # two kernels: the product is rounded, then the sum
once = bf16(wide(a) * wide(b) + wide(c))  # as if it were one kernel

assert twice.shape == once.shape == (1000,)
print(f"{np.mean(twice != once):.0%} of the results differ")


# %% [markdown]
# ## Where the model computes in float32
#
# `wide(x)` converts to float32 (PyTorch's `x.float()`), and `narrow(y, like=x)` rounds back to 16 bits. Gemma's norm
# computes every step in float32 and rounds once. Llama, a similar model, rounds before it multiplies by the weight.
# With the same weights, the two ways give different numbers. In the formulas, $\hat x$ is the vector divided by its
# root mean square:
#
# $$\text{Gemma: } \mathrm{round}\big(\hat x\,(1 + w)\big) \qquad \text{Llama's way: }
# \mathrm{round}\big(\mathrm{round}(\hat x) \cdot \mathrm{round}(1 + w)\big)$$


# %%
def norm_rounded_early(x, weight, eps):
    size = np.sqrt(np.mean(wide(x) ** 2, axis=-1, keepdims=True) + eps)
    normed = narrow(wide(x) / size, like=x)
    return normed * narrow(1 + wide(weight), like=x)


x = bf16(rng.standard_normal((50, 234)))
weight = models["bfloat16"].weights.layers[0].input_layernorm
right, early = ops.rms_norm(x, weight, 1e-6), norm_rounded_early(x, weight, 1e-6)
assert right.shape == early.shape == x.shape and isinstance(right, refgemma.BF16)
print(f"{np.mean(right != early):.0%} of the elements differ")

# %% [markdown]
# **Question.** By how many ulps do the two results differ? Is one of them more exact?
#
# <details><summary>Answer</summary>
# By one, rarely by two. Gemma's norm is more exact on average, because it rounds once (its mean error is 0.6 of the
# other's). But it is more important to compute the same norm as in training, and as other programs do.
# </details>
#
# ## How errors grow
#
# The next cell runs the same tokens in four precisions. It compares the residual stream after each block with the
# stream in float64.

# %%
text = "There was once a little princess who lived in a great castle by the sea."
ids = tokenizer.encode(text)
runs = {
    name: refgemma.forward([ids], m.weights, m.config) for name, m in models.items()
}
exact = runs.pop("float64")

assert all(run.logits.shape == exact.logits.shape for run in runs.values())
_ = viz.rounding_growth(runs, exact)

# %% [markdown]
# **Question.** float32 has 16 more bits for the significand than bfloat16. How far apart should the two curves be? Does
# the picture agree? The next cell computes the quotient of the two curves. It also computes the error of one matrix
# product in float32, and the error that a single rounding would make.

# %%
depths = viz.residual_streams(exact)
errors = {}
for name in ("float32", "bfloat16"):
    pairs = zip(viz.residual_streams(runs[name]), depths, strict=True)
    errors[name] = np.array([viz.relative_error(x, y) for x, y in pairs])
quotients = (errors["bfloat16"] / errors["float32"]).round().astype(int)
print("bfloat16 / float32, by blocks done:", *quotients)

x = runs["float32"].layers[0].input_layernorm
weight = models["float32"].weights.layers[0].q_proj
product = x.astype(np.float64) @ weight.astype(np.float64).T
in_float32 = viz.relative_error(ops.linear(x, weight), product)
rounded_once = viz.relative_error(product.astype(np.float32), product)
print(f"a product in float32:               {in_float32:.1e}")
print(f"rounded once, from the exact sum:   {rounded_once:.1e}")

# %% [markdown]
# <details><summary>Answer</summary>
# If every operation rounded once, the quotient would be about 2 to the power of 16, or 65536. After the embedding,
# which is one product, it is about 50000. But after the first block it is only about 15000. In bfloat16 a kernel sums
# in float32 and rounds <b>once</b>, at the end. In float32, the kernel also sums in float32, so it rounds <b>after
# every addition</b>: the sum of 234 products has several times the error of a single rounding. A bfloat16 kernel loses
# digits almost only at its end; a float32 kernel loses digits at every addition.
# </details>
#
# ## The cost of rounding
#
# Does a reader notice the errors? The next cell compares the probabilities of the next token, and the most likely
# token, at every place of the text. The **loss** is the mean of $-\log p$, where $p$ is the probability of the token
# that really came next; lower is better. (Its unit is the *nat*, because the logarithm is the natural logarithm.)

# %%
for name, run in {"float64": exact, **runs}.items():
    shares = viz.probabilities(run.logits[0])
    assert shares.shape == (len(ids), 2048)
    truth = viz.probabilities(exact.logits[0])
    loss = -np.log(shares[np.arange(len(ids) - 1), ids[1:]]).mean()
    same = np.mean(shares.argmax(axis=-1) == truth.argmax(axis=-1))
    error = np.abs(shares - truth).max()
    print(
        f"{name:9s} loss {loss:.4f}, largest error of a probability {error:.1e}, "
        f"same most likely token at {same:.0%} of the places"
    )

# %% [markdown]
# **Question.** A port in bfloat16 writes the same 20 words as PyTorch. Does this prove that the port is right? Another
# port writes a different 20th word. Does this prove that it is wrong?
#
# <details><summary>Answer</summary>
# Neither. Many mistakes do not change the most likely token. And if two tokens are nearly equally likely, rounding
# alone decides. Compare tensors instead, with bounds for rounding errors (notebook 9).
# </details>
#
# ## Large numbers
#
# float16 has more digits, but a smaller range. A number above 65504 becomes infinity, and soon all results are NaN
# (*not a number*, the result of infinity minus infinity). The streams of large models can contain such numbers, so
# Gemma 2 is intended for bfloat16.

# %%
large = np.array([60000.0, 70000.0, 1e30], np.float32)
with np.errstate(invalid="ignore"):
    in_half = f16(large)
    in_brain = bf16(large)

assert in_half.shape == in_brain.shape == (3,)
in_half, in_brain

# %% [markdown]
# ## Exercise
#
# `round_to_bf16` rounds float32 numbers to bfloat16 and returns float32. `x.view(np.uint32)` gives the 32 bits of each
# number as a whole number. After rounding, only the upper 16 bits are kept. In the next cell, replace the line
# `raise NotImplementedError`, run the cell, and read the result of the check.

# %%
from refgemma.teach import exercises


def round_to_bf16(x):
    raise NotImplementedError


exercises.check_round_to_bf16(round_to_bf16)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def round_to_bf16(x):
#     bits = np.asarray(x, np.float32).view(np.uint32)
#     odd = (bits >> 16) & 1  # the last bit that is kept
#     rounded = (bits + 0x7FFF + odd) & np.uint32(0xFFFF0000)
#     return rounded.astype(np.uint32).view(np.float32)
# ```
#
# </details>


# %% [markdown]
# Write `embed` of notebook 1 for bfloat16. PyTorch stores the factor $\sqrt{\mathrm{hidden}}$ in the precision of the
# table. So the factor is rounded to bfloat16 first, and the product is rounded again.


# %%
def embed_bf16(ids, table):
    raise NotImplementedError


exercises.check_embed_bf16(embed_bf16)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import math
#
# from refgemma import narrow
#
#
# def embed_bf16(ids, table):
#     factor = narrow(math.sqrt(table.shape[-1]), like=table)
#     return table[ids] * factor
# ```
#
# </details>

# %% [markdown]
# **Papers.** [bfloat16 in training](https://arxiv.org/abs/1905.12322) (Kalamkar et al. 2019).
