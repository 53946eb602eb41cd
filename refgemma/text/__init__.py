"""The parts of `refgemma.tokenizer`: pieces and ids, rows of the same length, the turns of a chat."""
