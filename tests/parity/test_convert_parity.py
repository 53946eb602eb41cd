"""Compare with PyTorch: read files of torch.save, write files for torch.load, and load converted folders in
transformers."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import transformers

from refgemma.convert.convert import convert, open_source
from refgemma.convert.flax_tree import read_npz
from refgemma.convert.pickles import read_torch
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 12, "sliding_window": 5,
}  # fmt: skip
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model(dtype: str = "bfloat16", **change: Any) -> Any:
    """Return a transformers model with random weights, also in the norms, which would otherwise all be zero."""
    torch.manual_seed(3)
    made = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE | change, attn_implementation="eager"))
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
        weight.data = weight.data.to(TORCH[dtype])  # made.to(dtype) would round the rotary frequencies as well
    return made.eval()


def original(made: Any) -> Any:
    """Return the state dict of gemma_pytorch's module with these weights: fused projections, and the rotary table."""
    state = made.state_dict()
    state["embedder.weight"] = state.pop("model.embed_tokens.weight")
    del state["lm_head.weight"]
    for layer in range(made.config.num_hidden_layers):
        at = f"model.layers.{layer}.self_attn"
        parts = [state.pop(f"{at}.{x}_proj.weight") for x in "qkv"]
        state[f"{at}.qkv_proj.weight"] = torch.cat(parts)
    angles = torch.outer(torch.arange(32), 10000.0 ** -(torch.arange(0, 10, 2) / 10))
    state["freqs_cis"] = torch.polar(torch.ones_like(angles), angles)
    return state


def given(folder: Path, made: Any) -> Path:
    made.config.save_pretrained(folder / "given")
    return folder / "given" / "config.json"


def same(folder: Path, made: Any) -> None:
    again, report = transformers.Gemma2ForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert again.dtype == made.dtype
    wanted = made.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = torch.tensor([[2, 5, 7, 9, 11, 13, 40]])
    assert torch.equal(again(ids).logits, made(ids).logits)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_torch_save(tmp_path: Path, dtype: str, kv_heads: int, protocol: int) -> None:
    made = model(dtype, num_key_value_heads=kv_heads)
    saved = {"model_state_dict": original(made), "step": 3, "loss": [0.5, None], "device": torch.device("cpu")}
    torch.save(saved, tmp_path / "gemma.ckpt", pickle_protocol=protocol)
    convert(tmp_path / "gemma.ckpt", tmp_path / "hf", config=given(tmp_path, made))
    same(tmp_path / "hf", made)


def test_shards_of_torch_save(tmp_path: Path) -> None:
    made = model()
    state = original(made)
    (tmp_path / "shards").mkdir()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[:20], names[20:])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(tmp_path / "shards", tmp_path / "hf", config=given(tmp_path, made))
    same(tmp_path / "hf", made)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("limit", [None, 10_000])
@pytest.mark.parametrize("dtype", list(TORCH))
def test_back_to_what_torch_loads(tmp_path: Path, dtype: str, limit: int | None, mmap: bool) -> None:
    made = model(dtype)
    made.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "there", target_format="pytorch", max_shard_size=limit)
    found: dict[str, torch.Tensor] = {}
    for file in [*(tmp_path / "there").glob("*.bin"), *(tmp_path / "there").glob("*.ckpt")]:
        loaded = torch.load(file, weights_only=True, mmap=mmap)
        found |= loaded if limit else loaded["model_state_dict"]
    wanted = original(made)
    del wanted["freqs_cis"]  # a table that gemma_pytorch computes when its model is made
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
        assert found[name].data_ptr() % 64 == 0 or not mmap
    convert(tmp_path / "there", tmp_path / "back")
    same(tmp_path / "back", made)


@pytest.mark.parametrize("kind", ["flax", "flax-npz"])
def test_through_flax(tmp_path: Path, kind: str) -> None:
    made = model()
    made.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "there", target_format=kind, vocab_rows=128)
    convert(tmp_path / "there", tmp_path / "back", max_shard_size=10_000)
    same(tmp_path / "back", made)


