"""Time, peak memory and largest deviation of one comparison at full size, as a row of the table in docs/full-size.md.

    python benchmarks/full_size.py 9b-synthetic --dtype float32

One comparison a process, since peak memory is that of the process.
"""

import argparse
import json
import resource
import time

from refgemma.oracle.full_size import load_full, verify_full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="9b-synthetic, 27b-synthetic, or one of them with -two-layers; 9b-synthetic-long")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    comparisons = [step for step in verify_full(args.name, args.dtype) if not isinstance(step, str)]
    worst = max(comparisons, key=lambda c: c.distance)
    ids = next(c for c in comparisons if c.tensor == "top_ids")
    row = {
        "recording": args.name,
        "tokens": load_full(args.name)[0]["calls"],
        "dtype": args.dtype,
        "seconds": round(time.perf_counter() - began),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "compared": len(comparisons),
        "worst_in_units_of_bound": round(worst.distance, 3),
        "worst_tensor": worst.tensor,
        "same_top_ids": f"{ids.identical} of {ids.elements}",
    }
    print(json.dumps(row) if args.json else " | ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
