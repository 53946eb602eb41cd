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
# # 7. bfloat16: what is rounded where, and what it costs
#
# Models are stored and run in 16 bits a number, to save memory. This notebook shows what that does to the numbers,
# and where the model rounds. You need notebook 1: *block*, *residual stream*, *logits*; from notebook 2 *port* (the
# model written anew in another program); from notebook 6 the *norm* and its factor $1 + w$. PyTorch is the library in
# which the model is usually run.

# %%
import numpy as np

import refgemma
from refgemma import ops
from refgemma.precision import bf16, f16, narrow, wide
from refgemma.teach import viz

models = {name: refgemma.load("tiny", name) for name in ("float64", "float32", "float16", "bfloat16")}
tokenizer = models["float32"].tokenizer


# %% [markdown]
# ## The format
#
# A floating-point number is a sign, a power of two (its *exponent*), and digits (its *significand*). **float32** has
# 8 bits for the power and 24 for the digits (one of them is always 1 and not stored). **bfloat16** is its upper half:
# the same 8 bits of power, 8 bits of digits. (The *b* is for the group that made it, Google Brain.) **float16** has 5
# and 11: more digits, but nothing above 65504. These two are called *half precision*. The distance from a number to
# the next one is called an **ulp** (*unit in the last place*): at 1.0 it is $2^{-7}$ in bfloat16, $2^{-10}$ in
# float16 and $2^{-23}$ in float32. In the code `bf16` and `f16` round to these formats, and `wide` gives the result
# as ordinary float32 numbers.


# %%
def bits(x):
    """The 16 bits of a bfloat16 number: sign, power, digits."""
    word = int(np.array(wide(bf16(x)), np.float32).view(np.uint32)) >> 16
    text = f"{word:016b}"
    return f"{text[0]} {text[1:9]} {text[9:]}"


for x in (1.0, 1 + 2**-7, 0.1, 3.14159, -2.5):
    print(f"{x:10.6f} -> {float(bf16(x)):10.6f}   {bits(x)}")
assert bf16(1 + 2**-7) != 1 and bf16(1 + 2**-9) == 1  # an ulp is seen, a quarter of one is not

# %% [markdown]
# ## Rounding
#
# A result that is no bfloat16 number is **rounded** to the nearest one, and where two are equally near to the one
# whose last bit is 0 (*ties to even*). So the **relative error**, the error as a part of the number, is at most half
# an ulp, $2^{-8}$ in bfloat16:
#
# $$|\mathrm{round}(x) - x| \le 2^{-8}\, |x|$$

# %%
x = np.linspace(0.5, 8, 4001).astype(np.float32)
errors = {"bfloat16": np.abs(wide(bf16(x)) - x) / x, "float16": np.abs(wide(f16(x)) - x) / x}
assert all(error.shape == x.shape for error in errors.values())
assert errors["bfloat16"].max() <= 2**-8 and errors["float16"].max() <= 2**-11

axes = viz.new_axes(7, 3)
for name, error in errors.items():
    axes.plot(x, error, linewidth=0.6, label=name)
axes.set(xlabel="number", ylabel="relative error", title="rounding: worst just above a power of two")
_ = axes.legend()

# %% [markdown]
# **Question.** How much is `bf16(256) + bf16(1)`, and why? What does it mean for adding 300 ones one after another?
#
# <details><summary>Answer</summary>
# 256: the next bfloat16 number is 258, and 257 lies between the two, a tie that goes to the even one. Adding ones
# never gets beyond 256. So sums are taken in float32, and only the result is rounded.
# </details>
#
# ## One kernel, one rounding
#
# A **kernel** is one operation that PyTorch starts: a product of matrices, a sum, a tanh. It reads bfloat16 numbers,
# computes with float32 and rounds its result once. refgemma follows this rule: a `BF16` array rounds the result of
# every NumPy operation. Two operations round twice, and that can differ from rounding once at the end:
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
# ## Where the model says "in float32"
#
# `wide(x)` leaves the 16 bits (PyTorch's `x.float()`), `narrow(y, like=x)` goes back to them. Gemma's norm is
# computed wide from beginning to end and rounded once. Llama, a model built much alike, rounds before it multiplies
# by the weight. With the same weights that gives other numbers. With $\hat x$ for the vector divided by its root mean
# square:
#
# $$\text{Gemma: } \mathrm{round}\big(\hat x\,(1 + w)\big) \qquad \text{Llama's way: }
# \mathrm{round}\big(\mathrm{round}(\hat x) \cdot \mathrm{round}(1 + w)\big)$$


