"""Record gradients: PyTorch autograd through transformers' own Gemma 2 (eager), back to every tensor and every weight.

    python golden/record.py --gradients [CASE ...]           record all cases of this file, or those named
    python golden/record.py --gradients --check [CASE ...]   record again elsewhere, compare with golden/gradients

Nothing that refgemma computes is ever written here, except the form: a sketch of each gradient is kept, see
`refgemma/goldens/sketch.py`. Every case is recorded in float64, float32 and bfloat16. transformers computes norms,
softmax and loss in float32 in any precision; the float64 recording is made without that (`Float64`), so that it shows
the rounding errors of the other two.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from full_size import Subject, synthetic, trained_model
from record import (
    DTYPES,
    SEED,
    TINY,
    catch_tensors,
    in_heads,
    read,
    sha256,
    tiny_tokens,
    write_json,
    write_tensors,
)
from torch.overrides import TorchFunctionMode
from transformers import Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2ForTokenClassification
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from refgemma.goldens.sketch import sketch

FOLDER = Path(__file__).parent / "gradients"
CLASSES = {
    "language model": Gemma2ForCausalLM,
    "sequence": Gemma2ForSequenceClassification,
    "token": Gemma2ForTokenClassification,
}
LABELS = 3  # of the classifiers; a regression has one
NAMES = ("gelu_pytorch_tanh", "gelu", "gelu_new", "quick_gelu", "silu", "sigmoid", "relu", "relu2", "relu6",
         "leaky_relu", "tanh", "linear")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One loss and its gradients; a model is one of `cases.MODELS`, tiny, or synthetic."""

    model: str
    batch: int
    tokens: int
    padding: str = "none"  # "left" or "right": row r has 2 r padding tokens
    packed: bool = False  # two texts in each row: positions begin again at 0
    head: str = "language model"
    num_items: int | None = None  # divides the sum of the losses
    problem_type: str | None = None  # of a sequence classifier
    activations: bool = True  # whether the gradients of all tensors are kept, or those of the blocks' results


CASES = {
    "bends-right-padded": Case("bends", 3, 9, padding="right"),
    "bends-left-padded": Case("bends", 3, 9, padding="left", activations=False),
    "bends-packed": Case("bends", 2, 11, packed=True, activations=False),
    "bends-num-items": Case("bends", 1, 8, num_items=100, activations=False),
    "bends-sequence": Case("bends", 3, 8, padding="right", head="sequence", activations=False),
    "bends-regression": Case("bends", 2, 7, head="sequence", problem_type="regression", activations=False),
    "bends-multi-label": Case(
        "bends", 2, 7, head="sequence", problem_type="multi_label_classification", activations=False
    ),
    "bends-token": Case("bends", 2, 8, padding="left", head="token", activations=False),
    "reaches": Case("reaches", 2, 7),
    "one-key-head": Case("one-key-head", 2, 7),
    "no-caps": Case("no-caps", 2, 5),
    "global-first": Case("global-first", 1, 12),
    "untied-with-biases": Case("untied-with-biases", 2, 7),
    "tiny": Case("tiny", 2, 70, padding="right"),  # 70 tokens are more than its window of 64
    "9b-synthetic-two-layers": Case("9b-synthetic", 1, 64),  # of full width; nobody trained the weights
}
FULL_WIDTH = ("9b-synthetic-two-layers",)


class Float64(TorchFunctionMode):
    """Keep float64 where transformers asks for float32; the rotary angles stay float32, which is part of the model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "float" and args[0].dtype == torch.float64:
            return args[0]
        if name == "softmax" and args[0].dtype == torch.float64:
            kwargs["dtype"] = torch.float64
        if name in ("cos", "sin"):
            return func(args[0].double())
        return func(*args, **kwargs)


def subject_of(case: Case) -> Subject | None:
    """The synthetic model of a case: two layers of a released size and a short vocabulary, to save memory."""
    preset, synthetic_weights, _ = case.model.partition("-synthetic")
    return synthetic(preset, "long") if synthetic_weights else None


def model_of(case: Case, dtype: str) -> Any:
    """The stored model with the head of the case; a classifier's head has seeded weights that are bf16 numbers."""
    if subject := subject_of(case):
        return trained_model(subject, dtype)
    folder = TINY if case.model == "tiny" else Path(__file__).parent / "models" / case.model
    labels = 1 if case.problem_type == "regression" else LABELS
    kwargs = {} if case.head == "language model" else {"num_labels": labels, "problem_type": case.problem_type}
    transformers.logging.set_verbosity_error()
    model = CLASSES[case.head].from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="eager", **kwargs)
    if case.head != "language model":
        generator = torch.Generator().manual_seed(SEED)
        for parameter in model.score.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16().to(DTYPES[dtype])
    return model.eval()


