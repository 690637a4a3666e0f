"""The notice that this machine is about to be taken away: SIGTERM.

A process that is alone hears the signal itself (signals.py). Where there are several,
`jax.distributed` hears it on any of them and agrees on a moment that all reach: loops that can
stop ask `preempted()`, all processes equally often, and all get the same answer.
"""

import contextlib
import os
from collections.abc import Iterator

from mlpmem_jax import signals
from mlpmem_jax.parallel.multihost import is_active

RUN_ID = "MLPMEM_RUN_ID"


class Preempted(BaseException):
    """Ends a command that was told to stop; the same command continues.

    No `Exception`: like `KeyboardInterrupt` nothing may hold it.
    """


_times_asked = 0  # numbers the moments at which processes can stop together


def run_id() -> str | None:
    """Returns what names this run and its restarts, and no other run; None where it has no name.

    The launcher, which starts a run again after a preemption, says it in the environment. A name
    and not the time of the first start: clocks of machines differ.
    """
    return os.environ.get(RUN_ID) or None


@contextlib.contextmanager
def stopping_where_asked() -> Iterator[None]:
    """Holds a notice back until `preempted()` is asked, in a loop that can stop tidily.

    Raises:
        Preempted: It came after the loop asked for the last time.
    """
    with signals.held() as by_another:
        yield
    if not by_another:
        stop_if_alone("stopped by SIGTERM")


def preempted() -> bool:
    """Returns whether to stop now. All processes ask equally often, and get one answer."""
    global _times_asked
    if not is_active():
        return signals.came()
    from jax.experimental import multihost_utils

    _times_asked += 1
    return bool(multihost_utils.reached_preemption_sync_point(_times_asked))


def stop_if_alone(what: str) -> None:
    """Stops between two moments at which several processes could stop together.

    Raises:
        Preempted: With this text, after a notice, in a process that is alone.
    """
    if signals.came() and not is_active():
        raise Preempted(what)
