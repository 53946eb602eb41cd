"""Beside torch: the weights after a step of a right optimizer conform, and each known mistake, made in PyTorch, is
named as the first finding, alone."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from parity.test_trainers_parity import CHECKPOINT, INPUTS, capture, inputs, load_conformance

from refgemma.inputs import InputError
from refgemma.oracle.diagnose import Report, diagnose
from refgemma.oracle.optimizer_bugs import OPTIMIZER_BUGS
from refgemma.oracle.verdicts import CONFORMS, DIFFERS, INCONCLUSIVE
from refgemma.trace.candidate import check_trace
from refgemma.trace.names import AFTER, GRADS
from refgemma.trace.reader import Entry, TraceFile
from refgemma.training.optimizer import decays

pytestmark = pytest.mark.slow

RATE, DECAY = 1e-3, 0.1
About = dict[str, str]
ADAMW = {"optimizer": "adamw", "learning_rate": str(RATE), "weight_decay": str(DECAY)}
SGD = {"optimizer": "sgd", "learning_rate": "0.01", "weight_decay": str(DECAY)}
CLIPPED = {"max_grad_norm": "0.1"}


@cache
def recorded(dtype: str = "float32") -> dict[str, np.ndarray]:
    return capture(load_conformance(dtype), inputs(CHECKPOINT.config.vocab_size))


def judge(tensors: dict[str, Any], about: About, dtype: str = "float32") -> Report:
    entries = {
        name: Entry("I64" if x.dtype.kind == "i" else "F32", x.shape, lambda x=x: np.asarray(x))
        for name, x in tensors.items()
    }
    candidate = check_trace(TraceFile("memory", {"dtype": dtype} | about, entries), CHECKPOINT.config)
    return diagnose(candidate, CHECKPOINT.resident(dtype), CHECKPOINT.config)


def groups(model: Any, decay: float) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if decays(n)], "weight_decay": decay},
        {"params": [p for n, p in named.items() if not decays(n)], "weight_decay": 0.0},
    ]


def take_steps(about: About, dtype: str, **options: Any) -> tuple[dict[str, Any], About]:
    """Steps of torch's optimizer, the last of them recorded with the state before it."""
    model, found = load_conformance(dtype), recorded(dtype)
    named, rate = dict(model.named_parameters()), float(about["learning_rate"])
    kind = torch.optim.SGD if about["optimizer"] == "sgd" else torch.optim.AdamW
    optimizer = kind(groups(model, DECAY), lr=rate, **options)
    steps, moments = int(about.get("step", 1)), {}
    for step in range(1, steps + 1):
        for name, p in named.items():
            grad = torch.tensor(np.array(found[GRADS + name], np.float32)).to(p.dtype)
            p.grad = grad if step == steps else grad.flip(0) * 0.7
        if step == steps:
            moments = {
                f"{part}.{n}": optimizer.state[p][part].float().numpy().copy()
                for n, p in named.items() for part in ("exp_avg", "exp_avg_sq") if step > 1
            }  # fmt: skip
            if step > 1:  # the step begins at the model's weights
                fresh = dict(load_conformance(dtype).named_parameters())
                with torch.no_grad():
                    for name, p in named.items():
                        p.copy_(fresh[name])
        if limit := float(about.get("max_grad_norm", 0)):
            torch.nn.utils.clip_grad_norm_(named.values(), limit)
        optimizer.step()
    after = {AFTER + name: p.detach().float().numpy() for name, p in named.items()}
    given = {name: x for name, x in found.items() if name in INPUTS or name.startswith("grads.model.")}
    return given | moments | after, about


