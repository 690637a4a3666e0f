"""How far kNN distributions from approximate neighbours are from the exact ones.

KL(exact ‖ approximate) is infinite as soon as one label is missed, so the skew divergence
takes its place: KL(p ‖ (1 − ε) q + ε p) with ε = 0.01 (Lee 1999), at most −ln ε = 4.6 nats.

Suffixes: Q rows, K neighbours, M tokens of all distributions.
"""

import numpy as np

from mlpmem_jax.retrieval.distributions import SparseDistributions, sparse_distributions
from mlpmem_jax.retrieval.merge import Neighbors

SKEW = 0.01
_HALF = np.int64(32)


def compare_neighbors(
    found: Neighbors, truth: Neighbors, train_label: np.ndarray, temperature: float
) -> dict[str, float]:
    """Compares the distributions that two lists of neighbours of the same rows imply.

    Returns:
        Means over rows: `skew_kl` (KL(exact ‖ 0.99 approximate + 0.01 exact), nats), `missed_mass`
        (exact probability of tokens to which the approximate one gives none), `top1` (share of rows
        with the same most probable token).
    """
    exact, approximate = (_distributions(one, train_label, temperature) for one in (truth, found))
    num_queries, num_tokens = exact.prob_QS.shape
    prob_QS = exact.prob_QS.astype(np.float64)
    other_QS = _probability_of(approximate, exact.id_QS).reshape(num_queries, num_tokens)
    is_there = prob_QS > 0
    mixed_QS = np.where(is_there, (1 - SKEW) * other_QS + SKEW * prob_QS, 1.0)
    ratio_QS = np.log(np.where(is_there, prob_QS, 1.0)) - np.log(mixed_QS)
    kl_Q = np.where(is_there, prob_QS * ratio_QS, 0.0).sum(axis=1)
    missed_Q = np.where(is_there & (other_QS == 0), prob_QS, 0.0).sum(axis=1)
    return {
        "skew_kl": float(kl_Q.mean()),
        "missed_mass": float(missed_Q.mean()),
        "top1": float((exact.id_QS[:, 0] == approximate.id_QS[:, 0]).mean()),
    }


def _distributions(
    neighbors: Neighbors, train_label: np.ndarray, temperature: float
) -> SparseDistributions:
    label_QK = train_label[np.maximum(neighbors.row_QK, 0)]
    num_neighbors = neighbors.row_QK.shape[1]
    return sparse_distributions(neighbors.distance_QK, label_QK, temperature, num_neighbors)


def _probability_of(distributions: SparseDistributions, id_QS: np.ndarray) -> np.ndarray:
    """Returns float64 probabilities of given tokens, 0 where a distribution lacks one."""
    row_Q1 = np.arange(len(id_QS), dtype=np.int64)[:, None] << _HALF
    used = distributions.prob_QS > 0
    code_M = (row_Q1 | distributions.id_QS)[used]
    order = np.argsort(code_M)
    code_M, prob_M = code_M[order], distributions.prob_QS[used][order].astype(np.float64)
    wanted = (row_Q1 | id_QS).reshape(-1)
    place = np.minimum(np.searchsorted(code_M, wanted), max(0, len(code_M) - 1))
    return np.where(code_M[place] == wanted, prob_M[place], 0.0)
