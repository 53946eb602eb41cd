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
# # 3. Rotary positions
#
# Without a rotation, attention does not know the order of the earlier words: the product of a query and a key is the
# same at any two places in the text. Gemma encodes the order of words by *rotating* queries and keys by angles that
# depend on their places. This is called **rotary position embedding**, RoPE. You need from notebook 2: *query*, *key*,
# *head*, *score* (their dot product), *port* (a reimplementation of the model in another program).
#
# ![Drawing of the model: the rotation of queries and keys is lit](pictures/model-03.svg)
#
# The rotation of queries and keys is highlighted.

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma import ops
from refgemma.teach import viz

tiny = refgemma.load("tiny")
config = tiny.config
head_dim, theta = config.head_dim, config.rope_theta


# %% [markdown]
# ## Rotating a pair
#
# Two numbers are a point in the plane. This formula rotates the point by an angle $\varphi$:
#
# $$(a, b) \mapsto (a \cos\varphi - b \sin\varphi, \; b \cos\varphi + a \sin\varphi)$$
#
# A rotation does not change the length. If one point is rotated by $\varphi$ and another by $\psi$, their dot product
# depends only on $\varphi - \psi$: a dot product is the two lengths times the cosine of the angle between the points,
# and the rotations change this angle by $\varphi - \psi$. So if the angle is proportional to the position, the score of
# a query and a key depends on the *distance* between them. The score of a head is the sum over its pairs, so it also
# depends only on the distance. This is the whole idea. (The *position* is the number from
# which the angle is computed. In these notebooks it is always the place of the token in the text.)


# %%
def turn(point, angle):
    a, b = point
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([a * cos - b * sin, b * cos + a * sin])


query, key = np.array([1.0, 0.3]), np.array([0.2, 0.9])
# Always 4 places apart.
products = [turn(query, 0.5 * (n + 4)) @ turn(key, 0.5 * n) for n in range(6)]

assert turn(query, 1.0).shape == (2,)
np.round(products, 4)

# %% [markdown]
# ## Many speeds
#
# The `head_dim` numbers of a head form `head_dim / 2` pairs, and each pair rotates at its own speed. From one position
# to the next, pair $i$ rotates by
#
# $$\omega_i = \theta^{-2i / \mathrm{head\_dim}}, \qquad \theta = 10000$$
#
# $\theta$ is not an angle: it is a number of the configuration, `rope_theta`. The larger it is, the slower the last
# pairs rotate. The first pair rotates by one radian per token, which distinguishes neighbours. The last one rotates by
# 0.00018 radian per token here (0.00011 with the 256 numbers of the 9B's heads), which distinguishes distant places.

