"""Test the repro file: below its limit, with the worst element and all its inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import refgemma
from refgemma.cli.main import main
from refgemma.inputs import InputError
from refgemma.model import forward
from refgemma.oracle.engine import Engine, Instance
from refgemma.oracle.repro import HEADER, LIMIT, make_repro
from refgemma.precision import as_dtype
from refgemma.trace.candidate import load_trace
from refgemma.trace.names import FIELDS, named_tensors, save_trace
from refgemma.weights.conformance import CONFIG
from refgemma.weights.initial import initial_weights

IDS = np.random.default_rng(0).integers(4, 97, (2, 33))
FIELDS_WITH_INPUTS = [field for field in FIELDS if field not in ("cos", "sin", "embedded")]


def spoilt(field: str, dtype: str, folder: Path) -> tuple[Engine, Instance, tuple[int, ...]]:
    """Check a run whose second text has one wrong element; return also its index."""
    model = refgemma.load("conformance", dtype)
    name = field if field in FIELDS[-3:] else f"layers.2.{field}"
    tensors = dict(named_tensors(forward(IDS, model.weights, model.config)))
    wrong = np.array(tensors[name], np.float32)
    place = (1, *(n // 2 for n in wrong.shape[1:-1]), wrong.shape[-1] // 3)
    wrong[place] += 1
    save_trace(({"input_ids": IDS} | tensors | {name: as_dtype(wrong, dtype)}).items(), folder / "p.safetensors",
               {"dtype": dtype})  # fmt: skip
    work = Engine(load_trace(folder / "p.safetensors", model.config), model.weights, model.config)
    return work, next(i for i in work.instances if i.tensor == name), place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("field", FIELDS_WITH_INPUTS)
def test_whatever_is_cut_away_the_worst_element_stays(field: str, dtype: str, tmp_path: Path) -> None:
    work, instance, place = spoilt(field, dtype, tmp_path)
    assert instance.judged.statistics.place == place
    whole = work.usual.result(instance.tensor)
    for limit in (LIMIT, HEADER + 30_000, HEADER + 9_000):
        tensors, about = make_repro(work, instance, limit)
        save_trace(tensors.items(), tmp_path / "bundle", about)
        assert (tmp_path / "bundle").stat().st_size <= limit
        assert set(tensors) == {*instance.sources, instance.tensor, "expected"}
        assert about["inputs"].split(",") == list(instance.sources)
        found, expected = np.asarray(tensors[instance.tensor], np.float64), np.asarray(tensors["expected"])
        assert found.shape == expected.shape
        assert np.max(np.abs(found - expected)) > 0.5
        assert whole[place] in expected
    with pytest.raises(InputError, match="the limit is 1000"):
        make_repro(work, instance, 1000)


def test_scores_can_be_computed_again(tmp_path: Path) -> None:
    work, instance, _ = spoilt("attention.scores", "float32", tmp_path)
    tensors, about = make_repro(work, instance, HEADER + 2_000)
    q, k = (np.asarray(tensors[f"layers.2.attention.{name}"], np.float64) for name in ("q_rot", "k_rot"))
    assert json.loads(about["kept"])["seq"] == [16, 17]
    assert (q.shape[:3], k.shape[:2]) == ((1, 1, 1), (1, 1))
    np.testing.assert_allclose(q @ k.swapaxes(-1, -2) * 13**-0.5, tensors["expected"], rtol=1e-12)


def test_a_large_vocabulary_is_cut_to_below_a_megabyte(tmp_path: Path) -> None:
    config = CONFIG.changed(vocab_size=256_000, dtype="float32")
    weights = initial_weights(config, seed=0)
    ids = np.array([[2, 5, 9]])
    tensors = {name: np.asarray(x) for name, x in named_tensors(forward(ids, weights, config)) if "logits" in name}
    tensors["logits"][0, 1, 200_000] += 1
    save_trace(({"input_ids": ids} | tensors).items(), tmp_path / "p.safetensors", {"dtype": "float32"})
    work = Engine(load_trace(tmp_path / "p.safetensors", config), weights, config)
    instance = next(i for i in work.instances if i.tensor == "logits")
    kept, about = make_repro(work, instance)
    assert sum(np.asarray(x).nbytes for x in kept.values()) < LIMIT
    start, stop = json.loads(about["kept"])["vocab"]
    assert start <= 200_000 < stop
    assert kept["logits"].shape == (1, 1, stop - start)


def test_a_good_trace_is_reported_and_leaves_no_repro_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.safetensors"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(path)]) == 0
    for option in ("--repro", "--bundle"):
        assert main(["check", str(path), "--model", "conformance", option, str(tmp_path / "b")]) == 0
        printed = capsys.readouterr()
        assert "CONFORMS" in printed.out
        assert "no difference found" in printed.err
    assert not (tmp_path / "b").exists()


def test_a_refused_repro_leaves_no_other_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, junit = tmp_path / "p.safetensors", tmp_path / "junit.xml"
    assert main(["trace", "--ids", "2,5,9", "--model", "conformance", "-o", str(path)]) == 0
    tensors = load_file(path)
    save_file(tensors | {"raw_logits": tensors["raw_logits"][..., :5]}, path, {"dtype": "float32"})
    asked = ["--repro", str(tmp_path / "b"), "--junit", str(junit)]
    assert main(["check", str(path), "--model", "conformance", *asked]) == 2
    assert "raw_logits has shape" in capsys.readouterr().err
    assert not junit.exists()


def test_an_unknown_mistake_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, instance, _ = spoilt("feed_forward.gelu", "float32", tmp_path)
    path = tmp_path / "p.safetensors"
    assert main(["check", str(path), "--model", "conformance", "--bundle", str(tmp_path / "b")]) == 1
    assert "UNKNOWN" in capsys.readouterr().out
    kept = load_file(tmp_path / "b")
    np.testing.assert_array_equal(kept["expected"], work.usual.result(instance.tensor))
