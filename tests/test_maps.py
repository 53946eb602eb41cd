"""Test name maps and importers on output of llama.cpp, MLX-LM, TransformerLens and others for a conformance
checkpoint, and on files that fit no map. golden/conformance_gguf.py, mlx_port.py, transformer_lens_port.py and the
scripts in tests/recorded wrote the output."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refgemma.cli.main import main
from refgemma.config import Gemma2Config
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.modeling.pretrained import load
from refgemma.oracle.diagnose import Diagnosis, Report
from refgemma.oracle.engine import Instance
from refgemma.oracle.judge import Judged, Statistics
from refgemma.oracle.known_bugs import KnownBug
from refgemma.oracle.verdicts import CONFORMS, INCONCLUSIVE, PASS
from refgemma.precision import as_dtype, wide
from refgemma.trace.candidate import Call, Candidate, Tensor, is_known, load_trace
from refgemma.trace.evaltext import open_eval_callback
from refgemma.trace.name_maps import Rule, arrange, load_map, map_names, open_trace
from refgemma.trace.names import run_in_order, save_trace

RECORDED = Path(__file__).parent / "recorded"
CONFIG = Gemma2Config.from_pretrained(find_model("conformance"))
IDS = np.array([[2, 5, 9]])
SAMPLES = [("gemma_pytorch", 26, 6), ("litgpt", 27, 5), ("torchtune", 25, 11)]  # written by scoreboard/
FLAX = ("gemma", 28, 4)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return the output of llama-eval-callback for <bos>ABCDEFGHIJKLMNOPQRSTUVW."""
    (tmp_path / "llama.txt").write_bytes(gzip.decompress((RECORDED / "llama-eval-callback.txt.gz").read_bytes()))
    return tmp_path / "llama.txt"


