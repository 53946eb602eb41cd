"""Test the oracle as a library: imports from `refgemma.oracle`, and results for a wrong trace."""

from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.inputs import InputError
from refgemma.oracle import Candidate, Report, check, known_bugs, load_trace, save_trace
from refgemma.oracle.diagnose import Diagnosis
from refgemma.trace.names import named_tensors

CONFORMANCE = refgemma.load("conformance")
IDS = np.array([[2, 40, 50, 60, 70, 80, 90, 20, 30, 41]])


def write(path: Path, changes: dict[str, np.ndarray] | None = None) -> Path:
    run = dict(named_tensors(refgemma.forward(IDS, CONFORMANCE.weights, CONFORMANCE.config)))
    save_trace(({"input_ids": IDS} | run | (changes or {})).items(), path, {"dtype": "float32"})
    return path


def test_a_file_is_checked_with_one_call(tmp_path: Path) -> None:
    path = write(tmp_path / "port.safetensors")
    report = check(path, "conformance")
    assert isinstance(report, Report)
    assert (report.verdict, report.first_divergence, report.missing) == ("conforms", None, ())
    candidate = load_trace(path, CONFORMANCE.config)
    assert isinstance(candidate, Candidate)
    assert check(candidate, "conformance").verdict == "conforms"
    changed = CONFORMANCE.config.changed(final_logit_softcapping=5.0)
    wrong = check(path, "conformance", config=changed)
    assert (wrong.verdict, wrong.findings[0].named) == ("differs", "final_logit_softcapping = 2")
    assert {bug.name for bug in wrong.excluded} < {bug.name for bug in known_bugs.KNOWN_BUGS}


def test_excluded_bugs_are_looked_for_once_and_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    usual = Diagnosis.coverage
    monkeypatch.setattr(Diagnosis, "coverage", lambda work: calls.append(work) or usual(work))
    report = check(write(tmp_path / "port.safetensors"), "conformance")
    assert (report.verdict, calls) == ("conforms", [])
    assert len(report.excluded) + len(report.undetectable) == report.asked > 100
    assert len(calls) == 1


def test_a_trace_of_another_model_names_the_model_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "port.safetensors")
    with pytest.raises(InputError, match=r"shapes of another model.*--model conformance"):
        check(path, "tiny")
    assert main(["check", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "the shapes fit conformance" in said.err


def test_weight_on_a_masked_key_is_said_and_not_a_quotient(tmp_path: Path) -> None:
    probs = refgemma.forward(IDS, CONFORMANCE.weights, CONFORMANCE.config).layers[0].attention.probs.copy()
    probs[0, 1, 3, 7] = 0.25  # a key after its query
    report = check(write(tmp_path / "p.safetensors", {"layers.0.attention.probs": probs}), "conformance")
    assert report.first_divergence is not None
    judged = report.first_divergence.judged
    assert judged.note == "weight on a masked key: 1 element must be exactly 0, independent of rounding; one is 0.25"
    assert judged.statistics.error_over_bound == np.inf
    assert judged.statistics.place == (0, 1, 3, 7)


def test_a_parameter_is_never_said_to_be_itself(tmp_path: Path) -> None:
    # Wrong elements in probabilities, with the right window: no estimate explains them.
    probs = refgemma.forward(IDS, CONFORMANCE.weights, CONFORMANCE.config).layers[0].attention.probs.copy()
    probs[0, 0, 5] = np.roll(probs[0, 0, 5], 1)
    report = check(write(tmp_path / "p.safetensors", {"layers.0.attention.probs": probs}), "conformance")
    assert report.verdict == "differs"
    for finding in report.findings:
        for e in finding.estimates:
            assert f"{e.value:.6g}" != f"{e.expected:.6g}"


@pytest.mark.parametrize("command", ["known-bugs", "variants"])
def test_the_catalogue_has_its_present_and_its_former_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "gqa-tile"]) == 0
    assert "repeat_kv" in capsys.readouterr().out
