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
# # 16. Train your own: a new book, and a norm's gradient by hand
#
# The tiny model was trained on tales. In this notebook it learns a play: the beginning of "Romeo and Juliet". Then you
# write the gradient of a norm, the hardest gradient of the model, and compare it with PyTorch's.
#
# ![Drawing of the model: the norms are lit](pictures/model-16.svg)
#
# The norms are highlighted, because their gradient is the exercise. All other weights are trained too.

# %%
from importlib.resources import files

import numpy as np
from IPython import display
from matplotlib import pyplot as plt

import refgemma
from refgemma.teach import exercises, viz
from refgemma.training.data import hold_out, pack_rows, take_batch
from refgemma.training.gradients import mean_loss
from refgemma.training.run import TrainingArguments, first_state, train_step
from refgemma.weights.parameters import named_weights, weights_of

tiny = refgemma.load("tiny")
config = tiny.config
book = files("refgemma.teach").joinpath("romeo.txt").read_text("utf-8")
print(book[18:203])

# %% [markdown]
# Replace `romeo.txt` by your own text, with `open("my.txt").read()`, to train on it.
#
# ## Rows to learn from, rows to test with
#
# The book is converted to tokens, and the tokens are cut into rows of 64. The last tenth of the rows is *held out*: no
# step uses it. The loss on these rows shows whether the model learned the language of the book, or only its lines.

# %%
ids = tiny.tokenizer.encode(book)[1:]  # without <bos>, which begins each row
rows, held_out = hold_out(pack_rows(ids, seq_len=64, bos=2), percentage=10)
lengths = np.array([len(row) for row in rows])
assert lengths.shape == (len(rows),) and rows[0].shape == (64,)

tale = files("refgemma.teach").joinpath("tale.txt").read_text("utf-8")
known = tiny.tokenizer.encode(" ".join(tale.split()))[1:]  # without line breaks
tale = pack_rows(known, seq_len=64, bos=2)
parts = {"a tale": tale, "the play": rows[::8], "held out": held_out}
before = {name: mean_loss(part, tiny.weights, config) for name, part in parts.items()}
axes = viz.new_axes(5, 2.6)
axes.bar(list(before), list(before.values()))
axes.set_ylabel("loss in nats")
_ = axes.set_title(f"before: {len(rows)} rows, {len(held_out)} held out")

# %% [markdown]
# ## The step of AdamW
#
# A program that turns gradients into steps is an *optimizer*. Notebook 15 took a step in proportion to the gradient.
# AdamW divides the running mean $m$ of the gradient by the root of the running mean $v$ of its square:
#
# $$w \leftarrow w - \eta\, \frac{m}{\sqrt{v} + \epsilon}, \qquad m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
# v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2$$
#
# ($m$ and $v$ are also divided by $1 - \beta^t$, because they begin at 0. The W stands for weight decay, notebook 6. It
# is 0 here.) In the first step, $m / \sqrt{v}$ is
# $g / |g|$. So the first step has the length $\eta$ for every number, however large its gradient is. Only a gradient so
# small that $\epsilon$ counts gives a shorter step.

# %%
base = {name: w[:] for name, w in named_weights(tiny.weights, config).items()}
settings = {"lr_scheduler_type": "cosine", "warmup_steps": 5}
arguments = TrainingArguments(max_steps=60, learning_rate=1e-3, **settings)
no_warmup = TrainingArguments(max_steps=60, learning_rate=1e-3)
batch = take_batch(rows, 0, arguments.rows, seed=42)
one = train_step(first_state(base, config, no_warmup), batch, base, config, no_warmup)
moved = np.concatenate([np.abs(one.tensors[n] - base[n]).ravel() for n in base])
assert moved.shape == (sum(x.size for x in base.values()),)

axes = viz.new_axes(6.4, 2.6)
axes.hist(1000 * moved, bins=60, log=True)
axes.set(xlabel="change, in thousandths", ylabel="number of weights")
_ = axes.set_title("one step of AdamW, rate 0.001")

# %% [markdown]
# **Question.** The embedding table has a row for every token. Some tokens do not occur in the batch. Why do their rows
# change as well?
#
# <details><summary>Answer</summary>
# The table is also the head. Each row gives a logit at each place, and training lowers the logits of all wrong tokens a
# little. AdamW makes a step of full length out of a small gradient.
# </details>
#
# ## Training
#
# 60 steps, each on 8 rows. The learning rate rises for 5 steps and then falls to 0. The picture is drawn again every 10
# steps, while the model learns.

# %%
state = first_state(base, config, arguments)
tested = [(0, before["held out"])]
axes = viz.new_axes(7, 3.2)
(line,) = axes.plot([], label="loss of each step")
(dots,) = axes.plot(*tested[0], "o--", label="held-out loss")
axes.set(xlabel="step", ylabel="loss in nats", xlim=(0, 60), ylim=(2, 6.6))
axes.legend()
while state.step < arguments.max_steps:
    batch = take_batch(rows, state.step, arguments.rows, seed=42)
    state = train_step(state, batch, base, config, arguments)
    line.set_data(range(1, state.step + 1), state.losses)
    if state.step % 10 == 0:
        loss = mean_loss(held_out, weights_of(state.tensors, config), config)
        tested.append((state.step, loss))
        dots.set_data(*zip(*tested, strict=True))
        display.clear_output(wait=True)
        display.display(axes.figure)
