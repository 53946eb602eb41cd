"""Test each law and each recording on the chosen backend, for ``pytest --pyargs refgemma.testing``.

In refgemma's own test run, the backend is refgemma.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from refgemma.testing.backends import backend_named
from refgemma.testing.laws import PROFILES, NotApplicable, Refused, Search
from refgemma.testing.plugin import ALL_REFUSED, BACKEND, NOT_APPLICABLE, NOT_RUN, OURS, Budget
from refgemma.testing.properties import LAWS
from refgemma.testing.recordings import check_golden, golden_names


@pytest.fixture(scope="session")
def backend(pytestconfig: pytest.Config) -> Any:
    """Return the implementation under test."""
    return pytestconfig.stash.get(BACKEND, None) or backend_named(OURS)


@pytest.fixture(scope="session")
def profile(pytestconfig: pytest.Config) -> str:
    """Return the profile, which sets the number of examples."""
    return str(pytestconfig.getoption("profile", "ci"))


@pytest.fixture(scope="session")
def budget(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Budget:
    """Return the time for all laws and recordings."""
    return Budget(pytestconfig.getoption("budget", None) or math.inf, len(request.session.items))


@pytest.fixture
def seconds(budget: Budget) -> float:
    """Return a test's share of the time; skip the test if no time is left. The plugin counts such tests separately."""
    share = budget.take_share()
    if share <= 0:
        pytest.skip(f"{NOT_RUN}the budget of {budget.seconds:g} s is used")
    return share


@contextmanager
def skip_unfit() -> Iterator[None]:
    """Skip a test that is not applicable, or whose models are refused. The plugin counts such tests separately."""
    try:
        yield
    except Refused as reason:
        pytest.skip(f"{ALL_REFUSED}{reason}")
    except NotApplicable as reason:
        pytest.skip(f"{NOT_APPLICABLE}{reason}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.law(name)) for name in LAWS])
def test_law(
    backend: Any, profile: str, seconds: float, name: str, record_property: Callable[[str, object], None]
) -> None:
    """Check that a law holds."""
    search = Search(LAWS[name], backend, seconds)
    try:
        with skip_unfit():
            search.run(PROFILES[profile])
    finally:
        record_property("checked", search.checked)
        record_property("refused", dict(search.refused))
        record_property("stopped", search.stopped)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.law(name)) for name in golden_names()])
def test_golden(backend: Any, seconds: float, name: str) -> None:
    """Check the backend against a recording of PyTorch."""
    with skip_unfit():
        check_golden(backend, name)
