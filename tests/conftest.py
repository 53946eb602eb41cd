"""Check array shapes in every test, set Hypothesis profiles, and run the parity tests only if PyTorch is installed."""

import os
import shutil
from collections.abc import Generator, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Files that take what strangers hand in: they check it themselves, and are tested with what no annotation allows. And
# the weights, which may lie on disk: beartype looks into a sequence, and would read a layer each time. And `testing`,
# which is given the arrays of other implementations, and has annotations of Hypothesis that beartype refuses. And the
# oracle and `precision`, which have no annotation with axes, but so many small calls that checking them takes longer
# than their tests.
UNCHECKED = (
    "cli", "config", "convert", "generation.generation_config", "goldens", "hub", "inputs", "modeling", "oracle",
    "precision", "sweep", "testing", "tokenizer", "trace", "weights",
)  # fmt: skip

PACKAGE = Path(__file__).parents[1] / "refgemma"
FILES = [path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")]
CHECKED = sorted(
    f"refgemma.{name}"
    for name in FILES
    if not name.endswith("__init__") and not any(f"{name}.".startswith(f"{part}.") for part in UNCHECKED)
)

# Everywhere else the annotations are held against the arrays of each call. The hook has to stand before refgemma is
# imported, so nothing here imports it. (pytest's option --jaxtyping-packages does the same, but beartype then refuses
# an int for a float, which is_pep484_tower allows, as Python and mypy do.) The checks take about half of the time of
# the tests. So .ci/run makes them where it runs all tests, and turns them off where it runs tests for another reason.
if os.environ.get("REFGEMMA_CHECK_SHAPES") != "0":
    install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Without a deadline: the first call of a NumPy function takes many times as long as the second.
settings.register_profile("ci", derandomize=True, deadline=None, database=None)  # the same examples every time
settings.register_profile("dev", deadline=None)  # new examples every time; failing ones are kept
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]

# The explorer's page is looked at in a browser where there is one; REFGEMMA_BROWSER names another.
BROWSERS = (os.environ.get("REFGEMMA_BROWSER", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if name and (path := shutil.which(name))), None)
NO_BROWSER = [
    *(["playwright is not installed"] if find_spec("playwright") is None else []),
    *([] if BROWSER else ["there is no Chromium on the path"]),
]

# Files rather than the folder: a folder named on the command line would be entered in spite of this.
collect_ignore_glob = [*(["parity/*"] if MISSING else []), *(["browser/*"] if NO_BROWSER else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_backend.py":  # a file of the package, where our marks are not registered
            item.add_marker(pytest.mark.slow)


# Of a test and of the processes that it has waited for. A clock would count what other programs of the machine do too;
# it only ends a test that hangs, at `timeout` in pyproject.toml. The slowest test takes 10 s alone. On a
# machine whose processors are shared, processor time grows too: the same test took 72 s there.
PROCESSOR_SECONDS = 300.0


def processor_seconds() -> float:
    """Return the processor time of this process and of its finished children, in seconds."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that takes too much processor time; parity tests may take longer, because PyTorch does."""
    before = processor_seconds()
    yield
    if (seconds := processor_seconds() - before) > PROCESSOR_SECONDS and "parity" not in item.path.parts:
        pytest.fail(f"took {seconds:.0f} s of processor time, where {PROCESSOR_SECONDS:.0f} are the limit")


def pytest_report_header() -> list[str]:
    parity = f'parity: not run, {" and ".join(MISSING)} not installed; pip install -e ".[record]" brings them'
    if not MISSING:
        parity = f"parity: against torch {version('torch')} and transformers {version('transformers')}"
    if NO_BROWSER:
        needed = 'pip install -e ".[browser]" and a Chromium are needed'
        return [parity, f"browser: not run, {' and '.join(NO_BROWSER)}; {needed}"]
    return [parity, f"browser: {BROWSER}"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield a headless Chromium, for tests/browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # In a container Chromium's own sandbox is often not allowed; the pages are ours and reach no network.
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()
