"""The thread that owns the devices: it advances the batch while there is something to do."""

import threading
from collections.abc import Sequence

from mlpmem_jax.generation.batching import Batcher, Completion


class Worker:
    """Runs a batcher in a thread of its own.

    Attributes:
        failure: What ended the thread; None: it works.
    """

    def __init__(self, batcher: Batcher):
        """Takes a batcher without texts; `start` begins."""
        self.batcher = batcher
        self.failure: BaseException | None = None
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, completions: Sequence[Completion]) -> None:
        """Puts completions into the queue, all or none.

        Raises:
            QueueFull: So many may not wait.
        """
        self.batcher.submit(completions)
        with self._wake:
            self._wake.notify()
        if self.failure is not None:
            self.batcher.fail()  # the thread may have ended before it could see them

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Ends completions that nobody waits for."""
        self.batcher.cancel(completions)
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after its next step, and everything that it was doing."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self.batcher.advance()
        except BaseException as error:
            self.failure = error
        self.batcher.fail()

    def _wait(self) -> bool:
        """Waits for something to do; returns False once it is to stop."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._stopping or self.batcher.num_waiting or self.batcher.num_active
            )
            return not self._stopping
