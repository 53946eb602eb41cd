"""Record the goldens: run transformers' own Gemma 2 (eager) and write down every tensor it computes.

    python golden/record.py [CASE ...]     record all cases, or those named
    python golden/record.py --check        record again elsewhere and compare with what is in golden/
    python golden/record.py --full 9b      record a model of that size with synthetic weights, see full_size.py
    python golden/record.py --checkpoint DIR   record a checkpoint on disk, for instance a released one
    python golden/record.py --gradients [CASE ...]   record gradients by autograd, see gradients.py; --check compares

Nothing that refgemma computes is ever written here. Tensors inside transformers' functions are caught where they are
made: module outputs by hooks, the rotated queries and keys by wrapping `apply_rotary_pos_emb`, scores and capped scores
by watching the torch calls inside `eager_attention_forward`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import CASES, MODELS, NEW_TOKENS, PROMPTS, TINY_TEXT, Case
from operations import OP_CASES
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2 import modeling_gemma2

from refgemma.goldens.distance import END_TO_END, rounding_noise, run_distance
from refgemma.oracle.judge import ratio
from refgemma.oracle.tolerance import ulp

HERE = Path(__file__).parent
TINY = HERE.parent / "refgemma" / "checkpoints" / "tiny"
SEED = 20240627  # the day Gemma 2 was released
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Tensors = dict[str, torch.Tensor]


# --- models ---------------------------------------------------------------------------------------------------------


def random_model(name: str) -> Gemma2ForCausalLM:
    """A small model with seeded weights that are bf16 numbers, so that one set serves every precision."""
    shape, spread, _ = MODELS[name]
    config = Gemma2Config(**shape)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(SEED + list(MODELS).index(name))
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data = values.bfloat16().float()
    return model.eval()


def load_model(name: str, root: Path, dtype: str = "float32") -> Gemma2ForCausalLM:
    """The tiny model, or one of `MODELS` as it is stored in ``golden/models``.

    Loaded in its precision, not cast afterwards: `model.to(torch.bfloat16)` would round the inverse frequencies of the
    rotary embedding too, which `from_pretrained` keeps in float32.
    """
    folder = TINY if name == "tiny" else root / "models" / name
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="eager").eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


def write_model(name: str, root: Path) -> None:
    """Store one of `MODELS` as a Hugging Face folder with bf16 weights."""
    folder = root / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(name)
    tensors = {n: p.bfloat16().contiguous() for n, p in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the embedding once more
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    full = model.config.to_dict()
    kept = [*MODELS["bends"][0], "layer_types", "rope_parameters", "rms_norm_eps", "hidden_activation", "model_type"]
    kept += ["max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"]
    kept += ["attention_bias"] if full["attention_bias"] else []
    write_json({key: full[key] for key in kept}, folder / "config.json")


# --- catching every tensor ------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Note the result of every torch function called while active."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.results.append((func.__name__, result))
        return result


@contextmanager
def catch_tensors(model: Gemma2ForCausalLM) -> Iterator[Tensors]:
    """Every named tensor of the forward calls made inside, under the names of refgemma's records."""
    found: Tensors = {}
    hooks = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(name, output)

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(name, inputs[0])

    def hook(module: torch.nn.Module, function: Callable[..., None]) -> None:
        hooks.append(module.register_forward_hook(function))

    inner = model.model
    hook(inner.embed_tokens, keep("embedded"))
    hook(inner.rotary_emb, lambda m, i, o: found.update(cos=o[0].unsqueeze(1), sin=o[1].unsqueeze(1)))
    hook(inner.norm, keep("norm"))
    hook(model.lm_head, keep("raw_logits"))
    for index, layer in enumerate(inner.layers):
        prefix = f"layers.{index}."
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            hook(getattr(layer, norm), keep(prefix + norm))
        hook(layer.pre_feedforward_layernorm, keep_input(prefix + "middle"))
        hook(layer.self_attn.v_proj, keep(prefix + "attention.v"))
        hook(layer.self_attn.o_proj, keep_input(prefix + "attention.mixed"))
        hook(layer.self_attn.o_proj, keep(prefix + "attention.out"))
        hook(layer.mlp.gate_proj, keep(prefix + "feed_forward.gate"))
        hook(layer.mlp.up_proj, keep(prefix + "feed_forward.up"))
        hook(layer.mlp.act_fn, keep(prefix + "feed_forward.gelu"))
        hook(layer.mlp.down_proj, keep_input(prefix + "feed_forward.product"))
        hook(layer.mlp.down_proj, keep(prefix + "feed_forward.out"))
        hook(layer, keep(prefix + "out"))

    rotate, attend = modeling_gemma2.apply_rotary_pos_emb, modeling_gemma2.eager_attention_forward
    rotations = []  # the layer's number is known only to the attention that follows

    def noted_rotate(q: torch.Tensor, k: torch.Tensor, *rest: Any, **named: Any) -> Any:
        q_rot, k_rot = rotate(q, k, *rest, **named)
        rotations.append({"q": q, "k": k, "q_rot": q_rot, "k_rot": k_rot})
        return q_rot, k_rot

    def noted_attend(module: Any, *rest: Any, **named: Any) -> Any:
        with Watch() as watch:
            output, probs = attend(module, *rest, **named)
        products = [result for function, result in watch.results if function == "mul"]
        prefix = f"layers.{module.layer_idx}.attention."
        found.update({prefix + name: value for name, value in rotations.pop().items()})
        found[prefix + "scores"] = products[0]  # matmul * scaling
        found[prefix + "capped"] = products[-1]  # tanh * softcap; the scores themselves where there is no cap
        found[prefix + "probs"] = probs
        return output, probs

    modeling_gemma2.apply_rotary_pos_emb, modeling_gemma2.eager_attention_forward = noted_rotate, noted_attend
    try:
        yield found
    finally:
        modeling_gemma2.apply_rotary_pos_emb, modeling_gemma2.eager_attention_forward = rotate, attend
        for handle in hooks:
            handle.remove()


