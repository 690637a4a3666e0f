"""Windows that training reads, and the order in which it reads them."""

from collections.abc import Callable
from typing import Protocol

import grain
import numpy as np


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
