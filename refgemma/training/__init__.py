"""Compute new weights from gradients: AdamW, clipping, schedules, accumulation, LoRA, and the run of `refgemma train`."""
