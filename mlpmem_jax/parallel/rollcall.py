"""Who has come: a message that names the process that has not.

JAX's coordination service aborts the process when the others do not join in time, and names
nobody. While it waits, processes tell process 0 their index over a socket beside it; when the
time is over, a line with the missing ones is printed. Nothing else depends on this socket.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

_RETRY_SECS = 0.5


class RollCall:
    """Watches the start of a run; use it as a context around joining.

    Args:
        coordinator: "host:port" of JAX's coordinator; the port above it is used. "" where
            it is not known: then nobody is named.
        num_processes: How many there are.
        index: Which of them this is; None where that is not known.
        limit_secs: When to give up.
        give_up: Called with the message, in a thread of its own.
    """

    def __init__(
        self,
        coordinator: str,
        num_processes: int,
        index: int | None,
        limit_secs: float,
        give_up: Callable[[str], None],
    ):
        self._host, _, port = coordinator.rpartition(":")
        self._port = int(port) + 1 if port else 0
        self._num_processes = num_processes
        self._index = index
        self._limit_secs = limit_secs
        self._give_up = give_up
        self._came: set[int] = set()
        self._answered = False
        self._done = threading.Event()

    def __enter__(self) -> "RollCall":
        self._start(self._watch)
        if self._port:
            self._start(self._listen if self._index == 0 else self._report)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()

    def _start(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, daemon=True).start()

    def _watch(self) -> None:
        if not self._done.wait(self._limit_secs):
            self._give_up(self.message())

    def message(self) -> str:
        """Returns what is wrong, as far as it is known."""
        waited = f"within {self._limit_secs:g} s"
        if self._port and self._index == 0:
            missing = sorted(set(range(1, self._num_processes)) - self._came)
            if missing:
                named = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
                return f"process {named} of {self._num_processes} did not come {waited}"
        elif self._port and not self._answered:
            return f"process 0 of {self._num_processes} did not come {waited}"
        return f"not all of {self._num_processes} processes came {waited}"

    def _listen(self) -> None:
        # Where the port is taken nobody is named, and that is all.
        with contextlib.suppress(OSError), socket.create_server(("", self._port)) as server:
            server.settimeout(_RETRY_SECS)
            while not self._done.is_set():
                with contextlib.suppress(OSError, ValueError):  # a time-out, or a stranger
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(_RETRY_SECS)
                        self._came.add(int(connection.recv(16).decode()))

    def _report(self) -> None:
        address = (self._host.strip("[]"), self._port)
        while not self._done.is_set():
            try:
                with socket.create_connection(address, timeout=5) as connection:
                    connection.sendall(str(self._index).encode())
                    self._answered = True
                    return
            except OSError:
                time.sleep(_RETRY_SECS)
