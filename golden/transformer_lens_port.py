"""TransformerLens' Gemma 2 on the conformance checkpoint, or another folder: its hooks under their own names.

pip install transformer-lens
python golden/transformer_lens_port.py refgemma/checkpoints/conformance --ids 2,5,9,30 -o port.safetensors
refgemma check port.safetensors --model conformance
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformer_lens.model_bridge import TransformerBridge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = transformers.Gemma2ForCausalLM.from_pretrained(args.folder, dtype=dtype, attn_implementation="eager").eval()
    bridge = TransformerBridge.boot_transformers(args.folder, hf_model=model, dtype=dtype)
    ids = np.array([[int(n) for n in args.ids.split(",")]])
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(torch.from_numpy(ids))
    found = {name: x for name, x in cache.items() if torch.is_tensor(x) and x.is_floating_point()} | {"logits": logits}
    arrays = {name: np.ascontiguousarray(x.float().numpy()) for name, x in found.items()}
    engine = f"transformer-lens {version('transformer-lens')}, transformers {transformers.__version__}"
    save_file({"input_ids": ids, **arrays}, args.output,
              {"dtype": args.dtype, "map": "transformer-lens", "engine": engine})  # fmt: skip
    print(f"{args.output}: {len(arrays)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
