"""Test refgemma check, and its exit codes, on files that a CI job or a tired person may give."""

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refgemma import ops
from refgemma.cli.main import main
from refgemma.config import Gemma2Config
from refgemma.hub import find_model
from refgemma.precision import as_dtype
from refgemma.trace.candidate import load_trace
from refgemma.trace.names import save_trace

IDS = np.array([[2, 5, 9, 30, 31]])
CONFIG = Gemma2Config.from_pretrained(find_model("conformance"))
GIB = 2**30


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, np.ndarray]:
    """Return a run of the conformance checkpoint, as a port would write it."""
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    assert main(["trace", "--ids", ",".join(map(str, IDS[0])), "--model", "conformance", "-o", str(path)]) == 0
    return load_file(path)


def check(path: Path, *options: str) -> int:
    return main(["check", str(path), "--model", "conformance", *options])


def process(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, where shapes are not checked at each call."""
    command = [sys.executable, "-W", "error", "-m", "refgemma", "check", str(path), "--model", "conformance", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(tensors: Mapping[str, Any], folder: Path, **metadata: str) -> Path:
    save_trace(tensors.items(), folder / "port.safetensors", {"dtype": "float32"} | metadata)
    return folder / "port.safetensors"


# --- exit codes -------------------------------------------------------------------------------------------------------


def half_logits(run: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return logits rounded to bfloat16 before the cap, as in old transformers: different rounding, but the same
    model."""
    raw = np.asarray(as_dtype(run["raw_logits"], "bfloat16"), np.float32)
    return dict(run) | {"raw_logits": raw, "logits": ops.soft_cap(raw, CONFIG.final_logit_softcapping)}


@pytest.mark.parametrize(
    ("code", "verdict", "change"),
    [
        (0, "conforms", lambda run: run),
        (1, "differs", lambda run: run | {"logits": run["raw_logits"]}),
        (3, "noisy", half_logits),
        (4, "inconclusive", lambda run: {name: x for name, x in run.items() if name != "logits"}),
    ],
)
def test_a_verdict_has_its_exit_code(
    code: int, verdict: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    run: Mapping[str, np.ndarray], tmp_path: Path,
) -> None:  # fmt: skip
    done = process(written(change(dict(run)), tmp_path), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"], found["exit_code"], done.stderr) == (code, verdict, code, "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{sys.executable} -c 'raise SystemExit(7)'", "ended with exit code 7"),
        (f"{sys.executable} -c pass", "did not write"),
        ("/no/such/program", "cannot be run"),
        ("'", "cannot be run"),
        ("", "empty"),
    ],
)
def test_a_backend_that_fails_is_5(
    command: str, said: str, run: Mapping[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(run, tmp_path)  # of an earlier run: it must not be taken for this one's
    assert check(path, "--run", command) == 5
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out


def test_a_backend_is_run_and_what_it_prints_is_no_report(run: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    path = written(run, tmp_path)
    path.rename(tmp_path / "kept")
    program = f"import shutil; print('hello'); shutil.copy({str(tmp_path / 'kept')!r}, {str(path)!r})"
    (tmp_path / "port.py").write_text(program)
    done = process(path, "--json", "--run", f"{sys.executable} {tmp_path / 'port.py'}")
    assert (done.returncode, json.loads(done.stdout)["verdict"], done.stderr) == (0, "conforms", "hello\n")


# --- bad files --------------------------------------------------------------------------------------------------------


def refused(path: Path, said: str, capsys: pytest.CaptureFixture[str], *options: str) -> None:
    assert check(path, *options) == 2
    captured = capsys.readouterr()
    assert said in captured.err, captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out


LOGITS = np.zeros((1, 2, 97), np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"input_ids": np.array([[2.0, 5.0]], np.float32), "logits": LOGITS}, {}, "it must be integers"),
        ({"input_ids": np.array([[2, 5]], ml_dtypes.bfloat16), "logits": LOGITS}, {}, "it must be integers"),
        ({"input_ids": np.zeros((1, 0), np.int64), "logits": LOGITS}, {}, "input_ids"),
        ({"input_ids": np.zeros((1, 1, 2), np.int64), "logits": LOGITS}, {}, "input_ids"),
        ({"input_ids": np.array([[2, -5]]), "logits": LOGITS}, {}, "the vocabulary has"),
        ({"input_ids": np.array([[2, 5]]), "attention_mask": np.ones((1, 3), np.int64), "logits": LOGITS}, {},
         "attention_mask"),
        ({"input_ids": np.array([[2, 5]]), "position_ids": np.zeros((1, 3), np.int64), "logits": LOGITS}, {},
         "position_ids"),
        ({"input_ids": np.array([[2, 5]]), "logits": LOGITS}, {"dtype": "int4"}, "dtype is 'int4'"),
        ({"input_ids": np.array([[2, 5]]), "logits": LOGITS}, {"calls": "[1e400]"}, "calls"),
        ({"input_ids": np.array([[2, 5]]), "logits": LOGITS}, {"calls": "two"}, "calls"),
        ({"input_ids": np.array([[2, 5]]), "logits": LOGITS}, {"calls": "[]"}, "calls"),
        ({"input_ids": np.array([[2, 5]]), "logits": LOGITS}, {"map": "nobody's"}, "the metadata names the map"),
        ({"input_ids": np.array([[2, 5]]), "layers.0.nothing": LOGITS}, {}, "has no tensor of this model"),
        ({"input_ids": np.array([[2, 5]]), "model.norm": np.zeros((1, 2, 30), np.float32)}, {},
         "--map transformers knows 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_at_all_is_2(
    tensors: dict[str, np.ndarray], metadata: dict[str, str], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_file(tensors, tmp_path / "port.safetensors", metadata)
    refused(tmp_path / "port.safetensors", said, capsys)


def test_places_that_are_no_files_are_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path, "is a folder", capsys)
    refused(tmp_path / "none", "no such file", capsys)
    refused(Path("/dev/null"), "not a regular file", capsys)
    # Another file's path in place of tensors, a trace's header alone, JSON, a pickle, an image.
    for n, content in enumerate((b"../port.safetensors\n", b"{}", b"\x80\x04\x95", b"\x89PNG\r\n\x1a\n" + bytes(64))):
        (tmp_path / f"{n}").write_bytes(content)
        refused(tmp_path / f"{n}", "not a complete safetensors file", capsys)


def test_a_file_cut_off_anywhere_is_2(
    run: Mapping[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written(run, tmp_path).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        refused(tmp_path / "cut", "not a complete safetensors file", capsys)


def sparse(path: Path, header: Mapping[str, Any], size: int) -> Path:
    """Write a sparse file of `size` bytes: a header and a hole."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return path


def test_four_gigabytes_of_junk_are_2_and_never_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(4 * GIB)
    refused(tmp_path / "zeros", "not a complete safetensors file", capsys)
    ids = {"dtype": "I64", "shape": [1, GIB // 2], "data_offsets": [0, 4 * GIB]}
    refused(sparse(tmp_path / "ids", {"input_ids": ids}, 4 * GIB), "the limit is", capsys)
    small = {"input_ids": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]}}
    for name in ("junk", "logits"):  # a tensor that is none of ours, and one of ours that is far too large
        tensor = {"dtype": "F32", "shape": [1, 1, GIB], "data_offsets": [8, 8 + 4 * GIB]}
        path = sparse(tmp_path / name, small | {name: tensor}, 8 + 4 * GIB)
        candidate = load_trace(path, CONFIG)
        assert not candidate.tensors
        assert (candidate.unknown, tuple(candidate.refused)) in ((("junk",), ()), ((), ("logits",)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 500_000  # kB


# --- bad tensors in a good file ---------------------------------------------------------------------------------------


def test_bad_tensors_are_invalid_with_a_reason_and_the_others_are_judged(
    run: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    wrong = dict(run)
    wrong["layers.0.attention.out"] = run["layers.0.attention.out"].copy()
    wrong["layers.0.attention.out"][0, 3, 4] = np.nan
    wrong["raw_logits"] = run["raw_logits"].astype(np.int32)
    wrong["embedded"] = run["embedded"].transpose(0, 2, 1).copy()
    wrong["layers.0.out"] = run["layers.0.out"][0, 0]
    wrong["layers.1.out"] = run["layers.1.out"].astype(ml_dtypes.float8_e4m3fn)
    wrong["layers.2.out"] = np.zeros((0,), np.float32)
    wrong["layers.3.out"] = np.full_like(run["layers.3.out"], -np.inf)
    wrong["layers.01.out"] = wrong["layers.-1.out"] = wrong["layers.4.out"] = run["layers.3.out"]
    save_file(wrong, tmp_path / "port.safetensors", {"dtype": "float32"})
    done = process(tmp_path / "port.safetensors", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    said = {t["tensor"]: (t["verdict"], t["note"]) for t in found["tensors"] if t["verdict"] == "INVALID"}
    notes = {
        "layers.0.attention.out": "1 element is nan", "raw_logits": "stored as I32",
        "embedded": "has shape (1, 30, 5)", "layers.0.out": "has shape (30,)",
        "layers.1.out": "stored as F8_E4M3", "layers.2.out": "has shape (0,)", "layers.3.out": "150 elements are -inf",
    }  # fmt: skip
    assert {name: verdict for name, (verdict, _) in said.items()} == dict.fromkeys(notes, "INVALID")
    for name, note in notes.items():
        assert note in said[name][1]
    strange = ["layers.-1.out", "layers.01.out", "layers.4.out"]
    assert sorted(found["unknown"]) == strange
    assert [remark for remark in found["remarks"] if "not tensors of this model" in remark]
    good = [t["tensor"] for t in found["tensors"] if t["verdict"] in ("EXACT", "PASS")]
    assert "layers.0.attention.mixed" in good
    assert not set(good) & set(notes)


def test_missing_axes_of_length_1_are_added(run: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    """A port for one text has no batch, and a port like transformers has tables of (batch, seq, head_dim)."""
    tensors = {name: x[:, 0] if name in ("cos", "sin") else x for name, x in run.items()}
    assert load_trace(written({"input_ids": IDS} | tensors, tmp_path), CONFIG).refused == {}
    tensors = {name: x[0, 0] if name in ("cos", "sin") else x[0] for name, x in run.items()}
    candidate = load_trace(written(tensors | {"input_ids": IDS[0]}, tmp_path), CONFIG)
    assert candidate.refused == {}
    for name in candidate.tensors:
        np.testing.assert_array_equal(candidate.tensors[name].numbers, run[name])


def test_exchanged_axes_are_named(run: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    tensors = {"input_ids": IDS, "layers.0.attention.q": run["layers.0.attention.q"].swapaxes(1, 2)}
    refused = load_trace(written(tensors, tmp_path), CONFIG).refused
    assert refused == {
        "layers.0.attention.q": "has shape (1, 5, 6, 10); it must be (1, 6, 5, 10): (batch, heads, seq, head_dim); "
        "transpose its axes 1 and 2"
    }


def test_calls_that_do_not_fit_are_invalid(run: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    one, two = run["norm"][:, :3], run["norm"][:, 3:]
    tensors = {"input_ids": IDS, "calls.0.norm": one, "calls.1.norm": two[..., :7], "calls.0.logits": run["logits"]}
    candidate = load_trace(written(tensors, tmp_path, calls="[3, 2]"), CONFIG)
    assert candidate.refused == {
        "norm": "has different axes in some calls: (1, 3, 30), (1, 2, 7)",
        "logits": "has shape (1, 5, 97); it must be (1, 3, 97): (batch, seq, vocab)",
    }  # fmt: skip
