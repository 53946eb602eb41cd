"""Test the map of transformers' names on transformers' own modules, with plain forward hooks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from refgemma.hub import find_model
from refgemma.modeling.pretrained import load
from refgemma.oracle.engine import Engine
from refgemma.oracle.verdicts import GOOD
from refgemma.trace.candidate import load_trace
from refgemma.trace.name_maps import load_map, match, open_any


def test_every_module_is_known_and_conforms(tmp_path: Path) -> None:
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        find_model("conformance"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda module, given, result: found.update({name: result}) if isinstance(result, torch.Tensor) else None

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    ids = np.random.default_rng(1).integers(4, 97, (2, 12))
    with torch.no_grad():
        found["logits"] = model(torch.as_tensor(ids), use_cache=False).logits
    tensors = {name: np.ascontiguousarray(x.numpy()) for name, x in found.items()}
    save_file({"input_ids": ids, **tensors}, tmp_path / "port.safetensors", {"map": "transformers", "dtype": "float32"})
    matched = match(open_any(tmp_path / "port.safetensors"), load_map("transformers"))
    assert (matched.unmatched, len(matched.found)) == ((), 1 + 13 * 4 + 3)
    ours = load("conformance")
    work = Engine(load_trace(tmp_path / "port.safetensors", ours.config), ours.weights, ours.config)
    assert {i.judged.verdict for i in work.instances} <= set(GOOD)
