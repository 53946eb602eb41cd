"""Measure time, peak memory and largest deviation of one comparison at full size, a row of docs/full-size.md's table.

    python benchmarks/full_size.py 9b-synthetic                         compare the output of each layer of the fast
    code python benchmarks/full_size.py 9b-synthetic --reference             compare every tensor of the definition
    python benchmarks/full_size.py 9b-synthetic --engine transformers   run the same work in PyTorch

Run one comparison per process, because peak memory is measured for the process. Processor time includes all threads and
depends less on other load than wall-clock time. PyTorch's time is that of the streamed run in `golden/full_size.py`,
with the same weights and the same sketches; its results are not compared.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from refgemma.goldens.full_size import load_full, verify_full
from refgemma.hub import find_model
from refgemma.weights.checkpoint import open_checkpoint


def numpy_run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare, and return the deviations."""
    checkpoint = open_checkpoint(find_model(args.model)) if args.model else None
    steps = verify_full(args.name, args.dtype, checkpoint, args.reference)
    comparisons = [step for step in steps if not isinstance(step, str)]
    worst = max(comparisons, key=lambda c: c.distance)
    by_name = {c.tensor: c for c in comparisons}
    top = {name: by_name[name] for name in ("top_ids", "top_order")}
    return {
        "compared": len(comparisons),
        "worst_in_units_of_bound": round(worst.distance, 3),
        "worst_tensor": worst.tensor,
        **{name: f"{c.identical} of {c.elements}" for name, c in top.items()},
        "top_logits": round(by_name["top_logits"].distance, 3) if "top_logits" in by_name else None,
    }


def torch_run(args: argparse.Namespace) -> dict[str, Any]:
    """Run transformers' own layers, with weights in memory only while needed, and sketch the results."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
    import full_size
    import torch
    from record import warm_up

    torch.set_num_threads(os.cpu_count() or 1)
    warm_up()
    preset, _, kind = args.name.partition("-synthetic")
    sketches, _ = full_size.run(full_size.synthetic(preset, kind[1:] or "full"), args.dtype, args.reference)
    return {"compared": len(sketches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="9b-synthetic, 27b-synthetic, or one of them with -two-layers or -long")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engine", choices=("numpy", "transformers"), default="numpy")
    parser.add_argument("--model", metavar="DIR", help="read the weights from a folder of refgemma synth")
    parser.add_argument("--reference", action="store_true", help="compare every tensor, also in float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.reference |= args.dtype != "float32"
    began = time.perf_counter()
    found = (numpy_run if args.engine == "numpy" else torch_run)(args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "recording": args.name,
        "tokens": load_full(args.name)[0]["calls"],
        "dtype": args.dtype,
        "engine": args.engine,
        "tensors": "every tensor" if args.reference else "layers",
        "seconds": round(time.perf_counter() - began),
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
    } | found
    print(json.dumps(row) if args.json else " | ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
