"""Generate text from logits: greedy decoding, sampling and beam search; measure how well a text is predicted."""

from refgemma.generation.decode import generate, generate_batch
from refgemma.generation.generation_config import GenerationConfig
from refgemma.generation.stream import TextStreamer

__all__ = ["GenerationConfig", "TextStreamer", "generate", "generate_batch"]
