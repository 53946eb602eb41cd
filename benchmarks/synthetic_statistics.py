"""Compute statistics of a synthetic 9B or 27B on 64 tokens, for the table in docs/full-size.md.

    python benchmarks/synthetic_statistics.py 9b [--json]

The definition computes in float32, one layer at a time. The weights are random (untrained). The statistics show that
every part of the model has an effect: the caps change scores and logits, attention is neither even nor on one token.
"""

import argparse
import json

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.goldens.full_size import load_full
from refgemma.model import begin, blocks, head
from refgemma.ops import rms_norm
from refgemma.precision import Array
from refgemma.weights.synthetic import synthetic_weights


def rms(x: Array) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def entropies(probs: Array) -> Array:
    """Return the entropy of each head's attention for the last query, in nats."""
    last = probs[0, :, -1].astype(np.float64)
    logs = np.log(last, out=np.zeros_like(last), where=last > 0)
    return -(last * logs).sum(axis=-1)


def statistics(size: str) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return the statistics of every layer and of the logits."""
    config = Gemma2Config.preset(size)
    about, golden = load_full(f"{size}-synthetic")
    weights = synthetic_weights(config)
    start = begin(golden["input_ids"][:, : about["calls"][0]], weights, config)
    hidden, layers = start.embedded, []
    for record in blocks(start, weights, config):
        attention, hidden = record.attention, record.out
        seen = np.tril(np.ones(attention.scores.shape[-2:], bool))
        scores, of_heads = np.abs(attention.scores[..., seen]), entropies(attention.probs)
        layers.append({
            "layer": len(layers),
            "largest_score": float(scores.max()),
            "scores_bent_by_1_percent": float(np.mean(scores > 0.175 * config.attn_logit_softcapping)),
            "least_entropy": float(of_heads.min()),
            "most_entropy": float(of_heads.max()),
            "residual_rms": rms(record.out),
        })  # fmt: skip
        del record, attention
    raw_logits, logits = head(rms_norm(hidden[:, -1:], weights.norm, config.rms_norm_eps), weights, config)
    of_logits = {"raw_std": float(raw_logits.std()), "raw_largest": float(np.abs(raw_logits).max()),
                 "largest": float(np.abs(logits).max()), "norm_weight_std": float(weights.norm.std())}  # fmt: skip
    return layers, of_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("2b", "9b", "27b"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers, of_logits = statistics(args.size)
    if args.json:
        print(json.dumps({"layers": layers, "logits": of_logits}, indent=1))
        return
    print("| " + " | ".join(layers[0]) + " |\n|" + " --- |" * len(layers[0]))
    for layer in (layers[0], layers[1], layers[len(layers) // 2], layers[-2], layers[-1]):
        print("| " + " | ".join(f"{value:.3g}" for value in layer.values()) + " |")
    print(", ".join(f"{name} {value:.3g}" for name, value in of_logits.items()))


if __name__ == "__main__":
    main()