def inputs_of(case: Case, vocab_size: int) -> dict[str, torch.Tensor]:
    """The arguments of the model: tokens, some more than once; mask or positions; labels, not all of which count."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.batch, case.tokens)
    if case.model == "tiny":
        text = tiny_tokens()
        ids = torch.tensor([[2, *text[1 + row : case.tokens + row]] for row in range(case.batch)])
    else:
        ids = torch.randint(4, vocab_size // 2, shape, generator=generator)
    given = {"input_ids": ids}
    counts = torch.rand(shape, generator=generator) < 0.8
    if case.padding != "none":
        mask = torch.ones_like(ids)
        for row in range(1, case.batch):
            mask[row, slice(2 * row) if case.padding == "left" else slice(-2 * row, None)] = 0
        given |= {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
        counts &= mask.bool()
    if case.packed:
        half = case.tokens // 2
        given["position_ids"] = torch.cat([torch.arange(half), torch.arange(case.tokens - half)]).repeat(case.batch, 1)
    match case.head:
        case "sequence" if case.problem_type == "regression":
            given["labels"] = torch.randint(-8, 9, (case.batch,), generator=generator) / 8
        case "sequence" if case.problem_type:
            given["labels"] = torch.randint(0, 9, (case.batch, LABELS), generator=generator) / 8  # exact in all formats
        case "sequence":
            given["labels"] = torch.randint(0, LABELS, (case.batch,), generator=generator)
        case "token":
            given["labels"] = torch.randint(0, LABELS, shape, generator=generator).masked_fill(~counts, -100)
        case _:
            given["labels"] = given["input_ids"].masked_fill(~counts, -100)
    return given


def gradients(case: Case, dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs of a case with its loss, and each gradient: ``grads.`` and the name of the tensor or weight."""
    model = model_of(case, dtype)
    given = inputs_of(case, model.config.vocab_size)
    if given["labels"].is_floating_point():  # torch takes the multi-label loss in the precision of the labels
        given["labels"] = given["labels"].to(DTYPES[dtype])
    rest = {} if case.num_items is None else {"num_items_in_batch": case.num_items}
    is_lm = case.head == "language model"
    hooked = SimpleNamespace(model=model.model, lm_head=model.lm_head if is_lm else model.score)
    with Float64() if dtype == "float64" else nullcontext():
        with catch_tensors(hooked) as found:
            output = model(**given, **rest, use_cache=False)
        if is_lm:
            found["logits"] = output.logits
        else:
            found["logits"] = found.pop("raw_logits")
        tensors = {name: x for name, x in found.items() if x.requires_grad}
        for x in tensors.values():
            x.retain_grad()
        output.loss.backward()
    named = {n: in_heads(n, x.grad, model.config.head_dim) for n, x in tensors.items() if kept(n, case)}
    named |= {n: p.grad for n, p in model.named_parameters()}
    about = given | {f"loss.{dtype}": output.loss.detach().double().reshape(1)}
    if not is_lm:
        about |= {n: p.detach() for n, p in model.named_parameters() if n.startswith("score.")}
    return about, {f"grads.{name}": x for name, x in named.items()}


def activations() -> dict[str, torch.Tensor]:
    """The gradients of the activations, by name and precision, at numbers on either side of every bend."""
    generator = torch.Generator().manual_seed(SEED)
    x = (torch.randn(300, generator=generator) * 3).bfloat16()
    x = torch.cat([x, torch.tensor([0.0, 6.0, -6.0, 40.0, -40.0]).bfloat16()])
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    found = {"x": x, "grad": grad}
    for name in NAMES:
        for dtype in ("float64", "float32", "bfloat16"):
            given = x.clone().to(DTYPES[dtype]).requires_grad_()
            ACT2FN[name](given).backward(grad.to(DTYPES[dtype]))
            found[f"{name}.{dtype}"] = given.grad
    return found


def operations() -> dict[str, torch.Tensor]:
    """The gradients of a soft cap and of a norm in float32, for the exercises of two notebooks."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.linspace(-400, 400, 801, requires_grad=True)
    found = {"soft_cap.x": x, "soft_cap.grad": torch.randn(x.shape, generator=generator)}
    for cap in (50, 30):
        (y,) = torch.autograd.grad(torch.tanh(x / cap) * cap, x, found["soft_cap.grad"])
        found[f"soft_cap.{cap}"] = y
    norm = Gemma2RMSNorm(24, eps=1e-6)
    norm.weight.data = torch.randn(24, generator=generator) / 2
    sizes = torch.tensor([1e-3, 1.0, 30.0, 200.0]).reshape(2, 2, 1)
    x = (torch.randn(2, 2, 24, generator=generator) * sizes).requires_grad_()
    grad = torch.randn(x.shape, generator=generator)
    of_x, of_weight = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    of_norm = {"x": x, "weight": norm.weight, "grad": grad, "grad_x": of_x, "grad_weight": of_weight}
    found |= {f"rms_norm.{name}": tensor for name, tensor in of_norm.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


ALONE = {"activations": activations, "operations": operations}  # recordings without a model


def kept(name: str, case: Case) -> bool:
    """Whether the gradient of a tensor is recorded."""
    return case.activations or name.count(".") in (0, 2)  # embedded, logits; layers.3.out


def record(case: Case) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The names of a case's gradients, and its file: sketches in float64, and how far the other two are from them."""
    stored: dict[str, torch.Tensor] = {}
    names: list[str] = []
    for dtype in ("float64", "float32", "bfloat16"):
        about, found = gradients(case, dtype)
        stored = {n: x.contiguous() for n, x in about.items()} | stored  # a head is kept as it is in float64
        names = names or list(found)
        assert list(found) == names, f"{dtype}: other tensors than in float64"
        table = torch.tensor(np.stack([sketch(found[name].double().numpy()) for name in names]))
        exact = stored.setdefault("sketches.float64", table)
        if dtype != "float64":
            stored[f"errors.{dtype}"] = (table - exact).float()
    return names, stored


