"""Read and write original checkpoints: PyTorch pickles, Flax trees, Orbax folders and GGUF files."""
