"""The numbers of an optimizer's step, from the metadata of a trace. Checked on missing and wrong numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refgemma.inputs import InputError
from refgemma.precision import Array

OPTIMIZERS = ("adamw", "sgd")
MOMENTS = ("exp_avg", "exp_avg_sq")  # before the name of a weight: its running means before the step, as torch has them


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of the optimizer, under the names of transformers' ``TrainingArguments``."""

    optimizer: str
    learning_rate: float
    step: int = 1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 0.0  # 0: the gradients are not clipped
    moments: Mapping[str, Array] = field(default_factory=dict)  # by their names in the trace


RANGES: Mapping[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf), "step": (1, 2**31), "weight_decay": (0, math.inf), "adam_beta1": (0, 1),
    "adam_beta2": (0, 1), "adam_epsilon": (0, math.inf), "max_grad_norm": (0, math.inf),
}  # fmt: skip
# Settings of optimizers that would change the step, and that are not computed here: their values that change nothing.
REFUSED: Mapping[str, tuple[str, ...]] = {
    "momentum": ("0", "0.0"), "nesterov": ("False", "false"), "amsgrad": ("False", "false"),
    "maximize": ("False", "false"),
}  # fmt: skip


def read_step_numbers(path: Any, metadata: Mapping[str, str], moments: Mapping[str, Array]) -> StepNumbers:
    """Return the numbers of the optimizer from the metadata of a trace.

    Raises
    ------
    InputError
        If the optimizer is unknown, or a number is missing or out of range.

    Examples
    --------
    >>> read_step_numbers("port", {"optimizer": "adamw", "learning_rate": "1e-3"}, {}).adam_beta2
    0.999
    """
    kind = metadata.get("optimizer", "")
    if kind not in OPTIMIZERS:
        raise InputError(f"{path}: has weights.after.*, and optimizer in the metadata is {kind[:100]!r}; it must be "
                         f"{' or '.join(OPTIMIZERS)}")  # fmt: skip
    if "learning_rate" not in metadata:
        raise InputError(f"{path}: has weights.after.*, but no learning_rate in the metadata; add that of the step")
    for name, harmless in REFUSED.items():
        if metadata.get(name, harmless[0]) not in harmless:
            raise InputError(f"{path}: {name} in the metadata is {metadata[name][:100]!r}; refgemma judges steps "
                             f"without it, so record one with {name} {harmless[0]}")  # fmt: skip
    found: dict[str, Any] = {}
    for name, (low, high) in RANGES.items():
        try:
            value = float(metadata[name]) if name in metadata else None
        except ValueError:
            value = math.nan
        if (value is not None and not low <= value < high) or (name == "step" and value and value % 1):
            kind_of = f"a {'whole ' if name == 'step' else ''}number of at least {low:g}"
            raise InputError(f"{path}: {name} in the metadata is {metadata[name][:100]!r}; it must be {kind_of}"
                             + (f" and below {high:g}" if high == 1 else ""))  # fmt: skip
        if value is not None:
            found[name] = int(value) if name == "step" else value
    return StepNumbers(kind, **found, moments=moments)
