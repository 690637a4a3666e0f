"""Rows of an index shard that are far from all others, which are searched exactly.

ScaNN adds up distances from tables of 8-bit entries, whose scale is that of the largest entry. In
a pretrained decoder that is the state of a window's first token (an attention sink with massive
activations): one row in a thousand, beside which all other entries round to zero. With them ScaNN
finds 0.02 of the neighbours among SmolLM2-135M's states, without them 0.95 (docs/design.md,
section 12).
"""

import functools
from collections.abc import Collection

import numpy as np
from etils import epath

from mlpmem_jax.retrieval.blocked import BlockedSearch
from mlpmem_jax.retrieval.engine import READ_ROWS, row_ranges
from mlpmem_jax.retrieval.merge import Neighbors, merge

FAR_ROW, _KEY = "far_row.npy", "far_key.npy"
_SAMPLE_ROWS = 20_000
# Distances from the median key, against the median of these: the largest is 1.14 for the decoders
# that are trained here; 2.2 for SmolLM2's other rows and 6 for those of first tokens.
_FAR = 3.0
_MOST = 0.01  # Of the rows: more are no outliers, and codes are trained on them.


def far_rows(key_ND: np.ndarray) -> np.ndarray:
    """Returns the rows that are far from all others, int64 ascending; mostly none.

    Args:
        key_ND: float32 keys of a shard.
    """
    places = np.linspace(0, len(key_ND) - 1, min(len(key_ND), _SAMPLE_ROWS)).astype(np.int64)
    sample_SD = key_ND[places]
    centre_D = np.median(sample_SD, axis=0)
    from_centre_S = np.linalg.norm(sample_SD - centre_D, axis=1)
    radius = max(_FAR * np.median(from_centre_S), np.quantile(from_centre_S, 1 - _MOST))
    far = [
        part.start + np.flatnonzero(np.linalg.norm(key_ND[part] - centre_D, axis=1) > radius)
        for part in row_ranges(len(key_ND), READ_ROWS)
    ]
    return np.concatenate(far).astype(np.int64)


def write_far_rows(folder: epath.Path, row_F: np.ndarray, key_FD: np.ndarray) -> None:
    """Writes them beside ScaNN's files, if there are any."""
    if len(row_F):
        np.save(folder / FAR_ROW, row_F, allow_pickle=False)
        np.save(folder / _KEY, key_FD, allow_pickle=False)


class FarRows:
    """The far rows of a finished shard; ScaNN numbers the others without gaps.

    Args:
        folder: Local directory of the shard.
        files: The shard's files; without those of far rows there are none.
    """

    def __init__(self, folder: epath.Path, files: Collection[str]):
        self._row_F, self._key_FD = np.empty(0, np.int64), np.empty((0, 0), np.float32)
        if FAR_ROW in files:
            self._row_F = np.load(folder / FAR_ROW, allow_pickle=False)
        if _KEY in files:  # Of a shard that is searched here.
            self._key_FD = np.load(folder / _KEY, allow_pickle=False)
        # So many of ScaNN's numbers lie before each far row.
        self._before_F = self._row_F - np.arange(len(self._row_F))

    @functools.cached_property
    def _exact(self) -> BlockedSearch:
        num_rows, width = self._key_FD.shape
        return BlockedSearch(num_rows, width, lambda start, stop: self._key_FD[start:stop])

    def rows_of(self, id_QK: np.ndarray) -> np.ndarray:
        """Returns the rows of the shard that ScaNN's numbers stand for, int64."""
        id_QK = id_QK.astype(np.int64)
        if not len(self._row_F):
            return id_QK
        return id_QK + np.searchsorted(self._before_F, id_QK, side="right")

    def with_gaps(self, leaf_N: np.ndarray) -> np.ndarray:
        """Returns what ScaNN has of each of its rows for all rows of the shard; far ones: 0."""
        return np.insert(leaf_N, self._before_F, 0) if len(self._row_F) else leaf_N

    def merged(self, found: Neighbors, query_QD: np.ndarray) -> Neighbors:
        """Returns neighbours with far rows among them where these are nearer.

        Args:
            found: Nearest rows of the shard without far ones, in order.
            query_QD: float32 queries.
        """
        if not len(self._row_F) or not len(query_QD):
            return found
        num_neighbors = found.row_QK.shape[1]
        far = self._exact.search(query_QD, min(num_neighbors, len(self._row_F)))
        place_Q = np.flatnonzero(far.distance_QK[:, 0] <= found.distance_QK[:, -1])
        far = Neighbors(far.distance_QK[place_Q], self._row_F[far.row_QK[place_Q]])
        some = Neighbors(found.distance_QK[place_Q], found.row_QK[place_Q])
        both = merge([some, far], num_neighbors)
        found.distance_QK[place_Q], found.row_QK[place_Q] = both.distance_QK, both.row_QK
        return found
