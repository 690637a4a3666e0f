"""Neighbours to next-token distributions (paper, section 2, Eq. 3). NumPy, no loop over tokens.

p_kNN(y) is the share of the weights exp(−d / τ) that belongs to neighbours with label y.
Sorting 64-bit words that hold (label, weight) groups the labels: measured several times
faster than sorting in XLA on CPU, and than sorting indices.
"""

import dataclasses

import numpy as np

_HALF = np.uint64(32)
_TILE_ROWS = 256  # What is sorted stays in the cache.
_TINY, _HUGE = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class SparseDistributions:
    """The most probable tokens of Q distributions, by probability, then by id.

    Attributes:
        id_QS: int32 tokens; 0 in unused places.
        prob_QS: float32 probabilities of the whole distribution (so they sum to the mass);
            0 in unused places.
        mass_Q: float32 probability that the kept tokens have together; 0: no distribution.
    """

    id_QS: np.ndarray
    prob_QS: np.ndarray
    mass_Q: np.ndarray


def neighbor_weights(distance_QK: np.ndarray, temperature: float) -> np.ndarray:
    """Returns float32 [Q, K] weights exp((d_min − d) / τ), 0 for missing neighbours.

    As τ goes to 0 the nearest neighbours share the mass; as it grows, all have the same.

    Args:
        distance_QK: float32 squared distances; inf where a neighbour is missing.
        temperature: τ, any positive number.
    """
    smallest_Q = distance_QK.min(axis=1, keepdims=True, initial=np.inf)
    smallest_Q = np.where(np.isfinite(smallest_Q), smallest_Q, 0)
    scaled_QK = smallest_Q - distance_QK
    # 1 / τ must be neither 0 nor inf in float32: 0 · inf is not a number.
    with np.errstate(over="ignore", under="ignore"):
        scaled_QK *= np.float32(min(max(1 / max(temperature, _TINY), _TINY), _HUGE))
        return np.exp(scaled_QK, out=scaled_QK)


def sparse_distributions(
    distance_QK: np.ndarray, neighbor_label_QK: np.ndarray, temperature: float, num_tokens: int
) -> SparseDistributions:
    """Aggregates neighbours by label and keeps the most probable tokens.

    Args:
        distance_QK: float32 exact squared distances; inf where a neighbour is missing.
        neighbor_label_QK: Integer label of each neighbour, not negative; ignored where missing.
        temperature: τ.
        num_tokens: S.
    """
    num_queries = len(distance_QK)
    found = SparseDistributions(
        np.zeros((num_queries, num_tokens), np.int32),
        np.zeros((num_queries, num_tokens), np.float32),
        np.zeros(num_queries, np.float32),
    )
    if distance_QK.size:
        for start in range(0, num_queries, _TILE_ROWS):
            part = slice(start, start + _TILE_ROWS)
            weight_QK = neighbor_weights(distance_QK[part], temperature)
            _aggregate(weight_QK, neighbor_label_QK[part], found.id_QS[part], found.prob_QS[part])
        np.sum(found.prob_QS, axis=1, dtype=np.float32, out=found.mass_Q)
    return found


def _aggregate(
    weight_QK: np.ndarray, label_QK: np.ndarray, id_QS: np.ndarray, prob_QS: np.ndarray
) -> None:
    """Fills in tokens and probabilities of a tile of queries."""
    num_queries = len(weight_QK)
    num_tokens = id_QS.shape[1]
    total_Q = weight_QK.sum(axis=1, dtype=np.float32)

    # (label, weight) in order: equal labels stand together, small weights first.
    packed_QK = label_QK.astype(np.uint64)
    packed_QK <<= _HALF
    packed_QK |= weight_QK.view(np.uint32)
    packed_QK.sort(axis=1)
    label_QK = (packed_QK >> _HALF).astype(np.uint32)
    weight_QK = packed_QK.astype(np.uint32).view(np.float32)

    is_first_QK = np.empty(label_QK.shape, bool)
    is_first_QK[:, 0] = True
    np.not_equal(label_QK[:, 1:], label_QK[:, :-1], out=is_first_QK[:, 1:])
    first_M = np.flatnonzero(is_first_QK)
    sum_M = np.add.reduceat(weight_QK.reshape(-1), first_M)

    # (complement of the mass, label) in order: most probable first, then smallest id.
    count_Q = is_first_QK.sum(axis=1)
    most = max(int(count_Q.max()), num_tokens)
    skipped_Q = np.arange(num_queries) * most - (np.cumsum(count_Q) - count_Q)
    ranked_QM = np.full((num_queries, most), np.uint64(0xFFFFFFFFFFFFFFFF))
    ranked_QM.reshape(-1)[np.arange(len(first_M)) + np.repeat(skipped_Q, count_Q)] = (
        (~sum_M.view(np.uint32)).astype(np.uint64) << _HALF
    ) | label_QK.reshape(-1)[first_M]
    if most > num_tokens:
        ranked_QM.partition(num_tokens - 1, axis=1)
    kept_QS = np.sort(ranked_QM[:, :num_tokens], axis=1)
    sum_QS = (~(kept_QS >> _HALF).astype(np.uint32)).view(np.float32)
    np.divide(sum_QS, total_Q[:, None], out=prob_QS, where=total_Q[:, None] > 0)
    np.copyto(id_QS, kept_QS.astype(np.uint32).view(np.int32), where=prob_QS > 0)


