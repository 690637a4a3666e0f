"""From a source of windows to global batches on the devices, through Grain.

Global batch s is records [s·B, (s+1)·B) of a seeded permutation that is drawn anew each
epoch, so data order is a function of seed and step alone: resuming needs only the step,
on any number of processes and any mesh. Each process reads exactly the rows that its
addressable devices hold, as the batch's sharding says (with a tensor axis that spans
processes, several need the same rows).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import grain
import jax
import numpy as np

from mlpmem_jax.parallel.sharding import batch_sharding

Batch = dict[str, jax.Array]


class WindowSource(Protocol):
    """Windows that can be read in any order, several at once."""

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        ...

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads windows.

        Args:
            windows: int64 [B] numbers of windows.

        Returns:
            Arrays whose first dim is B.
        """
        ...


def window_order(num_windows: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from global record numbers to window numbers.

    Each run of `num_windows` records is one epoch: a permutation of its own.
    """
    order = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat(None)

    def windows_of(records: np.ndarray) -> np.ndarray:
        return np.asarray([order[int(record)] for record in records], np.int64)

    return windows_of


def local_positions(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
    """Returns the positions in a global batch that this process's devices hold, ascending."""
    indices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    held = {n for index in indices if index for n in range(*index[0].indices(batch_size))}
    return np.asarray(sorted(held), np.int64)


def to_devices(
    local: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, positions: np.ndarray, batch_size: int
) -> Batch:
    """Makes global arrays from the rows that this process holds.

    Args:
        local: Arrays [len(positions), …].
        mesh: The mesh.
        positions: Positions of those rows in the global batch.
        batch_size: Global batch size.
    """
    place = {int(position): n for n, position in enumerate(positions)}

    def make(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            return array[place[start] : place[start] + stop - start]

        shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, len(shape)), part)

    return {name: make(array) for name, array in local.items()}


class Feed:
    """Global batches of consecutive steps, read ahead in threads.

    Attributes:
        wait_secs: Time that the caller has spent waiting for batches.
    """

    def __init__(
        self,
        source: WindowSource,
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
        seed: int,
        steps: range,
        prefetch: int = 4,
        shuffled: bool = True,
    ):
        self.wait_secs = 0.0
        self._mesh = mesh
        self._batch_size = batch_size
        self._positions = local_positions(mesh, batch_size)
        order = window_order(source.num_windows, seed) if shuffled else None

        def read_step(step: int) -> dict[str, np.ndarray]:
            records = step * batch_size + self._positions
            windows = order(records) if order else records % source.num_windows
            return source.read(windows)

        dataset = grain.MapDataset.range(steps.start, steps.stop).map(read_step)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        local = next(self._iterator)
        batch = to_devices(local, self._mesh, self._positions, self._batch_size)
        self.wait_secs += time.perf_counter() - started
        return batch
