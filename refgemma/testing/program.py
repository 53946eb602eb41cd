"""Use an implementation in any language as a backend: a program that exchanges safetensors files with this process.

Checked with programs that answer correctly, crash, hang, and answer junk.

The program is started once. Each line of its standard input is the path of a folder. For each line, the program reads
``request.safetensors`` in this folder, writes ``answer.safetensors`` there, and prints the line to its standard output.
Other printed lines are ignored. The program must end when its input ends.

A request
    Metadata: ``ask``, which is ``capabilities`` or ``forward``. A forward pass also has ``folder``, ``dtype`` and
    ``tensors``: the requested names separated by spaces, with ``*`` for any text. Tensors: ``input_ids``, and
    optionally ``attention_mask`` and ``position_ids``, all int64; and every ``cache.*`` of an earlier answer,
    unchanged.

An answer
    For ``capabilities``, metadata: ``dtypes`` and ``tensors`` separated by spaces, ``max_length``, and ``cache``,
    ``padding`` and ``positions``, each ``true`` or ``false``, and ``refuses``, words separated by spaces; missing
    fields have the defaults of `Capabilities`. For ``forward``, tensors: ``logits``, other requested tensors, and any
    ``cache.*`` to continue from. If the program does not support the request, metadata: ``unsupported``, the reason.
"""

import atexit
import contextlib
import queue
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from refgemma.errors import RefgemmaError
from refgemma.inputs import InputError
from refgemma.precision import Array
from refgemma.testing.interface import BackendError, Capabilities, Output, Unsupported
from refgemma.trace.candidate import STORED
from refgemma.trace.names import save_trace
from refgemma.trace.reader import open_safetensors

SECONDS = 60.0  # time limit of an answer
STDERR_LINES = 8  # number of last lines of the program's stderr in a message


class ProgramError(BackendError):
    """Raised if a program crashed, hung, or gave an invalid answer; the message says which."""


@dataclass(frozen=True)
class Asked:
    """A model that the program loads at its first request."""

    folder: Path
    dtype: str


