"""The bootstrap against a naive loop, and its coverage on documents that differ."""

import numpy as np
import pytest

from mlpmem_jax.evaluation import bootstrap


def _documents(rng: np.random.Generator, num_documents: int) -> np.ndarray:
    """Documents that differ in length, level and difference: [D, (base, other, tokens)]."""
    tokens_D = rng.integers(5, 200, num_documents)
    base_D = tokens_D * (4 + 0.5 * rng.standard_normal(num_documents))
    # Tokens within a document share most of the difference: that is the clustering.
    difference_D = -0.2 + 0.2 * rng.standard_normal(num_documents)
    return np.stack([base_D, base_D + tokens_D * difference_D, tokens_D], axis=1)


def _difference(sums: np.ndarray) -> np.ndarray:
    return (sums[..., 1] - sums[..., 0]) / sums[..., 2]


def test_equals_a_loop_over_resampled_documents():
    values_DM = _documents(np.random.default_rng(1), 13)
    found = bootstrap.bootstrap_sums(values_DM, 50, seed=7)
    rng = np.random.default_rng(7)
    for draw in range(50):
        total = np.zeros(3)
        for document, times in enumerate(rng.multinomial(13, np.full(13, 1 / 13))):
            for _ in range(times):
                total += values_DM[document]
        assert found[draw] == pytest.approx(total)


def test_agrees_with_drawing_indices():
    values_DM = _documents(np.random.default_rng(2), 40)
    rng = np.random.default_rng(0)
    naive = [_difference(values_DM[rng.integers(40, size=40)].sum(0)) for _ in range(4000)]
    found = _difference(bootstrap.bootstrap_sums(values_DM, 4000, seed=3))
    assert found.mean() == pytest.approx(np.mean(naive), abs=0.004)
    assert found.std() == pytest.approx(np.std(naive), rel=0.06)


def test_chunks_change_nothing_and_seeds_decide(monkeypatch: pytest.MonkeyPatch):
    values_DM = _documents(np.random.default_rng(1), 13)
    whole = bootstrap.bootstrap_sums(values_DM, 30, seed=7)
    monkeypatch.setattr(bootstrap, "_CHUNK_CELLS", 13 * 4)
    assert bootstrap.bootstrap_sums(values_DM, 30, seed=7) == pytest.approx(whole, rel=1e-14)
    assert not np.allclose(bootstrap.bootstrap_sums(values_DM, 30, seed=8), whole)


def test_coverage_over_clustered_documents():
    """The interval of the paired difference holds the true value about as often as it says.

    The population ratio is -0.2 since length and difference are independent. Treating
    tokens as independent would cover far less: documents share their difference.
    """
    rng = np.random.default_rng(5)
    repetitions, covered = 300, 0
    for repetition in range(repetitions):
        sums = bootstrap.bootstrap_sums(_documents(rng, 60), 300, seed=repetition)
        found = bootstrap.interval(_difference, sums, 0.9)
        assert found is not None
        covered += not found.excludes(-0.2)
    # Binomial spread at 300 is 0.017; percentile intervals fall a little short at 60.
    assert 0.83 <= covered / repetitions <= 0.95


def test_identical_systems_have_a_difference_of_exactly_zero():
    values_DM = _documents(np.random.default_rng(1), 9)
    values_DM[:, 1] = values_DM[:, 0]
    sums = bootstrap.bootstrap_sums(values_DM, 100, seed=0)
    assert bootstrap.interval(_difference, sums, 0.95) == bootstrap.Interval(0.0, 0.0)


def test_an_undefined_statistic_has_no_interval():
    sums = bootstrap.bootstrap_sums(np.zeros((5, 2)), 100, seed=0)
    assert bootstrap.interval(lambda s: s[..., 0] / s[..., 1], sums, 0.95) is None
