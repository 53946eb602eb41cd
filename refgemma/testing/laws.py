"""Define laws, check an example of a law, and search for an example that breaks a law, with Hypothesis.

Checked from outside, through the plugin, in ``tests/test_testing_plugin.py``.

The tolerance between two results that should be equal is measured. Rounding a sum of n products is like changing its
weights by a relative amount ``gamma(n)`` (Higham 2002, section 3.1). Independent roundings reach about ``sqrt(n) u`` of
this (Higham and Mary 2019, doi:10.1137/18M1226312). So the model is run again with weights changed at random by a small
known amount. The tolerance is the change of the result, divided by the ratio of that amount to rounding. Only a model
that magnifies errors gets a larger tolerance.

Two roundings are float32 in every precision: of rotary angles, and of a weight that a law derives from others and
writes to a file. These are added to the tolerance where they occur, once per number.
"""

import math
import tempfile
import time
import unittest
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from safetensors.numpy import save_file

from refgemma.config import Gemma2Config
from refgemma.files import pluralise
from refgemma.precision import Array, dtype_name
from refgemma.testing.cached import with_forward
from refgemma.testing.interface import REFUSALS, Backend, BackendError, Capabilities, Output, Unsupported
from refgemma.testing.strategies import Scene

Tensors = Mapping[str, Array]
Exact = npt.NDArray[np.float64]

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
PRECISE_FIRST = ("float64", "float32", "float16", "bfloat16")
# The tolerance in standard deviations of a random walk of roundings.
DEVIATIONS = 8
# The relative error of a weight that is written to a file, where weights are float32.
FILE_ROUNDOFF = ROUNDOFF["float32"]
# The relative change of the weights in the measurement: far above float32's rounding, far below 1.
PROBE = 2.0**-14

# A search ends after this number of refusals if no example was accepted. If the backend accepted one model in twenty,
# this would happen in 1 of 100 searches. Hypothesis ends a search in the same way, but for one in a hundred: after 459.
REFUSALS_IN_A_ROW = math.ceil(math.log(0.01) / math.log(1 - 1 / 20))

# The number of examples per law. There is no deadline, because a first call may compile. The phase `explain` of
# Hypothesis is off: it takes nine tenths of the time of a law that fails, and the printed program shows more.
COMMON = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase != Phase.explain],
)  # fmt: skip
PROFILES: Mapping[str, settings] = {
    "dev": settings(COMMON, max_examples=8),
    "ci": settings(COMMON, max_examples=20, derandomize=True),
    "deep": settings(COMMON, max_examples=1000),
}


class NotApplicable(Exception):
    """Raised if a law does not apply to a backend; the message names the missing capability."""


class Refused(NotApplicable):
    """Raised if the backend refused every model that a law or a recording asked it to load."""


class SearchEnded(unittest.SkipTest):
    """Raised to end a search; Hypothesis draws no further example, and no simpler one, after a skipped one."""


class LawBroken(AssertionError):
    """Raised for a broken law or a failed recording; `script` is a program that reproduces it."""

    def __init__(self, message: str, script: str) -> None:
        super().__init__(message)
        self.script = script


