"""One maker for each artifact: a second run that wants to make the same one is refused."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mlpmem_jax.datastore.files import is_local
from mlpmem_jax.datastore.manifest import Artifact
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.multihost import is_writer

LOCKS = ".locks"


@contextlib.contextmanager
def only_maker(artifact: Artifact) -> Iterator[None]:
    """Holds an artifact while it is made. The kernel lets go when the process dies.

    Buckets, and file systems without locks, are not protected.

    Raises:
        ArtifactError: Another run is making it; its process and machine are named.
    """
    if not is_writer() or not is_local(artifact.workdir):
        yield
        return
    file = Path(os.fspath(artifact.workdir)) / LOCKS / artifact.relative.replace("/", ".")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(file, artifact)
    try:
        yield
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):  # Not empty: another artifact is being made.
            file.parent.rmdir()


def _locked(file: Path, artifact: Artifact) -> int | None:
    """Returns the descriptor that holds the lock; None where there are no locks."""
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
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(file).st_ino:
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0
                )
                return descriptor
        os.close(descriptor)  # Its holder has just removed it: this one is nobody's.
