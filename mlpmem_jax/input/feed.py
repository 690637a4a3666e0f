"""From a source of windows to global batches on the devices, through Grain.

Global batch s is records [s·B, (s+1)·B) of a seeded permutation that is drawn anew each
epoch (or, with mixed rows, rows of the records of the steps around, `input/mixing.py`), so data
order is a function of seed and step alone: resuming needs only the step,
on any number of processes and any mesh. Each process reads exactly the rows that its
addressable devices hold, as the batch's sharding says (with a tensor axis that spans
processes, several need the same rows).
"""

import time
from collections.abc import Iterator, Mapping

import grain
import jax
import numpy as np

from mlpmem_jax.input.mixing import MixedRows
from mlpmem_jax.input.windows import WindowsOf, WindowSource, in_turn, window_order
from mlpmem_jax.parallel.sharding import batch_sharding

Batch = dict[str, jax.Array]


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
        positions: Positions of those rows in the global batch.
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
        mix_windows: int = 1,
        windows_of: WindowsOf | None = None,
    ):
        """Prepares to read.

        Args:
            batch_size: Windows in a global batch.
            steps: Steps whose batches are wanted.
            prefetch: Batches read ahead.
            shuffled: Whether the order is drawn; else that of the source.
            mix_windows: Windows whose rows are dealt out together; 1: batches are whole windows.
            windows_of: Global record numbers to windows; None: as `shuffled` says.
        """
        self.wait_secs = 0.0
        self._mesh = mesh
        self._batch_size = batch_size
        self._positions = local_positions(mesh, batch_size)
        if windows_of is None:
            windows_of = window_order(source.num_windows, seed) if shuffled else in_turn(source)
        order = windows_of

        def read_step(step: int) -> dict[str, np.ndarray]:
            return source.read(order(step * batch_size + self._positions))

        if mix_windows > 1:
            read_step = MixedRows(
                source,
                order,
                self._positions,
                batch_size,
                mix_windows=mix_windows,
                seed=seed,
                steps=steps,
            ).read_step
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