# %%
def norm_rounded_early(x, weight, eps):
    normed = narrow(wide(x) / np.sqrt(np.mean(wide(x) ** 2, axis=-1, keepdims=True) + eps), like=x)
    return normed * narrow(1 + wide(weight), like=x)


x = bf16(rng.standard_normal((50, 234)))
weight = models["bfloat16"].weights.layers[0].input_layernorm
right, early = ops.rms_norm(x, weight, 1e-6), norm_rounded_early(x, weight, 1e-6)
assert right.shape == early.shape == x.shape and isinstance(right, refgemma.BF16)
print(f"{np.mean(right != early):.0%} of the elements differ")

# %% [markdown]
# **Question.** By how many ulps do they differ? Is one of the two more exact?
#
# <details><summary>Answer</summary>
# By one, seldom two. Gemma's is the more exact on average, as it rounds once. But more exact is not the point: only
# one of the two is what the weights were trained with and what other programs compute.
# </details>
#
# ## How errors grow
#
# Run the same tokens in four precisions, and compare the residual stream with that of float64 after each block.

# %%
ids = tokenizer.encode("Once upon a time there was a little princess who lived in a great castle by the sea.")
runs = {name: refgemma.forward([ids], model.weights, model.config) for name, model in models.items()}
exact = runs.pop("float64")

assert all(run.logits.shape == exact.logits.shape for run in runs.values())
_ = viz.rounding_growth(runs, exact)

# %% [markdown]
# **Question.** float32 has 16 more bits of digits than bfloat16. How far apart should the two curves be, and are
# they?
#
# <details><summary>Answer</summary>
# A factor of 2 to the 16, 65536, nearly five powers of ten: and so they are. Everything else, the operations and
# their order, is the same.
# </details>
#
# ## What it costs
#
# Does a reader notice? Compare the probabilities of the next token, and the choice of the likeliest, at every place
# of the text. The **loss** is the mean of $-\log p$ of the token that really came next: lower is better. (Its unit is
# the *nat*, since the logarithm is the natural one.)

# %%
for name, run in {"float64": exact, **runs}.items():
    shares = viz.probabilities(run.logits[0])
    assert shares.shape == (len(ids), 2048)
    truth = viz.probabilities(exact.logits[0])
    loss = -np.log(shares[np.arange(len(ids) - 1), ids[1:]]).mean()
    same = np.mean(shares.argmax(axis=-1) == truth.argmax(axis=-1))
    print(
        f"{name:9s} loss {loss:.4f}, largest error of a probability {np.abs(shares - truth).max():.1e}, "
        f"same likeliest token at {same:.0%} of the places"
    )

# %% [markdown]
# **Question.** A port in bfloat16 writes the same 20 words as PyTorch. Does that prove it right? Another one writes a
# different 20th word. Does that prove it wrong?
#
# <details><summary>Answer</summary>
# Neither. Most mistakes leave the likeliest token as it is; and where two tokens are nearly equally likely, rounding
# alone decides. Compare tensors, with bounds for what rounding can do: notebook 9.
# </details>
#
# ## Large numbers
#
# What float16 gains in digits it lacks in reach. One number above 65504 becomes infinity, and soon everything is NaN
# (*not a number*, the result of infinity minus infinity). The streams of large models can have such numbers, and
# Gemma 2 is meant for bfloat16.

# %%
large = np.array([60000.0, 70000.0, 1e30], np.float32)
with np.errstate(invalid="ignore"):
    in_half = f16(large)
    in_brain = bf16(large)

assert in_half.shape == in_brain.shape == (3,)
assert np.isinf(wide(in_half)).tolist() == [False, True, True] and np.isfinite(wide(in_brain)).all()
in_half, in_brain

# %% [markdown]
# ## Exercise
#
# `round_to_bf16` rounds float32 numbers to bfloat16 and returns float32. `x.view(np.uint32)` shows the 32 bits of a
# number as a whole number; the upper 16 are the result. Replace the line that raises, run the cell, and read what the
# check says.

# %%
from refgemma.teach import exercises


def round_to_bf16(x):
    raise NotImplementedError


exercises.check_round_to_bf16(round_to_bf16)
