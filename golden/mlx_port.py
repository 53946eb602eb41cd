"""MLX-LM's Gemma 2 on the conformance checkpoint, or another folder: a trace of its modules under their own names.

pip install mlx-lm "mlx[cpu]" safetensors
python golden/mlx_port.py refgemma/checkpoints/conformance --ids 2,5,9,30 -o port.safetensors
refgemma check port.safetensors --model conformance
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models import gemma2
from safetensors.numpy import save_file


def watched(model: Any, found: dict[str, Any]) -> None:
    """Have every module note what it returns; the n-th result under one name is ``name#n``."""
    counts: Counter[str] = Counter()
    names = {id(module): name for name, module in model.named_modules()}
    for kind in {type(module) for _, module in model.named_modules()}:
        usual = kind.__call__

        def called(self: Any, *args: Any, usual: Any = usual, **named: Any) -> Any:
            result = usual(self, *args, **named)
            if (name := names.get(id(self))) and isinstance(result, mx.array):
                number = counts[name]
                counts[name] += 1
                found[f"{name}#{number}" if number else name] = result
            return result

        kind.__call__ = called


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ids", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = gemma2.Model(gemma2.ModelArgs.from_dict(json.loads((args.folder / "config.json").read_text())))
    weights = mx.load(str(args.folder / "model.safetensors"))
    model.load_weights(
        [(name, x.astype(getattr(mx, args.dtype))) for name, x in weights.items() if name != "lm_head.weight"]
    )
    ids = np.array([[int(n) for n in args.ids.split(",")]])
    found: dict[str, Any] = {}
    watched(model, found)
    found["logits"] = model(mx.array(ids))
    arrays = {name: np.array(x.astype(mx.float32)) for name, x in found.items()}
    about = {"dtype": args.dtype, "map": "mlx-lm", "engine": f"mlx {mx.__version__}, mlx-lm {mlx_lm.__version__}"}
    save_file({"input_ids": ids, **{n: np.ascontiguousarray(x) for n, x in arrays.items()}}, args.output, about)
    print(f"{args.output}: {len(arrays)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