def exact(x: Any) -> Exact:
    """Return any array as an ordinary float64 array."""
    return np.array(x, np.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model loaded by the backend under test, with its configuration and weights."""

    bench: "Bench"
    config: Gemma2Config
    tensors: Tensors
    dtype: str
    folder: Path
    handle: Any

    def run(self, ids: Any, wanted: Sequence[str] = ("logits",), mask: Any = None, positions: Any = None,
            cache: Any = None) -> Output:  # fmt: skip
        """Call the backend once."""
        limit = self.bench.can.max_length
        if limit is not None and np.shape(mask if mask is not None else ids)[1] > limit:
            raise Unsupported(f"texts of more than {pluralise(limit, 'token')}")
        ids, mask = np.asarray(ids, np.int64), None if mask is None else np.asarray(mask, np.int64)
        with explain_errors(self.config):
            output: Output = self.bench.backend.forward(self.handle, ids, mask, positions, cache, tuple(wanted))
        return output

    def logits(self, ids: Any, mask: Any = None, positions: Any = None) -> Exact:
        """Return the final logits ``(batch, seq, vocab)`` in float64."""
        return exact(self.run(ids, mask=mask, positions=positions).logits)

    @cached_property
    def probe(self) -> "LoadedModel":
        """A model with each weight changed at random, by a relative amount of `PROBE`."""
        rng = np.random.default_rng(0)
        changed = {
            name: (x * (1 + PROBE * rng.standard_normal(x.shape))).astype(np.float32)
            for name, x in self.tensors.items()
        }
        return self.bench.model(self.config, changed, self.dtype)

    @property
    def roundings(self) -> float:
        """The size of many successive roundings (a random walk), in units of the precision's roundoff."""
        c = self.config
        terms = c.hidden_size + c.intermediate_size + c.num_attention_heads * c.head_dim
        return DEVIATIONS * float(np.sqrt(terms))


@contextmanager
def explain_errors(config: Gemma2Config) -> Iterator[None]:
    """Treat a NotImplementedError of the backend as a refusal; other errors get advice on refusals."""
    try:
        yield
    except (Unsupported, BackendError):
        raise
    except NotImplementedError as error:
        raise Unsupported(str(error) or "it raised NotImplementedError") from error
    except Exception as error:  # whatever an implementation may raise
        found = [repr(word) for word, is_refused in REFUSALS.items() if is_refused(config)]
        advice = f"; if it refuses such models, add {' or '.join(found)} to refuses of its Capabilities"
        raise AssertionError(f"the backend raised {error!r}{advice if found else ''}") from error


Ask = Callable[[LoadedModel], Any]  # takes a model and returns an array


class Bench(ExitStack):
    """The backend under test and the models of one example, each in its own folder, which is removed at the end."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend: Any = backend
        self.can: Capabilities = backend.capabilities()
        folder = tempfile.TemporaryDirectory(prefix="refgemma-", ignore_cleanup_errors=True)
        self._folder = Path(self.enter_context(folder))
        self.enter_context(np.errstate(all="ignore"))  # the laws also judge numbers that overflow
        self._models = 0
        self.file_roundoff = 0.0  # becomes `FILE_ROUNDOFF` when a weight is rounded to float32 in a file

    @property
    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """The backend's single operations."""
        found: Mapping[str, Callable[..., Any]] = self.backend.operations()
        return found

    @property
    def dtype(self) -> str:
        """The most precise format of the backend; used for laws that hold in any format."""
        return next(dtype for dtype in PRECISE_FIRST if dtype in self.can.dtypes)

    def new_folder(self) -> Path:
        """Make an empty folder."""
        self._models += 1
        folder = self._folder / str(self._models)
        folder.mkdir()
        return folder

    def model(self, config: Gemma2Config, tensors: Tensors, dtype: str | None = None) -> LoadedModel:
        """Write a Hugging Face folder and load it with the backend.

        The weights become float32; if this rounds a weight, `allowed` includes this error.
        """
        self.can.refuse_model(config)
        folder = self.new_folder()
        self.can.save_config(config, folder)
        stored = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
        if not all(np.array_equal(stored[name], x, equal_nan=True) for name, x in tensors.items()):
            self.file_roundoff = FILE_ROUNDOFF
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        dtype = dtype or self.dtype
        with explain_errors(config):
            return LoadedModel(self, config, stored, dtype, folder, self.backend.load(folder, dtype))

    def scene(self, scene: Scene, changed: Tensors | None = None, dtype: str | None = None) -> LoadedModel:
        """Load the model of a scene, with some tensors `changed`."""
        return self.model(scene.config, scene.tensors | dict(changed or {}), dtype)

    def allowed(self, model: LoadedModel, ask: Ask, angle: float = 0.0) -> float:
        """Return the tolerance between two roundings of the result of `ask`."""
        value, changed = exact(ask(model)), exact(ask(model.probe))
        response = float(np.max(np.abs(changed - value), initial=0.0)) / PROBE
        largest = float(np.max(np.abs(value), initial=0.0))
        roundings = model.roundings * ROUNDOFF[model.dtype] + DEVIATIONS * (angle + self.file_roundoff)
        return roundings * (response + largest)

    def same(
        self, model: LoadedModel, ask: Callable[[LoadedModel], Any], other: Any, says: str, angle: float = 0.0
    ) -> None:
        """Require that the result of `ask` is `other`, up to rounding.

        Parameters
        ----------
        ask : callable
            Function that takes a model and returns an array.
        other : array
            The result that the law requires.
        says : str
            A description of the two results, for the message.
        angle : float
            The rounding error of rotary angles, which are float32 in every precision. Rotating a query by a small angle
            changes it by the same relative amount.
        """
        value, expected = exact(ask(model)), exact(other)
        require(value.shape == expected.shape, f"{says}: the shapes are {value.shape} and {expected.shape}")
        both = (value == expected) | (np.isnan(value) & np.isnan(expected))
        apart = np.where(both, 0.0, np.abs(value - expected))
        if not np.any(apart):
            return
        limit = self.allowed(model, ask, angle)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(apart), np.inf, apart)), apart.shape)
        require(
            apart[worst] <= limit,
            f"{says}: at {list(map(int, worst))} the results are {value[worst]:.9g} and {expected[worst]:.9g}, apart "
            "by "
            f"{apart[worst]:.3g}; rounding to {model.dtype} explains {limit:.3g}",
        )

    def same_logits(
        self, model: LoadedModel, ids: Any, other: Any, says: str, at: Any = ..., angle: float = 0.0
    ) -> None:
        """Require that the logits of token ids equal `other`, both at the places `at`; see `same`."""
        self.same(model, lambda m: m.logits(ids)[at], exact(other)[at], says, angle)

    def keep_logits(self, scene: Scene, changed: Tensors, says: str, **numbers: Any) -> None:
        """Require that changed tensors and numbers of the configuration leave the logits of a scene unchanged."""
        other = self.model(scene.config.changed(**numbers), scene.tensors | dict(changed))
        self.same_logits(self.scene(scene), scene.ids, other.logits(scene.ids), f"logits, and {says}")

    def different_logits(self, model: LoadedModel, ids: Any, other: Any, says: str, at: Any = ...) -> None:
        """Require that the logits of token ids differ from `other` at the places `at`, by more than rounding."""

        def ask(m: LoadedModel) -> Exact:
            return exact(m.logits(ids)[at])

        apart = float(np.max(np.abs(ask(model) - exact(other)[at]), initial=0.0))
        limit = self.allowed(model, ask)
        require(apart > limit, f"{says}: the largest change is {apart:.3g}, not more than rounding ({limit:.3g})")


