"""Test each law and each recording on the chosen backend, for ``pytest --pyargs refgemma.testing``.

In refgemma's own test run, the backend is refgemma.
"""

from collections.abc import Callable
from typing import Any

import pytest

from refgemma.testing.backends import backend_named
from refgemma.testing.laws import NotApplicable
from refgemma.testing.plugin import BACKEND, NOT_APPLICABLE, OURS
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


def ask(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check; skip it if it is not applicable. The plugin counts such laws separately."""
    try:
        check(*arguments)
    except NotApplicable as reason:
        pytest.skip(f"{NOT_APPLICABLE}{reason}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.law(name)) for name in LAWS])
def test_law(backend: Any, profile: str, name: str) -> None:
    """Check that a law holds."""
    ask(LAWS[name], backend, profile)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.law(name)) for name in golden_names()])
def test_golden(backend: Any, name: str) -> None:
    """Check the backend against a recording of PyTorch."""
    ask(check_golden, backend, name)
