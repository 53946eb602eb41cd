"""PyTorch's recordings: reading them, and comparing refgemma with each."""
