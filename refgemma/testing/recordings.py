"""Compare any implementation with PyTorch's recordings: run the calls of each case, and compare every common tensor.

Distances are measured as by `refgemma verify`; see `refgemma.goldens.verify`.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.files import pluralise
from refgemma.goldens.load import load_golden, model_of, read_manifest, recorded_model
from refgemma.goldens.single import OFFERED, recorded_operations
from refgemma.goldens.verify import compare_run
from refgemma.oracle.judge import strict_distance
from refgemma.precision import Array
from refgemma.testing.cached import with_forward
from refgemma.testing.interface import Unsupported
from refgemma.testing.laws import LawBroken, NotApplicable, Refused, exact, golden_script, message, require


def golden_names() -> list[str]:
    """Return the names of all recorded cases."""
    return list(read_manifest()["cases"])


def check_golden(backend: Any, name: str) -> None:
    """Compare a backend with one recorded case.

    Raises
    ------
    NotApplicable
        If the backend cannot run the recorded case.
    Refused
        If the backend refuses the recorded model.
    LawBroken
        If a tensor differs by more than rounding; the message names the first, and a script reproduces the difference.

    Examples
    --------
    >>> from refgemma.testing.backends import NumpyBackend
    >>> check_golden(NumpyBackend(), "no-caps-forward-f32")
    """
    about, backend = read_manifest()["cases"][name], with_forward(backend)
    try:
        match about["kind"]:
            case "forward":
                _check_forward(backend, name)
            case "greedy":
                _check_greedy(backend, name)
            case "operation":
                _check_operation(backend, name)
            case other:
                raise NotApplicable(f"unknown kind of recording: {other!r}")
    except (Unsupported, NotImplementedError) as refusal:
        raise Refused(str(refusal) or "it raised NotImplementedError") from refusal
    except NotApplicable:
        raise
    except Exception as error:  # whatever an implementation may raise
        raise LawBroken(f"{name}: {message(error)}", golden_script(name, backend)) from error


@contextmanager
def _load_recorded(backend: Any, about: Mapping[str, Any]) -> Iterator[Any]:
    """Load the recorded model, from a copy of its folder if the backend does not read every key of ``config.json``."""
    can, folder = backend.capabilities(), recorded_model(about)
    if about["dtype"] not in can.dtypes:
        raise NotApplicable(f"it does not use {about['dtype']} in every step")
    config, _ = model_of(about)  # raises an error if the folder is not the recorded one
    can.refuse_model(config)
    with tempfile.TemporaryDirectory(prefix="refgemma-", ignore_cleanup_errors=True) as copy:
        if can.refuses:
            can.save_config(config, Path(copy))
            shutil.copyfile(folder / "model.safetensors", Path(copy) / "model.safetensors")
        yield backend.load(Path(copy) if can.refuses else folder, about["dtype"])


def _check_forward(backend: Any, name: str) -> None:
    about, golden = load_golden(name)
    can, ids, padding = backend.capabilities(), golden["input_ids"], golden["attention_mask"]
    if len(about["calls"]) > 1 and not can.cache:
        raise NotApplicable("its forward takes no cache")
    if not padding.all() and not can.padding:
        raise NotApplicable("its forward takes no padding")
    if can.max_length is not None and ids.shape[1] > can.max_length:
        raise NotApplicable(f"its texts have at most {pluralise(can.max_length, 'token')}")
    cache, done = None, 0
    computed: dict[str, Array] = {}
    wanted = sorted({tensor.split(".", 2)[2] for tensor in golden if tensor.startswith("calls.")} | {"logits"})
    with _load_recorded(backend, about) as model:
        for call, length in enumerate(about["calls"]):
            end = done + length
            mask = None if padding.all() else padding[:, :end].astype(np.int64)
            shown = tuple(name for name in wanted if can.shows(name))
            output = backend.forward(model, ids[:, done:end], mask, None, cache, shown)
            computed |= {f"calls.{call}.{tensor}": x for tensor, x in output.tensors.items()}
            cache, done = output.cache, end
    distances = _measure_distances(name, about, golden, computed)
    beyond = [(tensor, far) for tensor, far in distances.items() if not far <= 1]
    listed = "; ".join(f"{tensor}: {far:.3g} times the tolerance" for tensor, far in beyond[:8])
    count = f"{len(beyond)} of {pluralise(len(distances), 'tensor')} differ{'s' * (len(beyond) == 1)}"
    require(not beyond, f"{count}, first {listed}")


def _measure_distances(
    name: str, about: Mapping[str, Any], golden: Mapping[str, Array], computed: Mapping[str, Array]
) -> dict[str, float]:
    """Return the distance of each common tensor in units of the tolerance, in the order of the recording."""
    shown = {tensor: exact(x) for tensor, x in computed.items()}
    for tensor in [tensor for tensor in golden if tensor in shown]:
        ours, theirs = shown[tensor].shape, golden[tensor].shape
        require(ours[1:] == theirs[1:], f"{tensor} has shape {ours} instead of {theirs}")
    return {c.tensor: c.distance for c in compare_run(about, golden, shown, name)}


def _check_greedy(backend: Any, name: str) -> None:
    """Compare greedily generated tokens; all tokens are read in one call, so no cache is needed."""
    about, golden = load_golden(name)
    with _load_recorded(backend, about) as model:
        for number in range(len(about["prompts"])):
            text = [int(token) for token in golden[f"prompt.{number}"]]
            recorded = [int(token) for token in golden[f"continued.{number}"]]
            # Each token is predicted from the recorded tokens, so that a near tie changes only one token.
            whole = np.array([text + recorded[:-1]], np.int64)
            logits = exact(backend.forward(model, whole).logits)[0, len(text) - 1 :]
            chosen = logits.argmax(axis=-1).tolist()
            differ = [place for place, pair in enumerate(zip(chosen, recorded, strict=True)) if pair[0] != pair[1]]
            require(not differ, f"prompt {number} continues with other tokens, first the {differ[:1]}th")


def _check_operation(backend: Any, name: str) -> None:
    """Compare single operations on recorded inputs, if the backend has single operations."""
    about, golden = load_golden(name)
    if not hasattr(backend, "operations"):
        raise NotApplicable("the backend has no method named operations")
    if about["operation"] not in OFFERED:
        raise NotApplicable(
            f"{about['operation']} is not a single operation of a backend; the recordings of models test it"
        )
    for operation, inputs in recorded_operations(about["operation"], golden, backend.operations()):
        with np.errstate(over="ignore"):  # the cubes of the largest numbers overflow
            computed = operation.compute(*inputs)
        allowed = operation.allowed(*inputs)
        distance = strict_distance(computed, golden[operation.name], allowed, about["dtype"])
        require(distance <= 1, f"{operation.name} differs by {distance:.3g} times the tolerance")
