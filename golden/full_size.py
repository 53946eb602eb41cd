"""Record the 9B and the 27B at full size with *synthetic* weights: transformers' own model, one layer in memory.

    python golden/record.py --full 9b        writes golden/full/9b-synthetic.safetensors and ...-two-layers

Nobody trained these weights (`refgemma/weights/synthetic.py`): what is recorded is PyTorch's arithmetic at the released
sizes, not what a released model answers. Of each tensor a sketch is kept (`refgemma/oracle/sketch.py`).
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from record import DTYPES, caught, in_heads, kept, sha256, write_json, write_tensors
from tqdm import tqdm
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

from refgemma.config import Gemma2Config as Ours
from refgemma.oracle.sketch import sketch
from refgemma.weights.parameters import EMBED_TOKENS, NORM, tensor_shapes
from refgemma.weights.synthetic import SEED, Synthetic

FOLDER = Path(__file__).parent / "full"
PROMPT, STEPS, TOP = 64, 2, 64
TABLE_ROWS = 16384


def prompt_ids(ours: Ours) -> torch.Tensor:
    """<bos> and random tokens; the decoding steps read the ones after the prompt.

    The prompt ends in that of many tokens which the head answers most clearly with itself: so the first place is far
    enough ahead to be the same in two bfloat16 runs, whose noise is a few per cent here.
    """
    shapes = tensor_shapes(ours)
    ids = np.random.default_rng(SEED).integers(4, ours.vocab_size, (1, PROMPT + STEPS))
    table, norm = (Synthetic(name, shapes[name], ours) for name in (EMBED_TOKENS, NORM))
    ids[0, 0], ids[0, PROMPT - 1] = 2, int(np.argmax(table[:TABLE_ROWS] ** 2 @ (1 + norm[:])))
    return torch.tensor(ids)


def streamed_model(ours: Ours, dtype: str) -> Gemma2ForCausalLM:
    """transformers' model whose layers have weights only while they compute."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window")  # fmt: skip
    config = Gemma2Config(**{name: getattr(ours, name) for name in names})
    with torch.device("meta"):
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=DTYPES[dtype]).eval()
    model.model.rotary_emb = Gemma2RotaryEmbedding(config)
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    shapes = tensor_shapes(ours)

    def tensor(name: str, rows: slice = slice(None)) -> torch.Tensor:
        return torch.from_numpy(np.asarray(Synthetic(name, shapes[name], ours)[rows])).to(DTYPES[dtype])

    table = torch.empty(shapes[EMBED_TOKENS], dtype=DTYPES[dtype])
    for start in range(0, len(table), TABLE_ROWS):
        table[start : start + TABLE_ROWS] = tensor(EMBED_TOKENS, slice(start, start + TABLE_ROWS))
    model.model.embed_tokens.weight = torch.nn.Parameter(table, requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.norm.weight = torch.nn.Parameter(tensor(NORM), requires_grad=False)
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."

        def load(module: Any, _: Any, prefix: str = prefix) -> None:
            module.load_state_dict({n: tensor(prefix + n) for n in module.state_dict()}, assign=True)

        layer.register_forward_pre_hook(load)
    return model


def drop(module: Any, *_: Any) -> None:
    """Back to a layer without weights."""
    module.to("meta")


def run(ours: Ours, dtype: str, calls: tuple[int, ...], ids: torch.Tensor) -> tuple[dict[str, Any], Any, Any]:
    """Sketches of all calls by tensor name; the last hidden state and the logits of the prompt's last token."""
    torch.set_grad_enabled(False)
    model = streamed_model(ours, dtype)
    cache, done, sketches = DynamicCache(config=model.config), 0, {}
    with tqdm(total=len(calls) * ours.num_hidden_layers, desc=dtype, disable=None) as bar:
        for call, length in enumerate(calls):
            density = "full" if call == 0 else "thin"
            with caught(model) as found:

                def keep(prefix: str, call: int = call, density: str = density, found: Any = found) -> None:
                    for name in [name for name in found if name.startswith(prefix)]:
                        value = in_heads(name, found.pop(name), ours.head_dim)
                        if kept(name, density):
                            sketches[f"calls.{call}.{name}"] = sketch(value.double().numpy())

                def finished(module: Any, *_: Any, keep: Any = keep) -> None:
                    keep(f"layers.{module.self_attn.layer_idx}.")
                    drop(module)
                    bar.update()

                hooks = [layer.register_forward_hook(finished) for layer in model.model.layers]
                inputs = ids[:, done : done + length]
                output = model(inputs, past_key_values=cache, logits_to_keep=1)
                if call == 0:
                    last, logits = found["norm"][0].clone(), output.logits[0, -1].clone()
                found["logits"] = output.logits
                keep("")
                for hook in hooks:
                    hook.remove()
            done += length
    return sketches, last, logits


def record_full(preset: str, layers: int | None) -> None:
    """Record one model in float32, bfloat16 and float64; the last only to know float32's rounding error."""
    ours = Ours.preset(preset)
    ours = ours.changed(num_hidden_layers=layers) if layers else ours
    ids, calls = prompt_ids(ours), (PROMPT,) if layers else (PROMPT, *[1] * STEPS)
    tensors: dict[str, torch.Tensor] = {"input_ids": ids[:, : sum(calls)]}
    names: list[str] = []
    for dtype in ("float32", "bfloat16", "float64"):
        sketches, last, logits = run(ours, dtype, calls, ids)
        names = list(sketches)
        tensors[f"sketches.{dtype}"] = torch.tensor(np.stack([sketches[name] for name in names]))
        if dtype != "float64":
            top = torch.topk(logits.float(), TOP)
            tensors |= {f"top_logits.{dtype}": top.values, f"top_ids.{dtype}": top.indices}
            tensors |= {} if layers else {f"last_hidden_state.{dtype}": last}
    FOLDER.mkdir(exist_ok=True)
    name = f"{preset}-synthetic" + ("-two-layers" if layers else "")
    write_tensors(tensors, FOLDER / f"{name}.safetensors")
    manifest = FOLDER / "manifest.json"
    cases: dict[str, Any] = json.loads(manifest.read_text())["cases"] if manifest.exists() else {}
    cases[name] = {
        "file": f"{name}.safetensors",
        "sha256": sha256(FOLDER / f"{name}.safetensors"),
        "weights": f"synthetic, seed {SEED}: nobody trained them",
        "preset": preset,
        "layers": ours.num_hidden_layers,
        "calls": list(calls),
        "names": names,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attn_implementation": "eager",
        "date": date.today().isoformat(),
    }
    write_json({"format": "refgemma-golden-full/1", "cases": cases}, manifest)
    print(
        f"{name}: {len(names)} tensors in three precisions, {(FOLDER / f'{name}.safetensors').stat().st_size:,} bytes"
    )
