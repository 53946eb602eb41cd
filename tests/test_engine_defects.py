"""Check that three independent witnesses detect a defect planted in the engine itself.

The engine must not be its own judge. The witnesses are PyTorch's recordings, known bugs in PyTorch, and fifty-digit
arithmetic. They must detect three defects: a bound that is 1000 times too wide, an operation that copies its input, and
a judge that always passes. The witness that needs PyTorch is in ``tests/parity``.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from test_tolerance_exact import NOT_VACUOUS, OPERATIONS, fractions

from refgemma.goldens.load import load_golden, model_of
from refgemma.goldens.verify import golden_candidate
from refgemma.oracle import judge, operations, tolerance
from refgemma.oracle.engine import Engine
from refgemma.oracle.verdicts import FAIL, GOOD, PASS

Defect = Callable[[pytest.MonkeyPatch], None]


# --- defects ----------------------------------------------------------------------------------------------------------


def widen_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every bound and standard deviation 1000 times too wide."""
    right = tolerance.tolerance

    def wide(bound, spread=None, common=0.0):
        allowed = right(bound, spread, common)
        return replace(allowed, bound=1000 * allowed.bound, spread=1000 * allowed.spread)

    monkeypatch.setattr(tolerance, "tolerance", wide)


def copy_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the norms in the table of operations return their input."""
    right = operations._norm
    monkeypatch.setattr(operations, "_norm", lambda *given: replace(right(*given), compute=lambda x: x))


def always_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the judge accept everything."""
    monkeypatch.setattr(judge, "_choose_verdict", lambda statistics: PASS)


DEFECTS: list[Defect] = [widen_bounds, copy_inputs, always_pass]


# --- witnesses --------------------------------------------------------------------------------------------------------

CASE = "bends-forward-f32"
MOVED = "layers.1.feed_forward.gelu"


def ask_recordings() -> Iterator[str]:
    """PyTorch's recording must pass, near its bounds, and must fail with one changed element."""
    about, golden = load_golden(CASE)
    config, weights = model_of(about)
    engine = Engine(golden_candidate(golden, about, golden, config, CASE), weights, config)
    for instance in engine.instances:
        s = instance.judged.statistics
        if instance.judged.verdict not in GOOD:
            yield f"{instance.tensor}: PyTorch's own result is {instance.judged.verdict}"
        elif s.exact < 1 and s.error_over_bound < NOT_VACUOUS:
            yield f"{instance.tensor}: nothing comes near the bound"
    recorded = engine.candidate.tensors[MOVED].numbers
    moved = recorded.copy()
    moved[0, 0, 0] += 0.01 * np.abs(recorded).max()
    candidate = replace(engine.candidate, tensors=dict(engine.candidate.tensors))
    candidate.tensors[MOVED] = replace(engine.candidate.tensors[MOVED], numbers=moved)  # type: ignore[index]
    if Engine(candidate, weights, config).judge(MOVED).verdict != FAIL:
        yield f"{MOVED}: an element that was moved by a hundredth is not found"


def ask_fifty_digits() -> Iterator[str]:
    """Compare with fifty digits: float32 errors must come near the bound, and errors of a thousand bounds must fail."""
    for make in OPERATIONS:
        case = make(np.random.default_rng(0), 40, 1.0)
        if max(fractions(case)) < NOT_VACUOUS:
            yield f"{make.__name__}: nothing comes near the bound"
    exact = np.array([float(mpmath.mpf(1) / 3), float(mpmath.mpf(2) / 3)])
    wrong = np.float64(np.float32(exact * (1 + 1e-4)))
    allowed = tolerance.one_rounding(exact)
    if judge.judge(wrong, exact, allowed, "float32", np.ones(2, bool)).verdict != FAIL:
        yield "numbers that are a ten-thousandth off pass"
    about, golden = load_golden(CASE)
    config, weights = model_of(about)
    engine = Engine(golden_candidate(golden, about, golden, config, CASE), weights, config)
    x = [mpmath.mpf(float(n)) for n in engine.usual.value("embedded")[0, 0]]
    root = mpmath.sqrt(mpmath.fsum(n * n for n in x) / len(x) + mpmath.mpf(config.rms_norm_eps))
    scale = [1 + mpmath.mpf(float(w)) for w in weights.layers[0].input_layernorm]
    norm = np.array([float(n / root * s) for n, s in zip(x, scale, strict=True)])
    if not np.allclose(engine.usual.result("layers.0.input_layernorm")[0, 0], norm, rtol=1e-12, atol=0):  # float64
        yield "layers.0.input_layernorm: the table's operation is another function"


WITNESSES = [ask_recordings, ask_fifty_digits]


@pytest.mark.parametrize("witness", WITNESSES, ids=lambda f: f.__name__)
def test_a_sound_engine_has_no_complaints(witness: Callable[[], Iterator[str]]) -> None:
    assert list(witness()) == []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("witness", WITNESSES, ids=lambda f: f.__name__)
def test_each_witness_sees_each_defect(
    witness: Callable[[], Iterator[str]], defect: Defect, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect(monkeypatch)
    assert list(witness())
