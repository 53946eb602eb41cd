"""Turn the recordings of single operations into operations of the oracle's table. Checked by
``refgemma verify``, and with the functions of other implementations by `refgemma.testing`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refgemma.oracle import tolerance as tol
from refgemma.oracle.operations import Operation, store_nothing
from refgemma.oracle.tolerance import Tolerance
from refgemma.precision import Array, wide

THETA, EPS = 10000.0, 1e-6  # values in the recordings
Functions = Mapping[str, Callable[..., Any]]
OFFERED = (
    "rms_norm", "linear", "gelu_tanh", "soft_cap", "attention_scores", "softmax", "rotary", "repeat_kv",
)  # fmt: skip


def recorded_operations(
    kind: str, golden: Mapping[str, Array], functions: Functions
) -> Iterator[tuple[Operation, list[Array]]]:
    """Yield the operations of one recording, each with its recorded inputs.

    Parameters
    ----------
    kind : str
        One of `OFFERED`, or ``embed``.
    golden : mapping
        The recording.
    functions : mapping
        An implementation's operations, with the names and arguments of `refgemma.ops`.
    """

    def make(
        name: str, allowed: Callable[..., Tolerance], *numbers: Any, result: str = "y",
        stores: Callable[..., list[Array]] = store_nothing,
    ) -> Operation:  # fmt: skip
        def store_on_the_way(*inputs: Array, storage: str) -> list[Array]:
            return stores(*inputs, *numbers, storage=storage)

        return Operation(
            result, (), lambda *x: functions[name](*x, *numbers), lambda *x: allowed(*x, *numbers), store_on_the_way
        )

    def table(number: int) -> Callable[..., Array]:
        like = golden["cos"]
        return lambda: functions["rotary_tables"](golden["positions"], like.shape[-1], THETA, like=like)[number]

    match kind:
        case "rms_norm":
            yield make(kind, tol.rms_norm, EPS), [golden["x"], golden["weight"]]
        case "linear":
            yield make(kind, tol.linear), [golden["x"], golden["weight"]]
        case "gelu_tanh":
            yield make(kind, tol.gelu_tanh), [golden["x"]]
        case "soft_cap":
            yield make(kind, tol.soft_cap, float(golden["cap"][0]), stores=tol.soft_cap_stores), [golden["x"]]
        case "attention_scores":
            scale = float(golden["scale"][0])
            operation = make(kind, tol.attention_scores, scale, stores=tol.scores_stores)
            yield operation, [golden["q"], golden["k"]]
        case "softmax":
            yield make(kind, tol.softmax, golden["mask"].astype(bool)), [golden["scores"]]
        case "repeat_kv":
            exactly = np.zeros(golden["y"].shape)
            yield make(kind, lambda x, groups: tol.tolerance(exactly), int(golden["groups"][0])), [golden["x"]]
        case "embed":
            once = tol.one_rounding(np.asarray(wide(golden["y"]), np.float64))
            yield make(kind, lambda ids, weight: once), [golden["ids"], golden["weight"]]
        case "rotary":
            # The angles must be equal bit for bit; only a library's cosine may differ.
            for number, name in enumerate(("cos", "sin")):
                yield Operation(name, (), table(number), lambda: tol.same_angles(golden["cos"])), []
            operation = make("rotate", tol.rotate, stores=tol.rotate_stores)
            yield operation, [golden["x"], golden["cos"], golden["sin"]]


def in_float64(inputs: Sequence[Array]) -> list[Array]:
    """Return floating-point inputs in float64, and all other inputs unchanged."""
    return [np.asarray(wide(x), np.float64) if x.dtype.kind == "f" else x for x in inputs]
