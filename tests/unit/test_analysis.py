"""Frequency bins, seen n-grams, gains by group and sharpness, against plain references."""

import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.evaluation import metrics
from mlpmem_jax.retrieval.distributions import sparse_distributions
from mlpmem_jax.studies.analyze import sharpness
from mlpmem_jax.studies.analyze.frequency import Bins
from mlpmem_jax.studies.analyze.groups import gains_by_group
from mlpmem_jax.studies.analyze.ngrams import NgramCounts

SEPARATOR = 0


def test_bins_hold_every_count_once():
    bins = Bins.up_to(100, 4)
    assert bins.edges == (0, 1, 4, 16, 64)
    assert bins.labels == ["0", "1–3", "4–15", "16–63", "≥ 64"]
    counts = np.array([0, 1, 3, 4, 15, 16, 63, 64, 100])
    assert bins.of(counts).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert Bins.up_to(0, 10).labels == ["0", "≥ 1"]
    assert Bins.up_to(3, 2).labels == ["0", "1", "≥ 2"]


def _stream(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> np.ndarray:
    tokens = rng.integers(1, vocab_size, num_tokens)
    tokens[rng.random(num_tokens) < 0.1] = SEPARATOR
    tokens[0] = SEPARATOR
    return tokens


def _ngrams(tokens: np.ndarray, order: int) -> list[tuple[int, ...] | None]:
    """The n-gram that ends at each token; None where it would leave the document."""
    found: list[tuple[int, ...] | None] = []
    for end in range(len(tokens)):
        gram = tuple(int(token) for token in tokens[max(0, end - order + 1) : end + 1])
        whole = len(gram) == order and SEPARATOR not in gram[1:]
        found.append(gram if whole else None)
    return found


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@pytest.mark.parametrize("vocab_size", [5, 70_000])
def test_counts_of_ngrams_are_those_of_a_dictionary(piece: int, vocab_size: int):
    rng = np.random.default_rng(piece)
    small, large = (_stream(rng, n, vocab_size) for n in (150, 600))
    large[100:160] = small[20:80]  # So that long n-grams occur with a large vocabulary too.
    counts = NgramCounts(small, SEPARATOR, vocab_size, (2, 4, 5))
    counts.count(large[n : n + piece] for n in range(0, len(large), piece))
    kinds: set[int] = set()
    for order in (2, 4, 5):
        known = [gram for gram in _ngrams(large, order) if gram is not None]
        expected = [-1 if gram is None else known.count(gram) for gram in _ngrams(small, order)]
        assert counts.of_tokens(order).tolist() == expected
        kinds |= {min(count, 1) for count in expected}
    assert kinds == {-1, 0, 1}


def test_a_text_without_ngrams_has_none():
    counts = NgramCounts(np.zeros(3, np.int64), SEPARATOR, 4, (2, 3))
    counts.count([np.array([0, 1, 2, 3])])
    assert counts.of_tokens(3).tolist() == [-1, -1, -1]


def test_gains_of_groups_add_up_and_agree_with_a_loop():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 30)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    tokens = rng.integers(1, 9, offsets[-1])
    tokens[offsets[:-1]] = SEPARATOR
    counts = metrics.count_documents(tokens[1:], SEPARATOR, offsets, lengths, lengths)
    num_rows = len(tokens) - 1
    decoder_N = -rng.gamma(2.0, 1.0, num_rows)
    better_N = decoder_N + rng.normal(0.3, 1.0, num_rows)
    group_N = rng.integers(-1, 3, num_rows)
    groups = gains_by_group(
        counts, group_N, ["a", "b", "c"], decoder_N, {"memory": better_N},
        bootstrap_samples=200, confidence=0.9, seed=0,
    )  # fmt: skip
    scored = counts.scored_N
    for place, group in enumerate(groups):
        rows = scored & (group_N == place)
        gain = (better_N - decoder_N)[rows].mean()
        assert group["tokens"] == rows.sum()
        assert group["decoder_nats"] == pytest.approx(-decoder_N[rows].mean())
        assert group["memory"]["gain"] == pytest.approx(gain)
        assert group["memory"]["gain_low"] < gain < group["memory"]["gain_high"]
    total = (better_N - decoder_N)[scored & (group_N >= 0)].sum() / scored.sum()
    assert sum(g["memory"]["contribution"] for g in groups) == pytest.approx(total)


