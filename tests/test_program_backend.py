"""Test a program as a backend: a program that answers correctly passes the laws. A program that crashes, hangs or
answers junk gives a one-sentence error, and nothing waits for it."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refgemma.config import Gemma2Config
from refgemma.hub import find_model
from refgemma.testing import properties
from refgemma.testing.backends import BackendError, Capabilities, NumpyBackend, Unsupported, backend_named
from refgemma.testing.laws import script
from refgemma.testing.program import Program, ProgramError
from refgemma.testing.recordings import check_golden
from refgemma.testing.strategies import Scene

pytest_plugins = ["pytester"]

# It keeps no keys: its cache is what it has read so far. The first argument is what it does wrong.
PORT = """
import os, sys, time
from pathlib import Path
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from refgemma.testing.backends import NumpyBackend

fault, port, logits = (sys.argv[1:] or [""])[0], NumpyBackend(), None
for line in sys.stdin:
    folder = Path(line.rstrip("\\n"))
    with safe_open(folder / "request.safetensors", framework="np") as request:
        about = request.metadata()
        given = {name: request.get_tensor(name) for name in request.keys()}
    tensors, metadata = {}, {}
    if about["ask"] == "capabilities":
        metadata = {"dtypes": "float32", "cache": "true", "padding": "true", "positions": "true"}
        metadata |= dict([fault.split("=")] if "=" in fault else [])
    else:
        if fault == "crash":
            print("the head is missing", file=sys.stderr)
            sys.exit(3)
        if fault == "hang":
            time.sleep(60)
        while fault == "chatter":
            print("still reading")
        if fault == "close":
            os.close(1)
            time.sleep(60)
        print("reading a request")
        ids = given["input_ids"]
        before = given.get("cache.ids", ids[:, :0])
        whole = np.concatenate([before, ids], axis=1)
        model = port.load(Path(about["folder"]), about["dtype"])
        if fault == "uncapped":
            object.__setattr__(model.config, "attn_logit_softcapping", None)
        run = port.forward(model, whole, given.get("attention_mask"), given.get("position_ids"))
        tensors = {"logits": run.logits[:, before.shape[1]:].astype(np.float32), "cache.ids": whole}
        if fault == "no logits":
            tensors["out"] = tensors.pop("logits")
        if fault == "shape":
            tensors["logits"] = tensors["logits"][0]
        if fault == "refuse":
            metadata = {"unsupported": "more than one layer"}
    if fault == "junk" and tensors:
        (folder / "answer.safetensors").write_bytes(b"\\xff" * 99)
    elif fault != "no file" or not tensors:
        whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        save_file(whole, folder / "answer.safetensors", metadata)
    print(line, end="", flush=True)
"""


@pytest.fixture
def program(tmp_path: Path):
    """Return the program with a fault, and a short time limit."""
    path = tmp_path / "port.py"
    path.write_text(PORT)
    started = []

    def made(fault: str = "", seconds: float = 30.0) -> Program:
        started.append(Program(f"'{sys.executable}' '{path}' '{fault}'", seconds))
        return started[-1]

    yield made
    for one in started:
        if one._running is not None:
            one._running.end()


def logits_of(port: Program) -> np.ndarray:
    model = port.load(find_model("conformance"), "float32")
    return port.forward(model, np.array([[2, 5, 7]])).logits


def test_a_program_computes_what_it_is_asked_for(program) -> None:
    port = program()
    assert port.capabilities() == Capabilities(("float32",), cache=True, padding=True, positions=True)
    numpy = NumpyBackend()
    ours = numpy.forward(numpy.load(find_model("conformance"), "float32"), np.array([[2, 5, 7]])).logits
    assert np.array_equal(logits_of(port), ours)
    properties.chunks_change_nothing(port, "dev")
    properties.left_padding_in_calls_changes_nothing(port, "dev")
    properties.only_distances_count(port, "dev")
    check_golden(port, "bends-left-padded-f32")


def test_a_program_that_is_wrong_breaks_the_law(program) -> None:
    port, broken = program("uncapped"), properties.a_vanishing_attention_cap_makes_all_keys_alike
    small = Gemma2Config(
        vocab_size=17, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, attn_logit_softcapping=1e-20,
    )  # fmt: skip
    example = {"scene": Scene(small, ((3, 5, 7),)), "seed": 0}
    with pytest.raises(AssertionError, match="attention cap of 1e-20"):
        broken(port, **example)
    broken(program(), **example)
    assert f"backend_named({port.__backend_name__!r})" in script(broken.name, port, example)
    assert backend_named(port.__backend_name__).command == port.command


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "ended with exit status 3 instead of answering; it said:\nthe head is missing"),
        ("no file", "there is no such file"),
        ("junk", "is not a complete safetensors file"),
        ("no logits", r"the answer lacks the tensor logits; it has \['cache.ids', 'out'\]"),
        ("shape", r"logits have shape \(3, 97\)"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(program, fault: str, message: str) -> None:
    port = program(fault)
    port.capabilities()
    with pytest.raises(ProgramError, match=message):
        logits_of(port)
    assert port.capabilities().dtypes == ("float32",)
    with pytest.raises(ProgramError, match=message):  # and it was started anew for the second request
        logits_of(port)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hang", "did not answer within 0.5 s"),
        ("chatter", "did not answer within 0.5 s"),
        ("close", "closed its output instead of answering"),
    ],
)
def test_nobody_waits_for_a_program_that_does_not_answer(program, fault: str, message: str) -> None:
    port = program(fault)
    port.capabilities()
    port.seconds, began = 0.5, time.monotonic()
    with pytest.raises(ProgramError, match=message):
        logits_of(port)
    assert time.monotonic() - began < 30  # it would be 60 if it were waited for
    assert port._running is None


def test_a_refusal_is_no_failure(program) -> None:
    with pytest.raises(Unsupported, match="more than one layer"):
        logits_of(program("refuse"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dtypes=int4", r"dtypes is \['int4'\]"),
        ("dtypes= ", "dtypes is none"),
        ("max_length=-1", "max_length is '-1'"),
        ("cache=yes", "cache is 'yes'; it must be true or false"),
    ],
)
def test_capabilities_are_checked(program, fault: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        program(fault).capabilities()


def test_a_program_that_cannot_be_started_is_a_usage_error(pytester: pytest.Pytester) -> None:
    with pytest.raises(BackendError, match="cannot be started"):
        backend_named("program:/no/such/port").capabilities()
    result = pytester.runpytest_subprocess("--pyargs", "refgemma.testing", "--backend", "program:./port")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*program ./port: cannot be started*"])


@pytest.mark.slow
def test_the_laws_are_asked_of_a_program(program, pytester: pytest.Pytester) -> None:
    command = program("crash").__backend_name__
    result = pytester.runpytest_subprocess(
        "--pyargs", "refgemma.testing", "--backend", command, "-k", "causality", "--profile", "dev",
        "-p", "no:cacheprovider",
    )  # fmt: skip
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*causality: the backend raised ProgramError*ended with exit status 3*"])
