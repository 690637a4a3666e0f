"""What `embed` stored of a split, and its documents.

Suffixes: N rows of the split.
"""

import dataclasses

import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.datastore.layout import Layout, Split
from mlpmem_jax.datastore.store import open_array, read_rows
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.evaluation.metrics import DocumentCounts, count_documents


@dataclasses.dataclass(frozen=True)
class StoredSplit:
    """Labels of a split, what the decoder gives them, and which are scored.

    Attributes:
        label_N: int32 labels.
        logprob_N: float32 log p_LM(label).
        counts: Documents and scored rows.
    """

    label_N: np.ndarray
    logprob_N: np.ndarray
    counts: DocumentCounts

    @classmethod
    def open(cls, layout: Layout, split: Split) -> "StoredSplit":
        """Reads a split.

        Raises:
            ArtifactError: It is missing, damaged, of other tokens, or has nothing to score.
        """
        tokens = TokenSplit.open(layout.tokens, split)
        label_N = whole_array(layout, split, "label")
        name = f"{layout.datastore(split).path} and {layout.tokens.path / split}"
        counts = count_documents(
            label_N,
            tokens.separator_id,
            tokens.document_offset,
            tokens.document_words,
            tokens.document_bytes,
            name=name,
        )
        if not counts.scored_N.any():
            raise ArtifactError(f"{layout.tokens.path / split}: no token to score")
        return cls(label_N, whole_array(layout, split, "logprob"), counts)


def whole_array(layout: Layout, split: Split, name: str) -> np.ndarray:
    """Reads a whole array of a datastore split."""
    store = open_array(layout.datastore(split).path / name)
    return read_rows(store, 0, store.shape[0])
