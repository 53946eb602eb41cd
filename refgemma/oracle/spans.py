"""Compute each of a candidate's tensors from the tensors recorded before it.

Checked in the tests: a wrong operation is reported, but not its consequences.

Unrecorded tensors between two recorded tensors are computed exactly. The effect of rounding in these tensors is
measured: in `DRAWS` simulated runs, each gets random errors with the standard deviation of its operation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from refgemma.oracle.operations import Context, Operation, window_mask
from refgemma.precision import Array
from refgemma.trace.candidate import Candidate
from refgemma.trace.names import AFTER, AXES, GRADS, field_of, layer_of
from refgemma.weights.parameters import EMBED_TOKENS

DRAWS = 16
KEPT_BYTES = 2**26  # larger tensors, such as scores of long texts, are computed again at each use


@dataclass
class Computed:
    """The operations of the model, correct or with a bug, applied to a candidate's recorded tensors."""

    table: Mapping[str, Operation]
    candidate: Candidate
    between: dict[str, Array] = field(default_factory=dict)  # unrecorded tensors that were computed
    spans: dict[str, list[str]] = field(default_factory=dict)  # the results of `span`

    def edit(self, table: Mapping[str, Operation]) -> "Computed":
        """Return this object with the operations of another table; keep computed tensors that do not depend on the
        changes."""
        changed: set[str] = set()
        recorded = self.candidate.inputs.keys()
        for name, op in table.items():
            if op is not self.table.get(name) or any(s in changed and s not in recorded for s in op.inputs):
                changed.add(name)
        kept = {name: x for name, x in self.between.items() if name not in changed}
        return Computed(table, self.candidate, kept)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The index of each operation in the order of execution."""
        return {name: place for place, name in enumerate(self.table)}

    def value(self, name: str) -> Array:
        """Return a tensor to use as an input: the recorded tensor or, if unrecorded, the computed one."""
        if name in self.candidate.inputs:
            return self.candidate.inputs[name].numbers
        if name in self.between:
            return self.between[name]
        result = self.result(name)
        if result.nbytes <= KEPT_BYTES:
            self.between[name] = result
        return result

    def inputs(self, name: str) -> list[Array]:
        """Return the inputs of an operation."""
        return [self.value(source) for source in self.table[name].inputs]

    def result(self, name: str) -> Array:
        """Return the result of an operation in float64."""
        with np.errstate(all="ignore"):
            return np.asarray(self.table[name].compute(*self.inputs(name)), np.float64)

    def span(self, name: str) -> list[str]:
        """Return the operations from recorded tensors to the given tensor, whose own operation is last."""
        if name in self.spans:
            return self.spans[name]
        found: set[str] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting += [source for source in self.table[current].inputs if source not in self.candidate.inputs]
        self.spans[name] = sorted(found, key=self.places.__getitem__)
        return self.spans[name]


def where_compared(name: str, context: Context) -> Array:
    """Return a mask that is true for the elements to compare: rows of real tokens, and scores of visible keys."""
    visible, gradient = context.call.visible, name.startswith(GRADS)
    if name.startswith(AFTER):
        return np.array(True)
    kind, layer = field_of(name).removeprefix(GRADS), layer_of(name)
    if gradient and kind not in AXES:
        # The padding token's row is not compared, because an implementation may or may not train it.
        rows = np.arange(context.config.vocab_size)[:, None] != context.config.pad_token_id
        return rows if name == GRADS + EMBED_TOKENS else np.array(True)
    if kind in ("attention.scores", "attention.capped") or (gradient and kind == "attention.probs"):
        assert layer is not None
        return window_mask(context, layer) & visible[:, None, :, None]
    if kind in ("cos", "sin") or (kind.startswith("attention.") and kind not in ("attention.mixed", "attention.out")):
        return visible[:, None, :, None]
    return visible[:, :, None]


def measure_noise(
    computed: Computed, names: Sequence[str], context: Context, more: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, Array]:
    """Measure the standard deviation of each span's last tensor in `DRAWS` simulated runs.

    `more` adds an error to the rounding of some fields, given as a fraction of each row's size.
    """
    rng = np.random.default_rng(seed)
    storage = context.arithmetic.storage
    steps = sorted({step for name in names for step in computed.span(name)}, key=computed.places.__getitem__)
    last_use = {source: step for step in steps for source in computed.table[step].inputs}
    squares: dict[str, Array] = {}
    exact = {name: computed.result(name) for name in names}
    spread: dict[str, Array] = {}  # of the exact numbers; simulated numbers are close enough to have the same
    with np.errstate(all="ignore"):
        for step in steps:
            right = computed.value(step) if step not in computed.candidate.inputs else computed.result(step)
            allowed = computed.table[step].tolerance(computed.inputs(step), right, storage, context.arithmetic.unit)
            off = (more or {}).get(field_of(step), 0.0) * np.sqrt(np.mean(right**2, axis=-1, keepdims=True))
            spread[step] = np.hypot(allowed.std, off)
        for _ in range(DRAWS):
            run = Computed(computed.table, computed.candidate)
            for step in steps:
                right = run.result(step)
                run.between[step] = right + rng.standard_normal(right.shape) * spread[step]
                if step in exact:
                    squares[step] = squares.get(step, 0.0) + (run.between[step] - exact[step]) ** 2
                for source in computed.table[step].inputs:  # keeps only one layer's scores in memory
                    if last_use[source] == step:
                        run.between.pop(source, None)
    return {name: add_typical_spread(np.sqrt(total / DRAWS)) for name, total in squares.items()}


def add_typical_spread(spread: Array) -> Array:
    """Add a part of the tensor's typical spread, because 16 draws give a standard deviation only to within 1/5."""
    finite = spread[np.isfinite(spread)]
    with np.errstate(over="ignore"):
        typical = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
        return np.asarray(np.hypot(spread, 0.2 * typical))
