"""Right implementations, which `refgemma check` must not accuse: transformers' own code on random configurations.

    python golden/honest.py --count 200             draw 200 configurations, each in three precisions
    python golden/honest.py --first 100 --count 50  only configurations 100 to 149: a long run in pieces
    python golden/honest.py --only 17               one of them again, with what is said of it
    python golden/honest.py --results FILE          keep each result in a file, and leave out what the file has
    python golden/honest.py --attention flex_attention    not compiled: torch's own reference of it
    python golden/honest.py --attention fast        refgemma's own fast blocks instead, in float32

Each configuration has other axes, caps, window, eps, theta and weights; rows are padded in every third, and every third
is run in pieces that share a cache; every fourth uses a static cache, whose free slots are recorded too. Of each trace
four densities are judged: all tensors, one a step of the block, the logits alone, and a partial trace (some tensors,
some rows of NaN, the logits of the last rows). Anything but EXACT and PASS counts as an accusation, NOISY too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from mistakes import BLOCK
from tqdm import tqdm

from refgemma import fast, ops
from refgemma.cache import Cache
from refgemma.model import begin
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.oracle.engine import Engine
from refgemma.oracle.verdicts import BLIND, GOOD
from refgemma.trace.candidate import load_trace, only
from refgemma.trace.capture import capture_transformers
from refgemma.trace.names import save_trace

DTYPES = ("float32", "bfloat16", "float16")
DENSITIES: dict[str, tuple[str, ...] | None] = {"full": None, "block": BLOCK, "logits": ("logits",)}
INPUTS = ("input_ids", "attention_mask")
RIGHT = (*GOOD, BLIND)


@dataclass(frozen=True)
class Case:
    """One configuration, its weights' seed, and what it is asked."""

    number: int
    config: transformers.Gemma2Config
    input_ids: np.ndarray
    attention_mask: np.ndarray
    calls: tuple[int, ...]
    spread: float  # standard deviation of the weights, times sqrt(axis)
    static: bool  # with a StaticCache


def drawn(number: int) -> Case:
    """Configuration `number`; the same whenever it is asked for."""
    rng = np.random.default_rng([2, number])
    kv_heads, layers = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    heads = kv_heads * int(rng.integers(1, 5))
    config = transformers.Gemma2Config(
        vocab_size=int(rng.integers(20, 300)), hidden_size=heads * int(rng.integers(5, 12)),
        intermediate_size=int(rng.integers(8, 160)), num_hidden_layers=layers, num_key_value_heads=kv_heads,
        num_attention_heads=heads, head_dim=2 * int(rng.integers(2, 20)),
        query_pre_attn_scalar=int(rng.integers(2, 300)), sliding_window=int(rng.integers(2, 20)),
        attn_logit_softcapping=float(np.exp(rng.uniform(0, 4))),
        final_logit_softcapping=float(np.exp(rng.uniform(0, 4))),
        rms_norm_eps=float(10 ** rng.uniform(-8, -4)), rope_theta=float(10 ** rng.uniform(3, 6)),
        max_position_embeddings=512,
    )  # fmt: skip
    batch, seq = int(rng.integers(1, 4)), int(rng.integers(2, 40))
    ids = rng.integers(3, config.vocab_size, (batch, seq))
    ids[:, 0] = config.bos_token_id
    seen = np.ones_like(ids)
    calls: tuple[int, ...] = (seq,)
    if number % 3 == 1:
        for row in range(batch):
            pads = int(rng.integers(0, seq))
            ids[row, :pads], seen[row, :pads] = config.pad_token_id, 0
    elif number % 3 == 2:
        cuts = np.unique(rng.integers(1, seq, 4))
        calls = tuple(int(n) for n in np.diff([0, *cuts, seq]))
    return Case(number, config, ids, seen, calls, float(np.exp(rng.uniform(-1, 1.2))), number % 4 == 3)


