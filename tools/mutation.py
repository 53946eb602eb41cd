"""Test the core by mutation with mutmut.

Every small change of the code must fail a test, or ``mutation_survivors.toml`` must explain why the change has no
effect.

    pip install -e ".[mutation]"
    python tools/mutation.py [MODULE ...]          run, write tools/mutation_results.json and the table in
                                                   docs/property-tests.md, and list unexplained changes
    python tools/mutation.py --check               run nothing; list missing, stale or unexplained results
    python tools/mutation.py --table               run nothing; write the table again

`nox -s mutation -- MODULE` does the same in its own environment. A module takes minutes to an hour, so this is run
after a change of the core, not with the tests.

The changes are made in a copy of all files that git knows, in the ignored folder ``.mutation``. A run that was stopped
continues there, and surviving changes are tried again. Each change is tried by the fast tests of its module that call
the changed function, the quickest first. A test that takes longer than `SECONDS` counts as failed, so that an endless
loop is found.

mutmut forks a process for each change from a process that has imported the tests but run none. Before each test,
anything in a ``functools.cache`` of the test file is dropped. Otherwise a test would see results of the unchanged code,
and would not count among the tests that call the changed function.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".mutation"
RESULTS = ROOT / "tools" / "mutation_results.json"
ARGUMENTS = ROOT / "tools" / "mutation_survivors.toml"
PAGE = ROOT / "docs" / "property-tests.md"
BEGIN, END = "<!-- python tools/mutation.py -->", "<!-- end of mutation -->"

# Pattern of core files in refgemma/ -> patterns of the test files in tests/ that try its changes.
CORE = ("ops", "layers", "model", "golden", "cache", "precision", "inputs")
TESTS_OF = {
    "ops": CORE,
    "precision": CORE,
    "layers": CORE,
    "cache": CORE,
    "heads": ("heads", "golden", "modeling"),
    "model": CORE,
    "generation/decode": ("decode", "beams", "greedy", "stream", "processors", "generation_config", "modeling"),
}


def fast_tests() -> dict[str, tuple[str, ...]]:
    """Return the existing test files for each existing core module; a pattern without a module is an error."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, patterns in TESTS_OF.items():
        files = sorted((ROOT / "refgemma").glob(f"{pattern}.py"))
        if not files:
            sys.exit(f"refgemma/{pattern}.py does not exist: correct the name in TESTS_OF of tools/mutation.py")
        tests = [path for one in patterns for path in sorted((ROOT / "tests").glob(f"test_{one}.py"))]
        for file in files:
            module = file.relative_to(ROOT / "refgemma").with_suffix("").as_posix()
            found[module] = tuple(path.relative_to(ROOT).as_posix() for path in tests)
    return found


FAST_TESTS = fast_tests()
# Tests to leave out, by a part of their name. Some are slow and find nothing that other tests miss. Others concern the
# folder golden/, which has other contents in the copy.
NOT_ASKED = (
    "[tiny-", "-decode-", "bends-right-padded", "bends-chunked-bf16", "global-first-forward-bf16", "numpy_errs",
    "test_every_recorded", "test_half_precision", "test_the_folder_stays", "test_draws_have_the_computed_odds",
    "test_a_prompt_means_the_same", "test_several_sequences_are_drawn",
)  # fmt: skip
SECONDS = 20  # the slowest remaining test takes two
# Exit codes of a test run: all passed, or no test calls the function; stopped from outside, or never started.
SURVIVED, UNTRIED = (0, 5, 33), (2, -9, None)


@dataclass(frozen=True)
class Mutant:
    """A change: the function, the lines that it removes, and the lines that it adds."""

    function: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.function}: {self.old!r} -> {self.new!r}"


@dataclass
class Result:
    """The results of all changes of a module."""

    sha256: str
    mutants: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The fraction of changes that tests find."""
        return (self.mutants - len(self.survivors)) / max(1, self.mutants)


def source(module: str) -> Path:
    return ROOT / "refgemma" / f"{module}.py"


def code(text: str) -> str:
    """Return a program without comments, docstrings and blanks, which have no effect on tests."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "".join("".join(lines).split())


def sha256(module: str) -> str:
    """Return a hash of the code for which a module's results are valid."""
    return hashlib.sha256(code(source(module).read_text("utf-8")).encode()).hexdigest()


def prepared(module: str) -> Path:
    """Make a copy of the repository in which mutmut changes `module`; an interrupted run continues there."""
    copy = WORK / module
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(ask, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    wanted = ("refgemma/", "golden/", "tests/", "tools/", "pyproject.toml", "pytest_refgemma.py")
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
        f"[mutmut]\nsource_paths=refgemma\nonly_mutate=refgemma/{module}.py\nprocess_isolation=forkserver\n"
        "also_copy=\n    golden\n    tools\n    pytest_refgemma.py\n    pyproject.toml\n"
        f"pytest_add_cli_args=\n    -p\n    no:cacheprovider\n    -p\n    mutation\n    --timeout={SECONDS}\n"
        f"pytest_add_cli_args_test_selection={tests}\n"
        "timeout_multiplier=20.0\ntimeout_constant=5.0\n"
    )
    return copy