def test_a_group_of_one_file_has_no_interval():
    """Group b lies in the two documents of file 1 alone; before, they were two of a kind."""
    counts = metrics.DocumentCounts(
        np.repeat(np.arange(4), 5), np.full(4, 5), *[np.ones(4)] * 2, np.array([0, 1, 1, 2])
    )
    rng = np.random.default_rng(0)
    group_N = np.repeat([0, 1, 1, 0], 5)
    a, b = gains_by_group(
        counts, group_N, ["a", "b"], -np.ones(20), {"memory": -rng.random(20)},
        bootstrap_samples=200, confidence=0.9, seed=0,
    )  # fmt: skip
    # Neither has one: a draw may leave both files of a out.
    assert b["documents"] == 2 and b["memory"]["gain_low"] is None
    assert a["memory"]["gain"] is not None


def test_a_group_without_tokens_has_no_gain():
    counts = metrics.DocumentCounts(np.array([0, 0, 1]), np.array([2, 1]), *[np.ones(2)] * 2)
    ones = np.ones(3)
    groups = gains_by_group(
        counts, np.zeros(3, int), ["all", "none"], -ones, {"memory": 0 * ones},
        bootstrap_samples=100, confidence=0.9, seed=0,
    )  # fmt: skip
    assert groups[0]["memory"]["gain"] == 1
    assert groups[1]["memory"] == {
        "gain": None, "gain_low": None, "gain_high": None, "contribution": 0.0,
    }  # fmt: skip


MASSES = (0.5, 0.75, 0.9, 0.99)


def _logprobs(num_rows: int, vocab: int, padded: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (num_rows, vocab))
    logprob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.pad(logprob, ((0, 0), (0, padded - vocab)), constant_values=-np.inf)


def _loop(prob_V: np.ndarray) -> tuple[list[int], float]:
    """Counts tokens by adding up the most probable ones, in float64."""
    counts, order = [], np.sort(prob_V)[::-1]
    for mass in MASSES:
        total, taken = 0.0, 0
        while total < mass:
            total += order[taken]
            taken += 1
        counts.append(taken)
    entropy = -sum(p * np.log(p) for p in prob_V if p > 0)
    return counts, entropy


def test_sharpness_of_dense_distributions_is_that_of_a_loop():
    num_rows, vocab = 17, 90
    logprob = _logprobs(num_rows, vocab, 128, 0)
    rng = np.random.default_rng(1)
    knn_id = np.stack([rng.permutation(vocab)[:8] for _ in range(num_rows)]).astype(np.int32)
    knn_prob = rng.dirichlet(np.ones(8), num_rows).astype(np.float32)
    knn_prob[:, 6:] = 0
    knn_prob /= knn_prob.sum(axis=1, keepdims=True)
    knn_id[:, 6:] = 0
    steps = sharpness.steps_up_to(vocab)
    found = sharpness.Sharpness(
        *map(
            np.asarray,
            sharpness.dense_sharpness(
                jnp.asarray(logprob, jnp.float32), jnp.asarray(knn_id), jnp.asarray(knn_prob),
                MASSES, steps,
            ),
        )
    )  # fmt: skip
    prob = np.exp(logprob)
    for row in range(num_rows):
        counts, entropy = _loop(prob[row])
        assert found.tokens_CP[row].tolist() == counts
        assert found.entropy_C[row] == pytest.approx(entropy, rel=1e-4)
        kl = sum(
            p * (np.log(p) - logprob[row, i])
            for i, p in zip(knn_id[row], knn_prob[row], strict=True)
            if p > 0
        )
        assert found.kl_C[row] == pytest.approx(kl, rel=1e-4)
        assert found.top_C[row] == prob[row].argmax()
        held = np.cumsum(np.sort(prob[row])[::-1])
        np.testing.assert_allclose(found.mass_CJ[row], held[np.array(steps) - 1], rtol=1e-5)


def test_sharpness_of_knn_distributions_is_that_of_a_loop():
    rng = np.random.default_rng(2)
    distance = np.sort(rng.gamma(2.0, 2.0, (11, 20)), axis=1).astype(np.float32)
    label = rng.integers(0, 6, (11, 20)).astype(np.int32)
    knn = sparse_distributions(distance, label, 2.0, 20)
    found = sharpness.knn_sharpness(knn, MASSES, [1, 2, 40])
    for row in range(11):
        dense = np.zeros(6)
        np.add.at(dense, label[row], np.exp((distance[row, 0] - distance[row]) / 2.0))
        dense /= dense.sum()
        counts, entropy = _loop(dense)
        assert found.tokens_CP[row].tolist() == counts
        assert found.entropy_C[row] == pytest.approx(entropy, rel=1e-4)
        assert found.top_C[row] == dense.argmax()
        expected = [dense.max(), np.sort(dense)[-2:].sum(), 1.0]
        np.testing.assert_allclose(found.mass_CJ[row], expected, rtol=1e-5)
    assert not found.kl_C.any()


def test_steps_end_with_the_vocabulary():
    assert sharpness.steps_up_to(10) == [1, 2, 3, 4, 6, 8, 10]
    assert sharpness.steps_up_to(1) == [1]
