"""Read untrusted JSON and safetensors files, and write files that appear complete or not at all.

Checked by fuzzing, by damaged files and by tests that interrupt the writing.
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (makes safetensors know bfloat16)
from safetensors import SafetensorError, safe_open

from refgemma.errors import RefgemmaError

if sys.platform != "win32":  # Windows has no flock; there only a partial file's age shows that it is abandoned
    import fcntl

TEXT_LIMIT = 1_000_000_000  # bytes of a text: the log of an engine may be long
JSON_LIMIT = 100_000_000  # bytes: safetensors' limit for a header, the longest JSON text of a checkpoint
AXES_LIMIT = 64  # NumPy's limit
DEPTH_LIMIT = 100  # levels of JSON; deeper files could exceed Python's recursion limit
ABANDONED = 24 * 3600  # seconds after which a partial file is assumed to be left by a killed process
LFS_POINTER = b"version https://git-lfs"

_SHORT = reprlib.Repr()  # a damaged file can hold anything, so messages quote only a short part
_SHORT.maxstring, _SHORT.maxlevel = 120, 3


def quote(value: object) -> str:
    """Return the `repr` of a `value` from a file, shortened for a message.

    Examples
    --------
    >>> quote([1, "a"]), len(quote("x" * 1000))
    ("[1, 'a']", 120)
    """
    return _SHORT.repr(value)


def escape(text: str) -> str:
    r"""Return `text` with an escape for each character that a terminal would interpret.

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


def pluralise(count: int, noun: str) -> str:
    """Return a count with its noun.

    Examples
    --------
    >>> pluralise(1, "tensor"), pluralise(12000, "entry of a table")
    ('1 tensor', '12000 entries of a table')
    """
    first, _, rest = noun.partition(" of ")
    many = f"{first[:-1]}ies" if first.endswith("ry") else f"{first}s"
    return f"{count} {first if count == 1 else many}" + (f" of {rest}" if rest else "")


# --- reading ----------------------------------------------------------------------------------------------------------


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; refuse anything else.

    Reading a pipe could wait for ever, and a device such as ``/dev/zero`` never ends.

    Raises
    ------
    OSError
        If the file cannot be opened, or is a pipe, a socket or a device.

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
    """Read a whole file of at most `limit` bytes.

    Raises
    ------
    OSError
        As in `open_file`, or if the file is longer than `limit`.

    Examples
    --------
    >>> len(read_file(__file__)) > 1000
    True
    """
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"{pluralise(size, 'byte')} long; the limit is {limit}", str(path))
        return file.read()


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pointer(start: bytes) -> None:
    """Raise `RefgemmaError` if the first bytes of a file are those of a Git LFS pointer."""
    if start.startswith(LFS_POINTER):
        raise RefgemmaError("is a Git LFS pointer, not the data; fetch the data with 'git lfs pull'")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; raise an error for a duplicate key, because Python would silently use its last value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {quote(key)}")
        found[key] = value
    return found


def _read_float(text: str) -> float:
    """Return a number with a fraction or an exponent; raise an error if Python would read it as infinite."""
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {quote(text)} is beyond the largest float")
    return value


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse `text`, a JSON object in UTF-8.

    Raises
    ------
    RefgemmaError
        If the text is not UTF-8, not JSON, not an object, nested more than 100 levels deep, or has a duplicate key or a
        number too large for a float.

    Examples
    --------
    >>> parse_object(b'{"head_dim": 256, "head_dim": 128}')
    Traceback (most recent call last):
    ...
    refgemma.errors.RefgemmaError: is not JSON: duplicate key 'head_dim'
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_make_object, parse_float=_read_float)
    except (ValueError, RecursionError) as error:
        raise RefgemmaError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RefgemmaError(f"must be a JSON object, but is a {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(DEPTH_LIMIT):
        items = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in items if isinstance(item, dict | list)]
    if level:
        raise RefgemmaError(f"has objects or lists nested more than {DEPTH_LIMIT} levels deep")
    return found


