"""PyTorch's recordings against any implementation: each case's calls are made, and every tensor compared that both
have. The measures are those of `refgemma verify`: see `refgemma.oracle.compare`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refgemma.goldens.verify import load_golden, model_of, read_manifest, run_calls
from refgemma.hub import find_model, golden_folder
from refgemma.oracle import bounds
from refgemma.oracle.compare import (
    half_rounding_noise,
    half_run_distance,
    logits_distance,
    operation_distance,
    rounding_noise,
    run_distance,
)
from refgemma.precision import Array
from refgemma.testing.backends import Unsupported
from refgemma.testing.laws import LawBroken, NotApplicable, exact, golden_script, message, require

SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def golden_names() -> list[str]:
    """All recorded cases."""
    return list(read_manifest()["cases"])


def check_golden(backend: Any, name: str) -> None:
    """Compare a backend with one recorded case.

    Raises
    ------
    NotApplicable
        If the backend does not do what was recorded.
    LawBroken
        Naming the first tensor that differs by more than rounding explains, with a script that shows it.

    Examples
    --------
    >>> from refgemma.testing.backends import NumpyBackend
    >>> check_golden(NumpyBackend(), "no-caps-forward-f32")
    """
    about = read_manifest()["cases"][name]
    try:
        match about["kind"]:
            case "forward":
                _check_forward(backend, name)
            case "greedy":
                _check_greedy(backend, name)
            case "operation":
                _check_operation(backend, name)
            case other:
                raise NotApplicable(f"a recording of the kind {other!r}")
    except Unsupported as refusal:
        raise NotApplicable(str(refusal)) from refusal
    except NotApplicable:
        raise
    except Exception as error:  # whatever an implementation may raise
        raise LawBroken(f"{name}: {message(error)}", golden_script(name, backend)) from error


def _loaded(backend: Any, about: Mapping[str, Any]) -> Any:
    can = backend.capabilities()
    if about["dtype"] not in can.dtypes:
        raise NotApplicable(f"it does not compute in {about['dtype']} throughout")
    model_of(about)  # the folder is the one that was recorded, or this says that it is not
    folder = find_model("tiny") if about["model"] == "tiny" else golden_folder() / "models" / about["model"]
    return backend.load(folder, about["dtype"])


def _check_forward(backend: Any, name: str) -> None:
    about, golden = load_golden(name)
    can, ids, padding = backend.capabilities(), golden["input_ids"], golden["attention_mask"]
    if len(about["calls"]) > 1 and not can.cache:
        raise NotApplicable("its forward takes no cache")
    if not padding.all() and not can.padding:
        raise NotApplicable("its forward takes no padding")
    if can.max_length is not None and ids.shape[1] > can.max_length:
        raise NotApplicable(f"it takes no texts of more than {can.max_length} tokens")
    model, cache, done = _loaded(backend, about), None, 0
    computed: dict[str, Array] = {}
    wanted = sorted({tensor.split(".", 2)[2] for tensor in golden if tensor.startswith("calls.")} | {"logits"})
    for call, length in enumerate(about["calls"]):
        end = done + length
        mask = None if padding.all() else padding[:, :end].astype(np.int64)
        output = backend.forward(model, ids[:, done:end], mask, None, cache, tuple(n for n in wanted if can.shows(n)))
        computed |= {f"calls.{call}.{tensor}": x for tensor, x in output.tensors.items()}
        cache, done = output.cache, end
    distances = _distances(name, about, golden, computed)
    beyond = [(tensor, far) for tensor, far in distances.items() if not far <= 1]
    listed = "; ".join(f"{tensor}: {far:.3g} times what rounding explains" for tensor, far in beyond[:8])
    require(not beyond, f"{len(beyond)} of {len(distances)} tensors differ, first {listed}")


def _distances(
    name: str, about: Mapping[str, Any], golden: Mapping[str, Array], computed: Mapping[str, Array]
) -> dict[str, float]:
    """For each tensor that both have, in the order of recording, how far apart in units of what rounding explains."""
    starts = np.cumsum([0, *about["calls"]])
    half = about["dtype"] != "float32"
    twin = load_golden(f"{name.removesuffix(SHORT[about['dtype']])}f32")[1] if half else run_calls(
        about, golden, *model_of({**about, "dtype": "float64"})
    )  # fmt: skip
    shared = [tensor for tensor in golden if tensor in computed and tensor in twin]
    rows: dict[str, tuple[Array, Array, Array]] = {}
    for tensor in shared:
        call = int(tensor.split(".")[1])
        real = golden["attention_mask"].astype(bool)[:, starts[call] : starts[call + 1]]
        ours, theirs, other = (exact(x) for x in (computed[tensor], golden[tensor], twin[tensor]))
        require(ours.shape == theirs.shape, f"{tensor} has shape {ours.shape} instead of {theirs.shape}")
        rows[tensor] = (_real(ours, real), _real(theirs, real), _real(other, real))
    noise: dict[str, float] = {}
    for tensor, (ours, theirs, other) in rows.items():
        # Of one tensor over all calls the noise is taken together: a decoding step has few elements.
        field, own = tensor.split(".", 2)[2], half_rounding_noise(theirs, other) if half else 0.0
        noise[field] = max(noise.get(field, 0.0), own if half else rounding_noise(ours, theirs, other))
    return {tensor: _distance(tensor, *pair[:2], noise[tensor.split(".", 2)[2]], half) for tensor, pair in rows.items()}


def _distance(tensor: str, ours: Array, theirs: Array, noise: float, half: bool) -> float:
    if half:
        return half_run_distance(ours, theirs, noise)
    distance = run_distance(ours, theirs, noise)
    return max(distance, logits_distance(ours, theirs)) if tensor.endswith(".logits") else distance


def _real(x: Array, real: Array) -> Array:
    """The rows of tokens that are no padding; ``seq`` is the last axis but one."""
    if x.shape[0] != real.shape[0]:
        x = np.broadcast_to(x, (real.shape[0], *x.shape[1:]))
    return x[real] if x.ndim == 3 else x.swapaxes(1, 2)[real]


def _check_greedy(backend: Any, name: str) -> None:
    """Text continued by the likeliest token, all read anew at each step: it needs no cache."""
    about, golden = load_golden(name)
    model = _loaded(backend, about)
    for number in range(len(about["prompts"])):
        text = [int(token) for token in golden[f"prompt.{number}"]]
        recorded = [int(token) for token in golden[f"continued.{number}"]]
        # Each token on the recorded ones, so that one near tie is told from a text that goes another way.
        whole = np.array([text + recorded[:-1]], np.int64)
        logits = exact(backend.forward(model, whole).logits)[0, len(text) - 1 :]
        chosen = logits.argmax(axis=-1).tolist()
        differ = [place for place, pair in enumerate(zip(chosen, recorded, strict=True)) if pair[0] != pair[1]]
        require(not differ, f"prompt {number} continues with other tokens, first the {differ[:1]}th")


# Operation -> its results, by name, and the bound of each, from what was recorded and a backend's functions.
Golden = Mapping[str, Array]
OPERATIONS: Mapping[str, Callable[[Mapping[str, Any], Golden], dict[str, tuple[Array, Array]]]] = {
    "rms_norm": lambda ops, g: {
        "y": (ops["rms_norm"](g["x"], g["weight"], 1e-6), bounds.rms_norm(g["x"], g["weight"], 1e-6))
    },
    "linear": lambda ops, g: {"y": (ops["linear"](g["x"], g["weight"]), bounds.linear(g["x"], g["weight"]))},
    "gelu_tanh": lambda ops, g: {"y": (ops["gelu_tanh"](g["x"]), bounds.gelu_tanh(g["x"]))},
    "soft_cap": lambda ops, g: {
        "y": (ops["soft_cap"](g["x"], float(g["cap"][0])), bounds.soft_cap(g["x"], float(g["cap"][0])))
    },
    "attention_scores": lambda ops, g: {
        "y": (
            ops["attention_scores"](g["q"], g["k"], float(g["scale"][0])),
            bounds.attention_scores(g["q"], g["k"], float(g["scale"][0])),
        )
    },
    "softmax": lambda ops, g: {
        "y": (ops["softmax"](g["scores"], g["mask"].astype(bool)), bounds.softmax(g["scores"], g["mask"].astype(bool)))
    },
    "repeat_kv": lambda ops, g: {"y": (ops["repeat_kv"](g["x"], int(g["groups"][0])), np.zeros(1))},
    "rotary": lambda ops, g: {
        # Twice a library's error: the angles themselves have to be the same to the last bit.
        **dict(
            zip(
                ("cos", "sin"),
                (
                    (table, np.full(1, bounds.LIBRARY))
                    for table in ops["rotary_tables"](g["positions"], g["cos"].shape[-1], 10000.0, like=g["cos"])
                ),
                strict=True,
            )
        ),
        "y": (ops["rotate"](g["x"], g["cos"], g["sin"]), bounds.rotate(g["x"], g["cos"], g["sin"])),
    },
}


def _check_operation(backend: Any, name: str) -> None:
    """Single operations on recorded inputs, for a backend that offers them."""
    about, golden = load_golden(name)
    if not hasattr(backend, "operations"):
        raise NotApplicable("it has no method operations")
    if about["operation"] not in OPERATIONS:
        raise NotApplicable(
            f"{about['operation']} is no single operation of a backend; the recordings of models use it"
        )
    with np.errstate(over="ignore"):  # the cube of the largest numbers
        results = OPERATIONS[about["operation"]](backend.operations(), golden)
    for tensor, (computed, bound) in results.items():
        allowed = np.broadcast_to(bound, np.shape(computed))
        distance = operation_distance(computed, golden[tensor], allowed, about["dtype"])
        require(distance <= 1, f"{tensor} is {distance:.3g} times as far away as rounding explains")
