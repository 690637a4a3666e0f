"""What the kept neighbours of a split say of its labels: the explicit kNN-LM's half."""

import numpy as np

from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.engine import row_ranges
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.store.layout import Layout, Split
from mlpmem_jax.store.stored_array import StoredArray

_READ_ROWS = 1 << 14


def read_labels(layout: Layout, split: Split) -> np.ndarray:
    """Returns the int32 labels of a split."""
    return StoredArray(layout.datastore(split), "label").read_all()


def label_evidence(
    layout: Layout, split: Split, separator_id: int, max_rows: int | None = None
) -> tuple[LabelEvidence, np.ndarray]:
    """Reads what the kept neighbours say of the labels of a split.

    Args:
        layout: The run.
        split: "valid" or "test".
        separator_id: Rows with this label are never scored.
        max_rows: Whole storage shards, evenly spread, with about so many rows; none: all.

    Returns:
        Evidence of the scored rows, and their int64 row numbers.
    """
    stored = StoredNeighbors(layout.neighbors(split))
    train_label_N, label_N = read_labels(layout, "train"), read_labels(layout, split)
    pieces = list(row_ranges(stored.num_rows, _READ_ROWS))
    if max_rows is not None and stored.num_rows > max_rows:
        kept = np.linspace(0, len(pieces) - 1, max(1, max_rows // _READ_ROWS), dtype=np.int64)
        pieces = [pieces[n] for n in np.unique(kept)]
    rows, distances, labels = [], [], []
    for part in pieces:
        row_M = np.flatnonzero(label_N[part] != separator_id)
        found = stored.read(part.start, part.stop)
        rows.append(row_M + part.start)
        distances.append(found.distance_QK[row_M])
        labels.append(train_label_N[np.maximum(found.row_QK[row_M], 0)])
    row_N = np.concatenate(rows)
    evidence = LabelEvidence(np.concatenate(distances), np.concatenate(labels), label_N[row_N])
    return evidence, row_N
