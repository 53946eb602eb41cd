"""Record whole models of the released sizes: transformers' own model, one layer in memory at a time.

    python golden/record.py --full 9b           synthetic weights: 9b-synthetic, ...-two-layers and ...-long
    python golden/record.py --checkpoint DIR    a checkpoint on disk, a released one for instance

Nobody trained the synthetic weights (`refgemma/weights/synthetic.py`): what is recorded of them is PyTorch's arithmetic
at the released sizes, not what a released model answers. A sketch of each tensor is kept: `refgemma/goldens/sketch.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import TINY_TEXT
from record import DTYPES, catch_tensors, in_heads, kept, sha256, write_json, write_tensors
from safetensors import safe_open
from tqdm import tqdm
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

from refgemma.config import Gemma2Config as Ours
from refgemma.goldens.full_size import PIECE, fingerprint
from refgemma.goldens.sketch import sketch
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import EMBED_TOKENS, NORM, tensor_shapes
from refgemma.weights.synthetic import SYNTHETIC_SEED, Synthetic

FOLDER = Path(__file__).parent / "full"
PROMPT, STEPS, TOP = 64, 2, 64
LONG = 4352  # beyond the window of 4096 in one pass; then 64 tokens more, each of which leaves some keys behind
LONG_VOCAB = 4096  # the long case is about attention: the head needs no more
TABLE_ROWS = 16384


@dataclass(frozen=True)
class Subject:
    """What is recorded: a model of which `rows` gives the weights, some rows of a tensor at a time, and its tokens."""

    name: str
    config: Gemma2Config
    rows: Callable[[str, slice], torch.Tensor]
    ids: torch.Tensor
    calls: tuple[int, ...]
    about: dict[str, Any]
    keeps_hidden_state: bool = True


# --- synthetic weights ------------------------------------------------------------------------------------------------


def theirs(ours: Ours) -> Gemma2Config:
    """transformers' configuration of the same numbers."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window")  # fmt: skip
    return Gemma2Config(**{name: getattr(ours, name) for name in names})


def random_ids(ours: Ours, length: int) -> torch.Tensor:
    """<bos> and random tokens."""
    ids = np.random.default_rng(SYNTHETIC_SEED).integers(4, ours.vocab_size, (1, length))
    ids[0, 0] = 2
    return torch.tensor(ids)


def with_a_clear_answer(ids: torch.Tensor, ours: Ours) -> torch.Tensor:
    """The same, with that token at the end of the prompt which, of many, the head answers most clearly with itself.

    So the first place is far enough ahead to be the same in two bfloat16 runs, whose noise is a few per cent here.
    """
    shapes = tensor_shapes(ours)
    table, norm = (Synthetic(name, shapes[name], ours) for name in (EMBED_TOKENS, NORM))
    ids[0, PROMPT - 1] = int(np.argmax(table[:TABLE_ROWS] ** 2 @ (1 + norm[:])))
    return ids


def synthetic(preset: str, kind: str) -> Subject:
    """A model of a released size with synthetic weights: ``full``, ``two-layers``, or ``long``."""
    changes: dict[str, int] = {} if kind == "full" else {"num_hidden_layers": 2}
    changes |= {"vocab_size": LONG_VOCAB} if kind == "long" else {}
    ours = Ours.preset(preset).changed(**changes)
    calls = {"full": (PROMPT, *[1] * STEPS), "two-layers": (PROMPT,), "long": (LONG, 64)}[kind]
    shapes = tensor_shapes(ours)

    def rows(name: str, wanted: slice) -> torch.Tensor:
        return torch.from_numpy(np.asarray(Synthetic(name, shapes[name], ours)[wanted]))

    ids = random_ids(ours, sum(calls) if kind == "long" else PROMPT + STEPS)
    ids = ids if kind == "long" else with_a_clear_answer(ids, ours)[:, : sum(calls)]
    about = {"weights": f"synthetic, seed {SYNTHETIC_SEED}: nobody trained them", "preset": preset, "changes": changes}
    name = f"{preset}-synthetic" + ("" if kind == "full" else f"-{kind}")
    return Subject(name, theirs(ours), rows, ids, calls, about, keeps_hidden_state=kind == "full")


