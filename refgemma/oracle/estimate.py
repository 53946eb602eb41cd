"""The number that a candidate used in place of the model's: scale, cap, eps, theta, window or position. Scale, caps and
theta are checked in tests/test_check.py on recordings with known numbers; eps, window and position offset are not.

A number is found by least squares in units of rounding's standard deviation, and is told with its own standard
deviation (widened by the misfit that is left). It fits if what is left is rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refgemma.oracle.graph import Context, field_of, operations
from refgemma.oracle.spans import Computed, where_compared
from refgemma.precision import Array

FITS = 3.0  # root mean square in standard deviations
STEPS = 40


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
} | dict.fromkeys(
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
    ("rms_norm_eps",),
)


def estimates(
    usual: Computed, names: Sequence[str], context: Context, sigmas: Mapping[str, Array]
) -> Iterator[Estimate]:
    """What the candidate's parameters are, of those that the wrong tensors depend on; whole spans are not fitted."""
    names = [name for name in names if len(usual.span(name)) == 1][:4]
    for parameter in PARAMETERS.get(field_of(names[0]), ()) if names else ():
        found = _estimate(parameter, usual, names, context, sigmas)
        if found is not None:
            yield found


def _residual(
    usual: Computed, names: Sequence[str], context: Context, sigmas: Mapping[str, Array]
) -> Callable[[Context, float], Array]:
    """The errors of all the tensors in standard deviations, under another context and after another factor."""

    def residual(changed: Context, factor: float = 1.0) -> Array:
        computed = Computed(operations(changed), usual.candidate)
        parts = []
        for name in names:
            found = usual.candidate.tensors[name].numbers
            known = usual.candidate.tensors[name].known
            where = np.broadcast_to(where_compared(name, context) & (True if known is None else known), found.shape)
            with np.errstate(all="ignore"):
                error = (found - factor * computed.result(name)) / np.broadcast_to(sigmas[name], found.shape)
            parts.append(error[where])
        z = np.concatenate(parts)
        return np.asarray(z[np.isfinite(z)])

    return residual


def _with(context: Context, parameter: str, value: float) -> tuple[Context, float]:
    """The context with another value of a parameter; and a factor on the result."""
    if parameter == "embedding scale":
        return context, value / context.embedding_scale()
    if parameter == "position offset":
        return replace(context, call=replace(context.call, positions=context.call.positions + int(value))), 1.0
    changes = {parameter: int(value) if parameter == "sliding_window" else float(value)}
    if parameter == "rope_theta":
        return replace(context, config=context.config.changed(**changes, rope_parameters=None)), 1.0
    return replace(context, config=context.config.changed(**changes)), 1.0


def _estimate(
    parameter: str, usual: Computed, names: Sequence[str], context: Context, sigmas: Mapping[str, Array]
) -> Estimate | None:
    residual = _residual(usual, names, context, sigmas)

    def errors(value: float) -> Array:
        return residual(*_with(context, parameter, value))

    def misfit(value: float) -> float:
        z = errors(value)
        return float(np.mean(z * z)) if len(z) else np.inf

    expected = _expected(parameter, context)
    if expected is None:
        return None
    if parameter in ("sliding_window", "position offset"):
        most = context.call.input_ids.shape[1] + 1
        choices = range(1, most + 1) if parameter == "sliding_window" else range(0, 9)
        best = min((float(v) for v in choices), key=misfit)
        return Estimate(parameter, best, 0.0, expected, misfit(best) <= FITS**2)
    start = min((expected * 4.0**n for n in range(-8, 9)), key=misfit)
    value, uncertainty = _least_squares(errors, start)
    if not np.isfinite(uncertainty):
        return None  # these inputs do not tell
    fits = misfit(value) <= FITS**2
    return Estimate(parameter, value, uncertainty, expected, fits, _near(parameter, value, uncertainty, context))


def _expected(parameter: str, context: Context) -> float | None:
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
    known: dict[str, float] = {}
    if parameter == "query_pre_attn_scalar":
        known = {
            "head_dim": c.head_dim, "hidden_size / num_attention_heads": c.hidden_size / c.num_attention_heads,
            "hidden_size": c.hidden_size, "144": 144, "224": 224, "256": 256, "1 (no scale)": 1,
        }  # fmt: skip
    elif parameter == "embedding scale":
        known = {"sqrt(hidden_size), not rounded": c.hidden_size**0.5, "1 (no scale)": 1, "hidden_size": c.hidden_size}
    elif parameter == "rms_norm_eps":
        known = {"1e-5": 1e-5, "1e-6": 1e-6, "1e-8": 1e-8}
    elif parameter == "rope_theta":
        known = {"1000000": 1e6, "160000": 160000, "500000": 5e5}
    elif parameter.endswith("softcapping"):
        known = {"50": 50, "30": 30, "attn_logit_softcapping": c.attn_logit_softcapping or 0,
                 "final_logit_softcapping": c.final_logit_softcapping or 0}  # fmt: skip
    close = [name for name, number in known.items() if abs(value - number) <= 4 * uncertainty + 1e-6 * number]
    return close[0] if close else ""
