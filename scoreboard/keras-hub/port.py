"""KerasHub's Gemma 2, by its own converter: the outputs of its blocks, and the logits; with a cache the logits."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import keras_hub
import numpy as np
from glue import main


def load(folder, dtype):
    backbone = keras_hub.models.GemmaBackbone.from_preset(str(folder), dtype=dtype)
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def run(model, case):
    backbone, length = model.backbone, case.ids.shape[1]
    if len(case.calls) == 1:
        outputs = {f"layers.{n}.out": layer.output for n, layer in enumerate(backbone.transformer_layers)}
        outputs["norm"] = backbone.layer_norm.output
        outputs["logits"] = backbone.token_embedding(backbone.layer_norm.output, reverse=True)
        found = keras.Model(backbone.inputs, outputs)({"token_ids": case.ids, "padding_mask": case.mask})
        return {name: keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")) for name, x in found.items()}
    shape = (1, backbone.num_layers, 2, length, backbone.num_key_value_heads, backbone.head_dim)  # as in `_build_cache`
    cache, found = keras.ops.zeros(shape, dtype=model.compute_dtype), {}
    for prefix, start, end in case.pieces():
        logits, _, cache = model.call_with_cache(keras.ops.array(case.ids[:, start:end]), cache, start)
        found[f"{prefix}logits"] = np.array(keras.ops.cast(logits, "float32"))
    return found


main(load, run, engine=f"keras-hub {keras_hub.__version__}, keras {keras.__version__}, {keras.backend.backend()}")
