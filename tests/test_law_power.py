"""Check that laws can fail: the tables of docs/property-tests.md equal `law_power.py`'s results, and each law finds one
of its bugs again. Checking all bugs takes an hour."""

import law_power
import pytest
from law_power import ALL, BEGIN, END, NONE, PAGE, finds, mistaken, problems, read_found, tables

from refgemma.testing.properties import LAWS

pytestmark = pytest.mark.slow

# Of each law the mistake that the fewest other laws find: it is the law's own more than others'.
FOUND_BY_LAW = {law: [name for name, laws in read_found().items() if law in laws] for law in LAWS}
OWN = {law: min(names, key=lambda name: len(read_found()[name])) for law, names in FOUND_BY_LAW.items() if names}


@pytest.mark.parametrize("law", OWN)
def test_a_law_finds_a_mistake(law: str) -> None:
    with mistaken(OWN[law]) as backend:
        assert finds(law, backend)


@pytest.mark.parametrize(
    "law", ["chunks_change_nothing", "left_padding_in_calls_changes_nothing", "the_stream_is_a_sum"]
)
def test_without_a_mistake_a_law_finds_none(law: str) -> None:
    # The catalogue's mistakes are made in a model that computes in its own way: it has to be right without them.
    with mistaken(NONE) as backend:
        assert not finds(law, backend)


def test_the_tables_are_what_was_found() -> None:
    found = read_found()
    assert set(found) <= set(ALL)
    assert problems(found) == []
    page = PAGE.read_text("utf-8")
    assert page.split(BEGIN)[1].split(END)[0].strip() == tables(found)


def test_a_law_that_finds_nothing_is_told() -> None:
    blind = {name: [law for law in laws if law != "causality"] for name, laws in read_found().items()}
    assert "`causality`" in law_power.still_open(blind)


def test_a_mistake_that_nobody_explains_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(law_power.WHY_NOT))
    monkeypatch.delitem(law_power.WHY_NOT, name)
    assert problems(read_found()) == [f"{name}: no law finds it, and no reason is given"]
