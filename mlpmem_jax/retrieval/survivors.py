"""Which scores may be among the K nearest: a threshold from a sample, and what is within it.

Suffixes: Q queries, C columns of scores, M entries that are kept.
"""

import numpy as np

# Minima of groups stand for the sample in its threshold, as long as few of the wanted share one.
_GROUPS_PER_RANK = 8
_LARGEST_GROUP = 32
FINITE = np.finfo(np.float32).max
_ROUNDING = 8 * 2.0**-24  # Eight standard deviations of the rounding of a float32 product.


def margins(norm_Q: np.ndarray, key_norm: float, key_score: float, width: int) -> np.ndarray:
    """Returns by how much rounding may move a score, or the distance that it stands for.

    Args:
        norm_Q: ‖q − m‖ of each query.
        key_norm: The largest ‖k‖.
        key_score: The largest ‖k − m‖².
        width: D.
    """
    sizes_Q = np.square(norm_Q) + 2 * norm_Q * key_norm + key_score
    return sizes_Q * (2 * _ROUNDING * np.sqrt(width))


class Survivors:
    """Places whose score is within each query's threshold, which only drops."""

    def __init__(self, threshold_Q: np.ndarray, margin_Q: np.ndarray, wanted: int):
        self._threshold_Q = threshold_Q
        self._margin_Q = margin_Q
        self._wanted = wanted
        self._allocate(3 * wanted + 64)

    def _allocate(self, capacity: int) -> None:
        num_queries = len(self._threshold_Q)
        self._count_Q = np.zeros(num_queries, np.int64)
        self._score_QC = np.full((num_queries, capacity), np.inf, np.float32)
        self._place_QC = np.full((num_queries, capacity), -1, np.int64)

    def places(self) -> np.ndarray:
        """Returns int64 places [Q, C], -1 where unused."""
        return self._place_QC[:, : int(self._count_Q.max(initial=1))]

    def add(self, score_QC: np.ndarray, first_place: int) -> None:
        """Keeps what is within the threshold among the scores of consecutive places."""
        # A search in bytes that are nearly all zero runs at the speed of memory.
        kept_M = np.flatnonzero(score_QC <= self._threshold_Q[:, None])
        query_M, column_M = np.divmod(kept_M, score_QC.shape[1])
        self._append(query_M, score_QC[query_M, column_M], first_place + column_M)

    def _append(self, query_M: np.ndarray, score_M: np.ndarray, place_M: np.ndarray) -> None:
        """Adds entries whose queries are ascending."""
        added_Q = np.bincount(query_M, minlength=len(self._count_Q))
        if (self._count_Q + added_Q).max(initial=0) > self._place_QC.shape[1]:
            self.tighten()
            most = int((self._count_Q + added_Q).max())
            if most > self._place_QC.shape[1]:
                self._rewrite(most + 2 * self._wanted)
        start_Q = np.cumsum(added_Q) - added_Q
        column_M = np.arange(len(query_M)) + (self._count_Q - start_Q)[query_M]
        self._score_QC[query_M, column_M] = score_M
        self._place_QC[query_M, column_M] = place_M
        self._count_Q += added_Q

    def tighten(self) -> np.ndarray:
        """Drops what can no longer be among the K nearest.

        Returns:
            For each query, up to which score every place must have been kept.
        """
        most = int(self._count_Q.max(initial=0))
        needed_Q = _kth_smallest(self._score_QC[:, :most], self._wanted) + self._margin_Q
        self._threshold_Q = np.minimum(self._threshold_Q, needed_Q).astype(np.float32)
        self._rewrite(self._place_QC.shape[1])
        return needed_Q

    def _rewrite(self, capacity: int) -> None:
        is_kept = (self._score_QC <= self._threshold_Q[:, None]) & (self._place_QC >= 0)
        query_M, column_M = np.nonzero(is_kept)
        score_M, place_M = self._score_QC[query_M, column_M], self._place_QC[query_M, column_M]
        self._allocate(capacity)
        self._append(query_M, score_M, place_M)


def sample_threshold(sample: list[np.ndarray], rank: int) -> np.ndarray:
    """Returns a score for each query that about `rank` of the sampled keys are within."""
    num_sampled = sum(part.shape[1] for part in sample)
    group = _LARGEST_GROUP
    while group > 1 and num_sampled < group * rank * _GROUPS_PER_RANK:
        group //= 2
    minima = []
    for score_QC in sample:
        num_queries, num_columns = score_QC.shape
        # What is left over, if the sample is so small, only makes the threshold larger.
        score_QC = score_QC[:, : num_columns - num_columns % group]
        minima.append(score_QC.reshape(num_queries, group, -1).min(axis=1))
    return _kth_smallest(np.concatenate(minima, axis=1), rank)


def _kth_smallest(values_QG: np.ndarray, rank: int) -> np.ndarray:
    """Returns the rank-th smallest value of each row, inf where there are fewer."""
    if rank > values_QG.shape[1]:
        return np.full(len(values_QG), np.inf, np.float32)
    return np.partition(values_QG, rank - 1, axis=1)[:, rank - 1]