def require(holds: Any, says: str) -> None:
    """Raise an AssertionError with this message unless all of `holds` is true; also under ``python -O``."""
    if not np.all(holds):
        raise AssertionError(says)


def find_missing(backend: Any, needs: Sequence[str]) -> str:
    """Return a sentence on the first of `needs` that a backend lacks, or an empty text if it has all.

    A need is ``cache``, ``padding`` or ``positions``, ``dtype:float64``, ``tensor:layers.0.out``, or the name of an
    optional method.
    """
    can = backend.capabilities()
    for need in needs:
        kind, _, name = need.partition(":")
        if kind == "dtype" and name not in can.dtypes:
            return f"it does not use {name} in every step"
        if kind == "tensor" and not can.shows(name):
            return f"it does not show the tensor {name}"
        if need in ("cache", "padding", "positions") and not getattr(can, need):
            return f"its forward takes no {need}"
        if not name and need not in ("cache", "padding", "positions") and not hasattr(backend, need):
            return f"it has no method named {need}"
    return ""


@dataclass(frozen=True)
class Law:
    """One law: the `check` of one example, and the strategy that generates examples.

    Call a law with a backend to search for an example that breaks it, or with a backend and an example to check that
    one.
    """

    name: str
    says: str
    check: Callable[..., None]
    examples: st.SearchStrategy[Mapping[str, Any]]
    needs: tuple[str, ...]

    def __call__(self, backend: Any, profile: str = "ci", **example: Any) -> None:
        """Check the law.

        Raises
        ------
        NotApplicable
            If the law does not apply to the backend.
        Refused
            If the backend refuses every model of the examples.
        LawBroken
            If the law does not hold; the error has a script that reproduces this.
        """
        backend = with_forward(backend)
        if not example:
            Search(self, backend).run(PROFILES[profile])
        elif fault := find_missing(backend, self.needs):
            raise NotApplicable(fault)
        else:
            with Bench(backend) as bench:
                self.check(bench, **example)


