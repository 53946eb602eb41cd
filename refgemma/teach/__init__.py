"""Pictures, an explorer page, and exercises with answers recorded from PyTorch."""
