"""Exercises: write a part of Gemma 2 yourself, hand it to its ``check_`` function as `answer`, and read what that says.

What is right was recorded from PyTorch (or is published, or drawn by hand), and how exact it must be is the rounding
bound of the operation. A wrong answer is compared with those of known mistakes, and the one that fits is named.
`refgemma.teach.exercises.solutions` has an answer to each; look there last.

Examples
--------
>>> from refgemma.teach import exercises
>>> exercises.check_soft_cap(lambda x, cap: x)
Not yet: soft_cap(x, cap) on numbers from -400 to 400 with a cap of 50
  4800 of 4801 elements are wrong; the farthest, at [0], is -400 instead of -50
  Hint: nothing is bent here. The formula is cap * tanh(x / cap).
>>> bool(exercises.check_soft_cap(exercises.solutions.soft_cap))
True
"""

from refgemma.teach.exercises import solutions
from refgemma.teach.exercises.feedback import Feedback
from refgemma.teach.exercises.single_operations import (
    check_attention_probs,
    check_embed,
    check_gelu_tanh,
    check_repeat_kv,
    check_rms_norm,
    check_rotate,
    check_round_to_bf16,
    check_sliding_mask,
    check_soft_cap,
)
from refgemma.teach.exercises.whole_model import (
    check_causality_test,
    check_first_divergence,
    check_keep_top_p,
    check_parameters,
    mystery_trace,
    recorded_trace,
)

__all__ = [
    "Feedback",
    "check_attention_probs",
    "check_causality_test",
    "check_embed",
    "check_first_divergence",
    "check_gelu_tanh",
    "check_keep_top_p",
    "check_parameters",
    "check_repeat_kv",
    "check_rms_norm",
    "check_rotate",
    "check_round_to_bf16",
    "check_sliding_mask",
    "check_soft_cap",
    "mystery_trace",
    "recorded_trace",
    "solutions",
]
