"""Judge another implementation's trace: find the first wrong tensor, and the known bug that explains it.

`check` takes a trace file of another implementation and returns a `Report`. `capture_transformers` makes the tensors of
such a file from a live transformers model, `capture_modules` from a PyTorch model of any project; `save_trace` writes
it and `load_trace` reads it. `numbers_for` returns a model's numbers under an engine's names. `known_bugs` has the
catalogue, ``known_bugs.KNOWN_BUGS``. The command is ``refgemma check``.
"""

from refgemma.oracle import known_bugs
from refgemma.oracle.config_check import numbers_for
from refgemma.oracle.diagnose import Finding, Report
from refgemma.oracle.engine import Instance
from refgemma.oracle.pipeline import check
from refgemma.trace.candidate import Candidate, load_trace
from refgemma.trace.capture import capture_modules, capture_transformers
from refgemma.trace.names import save_trace

__all__ = [
    "Candidate",
    "Finding",
    "Instance",
    "Report",
    "capture_modules",
    "capture_transformers",
    "check",
    "known_bugs",
    "load_trace",
    "numbers_for",
    "save_trace",
]
