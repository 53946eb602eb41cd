"""Comparing runs: named tensors, bounds of rounding, replay of single operations, and the goldens."""
