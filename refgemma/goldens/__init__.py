"""Read PyTorch's recordings, and compare refgemma with them."""
