"""kNN distributions against a loop; the label's probability; the best τ."""

import numpy as np
import pytest

from mlpmem_jax.retrieval.distributions import (
    LabelEvidence,
    sparse_distributions,
    with_mass,
    without_targets,
)
from mlpmem_jax.retrieval.temperature import fixed, tune

VOCAB = 50


def _neighbors(num_queries=300, num_neighbors=40, vocab=VOCAB, seed=0):
    generator = np.random.default_rng(seed)
    distance = np.sort(generator.gamma(2, 5, (num_queries, num_neighbors)), axis=1)
    label = (vocab * generator.random((num_queries, num_neighbors)) ** 3).astype(np.int32)
    return distance.astype(np.float32), label


def _by_loop(distance, label, tau):
    """Eq. 3 of the paper, a neighbour at a time."""
    probability = np.zeros(VOCAB)
    for d, y in zip(distance, label, strict=True):
        if np.isfinite(d):
            probability[y] += np.exp(-float(d) / tau)
    return probability / max(probability.sum(), 1e-300)


@pytest.mark.parametrize("tau", [0.7, 5.0, 100.0])
@pytest.mark.parametrize("kept", [1, 8, 45])
def test_against_a_loop(tau, kept):
    distance, label = _neighbors()
    found = sparse_distributions(distance, label, tau, kept)
    assert found.id_QS.shape == found.prob_QS.shape == (300, kept)
    for n in range(0, 300, 7):
        probability = _by_loop(distance[n], label[n], tau)
        used = found.prob_QS[n] > 0
        np.testing.assert_allclose(
            probability[found.id_QS[n, used]], found.prob_QS[n, used], rtol=2e-5
        )
        expected = np.sort(probability)[::-1][:kept]
        np.testing.assert_allclose(found.prob_QS[n], expected, rtol=2e-5, atol=1e-37)
        np.testing.assert_allclose(found.mass_Q[n], expected.sum(), rtol=2e-5)
        assert len(set(found.id_QS[n, used])) == used.sum()
    assert not found.id_QS[found.prob_QS == 0].any()


def test_order_is_by_probability_then_by_id():
    distance = np.zeros((1, 6), np.float32)
    label = np.array([[9, 4, 7, 4, 2, 7]], np.int32)
    found = sparse_distributions(distance, label, 1.0, 5)
    np.testing.assert_array_equal(found.id_QS, [[4, 7, 2, 9, 0]])
    np.testing.assert_allclose(found.prob_QS, np.float32([[2, 2, 1, 1, 0]]) / 6)
    np.testing.assert_allclose(found.mass_Q, [1])
    cut = sparse_distributions(distance, label, 1.0, 3)
    np.testing.assert_array_equal(cut.id_QS, [[4, 7, 2]])
    np.testing.assert_allclose(cut.mass_Q, [5 / 6], rtol=1e-6)


