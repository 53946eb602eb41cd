"""Check that pytest finds every parity test that ``docs/documentation-page.md`` names."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tests_of_the_table_exist() -> None:
    table = (ROOT / "docs" / "documentation-page.md").read_text(encoding="utf-8")
    file = "tests/parity/test_documented_names.py"
    named = {row.split("`")[-2] for row in table.splitlines() if f"`{file}::" in row}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", file]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    documented = json.loads((ROOT / "tests" / "documentation_page.json").read_text(encoding="utf-8"))
    assert len(named) > 60 < sum(map(len, documented.values()))
    assert named <= set(found)
