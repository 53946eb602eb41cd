"""keras-hub's Gemma 2 on the conformance checkpoint, or another folder: a trace of what its blocks and its head give.

pip install keras-hub tensorflow-cpu
python golden/keras_port.py refgemma/checkpoints/conformance --ids 2,5,9,30 -o port.safetensors
refgemma check port.safetensors --model conformance
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import keras_hub
import numpy as np
from safetensors.numpy import save_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", required=True)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    backbone = keras_hub.models.GemmaBackbone.from_preset(args.folder, dtype="float32")
    outputs = {f"layers.{n}.out": layer.output for n, layer in enumerate(backbone.transformer_layers)}
    outputs["norm"] = backbone.layer_norm.output
    outputs["logits"] = backbone.token_embedding(backbone.layer_norm.output, reverse=True)
    ids = np.array([[int(n) for n in args.ids.split(",")]])
    run = keras.Model(backbone.inputs, outputs)({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    found = {name: np.ascontiguousarray(x, np.float32) for name, x in run.items()}
    about = {"dtype": "float32", "engine": f"keras-hub {keras_hub.__version__}, keras {keras.__version__}"}
    save_file({"input_ids": ids, **found}, args.output, about)
    print(f"{args.output}: {len(found)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
