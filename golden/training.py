"""Record ten training steps: transformers' Gemma 2 (eager) under torch's AdamW, and the weights after each step.

    python golden/training.py           write golden/training/adamw.safetensors
    python golden/training.py --check   record again and compare with that file

A small random model, twelve rows of different lengths padded on the right. A step takes four rows in two micro-batches;
each micro-batch's loss is divided by the tokens of both (`num_items_in_batch`). Gradients are clipped, matrices decay,
norms do not, and the learning rate follows a cosine after a warm-up: what transformers' Trainer does, with
``optim="adamw_torch"``. In float64 transformers still computes norms, softmax, loss and cosines in float32;
`all_in_float64` widens these. Nothing of refgemma is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, get_cosine_schedule_with_warmup
from transformers.models.gemma2 import modeling_gemma2

FILE = Path(__file__).parent / "training" / "adamw.safetensors"
SHAPE: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 9, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 4, "query_pre_attn_scalar": 5, "sliding_window": 3,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "max_position_embeddings": 16,
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "max_steps": 10, "learning_rate": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
    "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 0.5,
}  # fmt: skip
LENGTHS = (9, 4, 7, 2, 8, 8, 3, 5, 6, 9, 2, 4)
MICRO_BATCHES, MICRO_ROWS = 2, 2
NOT_DECAYED = ("norm", "bias")


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Compute in float64 where transformers computes in float32."""
    tensor, functional = torch.Tensor, modeling_gemma2.nn.functional
    kept = tensor.float, tensor.cos, tensor.sin, functional.softmax

    def softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        return torch.softmax(x, dim)

    tensor.float = lambda x: x if x.dtype == torch.float64 else kept[0](x)
    tensor.cos, tensor.sin = (lambda x: kept[1](x.double())), (lambda x: kept[2](x.double()))
    functional.softmax = softmax
    try:
        yield
    finally:
        tensor.float, tensor.cos, tensor.sin, functional.softmax = kept


def draw() -> tuple[dict[str, np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Return weights that are the same numbers in both precisions, and the rows."""
    rng = np.random.default_rng(25)
    model = Gemma2ForCausalLM._from_config(Gemma2Config(**SHAPE), attn_implementation="eager")
    weights = {
        name: torch.tensor(rng.standard_normal(tuple(p.shape)) * (0.3 if p.dim() == 1 else 0.4)).bfloat16().double()
        for name, p in model.named_parameters()
    }
    rows = [np.array([2, *rng.integers(3, SHAPE["vocab_size"], length - 1)]) for length in LENGTHS]
    return {name: weight.numpy() for name, weight in weights.items()}, rows


def record(
    dtype: torch.dtype, weights: dict[str, np.ndarray[Any, Any]], rows: list[np.ndarray[Any, Any]]
) -> Iterator[tuple[str, Any]]:
    """Train, and yield the loss, the norm of the gradient, the rate and all weights after each step."""
    config = Gemma2Config(**SHAPE)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=dtype)
    model.load_state_dict({name: torch.tensor(x, dtype=dtype) for name, x in weights.items()}, strict=False)
    model.tie_weights()
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys()
    groups = [
        {"params": [p for name, p in named.items() if not any(part in name for part in NOT_DECAYED)],
         "weight_decay": ARGUMENTS["weight_decay"]},
        {"params": [p for name, p in named.items() if any(part in name for part in NOT_DECAYED)], "weight_decay": 0.0},
    ]  # fmt: skip
    betas = (ARGUMENTS["adam_beta1"], ARGUMENTS["adam_beta2"])
    optimizer = torch.optim.AdamW(groups, ARGUMENTS["learning_rate"], betas, ARGUMENTS["adam_epsilon"])
    scheduler = get_cosine_schedule_with_warmup(optimizer, ARGUMENTS["warmup_steps"], ARGUMENTS["max_steps"])
    model.train()
    for step in range(ARGUMENTS["max_steps"]):
        size = MICRO_BATCHES * MICRO_ROWS
        batch = [rows[n % len(rows)] for n in range(step * size, (step + 1) * size)]
        items = sum(len(row) - 1 for row in batch)
        losses = []
        for first in range(0, size, MICRO_ROWS):
            ids, mask = pad(batch[first : first + MICRO_ROWS])
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=items, use_cache=False
            ).loss
            loss.backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ARGUMENTS["max_grad_norm"])
        yield f"{step}.loss", np.float64(sum(losses))
        yield f"{step}.grad_norm", np.float64(norm.item())
        yield f"{step}.learning_rate", np.float64(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for name, p in named.items():
            yield f"{step}.{name}", p.detach().numpy().copy()


def pad(rows: list[np.ndarray[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows padded on the right, and the mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    return ids, mask


def record_all() -> dict[str, Any]:
    """Return all tensors of the file."""
    torch.set_num_threads(1)
    weights, rows = draw()
    tensors: dict[str, Any] = {f"start.{name}": x.astype(np.float32) for name, x in weights.items()}
    tensors |= {f"row.{n}": row for n, row in enumerate(rows)}
    tensors |= {f"float32.{name}": np.asarray(x) for name, x in record(torch.float32, weights, rows)}
    with all_in_float64():
        tensors |= {f"float64.{name}": np.asarray(x) for name, x in record(torch.float64, weights, rows)}
    return tensors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tensors = record_all()
    if args.check:
        with safe_open(FILE, framework="np") as stored:
            kept = {name: stored.get_tensor(name) for name in stored.keys()}
        # Another processor may round a product otherwise: ten steps carry that to some units of the last place.
        far = [
            n for n, x in tensors.items() if not np.allclose(x, kept[n], rtol=1e-4 if "32" in n else 1e-9, atol=1e-6)
        ]
        print("\n".join(f"{name} differs" for name in far) or f"{len(tensors)} tensors are the same")
        return bool(far) or kept.keys() != tensors.keys()
    about = {"config": SHAPE, "arguments": ARGUMENTS, "rows_per_step": MICRO_BATCHES * MICRO_ROWS,
             "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
    FILE.parent.mkdir(exist_ok=True)
    save_file(tensors, FILE, metadata={"about": json.dumps(about)})
    print(f"{FILE}: {FILE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
