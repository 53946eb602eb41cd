"""Share code of the parity tests: random configurations, and the same model in transformers and refgemma."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

import refgemma.modeling.classes
from refgemma.activations import ACTIVATIONS
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.goldens.distance import logits_distance, rounding_noise, run_distance
from refgemma.precision import bf16

CLASSES = [
    "Gemma2Model", "Gemma2ForCausalLM", "Gemma2ForSequenceClassification", "Gemma2ForTokenClassification",
]  # fmt: skip

torch.set_num_threads(1)
for warm_up in (torch.cos, torch.sin, torch.tanh, torch.exp, torch.rsqrt):
    warm_up(torch.ones(1))  # MKL's first call can race (pytorch#188792)


@st.composite
def shapes(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Draw small configurations in which all numbers may differ."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(20, 90)),
        "hidden_size": kv_heads * group * draw(st.integers(3, 9)),
        "intermediate_size": draw(st.integers(3, 50)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 8)),
        "query_pre_attn_scalar": draw(st.integers(1, 40)),
        # Not 1: transformers' cache keeps all keys then (`keys[:, :, -1 + 1:]`), and its decoding is not its forward.
        "sliding_window": draw(st.integers(2, 9)),
        "attn_logit_softcapping": draw(st.sampled_from([None, 2.0, 50.0])),
        "final_logit_softcapping": draw(st.sampled_from([None, 3.0, 30.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "layer_types": draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers)),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", *sorted(ACTIVATIONS)])),
        "rope_theta": draw(st.sampled_from([10000.0, 50.0])),
        "num_labels": draw(st.integers(1, 4)),
    } | fixed  # fmt: skip


def random_tensors(name: str, shape: dict[str, Any], seed: int, gain: float = 1.2) -> dict[str, Any]:
    """Return weights in the order of the state dict; all are bfloat16 numbers, so that they are exact in every
    precision."""
    rng = np.random.default_rng(seed)
    spread = gain / np.sqrt(shape["hidden_size"])
    ours = getattr(refgemma.modeling.classes, name)
    sizes = {n.removeprefix(ours.prefix): s for n, s in ours.tensor_shapes(Gemma2Config(**shape)).items()}
    return {n: np.asarray(bf16(rng.standard_normal(s) * (0.3 if len(s) == 1 else spread))) for n, s in sizes.items()}


def in_transformers(name: str, shape: dict[str, Any], tensors: dict[str, Any], dtype: str) -> Any:
    """Make the model in its precision, because a later cast would round the rotary frequencies."""
    theirs = getattr(transformers, name)
    config = transformers.Gemma2Config(**shape)
    model = theirs._from_config(config, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
    state = {n: torch.tensor(x) for n, x in tensors.items()}
    if name == "Gemma2ForCausalLM" and shape.get("tie_word_embeddings", True):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def here(name: str, shape: dict[str, Any], tensors: dict[str, Any], dtype: str) -> Any:
    return getattr(refgemma.modeling.classes, name).from_state_dict(Gemma2Config(**shape), tensors, dtype)


def as_torch(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, because each side has its own."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


NUDGES = 4


def nudged(name: str, shape: dict[str, Any], tensors: dict[str, Any]) -> list[Any]:
    """Return the model in float64 four times, with every weight moved randomly by up to half a float32 ulp.

    The distance of the results from the original model's results shows what rounding can do in this model, independent
    of the implementation. So a mistake in the arithmetic under test cannot increase this distance.
    """
    models = []
    for seed in range(NUDGES):
        rng = np.random.default_rng(seed)
        moved = {n: x * (1 + rng.uniform(-(2.0**-24), 2.0**-24, x.shape)) for n, x in tensors.items()}
        models.append(here(name, shape, moved, "float64"))
    return models


def distance(ours: Any, theirs: Any, exact: Any, moved: Callable[[], list[Any]] = list) -> float:
    """Return the distance of float32 results; 1 means 5e-6 of the largest, which was asked for.

    A model of width 3 may be worse conditioned. Then the limit is the rounding error of our own result, measured
    against float64. The errors of one run may cancel, so the change in the results of `nudged` models (`moved`) is
    also a limit.
    """
    if ours.size == 0:
        return 0.0
    found = min(logits_distance(ours, theirs), run_distance(ours, theirs, rounding_noise(ours, theirs, exact)))
    if found <= 1:
        return found
    noise = max((float(np.abs(x - exact).max()) for x in moved()), default=0.0)
    return min(found, run_distance(ours, theirs, noise))