RIGHT: dict[str, tuple[About, dict[str, Any]]] = {
    "adamw": (ADAMW, {}), "adamw, fused": (ADAMW, {"fused": True}), "adamw, foreach": (ADAMW, {"foreach": True}),
    "adamw, third step": (ADAMW | {"step": "3"}, {}), "adamw, clipped": (ADAMW | CLIPPED | {"step": "2"}, {}),
    "adamw, other numbers": (
        ADAMW | {"adam_beta1": "0.8", "adam_beta2": "0.95", "adam_epsilon": "1e-6"},
        {"betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "sgd": (SGD, {}), "sgd, clipped": (SGD | CLIPPED, {}), "sgd, foreach": (SGD, {"foreach": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_optimizer_conforms(kind: str) -> None:
    about, options = RIGHT[kind]
    found = judge(*take_steps(about, "float32", **options))
    assert found.verdict == CONFORMS, found.first_divergence
    assert sum(i.tensor.startswith(AFTER) for i in found.instances) == len(list(load_conformance().parameters()))


def test_a_thousandth_of_the_step_is_found() -> None:
    for about in (ADAMW, SGD):
        tensors, _ = take_steps(about, "float32")
        found = judge(tensors, about | {"learning_rate": str(float(about["learning_rate"]) * 1.001)})
        assert found.verdict == DIFFERS


def test_a_part_of_the_weights_is_inconclusive() -> None:
    tensors, about = take_steps(ADAMW, "float32")
    del tensors["weights.after.model.norm.weight"]
    assert judge(tensors, about).verdict == INCONCLUSIVE


# --- mistakes, made in PyTorch ----------------------------------------------------------------------------------------

Move = Callable[[str, Any, Any], Any]  # a weight's name, the weight, its gradient -> the weight after the step


def keep(name: str) -> float:
    return 1 - RATE * DECAY if decays(name) else 1.0


def adam(grad: Any, *, root: Callable[[Any], Any] = lambda v: v.sqrt() + 1e-8, corrected: float = 1) -> Any:
    """The move of the first step."""
    m, v = 0.1 * grad, 0.001 * grad * grad
    if corrected:
        m, v = m / (1 - 0.9**corrected), v / (1 - 0.999**corrected)
    return RATE * m / root(v)


def with_torch(kind: Any, parameters: Callable[[Any], Any], **options: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        model, found = load_conformance(), recorded()
        for name, p in model.named_parameters():
            p.grad = torch.tensor(found[GRADS + name])
        kind(parameters(model), lr=RATE, **options).step()
        return dict(model.named_parameters())

    return make


def by_hand(move: Move) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        named = dict(load_conformance().named_parameters())
        return {name: move(name, p.detach(), torch.tensor(recorded()[GRADS + name])) for name, p in named.items()}

    return make


def clip(grads: list[Any]) -> None:
    torch.nn.utils.clip_grad_norm_(grads, float(CLIPPED["max_grad_norm"]))


def clip_each() -> dict[str, Any]:
    model = load_conformance()
    for name, p in model.named_parameters():
        p.grad = torch.tensor(recorded()[GRADS + name])
        clip([p])
    torch.optim.SGD(groups(model, DECAY), lr=0.01).step()
    return dict(model.named_parameters())


def not_clipped() -> dict[str, Any]:
    return by_hand(lambda n, w, g: w - 0.01 * (g + (DECAY * w if decays(n) else 0)))()


MAKE: dict[str, tuple[Callable[[], dict[str, Any]], About]] = {
    "optimizer-decays-norms": (
        with_torch(torch.optim.AdamW, lambda model: model.parameters(), weight_decay=DECAY), ADAMW
    ),
    "optimizer-l2-decay": (with_torch(torch.optim.Adam, lambda model: groups(model, DECAY)), ADAMW),
    "optimizer-no-decay": (with_torch(torch.optim.AdamW, lambda model: groups(model, 0.0)), ADAMW),
    "optimizer-decay-not-scaled": (
        by_hand(lambda n, w, g: w * (1 - DECAY if decays(n) else 1) - adam(g)), ADAMW
    ),
    "optimizer-decay-after-step": (by_hand(lambda n, w, g: (w - adam(g)) * keep(n)), ADAMW),
    "optimizer-no-bias-correction": (by_hand(lambda n, w, g: w * keep(n) - adam(g, corrected=0)), ADAMW),
    "optimizer-step-counted-from-2": (by_hand(lambda n, w, g: w * keep(n) - adam(g, corrected=2)), ADAMW),
    "optimizer-eps-inside-root": (
        by_hand(lambda n, w, g: w * keep(n) - adam(g, root=lambda v: (v + 1e-8).sqrt())), ADAMW
    ),
    "optimizer-eps-before-correction": (
        by_hand(lambda n, w, g: w * keep(n) - adam(g, root=lambda v: v.sqrt() + 1e-8 / 0.001**0.5)), ADAMW
    ),
    "optimizer-ascends": (
        with_torch(torch.optim.AdamW, lambda model: groups(model, DECAY), maximize=True), ADAMW
    ),
    "optimizer-not-clipped": (not_clipped, SGD | CLIPPED),
    "optimizer-clips-each-tensor": (clip_each, SGD | CLIPPED),
}  # fmt: skip


def test_every_mistake_is_made() -> None:
    assert MAKE.keys() == {bug.name for bug in OPTIMIZER_BUGS}


@pytest.mark.parametrize("name", MAKE)
def test_a_mistake_is_named(name: str) -> None:
    made, about = MAKE[name]
    given = {n: x for n, x in recorded().items() if n in INPUTS or n.startswith("grads.model.")}
    after = {AFTER + n: p.detach().numpy() for n, p in made().items()}
    found = judge(given | after, about)
    assert found.verdict == DIFFERS
    assert found.findings[0].field.startswith(AFTER)
    assert found.findings[0].named == name
    assert {finding.named for finding in found.findings} == {name}


def test_the_moments_are_needed_after_the_first_step() -> None:
    tensors, about = take_steps(ADAMW | {"step": "2"}, "float32")
    del tensors["exp_avg_sq.model.norm.weight"]
    found = judge(tensors, about)
    (wrong,) = [i for i in found.instances if i.judged.verdict == "INVALID"]
    assert wrong.tensor == "weights.after.model.norm.weight"
    assert "without exp_avg_sq.model.norm.weight" in wrong.judged.note


def test_half_precision_needs_master_weights() -> None:
    """In bfloat16 the weights are refused; float32 master weights of a bfloat16 model are judged."""
    tensors, about = take_steps(ADAMW, "bfloat16")
    with pytest.raises(InputError, match="weight is in bfloat16, where optimizers round at many places"):
        judge(tensors, about, "bfloat16")
    masters = {n: torch.nn.Parameter(p.detach().float()) for n, p in load_conformance("bfloat16").named_parameters()}
    for name, p in masters.items():
        p.grad = torch.tensor(np.array(tensors[GRADS + name], np.float32))
    pairs = [{"params": [p], "weight_decay": DECAY if decays(n) else 0.0} for n, p in masters.items()]
    torch.optim.AdamW(pairs, lr=RATE).step()
    after = {AFTER + name: p.detach().numpy() for name, p in masters.items()}
    assert judge(tensors | after, about, "bfloat16").verdict == CONFORMS
