"""The n-gram teacher against a loop over all pairs of tokens, on small text."""

import tracemalloc

import numpy as np
import pytest

from mlpmem_jax.retrieval import contexts, ngram_targets
from mlpmem_jax.retrieval.contexts import Contexts
from mlpmem_jax.retrieval.ngram_targets import Following

SEPARATOR, VOCAB = 0, 6


def _stream(seed=0, num_documents=25, repeated=3):
    """Documents of few words, some of them copies; the token ids and the first of each."""
    generator = np.random.default_rng(seed)
    documents = [
        generator.integers(1, VOCAB, generator.integers(0, 30)) for _ in range(num_documents)
    ]
    documents += documents[:repeated]  # Whole documents may occur twice.
    documents.append(np.concatenate([documents[3], documents[4], [2] * 12]))
    documents.append(np.full(20, 3))
    streams = [np.concatenate([[SEPARATOR], document]) for document in documents]
    offset = np.concatenate([[0], np.cumsum([len(one) for one in streams])])
    return np.concatenate(streams).astype(np.int32), offset


def _common(token, starts, n, m):
    """Last tokens that the contexts of n and m have in common, by comparing them."""
    count = 0
    while (
        n - count >= starts[n] and m - count >= starts[m] and token[n - count] == token[m - count]
    ):
        count += 1
    return count


def _reference(token, offset, occurrences, n, min_count):
    """Counts of what follows the longest end of n's context that occurs often enough elsewhere."""
    starts = np.repeat(offset[:-1], np.diff(offset))
    shared = {m: _common(token, starts, n, m) for m in occurrences if m != n}
    enough = sorted(shared.values(), reverse=True)
    counts = np.zeros(VOCAB, int)
    if len(enough) >= min_count:
        for m, common in shared.items():
            counts[token[m + 1]] += common >= enough[min_count - 1]
    return counts


def _check(made, expected, num_tokens):
    for n, counts in enumerate(expected):
        order = [y for y in np.lexsort((np.arange(VOCAB), -counts)) if counts[y]][:num_tokens]
        used = made.prob_QS[n] > 0
        assert made.id_QS[n, used].tolist() == order
        share = counts[order] / max(1, counts.sum())
        np.testing.assert_allclose(made.prob_QS[n, used], share, rtol=1e-6)
        np.testing.assert_allclose(made.mass_Q[n], share.sum(), rtol=1e-6)
        assert not made.id_QS[n, ~used].any()


@pytest.mark.parametrize("min_count", [1, 2, 5, 40])
@pytest.mark.parametrize("num_tokens", [2, 10])
def test_training_rows_against_a_loop(min_count, num_tokens):
    token, offset = _stream()
    rows = np.arange(len(token) - 1)
    found = Contexts(token, offset, len(rows))
    first, stop = found.longest(rows, min_count)
    following = Following(token[1:][found.order_E], num_tokens)
    made = following.distributions(first, stop, token[rows + 1])
    expected = [_reference(token, offset, rows, n, min_count) for n in rows]
    _check(made, expected, num_tokens)
    # The own occurrence is among those that are found, and not among those that count.
    assert (stop - first - 1 == [counts.sum() for counts in expected]).all()


@pytest.mark.parametrize("min_count", [1, 3])
def test_rows_of_another_split_against_a_loop(min_count):
    """They occur nowhere themselves; their contexts are looked up in the training tokens."""
    train, train_offset = _stream(1)
    other, other_offset = _stream(2, num_documents=8, repeated=1)
    token = np.concatenate([train, other])
    offset = np.concatenate([train_offset[:-1], other_offset + len(train)])
    occurrences = np.arange(len(train) - 1)
    found = Contexts(token, offset, len(occurrences))
    rows = len(train) + np.arange(len(other) - 1)
    made = Following(train[1:][found.order_E], 3).distributions(
        *found.longest(rows, min_count), None
    )
    _check(made, [_reference(token, offset, occurrences, n, min_count) for n in rows], 3)


def test_long_repeats_and_parts(monkeypatch):
    """Passages longer than any power of two that is compared, and chunks of a few rows."""
    monkeypatch.setattr(contexts, "_CHUNK", 7)
    monkeypatch.setattr(ngram_targets, "_KEPT_SIZE", 3)
    monkeypatch.setattr(ngram_targets, "_COUNTED_AT_ONCE", 9)
    passage = np.random.default_rng(0).integers(1, VOCAB, 77)
    texts = [[0], passage, [0, 1], passage, [2], passage[:50], [0], passage, [0], [0, 4]]
    token = np.concatenate(texts).astype(np.int32)
    offset = np.concatenate([np.flatnonzero(token == 0), [len(token)]])
    rows = np.arange(len(token) - 1)
    found = Contexts(token, offset, len(rows))
    following = Following(token[1:][found.order_E], 3)
    expected = [_reference(token, offset, rows, n, 2) for n in rows]
    for part in (slice(0, 100), slice(100, None)):  # What is kept serves later rows.
        made = following.distributions(*found.longest(rows[part], 2), token[rows[part] + 1])
        _check(made, expected[part], 3)
    assert following._kept


def test_many_occurrences_take_bounded_memory(monkeypatch):
    token, offset = _stream(num_documents=200)
    rows, min_count = np.arange(len(token) - 1), 400
    found = Contexts(token, offset, len(rows))
    whole = found.longest(rows, min_count)
    monkeypatch.setattr(contexts, "_CHUNK", 50 * min_count)
    tracemalloc.start()
    in_parts = found.longest(rows, min_count)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(in_parts, whole)
    assert most < 16 * min_count * len(rows) / 4  # Two lists of a row, of all rows at once.


def test_too_few_occurrences_give_no_target():
    token, offset = np.array([0, 1, 2], np.int32), np.array([0, 3])
    found = Contexts(token, offset, 2)
    following = Following(token[1:][found.order_E], 4)
    for min_count, mass in ((1, 1), (2, 0)):
        first, stop = found.longest(np.arange(2), min_count)
        made = following.distributions(first, stop, token[1:])
        np.testing.assert_array_equal(made.mass_Q, [mass, mass])
    # One other occurrence, of a context with nothing in common: what follows anything.
    first, stop = found.longest(np.arange(2), 1)
    made = following.distributions(first, stop, token[1:])
    np.testing.assert_array_equal(made.id_QS[:, 0], [2, 1])
    nothing = found.longest(np.arange(0), 1)
    assert [len(one) for one in nothing] == [0, 0]
    assert following.distributions(*nothing, None).id_QS.shape == (0, 4)
