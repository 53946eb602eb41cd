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
# # 15. How it learns: from the loss back to every weight
#
# Training found the 2.9 million numbers of the tiny model. One step of training asks one question about each number: if
# this number grew a little, how much would the loss (notebook 8) grow? The answers together are the **gradient**. The
# gradient is computed backwards, from the loss to the first block, with the chain rule (notebook 4).
#
# ![Drawing of the model: the caps and the stream are lit](pictures/model-15.svg)
#
# Two parts are highlighted: the caps, which weaken the gradient, and the residual stream, which carries the gradient
# back.

# %%
import numpy as np
from matplotlib import pyplot as plt

import refgemma
from refgemma.backward import compute_all_gradients, compute_gradients
from refgemma.teach import exercises, viz
from refgemma.weights.parameters import named_weights, weights_of

tiny = refgemma.load("tiny")
config = tiny.config
text = "There was once a little princess who lived in a great castle by the sea."
ids = np.array([tiny.tokenizer.encode(text)])
run = refgemma.forward(ids, tiny.weights, config)

# %% [markdown]
# ## The chain rule on one soft cap
#
# Take the logits after the first token. The *label*, the right answer, is the second token. The raw logits $x$ are
# capped to $y$, and the loss is the surprise at the label, as in notebook 8:
#
# $$y = c \tanh(x / c), \qquad L = \log \sum_k e^{y_k} - y_{\mathrm{label}}$$
#
# The way back begins at the loss. The slope of the loss for each $y_k$ is the probability $p_k$, minus 1 at the label.
# Then each slope is multiplied by the slope of the cap:
#
# $$\frac{\partial L}{\partial x_k} = \frac{\partial L}{\partial y_k} \cdot \left(1 - \tanh^2(x_k / c)\right)$$

# %%
cap = config.final_logit_softcapping
x, label = run.raw_logits[0, 0].astype(float), ids[0, 1]


def loss_after_cap(x):
    y = cap * np.tanh(x / cap)
    return np.log(np.exp(y).sum()) - y[label]


grad_y = viz.probabilities(cap * np.tanh(x / cap))
grad_y[label] -= 1
grad_x = grad_y * (1 - np.tanh(x / cap) ** 2)
assert grad_x.shape == x.shape == (config.vocab_size,)

# %% [markdown]
# Is this result right? To check it, the next cell moves one logit a little, up and down, and measures the change of the
# loss. This method needs two losses for each number. The chain rule gives all slopes at once.

# %%
best = np.argsort(-np.abs(grad_x))[:8]
moves = 1e-5 * np.eye(config.vocab_size)[best]
rises = [loss_after_cap(x + m) - loss_after_cap(x - m) for m in moves]
measured = np.array(rises) / 2e-5
assert measured.shape == (8,)

axes = viz.new_axes(6.4, 3)
axes.bar(np.arange(8) - 0.2, measured, width=0.4, label="measured")
axes.bar(np.arange(8) + 0.2, grad_x[best], width=0.4, label="chain rule")
names = tiny.tokenizer.convert_ids_to_tokens(best.tolist())
axes.set_xticks(range(8), [viz.show_blanks(name) for name in names], rotation=30)
axes.set(xlabel="token", ylabel="slope of the loss", title="eight logits")
_ = axes.legend()

# %% [markdown]
# **Question.** One bar points down. Which token does it belong to, and what do the signs mean?
#
# <details><summary>Answer</summary>
# The label's, <code>There</code>: the loss falls if its logit rises. All other logits should fall, and the more likely
# a wrong token is, the more. The model expected a quotation mark. (<code>&lt;start_of_turn&gt;</code> begins a chat. A
# part of the training texts had this form.)
# </details>
#
# Write this step for any gradient `grad` of the result: multiply `grad` by the slope of the cap at `x`.


# %%
def soft_cap_backward(grad, x, cap):
    raise NotImplementedError


exercises.check_soft_cap_backward(soft_cap_backward)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import numpy as np
#
#
# def soft_cap_backward(grad, x, cap):
#     slope = 1 - np.tanh(x / cap) ** 2
#     return grad * slope
# ```
#
# </details>
#
# ## Back through the whole model
#
# `refgemma.backward` has such a function for each operation of the model, and calls them in reverse order. It returns
# the gradient of each weight and of each tensor on the way, under the tensor's name. The next picture shows how large
# the gradient of the residual stream is. Each row is a depth; the way back goes from the top to the bottom. (The ids
# are given twice, because the labels are the same text. The label of a place is the token after it.)

# %%
loss, grads = compute_all_gradients(ids, ids, tiny.weights, config)
streams = np.stack([grads.embedded, *(layer.out for layer in grads.layers)])[:, 0]
sizes = viz.root_mean_square(streams)
assert sizes.shape == (config.num_hidden_layers + 1, ids.shape[1])

axes = viz.new_axes(8, 3.4)
image = axes.imshow(sizes * 1000, origin="lower", aspect="auto")
viz.label_tokens(axes, tiny.tokenizer.convert_ids_to_tokens(ids[0].tolist()))
axes.figure.colorbar(image, label="root mean square, in thousandths")
axes.set_yticks(range(len(sizes)), range(len(sizes)))
_ = axes.set(ylabel="blocks done", title=f"gradient of the stream, loss {loss:.2f}")

# %% [markdown]
# A sum passes its gradient to both terms unchanged. So the residual stream carries the gradient back to the embedding,
# and every block adds to it. At every depth, the last token has no gradient: no label follows it, and no earlier token
# sees it.
#
# The gradient passes seven caps: one for the scores in each block, and one for the logits. How much of the gradient
# remains after each cap?


# %%
def share(after, before):
    return np.linalg.norm(after) / np.linalg.norm(before)