@contextmanager
def one_line(path: str | Path, error: type[RefgemmaError], remedy: str) -> Iterator[None]:
    """Turn any problem with `path` into an `error` whose message is one line with the file's name."""
    try:
        yield
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror or fault}") from None
    except SafetensorError as fault:
        reason = f"is not a complete safetensors file ({' '.join(str(fault).split())[:200]})"
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
        The exception to raise.
    remedy : str
        Advice for a damaged file; it ends the message.

    Raises
    ------
    error
        If the file cannot be read, is longer than 100 MB, or is refused by `parse_object`; the message is one line with
        the file's name.

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
    """Open a safetensors file; return the library's handle, and the position of the first number in bytes.

    The library checks the header: its length, its JSON, and that shapes and dtypes fit the offsets. It also checks that
    the tensors' data fill the file without gaps. It accepts duplicate names; this function does not.

    Parameters
    ----------
    path : str or Path
        The file.
    error : type
        The exception to raise.
    remedy : str
        Advice for a damaged file; it ends the message.

    Raises
    ------
    error
        If the file cannot be opened or breaks a rule of the format; the message is one line with the file's name.

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
            if not name.isprintable():  # a terminal would interpret such characters
                raise RefgemmaError(f"the tensor name {quote(name)} has unprintable characters")
            if len(opened.get_slice(name).get_shape()) > AXES_LIMIT:
                raise RefgemmaError(f"tensor {quote(name)} has more than {AXES_LIMIT} axes")
        return opened, 8 + length


# --- writing ----------------------------------------------------------------------------------------------------------


def write_json(value: Any, indent: int | None = 2) -> str:
    """Return `value` as JSON text; NaN and infinity become strings, because JSON does not have them.

    Characters that a terminal would interpret are written as equivalent JSON escapes.

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


def lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed or the process ends; return False if the file system has no locks.

    Raises
    ------
    BlockingIOError
        If another process has locked it and `wait` is false.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     lock(file.fileno())
    True
    """
    try:
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return sys.platform != "win32"


@contextmanager
def lock_folder(folder: Path, error: type[RefgemmaError]) -> Iterator[None]:
    """Lock a `folder` of temporary files, so that no other process writes to it.

    Raises
    ------
    error
        If another process has locked it.

    Examples
    --------
    >>> with lock_folder(Path("."), RefgemmaError), lock_folder(Path("."), RefgemmaError):
    ...     pass
    Traceback (most recent call last):
    ...
    refgemma.errors.RefgemmaError: .: another process is writing to this folder; wait until it has ended
    """
    if sys.platform == "win32":  # Windows cannot open a folder
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            raise error(
                f"{folder.parent}: another process is writing to this folder; wait until it has ended"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove partial files of `target` that killed processes left: those that are not locked, or are old."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError), open_file(left) as file:  # another process may remove the file at the same time
            if lock(file.fileno()) or time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _create(target: Path) -> tuple[Path, BinaryIO]:
    """Create a partial file beside `target` and lock it, so that no other process removes it as abandoned."""
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        file = partial.open("xb")
        try:
            lock(file.fileno(), wait=True)
            if partial.exists():  # another process may have removed it before it was locked
                return partial, file
        except BaseException:
            partial.unlink(missing_ok=True)
            file.close()
            raise
        file.close()


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` at the end; after an error, remove the new file and leave `path` unchanged.

    A killed process leaves a partial file; the next process that writes `path` removes it.

    Raises
    ------
    OSError
        If the file cannot be written; `path` is then unchanged.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, new_file(Path(folder) / "notes.txt") as file:
    ...     _ = file.write(b"in part")
    ...     (Path(folder) / "notes.txt").exists()
    False
    """
    target = Path(os.path.realpath(path))  # keep a link, and replace its target
    _remove_abandoned(target)
    partial, file = _create(target)
    try:
        with file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))  # keep the permissions of a private file
            yield file
            file.flush()  # a full disk raises now, before the old file is replaced
            os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_file(path: str | Path, content: bytes) -> None:
    """Replace the contents of `path` by `content`: write a temporary file, then rename it.

    Raises
    ------
    OSError
        If the file cannot be written; `path` is then unchanged.

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
