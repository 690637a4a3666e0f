"""Windows that training reads, and the order in which it reads them."""

from collections.abc import Callable
from typing import Protocol

import grain
import numpy as np

WindowsOf = Callable[[np.ndarray], np.ndarray]
_MILLION = 10**6


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


def in_turn(source: WindowSource) -> WindowsOf:
    """Returns a function from global record numbers to the windows of a source, in its order."""
    return lambda records: records % source.num_windows


def window_order(num_windows: int, seed: int) -> WindowsOf:
    """Returns a function from global record numbers to window numbers.

    Each run of `num_windows` records is one epoch: a permutation of its own.
    """
    order = grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat(None)

    def windows_of(records: np.ndarray) -> np.ndarray:
        return np.asarray([order[int(record)] for record in records], np.int64)

    return windows_of


def replayed_order(is_new_W: np.ndarray, share: float, seed: int) -> WindowsOf:
    """Returns a function from global record numbers to windows, of two sorts that alternate.

    Old windows are as evenly spread among the records as their share allows; each sort has epochs
    of its own, as those of `window_order`.

    Args:
        is_new_W: Whether a window holds new rows; at least one does.
        share: Of the records, the part that old windows take, to a millionth; where all windows
            are new, they take none.
        seed: Of both orders.
    """
    new, old = np.flatnonzero(is_new_W), np.flatnonzero(~is_new_W)
    of_new, of_old = (window_order(max(1, len(one)), seed) for one in (new, old))
    millionths = round(share * _MILLION) if len(old) else 0

    def windows_of(records: np.ndarray) -> np.ndarray:
        before = records * millionths // _MILLION  # Old windows among earlier records.
        is_old = (records + 1) * millionths // _MILLION > before
        windows = np.empty(len(records), np.int64)
        windows[is_old] = old[of_old(before[is_old])]
        windows[~is_old] = new[of_new((records - before)[~is_old])]
        return windows

    return windows_of
