"""From log-probabilities of labels to the numbers of the table.

Rows and labels: row n of a split predicts token n + 1. A document is a separator and its
tokens; rows whose label is a separator are not scored, and separators are counted neither
as tokens nor as words or bytes (the conventions of lm-evaluation-harness: words are
separated by white space, bytes are UTF-8). Sums are float64 and kept by document, because
documents are what the bootstrap draws.

Suffixes: N rows of a split, D documents.
"""

import dataclasses
import math

import numpy as np

from mlpmem_jax.errors import ArtifactError

# Fewer documents than this say little about the spread between documents.
FEW_DOCUMENTS = 20


@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """What the scored rows of a split are counted by.

    Attributes:
        document_N: int64, the document that holds the row's label; -1 where not scored.
        tokens_D: int64, scored tokens.
        words_D: int64, words separated by white space.
        bytes_D: int64, UTF-8 bytes.
    """

    document_N: np.ndarray
    tokens_D: np.ndarray
    words_D: np.ndarray
    bytes_D: np.ndarray

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

    @property
    def effective_documents(self) -> float:
        """Documents of equal size that are as uneven as these: (Σ tokens)² / Σ tokens²."""
        tokens_D = self.tokens_D.astype(np.float64)
        return _ratio(float(tokens_D.sum()) ** 2, float(tokens_D @ tokens_D))

    @property
    def largest_share(self) -> float:
        """Share of the scored tokens that the largest document holds."""
        return _ratio(float(self.tokens_D.max(initial=0)), float(self.tokens_D.sum()))

    @property
    def summary(self) -> dict[str, float]:
        """Counts of the split, and how evenly documents share it."""
        return self.totals | {
            "effective_documents": self.effective_documents,
            "largest_document_share": self.largest_share,
        }

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
    *,
    name: str = "split",
) -> DocumentCounts:
    """Finds which document each row's label belongs to.

    Args:
        label_N: The label of each row, token n + 1 of the split.
        separator: Id of the token that starts each document.
        offset_E: int64 [D + 1], the position of each document's separator, and T.
        words_D: Words of each document.
        bytes_D: Bytes of each document.
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
        document_N, tokens_D, np.asarray(words_D, np.int64), np.asarray(bytes_D, np.int64)
    )


def document_notes(test: DocumentCounts, valid: DocumentCounts | None = None) -> list[str]:
    """Says where too few documents, or too uneven ones, carry the numbers.

    Args:
        test: What intervals are drawn over.
        valid: What λ and τ are chosen on, where they are.
    """
    effects = {"test": (test, "intervals over so few are too narrow")}
    if valid is not None:
        effects["validation"] = (valid, "λ and τ are chosen on little")
    return [
        f"{split} has {_documents_text(counts)}: {effect}"
        for split, (counts, effect) in effects.items()
        if counts.effective_documents < FEW_DOCUMENTS
    ]


def _documents_text(counts: DocumentCounts) -> str:
    number = int(np.count_nonzero(counts.tokens_D))
    text = f"{number} document{'' if number == 1 else 's'}"
    if counts.effective_documents > 0.9 * number:
        return text
    return (
        f"{text} that count as {counts.effective_documents:.1f} of equal size (the largest holds "
        f"{100 * counts.largest_share:.0f} % of the tokens)"
    )


@dataclasses.dataclass(frozen=True)
class Metrics:
    """One system on one split.

    Attributes:
        nats_per_token: Mean negative log-probability of the scored tokens.
        token_perplexity: Its exponential.
        word_perplexity: exp(total nats / words).
        bits_per_byte: Total nats / (ln 2 · bytes).
    """

    nats_per_token: float
    token_perplexity: float
    word_perplexity: float
    bits_per_byte: float


def score(nats_D: np.ndarray, counts: DocumentCounts) -> Metrics:
    """Returns the metrics of a split.

    Args:
        nats_D: Negative log-probability of each document's scored tokens, summed.
        counts: The documents that it was summed over.
    """
    nats = float(np.sum(nats_D, dtype=np.float64))
    totals = counts.totals
    return Metrics(
        nats_per_token=_ratio(nats, totals["tokens"]),
        token_perplexity=_exp(_ratio(nats, totals["tokens"])),
        word_perplexity=_exp(_ratio(nats, totals["words"])),
        bits_per_byte=_ratio(nats, math.log(2) * totals["bytes"]),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
