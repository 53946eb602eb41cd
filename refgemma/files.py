"""Files that appear whole or not at all. Checked by tests that interrupt the writing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, and is gone if there is an error before.

    Raises
    ------
    OSError
        If it cannot be written; `path` is as it was then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, new_file(Path(folder) / "notes.txt") as file:
    ...     _ = file.write(b"in part")
    ...     (Path(folder) / "notes.txt").exists()
    False
    """
    target = Path(os.path.realpath(path))  # a link stays one
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    with partial.open("xb") as file:  # a file of that name is somebody else's
        try:
            yield file
            file.flush()  # a full disk is found now, and not after the old file is gone
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def replace_file(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, in the place of what is there: first beside it, then renamed.

    Raises
    ------
    OSError
        If it cannot be written; `path` is as it was then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     replace_file(Path(folder) / "notes.txt", b"whole")
    ...     (Path(folder) / "notes.txt").read_text(), len(os.listdir(folder))
    ('whole', 1)
    """
    with new_file(path) as file:
        file.write(content)
