"""Rows of many windows in each batch, although whole windows are read.

A memory mixes no tokens, so neighbouring rows in a batch bring it little (docs/results.md).
Position b of a batch reads the G windows of its next G steps at once, and deals their rows out
over these steps in a seeded order. Nothing is stored twice, and a run that is not interrupted
reads nothing twice; which rows a batch holds is a function of seed and step alone, and a process
reads only its own positions.

Suffixes: P positions that begin their groups together, R rows of a group of one position, G · L.
"""

import concurrent.futures
import dataclasses
import threading
import weakref

import numpy as np

from mlpmem_jax.input.windows import WindowsOf, WindowSource

Arrays = dict[str, np.ndarray]

_READERS = 2  # One group is waited for while the next is read ahead.


@dataclasses.dataclass(frozen=True)
class _Group:
    """Consecutive steps over which some positions deal out the rows of their windows.

    Attributes:
        positions_P: Positions in the global batch.
        number: Of the group, from 0; with the position it decides the order of rows.
        steps: The steps.
    """

    positions_P: np.ndarray
    number: int
    steps: range


class MixedRows:
    """Batches of rows that are dealt out of groups of windows."""

    def __init__(
        self,
        source: WindowSource,
        windows_of: WindowsOf,
        positions: np.ndarray,
        batch_size: int,
        *,
        mix_windows: int,
        seed: int,
        steps: range,
    ):
        """Prepares; nothing is read yet.

        Args:
            source: Windows of rows.
            windows_of: Global record numbers (step · batch_size + position) to window numbers.
            positions: int64 [.] positions of the global batch that are wanted, ascending.
            batch_size: Windows in a global batch.
            mix_windows: G.
            seed: Of the order within groups.
            steps: Steps that will be asked for, each once, in any order.
        """
        # Groups begin at different steps, so that reading is spread evenly; the first may be short.
        offset = positions * mix_windows // batch_size
        self._positions = {int(o): positions[offset == o] for o in np.unique(offset)}
        self._load = _Loader(source, windows_of, batch_size, seed)
        self._mix_windows = mix_windows
        self._steps = steps
        self._lock = threading.Lock()
        self._reads: dict[tuple[int, int], concurrent.futures.Future[Arrays]] = {}
        self._left: dict[tuple[int, int], int] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(_READERS, "mixed-rows")
        weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)

    def read_step(self, step: int) -> Arrays:
        """Returns the rows of a step, arrays [positions, L, …].

        Raises:
            ArtifactError: A window is missing or damaged.
        """
        groups = {offset: self._group(offset, step) for offset in self._positions}
        with self._lock:
            reads = {offset: self._begun(offset, group) for offset, group in groups.items()}
            for offset, group in groups.items():
                if group.steps.stop < self._steps.stop:  # Read ahead.
                    self._begun(offset, self._group(offset, group.steps.stop))
        # Offsets ascend with the positions, so that parts are in the order of these.
        parts = [_dealt(reads[offset].result(), groups[offset], step) for offset in groups]
        with self._lock:
            for offset, group in groups.items():
                self._served(offset, group)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _group(self, offset: int, step: int) -> _Group:
        number = (step + offset) // self._mix_windows
        first = number * self._mix_windows - offset
        steps = range(max(0, first), first + self._mix_windows)
        return _Group(self._positions[offset], number, steps)

    def _begun(self, offset: int, group: _Group) -> "concurrent.futures.Future[Arrays]":
        """Returns the reading of a group, and begins it where that has not happened yet."""
        key = (offset, group.number)
        if key not in self._reads:
            first = max(group.steps.start, self._steps.start)
            self._left[key] = min(group.steps.stop, self._steps.stop) - first
            self._reads[key] = self._executor.submit(self._load, group)
        return self._reads[key]

    def _served(self, offset: int, group: _Group) -> None:
        """Counts a step of a group; drops the group with its last one."""
        key = (offset, group.number)
        self._left[key] -= 1
        if self._left[key] <= 0:
            del self._reads[key], self._left[key]


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads groups. It knows nothing of `MixedRows`, which can go while groups are queued."""

    source: WindowSource
    windows_of: WindowsOf
    batch_size: int
    seed: int

    def __call__(self, group: _Group) -> Arrays:
        """Returns the rows of a group, arrays [P, R, …], those of each position shuffled."""
        num_positions, num_steps = len(group.positions_P), len(group.steps)
        step_P1 = np.asarray(group.steps, np.int64) * self.batch_size
        records = (group.positions_P[:, None] + step_P1).reshape(-1)
        windows = self.source.read(self.windows_of(records))
        num_rows = next(iter(windows.values())).shape[1] * num_steps
        order_PR = np.stack(
            [self._order(int(p), group.number, num_rows) for p in group.positions_P]
        )
        row_PR = order_PR + np.arange(num_positions)[:, None] * num_rows
        return {
            name: array.reshape(-1, *array.shape[2:])[row_PR] for name, array in windows.items()
        }

    def _order(self, position: int, number: int, num_rows: int) -> np.ndarray:
        counter = [0, 0, position, number]
        draws = np.random.Generator(np.random.Philox(key=[self.seed, 0], counter=counter))
        return draws.permutation(num_rows)


def _dealt(rows: Arrays, group: _Group, step: int) -> Arrays:
    """Returns what of a group's rows belongs to a step, arrays [P, L, …]."""
    length = next(iter(rows.values())).shape[1] // len(group.steps)
    first = (step - group.steps.start) * length
    return {name: array[:, first : first + length] for name, array in rows.items()}
