"""Compare with transformers: gradients of the correct model conform. Each known bug of trainers, introduced into
PyTorch, is named from a whole trace and from the gradients of the weights alone."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from parity.support import in_transformers, random_tensors
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma2 import modeling_gemma2 as modeling

from refgemma.cli.main import main
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.hub import find_model
from refgemma.oracle.diagnose import Report, diagnose
from refgemma.oracle.training_bugs import TRAINING_BUGS
from refgemma.oracle.verdicts import CONFORMS, DIFFERS
from refgemma.precision import as_dtype
from refgemma.trace.candidate import candidate_of, load_trace
from refgemma.trace.capture import capture_transformers
from refgemma.trace.names import save_trace
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import weights_of

FOLDER = find_model("conformance")
CHECKPOINT = open_checkpoint(FOLDER)
INPUTS = ("input_ids", "attention_mask", "labels")
Patch = pytest.MonkeyPatch
Make = Callable[[Any, Patch], None]


def inputs(vocab: int, seed: int = 0, length: int = 14) -> dict[str, np.ndarray]:
    """Return two rows (the second is padded), with a token that occurs twice and labels that do not count."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, vocab, (2, length))
    ids[:, 0], ids[0, 5] = 2, ids[0, 3]
    mask = np.ones_like(ids)
    mask[1, -3:] = 0
    ids = np.where(mask == 0, 0, ids)
    labels = np.where(mask == 0, -100, ids)
    labels[0, 1:3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def load_conformance(dtype: str = "float32") -> Any:
    return transformers.Gemma2ForCausalLM.from_pretrained(
        FOLDER, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def capture(model: Any, given: dict[str, np.ndarray], **named: Any) -> dict[str, Any]:
    tensors, _ = capture_transformers(
        model, given["input_ids"], given["attention_mask"], backward=True, labels=given["labels"], **named
    )
    return tensors


def report(tensors: dict[str, Any], dtype: str = "float32") -> Report:
    candidate = candidate_of(tensors, CHECKPOINT.config, dtype)
    return diagnose(candidate, CHECKPOINT.resident(dtype), CHECKPOINT.config)


def of_weights(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors that a trainer has: inputs and gradients of the weights."""
    return {name: x for name, x in tensors.items() if name in INPUTS or name.startswith("grads.model.")}


# --- a right trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_right_trainer_conforms(dtype: str, seed: int) -> None:
    tensors = capture(load_conformance(dtype), inputs(CHECKPOINT.config.vocab_size, seed))
    for found in (report(tensors, dtype), report(of_weights(tensors), dtype)):
        assert found.verdict == CONFORMS, found.first_divergence
        assert {bug.name for bug in found.excluded} & {bug.name for bug in TRAINING_BUGS}


def fused(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
    mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2).contiguous(), None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdpa", "no caps", "untied, biases", "one token", "left padding"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_right_trainers_conform(kind: str, seed: int, monkeypatch: Patch) -> None:
    """Test another kernel, and models of other shapes."""
    shape: dict[str, Any] = {
        "vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12,
        "sliding_window": 5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "rms_norm_eps": 1e-6,
        "layer_types": [SLIDING, FULL, SLIDING], "attention_bias": False, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    if kind in ("sdpa", "no caps"):
        shape |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    if kind == "untied, biases":
        shape |= {"tie_word_embeddings": False, "attention_bias": True}
    numbers = random_tensors("Gemma2ForCausalLM", shape, seed, gain=0.7)
    model = in_transformers("Gemma2ForCausalLM", shape, numbers, "float32")
    if kind == "sdpa":
        monkeypatch.setattr(modeling, "eager_attention_forward", fused)
    given = inputs(70, seed)
    if kind == "one token":  # that counts
        given = {name: x[:1, :2] for name, x in given.items()}
        given["labels"] = given["input_ids"]
    if kind == "left padding":
        given = {name: np.stack([x[0], np.roll(x[1], 3)]) for name, x in given.items()}
        given["labels"][1, 3] = -100
    tensors = capture(model, given)
    config = Gemma2Config(**shape)
    weights = weights_of({name: as_dtype(x, "float32") for name, x in numbers.items()}, config)
    for some in (tensors, {n: x for n, x in tensors.items() if n in INPUTS or n.endswith((".weight", ".bias"))}):
        found = diagnose(candidate_of(some, config, "float32"), weights, config)
        assert found.verdict == CONFORMS, (found.first_divergence, len(some))


def test_default_labels_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Save a call with only tokens and a mask, and check it through the command line."""
    given = inputs(CHECKPOINT.config.vocab_size)
    given = {name: np.stack([x[0], np.roll(x[1], 3)]) for name, x in given.items()}  # left padding
    tensors, about = capture_transformers(
        load_conformance(), given["input_ids"], given["attention_mask"], backward=True
    )
    save_trace(tensors.items(), tmp_path / "run.safetensors", about)
    assert main(["check", str(tmp_path / "run.safetensors"), "--model", "conformance"]) == 0, capsys.readouterr()
    assert load_trace(tmp_path / "run.safetensors", CHECKPOINT.config).call.labels is not None


def adapter_fits(scale: float, a: Any, b: Any, merged: Any, grad_a: Any, grad_b: Any, tokens: int) -> bool:
    """Return True if the gradients of A and B follow from that of the merged weight: ``s B^T G`` and ``s G A^T``.

    Each is a sum over the tokens, then over the rows or columns of the weight. A sum of n products has an error of at
    most n roundings of the products' sizes.
    """
    a, b, merged = (x.astype(np.float64) for x in (a, b, merged))
    return all(
        bool(np.all(np.abs(scale * left @ right - found) <= (tokens + n) * 2.0**-24 * scale * abs(left) @ abs(right)))
        for left, right, found, n in ((b.T, merged, grad_a, len(b)), (merged, a.T, grad_b, a.shape[1]))
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT calls it
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_peft_conform(rslora: bool) -> None:
    """The gradients of the merged weights conform, and those of A and B follow from them."""
    given, model = inputs(CHECKPOINT.config.vocab_size), load_conformance()
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rslora)
    model = peft.get_peft_model(model, settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
        parameter.requires_grad_(True)  # the gradient of a base weight is that of the merged weight
    model(**{name: torch.tensor(x) for name, x in given.items()}, use_cache=False).loss.backward()
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    numbers, grads = ({n: f(p).numpy().copy() for n, p in named.items()} for f in (torch.detach, lambda p: p.grad))
    scale, adapters = 8 / 4**0.5 if rslora else 8 / 4, [name for name in grads if "lora_A" in name]
    for name in adapters:
        other, merged = name.replace("lora_A", "lora_B"), name.split("lora_A")[0] + "base_layer.weight"
        given_to = (numbers[name], numbers[other], grads[merged], grads[name], grads[other], 28)
        assert adapter_fits(scale, *given_to), name
        assert not adapter_fits(1.001 * scale, *given_to), name
    assert len(adapters) == 12
    stored = {n: x.numpy() for n, x in model.merge_and_unload().state_dict().items() if n != "lm_head.weight"}
    base = {f"grads.{n.replace('.base_layer', '')}": x for n, x in grads.items() if "lora_" not in n}
    candidate = candidate_of(given | base, CHECKPOINT.config, "float32")
    found = diagnose(candidate, weights_of(stored, CHECKPOINT.config), CHECKPOINT.config)
    assert found.verdict == CONFORMS, found.first_divergence


# --- mistakes, made in PyTorch ----------------------------------------------------------------------------------------


def learn_as(value: Any, other: Any) -> Any:
    """Return the numbers of `value` with the gradient of `other`, which may be computed in float32."""
    return value.detach() + (other - other.detach()).to(value.dtype)


def times(x: Any, factor: Any) -> Any:
    """Return the same numbers with the gradient multiplied by a factor."""
    return learn_as(x, torch.multiply(x, factor))  # not "mul", which a capture takes for the scale or the cap


def loss_by(reduce: Callable[[Any, Any], Any], place: Callable[[Any], Any] = lambda y: y[:, 1:]) -> Make:
    """Return a bug of the loss; `reduce` gets the losses of all places and a mask of those that count."""

    def make(model: Any, patch: Patch) -> None:
        def loss(logits: Any, labels: Any, vocab: int, **_: Any) -> Any:
            answers = place(labels)
            logits = logits[:, : answers.shape[1]].float()
            losses = F.cross_entropy(logits.transpose(1, 2), answers, reduction="none", ignore_index=-100)
            return reduce(losses, answers != -100)

        model.loss_function = loss

    return make


def mean(losses: Any, counted: Any) -> Any:
    return losses.sum() / counted.sum()


def padding_counted(model: Any, patch: Patch) -> None:
    usual = model.loss_function
    length = 14
    hidden = torch.zeros(2, length, dtype=torch.bool)
    hidden[1, -3:] = True
    model.loss_function = lambda logits, labels, vocab: usual(logits, labels.masked_fill(hidden, 0), vocab)


def capped(cap_learns: Callable[[Any, Any, float], Any]) -> Make:
    """Return a bug with another gradient of the logits' soft cap."""

    def make(model: Any, patch: Patch) -> None:
        def forward(
            self: Any, input_ids: Any, attention_mask: Any = None, labels: Any = None, use_cache: bool = False,
            **named: Any,
        ) -> Any:  # fmt: skip
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            raw, cap = self.lm_head(hidden), self.config.final_logit_softcapping
            bent = torch.tanh(raw / cap) * cap
            logits = learn_as(bent, cap_learns(raw, bent, cap))
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **named)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

        model.forward = types.MethodType(forward, model)

    return make


def attention(**parts: Callable[..., Any]) -> Make:
    """Return a bug: eager attention with another gradient of one part."""

    def same(x: Any, *_: Any) -> Any:
        return x

    def part(name: str) -> Callable[..., Any]:
        return parts.get(name, same)

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, softcap: float, **_: Any) -> Any:
        groups = module.num_key_value_groups
        keys = part("copies")(modeling.repeat_kv(k, groups), groups)
        values = part("copies")(modeling.repeat_kv(v, groups), groups)
        products = torch.matmul(q, keys.transpose(2, 3))
        scores = part("scores")(products * scaling, products)
        bent = part("cap")(torch.tanh(scores / softcap) * softcap, scores, softcap)
        probs = part("softmax")(torch.softmax(bent + mask, dim=-1), bent)
        mixed = torch.matmul(probs, values)
        if "mask" in parts:
            mixed = learn_as(mixed, torch.matmul(torch.softmax(bent + parts["mask"](mask), dim=-1), values))
        return mixed.transpose(1, 2).contiguous(), probs

    return lambda model, patch: patch.setattr(modeling, "eager_attention_forward", attend)


def only_first(copies: Any, groups: int) -> Any:
    learns = (torch.arange(copies.shape[1]) % groups == 0).to(copies.dtype)
    return times(copies, learns[None, :, None, None])


def causal(mask: Any) -> Any:
    """Return a causal mask with the same padding as the correct mask, but without the window."""
    n = mask.shape[-1]
    hidden = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)[None, None].repeat(2, 1, 1, 1)
    hidden[1, ..., -3:] = True
    return torch.zeros(hidden.shape, dtype=mask.dtype).masked_fill(hidden, torch.finfo(mask.dtype).min)


def rotation(learns: Callable[[Any, Any, Any], Any]) -> Make:
    def make(model: Any, patch: Patch) -> None:
        usual = modeling.apply_rotary_pos_emb

        def turn(q: Any, k: Any, cos: Any, sin: Any) -> Any:
            turned = usual(q, k, cos, sin)
            return tuple(
                learn_as(y, learns(x, cos[:, None], sin[:, None])) for x, y in zip((q, k), turned, strict=True)
            )

        patch.setattr(modeling, "apply_rotary_pos_emb", turn)

    return make


def norm(learns: Callable[[Any, Any, Any], Any]) -> Make:
    """Return a bug of the norms; `learns` gets the module, its input (in float32, as in a kernel) and its result."""

    def make(model: Any, patch: Patch) -> None:
        usual = modeling.Gemma2RMSNorm.forward
        patch.setattr(modeling.Gemma2RMSNorm, "forward", lambda self, x: learns(self, x.float(), usual(self, x)))

    return make


def root(self: Any, x: Any) -> Any:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def one_plus(self: Any) -> Any:
    """Return ``1 + weight`` in float32, as in transformers; in bfloat16, the sum would lose digits."""
    return 1 + self.weight.float()


def weight_alone(self: Any, x: Any) -> Any:
    """Return the norm's result with a gradient only for its weight, not for its input."""
    return (x * root(self, x)).detach() * self.weight


def activation(learns: Callable[[Any], Any]) -> Make:
    def make(model: Any, patch: Patch) -> None:
        for layer in model.model.layers:
            usual = layer.mlp.act_fn.forward
            layer.mlp.act_fn.forward = lambda x, usual=usual: learn_as(usual(x), learns(x))

    return make


def exchanged(model: Any, patch: Patch) -> None:
    def forward(self: Any, x: Any) -> Any:
        up, bent = self.up_proj(x), self.act_fn(self.gate_proj(x))
        return self.down_proj(learn_as(bent * up, bent * bent.detach() + up * up.detach()))

    patch.setattr(modeling.Gemma2MLP, "forward", forward)


def no_residual(model: Any, patch: Patch) -> None:
    """The residual connection around each half of a layer has no gradient."""

    def forward(self: Any, hidden_states: Any, **named: Any) -> Any:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        middle = hidden_states.detach() + self.post_attention_layernorm(attended)
        fed = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(middle)))
        return middle.detach() + fed

    patch.setattr(modeling.Gemma2DecoderLayer, "forward", forward)