def built(case: Case, folder: Path) -> None:
    """The model of a case as a Hugging Face folder, with weights that bfloat16 can hold."""
    torch.manual_seed(case.number)
    model = transformers.Gemma2ForCausalLM(case.config)
    for parameter in model.parameters():
        width = parameter.shape[-1] if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter.data, std=case.spread / width**0.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def torch_run(case: Case, folder: Path, dtype: str, attention: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The trace of transformers."""
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    room = case.input_ids.shape[1] + case.number % 7
    cache = transformers.StaticCache(config=model.config, max_cache_len=room) if case.static else None
    with torch.compiler.set_stance("force_eager"):
        return capture_transformers(model, case.input_ids, case.attention_mask, case.calls, cache=cache)


def partial(case: Case, tensors: dict[str, Any]) -> dict[str, Any]:
    """Some of a trace's tensors: half of them, the logits of the last rows, and some rows of NaN elsewhere."""
    rng = np.random.default_rng([3, case.number])
    kept = {n: x for n, x in tensors.items() if n in INPUTS or n.endswith("logits") or rng.random() < 0.5}
    for name, x in kept.items():
        rows = x.shape[-2] if x.ndim > 2 else 0
        if name.endswith("logits"):
            kept[name] = x[:, -int(rng.integers(1, rows + 1)) :]
        elif name not in INPUTS and rows > 1 and rng.random() < 0.3:
            kept[name] = x + 0  # a copy
            kept[name][..., : int(rng.integers(1, rows)), :] = np.nan
    return kept


def fast_run(case: Case, ours: Pretrained) -> tuple[dict[str, Any], dict[str, str]]:
    """The trace of refgemma's fast blocks, which keep no tensor but their result."""
    tensors: dict[str, Any] = {"input_ids": case.input_ids, "attention_mask": case.attention_mask}
    weights, config, cache = ours.weights, ours.config, None
    for number, (start, end) in enumerate(pairwise(np.cumsum([0, *case.calls]))):
        prefix = f"calls.{number}." if len(case.calls) > 1 else ""
        ids, mask = case.input_ids[:, start:end], case.attention_mask[:, :end]
        blocks = list(fast.outputs(begin(ids, weights, config, attention_mask=mask, cache=cache), weights, config))
        outs, cache = [out for out, _ in blocks], Cache([past for _, past in blocks])
        tensors |= {f"{prefix}layers.{layer}.out": out for layer, out in enumerate(outs)}
        norm = ops.rms_norm(outs[-1], weights.norm, config.rms_norm_eps)
        tensors |= dict(
            zip((f"{prefix}raw_logits", f"{prefix}logits"), fast.fast_head(norm, weights, config), strict=True)
        )
    return tensors, {"dtype": "float32", "calls": json.dumps(case.calls)}


def verdicts(case: Case, folder: Path, dtype: str, attention: str) -> Iterator[tuple[str, str, str]]:
    """Density, tensor and verdict of all that is judged."""
    ours = load(str(folder), dtype)
    tensors, about = fast_run(case, ours) if attention == "fast" else torch_run(case, folder, dtype, attention)
    save_trace(tensors.items(), folder / "port.safetensors", about)
    save_trace(partial(case, tensors).items(), folder / "partial.safetensors", about)
    whole = load_trace(folder / "port.safetensors", ours.config)
    judged = {density: only(whole, names) if names else whole for density, names in DENSITIES.items()}
    for density, candidate in (judged | {"partial": load_trace(folder / "partial.safetensors", ours.config)}).items():
        for instance in Engine(candidate, ours.weights, ours.config).instances:
            s = instance.judged.statistics
            yield density, f"{instance.tensor} rms {s.rms:.3g} worst {s.error_over_bound:.3g}", instance.judged.verdict


Result = list[tuple[str, str, str, str]]  # precision, density, tensor and verdict; the tensor of an accusation alone


def judge(number: int, dtypes: Sequence[str], attention: str) -> Result:
    """All that is said of one configuration."""
    case = drawn(number)
    with tempfile.TemporaryDirectory() as temporary:
        built(case, Path(temporary))
        return [
            (dtype, density, "" if verdict in RIGHT else tensor, verdict)
            for dtype in dtypes
            for density, tensor, verdict in verdicts(case, Path(temporary), dtype, attention)
        ]


def read_results(path: Path | None) -> dict[tuple[int, str], Result]:
    """The results of earlier runs by number and attention."""
    lines = path.read_text("utf-8").splitlines() if path and path.exists() else []
    kept = [json.loads(line) for line in lines]
    return {(line["number"], line["attention"]): line["said"] for line in kept}


def table(results: Mapping[int, Result], dtypes: Sequence[str]) -> str:
    """The table of docs/oracle.md."""
    lines = ["| precision, trace | configurations | tensors judged | EXACT | PASS | BLIND | configurations accused |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for dtype, density in product(dtypes, (*DENSITIES, "partial")):
        said = {n: [v for d, k, _, v in r if (d, k) == (dtype, density)] for n, r in results.items()}
        counts = Counter(v for verdicts in said.values() for v in verdicts)
        accused = sum(any(v not in RIGHT for v in verdicts) for verdicts in said.values())
        detail = " | ".join(str(counts[v]) for v in (*GOOD, BLIND))
        lines.append(f"| {dtype}, {density} | {len(said)} | {counts.total()} | {detail} | {accused} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with configuration N")
    parser.add_argument("--only", type=int, metavar="N", help="configuration N alone")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--results", type=Path, metavar="FILE", help="continue the results of an earlier run")
    args = parser.parse_args()
    dtypes = args.dtype or (("float32",) if args.attention == "fast" else DTYPES)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kept, results = read_results(args.results), {}
    numbers = range(args.first, args.first + args.count) if args.only is None else [args.only]
    for number in tqdm(numbers, disable=None):
        said = kept.get((number, args.attention))
        if said is None:
            said = judge(number, dtypes, args.attention)
            if args.results:
                line = {"number": number, "attention": args.attention, "said": said}
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        results[number] = said
        for dtype, density, tensor, verdict in said:
            if verdict not in RIGHT:
                print(f"{number:4d} {dtype:9s} {density:7s} {verdict:8s} {tensor}", flush=True)
    print(table(results, dtypes))
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {args.attention}")
    return int(any(v not in RIGHT for said in results.values() for _, _, _, v in said))


if __name__ == "__main__":
    sys.exit(main())
