"""The number that a candidate used in place of the model's: scale, cap, eps, theta, window or position. Checked in the
tests on recordings, and on runs with random numbers, which the estimates are off by no more than they say.

A number is found by least squares in units of rounding's standard deviation, and is told with its own standard
deviation (widened by the misfit that is left). It fits if what is left is rounding. How large rounding is depends on
the number itself; so it is taken from the model's number first, and then from the one that was found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from refgemma.config import ConfigError
from refgemma.oracle.known_bugs import change_positions, config, scaled_embedding
from refgemma.oracle.operations import Context, operations
from refgemma.oracle.spans import Computed, where_compared
from refgemma.oracle.tolerance import in_decimals
from refgemma.precision import Array
from refgemma.trace.names import LAYER_NORMS, field_of

FITS = 3.0  # root mean square in standard deviations
STEPS = 40
ROUNDS = 3  # the standard deviations are taken anew after each


@dataclass(frozen=True)
class Estimate:
    """A parameter as the candidate seems to have it."""

    parameter: str
    value: float
    uncertainty: float
    expected: float
    fits: bool
    near: str = ""  # a number of the model that it agrees with


# Which parameter each tensor depends on.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "attention.scores": ("query_pre_attn_scalar",),
    "attention.capped": ("attn_logit_softcapping",),
    "logits": ("final_logit_softcapping",),
    "cos": ("rope_theta", "position offset"),
    "embedded": ("embedding scale",),
    "attention.probs": ("sliding_window",),
} | dict.fromkeys((*LAYER_NORMS, "norm"), ("rms_norm_eps",))


def estimate_parameters(usual: Computed, names: Sequence[str], context: Context) -> Iterator[Estimate]:
    """What the candidate's parameters are, of those that the wrong tensors depend on; whole spans are not fitted."""
    names = [name for name in names if len(usual.span(name)) == 1][:4]
    for parameter in PARAMETERS.get(field_of(names[0]), ()) if names else ():
        try:
            found = _estimate(parameter, usual, names, context)
        except ConfigError:  # the search left what a model can have, so that this number does not explain it
            continue
        # An estimate of the model's own number explains nothing.
        if found is not None and f"{found.value:.6g}" != f"{found.expected:.6g}":
            yield found


def _errors(usual: Computed, names: Sequence[str], context: Context, deviations: Sequence[Array]) -> Array:
    """The errors of all the tensors in standard deviations, under a context."""
    computed = Computed(operations(context), usual.candidate)
    parts = []
    for name, std in zip(names, deviations, strict=True):
        tensor = usual.candidate.tensors[name]
        known = True if tensor.known is None else tensor.known
        where = np.broadcast_to(where_compared(name, context) & known, tensor.numbers.shape)
        with np.errstate(all="ignore"):
            error = (tensor.numbers - computed.result(name)) / np.broadcast_to(std, tensor.numbers.shape)
        parts.append(error[where])
    z = np.concatenate(parts)
    return np.asarray(z[np.isfinite(z)])


def _deviations(usual: Computed, names: Sequence[str], context: Context) -> list[Array]:
    """The standard deviations of the tensors under a context."""
    computed = Computed(operations(context), usual.candidate)
    found = []
    for name in names:
        tensor, op = usual.candidate.tensors[name], computed.table[name]
        with np.errstate(all="ignore"):
            inputs, result = computed.inputs(name), computed.result(name)
            allowed = op.tolerance(inputs, result, tensor.storage, context.arithmetic.unit)
        found.append(in_decimals(allowed, tensor.coarse).std)
    return found


def _with(context: Context, parameter: str, value: float) -> Context:
    """The context with another value of a parameter."""
    match parameter:
        case "embedding scale":
            return scaled_embedding(lambda _: value)(context)
        case "position offset":
            return change_positions(lambda c: c.call.positions + int(value))(context)
        case "sliding_window":
            return config(sliding_window=int(value))(context)
        case "rope_theta":
            return config(rope_theta=float(value), rope_parameters=None)(context)
    return config(**{parameter: float(value)})(context)


