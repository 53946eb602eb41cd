"""Test written checkpoints: read back bit for bit by safetensors' own loader, complete or absent, and continued after
an interruption."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from refgemma.modeling.classes import Gemma2ForCausalLM
from refgemma.precision import bf16
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.save import (
    FILE_DTYPES,
    STAGING,
    OutputTensor,
    as_stored,
    check_written,
    parse_size,
    split_into_shards,
    write_checkpoint,
)


def outputs(seed: int = 0, dtype: str = "bfloat16") -> list[OutputTensor]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (7, 5), "b": (3,), "c": (1, 4), "d": (40, 5)}
    return [OutputTensor(name, dtype, shape, bf16(rng.standard_normal(shape))) for name, shape in shapes.items()]


def loaded(folder: Path) -> dict[str, Any]:
    files = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
        if (folder / "model.safetensors.index.json").exists()
        else ["model.safetensors"]
    )
    return {name: x for file in set(files) for name, x in load_file(folder / file).items()}


def same(folder: Path, wanted: list[OutputTensor]) -> bool:
    found = loaded(folder)
    return found.keys() == {o.name for o in wanted} and all(
        found[o.name].dtype == FILE_DTYPES[o.dtype]
        and np.array_equal(found[o.name].astype(np.float64), np.asarray(o.rows))
        for o in wanted
    )


@pytest.mark.parametrize("dtype", list(FILE_DTYPES))
@pytest.mark.parametrize("limit", ["50GB", 100, 1])
def test_written_as_safetensors_reads_it(tmp_path: Path, dtype: str, limit: int | str) -> None:
    wanted = outputs(dtype=dtype)
    write_checkpoint(tmp_path, wanted, limit)
    assert same(tmp_path, wanted)
    check_written(tmp_path, wanted)
    for file in tmp_path.glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert not (tmp_path / STAGING).exists()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 100))
def test_shards_are_full_but_not_too_full(lengths: list[int], limit: int) -> None:
    named = [OutputTensor(str(n), "float32", (length,), None) for n, length in enumerate(lengths)]
    shards = split_into_shards(named, limit)
    assert [o for part in shards.values() for o in part] == named
    sizes = [[o.nbytes for o in part] for part in shards.values()]
    assert all(sum(part) <= limit or len(part) == 1 for part in sizes)
    assert all(sum(part) + following[0] > limit for part, following in itertools.pairwise(sizes))


@pytest.mark.parametrize("size", ["", "5 parsecs", 0, -1, "0GB", True, None, "1e3"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(CheckpointError, match=r"max_shard_size is .*5GB"):
        parse_size(size)


def test_rounding_is_to_nearest_even() -> None:
    exact = np.array([1.0 + 2**-8, 1.0 + 3 * 2**-8, 1 + 2**-8 + 2**-20])  # two ties, and a little above one
    assert as_stored(exact, "bfloat16").astype(np.float64).tolist() == [1.0, 1.0 + 2**-6, 1.0 + 2**-7]
    assert as_stored(exact.astype(ml_dtypes.bfloat16), "bfloat16").dtype == ml_dtypes.bfloat16


def test_old_weights_are_replaced_whole(tmp_path: Path) -> None:
    """No old file stays, for any numbers of old and new files."""
    for limit in ("1GB", 100, 1, "1GB"):
        wanted = outputs(seed=hash(limit) % 1000)
        write_checkpoint(tmp_path, wanted, limit)
        assert same(tmp_path, wanted)
        count = len(list(tmp_path.iterdir()))
        assert count == (1 if limit == "1GB" else len(split_into_shards(wanted, parse_size(limit))) + 1)


class Failing:
    """Rows that raise an error before all are read."""

    shape = (40, 5)

    def __getitem__(self, rows: slice) -> Any:
        raise CheckpointError("the source is damaged")


def test_a_failure_leaves_the_old_weights_and_nothing_else(tmp_path: Path) -> None:
    old = outputs()
    write_checkpoint(tmp_path, old, 100)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="damaged"):
        write_checkpoint(tmp_path, [*outputs(1)[:3], OutputTensor("d", "bfloat16", (40, 5), Failing())], 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert same(tmp_path, old)


class Counted:
    """Rows that count how often they are read, and fail on request."""

    def __init__(self, rows: Any, fail: bool = False) -> None:
        self.rows, self.fail, self.reads, self.shape = rows, fail, 0, rows.shape

    def __getitem__(self, rows: slice) -> Any:
        self.reads += 1
        if self.fail:
            raise KeyboardInterrupt
        return self.rows[rows]


def test_an_interrupted_run_is_continued(tmp_path: Path) -> None:
    whole = outputs()
    rows = [Counted(o.rows, fail=o.name == "d") for o in whole]
    counted = [OutputTensor(o.name, o.dtype, o.shape, r) for o, r in zip(whole, rows, strict=True)]
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, counted, 100, fingerprint="this source")
    with pytest.raises(CheckpointError, match="has no config"):
        open_checkpoint(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    rows[3].fail = False
    write_checkpoint(tmp_path, counted, 100, fingerprint="this source")
    assert same(tmp_path, whole)
    assert [r.reads for r in rows] == [2, 2, 2, 3]  # once to be written, "d" in vain before, and once to be compared


def test_another_source_begins_anew(tmp_path: Path) -> None:
    first = [OutputTensor(o.name, o.dtype, o.shape, Counted(o.rows, fail=o.name == "d")) for o in outputs()]
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, first, 100, fingerprint="this source")
    other = outputs(seed=1)
    write_checkpoint(tmp_path, other, 100, fingerprint="another source")
    assert same(tmp_path, other)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, outputs())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, but the disk has 0\.0 GB left"):
        write_checkpoint(tmp_path, outputs(1))
    assert same(tmp_path, outputs())


@pytest.mark.parametrize("limit", ["50GB", 100])
def test_what_the_disk_has_made_of_it_is_checked(tmp_path: Path, limit: int | str) -> None:
    wanted = outputs()
    write_checkpoint(tmp_path, wanted, limit)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor 'd' differs from row 0 on when read back"):
        check_written(tmp_path, wanted)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing after writing"):
        check_written(tmp_path, wanted)


def test_a_killed_run_leaves_nothing_that_can_be_read(tmp_path: Path) -> None:
    """A run that is killed while writing a shard leaves no weights, and the next run finishes."""
    program = f"""
