"""End the command on SIGINT (Ctrl-C) or SIGTERM, with exit code 130 or 143 and no traceback. Checked by
`tools/interrupt.py`, which interrupts every command that writes.

During imports and after the work there is nothing to clean up, so the process ends immediately. In between, an
exception ends the work, so that half-written files are removed and workers end. A second signal does not wait for that.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised when a signal arrives; `number` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def is_command() -> bool:
    """Return True if this process was started as ``refgemma`` or ``python -m refgemma``.

    Examples
    --------
    >>> is_command()
    False
    """
    called = sys.argv[0] if sys.argv else ""
    if called == "-m":  # Python is still looking for the module, so find its name after -m
        called = sys.orig_argv[-len(sys.argv)]
    return os.path.basename(called).removesuffix(".exe").removesuffix("-script.py") in ("refgemma", "-mrefgemma")


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End the process; the handler while there is nothing to clean up."""
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    handle(end_at_once)
    raise Interrupted(number)


def handle(handler: Any) -> None:
    """Set `handler` for both signals; an ignored signal, as in a shell's background, stays ignored."""
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Interrupted` on a signal in this block; restore the former handlers at the block's end."""
    before, hook = {number: signal.getsignal(number) for number in NUMBERS}, sys.unraisablehook

    def end_in_destructor(unraisable: Any) -> None:  # Python would print the exception and continue
        if isinstance(unraisable.exc_value, Interrupted):
            end_at_once(unraisable.exc_value.number)
        hook(unraisable)

    sys.unraisablehook = end_in_destructor
    handle(_raise)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


if is_command():
    handle(end_at_once)
