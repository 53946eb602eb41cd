"""Test synthetic weights: the same bytes everywhere, for any requested rows; and folders of synthetic weights."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refgemma
from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.config import Gemma2Config
from refgemma.precision import BF16, bf16
from refgemma.weights import save as writer
from refgemma.weights.parameters import named_weights, tensor_shapes
from refgemma.weights.synthetic import HEAD_POWERS, Synthetic, raw_bytes, synthetic_weights, write_synthetic

CONFIG = Gemma2Config(
    vocab_size=70, hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10,
)  # fmt: skip


def test_the_bytes_are_these_on_every_machine() -> None:
    """Hash the first megabyte of a tensor of the 9B; this would show a change of NumPy's generator."""
    found = hashlib.sha256(raw_bytes("model.layers.7.mlp.up_proj.weight", 0, 2**20).tobytes()).hexdigest()
    assert found == "4af9f1b6c8b008df04ff08ab3fa08a8cfccfe42d0f6dd54c6f8ba463fc7054db"


@given(st.integers(0, 5000), st.integers(0, 300))
def test_any_part_is_cut_from_the_same_stream(start: int, count: int) -> None:
    np.testing.assert_array_equal(raw_bytes("a", start, count), raw_bytes("a", 0, start + count)[start:])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(name: str, data: st.DataObject) -> None:
    tensor = Synthetic(name, tensor_shapes(CONFIG)[name], CONFIG)
    whole = tensor[:]
    start = data.draw(st.integers(0, len(whole)))
    stop, step = data.draw(st.integers(0, len(whole))), data.draw(st.integers(1, 4))
    np.testing.assert_array_equal(tensor[start:stop:step], whole[start:stop:step])
    rows = np.array(data.draw(st.lists(st.lists(st.integers(0, len(whole) - 1), min_size=2, max_size=2), min_size=1)))
    np.testing.assert_array_equal(tensor[rows], whole[rows])


def test_weights_are_exact_in_bfloat16() -> None:
    halves = named_weights(synthetic_weights(CONFIG, "bfloat16"), CONFIG)
    for name, tensor in named_weights(synthetic_weights(CONFIG), CONFIG).items():
        numbers = tensor[:]
        np.testing.assert_array_equal(np.asarray(bf16(numbers)), numbers, err_msg=name)
        np.testing.assert_array_equal(np.asarray(halves[name][:]), numbers, err_msg=name)
        assert isinstance(halves[name][:], BF16)
        assert np.unique(numbers).size > 10


def test_heads_are_of_several_degrees_of_sharpness() -> None:
    queries = synthetic_weights(CONFIG).layers[0].q_proj.reshape(6, 10, 36)
    # 360 numbers a head: the largest is within a few per cent of the largest there is.
    degrees = np.log2(np.abs(queries).max(axis=(1, 2)) / (128 * 2.0**-12))
    np.testing.assert_array_equal(degrees.round(), HEAD_POWERS[:6])


def test_a_folder_is_the_same_weights(tmp_path: Path) -> None:
    write_synthetic(CONFIG, tmp_path / "synth", max_shard_size=20_000)
    found = refgemma.open_checkpoint(tmp_path / "synth")
    assert found.config == CONFIG
    made = named_weights(synthetic_weights(CONFIG), CONFIG)
    assert found.tensors.keys() == made.keys()
    for name, tensor in made.items():
        np.testing.assert_array_equal(found.tensors[name].read("float32"), tensor[:])
        assert found.tensors[name].dtype.name == "bfloat16"


def test_an_interrupted_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file fails; then nothing can be opened, and the next run does not write the first file again."""
    blocks, written = Synthetic.__getitem__, []

    def failing(tensor: Synthetic, rows: object) -> object:
        if tensor.name.startswith("model.layers.1.") and not written:
            raise KeyboardInterrupt
        written.extend([tensor.name] if written else [])
        return blocks(tensor, rows)

    monkeypatch.setattr(Synthetic, "__getitem__", failing)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(CONFIG, tmp_path, max_shard_size=20_000)
    with pytest.raises(refgemma.CheckpointError):
        refgemma.open_checkpoint(tmp_path)
    first = next((tmp_path / ".refgemma-partial").glob("model-00001-*"))
    inode = first.stat().st_ino
    monkeypatch.setattr(Synthetic, "__getitem__", blocks)
    write_synthetic(CONFIG, tmp_path, max_shard_size=20_000)
    assert next(tmp_path.glob("model-00001-*")).stat().st_ino == inode
    assert refgemma.open_checkpoint(tmp_path).config == CONFIG


def test_nothing_unchecked_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is interrupted while reading back, then a byte is changed; the next run finds the fault, and later runs
    repair it."""
    checked = writer.check_written

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "check_written", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(CONFIG, tmp_path, max_shard_size=20_000)
    with pytest.raises(refgemma.CheckpointError):
        refgemma.open_checkpoint(tmp_path)
    monkeypatch.setattr(writer, "check_written", checked)
    file = next((tmp_path / writer.STAGING).glob("model-00002-*"))
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    file.write_bytes(bytes(damaged))
    with pytest.raises(refgemma.CheckpointError, match=rf"{file.name}: .* differs from row .* when read back"):
        write_synthetic(CONFIG, tmp_path, max_shard_size=20_000)
    with pytest.raises(refgemma.CheckpointError):
        refgemma.open_checkpoint(tmp_path)
    file.unlink()
    write_synthetic(CONFIG, tmp_path, max_shard_size=20_000)
    assert refgemma.open_checkpoint(tmp_path).config == CONFIG
    assert next(tmp_path.glob("model-00002-*")).read_bytes() == whole


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemma2Config, "preset", lambda _: CONFIG)
    assert main(["synth", "9b", "-o", str(tmp_path / "a"), "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["weights"] == "synthetic"
    assert main(["synth", "9b", "-o", str(tmp_path / "a")]) == MISUSE
    assert "give an empty folder, or remove this one first" in capsys.readouterr().err
