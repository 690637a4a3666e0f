"""Centroids with groups above them: cells stay small however many rows there are.

A key is compared with the groups, and then with the centroids around the nearest one.

Suffixes: C centroids, G groups, M centroids around a group, S sampled rows, B keys of a block, Q
queries, V centroids that are wanted.
"""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.parallel.agreement import array_of_first
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.retrieval.cells import Assigner, train_centroids
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.engine import READ_ROWS, row_ranges
from mlpmem_jax.retrieval.merge import nearest

# Centroids that a query is compared with. Up to this number there is a single group.
_AROUND = 2048
_AROUND_TO_ASSIGN = 512  # That a key is compared with, to find its cell while cells are made.
_FINENESS = 4  # Groups for √C centroids.
_SAMPLED_PER_GROUP = 64
# Cells that were split have one centroid: more of them would leave no place for others.
_MOST_COPIES = 256
_SCORES = 1 << 23  # Of queries and centroids at once.
_SPARE = 8  # Compared again by differences, so that rounding has no effect.


def num_groups(cells: int) -> int:
    """Returns the groups of so many centroids."""
    return 1 if cells <= _AROUND else _FINENESS * math.isqrt(cells)


def compared(cells: int, *, is_query: bool = True) -> int:
    """Returns the products that choosing among so many centroids takes, of a query or a key."""
    if num_groups(cells) == 1:
        return cells
    return num_groups(cells) + (_AROUND if is_query else _AROUND_TO_ASSIGN)


