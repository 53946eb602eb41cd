"""Estimate a parameter that a candidate got wrong: scale, cap, eps, theta, window or position.

Checked in the tests on recordings, and on runs with random parameters: each estimate is within its uncertainty.

The parameter is found by least squares in units of the standard deviation of rounding. It is reported with its own
standard deviation, widened by the remaining misfit. The estimate fits if only rounding remains. The size of rounding
depends on the parameter, so it is computed first for the model's value, then for the estimate.

If the inputs of a wrong tensor were not recorded, as in a trace of logits alone, each number of the configuration is
fitted to the whole span of operations before the tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from refgemma.config import ConfigError
from refgemma.heads import log_softmax
from refgemma.oracle.engine import Engine
from refgemma.oracle.known_bugs import PROBS, TABLES, KnownBug, change_positions, config, scaled_embedding
from refgemma.oracle.operations import Context, operations
from refgemma.oracle.spans import Computed, where_compared
from refgemma.oracle.tolerance import in_decimals
from refgemma.precision import Array
from refgemma.trace.candidate import first_rows, first_tokens
from refgemma.trace.names import LAYER_NORMS, LOGPROBS, field_of

FITS = 3.0  # root mean square in standard deviations
STEPS = 40
UNUSABLE = 1e9  # stands for an error that is not a finite number
ROUNDS = 3  # rounds of least squares; each computes the standard deviations again


@dataclass(frozen=True)
class Estimate:
    """The estimated value of a candidate's parameter."""

    parameter: str
    value: float
    uncertainty: float
    expected: float
    fits: bool
    near: str = ""  # a known number that agrees with the estimate

    @property
    def named(self) -> str:
        """The parameter with its value, as a name of a finding.

        Examples
        --------
        >>> Estimate("rope_theta", 20000.3, 2.0, 1e4, True, "20000").named, Estimate("cap", 3.21, 0.0, 3.0, True).named
        ('rope_theta = 20000', 'cap = 3.21')
        """
        return f"{self.parameter} = {self.near if is_number(self.near) else f'{self.value:.6g}'}"


def is_number(text: str) -> bool:
    """Return True if a text is a number.

    Examples
    --------
    >>> is_number("1e-5"), is_number("head_dim")
    (True, False)
    """
    try:
        float(text)
    except ValueError:
        return False
    return True


TEMPERATURE = "temperature"
# The parameters that each tensor depends on.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "attention.scores": ("query_pre_attn_scalar",),
    "attention.capped": ("attn_logit_softcapping",),
    "logits": ("final_logit_softcapping",),
    "cos": ("rope_theta", "position offset"),
    "embedded": ("embedding scale",),
    "attention.probs": ("sliding_window",),
    LOGPROBS: (TEMPERATURE,),
} | dict.fromkeys((*LAYER_NORMS, "norm"), ("rms_norm_eps",))
# The operations that use each number. A number is fitted to a span if it is in the span.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "rope_theta": TABLES, "query_pre_attn_scalar": ("attention.scores",),
    "attn_logit_softcapping": ("attention.capped",), "final_logit_softcapping": ("logits",),
    "rms_norm_eps": (*LAYER_NORMS, "norm"), "embedding scale": ("embedded",), "sliding_window": PROBS,
}  # fmt: skip
# The powers of 2 by which a number is multiplied to find where least squares begin; steps after which a number that
# does not leave less than half of the error is given up; and the part of the error that a fitted number may leave.
# Numbers with other causes leave more, also if a wrong tensor is only slightly wrong.
POWERS, FIRST_STEPS, NUMBER_LEFT = range(-12, 13), 6, 0.2
FIRST_TOKENS = 16  # so many tokens from the first wrong one are enough for the first steps, and take less time
# Numbers that change nothing in the row of a sequence's first token: it sees only itself, so its attention weight is 1,
# and position 0 rotates nothing. Scores have a row for it that these numbers change.
WITH_EARLIER_TOKENS = ("rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window")
SCORE_FIELDS = ("attention.scores", "attention.capped")
CERTAIN = 10.0  # a row is certainly wrong if an element is off by this many standard deviations
ROUND = 1e-3  # an estimate is taken for a number with two digits if it is so close, and within its uncertainty
# An estimate counts if it differs from the model's value by this many standard deviations, and leaves at most this part
# of the mean square error. It is identified with a known number if their relative difference is at most the last value.
SIGNIFICANT, LEFT, ALIKE = 4.0, 0.25, 0.02


