"""Check array shapes in every test, set Hypothesis profiles, and run the parity tests only if PyTorch is installed."""

import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

# Files that take what strangers hand in: they check it themselves, and are tested with what no annotation allows. And
# the weights, which may lie on disk: beartype looks into a sequence, and would read a layer each time. And `testing`,
# which is given the arrays of other implementations, and has annotations of Hypothesis that beartype refuses. And the
# oracle and `precision`, which have no annotation with axes, but so many small calls that checking them takes longer
# than their tests. And the exercises, which have none either, but functions inside functions: the hook decorates such a
# function each time its outer function runs, which takes milliseconds. So there are none where many calls are made.
UNCHECKED = (
    "cli", "config", "convert", "generation.generation_config", "goldens", "hub", "inputs", "modeling", "oracle",
    "precision", "sweep", "teach.exercises", "testing", "tokenizer", "trace", "weights",
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
# an int for a float, which is_pep484_tower allows, as Python and mypy do.) A check takes longer than many of the
# functions, so only the first calls of each test are checked: a test that makes more repeats them with other numbers.
# .ci/run makes the checks where it runs all tests, and turns them off where it runs tests for another reason.
CHECKS = 10_000  # of a test; each call takes two, one of its arguments and one of its result
made = itertools.count(1)


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its annotations checked by beartype, until a test has made `CHECKS` checks."""
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

    @functools.wraps(function)
    def count_and_check(*args: Any, **given: Any) -> Any:
        if next(made) == CHECKS:
            jaxtyping.config.update("jaxtyping_disable", True)
        return check(*args, **given)

    return count_and_check


def pytest_runtest_logstart() -> None:
    """Check shapes from the beginning of each test."""
    global made
    made = itertools.count(1)
    jaxtyping.config.update("jaxtyping_disable", False)


if os.environ.get("REFGEMMA_CHECK_SHAPES") != "0":
    install_import_hook(CHECKED, "conftest.check_types")

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
