"""The notice that this machine is about to be taken away: SIGTERM.

A process that is alone takes a note of the signal in its own handler. Where there are several,
`jax.distributed` hears it on any of them and agrees on a moment that all reach: loops that can
stop ask `preempted()`, all processes equally often, and all get the same answer.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mlpmem_jax.parallel.multihost import is_active

RUN_ID = "MLPMEM_RUN_ID"


class Preempted(BaseException):
    """Ends a command that was told to stop; the same command continues.

    No `Exception`: like `KeyboardInterrupt` it may come up anywhere and nothing may hold it.
    """


class _Notice:
    """What this process knows.

    Attributes:
        came: Whether the signal has come.
        can_wait: Whether a loop asks for it; elsewhere the signal ends the command at once.
        times_asked: Numbers the moments at which processes can stop together.
    """

    came = False
    can_wait = False
    times_asked = 0


_notice = _Notice()


def run_id() -> str | None:
    """Returns what names this run and its restarts, and no other run; None where it has no name.

    The launcher, which starts a run again after a preemption, says it in the environment. A name
    and not the time of the first start: clocks of machines differ.
    """
    return os.environ.get(RUN_ID) or None


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Turns SIGTERM into a notice while a command runs. Enter it in the main thread."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if is_active() or not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # jax.distributed listens, or whoever called us does.
        return
    signal.signal(signal.SIGTERM, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _notice.came = False


def _note(number: int, frame: FrameType | None) -> None:
    _notice.came = True
    if not _notice.can_wait:
        raise Preempted("stopped by SIGTERM")


@contextlib.contextmanager
def stopping_where_asked() -> Iterator[None]:
    """Holds a notice back until `preempted()` is asked, in a loop that can stop tidily."""
    before, _notice.can_wait = _notice.can_wait, True
    try:
        yield
    finally:
        _notice.can_wait = before
    if _notice.came and not before and not is_active():
        raise Preempted("stopped by SIGTERM")  # It came after the loop asked for the last time.


def preempted() -> bool:
    """Returns whether to stop now. All processes ask equally often, and get one answer."""
    if not is_active():
        return _notice.came
    from jax.experimental import multihost_utils

    _notice.times_asked += 1
    return bool(multihost_utils.reached_preemption_sync_point(_notice.times_asked))


def stop_if_alone(what: str) -> None:
    """Stops between two moments at which several processes could stop together.

    Raises:
        Preempted: With this text, after a notice, in a process that is alone.
    """
    if _notice.came and not is_active():
        raise Preempted(what)