def estimate_parameters(engine: Engine, names: Sequence[str]) -> Iterator[Estimate]:
    """Yield estimates of the parameters of the wrong tensors' operations; for spans, only of the temperature.

    Estimates that do not differ significantly from the model, or explain little of the error, are left out.
    """
    usual = engine.usual
    names = [name for name in names if engine.is_direct(name) or field_of(name) == LOGPROBS][:4]
    for parameter in PARAMETERS.get(field_of(names[0]), ()) if names and not engine.quantised else ():
        try:
            found = _estimate(parameter, usual, names, engine)
        except ConfigError:  # the search left the valid range, so this parameter does not explain the error
            continue
        if found is not None and is_significant(found.value, found.uncertainty, found.expected):
            yield found


def is_significant(value: float, uncertainty: float, expected: float) -> bool:
    """Return True if an estimate differs significantly from the expected number.

    Examples
    --------
    >>> is_significant(0.00137, 0.0005, 1e-6), is_significant(8.0, 0.0, 8.0), is_significant(1e-5, 1e-7, 1e-6)
    (False, False, True)
    """
    return f"{value:.6g}" != f"{expected:.6g}" and abs(value - expected) > SIGNIFICANT * uncertainty


def _errors(usual: Computed, names: Sequence[str], context: Context, deviations: Sequence[Array]) -> Array:
    """Return the errors of all tensors in standard deviations, if computed with a context."""
    # Use the correct tensors in between, because only the last operation of a span has a parameter.
    computed = Computed(operations(context), usual.candidate, dict(usual.between))
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


def _deviations(usual: Computed, names: Sequence[str], context: Context, engine: Engine) -> list[Array]:
    """Return the standard deviations of the tensors, if computed with a context."""
    computed = Computed(operations(context), usual.candidate)
    found = []
    for name in names:
        tensor, op = usual.candidate.tensors[name], computed.table[name]
        if not engine.is_direct(name):
            found.append(engine.noise(name))
            continue
        with np.errstate(all="ignore"):
            inputs, result = computed.inputs(name), computed.result(name)
            allowed = op.tolerance(inputs, result, tensor.storage, context.arithmetic.unit)
        found.append(in_decimals(allowed, tensor.coarse).std)
    return found


def _with(context: Context, parameter: str, value: float) -> Context:
    """Return the context with a new value of a parameter."""
    match parameter:
        case "embedding scale":
            return scaled_embedding(lambda _: value)(context)
        case "temperature":
            return replace(context, functions={"log_softmax": lambda x: log_softmax(x / value)})
        case "position offset":
            return change_positions(lambda c: c.call.positions + int(value))(context)
        case "sliding_window":
            return config(sliding_window=int(value))(context)
        case "rope_theta":
            return config(rope_theta=float(value), rope_parameters=None)(context)
    return config(**{parameter: float(value)})(context)


def _estimate(parameter: str, usual: Computed, names: Sequence[str], engine: Engine) -> Estimate | None:
    context = engine.context

    def errors(value: float, at: float) -> Array:
        """Return the errors for a parameter value, in units of the standard deviations for the value `at`."""
        return _errors(usual, names, _with(context, parameter, value), deviations(at))

    @cache
    def deviations(at: float) -> list[Array]:
        return _deviations(usual, names, _with(context, parameter, at), engine)

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
    tried = [expected * 2.0**n for n in range(-16, 17)]
    value = min(tried, key=lambda value: misfit(value, expected))
    at = expected
    for _ in range(ROUNDS):
        value, uncertainty = _least_squares(partial(errors, at=at), value)
        if not np.isfinite(uncertainty) or not tried[0] <= value <= tried[-1]:
            return None  # these inputs do not determine the parameter
        at = value
    fits = misfit(value, at) <= FITS**2
    if not fits and misfit(value, expected) > LEFT * misfit(expected, expected):
        return None
    return Estimate(parameter, value, uncertainty, expected, fits, _near(parameter, value, uncertainty, context))


def changed_number(parameter: str, value: float) -> KnownBug:
    """Return a bug that uses another value of a number, for every operation of `NUMBERS`."""
    change = partial(_with, parameter=parameter, value=value)
    return KnownBug(f"{parameter} = {value:.9g}", f"{parameter} is {value:.6g}", NUMBERS[parameter], change, "")


def fit_numbers(engine: Engine, names: Sequence[str]) -> Iterator[Estimate]:
    """Yield each number of the configuration whose other value leaves little of the error of tensors whose inputs were
    not recorded.

    Each try computes the tensors again. Whether the rest is rounding is left to the caller.
    """
    names = [name for name in names if not engine.is_direct(name)]
    steps = {field_of(step) for name in names for step in engine.usual.span(name)}
    before = _count_tokens_before_errors(engine, names)
    for parameter, fields in NUMBERS.items():
        expected = _read_expected(parameter, engine.context)
        if expected is None or steps.isdisjoint(fields) or (before == 0 and parameter in WITH_EARLIER_TOKENS):
            continue
        found = _fit_number(engine, names, parameter, expected, before)
        if found is not None and is_significant(found.value, found.uncertainty, expected):
            yield found


