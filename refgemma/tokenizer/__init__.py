"""Convert text to token ids and back, as the released tokenizer does."""

from refgemma.tokenizer.batches import BatchEncoding
from refgemma.tokenizer.tokenizer import AutoTokenizer, TextStream, Tokenizer
from refgemma.tokenizer.vocabulary import TokenizerError

__all__ = ["AutoTokenizer", "BatchEncoding", "TextStream", "Tokenizer", "TokenizerError"]
