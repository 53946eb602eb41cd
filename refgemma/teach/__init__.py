"""Draw pictures, write explorer pages, and check exercises against results recorded from PyTorch."""