def record_all(wanted: Sequence[str], folder: Path = FOLDER, left_out: Sequence[str] = ()) -> None:
    """Record all cases and write their manifest; with cases `wanted`, everything else stays as it is."""
    if unknown := set(wanted) - set(CASES):
        sys.exit(f"record.py: unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.json"
    old = json.loads(manifest.read_text()) if wanted and manifest.exists() else {"cases": {}}
    entries: dict[str, Any] = {}
    for name, case in CASES.items():
        if name in left_out or (wanted and name not in wanted):
            entries |= {name: old["cases"][name]} if name in old["cases"] else {}
            continue
        path = folder / f"{name}.safetensors"
        names, tensors = record(case)
        write_tensors(tensors, path)
        entries[name] = asdict(case) | {
            "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, "names": names, "seed": SEED,
            "torch": torch.__version__, "transformers": transformers.__version__, "attn_implementation": "eager",
            "date": date.today().isoformat(),
        }  # fmt: skip
        if subject := subject_of(case):
            entries[name] |= subject.about
    alone: dict[str, Any] = {name: about for name, about in old.items() if name in ALONE}
    for name, make in {} if wanted else ALONE.items():
        path = folder / f"{name}.safetensors"
        write_tensors(make(), path)
        alone[name] = {"file": path.name, "sha256": sha256(path)}
        alone[name] |= {"names": NAMES} if name == "activations" else {}
    write_json({"format": "refgemma-golden-gradients/1", "cases": entries, **alone}, manifest)
    for path in set(folder.glob("*.safetensors")) - {folder / f"{name}.safetensors" for name in (*alone, *CASES)}:
        path.unlink()
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"recorded the gradients of {len(wanted or CASES)} cases, {size / 1e6:.1f} MB in {folder.name}/")


def check(wanted: Sequence[str]) -> int:
    """Record again; in float64 another processor may move a gradient by 1e-9 of its root mean square.

    Cases of full width take minutes and 7 GiB, so they are recorded again only if they are named.
    """
    manifest, failures = json.loads((FOLDER / "manifest.json").read_text())["cases"], 0
    left_out = () if wanted else FULL_WIDTH
    for name in left_out:
        del manifest[name]
        print(f"{name:32s} NOT CHECKED: it takes minutes and 7 GiB; name it to record it again")
    with tempfile.TemporaryDirectory() as folder:
        record_all(wanted, Path(folder), left_out)
        again = json.loads((Path(folder) / "manifest.json").read_text())["cases"]
        manifest = {name: about for name, about in manifest.items() if not wanted or name in wanted}
        for name in sorted(manifest.keys() | again.keys()):
            if name not in manifest or name not in again or manifest[name]["names"] != again[name]["names"]:
                print(f"{name}: DIFFERS: other cases or tensors")
                failures += 1
                continue
            file = f"{name}.safetensors"
            old, new = (read(at / file)["sketches.float64"] for at in (FOLDER, Path(folder)))
            worst = float((np.abs(new - old).max(axis=1) / (old[:, 0] + 1e-300)).max())
            print(f"{name:32s} {len(old):4d} gradients, worst {worst:.1e}: {'agrees' if worst <= 1e-9 else 'DIFFERS'}")
            failures += worst > 1e-9
        others = () if wanted else (("activations", "float64", 1e-9), ("operations", "", 1e-5))  # the last in float32
        for file, suffix, limit in others:
            alone, renewed = (read(at / f"{file}.safetensors") for at in (FOLDER, Path(folder)))
            names = [name for name in alone if name.endswith(suffix)]
            apart = max(float(np.abs(renewed[n] - alone[n]).max() / np.abs(alone[n]).max()) for n in names)
            verdict = "agrees" if apart <= limit else "DIFFERS"
            print(f"{file:32s} {len(names):4d} tensors, worst {apart:.1e}: {verdict}")
            failures += apart > limit
    return 1 if failures else 0
