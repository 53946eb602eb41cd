"""Check that a failed check looks failed in every format: exit code, text, JSON, JUnit, Markdown and page. The faults
are put into trace and weights here, so that the verdict is known without the code under test."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refgemma import ops
from refgemma.cli.main import main
from refgemma.config import Gemma2Config
from refgemma.hub import find_model
from refgemma.precision import as_dtype
from refgemma.trace.names import save_trace

FOLDER = find_model("conformance")
CAP = Gemma2Config.from_pretrained(FOLDER).final_logit_softcapping
Tensors = dict[str, np.ndarray]


def without(tensors: Tensors, name: str) -> Tensors:
    return {other: x for other, x in tensors.items() if other != name}


def round_logits(run: Tensors) -> Tensors:
    """Round the logits before the cap: different rounding of the same model."""
    raw = np.asarray(as_dtype(run["raw_logits"], "bfloat16"), np.float32)
    return run | {"raw_logits": raw, "logits": ops.soft_cap(raw, CAP)}


# What is done to a trace, and to the weights of a port; each alone has the exit code beside it.
TRACE = {
    "another number": (1, lambda run: run | {"layers.1.out": run["layers.1.out"] + 1}),
    "not a number": (1, lambda run: run | {"layers.1.middle": np.full_like(run["layers.1.middle"], np.nan)}),
    "another shape": (1, lambda run: run | {"layers.2.out": run["layers.2.out"][..., :-1]}),
    "noisy": (3, round_logits),
    "no logits": (4, lambda run: without(run, "logits")),
}
NORM, QUERY = "model.norm.weight", "model.layers.2.self_attn.q_proj.weight"
WEIGHTS = {
    "a wrong weight": (1, lambda weights: weights | {QUERY: weights[QUERY][::-1]}),
    "a missing weight": (4, lambda weights: without(weights, NORM)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    assert main(["trace", "--ids", "2,5,9,30", "--model", "conformance", "-o", str(path)]) == 0
    return load_file(path)


def read_all(
    changes: frozenset[str], run: Tensors, folder: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, Mapping[str, str] | str]:
    """Return the report in each format for a trace and weights with these changes."""
    weights = load_file(FOLDER / "model.safetensors")
    for name in sorted(changes):  # "no logits" goes after what changes them, but for "noisy", which needs none of them
        run = TRACE[name][1](run) if name in TRACE else run
        weights = WEIGHTS[name][1](weights) if name in WEIGHTS else weights
    if "no logits" in changes:
        run = without(run, "logits")
    save_trace(run.items(), folder / "run.safetensors", {"dtype": "float32"})
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, folder / "port.safetensors")
    command = ["check", str(folder / "run.safetensors"), "--model", "conformance"]
    command += ["--weights", str(folder / "port.safetensors")]
    files = {kind: folder / kind for kind in ("html", "markdown", "junit")}
    capsys.readouterr()
    codes = {main([*command, *(word for kind, path in files.items() for word in (f"--{kind}", str(path)))])}
    said = {"text": capsys.readouterr().out} | {kind: path.read_text("utf-8") for kind, path in files.items()}
    codes.add(main([*command, "--json"]))
    [code] = codes
    return said | {"json": json.loads(capsys.readouterr().out), "code": str(code)}


def is_green(said: Mapping[str, str | Mapping[str, str]]) -> dict[str, bool]:
    """For each format, return True if a person or a program would read success."""
    suite = ElementTree.fromstring(str(said["junit"]))
    failures = suite.findall(".//failure")
    assert int(suite.attrib["failures"]) == len(failures)
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    heading = re.search(r"<h1>(.*?)</h1>", str(said["html"]), re.DOTALL)
    assert heading is not None
    return {
        "code": said["code"] == "0",
        "json": said["json"]["verdict"] == "conforms" or said["json"]["exit_code"] == 0,
        "junit": not failures,
        "markdown": "conforms" in str(said["markdown"]).splitlines()[0],
        "html": "conforms" in heading[1].lower() or "CONFORMS" in str(said["html"]),
        "text": any(line.startswith("CONFORMS") for line in str(said["text"]).splitlines()),
    }


@pytest.mark.parametrize("change", [*TRACE, *WEIGHTS])
def test_each_fault_alone_has_its_code(
    change: str, run: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = read_all(frozenset({change}), run, tmp_path, capsys)
    assert said["code"] == str((TRACE | WEIGHTS)[change][0])
    assert not any(is_green(said).values()), is_green(said)


def test_what_conforms_is_green_everywhere(run: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(is_green(read_all(frozenset(), run, tmp_path, capsys)).values())


@pytest.mark.slow
@given(changes=st.frozensets(st.sampled_from([*TRACE, *WEIGHTS]), min_size=2))
@example(changes=frozenset(TRACE) | frozenset(WEIGHTS))
@example(changes=frozenset({"noisy", "a missing weight"}))
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_faults_together_are_green_anywhere(
    changes: frozenset[str], run: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = read_all(changes, run, tmp_path, capsys)
    codes = {str((TRACE | WEIGHTS)[change][0]) for change in changes}
    assert said["code"] in ({"1"} if "1" in codes else codes)
    assert not any(is_green(said).values()), is_green(said)
