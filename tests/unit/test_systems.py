"""Weights of mixtures against a fine grid, and systems by document."""

import numpy as np
import pytest

from mlpmem_jax.evaluation.metrics import count_documents
from mlpmem_jax.evaluation.systems import SplitParts, System
from mlpmem_jax.stats.mixing import mixture_of, solve, solve_weights


def _grid(steps: int) -> np.ndarray:
    """All weights of three models in steps of 1/steps."""
    i, j = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
    inside = i + j <= steps
    first, second = i[inside] / steps, j[inside] / steps
    return np.stack([1 - first - second, first, second], axis=1)


def _nats(logp_MN: np.ndarray, weights_GM: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -np.log(np.maximum(weights_GM, 0) @ np.exp(logp_MN)).mean(axis=1)


@pytest.mark.parametrize("seed", range(8))
def test_three_weights_against_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    logp_MN = -rng.gamma(1 + rng.random((3, 1)), 1.5, (3, 500))
    logp_MN[1, rng.random(500) < 0.5] = -np.inf  # No neighbour has the label.
    weight_M = solve_weights(logp_MN)
    assert weight_M.min() >= 0 and weight_M.sum() == pytest.approx(1, abs=1e-12)
    grid_GM = _grid(100)
    nats_G = _nats(logp_MN, grid_GM)
    nats = -mixture_of(logp_MN, weight_M).mean()
    assert nats <= nats_G.min() + 1e-12
    assert nats == pytest.approx(_nats(logp_MN, weight_M[None])[0], abs=1e-9)
    assert nats_G.min() - nats < 3e-3  # The grid is near, so both found the same valley.
    # The conditions of Karush, Kuhn and Tucker decide it: no direction improves.
    ratio_M = np.exp(logp_MN - mixture_of(logp_MN, weight_M)).mean(axis=1)
    assert ratio_M.max() <= 1 + 1e-5
    assert ratio_M[weight_M > 1e-6] == pytest.approx(1, abs=1e-5)


def test_a_useless_model_gets_exactly_nothing():
    rng = np.random.default_rng(3)
    base = -rng.gamma(1.5, 1.0, 400)
    better = np.minimum(base + rng.normal(0, 1, 400), -1e-3)
    logp_MN = np.stack([base, better, base - 3])
    weight_M = solve_weights(logp_MN)
    assert weight_M[2] == 0
    assert weight_M[1] == pytest.approx(solve(better, base).weight, abs=1e-5)


def test_equal_models_and_corners():
    base = -np.random.default_rng(0).gamma(1.5, 1.0, 50)
    weight_M = solve_weights(np.stack([base, base, base]))
    assert weight_M.sum() == pytest.approx(1) and weight_M.min() >= 0
    assert solve_weights(np.stack([base - 1, base - 2, base])) == pytest.approx([0, 0, 1], abs=1e-9)
    assert solve_weights(base[None]) == [1.0]


def test_four_models_are_no_worse_than_any_three():
    rng = np.random.default_rng(1)
    logp_MN = -rng.gamma(1.5, 1.0, (4, 300))
    nats = -mixture_of(logp_MN, solve_weights(logp_MN)).mean()
    for left_out in range(4):
        three = np.delete(logp_MN, left_out, axis=0)
        assert nats <= -mixture_of(three, solve_weights(three)).mean() + 1e-9


def test_systems_by_document():
    rng = np.random.default_rng(2)
    token = rng.integers(1, 9, 41)
    offset = np.array([0, 11, 30, 41])
    token[offset[:-1]] = 0
    counts = count_documents(token[1:], 0, offset, np.ones(3), np.ones(3))
    parts = SplitParts(counts, {name: -rng.gamma(2.0, 1.0, 40) for name in "abc"})
    weight_M = np.array([0.2, 0.3, 0.5])
    found_D = parts.nats_by_document(System("x", "x", ("a", "b", "c")), weight_M)
    for document in range(3):
        total = 0.0
        for row in range(40):
            if counts.document_N[row] == document:
                p = sum(
                    w * np.exp(parts.logprob[n][row]) for w, n in zip(weight_M, "abc", strict=True)
                )
                total -= np.log(p)
        assert found_D[document] == pytest.approx(total)
    alone_D = parts.nats_by_document(System("a", "a", ("a",)), np.ones(1))
    assert alone_D.sum() == pytest.approx(-parts.logprob["a"][counts.scored_N].sum())
