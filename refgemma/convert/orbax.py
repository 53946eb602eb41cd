"""Read Orbax folders, the format of the Flax release, one tensor at a time with TensorStore (the extra ``flax``).

Checked against folders written by orbax-checkpoint 0.12: OCDBT with zarr 2 and zarr 3, and one folder per parameter.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.precision import Array
from refgemma.weights.checkpoint import CheckpointError, Stored

OCDBT = "manifest.ocdbt"
# Files of an Orbax folder; each version of Orbax writes at least one of them.
ORBAX_FILES = (OCDBT, "_METADATA", "_CHECKPOINT_METADATA", "checkpoint", "ocdbt.process_0")
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # file that describes an array -> TensorStore's driver for it


def is_orbax(folder: Path) -> bool:
    """Return True if `folder` looks like an Orbax folder.

    Examples
    --------
    >>> is_orbax(Path("."))
    False
    """
    return any((folder / name).exists() for name in ORBAX_FILES)


@dataclass
class Opened:
    """An open folder. It keeps the last tensor in memory, because the rows of a tensor are read one after another."""

    store: dict[str, Any]  # TensorStore's description of the folder
    prefix: str  # prefix of the names in the folder
    last: tuple[str, Array] = field(default=("", np.zeros(0)))

    def names(self) -> dict[str, str]:
        """Return the driver of each array by name."""
        import tensorstore

        listed = tensorstore.KvStore.open({**self.store, "path": self.prefix}).result().list().result()
        parts = (key.decode().rpartition("/") for key in listed)
        return {name: DRIVERS[file] for name, _, file in parts if file in DRIVERS}

    def handle(self, name: str, driver: str) -> Any:
        """Open one array, reading only its shape and dtype."""
        import tensorstore

        place = {**self.store, "path": f"{self.prefix}{name}/"}
        return tensorstore.open({"driver": driver, "kvstore": place}, open=True).result()

    def read(self, name: str, driver: str) -> Array:
        """Read one whole array."""
        if self.last[0] != name:
            self.last = ("", np.zeros(0))  # free the last array first, so that only one is in memory
            array: Array = self.handle(name, driver).read().result()
            self.last = (name, array)
        return self.last[1]


@dataclass(frozen=True)
class OrbaxTensor(Stored):
    """One tensor of an Orbax folder; a change of `file` means that the folder has changed."""

    opened: Opened
    driver: str

    def map(self, keep: bool = False) -> Array:
        """Read the whole tensor into memory, because its chunks are compressed; `keep` has no effect."""
        try:
            return self.opened.read(self.name, self.driver)
        except ValueError as error:
            raise CheckpointError(
                f"{self.file.parent}: tensor {self.name!r} cannot be read: {_shorten(error)}"
            ) from None


def _shorten(error: Exception) -> str:
    """Return the beginning of TensorStore's message; the rest refers to its own source code."""
    return str(error).split("[")[0].strip()[:200]


def read_orbax(folder: Path) -> dict[str, Stored]:
    """Read the names and shapes of the parameters of an Orbax folder; the numbers are read when accessed.

    Raises
    ------
    CheckpointError
        If TensorStore is not installed, or cannot read the folder.
    """
    if find_spec("tensorstore") is None:
        raise CheckpointError(
            f"{folder}: is an Orbax folder; to read it, install TensorStore with: pip install 'refgemma[flax]'"
        )
    path = f"{folder.resolve()}/"
    in_one = (folder / OCDBT).exists()
    opened = Opened({"driver": "ocdbt", "base": f"file://{path}"}, "") if in_one else Opened({"driver": "file"}, path)
    sign = next((folder / name for name in ORBAX_FILES if (folder / name).is_file()), folder)
    try:
        found: dict[str, Stored] = {}
        for name, driver in opened.names().items():
            handle = opened.handle(name, driver)
            dtype, shape = np.dtype(handle.dtype.numpy_dtype), tuple(handle.shape)
            found[name] = OrbaxTensor(name, sign, dtype, shape, 0, sign.stat().st_size, opened, driver)
        return found
    except ValueError as error:
        raise CheckpointError(f"{folder}: cannot be read as an Orbax folder: {_shorten(error)}") from None