def _estimate(parameter: str, usual: Computed, names: Sequence[str], context: Context) -> Estimate | None:
    def errors(value: float, at: float) -> Array:
        """With the standard deviations of the parameter `at`."""
        return _errors(usual, names, _with(context, parameter, value), deviations(at))

    @cache
    def deviations(at: float) -> list[Array]:
        return _deviations(usual, names, _with(context, parameter, at))

    def misfit(value: float, at: float) -> float:
        z = errors(value, at)
        return float(np.mean(z * z)) if len(z) else np.inf

    expected = _read_expected(parameter, context)
    if expected is None:
        return None
    if parameter in ("sliding_window", "position offset"):
        most = context.call.input_ids.shape[1] + 1
        choices = range(1, most + 1) if parameter == "sliding_window" else range(0, 9)
        best = min((float(v) for v in choices), key=lambda value: misfit(value, value))
        return Estimate(parameter, best, 0.0, expected, misfit(best, best) <= FITS**2)
    value = min((expected * 2.0**n for n in range(-16, 17)), key=lambda value: misfit(value, expected))
    at = expected
    for _ in range(ROUNDS):
        value, uncertainty = _least_squares(partial(errors, at=at), value)
        if not np.isfinite(uncertainty):
            return None  # these inputs do not tell
        at = value
    fits = misfit(value, at) <= FITS**2
    return Estimate(parameter, value, uncertainty, expected, fits, _near(parameter, value, uncertainty, context))


def _read_expected(parameter: str, context: Context) -> float | None:
    if parameter == "embedding scale":
        return context.embedding_scale()
    if parameter == "position offset":
        return 0.0
    value = getattr(context.config, parameter)
    return None if value is None else float(value)


def _least_squares(errors: Callable[[float], Array], start: float) -> tuple[float, float]:
    """Gauss and Newton's method in the parameter's logarithm, damped; its solution and standard deviation."""
    log, step = np.log(start), 1e-5
    z = errors(float(np.exp(log)))
    damping = 1e-3
    for _ in range(STEPS):
        slope = (errors(float(np.exp(log + step))) - z) / step
        curvature = float(slope @ slope)
        if curvature == 0:
            return float(np.exp(log)), float("inf")
        move = -float(slope @ z) / (curvature * (1 + damping))
        trial = errors(float(np.exp(log + np.clip(move, -1, 1))))
        if trial @ trial < z @ z:
            log, z, damping = log + np.clip(move, -1, 1), trial, damping / 10
        else:
            damping = max(damping, 1e-3) * 10
        if abs(move) < 1e-12 or damping > 1e12:
            break
    spread = max(1.0, float(np.sqrt(np.mean(z * z)))) / np.sqrt(curvature)
    value = float(np.exp(log))
    return value, value * float(spread)


def _near(parameter: str, value: float, uncertainty: float, context: Context) -> str:
    """The number of the model that an estimate agrees with."""
    c = context.config
    caps = {"50": 50, "30": 30, "attn_logit_softcapping": c.attn_logit_softcapping or 0,
            "final_logit_softcapping": c.final_logit_softcapping or 0}  # fmt: skip
    numbers: dict[str, Mapping[str, float]] = {
        "query_pre_attn_scalar": {
            "head_dim": c.head_dim, "hidden_size / num_attention_heads": c.hidden_size / c.num_attention_heads,
            "hidden_size": c.hidden_size, "144": 144, "224": 224, "256": 256, "1 (no scale)": 1},
        "embedding scale": {
            "sqrt(hidden_size), not rounded": c.hidden_size**0.5, "1 (no scale)": 1, "hidden_size": c.hidden_size},
        "rms_norm_eps": {"1e-5": 1e-5, "1e-6": 1e-6, "1e-8": 1e-8},
        "rope_theta": {"1000000": 1e6, "160000": 160000, "500000": 5e5},
        "attn_logit_softcapping": caps, "final_logit_softcapping": caps,
    }  # fmt: skip
    known = numbers.get(parameter, {})
    close = [name for name, number in known.items() if abs(value - number) <= 4 * uncertainty + 1e-6 * number]
    return close[0] if close else ""
