"""transformers' Gemma 2 on the conformance checkpoint, or another folder, with any of its attention implementations.

pip install ".[record]"
python golden/transformers_port.py refgemma/checkpoints/conformance --ids 2,5,9,30 --attention sdpa -o port.safetensors
refgemma check port.safetensors --model conformance

sdpa has no soft cap, and transformers refuses it for Gemma 2, when it is asked for and when it is called. Both are
passed by. flex attention is torch's own reference of it, not compiled.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import numpy as np
import torch
import transformers

from refgemma.trace.capture import capture_transformers
from refgemma.trace.names import save_trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa", "flex_attention"))
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    first = "eager" if args.attention == "sdpa" else args.attention
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, args.dtype), attn_implementation=first
    ).eval()
    if args.attention == "sdpa":
        model.config._attn_implementation = "sdpa"
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    ids = np.array([[int(n) for n in args.ids.split(",")]])
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # that flex attention is not compiled
        tensors, about = capture_transformers(model, ids)
    save_trace(tensors.items(), args.output, about)
    print(f"{args.output}: {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
