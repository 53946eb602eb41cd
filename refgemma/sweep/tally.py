"""Summarise the results of many checks of one kind of tensor in a few numbers that can be added.

Checked in the tests: tallies merged in any order give the same result bit for bit, equal to the tally of all errors.

For n errors ``z`` in standard deviations, a tally keeps n, the sum of ``z**2`` and a histogram. The root mean square of
all errors is then ``sqrt(sum z**2 / n)`` of the merged sums. Counts are integers, and `math.fsum` adds the sums with
one rounding, so the order has no effect.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from refgemma.oracle.engine import Instance
from refgemma.oracle.judge import EDGES

NOTHING = (0,) * (len(EDGES) - 1)


@dataclass(frozen=True)
class Tally:
    """The merged statistics of some tensors.

    Examples
    --------
    >>> a = Tally({"PASS": 2}, elements=10, exact=9, squares=10.0, worst=0.5, at="layers.0.out")
    >>> b = Tally({"PASS": 1, "FAIL": 1}, elements=30, exact=1, squares=150.0, worst=4.0, at="layers.1.out")
    >>> both = merge_tallies([a, b])
    >>> both.verdicts, both.elements, both.rms, both.worst, both.at
    ({'FAIL': 1, 'PASS': 3}, 40, 2.0, 4.0, 'layers.1.out')
    """

    verdicts: Mapping[str, int]  # verdict -> number of tensors
    elements: int = 0
    exact: int = 0  # number of correctly rounded elements
    squares: float = 0.0  # sum of squared errors in standard deviations
    worst: float = 0.0  # largest error in units of the worst case
    at: str = ""  # position of the largest error
    histogram: tuple[int, ...] = NOTHING  # numbers of elements with errors between two `judge.EDGES`

    @property
    def rms(self) -> float:
        """Root mean square error in standard deviations."""
        return math.sqrt(self.squares / max(1, self.elements))

    def as_json(self) -> dict[str, Any]:
        """Return the tally as JSON types, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Tally":
        """Return the tally that `as_json` wrote; infinities may be text."""
        numbers = {name: float(kept[name]) for name in ("squares", "worst")}
        return cls(**{**kept, **numbers, "histogram": tuple(kept["histogram"])})


def merge_tallies(tallies: Iterable[Tally]) -> Tally:
    """Merge tallies; if largest errors are equal, keep the position that is first in alphabetical order."""
    some = list(tallies)
    verdicts = sorted({word for t in some for word in t.verdicts})
    largest = min(some, key=lambda t: (-t.worst, t.at), default=Tally({}))
    return Tally(
        {word: sum(t.verdicts.get(word, 0) for t in some) for word in verdicts}, sum(t.elements for t in some),
        sum(t.exact for t in some), math.fsum(t.squares for t in some), largest.worst, largest.at,
        tuple(sum(bins) for bins in zip(NOTHING, *(t.histogram for t in some), strict=True)),
    )  # fmt: skip


def tally(instance: Instance) -> Tally:
    """Return the tally of one judged tensor."""
    s = instance.judged.statistics
    return Tally({instance.judged.verdict: 1}, s.elements, round(s.exact * s.elements), s.rms**2 * s.elements,
                 s.error_over_bound,
                 instance.tensor, s.histogram or NOTHING)  # fmt: skip
