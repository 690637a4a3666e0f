"""λ chosen anew in each draw, against exact solves of the resampled rows."""

import numpy as np
import pytest

from mlpmem_jax.evaluation import metrics
from mlpmem_jax.evaluation.draws import Settings, drawn_nats
from mlpmem_jax.evaluation.systems import SplitParts, System
from mlpmem_jax.stats.bootstrap import Draws
from mlpmem_jax.stats.mixing import mixture_logprob, mixture_of, solve_weights
from mlpmem_jax.stats.nested import choose, sum_nats


def _models(seed: int, num_models: int, num_clusters: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [M, N] of uneven clusters, each of which likes other models."""
    rng = np.random.default_rng(seed)
    cluster_N = np.sort(rng.choice(num_clusters, 900, p=rng.dirichlet(np.full(num_clusters, 3.0))))
    cluster_N = np.unique(cluster_N, return_inverse=True)[1]
    base_N = -rng.gamma(3.0, 1.0, 900)
    likes_CM = rng.standard_normal((num_clusters, num_models)) * 0.7 + 0.3
    noise_MN = 1.5 * rng.standard_normal((num_models, 900)) + likes_CM[cluster_N].T
    logp_MN = np.minimum(base_N + noise_MN, -1e-3)
    logp_MN[0] = base_N
    if num_models > 1:
        logp_MN[1, rng.random(900) < 0.3] = -np.inf
    return logp_MN, cluster_N


def _repeated(weight_C: np.ndarray, cluster_N: np.ndarray) -> np.ndarray:
    """Rows of a draw, each as often as its cluster was drawn."""
    return np.repeat(np.arange(len(cluster_N)), weight_C[cluster_N].astype(int))


@pytest.mark.parametrize(("num_models", "near"), [(1, 1e-9), (2, 1e-6), (3, 3e-4)])
def test_each_draw_is_what_its_resampled_rows_give(num_models: int, near: float):
    valid_MN, valid_N = _models(1, num_models)
    test_MN, test_N = _models(2, num_models)
    valid_draws = Draws(int(valid_N.max()) + 1, 60, (0, 1))
    draws = Draws(int(test_N.max()) + 1, 60, 0)
    weight_RM = choose(valid_MN, valid_N, valid_draws)
    nats_R = sum_nats(test_MN, test_N, weight_RM, draws)
    ((_, valid_RC),) = valid_draws.chunks()
    ((_, test_RC),) = draws.chunks()
    assert num_models == 1 or np.ptp(weight_RM[:, 1]) > 0.1  # Draws differ.
    for draw in range(60):
        exact_M = solve_weights(valid_MN[:, _repeated(valid_RC[draw], valid_N)])
        assert weight_RM[draw] == pytest.approx(exact_M, abs=20 * near)
        rows = _repeated(test_RC[draw], test_N)
        mean = -mixture_of(test_MN[:, rows], exact_M).mean()
        assert nats_R[draw] / len(rows) == pytest.approx(mean, abs=near)


def test_rows_of_one_model_alone_are_exact_at_both_ends():
    """Most rows know one model only: λ lies near an end in some draws, and on it in others."""
    rng = np.random.default_rng(4)
    cluster_N = np.repeat(np.arange(8), 50)
    logp_MN = np.log(np.full((2, 400), 0.2)) + 0.1 * rng.standard_normal((2, 400))
    logp_MN[1, cluster_N < 6] = -np.inf
    logp_MN[0, cluster_N == 7] = -np.inf
    draws = Draws(8, 300, 3)
    weight_R = choose(logp_MN, cluster_N, draws)[:, 1]
    ((_, count_RC),) = draws.chunks()
    for weight, count_C in zip(weight_R, count_RC, strict=True):
        exact = solve_weights(logp_MN[:, _repeated(count_C, cluster_N)])[1]
        assert weight == pytest.approx(exact, abs=1e-4)
    nats_R = sum_nats(logp_MN, cluster_N, np.stack([1 - weight_R, weight_R], 1), draws)
    assert np.isfinite(nats_R).all()  # The same draws: no row without probability is in them.


def test_a_model_without_weight_makes_no_difference_to_the_bit():
    logp_MN, cluster_N = _models(1, 2)
    logp_MN[1] = logp_MN[0] - 1
    draws = Draws(int(cluster_N.max()) + 1, 50, 0)
    weight_RM = choose(logp_MN, cluster_N, draws)
    np.testing.assert_array_equal(weight_RM, [[1.0, 0.0]] * 50)
    alone_R = sum_nats(logp_MN[:1], cluster_N, weight_RM[:, :1], draws)
    np.testing.assert_array_equal(sum_nats(logp_MN, cluster_N, weight_RM, draws), alone_R)


def test_rows_without_any_probability_do_not_choose():
    logp_MN, cluster_N = _models(1, 2)
    lost_MN = logp_MN.copy()
    lost_MN[:, 5] = -np.inf
    draws = Draws(int(cluster_N.max()) + 1, 50, 0)
    kept_N = np.arange(900) != 5
    wanted_RM = choose(logp_MN[:, kept_N], cluster_N[kept_N], draws)
    np.testing.assert_allclose(choose(lost_MN, cluster_N, draws), wanted_RM, atol=1e-6)


DECODER = System("decoder", "", ("decoder",))
MEMORY = System("memory", "", ("decoder", "memory"))
SETTINGS = Settings(500, 0.95, 0, "decoder", "")


def _scores(seed: int, num_documents: int, shift: float) -> SplitParts:
    rng = np.random.default_rng(seed)
    offsets = np.arange(num_documents + 1) * 31
    tokens = np.ones(num_documents * 31, np.int64)
    tokens[offsets[:-1]] = 0
    sizes = np.full(num_documents, 30)
    counts = metrics.count_documents(tokens[1:], 0, offsets, sizes, sizes)
    base_N = -rng.gamma(3.0, 1.0, len(tokens) - 1)
    likes_N = rng.standard_normal(num_documents)[counts.document_N]
    added_N = np.minimum(base_N + likes_N + shift + rng.standard_normal(len(base_N)), -1e-3)
    return SplitParts(counts, {"decoder": base_N, "memory": added_N})


def _drawn(test: SplitParts, system: System, weight_M: np.ndarray) -> np.ndarray:
    """Nats over the drawn test documents while λ stays."""
    ((_, count_RC),) = Draws(test.counts.num_clusters, 500, 0).chunks()
    return count_RC @ test.nats_by_document(system, weight_M)


def test_a_small_validation_split_widens_the_interval():
    """λ of 4 documents is 0.04 by chance, and says little; of 300 it is 0.61 and stays."""
    test = _scores(2, 40, 0.2)
    base_R = _drawn(test, DECODER, np.ones(1))
    ratio = {}
    for size in (4, 300):
        valid = _scores(5, size, 0.2)
        weight_M = valid.tuned_weights(MEMORY)
        drawn_R = drawn_nats(valid, test, MEMORY, SETTINGS) - base_R
        ratio[size] = drawn_R.std() / (_drawn(test, MEMORY, weight_M) - base_R).std()
    assert ratio[4] > 4 and 0.95 < ratio[300] < 1.1
    # A λ of training is not chosen on validation: only test is drawn.
    trained, mixture = [], System("memory", "", ("mixture",))
    for one in (valid, test):
        mixture_N = mixture_logprob(one.logprob["memory"], one.logprob["decoder"], weight_M[1])
        trained.append(SplitParts(one.counts, {"mixture": mixture_N}))
    found = drawn_nats(*trained, mixture, SETTINGS)
    np.testing.assert_allclose(found, _drawn(test, MEMORY, weight_M))


def test_one_validation_document_leaves_lambda_as_it_is():
    valid, test = _scores(1, 1, 0.5), _scores(2, 20, 0.5)
    draws = Draws(1, 30, (0, 1))
    weight_RM = choose(valid.scored(MEMORY), valid.counts.scored_cluster_N, draws)
    assert np.ptp(weight_RM[:, 1]) == 0
    exact = solve_weights(valid.scored(MEMORY))
    np.testing.assert_allclose(weight_RM[0], exact, atol=1e-6)
    assert test.counts.num_clusters == 20
