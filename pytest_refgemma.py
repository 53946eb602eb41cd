"""The pytest plugin's front door: adds refgemma's options, but only where ``refgemma.testing`` is what pytest runs.

Outside the package, because importing anything of it imports NumPy and the model: other people's pytest should not
wait for that, nor meet an option called ``--backend``.
"""

from collections.abc import Sequence
from typing import Any

TESTED = "refgemma.testing"


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether a command line names `refgemma.testing`, or a test in it.

    Examples
    --------
    >>> is_asked_for(["--pyargs", "refgemma.testing"]), is_asked_for(["tests"])
    (True, False)
    """
    return any(argument.split("::")[0] in (TESTED, f"{TESTED}.test_backend") for argument in arguments)


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    """Register the plugin before the command line is read for good."""
    if is_asked_for(args):
        from refgemma.testing import plugin

        early_config.pluginmanager.register(plugin, "refgemma-testing")
        plugin.add_options(parser)
