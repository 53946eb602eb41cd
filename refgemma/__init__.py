"""Gemma 2 in NumPy: a readable reference implementation, checked against PyTorch.

Reading order, bottom to top:

1. `refgemma.shapes` names the axes, `refgemma.precision` rounds results, and `refgemma.config` holds the
   numbers that define a model;
2. `refgemma.ops`, `refgemma.cache`, `refgemma.layers` and `refgemma.model` are Gemma 2: operations, keys and values of
   earlier tokens, one layer, the whole model;
3. `refgemma.heads`, `refgemma.generation`, `refgemma.tokenizer` turn logits into losses and text;
4. `refgemma.weights` and `refgemma.hub` read a Hugging Face folder; `refgemma.convert` reads an original checkpoint;
5. `refgemma.modeling` has the classes of transformers' documentation, with the same calls;
6. `refgemma.trace` names the tensors of a run, `refgemma.oracle` judges the tensors of another implementation, and
   `refgemma.goldens` compares refgemma with recordings of PyTorch;
7. `refgemma.testing` has laws for any implementation; `refgemma.teach` has pictures and exercises.

Examples
--------
>>> import refgemma
>>> tiny = refgemma.load("tiny")
>>> ids = tiny.tokenizer.encode("Once upon a time")
>>> run = refgemma.forward([ids], tiny.weights, tiny.config)
>>> run.layers[3].attention.probs.shape
(1, 6, 7, 7)
"""

import refgemma.cli.signals  # noqa: F401  (first: then an interruption of the later imports prints nothing)

# isort: split
import sys
import warnings
from importlib.metadata import version

from refgemma.cache import Cache
from refgemma.config import ConfigError, Gemma2Config
from refgemma.errors import Moved, RefgemmaError, UsageError
from refgemma.generation.beams import set_seed
from refgemma.generation.caches import DynamicCache, StaticCache
from refgemma.generation.criteria import StoppingCriteria, StoppingCriteriaList
from refgemma.generation.decode import generate
from refgemma.generation.generation_config import GenerationConfig
from refgemma.generation.greedy import greedy
from refgemma.generation.processors import LogitsProcessor, LogitsProcessorList
from refgemma.generation.stream import TextIteratorStreamer, TextStreamer
from refgemma.heads import causal_lm_loss, log_softmax
from refgemma.hub import ModelNameError, find_model
from refgemma.inputs import InputError
from refgemma.model import Forward, forward, next_token_logits
from refgemma.modeling.classes import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    Gemma2PreTrainedModel,
)
from refgemma.modeling.pipelines import pipeline
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.precision import BF16, F16, as_dtype, bf16, f16, narrow, wide
from refgemma.tokenizer.tokenizer import (
    AddedToken,
    AutoTokenizer,
    BatchEncoding,
    GemmaTokenizer,
    GemmaTokenizerFast,
    TextStream,
    Tokenizer,
    TokenizerError,
)
from refgemma.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from refgemma.weights.parameters import LayerWeights, Weights

__version__ = version("refgemma")
sys.meta_path.append(Moved())

# All Auto classes of transformers are names of this one model.
AutoConfig = Gemma2Config
AutoModel = Gemma2Model
AutoModelForCausalLM = Gemma2ForCausalLM
AutoModelForSequenceClassification = Gemma2ForSequenceClassification
AutoModelForTokenClassification = Gemma2ForTokenClassification

__all__ = [
    "BF16",
    "F16",
    "AddedToken",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "Cache",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DynamicCache",
    "Forward",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    "Gemma2Model",
    "Gemma2PreTrainedModel",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "GenerationConfig",
    "InputError",
    "LayerWeights",
    "LogitsProcessor",
    "LogitsProcessorList",
    "ModelNameError",
    "Pretrained",
    "RefgemmaError",
    "StaticCache",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "Tokenizer",
    "TokenizerError",
    "UsageError",
    "Weights",
    "as_dtype",
    "bf16",
    "causal_lm_loss",
    "f16",
    "find_model",
    "forward",
    "generate",
    "greedy",
    "load",
    "log_softmax",
    "narrow",
    "next_token_logits",
    "open_checkpoint",
    "pipeline",
    "set_seed",
    "wide",
]


# Name in transformers that does not exist here -> what to do.
INSTEAD = {
    "AutoProcessor": "Gemma 2 reads text only; use AutoTokenizer",
    "BitsAndBytesConfig": "weights are not quantised here; leave out quantization_config",
    "HybridCache": "use StaticCache, as in transformers 5",
    "OffloadedCache": "use DynamicCache",
    "QuantizedCache": "use DynamicCache, which does not round keys and values",
    "SlidingWindowCache": "use DynamicCache(config=model.config)",
    "Trainer": "train with refgemma.training or refgemma train",
    "TrainingArguments": "use refgemma.training.run.TrainingArguments",
}


def __getattr__(name: str) -> type[Gemma2ForCausalLM]:
    """Return `Gemma2ForCausalLM` for ``GemmaForCausalLM``, a name that transformers' documentation uses by mistake."""
    if name in INSTEAD:  # `from refgemma import ...` hides the text of an AttributeError
        raise ImportError(f"refgemma has no {name}: {INSTEAD[name]}")
    if name != "GemmaForCausalLM":
        raise AttributeError(f"module 'refgemma' has no attribute {name!r}")
    warnings.warn(
        "GemmaForCausalLM is the class of Gemma 1; Gemma2ForCausalLM is used instead, because an example on the "
        "documentation page of Gemma 2 has the wrong name",
        stacklevel=2,
    )
    return Gemma2ForCausalLM
