"""refgemma check on transformers itself, live: as it is, and with a mistake made in its own code."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import mistakes

from refgemma.modeling.pretrained import load
from refgemma.oracle.conformance import prompts
from refgemma.oracle.diagnose import diagnose
from refgemma.oracle.known_bugs import known_bug
from refgemma.oracle.verdicts import CONFORMS
from refgemma.trace.names import field_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prompt", ["padded", "plain", "cached"])
def test_transformers_conforms(dtype: str, prompt: str, tmp_path: Path) -> None:
    ours = load("conformance", dtype)
    candidate = mistakes.port(None, dtype, prompts(ours.config)[prompt], tmp_path, ours.config)
    report = diagnose(candidate, ours.weights, ours.config)
    assert (report.verdict, report.missing) == (CONFORMS, ())


@pytest.mark.parametrize("name", ["gelu-exact", "gqa-tile", "scale-head-dim", "swa-all-global", "norm-two-plus"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mistake_in_transformers_is_named(name: str, dtype: str, tmp_path: Path) -> None:
    ours = load("conformance", dtype)
    candidate = mistakes.port(name, dtype, prompts(ours.config)["padded"], tmp_path, ours.config)
    report = diagnose(candidate, ours.weights, ours.config)
    assert report.first_divergence is not None
    assert field_of(report.first_divergence.tensor) == known_bug(name).fields[0]
    assert [v.name for v in report.findings[0].explanations] == [name]