def without_targets(found: SparseDistributions, is_scored_Q: np.ndarray) -> SparseDistributions:
    """Gives rows that are never scored (their label is the separator) mass 0: no target."""
    return SparseDistributions(
        np.where(is_scored_Q[:, None], found.id_QS, 0),
        np.where(is_scored_Q[:, None], found.prob_QS, np.float32(0)),
        np.where(is_scored_Q, found.mass_Q, np.float32(0)),
    )


def with_mass(found: SparseDistributions, min_mass: float) -> SparseDistributions:
    """Keeps of each distribution the fewest tokens that have this mass together, or all.

    Args:
        found: The most probable tokens first.
        min_mass: Up to 1, to the rounding of float32.
    """
    before_QS = np.cumsum(found.prob_QS, axis=1, dtype=np.float64) - found.prob_QS
    prob_QS = np.where(before_QS < min_mass, found.prob_QS, np.float32(0))
    id_QS = np.where(prob_QS > 0, found.id_QS, 0)
    return SparseDistributions(id_QS, prob_QS, prob_QS.sum(axis=1, dtype=np.float32))


class LabelEvidence:
    """What the K neighbours say of each row's own label, for any temperature.

    The kNN-LM needs all K neighbours of every row, never the truncated targets.

    Args:
        distance_NK: float32 squared distances, ascending; inf where a neighbour is missing.
        neighbor_label_NK: Integer label of each neighbour.
        label_N: Integer label of each row.
    """

    def __init__(self, distance_NK: np.ndarray, neighbor_label_NK: np.ndarray, label_N: np.ndarray):
        self._distance_NK = distance_NK
        hits = np.flatnonzero(neighbor_label_NK == label_N[:, None])
        self._hit_row = hits // max(1, distance_NK.shape[1])
        self._hit_distance = distance_NK.reshape(-1)[hits]

    def __len__(self) -> int:
        return len(self._distance_NK)

    @property
    def typical_spread(self) -> float:
        """Median over rows of how much farther the mean neighbour is than the nearest.

        The scale of temperatures: exp(−d / τ) tells neighbours apart where τ is near it. Where
        most rows have no spread (duplicates), it is the median of those that have one.
        """
        is_there_NK = np.isfinite(self._distance_NK)
        count_N = np.maximum(1, is_there_NK.sum(axis=1))
        sum_N = np.where(is_there_NK, self._distance_NK, 0).sum(axis=1, dtype=np.float64)
        nearest_N = np.where(is_there_NK[:, 0], self._distance_NK[:, 0], 0)
        spread_N = sum_N / count_N - nearest_N
        if (spread_N > 0).any() and not np.median(spread_N) > 0:
            spread_N = spread_N[spread_N > 0]
        return float(np.median(spread_N))

    def logprob(self, temperature: float) -> np.ndarray:
        """Returns float64 [N] log p_kNN(label), -inf where no neighbour has the label."""
        nearest_N = self._distance_NK[:, 0].astype(np.float64)
        nearest_N = np.where(np.isfinite(nearest_N), nearest_N, 0)
        total_N = np.empty(len(self), np.float64)
        step = 4096  # Weights of a piece stay in the cache.
        for start in range(0, len(self), step):
            weight = neighbor_weights(self._distance_NK[start : start + step], temperature)
            total_N[start : start + step] = weight.sum(axis=1, dtype=np.float64)
        with np.errstate(over="ignore", under="ignore"):
            hit_weight = np.exp((nearest_N[self._hit_row] - self._hit_distance) / temperature)
        hit_N = np.bincount(self._hit_row, weights=hit_weight, minlength=len(self))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total_N > 0, np.log(hit_N) - np.log(total_N), -np.inf)
