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
# # 12. The tokenizer: how the pieces came to be
#
# The model reads tokens (notebook 1). A short program chose the 2048 tokens of the tiny model by counting pieces of
# text. Its method is called **byte-pair encoding**, BPE. This notebook uses the method to train a small tokenizer on
# one tale. Then it compares this tokenizer with the pieces of the tiny model.
#
# ![Drawing of the model: the tokens are lit](pictures/model-12.svg)
#
# The tokens are highlighted: there, text becomes numbers.

# %%
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import numpy as np

import refgemma
from refgemma.teach import exercises, viz

tiny = refgemma.load("tiny")
tale = files("refgemma.teach").joinpath("tale.txt").read_text("utf-8")
words = Counter("▁" + word for word in tale.split())
print(tale[17:112])
print(words.total(), "words,", len(words), "different ones")

# %% [markdown]
# The tale is "The Frog-Prince" by the brothers Grimm, in the English of Edgar Taylor (1823). As in notebook 1, `▁`
# stands for a space, which belongs to the word after it.
#
# ## Letters or words?
#
# A token could be a letter. Then a text has many tokens, and the model must compute once for each of them. A token
# could be a word. Then the embedding table needs a row for every word, and a new word has no row. Pieces of words are a
# compromise. The compression measures how many characters a token has on average:
#
# $$\mathrm{compression} = \mathrm{characters} \,/\, \mathrm{tokens}$$

# %%
ids = np.array(tiny.tokenizer.encode(tale)[1:])  # without <bos>
counts = np.bincount(ids, minlength=tiny.config.vocab_size)
assert counts.shape == (tiny.config.vocab_size,)

sizes = len(tale) / np.array([len(tale), len(ids), words.total()])
assert sizes.shape == (3,)
axes = viz.new_axes(6, 2.6)
axes.bar(["letters", "tiny model", "words"], sizes)
_ = axes.set(ylabel="characters per token", title="compression of the tale")

# %% [markdown]
# ## Join the most frequent pair
#
# Training begins with single characters. It counts all pairs of neighbours in the text, and joins the most frequent
# pair to a new piece. Then it counts again. A pair must lie inside one word. So it is enough to count the pairs in each
# different word once, and to multiply by the number of times that the word occurs. In the formula, $n(a, b)$ is the
# number of times that the pair $(a, b)$ occurs:
#
# $$(a, b) = \arg\max_{(a, b)} \; n(a, b)$$


# %%
def count_pairs(spellings):
    pairs = Counter()
    for word, pieces in spellings.items():
        for pair in pairwise(pieces):
            pairs[pair] += words[word]
    return pairs


def join(pieces, pair):
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] = "".join(pair)
        else:
            joined.append(piece)
    return joined


# %%
spellings = {word: list(word) for word in words}
merges, frequencies = [], []
lengths = [sum(words[word] * len(pieces) for word, pieces in spellings.items())]
for _ in range(200):
    pair, frequency = count_pairs(spellings).most_common(1)[0]
    spellings = {word: join(pieces, pair) for word, pieces in spellings.items()}
    merges.append(pair)
    frequencies.append(frequency)
    lengths.append(sum(words[word] * len(p) for word, p in spellings.items()))

assert np.array(merges).shape == (200, 2)
["".join(pair) for pair in merges[:12]]

# %% [markdown]
# **Question.** Which whole word of more than one letter became a piece first? Why this one?
#
# <details><summary>Answer</summary>
# <code>▁the</code>, the most frequent word of the tale. It needs two merges before: its parts are frequent in other
# words too.
# </details>
#
# ## Less and less to gain
#
# A merge makes the text shorter by the number of pairs that it joins. (Repeated letters, as in `ooo`, are an
# exception.)
#
# $$\mathrm{tokens}_{k+1} = \mathrm{tokens}_k - n(a, b)$$

# %%
lengths, frequencies = np.array(lengths), np.array(frequencies)
assert lengths.shape == (201,)
assert frequencies.shape == (200,)

axes = viz.new_axes(6.4, 3)
axes.plot(lengths)
axes.axhline(words.total(), linestyle=":", color="grey", label="one token a word")
axes.set(xlabel="merges", ylabel="tokens", title="length of the tale", ylim=(0, None))
_ = axes.legend()

