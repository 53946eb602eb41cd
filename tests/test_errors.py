"""Check that all errors of the package have one base, and give one line on the command line."""

import argparse
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.cli.output import prompt_ids
from refgemma.errors import RefgemmaError, UsageError

# Exceptions that are not an error of a caller or of a file.
OTHERS = {
    "Interrupted": "a signal, as KeyboardInterrupt is; the command ends with its number",
    "LawBroken": "the answer of a law that does not hold: an assertion, as pytest expects",
    "NotApplicable": "ends a law that a backend cannot be asked; the plugin makes a skip of it",
    "Refused": "ends a law if the backend refuses every model; the report counts it",
    "SearchEnded": "ends a law whose time is used, or whose models are all refused; the report counts its examples",
    "Unsupported": "a backend's own answer to an example; the search goes on with the next one",
}


def exceptions() -> Iterator[type[BaseException]]:
    for module in pkgutil.walk_packages(refgemma.__path__, "refgemma."):
        if module.name == "refgemma.__main__":
            continue  # it runs the command line
        for _, found in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(found, BaseException) and found.__module__ == module.name:
                yield found


def test_every_error_has_the_one_base() -> None:
    found = {error.__name__: error for error in exceptions()}
    assert {"CheckpointError", "ProgramError", "UsageError", *OTHERS} <= found.keys()
    assert {name for name, error in found.items() if not issubclass(error, RefgemmaError)} == OTHERS.keys()


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "generate text --ids 2",
        "generate --ids two",
        "perplexity",
        "verify case --full 9b-synthetic",
        "sweep jobs --workers 0",
        "variants nothing",
    ],
)
def test_wrong_flags_are_one_line_and_code_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith(f"refgemma {command.split()[0]}: ")


def test_wrong_flags_are_apart_from_wrong_inputs() -> None:
    model = refgemma.load("tiny")
    with pytest.raises(UsageError, match="either a PROMPT or --ids"):
        prompt_ids(argparse.Namespace(prompt="a", ids="2"), model)
    assert not issubclass(UsageError, refgemma.InputError)
    assert not issubclass(refgemma.InputError, UsageError)
