"""How long an artifact takes to make, over all starts that it takes."""

import contextlib
import threading
import time

from mlpmem_jax.parallel.multihost import is_writer
from mlpmem_jax.store.manifest import Artifact

_RECORD_SECS = 30.0


class Stopwatch:
    """Measures how long an artifact takes to make, over all starts that it takes.

    What was spent is recorded beside the artifact now and then, so that a kill costs the record
    half a minute: costs, and the controls that are sized by them, rest on it.

    Args:
        artifact: What is made; it has been begun.
    """

    def __init__(self, artifact: Artifact):
        self._artifact = artifact
        # The others need no record, and may see it later or half-written (NFS).
        self._before = artifact.spent() if is_writer() else 0.0
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._recorder = threading.Thread(target=self._record_now_and_then, daemon=True)
        self.seconds = self._before

    def __enter__(self) -> "Stopwatch":
        """Starts."""
        if is_writer():
            self._recorder.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops, whether the artifact was made or not."""
        self.seconds = self._before + time.monotonic() - self._started
        self._stopped.set()
        if is_writer():
            self._recorder.join()
            self._record()

    def _record_now_and_then(self) -> None:
        while not self._stopped.wait(_RECORD_SECS):
            self.seconds = self._before + time.monotonic() - self._started
            self._record()

    def _record(self) -> None:
        # Whatever is wrong with disk or bucket, what is being made will meet it and say so; a
        # record must not hide that, and clients of buckets have errors of their own.
        with contextlib.suppress(Exception):
            self._artifact.record_spent(self.seconds)
