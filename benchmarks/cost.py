"""Compute the cost of a token: operations and bytes of the 2B, 9B and 27B for each length of the context.

    python benchmarks/cost.py [--json]                  count from the shapes
    python benchmarks/cost.py --measure 5 [--json]      compare predicted with measured times of a layer, in 5 rounds

A prompt takes at least the time of its operations at the rate of this machine's matrix product. A decoded token takes
at least the time to read the needed numbers in float32. Both rates are measured in the same rounds (`engines.py`).
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping

from engines import layer_bytes, layer_flops, matrix_weights
from run import machine, measured

from refgemma.config import Gemma2Config

SIZES, CONTEXTS = ("2b", "9b", "27b"), (128, 512, 2048, 4096, 8192)
ITEMS = {"float32": 4, "bfloat16": 2}  # bytes per number
Row = Mapping[str, object]


def keys_seen(config: Gemma2Config, context: int) -> int:
    """Return the number of keys that the last of `context` tokens sees, summed over the layers."""
    sliding = min(context, config.sliding_window)
    return sum(sliding if config.is_sliding(layer) else context for layer in range(config.num_hidden_layers))


def flops(config: Gemma2Config, context: int) -> int:
    """Return the operations for the last of `context` tokens: two per weight (with the head), score and mixed value.

    A prompt needs the head only for its last token.
    """
    head = config.vocab_size * config.hidden_size
    attention = 4 * keys_seen(config, context) * config.num_attention_heads * config.head_dim
    return 2 * (matrix_weights(config) + head) + attention


def bytes_read(config: Gemma2Config, context: int, item: int = 4) -> int:
    """Return the bytes to read for the last of `context` tokens: all matrices, the head, visible keys and values."""
    head = config.vocab_size * config.hidden_size
    keys = 2 * keys_seen(config, context) * config.num_key_value_heads * config.head_dim
    return item * (matrix_weights(config) + head + keys)


def counted() -> Iterator[Row]:
    """Yield the cost of the last token of a context in the whole model."""
    for size in SIZES:
        config = Gemma2Config.preset(size)
        for context in CONTEXTS:
            gigabytes = {f"gb_{name}": bytes_read(config, context, item) / 1e9 for name, item in ITEMS.items()}
            row = {"gflop": flops(config, context) / 1e9} | gigabytes
            yield {"model": size, "context": context} | {name: round(value, 2) for name, value in row.items()}


def compared(rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Return predicted and measured times of a fast layer in milliseconds, and the machine's rates for the predictions.

    Times are medians over rounds; each round has one process of each kind.
    """
    rates, times = [], []
    for _ in range(rounds):
        rates.append(machine())
        times.append({size: measured("fast", f"prefill {size}") | measured("fast", f"decode {size}") for size in SIZES})
    sgemm, read = (statistics.median(rate[name] for rate in rates) for name in ("sgemm", "read"))
    rows: list[Row] = []
    for size in SIZES:
        config = Gemma2Config.preset(size)
        for work in (name for name in times[0][size] if "share" not in name):
            kind, count = work.split()
            if kind == "prefill":
                predicted = layer_flops(config, int(count)) / sgemm / 1e6
            else:
                predicted = layer_bytes(config, int(count)) / read / 1e6
            took = 1e3 * statistics.median(of_round[size][work] for of_round in times)
            row = {"work": f"{size} layer, {work}", "predicted_ms": round(predicted, 1), "measured_ms": round(took, 1)}
            rows.append(row | {"share": round(predicted / took, 2)})
    return rows, {"rounds": rounds, "sgemm_gflops": round(sgemm, 1), "read_gb_per_s": round(read, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=int, metavar="ROUNDS", help="compare with the measured time of a layer")
    args = parser.parse_args()
    if args.measure is not None and args.measure < 1:
        parser.error("--measure must be at least 1")
    rows, rates = compared(args.measure) if args.measure else (list(counted()), {})
    if args.json:
        print(json.dumps({"rows": rows} | rates, indent=1))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if rates:
        print("\n{rounds} rounds, sgemm {sgemm_gflops} GF/s, reading {read_gb_per_s} GB/s".format(**rates))


if __name__ == "__main__":
    main()
