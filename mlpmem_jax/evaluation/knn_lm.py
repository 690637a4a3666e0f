"""The explicit kNN-LM: log p_kNN of labels over all K neighbours, and its temperature.

Suffixes: N rows of a split, K neighbours.
"""

from collections.abc import Iterator

import numpy as np

from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.evaluation.metrics import draw_rows
from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.retrieval.temperature import Tuned, tune
from mlpmem_jax.store.layout import Layout, Split
from mlpmem_jax.store.manifest import Artifact

_NO_LABEL = -1  # of a neighbour that is missing


class LabelledNeighbors:
    """The stored neighbours of a split's rows, with the neighbours' labels.

    Attributes:
        path: Where they lie.
    """

    def __init__(
        self,
        layout: Layout,
        split: Split,
        label_N: np.ndarray,
        train_label: np.ndarray,
        artifact: Artifact | None = None,
    ):
        """Opens the arrays.

        Args:
            layout: Where they are.
            split: valid or test.
            label_N: Labels of the split's rows.
            train_label: Labels of the training rows, which are what is found.
            artifact: Which neighbours; none: the exact ones.

        Raises:
            ArtifactError: Neighbours are missing, damaged, or of another number of rows.
        """
        artifact = artifact or layout.neighbors(split)
        self.path = artifact.path
        self._neighbors = StoredNeighbors(artifact)
        self._label_N = label_N
        self._train_label = train_label
        self._step = layout.neighbors_arrays()["row"].shard_rows
        found = self._neighbors.num_rows
        if found != len(label_N):
            raise ArtifactError(
                f"{artifact.path}: neighbours of {found} rows, and the split has {len(label_N)}"
            )

    def _parts(self, chosen_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields numbers of chosen rows, their distances and their neighbours' labels."""
        for start in range(0, len(self._label_N), self._step):
            stop = min(start + self._step, len(self._label_N))
            inside = np.flatnonzero(chosen_N[start:stop])
            if not len(inside):
                continue
            read = self._neighbors.read(start, stop)
            row_NK = read.row_QK[inside]
            label_NK = np.where(row_NK >= 0, self._train_label[row_NK], _NO_LABEL)
            yield start + inside, read.distance_QK[inside], label_NK

    def evidence(self, chosen_N: np.ndarray) -> LabelEvidence:
        """Returns what the neighbours of chosen rows (bool [N]) say of their labels."""
        rows, distances, labels = zip(*self._parts(chosen_N), strict=True)
        return LabelEvidence(
            np.concatenate(distances), np.concatenate(labels), self._label_N[np.concatenate(rows)]
        )

    def logprob(self, chosen_N: np.ndarray, temperature: float) -> np.ndarray:
        """Returns float64 [N] log p_kNN(label); -inf where no neighbour has it, or not chosen."""
        logprob_N = np.full(len(self._label_N), -np.inf)
        for rows, distance, label in self._parts(chosen_N):
            evidence = LabelEvidence(distance, label, self._label_N[rows])
            logprob_N[rows] = evidence.logprob(temperature)
        return logprob_N


def tune_knn_lm(
    neighbors: LabelledNeighbors,
    scored_N: np.ndarray,
    decoder_N: np.ndarray,
    most_rows: int | None,
    seed: int,
) -> Tuned:
    """Chooses τ (and λ with it) on validation.

    Args:
        neighbors: Of the validation split.
        scored_N: Rows that are scored, bool.
        decoder_N: log p_LM(label).
        most_rows: Use so many scored rows, drawn at random; None: all.
        seed: Seed of that draw.

    Raises:
        ArtifactError: No row is scored.
    """
    if not scored_N.any():
        raise ArtifactError(f"{neighbors.path}: no row to choose τ and λ on")
    chosen_N = np.zeros_like(scored_N)
    chosen_N[tuning_rows(scored_N, most_rows, seed)] = True
    return tune(neighbors.evidence(chosen_N), decoder_N[chosen_N])


def tuning_rows(scored_N: np.ndarray, most_rows: int | None, seed: int) -> np.ndarray:
    """Returns the rows on which the kNN-LM is tuned, int64 ascending; a sample is logged.

    Args:
        scored_N: Rows that are scored, bool.
        most_rows: Rows to draw at random where there are more, since what is tuned on holds K
            neighbours of each in memory; None: all.
        seed: Seed of the draw.
    """
    row_N = draw_rows(scored_N, most_rows, seed)
    num_scored = int(np.count_nonzero(scored_N))
    if len(row_N) < num_scored:
        say(
            f"note: the kNN-LM is tuned on {len(row_N):,} of {num_scored:,} validation rows, drawn "
            "at random (evaluate.knn_valid_rows)"
        )
    return row_N