def embedding(learns: Callable[[Any, Any], Any]) -> Make:
    def make(model: Any, patch: Patch) -> None:
        usual = modeling.Gemma2TextScaledWordEmbedding.forward
        patch.setattr(
            modeling.Gemma2TextScaledWordEmbedding, "forward",
            lambda self, ids: learn_as(usual(self, ids), learns(self, ids)),
        )  # fmt: skip

    return make


def last_only(self: Any, ids: Any) -> Any:
    flat = ids.flatten().tolist()
    last = [token not in flat[n + 1 :] for n, token in enumerate(flat)]
    learns = torch.tensor(last).reshape(ids.shape)[..., None]
    return F.embedding(ids, self.weight, self.padding_idx) * self.scalar_embed_scale * learns


def head_detached(model: Any, patch: Patch) -> None:
    usual = model.lm_head.forward
    model.lm_head.forward = lambda x: learn_as(usual(x), F.linear(x, model.lm_head.weight.detach()))


def turned_back(x: Any, cos: Any, sin: Any) -> Any:
    return x * cos - modeling.rotate_half(x) * sin


def by_rows(losses: Any, counted: Any) -> Any:
    return losses.sum(1) / counted.sum(1)


MAKE: dict[str, Make] = {
    "loss-mean-of-means": loss_by(lambda losses, counted: by_rows(losses, counted).mean()),
    "loss-summed": loss_by(lambda losses, counted: losses.sum()),
    "loss-not-divided-by-steps": loss_by(lambda losses, counted: by_rows(losses, counted).sum()),
    "loss-divided-twice": loss_by(lambda losses, counted: mean(losses, counted) / 2),
    "loss-ignored-in-denominator": loss_by(lambda losses, counted: losses.mean()),
    "padding-counted": padding_counted,
    "labels-shifted-twice": loss_by(mean, lambda labels: labels[:, 2:]),
    "labels-not-shifted": loss_by(mean, lambda labels: labels),
    "final-softcap-no-derivative": capped(lambda raw, bent, cap: raw),
    "final-softcap-slope-of-result": capped(lambda raw, bent, cap: raw * (1 - torch.tanh(bent / cap) ** 2).detach()),
    "attn-softcap-no-derivative": attention(cap=lambda bent, x, cap: learn_as(bent, x)),
    "attn-softcap-slope-of-result": attention(
        cap=lambda bent, x, cap: learn_as(bent, torch.multiply(x, (1 - torch.tanh(bent / cap) ** 2).detach()))
    ),
    "softmax-no-row-sum": attention(softmax=lambda probs, x: learn_as(probs, x * probs.detach())),
    "attn-scores-detached": attention(softmax=lambda probs, x: probs.detach()),
    "attn-scale-missing-in-backward": attention(scores=learn_as),
    "attn-backward-without-window": attention(mask=causal),
    "gqa-gradient-averaged": attention(copies=lambda copies, groups: times(copies, 1 / groups)),
    "gqa-gradient-of-one-head": attention(copies=only_first),
    "rope-gradient-turned-forwards": rotation(turned_back),
    "rope-gradient-not-turned": rotation(lambda x, cos, sin: x),
    "gelu-exact-in-backward": activation(F.gelu),
    "gelu-slope-missing": activation(lambda x: x),
    "gate-up-gradients-exchanged": exchanged,
    "norm-weight-for-1-plus-weight": norm(
        lambda m, x, y: learn_as(y, x * root(m, x) * m.weight.detach() + weight_alone(m, x))
    ),
    "norm-weight-missing-in-backward": norm(lambda m, x, y: learn_as(y, x * root(m, x) + weight_alone(m, x))),
    "norm-projection-missing": norm(lambda m, x, y: learn_as(y, x * root(m, x).detach() * one_plus(m))),
    "norm-weight-gradient-of-input": norm(
        lambda m, x, y: learn_as(y, x * root(m, x) * one_plus(m).detach() + x.detach() * m.weight)
    ),
    "norm-weight-gradient-missing": norm(
        lambda m, x, y: learn_as(y, x * root(m, x) * one_plus(m).detach() + 0 * m.weight)
    ),
    "residual-gradient-missing": no_residual,
    "tied-embedding-head-only": embedding(lambda m, ids: F.embedding(ids, m.weight) * 0),
    "tied-embedding-embedding-only": head_detached,
    "embedding-gradient-unscaled": embedding(lambda m, ids: F.embedding(ids, m.weight, m.padding_idx)),
    "embedding-last-token-wins": embedding(last_only),
}


