"""Checksums of a checkpoint's files: Orbax restores a flipped byte without an error.

A large model's checkpoint is hundreds of gigabytes, so each process reads its share of the files.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mlpmem_jax.datastore.files import read_json, write_json
from mlpmem_jax.datastore.manifest import describe_file, verify_file
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.agreement import of_all
from mlpmem_jax.parallel.coordinator import Exchange


def write_checksums(file: epath.Path, root: epath.Path) -> None:
    """Reads a finished checkpoint and records what its files are; from now on it counts.

    All processes must call it; it may run beside training. Process 0 writes the file.

    Args:
        file: What is written.
        root: Directory of the checkpoint.
    """
    exchange = Exchange(f"checksums{os.fspath(file)}")
    # Process 0's listing: another file system's may be an old one.
    names = exchange.first_says(_files_below(root) if jax.process_index() == 0 else None)
    shares = exchange.first_hears({name: describe_file(root / name) for name in _share(names)})
    if shares is not None:
        described = {name: about for share in shares for name, about in share.items()}
        write_json(file, {name: described[name] for name in names})


def read_checksums(file: epath.Path) -> dict[str, Any]:
    """Returns bytes and CRC-32 of each file of a checkpoint.

    Raises:
        ArtifactError: The checkpoint does not exist, or was not finished.
    """
    if not file.exists():
        raise ArtifactError(
            f"{file.parent.parent}: there is no finished checkpoint of step {file.stem}"
        )
    checksums: dict[str, Any] = read_json(file)
    return checksums


def verify_together(root: epath.Path, expected: Mapping[str, Any]) -> None:
    """Compares files with their checksums. All processes must call it, and all are told.

    Args:
        root: Directory of the files.
        expected: Bytes and CRC-32 by path; the same on all processes.

    Raises:
        ArtifactError: On every process: a file is missing, truncated or changed; it is named.
    """
    found = None
    try:
        for name in _share(sorted(expected)):
            verify_file(root / name, expected[name])
    except ArtifactError as error:
        found = str(error)
    damaged = [message for message in of_all(found) if message is not None]
    if damaged:
        raise ArtifactError(damaged[0])


def _share(names: Sequence[str]) -> Sequence[str]:
    """Returns the files that this process reads."""
    return names[jax.process_index() :: jax.process_count()]


def _files_below(root: epath.Path) -> list[str]:
    found = []
    stack = [root]
    while stack:
        for entry in stack.pop().iterdir():
            if entry.is_dir():
                stack.append(entry)
            else:
                found.append(os.fspath(entry.relative_to(root)))
    return sorted(found)
