"""Judge a candidate against its model; each recorded tensor is judged given the tensors recorded before it.

``verify``, ``check``, ``diff``, ``sweep`` and the prompts all use this engine. Checked in the tests: it reports a wrong
operation, but not the consequences; three independent sources detect defects planted in the engine itself.

A tensor's reference is its operation in float64, applied to the candidate's own recorded inputs. Unrecorded tensors
between two recorded tensors are computed exactly, and the effect of rounding them is measured; see
`refgemma.oracle.spans`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError
from refgemma.oracle.backward_operations import backward_operations
from refgemma.oracle.judge import DEVIATIONS, SPAN_LIMIT, Judged, Statistics, judge
from refgemma.oracle.operations import Context, Operation, double, operations
from refgemma.oracle.optimizer_operations import optimizer_operations
from refgemma.oracle.spans import Computed, measure_noise, where_compared
from refgemma.oracle.tolerance import EVEN, FORMATS, UNDERFLOW, Arithmetic, Tolerance, from_measured_std, in_decimals
from refgemma.oracle.verdicts import FAIL, INVALID, NOISY, SKEWED
from refgemma.precision import Array, as_dtype
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import GRADS, field_of
from refgemma.weights.parameters import Weights

# Operations in which PyTorch's eager kernels round more than once in half precision.
SEVERAL_ROUNDINGS = ("attention.q_rot", "attention.k_rot", "attention.scores", "attention.capped", "logits")
# Products with weights, which differ if the weights are quantised.
PRODUCTS = (
    "embedded", "attention.q", "attention.k", "attention.v", "attention.out", "feed_forward.gate", "feed_forward.up",
    "feed_forward.out", "raw_logits",
)  # fmt: skip
# The largest relative error of products that counts as quantisation: four bits give 5 to 10 per cent, three bits twice
# as much. One tensor may have `UNEVEN` times the median error.
QUANTISED_LIMIT, UNEVEN = 0.25, 4.0


@dataclass(frozen=True)
class Instance:
    """One recorded tensor with its verdict, given the tensors recorded before it."""

    tensor: str
    sources: tuple[str, ...]  # recorded tensors from which it was computed
    between: tuple[str, ...]  # unrecorded tensors in between
    judged: Judged


class Engine:
    """Apply the table of operations to a candidate's recorded tensors.

    Parameters
    ----------
    candidate : Candidate
        The recorded tensors.
    weights : Weights
        The model's weights, in the candidate's precision.
    config : Gemma2Config
        The model's configuration.
    override : float
        A factor on all tolerances; usually 1.
    quantised : bool
        If true, products with weights may all have errors of about the same relative size, as from quantisation.
    """

    def __init__(
        self, candidate: Candidate, weights: Weights, config: Gemma2Config, override: float = 1.0,
        quantised: bool = False,
    ) -> None:  # fmt: skip
        if config.hidden_activation != "gelu_pytorch_tanh":
            raise InputError(
                f"hidden_activation is {config.hidden_activation!r}; it must be gelu_pytorch_tanh, the only "
                "one with derived bounds"
            )
        self.candidate, self.config, self.override, self.quantised = candidate, config, override, quantised
        self.context = Context(config, double(weights), candidate.call, Arithmetic(candidate.dtype))
        if candidate.call.labels is not None:
            self.context = replace(
                self.context,
                backward=lambda context: chain(backward_operations(context), optimizer_operations(context)),
            )
        self.eager_context = replace(self.context, weights=weights, exact=False)
        self.usual = Computed(operations(self.context), candidate)
        self._noise: dict[tuple[str, float], Array] = {}

    @cached_property
    def recorded(self) -> list[str]:
        """The recorded tensors in the order of execution."""
        return [name for name in self.usual.table if name in self.candidate.tensors]

    @cached_property
    def eager_table(self) -> dict[str, Operation]:
        """The operations, rounded as in PyTorch's eager kernels."""
        return operations(self.eager_context)

    @cached_property
    def instances(self) -> list[Instance]:
        """The judged tensors, in the order of execution."""
        return list(self._judge_all())

    def _judge_all(self) -> Iterator[Instance]:
        for name in self.usual.table:
            if name in self.candidate.refused:
                yield Instance(name, (), (), Judged(INVALID, Statistics(), self.candidate.refused[name]))
            elif name in self.candidate.tensors:
                *between, _ = self.usual.span(name)
                sources = {s for step in (*between, name) for s in self.usual.table[step].inputs}
                recorded = tuple(s for s in self.usual.table if s in sources and s in self.candidate.inputs)
                yield Instance(name, recorded, tuple(between), self.judge(name))

    def judge(self, name: str) -> Judged:
        """Judge one recorded tensor."""
        found, exact = self.candidate.tensors[name], self.usual.result(name)
        allowed = self.tolerance(name, exact=exact)
        eager = self.eager_result(name) if self.rounds_several_times(name) else None
        judged = judge(found.numbers, exact, allowed, found.storage, self.where(name), eager, self.override)
        if self.quantised and judged.verdict in (SKEWED, FAIL) and (off := self.quantisation.get(name)):
            if off <= min(QUANTISED_LIMIT, UNEVEN * float(np.median([*self.quantisation.values()]))):
                return replace(judged, verdict=NOISY, note=f"products with weights have relative errors of {off:.2g}")
        masked = field_of(name) == "attention.probs" and np.isinf(judged.statistics.error_over_bound)
        return replace(judged, note=f"weight on a masked key: {judged.note}") if masked else judged

    @cached_property
    def quantisation(self) -> dict[str, float]:
        """The relative error of products with weights, for each recorded tensor that shows such an error."""
        found = {}
        for name in self.recorded:
            step, where = 0.01, self.where(name)
            if self.is_direct(name) and field_of(name) in PRODUCTS:
                exact = self.usual.result(name)[where]
                units = self.errors(name)[where] / max(np.sqrt(np.mean(exact**2)), UNDERFLOW)
                step = 1.0
            elif not self.is_direct(name) and any(field_of(n) in PRODUCTS for n in self.usual.span(name)):
                units = self.errors(name)[where] / self.noise(name, step)[where]
            else:
                continue
            found[name] = step * float(np.sqrt(np.mean(units[np.isfinite(units)] ** 2)))
        return found

    def is_direct(self, name: str, computed: Computed | None = None) -> bool:
        """Return True if all inputs of a tensor's operation are recorded."""
        return len((computed or self.usual).span(name)) == 1

    def tolerance(self, name: str, computed: Computed | None = None, exact: Array | None = None) -> Tolerance:
        """Return the tolerance of a recorded tensor, for the correct model or, given `computed`, for another reading.

        `exact` is the result of that reading, if it is already known.
        """
        reading, found = computed or self.usual, self.candidate.tensors[name]
        if not self.is_direct(name, reading):
            return from_measured_std(self.noise(name) * self._growth(name, reading), SPAN_LIMIT * DEVIATIONS)
        inputs, result = reading.inputs(name), reading.result(name) if exact is None else exact
        allowed = reading.table[name].tolerance(inputs, result, found.storage, self.context.arithmetic.unit)
        return in_decimals(allowed, found.coarse)

    def _growth(self, name: str, reading: Computed) -> float:
        """Return how much larger the gradients of another reading are, at least 1.

        Rounding errors are relative to the rounded numbers, and the backward pass is linear in the gradients: a loss
        that is 20 times too large has 20 times the uncertainty.
        """
        if reading is self.usual or not name.startswith(GRADS):
            return 1.0
        sizes = [float(np.linalg.norm(each.result(name)[self.where(name)])) for each in (reading, self.usual)]
        return max(1.0, sizes[0] / sizes[1]) if np.isfinite(sizes[0]) and sizes[1] else 1.0

    def noise(self, name: str, off: float = 0.0) -> Array:
        """Return the measured uncertainty of a tensor whose inputs were not recorded, in the correct model.

        Known bugs use it, too; see `_growth`. `off` is the relative error of products with weights.
        """
        if (name, off) not in self._noise:
            spans = [n for n in self.recorded if not self.is_direct(n) and (n, off) not in self._noise]
            names = spans if name in spans else [name]  # a known bug may change the connections, and so the span
            more = dict.fromkeys(PRODUCTS, off) if off else {}
            for found, noise in measure_noise(self.usual, names, self.context, more).items():
                self._noise[found, off] = np.hypot(noise, EVEN * self.candidate.tensors[found].coarse / 2)
        return self._noise[name, off]

    def eager_result(
        self, name: str, computed: Computed | None = None, table: Mapping[str, Operation] | None = None
    ) -> Array:  # fmt: skip
        """Compute a tensor from recorded inputs with the rounding of PyTorch's eager kernels."""
        storage, inputs = self.candidate.tensors[name].storage, (computed or self.usual).inputs(name)
        with np.errstate(all="ignore"):
            result = (table or self.eager_table)[name].compute(*(as_dtype(x, storage) for x in inputs))
        return np.asarray(result, np.float64)

    def rounds_several_times(self, name: str, computed: Computed | None = None) -> bool:
        """Return True if PyTorch's eager kernels round more than once from a tensor's recorded inputs to the tensor."""
        half = self.candidate.tensors[name].storage in FORMATS
        return half and field_of(name) in SEVERAL_ROUNDINGS and self.is_direct(name, computed)

    def where(self, name: str) -> Array:
        """Return a mask that is true for the elements of a recorded tensor to compare."""
        tensor = self.candidate.tensors[name]
        where = where_compared(name, self.context)
        return np.broadcast_to(where if tensor.known is None else where & tensor.known, tensor.numbers.shape)

    def errors(self, name: str) -> Array:
        """Return the error of each element of a recorded tensor."""
        with np.errstate(invalid="ignore"):
            return np.subtract(self.candidate.tensors[name].numbers, self.usual.result(name))
