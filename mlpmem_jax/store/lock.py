"""One maker for each artifact, one writer for each shared file; others wait, or find it free."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

from etils import epath

from mlpmem_jax.console import say, warn
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.multihost import is_active, is_writer
from mlpmem_jax.parallel.preemption import Preempted, preempted
from mlpmem_jax.store.file_lock import HOLDER, FileLock, NoLocks
from mlpmem_jax.store.files import is_local
from mlpmem_jax.store.lease import Lease
from mlpmem_jax.store.manifest import Artifact

LOCKS = ".locks"
POLL_SECS = 1.0
_FILE_POLL_SECS = 0.05
_warned: set[epath.Path] = set()


class BeingMade(ArtifactError):
    """An artifact that another run is making now."""


@contextlib.contextmanager
def only_maker(artifact: Artifact, *, waits: bool = True) -> Iterator[Callable[[], None]]:
    """Holds an artifact while it is made: a lock on a local disk, a lease in a bucket.

    Where there are neither, a warning says that two runs are not kept apart. Process 0 holds it.
    All processes of a run come here together, so that all wait; one that does not wait may come
    alone.

    Args:
        waits: Whether to wait for another run that is making it.

    Yields:
        A function to call right before the manifest is written. It raises `TryAgain` if another
        run has taken the artifact over, as after a pause of this process that outlasted its lease.

    Raises:
        BeingMade: Another run is making it, and this one does not wait; process and machine of the
            other are named.
        Preempted: The machine of one of several processes is about to go while they wait.
    """
    lock = _lock_of(artifact.root, artifact.relative) if is_writer() else None
    try:
        if waits:
            _wait(lock, artifact)
        elif (holder := _take(lock, artifact.root)) is not None:
            raise BeingMade(f"{artifact.path}: is being made by another run ({holder})")
        yield lock.confirm if lock else lambda: None
    finally:
        if lock:
            lock.release()


@contextlib.contextmanager
def only_writer(file: epath.Path) -> Iterator[None]:
    """Holds a file while a single process reads, changes and writes it; waits for other runs."""
    lock = _lock_of(file.parent, file.name)
    try:
        while _take(lock, file.parent) is not None:
            time.sleep(_FILE_POLL_SECS)
        yield
    finally:
        lock.release()


def _lock_of(folder: epath.Path, name: str) -> FileLock | Lease:
    file = folder / LOCKS / name.replace("/", ".")
    kind = FileLock if is_local(file) else Lease
    return kind(file, f"{HOLDER}{os.getpid()} on {socket.gethostname()}")


def _wait(lock: FileLock | Lease | None, artifact: Artifact) -> None:
    told = None
    # One answer for all, again and again: barriers and collectives do not wait for ever.
    while (holder := of_first(_take(lock, artifact.root))) is not None:
        if holder != told:
            say(f"{artifact.title}: being made by another run ({holder}); waiting")
            told = holder
        # Alone, a process that waits has ended already.
        if is_active() and preempted():
            raise Preempted(f"{artifact.title}: is being made by another run")
        time.sleep(POLL_SECS)


def _take(lock: FileLock | Lease | None, folder: epath.Path) -> str | None:
    """Tries once; returns who else holds it, or None."""
    try:
        return lock.take() if lock else None
    except NoLocks as missing:
        if not any(folder in (one, *one.parents) for one in _warned):
            _warned.add(folder)
            warn(f"{folder}: {missing}: two runs in it at the same time are not kept apart")
        return None
