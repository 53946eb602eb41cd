"""What is recorded, as data: small models built to expose mistakes, and the cases run on them and on the tiny model.

A shape that can hide a mistake is useless here. In `MODELS` no two axes of one model are alike, sequences are longer
than two windows, heads * head_dim is not the width, the query scalar is neither head_dim nor a power of two,
sqrt(hidden) is no bf16 number, and all norm weights are random. The exceptions are named for what they probe.
"""

from __future__ import annotations

from dataclasses import dataclass

# name: (shape, spread of the random weights, why)
MODELS: dict[str, tuple[dict[str, object], float, str]] = {
    "bends": (
        dict(vocab_size=61, hidden_size=24, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=12, sliding_window=5,
             attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        0.3,
        "caps so small that every score and logit bends",
    ),
    "reaches": (
        dict(vocab_size=67, hidden_size=42, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=7, sliding_window=4),
        0.7,
        "the released caps of 50 and 30, with weights so large that scores and logits come near them; three query "
        "heads share a key head",
    ),
    "one-key-head": (
        dict(vocab_size=53, hidden_size=35, intermediate_size=18, num_hidden_layers=2, num_attention_heads=5,
             num_key_value_heads=1, head_dim=6, query_pre_attn_scalar=11, sliding_window=3),
        0.3,
        "one key/value head for five query heads",
    ),
    "no-caps": (
        dict(vocab_size=47, hidden_size=21, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=3, head_dim=4, query_pre_attn_scalar=5, sliding_window=1,
             attn_logit_softcapping=None, final_logit_softcapping=None),
        0.3,
        "no caps, a window of one key, as many key heads as query heads",
    ),
    "global-first": (
        dict(vocab_size=71, hidden_size=33, intermediate_size=40, num_hidden_layers=5, num_attention_heads=3,
             num_key_value_heads=1, head_dim=14, query_pre_attn_scalar=11, sliding_window=7, rope_theta=100.0,
             rms_norm_eps=1e-3,
             layer_types=["full_attention", "sliding_attention", "sliding_attention"] + ["full_attention"] * 2),
        0.3,
        "another order of the layer types, another rotary base, an eps that counts",
    ),
    "untied-with-biases": (
        dict(vocab_size=59, hidden_size=27, intermediate_size=38, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=13, sliding_window=3,
             attn_logit_softcapping=2.0, final_logit_softcapping=3.0, attention_bias=True, tie_word_embeddings=False),
        0.3,
        "what the configuration allows and no released Gemma 2 has: biases in attention, a head of its own",
    ),
}  # fmt: skip

# Which tensors of a run are kept. "full": every tensor. "ends": every tensor of layers 0 and 1, of the others what
# comes out of attention, feed-forward and block. "thin": embedding, rotary tables, rotated queries and keys, attention
# weights, what comes out of attention and block, norm and logits. "logits": those alone.


@dataclass(frozen=True)
class Case:
    """One forward computation, possibly in several calls that share a cache."""

    name: str
    model: str
    dtype: str
    batch: int
    calls: tuple[int, ...]  # tokens of each call: (13,) is a whole sequence, (9, 1, 1) a prefill and two decoding steps
    padding: str = "none"  # "left" or "right": row r has 2 r padding tokens
    density: str = "full"
    why: str = ""


def _variants(name: str, dtypes: tuple[str, ...], **common: object) -> list[Case]:
    return [Case(f"{name}-{short(dtype)}", dtype=dtype, **common) for dtype in dtypes]  # type: ignore[arg-type]


def short(dtype: str) -> str:
    """How a precision is called in a case's name."""
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]


F32, BOTH, ALL = ("float32",), ("float32", "bfloat16"), ("float32", "bfloat16", "float16")

CASES: list[Case] = [
    *_variants("bends-forward", ALL, model="bends", batch=3, calls=(13,)),
    *_variants("bends-left-padded", BOTH, model="bends", batch=3, calls=(13,), padding="left"),
    *_variants("bends-right-padded", BOTH, model="bends", batch=3, calls=(13,), padding="right"),
    *_variants("bends-decode", BOTH, model="bends", batch=2, calls=(3, *[1] * 8), density="thin",
               why="the total passes the window of 5 while decoding: before it, at it, after it, and twice over"),
    *_variants("bends-decode-left-padded", BOTH, model="bends", batch=3, calls=(7, 1, 1, 1, 1), padding="left",
               density="thin"),
    *_variants("bends-chunked", BOTH, model="bends", batch=2, calls=(4, 6, 3, 1), density="thin",
               why="a chunk longer than the window, whose first queries look back into the chunk before"),
    *_variants("reaches-forward", BOTH, model="reaches", batch=2, calls=(11,)),
    *_variants("reaches-chunked", F32, model="reaches", batch=1, calls=(3, 5, 1, 1), density="thin"),
    *_variants("one-key-head-forward", BOTH, model="one-key-head", batch=2, calls=(9,)),
    *_variants("no-caps-forward", BOTH, model="no-caps", batch=2, calls=(5,)),
    *_variants("global-first-forward", BOTH, model="global-first", batch=1, calls=(17,)),
    *_variants("global-first-decode", F32, model="global-first", batch=2, calls=(6, *[1] * 9), density="thin",
               why="the first layer is not the one whose cache is cut"),
    *_variants("untied-with-biases-forward", BOTH, model="untied-with-biases", batch=2, calls=(7,)),
    *_variants("tiny-forward", BOTH, model="tiny", batch=1, calls=(68,), density="ends"),
    *_variants("tiny-left-padded", F32, model="tiny", batch=2, calls=(68,), padding="left", density="logits"),
    *_variants("tiny-right-padded", F32, model="tiny", batch=2, calls=(68,), padding="right", density="logits"),
    *_variants("tiny-decode", BOTH, model="tiny", batch=1, calls=(125, *[1] * 6), density="logits",
               why="a cache one key short shows in float32; bf16 noise hides it here, but not in bends-decode"),
    *_variants("tiny-chunked", F32, model="tiny", batch=1, calls=(50, 40, 42), density="logits"),
]  # fmt: skip

# Text that the tiny model's cases read (a line of our own, not from the corpus), and prompts continued greedily.
TINY_TEXT = (
    "Once upon a time there was an old miller who had three sons. The eldest took the mill, the second took the mule, "
    'and to the youngest there was left nothing but the cat. "What shall I do with you?" said the boy. "Give me a '
    'pair of boots," answered the cat, "and you shall see that you have not the worst of it." So the boy spent his '
    "last penny upon a pair of boots, and the cat put them on, and went out into the wood as proud as any king. When "
    "he had gone a little way he met a rabbit, and the rabbit laughed, and laughed, until it fell over upon the "
    'grass.\n\n"You may laugh," said the cat, "but we shall see." And he went on, and the wood grew darker, and the '
    "wind began to blow."
)
PROMPTS = ("Once upon a time", '"Come here," said the', "The little girl looked at the")
NEW_TOKENS = 48
