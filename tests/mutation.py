"""Mutation testing of the core with mutmut: every small change of its code must fail a test, or be argued to change
nothing in ``mutation_survivors.toml``. ``docs/property-tests.md`` has the scores.

    pip install -e ".[test]" "mutmut>=3.8,<4"
    python tests/mutation.py [MODULE ...]          run, write tests/mutation_results.json, and say what is not argued
    python tests/mutation.py --check               only compare the last results with the arguments

The changes are made in a copy of what git knows, in the folder ``.mutation`` that git ignores, where a run that was
stopped goes on. Each change is tried by those fast tests of its module that call the changed function. One that makes a
test run without an end counts as found, and is counted apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".mutation"
RESULTS = ROOT / "tests" / "mutation_results.json"
ARGUMENTS = ROOT / "tests" / "mutation_survivors.toml"

CORE = ("tests/test_model.py", "tests/test_golden.py", "tests/test_cache.py", "tests/test_precision.py",
        "tests/test_mutants.py")  # fmt: skip
FAST_TESTS = {
    "ops": CORE,
    "precision": CORE,
    "layers": CORE,
    "cache": CORE,
    "heads": (*CORE, "tests/test_modeling.py"),
    "model": CORE,
    "generation": ("tests/test_generation.py", "tests/test_modeling.py", "tests/test_mutants.py"),
}
# A test of the folder golden/, of which the copy has another content.
SIZES = "tests/test_golden.py::test_the_folder_stays_under_20_megabytes_and_full_size_under_10"
KILLED_BY_TIME = {24, 36, 152, 255, -24, -9}  # mutmut's exit codes of a run that had to be ended


@dataclass(frozen=True)
class Mutant:
    """A change: the lines of a function that it takes away, and those that it puts there."""

    function: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.function}: {self.old!r} -> {self.new!r}"


@dataclass
class Result:
    """What became of the changes of a module."""

    sha256: str
    mutants: int = 0
    killed: int = 0
    endless: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The share of changes that are found."""
        return (self.mutants - len(self.survivors)) / max(1, self.mutants)


def source(module: str) -> Path:
    return ROOT / "refgemma" / f"{module}.py"


def sha256(module: str) -> str:
    return hashlib.sha256(source(module).read_bytes()).hexdigest()


def prepared(module: str) -> Path:
    """A copy of the repository in which mutmut is to change `module`; mutmut goes on where it stopped."""
    copy = WORK / module
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(ask, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    wanted = ("refgemma/", "golden/", "tests/", "pyproject.toml", "pytest_refgemma.py")
    for name in listed.split("\0"):
        if (
            name.startswith(wanted)
            and not name.startswith(("golden/full/", "tests/parity/"))
            and (ROOT / name).is_file()
        ):
            target = copy / name
            if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)
    tests = "".join(f"\n    {test}" for test in FAST_TESTS[module])
    (copy / "setup.cfg").write_text(
        f"[mutmut]\nsource_paths=refgemma\nonly_mutate=refgemma/{module}.py\n"
        "also_copy=\n    golden\n    pytest_refgemma.py\n    pyproject.toml\n"
        f"pytest_add_cli_args=\n    -p\n    no:cacheprovider\n    --deselect={SIZES}\n"
        f"pytest_add_cli_args_test_selection={tests}\n"
        "timeout_multiplier=20.0\ntimeout_constant=5.0\n"
    )
    return copy


def run(module: str) -> Result:
    """Try every change of a module."""
    copy = prepared(module)
    mutmut = [sys.executable, "-m", "mutmut", "run", "--max-children", "1"]
    with (copy / "mutmut.log").open("wb") as log:
        if subprocess.run(mutmut, cwd=copy, stdout=log, stderr=log, check=False).returncode:
            sys.exit(f"mutmut failed; {copy / 'mutmut.log'} says why")
    exits: dict[str, int] = json.loads((copy / "mutants" / "refgemma" / f"{module}.py.meta").read_text())[
        "exit_code_by_key"
    ]
    untested = [name for name, code in exits.items() if code is None]
    if untested:
        sys.exit(f"{module}: {len(untested)} changes were not tried; run again")
    result = Result(sha256(module), len(exits))
    for name, code in sorted(exits.items()):
        if code in KILLED_BY_TIME:
            result.endless += 1
        elif code in (0, 5, 33):  # survived, or no test calls the function
            result.survivors.append(changed(copy, name))
        else:
            result.killed += 1
    return result


def changed(copy: Path, mutant: str) -> Mutant:
    """The lines of a change, from mutmut's diff."""
    show = [sys.executable, "-m", "mutmut", "show", mutant]
    diff = subprocess.run(show, cwd=copy, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    old, new = ("\n".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    name = mutant.rpartition("__mutmut_")[0].rpartition(".")[2].removeprefix("x_")
    return Mutant(name.replace("xǁ", "").replace("ǁ", "."), old, new)


# --- results and arguments --------------------------------------------------------------------------------------------


def read_results() -> dict[str, Result]:
    if not RESULTS.exists():
        return {}
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8"))
    return {
        module: Result(**{**about, "survivors": [Mutant(**one) for one in about["survivors"]]})
        for module, about in found.items()
    }


def write_results(results: dict[str, Result]) -> None:
    text = json.dumps({module: asdict(results[module]) for module in FAST_TESTS if module in results}, indent=1)
    RESULTS.write_text(text + "\n", "utf-8")


def read_arguments() -> dict[str, dict[Mutant, str]]:
    """For each module the survivors that are argued, and the arguments."""
    found = tomllib.loads(ARGUMENTS.read_text("utf-8"))
    return {
        module: {Mutant(one["function"], one["old"].strip(), one["new"].strip()): one["because"] for one in listed}
        for module, listed in found.items()
    }


def problems(results: dict[str, Result], arguments: dict[str, dict[Mutant, str]]) -> list[str]:
    """A sentence for each survivor that is not argued, and each argument about what does not survive."""
    found = []
    for module, result in results.items():
        argued = arguments.get(module, {})
        found += [f"not argued: {module}.{one}" for one in result.survivors if one not in argued]
        found += [f"stale: {module}.{one} does not survive" for one in argued if one not in result.survivors]
    return found + [f"stale: no results for {module}" for module in arguments if module not in results]


def table(results: dict[str, Result]) -> str:
    """The scores, as Markdown."""
    rows = [
        "| module | changes | found | endless | survive | score |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    total = Result("")
    for module, one in results.items():
        rows.append(_row(f"`{module}`", one))
        for name in ("mutants", "killed", "endless"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        total.survivors += one.survivors
    return "\n".join([*rows, _row("all", total)])


def _row(name: str, one: Result) -> str:
    return f"| {name} | {one.mutants} | {one.killed} | {one.endless} | {len(one.survivors)} | {one.score:.1%} |"


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(FAST_TESTS)} (default: all)")
    parser.add_argument("--check", action="store_true", help="run nothing")
    args = parser.parse_args(arguments)
    if unknown := set(args.modules) - set(FAST_TESTS):
        parser.error(f"no module of the core: {', '.join(sorted(unknown))}")
    results = read_results()
    for module in [] if args.check else args.modules or FAST_TESTS:
        results[module] = run(module)
        write_results(results)
        print(f"{module}: {results[module].score:.1%}", flush=True)
    print(table(results))
    found = problems(results, read_arguments())
    for module, result in results.items():
        if result.sha256 != sha256(module):
            print(f"{module}: its results are of an earlier version; run it again")
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