class Program:
    """A backend that is a program; the top of this file defines the protocol.

    Parameters
    ----------
    command : str
        The command line, which runs without a shell: ``./port --threads 1``.
    seconds : float
        The time limit of an answer; afterwards the program is killed.

    Raises
    ------
    ProgramError
        If the program crashes, hangs or gives an invalid answer; any method may raise this. The next request restarts
        the program.

    Examples
    --------
    >>> Program("./port --threads 1").command
    ['./port', '--threads', '1']
    """

    def __init__(self, command: str, seconds: float = SECONDS) -> None:
        self.command = shlex.split(command)
        self.seconds = seconds
        self.__backend_name__ = f"program:{command}"
        self._running: _Process | None = None
        self._capabilities: Capabilities | None = None

    def capabilities(self) -> Capabilities:
        """Return the program's capabilities; they are requested only once.

        Raises
        ------
        ProgramError
            If the answer is invalid.
        """
        if self._capabilities is None:
            about, _ = self._answer({"ask": "capabilities"}, {})
            try:
                self._capabilities = _capabilities(about)
            except BackendError as error:
                raise ProgramError(f"{self._describe()}: {error}") from None
        return self._capabilities

    def load(self, folder: Path, dtype: str) -> Asked:
        """Return the folder and the precision, which are sent with each request."""
        return Asked(folder, dtype)

    def forward(
        self,
        model: Asked,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        position_ids: npt.NDArray[np.int64] | None = None,
        cache: Any = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:
        """Send a request to the program.

        Raises
        ------
        ProgramError
            If the answer is invalid.
        Unsupported
            If the program answers that it does not support this.
        """
        asked = {"ask": "forward", "folder": str(model.folder), "dtype": model.dtype, "tensors": " ".join(tensors)}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        sent = {name: np.asarray(x, np.int64) for name, x in given.items() if x is not None}
        about, found = self._answer(asked, sent | dict(cache or {}))
        if "unsupported" in about:
            raise Unsupported(about["unsupported"])
        logits = found.get("logits")
        if logits is None:
            raise ProgramError(f"{self._describe()}: the answer lacks the tensor logits; it has {sorted(found)[:5]}")
        if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
            expected = (*input_ids.shape, "vocab")
            raise ProgramError(f"{self._describe()}: logits have shape {logits.shape} instead of {expected}")
        kept = {name: x for name, x in found.items() if name.startswith("cache.")}
        return Output({name: x for name, x in found.items() if name not in kept}, kept or None)

    def _describe(self) -> str:
        return f"program {shlex.join(self.command)}"

    def _answer(
        self, asked: Mapping[str, str], tensors: Mapping[str, Array]
    ) -> tuple[dict[str, str], dict[str, Array]]:
        """Return the metadata and tensors of the program's answer."""
        with tempfile.TemporaryDirectory(prefix="refgemma-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            save_trace(tensors.items(), folder / "request.safetensors", asked)
            if self._running is None:
                self._running = _Process(self.command)
            try:
                self._running.ask(name, self.seconds)
                metadata, found = _read_answer(folder / "answer.safetensors")
            except (RefgemmaError, OSError) as error:
                self._running.end()
                self._running = None
                raise ProgramError(f"{self._describe()}: {error}") from None
        return metadata, found


def _read_answer(file: Path) -> tuple[dict[str, str], dict[str, Array]]:
    """Read the metadata and the tensors of an answer."""
    answer = open_safetensors(file)
    for name, entry in answer.entries.items():
        if entry.dtype[0] == "F" and entry.dtype not in STORED:
            raise InputError(f"{file}: {name} is stored as {entry.dtype}; refgemma reads {', '.join(STORED)}")
    return dict(answer.metadata), {name: entry.read() for name, entry in answer.entries.items()}


class _Process:
    """A running program, and its answers line by line."""

    def __init__(self, command: Sequence[str]) -> None:
        try:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                encoding="utf-8", errors="replace",
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise ProgramError(f"program {shlex.join(command)}: cannot be started: {error}") from None
        atexit.register(self.end)
        # Threads read the pipes, so that a program that fills a pipe does not block; this works on any system.
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.words: list[str] = []
        self.readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines.put), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self._note), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    @staticmethod
    def _read(pipe: IO[str], line_to: Any) -> None:
        with pipe:
            for line in pipe:
                line_to(line.rstrip("\r\n"))
        line_to(None)

    def _note(self, line: str | None) -> None:
        if line is not None:
            self.words = [*self.words[1 - STDERR_LINES :], line]

    def ask(self, request: str, seconds: float) -> None:
        """Send a request and wait until it is answered."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # the program has ended; the end of its output is reported below
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        line: str | None = ""
        deadline = time.monotonic() + seconds
        while line != request:
            left = deadline - time.monotonic()  # computed for each line: a program may print for ever
            try:
                line = self.lines.get(timeout=left)
            except (queue.Empty, ValueError):  # no line in time, or no time left
                raise ProgramError(f"did not answer within {seconds:g} s") from None
            if line is None:
                raise ProgramError(self._describe_end())

    def _describe_end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)  # a program may close its output and run on
        self.readers[1].join(timeout=1)
        said = "; it said:\n" + "\n".join(self.words) if self.words else ""
        status = self.process.returncode
        ended = "closed its output" if status is None else f"ended with exit status {status}"
        return f"{ended} instead of answering{said}"

    def end(self) -> None:
        """End the program; kill it if necessary."""
        atexit.unregister(self.end)
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(timeout=1)  # each thread closes its pipe at the end
        with contextlib.suppress(OSError):
            self.process.stdin.close()


def _capabilities(about: Mapping[str, str]) -> Capabilities:
    """Return the capabilities in the metadata of an answer.

    Examples
    --------
    >>> _capabilities({"dtypes": "float32 bfloat16", "cache": "true"}).dtypes
    ('float32', 'bfloat16')
    """
    usual = Capabilities()
    dtypes = tuple(about.get("dtypes", " ".join(usual.dtypes)).split())
    if not dtypes or (foreign := set(dtypes) - {"float64", "float32", "float16", "bfloat16"}):
        said = sorted(foreign) if dtypes else "none"
        raise ProgramError(f"dtypes is {said}; it must name some of float64, float32, float16, bfloat16")
    length = about.get("max_length")
    if length is not None and not (length.isascii() and length.isdecimal() and int(length) > 0):
        raise ProgramError(f"max_length is {length!r}; it must be a number of tokens")
    can = {}
    for name in ("cache", "padding", "positions"):
        if about.get(name, "false") not in ("true", "false"):
            raise ProgramError(f"{name} is {about[name]!r}; it must be true or false")
        can[name] = about.get(name) == "true"
    tensors = tuple(about.get("tensors", " ".join(usual.tensors)).split())
    refuses = tuple(about.get("refuses", "").split())
    return Capabilities(dtypes, None if length is None else int(length), tensors, **can, refuses=refuses)
