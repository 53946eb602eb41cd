#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.10.14"]
# ///
"""The steps of .ci/run one at a time, each in its own environment, and the programs that write files of the repository.

`nox -l` lists them; `nox -s tests -- tests/test_model.py` gives arguments to one.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|virtualenv"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, docstrings, imports and the layout of the repository."""
    session.install("-e", ".[test,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    session.run("numpydoc", "lint", *map(str, Path("refgemma").rglob("*.py")))
    session.run("repo-review", ".")
    session.run("zizmor", "--offline", ".github")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests and the examples in the docstrings."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(default=False, venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """The tests with the oldest versions that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    session.run("refgemma", "verify")
    session.run("pytest", *session.posargs)


@nox.session(default=False, python=["3.14", "3.13", "3.12"])
def newest(session: nox.Session) -> None:
    """The tests with newer Pythons and the newest versions of all packages."""
    session.install("-e", ".[test]")
    session.run("refgemma", "verify")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def parity(session: nox.Session) -> None:
    """The tests that run PyTorch beside refgemma, and the recordings made again and compared."""
    session.install("-e", ".[test,record]")
    session.run("pytest", "tests/parity", *session.posargs)
    session.run("python", "golden/record.py", "--check")


@nox.session(default=False)
def site(session: nox.Session) -> None:
    """The site, with every notebook run."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "docs", "docs/_build/html")


@nox.session(default=False)
def course(session: nox.Session) -> None:
    """The notebooks for a course, in build/course: executed, slides, sheets for nbgrader, masters for Otter."""
    session.install("-e", ".[notebooks]")
    session.run("python", "tools/course.py", *(session.posargs or ["build/course"]))


@nox.session(default=False)
def mutation(session: nox.Session) -> None:
    """Make every small change of a module of the core: `nox -s mutation -- ops`; each must fail a test."""
    session.install("-e", ".[mutation]")
    session.run("python", "tools/mutation.py", *session.posargs)


@nox.session(default=False)
def regen(session: nox.Session) -> None:
    """Write the generated files again, and say by which commands those are made that take PyTorch or hours."""
    session.install("-e", ".[test]")
    session.run("python", "tools/regen.py", *session.posargs)


@nox.session(default=False)
def scoreboard(session: nox.Session) -> None:
    """Run other engines and judge them: `nox -s scoreboard -- litgpt`, `-- all`, `-- --expired`."""
    session.install("uv", "-e", ".[gguf]")
    session.run("python", "scoreboard/board.py", *session.posargs)


if __name__ == "__main__":
    nox.main()
