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
# # 9. Verifying a port: find the bug from a trace
#
# A **port** is a reimplementation of a model in another program or for another machine. Many ports have had a bug that
# did not crash the program, but made the text a little worse. This notebook finds such bugs by comparing tensors. You
# need the *trace* and the parts of a block (notebook 1), the window (notebook 5) and *rounding* (notebook 7).
#
# ![Drawing of the model: all parts of Gemma 2](pictures/model-09.svg)
#
# In which of these parts is the bug?

# %%
import numpy as np

from refgemma import ops
from refgemma.goldens import verify
from refgemma.oracle import judge, tolerance
from refgemma.teach import exercises, viz

# %% [markdown]
# ## The recording
#
# To judge a port you need the right values. refgemma has recordings of PyTorch's values. Such a recording is called a
# **golden**. This notebook uses `bends-forward-f32`: the forward pass (from tokens to logits) of the model `bends`, in
# float32. `bends` is a small model with random weights. It is designed so that mistakes change the result: it has caps
# of 2 and 3, a window of 5 for texts of 13 tokens, and random norm weights.

# %%
about, _ = verify.load_golden("bends-forward-f32")
config, weights = verify.model_of(about)
recorded = exercises.recorded_trace()  # PyTorch's tensors, in the order of computation

# Three texts of 13 tokens.
assert recorded["embedded"].shape == (3, 13, config.hidden_size)
print(len(recorded), "tensors, recorded with torch", about["torch"])
list(recorded)[:12]

# %% [markdown]
# ## A port with a bug
#
# The next cell loads the trace of a port, with the same names, in the order of computation. One part of this port is
# wrong. Would the port's text show this? The cell compares the most likely tokens.

# %%
trace = exercises.mystery_trace(1)

assert list(trace) == list(recorded)
assert all(trace[name].shape == recorded[name].shape for name in recorded)
same = trace["logits"].argmax(axis=-1) == recorded["logits"].argmax(axis=-1)
print(f"the same most likely token at {same.mean():.0%} of the places")

# %% [markdown]
# ## Differences along the way
#
# The relative error of a tensor is the root mean square of the difference, divided by the root mean square of the
# recorded tensor. In the order of computation, the curve of the relative errors has a step. Before the step there is
# only rounding. After the step, the curve shows the bug and its consequences.
#
# $$\mathrm{error} = \sqrt{\mathrm{mean}((x - x_{\text{recorded}})^2) \,/\, \mathrm{mean}(x_{\text{recorded}}^2)}$$

# %%
order = list(recorded)
errors = np.array([viz.relative_error(trace[name], recorded[name]) for name in order])
assert errors.shape == (len(order),)

axes = viz.new_axes(8, 3)
axes.semilogy(np.maximum(errors, 1e-9), ".-")
axes.axhline(2**-24, linestyle=":", color="grey", label="one rounding in float32")
axes.set(xlabel="tensor, in the order of computation", ylabel="relative error")
axes.set_title("where does it begin?")
_ = axes.legend()

# %%
place = int(np.argmax(errors > 1e-5))
print("last good:", order[place - 1], f"{errors[place - 1]:.1e}")
print("first bad:", order[place], f"{errors[place]:.1e}")

# %% [markdown]
# **Question.** Here the step is large, and 1e-5 is a safe limit. Why is one limit for all tensors not enough in
# general?
#
# <details><summary>Answer</summary>
# Rounding errors differ from tensor to tensor. A sum of 14336 products is less exact than a single product. bfloat16
# has an error of 0.4 % at each step; a cosine at position 8000 has an error of half a thousandth. A limit that allows
# the largest of these errors misses mistakes in the most exact tensors.
# </details>
#
# ## A bound for each operation
#
# It is better to compute for each operation how large the rounding error *can* be. For a sum of $n$ products, the next
# formula gives this bound. Here $u = 2^{-24}$ is the largest relative error of one rounding in float32:
#
# $$|\mathrm{computed} - \mathrm{exact}| \;\le\; \frac{n u}{1 - n u} \sum_i |x_i|\,|w_i|$$
#
# Two correct programs differ by at most twice the bound, in any order of summation. `refgemma.oracle.tolerance` has a
# bound for each operation. The distance of two tensors is measured in units of the allowed difference. If rounding
# explains the difference, the distance is at most 1.

# %%
x, w = recorded["layers.0.input_layernorm"], weights.layers[0].q_proj
computed, exact = ops.linear(x, w), x.astype(np.float64) @ w.astype(np.float64).T
bound = tolerance.linear(x, w).bound

assert computed.shape == bound.shape == exact.shape
used = np.abs(computed - exact) / bound
print(f"rounding used at most {used.max():.0%} of the bound")