@dataclass
class Search:
    """The search for an example that breaks a law.

    Parameters
    ----------
    law : Law
        The law.
    backend : Backend
        The implementation under test.
    seconds : float
        The time after which no further example is checked. The first example is always checked, and an example that
        breaks the law is kept, but no simpler one is searched for.

    Attributes
    ----------
    checked : int
        The number of examples that were checked.
    refused : Counter
        The number of examples that the backend refused, by the reason.
    stopped : bool
        True if the time was used before the last example.
    """

    law: Law
    backend: Any
    seconds: float = math.inf
    checked: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    stopped: bool = False
    end: float = field(default=math.inf, init=False)
    begun: int = field(default=0, init=False)
    broken: list[tuple[Mapping[str, Any], Exception]] = field(default_factory=list, init=False)
    given_up: list[Exception] = field(default_factory=list, init=False)

    @property
    def examples(self) -> st.SearchStrategy[Mapping[str, Any]]:
        """The strategy that generates examples."""
        return self.law.examples

    def check(self, bench: Bench, **example: Any) -> None:
        """Check one example; without time, or if every example was refused, end the search at the next example."""
        if self.begun and time.monotonic() > self.end:
            self.stopped = True
            self.given_up.append(SearchEnded("the time is used"))
            return
        self.begun += 1
        try:
            self.law.check(bench, **example)
        except Unsupported:
            if not self.checked and self.begun >= REFUSALS_IN_A_ROW:
                self.given_up.append(SearchEnded("every example was refused"))
            raise
        self.checked += 1

    def run(self, profile: settings) -> None:
        """Search; raises as `Law`."""
        if fault := find_missing(self.backend, self.law.needs):
            raise NotApplicable(fault)
        self.end = time.monotonic() + self.seconds
        refusals: list[str] = []
        checked: list[int] = []
        backend, broken, given_up = self.backend, self.broken, self.given_up

        # The examples that the profile ci draws depend on the text of this function and its decorators.
        @profile
        @given(self.examples)
        def holds(example: Mapping[str, Any]) -> None:
            if given_up:
                raise given_up[
                    0
                ]  # a program that crashes or hangs is not started hundreds of times for a simpler example
            try:
                with Bench(backend) as bench:
                    self.check(bench, **example)
                checked.append(1)
            except Unsupported as refusal:
                refusals.append(str(refusal))
                assume(False)
            except Exception as error:  # whatever an implementation may raise
                broken.append((example, error))  # the last one is the simplest that Hypothesis found
                if isinstance(error, BackendError):
                    given_up.append(error)
                raise

        try:
            holds()
        except (SearchEnded, Unsatisfiable):
            pass  # the time is used, or every example was refused
        except Exception:
            if not broken:
                raise
        finally:
            self.refused = Counter(refusals)
        if broken:
            example, cause = broken[-1]
            text = script(self.law.name, backend, example)
            raise LawBroken(f"{self.law.name}: {message(cause)}", text) from cause
        if refusals and not self.checked:
            raise Refused(refusals[0])
        if not self.checked:
            raise NotApplicable("no example could be generated for it")


def message(cause: Exception) -> str:
    """Return a sentence on the failure: the message of a check, or the backend's exception."""
    return str(cause) if isinstance(cause, AssertionError) else f"the backend raised {cause!r}"


def law(
    examples: st.SearchStrategy[Mapping[str, Any]] | None = None, needs: Sequence[str] = (), **parts: Any
) -> Callable[[Callable[..., None]], Law]:
    """Make a `Law` from a function of a `Bench` and an example; its docstring states the law.

    An example is drawn from `examples`, or consists of `parts`, each drawn from the strategy of the same name.
    """

    def make(check: Callable[..., None]) -> Law:
        says = " ".join((check.__doc__ or "").split("\n\n")[0].split())
        drawn = st.fixed_dictionaries(parts) if examples is None else examples
        return Law(check.__name__, says, check, drawn, tuple(needs))

    return make


# --- scripts ----------------------------------------------------------------------------------------------------------


def write_value(value: Any) -> str:
    """Return a value of an example as Python text; arrays are written as bits, without loss."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 1:
        dtype = dtype_name(value)
        stored = exact(value).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        bits = stored.view(f"u{stored.itemsize}")
        return f"from_bits({bits.tolist()}, {dtype!r})"
    if isinstance(value, np.ndarray):
        return f"np.array({value.tolist()!r})"
    return repr(value)


def find_name(backend: Any) -> str:
    """Return the name by which `backend_named` finds a backend."""
    return str(getattr(backend, "__backend_name__", f"{type(backend).__module__}:{type(backend).__qualname__}"))


def script(name: str, backend: Any, example: Mapping[str, Any]) -> str:
    """Return a program that checks one example of a law and does not need pytest."""
    arguments = "".join(f",\n    {key}={write_value(value)}" for key, value in example.items())
    return (
        f"{_says(f'Breaks the law {name}.')}"
        "import numpy as np\n\n"
        "from refgemma.config import Gemma2Config\n"
        "from refgemma.testing import properties\n"
        "from refgemma.testing.backends import backend_named\n"
        "from refgemma.testing.strategies import Scene, from_bits\n\n"
        f"properties.{name}(\n    backend_named({find_name(backend)!r}){arguments},\n)\n"
    )


def golden_script(name: str, backend: Any) -> str:
    """Return a program that compares a backend with one recording and does not need pytest."""
    return (
        f"{_says(f'Differs from the recording {name}.')}"
        "from refgemma.testing.backends import backend_named\n"
        "from refgemma.testing.recordings import check_golden\n\n"
        f"check_golden(\n    backend_named({find_name(backend)!r}), {name!r},\n)\n"
    )


def _says(what: str) -> str:
    return f'"""{what} Needs refgemma[test] and the backend."""\n\n'
