"""The kNN-LM with the neighbours that an engine finds, on validation and test.

The stored neighbours of these splits are exact in every run; here the engine of a setting
searches for them again.

Suffixes: N rows of a split, Q rows of a batch.
"""

from collections.abc import Iterator

import numpy as np

from mlpmem_jax.retrieval.engine import Engine, StoredKeys, row_ranges
from mlpmem_jax.retrieval.knn_lm import KnnLm, Part
from mlpmem_jax.store.manifest import Artifact


class SearchedKnn(KnnLm):
    """Searches the rows of a split as they are needed; keeps no neighbours.

    Args:
        num_neighbors: K.
    """

    def __init__(
        self,
        engine: Engine,
        datastore: Artifact,
        label_N: np.ndarray,
        train_label: np.ndarray,
        num_neighbors: int,
        query_batch: int,
    ):
        super().__init__(datastore.path, label_N, train_label)
        self._engine = engine
        self._datastore = datastore
        self._num_neighbors = num_neighbors
        self._query_batch = query_batch

    def parts(self, row_N: np.ndarray) -> Iterator[Part]:
        """Yields the neighbours of rows (ascending), as they are found."""
        keys = StoredKeys(self._datastore)
        for read in row_ranges(keys.num_rows, self._query_batch):
            row_Q = row_N[slice(*np.searchsorted(row_N, (read.start, read.stop)))]
            if len(row_Q):
                query_QD = keys.read(read.start, read.stop)[row_Q - read.start]
                found = self._engine.search(query_QD, self._num_neighbors)
                yield row_Q, found.distance_QK, self._labels(found.row_QK)
