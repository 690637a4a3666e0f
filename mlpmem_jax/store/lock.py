"""One maker for each artifact: a second run that wants to make the same one is refused."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from mlpmem_jax.console import warn
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.multihost import is_writer
from mlpmem_jax.store.files import has_locks, is_local
from mlpmem_jax.store.manifest import Artifact

LOCKS = ".locks"
_HOLDER = "process "
_warned: set[epath.Path] = set()


@contextlib.contextmanager
def only_maker(artifact: Artifact) -> Iterator[None]:
    """Holds an artifact while it is made. The kernel lets go when the process dies.

    Buckets, and file systems without locks, are not protected; of the latter a warning says so.

    Raises:
        ArtifactError: Another run is making it; its process and machine are named.
    """
    if not is_writer() or not is_local(artifact.root):
        yield
        return
    if not has_locks(artifact.root):
        _warn_of_no_locks(artifact)
        yield
        return
    file = Path(os.fspath(artifact.root)) / LOCKS / artifact.relative.replace("/", ".")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(file, artifact)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # Not empty: another artifact is being made.
            file.parent.rmdir()


def _warn_of_no_locks(artifact: Artifact) -> None:
    if artifact.root not in _warned:
        _warned.add(artifact.root)
        warn(
            f"{artifact.root}: this file system does not lock files: two runs in it at the same "
            "time are not kept apart"
        )


def _locked(file: Path, artifact: Artifact) -> int:
    """Returns the descriptor that holds the lock."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # The folder went with another run's last lock.
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 256, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise ArtifactError(
                f"{artifact.path}: is being made by another run ({holder}); wait for it, or use "
                "another workdir"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        found = os.pread(descriptor, 256, 0)
        if found and not found.startswith(_HOLDER.encode()):
            os.close(descriptor)
            raise ArtifactError(
                f"{file}: not written by this program, and locks go there; move it away, or use "
                "another workdir"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(file).st_ino:
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"{_HOLDER}{os.getpid()} on {socket.gethostname()}".encode(), 0
                )
                return descriptor
        os.close(descriptor)  # Its holder has just removed it: this one is nobody's.
