"""The kNN-LM with the neighbours that an engine finds, on validation and test.

The stored neighbours of these splits are exact in every run; here the engine of a setting
searches for them again.

Suffixes: N rows of a split, Q rows of a batch, K neighbours.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mlpmem_jax.evaluation.knn_lm import tuning_rows
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.engine import Engine, StoredKeys
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.temperature import Tuned, tune
from mlpmem_jax.store.layout import Layout, Split


@dataclasses.dataclass(frozen=True)
class SearchedKnn:
    """Searches the rows of a split as they are needed; keeps no neighbours.

    Attributes:
        engine: What searches.
        layout: The run.
        train_label: Label of each training row.
        num_neighbors: K.
        query_batch: Rows searched at once.
    """

    engine: Engine
    layout: Layout
    train_label: np.ndarray
    num_neighbors: int
    query_batch: int

    def _evidence(
        self, split: Split, row_N: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Neighbors, np.ndarray]]:
        """Yields rows, their neighbours and the neighbours' labels."""
        keys = StoredKeys(self.layout.datastore(split))
        for start in range(0, keys.num_rows, self.query_batch):
            stop = min(start + self.query_batch, keys.num_rows)
            first, last = np.searchsorted(row_N, (start, stop))
            row_Q = row_N[first:last]
            if len(row_Q):
                query_QD = keys.read(start, stop)[row_Q - start]
                found = self.engine.search(query_QD, self.num_neighbors)
                yield row_Q, found, self.train_label[np.maximum(found.row_QK, 0)]

    def tune(self, stored: StoredSplit, most_rows: int | None, seed: int) -> Tuned:
        """Chooses τ and λ on validation, as `evaluate` does."""
        row_N = tuning_rows(stored.counts.scored_N, most_rows, seed)
        parts = list(self._evidence("valid", row_N))
        evidence = LabelEvidence(
            np.concatenate([found.distance_QK for _, found, _ in parts]),
            np.concatenate([label_QK for _, _, label_QK in parts]),
            stored.label_N[row_N],
        )
        return tune(evidence, stored.logprob_N[row_N])

    def logprob(self, split: Split, stored: StoredSplit, temperature: float) -> np.ndarray:
        """Returns float64 [N] log p_kNN(label); -inf where none has it, or not scored."""
        logprob_N = np.full(len(stored.label_N), -np.inf)
        row_N = np.flatnonzero(stored.counts.scored_N)
        for row_Q, found, label_QK in self._evidence(split, row_N):
            evidence = LabelEvidence(found.distance_QK, label_QK, stored.label_N[row_Q])
            logprob_N[row_Q] = evidence.logprob(temperature)
        return logprob_N