# %% [markdown]
# **Question.** How many tokens does the first merge save, and how many does the last? How large should a vocabulary be?
#
# <details><summary>Answer</summary>
# The first saves 206 tokens of 6013, the last saves 4. Each further piece costs a row of the embedding table and saves
# fewer tokens, so a vocabulary should not be too large. Gemma 2 has 256,000 pieces because it reads many languages and
# code.
# </details>
#
# ## Reading a new word
#
# The tokenizer reads a new word in the same way. It begins with the characters, and joins the learned pairs in the
# order in which they were learned. The tokenizer of the tiny model learned its pairs from eleven books, and this
# tokenizer from one tale.


# %%
def read(word):
    pieces = list(word)
    for pair in merges:
        pieces = join(pieces, pair)
    return pieces


for word in ("▁princess", "▁frogs", "▁Rumpelstiltskin"):
    print(read(word), tiny.tokenizer.tokenize(word.replace("▁", " ")))

# %% [markdown]
# A character that did not occur in training has no piece. Gemma writes it as the bytes of its UTF-8 form, each a token
# of its own. This is called **byte fallback**. So every text can be encoded, and decoding gives the same text again.

# %%
snow = tiny.tokenizer.tokenize("The snow is 雪")
print(snow)
assert np.frombuffer("雪".encode(), np.uint8).shape == (3,)  # three bytes
ids_of_snow = tiny.tokenizer.encode("The snow is 雪")
tiny.tokenizer.decode(ids_of_snow, skip_special_tokens=True)

# %% [markdown]
# ## The order of the ids
#
# The ids of the tiny model's pieces are in the order of its merges, after the special tokens and the 256 bytes. The
# first pieces are the most frequent pairs of the eleven books. If tokens are ranked by how often they occur, their
# counts often fall roughly like the inverse of the rank $r$. This is called Zipf's law. In this tale, the counts are
# above the law: the token at rank 100 occurs 4 times, and the law gives 1.2.
#
# $$\mathrm{count}(r) \approx \mathrm{count}(1) / r$$

# %%
names = tiny.tokenizer.convert_ids_to_tokens(range(tiny.config.vocab_size))
first = names.index("▁t")
print(first, names[first : first + 12])

ranked = np.sort(counts[counts > 0])[::-1]
assert ranked.shape == (np.count_nonzero(counts),)
axes = viz.new_axes(6, 3)
places = np.arange(1, len(ranked) + 1)
axes.loglog(places, ranked, label="the tale, in tokens")
axes.loglog(places, ranked[0] / places, ":", label="1 / rank")
axes.set(xlabel="rank", ylabel="count", title="how often a token occurs")
_ = axes.legend()

# %% [markdown]
# **Question.** How many of the first 12 pieces of the tiny model are also among the first 12 pieces of the tale? What
# does the beginning of a vocabulary depend on?
#
# <details><summary>Answer</summary>
# Nine of 12. The first pairs are those of English, and hardly depend on the book. Later pieces, such as names, depend
# on the subject of a book.
# </details>
#
# ## Exercise
#
# `encode_word` gets a list of characters and `ranks`, a dictionary from each joined piece to its place in the order of
# merges. As long as a pair of neighbours forms a known piece, the function joins the pair with the lowest rank. If this
# pair occurs several times, it joins the leftmost one first. It returns the list of pieces. In the next cell, replace
# the line `raise NotImplementedError`, run the cell, and read the result of the check.


# %%
def encode_word(characters, ranks):
    raise NotImplementedError


exercises.check_encode_word(encode_word)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from itertools import pairwise
#
#
# def encode_word(characters, ranks):
#     pieces = list(characters)
#     while True:
#         joined = [a + b for a, b in pairwise(pieces)]
#         known = [piece for piece in joined if piece in ranks]
#         if not known:
#             return pieces
#         place = joined.index(min(known, key=lambda piece: ranks[piece]))
#         pieces[place : place + 2] = [joined[place]]
# ```
#
# </details>

# %% [markdown]
# **Papers.** [Byte-pair encoding](https://arxiv.org/abs/1508.07909) of words (Sennrich et al. 2015);
# [SentencePiece](https://arxiv.org/abs/1808.06226) (Kudo and Richardson 2018), the program that Gemma uses.