def check(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "refgemma", "check", str(path), "--model", "conformance", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, json.loads(done.stdout)


def show(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["map", str(path), "--model", "conformance", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def test_a_pair_is_searched_for_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair of the first wrong tensor explains the other 22 fields, so they need no search."""
    searches: list[str] = []
    search = Diagnosis._find_pairs

    def count(self: Diagnosis, finding: Sequence[Instance]) -> list[KnownBug]:
        searches.append(finding[0].tensor)
        return search(self, finding)

    monkeypatch.setattr(Diagnosis, "_find_pairs", count)
    assert main(["check", str(llama), "--model", "conformance"]) == 1
    assert searches == ["layers.0.attention.scores"]


@pytest.mark.slow
def test_llama_cpp_scales_by_head_dim_and_looks_gelu_up(llama: Path) -> None:
    # Its gemma2.cpp has 1 / sqrt(head_dim) for every model but the 27B, and ggml's CPU GELU is a float16 table.
    code, found = check(llama)
    assert code == 1
    assert found["first_divergence"] == "layers.0.attention.scores"
    assert found["findings"][0]["named"] == "scale-head-dim + gelu-f16-table"
    judged = {t["tensor"]: t["verdict"] for t in found["tensors"]}
    assert {judged[f"layers.0.attention.{name}"] for name in ("q", "k", "v", "q_rot", "k_rot")} == {"PASS"}


def test_all_that_llama_cpp_prints_is_known(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = show(llama, capsys)
    assert (code, found["map"], found["unmatched"]) == (0, "llama.cpp", [])
    assert len(found["matched"]) == 84
    rows = {row["tensor"]: row for row in found["matched"]}
    assert rows["layers.2.post_feedforward_layernorm"]["from"] == "ffn_post_norm#2"
    assert rows["layers.3.attention.q_rot"]["shape"] == [1, 6, 24, 10]


def test_only_what_is_printed_is_known(llama: Path) -> None:
    candidate = load_trace(llama, CONFIG)
    assert candidate.call.input_ids[0, :4].tolist() == [2, 36, 37, 38]
    assert not candidate.inputs  # nothing whole, so nothing is computed from it
    q = candidate.tensors["layers.0.attention.q"]
    assert q.known is not None
    assert q.known.sum() == 36  # three at either end of 24 tokens, and of 60 numbers
    logits = candidate.tensors["logits"]
    assert logits.known is not None
    assert np.argwhere(logits.known).tolist() == [[0, 23, n] for n in (0, 1, 2, 94, 95, 96)]
    text = llama.read_text()
    first = re.search(r"-?\d+\.\d{4}", text[text.index("result_output = ") :])
    assert first is not None
    assert logits.numbers[0, 23, 0] == pytest.approx(float(first[0]))


@pytest.mark.parametrize("damage", ["a number lost", "cut off", "no tokens"])
def test_a_damaged_text_is_refused(damage: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = llama.read_text()
    start = text.index("Qcur-0 = ")
    row = text.index("[ ", start)
    changed = {
        "a number lost": text[:row] + "[ " + text[text.index(",", row) + 1 :],
        "cut off": text[: row + 30],
        "no tokens": text.replace("number of input tokens", "tokens"),
    }[damage]
    llama.write_text(changed)
    assert main(["check", str(llama), "--model", "conformance"]) == 2
    said = capsys.readouterr().err
    assert ("input_ids, the tokens of the run, are missing" if damage == "no tokens" else "Qcur-0 has shape") in said
    assert len(said.splitlines()) == 1


def test_partial_logits_never_conform() -> None:
    instance = Instance("logits", (), (), Judged(PASS, Statistics()))
    for known, verdict in ((None, CONFORMS), (5, INCONCLUSIVE), (97, CONFORMS)):
        mask = None if known is None else (np.arange(97) < known) & (np.arange(3) == 2)[:, None]
        logits = Tensor(np.zeros((1, 3, 97)), "float32", None if mask is None else mask[None])
        call = Call(IDS, np.arange(3)[None], np.ones((1, 3), bool), (3,))
        candidate = Candidate("", "float32", "metadata", call, {"logits": logits}, {}, ())
        assert Report(candidate, CONFIG, (instance,), (), (), lambda: ((), ()), ()).verdict == verdict


# --- MLX-LM -----------------------------------------------------------------------------------------------------------


def test_mlx_lm_ignores_the_window() -> None:
    code, found = check(RECORDED / "mlx-lm.safetensors")
    assert code == 1
    assert [f["named"] for f in found["findings"]] == ["swa-all-global"]
    assert found["findings"][0]["layers"] == [0, 2]  # those that should slide


def test_mlx_lm_is_right_in_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = show(RECORDED / "mlx-lm.safetensors", capsys)
    assert (code, len(found["matched"]), found["unmatched"]) == (0, 58, [])


def test_transformer_lens_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = check(RECORDED / "transformer-lens.safetensors")
    assert (code, found["verdict"], len(found["tensors"])) == (0, "conforms", 82)
    code, detect = show(RECORDED / "transformer-lens.safetensors", capsys)
    assert (code, len(detect["matched"]), len(detect["ignored"]), detect["unmatched"]) == (0, 82, 147, [])


@pytest.mark.parametrize(("name", "matched", "ignored"), [*SAMPLES, FLAX])
def test_a_port_of_the_scoreboard_is_known_and_conforms(
    name: str, matched: int, ignored: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # Layers 2 and 3 are left out. LitGPT's was given the right epsilon, torchtune's its norms in their places.
    code, found = show(RECORDED / f"{name}.safetensors", capsys)
    assert (code, len(found["matched"]), len(found["ignored"]), found["unmatched"]) == (0, matched, ignored, [])
    code, found = check(RECORDED / f"{name}.safetensors")
    assert (code, found["verdict"], len(found["tensors"])) == (0, "conforms", matched)


def test_the_cap_of_torchtunes_last_norm_is_named(tmp_path: Path) -> None:
    """Its released code caps the result of the last norm, and the logits are not capped."""
    tensors = load_file(RECORDED / "torchtune.safetensors")
    cap, rows = CONFIG.final_logit_softcapping, load("conformance").weights.embed_tokens
    capped = np.float32(cap * np.tanh(np.float64(tensors["norm.rms_norm"]) / cap))
    tensors |= dict.fromkeys(("norm", "norm.logit_capping"), capped)
    tensors["logits"] = np.float32(np.float64(capped) @ np.float64(rows).T)
    save_file(tensors, tmp_path / "port.safetensors", {"map": "torchtune", "dtype": "float32"})
    code, found = check(tmp_path / "port.safetensors")
    named = {finding["tensor"]: finding["named"] for finding in found["findings"]}
    assert (code, named) == (1, dict.fromkeys(("norm", "logits"), "final-softcap-on-hidden"))


# --- vLLM and SGLang --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the conformance checkpoints of two head sizes: vLLM's CPU kernels have no smaller one than 32."""
    folders = {size: tmp_path_factory.mktemp("small") / str(size) for size in (8, 32)}
    for size, folder in folders.items():
        assert main(["conformance", "-o", str(folder), "--head-dim", str(size)]) == 0
    return folders


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return shutil.copytree(RECORDED / "sglang", tmp_path / "sglang")


def check_small(path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["check", str(path), "--model", str(model), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_vllm_conforms(small: dict[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    # The residual stream is in two parts, and layers 1 to 3 are left out.
    code, found = check_small(RECORDED / "vllm.safetensors", small[32], capsys)
    assert (code, found["verdict"], found["unknown"]) == (0, "conforms", [])
    judged = {x["tensor"]: x["verdict"] for x in found["tensors"]}
    assert len(judged) == 17
    assert judged["layers.0.out"] == "EXACT"
    assert judged["layers.0.attention.k"] == judged["layers.0.feed_forward.up"] == "PASS"


def test_vllm_with_parts_exchanged_differs(
    small: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, path = load_file(RECORDED / "vllm.safetensors"), tmp_path / "port.safetensors"
    fused = tensors["model.layers.0.mlp.gate_up_proj"]
    tensors["model.layers.0.mlp.gate_up_proj"] = np.roll(fused, fused.shape[-1] // 2, axis=-1)
    save_file(tensors, path, {"map": "vllm", "dtype": "float32"})
    code, found = check_small(path, small[32], capsys)
    assert (code, found["first_divergence"]) == (1, "layers.0.feed_forward.gate")


def test_sglang_conforms(small: dict[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = check_small(RECORDED / "sglang", small[8], capsys)
    assert (code, found["verdict"], found["unknown"]) == (0, "conforms", [])
    assert found["shape"] == [1, 4]  # the last pass brings only the logits of the one before
    assert len(found["tensors"]) == 32
    assert found["engine"] == "SGLang, 2 tensor-parallel"


def test_processes_of_sglang_in_another_order_differ(
    dump: Path, small: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(dump.iterdir())
    parts = [folder.rename(dump / f"part{n}") for n, folder in enumerate((second, first))]
    for n, part in enumerate(parts):
        part.rename(dump / f"TP{n}_PP0_Rank{n}_pid7")
    code, found = check_small(dump, small[8], capsys)
    assert (code, found["first_divergence"]) == (1, "layers.0.attention.q")


def test_the_last_text_of_a_dump_is_read(dump: Path) -> None:
    config = Gemma2Config.from_pretrained(find_model("conformance"))
    for folder in list(dump.iterdir()):
        for n in range(3):
            shutil.copy(folder / f"Pass0000{n}.pt", folder / f"Pass0000{n + 3}.pt")
        (folder / "Pass00005.pt").unlink()  # the last text has one pass with logits
    assert open_trace(dump, config).entries["input_ids"].read().tolist() == [[2, 36, 37]]
    for folder in list(dump.iterdir()):
        for n in (0, 1):
            (folder / f"Pass0000{n}.pt").unlink()
        for n in (3, 4):
            (folder / f"Pass0000{n}.pt").unlink()
    with pytest.raises(InputError, match="no pass begins a text"):
        open_trace(dump, config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no passes", "the same passes"), ("a pass is missing", "the same passes"),
        ("a process is missing", "one folder for each"), ("two stages", "one pipeline stage"),
        ("other shapes", "has other shapes in some processes"), ("cut off", "damaged"),
        ("code", "do not trust the file"),
    ],
)  # fmt: skip
def test_a_damaged_dump_is_refused(damage: str, message: str, dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(dump.iterdir())
    match damage:
        case "no passes":
            for file in dump.glob("*/*.pt"):
                file.unlink()
        case "a pass is missing":
            (second / "Pass00001.pt").unlink()
        case "a process is missing":
            shutil.rmtree(first)
        case "two stages":
            second.rename(dump / "TP1_PP1_Rank1_pid7")
        case "other shapes":
            shutil.copy(second / "Pass00001.pt", second / "Pass00000.pt")
        case "cut off":
            raw = (first / "Pass00000.pt").read_bytes()
            (first / "Pass00000.pt").write_bytes(raw[: len(raw) // 2])
        case "code":
            with zipfile.ZipFile(first / "Pass00000.pt", "w") as file:
                file.writestr("archive/data.pkl", b"cposix\nsystem\n(S'false'\ntR.")
    assert main(["check", str(dump), "--model", "conformance"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_sum_that_is_not_rounded_before_its_norm_is_named(
    small: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compute the norms of vLLM's ``fused_add_rms_norm`` in bfloat16, from the bfloat16 tensors of a right model."""
    model, ids, path = load(str(small[32]), "bfloat16"), np.array([[2, 36, 37, 38, 39]]), tmp_path / "port.safetensors"
    run = dict(run_in_order(ids, model.weights, model.config))
    stream = run["embedded"]
    for n, weights in enumerate(model.weights.layers):
        total = wide(stream).astype(np.float64) + wide(run[f"layers.{n}.post_attention_layernorm"])
        normed = total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)
        name = f"layers.{n}.pre_feedforward_layernorm"
        run[name] = as_dtype(normed * (1 + wide(weights.pre_feedforward_layernorm)), "bfloat16")
        stream = run[f"layers.{n}.out"]
    kept = ("embedded", "middle", "out", "logits", "post_attention_layernorm", "pre_feedforward_layernorm")
    tensors = {name: x for name, x in run.items() if name.endswith(kept)}
    save_trace({"input_ids": ids, **tensors}.items(), path, {"dtype": "bfloat16"})
    code, found = check_small(path, small[32], capsys)
    assert (code, found["verdict"]) == (3, "noisy")
    assert found["findings"][0]["named"] == "norm-of-unrounded-sum"
    assert found["first_divergence"] == "layers.0.pre_feedforward_layernorm"


def test_a_sum_is_rounded_to_its_dtype(tmp_path: Path) -> None:
    path, one, other = tmp_path / "port.safetensors", np.float32(1), np.float32(2**-9 + 2**-20)
    pair = {"model.layers.0": np.full((3, 30), one), "model.layers.0#1": np.full((3, 30), other)}
    expected = {"F32": one + other, "BF16": one}  # one and the next bfloat16 number are 2^-7 apart
    for dtype, total in expected.items():
        kind = ml_dtypes.bfloat16 if dtype == "BF16" else np.float32
        save_file({"input_ids": IDS} | {name: x.astype(kind) for name, x in pair.items()}, path, {"map": "vllm"})
        entry = open_trace(path, CONFIG).entries["layers.0.out"]
        assert (entry.dtype, entry.shape) == (dtype, (1, 3, 30))
        assert (entry.read() == total).all()
    save_file({"input_ids": IDS, "model.layers.0": pair["model.layers.0"]}, path, {"map": "vllm"})
    assert "layers.0.out" not in open_trace(path, CONFIG).entries  # half of the sum is not the sum
    pair["model.layers.0#1"] = pair["model.layers.0#1"][:1]
    save_file({"input_ids": IDS, **pair}, path, {"map": "vllm"})
    assert "layers.0.out" not in open_trace(path, CONFIG).entries  # one row does not fit three


# --- several calls ----------------------------------------------------------------------------------------------------


def test_tensors_of_several_calls_keep_their_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load("conformance")
    run = dict(run_in_order(IDS, model.weights, model.config))
    tensors = {"input_ids": IDS} | {
        f"calls.{n}.{name}": run[ours][:, start:end]
        for n, (start, end) in enumerate(((0, 2), (2, 3)))
        for name, ours in (("lm_head", "raw_logits"), ("logits", "logits"), ("transformer.ln_f", "norm"))
    }
    path = tmp_path / "port.safetensors"
    save_file(tensors, path, {"map": "litgpt", "dtype": "float32", "calls": "[2, 1]"})
    code, found = show(path, capsys)
    assert (code, found["unmatched"]) == (0, [])
    assert sorted(row["tensor"] for row in found["matched"])[:2] == ["calls.0.logits", "calls.0.norm"]
    code, found = check(path)
    assert (code, len(found["tensors"])) == (0, 3)
    tensors["calls.1.lm_head"] = tensors["calls.1.lm_head"] + 1
    save_file(tensors, path, {"map": "litgpt", "dtype": "float32", "calls": "[2, 1]"})
    assert check(path)[1]["first_divergence"] == "raw_logits"


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", map_names())
def test_a_map_is_whole(name: str) -> None:
    names = load_map(name)
    assert names.name == name
    assert names.learned_from
    tensors = [rule.tensor for rule in names.rules]
    assert len(set(tensors)) == len(tensors)
    for rule in names.rules:
        assert is_known(rule.tensor.format(layer=1), CONFIG), rule
        assert not rule.layout or "->" in rule.layout


def test_parts_of_one_tensor_are_taken_apart() -> None:
    # gemma_pytorch keeps queries, keys and values in one product, in this order.
    q, k, v = (np.full((1, 3, heads * 10), n, np.float32) for n, heads in enumerate((6, 3, 3)))
    rules = [r for r in load_map("gemma_pytorch").rules if r.pattern.endswith("qkv_proj")]
    whole = np.concatenate([q, k, v], axis=-1)
    for n, (rule, heads) in enumerate(zip(rules, (6, 3, 3), strict=True)):
        part = arrange(whole, rule, CONFIG)
        assert part.shape == (1, heads, 3, 10)
        assert (part == n).all()
    with pytest.raises(InputError, match="has 11 heads; it must have 12"):
        arrange(whole[..., :110], rules[0], CONFIG)


def test_nothing_is_matched_by_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = np.zeros((1, 3, 30), np.float32)
    named = {"input_ids": IDS, "model.norm": norm, "model.Norm": norm, "model.layers.00": norm, "model.layers.9": norm}
    path = tmp_path / "port.safetensors"
    save_file(named, path)
    code, found = show(path, capsys, "--map", "transformers")
    assert code == 4
    assert [row["tensor"] for row in found["matched"] if not row["problem"]] == ["norm"]
    assert [row["tensor"] for row in found["matched"] if row["problem"]] == ["layers.9.out"]
    assert found["unmatched"] == ["model.Norm", "model.layers.00"]
    assert main(["map", str(path)]) == 2
    assert "does not name its map" in capsys.readouterr().err


def test_a_map_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"name": "mine", "says": "", "learned_from": "", "run_on": "", "ignored": {},
             "rules": [{"pattern": "final", "tensor": "norm", "layout": "hidden seq -> 1 seq hidden"},
                       {"pattern": "last", "tensor": "norm"}]}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(about))
    path = tmp_path / "port.safetensors"
    save_file({"input_ids": IDS, "final": np.arange(90, dtype=np.float32).reshape(30, 3)}, path)
    file = open_trace(path, CONFIG, str(tmp_path / "mine.json"))
    assert file.entries["norm"].shape == (1, 3, 30)
    assert file.entries["norm"].read()[0, 1, 2] == 7
    save_file({"input_ids": IDS, "final": np.zeros((30, 3)), "last": np.zeros((1, 3, 30))}, path)
    with pytest.raises(InputError, match="gives norm for both final and last"):
        open_trace(path, CONFIG, str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").write_text('{"rules": 3}')
    assert main(["check", str(path), "--model", "conformance", "--map", str(tmp_path / "mine.json")]) == 2
    assert "is not a name map" in capsys.readouterr().err


def test_other_axes_than_the_map_says_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    q = np.zeros((1, 3, 61), np.float32)
    save_file({"input_ids": IDS, "model.layers.0.self_attn.q_proj": q}, path, {"map": "transformers"})
    candidate = load_trace(path, CONFIG)
    assert not candidate.tensors
    assert "has shape (1, 3, 61); it must be (1, 6, 3, 10)" in candidate.refused["layers.0.attention.q"]


def test_one_row_is_the_last(tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    logits = np.arange(97, dtype=np.float32)[None]
    save_file({"input_ids": IDS, "sampler": logits}, path, {"map": "gemma_pytorch", "dtype": "float32"})
    found = load_trace(path, CONFIG).tensors["logits"]
    assert found.known is not None
    assert found.known[0].all(axis=-1).tolist() == [False, False, True]
    assert (found.numbers[0, 2] == np.arange(97)).all()


def test_a_rule_without_a_layout_changes_nothing() -> None:
    x = load_file(RECORDED / "mlx-lm.safetensors")["model.norm"]
    assert arrange(x, Rule("model.norm", "norm"), CONFIG) is x


def test_tensors_of_one_name_are_numbered(llama: Path) -> None:
    entries = open_eval_callback(llama).entries
    assert [entries[name].shape for name in ("Qcur-0", "Qcur-0#1", "Qcur-0#2")] == [
        (1, 1, 24, 60), (1, 24, 6, 10), (1, 24, 6, 10)]  # fmt: skip
