"""From log-probabilities of labels to the numbers of the table.

Rows and labels: row n of a split predicts token n + 1. A document is a separator and its
tokens; rows whose label is a separator are not scored, and separators are counted neither
as tokens nor as words or bytes (the conventions of lm-evaluation-harness: words are
separated by white space, bytes are UTF-8). Sums are float64 and kept by document; the bootstrap
draws clusters, which are the files or records that documents were cut from.

Suffixes: N rows of a split, D documents, C clusters.
"""

import dataclasses
import functools
import math

import numpy as np

from mlpmem_jax.errors import ArtifactError

# An effective sample size below this says little about the spread between clusters.
FEW_CLUSTERS = 20
# What tables show beside nats.
QUALITY = ("token_perplexity", "word_perplexity", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """What the scored rows of a split are counted by.

    Attributes:
        document_N: int64, the document that holds the row's label; -1 where not scored.
        tokens_D: int64, scored tokens.
        words_D: int64, words separated by white space.
        bytes_D: int64, UTF-8 bytes.
        file_D: int64, the file or record that each document was cut from; None: each document
            is one.
    """

    document_N: np.ndarray
    tokens_D: np.ndarray
    words_D: np.ndarray
    bytes_D: np.ndarray
    file_D: np.ndarray | None = None

    @property
    def scored_N(self) -> np.ndarray:
        """Rows whose label is scored, bool."""
        return self.document_N >= 0

    @property
    def totals(self) -> dict[str, int]:
        """Counts of the whole split."""
        return {
            "documents": len(self.tokens_D),
            "tokens": int(self.tokens_D.sum()),
            "words": int(self.words_D.sum()),
            "bytes": int(self.bytes_D.sum()),
        }

    @functools.cached_property
    def cluster_D(self) -> np.ndarray:
        """Cluster of each document, int64 from 0; -1 where it has no scored token."""
        file_D = np.arange(len(self.tokens_D)) if self.file_D is None else self.file_D
        cluster_D = np.full(len(file_D), -1, np.int64)
        used_D = self.tokens_D > 0
        cluster_D[used_D] = np.unique(file_D[used_D], return_inverse=True)[1]
        return cluster_D

    @property
    def num_clusters(self) -> int:
        """Clusters with scored tokens; of fewer than two there are no intervals."""
        return int(self.cluster_D.max(initial=-1)) + 1

    @property
    def tokens_C(self) -> np.ndarray:
        """Scored tokens of each cluster, float64."""
        return self.by_cluster(self.tokens_D)

    @property
    def effective_sample_size(self) -> float:
        """Clusters of equal size that are as uneven as these: (Σ tokens)² / Σ tokens²."""
        tokens_C = self.tokens_C
        return _ratio(float(tokens_C.sum()) ** 2, float(tokens_C @ tokens_C))

    @property
    def largest_share(self) -> float:
        """Share of the scored tokens that the largest cluster holds."""
        return _ratio(float(self.tokens_C.max(initial=0)), float(self.tokens_C.sum()))

    @property
    def summary(self) -> dict[str, float]:
        """Counts of the split, and how evenly clusters share it."""
        return self.totals | {
            "files": len(self.tokens_D) if self.file_D is None else len(np.unique(self.file_D)),
            "effective_sample_size": self.effective_sample_size,
            "largest_cluster_share": self.largest_share,
        }

    @property
    def scored_cluster_N(self) -> np.ndarray:
        """Cluster of each scored row, int64."""
        return self.cluster_D[self.document_N[self.scored_N]]

    def by_cluster(self, values_D: np.ndarray) -> np.ndarray:
        """Sums values of documents, [D] or [D, M], over clusters: float64 [C] or [C, M]."""
        used_D = self.cluster_D >= 0
        sums = np.zeros((self.num_clusters, *values_D.shape[1:]))
        np.add.at(sums, self.cluster_D[used_D], values_D[used_D].astype(np.float64))
        return sums

    def sum_by_document(self, values_N: np.ndarray) -> np.ndarray:
        """Sums a value of each scored row by document, float64 [D]."""
        scored_N = self.scored_N
        return np.bincount(
            self.document_N[scored_N],
            weights=values_N[scored_N].astype(np.float64),
            minlength=len(self.tokens_D),
        )


def count_documents(
    label_N: np.ndarray,
    separator: int,
    offset_E: np.ndarray,
    words_D: np.ndarray,
    bytes_D: np.ndarray,
    file_D: np.ndarray | None = None,
    *,
    name: str = "split",
) -> DocumentCounts:
    """Finds which document each row's label belongs to.

    Args:
        label_N: The label of each row, token n + 1 of the split.
        separator: Id of the token that starts each document.
        offset_E: int64 [D + 1], the position of each document's separator, and T.
        file_D: File or record of each document; None: each is one.
        name: What to call the split in an error.

    Raises:
        ArtifactError: if rows and documents do not describe the same tokens: a row is
            missing, or a document does not begin with the separator.
    """
    num_rows = len(label_N)
    if int(offset_E[-1]) != num_rows + 1:
        raise ArtifactError(
            f"{name}: {num_rows} rows do not cover the documents' {int(offset_E[-1])} tokens "
            f"({int(offset_E[-1]) - 1} rows expected)"
        )
    starts = np.asarray(offset_E[1:-1], np.int64)
    if np.any(label_N[starts - 1] != separator):
        raise ArtifactError(
            f"{name}: a document does not begin with the separator (id {separator}): rows and "
            "documents come from different tokens"
        )
    position_N = np.arange(1, num_rows + 1, dtype=np.int64)
    document_N = np.searchsorted(offset_E, position_N, side="right") - 1
    document_N = np.where(label_N == separator, -1, document_N)
    tokens_D = np.bincount(document_N[document_N >= 0], minlength=len(words_D))
    return DocumentCounts(
        document_N,
        tokens_D,
        np.asarray(words_D, np.int64),
        np.asarray(bytes_D, np.int64),
        None if file_D is None else np.asarray(file_D, np.int64),
    )


def document_notes(test: DocumentCounts, valid: DocumentCounts | None = None) -> list[str]:
    """Returns warnings where too few clusters, or too uneven ones, carry the numbers.

    Args:
        test: What intervals are drawn over.
        valid: What λ and τ are chosen on, where they are.
    """
    notes = []
    few = test.effective_sample_size < FEW_CLUSTERS
    if test.num_clusters < 2:
        notes.append(f"warning: the test split has {documents_text(test)}: there are no intervals")
    elif few and test.effective_sample_size > 0.9 * test.num_clusters:
        notes.append(
            f"warning: the test split has only {documents_text(test)}; the intervals are optimistic"
        )
    elif few:
        notes.append(
            f"warning: the test split has {documents_text(test)} but an effective sample size of "
            f"{test.effective_sample_size:.1f} (the largest{_file_text(test)} holds "
            f"{100 * test.largest_share:.0f} % of its tokens); the intervals are optimistic"
        )
    if valid is not None and valid.effective_sample_size < FEW_CLUSTERS:
        notes.append(
            f"warning: the effective sample size of validation is "
            f"{valid.effective_sample_size:.1f}; λ and τ are poorly determined"
        )
    if valid is not None and valid.num_clusters < 2 <= test.num_clusters:
        notes.append(
            f"warning: validation has {documents_text(valid)}: λ is held fixed in the intervals"
        )
    return notes


def choice_notes(valid: DocumentCounts) -> list[str]:
    """Returns what intervals include, where clusters of validation are drawn too."""
    if valid.num_clusters < 2:
        return []
    return ["intervals include the choice of λ on validation; τ is held fixed"]


FITTED_GATE_NOTE = (
    "a gate fitted to validation is held fixed in the intervals; its validation nats are of the "
    "rows that it was fitted to"
)


def documents_text(counts: DocumentCounts) -> str:
    """Returns how many documents have scored tokens, and of how many files if it is fewer."""
    number = int(np.count_nonzero(counts.tokens_D))
    text = _counted(number, "document")
    if counts.num_clusters == number:
        return text
    return f"{text} from {_counted(counts.num_clusters, 'file')}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _file_text(counts: DocumentCounts) -> str:
    """Returns what a cluster is called where documents share files."""
    return " file" if counts.num_clusters < np.count_nonzero(counts.tokens_D) else ""


def score(nats_D: np.ndarray, counts: DocumentCounts) -> dict[str, float]:
    """Returns perplexities and bits per byte (`QUALITY`) of a split.

    Args:
        nats_D: Negative log-probability of each document's scored tokens, summed.
        counts: The documents that it was summed over.
    """
    nats = float(np.sum(nats_D, dtype=np.float64))
    totals = counts.totals
    return {
        "token_perplexity": _exp(_ratio(nats, totals["tokens"])),
        "word_perplexity": _exp(_ratio(nats, totals["words"])),
        "bits_per_byte": _ratio(nats, math.log(2) * totals["bytes"]),
    }


def finite(value: float) -> float | None:
    """Returns a number as JSON may hold it; None: it is infinite or not defined."""
    return value if np.isfinite(value) else None


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
