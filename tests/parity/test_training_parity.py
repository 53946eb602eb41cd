"""Compare training with torch 2.13, transformers 5.23 and PEFT 0.21: optimizer (bit for bit), clipping, schedules,
decay, steps, accumulation, and adapters in both directions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import here, in_transformers, random_tensors, shapes

from refgemma.cli.main import main
from refgemma.cli.output import OK
from refgemma.config import Gemma2Config
from refgemma.training import optimizer as training
from refgemma.training.gradients import accumulate_gradients
from refgemma.training.lora import TARGETS, Lora
from refgemma.training.optimizer import AdamW, adamw, clip_grad_norm, decays, first_moments, schedule
from refgemma.training.run import TrainingArguments, first_state, train_step
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import named_weights, weights_of

# PEFT 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DTYPES = {np.float32: torch.float32, np.float64: torch.float64}


# --- AdamW ------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32), size=st.sampled_from([1, 3, 17, 1000]), dtype=st.sampled_from(list(DTYPES)),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.99), (0.4, 0.5)]), decay=st.sampled_from([0.0, 0.1]),
    spread=st.sampled_from([1e-12, 1e-4, 1.0, 1e4]),
)  # fmt: skip
def test_every_bit_of_ten_steps(
    seed: int, size: int, dtype: Any, betas: tuple[float, float], decay: float, spread: float
) -> None:
    """With torch's own square root every bit is the same; with NumPy's, which is correctly rounded, the moments are."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(size).astype(dtype)
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([parameter], lr=1e-2, betas=betas, eps=1e-8, weight_decay=decay)
    numbers = AdamW(decay, *betas, 1e-8)
    weight, moments = start, first_moments(start)
    for step in range(1, 11):
        rate = 1e-2 * schedule("cosine", step - 1, 3, 12)
        gradient = (rng.standard_normal(size) * spread).astype(dtype)
        theirs.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient)
        before = parameter.detach().numpy().copy()
        theirs.step()
        state, after = theirs.state[parameter], parameter.detach().numpy()
        plain, _ = adamw(before, gradient, moments, step, rate, numbers)
        # A step is one quotient; its divisor may differ by an ulp, and the sum rounds once more.
        eps = np.finfo(dtype).eps
        assert (np.abs(plain - after) <= 2 * eps * np.abs(after - before) + eps * np.abs(after)).all()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "np", SquareRootOfTorch())
            weight, moments = adamw(weight, gradient, moments, step, rate, numbers)
        assert (moments.exp_avg == state["exp_avg"].numpy()).all()
        assert (moments.exp_avg_sq == state["exp_avg_sq"].numpy()).all()
        assert (weight == after).all()


class SquareRootOfTorch:
    """NumPy with torch's square root."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def sqrt(self, x: Any) -> Any:
        return torch.sqrt(torch.tensor(x)).numpy()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("max_norm", [0.1, 10.0, 1e6])
def test_clipping(dtype: Any, max_norm: float) -> None:
    rng = np.random.default_rng(0)
    ours = {str(n): (rng.standard_normal((n, 7)) * n).astype(dtype) for n in range(1, 20)}
    parameters = [torch.nn.Parameter(torch.zeros(x.shape, dtype=DTYPES[dtype])) for x in ours.values()]
    for parameter, x in zip(parameters, ours.values(), strict=True):
        parameter.grad = torch.tensor(x)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, our_norm = clip_grad_norm(ours, max_norm)
    # torch sums 133 squares a tensor in its precision, at worst with an error of half an ulp of each sum.
    bound = 133 * float(np.finfo(dtype).eps)
    assert our_norm == pytest.approx(norm.item(), rel=bound)
    for parameter, x in zip(parameters, clipped.values(), strict=True):
        np.testing.assert_allclose(x, parameter.grad.numpy(), rtol=2 * bound)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 7), (7, 7), (6, 7)])
def test_schedules(kind: str, warmup: int, steps: int) -> None:
    theirs = transformers.get_scheduler(
        kind, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3), warmup, steps
    )
    for step in range(steps):
        assert 0.3 * schedule(kind, step, warmup, steps) == theirs.get_last_lr()[0]
        theirs.optimizer.step()
        theirs.step()


def test_the_weights_that_decay_are_the_trainers() -> None:
    config = transformers.Gemma2Config(**TINY, attention_bias=True, tie_word_embeddings=False)
    model = transformers.Gemma2ForCausalLM(config)
    trainer = transformers.Trainer.__new__(transformers.Trainer)
    theirs = set(trainer.get_decay_parameter_names(model))
    assert theirs == {name for name, _ in model.named_parameters() if decays(name)}


def test_defaults_are_those_of_the_trainer(tmp_path: Path) -> None:
    theirs, ours = transformers.TrainingArguments(output_dir=str(tmp_path)), TrainingArguments(max_steps=1)
    for name in set(vars(ours)) - {"max_steps", "lora"}:
        assert getattr(ours, name) == getattr(theirs, name), name


TINY: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 4,
}  # fmt: skip


# --- whole steps ------------------------------------------------------------------------------------------------------


def as_batch(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Pad the rows on the left; padding and the first token, which padding would predict, have no label."""
    width = max(map(len, rows))
    ids = torch.tensor(np.array([np.pad(row, (width - len(row), 0)) for row in rows]))
    mask = torch.tensor(np.array([np.arange(width) >= width - len(row) for row in rows]).astype(int))
    counted = mask * mask.roll(1, dims=1) * (torch.arange(width) > 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(counted == 0, -100)}


