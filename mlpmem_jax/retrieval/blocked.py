"""Exact nearest neighbours on the host's CPU, close to the speed of the matrix product.

`lax.top_k` over a million columns costs several times the product that made them. Here a
block of scores stays in the cache: XLA also returns the minimum of each group of 32
columns, and NumPy opens only the groups whose minimum beats the query's threshold. The
threshold comes from a sample of the keys, is checked in the end, and otherwise only drops
to the K-th best score seen plus the rounding error of the product, so nothing that
belongs to the K nearest is lost. Survivors are scored again by differences.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.merge import Neighbors, concatenate, fit, sortable, unpack

# A block of scores is 512 x 8192 float32: the fastest of 128…1024 queries, 4096…65536 keys.
_QUERIES = 512
_KEYS = 8192
_GROUP = 32
_SAMPLE_BLOCKS = 4
_ROUNDING = 8 * 2.0**-24  # Eight standard deviations of the rounding of a float32 product.
_RANK_GROWTH = 8
_FEW_QUERIES = 32  # Up to here a product for each query costs less than a padded block.
_ALIGNED_BYTES = 64  # XLA adopts memory with this alignment instead of copying it.


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _scores(
    buffer_QC: jax.Array, query_QA: jax.Array, key_CA: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns scores [Q, C] and the minima of groups g, g + G, g + 2 G, … as [Q, G].

    The last of the A = D + 1 columns is 1 in queries and ‖key − mean‖² in keys, so that the
    product alone is the squared distance, up to a constant a query.
    """
    del buffer_QC  # Its memory takes the result: fresh pages would cost as much again.
    score_QC = jnp.einsum("qa,ca->qc", query_QA, key_CA, precision=jax.lax.Precision.HIGHEST)
    return score_QC, score_QC.reshape(len(query_QA), _GROUP, -1).min(axis=1)