parts = [layer.attention for layer in grads.layers]
shares = [share(part.scores, part.capped) for part in parts]
shares.append(share(grads.raw_logits, grads.logits))
shares = np.array(shares)
assert shares.shape == (config.num_hidden_layers + 1,)

axes = viz.new_axes(6.4, 3)
axes.bar([*(f"block {n}" for n in range(6)), "logits"], 100 * (1 - shares))
_ = axes.set(ylabel="percent", title="part of the gradient that a cap takes away")

# %% [markdown]
# **Question.** The cap of the logits takes most. Why? What would happen to a score of 200, with the cap 50?
#
# <details><summary>Answer</summary>
# The largest logits reach two thirds of their cap, and the largest scores not half of theirs. A score of 200 has the
# slope 1 - tanh(4)², about 0.001: it hardly learns. A kernel that forgets this slope sends a gradient back that is over
# 700 times too large.
# </details>
#
# ## One step by hand
#
# The gradient says in which direction the loss rises. So a step goes in the opposite direction. The length of the step
# is the length of the gradient times the *learning rate* $\eta$:
#
# $$w \leftarrow w - \eta \, \frac{\partial L}{\partial w}, \qquad L_{\mathrm{new}} \approx L - \eta \, |\nabla L|^2$$
#
# Here $\nabla L$ is the gradient of all weights, and $|\nabla L|$ its length. The second formula follows from the
# slopes alone, as if the loss were a straight line.

# %%
old = named_weights(tiny.weights, config)
squares = sum(np.sum(np.square(g, dtype=float)) for g in grads.weights.values())


def loss_after_step(rate):
    rate = np.float32(rate)
    new = {name: old[name][:] - rate * grads.weights[name] for name in old}
    logits = refgemma.forward(ids, weights_of(new, config), config).logits
    return refgemma.causal_lm_loss(logits, ids)


rates = np.array([0.0001, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3])
losses = np.array([loss_after_step(rate) for rate in rates])
assert losses.shape == rates.shape

axes = viz.new_axes(6.4, 3)
axes.semilogx(rates, losses, "o-", label="loss after the step")
axes.semilogx(rates, np.maximum(loss - rates * squares, 0), ":", label="straight line")
axes.set(xlabel="learning rate", ylabel="loss", title="one step on one sentence")
_ = axes.legend()

# %% [markdown]
# **Question.** Up to which learning rate is the straight line good? Why does the loss rise again?
#
# <details><summary>Answer</summary>
# Up to about 0.003. A gradient is the slope at one place. A long step leaves this place, and reaches weights where
# other slopes hold. Notebook 16 uses a rate that falls, and an optimizer that chooses each number's step.
# </details>
#
# ## A bug: the mean of the means
#
# A batch that is too large for the memory is cut into parts, called **micro-batches**, and their gradients are added.
# The loss of a batch is the mean over all its tokens. If a trainer takes the mean of each part, and then the mean of
# these means, the tokens of short texts count more. Many trainers had this bug;
# [transformers had it until 2024](https://huggingface.co/blog/gradient_accumulation).

# %%
texts = [
    "The end of the tale.",
    "The castle by the sea was cold and dark, and the rain came down, and the king "
    "said to his daughter that she must go away.",
]
rows = [np.array([tiny.tokenizer.encode(text)]) for text in texts]
# Nothing predicts the first token.
counts = np.array([row.shape[1] - 1 for row in rows])


def flat_gradient(row, num_items=None):
    found = compute_gradients(row, row, tiny.weights, config, num_items=num_items)[1]
    return np.concatenate([g.ravel() for g in found.values()])


right = sum(flat_gradient(row, num_items=float(counts.sum())) for row in rows)
means = np.stack([flat_gradient(row) for row in rows])
wrong = means.mean(axis=0)
assert wrong.shape == right.shape == (sum(x[:].size for x in old.values()),)

# %%
cosine = right @ wrong / np.linalg.norm(right) / np.linalg.norm(wrong)
angle = np.degrees(np.arccos(cosine))
equal = np.full(len(counts), 1 / counts.sum())
shares_of_tokens = {"mean of all": equal, "mean of means": 0.5 / counts}

figure, (left, middle) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for place, (name, weight) in enumerate(shares_of_tokens.items()):
    left.bar(np.arange(2) + 0.4 * place - 0.2, 100 * weight, width=0.4, label=name)
left.set_xticks(range(2), [f"{count} tokens" for count in counts])
left.set(ylabel="percent of the loss", title="weight of one token")
left.legend()
middle.plot(right[::997], wrong[::997], ".")
middle.axline((0, 0), slope=1, color="grey", linestyle=":")
middle.set(xlabel="mean of all", ylabel="mean of means")
_ = middle.set_title(f"gradients, {angle:.0f} degrees apart")

# %% [markdown]
# **Question.** With this bug, how many times more does a token of the short text count than a token of the long text?
# When is the bug invisible?
#
# <details><summary>Answer</summary>
# 4.1 times: 29 tokens against 7. If all texts have the same number of labels, the two means are equal, so a test with
# texts of one length does not find the bug.
# </details>
#
# ## Exercise
#
# `mean_gradient` gets an array `gradients` with one row for each micro-batch: the gradient of the mean loss of its
# tokens. `counts` has the number of tokens in each micro-batch. Return the gradient of the mean loss of all tokens. (In
# a real trainer, `refgemma check` finds this bug from recorded gradients.)


# %%
def mean_gradient(gradients, counts):
    raise NotImplementedError


exercises.check_mean_gradient(mean_gradient)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mean_gradient(gradients, counts):
#     shares = counts / counts.sum()
#     return shares @ gradients
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Back-propagation](https://doi.org/10.1038/323533a0) (Rumelhart, Hinton and Williams 1986).
