"""Labels of a split and the documents that they lie in, with the scores stored beside them.

Suffixes: N rows of the split.
"""

import dataclasses

import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.evaluation.metrics import DocumentCounts, count_documents
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray


@dataclasses.dataclass(frozen=True)
class SplitLabels:
    """The labels of a split, and which are scored.

    Attributes:
        label_N: int32 labels.
        counts: Documents and scored rows.
    """

    label_N: np.ndarray
    counts: DocumentCounts

    @classmethod
    def open(cls, tokens: TokenSplit) -> "SplitLabels":
        """Reads the labels from the tokens.

        Raises:
            ArtifactError: The tokens are damaged, or there is nothing to score.
        """
        label_N = tokens.read(1, tokens.num_tokens)
        return cls(label_N, _scored_documents(tokens, label_N, _path(tokens)))

    def read(self, artifact: Artifact) -> np.ndarray:
        """Returns stored scores, float32 [N].

        Raises:
            ArtifactError: They are missing, damaged, or of other tokens.
        """
        label_N, logprob_N = whole_array(artifact, "label"), whole_array(artifact, "logprob")
        if len(label_N) != len(self.label_N) or np.any(label_N != self.label_N):
            raise ArtifactError(
                f"{artifact.path}: scores of other tokens than the run's, or damaged; delete it "
                "and start again"
            )
        return logprob_N


@dataclasses.dataclass(frozen=True)
class StoredSplit:
    """What `embed` stored of a split: its labels, and what the decoder gives them.

    Attributes:
        label_N: int32 labels.
        counts: Documents and scored rows.
        logprob_N: float32 log p_LM(label).
    """

    label_N: np.ndarray
    counts: DocumentCounts
    logprob_N: np.ndarray

    @classmethod
    def open(cls, tokens: TokenSplit, rows: Artifact) -> "StoredSplit":
        """Reads a split.

        Raises:
            ArtifactError: It is missing, damaged, of other tokens, or has nothing to score.
        """
        label_N = whole_array(rows, "label")
        counts = _scored_documents(tokens, label_N, f"{rows.path} and {_path(tokens)}")
        return cls(label_N, counts, whole_array(rows, "logprob"))


def whole_array(artifact: Artifact, name: str) -> np.ndarray:
    """Reads a whole array of an artifact."""
    return StoredArray(artifact, name).read_all()


def _scored_documents(tokens: TokenSplit, label_N: np.ndarray, name: str) -> DocumentCounts:
    """Returns the documents of labels, at least one of which is scored."""
    counts = count_documents(
        label_N,
        tokens.separator_id,
        tokens.document_offset,
        tokens.document_words,
        tokens.document_bytes,
        tokens.document_file,
        name=name,
    )
    if not counts.scored_N.any():
        raise ArtifactError(f"{_path(tokens)}: no token to score")
    return counts


def _path(tokens: TokenSplit) -> str:
    return str(tokens.artifact.path / tokens.split)
