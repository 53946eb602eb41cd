"""A candidate beside the model that it claims to be: every recorded tensor judged on what was recorded before it.

``verify``, ``check``, ``diff``, ``sweep`` and the prompts all use it. Checked in the tests: a wrong operation is
accused and what follows from it is not; a defect planted in the engine itself is seen by three witnesses from outside.

A tensor's reference is its operation in float64, applied to the candidate's own recorded inputs. What lies between two
recorded tensors and was not recorded is computed exactly, and how far rounding in it carries the result is measured:
see `refgemma.oracle.spans`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError
from refgemma.oracle.judge import DEVIATIONS, SPAN_LIMIT, Judged, Statistics, judge
from refgemma.oracle.operations import Context, Operation, double, operations
from refgemma.oracle.spans import Computed, measure_noise, where_compared
from refgemma.oracle.tolerance import EVEN, FORMATS, Arithmetic, Tolerance, from_measured_std, in_decimals
from refgemma.oracle.verdicts import INVALID
from refgemma.precision import Array, as_dtype
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import field_of
from refgemma.weights.parameters import Weights

# The operations that PyTorch's eager kernels round more than once in half precision.
SEVERAL_ROUNDINGS = ("attention.q_rot", "attention.k_rot", "attention.scores", "attention.capped", "logits")


@dataclass(frozen=True)
class Instance:
    """One recorded tensor, judged on what was recorded before it."""

    tensor: str
    sources: tuple[str, ...]  # recorded tensors that it was computed from
    between: tuple[str, ...]  # tensors that lie between, which were not recorded
    judged: Judged


class Engine:
    """The table of operations applied to what a candidate recorded.

    Parameters
    ----------
    candidate : Candidate
        The recorded tensors.
    weights : Weights
        The model's, in the candidate's precision.
    config : Gemma2Config
        The model's numbers.
    override : float
        A factor on everything that rounding may do; 1 unless a user asks for another.
    """

    def __init__(self, candidate: Candidate, weights: Weights, config: Gemma2Config, override: float = 1.0) -> None:
        if config.hidden_activation != "gelu_pytorch_tanh":
            raise InputError(
                f"hidden_activation is {config.hidden_activation!r}: bounds are derived for gelu_pytorch_tanh only"
            )
        self.candidate, self.config, self.override = candidate, config, override
        self.context = Context(config, double(weights), candidate.call, Arithmetic(candidate.dtype))
        self.eager_context = replace(self.context, weights=weights, exact=False)
        self.usual = Computed(operations(self.context), candidate)
        self._noise: dict[str, Array] = {}

    @cached_property
    def recorded(self) -> list[str]:
        """The recorded tensors in the order of execution."""
        return [name for name in self.usual.table if name in self.candidate.tensors]

    @cached_property
    def eager_table(self) -> dict[str, Operation]:
        """The operations as PyTorch's eager kernels round them."""
        return operations(self.eager_context)

    @cached_property
    def instances(self) -> list[Instance]:
        """Each recorded tensor, judged, in the order of execution."""
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
        masked = field_of(name) == "attention.probs" and np.isinf(judged.statistics.error_over_bound)
        return replace(judged, note=f"weight on a masked key: {judged.note}") if masked else judged

    def is_direct(self, name: str, computed: Computed | None = None) -> bool:
        """Return whether all inputs of a tensor's operation are recorded."""
        return len((computed or self.usual).span(name)) == 1

    def tolerance(self, name: str, computed: Computed | None = None, exact: Array | None = None) -> Tolerance:
        """Return what rounding may do to a recorded tensor, under the usual reading of the model or another.

        `exact` is the result of that reading, if it is known already.
        """
        reading, found = computed or self.usual, self.candidate.tensors[name]
        if not self.is_direct(name, reading):
            return from_measured_std(self.noise(name), SPAN_LIMIT * DEVIATIONS)
        inputs, result = reading.inputs(name), reading.result(name) if exact is None else exact
        allowed = reading.table[name].tolerance(inputs, result, found.storage, self.context.arithmetic.unit)
        return in_decimals(allowed, found.coarse)

    def noise(self, name: str) -> Array:
        """Return the measured uncertainty of a tensor whose inputs were not recorded.

        That of the right model serves every known bug.
        """
        if name not in self._noise:
            spans = [n for n in self.recorded if not self.is_direct(n) and n not in self._noise]
            names = spans if name in spans else [name]  # a known bug may be wired otherwise, and have another span
            for found, noise in measure_noise(self.usual, names, self.context).items():
                self._noise[found] = np.hypot(noise, EVEN * self.candidate.tensors[found].coarse / 2)
        return self._noise[name]

    def eager_result(
        self, name: str, computed: Computed | None = None, table: Mapping[str, Operation] | None = None
    ) -> Array:  # fmt: skip
        """Return a tensor as PyTorch's eager kernels round its operation, on the inputs of a reading of the model."""
        storage, inputs = self.candidate.tensors[name].storage, (computed or self.usual).inputs(name)
        with np.errstate(all="ignore"):
            result = (table or self.eager_table)[name].compute(*(as_dtype(x, storage) for x in inputs))
        return np.asarray(result, np.float64)

    def rounds_several_times(self, name: str, computed: Computed | None = None) -> bool:
        """Whether PyTorch's eager kernels round more than once from a tensor's inputs, all of them recorded, to it."""
        half = self.candidate.tensors[name].storage in FORMATS
        return half and field_of(name) in SEVERAL_ROUNDINGS and self.is_direct(name, computed)

    def where(self, name: str) -> Array:
        """Return which elements of a recorded tensor are compared."""
        tensor = self.candidate.tensors[name]
        where = where_compared(name, self.context)
        return np.broadcast_to(where if tensor.known is None else where & tensor.known, tensor.numbers.shape)

    def errors(self, name: str) -> Array:
        """Return by how much each element of a recorded tensor is off its reference."""
        with np.errstate(invalid="ignore"):
            return np.subtract(self.candidate.tensors[name].numbers, self.usual.result(name))
