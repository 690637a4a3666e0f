"""A seeded share of the training rows, the same in any process and at any start. NumPy only."""

import dataclasses

import numpy as np

from mlpmem_jax.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15
_READ_ROWS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows that have targets: drawn one by one, or by whole documents.

    Attributes:
        share: Probability of each draw.
        document_offset: First row of each document, and the end of the last, int64 [D + 1]; None:
            rows are drawn.
    """

    share: float
    seed: int
    document_offset: np.ndarray | None = None

    def holds(self, row_N: np.ndarray) -> np.ndarray:
        """Returns which rows (int64) are drawn, bool [N]."""
        number_N = row_N
        if self.document_offset is not None:
            number_N = np.searchsorted(self.document_offset, row_N, side="right")
        return _uniform(number_N, self.seed) < self.share

    def held(self, is_there_N: np.ndarray) -> int:
        """Returns how many of all rows of a split that are marked are drawn."""
        count = 0
        for start in range(0, len(is_there_N), _READ_ROWS):
            marked_N = np.flatnonzero(is_there_N[start : start + _READ_ROWS])
            count += int(np.count_nonzero(self.holds(start + marked_N)))
        return count

    def check(self, is_scored_N: np.ndarray) -> None:
        """Refuses a share that leaves no scored row.

        Raises:
            ConfigError: Names the keys.
        """
        if is_scored_N.any() and not self.held(is_scored_N):
            drawn = f"{len(is_scored_N):,} rows"
            if self.document_offset is not None:
                drawn = f"{len(self.document_offset) - 1:,} documents"
            raise ConfigError(
                f"targets.share={self.share} draws none of {drawn} of the training split: raise "
                "it" + ("" if self.document_offset is None else ", or set targets.share_by=row")
            )


def _uniform(number_N: np.ndarray, seed: int) -> np.ndarray:
    """Returns a float64 in [0, 1) for each whole number: SplitMix64, without any state."""
    mixed_N = number_N.astype(np.uint64) + np.uint64((seed + 1) * _GOLDEN % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N ^= mixed_N >> np.uint64(shift)
        mixed_N *= np.uint64(factor)
    mixed_N ^= mixed_N >> np.uint64(31)
    return (mixed_N >> np.uint64(11)) * 2.0**-53
