"""What docs/property-tests.md says of changes in the core is what `mutation.py` measured, of the code as it is, and
every survivor is argued."""

import mutation
import pytest
from mutation import BEGIN, END, PAGE, Mutant, code, problems, read_arguments, read_results, table, total

RESULTS, ARGUMENTS = read_results(), read_arguments()


def test_every_module_of_the_core_is_measured_and_every_survivor_is_argued() -> None:
    assert problems(RESULTS, ARGUMENTS) == []
    assert all(because.strip() for argued in ARGUMENTS.values() for because in argued.values())


def test_the_score_is_what_was_asked_for() -> None:
    assert total(RESULTS).score >= 0.95
    assert PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip() == table(RESULTS)


def test_what_is_missing_or_stale_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, one = RESULTS["ops"], Mutant("linear", "y = x", "y = None")
    few = {name: result for name, result in RESULTS.items() if name != "layers"}
    assert "layers: it has not been measured" in problems(few, ARGUMENTS)
    more = RESULTS | {"ops": mutation.Result(ops.sha256, ops.mutants, [*ops.survivors, one])}
    assert problems(more, ARGUMENTS) == [f"not argued: ops.{one}"]
    assert problems(RESULTS, ARGUMENTS | {"ops": ARGUMENTS["ops"] | {one: "?"}}) == [
        f"stale: ops.{one} does not survive"
    ]
    monkeypatch.setattr(mutation, "code", lambda text: text.replace("np.tanh", "np.sinh"))
    assert "ops: its results are of an earlier version; run it again" in problems(RESULTS, ARGUMENTS)


def test_results_outlive_other_words() -> None:
    before = '"""A."""\n\n\ndef f(x):\n    """B."""\n    return x + 1  # why\n'
    after = '"""Other\nwords."""\n\ndef f(x):\n    # more\n    """C."""\n    return (\n        x + 1)\n'
    assert code(before) == "deff(x):returnx+1"
    assert code(after) == "deff(x):return(x+1)"
    assert code(before) != code(before.replace("+ 1", "+ 2"))
