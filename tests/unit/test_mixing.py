"""λ against a fine grid, and at the ends of its range."""

import numpy as np
import pytest

from mlpmem_jax.stats.mixing import mixture_logprob, solve, solve_weights


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share_without", [0.0, 0.4])
def test_against_a_fine_grid(seed, share_without):
    generator = np.random.default_rng(seed)
    logp_a = -generator.gamma(1.0 + 0.3 * seed, 2, 3000)
    logp_b = -generator.gamma(1.5, 2, 3000)
    logp_a[generator.random(3000) < share_without] = -np.inf
    found = solve(logp_a, logp_b)
    grid = np.linspace(0, 1, 2001)
    nats = [-mixture_logprob(logp_a, logp_b, weight).mean() for weight in grid]
    assert found.nats <= min(nats) + 1e-12
    assert abs(found.weight - grid[int(np.argmin(nats))]) <= 1 / 2000


def test_the_ends_are_reached():
    better, worse = np.log([0.5, 0.6, 0.7]), np.log([0.1, 0.2, 0.3])
    assert solve(better, worse).weight == 1.0
    assert solve(worse, better).weight == 0.0
    assert solve(better, better).weight == 0.0
    np.testing.assert_allclose(solve(better, worse).nats, -better.mean())
    assert solve(np.full(3, -np.inf), better).weight == 0.0


def test_extreme_log_probabilities():
    found = solve(np.array([-1e-9, -800.0, -2000.0]), np.array([-700.0, -1e-9, -1.0]))
    np.testing.assert_allclose(found.weight, 1 / 3, rtol=1e-6)
    assert np.isfinite(found.nats)


def test_a_model_that_is_right_once_is_found():
    logp_a = np.full(1000, -np.inf)
    logp_a[7] = 0.0
    logp_b = np.full(1000, -1.0)
    logp_b[7] = -np.inf
    np.testing.assert_allclose(solve(logp_a, logp_b).weight, 1e-3, rtol=1e-6)


def test_rows_can_be_weighted():
    generator = np.random.default_rng(0)
    logp_a, logp_b = -generator.gamma(1.5, 2, (2, 500))
    counts = generator.integers(0, 3, 500)
    weighted = solve(logp_a, logp_b, counts)
    repeated = solve(np.repeat(logp_a, counts), np.repeat(logp_b, counts))
    np.testing.assert_allclose(weighted.weight, repeated.weight, rtol=1e-8)
    np.testing.assert_allclose(weighted.nats, repeated.nats, rtol=1e-12)


def test_rows_that_no_model_knows_do_not_decide():
    """They cost an infinity at every λ: the best λ is that of the others."""
    rng = np.random.default_rng(0)
    a, b = -rng.gamma(2.0, 1.0, 50), -rng.gamma(2.0, 1.0, 50)
    best = solve(a, b)
    a[7] = b[7] = -np.inf
    kept = np.arange(50) != 7
    found = solve(a, b)
    assert found.weight == solve(a[kept], b[kept]).weight and found.nats == np.inf
    assert 0 < best.weight < 1
    weights = solve_weights(np.stack([b, a, b - 1]))
    assert weights[1] == pytest.approx(found.weight, abs=1e-5)
    assert solve(np.full(3, -np.inf), np.full(3, -np.inf)).weight == 0
    assert solve_weights(np.full((3, 4), -np.inf)).tolist() == [1, 0, 0]