def exit_codes(file: Path) -> dict[str, int | None]:
    """Return the exit code of the tests for each change, by mutmut's names; None if not tried yet."""
    codes: dict[str, int | None] = json.loads(file.read_text())["exit_code_by_key"]
    return codes


def run(module: str) -> Result:
    """Try every change of a module that no test has found so far."""
    copy = prepared(module)
    meta = copy / "mutants" / "refgemma" / f"{module}.py.meta"
    if meta.exists():
        found = json.loads(meta.read_text())
        found["exit_code_by_key"] = {
            name: None if code in SURVIVED + UNTRIED else code for name, code in found["exit_code_by_key"].items()
        }
        meta.write_text(json.dumps(found))
    mutmut = [sys.executable, "-m", "mutmut", "run", "--max-children", "1"]
    here = os.environ | {"PYTHONPATH": str(copy / "tools")}  # so that pytest finds this file as a plugin
    with (copy / "mutmut.log").open("wb") as log:
        if subprocess.run(mutmut, cwd=copy, stdout=log, stderr=log, env=here, check=False).returncode:
            sys.exit(f"mutmut failed; see {copy / 'mutmut.log'}")
    exits = exit_codes(meta)
    if untried := [name for name, code in exits.items() if code in UNTRIED]:
        sys.exit(f"{module}: {len(untried)} changes were not tried; run again")
    survivors = [changed(copy, name) for name, code in sorted(exits.items()) if code in SURVIVED]
    return Result(sha256(module), len(exits), survivors)


def changed(copy: Path, mutant: str) -> Mutant:
    """Return the changed lines, from mutmut's diff."""
    show = [sys.executable, "-m", "mutmut", "show", mutant]
    diff = subprocess.run(show, cwd=copy, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    old, new = ("\n".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    name = mutant.rpartition("__mutmut_")[0].rpartition(".")[2].removeprefix("x_")
    return Mutant(name.replace("xǁ", "").replace("ǁ", "."), old, new)


# --- within mutmut's test runs, as a plugin of pytest -----------------------------------------------------------------


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Drop the tests to leave out, and sort the others by the times that mutmut measured, quickest first."""
    dropped = [item for item in items if any(part in item.nodeid for part in NOT_ASKED)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    times: dict[str, float] = {}
    if (stats := Path("mutmut-stats.json")).exists():
        times = json.loads(stats.read_text())["duration_by_test"]
    items[:] = sorted((x for x in items if x not in dropped), key=lambda item: times.get(item.nodeid, 0.0))


def pytest_runtest_setup(item: Any) -> None:
    """Forget what earlier tests computed."""
    for value in list(vars(item.module).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


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
    """Return the explained survivors of each module, with the explanations."""
    found = tomllib.loads(ARGUMENTS.read_text("utf-8"))
    return {
        module: {Mutant(one["function"], one["old"].strip(), one["new"].strip()): one["because"] for one in listed}
        for module, listed in found.items()
    }


def problems(results: dict[str, Result], arguments: dict[str, dict[Mutant, str]]) -> list[str]:
    """List missing and stale results, missing explanations of survivors, and explanations without a survivor."""
    found = [f"{module}: not measured; run it" for module in FAST_TESTS if module not in results]
    for module, result in results.items():
        if result.sha256 != sha256(module):
            found.append(f"{module}: the results are from an earlier version; run it again")
        argued = arguments.get(module, {})
        found += [f"not argued: {module}.{one}" for one in result.survivors if one not in argued]
        found += [f"stale: {module}.{one} does not survive" for one in argued if one not in result.survivors]
    return found + [f"stale: no results for {module}" for module in arguments if module not in results]


def total(results: dict[str, Result]) -> Result:
    """Return the sum of the results of all modules."""
    every = list(results.values())
    survivors = [one for result in every for one in result.survivors]
    return Result("", sum(one.mutants for one in every), survivors)


def table(results: dict[str, Result]) -> str:
    """Return the scores as Markdown."""
    rows = ["| module | changes | found | survive | score |", "| --- | --- | --- | --- | --- |"]
    rows += [_row(f"`{module}`", one) for module, one in results.items()]
    return "\n".join([*rows, _row("all", total(results))])


def _row(name: str, one: Result) -> str:
    return f"| {name} | {one.mutants} | {one.mutants - len(one.survivors)} | {len(one.survivors)} | {one.score:.1%} |"


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help=f"modules to test, of {', '.join(FAST_TESTS)} (default: all)"
    )
    parser.add_argument("--check", action="store_true", help="run nothing; list missing or stale results")
    parser.add_argument("--table", action="store_true", help="run nothing; write the table again")
    args = parser.parse_args(arguments)
    if unknown := set(args.modules) - set(FAST_TESTS):
        parser.error(f"no module of the core: {', '.join(sorted(unknown))}")
    for module in [] if args.check or args.table else args.modules or FAST_TESTS:
        result = run(module)
        write_results(read_results() | {module: result})
        print(f"{module}: {result.score:.1%}", flush=True)
    results = read_results()
    if args.check:
        print("\n".join(found := problems(results, read_arguments())))
        return bool(found)
    page = PAGE.read_text("utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}", "utf-8")
    print(table(results))
    if args.table:
        return 0
    found = problems(results, read_arguments())
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