plt.close(axes.figure)
assert np.array(state.losses).shape == (60,)

# %% [markdown]
# **Question.** After step 30 the loss of the steps drops, but the held-out loss does not. Why?
#
# <details><summary>Answer</summary>
# The second pass through the book begins: 30 steps of 8 rows are all its rows. From step 31 on, the model gets rows
# that it has seen before, and learns them by heart. This is called overfitting. A longer text helps more than more
# steps.
# </details>
#
# ## The change
#
# The next cell continues the same prompt before and after training, with the most likely token at each place. It also
# measures the relative change of the weights:
#
# $$\mathrm{change} = \|w - w_0\| \,/\, \|w_0\|$$

# %%
trained = weights_of(state.tensors, config)
prompt = tiny.tokenizer.encode("ROMEO:\n")
for weights in (tiny.weights, trained):
    new = list(refgemma.generate(prompt, weights, config, max_new_tokens=30))
    print(tiny.tokenizer.decode(new), "\n---")

change = {}
for n, w in base.items():
    change[n] = np.linalg.norm(state.tensors[n] - w) / np.linalg.norm(w)
kinds = sorted({name.split(".")[-2] for name in base})
by_kind = [[c for n, c in change.items() if n.split(".")[-2] == k] for k in kinds]
sizes = np.array([np.mean(found) for found in by_kind])
assert sizes.shape == (len(kinds),)
axes = viz.new_axes(6.4, 3.4)
axes.barh(kinds, 100 * sizes)
_ = axes.set(xlabel="percent", title="change of the weights, mean of all blocks")

# %% [markdown]
# Has the model forgotten the tales? A model that is trained on one kind of text forgets other kinds. So released models
# are often tuned with small adapters, such as LoRA, which leave the old weights as they are, or on a mixture with
# old texts.

# %%
after = {"a tale": mean_loss(tale, trained, config), "held out": tested[-1][1]}
shown = np.array([[loss[name] for name in after] for loss in (before, after)])
assert shown.shape == (2, 2)
axes = viz.new_axes(5, 2.6)
for place, (name, losses) in enumerate(zip(("before", "after"), shown, strict=True)):
    axes.bar(np.arange(2) + 0.4 * place - 0.2, losses, width=0.4, label=name)
axes.set_xticks(range(2), ["a tale", "the play, held out"])
axes.set(ylabel="loss in nats", ylim=(0, 8))
_ = axes.legend(loc="upper center", ncols=2)

# %% [markdown]
# ## The gradient of a norm
#
# A norm (notebook 6) multiplies $x$ by $r$, so that $n = x r$ has the root mean square 1. Let $g$ be the gradient of
# the result, and $h = g\,(1 + w)$ the gradient of $n$. A number $x_j$ changes the result in two ways: directly, and
# through $r$, which depends on all numbers of the vector. Both ways together give
#
# $$\frac{\partial L}{\partial x} = r\,\bigl(h - n \cdot \mathrm{mean}(h\,n)\bigr), \qquad
# r = \frac{1}{\sqrt{\mathrm{mean}(x^2) + \epsilon}}$$
#
# The second term has a simple meaning. Apart from $\epsilon$, a longer $x$ gives the same result of the norm. So the
# length of $x$ cannot change the loss, and the gradient must be at a right angle to $x$. The second term subtracts the
# part of $h$ that points along $x$.

# %%
angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
x = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
h = np.array([1.0, 0.5])
n = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
grad_x = np.sqrt(2) * (h - n * np.mean(h * n, axis=-1, keepdims=True))
assert grad_x.shape == x.shape == (24, 2)

figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
for axes, arrows, title in (
    (left, h + 0 * x, "gradient of the result"), (right, grad_x, "gradient of x"),
):  # fmt: skip
    axes.quiver(*x.T, *arrows.T, scale=14, color="tab:red")
    axes.plot(*x.T, ".")
    axes.set(title=title, aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    axes.set(xlabel="first number of x", ylabel="second number of x")

# %% [markdown]
# **Question.** At two points of the circle, the right arrow has the length 0. Where are these points?
#
# <details><summary>Answer</summary>
# Where x is parallel to the gradient of the result, (1, 0.5) or its opposite. There the whole gradient points along x,
# and nothing remains. The points that are drawn come close: their arrows are the shortest.
# </details>
#
# ## Exercise
#
# `rms_norm_backward` gets `grad`, the gradient of the result, with the shape of `x`: (texts, tokens, hidden). It
# returns two arrays: the gradient of `x` by the formula above, and the gradient of `weight`. All tokens use the same
# weight, so the gradient of `weight` is the sum of `grad * n` over all tokens. The check compares both with
# the gradients that PyTorch computes.


# %%
def rms_norm_backward(grad, x, weight, eps):
    raise NotImplementedError


exercises.check_rms_norm_backward(rms_norm_backward)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def rms_norm_backward(grad, x, weight, eps):
#     r = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
#     n = x * r
#     h = grad * (1 + weight)
#     grad_x = r * (h - n * np.mean(h * n, axis=-1, keepdims=True))
#     return grad_x, (grad * n).sum(axis=(0, 1))
# ```
#
# </details>

# %% [markdown]
# **Papers.** [AdamW](https://arxiv.org/abs/1711.05101) (Loshchilov and Hutter 2017).
