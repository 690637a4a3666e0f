"""Ctrl-C and SIGTERM: at every moment they end this program within seconds, with a code for it.

No handler raises: an exception would be lost in a callback of the garbage collector or of C++, and
turned into another while modules are imported. The process leaves at once, which does no more harm
on disk than SIGKILL, or, in a loop that can stop tidily, notes the signal for the loop to ask for.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from mlpmem_jax.errors import EXIT_INTERRUPTED, PREEMPTED

_WRITE_SECS = 0.5
_ENDS = {
    signal.SIGINT: (
        EXIT_INTERRUPTED,
        "error: interrupted; the same command continues where this one stopped",
    ),
    signal.SIGTERM: (PREEMPTED, "preempted: stopped by SIGTERM; the same command continues"),
}


class _State:
    """What this process knows.

    Attributes:
        came: Whether a SIGTERM has come that a loop is to ask for.
        held: Whether there is such a loop.
        leaver: The thread that ends this process; 0: none yet.
    """

    came = False
    held = False
    leaver = 0


_state = _State()
_leaving = threading.Lock()


def listen() -> None:
    """Listens from here on; call it in the main thread, before imports that take time."""
    # Python runs handlers between two instructions of the main thread, which may compile for
    # minutes; a thread that the interpreter itself wakes need not wait for that.
    with contextlib.suppress(OSError):  # Too few descriptors: the handlers have to do.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a job in the background
            signal.signal(number, answer)


def answer(number: int, frame: FrameType | None = None) -> None:
    """Answers a signal: a note for the loop that asks, or the end of this process."""
    if number == signal.SIGTERM and _state.held:
        _state.came = True
    elif number in _ENDS:
        _leave(*_ENDS[signal.Signals(number)])


def pass_on() -> None:
    """Leaves all signals to the handlers of whoever calls this."""
    signal.set_wakeup_fd(-1)


def finish() -> None:
    """Ignores signals from here on: the command is done and its exit code stands."""
    for number in _ENDS:
        signal.signal(number, signal.SIG_IGN)
    pass_on()


def came() -> bool:
    """Returns whether a SIGTERM has come that waits for an answer."""
    return _state.came


@contextlib.contextmanager
def held() -> Iterator[bool]:
    """Holds SIGTERM back for a loop that asks `came()`; yields whether another one holds it too."""
    before, _state.held = _state.held, True
    try:
        yield before
    finally:
        _state.held = before


def _watch(reading: int) -> None:
    while numbers := os.read(reading, 64):
        for number in numbers:
            answer(number)


def _leave(code: int, line: str) -> NoReturn:
    if not _leaving.acquire(blocking=False):
        # The handler or the thread is saying so; both may get the same signal.
        if _state.leaver != threading.get_ident():
            time.sleep(2 * _WRITE_SECS)
        os._exit(code)
    _state.leaver = threading.get_ident()
    start = "\n" if os.isatty(2) else ""  # a bar, or ^C, may stand in this line
    with contextlib.suppress(OSError):
        # Not through sys.stderr, which the main thread may be in the midst of; and a reader that
        # has stopped reading must not keep this process.
        if select.select([], [2], [], _WRITE_SECS)[1]:
            os.write(2, f"{start}{line}\n".encode())
    os._exit(code)