# --- a checkpoint on disk ---------------------------------------------------------------------------------------------


def text_ids(folder: Path, length: int, vocab_size: int) -> torch.Tensor:
    """A text, if the folder holds a tokenizer; else random tokens."""
    file = folder / "tokenizer.model"
    if not file.exists():
        ids = np.random.default_rng(SYNTHETIC_SEED).integers(4, vocab_size, length)
    else:
        import sentencepiece as spm

        ids = np.array(spm.SentencePieceProcessor(model_file=str(file)).encode(TINY_TEXT))[:length]
    ids[0] = 2
    return torch.tensor(ids)[None]


def on_disk(folder: Path) -> Subject:
    """A checkpoint in Hugging Face's layout, read by the safetensors library."""
    config = Gemma2Config.from_pretrained(folder)
    if not config.tie_word_embeddings:
        raise SystemExit(f"record.py: {folder}: has a head of its own; only tied heads are recorded")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    files = {}
    if single.exists():
        with safe_open(single, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), single)
    else:
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}

    def rows(name: str, wanted: slice) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as opened:
            return opened.get_slice(name)[wanted]

    ids = text_ids(folder, PROMPT + STEPS, config.vocab_size)
    about = {"weights": f"the checkpoint {folder.resolve().name}", "checkpoint": fingerprint(open_checkpoint(folder))}
    calls = (ids.shape[1] - STEPS, *[1] * STEPS)
    return Subject(f"checkpoint-{about['checkpoint'][:12]}", config, rows, ids, calls, about)


# --- running ----------------------------------------------------------------------------------------------------------


def empty_model(config: Gemma2Config, dtype: str) -> Gemma2ForCausalLM:
    """transformers' model without weights."""
    with torch.device("meta"):
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=DTYPES[dtype]).eval()
    model.model.rotary_emb = Gemma2RotaryEmbedding(config)
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model