def test_large_distances_do_not_underflow():
    distance = np.float32([[40000, 40001, 40300]])
    found = sparse_distributions(distance, np.array([[3, 5, 6]]), 1.0, 3)
    np.testing.assert_allclose(found.prob_QS[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-5)
    assert found.id_QS[0, 0] == 3 and found.prob_QS[0, 2] == 0 and found.id_QS[0, 2] == 0


def test_missing_neighbours_have_no_weight():
    distance = np.float32([[1, np.inf, np.inf], [np.inf, np.inf, np.inf]])
    label = np.array([[8, 3, 3], [3, 3, 3]])
    found = sparse_distributions(distance, label, 2.0, 2)
    np.testing.assert_array_equal(found.id_QS, [[8, 0], [0, 0]])
    np.testing.assert_array_equal(found.prob_QS, np.float32([[1, 0], [0, 0]]))
    np.testing.assert_array_equal(found.mass_Q, np.float32([1, 0]))
    assert np.isneginf(LabelEvidence(distance, label, np.array([3, 3])).logprob(2.0)).all()


def test_rows_that_are_never_scored_have_no_target():
    distance, label = _neighbors(4)
    found = without_targets(
        sparse_distributions(distance, label, 5.0, 6), np.array([1, 0, 1, 0]) > 0
    )
    np.testing.assert_array_equal(found.mass_Q > 0, [True, False, True, False])
    assert not found.prob_QS[1].any() and not found.id_QS[1].any() and found.prob_QS[0].any()


@pytest.mark.parametrize("tau", [0.3, 5.0])
def test_the_labels_probability_uses_all_neighbours(tau):
    distance, label = _neighbors()
    own = np.random.default_rng(1).integers(0, VOCAB, len(distance))
    found = LabelEvidence(distance, label, own).logprob(tau)
    for n in range(len(distance)):
        probability = _by_loop(distance[n], label[n], tau)[own[n]]
        if probability == 0:
            assert np.isneginf(found[n])
        else:
            np.testing.assert_allclose(np.exp(found[n]), probability, rtol=2e-5)
    assert np.isneginf(found).any() and np.isfinite(found).any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_best_temperature_is_found_at_any_scale(scale):
    generator = np.random.default_rng(3)
    distance, label = _neighbors(2000)
    # Labels drawn from the distribution at τ = 4: that τ is the best.
    weight = np.exp((distance[:, :1] - distance) / 4)
    weight /= weight.sum(axis=1, keepdims=True)
    place = (weight.cumsum(axis=1) < generator.random((2000, 1))).sum(axis=1).clip(0, 39)
    own = label[np.arange(2000), place]
    decoder = np.full(2000, -np.log(VOCAB))
    evidence = LabelEvidence(distance * np.float32(scale), label, own)
    tuned = tune(evidence, decoder)
    assert 2.5 * scale < tuned.temperature < 6 * scale
    assert tuned.weight > 0.8
    assert tuned.nats < fixed(evidence, decoder, 40 * scale).nats < tuned.decoder_nats
    grid = [fixed(evidence, decoder, tau * scale).nats for tau in np.geomspace(0.3, 60, 40)]
    assert tuned.nats <= min(grid) + 1e-5


def test_equal_distances_leave_nothing_to_tune():
    label = np.array([[1, 1, 2], [3, 1, 1]])
    tuned = tune(
        LabelEvidence(np.ones((2, 3), np.float32), label, np.array([1, 1])), np.log([0.1, 0.1])
    )
    assert np.isclose(tuned.nats, -np.log(2 / 3)) and tuned.weight == 1.0


@pytest.mark.parametrize("tau", [1e-40, 1e-300, 1e-45])
def test_a_tiny_temperature_gives_all_mass_to_the_nearest(tau):
    """Equally near neighbours share it; the loop in float64 does not reach so far."""
    distance = np.float32([[7, 7.5, 9e4], [3, 3, 9], [2, np.inf, np.inf]])
    label = np.array([[4, 5, 6], [4, 5, 6], [8, 0, 0]])
    found = sparse_distributions(distance, label, tau, 2)
    np.testing.assert_array_equal(found.prob_QS, np.float32([[1, 0], [0.5, 0.5], [1, 0]]))
    np.testing.assert_array_equal(found.mass_Q, 1)
    np.testing.assert_array_equal(found.id_QS[:, 0], [4, 4, 8])
    logprob = LabelEvidence(distance, label, np.array([4, 5, 0])).logprob(tau)
    np.testing.assert_allclose(np.exp(logprob), [1, 0.5, 0])


@pytest.mark.parametrize("tau", [1e12, 1e40, 1e300])
def test_a_huge_temperature_weighs_all_neighbours_alike(tau):
    distance = np.float32([[7, 7.5, 90], [3, 3, np.inf]])
    label = np.array([[4, 5, 5], [4, 5, 0]])
    found = sparse_distributions(distance, label, tau, 2)
    np.testing.assert_allclose(found.prob_QS, [[2 / 3, 1 / 3], [0.5, 0.5]], rtol=1e-6)
    logprob = LabelEvidence(distance, label, np.array([5, 0])).logprob(tau)
    np.testing.assert_allclose(np.exp(logprob), [2 / 3, 0], rtol=1e-6)


def test_one_neighbour_is_the_whole_distribution_at_any_temperature():
    distance, label = np.float32([[5.0], [1e30]]), np.array([[3], [4]])
    for tau in (1e-40, 1.0, 1e40):
        found = sparse_distributions(distance, label, tau, 8)
        np.testing.assert_array_equal(found.mass_Q, 1)
        np.testing.assert_array_equal(found.id_QS[:, 0], [3, 4])
    tuned = tune(LabelEvidence(distance, label, np.array([3, 9])), np.log([0.1, 0.1]))
    assert np.isfinite(tuned.nats) and 0 < tuned.weight < 1


def test_probabilities_kept_in_half_precision_stay_a_distribution():
    """The loss renormalises what is kept: the most probable of K tokens has at least 1 / K."""
    distance = np.linspace(0, 1, 1024, dtype=np.float32)[None]
    found = sparse_distributions(distance, np.arange(1024)[None], 1e40, 64)
    kept = found.prob_QS.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(kept / kept.sum(), 1 / 64, rtol=1e-3)
    # Farther tokens may vanish in float16, the nearest cannot.
    found = sparse_distributions(distance, np.arange(1024)[None], 1e-4, 64)
    assert found.prob_QS.astype(np.float16)[0, 0] > 0.9


def _hits(distance_NK, is_hit_NK):
    """Evidence whose neighbours have label 1 where they hit, and 0 elsewhere."""
    label_NK = np.asarray(is_hit_NK).astype(np.int32)
    return LabelEvidence(np.float32(distance_NK), label_NK, np.ones(len(label_NK), np.int32))


@pytest.mark.parametrize(
    ("hits", "bound"), [([1, 0, 0, 0], "lower"), ([0, 1, 1, 1], "upper"), ([0, 1, 0, 0], None)]
)
def test_a_temperature_at_an_end_of_its_range_is_said(hits, bound):
    """Only the nearest is right, or it alone is wrong: τ runs to an end."""
    distance = np.tile([1.0, 2.0, 3.0, 40.0], (50, 1))
    tuned = tune(_hits(distance, [hits] * 50), np.full(50, np.log(0.3 if bound else 1e-9)))
    assert tuned.at_bound == bound
    said = [note for note in tuned.notes if "τ" in note]
    assert len(said) == (bound is not None) and all(f"at the {bound} bound" in n for n in said)
    given = fixed(_hits(distance, [hits] * 50), np.full(50, np.log(0.3)), 1e-3)
    assert given.at_bound is None


def test_lambda_at_an_end_is_said():
    distance = np.tile([1.0, 2.0, 3.0], (20, 1))
    useless = fixed(_hits(distance, [[0, 0, 0]] * 20), np.full(20, -1.0), 1.0)
    assert useless.weight == 0 and "λ of the kNN-LM is 0 on validation" in useless.notes[0]
    perfect = fixed(_hits(distance, [[1, 1, 1]] * 20), np.full(20, -1.0), 1.0)
    assert perfect.weight == 1 and "λ of the kNN-LM is 1 on validation" in perfect.notes[0]
    assert not fixed(_hits(distance, [[1, 1, 1], [0, 0, 0]] * 10), np.full(20, -1.0), 1.0).notes


class _TwoValleys:
    """Evidence whose nats have two minima in log τ: the lower one is narrow and far from 0."""

    typical_spread = 1.0

    def __len__(self):
        return 4

    def logprob(self, temperature):
        x = np.log(temperature)
        deep = 0.6 * np.exp(-(((x + 3.5) / 0.7) ** 2) / 2)
        wide = 0.3 * np.exp(-(((x - 2.0) / 1.5) ** 2) / 2)
        return np.full(4, deep + wide - 2.0)


def test_the_lower_of_two_minima_is_found():
    tuned = tune(_TwoValleys(), np.full(4, -50.0))
    assert np.log(tuned.temperature) == pytest.approx(-3.5, abs=0.02)
    assert tuned.nats == pytest.approx(1.4, abs=1e-3) and tuned.at_bound is None


def test_duplicates_do_not_hide_the_spread_of_other_rows():
    distance = np.zeros((10, 3))
    distance[:4, 1:] = [2.0, 4.0]
    evidence = _hits(distance, np.tile([0, 1, 0], (10, 1)))
    assert evidence.typical_spread == pytest.approx(2.0)
    assert _hits(np.ones((3, 3)), np.ones((3, 3))).typical_spread == 0


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kept", [3, 45])
def test_the_fewest_tokens_with_a_mass(mass, kept):
    whole = sparse_distributions(*_neighbors(), 5.0, kept)
    cut = with_mass(whole, mass)
    assert cut.prob_QS.dtype == np.float32 and cut.id_QS.dtype == np.int32
    used = (cut.prob_QS > 0).sum(axis=1)
    for n, count in enumerate(used):
        np.testing.assert_array_equal(cut.prob_QS[n, :count], whole.prob_QS[n, :count])
        np.testing.assert_array_equal(cut.id_QS[n, :count], whole.id_QS[n, :count])
        assert not cut.prob_QS[n, count:].any() and not cut.id_QS[n, count:].any()
        sums = np.cumsum(whole.prob_QS[n], dtype=np.float64)
        assert count == min(
            np.searchsorted(sums, mass, side="left") + 1, (whole.prob_QS[n] > 0).sum()
        )
    np.testing.assert_allclose(cut.mass_Q, cut.prob_QS.sum(axis=1), rtol=1e-6)
    assert used.min() >= 1 and (mass < 1e-5 or used.max() > 1)


def test_mass_of_rows_without_neighbours():
    found = sparse_distributions(np.full((2, 3), np.inf, np.float32), np.zeros((2, 3), int), 1.0, 4)
    cut = with_mass(found, 0.5)
    assert not cut.prob_QS.any() and not cut.mass_Q.any()
