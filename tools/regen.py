"""Write again every generated file that takes only seconds, and print the commands that make the others.

    pip install -e ".[test]"
    python tools/regen.py              write
    python tools/regen.py --check      write in a copy, and fail if a file differs from the present one

`--check` runs in .ci/run; tests/test_regen.py plants a stale file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Generator:
    """A program that writes files: its arguments after `python`, the files, and the file for its output."""

    command: tuple[str, ...]
    writes: tuple[str, ...]  # patterns
    output: str = ""


QUICK = (
    Generator(("tools/draw_model.py",), ("docs/_static/model.svg", "notebooks/pictures/*.svg")),
    Generator(("tools/draw_recording.py",), ("docs/_static/check.svg",)),
    Generator(("docs/tables.py",), ("docs/reference/*.md",)),
    Generator(("-m", "jupytext", "--quiet", "--update", "--to", "ipynb", "notebooks/*.py"), ("notebooks/*.ipynb",)),
    Generator(("tests/law_power.py", "--tables"), ("docs/property-tests.md",)),
    Generator(("tools/mutation.py", "--table"), ("docs/property-tests.md",)),
    Generator(("tools/documentation_page.py",), ("docs/documentation-page.md",), "docs/documentation-page.md"),
)

# Measured or recorded files are not made here. A commit that changes one says what changed.
SLOW = {
    "python golden/record.py": "golden/*.safetensors, golden/manifest.json: PyTorch, minutes",
    "python golden/record.py --full 9b": "golden/full/: PyTorch, an hour; likewise 27b",
    "python golden/mistakes.py --write": "tables of docs/oracle.md: PyTorch, a quarter of an hour",
    "python tests/law_power.py": "tests/law_power.json and the tables of docs/property-tests.md: hours",
    "python tools/mutation.py": "tools/mutation_results.json and a table of docs/property-tests.md: hours",
    "python tools/documentation_page.py PAGE > tests/documentation_page.json": "PAGE is the text of the page",
    "python benchmarks/run.py --history benchmarks/history.jsonl --picture docs/_static/speed.svg": "docs/speed.md: "
    "PyTorch, an hour on a quiet machine",
}  # fmt: skip


def regenerate(root: Path) -> None:
    """Run every quick program in the checkout at `root`."""
    here = os.environ | {"PYTHONPATH": str(root)}
    for generator in QUICK:
        arguments = [
            name
            for part in generator.command
            for name in (sorted(str(p.relative_to(root)) for p in root.glob(part)) if "*" in part else [part])
        ]
        run = subprocess.run([sys.executable, *arguments], cwd=root, env=here, capture_output=True, check=False)
        if run.returncode:
            sys.exit(f"python {' '.join(arguments)} failed:\n{(run.stdout + run.stderr).decode()}")
        if generator.output:
            (root / generator.output).write_bytes(run.stdout)


def contents(root: Path) -> dict[str, bytes]:
    """Return the contents of the files that the quick programs write."""
    paths = {path for generator in QUICK for pattern in generator.writes for path in root.glob(pattern)}
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(paths)}


def stale(root: Path) -> list[str]:
    """Return the files of the checkout at `root` that would change; the programs run in a copy."""
    with tempfile.TemporaryDirectory(prefix="refgemma-") as folder:
        copy = Path(folder) / root.name
        ignored = shutil.ignore_patterns(".*", "__pycache__", "_build", "full", "parity", "*.egg-info")
        shutil.copytree(root, copy, ignore=ignored)
        regenerate(copy)
        before, after = contents(root), contents(copy)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only list the files that would change")
    args = parser.parse_args()
    if args.check:
        found = stale(ROOT)
        print("\n".join(f"{name} is stale; run: python tools/regen.py" for name in found) or "nothing is stale")
        return bool(found)
    before = contents(ROOT)
    regenerate(ROOT)
    after = contents(ROOT)
    changed = [name for name in after if before.get(name) != after[name]]
    print("\n".join(f"written: {name}" for name in changed) or "nothing has changed")
    print("\nNot made again:")
    for command, why in SLOW.items():
        print(f"    {command}\n        {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
