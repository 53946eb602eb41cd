"""From gradients to new weights: AdamW, clipping, schedules, accumulation, LoRA, and the run of `refgemma train`."""