# %% [markdown]
# **Question.** The bound is for the worst case, in which all roundings have the same sign. Can the bound reject a
# correct port? Can it accept a wrong port?
#
# <details><summary>Answer</summary>
# It never rejects a correct port. But it accepts a mistake that is smaller than rounding, and it must: the same
# difference can come from another order of the same sum.
# </details>

# %% [markdown]
# ## Judging each operation alone
#
# After the first bad tensor all later tensors differ, even if their own operations are right. To find the wrong
# *operations*, give each operation the recorded inputs instead of the port's own inputs. Then earlier mistakes do not
# affect the result. You can do this for any operation of a port that you suspect. For example, does attention in layer
# 0 use the right mask? The next cells compute its probabilities again from the recorded scores, for several windows.


# %%
def probs_with_window(window):
    """Attention of layer 0 from recorded scores, if the window were this wide."""
    places = np.arange(13)
    mask = ops.sliding_mask(places, places, window)
    three = np.tile(mask, (3, 1, 1, 1))  # the same for all three texts
    return ops.softmax(recorded["layers.0.attention.capped"], three)


# %%
right = recorded["layers.0.attention.probs"]
capped = recorded["layers.0.attention.capped"]
allowed = tolerance.softmax(capped, np.tri(13, dtype=bool))
windows, distances = range(3, 8), []
for window in windows:
    candidate = probs_with_window(window)
    assert candidate.shape == right.shape == allowed.bound.shape
    distances.append(judge.strict_distance(candidate, right, allowed, "float32"))
axes = viz.new_axes(6, 3)
axes.bar(windows, distances, log=True)
axes.axhline(1, linestyle="--", color="tab:red", label="limit")
axes.set(xlabel="window", ylabel="distance / tolerance", ylim=(0.01, 1e10))
axes.set_title("attention of layer 0, by window")
_ = axes.legend()

# %% [markdown]
# ## A picture of the difference
#
# A picture of the difference shows the kind of bug. If single pairs of a query and a key are wrong, look at the mask.
# If whole rows are wrong, look at the norm. If whole columns are wrong, look at the weights. If the errors grow with
# the place, look at the positions.

# %%
name = order[place]
apart = np.abs(trace[name] - recorded[name])[0]
apart = apart[0] if apart.ndim == 3 else apart  # for an attention tensor, one head

axes = viz.new_axes(6, 3.4)
image = axes.imshow(apart, cmap="Reds", aspect="auto", interpolation="nearest")
axes.figure.colorbar(image, ax=axes, label="difference")
_ = axes.set(title=name, xlabel="last axis of the tensor", ylabel="place")

# %% [markdown]
# **Question.** Which mistake did the port make? Describe it in one sentence. Then confirm your answer: make the same
# mistake yourself (`config.changed(...)` helps) and compare your tensor with the port's.
#
# <details><summary>Answer</summary>
# The window is one key too wide. Each query after the fifth sees one key more, so the other keys of its row get
# less attention. With <code>config.changed(sliding_window=6)</code> the forward pass gives the port's tensors.
# </details>
#
# Write your sentence between the quotation marks. The check looks for the wrong part and for its mistake.

# %%
exercises.check_diagnosis(1, "")

# %% [markdown]
# ## The whole check as one command
#
# On the command line, `refgemma verify` compares refgemma with every recording, with the bounds. `refgemma check`
# judges a file with the tensors of a port, and names the mistake if the mistake is a known bug. The next cell verifies
# one recording from Python:

# %%
result = verify.verify("bends-forward-f32")

worst = f"{result.worst.distance:.2f} of the tolerance"
print(result.case, result.tensors, "tensors, worst at", worst)


# %% [markdown]
# ## Exercise
#
# `first_divergence` returns the name of the first tensor that rounding does not explain, or `None` if there is none.
# The check runs this function on six ports. In the next cell, replace the line `raise NotImplementedError`, run the
# cell, and read the result of the check. Then look at the traces of the ports, `exercises.mystery_trace(2)` to `6`.
# Which mistake does each port make? Check your sentence with `exercises.check_diagnosis(2, "...")`.


# %%
def first_divergence(ours, recorded):
    raise NotImplementedError


exercises.check_first_divergence(first_divergence)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def first_divergence(ours, recorded):
#     for name, right in recorded.items():
#         error = np.sqrt(np.mean((ours[name] - right) ** 2))
#         if error > 1e-5 * np.sqrt(np.mean(right**2)):
#             return name
#     return None
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Transformers](https://arxiv.org/abs/1910.03771) (Wolf et al. 2019), the library of the recordings.
