"""Check that a stale generated file is found; .ci/run runs `python tools/regen.py --check` on the repository."""

from pathlib import Path

import pytest
import regen


def test_a_stale_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    (root / "docs" / "page.md").write_text("1\n")
    (root / "docs" / "make.py").write_text(
        "from pathlib import Path\nPath('docs/page.md').write_text('2\\n')\nprint(3)\n"
    )
    generator = regen.Generator(("docs/make.py",), ("docs/page.md", "docs/said.md"), "docs/said.md")
    monkeypatch.setattr(regen, "QUICK", (generator,))
    assert regen.stale(root) == ["docs/page.md", "docs/said.md"]
    assert (root / "docs" / "page.md").read_text() == "1\n"
    regen.regenerate(root)
    assert (root / "docs" / "said.md").read_text() == "3\n"
    assert regen.stale(root) == []


def test_the_programs_and_their_files_exist() -> None:
    for generator in regen.QUICK:
        assert (regen.ROOT / generator.command[0]).is_file() or generator.command[0] == "-m"
    for command in regen.SLOW:
        assert (regen.ROOT / command.split()[1]).is_file()
    assert len(regen.contents(regen.ROOT)) >= 18
