"""Gemma 2 in NumPy, to be read and to be trusted.

Reading order, bottom to top:

1. `refgemma.shapes` names the axes, `refgemma.precision` says where numbers are rounded, `refgemma.config` which
   numbers make a model;
2. `refgemma.ops`, `refgemma.cache`, `refgemma.layers`, `refgemma.model` are Gemma 2: operations, what a layer
   remembers, one layer, the whole;
3. `refgemma.generation`, `refgemma.heads`, `refgemma.tokenizer` make text and a loss of it;
4. `refgemma.weights`, `refgemma.pretrained` read it from a folder;
5. `refgemma.oracle` compares it, tensor by tensor, with what PyTorch recorded.

Examples
--------
>>> import refgemma
>>> tiny = refgemma.load("tiny")
>>> ids = tiny.tokenizer.encode("Once upon a time")
>>> run = refgemma.forward([ids], tiny.weights, tiny.config)
>>> run.layers[3].attention.probs.shape
(1, 6, 7, 7)
"""

from importlib.metadata import version

from refgemma.config import ConfigError, Gemma2Config
from refgemma.generation import generate
from refgemma.heads import causal_lm_loss, log_softmax
from refgemma.inputs import InputError
from refgemma.model import Forward, forward, next_token_logits
from refgemma.precision import BF16, F16, as_dtype, bf16, f16, narrow, wide
from refgemma.pretrained import Pretrained, load
from refgemma.tokenizer import TextStream, Tokenizer, TokenizerError
from refgemma.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from refgemma.weights.parameters import LayerWeights, Weights

__version__ = version("refgemma")

__all__ = [
    "BF16",
    "F16",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Forward",
    "Gemma2Config",
    "InputError",
    "LayerWeights",
    "Pretrained",
    "TextStream",
    "Tokenizer",
    "TokenizerError",
    "Weights",
    "as_dtype",
    "bf16",
    "causal_lm_loss",
    "f16",
    "forward",
    "generate",
    "load",
    "log_softmax",
    "narrow",
    "next_token_logits",
    "open_checkpoint",
    "wide",
]
