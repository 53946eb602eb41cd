"""Check that known bugs in PyTorch reveal a defect planted in the engine: the third witness of test_engine_defects."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import mistakes
from test_engine_defects import DEFECTS, Defect
from test_tolerance_exact import NOT_VACUOUS

from refgemma.modeling.pretrained import load
from refgemma.oracle.diagnose import diagnose
from refgemma.oracle.prompts import prompts
from refgemma.oracle.verdicts import CONFORMS


def ask_pytorch(folder: Path) -> Iterator[str]:
    """transformers must conform, near the bounds; with a small or a large bug in its code it must not."""
    ours = load("conformance", "float32")
    prompt = prompts(ours.config)["padded"]
    for name in (None, "norm-eps-1e-5", "gelu-exact"):
        report = diagnose(mistakes.port(name, "float32", prompt, folder, ours.config), ours.weights, ours.config)
        named = [v.name for v in report.findings[0].explanations] if report.findings else []
        if (name is None) != (report.verdict == CONFORMS) or (name is not None and named != [name]):
            yield f"{name}: {report.verdict}, {named}"
        if name is None:
            judged = {i.tensor: i.judged.statistics for i in report.instances}
            yield from (t for t, s in judged.items() if s.exact < 1 and s.error_over_bound < NOT_VACUOUS)


def test_a_sound_engine_has_no_complaints(tmp_path: Path) -> None:
    assert list(ask_pytorch(tmp_path)) == []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__)
def test_pytorch_sees_each_defect(defect: Defect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defect(monkeypatch)
    assert list(ask_pytorch(tmp_path))
