"""A lease on a key of a bucket, by conditional writes: buckets have no locks.

Whoever holds it changes the object every few seconds. One that nobody has changed for
`LEASE_SECS`, by the clock of the process that watches it, has lost its holder and is taken over.
Every write names the generation that it replaces, so that of two writers one is refused; no clocks
of two machines are compared.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import tensorstore as ts
from etils import epath

from mlpmem_jax.console import complain
from mlpmem_jax.errors import ArtifactError, TryAgain, UserError
from mlpmem_jax.store.arrays import kvstore_spec, storage_error
from mlpmem_jax.store.file_lock import NoLocks

HEARTBEAT_SECS = 10.0
LEASE_SECS = 60.0  # Several heartbeats: a bucket may be slow, a process may get no time.


def _leave(lost: TryAgain) -> None:
    """Ends this process: what it would go on writing is another's by now."""
    complain(str(lost))
    os._exit(lost.exit_code)


class Lease:
    """The right to make an artifact in a bucket.

    Args:
        path: The object that stands for it.
        holder: How this process is named to those that wait.
        on_loss: Called by the heartbeat once another process has taken the lease over.
        store: Of the folder of `path`; opened by default.
        clock: Seconds, of this process.
    """

    def __init__(
        self,
        path: epath.Path,
        holder: str,
        on_loss: Callable[[TryAgain], None] = _leave,
        store: ts.KvStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path, self._holder, self._on_loss, self._clock = path, holder, on_loss, clock
        with self._errors():
            self._store = store or ts.KvStore.open(kvstore_spec(path.parent)).result()
        self._token = uuid.uuid4().hex
        self._writes = 0
        self._generation: bytes | None = None  # Of our own last write, while the lease is held.
        self._seen: tuple[bytes, float] | None = None  # Another's, and since when.
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> str | None:
        """Tries once; returns None where this process holds the lease now, else its holder.

        Raises:
            ArtifactError: The object is not of this program.
            NoLocks: The bucket has no conditional writes.
            UserError: It does not answer, or takes nothing.
        """
        while True:
            asked = self._clock()
            found = self._read()
            generation = found.stamp.generation
            if found.state == "value":
                holder = str(self._content(found.value)["holder"])
                if self._seen is None or self._seen[0] != generation:
                    self._seen = generation, self._clock()
                if asked - self._seen[1] < LEASE_SECS:
                    return holder
            with self._lock:
                if self._write(generation):
                    self._heartbeat.start()
                    return None

    def confirm(self) -> None:
        """Renews the lease; does nothing where it is not held.

        Raises:
            TryAgain: Another process has taken it over.
            UserError: The bucket does not answer.
        """
        with self._lock:
            if self._generation is not None and not self._write(self._generation):
                raise TryAgain(
                    f"{self._path}: another run has taken over what this one was making (it was "
                    f"stopped, or did not reach the bucket, for {LEASE_SECS:.0f} s)"
                )

    def release(self) -> None:
        """Gives the lease up; where the bucket does not answer, it runs out by itself."""
        if self._generation is None:
            return
        self._stopping.set()
        self._heartbeat.join(HEARTBEAT_SECS)
        if self._heartbeat.is_alive():
            return
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            removed = self._store.write(self._path.name, None, if_equal=self._generation)
            removed.result(timeout=HEARTBEAT_SECS)
        self._generation = None

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT_SECS):
            try:
                self.confirm()
            except TryAgain as lost:
                self._on_loss(lost)
                return
            except Exception:
                continue  # A bucket that does not answer may do so at the next beat.

    def _read(self) -> Any:
        with self._errors():
            return self._store.read(self._path.name).result()

    def _write(self, expected: bytes) -> bool:
        """Replaces a generation of the object; returns whether it was the current one."""
        self._writes += 1
        # The number: in S3 equal contents have equal generations.
        content = {"holder": self._holder, "token": self._token, "writes": self._writes}
        with self._errors():
            stamp = self._store.write(
                self._path.name, json.dumps(content), if_equal=expected
            ).result()
        generation = stamp.generation
        if not generation:
            # TensorStore repeats a write whose answer was lost, and is refused if it was made.
            found = self._read()
            if found.state != "value" or self._content(found.value)["token"] != self._token:
                return False
            generation = found.stamp.generation
        self._generation = generation
        return True

    def _content(self, value: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            content = json.loads(value)
            if isinstance(content, dict) and {"holder", "token"} <= content.keys():
                return content
        raise ArtifactError(
            f"{self._path}: not written by this program, and locks go there; move it away, or use "
            "another workdir"
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns TensorStore's errors into the user's."""
        try:
            yield
        except NotImplementedError:
            raise NoLocks("this bucket has no conditional writes") from None
        except (ValueError, RuntimeError, OSError) as error:
            if str(error).startswith("NOT_FOUND"):  # Reading finds nothing; writing needs a bucket.
                raise UserError(
                    f"{self._path}: cannot be written (there is no such bucket)"
                ) from None
            raise storage_error(self._path, error) from None
