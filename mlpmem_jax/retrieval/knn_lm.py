"""The explicit kNN-LM over a split: what the neighbours of its rows say of their labels.

Suffixes: N rows of a split, Q some of them, K neighbours.
"""

import abc
from collections.abc import Iterator

import numpy as np
from etils import epath

from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.retrieval import temperature as temperatures
from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.engine import row_ranges
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

_NO_LABEL = -1  # of a neighbour that is missing
_READ_ROWS = 1 << 14
# Rows, int64 ascending; distances of their neighbours [Q, K]; labels of these [Q, K].
Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def read_labels(rows: Artifact) -> np.ndarray:
    """Returns the int32 labels of the rows of a datastore."""
    return StoredArray(rows, "label").read_all()


class KnnLm(abc.ABC):
    """The kNN distribution of a split's rows over all K neighbours, and its temperature.

    Args:
        path: Where the rows or their neighbours lie, for messages.
        label_N: Labels of the split's rows.
        train_label: Labels of the training rows, which are what is found.
    """

    def __init__(self, path: epath.Path, label_N: np.ndarray, train_label: np.ndarray):
        self._path = path
        self.label_N = label_N
        self._train_label = train_label

    @abc.abstractmethod
    def parts(self, row_N: np.ndarray) -> Iterator[Part]:
        """Yields the neighbours of rows (ascending), some rows at a time."""

    def _labels(self, row_QK: np.ndarray) -> np.ndarray:
        return np.where(row_QK >= 0, self._train_label[row_QK], _NO_LABEL)

    def evidence(self, row_N: np.ndarray) -> LabelEvidence:
        """Returns what the neighbours of rows say of their labels."""
        _, distances, labels = zip(*self.parts(row_N), strict=True)
        return LabelEvidence(np.concatenate(distances), np.concatenate(labels), self.label_N[row_N])

    def logprob(self, scored_N: np.ndarray, temperature: float) -> np.ndarray:
        """Returns float64 [N] log p_kNN(label); -inf where no neighbour has it, or not scored."""
        logprob_N = np.full(len(self.label_N), -np.inf)
        for row_Q, distance_QK, label_QK in self.parts(np.flatnonzero(scored_N)):
            evidence = LabelEvidence(distance_QK, label_QK, self.label_N[row_Q])
            logprob_N[row_Q] = evidence.logprob(temperature)
        return logprob_N

    def tune(
        self,
        scored_N: np.ndarray,
        decoder_N: np.ndarray,
        most_rows: int | None,
        seed: int,
        temperature: float | None = None,
    ) -> Tuned:
        """Chooses τ and λ on this split; logs where τ or λ ends at a bound.

        Args:
            scored_N: Rows that are scored, bool.
            decoder_N: log p_LM(label).
            most_rows: Use so many scored rows, drawn at random; None: all.
            temperature: τ, where it is given; λ alone is chosen then.

        Raises:
            ArtifactError: No row is scored.
        """
        row_N = tuning_rows(scored_N, most_rows, seed)
        if not len(row_N):
            raise ArtifactError(f"{self._path}: no row to choose τ and λ on")
        evidence, decoder_n = self.evidence(row_N), decoder_N[row_N]
        if temperature is None:
            tuned = temperatures.tune(evidence, decoder_n)
        else:
            tuned = temperatures.fixed(evidence, decoder_n, temperature)
        for note in tuned.notes:
            say(note)
        return tuned


class StoredKnn(KnnLm):
    """The kNN-LM of stored neighbours.

    Args:
        label_N: Labels of the rows whose neighbours they are.
        train_label: Labels of the training rows.

    Raises:
        ArtifactError: Neighbours are missing, damaged, or of another number of rows.
    """

    def __init__(self, artifact: Artifact, label_N: np.ndarray, train_label: np.ndarray):
        super().__init__(artifact.path, label_N, train_label)
        self._neighbors = StoredNeighbors(artifact)
        found = self._neighbors.num_rows
        if found != len(label_N):
            raise ArtifactError(
                f"{artifact.path}: neighbours of {found} rows, and the split has {len(label_N)}"
            )

    def parts(self, row_N: np.ndarray) -> Iterator[Part]:
        """Yields the neighbours of rows (ascending), as they are read."""
        for read in row_ranges(len(self.label_N), _READ_ROWS):
            row_Q = row_N[slice(*np.searchsorted(row_N, (read.start, read.stop)))]
            if len(row_Q):
                found = self._neighbors.read(read.start, read.stop)
                inside = row_Q - read.start
                yield row_Q, found.distance_QK[inside], self._labels(found.row_QK[inside])


def tuning_rows(scored_N: np.ndarray, most_rows: int | None, seed: int) -> np.ndarray:
    """Returns the rows on which the kNN-LM is tuned, int64 ascending; a sample is logged.

    Args:
        scored_N: Rows that are scored, bool.
        most_rows: Rows to draw at random where there are more, since what is tuned on holds K
            neighbours of each in memory; None: all.
    """
    row_N = draw_rows(scored_N, most_rows, seed)
    num_scored = int(np.count_nonzero(scored_N))
    if len(row_N) < num_scored:
        say(
            f"note: the kNN-LM is tuned on {len(row_N):,} of {num_scored:,} validation rows, drawn "
            "at random"
        )
    return row_N


def draw_rows(scored_N: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Returns scored rows, ascending: `count` of them drawn without repetition, or all."""
    scored = np.flatnonzero(scored_N).astype(np.int64)
    if count is None or count >= len(scored):
        return scored
    return np.sort(np.random.default_rng(seed).choice(scored, count, replace=False))
