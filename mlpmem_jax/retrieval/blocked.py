"""Exact nearest neighbours on the host's CPU, close to the speed of the matrix product.

`lax.top_k` over a million columns costs several times the product that made them. Here XLA
multiplies one block at a time, and NumPy keeps of its scores what is within the query's
threshold: one comparison a score. The threshold comes from a sample of the keys, which is
scored first, is checked in the end, and otherwise only drops to the K-th best score seen plus
the rounding error of the product, so nothing that belongs to the K nearest is lost. Survivors
are scored again by differences.
"""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.merge import (
    MISSING_ROW,
    Neighbors,
    concatenate,
    fit,
    nearest,
    no_neighbors,
    sortable,
    unpack,
)
from mlpmem_jax.retrieval.survivors import FINITE, Survivors, margins, sample_threshold

# A block of scores is 1024 x 8192 float32: keys are packed for a product once for so many
# queries, a tenth faster than for 512. Fewer queries meet as many more keys at once.
_QUERIES = 1024
_KEYS = 8192
_LEAST_KEYS = 64
_SAMPLE_ROWS = 4 * 8192
_RANK_GROWTH = 8
_ALIGNED_BYTES = 64  # XLA adopts memory with this alignment instead of copying it.


@jax.jit
def block_scores(query_QA: jax.Array, key_CA: jax.Array) -> jax.Array:
    """Returns scores [Q, C].

    The last of the A = D + 1 columns is 1 in queries and ‖key − mean‖² in keys, so that the
    product alone is the squared distance, up to a constant a query.
    """
    return jnp.einsum("qa,ca->qc", query_QA, key_CA, precision=jax.lax.Precision.HIGHEST)


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
        self._num_sampled = min(num_rows, _SAMPLE_ROWS)
        self._row_N, place_N = _sample_first(num_rows, self._num_sampled)
        self._key_NA = aligned_zeros(_padded_rows(num_rows), width + 1)
        sum_D = np.zeros(width)
        for part in _parts(num_rows):
            key_CD = read(part.start, part.stop)
            self._key_NA[place_N[part], :width] = key_CD
            sum_D += key_CD.sum(axis=0, dtype=np.float64)
        self._mean_D = (sum_D / max(1, num_rows)).astype(np.float32)
        largest = [self._fill_norms(part) for part in _parts(num_rows)]
        self._largest_norm, self._largest_score = np.max(largest, axis=0, initial=0.0)
        self._key_NA[num_rows:, width] = np.inf  # Rows that fill the last block are never near.
        self._blocks: dict[int, list[jax.Array]] = {}

    def _fill_norms(self, part: slice) -> tuple[float, float]:
        """Fills in ‖key − mean‖²; returns the largest ‖key‖ and the largest of these."""
        key_CD = self._key_NA[part, : self._width]
        centred_CD = key_CD - self._mean_D
        norm_C = np.einsum("cd,cd->c", centred_CD, centred_CD, dtype=np.float64)
        # score = ‖k − m‖² − 2 k·(q − m) is ‖k − q‖² up to a constant of the query.
        self._key_NA[part, self._width] = norm_C
        squared_C = np.einsum("cd,cd->c", key_CD, key_CD)
        return float(np.sqrt(squared_C.max())), float(norm_C.max())

    def search(
        self, query_QD: np.ndarray, num_neighbors: int, skipped_Q2: np.ndarray | None = None
    ) -> Neighbors:
        """Returns the nearest rows, ordered by (distance, row).

        Args:
            query_QD: float32 queries.
            num_neighbors: K; lists are filled up where there are fewer rows.
            skipped_Q2: Rows [start, stop) that are no neighbours of each query; None: none.
        """
        wanted = min(num_neighbors, self.num_rows)
        place_QI2 = np.empty((len(query_QD), 0, 2), np.int64)
        if skipped_Q2 is not None:
            place_QI2 = self._places_of(skipped_Q2)
        parts = _in_pieces(
            len(query_QD), lambda one: self._search(query_QD[one], place_QI2[one], wanted)
        )
        return fit(concatenate([*parts, no_neighbors(0, wanted)]), num_neighbors)

    def search_within(
        self, query_QD: np.ndarray, distance_Q: np.ndarray, num_neighbors: int
    ) -> Neighbors:
        """Returns the nearest rows that are no farther than a distance of each query.

        Args:
            query_QD: float32 queries.
            distance_Q: float32, inf for any. It is the threshold, in place of a sample.
            num_neighbors: K, at most.

        Returns:
            Lists ordered by (distance, row), as long as the longest that was found.
        """
        wanted = min(num_neighbors, self.num_rows)
        parts = _in_pieces(
            len(query_QD), lambda one: self._within(query_QD[one], distance_Q[one], wanted)
        )
        longest = max((part.row_QK.shape[1] for part in parts), default=0)
        return concatenate([no_neighbors(0, longest), *(fit(part, longest) for part in parts)])

    def _within(self, query_QD: np.ndarray, distance_Q: np.ndarray, wanted: int) -> Neighbors:
        num_queries = len(query_QD)
        query_QA, margin_Q = self._augmented(query_QD, _padded_queries(num_queries))
        # A score is a squared distance less what this is of its query.
        centred_QD = query_QD - self._mean_D.astype(np.float64)
        constant_Q = np.einsum("qd,qd->q", centred_QD, centred_QD + 2 * self._mean_D)
        threshold_Q = np.minimum(distance_Q - constant_Q + margin_Q, FINITE).astype(np.float32)
        survivors = Survivors(threshold_Q, margin_Q, wanted)
        queries, start = jnp.asarray(query_QA), 0
        for keys in self._blocks_for(len(query_QA)):
            score_QC = np.asarray(block_scores(queries, keys))[:num_queries]
            survivors.add(score_QC[:, : self.num_rows - start], start)
            start += len(keys)
        survivors.tighten()
        place_QC = survivors.places()
        # Few lists are long: distances of the places that are used alone.
        query_M, column_M = np.nonzero(place_QC >= 0)
        place_M1 = place_QC[query_M, column_M][:, None]
        distance_QC = np.full(place_QC.shape, np.inf, np.float32)
        for part in (slice(start, start + _KEYS) for start in range(0, len(query_M), _KEYS)):
            some_QD, key_ND = query_QD[query_M[part]], self._key_NA[:, : self._width]
            distance_B1 = squared_distances(some_QD, key_ND, place_M1[part])
            distance_QC[query_M[part], column_M[part]] = distance_B1[:, 0]
        distance_QC[distance_QC > distance_Q[:, None]] = np.inf
        row_QC = self._row_N[np.maximum(place_QC, 0)]
        longest = min(wanted, int(np.isfinite(distance_QC).sum(axis=1).max(initial=0)))
        return nearest(distance_QC, row_QC, longest)

    def _places_of(self, row_Q2: np.ndarray) -> np.ndarray:
        """Returns the places of a range of rows of each query: two ranges, int64 [Q, 2, 2]."""
        sampled_Q2 = np.searchsorted(self._row_N[: self._num_sampled], row_Q2)
        return np.stack([sampled_Q2, self._num_sampled + row_Q2 - sampled_Q2], axis=1)

    def _search(self, query_QD: np.ndarray, place_QI2: np.ndarray, wanted: int) -> Neighbors:
        found = no_neighbors(len(query_QD), wanted)
        # So many of the K nearest are expected in the sample; the surplus makes it near
        # certain that the threshold lets all K pass.
        expected = wanted * self._num_sampled / self.num_rows
        rank = min(wanted, int(np.ceil(expected + 5 * np.sqrt(expected) + 3)))
        remaining = np.arange(len(query_QD))
        while len(remaining):
            place_RC, is_complete = self._survivors(
                query_QD[remaining], place_QI2[remaining], wanted, rank
            )
            done = remaining[is_complete]
            if len(done):  # Lists that are not complete may be shorter than K.
                some = self._ranked(query_QD[done], place_RC[is_complete])
                distance, row = (one[:, :wanted] for one in some)
                found.distance_QK[done, : distance.shape[1]] = distance
                found.row_QK[done, : row.shape[1]] = np.where(np.isinf(distance), MISSING_ROW, row)
            remaining = remaining[~is_complete]
            rank *= _RANK_GROWTH
        return found

    def _ranked(self, query_QD: np.ndarray, place_QC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns distances and rows of candidates in order, both [Q, C]."""
        is_used_QC = place_QC >= 0
        place_QC = np.maximum(place_QC, 0)
        distance_QC = squared_distances(query_QD, self._key_NA[:, : self._width], place_QC)
        distance_QC[~is_used_QC] = np.inf
        packed = sortable(distance_QC, self._row_N[place_QC])
        packed.sort(axis=1)
        return unpack(packed)

    def _augmented(self, query_QD: np.ndarray, num_padded: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns queries as `block_scores` takes them [num_padded, A], and their margins [Q]."""
        num_queries = len(query_QD)
        query_QA = np.zeros((num_padded, self._width + 1), np.float32)
        query_QA[:num_queries, : self._width] = query_QD - self._mean_D
        norm_Q = np.linalg.norm(query_QA[:num_queries].astype(np.float64), axis=1)
        query_QA[:, : self._width] *= -2
        query_QA[:num_queries, self._width] = 1  # Rows of padding stay zero: 0 · inf is NaN.
        margin_Q = margins(norm_Q, self._largest_norm, self._largest_score, self._width)
        return query_QA, margin_Q

    def _survivors(
        self, query_QD: np.ndarray, place_QI2: np.ndarray, wanted: int, rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns places of candidates [Q, C], and for each query whether all K nearest are."""
        num_queries = len(query_QD)
        query_QA, margin_Q = self._augmented(query_QD, _padded_queries(num_queries))
        blocks = self._blocks_for(len(query_QA))
        queries = jnp.asarray(query_QA)
        block_rows = len(blocks[0])
        num_first = -(-self._num_sampled // block_rows)

        def allowed(product: jax.Array, start: int) -> np.ndarray:
            score_QC = np.asarray(product)[:num_queries, : self.num_rows - start]
            return _without(score_QC, place_QI2 - start)

        products = [block_scores(queries, keys) for keys in blocks[:num_first]]
        first = [allowed(one, number * block_rows) for number, one in enumerate(products)]
        sample_Q = sample_threshold(
            [
                score_QC[:, : self._num_sampled - number * block_rows]
                for number, score_QC in enumerate(first)
            ],
            rank,
        )
        first_Q = sample_Q + margin_Q
        # Finite: what is skipped has an infinite score.
        threshold_Q = np.minimum(first_Q, FINITE).astype(np.float32)
        survivors = Survivors(threshold_Q, margin_Q, wanted)
        for number, keys in enumerate(blocks):
            start = number * block_rows
            score_QC = first.pop(0) if first else allowed(block_scores(queries, keys), start)
            survivors.add(score_QC, start)
        needed_Q = survivors.tighten()
        return survivors.places(), needed_Q <= first_Q

    def _blocks_for(self, num_queries: int) -> list[jax.Array]:
        """Returns all keys in blocks, the larger the fewer the queries."""
        rows = _KEYS * (_QUERIES // num_queries)
        if rows not in self._blocks:
            self._blocks[rows] = [
                jax.device_put(self._key_NA[start : start + rows], host_device(), may_alias=True)
                for start in range(0, len(self._key_NA), rows)
            ]
        return self._blocks[rows]


def _in_pieces(num_queries: int, search: Callable[[slice], Neighbors]) -> list[Neighbors]:
    """Searches piece by piece: while NumPy selects for one, XLA multiplies for another."""
    starts = range(0, num_queries, _QUERIES)
    pieces = [slice(start, start + _QUERIES) for start in starts]
    workers = max(1, min(len(pieces), max(2, (os.cpu_count() or 2) // 2)))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(search, pieces))


def _padded_queries(num_queries: int) -> int:
    return min(_QUERIES, 1 << (num_queries - 1).bit_length())


def host_device() -> jax.Device:
    """Returns a CPU device of this process: selection is NumPy's, and keys are in host memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        return jax.local_devices()[0]


def _padded_rows(num_rows: int) -> int:
    """Returns whole blocks; less than one is a power of two, of which few are compiled."""
    if num_rows < _KEYS:
        return max(_LEAST_KEYS, 1 << (num_rows - 1).bit_length())
    return -(-num_rows // _KEYS) * _KEYS


def _without(score_QC: np.ndarray, column_QI2: np.ndarray) -> np.ndarray:
    """Returns scores, infinite in the columns [start, stop) of each query."""
    column_QI2 = np.clip(column_QI2, 0, score_QC.shape[1])
    if not (column_QI2[:, :, 0] < column_QI2[:, :, 1]).any():
        return score_QC
    score_QC = np.array(score_QC)  # XLA's own cannot be written to.
    # Queries come in the order of rows: those of a document share its ranges.
    is_new_Q = np.append(True, (column_QI2[1:] != column_QI2[:-1]).any(axis=(1, 2)))
    bound_G = np.append(np.flatnonzero(is_new_Q), len(score_QC)).tolist()
    for first, last in itertools.pairwise(bound_G):
        for start, stop in column_QI2[first].tolist():
            score_QC[first:last, start:stop] = np.inf
    return score_QC


def _sample_first(num_rows: int, num_sampled: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row at each place, the sample first, and the place of each row: int64 [N]."""
    sampled = np.linspace(0, max(0, num_rows - 1), num_sampled, dtype=np.int64)
    row_N = np.concatenate([sampled, np.delete(np.arange(num_rows), sampled)])
    place_N = np.empty_like(row_N)
    place_N[row_N] = np.arange(num_rows)
    return row_N, place_N


def _parts(num_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _KEYS, num_rows)) for start in range(0, num_rows, _KEYS))


def aligned_zeros(num_rows: int, num_columns: int) -> np.ndarray:
    size = num_rows * num_columns * 4
    memory = np.zeros(size + _ALIGNED_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNED_BYTES
    return memory[start : start + size].view(np.float32).reshape(num_rows, num_columns)
