"""Original checkpoints read and written: PyTorch pickles, Flax trees, Orbax folders."""