import sys, time
import numpy as np
from refgemma.weights.save import OutputTensor, write_checkpoint
class Slow:
    def __getitem__(self, rows):
        print("reading", flush=True)
        time.sleep(60)
outputs = [OutputTensor("a", "float32", (3,), np.ones(3)), OutputTensor("b", "float32", (3,), Slow())]
write_checkpoint({str(tmp_path)!r}, outputs, 1, fingerprint="x")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [STAGING]
    wanted = [OutputTensor(name, "float32", (3,), np.ones(3)) for name in "ab"]
    write_checkpoint(tmp_path, wanted, 1, fingerprint="x")
    assert same(tmp_path, wanted)


def test_what_a_killed_run_left_takes_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = tmp_path / STAGING
    staging.mkdir()
    (staging / "state.json").write_text("x")
    (staging / ".model.safetensors.1.part").write_bytes(bytes(1000))
    usage, left = shutil.disk_usage, []

    def measure(folder: Path) -> Any:
        left.append(list(folder.glob("*.part")))
        return usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", measure)
    write_checkpoint(tmp_path, [OutputTensor("a", "float32", (3,), np.ones(3))], fingerprint="x")
    assert left == [[]]


def test_a_model_read_from_disk_is_saved_a_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgemma.weights.initial.RESIDENT_BYTES", 0)
    model = Gemma2ForCausalLM.from_pretrained("tiny")
    reads: list[int] = []
    layers = type(model.weights.layers)
    original = layers.__getitem__

    def noted(self: Any, layer: int) -> Any:
        reads.append(layer)
        return original(self, layer)

    monkeypatch.setattr(layers, "__getitem__", noted)
    model.save_pretrained(tmp_path, "1MB")
    assert reads == [0, 1, 2, 3, 4, 5]
    again = Gemma2ForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor)


def test_a_model_is_saved_onto_the_folder_it_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gemma2ForCausalLM.from_pretrained("tiny", dtype="bfloat16").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("refgemma.weights.initial.RESIDENT_BYTES", 0)
    Gemma2ForCausalLM.from_pretrained(tmp_path, dtype="auto").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