class BlockedSearch:
    """Exact search among rows that one process holds in memory, once, as float32.

    Args:
        num_rows: N.
        width: D.
        read: Returns keys [start, stop) in any float dtype.
    """

    def __init__(self, num_rows: int, width: int, read: Callable[[int, int], np.ndarray]):
        self.num_rows = num_rows
        self._width = width
        num_blocks = max(1, -(-num_rows // _KEYS))
        self._key_NA = _aligned_zeros(num_blocks * _KEYS, width + 1)
        sum_D = np.zeros(width)
        for part in self._parts():
            self._key_NA[part, :width] = read(part.start, part.stop)
            sum_D += self._key_NA[part, :width].sum(axis=0, dtype=np.float64)
        self._mean_D = (sum_D / max(1, num_rows)).astype(np.float32)
        largest = [self._fill_norms(part) for part in self._parts()]
        self._largest_norm, self._largest_score = np.max(largest, axis=0, initial=0.0)
        self._key_NA[num_rows:, width] = np.inf  # Rows that fill the last block are never near.
        self._blocks = [
            jax.device_put(self._key_NA[n * _KEYS : (n + 1) * _KEYS], may_alias=True)
            for n in range(num_blocks)
        ]
        self._num_sampled = min(num_rows, _SAMPLE_BLOCKS * _KEYS)
        rows = np.linspace(0, max(0, num_rows - 1), self._num_sampled, dtype=np.int64)
        rows = np.pad(rows, (0, -len(rows) % _KEYS), constant_values=len(self._key_NA) - 1)
        padding = np.zeros((_KEYS, width + 1), np.float32)
        padding[:, width] = np.inf
        self._sample = []
        for start in range(0, len(rows), _KEYS):
            real = max(0, min(_KEYS, self._num_sampled - start))
            sample = padding.copy()
            sample[:real] = self._key_NA[rows[start : start + real]]
            self._sample.append(jnp.asarray(sample))

    def _parts(self) -> list[slice]:
        return [
            slice(start, min(start + _KEYS, self.num_rows))
            for start in range(0, self.num_rows, _KEYS)
        ]

    def _fill_norms(self, part: slice) -> tuple[float, float]:
        """Fills in ‖key − mean‖²; returns the largest ‖key‖ and the largest of these."""
        key_CD = self._key_NA[part, : self._width]
        centred_CD = key_CD - self._mean_D
        norm_C = np.einsum("cd,cd->c", centred_CD, centred_CD, dtype=np.float64)
        # score = ‖k − m‖² − 2 k·(q − m) is ‖k − q‖² up to a constant of the query.
        self._key_NA[part, self._width] = norm_C
        squared_C = np.einsum("cd,cd->c", key_CD, key_CD)
        return float(np.sqrt(squared_C.max())), float(norm_C.max())

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns the nearest rows, ordered by (distance, row).

        Args:
            query_QD: float32 queries.
            num_neighbors: K; lists are filled up where there are fewer rows.
        """
        wanted = min(num_neighbors, self.num_rows)
        if 0 < len(query_QD) <= _FEW_QUERIES:
            return fit(self._search_few(query_QD, wanted), num_neighbors)
        pieces = [query_QD[start : start + _QUERIES] for start in range(0, len(query_QD), _QUERIES)]
        # While NumPy selects for one piece, XLA multiplies for another.
        workers = max(1, min(len(pieces), max(2, (os.cpu_count() or 2) // 2)))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(lambda piece: self._search(piece, wanted), pieces))
        if not parts:
            parts = [Neighbors(np.empty((0, wanted), np.float32), np.empty((0, wanted), np.int64))]
        return fit(concatenate(parts), num_neighbors)

    def _search_few(self, query_QD: np.ndarray, wanted: int) -> Neighbors:
        """Scores every row without padding to a block: a token's search in generation."""
        query_QA, margin_Q = self._augmented(query_QD, len(query_QD))
        found = []
        for query_D, query_A, margin in zip(query_QD, query_QA, margin_Q, strict=True):
            score_N = (self._key_NA @ query_A)[: self.num_rows]
            threshold = np.partition(score_N, wanted - 1)[wanted - 1] + margin
            row_C = np.flatnonzero(score_N <= threshold)
            distance_C = squared_distances(
                query_D[None], self._key_NA[:, : self._width], row_C[None]
            )[0]
            packed = np.sort(sortable(distance_C, row_C))[:wanted]
            found.append(Neighbors(*(part[None] for part in unpack(packed))))
        return concatenate(found)

    def _augmented(self, query_QD: np.ndarray, num_padded: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns queries as `_scores` takes them [num_padded, A], and their margins [Q]."""
        num_queries = len(query_QD)
        query_QA = np.zeros((num_padded, self._width + 1), np.float32)
        query_QA[:num_queries, : self._width] = query_QD - self._mean_D
        norm_Q = np.linalg.norm(query_QA[:num_queries].astype(np.float64), axis=1)
        query_QA[:, : self._width] *= -2
        query_QA[:num_queries, self._width] = 1  # Rows of padding stay zero: 0 · inf is NaN.
        margin_Q = (self._largest_score + 2 * norm_Q * self._largest_norm) * (
            2 * _ROUNDING * np.sqrt(self._width)
        )
        return query_QA, margin_Q

    def _search(self, query_QD: np.ndarray, wanted: int) -> Neighbors:
        distance_QK = np.empty((len(query_QD), wanted), np.float32)
        row_QK = np.empty((len(query_QD), wanted), np.int64)
        # So many of the K nearest are expected in the sample; the surplus makes it near
        # certain that the threshold lets all K pass.
        expected = wanted * self._num_sampled / self.num_rows
        rank = min(wanted, int(np.ceil(expected + 5 * np.sqrt(expected) + 3)))
        remaining = np.arange(len(query_QD))
        while len(remaining):
            row_RC, is_complete = self._survivors(query_QD[remaining], wanted, rank)
            done = remaining[is_complete]
            row_RC = row_RC[is_complete]
            distance_RC = squared_distances(
                query_QD[done], self._key_NA[:, : self._width], np.maximum(row_RC, 0)
            )
            distance_RC[row_RC < 0] = np.inf
            packed = sortable(distance_RC, np.maximum(row_RC, 0))
            packed.sort(axis=1)
            distance_QK[done], row_QK[done] = unpack(packed[:, :wanted])
            remaining = remaining[~is_complete]
            rank *= _RANK_GROWTH
        return Neighbors(distance_QK, row_QK)

    def _survivors(
        self, query_QD: np.ndarray, wanted: int, rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns candidates [Q, C], and for each query whether they hold its K nearest."""
        num_queries = len(query_QD)
        query_QA, margin_Q = self._augmented(query_QD, _QUERIES)
        queries = jnp.asarray(query_QA)
        scores = jnp.zeros((_QUERIES, _KEYS), jnp.float32)
        minima = []
        for keys in self._sample:
            scores, minima_QG = _scores(scores, queries, keys)
            minima.append(np.asarray(minima_QG)[:num_queries])
        first_Q = _kth_smallest(np.concatenate(minima, axis=1), rank) + margin_Q
        survivors = _Survivors(first_Q.astype(np.float32), margin_Q, wanted)
        for number, keys in enumerate(self._blocks):
            scores, minima_QG = _scores(scores, queries, keys)
            survivors.add(
                np.asarray(scores)[:num_queries],
                np.asarray(minima_QG)[:num_queries],
                number * _KEYS,
                min(_KEYS, self.num_rows - number * _KEYS),
            )
        needed_Q = survivors.tighten()
        return survivors.rows(), needed_Q <= first_Q


class _Survivors:
    """Rows whose score is within each query's threshold, which only drops."""

    def __init__(self, threshold_Q: np.ndarray, margin_Q: np.ndarray, wanted: int):
        self._threshold_Q = threshold_Q
        self._margin_Q = margin_Q
        self._wanted = wanted
        self._allocate(3 * wanted + 64)

    def _allocate(self, capacity: int) -> None:
        num_queries = len(self._threshold_Q)
        self._count_Q = np.zeros(num_queries, np.int64)
        self._score_QC = np.full((num_queries, capacity), np.inf, np.float32)
        self._row_QC = np.full((num_queries, capacity), -1, np.int64)

    def rows(self) -> np.ndarray:
        """Returns int64 rows [Q, C], -1 in unused places."""
        return self._row_QC[:, : int(self._count_Q.max(initial=1))]

    def add(
        self, score_QC: np.ndarray, minima_QG: np.ndarray, first_row: int, num_rows: int
    ) -> None:
        """Keeps what is within the threshold among the scores of `num_rows` rows."""
        num_queries, num_groups = minima_QG.shape
        opened_M = np.flatnonzero(minima_QG <= self._threshold_Q[:, None])
        query_M, group_M = np.divmod(opened_M, num_groups)
        value_MW = score_QC.reshape(num_queries, _GROUP, num_groups)[query_M, :, group_M]
        kept = np.flatnonzero(value_MW <= self._threshold_Q[query_M, None])
        number, member = np.divmod(kept, _GROUP)
        column = group_M[number] + member * num_groups
        real = column < num_rows  # Unless the threshold is infinite all are.
        if not real.all():
            kept, number, column = kept[real], number[real], column[real]
        self._append(query_M[number], value_MW.reshape(-1)[kept], first_row + column)

    def _append(self, query_M: np.ndarray, score_M: np.ndarray, row_M: np.ndarray) -> None:
        """Adds entries whose queries are ascending."""
        added_Q = np.bincount(query_M, minlength=len(self._count_Q))
        if (self._count_Q + added_Q).max(initial=0) > self._row_QC.shape[1]:
            self.tighten()
            most = int((self._count_Q + added_Q).max())
            if most > self._row_QC.shape[1]:
                self._rewrite(most + 2 * self._wanted)
        start_Q = np.cumsum(added_Q) - added_Q
        place_M = np.arange(len(query_M)) + (self._count_Q - start_Q)[query_M]
        self._score_QC[query_M, place_M] = score_M
        self._row_QC[query_M, place_M] = row_M
        self._count_Q += added_Q

    def tighten(self) -> np.ndarray:
        """Drops what can no longer be among the K nearest.

        Returns:
            For each query, up to which score every row must have been kept.
        """
        most = int(self._count_Q.max(initial=0))
        needed_Q = _kth_smallest(self._score_QC[:, :most], self._wanted) + self._margin_Q
        self._threshold_Q = np.minimum(self._threshold_Q, needed_Q).astype(np.float32)
        self._rewrite(self._row_QC.shape[1])
        return needed_Q

    def _rewrite(self, capacity: int) -> None:
        is_kept = (self._score_QC <= self._threshold_Q[:, None]) & (self._row_QC >= 0)
        query_M, place_M = np.nonzero(is_kept)
        score_M, row_M = self._score_QC[query_M, place_M], self._row_QC[query_M, place_M]
        self._allocate(capacity)
        self._append(query_M, score_M, row_M)


def _kth_smallest(values_QG: np.ndarray, rank: int) -> np.ndarray:
    """Returns the rank-th smallest value of each row, inf where there are fewer."""
    if rank > values_QG.shape[1]:
        return np.full(len(values_QG), np.inf, np.float32)
    return np.partition(values_QG, rank - 1, axis=1)[:, rank - 1]


def _aligned_zeros(num_rows: int, num_columns: int) -> np.ndarray:
    size = num_rows * num_columns * 4
    memory = np.zeros(size + _ALIGNED_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNED_BYTES
    return memory[start : start + size].view(np.float32).reshape(num_rows, num_columns)
