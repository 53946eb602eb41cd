"""Run every law and recording on any backend: ``pytest --pyargs refgemma.testing --backend package.module:Name``.

Checked with pytester: failures, laws that are not applicable, known failures, stale ones, reproducing scripts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from refgemma.files import read_file
from refgemma.testing.backends import BackendError, backend_named
from refgemma.testing.laws import PROFILES, LawBroken, find_name

OURS = "refgemma.testing.backends:NumpyBackend"
NOT_APPLICABLE = "not applicable: "
BACKEND = pytest.StashKey[Any]()
KNOWN = pytest.StashKey["KnownFailures"]()


def add_options(parser: pytest.Parser) -> None:
    """Add the three options."""
    group = parser.getgroup("refgemma", "refgemma: test an implementation of Gemma 2")
    group.addoption(
        "--backend", default=OURS,
        help="the implementation, as package.module:Name or program:COMMAND (default: refgemma itself)",
    )  # fmt: skip
    group.addoption(
        "--profile", choices=sorted(PROFILES), default="ci",
        help="examples per law: dev 8, ci 20 (always the same examples), deep 1000",
    )  # fmt: skip
    group.addoption(
        "--skips", type=Path, default=None, metavar="FILE",
        help="file of known failures, one per line: name of a law or recording, colon, reason; # starts a comment",
    )  # fmt: skip


@dataclass
class KnownFailures:
    """Laws that are known to fail: the file with them, the reason for each law, and the results."""

    file: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    collected: set[str] = field(default_factory=set)

    def find_stale(self) -> Iterator[str]:
        """Yield a sentence for each entry that no longer fails."""
        for name in self.reasons:
            if name not in self.collected:
                yield f"{self.file}: unknown law or recording {name}; remove this line"
            elif name in self.passed:
                yield f"{self.file}: {name} passes now; remove this line"
            elif name not in self.failed:
                yield f"{self.file}: {name} is not applicable; remove this line"


def read_known_failures(path: Path) -> KnownFailures:
    """Read a file of known failures.

    Raises
    ------
    BackendError
        If the file cannot be read, or a line has no reason or is a duplicate.
    """
    found = KnownFailures(str(path))
    try:
        lines = read_file(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BackendError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, reason = (part.strip() for part in line.partition(":"))
        if not name or not reason:
            raise BackendError(
                f"{path}, line {number}: must have the name of a law, a colon, and the reason for the failure"
            )
        if name in found.reasons:
            raise BackendError(f"{path}, line {number}: duplicate entry {name}; remove it")
        found.reasons[name] = reason
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Find the backend and read the known failures before any test runs."""
    name = config.getoption("backend")
    config.addinivalue_line("markers", "law(name): the law or recording that a test checks")
    try:
        backend = backend_named(name)
        backend.capabilities()
        skips = config.getoption("skips")
        known = read_known_failures(skips) if skips else KnownFailures()
    except BackendError as error:
        raise pytest.UsageError(str(error)) from error
    if not hasattr(backend, "__backend_name__"):
        backend.__backend_name__ = name  # for the reproducing scripts
    config.stash[BACKEND], config.stash[KNOWN] = backend, known


def pytest_report_header(config: pytest.Config) -> str:
    """Return a line on the backend under test."""
    can = config.stash[BACKEND].capabilities()
    extent = f"{', '.join(can.dtypes)}; cache: {can.cache}, padding: {can.padding}, positions: {can.positions}"
    return f"refgemma: testing {find_name(config.stash[BACKEND])} ({extent}), profile {config.getoption('profile')}"


def _find_law(item: pytest.Item) -> str:
    """Return the name of the law or recording that a test checks."""
    marker = item.get_closest_marker("law")
    return str(marker.args[0]) if marker else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the known failures as expected to fail."""
    known = config.stash[KNOWN]
    for item in items:
        known.collected.add(_find_law(item))
        if reason := known.reasons.get(_find_law(item)):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=False))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Add the reproducing script to a failure, and record the results of known failures."""
    report: pytest.TestReport = yield
    if call.when == "call":
        error = call.excinfo.value if call.excinfo else None
        if isinstance(error, LawBroken):
            report.sections.append(("this program reproduces it", error.script))
            if not report.skipped:
                report.longrepr = str(error)  # the traceback through Hypothesis does not help
        known = item.config.stash[KNOWN]
        if report.passed:
            known.passed.add(_find_law(item))
        elif report.failed or hasattr(report, "wasxfail"):
            known.failed.add(_find_law(item))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Count laws that are not applicable separately from passed and skipped laws."""
    if report.skipped and not hasattr(report, "wasxfail") and NOT_APPLICABLE in str(report.longrepr):
        return "not applicable", "n", "NOT APPLICABLE"
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Count the verdicts, and list laws that are not applicable and stale known failures."""
    stats: dict[str, list[Any]] = terminalreporter.stats
    verdicts = {
        "conforms": [*stats.get("passed", []), *stats.get("xpassed", [])],
        "differs": [*stats.get("failed", []), *stats.get("xfailed", [])],
        "not applicable": stats.get("not applicable", []),
    }
    counts = {verdict: sum("law" in report.keywords for report in reports) for verdict, reports in verdicts.items()}
    if any(counts.values()):
        terminalreporter.section("laws and recordings")
        terminalreporter.line(", ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
    found: dict[str, list[str]] = {}
    for report in verdicts["not applicable"]:
        reason = str(report.longrepr[2]).partition(NOT_APPLICABLE)[2]
        found.setdefault(reason, []).append(report.nodeid.partition("[")[2].rstrip("]"))
    if found:
        terminalreporter.section("not applicable to this backend")
    for reason, names in found.items():
        terminalreporter.line(f"{reason}: {', '.join(names)}")
    if stale := list(config.stash[KNOWN].find_stale()):
        terminalreporter.section("stale known failures")
    for sentence in stale:
        terminalreporter.line(f"warning: {sentence}", yellow=True)
