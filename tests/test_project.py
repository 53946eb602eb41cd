"""Check the repository's statements about itself, and that nothing unwanted is in it."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import refgemma

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Cloned by everyone, for ever; and the embedded model, the largest file, takes 5.9 MB.
LARGEST = 6_000_000

# A path from the root of somebody's machine. Looked for in bytes, so that recordings and images are searched as well.
MACHINE_PATH = re.compile(rb"(?<![\w.~/-])(?:/(?:home|mnt|opt|root|tmp|Users|work)/|[A-Z]:\\Users\\)[\w.-]+")


def project_files() -> list[Path]:
    """Return the files that are in git or not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout: an unpacked source distribution holds what was checked when it was made")
    files = [ROOT / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name]
    return [file for file in files if file.is_file()]  # a deleted file stays listed until the deletion is committed


def citation() -> dict[str, str]:
    """Return the top level of CITATION.cff: the value of each key."""
    return dict(re.findall(r"^([a-z-]+):[ \t]*(.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE))


def test_citation_has_what_the_format_requires() -> None:
    # Citation File Format 1.2.0, section "Schema": the first four; the others are what a citation is made of.
    assert {"cff-version", "message", "title", "authors", "version", "license", "type"} <= set(citation())


def test_citation_agrees_with_the_package() -> None:
    assert (citation()["license"], citation()["title"]) == (PROJECT["license"], PROJECT["name"])


def test_the_version_is_one_everywhere() -> None:
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    said = {
        "pyproject.toml": PROJECT["version"],
        "refgemma.__version__": refgemma.__version__,
        "CITATION.cff": citation()["version"],
        "CHANGELOG.md": newest[1],
    }
    # refgemma.__version__ is what pip wrote when it installed this checkout: behind a new version, install again.
    assert set(said.values()) == {PROJECT["version"]}, said


@pytest.mark.parametrize("command", ["pip install . && refgemma verify", 'pip install -e ".[test]" && pytest'])
def test_what_the_readme_promises_is_what_is_checked(command: str) -> None:
    in_the_readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    in_the_checks = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert command in [line.strip() for line in in_the_readme]
    assert any(line.strip().startswith("run ") and line.endswith(f" '{command}'") for line in in_the_checks)


def test_no_file_is_large() -> None:
    large = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in project_files()}
    assert not {name: size for name, size in large.items() if size > LARGEST}


def test_no_file_names_a_place_on_someones_machine() -> None:
    found = {file.relative_to(ROOT).as_posix(): MACHINE_PATH.search(file.read_bytes()) for file in project_files()}
    assert not {name: match[0] for name, match in found.items() if match}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("open('{}home/ada/model.safetensors')", True),
        ("cd {}work/main", True),
        ("C:{}Users{}ada", True),
        ("https://example.org{}home/ada", False),
        ("../shared{}work/main", False),
        ("~{}work/main", False),
    ],
)
def test_places_on_machines_are_recognised(text: str, seen: bool) -> None:
    # The separators are put in here, because this file is searched as well.
    separator = "\\" if text.startswith("C:") else "/"
    assert bool(MACHINE_PATH.search(text.replace("{}", separator).encode())) == seen


def test_the_examples_in_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [part.split("```")[0] for part in (ROOT / "README.md").read_text("utf-8").split("```python\n")[1:]]
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")
