"""Exercises: write a part of Gemma 2, pass it to its ``check_`` function as `answer`, and read the feedback.

The expected values were recorded from PyTorch, published, or drawn by hand. The tolerance is the rounding bound of the
operation. A wrong answer is compared with the results of known mistakes, and the feedback names the mistake that fits.
`refgemma.teach.exercises.solutions` has a solution of each; try the exercise first.

Examples
--------
>>> from refgemma.teach import exercises
>>> exercises.check_soft_cap(lambda x, cap: x)
Not yet: soft_cap(x, cap) on numbers from -400 to 400 with a cap of 50
  4800 of 4801 elements are wrong; the largest error, at [0], is -400 instead of -50
  Hint: the values are unchanged. The formula is cap * tanh(x / cap).
>>> bool(exercises.check_soft_cap(exercises.solutions.soft_cap))
True
"""

from refgemma.teach.exercises import solutions
from refgemma.teach.exercises.feedback import Feedback
from refgemma.teach.exercises.grading import SeedError, Unsolved, check_seeded, require
from refgemma.teach.exercises.guide import ProgressError, hint, progress
from refgemma.teach.exercises.learning import (
    check_mean_gradient,
    check_rms_norm_backward,
    check_soft_cap_backward,
)
from refgemma.teach.exercises.single_operations import (
    check_attention_probs,
    check_embed,
    check_embed_bf16,
    check_gelu_tanh,
    check_qk_norm_scores,
    check_repeat_kv,
    check_rms_norm,
    check_rotate,
    check_round_to_bf16,
    check_sliding_mask,
    check_soft_cap,
)
from refgemma.teach.exercises.stories import PlayError, Story, play, save_port
from refgemma.teach.exercises.whole_model import (
    check_causality_test,
    check_diagnosis,
    check_encode_word,
    check_first_divergence,
    check_induction_scores,
    check_keep_top_p,
    check_parameters,
    mystery_trace,
    recorded_trace,
)

__all__ = [
    "Feedback",
    "PlayError",
    "ProgressError",
    "SeedError",
    "Story",
    "Unsolved",
    "check_attention_probs",
    "check_causality_test",
    "check_diagnosis",
    "check_embed",
    "check_embed_bf16",
    "check_encode_word",
    "check_first_divergence",
    "check_gelu_tanh",
    "check_induction_scores",
    "check_keep_top_p",
    "check_mean_gradient",
    "check_parameters",
    "check_qk_norm_scores",
    "check_repeat_kv",
    "check_rms_norm",
    "check_rms_norm_backward",
    "check_rotate",
    "check_round_to_bf16",
    "check_seeded",
    "check_sliding_mask",
    "check_soft_cap",
    "check_soft_cap_backward",
    "hint",
    "mystery_trace",
    "play",
    "progress",
    "recorded_trace",
    "require",
    "save_port",
    "solutions",
]