@pytest.mark.parametrize(("in_one", "driver"), [(True, "zarr"), (True, "zarr3"), (False, "zarr")])
def test_an_orbax_folder(tmp_path: Path, in_one: bool, driver: str) -> None:
    """The folder is written by TensorStore as by orbax-checkpoint 0.12, whose folders were tested once by hand."""
    made = model()
    made.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "tree", target_format="flax-npz", vocab_rows=128)
    folder = tmp_path / "orbax"
    folder.mkdir()
    (folder / "_METADATA").write_text("{}")
    for name, tensor in read_npz(tmp_path / "tree" / "params.npz").items():
        key = ".".join(name.rsplit("/", 1)) + "/"  # transformer/layer_0/attn/kv_einsum.w
        store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": key} if in_one else (
            {"driver": "file", "path": f"{folder}/{key}"}
        )  # fmt: skip
        written = tensorstore.open(
            {"driver": driver, "kvstore": store}, create=True, dtype="bfloat16", shape=tensor.shape
        ).result()
        written.write(tensor.map()).result()
    (tmp_path / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(b"beside the folder, as released")
    convert(folder, tmp_path / "back", config=tmp_path / "config.json", max_shard_size=10_000)
    same(tmp_path / "back", made)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"beside the folder, as released"
    data = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(folder, tmp_path / "damaged", config=tmp_path / "config.json")


def test_tensors_as_views(tmp_path: Path) -> None:
    base = torch.randn(6, 4, dtype=torch.float64)
    views = {
        "transposed": base.t(), "rows": base[2:5], "columns": base[:, 1:3], "steps": base[::2, ::3], "one": base[3, 2],
        "expanded": base[0].expand(5, 4), "parameter": torch.nn.Parameter(base), "empty": base[:0],
    }  # fmt: skip
    torch.save(views, tmp_path / "views.pt")
    found = read_torch(tmp_path / "views.pt")
    assert found.keys() == views.keys()
    for name, tensor in views.items():
        if name != "empty":
            np.testing.assert_array_equal(found[name].map(), tensor.detach().numpy())
        assert found[name].shape == tuple(tensor.shape)


def test_what_is_refused(tmp_path: Path) -> None:
    made = model()
    state = original(made)
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "script.ckpt")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "module.ckpt")
    torch.save({"a": torch.ones(3).to_sparse()}, tmp_path / "sparse.ckpt")
    torch.save({"a": 3}, tmp_path / "numbers.ckpt")
    table = state["embedder.weight"]
    torch.save(state | {"embedder.weight": table.to(torch.int8), "embedder.weight_scaler": table[:, 0]}, tmp_path / "q")
    for name, told in {
        "old.ckpt": "before 1.6", "script.ckpt": "TorchScript", "module.ckpt": "'torch.nn.modules.linear.Linear'",
        "sparse.ckpt": "_rebuild_sparse_tensor", "numbers.ckpt": "'a' in the state dict is not a tensor",
        "q": "is quantised",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=told):
            open_source(tmp_path / name, "pytorch", given(tmp_path, made))


def test_the_configuration_is_the_released_one(tmp_path: Path) -> None:
    made = model()
    torch.save({"model_state_dict": original(made)}, tmp_path / "gemma.ckpt")
    convert(tmp_path / "gemma.ckpt", tmp_path / "hf", config=given(tmp_path, made))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf").to_dict()
    kept = made.config.to_dict()
    for key in kept.keys() - {"architectures", "dtype", "transformers_version", "_name_or_path"}:
        assert theirs[key] == kept[key], key
    assert (theirs["architectures"], theirs["dtype"]) == (["Gemma2ForCausalLM"], "bfloat16")
    assert open_checkpoint(tmp_path / "hf").config.query_pre_attn_scalar == 12
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 1, 0)
