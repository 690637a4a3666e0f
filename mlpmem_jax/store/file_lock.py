"""A lock of the kernel on a file. The kernel lets go when the process dies."""

import contextlib
import fcntl
import os
from pathlib import Path

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.files import has_locks

HOLDER = "process "  # How the content of every lock file begins.


class NoLocks(Exception):
    """A place where nothing can be locked."""


class FileLock:
    """The right to make an artifact on a local disk.

    Args:
        path: The file that stands for it; it is there while the lock is held.
        holder: How this process is named to those that wait; begins with `HOLDER`.
    """

    def __init__(self, path: epath.Path, holder: str):
        self._file, self._holder = Path(os.fspath(path)), holder
        self._descriptor: int | None = None

    def take(self) -> str | None:
        """Tries once; returns None where this process holds the lock now, else its holder.

        Raises:
            ArtifactError: The file is not of this program.
            NoLocks: The file system does not lock files.
        """
        if not has_locks(self._file):
            raise NoLocks("this file system does not lock files")
        while True:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # The folder went with another run's last lock.
                continue
            try:
                holder = self._locked(descriptor)
                if holder is None and self._is_still_there(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._holder.encode(), 0)
                    self._descriptor = descriptor
                    return None
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
            if holder is not None:
                return holder

    def confirm(self) -> None:
        """Does nothing: a lock of the kernel is held until it is released."""

    def release(self) -> None:
        """Lets go, and removes the file."""
        if self._descriptor is None:
            return
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        with contextlib.suppress(OSError):  # Not empty: another artifact is being made.
            self._file.parent.rmdir()

    def _locked(self, descriptor: int) -> str | None:
        """Locks an open file; returns who holds it if another process does."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(descriptor, 256, 0).decode(errors="replace") or "unknown"
        found = os.pread(descriptor, 256, 0)
        if found and not found.startswith(HOLDER.encode()):
            raise ArtifactError(
                f"{self._file}: not written by this program, and locks go there; move it away, or "
                "use another workdir"
            )
        return None

    def _is_still_there(self, descriptor: int) -> bool:
        """Returns whether its holder has not just removed the file that was locked."""
        with contextlib.suppress(FileNotFoundError):
            return os.fstat(descriptor).st_ino == os.stat(self._file).st_ino
        return False