def _count_tokens_before_errors(engine: Engine, names: Sequence[str]) -> int:
    """Return the smallest number of earlier tokens of a row that is certainly wrong; if unknown, of all tokens."""
    call = engine.context.call
    earlier, least = np.cumsum(call.visible, axis=1) - 1, int(call.input_ids.shape[1])
    later = (call.positions[call.visible & (earlier == 0)] != 0).any()  # the first token is not at position 0
    if later or any(field_of(name) in SCORE_FIELDS for name in names):
        return least
    for name in names:
        with np.errstate(all="ignore"):
            wrong = (np.abs(engine.errors(name)) > CERTAIN * engine.noise(name)) & engine.where(name)
        rows = wrong.any(axis=(1, -1) if wrong.ndim == 4 else -1)
        least = min(least, int(earlier[rows].min(initial=least)))
    return least


def _fit_number(
    engine: Engine, names: Sequence[str], parameter: str, expected: float, before: int
) -> Estimate | None:  # fmt: skip
    call = engine.context.call
    errors, seq = _errors_for_values(engine, names, parameter), call.input_ids.shape[1]
    if parameter == "sliding_window":
        # A row with fewer earlier tokens than both windows see is the same for both.
        choices = [float(window) for window in range(1, seq + 1) if min(window, expected) <= before]
        best = min(choices, key=lambda window: _rms(errors(window)), default=expected)
        fits = _rms(errors(best)) <= NUMBER_LEFT * _rms(errors(expected))
        return Estimate(parameter, best, 0.0, expected, False) if fits else None
    first_errors = errors
    if before + FIRST_TOKENS < seq and call.visible.all():
        some = _errors_for_values(engine, names, parameter, before + FIRST_TOKENS)
        first_errors = some if _rms(some(expected)) > CERTAIN else errors
    value = min((expected * 2.0**n for n in POWERS), key=lambda value: _rms(first_errors(value)))
    for compute, steps, left in ((first_errors, FIRST_STEPS, 0.5), (errors, STEPS, NUMBER_LEFT)):
        value, uncertainty = _least_squares(compute, value, steps)
        if not np.isfinite(uncertainty) or not _rms(compute(value)) <= left * _rms(compute(expected)):
            return None
    return Estimate(
        parameter, value, uncertainty, expected, False, _near(parameter, value, uncertainty, engine.context)
    )


def _errors_for_values(
    engine: Engine, names: Sequence[str], parameter: str, tokens: int | None = None
) -> Callable[[float], Array]:
    """Return a function of a number's value: the errors in standard deviations of the noise, of all or some tokens."""
    candidate, context, usual = engine.candidate, engine.context, engine.usual
    scales = [(n, engine.noise(n), np.broadcast_to(engine.where(n), engine.noise(n).shape)) for n in names]
    if tokens is not None:
        candidate = first_tokens(candidate, tokens)
        context = replace(context, call=candidate.call)
        usual = Computed(operations(context), candidate)
        scales = [(n, first_rows(n, noise, tokens), first_rows(n, where, tokens)) for n, noise, where in scales]

    @cache
    def errors(value: float) -> Array:
        computed = usual.edit(changed_number(parameter, value).table(context, usual.table))
        parts = []
        for name, noise, where in scales:
            with np.errstate(all="ignore"):
                parts.append(((candidate.tensors[name].numbers - computed.result(name)) / noise)[where])
        found: Array = np.nan_to_num(np.concatenate(parts), nan=UNUSABLE, posinf=UNUSABLE, neginf=-UNUSABLE)
        return found

    return errors


def _rms(errors: Array) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def _read_expected(parameter: str, context: Context) -> float | None:
    if parameter == "embedding scale":
        return context.embedding_scale()
    if parameter == "position offset":
        return 0.0
    if parameter == TEMPERATURE:
        return 1.0
    value = getattr(context.config, parameter)
    return None if value is None else float(value)


def _least_squares(errors: Callable[[float], Array], start: float, steps: int = STEPS) -> tuple[float, float]:
    """Return the solution and its standard deviation, by a damped Gauss-Newton method in the parameter's logarithm."""
    log, step = np.log(start), 1e-5
    z = errors(float(np.exp(log)))
    damping = 1e-3
    for _ in range(steps):
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
    """Return the name of a known number near the estimate, or an empty string."""
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
    # A large uncertainty must not make a different number match.
    close = [
        name for name, number in known.items()
        if abs(value - number) <= min(SIGNIFICANT * uncertainty + 1e-6 * number, ALIKE * number)
    ]  # fmt: skip
    if close:
        return close[0]
    rounded = float(f"{value:.2g}")
    return f"{rounded:.6g}" if abs(value - rounded) <= min(SIGNIFICANT * uncertainty, ROUND * value) else ""