def their_steps(model: Any, batches: list[list[Any]], micro: int, arguments: TrainingArguments) -> list[float]:
    """Train transformers' model in micro-batches of `micro` rows; return the losses."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": arguments.weight_decay},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, arguments.learning_rate)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, arguments.max_steps)
    losses = []
    for rows in batches:
        items, loss = sum(len(row) - 1 for row in rows), 0.0
        for first in range(0, len(rows), micro):
            part = model(**as_batch(rows[first : first + micro]), num_items_in_batch=items, use_cache=False).loss
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], arguments.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def draw_batches(seed: int, vocab: int, steps: int) -> list[list[Any]]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(3, vocab, int(rng.integers(2, 9))) for _ in range(8)] for _ in range(steps)]


@pytest.mark.slow
@settings(max_examples=5, phases=[Phase.generate])
@given(shape=shapes(hidden_activation="gelu_pytorch_tanh"), seed=st.integers(0, 2**16))
def test_three_steps_of_random_models(shape: dict[str, Any], seed: int) -> None:
    """1 x 8 rows and 4 x 2 rows with unequal lengths are the same step in both, and the same step."""
    tensors = random_tensors("Gemma2ForCausalLM", shape, seed)
    arguments = TrainingArguments(max_steps=3, learning_rate=1e-3, weight_decay=0.1, adam_epsilon=1e-8)
    batches = draw_batches(seed, shape["vocab_size"], 3)
    theirs = [in_transformers("Gemma2ForCausalLM", shape, tensors, "float32") for _ in range(2)]
    losses = [their_steps(model, batches, micro, arguments) for model, micro in zip(theirs, (8, 2), strict=True)]
    config = Gemma2Config(**shape)
    base = dict(named_arrays(here("Gemma2ForCausalLM", shape, tensors, "float32").weights, config))
    state = first_state(base, config, arguments)
    for rows in batches:
        state = train_step(state, rows, base, config, arguments)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(state.losses, losses[0], rtol=1e-5)  # float32: some ten roundings of a mean
    whole, cut = (dict(model.named_parameters()) for model in theirs)
    for name, tensor in state.tensors.items():
        a, b = (found[name].detach().numpy() for found in (whole, cut))
        # AdamW divides by the gradient's own size: where that is rounding noise, the direction of a step is too, in
        # transformers as here. So almost all elements agree to a hundredth of a step, and none is off by more than all.
        for other in (a, b):
            difference = np.abs(tensor - other)
            assert difference.max() <= 2 * 3 * arguments.learning_rate, name
            assert np.quantile(difference, 0.9) <= 1e-2 * arguments.learning_rate, name


def named_arrays(weights: Any, config: Gemma2Config) -> Any:
    return ((name, np.array(rows[:])) for name, rows in named_weights(weights, config).items())


# --- adapters ---------------------------------------------------------------------------------------------------------


def their_adapter(model: Any, lora: Lora) -> Any:
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), TARGETS], ids=["two", "all"])
def test_steps_of_an_adapter(modules: tuple[str, ...], tmp_path: Path) -> None:
    lora = Lora(r=3, lora_alpha=6.0, target_modules=modules)
    tensors = random_tensors("Gemma2ForCausalLM", TINY, 3)
    config = Gemma2Config(**TINY)
    base = dict(named_arrays(here("Gemma2ForCausalLM", TINY, tensors, "float32").weights, config))
    arguments = TrainingArguments(max_steps=3, learning_rate=1e-2, weight_decay=0.1, lora=lora)
    state = first_state(base, config, arguments)
    model = their_adapter(in_transformers("Gemma2ForCausalLM", TINY, tensors, "float32"), lora)
    drawn = {name.replace(".lora_A.weight", ".lora_A.default.weight"): x for name, x in state.tensors.items()}
    drawn = {name.replace(".lora_B.weight", ".lora_B.default.weight"): torch.tensor(x) for name, x in drawn.items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == drawn.keys()  # PEFT's names
    model.load_state_dict(drawn, strict=False)
    batches = draw_batches(0, TINY["vocab_size"], 3)
    losses = their_steps(model, batches, 4, arguments)
    for rows in batches:
        state = train_step(state, rows, base, config, arguments)
    np.testing.assert_allclose(state.losses, losses, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            ours = state.tensors[name.replace(".default.", ".")]
            difference = np.abs(ours - p.detach().numpy())
            assert np.quantile(difference, 0.9) <= 1e-2 * arguments.learning_rate, name


def test_the_first_adapter_is_drawn_as_pefts() -> None:
    """The bound of the uniform distribution is the same; the numbers come from another generator."""
    tensors = random_tensors("Gemma2ForCausalLM", TINY, 3)
    config, lora = Gemma2Config(**TINY), Lora(r=64, lora_alpha=8.0)
    base = dict(named_arrays(here("Gemma2ForCausalLM", TINY, tensors, "float32").weights, config))
    model = their_adapter(in_transformers("Gemma2ForCausalLM", TINY, tensors, "float32"), lora)
    theirs = {name.replace(".default.", "."): p.detach().numpy() for name, p in model.named_parameters()}
    for name, ours in lora.draw(base, config, 0).items():
        assert ours.shape == theirs[name].shape
        assert ours.dtype == theirs[name].dtype
        assert float(np.abs(ours).max()) == pytest.approx(float(np.abs(theirs[name]).max()), rel=0.02)
        assert float(ours.std()) == pytest.approx(float(theirs[name].std()), rel=0.1, abs=0)


# --- folders ----------------------------------------------------------------------------------------------------------

TEXT = "The king had a daughter, and she was as beautiful as the day. " * 30
COMMAND = ["--seq-len", "16", "--batch-size", "2", "--max-steps", "3", "--learning-rate", "0.01"]


def test_transformers_loads_what_train_writes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert main(["train", str(tmp_path / "text"), "-o", str(tmp_path / "m"), *COMMAND]) == OK
    model, info = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True, dtype="auto")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    found = open_checkpoint(tmp_path / "m").tensors
    assert all((found[name].read("float32") == p.detach().numpy()).all() for name, p in model.named_parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("The king").input_ids[0] == 2


def test_peft_loads_and_merges_what_train_writes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    lora = ["--lora-r", "4", "--lora-target-modules", "all-linear"]
    assert main(["train", str(tmp_path / "text"), "-o", str(tmp_path / "m"), *COMMAND, *lora]) == OK
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    merged = dict(model.merge_and_unload().named_parameters())
    found = open_checkpoint(tmp_path / "m").weights("float32")
    changed = 0
    base = open_checkpoint(find_base(tmp_path / "m"))
    for name, rows in named_weights(found, base.config).items():
        # PEFT merges in float32: a product of rank 4 and a sum, six roundings of numbers below the weight's size.
        np.testing.assert_allclose(rows[:], merged[name].detach().numpy(), rtol=0, atol=6 * 2.0**-24)
        changed += bool((rows[:] != base.tensors[name].read("float32")).any())
    assert changed == 7 * 6


def find_base(folder: Path) -> str:
    return str(peft.PeftConfig.from_pretrained(folder).base_model_name_or_path)


def test_gradients_of_unequal_rows_are_those_of_a_padded_batch() -> None:
    tensors = random_tensors("Gemma2ForCausalLM", TINY, 5)
    rows = draw_batches(2, TINY["vocab_size"], 1)[0]
    model = in_transformers("Gemma2ForCausalLM", TINY, tensors, "float32")
    loss = model(**as_batch(rows), use_cache=False).loss
    loss.backward()
    config = Gemma2Config(**TINY)
    base = dict(named_arrays(here("Gemma2ForCausalLM", TINY, tensors, "float32").weights, config))
    ours, found = accumulate_gradients(rows, weights_of(base, config), config)
    assert math.isclose(ours, loss.item(), rel_tol=1e-6)
    for name, p in model.named_parameters():
        # Relative to the largest of the tensor: some tens of roundings on the way back through two layers.
        expected = p.grad.numpy()
        assert np.abs(found[name] - expected).max() <= 100 * 2.0**-24 * np.abs(expected).max(), name
