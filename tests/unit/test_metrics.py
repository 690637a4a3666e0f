"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.evaluation import metrics

SEPARATOR = 0
# Three documents: "0 5 6 7", "0", "0 8 9". Row n predicts token n + 1.
TOKENS = np.array([0, 5, 6, 7, 0, 0, 8, 9])
OFFSETS = np.array([0, 4, 5, 8])
LABELS = TOKENS[1:]
WORDS = np.array([2, 0, 1])
BYTES = np.array([10, 0, 6])


def _counts() -> metrics.DocumentCounts:
    return metrics.count_documents(LABELS, SEPARATOR, OFFSETS, WORDS, BYTES)


def test_labels_belong_to_the_document_that_holds_them():
    counts = _counts()
    assert counts.document_N.tolist() == [0, 0, 0, -1, -1, 2, 2]
    assert counts.tokens_D.tolist() == [3, 0, 2]
    assert counts.totals == {"documents": 3, "tokens": 5, "words": 3, "bytes": 16}


def test_scores_of_a_worked_example():
    nats_N = np.array([1.0, 2.0, 3.0, 50.0, 60.0, 0.5, 1.5])  # separators are not scored
    counts = _counts()
    nats_D = counts.sum_by_document(nats_N)
    assert nats_D.tolist() == [6.0, 0.0, 2.0]
    result = metrics.score(nats_D, counts)
    assert result.nats_per_token == pytest.approx(8 / 5)
    assert result.token_perplexity == pytest.approx(math.exp(8 / 5))
    assert result.word_perplexity == pytest.approx(math.exp(8 / 3))
    assert result.bits_per_byte == pytest.approx(8 / (16 * math.log(2)))


def test_a_separator_inside_a_document_is_not_scored():
    labels = LABELS.copy()
    labels[1] = SEPARATOR
    counts = metrics.count_documents(labels, SEPARATOR, OFFSETS, WORDS, BYTES)
    assert counts.tokens_D.tolist() == [2, 0, 2]


def test_rows_that_do_not_cover_the_documents_are_refused():
    with pytest.raises(ArtifactError, match="5 rows do not cover the documents' 8 tokens"):
        metrics.count_documents(LABELS[:5], SEPARATOR, OFFSETS, WORDS, BYTES, name="test")


def test_documents_of_other_tokens_are_refused():
    with pytest.raises(ArtifactError, match="does not begin with the separator"):
        metrics.count_documents(LABELS, 3, OFFSETS, WORDS, BYTES)


def test_no_words_and_overflow_are_not_errors():
    counts = metrics.count_documents(
        np.array([5, 6]), SEPARATOR, np.array([0, 3]), np.array([0]), np.array([4])
    )
    result = metrics.score(np.array([5000.0]), counts)
    assert math.isnan(result.word_perplexity)
    assert result.token_perplexity == math.inf
