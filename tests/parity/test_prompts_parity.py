"""Check refgemma prompts --cover: a prompt shows the bugs that check excludes for transformers' own run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import mistakes

from refgemma.modeling.pretrained import load
from refgemma.oracle.coverage import detect
from refgemma.oracle.diagnose import Diagnosis
from refgemma.oracle.engine import Engine
from refgemma.oracle.prompts import prompts


@pytest.mark.parametrize(("prompt", "dtype"), [("padded", "float32"), ("cached", "bfloat16")])
def test_what_a_prompt_shows_is_what_check_excludes(prompt: str, dtype: str, tmp_path: Path) -> None:
    ours = load("conformance", dtype)
    asked = prompts(ours.config)[prompt]
    candidate = mistakes.port(None, dtype, asked, tmp_path, ours.config)
    excluded, _ = Diagnosis(Engine(candidate, ours.weights, ours.config)).coverage()
    said = {v.name for v in detect(asked, dtype, ours.weights, ours.config).variants}
    assert said == {v.name for v in excluded}
    assert len(said) > 60
