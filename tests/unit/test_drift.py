"""Agreement of neighbours: against a plain search, and in cases that are known."""

import numpy as np
import pytest

from mlpmem_jax.retrieval.drift import overlap


def _plain(old: np.ndarray, new: np.ndarray, count: int) -> float:
    shares = []
    for row in range(len(old)):
        nearest = []
        for keys in (old, new):
            distance = np.sum((keys - keys[row]) ** 2, axis=1)
            distance[row] = np.inf
            nearest.append(set(np.argsort(distance)[:count].tolist()))
        shares.append(len(nearest[0] & nearest[1]) / count)
    return float(np.mean(shares))


@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
def test_overlap_is_that_of_a_plain_search(noise: float):
    rng = np.random.default_rng(0)
    old = rng.standard_normal((1500, 4))  # More than one part of the search.
    new = old + noise * rng.standard_normal(old.shape)
    found = overlap(old, new, 10)
    assert found == pytest.approx(_plain(old, new, 10), abs=1e-4)
    assert 0.0 < found < 1.0


def test_what_only_moves_turns_or_grows_agrees_wholly():
    rng = np.random.default_rng(1)
    old = rng.standard_normal((300, 6))
    turn, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    assert overlap(old, 2.0 * old @ turn + 1.0, 10) == pytest.approx(1.0, abs=1e-3)


def test_unrelated_keys_agree_by_chance():
    rng = np.random.default_rng(2)
    old, new = rng.standard_normal((2, 1000, 8))
    assert overlap(old, new, 10) == pytest.approx(10 / 999, abs=0.01)


def test_fewer_rows_than_neighbours():
    old = np.arange(3.0)[:, None]
    assert overlap(old, old, 10) == 1.0 and overlap(old[:1], old[:1], 10) == 1.0
