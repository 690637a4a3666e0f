"""Centroids with groups above them: cells stay small however many rows there are.

A key is compared with the groups, and then with the centroids around the nearest one.

Suffixes: C centroids, G groups, M centroids around a group, S sampled rows, B keys of a block, Q
queries, V centroids that are wanted.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from jax.sharding import Mesh

from mlpmem_jax.retrieval.cells import Assigner, train_centroids
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.engine import row_ranges
from mlpmem_jax.retrieval.merge import nearest

# A query is compared with so many centroids; up to so many there is one group, and it is compared
# with all. Measured on 7,812 cells: 0.99 of the nearest 12 are among them.
_AROUND = 2048
# A key with fewer, to find the cell that it belongs to.
_AROUND_TO_ASSIGN = 512
_FINENESS = 4  # Groups are so many times √C.
_SAMPLED_PER_GROUP = 64
_SCORES = 1 << 23  # Of queries and centroids at once.
_SPARE = 8  # Compared again by differences, so that rounding decides nothing.


def num_groups(cells: int) -> int:
    """Returns the groups of so many centroids."""
    return 1 if cells <= _AROUND else _FINENESS * math.isqrt(cells)


def compared(cells: int, *, is_query: bool = True) -> int:
    """Returns the products that choosing among so many centroids takes, of a query or a key."""
    if num_groups(cells) == 1:
        return cells
    return num_groups(cells) + (_AROUND if is_query else _AROUND_TO_ASSIGN)


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Centroids of cells, and of groups of these.

    Attributes:
        centroid_CD: float32.
        group_GD: float32; a single one: all centroids are compared.
    """

    centroid_CD: np.ndarray
    group_GD: np.ndarray

    def nearest(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Returns the nearest centroids by (distance, number), int64 [Q, V].

        With several groups, the nearest of those around the group that is nearest to a query;
        if more than a quarter of these are wanted, of all.
        """
        if len(self.group_GD) == 1 or 4 * count > _AROUND:
            every_C = np.arange(len(self.centroid_CD))
            return self._nearest(query_QD, every_C, count)
        number_QV = np.empty((len(query_QD), count), np.int64)
        group_Q = _in_blocks(query_QD, self.group_GD)
        for group, place_Q in members(group_Q):
            around_M = np.sort(self._around_GM[group])  # Of equal distances the first.
            number_QV[place_Q] = self._nearest(query_QD[place_Q], around_M, count)
        return number_QV

    def assigned(self, key_BD: np.ndarray, group_B: np.ndarray) -> np.ndarray:
        """Returns the nearest of few centroids around the group of each key, int32 [B]."""
        number_B = np.empty(len(key_BD), np.int32)
        for group, place_B in members(group_B):
            around_M = np.sort(self._around_GM[group, :_AROUND_TO_ASSIGN])
            score_BM = _scores(key_BD[place_B], self.centroid_CD[around_M])
            number_B[place_B] = around_M[score_BM.argmin(axis=1)]
        return number_B

    @functools.cached_property
    def _around_GM(self) -> np.ndarray:
        """The centroids nearest to each group, nearest first: int32."""
        count = min(_AROUND, len(self.centroid_CD))
        around_GM = np.empty((len(self.group_GD), count), np.int32)
        for part in _parts(len(self.group_GD), len(self.centroid_CD)):
            score_GC = _scores(self.group_GD[part], self.centroid_CD)
            around_GM[part] = np.argsort(score_GC, axis=1, kind="stable")[:, :count]
        return around_GM

    def _nearest(self, query_QD: np.ndarray, number_M: np.ndarray, count: int) -> np.ndarray:
        """Returns the nearest of some centroids, int64 [Q, V]."""
        centroid_MD = self.centroid_CD
        if len(number_M) < len(centroid_MD):
            centroid_MD = centroid_MD[number_M]
        kept = min(count + _SPARE, len(number_M))
        place_QV = np.empty((len(query_QD), kept), np.int64)
        for part in _parts(len(query_QD), len(number_M)):
            score_QM = _scores(query_QD[part], centroid_MD)
            place_QV[part] = np.argpartition(score_QM, kept - 1, axis=1)[:, :kept]
        distance_QV = squared_distances(query_QD, centroid_MD, place_QV)
        return nearest(distance_QV, number_M[place_QV], count).row_QK


def one_group(centroid_CD: np.ndarray) -> Centroids:
    """Returns centroids that are all compared."""
    return Centroids(centroid_CD, centroid_CD.mean(axis=0, keepdims=True))


def train(sample_SD: np.ndarray, cells: int, mesh: Mesh) -> Centroids:
    """Trains centroids by k-means: of groups on a part of the sample, then inside each group.

    Args:
        sample_SD: float32 keys in a random order.
        cells: C; of several groups each has a power of two, and C is met on average.
        mesh: Devices, each with its share of the sample.
    """
    if num_groups(cells) == 1:
        return one_group(train_centroids(sample_SD, cells, mesh))
    groups = min(num_groups(cells), len(sample_SD))
    group_GD = train_centroids(sample_SD[: _SAMPLED_PER_GROUP * groups], groups, mesh)
    group_S = Assigner(group_GD, mesh)(sample_SD)
    inside = [
        train_centroids(sample_SD[row_S], _power_of_two(cells * len(row_S), len(sample_SD)), mesh)
        for _, row_S in members(group_S)  # Still in a random order.
    ]
    return Centroids(np.concatenate(inside), group_GD)


def _power_of_two(number: int, divisor: int) -> int:
    """Returns the power of two that is nearest to a quotient, and at least one."""
    return 1 << max(0, round(math.log2(number / divisor)))


def assigner(centroids: Centroids, mesh: Mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from float32 keys [B, D] to the centroid of each, int32 [B].

    Args:
        centroids: With one group the nearest is found on the mesh, otherwise the nearest group.
        mesh: Devices of one process.
    """
    if len(centroids.group_GD) == 1:
        return Assigner(centroids.centroid_CD, mesh)
    group_of = Assigner(centroids.group_GD, mesh)
    return lambda key_BD: centroids.assigned(key_BD, group_of(key_BD))


def members(group_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each number that occurs, and its places in order."""
    order_N = np.argsort(group_N, kind="stable")
    found, first = np.unique(group_N[order_N], return_index=True)
    return zip(found.tolist(), np.split(order_N, first[1:]), strict=True)


def _scores(query_QD: np.ndarray, centroid_CD: np.ndarray) -> np.ndarray:
    """Returns squared distances up to a constant of the query, float32 [Q, C]."""
    mean_D = centroid_CD.mean(axis=0)  # Centred: products round less.
    centred_CD = centroid_CD - mean_D
    score_QC = (-2 * (query_QD - mean_D)) @ centred_CD.T
    score_QC += np.einsum("cd,cd->c", centred_CD, centred_CD)
    return score_QC


def _in_blocks(query_QD: np.ndarray, centroid_CD: np.ndarray) -> np.ndarray:
    """Returns the nearest centroid of each query, int64 [Q]."""
    parts = _parts(len(query_QD), len(centroid_CD))
    found = [_scores(query_QD[part], centroid_CD).argmin(axis=1) for part in parts]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _parts(num_queries: int, cells: int) -> Iterator[slice]:
    return row_ranges(num_queries, max(1, _SCORES // cells))
