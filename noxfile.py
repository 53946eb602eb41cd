#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.10.14"]
# ///
"""The steps of .ci/run one at a time, each in its own environment: `nox`, or `nox -s tests -- tests/test_model.py`."""

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|virtualenv"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types and the layout of the repository."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("repo-review", ".")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests and the examples in the docstrings."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def parity(session: nox.Session) -> None:
    """The tests that run PyTorch beside refgemma, and the recordings made anew and compared."""
    session.install("-e", ".[test,record]")
    session.run("pytest", "tests/parity", *session.posargs)
    session.run("python", "golden/record.py", "--check")


@nox.session(default=False)
def site(session: nox.Session) -> None:
    """The site, with every notebook run."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "docs", "docs/_build/html")


if __name__ == "__main__":
    nox.main()
