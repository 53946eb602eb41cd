"""What many checks found of one kind of tensor, in a few numbers that can be added up. Checked in the tests: in
whatever order tallies are merged, the result is the same to the last bit, and it is that of all errors together.

Of n errors ``z`` in standard deviations a tally keeps n, the sum of ``z**2`` and a histogram. The root mean square of
all is then ``sqrt(sum z**2 / n)`` of the merged sums. Counts are integers, and `math.fsum` adds the sums with one
rounding, so that the order cannot show.
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
    """The statistics of some tensors, merged.

    Examples
    --------
    >>> a = Tally({"PASS": 2}, elements=10, exact=9, squares=10.0, worst=0.5, at="layers.0.out")
    >>> b = Tally({"PASS": 1, "FAIL": 1}, elements=30, exact=1, squares=150.0, worst=4.0, at="layers.1.out")
    >>> both = merge_tallies([a, b])
    >>> both.verdicts, both.elements, both.rms, both.worst, both.at
    ({'FAIL': 1, 'PASS': 3}, 40, 2.0, 4.0, 'layers.1.out')
    """

    verdicts: Mapping[str, int]  # of how many tensors
    elements: int = 0
    exact: int = 0  # elements that are the correctly rounded result
    squares: float = 0.0  # sum of squared errors in standard deviations
    worst: float = 0.0  # largest error in units of the worst case
    at: str = ""  # where that is
    histogram: tuple[int, ...] = NOTHING  # elements by their error in standard deviations, between `judge.EDGES`

    @property
    def rms(self) -> float:
        """Root mean square error in standard deviations."""
        return math.sqrt(self.squares / max(1, self.elements))

    def as_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it, infinities as text as well."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Tally":
        """What `as_json` wrote."""
        numbers = {name: float(kept[name]) for name in ("squares", "worst")}
        return cls(**{**kept, **numbers, "histogram": tuple(kept["histogram"])})


def merge_tallies(tallies: Iterable[Tally]) -> Tally:
    """One tally of all; of largest errors that are equal, the one whose place comes first in the alphabet is told."""
    some = list(tallies)
    verdicts = sorted({word for t in some for word in t.verdicts})
    largest = min(some, key=lambda t: (-t.worst, t.at), default=Tally({}))
    return Tally(
        {word: sum(t.verdicts.get(word, 0) for t in some) for word in verdicts}, sum(t.elements for t in some),
        sum(t.exact for t in some), math.fsum(t.squares for t in some), largest.worst, largest.at,
        tuple(sum(bins) for bins in zip(NOTHING, *(t.histogram for t in some), strict=True)),
    )  # fmt: skip


def tally(instance: Instance) -> Tally:
    """Of one judged tensor."""
    s = instance.judged.statistics
    return Tally({instance.judged.verdict: 1}, s.elements, round(s.exact * s.elements), s.rms**2 * s.elements,
                 s.error_over_bound,
                 instance.tensor, s.histogram or NOTHING)  # fmt: skip
