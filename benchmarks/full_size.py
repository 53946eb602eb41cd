"""Time, peak memory and largest deviation of one comparison at full size, as a row of the table in docs/full-size.md.

    python benchmarks/full_size.py 9b-synthetic                         what each layer of the fast path gives
    python benchmarks/full_size.py 9b-synthetic --reference             every tensor of the definition
    python benchmarks/full_size.py 9b-synthetic --engine transformers   the same work, done by PyTorch

One comparison a process, since peak memory is that of the process. Processor time is that of all threads; it depends
less than the time on what else the machine does. PyTorch's time is that of its own streamed run in
`golden/full_size.py`, over the same weights, with the same sketches; it is compared with nothing.
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
    """Compare, and say how far apart they are."""
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
    """transformers' own layers, with weights only while they compute, and the sketches of what they make."""
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
    parser.add_argument("--model", metavar="DIR", help="read the weights from what refgemma synth wrote")
    parser.add_argument("--reference", action="store_true", help="every tensor, in float32 too")
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
