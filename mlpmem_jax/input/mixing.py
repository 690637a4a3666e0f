"""Rows of many windows in each batch, although whole windows are read.

A memory mixes no tokens, so neighbouring rows in a batch bring it little (docs/results.md).
Position b of a batch reads the G windows of its next G steps at once, and deals their rows out
over these steps in a seeded order. Nothing is read twice and nothing is stored twice; which rows
a batch holds is a function of seed and step alone, and a process reads only its own positions.

Suffix: R rows of a group, G · L.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlpmem_jax.input.windows import WindowSource

Arrays = dict[str, np.ndarray]


class _Group(NamedTuple):
    """Consecutive steps of a position of the batch that share their windows.

    Attributes:
        position: Position in the global batch.
        number: Of the group, from 0.
        steps: The steps.
    """

    position: int
    number: int
    steps: range


class MixedRows:
    """Batches of rows that are dealt out of groups of windows."""

    def __init__(
        self,
        source: WindowSource,
        windows_of: Callable[[np.ndarray], np.ndarray],
        positions: np.ndarray,
        batch_size: int,
        *,
        mix_windows: int,
        seed: int,
        stop_step: int,
    ):
        """Prepares; nothing is read yet.

        Args:
            source: Windows of rows.
            windows_of: Global record numbers (step · batch_size + position) to window numbers.
            positions: int64 [P] positions of the global batch that are wanted, ascending.
            batch_size: Windows in a global batch.
            mix_windows: G.
            seed: Of the order within groups.
            stop_step: Groups that begin there or later are not read ahead.
        """
        self._source = source
        self._windows_of = windows_of
        self._positions = [int(position) for position in positions]
        self._batch_size = batch_size
        self._mix_windows = mix_windows
        self._seed = seed
        self._stop_step = stop_step
        self._reads: dict[tuple[int, int], concurrent.futures.Future[Arrays]] = {}
        self._lock = threading.Lock()
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "mixed-rows")

    def read_step(self, step: int) -> Arrays:
        """Returns the rows of a step, arrays [P, L, …]. Steps may be asked for in any order.

        Raises:
            ArtifactError: A window is missing or damaged.
        """
        groups = [self._group(position, step) for position in self._positions]
        with self._lock:
            reads = [self._read(group) for group in groups]
            for group in groups:
                if group.steps.stop < self._stop_step:  # Read ahead.
                    self._read(self._group(group.position, group.steps.stop))
            self._forget(groups)
        parts = [
            self._dealt(group, read.result(), step)
            for group, read in zip(groups, reads, strict=True)
        ]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _group(self, position: int, step: int) -> _Group:
        """Returns the group of a position that a step belongs to.

        Groups of different positions begin at different steps, so that reading is spread
        evenly; the first of a position may be short.
        """
        offset = position * self._mix_windows // self._batch_size
        number = (step + offset) // self._mix_windows
        first = number * self._mix_windows - offset
        return _Group(position, number, range(max(0, first), first + self._mix_windows))

    def _read(self, group: _Group) -> "concurrent.futures.Future[Arrays]":
        key = (group.position, group.number)
        if key not in self._reads:
            self._reads[key] = self._reader.submit(self._shuffled, group)
        return self._reads[key]

    def _forget(self, groups: list[_Group]) -> None:
        """Drops what no further step asks for: all but a group, the one before and after it."""
        now = {group.position: group.number for group in groups}
        for position, number in list(self._reads):
            if number < now[position] - 1:
                del self._reads[position, number]

    def _shuffled(self, group: _Group) -> Arrays:
        """Reads the windows of a group; returns their rows, arrays [R, …], in a seeded order."""
        records = np.asarray(group.steps, np.int64) * self._batch_size + group.position
        windows = self._source.read(self._windows_of(records))
        counter = [0, 0, group.position, group.number]
        draws = np.random.Generator(np.random.Philox(key=[self._seed, 0], counter=counter))
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in windows.items()}
        order_R = draws.permutation(len(next(iter(flat.values()))))
        return {name: array[order_R] for name, array in flat.items()}

    @staticmethod
    def _dealt(group: _Group, rows: Arrays, step: int) -> Arrays:
        def share(array: np.ndarray) -> np.ndarray:
            count = len(array) // len(group.steps)
            first = (step - group.steps.start) * count
            return array[first : first + count]

        return {name: share(array) for name, array in rows.items()}