def test_every_mistake_is_made() -> None:
    assert MAKE.keys() == {bug.name for bug in TRAINING_BUGS}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_a_mistake_is_named(name: str, monkeypatch: Patch) -> None:
    """The bug is the first finding, alone, from a whole trace and from the weights' gradients."""
    model = load_conformance()
    MAKE[name](model, monkeypatch)
    tensors = capture(model, inputs(CHECKPOINT.config.vocab_size))
    whole, weights = report(tensors), report(of_weights(tensors))
    assert (whole.verdict, weights.verdict) == (DIFFERS, DIFFERS)
    assert whole.findings[0].field.startswith("grads.")
    assert whole.findings[0].named == weights.findings[0].named == name


# --- half precision ---------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "check-a-trainer.md"
BEGIN, END = "<!-- python tests/parity/test_trainers_parity.py -->", "<!-- end of half precision -->"


def name_in(dtype: str, name: str, patch: Patch) -> list[str]:
    """Return how a mistake is reported from a whole trace, and from the gradients of the weights alone."""
    model = load_conformance(dtype)
    MAKE[name](model, patch)
    tensors, words = capture(model, inputs(CHECKPOINT.config.vocab_size)), []
    for found in (report(tensors, dtype), report(of_weights(tensors), dtype)):
        if found.verdict == CONFORMS:
            words.append("hidden by rounding")
            continue
        named = found.findings[0].named
        among = name in named.split(" or ")
        words.append("named" if named == name else f"one of {len(named.split(' or '))} named" if among else "found")
    return words


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "loss-summed",
        "norm-weight-missing-in-backward",
        "norm-projection-missing",
        "norm-weight-gradient-missing",
        "attn-backward-without-window",
    ],
)
def test_a_mistake_in_bfloat16_is_named(name: str, monkeypatch: Patch) -> None:
    assert name_in("bfloat16", name, monkeypatch) == ["named", "named"]


def write_table() -> None:
    """Write the table of docs/how-to/check-a-trainer.md: how each mistake is reported in bfloat16."""
    lines = ["| mistake, in bfloat16 | from a whole trace | from the weights' gradients |", "| --- | --- | --- |"]
    for name in MAKE:
        with pytest.MonkeyPatch.context() as patch:
            lines.append(f"| `{name}` | {' | '.join(name_in('bfloat16', name, patch))} |")
        print(lines[-1], flush=True)
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    write_table()
