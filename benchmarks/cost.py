"""What a token costs: operations and bytes of the 2B, 9B and 27B against the length of the context.

    python benchmarks/cost.py [--json] [--sgemm GFLOPS --read GB_PER_S]

Counted from the shapes. With the two rates of a machine (`run.py` measures them) the times that follow are printed too:
a prompt's token cannot take less than its operations, a decoded token not less than reading what it needs in float32.
"""

import argparse
import json
import math

from refgemma.config import Gemma2Config
from refgemma.weights.parameters import EMBED_TOKENS, tensor_shapes

SIZES, CONTEXTS = ("2b", "9b", "27b"), (128, 512, 2048, 4096, 8192)
ITEMS = {"float32": 4, "bfloat16": 2}  # bytes of a number


def matrix_weights(config: Gemma2Config) -> int:
    """Numbers in the matrices of all layers, each of which a token is multiplied with once."""
    shapes = tensor_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != EMBED_TOKENS)


def keys_seen(config: Gemma2Config, context: int) -> int:
    """Keys that the last of `context` tokens sees, summed over the layers."""
    sliding = min(context, config.sliding_window)
    return sum(sliding if config.is_sliding(layer) else context for layer in range(config.num_hidden_layers))


def flops(config: Gemma2Config, context: int) -> int:
    """Of the last of `context` tokens: two a weight, and two each for scores and mixed values; the head is counted.

    A prompt needs the head for its last token only.
    """
    head = config.vocab_size * config.hidden_size
    attention = 4 * keys_seen(config, context) * config.num_attention_heads * config.head_dim
    return 2 * (matrix_weights(config) + head) + attention


def bytes_read(config: Gemma2Config, context: int, item: int = 4) -> int:
    """To decode the last of `context` tokens: all matrices, the head, and the keys and values that it sees."""
    head = config.vocab_size * config.hidden_size
    keys = 2 * keys_seen(config, context) * config.num_key_value_heads * config.head_dim
    return item * (matrix_weights(config) + head + keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sgemm", type=float, metavar="GFLOPS", help="the machine's rate of matrix products")
    parser.add_argument("--read", type=float, metavar="GB_PER_S", help="the machine's rate of reading")
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        config = Gemma2Config.preset(size)
        for context in CONTEXTS:
            row = {"model": size, "context": context, "gflop": round(flops(config, context) / 1e9, 2)}
            row |= {f"gb_{name}": round(bytes_read(config, context, item) / 1e9, 2) for name, item in ITEMS.items()}
            if args.sgemm:
                row["prompt_ms"] = round(flops(config, context) / args.sgemm / 1e6, 1)
            if args.read:
                row["decode_ms"] = round(bytes_read(config, context) / args.read / 1e6, 1)
            rows.append(row)
    if args.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
