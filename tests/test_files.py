"""Test untrusted JSON objects and safetensors files: they are read, or a one-line error names the file."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from refgemma.errors import RefgemmaError
from refgemma.files import (
    AXES_LIMIT,
    JSON_LIMIT,
    LFS_POINTER,
    new_file,
    open_file,
    open_tensors,
    parse_object,
    read_file,
    read_object,
    replace_file,
)
from refgemma.inputs import InputError
from refgemma.trace.reader import open_safetensors


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON: "),
        (b"\xff{}", "is not JSON: 'utf-8' codec"),
        ("{}".encode("utf-16"), "is not JSON: 'utf-8' codec"),
        (b"[1]", "must be a JSON object, but is a list"),
        (b"null", "must be a JSON object, but is a NoneType"),
        (b'{"a": {"b": 1, "b": 1}}', "is not JSON: duplicate key 'b'"),
        (b'{"a": ' * 100_000, "is not JSON: "),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (LFS_POINTER + b"/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, text: bytes, reason: str) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(text)
    with pytest.raises(InputError) as caught:
        read_object(file, InputError, "write it again")
    message = str(caught.value)
    assert message.startswith(f"{file}: {reason}")
    assert message.endswith("; write it again") != ("Git LFS" in message)  # a pointer has a remedy of its own
    assert "\n" not in message


def test_a_long_name_in_a_message_is_cut() -> None:
    name = "x" * 10_000
    with pytest.raises(RefgemmaError) as caught:
        parse_object(f'{{"{name}": 1, "{name}": 2}}'.encode())
    assert len(str(caught.value)) < 200


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "some.json").open("wb") as stream:
        stream.truncate(JSON_LIMIT + 1)  # a hole: it takes no space on the disk
    with pytest.raises(InputError, match=r"some\.json: cannot be read: 100000001 bytes long"):
        read_object(tmp_path / "some.json", InputError)


@pytest.mark.parametrize(("name", "reason"), [("absent", "No such file"), ("folder", "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    for read in (lambda path: read_object(path, InputError), lambda path: open_tensors(path, InputError, "")):
        with pytest.raises(InputError, match=f"{name}: cannot be read: {reason}"):
            read(tmp_path / name)


def test_a_trace_is_refused_for_what_a_checkpoint_is(tmp_path: Path) -> None:
    # One reader for both; the library takes the last of two tensors of one name, and more axes than NumPy has.
    file = tmp_path / "trace.safetensors"
    entry = '"logits":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    twice = f"{{{entry},{entry}}}".encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + bytes(4))
    with pytest.raises(InputError, match="duplicate key 'logits'; write it again"):
        open_safetensors(file)
    many = entry.replace("[1]", str([1] * (AXES_LIMIT + 1))).encode()
    file.write_bytes((len(many) + 2).to_bytes(8, "little") + b"{" + many + b"}" + bytes(4))
    with pytest.raises(InputError, match="tensor 'logits' has more than 64 axes"):
        open_safetensors(file)
    file.write_bytes(LFS_POINTER)
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        open_safetensors(file)


def test_numbers_start_behind_the_header(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.write_bytes(save({"a": np.arange(3, dtype=np.float32)}))
    opened, start = open_tensors(file, RefgemmaError, "")
    assert opened.keys() == ["a"]
    assert np.array_equal(np.fromfile(file, np.float32, offset=start), [0, 1, 2])
    assert os.path.getsize(file) == start + 12


def test_a_pipe_a_device_and_a_long_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        for read in (open_file, read_file):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)
        with pytest.raises(RefgemmaError, match="not a regular file"):
            read_object(path, RefgemmaError)
        with pytest.raises(RefgemmaError, match="not a regular file"):
            open_tensors(path, RefgemmaError, "write it again")
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(OSError, match="11 bytes long; the limit is 10"):
        read_file(tmp_path / "long", 10)


def test_a_new_file_keeps_the_mode_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "private.json"
    path.write_bytes(b"old")
    path.chmod(0o600)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    for pid in ("1234", "5678"):
        (tmp_path / f".run.{pid}.part").write_bytes(b"half")
    with new_file(tmp_path / "run") as file:
        [being_written] = tmp_path.glob("*.part")  # the two others are nobody's
        replace_file(tmp_path / "run", b"whole")
        assert being_written.exists()
        file.write(b"later")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"run": b"later"}


def test_where_a_file_system_has_no_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = tmp_path / ".run.1234.part", tmp_path / ".run.5678.part"
    for partial in (old, young):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    replace_file(tmp_path / "run", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "run"]


def test_names_that_a_terminal_obeys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    path.write_bytes(save({"\x1b[31mlogits": np.zeros(2, np.float32)}))
    with pytest.raises(RefgemmaError, match=r"the tensor name '\\x1b\[31mlogits'"):
        open_tensors(path, RefgemmaError, "")
