"""Which process does what, where several do a stage together, and global arrays on the host.

Suffixes: B positions of a global batch, P positions of this process.
"""

from collections.abc import Iterable

import jax
import numpy as np

from mlpmem_jax.parallel.multihost import is_active
from mlpmem_jax.parallel.sharding import batch_sharding


def process_index() -> int:
    """Returns the number of this process; 0 where it is alone."""
    return int(jax.process_index()) if is_active() else 0


def process_count() -> int:
    """Returns the number of processes."""
    return int(jax.process_count()) if is_active() else 1


def is_mine(number: int) -> bool:
    """Returns whether this process writes the shard of this number. One process does."""
    return number % process_count() == process_index()


def share_of(numbers: Iterable[int]) -> list[int]:
    """Returns those of the shards that this process makes."""
    return [number for number in numbers if is_mine(number)]


def most_shared(numbers: Iterable[int]) -> int:
    """Returns how many of the shards the process that makes most of them makes."""
    counts = np.bincount([number % process_count() for number in numbers], minlength=1)
    return int(counts.max())


def owners(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
    """Returns the process that writes what is computed at each position of a global batch.

    Where devices of several processes hold the same position it is the first of them.

    Returns:
        int64 [B].
    """
    owner_B = np.full(batch_size, np.iinfo(np.int64).max)
    places = batch_sharding(mesh, 1).devices_indices_map((batch_size,))
    for device, index in places.items():
        assert index is not None
        owner_B[index[0]] = np.minimum(owner_B[index[0]], int(device.process_index))  # type: ignore[attr-defined]
    return owner_B


def dealt(parts: Iterable[tuple[int, Iterable[int]]], owner_B: np.ndarray) -> list[np.ndarray]:
    """Deals numbered parts of work to the owners of positions, batch by batch.

    Each part goes to one owner, so that what it makes is written by one process. An owner
    whose parts are done before the others' computes nothing more.

    Args:
        parts: For each part its number, which alone decides the owner, and its items.
        owner_B: As `owners` returns.

    Returns:
        For each batch the items at its positions, int64 [B]; -1 where there is none.
    """
    processes = np.unique(owner_B)
    queues: dict[int, list[int]] = {int(process): [] for process in processes}
    for number, items in parts:
        queues[int(processes[number % len(processes)])] += items
    places = {process: np.flatnonzero(owner_B == process) for process in queues}
    lengths = [-(-len(queue) // len(places[process])) for process, queue in queues.items()]
    dealt_NB = np.full((max(lengths), len(owner_B)), -1, np.int64)
    for process, queue in queues.items():
        own = np.full(dealt_NB.shape[0] * len(places[process]), -1, np.int64)
        own[: len(queue)] = queue
        dealt_NB[:, places[process]] = own.reshape(-1, len(places[process]))
    return list(dealt_NB)


def local_rows(array_BX: jax.Array, position_P: np.ndarray) -> np.ndarray:
    """Copies rows of a global batch that this process's devices hold to the host.

    Args:
        array_BX: Laid out by `batch_sharding`.
        position_P: Their positions, ascending.

    Returns:
        [P, …].
    """
    if len(position_P) == len(array_BX):
        return np.asarray(array_BX)
    rows = np.empty((len(position_P), *array_BX.shape[1:]), array_BX.dtype)
    missing = set(position_P.tolist())
    for shard in array_BX.addressable_shards:
        held = range(*shard.index[0].indices(len(array_BX)))
        wanted = [position for position in held if position in missing]
        if wanted:  # Devices along `tensor` hold the same rows: one copy is enough.
            host = np.asarray(shard.data)
            rows[np.searchsorted(position_P, wanted)] = host[np.subtract(wanted, held.start)]
            missing.difference_update(wanted)
    assert not missing, f"positions {sorted(missing)} are on other processes"
    return rows


def whole(array: jax.Array) -> np.ndarray:
    """Copies a global array to the host of every process; all of them call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
