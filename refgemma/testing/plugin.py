"""Run every law and recording on any backend: ``pytest --pyargs refgemma.testing --backend package.module:Name``.

Checked with pytester: failures, laws that are not applicable, known failures, stale ones, reproducing scripts.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from refgemma.files import pluralise, read_file
from refgemma.testing.backends import BackendError, backend_named
from refgemma.testing.laws import PROFILES, LawBroken, find_name

OURS = "refgemma.testing.backends:NumpyBackend"
# The beginnings of the reasons of skipped tests; the plugin counts each kind separately.
NOT_APPLICABLE, ALL_REFUSED, NOT_RUN = SKIPPED = ("not applicable: ", "refused: ", "not run: ")
BACKEND = pytest.StashKey[Any]()
KNOWN = pytest.StashKey["KnownFailures"]()


def add_options(parser: pytest.Parser) -> None:
    """Add the four options."""
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
        "--budget", type=float, default=None, metavar="SECONDS",
        help="time for all laws and recordings; each gets an equal share of the rest, and at least one example",
    )  # fmt: skip
    group.addoption(
        "--skips", type=Path, default=None, metavar="FILE",
        help="file of known failures, one per line: name of a law or recording, colon, reason; # starts a comment",
    )  # fmt: skip


@dataclass
class Budget:
    """The time in seconds for a number of tests; each gets an equal share of the time that is left."""

    seconds: float
    tests: int
    end: float = 0.0

    def take_share(self) -> float:
        """Return the share of the next test, which is not above 0 if the time is used; the clock starts here.

        Examples
        --------
        >>> round(Budget(60, 2).take_share())
        30
        """
        now = time.monotonic()
        self.end = self.end or now + self.seconds
        self.tests -= 1
        return (self.end - now) / max(1, self.tests + 1)


@dataclass
class KnownFailures:
    """Laws that are known to fail: the file with them, the reason for each law, and the results."""

    file: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    collected: set[str] = field(default_factory=set)
    not_run: set[str] = field(default_factory=set)

    def find_stale(self) -> Iterator[str]:
        """Yield a sentence for each entry that no longer fails."""
        for name in self.reasons:
            if name not in self.collected:
                yield f"{self.file}: unknown law or recording {name}; remove this line"
            elif name in self.passed:
                yield f"{self.file}: {name} passes now; remove this line"
            elif name not in self.failed | self.not_run:
                yield f"{self.file}: {name} is not applicable or refused; remove this line"


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
    extent += f"; refuses {', '.join(can.refuses)}" if can.refuses else ""
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
    elif report.skipped and NOT_RUN in str(report.longrepr):
        item.config.stash[KNOWN].not_run.add(_find_law(item))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Count laws that are not applicable, refused or not run separately from passed and skipped laws."""
    if report.skipped and not hasattr(report, "wasxfail"):
        for kind in SKIPPED:
            if kind in str(report.longrepr):
                name = kind.removesuffix(": ")
                return name, name[0], name.upper()
    return None


def _name_of(report: Any) -> str:
    """Return the name of the law or recording of a report."""
    return str(report.nodeid.partition("[")[2].rstrip("]"))


def _group_skipped(reports: Sequence[Any], kind: str) -> dict[str, list[str]]:
    """Return the names of skipped laws and recordings for each reason."""
    found: dict[str, list[str]] = {}
    for report in reports:
        found.setdefault(str(report.longrepr[2]).partition(kind)[2], []).append(_name_of(report))
    return found


def _list_refused(whole: Mapping[str, list[str]], refused: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Yield a line for each reason of a refusal: the tests with nothing else, and the examples of other laws."""
    alone = {name for names in whole.values() for name in names}
    others = {law: counts for law, counts in refused.items() if law not in alone}
    for reason in dict.fromkeys((*whole, *(reason for counts in others.values() for reason in counts))):
        counted = {law: counts[reason] for law, counts in others.items() if counts[reason]}
        parts = [f"everything in {', '.join(whole[reason])}"] if reason in whole else []
        if counted:
            listed = ", ".join(f"{law} ({count})" for law, count in counted.items())
            parts.append(f"{pluralise(sum(counted.values()), 'example')} in {listed}")
        yield f"{reason}: {'; '.join(parts)}"


def _count_examples(examples: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines on the number of examples that were checked and refused, and on the laws that the budget stopped."""
    refused = sum(sum(counts["refused"].values()) for counts in examples.values())
    checked = sum(counts["checked"] for counts in examples.values())
    yield f"examples: {checked} checked" + (f", {refused} refused" if refused else "")
    if stopped := [f"{law} ({counts['checked']} checked)" for law, counts in examples.items() if counts["stopped"]]:
        yield f"stopped by the budget: {', '.join(stopped)}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Count verdicts and examples, and list refused laws, laws that are not applicable and stale known failures."""
    stats: dict[str, list[Any]] = terminalreporter.stats
    skipped = {kind.removesuffix(": "): stats.get(kind.removesuffix(": "), []) for kind in SKIPPED}
    verdicts = {
        "conforms": [*stats.get("passed", []), *stats.get("xpassed", [])],
        "differs": [*stats.get("failed", []), *stats.get("xfailed", [])],
        "not applicable": skipped.pop("not applicable"),
    } | {kind: reports for kind, reports in skipped.items() if reports}
    counts = {verdict: sum("law" in report.keywords for report in reports) for verdict, reports in verdicts.items()}
    of_laws = [report for reports in verdicts.values() for report in reports if report.when == "call"]
    examples = {_name_of(r): dict(r.user_properties) for r in of_laws if "checked" in dict(r.user_properties)}
    if any(counts.values()):
        terminalreporter.section("laws and recordings")
        terminalreporter.line(", ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
        for line in _count_examples(examples):
            terminalreporter.line(line)
    refused: dict[str, Counter[str]] = {law: Counter(counts["refused"]) for law, counts in examples.items()}
    unfit, refused_whole, not_run = (_group_skipped(stats.get(kind.removesuffix(": "), []), kind) for kind in SKIPPED)
    sections = {
        "refused by this backend": list(_list_refused(refused_whole, refused)),
        "not applicable to this backend": [f"{reason}: {', '.join(names)}" for reason, names in unfit.items()],
        "not run": [f"{reason}: {', '.join(names)}" for reason, names in not_run.items()],
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)
    if stale := list(config.stash[KNOWN].find_stale()):
        terminalreporter.section("stale known failures")
    for sentence in stale:
        terminalreporter.line(f"warning: {sentence}", yellow=True)