def trained_model(subject: Subject, dtype: str) -> Gemma2ForCausalLM:
    """transformers' model with all weights in memory, for autograd."""
    model = empty_model(subject.config, dtype)
    model.model.embed_tokens.embed_scale = torch.tensor(subject.config.hidden_size**0.5, dtype=DTYPES[dtype])
    names = [name for name in model.state_dict() if name != "lm_head.weight"]  # tied
    weights = {name: subject.rows(name, slice(None)).to(DTYPES[dtype]) for name in names}
    model.load_state_dict(weights, strict=False, assign=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def streamed_model(subject: Subject, dtype: str) -> Gemma2ForCausalLM:
    """transformers' model whose layers have weights only while they compute."""
    config = subject.config
    model = empty_model(config, dtype)

    def tensor(name: str, rows: slice = slice(None)) -> torch.Tensor:
        return subject.rows(name, rows).to(DTYPES[dtype])

    table = torch.empty(config.vocab_size, config.hidden_size, dtype=DTYPES[dtype])
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
        layer.register_forward_hook(drop)
    return model


def drop(module: Any, *_: Any) -> None:
    """Back to a layer without weights."""
    module.to("meta")


def loss_after(model: Gemma2ForCausalLM, norm: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """transformers' loss of the prompt, of what its layers have made of it already."""
    model.model.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=norm)
    try:
        return model(input_ids=ids, labels=ids).loss.reshape(1)
    finally:
        del model.model.forward  # the method of its class again; kept here, it would hold gigabytes of its own model


def pieces(length: int, dtype: str) -> Iterator[int]:
    """A call as PyTorch is given it: whole; but a long one in float64 piece by piece, which needs less memory.

    float64 tells only how large float32's rounding error is, for which the order of the work does not matter.
    """
    size = PIECE if dtype == "float64" else length
    yield from (min(size, length - start) for start in range(0, length, size))


def sketched_call(
    model: Gemma2ForCausalLM, ids: torch.Tensor, cache: DynamicCache, density: str
) -> tuple[dict[str, Any], Any, Any]:
    """One call: its tensors' sketches by name, the normed hidden state, and the logits of the last token."""
    sketches = {}
    with ExitStack() as hooks, catch_tensors(model) as found:

        def finished(module: Any, *_: Any) -> None:
            keep(f"layers.{module.self_attn.layer_idx}.")

        def keep(prefix: str) -> None:
            for name in [name for name in found if name.startswith(prefix)]:
                value = in_heads(name, found.pop(name), model.config.head_dim)
                if kept(name, density):
                    sketches[name] = sketch(value.double().numpy())

        for layer in model.model.layers:
            hooks.callback(layer.register_forward_hook(finished).remove)
        output = model(ids, past_key_values=cache, logits_to_keep=1)
        norm = found["norm"]
        found["logits"] = output.logits
        keep("")
    return sketches, norm, output.logits[0, -1]


def layers_only(model: Gemma2ForCausalLM, ids: torch.Tensor, cache: DynamicCache, dtype: str) -> dict[str, Any]:
    """A long call: sketches of what each layer gives."""
    outs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    with ExitStack() as hooks:
        for number, layer in enumerate(model.model.layers):
            keep = layer.register_forward_hook(lambda _, __, out, number=number: outs[number].append(out))
            hooks.callback(keep.remove)
        done = 0
        for length in pieces(ids.shape[1], dtype):
            model.model(ids[:, done : done + length], past_key_values=cache)
            done += length
    return {f"layers.{n}.out": sketch(torch.cat(out, dim=1).double().numpy()) for n, out in enumerate(outs)}


def run(subject: Subject, dtype: str, every: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Sketches of all calls by tensor name; and what is kept whole: of the first call, unless it is long.

    Without `every`, of a layer only what it gives: less work, for whoever measures how long it takes.
    """
    torch.set_grad_enabled(False)
    model = streamed_model(subject, dtype)
    cache, done = DynamicCache(config=model.config), 0
    sketches: dict[str, Any] = {}
    whole: dict[str, torch.Tensor] = {}
    for call, length in enumerate(tqdm(subject.calls, desc=f"{subject.name} {dtype}", unit="call", disable=None)):
        ids = subject.ids[:, done : done + length]
        if length > PIECE:
            found = layers_only(model, ids, cache, dtype)
        else:
            density = ("full" if length > 1 else "thin") if every else "outs"
            found, norm, logits = sketched_call(model, ids, cache, density)
            if not whole:
                top = torch.topk(logits.float(), TOP)
                whole = {"top_logits": top.values, "top_ids": top.indices}
                whole |= {"last_hidden_state": norm[0].clone()} if subject.keeps_hidden_state else {}
                whole |= {"loss": loss_after(model, norm, ids).float()} if call == 0 else {}
        sketches |= {f"calls.{call}.{name}": numbers for name, numbers in found.items()}
        done += length
    return sketches, whole


def record_subject(subject: Subject) -> None:
    """Record a model in float32, bfloat16 and float64; the last only to know float32's rounding error."""
    tensors: dict[str, torch.Tensor] = {"input_ids": subject.ids}
    names: list[str] = []
    for dtype in ("float32", "bfloat16", "float64"):
        sketches, whole = run(subject, dtype)
        names = list(sketches)
        tensors[f"sketches.{dtype}"] = torch.tensor(np.stack([sketches[name] for name in names]))
        tensors |= {f"{name}.{dtype}": x for name, x in whole.items() if dtype != "float64"}
    write(subject, tensors, names)


def write(subject: Subject, tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    """The recording and its entry in the manifest."""
    FOLDER.mkdir(exist_ok=True)
    file, manifest = FOLDER / f"{subject.name}.safetensors", FOLDER / "manifest.json"
    write_tensors(tensors, file)
    cases: dict[str, Any] = json.loads(manifest.read_text())["cases"] if manifest.exists() else {}
    cases[subject.name] = subject.about | {
        "file": file.name,
        "sha256": sha256(file),
        "layers": subject.config.num_hidden_layers,
        "calls": list(subject.calls),
        "names": names,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attn_implementation": "eager",
        "date": date.today().isoformat(),
    }
    write_json({"format": "refgemma-golden-full/1", "cases": cases}, manifest)
    print(f"{subject.name}: {len(names)} tensors in three precisions, {file.stat().st_size:,} bytes")
