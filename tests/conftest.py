"""Array shapes checked in every test, Hypothesis profiles, and the parity tests only where PyTorch is."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from hypothesis import settings
from jaxtyping import install_import_hook

# Files that take what strangers hand in: they check it themselves, and are tested with what no annotation allows. And
# the weights, which may lie on disk: beartype looks into a sequence, and would read a layer each time. And `testing`,
# which is given the arrays of other implementations, and has annotations of Hypothesis that beartype refuses.
UNCHECKED = {"config", "hub", "inputs", "modeling", "pretrained", "settings", "testing", "text", "tokenizer", "weights"}

PACKAGE = Path(__file__).parents[1] / "refgemma"
CHECKED = sorted(f"refgemma.{path.stem}" for path in PACKAGE.iterdir() if path.stem not in UNCHECKED)

# Everywhere else the annotations are held against the arrays of each call. The hook has to stand before refgemma is
# imported, so nothing here imports it. (pytest's option --jaxtyping-packages does the same, but beartype then refuses
# an int for a float, which is_pep484_tower allows, as Python and mypy do.)
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Without a deadline: the first call of a NumPy function takes many times as long as the second.
settings.register_profile("ci", derandomize=True, deadline=None, database=None)  # the same examples every time
settings.register_profile("dev", deadline=None)  # new examples every time; failing ones are kept
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]

# Files rather than the folder: a folder named on the command line would be entered in spite of this.
collect_ignore_glob = ["parity/*"] if MISSING else []


def pytest_report_header() -> str:
    if MISSING:
        return f'parity: not run, {" and ".join(MISSING)} not installed; pip install -e ".[record]" brings them'
    return f"parity: against torch {version('torch')} and transformers {version('transformers')}"
