"""The bootstrap against a naive loop, and its coverage on documents that differ."""

import numpy as np
import pytest

from mlpmem_jax.stats import bootstrap


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


def test_an_interval_holds_whatever_undefined_draws_are():
    """Few of them leave one that holds with any value in their place, and is no wider than that."""
    rng = np.random.default_rng(0)
    sums = np.stack([rng.standard_normal(1000), np.ones(1000)], axis=1)
    undefined = rng.permutation(1000) < 30

    def with_value(value):
        return lambda s: np.where(undefined, value, s[..., 0] / s[..., 1])

    found = bootstrap.interval(with_value(np.nan), sums, 0.9)
    low = bootstrap.interval(with_value(-1e9), sums, 0.9)
    high = bootstrap.interval(with_value(1e9), sums, 0.9)
    assert found.low <= low.low <= found.low + 0.1
    assert found.high - 0.1 <= high.high <= found.high
    assert bootstrap.interval(with_value(np.nan), sums, 0.95) is None


def test_draws_that_are_not_kept_are_the_same(monkeypatch: pytest.MonkeyPatch):
    values_DM = _documents(np.random.default_rng(1), 13)
    kept = bootstrap.Draws(13, 30, (7, 1))
    monkeypatch.setattr(bootstrap, "_KEPT_CELLS", 0)
    drawn = bootstrap.Draws(13, 30, (7, 1))
    for _ in range(2):
        np.testing.assert_array_equal(drawn.sums(values_DM), kept.sums(values_DM))


def _related(rng: np.random.Generator, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of 15 statistics whose true values are 0, and draws around them: differences of 6."""
    one = np.triu_indices(6, 1)
    truth_6, drawn_R6 = rng.standard_normal(6), rng.standard_normal((num_draws, 6))
    values, drawn = truth_6[one[0]] - truth_6[one[1]], drawn_R6[:, one[0]] - drawn_R6[:, one[1]]
    return values, values + drawn


def test_corrected_intervals_hold_together():
    """All 15 hold their true value about as often as one interval should; alone they do not."""
    rng = np.random.default_rng(0)
    together, alone, repetitions = 0, 0, 300
    for _ in range(repetitions):
        values, drawn_RP = _related(rng, 400)
        found = bootstrap.simultaneous(values, drawn_RP, 0.9)
        together += all(not one.interval.excludes(0.0) for one in found)
        low, high = np.quantile(drawn_RP, [0.05, 0.95], axis=0)
        alone += bool(((low <= 0) & (high >= 0)).all())
    assert 0.85 <= together / repetitions <= 0.95
    assert alone / repetitions < 0.6


def test_a_family_of_one_is_an_interval_of_its_own():
    rng = np.random.default_rng(1)
    drawn_RP = 2.0 + 0.5 * rng.standard_normal((20_000, 1))
    (found,) = bootstrap.simultaneous(np.array([2.0]), drawn_RP, 0.95)
    assert found.interval.low == pytest.approx(2 - 1.96 * 0.5, abs=0.02)
    assert found.interval.high == pytest.approx(2 + 1.96 * 0.5, abs=0.02)
    assert found.p_value < 0.001


def test_equal_systems_and_constant_differences_take_no_part():
    rng = np.random.default_rng(2)
    drawn_RP = np.stack([np.zeros(500), np.full(500, 0.5), rng.standard_normal(500)], axis=1)
    same, constant, other = bootstrap.simultaneous(np.array([0.0, 0.5, 0.1]), drawn_RP, 0.95)
    assert same.interval == bootstrap.Interval(0.0, 0.0) and same.p_value == 1
    assert constant.interval == bootstrap.Interval(0.5, 0.5) and constant.p_value == 0
    (alone,) = bootstrap.simultaneous(np.array([0.1]), drawn_RP[:, 2:], 0.95)
    assert other == alone


def test_one_draw_is_no_crash():
    sums = bootstrap.bootstrap_sums(np.ones((5, 2)), 1, seed=0)
    assert bootstrap.interval(lambda s: s[..., 0] / s[..., 1], sums, 0.95) is not None
    (found,) = bootstrap.simultaneous(np.array([1.0]), np.array([[1.5]]), 0.95)
    assert found.interval == bootstrap.Interval(1.0, 1.0)