def in_heads(name: str, tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """v is caught before transformers splits it into heads."""
    if name.endswith("attention.v"):
        return tensor.view(*tensor.shape[:2], -1, head_dim).transpose(1, 2)
    return tensor


def kept(name: str, density: str) -> bool:
    """Whether a tensor belongs to a recording of this density (see `cases.py`)."""
    *place, field = name.split(".")  # "layers.3.attention.probs" -> ["layers", "3", "attention"], "probs"
    whole = not place
    match density:
        case "full":
            return True
        case "ends":
            return whole or place[1] in ("0", "1") or field == "out"
        case "thin":
            inside = field in ("q_rot", "k_rot", "probs", "out") and "feed_forward" not in place
            return inside or name in ("cos", "sin", "embedded", "norm", "logits")
        case "outs":
            return whole or (place[2:] == [] and field == "out")
        case "logits":
            return name == "logits"
    raise ValueError(f"unknown density {density!r}")


# --- one case -------------------------------------------------------------------------------------------------------


def tiny_tokens() -> list[int]:
    import sentencepiece as spm

    return [2, *spm.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model")).encode(TINY_TEXT)]


def inputs_of(case: Case, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a case, over all its calls."""
    total = sum(case.calls)
    if case.model == "tiny":
        text = tiny_tokens()
        assert len(text) >= total + case.batch - 1, f"{case.name}: TINY_TEXT has only {len(text)} tokens"
        rows = [[2, *text[1 + row : total + row]] for row in range(case.batch)]
        ids = torch.tensor(rows)
    else:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(4, vocab_size, (case.batch, total), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(case.batch):
        padding = 2 * row
        if case.padding == "left" and padding:
            mask[row, :padding] = 0
        if case.padding == "right" and padding:
            mask[row, -padding:] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def record(case: Case, root: Path) -> Tensors:
    """Run one case; the tensors of call n are named ``calls.n.NAME``."""
    model = load_model(case.model, root, case.dtype)
    ids, mask = inputs_of(case, model.config.vocab_size)
    tensors: Tensors = {"input_ids": ids, "attention_mask": mask}
    cache = DynamicCache(config=model.config) if len(case.calls) > 1 else None
    done = 0
    for number, length in enumerate(case.calls):
        with catch_tensors(model) as found:
            output = model(
                input_ids=ids[:, done : done + length],
                attention_mask=mask[:, : done + length] if case.padding != "none" else None,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        found["logits"] = output.logits
        for name, value in found.items():
            if kept(name, case.density):
                stored = in_heads(name, value, model.config.head_dim)
                if name in ("cos", "sin"):  # transformers makes one row for the whole batch
                    stored = stored.expand(case.batch, -1, -1, -1)
                tensors[f"calls.{number}.{name}"] = stored.detach().clone().contiguous()
        done += length
    if case.dtype == "float32" and len(case.calls) == 1:
        labels = ids.masked_fill(mask == 0, -100)
        tensors["loss"] = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.reshape(1)
    return tensors


@torch.no_grad()
def record_greedy(root: Path) -> Tensors:
    """The prompts continued greedily by `generate`."""
    import sentencepiece as spm

    tokenizer = spm.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    model = load_model("tiny", root)
    tensors: Tensors = {}
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[2, *tokenizer.encode(prompt)]])
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        tensors[f"prompt.{number}"] = ids[0]
        tensors[f"continued.{number}"] = made[0, ids.shape[1] :].contiguous()
    return tensors


# --- files ----------------------------------------------------------------------------------------------------------


def write_json(content: object, path: Path) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_tensors(tensors: Tensors, path: Path) -> None:
    partial = path.with_suffix(".part")
    save_file(tensors, partial)
    partial.chmod(0o644)
    os.replace(partial, path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def warm_up() -> None:
    """MKL's first vectorised call can race (pytorch#188792): make it on something that nobody records."""
    one = torch.ones(1)
    for function in (torch.cos, torch.sin, torch.tanh, torch.exp, torch.sqrt, torch.rsqrt):
        function(one)


def all_recordings(root: Path) -> dict[str, tuple[dict[str, Any], Callable[[], Tensors]]]:
    """Name of each file -> what the manifest says of it, and how it is made."""
    made: dict[str, tuple[dict[str, Any], Callable[[], Tensors]]] = {}
    for case in CASES:
        fields = ("model", "dtype", "calls", "padding", "density")
        about = {"kind": "forward", "why": case.why or MODELS.get(case.model, ("", 0, ""))[2]}
        about |= {field: getattr(case, field) for field in fields}
        made[case.name] = (about, partial(record, case, root))
    for name, (about, function) in OP_CASES.items():
        made[name] = ({"kind": "operation", **about}, function)
    greedy = {"kind": "greedy", "model": "tiny", "dtype": "float32", "prompts": list(PROMPTS), "new_tokens": NEW_TOKENS}
    made["tiny-greedy-f32"] = (greedy, partial(record_greedy, root))
    return made


def record_all(names: list[str], root: Path) -> None:
    """Record into `root`; with names given, everything else stays as it is."""
    root.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        write_model(model, root)
    manifest_file = root / "manifest.json"
    old = json.loads(manifest_file.read_text())["cases"] if names and manifest_file.exists() else {}
    recordings = all_recordings(root)
    if unknown := set(names) - set(recordings):
        sys.exit(f"record.py: unknown case {', '.join(sorted(unknown))}; there are {', '.join(recordings)}")
    entries = {}
    for name, (about, make) in tqdm(recordings.items(), disable=not sys.stderr.isatty()):
        if names and name not in names:
            entries[name] = old[name]
            continue
        path = root / f"{name}.safetensors"
        write_tensors(make(), path)
        entries[name] = about | {
            "file": path.name,
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attn_implementation": "eager",
            "seed": SEED,
            "date": date.today().isoformat(),
        }
    folders = {name: root / "models" / name for name in MODELS} | {"tiny": TINY}
    files = ("config.json", "model.safetensors")
    models = {name: {file: sha256(folder / file) for file in files} for name, folder in folders.items()}
    write_json({"format": "refgemma-golden/1", "models": models, "cases": entries}, manifest_file)
    stale = {path.stem for path in root.glob("*.safetensors")} - set(entries)
    for name in stale:
        (root / f"{name}.safetensors").unlink()
    total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    print(f"recorded {len(names) or len(recordings)} cases, {total / 1e6:.1f} MB in {root.name}/")


def disagreement(dtype: str, again: np.ndarray, old: np.ndarray, twin: np.ndarray | None) -> float:
    """How far a tensor recorded again is from the stored one, in units of what another processor's rounding explains.

    Tokens and masks must be the same. A float32 tensor may move by 5e-6 of its largest element, as refgemma's logits
    may; half precision as `refgemma.goldens.distance` has it: a whole run by the noise of its own rounding, one
    operation alone by an ulp, where its float32 result falls on the other side of a rounding boundary.
    """
    if old.dtype.kind in "iub":
        return 0.0 if np.array_equal(again, old) else np.inf
    again, old = again.astype(np.float64), old.astype(np.float64)
    if np.array_equal(again, old, equal_nan=True):
        return 0.0
    if dtype != "float32" and twin is not None:
        return run_distance(again, old, rounding_noise(again, old, twin, dtype), dtype)
    allowed = END_TO_END * np.abs(old).max(initial=0) + ulp(old, dtype)
    return ratio(np.abs(again - old), allowed)


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a recording; half precision as float32, which holds it exactly."""
    return {
        name: (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
        for name, x in load_file(path).items()
    }


def by_noise(case: Case, root: Path, again: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> tuple[float, str]:
    """The same for a whole float32 run, in units of its own rounding noise: for runs that 5e-6 is too strict for.

    Scores at the cap, which random weights have, make a softmax of differences of large numbers. What rounding does
    there is seen in the same run in float64, of which transformers leaves norms, rotary tables and softmax in float32:
    the noise of a tensor is the largest error among those of its name in all layers and calls. Both runs that tell it
    are of today, so that a transformers that computes something else differs from the stored one as before.
    """
    exact = {name: x.double().numpy() for name, x in record(replace(case, dtype="float64"), root).items()}
    noise: dict[str, float] = {}
    for name in exact:
        kind = name.split(".")[-1]
        noise[kind] = max(noise.get(kind, 0.0), float(np.abs(again[name] - exact[name]).max()))
    return max((run_distance(again[name], old[name], noise[name.split(".")[-1]]), name) for name in exact)


def check() -> int:
    """Record everything again into a temporary folder and compare. Another processor may give other last bits."""
    manifest = json.loads((HERE / "manifest.json").read_text())["cases"]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        record_all([], root)
        for name, about in manifest.items():
            dtype, old, again = about["dtype"], read(HERE / about["file"]), read(root / about["file"])
            has_twin = about["kind"] == "forward" and dtype != "float32"
            twin = read(HERE / f"{name.rpartition('-')[0]}-f32.safetensors") if has_twin else {}
            if set(old) != set(again) or any(old[t].shape != again[t].shape for t in old):
                print(f"{name:32s} DIFFERS: other tensors or other shapes")
                failures += 1
                continue
            worst, tensor = max((disagreement(dtype, again[t], old[t], twin.get(t)), t) for t in old)
            if 1 < worst < np.inf and about["kind"] == "forward" and dtype == "float32":
                case = next(case for case in CASES if case.name == name)
                worst, tensor = by_noise(case, root, again, old)
            verdict = "agrees" if worst <= 1 else "DIFFERS"
            print(f"{name:32s} {len(old):4d} tensors, worst {worst:8.4f} of its bound ({tensor}): {verdict}")
            failures += worst > 1
        if new := set(all_recordings(root)) - set(manifest):
            print(f"not recorded yet: {', '.join(sorted(new))}")
            failures += len(new)
    print(f"{len(manifest) - failures} passed, {failures} failed")
    return 1 if failures else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--check", action="store_true", help="record again elsewhere and compare")
    parser.add_argument("--full", choices=("9b", "27b"), help="record a model of that size with synthetic weights")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="record a checkpoint on disk, of any size")
    parser.add_argument("--gradients", action="store_true", help="record gradients, see gradients.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warm_up()
    if args.gradients:
        import gradients

        if args.check:
            sys.exit(gradients.check(args.cases))
        gradients.record_all(args.cases)
        return
    if args.check:
        sys.exit(check())
    if args.full or args.checkpoint:
        import full_size

        torch.set_num_threads(os.cpu_count() or 1)
        if args.checkpoint:
            full_size.record_subject(full_size.on_disk(args.checkpoint))
        for kind in ("two-layers", "long", "full") if args.full else ():
            full_size.record_subject(full_size.synthetic(args.full, kind))
        return
    record_all(args.cases, HERE)


if __name__ == "__main__":
    main()
