"""Checksums of a checkpoint's files: Orbax restores a flipped byte without an error.

A large model's checkpoint is hundreds of gigabytes, so each process reads its share of the files.
"""

import os
from typing import Any

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.coordinator import Exchange
from mlpmem_jax.parallel.multihost import is_writer
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.files import describe_file, is_foreign
from mlpmem_jax.store.verification import share_of_files


def write_checksums(file: epath.Path, root: epath.Path) -> None:
    """Reads a finished checkpoint and records what its files are; from now on it counts.

    All processes must call it; it may run beside training. Process 0 writes the file.

    Args:
        file: What is written.
        root: Directory of the checkpoint.
    """
    exchange = Exchange(f"checksums{os.fspath(file)}")
    # Process 0's listing: another file system's may be an old one.
    names = exchange.first_says(_files_below(root) if is_writer() else None)
    shares = exchange.first_hears(
        {name: describe_file(root / name) for name in share_of_files(names)}
    )
    if shares is not None:
        described = {name: about for share in shares for name, about in share.items()}
        write_checked_json(file, {name: described[name] for name in names})


def read_checksums(file: epath.Path) -> dict[str, Any]:
    """Returns bytes and CRC-32 of each file of a checkpoint.

    Raises:
        ArtifactError: The checkpoint does not exist, or was not finished.
    """
    if not file.exists():
        raise ArtifactError(
            f"{file.parent.parent}: there is no finished checkpoint of step {file.stem}"
        )
    return read_checked_json(file)


def _files_below(root: epath.Path) -> list[str]:
    found = []
    stack = [root]
    while stack:
        for entry in stack.pop().iterdir():
            if is_foreign(entry.name):
                continue
            if entry.is_dir():
                stack.append(entry)
            else:
                found.append(os.fspath(entry.relative_to(root)))
    return sorted(found)
