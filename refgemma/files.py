"""Files that appear whole or not at all. Checked by tests that interrupt the writing."""

import os
from pathlib import Path


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
    target = Path(os.path.realpath(path))  # a link stays one
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    with partial.open("xb") as file:  # a file of that name is somebody else's
        try:
            file.write(content)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
