"""Reads the files that strangers write, JSON and safetensors, and writes files that appear whole or not at all. Checked
by fuzzing, by damaged files and by tests that interrupt the writing."""

import errno
import glob
import json
import math
import os
import re
import reprlib
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (makes safetensors know bfloat16)
from safetensors import SafetensorError, safe_open

from refgemma.errors import RefgemmaError

TEXT_LIMIT = 1_000_000_000  # bytes of a text: the log of an engine may be long
JSON_LIMIT = 100_000_000  # bytes: what safetensors allows for a header, the longest JSON text of a checkpoint
AXES_LIMIT = 64  # NumPy's limit
ABANDONED = 24 * 3600  # seconds after which a file that was being written is a killed process's
LFS_POINTER = b"version https://git-lfs"

_SHORT = reprlib.Repr()  # a damaged file can hold anything: quote no more of it than fits on a screen
_SHORT.maxstring = 120


def quote(value: object) -> str:
    """Return the `repr` of a `value` that a file holds, cut to what fits into a message.

    Examples
    --------
    >>> quote([1, "a"]), len(quote("x" * 1000))
    ("[1, 'a']", 120)
    """
    return _SHORT.repr(value)


def escape(text: str) -> str:
    r"""Return `text` with escapes in place of all characters that a terminal would obey.

    Examples
    --------
    >>> print(escape("red \x1b[31m\nname"))
    red \x1b[31m\nname
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quote_few(names: Sequence[str]) -> str:
    """Quote the first three names and count the others.

    Examples
    --------
    >>> quote_few("abcde")
    "'a', 'b', 'c' and 2 more"
    """
    shown = ", ".join(quote(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# --- reading ----------------------------------------------------------------------------------------------------------


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_file(path: str | Path) -> BufferedReader:
    """Open a file for reading, and refuse what only has the name of one.

    A pipe would make the reader wait for ever, and a device such as ``/dev/zero`` has no end.

    Raises
    ------
    OSError
        If it cannot be opened, or is a pipe, a socket or a device.

    Examples
    --------
    >>> open_file("/dev/null")
    Traceback (most recent call last):
    ...
    OSError: [Errno 22] not a regular file: '/dev/null'
    """
    file = open(path, "rb", opener=_open_without_waiting)  # the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_file(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """Read a file of at most `limit` bytes, which `open_file` opens.

    Raises
    ------
    OSError
        As `open_file`; if the file is longer.

    Examples
    --------
    >>> len(read_file(__file__)) > 1000
    True
    """
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"{size} bytes long, which is more than {limit}", str(path))
        return file.read()


def refuse_pointer(start: bytes) -> None:
    """Raise `RefgemmaError` for a file whose first bytes are those of a Git LFS pointer."""
    if start.startswith(LFS_POINTER):
        raise RefgemmaError(
            "is a Git LFS pointer, a few lines of text in place of the data; fetch these with 'git lfs pull'"
        )


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; of a key that stands twice, Python would silently take the last value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {quote(key)} stands in it twice")
        found[key] = value
    return found


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse `text`, a JSON object in UTF-8.

    Raises
    ------
    RefgemmaError
        If it is not UTF-8, not JSON, not an object, nested without end, or has a key twice.

    Examples
    --------
    >>> parse_object(b'{"head_dim": 256, "head_dim": 128}')
    Traceback (most recent call last):
    ...
    refgemma.errors.RefgemmaError: is not JSON: the key 'head_dim' stands in it twice
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:
        raise RefgemmaError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RefgemmaError(f"holds a {type(found).__name__}, not a JSON object")
    return found


@contextmanager
def one_line(path: str | Path, error: type[RefgemmaError], remedy: str) -> Iterator[None]:
    """Raise whatever is wrong with `path` as an `error` of one line that names the file."""
    try:
        yield
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror or fault}") from None
    except SafetensorError as fault:
        reason = f"is not a whole safetensors file ({' '.join(str(fault).split())[:200]})"
    except RefgemmaError as fault:
        reason = str(fault)
    else:
        return
    raise error(f"{path}: {reason}" + (f"; {remedy}" if remedy and "git lfs" not in reason else "")) from None


def read_object(path: str | Path, error: type[RefgemmaError], remedy: str = "") -> dict[str, Any]:
    """Read a file with a JSON object.

    Parameters
    ----------
    path : str or Path
        The file.
    error : type
        What to raise.
    remedy : str
        What to do about a damaged file: the end of the message.

    Raises
    ------
    error
        If it cannot be read, is longer than 100 MB, or `parse_object` refuses it: one line that names the file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "config.json").write_text('{"head_dim": 256}')
    ...     read_object(Path(folder) / "config.json", RefgemmaError)
    {'head_dim': 256}
    """
    with one_line(path, error, remedy):
        text = read_file(path, JSON_LIMIT)
        refuse_pointer(text)
        return parse_object(text)


def open_tensors(path: str | Path, error: type[RefgemmaError], remedy: str) -> tuple[Any, int]:
    """Open a safetensors file: the library's handle, and the byte where the numbers start.

    The library checks the header: its length, its JSON, that shapes and dtypes fit the offsets, and that the data of
    the tensors follow each other without a gap and fill the file. A name that stands twice it accepts; this does not.

    Parameters
    ----------
    path : str or Path
        The file.
    error : type
        What to raise.
    remedy : str
        What to do about a damaged file: the end of the message.

    Raises
    ------
    error
        If it cannot be opened or breaks a rule of the format: one line that names the file.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"norm.weight": np.zeros(24, np.float32)}, Path(folder) / "one.safetensors")
    ...     opened, start = open_tensors(Path(folder) / "one.safetensors", RefgemmaError, "write it again")
    ...     opened.keys(), opened.get_slice("norm.weight").get_shape()
    (['norm.weight'], [24])
    """
    with one_line(path, error, remedy), open_file(path) as stream:
        refuse_pointer(stream.read(len(LFS_POINTER)))
        opened: Any = safe_open(path, framework="np")
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        parse_object(stream.read(length))
        for name in opened.keys():
            if not name.isprintable():  # a terminal would obey some of its characters
                raise RefgemmaError(f"the name {quote(name)} of a tensor has characters that cannot be printed")
            if len(opened.get_slice(name).get_shape()) > AXES_LIMIT:
                raise RefgemmaError(f"tensor {quote(name)} has more than {AXES_LIMIT} axes")
        return opened, 8 + length


# --- writing ----------------------------------------------------------------------------------------------------------


def write_json(value: Any, indent: int | None = 2) -> str:
    """Return `value` as JSON, which has neither NaN nor infinity: these become texts.

    Characters that a terminal would obey are written as JSON's escapes, which mean the same.

    Examples
    --------
    >>> print(write_json(("bound", float("inf"))))
    [
      "bound",
      "inf"
    ]
    """
    text = json.dumps(_without_infinity(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub(r"[^ -~\n]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` at the end; after an error it is removed and `path` is as it was.

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
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with partial.open("xb") as file:
        try:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))  # what was private stays so
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
