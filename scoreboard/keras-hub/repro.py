"""keras-hub 0.32.0, Gemma 2 27B: `query_head_dim_normalize=False` changes nothing. Needs keras-hub and a backend."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import keras_hub
import numpy as np

ids = {"token_ids": np.arange(4, 28)[None], "padding_mask": np.ones((1, 24))}
results = {}
for normalize in (True, False):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=96, intermediate_dim=64,
        head_dim=16, query_head_dim_normalize=normalize, use_post_ffw_norm=True, use_post_attention_norm=True,
        attention_logit_soft_cap=50, final_logit_soft_cap=30, use_sliding_window_attention=True, dtype="float32",
    )  # fmt: skip
    results[normalize] = np.array(backbone(ids))
# hidden_dim / heads is 24, head_dim is 16: as in the 27B (144 and 128), the two scales differ.
print("largest difference between the scales 16 ** -0.5 and 24 ** -0.5:", abs(results[True] - results[False]).max())
