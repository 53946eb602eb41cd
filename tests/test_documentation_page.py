"""Check that the table in ``docs/documentation-page.md`` has every documented name, and that its tests exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from documentation_page import BESIDE, NAMES, RECORDED, STRANGERS, names_of, table_of

import refgemma

ROOT = Path(__file__).parents[1]
PAGE = ROOT.parent / "shared" / "spec" / "gemma2-transformers-doc.txt"
DOCUMENTED = json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.mark.skipif(not PAGE.exists(), reason="the page itself does not lie beside this checkout: its names are stored")
def test_the_stored_names_are_those_of_the_page() -> None:
    assert names_of(PAGE.read_text(encoding="utf-8")) == DOCUMENTED


def test_a_name_that_the_table_lacks_would_be_noticed() -> None:
    """The page has an extra field, an extra argument and another default."""
    page = "Gemma2Config\n< source >( vocab_size = 7 new_field = True **kwargs )\nGemma2Model\nforward\n- new (\n"
    found = names_of(page)
    assert found["Gemma2Config"] == {"vocab_size": "7", "new_field": "True", "**kwargs": None}
    assert found["Gemma2Model.forward"] == {"new": None}
    assert table_of(found) != table_of(DOCUMENTED)


def test_the_table_is_current() -> None:
    table = (ROOT / "docs" / "documentation-page.md").read_text(encoding="utf-8")
    assert table == table_of(DOCUMENTED), "run: python tools/documentation_page.py > docs/documentation-page.md"


def collected(*files: str) -> set[str]:
    """Return the ids of all tests in `files`, from pytest itself."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", *files]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def listed() -> set[str]:
    rows = table_of(DOCUMENTED).splitlines()
    return {row.split("`")[-2] for row in rows if row.startswith("| ") and "::" in row}


def test_the_tests_of_the_table_exist() -> None:
    """`parity/test_documentation_parity.py` checks the tests that need PyTorch."""
    here = {test for test in listed() if not test.startswith(NAMES)}
    assert len(here) == 3 + len(BESIDE)
    assert here <= collected("refgemma/modeling/classes.py", "tests/test_documentation_page.py", STRANGERS)


def test_the_class_that_the_page_names() -> None:
    with pytest.warns(UserWarning, match="GemmaForCausalLM is the class of Gemma 1"):
        model = refgemma.GemmaForCausalLM.from_pretrained("tiny")
    assert isinstance(model, refgemma.Gemma2ForCausalLM)
    with pytest.raises(AttributeError, match="no attribute 'GemmaForCausal'"):
        refgemma.GemmaForCausal  # noqa: B018
