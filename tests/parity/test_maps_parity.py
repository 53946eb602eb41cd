"""Test the map of transformers' names on transformers' own modules, with plain forward hooks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from refgemma.cli.main import main
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.modeling.pretrained import load
from refgemma.oracle.engine import Engine
from refgemma.oracle.verdicts import GOOD
from refgemma.trace.candidate import load_trace
from refgemma.trace.capture import capture_modules, read_debug_mode
from refgemma.trace.name_maps import load_map, match, open_any
from refgemma.trace.names import LAYER_FIELDS, field_of, save_trace


def test_every_module_is_known_and_conforms(tmp_path: Path) -> None:
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(1).integers(4, 97, (2, 12))
    tensors, about = capture_modules(model, lambda: model(torch.as_tensor(ids), use_cache=False))
    assert (tensors["input_ids"] == ids).all()
    assert about["dtype"] == "float32"
    save_trace(tensors.items(), tmp_path / "port.safetensors", about | {"map": "transformers"})
    matched = match(open_any(tmp_path / "port.safetensors"), load_map("transformers"))
    assert (matched.unmatched, len(matched.found)) == ((), 1 + 13 * 4 + 3)
    ours = load("conformance")
    work = Engine(load_trace(tmp_path / "port.safetensors", ours.config), ours.weights, ours.config)
    assert {i.judged.verdict for i in work.instances} <= set(GOOD)


class Sampler(torch.nn.Module):
    """Return the next token and the scores, as google/gemma_pytorch does."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.argmax(-1), x


class Writing(torch.nn.Module):
    """A model that calls one module twice, and writes into the output of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.again, self.sampler = torch.nn.Embedding(9, 4), torch.nn.Identity(), Sampler()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedder(tokens)
        x.mul_(3)
        return self.sampler(self.again(self.again(x) + 1))[0]


def test_outputs_are_copied_at_the_first_call_of_each_module() -> None:
    model, ids = Writing(), torch.tensor([[2, 5, 8]])
    tensors, about = capture_modules(model, lambda: model(tokens=ids))
    rows = model.embedder.weight[ids].detach().numpy()
    assert list(tensors) == ["input_ids", "embedder", "again", "sampler"]  # token ids are no logits
    assert (tensors["input_ids"] == [[2, 5, 8]]).all()
    for name, right in {"embedder": rows, "again": 3 * rows, "sampler": 3 * rows + 1}.items():
        np.testing.assert_array_equal(tensors[name], right)
    assert about["dtype"] == "float32"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_call_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="does call run this model"):
        capture_modules(Writing(), lambda: Writing()(torch.tensor([[2]])))


def debugged(folder: Path, dtype: torch.dtype = torch.float32, theta: float = 10000.0, **options: Any) -> None:
    """Run a model in transformers' debugger, which writes the folder."""
    from transformers.model_debugging_utils import model_addition_debugger_context

    rope = {"rope_type": "default", "rope_theta": theta}
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), dtype=dtype, attn_implementation="eager", rope_parameters=rope
    ).eval()
    ids = torch.as_tensor(np.random.default_rng(1).integers(4, 97, (2, 12)))
    printing = torch._tensor_str.PRINT_OPTS.__dict__.copy()
    with model_addition_debugger_context(model, debug_path=str(folder), do_prune_layers=False, **options):
        model(input_ids=ids, use_cache=False)
    torch._tensor_str.PRINT_OPTS.__dict__.update(printing)  # the debugger changes how torch prints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_of_transformers_debugger_is_read(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debugged(tmp_path / "right", getattr(torch, dtype), use_repr=False)
    ours = load("conformance", dtype)
    matched = match(open_any(tmp_path / "right"), load_map("transformers"))
    assert matched.unmatched == ()
    work = Engine(load_trace(tmp_path / "right", ours.config), ours.weights, ours.config)
    fields = {field_of(i.tensor) for i in work.instances}
    assert {"cos", "attention.mixed", "middle", "feed_forward.product", "norm", "logits"} <= fields
    assert len(work.instances) == 2 + 15 * 4 + 4
    assert {i.judged.verdict for i in work.instances} <= set(GOOD)
    [tree] = (tmp_path / "right").glob("*_FULL_TENSORS.json")
    assert main(["check", str(tree), "--model", "conformance"]) == 0
    assert "CONFORMS" in capsys.readouterr().out


def test_a_mistake_in_the_folder_of_the_debugger_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    debugged(tmp_path / "wrong", theta=1e6, use_repr=False)
    assert main(["check", str(tmp_path / "wrong"), "--model", "conformance"]) == 1
    assert "DIFFERS first at cos: rope-theta-1e6" in capsys.readouterr().out


def test_a_folder_of_the_debugger_without_numbers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debugged(tmp_path / "text")
    assert main(["check", str(tmp_path / "text"), "--model", "conformance"]) == 2
    assert "use_repr=False" in capsys.readouterr().err


def recorded(dtype: str, **changes: Any) -> dict[str, Any]:
    """Run a model in PyTorch's DebugMode, and return its tensors."""
    from torch.utils._debug_mode import DebugMode

    model = transformers.Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), dtype=getattr(torch, dtype), attn_implementation="eager", **changes
    ).eval()
    ids = np.random.default_rng(1).integers(4, 97, (2, 12))
    with torch.no_grad(), DebugMode.record_outputs(), DebugMode(record_nn_module=True) as mode:
        model(torch.as_tensor(ids), use_cache=False)
    return {"input_ids": ids} | read_debug_mode(mode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_pytorchs_debug_mode_records_is_known_and_conforms(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    save_trace(recorded(dtype).items(), path, {"map": "torch-debug-mode", "dtype": dtype})
    assert match(open_any(path), load_map("torch-debug-mode")).unmatched == ()
    ours = load("conformance", dtype)
    work = Engine(load_trace(path, ours.config), ours.weights, ours.config)
    assert {i.judged.verdict for i in work.instances} <= set(GOOD)
    fields = {field_of(i.tensor) for i in work.instances}
    assert fields == {*LAYER_FIELDS, "embedded", "norm", "raw_logits", "logits"}
    assert len(work.instances) == 4 * len(LAYER_FIELDS) + 4


def test_a_mistake_that_debug_mode_recorded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "port.safetensors"
    tensors = recorded("float32", query_pre_attn_scalar=10)
    save_trace(tensors.items(), path, {"map": "torch-debug-mode", "dtype": "float32"})
    assert main(["check", str(path), "--model", "conformance"]) == 1
    assert "DIFFERS first at layers.0.attention.scores: scale-head-dim" in capsys.readouterr().out


def test_a_log_of_hashes_has_no_numbers_to_judge() -> None:
    from torch.utils._debug_mode import DebugMode

    with DebugMode.log_tensor_hashes(), DebugMode(record_nn_module=True) as mode:
        torch.nn.Linear(3, 2)(torch.ones(1, 3))
    assert any("hash" in (call.log or {}) for call in mode.operators if hasattr(call, "log"))
    with pytest.raises(InputError, match="record_outputs"):
        read_debug_mode(mode)
