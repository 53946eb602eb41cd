"""Generate text by greedy decoding, sampling or beam search, and measure how well a model predicts a text."""

from refgemma.generation.decode import generate, generate_batch
from refgemma.generation.generation_config import GenerationConfig
from refgemma.generation.stream import TextStreamer

__all__ = ["GenerationConfig", "TextStreamer", "generate", "generate_batch"]