class Centroids:
    """Centroids of cells, and of groups of these.

    Args:
        centroid_CD: float32.
        group_GD: float32; a single one: all centroids are compared.
        around_GM: The centroids nearest to each group, nearest first, int32; none if it is one.
    """

    def __init__(self, centroid_CD: np.ndarray, group_GD: np.ndarray, around_GM: np.ndarray):
        self.centroid_CD, self.group_GD, self.around_GM = centroid_CD, group_GD, around_GM
        self._mean_D = centroid_CD.mean(axis=0)
        self._norm_C = np.empty(len(centroid_CD), np.float32)
        for part in row_ranges(len(centroid_CD), READ_ROWS):
            centred_BD = centroid_CD[part] - self._mean_D
            self._norm_C[part] = np.einsum("bd,bd->b", centred_BD, centred_BD)
        self._groups = None if len(group_GD) == 1 else one_group(group_GD)

    @classmethod
    def of(cls, centroid_CD: np.ndarray, group_GD: np.ndarray) -> "Centroids":
        """Returns centroids with what is around each group; equal ones must be neighbours."""
        one = cls(centroid_CD, group_GD, np.empty((len(group_GD), 0), np.int32))
        if len(group_GD) == 1:
            return one
        is_new_C = np.append(True, (centroid_CD[1:] != centroid_CD[:-1]).any(axis=1))
        first_C = np.maximum.accumulate(np.where(is_new_C, np.arange(len(is_new_C)), 0))
        number_C = np.flatnonzero(np.arange(len(is_new_C)) - first_C < _MOST_COPIES)
        count = min(_AROUND, len(number_C))
        around_GM = np.empty((len(group_GD), count), np.int32)
        for part in _parts(len(group_GD), len(number_C)):
            score_GC = one._scores(group_GD[part], number_C)
            place_GM = np.argpartition(score_GC, count - 1, axis=1)[:, :count]
            score_GM = np.take_along_axis(score_GC, place_GM, axis=1)
            order_GM = np.lexsort((place_GM, score_GM), axis=1)
            around_GM[part] = number_C[np.take_along_axis(place_GM, order_GM, axis=1)]
        return cls(centroid_CD, group_GD, around_GM)

    def groups_of(self, query_QD: np.ndarray) -> np.ndarray:
        """Returns the group that is nearest to each query, int64 [Q]."""
        if self._groups is None:
            return np.zeros(len(query_QD), np.int64)
        return self._groups.nearest(query_QD, 1)[:, 0]

    def nearest(
        self, query_QD: np.ndarray, count: int, group_Q: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the nearest centroids in order of distance, int64 [Q, V].

        With several groups, the nearest of those around the group of a query; if more than a
        quarter of these are wanted, of all.

        Args:
            query_QD: float32 queries.
            count: V.
            group_Q: Their groups, where these are known.
        """
        if self._groups is None or 4 * count > self.around_GM.shape[1]:
            return self._nearest(query_QD, count, None)
        number_QV = np.empty((len(query_QD), count), np.int64)
        for group, place_Q in members(self.groups_of(query_QD) if group_Q is None else group_Q):
            around_M = np.sort(self.around_GM[group])
            number_QV[place_Q] = self._nearest(query_QD[place_Q], count, around_M)
        return number_QV

    def assigned(self, key_BD: np.ndarray, group_B: np.ndarray) -> np.ndarray:
        """Returns the nearest of few centroids around the group of each key, int32 [B]."""
        number_B = np.empty(len(key_BD), np.int32)
        for group, place_B in members(group_B):
            around_M = np.sort(self.around_GM[group, :_AROUND_TO_ASSIGN])
            number_B[place_B] = around_M[self._scores(key_BD[place_B], around_M).argmin(axis=1)]
        return number_B

    def _nearest(self, query_QD: np.ndarray, count: int, number_M: np.ndarray | None) -> np.ndarray:
        """Returns the nearest of some centroids, or of all, in order of distance: int64 [Q, V]."""
        num_compared = len(self.centroid_CD) if number_M is None else len(number_M)
        kept = min(count + _SPARE, num_compared)
        number_QV = np.empty((len(query_QD), kept), np.int64)
        for part in _parts(len(query_QD), num_compared):
            score_QM = self._scores(query_QD[part], number_M)
            place_QV = np.argpartition(score_QM, kept - 1, axis=1)[:, :kept]
            number_QV[part] = place_QV if number_M is None else number_M[place_QV]
        distance_QV = squared_distances(query_QD, self.centroid_CD, number_QV)
        return nearest(distance_QV, number_QV, count).row_QK

    def _scores(self, query_QD: np.ndarray, number_M: np.ndarray | None) -> np.ndarray:
        """Returns squared distances up to a constant of the query, float32 [Q, M]."""
        centroid_MD, norm_M = self.centroid_CD, self._norm_C
        if number_M is not None:
            centroid_MD, norm_M = centroid_MD[number_M], norm_M[number_M]
        # ‖c − m‖² − 2 c·(q − m): as small as distances allow, so that they round little.
        score_QM = (-2 * (query_QD - self._mean_D)) @ centroid_MD.T
        score_QM += norm_M
        return score_QM


def one_group(centroid_CD: np.ndarray) -> Centroids:
    """Returns centroids that are all compared."""
    return Centroids.of(centroid_CD, centroid_CD.mean(axis=0, keepdims=True))


def train(sample_SD: np.ndarray, cells: int, mesh: Mesh) -> Centroids:
    """Trains centroids by k-means: of groups on a part of the sample, then inside each group.

    Args:
        sample_SD: float32 keys in a random order, the same in all processes.
        cells: C; approximate with several groups, because each gets a power of two.
        mesh: Devices of all processes, each with its share of the sample.
    """
    if num_groups(cells) == 1:
        return one_group(train_centroids(sample_SD, cells, mesh))
    groups = min(num_groups(cells), len(sample_SD))
    group_GD = train_centroids(sample_SD[: _SAMPLED_PER_GROUP * groups], groups, mesh)
    # The groups decide what all processes train together: they must not differ by a rounding.
    group_S = array_of_first(Assigner(group_GD, local_mesh())(sample_SD))
    inside = []
    for _, row_S in members(group_S):  # Still in a random order.
        count = _power_of_two(cells * len(row_S), len(sample_SD))
        inside.append(train_centroids(sample_SD[row_S], min(count, len(row_S)), mesh))
    return Centroids.of(np.concatenate(inside), group_GD)


def _power_of_two(number: int, divisor: int) -> int:
    """Returns the power of two that is nearest to a quotient, and at least one."""
    return 1 << max(0, round(math.log2(number / divisor)))


def local_mesh() -> Mesh:
    """Returns a mesh of the devices of this process."""
    local = jax.local_devices()
    return make_mesh(MeshConfig(data=len(local)), local)


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
    return zip(found.tolist(), np.split(order_N, first)[1:], strict=True)


def _parts(num_queries: int, cells: int) -> Iterator[slice]:
    return row_ranges(num_queries, max(1, _SCORES // cells))