# %%
exponents = np.arange(0, head_dim, 2) / head_dim
speeds = theta**-exponents
assert speeds.shape == (head_dim // 2,)

around = 2 * np.pi / speeds  # tokens for a whole turn
print(f"fastest: once around in {around[0]:.1f} tokens, slowest: in {around[-1]:,.0f}")
_ = viz.rotary_phases(np.arange(200), head_dim, theta)

# %% [markdown]
# **Question.** The tiny model reads at most 320 tokens. Which rows of the picture are almost useless for it?
#
# <details><summary>Answer</summary>
# The lower rows: over 320 tokens the last pair rotates by only 3 degrees. The network can still use these numbers for
# information that does not depend on the place.
# </details>
#
# ## The tables
#
# `ops.rotary_tables` returns cosines and sines for all positions at once. Their axes are (batch, heads, seq, head_dim).
# The axis of the heads has length 1, because all heads rotate by the same angles. Every angle is in them twice, at $i$
# and at $i + \mathrm{head\_dim}/2$; the next section explains why. The last argument is an array that only sets the
# precision of the tables.

# %%
positions = np.arange(12)[None]  # (batch, seq)
cos, sin = ops.rotary_tables(positions, head_dim, theta, np.zeros(0, np.float32))

assert cos.shape == sin.shape == (1, 1, 12, head_dim)
# A row is a position. Numbers 0 and 16 form a pair, and so do 1 and 17.
cos[0, 0, :3][:, [0, 1, 16, 17]].round(3)

# %% [markdown]
# ## Which numbers form a pair?
#
# The paper that proposed RoPE (Su et al. 2021) pairs neighbours: $(0, 1), (2, 3), \dots$ Gemma's weights were trained
# with another choice: number $i$, in the first half, is paired with number $i + \mathrm{head\_dim}/2$, in the second
# half.
#
# $$\mathrm{rotate}(x) = x \cdot \cos + (-x_{\text{second half}},\; x_{\text{first half}}) \cdot \sin$$
#
# Both choices are equally good, if the model is used with the same choice as in training. With the other choice, no
# error appears, but heads look at other tokens and the text becomes worse. Ports have confused the two: in a terminal,
# `refgemma known-bugs rope-interleaved` names such programs.

# %%
x = np.random.default_rng(0).standard_normal((1, 1, 12, head_dim)).astype(np.float32)
rotated = ops.rotate(x, cos, sin)

first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
other = np.concatenate([-second, first], axis=-1)
by_hand = np.concatenate([first, second], axis=-1) * cos + other * sin
assert rotated.shape == x.shape
assert np.array_equal(rotated, by_hand)

# %% [markdown]
# ## The score depends on the distance
#
# The next cell puts one query and one key at all places, and computes the scores. Along a diagonal the distance is
# constant, and so is the score. White is the score 0. Above the main diagonal the key comes after the query; the mask
# of notebook 2 removes these scores in the model.

# %%
rng = np.random.default_rng(1)
q, k = rng.standard_normal((2, 1, 1, 1, head_dim)).repeat(60, axis=3)
cos, sin = ops.rotary_tables(np.arange(60)[None], head_dim, theta, np.zeros(0))
scores = (ops.rotate(q, cos, sin) @ ops.rotate(k, cos, sin).swapaxes(-1, -2))[0, 0]

assert scores.shape == (60, 60)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
most = np.abs(scores).max()
image = left.imshow(scores, cmap="RdBu", vmin=-most, vmax=most)  # white is 0
figure.colorbar(image, ax=left, label="score")
left.set(xlabel="place of the key", ylabel="place of the query")
left.set_title("one query, one key, all places")
right.plot(scores[:, 0])
right.set(xlabel="query's place minus key's", ylabel="score")
_ = right.set_title("the same by distance")

# %% [markdown]
# **Question.** Must the score decrease with the distance?
#
# <details><summary>Answer</summary>
# No. The query and the key determine how it depends on the distance. Notebook 2 showed a head that looks one token
# back: its queries and keys fit best at distance 1.
# </details>
#
# ## Why the angles are float32 in every model
#
# Models compute with numbers of 16 bits (*half precision*, notebook 7). Gemma's format, *bfloat16*, has 8 bits for the
# digits of a number. At position 8000 the angle of the first pair is 8000 radians, and only its remainder after full
# turns matters. 8 bits cannot distinguish 8000 from 8015, which is more than two turns further. So the angles are
# always computed with the 24 bits of float32. In the code, `bf16` rounds to bfloat16, and `wide` converts the result to
# an ordinary array.

# %%
far = np.arange(7900, 8000)
exact = np.cos(far.astype(np.float64))
# The position rounded to 8 bits.
in_bfloat16 = np.cos(refgemma.wide(refgemma.bf16(far)))
in_float32 = np.cos(far.astype(np.float32))

assert exact.shape == in_bfloat16.shape == (100,)
axes = viz.new_axes(8, 3)
axes.plot(far, exact, label="exact")
axes.plot(far, in_bfloat16, "--", label="angle in bfloat16")
axes.set(xlabel="position", ylabel="cosine of the fastest pair")
axes.set(title="an angle needs its digits", ylim=(-1.1, 1.9))
axes.legend(loc="upper right")
np.abs(in_float32 - exact).max(), np.abs(in_bfloat16 - exact).max()

# %% [markdown]
# **Question.** The angles of the fastest pair are whole numbers, which float32 holds exactly. What is the error of the
# other angles in float32, at position 8000?
#
# <details><summary>Answer</summary>
# The speed itself is rounded, by up to 6e-8 of its value (half the distance between two float32 numbers near 1). The
# error of the angle is 8000 times as large. No speed is above 1, so it is at most 8000 · 6e-8, or half a thousandth. If
# two programs compute the speeds in different ways, their angles can differ by that much. This is why
# <code>ops.rotary_tables</code> has an unusual formula: its speeds agree with PyTorch's to the last bit.
# </details>
#
# ## Exercise
#
# `rotate` rotates all pairs of a head. The tables have every angle twice, as above. In the next cell, replace the line
# `raise NotImplementedError`, run the cell, and read the result of the check. `exercises.hint("rotate")`
# gives a hint.

# %%
from refgemma.teach import exercises


def rotate(x, cos, sin):
    raise NotImplementedError


exercises.check_rotate(rotate)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def rotate(x, cos, sin):
#     half = x.shape[-1] // 2
#     turned = x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin
#     return turned
# ```
#
# </details>

# %% [markdown]
# **Papers.** [RoFormer](https://arxiv.org/abs/2104.09864) (Su et al. 2021) introduced rotary positions.
