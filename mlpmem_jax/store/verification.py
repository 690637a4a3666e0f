"""Checksums of files that all processes of a run need, read once: each process takes a share."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.agreement import of_all
from mlpmem_jax.parallel.sharing import process_count, process_index
from mlpmem_jax.store.files import verify_file


def share_of_files(names: Sequence[str]) -> Sequence[str]:
    """Returns the files that this process reads."""
    return names[process_index() :: process_count()]


def verify_together(root: epath.Path, expected: Mapping[str, Any]) -> None:
    """Compares files with their checksums. All processes must call it, and all are told.

    Args:
        expected: Bytes and CRC-32 by path; the same on all processes.

    Raises:
        ArtifactError: On every process: a file is missing, truncated or changed; it is named.
    """
    found = None
    try:
        for name in share_of_files(sorted(expected)):
            verify_file(root / name, expected[name])
    except ArtifactError as error:
        found = str(error)
    damaged = [message for message in of_all(found) if message is not None]
    if damaged:
        raise ArtifactError(damaged[0])
