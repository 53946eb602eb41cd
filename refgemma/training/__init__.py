"""Compute new weights from gradients: AdamW, clipping, schedules, accumulation, LoRA, and `refgemma train`."""
