"""Read the goldens, PyTorch's recordings, and check them against their manifest. Checked on damaged files."""

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes safetensors know bfloat16)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refgemma.config import Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.files import read_object
from refgemma.hub import find_model, golden_folder
from refgemma.precision import Array, as_dtype
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights

AGAIN = "install refgemma again; in a checkout, record again with: python golden/record.py"


class GoldenError(RefgemmaError):
    """Raised for a golden that is missing, damaged or unknown."""


def read_manifest(folder: str = ".", format: str = "refgemma-golden/1") -> dict[str, Any]:
    """Return the manifest of a folder of recordings, with provenance and hashes."""
    path = golden_folder() / folder / "manifest.json"
    manifest = read_object(path, GoldenError, AGAIN)
    if manifest.get("format") != format or not manifest.get("cases"):
        raise GoldenError(f"{path}: is not a manifest of the format {format}; {AGAIN}")
    return manifest


def check_hash(path: Path, sha256: str, says: str, again: str = AGAIN) -> None:
    """Raise `GoldenError` if the file has another hash; `says` describes the expected file."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise GoldenError(f"{path}: cannot be read: {error.strerror}; {again}") from None
    if found != sha256:
        raise GoldenError(f"{path}: is not {says} (its sha256 differs); {again}")


def read_recording(path: Path, sha256: str, again: str = AGAIN) -> dict[str, Array]:
    """Return the stored tensors of a file, after checking its hash."""
    check_hash(path, sha256, "the file in the manifest", again)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise GoldenError(f"{path}: cannot be read: {error}; {again}") from None


def case_names(wanted: list[str] | None = None) -> list[str]:
    """Return all cases, or the `wanted` cases after checking that they exist.

    Raises
    ------
    GoldenError
        If a case does not exist.

    Examples
    --------
    >>> case_names(["bends-forward-f33"])
    Traceback (most recent call last):
    ...
    refgemma.goldens.load.GoldenError: unknown case 'bends-forward-f33'; did you mean bends-forward-f32?
    """
    known = list(read_manifest()["cases"])
    for name in wanted or []:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "refgemma verify --list prints all cases"
            raise GoldenError(f"unknown case {name!r}; {hint}")
    return wanted or known


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return one case: its entry in the manifest and its tensors; half precision gives `BF16` and `F16` arrays.

    Raises
    ------
    GoldenError
        If the file of case `name` is missing, or is not the recorded one.
    """
    about = read_manifest()["cases"][name]
    tensors = read_recording(golden_folder() / about["file"], about["sha256"], f"{AGAIN} {name}")
    return about, {tensor: restore_precision(x) for tensor, x in tensors.items()}


def restore_precision(x: Array) -> Array:
    """Return a stored tensor in the precision of its run; half precision gives `BF16` and `F16` arrays."""
    if x.dtype.kind in "iub":
        return x
    return as_dtype(x.astype(np.float64 if x.dtype == np.float64 else np.float32), x.dtype.name)


def recorded_model(about: Mapping[str, Any]) -> Path:
    """Return the folder of the model with which a case was recorded."""
    return find_model("tiny") if about["model"] == "tiny" else golden_folder() / "models" / about["model"]


def model_of(about: Mapping[str, Any]) -> tuple[Gemma2Config, Weights]:
    """Return the model with which a case was recorded, in the case's precision."""
    folder = recorded_model(about)
    for file, recorded in read_manifest()["models"][about["model"]].items():
        check_hash(folder / file, recorded, "the file with which the recordings were made")
    checkpoint = open_checkpoint(folder)
    return checkpoint.config, checkpoint.resident(about["dtype"])
